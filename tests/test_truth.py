"""A run in which something does not train ends after its first steps, with names."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from mllm_cl import Memory, load_method
from mllm_cl.model.surgery import only_train
from mllm_cl.truth import NotTraining
from toy_run import learn, toy_tasks

SETTINGS = {"lora_target_modules": ("q_proj", "down_proj"), "train_router": False}


@dataclass(frozen=True, kw_only=True)
class Spare(load_method("finetune")):
    """Fine-tuning of one module more, which no forward uses."""

    def before_task(self, model, task, memory) -> None:
        model.spare = nn.Linear(2, 3, bias=False)
        only_train(model, [*(site.weight for site in self.sites(model)), model.spare.weight])


@pytest.fixture
def model(tiny_folder):
    return AutoModelForImageTextToText.from_pretrained(tiny_folder["llava"], dtype=torch.float32)


def train(model, folder, kind, **arguments) -> None:
    learn(model, folder, kind(**SETTINGS), toy_tasks()[0], Memory(), **arguments)


def test_a_parameter_that_no_forward_uses_is_named_after_three_steps(model, tiny_folder):
    with pytest.raises(NotTraining, match=r"in 3 steps 1 of \d+ .* no gradient: spare\.weight"):
        train(model, tiny_folder["llava"], Spare)


def test_two_steps_are_too_few_to_judge(model, tiny_folder):
    train(model, tiny_folder["llava"], Spare, steps=2)


def test_steps_of_a_warm_up_that_move_nothing_do_not_count(model, tiny_folder):
    arguments = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "steps": 4}
    with pytest.raises(NotTraining, match="in 4 steps .*spare"):
        train(model, tiny_folder["llava"], Spare, **arguments)


def test_what_rounding_keeps_in_its_place_is_named(model, tiny_folder):
    arguments = {"learning_rate": 1e-30, "weight_decay": 0.0}
    with pytest.raises(NotTraining, match="have not moved") as caught:
        train(model, tiny_folder["llava"], load_method("finetune"), **arguments)
    assert caught.value.names
    assert all("lora_A" in name for name in caught.value.names)  # B starts at zero, and moves


def test_pictures_that_never_reach_the_tower_are_an_error(model, tiny_folder):
    forward = model.forward
    model.forward = lambda pixel_values=None, **kwargs: forward(**kwargs)
    with pytest.raises(NotTraining, match="the vision tower was never called"):
        train(model, tiny_folder["llava"], load_method("finetune"))


def test_a_run_that_is_stopped_leaves_no_hook(model, tiny_folder):
    train(model, tiny_folder["llava"], load_method("finetune"))
    assert not model.get_encoder(modality="image")._forward_pre_hooks
