"""Hundreds of broken recipes end in one line and code 2; artefacts with code in them run none.

The recipes that ship are broken one place at a time, by rules that leave nothing valid.
"""

import copy
import itertools
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import yaml

from mllm_cl import cli
from mllm_cl.memory import Memory
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.recipe import ModelBlock, Recipe, RecipeError

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def short(path):
    """The recipe with two tasks and one set that is retained, so that hundreds load in seconds."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "tasks" not in tree:
        return tree
    tree["tasks"] = tree["tasks"][-2:]
    tree["tasks"][-1].pop("supersedes", None)
    if "retain" in tree:
        tree["retain"] = tree["retain"][:1]
    return tree


TREES = {path.stem: short(path) for path in RECIPES}
OF_TASKS = {name: tree for name, tree in TREES.items() if "tasks" in tree}
DEEP = 400


def places(node, here=()):
    """Every key and index of a tree, inner ones too."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        yield (*here, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*here, key))


def put(tree, place, value):
    tree = copy.deepcopy(tree)
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return tree


def get(tree, place):
    for key in place:
        tree = tree[key]
    return tree


def nested(depth=DEEP):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def wrong_types():
    """At every place a value of a type that it cannot have."""
    for name, tree in TREES.items():
        for place in places(tree):
            value = get(tree, place)
            text, free = isinstance(value, str), place[-1] == "args" or "args" in place
            for wrong in ({"x": [1]}, nested(30), float("nan"), b"\x00\x01"):
                if not (free and isinstance(wrong, (dict, list))):
                    yield f"{name} {place} {wrong!r:.20}", (tree, place, wrong)
            if text and not free:
                yield f"{name} {place} 7", (tree, place, 7)


def unknown_keys():
    """In every block a key that nobody reads."""
    for name, tree in TREES.items():
        blocks = [place for place in places(tree) if isinstance(get(tree, place), dict)]
        for place in [(), *blocks]:
            if "args" not in place:
                for key in ("no_such_key", "__class__", "name ", "Model", ""):
                    yield f"{name} {place} {key!r}", (tree, (*place, key), 1)


NUMBERS = (-1, -(10**40), 10**400, float("inf"), float("-inf"), "1e400", "ten")


def huge_numbers():
    for name, tree in TREES.items():
        for place in places(tree):
            value = get(tree, place)
            counts = isinstance(value, int) and not isinstance(value, bool)
            ranged = place[-1] in ("seed", "eval_size", "train_size", "learning_rate", "lora_r")
            ranged |= place[-1] in ("per_device_train_batch_size", "batch_size", "max_new_tokens")
            for number in NUMBERS:
                known_bad = isinstance(number, str) or number != 10**400 or place[-1] == "seed"
                if ranged and known_bad and (counts or number != "1e400"):
                    yield f"{name} {place} {number!r:.20}", (tree, place, number)


PAIRS = [
    (("method", "name"), "no_such_method"),
    (("method", "name"), "./nowhere.py"),
    (("method", "num_experts"), 1),
    (("method", "budget"), -1.0),
    (("method", "rank"), 0),
    (("method", "forbid_energy"), 1.5),
    (("method", "top_k"), 1),
    (("model", "lora_dropout"), 2.0),
    (("model", "model_name_or_path"), "./nowhere"),
    (("model", "adapter_name_or_path"), "/nowhere"),
    (("model", "trust_remote_code"), True),
    (("model", "dtype"), "int4"),
    (("eval", "backend"), "vllm"),
    (("memory",), "nowhere.safetensors"),
    (("tasks", 0, "metric"), "nothing"),
    (("tasks", 0, "supersedes"), "nobody"),
    (("tasks", 0, "name"), "../../etc"),
    (("tasks", 0, "data"), "nowhere/rows.jsonl"),
    (("training", "deepspeed"), "zero3.json"),
    (("training", "fsdp"), "full_shard"),
    (("training", "hub_token"), "secret"),
    (("output_dir",), str(RECIPES[0])),
]


