"""The flat file `recipes/same_from_scratch.py` and the package are two writings of one method."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from mllm_cl import Memory, Task, continual, load_method
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.metrics.answers import metric
from mllm_cl.model.surgery import guards

PATH = Path(__file__).parent.parent / "recipes" / "same_from_scratch.py"
TARGETS = ("gate_proj", "up_proj", "down_proj")
BATCH, NUM_STEPS = 8, 6


@pytest.fixture(scope="module")
def flat():
    spec = importlib.util.spec_from_file_location("same_from_scratch", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def with_the_package(folder, data, collator, out):
    """The losses of both tasks, and the trained model."""
    model, memory, losses = load(folder), Memory(), []
    method = load_method("same")(num_experts=4, lora_target_modules=TARGETS)
    for index, samples in enumerate(data):
        arguments = TrainingArguments(
            str(out),
            per_device_train_batch_size=BATCH,
            max_steps=NUM_STEPS,
            learning_rate=5e-3,
            weight_decay=0.01,  # torch's own default, which the flat file leaves as it is
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = continual(Trainer)(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            method=method,
            task=Task(f"task {index}", index + 1, samples, (), metric("exact_match")),
            memory=memory,
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, model


def with_the_flat_file(flat, folder, data, collator, adapters):
    """The same of the flat file, from the package's adapters as they were drawn."""
    model, losses, past = load(folder), [], None
    layers = flat.add_experts(model, TARGETS)
    weights = {
        f"{name}.moe_lora.{ours}": layer.get_submodule(theirs)
        for name, layer in layers.items()
        for theirs, ours in (("A", "lora_A"), ("B", "lora_B"), ("router", "router.weight"))
    }
    for name, moving in weights.items():
        moving.weight.copy_(adapters[name])
    for samples in data:
        rows = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
        more, past = flat.learn(model, layers, [collator(row) for row in rows], past)
        losses += more
    return losses, {name: moving.weight - adapters[name] for name, moving in weights.items()}


def test_the_flat_file_trains_as_the_package_does(flat, tiny_folder, tmp_path):
    folder = tiny_folder["llava"]
    collator = ChatCollator(AutoProcessor.from_pretrained(folder))
    data = [toy_task(name, "train", BATCH * NUM_STEPS) for name in ("dice", "arrow")]
    assert (collator(data[0][:BATCH])["attention_mask"] == 0).any(), "padding is to be left out"
    expected, model = with_the_package(folder, data, collator, tmp_path)
    adapters = {name: model.get_parameter(name).detach() for name in guards(model)}
    losses, moved = with_the_flat_file(flat, folder, data, collator, adapters)
    assert len(losses) == 2 * NUM_STEPS
    assert losses == pytest.approx(expected, abs=1e-4)
    for name, one in guards(model).items():
        assert one.displacement.norm() > 0, f"{name} did not move"
        assert (moved[name] - one.displacement).norm() < 1e-3 * one.displacement.norm(), name


def test_the_flat_file_needs_nothing_of_the_package_and_stays_short():
    text = PATH.read_text()
    assert "import mllm_cl" not in text and "from mllm_cl" not in text
    assert len(text.splitlines()) < 200
