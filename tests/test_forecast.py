"""What a dry run says is what the run then does."""

import dataclasses
import json

import pytest
import torch
import yaml

from mllm_cl import Memory, load_method
from mllm_cl.forecast import Launch, forecast, tell
from mllm_cl.model.load import empty_model, load_model
from mllm_cl.model.surgery import guards
from mllm_cl.recipe import ModelBlock, Recipe, RecipeError
from mllm_cl.runner import run
from toy_run import learn, load, toy_tasks

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


def test_a_dry_run_counts_the_steps_of_each_task_and_says_which_are_few(capsys):
    """32 samples: 4 batches of 8 on one process, 2 on two, 3 epochs each."""
    recipe = small("quickstart", "--training.num_train_epochs=3")
    alone, two = forecast(recipe, Launch()), forecast(recipe, Launch("ddp", 2))
    assert (alone.steps, two.steps) == ({"dial": 12}, {"dial": 6})
    tell(alone)
    told = capsys.readouterr().out
    assert "optimizer steps: dial 12" in told
    assert "fewer than 20 steps seldom teach anything: dial" in told
    tell(forecast(small("quickstart", "--training.max_steps=20"), Launch()))
    assert "fewer" not in capsys.readouterr().out


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


KEEPING = [  # methods that keep something, with settings, and the tiny model that suits them
    ("esft", {}, "qwen3-vl-moe"),
    ("ewc", {}, "qwen3-vl-moe"),
    ("ewc", {"num_experts": 4}, "llava"),
    ("osf", {}, "qwen3-vl-moe"),
    ("lwf", {}, "qwen3-vl-moe"),
    ("router_kl", {"buffer_bytes": 0}, "qwen3-vl-moe"),
    ("router_replay", {}, "qwen3-vl-moe"),
    ("same", {}, "llava"),
    ("same", {"num_experts": 0, "use_peft": False}, "qwen3-vl-moe"),
    ("same", {"num_experts": 0, "experts": "lora", "expert_rank": 2, "rank": 4}, "qwen3-vl-moe"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), KEEPING, ids=str)
def test_the_bytes_that_are_kept_after_three_tasks_are_forecast_to_a_twentieth(
    name, settings, kind, tiny_folder
):
    folder, memory, (first, second) = tiny_folder[kind], Memory(), toy_tasks()
    third = dataclasses.replace(first, name="third", index=3)
    cls = load_method(name)
    apart = {"lora_target_modules": ("q_proj", "o_proj"), "lora_r": 4}  # no two share an input
    known = {k: v for k, v in apart.items() if k in cls.__dataclass_fields__ and name != "esft"}
    method = cls(**known | settings, calibration_tokens=200)
    empty = empty_model(ModelBlock(model_name_or_path=str(folder)))
    method.before_task(empty, first, Memory())
    said = method.forecast_bytes(empty, 3)
    model = load(folder)
    for task in (first, second, third):
        learn(model, folder, method, task, memory, steps=1)
    assert method.kept_bytes(memory) == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("name", ["replay", "router_kl"])
def test_a_buffer_is_forecast_as_full(name, tiny_folder):
    folder, memory, (first, second) = tiny_folder["qwen3-vl-moe"], Memory(), toy_tasks()
    method = load_method(name)(buffer_bytes=2**15, calibration_tokens=200)
    empty = empty_model(ModelBlock(model_name_or_path=str(folder)))
    learn(load(folder), folder, method, second, memory, steps=1, past=[first])
    assert 2**14 < method.kept_bytes(memory) <= method.forecast_bytes(empty, 2)


GUARDED = [
    ({"num_experts": 4, "rank": 8}, "llava"),
    ({"num_experts": 0, "rank": 8}, "qwen3-vl-moe"),
    ({"num_experts": 0, "experts": "lora", "expert_rank": 4, "rank": 8}, "qwen3-vl-moe"),
]


@pytest.mark.parametrize(("settings", "kind"), GUARDED, ids=str)
def test_the_bytes_of_guards_are_forecast(settings, kind, tiny_folder, tmp_path):
    """From the second task on, when there are bases; one that is shared counts once."""
    folder, memory, tasks = tiny_folder[kind], Memory(), toy_tasks()
    method = load_method("same")(
        lora_target_modules=("q_proj", "o_proj"), lora_r=4, calibration_tokens=200, **settings
    )
    model = load(folder)
    for task in tasks:
        learn(model, folder, method, task, memory, steps=1)
    held = {}
    for one in guards(model).values():
        for part in (one.displacement, one.g.basis_DK, one.g.turn_KK):
            if part is not None:
                held[part.data_ptr()] = part.nbytes
    tree = {
        "model": {"model_name_or_path": str(folder), "lora_r": 4},
        "method": {"name": "same", **settings},
        "tasks": [{"name": "arrow", "data": "toy:arrow", "train_size": 4, "eval_size": 4}],
    }
    tree["model"]["lora_target_modules"] = ["q_proj", "o_proj"]
    said = forecast(Recipe.from_tree(tree, "recipe.yaml"), Launch()).device_bytes["guards"]
    assert sum(held.values()) <= said <= 1.6 * sum(held.values())
