"""MEMO: the early blocks of both towers are shared by all tasks, the last ones are there anew for
each.

Source: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental
Learning", arXiv:2205.13218, section 4, as a row of the cross-modal retrieval of PROOF
(arXiv:2305.19270).
"""

from dataclasses import dataclass

from mllm_cl.pair_learner import TowerMethod


@dataclass(frozen=True, kw_only=True)
class MEMO(TowerMethod):
    """As `der`, with copies of the last `blocks` blocks of each tower and of what comes behind them
    (norm, CLIP's projection, SigLIP's pooling and head): one block, as LAMDA-PILOT's ViT has.

    Shared blocks are trained in the first task and fixed later, as the paper says. They are passed
    once for every copy: what is saved here is memory, not time. No exemplars and no budget for any;
    what the paper does not say of retrieval is ours.
    """

    blocks: int = 1

    def __post_init__(self) -> None:
        """ValueError for no block."""
        if self.blocks < 1:
            raise ValueError(f"blocks is 1 or more, found {self.blocks}: der copies whole towers")

    @property
    def copied(self) -> int:
        return self.blocks
