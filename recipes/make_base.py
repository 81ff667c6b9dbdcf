"""Trains the two tiny bases that ship in `mllm_cl/assets` from scratch on the base skills, on one CPU core.

    OMP_NUM_THREADS=1 python recipes/make_base.py --kind qwen3-vl-moe
    OMP_NUM_THREADS=1 python recipes/make_base.py --kind llava

Writes weights (bf16), configuration, tokenizer, processor, and `make_base.log`: what was run and what came out.
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

import mllm_cl
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import BASE_SKILLS, TOY_TASKS, toy_task
from mllm_cl.model.tiny import KINDS, tiny_model, toy_processor

ASSETS = Path(mllm_cl.__file__).parent / "assets"
# How often each skill is drawn: fine strokes take longer to learn than colours. (ours)
SHARE = {"digit": 3, "colour": 1, "shape": 2, "count": 2, "letter": 2, "side": 1}


def stream(batch_size: int, seed: int) -> Iterator[list[dict]]:
    """Endless batches of the mixture; no sample comes twice."""
    draw = random.Random(seed)
    tasks = {name: toy_task(name, "train", 10**7, seed) for name in BASE_SKILLS}
    for step in range(10**7 // batch_size):
        names = draw.choices(list(SHARE), weights=list(SHARE.values()), k=batch_size)
        yield [tasks[name][step * batch_size + i] for i, name in enumerate(names)]


def rate(step: int, steps: int) -> float:
    """The learning-rate factor: 40 steps of warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    collate, batches = ChatCollator(processor), stream(batch_size, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    # Balances the experts; a dense model has no such output.
    sparse = {"output_router_logits": True} if "moe" in model.config.model_type else {}
    start = time.monotonic()
    for step in range(steps):
        loss = model(**collate(next(batches)), **sparse).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, name: str, size: int = 300
) -> float:
    """The share of held-out questions whose generated answer is right to the letter."""
    samples, right = list(toy_task(name, "test", size)), 0
    for chunk in (samples[i : i + 100] for i in range(0, size, 100)):
        batch = ChatCollator(processor, prompt_only=True)(chunk)
        written = model.generate(**batch, max_new_tokens=4, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
        answers = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        expected = [sample["messages"][-1]["content"][0]["text"] for sample in chunk]
        right += sum(answer == truth for answer, truth in zip(answers, expected, strict=True))
    return right / size


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """Writes the folder; returns the weights' SHA-256. The file is bf16, but loads as fp32 unless told otherwise."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"bfloat16"', '"float32"'), encoding="utf-8")
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="default: the package's assets")
    args = parser.parse_args()
    folder = args.out or ASSETS / f"tiny-{args.kind}"
    processor = toy_processor(args.kind)
    model = tiny_model(args.kind, processor.tokenizer, args.seed)
    start = time.monotonic()
    train(
        model, processor, steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed
    )
    seconds = time.monotonic() - start
    digest = save(folder, model, processor)
    saved = AutoModelForImageTextToText.from_pretrained(folder).eval()
    log = {
        "command": f"python recipes/make_base.py --kind {args.kind} --steps {args.steps} "
        f"--batch-size {args.batch_size} --lr {args.lr:g} --seed {args.seed}",
        "parameters": sum(p.numel() for p in saved.parameters()),
        "seconds": round(seconds),
        "base_accuracy": {name: accuracy(saved, processor, name) for name in BASE_SKILLS},
        "zero_shot_accuracy": {name: accuracy(saved, processor, name) for name in TOY_TASKS},
        "chance": {
            name: round(1 / len(toy_task(name, "test", 1).answers), 3)
            for name in BASE_SKILLS + TOY_TASKS
        },
        "sha256": digest,
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "numpy", "pillow", "scikit-learn")
        },
    }
    (folder / "make_base.log").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(log, indent=2))


if __name__ == "__main__":
    main()
