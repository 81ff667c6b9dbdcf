"""What a recipe's `data` block promises: nothing is cut, nothing skipped in silence, and a skipped
row moves nobody else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mllm_cl import record
from mllm_cl.data import fingerprint, read
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.errors import DataError
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.policy import for_scoring, for_training, skipped
from mllm_cl.data.toy import toy_task
from mllm_cl.model.tiny import KINDS, toy_processor
from mllm_cl.task import Task, TaskSequence
from own_data import png, question_rows, write_example, write_jsonl, write_parquet


@dataclass(frozen=True)
class Block:
    """The `data` block of a recipe."""

    on_error: str = "error"
    error_budget: float = 0.001
    max_length: int | None = None
    too_long: str = "error"


def damaged(folder: Path, *numbers: int, size: int = 10):
    """A data set in which some pictures cannot be decoded."""
    write_example(folder, size)
    for number in numbers:
        (folder / f"images/{number}.png").write_bytes(png(number)[:60])
    return read(str(folder), "train", None, 0)


def ids(samples) -> list[str]:
    return [samples[place]["id"] for place in range(len(samples))]


def test_by_default_a_bad_row_ends_it(tmp_path):
    samples = for_training(damaged(tmp_path, 3), Block(), None)
    with pytest.raises(DataError, match=r"train.jsonl, row 4: picture 'images/3.png' cannot be"):
        ids(samples)


def test_a_skipped_row_is_replaced_by_the_next_and_nobody_else_moves(tmp_path, capsys):
    samples = damaged(tmp_path, 3, 4, 9)
    skipping = for_training(samples, Block(on_error="skip", error_budget=0.3), None)
    expected = [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert ids(skipping) == [f"own-{number}" for number in expected]
    assert skipping[-1]["id"] == "own-0"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0].startswith(f"mllm-cl: skipped {tmp_path}/train.jsonl, row 4: picture")
    assert told[-1].endswith("(3 of at most 3)")


def test_what_replaces_a_row_does_not_depend_on_what_was_read_before(tmp_path):
    policy = Block(on_error="skip", error_budget=0.5)
    samples = damaged(tmp_path, 3, 4, 9)
    forwards, backwards = (for_training(samples, policy, None) for _ in range(2))
    expected = ids(forwards)
    assert [backwards[place]["id"] for place in reversed(range(10))] == expected[::-1]
    for workers in (0, 2):
        loader = DataLoader(for_training(samples, policy, None), None, num_workers=workers)
        assert [sample["id"] for sample in loader] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_rows_are_known_by_file_and_row(workers, tmp_path):
    """Also those that only a worker of the loader has met."""
    policy = Block(on_error="skip", error_budget=0.5)
    samples = damaged(tmp_path, 3, 9)
    train, scored = for_training(samples, policy, None), for_scoring(samples, policy, None)
    assert skipped(train) == []
    list(DataLoader(train, None, num_workers=workers))
    file = f"{tmp_path}/train.jsonl"
    assert skipped(train) == skipped(scored) == [(file, 4), (file, 10)]
    assert len(scored) == 8 and skipped(toy_task("arrow", "train", 2)) == []


def test_the_budget_counts_what_all_workers_have_met(tmp_path):
    policy = Block(on_error="skip", error_budget=0.1)
    train = for_training(damaged(tmp_path, 0, 1), policy, None)
    with pytest.raises(DataError, match="2 of 10 rows cannot be used, 1 may"):
        list(DataLoader(train, None, num_workers=2))


def test_the_budget_is_at_least_one_row_and_beyond_it_all_are_listed(tmp_path):
    ids(for_training(damaged(tmp_path / "one", 3), Block(on_error="skip"), None))
    samples = for_training(damaged(tmp_path / "two", 3, 5), Block(on_error="skip"), None)
    with pytest.raises(DataError, match="2 of 10 rows cannot be used, 1 may") as caught:
        ids(samples)
    assert [line.count("images/") for line in str(caught.value).splitlines()] == [0, 1, 1]
    everything = damaged(tmp_path / "all", *range(10))
    with pytest.raises(DataError, match="10 of 10 rows cannot be used"):
        for_training(everything, Block(on_error="skip", error_budget=1.0), None)[0]


def test_scored_sets_lose_their_bad_rows_up_front(tmp_path, capsys):
    policy = Block(on_error="skip", error_budget=0.2)
    scored = for_scoring(damaged(tmp_path, 0, 9), policy, None)
    assert "skipped" in capsys.readouterr().err
    assert ids(scored) == [f"own-{number}" for number in range(1, 9)]
    with pytest.raises(DataError, match="3 of 10 rows cannot be used, 2 may"):
        for_scoring(damaged(tmp_path, 0, 5, 9), policy, None)


def test_toy_tasks_are_handed_on_as_they_are():
    samples = toy_task("bars", "train", 4)
    policy = Block(on_error="skip")
    assert for_training(samples, policy, None) is samples
    assert for_scoring(samples, policy, None) is samples


def test_a_fingerprint_is_the_same_wherever_the_data_lie(tmp_path):
    write_example(tmp_path / "here"), write_example(tmp_path / "there")
    first, second = (read(str(tmp_path / name), "train", None, 0) for name in ("here", "there"))
    assert fingerprint(first) == fingerprint(second)


# Lengths


def mixed(folder: Path):
    """Text of several lengths, pictures of several sizes, two pictures in a row."""
    rows = question_rows(folder, range(4))
    for number, size in enumerate([(64, 64), (40, 90), (128, 32), (64, 64)]):
        Image.new("RGB", size, "red").save(folder / f"images/{number}.png")
    rows[1]["question"] = "A much longer question than that?"
    rows[2]["image"] = [rows[2]["image"], rows[3]["image"]]
    del rows[3]["image"]
    write_jsonl(folder / "train.jsonl", rows)
    return read(str(folder), "train", None, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_batch_without_decoding(tmp_path, kind):
    samples, processor = mixed(tmp_path), toy_processor(kind)
    batches = [ChatCollator(processor)([sample]) for sample in samples]
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(file.read_bytes()[:60])  # the header is enough
    sizes = [samples.outline(place)["sizes"] for place in range(4)]
    assert sizes == [[(64, 64)], [(40, 90)], [(128, 32), (64, 64)], []]
    lengths = Lengths(processor)
    found = [lengths.of(samples, place) for place in range(4)]
    assert found == [batch["input_ids"].shape[1] for batch in batches]
    toys = toy_task("bars", "train", 2)
    assert lengths.of(toys, 0) == ChatCollator(processor)([toys[0]])["input_ids"].shape[1]


def test_too_long_is_an_error_or_left_out_and_never_cut(tmp_path, capsys):
    samples, lengths = mixed(tmp_path), Lengths(toy_processor("qwen3-vl-moe"))
    found = [lengths.of(samples, place) for place in range(4)]
    limit = sorted(found)[1]
    longer = [place for place in range(4) if found[place] > limit]
    row, length = longer[0] + 1, found[longer[0]]
    with pytest.raises(
        DataError, match=rf"row {row}: sample own-{row - 1} has {length} tokens, pictures included"
    ):
        for_training(samples, Block(max_length=limit), lengths)
    for policed in (for_training, for_scoring):
        kept = policed(samples, Block(max_length=limit, too_long="drop"), lengths)
        assert ids(kept) == [f"own-{place}" for place in range(4) if found[place] <= limit]
        told = f"dropped 2 of 4 samples, of more than {limit} tokens (the longest {max(found)})"
        assert told in capsys.readouterr().err
    assert ids(for_training(samples, Block(max_length=max(found)), lengths)) == ids(samples)
    with pytest.raises(DataError, match="all 4 samples have more than 3 tokens"):
        for_training(samples, Block(max_length=3, too_long="drop"), lengths)


def test_dropping_and_skipping_go_together(tmp_path):
    samples = damaged(tmp_path, 3)
    (tmp_path / "images/5.png").write_bytes(b"")  # its length cannot be known
    lengths = Lengths(toy_processor("qwen3-vl-moe"))
    policy = Block(on_error="skip", error_budget=0.2, max_length=500, too_long="drop")
    assert ids(for_training(samples, policy, lengths))[3:6] == ["own-4", "own-4", "own-6"]
    assert len(for_scoring(samples, policy, lengths)) == 8
    with pytest.raises(DataError, match="row 6: picture 'images/5.png' is empty"):
        for_training(samples, Block(max_length=500), lengths)


def test_toy_tasks_can_be_too_long_too():
    lengths = Lengths(toy_processor("llava"))
    with pytest.raises(DataError, match="sample bars-train-0-0 has .* max_length is 9"):
        for_training(toy_task("bars", "train", 2), Block(max_length=9), lengths)


# What only the processor finds out


@pytest.mark.parametrize("prompt_only", [False, True])
def test_what_the_processor_refuses_is_named_within_its_batch(tmp_path, prompt_only):
    rows = question_rows(tmp_path, range(3))
    Image.new("RGB", (3000, 8)).save(tmp_path / "images/1.png")  # Qwen takes up to 200 : 1
    rows[2]["question"] = "What is <|image_pad|>?"
    write_jsonl(tmp_path / "train.jsonl", rows)
    samples = read(str(tmp_path), "train", None, 0)
    collate = ChatCollator(toy_processor("qwen3-vl-moe"), prompt_only=prompt_only)
    with pytest.raises(DataError, match="row 2: sample own-1: the processor refuses it: absolute"):
        collate([samples[0], samples[1]])
    with pytest.raises(DataError, match=r"row 3: sample own-2: the processor refuses it: \w"):
        collate([samples[0], samples[2]])
    with pytest.raises(DataError, match="row 2: sample own-1: the processor refuses it"):
        for_training(samples, Block(max_length=500), Lengths(collate.processor))


def test_what_the_chat_template_refuses_is_named(tmp_path):
    (row,) = question_rows(tmp_path, range(1))
    write_jsonl(tmp_path / "train.jsonl", [{**row, "system": "Be brief."}])
    processor = toy_processor("qwen3-vl-moe")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    processor.chat_template = refuses + processor.chat_template
    with pytest.raises(
        DataError, match="row 1: sample own-0: the chat template refuses .*no system"
    ):
        ChatCollator(processor)(read(str(tmp_path), "train", None, 0)[:1])


def test_an_error_in_a_worker_keeps_its_kind_and_place(tmp_path):
    loader = DataLoader(damaged(tmp_path, 3), None, num_workers=1)
    with pytest.raises(DataError, match="row 4: picture 'images/3.png' cannot be"):
        list(loader)


def test_rows_of_bytes_are_skipped_as_those_of_files_are(tmp_path):
    images = [{"bytes": png(n)[: 60 if n == 1 else None], "path": None} for n in range(3)]
    rows = [{"image": image, "question": "?", "answer": "a"} for image in images]
    write_parquet(tmp_path / "train.parquet", rows)
    samples = read(str(tmp_path), "train", None, 0)
    assert ids(for_training(samples, Block(on_error="skip"), None))[1] == "train-3"
    assert json.dumps(samples[0]["messages"])


def test_the_manifest_of_a_stage_names_the_skipped_rows(tmp_path):
    policy = Block(on_error="skip", error_budget=0.5)
    samples = damaged(tmp_path, 3)
    row = [list(samples.place(3))]
    task = Task(
        "own", 1, for_training(samples, policy, None), for_scoring(samples, policy, None), len
    )
    assert record.skipped_rows(TaskSequence((task,))) == {"own": {"eval": row}}
    ids(task.train)
    assert record.skipped_rows(TaskSequence((task,))) == {"own": {"train": row, "eval": row}}


def by_answer(folder: Path, answers: list[str]) -> str:
    """A file of rows with these answers, whose pictures are not there."""
    rows = [{"image": "gone.png", "question": "?", "answer": answer} for answer in answers]
    write_jsonl(folder / "test.jsonl", rows)
    return str(write_jsonl(folder / "train.jsonl", rows).parent)


ORDERED = [f"class {row // 20}" for row in range(100)]


@pytest.mark.parametrize("policed", [for_training, for_scoring])
def test_the_first_rows_of_a_file_that_is_ordered_by_class_are_told(policed, tmp_path, capsys):
    samples = read(by_answer(tmp_path, ORDERED), "test", 40, 0)
    policed(samples, Block(), None)
    told = capsys.readouterr().err
    assert told.startswith(
        f"mllm-cl: {tmp_path / 'test.jsonl'}: 2 different answers in 40 of the 40"
    )
    assert "5 in as many of all 100" in told


@pytest.mark.parametrize(
    ("answers", "size"),
    [
        (ORDERED, None),
        (ORDERED, 90),
        (ORDERED[::3] + ORDERED[1::3] + ORDERED[2::3], 40),
        ([f"in words of its own, {row}" for row in range(100)], 40),
        (["yes", "no"] * 50, 40),
    ],
)
def test_nothing_is_told_of_rows_with_as_many_answers_as_all(answers, size, tmp_path, capsys):
    for_training(read(by_answer(tmp_path, answers), "train", size, 0), Block(), None)
    assert capsys.readouterr().err == ""
