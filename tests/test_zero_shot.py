"""Class names as a text tower reads them, and what a model answers by them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip import END, reading_folder, tokenizer
from encoders import SIDE, backbone
from mllm_cl import run
from mllm_cl.data.labelled import labelled
from mllm_cl.data.pixels import preset
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype, ensemble
from mllm_cl.model.texts import Reader
from mllm_cl.recipe import RecipeError
from mllm_cl.settings.class_incremental import tasks_of
from mllm_cl.zero_shot import harmonic_mean, zero_shot
from test_class_incremental import DATA, NUMBER, TEST, answers, recipe

TEMPLATES = ["{}", "a photo {}", "one {} on the left"]
NAMES = ["red circle", "striped green square", "blue cross"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


def reader(**given) -> Reader:
    return Reader(tokenizer(), tuple(TEMPLATES), 7, **given)


def classifier(kind: str = "clip", **given) -> Classifier:
    encoder = Encoder(backbone(kind))
    return Classifier(encoder, Prototype(encoder.width), reader=reader(**given))


def read(model: Classifier, texts: list[str]) -> torch.Tensor:
    """The features of texts, one after another, float64."""
    rows = [model(**model.reader.tokens([text])).features[0] for text in texts]
    return torch.stack(rows).detach().double()


def named(model: Classifier, names: list[str]) -> torch.Tensor:
    """The unit feature of each class, by loops."""
    found = []
    for name in names:
        parts = [read(model, [template.replace("{}", name)])[0] for template in TEMPLATES]
        mean = sum(part / part.norm() for part in parts) / len(parts)
        found.append(mean / mean.norm())
    return torch.stack(found)


# Reading


def test_a_class_is_the_mean_direction_of_all_its_prompts():
    model = classifier()
    texts = model.texts(NAMES)
    torch.testing.assert_close(texts.double(), named(model, NAMES), rtol=0, atol=1e-6)
    assert torch.equal(texts, ensemble(model.prompts(NAMES)))
    assert model.prompts(NAMES).shape == (3, 3, 20)
    # Classes must differ, or whatever is right for one is right for all.
    assert (texts @ texts.T - torch.eye(3)).abs().max() < 0.999


def test_what_is_read_beside_a_text_does_not_change_its_features():
    model = classifier()
    together = model.prompts(NAMES).flatten(0, 1).double()
    alone = read(model, model.reader.prompts(NAMES))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_text_that_is_too_long_is_cut_and_still_ends():
    tokens = reader().tokens(["red " * 20, "red"])
    assert tokens["input_ids"].shape == (2, 7)
    assert tokens["input_ids"][0, -1] == END
    assert tokens["attention_mask"].sum(1).tolist() == [7, 2]


def test_siglip_reads_padded_texts_without_a_mask(tmp_path):
    model = classifier("siglip", padded=True)
    tokens = model.reader.tokens(["red", "blue cross"])
    assert list(tokens) == ["input_ids"] and tokens["input_ids"].shape == (2, 7)
    torch.testing.assert_close(model.texts(NAMES).double(), named(model, NAMES), atol=1e-6, rtol=0)
    reading_folder(tmp_path / "siglip", "siglip")
    run(recipe(tmp_path / "run", tmp_path / "siglip", "zs_clip", templates=TEMPLATES, stages=1))


def test_a_model_without_a_reader_says_what_to_choose():
    model = Classifier(Encoder(backbone("vit")), Prototype(24))
    with pytest.raises(ValueError, match="choose a CLIP or SigLIP"):
        model.texts(NAMES)


# Recipes


@pytest.mark.parametrize(
    ("templates", "told"),
    [
        ("cifar", "no templates 'cifar'"),
        ([], "no text"),
        (["a photo"], "'a photo'"),
        (["a {} of {}"], "one {} each"),
        (["{0}"], "one {} each"),
    ],
)
def test_templates_that_cannot_be_meant_are_an_error(clip, tmp_path, templates, told):
    with pytest.raises(RecipeError, match=told) as error:
        recipe(tmp_path, clip, templates=templates)
    assert error.value.key == "classes.templates"


def test_a_model_without_texts_is_refused_before_its_weights_load(tmp_path):
    backbone("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"zs_clip .* no text tower"):
        run(recipe(tmp_path / "run", tmp_path / "vit", "zs_clip"))
    backbone("clip").save_pretrained(tmp_path / "clip")
    with pytest.raises(RecipeError, match="has no tokenizer"):
        run(recipe(tmp_path / "run", tmp_path / "clip", "zs_clip"))


# Runs


def row(folder: Path, stage: int) -> dict:
    return json.loads((folder / f"task_{stage}/scores.json").read_text())


@pytest.fixture(scope="module")
def expected(clip) -> tuple[torch.Tensor, list[str], list[str]]:
    """The cosines (N, C) of all test images, in the order of classes, with all names."""
    model = classifier()
    train = labelled(DATA, "train", 1, number=NUMBER)
    test = labelled(DATA, "test", TEST, number=NUMBER)
    names = [train.names[place] for place in [0, 2, 3, 4, 5, 1]]  # of seed 1993
    images = [sample["images"][0] for name in names for sample in test.of([name])]
    pixels = torch.stack([preset("paper_compat", side=SIDE).test(image) for image in images])
    with torch.no_grad():
        seen = model.encoder(pixels).double()
    weight = named(model, names)
    return (
        seen @ weight.T / seen.norm(dim=1)[:, None],
        names,
        [n for n in names for _ in range(TEST)],
    )


def test_zs_clip_answers_with_the_nearest_of_the_names_so_far(clip, expected, tmp_path):
    cosines, names, _ = expected
    run(recipe(tmp_path / "run", clip, "zs_clip", templates=TEMPLATES))
    for stage in (1, 2, 3):
        given = [names[place] for place in cosines[: 2 * stage * TEST, : 2 * stage].argmax(1)]
        assert sum(answers(tmp_path / "run", stage).values(), []) == given


def test_its_last_score_does_not_depend_on_the_stages(clip, tmp_path):
    last = []
    for increment in (2, 3, 6):
        run(recipe(tmp_path / str(increment), clip, "zs_clip", increment=increment))
        last.append(
            json.loads((tmp_path / f"{increment}/scores.json").read_text())["summary"]["last"]
        )
    assert last[0] == last[1] == last[2]


def test_every_stage_tells_the_accuracy_by_name_over_all_classes(clip, expected, tmp_path):
    cosines, names, right = expected
    run(recipe(tmp_path / "run", clip, "simplecil", templates=TEMPLATES, stages=2))
    hits = [names[place] == name for place, name in zip(cosines.argmax(1), right, strict=True)]
    for stage in (0, 1, 2):
        seen, unseen = hits[: 2 * stage * TEST], hits[2 * stage * TEST :]
        s, u = (sum(part) / len(part) if part else None for part in (seen, unseen))
        both = None if s is None else 2 * s * u / (s + u) if s + u else 0.0
        found = row(tmp_path / "run", stage)["zero_shot"]
        assert found == {"seen": s, "unseen": u, "harmonic_mean": pytest.approx(both)}


def test_classes_that_a_run_ends_before_are_asked_for_all_the_same(clip, tmp_path):
    for name, stages in (("some", 1), ("all", None)):
        run(recipe(tmp_path / name, clip, templates=TEMPLATES, stages=stages))
    assert row(tmp_path / "some", 1)["zero_shot"] == row(tmp_path / "all", 1)["zero_shot"]
    assert row(tmp_path / "all", 3)["zero_shot"]["unseen"] is None
    summary = json.loads((tmp_path / "all/scores.json").read_text())["summary"]
    rows = [row(tmp_path / "all", stage)["zero_shot"]["unseen"] for stage in (1, 2)]
    assert summary["zero_shot_unseen"] == sum(rows) / 2


def test_where_images_and_texts_share_no_space_nothing_is_told_by_name(tmp_path):
    for kind in ("vit", "clip"):  # the CLIP has no tokenizer
        backbone(kind).save_pretrained(tmp_path / kind)
        run(recipe(tmp_path / f"{kind}-run", tmp_path / kind, stages=1))
        assert "zero_shot" not in row(tmp_path / f"{kind}-run", 1)


def test_the_harmonic_mean_of_two_zeros_is_zero():
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(None, 0.5) is None


def test_images_count_alike_whatever_stage_they_are_of():
    model = classifier()
    features = model.texts(NAMES)  # each nearest to its own name
    sets = [(features[[0, 0, 0]], torch.tensor([0, 0, 1])), (features[[2]], torch.tensor([2]))]
    found = zero_shot(model, NAMES, 2, sets)
    assert found == {"seen": 2 / 3, "unseen": 1.0, "harmonic_mean": pytest.approx(0.8)}


def pictures_with_captions(folder: Path) -> list[tuple[Path, list[str]]]:
    """Three, one of which has two captions, and the file that names them."""
    samples = labelled(DATA, "test", 1, number=3)
    said = [["red circle", "one red circle"], ["a blue cross"], ["green square on the left"]]
    rows = []
    for sample, captions in zip(samples, said, strict=True):
        path = folder / f"{sample['id']}.png"
        sample["images"][0].save(path)
        rows.append((path, captions))
    text = [json.dumps({"image": path.name, "captions": captions}) for path, captions in rows]
    (folder / "pairs.jsonl").write_text("\n".join(text))
    return rows


def test_the_laion_score_is_the_mean_cosine_of_pictures_and_their_own_captions(clip, tmp_path):
    pairs, pixels = pictures_with_captions(tmp_path), preset("clip", side=SIDE)
    captions = {"captions": str(tmp_path / "pairs.jsonl"), "args": {}, "preprocessing": "clip"}
    run(recipe(tmp_path / "run", clip, "zs_clip", stages=1, **captions))
    model, cosines = classifier(), []
    for path, said in pairs:
        with torch.no_grad(), Image.open(path) as image:
            seen = model.encoder(pixels.test(image.convert("RGB"))[None])[0].double()
        for text in said:
            text_D = read(model, [text])[0]
            cosines.append(float(seen @ text_D / seen.norm() / text_D.norm()))
    expected = pytest.approx(sum(cosines) / 4, abs=1e-6)
    assert row(tmp_path / "run", 0)["zero_shot"]["alignment"] == expected
    summary = json.loads((tmp_path / "run/scores.json").read_text())["summary"]
    assert summary["alignment"] == expected


def test_captions_are_said_to_tell_nothing_of_features_that_are_no_place_for_texts(clip, tmp_path):
    pictures_with_captions(tmp_path)
    captions = {"captions": str(tmp_path / "pairs.jsonl"), "args": {}, "preprocessing": "clip"}
    with pytest.warns(UserWarning, match=r"classes\.captions: aper gives features"):
        run(recipe(tmp_path / "run", clip, "aper", stages=1, **captions))
    assert "zero_shot" not in row(tmp_path / "run", 1)


def test_captions_that_are_not_there_are_told_before_the_weights_load(clip, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(RecipeError, match=r"classes\.captions.*none that has the captions"):
        tasks_of(recipe(tmp_path / "run", clip, captions=str(tmp_path / "none.jsonl")))
    with pytest.raises(RecipeError, match=r"classes\.captions"):
        recipe(tmp_path / "run", clip, captions=str(tmp_path / "nowhere.jsonl"))
