"""How many tokens samples have, pictures included, known before training and without decoding."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from heapq import nlargest
from typing import Protocol, runtime_checkable

from PIL import Image

from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.errors import DataError
from mllm_cl.task import Sample

Size = tuple[int, int]
# ours: a picture's header takes 10 ms from a slow disk, and decoding as long from any
MOST_ROWS, MOST_DECODED = 20_000, 256


@runtime_checkable
class Outlined(Protocol):
    """Samples of which all but the pictures is known without decoding."""

    def outline(self, index: int) -> Sample: ...


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
        outline, sizes = _outline(samples, index)
        blank = {**outline, "images": [Image.new("RGB", (8, 8))] * len(sizes)}
        text = self.collator.text(blank)
        return self.collator.num_text_tokens(text) + self._of_pictures(sizes, text, outline)

    def longest(self, samples: Sequence[Sample], number: int) -> list[tuple[int, int]]:
        """Tokens and place of the `number` longest samples, the longest first; rows that cannot be
        read are left out.

        Counted are those with the most characters, the most pixels and the most of both, of all
        rows (of more than `MOST_ROWS`, and of `MOST_DECODED` that have to be decoded for it, as
        many are looked at, evenly spread).
        """
        most = MOST_ROWS if isinstance(samples, Outlined) else MOST_DECODED
        looked = {}
        for place in range(0, len(samples), -(-len(samples) // most) or 1):
            try:
                looked[place] = _extent(samples, place)
            except DataError:
                continue
        # A token is about four characters, or 28 x 28 pixels. Only the order counts.
        views = [lambda x: x[0], lambda x: x[1], lambda x: x[0] / 4 + x[1] / 784]
        chosen = {
            place
            for view in views
            for place in nlargest(number + 16, looked, key=lambda place: view(looked[place]))
        }
        counted = []
        for place in sorted(chosen):
            with suppress(DataError):
                counted.append((self.of(samples, place), place))
        return nlargest(number, counted)

    def _of_pictures(self, sizes: tuple[Size, ...], text: str, sample: Mapping) -> int:
        if sizes not in self._added:
            images = [Image.new("RGB", size) for size in sizes]
            whole = self.collator([{**sample, "images": images}])["input_ids"].shape[1]
            self._added[sizes] = whole - self.collator.num_text_tokens(text)
        return self._added[sizes]


def _outline(samples: Sequence[Sample], index: int) -> tuple[Mapping, tuple[Size, ...]]:
    """A sample, its pictures perhaps left out, and their sizes."""
    if isinstance(samples, Outlined):
        outline = samples.outline(index)
        return outline, tuple(outline["sizes"])
    sample = samples[index]
    return sample, tuple(image.size for image in sample.get("images") or ())


def _extent(samples: Sequence[Sample], index: int) -> tuple[int, int]:
    """The characters and the pixels of a sample."""
    outline, sizes = _outline(samples, index)
    contents = [message["content"] for message in outline["messages"]]
    parts = [
        part
        for content in contents
        for part in ([content] if isinstance(content, str) else content)
    ]
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return sum(map(len, texts)), sum(width * height for width, height in sizes)
