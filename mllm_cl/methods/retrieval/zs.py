"""Zero-shot: a CLIP or SigLIP as it is finds captions for images, and images for captions.

Source: CLIP, arXiv:2103.00020; a row of the cross-modal retrieval of PROOF (arXiv:2305.19270).
"""

from dataclasses import dataclass

from mllm_cl.method import Untrained
from mllm_cl.pair_learner import PairMethod


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Untrained, PairMethod):
    """No training and nothing to remember: score = cos(g_i(x), g_t(w)).

    What every other method is to be compared with: its recall falls only as the gallery grows.
    """
