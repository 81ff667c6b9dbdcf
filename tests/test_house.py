"""Rules of the house, read from the source: who imports whom, what is public, what never is."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import mllm_cl
from mllm_cl.metrics.scores import table
from mllm_cl.recipe import DataBlock, EvalBlock, ModelBlock, Recipe, RetainBlock, TaskBlock

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mllm_cl"
NAMES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
METHODS = [name for name in NAMES if name.startswith("methods/")]


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def imports(node: ast.AST, *, late: bool = True) -> set[str]:
    """Dotted names of what is imported, `from a import b` as `a.b`; `late`: in functions too."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    if not late and isinstance(node, ast.FunctionDef):
        return set()
    below = [imports(child, late=late) for child in ast.iter_child_nodes(node)]
    return set().union(*below)


def ours(name: str) -> set[str]:
    """The files and folders of the package that a file uses, anywhere: `drift`, `engine` ..."""
    dotted = [each.split(".") for each in imports(tree(name))]
    return {words[1] for words in dotted if words[0] == "mllm_cl"}


def theirs(name: str, *, late: bool = True) -> set[str]:
    """The top-level packages of others that a file uses."""
    return {each.partition(".")[0] for each in imports(tree(name), late=late)} - {"mllm_cl"}


# Who may import whom: docs/architecture.md


def test_the_mathematics_imports_nothing_of_ours():
    for name in NAMES:
        folder = name.partition("/")[0]
        if folder in ("drift", "metrics"):
            assert ours(name) <= {folder}, name
        if folder == "drift":
            assert "transformers" not in theirs(name), name


