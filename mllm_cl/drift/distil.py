"""Distillation: how far a distribution is from what it was, over the tokens that count.

B batch, T tokens, E outcomes (experts, or words of a vocabulary), N tokens of all samples.
"""

import torch
from torch import Tensor


def token_share(mask_BT: Tensor) -> Tensor:
    """What each token weighs in a mean over samples of the means over their marked tokens.

    Fractions that sum to 1, 0 where nothing is marked. Samples count alike, so a batch gives the
    same mean whole or cut into equal parts.
    """
    mask_BT = mask_BT.float()
    return mask_BT / mask_BT.sum(-1, keepdim=True).clamp_min(1) / len(mask_BT)


def even_share(x_NE: Tensor) -> Tensor:
    """What each row weighs in their mean (N,)."""
    return torch.full_like(x_NE[:, 0], 1 / len(x_NE))


def divergence(
    before_NE: Tensor, after_NE: Tensor, share_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """sum_n share_n KL(p_n || q_n), p and q the softmax of logits / temperature, before and after.

    In fp32 at least. The gradient reaches `after_NE` alone: share_n (q_n - p_n) / temperature,
    which is 0 where nothing has moved, and no rounding that Adam would make whole steps of.
    """
    return _Divergence.apply(before_NE, after_NE, share_N, temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before_NE: Tensor, after_NE: Tensor, share_N: Tensor, temperature: float):
        dtype = torch.promote_types(after_NE.dtype, torch.float32)
        p_NE, q_NE = (
            (logits_NE.to(dtype) / temperature).log_softmax(-1)
            for logits_NE in (before_NE, after_NE)
        )
        share_N = share_N.to(dtype)
        kl_NE = torch.nn.functional.kl_div(q_NE, p_NE, reduction="none", log_target=True)
        gradient_NE = (q_NE.exp_() - p_NE.exp_()) * share_N.unsqueeze(-1) / temperature
        ctx.save_for_backward(gradient_NE)
        ctx.dtype = after_NE.dtype
        return (share_N * kl_NE.sum(-1)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient_NE,) = ctx.saved_tensors
        return None, (gradient * gradient_NE).to(ctx.dtype), None, None
