"""Every usual form of a data set becomes the same samples, and splits share no picture."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from torch.utils.data import DataLoader

from mllm_cl.data import read
from mllm_cl.data.errors import DataError
from mllm_cl.data.source.hub import hub_samples
from mllm_cl.data.source.reading import Reading
from own_data import (
    QUESTION,
    answer,
    picture,
    png,
    question_rows,
    write_csv,
    write_example,
    write_jsonl,
    write_parquet,
    write_pictures,
)

SHARED = Path(os.environ.get("MLLM_CL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """What `datasets` converts stays out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def said(sample: dict) -> list[tuple[str, list[str]]]:
    """Each turn's role, and its texts with pictures as <image>."""
    parts = [[part.get("text", "<image>") for part in m["content"]] for m in sample["messages"]]
    return [(m["role"], part) for m, part in zip(sample["messages"], parts, strict=True)]


ASKED = [("user", ["<image>", QUESTION]), ("assistant", ["red"])]


def chat_rows(folder: Path, kind: str) -> list[dict]:
    """Two rows in one of the chat formats, the first with a picture."""
    (name,) = write_pictures(folder, [0])
    question = [{"type": "image"}, text(QUESTION)]
    return {
        "messages": [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": [text("red")]},
                ],
                "images": [name],
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "two"},
                ],
                "images": [],
            },
        ],
        "LLaVA": [
            {
                "id": "000000033471",
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{QUESTION}"},
                    {"from": "gpt", "value": "red"},
                ],
            },
            {
                "id": 7,
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "One?"},
                    {"from": "gpt", "value": "two"},
                ],
            },
        ],
        "ShareGPT": [
            {
                "images": [name],
                "conversations": [
                    {"from": "user", "value": f"<image>{QUESTION}"},
                    {"from": "assistant", "value": "red"},
                ],
            },
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "One?"},
                    {"from": "chatgpt", "value": "two"},
                ],
            },
        ],
    }[kind]


