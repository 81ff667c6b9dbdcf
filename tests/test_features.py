"""Features of sets: what a plain loop gives, each picture looked at as seldom as can be."""

from collections import Counter

import torch

from encoders import SIDE, backbone
from mllm_cl.data.labelled import Labelled, labelled
from mllm_cl.data.pixels import PixelCollator, preset
from mllm_cl.features import FeatureCache
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
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
