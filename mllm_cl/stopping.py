"""How a run ends before it is done: by SIGTERM, as schedulers send it before they take a machine
away (save, leave, and be run again), or by a failure that one message says all about.
"""

import os
import signal
from types import FrameType


class Failed(RuntimeError):
    """A run that cannot go on; the message is all that there is to say.

    `everywhere` says whether all processes fail alike; else each that does has to speak.
    """

    everywhere = False


class Stopped(BaseException):
    """A run has left because it was asked to; the same command goes on where it was."""


def process(rank: int | None = None) -> str:
    """What all messages call a process of a launch, by default this one."""
    number = os.environ.get("RANK", "0") if rank is None else rank
    return f"process {number} of {os.environ.get('WORLD_SIZE', '1')}"


class Stopping:
    """Listens for SIGTERM while it is open.

    During a task's steps the signal waits for the end of the step, whose checkpoint is written
    first. Everywhere else `Stopped` is raised on the spot: a stage that is not done starts from its
    newest checkpoint, and tasks that were answered are not asked again.
    """

    def __init__(self) -> None:
        self.asked, self.waits = False, False

    def __enter__(self) -> "Stopping":
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.waits:
            raise Stopped
