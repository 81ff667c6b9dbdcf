"""Learning without forgetting (arXiv:1606.09282): the answers to the new task's questions stay near
those of the model before it. No past sample is seen.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from mllm_cl.drift.distil import divergence, token_share
from mllm_cl.memory import Memory
from mllm_cl.method import Displaced
from mllm_cl.model.teacher import incoming


@dataclass(frozen=True, kw_only=True)
class LwF(Displaced):
    """L + strength * T^2 * mean over answer tokens of KL(p_before || p_now), both softened by T.

    p_before are the incoming model's next-token probabilities over the whole vocabulary, where the
    answer stands; samples count alike. The term is Hinton's (arXiv:1503.02531), whose T^2 keeps its
    gradient's size; the paper's own cross-entropy differs from it by that and a constant. TRACE
    (arXiv:2310.06762) computes the divergence the other way round.
    """

    strength: float = 1.0  # lambda_o of the paper
    temperature: float = 2.0  # of the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "temperature"):
            if vars(self)[name] <= 0:
                raise ValueError(f"{name} must be positive, found {vars(self)[name]}")

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        if "labels" not in inputs:
            raise ValueError(
                "lwf has to know where the answers stand, but the Trainer took the labels out of "
                "the batch: leave label_smoothing_factor and compute_loss_func out."
            )
        if not self.knows(memory):
            return None
        if outputs.logits is None:
            raise ValueError(
                "lwf compares logits, but this trainer's model returns none (TRL's fused loss does "
                "so). Use a trainer that keeps them."
            )
        before = incoming(model, inputs).logits[:, :-1]
        answer_BT = inputs["labels"][:, 1:] != -100
        kl = divergence(
            before[answer_BT],
            outputs.logits[:, :-1][answer_BT],
            token_share(answer_BT)[answer_BT],
            temperature=self.temperature,
        )
        return self.strength * self.temperature**2 * kl
