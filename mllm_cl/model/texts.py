"""Class names as a text tower reads them: put into prompts, and made tokens of.

L text length, N texts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mllm_cl.model.encoder import described, family
from mllm_cl.model.load import ModelSettings, found_at, hub_options, location

TEXTS = 256  # that are read at once


@dataclass(frozen=True)
class Reader:
    """What makes tokens of class names: the model's own tokenizer and the prompts that they are put
    into, {} in each being what `texts` call the class, or without them its name in words.

    Texts are cut to `length` tokens. Where they are `padded`, all have that many and there is no
    mask: so SigLIP learnt to read.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: tuple[str, ...]
    length: int
    padded: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)

    def prompts(self, names: Sequence[str]) -> list[str]:
        """Every prompt of the first name, then of the next."""
        called = called_by(names, self.texts).values()
        return [template.format(text) for text in called for template in self.templates]

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` (N, L) and, but for padded texts, `attention_mask`."""
        padding = "max_length" if self.padded else True
        found = self.tokenizer(
            list(texts),
            padding=padding,
            truncation=True,
            max_length=self.length,
            return_attention_mask=not self.padded,
            return_tensors="pt",
        )
        return {key: found[key] for key in ("input_ids", "attention_mask") if key in found}


def in_words(name: str) -> str:
    """A class name as one would say it: `001.Black_footed_Albatross` is "Black footed Albatross".

    The label lists of PROOF's and C3Box' released code say so of CUB, SUN397 and ObjectNet; for
    ImageNet-R they keep underscores.
    """
    return re.sub(r"^\d+\.(?=\D)", "", name).replace("_", " ").strip() or name


def called_by(names: Sequence[str], texts: Mapping[str, str]) -> dict[str, str]:
    """What prompts call each class: its text, or without one its name in words."""
    return {name: texts.get(name) or in_words(name) for name in names}


def reads(settings: ModelSettings) -> bool:
    """Whether the model has a text tower, from its config alone."""
    return family(described(settings)["model_type"]).reads


def load_reader(
    settings: ModelSettings, templates: Sequence[str], texts: Mapping[str, str]
) -> Reader:
    """The reader of a model that has a text tower. ValueError where its tokenizer is not there."""
    where, config = location(settings.model_name_or_path), described(settings)
    try:
        with found_at(where):
            tokenizer = AutoTokenizer.from_pretrained(where, **hub_options(settings))
    except ValueError as error:
        raise ValueError(f"{where} has no tokenizer that can be read: {error}") from error
    # Without its files there is one all the same, which knows no word.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{where} has no tokenizer: put that of the model into the folder")
    text = family(config["model_type"]).backbone.config_class.from_dict(config).text_config
    return Reader(
        tokenizer,
        tuple(templates),
        text.max_position_embeddings,
        padded=family(config["model_type"]).padded,
        texts=texts,
    )
