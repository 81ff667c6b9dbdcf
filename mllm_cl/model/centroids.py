"""Several centroids for each class: found by k-means, and compared with by cosine.

B batch, C classes, D width, K centroids, N pictures, R candidates.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Head, cosines
from mllm_cl.model.prompts import Choice
from mllm_cl.model.vision import Adaptation, put, unadapted

STEPS = 100  # of k-means, which has settled long before: ours


def centroids(
    features_ND: Tensor, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The means (K, D) of clusters of the features, and the variances (K, D) in each: float64.

    Clusters are found by k-means on unit vectors, since cosines compare them later, from a start
    by k-means++. There are fewer than `number` where there are fewer pictures.
    """
    features_ND = features_ND.double().cpu()
    unit_ND = functional.normalize(features_ND, dim=-1)
    centre_KD = _spread(unit_ND, min(number, len(unit_ND)), generator)
    owner_N = torch.cdist(unit_ND, centre_KD).argmin(-1)
    for _ in range(STEPS):
        centre_KD = torch.stack(
            [
                unit_ND[owner_N == place].mean(0) if (owner_N == place).any() else centre_D
                for place, centre_D in enumerate(centre_KD)
            ]
        )
        before_N, owner_N = owner_N, torch.cdist(unit_ND, centre_KD).argmin(-1)
        if torch.equal(before_N, owner_N):
            break
    groups = [features_ND[owner_N == place] for place in owner_N.unique()]
    means_KD = torch.stack([group_ND.mean(0) for group_ND in groups])
    return means_KD, torch.stack([group_ND.var(0, correction=0) for group_ND in groups])


def _spread(unit_ND: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """The first of random order, and then pictures by their squared distance to those chosen."""
    chosen = [int(torch.randint(len(unit_ND), (1,), generator=generator))]
    while len(chosen) < number:
        distance_N = torch.cdist(unit_ND, unit_ND[chosen]).amin(-1).square()
        if not distance_N.any():  # the same picture over and over
            break
        chosen.append(int(torch.multinomial(distance_N, 1, generator=generator)))
    return unit_ND[chosen]


class Finder(Adaptation):
    """Which task's prompts a picture gets: in training the newest task's; asked to answer, in turn
    those of the `candidates` keys nearest to what the frozen encoder makes of it.

    Answers are features (B, R D), R being the candidates. Keys and what is shown are buffers, by
    which features in a cache are told apart.
    """

    FROZEN, NEWEST, FOUND = 0, 1, 2

    def __init__(self, tasks: int, candidates: int) -> None:
        super().__init__()
        self.tasks, self.candidates = tasks, candidates
        self.choice = Choice()
        # The bits of what is fp32: DeepSpeed would round floats to the model's dtype.
        self.register_buffer("key_bits_KD", torch.zeros(0, 0, dtype=torch.int32))
        self.register_buffer("task_K", torch.zeros(0, dtype=torch.long))
        self.register_buffer("shown", torch.tensor(self.FROZEN))

    def know(self, key_KD: Tensor, task_K: Tensor) -> None:
        """Find by these keys from here on: what a task's pictures were to the frozen encoder."""
        device = self.shown.device
        self.key_bits_KD = key_KD.float().contiguous().view(torch.int32).to(device)
        self.task_K = task_K.to(device)

    def show(self, shown: int) -> None:
        """Let the encoder answer with FROZEN features, the NEWEST task's or those FOUND."""
        self.shown = torch.full_like(self.shown, shown)

    def take(self, task_B: Tensor) -> None:
        """Give each picture the prompts of a task."""
        self.choice.weight_BKP = functional.one_hot(task_B, self.tasks)[:, None].float()

    def found(self, query_BD: Tensor) -> Tensor:
        """The tasks (B, R) of the nearest keys."""
        with torch.autocast(query_BD.device.type, enabled=False):
            cosine_BK = cosines(query_BD.float(), self.key_bits_KD.view(torch.float32))
        number = min(self.candidates, len(self.task_K))
        return self.task_K[cosine_BK.topk(number, dim=-1).indices]


def attach_finder(encoder: Encoder, finder: Finder) -> None:
    """Let `finder` choose the task whose prompts act on a picture."""
    put(encoder, "finder", finder, _forward_found)


def _forward_found(self: Encoder, pixel_values_BCHW: Tensor) -> Tensor:
    finder, forward = self.finder, self._forward_before_finder
    if not finder.active:
        return forward(pixel_values_BCHW)
    if self.training or finder.shown == finder.NEWEST:
        finder.take(finder.shown.new_full((1,), finder.tasks - 1))
        return forward(pixel_values_BCHW)
    with unadapted(self):
        query_BD = forward(pixel_values_BCHW)
    if finder.shown == finder.FROZEN:
        return query_BD
    parts = []
    for task_B in finder.found(query_BD).unbind(-1):
        finder.take(task_B)
        parts.append(forward(pixel_values_BCHW))
    return torch.cat(parts, dim=-1)


class Centroids(Head):
    """logits = the largest cosine between any candidate's feature and any centroid of the class."""

    def __init__(self, width: int, centroid_KD: Tensor, class_K: Tensor) -> None:
        super().__init__(width)
        self.centroid_KD, self.class_K = centroid_KD, class_K
        self.grow(int(class_K.max()) + 1)

    def logits(self, features_BD: Tensor) -> Tensor:
        """The cosines (B, C) of the nearest centroids."""
        candidates_BRD = features_BD.unflatten(-1, (-1, self.width))
        cosine_BRK = cosines(candidates_BRD, self.centroid_KD.to(features_BD))
        nearest_BK = cosine_BRK.amax(1)
        lowest_BC = nearest_BK.new_full((len(nearest_BK), self.number), -torch.inf)
        class_BK = self.class_K.to(nearest_BK.device).expand_as(nearest_BK)
        return lowest_BC.scatter_reduce(1, class_BK, nearest_BK, "amax")

    def by_name(self, features_BD: Tensor, prompts_CPD: Tensor) -> Tensor:
        """The largest cosine between any candidate's feature and the text of the class."""
        candidates_BRD = features_BD.unflatten(-1, (-1, self.width))
        return super().by_name(candidates_BRD, prompts_CPD).amax(1)
