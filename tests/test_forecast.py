"""What a dry run says is what the run then does."""

import json

import pytest
import torch
import yaml

from mllm_cl.forecast import Launch, forecast
from mllm_cl.model.load import empty_model, load_model
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.runner import run

SMALL = [
    "--tasks=[{name: dial, data: 'toy:dial', train_size: 32, eval_size: 4}]",
    "--retain=[]",
    "--training.per_device_train_batch_size=8",
    "--training.warmup_steps=0",
]


def small(name: str, *more: str) -> Recipe:
    return Recipe.load(f"recipes/{name}.yaml", [*SMALL, *more])


@pytest.mark.parametrize("name", ["quickstart", "quickstart_llava"])
def test_what_a_dry_run_says_is_what_the_run_does(name, tmp_path):
    recipe = small(name, f"--output_dir={tmp_path}")
    said = forecast(recipe, Launch())
    run(recipe)
    manifest = json.loads((tmp_path / "task_1" / "manifest.json").read_text())
    number = sum(torch.Size(shape).numel() for shape in said.trained.values())
    assert number == manifest["trained_parameters"]
    assert 0.3 * said.kept_bytes < manifest["memory_bytes"] <= 1.05 * said.kept_bytes
    assert said.device_bytes["Adam's moments"] == 8 * number


def test_an_empty_model_has_the_shapes_of_the_loaded_one_and_no_memory():
    settings = small("quickstart").model
    empty, whole = empty_model(settings), load_model(settings)
    assert {name: weight.shape for name, weight in empty.named_parameters()} == {
        name: weight.shape for name, weight in whole.named_parameters()
    }
    assert all(weight.is_meta for weight in empty.parameters())


@pytest.mark.parametrize(
    ("file", "engine", "cut"),
    [
        ("single_gpu", "single", (1, 1, 1)),
        ("multi_gpu", "ddp", (1, 1, 1)),
        ("zero2", "zero2", (1, 8, 8)),
        ("zero3", "zero3", (8, 8, 8)),
        ("fsdp2", "fsdp2", (8, 8, 8)),
    ],
)
def test_a_launch_file_says_what_is_cut(file, engine, cut):
    launch = Launch.read(f"launch/{file}.yaml")
    assert launch.engine == engine
    assert tuple(launch.shards(what) for what in ("weights", "gradients", "moments")) == cut


def test_sharding_divides_what_it_cuts():
    recipe = small("quickstart")
    alone, cut = (forecast(recipe, launch) for launch in (Launch(), Launch("zero3", 8)))
    for what in ("frozen weights", "trained weights", "gradients", "Adam's moments"):
        assert cut.device_bytes[what] == pytest.approx(alone.device_bytes[what] / 8, rel=1e-3)
    assert cut.device_bytes["guards"] == alone.device_bytes["guards"]


def test_a_file_that_is_no_launch_file_is_refused(tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump({"tasks": []}))
    with pytest.raises(RecipeError, match="no launch file"):
        Launch.read(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "single"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {}}, None),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, None),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "fsdp2"),
    ],
)
def test_a_launch_file_is_named_as_the_run_would_be(words, said, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(words))
    if said is None:
        with pytest.raises(RecipeError, match="no launch file"):
            Launch.read(path)
    else:
        assert Launch.read(path).engine == said


@pytest.mark.parametrize("text", ["", "[]", "a: [", "DDP"])
def test_a_launch_file_that_holds_no_keys_is_refused(text, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="no launch file"):
        Launch.read(path)
