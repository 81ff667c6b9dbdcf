"""How a data set is read: the `args` of a task."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from mllm_cl.data.errors import DataError, shortened


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which column is what, where pictures lie, and what is tested on.

    `image`, `question` and `answer` name columns; `prompt` is a question for all rows, in which
    {column} is filled in. Paths of pictures count from `image_root`, by default the file's folder.
    `train` and `test` name the splits: a file, or a split of the hub. With `test_share` that share
    of the training file is the test set instead: rows with the same pictures (or, without any, the
    same question) fall on the same side, chosen by a hash with `split_seed`. `streaming` takes the
    first rows of a data set of the hub, or of a Parquet file, without fetching the rest; `name` and
    `revision` are those of the hub.
    """

    image: str | None = None
    question: str | None = None
    answer: str | None = None
    prompt: str | None = None
    image_root: str | None = None
    train: str | None = None
    test: str | None = None
    test_share: float | None = None
    split_seed: int = 0
    streaming: bool = False
    name: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, args: Mapping[str, object]) -> "Reading":
        """The settings, or a DataError that names what is wrong with them."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in args.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
                raise DataError(f"args has no {key!r}; {hint}")
            kind = {"split_seed": int, "streaming": bool, "test_share": float}.get(key, str)
            if type(value) is not kind and value is not None:
                raise DataError(f"args.{key} is {shortened(value)}, expected a {kind.__name__}")
        reading = cls(**{key: value for key, value in args.items() if value is not None})
        if reading.test_share is not None:
            if not 0 < reading.test_share < 1:
                raise DataError(f"args.test_share is {reading.test_share}, expected 0 to 1")
            if reading.test is not None:
                raise DataError("args has both 'test' and 'test_share'; leave one out")
        return reading

    def side(self, split: str) -> str:
        """The split whose rows are read: a test share is taken from those of the training split."""
        return "train" if self.test_share is not None else split
