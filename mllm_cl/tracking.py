"""Scores and drift of every stage, sent to the trackers that `report_to` names.

The Trainer's own callbacks prefix every name with `train/` and count steps of one task; here the
names stay as they are and the step is the stage, so that a score is one curve over the run.
"""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

# drift.json's names and ours; each is the mean over the modules that have it
DRIFTS = {
    "inputs": "inputs",
    "router": "router",
    "experts": "experts",
    "overlap": "router_overlap",
    "rerouting_accuracy": "rerouting_accuracy",
    "entropy": "router_entropy",
}


def values(
    scores: Mapping, drift: Mapping[str, Mapping[str, float]], cost: Mapping
) -> dict[str, float]:
    """What one stage has to say, by the names that trackers get.

    score/<task>; average, forgetting, backward_transfer, … (what `scores.json` sums up);
    drift/<inputs|router|experts|router_overlap|rerouting_accuracy|router_entropy>/<task>;
    cost/seconds, cost/state_bytes. What is not defined yet is left out.
    """
    row = scores["rows"][-1]["scores"]
    found = {f"score/{task}": score for task, score in row.items()} | dict(scores["summary"])
    gathered: dict[str, list[float]] = {}
    for key, numbers in drift.items():
        task = key.partition("::")[0]
        for name, number in numbers.items():
            if name in DRIFTS:
                gathered.setdefault(f"drift/{DRIFTS[name]}/{task}", []).append(number)
    found |= {name: statistics.fmean(numbers) for name, numbers in gathered.items()}
    found |= {"cost/seconds": cost["seconds"]["total"], "cost/state_bytes": cost["state_bytes"]}
    return {name: float(number) for name, number in found.items() if number is not None}


def send(found: Mapping[str, float], names: Sequence[str], folder: Path, stage: int) -> None:
    """Log the values of a stage to each tracker, with the stage as the step; one process calls it.

    TensorBoard's files go to `<run>/tensorboard`. A tracker that only the Trainer knows (such as
    codecarbon) gets the Trainer's own curves and is told nothing more.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            continue
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        run = "tensorboard" if name == "tensorboard" else "mllm_cl"
        tracker = kind(run, **place, **_options(name, folder))
        tracker.start()
        tracker.log(dict(found), step=stage)
        tracker.finish()


def _options(name: str, folder: Path) -> dict[str, object]:
    """A run of its own beside the Trainer's, the same one for every stage."""
    path = str(folder.resolve())
    if name == "wandb":
        identity = hashlib.sha256(path.encode()).hexdigest()[:12]
        title = f"{folder.name} (tasks)"
        return {"id": identity, "name": title, "resume": "allow", "reinit": "create_new"}
    if name == "mlflow":
        return {"run_name": folder.name, "nested_run": True}
    return {}
