"""Under a bf16 model what trains is fp32: small updates arrive, and nothing else changes."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from mllm_cl import Memory, continual, learning
from mllm_cl.method import Tuned
from mllm_cl.model.precision import narrow, widen
from mllm_cl.model.surgery import guards, restore_state, trained_state
from toy_run import collator_of, logits, probe, toy_tasks

TARGETS = ("q_proj", "o_proj")
WAYS = {
    "lora": Tuned(lora_target_modules=TARGETS),
    "whole": Tuned(lora_target_modules=TARGETS, use_peft=False),
}
RATE = 1e-5


def load(folder, dtype=torch.bfloat16) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def one_step(model: nn.Module, folder, method: Tuned, out, **settings) -> Trainer:
    """A Trainer that is about to make one step of AdamW without decay, of `RATE` per weight."""
    task = toy_tasks()[0]
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return continual(Trainer)(
        model=model,
        args=arguments,
        train_dataset=task.train,
        data_collator=collator_of(folder),
        method=method,
        task=task,
    )


def steps(model: nn.Module, folder, way: str, out, **settings) -> dict[str, torch.Tensor]:
    """What one step adds to every trained weight."""
    trainer = one_step(model, folder, WAYS[way], out, **settings)
    before = trained(trainer.model)
    trainer.train()
    after = trained(trainer.model)
    assert {weight.dtype for weight in (*before.values(), *after.values())} == {torch.float32}
    return {name: after[name] - start for name, start in before.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_small_step_arrives_in_every_weight(way, tiny_folder, tmp_path):
    """Adam's first step is the rate wherever there is a gradient; bf16 would round it away."""
    folder = tiny_folder["qwen3-vl-moe"]
    expected = steps(load(folder).float(), folder, way, tmp_path)
    for autocast in (False, True):
        found = steps(load(folder), folder, way, tmp_path, bf16=autocast)
        assert found.keys() == expected.keys()
        assert any(name.endswith("mlp.gate.weight") for name in found), "a router trains too"
        for name, step in expected.items():
            due = (step.abs() - RATE).abs() < 0.1 * RATE
            arrived = (found[name][due].abs() - RATE).abs() < 0.2 * RATE
            # B is zero at first, so A has no gradient; an expert that no token chose has none.
            assert due.any() == (".lora_A." not in name), name
            assert arrived.float().mean() > 0.9 or not due.any(), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llava", "qwen3-vl-moe"])
def test_an_fp32_master_changes_no_output(way, kind, tiny_folder):
    folder = tiny_folder[kind]
    model, batch = load(folder), probe(folder)
    task = toy_tasks()[0]
    expected = logits(model, batch)
    WAYS[way].before_task(model, task, Memory())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert widen(model) == names and not narrow(model)
    assert torch.equal(logits(model, batch), expected)
    assert widen(model) == [], "widening twice is widening once"
    assert torch.equal(logits(model, batch), expected)


def test_a_float32_model_is_left_alone(tiny_folder):
    model = load(tiny_folder["llava"], torch.float32)
    WAYS["whole"].before_task(model, toy_tasks()[0], Memory())
    assert widen(model) == []
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_one_task_hands_to_the_next_is_not_rounded(tiny_folder, tmp_path):
    folder = tiny_folder["llava"]
    base = {name for name, _ in load(folder).named_parameters()}
    first = one_step(load(folder), folder, WAYS["whole"], tmp_path)
    first.train()
    state = trained_state(first.bare_model(), base)
    second = one_step(load(folder), folder, WAYS["whole"], tmp_path)
    restore_state(second.model, state)
    for name, weight in trained(second.model).items():
        assert torch.equal(weight, state[name])
        assert not torch.equal(weight, weight.bfloat16().float()), f"{name} did not move"


def test_a_loop_that_would_round_its_updates_away_is_refused(tiny_folder):
    folder, task = tiny_folder["llava"], toy_tasks()[0]
    model, method = load(folder), WAYS["whole"]
    method.before_task(model, task, Memory())
    accelerator = Accelerator(cpu=True)
    collator = collator_of(folder)
    wrapped, loader = accelerator.prepare(model, DataLoader(task.train, 8, collate_fn=collator))
    settings = {"task": task, "method": method, "memory": Memory(), "accelerator": accelerator}
    with (
        pytest.raises(ValueError, match=r"trained weights are bfloat16.*widen\(model\)"),
        learning(wrapped, loader, **settings),
    ):
        pass
    widen(model)
    with learning(wrapped, loader, **settings):
        assert not guards(model)
