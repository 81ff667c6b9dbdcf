"""SAME on the experts a model was born with: each is slowed by the tokens really routed to it."""

import copy
import dataclasses
import json

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_cl import Memory, Recipe, run
from mllm_cl.drift.expert_moments import ExpertMoments
from mllm_cl.methods.instruction.same import Same
from mllm_cl.model.expert_lora import adapted, stacks
from mllm_cl.model.surgery import installed_on
from mllm_cl.model.watch_experts import LayerWatch, expert_moments
from test_runner import recipe
from toy_run import collator_of, learn, load, logits, toy_tasks

METHOD = {
    "experts": "lora",
    "num_experts": 0,
    "lora_target_modules": (),
    "lora_r": 4,
    "calibration_tokens": 10**6,  # all samples
    "damping": 0.1,
    "expert_rank": 512,  # all directions
    "activation": "none",
}
KIND = "qwen3-vl-moe"


def met_by_experts(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Per stack, the float64 inputs of each expert's real tokens, from the formula: the tokens that
    the router chose it for, and what its own gate and up make of them.
    """
    real, found, handles = batch["attention_mask"].flatten().bool(), {}, []

    def look(path: str, lora):
        def hook(module: nn.Module, args: tuple) -> None:
            hidden_TD, index_TK = args[0].double(), args[1]
            for name, _, _ in stacks(lora.layout):
                found[f"{path}.{name}"] = []
            for expert in range(lora.layout.num_experts):
                mine = (index_TK == expert).any(-1) & real
                seen = hidden_TD[mine]
                gate, up = (seen @ effective(module, lora, expert).mT).chunk(2, -1)
                found[f"{path}.{lora.layout.up}"].append(seen)
                found[f"{path}.{lora.layout.down}"].append(nn.functional.silu(gate) * up)

        return hook

    for path, lora in adapted(model).items():
        handles.append(lora.layout.module.register_forward_pre_hook(look(path, lora)))
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


def effective(module: nn.Module, lora, expert: int) -> Tensor:
    """W_e + s B_e A_e of the up product with what guards add, float64."""
    a, b = (
        module._parameters[f"{lora.layout.up}_lora_{one}"][expert].double()
        + installed_on(module)[f"{lora.layout.up}_lora_{one}"]()[expert].double()
        for one in "AB"
    )
    return module._parameters[lora.layout.up][expert].double() + lora.scale * b @ a


@pytest.fixture(scope="module")
def learnt(tiny_folder):
    """A model that learnt one task, its memory, and what its experts met of the task's data."""
    folder, (first, _) = tiny_folder[KIND], toy_tasks()
    model, memory = load(folder), Memory()
    learn(model, folder, Same(**METHOD), first, memory)
    with torch.no_grad():
        met = met_by_experts(model, collator_of(folder)(list(first.train.samples)))
    return model, memory, met


def test_the_memory_holds_the_moment_of_the_tokens_routed_to_each_expert(learnt):
    _, memory, met = learnt
    for source, inputs in met.items():
        state = memory.under(f"same/experts/{source}")
        basis_DK = state["basis"].double()
        for expert, input_ND in enumerate(inputs):
            expected = basis_DK.mT @ (input_ND.mT @ input_ND) @ basis_DK
            found = state["gram"][expert].double()
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)
            assert int(state["count"][expert]) == len(input_ND)


def test_each_expert_is_slowed_by_its_own_history_on_both_factors(tiny_folder, learnt):
    model, memory, met = learnt
    folder, (_, second) = tiny_folder[KIND], toy_tasks()
    factors = {
        f"{path}.{name}": lora.layout.module._parameters[f"{name}_lora_A"].double().detach()
        + installed_on(lora.layout.module)[f"{name}_lora_A"]().double().detach()
        for path, lora in adapted(model).items()
        for name, _, _ in stacks(lora.layout)
    }
    learn(model, folder, Same(**METHOD), second, Memory(dict(memory)), steps=1)
    for path, lora in adapted(model).items():
        for name, _, _ in stacks(lora.layout):
            one = {x: installed_on(lora.layout.module)[f"{name}_lora_{x}"].g for x in "AB"}
            for expert, input_ND in enumerate(met[f"{path}.{name}"]):
                if len(input_ND) < 2:
                    continue
                c = input_ND.mT @ input_ND / len(input_ND)
                a = factors[f"{path}.{name}"][expert]
                for factor, moment in (("A", c), ("B", a @ c @ a.mT)):
                    m = 0.1 * moment.trace() / len(moment)
                    eye = torch.eye(len(moment), dtype=torch.float64)
                    expected = m * torch.linalg.inv(moment + m * eye)
                    probe = torch.zeros(lora.layout.num_experts, len(eye), len(eye))
                    probe[expert] = eye.float()
                    found = one[factor](one[factor](probe))[expert].double()
                    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)


