"""RanPAC against ridge regressions in plain float64, its sums, and whole runs of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from class_cells import assert_alike, run_together
from encoders import backbone
from mllm_cl import Recipe, run
from mllm_cl.data.labelled import labelled
from mllm_cl.memory import Memory
from mllm_cl.method import load_method
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.ridge import PENALTIES, Ridge, square, triangle
from mllm_cl.task import Task
from test_class_incremental import DATA, NUMBER, TEST, TRAIN, answers, features, recipe

DIM = 40


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def ranpac(folder: Path, vit: Path, batch_size: int = 5, **settings) -> Recipe:
    tree = recipe(folder, vit, "ranpac").resolved()
    tree["method"] |= {"dim": DIM, "dropout": 0.0} | settings
    tree["eval"] = {"batch_size": batch_size}
    return Recipe.from_tree(tree, "recipe.yaml")


class Share:
    """Features of as many classes, from `first` on."""

    def __init__(self, first: int, number: int, each: int = 25, width: int = 8) -> None:
        generator = torch.Generator().manual_seed(first)
        means = torch.randn(number, width, generator=generator)
        self.labels = torch.arange(first, first + number).repeat(each)
        noise = torch.randn(number * each, width, generator=generator)
        self.features = means.repeat(each, 1) + 0.5 * noise

    def whole(self):
        return self.features, self.labels


def solved(hidden: np.ndarray, labels: np.ndarray, number: int, penalty: float) -> np.ndarray:
    """W of the ridge regression of one-hot labels, by the normal equations: (C, M)."""
    gram = hidden.T @ hidden + penalty * np.eye(hidden.shape[1])
    return np.linalg.solve(gram, hidden.T @ np.eye(number)[labels]).T


def chosen(hidden: np.ndarray, labels: np.ndarray, number: int, cut: int) -> float:
    """The penalty of least squared error on the first `cut` rows, by a regression for each."""
    truth, errors = np.eye(number)[labels[:cut]], {}
    for penalty in PENALTIES:
        weight = solved(hidden[cut:], labels[cut:], number, penalty)
        errors[penalty] = ((hidden[:cut] @ weight.T - truth) ** 2).mean()
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_the_head_is_a_ridge_regression_on_random_features(mode):
    head = Ridge(8, dim=DIM, normalised=mode == "released")
    shares = [Share(0, 3), Share(3, 2)]
    for share in shares:
        head.learn(len(set(share.labels.tolist())), share)
    projection = head.projection_DM.numpy()
    assert abs(projection.mean()) < 0.2 and abs(projection.std() - 1) < 0.1
    hidden = np.concatenate([share.features.double().numpy() for share in shares])
    hidden = np.maximum(hidden @ projection, 0)
    weight = solved(hidden, torch.cat([one.labels for one in shares]).numpy(), 5, head.penalty)
    test = Share(1, 4).features
    activated = np.maximum(test.double().numpy() @ projection, 0)
    expected = activated @ weight.T
    if mode == "released":
        lengths = np.linalg.norm(activated, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
        expected = expected / lengths
    found = head(test)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [40, 200])  # fewer random features than samples, and more
def test_the_penalty_is_the_best_of_as_many_regressions(dim, monkeypatch):
    share, head = Share(0, 4), Ridge(8, dim=dim)
    monkeypatch.setattr(torch, "randperm", lambda number, generator: torch.arange(number))
    head.learn(4, share)
    hidden = head.hidden(share.features).numpy()
    assert head.penalty == chosen(hidden, share.labels.numpy(), 4, len(hidden) // 5)
    assert PENALTIES[-1] < head.penalty < PENALTIES[0]


def test_a_class_of_one_sample_is_learnt():
    head = Ridge(8, dim=DIM)
    head.learn(1, Share(0, 1, each=1))
    head.learn(2, Share(1, 2))
    assert head(Share(0, 1, each=1).features).argmax() == 0


def test_neither_the_order_of_samples_nor_of_tasks_changes_the_weights():
    shares, heads = [Share(0, 3), Share(3, 2)], []
    for order in (torch.arange, lambda number: torch.arange(number).flip(0)):
        head = Ridge(8, dim=DIM)
        for share in shares:
            share.features = share.features[order(len(share.features))]
            share.labels = share.labels[order(len(share.labels))]
            head.learn(len(set(share.labels.tolist())), share)
        head.penalty, head._weight_CM = 1.0, None
        heads.append(head)
    torch.testing.assert_close(heads[0].weight_CM, heads[1].weight_CM, atol=1e-9, rtol=0)


def test_a_symmetric_matrix_comes_back_from_its_triangle():
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.mT
    assert torch.equal(square(triangle(matrix), 7), matrix) and len(triangle(matrix)) == 28


def test_sums_are_not_added_to_those_of_another_projection():
    kept = Ridge(8, dim=DIM).learn(2, Share(0, 2))
    again = Ridge(8, dim=DIM)
    again.restore(kept)
    assert torch.equal(again.gram, kept["gram"]) and again.number == 2
    for other in (Ridge(8, dim=DIM, seed=1), Ridge(8, dim=DIM + 1)):
        with pytest.raises(ValueError, match="another random projection"):
            other.restore(kept)


def test_it_keeps_what_was_forecast():
    samples = labelled(DATA, "train", 1, number=2)
    method = load_method("ranpac", "class_incremental")(dim=DIM)
    encoder = Encoder(backbone("vit"))
    model, memory = Classifier(encoder, Prototype(encoder.width)), Memory()
    task = Task("1-2", 1, samples, samples, lambda *_: 0.0, labels=samples.names)
    method.before_task(model, task, memory)
    forecast = method.forecast_bytes(model, 3)
    share = Share(0, 2, width=encoder.width)
    method.after_task(model, task, memory, share, torch.clone)
    assert memory.num_bytes + 2 * 2 * DIM * 8 == forecast  # the classes of two stages more
    assert forecast == 8 * (DIM * (DIM + 1) // 2 + DIM * 6 + 9)


# Whole runs


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_run_answers_as_the_regression_does(mode, vit, tmp_path):
    run(ranpac(tmp_path, vit, mode=mode, adaptation="none"))
    encoder = Encoder(backbone("vit"))
    names = [labelled(DATA, "train", 1, number=NUMBER).names[place] for place in (0, 2, 3, 4, 5, 1)]
    train, test = (labelled(DATA, split, size, number=NUMBER) for split, size in
                   (("train", TRAIN), ("test", TEST)))  # fmt: skip
    memory = load_file(tmp_path / "task_3/memory.safetensors")
    projection = Ridge(encoder.width, dim=DIM).projection_DM.numpy()

    def hidden(samples) -> np.ndarray:
        return np.maximum(features(encoder, samples).numpy() @ projection, 0)

    labels = np.array([names.index(train.names[target]) for target in train.targets])
    weight = solved(hidden(train), labels, NUMBER, float(memory["ranpac/penalty"]))
    for first in range(0, NUMBER, 2):
        activated = hidden(test.of(names[first : first + 2]))
        logits = activated @ weight.T
        if mode == "released":
            logits = logits / np.linalg.norm(weight, axis=1)
        expected = [names[place] for place in logits.argmax(1)]
        assert answers(tmp_path, 3)[f"{first + 1}-{first + 2}"] == expected


def test_the_stages_do_not_change_the_sums(vit, tmp_path):
    sums = []
    for name, increment in (("two", 2), ("all", 6)):
        tree = ranpac(tmp_path / name, vit, adaptation="none").resolved()
        tree["classes"]["increment"] = increment
        folder = run(Recipe.from_tree(tree, "recipe.yaml"))
        sums.append(load_file(folder / f"task_{NUMBER // increment}/memory.safetensors"))
    for name in ("ranpac/gram", "ranpac/cross"):
        torch.testing.assert_close(sums[0][name], sums[1][name], atol=1e-9, rtol=1e-12)


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory) -> Path:
    return run(ranpac(tmp_path_factory.mktemp("ranpac"), vit))


def test_it_trains_in_its_first_stage_alone(alone):
    states = [load_file(alone / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    assert states[0] and not any("head" in name for name in states[0])
    for later in states[1:]:
        assert later.keys() == states[0].keys()
        assert all(torch.equal(later[name], states[0][name]) for name in later)


def test_the_batch_size_of_a_test_changes_no_answer(alone, vit, tmp_path):
    other = run(ranpac(tmp_path, vit, batch_size=1))
    for stage in (1, 2, 3):
        assert answers(other, stage) == answers(alone, stage)


def test_a_deleted_stage_comes_back_to_the_same_bytes(alone, vit, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(folder / "task_3")
    run(ranpac(folder, vit))
    for name in ("memory.safetensors", "state.safetensors", "scores.json"):
        assert (folder / "task_3" / name).read_bytes() == (alone / "task_3" / name).read_bytes()
    assert answers(folder, 3) == answers(alone, 3)


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("adaptation", "tolerance"), [("adapter", 1e-4), ("none", 1e-6)])
def test_two_processes_learn_and_answer_as_one_does(adaptation, tolerance, vit, tmp_path):
    alone = run(ranpac(tmp_path / "alone", vit, adaptation=adaptation))
    found = run_together("ddp", ranpac(tmp_path / "run", vit, adaptation=adaptation), tmp_path)
    assert_alike("ddp", found, alone, atol=0, rtol=0)
    memory, expected = (load_file(folder / "task_3/memory.safetensors")
                        for folder in (found, alone))  # fmt: skip
    for name, value in expected.items():  # trained adapters differ in the last bits
        close = {"atol": tolerance * float(value.abs().max()), "rtol": 0}
        torch.testing.assert_close(memory[name], value, **close, msg=name)
