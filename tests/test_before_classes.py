"""What is said of a recipe of classes before it runs: the dry run, the data check, the doctor."""

import json
from math import prod
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from clip import reading_folder
from encoders import backbone, vit_b16
from mllm_cl import cli
from mllm_cl.forecast import Launch
from mllm_cl.forecast_classes import ClassForecast, forecast_classes, tell_classes
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.runner import run
from own_data import png

CLASSES = {
    "data": "toy:compositions",
    "number": 5,
    "increment": 2,
    "preprocessing": "paper_compat",
    "train_size": 6,
    "eval_size": 4,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, method: str = "aper", training=None, **classes) -> Recipe:
    tree = {
        "output_dir": str(folder),
        "model": {"model_name_or_path": str(model)},
        "method": {"name": method},
        "classes": CLASSES | classes,
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4} | (training or {}),
    }
    return Recipe.from_tree(tree, "recipe.yaml")


def written(one: Recipe, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(one.resolved()))
    return str(path)


def write_classes(folder: Path, train: dict[str, list[int]], test: dict[str, list[int]]) -> str:
    """split/CLASS/0.png …, each of the colour of its number."""
    for split, classes in (("train", train), ("test", test)):
        for name, numbers in classes.items():
            (folder / split / name).mkdir(parents=True)
            for index, number in enumerate(numbers):
                (folder / split / name / f"{split}-{index}.png").write_bytes(png(number))
    return str(folder)


def numel(said: ClassForecast, head: str) -> int:
    """How many numbers train below `head`."""
    return sum(prod(shape) for name, shape in said.trained.items() if name.startswith(head))


def checked(capsys, one: Recipe, folder: Path) -> tuple[int, str]:
    code = cli.main(["data", "check", written(one, folder)])
    return code, " ".join(capsys.readouterr().out.split())


# The dry run


def test_a_dry_run_says_what_the_run_then_does(vit, tmp_path):
    one = recipe(tmp_path / "run", vit)
    said = forecast_classes(one, Launch())
    run(one)
    manifest = json.loads((tmp_path / "run/task_1/manifest.json").read_text())
    log = json.loads((tmp_path / "run/task_1/log.json").read_text())
    # at the end of the stage, when the head is thrown away
    assert numel(said, "encoder.") == manifest["trained_parameters"]
    assert [stage.steps for stage in said.stages] == [6, 0, 0] and log[-1]["step"] == 6
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert [(stage.name, stage.test) for stage in said.stages] == list(
        scores["rows"][-1]["counts"].items()
    )
    assert [stage.train for stage in said.stages] == [12, 12, 6]


def test_features_on_disk_are_as_large_as_a_dry_run_says(vit, tmp_path):
    one = recipe(tmp_path / "run", vit, "simplecil")
    said = forecast_classes(one, Launch())
    run(one)
    files = list((tmp_path / "run/features").glob("*.safetensors"))
    assert len(files) == 6
    kept = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert said.feature_bytes == kept == 4 * 50 * 24


def test_the_shapes_of_adapters_are_the_papers(tmp_path):
    vit_b16().config.save_pretrained(tmp_path)
    small = {"number": 2, "increment": 2, "train_size": 1, "eval_size": 1}
    said = forecast_classes(recipe(tmp_path / "run", tmp_path, **small), Launch("zero2", 2))
    assert (said.parameters, numel(said, "encoder.")) == (85_798_656, 1_189_632)
    weights = said.device_bytes["trained weights"]
    assert said.device_bytes["the optimizer's state"] == weights  # 8 bytes, over two processes
    # 34 bytes, twice for 32 bits, of 4 pictures of 197 patches, 768 wide, in 12 blocks
    assert said.device_bytes["activations (estimate)"] == 68 * 4 * 197 * 768 * 12


@pytest.mark.parametrize("method", ["zs_clip", "proof"])
def test_methods_that_read_class_names_are_told_of_without_weights(method, tmp_path):
    clip = reading_folder(tmp_path / "clip")
    said = forecast_classes(recipe(tmp_path / "run", clip, method), Launch())
    assert bool(said.trained) == (method == "proof") and numel(said, "encoder.") == 0
    assert said.device_bytes["activations (estimate)"] == 0  # images are encoded once


@pytest.mark.parametrize(
    ("training", "factor"),
    [({}, 2), ({"optim": "sgd"}, 0), ({"optim": "sgd", "optim_args": "momentum=0.9"}, 1)],
)
def test_the_bytes_of_the_optimizer_are_those_of_the_one_that_is_asked_for(
    vit, tmp_path, training, factor
):
    bytes_of = forecast_classes(recipe(tmp_path, vit, training=training), Launch()).device_bytes
    assert bytes_of["the optimizer's state"] == factor * bytes_of["trained weights"]


