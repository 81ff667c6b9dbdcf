"""Methods that train the encoder in every stage: what trains, losses by hand, whole runs, and the
copy that some of them ask.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from encoders import TYPES, backbone, pictures, vit_b16
from mllm_cl import Memory, Recipe, Task, load_method, run
from mllm_cl.checkpoint import mark
from mllm_cl.data.labelled import labelled
from mllm_cl.methods.class_incremental.sdc import compensation
from mllm_cl.model.alignment import Alignment, gaussian, normalised_logits
from mllm_cl.model.batch_norm import adapt_batch_norm, adapt_statistics, attach_statistics
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.precision import widen
from mllm_cl.model.surgery import only_train, restore_state
from mllm_cl.model.teacher import fill_copy, keep_copy, teacher_of
from mllm_cl.model.vision import attach_copy, unadapted
from test_class_incremental import DATA, NUMBER, TEST, TRAIN, answers, features, nearest, recipe
from test_exemplars import herded

ORDER = [0, 2, 3, 4, 5, 1]  # numpy.random.RandomState(1993).permutation(6), written out


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def learning(
    folder: Path, model: Path, method: str, stages: int | None = None, **settings
) -> Recipe:
    """A short run of a method, with settings of its own."""
    tree = recipe(folder, model, method, stages=stages).resolved()
    tree["training"] |= {"learning_rate": 1e-3, "logging_steps": 1}
    tree["method"] |= settings
    return Recipe.from_tree(tree, "recipe.yaml")


def kind(name: str):
    return load_method(name, "class_incremental")


def task(index: int, *names: str) -> Task:
    return Task(str(index), index, [], [], None, labels=names)


def begun(name: str, memory: Memory, model_type: str = "vit", **settings) -> Classifier:
    """A model in a second stage, of one new class after two."""
    encoder = Encoder(backbone(model_type))
    model = Classifier(encoder, Prototype(encoder.width))
    model.picture_bytes = 768
    memory[f"{name}/classes"] = torch.tensor(2)
    kind(name)(**settings).before_task(model, task(2, "c"), memory)
    return model


# What trains


@pytest.mark.parametrize("model_type", TYPES)
def test_what_pictures_depend_on_is_all_that_has_a_gradient(model_type):
    encoder = Encoder(backbone(model_type))
    encoder(pictures()).square().sum().backward()
    found = {name for name, one in encoder.backbone.named_parameters() if one.grad is not None}
    assert encoder.sight.keys() == found


def test_full_fine_tuning_trains_the_85_798_656_parameters_of_a_vit_b16():
    encoder = Encoder(vit_b16())
    assert sum(one.numel() for one in encoder.sight.values()) == 85_798_656


def test_adapters_train_beside_a_frozen_encoder():
    model = begun("finetune_adapter", Memory(), rank=4)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "bottleneck" in n or "head" in n}
    assert not any(name in model.encoder.sight for name in trained)


# Losses


def local_cross_entropy(logits: list[list[float]], labels: list[int], first: int) -> float:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total += math.log(sum(map(math.exp, row[first:]))) - row[label]
    return total / len(labels)


def test_fine_tuning_leaves_the_classes_of_earlier_stages_out_of_the_softmax():
    model = begun("finetune", Memory())
    model.head.grow(1)  # classes 0 to 2 | 3
    model.head.old = 2
    labels = torch.tensor([2, 3, 3])
    found = model(pixel_values=pictures(), labels=labels)
    expected = local_cross_entropy(found.logits.double().tolist(), labels.tolist(), 2)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)


def drawn(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def distance(before: list[list[float]], now: list[list[float]], temperature: float) -> float:
    """The mean over images of KL(before || now) of softened logits."""
    total = 0.0
    for one, other in zip(before, now, strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (one, other))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(before)


def term(name: str, before: Tensor | None, logits: Tensor, **settings) -> Tensor | None:
    outputs = SimpleNamespace(before=before, logits=logits)
    return kind(name)(**settings).loss(None, {}, outputs, Memory())


def test_lwf_adds_three_times_the_distance_of_softened_old_logits():
    before, logits = drawn(0, 4, 3), drawn(1, 4, 5)
    expected = 3 * distance(before.tolist(), logits[:, :3].tolist(), 2.0)
    assert float(term("lwf", before, logits)) == pytest.approx(expected, rel=1e-12)
    assert term("lwf", None, logits) is None


def test_icarl_as_released_adds_the_distance_once():
    before, logits = drawn(2, 4, 3), drawn(3, 4, 5)
    expected = distance(before.tolist(), logits[:, :3].tolist(), 2.0)
    assert float(term("icarl", before, logits)) == pytest.approx(expected, rel=1e-12)


def test_icarl_of_the_paper_is_equation_1():
    model = begun("icarl", Memory(), mode="paper")
    model.train()
    labels = torch.tensor([2, 0, 1])  # one new, two exemplars
    outputs = model(pixel_values=pictures(), labels=labels)
    found = outputs.loss + kind("icarl")(mode="paper").loss(model, {}, outputs, Memory())

    def g(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = 0.0
    rows = zip(outputs.logits.double().tolist(), outputs.before.double().tolist(), labels.tolist(),
               strict=True)  # fmt: skip
    for now, before, label in rows:
        targets = [g(x) for x in before] + [float(label == 2)]
        for x, target in zip(now, targets, strict=True):
            expected -= target * math.log(g(x)) + (1 - target) * math.log(1 - g(x))
    assert float(found.detach()) == pytest.approx(expected / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("lwf", {"strength": 0}, "strength must be positive"),
        ("icarl", {"local": True}, "icarl trains on old classes"),
        ("icarl", {"memory_size": 5, "budget_mb": 1.0}, "memory_size 5 and budget_mb 1.0"),
        ("icarl", {"memory_per_class": 0}, "memory_per_class must be above 0"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(name, settings, said):
    with pytest.raises(ValueError, match=said):
        kind(name)(**settings)


# The copy


@pytest.mark.parametrize("name", ["lwf", "icarl"])
def test_the_copy_is_no_part_of_the_model(name):
    model = begun(name, Memory())
    alone = begun("finetune", Memory())
    assert teacher_of(model) is not None
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in alone.named_parameters()]
    assert model.state_dict().keys() == alone.state_dict().keys()


def test_frozen_weights_are_not_copied():
    model = begun("finetune", Memory())
    only_train(model, list(model.head.parameters()))
    copied = keep_copy(model)
    for (name, one), other in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (one is other) == (not one.requires_grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_copy_answers_to_the_last_bit_whatever_the_precision(dtype, autocast):
    encoder = Encoder(backbone("vit").to(dtype))
    model, memory = Classifier(encoder, Prototype(encoder.width)), Memory()
    memory["lwf/classes"] = torch.tensor(2)
    kind("lwf")().before_task(model, task(2, "c"), memory)
    widen(model)
    fill_copy(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(pixel_values=pictures(), labels=torch.tensor([2, 2, 2]))
    assert torch.equal(found.before, found.logits[:, :2])


def what_is_asked(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """From here on, what the model and its copy answer about old classes in training."""
    found, forward = [], Classifier.forward

    def watched(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if outputs.before is not None and torch.is_grad_enabled():
            old = outputs.before.shape[1]
            found.append((outputs.before.clone(), outputs.logits[:, :old].detach().clone()))
        return outputs

    monkeypatch.setattr(Classifier, "forward", watched)
    return found


def test_the_copy_answers_as_the_model_did_at_the_end_of_the_stage_before(
    vit, tmp_path, monkeypatch
):
    seen = what_is_asked(monkeypatch)
    run(learning(tmp_path, vit, "lwf", stages=2))
    assert len(seen) == 6  # every step of the second stage
    assert seen[0][0].shape[1] == 2
    assert torch.equal(*seen[0])
    assert not torch.equal(*seen[1])


@pytest.mark.parametrize("name", ["lwf", "slca", "sdc"])
def test_a_stage_that_was_cut_off_ends_as_if_it_had_not_been(name, done, tmp_path, monkeypatch):
    """With the same copy, the same rates and the same features from before."""
    whole = done.of(name)
    broken = whole.resolved()
    broken["output_dir"] = str(tmp_path / "broken")
    broken["training"]["save_steps"] = 2
    broken["classes"]["stages"] = 2
    broken = Recipe.from_tree(broken, "recipe.yaml")
    step = Trainer.training_step

    def breaks(self, *args, **kwargs):
        if self.task.index == 2 and self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    assert (tmp_path / "broken/task_2/checkpoint-2/complete.json").exists()
    run(broken)
    for file in ("state.safetensors", "memory.safetensors"):
        found, expected = (load_file(folder / "task_2" / file)
                           for folder in (tmp_path / "broken", done[name]))  # fmt: skip
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# Whole runs

RUNS = {
    "finetune": {},
    "finetune_adapter": {"rank": 4, "dropout": 0.0},  # of which two processes draw differently
    "lwf": {},
    "icarl": {"memory_size": 12},
    "icarl-paper": {"memory_per_class": 2, "mode": "paper"},
    "icarl-linear": {"memory_size": 12, "answer": "linear"},
    "sdc": {},
    "slca": {"per_class": 8, "align_epochs": 2, "align_rate": 0.1},
}


@pytest.fixture(scope="module")
def done(vit, tmp_path_factory):
    """The folder of a whole run, made when it is asked for the first time."""

    class Done(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name)
            run(self.of(name))
            return self[name]

        def of(self, name: str, folder: Path | None = None) -> Recipe:
            return learning(folder or self[name], vit, name.partition("-")[0], **RUNS[name])

    return Done()


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All that a stage left but what it took and when."""
    left_out = ("cost.json", "complete.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in left_out]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["icarl", "slca"])
def test_a_deleted_stage_comes_back_to_the_same_bytes(name, done):
    folder = done[name] / "task_3"
    before = bytes_of(folder)
    assert "state.safetensors" in before
    shutil.rmtree(folder)
    run(done.of(name))
    after = bytes_of(folder)
    assert [path for path in before if before[path] != after.get(path)] in ([], ["log.json"])


@pytest.mark.parametrize("name", RUNS)
def test_what_is_kept_was_forecast_from_shapes(name, done):
    method, memory = done.of(name).method, load_file(done[name] / "task_3/memory.safetensors")
    encoder = Encoder(backbone("vit"))
    model = Classifier(encoder, Prototype(encoder.width))
    model.picture_bytes = 768
    method.before_task(model, task(1, "a", "b"), Memory())
    said = method.forecast_bytes(model, 3)
    assert 0.8 * said <= method.kept_bytes(Memory(memory)) <= said


@pytest.mark.parametrize("name", RUNS)
def test_the_state_holds_what_trained_and_no_copy(name, done):
    states = [load_file(done[name] / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert all(key.startswith(("encoder.backbone.", "head.")) for key in states[0])
    assert [len(state["head.weight"]) for state in states] == [2, 4, 6]


@pytest.mark.parametrize("name", ["finetune", "finetune_adapter", "lwf", "slca"])
def test_local_training_leaves_the_rows_of_old_classes_where_they_were(name, done):
    first, last = (load_file(done[name] / f"task_{stage}/state.safetensors")["head.weight"]
                   for stage in (1, 3))  # fmt: skip
    moved = (last[:2] - first).abs().max()
    # Weight decay is off; lwf's own term reaches them.
    assert (moved > 0) == (name == "lwf")


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_learns_and_answers_alike_whatever_the_size_of_batches_at_test(
    name, done, tmp_path
):
    folder = shutil.copytree(done[name], tmp_path / "run")
    shutil.rmtree(folder / "task_3")
    shutil.rmtree(folder / "features")
    tree = done.of(name, folder).resolved()
    tree["eval"]["batch_size"] = 3
    for stage in (0, 1, 2):  # which say how they were scored
        path = folder / f"task_{stage}/recipe.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval": tree["eval"]}))
        mark(path.parent)
    run(Recipe.from_tree(tree, "recipe.yaml"))
    file = "task_3/state.safetensors"
    assert (folder / file).read_bytes() == (done[name] / file).read_bytes()
    assert answers(folder, 3) == answers(done[name], 3)


