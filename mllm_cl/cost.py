"""What a stage cost: seconds by what was done, and the peak of memory."""

import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor


class Cost:
    """A stopwatch for one stage on this process, started when it is made.

    `lap` says what the time since the last lap went into. A stage that was resumed counts from
    there. The host's peak is that of the process so far, the accelerator's that of the stage, from
    its first step on where the largest batch was tried before (`preflight.push`).
    """

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._start = self._last = time.monotonic()
        forget_peak()

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def lap(self, name: str) -> None:
        """The time since the last lap, or the start, went into `name`."""
        now = time.monotonic()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def table(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, float] | int | None]:
        """What `cost.json` holds: seconds, peak bytes, and the bytes of `state`."""
        on_gpu = torch.cuda.is_available()
        return {
            "seconds": {**self._laps, "total": self.total},
            "peak_host_bytes": _peak_of_process(),
            "peak_accelerator_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "state_bytes": sum(one.numel() * one.element_size() for one in state.values()),
        }


def forget_peak() -> None:
    """The accelerator's peak counts from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_of_process() -> int | None:
    """The most memory that this process has held, None on Windows, which does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
