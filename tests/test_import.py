"""Configs of released class-incremental code become recipes that say what they leave out."""

import json
from pathlib import Path

import pytest
import yaml

from mllm_cl import cli
from mllm_cl.pilot import DATASETS, imported
from mllm_cl.recipe import Recipe, RecipeError

COMMON = {
    "prefix": "reproduce",
    "dataset": "cifar224",
    "memory_size": 0,
    "memory_per_class": 0,
    "fixed_memory": False,
    "shuffle": True,
    "init_cls": 10,
    "increment": 10,
    "device": ["0"],
    "seed": [1993],
}
APER = COMMON | {
    "model_name": "aper_adapter",
    "backbone_type": "pretrained_vit_b16_224_in21k_adapter",
    "dataset": "imagenetr",
    "init_cls": 5,
    "increment": 5,
    "tuned_epoch": 20,
    "init_lr": 0.05,
    "batch_size": 24,
    "weight_decay": 0.005,
    "min_lr": 0,
    "ffn_num": 32,
    "optimizer": "sgd",
    "vpt_type": "Shallow",
    "prompt_token_num": 7,
}


def config(folder: Path, **keys) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return path


def test_a_config_of_aper_is_a_recipe_of_aper(tmp_path):
    found = imported(config(tmp_path, **APER))
    tree = found.tree
    assert tree["method"] == {"name": "aper", "adaptation": "adapter", "rank": 32, "prompts": 7}
    assert tree["classes"] == {
        "data": "${MLLM_CL_CIL:-data/cil}/imagenet_r",
        "number": 200,
        "first": 0,
        "increment": 5,
        "order": 1993,
        "preprocessing": "paper_compat",
    }
    assert tree["training"] == {
        "num_train_epochs": 20,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 24,
        "weight_decay": 0.005,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 0,
        "lr_scheduler_type": "cosine",
    }
    assert tree["model"] == {"model_name_or_path": "converted/vit-b-16-augreg-in21k"}
    assert found.unmapped.keys() == {"prefix", "device", "vpt_type"}
    assert "recipes/convert.py makes converted/vit-b-16-augreg-in21k" in found.text("config.json")


@pytest.mark.parametrize(
    ("name", "more", "adaptation"),
    [
        ("aper_ssf", {}, "ssf"),
        ("adam_vpt", {"vpt_type": "Deep"}, "vpt_deep"),
        ("aper_vpt", {"vpt_type": "shallow"}, "vpt_shallow"),
        ("aper_finetune", {}, "finetune"),
    ],
)
def test_what_aper_puts_in_is_in_its_name_there(tmp_path, name, more, adaptation):
    tree = imported(config(tmp_path, **COMMON, model_name=name, **more)).tree
    assert tree["method"]["adaptation"] == adaptation


def test_every_key_that_is_not_in_the_recipe_is_named_with_a_reason(tmp_path):
    keys = {"model_name": "simplecil", "memory_size": 2000, "milestones": [8], "ffn_num": 64}
    keys |= {"cooling": 3, "scheduler": "steplr", "init_lr": 0.1, "lrate": 0.2, "seed": [1, 2]}
    unmapped = imported(config(tmp_path, **COMMON | keys)).unmapped
    assert "constant" in unmapped["scheduler"] and "steps" in unmapped["milestones"]
    assert "placeholder" in unmapped["memory_size"] and "launch file" in unmapped["device"]
    assert "simplecil here has no such setting" in unmapped["cooling"]
    assert "simplecil here has no such setting" in unmapped["ffn_num"]
    assert "training.learning_rate is that of init_lr" in unmapped["lrate"]
    assert "--sweep classes.order=1,2" in unmapped["seed"]
    assert unmapped.keys() == {*keys, "prefix", "device"} - {"model_name", "init_lr"}


def test_a_method_with_a_clip_has_the_prompts_and_pictures_of_clip(tmp_path):
    keys = {"model_name": "zs_clip", "backbone_type": "clip", "dataset": "aircraft"}
    tree = imported(config(tmp_path, **COMMON | keys | {"init_cls": 50})).tree
    classes = tree["classes"]
    assert (classes["preprocessing"], classes["templates"]) == ("clip", "aircraft")
    assert (classes["first"], classes["increment"], classes["number"]) == (50, 10, 100)


@pytest.mark.parametrize(
    ("fixed", "key", "value"), [(True, "memory_per_class", 20), (False, "memory_size", 2000)]
)
def test_exemplars_are_counted_as_the_config_counts_them(tmp_path, fixed, key, value):
    keys = {"model_name": "icarl", "memory_size": 2000, "memory_per_class": 20}
    found = imported(config(tmp_path, **COMMON | keys | {"fixed_memory": fixed}))
    other = {"memory_size", "memory_per_class"} - {key}
    assert found.tree["method"][key] == value and not other & found.tree["method"].keys()
    assert other <= found.unmapped.keys()


