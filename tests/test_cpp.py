"""CPP: its clusters, contrast and answers against plain loops in float64, and whole runs."""

import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from encoders import BLOCKS, TRANSFORMERS, WIDTH, backbone, pictures, vit_b16
from mllm_cl import Memory, Recipe, load_method, run
from mllm_cl.model.centroids import Finder, centroids
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.contrast import Contrast, contrast
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.prompts import Pool
from mllm_cl.model.vision import unadapted
from test_class_incremental import recipe
from test_prompts import cosine, task

SMALL = {"length": 2, "centroids": 2, "candidates": 2, "hidden": 8, "negatives": 5}


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Images:
    """The `batches` of a method: pictures of classes as the model encodes them when asked."""

    def __init__(self, model, x, labels) -> None:
        self.model, self.x, self.labels = model, x, labels

    @torch.no_grad()
    def whole(self):
        model = self.model.eval()
        found = [model(pixel_values=one[None], only_features=True).features for one in self.x]
        return torch.cat(found), self.labels


def learnt(tasks: int = 2, *, model_type: str = "vit", **settings):
    """CPP after some tasks of two classes of four pictures each, whose prompts went somewhere."""
    method, memory = load_method("cpp", "class_incremental")(**(SMALL | settings)), Memory()
    x, labels = pictures(8 * tasks), torch.arange(8 * tasks) // 4
    prompts = []
    for index in range(1, tasks + 1):
        model = Classifier(encoder := Encoder(backbone(model_type)), Prototype(encoder.width))
        method.before_task(model, task(index), memory)
        pools = [one for one in encoder.modules() if isinstance(one, Pool)]
        prompts.append([0.5 * random(1, 2, WIDTH, seed=index * 10 + place) for place in range(3)])
        with torch.no_grad():
            for place, pool in enumerate(pools):
                for number, one in enumerate(pool.pool):
                    one.copy_(prompts[number][place])
        own = slice(8 * (index - 1), 8 * index)
        images = Images(model, x[own], labels[own])
        method.after_task(model, task(index), memory, images, lambda tensor: tensor)
    return method, model, memory, prompts, x, labels


@torch.no_grad()
def prompted(x, prompts):
    """The features of a ViT before each block of which prompts come after the class token."""
    model = backbone("vit")
    h = model.embeddings(x)
    for layer, prompt in zip(model.layers, prompts or [None] * BLOCKS, strict=True):
        if prompt is None:
            h = layer(h)
        else:
            h = layer(torch.cat([h[:, :1], prompt.expand(len(x), -1, -1), h[:, 1:]], 1))
            h = torch.cat([h[:, :1], h[:, 1 + prompt.shape[1] :]], 1)
    return model.layernorm(h)[:, 0]


# The parts