def test_the_command_prints_stages_with_the_names_of_their_classes(vit, tmp_path, capsys):
    one = recipe(tmp_path / "run", vit, "simplecil", order=None, stages=2)
    assert cli.main(["run", written(one, tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "1-2" in line or "3-4" in line]
    assert len(lines) == 2 and "checked red circle" in lines[0] and "5-5" not in out
    assert "0 parameters train" in out and not (tmp_path / "run").exists()


def test_many_classes_are_named_in_part(vit, tmp_path, capsys):
    tell_classes(forecast_classes(recipe(tmp_path, vit, number=20, increment=10), Launch()))
    assert "and 4 more" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("change", "key"),
    [({"data": "toy:none"}, "classes.data"), ({"preprocessing": "processor"}, "model")],
)
def test_a_dry_run_of_what_cannot_be_names_the_key(vit, tmp_path, change, key):
    with pytest.raises(RecipeError) as told:
        forecast_classes(recipe(tmp_path, vit, **change), Launch())
    assert told.value.key == key


# The data check


def test_good_pictures_are_counted_by_stage(vit, tmp_path, capsys):
    code, told = checked(capsys, recipe(tmp_path / "run", vit, number=3), tmp_path)
    assert code == 0
    for words in (
        "train 18 pictures of 3 classes, 6 of each, 0 that cannot be read",
        "test 12 pictures of 3 classes, 4 of each",
        "sides of 64 to 64 pixels, 100% are 64 x 64",
        "stage 1-2: 12 train, 8 test; 2 classes: ",
        "stage 3-3: 6 train, 4 test; 1 classes: ",
        "A run would start on these data.",
    ):
        assert words in told
    for words in ("are in train", "in two classes", "no picture to test"):
        assert words not in told


def test_every_picture_that_cannot_be_read_is_named_and_the_code_is_2(vit, tmp_path, capsys):
    data = write_classes(tmp_path / "own", {"a": [1, 2], "b": [3]}, {"a": [4], "b": [0]})
    (tmp_path / "own/train/a/train-1.png").write_bytes(png(2)[:40])
    one = recipe(tmp_path / "run", vit, "simplecil", data=data, number=2, increment=1)
    code, told = checked(capsys, one, tmp_path)
    assert code == 2
    assert "train-1.png" in told and "1 that cannot be read" in told
    assert "A run would stop at these: 1 pictures of train cannot be read" in told


def test_pictures_in_train_and_test_and_in_two_classes_are_told(vit, tmp_path, capsys):
    data = write_classes(tmp_path / "own", {"a": [1, 2], "b": [2]}, {"a": [1], "b": [3]})
    one = recipe(tmp_path / "run", vit, "simplecil", data=data, number=2, increment=1)
    code, told = checked(capsys, one, tmp_path)
    assert code == 0
    assert "1 of 2 test pictures are in train: test/a/test-0.png" in told
    assert "1 pictures of train are in two classes: train/b/train-0.png" in told


def test_ids_that_train_and_test_share_are_told(vit, tmp_path, capsys):
    data = write_classes(tmp_path / "own", {"a": [1], "b": [2]}, {})
    args = {"train": "train", "test": "train"}
    one = recipe(tmp_path / "run", vit, "simplecil", data=data, number=2, increment=1, args=args)
    _, told = checked(capsys, one, tmp_path)
    assert "2 of 2 test pictures are in train" in told
    assert "2 ids are in train and in test: train/a/train-0.png" in told


def test_classes_without_a_test_picture_are_told_and_a_stage_without_one_is_in_the_way(
    vit, tmp_path, capsys
):
    train = {"a": [1], "b": [2], "c": [3]}
    data = write_classes(tmp_path / "own", train, {"a": [4], "b": [], "c": []})
    settings = {"data": data, "number": 3, "order": None}
    one = recipe(tmp_path / "run", vit, **settings, first=2, increment=1)
    code, told = checked(capsys, one, tmp_path)
    assert code == 2
    assert "2 classes have no picture to test with: b, c" in told
    assert "stop at these: stage 3-3 has no picture to test with" in told
    one = recipe(tmp_path / "run", vit, **settings, increment=3)
    assert checked(capsys, one, tmp_path)[0] == 0


def test_everything_else_that_would_stop_a_run_is_told_at_once(vit, tmp_path, capsys):
    settings = {"number": 3, "captions": str(tmp_path / "none"), "texts": str(tmp_path / "no.yaml")}
    (tmp_path / "none").mkdir()
    (tmp_path / "no.yaml").write_text("- a list")
    one = recipe(tmp_path / "run", vit, "finetune", **settings)
    code, told = checked(capsys, one, tmp_path)
    assert code == 2
    for words in ("alone in its stage", "classes.captions: ", "classes.texts: "):
        assert words in told


def test_data_that_are_not_there_are_one_line(vit, tmp_path, capsys):
    code, told = checked(capsys, recipe(tmp_path, vit, data="toy:none"), tmp_path)
    assert code == 2 and "stop at these: there is no toy:none of labelled pictures" in told


# The doctor, and the list


def test_the_doctor_opens_encoder_weights_and_data(vit, tmp_path, capsys):
    cli.main(["doctor", written(recipe(tmp_path / "run", vit), tmp_path)])
    out = capsys.readouterr().out
    assert "ViTModel, 24 features, pictures prepared by paper_compat-16" in out
    assert "weights of" in out and "3 stages, 30 pictures to train, 20 to test" in out
    assert "experts, where" not in out


def test_the_doctor_names_what_cannot_be_reached(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    one = recipe(tmp_path / "run", tmp_path / "empty", data="toy:none")
    assert cli.main(["doctor", written(one, tmp_path)]) == 1
    out = capsys.readouterr().out
    for words in ("the encoder of", "the weights of", "no toy:none"):
        assert words in out[out.index("Problems") :]


def test_pictures_with_classes_are_listed_beside_the_tasks(capsys):
    assert cli.main(["list", "tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "toy:bars" in lines
    assert any(line.startswith("toy:compositions ") and "classes" in line for line in lines)
