"""Rows of any format as a map-style sequence of samples; a picture is decoded when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_cl.data.errors import DataError
from mllm_cl.data.source.formats import Format, Message
from mllm_cl.data.source.images import open_picture, picture_size
from mllm_cl.data.source.rows import Rows
from mllm_cl.task import Sample


@dataclass(frozen=True, eq=False)
class Samples(Sequence):
    """The chosen rows of a data set as samples; a row that is none is a DataError naming it.

    A sample has `id`, `messages`, `images` and `where`, its file and row, and `references` where
    its row has several right answers.
    """

    rows: Rows
    format: Format
    root: Path | None
    indices: Sequence[int]
    left_out: Sequence[DataError] = ()  # rows that cannot be read, and are not among `indices`

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._sample(index, open_picture, "images")

    def outline(self, index: int) -> Sample:
        """The sample with the `sizes` of its pictures in place of the pictures: no decoding."""
        return self._sample(index, picture_size, "sizes")

    def select(self, places: Sequence[int], left_out: Sequence[DataError] = ()) -> "Samples":
        """Some of the samples, in the order of `places`, and those that cannot be read."""
        indices = [self.indices[place] for place in places]
        return replace(self, indices=indices, left_out=[*self.left_out, *left_out])

    def place(self, index: int) -> tuple[str, int]:
        """File and row of a sample."""
        return self.rows.place(self.indices[index])

    def _sample(self, index: int, look, key: str) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, none at {index}")
        file, row = where = self.place(index)
        try:
            entry = self.rows[self.indices[index]]
            messages, images, references = self.format.read(entry)
            seen = [look(image, self.root) for image in images]
        except DataError as error:
            raise error.at(*where) from error.__cause__
        name = entry.get("id")
        own = isinstance(name, (str, int)) and str(name).strip()
        sample = {"id": str(name) if own else f"{Path(file).stem}-{row}", "messages": messages}
        sample |= {key: seen, "where": where}
        return sample | ({"references": references} if references else {})


def question(messages: Sequence[Message]) -> str:
    """What the user and the system say, as one text."""
    texts = [part["text"] for m in messages[:-1] for part in m["content"] if part["type"] == "text"]
    return "\n".join(texts)
