"""The block `method`: the fields of the method's own dataclass, and adapter settings from `model`.

A command line may name another method than the file: what the file says of its own method alone is
then left out, and a note says so.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from mllm_cl.recipe.blocks import ADAPTER, ModelBlock, TaskBlock
from mllm_cl.recipe.convert import build, convert, plain, refuse_unknown, settable
from mllm_cl.recipe.errors import RecipeError, shown

if TYPE_CHECKING:
    from mllm_cl.method import Method


def written_method(tree: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's own `method` block, less what the command line sets, if that names a method too.

    Else empty: then whatever the block holds has to suit the method.
    """
    block = tree.get("method")
    if "method.name" not in given or "method" in given or not isinstance(block, dict):
        return {}
    set_anew = {key.split(".")[1] for key in given if key.startswith("method.")} - {"name"}
    named = isinstance(block.get("name"), str)
    return {key: block[key] for key in block if key not in set_anew} if named else {}


def method_block(
    settings: Any, model: ModelBlock, seed: int, written: Mapping[str, Any], setting: str
) -> tuple[str, "Method", ModelBlock, tuple[str, ...]]:
    """The name of the method, the method, `model` with its adapter settings filled in, and notes.

    `written` is the block of `written_method`.
    """
    settings = dict(convert(settings, dict[str, Any], "method"))
    if "name" not in settings:
        raise RecipeError("method.name", "is missing")
    name = convert(settings.pop("name"), str, "method.name")
    for key in ADAPTER:
        if key in settings:
            raise RecipeError(
                f"method.{key}",
                f"does not belong here (found {shown(settings[key])}): set 'model.{key}'",
            )
    kind = _kind(name, setting)
    left_out = _left_out(written, name, kind)
    settings = {key: value for key, value in settings.items() if key not in left_out}
    adapter = _adapter(model, name, kind)
    if "seed" in settable(kind) and "seed" not in settings:
        adapter = {"seed": seed, **adapter}
    method = build(kind, settings, "method", given=adapter)
    if model.load_in_4bit and method.trains_base:
        raise RecipeError(
            "model.load_in_4bit",
            f"found true, but {name} with these settings trains weights of the base themselves, "
            "which are frozen in four bits: set 'model.use_peft: true' for linears, and "
            "'method.experts: lora' for experts, or take another method",
        )
    filled = {key: vars(method)[key] for key in ADAPTER if key in settable(kind)}
    path = str(Path(name).resolve()) if name.endswith(".py") else name
    note = f"method {name} does not take {', '.join(left_out)}: left out"
    return path, method, dataclasses.replace(model, **filled), (note,) if left_out else ()


def check_superseded(tasks: Sequence[TaskBlock], name: str, method: "Method") -> None:
    """RecipeError for a task that supersedes another which the method goes on protecting."""
    for index, task in enumerate(tasks):
        if task.supersedes is not None and not method.unlearns:
            raise RecipeError(
                f"tasks.{index}.supersedes",
                f"found {task.supersedes!r}, but {name} would go on protecting its answers: take "
                "same, replay or a method that protects nothing, or leave supersedes out",
            )


def check_decay(method: "Method", training: Mapping[str, Any]) -> None:
    """RecipeError where an optimizer's old weight decay is asked for and there is none."""
    optim, decay = training.get("optim", "adamw_torch"), training.get("weight_decay", 0.0)
    if method.legacy_decay and (optim != "sgd" or not decay):
        raise RecipeError(
            "method.emulate_legacy_decay",
            f"found true with optim {optim} and weight_decay {decay:g}, but it is SGD whose weight "
            "decay shrank what was frozen: set 'training.optim: sgd' and a 'training.weight_decay' "
            "above 0, as the released code has them, or leave it out",
        )


def _kind(name: str, setting: str) -> type["Method"]:
    """The method's class. RecipeError where a method for classes is given tasks, or vice versa."""
    from mllm_cl.method import SETTINGS, load_method

    try:
        kind = load_method(name, setting)
    except ValueError as error:
        raise RecipeError("method.name", str(error)) from None
    if kind.setting != setting:  # a file of one's own
        wanted, given = SETTINGS[kind.setting], SETTINGS[setting]
        problem = f"found {name!r}, which learns {wanted!r}, but the recipe has {given!r}"
        raise RecipeError("method.name", problem)
    return kind


def _adapter(model: ModelBlock, name: str, kind: type["Method"]) -> dict[str, Any]:
    """The adapter settings that stand under `model`, as the types that the method declares."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for key in ADAPTER:
        value = dataclasses.asdict(model)[key]
        if value is None:
            continue
        if key not in settable(kind):
            raise RecipeError(
                f"model.{key}",
                f"found {shown(value)}, but method {name!r} has no {key}; remove it",
            )
        found[key] = convert(plain(value, ""), hints[key], f"model.{key}")
    return found


def _left_out(written: Mapping[str, Any], name: str, kind: type["Method"]) -> list[str]:
    """What the file says of its own method that the method called `name` does not take.

    It has to be right all the same, or a typing error would hide as long as methods are swept over.
    """
    if not written or written["name"] == name:
        return []
    block = {key: value for key, value in written.items() if key != "name"}
    try:
        own = _kind(written["name"], kind.setting)
    except RecipeError as error:
        problem = f"{error.problem}; so the file says, and its settings cannot be told apart"
        raise RecipeError("method.name", problem) from None
    refuse_unknown(block, settable(own), "method")
    hints = get_type_hints(own, include_extras=True)
    for key, value in block.items():
        convert(value, hints[key], f"method.{key}")
    return [key for key in block if key not in settable(kind)]
