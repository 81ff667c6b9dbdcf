"""Padding counts nowhere, also where a block shares its tokens out or hands all to every expert."""

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES
from mllm_cl import CovarianceTracker, routers
from mllm_cl.drift.expert_moments import ExpertMoments
from mllm_cl.model.adapt import expert_lora_sites
from mllm_cl.model.expert_lora import adapted
from mllm_cl.model.tokens import Tokens
from mllm_cl.model.watch import measure
from mllm_cl.model.watch_experts import LayerWatch, expert_moments

PADDING = 3


def samples(model: nn.Module) -> list[dict[str, Tensor]]:
    """Three samples of one row each; Ernie is told that some of their tokens are of a picture."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        ids = torch.randint(10, 100, (1, 8), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if type(model).__name__.startswith("Ernie"):
            batch["moe_mm_token_type_ids"] = (torch.arange(8)[None] % 5 < 2).int()
        found.append(batch)
    return found


def padded(batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The batch with padding beside it, of which some is said to be a picture's."""
    fill = {"input_ids": 7, "attention_mask": 0, "moe_mm_token_type_ids": 1}
    found = {}
    for key, value in batch.items():
        more = torch.full((len(value), PADDING), fill[key], dtype=value.dtype)
        found[key] = torch.cat([more, value] if side == "left" else [value, more], -1)
    return found


Moments = dict[str, CovarianceTracker | ExpertMoments]


def moments(model: nn.Module, batches: list[dict[str, Tensor]], bases=None) -> tuple[Moments, dict]:
    """All that is measured of what enters routers and experts, and the bases of the experts."""
    layers, found = LayerWatch(model, rank=256), routers(model)
    modules = found | {path: lora.layout.module for path, lora in adapted(model).items()}
    watch = measure(model, modules, found, batches, rank=256, gather=layers.gather)
    watch.reduce(lambda tensor: tensor)
    bases = layers.bases(watch, 512) if bases is None else bases
    rows = expert_moments(model, bases, batches, lambda tensor: tensor)
    trackers = {path: watch.trackers[source] for path, source in watch.source_of.items()}
    return {**trackers, **watch.use, **rows}, bases


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "llama4", "qwen3_vl_moe"])
def test_moments_are_those_of_a_batch_without_padding(name, side):
    model = FAMILIES[name]()
    expert_lora_sites(model, rank=2, alpha=4, seed=0)
    plain = samples(model)
    expected, bases = moments(model, plain)
    found, _ = moments(model, [padded(batch, side) for batch in plain], bases)
    assert found.keys() == expected.keys() and len(expected) > 6
    for path, one in expected.items():
        other = found[path].state()
        for part, value in one.state().items():
            # Padding at the left shifts positions, which for a rotary model is rounding.
            scale = float(value.double().norm())
            assert (other[part].double() - value.double()).norm() <= 1e-3 * scale, (path, part)


def test_llama_4_counts_only_the_tokens_that_chose_an_expert():
    """All its experts run on all tokens, scaled by zero where they were not chosen."""
    model = FAMILIES["llama4"]()
    expert_lora_sites(model, rank=2, alpha=4, seed=0)
    found, _ = moments(model, samples(model))
    for path, lora in adapted(model).items():
        assert found[path].count == 24 * lora.layout.top_k


def test_rows_of_a_block_that_shares_tokens_out_by_other_means_are_refused():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 3)

        def forward(self, hidden_BTD: Tensor) -> Tensor:
            return self.router(2 * hidden_BTD.flatten(0, 1)[:3])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Block()

        def forward(self, hidden_BTD: Tensor, attention_mask: Tensor) -> Tensor:
            return self.mlp(hidden_BTD)

    model, found = Model(), []
    tokens = Tokens(model, ["mlp.router"])

    def hook(module: nn.Module, args: tuple) -> None:
        found.append(tokens.mask_of("mlp.router", args[0]))

    model.mlp.router.register_forward_pre_hook(hook)
    hidden, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    model(hidden, attention_mask=mask)
    assert found == [None]  # without padding nothing has to be told apart
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="mlp.router is handed 3 rows of a batch of 10 tokens"):
        model(hidden, attention_mask=mask)
