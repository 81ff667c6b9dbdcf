"""The linear layers of a Hugging Face model, chosen by name as PEFT's `target_modules` are.

No model family is named here: transformers says which part is the decoder, and which the image
encoder.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from mllm_cl.model.anatomy import recorded_routers
from mllm_cl.model.walk import bare, walk

Scope = Literal["language", "vision", "all"]


def linears(
    model: nn.Module, patterns: str | Sequence[str], *, scope: Scope | None = None
) -> dict[str, nn.Linear]:
    """The linear layers that `patterns` name, as in PEFT's `target_modules`: name -> module.

    A list holds names or dotted ends of names (`["q_proj", "mlp.down_proj"]`). A string is one
    regular expression for the whole name, or "all-linear": every linear layer but routers and the
    output head. Names are matched as they were before PEFT; adapters never match.

    `scope` is "language" (decoder and output head), "vision" (the image encoder) or "all" (these,
    projectors and the rest). Unless given it is "language", since LoRA on `q_proj` should not reach
    the vision tower unasked, except for a regular expression, which says itself where.

    Raises ValueError for a pattern that matches nothing, with the names nearest to it.
    """
    if not patterns:
        raise ValueError(
            "no pattern given: name linear layers, such as ['q_proj', 'v_proj'], or 'all-linear'"
        )
    if scope not in (None, *get_args(Scope)):
        raise ValueError(f"scope is one of {', '.join(get_args(Scope))}, not {scope!r}")
    is_regex = isinstance(patterns, str) and patterns != "all-linear"
    within = scope or ("all" if is_regex else "language")
    live = {name: module for name, module, _ in walk(model)}
    everywhere = {name: module for name, module in live.items() if isinstance(module, nn.Linear)}
    inside = _within(model, everywhere, within)
    if patterns == "all-linear":
        left_out = {id(module) for module in (*recorded_routers(model).values(), *heads(model))}
        return {name: module for name, module in inside.items() if id(module) not in left_out}
    wanted = set()
    for pattern in [patterns] if is_regex else patterns:
        matched = _matches(pattern, inside, is_regex)
        if not matched:
            raise ValueError(_unmatched(pattern, is_regex, within, inside, everywhere, live))
        wanted |= matched
    return {name: module for name, module in inside.items() if name in wanted}


def vision_names(model: nn.Module) -> set[str]:
    """The qualified names of the image encoder and all in it; empty where there is none."""
    wholes = (module for _, module, _ in walk(model) if isinstance(module, PreTrainedModel))
    inside = _vision(next(wholes, None))
    return {name for name, module in model.named_modules() if id(module) in inside}


def _matches(pattern: str, modules: Iterable[str], is_regex: bool) -> set[str]:
    if not is_regex:
        return {name for name in modules if f".{bare(name)}".endswith(f".{pattern}")}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return {name for name in modules if compiled.fullmatch(bare(name))}


def _unmatched(
    pattern: str,
    is_regex: bool,
    scope: Scope,
    inside: Mapping[str, nn.Linear],
    everywhere: Mapping[str, nn.Linear],
    live: Mapping[str, nn.Module],
) -> str:
    """The message for a pattern that matches no linear layer in its scope."""
    message = f"{pattern!r} matches no linear layer of scope {scope!r}."
    elsewhere = sorted(_matches(pattern, everywhere, is_regex))
    if elsewhere:
        count, first = len(elsewhere), elsewhere[0]
        return f"{message} It matches {count} outside, such as {first}: pass scope='all' for them."
    others = {type(live[name]).__name__ for name in _matches(pattern, live, is_regex)}
    if others:
        return f"{message} What it names is no nn.Linear but {', '.join(sorted(others))}."
    # As long an end of the names as the pattern itself is.
    depth = 0 if is_regex else pattern.count(".") + 1
    ends = {".".join(re.sub(r"\b\d+\b", "*", bare(name)).split(".")[-depth:]) for name in inside}
    nearest = difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.0)
    hint = (
        " A string is a regular expression for the whole name; put names into a list."
        if is_regex
        else ""
    )
    return f"{message} Nearest: {', '.join(nearest)}.{hint}"


def heads(model: nn.Module) -> list[nn.Module]:
    """The output heads (`lm_head`) of a model and its submodels."""
    found = [m.get_output_embeddings() for _, m, _ in walk(model) if isinstance(m, PreTrainedModel)]
    return [head for head in found if head is not None]


def _within(
    model: nn.Module, modules: Mapping[str, nn.Linear], scope: Scope
) -> dict[str, nn.Linear]:
    if scope == "all":
        return dict(modules)
    whole = next(
        (module for _, module, _ in walk(model) if isinstance(module, PreTrainedModel)), None
    )
    vision = _vision(whole)
    if scope == "vision":
        if not vision:
            raise ValueError(
                f"{type(whole).__name__} has no image encoder, so nothing has scope 'vision'"
            )
        return {name: module for name, module in modules.items() if id(module) in vision}
    language = (
        _ids([whole.get_decoder(), *heads(model)]) - vision if whole is not None else _ids([model])
    )
    return {name: module for name, module in modules.items() if id(module) in language}


def _vision(whole: PreTrainedModel | None) -> set[int]:
    if whole is None:
        return set()
    encoder = whole.get_encoder(modality="image")
    # Where there is no such encoder, transformers answers None, the model itself or its body.
    if encoder is None or whole.get_decoder() in encoder.modules():
        return set()
    return _ids([encoder])


def _ids(roots: Iterable[nn.Module]) -> set[int]:
    return {id(module) for root in roots for module in root.modules()}
