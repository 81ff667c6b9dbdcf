"""A recipe: one YAML file that says everything about a continual run except the hardware.

The dataclasses below are the documentation of its keys; `training` takes the names of
`transformers.TrainingArguments`, `method` the fields of the method's own dataclass. What nobody
reads is an error.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import operator
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from mllm_cl.metrics.answers import metric

if TYPE_CHECKING:
    from mllm_cl.method import Method


class RecipeError(ValueError):
    """Something in a recipe or its overrides is wrong; `key` is the dotted key it is about."""

    def __init__(self, key: str, problem: str, source: str = ""):
        super().__init__(key, problem, source)
        self.key, self.problem, self.source = key, problem, source

    def __str__(self) -> str:
        parts = (self.source, self.key, self.problem)
        return ": ".join(" ".join(part.split()) for part in parts if part)


class Between(NamedTuple):
    """The closed range of a number."""

    low: float
    high: float = math.inf


Count = Annotated[int, Between(1)]

# adapter settings stand under `model`, as in TRL, and are read by the method that has such a field
ADAPTER = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass(frozen=True, kw_only=True)
class ModelBlock:
    """The model, in the names of TRL's `ModelConfig`; adapter settings default to the method's."""

    model_name_or_path: str
    model_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    use_peft: bool | None = None
    lora_r: Count | None = None
    lora_alpha: Annotated[int | float, Between(0)] | None = None
    lora_dropout: Annotated[float, Between(0, 1)] | None = None
    lora_target_modules: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        _must_exist("model_name_or_path", self.model_name_or_path)


@dataclass(frozen=True, kw_only=True)
class RetainBlock:
    """Data to keep answering: `data` is `toy:NAME`, a file, a folder or a data set of the hub."""

    name: str
    data: str
    eval_size: Count | None = None
    metric: str = "exact_match"
    args: dict[str, Any] = field(default_factory=dict)  # handed to the reader of `data`

    def __post_init__(self) -> None:
        # it names a file and a column of scores.json, whose row "zero-shot" is before any training
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.name) or self.name == "zero-shot":
            expected = "expected letters, digits and . _ + - (not 'zero-shot')"
            raise RecipeError("name", f"found {self.name!r}, {expected}")
        _must_exist("data", self.data)
        try:
            metric(self.metric)
        except ValueError as error:
            raise RecipeError("metric", str(error)) from None


@dataclass(frozen=True, kw_only=True)
class TaskBlock(RetainBlock):
    """Data to learn, one task after another; sizes that are left out mean all there is."""

    train_size: Count | None = None


@dataclass(frozen=True, kw_only=True)
class EvalBlock:
    """How answers are generated when the tasks are scored."""

    batch_size: Count = 64
    max_new_tokens: Count = 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a continual run except the hardware."""

    output_dir: str
    model: ModelBlock
    method: "Method"
    method_name: str
    tasks: tuple[TaskBlock, ...]
    retain: tuple[RetainBlock, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    eval: EvalBlock = field(default_factory=EvalBlock)
    seed: int = 0

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe in a YAML file, after overrides such as `--seed 1` or `--method.damping=0.3`.

        Relative paths count from the working directory. Raises RecipeError, which names the file,
        the key, what was found and what was expected.
        """
        given: dict[str, str] = {}
        try:
            tree = _read_file(Path(path))
            given.update(_split_overrides(overrides))
            _refuse_remote_code(tree, given)
            for key, text in given.items():
                _put(tree, key, _parse(text, key))
            return _recipe(tree, Path(path).stem)
        except RecipeError as error:
            changed = [key for key in given if f"{error.key}.".startswith(f"{key}.")]
            source = f"{path} with --{changed[-1]} on the command line" if changed else f"{path}"
            raise RecipeError(error.key, error.problem, source) from None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, defaults filled in; `training` keeps only what was set.

        Loading what this returns gives an equal recipe.
        """
        model, method = dataclasses.asdict(self.model), dataclasses.asdict(self.method)
        own = {
            key: value
            for key, value in method.items()
            if key not in ADAPTER and (key, value) != ("seed", self.seed)
        }
        tree = {
            "seed": self.seed,
            "output_dir": self.output_dir,
            "model": {key: value for key, value in model.items() if value is not None},
            "method": {"name": self.method_name, **own},
            "tasks": [dataclasses.asdict(task) for task in self.tasks],
            "retain": [dataclasses.asdict(data) for data in self.retain],
            "training": self.training,
            "eval": dataclasses.asdict(self.eval),
        }
        return _plain(tree, "")

    def save(self, path: str | os.PathLike) -> None:
        """Write the resolved recipe as YAML, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            yaml.safe_dump(self.resolved(), file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def stage(self, index: int) -> dict[str, Any]:
        """What decides the numbers of task `index`: without later tasks, places and logging.

        Index -1 is the stage before any training.
        """
        if not -1 <= index < len(self.tasks):
            raise ValueError(f"found stage {index}, expected -1 to {len(self.tasks) - 1}")
        tree = self.resolved()
        del tree["output_dir"]
        tree["tasks"] = tree["tasks"][: index + 1]
        for key in [key for key in tree["training"] if key.startswith(BOOKKEEPING)]:
            del tree["training"][key]
        if self.method_name.endswith(".py"):
            tree["method"]["name"] = hashlib.sha256(Path(self.method_name).read_bytes()).hexdigest()
        return tree

    def fingerprint(self, index: int) -> str:
        """16 hex digits that are the same when `stage(index)` is the same."""
        text = json.dumps(self.stage(index), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the training block: TrainingArguments' names, less what belongs elsewhere -------------------

BOOKKEEPING = (  # training keys, by how they begin, that never change what is learnt
    "logging_",
    "log_",
    "report_to",
    "run_name",
    "project",
    "trackio_",
    "disable_tqdm",
    "save_",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "skip_memory_metrics",
    "ddp_timeout",
)
_LAUNCH = "hardware belongs in the launch file (accelerate launch --config_file launch/...)"
_SCORING = "every task is scored after each task; see 'eval' for how"
_ELSEWHERE = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _LAUNCH),
    **dict.fromkeys(("local_rank", "ddp_backend", "use_cpu"), _LAUNCH),
    "output_dir": "set 'output_dir' at the top level",
    "seed": "set 'seed' at the top level",
    "resume_from_checkpoint": "resuming is running the same command again",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the runner always trains and scores"),
    "per_device_eval_batch_size": "set 'eval.batch_size'",
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), _SCORING),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _SCORING
    ),
    "enable_jit_checkpoint": "checkpoints are the runner's own; set 'save_steps'",
    "save_only_model": "a checkpoint that cannot be resumed is of no use to the runner",
    "hub_token": "secrets do not belong in a recipe; use 'hf auth login'",
    "push_to_hub": "a run is not uploaded; its folder is the result",
}
FINITE = 1e30
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "max_steps": -1,
}


@functools.cache
def training_hints() -> dict[str, Any]:
    """Name -> type of every field of the installed `transformers.TrainingArguments`.

    Read from the source text: importing the class takes seconds, and a typing error should not.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    enums: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for name in ("trainer_utils.py", "training_args.py"):
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
                fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                hints = {line.target.id: _hint(line.annotation, enums) for line in fields}
            elif isinstance(node, ast.ClassDef):
                texts = [line.value for line in node.body if isinstance(line, ast.Assign)]
                enums[node.name] = [text.value for text in texts if isinstance(text, ast.Constant)]
    assert hints, f"{folder}/training_args.py declares no TrainingArguments"
    return hints


def _hint(node: ast.expr, enums: Mapping[str, list[str]]) -> Any:
    """The type that an annotation names; what recipes need not tell apart is Any."""
    simple = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict[str, Any]}
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            return _hint(ast.parse(text, mode="eval").body, enums)
        case ast.Name(id=name) if name in simple:
            return simple[name]
        case ast.Name(id=name) if enums.get(name):
            return Literal[tuple(enums[name])]
        case ast.BinOp(left=left, right=right):
            sides = [_hint(left, enums), _hint(right, enums)]
            if get_origin(sides[0]) is Literal and sides[1] is str:
                return sides[0]  # an enum that may be written as text
            return sides[0] | sides[1]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _hint(inner, enums) | None
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=several)):
            return functools.reduce(operator.or_, (_hint(inner, enums) for inner in several))
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_hint(inner, enums)]
        case ast.Subscript(value=ast.Name(id="dict")):
            return dict[str, Any]
    return Any


