"""Guards, against dense float64 matrices written from their formulas, and in the weights after an
optimizer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.drift.guard import DriftGuard, guarded_gradient
from mllm_cl.drift.subspace import spectrum

few = settings(max_examples=20, deadline=None)


def covariance(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dim, rank or dim)) * np.logspace(0, -1, rank or dim)
    return torch.from_numpy(factor @ factor.T)


def matrix(g: DriftGuard) -> torch.Tensor:
    """The guard as a dense (..., D, D) matrix, from its formula and its tensors."""
    eye = torch.eye(g.dim).double()
    u = g.basis_DK.double()
    return g.outside * (eye - u @ u.mT) + u @ torch.diag_embed(g.gain_K.double()) @ u.mT


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found.double() - expected).norm() <= tolerance * max(1.0, float(expected.norm())))


def energy_basis(c: torch.Tensor, energy: float) -> np.ndarray:
    value, vector = np.linalg.eigh(c.numpy())
    value, vector = value[::-1], vector[:, ::-1]
    k = int(np.searchsorted(np.cumsum(value) / value.sum(), energy - 1e-14) + 1)
    return vector[:, :k]


def root(m: torch.Tensor) -> torch.Tensor:
    value, vector = torch.linalg.eigh((m + m.mT) / 2)
    return (vector * value.clamp_min(0).sqrt()) @ vector.mT


# --- one guard ------------------------------------------------------------------------------------


@few
@given(
    dim=st.integers(1, 20),
    rows=st.integers(1, 6),
    width=st.integers(0, 20),
    outside=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    lead=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 99),
)
def test_a_guard_is_its_formula(dim, rows, width, outside, lead, seed):
    rng = np.random.default_rng(seed)
    u = torch.from_numpy(
        np.linalg.qr(rng.standard_normal((*lead, dim, dim)))[0][..., : min(width, dim)]
    )
    gain = torch.from_numpy(rng.uniform(0, 2, (*lead, u.shape[-1])))
    d = torch.from_numpy(rng.standard_normal((*lead, rows, dim)))
    g = DriftGuard(u, gain, outside)
    assert close(g(d), d @ matrix(g), 1e-12)
    single = DriftGuard(u.float(), gain.float(), outside)
    assert single(d.float()).dtype == torch.float32
    assert close(single(d.float()), d @ matrix(g), 1e-5)
    assert single(d.bfloat16()).dtype == torch.float32


def test_a_guard_that_forbids_every_direction_gives_exactly_zero():
    d = torch.randn(3, 7)
    for g in (DriftGuard.forbid(torch.eye(7), 1.0), DriftGuard.confine(torch.zeros(7, 7))):
        assert not g(d).any() and g.occupancy == 1 and g.leak(g(d)) == 0 and g.leak(d) > 0.99


def test_a_free_guard_changes_nothing():
    d = torch.randn(3, 7)
    g = DriftGuard.free(7)
    assert torch.equal(g(d), d)
    assert g.occupancy == 0 and g.leak(d) == 0


@few
@given(dim=st.integers(1, 16), energy=st.floats(0.05, 0.999), seed=st.integers(0, 99))
def test_forbid_and_confine_project_on_the_energy_basis(dim, energy, seed):
    c = covariance(dim, seed)
    u = torch.from_numpy(energy_basis(c, energy).copy())
    eye = torch.eye(dim).double()
    forbid, confine = DriftGuard.forbid(c, energy), DriftGuard.confine(c, energy)
    assert close(matrix(forbid), eye - u @ u.T, 1e-9)
    assert close(matrix(confine), u @ u.T, 1e-9)
    assert float(forbid.occupancy) == pytest.approx(u.shape[1] / dim)
    assert float(confine.occupancy) == pytest.approx(1 - u.shape[1] / dim)
    d = torch.randn(3, dim).double()
    assert float(forbid.leak(d)) == pytest.approx(float((d @ u).norm() / d.norm()), rel=1e-9)
    assert float(confine.leak(d)) == pytest.approx(
        float((d - d @ u @ u.T).norm() / d.norm()), abs=1e-7
    )


def test_old_inputs_of_low_rank_feel_nothing():
    old_TD = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 30, dtype=torch.float64)
    g = DriftGuard.forbid(old_TD.T @ old_TD / 50, energy=1.0)
    d = torch.randn(5, 30, dtype=torch.float64)
    assert (g(d) @ old_TD.T).norm() < 1e-6 * (d @ old_TD.T).norm()


def test_experts_that_need_fewer_directions_keep_the_rest_open_or_closed():
    c = torch.stack(
        [covariance(12, 0, rank=2), covariance(12, 1, rank=9), torch.zeros(12, 12).double()]
    )
    forbid, confine = DriftGuard.forbid(c, 0.999), DriftGuard.confine(c, 0.999)
    for e in range(2):
        assert close(matrix(forbid)[e], matrix(DriftGuard.forbid(c[e], 0.999)), 1e-9)
        assert close(matrix(confine)[e], matrix(DriftGuard.confine(c[e], 0.999)), 1e-9)
    assert close(
        matrix(forbid)[2], torch.eye(12).double(), 1e-12
    )  # saw nothing: nothing to protect
    d = torch.randn(3, 4, 12).double()
    assert (forbid.leak(forbid(d)) < 1e-7).all() and (confine.leak(confine(d)) < 1e-7).all()


@few
@given(
    dim=st.integers(1, 16),
    damping=st.floats(1e-3, 1e3),
    rank=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_slow_squared_is_the_damped_inverse(dim, damping, rank, seed):
    c = covariance(dim, seed, rank=min(rank, dim))
    m = damping * c.trace() / dim
    expected = m * torch.linalg.inv(c + m * torch.eye(dim).double())
    g = DriftGuard.slow(c, damping)
    assert g.outside == 1
    assert close(matrix(g) @ matrix(g), expected, 1e-8)
    kept = DriftGuard.slow(
        spectrum(c, min(rank, dim)), damping
    )  # zero eigenvalues need not be kept
    assert close(matrix(kept), matrix(g), 1e-6)


def test_slow_is_free_where_nothing_was_seen():
    g = DriftGuard.slow(torch.stack([covariance(5, 0), torch.zeros(5, 5).double()]))
    assert close(matrix(g)[1], torch.eye(5).double(), 1e-12)


def drift(d: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...od,...de,...oe->...", d, c, d) / torch.einsum(
        "...od,...de,...oe->...", w, c, w
    )


@few
@given(
    dim=st.integers(2, 12),
    budget=st.floats(1e-6, 10),
    num_experts=st.sampled_from([None, 3]),
    seed=st.integers(0, 99),
)
def test_a_budget_is_met_with_the_least_slowing(dim, budget, num_experts, seed):
    lead = () if num_experts is None else (num_experts,)
    rng = np.random.default_rng(seed)
    w, d = (torch.from_numpy(rng.standard_normal((*lead, 4, dim))) for _ in range(2))
    c = covariance(dim, seed)
    c = c if num_experts is None else torch.stack([covariance(dim, seed + e) for e in range(3)])
    g = DriftGuard.slow(c, budget=budget, weight=w, delta=d)
    found, raw = drift(g(d), w, c), drift(d, w, c)
    assert (found <= budget * (1 + 1e-9)).all()
    # The least slowing: either nothing had to be slowed, or the budget is used up.
    used = torch.where(raw <= budget, raw, torch.full_like(raw, budget))
    assert torch.allclose(found, used, rtol=1e-6)
    s = spectrum(c)
    gain2 = g.gain_K**2
    m = (gain2 * s.eigenvalue_K / (1 - gain2).clamp_min(1e-300))[
        ..., :1
    ]  # one m explains all gains
    assert torch.allclose(gain2, m / (s.eigenvalue_K + m), rtol=1e-3, atol=1e-9)


def test_a_budget_needs_a_weight_and_a_delta_and_is_positive():
    c, w = covariance(4, 0), torch.ones(2, 4)
    with pytest.raises(ValueError, match="pass weight= and delta="):
        DriftGuard.slow(c, budget=0.1)
    with pytest.raises(ValueError, match="so positive"):
        DriftGuard.slow(c, budget=0.0, weight=w, delta=w)
    with pytest.raises(ValueError, match="damping must be positive"):
        DriftGuard.slow(c, damping=0.0)


@few
@given(
    dim=st.integers(1, 14),
    window=st.integers(1, 5),
    energy=st.floats(0.3, 1.0),
    seed=st.integers(0, 99),
    reading=st.sampled_from(["released", "ratio"]),
)
def test_spectral_squared_is_the_papers_reweighting(dim, window, energy, seed, reading):
    c = covariance(dim, seed)
    u = energy_basis(c, energy)
    value = np.linalg.eigvalsh(c.numpy())[::-1][: u.shape[1]]
    s = np.sqrt(value) if reading == "released" else value
    local = np.array([s[max(0, i - window + 1) : i + 1].mean() for i in range(len(s))])
    inverse = 1 / (local + 1e-6)
    factor = inverse / inverse.max() if reading == "released" else s / local
    expected = np.eye(dim) + u @ np.diag(np.clip(factor, 0.8, 1.2) - 1) @ u.T
    found = matrix(DriftGuard.spectral(c, window, energy=energy, reading=reading))
    assert close(found @ found, torch.from_numpy(expected), 1e-6)


def test_the_released_spectral_weights_lie_on_the_floor_but_for_the_weakest_direction():
    g = DriftGuard.spectral(torch.diag(torch.logspace(2, -4, 40).double()), energy=0.9999)
    factor_K = g.gain_K**2
    assert factor_K[-1] == 1 and (factor_K >= 0.8 - 1e-9).all() and (factor_K <= 1 + 1e-9).all()
    assert (factor_K < 0.8 + 1e-9).double().mean() > 0.8


def test_guards_refuse_what_does_not_fit():
    g = DriftGuard.free(4)
    with pytest.raises(ValueError, match="input width 4"):
        g(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="one gain for each"):
        DriftGuard(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="different input widths"):
        DriftGuard.compose(g, DriftGuard.free(5))
    with pytest.raises(ValueError, match="at least one guard"):
        DriftGuard.compose()
    with pytest.raises(ValueError, match="reading is"):
        DriftGuard.spectral(torch.eye(3), reading="other")


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_guard_comes_back_from_its_state(lead):
    c = covariance(6, 0).expand(*lead, 6, 6)
    g = DriftGuard.confine(c, 0.8)
    again = DriftGuard.from_state(g.state()).to("cpu")
    d = torch.randn(*lead, 3, 6)
    assert torch.equal(again(d), g(d)) and again.outside == 0


def test_a_guard_under_autocast_is_float32():
    g = DriftGuard.forbid(covariance(8, 0).float(), 0.5)
    d = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(g(d), g(d).float()) and g.leak(g(d)) < 1e-6


def test_a_guard_does_not_leak_when_float32_products_are_rounded():
    g = DriftGuard.forbid(covariance(64, 0).float(), 0.5)
    d = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        # Float64 inside leaves the rounding of the result, 1.5e-8; float32 inside 7e-8, TF32 5e-4.
        assert g.leak(g(d)) < 3e-8
        assert g(d).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(previous)


def test_a_guard_compiles_into_one_graph():
    g = DriftGuard.slow(covariance(8, 0).float())
    d = torch.randn(3, 8)
    compiled = torch.compile(g, backend="eager", fullgraph=True)
    assert close(compiled(d), g(d).double(), 1e-6)


# --- several guards -------------------------------------------------------------------------------


@few
@given(dim=st.integers(2, 14), seed=st.integers(0, 99), lead=st.sampled_from([(), (2,)]))
def test_guards_that_commute_compose_to_their_product(dim, seed, lead):
    rng = np.random.default_rng(seed)
    frame = torch.from_numpy(np.linalg.qr(rng.standard_normal((*lead, dim, dim)))[0])
    guards, expected = [], torch.eye(dim).double()
    for outside in (1.0, 0.7, 0.0, 1.3):
        chosen = rng.permutation(dim)[: rng.integers(0, dim + 1)]
        gain = torch.from_numpy(rng.uniform(0, 1.5, (*lead, len(chosen))))
        gain[..., ::3] = 0
        guards.append(DriftGuard(frame[..., chosen], gain, outside))
        expected = expected @ matrix(guards[-1])
    for count in (2, 3, 4):
        product = torch.eye(dim).double()
        for guard in guards[:count]:
            product = product @ matrix(guard)
        assert close(matrix(DriftGuard.compose(*guards[:count])), product, 1e-6)


@few
@given(dim=st.integers(2, 14), seed=st.integers(0, 99))
def test_composing_is_symmetric_and_what_any_guard_forbids_stays_forbidden(dim, seed):
    old = [DriftGuard.forbid(covariance(dim, seed + i), 0.4) for i in range(2)]
    task = DriftGuard.confine(covariance(dim, seed + 2), 0.9)
    slow = DriftGuard.slow(covariance(dim, seed + 3))
    d = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, dim)))
    for guards in (
        [*old],
        [old[0], task],
        [task, slow, *old],
        [DriftGuard.compose(task, old[0]), slow],
    ):
        g = DriftGuard.compose(*guards)
        m = matrix(g)
        assert torch.allclose(m, m.mT, atol=1e-12)
        for closed in (guard for guard in guards if guard.outside == 1 and guard is not slow):
            u = closed.basis_DK
            assert (m @ u).norm() < 1e-10
            assert (g(d) @ u).norm() <= 1e-10 * d.norm()
        assert g.leak(g(d)) < 1e-6
        assert torch.linalg.eigvalsh(m).min() > -1e-10
        assert close(matrix(DriftGuard.compose(*guards[::-1])), m, 1e-6) or len(guards) == 4


@few
@given(dim=st.integers(2, 14), seed=st.integers(0, 99))
def test_two_guards_that_do_not_commute_compose_to_root_b_a_root_b(dim, seed):
    a, b = (
        DriftGuard.slow(covariance(dim, seed), 0.3),
        DriftGuard.slow(covariance(dim, seed + 1), 0.2),
    )
    r = root(matrix(b))
    assert close(matrix(DriftGuard.compose(a, b)), r @ matrix(a) @ r, 1e-7)
    confine = DriftGuard.confine(covariance(dim, seed + 2), 0.8)
    p = matrix(confine)
    for pair in ((a, confine), (confine, a)):
        assert close(matrix(DriftGuard.compose(*pair)), p @ matrix(a) @ p, 1e-7)


def test_shared_and_batched_guards_compose_by_broadcasting():
    shared = DriftGuard.forbid(covariance(10, 0), 0.5)
    batched = DriftGuard.slow(torch.stack([covariance(10, 1), covariance(10, 2)]))
    g = DriftGuard.compose(shared, batched)
    for e in range(2):
        one = DriftGuard(batched.basis_DK[e], batched.gain_K[e])
        assert close(matrix(g)[e], matrix(DriftGuard.compose(shared, one)), 1e-7)


def test_float32_guards_of_the_same_history_do_not_use_up_directions_twice():
    c = covariance(30, 0)
    noisy = [c.float(), (c + 1e-7 * covariance(30, 1)).float()]
    guards = [DriftGuard.forbid(n, 0.8) for n in noisy]
    g = DriftGuard.compose(*guards)
    assert int((g.gain_K == 0).sum()) == guards[0].gain_K.shape[-1]
    assert g.basis_DK.dtype == torch.float32
    d = torch.randn(5, 30)
    assert max(guard.leak(g(d)) for guard in guards) < 1e-5


def test_histories_that_are_almost_parallel_are_both_forbidden():
    frame = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0].float()
    first, other = frame[:, :3], frame[:, 3:6]
    for angle in (1e-1, 1e-3, 1e-5):
        second = first * torch.tensor(angle).cos() + other * torch.tensor(angle).sin()
        guards = [DriftGuard(u, torch.zeros(3)) for u in (first, second)]
        d = torch.randn(5, 20)
        moved = DriftGuard.compose(*guards)(d)
        assert max(guard.leak(moved) for guard in guards) < 1e-5


def test_what_is_forbidden_stays_forbidden_in_a_composition_of_compositions():
    old = DriftGuard.forbid(covariance(12, 0), 0.4)
    first, second = (DriftGuard.confine(covariance(12, seed), 0.8) for seed in (1, 2))
    g = DriftGuard.compose(DriftGuard.compose(first, old), second)
    assert old.leak(g(torch.randn(4, 12).double())) < 1e-9


def test_a_compact_guard_is_the_same_map_with_fewer_columns():
    shared = DriftGuard.forbid(covariance(12, 0), 0.5)
    for other in (
        DriftGuard.confine(covariance(12, 1), 0.9),
        DriftGuard.confine(torch.stack([covariance(12, 1), covariance(12, 2)]), 0.7),
    ):
        g = DriftGuard.compose(shared, other)
        assert close(matrix(g.compact()), matrix(g), 1e-9)
        assert g.compact().gain_K.shape[-1] <= g.gain_K.shape[-1] - shared.gain_K.shape[-1]
        assert g.compact().occupancy.tolist() == g.occupancy.tolist()


def test_composing_with_a_free_guard_or_alone_changes_nothing():
    g = DriftGuard.forbid(covariance(9, 0), 0.6)
    assert DriftGuard.compose(g) is g
    assert close(matrix(DriftGuard.compose(DriftGuard.free(9), g)), matrix(g), 1e-7)


# --- gradients and optimizers ---------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_derivative_of_a_guard_is_right(lead):
    g = DriftGuard.slow(covariance(5, 0).expand(*lead, 5, 5))
    d = torch.randn(*lead, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(g, (d,)) and torch.autograd.gradgradcheck(g, (d,))


def test_a_guarded_gradient_leaves_the_weight_and_squares_the_guard():
    # A free guard has the true derivative; any other transforms it on purpose.
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    free = DriftGuard.free(5)
    assert torch.autograd.gradcheck(lambda weight: guarded_gradient(weight, free).square(), (w,))
    g = DriftGuard.compose(
        DriftGuard.slow(covariance(5, 0)), DriftGuard.confine(covariance(5, 1), 0.9)
    )
    out = guarded_gradient(w, g)
    assert torch.equal(out, w)
    upstream = torch.randn(3, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, w, upstream)
    assert close(gradient, upstream @ matrix(g) @ matrix(g), 1e-9)


@few
@given(dim=st.integers(2, 10), damping=st.floats(0.01, 10), seed=st.integers(0, 99))
def test_under_sgd_the_effective_factor_is_the_gain_squared_in_both_forms(dim, damping, seed):
    rng = np.random.default_rng(seed)
    x, y, start = (torch.from_numpy(rng.standard_normal(s)) for s in ((20, dim), (20, 3), (3, dim)))
    g = DriftGuard.slow(covariance(dim, seed), damping)
    delta = torch.zeros(3, dim, dtype=torch.float64, requires_grad=True)
    weight = start.clone().requires_grad_()
    coordinates, gradients = torch.optim.SGD([delta], 0.05), torch.optim.SGD([weight], 0.05)
    reference = start.clone()
    for _ in range(5):
        for optimizer, moved in (
            (coordinates, lambda: start + g(delta)),
            (gradients, lambda: guarded_gradient(weight, g)),
        ):
            optimizer.zero_grad()
            ((x @ moved().T - y) ** 2).mean().backward()
            optimizer.step()
        gradient = 2 * (x @ reference.T - y).T @ x / y.numel()
        reference = reference - 0.05 * gradient @ matrix(g) @ matrix(g)
    assert close(start + g(delta).detach(), reference, 1e-9)
    assert close(weight.detach(), reference, 1e-9)


def test_under_adam_the_effective_factor_is_about_the_gain():
    # Weights that already lie in the guard's own coordinates: there Adam's first step is exactly lr
    # * sign.
    gain_K = torch.tensor([0.1, 0.5, 1.0])
    g = DriftGuard(torch.eye(3), gain_K)
    delta = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.01)
    (g(delta) * torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert torch.allclose(g(delta).abs(), 0.01 * gain_K.expand(2, 3), rtol=1e-3)


def test_adamw_leaves_what_is_forbidden_in_coordinates_and_moves_it_with_projected_gradients():
    torch.manual_seed(0)
    dim, scale = 48, torch.logspace(0, -1.5, 48)
    old_TD = (torch.randn(400, dim) * scale) @ torch.linalg.qr(torch.randn(dim, dim))[0]
    new_TD = torch.randn(256, dim) * scale + 0.5 * old_TD[:256]
    target = new_TD @ torch.randn(dim, 8)
    tracker = CovarianceTracker(dim)
    tracker.update(old_TD)
    g = DriftGuard.forbid(tracker.spectrum(), 0.9)
    start = torch.randn(8, dim) / dim**0.5

    def train(parameter: torch.nn.Parameter, effective) -> torch.Tensor:
        optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
        losses = []
        for step in range(200):
            rows = torch.arange(step * 32, step * 32 + 32) % 256
            loss = ((new_TD[rows] @ effective(parameter).T - target[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]
        return effective(parameter).detach() - start

    def in_coordinates(delta: torch.Tensor) -> torch.Tensor:
        return start + g(delta)

    delta = torch.nn.Parameter(torch.zeros(8, dim))
    train(delta, in_coordinates)
    assert g.leak(g(delta.detach())) < 1e-5
    weight = torch.nn.Parameter(start.clone())
    assert g.leak(train(weight, lambda w: guarded_gradient(w, g))) > 0.1
