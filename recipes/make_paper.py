"""Writes recipes/paper/*.yaml: one recipe for each setting of APER, PROOF and ENGINE.

    python recipes/make_paper.py

Facts of the data sets are those of mllm_cl/data/benchmarks.yaml; what trains how is below.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from mllm_cl.data.benchmarks import benchmark, classes_block

HERE = Path(__file__).parent / "paper"
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine"}

# APER's configurations: epochs, learning rate, batch; weight decay is 5e-4 unless it is said.
VARIANTS = {
    "finetune": (5, 0.01, 128),
    "vpt_shallow": (20, 0.01, 48),
    "vpt_deep": (5, 0.05, 16),
    "ssf": (20, 0.01, 48),
}
APER = {
    "cifar100": (0, 5),
    "cub": (0, 10),
    "imagenet_r": (0, 5),
    "imagenet_a": (0, 10),
    "objectnet": (0, 10),
    "omnibench": (0, 30),
    "vtab": (0, 10),
}
ADAPTER = (20, 0.01, 48)
EXCEPTIONS = {
    ("imagenet_r", "adapter"): (20, 0.05, 24),
    ("objectnet", "vpt_deep"): (20, 0.01, 128),
    ("omnibench", "vpt_deep"): (20, 0.01, 48),
}
DECAY = {("imagenet_r", "adapter"): 0.005}

# PROOF's released configurations: epochs, learning rate, batch; 20 exemplars of each class, or a
# total that all share.
PROOF = (10, 0.001, 64)
OTHERS = {
    "cifar100_b0_inc10": (5, 0.001, 64),
    "cifar100_b50_inc10": (5, 0.001, 64),
    "food101_b50_inc10": (5, 0.002, 32),
    "imagenet_r_b0_inc20": (10, 0.001, 48),
}
TOTALS = {
    "cifar100_b0_inc10": 2000,
    "cifar100_b50_inc10": 2000,
    "aircraft_b50_inc10": 2000,
    "food101_b0_inc10": 2000,
    "food101_b50_inc10": 2000,
    "imagenet_r_b0_inc20": 4000,
    "imagenet_r_b100_inc20": 4000,
}
# ENGINE's released configurations: image_aug, rerank, stat, noise; text_des is 2 in all.
ENGINE = (2.0, 0.8, 0.8, 0.25)
INJECTED = {
    "cifar100_b0_inc10": (0.5, 0.5, 0.8, 0.25),
    "cifar100_b50_inc10": (2.0, 0.8, 0.9, 0.25),
    "aircraft_b0_inc10": (0.0, 0.2, 0.99, 0.25),
    "aircraft_b50_inc10": (0.0, 0.2, 0.99, 0.25),
    "cub_b0_inc20": (2.0, 0.8, 0.95, 0.3),
    "cub_b100_inc20": (2.0, 0.8, 0.95, 0.25),
    "objectnet_b0_inc20": (2.0, 0.5, 0.95, 0.25),
    "objectnet_b100_inc20": (2.0, 0.5, 0.95, 0.25),
    "ucf101_b0_inc10": (0.0, 0.2, 0.85, 0.0),
}
SPLITS = {
    (0, 10): ("cifar100", "aircraft", "cars", "food101", "ucf101"),
    (50, 10): ("cifar100", "aircraft", "cars", "food101", "ucf101"),
    (0, 20): ("cub", "imagenet_r", "objectnet"),
    (100, 20): ("cub", "imagenet_r", "objectnet"),
    (0, 30): ("sun397",),
    (150, 30): ("sun397",),
}


def recipes() -> dict[str, str]:
    """The text of every recipe, by the name of its file."""
    return dict([*_aper(), *_proof(), *_engine(), _retrieval()])


def _aper() -> Iterator[tuple[str, str]]:
    for name, split in APER.items():
        file, classes = f"aper_{name}_{_called(split)}", _classes(name, split, of_clip=False)
        ours = f"recipes/paper/{file}.yaml"
        head = [f"# APER on {_told(name, split)}, ViT-B/16-IN21K, arXiv:2303.07338 (adapters)."]
        training = _training(*_of(name, "adapter"), DECAY.get((name, "adapter"), 5e-4))
        head += [f"#   mllm-cl run {ours}", "# The table's other rows, with an --output_dir each:"]
        head += ["#   --method.name simplecil"]
        for variant in VARIANTS:
            own = _training(*_of(name, variant), DECAY.get((name, variant), 5e-4))
            changed = {key: value for key, value in own.items() if value != training[key]}
            head.append(" ".join([f"#   --method.adaptation {variant}", *_words(changed)]))
        tree = {
            "output_dir": f"runs/{file}",
            "model": {"model_name_or_path": "converted/vit-b-16-augreg-in21k"},
            "method": {"name": "aper", "adaptation": "adapter", "rank": 64},
            "classes": classes,
            "training": training | SGD,
            "eval": {"batch_size": 128},
        }
        yield _file(file, [*head, *_note(name)], tree)


def _proof() -> Iterator[tuple[str, str]]:
    for split, names in SPLITS.items():
        for name in names:
            key = f"{name}_{_called(split)}"
            total, file = TOTALS.get(key), f"proof_{key}"
            kept = {"memory_per_class": None, "memory_size": total} if total else {}
            optimizer = dict(SGD)
            if key == "aircraft_b50_inc10":  # the one configuration with "adam", which is AdamW
                optimizer = {"optim": "adamw_torch", "lr_scheduler_type": "cosine"}
            head = [
                f"# PROOF on {_told(name, split)}, CLIP ViT-B/16 of LAION-400M, arXiv:2305.19270.",
                "# The published numbers are the released code's, and so is the mode here.",
                f"#   mllm-cl run recipes/paper/{file}.yaml \\",
                "#     --sweep method.name=proof,zs_clip,simplecil",
            ]
            tree = {
                "output_dir": f"runs/{file}",
                "model": {"model_name_or_path": "converted/clip-vit-b-16-laion400m"},
                "method": {"name": "proof", "mode": "released"}
                | (kept or {"memory_per_class": 20}),
                "classes": _classes(name, split, of_clip=True),
                "training": _training(*OTHERS.get(key, PROOF), 0.05) | optimizer,
                "eval": {"batch_size": 128},
            }
            yield _file(file, [*head, *_note(name)], tree)


def _engine() -> Iterator[tuple[str, str]]:
    for split, names in SPLITS.items():
        for name in names:
            key = f"{name}_{_called(split)}"
            numbers = INJECTED.get(key, ENGINE)
            weights = dict(zip(("image_aug", "rerank", "stat", "noise"), numbers, strict=True))
            head = [
                f"# ENGINE on {_told(name, split)}, CLIP ViT-B/16 of LAION-400M, arXiv:2503.08510.",
                "# The published numbers are the released code's, which describes classes against",
                "# those to come, too. What the paper tells: --method.stat 0 --method.mode paper.",
                f"#   mllm-cl describe recipes/paper/engine_{key}.yaml --endpoint URL --model NAME",
                f"#   mllm-cl run recipes/paper/engine_{key}.yaml",
            ]
            said = {"descriptions": f"${{MLLM_CL_CIL:-data/cil}}/{name}.json"}
            tree = {
                "output_dir": f"runs/engine_{key}",
                "model": {"model_name_or_path": "converted/clip-vit-b-16-laion400m"},
                "method": {"name": "engine", "mode": "released", "future": True, "text_des": 2.0}
                | weights,
                "classes": _classes(name, split, of_clip=True) | said,
                "training": _training(10, 0.05, 64, 0.05) | SGD,
                "eval": {"batch_size": 128},
            }
            yield _file(f"engine_{key}", [*head, *_note(name)], tree)


def _retrieval() -> tuple[str, str]:
    file = "proof_retrieval_flickr30k"
    head = [
        "# Cross-modal retrieval on Flickr30K in five tasks by verb, arXiv:2305.19270. PROOF's",
        "# numbers are of BEiT-3, which transformers has not, and its scripts not released: the",
        "# cut into tasks, the loss and how it trains are ours. Any CLIP or SigLIP will do.",
        f"#   mllm-cl run recipes/paper/{file}.yaml --sweep method.name=zs,proof",
        "# Towers that train want a low rate:",
        f"#   mllm-cl run recipes/paper/{file}.yaml --training.optim adamw_torch \\",
        "#     --training.learning_rate 1e-5 --sweep method.name=finetune,der,memo",
        "# Data: nlphuji/flickr30k of the hub, one set whose column 'split' has Karpathy's splits.",
    ]
    args = {"name": "TEST", "revision": "refs/convert/parquet", "train": "test", "test": "test"}
    tree = {
        "output_dir": f"runs/{file}",
        "model": {"model_name_or_path": "converted/clip-vit-b-16-laion400m"},
        "method": {"name": "proof"},
        "retrieval": {
            "data": "nlphuji/flickr30k",
            "words": ["walk", "stand", "run", "ride", "play"],
            "assign": "first",
            "preprocessing": "clip",
            "args": args,
        },
        "training": _training(*PROOF, 0.05) | SGD,
        "eval": {"batch_size": 128},
    }
    return _file(file, head, tree)


def _of(name: str, variant: str) -> tuple[int, float, int]:
    return EXCEPTIONS.get((name, variant), VARIANTS.get(variant, ADAPTER))


def _called(split: tuple[int, int]) -> str:
    return f"b{split[0]}_inc{split[1]}"


def _told(name: str, split: tuple[int, int]) -> str:
    return f"{benchmark(name).title} B{split[0]} Inc{split[1]}"


def _classes(name: str, split: tuple[int, int], *, of_clip: bool) -> dict[str, Any]:
    first, increment = split
    assert split in benchmark(name).stages(), (name, split)
    return classes_block(name, first or increment, increment, of_clip=of_clip)


def _training(epochs: int, rate: float, batch: int, decay: float) -> dict[str, Any]:
    return {
        "num_train_epochs": epochs,
        "learning_rate": rate,
        "per_device_train_batch_size": batch,
        "weight_decay": decay,
        "max_grad_norm": 0,  # the papers' codes do not clip; the Trainer does, at 1
    }


def _words(training: dict[str, Any]) -> list[str]:
    return [f"--training.{key} {value:g}" for key, value in training.items()]


def _note(name: str) -> list[str]:
    facts = benchmark(name)
    return [f"# {line}" for line in wrap(f"Data: {facts.data}. {facts.note}", 98)]


def _file(name: str, head: list[str], tree: dict[str, Any]) -> tuple[str, str]:
    body = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=96)
    return f"{name}.yaml", "\n".join([*head, body])


def main() -> None:
    """Write them all."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    HERE.mkdir(exist_ok=True)
    for name, text in recipes().items():
        (HERE / name).write_text(text, encoding="utf-8")
    print(f"{len(recipes())} recipes in {HERE}")


if __name__ == "__main__":
    main()
