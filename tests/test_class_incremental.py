"""Whole class-incremental runs on a tiny backbone and drawn compositions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from class_cells import answers, assert_alike, run_together
from encoders import SIDE, backbone
from mllm_cl import Recipe, classifier, cli, run
from mllm_cl.data.labelled import labelled
from mllm_cl.data.pixels import preset
from mllm_cl.model.encoder import Encoder
from mllm_cl.recipe import RecipeError

DATA, NUMBER, TRAIN, TEST = "toy:compositions", 6, 6, 4


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, method: str = "simplecil", **classes) -> Recipe:
    tree = {
        "output_dir": str(folder),
        "model": {"model_name_or_path": str(model)},
        "method": {"name": method},
        "classes": {
            "data": DATA,
            "number": NUMBER,
            "increment": 2,
            "preprocessing": "paper_compat",
            "train_size": TRAIN,
            "eval_size": TEST,
        }
        | classes,
        "training": {"max_steps": 6, "per_device_train_batch_size": 6, "learning_rate": 0.01},
        "eval": {"batch_size": 5},
    }
    return Recipe.from_tree(tree, "recipe.yaml")


def features(encoder, samples) -> torch.Tensor:
    """One image at a time, float64."""
    pixels = preset("paper_compat", side=SIDE)
    with torch.no_grad():
        found = [encoder(pixels.test(sample["images"][0])[None])[0] for sample in samples]
    return torch.stack(found).double()


def nearest(test: torch.Tensor, means: dict[str, torch.Tensor]) -> list[str]:
    """The class of largest cosine, by a plain loop."""
    names = list(means)
    return [max(names, key=lambda name: float(x @ means[name] / means[name].norm())) for x in test]


def test_simplecil_answers_with_the_nearest_class_mean_of_all_classes_so_far(vit, tmp_path):
    done = recipe(tmp_path / "run", vit)
    run(done)
    encoder = Encoder(backbone("vit"))
    order = [0, 2, 3, 4, 5, 1]  # numpy.random.RandomState(1993).permutation(6), written out
    train, test = (labelled(DATA, split, size, number=NUMBER) for split, size in
                   (("train", TRAIN), ("test", TEST)))  # fmt: skip
    names = [train.names[place] for place in order]
    means = {name: features(encoder, train.of([name])).mean(0) for name in names}
    for stage in (1, 2, 3):
        known = {name: means[name] for name in names[: 2 * stage]}
        expected = {
            f"{first + 1}-{first + 2}": nearest(
                features(encoder, test.of(names[first : first + 2])), known
            )
            for first in range(0, 2 * stage, 2)
        }
        assert answers(tmp_path / "run", stage) == expected


def test_every_image_is_encoded_once(vit, tmp_path, monkeypatch):
    seen, forward = [], Encoder.forward

    def counted(self, pixel_values_BCHW):
        seen.append(len(pixel_values_BCHW))
        return forward(self, pixel_values_BCHW)

    monkeypatch.setattr(Encoder, "forward", counted)
    run(recipe(tmp_path / "run", vit))
    assert sum(seen) == NUMBER * (TRAIN + TEST)


def test_other_pictures_and_other_labels_under_the_same_names_are_encoded_anew(vit, tmp_path):
    def written(names: list[str], shade: int) -> None:
        for split in ("train", "test"):
            for place, name in enumerate(names):
                path = tmp_path / "data" / split / name / "0.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (SIDE, SIDE), (shade, 40 * place, 9)).save(path)

    sums = []
    for shade in (10, 200):
        written(["a", "b"], shade)
        shutil.rmtree(tmp_path / "run/task_1", ignore_errors=True)
        shutil.rmtree(tmp_path / "run/task_2", ignore_errors=True)
        run(recipe(tmp_path / "run", vit, data=str(tmp_path / "data"), number=2, increment=1))
        sums.append(load_file(tmp_path / "run/task_2/memory.safetensors")["simplecil/sum"])
    assert not torch.allclose(*sums, atol=1e-3)


def test_features_that_are_no_numbers_end_the_run_with_the_name_of_an_image(
    vit, tmp_path, monkeypatch
):
    monkeypatch.setattr(Encoder, "forward", lambda self, x: torch.full((len(x), 24), torch.nan))
    with pytest.raises(FloatingPointError, match="6 of 6|12 of 12"):
        run(recipe(tmp_path, vit))


def test_a_resnets_running_statistics_stay_where_they_are(tmp_path):
    backbone("resnet").save_pretrained(tmp_path / "model")
    tree = recipe(tmp_path / "run", tmp_path / "model", "aper").resolved()
    tree["method"] |= {"adaptation": "ssf"}
    run(Recipe.from_tree(tree, "recipe.yaml"))
    both = load_file(tmp_path / "run/task_3/memory.safetensors")["aper/sum"]
    run(recipe(tmp_path / "plain", tmp_path / "model"))
    frozen = load_file(tmp_path / "plain/task_3/memory.safetensors")["simplecil/sum"]
    torch.testing.assert_close(both[:, : frozen.shape[1]], frozen, atol=1e-4, rtol=1e-5)


def test_the_stages_do_not_change_simplecils_last_head(vit, tmp_path):
    for name, increment in (("two", 2), ("all", 6)):
        run(recipe(tmp_path / name, vit, increment=increment))
    two, every = (load_file(tmp_path / name / f"task_{last}/memory.safetensors")
                  for name, last in (("two", 3), ("all", 1)))  # fmt: skip
    assert two.keys() == every.keys()
    assert all(torch.equal(two[name], every[name]) for name in two)


def test_a_deleted_stage_comes_back_to_the_same_bytes(vit, tmp_path):
    run(recipe(tmp_path, vit, "aper"))
    files = [p for p in (tmp_path / "task_3").rglob("*") if p.is_file() and p.name != "cost.json"]
    before = {path: path.read_bytes() for path in files}
    assert (tmp_path / "task_3/complete.json") in before
    for path in sorted((tmp_path / "task_3").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    run(recipe(tmp_path, vit, "aper"))
    changed = [path.name for path in files if path.read_bytes() != before[path]]
    assert changed in ([], ["complete.json"])  # which has the hash of cost.json, too


@pytest.mark.parametrize("adaptation", ["adapter", "ssf", "vpt_shallow", "vpt_deep"])
def test_aper_trains_in_its_first_stage_alone_and_joins_both_branches(vit, tmp_path, adaptation):
    tree = recipe(tmp_path, vit, "aper").resolved()
    tree["method"] |= {"adaptation": adaptation}
    run(Recipe.from_tree(tree, "recipe.yaml"))
    states = [load_file(tmp_path / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    assert states[0] and not any("head" in name for name in states[0])
    for later in states[1:]:
        assert later.keys() == states[0].keys()
        assert all(torch.equal(later[name], states[0][name]) for name in later)
    memory = load_file(tmp_path / "task_3/memory.safetensors")
    plain = recipe(tmp_path / "plain", vit)
    run(plain)
    frozen = load_file(tmp_path / "plain/task_3/memory.safetensors")["simplecil/sum"]
    joined = memory["aper/sum"]
    assert joined.shape == (NUMBER, 2 * frozen.shape[1])
    torch.testing.assert_close(joined[:, : frozen.shape[1]], frozen, atol=1e-5, rtol=1e-6)
    assert not torch.allclose(joined[:, frozen.shape[1] :], frozen, atol=1e-3)


def test_the_summary_has_what_papers_print(vit, tmp_path):
    run(recipe(tmp_path, vit))
    scores = json.loads((tmp_path / "scores.json").read_text())
    last = [scores["rows"][-1]["scores"][name] for name in scores["tasks"]]
    assert scores["tasks"] == ["1-2", "3-4", "5-6"]
    assert scores["summary"]["last"] == pytest.approx(sum(last) / 3)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tasks": [{"name": "a", "data": "toy:arrow"}]}, "tasks"),
        ({"method": {"name": "same"}}, "method.name"),
        ({"classes": {"data": DATA, "number": 6, "increment": 0}}, "classes.increment"),
        ({"classes": {"data": DATA, "number": 6, "increment": 2, "first": 7}}, "classes.first"),
        ({"classes": {"data": DATA, "number": 6, "increment": 2, "stages": 4}}, "classes.stages"),
        ({"classes": {"data": DATA, "number": 6}}, "classes.increment"),
        ({"classes": {"data": DATA, "number": 6, "increment": 7}}, "classes.increment"),
        ({"data": {"on_error": "skip"}}, "data"),
        (
            {"classes": {"data": DATA, "number": 6, "increment": 2, "args": {"size": 1}}},
            "classes.args.size",
        ),
        (
            {"classes": {"data": DATA, "number": 6, "increment": 2, "preprocessing": "paper"}},
            "classes.preprocessing",
        ),
    ],
)
def test_a_recipe_that_cannot_be_meant_names_the_key(vit, tmp_path, change, key):
    tree = recipe(tmp_path, vit).resolved() | change
    with pytest.raises(RecipeError) as told:
        Recipe.from_tree(tree, "recipe.yaml")
    assert told.value.key == key


def test_the_model_of_a_run_of_classes_is_not_exported_yet(vit, tmp_path, capsys):
    run(recipe(tmp_path, vit, stages=1))
    assert cli.main(["export", str(tmp_path), "--to", "merged"]) == 2
    assert "learnt classes" in capsys.readouterr().err


def test_a_recipe_comes_back_from_what_is_saved_of_it(vit, tmp_path):
    one = recipe(tmp_path, vit, stages=2, order=None)
    assert Recipe.from_tree(yaml.safe_load(yaml.safe_dump(one.resolved())), "saved") == one
    assert [task.name for task in one.tasks] == ["1-2", "3-4"]


def test_more_classes_than_there_are_is_told_before_the_model_loads(tmp_path):
    with pytest.raises(RecipeError, match=r"classes\.data.*number"):
        run(recipe(tmp_path, tmp_path, number=10_000))


@pytest.fixture(scope="module")
def aper_alone(vit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("aper")
    run(without_dropout(recipe(folder, vit, "aper")))
    return folder


def without_dropout(one: Recipe) -> Recipe:
    """Two processes draw other numbers than one."""
    tree = one.resolved()
    tree["method"] |= {"dropout": 0.0}
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_two_processes_train_and_answer_as_one_does(engine, vit, aper_alone, tmp_path):
    alone = without_dropout(recipe(tmp_path / "run", vit, "aper"))
    found = run_together(engine, alone, tmp_path, fresh=True)
    assert_alike(engine, found, aper_alone, "state", "memory", atol=1e-4, rtol=1e-5)
    sums = [load_file(folder / "task_3/memory.safetensors")["aper/sum"]
            for folder in (found, aper_alone)]  # fmt: skip
    frozen = slice(0, sums[1].shape[1] // 2)
    difference = (sums[0] - sums[1])[:, frozen].abs().max()
    assert difference < 1e-6 * TRAIN * sums[1].abs().max()


def test_a_list_of_classes_may_grow_and_a_run_goes_on_with_the_new_ones(vit, tmp_path):
    names = labelled(DATA, "train", 1).names
    listed = [names[place] for place in (5, 2, 7, 0, 3, 1)]

    def of(*classes: str) -> Recipe:
        number = {"number": len(classes), "order": None, "args": {"classes": list(classes)}}
        return recipe(tmp_path / "run", vit, **number)

    run(of(*listed[:4]))
    before = [(tmp_path / f"run/task_{stage}/complete.json").read_text() for stage in range(3)]
    run(of(*listed))
    after = [(tmp_path / f"run/task_{stage}/complete.json").read_text() for stage in range(3)]
    assert before == after and classifier(tmp_path / "run").names == tuple(listed)
    with pytest.raises(RecipeError, match=r"another 'classes\.args\.classes'"):
        run(of(*listed[1:], listed[0]))


def test_room_for_exemplars_of_all_classes_is_asked_for_before_the_first_stage(vit, tmp_path):
    tree = recipe(tmp_path / "run", vit, "icarl").resolved()
    tree["method"] |= {"memory_size": 3}
    with pytest.raises(RecipeError, match="room for 3 exemplars, but 6 classes"):
        run(Recipe.from_tree(tree, "recipe.yaml"))
    assert not (tmp_path / "run/task_0/complete.json").exists()


def test_a_class_alone_in_its_stage_is_refused_where_it_would_teach_nothing(vit, tmp_path):
    """Seven classes by two leave one to the last stage."""
    with pytest.raises(RecipeError, match=r"classes\.increment.*alone in its stage"):
        run(recipe(tmp_path / "local", vit, "finetune", number=7))
    with pytest.raises(RecipeError, match=r"classes\.first.*tells the classes so far"):
        run(recipe(tmp_path / "first", vit, "aper", number=7, first=1))
    run(recipe(tmp_path / "means", vit, number=7))
    assert (tmp_path / "means/task_4/complete.json").exists()
