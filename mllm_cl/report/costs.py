"""What runs cost, and how a person says it."""

import math
import statistics

from mllm_cl.report.runs import Group, Run


def cost(group: Group) -> dict[str, float | str]:
    """What one run of a group costs over all its stages, the mean over seeds; empty if not kept.

    Seconds by what was done (`total`, `train`, …), the peak of memory in bytes (of the accelerator
    if there is one), the bytes of a stage's state and of the method's memory at the end.
    """
    each = [found for run in group.runs if (found := _of_run(run))]
    if not each:
        return {}
    names = dict.fromkeys(name for one in each for name in one)
    return {
        "label": group.label,
        **{name: statistics.fmean(one.get(name, 0) for one in each) for name in names},
    }


def _of_run(run: Run) -> dict[str, float]:
    costs = [stage.cost for stage in run.stages if stage.cost]
    if not costs:
        return {}
    seconds: dict[str, float] = {}
    for one in costs:
        for name, value in one["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + value
    made = run.stages[-1].manifest
    return seconds | {
        "peak": max(one["peak_accelerator_bytes"] or one["peak_host_bytes"] or 0 for one in costs),
        "state": max(one["state_bytes"] for one in costs),
        "memory": made.get("memory_bytes", 0),
        "trained": made.get("trained_parameters", 0),
    }


def size(count: float) -> str:
    """Bytes as a person says them."""
    units = ("B", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log(count, 1000))) if count >= 1 else 0
    value = count / 1000**power
    return f"{value:.1f} {units[power]}" if power and value < 10 else f"{value:.0f} {units[power]}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