def test_old_inputs_feel_less_of_the_next_task_than_without_guards(tiny_folder, learnt):
    folder, tasks = tiny_folder[KIND], toy_tasks()
    batch = collator_of(folder)(list(tasks[0].train.samples))
    moved = {}
    for factors in ("both", "none"):
        model, memory, method = load(folder), Memory(), Same(**METHOD | {"factors": factors})
        learn(model, folder, method, tasks[0], memory)
        start = logits(model, batch)
        learn(model, folder, method, tasks[1], memory, steps=8)
        moved[factors] = float((logits(model, batch) - start).norm())
    assert moved["both"] < 0.7 * moved["none"]


def test_idle_experts_rest_by_how_often_top_k_chose_them(tiny_folder):
    folder, tasks = tiny_folder[KIND], toy_tasks()
    method = Same(**METHOD | {"activation": "paper"})
    model, memory = load(folder), Memory()
    learn(model, folder, method, tasks[0], memory)
    learn(model, folder, method, tasks[1], memory)
    resting = 0
    for path, lora in adapted(model).items():
        use = memory.under(f"same/use/{path}")
        assert float(use["weight"].sum() / use["count"]) == pytest.approx(1.0)  # shares of rows
        for name, one in installed_on(lora.layout.module).items():
            assert one.active_E is not None, name
            idle = one.active_E == 0
            resting += int(idle.sum())
            assert not one.step()[idle].any()
    assert resting > 0


def test_a_shared_basis_of_few_directions_says_what_it_leaves_out(tiny_folder):
    folder, tasks = tiny_folder[KIND], toy_tasks()
    model, memory = load(folder), Memory()
    learn(model, folder, Same(**METHOD | {"expert_rank": 4}), tasks[0], memory)
    for path, lora in adapted(model).items():
        for name, width, _ in stacks(lora.layout):
            kept = ExpertMoments.from_state(memory.under(f"same/experts/{path}.{name}"))
            assert kept.basis_DK.shape == (width, 4)
            share = kept.captured_E[kept.count_E > 0]
            assert 0.05 < float(share.mean()) < 0.9 and float(share.max()) <= 1.0001


def test_a_budget_bounds_what_old_inputs_feel_of_each_expert(tiny_folder):
    folder, tasks, share = tiny_folder[KIND], toy_tasks(), {}
    for budget in (None, 1e-5):
        model, memory, method = load(folder), Memory(), Same(**METHOD | {"damping": 10.0})
        learn(model, folder, method, tasks[0], memory)
        before = Memory(dict(memory))
        method = dataclasses.replace(method, budget=budget)
        told = learn(model, folder, method, tasks[1], memory, learning_rate=5e-3)
        found = []
        for path, lora in adapted(model).items():
            module = lora.layout.module
            for name, _, _ in stacks(lora.layout):
                ends = []
                for displaced in (told.displaced_before, told.displaced_after):
                    a, b = (
                        module._parameters[f"{name}_lora_{x}"].double()
                        + displaced[f"{path}.{name}_lora_{x}"].double()
                        for x in "AB"
                    )
                    ends.append(lora.scale * b @ a)
                state = before.under(f"same/experts/{path}.{name}")
                basis_DK = state["basis"].double()
                c_EDD = basis_DK @ state["gram"].double() @ basis_DK.mT
                step, weight = ends[1] - ends[0], module._parameters[name].double()
                drift, whole = (torch.einsum("eod,edc,eoc->e", x, c_EDD, x) for x in (step, weight))
                found.append((drift / whole)[state["count"] > 0])
        share[budget] = torch.cat(found)
    assert (share[1e-5] <= 1e-5 * (1 + 1e-3)).all()
    assert (share[None] > 2e-5).any() and (share[1e-5] > 1e-7).any()


