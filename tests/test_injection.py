"""ENGINE: its head and discriminant against loops in float64, and whole runs on a tiny CLIP."""

import json
import shutil
from dataclasses import replace
from itertools import permutations
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from class_cells import answers, assert_alike, run_together
from clip import reading_folder, tokenizer
from encoders import SIDE, backbone, pictures
from mllm_cl import Memory, Recipe, Task, run
from mllm_cl.data.labelled import labelled
from mllm_cl.data.pixels import preset
from mllm_cl.forecast import Launch
from mllm_cl.forecast_classes import forecast_classes
from mllm_cl.methods.class_incremental.engine import ENGINE
from mllm_cl.metrics.answers import metric
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.descriptions import Descriptions
from mllm_cl.model.discriminant import Discriminant
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype, cosines, ensemble
from mllm_cl.model.injection import Injection, Rules
from mllm_cl.model.texts import Reader
from mllm_cl.model.units import merged
from test_class_incremental import DATA, NUMBER, TEST, TRAIN, recipe
from test_encoded import counted

VISION, WIDTH, OLD, CLASSES, PROMPTS = 7, 5, 2, 5, 3
SCALE = log(5.0)
MODES = ["paper", "released"]
RULES = Rules(
    paper=True, text_des=0.7, image_aug=0.3, noise=0.0, stat=0.4, rerank=0.6, rerank_top=3
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(mode: str, rules: Rules = RULES, *, told: int = 1) -> Injection:
    """Two tasks of two and three classes; with one description of each nothing is random."""
    head = Injection(
        VISION,
        projection_DV=draw(WIDTH, VISION, seed=1),
        log_scale=SCALE,
        rules=replace(rules, paper=mode == "paper"),
    )
    head.expand()
    head.expand()
    head.hold(OLD, CLASSES - OLD)
    descriptions = [draw(told, WIDTH, seed=20 + place) for place in range(CLASSES)]
    head.inform(draw(OLD, WIDTH, seed=2), draw(CLASSES, PROMPTS, WIDTH, seed=3), descriptions)
    apart = draw(CLASSES, CLASSES, 1 if mode == "paper" else 3, WIDTH, seed=4)
    apart[range(CLASSES), range(CLASSES)] = 0
    head.judge(
        Discriminant.of(draw(40, VISION, seed=5), torch.arange(40) % CLASSES, CLASSES), apart
    )
    return head.eval()


# What the paper and its code say, by loops in float64


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def nll(logits: list[float], right: int) -> float:
    return log(sum(exp(one) for one in logits)) - logits[right]


def injected(layers, x: Tensor) -> Tensor:
    total = sum(one.weight.double() @ x.double() + one.bias.double() for one in layers)
    return total.detach()


def raw(head: Injection, v: Tensor) -> Tensor:
    return head.projection_DV.double() @ v.double()


def references(head: Injection, batch: Tensor, right: list[int], views: Tensor, mode: str):
    """The loss of a batch as one number."""
    rules = head.rules
    images = [raw(head, v) for v in batch] + [mean.double() for mean in head.mean_KD]
    images = [unit(injected(head.images, z)) for z in images]
    label = [*right, *range(OLD)]
    names = [unit(injected(head.texts, prompts[0])) for prompts in head.prompts_CPD]
    names = [names[y] for y in label]
    told = [unit(head.told[0][y].double()) for y in label]
    size = len(label)
    scale = exp(SCALE) if mode == "paper" else SCALE

    def contrast(own: list[Tensor], others: list[Tensor], factor: float, skip: bool) -> float:
        total = 0.0
        for a in range(len(own)):
            kept = [b for b in range(len(own)) if not skip or a == b or label[a] != label[b]]
            total += nll([factor * (own[a] @ others[b]).item() for b in kept], kept.index(a))
        return total / len(own)

    skip = mode == "paper"
    loss = (contrast(images, names, scale, skip) + contrast(names, images, scale, skip)) / 2
    seen = [unit(raw(head, v)) for v in views]
    pairs = [(rules.text_des, names, told), (rules.image_aug, images[: len(batch)], seen)]
    for weight, own, aims in pairs:
        if mode == "paper":
            near = [(a @ b).item() for a, b in zip(own, aims, strict=True)]
            loss -= weight * sum(near) / len(near)
        else:
            loss += weight * contrast(own, aims, 1.0, skip=False)
    assert size == len(names)
    return loss


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_loops(mode):
    head = head_of(mode)
    batch, views, right = draw(4, VISION, seed=6), draw(4, VISION, seed=7), [2, 4, 2, 3]
    found = head.losses(batch, torch.tensor(right), views).detach().double().mean()
    assert float(found) == pytest.approx(references(head, batch, right, views, mode), abs=2e-5)


def judged(head: Injection, v: Tensor, mode: str) -> tuple[list[float], list[float], list[float]]:
    """cos, r and o of one picture."""
    z = raw(head, v)
    image, own, names = unit(injected(head.images, z)), unit(z), []
    for prompts in head.prompts_CPD:
        parts = [unit(injected(head.texts, one)) for one in prompts]
        names.append(unit(sum(parts) / len(parts)))
    cosine = [float(image @ one) for one in names]
    top = sorted(range(CLASSES), key=lambda k: -cosine[k])[: head.rules.rerank_top]
    apart, fit = head.apart_CCRD.double(), {}
    for k in top:
        others, rounds = [j for j in top if j != k], []
        for r in range(apart.shape[2]):
            mean = sum(apart[k, j, r] for j in others) / len(others)
            rounds.append(float(own @ (mean if mode == "paper" else unit(mean))))
        fit[k] = sum(rounds) / len(rounds)
    rest = min(fit.values()) if mode == "paper" else 0.0
    again = [fit.get(k, rest) for k in range(CLASSES)]
    weight, bias = head.rule
    logits = weight @ unit(v.double()) + bias
    return cosine, again, (logits / logits.norm()).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_answer_is_that_of_loops_and_of_no_other_picture(mode):
    head, batch = head_of(mode), draw(70, VISION, seed=8)
    expected = []
    for v in batch:
        parts = zip(*judged(head, v, mode), strict=True)
        expected.append([0.4 * o + 0.6 * (0.6 * r + 0.4 * c) for c, r, o in parts])
    found = head(batch)
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)
    alone = torch.cat([head(one[None]) for one in batch])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
    turned = head(batch.flip(0)).flip(0)
    torch.testing.assert_close(found, turned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_looking_again_lets_no_class_overtake_the_candidates_in_the_paper_alone(mode):
    """In mode released one can, since what is no candidate has 0 where candidates have less."""
    head = head_of(mode, replace(RULES, stat=0.0, rerank=0.5, rerank_top=2))
    batch = draw(200, VISION, seed=9)
    cosine = torch.tensor([judged(head, v, mode)[0] for v in batch])
    inside = cosine.topk(2).indices
    kept = (head(batch).argmax(1)[:, None] == inside).any(1)
    assert bool(kept.all()) == (mode == "paper")


def test_the_discriminant_alone_answers_where_it_has_all_the_weight():
    head, batch = head_of("paper", replace(RULES, stat=1.0)), draw(9, VISION, seed=8)
    torch.testing.assert_close(head(batch), head.discriminated(batch), rtol=0, atol=1e-6)
    head.rules = replace(RULES, stat=0.0, rerank=0.0)
    cosine = torch.tensor([judged(head, v, "paper")[0] for v in batch])
    torch.testing.assert_close(head(batch), cosine, rtol=0, atol=1e-6)
    head.apart_CCRD = None  # without descriptions
    head(batch)


def test_candidates_are_no_more_than_the_classes():
    for known in (1, 2):
        head = Injection(VISION, projection_DV=torch.eye(VISION), log_scale=SCALE, rules=RULES)
        head.expand()
        head.grow(known)
        prompts = draw(known, 1, VISION, seed=1)
        head.inform(torch.zeros(0, VISION), prompts, None)
        labels = torch.arange(8) % known
        apart = torch.zeros(known, known, 1, VISION)
        head.judge(Discriminant.of(draw(8, VISION), labels, known), apart)
        assert head(draw(3, VISION)).isfinite().all()


def test_what_a_step_draws_is_noise_of_the_deviation_and_any_description():
    head = head_of("paper", replace(RULES, noise=0.25), told=4)
    noise = torch.stack([head._remembered() - head.mean_KD for _ in range(2000)])
    assert noise.std().item() == pytest.approx(0.25, rel=0.05)
    rows = head._told(torch.full((400,), 3))
    places = {int((row == head.told[0]).all(1).nonzero()) for row in rows}
    assert places == {12, 13, 14, 15}


def test_units_merged_into_one_give_what_their_sum_gives():
    head, x = head_of("paper"), draw(4, WIDTH, seed=8)
    for layers, found in ((head.images, head.image(x)), (head.texts, head.text(x))):
        torch.testing.assert_close(found, sum(layer(x) for layer in layers), rtol=0, atol=1e-5)
        weight, bias = merged(layers)
        torch.testing.assert_close(found, x @ weight.T + bias, rtol=0, atol=1e-5)


def test_what_trains_has_the_released_codes_count_at_512():
    head = Injection(768, projection_DV=torch.zeros(512, 768), log_scale=SCALE, rules=RULES)
    for _ in range(3):
        head.expand()
        assert sum(one.numel() for one in head.newest()) == 2 * (512 * 512 + 512)


# The discriminant


def precision(features: Tensor, labels: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    """The means and the shrunk precision of some classes' features, by the formula."""
    units = torch.stack([unit(one) for one in features.double()])
    means = torch.stack([units[labels == k].mean(0) for k in classes])
    centred = torch.cat([units[labels == k] - mean for k, mean in zip(classes, means, strict=True)])
    cov = torch.cov(centred.T)
    width = len(cov)
    wide = (len(centred) - 1) * cov + cov.trace() * torch.eye(width, dtype=torch.float64)
    return means, width * torch.linalg.inv(wide)


def test_the_discriminant_is_the_formulas():
    features, labels = draw(60, VISION, seed=1), torch.arange(60) % 4
    means, P = precision(features, labels, [0, 1, 2, 3])
    weight, bias = Discriminant.of(features, labels, 4).weights()
    torch.testing.assert_close(weight, means @ P, rtol=1e-9, atol=1e-9)
    expected = torch.stack([-log(4) - mean @ P @ mean / 2 for mean in means])
    torch.testing.assert_close(bias, expected, rtol=1e-9, atol=1e-9)


def stages(features: Tensor, labels: Tensor) -> list[Discriminant]:
    found = []
    for first, number in ((0, 2), (2, 3)):
        own = (labels >= first) & (labels < first + number)
        found.append(Discriminant.of(features[own], labels[own] - first, number))
    return found


def test_joined_discriminants_are_those_of_all_images_at_once():
    features, labels = draw(80, VISION, seed=2), torch.arange(80) % 5
    first, second = stages(features, labels)
    for found, expected in zip(
        Discriminant.restored(first.tensors()).joined(second).weights(),
        Discriminant.of(features, labels, 5).weights(),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_merged_discriminants_are_the_released_codes():
    features, labels = draw(80, VISION, seed=2), torch.arange(80) % 5
    old, P_old = precision(features, labels, [0, 1])
    new, P_new = precision(features, labels, [2, 3, 4])
    apart = (old.mean(0) - new.mean(0))[:, None]
    P = 2 / 5 * P_old + 3 / 5 * P_new + 2 / 5 * (3 / 25) * apart @ apart.T
    first, second = stages(features, labels)
    found = first.merged(second)
    torch.testing.assert_close(found.precision, P, rtol=1e-9, atol=1e-9)
    again = Discriminant.restored(found.tensors()).precision
    torch.testing.assert_close(again, P, rtol=1e-9, atol=1e-9)


def test_one_image_of_each_class_has_no_precision_and_still_an_answer():
    weight, bias = Discriminant.of(draw(3, VISION), torch.arange(3), 3).weights()
    assert weight.isfinite().all() and bias.isfinite().all()


# Features before the projection


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_encoder_without_its_projection_answers_what_is_projected_later(kind):
    encoder, x = Encoder(backbone(kind)), pictures()
    before = encoder(x)
    digest = set(encoder.weights_of(None))
    projection = encoder.unproject()
    assert encoder.joint and projection.shape == (before.shape[1], encoder.width)
    torch.testing.assert_close(encoder(x) @ projection.T, before, rtol=0, atol=1e-5)
    assert (encoder.weights_of(None).keys() == digest) == (kind == "siglip")


def test_a_model_without_texts_has_no_projection_to_them():
    with pytest.raises(ValueError, match="no text tower"):
        Encoder(backbone("vit")).unproject()


# Whole runs


def described(names) -> Descriptions:
    """Each composition by its own words, and against another by those that the other has not."""
    words = {name: tuple(name.split()) for name in names}
    pairs: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in names}
    for one, other in permutations(names, 2):
        apart = tuple(word for word in words[one] if word not in words[other])
        pairs[one][other] = apart or ("plain",)
    return Descriptions(words, pairs)


NAMES = labelled(DATA, "train", 1, number=NUMBER).names


UNLIKE = Descriptions(
    {name: tuple(name.split()) for name in NAMES},
    {one: {other: (f"not {other}",) for other in NAMES if other != one} for one in NAMES},
)


def informed(method: ENGINE, known: Memory) -> Injection:
    """The head of the second of three stages, of two classes each, before it trains."""
    encoder = Encoder(backbone("clip"))
    model = Classifier(
        encoder, Prototype(encoder.width), reader=Reader(tokenizer(), ("{}", "a photo {}"), 7)
    )
    model.descriptions = UNLIKE
    task = Task("3-4", 2, [], [], metric("exact_match"), labels=NAMES[2:4], earlier=NAMES[:2])
    method.before_task(model, task, known)
    method.before_forward(model, {}, known)
    return model.head


def test_training_knows_the_remembered_means_and_what_is_said_of_classes_so_far():
    known = Memory({"engine/prototypes": draw(2, 20, seed=1)})
    for method, counts in (
        (ENGINE(), [len(name.split()) for name in NAMES[:4]]),
        (ENGINE(mode="released"), [3] * 4),
        (ENGINE(mode="released", future=True), [NUMBER - 1] * 4),
    ):
        head = informed(method, known)
        assert torch.equal(head.mean_KD, known["engine/prototypes"])
        assert head.told[1].tolist() == counts
    assert informed(ENGINE(text_des=0.0), known).told is None


def test_what_is_drawn_in_a_step_depends_on_the_step_and_the_seed_alone():
    head, drawn = informed(ENGINE(), Memory({"engine/prototypes": draw(2, 20)})), []
    for seed, done in ((0, 0.1), (0, 0.1), (0, 0.2), (1, 0.1)):
        ENGINE(seed=seed).before_step(SimpleNamespace(head=head), Memory(), done)
        drawn.append(head._remembered())
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in drawn[2:])


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = reading_folder(tmp_path_factory.mktemp("clip"))
    names = labelled(DATA, "train", 1, number=NUMBER).names
    (folder / "descriptions.json").write_text(described(names).text())
    return folder


def injecting(folder: Path, model: Path, classes: dict | None = None, **settings) -> Recipe:
    own = {"templates": ["{}", "a photo {}"], "preprocessing": "clip"}
    own["descriptions"] = str(model / "descriptions.json")
    tree = recipe(folder, model, "engine", **(own | (classes or {}))).resolved()
    tree["method"] |= {"image_aug": 0.0} | settings
    return Recipe.from_tree(tree, "recipe.yaml")


def state(folder: Path, stage: int) -> dict[str, Tensor]:
    return load_file(folder / f"task_{stage}/state.safetensors")


@pytest.fixture(scope="module")
def alone(clip, tmp_path_factory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("engine")
    with counted() as seen:
        run(injecting(folder, clip))
    return folder, sum(seen)


def test_every_image_is_encoded_once_where_there_are_no_views(alone):
    assert alone[1] == NUMBER * (TRAIN + TEST)


def test_old_units_stay_to_the_bit(alone):
    folder = alone[0]
    for stage in (2, 3):
        before, now = state(folder, stage - 1), state(folder, stage)
        assert before.keys() < now.keys()
        assert all(torch.equal(now[name], before[name]) for name in before)
        newest = {f"head.{side}.{stage - 1}.{part}" for side in ("images", "texts")
                  for part in ("weight", "bias")}  # fmt: skip
        assert now.keys() - before.keys() == newest


def test_a_run_keeps_means_and_one_covariance_and_says_how_many_bytes_before(clip, alone):
    memory = load_file(alone[0] / "task_3/memory.safetensors")
    kept = sum(one.numel() * one.element_size() for one in memory.values())
    forecast = forecast_classes(injecting(alone[0], clip), Launch())
    assert forecast.kept_bytes == kept
    assert memory["engine/prototypes"].shape == (NUMBER, 20)
    assert memory["engine/upper"].shape == (24 * 25 // 2,)
    assert forecast.feature_bytes == 4 * 24 * NUMBER * (TRAIN + TEST)


def seen(encoder: Encoder, samples) -> Tensor:
    """What the tower makes of pictures, one at a time."""
    pixels = preset("clip", side=SIDE)
    with torch.no_grad():
        return torch.cat([encoder(pixels.test(one["images"][0])[None]) for one in samples])


def test_a_run_answers_as_loops_over_what_it_stored_do(clip, alone):
    folder, encoder, reader = alone[0], Encoder(backbone("clip")), Reader(tokenizer(), (), 7)
    projection = encoder.unproject().double()
    train, test = (labelled(DATA, split, size, number=NUMBER)
                   for split, size in (("train", TRAIN), ("test", TEST)))  # fmt: skip
    names = [train.names[place] for place in (0, 2, 3, 4, 5, 1)]  # of seed 1993
    own = [seen(encoder, train.of([name])) for name in names]
    memory, weights = load_file(folder / "task_3/memory.safetensors"), state(folder, 3)
    means = torch.stack([one.double().mean(0) @ projection.T for one in own])
    torch.testing.assert_close(memory["engine/prototypes"].double(), means, rtol=0, atol=1e-5)

    def injected(side: str, x: Tensor) -> Tensor:
        parts = [(weights[f"head.{side}.{t}.weight"], weights[f"head.{side}.{t}.bias"])
                 for t in range(3)]  # fmt: skip
        return unit(sum(weight.double() @ x + bias.double() for weight, bias in parts))

    def read(text: str) -> Tensor:
        tokens = reader.tokens([text])
        found = encoder.text(tokens["input_ids"], tokens["attention_mask"])
        return found[0].detach().double()

    texts = [unit(injected("texts", read(name)) + injected("texts", read(f"a photo {name}")))
             for name in names]  # fmt: skip
    said = described(names)
    fits = {
        (a, b): sum(unit(read(f"{a} with {text}")) for text in said.against(a, b))
        / len(said.against(a, b))
        for a, b in permutations(names, 2)
    }
    labels = torch.arange(NUMBER).repeat_interleave(TRAIN)
    mean, P = precision(torch.cat(own), labels, list(range(NUMBER)))
    expected = {}
    for first in range(0, NUMBER, 2):
        given = expected[f"{first + 1}-{first + 2}"] = []
        for v in seen(encoder, test.of(names[first : first + 2])).double():
            z = projection @ v
            cosine = [float(injected("images", z) @ text) for text in texts]
            top = sorted(range(NUMBER), key=lambda k: -cosine[k])[:5]
            fit = {k: sum(float(unit(z) @ fits[names[k], names[j]]) for j in top if j != k) / 4
                   for k in top}  # fmt: skip
            o = unit(mean @ P @ unit(v) - (mean @ P * mean).sum(-1) / 2 - log(NUMBER))
            score = [
                0.8 * float(o[k]) + 0.2 * (fit.get(k, min(fit.values())) + cosine[k]) / 2
                for k in range(NUMBER)
            ]
            given.append(names[score.index(max(score))])
    assert answers(folder, 3) == expected


def test_names_of_classes_to_come_are_told_from_those_learnt(alone):
    rows = json.loads((alone[0] / "scores.json").read_text())["rows"]
    assert [row["zero_shot"]["seen"] is None for row in rows] == [True, False, False, False]


@pytest.mark.parametrize("mode", MODES)
def test_with_views_every_step_encodes_them_and_nothing_else(mode, clip, tmp_path):
    with counted() as seen:
        run(injecting(tmp_path, clip, {"stages": 1}, mode=mode, image_aug=0.5))
    steps, batch = 6, 6
    assert sum(seen) == 2 * TRAIN + NUMBER * TEST + steps * batch


def test_a_deleted_stage_comes_back_to_the_same_bytes(clip, tmp_path):
    run(injecting(tmp_path / "one", clip, {"stages": 2}, mode="released", image_aug=0.5))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/task_2")
    run(injecting(tmp_path / "two", clip, {"stages": 2}, mode="released", image_aug=0.5))
    for name in ("state.safetensors", "memory.safetensors", "scores.json"):
        one, two = (tmp_path / folder / "task_2" / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


def test_a_run_that_was_killed_within_a_task_ends_where_it_would_have(
    clip, alone, tmp_path, monkeypatch
):
    tree = injecting(tmp_path, clip, {"stages": 2}).resolved()
    tree["training"] |= {"save_strategy": "steps", "save_steps": 2}
    saving, forward, calls = Recipe.from_tree(tree, "recipe.yaml"), ENGINE.before_forward, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6 + 4:  # in the second task, after its first checkpoint
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(ENGINE, "before_forward", dying)
    with pytest.raises(KeyboardInterrupt):
        run(saving)
    run(saving)
    assert len(calls) == 10 + 4
    for name, value in state(alone[0], 2).items():
        assert torch.equal(state(tmp_path, 2)[name], value), name


@pytest.mark.engines
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["ddp"])
def test_two_processes_learn_and_answer_as_one_does(engine, clip, tmp_path):
    one = injecting(tmp_path / "alone", clip, {"stages": 2}, image_aug=0.5)
    run(one)
    together = run_together(engine, one, tmp_path)
    files = "state", "memory"
    alone = tmp_path / "alone"
    assert_alike(engine, together, alone, *files, stages=(1, 2), atol=1e-5, rtol=1e-5)


def test_before_the_first_task_names_are_compared_as_the_model_does():
    head = Injection(
        VISION, projection_DV=draw(WIDTH, VISION, seed=1), log_scale=SCALE, rules=RULES
    )
    batch, prompts = draw(3, VISION, seed=5), draw(CLASSES, 2, WIDTH, seed=6)
    expected = cosines(batch @ head.projection_DV.T, ensemble(prompts))
    torch.testing.assert_close(head.by_name(batch, prompts), expected)
