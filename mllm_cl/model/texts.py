"""Class names as a text tower reads them: put into prompts, and made tokens of.

L text length, N texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mllm_cl.model.encoder import described, family
from mllm_cl.model.load import ModelSettings, found_at, hub_options, location


@dataclass(frozen=True)
class Reader:
    """What makes tokens of class names: the model's own tokenizer and the prompts that they are put
    into, {} in each being the name.

    Texts are cut to `length` tokens. Where they are `padded`, all have that many and there is no
    mask: so SigLIP learnt to read.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: tuple[str, ...]
    length: int
    padded: bool = False

    def prompts(self, names: Sequence[str]) -> list[str]:
        """Every prompt of the first name, then of the next."""
        return [template.format(name) for name in names for template in self.templates]

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


def reads(settings: ModelSettings) -> bool:
    """Whether the model has a text tower, from its config alone."""
    return family(described(settings)["model_type"]).reads


def load_reader(settings: ModelSettings, templates: Sequence[str]) -> Reader:
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
    )
