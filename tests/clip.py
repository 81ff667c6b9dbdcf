"""A tiny random CLIP and SigLIP with a tokenizer, as folders of a model: `clip_folder(path)`."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from encoders import backbone
from mllm_cl.data.toy_classes import words

# Of 32 tokens that the tiny text towers know, the last ends a text.
END = 31


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the commonest words of the toy captions, one for all the others."""
    known = {word: place for place, word in enumerate(("[UNK]", "a", "photo", *words()[:27]))}
    made = Tokenizer(models.WordLevel({**known, "[PAD]": 30, "[END]": END}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", END)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[END]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def reading_folder(path: Path, kind: str = "clip") -> Path:
    """The folder of a tiny model that reads."""
    backbone(kind).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
