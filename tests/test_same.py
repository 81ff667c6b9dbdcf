"""SAME: what each setting lets move, what the published rule does instead, and what it bounds."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from mllm_cl import Memory, routers
from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.drift.factors import low_rank_moment
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.drift.subspace import Spectrum, spectrum
from mllm_cl.methods.instruction.same import Same
from mllm_cl.model import adapt
from mllm_cl.model.surgery import guards, installed_on
from mllm_cl.task import Task
from toy_run import Learnt, collator_of, learn, load, logits, toy_tasks

SETTINGS = {"lora_target_modules": ("q_proj", "o_proj"), "lora_r": 4, "calibration_tokens": 500}
FEW = {"num_experts": 4, "damping": 0.1, **SETTINGS}
WHOLE = {"num_experts": 0, "use_peft": False, **SETTINGS}


@cache  # tests look at what they get and do not change it
def two_tasks(folder, method: Same, **arguments) -> tuple[nn.Module, Memory, list[Learnt], Memory]:
    """Both toy tasks in turn: the model, the memory, what each did, and the memory between them."""
    model, memory, told, between = load(folder), Memory(), [], Memory()
    for task in toy_tasks():
        between = Memory(dict(memory))
        told.append(learn(model, folder, method, task, memory, **arguments))
    return model, memory, told, between


def moment(memory: Memory, path: str) -> Tensor:
    """C in float64, as the sums in the memory say."""
    source = bytes(memory[f"same/source/{path}"].tolist()).decode()
    state = memory.under(f"same/moment/{source}")
    return state["product"].double() / state["count"]


def leading(c: Tensor, energy: float) -> Tensor:
    """The eigenvectors that hold `energy` of tr C: (D, K)."""
    value, vector = torch.linalg.eigh(c)
    held = value.flip(0).cumsum(0) / value.sum()
    return vector.flip(1)[:, : int((held < energy).sum()) + 1]


def felt(weight: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("...od,de,...oe->...", weight, c, weight)


# --- routers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["coordinates", "gradient"])
def test_only_coordinates_keep_adamw_out_of_forbidden_router_directions(tiny_folder, update):
    model, _, told, between = two_tasks(tiny_folder["qwen3-vl-moe"], Same(**WHOLE, update=update))
    for path in routers(model):
        name = f"{path}.weight"
        step = (told[1].displaced_after[name] - told[1].displaced_before[name]).double()
        past_DK = leading(moment(between, path), 0.99)
        assert step.norm() > 0 and past_DK.shape[1] > 1
        leak = float((step @ past_DK).norm() / step.norm())
        assert leak > 0.05 if update == "gradient" else leak < 1e-5


def test_routers_move_only_where_the_task_gave_the_incoming_model_inputs(tiny_folder):
    folder, task, seen = tiny_folder["qwen3-vl-moe"], toy_tasks()[0], {}
    model = load(folder)
    for path, router in routers(model).items():
        router.register_forward_hook(lambda m, args, out, path=path: seen.update({path: args[0]}))
    batch = collator_of(folder)(list(task.train))
    logits(model, batch)
    real = batch["attention_mask"].flatten().bool()
    method = Same(**WHOLE | {"calibration_tokens": 10**6}, confine_energy=0.9)  # all samples
    told = learn(load(folder), folder, method, task, Memory())
    for path, input_TD in seen.items():
        input_TD = input_TD.double()[real]
        basis_DK = leading(input_TD.T @ input_TD / len(input_TD), 0.9)
        step = told.displaced_after[f"{path}.weight"].double()
        outside = step - step @ basis_DK @ basis_DK.T
        assert 1 < basis_DK.shape[1] < 40 and outside.norm() < 1e-5 * step.norm()


def test_frozen_routers_have_no_guard_and_free_ones_forbid_nothing(tiny_folder):
    model = load(tiny_folder["llava"])
    Same(**FEW, router="frozen").before_task(model, toy_tasks()[0], Memory())
    assert len(guards(model)) == 12 and not any("router" in name for name in guards(model))
    model, _, _, _ = two_tasks(tiny_folder["llava"], Same(**FEW, router="free"), steps=1)
    found = {name: one.g for name, one in guards(model).items() if "router" in name}
    assert len(found) == 6 and all(g.basis_DK.shape[-1] == 0 for g in found.values())


# --- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factors, slowed", [("both", {"lora_A", "lora_B"}), ("a", {"lora_A"}), ("none", set())]
)
def test_factors_say_which_guards_are_free_in_the_second_task(tiny_folder, factors, slowed):
    model, memory, _, between = two_tasks(
        tiny_folder["llava"], Same(**FEW, factors=factors), steps=1
    )
    for name, one in guards(model).items():
        kind = name.rpartition(".")[2]
        if kind == "weight":
            continue
        changes = one.g.basis_DK.shape[-1] > 0 and bool((one.g.gain_K < 0.99).any())
        assert changes == (kind in slowed), name
        if kind == "lora_A" and changes:  # gain^2 = m / (lambda + m), m = damping tr C / D
            c = moment(between, name.removesuffix("lora_A") + "router")
            m = 0.1 * c.trace() / c.shape[0]
            u = one.g.basis_DK.double()
            expected = (m * torch.linalg.inv(c + m * torch.eye(c.shape[0]))).double()
            assert torch.allclose((u * one.g.gain_K.double() ** 2) @ u.T, expected, atol=1e-4)


def test_the_moment_behind_a_lora_a_is_a_c_a_transposed():
    torch.manual_seed(0)
    a = torch.randn(3, 4, 12)
    factor = torch.randn(12, 12).double()
    c = factor @ factor.T
    expected = torch.einsum("erd,df,esf->ers", a.double(), c, a.double())
    found = low_rank_moment(a, spectrum(c))
    assert (found.double() - expected).norm() < 1e-6 * expected.norm()


def test_beyond_the_kept_directions_the_moment_is_isotropic_with_the_rest_of_the_trace():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12).double())[0]
    value = torch.tensor([9.0, 7.0, 5.0] + [0.4] * 9).double()
    c = (basis * value) @ basis.T  # truly isotropic beyond the first three
    kept = Spectrum(basis[:, :3].float(), value[:3].float(), value.sum().float())
    a = torch.randn(4, 12)
    expected = a.double() @ c @ a.double().T
    assert (low_rank_moment(a, kept).double() - expected).norm() < 1e-6 * expected.norm()


def test_a_budget_bounds_what_earlier_inputs_feel_of_each_expert(tiny_folder):
    drift = {}
    for budget in (None, 1e-4):
        model, _, told, between = two_tasks(
            tiny_folder["llava"], Same(**FEW | {"damping": 10.0}, budget=budget), learning_rate=5e-3
        )
        found = []
        for path, moe in adapt.resting_experts(model).items():
            where, c = path.removesuffix(".router"), moment(between, path)
            linear = model.get_submodule(where.removesuffix(".moe_lora"))
            ends = []
            for displaced in (told[1].displaced_before, told[1].displaced_after):
                a = moe.lora_A.double() + displaced[f"{where}.lora_A"]
                b = moe.lora_B.double() + displaced[f"{where}.lora_B"]
                ends.append(moe.scale * b @ a)
            found.append(felt(ends[1] - ends[0], c) / felt(linear.weight.double(), c))
        drift[budget] = torch.cat(found)
    assert (drift[1e-4] <= 1e-4 * (1 + 1e-4)).all()
    assert (drift[None] > 2e-4).any()  # without one they feel more
    assert (drift[1e-4] > 1e-6).any()  # and what is allowed is used


def test_a_budget_bounds_what_earlier_inputs_feel_of_whole_linears(tiny_folder):
    drift = {}
    for budget in (None, 1e-3):
        model, _, told, between = two_tasks(
            tiny_folder["qwen3-vl-moe"], Same(**WHOLE, budget=budget, damping=10.0)
        )
        found = []
        for name in (name for name in guards(model) if "self_attn" in name):
            path = name.removesuffix(".weight")
            before, after = told[1].displaced_before[name], told[1].displaced_after[name]
            weight = model.get_submodule(path).weight.double() + before
            step, c = (after - before).double(), moment(between, path)
            found.append(felt(step, c) / felt(weight, c))
        drift[budget] = torch.stack(found)
    assert (drift[1e-3] <= 1e-3 * (1 + 1e-4)).all()
    assert (drift[None] > 2e-3).all() and (drift[1e-3] > 0.9e-3).all()  # as little as it takes


def test_a_step_within_its_budget_is_left_as_it_is(tiny_folder):
    ends = []
    for budget in (None, 1e6):
        _, memory, told, _ = two_tasks(tiny_folder["llava"], Same(**FEW, budget=budget), steps=2)
        ends.append((told[1].displaced_after, memory))
    assert all(torch.equal(ends[1][0][name], moved) for name, moved in ends[0][0].items())
    assert all(torch.equal(ends[1][1][key], value) for key, value in ends[0][1].items())


# --- resting experts ------------------------------------------------------------------------------


def by_router(model: nn.Module, told: Learnt) -> dict[str, float]:
    """The largest gradient that each MoELoRA's router ever had."""
    paths = adapt.resting_experts(model)
    return {path: told.gradient[f"{path}.weight_guard.delta"] for path in paths}


