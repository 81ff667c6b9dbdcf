"""The recipes on real data load everywhere; where the data lie, they are read and trained on."""

import json
import os
from pathlib import Path

import datasets
import pytest
import yaml

from mllm_cl.cli import main
from mllm_cl.data import read
from mllm_cl.data.errors import DataError
from mllm_cl.recipe import Recipe
from own_data import QUESTION, question_rows, write_jsonl

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MLLM_CL_DATA", ROOT.parent / "shared" / "data"))
NAMES = ("real_small", "real_text")
PHOTOS = ("caltech100", "cifar10")
TOY = ["--model.model_name_or_path", "toy:qwen3_vl_moe"]


def path_of(name: str) -> str:
    return str(ROOT / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize("name", [*NAMES, *PHOTOS])
def test_recipes_on_real_data_load_without_the_data(name, monkeypatch):
    monkeypatch.setenv("MLLM_CL_DATA", "nowhere")
    recipe = Recipe.load(path_of(name))
    assert len(recipe.tasks) > 1
    assert all(task.data.startswith("${MLLM_CL_DATA:-../shared/data}/") for task in recipe.tasks)


@pytest.mark.parametrize("name", [*NAMES, *PHOTOS])
def test_absent_data_are_one_line_that_says_where_they_were_looked_for(name, monkeypatch, capsys):
    monkeypatch.setenv("MLLM_CL_DATA", "nowhere")
    assert main(["run", path_of(name), *TOY]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mllm-cl")]
    assert "nowhere/" in told and "${MLLM_CL_DATA:-" in told


def test_a_path_begins_with_what_the_environment_says(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "own/train.jsonl", question_rows(tmp_path / "own", range(3)))
    monkeypatch.setenv("PLACE", str(tmp_path))
    for data in ("${PLACE}/own", "${PLACE:-elsewhere}/own", f"${{ABSENT:-{tmp_path}}}/own"):
        asked = read(data, "train", None, 0)[0]["messages"][0]["content"][-1]
        assert asked["text"] == QUESTION
    with pytest.raises(DataError, match="the environment has no ABSENT"):
        read("${ABSENT}/own", "train", None, 0)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
@pytest.mark.parametrize("name", NAMES)
def test_real_data_are_read_learnt_and_scored(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CL_DATA", str(SHARED))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tree = yaml.safe_load(Path(path_of(name)).read_text(encoding="utf-8"))
    # Two tasks of a few rows: with the toy tokenizer every letter is a token.
    tasks = [{**task, "train_size": 4, "eval_size": 4} for task in tree["tasks"][:2]]
    few = ["--tasks", json.dumps(tasks), "--retain", "[]"]
    few += ["--training.per_device_train_batch_size=2", "--training.max_steps=1"]
    assert main(["run", path_of(name), *TOY, *few, f"--output_dir={tmp_path / 'run'}"]) == 0
    rows = json.loads((tmp_path / "run/scores.json").read_text())["rows"]
    assert [row["after"] for row in rows] == ["zero-shot", *[task["name"] for task in tasks]]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
@pytest.mark.parametrize("name", PHOTOS)
def test_photographs_come_in_stages(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CL_DATA", str(SHARED))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    few = ["--model.model_name_or_path=toy:clip", "--method.name=simplecil", "--classes.stages=2"]
    few += ["--classes.train_size=2", "--classes.eval_size=1", "--classes.preprocessing=clip"]
    assert main(["run", path_of(name), *few, f"--output_dir={tmp_path / 'run'}"]) == 0
    counts = json.loads((tmp_path / "run/scores.json").read_text())["rows"][-1]["counts"]
    assert list(counts.values()) == ([50, 10] if name == "caltech100" else [4, 2])
