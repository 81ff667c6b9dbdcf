"""CPP's contrast of a task's pictures with each other, and with what is kept of earlier classes.

B batch, D width, F hidden width of the neck, K centroids.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.heads import Head
from mllm_cl.model.moe_lora import seeded


def contrast(
    anchor_AD: Tensor, label_A: Tensor, others_MD: Tensor, label_M: Tensor, *, temperature: float
) -> Tensor:
    """How far each anchor is from the others of its class, compared with those of other classes:

        − mean over same p (a·p / τ) + log Σ over different n exp(a·n / τ)

    The first A of the others are the anchors themselves, which no one is compared with. An anchor
    that is alone in its class adds nothing; without any of another class there is no second term.
    """
    logits_AM = anchor_AD @ others_MD.T / temperature
    same_AM = label_A[:, None] == label_M
    itself_AM = torch.arange(len(label_M), device=label_M.device) == torch.arange(
        len(label_A), device=label_A.device
    ).unsqueeze(1)
    friend_AM = same_AM & ~itself_AM
    number_A = friend_AM.sum(-1)
    near_A = (logits_AM * friend_AM).sum(-1) / number_A.clamp(min=1)
    lowest = torch.finfo(logits_AM.dtype).min
    far_A = logits_AM.masked_fill(same_AM, lowest).logsumexp(-1)
    far_A = torch.where(same_AM.all(-1), 0.0, far_A)
    return torch.where(number_A > 0, far_A - near_A, 0.0)


class Contrast(Head):
    """A neck of three linears, thrown away after the task, whose unit outputs are contrasted.

    `known_KD` are the centroids of earlier classes of this step, with noise, `label_K` their
    classes. With `both` they are anchors, too, as in the released code.
    """

    def __init__(
        self, width: int, hidden: int, *, temperature: float, both: bool, seed: int
    ) -> None:
        super().__init__(width)
        sizes = [(hidden, width), (hidden, hidden), (width, hidden)]
        drawn = [_drawn(size, seeded(seed, f"neck.{place}")) for place, size in enumerate(sizes)]
        self.weights = nn.ParameterList(drawn)
        self.biases = nn.ParameterList([torch.zeros(size[0]) for size in sizes])
        self.temperature, self.both = temperature, both
        self.known_KD, self.label_K = torch.zeros(0, width), torch.zeros(0, dtype=torch.long)

    def neck(self, features_BD: Tensor) -> Tensor:
        """Unit vectors (B, D)."""
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            features_BD = functional.gelu(features_BD) if place else features_BD
            features_BD = functional.linear(
                features_BD, weight.to(features_BD.dtype), bias.to(features_BD.dtype)
            )
        return functional.normalize(features_BD, dim=-1)

    def logits(self, features_BD: Tensor) -> Tensor:
        """What the neck makes of them: it has no classes to tell apart."""
        return self.neck(features_BD)

    def losses(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """What each picture adds to the loss, contrasted with those of all processes."""
        own_BD = self.precisely(self.neck, features_BD)
        all_BD, label_B = engine.gathered(own_BD), engine.gathered(labels_B)
        known_KD = functional.normalize(self.known_KD.to(own_BD), dim=-1)
        others_MD = torch.cat([all_BD, known_KD])
        label_M = torch.cat([label_B, self.label_K.to(label_B)])
        anchors = len(others_MD) if self.both else len(all_BD)
        with torch.autocast(own_BD.device.type, enabled=False):
            loss_A = contrast(
                others_MD[:anchors],
                label_M[:anchors],
                others_MD,
                label_M,
                temperature=self.temperature,
            )
        # A mean over all anchors, of which every picture bears its part.
        share = len(all_BD) / anchors
        mine = slice(engine.rank() * len(own_BD), (engine.rank() + 1) * len(own_BD))
        return share * loss_A[mine] + share * loss_A[len(all_BD) :].sum() / len(all_BD)


def _drawn(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """N(0, 0.02²), cut off at two deviations."""
    return nn.init.trunc_normal_(torch.empty(size), std=0.02, a=-0.04, b=0.04, generator=generator)