def impossible():
    for name, tree in OF_TASKS.items():
        for place, value in PAIRS:
            tree.setdefault(place[0], {})
            yield f"{name} {place} {value!r}", (tree, place, value)
        yield f"{name} twice", (tree, ("tasks",), [tree["tasks"][0]] * 2)
        yield f"{name} none", (tree, ("tasks",), [])


def texts():
    """Files that are no YAML, or YAML of the kind that a recipe may not be."""
    for stem, tree in TREES.items():
        text = yaml.safe_dump(tree, sort_keys=False)
        yield f"{stem} cut in a list", text + "\nretain: [1,"
        yield f"{stem} NUL", text.replace("seed", "se\x00ed", 1)
        yield f"{stem} bell", text + "\n# \x07"
        yield f"{stem} tab", text + "\n\tx: 1"
        yield f"{stem} twice", text + "\nseed: 1"
        yield f"{stem} two documents", text + "\n---\nseed: 1"
        yield f"{stem} alias", text + "\nmemory: &a x\nnotes: *a"
        yield f"{stem} cycle", text + "\nnotes: &a [*a]"
        yield f"{stem} merge", text + "\nnotes: {<<: {seed: 1}}"
        yield f"{stem} undefined alias", text + "\nnotes: *nobody"
        yield f"{stem} deep list", text + "\nnotes: " + "[" * 5000
        yield f"{stem} deep map", text + "\nnotes: " + "{a: " * DEEP + "1" + "}" * DEEP
        yield f"{stem} bomb", text + "\na: &a [1]\n" + "b: &b [*a, *a]\nc: [*b, *b]"
        yield f"{stem} tag", text.replace("seed: 0", "seed: !!python/int 0")
        yield f"{stem} own tag", text.replace("seed: 0", "seed: !secret 0")
        yield f"{stem} binary", text.replace("seed: 0", "seed: !!binary AA==")
        yield f"{stem} set", text.replace("seed: 0", "seed: !!set {a}")
        yield f"{stem} date", text.replace("seed: 0", "seed: 2024-02-30")
        yield f"{stem} sexagesimal", text.replace("seed: 0", "seed: 99999999:30:30")
        yield f"{stem} digits", text.replace("seed: 0", "seed: " + "9" * 6000)
        yield f"{stem} bad int tag", text.replace("seed: 0", "seed: !!int x")
        yield f"{stem} bad float tag", text.replace("seed: 0", "seed: !!float x")
        yield f"{stem} bad bool tag", text.replace("seed: 0", "seed: !!bool x")
        yield f"{stem} bad time tag", text.replace("seed: 0", "seed: !!timestamp x")
        yield f"{stem} empty int tag", text.replace("seed: 0", "seed: !!int ''")
        yield f"{stem} odd key", text + "\n? [a, b]\n: 1"
        yield f"{stem} null key", text + "\n~: 1"
        yield f"{stem} surrogate", text + '\nnotes: "\\ud800"'
        yield f"{stem} directive", "%YAML 9.9\n---\n" + text


def broken():
    """Pairs of what is wrong and the text of the recipe."""
    changes = [*impossible(), *wrong_types(), *unknown_keys(), *huge_numbers()]
    chosen = random.Random(0).sample(changes, 360)
    for name, change in chosen:
        yield name, yaml.safe_dump(put(*change), sort_keys=False)
    yield from texts()


def test_every_broken_recipe_is_a_recipe_error_and_none_takes_long(tmp_path):
    path, wrong, count = tmp_path / "broken.yaml", [], 0
    for name, text in broken():
        path.write_text(text, encoding="utf-8")
        count += 1
        try:
            Recipe.load(path)
            wrong.append(f"{name}: taken")
        except RecipeError as error:
            if str(path) not in str(error) or "\n" in str(error) or len(str(error)) > 2000:
                wrong.append(f"{name}: {error!s:.200}")
        except Exception as error:  # whatever else comes out is what this test looks for
            wrong.append(f"{name}: {type(error).__name__}: {error!s:.200}")
    assert count >= 500
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:40])


