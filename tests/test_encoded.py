"""Training on what a frozen encoder makes of images, each encoded once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip import reading_folder
from encoders import TYPES, backbone
from mllm_cl import Recipe, run
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.surgery import only_train
from test_class_incremental import NUMBER, TEST, TRAIN, answers, recipe

STEPS, BATCH = 6, 6  # of a task


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many images an encoder is given, forward after forward."""
    seen, forward = [], Encoder.forward

    def counting(self, pixel_values_BCHW):
        seen.append(len(pixel_values_BCHW))
        return forward(self, pixel_values_BCHW)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "forward", counting)
        yield seen


@pytest.mark.parametrize("kind", TYPES)
def test_an_encoder_is_steady_as_long_as_nothing_that_sees_trains(kind):
    encoder = Encoder(backbone(kind))
    only_train(encoder, [])
    assert encoder.steady
    for parameter in encoder.sight.values():
        only_train(encoder, [parameter])
        assert not encoder.steady
    rest = {id(one) for one in encoder.parameters()} - {id(one) for one in encoder.sight.values()}
    only_train(encoder, [one for one in encoder.parameters() if id(one) in rest])
    assert encoder.steady


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("vit", "hidden_dropout_prob"), ("vit", "attention_probs_dropout_prob"),
     ("dinov2", "drop_path_rate"), ("dinov2", "hidden_dropout_prob"),
     ("clip_vision_model", "attention_dropout"), ("siglip_vision_model", "attention_dropout")],
)  # fmt: skip
def test_an_encoder_that_drops_at_random_is_not_steady(kind, rate):
    config = backbone(kind).config
    setattr(config, rate, 0.1)
    encoder = Encoder(type(backbone(kind))(config))
    only_train(encoder, [])
    assert not encoder.steady


# Whole runs


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


def proof(folder: Path, model: Path, **classes) -> Recipe:
    """Two tasks of a method that trains beside frozen encoders and rehearses."""
    classes = {"templates": ["{}"], "preprocessing": "clip", "stages": 2} | classes
    tree = recipe(folder, model, "proof", **classes).resolved()
    tree["method"] |= {"memory_per_class": 2, "dropout": 0.0}
    return Recipe.from_tree(tree, "recipe.yaml")


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "task_2/state.safetensors")


@pytest.fixture(scope="module")
def once(clip, tmp_path_factory) -> tuple[Path, int]:
    """A run, and how many images were encoded."""
    folder = tmp_path_factory.mktemp("once")
    with counted() as seen:
        run(proof(folder, clip))
    return folder, sum(seen)


def test_every_image_is_encoded_once_in_a_run_that_trains_and_rehearses(once):
    folder, encodes = once
    assert encodes == 4 * TRAIN + NUMBER * TEST  # those of all classes are tested, by their names
    memory = load_file(folder / "task_2/memory.safetensors")
    assert memory["proof/exemplars/label"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_features_train_as_the_images_do(clip, once, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "steady", False)
    with counted() as seen:
        run(proof(tmp_path, clip))
    assert sum(seen) > once[1]
    for name, value in learnt(once[0]).items():
        torch.testing.assert_close(learnt(tmp_path)[name], value, rtol=0, atol=1e-5, msg=name)
    assert answers(tmp_path, 2) == answers(once[0], 2)


def test_workers_hand_out_the_same_features(clip, once, tmp_path):
    tree = proof(tmp_path, clip).resolved()
    tree["training"] |= {"dataloader_num_workers": 2}
    run(Recipe.from_tree(tree, "recipe.yaml"))
    assert all(torch.equal(learnt(tmp_path)[name], one) for name, one in learnt(once[0]).items())


def test_pictures_that_are_cut_at_random_are_encoded_as_they_are_drawn(clip, tmp_path):
    with counted() as seen:
        run(proof(tmp_path, clip, preprocessing="paper_compat", stages=1))
    assert sum(seen) >= STEPS * BATCH + 2 * TRAIN + NUMBER * TEST
