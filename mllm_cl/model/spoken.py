"""What trains on the side of texts while images stay as they are: the text tower, or prompts in the
place of words.

B batch, C classes, D feature width, K learnt prompts, L text length, N texts, P prompts of a class,
W width of a token.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Head, cosines, ensemble
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.pairs import pair_losses
from mllm_cl.model.texts import TEXTS, Reader
from mllm_cl.model.vision import Adaptation, put

Tokens = Mapping[str, Tensor]
PLACES = "X", "a"  # words that a learnt prompt may take the place of: the first that is one token


class Spoken(Head):
    """logits = scale · cos(φ, t_c), with the texts of all classes so far read in every forward,
    since what reads them trains: by the first prompt of each in training, by all of them at test.

    `pairs`: the loss is CLIP's, of images and the texts of their classes in a batch; images of one
    class are no negatives of one another there.
    """

    def __init__(
        self, width: int, read: Callable[..., Tensor], *, scale: float, pairs: bool = False
    ) -> None:
        super().__init__(width)
        self.read, self.scale, self.pairs = read, scale, pairs
        self.first: Tokens = {}
        self.every: Tokens = {}

    def learn(self, names: tuple[str, ...], reader: Reader) -> None:
        """Know the names of all classes so far, old and new."""
        prompts = reader.prompts(names)
        self.first = reader.tokens(prompts[:: len(reader.templates)])
        self.every = reader.tokens(prompts)

    def precisely(
        self, rule: Callable[..., Tensor | None], features_BD: Tensor, *others: Tensor
    ) -> Tensor | None:
        """As ever; but texts are read before, in the precision that the towers have."""
        if rule == self.losses:
            if not self.pairs:
                return None
            class_K, place_B = others[0].unique(return_inverse=True)
            others = (*others, self._texts(features_BD.device, class_K)[place_B])
        elif rule == self.logits:
            others = (self._texts(features_BD.device),)
        return super().precisely(rule, features_BD, *others)

    def logits(self, features_BD: Tensor, text_CD: Tensor) -> Tensor:
        """scale · cos(φ, t_c)."""
        return self.scale * cosines(features_BD, text_CD.to(features_BD))

    def losses(self, features_BD: Tensor, labels_B: Tensor, text_BD: Tensor) -> Tensor:
        """With `pairs`: the mean of both cross entropies, from images to texts and back."""
        both = (functional.normalize(one, dim=-1) for one in (features_BD, text_BD.to(features_BD)))
        return pair_losses(*both, labels_B, self.scale)

    def _texts(self, device: torch.device, class_K: Tensor | None = None) -> Tensor:
        """What all prompts of some classes, by default of all, say together (K, D)."""
        tokens = self.first if self.training else self.every
        named = {name: one.unflatten(0, (self.number, -1)) for name, one in tokens.items()}
        if class_K is not None:
            named = {name: one[class_K.cpu()] for name, one in named.items()}
        parts = zip(*(one.flatten(0, 1).split(TEXTS) for one in named.values()), strict=True)
        read_ND = torch.cat([self.read(*(one.to(device) for one in part)) for part in parts])
        read_ND = read_ND.to(torch.promote_types(read_ND.dtype, torch.float32))
        return ensemble(read_ND.unflatten(0, (-1, next(iter(named.values())).shape[1])))


class Words(Adaptation):
    """Learnt vectors in the place of the words at some positions of every text."""

    def __init__(self, first: int, words_KW: Tensor) -> None:
        super().__init__()
        self.first, self.words_KW = first, nn.Parameter(words_KW)

    def forward(self, embedded_NLW: Tensor) -> Tensor:
        """The embedded texts with the learnt vectors in place."""
        words_KW = self.words_KW.to(embedded_NLW.dtype)
        last = self.first + len(words_KW)
        words_NKW = words_KW.expand(len(embedded_NLW), -1, -1)
        before, after = embedded_NLW[:, : self.first], embedded_NLW[:, last:]
        return torch.cat([before, words_NKW, after], dim=1)


def attach_words(
    encoder: Encoder, reader: Reader, *, number: int, seed: int = 0
) -> tuple[Reader, nn.Parameter]:
    """`number` learnt words before every class name, drawn from N(0, 0.02^2): the reader of texts
    that have places for them, and the words.

    ValueError where they leave no room in a text, or their place is no word of the tokenizer.
    """
    place, token = _place(reader)
    places = " ".join([place] * number)
    text = reader.tokens([f"{places} a"])["input_ids"][0].tolist()
    first = text.index(token)
    if text[first : first + number] != [token] * number:
        raise ValueError(
            f"{number} learnt words do not fit into the texts of this model, which have "
            f"{reader.length} tokens: lower 'words'"
        )
    embedding = encoder.backbone.text_model.embeddings.token_embedding
    draws = torch.randn(number, embedding.embedding_dim, generator=seeded(seed, "words"))
    words = Words(first, (0.02 * draws).to(embedding.weight.device))
    put(embedding, "words", words, _forward_with_words)
    return replace(reader, templates=(f"{places} {{}}.",)), words.words_KW


def _place(reader: Reader) -> tuple[str, int]:
    """A word that is one token, and the token."""
    for word in PLACES:
        token, *rest = reader.tokenizer(word, add_special_tokens=False)["input_ids"]
        if not rest:
            return word, token
    raise ValueError(
        f"the tokenizer of this model spells {' and '.join(PLACES)}: learnt words can take the "
        "place of no word of it"
    )


def _forward_with_words(self: nn.Embedding, input_ids_NL: Tensor) -> Tensor:
    return self.words(self._forward_before_words(input_ids_NL))
