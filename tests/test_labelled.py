"""Pictures with classes are read from whatever people have, and what is wrong is named."""

import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from mllm_cl.data.errors import DataError
from mllm_cl.data.labelled import labelled
from own_data import COLOURS, png, write_csv, write_jsonl, write_parquet, write_pictures

SHARED = Path(os.environ.get("MLLM_CL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cil"


def write_folder(folder: Path, classes=("cat", "dog"), number: int = 3) -> Path:
    """train/CLASS/0.png ... and test/CLASS/0.png."""
    for split, size in (("train", number), ("test", 1)):
        for place, name in enumerate(classes):
            own = folder / split / name
            own.mkdir(parents=True)
            for index in range(size):
                (own / f"{index}.png").write_bytes(png(place))
    return folder


def write_classes(path: Path, labels, names=COLOURS, **more) -> Path:
    """A Parquet file with a column that declares its classes, as the hub writes them."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    pictures = [{"bytes": png(number), "path": None} for number in range(len(labels))]
    columns = {"image": pictures, "label": list(labels)} | {
        key: one[0] for key, one in more.items()
    }
    features |= {key: one[1] for key, one in more.items()}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(path)
    return path


# Where pictures come from


def test_a_folder_for_each_class_is_read_in_the_order_of_names(tmp_path):
    found = labelled(str(write_folder(tmp_path, ("dog", "cat"))), "train")
    assert found.names == ("cat", "dog") and found.targets == (0, 0, 0, 1, 1, 1)
    assert [found[place]["label"] for place in (0, -1)] == ["cat", "dog"]
    assert found[4]["id"] == found.id(4) == "train/dog/1.png"
    assert found[0]["images"][0].getpixel((5, 5)) == (0, 128, 0)
    assert len(labelled(str(tmp_path), "test")) == 2


def test_in_a_folder_other_files_and_what_is_hidden_are_no_pictures(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "readme.txt").write_text("no picture")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"left by a Macintosh")
    assert len(labelled(str(tmp_path), "train")) == 6


def test_a_folder_of_classes_without_splits_takes_a_test_share(tmp_path):
    for place, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(20):
            (tmp_path / name / f"{index}.png").write_bytes(png(place))
    parts = [labelled(str(tmp_path), split, test_share=0.3) for split in ("train", "test")]
    ids = [{part.id(place) for place in range(len(part))} for part in parts]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 40 and ids[1]


def test_classes_that_the_data_declare_keep_their_order(tmp_path):
    write_classes(tmp_path / "train.parquet", [1, 0, 4, 2, 3])
    found = labelled(str(tmp_path), "train")
    assert found.names == COLOURS and found.targets == (1, 0, 4, 2, 3)
    assert found[2]["label"] == "purple" and found[2]["id"] == "train/train-3"


def test_of_several_columns_with_classes_the_fine_one_is_taken(tmp_path):
    coarse = ([0, 0, 1, 1, 1], datasets.ClassLabel(names=["warm", "cold"]))
    fine = ([0, 1, 2, 3, 4], datasets.ClassLabel(names=list(COLOURS)))
    more = {"coarse_label": coarse, "fine_label": fine}
    write_classes(tmp_path / "train.parquet", [0] * 5, names=["thing"], **more)
    table = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet")).remove_columns("label")
    table.to_parquet(tmp_path / "train.parquet")
    assert labelled(str(tmp_path), "train").names == COLOURS
    assert labelled(str(tmp_path), "train", label="coarse_label").names == ("warm", "cold")


def test_classes_in_a_column_of_names_or_numbers_are_ordered_by_them(tmp_path):
    names = write_pictures(tmp_path, range(3))
    for cells, expected in (
        (["pear", "fig", "kiwi"], ("fig", "kiwi", "pear")),
        (["10", "9", "1"], ("1", "9", "10")),
    ):
        rows = [{"image": n, "class": cell} for n, cell in zip(names, cells, strict=True)]
        write_csv(tmp_path / "train.csv", rows)
        found = labelled(str(tmp_path), "train")
        assert found.names == expected
        assert [one["label"] for one in found] == cells


def test_a_saved_data_set_and_several_files_of_one_split_are_read(tmp_path):
    write_classes(tmp_path / "train-0.parquet", [0, 1])
    write_classes(tmp_path / "train-1.parquet", [4, 2, 3])
    found = labelled(str(tmp_path), "train")
    assert found.names == COLOURS and found.targets == (0, 1, 4, 2, 3)
    assert found.place(2) == (str(tmp_path / "train-1.parquet"), 1)
    whole = datasets.Dataset.from_parquet(str(tmp_path / "train-1.parquet"))
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "saved")
    assert labelled(str(tmp_path / "saved"), "test").targets == (4, 2, 3)


def test_a_place_comes_from_the_environment(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setenv("OWN_PICTURES", str(tmp_path))
    assert len(labelled("${OWN_PICTURES}", "train")) == 6
    with pytest.raises(DataError, match="the environment has no OTHER"):
        labelled("${OTHER}", "train")


# What of them is taken


def test_the_first_classes_by_name_and_the_first_pictures_of_each_are_taken(tmp_path):
    write_classes(tmp_path / "train.parquet", [1, 0, 4, 2, 3, 1, 0, 4, 2, 3])
    found = labelled(str(tmp_path), "train", 1, number=3)
    assert found.names == ("green", "blue", "purple")  # blue, green, purple, in the data's order
    assert [found.id(place) for place in range(3)] == [
        "train/train-1",
        "train/train-3",
        "train/train-4",
    ]
    assert [one["label"] for one in found] == ["green", "purple", "blue"]


def test_chosen_classes_come_in_the_order_in_which_they_are_given(tmp_path):
    write_classes(tmp_path / "train.parquet", [1, 0, 4, 2, 3])
    found = labelled(str(tmp_path), "train", classes=["purple", "red"])
    assert found.names == ("purple", "red") and found.targets == (1, 0)
    first = labelled(str(tmp_path), "train", classes=["purple", "red"], number=1)
    assert first.names == ("purple",) and len(first) == 1


def test_the_samples_of_some_classes_keep_names_targets_and_ids(tmp_path):
    found = labelled(str(write_folder(tmp_path, ("a", "b", "c"))), "train")
    part = found.of(["c", "a"])
    assert part.names == found.names and part.targets == (0, 0, 0, 2, 2, 2)
    assert part.id(3) == found.id(6) and part[3]["label"] == "c"
    assert [found.select([7, 0]).id(place) for place in (0, 1)] == [found.id(7), found.id(0)]
    with pytest.raises(DataError, match="no class 'd'"):
        found.of(["d"])


# What is wrong with them


def test_a_broken_picture_is_met_only_when_it_is_asked_for(tmp_path):
    rows = [{"image": {"bytes": png(n), "path": None}, "label": COLOURS[n]} for n in range(3)]
    rows[1]["image"]["bytes"] = png(1)[:60]
    write_parquet(tmp_path / "train.parquet", rows)
    found = labelled(str(tmp_path), "train")
    assert Counter(found.targets) == {0: 1, 1: 1, 2: 1}
    assert found[0]["label"] == "red" and found.of(["blue"])[0]["label"] == "blue"
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        found[1]
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "train.parquet"), 2)


def test_targets_are_known_where_no_picture_can_be_opened(tmp_path):
    write_folder(tmp_path)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    found = labelled(str(tmp_path), "train", 2, number=2)
    assert found.of(["dog"]).targets == (1, 1) and found.id(0) == "train/cat/0.png"


def test_a_broken_file_in_a_folder_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/dog/1.png.*is empty"):
        labelled(str(tmp_path), "train")[4]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "images/1.png", "label": None}, "row 2: the class is None"),
        ({"image": "images/1.png", "label": " "}, "row 2: the class is ' '"),
        ({"image": "images/1.png", "label": "\ud800"}, "row 2: the class is .*, expected a name"),
        ({"image": "images/1.png", "label": 1.5}, "row 2: the class is 1.5"),
        ({"image": "images/1.png", "label": True}, "row 2: the class is True"),
        ({"image": "images/1.png", "label": ["cat"]}, "row 2: the class is "),
        ({"image": "images/1.png"}, "row 2: the class is None"),
        ([1, 2], "row 2: found"),
    ],
)
def test_a_row_without_a_class_is_named_at_once(tmp_path, row, said):
    write_pictures(tmp_path, range(2))
    write_jsonl(tmp_path / "train.jsonl", [{"image": "images/0.png", "label": "cat"}, row])
    with pytest.raises(DataError, match=said):
        labelled(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("https://example.org/1.png", "is a URL"),
        ("../secret.png", "leads out of"),
        ("images/none.png", "cannot be opened"),
        (["images/0.png", "images/1.png"], "has 2 pictures, expected one"),
        (None, "has 0 pictures, expected one"),
        (7, "where a picture is expected"),
    ],
)
def test_a_row_whose_picture_cannot_be_had_is_named(tmp_path, image, said):
    folder = tmp_path / "data"
    write_pictures(folder, range(2))
    (tmp_path / "secret.png").write_bytes(png())
    rows = [{"image": "images/0.png", "label": "cat"}, {"image": image, "label": "dog"}]
    write_jsonl(folder / "train.jsonl", rows)
    found = labelled(str(folder), "train")
    assert found[0]["label"] == "cat"
    with pytest.raises(DataError, match=f"row 2: .*{said}"):
        found[1]


def test_a_row_of_no_declared_class_is_named(tmp_path):
    write_classes(tmp_path / "test.parquet", [1, -1, 2])
    with pytest.raises(DataError, match="row 2: 'label' is -1, none of the 5 classes"):
        labelled(str(tmp_path), "test")


def test_a_class_with_nothing_to_train_on_is_said_but_one_with_nothing_to_test_is_none(tmp_path):
    for split in ("train", "test"):
        write_classes(tmp_path / f"{split}.parquet", [0, 1, 2, 4])
    assert len(labelled(str(tmp_path), "test")) == 4
    with pytest.raises(DataError, match="1 of 5 classes have no picture to train on, .*'yellow'"):
        labelled(str(tmp_path), "train")
    classes = [name for name in COLOURS if name != "yellow"]
    assert labelled(str(tmp_path), "train", classes=classes).targets == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"label": "kind"}, "args.label names 'kind'; found the columns image, label"),
        ({"image": "photo"}, "args.image names 'photo', but the columns are image, label"),
        ({"label": 3}, "args.label is 3"),
        ({"number": 0}, "args.number is 0"),
        ({"number": True}, "args.number is True"),
        ({"number": 9}, "number is 9, but there are 5 classes"),
        ({"classes": ["red", "red"]}, "expected a list of different names"),
        ({"classes": "red"}, "expected a list of different names"),
        ({"classes": ["gren"]}, "did you mean 'green'"),
        ({"classes": ["red"], "number": 2}, "number is 2, but there are 1 classes"),
        ({"prompt": "What is this?"}, "'prompt', which pictures with classes have no use for"),
        ({"imagee": "image"}, "did you mean 'image'"),
    ],
)
def test_args_that_cannot_be_are_said(tmp_path, args, said):
    write_classes(tmp_path / "train.parquet", range(5))
    with pytest.raises(DataError, match=said):
        labelled(str(tmp_path), "train", **args)


def test_rows_without_a_column_of_pictures_or_classes_are_said(tmp_path):
    write_csv(tmp_path / "train.csv", [{"label": "cat", "size": "3"}])
    with pytest.raises(DataError, match="none that is the picture by its name"):
        labelled(str(tmp_path), "train")
    write_csv(tmp_path / "train.csv", [{"image": "1.png", "size": "3"}])
    with pytest.raises(DataError, match="none that has the classes by its name"):
        labelled(str(tmp_path), "train")
    with pytest.raises(DataError, match="no file for the split 'test'"):
        labelled(str(tmp_path), "test")


# Real photographs


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
def test_photographs_with_classes_are_read():
    train, test = (labelled(str(SHARED / "caltech100"), split) for split in ("train", "test"))
    assert train.names == test.names and len(train.names) == 100
    assert (len(train), len(test)) == (2929, 1000)
    for found in (train, test):
        for place in (0, len(found) // 2, -1):
            sample = found[place]
            assert sample["images"][0].mode == "RGB"
            assert sample["label"] == found.names[found.targets[place]]
