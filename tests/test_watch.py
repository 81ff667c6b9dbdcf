"""What a Watch counts, against float64 sums over inputs that were captured another way."""

import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from families import inputs as text
from families import llava, qwen3_vl_moe
from mllm_cl.model.anatomy import routers
from mllm_cl.model.linears import linears
from mllm_cl.model.moe_lora import MoELoRA
from mllm_cl.model.surgery import guard
from mllm_cl.model.watch import Watch, evaluating, measure

D, E = 8, 4


class Block(nn.Module):
    """q, k and v on one tensor; o on another; and a branch that no input takes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.branch = nn.Linear(D, D)

    def forward(self, hidden_BTD: Tensor, take_branch: bool = False) -> Tensor:
        mixed = torch.tanh(self.q(hidden_BTD) * self.k(hidden_BTD) + self.v(hidden_BTD))
        mixed = self.branch(mixed) if take_branch else mixed
        return hidden_BTD + self.o(mixed)


class Tower(nn.Module):
    """Two blocks under a mask, as transformers calls them; `checkpointing` recomputes them."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.checkpointing = nn.ModuleList(Block() for _ in range(2)), checkpointing

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None, branch=False):
        for block in self.blocks:
            if self.checkpointing:
                hidden_BTD = checkpoint(block, hidden_BTD, branch, use_reentrant=False)
            else:
                hidden_BTD = block(hidden_BTD, branch)
        return hidden_BTD


