"""Guards inside modules: installed without a trace in the function, trained, and folded away."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from families import inputs as text
from families import llava, qwen3_vl_moe
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.model import adapt
from mllm_cl.model.anatomy import routers
from mllm_cl.model.moe_lora import MoELoRA, attach_moe_lora
from mllm_cl.model.surgery import (
    fold,
    guard,
    guards,
    only_train,
    restore_state,
    trained_state,
)

E, R, D, O = 4, 3, 12, 10  # noqa: E741  experts, LoRA rank, input and output width


class TopK(nn.Module):
    """A router with a weight of its own, as sparse models have it: logits, weights, indices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = functional.linear(hidden_TD, self.weight)
        value_T2, index_T2 = logits_TE.float().softmax(-1).topk(2, dim=-1)
        return logits_TE, value_T2.to(logits_TE.dtype), index_T2


class Stack(nn.Module):
    """Experts in one 3-D parameter (E, O, D), as sparse models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(E, O, D))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return torch.einsum("td,eod->eto", hidden_TD, self.experts)


def lora() -> nn.Module:
    """A PEFT LoRA with both factors away from zero, inside a model."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(nn.Linear(D, O))
    inject_adapter_in_model(LoraConfig(r=R, target_modules=["0"]), model)
    nn.init.normal_(model[0].lora_B["default"].weight)
    return model


def moe_lora() -> nn.Module:
    moe = MoELoRA(D, O, num_experts=E, rank=R, alpha=6.0)
    nn.init.normal_(moe.lora_B)
    nn.init.normal_(moe.lora_A)
    return moe


CASES = {
    "linear": (lambda: nn.Linear(D, O), "", "weight", ()),
    "router": (TopK, "", "weight", ()),
    "lora_A": (lora, "0.lora_A.default", "weight", ()),
    "lora_B": (lora, "0.lora_B.default", "weight", ()),
    "moe_A": (moe_lora, "", "lora_A", ()),
    "moe_B": (moe_lora, "", "lora_B", (E,)),
    "moe_router": (moe_lora, "router", "weight", ()),
    "stack": (Stack, "", "experts", (E,)),
}


def make(case: str) -> tuple[nn.Module, nn.Module, str]:
    """A model, the module in it that owns the weight, and the weight's name."""
    torch.manual_seed(0)
    build, path, name, _ = CASES[case]
    model = build().eval()
    return model, model.get_submodule(path), name


