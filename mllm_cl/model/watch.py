"""Forward hooks that gather what a method has to know: second moments of inputs, and who is routed where.

T tokens, D model width, E experts, K kept directions.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.drift.activation import ExpertUsage
from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.model import anatomy
from mllm_cl.model.surgery import installed_on

# Above this width a full second moment costs more memory than it is worth: 4 MiB at 1024, 64 at 4096.
FULL_BELOW = 1024


class Watch:
    """Second moments of what enters `modules`, and the use that `routers` make of their experts.

    Padding is left out by the batch's attention mask (routers see flattened tokens, so the mask is taken
    at the model's door). Modules that are handed the very same tensor, such as q, k and v, share one
    tracker; `source_of` maps each module to the one that keeps it. `every` n-th forward is counted, so
    that tracking while training costs little; recomputation under activation checkpointing never is.
    Use as a context manager, or `close()` it.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        routers: dict[str, nn.Module] | None = None,
        *,
        rank: int = 256,
        every: int = 1,
    ) -> None:
        self.rank, self.every = rank, every
        self.trackers: dict[str, CovarianceTracker] = {}
        self.use: dict[str, ExpertUsage] = {}
        self.source_of: dict[str, str] = {}
        self._forwards, self._mask, self._seen = 0, None, {}
        self._handles = [model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for path, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._input_hook(path)))
        for path, module in (routers or {}).items():
            self.use[path] = ExpertUsage(engine.shape(module.weight)[0])
            # First in the row: ZeRO-3's own hook takes the weight away again.
            self._handles.append(module.register_forward_hook(self._router_hook(path), prepend=True))
        self._handles.append(model.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        """Remove the hooks; what was gathered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def reduce(self, all_reduce_sum) -> None:
        """Sum over ranks what was gathered. Collective; every rank must have seen the same modules."""
        for path in sorted(self.trackers):
            self.trackers[path].reduce(all_reduce_sum)
        for path in sorted(self.use):
            self.use[path].reduce(all_reduce_sum)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._mask = kwargs.get("attention_mask")
        self._on = self._forwards % self.every == 0
        self._forwards += 1

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        self._mask = None
        self._seen.clear()

    def _input_hook(self, path: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if self._on and not _recomputing():
                self._count(path, args[0].detach())

        return hook

    def _count(self, path: str, input_TD: Tensor) -> None:
        # Held until the forward ends, so that an address is not used twice for different tensors.
        holder = self._seen.setdefault(input_TD.data_ptr(), (path, input_TD, input_TD._version))
        keeper, same, version = holder
        if same.shape != input_TD.shape or version != input_TD._version:
            keeper = path
        if self.source_of.setdefault(path, keeper) != path:
            return
        if path not in self.trackers:
            dim = input_TD.shape[-1]
            self.trackers[path] = CovarianceTracker(dim, rank=None if dim < FULL_BELOW else self.rank)
        self.trackers[path].update(input_TD, mask_T=self._mask_for(input_TD))

    def _mask_for(self, input_TD: Tensor) -> Tensor | None:
        # A vision tower sees patches, which have no padding and another count than the text's tokens.
        if self._mask is None or self._mask.dim() != 2:
            return None
        tokens = input_TD.shape[:-1].numel()
        return self._mask.bool() if self._mask.numel() == tokens else None

    def _router_hook(self, path: str):
        def hook(router: nn.Module, args: tuple, output: object) -> None:
            if self._on and not _recomputing():
                input_TD = args[0].detach().reshape(-1, args[0].shape[-1])
                weight_TE = router_logits(router, input_TD).softmax(-1)
                self.use[path].update(weight_TE, input_TD, mask_T=self._mask_for(input_TD))

        return hook


def _recomputing() -> bool:
    """Whether activation checkpointing runs a forward a second time, which happens inside backward."""
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def router_logits(router: nn.Module, input_TD: Tensor) -> Tensor:
    """The logits (T, E) of a router whose forward has just run, with what its guard adds to the weight."""
    logits_TE = anatomy.logits(router, input_TD)
    one = installed_on(router).get("weight")
    if one is None:
        return logits_TE
    return logits_TE + input_TD.reshape(-1, input_TD.shape[-1]).float() @ one().mT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is put back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def measure(
    model: nn.Module,
    modules: dict[str, nn.Module],
    routers: dict[str, nn.Module],
    batches: Iterable[dict[str, Tensor]],
    *,
    rank: int,
) -> Watch:
    """A closed `Watch` over one forward pass per batch, with dropout off. Not yet reduced over ranks."""
    with Watch(model, modules, routers, rank=rank) as watch, evaluating(model):
        for batch in batches:
            forward(model, batch)
    return watch


def forward(model: nn.Module, batch: dict[str, Tensor]) -> object:
    """The model's output for a collated batch, without its labels, on the model's own device."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False)


def routing(
    model: nn.Module, routers: dict[str, nn.Module], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The routing probabilities (T, E) of every router on the batches' real tokens, on the CPU."""
    found: dict[str, list[Tensor]] = {path: [] for path in routers}
    masks: list[Tensor] = []

    def keep(path: str):
        def hook(router: nn.Module, args: tuple, output: object) -> None:
            probability_TE = router_logits(router, args[0]).softmax(-1)
            mask_T = masks[-1].reshape(-1).bool()
            real = mask_T if mask_T.numel() == probability_TE.shape[0] else slice(None)
            found[path].append(probability_TE[real].cpu())

        return hook

    handles = [
        module.register_forward_hook(keep(path), prepend=True) for path, module in routers.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                masks.append(batch["attention_mask"].to(next(model.parameters()).device))
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}