def _training(settings: dict[str, Any]) -> dict[str, Any]:
    hints = training_hints()
    known = [name for name in hints if name not in _ELSEWHERE]
    training = {}
    for name, value in settings.items():
        key = f"training.{name}"
        if name in _ELSEWHERE:
            raise RecipeError(key, f"does not belong here: {_ELSEWHERE[name]}")
        if name not in known:
            raise _unknown(key, value, known)
        limit = Between(_LEAST.get(name, -math.inf), FINITE if name in _LEAST else math.inf)
        training[name] = convert(value, Annotated[hints[name], limit], key)
    return training


# --- from a YAML tree to the dataclasses ---------------------------------------------------------


def _recipe(tree: dict[str, Any], stem: str) -> Recipe:
    known = ("seed", "output_dir", "model", "method", "tasks", "retain", "training", "eval")
    for name, value in tree.items():
        if name not in known:
            raise _unknown(name, value, known, _homes())
    for name in ("model", "method", "tasks"):
        if name not in tree:
            raise RecipeError(name, "is missing")
    empty = {name: kind() for name, kind in (("retain", list), ("training", dict), ("eval", dict))}
    # `training:` with nothing below it reads as null and means no settings
    tree = empty | {name: x for name, x in tree.items() if x is not None or name not in empty}
    seed = convert(tree.get("seed", 0), Annotated[int, Between(0, 2**32 - 1)], "seed")
    output_dir = convert(tree.get("output_dir", f"runs/{stem}"), str, "output_dir")
    if not output_dir or Path(output_dir).is_file():
        raise RecipeError("output_dir", f"found {output_dir!r}, expected a folder")
    tasks = convert(tree["tasks"], tuple[TaskBlock, ...], "tasks")
    retain = convert(tree["retain"], tuple[RetainBlock, ...], "retain")
    _tell_apart({"tasks": tasks, "retain": retain})
    training = _training(convert(tree["training"], dict[str, Any], "training"))
    evaluation = convert(tree["eval"], EvalBlock, "eval")
    model = convert(tree["model"], ModelBlock, "model")
    # last, since it imports torch
    name, method, model = _method(tree["method"], model, seed)
    return Recipe(
        seed=seed,
        output_dir=output_dir,
        model=model,
        method=method,
        method_name=name,
        tasks=tasks,
        retain=retain,
        training=training,
        eval=evaluation,
    )


