"""Fine-tuning of adapters: AdaptFormer's in every block of the frozen encoder, and a linear head.

A row of the table of APER (arXiv:2303.07338, "Finetune Adapter"). Unlike APER's, these adapters
learn in every stage, and the head is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mllm_cl.learner import LinearLearner
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.vision import attach_adapters


@dataclass(frozen=True, kw_only=True)
class FinetuneAdapter(LinearLearner):
    """Cross entropy over the stage's own classes ("local"), as `finetune` has it.

    The adapters are those of `aper` with the same settings.
    """

    rank: int = 64
    dropout: float = 0.1

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """One bottleneck beside the MLP of every block."""
        found = attach_adapters(encoder, rank=self.rank, dropout=self.dropout, seed=self.seed)
        return list(found.values())
