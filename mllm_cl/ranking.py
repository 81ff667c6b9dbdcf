"""What is found first among many, and how far down what was meant is.

E width of what is compared, G gallery, Q queries.
"""

import math

import torch
from torch import Tensor

CHUNK = 256  # queries that are compared with the whole gallery at once
TIE = 1e-6  # what scores have to differ by: features in fp32 are no more exact


def ranks(
    query_QE: Tensor, owner_Q: Tensor, gallery_GE: Tensor, owner_G: Tensor
) -> tuple[Tensor, Tensor]:
    """The rank (Q,) of the best entry of the gallery that has the query's owner, from 1, and the
    place (Q,) of what the query finds first.

    A score is the product of two rows, in float64. What ties with the best own entry comes before
    it: texts that say the same of two images find neither. Of several first ones the first in the
    gallery counts. Each query has an own entry at least.
    """
    wide_GE, parts = gallery_GE.double(), []
    for query, owner in zip(query_QE.split(CHUNK), owner_Q.split(CHUNK), strict=True):
        score_QG = query.double() @ wide_GE.T
        own_QG = owner[:, None] == owner_G
        best_Q = score_QG.masked_fill(~own_QG, -math.inf).amax(1)
        other_QG = score_QG.masked_fill(own_QG, -math.inf)
        rank_Q = 1 + (other_QG >= best_Q[:, None] - TIE).sum(1)
        chosen_QG = torch.where((rank_Q == 1)[:, None] == own_QG, score_QG, -math.inf)
        near_QG = chosen_QG >= chosen_QG.amax(1, keepdim=True) - TIE
        parts.append((rank_Q, near_QG.int().argmax(1)))  # the first of several
    found = zip(*parts, strict=True)
    rank_Q, first_Q = (torch.cat(one) for one in found)
    return rank_Q, first_Q
