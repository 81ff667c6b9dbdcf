"""Second moments: the sums are exact, add over everything, and a sketch finds the leading
directions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mllm_cl.drift.covariance import CovarianceTracker

few = settings(max_examples=20, deadline=None)


def inputs(num_tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -2, dim)
    return torch.randn(num_tokens, dim, generator=generator) @ mix + 0.3


def reference(input_TD: torch.Tensor, weight_T: np.ndarray | None = None) -> np.ndarray:
    x = input_TD.double().numpy()
    w = np.ones(len(x)) if weight_T is None else weight_T
    return sum(w_t * np.outer(x_t, x_t) for w_t, x_t in zip(w, x, strict=True)) / w.sum()


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


def reconstruct(tracker: CovarianceTracker) -> torch.Tensor:
    s = tracker.spectrum()
    return (s.basis_DK * s.eigenvalue_K.unsqueeze(-2)) @ s.basis_DK.mT


@few
@given(
    dim=st.integers(1, 24),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_micro_batches_of_any_size_give_the_second_moment_of_all_tokens(dim, sizes, seed):
    tracker = CovarianceTracker(dim)
    input_TD = inputs(sum(sizes), dim, seed)
    for part_TD in input_TD.split(sizes):
        tracker.update(part_TD)
    assert error(tracker.covariance(), reference(input_TD)) < 1e-5
    assert tracker.count == sum(sizes)
    assert error(tracker.trace, np.array(reference(input_TD).trace())) < 1e-5


@pytest.mark.parametrize("rank", [None, 4])
def test_two_ranks_reduced_equal_one_that_saw_everything(rank):
    input_TD = inputs(90, 40)
    whole = CovarianceTracker(40, rank=rank)
    whole.update(input_TD)
    parts = [CovarianceTracker(40, rank=rank) for _ in range(2)]
    for tracker, part_TD in zip(parts, input_TD.split([30, 60]), strict=True):
        tracker.update(part_TD)
    sums = {name: parts[0].state()[name] + parts[1].state()[name] for name in parts[0].state()}
    queue = [sums["product"], sums["trace"], sums["count"]]
    parts[1].reduce(lambda tensor: queue.pop(0).to(tensor.dtype))
    parts[0].update(input_TD[:0])  # a rank without tokens does no harm
    parts[0].merge(CovarianceTracker(40, rank=rank))
    assert parts[1].count == whole.count == 90
    for name in ("product", "trace"):
        expected = whole.state()[name].double().numpy()
        assert error(parts[1].state()[name], expected) < 1e-5
    assert error(reconstruct(parts[1]), reconstruct(whole).double().numpy()) < 1e-4


@pytest.mark.parametrize("rank", [None, 4])
def test_merging_tasks_is_the_count_weighted_mean(rank):
    first_TD, second_TD = inputs(20, 40, seed=1), inputs(70, 40, seed=2)
    first, second, whole = (CovarianceTracker(40, rank=rank) for _ in range(3))
    first.update(first_TD)
    second.update(second_TD)
    whole.update(torch.cat([first_TD, second_TD]))
    first.merge(second)
    assert first.count == whole.count
    assert error(first.state()["product"], whole.state()["product"].double().numpy()) < 1e-5
    assert error(first.trace, whole.trace.double().numpy()) < 1e-6


@few
@given(
    dim=st.integers(1, 16),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_padding_never_counts(dim, batch, length, seed):
    input_BTD = inputs(batch * length, dim, seed).view(batch, length, dim)
    mask_BT = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask_BT[0, 0] = True
    tracker = CovarianceTracker(dim)
    tracker.update(torch.where(mask_BT[..., None], input_BTD, torch.nan), mask_T=mask_BT)
    assert tracker.count == mask_BT.sum()
    assert error(tracker.covariance(), reference(input_BTD[mask_BT])) < 1e-5


def test_tokens_that_are_not_finite_are_left_out():
    input_TD = inputs(12, 6)
    broken_TD = input_TD.clone()
    broken_TD[2, 1], broken_TD[5, 0], broken_TD[7, 3] = torch.nan, -torch.inf, 1e30
    kept = [t for t in range(12) if t not in (2, 5, 7)]
    weight_T = torch.linspace(0.1, 1, 12)
    weight_T[0] = torch.inf
    plain, weighted = CovarianceTracker(6), CovarianceTracker(6)
    plain.update(broken_TD)
    weighted.update(broken_TD, weight_TE=weight_T)
    assert plain.count == 9
    assert error(plain.covariance(), reference(input_TD[kept])) < 1e-5
    expected = reference(input_TD[kept[1:]], weight_T[kept[1:]].double().numpy())
    assert error(weighted.covariance(), expected) < 1e-5


@few
@given(
    dim=st.integers(1, 12),
    num_experts=st.integers(1, 5),
    num_tokens=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_each_expert_has_the_second_moment_of_what_it_is_sent(dim, num_experts, num_tokens, seed):
    input_TD = inputs(num_tokens, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    weight_TE = torch.rand(num_tokens, num_experts, generator=generator) + 0.01
    tracker = CovarianceTracker(dim, num_experts=num_experts)
    tracker.update(input_TD, weight_TE=weight_TE)
    for e in range(num_experts):
        expected = reference(input_TD, weight_TE[:, e].double().numpy())
        assert error(tracker.covariance()[e], expected) < 1e-5
        assert error(tracker.trace[e], np.array(expected.trace())) < 1e-5
    assert torch.allclose(tracker.count, weight_TE.double().sum(0))


def test_many_experts_are_summed_in_groups_alike():
    input_TD, weight_TE = inputs(600, 96), torch.rand(600, 300)  # 2^24 / (600 * 96) = 291 a group
    tracker = CovarianceTracker(96, num_experts=300)
    tracker.update(input_TD, weight_TE=weight_TE)
    for e in (0, 290, 291, 299):
        expected = reference(input_TD, weight_TE[:, e].double().numpy())
        assert error(tracker.covariance()[e], expected) < 1e-5


def test_an_expert_that_was_sent_nothing_has_no_energy():
    tracker = CovarianceTracker(30, rank=2, num_experts=2)
    tracker.update(inputs(9, 30), weight_TE=torch.tensor([[1.0, 0.0]]).expand(9, 2))
    s = tracker.spectrum()
    assert s.trace[1] == 0 and not s.eigenvalue_K[1].any()
    assert torch.allclose(s.basis_DK.mT @ s.basis_DK, torch.eye(2).expand(2, 2, 2), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_for_half_precision_inputs_and_under_autocast(dtype):
    input_TD = (inputs(4000, 16) + 1).to(dtype)
    tracker = CovarianceTracker(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for part_TD in input_TD.split(40):
            tracker.update(part_TD)
    assert tracker.state()["product"].dtype == torch.float32
    assert error(tracker.covariance(), reference(input_TD)) < 1e-5  # bfloat16 sums miss by 1e-2


def test_the_count_is_exact_beyond_what_float32_can_hold():
    tracker = CovarianceTracker(1)
    tracker._count += 2**24
    tracker.update(torch.ones(1, 1))
    assert tracker.count == 2**24 + 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_activation_checkpoint_counts_once(use_reentrant):
    layer, tracker = torch.nn.Linear(5, 5), CovarianceTracker(5)

    def forward(input_TD: torch.Tensor) -> torch.Tensor:
        tracker.update(input_TD)
        return layer(input_TD)

    input_TD = inputs(7, 5).requires_grad_()
    checkpoint(forward, input_TD, use_reentrant=use_reentrant).sum().backward()
    assert layer.weight.grad is not None
    assert tracker.count == 7


def test_a_tracker_filled_in_inference_mode_can_be_filled_outside_it():
    tracker = CovarianceTracker(6, rank=None)
    with torch.inference_mode():
        tracker.update(inputs(5, 6))
    tracker.update(inputs(5, 6))
    assert tracker.count == 10


def test_no_graph_is_kept():
    tracker = CovarianceTracker(4)
    tracker.update(inputs(5, 4).requires_grad_())
    assert not tracker.covariance().requires_grad


# The flatter the spectrum, the further from the optimum; the shares are those that S = 2 K reaches,
# rounded down.
@pytest.mark.parametrize(("decay", "share"), [(0.5, 0.9), (1.0, 0.99), (2.0, 0.99999)])
def test_a_sketch_captures_nearly_the_energy_of_the_best_directions(decay, share):
    dim, rank = 200, 12
    scale = torch.arange(1, dim + 1).double() ** -decay  # eigenvalues fall like i^(-2 decay)
    turn = torch.linalg.qr(
        torch.randn(dim, dim, generator=torch.Generator().manual_seed(3)).double()
    )
    input_TD = (inputs(3000, dim).double().sign() * scale) @ turn[0]
    tracker = CovarianceTracker(dim, rank=rank, seed=1)
    for part_TD in input_TD.split(100):
        tracker.update(part_TD.float())
    exact_DD = torch.from_numpy(reference(input_TD))
    value_D = torch.linalg.eigvalsh(exact_DD).flip(0)
    s = tracker.spectrum()
    basis_DK = s.basis_DK.double()
    captured = torch.trace(basis_DK.T @ exact_DD @ basis_DK)
    assert captured > share * value_D[:rank].sum()
    assert torch.allclose(basis_DK.T @ basis_DK, torch.eye(rank).double(), atol=1e-6)
    assert (s.eigenvalue_K.diff() <= 0).all()
    assert (s.eigenvalue_K <= value_D[:rank] * (1 + 1e-5)).all()  # Nystrom never overestimates
    assert error(s.trace, np.array(float(exact_DD.trace()))) < 1e-6


@few
@given(dim=st.integers(20, 60), true_rank=st.integers(1, 4), seed=st.integers(0, 50))
def test_a_sketch_of_low_rank_inputs_is_exact(dim, true_rank, seed):
    generator = torch.Generator().manual_seed(seed)
    input_TD = torch.randn(80, true_rank, generator=generator) @ torch.randn(
        true_rank, dim, generator=generator
    )
    tracker = CovarianceTracker(dim, rank=4, seed=seed)
    tracker.update(input_TD)
    assert error(reconstruct(tracker), reference(input_TD)) < 1e-4
    rounding = 1e-4 * tracker.trace  # of the float32 sums, divided by a shift of 0.1 eps
    assert (tracker.spectrum().eigenvalue_K[true_rank:] < rounding).all()


def test_a_sketch_sees_past_one_massive_channel():
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 201).float() ** -1.0
    turn_DD = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    input_TD = (torch.randn(3000, 200, generator=generator) * scale) @ turn_DD
    input_TD[:, 7] += 1000 * torch.randn(3000, generator=generator).sign()  # 10^6 times the energy
    tracker = CovarianceTracker(200, rank=16)
    for part_TD in input_TD.split(100):
        tracker.update(part_TD)
    value_D = np.linalg.eigvalsh(reference(input_TD))[::-1]
    s = tracker.spectrum()
    missed = np.abs(s.eigenvalue_K[1:].double().numpy() - value_D[1:16]).max()
    assert missed < 0.1 * value_D[1]  # a shift of 10 eps would miss by more


def test_a_sketch_depends_on_its_seed_and_not_on_the_global_one():
    trackers = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        trackers.append(CovarianceTracker(40, rank=3, seed=seed))
        trackers[-1].update(inputs(20, 40))
    products = [tracker.state()["product"] for tracker in trackers]
    assert torch.equal(products[0], products[1])
    assert not torch.allclose(products[0], products[2])


@pytest.mark.parametrize(("rank", "num_experts"), [(None, None), (3, None), (3, 2)])
def test_a_tracker_goes_on_from_its_state_bitwise(rank, num_experts):
    first, whole = (CovarianceTracker(40, rank=rank, num_experts=num_experts) for _ in range(2))
    weight_TE = None if num_experts is None else torch.rand(20, num_experts)
    first.update(inputs(20, 40), weight_TE=weight_TE)
    first = CovarianceTracker.from_state(first.state())
    first.update(inputs(20, 40, seed=1), weight_TE=weight_TE)
    whole.update(inputs(20, 40), weight_TE=weight_TE)
    whole.update(inputs(20, 40, seed=1), weight_TE=weight_TE)
    for name, tensor in whole.state().items():
        assert torch.equal(first.state()[name], tensor)


def test_a_state_drawn_from_another_generator_is_refused():
    state = CovarianceTracker(40, rank=3).state()
    state["probe"] += 1
    with pytest.raises(ValueError, match="another random matrix"):
        CovarianceTracker.from_state(state)


def test_wrong_shapes_are_refused():
    tracker = CovarianceTracker(4, num_experts=2)
    with pytest.raises(ValueError, match="width 4"):
        tracker.update(torch.zeros(3, 5), weight_TE=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="needs weight_TE"):
        tracker.update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="3 tokens x 2 experts"):
        tracker.update(torch.zeros(3, 4), weight_TE=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="mask_T must be bool"):
        tracker.update(torch.zeros(3, 4), mask_T=torch.ones(3), weight_TE=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="only like trackers merge"):
        tracker.merge(CovarianceTracker(4))
    with pytest.raises(ValueError, match="no full covariance"):
        CovarianceTracker(40, rank=2).covariance()
