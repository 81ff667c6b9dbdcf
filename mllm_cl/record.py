"""What a stage leaves in its folder, and tells on the terminal; the last file says that all is
there.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from mllm_cl import checkpoint, engine, tracking
from mllm_cl.data import fingerprint
from mllm_cl.data.policy import skipped
from mllm_cl.drifts import Drift
from mllm_cl.evaluate import Answer, row
from mllm_cl.memory import Memory
from mllm_cl.method import Method
from mllm_cl.metrics.recall import summary as recall_summary
from mllm_cl.metrics.scores import CONSTANT, ZERO_SHOT, table
from mllm_cl.metrics.stages import COUNTS
from mllm_cl.metrics.stages import summary as stages_summary
from mllm_cl.model import anatomy, four_bit
from mllm_cl.model.surgery import guards
from mllm_cl.progress import unfinished
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.recipe.recipe import STREAMS
from mllm_cl.task import TaskSequence

CUT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # and their defaults
PACKAGES = (
    "mllm_cl",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "safetensors",
    "bitsandbytes",
)


@dataclass(frozen=True)
class Outcome:
    """A stage when it is done: what the next one starts from, and what there is to say about it.

    `held` is what the guards allowed, `log` the Trainer's own history, `scores` what the row of
    scores holds beside those of the answers.
    """

    state: Mapping[str, Tensor]
    memory: Memory
    drift: Drift
    held: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, Sequence[Answer]]
    scores: Mapping[str, Any]
    manifest: Mapping[str, object]
    cost: Mapping[str, object]
    log: Sequence[Mapping[str, object]]


def stage_folder(folder: Path, stage: int) -> Path:
    """The folder of a stage: 0 is the incoming model, n the n-th task."""
    return folder / f"task_{stage}"


def _as_known_to(written: dict, recipe: Recipe, wanted: dict) -> dict:
    """`wanted` without the settings that are at their default and that an earlier version of the
    package, which wrote `written`, did not have.
    """
    defaults = {"method": fields(recipe.method), "model": fields(recipe.model)}
    for key in STREAMS:
        if vars(recipe)[key] is not None:
            defaults[key] = fields(vars(recipe)[key])
    for block, known in defaults.items():
        for one in known:
            new = one.name in wanted[block] and one.name not in written.get(block, {})
            if not new or one.default is MISSING:
                continue
            if wanted[block][one.name] == json.loads(json.dumps(one.default)):
                del wanted[block][one.name]
    return wanted


def is_done(recipe: Recipe, folder: Path, stage: int) -> bool:
    """Whether a stage is complete. RecipeError where it was made by a recipe that differs in what
    counts, or was changed since.
    """
    path = stage_folder(folder, stage)
    if not (path / checkpoint.MARKER).exists():
        return False
    # Every process reads every byte: who raised alone would leave the others waiting.
    if not checkpoint.is_complete(path):
        raise RecipeError(
            "output_dir",
            f"a file in {path} is not as it was written (damaged or edited). Put it back, or "
            f"delete {path} and the stages after it: the same command makes them again.",
        )
    written = json.loads((path / "recipe.json").read_text())
    wanted = _as_known_to(written, recipe, json.loads(json.dumps(recipe.stage(stage - 1))))
    if _effective_batch(recipe) == _manifest(path)["effective_batch"]:
        # How a step is cut into what a process takes is hardware: 2 x 4 samples are 1 x 8.
        written, wanted = _uncut(written), _uncut(wanted)
    if written != wanted:
        key, there, here = _difference(written, wanted)
        raise RecipeError(
            "output_dir",
            f"{path} was made with another {key!r}: {json.dumps(there)} there, "
            f"{json.dumps(here)} in this recipe. Choose another output_dir, or go back to the "
            "recipe that is in the folder.",
        )
    return True


def _difference(written: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first key, with dots, under which two trees differ, and what each has there."""
    both = sorted({*written, *wanted})
    key = next(key for key in both if written.get(key) != wanted.get(key))
    there, here = written.get(key), wanted.get(key)
    if isinstance(there, dict) and isinstance(here, dict):
        inner, there, here = _difference(there, here)
        key = f"{key}.{inner}"
    return key, there, here


