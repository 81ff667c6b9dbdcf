"""Pictures become pixels as the papers' code makes them, and training pictures can be had again."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessor, Trainer, TrainingArguments, ViTConfig

from mllm_cl.data.labelled import labelled
from mllm_cl.data.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    Epochs,
    PixelCollator,
    draws,
    preset,
    random_box,
)

LEVEL = 1 / 255


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Without blacks and whites, where it would matter which way is resized first."""
    pixels = np.random.default_rng(seed).integers(64, 192, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(old: int, new: int, kernel=cubic) -> np.ndarray:
    """(new, old): how resizing with antialiasing mixes a row, in float64."""
    scale = max(old / new, 1)
    centre = (np.arange(new) + 0.5) * old / new
    found = kernel((np.arange(old) + 0.5 - centre[:, None]) / scale)
    return found / found.sum(axis=1, keepdims=True)


def resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    """(C, H, W) from 0 to 1."""
    value_HWC = np.asarray(image, dtype=np.float64)
    value_HWC = np.einsum("nw,hwc->hnc", weights(image.width, width), value_HWC)
    value_HWC = np.einsum("nh,hwc->nwc", weights(image.height, height), value_HWC)
    return np.rint(value_HWC).clip(0, 255).transpose(2, 0, 1) / 255


# The presets


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 47), (20, 20), (300, 280)])
def test_paper_compat_tests_on_the_middle_of_the_picture_from_0_to_1(width, height):
    image, short = noise(width, height), 36  # 32 * 256 / 224, rounded down
    long = int(short * max(width, height) / min(width, height))
    shape = (long, short) if width > height else (short, long)
    left, top = round((shape[0] - 32) / 2), round((shape[1] - 32) / 2)
    expected = resized(image, *shape)[:, top : top + 32, left : left + 32]
    found = preset("paper_compat", side=32).test(image)
    assert found.shape == (3, 32, 32) and found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() <= 2 * LEVEL  # two roundings to eight bits


@pytest.mark.parametrize(("width", "height"), [(40, 30), (9, 64)])
def test_clip_squashes_the_whole_picture_and_normalises(width, height):
    image = noise(width, height)
    mean, std = (np.array(each)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    found = preset("clip", side=24).test(image).numpy()
    assert np.abs(found * std + mean - resized(image, 24, 24)).max() <= 2 * LEVEL
    half = preset("siglip", side=24).test(image).numpy()
    assert np.abs(half / 2 + 0.5 - resized(image, 24, 24)).max() <= 2 * LEVEL


def test_clip_is_what_its_image_processor_does_without_a_crop(tmp_path):
    size = {"height": 24, "width": 24}
    CLIPImageProcessor(size=size, do_center_crop=False, resample=3).save_pretrained(tmp_path)
    image, own = noise(40, 30), preset("processor", tmp_path)
    assert torch.allclose(preset("clip", side=24).test(image), own.test(image), atol=1e-5)


def test_a_processor_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no image processor that can be read"):
        preset("processor", tmp_path)
    with pytest.raises(ValueError, match="a checkpoint's own"):
        preset("processor")
    with pytest.raises(ValueError, match="no preprocessing 'papr'; choose one of paper_compat"):
        preset("papr")


def test_the_size_is_the_models_where_nobody_says_another(tmp_path):
    ViTConfig(image_size=48).save_pretrained(tmp_path / "vit")
    CLIPConfig(vision_config={"image_size": 40}).save_pretrained(tmp_path / "clip")
    image = noise(60, 50)
    for name, model, side, expected in (
        ("paper_compat", "vit", None, 48),
        ("clip", "clip", None, 40),
        ("clip", "clip", 16, 16),
        ("paper_compat", None, None, 224),
    ):
        one = preset(name, model and tmp_path / model, side)
        assert one.test(image).shape == one.train(image, draws(0, 0, "a")).shape
        assert one.test(image).shape == (3, expected, expected)


def test_presets_that_prepare_pictures_differently_have_different_keys(tmp_path):
    for name, crop in (("one", True), ("two", False)):
        CLIPImageProcessor(do_center_crop=crop).save_pretrained(tmp_path / name)
    found = [preset(name, side=side) for name in ("paper_compat", "clip") for side in (32, 224)]
    found += [preset("siglip"), *(preset("processor", tmp_path / name) for name in ("one", "two"))]
    assert len({one.key for one in found}) == len(found) == 7
    assert preset("processor", tmp_path / "one").key == found[5].key


def test_a_preset_says_whether_training_pictures_are_always_the_same(tmp_path):
    CLIPImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    image = noise(40, 30)
    for one in (preset("paper_compat", side=24), preset("clip"), preset("processor", tmp_path)):
        found = [one.train(image, draws(0, 0, name)) for name in ("a", "b", "c")]
        same = all(torch.equal(each, one.test(image)) for each in found)
        assert same == one.deterministic == (one.key != "paper_compat-24")


# What a training picture draws


def test_random_boxes_have_the_area_and_the_shape_that_were_asked_for():
    boxes = [random_box(400, 300, draws(0, 0, str(k))) for k in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
    width, height = (np.array([box[k + 2] - box[k] for box in boxes]) for k in (0, 1))
    area, shape = width * height / 120_000, width / height
    assert 0.045 < area.min() < 0.07 and area.max() > 0.9
    assert 0.73 < shape.min() < 0.77 and 1.30 < shape.max() < 1.36
    # Uniform in area up to where shapes begin not to fit: its mean there, four standard errors.
    low = area[area < 0.5]
    assert abs(low.mean() - 0.275) < 4 * 0.13 / math.sqrt(len(low))


def test_a_picture_too_slim_for_any_box_gives_its_middle():
    assert random_box(1000, 10, draws(0, 0, "a"), scale=(0.9, 1)) == (493, 0, 506, 10)
    assert random_box(10, 1000, draws(0, 0, "a"), scale=(0.9, 1)) == (0, 493, 10, 506)


def test_a_training_picture_is_a_crop_of_it_mirrored_half_of_the_time():
    ramp = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8)[None, :, None], (64, 1, 3))
    one = preset("paper_compat", side=16)
    rises = []
    for number in range(400):
        value_CHW = one.train(Image.fromarray(ramp), draws(0, 0, str(number)))
        assert value_CHW.min() >= 0 and value_CHW.max() <= 1
        rises.append(bool(value_CHW[0, 8, -1] > value_CHW[0, 8, 0]))
    assert abs(sum(rises) - 200) < 4 * 10  # standard errors of a fair coin


