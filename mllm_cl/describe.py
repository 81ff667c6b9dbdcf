"""`mllm-cl describe RECIPE`: a language model says what the classes of a recipe look like.

One question for each class, and one for each two of them. Every answer is written down as it comes,
so that the same command goes on where it was stopped, and asks for no more than what is missing.
"""

import json
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path

from tqdm import tqdm

from mllm_cl.answering import Unusable, listed, sides
from mllm_cl.model.descriptions import Descriptions, read_descriptions
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.recipe.descriptions import KEY, TOY
from mllm_cl.recipe.read import read_file
from mllm_cl.recipe.texts import read_texts
from mllm_cl.stopping import Failed

Ask = Callable[[str, int], str]  # a question and how often it was asked before, to an answer
TIMES = 3  # that a question is asked whose answers cannot be read: ours
# The first sentences are those of the paper and of the released code (arXiv:2503.08510).
OF_ONE = """What are unique visual features of {0} in a photo? Answer with a list of four to eight \
short phrases, each on a line of its own after a hyphen. Each names something that can be seen, \
without naming {0}. Write nothing else."""
OF_TWO = """What are different visual features between the {0} and the {1} in a photo? Answer with \
two lists of three to six short phrases each. Begin the first with the line "{0}:" and the second \
with the line "{1}:". Each phrase stands on a line of its own after a hyphen and names something \
that can be seen of the one and not of the other. Write nothing else."""


@dataclass(frozen=True)
class Question:
    """What is asked of one class, or of two; `words` is what the model knows them by."""

    names: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(self.names)

    @property
    def text(self) -> str:
        """The question."""
        return (OF_ONE if len(self.names) == 1 else OF_TWO).format(*self.words)

    def read(self, answer: str) -> list[list[str]]:
        """What the answer says of each class. Unusable where it does not."""
        return [listed(answer)] if len(self.names) == 1 else sides(answer, *self.words)


@dataclass
class Answers:
    """The answers so far, a line each in a file beside the one that they end in."""

    output: Path
    known: Descriptions
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def beside(cls, output: Path) -> "Answers":
        """With what is in the file and beside it. RecipeError where it holds something else."""
        found = Descriptions()
        try:
            found = read_descriptions(output) if output.exists() else found
        except ValueError as error:
            raise RecipeError("--output", f"{error}; name another file") from None
        answers = cls(output, found)
        if answers.path.exists():
            answers.known = found.joined(_gathered(answers.path))
        return answers

    @property
    def path(self) -> Path:
        """Where the lines are."""
        return self.output.with_name(f"{self.output.name}.answers.jsonl")

    def add(self, question: Question, said: list[list[str]]) -> None:
        """Write an answer down; safe to be called by several threads."""
        line = json.dumps({"of": question.names, "said": said}, ensure_ascii=False) + "\n"
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()

    def finish(self) -> Descriptions:
        """All that is known, written as one file, whole or not at all."""
        found = Answers.beside(self.output).known
        part = self.output.with_name(f".{self.output.name}.{os.getpid()}.part")
        part.write_text(found.text(), encoding="utf-8")
        os.replace(part, self.output)
        self.path.unlink(missing_ok=True)
        return found


def _gathered(path: Path) -> Descriptions:
    """The answers of a file. A last line that was cut off while it was written is taken away."""
    classes: dict[str, tuple[str, ...]] = {}
    pairs: dict[str, dict[str, tuple[str, ...]]] = {}
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + b"\n" if whole else b"")
    for number, line in enumerate(whole.decode().splitlines(), start=1):
        try:
            row = json.loads(line)
            said = dict(zip(row["of"], map(tuple, row["said"]), strict=True))
        except (ValueError, KeyError, TypeError):
            raise RecipeError("--output", f"line {number} of {path} is no answer") from None
        if len(said) == 1:
            classes |= said
        for one, other in permutations(said, 2):
            pairs.setdefault(one, {})[other] = said[one]
    return Descriptions(classes, pairs)


def questions(
    words: Mapping[str, str], known: Descriptions, parts: Collection[str]
) -> list[Question]:
    """What is to be asked of classes of which something is not known yet. RecipeError for two of
    the same words that have to be compared.
    """
    found = [(name,) for name in words if "classes" in parts and not known.of(name)]
    for pair in combinations(words, 2) if "pairs" in parts else ():
        if not (known.against(*pair) and known.against(*pair[::-1])):
            found.append(pair)
    for one, *rest in found:
        if rest and words[one].casefold() == words[rest[0]].casefold():
            problem = f"{one} and {rest[0]} are both called {words[one]!r}"
            raise RecipeError("classes.texts", f"{problem}: give each words of its own")
    return [Question(names, tuple(words[name] for name in names)) for names in found]


def describe(
    words: Mapping[str, str], ask: Ask, output: Path, parts: Collection[str], at_once: int = 1
) -> Descriptions:
    """Ask what is not known and write it all to `output`. Failed names the first question that was
    not answered; the answers to others are kept.
    """
    answers = Answers.beside(output)
    asked = questions(words, answers.known, parts)
    output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        work = [pool.submit(_answer, ask, question, answers) for question in asked]
        try:
            for done in tqdm(as_completed(work), total=len(work), desc="asking", disable=None):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers.finish()


def _answer(ask: Ask, question: Question, answers: Answers) -> None:
    """Ask until an answer can be read."""
    for attempt in range(TIMES):
        try:
            answer = ask(question.text, attempt)
        except Failed as error:
            raise Failed(f"nothing was said of {question}: {error}") from None
        try:
            answers.add(question, question.read(answer))
        except Unusable as error:
            problem, last = str(error), " ".join(answer.split())[:200]
        else:
            return
    raise Failed(
        f"nothing could be read of {TIMES} answers about {question}: {problem}. The last began "
        f"{last!r}. What was answered of others is kept; the same command goes on from there"
    )


def recipe_words(path: str) -> tuple[Recipe, str | None, dict[str, str]]:
    """A recipe, the file of descriptions that it names, which may not be there yet, and what a
    language model would call each of its classes.
    """
    from mllm_cl.data.labelled import labelled  # these import torch
    from mllm_cl.model.texts import called_by

    tree = read_file(Path(path))
    block = tree.get("classes")
    named = block.pop("descriptions", None) if isinstance(block, dict) else None
    recipe = Recipe.from_tree(tree, path)
    if recipe.classes is None:
        raise RecipeError("classes", "is missing: there are no classes to describe", path)
    block = recipe.classes
    names = labelled(block.data, "train", 1, number=block.number, **block.args).names
    return recipe, named, called_by(names, read_texts(block.texts))


def output_file(path: str, named: str | None, output: str | None) -> Path:
    """Where descriptions go: `output`, or else the file that the recipe names. RecipeError."""
    from mllm_cl.data import filled

    if output is not None:
        return Path(output).expanduser()
    if not isinstance(named, str):
        raise RecipeError(KEY, "is missing: name a file there, or give --output FILE", path)
    folder, slash, name = named.rpartition("/")
    if named.startswith(TOY) or "${" in name:
        raise RecipeError(KEY, f"{named} names no file to write to; give --output FILE", path)
    try:
        return Path(filled(folder) + slash + name).expanduser()
    except ValueError as error:
        raise RecipeError(KEY, str(error), path) from None


def parts_of(recipe: Recipe) -> Collection[str]:
    """What its method needs; of a method that needs none, both parts."""
    return recipe.method.describes or frozenset({"classes", "pairs"})
