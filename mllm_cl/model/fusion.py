"""The head of PROOF: projections that grow with the tasks, and attention that lets an image, class
names, class means and learnt context adjust to one another (arXiv:2305.19270, sections 4.2, 4.3).

B batch, C classes, D feature width, L tokens of the context, P prompts of a class, K context
prompts of a task.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.heads import Head, cosines, ensemble
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.pairs import pair_losses
from mllm_cl.model.units import merged, still, unit

CHUNK = 64  # images that are answered at once: the batch of the released code


class Attention(nn.Module):
    """h = LN(x + W_o softmax(W_q x (W_k x)ᵀ / √D) W_v x + b_o): one head as wide as the features.

    An image sees itself and the context, and so does every token of the context; the context is the
    same for all images, so only what differs is computed for each. Dropout falls on the weights and
    on what they give.
    """

    def __init__(self, width: int, *, dropout: float, seed: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        with torch.no_grad():
            # N(0, 2 / (D + D)), which is also Xavier's for the square matrix of the output.
            for name, layer in self.named_children():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(std=width**-0.5, generator=seeded(seed, name))
            bound = width**-0.5
            self.out.bias.uniform_(-bound, bound, generator=seeded(seed, "bias"))

    def forward(self, image_BD: Tensor, context_LD: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """What becomes of the images (B, D), and beside each of the first `wanted` tokens of the
        context (B, wanted, D).
        """
        both = image_BD, context_LD
        query_BQD = _beside(*(self._linear("query", x) for x in (image_BD, context_LD[:wanted])))
        key_BND = _beside(*(self._linear("key", x) for x in both))
        # W_o (a V) = a (V W_oᵀ): the output's matrix meets each token once, and no pair of them.
        weight_DD, bias_D = (one.to(image_BD.dtype) for one in (self.out.weight, self.out.bias))
        value_BND = _beside(*(self._linear("value", x) @ weight_DD.T for x in both))
        weight_BQN = (query_BQD @ key_BND.transpose(1, 2) * image_BD.shape[-1] ** -0.5).softmax(-1)
        weight_BQN = functional.dropout(weight_BQN, self.dropout, self.training)
        moved_BQD = weight_BQN @ value_BND + bias_D
        moved_BQD = functional.dropout(moved_BQD, self.dropout, self.training)
        fused_BQD = self._normed(moved_BQD + _beside(image_BD, context_LD[:wanted]))
        return fused_BQD[:, 0], fused_BQD[:, 1:]

    # In the dtype of what comes in: an engine may have cast the weights to another.
    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.get_submodule(name).weight.to(x.dtype))

    def _normed(self, x: Tensor) -> Tensor:
        norm = self.norm
        weight_D, bias_D = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return functional.layer_norm(x, norm.normalized_shape, weight_D, bias_D, norm.eps)


def _beside(image_BD: Tensor, context_LD: Tensor) -> Tensor:
    """Each image followed by the context: (B, 1 + L, D)."""
    return torch.cat([image_BD[:, None], context_LD.expand(len(image_BD), -1, -1)], dim=1)


class Projecting(nn.Module):
    """The weights of PROOF, in a head that has a `width`: a projection of images and one of texts
    for every task, K context prompts of each, and one attention for all.

        P(z) = Σ_m P_m(z),  with `residual` Σ_m (P_m(z) + z)  and P_m starting at zero
    """

    fades = False  # old projections of images, and old context, by weight decay

    def begin(
        self, log_scale: Tensor, *, context: int, dropout: float, residual: bool, seed: int
    ) -> None:
        """Put in what all tasks share: `expand` adds what each has of its own."""
        self.num_context, self.residual, self.seed = context, residual, seed
        self.images, self.texts = nn.ModuleList(), nn.ModuleList()
        self.context = nn.ParameterList()
        self.attention = Attention(self.width, dropout=dropout, seed=seed)
        self.log_scale = nn.Parameter(log_scale.detach().float().reshape(1).clone())

    def expand(self) -> None:
        """One more projection of each side and one more context, drawn from the seed."""
        task = len(self.images)
        bound = 0.0 if self.residual else self.width**-0.5
        for layers, side in ((self.images, "images"), (self.texts, "texts")):
            layers.append(unit(self.width, bound=bound, seed=self.seed, name=f"{side}.{task}"))
        draws = seeded(self.seed, f"context.{task}")
        self.context.append(
            nn.Parameter(torch.randn(self.num_context, self.width, generator=draws))
        )

    def newest(self) -> list[nn.Parameter]:
        """What trains: the last projections and context, attention and scale."""
        own = [self.images[-1], self.texts[-1], self.attention]
        return [*(p for one in own for p in one.parameters()), self.context[-1], self.log_scale]

    def image(self, features_BD: Tensor) -> Tensor:
        """P(z), not normalised."""
        return self._projected(self.images, features_BD)

    def text(self, features_CD: Tensor) -> Tensor:
        """P(w), not normalised."""
        return self._projected(self.texts, features_CD)

    def merged(self, layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
        """The one weight (D, D) and bias (D,) that do what all the projections of a side do."""
        weight_DD, bias_D = merged(layers, fading=self.fades and layers is self.images)
        if self.residual:
            weight_DD = weight_DD + len(layers) * torch.eye(self.width).to(weight_DD)
        return weight_DD, bias_D

    def _projected(self, layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
        return functional.linear(x, *(one.to(x.dtype) for one in self.merged(layers)))

    @property
    def scale(self) -> Tensor:
        """1 / τ."""
        return self.log_scale.float().exp()


class Fusion(Projecting, Head):
    """Three answers to one image: by its projection and that of the class names, and by what fusing
    makes of the image beside the names and beside the class means.

        P(z) = Σ_m P_m(z)  for images and for texts alike,  z̃, W̃, P̃ = Attention([z, W, P, C])

    mode paper: s cos of each pair; the loss is the sum of three cross entropies, the answer the
    mean of three softmaxes (given as its logarithm). mode released: z̃ W̃ᵀ and z̃ P̃ᵀ without cosine
    or temperature, W̃ and P̃ being means over the images that are asked together; the loss has a
    contrast of images with their names in a batch in the place of the first cross entropy, and the
    answer is the sum of the logits, of an image whose projection is not normalised.
    `residual`: P(z) = Σ_m (P_m(z) + z), with P_m starting at zero: at first the model itself.
    `fades`: what is frozen of earlier tasks is left to weight decay.
    """

    def __init__(
        self,
        width: int,
        *,
        log_scale: Tensor,
        context: int = 3,
        dropout: float = 0.1,
        paper: bool = True,
        residual: bool = False,
        fades: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(width)
        self.paper, self.fades = paper, fades
        self.begin(log_scale, context=context, dropout=dropout, residual=residual, seed=seed)
        # Neither parameters nor buffers: no engine casts or shards them.
        self.mean_CD, self.prompts_CPD = torch.zeros(0, width), torch.zeros(0, 1, width)
        self.names: tuple[str, ...] = ()

    def newest(self) -> list[nn.Parameter]:
        """What trains: in mode released old projections of texts, too, as nothing freezes them."""
        old = () if self.paper else self.texts[:-1]
        return [*(p for one in old for p in one.parameters()), *super().newest()]

    def fading(self) -> list[nn.Parameter]:
        """Old projections of images and old context, where they fade."""
        if not self.fades:
            return []
        return [*(p for one in self.images[:-1] for p in one.parameters()), *self.context[:-1]]

    def inform(self, mean_CD: Tensor, prompts_CPD: Tensor) -> None:
        """The raw class means of images and the raw features of the prompts of all classes."""
        assert len(mean_CD) == len(prompts_CPD) == self.number
        device = self.log_scale.device
        self.mean_CD, self.prompts_CPD = mean_CD.to(device), prompts_CPD.to(device)

    def losses(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """The sum of three cross entropies for every image, by the first prompt of each class."""
        name_CD = functional.normalize(self.text(self.prompts_CPD[:, 0]), dim=-1)
        unit_BD = functional.normalize(self.image(features_BD), dim=-1)
        fused = self._fused(unit_BD, name_CD)
        found = [functional.cross_entropy(one, labels_B, reduction="none") for one in fused]
        if self.paper:
            direct_BC = self.scale * unit_BD @ name_CD.T
            return sum(found, functional.cross_entropy(direct_BC, labels_B, reduction="none"))
        return sum(found, pair_losses(unit_BD, name_CD[labels_B], None, self.scale))

    def logits(self, features_BD: Tensor) -> Tensor:
        """The answer by all prompts of each class."""
        name_CD = ensemble(self.text(self.prompts_CPD))
        return torch.cat([self._answer(one, name_CD) for one in features_BD.split(CHUNK)])

    def _answer(self, features_BD: Tensor, name_CD: Tensor) -> Tensor:
        image_BD = self.image(features_BD)
        if not self.paper:
            return sum(self._fused(image_BD, name_CD), image_BD @ name_CD.T)
        unit_BD = functional.normalize(image_BD, dim=-1)
        three = [self.scale * unit_BD @ name_CD.T, *self._fused(unit_BD, name_CD)]
        # The logarithm of their mean, which no class is too far behind for.
        return torch.stack([one.log_softmax(-1) for one in three]).logsumexp(0) - math.log(3)

    def by_name(self, features_BD: Tensor, prompts_CPD: Tensor) -> Tensor:
        """cos of both projections; before the first task, of the features themselves."""
        if not len(self.images):
            return super().by_name(features_BD, prompts_CPD)
        return cosines(self.image(features_BD), ensemble(self.text(prompts_CPD)))

    def _shared(self, part_BCD: Tensor) -> Tensor:
        """The mean (C, D) over all images of a batch, of all processes where it trains."""
        mean_CD = part_BCD.mean(0)
        return engine.gathered(mean_CD[None]).mean(0) if self.training else mean_CD

    def _fused(self, image_BD: Tensor, name_CD: Tensor) -> list[Tensor]:
        """The logits (B, C) of the fused image against fused names and fused class means."""
        mean_CD = functional.normalize(self.image(self.mean_CD), dim=-1)
        context = list(self.context)
        if self.fades:
            context[:-1] = map(still, context[:-1])
        context_LD = torch.cat([name_CD, mean_CD, *(one.to(image_BD.dtype) for one in context)])
        own_BD, rest_BQD = self.attention(image_BD, context_LD, len(name_CD) + len(mean_CD))
        parts = rest_BQD.split([len(name_CD), len(mean_CD)], dim=1)
        if not self.paper:
            return [own_BD @ self._shared(part_BCD).T for part_BCD in parts]
        own_BD = functional.normalize(own_BD, dim=-1)
        return [
            self.scale * (functional.normalize(part_BCD, dim=-1) @ own_BD[:, :, None])[..., 0]
            for part_BCD in parts
        ]