def test_clusters_that_lie_apart_are_found_and_have_their_mean_and_variance():
    middles = 10 * torch.eye(4, 6)
    points = torch.cat([middle + 0.3 * random(7, 6, seed=k) for k, middle in enumerate(middles)])
    order = torch.randperm(28, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        means, variances = centroids(points[order], 4, torch.Generator().manual_seed(seed))
        places = means.argmax(-1).tolist()
        assert sorted(places) == [0, 1, 2, 3]
        for place, mean, variance in zip(places, means, variances, strict=True):
            own = points[7 * place : 7 * place + 7].double()
            torch.testing.assert_close(mean, own.mean(0))
            torch.testing.assert_close(variance, (own - own.mean(0)).square().mean(0))


@pytest.mark.parametrize("number", [1, 3])
def test_there_are_no_more_clusters_than_pictures_and_each_picture_is_in_one(number):
    points = random(number, 6)
    means, variances = centroids(points, 5, torch.Generator().manual_seed(0))
    assert len(means) == number and not variances.any()
    assert {tuple(row) for row in means.tolist()} == {
        tuple(row) for row in points.double().tolist()
    }
    same, _ = centroids(points[:1].expand(4, -1), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, points[:1].double())


def by_loop(anchors, labels, others, labels_of_others, temperature):
    found = []
    for place, (anchor, label) in enumerate(zip(anchors, labels, strict=True)):
        logits = [float(anchor @ other) / temperature for other in others]
        near = [logit for at, (logit, one) in enumerate(zip(logits, labels_of_others, strict=True))
                if one == label and at != place]  # fmt: skip
        far = [logit for logit, one in zip(logits, labels_of_others, strict=True) if one != label]
        second = torch.tensor(far).double().logsumexp(0) if far else 0.0
        found.append(float(second - sum(near) / len(near)) if near else 0.0)
    return found


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("known", [0, 5])
def test_the_loss_is_the_papers_in_float64_and_the_released_one_has_more_anchors(known, both):
    head = Contrast(6, 8, temperature=0.6, both=both, seed=0)
    x, labels = random(7, 6), torch.tensor([3, 4, 3, 3, 4, 4, 5])
    head.known_KD, head.label_K = (
        3 * random(known, 6, seed=1),
        torch.tensor([0, 1, 0, 2, 1])[:known],
    )
    z = x.double().detach()
    for place, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True)):
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5)) if place else z
        z = (z @ weight.double().T + bias.double()).detach()
    z = z / z.norm(dim=-1, keepdim=True)
    others = torch.cat([z, head.known_KD.double() / head.known_KD.double().norm(dim=-1)[:, None]])
    of_others = [*labels.tolist(), *head.label_K.tolist()]
    anchors = len(others) if both else 7
    expected = by_loop(others[:anchors], of_others[:anchors], others, of_others, 0.6)
    assert expected[6] == 0.0, "it is alone in its class"
    assert float(head.losses(x, labels).mean()) == pytest.approx(sum(expected) / anchors, abs=1e-5)


def test_a_batch_of_one_class_is_drawn_together():
    z, labels = functional.normalize(random(3, 4), dim=-1), torch.zeros(3, dtype=torch.long)
    found = contrast(z, labels, z, labels, temperature=0.5)
    assert found.tolist() == pytest.approx(by_loop(z, [0] * 3, z, [0] * 3, 0.5), abs=1e-5)


# The whole


