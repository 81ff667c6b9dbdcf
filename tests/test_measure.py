"""Every measure against a loop written from its formula in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.drift import measure
from mllm_cl.drift.subspace import spectrum

few = settings(max_examples=20, deadline=None)
shapes = {
    "num_tokens": st.integers(1, 12),
    "num_experts": st.integers(2, 6),
    "seed": st.integers(0, 99),
}


def two_routers(num_tokens: int, num_experts: int, seed: int):
    rng = np.random.default_rng(seed)
    before, after = (rng.standard_normal((num_tokens, num_experts)) for _ in range(2))
    mask = rng.random(num_tokens) < 0.7
    mask[0] = True
    return before, after, mask


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hidden(array: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """The array as a tensor whose padding is NaN: a measure that looks at it is found out."""
    return torch.from_numpy(np.where(mask[:, None], array, np.nan))


@few
@given(**shapes, data=st.data())
def test_router_measures_are_their_formulas(num_tokens, num_experts, seed, data):
    before, after, mask = two_routers(num_tokens, num_experts, seed)
    k = data.draw(st.integers(1, num_experts))
    p, q = softmax(before), softmax(after)
    mask_T = torch.from_numpy(mask)
    b, a, pt, qt = (hidden(x, mask) for x in (before, after, p, q))
    rows = np.flatnonzero(mask)

    top = [(set(np.argsort(before[t])[-k:]), set(np.argsort(after[t])[-k:])) for t in rows]
    expected = {
        "overlap": np.mean([len(x & y) / k for x, y in top]),
        "shared": np.mean([np.minimum(p[t], q[t]).sum() for t in rows]),
        "entropy": np.mean([-(p[t] * np.log(p[t])).sum() / np.log(num_experts) for t in rows]),
        "kl": np.mean([(p[t] * np.log(p[t] / q[t])).sum() for t in rows]),
        "change": np.linalg.norm((after - before)[rows]) / np.linalg.norm(before[rows]),
    }
    found = {
        "overlap": measure.routing_overlap(b, a, k, mask_T=mask_T),
        "shared": measure.distribution_overlap(pt, qt, mask_T=mask_T),
        "entropy": measure.routing_entropy(pt, mask_T=mask_T),
        "kl": measure.routing_kl(b, a, mask_T=mask_T),
        "change": measure.logit_change(b, a, mask_T=mask_T),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-6), name
        assert found[name].dtype == torch.float64


def test_router_measures_at_their_ends():
    p_TE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    q_TE = p_TE.flip(0)
    assert (
        measure.distribution_overlap(p_TE, p_TE) == 1
        and measure.distribution_overlap(p_TE, q_TE) == 0
    )
    assert (
        measure.routing_overlap(p_TE, p_TE, 1) == 1 and measure.routing_overlap(p_TE, q_TE, 1) == 0
    )
    assert measure.routing_entropy(p_TE) == 0
    assert measure.routing_entropy(torch.full((2, 4), 0.25)) == 1
    assert measure.routing_entropy(torch.ones(2, 1)) == 0
    logits_TE = torch.tensor([[0.0, -torch.inf, 1.0]])  # an expert that is switched off in both
    assert measure.routing_kl(logits_TE, logits_TE) == 0
    assert measure.logit_change(p_TE, p_TE) == 0
    none_T = torch.zeros(2, dtype=torch.bool)
    assert measure.distribution_overlap(p_TE, q_TE, mask_T=none_T) == 0
    with pytest.raises(ValueError, match="between 1 and the 3 experts"):
        measure.routing_overlap(p_TE, q_TE, 4)


def test_half_precision_probabilities_are_measured_in_float32():
    p_TE = torch.randn(9, 5).softmax(-1).bfloat16()
    found = measure.routing_entropy(p_TE)
    expected = -(p_TE.double() * p_TE.double().log()).sum(-1).mean() / np.log(5)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected), rel=1e-5)


@few
@given(
    dim=st.integers(2, 10),
    width=st.integers(0, 10),
    lead=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 99),
)
def test_leak_and_off_task_share_are_the_two_legs_of_a_displacement(dim, width, lead, seed):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:, : min(width, dim)]
    d = rng.standard_normal((*lead, 4, dim))
    size = np.linalg.norm(d, axis=(-2, -1))
    leak = measure.displacement_leak(torch.from_numpy(d), torch.from_numpy(u))
    share = measure.off_task_share(torch.from_numpy(d), torch.from_numpy(u))
    assert np.allclose(leak, np.linalg.norm(d @ u, axis=(-2, -1)) / size, rtol=1e-9)
    assert np.allclose(
        share, np.linalg.norm(d - d @ u @ u.T, axis=(-2, -1)) / size, rtol=1e-6, atol=1e-9
    )
    assert np.allclose(leak**2 + share**2, 1)


def test_no_displacement_leaks_nothing():
    assert measure.displacement_leak(torch.zeros(2, 4), torch.eye(4)) == 0
    assert measure.off_task_share(torch.zeros(2, 4), torch.eye(4)) == 0


@few
@given(
    dim=st.integers(1, 8),
    rank=st.integers(1, 4),
    rows=st.integers(1, 5),
    lead=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 99),
)
def test_functional_drift_is_what_old_inputs_feel_and_splits_into_the_two_factors(
    dim, rank, rows, lead, seed
):
    rng = np.random.default_rng(seed)
    old = rng.standard_normal((*lead, 30, dim))
    c = np.swapaxes(old, -1, -2) @ old / 30
    a, new_a = (rng.standard_normal((*lead, rank, dim)) for _ in range(2))
    b, new_b = (rng.standard_normal((*lead, rows, rank)) for _ in range(2))
    w = rng.standard_normal((*lead, rows, dim))
    dw = new_b @ new_a - b @ a

    def felt(m: np.ndarray) -> np.ndarray:
        return ((old @ np.swapaxes(m, -1, -2)) ** 2).sum((-2, -1)) / 30

    t = torch.from_numpy
    total = measure.functional_expert_drift(t(dw), t(w), t(c))
    assert np.allclose(total, felt(dw) / felt(w), rtol=1e-6)
    parts = measure.factor_drift((t(a), t(b)), (t(new_a), t(new_b)), t(w), t(c))
    assert np.allclose(parts.total, total, rtol=1e-6, atol=1e-9 * float(parts.from_b.abs().max()))
    assert np.allclose(parts.from_b, felt((new_b - b) @ (a + new_a) / 2) / felt(w), rtol=1e-6)
    assert np.allclose(parts.from_a, felt((new_b + b) @ (new_a - a) / 2) / felt(w), rtol=1e-6)


def test_only_the_factor_that_moved_drifts():
    a, b, c = torch.randn(2, 5), torch.randn(4, 2), torch.eye(5)
    only_a = measure.factor_drift((a, b), (a + 1, b), b @ a, c)
    only_b = measure.factor_drift((a, b), (a, b + 1), b @ a, c)
    assert only_a.from_b == 0 and only_a.cross == 0 and only_a.total == only_a.from_a > 0
    assert only_b.from_a == 0 and only_b.cross == 0 and only_b.total == only_b.from_b > 0


def test_an_expert_that_did_nothing_and_does_nothing_has_not_drifted():
    zero, c = torch.zeros(3, 4), torch.eye(4)
    assert measure.functional_expert_drift(zero, zero, c) == 0
    assert measure.functional_expert_drift(torch.ones(3, 4), zero, c) == torch.inf


def test_occupancy_is_the_share_of_directions_that_hold_the_energy():
    s = spectrum(torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0])))
    assert measure.subspace_occupancy(s, 0.6) == 0.25
    assert measure.subspace_occupancy(s, 0.9) == 0.5
    assert measure.subspace_occupancy(s, 1.0) == 0.75


@few
@given(dim=st.integers(1, 9), factor=st.floats(0, 3), seed=st.integers(0, 99))
def test_staleness_is_the_relative_difference(dim, factor, seed):
    c = np.random.default_rng(seed).standard_normal((2, dim, dim))
    found = measure.staleness(torch.from_numpy(factor * c), torch.from_numpy(c))
    assert np.allclose(found, abs(factor - 1), atol=1e-9)
