"""Interleaved timing: every variant runs once per round, so that a busy neighbour slows all alike,
and what is reported is the median of the ratios inside each round.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Timing:
    """What one variant took: seconds, one per round, in the order of the rounds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """The median over rounds of (this variant's seconds / the other's in the same round)."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def compare(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Variant name -> its timing over `rounds` rounds, after `warmup` rounds that do not count."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        # The first of a round pays for the caches of the last: everybody is first in turn.
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = _elapsed(variants[name], torch.device(device))
            if index >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}


def rows(timings: Mapping[str, Timing], *, baseline: str, context: Mapping) -> list[dict]:
    """One JSON-ready row per variant: its median, its ratio to `baseline`, and the `context`."""
    return [
        {
            **context,
            "variant": name,
            "median_ms": round(timing.median * 1e3, 3),
            "baseline": baseline,
            "ratio": round(timing.ratio(timings[baseline]), 3),
            "rounds": len(timing.seconds),
        }
        for name, timing in timings.items()
    ]


def environment(device: torch.device | str) -> dict[str, str | int]:
    """Date, hardware and versions, as every row of results carries them."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(title: str, records: list[dict], columns: tuple[str, ...]) -> str:
    """The chosen columns of the records as aligned text."""
    cells = [list(columns)] + [[str(record[key]) for key in columns] for record in records]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join([title, *lines])


def append(records: list[dict], path: str) -> None:
    """Put the records at the end of a file, one a line."""
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _elapsed(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def most_allocated(run: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes of tensors alive while `run` runs, as torch's allocator counts them.

    For a process that does nothing else. Resident memory would show what an allocator keeps for
    later, too.
    """
    if torch.device(device).type == "cuda":
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def peak_rows(command: list[str], variants: list[str], context: Mapping) -> list[dict]:
    """A row of peak memory for each variant, beside the first: `python -m COMMAND --peak VARIANT`
    prints it, in a process of its own.
    """
    found = {
        name: int(
            subprocess.check_output([sys.executable, "-m", *command, "--peak", name]).split()[-1]
        )
        for name in variants
    }
    return [
        {
            **context,
            "variant": f"peak memory {name} ({peak / 2**20:.0f} MiB)",
            "median_ms": 0,
            "ratio": round(peak / found[variants[0]], 3),
        }
        for name, peak in found.items()
    ]