def _method(settings: Any, model: ModelBlock, seed: int) -> tuple[str, "Method", ModelBlock]:
    """The method's name and settings, and the model block with the adapter settings filled in."""
    settings = dict(convert(settings, dict[str, Any], "method"))
    if "name" not in settings:
        raise RecipeError("method.name", "is missing")
    name = convert(settings.pop("name"), str, "method.name")
    for key in ADAPTER:
        if key in settings:
            raise RecipeError(
                f"method.{key}",
                f"does not belong here (found {_shown(settings[key])}): set 'model.{key}'",
            )
    from mllm_cl.method import load_method

    try:
        kind = load_method(name)
    except ValueError as error:
        raise RecipeError("method.name", str(error)) from None
    hints = get_type_hints(kind, include_extras=True)
    fields = {each.name for each in dataclasses.fields(kind) if each.init}
    adapter = {}
    for key in ADAPTER:
        value = dataclasses.asdict(model)[key]
        if value is None:
            continue
        if key not in fields:
            raise RecipeError(
                f"model.{key}",
                f"found {_shown(value)}, but method {name!r} has no {key}; remove it",
            )
        adapter[key] = convert(_plain(value, ""), hints[key], f"model.{key}")
    if "seed" in fields:
        adapter = {"seed": seed, **adapter} if "seed" not in settings else adapter
    method = build(kind, settings, "method", given=adapter)
    filled = {key: vars(method)[key] for key in ADAPTER if key in fields}
    path = str(Path(name).resolve()) if name.endswith(".py") else name
    return path, method, dataclasses.replace(model, **filled)