@torch.no_grad()
def test_keys_find_the_tasks_and_the_nearest_value_of_all_answers():
    _, model, memory, prompts, x, labels = learnt(3)
    frozen, known = prompted(x, None), memory.under("cpp")
    kinds = {
        "key": lambda index, own: frozen[own],
        "value": lambda index, own: prompted(x[own], prompts[index]),
    }
    for name, features in kinds.items():
        for place in range(6):
            own = labels == place
            means = features(place // 2, own).double()
            kept = known[name][known["class"] == place]
            assert len(kept) == 2
            # Two clusters of four pictures: their mean, weighed by how many each has.
            split = [
                means[list(pair)].mean(0)
                for number in (1, 2, 3)
                for pair in combinations(range(4), number)
            ]
            assert all(
                min(float((one - mean).abs().max()) for mean in split) < 1e-4 for one in kept
            )
    expected = []
    for number, one in enumerate(x):
        order = sorted(range(12), key=lambda key: -cosine(frozen[number], known["key"][key]))[:2]
        tasks = [int(known["task"][key]) for key in order]
        found = [prompted(one[None], prompts[index])[0] for index in tasks]
        values = [max(cosine(feature, value) for feature in found) for value in known["value"]]
        best = max(range(12), key=lambda place: values[place])
        expected.append(int(known["class"][best]))
    assert len(set(expected)) > 2
    logits = model.eval()(pixel_values=x).logits
    assert logits.argmax(-1).tolist() == expected
    alone = torch.cat([model(pixel_values=one[None]).logits for one in x.flip(0)]).flip(0)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_prompts_of_every_task_reach_the_features_of_every_family(model_type):
    _, model, _, _, x, _ = learnt(2, model_type=model_type)
    encoder = model.encoder.eval()
    encoder.finder.show(Finder.NEWEST)
    newest = encoder(x)
    encoder.finder.show(Finder.FROZEN)
    frozen = encoder(x)
    with unadapted(encoder):
        assert torch.equal(encoder(x), frozen)
    torch.testing.assert_close(frozen, Encoder(backbone(model_type))(x), rtol=0, atol=1e-6)
    assert (newest - frozen).abs().max() > 1e-3
    torch.testing.assert_close(encoder.train()(x), newest, rtol=0, atol=1e-5)


def test_all_of_it_works_in_bf16():
    method, model, memory, _, x, _ = learnt(2)
    model.bfloat16()
    assert model.eval()(pixel_values=x.bfloat16()).logits.dtype == torch.float32
    model = Classifier(Encoder(backbone("vit")), Prototype(WIDTH))
    method.before_task(model, task(3), memory)
    method.before_step(model, memory, 0.0)
    model.bfloat16().train()
    model(pixel_values=x.bfloat16(), labels=torch.arange(16) // 4 + 4).loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert all(one.grad.isfinite().all() and one.grad.any() for one in trained)


def test_what_a_step_is_contrasted_with_is_drawn_around_old_centroids_by_the_step_alone():
    method, model, memory, *_ = learnt(2, noise=0.5)
    method.before_task(
        model := Classifier(Encoder(backbone("vit")), Prototype(WIDTH)), task(3), memory
    )
    drawn = []
    for done in (0.0, 0.5, 0.0):
        method.before_step(model, memory, done)
        drawn.append(model.head.known_KD)
        assert len(model.head.label_K) == 5
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    known = memory.under("cpp")
    many = load_method("cpp", "class_incremental")(**(SMALL | {"negatives": 4000, "noise": 0.5}))
    many.before_step(model, memory, 0.0)
    for value, variance, label in zip(
        known["value"], known["variance"], known["class"], strict=True
    ):
        near = (model.head.known_KD - value).square().mean(-1) < 4 * 0.25 * variance.mean() + 1e-9
        own = model.head.known_KD[near & (model.head.label_K == label)]
        assert len(own) > 100
        torch.testing.assert_close(
            own.mean(0), value, rtol=0, atol=0.15 * float(variance.sqrt().max()) + 1e-6
        )


def test_a_vit_b16_trains_as_many_numbers_as_the_paper_says():
    model = Classifier(Encoder(vit_b16()), Prototype(768))
    load_method("cpp", "class_incremental")().before_task(model, task(3, 10), Memory())
    trained = [one.numel() for one in model.encoder.parameters() if one.requires_grad]
    assert trained == [768] * 12
    neck = sum(one.numel() for one in model.head.parameters())
    assert neck == 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768


@pytest.mark.parametrize("settings", [{"candidates": 0}, {"temperature": 0.0}])
def test_numbers_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        learnt(**settings)


# Runs


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def contrasted(folder: Path, model: Path, **training) -> Recipe:
    tree = recipe(folder, model, "cpp").resolved()
    tree["method"] |= SMALL | {"mode": "released"}
    # Where a gradient is rounding alone, Adam would make a step of it.
    tree["training"] |= {"adam_epsilon": 1e-4} | training
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    run(contrasted(folder, vit))
    return folder


def test_a_deleted_stage_comes_back_to_the_same_bytes(vit, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    timed = {"cost.json", "log.json", "complete.json"}  # the last has the hashes of the others
    files = [p for p in (folder / "task_3").rglob("*") if p.is_file() and p.name not in timed]
    before = {path: path.read_bytes() for path in files}
    shutil.rmtree(folder / "task_3")
    shutil.rmtree(folder / "features")
    run(contrasted(folder, vit))
    assert [path.name for path in files if path.read_bytes() != before[path]] == []


def test_earlier_prompts_and_centroids_stay_to_the_bit_and_the_neck_is_thrown_away(alone):
    states = [load_file(alone / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    memories = [load_file(alone / f"task_{stage}/memory.safetensors") for stage in (1, 2, 3)]
    assert not any("head" in name for name in states[2])
    for before, after in zip(states, states[1:], strict=False):
        assert len(after) == len(before) + BLOCKS
        assert all(torch.equal(after[name], before[name]) for name in before)
    for before, after in zip(memories, memories[1:], strict=False):
        for name in ("cpp/key", "cpp/value", "cpp/class", "cpp/task", "cpp/variance"):
            assert torch.equal(after[name][: len(before[name])], before[name])
            assert len(after[name]) > len(before[name])
