"""What routers say and choose: kept as they say it, noted as they choose it, chosen again.

T tokens (any number of leading dimensions), E experts, K experts of one token.
"""

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mllm_cl.drift.covariance import recomputing
from mllm_cl.model import anatomy
from mllm_cl.model.adapt import resting_experts
from mllm_cl.model.moe_lora import Router
from mllm_cl.model.penalty import check_graph

_TOP_K = (torch.topk, Tensor.topk)


def all_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Native routers and those of LoRA mixtures, by name. ValueError where there is none."""
    mixtures = {path: moe.router for path, moe in resting_experts(model).items()}
    found = anatomy.routers(model) | mixtures
    if not found:
        raise ValueError(
            f"the method holds what routers do, but {type(model).__name__} has none. Set "
            "num_experts to two or more for a routed mixture of LoRA experts, or choose a model "
            "with experts of its own."
        )
    return found


# What routers say


def listen(model: nn.Module) -> None:
    """Let every router keep the logits of its last forward, for `heard`. Comes before the guards:
    inside of theirs, a router reads its effective weight.
    """
    for router in all_routers(model).values():
        if "said_TE" not in vars(router):
            router._deaf_forward, router.said_TE = router.forward, None
            router.forward = MethodType(_listening_forward, router)


def _listening_forward(self: nn.Module, *args, **kwargs):
    check_graph(self)
    output = self._deaf_forward(*args, **kwargs)
    said_TE = output if isinstance(self, Router) else anatomy.logits(self, args[0])
    # A recompute has to do the same work, but comes after its forward was listened to.
    if not recomputing():
        self.said_TE = said_TE
    return output


def heard(model: nn.Module) -> dict[str, Tensor]:
    """The logits (T, E) of the last forward by router, in its graph; forgotten with this call.

    A router that no token reached has none.
    """
    found = {}
    for path, module in model.named_modules():
        if vars(module).get("said_TE") is not None:
            found[path], module.said_TE = module.said_TE.flatten(0, -2), None
    return {path: said_TE for path, said_TE in found.items() if len(said_TE)}


# What they choose


def replay_choices(model: nn.Module) -> None:
    """Make ready every block that chooses experts, each the module around a router.

    ValueError for a mixture of LoRA experts that all answer.
    """
    for path, moe in resting_experts(model).items():
        if moe.top_k is None:
            raise ValueError(
                f"all {moe.num_experts} experts answer at {path}, so there is no choice to play "
                "again. Set top_k to less than num_experts."
            )
    ready = _choices(model)
    for path in all_routers(model):
        block = model.get_submodule(path.rpartition(".")[0])
        if "choice" not in vars(block):
            block.choice = _Choice(block)
    for choice in ready.values():
        choice.chosen = None


def note_choices(model: nn.Module, ask: Callable[[], object]) -> None:
    """From now on every block that trains chooses the experts that it chooses during `ask()`.

    ValueError for a block that was asked and chose by other means than top-k.
    """
    choices = _choices(model)
    for choice in choices.values():
        choice.chosen, choice.notes = None, True
    try:
        ask()
    finally:
        for choice in choices.values():
            choice.notes = False
    for path, choice in choices.items():
        if choice.chosen == []:
            raise ValueError(
                f"{path} chooses its experts by other means than top-k, so its choice cannot be "
                "played again. Take router_kl, or a method that leaves routing alone."
            )


def forget_choices(model: nn.Module) -> None:
    """Every block chooses by itself again."""
    for choice in _choices(model).values():
        choice.chosen = None


def _choices(model: nn.Module) -> dict[str, "_Choice"]:
    return {
        path: module.choice for path, module in model.named_modules() if "choice" in vars(module)
    }


class _Choice:
    """The experts that a block chose, as the indices of every top-k in its forward.

    Families differ in what a router returns, in which module chooses and by which score, but all
    choose by top-k. Hooks, which a recompute under activation checkpointing runs again.
    """

    def __init__(self, block: nn.Module) -> None:
        self.notes, self.chosen = False, None
        self._mode: TorchFunctionMode | None = None
        block.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave, always_call=True)

    def _enter(self, block: nn.Module, args: tuple) -> None:
        if self.notes:
            self.chosen = []
            self._mode = _Noted(self.chosen)
        elif block.training and self.chosen is not None:
            self._mode = _Replayed(self.chosen)
        if self._mode is not None:
            self._mode.__enter__()

    def _leave(self, block: nn.Module, args: tuple, output: object) -> None:
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)


class _Noted(TorchFunctionMode):
    """Appends the indices of every top-k, but of those in a block within that notes its own."""

    def __init__(self, notes: list[Tensor]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _TOP_K:
            return func(*args, **(kwargs or {}))
        # The block around is not told: in replay it is not asked for this choice either.
        with torch._C.DisableTorchFunction():
            found = func(*args, **(kwargs or {}))
        self.notes.append(found.indices)
        return found


class _Replayed(TorchFunctionMode):
    """Answers every top-k with the noted indices, and the scores as they are now."""

    def __init__(self, notes: list[Tensor]) -> None:
        super().__init__()
        self.left = iter(notes)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOP_K:
            return func(*args, **kwargs)
        score_TE = args[0] if args else kwargs["input"]
        index_TK = next(self.left)
        return torch.return_types.topk((score_TE.gather(-1, index_TK), index_TK))
