"""Turns samples (messages and pictures) into batches a vision-language model trains on or answers.

One path serves every Hugging Face processor with a chat template; no model family is known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mllm_cl.data.errors import DataError
from mllm_cl.data.source.images import rgb

IGNORE = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True)
class ChatCollator:
    """Batches samples; the labels are the last answer and its end-of-turn token, nothing else.

    Training batches are padded on the right. With `prompt_only` the last message is left out, the
    batch is padded on the left for `generate`, and there are no labels. Whatever else the processor
    returns (pixel_values, image_grid_thw, mm_token_type_ids, ...) is passed on. Nothing is ever
    truncated: more than `max_length` tokens, pictures included, is a DataError naming the sample,
    as is whatever the chat template or the processor refuses.
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
            self._answer_length(sample, prompt, text)
            for sample, prompt, text in zip(samples, prompts, texts, strict=True)
        ]
        batch["labels"] = _labels(batch["input_ids"], batch["attention_mask"], lengths)
        return batch

    def text(self, sample: Mapping) -> str:
        """The whole chat as it is tokenised for training, its pictures one placeholder each."""
        return self._full(sample, self._prompt(sample))

    def num_text_tokens(self, text: str) -> int:
        """How many tokens a rendered chat has before pictures are expanded."""
        special = not self._opens_with_bos(text)
        return len(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _render(self, sample: Mapping, messages: list[dict], *, answer_next: bool) -> str:
        if self.processor is self.tokenizer:  # templates of text-only models expect plain strings
            texts = [_text(sample, message["content"]) for message in messages]
            pairs = zip(messages, texts, strict=True)
            messages = [{**message, "content": text} for message, text in pairs]
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise _about(sample, f"the chat template refuses it: {error}") from error

    def _prompt(self, sample: Mapping) -> str:
        return self._render(sample, sample["messages"][:-1], answer_next=True)

    def _full(self, sample: Mapping, prompt: str) -> str:
        """The whole chat, ending with the end-of-turn token."""
        text = self._render(sample, sample["messages"], answer_next=False)
        if not text.startswith(prompt):
            raise _about(
                sample,
                "this chat template does not continue its own generation "
                f"prompt, so the answer cannot be located. The prompt is {prompt!r}, the chat "
                f"{text!r}. Set a chat template whose rendering of messages[:-1] with "
                "add_generation_prompt is a prefix of its rendering of all messages.",
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
        try:
            batch = dict(self.processor(text=texts, **options))
        except Exception as error:  # every family's processor has its own way of refusing
            if len(samples) > 1:  # find the one that it is about
                for text, sample in zip(texts, samples, strict=True):
                    self._encode([text], [sample], padding_side=padding_side)
            why = str(error) or type(error).__name__
            raise _about(samples[0], f"the processor refuses it: {why}") from error
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for sample, length in zip(samples, lengths, strict=True):
            if self.max_length is not None and length > self.max_length:
                raise too_long(sample, length, self.max_length)
        return batch

    def _answer_length(self, sample: Mapping, prompt: str, text: str) -> int:
        """How many tokens the answer and its end-of-turn token have.

        Counted before pictures are expanded: an expansion is in the prompt and adds alike to both.
        """
        special = not self._opens_with_bos(prompt)
        head = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        whole = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if whole[: len(head)] != head:
            raise _about(
                sample,
                "the tokens of the prompt are not the first tokens of the chat, so training would "
                f"see another prompt than generation does. The prompt ends with {prompt[-40:]!r}; "
                "end the chat template's generation prompt where a token ends.",
            )
        return len(whole) - len(head)


def _checked(sample: Mapping) -> dict:
    """The sample with RGB pictures and without the None fields that Arrow adds."""
    messages, images = sample["messages"], sample.get("images") or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise _about(sample, "the last of at least two messages must be the assistant's")
    messages = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
    slots = sum(part["type"] == "image" for message in messages for part in message["content"])
    if slots != len(images):
        problem = f"the messages refer to {slots} images, the sample has {len(images)}"
        raise _about(sample, problem)
    try:
        return {**sample, "messages": messages, "images": [rgb(image) for image in images]}
    except DataError as error:
        raise _about(sample, error.problem) from None


def _parts(content: str | Sequence[Mapping]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _text(sample: Mapping, content: Sequence[Mapping]) -> str:
    if any(part["type"] != "text" for part in content):
        problem = "it has an image, and this model sees none; choose one with a vision tower"
        raise _about(sample, problem)
    return "".join(part["text"] for part in content)


def too_long(sample: Mapping, length: int, max_length: int) -> DataError:
    """What is wrong with a sample of more than `max_length` tokens."""
    problem = f"has {length} tokens, pictures included; max_length is {max_length}"
    what_to_do = "Raise max_length, shrink the pictures, or set 'too_long: drop'."
    return _about(sample, f"{problem}. {what_to_do}")


def _about(sample: Mapping, problem: str) -> DataError:
    colon = " " if problem.startswith("has ") else ": "
    return DataError(f"sample {sample['id']}{colon}{problem}", *sample.get("where", ()))


def picture_inputs(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """What `processor` makes of a small grey picture, the text left out; empty if it takes none."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return {}
    asked = [{"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "."}]
    grey = Image.new("RGB", (64, 64), "grey")
    sample = {"id": "grey", "messages": messages, "images": [grey]}
    batch = ChatCollator(processor, prompt_only=True)([sample])
    text = batch["input_ids"].shape  # whatever has a value per token belongs to the text
    return {key: value for key, value in batch.items() if value.shape != text}


def _labels(input_BT: Tensor, mask_BT: Tensor, answer_lengths: list[int]) -> Tensor:
    """The input ids of the answer (the last tokens before the padding), IGNORE elsewhere."""
    position_T = torch.arange(input_BT.shape[1])
    end_B1 = mask_BT.sum(dim=1, keepdim=True)
    start_B1 = end_B1 - torch.tensor(answer_lengths)[:, None]
    answered_BT = (position_T >= start_B1) & (position_T < end_B1)
    return input_BT.masked_fill(~answered_BT, IGNORE)
