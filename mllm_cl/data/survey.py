"""What is in a data set, found by reading every sample of it once."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm_cl.data.errors import DataError
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.source.samples import question
from mllm_cl.task import Sample

Reference = str | list[str]


@dataclass
class Survey:
    """A split, row by row; `bad` rows are in none of the other lists.

    `shown` holds a hash of the pixels of each picture of a row, `asked` the question,
    `references` what is scored against, `lengths` the tokens of the whole chat.
    """

    number: int
    bad: list[DataError] = field(default_factory=list)
    good: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    shown: list[frozenset[str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)

    def common_answers(self, number: int) -> list[tuple[str, float]]:
        """The most frequent answers and their shares."""
        total = max(len(self.answers), 1)
        return [(text, n / total) for text, n in Counter(self.answers).most_common(number)]

    def repeated_ids(self) -> list[str]:
        """Ids that more than one row has."""
        return [name for name, number in Counter(self.ids).items() if number > 1]


@dataclass(frozen=True)
class Overlap:
    """How many rows of a split another one gives away."""

    pictures: int  # rows with a picture that the other split shows too
    questions: int  # of these, and of rows of text alone, those with the same question


def survey(samples: Sequence[Sample], lengths: Lengths) -> Survey:
    """Read all samples: pictures decoded, tokens counted, what cannot be used put aside."""
    found = Survey(len(samples))
    for place in range(len(samples)):
        try:
            sample, length = samples[place], lengths.of(samples, place)
        except DataError as error:
            found.bad.append(error)
            continue
        answer = _answer(sample)
        found.good.append(place)
        found.ids.append(str(sample["id"]))
        found.lengths.append(length)
        found.answer_lengths.append(lengths.collator.num_text_tokens(answer))
        found.shown.append(frozenset(picture_hash(image) for image in sample["images"]))
        found.asked.append(" ".join(question(sample["messages"]).split()).casefold())
        found.answers.append(answer)
        found.references.append(sample.get("references") or answer)
    return found


def overlap(test: Survey, train: Survey) -> Overlap:
    """How much of `test` is in `train`."""
    seen = frozenset().union(*train.shown)
    pairs = {
        (hash_, text)
        for shown, text in zip(train.shown, train.asked, strict=True)
        for hash_ in shown or {""}
    }
    pictures = questions = 0
    for shown, text in zip(test.shown, test.asked, strict=True):
        pictures += bool(shown & seen)
        questions += any((hash_, text) in pairs for hash_ in shown or {""})
    return Overlap(pictures, questions)


def picture_hash(image) -> str:
    """The same for pictures of the same size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:32]


def _answer(sample: Sample) -> str:
    content = sample["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
