"""Second moments of each expert's inputs in a shared basis, against the formula in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from families import FAMILIES
from mllm_cl.drift.activation import ExpertUsage
from mllm_cl.drift.expert_moments import ExpertMoments
from mllm_cl.drift.factors import low_rank_moment
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.model.expert_lora import Rows, adapted, attach_expert_lora
from mllm_cl.model.experts import experts
from mllm_cl.model.watch_experts import LayerWatch

NUM_EXPERTS, WIDTH = 5, 24


def rows(seed: int, num_rows: int = 200) -> tuple[Tensor, Tensor]:
    """Inputs with uneven directions, and whose they are; expert 4 gets none."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.05, WIDTH)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    input_ND = (torch.randn(num_rows, WIDTH, generator=generator) * scale) @ turn
    return input_ND, torch.randint(0, NUM_EXPERTS - 1, (num_rows,), generator=generator)


def moment(input_ND: Tensor, expert_N: Tensor, expert: int) -> Tensor:
    """C_e in float64."""
    mine = input_ND[expert_N == expert].double()
    return mine.mT @ mine / max(1, len(mine))


def full(c, expert: int) -> Tensor:
    """U V diag(lambda) V^T U^T of one expert, float64."""
    vectors = c.basis_DK.double() @ c.turn_KK[expert].double()
    return vectors @ torch.diag(c.eigenvalue_K[expert].double()) @ vectors.mT


def test_with_all_directions_nothing_is_lost():
    input_ND, expert_N = rows(0)
    moments = ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS)
    for part in range(4):
        moments.update(input_ND[part::4], expert_N[part::4])
    c = moments.spectrum()
    for expert in range(NUM_EXPERTS):
        expected = moment(input_ND, expert_N, expert)
        torch.testing.assert_close(full(c, expert), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c.trace[expert].double(), expected.trace(), rtol=1e-5, atol=0)
    assert torch.all(moments.captured_E > 1 - 1e-6)


def test_what_the_shared_basis_leaves_out_is_known():
    input_ND, expert_N = rows(1)
    basis_DK = torch.linalg.eigh((input_ND.mT @ input_ND).double())[1].flip(1)[:, :6].float()
    moments = ExpertMoments(basis_DK, NUM_EXPERTS)
    moments.update(input_ND, expert_N)
    for expert in range(NUM_EXPERTS - 1):
        c = moment(input_ND, expert_N, expert)
        inside = basis_DK.double().mT @ c @ basis_DK.double()
        captured = float(inside.trace() / c.trace())
        assert 0.3 < captured < 0.99
        assert float(moments.captured_E[expert]) == pytest.approx(captured, rel=1e-4)
    assert float(moments.captured_E[-1]) == 1.0


def test_masked_and_infinite_rows_do_not_count():
    input_ND, expert_N = rows(2)
    spoilt = torch.cat([input_ND, torch.full((1, WIDTH), torch.inf), input_ND[:3]])
    whose = torch.cat([expert_N, torch.tensor([0, 1, 1, 1])])
    mask = torch.ones(len(spoilt), dtype=torch.bool)
    mask[-3:] = False
    clean, other = (ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS) for _ in range(2))
    clean.update(input_ND, expert_N)
    other.update(spoilt, whose, mask_N=mask)
    for name, tensor in clean.state().items():
        torch.testing.assert_close(other.state()[name], tensor)


