"""The quickstart of classes, cut down to seconds: its commands, and the picture they make."""

import json
from pathlib import Path

import pytest

from clip import reading_folder
from mllm_cl import cli
from mllm_cl.recipe import Recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart_cil.yaml"
METHODS = ("zs_clip", "simplecil", "aper", "proof", "finetune")


def test_the_comments_name_the_methods_that_are_tested():
    assert f"method.name={','.join(METHODS)}" in RECIPE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_quickstart_takes_its_settings(name):
    recipe = Recipe.load(RECIPE, ["--method.name", name])
    assert recipe.method_name == name and len(recipe.tasks) == 5


def test_the_digits_of_the_comment_are_five_stages_of_two():
    words = ["--classes.data", "toy:digits", "--classes.number", "10", "--classes.increment", "2"]
    assert len(Recipe.load(RECIPE, words).tasks) == 5


def test_methods_are_swept_over_and_drawn_together(tmp_path, capsys):
    model = reading_folder(tmp_path / "clip")
    small = ["--classes.number=4", "--classes.increment=2", "--training.num_train_epochs=1"]
    small += ["--classes.train_size=3", "--classes.eval_size=3"]
    place = [f"--model.model_name_or_path={model}", f"--output_dir={tmp_path / 'runs'}"]
    sweep = ["--sweep", "method.name=zs_clip,simplecil,finetune"]
    assert cli.main(["run", str(RECIPE), *small, *place, *sweep]) == 0
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "A_B, at the end" in out and "simplecil" in out.split("A_B, at the end")[1]
    report = tmp_path / "runs/report"
    assert (report / "stages.png").read_bytes().startswith(b"\x89PNG")
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "Three methods" in text and "Asked by name, among all classes" in text
    rows = json.loads((tmp_path / "runs/method.name=finetune/scores.json").read_text())["rows"]
    assert [row["after"] for row in rows] == ["zero-shot", "1-2", "3-4"]
