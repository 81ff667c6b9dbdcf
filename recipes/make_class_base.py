"""Trains a small ResNet from scratch on the classes that a class-incremental run begins with: its
backbone where no pre-trained one is to be had.

    python recipes/make_class_base.py photos --first 50 --order 1993 --out bases/photos-1993

It sees the training pictures of the first classes in the order of --order, and nothing else, so a
run with `classes: {first: 50, order: …}` starts from what it may know. Writes a folder of
transformers' own, with `make_base.log`: what was run and what came out.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from make_base import adamw, descend, report, save
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from mllm_cl.data.classes import class_order
from mllm_cl.data.labelled import Labelled, labelled
from mllm_cl.data.pixels import PaperCompat, PixelCollator

WIDTHS = (32, 64, 128, 256)


def base_classes(data: Labelled, first: int, order: int) -> tuple[str, ...]:
    """The names of the classes that come first."""
    return tuple(data.names[place] for place in class_order(len(data.names), order)[:first])


def model(number: int, side: int, seed: int) -> ResNetForImageClassification:
    """An untrained ResNet of four basic blocks, 1.2 M parameters."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=WIDTHS[0],
        hidden_sizes=list(WIDTHS),
        depths=[1] * len(WIDTHS),
        layer_type="basic",
        num_labels=number,
        image_size=side,
    )
    return ResNetForImageClassification(config)


def learn(
    model: ResNetForImageClassification, samples: Labelled, collator: PixelCollator, epochs: int
) -> None:
    """Train all weights with AdamW, on batches of 64."""
    order = torch.Generator().manual_seed(collator.seed)
    loader = DataLoader(samples, 64, shuffle=True, collate_fn=collator, generator=order)
    steps = epochs * len(loader)
    optimizer, schedule = adamw(model.train().parameters(), 2e-3, steps)
    for epoch in range(epochs):
        collator.epoch.fill_(epoch)
        for place, batch in enumerate(loader):
            loss = model(**batch).loss
            descend(loss, optimizer, schedule)
            report("learn", epoch * len(loader) + place, steps, loss)


@torch.no_grad()
def accuracy(
    model: ResNetForImageClassification, samples: Labelled, collator: PixelCollator
) -> float:
    """The share of pictures whose class has the largest logit."""
    right: list[Tensor] = []
    for batch in DataLoader(samples, 100, collate_fn=collator):
        right.append(model(batch["pixel_values"]).logits.argmax(1) == batch["labels"])
    return torch.cat(right).double().mean().item()


def main() -> None:
    """Train the model, write it with its accuracy on the test pictures of its classes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="as classes.data of a recipe")
    parser.add_argument("--first", type=int, required=True, help="how many classes it sees")
    parser.add_argument("--order", type=int, default=1993, help="as classes.order of the recipe")
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = labelled(args.data, "train")
    names, preset = base_classes(data, args.first, args.order), PaperCompat(args.side)
    made, start = model(len(names), args.side, args.seed), time.process_time()
    learn(made, data.of(names), PixelCollator(preset, names, True, args.seed), args.epochs)
    test = labelled(args.data, "test", classes=list(data.names)).of(names)
    found = accuracy(made.eval(), test, PixelCollator(preset, names))
    size = {"height": args.side, "width": args.side}
    log = {
        "classes": names,
        "parameters": sum(p.numel() for p in made.parameters()),
        "cpu_seconds": round(time.process_time() - start),
        "accuracy": found,
        "settings": {name: str(value) for name, value in vars(args).items()},
        "sha256": save(args.out, made, ViTImageProcessor(size=size)),
    }
    (args.out / "make_base.log").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(log, indent=2))


if __name__ == "__main__":
    main()
