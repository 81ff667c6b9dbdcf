"""Batches without a picture: the vision tower takes part all the same, and not a bit changes.

That this lets two processes train, one of them on text alone, is shown on every engine by the mixed
cases of `test_engines.py`.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from families import FAMILIES, inputs
from mllm_cl import Task, continual, engine, load_method
from mllm_cl.data.chat import ChatCollator, picture_inputs
from mllm_cl.data.toy import toy_task
from mllm_cl.metrics.answers import metric
from mllm_cl.model.tiny import KINDS, tiny_model, toy_processor, toy_tokenizer
from mllm_cl.model.tower import guard_picture, show_guard_picture
from mllm_cl.model.watch import Watch, measure

WORDS = (("What is one and one?", "two"), ("Say red.", "red"), ("A longer question?", "yes no"))


def text_sample(number: int) -> dict:
    asked, answered = WORDS[number % len(WORDS)]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": asked}]},
        {"role": "assistant", "content": [{"type": "text", "text": answered}]},
    ]
    return {"id": f"text-{number}", "messages": messages, "images": []}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def guarded(kind: str) -> nn.Module:
    """A tiny model that looks at a guard picture where a batch has none."""
    model = tiny_model(kind, toy_tokenizer(), seed=0)
    show_guard_picture(model, picture_inputs(toy_processor(kind)))
    return model


def collated(kind: str, *samples: dict) -> dict[str, torch.Tensor]:
    return ChatCollator(toy_processor(kind))(samples)


def looks(model: nn.Module, call: Callable[[], object]) -> int:
    """How often the vision tower runs in a call."""
    runs: list[int] = []
    tower = model.model.visual if "visual" in vars(model.model)["_modules"] else None
    tower = model.model.vision_tower if tower is None else tower
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    call()
    handle.remove()
    return len(runs)


def outcome(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss, logits and gradients of a batch."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), gradients


def test_the_loss_of_text_keeps_every_bit_beside_the_guard_picture(kind, guarded):
    batch = collated(kind, *map(text_sample, range(3)))
    assert "pixel_values" not in batch
    plain = outcome(tiny_model(kind, toy_tokenizer(), seed=0), batch)
    beside = outcome(guarded, batch)
    assert torch.equal(plain[0], beside[0])
    assert torch.equal(plain[1], beside[1])
    assert all(torch.equal(plain[2][name], beside[2][name]) for name in plain[2])


def test_text_gives_gradients_to_the_same_weights_as_pictures_do(kind, guarded):
    """Zeros to the tower, but no weight without one: what DDP, ZeRO-3 and FSDP2 wait for."""
    _, _, seeing = outcome(guarded, collated(kind, *toy_task("bars", "train", 2)))
    _, _, blind = outcome(guarded, collated(kind, text_sample(0), text_sample(1)))
    assert seeing.keys() == blind.keys()
    tower = [name for name in seeing if "vis" in name or "projector" in name]
    assert len(tower) > 20
    assert not any(blind[name].any() for name in tower)


def test_batches_with_pictures_and_lone_evaluation_are_left_alone(kind, guarded):
    pictures = collated(kind, *toy_task("bars", "train", 2), text_sample(0))
    text = collated(kind, text_sample(0))
    plain = outcome(tiny_model(kind, toy_tokenizer(), seed=0), pictures)
    assert looks(guarded, partial(guarded, **pictures)) == 1
    assert torch.equal(plain[0], outcome(guarded, pictures)[0])
    assert looks(guarded, partial(guarded, **text)) == 1
    with torch.no_grad():
        assert looks(guarded, partial(guarded, **text)) == 0


def pixels(model: nn.Module) -> dict[str, torch.Tensor]:
    """A picture of noise, in patches where the family wants it so."""
    vision = model.config.vision_config.to_dict()
    if "spatial_merge_size" not in vision:
        return {"pixel_values": torch.randn(1, 3, vision["image_size"], vision["image_size"])}
    side = 2 * vision["spatial_merge_size"]
    width = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    grid = torch.tensor([[1, side, side]])
    return {"pixel_values": torch.randn(side * side, width), "image_grid_thw": grid}


# the tower of the first feeds deeper layers too
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5_moe", "glm4v_moe", "llava_mixtral"])
def test_it_is_so_in_other_families(family):
    torch.manual_seed(0)
    plain = FAMILIES[family]()
    beside = deepcopy(plain)
    show_guard_picture(beside, pixels(plain))
    batch = inputs(plain) | {"labels": inputs(plain)["input_ids"]}
    expected, found = outcome(plain, batch), outcome(beside, batch)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    tower = found[2].keys() - expected[2].keys()
    assert len(tower) >= 15
    assert all("vis" in name or "projector" in name for name in tower)


def test_a_family_that_hides_its_features_is_refused_on_several_processes(monkeypatch):
    model = FAMILIES["llama4"]()
    show_guard_picture(model, pixels(model))
    model(**inputs(model))
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="Llama4.* cannot train on a batch without a picture"):
        model(**inputs(model))


def test_generation_looks_once_where_processes_share_the_weights(kind, guarded, monkeypatch):
    prompt = ChatCollator(toy_processor(kind), prompt_only=True)([text_sample(0)])
    generate = partial(guarded.generate, **prompt, max_new_tokens=4, min_new_tokens=4)
    alone = generate(do_sample=False)
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    assert looks(guarded, partial(generate, do_sample=False)) == 1
    assert torch.equal(generate(do_sample=False), alone)


def test_what_is_measured_of_the_data_leaves_the_guard_picture_out(kind, guarded, monkeypatch):
    """Where weights are shared, measuring shows it too, and counts pictures of the data only."""
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    own = "multi_modal_projector.linear_1" if kind == "llava" else "visual.merger.linear_fc1"
    path = f"model.{own}"
    modules = {path: guarded.get_submodule(path)}
    pictures, text = collated(kind, *toy_task("bars", "train", 2)), collated(kind, text_sample(0))
    counts = []
    for batches in ([pictures], [pictures, text, text]):
        watch = measure(guarded, modules, {}, batches, rank=8)
        counts.append(watch.trackers[path].count)
    assert counts[0] == counts[1] > 0
    with Watch(guarded, modules) as watch:  # and in training
        guarded(**text).loss.backward()
    assert not watch.trackers


def test_a_trainer_shows_it_and_a_text_model_has_none(kind, tmp_path):
    processor = toy_processor(kind)
    model = tiny_model(kind, processor.tokenizer, seed=0)
    samples = [text_sample(number) for number in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = continual(Trainer)(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=ChatCollator(processor),
        method=load_method("finetune")(lora_target_modules=r".*\.(q_proj|qkv)"),
        task=Task("text", 1, samples, samples, metric("exact_match")),
    )
    assert guard_picture(model) is not None
    assert looks(model, trainer.train) == 2
    assert picture_inputs(toy_tokenizer()) == {}
    bare = tiny_model(kind, toy_tokenizer(), seed=0)
    show_guard_picture(bare, {})
    assert guard_picture(bare) is None
