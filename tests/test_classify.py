"""What a run has learnt of classes answers pictures of anybody's."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mllm_cl import Recipe, classifier, run
from mllm_cl.cli import main
from mllm_cl.recipe import RecipeError
from own_data import png

COLOURS = {"brick": 1, "grass": 2, "sky": 3, "sun": 4}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Path:
    """A run of two stages on pictures that are gone since."""
    folder = tmp_path_factory.mktemp("classify")
    for split in ("train", "test"):
        for name, number in COLOURS.items():
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            (place / "one.png").write_bytes(png(number))
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": "toy:clip"},
        "method": {"name": "simplecil"},
        "classes": {
            "data": str(folder / "photos"),
            "number": 4,
            "increment": 2,
            "order": None,
            "preprocessing": "clip",
        },
    }
    run(Recipe.from_tree(tree, "recipe.yaml"))
    (folder / "photos/test").rename(folder / "own")
    shutil.rmtree(folder / "photos")
    return folder / "run"


def said(capsys, *words: str) -> tuple[int, list[list[str]], str]:
    """The code of `mllm-cl classify`, the cells of its lines, and what went to stderr."""
    capsys.readouterr()
    code = main(["classify", *words])
    told = capsys.readouterr()
    return code, [line.split("\t") for line in told.out.splitlines()], told.err


def test_every_picture_of_a_folder_is_a_line_with_its_class(learnt, capsys):
    code, rows, _ = said(capsys, str(learnt), str(learnt.parent / "own"))
    assert code == 0
    assert [row[:2] for row in rows] == [
        [str(learnt.parent / f"own/{name}/one.png"), name] for name in sorted(COLOURS)
    ]
    assert all(-1 <= float(row[2]) <= 1 for row in rows)  # cosines


def test_an_earlier_stage_knows_its_own_classes_alone_and_the_best_come_first(learnt, capsys):
    picture = str(learnt.parent / "own/sun/one.png")
    code, rows, _ = said(capsys, str(learnt), picture, "--task", "1-2", "--top", "9")
    assert code == 0 and {rows[0][1], rows[0][3]} == {"brick", "grass"}
    assert float(rows[0][2]) >= float(rows[0][4])


def test_logits_are_in_the_order_of_the_names(learnt):
    asked = classifier(learnt)
    images = [Image.open(learnt.parent / f"own/{name}/one.png") for name in asked.names]
    assert asked.names == tuple(COLOURS) and asked(images) == list(asked.names)
    assert asked.logits(images).argmax(1).tolist() == [0, 1, 2, 3]
    assert asked.logits([]).shape == (0, 4)


def test_what_cannot_be_answered_is_said(learnt, tmp_path, capsys):
    own = str(learnt.parent / "own")
    for words, problem in (
        ((str(learnt), own, "--task", "7-8"), "complete in"),
        ((str(learnt), own, "--top", "0"), "expected 1 or more"),
        ((str(learnt), str(tmp_path / "none.png")), "is not there"),
        ((str(learnt), str(tmp_path)), "has no picture in it"),
        ((str(tmp_path), own), "holds no complete task"),
    ):
        code, rows, told = said(capsys, *words)
        assert (code, rows) == (2, []) and problem in told
    (tmp_path / "torn.png").write_bytes(png(1)[:40])
    code, _, told = said(capsys, str(learnt), str(tmp_path / "torn.png"))
    assert code == 2 and "torn.png" in told


def test_files_beside_the_run_have_to_say_what_they_said(learnt, tmp_path):
    """ENGINE reads classes by texts and descriptions when it is opened, too."""
    said = {"version": 1, "classes": {}, "pairs": {}}
    for name in COLOURS:
        said["pairs"][name] = {one: ["a colour"] for one in COLOURS if one != name}
    files = {"descriptions": tmp_path / "said.json", "texts": tmp_path / "texts.json"}
    files["descriptions"].write_text(json.dumps(said))
    files["texts"].write_text(json.dumps({name: f"the {name}" for name in COLOURS}))
    photos = tmp_path / "photos"
    for split in ("train", "test"):
        shutil.copytree(learnt.parent / "own", photos / split)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": "toy:clip"},
        "method": {"name": "engine", "mode": "released", "image_aug": 0},
        "classes": {"data": str(photos), "number": 4, "increment": 2, "preprocessing": "clip"}
        | {key: str(path) for key, path in files.items()},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    run(Recipe.from_tree(tree, "recipe.yaml"))
    images = [Image.open(photos / f"test/{name}/one.png") for name in COLOURS]
    told = {}
    for path in (tmp_path / "run/task_2/predictions").glob("*.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        told |= {row["reference"]: row["prediction"] for row in rows}
    assert classifier(tmp_path / "run")(images) == [told[name] for name in COLOURS]
    files["texts"].write_text(json.dumps({name: f"a {name}" for name in COLOURS}))
    with pytest.raises(RecipeError, match="classes.texts.*says something else"):
        classifier(tmp_path / "run")


def test_a_stage_that_was_changed_is_not_opened(learnt, tmp_path):
    shutil.copytree(learnt, tmp_path / "run")
    (tmp_path / "run/task_2/memory.safetensors").write_bytes(b"other")
    with pytest.raises(RecipeError, match="is not as it was written"):
        classifier(tmp_path / "run")
