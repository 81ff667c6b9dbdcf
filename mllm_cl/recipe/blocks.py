"""The blocks of a recipe whose keys are our own; each field is a key, and its default is the key's.

Relative paths count from the working directory.
"""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from mllm_cl.metrics.answers import metric
from mllm_cl.recipe.errors import RecipeError, closest, nearest, shown
from mllm_cl.recipe.hints import Between, Count

# adapter settings stand under `model`, as in TRL, and are read by the method that has such a field
ADAPTER = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass(frozen=True, kw_only=True)
class ModelBlock:
    """The model, in the names of TRL's `ModelConfig`; adapter settings default to the method's."""

    model_name_or_path: str
    model_revision: str | None = None
    adapter_name_or_path: str | None = None  # a PEFT adapter that joins the weights as they load
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool | None = None  # linears and experts, by bitsandbytes
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None  # nf4
    use_bnb_nested_quant: bool | None = None  # the scales in 8 bits, too
    unquantised: tuple[str, ...] | None = None  # names, or ends of names, of modules left whole
    use_peft: bool | None = None
    lora_r: Count | None = None
    lora_alpha: Annotated[int | float, Between(0)] | None = None
    lora_dropout: Annotated[float, Between(0, 1)] | None = None
    lora_target_modules: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        _must_exist("model_name_or_path", self.model_name_or_path)
        if self.adapter_name_or_path is not None:
            _must_exist("adapter_name_or_path", self.adapter_name_or_path)
        _fits_four_bits(self)


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
    """Data to learn, one task after another; sizes that are left out mean all there is.

    `supersedes` names an earlier task whose questions are asked again and whose answers are wrong
    from here on: a rule, a preference or a fact that has changed. Nothing protects those answers.
    """

    train_size: Count | None = None
    supersedes: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClassesBlock:
    """Labelled images whose classes come in stages: in the field's words B`first` Inc`increment`.

    The first `number` classes, in the order of their names, are put into the order of `order` (a
    seed of NumPy's legacy generator; null: as they are named). The first stage brings `first` of
    them (0: as many as the others), each later one `increment`, the last what is left. `templates`
    are the prompts that a text tower reads class names in: a key of data/templates.yaml, or a list
    of texts with {} for the name. The first trains, all of them together test. `texts` is a YAML or
    JSON file of what they call each class, as in `n01443537: goldfish`; without it a class is
    called by its name, with spaces for underscores and without a number before it. `descriptions`
    say what classes look like, in a JSON file (model/descriptions.py) or toy:NAME; ENGINE reads it.
    `captions` are pictures with captions, read as `retrieval.data` is and of one file all: the mean
    cosine of those in the split "train" with their own is told after every stage.
    """

    data: str
    number: Count
    increment: Count
    first: Annotated[int, Between(0)] = 0
    order: Annotated[int, Between(0, 2**32 - 1)] | None = 1993
    preprocessing: Literal["paper_compat", "clip", "siglip", "processor"] = "processor"
    templates: tuple[str, ...] | str = "plain"
    texts: str | None = None
    descriptions: str | None = None
    captions: str | None = None
    train_size: Count | None = None  # images of each class, None: all
    eval_size: Count | None = None
    stages: Count | None = None  # only so many of them, None: all
    args: dict[str, Any] = field(default_factory=dict)  # handed to the reader of `data`

    def __post_init__(self) -> None:
        for key in ("data", "texts", "descriptions", "captions"):
            if vars(self)[key] is not None:
                _must_exist(key, vars(self)[key])
        for key in ("data", "split", "size", "seed", "number"):
            if key in self.args:
                raise RecipeError(f"args.{key}", "does not belong here: it is a key of 'classes'")
        try:
            self.prompts()
        except ValueError as error:
            raise RecipeError("templates", str(error)) from None
        try:
            sizes = self.sizes()
        except ValueError as error:
            raise RecipeError("first" if self.first else "increment", str(error)) from None
        if self.stages is not None and self.stages > len(sizes):
            problem = f"found {self.stages}, but there are {len(sizes)}"
            raise RecipeError("stages", problem)

    def prompts(self) -> tuple[str, ...]:
        """The texts of `templates`. ValueError for an unknown key, and for a text without {}."""
        from mllm_cl.data.benchmarks import templates  # whose package imports torch

        found = templates(self.templates) if isinstance(self.templates, str) else self.templates
        rests = {text: text.replace("{}", "", 1) for text in found}
        wrong = [text for text, rest in rests.items() if rest == text or set("{}") & set(rest)]
        if wrong or not found:
            what = f"found {wrong[0]!r}" if wrong else "found no text"
            raise ValueError(f"{what}, expected texts with one {{}} each, for a class's name")
        return found

    def sizes(self) -> list[int]:
        """How many classes each stage brings, of all stages."""
        from mllm_cl.data.classes import stage_sizes  # which imports torch

        return stage_sizes(self.number, self.first, self.increment)

    def up_to(self, stages: int) -> dict[str, Any]:
        """What of the keys the first stages depend on: of a list of classes that come in its order
        nothing behind them, so that it may grow.
        """
        listed = self.args.get("classes") if self.order is None else None
        if not isinstance(listed, list) or len(listed) < self.number:
            return {"stages": stages}
        number = sum(self.sizes()[: max(stages, 1)])
        return {
            "stages": stages,
            "number": number,
            "args": {**self.args, "classes": listed[:number]},
        }

    def tasks(self) -> tuple[TaskBlock, ...]:
        """A task per stage, named by the places of its classes in the order: `1-50`, `51-60` …"""
        from mllm_cl.data.classes import stage_names  # which imports torch

        names = stage_names(self.sizes())[: self.stages]
        return tuple(TaskBlock(name=name, data=self.data) for name in names)


