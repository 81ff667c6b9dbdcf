"""What happens to rows that cannot be used and to samples that are too long: an error, or none.

Skipping keeps everybody else where they are: a bad row's place is taken by the next good row, which
depends on the data alone, so the order of training and a resumed run stay what they were.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mllm_cl.data.chat import too_long
from mllm_cl.data.errors import DataError
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.source.samples import Samples
from mllm_cl.data.source.split import one_sided
from mllm_cl.task import Sample

LISTED = 20  # bad rows that an error names


class Policy(Protocol):
    """The `data` block of a recipe."""

    on_error: str
    error_budget: float
    max_length: int | None
    too_long: str


def for_training(
    samples: Sequence[Sample], policy: Policy, lengths: Lengths | None
) -> Sequence[Sample]:
    """The samples to train on: those that fit, a bad row replaced by the next good one.

    `lengths` is asked where the policy has a `max_length`. Raises DataError where the policy says.
    """
    _tell_if_one_sided(samples)
    samples = _that_fit(samples, policy, lengths)
    if policy.on_error == "skip" and isinstance(samples, Samples):
        return Tolerant(samples, _allowed(samples, policy))
    return samples


def for_scoring(
    samples: Sequence[Sample], policy: Policy, lengths: Lengths | None
) -> Sequence[Sample]:
    """The samples to score: those that fit and can be read, found out by reading them all."""
    _tell_if_one_sided(samples)
    if policy.on_error == "skip" and isinstance(samples, Samples):
        bad = Tolerant(samples, _allowed(samples, policy), quiet=not _first())
        good = [place for place in range(len(samples)) if bad.good(place)]
        samples = samples.select(good, list(bad.problems.values())) if bad.problems else samples
    return _that_fit(samples, policy, lengths)


@dataclass(frozen=True, eq=False)
class Tolerant(Sequence):
    """Samples of which up to `allowed` may be bad; the next good one takes the place of each.

    `problems` are those met so far, each told as it is met: with several processes every one meets
    and counts its own, its loader's workers together. Beyond the budget they are a DataError that
    lists them.
    """

    samples: Samples
    allowed: int
    quiet: bool = False
    problems: dict[int, DataError] = field(default_factory=dict)
    met: Tensor = field(init=False)  # 1 for a bad row, in memory that the workers share

    def __post_init__(self) -> None:
        met = torch.zeros(len(self.samples), dtype=torch.uint8).share_memory_()
        object.__setattr__(self, "met", met)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        for step in range(len(self)):
            place = (index + step) % len(self)
            if not self.met[place]:
                try:
                    return self.samples[place if step else index]
                except DataError as error:
                    self._note(place, error)
        raise self._too_many()

    def outline(self, index: int) -> Sample:
        """What is known of a sample without decoding; a bad row is its DataError."""
        return self.samples.outline(index)

    def good(self, place: int) -> bool:
        """Whether a sample can be read; a bad one is counted."""
        try:
            self.samples[place]
        except DataError as error:
            self._note(place, error)
        return not self.met[place]

    def _note(self, place: int, error: DataError) -> None:
        self.problems[place] = error
        self.met[place] = 1
        number = int(self.met.sum())
        if number > self.allowed:
            raise self._too_many() from error
        if not self.quiet:
            count = f"{number} of at most {self.allowed}"
            print(f"mllm-cl: skipped {error} ({count})", file=sys.stderr, flush=True)

    def skipped(self) -> list[tuple[str, int]]:
        """File and row of each bad row met so far."""
        return [self.samples.place(place) for place in self.met.nonzero().flatten().tolist()]

    def _too_many(self) -> DataError:
        number = int(self.met.sum())
        found = f"{number} of {len(self)} rows cannot be used, {self.allowed} may"
        listed = "".join(f"\n  {error}" for error in list(self.problems.values())[:LISTED])
        more = number - min(len(self.problems), LISTED)
        listed += f"\n  and {more} more" if more > 0 else ""
        return DataError(f"{found}. Mend them, or raise data.error_budget:{listed}")


def skipped(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    """File and row of what was left out of samples because it cannot be read."""
    if isinstance(samples, Tolerant):
        return samples.skipped()
    left_out = samples.left_out if isinstance(samples, Samples) else ()
    return [(error.file, error.row) for error in left_out]


def _tell_if_one_sided(samples: Sequence[Sample]) -> None:
    words = one_sided(samples) if isinstance(samples, Samples) and _first() else ""
    if words:
        print(f"mllm-cl: {samples.place(0)[0]}: {words}", file=sys.stderr, flush=True)


def _allowed(samples: Sequence[Sample], policy: Policy) -> int:
    return max(1, int(policy.error_budget * len(samples)))


def _that_fit(
    samples: Sequence[Sample], policy: Policy, lengths: Lengths | None
) -> Sequence[Sample]:
    """The samples of at most `max_length` tokens; bad rows are left to who reads them."""
    if policy.max_length is None:
        return samples
    assert lengths is not None
    kept, longest = [], 0
    for place in range(len(samples)):
        try:
            length = lengths.of(samples, place)
        except DataError:
            if policy.on_error == "error":
                raise
            length = 0
        if length > policy.max_length and policy.too_long == "error":
            raise too_long(_named(samples, place), length, policy.max_length)
        longest = max(longest, length)
        kept += [place] if length <= policy.max_length else []
    if len(kept) == len(samples):
        return samples
    file = samples.place(0)[0] if isinstance(samples, Samples) else ""
    long = f"more than {policy.max_length} tokens (the longest {longest})"
    if not kept:
        raise DataError(f"all {len(samples)} samples have {long}", file)
    if _first():
        dropped = f"{len(samples) - len(kept)} of {len(samples)} samples, of {long}"
        print(f"mllm-cl: {file or 'data'}: dropped {dropped}", file=sys.stderr, flush=True)
    if isinstance(samples, Samples):
        return samples.select(kept)
    from torch.utils.data import Subset

    return Subset(samples, kept)


def _first() -> bool:
    """Whether this process tells what all processes of a node find alike."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _named(samples: Sequence[Sample], place: int) -> Mapping:
    return samples.outline(place) if isinstance(samples, Samples) else samples[place]
