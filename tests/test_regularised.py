"""What the methods with a teacher, a spring or a new LoRA compute, against float64 references
written from the formulas, and what all of them do in a run.

B batch, T tokens, E experts, K chosen experts, D model width, R rank.
"""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from families import FAMILIES, inputs
from mllm_cl import Memory, Recipe, checkpoint, continual, learning, load_method, routers, run
from mllm_cl.drift.distil import divergence, token_share
from mllm_cl.method import names
from mllm_cl.model import osf
from mllm_cl.model.adapt import lora_layers, resting_experts
from mllm_cl.model.experts import experts
from mllm_cl.model.layers import trained_layers
from mllm_cl.model.penalty import due
from mllm_cl.model.routing import heard, listen, note_choices, replay_choices
from mllm_cl.model.surgery import advance, fold, guards
from mllm_cl.model.teacher import incoming
from mllm_cl.recipe import RecipeError
from mllm_cl.trainer import check_engine
from toy_run import collator_of, learn, load, logits, toy_tasks

SETTINGS = {"lora_target_modules": ("q_proj", "o_proj"), "lora_r": 4, "calibration_tokens": 500}
NATIVE, ROUTED = "qwen3-vl-moe", "llava"
KNOWN = {"lwf/known": torch.tensor(1)}


@cache
def batch_of(folder: Path, size: int = 4) -> dict[str, Tensor]:
    """Samples of both tasks, whose answers differ in length."""
    samples = [task.train.samples[index] for task in toy_tasks() for index in range(size // 2)]
    return collator_of(folder)(samples)


@torch.no_grad()
def stir(model: nn.Module, size: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    """Give every guard a step, as training would, and return the steps by weight."""
    generator, steps = torch.Generator().manual_seed(seed), {}
    for path, one in guards(model).items():
        steps[path] = size * torch.randn(one.delta.shape, generator=generator)
        one.delta.copy_(steps[path])
    return steps


def made(name: str, **settings):
    """The method `name` with what it takes of the common settings, and its own."""
    known = load_method(name).__dataclass_fields__
    common = {key: value for key, value in SETTINGS.items() if key in known}
    return load_method(name)(**common | settings)


def operated(folder: Path, name: str, memory: Memory | None = None, **settings) -> tuple:
    """A model after the surgery of method `name`, and the method."""
    model, method = load(folder), made(name, **settings)
    method.before_task(model, toy_tasks()[1], Memory() if memory is None else memory)
    return model, method


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    p = (p_logits.double() / temperature).exp()
    q = (q_logits.double() / temperature).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


# --- the teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, settings", [(NATIVE, {}), (ROUTED, {"num_experts": 4})])
def test_the_teacher_is_the_model_before_the_task_bitwise(tiny_folder, kind, settings):
    model, _ = operated(tiny_folder[kind], "lwf", **settings)
    batch = batch_of(tiny_folder[kind])
    stir(model, seed=1)
    for one in guards(model).values():
        advance(one)  # an earlier task
    asked = {key: value for key, value in batch.items() if key != "labels"}
    before = logits(model, asked)
    stir(model, seed=2)
    modes = {name: module.training for name, module in model.train().named_modules()}
    assert torch.equal(incoming(model, batch).logits, before)
    assert (logits(model, asked) - before).norm() > 0.01 * before.norm()
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_divergence_is_its_formula_and_has_the_gradient_of_it():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(6, 5, generator=generator) for _ in range(2))
    share = torch.rand(6, generator=generator)
    for temperature in (1.0, 2.0):
        now, exact = after.clone().requires_grad_(), after.double().requires_grad_()
        found = divergence(before, now, share, temperature=temperature)
        expected = (share * kl(before, exact, temperature)).sum()
        found.backward()
        expected.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (now.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()
    still = before.clone().requires_grad_()
    divergence(before, still, share).backward()
    assert (still.grad == 0).all()  # and no rounding, which Adam would make whole steps of


def test_tokens_share_a_sample_and_samples_share_the_batch():
    mask_BT = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    expected = torch.tensor([[1 / 6, 1 / 6, 0, 0], [0, 0, 0, 1 / 3], [0, 0, 0, 0]])
    assert torch.allclose(token_share(mask_BT), expected)


# --- lwf ------------------------------------------------------------------------------------------


def test_lwf_is_hintons_term_on_the_answers_of_each_sample(tiny_folder):
    folder = tiny_folder[NATIVE]
    model, method = operated(folder, "lwf", strength=3.0)
    batch = batch_of(folder)
    stir(model)
    outputs = model(**batch, use_cache=False)
    found = method.loss(model, batch, outputs, Memory(KNOWN))
    before = logits(load(folder), {k: v for k, v in batch.items() if k != "labels"})
    of_samples = []
    for sample in range(4):
        answer = [t for t in range(1, batch["labels"].shape[1]) if batch["labels"][sample, t] >= 0]
        assert answer
        rows = [kl(before[sample, t - 1], outputs.logits[sample, t - 1], 2.0) for t in answer]
        of_samples.append(sum(rows) / len(rows))
    expected = 3.0 * 2.0**2 * sum(of_samples) / 4
    assert expected > 1e-4
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    assert all(one.delta.grad.norm() > 0 for one in guards(model).values())


def test_nothing_is_held_before_there_is_anything_known(tiny_folder):
    folder = tiny_folder[NATIVE]
    for name in ("lwf", "router_kl", "ewc"):
        model, method = operated(folder, name)
        assert method.loss(model, batch_of(folder), None, Memory()) is None


def test_lwf_says_at_its_first_step_that_labels_are_missing(tiny_folder):
    folder = tiny_folder[NATIVE]
    with pytest.raises(ValueError, match="leave label_smoothing_factor"):
        learn(
            load(folder), folder, made("lwf"), toy_tasks()[0], Memory(), label_smoothing_factor=0.1
        )


@pytest.mark.parametrize("name", ["lwf", "router_kl", "ewc", "olora"])
def test_the_term_of_a_second_task_counts_once_however_the_batch_is_cut(name, tiny_folder):
    folder, ends = tiny_folder[NATIVE], []
    extra = {"buffer_bytes": 2**16} if name == "router_kl" else {}
    for accumulation in (1, 2):
        method = load_method(name)(**SETTINGS | extra)
        model, memory, (first, second) = load(folder), Memory(), toy_tasks()
        learn(model, folder, method, first, memory, steps=2, learning_rate=1e-2)
        cut = {"accumulation": accumulation, "learning_rate": 1e-2, "past": [first]}
        told = learn(model, folder, method, second, memory, steps=3, **cut)
        ends.append(told.losses)
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


# --- routers --------------------------------------------------------------------------------------


def in_and_out(model: nn.Module, batch: dict[str, Tensor], *, train: bool) -> dict[str, tuple]:
    """What native routers were given and returned in a forward."""
    seen = {}
    handles = [
        router.register_forward_hook(
            lambda module, args, output, path=path: seen.update(
                {path: (args[0].detach().flatten(0, -2), output)}
            )
        )
        for path, router in routers(model).items()
    ]
    model.train(train)(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_router_kl_is_the_mean_over_routers_of_the_mean_over_samples(tiny_folder):
    folder = tiny_folder[NATIVE]
    model, method = operated(folder, "router_kl", strength=2.0)
    batch, base = batch_of(folder), load(folder)
    steps = stir(model)
    outputs = model.train()(**batch, use_cache=False)
    found = method.loss(model, batch, outputs, Memory({"router_kl/known": torch.tensor(1)}))
    before, now = in_and_out(base, batch, train=False), in_and_out(model, batch, train=False)
    mask_BT, of_routers = batch["attention_mask"].bool(), []
    for path, router in routers(base).items():
        weight = router.weight.double()
        first = before[path][0].double() @ weight.T
        last = now[path][0].double() @ (weight + steps[f"{path}.weight"].double()).T
        kl_BT = kl(first, last).view(mask_BT.shape)
        of_routers.append(sum(kl_BT[b][mask_BT[b]].mean() for b in range(4)) / 4)
    assert len(of_routers) == 3 and min(of_routers) > 1e-5
    expected = 2.0 * sum(of_routers) / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_router_kl_hears_the_routers_of_lora_mixtures(tiny_folder):
    folder = tiny_folder[ROUTED]
    model, method = operated(folder, "router_kl", num_experts=4)
    batch = batch_of(folder)
    memory = Memory({"router_kl/known": torch.tensor(1)})
    term = method.loss(model, batch, model(**batch, use_cache=False), memory)
    assert term.item() == 0.0  # nothing has moved yet
    stir(model)
    term = method.loss(model, batch, model(**batch, use_cache=False), memory)
    term.backward()
    assert term > 1e-5 and len(resting_experts(model)) == 6
    found = {path: one.delta.grad for path, one in guards(model).items()}
    assert all(g.norm() > 0 for path, g in found.items() if "router" in path)


def test_router_kl_counts_the_routers_that_a_batch_reaches():
    """Ernie routes text and images apart; what a router said to another batch is forgotten."""
    model, method = FAMILIES["ernie4_5_vl_moe"](), made("router_kl")
    method.before_task(model, toy_tasks()[0], Memory())
    text, mixed = inputs(model), inputs(model)
    mixed["moe_mm_token_type_ids"] = (mixed["input_ids"] < 50).int()
    pictures = inputs(model) | {"moe_mm_token_type_ids": torch.ones_like(text["input_ids"])}
    stir(model)
    model.train()
    terms = []
    for batch in (text, mixed, text, pictures):
        method.before_forward(model, batch, Memory())
        outputs = model(**batch, use_cache=False)
        memory = Memory({"router_kl/known": torch.tensor(1)})
        terms.append(method.loss(model, batch, outputs, memory).item())
        model(**mixed, use_cache=False)  # of which nobody asks
    assert terms[0] == terms[2] > 1e-5 and abs(terms[1] - terms[0]) > 1e-5 < terms[3]


def test_router_kl_counts_patches_alike_even_where_there_are_as_many_as_tokens():
    model, terms = FAMILIES["llava"](), []
    method = made("router_kl", lora_target_modules=".*vision_tower.*q_proj", num_experts=4)
    method.before_task(model, toy_tasks()[0], Memory())
    stir(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)  # 5 patches each
    ids = torch.tensor([[20, *[127] * 8, 21]])
    for padding in (0, 1):
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        outputs = model(**batch, use_cache=False)
        memory = Memory({"router_kl/known": torch.tensor(1)})
        terms.append(method.loss(model, batch, outputs, memory).item())
    assert terms[0] == terms[1] > 1e-5


def test_a_buffer_of_no_bytes_makes_router_kl_free_of_rehearsal():
    kind = load_method("router_kl")
    assert kind().rehearsal and not kind(buffer_bytes=0).rehearsal


def test_replayed_tokens_go_where_the_incoming_model_sent_them_with_weights_of_now(tiny_folder):
    """R3: I_i exp(s_i) / sum_j I_j exp(s_j), I the choice of before, s the logits of now."""
    folder = tiny_folder[NATIVE]
    model, method = operated(folder, "router_replay")
    batch, base = batch_of(folder), load(folder)
    steps = stir(model, 0.5)
    before = in_and_out(base, batch, train=False)
    own = in_and_out(model, batch, train=False)
    method.before_forward(model, batch, Memory({"router_replay/known": torch.tensor(1)}))
    now, differ = in_and_out(model, batch, train=True), 0
    for path, router in routers(base).items():
        input_TD, (_, weight_TK, index_TK) = now[path]
        chosen_TK = (before[path][0].double() @ router.weight.double().T).topk(2).indices
        assert torch.equal(index_TK.sort().values, chosen_TK.sort().values)
        effective_ED = router.weight.double() + steps[f"{path}.weight"].double()
        score_TE = (input_TD.double() @ effective_ED.T).exp()
        expected_TK = score_TE.gather(-1, index_TK)
        expected_TK = expected_TK / expected_TK.sum(-1, keepdim=True)
        assert (weight_TK - expected_TK).abs().max() < 1e-5
        differ += int((own[path][1][2].sort().values != chosen_TK.sort().values).sum())
    assert differ > 10  # by themselves they would go elsewhere
    assert isinstance(router, Qwen3VLMoeTextTopKRouter)


def test_in_evaluation_and_after_the_task_routers_choose_by_themselves(tiny_folder):
    folder = tiny_folder[NATIVE]
    model, method = operated(folder, "router_replay")
    batch, memory = batch_of(folder), Memory({"router_replay/known": torch.tensor(1)})
    stir(model, 0.5)
    own = in_and_out(model, batch, train=False)
    method.before_forward(model, batch, memory)
    assert all(
        torch.equal(own[path][1][2], output[2])
        for path, (_, output) in in_and_out(model, batch, train=False).items()
    )
    method.after_task(model, toy_tasks()[1], memory, (), lambda tensor: tensor)
    free = in_and_out(model, batch, train=True)
    assert all(torch.equal(own[path][1][2], free[path][1][2]) for path in own)


@pytest.mark.parametrize("kind, settings", [(NATIVE, {}), (ROUTED, {"num_experts": 4, "top_k": 2})])
def test_checkpointing_replays_the_same_choices(tiny_folder, kind, settings):
    folder, found = tiny_folder[kind], []
    batch = batch_of(folder)
    for checkpointing in (False, True):
        model, method = operated(folder, "router_replay", **settings)
        stir(model, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        method.before_forward(model, batch, Memory({"router_replay/known": torch.tensor(1)}))
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        found.append([loss, *(one.delta.grad for one in guards(model).values())])
        moved = {path: one.delta.grad.norm() for path, one in guards(model).items()}
        assert all(moved.values())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_what_was_chosen_by_a_mixture_is_chosen_again(tiny_folder):
    folder = tiny_folder[ROUTED]
    model, _ = operated(folder, "router_replay", num_experts=4, top_k=2)
    batch, chosen = batch_of(folder), []
    moe = next(iter(resting_experts(model).values()))
    route = moe.route
    moe.route = lambda input_TD: chosen.append(route(input_TD)) or chosen[-1]
    note_choices(model, lambda: incoming(model, batch))
    stir(model, 0.5)
    model.train()(**batch, use_cache=False)
    model.eval()(**batch, use_cache=False)
    before, replayed, own = ((weight_TE > 0) for weight_TE in chosen)
    assert torch.equal(before, replayed) and not torch.equal(before, own)


def test_mixtures_within_a_block_of_experts_choose_apart_from_it():
    """A shared expert with mixtures of its own answers inside the block that routes."""
    model, chosen = FAMILIES["qwen3_5_moe"](), {}
    settings = SETTINGS | {"lora_target_modules": "all-linear", "num_experts": 4, "top_k": 2}
    load_method("router_replay")(**settings).before_task(model, toy_tasks()[1], Memory())
    assert any(".shared_expert." in path for path in resting_experts(model))
    for path, one in experts(model).items():
        one.module.register_forward_pre_hook(
            lambda module, args, path=path: chosen.setdefault(path, []).append(args[1])
        )
    batch = inputs(model)
    note_choices(model, lambda: incoming(model, batch))
    stir(model, 0.5)
    model.train()(**batch, use_cache=False)
    model.eval()(**batch, use_cache=False)
    for before, replayed, own in chosen.values():
        assert torch.equal(before, replayed) and not torch.equal(before, own)
    assert len(chosen) == 3


def test_a_router_that_chooses_by_other_means_than_top_k_is_refused():
    model = FAMILIES["phimoe"]()  # by the largest twice
    replay_choices(model)
    with pytest.raises(ValueError, match="layers.0.mlp chooses its experts by other means"):
        note_choices(model, lambda: incoming(model, inputs(model)))


@pytest.mark.parametrize(
    "name, settings, sentence",
    [
        ("router_replay", {}, "LlavaForConditionalGeneration has none. Set num_experts"),
        ("router_replay", {"num_experts": 4}, "all 4 experts answer.*Set top_k to less"),
        ("router_kl", {}, "LlavaForConditionalGeneration has none"),
    ],
)
def test_a_model_without_a_choice_to_hold_is_refused(tiny_folder, name, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        operated(tiny_folder[ROUTED], name, **settings)


def test_listening_changes_no_output_and_survives_folding(tiny_folder, tmp_path):
    folder = tiny_folder[NATIVE]
    model = load(folder)
    batch = {k: v for k, v in batch_of(folder).items() if k != "labels"}
    before = logits(model, batch)
    listen(model)
    replay_choices(model)
    assert torch.equal(logits(model, batch), before)
    assert all(said.logits_NE.dtype == torch.float32 for said in heard(model).values())
    load_method("router_kl")(**SETTINGS).before_task(model, toy_tasks()[0], Memory())
    fold(model)
    assert torch.equal(logits(model, batch), before)


# --- ewc ------------------------------------------------------------------------------------------


def in_float64(folder: Path, steps: dict[str, Tensor], method) -> nn.Module:
    """The plain model in float64 with the same adapters, moved by `steps`."""
    model = load(folder)
    load_method("finetune")(**SETTINGS).before_task(model, toy_tasks()[0], Memory())
    model.double().set_experts_implementation("eager")  # the grouped kernel is of fp32
    with torch.no_grad():
        for path, step in steps.items():
            model.get_parameter(path).add_(step.double())
    return model.eval()


def test_ewc_keeps_the_mean_of_squared_gradients_of_single_samples(tiny_folder):
    folder, memory = tiny_folder[NATIVE], Memory()
    model, method = operated(folder, "ewc", fisher_samples=5)
    steps = stir(model)
    samples, collator = toy_tasks()[1].train.samples, collator_of(folder)
    batches = [collator([samples[index]]) for index in range(7)]  # two more than are asked for
    method.after_task(model, toy_tasks()[1], memory, batches, lambda tensor: tensor)
    exact, total = in_float64(folder, steps, method), {}
    for batch in batches[:5]:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        answers = batch.pop("labels")
        rows = exact(**batch, use_cache=False).logits[:, :-1]
        chosen = answers[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(rows[chosen], answers[:, 1:][chosen])
        names = list(steps)
        gradients = torch.autograd.grad(loss, [exact.get_parameter(name) for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            total[name] = total.get(name, 0) + gradient.square()
    fisher = memory.under("ewc/fisher")
    assert fisher.keys() == total.keys() and len(fisher) == 15
    for name, value in fisher.items():
        expected = total[name] / 5
        assert expected.norm() > 0
        assert (value - expected).norm() < 1e-4 * expected.norm(), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ewc_pulls_back_with_the_gradient_of_its_formula(tiny_folder):
    folder, memory = tiny_folder[NATIVE], Memory()
    base, _ = operated(folder, "ewc")
    generator = torch.Generator().manual_seed(0)
    for path, one in guards(base).items():
        memory[f"ewc/fisher/{path}"] = torch.rand(one.delta.shape, generator=generator)
    model, method = operated(folder, "ewc", memory, strength=7.0)
    steps = stir(model)
    model.train()(**batch_of(folder), use_cache=False)
    term = method.loss(model, {}, None, memory)
    term.backward()
    fisher = memory.under("ewc/fisher")
    expected = sum(3.5 * (fisher[p].double() * s.double() ** 2).sum() for p, s in steps.items())
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    for path, one in guards(model).items():
        wanted = 7.0 * fisher[path].double() * steps[path].double()
        assert (one.delta.grad - wanted).norm() < 1e-5 * wanted.norm()
    assert due(model) is None  # asked and paid


def test_ewc_sums_over_tasks_and_forgets_by_its_decay(tiny_folder):
    folder, kept = tiny_folder[NATIVE], {}
    collator, samples = collator_of(folder), toy_tasks()[0].train.samples
    batches = [[collator([samples[index]])] for index in range(2)]
    for decay in (1.0, 0.25):
        model, method = operated(folder, "ewc", decay=decay)
        memory = Memory()
        stir(model)
        for batch in batches:
            method.after_task(model, toy_tasks()[0], memory, batch, lambda tensor: tensor)
        kept[decay] = memory.under("ewc/fisher")
    assert method.forecast_bytes(model, 1) == memory.num_bytes
    for name in kept[1.0]:
        first = (kept[1.0][name] - kept[0.25][name]) / 0.75
        assert (first > -1e-9).all() and first.norm() > 0
        assert (kept[1.0][name] - first > -1e-9).all()


def test_a_fisher_information_that_is_no_number_is_refused(tiny_folder):
    folder, memory = tiny_folder[NATIVE], Memory()
    model, method = operated(folder, "ewc")
    guards(model)[next(reversed(guards(model)))].displacement.fill_(1e30)
    with pytest.raises(ValueError, match="the Fisher information of model.* is not finite"):
        method.after_task(model, toy_tasks()[1], memory, [batch_of(folder)], lambda tensor: tensor)


def test_a_memory_of_other_weights_is_refused(tiny_folder):
    memory = Memory({"ewc/fisher/elsewhere.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="measured at other weights"):
        operated(tiny_folder[NATIVE], "ewc", memory)


@pytest.mark.parametrize("name", ["ewc", "router_kl"])
def test_reentrant_checkpointing_leaves_no_graph_and_says_so(name, tiny_folder):
    folder = tiny_folder[NATIVE]
    base, _ = operated(folder, "ewc")
    fisher = {f"ewc/fisher/{p}": torch.ones(g.delta.shape) for p, g in guards(base).items()}
    model, _ = operated(folder, name, Memory(fisher))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant: false"):
        model.train()(**batch_of(folder), use_cache=False)


# --- olora ----------------------------------------------------------------------------------------


def test_olora_adds_up_all_tasks_and_pays_for_every_overlap(tiny_folder):
    folder, (first, second) = tiny_folder[NATIVE], toy_tasks()
    model, memory = load(folder), Memory()
    method = load_method("olora")(**SETTINGS, strength=0.3)
    learn(model, folder, method, first, memory, learning_rate=1e-2)
    after_first = logits(model, {k: v for k, v in batch_of(folder).items() if k != "labels"})
    kept = copy.deepcopy([layer.state_dict() for layer in lora_layers(model).values()])
    method.before_task(model, second, memory)
    batch = batch_of(folder)
    assert torch.equal(
        logits(model, {k: v for k, v in batch.items() if k != "labels"}), after_first
    )
    method.before_forward(model, batch, memory)
    model.train()(**batch, use_cache=False)
    term, expected, wanted = method.loss(model, batch, None, memory), 0.0, []
    for layer in lora_layers(model).values():
        one, two = (layer.lora_A[name].weight.detach().double() for name in ("task_1", "task_2"))
        expected += 0.3 * (one @ two.T).abs().sum()
        wanted.append(0.3 * (two @ one.T).sign() @ one)
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    term.backward()
    for layer, gradient in zip(lora_layers(model).values(), wanted, strict=True):
        assert (layer.lora_A["task_2"].weight.grad - gradient).norm() < 1e-5 * gradient.norm()
        assert layer.lora_A["task_1"].weight.grad is None
    told = learn(model, folder, method, second, memory, learning_rate=1e-2)
    assert all(".task_2." in name for name in told.trained)
    for layer, before in zip(lora_layers(model).values(), kept, strict=True):
        now = layer.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())
        x, base = torch.randn(3, layer.in_features), layer.get_base_layer()
        exact = base.weight.double() @ x.double().T
        for name in ("task_1", "task_2"):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            exact = exact + layer.scaling[name] * b.double() @ a.double() @ x.double().T
        assert (layer(x) - exact.T).norm() < 1e-5 * exact.norm()


def test_rows_that_froze_owe_nothing_any_more(tiny_folder):
    folder, memory, (_, second) = tiny_folder[NATIVE], Memory(), toy_tasks()
    model, method = load(folder), made("olora", strength=0.3)
    for index in (2, 3):
        method.before_task(model, replace(second, index=index), memory)
        method.before_forward(model, batch_of(folder), memory)
    model.train()(**batch_of(folder), use_cache=False)
    expected = 0.0
    for layer in lora_layers(model).values():
        *past, now = (one.weight.detach().double() for one in layer.lora_A.values())
        assert len(past) == 2
        expected += 0.3 * (torch.cat(past) @ now.T).abs().sum()
    assert method.loss(model, {}, None, memory).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_rows_of_a_second_task_turn_away_from_those_of_the_first(tiny_folder):
    folder, overlaps = tiny_folder[NATIVE], []
    for strength in (1e-9, 5.0):
        model, memory, method = load(folder), Memory(), load_method("olora")
        for task in toy_tasks():
            one = method(**SETTINGS, strength=strength)
            learn(model, folder, one, task, memory, learning_rate=1e-2, steps=8)
        total = 0.0
        for layer in lora_layers(model).values():
            a, b = (layer.lora_A[name].weight.detach() for name in ("task_1", "task_2"))
            total += float((a @ b.T).abs().sum() / a.norm() / b.norm())
        overlaps.append(total)
    assert overlaps[1] < 0.5 * overlaps[0]


# --- osf ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer, leaks", [("sgd", False), ("adamw_torch", True)])
def test_osf_keeps_to_the_minor_directions_of_the_weight_as_far_as_gradients_go(
    optimizer, leaks, tiny_folder
):
    """PEFT projects gradients, and AdamW makes other steps of them."""
    folder, memory = tiny_folder[NATIVE], Memory()
    model, base = load(folder), load(folder)
    rate = {"optim": optimizer, "learning_rate": 1.0 if optimizer == "sgd" else 1e-3}
    told = learn(model, folder, made("osf"), toy_tasks()[0], memory, weight_decay=0.0, **rate)
    assert told.losses[-1] < told.losses[0]
    for path, weight in memory.under("osf/weight").items():
        before = base.get_submodule(path).weight.detach().double()
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        change, half = weight.double() - before, len(s) // 2
        inside = torch.stack([(u[:, :half].T @ change).norm(), (change @ v[:half].T).norm()])
        share = inside.max() / change.norm()
        assert share > 0.05 if leaks else share < 1e-3, path  # fp32 weights of size 1


def test_osf_splits_the_weights_that_the_last_task_left(tiny_folder):
    folder, memory, (first, second) = tiny_folder[NATIVE], Memory(), toy_tasks()
    model, method = load(folder), made("osf")
    learn(model, folder, method, first, memory, learning_rate=1e-2)
    assert memory.num_bytes == method.forecast_bytes(model, 1)
    batch = {k: v for k, v in batch_of(folder).items() if k != "labels"}
    learnt = logits(model, batch)
    assert (learnt - logits(load(folder), batch)).norm() > 0.01 * learnt.norm()
    method.before_task(model, second, memory)
    method.start_task(model, second, memory, (), lambda tensor: tensor)
    assert (logits(model, batch) - learnt).norm() < 1e-5 * learnt.norm()
    for path, layer in osf.layers(model).items():
        weight = memory[f"osf/weight/{path}"]
        assert torch.equal(layer.base_layer.weight, weight)
        found = layer.osf_svd_params["default"]["S_low"].double()
        expected = torch.linalg.svdvals(weight.double())[-len(found) :]
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_osf_is_refused_where_its_hooks_do_not_fire():
    with pytest.raises(ValueError, match="'osf' cannot run on fsdp2"):
        check_engine(load_method("osf")(), "fsdp2")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, sentence",
    [
        ("lwf", {"temperature": 0.0}, "temperature must be positive, found 0.0"),
        ("lwf", {"strength": -1.0}, "strength must be positive"),
        ("router_kl", {"strength": 0.0}, "a positive strength"),
        ("router_kl", {"buffer_bytes": -1}, "a buffer of 0 bytes or more"),
        ("ewc", {"strength": 0.0}, "expected a positive strength"),
        ("ewc", {"decay": 1.5}, r"a decay in \[0, 1\]"),
        ("ewc", {"fisher_samples": 0}, "at least one sample"),
        ("olora", {"strength": 0.0}, "strength must be positive"),
        ("olora", {"num_experts": 4}, "one plain LoRA per task, found num_experts 4"),
        ("olora", {"use_peft": False}, "use_peft False"),
        ("olora", {"experts": "lora"}, "olora trains linears, found 'experts: lora'"),
        ("olora", {"experts": "whole"}, "found 'experts: whole'"),
        ("expert_lora", {"lora_dropout": 0.5}, "0.5 with empty lora_target_modules"),
        ("expert_lora", {"num_experts": 4, "top_k": 2}, "top_k 2 with empty lora_target_modules"),
        ("osf", {"preserved": 1.0}, r"preserved is a share in \(0, 1\), found 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_where_they_are_made(name, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_method(name)(**settings)


@pytest.mark.parametrize("name", names("instruction"))
def test_a_method_that_would_protect_a_superseded_answer_is_refused(name, tmp_path):
    protecting = ("lwf", "ewc", "olora", "osf", "router_kl", "router_replay")
    # Experts alone are what ESFT trains.
    given = ["--tasks.1.supersedes=arrow", "--model.lora_target_modules=[]"][: 1 + (name == "esft")]
    path = recipe(tmp_path / name, "toy:qwen3_vl_moe", name)
    if name not in protecting:
        assert Recipe.load(path, given).tasks[1].supersedes == "arrow"
        return
    with pytest.raises(RecipeError, match=f"tasks.1.supersedes.*{name} would go on protecting"):
        Recipe.load(path, given)


# --- runs -----------------------------------------------------------------------------------------


def assert_drift_of_both(before: dict, after: dict, folder: Path) -> None:
    """What a layer with two adapters answers more than with one is the second's product."""
    model = load(folder)
    made("olora", lora_r=8).before_task(model, toy_tasks()[1], Memory())
    path, layer = next(iter(trained_layers(model).items()))
    x = torch.randn(5, layer.module.in_features)
    a, b = (after[f"{path}.lora_{name}.task_2.weight"].double() for name in ("A", "B"))
    expected = 2.0 * x.double() @ a.T @ b.T
    found = layer.change(before, after, x, None)
    assert expected.norm() > 0 and (found - expected).norm() < 1e-4 * expected.norm()


def second_task(folder: Path, out: Path, name: str, resume: Path | None = None) -> tuple:
    """The losses and displacements of a second task in four steps, from a checkpoint if given."""
    model, memory, (first, second) = load(folder), Memory(), toy_tasks()
    method = made(name)
    learn(model, folder, method, first, memory, steps=2, learning_rate=1e-2)
    samples = method.train_set(second, memory, [first])
    arguments = TrainingArguments(
        str(out),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = continual(Trainer)(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collator_of(folder),
        method=method,
        task=second,
        memory=memory,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    moved = {path: one.displacement for path, one in guards(model).items()}
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], moved, memory


@pytest.mark.parametrize("name", ["router_replay", "router_kl", "lwf", "ewc", "osf"])
def test_a_second_task_goes_on_from_its_middle_as_if_nothing_had_been(name, tiny_folder, tmp_path):
    folder = tiny_folder[NATIVE]
    losses, moved, memory = second_task(folder, tmp_path, name)
    again = second_task(folder, tmp_path / "again", name, tmp_path / "checkpoint-2")
    assert len(losses) == 4 and again[0] == losses
    assert bool(moved) == (name != "osf")  # whose weights are in its memory
    assert all(torch.equal(again[1][path], value) for path, value in moved.items())
    assert memory and dict(memory).keys() == dict(again[2]).keys()
    assert all(torch.equal(again[2][key], value) for key, value in memory.items())


def recipe(folder: Path, model: Path | str, name: str) -> Path:
    folder.mkdir()
    tree = {
        "seed": 1,
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(model), "lora_target_modules": ["q_proj"]},
        "method": {"name": name, "calibration_tokens": 500},
        "tasks": [
            {"name": one, "data": f"toy:{one}", "train_size": 16, "eval_size": 2}
            for one in ("arrow", "word")
        ],
        "training": {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "eval": {"batch_size": 2, "max_new_tokens": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("name", ["olora", "osf"])
def test_a_run_hands_on_what_is_no_displacement_and_resumes_in_its_second_task(
    name, tiny_folder, tmp_path, monkeypatch
):
    step, ends = Trainer.training_step, []

    def cut_off(self, *args, **kwargs):
        if self.task.name == "word" and self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    for broken in (False, True):
        path = recipe(tmp_path / str(broken), tiny_folder[NATIVE], name)
        if broken:
            monkeypatch.setattr(Trainer, "training_step", cut_off)
            with pytest.raises(KeyboardInterrupt):
                run(Recipe.load(path))
            monkeypatch.undo()
            assert checkpoint.newest(path.parent / "run/task_2").name == "checkpoint-2"
        folder = run(Recipe.load(path)) / "task_2"
        log = json.loads((folder / "log.json").read_text())
        losses = [entry["loss"] for entry in log if "loss" in entry]
        ends.append((losses, load_file(folder / "state.safetensors")))
    assert ends[0][0] == ends[1][0] and len(ends[0][0]) == 4
    assert ends[0][1].keys() == ends[1][1].keys()
    assert all(torch.equal(ends[1][1][key], value) for key, value in ends[0][1].items())
    first = load_file(folder.parent / "task_1/state.safetensors")
    if name == "olora":
        assert any(".task_1." in key for key in first) and len(ends[0][1]) == 2 * len(first)
        assert all(torch.equal(ends[0][1][key], value) for key, value in first.items())
        assert_drift_of_both(first, ends[0][1], tiny_folder[NATIVE])
        return
    past, now = (Memory.load(folder.parent / f"task_{n}/memory.safetensors") for n in (1, 2))
    for path, weight in past.under("osf/weight").items():  # the second split what the first left
        u, s, v = (ends[0][1][f"{path}.osf_svd_params.default.{p}"] for p in osf._PARTS)
        left, value, right = torch.linalg.svd(weight.double(), full_matrices=False)
        high = (left[:, : -len(s)] * value[: -len(s)]) @ right[: -len(s)]
        error = now[f"osf/weight/{path}"] - (high + (u.double() * s.double()) @ v.double())
        assert error.norm() < 1e-5 * weight.norm(), path


def test_a_loop_of_ones_own_lets_the_incoming_model_look_first(tiny_folder):
    """Under `learning` as under the Trainer: the hook on the wrapped model is this loop's."""
    folder, ends = tiny_folder[NATIVE], []
    for name in ("router_replay", "olora"):
        model, memory, (first, second) = load(folder), Memory(), toy_tasks()
        method = made(name)
        learn(model, folder, method, first, memory, steps=2, learning_rate=1e-2)
        method.before_task(model, second, memory)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        accelerator = Accelerator(cpu=True)
        loader = DataLoader(second.train, batch_size=8, collate_fn=collator_of(folder))
        wrapped, optimizer, loader = accelerator.prepare(
            model, torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1), loader
        )
        losses = []
        with learning(
            wrapped, loader, task=second, method=method, memory=memory, accelerator=accelerator
        ) as term:
            for batch in loader:
                outputs = wrapped.train()(**batch)
                losses.append(outputs.loss + term(batch, outputs))
                accelerator.backward(losses[-1])
                accelerator.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        other, memory = load(folder), Memory()
        learn(other, folder, method, first, memory, steps=2, learning_rate=1e-2)
        told = learn(other, folder, method, second, memory, steps=4)
        ends.append(([loss.item() for loss in losses], told.losses))
    for found, expected in ends:
        assert len(found) == 4 and found == pytest.approx(expected, rel=1e-5)
