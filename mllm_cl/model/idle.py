"""Experts that no token of a batch is meant for take part in its forward all the same.

Some models route text and pictures apart, each with a router and experts of its own. Processes that
train together have to use the same parameters: with a text-only batch on one of them DDP waits for
gradients that never come, and ZeRO-3 and FSDP2 for weights that nobody else gathers.
N tokens, D model width.
"""

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.model.anatomy import recorded_routers
from mllm_cl.model.experts import is_switched


class Visits:
    """Hands no token at all to those of a block's `parts` that its forward has left out.

    They answer nothing, with the gradient zero, and their answer is scattered into none of the
    block's: not a bit of it changes. A lone process that computes no gradients is left alone.

    transformers' "eager" experts go through those that were chosen, and without a token use no
    weight at all: the "batched_mm" ones stand in for them then.
    """

    def __init__(self, block: nn.Module, parts: dict[str, nn.Module]) -> None:
        self.parts = parts
        self.idle: list[str] = []
        self._called: set[str] = set()
        self._stands_in = False
        block.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave)
        for name, part in parts.items():
            part.register_forward_pre_hook(self._note(name))
            for module in filter(is_switched, part.modules()):
                module.register_forward_pre_hook(self._stand_in)
                module.register_forward_hook(self._stand_back, always_call=True)

    def _note(self, name: str):
        def hook(part: nn.Module, args: tuple) -> None:
            self._called.add(name)

        return hook

    def _stand_in(self, experts: nn.Module, args: tuple) -> None:
        config = experts.config
        self._stands_in = not len(args[0]) and config._experts_implementation == "eager"
        if self._stands_in:
            config._experts_implementation = "batched_mm"

    def _stand_back(self, experts: nn.Module, args: tuple, output: Tensor) -> None:
        if self._stands_in:
            experts.config._experts_implementation = "eager"

    def _enter(self, block: nn.Module, args: tuple) -> None:
        self._called.clear()

    def _leave(self, block: nn.Module, args: tuple, output: tuple | Tensor) -> tuple | Tensor:
        self.idle = [name for name in self.parts if name not in self._called]
        if not self.idle or not (torch.is_grad_enabled() or engine.world_size() > 1):
            return output
        answer, *rest = output if isinstance(output, tuple) else (output,)
        nowhere = torch.zeros((), dtype=torch.bool, device=answer.device)
        for name in self.idle:
            said = self.parts[name](answer.new_zeros(0, answer.shape[-1]))
            # Only what tokens are answered with: ZeRO-3 wants the same backward of all processes,
            # and nothing else of a part that has tokens meets the loss.
            said = said[0] if isinstance(said, tuple) else said
            if said.requires_grad:
                answer = answer.masked_scatter(nowhere, said.to(answer.dtype))
        return (answer, *rest) if isinstance(output, tuple) else answer


def visit_idle(model: nn.Module) -> None:
    """Let the routers and experts of `model` that share a block all take part in it; once.

    Nothing happens to a model whose blocks have one router each.
    """
    for block, parts in _shared_blocks(model).items():
        module = model.get_submodule(block)
        if "visits" not in vars(module):
            module.visits = Visits(module, {path: model.get_submodule(path) for path in parts})


def idle(model: nn.Module) -> set[str]:
    """The names of the parts that no token of the last batch was meant for."""
    found = (vars(module).get("visits") for module in model.modules())
    return {name for visits in found if visits is not None for name in visits.idle}


def _shared_blocks(model: nn.Module) -> dict[str, list[str]]:
    """The blocks that hold several parts with a router and its experts each, within one layer."""
    blocks: dict[str, list[str]] = {}
    for router in recorded_routers(model):
        part = router.rpartition(".")[0]
        block, _, name = part.rpartition(".")
        if block and not name.isdigit() and not block.rpartition(".")[2].isdigit():
            blocks.setdefault(block, []).append(part)
    return {block: parts for block, parts in blocks.items() if len(parts) > 1}
