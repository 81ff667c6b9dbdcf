"""What routers say and choose: kept as they say it, noted as they choose it, chosen again.

T tokens (any number of leading dimensions), E experts, K experts of one token.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mllm_cl.drift.balance import load_balance
from mllm_cl.drift.covariance import recomputing
from mllm_cl.model import anatomy
from mllm_cl.model.adapt import resting_experts
from mllm_cl.model.moe_lora import Router
from mllm_cl.model.penalty import check_graph
from mllm_cl.model.surgery import installed_on
from mllm_cl.model.tokens import Tokens
from mllm_cl.model.walk import walk

_TOP_K = (torch.topk, Tensor.topk)


def all_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Native routers and those of LoRA mixtures, by name. ValueError where there is none."""
    mixtures = {path: moe.router for path, moe in resting_experts(model).items()}
    found = anatomy.routers(model) | mixtures
    if not found:
        raise ValueError(
            f"what routers do is to be held or balanced, but {type(model).__name__} has none. Set "
            "num_experts to two or more for a routed mixture of LoRA experts, or choose a model "
            "with experts of its own."
        )
    return found


# What routers say


@dataclass(frozen=True)
class Said:
    """The logits (N, E) of the rows that a router was handed, in their graph. `token_N` is which of
    the batch's tokens they are, None where they are no tokens or no mask is there to count by;
    `top_k` how many experts each chooses, None: all answer.
    """

    logits_NE: Tensor
    token_N: Tensor | None
    top_k: int | None


def listen(model: nn.Module) -> None:
    """Let every router keep what it says in a forward, for `heard`. Comes before the guards: inside
    of theirs, a router reads its effective weight.
    """
    found = all_routers(model)
    if all("said" in vars(router) for router in found.values()):
        return
    top_k = {path: moe.top_k for path, moe in resting_experts(model).items()}
    top_k |= anatomy.top_k(model)
    # Not all reach every router: what one said to another batch would pass for this one's.
    model.register_forward_pre_hook(_forget)
    tokens = Tokens(model, anatomy.routers(model))
    for path, router in found.items():
        router._deaf_forward, router.said = router.forward, None
        router.ear = _Ear(path, tokens, top_k[path])
        router.forward = MethodType(_listening_forward, router)


@dataclass(frozen=True)
class _Ear:
    path: str
    tokens: Tokens
    top_k: int | None


def _forget(model: nn.Module, args: tuple) -> None:
    for module in model.modules():
        if "said" in vars(module):
            module.said = None


def _listening_forward(self: nn.Module, *args, **kwargs):
    check_graph(self)
    output = self._deaf_forward(*args, **kwargs)
    said_TE = output if isinstance(self, Router) else anatomy.logits(self, args[0])
    # A recompute has to do the same work, but comes after its forward was listened to.
    if not recomputing() and said_TE.numel():
        token_N = self.ear.tokens.index_of(self.ear.path, args[0].detach())
        self.said = Said(said_TE.flatten(0, -2), token_N, self.ear.top_k)
    return output


def heard(model: nn.Module) -> dict[str, Said]:
    """What each router said in the last forward; a router that no token reached is left out."""
    return {
        path: module.said
        for path, module in model.named_modules()
        if vars(module).get("said") is not None
    }


def listen_for_balance(model: nn.Module, training: Iterable[nn.Module]) -> None:
    """`listen`, and switch off the balancing loss that the model would add by itself.

    ValueError where none of the routers that are to train chooses among experts.
    """
    listen(model)
    if not any(router.ear.top_k for router in training):
        raise ValueError(
            "router_aux_loss_coef balances which experts are chosen, but where routers train all "
            "LoRA experts answer. Set top_k to less than num_experts, or leave it out."
        )
    for _, module, _ in walk(model):
        if isinstance(module, PreTrainedModel) and vars(module.config).get("output_router_logits"):
            module.config.output_router_logits = False
            warnings.warn(
                f"{type(module).__name__} would add a balancing loss of its own "
                "(output_router_logits in its config), beside router_aux_loss_coef: switched off",
                stacklevel=2,
            )


def imbalance(model: nn.Module, mask_BT: Tensor | None) -> Tensor | None:
    """The mean over routers that train of `load_balance` on the last forward; None: none was heard.

    transformers' own loss adds up the layers first, where opposite imbalances cancel, and several
    families have none. Each process balances its own micro-batch, as there.
    """
    losses = []
    for path, said in heard(model).items():
        if said.top_k is None or not _trains(model.get_submodule(path)):
            continue
        known = mask_BT is not None and said.token_N is not None
        mask_N = mask_BT.reshape(-1).bool()[said.token_N] if known else None
        losses.append(load_balance(said.logits_NE, said.top_k, mask_N=mask_N))
    return torch.stack(losses).mean() if losses else None


def _trains(router: nn.Module) -> bool:
    return router._parameters["weight"].requires_grad or "weight" in installed_on(router)


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
