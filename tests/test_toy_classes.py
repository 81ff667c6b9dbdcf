"""Drawn compositions are reproducible, held out where they say so, and told by their captions."""

import hashlib

import numpy as np
import pytest

from mllm_cl.data.errors import DataError
from mllm_cl.data.labelled import labelled
from mllm_cl.data.toy import COLOURS, SHAPES
from mllm_cl.data.toy_classes import COUNTS, PLACES, TEXTURES, words

STREAM, PLACED, BASE = (f"toy:compositions{name}" for name in ("", "_placed", "_base"))


def bits(sample: dict) -> str:
    return hashlib.sha256(sample["images"][0].tobytes()).hexdigest()


def kind(name: str) -> tuple[str, ...]:
    """Colour, texture and shape of a name or a caption."""
    shapes = {each: each for each in SHAPES} | {
        f"{each}{'es' if each == 'cross' else 's'}": each for each in SHAPES
    }
    said = name.split()
    texture = next((word for word in said if word in TEXTURES), "plain")
    colour = next(word for word in said if word in COLOURS)
    return colour, texture, next(shapes[word] for word in said if word in shapes)


def test_the_sets_have_classes_and_pictures_as_they_say():
    for data, number in ((STREAM, 20), (PLACED, 40), (BASE, 76)):
        for split, size in (("train", 40), ("test", 20)):
            found = labelled(data, split)
            assert len(found.names) == len(set(found.names)) == number
            assert np.bincount(found.targets).tolist() == [size] * number


def test_the_base_never_shows_what_the_streams_are_made_of_but_all_its_parts():
    base = {kind(name) for name in labelled(BASE, "train").names}
    stream = {kind(name) for name in labelled(STREAM, "train").names}
    placed = {kind(name) for name in labelled(PLACED, "train").names}
    assert not base & stream and placed <= stream
    for words_of, values in enumerate((COLOURS, TEXTURES, SHAPES)):
        assert {each[words_of] for each in base} == set(values)
        assert {each[words_of] for each in stream} == set(values)


def test_a_picture_depends_on_class_split_seed_and_number_alone():
    few = labelled(STREAM, "train", 2, seed=3, classes=["green cross"])
    many = labelled(STREAM, "train", 5, seed=3).of(["green cross"])
    assert [bits(one) for one in few] == [bits(one) for one in many[:2]]
    assert [one["id"] for one in few] == [one["id"] for one in many[:2]] == [few.id(0), few.id(1)]


def test_train_and_test_and_seeds_share_no_picture_and_repeat_none():
    found = [
        bits(one)
        for split, seed in (("train", 0), ("test", 0), ("train", 1))
        for one in labelled(STREAM, split, 2, seed=seed)
    ]
    assert len(set(found)) == len(found) == 120


def test_a_caption_says_class_count_and_place_in_known_words():
    for data in (STREAM, PLACED, BASE):
        for one in labelled(data, "test", 1):
            assert kind(one["caption"]) == kind(one["label"])
            assert one["caption"].startswith(COUNTS) and one["caption"].endswith(tuple(PLACES))
            assert set(one["caption"].split()) <= set(words())
            assert data != PLACED or one["caption"] == one["label"]


@pytest.mark.parametrize("name", ["red square", "purple circle", "blue triangle", "green cross"])
def test_colour_and_place_are_where_the_caption_says(name):
    data = STREAM if name in labelled(STREAM, "train").names else BASE
    for one in labelled(data, "train", 12, classes=[name]):
        pixels = np.asarray(one["images"][0]).astype(int)
        distance = np.abs(pixels - COLOURS[name.split()[0]]).max(axis=-1)
        y, x = np.nonzero(distance < 20)
        middle = np.array([x.mean(), y.mean()]) - 32
        place = next(way for words, way in PLACES.items() if one["caption"].endswith(words))
        assert np.abs(middle - 17 * np.array(place)).max() < 6


def test_handwritten_digits_come_once_and_those_of_the_test_split_are_others():
    pytest.importorskip("sklearn")
    train, test = labelled("toy:digits", "train"), labelled("toy:digits", "test")
    ids = [part.id(place) for part in (train, test) for place in range(len(part))]
    assert len(set(ids)) == len(ids) == 1797
    assert train.names == test.names == tuple("0123456789")
    assert len(labelled("toy:digits", "train", 3)) == 30
    assert train[0]["images"][0].size == (64, 64) and train[0]["images"][0].mode == "RGB"


@pytest.mark.parametrize(
    ("data", "split", "args", "said"),
    [
        ("toy:composition", "train", {}, "no toy:composition of labelled pictures"),
        (STREAM, "dev", {}, "splits 'train' and 'test', not 'dev'"),
        (STREAM, "train", {"image_root": "here"}, "not 'image_root'"),
        (STREAM, "train", {"number": 21}, "number is 21, but there are 20 classes"),
        (STREAM, "train", {"classes": ["gren cross"]}, "did you mean 'green cross'"),
    ],
)
def test_a_toy_set_that_is_not_there_is_said(data, split, args, said):
    with pytest.raises(DataError, match=said):
        labelled(data, split, **args)
