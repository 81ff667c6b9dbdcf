"""LAE's two sides of one adaptation: the online one trains, the offline one follows it slowly, and
together they answer.

B batch, C classes, D width, H heads, L tokens of a prefix, N queries, M keys, R rank, S keys and
values.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Linear
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.prompts import Choice, Prefix, attach_prefix, chosen_blocks
from mllm_cl.model.vision import Adaptation, put

ONLINE, OFFLINE = 0, 1


class Side(Choice):
    """Which side acts, handed from the encoder's door to its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = ONLINE


class SidedPrefix(Prefix):
    """A prefix of two sides, calibrated: its tokens share a softmax of their own, so that they do
    not have to win against those of the picture to act and learn (LAE, section 4.2).

        answer = Σ_tokens p v + Σ_prefix p v / Σ_prefix p,   p = softmax over both
    """

    def __init__(self, drawn_PSLD: Tensor, side: Side) -> None:
        super().__init__([drawn_PSLD, drawn_PSLD.clone()], side)

    @property
    def online(self) -> list[nn.Parameter]:
        """What trains."""
        return [self.pool[0]]

    @property
    def offline(self) -> list[nn.Parameter]:
        """What follows it."""
        return [self.pool[1]]

    def forward(self) -> Tensor:
        """Keys and values of the side that acts."""
        (shown_PSLD,) = _shown(self)
        return shown_PSLD.float()

    def attend(self, query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor) -> Tensor:
        """What a calibrated attention answers whose first keys and values are the prefix's."""
        number = engine.shape(self.pool[0])[2]
        scores_BHNM = (query_BHND @ key_BHMD.mT * query_BHND.shape[-1] ** -0.5).float()
        of_tokens_BHNM = scores_BHNM.softmax(-1)[..., number:]
        of_prefix_BHNL = scores_BHNM[..., :number].softmax(-1)
        share_BHNM = torch.cat([of_prefix_BHNL, of_tokens_BHNM], dim=-1)
        return share_BHNM.to(value_BHMD.dtype) @ value_BHMD


class SidedAdapter(Adaptation):
    """A bottleneck of two sides beside an attention: adds U gelu(D x + d) + u, x being what the
    attention is given. U, d and u start at zero, so that nothing changes at first.
    """

    def __init__(self, drawn_RD: Tensor, side: Side) -> None:
        super().__init__()
        rank, width = drawn_RD.shape
        zeros = drawn_RD.new_zeros(rank), drawn_RD.new_zeros(width, rank), drawn_RD.new_zeros(width)
        self.online = nn.ParameterList([drawn_RD, *zeros])
        self.offline = nn.ParameterList([one.clone() for one in (drawn_RD, *zeros)])
        self.choice = side

    def forward(self, x_BND: Tensor) -> Tensor:
        """What is added to the attention's answer."""
        down_RD, down_R, up_DR, up_D = (one.to(x_BND.dtype) for one in _shown(self))
        low_BNR = functional.gelu(functional.linear(x_BND, down_RD, down_R))
        return functional.linear(low_BNR, up_DR, up_D)


Sided = SidedPrefix | SidedAdapter


def _shown(one: Sided) -> list[Tensor]:
    """The side that acts; at rest without a gradient but zero, so that no process waits for it."""
    if one.choice.shown == OFFLINE:
        return list(one.offline)
    if one.resting:
        return [part.detach() + 0 * part for part in one.online]
    return list(one.online)


class Sides(Adaptation):
    """While the encoder trains the online side acts; when it answers, both do, one after the other:
    the features are [φ_online; φ_offline], (B, 2 D).
    """

    def __init__(self) -> None:
        super().__init__()
        self.side = Side()


class Either(Linear):
    """A linear head for both sides' features: the classes are compared by the larger of the two
    probabilities, logits = max(log softmax(W φ_online + b), log softmax(W φ_offline + b)).

    In training it is Linear.
    """

    def logits(self, features_BD: Tensor) -> Tensor:
        """W φ + b, or the larger of two log-probabilities."""
        if features_BD.shape[-1] == self.width:
            return super().logits(features_BD)
        halves = [super(Either, self).logits(half_BD) for half_BD in features_BD.chunk(2, dim=-1)]
        online_BC, offline_BC = (logits_BC.log_softmax(-1) for logits_BC in halves)
        return torch.maximum(online_BC, offline_BC)

    def by_name(self, features_BD: Tensor, prompts_CPD: Tensor) -> Tensor:
        """cos(φ_online, t_c)."""
        return super().by_name(features_BD[:, : self.width], prompts_CPD)


def attach_sided_prefixes(
    encoder: Encoder, places: tuple[int, ...], *, length: int, seed: int
) -> list[nn.Parameter]:
    """Prefixes of two sides, alike at first, in the blocks at `places`; the online ones.

    They are drawn from U(0, 0.01), as in the released code.
    """
    device, sides, online = next(encoder.parameters()).device, Sides(), []
    size = 1, 2, length, encoder.anatomy.width
    for block in chosen_blocks(encoder, places):
        drawn = torch.empty(size).uniform_(0, 0.01, generator=seeded(seed, block.name))
        prefix = SidedPrefix(drawn.to(device), sides.side)
        attach_prefix(encoder, block, prefix)
        online += prefix.online
    put(encoder, "sides", sides, _forward_on_sides)
    return online


def attach_sided_adapters(
    encoder: Encoder, places: tuple[int, ...], *, rank: int, seed: int
) -> list[nn.Parameter]:
    """Adapters of two sides, alike at first, beside the attention of the blocks at `places`; the
    online ones. D is drawn as linears are.
    """
    device, sides, online = next(encoder.parameters()).device, Sides(), []
    width = encoder.anatomy.width
    for block in chosen_blocks(encoder, places):
        attention = encoder.backbone.get_submodule(block.attention)
        drawn = torch.empty(rank, width)
        drawn.uniform_(-(width**-0.5), width**-0.5, generator=seeded(seed, block.name))
        adapter = SidedAdapter(drawn.to(device), sides.side)
        put(attention, "adapter", adapter, _forward_beside_attention)
        online += adapter.online
    put(encoder, "sides", sides, _forward_on_sides)
    return online


def sided(model: nn.Module) -> dict[str, Sided]:
    """What has two sides in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Sided)}


def _forward_beside_attention(self: nn.Module, hidden_states: Tensor, *args, **kwargs):
    """Its first argument is called as in transformers, where blocks give it by name."""
    answer = self._forward_before_adapter(hidden_states, *args, **kwargs)
    if not self.adapter.active:
        return answer
    added_BND = self.adapter(hidden_states)
    if torch.is_tensor(answer):  # of older attentions
        return answer + added_BND.to(answer.dtype)
    return answer[0] + added_BND.to(answer[0].dtype), *answer[1:]


def _forward_on_sides(self: Encoder, pixel_values_BCHW: Tensor) -> Tensor:
    if self.training or not self.sides.active:
        return self._forward_before_sides(pixel_values_BCHW)
    halves = []
    for shown in (OFFLINE, ONLINE):  # which stays
        self.sides.side.shown = shown
        halves.insert(0, self._forward_before_sides(pixel_values_BCHW))
    return torch.cat(halves, dim=-1)