def test_the_released_rule_leaves_one_expert_and_a_router_without_gradient(tiny_folder):
    folder, method, memory = tiny_folder["llava"], Same(**FEW, activation="released"), Memory()
    model, (first, second) = load(folder), toy_tasks()
    told = learn(model, folder, method, first, memory)
    mixtures = adapt.resting_experts(model)
    assert all(moe.active.tolist() == [True, False, False, False] for moe in mixtures.values())
    assert set(by_router(model, told).values()) == {0.0}
    assert all((told.displaced_after[f"{path}.weight"] == 0).all() for path in mixtures)
    kept = {path: memory[f"same/released/{path}/importance"] for path in mixtures}
    assert all(len(value) == 4 and (value > 0).all() for value in kept.values())

    learn(model, folder, method, second, memory, steps=1)  # the next task's own expert never rests
    assert all(moe.active is None or moe.active[1] for moe in mixtures.values())
    for path, value in kept.items():
        ratio = memory[f"same/released/{path}/importance"] / value
        # 0.95 F + 0.05 e, where four steps from zero had left F = 0.185 e: carried on, 1.22
        assert ((ratio > 1.1) & (ratio < 1.4)).all()


def test_ours_keeps_two_experts_or_more_and_its_routers_learn(tiny_folder):
    model, _, told, _ = two_tasks(tiny_folder["llava"], Same(**FEW))
    mixtures = adapt.resting_experts(model)
    active = [4 if moe.active is None else int(moe.active.sum()) for moe in mixtures.values()]
    assert len(active) == 6 and all(number >= 2 for number in active) and min(active) < 4
    for task in told:
        assert all(gradient > 1e-6 for gradient in by_router(model, task).values())
        for path in mixtures:
            name = f"{path}.weight"
            assert (task.displaced_after[name] - task.displaced_before[name]).norm() > 1e-3
    for moe in mixtures.values():
        if moe.active is None:
            continue
        for name in ("lora_A", "lora_B"):
            path = next(p for p, one in guards(model).items() if one is installed_on(moe)[name])
            moved = told[1].displaced_after[path] != told[1].displaced_before[path]
            assert torch.equal(moved.flatten(1).any(1), moe.active)


