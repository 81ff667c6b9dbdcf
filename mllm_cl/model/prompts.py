"""Prompts that each picture chooses for itself, by what the frozen encoder makes of it: tokens that
join the sequence (L2P, CPP), and keys and values that join an attention's (DualPrompt, CODA).

Pools grow by whole tensors, so that what earlier tasks learnt stays frozen to the bit. What is
chosen is a product with weights: entries that no picture of a process chose have the gradient zero
rather than none, and no process waits for another.
B batch, N tokens, D width, P entries of a pool, K chosen of them, L tokens of an entry, Q width of
a query, S keys and values.
"""

from collections.abc import Iterable, Sequence
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.blocks import Block
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.penalty import penalise
from mllm_cl.model.vision import Adaptation, put, refuse_mask, unadapted
from mllm_cl.model.watch import evaluating


class Choice:
    """What the pictures of this pass ask for, handed from the encoder's door to its blocks."""

    def __init__(self) -> None:
        self.query_BQ: Tensor | None = None
        self.weight_BKP: Tensor | None = None  # None: the whole pool, which is one entry


class Query(Adaptation):
    """Hands what the frozen encoder makes of a picture to the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.batchwise = Choice(), False

    def forward(self, query_BQ: Tensor) -> None:
        """Note the queries of this pass."""
        self.choice.query_BQ = query_BQ.float()


class Keys(Query):
    """Chooses for each picture the `top_k` entries whose keys its query is nearest to, by cosine.

    What they owe is −Σ_k cos(query, key) over the chosen, a mean over the pictures, which draws the
    keys to the pictures. `forced` names the entry that all pictures get in training. `batchwise`
    gives all pictures of a batch the entries that most of them choose: an answer then depends on
    what else is in the batch.
    """

    def __init__(
        self, keys: Iterable[Tensor], *, top_k: int, forced: int | None, batchwise: bool
    ) -> None:
        super().__init__()
        self.keys = nn.ParameterList(keys)  # of (P, Q) each
        self.top_k, self.forced, self.batchwise = top_k, forced, batchwise
        self._cosine_BK: Tensor | None = None
        penalise(self, self._distance)

    def forward(self, query_BQ: Tensor) -> Tensor:
        """Choose for the pictures of this pass; the cosines (B, K) of what they chose."""
        super().forward(query_BQ)
        with torch.autocast(query_BQ.device.type, enabled=False):
            key_PQ = functional.normalize(torch.cat(list(self.keys)).float(), dim=-1)
            query_BQ = functional.normalize(self.choice.query_BQ, dim=-1)
            cosine_BP = query_BQ @ key_PQ.T
            weight_BKP = functional.one_hot(self._chosen(cosine_BP.detach()), len(key_PQ)).float()
            self.choice.weight_BKP = weight_BKP
            self._cosine_BK = (weight_BKP * cosine_BP[:, None]).sum(-1)
        return self._cosine_BK

    def _distance(self) -> Tensor:
        cosine_BK, self._cosine_BK = self._cosine_BK, None
        return -cosine_BK.sum(-1).mean()

    def _chosen(self, cosine_BP: Tensor) -> Tensor:
        """The places (B, K) of the chosen entries."""
        if self.training and self.forced is not None:
            return torch.full_like(cosine_BP[:, :1], self.forced, dtype=torch.long)
        chosen_BK = cosine_BP.topk(self.top_k, dim=-1).indices
        if not self.batchwise:
            return chosen_BK
        votes_P = functional.one_hot(chosen_BK, cosine_BP.shape[1]).sum((0, 1))
        order_P = votes_P.argsort(descending=True, stable=True)
        return order_P[: self.top_k].expand(len(cosine_BP), -1)


class Pool(Adaptation):
    """The entries that a picture chose join its tokens, and leave them again later.

    With `speaking` it is they that speak for the picture: the mean of what the last LayerNorm makes
    of them stands in for all tokens. Otherwise the others go on as ever.
    """

    def __init__(self, pool: Iterable[Tensor], choice: Choice, *, speaking: bool = False) -> None:
        super().__init__()
        self.pool = nn.ParameterList(pool)  # of (P, L, D) each
        self.choice, self.speaking = choice, speaking

    def forward(self, hidden_BND: Tensor) -> Tensor:
        """The tokens, and behind them the chosen entries'."""
        if not self.active:
            return hidden_BND
        pool_PLD = torch.cat(list(self.pool)).float()
        with torch.autocast(pool_PLD.device.type, enabled=False):
            chosen_BKLD = torch.einsum("bkp,pld->bkld", self.choice.weight_BKP, pool_PLD)
        chosen_BND = chosen_BKLD.flatten(1, 2).to(hidden_BND.dtype)
        return torch.cat([hidden_BND, chosen_BND.expand(len(hidden_BND), -1, -1)], dim=1)

    def leave(self, hidden_BND: Tensor) -> Tensor:
        """The tokens without them; `speaking`, as one token that is many still: (B, 1, K L, D)."""
        if not self.active:
            return hidden_BND
        number = self.choice.weight_BKP.shape[1] * engine.shape(self.pool[0])[1]
        return hidden_BND[:, None, -number:] if self.speaking else hidden_BND[:, :-number]


