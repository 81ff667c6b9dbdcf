"""Answers and losses do not depend on batches, processes or interruptions."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from launches import launch
from mllm_cl import evaluate
from mllm_cl.data.chat import IGNORE, ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.evaluate import Answer, answers, loss, reference
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.model.tiny import KINDS
from mllm_cl.progress import Progress
from mllm_cl.recipe import ModelBlock
from mllm_cl.respond import prompts, respond, weigh
from mllm_cl.task import Sample
from test_runner import recipe, run_in_process

EXACT = 1e-4  # fp32: a sum of a few logits, rounded by other batch shapes


def asked() -> list[Sample]:
    """Questions of several lengths, some answered briefly and some not; those without a picture are
    all in the share of the first of two processes.
    """
    pictures = [
        sample for name in ("digit", "word", "size") for sample in toy_task(name, "test", 13)
    ]
    texts = ["which colour ?", "is the letter a red ?", "how many ?"]
    plain = [
        {
            "id": f"plain-{number}",
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ],
            "images": [],
        }
        for number, text in enumerate(texts)
    ]
    first = [sample for pair in zip(plain, pictures, strict=False) for sample in pair]
    return [*first, *pictures[3:]]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param.replace("-", "_")


@pytest.fixture(scope="module")
def base(kind) -> tuple:
    """A shipped base, and its processor."""
    block = ModelBlock(model_name_or_path=f"toy:{kind}")
    return load_model(block), load_processor(block)


@pytest.fixture(scope="module")
def alone(base) -> list[Answer]:
    """The answers of one process, one sample at a time."""
    return answers(*base, asked(), batch_size=1, max_new_tokens=4)


def agree(one: Sequence[Answer], other: Sequence[Answer]) -> bool:
    said = [[(row.id, row.prediction, row.num_tokens) for row in rows] for rows in (one, other)]
    near = [math.isclose(a.nll, b.nll, abs_tol=EXACT) for a, b in zip(one, other, strict=True)]
    return said[0] == said[1] and all(near)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_batch_size_changes_no_answer_and_no_loss(base, alone, batch_size):
    assert len({row.prediction for row in alone}) > 8
    assert agree(answers(*base, asked(), batch_size=batch_size, max_new_tokens=4), alone)


@pytest.fixture(scope="session")
def launched(tmp_path_factory) -> Callable[[str, str], list[Answer]]:
    """The answers of two processes on an engine, by engine and kind; both kinds in one launch."""
    out = tmp_path_factory.mktemp("evaluated")

    def of(engine: str, kind: str) -> list[Answer]:
        path = out / f"{engine}.json"
        if not path.exists():
            launch(engine, "evaluate_script.py", str(path))
        return [Answer(**row) for row in json.loads(path.read_text())[kind]]

    return of


def test_two_processes_give_the_answers_of_one(alone, launched, kind):
    assert agree(launched("ddp", kind), alone)


def test_prompts_cut_from_a_training_batch_are_those_of_the_collator(base):
    _, processor = base
    theirs = ChatCollator(processor, prompt_only=True)(asked())
    ours = prompts(ChatCollator(processor)(asked()), processor.tokenizer.pad_token_id)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_loss_is_that_of_the_answers_tokens_alone(base, alone):
    model, processor = base
    samples = asked()[12:18]
    batch = ChatCollator(processor)(samples)
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    expected = []
    for row, labels in zip(log_softmax(logits, dim=-1), batch["labels"], strict=True):
        places = [t for t in range(1, len(labels)) if labels[t] != IGNORE]
        expected.append((-sum(float(row[t - 1, labels[t]]) for t in places), len(places)))
    with torch.no_grad():
        found = weigh(model, batch)
    assert [number for _, number in found] == [number for _, number in expected]
    assert [a for a, _ in found] == pytest.approx([b for b, _ in expected], abs=EXACT)
    total, tokens = sum(row.nll for row in alone), sum(row.num_tokens for row in alone)
    assert loss(alone) == pytest.approx(total / tokens)
    assert tokens == sum(len(processor.tokenizer(row.reference)["input_ids"]) + 1 for row in alone)


def test_a_loss_that_is_no_number_is_not_averaged_away():
    rows = [Answer("a", "", "", 1.0, 2), Answer("b", "", "", None, 2)]
    assert math.isnan(loss(rows))


def test_references_of_a_sample_take_the_place_of_its_answer():
    sample = toy_task("digit", "test", 1)[0]
    assert reference(sample) == sample["messages"][-1]["content"][0]["text"]
    assert reference({**sample, "references": ["8", "eight"]}) == ["8", "eight"]
    assert reference({**sample, "references": None}) == reference(sample)


class Flaky(Sequence):
    """Samples that are counted, and of which one cannot be read."""

    def __init__(self, broken: int | None = None) -> None:
        self.samples, self.broken, self.reads = asked(), broken, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise KeyboardInterrupt
        self.reads += 1
        return self.samples[index]


@pytest.fixture
def interrupted(base, tmp_path) -> Progress:
    """What is kept of an evaluation that stopped at the 36th of its 42 samples."""
    kept = Progress(tmp_path / "kept", "this model")
    with pytest.raises(KeyboardInterrupt):
        answers(*base, Flaky(35), batch_size=2, max_new_tokens=4, progress=kept)
    assert len(kept.path.read_text().splitlines()) == 16
    return kept


@pytest.mark.parametrize("kind", ["llava"], indirect=True)
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(base, interrupted):
    whole = answers(*base, asked(), batch_size=2, max_new_tokens=4)
    samples = Flaky()
    assert answers(*base, samples, batch_size=2, max_new_tokens=4, progress=interrupted) == whole
    assert samples.reads == 42 - 32
    samples = Flaky()
    assert answers(*base, samples, batch_size=2, max_new_tokens=4, progress=interrupted) == whole
    assert samples.reads == 0


@pytest.mark.parametrize("kind", ["llava"], indirect=True)
def test_what_is_kept_ends_where_it_was_torn_or_changed(base, interrupted):
    whole = answers(*base, asked(), batch_size=2, max_new_tokens=4)
    good = interrupted.path.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"\n") + 40] ^= 1  # in the second of 16 rounds, of which 8 are read at once
    for damaged, reads in {good[:-9]: 42 - 16, bytes(flipped): 42, b"\0\xff nothing\n": 42}.items():
        samples = Flaky()
        interrupted.path.write_bytes(damaged)
        assert (
            answers(*base, samples, batch_size=2, max_new_tokens=4, progress=interrupted) == whole
        )
        assert samples.reads == reads


@pytest.mark.parametrize("kind", ["llava"], indirect=True)
def test_what_another_model_or_other_settings_answered_is_not_used(base, interrupted):
    for change in ({"progress": Progress(interrupted.path, "another")}, {"max_new_tokens": 3}):
        samples = Flaky()
        given = {"batch_size": 2, "max_new_tokens": 4, "progress": interrupted} | change
        answers(*base, samples, **given)
        assert samples.reads == 42


def written(folder: Path) -> dict[str, bytes]:
    """The scores and the predictions of all stages."""
    files = [*folder.glob("task_*/predictions/*"), *folder.glob("**/scores.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def short(tiny_folder, tmp_path_factory) -> Callable[[str], Path]:
    """The recipe of a run of one task, by the name of its folder."""
    root = tmp_path_factory.mktemp("runs")
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    task = {"name": "arrow", "data": "toy:arrow", "train_size": 16, "eval_size": 8}

    def of(name: str) -> Path:
        (root / name).mkdir()
        model = tiny_folder["llava"]
        return recipe(root / name, model, "finetune", training=training, tasks=[task])

    return of


@pytest.fixture(scope="module")
def whole(short) -> Path:
    """The folder of such a run, finished."""
    return run_in_process(short("whole"))


def test_a_run_that_dies_while_it_scores_goes_on_with_what_it_has(short, whole, monkeypatch):
    path, calls = short("cut"), []

    def dying(*args):
        calls.append(args)
        if len(calls) == 4:  # the last of two sets, after the task
            raise KeyboardInterrupt
        return respond(*args)

    monkeypatch.setattr(evaluate, "respond", dying)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(path)
    folder = run_in_process(path)
    assert len(calls) == 5
    assert written(folder) == written(whole)


def test_a_run_writes_scores_matches_and_losses_of_every_set(whole):
    scores = json.loads((whole / "scores.json").read_text())
    lines = (whole / "task_1/predictions/arrow.jsonl").read_text().splitlines()
    rows = [Answer(**json.loads(line)) for line in lines]
    assert len(rows) == 8
    for row in scores["rows"]:
        for key in ("scores", "constant", "exact_match", "normalised_match", "losses"):
            assert set(row[key]) == {"colour", "arrow"}
    assert scores["rows"][-1]["losses"]["arrow"] == loss(rows) == scores["summary"]["objective"]
    commonest = max(Counter(row.reference for row in rows).values())
    assert scores["constant"]["arrow"] == commonest / len(rows)


@pytest.mark.engines
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_the_engine_changes_no_answer(alone, launched, kind, engine):
    """Also with shares that are uneven and answers that end early on one process only."""
    assert agree(launched(engine, kind), alone)