def test_surgery_imports_the_mathematics_and_the_engine_only():
    for name in NAMES:
        # The tiny models' tokenizer knows every word of the toy tasks: not surgery.
        if name.startswith("model/") and name != "model/tiny.py":
            assert ours(name) <= {"model", "drift", "engine"}, name
    assert ours("model/tiny.py") == {"data"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_knows_no_trainer_no_engine_package_and_no_other_method(name):
    known = {"drift", "model", "task", "memory", "method", "engine"}
    known |= {"learner", "exemplars", "pair_learner"}
    assert ours(name) <= known
    assert not theirs(name) & {"accelerate", "deepspeed", "trl", "datasets"}
    assert "transformers.Trainer" not in imports(tree(name))


def test_what_methods_stand_on_does_not_know_who_runs_them():
    above = {"runner", "trainer", "data", "recipe", "evaluate", "report", "cli", "methods"}
    for name in ("method.py", "task.py", "memory.py", "engine.py"):
        assert not ours(name) & above, name
    assert ours("engine.py") == set()


def test_only_the_runner_imports_the_trainer():
    assert [name for name in NAMES if "trainer" in ours(name)] == ["runner.py"]


def test_optional_packages_are_imported_only_in_the_functions_that_need_them():
    for name in NAMES:
        eager = theirs(name, late=False)
        assert not eager & {
            "deepspeed",
            "bitsandbytes",
            "trl",
            "sklearn",
            "matplotlib",
            "sacrebleu",
        }, name


def test_sharding_is_known_to_the_engine_alone():
    for name in NAMES:
        used = {
            each for each in imports(tree(name)) if re.match(r"deepspeed|torch\.distributed", each)
        }
        assert not used or name == "engine.py", f"{name} imports {used}"


def test_the_command_line_imports_nothing_until_it_is_asked():
    assert imports(tree("cli.py"), late=False) == {
        "argparse",
        "collections.abc.Sequence",
        "functools.partial",
        "logging",
        "mllm_cl.__version__",
        "os",
        "sys",
    }


# What is public: to change one of these is a decision


def test_the_public_names_are_these():
    assert mllm_cl.__all__ == [
        "CovarianceTracker",
        "DriftGuard",
        "Memory",
        "Method",
        "Recipe",
        "Task",
        "TaskSequence",
        "classifier",
        "continual",
        "fold",
        "guard",
        "learning",
        "load_method",
        "routers",
        "run",
    ]
    for name in mllm_cl.__all__:
        assert vars(mllm_cl).get(name) or mllm_cl.__getattr__(name)


def test_the_commands_are_these():
    called = [node for node in ast.walk(tree("cli.py")) if isinstance(node, ast.Call)]
    commands = [
        node.args[0].value
        for node in called
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_parser"
    ]
    expected = "classify data describe doctor export import list measure report run"
    assert sorted(commands) == expected.split()


MINIMAL = """
model: {model_name_or_path: somewhere/some-model}
method: {name: zeroshot}
tasks: [{name: one, data: "toy:bars"}]
"""


def test_the_keys_of_a_recipe_are_these(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    keys = list(Recipe.load(path).resolved())
    blocks = ["model", "method", "tasks", "retain", "data", "training", "eval"]
    assert keys == ["seed", "output_dir", *blocks]
    blocks = {
        ModelBlock: "model_name_or_path model_revision adapter_name_or_path dtype "
        "attn_implementation trust_remote_code load_in_4bit bnb_4bit_quant_type "
        "use_bnb_nested_quant unquantised use_peft lora_r lora_alpha lora_dropout "
        "lora_target_modules",
        RetainBlock: "name data eval_size metric args",
        TaskBlock: "name data eval_size metric args train_size supersedes",
        DataBlock: "on_error error_budget max_length too_long",
        EvalBlock: "batch_size max_new_tokens backend",
    }
    for block, expected in blocks.items():
        assert [field.name for field in fields(block)] == expected.split()


def test_the_keys_of_the_scores_are_these():
    rows = [
        {"after": "zero-shot", "scores": {"one": 0.0, "kept": 1.0}},
        {"after": "one", "scores": {"one": 1.0, "kept": 0.5}},
    ]
    scores = table(["one"], ["kept"], rows)
    assert list(scores) == ["tasks", "retain", "rows", "constant", "summary"]
    assert list(scores["summary"]) == [
        "average",
        "finetune",
        "mean_average",
        "backward_transfer",
        "backward_transfer_over_all",
        "forgetting",
        "forward_transfer",
        "retain_average",
        "retain_change",
    ]
    both = {"one": 1.0, "kept": 0.5}
    for row in rows:
        row |= {"exact_match": both, "normalised_match": both, "losses": both}
    assert list(table(["one"], ["kept"], rows)["summary"])[7:12] == [
        "exact_match_average",
        "exact_match_forgetting",
        "normalised_match_average",
        "normalised_match_forgetting",
        "objective",
    ]


# What never appears


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_was_read_is_run_as_code(name):
    """No pickle, no eval, no shell: a file that comes from elsewhere stays data."""
    module = tree(name)
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not theirs(name) & unsafe
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        called, where = ast.unparse(node.func), f"line {node.lineno} of {name}"
        assert called not in ("eval", "exec", "compile", "os.system", "os.popen"), where
        assert called not in ("torch.load", "torch.save"), where
        assert called not in ("yaml.load", "yaml.full_load", "yaml.unsafe_load"), where
        for keyword in node.keywords:
            text = f"{keyword.arg}={ast.unparse(keyword.value)}"
            assert text not in ("shell=True", "allow_pickle=True", "weights_only=False"), where
            assert not (keyword.arg == "Loader" and "Safe" not in text), where


def test_no_file_knows_the_machine_it_was_written_on():
    places = "|".join(("work", "root", "home", "Users", "tmp/w"))
    private = re.compile(rf"(?<![\w.:/])/({places})/")
    kinds = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".log", ".jinja"}
    folders = ("mllm_cl", "tests", "recipes", "launch", "docs", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*files, *ROOT.glob("*.*")]:
        if path.is_file() and path.suffix in kinds:
            found = private.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} contains {found and found.group()}"
