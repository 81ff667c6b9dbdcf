"""What a model does with one batch of questions: it answers them, and weighs the right answers.

B samples, T tokens of the longest chat, P of the longest prompt, C words of the vocabulary.
"""

from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from mllm_cl import engine
from mllm_cl.data.chat import IGNORE

Batch = dict[str, Tensor]


def respond(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int
) -> list[str]:
    """Greedy answers to the prompts of a training batch. Collective: ranks generate in step, since
    sharded parameters are gathered by all.
    """
    inputs = prompts(batch, tokenizer.pad_token_id)
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model, tokenizer),
        synced_gpus=engine.world_size() > 1,
    )
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def prompts(batch: Batch, pad: int) -> Batch:
    """A training batch, padded on the right, without its answers and padded on the left.

    Whatever has a value per token is cut alike; the rest (pictures) is passed on, so that pictures
    are prepared once.
    """
    shape = batch["labels"].shape
    length_B = (batch["labels"] != IGNORE).int().argmax(dim=1)
    position_P = torch.arange(int(length_B.max()), device=length_B.device)
    source_BP = position_P - (len(position_P) - length_B)[:, None]
    cut = {}
    for name, value in batch.items():
        if name == "labels":
            continue
        if value.shape[:2] == shape:
            row_B1 = torch.arange(shape[0], device=value.device)[:, None]
            moved = value[row_B1, source_BP.clamp_min(0)]
            moved[source_BP < 0] = pad if name == "input_ids" else 0
            value = moved
        cut[name] = value
    return cut


def weigh(model: nn.Module, batch: Batch) -> list[tuple[float, int]]:
    """Of every sample the negative log-likelihood of its answer, summed over the answer's tokens,
    and their number. Collective where parameters are sharded.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    target_BT = batch["labels"][:, 1:]  # position t says token t + 1
    needed_K = (target_BT != IGNORE).any(dim=0).nonzero()[:, 0]
    if "logits_to_keep" in signature(type(model).forward).parameters:
        logits_BKC = model(**inputs, use_cache=False, logits_to_keep=needed_K).logits
    else:
        logits_BKC = model(**inputs, use_cache=False).logits[:, needed_K]
    target_BK = target_BT[:, needed_K]
    loss_BK = cross_entropy(
        logits_BKC.float().transpose(1, 2), target_BK, ignore_index=IGNORE, reduction="none"
    )
    number_B = (target_BK != IGNORE).sum(dim=1)
    return list(zip(loss_BK.double().sum(dim=1).tolist(), number_B.tolist(), strict=True))


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the model's own list, which may name an end-of-turn token, and eos."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})
