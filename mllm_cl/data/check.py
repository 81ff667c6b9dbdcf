"""`mllm-cl data check RECIPE`: what a run would be given, looked at before a weight is loaded."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO

from rich.console import Console
from rich.text import Text

from mllm_cl.data import read
from mllm_cl.data.chat import IGNORE, ChatCollator, too_long
from mllm_cl.data.errors import DataError, shortened
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.policy import Policy
from mllm_cl.data.source.formats import Format
from mllm_cl.data.source.samples import Samples
from mllm_cl.data.source.split import one_sided
from mllm_cl.data.survey import Survey, overlap, survey
from mllm_cl.metrics.answers import metric
from mllm_cl.task import Sample

FEW = 50  # test rows below which a single answer decides a score: ours
LISTED = 50  # bad rows of a split that are printed
REPEATED = 4  # as many of the same token are shown as one and their number


@dataclass(frozen=True)
class Looked:
    """A data set of a recipe, read: its splits by name, and what was found in them."""

    name: str
    metric: str
    samples: Mapping[str, Sequence[Sample]]
    found: Mapping[str, Survey]


def check(recipe, processor, file: TextIO | None = None) -> int:
    """Print what is in the data of a recipe; 0 if a run would start on them, else 2.

    `processor` is the model's: lengths and what is trained on are what it makes of the samples.
    """
    console = Console(file=file, highlight=False, soft_wrap=True)
    lengths, looked, problems = Lengths(processor), [], []
    for block in (*recipe.retain, *recipe.tasks):
        console.print(f"\n{block.name}  ({block.data})", style="bold", markup=False)
        try:
            looked.append(_look(block, recipe, lengths))
        except DataError as error:
            problems.append(f"{block.name}: {error}")
            console.print(f"  {error}", style="red", markup=False)
            continue
        for words in _about(looked[-1], recipe, processor, plain=not console.is_terminal):
            console.print(words if isinstance(words, Text) else Text(words))
        problems += [f"{block.name}: {each}" for each in _in_the_way(looked[-1], recipe.data)]
    console.print("\nbetween tasks", style="bold")
    for words in _between(looked):
        console.print(Text(words))
    return verdict(console, problems)


def verdict(console: Console, problems: Sequence[str]) -> int:
    """Print whether a run would start, and what is in its way; 0 if it would, else 2."""
    told = "A run would start on these data." if not problems else "A run would stop at these:"
    console.print(Text(f"\n{told}", style="bold"))
    for problem in problems:
        console.print(Text(f"  {problem}", style="red"))
    return 2 if problems else 0


def _look(block, recipe, lengths: Lengths) -> Looked:
    sizes = {"train": vars(block).get("train_size"), "test": block.eval_size}
    seeds = {"train": recipe.seed, "test": 0}  # as the runner draws them
    samples = {
        split: read(block.data, split, size, seeds[split], **block.args)
        for split, size in sizes.items()
    }
    found = {split: survey(each, lengths) for split, each in samples.items()}
    return Looked(block.name, block.metric, samples, found)


# --- what is said of one data set ----------------------------------------------------------------


def _about(one: Looked, recipe, processor, *, plain: bool) -> Iterator[str | Text]:
    train = one.samples["train"]
    yield f"  format   {_format(train.format) if isinstance(train, Samples) else 'drawn'}"
    for split, found in one.found.items():
        yield f"  {split:8} {_counts(found)}"
        yield f"  {'':8} {_lengths(found)}"
    yield f"  answers  {_answers(one, recipe.eval.max_new_tokens)}"
    yield f"  overlap  {_overlap(one)}"
    for split, found in one.found.items():
        yield from _bad(split, found)
        long = _too_long(one, split, recipe.data)
        if long:
            dropped = "left out" if recipe.data.too_long == "drop" else "too long"
            yield Text(f"  {split}: {len(long)} {dropped}, the first: {long[0]}", style="yellow")
        words = one_sided(one.samples[split]) if isinstance(one.samples[split], Samples) else ""
        if words:
            yield Text(f"  {split}: {words}", style="yellow")
        if found.repeated_ids():
            yield f"  {split}: the id {found.repeated_ids()[0]!r} is that of several rows"
    good = one.found["train"].good
    for place in dict.fromkeys([*good[:1], *good[-1:]]):
        yield from rendered(train[place], processor, plain=plain)


def _format(form: Format) -> str:
    if form.chat is not None:
        said = f"{form.name}: turns from {form.chat!r}"
    else:
        asked = repr(form.prompt) if form.prompt else f"question from {form.question!r}"
        said = f"{form.name}: {asked}, answer from {form.answer!r}"
        said += f", below the question {form.context!r}" if form.context else ""
    pictures = " or ".join(map(repr, form.pictures()))
    said += f", pictures from {pictures}" if pictures else ""
    unused = ", ".join(form.unused())
    return f"{said}; not used: {unused}" if unused else said


def _counts(found: Survey) -> str:
    pictures = [len(shown) for shown in found.shown]
    several = sum(number > 1 for number in pictures)
    words = [
        f"{found.number} rows",
        f"{sum(map(bool, pictures))} with pictures",
        *([f"{several} with several"] if several else []),
        f"{pictures.count(0)} of text alone",
        f"{len(found.bad)} bad",
    ]
    return ", ".join(words)


def _lengths(found: Survey) -> str:
    if not found.lengths:
        return "no row to count tokens of"
    ordered = sorted(found.lengths)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    middle = int(statistics.median(ordered))
    return f"tokens: {ordered[0]} to {ordered[-1]}, median {middle}, 95 % up to {high}"


def _answers(one: Looked, max_new_tokens: int) -> str:
    test = one.found["test"]
    if not test.answers:
        return "none"
    top = test.common_answers(5)
    told = ", ".join(f"{shortened(text, 40)} {share:.0%}" for text, share in top)
    score = metric(one.metric)([top[0][0]] * len(test.answers), test.references)
    said = f"{len(set(test.answers))} different in test: {told}; the first for all: {score:.3f}"
    said += f" by {one.metric}"
    cut = sum(length + 1 > max_new_tokens for length in test.answer_lengths)
    if cut:
        longest = max(test.answer_lengths) + 1
        said += f". {cut} need up to {longest} tokens, eval.max_new_tokens is {max_new_tokens}"
    if len(test.answers) < FEW:
        said += f". One of {len(test.answers)} rows is {1 / len(test.answers):.0%} of the score"
    return said


def _overlap(one: Looked) -> str:
    test, shared = one.found["test"], overlap(one.found["test"], one.found["train"])
    total = len(test.good)
    return (
        f"{shared.pictures} of {total} test rows show a picture of train, "
        f"{shared.questions} are in train with their question"
    )


def _bad(split: str, found: Survey) -> Iterator[Text]:
    for error in found.bad[:LISTED]:
        yield Text(f"  {split}: {error}", style="red")
    if len(found.bad) > LISTED:
        yield Text(f"  {split}: and {len(found.bad) - LISTED} more bad rows", style="red")


def rendered(sample: Sample, processor, *, plain: bool) -> Iterator[Text]:
    """A sample as the model is trained on it, what is learnt bold, or in [[ ]] if `plain`."""
    batch = ChatCollator(processor)([sample])
    learnt = (batch["labels"][0] != IGNORE).tolist()
    tokens = list(zip(batch["input_ids"][0].tolist(), learnt, strict=True))
    tokenizer = ChatCollator(processor).tokenizer
    learnt_is = "between [[ and ]]" if plain else "bold"
    yield Text(f"  sample {sample['id']}, learnt is what is {learnt_is}:")
    line = Text("    ")
    for trained, run in groupby(tokens, key=lambda pair: pair[1]):
        text = _decoded([token for token, _ in run], tokenizer)
        # data may hold what a terminal would obey
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
        text = text.replace("\n", "\n    ")
        marked = f"[[{text}]]" if trained and plain else text
        line.append(marked, style="bold green" if trained else "dim")
    yield line


def _decoded(tokens: Sequence[int], tokenizer) -> str:
    """The text of tokens, a long run of the same one (a picture's) as one and how many."""
    words, pending = [], []
    for token, run in groupby(tokens):
        number = len(list(run))
        if number < REPEATED:
            pending += [token] * number
            continue
        words += [tokenizer.decode(pending), f"{tokenizer.decode([token])}×{number}"]
        pending = []
    return "".join([*words, tokenizer.decode(pending)])


# --- between data sets, and what a run would stop at ---------------------------------------------


def _between(looked: Sequence[Looked]) -> Iterator[str]:
    """What one task's test rows have in common with what another one trains on."""
    none = True
    for one in looked:
        for other in looked:
            shared = overlap(one.found["test"], other.found["train"])
            if one is not other and (shared.pictures or shared.questions):
                none = False
                rows = f"of {len(one.found['test'].good)} test rows of {one.name}"
                yield (
                    f"  {shared.pictures} {rows} show a picture that {other.name} trains on, "
                    f"{shared.questions} are in it with their question"
                )
    if none:
        yield "  no test row of one task is in the training set of another"


def _too_long(one: Looked, split: str, policy: Policy) -> list[DataError]:
    if policy.max_length is None:
        return []
    found, samples = one.found[split], one.samples[split]
    return [
        too_long(samples[place], length, policy.max_length)
        for place, length in zip(found.good, found.lengths, strict=True)
        if length > policy.max_length
    ]


def _in_the_way(one: Looked, policy: Policy) -> Iterator[str]:
    """Why a run would not start, or not end."""
    for split, found in one.found.items():
        allowed = max(1, int(policy.error_budget * found.number))
        if found.bad and policy.on_error == "error":
            yield f"{len(found.bad)} bad rows in {split}; mend them, or set 'data.on_error: skip'"
        elif len(found.bad) > allowed:
            yield f"{len(found.bad)} bad rows in {split}, data.error_budget allows {allowed}"
        elif not found.good:
            yield f"no row of {split} can be used"
        long = _too_long(one, split, policy)
        if long and policy.too_long == "error":
            yield f"{len(long)} samples of {split} are longer than data.max_length"