def test_the_next_task_starts_with_no_expert_at_rest(tiny_folder):
    model, memory, _, _ = two_tasks.__wrapped__(tiny_folder["llava"], Same(**FEW), steps=1)
    assert any(moe.active is not None for moe in adapt.resting_experts(model).values())
    Same(**FEW, activation="none").before_task(model, toy_tasks()[0], memory)
    assert all(moe.active is None for moe in adapt.resting_experts(model).values())
    assert all(one.active_E is None for one in guards(model).values())


def test_resting_experts_follow_their_guards_when_a_checkpoint_puts_those_back(tiny_folder):
    model, _, _, _ = two_tasks.__wrapped__(tiny_folder["llava"], Same(**FEW), steps=1)
    active = {path: moe.active for path, moe in adapt.resting_experts(model).items()}
    for moe in adapt.resting_experts(model).values():
        moe.active = None
    adapt.rest(model)
    for path, moe in adapt.resting_experts(model).items():
        assert (moe.active is None) == (active[path] is None)
        assert moe.active is None or torch.equal(moe.active, active[path])


# --- the history ----------------------------------------------------------------------------------


def test_the_memory_is_the_sum_over_tasks(tiny_folder):
    _, memory, _, between = two_tasks(tiny_folder["llava"], Same(**FEW), steps=1)
    names = [key for key in memory if key.startswith("same/moment/") and key.endswith("/count")]
    assert len(names) == 6 and memory.num_bytes > 0
    for key in names:
        assert 0 < between[key] < memory[key]
        path = key.removeprefix("same/moment/").removesuffix("/count")
        c = CovarianceTracker.from_state(memory.under(f"same/moment/{path}")).covariance()
        assert torch.allclose(c.double(), moment(memory, path), rtol=1e-5, atol=1e-6)
        assert memory[f"same/use/{path}/count"] == memory[key]


