"""The head of ENGINE: units that inject what descriptions and other views of pictures say into
features of a frozen CLIP, and answers that are looked at once more.

A pictures of all processes, B pictures of this one, C classes, D width where pictures and texts
meet, K old classes, L candidates, N pictures and old classes, P prompts of a class, R rounds of
descriptions, V width before the projection.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.discriminant import Discriminant
from mllm_cl.model.heads import Head, cosines, ensemble
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.pairs import contrast
from mllm_cl.model.units import injected, unit

CHUNK = 64  # pictures whose candidates' descriptions are in memory at once: ours


@dataclass(frozen=True)
class Rules:
    """The weights of what is learnt and of what answers; see `ENGINE`. `fades`: old units do."""

    paper: bool
    text_des: float
    image_aug: float
    noise: float
    stat: float
    rerank: float
    rerank_top: int
    fades: bool = False


class Injection(Head):
    """Features v before the projection W; z = W v, u_i and u_t sums of one linear for each task.

        answer = stat · o + (1 − stat) · (rerank · r + (1 − rerank) · cos(u_i(z), t))

    t is the mean direction of u_t of a class's prompts, o a discriminant's (`model.discriminant`)
    and r how well z fits what tells each of the `rerank_top` nearest classes from the others of
    them. mode paper: r_k is the mean over the others of the mean cos(z, d) of the descriptions d of
    k against each; classes that are no candidates get the least r of those that are, so none
    overtakes. mode released: in each of three rounds one description of each pair, their mean as
    one direction; other classes get 0.
    """

    def __init__(
        self, width: int, *, projection_DV: Tensor, log_scale: float, rules: Rules, seed: int = 0
    ) -> None:
        super().__init__(width)
        self.log_scale, self.rules, self.seed = log_scale, rules, seed
        self.images, self.texts = nn.ModuleList(), nn.ModuleList()
        self.draws, self.names = seeded(seed, "draws"), ()
        # Neither parameters nor buffers: no engine casts or shards them.
        self.projection_DV = projection_DV
        self.mean_KD: Tensor | None = None
        self.prompts_CPD: Tensor | None = None
        self.told: tuple[Tensor, Tensor] | None = None
        self.apart_CCRD: Tensor | None = None
        self.rule: tuple[Tensor, Tensor] | None = None

    def expand(self) -> None:
        """One more unit of each side, drawn from the seed as linears are."""
        task, width = len(self.images), len(self.projection_DV)
        for layers, side in ((self.images, "images"), (self.texts, "texts")):
            name = f"{side}.{task}"
            layers.append(unit(width, bound=width**-0.5, seed=self.seed, name=name))

    def newest(self) -> list[nn.Parameter]:
        """What trains: the last units."""
        return [*self.images[-1].parameters(), *self.texts[-1].parameters()]

    def fading(self) -> list[nn.Parameter]:
        """All other units, where they fade."""
        old = (*self.images[:-1], *self.texts[:-1]) if self.rules.fades else ()
        return [p for one in old for p in one.parameters()]

    def inform(
        self, mean_KD: Tensor, prompts_CPD: Tensor, told_CXD: Sequence[Tensor] | None
    ) -> None:
        """The raw means of old classes, the raw features of the prompts of all classes, and those
        of what describes each of them.
        """
        assert len(mean_KD) == self.old and len(prompts_CPD) == self.number
        device = next(self.parameters()).device
        self.projection_DV = self.projection_DV.to(device)
        self.mean_KD, self.prompts_CPD = mean_KD.to(device), prompts_CPD.to(device)
        if told_CXD is not None:
            counts_C = torch.tensor([len(one_XD) for one_XD in told_CXD])
            self.told = torch.cat(list(told_CXD)).to(device), counts_C

    def judge(self, discriminant: Discriminant, apart_CCRD: Tensor | None) -> None:
        """What answers alone have to know: the discriminant, and the features of what tells a class
        from each other one, in each round, with zeros for itself.
        """
        self.rule = discriminant.weights()
        self.apart_CCRD = apart_CCRD  # on the CPU: it grows with the square of the classes

    def project(self, features_BV: Tensor) -> Tensor:
        """z (B, D)."""
        return functional.linear(features_BV, self.projection_DV.to(features_BV))

    def image(self, features_BD: Tensor) -> Tensor:
        """u_i(z), not normalised."""
        return injected(self.images, features_BD, fading=self.rules.fades)

    def text(self, features_CD: Tensor) -> Tensor:
        """u_t(w), not normalised."""
        return injected(self.texts, features_CD, fading=self.rules.fades)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by in the contrast: the released code forgets exp."""
        return math.exp(self.log_scale) if self.rules.paper else self.log_scale

    def losses(
        self, features_BV: Tensor, labels_B: Tensor, views_BV: Tensor | None = None
    ) -> Tensor:
        """What each picture adds: its part of the contrast and of its class's descriptions, of
        which the old classes' noisy means have theirs, and how far it is from its other view.
        """
        rules, device = self.rules, features_BV.device
        # As they come, so that every process has the gradients of its own part alone.
        raw_AD, label_A = self.project(engine.gathered(features_BV)), engine.gathered(labels_B)
        raw_ND = torch.cat([raw_AD, self._remembered().to(raw_AD)])
        label_N = torch.cat([label_A, torch.arange(self.old, device=device)])
        image_ND = functional.normalize(self.image(raw_ND), dim=-1)
        name_CD = functional.normalize(self.text(self.prompts_CPD[:, 0].to(raw_AD)), dim=-1)
        logits_NN = self.scale * image_ND @ name_CD[label_N].T
        loss_N = contrast(logits_NN, label_N if rules.paper else None)
        if rules.text_des:
            told_ND = functional.normalize(self._told(label_N).to(raw_AD), dim=-1)
            loss_N = loss_N + rules.text_des * self._away(name_CD[label_N], told_ND)
        # A mean over pictures and old classes, of which every picture bears its part.
        number, share = len(label_A), len(label_A) / len(label_N)
        mine = slice(engine.rank() * len(labels_B), (engine.rank() + 1) * len(labels_B))
        loss_B = share * (loss_N[mine] + loss_N[number:].sum() / number)
        if views_BV is None:
            return loss_B
        seen_AD = self.project(engine.gathered(views_BV).to(features_BV))
        away_A = self._away(image_ND[:number], functional.normalize(seen_AD, dim=-1))
        return loss_B + rules.image_aug * away_A[mine]

    def _away(self, own_ND: Tensor, aim_ND: Tensor) -> Tensor:
        """How far each is from its aim: −cos; in mode released by a contrast with the others' aims,
        at temperature 1.
        """
        if self.rules.paper:
            return -(own_ND * aim_ND).sum(-1)
        place_N = torch.arange(len(own_ND), device=own_ND.device)
        return functional.cross_entropy(own_ND @ aim_ND.T, place_N, reduction="none")

    def _remembered(self) -> Tensor:
        """The old classes' means (K, D) with noise, drawn on the CPU as everything is."""
        draws_KD = torch.randn(self.mean_KD.shape, generator=self.draws)
        return self.mean_KD + self.rules.noise * draws_KD.to(self.mean_KD)

    def _told(self, label_N: Tensor) -> Tensor:
        """The features (N, D) of a description of each one's class, drawn anew in every step."""
        told_MD, count_C = self.told
        label_N = label_N.cpu()
        drawn_N = torch.rand(len(label_N), generator=self.draws, dtype=torch.float64)
        first_C = count_C.cumsum(0) - count_C
        place_N = first_C[label_N] + (drawn_N * count_C[label_N]).long()
        return told_MD[place_N.to(told_MD.device)]

    def logits(self, features_BV: Tensor) -> Tensor:
        """The answer by all prompts of each class."""
        name_CD = ensemble(self.text(self.prompts_CPD.to(features_BV)))
        return torch.cat([self._answer(one_BV, name_CD) for one_BV in features_BV.split(CHUNK)])

    def _answer(self, features_BV: Tensor, name_CD: Tensor) -> Tensor:
        rules, raw_BD = self.rules, self.project(features_BV)
        answer_BC = functional.normalize(self.image(raw_BD), dim=-1) @ name_CD.T
        if rules.rerank and self.number > 1:
            again_BC = self._looked_at_again(raw_BD, answer_BC)
            answer_BC = rules.rerank * again_BC + (1 - rules.rerank) * answer_BC
        return rules.stat * self.discriminated(features_BV) + (1 - rules.stat) * answer_BC

    def discriminated(self, features_BV: Tensor) -> Tensor:
        """o (B, C), of length 1: in float64 on the CPU, since what classes share is much larger
        than what sets them apart.
        """
        unit_BV = functional.normalize(features_BV.double().cpu(), dim=-1)
        logits_BC = functional.linear(unit_BV, *self.rule)
        return functional.normalize(logits_BC, dim=-1).to(features_BV)

    def _looked_at_again(self, raw_BD: Tensor, cosine_BC: Tensor) -> Tensor:
        """r (B, C): how well pictures fit what is said of their candidates against one another."""
        number = min(self.rules.rerank_top, self.number)
        top_BL = cosine_BC.topk(number, dim=-1).indices
        near_BL = top_BL.to(self.apart_CCRD.device)
        apart_BLLRD = self.apart_CCRD[near_BL[:, :, None], near_BL[:, None, :]].to(raw_BD)
        mean_BLRD = apart_BLLRD.sum(2) / (number - 1)
        if not self.rules.paper:
            mean_BLRD = functional.normalize(mean_BLRD, dim=-1)
        unit_BD = functional.normalize(raw_BD, dim=-1)
        fit_BL = torch.einsum("blrd,bd->blr", mean_BLRD, unit_BD).mean(-1)
        least_B1 = fit_BL.amin(-1, keepdim=True) if self.rules.paper else fit_BL.new_zeros(())
        return least_B1.expand_as(cosine_BC).scatter(1, top_BL, fit_BL)

    def by_name(self, features_BV: Tensor, prompts_CPD: Tensor) -> Tensor:
        """cos(u_i(z), u_t(w)); before the first task, of the features themselves."""
        raw_BD, prompts_CPD = self.project(features_BV), prompts_CPD.to(features_BV)
        if not len(self.images):
            return cosines(raw_BD, ensemble(prompts_CPD))
        return cosines(self.image(raw_BD), ensemble(self.text(prompts_CPD)))
