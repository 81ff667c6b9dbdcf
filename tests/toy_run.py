"""Two toy tasks with a method, in this process and in seconds, and what can be asked of it."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mllm_cl import Memory, Method, Task, continual
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.metrics.answers import metric
from mllm_cl.model.load import load_processor
from mllm_cl.model.surgery import guards
from mllm_cl.recipe import ModelBlock
from mllm_cl.task import Sample

NAMES, BATCH = ("colour", "arrow"), 8


class Counted(Sequence):
    """A task's samples, and how often one of them was looked at."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.reads = samples, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return self.samples[index]


def toy_tasks(size: int = 32) -> list[Task]:
    """Two tasks, numbered from 1 as a run numbers them."""
    exact = metric("exact_match")
    sets = [Counted(toy_task(name, "train", size)) for name in NAMES]
    return [Task(n, i + 1, s, s, exact) for i, (n, s) in enumerate(zip(NAMES, sets, strict=True))]


def load(folder: Path) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def collator_of(folder: Path) -> ChatCollator:
    return ChatCollator(load_processor(ModelBlock(model_name_or_path=str(folder))))


def probe(folder: Path) -> dict[str, Tensor]:
    """A few samples of both tasks, as one batch without labels."""
    samples = [task.train.samples[index] for task in toy_tasks() for index in range(2)]
    batch = collator_of(folder)(samples)
    return {key: value for key, value in batch.items() if key != "labels"}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mode = model.training
    with torch.no_grad():
        found = model.eval()(**batch, use_cache=False).logits
    model.train(mode)
    return found


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that are not saved."""
    return copied(dict(model.named_parameters()) | dict(model.named_buffers()))


@dataclass
class Learnt(TrainerCallback):
    """What one task did to a model; a callback while it trains."""

    losses: list[float] = field(default_factory=list)
    gradient: dict[str, float] = field(default_factory=dict)  # largest, of all steps
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    displaced_before: dict[str, Tensor] = field(default_factory=dict)
    displaced_after: dict[str, Tensor] = field(default_factory=dict)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.displaced_before = _displacements(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                largest = float(parameter.grad.abs().max())
                self.gradient[name] = max(largest, self.gradient.get(name, 0.0))

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.end = everything(model)


def _displacements(model: nn.Module) -> dict[str, Tensor]:
    return copied({name: one.displacement for name, one in guards(model).items()})


def learn(
    model: nn.Module,
    folder: Path,
    method: Method,
    task: Task,
    memory: Memory,
    *,
    past: Sequence[Task] = (),
    steps: int = 4,
    accumulation: int = 1,
    before_training: Callable[[nn.Module], None] = lambda model: None,
    **arguments,
) -> Learnt:
    """Train `task` with `method`: AdamW, weight decay, clipping, eight samples however cut."""
    settings = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        **arguments,
    }
    _spare_the_imports()
    set_seed(3)
    told, samples = Learnt(), method.train_set(task, memory, past)
    trainer = continual(Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=BATCH // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        ),
        train_dataset=task.train if samples is None else samples,
        data_collator=collator_of(folder),
        method=method,
        task=task,
        memory=memory,
        callbacks=[told],
    )
    before_training(model)
    told.start = everything(model)
    if samples is not None:
        trainer.train()
    told.displaced_after = _displacements(model)
    told.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return told


@cache
def _spare_the_imports() -> None:
    """Take what is imported out of the collector, which accelerate calls after each training."""
    gc.freeze()
