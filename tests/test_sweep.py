"""A sweep is every combination of its settings, each a run in a folder of its own."""

import pytest

from mllm_cl import cli
from mllm_cl.recipe import RecipeError
from mllm_cl.sweep import cells, chosen, split_sweep

RECIPE = "recipes/quickstart.yaml"


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    words = ["--seed", "1", "--sweep", "model.x=[a,b],[c]", "method.name=same,'a,b'", "--tail=2"]
    rest, axes = split_sweep(words)
    assert rest == ["--seed", "1", "--tail=2"]
    assert axes == {"model.x": ["[a,b]", "[c]"], "method.name": ["same", "'a,b'"]}


def test_without_a_sweep_nothing_changes():
    assert split_sweep(["--seed", "1"]) == (["--seed", "1"], {})


def test_every_combination_has_a_folder_and_its_settings(tmp_path):
    axes = {"method.name": ["finetune", "same"], "seed": ["0", "1"]}
    found = cells(RECIPE, [f"--output_dir={tmp_path}", "--training.learning_rate", "1e-3"], axes)
    assert [cell.name for cell in found] == [
        "method.name=finetune,seed=0",
        "method.name=finetune,seed=1",
        "method.name=same,seed=0",
        "method.name=same,seed=1",
    ]
    for cell in found:
        assert cell.recipe.output_dir == str(tmp_path / cell.name)
        assert f"method.name={cell.recipe.method_name},seed={cell.recipe.seed}" == cell.name
        assert cell.recipe.training["learning_rate"] == 1e-3


def test_a_job_array_takes_one_cell_by_its_number(tmp_path):
    found = cells(RECIPE, [f"--output_dir={tmp_path}"], {"seed": ["0", "1", "2"]})
    assert [cell.recipe.seed for cell in chosen(found, "2")] == [2]
    assert len(chosen(found, None)) == 3
    with pytest.raises(RecipeError, match="0 to 2"):
        chosen(found, "3")


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep"],
        ["--sweep", "seed"],
        ["--sweep", "seed=0,,1"],
        ["--sweep", "seed=0,0"],
        ["--sweep", "seed=0", "seed=1"],
        ["--sweep", "output_dir=a,b"],
    ],
)
def test_a_sweep_without_sense_is_refused(words):
    with pytest.raises(RecipeError, match="sweep"):
        split_sweep(words)


def test_every_cell_is_checked_before_any_runs(tmp_path):
    with pytest.raises(RecipeError, match="seed"):
        cells(RECIPE, [f"--output_dir={tmp_path}"], {"seed": ["0", "none"]})
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_sweep_tells_of_every_cell_and_trains_nothing(tmp_path, capsys):
    words = [f"--output_dir={tmp_path}", "--sweep", "method.name=finetune,same", "--dry-run"]
    assert cli.main(["run", RECIPE, *words]) == 0
    told = capsys.readouterr()
    assert told.out.count("optimizer steps: dial") == 2
    assert "2/2" in told.err
    assert "suit the method it was written for" in told.err
    assert not list(tmp_path.iterdir())
