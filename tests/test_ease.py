"""EASE against loops in float64, adapters side by side in one encoder, and whole runs of it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoders import TRANSFORMERS, backbone, pictures, vit_b16
from mllm_cl import Recipe, run
from mllm_cl.data.labelled import labelled
from mllm_cl.features import FeatureCache
from mllm_cl.memory import Memory
from mllm_cl.method import load_method
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.subspaces import Subspaces, complemented
from mllm_cl.model.surgery import restore_state
from mllm_cl.model.vision import attach_adapters, show, unadapted
from mllm_cl.task import Task
from test_class_incremental import DATA, NUMBER, TEST, TRAIN, answers, features, recipe

ORDER = [0, 2, 3, 4, 5, 1]  # numpy.random.RandomState(1993).permutation(6), written out
ADAPTERS = ["adapter_1", "adapter_2", "adapter_3"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def ease(folder: Path, vit: Path, batch_size: int = 5, **settings) -> Recipe:
    tree = recipe(folder, vit, "ease").resolved()
    tree["method"] |= {"rank": 4, "dropout": 0.0} | settings
    tree["eval"] = {"batch_size": batch_size}
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory) -> Path:
    return run(ease(tmp_path_factory.mktemp("ease"), vit))


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def scores(parts: list, prototypes: dict, task_of: list[int], other: float) -> torch.Tensor:
    """What each class gets for one picture, whose features are `parts`, by a plain loop.

    `prototypes[c, j]` is there for j up to the task of c; others are made of newer classes.
    """
    classes, subspaces = range(len(task_of)), range(len(parts))
    found = []
    for c in classes:
        i, total = task_of[c], 0.0
        for j in subspaces:
            if (c, j) in prototypes:
                prototype = prototypes[c, j]
            else:
                newer = [n for n in classes if task_of[n] >= j]
                likeness = [cosine(prototypes[c, i], prototypes[n, i]) for n in newer]
                share = torch.tensor(likeness, dtype=torch.float64).softmax(0)
                prototype = sum(s * prototypes[n, j] for s, n in zip(share, newer, strict=True))
            total += (1.0 if i == j else other) * cosine(parts[j], prototype)
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def test_the_head_is_the_sum_of_cosines_in_all_subspaces():
    generator = torch.Generator().manual_seed(0)
    task_of, head, prototypes = [0, 0, 0, 1, 1, 2], None, {}
    known: dict[str, torch.Tensor] = {}
    for task, number in enumerate((3, 2, 1)):
        first = task_of.index(task)
        x = torch.randn(4 * number, 7 * (task + 1), generator=generator) + 0.5
        labels = first + torch.arange(4 * number) % number
        head = Subspaces(7 * (task + 1), other=0.1)
        head.restore(known)
        batches = [{"features": x[:5], "labels": labels[:5]}]
        batches.append({"features": x[5:], "labels": labels[5:]})
        known = head.learn(number, batches)
        for c in range(first, first + number):
            mean = x[labels == c].double().mean(0)
            prototypes |= {(c, j): mean[7 * j : 7 * j + 7] for j in range(task + 1)}
    test = torch.randn(5, 21, generator=generator)
    expected = [scores(x.double().split(7), prototypes, task_of, 0.1) for x in test]
    torch.testing.assert_close(head(test).double(), torch.stack(expected), atol=1e-6, rtol=0)


def test_what_was_seen_in_a_subspace_is_not_made_up():
    means = [torch.randn(2, 1, 5), torch.randn(3, 2, 5)]
    found = complemented(means)
    assert torch.equal(found[:2, :1], means[0]) and torch.equal(found[2:], means[1])
    shares = torch.linalg.lstsq(found[2:, 1].T, found[:2, 1].T).solution
    torch.testing.assert_close(shares.sum(0), torch.ones(2))


# Adapters side by side


def side_by_side(model_type: str = "vit") -> Encoder:
    encoder = Encoder(backbone(model_type))
    generator = torch.Generator().manual_seed(3)
    for place, name in enumerate(ADAPTERS):
        own = attach_adapters(encoder, rank=4, dropout=0.0, seed=place, name=name)
        for value in own.values():
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_each_adapter_answers_as_if_it_were_alone(model_type):
    encoder = side_by_side(model_type)
    state = {name: value.clone() for name, value in encoder.named_parameters()}
    width = encoder.width
    show(encoder, {name: (name,) for name in ADAPTERS})
    assert encoder.width == 3 * width
    for place, part in enumerate(encoder(pictures()).split(width, dim=1)):
        one = Encoder(backbone(model_type))
        attach_adapters(one, rank=4, name=ADAPTERS[place])
        restore_state(one, {k: v for k, v in state.items() if k in dict(one.named_parameters())})
        assert torch.equal(part, one(pictures()))
    with encoder.showing(ADAPTERS[1:2]):
        torch.testing.assert_close(encoder(pictures()).shape, (3, width))
    plain = Encoder(backbone(model_type))(pictures())
    show(encoder, {"frozen": ()})
    assert torch.equal(encoder(pictures()), plain)
    with unadapted(encoder):
        assert torch.equal(encoder(pictures()), plain)


def test_checkpointing_changes_no_gradient_of_the_adapter_that_trains():
    found = []
    for checkpointed in (False, True):
        encoder = side_by_side().requires_grad_(False)
        show(encoder, {ADAPTERS[1]: ADAPTERS[1:2]})
        own = [one.requires_grad_() for one in encoder.weights_of(ADAPTERS[1]).values()]
        if checkpointed:
            encoder.backbone.gradient_checkpointing_enable()
        encoder.train()(pictures()).square().sum().backward()
        assert all(one.grad is not None for one in own)
        found.append([one.grad for one in own])
    torch.testing.assert_close(*found)


def test_a_part_owns_the_weights_that_it_alone_depends_on():
    encoder = side_by_side()
    show(encoder, {name: (name,) for name in ADAPTERS})
    every = dict(encoder.named_parameters())
    own = {name: encoder.weights_of(name) for name in ADAPTERS}
    assert all(f".{name}." in path for name in ADAPTERS for path in own[name])
    shared = encoder.weights_of(None)
    assert sum(map(len, own.values())) + len(shared) == len(every)
    assert shared.keys() == dict(Encoder(backbone("vit")).named_parameters()).keys()


@pytest.mark.parametrize(("rank", "count"), [(16, 304_320), (64, 1_189_632)])
def test_a_task_trains_one_set_of_adapters_and_a_head(rank, count):
    samples = labelled(DATA, "train", 1, number=2)
    encoder = Encoder(vit_b16())
    model, memory = Classifier(encoder, Prototype(encoder.width)), Memory()
    memory["ease/classes"] = torch.tensor(2)
    task = Task("3-4", 2, samples, samples, lambda *_: 0.0, labels=samples.names)
    load_method("ease", "class_incremental")(rank=rank).before_task(model, task, memory)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    adapters = {name: one for name, one in trained.items() if ".adapter_2." in name}
    assert sum(one.numel() for one in adapters.values()) == count
    assert trained.keys() - adapters.keys() == {"head.weight", "head.sigma"}
    assert model.head.old == 2 and model.head.number == 4 and model.local


# Whole runs


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_run_answers_by_the_prototypes_of_all_adapters(mode, alone, vit, tmp_path):
    folder = alone if mode == "paper" else run(ease(tmp_path, vit, mode=mode))
    encoder = Encoder(backbone("vit"))
    for name in ADAPTERS:
        attach_adapters(encoder, rank=4, name=name)
    state = load_file(folder / "task_3/state.safetensors")
    restore_state(Classifier(encoder, Prototype(encoder.width)), state)
    train, test = (labelled(DATA, split, size, number=NUMBER) for split, size in
                   (("train", TRAIN), ("test", TEST)))  # fmt: skip
    names = [train.names[place] for place in ORDER]

    def under(adapter: str, samples) -> torch.Tensor:
        show(encoder, {adapter: (adapter,)})
        return features(encoder, samples)

    task_of = [0, 0, 1, 1, 2, 2]
    prototypes = {
        (c, j): under(ADAPTERS[j], train.of([name])).mean(0)
        for c, name in enumerate(names)
        for j in range(task_of[c] + 1)
    }
    other = 0.1 if mode == "paper" else 0.1 / 2
    for first in range(0, NUMBER, 2):
        own = test.of(names[first : first + 2])
        parts = torch.stack([under(adapter, own) for adapter in ADAPTERS], dim=1)
        given = [names[int(scores(x, prototypes, task_of, other).argmax())] for x in parts]
        assert answers(folder, 3)[f"{first + 1}-{first + 2}"] == given


def test_adapters_of_earlier_tasks_stay_and_heads_go(alone):
    states = [load_file(alone / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    for earlier, later in zip(states, states[1:], strict=False):
        assert all(torch.equal(later[name], value) for name, value in earlier.items())
        assert len(later) > len(earlier)
    assert not any("head" in name for state in states for name in state)
    assert all(value.any() for value in states[-1].values())


def test_a_picture_meets_every_adapter_once(vit, tmp_path, monkeypatch):
    met, encoded = [], FeatureCache._encoded

    def counted(self, samples, name):
        met.extend((name, part) for part in self.model.encoder.shown)
        return encoded(self, samples, name)

    monkeypatch.setattr(FeatureCache, "_encoded", counted)
    run(ease(tmp_path, vit))
    tasks = ["1-2", "3-4", "5-6"]
    trained = [(f"{tasks[i]}-train", ADAPTERS[j]) for i in range(3) for j in range(i + 1)]
    tested = [(f"{task}-test", adapter) for task in tasks for adapter in ADAPTERS]
    assert sorted(met) == sorted(trained + tested)


def test_it_keeps_what_was_forecast(alone, vit, tmp_path):
    done = ease(tmp_path, vit)
    encoder = Encoder(backbone("vit"))
    model = Classifier(encoder, Prototype(encoder.width))
    samples = labelled(DATA, "train", 1, number=2)
    task = Task("1-2", 1, samples, samples, lambda *_: 0.0, labels=samples.names)
    done.method.before_task(model, task, Memory())
    memory = Memory.load(alone / "task_3/memory.safetensors")
    assert done.method.kept_bytes(memory) == done.method.forecast_bytes(model, 3)


def test_the_batch_size_of_a_test_changes_no_answer(alone, vit, tmp_path):
    other = run(ease(tmp_path, vit, batch_size=1))
    for stage in (1, 2, 3):
        assert answers(other, stage) == answers(alone, stage)


def test_a_deleted_stage_comes_back_to_the_same_bytes(alone, vit, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(folder / "task_3")
    run(ease(folder, vit))
    for name in ("memory.safetensors", "state.safetensors", "scores.json"):
        assert (folder / "task_3" / name).read_bytes() == (alone / "task_3" / name).read_bytes()
    assert answers(folder, 3) == answers(alone, 3)
