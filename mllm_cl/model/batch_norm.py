"""Adapting a network by its batch statistics alone, as APER does with a ResNet: nothing trains."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mllm_cl import engine
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.vision import Adaptation, put, unadapted


class Statistics(Adaptation):
    """A mean and a variance that a batch norm takes in the place of its own, the same at first.

    Parameters that never train, so that they are saved with what does.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        own = norm.running_mean, norm.running_var
        self.mean_D, self.var_D = (nn.Parameter(one.clone(), requires_grad=False) for one in own)


def attach_statistics(encoder: Encoder) -> dict[str, nn.Parameter]:
    """Statistics beside those of every batch norm, for `adapt_statistics`; what trains: nothing. No
    output changes.

    Raises ValueError for an encoder without batch normalisation.
    """
    for norm in _norms(encoder):
        put(norm, "statistics", Statistics(norm), _forward_with_statistics)
    return {}


def _forward_with_statistics(self: nn.Module, x: Tensor) -> Tensor:
    own = self.statistics
    if not own.active:
        return self._forward_before_statistics(x)
    return functional.batch_norm(x, own.mean_D, own.var_D, self.weight, self.bias, eps=self.eps)


def adapt_statistics(model: nn.Module, encoder: Encoder, batches: Iterable[Tensor]) -> None:
    """Let the statistics that were attached follow these pictures, as `adapt_batch_norm` says, and
    leave the norms' own as they are. `model`, which holds the encoder, is asked. Collective.
    """
    norms = _norms(encoder)
    before = [{name: own.clone() for name, own in norm.named_buffers()} for norm in norms]
    with unadapted(encoder):
        adapt_batch_norm(encoder, batches, model)
    for norm, own in zip(norms, before, strict=True):
        engine.write(norm.statistics.mean_D, norm.running_mean)
        engine.write(norm.statistics.var_D, norm.running_var)
        for name, value in own.items():
            norm.get_buffer(name).copy_(value)


@torch.no_grad()
def adapt_batch_norm(
    encoder: Encoder, batches: Iterable[Tensor], model: nn.Module | None = None
) -> None:
    """Start running means and variances at zero, and let them follow these pictures. Collective.

    As released (APER's `bn`): variances start at zero, too, and every batch counts for the layer's
    own momentum (0.1), so a few batches leave them too small. Processes average theirs afterwards;
    how their means differ from each other is not counted as variance. `model` is what is asked, if
    the encoder is part of one.
    Raises ValueError for an encoder without batch normalisation, and where there is no batch.
    """
    norms = _norms(encoder)
    modes = [module.training for module in norms]
    for norm in norms:
        norm.running_mean.zero_()
        norm.running_var.zero_()
        norm.train()
    count, device = 0, next(encoder.parameters()).device
    for pixel_values_BCHW in batches:
        (model or encoder)(pixel_values_BCHW.to(device))
        count += 1
    for norm, mode in zip(norms, modes, strict=True):
        norm.train(mode)
        _average(norm)
    if not count:
        raise ValueError("there is no picture to adapt the batch statistics to")


def _norms(encoder: Encoder) -> list[nn.Module]:
    found = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise ValueError(
            f"{type(encoder.backbone).__name__} has no batch normalisation to adapt: use a ResNet"
        )
    return found


def _average(norm: nn.Module) -> None:
    for statistic in (norm.running_mean, norm.running_var):
        statistic.copy_(engine.sum_over_ranks(statistic) / engine.world_size())
