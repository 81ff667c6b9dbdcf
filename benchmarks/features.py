"""How fast images are encoded, and how many need not be: `python -m benchmarks.features`.

FeatureCache, anew and when the file is there, over a plain loop on the same model that opens,
prepares and encodes one batch after another; images are JPEG files in folders. Then the images
that a run of ten stages encodes over those that it answers: a plain loop encodes all tests of
earlier stages again.

    python -m benchmarks.features --model google/vit-base-patch16-224-in21k --device cuda \
        --images 4096 --batch 128
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTModel

from benchmarks import timing
from mllm_cl.data.labelled import Labelled, labelled
from mllm_cl.data.pixels import PixelCollator, preset
from mllm_cl.features import FeatureCache
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder, load_encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.watch import evaluating
from mllm_cl.recipe import ModelBlock

STAGES = 10


def encoder(model: str | None) -> Encoder:
    """A checkpoint's, or by default a random ViT of DeiT-tiny's size (5.5 M parameters)."""
    if model is not None:
        return load_encoder(ModelBlock(model_name_or_path=model))
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    return Encoder(ViTModel(ViTConfig(**sizes), add_pooling_layer=False)).eval()


def photographs(folder: Path, number: int, width: int, height: int) -> Labelled:
    """As many JPEG files of one class for each stage, smooth as photographs are."""
    rng = np.random.default_rng(0)
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        path = folder / "train" / f"{index % STAGES}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return labelled(str(folder), "train")


def plain(model: Classifier, samples: Labelled, collate: PixelCollator, size: int) -> Tensor:
    """One batch after another."""
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(samples), size):
            batch = collate(samples[start : start + size])
            found.append(model.encoder(batch["pixel_values"].to(device)).float().cpu())
    return torch.cat(found)


def variants(
    model: Classifier, samples: Labelled, collate: PixelCollator, size: int, folder: Path
) -> dict[str, Callable[[], Tensor]]:
    """The plain loop and ours, which give the same features."""

    def cached(place: Path) -> Tensor:
        # A run makes the fingerprint of a set once, for its manifest, too.
        cache = FeatureCache(place, model, collate, "", batch_size=size, printed=lambda _: "known")
        return cache.of(samples, "images")

    known = cached(folder / "known")
    torch.testing.assert_close(known, plain(model, samples, collate, size), atol=1e-3, rtol=1e-3)
    return {
        "plain loop": lambda: plain(model, samples, collate, size),
        "FeatureCache": lambda: cached(Path(tempfile.mkdtemp(dir=folder))),
        "FeatureCache, file there": lambda: cached(folder / "known"),
    }


def encoded(model: Classifier, samples: Labelled, collate: PixelCollator) -> tuple[int, int]:
    """The images that the tests of all stages encode with the cache, and those they answer."""
    tests, met, asked = [(name, samples.of([name])) for name in samples.names], [], 0
    counting = model.encoder.register_forward_pre_hook(lambda _, inputs: met.append(len(inputs[0])))
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(1, STAGES + 1):
            cache = FeatureCache(Path(folder), model, collate, "")  # as each stage makes one
            asked += sum(len(cache.of(test, name)) for name, test in tests[:stage])
    counting.remove()
    return sum(met), asked


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or name of a checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--photo", type=int, nargs=2, default=[500, 375], help="width and height")
    parser.add_argument("--json", help="append the rows to this file, one a line")
    arguments = parser.parse_args()
    one = encoder(arguments.model)
    model = Classifier(one, Prototype(one.width)).to(arguments.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        samples = photographs(folder, arguments.images, *arguments.photo)
        collate = PixelCollator(preset("paper_compat", side=224), samples.names)
        chosen = variants(model, samples, collate, arguments.batch, folder)
        timings = timing.compare(chosen, rounds=arguments.rounds, warmup=1, device=arguments.device)
        met, asked = encoded(model, samples, collate)
    size = sum(weight.numel() for weight in model.parameters())
    context = timing.environment(arguments.device) | {"benchmark": "features", "parameters": size}
    found = timing.rows(timings, baseline="plain loop", context=context)
    for row in found:
        row["images_per_s"] = round(arguments.images / row["median_ms"] * 1e3, 1)
    print(timing.table("features", found, ("variant", "median_ms", "ratio", "images_per_s")))
    print(f"{STAGES} stages: {asked} images answered, {met} encoded, {asked / met:.1f} times fewer")
    found.append(context | {"variant": "encodes avoided", "ratio": round(met / asked, 3)})
    if arguments.json:
        timing.append(found, arguments.json)


if __name__ == "__main__":
    main()
