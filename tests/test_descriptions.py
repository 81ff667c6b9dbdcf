"""Files that say what classes look like, and recipes that name one."""

import json
from io import StringIO
from pathlib import Path

import pytest

from clip import reading_folder
from mllm_cl.data.check_classes import check_classes
from mllm_cl.data.labelled import labelled
from mllm_cl.model.descriptions import Descriptions, read_descriptions, told
from mllm_cl.recipe import RecipeError
from mllm_cl.settings.class_incremental import load, tasks_of
from test_class_incremental import DATA, NUMBER
from test_injection import described, injecting

NAMES = labelled(DATA, "train", 1, number=NUMBER).names
OWN = {"version": 1, "classes": {"cat": ["slit pupils"]}, "pairs": {"cat": {"dog": ["a", "b"]}}}


def written(folder: Path, tree) -> Path:
    path = folder / "said.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_a_file_is_read_as_it_was_written(tmp_path):
    found = read_descriptions(written(tmp_path, OWN))
    assert found.of("cat") == ("slit pupils",) and found.of("dog") == ()
    assert found.against("cat", "dog") == ("a", "b") and found.against("dog", "cat") == ()
    assert read_descriptions(written(tmp_path, found.text())) == found


def test_the_released_form_is_pairs_alone(tmp_path):
    found = read_descriptions(written(tmp_path, {"cat": {"dog": ["a"], "cat": ["b", " "]}}))
    assert found.pairs == {"cat": {"dog": ("a",), "cat": ("b",)}} and not found.classes
    assert found.pooled("cat", ["dog"]) == ("a",) and found.pooled("cat", None) == ("a", "b")


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ("{", "no JSON file"),
        ("[" * 100_000, "no JSON file"),
        ([], "the file is a list"),
        ({"version": 2}, "version is 2, expected 1"),
        ({"version": 1, "class": {}}, "found 'class'"),
        ({"version": 1, "classes": {"cat": "slit"}}, 'classes.cat is "slit", expected a list'),
        ({"version": 1, "pairs": {"cat": ["slit"]}}, "pairs.cat is a list"),
        ({"cat": {"dog": [1]}}, r"cat.dog is \[1\], expected a list of texts"),
    ],
)
def test_what_is_no_file_of_descriptions_is_named(tree, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        read_descriptions(written(tmp_path, tree))


def test_what_is_missing_is_named_and_pairs_stand_in_for_a_class_by_itself():
    whole = described(NAMES)
    assert whole.missing(NAMES, {"classes", "pairs"}) == []
    assert Descriptions({}, whole.pairs).missing(NAMES, {"classes", "pairs"}) == []
    one, other = NAMES[:2]
    less = {name: {k: v for k, v in own.items() if (name, k) != (one, other)}
            for name, own in whole.pairs.items()}  # fmt: skip
    assert Descriptions(whole.classes, less).missing(NAMES, {"pairs"}) == [f"{one} against {other}"]
    assert Descriptions({}, less).missing(NAMES, {"classes", "pairs"}) == [one]
    assert Descriptions({}, less).missing(NAMES, frozenset()) == []


def test_what_joins_does_not_take_the_place_of_what_is_there():
    one = Descriptions({"cat": ("a",)}, {"cat": {"dog": ("b",)}})
    other = Descriptions({"cat": ("x",), "dog": ("c",)}, {"cat": {"dog": ("x",), "cow": ("d",)}})
    found = one.joined(other)
    assert found.classes == {"cat": ("a",), "dog": ("c",)}
    assert found.pairs == {"cat": {"dog": ("b",), "cow": ("d",)}}


def test_a_description_is_read_after_the_name():
    assert told("cat", "Slit pupils") == "cat with slit pupils"


# In recipes


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = reading_folder(tmp_path_factory.mktemp("clip"))
    (folder / "descriptions.json").write_text(described(NAMES).text())
    return folder


def naming(folder: Path, clip: Path, tree, **settings):
    made = injecting(folder, clip, {"descriptions": str(written(folder, tree))}, **settings)
    assert made.classes.descriptions.endswith("said.json")
    return made


def test_a_gap_ends_a_run_before_a_model_is_there_and_names_it(clip, tmp_path):
    said = json.loads(described(NAMES).text())
    del said["classes"][NAMES[3]], said["pairs"][NAMES[3]]
    recipe = naming(tmp_path, clip, said)
    with pytest.raises(RecipeError, match=f"says nothing of {NAMES[3]}") as caught:
        tasks_of(recipe)
    assert caught.value.key == "classes.descriptions"
    told = StringIO()
    assert check_classes(recipe, told) == 2 and "says nothing of" in told.getvalue()
    assert tasks_of(naming(tmp_path, clip, said, text_des=0.0, rerank=0.0))
    of_two = naming(tmp_path, clip, json.loads(described(NAMES).text()))
    assert tasks_of(of_two)


def test_classes_of_stages_that_are_not_run_need_no_description(clip, tmp_path):
    order = [NAMES[place] for place in (0, 2, 3, 4)]
    path = written(tmp_path, described(order).text())
    made = injecting(tmp_path, clip, {"descriptions": str(path), "stages": 2})
    assert tasks_of(made)
    with pytest.raises(RecipeError, match="says nothing of"):
        tasks_of(injecting(tmp_path, clip, {"descriptions": str(path)}))


def test_a_recipe_without_descriptions_is_told_where_they_come_from(clip, tmp_path):
    recipe = injecting(tmp_path, clip, {"descriptions": None})
    with pytest.raises(RecipeError, match="mllm-cl describe"):
        tasks_of(recipe)
    assert tasks_of(injecting(tmp_path, clip, {"descriptions": None}, text_des=0.0, stat=1.0))


def test_a_file_that_is_not_there_is_named_when_the_recipe_is_read(clip, tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        injecting(tmp_path, clip, {"descriptions": str(tmp_path / "none.json")})


def test_compositions_are_described_without_a_file(clip, tmp_path):
    recipe = injecting(tmp_path, clip, {"descriptions": "toy:compositions"})
    model, _ = load(recipe, tasks_of(recipe))
    found = model.descriptions
    assert found.of("striped red circle") == ("red", "striped", "circle")
    assert found.missing(labelled(DATA, "train", 1).names, {"classes", "pairs"}) == []
    one, other = NAMES[:2]
    assert not set(found.against(one, other)) & set(found.of(other))
    with pytest.raises(RecipeError, match="no descriptions toy:digits"):
        tasks_of(injecting(tmp_path, clip, {"descriptions": "toy:digits"}))


def test_other_words_are_another_run(clip, tmp_path):
    said = json.loads(described(NAMES).text())
    first = naming(tmp_path, clip, said).fingerprint(0)
    assert naming(tmp_path, clip, said).fingerprint(0) == first
    said["classes"][NAMES[0]] = ["round"]
    assert naming(tmp_path, clip, said).fingerprint(0) != first


def test_a_class_that_is_called_by_the_name_of_another_keeps_its_own_key(clip, tmp_path):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(dict(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))))
    path = written(tmp_path, described(NAMES).text())
    recipe = injecting(tmp_path, clip, {"descriptions": str(path), "texts": str(texts)})
    model, _ = load(recipe, tasks_of(recipe))
    assert model.descriptions == described(NAMES) and model.called(NAMES[0]) == NAMES[1]


def test_a_file_may_call_classes_what_prompts_call_them(clip, tmp_path):
    words = {name: f"thing {place}" for place, name in enumerate(NAMES)}
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(words))
    path = written(tmp_path, described(list(words.values())).text())
    recipe = injecting(tmp_path, clip, {"descriptions": str(path), "texts": str(texts)})
    model, _ = load(recipe, tasks_of(recipe))
    assert model.descriptions.of(NAMES[1]) == ("thing", "1")
    assert model.called(NAMES[1]) == "thing 1"
