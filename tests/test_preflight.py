"""The largest batch is tried before step 1: what does not fit is named, and nothing stays of it."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_cl import continual, engine, load_method, preflight
from mllm_cl.data import read
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.policy import for_training
from mllm_cl.preflight import TooLarge
from mllm_cl.recipe import DataBlock
from toy_run import collator_of, load, toy_tasks


class FirstStep(TrainerCallback):
    """Whether a step was begun."""

    def __init__(self) -> None:
        self.begun = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begun = True


def trainer_of(folder, out, method, callback=None, **settings):
    """A Trainer that learns one task in three steps and saves after the last."""
    task = toy_tasks()[0]
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=8,
        max_steps=3,
        save_steps=3,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return continual(Trainer)(
        model=load(folder),
        args=arguments,
        train_dataset=task.train,
        data_collator=collator_of(folder),
        method=method,
        task=task,
        callbacks=[callback] if callback else [],
    )


METHODS = {
    "finetune": {"lora_target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.2},
    "same": {"num_experts": 2, "lora_target_modules": ("q_proj",)},
    # decides at every step, and remembers
    "same released": {
        "num_experts": 2,
        "lora_target_modules": ("q_proj",),
        "activation": "released",
    },
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_task_ends_with_the_same_bytes_as_without(name, checkpointing, tiny_folder, tmp_path):
    """Weights, moments, guards, memory, losses and the state of every generator."""
    marks = []
    for tried in (False, True):
        out = tmp_path / f"{tried}"
        torch.manual_seed(3)
        method = load_method(name.split()[0])(**METHODS[name])
        trainer = trainer_of(
            tiny_folder["llava"], out, method, gradient_checkpointing=checkpointing
        )
        trainer.tries_largest = tried
        trainer.train()
        marks.append(json.loads((out / "checkpoint-3" / "complete.json").read_text()))
    assert marks[0] == marks[1] and len(marks[0]) > 6


@dataclass(frozen=True, kw_only=True)
class Costly(load_method("finetune")):
    """Fine-tuning whose guards and whose term of the loss take memory, and which tells when."""

    told: list[str] = field(default_factory=list)

    def start_task(self, model, task, memory, batches, reduce) -> None:
        self.told.append("start_task")

    def before_forward(self, model, inputs, memory) -> None:
        self.told.append(f"batch of {len(inputs['input_ids'])}")

    def loss(self, model, inputs, outputs, memory):
        self.told.append("loss")
        return 0.0 * outputs.logits.sum()


def test_what_is_tried_is_a_step_with_all_that_it_takes(tiny_folder, tmp_path):
    """The guards are in place, and the method's own term and Adam's moments are part of it."""
    method = Costly(**METHODS["finetune"])
    trainer = trainer_of(tiny_folder["llava"], tmp_path, method)
    trainer.tries_largest = True
    trainer.train()
    assert method.told == ["start_task", *["batch of 8", "loss"] * 4]  # one before three steps


def test_adam_takes_twice_what_trains_until_it_has_it():
    weights = [torch.zeros(3, 4, requires_grad=True), torch.zeros(5, requires_grad=True)]
    adam = torch.optim.AdamW(weights)
    assert sum(one.numel() for one in engine.room_for_moments(adam, weights)) == 2 * 17
    assert engine.room_for_moments(torch.optim.SGD(weights), weights) == []
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam.step()
    assert engine.room_for_moments(adam, weights) == []


def too_large(model, tokens: int, error: Exception) -> None:
    """Let batches of more than so many tokens not fit."""

    def refuse(module, args, kwargs) -> None:
        if kwargs["input_ids"].numel() > tokens and torch.is_grad_enabled():
            raise error

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf all"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
    ],
)
def test_what_does_not_fit_is_named_before_step_1(error, tiny_folder, tmp_path):
    first, method = FirstStep(), load_method("finetune")(**METHODS["finetune"])
    trainer = trainer_of(tiny_folder["llava"], tmp_path, method, first)
    trainer.tries_largest = True
    too_large(trainer.model, 100, error)
    with pytest.raises(TooLarge) as caught:
        trainer.train()
    words = str(caught.value)
    longest = Lengths(trainer.data_collator.processor).longest(trainer.train_dataset, 1)[0]
    name = trainer.train_dataset[longest[1]]["id"]
    for part in (
        f"colour: its longest samples do not fit into the memory of cpu: 8 at once, the longest "
        f"{name!r} with {longest[0]} tokens",
        "training.per_device_train_batch_size: 4 with training.gradient_accumulation_steps: 2",
        "training.gradient_checkpointing: true",
        "model.dtype: bfloat16",
        f"data.max_length below {longest[0]} with data.too_long: drop",
        str(error).splitlines()[0],
    ):
        assert part in words, words
    assert "\n" not in words and "Of all" not in words
    assert not first.begun


def test_another_error_stays_what_it_is(tiny_folder, tmp_path):
    method = load_method("finetune")(**METHODS["finetune"])
    trainer = trainer_of(tiny_folder["llava"], tmp_path, method)
    trainer.tries_largest = True
    too_large(trainer.model, 100, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.train()


def test_a_resumed_task_is_not_tried_again(tiny_folder, tmp_path):
    method = load_method("finetune")(**METHODS["finetune"])
    trainer_of(tiny_folder["llava"], tmp_path, method).train()
    trainer = trainer_of(tiny_folder["llava"], tmp_path, method)
    trainer.tries_largest = True
    too_large(trainer.model, 100, torch.OutOfMemoryError("too large"))
    with pytest.raises(torch.OutOfMemoryError):  # of the step itself, not TooLarge
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# Which samples are the longest


def rows(folder) -> str:
    """Forty short rows, of which one has a long question and one a large picture."""
    Image.new("RGB", (64, 64)).save(folder / "small.png")
    Image.new("RGB", (320, 320)).save(folder / "large.png")
    file = folder / "rows.jsonl"
    entries = [
        {
            "id": str(n),
            "image": "large.png" if n == 7 else "small.png",
            "question": "what is it? " * (60 if n == 23 else 1),
            "answer": "a dog",
        }
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(file)


@pytest.mark.parametrize("kind", ["llava", "qwen3-vl-moe"])
def test_the_longest_samples_are_found_without_counting_all(kind, tiny_folder, tmp_path):
    samples = read(rows(tmp_path), "train", None, 0)
    lengths = Lengths(collator_of(tiny_folder[kind]).processor)
    counted = sorted((lengths.of(samples, place) for place in range(len(samples))), reverse=True)
    found = lengths.longest(samples, 2)
    assert [tokens for tokens, _ in found] == counted[:2]
    assert all(lengths.of(samples, place) == tokens for tokens, place in found)


def test_a_row_that_cannot_be_read_is_not_the_longest(tiny_folder, tmp_path):
    path = rows(tmp_path)
    (tmp_path / "large.png").unlink()
    samples = for_training(
        read(path, "train", None, 0), DataBlock(on_error="skip", error_budget=0.1), None
    )
    lengths = Lengths(collator_of(tiny_folder["qwen3-vl-moe"]).processor)
    assert lengths.longest(samples, 1)[0][1] == 23
    assert not samples.problems


def test_a_row_that_cannot_be_encoded_is_not_the_longest_either(tiny_folder):
    samples = list(toy_tasks()[0].train.samples)
    shown = [{"type": "image"}] * 2 + [{"type": "text", "text": "what is it? " * 60}]
    question, answer = {"role": "user", "content": shown}, samples[0]["messages"][-1]
    picture = Image.new("RGB", (40, 40))  # the only one, where two are asked about
    bad = {**samples[0], "messages": [question, answer], "images": [picture]}
    lengths = Lengths(collator_of(tiny_folder["llava"]).processor)
    assert lengths.longest([*samples, bad], 1) == lengths.longest(samples, 1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(toy_tasks()[0].train)


@pytest.mark.parametrize("what", ["train_dataset", "data_collator"])
def test_nothing_is_tried_where_lengths_are_not_known(what, tiny_folder, tmp_path):
    method = load_method("finetune")(**METHODS["finetune"])
    trainer = trainer_of(tiny_folder["llava"], tmp_path, method)
    too_large(trainer.model, 0, torch.OutOfMemoryError("too large"))
    collate: ChatCollator = trainer.data_collator
    vars(trainer)[what] = Stream() if what == "train_dataset" else lambda rows: collate(rows)
    preflight.push(trainer)
