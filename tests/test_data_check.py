"""`mllm-cl data check` says what a run would be given, names every bad row, and loads no weights;
and ten rows of one's own go through the template.
"""

import io
import json
from pathlib import Path

import pytest
import yaml

from mllm_cl.cli import main
from mllm_cl.data import read
from mllm_cl.data.check import rendered
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.survey import overlap, survey
from mllm_cl.model.tiny import KINDS, toy_processor
from mllm_cl.recipe import Recipe
from own_data import QUESTION, png, question_rows, write_example, write_jsonl, write_pictures

RECIPES = Path(__file__).parent.parent / "recipes"
OWN = ["own_data.yaml", "llava_own_data.yaml", "qwen3_vl_30b_a3b_own_data.yaml"]


def recipe(folder: Path, *data: dict, model: str = "toy:qwen3_vl_moe", **blocks) -> str:
    """A recipe of one task per data set."""
    tree = {
        "model": {"model_name_or_path": model},
        "method": {"name": "zeroshot"},
        "tasks": [{"name": f"task{number}", **each} for number, each in enumerate(data)],
        **blocks,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def checked(capsys, path: str, *words: str) -> tuple[int, str]:
    code = main(["data", "check", path, *words])
    return code, capsys.readouterr().out


def test_good_data_are_described_and_the_code_is_0(tmp_path, capsys):
    write_example(tmp_path / "own")
    code, told = checked(capsys, recipe(tmp_path, {"data": str(tmp_path / "own")}))
    assert code == 0
    for words in (
        "format   columns: question from 'question', answer from 'answer', pictures from 'image'",
        "train    10 rows, 10 with pictures, 0 of text alone, 0 bad",
        "test     5 rows",
        "tokens: ",
        "5 different in test: 'red' 20%",
        "the first for all: 0.200 by exact_match",
        "0 of 5 test rows show a picture of train, 0 are in train with their question",
        "no test row of one task is in the training set of another",
        "A run would start on these data.",
    ):
        assert words in told


def test_two_samples_show_what_is_learnt(tmp_path, capsys):
    write_example(tmp_path / "own")
    _, told = checked(capsys, recipe(tmp_path, {"data": str(tmp_path / "own")}))
    assert told.count("learnt is what is between [[ and ]]:") == 2
    assert "<|vision_start|><|image_pad|>\n" not in told
    assert f"<|vision_end|>{QUESTION}<|im_end|>" in told
    assert "[[red<|im_end|>]]" in told
    assert "[[purple<|im_end|>]]" in told


def test_a_size_that_takes_one_side_of_an_ordered_file_is_told(tmp_path, capsys):
    rows = sorted(question_rows(tmp_path, range(100)), key=lambda row: row["answer"])
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[::10])
    path = recipe(tmp_path, {"data": str(tmp_path), "train_size": 20})
    code, told = checked(capsys, path)
    assert code == 0
    assert "train: 1 different answers in 20 of the 20 rows that are used, 5 in as many" in told
    assert "test: 1 different" not in told


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_is_the_last_answer_alone(tmp_path, kind):
    turns = [("human", "One?"), ("gpt", "first"), ("human", "Two?\x1b[31m"), ("gpt", "second")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    write_jsonl(tmp_path / "train.jsonl", [row])
    (sample,) = read(str(tmp_path), "train", None, 0)
    text = "".join(line.plain for line in rendered(sample, toy_processor(kind), plain=True))
    assert "[[second<|im_end|>]]" in text
    assert text.count("[[") == 2  # in the heading, and there
    assert "\x1b" not in text
    coloured = list(rendered(sample, toy_processor(kind), plain=False))[-1]
    spans = [span for span in coloured.spans if "bold" in span.style]
    bold = [coloured.plain[span.start : span.end] for span in spans]
    assert bold == ["second<|im_end|>"]


def test_every_bad_row_is_named_and_the_code_is_2(tmp_path, capsys):
    rows = question_rows(tmp_path / "own", range(9))
    rows[2]["answer"] = ""
    rows[4]["image"] = "../secret.png"
    rows[6]["question"] = "<image> <image>"
    (tmp_path / "own/images/7.png").write_bytes(png(7)[:60])
    write_jsonl(tmp_path / "own/train.jsonl", rows)
    (tmp_path / "own/test.jsonl").write_text(json.dumps(rows[0]) + "\n{broken\n")
    path = recipe(tmp_path, {"data": str(tmp_path / "own")})
    code, told = checked(capsys, path)
    assert code == 2
    for words in (
        "train.jsonl, row 3: the answer is empty",
        "train.jsonl, row 5: picture '../secret.png' leads out of",
        "train.jsonl, row 7: the text refers to 2 pictures (<image>), the row has 1",
        "train.jsonl, row 8: picture 'images/7.png' cannot be decoded",
        "test.jsonl, row 2: is not JSON",
        "A run would stop at these:",
        "task0: 4 bad rows in train; mend them, or set 'data.on_error: skip'",
    ):
        assert words in told
    skip = ("--data.on_error", "skip")
    code, told = checked(capsys, path, *skip)
    assert code == 2
    assert "task0: 4 bad rows in train, data.error_budget allows 1" in told
    assert checked(capsys, path, *skip, "--data.error_budget", "0.5")[0] == 0


def test_data_that_are_not_there_are_named_and_the_rest_is_looked_at(tmp_path, capsys):
    write_example(tmp_path / "own")
    path = recipe(tmp_path, {"data": "not/there"}, {"data": str(tmp_path / "own")})
    code, told = checked(capsys, path)
    assert code == 2
    assert "task0: not/there: is no file or folder here, and from the hub it cannot be" in told
    assert "10 rows" in told


def test_long_samples_are_counted_as_the_run_will_treat_them(tmp_path, capsys):
    rows = question_rows(tmp_path / "own", range(4))
    rows[1]["question"] = "word " * 50
    write_jsonl(tmp_path / "own/train.jsonl", rows)
    write_jsonl(tmp_path / "own/test.jsonl", rows[:1])
    path = recipe(tmp_path, {"data": str(tmp_path / "own")}, data={"max_length": 60})
    code, told = checked(capsys, path)
    assert code == 2
    assert "train: 1 too long, the first: " in told
    assert "row 2: sample own-1 has" in told
    code, told = checked(capsys, path, "--data.too_long", "drop")
    assert code == 0
    assert "train: 1 left out, the first: " in told


def test_long_answers_and_repeated_ids_are_noticed(tmp_path, capsys):
    rows = [{"id": 1, "question": "?", "answer": "a long answer of many words"}] * 2
    write_jsonl(tmp_path / "own/train.jsonl", rows)
    write_jsonl(tmp_path / "own/test.jsonl", rows)
    path = recipe(tmp_path, {"data": str(tmp_path / "own")})
    code, told = checked(capsys, path, "--eval.max_new_tokens", "4")
    assert code == 0
    assert "2 need up to" in told
    assert "tokens, eval.max_new_tokens is 4" in told
    assert "train: the id '1' is that of several rows" in told


def test_overlap_is_found_by_pixels_and_question_within_and_between_tasks(tmp_path, capsys):
    rows = question_rows(tmp_path / "one", range(6))
    (copy,) = write_pictures(tmp_path / "one/copies", [1])
    (tmp_path / "one/copies" / copy).write_bytes(png(1, kind="BMP"))  # the same pixels
    same = {"image": f"copies/{copy}", "question": f" {QUESTION.upper()} ", "answer": "green"}
    other = {"image": "images/2.png", "question": "Is it large?", "answer": "no"}
    fresh = question_rows(tmp_path / "one", [9])
    write_jsonl(tmp_path / "one/train.jsonl", rows)
    write_jsonl(tmp_path / "one/test.jsonl", [same, other, *fresh])
    words = [{"question": f"{n}?", "answer": "a"} for n in range(4)]
    write_jsonl(tmp_path / "two/train.jsonl", [*words, *fresh])
    write_jsonl(tmp_path / "two/test.jsonl", [*words[:1], {"question": "new?", "answer": "a"}])
    two = {"data": str(tmp_path / "two"), "args": {"image_root": str(tmp_path / "one")}}
    code, told = checked(capsys, recipe(tmp_path, {"data": str(tmp_path / "one")}, two))
    assert code == 0
    assert "2 of 3 test rows show a picture of train, 1 are in train with their question" in told
    assert "0 of 2 test rows show a picture of train, 1 are in train with their question" in told
    assert (
        "1 of 3 test rows of task0 show a picture that task1 trains on, "
        "1 are in it with their question"
    ) in told


def test_toy_tasks_share_nothing():
    lengths = Lengths(toy_processor("llava"))
    train, test = (survey(read("toy:bars", split, 20, 0), lengths) for split in ("train", "test"))
    assert not train.bad
    assert vars(overlap(test, train)) == {"pictures": 0, "questions": 0}
    assert vars(overlap(train, train)) == {"pictures": 20, "questions": 20}


# The template


@pytest.mark.parametrize("name", OWN)
def test_recipes_for_own_data_parse(name):
    assert [task.name for task in Recipe.load(RECIPES / name).tasks] == ["first", "second"]


def test_ten_rows_go_through_the_template(tmp_path, monkeypatch, capsys):
    write_example(tmp_path / "my_data/first")
    second = tmp_path / "my_data/second"
    write_jsonl(second / "train.jsonl", question_rows(second, range(20, 30)))
    monkeypatch.chdir(tmp_path)
    own = str(RECIPES / "own_data.yaml")
    code, told = checked(capsys, own)
    assert code == 0, told
    assert main(["run", own, "--training.max_steps", "2"]) == 0
    scores = json.loads((tmp_path / "runs/own_data/scores.json").read_text())
    assert [row["after"] for row in scores["rows"]] == ["zero-shot", "first", "second"]


def test_a_bad_row_ends_a_run_with_its_place_and_code_2(tmp_path, monkeypatch, capsys):
    write_example(tmp_path / "own")
    (tmp_path / "own/images/3.png").write_bytes(png(3)[:60])
    path = recipe(
        tmp_path,
        {"data": str(tmp_path / "own")},
        model="toy:llava",
        method={"name": "finetune"},
        training={"max_steps": 3, "per_device_train_batch_size": 8},
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", path]) == 2
    told = capsys.readouterr().err
    assert "train.jsonl, row 4: picture 'images/3.png' cannot be decoded" in told
    assert "Traceback" not in told
    assert main(["run", path, "--data.on_error", "skip"]) == 0
    assert "skipped" in capsys.readouterr().err


def test_a_check_is_quiet_where_nobody_watches(tmp_path):
    from mllm_cl.data.check import check

    write_example(tmp_path / "own")
    file = io.StringIO()
    loaded = Recipe.load(recipe(tmp_path, {"data": str(tmp_path / "own")}))
    assert check(loaded, toy_processor("llava"), file) == 0
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()
