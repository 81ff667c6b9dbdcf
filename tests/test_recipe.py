"""What a recipe accepts, and that whatever it refuses is named."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from mllm_cl.method import load_method, names
from mllm_cl.recipe import Recipe, RecipeError, training_hints
from mllm_cl.recipe.blocks import ADAPTER

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
OF_TASKS = [path for path in RECIPES if "tasks" in yaml.safe_load(path.read_text())]
METHOD = """
    from dataclasses import dataclass
    from typing import Literal

    from mllm_cl.method import Method

    @dataclass(frozen=True)
    class Probe:
        size: int = 3

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        damping: float = 0.1
        steps: int = 5
        update: Literal["forward", "gradient"] = "forward"
        layers: tuple[int, ...] = (0, 1)
        budget: float | None = None
        probe: Probe = Probe()
        lora_r: int = 4
        lora_target_modules: tuple[str, ...] = ("q_proj",)

        def __post_init__(self):
            if self.damping <= 0:
                raise ValueError(f"damping is {self.damping}, expected more than 0")
"""


@pytest.fixture
def tree(tmp_path):
    """A recipe that is right, as plain data."""
    method = tmp_path / "mine.py"
    method.write_text(dedent(METHOD))
    return {
        "seed": 3,
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": "toy:qwen3_vl_moe", "lora_r": 8},
        "method": {"name": str(method), "damping": 0.3},
        "tasks": [
            {"name": "bars", "data": "toy:bars", "train_size": 20, "eval_size": 10},
            {"name": "dice", "data": "toy:dice"},
        ],
        "retain": [{"name": "base", "data": "toy:digit", "eval_size": 10}],
        "training": {"learning_rate": 0.001, "max_steps": 5, "lr_scheduler_type": "cosine"},
        "eval": {"batch_size": 4},
    }


def write(tree, path) -> Path:
    path = Path(path)
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def error_of(tree, tmp_path, *overrides) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write(tree, tmp_path / "bad.yaml"), overrides)
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


def changed(tree, key, value):
    tree = copy.deepcopy(tree)
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


def test_a_recipe_fills_in_defaults_and_converts(tree, tmp_path):
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"))
    assert (recipe.seed, recipe.eval.batch_size, recipe.eval.max_new_tokens) == (3, 4, 8)
    assert recipe.model.dtype == "float32" and recipe.tasks[1].train_size is None
    assert recipe.tasks[0].metric == "exact_match"
    assert (recipe.method.damping, recipe.method.steps, recipe.method.probe.size) == (0.3, 5, 3)


def test_adapter_settings_stand_under_model_and_reach_the_method(tree, tmp_path):
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"))
    assert recipe.method.lora_r == recipe.model.lora_r == 8
    assert recipe.method.lora_target_modules == recipe.model.lora_target_modules == ("q_proj",)


def test_a_whole_number_stays_one_on_its_way_to_the_method(tree, tmp_path):
    method = Path(tree["method"]["name"])
    method.write_text(method.read_text() + "    lora_alpha: int = 8\n")
    tree["model"]["lora_alpha"] = 16
    assert Recipe.load(write(tree, tmp_path / "good.yaml")).method.lora_alpha == 16
    tree["model"]["lora_alpha"] = 16.5
    assert error_of(tree, tmp_path).key == "model.lora_alpha"


def test_a_secret_in_a_recipe_is_not_repeated(tree, tmp_path):
    tree["training"]["hub_token"] = "hf_secret"
    assert "hf_secret" not in str(error_of(tree, tmp_path))


def test_the_output_folder_is_named_after_the_file(tree, tmp_path):
    del tree["output_dir"]
    assert Recipe.load(write(tree, tmp_path / "six_tasks.yaml")).output_dir == "runs/six_tasks"


def test_saving_and_loading_gives_the_same_recipe(tree, tmp_path):
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"))
    recipe.save(tmp_path / "run" / "recipe.yaml")
    again = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert again.resolved() == recipe.resolved() and again.fingerprint(1) == recipe.fingerprint(1)
    assert sorted(os.listdir(tmp_path / "run")) == ["recipe.yaml"]


def test_saving_over_a_recipe_replaces_it(tree, tmp_path):
    path = write(tree, tmp_path / "good.yaml")
    Recipe.load(path, ["--seed", "9"]).save(path)
    assert Recipe.load(path).seed == 9


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["--method.damping", "0.5"], lambda r: r.method.damping == 0.5),
        (["--method.damping=1e-3"], lambda r: r.method.damping == 0.001),
        (["--training.learning_rate=1e-3"], lambda r: r.training["learning_rate"] == 0.001),
        (["--training.save_strategy", "no"], lambda r: r.training["save_strategy"] == "no"),
        (["--training.max_steps", "-1"], lambda r: r.training["max_steps"] == -1),
        (["--seed", "1", "--eval.batch_size=2"], lambda r: (r.seed, r.eval.batch_size) == (1, 2)),
        (["--tasks.0.train_size", "100"], lambda r: r.tasks[0].train_size == 100),
        (
            ["--model.lora_target_modules", "[a, b]"],
            lambda r: r.method.lora_target_modules[1] == "b",
        ),
        (["--method.probe.size", "7"], lambda r: r.method.probe.size == 7),
        (["--method.budget", "null"], lambda r: r.method.budget is None),
        (["--method.layers", "[2]"], lambda r: r.method.layers == (2,)),
        (["--model.trust_remote_code", "true"], lambda r: r.model.trust_remote_code),
        (["--tasks.1.args.language", "de"], lambda r: r.tasks[1].args == {"language": "de"}),
        (["--training=", "--retain=null"], lambda r: (r.training, r.retain) == ({}, ())),
    ],
)
def test_the_command_line_overrides_the_file(tree, tmp_path, words, read):
    assert read(Recipe.load(write(tree, tmp_path / "good.yaml"), words))


# one (place in the recipe, what is put there, the key the error names) per line
WRONG = [
    ("seed", "one", "seed"),
    ("seed", True, "seed"),
    ("seed", 1.0, "seed"),
    ("seed", -1, "seed"),
    ("seed", None, "seed"),
    ("output_dir", 5, "output_dir"),
    ("output_dir", "", "output_dir"),
    ("model", None, "model"),
    ("model", "toy:qwen3_vl_moe", "model"),
    ("model", {}, "model.model_name_or_path"),
    ("model.model_name_or_path", "./nowhere", "model.model_name_or_path"),
    ("model.model_name_or_path", 7, "model.model_name_or_path"),
    ("model.dtype", "float31", "model.dtype"),
    ("model.dtype", 32, "model.dtype"),
    ("model.lora_r", 0, "model.lora_r"),
    ("model.lora_r", "8", "model.lora_r"),
    ("model.lora_r", 8.0, "model.lora_r"),
    ("model.lora_dropout", 1.5, "model.lora_dropout"),
    ("model.lora_alpha", 16, "model.lora_alpha"),  # this method has no such field
    ("model.use_peft", True, "model.use_peft"),
    ("model.lora_target_modules", "q_proj", "model.lora_target_modules"),
    ("model.lora_target_modules", ["q_proj", 1], "model.lora_target_modules"),
    ("model.trust_remote_code", True, "model.trust_remote_code"),
    ("model.trust_remote_code", "yes", "model.trust_remote_code"),
    ("method", None, "method"),
    ("method", "mine", "method"),
    ("method", {"damping": 0.1}, "method.name"),
    ("method.name", "no_such_method", "method.name"),
    ("method.name", "./no_such_method.py", "method.name"),
    ("method.name", True, "method.name"),
    ("method.damping", "strong", "method.damping"),
    ("method.damping", False, "method.damping"),
    ("method.damping", -1.0, "method"),
    ("method.damping", float("nan"), "method.damping"),
    ("method.steps", 2.5, "method.steps"),
    ("method.update", "backward", "method.update"),
    ("method.layers", 3, "method.layers"),
    ("method.layers", [0, "one"], "method.layers.1"),
    ("method.probe", 3, "method.probe"),
    ("method.probe", {"siz": 3}, "method.probe.siz"),
    ("method.lora_r", 8, "method.lora_r"),
    ("tasks", None, "tasks"),
    ("tasks", [], "tasks"),
    ("tasks", {"bars": {}}, "tasks"),
    ("tasks.0", "bars", "tasks.0"),
    ("tasks.0", {"data": "toy:bars"}, "tasks.0.name"),
    ("tasks.0", {"name": "bars"}, "tasks.0.data"),
    ("tasks.0.name", True, "tasks.0.name"),
    ("tasks.0.name", "../bars", "tasks.0.name"),
    ("tasks.0.name", "zero-shot", "tasks.0.name"),
    ("tasks.1.name", "bars", "tasks.1.name"),
    ("retain.0.name", "bars", "retain.0.name"),
    ("tasks.0.data", "data/nowhere.jsonl", "tasks.0.data"),
    ("tasks.0.data", "toy:", "tasks.0.data"),
    ("tasks.0.train_size", 0, "tasks.0.train_size"),
    ("tasks.0.train_size", "1e3", "tasks.0.train_size"),
    ("tasks.0.metric", "exactmatch", "tasks.0.metric"),
    ("tasks.0.args", [], "tasks.0.args"),
    ("retain", 1, "retain"),
    ("retain.0.train_size", 5, "retain.0.train_size"),
    ("training", [1], "training"),
    ("training.learning_rate", "fast", "training.learning_rate"),
    ("training.learning_rate", -0.1, "training.learning_rate"),
    ("training.learning_rate", float("inf"), "training.learning_rate"),
    ("training.per_device_train_batch_size", 0, "training.per_device_train_batch_size"),
    ("training.max_steps", 1.5, "training.max_steps"),
    ("training.bf16", "true", "training.bf16"),
    ("training.lr_scheduler_type", "cosin", "training.lr_scheduler_type"),
    ("training.optim", "adamw", "training.optim"),
    ("training.output_dir", "x", "training.output_dir"),
    ("training.seed", 1, "training.seed"),
    ("training.do_train", True, "training.do_train"),
    ("training.auto_find_batch_size", True, "training.auto_find_batch_size"),
    ("training.resume_from_checkpoint", True, "training.resume_from_checkpoint"),
    ("training.eval_strategy", "no", "training.eval_strategy"),
    ("training.deepspeed", "z.json", "training.deepspeed"),
    ("training.fsdp", "full_shard", "training.fsdp"),
    ("training.hub_token", "x", "training.hub_token"),
    ("eval", 3, "eval"),
    ("eval.batch_size", 0, "eval.batch_size"),
    ("eval.max_new_tokens", None, "eval.max_new_tokens"),
]


@pytest.mark.parametrize(("place", "value", "key"), WRONG)
def test_a_wrong_value_is_named(tree, tmp_path, place, value, key):
    assert error_of(changed(tree, place, value), tmp_path).key == key


UNKNOWN = [
    ("sead", "seed"),
    ("modle", "model"),
    ("model.lora_rank", "lora_r"),
    ("model.torch_dtype", "dtype"),
    ("method.dampng", "damping"),
    ("method.probe.sizes", "size"),
    ("tasks.0.trainsize", "train_size"),
    ("retain.0.evalsize", "eval_size"),
    ("training.learning_rat", "learning_rate"),
    ("training.evaluation_strateg", ""),
    ("eval.batchsize", "batch_size"),
    ("learning_rate", "training.learning_rate"),
    ("lora_r", "model.lora_r"),
    ("max_new_tokens", "eval.max_new_tokens"),
]


@pytest.mark.parametrize(("place", "nearest"), UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tree, tmp_path, place, nearest):
    tree["method"]["probe"] = {"size": 2}
    error = error_of(changed(tree, place, 1), tmp_path)
    assert error.key == place and "unknown key" in error.problem
    assert not nearest or f"'{nearest}'" in error.problem


@pytest.mark.parametrize("key", ["model", "method", "tasks"])
def test_a_missing_block_is_named(tree, tmp_path, key):
    del tree[key]
    assert error_of(tree, tmp_path).key == key


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--sead", "1"], "sead"),
        (["--method.dampng=1"], "method.dampng"),
        (["--seed"], "seed"),
        (["--seed", "--eval.batch_size", "2"], "seed"),
        (["--seed", "1", "--seed", "2"], "seed"),
        (["--seed", "[1"], "seed"),
        (["--seed", "{a: 1, a: 2}"], "seed.a"),
        (["seed=1"], ""),
        (["--tasks.7.name", "x"], "tasks.7.name"),
        (["--tasks.-1.name", "x"], "tasks.-1.name"),
        (["--tasks.first.name", "x"], "tasks.first.name"),
        (["--seed.value", "1"], "seed.value"),
        (["--eval..batch_size", "1"], "eval..batch_size"),
        (["--training.deepspeed", "x"], "training.deepspeed"),
        (["--model.trust_remote_code", "maybe"], "model.trust_remote_code"),
    ],
)
def test_a_bad_override_is_named(tree, tmp_path, words, key):
    error = error_of(tree, tmp_path, *words)
    assert error.key == key
    assert "command line" in str(error) or "with --" in str(error)


OTHER = ["--method.name", "finetune"]


def test_another_method_leaves_out_what_it_does_not_take_of_the_file_and_says_so(tree, tmp_path):
    tree["method"] |= {"steps": 7, "calibration_tokens": 500}
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"), OTHER)
    assert recipe.notes == ("method finetune does not take damping, steps: left out",)
    assert recipe.method == load_method("finetune")(
        calibration_tokens=500, lora_r=8, seed=3, lora_target_modules="all-linear"
    )
    assert {"damping", "steps"}.isdisjoint(recipe.resolved()["method"])


def test_what_was_left_out_leaves_no_trace_in_the_run(tree, tmp_path):
    swept = Recipe.load(write(tree, tmp_path / "good.yaml"), OTHER)
    tree["method"] = {"name": "finetune"}
    written = Recipe.load(write(tree, tmp_path / "plain.yaml"))
    swept.save(tmp_path / "saved.yaml")
    assert swept.notes and swept == written == Recipe.load(tmp_path / "saved.yaml")
    assert swept.fingerprint(1) == written.fingerprint(1) and not written.notes


def test_settings_of_the_command_line_go_to_the_method_of_the_command_line(tree, tmp_path):
    tree["method"]["calibration_tokens"] = 500
    words = ["--method.calibration_tokens", "600", "--method.buffer_bytes=9"]
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"), [*words, "--method.name", "replay"])
    assert (recipe.method.calibration_tokens, recipe.method.buffer_bytes) == (600, 9)
    assert recipe.notes == ("method replay does not take damping: left out",)


@pytest.mark.parametrize(
    ("settings", "words", "key"),
    [
        ({}, ["--method.damping", "0.5"], "method.damping"),  # typed, so meant
        ({}, ["--method.steps=5"], "method.steps"),
        ({}, ["--method.probe.size=5"], "method.probe"),
        ({}, ["--method={name: finetune, damping: 1.0}"], "method.damping"),  # the block is typed
        ({"dampng": 0.2}, [], "method.dampng"),  # known to neither
        ({"top_k": 2}, [], "method.top_k"),  # known to the other, but the file is wrong as it is
        ({"damping": "strong"}, [], "method.damping"),
        ({"probe": {"siz": 2}}, [], "method.probe.siz"),
        ({"calibration_tokens": 1.5}, [], "method.calibration_tokens"),
        ({"lora_r": 8}, [], "method.lora_r"),
        ({"name": "no_such_method"}, [], "method.name"),
        ({"name": None}, [], "method.damping"),  # then all of it is said of the one method named
    ],
)
def test_another_method_hides_no_mistake(tree, tmp_path, settings, words, key):
    tree["method"] |= settings
    assert error_of(tree, tmp_path, *OTHER, *words).key == key


def test_the_files_own_method_named_again_changes_nothing(tree, tmp_path):
    name = tree["method"]["name"]
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"), ["--method.name", name])
    assert recipe.method.damping == 0.3 and not recipe.notes
    tree["method"]["dampng"] = 1
    assert error_of(tree, tmp_path, "--method.name", name).key == "method.dampng"


# What these methods train is their own choice, so a recipe that asks for something else is refused.
WORDS = {
    "moe_lora": ["--method.num_experts=4"],
    "esft": ["--model.lora_target_modules=[]"],
    "olora": ["--model.use_peft=true", "--method.num_experts=0"],
    "osf": [f"--model.{key}=null" for key in ("use_peft", "lora_r", "lora_alpha", "lora_dropout")],
}


@pytest.mark.parametrize("path", OF_TASKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", names("instruction"))
def test_every_method_runs_on_every_recipe(path, name):
    given = ["--method.name", name, *WORDS.get(name, [])]
    if not load_method(name).unlearns:
        given += [
            f"--tasks.{index}.supersedes=null"
            for index, task in enumerate(Recipe.load(path).tasks)
            if task.supersedes
        ]
    recipe = Recipe.load(path, given)
    assert recipe.method_name == recipe.method.name == name
    if name not in WORDS:
        assert recipe.model == Recipe.load(path).model


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"top_k": 2}, "top_k 2 with num_experts 0"),
        ({"top_k": 2, "use_peft": False}, "top_k 2 with num_experts 0"),
        ({"lora_dropout": 0.1, "num_experts": 4}, "lora_dropout 0.1 with num_experts 4"),
        ({"lora_dropout": 0.1, "use_peft": False}, "lora_dropout 0.1 with use_peft false"),
    ],
)
def test_a_setting_that_another_one_makes_idle_is_refused(tree, tmp_path, settings, found):
    with pytest.raises(ValueError, match=found):
        load_method("finetune")(**settings)
    tree["method"] = {"name": "finetune"}
    tree["model"] = {"model_name_or_path": "toy:qwen3_vl_moe"}
    for key, value in settings.items():
        tree["model" if key in ADAPTER else "method"][key] = value
    error = error_of(tree, tmp_path)
    assert error.key == "method" and found in error.problem and "Set" in error.problem


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2, "num_experts": 4},
        {"lora_dropout": 0.1},
        {"lora_dropout": 0.0, "num_experts": 4},
        {"num_experts": 0, "use_peft": False, "lora_r": 4},  # a size asks for nothing by itself
    ],
)
def test_settings_that_go_together_are_taken(settings):
    method = load_method("finetune")(**settings)
    assert settings.items() <= vars(method).items()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "just text",
        "seed: 1\nseed: 2",
        "seed: [1",
        "\tseed: 1",
        "a: &x 1\nb: *x",
        "a: &x [*x]",
        "seed: !!python/object/apply:os.system [ls]",
        "1: x",
        "yes: x",
        "seed: 2024-13-45",
        "seed: 1\n---\nseed: 2",
        "seed: " + "[" * 500,
        "seed: \x00",
        "? [a, b]\n: 1",
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused_in_one_line(tmp_path, text):
    error_of(text, tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    write("x: 1", tmp_path / "quickstart.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"did you mean 'quickstart.yaml'"):
        Recipe.load(tmp_path / "quickstrt.yaml")
    for path in (tmp_path, tmp_path / "bytes.yaml", tmp_path / "no" / "such.yaml"):
        with pytest.raises(RecipeError):
            Recipe.load(path)


def test_a_file_may_not_ask_for_remote_code_but_the_command_line_may(tree, tmp_path):
    tree["model"]["trust_remote_code"] = True
    path = write(tree, tmp_path / "good.yaml")
    with pytest.raises(RecipeError, match=r"type --model\.trust_remote_code true"):
        Recipe.load(path)
    assert Recipe.load(path, ["--model.trust_remote_code", "true"]).model.trust_remote_code


def test_a_path_is_looked_for_before_the_run(tree, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("{}")
    tree["tasks"][0]["data"] = str(data)
    assert Recipe.load(write(tree, tmp_path / "good.yaml")).tasks[0].data == str(data)
    data.unlink()
    assert "no such file" in error_of(tree, tmp_path).problem


@pytest.mark.parametrize(
    ("place", "value", "stages"),
    [
        ("seed", 4, {-1, 0, 1}),
        ("method.damping", 0.4, {-1, 0, 1}),
        ("model.lora_r", 2, {-1, 0, 1}),
        ("training.learning_rate", 0.01, {-1, 0, 1}),
        ("tasks.0.train_size", 30, {0, 1}),
        ("tasks.1.train_size", 30, {1}),
        ("output_dir", "elsewhere", set()),
        ("training.logging_steps", 1, set()),
        ("training.save_steps", 2, set()),
    ],
)
def test_a_fingerprint_changes_with_what_its_stage_depends_on(tree, tmp_path, place, value, stages):
    old = Recipe.load(write(tree, tmp_path / "old.yaml"))
    new = Recipe.load(write(changed(tree, place, value), tmp_path / "new.yaml"))
    assert {i for i in (-1, 0, 1) if old.fingerprint(i) != new.fingerprint(i)} == stages


def test_a_fingerprint_changes_with_the_text_of_a_users_own_method(tree, tmp_path):
    recipe = Recipe.load(write(tree, tmp_path / "good.yaml"))
    before = recipe.fingerprint(0)
    with Path(tree["method"]["name"]).open("a") as file:
        file.write("# another line\n")
    assert recipe.fingerprint(0) != before


def test_every_training_argument_is_known_with_its_type():
    from transformers import TrainingArguments

    hints = training_hints()
    assert list(hints) == [each.name for each in dataclasses.fields(TrainingArguments)]
    plain = {
        f.name: f.type for f in dataclasses.fields(TrainingArguments) if isinstance(f.type, type)
    }
    assert {name: hints[name] for name in plain} == plain


@pytest.mark.parametrize("words", [[], OTHER])
def test_a_typing_error_is_told_before_anything_heavy_is_imported(tree, tmp_path, words):
    tree["training"]["learning_rat"] = 1
    program = (
        "import sys; from mllm_cl.recipe import Recipe, RecipeError\n"
        f"try: Recipe.load({str(write(tree, tmp_path / 'bad.yaml'))!r}, {words})\n"
        "except RecipeError: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
