"""PROOF: its head against loops in float64, and whole runs on a tiny CLIP."""

import json
import shutil
import warnings
from math import exp, log
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clip import reading_folder
from encoders import backbone
from mllm_cl import Recipe, run
from mllm_cl.data.labelled import labelled
from mllm_cl.methods.class_incremental.proof import Proof
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.fusion import Fusion
from mllm_cl.model.heads import cosines, ensemble
from test_class_incremental import DATA, NUMBER, TRAIN, features, recipe

WIDTH, TASKS, CLASSES, PROMPTS = 8, 2, 5, 3
TEMPLATES = ["{}", "a photo {}"]
KEPT = 3  # of a class: all training sets are then whole batches, also of two processes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fusion(mode: str = "paper", *, residual: bool = False) -> Fusion:
    """A head of two tasks and five classes, all its weights away from where they start."""
    scale = torch.tensor(log(5.0))
    head = Fusion(WIDTH, log_scale=scale, paper=mode == "paper", residual=residual)
    for number in (2, 3):
        head.expand()
        head.grow(number)
    with torch.no_grad():
        for place, parameter in enumerate(head.parameters()):
            parameter += 0.1 * draw(*parameter.shape, seed=50 + place)
    head.inform(draw(CLASSES, WIDTH, seed=1), draw(CLASSES, PROMPTS, WIDTH, seed=2))
    return head.eval()


# What the paper says, by loops in float64


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def softmax(logits: list[float]) -> list[float]:
    total = sum(exp(one) for one in logits)
    return [exp(one) / total for one in logits]


class Loops:
    """The head's weights, and its formulas written out for one image at a time."""

    def __init__(self, head: Fusion) -> None:
        self.w = {name: one.detach().double() for name, one in head.named_parameters()}
        self.head, self.scale = head, exp(head.log_scale.item())
        self.means = [self.project("images", mean) for mean in head.mean_CD]
        self.means = [unit(mean) for mean in self.means]

    def project(self, side: str, x: Tensor) -> Tensor:
        found = torch.zeros(WIDTH, dtype=torch.float64)
        for task in range(TASKS):
            found += self.w[f"{side}.{task}.weight"] @ x.double() + self.w[f"{side}.{task}.bias"]
            found += x.double() if self.head.residual else 0
        return found

    def names(self, *, every: bool) -> list[Tensor]:
        found = []
        for prompts in self.head.prompts_CPD:
            parts = [unit(self.project("texts", one)) for one in prompts]
            found.append(unit(sum(parts) / len(parts)) if every else parts[0])
        return found

    def attended(self, image: Tensor, names: list[Tensor]) -> list[Tensor]:
        """The image, the names and the means after the attention."""
        context = [row for task in range(TASKS) for row in self.w[f"context.{task}"]]
        tokens = [image, *names, *self.means, *context]
        given = []
        for x in tokens[: 1 + 2 * CLASSES]:
            query = self.w["attention.query.weight"] @ x
            keys = [self.w["attention.key.weight"] @ y for y in tokens]
            weights = softmax([float(query @ key) / WIDTH**0.5 for key in keys])
            values = [self.w["attention.value.weight"] @ y for y in tokens]
            mixed = sum(a * value for a, value in zip(weights, values, strict=True))
            out = self.w["attention.out.weight"] @ mixed + self.w["attention.out.bias"] + x
            normed = (out - out.mean()) / (out.var(correction=0) + 1e-5).sqrt()
            given.append(normed * self.w["attention.norm.weight"] + self.w["attention.norm.bias"])
        return given

    def paper(self, x: Tensor, *, every: bool) -> list[list[float]]:
        """The three logits of one image."""
        image, names = unit(self.project("images", x)), self.names(every=every)
        own, *rest = map(unit, self.attended(image, names))
        pairs = [(image, names), (own, rest[:CLASSES]), (own, rest[CLASSES:])]
        return [[self.scale * float(z @ one) for one in ones] for z, ones in pairs]

    def released(self, batch: Tensor, *, every: bool) -> tuple[list[Tensor], list, list]:
        """Images as they were fused, and the logits by names and by means."""
        names = self.names(every=every)
        images = [self.project("images", x) for x in batch]
        images = images if every else [unit(one) for one in images]
        given = [self.attended(one, names) for one in images]
        mean = [sum(one[place] for one in given) / len(given) for place in range(1 + 2 * CLASSES)]
        split = mean[1 : 1 + CLASSES], mean[1 + CLASSES :]
        logits = [[[float(one[0] @ y) for y in ys] for one in given] for ys in split]
        return images, *logits


def nll(logits: list[float], right: int) -> float:
    return -log(softmax(logits)[right])


