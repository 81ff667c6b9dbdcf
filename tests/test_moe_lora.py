"""The mixture of LoRA experts against a float64 loop over tokens and experts, and its promises."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mllm_cl.model.moe_lora import MoELoRA, attach, attach_moe_lora, detach


def adapter(
    in_features=6, out_features=5, *, num_experts=4, rank=2, top_k=None, dtype=torch.float64, seed=0
):
    """An adapter whose B is away from zero and whose router has opinions."""
    generator = torch.Generator().manual_seed(seed)
    moe = MoELoRA(
        in_features,
        out_features,
        num_experts=num_experts,
        rank=rank,
        alpha=2.0 * rank,
        top_k=top_k,
        dtype=dtype,
        generator=generator,
    )
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return moe


def inputs(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def reference(moe, input_TD, *, routed=None):
    """y_t = scale * sum_i w_i(x_t) B_i A_i x_t in float64, one token and one expert at a time."""
    routed = range(moe.num_experts) if routed is None else routed
    lora_A, lora_B, router = moe.lora_A.double(), moe.lora_B.double(), moe.router.weight.double()
    outputs = []
    for x in input_TD.reshape(-1, moe.in_features).double():
        exponentials = {i: torch.exp(router[i] @ x) for i in routed}
        if moe.top_k is not None:
            ranked = sorted(exponentials, key=lambda i: -exponentials[i].item())
            exponentials = {i: exponentials[i] for i in ranked[: moe.top_k]}
        total = sum(exponentials.values())
        y = torch.zeros(moe.out_features, dtype=torch.float64)
        for i, value in exponentials.items():
            y = y + moe.scale * value / total * (lora_B[i] @ (lora_A[i] @ x))
        outputs.append(y)
    return torch.stack(outputs).view(*input_TD.shape[:-1], moe.out_features)


def gradients(moe, output, input_TD):
    """Those of a scalar that weighs each output differently: parameters first, the input last."""
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return torch.autograd.grad((output.double() * weights).sum(), [*moe.parameters(), input_TD])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    in_features=st.integers(1, 7),
    out_features=st.integers(1, 7),
    num_experts=st.integers(1, 5),
    rank=st.integers(1, 3),
    data=st.data(),
)
def test_forward_and_gradients_equal_the_loop(
    shape, in_features, out_features, num_experts, rank, data
):
    top_k = data.draw(st.none() | st.integers(1, num_experts))
    moe = adapter(in_features, out_features, num_experts=num_experts, rank=rank, top_k=top_k)
    x = inputs(*shape, in_features)
    output, expected = moe(x), reference(moe, x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(moe, output, x), gradients(moe, expected, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_sum_runs_over_products_of_an_experts_own_factors():
    moe = adapter()
    x = inputs(7, 6)
    weight_TE = moe.route(x)
    A_x = torch.einsum("te,erd,td->tr", weight_TE, moe.lora_A, x)
    crossed = moe.scale * torch.einsum("te,eor,tr->to", weight_TE, moe.lora_B, A_x)
    assert (moe(x) - crossed).norm() > 0.1 * crossed.norm()


def test_a_fresh_adapter_leaves_the_output_bitwise_unchanged():
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(8, 6, dtype=dtype)
        x = torch.randn(5, 8, dtype=dtype)
        before = linear(x)
        attach(linear, MoELoRA(8, 6, num_experts=4, rank=2, alpha=4.0))
        assert linear(x).dtype == dtype
        assert torch.equal(linear(x), before)


def test_attaching_adds_keys_and_renames_none():
    linear = nn.Linear(6, 5)
    before = dict(linear.state_dict())
    attach(linear, adapter())
    added = {"moe_lora.lora_A", "moe_lora.lora_B", "moe_lora.router.weight"}
    assert type(linear) is nn.Linear
    assert set(linear.state_dict()) == set(before) | added
    assert all(torch.equal(linear.state_dict()[key], before[key]) for key in before)


def test_a_copy_computes_with_its_own_parameters():
    linear = nn.Linear(6, 5, dtype=torch.float64)
    attach(linear, adapter())
    x = inputs(3, 6)
    original = linear(x)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(x), original)
    with torch.no_grad():
        twin.moe_lora.lora_B.zero_()
        twin.weight.zero_()
    assert torch.equal(twin(x), twin.bias.expand(3, 5))
    assert torch.equal(linear(x), original)


def test_a_forward_replaced_earlier_is_still_called_and_comes_back():
    linear = nn.Linear(6, 5, dtype=torch.float64)
    plain = linear.forward
    linear.forward = lambda x: 3 * plain(x)
    replaced = linear.forward
    moe = adapter()
    attach(linear, moe)
    x = inputs(3, 6)
    torch.testing.assert_close(linear(x), 3 * plain(x) + moe(x))
    assert detach(linear) is moe
    assert linear.forward is replaced


def test_the_layers_own_dtype_is_that_of_the_sum():
    linear = nn.Linear(6, 5)
    plain = linear.forward
    linear.forward = lambda x: plain(x).to(torch.bfloat16)
    attach(linear, adapter(dtype=torch.float32))
    assert linear(inputs(3, 6, dtype=torch.float32)).dtype == torch.bfloat16


def test_detaching_leaves_a_plain_linear():
    linear = nn.Linear(6, 5)
    before = set(vars(linear)), list(linear.state_dict())
    attach(linear, adapter())
    detach(linear)
    assert (set(vars(linear)), list(linear.state_dict())) == before


def test_detaching_below_another_replacement_is_refused():
    linear = nn.Linear(6, 5)
    attach(linear, adapter())
    linear.forward = lambda x: x
    with pytest.raises(ValueError, match="take that off first"):
        detach(linear)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: adapter(top_k=5), "top_k=5"),
        (lambda: adapter(num_experts=0), "num_experts=0"),
        (lambda: attach(nn.Linear(4, 5), adapter()), "6 -> 5"),
        (lambda: detach(nn.Linear(6, 5)), "no MoELoRA"),
        (lambda: setattr(adapter(), "active", torch.ones(3, dtype=torch.bool)), "4 experts"),
        (lambda: setattr(adapter(), "active", torch.ones(4)), "bool mask"),
        (lambda: setattr(adapter(), "active", torch.zeros(4, dtype=torch.bool)), "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_second_adapter_on_one_layer_is_refused():
    linear = nn.Linear(6, 5)
    attach(linear, adapter())
    with pytest.raises(ValueError, match="already has"):
        attach(linear, adapter())


def two_layers():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def draws(names, seed=0):
    model = two_layers()
    linears = {name: model.get_submodule(name) for name in names}
    return attach_moe_lora(model, linears, num_experts=4, rank=2, alpha=4.0, seed=seed)


def test_each_adapter_is_drawn_from_the_seed_and_its_name_alone():
    torch.manual_seed(1)
    both, alone = draws(["0", "1"]), draws(["1"])
    for one, other in zip(both["1"].parameters(), alone["1"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(both["0"].lora_A, both["1"].lora_A)
    assert not torch.equal(draws(["1"], seed=1)["1"].lora_A, alone["1"].lora_A)
    # The numbers of the first release: a change of them changes every experiment.
    expected = torch.tensor([-0.00195450, -0.00566954, -0.01313919])
    torch.testing.assert_close(alone["1"].lora_A[0, 0, :3].detach(), expected)


def test_drawing_leaves_the_global_generator_alone():
    model = two_layers()
    before = torch.get_rng_state()
    attach_moe_lora(model, {"0": model[0]}, num_experts=4, rank=2, alpha=4.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_draw_has_the_papers_scale():
    moe = MoELoRA(64, 8, num_experts=8, rank=8, alpha=16.0, generator=torch.Generator())
    assert moe.scale == 2.0
    # 4096 draws: the standard error of their deviation is 1.1 %.
    assert moe.lora_A.std().item() == pytest.approx(0.01, rel=0.05)
    assert moe.router.weight.abs().max() <= 1 / 8
    assert not moe.lora_B.any()


def test_a_name_that_is_not_the_layers_own_is_refused():
    model = two_layers()
    with pytest.raises(ValueError, match="qualified names"):
        attach_moe_lora(model, {"first": model[0]}, num_experts=4, rank=2, alpha=4.0)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_tokens_answer_depends_on_no_other_token(top_k):
    moe = adapter(top_k=top_k)
    x = inputs(4, 5, 6)
    output = moe(x)
    order = torch.randperm(4)
    torch.testing.assert_close(moe(x[order]), output[order], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moe(x[2, 3]), output[2, 3], rtol=1e-12, atol=1e-13)


def test_top_k_keeps_the_largest_weights_in_training_and_evaluation():
    moe = adapter(top_k=2)
    x = inputs(9, 6)
    weight_TE = moe.train().route(x)
    assert torch.equal(moe.eval().route(x), weight_TE)
    assert torch.equal((weight_TE > 0).sum(-1), torch.full((9,), 2))
    torch.testing.assert_close(weight_TE.sum(-1), torch.ones(9, dtype=torch.float64))
    moe.top_k = None
    assert torch.equal(
        moe.route(x).topk(2).indices.sort().values, weight_TE.nonzero()[:, 1].view(9, 2)
    )


ACTIVE = torch.tensor([False, True, False, True])


def test_resting_experts_answer_but_get_no_gradient():
    moe, free = adapter(), adapter()
    moe.active = ACTIVE
    x = inputs(2, 5, 6)
    output, expected = moe(x), free(x)
    assert torch.equal(output, expected)
    ours, theirs = gradients(moe, output, x), gradients(free, expected, x)
    for factor in (0, 1):
        assert not ours[factor][~ACTIVE].any()
        torch.testing.assert_close(ours[factor][ACTIVE], theirs[factor][ACTIVE])
    torch.testing.assert_close(ours[2], theirs[2])  # the router learns about all of them
    torch.testing.assert_close(ours[3], theirs[3])  # so does what comes before


def test_resting_experts_stay_where_they_are_under_a_fresh_adamw():
    moe = adapter()
    moe.active = ACTIVE
    before = copy.deepcopy(moe)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.0)
    for seed in range(5):
        moe(inputs(7, 6, seed=seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("lora_A", "lora_B"):
        now, then = moe.get_parameter(name), before.get_parameter(name)
        assert torch.equal(now[~ACTIVE], then[~ACTIVE])
        assert (now[ACTIVE] != then[ACTIVE]).all()


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_masked_experts_leave_the_routing_of_training_only(top_k):
    moe = adapter(top_k=top_k)
    moe.active, moe.masks_routing = ACTIVE, True
    x = inputs(5, 6)
    output, expected = moe(x), reference(moe, x, routed=[1, 3])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(moe, output, x), gradients(moe, expected, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(moe.eval()(x), reference(moe, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masks_routing", [False, True])
def test_no_parameter_leaves_the_graph(masks_routing):
    moe = adapter(top_k=1)
    moe.active, moe.masks_routing = ACTIVE, masks_routing
    moe(inputs(0, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_all_experts_active_is_the_same_as_no_mask():
    moe = adapter()
    moe.active = torch.ones(4, dtype=torch.bool)
    assert moe.active is None


def test_a_frozen_layer_needs_no_gradient_of_its_input():
    moe = adapter()
    moe.active = ACTIVE
    x = inputs(5, 6)
    expected = gradients(moe, moe(x), x)
    moe(x.detach()).mul(torch.linspace(-1, 1, 25).view(5, 5)).sum().backward()
    for parameter, gradient in zip(moe.parameters(), expected, strict=False):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("active", [None, ACTIVE])
def test_bf16_inputs_meet_fp32_parameters(active):
    moe = adapter(64, 32, dtype=torch.float32)
    moe.active = active
    x = inputs(40, 64, dtype=torch.bfloat16)
    output = moe(x)
    assert output.dtype == torch.bfloat16
    assert moe.route(x).dtype == torch.float32
    free = adapter(64, 32, dtype=torch.float32)
    expected = reference(free, x)
    # bf16 keeps 8 bits: 2^-9 per rounding, a few of them in a row.
    assert (output - expected).norm() < 0.01 * expected.norm()
    ours, theirs = gradients(moe, output, x), gradients(free, expected, x)
    keep = slice(None) if active is None else active
    for index, rows in enumerate((keep, keep, slice(None), slice(None))):
        difference = ours[index][rows].double() - theirs[index][rows].double()
        assert difference.norm() < 0.02 * theirs[index][rows].double().norm()
    assert [gradient.dtype for gradient in ours[:3]] == [torch.float32] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_rounded_to_bf16(dtype):
    moe = adapter(300, 8, dtype=dtype)
    # More tokens than one slice of the upcast holds.
    x = inputs(2, 4000, 300, dtype=torch.bfloat16)
    expected = x.double() @ moe.router.weight.double().T
    error = (moe.router(x) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("active", [None, ACTIVE])
def test_autocast_gives_what_a_cast_input_gives(active):
    moe = adapter(dtype=torch.float32)
    moe.active = active
    x = inputs(5, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe(x)
        ours = gradients(moe, output, x)
    cast = x.to(torch.bfloat16)
    expected = moe(cast)
    assert torch.equal(output, expected)
    for one, other in zip(ours, gradients(moe, expected, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant):
    linear = nn.Linear(6, 5, dtype=torch.float64)
    attach(linear, adapter())
    x = inputs(5, 6)
    linear(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in linear.parameters()]
    linear.zero_grad()
    checkpoint(linear, x, use_reentrant=use_reentrant).square().sum().backward()
    for parameter, gradient in zip(linear.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("active", [None, ACTIVE])
def test_an_effective_factor_put_in_place_of_a_parameter_is_used(active):
    moe = adapter()
    moe.active = active
    x = inputs(5, 6)
    for name in ("lora_A", "lora_B"):
        weight = moe.get_parameter(name)
        delta = torch.zeros_like(weight, requires_grad=True)
        moe._parameters[name] = weight.detach() + 0.5 * delta
        moe(x).square().sum().backward()
        moe._parameters[name] = weight
        (expected,) = torch.autograd.grad(moe(x).square().sum(), weight)
        torch.testing.assert_close(delta.grad, 0.5 * expected)
        assert delta.grad[ACTIVE].all()


def test_autograd_keeps_one_copy_of_the_input():
    moe = adapter(256, 8, dtype=torch.float32)
    x = inputs(128, 256, dtype=torch.bfloat16)
    wide = set()

    def pack(tensor):
        if tensor.numel() == x.numel():
            wide.add((tensor.data_ptr(), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe(x)
    assert wide == {(x.data_ptr(), torch.bfloat16)}


def test_it_adapts_a_four_bit_layer():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu")
    x = inputs(5, 64, dtype=torch.bfloat16)
    before = linear(x)
    moe = adapter(64, 32, dtype=torch.float32)
    attach(linear, moe)
    output = linear(x)
    assert output.dtype == before.dtype
    torch.testing.assert_close(output, before + moe(x))
    output.float().square().sum().backward()
    assert all(parameter.grad.any() for parameter in moe.parameters())
