"""What SGD's weight decay does to weights of earlier tasks where torch 1 left zero gradients."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from class_cells import assert_alike, run_together
from clip import reading_folder
from mllm_cl import Recipe, run
from mllm_cl.methods.class_incremental.engine import ENGINE
from mllm_cl.methods.class_incremental.proof import Proof
from mllm_cl.model.units import still
from mllm_cl.recipe import RecipeError
from test_class_incremental import recipe

STEPS, RATE, DECAY, MOMENTUM = 6, 0.02, 0.5, 0.9
SETTINGS = {
    "proof": {"memory_per_class": 3, "dropout": 0.0},
    "engine": {"image_aug": 0.0, "text_des": 0.0, "rerank": 0.0},
}
FADING = {"proof": ("images", "context"), "engine": ("images", "texts")}


def fading(folder: Path, model: Path, name: str, **training) -> Recipe:
    tree = recipe(folder, model, name, preprocessing="clip", stages=2).resolved()
    settings = {"mode": "released", "emulate_legacy_decay": True}
    tree["method"] |= SETTINGS[name] | settings
    tree["training"] |= {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "optim": "sgd",
        "optim_args": f"momentum={MOMENTUM}",
    } | training
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return Recipe.from_tree(tree, "recipe.yaml")


def learnt(one: Recipe) -> Recipe:
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        run(one)
    return one


def state(folder: Path | str, stage: int) -> dict[str, Tensor]:
    return load_file(Path(folder) / f"task_{stage}/state.safetensors")


def shrunk(value: Tensor) -> Tensor:
    """A task's steps with gradient zero, the rate falling to zero, in float64."""
    weight = nn.Parameter(value.double())
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
    return weight.detach()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=SETTINGS)
def done(request, clip, tmp_path_factory) -> Recipe:
    return learnt(fading(tmp_path_factory.mktemp(request.param), clip, request.param))


@pytest.mark.parametrize(
    ("per_epoch", "epochs", "rate", "left"),
    [
        (79, 5, 1e-3, 0.89),  # PROOF on CIFAR-100, without and with exemplars
        (110, 5, 1e-3, 0.85),
        (11, 10, 1e-3, 0.97),  # on Aircraft
        (79, 10, 0.05, 5.8e-7),  # ENGINE on CIFAR-100
        (11, 10, 0.05, 0.21),  # on Aircraft
    ],
)
def test_a_task_leaves_of_old_weights_what_it_left_in_the_released_codes(
    per_epoch, epochs, rate, left
):
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for _ in range(per_epoch):
            optimizer.zero_grad()
            (3 * still(weight)).backward()
            optimizer.step()
        schedule.step()
    assert weight.item() == pytest.approx(left, rel=0.025)


def test_what_is_frozen_shrinks_as_with_gradients_of_zero_and_biases_do_too(done):
    before, now = (state(done.output_dir, stage) for stage in (1, 2))
    old = tuple(f"head.{side}.0" for side in FADING[done.method_name])
    found = {key for key in before if key.startswith(old)}
    assert any(key.endswith("bias") for key in found)
    for key in found:
        torch.testing.assert_close(now[key].double(), shrunk(before[key]), rtol=1e-5, atol=0)
        assert not torch.equal(now[key], before[key])


@pytest.mark.parametrize("done", ["proof"], indirect=True)
def test_a_run_that_was_killed_within_a_task_ends_where_it_would_have(
    done, clip, tmp_path, monkeypatch
):
    saving = fading(tmp_path, clip, "proof", save_strategy="steps", save_steps=2)
    forward, calls = Proof.before_forward, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == STEPS + 4:  # in the second task, after its first checkpoint
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(Proof, "before_forward", dying)
    with pytest.raises(KeyboardInterrupt):
        learnt(saving)
    assert list((tmp_path / "task_2").glob("checkpoint-*"))
    learnt(saving)
    for key, value in state(done.output_dir, 2).items():
        assert torch.equal(state(tmp_path, 2)[key], value), key


def test_it_is_of_the_released_code_and_warns():
    with pytest.raises(ValueError, match="set 'mode: released'"):
        Proof(emulate_legacy_decay=True)
    for kind in (Proof, ENGINE):
        with pytest.warns(UserWarning, match="published tables alone"):
            kind(mode="released", emulate_legacy_decay=True)


@pytest.mark.parametrize("training", [{"optim": "adamw_torch"}, {"weight_decay": 0.0}])
def test_it_is_refused_where_no_sgd_decays(training, clip, tmp_path):
    with pytest.raises(RecipeError, match="training.optim: sgd"):
        fading(tmp_path, clip, "proof", **training)


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_two_processes_shrink_what_one_does(clip, tmp_path):
    alone = learnt(fading(tmp_path / "alone", clip, "engine"))
    found = run_together("ddp", alone, tmp_path)
    assert_alike("ddp", found, tmp_path / "alone", "state", stages=(1, 2), atol=1e-5, rtol=0)