@pytest.mark.parametrize("residual", [False, True])
def test_the_papers_loss_and_answer_are_those_of_loops(residual):
    head = fusion(residual=residual)
    batch, right, loops = draw(4, WIDTH, seed=3), [0, 4, 2, 2], Loops(head)
    expected = [sum(nll(one, y) for one in loops.paper(x, every=False))
                for x, y in zip(batch, right, strict=True)]  # fmt: skip
    found = head.losses(batch, torch.tensor(right))
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=2e-5)
    answers = [torch.tensor([softmax(one) for one in loops.paper(x, every=True)]) for x in batch]
    expected = torch.stack([three.double().mean(0) for three in answers])
    torch.testing.assert_close(head(batch).double().exp(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_the_released_loss_and_answer_are_those_of_loops(residual):
    head = fusion("released", residual=residual)
    batch, right, loops = draw(4, WIDTH, seed=3), [0, 4, 2, 2], Loops(head)
    names = loops.names(every=False)
    images, by_name, by_mean = loops.released(batch, every=False)
    table = [[loops.scale * float(x @ names[y]) for y in right] for x in images]
    columns = [list(column) for column in zip(*table, strict=True)]
    expected = [
        nll(by_name[b], right[b])
        + nll(by_mean[b], right[b])
        + (nll(table[b], b) + nll(columns[b], b)) / 2
        for b in range(4)
    ]
    found = head.losses(batch, torch.tensor(right))
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=2e-5)
    names = loops.names(every=True)
    images, by_name, by_mean = loops.released(batch, every=True)
    direct = torch.tensor([[float(x @ one) for one in names] for x in images])
    expected = direct + torch.tensor(by_name) + torch.tensor(by_mean)
    torch.testing.assert_close(head(batch), expected, rtol=0, atol=5e-5)


def test_an_answer_depends_on_its_batch_in_mode_released_alone():
    batch = draw(5, WIDTH, seed=3)
    for mode, equal in (("paper", True), ("released", False)):
        head = fusion(mode)
        alone = torch.cat([head(one[None]) for one in batch])
        assert torch.allclose(head(batch), alone, rtol=0, atol=1e-5) == equal
        turned = head(batch.flip(0)).flip(0)
        torch.testing.assert_close(head(batch), turned, rtol=0, atol=1e-5)


def test_no_class_is_too_far_behind_for_an_answer():
    """At CLIP's scale of 100, where a softmax in fp32 is zero for all but the nearest."""
    head = fusion()
    with torch.no_grad():
        head.log_scale.fill_(log(1000.0))
    assert head.logits(draw(4, WIDTH, seed=3)).isfinite().all()


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("residual", [False, True])
def test_projections_merged_into_one_change_no_answer(mode, residual):
    head, merged = fusion(mode, residual=residual), fusion(mode)
    for layers, into in ((head.images, merged.images), (head.texts, merged.texts)):
        weight, bias = head.merged(layers)
        with torch.no_grad():
            for place, (one, other) in enumerate(((weight, bias), (0, 0))):
                into[place].weight.copy_(one if place == 0 else torch.zeros_like(weight))
                into[place].bias.copy_(other if place == 0 else torch.zeros_like(bias))
    batch = draw(4, WIDTH, seed=3)
    torch.testing.assert_close(merged(batch), head(batch), rtol=0, atol=1e-5)
    summed = sum(layer(batch) + (batch if residual else 0) for layer in head.images)
    torch.testing.assert_close(head.image(batch), summed, rtol=0, atol=1e-5)


def test_a_residual_projection_starts_as_the_model_itself():
    head = Fusion(WIDTH, log_scale=torch.zeros(()), residual=True)
    batch, prompts = draw(4, WIDTH, seed=3), draw(CLASSES, PROMPTS, WIDTH, seed=4)
    before = head.by_name(batch, prompts)
    torch.testing.assert_close(before, cosines(batch, ensemble(prompts)), rtol=0, atol=0)
    for _ in range(2):
        head.expand()
        torch.testing.assert_close(head.by_name(batch, prompts), before, rtol=0, atol=1e-6)


def test_what_trains_has_the_released_codes_count_at_512():
    heads = {paper: Fusion(512, log_scale=torch.zeros(()), paper=paper) for paper in (True, False)}
    for task in range(3):
        for paper, head in heads.items():
            head.expand()
            count = sum(one.numel() for one in head.newest())
            assert count == 1_576_961 + (0 if paper else 262_656 * task)


def test_a_projection_does_not_depend_on_how_many_come_later():
    heads = [Fusion(WIDTH, log_scale=torch.zeros(())) for _ in range(2)]
    for head, number in zip(heads, (2, 3), strict=True):
        for _ in range(number):
            head.expand()
    for name, one in heads[0].named_parameters():
        assert torch.equal(one, heads[1].get_parameter(name))
    assert not torch.equal(heads[0].images[0].weight, heads[0].images[1].weight)


# Whole runs


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


def proof(folder: Path, model: Path, **settings) -> Recipe:
    tree = recipe(folder, model, "proof", templates=TEMPLATES).resolved()
    tree["method"] |= {"memory_per_class": KEPT, "dropout": 0.0} | settings
    return Recipe.from_tree(tree, "recipe.yaml")


def state(folder: Path, stage: int) -> dict[str, Tensor]:
    return load_file(folder / f"task_{stage}/state.safetensors")


@pytest.fixture(scope="module")
def alone(clip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("proof")
    run(proof(folder, clip))
    return folder


def test_old_projections_and_prompts_stay_to_the_bit(alone):
    for stage in (2, 3):
        before, now = state(alone, stage - 1), state(alone, stage)
        sides = [f"head.{side}.{stage - 2}" for side in ("images", "texts", "context")]
        for name in (name for name in before if name.startswith(tuple(sides))):
            assert torch.equal(now[name], before[name]), name
        assert not torch.equal(now["head.attention.query.weight"],
                               before["head.attention.query.weight"])  # fmt: skip
        assert f"head.images.{stage - 1}.weight" in now.keys() - before.keys()


def test_in_mode_released_old_projections_of_texts_go_on_training(clip, tmp_path):
    with pytest.warns(UserWarning, match="those that are asked beside it"):
        run(proof(tmp_path, clip, mode="released"))
    first, last = state(tmp_path, 1), state(tmp_path, 3)
    assert torch.equal(first["head.images.0.weight"], last["head.images.0.weight"])
    assert not torch.equal(first["head.texts.0.weight"], last["head.texts.0.weight"])


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_class_is_remembered_by_the_mean_of_all_its_images(mode, clip, tmp_path):
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        run(proof(tmp_path, clip, mode=mode))
    found = load_file(tmp_path / "task_3/memory.safetensors")["proof/means"]
    train = labelled(DATA, "train", TRAIN, number=NUMBER)
    encoder, order = Encoder(backbone("clip")), [0, 2, 3, 4, 5, 1]  # of seed 1993
    for mean, place in zip(found, order, strict=True):
        own = features(encoder, train.of([train.names[place]]))
        own = own if mode == "paper" else torch.stack([unit(one) for one in own])
        torch.testing.assert_close(mean.double(), own.mean(0), rtol=0, atol=1e-6)


def test_what_a_run_keeps_is_means_and_exemplars(alone):
    memory = load_file(alone / "task_3/memory.safetensors")
    assert memory["proof/means"].shape == (NUMBER, 20)
    assert len(memory["proof/exemplars/label"]) == KEPT * NUMBER


def test_a_run_without_exemplars_keeps_none(clip, tmp_path):
    run(proof(tmp_path, clip, memory_per_class=0))
    memory = load_file(tmp_path / "task_3/memory.safetensors")
    assert not len(memory["proof/exemplars/label"])


def test_a_deleted_stage_comes_back_to_the_same_bytes(clip, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    shutil.rmtree(folder / "task_3")
    run(proof(folder, clip))
    for name in ("state.safetensors", "memory.safetensors", "scores.json"):
        assert (folder / f"task_3/{name}").read_bytes() == (alone / f"task_3/{name}").read_bytes()


def test_a_run_that_was_killed_within_a_task_ends_where_it_would_have(
    clip, alone, tmp_path, monkeypatch
):
    tree = proof(tmp_path, clip).resolved()
    tree["training"] |= {"save_strategy": "steps", "save_steps": 2}
    saving, forward, calls = Recipe.from_tree(tree, "recipe.yaml"), Proof.before_forward, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6 + 4:  # in the second task, after its first checkpoint
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(Proof, "before_forward", dying)
    with pytest.raises(KeyboardInterrupt):
        run(saving)
    assert list((tmp_path / "task_2").glob("checkpoint-*"))
    run(saving)
    assert len(calls) == 10 + 4 + 6
    for name, value in state(alone, 3).items():
        assert torch.equal(state(tmp_path, 3)[name], value), name


def test_names_of_classes_to_come_are_told_from_those_learnt(alone):
    rows = json.loads((alone / "scores.json").read_text())["rows"]
    assert [row["zero_shot"]["seen"] is None for row in rows] == [True, False, False, False]
    assert [row["zero_shot"]["unseen"] is None for row in rows] == [False, False, False, True]


def test_a_model_of_its_own_is_asked_for_names_by_the_same_door():
    encoder = Encoder(backbone("clip"))
    head = Fusion(encoder.width, log_scale=torch.zeros(()), residual=True)
    model = Classifier(encoder, head).eval()
    head.expand()
    given, prompts = draw(3, encoder.width, seed=5), draw(CLASSES, 1, encoder.width, seed=6)
    logits = model(features=given, prompts=prompts).logits
    torch.testing.assert_close(logits, cosines(given, prompts[:, 0]), rtol=0, atol=1e-6)