@dataclass(frozen=True, kw_only=True)
class RetrievalBlock:
    """Images with captions in a task for each of `words`, to be found by one another.

    An image belongs to the first of the words that any of its captions says in any form, with
    `assign: majority` to the one that most of them say; who says none is left out. Forms are made
    by rules, unless `forms` lists those of a word.
    """

    data: str
    words: tuple[str, ...] = ("walk", "stand", "run", "ride", "play")  # arXiv:2305.19270
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    assign: Literal["first", "majority"] = "first"
    preprocessing: Literal["paper_compat", "clip", "siglip", "processor"] = "processor"
    train_size: Count | None = None  # images of each task, None: all
    eval_size: Count | None = None
    stages: Count | None = None  # only so many tasks, None: all
    args: dict[str, Any] = field(default_factory=dict)  # handed to the reader of `data`

    def __post_init__(self) -> None:
        _must_exist("data", self.data)
        for index, word in enumerate(self.words):
            if not re.fullmatch(r"[^\W\d_]+", word) or word != word.lower():
                problem = f"found {word!r}, expected one word in lower case"
                raise RecipeError(f"words.{index}", problem)
        if not self.words or len(set(self.words)) < len(self.words):
            problem = f"found {shown(list(self.words))}, expected different words, one at least"
            raise RecipeError("words", problem)
        for word, listed in self.forms.items():
            if word not in self.words:
                raise RecipeError(
                    f"forms.{word}", f"is none of the words{nearest(word, self.words)}"
                )
            if not listed:
                raise RecipeError(
                    f"forms.{word}", "found an empty list, expected forms of the word"
                )
        if self.stages is not None and self.stages > len(self.words):
            problem = f"found {self.stages}, but there are {len(self.words)} words"
            raise RecipeError("stages", problem)

    def tasks(self) -> tuple[TaskBlock, ...]:
        """A task per word."""
        return tuple(TaskBlock(name=word, data=self.data) for word in self.words[: self.stages])


