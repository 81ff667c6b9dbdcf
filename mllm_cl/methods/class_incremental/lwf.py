"""Learning without forgetting (arXiv:1606.09282): what the model answered about old classes before
a stage it goes on answering about the stage's images. No image of the past is seen.
"""

from dataclasses import dataclass

from torch import Tensor

from mllm_cl.drift.distil import divergence, even_share
from mllm_cl.learner import Distilling


@dataclass(frozen=True, kw_only=True)
class LwF(Distilling):
    """Local cross entropy + strength * mean over images of KL(p_before || p_now), both the softmax
    over old classes of logits / temperature.

    The paper's term is the cross entropy of the two, which differs by a constant; there is no T^2
    (as there is in instruction tuning's `lwf`). Temperature 2 is the paper's, strength 3 that of
    PyCIL and LAMDA-PILOT (the paper: 1). The model from before is one more copy of the encoder.
    """

    strength: float = 3.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what would turn the term around or off."""
        for name in ("strength", "temperature"):
            if vars(self)[name] <= 0:
                raise ValueError(f"{name} must be positive, found {vars(self)[name]}")

    def distilled(self, before_BC: Tensor, now_BC: Tensor) -> Tensor:
        """strength * KL."""
        share_B = even_share(before_BC)
        return self.strength * divergence(before_BC, now_BC, share_B, temperature=self.temperature)
