"""The balancing loss: its formula in float64, what it reaches, and that nothing counts twice.

N tokens, E experts, D model width.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from families import FAMILIES, inputs
from mllm_cl import Memory, load_method, routers
from mllm_cl.drift.balance import load_balance
from mllm_cl.method import Tuned, names
from mllm_cl.model.anatomy import top_k
from mllm_cl.model.routing import heard, imbalance, listen_for_balance
from mllm_cl.model.surgery import guards
from toy_run import collator_of, learn, load, toy_tasks

SETTINGS = {"lora_target_modules": ("q_proj", "o_proj"), "lora_r": 4, "calibration_tokens": 500}
SWITCH = "router_aux_loss_coef"
KIND = "qwen3-vl-moe"


def switch(logits_NE: Tensor, k: int, real_N: Tensor) -> Tensor:
    """E sum_e f_e P_e from the definition, in float64, token by token."""
    weight_NE = logits_NE.double().softmax(-1)
    num_experts, count = logits_NE.shape[-1], torch.zeros(logits_NE.shape[-1]).double()
    for weight_E in weight_NE[real_N]:
        for expert in weight_E.argsort(descending=True)[:k]:
            count[expert] += 1
    return num_experts * (count / real_N.sum() * weight_NE[real_N].mean(0)).sum()


def padded(model: nn.Module) -> dict[str, Tensor]:
    batch = inputs(model)
    batch["attention_mask"][0, :3] = 0
    if type(model).__name__.startswith("Ernie"):  # some of its tokens are said to be a picture's
        batch["moe_mm_token_type_ids"] = (batch["input_ids"] % 3 == 0).int()
    return batch


def entering(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What routers are given in a forward."""
    seen = {}
    handles = [
        router.register_forward_hook(
            lambda module, args, output, path=path: seen.update(
                {path: args[0].detach().flatten(0, -2)}
            )
        )
        for path, router in routers(model).items()
    ]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss", "deepseek_v3", "gemma4", "aria"])
def test_the_loss_is_the_mean_over_routers_of_switchs_on_real_tokens(name):
    model = FAMILIES[name]()
    listen_for_balance(model, routers(model).values())
    batch = padded(model)
    seen, real_N = entering(model, batch), batch["attention_mask"].flatten().bool()
    expected = []
    for path, router in routers(model).items():
        logits_NE = seen[path].double() @ router.weight.double().mT
        if "bias" in dict(router.named_parameters(recurse=False)):
            logits_NE = logits_NE + router.bias.double()
        expected.append(switch(logits_NE, top_k(model)[path], real_N))
    found = imbalance(model, batch["attention_mask"])
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    found.backward()
    assert all(router.weight.grad.norm() > 0 for router in routers(model).values())


