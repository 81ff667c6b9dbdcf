"""How many tokens samples have, pictures included, known before training and without decoding."""

from collections.abc import Mapping, Sequence

from PIL import Image

from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.source.samples import Samples
from mllm_cl.task import Sample

Size = tuple[int, int]


class Lengths:
    """Token counts as a processor makes them: of the text, and of pictures by their sizes.

    What a picture adds depends on its size alone, so a blank one of each size is asked of the
    processor, once; of a picture in a file only the header is read.
    """

    def __init__(self, processor) -> None:
        self.collator = ChatCollator(processor)
        self._added: dict[tuple[Size, ...], int] = {}

    def of(self, samples: Sequence[Sample], index: int) -> int:
        """The tokens of one sample in training; DataError where it cannot be read or encoded."""
        if isinstance(samples, Samples):
            outline = samples.outline(index)
            sizes = tuple(outline["sizes"])
        else:
            outline = samples[index]
            sizes = tuple(image.size for image in outline["images"])
        blank = {**outline, "images": [Image.new("RGB", (8, 8))] * len(sizes)}
        text = self.collator.text(blank)
        return self.collator.num_text_tokens(text) + self._of_pictures(sizes, text, outline)

    def _of_pictures(self, sizes: tuple[Size, ...], text: str, sample: Mapping) -> int:
        if sizes not in self._added:
            images = [Image.new("RGB", size) for size in sizes]
            whole = self.collator([{**sample, "images": images}])["input_ids"].shape[1]
            self._added[sizes] = whole - self.collator.num_text_tokens(text)
        return self._added[sizes]
