"""What prompts call a class: its name in words, or what a file says."""

import json
from pathlib import Path

import pytest
import yaml

from clip import reading_folder
from encoders import backbone
from mllm_cl import cli, run
from mllm_cl.model.encoder import load_encoder
from mllm_cl.model.texts import in_words
from mllm_cl.recipe import RecipeError
from mllm_cl.recipe.texts import read_texts
from mllm_cl.settings import opened
from mllm_cl.settings.class_incremental import tasks_of
from own_data import png
from test_class_incremental import answers, recipe

IDS = ("n01443537", "n01484850", "n01494475")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes of two pictures each, in folders of WordNet ids."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        for place, name in enumerate(IDS):
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                (folder / split / name / f"{index}.png").write_bytes(png(place + 3 * index))
    return folder


def of_ids(folder: Path, model: Path, data: Path, method: str = "zs_clip", **classes):
    classes = {"data": str(data), "number": 3, "increment": 1, "eval_size": None} | classes
    return recipe(folder, model, method, **classes)


def texts(folder: Path, **called) -> str:
    path = folder / "texts.yaml"
    path.write_text(yaml.safe_dump(called))
    return str(path)


WORDS = dict(zip(IDS, ("red circle", "blue cross", "green square"), strict=True))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aquarium_fish", "aquarium fish"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("red circle", "red circle"),
        ("7", "7"),
        ("3.5_inch_disk", "3.5 inch disk"),
        ("_", "_"),
    ],
)
def test_a_name_is_read_in_words(name, said):
    assert in_words(name) == said


def test_prompts_call_a_class_as_the_file_says(clip, data, tmp_path):
    called = WORDS | {IDS[0]: "a_b"}  # to the letter
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(called))
    one = of_ids(tmp_path, clip, data, texts=str(path), templates=["one {}"])
    model, _ = opened(one, load_encoder)
    assert model.reader.prompts(IDS[:2]) == ["one a_b", "one blue cross"]


def test_what_a_model_answers_follows_the_texts(clip, data, tmp_path):
    """Whoever calls the first class by the second's words asks for that one."""
    found = []
    for number, order in enumerate((IDS, IDS[1::-1] + IDS[2:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        called = texts(folder, **dict(zip(order, WORDS.values(), strict=True)))
        run(of_ids(folder / "run", clip, data, texts=called, increment=3))
        found.append(sum(answers(folder / "run", 1).values(), []))
    swap = {IDS[0]: IDS[1], IDS[1]: IDS[0], IDS[2]: IDS[2]}
    assert found[1] == [swap[name] for name in found[0]]


def test_a_method_that_reads_names_refuses_ids_before_the_model_loads(clip, data, tmp_path):
    with pytest.raises(RecipeError, match=r"n01443537.*ids of WordNet.*'n01443537: goldfish'"):
        run(of_ids(tmp_path / "run", tmp_path, data))
    run(of_ids(tmp_path / "run", clip, data, "simplecil", stages=1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({IDS[1]: None}, "no text for n01484850"),
        ({"n0148485": "shark"}, "names n0148485: no class"),
        ({IDS[1]: ""}, "expected words in quotes"),
        ({IDS[1]: 7}, "'n01484850' 7"),
    ],
)
def test_texts_that_do_not_fit_are_named_before_the_model_loads(tmp_path, data, change, told):
    called = {name: text for name, text in (WORDS | change).items() if text is not None}
    one = of_ids(tmp_path / "run", tmp_path, data, texts=texts(tmp_path, **called))
    with pytest.raises(RecipeError, match=told) as error:
        run(one)
    assert error.value.key == "classes.texts"


@pytest.mark.parametrize("text", ["- red circle\n- blue cross\n", ""])
def test_a_file_without_names_is_told_what_belongs_there(tmp_path, text):
    path = tmp_path / "texts.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"expected keys \(names of classes\)"):
        read_texts(str(path))


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({}, 0, "A run would start"),
        ({"n0148485": "shark"}, 2, "names n0148485: no class"),
        (None, 2, "ids of WordNet"),
    ],
)
def test_the_check_of_data_says_whether_texts_fit(tmp_path, data, capsys, change, code, told):
    path = None if change is None else texts(tmp_path, **WORDS | change)
    one = of_ids(tmp_path / "run", tmp_path, data, texts=path)
    one.save(tmp_path / "recipe.yaml")
    assert cli.main(["data", "check", str(tmp_path / "recipe.yaml")]) == code
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_file_may_name_the_classes_that_a_recipe_leaves_out(tmp_path, data):
    path = texts(tmp_path, **WORDS)
    assert len(tasks_of(of_ids(tmp_path / "run", tmp_path, data, texts=path, number=2))) == 2


def test_classes_of_one_text_are_told_of(tmp_path, data):
    path = texts(tmp_path, **WORDS | {IDS[1]: WORDS[IDS[0]]})
    with pytest.warns(UserWarning, match="more than one class red circle"):
        tasks_of(of_ids(tmp_path / "run", tmp_path, data, texts=path))


def test_a_model_that_reads_nothing_takes_no_texts(tmp_path, data):
    backbone("vit").save_pretrained(tmp_path / "vit")
    path = texts(tmp_path, **WORDS)
    with pytest.raises(RecipeError, match="no text tower") as error:
        run(of_ids(tmp_path / "run", tmp_path / "vit", data, "simplecil", texts=path))
    assert error.value.key == "classes.texts"


def test_a_file_that_is_not_there_is_named_at_once(tmp_path, clip):
    with pytest.raises(RecipeError, match="no such file") as error:
        recipe(tmp_path, clip, texts=str(tmp_path / "texts.yaml"))
    assert error.value.key == "classes.texts"


def test_the_place_of_a_file_may_come_from_the_environment(tmp_path, data, clip, monkeypatch):
    texts(tmp_path, **WORDS)
    one = of_ids(tmp_path / "run", clip, data, texts="${MLLM_CL_CIL:-elsewhere}/texts.yaml")
    with pytest.raises(RecipeError, match="elsewhere/texts.yaml"):
        tasks_of(one)
    monkeypatch.setenv("MLLM_CL_CIL", str(tmp_path))
    assert len(tasks_of(one)) == 3


def test_a_run_goes_on_with_the_texts_that_it_began_with_wherever_they_lie(clip, data, tmp_path):
    one = of_ids(tmp_path / "run", clip, data, texts=texts(tmp_path, **WORDS), stages=1)
    run(one)
    (tmp_path / "other").mkdir()
    moved = texts(tmp_path / "other", **WORDS)
    run(of_ids(tmp_path / "run", clip, data, texts=moved, stages=1))
    texts(tmp_path, **WORDS | {IDS[0]: "striped circle"})
    with pytest.raises(RecipeError, match="another 'classes.texts'"):
        run(one)
