"""Answers of a model to the questions of a task, the same for any batch size and any number of
processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mllm_cl import engine
from mllm_cl.data.chat import ChatCollator
from mllm_cl.model.watch import evaluating
from mllm_cl.task import Sample


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample, and what it should have said."""

    id: str
    prediction: str
    reference: str


def answers(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    name: str = "",
    quiet: bool = True,
) -> list[Answer]:
    """Greedy answers to all samples, in their order, on every rank. Collective.

    Each rank answers its share; all make the same number of calls, which sharded parameters need to
    be gathered. Prompts are padded on the left.
    """
    ask = ChatCollator(processor, prompt_only=True)
    rounds = _rounds(len(samples), batch_size)
    given: list[list[object]] = []
    with evaluating(model):
        for indices in tqdm(rounds, desc=f"scoring {name}", disable=quiet, leave=False):
            batch = ask([samples[index] for index in indices])
            texts = _generate(model, processor, batch, max_new_tokens)
            given += [[index, text] for index, text in zip(indices, texts, strict=True)]
    by_index = dict(engine.gather(given))
    return [
        Answer(str(sample["id"]), by_index[index], reference(sample))
        for index, sample in enumerate(samples[position] for position in range(len(samples)))
    ]


def reference(sample: Sample) -> str:
    """The text of the assistant's last message: what should be answered."""
    content = sample["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _rounds(number: int, batch_size: int) -> list[list[int]]:
    """This rank's batches of indices; short shares are filled with the last index, which is
    answered twice.
    """
    world = engine.world_size()
    padded = [min(index, number - 1) for index in range(-(-number // world) * world)]
    mine = padded[engine.rank() :: world]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def _generate(
    model: nn.Module, processor, batch: dict[str, Tensor], max_new_tokens: int
) -> list[str]:
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    tokenizer = ChatCollator(processor).tokenizer
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_ends(model, tokenizer),
            synced_gpus=engine.world_size() > 1,
        )
    return tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def _ends(model: nn.Module, tokenizer) -> list[int]:
    """What ends an answer: the model's own list, which may name an end-of-turn token, and eos."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})