def some_guard(case: str, module: nn.Module, name: str, seed: int = 0) -> DriftGuard:
    """Forbids half of the directions, of each expert its own where the case has experts."""
    dim = module._parameters[name].shape[-1]
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(*CASES[case][3], dim, max(1, dim // 2), generator=generator)
    basis_DK = torch.linalg.qr(basis.double())[0].float()
    return DriftGuard(basis_DK, torch.zeros(*CASES[case][3], basis_DK.shape[-1]))


def batch(seed: int = 1, num_tokens: int = 20) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, tuple) else (found,)


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def near(first: tuple[Tensor, ...], second: tuple[Tensor, ...], tolerance: float = 1e-5) -> bool:
    return all(
        (a.double() - b.double()).norm() <= tolerance * b.double().norm()
        for a, b in zip(first, second, strict=True)
    )


def train(model: nn.Module, steps: int = 12, lr: float = 0.05) -> None:
    """AdamW with weight decay and clipping on random targets."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.1)
    for step in range(steps):
        found = model(batch(100 + step))
        found = found[0] if isinstance(found, tuple) else found
        target = torch.randn(found.shape, generator=torch.Generator().manual_seed(step))
        (found.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def install(case: str) -> tuple[nn.Module, nn.Module, str]:
    model, module, name = make(case)
    guard(module, name, some_guard(case, module, name))
    only_train(model, [])
    return model, module, name


@pytest.mark.parametrize("case", CASES)
def test_installing_a_guard_changes_no_output_and_no_key(case):
    model, module, name = make(case)
    before, state = outputs(model, batch()), copy.deepcopy(model.state_dict())
    guard(module, name, some_guard(case, module, name))
    assert same_bits(outputs(model, batch()), before)
    after = model.state_dict()
    assert [key for key in after if not key.endswith(f"{name}_guard.delta")] == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert not module._parameters[name].requires_grad


@pytest.mark.parametrize("case", CASES)
def test_what_is_forbidden_stays_put_under_adamw_with_decay_and_clipping(case):
    model, module, name = install(case)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "guard" not in key}
    before = outputs(model, batch())
    train(model)
    one = guards(model)[next(iter(guards(model)))]
    g, step = one.g, one.step().detach()
    guard(module, name, some_guard(case, module, name, seed=1))
    assert torch.equal(one.displacement, step)  # stored at the end of the task
    basis_DK = g.basis_DK.double()
    leaked = (step.double() @ basis_DK).norm()
    assert step.norm() > 0.1 and leaked < 1e-5 * step.norm()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    assert not near(outputs(model, batch())[:1], before[:1], 1e-2)


@pytest.mark.parametrize("case", CASES)
def test_a_second_guard_joins_the_step_and_leaves_the_function(case):
    model, module, name = install(case)
    train(model)
    before = outputs(model, batch())
    again = some_guard(case, module, name, seed=1)
    one = guard(module, name, again)
    assert same_bits(outputs(model, batch()), before)
    assert not one.delta.any() and torch.equal(one.g.basis_DK, again.basis_DK)
    train(model)  # the next task's step adds to the displacement under the new guard alone
    assert one.g.leak(one.step()).max() < 1e-5
    expected = module._parameters[name] + one.displacement + one.step()
    fold(model)
    assert torch.allclose(module._parameters[name], expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_copied_module_computes_with_its_own_parameters(case):
    model, _, _ = install(case)
    train(model)
    twin, before = copy.deepcopy(model), outputs(model, batch())
    assert same_bits(outputs(twin, batch()), before)
    train(twin)
    assert same_bits(outputs(model, batch()), before)
    assert not near(outputs(twin, batch())[:1], before[:1], 1e-3)


@pytest.mark.parametrize("case", CASES)
def test_folding_leaves_the_function_and_removes_every_trace(case):
    original, _, _ = make(case)
    model, module, name = install(case)
    train(model)
    guard(module, name, some_guard(case, module, name, seed=1))
    train(model)
    before = outputs(model, batch())
    leaks = fold(model)
    assert near(outputs(model, batch())[:1], before[:1], 1e-6)
    assert list(model.state_dict()) == list(original.state_dict())
    assert not guards(model) and not {"forward", "_unguarded_forward"} & vars(module).keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    # Of two tasks' displacement only rounding is a leak: the first task's guard was another.
    assert list(leaks.values())[0] < 1e-5


def test_two_weights_of_one_module_are_guarded_and_folded_together():
    model, _, _ = make("moe_A")
    for name in ("lora_A", "lora_B"):
        guard(model, name)
    guard(model.router, "weight", DriftGuard.forbid(torch.eye(D), energy=0.5))
    only_train(model, [])
    train(model)
    before, displaced = outputs(model, batch()), {k: one() for k, one in guards(model).items()}
    assert set(displaced) == {"lora_A", "lora_B", "router.weight"}
    assert all(d.norm() > 0.1 for d in displaced.values())
    fold(model)
    assert near(outputs(model, batch()), before, 1e-6) and "forward" not in vars(model)


def test_a_guard_below_a_routed_adapter_keeps_the_adapter_when_folded():
    model = nn.Sequential(nn.Linear(D, O))
    attach_moe_lora(model, {"0": model[0]}, num_experts=E, rank=R, alpha=6.0)
    nn.init.normal_(model[0].moe_lora.lora_B)
    guard(model[0], "weight")
    only_train(model, [])
    train(model)
    before = outputs(model, batch())
    fold(model)
    assert near(outputs(model, batch()), before, 1e-6)


def test_folding_refuses_a_tied_weight_and_a_forward_that_was_replaced_before_it_writes():
    model = nn.Sequential(nn.Embedding(O, D), nn.Linear(D, O, bias=False))
    model[1].weight = model[0].weight
    guard(model[1], "weight").displacement.add_(1)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"1.weight is also 0.weight.*tie_word_embeddings"):
        fold(model)
    assert torch.equal(model[0].weight, before)

    model, module, name = install("linear")
    guards(model)[name].displacement.add_(1)
    before, module.forward = module.weight.clone(), module.forward.__call__
    with pytest.raises(ValueError, match="replaced the forward"):
        fold(model)
    assert torch.equal(module.weight, before) and guards(model)


def test_a_folded_sparse_model_reloads_in_plain_transformers_with_equal_logits(tmp_path):
    model = qwen3_vl_moe()
    keys = list(model.state_dict())
    for router in routers(model).values():
        guard(router, "weight", in_fp32=True)
    experts = model.model.language_model.layers[1].mlp.experts
    guard(experts, "down_proj", DriftGuard.forbid(torch.eye(experts.down_proj.shape[-1]), 0.5))
    guard(model.model.language_model.layers[0].self_attn.q_proj, "weight")
    only_train(model, [])
    with torch.no_grad():
        for one in guards(model).values():
            one.delta.normal_(std=0.1)
    with torch.no_grad():
        before = model(**text(model)).logits
        fold(model)
        after = model(**text(model)).logits
    assert near((after,), (before,), 1e-5) and list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    state = plain.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        # transformers lays the experts out anew, so its GEMMs round otherwise
        assert near((plain.eval()(**text(plain)).logits,), (after,), 1e-6)


# --- bf16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_guard_basis_and_displacement_stay_fp32_whatever_the_model_becomes(when):
    model, module, name = make("linear")
    module = module.to(torch.bfloat16) if when == "before" else module
    one = guard(module, name, some_guard("linear", module, name))
    one.displacement.add_(1e-3)
    kept = one.displacement.clone(), one.g.basis_DK.clone(), one.g.gain_K.clone()
    model.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(one.displacement, kept[0]) and torch.equal(one.g.basis_DK, kept[1])
    assert torch.equal(one.g.gain_K, kept[2]) and one().dtype == torch.float32
    with torch.no_grad():
        one.delta.normal_()
    assert one.g.leak(one.step()) < 1e-6  # the guard acts after the delta was rounded


def nudge(weight_OD: Tensor, x_D: Tensor, share: float) -> Tensor:
    """A displacement of `share` of each element of the weight, that x feels as much as possible."""
    return share * weight_OD.float().abs() * x_D.sign()


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast", "linear by keyword"])
def test_a_displacement_far_below_bf16_resolution_acts_on_a_linear(how):
    torch.manual_seed(0)
    width = 512
    linear, x = nn.Linear(width, 256, bias=False), torch.randn(1, width)
    linear, x = linear.to(torch.bfloat16), x.to(torch.bfloat16)
    if how == "autocast":
        linear, x = linear.float(), x.float()
    one = guard(linear, "weight")
    moved_OD = nudge(linear.weight.detach(), x[0].float(), 2.0**-11)  # an eighth of one bf16 step
    rounded = (linear.weight.float() + moved_OD).to(torch.bfloat16)
    assert torch.equal(rounded, linear.weight.to(torch.bfloat16))

    def answer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = linear(input=x) if "keyword" in how else linear(x)
        assert found.dtype == torch.bfloat16
        return found.double()

    before = answer()
    one.displacement = moved_OD
    expected = float((x.double() @ moved_OD.double().T).sum())
    # Outputs round to bf16 too, each by its own fraction: the sum over 256 keeps the mean.
    assert abs(float((answer() - before).sum()) - expected) < 0.2 * expected


def test_a_displacement_far_below_bf16_resolution_moves_the_top_k_of_an_in_fp32_router():
    torch.manual_seed(0)
    router = TopK().to(torch.bfloat16)
    router.weight.data[1] = router.weight.data[0]  # a tie, which every rounding keeps
    x = batch().to(torch.bfloat16)
    one = guard(router, "weight", in_fp32=True)
    one.displacement[1] = nudge(router.weight[1].detach(), x[0].float(), 2.0**-11)
    logits, value, index = outputs(router, x)
    assert (logits.dtype, value.dtype, index.dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)
    place = index[0].tolist()
    assert 1 in place and (0 not in place or place.index(1) < place.index(0))
    exact = functional.linear(x.double(), router.weight.double() + one.displacement.double())
    assert torch.equal(exact.topk(2).indices, index)


def test_a_displacement_far_below_bf16_resolution_acts_on_the_router_of_a_routed_adapter():
    torch.manual_seed(0)
    moe = moe_lora().to(torch.bfloat16)
    x = batch().to(torch.bfloat16)
    one = guard(moe.router, "weight")
    before = moe.router(x)
    one.displacement = nudge(moe.router.weight.detach(), x[0].float(), 2.0**-11)
    expected = x.double() @ one.displacement.double().T
    assert near((moe.router(x) - before,), (expected,), 1e-2) and before.dtype == torch.float32


def test_folding_into_bf16_tells_a_leak_and_into_fp32_next_to_none():
    leaks = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, module, name = make("linear")
        model.to(dtype)
        one = guard(module, name, some_guard("linear", module, name))
        with torch.no_grad():
            one.delta.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        before, moved = module.weight.detach().double(), one().detach().double()
        basis_DK = one.g.basis_DK.double()
        leaks[dtype] = fold(model)[name]
        told = ((module.weight.detach().double() - before) @ basis_DK).norm() / moved.norm()
        assert abs(leaks[dtype] - told) < 1e-6
    assert leaks[torch.float32] < 1e-5 < 0.005 < leaks[torch.bfloat16]


def test_folding_tells_the_leak_of_the_worst_expert():
    model, module, name = make("stack")
    model.to(torch.bfloat16)
    one = guard(module, name, some_guard("stack", module, name))
    with torch.no_grad():
        one.delta.normal_(std=0.02)
    before, moved, g = module.experts.detach().double(), one().detach(), one.g
    leak = fold(model)["experts"]
    rounding = module.experts.detach().double() - before - moved
    each_E = (rounding @ g.basis_DK.double()).flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1)
    assert leak == pytest.approx(float(each_E.max()), rel=1e-4)
    assert leak > float(each_E.mean()) > 0.005


# --- resting experts ------------------------------------------------------------------------------


def test_resting_experts_stay_bitwise_although_their_delta_had_momentum():
    model, _, _ = make("moe_A")
    for name in ("lora_A", "lora_B"):
        guard(model, name)
    only_train(model, [])
    optimizer = torch.optim.AdamW([one.delta for one in guards(model).values()], 0.05)

    def step(seed: int) -> None:
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        optimizer.step()

    for seed in range(4):
        step(seed)
    guard(model, "lora_A"), guard(model, "lora_B")  # the task ends; Adam's momentum does not
    active_E = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for one in guards(model).values():
        one.active_E = active_E
    start = {name: model._parameters[name] + one() for name, one in guards(model).items()}
    for seed in range(4, 8):
        step(seed)
    for name, one in guards(model).items():
        now = model._parameters[name] + one()
        assert one.delta[1].any()  # momentum moved it all the same
        assert torch.equal(now[[1, 3]], start[name][[1, 3]])
        assert not torch.isclose(now[[0, 2]], start[name][[0, 2]]).all()
    one = guard(model, "lora_A")
    assert one.active_E is None and not one.displacement[1].equal(one.displacement[0])
    assert torch.equal(model.lora_A[1] + one.displacement[1], start["lora_A"][1])


# --- errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_guarded_is_told_in_a_sentence():
    linear = nn.Linear(D, O)
    with pytest.raises(
        ValueError, match="Linear has no parameter 'wieght' to guard; it has weight"
    ):
        guard(linear, "wieght")
    with pytest.raises(ValueError, match=r"acts on inputs of width 5, but 'weight' has shape"):
        guard(linear, "weight", DriftGuard.free(5))
    with pytest.raises(ValueError, match=r"'bias' is torch.float32 of shape \(10,\)"):
        guard(linear, "bias")
    with pytest.raises(ValueError, match=r"bases for \(3,\) experts, but 'experts' has shape"):
        guard(Stack(), "experts", DriftGuard(torch.eye(D).expand(3, D, D), torch.zeros(3, D)))
    packed = nn.Linear(D, O)
    packed.weight = nn.Parameter(torch.zeros(D, O, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="'weight' is torch.uint8.*quantised"):
        guard(packed, "weight")
    assert "forward" not in vars(linear) and linear.weight.requires_grad


# --- state ----------------------------------------------------------------------------------------


def adapted(kind: str, guarded: bool) -> tuple[nn.Module, set[str]]:
    """A tiny LLaVA with one kind of adapter on it, and the names of its parameters before."""
    model = llava()
    base = {name for name, _ in model.named_parameters()}
    targets = ["q_proj", "down_proj"]
    same = {"rank": 4, "alpha": 8.0, "seed": 0}
    if kind == "lora":
        sites = adapt.lora_sites(model, targets, dropout=0.0, **same)
    elif kind == "moe_lora":
        sites = adapt.moe_lora_sites(model, targets, num_experts=3, top_k=None, **same)
    else:
        sites = adapt.weight_sites(model, targets)
    if guarded:
        for site in sites:
            guard(site.module, site.name)
    only_train(model, [] if guarded else [site.weight for site in sites])
    return model.eval(), base


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("kind", ["lora", "weights", "moe_lora"])
def test_state_round_trips_to_bitwise_equal_outputs(kind, guarded):
    model, base = adapted(kind, guarded)
    with torch.no_grad():
        untouched = model(**text(model)).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for site in guards(model):
        owner, _, name = site.rpartition(".")
        guard(model.get_submodule(owner), name)  # what is stored is the displacement
    with torch.no_grad():
        before = model(**text(model)).logits
    state = {name: value.clone() for name, value in trained_state(model, base).items()}
    again, _ = adapted(kind, guarded)
    restore_state(again, state)
    with torch.no_grad():
        assert torch.equal(again(**text(again)).logits, before)
    assert not near((before,), (untouched,), 1e-3)
    frozen = dict(model.named_parameters())
    assert all(
        name.endswith("::displacement") or name not in base or frozen[name].requires_grad
        for name in state
    )


def test_state_for_which_there_is_no_place_is_refused():
    model, base = adapted("lora", guarded=True)
    state = trained_state(model, base)
    other, _ = adapted("weights", guarded=True)
    with pytest.raises(ValueError, match="no place: the recipe's method or its targets differ"):
        restore_state(other, state)
    name = next(name for name in state if name.endswith("::displacement"))
    with pytest.raises(ValueError, match=r"of shape \(2, 2\), the model"):
        restore_state(model, {name: torch.zeros(2, 2)})
