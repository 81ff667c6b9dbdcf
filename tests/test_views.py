"""Other views of training pictures: drawn for each picture and epoch, by nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_cl.data.pixels import PixelCollator, preset
from mllm_cl.data.views import POLICY, VIEWS, AutoAugment, Noise, changed

SIDE = 8


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def samples(number: int = 4) -> list[dict]:
    return [{"id": f"{n}", "images": [picture(n)], "label": "a"} for n in range(number)]


def collator(name: str, *, training: bool = True, seed: int = 0) -> PixelCollator:
    return PixelCollator(
        preset("clip", side=SIDE), ["a"], training=training, seed=seed, view=VIEWS[name]
    )


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_depends_on_seed_epoch_and_id_alone(name):
    one, again, other = collator(name), collator(name), collator(name, seed=1)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    views = one(samples())["views"]
    assert torch.equal(again(samples()[::-1])["views"].flip(0), views)
    assert torch.equal(torch.stack([again.viewed(sample) for sample in samples()]), views)
    assert not torch.equal(other(samples())["views"], views)
    again.epoch.fill_(1)
    assert not torch.equal(again(samples())["views"], views)


@pytest.mark.parametrize("name", VIEWS)
def test_pictures_stay_as_they_are_beside_their_views_and_a_test_has_none(name):
    batch, plain = collator(name)(samples()), collator(name, training=False)(samples())
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])
    assert plain.keys() == {"pixel_values", "labels"}


def test_noise_lies_on_the_prepared_pixels_and_is_cut_off_as_released():
    prepare = preset("clip", side=SIDE).test
    views = [Noise()(picture(), prepare, np.random.default_rng(n)) for n in range(400)]
    views, clean = torch.stack(views), prepare(picture())
    assert views.min() == 0 and views.max() == 1
    middle = (clean > 0.3) & (clean < 0.7)
    assert middle.any()
    moved = (views - clean)[:, middle]
    assert moved.mean().abs() < 0.03 and 0.18 < moved.std() < 0.25  # a little is cut off


def test_autoaugment_draws_every_policy_and_sometimes_leaves_a_picture():
    drawn = []
    for seed in range(300):
        drawn.append(AutoAugment()(picture(), lambda image: image, np.random.default_rng(seed)))
    found = {image.tobytes() for image in drawn}
    assert picture().tobytes() in found and len(found) > len(POLICY)


def test_operations_do_what_they_are_called():
    image, blank = picture(), Image.new("RGB", (SIDE, SIDE), (10, 200, 90))
    value = np.array(image)
    assert np.array_equal(np.array(changed(image, "invert", 0, 1.0)), 255 - value)
    assert np.array_equal(np.array(changed(image, "posterize", 9, 1.0)), value & 0xF0)
    assert np.array_equal(np.array(changed(image, "solarize", 9, 1.0)), 255 - value)
    grey = np.array(changed(blank, "color", 9, -1.0)).astype(int)
    assert np.ptp(grey, axis=2).max() < 0.2 * (200 - 10)
    for name in ("rotate", "shear"):
        ways = [np.array(changed(image, name, 9, sign)) for sign in (1.0, -1.0)]
        assert not np.array_equal(*ways)
        assert np.array_equal(np.array(changed(image, name, 0, 1.0)), value)


def test_the_policy_is_25_pairs_of_known_operations():
    image = picture()
    assert len(POLICY) == 25
    for pair in POLICY:
        for name, tenths, magnitude in pair:
            assert 0 <= tenths <= 10 and 0 <= magnitude <= 9
            assert changed(image, name, magnitude, 1.0).size == image.size