class Prefix(Adaptation):
    """Keys and values that join those of an attention's tokens: the chosen entries' of a pool.

    The tokens of an entry come after each other, so that each of the K chosen brings L of them.
    """

    def __init__(self, pool: Iterable[Tensor], choice: Choice) -> None:
        super().__init__()
        self.pool = nn.ParameterList(pool)  # of (P, S, L, D) each: S is 2, keys and values
        self.choice = choice

    def forward(self) -> Tensor:
        """Keys and values (B, S, K L, D), B being 1 where all pictures have the same."""
        pool_PSLD, weight_BKP = torch.cat(list(self.pool)).float(), self.weight_BKP()
        with torch.autocast(pool_PSLD.device.type, enabled=False):
            return torch.einsum("bkp,psld->bskld", weight_BKP, pool_PSLD).flatten(2, 3)

    def weight_BKP(self) -> Tensor:
        """What of each entry goes into each of the chosen."""
        if self.choice.weight_BKP is None:
            return self.pool[0].new_ones(1, 1, 1, dtype=torch.float32)
        return self.choice.weight_BKP

    def attend(self, query_BHND: Tensor, key_BHND: Tensor, value_BHND: Tensor) -> Tensor:
        """What an attention of H heads answers whose first keys and values are the prefix's."""
        return functional.scaled_dot_product_attention(query_BHND, key_BHND, value_BHND)


def attach_keys(encoder: Encoder, keys: Query) -> None:
    """Ask the frozen encoder first, and then `keys`, of every picture that the encoder is shown.

    The query is the encoder's own feature, without anything that was put in and without gradients.
    """
    put(encoder, "keys", keys, _forward_asking)
    encoder.batchwise = keys.batchwise


def attach_pool(encoder: Encoder, pool: Pool) -> None:
    """Let a pool join the tokens where they have their positions, before a CLIP's first norm."""
    anatomy, backbone = encoder.anatomy, encoder.backbone
    put(backbone.get_submodule(anatomy.embeddings), "pool", pool, _forward_with_pool)
    last, norm = (backbone.get_submodule(at) for at in (anatomy.blocks[-1].name, anatomy.norm))
    for module, forward in ((last, _forward_and_leave_pool), (norm, _forward_of_many)):
        # In a tuple, so that the pool is registered once.
        module._pool, module._forward_before_leaving_pool = (pool,), module.forward
        module.forward = MethodType(forward, module)


def attach_block_pool(encoder: Encoder, block: Block, pool: Pool) -> None:
    """Let a pool join the tokens before a block, and leave them after it."""
    put(encoder.backbone.get_submodule(block.name), "pool", pool, _forward_beside_pool)