def collator(**options) -> PixelCollator:
    return PixelCollator(preset("paper_compat", side=16), ORDER, **options)


STREAM = "toy:compositions"
ORDER = tuple(reversed(labelled(STREAM, "train").names))


def pixels_by_id(collate: PixelCollator, workers: int, batch: int) -> dict[str, torch.Tensor]:
    samples = labelled(STREAM, "train", 1)
    names = [samples.id(place) for place in range(len(samples))]
    loader = DataLoader(samples, batch, collate_fn=collate, num_workers=workers)
    return dict(zip(names, torch.cat([each["pixel_values"] for each in loader]), strict=True))


def test_a_training_picture_depends_on_seed_epoch_and_id_alone():
    one, other = collator(training=True, seed=1), collator(training=True, seed=1)
    alone = pixels_by_id(one, workers=0, batch=1)
    shared = pixels_by_id(other, workers=2, batch=7)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    other.epoch.fill_(1)
    later = pixels_by_id(other, workers=2, batch=7)
    seeded = pixels_by_id(collator(training=True, seed=2), workers=0, batch=5)
    for found in (later, seeded):
        assert not any(torch.equal(alone[name], found[name]) for name in alone)


def test_workers_that_stay_for_all_epochs_learn_which_one_it_is():
    samples, collate = labelled(STREAM, "train", 1), collator(training=True)
    loader = DataLoader(samples, 20, collate_fn=collate, num_workers=1, persistent_workers=True)
    first = next(iter(loader))["pixel_values"]
    collate.epoch.fill_(1)
    second = next(iter(loader))["pixel_values"]
    expected = collate(samples[:])["pixel_values"]
    assert not torch.equal(first, second) and torch.equal(second, expected)


class Seen(torch.nn.Module):
    """A classifier that notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[torch.Tensor] = []

    def forward(self, pixel_values, labels):
        self.batches.append(pixel_values.clone())
        return {"loss": self.weight * pixel_values.mean()}


def seen(folder, steps: int, resume: bool | None = None) -> list[torch.Tensor]:
    """The batches of a stock Trainer, three an epoch."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model, collate = Seen(), collator(training=True)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=labelled(STREAM, "train", 1),
        callbacks=[Epochs(collate)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model.batches


def test_every_epoch_of_the_trainer_draws_anew_and_a_resumed_one_draws_the_same(tmp_path):
    whole = seen(tmp_path / "whole", 7)
    assert len({round(float(batch.sum()), 3) for batch in whole}) == 7
    seen(tmp_path / "cut", 4)
    rest = seen(tmp_path / "cut", 7, resume=True)
    assert [torch.equal(a, b) for a, b in zip(rest, whole[4:], strict=True)] == [True] * 3


# The collator


def test_labels_are_places_in_the_class_order():
    samples = labelled(STREAM, "test", 1)
    batch = collator()(samples[:])
    assert batch["pixel_values"].shape == (20, 3, 16, 16)
    assert batch["labels"].tolist() == list(range(19, -1, -1))


def test_a_batch_to_test_on_does_not_depend_on_the_epoch():
    samples, collate = labelled(STREAM, "test", 1)[:2], collator()
    before = collate(samples)["pixel_values"]
    collate.epoch.fill_(3)
    assert torch.equal(collate(samples)["pixel_values"], before)


def test_a_class_that_is_none_of_the_run_is_said():
    sample = labelled(STREAM, "test", 1)[0] | {"label": "unicorn"}
    with pytest.raises(ValueError, match="of the class 'unicorn', none of the 20 classes"):
        collator()([sample])