def test_what_is_retained_from_before_the_first_task_is_protected_in_it(tiny_folder):
    folder, method, memory = tiny_folder["llava"], Same(**FEW), Memory()
    known, task = toy_tasks()
    learn(load(folder), folder, method, known, memory, steps=1)
    model = load(folder)  # none of the first task's weights, only its memory
    learn(model, folder, method, task, memory, steps=2)
    for name, one in guards(model).items():
        if name.endswith("router.weight"):
            past_DK = leading(moment(memory, name.removesuffix(".weight")), 0.5)
            assert one.g.occupancy > 0.05 and one.displacement.norm() > 0
            assert (one.displacement.double() @ past_DK).norm() < 0.5 * one.displacement.norm()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"num_experts": 1}, "found num_experts 1 and top_k None: where one expert answers"),
        ({"top_k": 1}, "a router learns nothing"),
        ({"damping": 0.0}, "damping must be positive, found 0.0"),
        ({"rank": -1}, "rank must be positive"),
        ({"budget": 0.0}, "budget must be positive"),
        ({"budget": 0.1, "factors": "a"}, "'factors: a' leaves a part of it free"),
        ({"forbid_energy": 1.5}, r"forbid_energy is a share in \(0, 1\], found 1.5"),
        ({"confine_energy": 0.0}, "confine_energy is a share"),
    ],
)
def test_settings_that_cannot_work_are_refused_where_they_are_made(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Same(**settings)


@pytest.mark.parametrize(
    "kind, settings, sentence",
    [
        (
            "llava",
            WHOLE,
            "LlavaForConditionalGeneration none trains.*Set num_experts to two or more",
        ),
        (
            "qwen3-vl-moe",
            WHOLE | {"train_router": False},
            "3 native routers, train_router is False",
        ),
        ("llava", WHOLE | {"lora_target_modules": ("qproj",)}, "Nearest: q_proj"),
        ("llava", FEW | {"lora_target_modules": ("w1",)}, "w1"),
        (
            "qwen3-vl-moe",
            WHOLE | {"activation": "released"},
            "rests LoRA experts, but num_experts is 0",
        ),
    ],
)
def test_models_that_settings_do_not_fit_are_refused_before_training(
    tiny_folder, kind, settings, sentence
):
    model, memory = load(tiny_folder[kind]), Memory()
    with pytest.raises(ValueError, match=sentence):
        Same(**settings).before_task(model, toy_tasks()[0], memory)
    assert not guards(model)


def test_a_dense_model_without_routers_is_taken_when_routers_are_set_aside(tiny_folder):
    model, _, told, _ = two_tasks(tiny_folder["llava"], Same(**WHOLE, router="frozen"), steps=1)
    assert len(guards(model)) == 6
    assert all(one.g.gain_K.min() < 0.9 for one in guards(model).values())


def test_the_released_rule_runs_in_one_process_only():
    assert Same(activation="released").runs_on == ("single",)
    assert "zero3" in Same().runs_on


def test_a_module_that_the_data_do_not_reach_is_named(tiny_folder):
    """A vision tower's linear under text-only samples: nothing is known to protect it by."""
    model, folder, memory = load(tiny_folder["llava"]), tiny_folder["llava"], Memory()
    method = Same(**FEW | {"lora_target_modules": r".*vision_tower.*q_proj"})
    words = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "left"}]
    samples = [{"id": str(i), "messages": words, "images": []} for i in range(16)]
    task = Task("words", 1, samples, samples, max)
    with pytest.raises(ValueError, match=r"no token of the task's data reached .*vision_tower"):
        learn(model, folder, method, task, memory)