class Largest(TorchDispatchMode):
    """The most rows that any result with columns had while it was open."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if torch.is_tensor(result) and result.dim() == 2 and result._base is None:
            self.rows = max(self.rows, len(result))
        return result


def test_many_rows_are_counted_a_slice_at_a_time():
    num_rows = 2**15 + 7
    (input_ND, expert_N), mask_N = rows(12, num_rows), torch.arange(num_rows) % 3 > 0
    moments, expected = (ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS) for _ in range(2))
    with Largest() as largest:
        moments.update(input_ND, expert_N, mask_N=mask_N)
    assert 0 < largest.rows <= 2**14
    for part in range(9):
        chosen = slice(part, None, 9)
        expected.update(input_ND[chosen], expert_N[chosen], mask_N=mask_N[chosen])
    for name, tensor in expected.state().items():
        torch.testing.assert_close(moments.state()[name], tensor, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_use_of_experts_is_counted_without_a_matrix_of_them(weighted):
    model = FAMILIES["qwen3_moe"]()
    attach_expert_lora(model, experts(model), rank=2, alpha=4.0)
    path, lora = next(iter(adapted(model).items()))
    num_rows, num_experts, width = 2**14 + 9, lora.layout.num_experts, lora.layout.width
    input_ND, weight_N = torch.randn(num_rows, width), torch.rand(num_rows)
    input_ND[5] = torch.inf
    expert_N = torch.arange(num_rows) % (num_experts - 1)
    mask_N, token_N = torch.arange(num_rows) % 5 > 0, torch.arange(num_rows)
    layers = LayerWatch(model, rank=4)
    with Largest() as largest:
        whose = Rows(expert_N, token_N, num_rows, weight_N if weighted else None)
        layers.gather(f"{path}.{lora.layout.up}", input_ND, whose, mask_N)
    assert largest.rows <= 2**14
    used_NE = nn.functional.one_hot(expert_N, num_experts).float()
    expected = ExpertUsage(num_experts)
    weight_NE = used_NE * weight_N[:, None] if weighted else used_NE
    expected.update(weight_NE, input_ND, mask_T=mask_N, used_TE=used_NE)
    for name, tensor in expected.state().items():
        torch.testing.assert_close(layers.use[path].state()[name], tensor)


def test_two_tasks_merge_into_the_count_weighted_mean_of_both():
    (first, whose), (second, theirs) = rows(3), rows(4, 120)
    moments = []
    for input_ND, expert_N in ((first, whose), (second, theirs)):
        moments.append(ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS))
        moments[-1].update(input_ND, expert_N)
    c = moments[0].merge(moments[1], WIDTH).spectrum()
    both, all_N = torch.cat([first, second]), torch.cat([whose, theirs])
    for expert in range(NUM_EXPERTS):
        expected = moment(both, all_N, expert)
        torch.testing.assert_close(full(c, expert), expected, rtol=1e-4, atol=1e-5)


def test_a_superseded_task_is_taken_out_again():
    (first, whose), (second, theirs) = rows(5), rows(6)
    old, new = (ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS) for _ in range(2))
    old.update(first, whose)
    new.update(second, theirs)
    both = old.merge(new, WIDTH)
    share = float(new.count_E.sum() / both.count_E.sum())
    left = both.without(new, share)
    for expert in range(NUM_EXPERTS - 1):
        mine = (whose == expert).sum() + (theirs == expert).sum()
        part = share * moment(second, theirs, expert)
        whole = moment(torch.cat([first, second]), torch.cat([whose, theirs]), expert)
        value, vector = torch.linalg.eigh(whole - part)
        expected = vector @ torch.diag(value.clamp_min(0)) @ vector.mT
        assert mine > 0
        torch.testing.assert_close(full(left, expert), expected, rtol=1e-3, atol=1e-4)


def test_state_gives_the_same_moments():
    moments = ExpertMoments(torch.eye(WIDTH)[:, :7], NUM_EXPERTS)
    moments.update(*rows(7))
    again = ExpertMoments.from_state(moments.state())
    assert all(torch.equal(again.state()[k], v) for k, v in moments.state().items())
    assert all(tensor.device.type == "cpu" for tensor in again.state().values())


def turned_guard() -> tuple[DriftGuard, DriftGuard]:
    """A guard whose experts share a basis, and the same with a basis for each."""
    moments = ExpertMoments(torch.linalg.qr(torch.randn(WIDTH, 9))[0], NUM_EXPERTS)
    moments.update(*rows(8))
    shared = DriftGuard.slow(moments.spectrum(), damping=0.05)
    each_EDK = shared.basis_DK @ shared.turn_KK
    return shared, DriftGuard(each_EDK, shared.gain_K)


def test_a_shared_basis_guards_as_a_basis_for_each_expert_would():
    shared, each = turned_guard()
    delta = torch.randn(NUM_EXPERTS, 4, WIDTH)
    inside = shared.basis_DK @ shared.basis_DK.mT
    expected = each(delta @ inside) + shared.outside[:, None, None] * (delta - delta @ inside)
    torch.testing.assert_close(shared(delta), expected, rtol=1e-5, atol=1e-5)
    assert shared.gain_K.min() < 0.5 and (shared.gain_K[-1] == 1).all()
    torch.testing.assert_close(shared.leak(delta), each.leak(delta))
    again = DriftGuard.from_state(shared.state())
    assert torch.equal(again(delta), shared(delta))


def test_slowing_is_the_damped_inverse_of_each_experts_own_moment():
    input_ND, expert_N = rows(9)
    moments = ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS)
    moments.update(input_ND, expert_N)
    g, delta = DriftGuard.slow(moments.spectrum(), damping=0.1), torch.randn(NUM_EXPERTS, 3, WIDTH)
    twice = g(g(delta))
    for expert in range(NUM_EXPERTS - 1):
        c = moment(input_ND, expert_N, expert)
        m = 0.1 * c.trace() / WIDTH
        expected = m * delta[expert].double() @ torch.linalg.inv(c + m * torch.eye(WIDTH))
        torch.testing.assert_close(twice[expert].double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(g(delta)[-1], delta[-1], atol=1e-5)  # no inputs: nothing to protect


def test_what_the_basis_leaves_out_is_slowed_as_isotropic_with_the_rest_of_the_trace():
    input_ND, expert_N = rows(11)
    moments = ExpertMoments(torch.eye(WIDTH)[:, :4], NUM_EXPERTS)
    moments.update(input_ND, expert_N)
    g = DriftGuard.slow(moments.spectrum(), damping=0.1)
    for expert in range(NUM_EXPERTS - 1):
        c = moment(input_ND, expert_N, expert)
        left = c.diagonal()[4:].mean()
        m = 0.1 * c.trace() / WIDTH
        assert float(g.outside[expert]) == pytest.approx(float((m / (left + m)).sqrt()), rel=1e-3)


def test_the_moment_behind_an_experts_a_is_a_c_a_transposed():
    input_ND, expert_N = rows(10)
    moments = ExpertMoments(torch.eye(WIDTH), NUM_EXPERTS)
    moments.update(input_ND, expert_N)
    a_ERD = torch.randn(NUM_EXPERTS, 3, WIDTH)
    felt = low_rank_moment(a_ERD, moments.spectrum())
    for expert in range(NUM_EXPERTS):
        expected = a_ERD[expert].double() @ moment(input_ND, expert_N, expert)
        expected = expected @ a_ERD[expert].double().mT
        torch.testing.assert_close(felt[expert].double(), expected, rtol=1e-4, atol=1e-4)
