"""Experience replay: a few raw samples of every past task are mixed into the next training set."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from mllm_cl.memory import Memory
from mllm_cl.method import Tuned
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class Replay(Tuned):
    """Keep `buffer_bytes` of past samples (PNG and text), shared evenly by the past tasks.

    The budget is in bytes, so that replay can be compared with other methods at equal state. Which
    samples are kept is drawn once per task from the seed; each is seen `repeats` times in a task.
    """

    rehearsal: ClassVar[bool] = True

    buffer_bytes: int = 2**20
    repeats: int = 1

    def train_set(self, task: Task, memory: Memory, past: Sequence[Task]) -> Sequence[Sample]:
        """This task's samples and the kept ones of the past; puts their bytes into the memory."""
        kept = [self._keep(earlier, self.buffer_bytes // len(past)) for earlier in past]
        memory["replay/bytes"] = torch.tensor(sum(size for _, size in kept))
        memory["replay/samples"] = torch.tensor(sum(len(samples) for samples, _ in kept))
        return ConcatDataset(
            [task.train, *[samples for samples, _ in kept for _ in range(self.repeats)]]
        )

    def kept_bytes(self, memory: Memory) -> int:
        return memory.num_bytes + int(memory.get("replay/bytes", torch.tensor(0)))

    def forecast_bytes(self, model: nn.Module) -> int:
        return self.buffer_bytes + 16

    def _keep(self, task: Task, budget: int) -> tuple[Sequence[Sample], int]:
        """The first samples of a seeded order that fit into `budget` bytes, and what they take."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + task.index)
        chosen, total = [], 0
        for index in torch.randperm(len(task.train), generator=generator).tolist():
            size = num_bytes(task.train[index])
            if total + size > budget:
                break
            chosen.append(index)
            total += size
        return Subset(task.train, chosen), total


def num_bytes(sample: Sample) -> int:
    """What keeping a sample costs: its text as UTF-8 and its images as PNG."""
    text = sum(len(_text(message["content"]).encode()) for message in sample["messages"])
    return text + sum(_png_bytes(image) for image in sample["images"] or ())


def _text(content: str | list[dict]) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(part.get("text") or "" for part in parts)


def _png_bytes(image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.tell()
