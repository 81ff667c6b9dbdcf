"""What a few fixed samples of a task meet inside a model: what enters its routers and its trained
layers, and how they are routed. Taken again after later tasks, it tells which of them moved.

T tokens, N kept tokens, D model width, E experts, O output width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from mllm_cl.drift.subspace import Spectrum
from mllm_cl.model.layers import Layer
from mllm_cl.model.linears import vision_names
from mllm_cl.model.watch import Watch, evaluating, forward, router_logits

ROUTED, KEPT = 32, 4  # tokens per sample whose routing, and whose inputs too, are kept. ours
RANK = 32  # directions kept of each module's inputs. ours


@dataclass(frozen=True)
class Sight:
    """What one task's probe met in one pass.

    `routing` are the probabilities (T, E) of every router on up to `ROUTED` tokens a sample;
    `logits` (N, E) and `inputs` (N, D) those of routers and layers on the first `KEPT` of them.
    `energy` is the mean ||y||^2 of what a layer answered. `source_of` names for every module the
    one that was handed the very same inputs, and `spectra` the second moments of these. To the
    `scattered` modules, experts with linears of their own, each pass may bring other tokens.
    """

    routing: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    source_of: dict[str, str] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    scattered: frozenset[str] = frozenset()


def look(
    model: nn.Module,
    layers: Mapping[str, Layer],
    routers: Mapping[str, nn.Module],
    batches: Iterable[dict[str, Tensor]],
    *,
    moments: bool = False,
) -> Sight:
    """One forward pass per batch, dropout off; everything is on the CPU afterwards.

    Tokens are chosen by the sample's number among all, so that they are the same in every pass.
    With `moments` the spectra and `source_of` are there too. Collective where weights are sharded:
    every rank passes the same batches.
    """
    eye = _Eye(model, layers, routers)
    modules = {path: layer.module for path, layer in layers.items()} | dict(routers)
    watch = Watch(model, modules, rank=RANK) if moments else None
    try:
        with evaluating(model):
            for batch in batches:
                eye.choose(batch["attention_mask"])
                forward(model, batch)
    finally:
        eye.close()
        if watch is not None:
            watch.close()
    sight = eye.sight()
    if watch is None:
        return sight
    spectra = {path: tracker.spectrum(RANK) for path, tracker in watch.trackers.items()}
    spectra = {path: found.to("cpu") for path, found in spectra.items()}
    return replace(sight, source_of=watch.source_of, spectra=spectra)


class _Eye:
    """The hooks of `look`."""

    def __init__(self, model, layers: Mapping[str, Layer], routers) -> None:
        self._unmasked = vision_names(model)
        self._parts: dict[tuple[str, str], list[Tensor]] = {}
        self._scattered: set[str] = set()
        self._samples = 0
        self._handles = [
            layer.module.register_forward_hook(partial(self._see_layer, path))
            for path, layer in layers.items()
        ]
        # First in the row: ZeRO-3's own hook takes a router's weight away again.
        self._handles += [
            module.register_forward_hook(partial(self._see_router, path), prepend=True)
            for path, module in routers.items()
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def choose(self, mask_BT: Tensor) -> None:
        """Which rows of what the next forward shows are kept, as if its tokens lay in one row."""
        self._tokens, self._first, self._count = mask_BT.numel(), self._samples, len(mask_BT)
        self._routed, self._kept = [], []
        for row, mask_T in enumerate(mask_BT.cpu().bool()):
            chosen = row * len(mask_T) + _shuffled(mask_T.nonzero()[:, 0], self._first + row)
            self._routed.append(chosen[:ROUTED])
            self._kept.append(chosen[:KEPT])
        self._samples += self._count

    def _rows(self, path: str, tokens: int, number: int) -> Tensor:
        if tokens == self._tokens and path not in self._unmasked:
            return torch.cat(self._routed if number == ROUTED else self._kept)
        if path not in self._unmasked:
            self._scattered.add(path)
        # An image encoder's patches have no mask, and no sample of their own.
        chosen = _shuffled(torch.arange(tokens), self._first)
        return chosen[: number * self._count]

    def _see_layer(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not args[0].numel():  # a visit to idle experts
            return
        input_TD, output_TO = _flat(args[0]), _flat(output)
        rows = self._rows(path, len(input_TD), KEPT).to(input_TD.device)
        self._add("inputs", path, input_TD[rows].float())
        self._add("energy", path, output_TO[rows].float().square().sum(-1))

    def _see_router(self, path: str, router: nn.Module, args: tuple, output: object) -> None:
        if not args[0].numel():
            return
        input_TD = _flat(args[0])
        rows = self._rows(path, len(input_TD), ROUTED).to(input_TD.device)
        self._add("routing", path, router_logits(router, input_TD[rows]).softmax(-1).half())
        rows = self._rows(path, len(input_TD), KEPT).to(input_TD.device)
        self._add("inputs", path, input_TD[rows].float())
        self._add("logits", path, router_logits(router, input_TD[rows]))

    def _add(self, kind: str, path: str, part: Tensor) -> None:
        self._parts.setdefault((kind, path), []).append(part.cpu())

    def sight(self) -> Sight:
        found: dict[str, dict[str, Tensor]] = {}
        for (kind, path), parts in self._parts.items():
            found.setdefault(kind, {})[path] = torch.cat(parts)
        answered = found.pop("energy", {})
        energy = {path: float(part.mean()) for path, part in answered.items() if len(part)}
        return Sight(**found, energy=energy, scattered=frozenset(self._scattered))


def _flat(tensor_TD: Tensor) -> Tensor:
    return tensor_TD.detach().reshape(-1, tensor_TD.shape[-1])


def _shuffled(positions: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return positions[torch.randperm(len(positions), generator=generator)]
