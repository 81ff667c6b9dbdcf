"""DER: both towers anew for each task, beside all those before, which are frozen.

Source: Yan et al., "DER: Dynamically Expandable Representation for Class Incremental Learning",
arXiv:2103.16788, section 3, as a row of the cross-modal retrieval of PROOF (arXiv:2305.19270).
"""

from dataclasses import dataclass

from mllm_cl.pair_learner import TowerMethod


@dataclass(frozen=True, kw_only=True)
class DER(TowerMethod):
    """Images and texts have the unit features of all tasks' towers side by side, as DER's
    classifier has; without a classifier they are compared by the cosine of the whole, which is the
    mean of the towers' cosines. DER's auxiliary loss, which has the newest tower tell the task
    apart by itself, is the newest tower's own InfoNCE, `alpha` times (1, as there).

    No masks and no pruning, as in DER's own released code; nothing is balanced afterwards, as no
    sample of the past is kept. `memo` copies the ends of the towers alone. No code of PROOF's row
    is published: what neither paper says of retrieval is ours.
    """