def trained_encoder(folder: Path, stage: int) -> Encoder:
    """The encoder as the stage left it, from its state."""
    encoder = Encoder(backbone("vit"))
    state = load_file(folder / f"task_{stage}/state.safetensors")
    own = {n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")}
    restore_state(encoder, own)
    return encoder


def sets() -> tuple:
    return tuple(
        labelled(DATA, split, size, number=NUMBER)
        for split, size in (("train", TRAIN), ("test", TEST))
    )


@pytest.mark.parametrize("name", ["finetune", "lwf", "icarl-linear"])
def test_the_answer_is_the_largest_logit_of_all_classes_so_far(name, done):
    _, test = sets()
    names = [test.names[place] for place in ORDER]
    for stage in (1, 3):
        state = load_file(done[name] / f"task_{stage}/state.safetensors")
        encoder = trained_encoder(done[name], stage)
        given = answers(done[name], stage)
        assert len(given) == stage
        for place, (_, said) in enumerate(sorted(given.items())):
            x = features(encoder, test.of(names[2 * place : 2 * place + 2]))
            logits = x @ state["head.weight"].double().T + state["head.bias"].double()
            assert said == [names[k] for k in logits.argmax(1).tolist()]


# iCaRL's exemplars


@pytest.mark.parametrize("name", ["icarl", "icarl-paper"])
def test_icarl_answers_with_the_nearest_mean_of_the_exemplars_of_plain_herding(name, done):
    train, test = sets()
    names = [train.names[place] for place in ORDER]
    encoders = {stage: trained_encoder(done[name], stage) for stage in (1, 2, 3)}
    kept: dict[str, list[int]] = {}
    for stage in (1, 2, 3):
        number = {"icarl": 12 // (2 * stage), "icarl-paper": 2}[name]
        for one in names[2 * stage - 2 : 2 * stage]:
            kept[one] = herded(features(encoders[stage], train.of([one])).tolist(), number)
        kept = {one: places[:number] for one, places in kept.items()}
        means = {}
        for one, places in kept.items():
            x = features(encoders[stage], [train.of([one])[k] for k in places])
            means[one] = (x / x.norm(dim=1, keepdim=True)).mean(0)
        given = answers(done[name], stage)
        expected = {
            f"{first + 1}-{first + 2}": nearest(
                features(encoders[stage], test.of(names[first : first + 2])), means
            )
            for first in range(0, 2 * stage, 2)
        }
        assert given == expected


def test_exemplars_are_shared_by_all_classes_so_far_and_counted_in_bytes(done):
    for stage, number in ((1, 6), (2, 3), (3, 2)):
        folder = done["icarl"] / f"task_{stage}"
        memory = load_file(folder / "memory.safetensors")
        label_M = memory["icarl/exemplars/label"]
        assert torch.bincount(label_M).tolist() == [number] * 2 * stage
        own = sum(one.numel() * one.element_size() for one in memory.values())
        told = json.loads((folder / "manifest.json").read_text())["memory_bytes"]
        assert told == own + len(label_M) * 3 * 16 * 16


def test_a_budget_is_shared_by_the_encoder_and_the_exemplars(vit, tmp_path, capsys):
    model = 4 * sum(one.numel() for one in backbone("vit").parameters())
    budget = (model + 8 * 3 * 16 * 16 + 100) / 2**20
    run(learning(tmp_path / "run", vit, "icarl", stages=2, budget_mb=budget))
    memory = load_file(tmp_path / "run/task_2/memory.safetensors")
    assert torch.bincount(memory["icarl/exemplars/label"]).tolist() == [2, 2, 2, 2]
    assert "keeps 8 samples" in capsys.readouterr().out


def test_a_budget_below_the_model_ends_before_anything_trains(vit, tmp_path):
    with pytest.raises(ValueError, match=r"budget_mb is 0\.001, but the encoder alone takes"):
        run(learning(tmp_path, vit, "icarl", budget_mb=0.001))
    assert not (tmp_path / "task_1").exists()


def test_icarl_trains_on_the_stages_images_and_the_exemplars(done):
    memory = Memory(load_file(done["icarl"] / "task_2/memory.safetensors"))
    train, _ = sets()
    names = [train.names[place] for place in ORDER]
    stages = [
        replace(task(k, *names[2 * k - 2 : 2 * k]), train=train.of(names[2 * k - 2 : 2 * k]))
        for k in (1, 2, 3)
    ]
    samples = kind("icarl")(memory_size=12).train_set(stages[2], memory, stages[:2])
    counts = {name: [sample["label"] for sample in samples].count(name) for name in names}
    assert counts == dict.fromkeys(names[:4], 3) | dict.fromkeys(names[4:], TRAIN)


# SDC's drift


def moved(means: dict[str, Tensor], before: Tensor, after: Tensor, sigma: float) -> dict:
    """The means after a stage, by a plain loop."""
    found = {}
    for name, mean in means.items():
        weights = [math.exp(-float((z - mean).square().sum()) / (2 * sigma**2)) for z in before]
        drift = sum(w * (z - old) for w, z, old in zip(weights, after, before, strict=True))
        found[name] = mean + drift / sum(weights)
    return found


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_the_drift_of_a_far_mean_is_that_of_the_nearest_images():
    before, after = drawn(4, 5, 3), drawn(5, 5, 3)
    far = 100 * before[:1]  # every weight underflows
    nearest = (before - far).norm(dim=1).argmin()
    found = compensation(before, after, far, 0.3)
    torch.testing.assert_close(found[0], (after - before)[nearest])


def test_sdc_answers_with_the_nearest_of_means_that_moved_with_the_images_around_them(done):
    train, test = sets()
    names = [train.names[place] for place in ORDER]
    encoders = {stage: trained_encoder(done["sdc"], stage) for stage in (1, 2, 3)}
    means: dict[str, Tensor] = {}
    for stage in (1, 2, 3):
        own = names[2 * stage - 2 : 2 * stage]
        if stage > 1:
            before, after = (unit(features(encoders[k], train.of(own))) for k in (stage - 1, stage))
            means = moved(means, before, after, 0.3)
        means |= {one: unit(features(encoders[stage], train.of([one]))).mean(0) for one in own}
        expected = {}
        for first in range(0, 2 * stage, 2):
            x = unit(features(encoders[stage], test.of(names[first : first + 2])))
            said = [min(means, key=lambda one: float((z - means[one]).norm())) for z in x]
            expected[f"{first + 1}-{first + 2}"] = said
        assert answers(done["sdc"], stage) == expected
    memory = load_file(done["sdc"] / "task_3/memory.safetensors")
    assert sorted(memory) == ["sdc/classes", "sdc/means"]
    torch.testing.assert_close(
        memory["sdc/means"], torch.stack(list(means.values())), rtol=0, atol=1e-5
    )


# SLCA's rates and alignment


def test_the_encoder_of_slca_learns_a_hundred_times_as_slowly_as_its_head(vit, tmp_path):
    one = learning(tmp_path, vit, "slca").resolved()
    one["training"] |= {"max_steps": 1, "max_grad_norm": 0.0}
    one["classes"]["stages"] = 1
    run(Recipe.from_tree(one, "recipe.yaml"))
    before = begun("slca", Memory()).head.weight.detach()[:2]
    state = load_file(tmp_path / "task_1/state.safetensors")
    # AdamW's first step is the rate itself.
    assert float((state["head.weight"] - before).abs().max()) == pytest.approx(1e-3, rel=1e-2)
    plain = dict(Encoder(backbone("vit")).named_parameters(prefix="encoder"))
    steps = [
        float((state[name] - plain[name].detach()).abs().max()) for name in state if name in plain
    ]
    assert len(steps) == len(plain)
    assert max(steps) == pytest.approx(1e-5, rel=5e-2)
    log = json.loads((tmp_path / "task_1/log.json").read_text())
    assert log[0]["learning_rate"] == pytest.approx(1e-3)


def test_a_gaussian_is_the_mean_and_the_unbiased_covariance():
    x = drawn(6, 7, 3)
    mean_D, cov_DD = gaussian(x.float())
    rows = [[float(a) - sum(map(float, column)) / 7 for a in column] for column in x.T]
    for i in range(3):
        assert float(mean_D[i]) == pytest.approx(sum(x[:, i].tolist()) / 7, rel=1e-6)
        for j in range(3):
            expected = sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / 6
            assert float(cov_DD[i, j]) == pytest.approx(expected + 1e-4 * (i == j), rel=1e-5)
    assert torch.equal(gaussian(x[:1])[1], 1e-4 * torch.eye(3, dtype=torch.float64))


def test_logits_are_divided_by_the_mean_length_of_a_tasks_logits():
    logits = drawn(7, 2, 3)
    found = normalised_logits(logits, [1, 2], 0.1)
    for row, given in zip(found.tolist(), logits.tolist(), strict=True):
        length = (abs(given[0]) + (given[1] ** 2 + given[2] ** 2) ** 0.5) / 2
        assert row == pytest.approx([x / length / 0.1 for x in given], rel=1e-6)


def test_features_are_drawn_with_the_moments_of_their_class():
    x = drawn(8, 2, 9, 3) * torch.tensor([1.0, 3.0]).view(2, 1, 1) + 4
    means, covs = (torch.stack(one) for one in zip(*map(gaussian, x), strict=True))
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    alignment = Alignment(
        epochs=1, rate=0.1, number=20_000, temperature=0.1, weight_decay=0, seed=3
    )
    for features_BD, label_B in alignment._drawn(means, torch.linalg.cholesky(covs), 0):
        for label, own in found.items():
            own.append(features_BD[label_B == label])
    for label, parts in found.items():
        assert sum(map(len, parts)) == 20_000
        mean_D, cov_DD = gaussian(torch.cat(parts))
        scale = covs[label].diagonal().max()
        assert (mean_D - means[label]).abs().max() < 0.04 * scale**0.5
        assert (cov_DD - covs[label]).abs().max() < 0.04 * scale


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_slca_aligns_its_head_to_the_gaussians_of_all_classes(mode):
    method, memory = kind("slca")(mode=mode, per_class=16, align_epochs=3), Memory()
    model = begun("slca", memory, mode=mode)
    x, labels = drawn(9, 30, 24).float(), torch.arange(30) % 3
    whole = SimpleNamespace(whole=lambda: (x, labels))
    memory["slca/sizes"] = torch.tensor([2])
    for name, own in zip(("mean", "cov"), zip(*(gaussian(x[labels == k]) for k in (0, 1)),
                         strict=True), strict=True):  # fmt: skip
        memory[f"slca/{name}"] = torch.stack(own).float()
    method.after_task(model, task(2, "c"), memory, whole, None)
    scale = [0.95, 0.95, 1.0] if mode == "released" else [1.0, 1.0, 1.0]
    means = memory["slca/mean"].double() * torch.tensor(scale).double()[:, None]
    weights = [one.detach().double().clone() for one in (model.head.weight, model.head.bias)]
    speed = [torch.zeros_like(one) for one in weights]
    alignment = Alignment(
        epochs=3, rate=0.01, number=16, temperature=0.1, weight_decay=5e-4, seed=0
    )
    factors = torch.linalg.cholesky(memory["slca/cov"].double())
    for epoch in range(3):
        rate = 0.01 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for features_BD, label_B in alignment._drawn(means, factors, epoch):
            own = [one.requires_grad_() for one in weights]
            logits = features_BD @ own[0].T + own[1]
            length = (logits[:, :2].square().sum(1).sqrt() + logits[:, 2].abs()) / 2
            logits = logits / length[:, None] / 0.1
            total = logits.exp().sum(1).log() - logits[torch.arange(len(label_B)), label_B]
            slopes = torch.autograd.grad(total.mean(), own)
            speed = [0.9 * v + g + 5e-4 * w.detach()
                     for v, g, w in zip(speed, slopes, own, strict=True)]  # fmt: skip
            weights = [w.detach() - rate * v for w, v in zip(own, speed, strict=True)]
    model.eval()
    found = model(features=x).logits.double()
    torch.testing.assert_close(found, x.double() @ weights[0].T + weights[1], rtol=1e-4, atol=1e-4)


def test_slca_answers_with_the_aligned_head_and_learns_on_with_its_own(done):
    _, test = sets()
    names = [test.names[place] for place in ORDER]
    state, memory = (load_file(done["slca"] / f"task_3/{file}.safetensors")
                     for file in ("state", "memory"))  # fmt: skip
    own, given = trained_encoder(done["slca"], 3), answers(done["slca"], 3)
    weight, bias = (memory[f"slca/aligned/{name}"] for name in ("weight", "bias"))
    assert not torch.allclose(weight.float(), state["head.weight"], atol=1e-3)
    for place, (_, said) in enumerate(sorted(given.items())):
        logits = features(own, test.of(names[2 * place : 2 * place + 2])) @ weight.T + bias
        assert said == [names[k] for k in logits.argmax(1).tolist()]
    assert memory["slca/cov"].shape == (6, 24, 24)


# APER's adaptations that are none of parameters put in


def test_a_tuned_copy_trains_all_weights_and_leaves_the_encoder_as_it_is():
    encoder = Encoder(vit_b16())
    trained = attach_copy(encoder)
    assert sum(one.numel() for one in trained.values()) == 85_798_656
    assert sum(one.numel() for one in encoder.parameters()) == 2 * 85_798_656


@pytest.mark.parametrize("model_type", TYPES)
def test_a_tuned_copy_answers_in_the_place_of_the_encoder(model_type):
    encoder, plain = (Encoder(backbone(model_type)) for _ in range(2))
    own = {name for name, _ in encoder.named_parameters()}
    trained = attach_copy(encoder)
    with torch.no_grad():
        before = plain(pictures())
        assert torch.equal(encoder(pictures()), before)
        for one in trained.values():
            one += 0.1
        assert not torch.allclose(encoder(pictures()), before, atol=1e-2)
        with unadapted(encoder):
            assert torch.equal(encoder(pictures()), before)
    copies = {name.replace(".tuned.own", "") for name in trained}
    assert copies == {f"backbone.{name}" for name in plain.sight}
    assert own < {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize("adaptation", ["finetune", "bn"])
def test_aper_adapts_in_its_first_stage_alone_and_joins_both_branches(adaptation, tmp_path):
    kind = "resnet" if adaptation == "bn" else "vit"
    backbone(kind).save_pretrained(tmp_path / "model")
    model, settings = tmp_path / "model", {"adaptation": adaptation, "passes": 2}
    run(learning(tmp_path / "run", model, "aper", stages=2, **settings))
    run(recipe(tmp_path / "plain", model, stages=2))
    first, later = (load_file(tmp_path / f"run/task_{k}/state.safetensors") for k in (1, 2))
    assert first and later.keys() == first.keys()
    assert all(torch.equal(later[name], first[name]) for name in later)
    joined = load_file(tmp_path / "run/task_2/memory.safetensors")["aper/sum"]
    frozen = load_file(tmp_path / "plain/task_2/memory.safetensors")["simplecil/sum"]
    width = frozen.shape[1]
    torch.testing.assert_close(joined[:, :width], frozen, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(joined[:, width:], frozen, atol=1e-3)


def test_batch_statistics_of_a_copy_follow_the_pictures_and_the_norms_stay():
    encoder, plain = (Encoder(backbone("resnet")) for _ in range(2))
    attach_statistics(encoder)
    before = plain(pictures())
    assert torch.equal(encoder(pictures()), before)
    batches = [pictures(4, seed=seed) for seed in range(3)]
    adapt_statistics(encoder, encoder, batches)
    with unadapted(encoder):
        assert torch.equal(encoder(pictures()), before)
    own = dict(plain.named_buffers())
    assert all(torch.equal(value, own[name]) for name, value in encoder.named_buffers())
    adapt_batch_norm(plain, batches)
    torch.testing.assert_close(encoder(pictures()), plain(pictures()), rtol=0, atol=1e-6)


def test_batch_statistics_need_batch_norms(vit, tmp_path):
    with pytest.raises(ValueError, match="no batch normalisation to adapt: use a ResNet"):
        run(learning(tmp_path, vit, "aper", adaptation="bn"))


# Engines