def test_a_block_that_shares_tokens_out_is_balanced_over_those_that_each_router_got():
    model = FAMILIES["ernie4_5_vl_moe"]()
    listen_for_balance(model, routers(model).values())
    batch = padded(model)
    seen, expected = entering(model, batch), []
    is_picture_N = batch["moe_mm_token_type_ids"].flatten().bool()
    real_N = batch["attention_mask"].flatten().bool()
    assert 0 < (real_N & is_picture_N).sum() < is_picture_N.sum()
    for path, router in routers(model).items():
        mine_N = is_picture_N if "vision" in path else ~is_picture_N
        logits_NE = seen[path].double() @ router.weight.double().mT
        expected.append(switch(logits_NE, top_k(model)[path], real_N[mine_N]))
    assert len(expected) == 4
    found = imbalance(model, batch["attention_mask"])
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_probabilities_that_pass_for_logits_flatten_a_loss_that_takes_its_own_softmax():
    """Gemma 4's `router_logits` are probabilities."""
    model = FAMILIES["gemma4"]()
    with torch.no_grad():
        for router in routers(model).values():
            router.weight[0] += 3 * router.weight[0]  # one expert stands out
    listen_for_balance(model, routers(model).values())
    batch = inputs(model)
    seen = entering(model, batch)
    expected = []
    for path, router in routers(model).items():
        every_N = torch.ones(len(seen[path])).bool()
        expected.append(switch(seen[path].double() @ router.weight.double().mT, 2, every_N))
    expected = torch.stack(expected).mean()
    found = imbalance(model, batch["attention_mask"])
    returned = tuple(said.logits_NE.softmax(-1) for said in heard(model).values())
    flattened = load_balancing_loss_func(returned, 6, 2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found - 2 > 3 * (flattened - 2) >= 0  # 2 is perfect balance


def test_layers_that_lean_to_opposite_sides_do_not_cancel_out_as_in_transformers_own():
    left, right = torch.tensor([4.0, 4.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0, 4.0])
    layers = tuple(one.expand(10, 4) for one in (left, right))
    pooled = load_balancing_loss_func(layers, 4, 2)
    own = torch.stack([load_balance(layer, 2) for layer in layers]).mean()
    assert pooled.item() == pytest.approx(2.0) and own > 3.8


def test_padding_that_is_no_number_counts_nowhere():
    logits_NE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mask_N = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    broken = logits_NE.where(mask_N[:, None], torch.nan).requires_grad_()
    found = load_balance(broken, 2, mask_N=mask_N)
    found.backward()
    assert found.item() == pytest.approx(switch(logits_NE, 2, mask_N).item(), rel=1e-6)
    assert not broken.grad[~mask_N].any() and broken.grad.isfinite().all()
    assert load_balance(logits_NE, 2, mask_N=torch.zeros(6).bool()) == 0


# --- in training ----------------------------------------------------------------------------------


def made(name: str, **settings) -> Tuned:
    kind = load_method(name)
    common = {k: v for k, v in SETTINGS.items() if kind.__dataclass_fields__[k].default != ()}
    return kind(**common | settings)


def unevenness(model: nn.Module, batch: dict[str, Tensor]) -> float:
    mode = model.training
    with torch.no_grad():
        model.eval()(**batch, use_cache=False)
    model.train(mode)
    return float(imbalance(model, batch["attention_mask"]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["finetune", "same", "router_kl"])
def test_routers_become_more_even_under_adamw(name, checkpointing, tiny_folder):
    folder, ends = tiny_folder[KIND], {}
    batch = collator_of(folder)(toy_tasks()[0].train.samples[:8])
    kept = {"num_experts": 0} if name == "same" else {}
    for coefficient in (1e-9, 1.0):
        model, method = load(folder), made(name, **kept, **{SWITCH: coefficient})
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        learn(model, folder, method, toy_tasks()[0], Memory(), steps=8, learning_rate=3e-3)
        ends[coefficient] = unevenness(model, batch)
    assert ends[1.0] < ends[1e-9] - 0.02, ends


def test_the_term_reaches_every_router_through_its_guard(tiny_folder):
    folder = tiny_folder[KIND]
    model, method = load(folder), made("same", num_experts=0, **{SWITCH: 0.5})
    method.before_task(model, toy_tasks()[0], Memory())
    batch = collator_of(folder)(toy_tasks()[0].train.samples[:4])
    outputs = model(**batch, use_cache=False)
    term = method.term(model, batch, outputs, Memory())
    assert term.item() == pytest.approx(0.5 * imbalance(model, batch["attention_mask"]).item())
    term.backward()
    moved = {path: one.delta.grad for path, one in guards(model).items() if "gate" in path}
    assert len(moved) == 3 and all(grad.norm() > 0 for grad in moved.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_of_a_step_is_the_tasks_and_the_term_of_its_micro_batches(
    accumulation, tiny_folder
):
    folder, task = tiny_folder[KIND], toy_tasks()[0]
    first = {}
    for coefficient in (0.0, 2.0):
        model, method = load(folder), made("finetune", **{SWITCH: coefficient})
        told = learn(model, folder, method, task, Memory(), steps=1, accumulation=accumulation)
        first[coefficient] = told.losses[0]
    model, terms = load(folder), []
    listen_for_balance(model, routers(model).values())
    size = 8 // accumulation
    for start in range(0, 8, size):
        batch = collator_of(folder)(task.train.samples[start : start + size])
        terms.append(unevenness(model, batch))
    expected = first[0.0] + 2.0 * sum(terms) / accumulation
    assert first[2.0] == pytest.approx(expected, rel=1e-5)


def test_without_the_setting_nothing_is_heard_and_training_is_what_it_was(tiny_folder):
    folder, ends = tiny_folder[KIND], []
    for settings in ({}, {SWITCH: 0.0}):
        model = load(folder)
        ends.append(learn(model, folder, made("finetune", **settings), toy_tasks()[0], Memory()))
        assert not any("ear" in vars(module) for module in model.modules())
    assert ends[0].losses == ends[1].losses
    assert all(torch.equal(ends[0].end[name], ends[1].end[name]) for name in ends[0].end)


def test_the_models_own_loss_is_switched_off_and_said_to_be(tiny_folder):
    folder = tiny_folder[KIND]
    model, batch = load(folder), collator_of(folder)(toy_tasks()[0].train.samples[:4])
    plain = model(**batch).loss
    model.config.text_config.output_router_logits = True
    assert model(**batch).loss > plain
    with pytest.warns(UserWarning, match="Qwen3VLMoe.* would add a balancing loss of its own"):
        made("finetune", **{SWITCH: 0.1}).before_task(model, toy_tasks()[0], Memory())
    assert model(**batch).loss == plain


@pytest.mark.parametrize(
    "name",
    [n for n in names() if issubclass(load_method(n), Tuned) and n not in ("esft", "zeroshot")],
)
def test_every_method_that_trains_routers_balances_them(name, tiny_folder):
    model, folder = load(tiny_folder[KIND]), tiny_folder[KIND]
    method = made(
        name,
        **{"train_router": True, "num_experts": 0, SWITCH: 0.1}
        if name != "moe_lora"
        else {"top_k": 2, SWITCH: 0.1},
    )
    method.before_task(model, toy_tasks()[0], Memory())
    batch = collator_of(folder)(toy_tasks()[0].train.samples[:4])
    method.before_forward(model, batch, Memory())
    outputs = model.train()(**batch, use_cache=False)
    assert method.term(model, batch, outputs, Memory()) > 0.1  # 0.2 is perfect balance


@pytest.mark.parametrize(
    "name, settings, sentence",
    [
        ("finetune", {SWITCH: -1.0}, "is 0 or more, found -1.0"),
        ("router_frozen", {SWITCH: 0.1}, "no router trains, so it could only bend"),
        ("same", {SWITCH: 0.1, "router": "frozen"}, "no router trains"),
        ("zeroshot", {SWITCH: 0.1}, "no router trains"),
    ],
)
def test_a_setting_that_could_do_nothing_is_refused(name, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_method(name)(**settings)


@pytest.mark.parametrize(
    "name, settings, sentence",
    [("finetune", {}, "has none"), ("moe_lora", {}, "all LoRA experts answer. Set top_k")],
)
def test_a_model_without_a_choice_to_balance_is_refused(name, settings, sentence, tiny_folder):
    method = made(name, **settings, **{SWITCH: 0.1})
    with pytest.raises(ValueError, match=sentence):
        method.before_task(load(tiny_folder["llava"]), toy_tasks()[0], Memory())


def test_a_choice_of_routers_that_stay_frozen_is_nothing_to_balance(tiny_folder):
    method = made("moe_lora", **{SWITCH: 0.1})
    with pytest.raises(ValueError, match="where routers train all LoRA experts answer"):
        method.before_task(load(tiny_folder[KIND]), toy_tasks()[0], Memory())
