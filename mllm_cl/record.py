"""What a stage leaves in its folder, and tells on the terminal; the last file says that all is
there.

T tokens, E experts.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor, nn

from mllm_cl import checkpoint, engine
from mllm_cl.data import fingerprint
from mllm_cl.drift import measure as drift
from mllm_cl.evaluate import Answer
from mllm_cl.memory import Memory, load_tensors, save_tensors
from mllm_cl.metrics.scores import ZERO_SHOT, table
from mllm_cl.model import anatomy
from mllm_cl.model.surgery import guards
from mllm_cl.recipe import Recipe
from mllm_cl.task import Task, TaskSequence

PACKAGES = ("mllm_cl", "torch", "transformers", "accelerate", "peft", "deepspeed", "safetensors")


@dataclass(frozen=True)
class Outcome:
    """A stage when it is done: what the next one starts from, and what there is to say about it.

    `probes` are routing probabilities (T, E) by `task::router`, `kept` the experts per token by
    router, `held` what the guards allowed, `log` the Trainer's own history.
    """

    state: Mapping[str, Tensor]
    memory: Memory
    probes: Mapping[str, Tensor]
    kept: Mapping[str, int]
    held: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, Sequence[Answer]]
    manifest: Mapping[str, object]
    log: Sequence[Mapping[str, object]]


def stage_folder(folder: Path, stage: int) -> Path:
    """The folder of a stage: 0 is the incoming model, n the n-th task."""
    return folder / f"task_{stage}"


def write(
    folder: Path, outcome: Outcome, *, recipe: Recipe, sequence: TaskSequence, stage: int
) -> dict[str, float]:
    """Put a stage into its folder, scores.json last, and return its scores by task."""
    path = stage_folder(folder, stage)
    save_tensors(dict(outcome.state), path / "state.safetensors")
    outcome.memory.save(path / "memory.safetensors")
    save_tensors(dict(outcome.probes), path / "routing.safetensors")
    checkpoint.write_json(path / "drift.json", router_drift(folder, outcome, stage))
    checkpoint.write_json(path / "guards.json", outcome.held)
    checkpoint.write_json(path / "manifest.json", outcome.manifest)
    checkpoint.write_json(path / "log.json", outcome.log)
    checkpoint.write_json(path / "recipe.json", recipe.stage(stage - 1))
    for name, rows in outcome.answers.items():
        _write_lines(path / "predictions" / f"{name}.jsonl", [vars(row) for row in rows])
    checkpoint.drop(path)
    scores = {task.name: _score(task, outcome.answers) for task in _tasks(sequence, outcome)}
    after = sequence[stage - 1].name if stage else ZERO_SHOT
    checkpoint.write_json(path / "scores.json", {"after": after, "scores": scores})
    return scores


def _tasks(sequence: TaskSequence, outcome: Outcome) -> list[Task]:
    return [task for task in (*sequence.retain, *sequence.tasks) if task.name in outcome.answers]


def _score(task: Task, given: Mapping[str, Sequence[Answer]]) -> float:
    rows = given[task.name]
    return task.metric([row.prediction for row in rows], [row.reference for row in rows])


def router_drift(folder: Path, outcome: Outcome, stage: int) -> dict[str, dict[str, float]]:
    """How far routing on each learnt task has moved since it was learnt, by `task::router`."""
    result, first = {}, _first_probes(folder, stage)
    for name, probability_TE in outcome.probes.items():
        learnt_TE = first.get(name, probability_TE).float()
        now_TE = probability_TE.float()
        # Half precision rounds small probabilities to 0, whose logarithm is no number.
        logits = [part.clamp_min(1e-7).log() for part in (learnt_TE, now_TE)]
        result[name] = {
            "overlap": float(
                drift.routing_overlap(learnt_TE, now_TE, k=outcome.kept[name.partition("::")[2]])
            ),
            "distribution_overlap": float(drift.distribution_overlap(learnt_TE, now_TE)),
            "kl": float(drift.routing_kl(*logits)),
            "entropy": float(drift.routing_entropy(now_TE)),
        }
    return result


def _first_probes(folder: Path, stage: int) -> dict[str, Tensor]:
    """Each probe as it was when its task had just been learnt, from the stages before this one."""
    found: dict[str, Tensor] = {}
    for earlier in range(stage):
        file = stage_folder(folder, earlier) / "routing.safetensors"
        if file.exists():
            found = {**load_tensors(file), **found}
    return found


def held(model: nn.Module, earlier: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of every guard: the share of its directions that it forbade (`occupancy`), and the share of
    this task's step that lies in them (`leak`). `earlier` is the state that the task started from.
    """
    found = {}
    for path, one in guards(model).items():
        before = earlier.get(f"{path}::displacement")
        now = one.displacement
        step = now if before is None else now - before.to(now)
        found[path] = {
            "occupancy": float(one.g.occupancy.mean()),
            "leak": float(one.g.leak(step).max()),
        }
    return found


def manifest(recipe: Recipe, trainer, sequence: TaskSequence) -> dict[str, object]:
    """What made a stage: versions, data, seed, world size and effective batch, and what it cost to
    keep.
    """
    arguments = trainer.args
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "engine": trainer.engine,
        "world_size": engine.world_size(),
        "effective_batch": batch * engine.world_size(),
        "seed": recipe.seed,
        "data": {
            task.name: {"train": fingerprint(task.train), "eval": fingerprint(task.eval)}
            for task in (*sequence.retain, *sequence.tasks)
        },
        "trained_parameters": sum(engine.shape(p).numel() for p in trainer.trained().values()),
        "memory_bytes": trainer.memory.num_bytes,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write_lines(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)


def scores_of(recipe: Recipe, folder: Path, stages: Sequence[int]) -> dict[str, object]:
    """The whole matrix of a run, from the folders of its stages."""
    rows = [
        json.loads((stage_folder(folder, stage) / "scores.json").read_text()) for stage in stages
    ]
    return table(
        [block.name for block in recipe.tasks], [block.name for block in recipe.retain], rows
    )


def tell_what_trains(trainer) -> None:
    """Print the weights that the method trains: what matched, before hours are spent on it."""
    from rich.console import Console

    shapes = {
        name.removesuffix("_guard.delta"): engine.shape(parameter)
        for name, parameter in trainer.trained().items()
    }
    if shapes:
        console = Console(width=None if sys.stdout.isatty() else 100)
        console.print(anatomy.shape_table(shapes, "trained"))


def tell_what_held(found: Mapping[str, Mapping[str, float]]) -> None:
    """Print how much the guards forbade, and how much of the step went there all the same."""
    forbidding = [row for row in found.values() if row["occupancy"] > 0]
    if forbidding:
        occupancy = sum(row["occupancy"] for row in forbidding) / len(forbidding)
        leak = max(row["leak"] for row in forbidding)
        number = (
            f"{len(forbidding)} of {len(found)} guards forbade {occupancy:.0%} of their directions"
        )
        print(f"     {number}; at most {leak:.0e} of a step lies there", flush=True)
