"""Twenty tiny tasks in one launch: memory, open files and processes stay as they are."""

import json

import pytest
import yaml

from launches import launch

NUM_TASKS, SETTLED = 20, 6
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]


def recipe(folder, model, number) -> str:
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(model), "lora_target_modules": ["q_proj"], "lora_r": 2},
        "method": {"name": "same", "num_experts": 2, "calibration_tokens": 512},
        "tasks": [
            {"name": f"t{index}", "data": "toy:arrow", "train_size": 8, "eval_size": 2}
            for index in range(number)
        ],
        "training": {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no"},
        "eval": {"batch_size": 8, "max_new_tokens": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def footprints(
    tmp_path, tiny_folder, engine, monkeypatch, number=NUM_TASKS
) -> list[list[list[int]]]:
    """Per rank and stage: bytes, files, children, process number."""
    prints = tmp_path / "footprints"
    prints.mkdir()
    monkeypatch.setenv("FOOTPRINT", str(prints))
    launch(engine, "run_script.py", recipe(tmp_path, tiny_folder["llava"], number), fresh=True)
    rows = json.loads((tmp_path / "run" / "scores.json").read_text())["rows"]
    assert len(rows) == number + 1
    return [
        [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
        for path in sorted(prints.iterdir())
    ]


def growth(values: list[int]) -> float:
    """Least-squares slope per task, once the first tasks have filled the caches."""
    values = values[SETTLED:]
    mean_x, mean_y = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values))
    return above / sum((x - mean_x) ** 2 for x in range(len(values)))


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2"])
def test_a_long_sequence_leaves_nothing_behind(engine, tiny_folder, tmp_path, monkeypatch):
    for stages in footprints(tmp_path, tiny_folder, engine, monkeypatch):
        assert len(stages) == NUM_TASKS + 1
        assert growth([stage[0] for stage in stages]) < 2**20, "bytes per task"
        assert stages[SETTLED][1] == stages[-1][1], "open files"
        assert stages[SETTLED][2] == stages[-1][2], "children"


def test_zero3_starts_every_task_in_a_fresh_image_of_the_same_process(
    tiny_folder, tmp_path, monkeypatch
):
    for stages in footprints(tmp_path, tiny_folder, "zero3", monkeypatch, number=4):
        assert len({stage[3] for stage in stages}) == 1, "process number"
        assert abs(stages[-1][0] - stages[1][0]) < 30 * 2**20, "bytes"
        assert stages[1][1] == stages[-1][1], "open files"