def test_on_the_command_line_it_is_one_line_and_code_2(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    for name, text in itertools.islice(broken(), 0, None, 20):
        path.write_text(text, encoding="utf-8")
        assert cli.main(["run", str(path)]) == 2, name
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and "Traceback" not in told.err, name


# Files that come from elsewhere: each would leave a marker if its code ran


class Bomb:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))  # noqa: S301
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_is_called_a_memory_is_not_loaded(tmp_path, protocol):
    path, marker = tmp_path / "memory.safetensors", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=protocol))
    with pytest.raises(Exception, match=r"[Hh]eader"):
        Memory.load(path)
    assert not marker.exists()


TAGS = [
    "!!python/object/apply:os.mkdir [{}]",
    "!!python/object/new:os.mkdir [{}]",
    "!!python/object/apply:os.mkdir {{args: [{}]}}",
    "!!python/object/apply:subprocess.call [[mkdir, {}]]",
    '!!python/object/apply:builtins.eval [\'__import__("os").mkdir("{}")\']',
    "!!python/object:pathlib.Path {{x: {}}}",
    "!!python/module:os",
    "!!python/name:os.mkdir",
    "!!python/tuple [{}]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [{}]",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("on_the_command_line", [False, True])
def test_a_tag_that_names_code_is_refused(tmp_path, tag, on_the_command_line, capsys):
    marker, path = tmp_path / "marker", tmp_path / "recipe.yaml"
    tree, value = TREES["quickstart"], tag.format(marker)
    text = yaml.safe_dump(tree)
    path.write_text(text if on_the_command_line else f"{text}\nmemory: {value}\n")
    words = ["--memory", value] if on_the_command_line else []
    assert cli.main(["run", str(path), *words]) == 2
    assert "Traceback" not in capsys.readouterr().err and not marker.exists()


def with_code(source: Path, folder: Path, marker: Path, name: str, classes: dict) -> Path:
    """A copy of a model whose file `name` maps `classes` to code that comes with it."""
    shutil.copytree(source, folder)
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    path = folder / name
    tree = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(tree | {"model_type": "theirs", "auto_map": classes}))
    return folder


@pytest.mark.parametrize(
    "classes",
    [
        {"AutoConfig": "theirs.Theirs"},
        {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"},
        {"AutoConfig": "theirs.Theirs", "AutoModelForImageTextToText": "theirs.Theirs"},
    ],
)
def test_code_that_comes_with_a_model_stays_unread(tmp_path, tiny_folder, classes):
    marker = tmp_path / "marker"
    folder = with_code(tiny_folder["llava"], tmp_path / "m", marker, "config.json", classes)
    with pytest.raises((ValueError, OSError)):
        load_model(ModelBlock(model_name_or_path=str(folder)))
    assert not marker.exists()


def test_weights_in_a_pickle_run_nothing(tmp_path, tiny_folder):
    marker = tmp_path / "marker"
    folder = Path(shutil.copytree(tiny_folder["llava"], tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError, RuntimeError)):
        load_model(ModelBlock(model_name_or_path=str(folder)))
    assert not marker.exists()


REACH = [
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ messages.__class__.__base__.__subclasses__() }}}}",
    "{{{{ cycler.__init__.__globals__.os.mkdir('{}') }}}}",
    "{{{{ self.__init__.__globals__.__builtins__['__import__']('os').mkdir('{}') }}}}",
    "{{{{ lipsum.__globals__['os'].mkdir('{}') }}}}",
    "{{{{ raise_exception.__globals__['os'].mkdir('{}') }}}}",
]


@pytest.mark.parametrize("template", REACH)
def test_a_chat_template_reaches_no_code(tmp_path, tiny_folder, template):
    from jinja2.exceptions import SecurityError, UndefinedError

    marker = tmp_path / "marker"
    processor = load_processor(ModelBlock(model_name_or_path=str(tiny_folder["llava"])))
    processor.chat_template = template.format(marker)
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    with pytest.raises((SecurityError, UndefinedError)):
        processor.apply_chat_template(messages, tokenize=False)
    assert not marker.exists()
