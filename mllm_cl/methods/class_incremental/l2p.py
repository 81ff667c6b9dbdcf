"""L2P: pictures choose prompts from a pool, by what the frozen encoder makes of them.

Source: Wang et al., "Learning to Prompt for Continual Learning", arXiv:2112.08654, section 4. Its
neighbour DualPrompt puts prompts into attention, and knows in training which are the task's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mllm_cl.learner import KeyedLearner
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.prompts import Keys, Pool, attach_keys, attach_pool, drawn


@dataclass(frozen=True, kw_only=True)
class L2P(KeyedLearner):
    """A pool of `pool` prompts of `length` tokens with a key each. A picture's query q is the
    frozen encoder's feature of it; the prompts of the `top_k` keys of largest cos(q, key) join its
    tokens. A linear head answers the mean of what comes out at their places (`feature: class`: the
    encoder's own feature instead, which is what C3Box takes of CLIP).

        loss = CE over the task's classes − pull · mean over pictures of Σ_chosen cos(q, key)

    Defaults: LAMDA-PILOT's configuration, where pull is 0.1 (the paper has 0.5), and pool, keys and
    prompts from U(−1, 1); it trains with Adam at a constant 0.001875 and batches of 16. There
    pictures of a batch share prompts, which is `batchwise: true` here.
    """

    pool: int = 10
    length: int = 5
    top_k: int = 5
    feature: Literal["prompts", "class"] = "prompts"

    def __post_init__(self) -> None:
        """ValueError where there are fewer prompts than a picture chooses."""
        super().__post_init__()
        if not 1 <= self.top_k <= self.pool:
            raise ValueError(
                f"found top_k {self.top_k} with a pool of {self.pool}: a picture chooses one "
                "prompt or more, and no more than there are"
            )

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """The pool and its keys."""
        device = next(encoder.parameters()).device
        size = self.length, encoder.anatomy.width
        prompts_PLD = drawn(self.pool, *size, seed=self.seed, name="prompts", device=device)
        keys_PQ = drawn(self.pool, encoder.width, seed=self.seed, name="keys", device=device)
        keys = Keys([keys_PQ], top_k=self.top_k, forced=None, batchwise=self.batchwise)
        pool = Pool([prompts_PLD], keys.choice, speaking=self.feature == "prompts")
        attach_pool(encoder, pool)
        attach_keys(encoder, keys)
        return [*pool.parameters(), *keys.parameters()]
