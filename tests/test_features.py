"""Features of sets: what a plain loop gives, each picture looked at as seldom as can be."""

import dataclasses
from collections import Counter

import torch

from encoders import SIDE, WIDTH, backbone
from mllm_cl import features
from mllm_cl.data.labelled import Labelled, labelled
from mllm_cl.data.pixels import PixelCollator, preset
from mllm_cl.features import FeatureBatches, FeatureCache
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.prompts import Keys, attach_keys, drawn
from mllm_cl.model.vision import attach_adapters, show
from mllm_cl.recipe import Recipe
from mllm_cl.runner import run
from test_class_incremental import NUMBER, TEST, TRAIN, recipe


def cache(folder, samples, batch_size: int) -> FeatureCache:
    encoder = Encoder(backbone("vit"))
    model = Classifier(encoder, Prototype(encoder.width))
    collate = PixelCollator(preset("paper_compat", side=SIDE), samples.names)
    return FeatureCache(folder, model, collate, "", batch_size=batch_size)


def test_features_are_a_plain_loops_in_the_samples_order(tmp_path):
    samples = labelled("toy:compositions", "train", 5, number=4)
    one = cache(tmp_path, samples, 3)
    with torch.no_grad():
        pixels = [one.collate([samples[index]])["pixel_values"] for index in range(len(samples))]
        expected = torch.cat([one.model.encoder(each) for each in pixels])
    torch.testing.assert_close(one.of(samples, "a"), expected, atol=1e-5, rtol=0)
    for size in (1, 64):
        found = cache(tmp_path / f"{size}", samples, size).of(samples, "a")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_run_looks_at_a_picture_for_its_features_and_once_for_its_fingerprint(
    tmp_path, monkeypatch
):
    backbone("vit").save_pretrained(tmp_path / "vit")
    seen, opened = Counter(), Labelled.__getitem__

    def counted(self, index):
        if not isinstance(index, slice):
            seen[self.id(index)] += 1
        return opened(self, index)

    monkeypatch.setattr(Labelled, "__getitem__", counted)
    tree = recipe(tmp_path / "run", tmp_path / "vit").resolved()
    run(Recipe.from_tree(tree, "recipe.yaml"))
    assert len(seen) == NUMBER * (TRAIN + TEST) and set(seen.values()) == {2}


def counted_digests(monkeypatch) -> Counter:
    """How often weights are hashed, by their names."""
    seen, own = Counter(), features.digest

    def digest(tensors):
        seen[tuple(tensors)] += 1
        return own(tensors)

    monkeypatch.setattr(features, "digest", digest)
    return seen


def test_the_weights_of_a_part_are_hashed_once_for_all_sets(tmp_path, monkeypatch):
    one = cache(tmp_path, labelled("toy:compositions", "train", 2, number=2), 4)
    names = ("first", "second")
    for name in names:
        attach_adapters(one.model.encoder, rank=2, name=name)
    show(one.model.encoder, {name: (name,) for name in names})
    seen = counted_digests(monkeypatch)
    for split in ("train", "test"):
        one.of(labelled("toy:compositions", split, 2, number=2), split)
    assert len(seen) == 3 and set(seen.values()) == {1}  # both parts, and what they share


def test_weights_that_moved_between_two_questions_are_encoded_anew(tmp_path):
    samples = labelled("toy:compositions", "train", 2, number=2)
    one = cache(tmp_path, samples, 4)
    place = {"samples": samples, "labels_N": torch.zeros(len(samples)), "name": "a", "shown": None}
    batches = FeatureBatches(lambda: dataclasses.replace(one), **place)
    before, _ = batches.whole()
    with torch.no_grad():
        next(one.model.encoder.parameters()).mul_(2)
    assert not torch.allclose(batches.whole()[0], before, atol=1e-3)


def test_where_pictures_of_a_batch_share_an_answer_its_size_names_the_file(tmp_path):
    samples = labelled("toy:compositions", "train", 3, number=3)
    for batchwise, files in ((False, 1), (True, 2)):
        for size in (2, 3):
            one = cache(tmp_path / f"{batchwise}", samples, size)
            keys = drawn(4, WIDTH, seed=0, name="keys", device=torch.device("cpu"))
            chosen = Keys([keys], top_k=1, forced=None, batchwise=batchwise)
            attach_keys(one.model.encoder, chosen)
            one.of(samples, "a")
        assert len(list((tmp_path / f"{batchwise}").iterdir())) == files
