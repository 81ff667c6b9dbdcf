"""Experience replay: a few raw samples of every past task are mixed into the next training set."""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.method import Rehearsing


@dataclass(frozen=True, kw_only=True)
class Replay(Rehearsing):
    """Train on the task's own samples and the kept ones of the past, all alike."""

    rehearsal: ClassVar[bool] = True
    unlearns: ClassVar[bool] = True
