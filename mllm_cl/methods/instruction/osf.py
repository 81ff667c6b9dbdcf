"""Orthogonal subspace fine-tuning (arXiv:2504.07097) as PEFT has it, to compare with: the leading
singular directions of a weight are frozen, gradients of the others are kept orthogonal to them.

`same` forbids directions that inputs use, in the weights; this one directions that the weight
itself uses most, in the gradient, which AdamW does not follow exactly.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mllm_cl import engine
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method, Reduce
from mllm_cl.model import osf
from mllm_cl.model.linears import linears
from mllm_cl.model.surgery import only_train
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class OSF(Method):
    """W = U_high S_high V_high + U_low S_low V_low, of which the second product trains.

    After a task the sum is the next task's W and is decomposed anew, so the memory holds the whole
    weights. `preserved` is the share of the singular directions that stay; the paper chooses it per
    layer and lets it grow, PEFT takes one number. Routers stay frozen.
    """

    # PEFT projects in gradient hooks, which never fire under FSDP2, and decomposes whole weights.
    engines: ClassVar[tuple[str, ...]] = ("single", "ddp", "zero1", "zero2")
    starts_exact: ClassVar[bool] = False  # it adds the difference of two equal products

    lora_target_modules: tuple[str, ...] | str = "all-linear"
    preserved: float = 0.5  # PEFT's

    def __post_init__(self) -> None:
        if not 0 < self.preserved < 1:
            raise ValueError(f"preserved is a share in (0, 1), found {self.preserved}")

    @property
    def trains_base(self) -> bool:
        return True

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        return sum(4 * layer.base_layer.weight.numel() for layer in osf.layers(model).values())

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Decompose the weights that the last task left; their minor directions train."""
        if not osf.layers(model):
            osf.inject(model, list(linears(model, self.lora_target_modules)), self.preserved)
        installed, known = osf.layers(model), memory.under("osf/weight")
        if known and known.keys() != installed.keys():
            differ = sorted(known.keys() ^ installed.keys())
            raise ValueError(
                f"the memory holds other weights than those that train ({differ[0]} is the first "
                "that differs). Go on with the settings that wrote it."
            )
        for path, weight_OD in known.items():
            osf.decompose(installed[path], weight_OD)
        only_train(model, [part for layer in installed.values() for part in osf.parts(layer)])

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Begin at the decomposition: what the last task trained is in the weights by now."""
        for layer in osf.layers(model).values():
            for part, initial in zip(osf.parts(layer), osf.initial(layer), strict=True):
                engine.write(part, initial)

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Keep the weights with what the task added."""
        for path, layer in osf.layers(model).items():
            memory[f"osf/weight/{path}"] = osf.effective(layer)