@dataclass(frozen=True, kw_only=True)
class DataBlock:
    """What happens to rows that cannot be used, and to samples of more than `max_length` tokens.

    `skip` puts the next good row in the place of a bad one, up to `error_budget` of a set's rows
    (one at least), and leaves it out where a set is scored. Nothing is ever cut.
    """

    on_error: Literal["error", "skip"] = "error"
    error_budget: Annotated[float, Between(0, 1)] = 0.001
    max_length: Count | None = None
    too_long: Literal["error", "drop"] = "error"


@dataclass(frozen=True, kw_only=True)
class EvalBlock:
    """How answers are generated when the tasks are scored."""

    batch_size: Count = 64
    max_new_tokens: Count = 8
    backend: Literal["hf", "vllm"] = "hf"

    def __post_init__(self) -> None:
        if self.backend == "vllm":
            absent = "" if find_spec("vllm") else " (it is not installed either)"
            raise RecipeError(
                "backend",
                f"found 'vllm', which cannot score a run{absent}: it serves checkpoints, not a "
                "live model with guards and adapters, and gives no loss on the right answers. "
                "Leave it out, or set 'hf'.",
            )


def _fits_four_bits(model: ModelBlock) -> None:
    """Refuse what needs four bits without them, and four bits that cannot be had."""
    for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "unquantised"):
        value = vars(model)[key]
        if value is not None and not model.load_in_4bit:
            raise RecipeError(key, f"found {shown(value)} without 'load_in_4bit: true'; remove it")
    if not model.load_in_4bit:
        return
    if find_spec("bitsandbytes") is None:
        problem = "found true, which needs bitsandbytes: pip install 'mllm_cl[quantization]'"
        raise RecipeError("load_in_4bit", problem)
    if model.adapter_name_or_path is not None:
        raise RecipeError(
            "adapter_name_or_path",
            f"found {model.adapter_name_or_path!r} with 'load_in_4bit: true', but an adapter that "
            "joins packed weights is rounded away: merge it into the base first",
        )


def tell_apart(blocks: dict[str, tuple[RetainBlock, ...]]) -> None:
    """RecipeError if there is no task, or two blocks of data have one name."""
    if not blocks["tasks"]:
        raise RecipeError("tasks", "found an empty list, expected at least one task")
    first: dict[str, str] = {}
    for place, block in blocks.items():
        for index, data in enumerate(block):
            key = f"{place}.{index}.name"
            if first.setdefault(data.name, key) != key:
                raise RecipeError(key, f"found {data.name!r}, which {first[data.name]} is already")
    for index, task in enumerate(blocks["tasks"]):
        earlier = [one.name for one in blocks["tasks"][:index]]
        if task.supersedes is not None and task.supersedes not in earlier:
            known = f"expected an earlier task: {', '.join(earlier)}" if earlier else "it is first"
            raise RecipeError(f"tasks.{index}.supersedes", f"found {task.supersedes!r}, {known}")


def _must_exist(key: str, text: str) -> None:
    """Refuse what looks like a path and is not there; anything else is left to the reader."""
    ends = (".json", ".jsonl", ".parquet", ".csv", ".safetensors", ".yaml", ".yml")
    if not text or text == "toy:":
        raise RecipeError(key, f"found {text!r}, expected toy:NAME, a path or a name on the hub")
    path = text.startswith(("/", "./", "../", "~")) or text.endswith(ends)
    # A name on the hub has a slash, too; where its first part is a folder here, a path was meant.
    path = path or ("/" in text and ":" not in text and Path(text.partition("/")[0]).is_dir())
    path = path and "${" not in text
    if path and not Path(text).expanduser().exists():
        path = Path(text).expanduser()
        beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = closest(path.name, beside)
        hint = f"; did you mean '{path.parent / near}'?" if near is not None else ""
        problem = f"found {text!r}, no such file or folder (from {Path.cwd()})"
        raise RecipeError(key, problem + hint)
