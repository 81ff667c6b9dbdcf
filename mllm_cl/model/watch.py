"""Forward hooks that gather what a method has to know: second moments of inputs, and routing.

T tokens, D model width, E experts, K kept directions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mllm_cl import engine
from mllm_cl.drift.activation import ExpertUsage
from mllm_cl.drift.covariance import CovarianceTracker, recomputing
from mllm_cl.model.anatomy import logits, recorded_routers
from mllm_cl.model.expert_lora import ExpertLoRA, Rows, adapted
from mllm_cl.model.surgery import installed_on
from mllm_cl.model.tokens import Tokens
from mllm_cl.model.tower import guard_picture

# What becomes of rows that enter an expert's stack: (source, input_ND, rows, mask_N).
Gather = Callable[[str, Tensor, Rows, Tensor | None], None]

# Above this width a full second moment costs more memory than it is worth: 64 MiB at 4096.
FULL_BELOW = 1024


def kept_rank(dim: int, rank: int) -> int | None:
    """The rank of the sketch that inputs of width `dim` get; None: their full moment is kept."""
    return None if dim < FULL_BELOW else rank


class Watch:
    """Second moments of what enters `modules`, and the use that `routers` make of their experts.

    Padding is left out by the batch's attention mask (routers see flattened tokens, so the mask is
    taken at the model's door); an image encoder's patches have none. Modules that are handed the
    very same tensor, such as q, k and v, share one tracker; `source_of` maps each module to the one
    that keeps it. `every` n-th forward is counted, so that tracking while training costs little;
    recomputation under activation checkpointing never is. A context manager, or `close()` it.
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
        self._watched = sorted(modules)
        self._guard_picture = guard_picture(model)
        self._forwards = 0
        self._dense = {path for path, lora in adapted(model).items() if lora.layout.scales_input}
        self._tokens = Tokens(model, recorded_routers(model))
        self._seen: dict[tuple, tuple[StorageWeakRef, str]] = {}
        self._handles = [model.register_forward_pre_hook(self._enter)]
        for path, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._input_hook(path)))
        for path, module in (routers or {}).items():
            self.use[path] = ExpertUsage(engine.shape(module.weight)[0])
            # First in the row: ZeRO-3's own hook takes the weight away again.
            self._handles.append(
                module.register_forward_hook(self._router_hook(path), prepend=True)
            )
        self._handles.append(model.register_forward_hook(self._leave, always_call=True))
        self._observed: list[ExpertLoRA] = []

    def observe(self, path: str, lora: ExpertLoRA, gather: Gather) -> None:
        """Hand on what enters both stacks of an experts module, called `path.STACK`."""

        mask_T: Tensor | None = None

        def enter(module: nn.Module, args: tuple) -> None:
            nonlocal mask_T
            mask_T = self._tokens.mask if path in self._dense else self._mask_for(path, args[0])

        def observer(name: str, input_ND: Tensor, rows: Rows) -> None:
            if self._counts():
                mask_N = None if mask_T is None else mask_T[rows.token_N]
                gather(f"{path}.{name}", input_ND, rows, mask_N)

        self._handles.append(lora.layout.module.register_forward_pre_hook(enter))
        lora.observer = observer
        self._observed.append(lora)

    def follow(self, path: str, module: nn.Module, gather: Callable) -> None:
        """Hand on (path, arguments, mask_T or None) of each forward of a module."""

        def hook(module: nn.Module, args: tuple) -> None:
            if self._counts():
                gather(path, args, self._mask_for(path, args[0]))

        self._handles.append(module.register_forward_pre_hook(hook))

    def close(self) -> None:
        """Remove the hooks; what was gathered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tokens.close()
        for lora in self._observed:
            lora.observer = None
        self._observed.clear()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks what was gathered; one rank's data may miss some modules. Collective.

        Raises ValueError, on all ranks alike, if no token of any rank reached some module.
        """
        self._agree(all_reduce_sum)
        for path in sorted(self.trackers):
            self.trackers[path].reduce(all_reduce_sum)
        for path in sorted(self.use):
            self.use[path].reduce(all_reduce_sum)
        empty = [path for path in self._watched if not self._num_tokens(path)]
        empty += [path for path, use in self.use.items() if not use.count and path not in empty]
        if empty:
            others = f" (nor {len(empty) - 1} others)" if len(empty) > 1 else ""
            raise ValueError(
                f"no token of the task's data reached {empty[0]}{others}, so nothing is known of "
                "its inputs. Leave it out of what trains, or give data that uses it."
            )

    def _agree(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Give this rank empty trackers for what only other ranks' data reached."""
        known = torch.zeros(len(self._watched), 3, dtype=torch.float64)
        for row, path in enumerate(self._watched):
            if path in self.source_of:
                keeper = self.source_of[path]
                entry = (1, self.trackers[keeper].dim, self._watched.index(keeper))
                known[row] = torch.tensor(entry)
        total = all_reduce_sum(known).tolist()
        for path, (ranks, dim, keeper) in zip(self._watched, total, strict=True):
            if ranks and path not in self.source_of:
                self._join(path, self._watched[round(keeper / ranks)], round(dim / ranks))

    def _join(self, path: str, keeper: str, dim: int) -> None:
        self.source_of[path] = keeper
        if keeper not in self.trackers:
            self.trackers[keeper] = CovarianceTracker(dim, rank=kept_rank(dim, self.rank))

    def _num_tokens(self, path: str) -> float:
        return float(self.trackers[self.source_of[path]].count) if path in self.source_of else 0.0

    def _enter(self, model: nn.Module, args: tuple) -> None:
        self._on = self._forwards % self.every == 0
        self._forwards += 1

    def _counts(self) -> bool:
        """Whether what a module is handed now is data: no recomputation, no guard picture."""
        shown = self._guard_picture is not None and self._guard_picture.shown
        return self._on and not shown and not recomputing()

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        self._seen.clear()

    def _input_hook(self, path: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if self._counts() and args[0].numel():  # or a visit to idle experts
                self._count(path, args[0])

        return hook

    def _count(self, path: str, input_TD: Tensor) -> None:
        keeper = self._keeper(path, input_TD)
        if path not in self.source_of:
            self._join(path, keeper, input_TD.shape[-1])
        if self.source_of[path] == path:
            input_TD = input_TD.detach()
            self.trackers[path].update(input_TD, mask_T=self._mask_for(path, input_TD))

    def _keeper(self, path: str, input_TD: Tensor) -> str:
        """The first module of this forward that was handed the very same tensor."""
        # By address, since ZeRO-3 hands each module a new alias. Held weakly, or the inputs of all
        # layers would be alive at once; so an address may come again for another tensor.
        key = (input_TD.data_ptr(), input_TD.shape, input_TD.dtype, input_TD._version)
        storage, keeper = self._seen.get(key, (None, path))
        if storage is not None and not storage.expired():
            return keeper
        self._seen[key] = (StorageWeakRef(input_TD.untyped_storage()), path)
        return path

    def _mask_for(self, path: str, input_TD: Tensor) -> Tensor | None:
        if path not in self._dense:
            return self._tokens.mask_of(path, input_TD)
        # Every expert is handed all tokens, scaled by its weight for them: mostly by zero.
        chosen_N, mask_T = input_TD.any(-1).flatten(), self._tokens.mask
        if mask_T is None:
            return chosen_N
        return chosen_N & mask_T.repeat(len(chosen_N) // len(mask_T))

    def _router_hook(self, path: str):
        def hook(router: nn.Module, args: tuple, output: object) -> None:
            if self._counts():
                input_TD = args[0].detach().reshape(-1, args[0].shape[-1])
                weight_TE = router_logits(router, input_TD).softmax(-1)
                self.use[path].update(weight_TE, input_TD, mask_T=self._mask_for(path, input_TD))

        return hook


@torch.no_grad()
def router_logits(router: nn.Module, input_TD: Tensor) -> Tensor:
    """The logits (T, E) of a router whose forward has just run, with what its guard adds."""
    logits_TE = logits(router, input_TD)
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
    gather: Gather | None = None,
) -> Watch:
    """A closed `Watch` over one forward pass per batch, with dropout off; not yet reduced.

    `gather` gets what enters the adapted experts of the model, batch by batch.
    """
    with Watch(model, modules, routers, rank=rank) as watch, evaluating(model):
        for path, lora in adapted(model).items() if gather else ():
            watch.observe(path, lora, gather)
        for batch in batches:
            forward(model, batch)
    return watch


def forward(model: nn.Module, batch: dict[str, Tensor]) -> object:
    """The model's output for a collated batch, without its labels, on the model's own device."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    if "input_ids" in inputs:  # a language model would keep keys and values for more tokens
        inputs["use_cache"] = False
    return model(**inputs)
