"""Which experts stay active, and why the released rule leaves one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mllm_cl.drift.activation import (
    ExpertUsage,
    ReleasedActivation,
    activation_score,
    active_experts,
)

few = settings(max_examples=25, deadline=None)


def routed(num_tokens: int, dim: int, num_experts: int, seed: int, preferred: int | None = None):
    """Softmax routing weights (T, E) and inputs (T, D) of a task whose inputs share a mean."""
    generator = torch.Generator().manual_seed(seed)
    input_TD = torch.randn(num_tokens, dim, generator=generator)
    input_TD = input_TD + torch.randn(dim, generator=generator)
    router_ED = torch.randn(num_experts, dim, generator=generator) / dim**0.5
    logits_TE = input_TD @ router_ED.T
    if preferred is not None:
        logits_TE[:, preferred] += 2.0
    return logits_TE.softmax(-1), input_TD


@few
@given(
    num_tokens=st.integers(2, 30),
    num_experts=st.integers(1, 6),
    pieces=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_utilisation_and_importance_are_means_over_tokens(num_tokens, num_experts, pieces, seed):
    weight_TE, input_TD = routed(num_tokens, 5, num_experts, seed)
    mask_T = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    usage = ExpertUsage(num_experts)
    for w, x, m in zip(
        *(t.tensor_split(pieces) for t in (weight_TE, input_TD, mask_T)), strict=True
    ):
        other = ExpertUsage(num_experts)
        other.update(w, torch.where(m[:, None], x, torch.nan), mask_T=m)
        usage.merge(ExpertUsage.from_state(other.state()))
    w, x = weight_TE[mask_T].double().numpy(), input_TD[mask_T].double().numpy()
    count = max(1, len(w))
    assert usage.count == len(w)
    assert np.allclose(usage.utilisation_E, w.sum(0) / count, rtol=1e-6)
    assert np.allclose(usage.importance_E, (w * (x**2).sum(1)[:, None]).sum(0) / count, rtol=1e-5)


def test_two_ranks_reduced_decide_alike():
    ranks = [ExpertUsage(4) for _ in range(2)]
    whole = ExpertUsage(4)
    for seed, usage in enumerate(ranks):
        usage.update(*routed(20, 5, 4, seed))
        whole.update(*routed(20, 5, 4, seed))
    sums = [ranks[0].state()[name] + ranks[1].state()[name] for name in ranks[0].state()]
    for usage in ranks:
        queue = list(sums)
        usage.reduce(lambda tensor, queue=queue: queue.pop(0).to(tensor.device))
        assert torch.allclose(usage.utilisation_E, whole.utilisation_E)
        assert torch.allclose(usage.importance_E, whole.importance_E)


def test_an_activation_checkpoint_counts_once():
    usage, layer = ExpertUsage(3), torch.nn.Linear(5, 3)

    def forward(input_TD: torch.Tensor) -> torch.Tensor:
        weight_TE = layer(input_TD).softmax(-1)
        usage.update(weight_TE, input_TD)
        return weight_TE

    checkpoint(forward, torch.randn(7, 5), use_reentrant=False).square().sum().backward()
    assert usage.count == 7


@few
@given(
    used=st.lists(st.floats(0, 1), min_size=2, max_size=8),
    keep=st.integers(1, 4),
    threshold=st.floats(-1, 2),
    seed=st.integers(0, 99),
)
def test_the_decision_is_the_threshold_on_the_score_and_never_fewer_than_keep(
    used, keep, threshold, seed
):
    used_E = torch.tensor(used)
    past_E = torch.rand(len(used), generator=torch.Generator().manual_seed(seed)) + 0.1
    active_E = active_experts(used_E, past_E, threshold=threshold, keep=keep)
    score = activation_score(used_E, past_E).numpy()
    assert active_E.sum() >= min(keep, len(used))
    assert active_E[torch.from_numpy(score >= threshold)].all()
    kept = np.sort(score)[::-1][: min(keep, len(used))]
    assert all(s >= threshold or s >= kept[-1] for s in score[active_E.numpy()])


def test_the_score_is_the_difference_of_the_normalised_vectors():
    score_E = activation_score(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([10.0, 10.0, 30.0]))
    assert torch.allclose(score_E, torch.tensor([0.0, 1.0, -0.5]))
    equal_E = torch.full((3,), 0.3)
    assert not activation_score(equal_E, equal_E).any()


def test_every_expert_is_active_at_the_first_task():
    used_E = torch.rand(5)
    assert active_experts(used_E, None).all()
    assert active_experts(used_E, torch.zeros(5)).all()


def test_keeping_no_expert_is_refused():
    with pytest.raises(ValueError, match="keep=0"):
        active_experts(torch.rand(3), torch.rand(3), keep=0)


def test_the_released_rule_collapses_to_one_expert_at_the_first_step_and_ours_does_not():
    num_experts = 8
    for seed in range(20):
        weight_TE, input_TD = routed(64, 32, num_experts, seed)
        released = ReleasedActivation(num_experts)
        assert released.step(weight_TE, input_TD).sum() == 1 and released.final
        assert active_experts(weight_TE.mean(0), None).all()


def test_over_later_tasks_the_released_rule_keeps_about_one_expert_and_ours_at_least_two():
    num_experts, released_counts, our_counts = 8, [], []
    for seed in range(10):
        released_E, past = None, ExpertUsage(num_experts)
        for task in range(3):
            released = ReleasedActivation(num_experts, task, released_E)
            present = ExpertUsage(num_experts)
            for step in range(30):
                batch = routed(64, 32, num_experts, 1000 * seed + task, preferred=task)
                rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:32]
                weight_TE, input_TD = batch[0][rows], batch[1][rows]
                released.step(weight_TE, input_TD)
                present.update(weight_TE, input_TD)
            released_counts.append(int(released.active_E.sum()))
            past_E = past.importance_E if task else None
            our_counts.append(int(active_experts(present.utilisation_E, past_E).sum()))
            released_E = released.importance_E
            past.merge(present)
    assert np.mean(released_counts) < 2 and min(released_counts) == 1
    assert min(our_counts) >= 2


def test_with_one_expert_left_the_router_gets_no_gradient_and_with_two_it_does():
    router_ED = torch.randn(4, 6, requires_grad=True)
    input_TD, value_TE = torch.randn(10, 6), torch.randn(10, 4)
    for active_E, learns in (([1, 0, 0, 0], False), ([1, 0, 1, 0], True)):
        logits_TE = input_TD @ router_ED.T
        masked_TE = logits_TE.masked_fill(~torch.tensor(active_E, dtype=torch.bool), -torch.inf)
        loss = (masked_TE.softmax(-1) * value_TE).sum()
        (gradient,) = torch.autograd.grad(loss, router_ED)
        assert bool(gradient.any()) is learns
