"""Checkpoints in the middle of a task: exactly what trains, one format on every engine, marker
last.

The stock checkpoints will not do: they lose a guarded router's delta when a PEFT model is resumed,
miss fused experts' keys, and nothing tells a complete folder from a torn one. Tensors are
safetensors, the rest JSON.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mllm_cl import engine
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.memory import Memory, load_tensors, save_tensors
from mllm_cl.model.adapt import rest
from mllm_cl.model.surgery import guards
from mllm_cl.progress import digest

MARKER, BATCH = "complete.json", "batch.json"
# Samplers that look at lengths order them by what one process takes per step.
BY_LENGTH = ("group_by_length", "batch_rebalance")


def save(trainer: Trainer, folder: Path) -> Path:
    """Write `folder/checkpoint-N`, whole or not at all, and drop old ones beyond
    `save_total_limit`. Collective.
    """
    target = folder / f"checkpoint-{trainer.state.global_step}"
    partial = folder / f".{target.name}.partial"
    trained = trainer.trained()
    weights = {name: engine.full(parameter) for name, parameter in trained.items()}
    _refuse_numbers_that_are_none(weights, target)
    optimizer = engine.optimizer_state(trainer.optimizer, trained)
    if engine.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tensors(weights, partial / "trained.safetensors")
        save_tensors(optimizer, partial / "optimizer.safetensors")
        save_tensors(_guard_state(trainer), partial / "guards.safetensors")
        trainer.memory.save(partial / "memory.safetensors")
        trainer.state.save_to_json(str(partial / "trainer_state.json"))
        write_json(partial / "scheduler.json", trainer.lr_scheduler.state_dict())
        write_json(partial / BATCH, batch_of(trainer.args))
    engine.barrier()
    save_tensors(random_state(), partial / f"random-{engine.rank()}.safetensors")
    engine.barrier()
    if engine.rank() == 0:
        mark(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _drop_old(folder, trainer.args.save_total_limit)
    engine.barrier()
    return target


def _refuse_numbers_that_are_none(weights: dict[str, Tensor], target: Path) -> None:
    """Keep the last good checkpoint rather than write one from which nothing can be learnt."""
    spoilt = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if spoilt:
        raise FloatingPointError(
            f"{len(spoilt)} of {len(weights)} trained weights hold NaN or infinity, {spoilt[0]} "
            f"first, so {target} is not written. Lower the learning rate, or clip with "
            "max_grad_norm; the same command goes on from the checkpoint before."
        )


def newest(folder: Path) -> Path | None:
    """The last checkpoint below `folder` whose every byte is as written, None without one."""
    return next((path for path in reversed(_all(folder)) if is_complete(path)), None)


def mark(folder: Path) -> None:
    """Write down the hash of every file in `folder`: what `is_complete` goes by."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MARKER]
    write_json(folder / MARKER, {path.name: _sha256(path) for path in files})


def is_complete(path: Path) -> bool:
    """Whether the marker is there and every file it names has the hash that it had."""
    try:
        marker = json.loads((path / MARKER).read_text())
        return all(_sha256(path / name) == digest for name, digest in marker.items())
    except (OSError, ValueError):
        return False


def batch_of(arguments: TrainingArguments) -> dict[str, int]:
    """How many samples an optimizer step sees, and how they are cut into what a process takes."""
    per_device, accumulation = arguments.train_batch_size, arguments.gradient_accumulation_steps
    world = arguments.world_size
    return {
        "effective_batch": per_device * accumulation * world,
        "per_device_batch": per_device,
        "accumulation": accumulation,
        "world_size": world,
    }


