"""LAE: prompts that learn a task, and their slow average over all tasks, answer together.

Source: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient
Tuning", arXiv:2303.10070, section 4. Unlike DualPrompt nothing belongs to a task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.learner import LinearLearner
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Linear
from mllm_cl.model.sides import Either, attach_sided_adapters, attach_sided_prefixes, sided
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class LAE(LinearLearner):
    """`length` keys and `length` values join those of the attention in each of `blocks` and go on
    training from task to task (online); with `adaptation: adapter` a bottleneck of `rank` stands
    beside that attention instead. After every step offline ones follow,

        offline ← decay · offline + (1 − decay) · online,

    in fp32 whatever the model is in. The loss is the cross entropy over the task's classes, of the
    online side; the answer is argmax_c max(softmax_online, softmax_offline)_c. For the first
    `frozen` of a task's steps the head learns alone, as its new rows would otherwise pull at what
    others learnt. `mode: paper`: that is so from the second task on, and offline begins there as a
    copy; `released` (LAMDA-PILOT): both in the first task already.

    Defaults: the released configuration with a prefix of 10 in blocks 0 to 4, decay 0.9999, 3 of 5
    epochs frozen (on ImageNet-R 30 of 50); it trains with Adam at 0.0028125 and batches of 128.
    Left out are its learnt scales and its LoRA, which the released code cannot make. Weight decay
    acts on what is frozen, too.
    """

    adaptation: Literal["prefix", "adapter"] = "prefix"
    length: int = 10
    rank: int = 5
    blocks: tuple[int, ...] = (0, 1, 2, 3, 4)
    decay: float = 0.9999
    frozen: float = 0.6
    mode: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        """ValueError for shares that are none."""
        for name, value in (("decay", self.decay), ("frozen", self.frozen)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is from 0 to below 1, found {value}")

    def head(self, width: int, number: int) -> Linear:
        """A linear head that compares both sides."""
        return Either(width, number, seed=self.seed)

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """The online side."""
        if self.adaptation == "adapter":
            return attach_sided_adapters(encoder, self.blocks, rank=self.rank, seed=self.seed)
        return attach_sided_prefixes(encoder, self.blocks, length=self.length, seed=self.seed)

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        """The offline side, and the number of classes."""
        online = [part for one in sided(model).values() for part in one.online]
        return 8 + 4 * sum(engine.shape(part).numel() for part in online)

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Offline begins as a copy, once."""
        if self._follows(memory) and not memory.under(f"{self.name}/offline"):
            self._put(memory, self._online(model))

    @property
    def rates(self) -> Mapping[str, float]:
        """All have the same: what rests is a group, as ZeRO's optimizer can forget groups alone."""
        return {"encoder.": 1.0}

    def before_step(self, model: nn.Module, memory: Memory, done: float) -> None:
        """Offline follows the last step; at first online rests."""
        if done > 0:
            self._follow(model, memory)
        for one in sided(model).values():
            one.resting = self._follows(memory) and done < self.frozen

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Offline follows the last step, and is what answers beside online."""
        self._follow(model, memory)
        offline = memory.under(f"{self.name}/offline") or self._online(model)
        for name, one in sided(model).items():
            for place, part in enumerate(one.offline):
                engine.write(part, offline[f"{name}.{place}"])
        super().after_task(model, task, memory, batches, reduce)

    def _follows(self, memory: Memory) -> bool:
        return self.mode == "released" or self.seen(memory) > 0

    def _follow(self, model: nn.Module, memory: Memory) -> None:
        offline = memory.under(f"{self.name}/offline")
        if offline:
            online = self._online(model)
            self._put(memory, {name: torch.lerp(online[name], one, self.decay)
                               for name, one in offline.items()})  # fmt: skip

    def _online(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            f"{name}.{place}": engine.full(part).float().cpu()
            for name, one in sided(model).items()
            for place, part in enumerate(one.online)
        }

    def _put(self, memory: Memory, offline: dict[str, Tensor]) -> None:
        memory.put(f"{self.name}/offline", offline)