def _uncut(tree: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what cuts the batch."""
    training = {key: value for key, value in tree["training"].items() if key not in CUT}
    return {**tree, "training": training}


def _effective_batch(recipe: Recipe) -> int:
    """The samples of an optimizer step under this launch."""
    sizes = [recipe.training.get(key, default) for key, default in CUT.items()]
    return prod(sizes) * engine.launched_processes()


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def state_file(path: Path) -> Path:
    """The file, in the folder of a stage, of all that was trained up to it."""
    return path / "state.safetensors"


def write(
    folder: Path, outcome: Outcome, *, recipe: Recipe, sequence: TaskSequence, stage: int
) -> dict[str, dict[str, Any]]:
    """Put a stage into its folder beside its state, the marker with all hashes last, and return its
    row of each matrix.
    """
    path = stage_folder(folder, stage)
    outcome.memory.save(path / "memory.safetensors")
    outcome.drift.save(path)
    checkpoint.write_json(path / "guards.json", outcome.held)
    checkpoint.write_json(path / "manifest.json", outcome.manifest)
    checkpoint.write_json(path / "cost.json", outcome.cost)
    checkpoint.write_json(path / "log.json", outcome.log)
    checkpoint.write_json(path / "recipe.json", recipe.stage(stage - 1))
    for name, rows in outcome.answers.items():
        _write_lines(predictions(path, name), [vars(answer) for answer in rows])
    checkpoint.drop(path)
    after = sequence[stage - 1].name if stage else ZERO_SHOT
    found = row((*sequence.retain, *sequence.tasks), outcome.answers)
    found[COUNTS] = {name: len(rows) for name, rows in outcome.answers.items()}
    found |= outcome.scores
    checkpoint.write_json(path / "scores.json", {"after": after} | found)
    checkpoint.mark(path)
    return found


def predictions(path: Path, name: str) -> Path:
    """The file of the answers to one task in the folder of a stage."""
    return path / "predictions" / f"{name}.jsonl"


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
    """What made a stage: versions, data, seed, engine, precision and effective batch, and what it
    cost to keep.
    """
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "engine": trainer.engine,
        "mixed_precision": trainer.args.mixed_precision,
        **checkpoint.batch_of(trainer.args),
        "seed": recipe.seed,
        "classes": [*trainer.task.earlier, *trainer.task.labels],
        "data": {
            task.name: {
                "train": sequence.once(fingerprint, task.train),
                "eval": sequence.once(fingerprint, task.eval),
            }
            for task in (*sequence.retain, *sequence.tasks)
        },
        "skipped": skipped_rows(sequence),
        "trained_parameters": sum(engine.shape(p).numel() for p in trainer.trained().values()),
        "memory_bytes": trainer.method.kept_bytes(trainer.memory),
        "captured": {
            source: {"min": float(share_E.min()), "median": float(share_E.median())}
            for source, share_E in trainer.method.captured(trainer.memory).items()
            if len(share_E)
        },
    }


def skipped_rows(sequence: TaskSequence) -> dict[str, dict[str, list[engine.JSON]]]:
    """File and row of what `on_error: skip` left out, by task and split, of all processes; of
    training those rows that were met since the run was last started. Collective.
    """
    found: dict[str, dict[str, list[engine.JSON]]] = {}
    for task in (*sequence.retain, *sequence.tasks):
        for split, samples in (("train", task.train), ("eval", task.eval)):
            rows = engine.gather([list(where) for where in skipped(samples)])
            if rows:
                once = sorted({tuple(row) for row in rows})
                found.setdefault(task.name, {})[split] = [list(row) for row in once]
    return found


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(path)  # the answers' own progress is written over
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)


def scores_of(recipe: Recipe, folder: Path, stages: Sequence[int]) -> dict[str, object]:
    """The whole matrix of a run, from the folders of its stages."""
    rows = [
        json.loads((stage_folder(folder, stage) / "scores.json").read_text()) for stage in stages
    ]
    found = table(
        [block.name for block in recipe.tasks],
        [block.name for block in recipe.retain],
        rows,
        {block.supersedes: block.name for block in recipe.tasks if block.supersedes},
    )
    if recipe.classes is not None:
        found["summary"] |= stages_summary(rows)
    if recipe.retrieval is not None:
        found["summary"] |= recall_summary(rows)
    return found


def tell_other_batch(folder: Path, before: int, arguments: TrainingArguments) -> None:
    """Print that this task's steps have another size than those of the task before it."""
    then = _manifest(stage_folder(folder, before))["effective_batch"]
    now = checkpoint.batch_of(arguments)["effective_batch"]
    if now != then and engine.rank() == 0:
        print(f"     effective batch {now} from here on, {then} up to task_{before}", flush=True)


def tracked(recipe: Recipe, folder: Path, stage: int, outcome: Outcome) -> dict[str, float]:
    """What trackers are told after a stage: see `tracking.values`."""
    done = [one for one in range(stage + 1) if (stage_folder(folder, one) / "scores.json").exists()]
    return tracking.values(scores_of(recipe, folder, done), outcome.drift.rows, outcome.cost)


def tell_what_is_packed(model: nn.Module) -> None:
    """Print how all weights are kept, and in how many bytes."""
    _console().print(four_bit.table(model))


def tell_what_trains(trainer) -> None:
    """Print the weights that the method trains: what matched, before hours are spent on it."""
    shapes = {
        name.removesuffix("_guard.delta"): engine.shape(parameter)
        for name, parameter in trainer.trained().items()
    }
    if shapes:
        _console().print(anatomy.shape_table(shapes, "trained"))


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100)


