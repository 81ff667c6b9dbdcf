"""LAE: two sides of a calibrated prefix against float64, its slow average, and whole runs."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    Adafactor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from class_cells import assert_alike
from encoders import TRANSFORMERS, backbone, pictures, vit_b16
from launches import launch
from mllm_cl import Memory, Recipe, continual, learning, load_method, run
from mllm_cl.engine import forget
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.sides import sided
from mllm_cl.model.vision import unadapted
from test_class_incremental import recipe
from test_prompts import plain, task

SMALL = {"length": 3, "blocks": (0, 2), "decay": 0.5}
STEPS, FROZEN = 6, 4  # of the runs: the first not below 0.6 of six is the fifth


def learner(model_type: str = "vit", index: int = 1, **settings):
    """LAE and a classifier on which it has done its surgery, its two sides moved apart."""
    method = load_method("lae", "class_incremental")(**(SMALL | settings))
    encoder = Encoder(backbone(model_type))
    model = Classifier(encoder, Prototype(encoder.width))
    method.before_task(model, task(index, 3), Memory())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in sided(model).values():
            for part in (*one.online, *one.offline):
                part += 0.5 * torch.randn(part.shape, generator=generator)
    return method, model


def calibrated(q, k, v, number):
    """Attention whose first keys and values have a softmax of their own beside that of all."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    share = scores.softmax(-1)
    own = share[:, :number] / share[:, :number].sum(-1, keepdim=True)
    return share[:, number:] @ v[number:] + own @ v[:number]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_sides_are_the_papers_in_float64_and_the_surer_one_answers(attention):
    _, model = learner()
    model.encoder.backbone.set_attn_implementation(attention)
    x, halves = pictures(5), []
    for side in (0, 1):
        prefixes = {}
        for block in (0, 2):
            prefix = model.encoder.backbone.layers[block].attention.prefix.pool[side]
            prefixes[block] = prefix.double().expand(5, -1, -1, -1)
        tokens = plain(model.encoder, x, prefixes=prefixes, attend=calibrated)
        halves.append(tokens[:, 0])
    found = model.train()(pixel_values=x).features.double()
    torch.testing.assert_close(found, halves[0], rtol=0, atol=5e-5)
    out = model.eval()(pixel_values=x)
    torch.testing.assert_close(out.features.double(), torch.cat(halves, -1), rtol=0, atol=5e-5)
    weight, bias = model.head.weight.double(), model.head.bias.double()
    probabilities = [(half @ weight.T + bias).softmax(-1) for half in halves]
    expected = torch.stack(probabilities).amax(0)
    torch.testing.assert_close(out.logits.double().exp(), expected, rtol=0, atol=5e-5)
    assert not torch.equal(*(one.argmax(-1) for one in probabilities)), "both sides say the same"
    alone = torch.cat([model(pixel_values=one[None]).logits for one in x])
    torch.testing.assert_close(out.logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_adapter_of_two_sides_is_beside_the_attention_in_float64():
    _, model = learner(adaptation="adapter", rank=4)
    vit, x, halves = backbone("vit").double(), pictures(5).double(), []
    found = {name: one.double() for name, one in model.encoder.backbone.named_parameters()}
    for side in ("online", "offline"):
        h = vit.embeddings(x)
        for place, layer in enumerate(vit.layers):
            y = layer.layernorm_before(h)
            answer = layer.attention(y)[0]
            if place in (0, 2):
                at = f"layers.{place}.attention.adapter.{side}"
                down, down_bias, up, up_bias = (found[f"{at}.{part}"] for part in range(4))
                low = y @ down.T + down_bias
                answer = answer + (0.5 * low * (1 + torch.erf(low / 2**0.5))) @ up.T + up_bias
            h = h + answer
            h = h + layer.mlp(layer.layernorm_after(h))
        halves.append(vit.layernorm(h)[:, 0])
    found = model.eval()(pixel_values=pictures(5)).features.double()
    torch.testing.assert_close(found, torch.cat(halves, -1), rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("adaptation", ["prefix", "adapter"])
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_both_sides_reach_the_features_of_every_family_and_can_be_left_out(model_type, adaptation):
    before = Encoder(backbone(model_type))(pictures())
    _, model = learner(model_type, adaptation=adaptation)
    halves = model.eval().encoder(pictures()).chunk(2, -1)
    assert all((half - before).abs().max() > 1e-3 for half in halves)
    assert not torch.allclose(*halves)
    with unadapted(model.encoder):
        torch.testing.assert_close(model.encoder(pictures()), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_offline_is_an_average_of_all_steps_and_online_rests_at_first(mode):
    method, model = learner(mode=mode, decay=0.9)
    memory, prefixes = Memory(), sided(model)
    generator = torch.Generator().manual_seed(5)
    offline, tasks = None, 3
    for index in range(1, tasks + 1):
        method.start_task(model, task(index), memory, (), lambda tensor: tensor)
        if offline is None and (mode == "released" or index > 1):
            offline = {name: one.online[0].detach().double() for name, one in prefixes.items()}
        for step in range(5):
            method.before_step(model, memory, step / 5)
            rests = step < 3 and (mode == "released" or index > 1)
            assert all(one.resting == rests for one in prefixes.values())
            with torch.no_grad():
                for name, one in prefixes.items():
                    one.online[0] += torch.randn(one.online[0].shape, generator=generator)
                    if offline is not None:
                        offline[name] = 0.9 * offline[name] + 0.1 * one.online[0].double()
        method.after_task(model, task(index), memory, (), lambda tensor: tensor)
        for name, one in prefixes.items():
            expected = one.online[0].double() if offline is None else offline[name]
            torch.testing.assert_close(one.offline[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adaptation", ["prefix", "adapter"])
def test_both_sides_work_in_bf16(adaptation):
    _, model = learner(adaptation=adaptation)
    model.bfloat16()
    x = pictures(3).bfloat16()
    model.train()(pixel_values=x, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.requires_grad)
    assert model.eval()(pixel_values=x).logits.isfinite().all()


@pytest.mark.parametrize("adaptation", ["prefix", "adapter"])
def test_what_rests_has_the_gradient_zero_and_acts_all_the_same(adaptation):
    _, model = learner(adaptation=adaptation)
    x, labels = pictures(4), torch.tensor([0, 1, 2, 0])
    losses = []
    for resting in (False, True):
        model.zero_grad()
        for one in sided(model).values():
            one.resting = resting
        out = model.train()(pixel_values=x, labels=labels)
        out.loss.backward()
        losses.append(float(out.loss.detach()))
        for one in sided(model).values():
            assert one.online[0].grad.any() != resting
            assert one.offline[0].grad is None
        assert model.head.weight.grad.any()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("adaptation", "count"), [("prefix", 76_800), ("adapter", 5 * (5 * 768 + 5 + 768 * 5 + 768))]
)
def test_a_vit_b16_trains_as_many_numbers_as_the_paper_says(adaptation, count):
    model = Classifier(Encoder(vit_b16()), Prototype(768))
    method = load_method("lae", "class_incremental")(adaptation=adaptation)
    method.before_task(model, task(1, 10), Memory())
    trained = [one.numel() for one in model.encoder.parameters() if one.requires_grad]
    assert sum(trained) == count
    assert method.forecast_bytes(model, 10) == 4 * count + 8


def test_a_loop_of_ones_own_cannot_tell_of_steps_and_is_refused():
    method, model = learner()
    accelerator = Accelerator(cpu=True)
    data = [{"pixel_values": one, "labels": 0} for one in pictures(4)]
    model, loader = accelerator.prepare(model, DataLoader(data))
    words = {"task": task(1), "method": method, "memory": Memory(), "accelerator": accelerator}
    with (
        pytest.raises(ValueError, match="lae.*every optimizer step"),
        learning(model, loader, **words),
    ):
        pass


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"frozen": -0.1}])
def test_shares_that_are_none_are_refused(settings):
    with pytest.raises(ValueError, match="from 0 to below 1"):
        learner(**settings)


# The optimizer


def optimizers(weights: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Whose states are tensors, one, and numbers beside them."""
    return [
        torch.optim.AdamW(weights, lr=0.1),
        torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        Adafactor(weights),
    ]


@pytest.mark.parametrize("place", range(3))
def test_what_an_optimizer_forgets_moves_as_if_it_were_new_and_nothing_else_does(place):
    one, other, new = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    optimizer = optimizers([one, other])[place]
    gradients = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    for gradient in gradients[:-1]:
        one.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    forget(optimizer, [one])
    with torch.no_grad():
        new.copy_(one)
    one.grad, other.grad, new.grad = (gradients[-1].clone() for _ in range(3))
    optimizer.step()
    optimizers([new])[place].step()
    assert torch.equal(one, new) and not torch.equal(other, new)


@pytest.mark.parametrize("adaptation", ["prefix", "adapter"])
def test_the_first_steps_after_a_rest_are_no_larger_than_the_rate(adaptation, tmp_path):
    """Were the steps at rest counted by Adam, the tenth would be more than twice the rate."""
    rate, number = 1e-3, 150
    method = load_method("lae", "class_incremental")(
        **SMALL, adaptation=adaptation, frozen=0.9, mode="released"
    )
    encoder = Encoder(backbone("vit"))
    samples = [{"pixel_values": one, "labels": i % 3} for i, one in enumerate(pictures(6))]

    class Steps(TrainerCallback):
        """Where the online sides are after each step."""

        def on_step_end(self, *args, model=None, **kwargs):
            parts = [part for one in sided(model).values() for part in one.online]
            places.append(torch.cat([part.detach().flatten() for part in parts]).clone())

    places, arguments = (
        [],
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=number,
            per_device_train_batch_size=6,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        ),
    )
    trainer = continual(Trainer)(
        model=Classifier(encoder, Prototype(encoder.width)),
        args=arguments,
        train_dataset=samples,
        data_collator=default_data_collator,
        method=method,
        task=task(1, 3),
        memory=Memory(),
        callbacks=[Steps()],
    )
    trainer.train()
    steps = torch.stack(places).diff(dim=0).abs().amax(1)
    woken = steps[int(0.9 * number) - 1 :]
    assert not steps[: -len(woken)].any()
    assert woken[0] == pytest.approx(rate, rel=1e-3)
    assert woken.max() < 1.2 * rate


# Whole runs


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def sided_run(folder: Path, model: Path, **training) -> Recipe:
    tree = recipe(folder, model, "lae").resolved()
    tree["method"] |= SMALL | {"blocks": [0, 2]}
    # Where a gradient is rounding alone, Adam would make a step of it.
    tree["training"] |= {"adam_epsilon": 1e-4} | training
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lae")
    run(sided_run(folder, vit, save_steps=1, save_total_limit=None))
    return folder


def test_a_run_freezes_moves_and_averages_as_it_says(alone):
    states = [load_file(alone / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    at = "encoder.backbone.layers.0.attention.prefix.pool"
    assert torch.equal(states[0][f"{at}.0"], states[0][f"{at}.1"])
    for state in states[1:]:
        assert not torch.equal(state[f"{at}.0"], state[f"{at}.1"])
        assert not torch.equal(state[f"{at}.0"], states[0][f"{at}.0"])


@pytest.mark.parametrize("cut", [FROZEN - 1, FROZEN + 1])
def test_a_run_that_is_cut_off_in_a_task_goes_on_to_the_same_bytes(cut, vit, alone, tmp_path):
    """Checkpoints of a finished stage are gone, so one is made by a run that fails there."""
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    before = {name: (folder / "task_3" / name).read_bytes()
              for name in ("state.safetensors", "memory.safetensors")}  # fmt: skip
    shutil.rmtree(folder / "task_3")
    from transformers import Trainer

    step = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == cut:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run(sided_run(folder, vit, save_steps=1, save_total_limit=None))
    assert (folder / f"task_3/checkpoint-{cut}").exists()
    run(sided_run(folder, vit, save_steps=1, save_total_limit=None))
    for name, written in before.items():
        assert (folder / "task_3" / name).read_bytes() == written


def test_a_step_is_one_however_it_is_cut(vit, alone, tmp_path):
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    run(sided_run(tmp_path, vit, **cut))
    for file in ("state", "memory"):
        found, expected = (load_file(folder / f"task_3/{file}.safetensors")
                           for folder in (tmp_path, alone))  # fmt: skip
        for at in expected:
            torch.testing.assert_close(found[at], expected[at], atol=1e-5, rtol=1e-4, msg=at)


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_after_a_rest_goes_on_on_zero2_as_in_one_process(vit, tmp_path):
    """What rested has made fewer steps than the head, which one checkpoint has to tell apart."""
    words = {"save_steps": 1, "learning_rate": 0.1}
    runs = [sided_run(tmp_path / name, vit, **words).resolved() for name in ("alone", "together")]
    for tree in runs:
        tree["method"] |= {"mode": "released"}
        tree["classes"] |= {"stages": 1}
    run(Recipe.from_tree(runs[0], "recipe.yaml"))
    runs[1]["training"] |= {"per_device_train_batch_size": 3}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(runs[1]))
    launch("zero2", "run_script.py", str(path), returns=1, KILL_AT_STEP=f"{FROZEN + 1}")
    assert (tmp_path / f"together/task_1/checkpoint-{FROZEN + 1}/complete.json").exists()
    launch("zero2", "run_script.py", str(path))
    close = {"stages": (1,), "atol": 1e-5, "rtol": 1e-4}
    assert_alike("zero2", tmp_path / "together", tmp_path / "alone", "state", **close)