def attach_prefix(encoder: Encoder, block: Block, prefix: Prefix) -> None:
    """Let a prefix join the keys and values of a block's attention.

    That attention is then `scaled_dot_product_attention`, whatever `attn_implementation` says:
    others take as many keys as there are queries. ValueError where it has dropout.
    """
    name = block.q.rpartition(".")[0]
    attention = encoder.backbone.get_submodule(name)
    rates = ("attention_probs_dropout_prob", "attention_dropout")
    if any(attention.config.to_dict().get(rate) for rate in rates):
        raise ValueError(
            f"{name} has dropout on what it attends to, which attention with a prefix has not: "
            f"set {' and '.join(rates)} to 0 in the model's config"
        )
    # Older attentions leave the output projection to the module around them.
    parts = [
        part.removeprefix(f"{name}.")
        for part in (block.q, block.k, block.v, block.o)
        if part.startswith(f"{name}.")
    ]
    put(attention, "prefix", prefix, _forward_with_prefix)
    attention._projections = parts


def drawn(number: int, *size: int, seed: int, name: str, device: torch.device) -> Tensor:
    """`number` entries of U(-1, 1), each from the seed and its own name and place alone."""
    each = [
        torch.empty(size).uniform_(-1, 1, generator=seeded(seed, f"{name}.{place}"))
        for place in range(number)
    ]
    return torch.stack(each).to(device)


def chosen_blocks(encoder: Encoder, places: Sequence[int]) -> list[Block]:
    """The blocks at `places`. ValueError for a place where there is none."""
    blocks = encoder.anatomy.blocks
    beyond = [place for place in places if not 0 <= place < len(blocks)]
    if beyond:
        raise ValueError(
            f"found block {beyond[0]} among those that get prompts, but "
            f"{type(encoder.backbone).__name__} has {len(blocks)}, from 0 to {len(blocks) - 1}"
        )
    return [blocks[place] for place in places]


def _forward_asking(self: Encoder, pixel_values_BCHW: Tensor) -> Tensor:
    if self.keys.active:
        with evaluating(self), unadapted(self):
            query_BQ = self._forward_before_keys(pixel_values_BCHW)
        self.keys(query_BQ)
    return self._forward_before_keys(pixel_values_BCHW)


def _forward_with_pool(self: nn.Module, *args, **kwargs) -> Tensor:
    return self.pool(self._forward_before_pool(*args, **kwargs))


def _forward_beside_pool(self: nn.Module, hidden_BND: Tensor, *args, **kwargs) -> Tensor:
    if self.pool.active:
        refuse_mask(args[0] if args else kwargs.get("attention_mask"))
    return self.pool.leave(self._forward_before_pool(self.pool(hidden_BND), *args, **kwargs))


def _forward_and_leave_pool(self: nn.Module, hidden_BND: Tensor, *args, **kwargs) -> Tensor:
    (pool,) = self._pool
    if pool.active:
        refuse_mask(args[0] if args else kwargs.get("attention_mask"))
    return pool.leave(self._forward_before_leaving_pool(hidden_BND, *args, **kwargs))


def _forward_of_many(self: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """CLIP takes its first token before this norm, the others after it: what is many comes last."""
    (pool,) = self._pool
    normed = self._forward_before_leaving_pool(hidden)
    return normed.mean(-2) if pool.active and pool.speaking else normed


def _forward_with_prefix(self: nn.Module, *args, **kwargs):
    if not self.prefix.active:
        return self._forward_before_prefix(*args, **kwargs)
    # Some blocks give it by name, and not all attentions take a mask.
    hidden_BND = args[0] if args else kwargs["hidden_states"]
    refuse_mask(args[1] if len(args) > 1 else kwargs.get("attention_mask"))
    q, k, v, *last = (self.get_submodule(name) for name in self._projections)
    before_BSLD = self.prefix().to(hidden_BND.dtype).expand(len(hidden_BND), -1, -1, -1)
    query_BND = q(hidden_BND)
    key_BND, value_BND = (
        torch.cat([before_BLD.to(own_BND.dtype), own_BND], dim=1)
        for before_BLD, own_BND in zip(
            before_BSLD.unbind(1), (k(hidden_BND), v(hidden_BND)), strict=True
        )
    )
    heads = self.config.num_attention_heads
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query_BND, key_BND, value_BND))
    answer_BND = self.prefix.attend(*split).transpose(1, 2).flatten(2)
    for o in last:
        answer_BND = o(answer_BND)
    return answer_BND, None