def tell_what_is_captured(shares: Mapping[str, Tensor]) -> None:
    """Print how much of what entered the experts is in the bases that those of a stack share."""
    shares = {source: share_E for source, share_E in shares.items() if len(share_E)}
    if shares:
        every = torch.cat(list(shares.values()))
        least = min(shares, key=lambda source: float(shares[source].min()))
        held = f"{every.median():.1%} of what entered an expert (median)"
        print(
            f"     the bases of {len(shares)} stacks of experts hold {held}, at least "
            f"{every.min():.1%} ({least}); the rest counts as isotropic",
            flush=True,
        )


def tell_what_is_rehearsed(method: Method, memory: Memory) -> None:
    """Print how many samples of the past are kept, and in how many bytes with all else that is."""
    number = method.num_kept(memory)
    if number:
        print(f"     keeps {number} samples, {method.kept_bytes(memory):,} bytes", flush=True)


def tell_what_was_not_learnt(name: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print that a task's score is no better than one constant answer's."""
    score, constant = found["scores"].get(name), found[CONSTANT].get(name)
    if score is not None and score <= constant:
        print(
            f"     {name} scores {score:.3f}; giving the most common answer every time scores "
            f"{constant:.3f}: it was not learnt. More steps, or another learning rate?",
            flush=True,
        )


def tell_what_held(found: Mapping[str, Mapping[str, float]]) -> None:
    """Print how much the guards forbade, and how much of the step went there all the same."""
    forbidding = [row for row in found.values() if row["occupancy"] > 0]
    if forbidding:
        occupancy = sum(row["occupancy"] for row in forbidding) / len(forbidding)
        leak = max(row["leak"] for row in forbidding)
        number = f"{len(forbidding)} of {len(found)} guarded weights"
        print(
            f"     what is known closes {occupancy:.0%} of the input directions of {number}; at "
            f"most {leak:.0e} of this task's step lies there",
            flush=True,
        )
    shut = [path for path, row in found.items() if row["occupancy"] == 1]
    if shut:
        print(
            f"     {len(shut)} of {len(found)} weights have no direction left to learn in, such as "
            f"{shut[0]}: lower method.forbid_energy if new tasks suffer",
            flush=True,
        )