def test_a_total_of_exemplars_takes_the_place_of_a_methods_own_number_per_class(tmp_path):
    keys = {"model_name": "proof", "convnet_type": "clip", "memory_size": 2000}
    found = imported(config(tmp_path, **COMMON | keys))
    method = Recipe.from_tree(found.tree, "recipe.yaml").method
    assert (method.memory_size, method.memory_per_class) == (2000, None)
    assert found.tree["method"]["mode"] == "released"


def test_prompts_of_dual_prompt_are_told_apart(tmp_path):
    keys = {"length": 7, "g_prompt_length": 4, "g_prompt_layer_idx": [0], "top_k": 1}
    found = imported(config(tmp_path, **COMMON | keys | {"model_name": "dualprompt"}))
    method = {"name": "dual_prompt", "general": 4, "general_blocks": [0], "expert": 7}
    assert found.tree["method"].items() >= method.items() and "top_k" in found.unmapped


def test_prompts_of_l2p_have_our_names(tmp_path):
    keys = {"size": 12, "length": 6, "top_k": 3, "pull_constraint_coeff": 0.2}
    training = {"optimizer": "adam", "scheduler": "constant", "init_lr": 0.001875}
    names = {"model_name": "l2p", "batchwise_prompt": False, "prompt_key": True}
    found = imported(config(tmp_path, **COMMON | keys | training | names))
    method = {"name": "l2p", "pool": 12, "length": 6, "top_k": 3, "pull": 0.2}
    assert found.tree["method"].items() >= method.items()
    assert found.tree["method"]["batchwise"] is False and "prompt_key" in found.unmapped
    training = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 0.001875}
    assert found.tree["training"] == training | {"max_grad_norm": 0}


def test_a_config_of_engine_has_its_weights_and_names_its_descriptions(tmp_path):
    weights = {"text_des": 2, "image_aug": 0.5, "rerank": 0.5, "stat": 0.8, "rerank_top": 5}
    keys = {"model_name": "engine", "convnet_type": "clip", "sample_num": 0, "sample_noise": 0.3}
    found = imported(config(tmp_path, **COMMON | weights | keys))
    method = weights | {"name": "engine", "mode": "released", "noise": 0.3, "future": True}
    assert found.tree["method"] == method
    assert found.tree["classes"]["descriptions"].endswith("/cifar100.json")
    assert "sample_num" in found.unmapped
    assert Recipe.from_tree(found.tree, "recipe.yaml").method.describes == {"pairs"}


def test_a_rate_that_does_not_end_at_nothing_is_kept(tmp_path):
    training = imported(config(tmp_path, **APER | {"min_lr": 1e-5})).tree["training"]
    assert training["lr_scheduler_type"] == "cosine_with_min_lr"
    assert training["lr_scheduler_kwargs"] == {"min_lr": 1e-5}


def test_classes_that_are_not_shuffled_come_in_their_own_order(tmp_path):
    keys = {"model_name": "simplecil", "dataset": "vtab", "shuffle": False}
    assert imported(config(tmp_path, **COMMON | keys)).tree["classes"]["order"] is None


@pytest.mark.parametrize("theirs", DATASETS)
def test_every_data_set_that_they_name_is_in_our_table(tmp_path, theirs):
    found = imported(config(tmp_path, **COMMON | {"model_name": "simplecil", "dataset": theirs}))
    assert Recipe.from_tree(found.tree, "recipe.yaml").classes.increment == 10


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"model_name": "beef"}, "model_name", "no such method"),
        ({"dataset": "mnist"}, "dataset", "not known"),
        ({"backbone_type": "resnet32"}, "backbone_type", "not known"),
        ({"increment": None}, "classes.increment", "nothing"),
        ({"batch_size": "many"}, "training.per_device_train_batch_size", "many"),
    ],
)
def test_what_is_not_known_is_named_with_the_file(tmp_path, change, key, said):
    path = config(tmp_path, **COMMON | {"model_name": "simplecil"} | change)
    with pytest.raises(RecipeError, match=said) as told:
        imported(path)
    assert told.value.key == key and str(path) in str(told.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_what_is_no_config_is_one_line(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    assert cli.main(["import", str(tmp_path / "config.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_writes_a_recipe_that_loads_and_says_what_is_missing(tmp_path, capsys):
    path, output = config(tmp_path, **APER), tmp_path / "aper.yaml"
    words = ["import", str(path), "--output", str(output)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "not in the recipe: vpt_type: " in out and f"recipe: {output}" in out
    assert Recipe.load(output).method_name == "aper"
    head = [line for line in output.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("#   device: ") for line in head)
    assert yaml.safe_load(output.read_text()) == imported(path).tree
    assert cli.main(words) == 2  # a recipe is not written over
    assert "is there already" in capsys.readouterr().err
