"""A run is a folder: it resumes in the middle of a task, rebuilds what is deleted, and takes
appended tasks.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

from mllm_cl import checkpoint, continual, load_method, record
from mllm_cl.model.surgery import guards
from survive_script import digests
from toy_run import collator_of, load, toy_tasks

HERE = Path(__file__).parent


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


def copied(finished: tuple[Path, Path], into: Path, *tasks: str) -> tuple[Path, Path]:
    """A copy of a finished run, and its recipe with more tasks."""
    folder, path = finished
    shutil.copytree(folder, into / "run")
    tree = yaml.safe_load(path.read_text())
    tree["output_dir"] = str(into / "run")
    sizes = {"train_size": 32, "eval_size": 8}
    tree["tasks"] += [{"name": name, "data": f"toy:{name}", **sizes} for name in tasks]
    longer = into / "longer.yaml"
    longer.write_text(yaml.safe_dump(tree))
    return into / "run", longer


def test_an_appended_task_continues_a_finished_run(finished, tmp_path):
    folder, _ = finished
    copy, longer = copied(finished, tmp_path, "tiles")
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


def test_an_appended_task_says_that_its_steps_have_another_size(finished, tmp_path, capsys):
    copy, longer = copied(finished, tmp_path, "tiles")
    manifest = copy / "task_2" / "manifest.json"
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(made | {"world_size": 2, "effective_batch": 16}))
    checkpoint.mark(manifest.parent)
    run_in_process(longer)
    assert "effective batch 8 from here on, 16 up to task_2" in capsys.readouterr().out
    assert json.loads((copy / "task_3" / "manifest.json").read_text())["effective_batch"] == 8


def test_a_finished_run_bears_the_same_batch_cut_otherwise_and_no_other(finished):
    folder, path = finished
    before = digests(folder)
    fours = "--training.per_device_train_batch_size=4"
    run_in_process(path, fours, "--training.gradient_accumulation_steps=2")
    assert digests(folder) == before
    with pytest.raises(
        ValueError, match="another 'training.per_device_train_batch_size': 8 there, 4"
    ):
        run_in_process(path, fours)


def test_a_run_of_a_version_that_lacked_a_setting_goes_on_while_that_is_at_its_default(
    finished, tmp_path
):
    copy, longer = copied(finished, tmp_path, "tiles")
    for stage in sorted(copy.glob("task_*")):
        written = json.loads((stage / "recipe.json").read_text())
        del written["method"]["train_router"]
        (stage / "recipe.json").write_text(json.dumps(written))
        checkpoint.mark(stage)
    run_in_process(longer)
    assert json.loads((copy / "scores.json").read_text())["rows"][-1]["after"] == "tiles"
    with pytest.raises(ValueError, match="made with another 'method.train_router'"):
        run_in_process(longer, "--method.train_router", "false")


def trainer_of(
    folder: Path, out: Path, *, activation: str = "paper", targets=("q_proj",), **settings
):
    """A Trainer that learns one task in four steps and saves after each."""
    task = toy_tasks()[0]
    arguments = TrainingArguments(
        str(out),
        learning_rate=1e-3,
        max_steps=4,
        save_steps=1,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return continual(Trainer)(
        model=load(folder),
        args=arguments,
        train_dataset=task.train,
        data_collator=collator_of(folder),
        method=load_method("same")(
            num_experts=2, lora_target_modules=targets, activation=activation
        ),
        task=task,
    )


def test_a_task_goes_on_with_the_same_batch_cut_otherwise_and_with_no_other(tiny_folder, tmp_path):
    folder = tiny_folder["llava"]
    whole = trainer_of(folder, tmp_path, per_device_train_batch_size=8)
    whole.train()
    halfway = tmp_path / "checkpoint-2"
    assert json.loads((halfway / "batch.json").read_text()) == {
        "effective_batch": 8,
        "per_device_batch": 8,
        "accumulation": 1,
        "world_size": 1,
    }
    settings = {"per_device_train_batch_size": 4}
    other = trainer_of(folder, tmp_path / "other", **settings)
    told = r"effective batch of 8 .* this launch has 4 .*so that the product is 8 again"
    with pytest.raises(ValueError, match=told):
        other.train(resume_from_checkpoint=str(halfway))
    cut = trainer_of(folder, tmp_path / "cut", gradient_accumulation_steps=2, **settings)
    cut.train(resume_from_checkpoint=str(halfway))
    for name, one in guards(whole.model).items():
        expected, found = one.displacement, guards(cut.model)[name].displacement
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-4 * expected.norm(), name


def test_the_released_rule_goes_on_with_its_averages_in_the_middle_of_a_task(tiny_folder, tmp_path):
    settings = {"activation": "released", "per_device_train_batch_size": 8}
    whole = trainer_of(tiny_folder["llava"], tmp_path, **settings)
    whole.train()
    resumed = trainer_of(tiny_folder["llava"], tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any(name.endswith("/importance") for name in whole.memory)
    assert all(torch.equal(resumed.memory[name], whole.memory[name]) for name in whole.memory)


def test_samples_ordered_by_length_need_the_number_of_processes_that_began(tiny_folder, tmp_path):
    """Such samplers look at what one process takes, so another number would see other samples."""
    written = {"effective_batch": 8, "per_device_batch": 4, "accumulation": 1, "world_size": 2}
    (tmp_path / "batch.json").write_text(json.dumps(written))
    settings = {"per_device_train_batch_size": 8, "use_cpu": True}
    checkpoint.check_batch(TrainingArguments("unused", **settings), tmp_path)
    by_length = TrainingArguments("unused", train_sampling_strategy="group_by_length", **settings)
    with pytest.raises(ValueError, match="made by 2 processes.*Launch 2 processes"):
        checkpoint.check_batch(by_length, tmp_path)


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


@pytest.mark.parametrize("watched", [True, False])
def test_who_watches_sees_what_goes_on_between_the_steps(
    watched, tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    task = {"name": "arrow", "data": "toy:arrow", "train_size": 32, "eval_size": 8}
    run_in_process(recipe(tmp_path, tiny_folder["llava"], tasks=[task], retain=[]))
    told = capsys.readouterr().err
    for words in ("measuring arrow", "scoring arrow", "probing arrow"):
        assert (words in told) == watched, told


def test_a_task_that_is_no_better_than_one_constant_answer_is_told(capsys):
    found = {"scores": {"dial": 0.17, "bars": 0.33}, "constant": {"dial": 0.17, "bars": 0.325}}
    for name in ("dial", "bars"):
        record.tell_what_was_not_learnt(name, found)
    told = capsys.readouterr().out
    assert "dial scores 0.170" in told
    assert "bars" not in told


def test_a_weight_that_can_learn_nothing_any_more_is_named(capsys):
    record.tell_what_held(
        {"gate": {"occupancy": 1.0, "leak": 0.0}, "q": {"occupancy": 0.5, "leak": 1e-7}}
    )
    told = capsys.readouterr().out
    assert "closes 75% of the input directions of 2 of 2 guarded weights" in told
    assert "1 of 2 weights have no direction left to learn in, such as gate" in told
