"""Turns samples (messages and pictures) into batches a vision-language model trains on or answers.

One path serves every Hugging Face processor with a chat template; no model family is known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

IGNORE = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True)
class ChatCollator:
    """Batches samples; the labels are the last answer and its end-of-turn token, nothing else.

    Training batches are padded on the right. With `prompt_only` the last message is left out, the
    batch is padded on the left for `generate`, and there are no labels. Whatever else the processor
    returns (pixel_values, image_grid_thw, mm_token_type_ids, ...) is passed on. Nothing is ever
    truncated: more than `max_length` tokens, pictures included, is a ValueError naming the sample.
    """

    processor: ProcessorMixin | PreTrainedTokenizerBase
    max_length: int | None = None
    prompt_only: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.processor, PreTrainedTokenizerBase):
            return self.processor
        return self.processor.tokenizer

    def __call__(self, samples: Sequence[Mapping]) -> dict[str, Tensor]:
        samples = [_checked(sample) for sample in samples]
        prompts = [self._prompt(sample) for sample in samples]
        if self.prompt_only:
            return self._encode(prompts, samples, padding_side="left")
        texts = [
            self._full(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)
        ]
        batch = self._encode(texts, samples, padding_side="right")
        lengths = [
            self._answer_length(sample["id"], prompt, text)
            for sample, prompt, text in zip(samples, prompts, texts, strict=True)
        ]
        batch["labels"] = _labels(batch["input_ids"], batch["attention_mask"], lengths)
        return batch

    def _render(self, messages: list[dict], *, answer_next: bool) -> str:
        if self.processor is self.tokenizer:  # templates of text-only models expect plain strings
            messages = [{**message, "content": _text(message["content"])} for message in messages]
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_next
        )

    def _prompt(self, sample: Mapping) -> str:
        return self._render(sample["messages"][:-1], answer_next=True)

    def _full(self, sample: Mapping, prompt: str) -> str:
        """The whole chat, ending with the end-of-turn token."""
        text = self._render(sample["messages"], answer_next=False)
        if not text.startswith(prompt):
            raise ValueError(
                f"sample {sample['id']}: this chat template does not continue its own generation "
                f"prompt, so the answer cannot be located. The prompt is {prompt!r}, the chat "
                f"{text!r}. Set a chat template whose rendering of messages[:-1] with "
                "add_generation_prompt is a prefix of its rendering of all messages."
            )
        text = text.rstrip()
        special = tuple(
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special
        )
        if text[len(prompt) :].endswith(special) or self.tokenizer.eos_token is None:
            return text
        # A template without an end-of-turn token (LLaVA-1.5's) would teach the model never to stop.
        return text + self.tokenizer.eos_token

    def _opens_with_bos(self, text: str) -> bool:
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _encode(
        self, texts: list[str], samples: Sequence[Mapping], *, padding_side: str
    ) -> dict[str, Tensor]:
        images = [image for sample in samples for image in sample["images"]]
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        if self._opens_with_bos(
            texts[0]
        ):  # the template wrote it: the tokenizer must not add a second one
            options["add_special_tokens"] = False
        if self.processor is not self.tokenizer:
            options["images"] = images or None
        batch = dict(self.processor(text=texts, **options))
        for sample, length in zip(
            samples, batch["attention_mask"].sum(dim=1).tolist(), strict=True
        ):
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"sample {sample['id']} has {length} tokens, pictures included; max_length is "
                    f"{self.max_length}. Raise max_length, shrink the pictures in the processor, "
                    "or drop the sample."
                )
        return batch

    def _answer_length(self, name: str, prompt: str, text: str) -> int:
        """How many tokens the answer and its end-of-turn token have.

        Counted before pictures are expanded: an expansion is in the prompt and adds alike to both.
        """
        special = not self._opens_with_bos(prompt)
        head = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        whole = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if whole[: len(head)] != head:
            raise ValueError(
                f"sample {name}: the tokens of the prompt are not the first tokens of the chat, so "
                "training would see another prompt than generation does. The prompt ends with "
                f"{prompt[-40:]!r}; end the chat template's generation prompt where a token ends."
            )
        return len(whole) - len(head)


def _checked(sample: Mapping) -> dict:
    """The sample with RGB pictures and without the None fields that Arrow adds."""
    messages, images = sample["messages"], sample.get("images") or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"sample {sample['id']}: the last of at least two messages must be the assistant's"
        )
    messages = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
    slots = sum(part["type"] == "image" for message in messages for part in message["content"])
    if slots != len(images):
        raise ValueError(
            f"sample {sample['id']}: the messages refer to {slots} images, "
            f"the sample has {len(images)}"
        )
    return {"id": sample["id"], "messages": messages, "images": [_rgb(image) for image in images]}


def _parts(content: str | Sequence[Mapping]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _text(content: Sequence[Mapping]) -> str:
    if any(part["type"] != "text" for part in content):
        raise ValueError(
            "a text-only model was given a sample with an image; choose a model with a vision tower"
        )
    return "".join(part["text"] for part in content)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _labels(input_BT: Tensor, mask_BT: Tensor, answer_lengths: list[int]) -> Tensor:
    """The input ids of the answer (the last tokens before the padding), IGNORE elsewhere."""
    position_T = torch.arange(input_BT.shape[1])
    end_B1 = mask_BT.sum(dim=1, keepdim=True)
    start_B1 = end_B1 - torch.tensor(answer_lengths)[:, None]
    answered_BT = (position_T >= start_B1) & (position_T < end_B1)
    return input_BT.masked_fill(~answered_BT, IGNORE)
