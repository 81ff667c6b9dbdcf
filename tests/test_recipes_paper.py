"""The recipes of the papers' settings load everywhere, and say what the papers say."""

import importlib.util
import shlex
from pathlib import Path

import pytest

from mllm_cl.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes" / "paper"
EVERY = sorted(FOLDER.glob("*.yaml"))
FILES = [path for path in EVERY if "retrieval" not in path.stem]  # those of classes


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """A place without weights and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLLM_CL_CIL", raising=False)


def others(path: Path) -> list[list[str]]:
    """The overrides that the comments name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [shlex.split(line[1:]) for line in lines if line.startswith("#   --")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_without_weights_and_data(path, elsewhere):
    recipe = Recipe.load(path)
    assert recipe.output_dir == f"runs/{path.stem}"
    method, *_, first, increment = path.stem.split("_")
    assert recipe.method_name == method
    sizes = recipe.classes.sizes()
    begin = int(first.removeprefix("b")) or int(increment.removeprefix("inc"))
    assert (sizes[0], sizes[1]) == (begin, int(increment.removeprefix("inc")))
    assert len(set(sizes[1:])) == 1 and sum(sizes) == recipe.classes.number


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_rows_that_comments_name_load_too(path, elsewhere):
    found = [Recipe.load(path, words) for words in others(path)]
    assert len(found) == (5 if path.stem.startswith("aper") else 0)
    assert len({recipe.fingerprint(0) for recipe in found}) == len(found)


def test_there_is_a_recipe_for_each_setting_of_both_tables():
    names = [path.stem for path in FILES]
    assert sum(name.startswith("aper") for name in names) == 7
    assert sum(name.startswith("proof") for name in names) == 9 * 2
    assert sum(name.startswith("engine") for name in names) == 9 * 2


def test_retrieval_has_a_task_for_each_of_five_verbs(elsewhere):
    (path,) = set(EVERY) - set(FILES)
    for method in ("proof", "zs", "finetune", "der", "memo"):
        recipe = Recipe.load(path, ["--method.name", method])
        assert [task.name for task in recipe.tasks] == ["walk", "stand", "run", "ride", "play"]
    assert recipe.output_dir == f"runs/{path.stem}"


def test_the_files_are_what_the_script_writes():
    path = FOLDER.parent / "make_paper.py"
    spec = importlib.util.spec_from_file_location("make_paper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {path.name: path.read_text(encoding="utf-8") for path in EVERY}
    assert module.recipes() == written


def test_published_numbers_stand_beside_every_recipe():
    rows = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    for path in FILES:
        own = [row for row in rows if row.startswith(f"| `{path.stem}`")]
        number = {"aper": 6, "proof": 3, "engine": 1}[path.stem.partition("_")[0]]
        assert len(own) == number, path.stem
        assert all(row.count("|") == 5 for row in own)


def test_the_configurations_are_the_papers_where_they_differ(elsewhere):
    adapters = Recipe.load(FOLDER / "aper_imagenet_r_b0_inc5.yaml").training
    assert (adapters["learning_rate"], adapters["weight_decay"]) == (0.05, 0.005)
    cifar = Recipe.load(FOLDER / "proof_cifar100_b0_inc10.yaml")
    assert cifar.training["num_train_epochs"] == 5 and cifar.method.memory_size == 2000
    assert Recipe.load(FOLDER / "proof_cub_b0_inc20.yaml").method.memory_per_class == 20
    assert Recipe.load(FOLDER / "aper_vtab_b0_inc10.yaml").classes.order is None
    aircraft = Recipe.load(FOLDER / "engine_aircraft_b0_inc10.yaml")
    assert (aircraft.method.stat, aircraft.method.image_aug) == (0.99, 0.0)
    assert aircraft.training["learning_rate"] == 0.05 and aircraft.method.mode == "released"
    assert Recipe.load(FOLDER / "engine_cub_b0_inc20.yaml").method.noise == 0.3
