"""What a model knew before the first task is protected, whoever measured it."""

import pytest
import torch
import yaml

from mllm_cl import Memory
from mllm_cl.cli import main
from mllm_cl.memory import load_tensors
from mllm_cl.model.load import load_model
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.runner import run
from toy_run import load, logits, probe

WHOLE = {"lora_target_modules": ["q_proj", "v_proj"], "use_peft": False}
METHOD = {"name": "same", "num_experts": 0, "calibration_tokens": 500}


def recipe(folder, base, **changes):
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(base), **WHOLE},
        "method": METHOD,
        "tasks": [{"name": "arrow", "data": "toy:arrow", "train_size": 16, "eval_size": 4}],
        "training": {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return Recipe.load(path)


def measured(model, to, *more: str, modules: tuple[str, ...] = ("q_proj", "v_proj")) -> int:
    settings = ["method.num_experts=0", "method.calibration_tokens=500", "model.use_peft=false"]
    settings.append(f"model.lora_target_modules=[{','.join(modules)}]")
    words = [word for one in (*settings, *more) for word in ("--set", one)]
    return main(["measure", str(model), "--data", "toy:colour", "--to", str(to), *words])


def test_a_measured_memory_protects_as_a_retained_set_does(tiny_folder, tmp_path):
    model, file = tiny_folder["qwen3-vl-moe"], tmp_path / "known.safetensors"
    assert measured(model, file) == 0
    retain = [{"name": "known0", "data": "toy:colour", "eval_size": 4}]
    runs = {
        "retained": recipe(tmp_path / "a", model, retain=retain),
        "measured": recipe(tmp_path / "b", model, memory=str(file)),
        "neither": recipe(tmp_path / "c", model),
    }
    states = {
        name: load_tensors(run(one) / "task_1/state.safetensors") for name, one in runs.items()
    }
    for name, tensor in states["retained"].items():
        assert torch.equal(tensor, states["measured"][name]), name
    assert any(
        not torch.equal(tensor, states["neither"][name])
        for name, tensor in states["retained"].items()
    )


def test_a_memory_of_other_modules_is_refused(tiny_folder, tmp_path):
    model, file = tiny_folder["qwen3-vl-moe"], tmp_path / "known.safetensors"
    assert measured(model, file, "method.router=frozen", modules=("o_proj",)) == 0
    with pytest.raises(RecipeError, match="measured at other modules"):
        run(recipe(tmp_path / "a", model, memory=str(file), method=METHOD | {"router": "frozen"}))


def test_a_memory_that_is_not_there_is_an_error_before_anything_loads(tiny_folder, tmp_path):
    with pytest.raises(RecipeError, match="mllm-cl measure"):
        recipe(tmp_path / "a", tiny_folder["llava"], memory=str(tmp_path / "none.safetensors"))


def test_an_adapter_joins_the_weights_as_they_load(tiny_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = tiny_folder["llava"]
    adapted = get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    model = {"model_name_or_path": str(folder), **WHOLE}
    settings = recipe(
        tmp_path / "a", folder, model=model | {"adapter_name_or_path": str(tmp_path / "adapter")}
    ).model
    batch = probe(folder)
    joined, apart = logits(load_model(settings), batch), logits(adapted, batch)
    assert torch.allclose(joined, apart, atol=1e-4)
    assert not torch.allclose(joined, logits(load(folder), batch), atol=1e-2)


def test_a_measured_memory_holds_the_moments_of_every_trained_weight(tiny_folder, tmp_path):
    file = tmp_path / "known.safetensors"
    measured(tiny_folder["qwen3-vl-moe"], file)
    names = Memory.load(file).under("same/source")
    assert sum("q_proj" in name for name in names) == sum("gate" in name for name in names) > 0