@pytest.mark.parametrize("kind", ["messages", "LLaVA", "ShareGPT"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_chats_of_every_format_become_the_same_samples(tmp_path, kind, ending):
    rows = chat_rows(tmp_path, kind)
    path = tmp_path / f"train.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        write_jsonl(path, rows)
    elif kind == "messages":  # an Arrow column has one type, so every content is a list of parts
        for message in rows[1]["messages"]:
            message["content"] = [text(message["content"])]
        write_parquet(path, rows)
    else:
        write_parquet(path, [{**row, "id": str(row.get("id", ""))} for row in rows])
    samples = read(str(tmp_path), "train", None, 0)
    assert samples.format.name == kind
    assert said(samples[0]) == ASKED
    assert samples[0]["images"][0].tobytes() == picture(0).tobytes()
    assert said(samples[1])[-2:] == [("user", ["One?"]), ("assistant", ["two"])]
    assert said(samples[1])[0] == ("system", ["Be brief."])
    assert samples[1]["images"] == []


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_columns_are_found_by_their_usual_names(tmp_path, ending):
    (name,) = write_pictures(tmp_path, [0])
    rows = [{"Image Path": name, "Query": QUESTION, "label": "red", "note": "x"}]
    path = tmp_path / f"train.{ending}"
    if ending == "json":
        path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    elif ending == "tsv":
        path.write_text("\n".join("\t".join(part) for part in (rows[0], rows[0].values())))
    else:
        {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[ending](path, rows)
    samples = read(str(tmp_path), "train", None, 0)
    assert said(samples[0]) == ASKED
    assert samples.format.unused() == ["note"]


def test_columns_can_be_named_and_a_prompt_filled_in(tmp_path):
    (name,) = write_pictures(tmp_path, [0])
    row = {"pic": name, "q": "Colour?", "a": "red", "answer": "no", "options": ["red", "blue"]}
    write_jsonl(tmp_path / "train.jsonl", [row])
    named = {"image": "pic", "question": "q", "answer": "a"}
    assert said(read(str(tmp_path), "train", None, 0, **named)[0])[0][1] == ["<image>", "Colour?"]
    prompt = "{q} One of: {options}."
    filled = read(str(tmp_path), "train", None, 0, image="pic", answer="a", prompt=prompt)[0]
    assert said(filled) == [
        ("user", ["<image>", "Colour? One of: red, blue."]),
        ("assistant", ["red"]),
    ]


def test_alpaca_rows_join_instruction_and_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"instruction": "Say yes.", "input": "", "output": "yes"},
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    samples = read(str(tmp_path), "train", None, 0)
    assert samples.format.name == "Alpaca"
    assert [said(sample)[0][1] for sample in samples] == [["Add.\n1 and 1"], ["Say yes."]]


def test_markers_say_where_pictures_stand_and_without_any_they_come_first(tmp_path):
    names = write_pictures(tmp_path, [0, 1])
    rows = [
        {"images": names, "question": "Is <image> like <image>?", "answer": "no"},
        {"images": names, "question": "Alike?", "answer": "no"},
        {"images": names[0], "question": "What?", "answer": "no"},
        {"question": "What?", "answer": "no"},
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    asked = [said(sample)[0][1] for sample in read(str(tmp_path), "train", None, 0)]
    assert asked == [
        ["Is ", "<image>", " like ", "<image>", "?"],
        ["<image>", "<image>", "Alike?"],
        ["<image>", "What?"],
        ["What?"],
    ]


def test_several_answers_are_kept_and_the_most_frequent_is_learnt(tmp_path):
    people = [{"answer": "two"}, {"answer": "2"}, {"answer": "2"}]
    rows = [
        {"question": "How many?", "answers": people},
        {"question": "How many?", "answers": ["1"]},
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    several, one = read(str(tmp_path), "train", None, 0)
    assert said(several)[-1] == ("assistant", ["2"])
    assert several["references"] == ["two", "2", "2"]
    assert "references" not in one


def test_pictures_may_stand_inside_rows(tmp_path):
    rows = [
        {"image": {"bytes": png(0), "path": None}, "question": QUESTION, "answer": "red"},
        {"image": {"bytes": None, "path": "images/0.png"}, "question": QUESTION, "answer": "red"},
    ]
    write_pictures(tmp_path, [0])
    write_parquet(tmp_path / "train.parquet", rows)
    for sample in read(str(tmp_path), "train", None, 0):
        assert sample["images"][0].tobytes() == picture(0).tobytes()
    pixels = [[[255, 0, 0]] * 4] * 4
    inline = [{"type": "image", "image": "images/0.png"}, text(QUESTION)]
    messages = [{"role": "user", "content": inline}, {"role": "assistant", "content": "red"}]
    write_jsonl(tmp_path / "list.jsonl", [{"image": pixels, "question": "?", "answer": "red"}])
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    (array,) = read(str(tmp_path), "train", None, 0, train="list.jsonl")
    (chat,) = read(str(tmp_path), "train", None, 0, train="chat.jsonl")
    assert array["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert chat["images"][0].tobytes() == picture(0).tobytes()


def test_class_names_take_the_place_of_their_numbers(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for data in (tmp_path, tmp_path / "saved"):
        samples = read(str(data), "train", None, 0)
        assert [said(sample)[-1][1] for sample in samples] == [["yes"], ["no"]]


def test_shards_are_read_in_order_and_places_are_those_of_their_file(tmp_path):
    rows = question_rows(tmp_path / "data", range(5))
    write_jsonl(tmp_path / "data" / "train-00000-of-00002.jsonl", rows[:2])
    write_jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", rows[2:])
    samples = read(str(tmp_path), "train", 4, 0)
    assert [sample["id"] for sample in samples] == ["own-0", "own-1", "own-2", "own-3"]
    assert samples.place(3) == (str(tmp_path / "data" / "train-00001-of-00002.jsonl"), 2)


def test_a_row_without_id_gets_one_of_its_own(tmp_path):
    rows = [{"question": "?", "answer": "a"}, {"id": "", "question": "?", "answer": "a"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert [sample["id"] for sample in read(str(tmp_path), "train", None, 0)] == [
        "train-1",
        "train-2",
    ]


def test_samples_reach_worker_processes(tmp_path):
    write_example(tmp_path)
    samples = read(str(tmp_path), "train", None, 0)
    loader = DataLoader(samples, num_workers=2, collate_fn=list)
    assert [batch[0]["id"] for batch in loader] == [sample["id"] for sample in samples]
    moved = pickle.loads(pickle.dumps(samples))  # noqa: S301, our own bytes: workers may need them
    assert moved[3]["messages"] == samples[3]["messages"]


# Splits


def test_a_file_is_trained_on_and_another_tested(tmp_path):
    write_example(tmp_path)
    file, test = str(tmp_path / "train.jsonl"), {"test": "test.jsonl"}
    train, held_out = read(file, "train", None, 0, **test), read(file, "test", None, 0, **test)
    assert len(train) == 10
    assert [sample["id"] for sample in held_out] == [f"own-{n}" for n in range(10, 15)]
    with pytest.raises(DataError, match=r"says nothing of a test set; write args: \{test"):
        read(file, "test", None, 0)
    with pytest.raises(DataError, match="trained on and tested on"):
        read(file, "test", None, 0, test="train.jsonl")


def test_a_test_share_never_shares_a_picture_with_training(tmp_path):
    names = write_pictures(tmp_path, range(40))
    rows = [
        {"image": name, "question": question, "answer": "red"}
        for name in [*names, *[f"images/../{name}" for name in names[:10]]]
        for question in ("One?", "Two?")
    ]
    file = str(write_jsonl(tmp_path / "all.jsonl", rows))
    sides = {}
    for split in ("train", "test"):
        samples = read(file, split, None, 0, test_share=0.3)
        sides[split] = {sample["images"][0].tobytes() for sample in samples}
        assert sides[split] == {
            sample["images"][0].tobytes() for sample in read(file, split, None, 5, test_share=0.3)
        }
        assert len(samples) % 2 == 0
    assert not sides["train"] & sides["test"]
    assert len(sides["train"] | sides["test"]) == 40
    assert 4 <= len(sides["test"]) <= 20
    other = read(file, "test", None, 0, test_share=0.3, split_seed=1)
    assert {sample["images"][0].tobytes() for sample in other} != sides["test"]


def test_a_share_depends_on_the_data_alone_and_leaves_something_to_test(tmp_path):
    """Not on where the folder lies; and of three rows one is tested, whatever the hashes say."""
    found = []
    for name in ("here", "there"):
        rows = question_rows(tmp_path / name, range(30))
        file = str(write_jsonl(tmp_path / name / "all.jsonl", rows))
        found.append([sample["id"] for sample in read(file, "test", None, 0, test_share=0.2)])
        few = str(write_jsonl(tmp_path / name / "few.jsonl", rows[:3]))
        shares = [read(few, split, None, 0, test_share=1e-6) for split in ("train", "test")]
        assert [len(samples) for samples in shares] == [2, 1]
    assert found[0] == found[1]


def test_a_text_is_on_one_side_too(tmp_path):
    rows = [{"question": f"Question {n % 30}?", "answer": f"{n}"} for n in range(60)]
    file = str(write_jsonl(tmp_path / "all.jsonl", rows))
    sides = [
        {said(sample)[0][1][0] for sample in read(file, split, None, 0, test_share=0.5)}
        for split in ("train", "test")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 30


def test_a_folder_without_the_split_names_what_it_has(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "?", "answer": "a"}])
    write_jsonl(tmp_path / "val.jsonl", [{"question": "?", "answer": "a"}])
    with pytest.raises(DataError, match="Found are: train.jsonl, val.jsonl. Name one by args"):
        read(str(tmp_path), "test", None, 0)
    assert len(read(str(tmp_path), "test", None, 0, test="val.jsonl")) == 1


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"anwser": "a"}, "args has no 'anwser'; did you mean 'answer'"),
        ({"answer": 3}, "args.answer is 3, expected a str"),
        ({"answer": "A"}, "args.answer names 'A', but the columns are"),
        ({"prompt": "What {is} this?"}, r"names \{is\}, but the columns are"),
        ({"test_share": 1.5}, "expected 0 to 1"),
        ({"test_share": 0.5, "test": "x"}, "leave one out"),
        ({"image_root": "nowhere"}, "found 'nowhere' neither in"),
        ({"streaming": True}, "cannot be streamed: only Parquet and the hub can"),
    ],
)
def test_wrong_args_say_what_is_known(tmp_path, args, problem):
    write_example(tmp_path)
    with pytest.raises(DataError, match=problem):
        read(str(tmp_path), "train", None, 0, **args)


def test_unknown_columns_and_places_say_what_to_write(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"foo": "a", "bar": "b"}])
    with pytest.raises(DataError, match="answer and question by its name; write args: {answer"):
        read(str(tmp_path), "train", None, 0)
    with pytest.raises(DataError, match="no such file or folder"):
        read(str(tmp_path / "nowhere"), "train", None, 0)
    with pytest.raises(DataError, match="cannot be read as a data set"):
        read("nobody/nothing", "train", None, 0)


# Streams


def test_a_stream_is_held_in_its_order_and_places_stay(tmp_path):
    pictures = [{"bytes": png(n), "path": None} for n in range(9)]
    rows = [{"image": p, "q": f"{n}?", "a": answer(n)} for n, p in enumerate(pictures)]
    write_parquet(tmp_path / "train.parquet", rows)
    args = {"question": "q", "answer": "a"}
    whole = read(str(tmp_path), "train", None, 0, **args)
    held = read(str(tmp_path), "train", 4, 0, streaming=True, **args)
    assert [held[n] for n in (3, 0)] == [whole[n] for n in (3, 0)]
    assert len(held) == 4
    with pytest.raises(DataError, match="needs a number of rows: train_size, eval_size"):
        read(str(tmp_path), "train", None, 0, streaming=True, **args)


def test_a_stream_has_the_same_test_share(tmp_path):
    rows = [{"question": f"{n}?", "answer": "a"} for n in range(30)]
    file = str(write_parquet(tmp_path / "all.parquet", rows))
    for split in ("train", "test"):
        whole = read(file, split, 5, 0, test_share=0.4)
        held = read(file, split, 5, 0, test_share=0.4, streaming=True)
        assert [held.place(n) for n in range(5)] == [whole.place(n) for n in range(5)]


def test_a_data_set_of_the_hub_is_read_like_any_other(tmp_path):
    """Through the hub's own door, which takes a folder too."""
    write_parquet(
        tmp_path / "validation.parquet",
        [{"image": {"bytes": png(n), "path": None}, "q": "?", "answer": "a"} for n in range(5)],
    )
    reading = Reading(question="q", test="validation")
    whole = hub_samples(str(tmp_path), "test", None, reading)
    held = hub_samples(str(tmp_path), "test", 3, replace(reading, streaming=True))
    assert (len(whole), len(held)) == (5, 3)
    assert said(whole[1]) == said(held[1]) == [("user", ["<image>", "?"]), ("assistant", ["a"])]
    assert whole.place(1) == held.place(1) == (f"{tmp_path}, validation", 2)
    with pytest.raises(DataError, match="from the hub it cannot be read"):
        hub_samples(str(tmp_path), "test", None, Reading())


# Real sets


@pytest.mark.skipif(not (SHARED / "vl").is_dir(), reason=f"no data in {SHARED}")
@pytest.mark.parametrize(
    "name",
    [f"vl/{name}" for name in ("bccd", "easy_vqa", "gtsrb", "nlvr", "receipt_ocr", "tabmwp")]
    + [f"text/{name}" for name in ("agnews", "boolq", "dbpedia", "mnli")],
)
def test_real_sets_are_read_by_their_folder_alone(name):
    for split in ("train", "test"):
        samples = read(str(SHARED / name), split, None, 0)
        assert len(samples) >= 250
        for index in (0, len(samples) // 2, -1):
            sample = samples[index]
            assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
            assert len(sample["images"]) == name.startswith("vl/")
            assert all(image.mode == "RGB" for image in sample["images"])
