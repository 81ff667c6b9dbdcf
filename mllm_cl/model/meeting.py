"""Where images and texts meet: what of them is compared, the loss of pairs, and the module around
it that the stock Trainer trains.

B batch of one process, N of all, D feature width, E width of what is compared.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from mllm_cl.model.encoder import Encoder
from mllm_cl.model.encoding import Encoding
from mllm_cl.model.fusion import Projecting
from mllm_cl.model.pairs import pair_losses

Terms = tuple[Tensor, ...]  # of each image or text: rows of length 1


class Meeting(nn.Module):
    """score = cos(φ_i, φ_t), the features being compared as they are.

    Each head says what is compared `of_images` and `of_texts`, one term or several. The score is
    the sum of the first `scored` terms' products, and the loss, to which the k-th term counts
    `weights[k]` times, is CLIP's of each (see `pair_losses`) at the scale exp(`log_scale`).
    """

    def __init__(self, width: int, *, log_scale: Tensor) -> None:
        super().__init__()
        self.width, self.scored = width, 1
        self.weights: tuple[float, ...] = (1.0,)
        self.log_scale = nn.Parameter(log_scale.detach().float().reshape(1).clone())

    def of_images(self, features_BD: Tensor) -> Terms:
        """What of images is compared."""
        return (functional.normalize(features_BD, dim=-1),)

    def of_texts(self, features_BD: Tensor) -> Terms:
        """What of texts is compared."""
        return self.of_images(features_BD)

    def embedding(self, terms: Terms) -> Tensor:
        """One vector (B, E) for each, whose products are the scores."""
        return torch.cat(terms[: self.scored], dim=-1)

    def losses(self, images: Terms, texts: Terms, label_B: Tensor) -> Tensor:
        """What each pair (B,) adds to the loss. Collective where it trains."""
        pairs = zip(self.weights, images, texts, strict=True)
        scale = self.log_scale.float().exp()
        return sum(weight * pair_losses(*pair, label_B, scale) for weight, *pair in pairs)


class SideBySide(Meeting):
    """score = mean over towers t of cos(φ_i,t, φ_t,t), for features that are side by side.

    From the second task on the newest tower's cosine is a term of the loss, too, `weight` times.
    """

    def __init__(self, width: int, number: int, *, log_scale: Tensor, weight: float) -> None:
        super().__init__(width, log_scale=log_scale)
        self.number = number
        self.weights = (1.0, weight) if number > 1 else (1.0,)

    def of_images(self, features_BD: Tensor) -> Terms:
        """All towers' directions as one vector; and the newest's."""
        units = [functional.normalize(one, dim=-1) for one in features_BD.chunk(self.number, 1)]
        both = torch.cat(units, dim=-1) / math.sqrt(self.number), units[-1]
        return both[: len(self.weights)]


class Fused(Projecting, Meeting):
    """score = cos(P(z), P(w)) + cos(z̃, w̃),  z̃ = Attention([P(z), C])_0,  w̃ likewise.

    P sums the projections of all tasks, C are the context prompts of all; what enters the attention
    has length 1. Source: PROOF, arXiv:2305.19270, eq. 2 and 4, where there are no classes.
    """

    def __init__(
        self,
        width: int,
        *,
        log_scale: Tensor,
        context: int,
        dropout: float,
        residual: bool,
        seed: int,
    ) -> None:
        super().__init__(width, log_scale=log_scale)
        self.weights, self.scored = (1.0, 1.0), 2
        self.begin(log_scale, context=context, dropout=dropout, residual=residual, seed=seed)

    def of_images(self, features_BD: Tensor) -> Terms:
        """The projection's direction, and that of what fusing makes of it."""
        return self._both(self.image(features_BD))

    def of_texts(self, features_BD: Tensor) -> Terms:
        """The same by the projections of texts."""
        return self._both(self.text(features_BD))

    def _both(self, projected_BD: Tensor) -> Terms:
        unit_BD = functional.normalize(projected_BD, dim=-1)
        context_LD = torch.cat(list(self.context)).to(unit_BD.dtype)
        fused_BD, _ = self.attention(unit_BD, context_LD, 0)
        return unit_BD, functional.normalize(fused_BD, dim=-1)


@dataclass
class MatcherOutput(ModelOutput):
    """The loss of pairs, or the logits (B, B) of all images with all texts; the embeddings (B, E)
    whose products are scores; and, where nothing else was asked for, the encoder's features.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    features: Tensor | None = None


class Matcher(Encoding):
    """An encoder of images and texts with a head that compares them.

    Labels are numbers of images: pairs of one label show the same image.
    """

    def __init__(self, encoder: Encoder, head: Meeting) -> None:
        super().__init__(encoder)
        self.head = head

    def forward(
        self,
        pixel_values: Tensor | None = None,
        text_ids: Tensor | None = None,
        features: Tensor | None = None,
        text_features: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        only_features: bool = False,
    ) -> MatcherOutput:
        """The loss of images (B, 3, H, W) with texts (B, L), or of their features (B, D), where
        there are labels (B,); else what is compared of either or both.
        """
        image_BD = features if pixel_values is None else self.encoder(pixel_values)
        text_BD = text_features if text_ids is None else self.encoder.text(text_ids)
        if only_features:
            return MatcherOutput(features=image_BD if text_BD is None else text_BD)
        images = image_BD if image_BD is None else self._terms(self.head.of_images, image_BD)
        texts = text_BD if text_BD is None else self._terms(self.head.of_texts, text_BD)
        if labels is not None:
            with torch.autocast(labels.device.type, enabled=False):
                own_B = self.head.losses(images, texts, labels)
            total = len(labels) if num_items_in_batch is None else num_items_in_batch
            return MatcherOutput(loss=own_B.sum() / total)
        both = [None if one is None else self.head.embedding(one) for one in (images, texts)]
        logits_BB = None if None in (images, texts) else both[0] @ both[1].T
        return MatcherOutput(logits=logits_BB, image_embeds=both[0], text_embeds=both[1])

    def _terms(self, rule: Callable[[Tensor], Terms], features_BD: Tensor) -> Terms:
        """In at least fp32: what bf16 cannot tell apart would tie."""
        wide = torch.promote_types(features_BD.dtype, torch.float32)
        with torch.autocast(features_BD.device.type, enabled=False):
            return rule(features_BD.to(wide))