def watched(model: nn.Module) -> dict[str, nn.Module]:
    kept = {f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o")}
    return {name: module for name, module in model.named_modules() if name in kept}


def padded(num_rows: int, num_tokens: int, seed: int) -> dict[str, Tensor]:
    """A batch whose rows end in padding of garbage, or of NaN in the last row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, num_tokens, D, generator=generator)
    length = torch.randint(1, num_tokens, (num_rows, 1), generator=generator)
    mask = (torch.arange(num_tokens) < length).long()
    hidden = torch.where(mask[..., None].bool(), hidden, 100.0)
    return {"hidden_BTD": hidden, "attention_mask": mask}


def rows(batch: dict[str, Tensor], index: slice) -> dict[str, Tensor]:
    return {key: value[index] for key, value in batch.items()}


def captured(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The real tokens that entered each watched linear: (T, D), float64."""
    found: dict[str, list[Tensor]] = {}

    def keep(path):
        def hook(module, args, output):
            found.setdefault(path, []).append(args[0][batch["attention_mask"].bool()].double())

        return hook

    handles = [m.register_forward_hook(keep(path)) for path, m in watched(model).items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def agrees(watch: Watch, reference: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for path, input_TD in reference.items():
        tracker = watch.trackers[watch.source_of[path]]
        expected = input_TD.mT @ input_TD / len(input_TD)
        assert tracker.count == len(input_TD)
        error = (tracker.covariance().double() - expected).norm()
        assert error < tolerance * expected.norm()
        assert float(tracker.trace) == pytest.approx(float(expected.trace()), rel=1e-5)


def test_second_moments_are_those_of_the_real_tokens():
    model, batches = Tower(), [padded(4, 7, 0), padded(3, 5, 1)]
    with Watch(model, watched(model)) as watch, torch.no_grad():
        for batch in batches:
            model(**batch)
    agrees(watch, captured(model, batches))


def test_without_a_mask_every_token_counts():
    model, batch = Tower(), padded(4, 7, 0)
    with Watch(model, watched(model)) as watch, torch.no_grad():
        model(batch["hidden_BTD"])
    assert all(tracker.count == 28 for tracker in watch.trackers.values())


def test_micro_batches_and_two_merged_halves_count_alike():
    model, batch = Tower(), padded(8, 7, 0)
    expected = captured(model, [batch])
    watches = []
    for parts in ([slice(0, 3), slice(3, 4), slice(4, 8)], [slice(0, 4)], [slice(4, 8)]):
        with Watch(model, watched(model)) as watch, torch.no_grad():
            for part in parts:
                model(**rows(batch, part))
        watches.append(watch)
    agrees(watches[0], expected)
    for path, tracker in watches[1].trackers.items():
        tracker.merge(watches[2].trackers[path])
    agrees(watches[1], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_counts_each_token_once_also_where_a_forward_is_recomputed(checkpointing):
    model, batches = Tower(checkpointing), [padded(4, 7, seed) for seed in range(3)]
    calls = []
    model.blocks[0].q.register_forward_pre_hook(lambda *_: calls.append(1))
    with Watch(model, watched(model)) as watch:
        for batch in batches:
            model(**batch).square().sum().backward()
    assert len(calls) == (6 if checkpointing else 3)
    agrees(watch, captured(model, batches))


def test_every_nth_forward_is_counted():
    model, batches = Tower(), [padded(4, 7, seed) for seed in range(5)]
    with Watch(model, watched(model), every=2) as watch, torch.no_grad():
        for batch in batches:
            model(**batch)
    agrees(watch, captured(model, batches[::2]))


def test_modules_on_one_tensor_share_one_tracker():
    model = Tower()
    with Watch(model, watched(model)) as watch, torch.no_grad():
        model(**padded(4, 7, 0))
    assert set(watch.trackers) == {"blocks.0.q", "blocks.0.o", "blocks.1.q", "blocks.1.o"}
    shared = {f"blocks.{i}.{name}": f"blocks.{i}.q" for i in range(2) for name in "qkv"}
    assert watch.source_of == shared | {"blocks.0.o": "blocks.0.o", "blocks.1.o": "blocks.1.o"}


def test_aliases_share_a_tracker_but_a_tensor_changed_in_place_does_not():
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(D, D) for _ in range(3))

        def forward(self, hidden_TD: Tensor) -> Tensor:
            hidden_TD = hidden_TD.clone()
            total = self.first(hidden_TD) + self.second(hidden_TD.detach())
            return total + self.third(hidden_TD.mul_(2))

    model = Alias()
    with Watch(model, dict(model.named_children())) as watch, torch.no_grad():
        model(torch.randn(5, D))
    assert watch.source_of == {"first": "first", "second": "first", "third": "third"}
    ratio = watch.trackers["third"].covariance() / watch.trackers["first"].covariance()
    assert torch.allclose(ratio, torch.tensor(4.0))


def test_watching_keeps_no_layer_input_alive_and_an_address_used_again_is_a_new_tensor():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

        def forward(self, hidden_TD: Tensor) -> Tensor:
            for layer in self.layers:
                hidden_TD = layer(hidden_TD)
                alive.append(weakref.ref(hidden_TD))
                alive_now.append(sum(ref() is not None for ref in alive))
            return hidden_TD

    alive, alive_now, model = [], [], Chain()
    modules = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    with Watch(model, modules) as watch, torch.no_grad():
        model(torch.randn(5, D))
    assert alive_now == [1, 1, 1, 1]
    assert watch.source_of == {path: path for path in modules}


# --- several processes, and what no token reaches -------------------------------------------------


def reduced(watches: list[Watch]) -> list[BaseException | None]:
    """Reduce the watches of several ranks, each in a thread of its own; their errors."""
    barrier, parts, errors = threading.Barrier(len(watches)), {}, [None] * len(watches)

    def run(rank: int) -> None:
        def all_reduce_sum(tensor: Tensor) -> Tensor:
            parts[rank] = tensor
            barrier.wait(10)
            assert len({part.shape for part in parts.values()}) == 1
            total = sum(parts[other].clone() for other in sorted(parts))
            barrier.wait(10)
            return total

        try:
            watches[rank].reduce(all_reduce_sum)
        except Exception as error:  # noqa: BLE001  handed to the test
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(watches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_ranks_whose_data_took_different_ways_reduce_to_the_same_sums():
    model, batches = Tower(), [padded(4, 7, seed) for seed in range(2)]
    modules = watched(model) | {"blocks.1.branch": model.blocks[1].branch}
    watches, whole = [], Watch(model, modules)
    for rank, batch in enumerate(batches):
        with Watch(model, modules) as watch, torch.no_grad():
            model(**batch, branch=rank == 1)
        watches.append(watch)
    whole.close()
    assert "blocks.1.branch" not in watches[0].source_of
    assert reduced(watches) == [None, None]
    assert watches[0].source_of == watches[1].source_of
    for path in watches[0].trackers:
        first, second = (watch.trackers[path] for watch in watches)
        assert first.count == second.count and first.trace == second.trace
        assert torch.equal(first.covariance(), second.covariance())
    assert watches[0].trackers["blocks.1.branch"].count == batches[1]["attention_mask"].sum()
    both = captured(model, batches[:1])["blocks.0.q"], captured(model, batches[1:])["blocks.0.q"]
    agrees(watches[0], {"blocks.0.q": torch.cat(both)})


def test_a_module_that_no_token_reaches_is_named_on_every_rank():
    model, batch = Tower(), padded(4, 7, 0)
    modules = watched(model) | {f"blocks.{i}.branch": model.blocks[i].branch for i in range(2)}
    watches = []
    for _ in range(2):
        with Watch(model, modules) as watch, torch.no_grad():
            model(**batch)
        watches.append(watch)
    errors = reduced(watches)
    assert all(isinstance(error, ValueError) for error in errors)
    assert "reached blocks.0.branch (nor 1 others)" in str(errors[0]) == str(errors[1])


def test_a_batch_of_nothing_but_padding_reaches_nothing():
    model, batch = Tower(), padded(4, 7, 0)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with Watch(model, watched(model)) as watch, torch.no_grad():
        model(**batch)
    with pytest.raises(ValueError, match="no token of the task's data reached blocks.0.k"):
        watch.reduce(lambda tensor: tensor)


def test_a_router_that_no_token_reaches_is_named():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.moe = nn.Linear(D, D), MoELoRA(D, D, num_experts=E, rank=2, alpha=4)

        def forward(self, hidden_TD: Tensor) -> Tensor:
            return self.linear(hidden_TD)

    model = Idle()
    with Watch(model, {"linear": model.linear}, {"moe.router": model.moe.router}) as watch:
        model(torch.randn(3, D))
    with pytest.raises(ValueError, match="reached moe.router,"):
        watch.reduce(lambda tensor: tensor)


# --- real models ----------------------------------------------------------------------------------


def padded_text(model: nn.Module) -> dict[str, Tensor]:
    batch = text(model)
    batch["attention_mask"][0, 4:] = 0
    return batch


def test_routers_that_see_flattened_tokens_leave_padding_out():
    model = qwen3_vl_moe()
    found, batch = routers(model), padded_text(model)
    watch = measure(model, found, found, [batch, batch], rank=256)
    assert all(watch.use[path].count == 22 for path in found)
    assert all(watch.trackers[watch.source_of[path]].count == 22 for path in found)


def test_a_vision_tower_gets_no_text_mask_even_when_the_numbers_agree():
    model = llava()
    modules = linears(model, ["q_proj"], scope="all")
    seen = {path: "vision" in path for path in modules}
    assert set(seen.values()) == {True, False}
    batch = {"input_ids": torch.full((3, 5), 20), "attention_mask": torch.ones(3, 5).long()}
    batch["input_ids"][:, :4] = model.config.image_token_id  # 5 patches with the class token
    batch["attention_mask"][:, 3:] = 0
    with Watch(model, modules) as watch, torch.no_grad():
        model(**batch, pixel_values=torch.randn(3, 3, 16, 16))
    counts = {path: float(watch.trackers[watch.source_of[path]].count) for path in modules}
    assert counts == {path: 15 if vision else 9 for path, vision in seen.items()}


def test_use_sees_what_a_guard_adds():
    model = qwen3_vl_moe()
    found, batch = routers(model), padded_text(model)
    path = list(found)[-1]
    inputs: list[Tensor] = []
    handle = found[path].register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    before = measure(model, {path: found[path]}, {path: found[path]}, [batch], rank=256)
    one = guard(found[path], "weight", in_fp32=True)
    with torch.no_grad():
        one.delta.normal_()
        one.displacement.normal_()
    inputs.clear()
    watch = measure(model, {path: found[path]}, {path: found[path]}, [batch], rank=256)
    handle.remove()
    weight = found[path].weight.double() + one.displacement.double() + one.delta.double()
    real = batch["attention_mask"].flatten().bool()
    expected = (inputs[0].double()[real] @ weight.mT).softmax(-1)
    assert torch.allclose(watch.use[path].utilisation_E.double(), expected.mean(0), atol=1e-5)
    before_E = before.use[path].utilisation_E.double()
    assert not torch.allclose(before_E, expected.mean(0), atol=0.1)


def test_measuring_leaves_the_model_as_it_was():
    model = qwen3_vl_moe().train()
    model.model.visual.eval()
    modes = [module.training for module in model.modules()]
    found, hooks = routers(model), sum(len(m._forward_pre_hooks) for m in model.modules())
    measure(model, found, found, [text(model)], rank=256)
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(m._forward_hooks for m in found.values())
