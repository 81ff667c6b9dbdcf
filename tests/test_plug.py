"""Ten lines plug a method into somebody's own Trainer, SFTTrainer or accelerate loop.

Every way learns the same two tasks and is compared with the runner. All see the samples in their
own order (`train_sampling_strategy: sequential`, an unshuffled DataLoader), so nothing is drawn at
random but the adapters, whose draw is the method's own.
"""

import json
from dataclasses import dataclass

import datasets
import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from mllm_cl import Memory, Recipe, Task, continual, learning, load_method, run
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.memory import load_tensors
from mllm_cl.method import Tuned
from mllm_cl.metrics.answers import metric
from mllm_cl.model.surgery import guards

NAMES, SIZE, NUM_STEPS = ("colour", "arrow"), 48, 6
TARGETS = ("q_proj", "down_proj")
SETTINGS = {
    "per_device_train_batch_size": 8,
    "max_steps": NUM_STEPS,
    "learning_rate": 5e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

RECIPE = """
output_dir: {folder}/run
seed: 0
model: {{model_name_or_path: {model}, lora_target_modules: [q_proj, down_proj]}}
method: {{name: same, num_experts: 4}}
tasks:
  - {{name: colour, data: "toy:colour", train_size: 48, eval_size: 1}}
  - {{name: arrow, data: "toy:arrow", train_size: 48, eval_size: 1}}
eval: {{batch_size: 1, max_new_tokens: 1}}
training: {training}
"""


# The three snippets, as they stand in the README


def in_a_trainer(model, tasks, collator, arguments):
    losses = []
    method, memory = load_method("same")(num_experts=4, lora_target_modules=TARGETS), Memory()
    for task in tasks:
        trainer = continual(Trainer)(
            model=model,
            args=arguments(task),
            train_dataset=task.train,
            data_collator=collator,
            method=method,
            task=task,
            memory=memory,
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses


def in_sft(model, tasks, processor, arguments, collator=None):
    from trl import SFTTrainer

    losses = []
    method, memory = load_method("same")(num_experts=4, lora_target_modules=TARGETS), Memory()
    for task in tasks:
        trainer = continual(SFTTrainer)(
            model=model,
            args=arguments(task),
            train_dataset=task.train,
            data_collator=collator,
            processing_class=processor,
            method=method,
            task=task,
            memory=memory,
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses


def in_a_loop(model, tasks, collator, accelerator):
    losses = []
    method, memory = load_method("same")(num_experts=4, lora_target_modules=TARGETS), Memory()
    for task in tasks:
        method.before_task(model, task, memory)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = AdamW(weights, lr=5e-3, fused=True)
        loader = DataLoader(task.train, batch_size=8, collate_fn=collator)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with learning(
            wrapped, loader, task=task, method=method, memory=memory, accelerator=accelerator
        ) as term:
            for batch in loader:
                outputs = wrapped(**batch)
                accelerator.backward(outputs.loss + term(batch, outputs))
                optimizer.step()
                optimizer.zero_grad()
                losses.append(outputs.loss.item())
    return losses


# What they are compared with


def tasks_of(make=toy_task):
    return [
        Task(name, index + 1, make(name, "train", SIZE), (), metric("exact_match"))
        for index, name in enumerate(NAMES)
    ]


def columns(name, split, size):
    """The same samples as a `datasets.Dataset` with the columns that TRL knows."""
    return datasets.Dataset.from_list(list(toy_task(name, split, size)))


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def displacements(model):
    return {name: one.displacement.clone() for name, one in guards(model).items()}


def assert_equal_displacements(found, expected, tolerance=1e-5):
    """Each displacement differs by less than `tolerance` of its norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, f"{name} did not move"
        assert (found[name] - tensor).norm() < tolerance * tensor.norm(), name


@pytest.fixture(scope="module")
def ran(tiny_folder, tmp_path_factory):
    """The runner's losses over both tasks, and the displacements that it saved after the last."""
    folder = tmp_path_factory.mktemp("plug")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, model=tiny_folder["llava"], training=SETTINGS))
    out = run(Recipe.load(recipe))
    logs = [json.loads((out / f"task_{stage}" / "log.json").read_text()) for stage in (1, 2)]
    losses = [entry["loss"] for log in logs for entry in log if "loss" in entry]
    assert len(losses) == 2 * NUM_STEPS
    state = load_tensors(out / "task_2" / "state.safetensors")
    moved = {name.partition("::")[0]: value for name, value in state.items() if "::" in name}
    return losses, moved


def test_a_loop_over_a_trainer_is_what_the_runner_does(ran, tiny_folder, tmp_path):
    model, processor = load(tiny_folder["llava"])

    def arguments(task):
        # seed 0 as in the recipe: it orders the samples that are measured
        own = {"remove_unused_columns": False, "use_cpu": True, "seed": 0}
        return TrainingArguments(str(tmp_path / task.name), **SETTINGS, **own)

    losses = in_a_trainer(model, tasks_of(), ChatCollator(processor), arguments)
    assert losses == pytest.approx(ran[0], abs=1e-5)
    assert_equal_displacements(displacements(model), ran[1])


def test_a_loop_over_accelerate_is_what_the_runner_does(ran, tiny_folder):
    model, processor = load(tiny_folder["llava"])
    losses = in_a_loop(model, tasks_of(), ChatCollator(processor), Accelerator(cpu=True))
    assert losses == pytest.approx(ran[0], abs=1e-5)
    assert_equal_displacements(displacements(model), ran[1])


@dataclass(frozen=True, kw_only=True)
class Pulled(Tuned):
    """Fine-tuning with a term of its own: the squared norm of what it trains."""

    def loss(self, model, inputs, outputs, memory):
        return sum(weight.square().sum() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", [Pulled, Tuned])
def test_a_loop_is_handed_the_methods_term_of_the_loss(kind, tiny_folder):
    model, processor = load(tiny_folder["llava"])
    method, task, memory = kind(lora_target_modules=("q_proj",)), tasks_of()[0], Memory()
    method.before_task(model, task, memory)
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(task.train, batch_size=2, collate_fn=ChatCollator(processor))
    wrapped, loader = accelerator.prepare(model, loader)
    batch = next(iter(loader))
    with learning(
        wrapped, loader, task=task, method=method, memory=memory, accelerator=accelerator
    ) as term:
        found = term(batch, wrapped(**batch))
    expected = method.loss(model, batch, None, memory) or 0.0
    assert found == expected and (expected > 0) == (kind is Pulled)


@pytest.mark.parametrize("kind", [Pulled, Tuned])
def test_a_trainer_is_asked_for_outputs_only_by_a_method_that_reads_them(
    kind, tiny_folder, tmp_path
):
    """TRL makes a second forward for them."""
    asked = []

    class Asked(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            asked.append(return_outputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    (model, processor), task = load(tiny_folder["llava"]), tasks_of()[0]
    own = {"remove_unused_columns": False, "use_cpu": True}
    trainer = continual(Asked)(
        model=model,
        args=TrainingArguments(str(tmp_path), **SETTINGS | {"max_steps": 1}, **own),
        train_dataset=task.train,
        data_collator=ChatCollator(processor),
        method=kind(lora_target_modules=("q_proj",)),
        task=task,
    )
    trainer.train()
    assert asked == [kind is Pulled]


needs_selective_loss = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL's assistant_only_loss with pictures asks for transformers 5.18",
)


def sft_arguments(folder, **settings):
    from trl import SFTConfig

    own = {"use_cpu": True, "bf16": False, "seed": 0, "assistant_only_loss": True}
    return SFTConfig(str(folder), **SETTINGS, **own, **settings)


@needs_selective_loss
def test_trl_trains_behind_the_guards_though_its_forward_gives_no_logits(
    ran, tiny_folder, tmp_path
):
    """TRL's collator adds the template's line break after the answer: no label, but one more token
    that the moments count, so later steps may differ from the runner's in the fifth digit."""
    model, processor = load(tiny_folder["llava"])
    before = []

    def arguments(task):
        before.append(displacements(model))
        return sft_arguments(tmp_path / task.name)

    losses = in_sft(model, tasks_of(columns), processor, arguments)
    assert losses[0] == pytest.approx(ran[0][0], abs=1e-5)
    assert losses == pytest.approx(ran[0], abs=1e-2)
    assert losses[NUM_STEPS - 1] < losses[0] - 0.1 and losses[-1] < losses[NUM_STEPS] - 0.1
    for name, one in guards(model).items():
        moved = one.displacement - before[1][name]
        assert moved.norm() > 0, f"{name} did not move in the second task"
        assert one.g.leak(moved).max() < 1e-5
        assert bool((one.g.occupancy > 0).any()) == name.endswith("router.weight")


@needs_selective_loss
def test_trl_with_our_collator_is_what_the_runner_does(ran, tiny_folder, tmp_path):
    model, processor = load(tiny_folder["llava"])

    def arguments(task):
        return sft_arguments(tmp_path / task.name, remove_unused_columns=False)

    collator = ChatCollator(processor)
    losses = in_sft(model, tasks_of(columns), processor, arguments, collator)
    assert losses == pytest.approx(ran[0], abs=1e-5)
    # TRL's loss rounds otherwise, and where a gradient is next to nothing Adam shows it.
    assert_equal_displacements(displacements(model), ran[1], tolerance=1e-3)