def check_batch(arguments: TrainingArguments, path: Path) -> None:
    """Refuse to go on in the middle of a task with steps of another size.

    The same step may be cut otherwise: on 1 process x 8 a step sees the samples that it sees on
    2 x 4, in the same order; only an epoch's last, incomplete step is filled up to whole processes.
    Raises ValueError.
    """
    then, now = json.loads((path / BATCH).read_text()), batch_of(arguments)
    told = [
        "{effective_batch} (per_device_train_batch_size {per_device_batch} x "
        "gradient_accumulation_steps {accumulation} x {world_size} processes)".format(**batch)
        for batch in (then, now)
    ]
    if then["effective_batch"] != now["effective_batch"]:
        raise ValueError(
            f"checkpoint {path} was made with an effective batch of {told[0]}, this launch has "
            f"{told[1]}. Change one of the three so that the product is {then['effective_batch']} "
            f"again, or delete {path.parent}/checkpoint-* to begin the task anew."
        )
    strategy = str(arguments.train_sampling_strategy)
    if strategy in BY_LENGTH and then["world_size"] != now["world_size"]:
        raise ValueError(
            f"checkpoint {path} was made by {then['world_size']} processes, and "
            f"'train_sampling_strategy: {strategy}' orders the samples by what one process takes: "
            f"{now['world_size']} would see others. Launch {then['world_size']} processes, or "
            f"delete {path.parent}/checkpoint-* to begin the task anew."
        )


def load(trainer: Trainer, path: Path) -> None:
    """Put the weights, the optimizer, the schedule, the guards and the memory back. Collective.

    Raises ValueError for a checkpoint that is torn, of other weights or of another batch.
    """
    if not is_complete(path):
        raise ValueError(
            f"checkpoint {path} is incomplete or was changed; delete it to go on from an earlier "
            "one"
        )
    check_batch(trainer.args, path)
    trained = trainer.trained()
    weights = load_tensors(path / "trained.safetensors")
    if weights.keys() != trained.keys():
        differ = sorted(weights.keys() ^ trained.keys())
        raise ValueError(
            f"checkpoint {path} trains other weights than this recipe ({len(differ)} differ, "
            f"{differ[0]} is the first); "
            "go back to the recipe that wrote it, or choose another output_dir"
        )
    for name, parameter in trained.items():
        engine.write(parameter, weights[name])
    engine.load_optimizer_state(
        trainer.optimizer, trained, load_tensors(path / "optimizer.safetensors")
    )
    trainer.lr_scheduler.load_state_dict(json.loads((path / "scheduler.json").read_text()))
    for group, rate in zip(
        trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    _load_guard_state(trainer, load_tensors(path / "guards.safetensors"))
    trainer.memory.clear()
    trainer.memory.update(Memory.load(path / "memory.safetensors"))


def _guard_state(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {}
    for path, one in guards(trainer.bare_model()).items():
        parts = {"displacement": one.displacement, **one.g.state()}
        if one.active_E is not None:
            parts["active"] = one.active_E
        tensors |= {f"{path}::{key}": value for key, value in parts.items()}
    return tensors


def _load_guard_state(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    met: dict[str, DriftGuard] = {}  # modules that meet one tensor have one guard between them
    for path, one in guards(trainer.bare_model()).items():
        head = f"{path}::"
        parts = {key[len(head) :]: value for key, value in tensors.items() if key.startswith(head)}
        device = one.displacement.device
        one.displacement, one.active_E = parts["displacement"], parts.get("active")
        g = DriftGuard.from_state(parts)
        one.g = met.setdefault(digest(g.state()), g.to(device))
        one.move(device)
    rest(trainer.bare_model())


def random_state() -> dict[str, Tensor]:
    """The states of all generators as tensors: Python's, numpy's, torch's, the accelerator's."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert (version, kind) == (3, "MT19937")
    state = {
        "python": torch.tensor(numbers),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(path: Path) -> None:
    """Put this rank's generators back; a rank that had no file (more processes than before) keeps
    its own.
    """
    file = path / f"random-{engine.rank()}.safetensors"
    if not file.exists():
        return
    set_random_state(load_tensors(file))


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def drop(folder: Path) -> None:
    """Remove all checkpoints below `folder`: a finished task needs none."""
    for path in [*_all(folder), *folder.glob(".checkpoint-*.partial")]:
        shutil.rmtree(path)


def _all(folder: Path) -> list[Path]:
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _drop_old(folder: Path, limit: int | None) -> None:
    for path in _all(folder)[: -limit if limit else 0]:
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()
