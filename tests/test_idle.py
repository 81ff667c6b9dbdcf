"""Experts that a batch leaves out take part in it, and nothing about the batch changes by it."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, inputs
from mllm_cl import Memory, load_method, routers
from mllm_cl.model.idle import idle, visit_idle
from mllm_cl.model.watch import Watch
from mllm_cl.truth import NotTraining, Trial
from toy_run import toy_tasks


def operated(**settings) -> nn.Module:
    """An Ernie, which routes text and pictures apart, with what trains of it."""
    model = FAMILIES["ernie4_5_vl_moe"]()
    method = load_method("finetune")(**{"lora_target_modules": (), **settings})
    method.before_task(model, toy_tasks()[0], Memory())
    return model.train()


def text(model: nn.Module) -> dict[str, Tensor]:
    batch = inputs(model)
    return batch | {"labels": batch["input_ids"]}


def mixed(model: nn.Module) -> dict[str, Tensor]:
    batch = text(model)
    return batch | {"moe_mm_token_type_ids": (batch["input_ids"] < 50).int()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("experts", "implementation"),
    [("lora", None), *product(("whole", "frozen"), ("grouped_mm", "eager"))],
)
def test_after_a_batch_of_text_every_tensor_that_trains_has_a_gradient(
    experts, implementation, checkpointing
):
    model = operated(experts=experts)
    if implementation is not None:  # adapters have one of their own
        model.set_experts_implementation(implementation)
    batch = text(model)
    before = model(**batch).logits
    visit_idle(model)
    visit_idle(model)  # as for a second task
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs = model(**batch)
    assert torch.equal(outputs.logits, before)
    outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    pictures = {name: grad for name, grad in grads.items() if "vision_moe" in name}
    assert all(grad is not None for grad in grads.values())
    assert pictures and not any(grad.any() for grad in pictures.values())
    assert any(grad.any() for name, grad in grads.items() if name not in pictures)
    assert torch.equal(model(**batch).logits, before)  # the experts that stood in are gone
    assert idle(model) == {name.partition("vision_moe")[0] + "vision_moe" for name in pictures}


def test_a_batch_that_reaches_all_experts_is_left_alone():
    model = operated(experts="lora")
    batch, found = mixed(model), []
    for visited in (False, True):
        if visited:
            visit_idle(model)
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        found.append([outputs.logits, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not idle(model)


def test_a_visit_is_counted_nowhere():
    model = operated(experts="lora")
    visit_idle(model)
    found, batch = routers(model), text(model)
    with Watch(model, found, found) as watch:
        model(**batch)
        assert {path for path in watch.source_of if "vision" in path} == set()
        model(**mixed(model))
    pictures = int(mixed(model)["moe_mm_token_type_ids"].sum())
    for path in found:
        expected = pictures if "vision" in path else 28 - pictures
        assert watch.trackers[watch.source_of[path]].count == expected
        assert watch.use[path].count == expected


@pytest.mark.parametrize("reaches", [False, True])
def test_experts_without_a_token_to_learn_from_are_no_flaw(reaches):
    """The gate of the text is one that stands still where nothing of it is asked."""
    model = operated(experts="frozen")
    visit_idle(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with Trial(model) as trial:
        for _ in range(3):
            batch = text(model)
            trial.look(batch)
            loss = model(**batch).loss * (1 if reaches else 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if reaches:
            trial.judge()
        else:
            with pytest.raises(NotTraining, match="2 of 4 trained tensors had no gradient"):
                trial.judge()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ernie4_5_vl_moe"])
def test_a_model_with_one_router_to_a_block_is_left_alone(name):
    model = FAMILIES[name]()
    visit_idle(model)
    assert not any("visits" in vars(module) for module in model.modules())