@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"lora_target_modules": ("q_proj", "o_proj", "v_proj")}, "of .*v_proj.* it knows nothing"),
        ({"num_experts": 3}, "4 experts at .*this run has 3 experts"),
    ],
)
def test_a_memory_of_a_part_of_what_trains_is_refused_before_training(tiny_folder, other, sentence):
    folder, method = tiny_folder["llava"], Same(**FEW)
    _, memory, _, _ = two_tasks(folder, method, steps=1)
    method.before_task(load(folder), toy_tasks()[1], memory)  # what it was measured for
    model = load(folder)
    with pytest.raises(ValueError, match=f"(?s){sentence}.*Measure again"):
        Same(**FEW | other).before_task(model, toy_tasks()[1], memory)
    assert not guards(model)


def test_a_memory_of_another_rank_is_refused_before_training(tiny_folder, monkeypatch):
    monkeypatch.setattr("mllm_cl.model.watch.FULL_BELOW", 8)  # as if the model were wide
    folder, memory = tiny_folder["llava"], Memory()
    learn(load(folder), folder, Same(**FEW, rank=4), toy_tasks()[0], memory, steps=1)
    with pytest.raises(ValueError, match="rank 4 at .*this run has width .* and rank 6"):
        Same(**FEW, rank=6).before_task(load(folder), toy_tasks()[1], memory)


# --- revision -------------------------------------------------------------------------------------


def test_what_a_task_supersedes_is_left_unprotected_and_the_rest_is_not(tiny_folder):
    folder, (first, second) = tiny_folder["qwen3-vl-moe"], toy_tasks()
    method = Same(**WHOLE | {"calibration_tokens": 10**6}, damping=0.1)
    model, memory = load(folder), Memory()
    for task in (first, second):
        learn(model, folder, method, task, memory)
    old = {path: moment(memory, path) for path in routers(model)}
    share = {path: tokens_of(memory, "colour", path) for path in routers(model)}
    revised = dataclasses.replace(first, name="colour_revised", index=3, supersedes="colour")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    displaced = {name: one.displacement.clone() for name, one in guards(model).items()}
    learn(model, folder, method, revised, memory, steps=1)
    incoming = load(folder)
    method.before_task(incoming, revised, Memory())
    incoming.load_state_dict(state)
    for name, one in guards(incoming).items():
        one.displacement = displaced[name]
    batch = collator_of(folder)(list(first.train))
    seen = {}
    for path, router in routers(incoming).items():
        router.register_forward_hook(lambda m, args, out, path=path: seen.update({path: args[0]}))
    logits(incoming, batch)
    real = batch["attention_mask"].flatten().bool()
    for path in routers(model):
        now = seen[path].flatten(0, -2).double()[real]
        left = old[path] - share[path] * now.T @ now / len(now)
        value, vector = torch.linalg.eigh(left)
        left = (vector * value.clamp_min(0)) @ vector.T
        task = now.T @ now / len(now)
        confined = DriftGuard.confine(task, energy=0.99)
        after, before = (
            DriftGuard.compose(confined, DriftGuard.forbid(past, energy=0.99))
            for past in (left, old[path])
        )
        found = installed_on(model.get_submodule(path))["weight"].g
        open_to = [float(torch.trace(g(g(task).T).double())) for g in (found, after, before)]
        assert open_to[0] == pytest.approx(open_to[1], rel=0.02)
        assert open_to[0] > 3 * open_to[2]