def test_a_budget_widens_no_more_than_one_expert_at_a_time(tiny_folder, learnt):
    model, memory, _ = (copy.deepcopy(one) for one in learnt)
    folder, (_, second) = tiny_folder[KIND], toy_tasks()
    method, batch = Same(**METHOD, budget=1e-4), collator_of(folder)(list(second.train.samples))
    method.before_task(model, second, memory)
    with Results() as results:
        method.after_task(model, second, memory, [batch], lambda tensor: tensor)
    for lora in adapted(model).values():
        for name, _, _ in stacks(lora.layout):
            size = lora.layout.module._parameters[name].shape
            assert results.wide and size not in results.wide


class Results(TorchDispatchMode):
    """The shapes of all float64 results while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: set[torch.Size] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if torch.is_tensor(result) and result.dtype == torch.float64:
            self.wide.add(result.shape)
        return result


def test_all_ranks_measure_experts_in_the_bases_of_the_first(tiny_folder, learnt, monkeypatch):
    model, folder = learnt[0], tiny_folder[KIND]
    batch = collator_of(folder)(list(toy_tasks()[0].train.samples))
    widths = {
        f"{path}.{name}": width
        for path, lora in adapted(model).items()
        for name, width, _ in stacks(lora.layout)
    }
    sent, found = [], {}

    def bases() -> dict[str, Tensor]:
        turned = {key: torch.randn(width, width) for key, width in widths.items()}
        return {key: torch.linalg.qr(one)[0][:, :4] for key, one in turned.items()}

    def first(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor

    for rank, reduce in ((0, first), (1, lambda tensor: tensor + sent.pop(0))):
        monkeypatch.setenv("RANK", str(rank))
        found[rank] = expert_moments(model, bases(), [batch], reduce)
    for source, one in found[0].items():
        both = found[1][source]
        assert torch.equal(one.basis_DK, both.basis_DK)
        torch.testing.assert_close(both.spectrum().trace, one.spectrum().trace)
        torch.testing.assert_close(both.captured_E, one.captured_E)


def test_a_stack_without_rows_is_known_where_the_others_are(learnt):
    layers = LayerWatch(learnt[0], rank=4)
    for path, lora in adapted(learnt[0]).items():
        source = f"{path}.{lora.layout.down}"
        layers.move(source, torch.device("meta"))
        assert layers._down[source].device.type == "meta"


def test_settings_and_models_that_do_not_fit_are_refused(tiny_folder):
    with pytest.raises(ValueError, match="experts: lora"):
        Same(**METHOD | {"experts": "whole"})
    folder = tiny_folder["llava"]
    with pytest.raises(ValueError, match="has none"):
        learn(load(folder), folder, Same(**METHOD | {"router": "frozen"}), toy_tasks()[0], Memory())


def test_a_run_says_what_its_bases_leave_out(tiny_folder, tmp_path, capfd):
    method = {"name": "same", "experts": "lora", "num_experts": 0, "expert_rank": 4}
    written = recipe(tmp_path, tiny_folder[KIND], retain=[])
    tree = yaml.safe_load(written.read_text())
    tree["method"], tree["model"]["lora_target_modules"] = method, []
    tree["tasks"], tree["training"]["max_steps"] = tree["tasks"][:1], 3
    written.write_text(yaml.safe_dump(tree))
    run(Recipe.load(written))
    folder = tmp_path / "run" / "task_1"
    memory = Memory.load(folder / "memory.safetensors")
    told = json.loads((folder / "manifest.json").read_text())["captured"]
    assert len(told) == 6  # two stacks in each of three layers
    shares = []
    for source, row in told.items():
        state = {k: v.double() for k, v in memory.under(f"same/experts/{source}").items()}
        used = state["count"] > 0
        share_E = (state["gram"].diagonal(dim1=-2, dim2=-1).sum(-1) / state["trace"])[used]
        assert row["min"] == pytest.approx(share_E.min().item(), rel=1e-5)
        assert row["median"] == pytest.approx(share_E.median().item(), rel=1e-5)
        shares += share_E.tolist()
    lines = [line for line in capfd.readouterr().out.splitlines() if "bases of 6 stacks" in line]
    assert len(lines) == 1 and f"at least {min(shares):.1%} (" in lines[0]
    assert f"hold {torch.tensor(shares).median():.1%} of what entered an expert" in lines[0]
