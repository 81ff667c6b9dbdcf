"""Fine-tuning: the whole encoder and a linear head learn the stages one after another.

The lower bound of the table of APER (arXiv:2303.07338); nothing holds what was learnt before.
"""

from dataclasses import dataclass

from mllm_cl.learner import WholeLearner


@dataclass(frozen=True, kw_only=True)
class Finetune(WholeLearner):
    """Cross entropy over the stage's own classes ("local"), which leaves the rows of earlier ones
    alone; answers are argmax over all.

    The released configurations of LAMDA-PILOT train with SGD at 0.001, batches of 128, 20 epochs.
    """