def tokens_of(memory: Memory, task: str, path: str) -> float:
    """The share of the tokens behind the moment at `path` that `task` put in."""
    source = bytes(memory[f"same/source/{path}"].tolist()).decode()
    own = memory[f"same/tokens/{task}/{path}"]
    return float(own / memory[f"same/moment/{source}/count"])


def test_a_task_can_only_supersede_what_the_memory_knows(tiny_folder):
    folder, (first, second) = tiny_folder["qwen3-vl-moe"], toy_tasks()
    model, memory = load(folder), Memory()
    learn(model, folder, Same(**WHOLE), first, memory, steps=1)
    revised = dataclasses.replace(second, supersedes="shapes")
    with pytest.raises(ValueError, match="'shapes'.*it knows colour"):
        learn(model, folder, Same(**WHOLE), revised, memory, steps=1)


@cache
def revisions(folder, **settings) -> list[tuple[nn.Module, Memory, Memory]]:
    """A task, one that replaces it and one that replaces that, all of the same questions: the model
    after the last two, with the memory after and before.
    """
    method = Same(**FEW | {"calibration_tokens": 10**6, **settings})
    model, memory, told = load(folder), Memory(), []
    first = toy_tasks()[0]
    for index, name in enumerate(("first", "second", "third")):
        before = Memory(dict(memory))
        replaced = ("first", "second")[index - 1] if index else None
        task = dataclasses.replace(first, name=name, index=index + 1, supersedes=replaced)
        learn(model, folder, method, task, memory, steps=4)
        told.append((model, Memory(dict(memory)), before))
    return told[1:]


def test_a_revision_of_a_revision_leaves_nothing_of_either_protected(tiny_folder):
    model, memory, before = revisions(tiny_folder["llava"])[-1]
    paths = [name for name in memory.under("same/tokens/third") if name.endswith("router")]
    assert len(paths) == 6
    for path in paths:
        for name in ("second", "third"):
            source = bytes(memory[f"same/source/{path}"].tolist()).decode()
            at = (before if name == "second" else memory)[f"same/moment/{source}/count"]
            assert memory[f"same/tokens/{name}/{path}"] == at, (name, path)


def test_experts_that_hold_a_superseded_answer_do_not_rest(tiny_folder):
    model, memory, _ = revisions(tiny_folder["llava"])[-1]
    assert all(one.active_E is None or one.active_E.all() for one in guards(model).values())
    for path in adapt.resting_experts(model):  # the sum over tasks still has them all
        assert memory[f"same/use/{path}/count"] == memory[f"same/used/third/{path}/count"] > 0


def test_a_budget_is_not_for_what_a_task_supersedes(tiny_folder):
    folder, first = tiny_folder["llava"], toy_tasks()[0]
    moved = {}
    for replaced in (None, "colour"):
        method = Same(**FEW | {"calibration_tokens": 10**6}, budget=1e-7, activation="none")
        model, memory = load(folder), Memory()
        learn(model, folder, method, first, memory)
        again = dataclasses.replace(first, name="again", index=2, supersedes=replaced)
        told = learn(model, folder, method, again, memory)
        moved[replaced] = [
            float((told.displaced_after[name] - told.displaced_before[name]).norm())
            for name in guards(model)
            if name.endswith("lora_B")
        ]
    assert sum(moved["colour"]) > 5 * sum(moved[None]) > 0
