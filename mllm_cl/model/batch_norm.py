"""Adapting a network by its batch statistics alone, as APER does with a ResNet: nothing trains."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mllm_cl import engine
from mllm_cl.model.encoder import Encoder


@torch.no_grad()
def adapt_batch_norm(encoder: Encoder, batches: Iterable[Tensor]) -> None:
    """Start running means and variances at zero, and let them follow these pictures. Collective.

    As released (APER's `bn`): variances start at zero, too, and every batch counts for the layer's
    own momentum (0.1), so a few batches leave them too small. Processes average theirs afterwards;
    how their means differ from each other is not counted as variance.
    Raises ValueError for an encoder without batch normalisation, and where there is no batch.
    """
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError(
            f"{type(encoder.backbone).__name__} has no batch normalisation to adapt: use a ResNet"
        )
    modes = [module.training for module in norms]
    for norm in norms:
        norm.running_mean.zero_()
        norm.running_var.zero_()
        norm.train()
    count = 0
    for pixel_values_BCHW in batches:
        encoder(pixel_values_BCHW)
        count += 1
    for norm, mode in zip(norms, modes, strict=True):
        norm.train(mode)
        _average(norm)
    if not count:
        raise ValueError("there is no picture to adapt the batch statistics to")


def _average(norm: nn.Module) -> None:
    for statistic in (norm.running_mean, norm.running_var):
        statistic.copy_(engine.sum_over_ranks(statistic) / engine.world_size())
