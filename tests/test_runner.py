"""A run is a folder: it resumes in the middle of a task, rebuilds what is deleted, and takes
appended tasks.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
SAME_BYTES = ("state.safetensors", "memory.safetensors", "scores.json", "routing.safetensors")


def recipe(folder: Path, model: Path, method: str = "same", **changes) -> Path:
    """A recipe of two tiny tasks that takes seconds."""
    tree = {
        "seed": 1,
        "output_dir": str(folder / "run"),
        "model": {
            "model_name_or_path": str(model),
            "lora_target_modules": ["q_proj", "v_proj"],
            "lora_r": 4,
        },
        "method": {"name": method},
        "tasks": [
            {"name": "arrow", "data": "toy:arrow", "train_size": 32, "eval_size": 8},
            {"name": "word", "data": "toy:word", "train_size": 32, "eval_size": 8},
        ],
        "retain": [{"name": "colour", "data": "toy:colour", "eval_size": 8}],
        "training": {
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "logging_steps": 1,
        },
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_in_process(path: Path, *overrides: str) -> Path:
    from mllm_cl.recipe import Recipe
    from mllm_cl.runner import run

    return run(Recipe.load(path, overrides))


def digests(folder: Path) -> dict[str, str]:
    """The bytes of everything that a stage hands on, by stage and file."""
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("task_*/*"))
        if path.name in SAME_BYTES
    }


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A finished run, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = recipe(folder, tiny_folder["llava"])
    return run_in_process(path), path


def test_a_run_leaves_the_matrix_and_what_made_it(finished):
    folder, _ = finished
    scores = json.loads((folder / "scores.json").read_text())
    assert [row["after"] for row in scores["rows"]] == ["zero-shot", "arrow", "word"]
    assert set(scores["rows"][-1]["scores"]) == {"colour", "arrow", "word"}
    assert (folder / "scores.png").stat().st_size > 5000
    manifest = json.loads((folder / "task_2" / "manifest.json").read_text())
    assert manifest["effective_batch"] == 8
    assert manifest["versions"]["torch"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 1
    lines = (folder / "task_2" / "predictions" / "word.jsonl").read_text().splitlines()
    assert len(lines) == 8


def test_a_finished_run_leaves_no_checkpoint_and_nothing_pickled(finished):
    folder, _ = finished
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".yaml", ".png"}


def test_a_deleted_last_task_is_rebuilt_to_the_same_bytes(finished):
    folder, path = finished
    before = digests(folder)
    shutil.rmtree(folder / "task_2")
    run_in_process(path)
    assert digests(folder) == before


def test_an_appended_task_continues_a_finished_run(finished, tmp_path):
    folder, path = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    tree = yaml.safe_load(path.read_text())
    tree["output_dir"] = str(copy)
    tree["tasks"].append({"name": "tiles", "data": "toy:tiles", "train_size": 32, "eval_size": 8})
    longer = tmp_path / "longer.yaml"
    longer.write_text(yaml.safe_dump(tree))
    before = digests(folder)
    run_in_process(longer)
    after = digests(copy)
    # The last task was scored before there was a next one; everything that is handed on is
    # untouched.
    assert before.items() <= after.items()
    assert json.loads((copy / "scores.json").read_text())["rows"][-1]["after"] == "tiles"


def test_a_folder_of_another_recipe_is_refused(finished):
    _, path = finished
    with pytest.raises(ValueError, match="made with another 'seed'"):
        run_in_process(path, "--seed", "2")


@pytest.mark.parametrize("kill_at", [3, 5])
def test_the_same_command_goes_on_in_the_middle_of_a_task(finished, tiny_folder, tmp_path, kill_at):
    folder, _ = finished
    path = recipe(tmp_path, tiny_folder["llava"])
    command = [sys.executable, str(HERE / "run_script.py"), str(path)]
    environment = {**os.environ, "EXPECTED_ENGINE": "single", "KILL_AT_STEP": str(kill_at)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 9
    assert list((tmp_path / "run" / "task_1").glob("checkpoint-*/complete.json"))
    run_in_process(path)
    assert digests(tmp_path / "run") == digests(folder)