def build(kind: type, settings: Any, key: str, given: Mapping[str, Any] | None = None) -> Any:
    """An instance of a dataclass from keys and values, all of them known, typed and in range.

    `given` are fields that are set already and may not be set again. Raises RecipeError.
    """
    given = given or {}
    if not isinstance(settings, dict):
        raise RecipeError(key, f"found {_shown(settings)}, expected keys and values")
    hints = get_type_hints(kind, include_extras=True)
    own = [each for each in dataclasses.fields(kind) if each.init and each.name not in given]
    fields = {each.name: each for each in own}
    for name, value in settings.items():
        if name not in fields:
            raise _unknown(f"{key}.{name}", value, fields)
    for name, each in fields.items():
        needed = each.default is each.default_factory is dataclasses.MISSING
        if needed and name not in settings:
            raise RecipeError(f"{key}.{name}", f"is missing; expected {_words(hints[name])}")
    values = {name: convert(each, hints[name], f"{key}.{name}") for name, each in settings.items()}
    try:
        return kind(**values, **given)
    except RecipeError as error:
        raise RecipeError(f"{key}.{error.key}", error.problem) from None
    except ValueError as error:
        raise RecipeError(key, str(error)) from None


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that a field declares, without guessing; raises RecipeError.

    Two traps of YAML 1.1 are undone: `1e-3`, which it reads as text, is a number where a number is
    expected, and a bare `no`, which it reads as false, is "no" where that is one of the choices.
    """
    origin, inner = get_origin(hint), get_args(hint)
    wrong = RecipeError(key, f"found {_shown(value)}, expected {_words(hint)}")
    if hint is Any:
        return _plain(value, key)
    if origin is Annotated:
        result = convert(value, inner[0], key)
        for limit in (each for each in inner[1:] if isinstance(each, Between)):
            if isinstance(result, (int, float)) and not limit.low <= result <= limit.high:
                raise wrong
        return result
    if origin in (Union, types.UnionType):
        return _convert_union(value, inner, key, wrong)
    if hint is type(None):
        raise wrong  # null itself is taken by the union it stands in
    if origin is Literal:
        value = "no" if value is False and "no" in inner else value
        if not any(value == each and type(value) is type(each) for each in inner):
            raise wrong if not isinstance(value, str) else _unlisted(key, value, inner)
        return value
    if origin in (list, tuple):
        fixed = origin is tuple and ... not in inner
        if not isinstance(value, list) or (fixed and len(inner) != len(value)):
            raise wrong
        kinds = inner if fixed else [inner[0]] * len(value)
        pairs = enumerate(zip(value, kinds, strict=True))
        return origin([convert(item, kind, f"{key}.{i}") for i, (item, kind) in pairs])
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {name: convert(item, inner[1], f"{key}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    return _convert_scalar(value, hint, wrong)


def _convert_scalar(value: Any, hint: Any, wrong: RecipeError) -> Any:
    assert hint in (bool, int, float, str), f"{wrong.key}: a recipe cannot hold {hint}"
    exponent = r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+"
    text = isinstance(value, str) and re.fullmatch(exponent, value)
    if hint is float and (text or type(value) is int):
        value = float(value)
    if type(value) is not hint or value != value:  # a bool is no int, and NaN is no number
        raise wrong
    return value


def _convert_union(value: Any, kinds: tuple[Any, ...], key: str, wrong: RecipeError) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:  # so that an error deep inside keeps its own key
        return convert(value, kinds[0], key)
    for kind in kinds:
        try:
            return convert(value, kind, key)
        except RecipeError:
            continue
    raise wrong


def _tell_apart(blocks: dict[str, tuple[RetainBlock, ...]]) -> None:
    if not blocks["tasks"]:
        raise RecipeError("tasks", "found an empty list, expected at least one task")
    first: dict[str, str] = {}
    for place, block in blocks.items():
        for index, data in enumerate(block):
            key = f"{place}.{index}.name"
            if first.setdefault(data.name, key) != key:
                raise RecipeError(key, f"found {data.name!r}, which {first[data.name]} is already")


def _must_exist(key: str, text: str) -> None:
    """Refuse what looks like a path and is not there; anything else is left to the reader."""
    ends = (".json", ".jsonl", ".parquet", ".csv", ".safetensors")
    if not text or text == "toy:":
        raise RecipeError(key, f"found {text!r}, expected toy:NAME, a path or a name on the hub")
    path = text.startswith(("/", "./", "../", "~")) or text.endswith(ends)
    if path and not Path(text).expanduser().exists():
        raise RecipeError(key, f"found {text!r}, no such file or folder (from {Path.cwd()})")


# --- reading -------------------------------------------------------------------------------------


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError("", f"no such recipe{_nearest(path.name, names)}") from None
    except OSError as error:
        raise RecipeError("", f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError("", "is not a text file in UTF-8") from None
    tree = _parse(text, "")
    if not isinstance(tree, dict):
        raise RecipeError("", f"found {_shown(tree)}, expected keys (model, method, tasks ...)")
    return tree


def _parse(text: str, key: str) -> Any:
    """YAML without its surprises: no alias, no key twice, no key that is not text."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                problem = f"found the alias *{event.anchor}, expected values written out"
                raise RecipeError(key, problem)
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), key)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(key, f"is not YAML: {error.problem or error.context}{where}") from None
    except RecursionError:
        raise RecipeError(key, "is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(key, f"is not YAML: {error}") from None


def _check_keys(node: yaml.Node | None, key: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(item, _dotted(key, index))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, item in node.value:
            here, line = _dotted(key, name.value), name.start_mark.line + 1
            if name.tag != "tag:yaml.org,2002:str":
                problem = f"found the key {name.value!r} in line {line}, expected text in quotes"
                raise RecipeError(key, problem)
            if name.value in seen:
                raise RecipeError(here, f"is set twice, the second time in line {line}")
            seen.add(name.value)
            _check_keys(item, here)


def _split_overrides(words: Sequence[str]) -> dict[str, str]:
    """Dotted key -> text of `--key value` and `--key=value`."""
    texts: dict[str, str] = {}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            problem = f"found {word!r} on the command line, expected an override such as --seed 1"
            raise RecipeError("", problem)
        if not equals and (not pending or pending[0].startswith("--")):
            raise RecipeError(key, f"has no value on the command line; write --{key} VALUE")
        if key in texts:
            raise RecipeError(key, "is given twice on the command line")
        texts[key] = text if equals else pending.pop(0)
    return texts


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.0.b` in nested dicts and lists."""
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        here = ".".join(key.split(".")[:depth])
        if isinstance(node, list):
            if not (part.isdecimal() and int(part) < len(node)):
                problem = f"found {part!r} after {here}, expected 0 to {len(node) - 1}"
                raise RecipeError(key, problem)
            part = int(part)
        elif not isinstance(node, dict) or not part:
            raise RecipeError(key, f"names no setting: {here or 'the recipe'} is {_shown(node)}")
        if depth == len(parents):
            node[part] = value
        elif isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]


def _refuse_remote_code(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    model = tree.get("model")
    asked = isinstance(model, dict) and model.get("trust_remote_code")
    if asked and "model.trust_remote_code" not in given:
        # recipes are passed on; to run a model's own code is the decision of who types the command
        problem = "found true, but a file may not ask for it; type --model.trust_remote_code true"
        raise RecipeError("model.trust_remote_code", problem)


# --- words ---------------------------------------------------------------------------------------


def _plain(value: Any, key: str) -> Any:
    """The same as dicts, lists and scalars only, or RecipeError."""
    if isinstance(value, dict):
        return {name: _plain(item, _dotted(key, name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, _dotted(key, index)) for index, item in enumerate(value)]
    if not (value is None or isinstance(value, (bool, int, float, str))) or value != value:
        raise RecipeError(key, f"found {_shown(value)}, expected text, numbers, lists or keys")
    return value


def _dotted(key: str, name: object) -> str:
    return f"{key}.{name}" if key else f"{name}"


def _shown(value: Any) -> str:
    """The value as the reader would recognise it, with its kind where YAML may have surprised."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a bare yes, no, on or off counts; quote it to mean the word)"
    if isinstance(value, (dict, list)):
        text = json.dumps(value, default=str)
    else:
        text = repr(value) if isinstance(value, (str, int, float)) else str(value)
    kind = {str: "text", dict: "keys and values", list: "a list"}
    kind |= {int: "a whole number", float: "a number"}
    short = text[:57] + "..." if len(text) > 60 else text
    return f"{short} ({kind.get(type(value), type(value).__name__)})"


def _words(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    simple |= {type(None): "null", Any: "anything"}
    if origin is Annotated:
        limits = [each for each in inner[1:] if isinstance(each, Between)]
        lower = [f" of at least {limit.low:g}" for limit in limits if limit.low > -FINITE]
        upper = [f" and at most {limit.high:g}" for limit in limits if limit.high < FINITE]
        return _words(inner[0]) + "".join(lower + upper)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (list, tuple):
        return f"a list of {_words(inner[0])}" if inner else "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys and values"
    return simple.get(hint, str(hint))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if 0 < len(known) <= 20 else ""


def _unlisted(key: str, value: str, choices: tuple[Any, ...]) -> RecipeError:
    near = _nearest(value, map(str, choices))
    return RecipeError(key, f"found {value!r}, expected {_words(Literal[choices])}{near}")


def _unknown(
    key: str, value: Any, known: Iterable[str], homes: Mapping[str, str] | None = None
) -> RecipeError:
    name = key.rpartition(".")[2]
    hint = f"; it belongs in {homes[name]!r}" if homes and name in homes else _nearest(name, known)
    return RecipeError(key, f"unknown key (found {_shown(value)}){hint}")


def _homes() -> dict[str, str]:
    """Where a key that was put at the top level belongs."""
    training = {name: f"training.{name}" for name in training_hints() if name not in _ELSEWHERE}
    blocks = {"model": ModelBlock, "eval": EvalBlock}
    for key, kind in blocks.items():
        training |= {each.name: f"{key}.{each.name}" for each in dataclasses.fields(kind)}
    return training
