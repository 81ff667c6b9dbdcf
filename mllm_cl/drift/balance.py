"""How evenly a router uses its experts: the auxiliary loss of sparse models.

N tokens, E experts.
"""

import torch
from torch import Tensor


def load_balance(logits_NE: Tensor, top_k: int, *, mask_N: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e over the tokens that count; `top_k` where all experts are used alike.

    f_e is how often a token chooses expert e, by the largest k logits, and P_e the mean softmax
    probability, which alone has a gradient (arXiv:2101.03961 eq. 4-6, with k choices a token).
    Routers that score by sigmoids, or correct their choice by a bias, are measured by their logits
    too: that is what a token asks for. 0 where no token counts.
    """
    dtype = torch.promote_types(logits_NE.dtype, torch.float32)
    if mask_N is not None:  # before the softmax, whose gradient would spread a NaN of padding
        logits_NE = logits_NE.where(mask_N[:, None], 0.0)
    weight_NE = logits_NE.to(dtype).softmax(-1)
    chosen_NE = torch.zeros_like(weight_NE)
    chosen_NE.scatter_(-1, logits_NE.detach().topk(top_k, dim=-1).indices, 1.0)
    if mask_N is not None:
        weight_NE, chosen_NE = weight_NE * mask_N[:, None], chosen_NE * mask_N[:, None]
    number = len(logits_NE) if mask_N is None else mask_N.sum().clamp_min(1)
    frequency_E, share_E = chosen_NE.sum(0) / number, weight_NE.sum(0) / number
    return logits_NE.shape[-1] * (frequency_E * share_E).sum()
