"""A run in which something does not train ends after its first steps, with names."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from transformers import AutoModelForImageTextToText

from mllm_cl import Memory, Recipe, cli, load_method, runner
from mllm_cl.memory import save_tensors
from mllm_cl.model.surgery import only_train
from mllm_cl.reload import NotSaved, check_reload
from mllm_cl.truth import NotTraining, Trial
from test_runner import recipe, run_in_process, trainer_of
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


@pytest.mark.parametrize(("name", "told"), [("k_proj", False), ("v_proj", True)])
def test_a_bias_of_keys_need_not_move(name, told):
    """A softmax does not feel it: what reaches it is rounding, too little to move it with SGD."""
    model = nn.ModuleDict({name: nn.Linear(2, 2)})
    layer, optimizer = model[name], torch.optim.SGD(model.parameters(), lr=0.1)

    def learn() -> None:
        with Trial(model) as trial:
            for _ in range(3):
                trial.look({})
                (layer.weight.sum() + 1e-20 * layer.bias.sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
            trial.judge()

    if told:
        with pytest.raises(NotTraining, match=r"have not moved: v_proj\.bias"):
            learn()
    else:
        learn()


def test_pictures_that_never_reach_the_tower_are_an_error(model, tiny_folder):
    forward = model.forward
    model.forward = lambda pixel_values=None, **kwargs: forward(**kwargs)
    with pytest.raises(NotTraining, match="the vision tower was never called"):
        train(model, tiny_folder["llava"], load_method("finetune"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--training.learning_rate 1e-30", r"in 3 steps \d+ of \d+ .* have not moved: .*"),
        (
            "--training.learning_rate 1e30 --training.max_grad_norm 0",
            r"\d+ .* hold NaN or infinity, .*",
        ),
    ],
)
def test_a_run_that_fails_says_so_in_one_message_with_code_1(
    words, said, tiny_folder, tmp_path, capsys
):
    """Neither is a traceback: the command returns."""
    path = recipe(tmp_path, tiny_folder["llava"])
    assert cli.main(["run", str(path), *words.split()]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mllm-cl")]
    assert len(told) == 1 and re.fullmatch(f"mllm-cl: {said}", told[0]), told


def test_a_run_that_was_judged_leaves_no_hook(model, tiny_folder):
    """The optimizers' hooks are torch's own, common to all."""
    train(model, tiny_folder["llava"], load_method("finetune"), steps=2)
    with pytest.raises(NotTraining):
        train(model, tiny_folder["llava"], Spare)
    assert not optimizers._global_optimizer_pre_hooks
    assert not optimizers._global_optimizer_post_hooks
    assert not model.get_encoder(modality="image")._forward_pre_hooks


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value * 0,
        lambda value: value * 1.5,
        lambda value: torch.nextafter(value, torch.ones_like(value)),  # no logit shows it
    ],
)
def test_a_state_that_does_not_give_back_what_was_learnt_is_not_kept(
    spoil, tiny_folder, tmp_path, monkeypatch
):
    """A disk, or a filter of names, that loses one tensor of many."""
    whole = runner.save_tensors

    def losing(state, file) -> None:
        name = next(name for name in state if ".lora_B" in name or name.endswith("::displacement"))
        whole(state | {name: spoil(state[name])}, file)

    monkeypatch.setattr(runner, "save_tensors", losing)
    path = recipe(tmp_path, tiny_folder["llava"], "finetune")
    with pytest.raises(NotSaved, match="task_1/state.safetensors does not give back"):
        run_in_process(path, "--training.learning_rate", "1e-2")
    assert (tmp_path / "run/task_0/complete.json").exists()
    assert not (tmp_path / "run/task_1/complete.json").exists()


def test_what_trains_and_is_not_in_the_state_is_missed(tiny_folder, tmp_path, monkeypatch):
    whole = runner.trained_state

    def losing(model, base) -> dict[str, torch.Tensor]:
        state = whole(model, base)
        lost = {name for name in state if ".lora_B" in name}
        return {name: value for name, value in state.items() if name not in lost}

    monkeypatch.setattr(runner, "trained_state", losing)
    path = recipe(tmp_path, tiny_folder["llava"], "finetune")
    with pytest.raises(NotSaved, match="Something that trains is not in the state"):
        run_in_process(path, "--training.learning_rate", "1e-2")


def test_logits_that_are_no_numbers_are_not_the_fault_of_the_file(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder["llava"], tmp_path)
    state = {name: weight.detach() for name, weight in trainer.trained().items()}
    save_tensors(state, tmp_path / "state.safetensors")
    trainer.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits that are NaN or infinite"):
        check_reload(trainer, tmp_path / "state.safetensors", state)


LOOSE = """
from dataclasses import dataclass

import torch

from mllm_cl.methods.class_incremental.proof import Proof


@dataclass(frozen=True, kw_only=True)
class Loose(Proof):
    def before_task(self, model, task, memory):
        super().before_task(model, task, memory)
        model.head.loose = torch.nn.Parameter(torch.zeros(3))
"""


def test_what_does_not_learn_is_named_where_pictures_were_encoded_before(tmp_path):
    (tmp_path / "loose.py").write_text(LOOSE)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": "toy:clip"},
        "method": {"name": str(tmp_path / "loose.py")},
        "classes": {
            "data": "toy:compositions",
            "number": 4,
            "increment": 4,
            "preprocessing": "clip",
            "train_size": 4,
            "eval_size": 1,
        },
        "training": {"max_steps": 4, "per_device_train_batch_size": 4},
    }
    with pytest.raises(NotTraining, match=r"had no gradient: head\.loose"):
        runner.run(Recipe.from_tree(tree, "recipe.yaml"))
