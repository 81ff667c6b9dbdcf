"""Eigenpairs, energy ranks, angles and merging, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.drift.subspace import (
    Spectrum,
    energy_inside,
    energy_rank,
    merge_spectra,
    principal_angles,
    spectrum,
    subspace_overlap,
    trajectory,
    without,
)

few = settings(max_examples=25, deadline=None)


def covariance(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dim, rank or dim))
    return torch.from_numpy(factor @ factor.T)


def basis(dim: int, width: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(
        np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, width)))[0]
    )


def rebuild(s: Spectrum) -> torch.Tensor:
    return (s.basis_DK * s.eigenvalue_K.unsqueeze(-2)) @ s.basis_DK.mT


@few
@given(dim=st.integers(1, 20), seed=st.integers(0, 99), num_experts=st.sampled_from([None, 1, 3]))
def test_the_eigenpairs_rebuild_the_matrix(dim, seed, num_experts):
    c = covariance(dim, seed)
    c = c if num_experts is None else torch.stack([c * (e + 1) for e in range(num_experts)])
    s = spectrum(c)
    assert torch.allclose(rebuild(s), c, rtol=0, atol=1e-10 * float(c.abs().max()))
    assert (s.eigenvalue_K.diff(dim=-1) <= 0).all() and (s.eigenvalue_K >= 0).all()
    assert torch.allclose(s.trace, torch.einsum("...dd->...", c))
    identity = torch.eye(dim).double()
    assert (s.basis_DK.mT @ s.basis_DK - identity).abs().max() < 1e-12


def test_float32_comes_back_as_float32_and_is_orthonormal_to_its_rounding():
    s = spectrum(covariance(64, 0, rank=5).float(), rank=32)
    assert s.basis_DK.dtype == s.eigenvalue_K.dtype == s.trace.dtype == torch.float32
    assert s.basis_DK.shape == (64, 32)
    assert (s.basis_DK.T @ s.basis_DK - torch.eye(32)).abs().max() < 1e-6
    assert (s.eigenvalue_K >= 0).all()


def test_a_second_moment_that_is_not_finite_or_square_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        spectrum(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="square"):
        spectrum(torch.zeros(3, 4))


@few
@given(
    value=st.lists(st.integers(0, 10_000).map(lambda n: n / 1000), min_size=1, max_size=12),
    energy=st.floats(0.01, 1),
    rest=st.integers(0, 5000).map(lambda n: n / 1000),
    units=st.sampled_from(["eigenvalue", "paper"]),
)
def test_the_energy_rank_is_the_smallest_that_reaches_the_energy(value, energy, rest, units):
    value = sorted(value, reverse=True)
    power = 1 if units == "eigenvalue" else 2
    total = sum(v**power for v in value) + (rest if units == "eigenvalue" else 0)
    k = int(
        energy_rank(
            torch.tensor(value).double(),
            torch.tensor(sum(value) + rest).double(),
            energy,
            units=units,
        )
    )
    if total == 0:
        assert k == 0
        return
    held = [sum(v**power for v in value[:i]) / total for i in range(len(value) + 1)]
    assert k == len(value) or held[k] >= energy - 1e-12
    assert k >= 1 and held[k - 1] < energy + 1e-12


def test_the_papers_units_keep_fewer_directions():
    value_K = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert energy_rank(value_K, value_K.sum(), 0.9) == 3  # 4+3+2 = 9 of 10
    assert energy_rank(value_K, value_K.sum(), 0.85, units="paper") == 3  # 16+9 = 25 of 30 < 0.85
    assert energy_rank(value_K, value_K.sum(), 0.83, units="paper") == 2


def test_all_the_energy_of_a_low_rank_matrix_is_in_its_rank():
    for seed in range(5):
        s = spectrum(covariance(40, seed, rank=6).float())
        assert energy_rank(s.eigenvalue_K, s.trace, 1.0) <= 6
        assert energy_rank(s.eigenvalue_K, s.trace, 1 - 1e-5) == 6


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_an_energy_outside_its_range_is_refused(energy):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        energy_rank(torch.ones(2), torch.tensor(2.0), energy)


@few
@given(
    angles=st.lists(st.floats(1e-9, np.pi / 2), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_known_principal_angles_are_recovered(angles, extra, seed):
    k = len(angles)
    frame = basis(2 * k + extra, 2 * k + extra, seed)
    theta = torch.tensor(angles).double()
    first = frame[:, :k]
    second = first * theta.cos() + frame[:, k : 2 * k] * theta.sin()
    turn = basis(k, k, seed + 1)
    wide = torch.cat([first, frame[:, 2 * k :]], dim=-1)
    found = principal_angles(wide, second @ turn)
    assert torch.allclose(found, theta.sort().values, atol=1e-12, rtol=1e-6)
    expected = float(theta.cos().square().mean())
    assert float(subspace_overlap(wide, second @ turn)) == pytest.approx(expected, abs=1e-12)


@few
@given(
    dim=st.integers(1, 15),
    counts=st.tuples(st.floats(0.5, 1e4), st.floats(0.5, 1e4)),
    seed=st.integers(0, 99),
)
def test_merging_complete_spectra_is_the_count_weighted_mean(dim, counts, seed):
    first, second = covariance(dim, seed), covariance(dim, seed + 1)
    merged = merge_spectra(spectrum(first), counts[0], spectrum(second), counts[1])
    expected = (counts[0] * first + counts[1] * second) / sum(counts)
    assert torch.allclose(
        rebuild(merged), expected, rtol=0, atol=1e-9 * float(expected.abs().max())
    )
    assert float(merged.trace) == pytest.approx(float(expected.trace()), rel=1e-9)


def test_merging_truncated_spectra_keeps_the_trace_and_each_experts_own_count():
    c = torch.stack([covariance(10, 0), covariance(10, 1)])
    counts = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])
    merged = merge_spectra(spectrum(c, 4), counts[0], spectrum(c.flip(0), 4), counts[1], rank=4)
    assert merged.basis_DK.shape == (2, 10, 4)
    assert float(merged.trace[0]) == pytest.approx(float((c[0] + 3 * c[1]).trace() / 4), rel=1e-9)
    assert merged.trace[1] == 0 and merged.basis_DK.isfinite().all()


@few
@given(dim=st.integers(2, 12), seed=st.integers(0, 99))
def test_the_trajectory_is_the_energy_of_each_task_in_the_directions_of_each_other(dim, seed):
    matrices = [covariance(dim, seed + i, rank=2) for i in range(3)]
    spectra = [spectrum(c) for c in matrices]
    found = trajectory(spectra, directions=2)
    for s in range(3):
        u = np.linalg.svd(matrices[s].numpy())[0][:, :2]
        for t in range(3):
            c = matrices[t].numpy()
            assert float(found[s, t]) == pytest.approx(
                np.trace(u.T @ c @ u) / np.trace(c), rel=1e-6
            )
            u_DK = spectra[s].basis_DK[:, :2]
            assert float(energy_inside(u_DK, matrices[t])) == pytest.approx(
                float(found[s, t]), rel=1e-6
            )
    assert torch.allclose(found.diagonal(), torch.ones(3).double())


@few
@given(dim=st.integers(2, 20), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_taking_a_part_away_leaves_the_positive_part_of_the_difference(dim, seed, share):
    c, part = covariance(dim, seed), covariance(dim, seed + 1)
    value_D, vector_DD = np.linalg.eigh((c - share * part).numpy())
    expected = torch.from_numpy((vector_DD * value_D.clip(0)) @ vector_DD.T)
    left = without(spectrum(c), spectrum(part), share)
    assert torch.allclose(rebuild(left), expected, rtol=0, atol=1e-9 * float(c.abs().max()))
    assert torch.allclose(left.trace, torch.einsum("dd->", expected), atol=1e-9 * float(c.trace()))


def test_what_a_task_put_into_a_sum_can_be_taken_out_again():
    old, other = covariance(12, 0, rank=4), covariance(12, 1, rank=5)
    left = without(spectrum(0.4 * old + 0.6 * other), spectrum(old), 0.4)
    assert torch.allclose(rebuild(left), 0.6 * other, rtol=0, atol=1e-10)
    assert float(without(spectrum(old), spectrum(old), 1.0).trace) < 1e-10 * float(old.trace())


def test_truncated_spectra_lose_no_trace():
    c, part = spectrum(covariance(12, 0)).truncate(4), spectrum(covariance(12, 1)).truncate(4)
    assert torch.allclose(without(c, part, 0.0).trace, c.trace)
