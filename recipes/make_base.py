"""Trains the two tiny bases in `mllm_cl/assets` from scratch on the base skills, on one CPU core.

    OMP_NUM_THREADS=1 python recipes/make_base.py --kind qwen3-vl-moe
    OMP_NUM_THREADS=1 python recipes/make_base.py --kind llava

Writes weights (bf16), configuration, tokenizer, processor, and `make_base.log`: what was run and
what came out.
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

import mllm_cl
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import BASE_SKILLS, TOY_TASKS, toy_task
from mllm_cl.model.tiny import KINDS, tiny_model, toy_processor
from mllm_cl.task import Sample

ASSETS = Path(mllm_cl.__file__).parent / "assets"
# How often each skill is drawn: fine strokes take longer to learn than colours. (ours)
SHARE = {"digit": 4, "colour": 1, "shape": 2, "count": 2, "letter": 2, "side": 1}
# Steps of the two stages, for two to four minutes on one idle core. (ours)
STEPS = {"qwen3-vl-moe": (550, 450), "llava": (1000, 600)}

Batches = Iterator[tuple[list[str], list[dict]]]


def stream(batch_size: int, seed: int) -> Batches:
    """Endless batches of the mixture, as skill names and samples; no sample comes twice."""
    draw = random.Random(seed)
    tasks = {name: toy_task(name, "train", 10**7, seed) for name in BASE_SKILLS}
    for step in range(10**7 // batch_size):
        names = draw.choices(list(SHARE), weights=list(SHARE.values()), k=batch_size)
        yield names, [tasks[name][step * batch_size + i] for i, name in enumerate(names)]


def answer(sample: dict) -> str:
    return sample["messages"][-1]["content"][0]["text"]


def adamw(parameters: Iterable[Tensor], lr: float, steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW with 40 steps of warm-up, then a cosine to zero."""
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, LambdaLR(optimizer, rate)


def descend(loss: Tensor, optimizer: AdamW, schedule: LambdaLR) -> None:
    loss.backward()
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def see(
    model: PreTrainedModel, processor: ProcessorMixin, batches: Batches, *, steps: int, lr: float
) -> None:
    """Stage 1: the vision tower learns to tell the base skills' answers apart.

    Two read-outs of the image tokens share the loss: a linear head per skill, thrown away
    afterwards, and the mean token through the language model's final norm and output embedding,
    restricted to the skill's answers. Without this stage the language model stayed at the loss of
    a blind answer for 450 steps; after it, it leaves it within 100 (measured, this recipe).
    """
    answers = {name: toy_task(name, "train", 1).answers for name in BASE_SKILLS}
    token = {n: processor.tokenizer(list(a))["input_ids"] for n, a in answers.items()}
    token = {name: torch.tensor(ids).flatten() for name, ids in token.items()}
    width = model.config.text_config.hidden_size
    heads = nn.ModuleDict({n: nn.Linear(16 * width, len(a)) for n, a in answers.items()})
    norm = model.model.language_model.norm
    optimizer, schedule = adamw([*model.parameters(), *heads.parameters()], lr, steps)
    for step in range(steps):
        names, samples = next(batches)
        pixels = processor.image_processor([s["images"][0] for s in samples], return_tensors="pt")
        image_BTD = torch.stack(list(model.get_image_features(**pixels).pooler_output))
        word_BV = model.lm_head(norm(image_BTD.mean(dim=1)))
        loss = torch.zeros(())
        for row, (name, sample) in enumerate(zip(names, samples, strict=True)):
            target = torch.tensor(answers[name].index(answer(sample)))
            loss = loss + cross_entropy(heads[name](image_BTD[row].flatten()), target)
            loss = loss + cross_entropy(word_BV[row, token[name]], target)
        descend(loss / len(samples), optimizer, schedule)
        report("see", step, steps, loss / len(samples))


def say(
    model: PreTrainedModel, processor: ProcessorMixin, batches: Batches, *, steps: int, lr: float
) -> None:
    """Stage 2: the language model learns to answer, with the vision tower as it is."""
    collate = ChatCollator(processor)
    seeing = ("visual", "vision_tower", "multi_modal_projector")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in seeing))
    # Balances the experts; a dense model has no such output.
    sparse = {"output_router_logits": True} if "moe" in model.config.model_type else {}
    optimizer, schedule = adamw([p for p in model.parameters() if p.requires_grad], lr, steps)
    for step in range(steps):
        loss = model(**collate(next(batches)[1]), **sparse).loss
        descend(loss, optimizer, schedule)
        report("say", step, steps, loss)


def report(stage: str, step: int, steps: int, loss: Tensor) -> None:
    if step % 25 == 24:
        print(f"{stage} {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: PreTrainedModel, processor: ProcessorMixin, samples: list[Sample]) -> float:
    """The share of questions whose generated answer is right to the letter."""
    right = 0
    for chunk in (samples[i : i + 100] for i in range(0, len(samples), 100)):
        batch = ChatCollator(processor, prompt_only=True)(chunk)
        written = model.generate(**batch, max_new_tokens=4, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
        answers = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        right += sum(a == answer(s) for a, s in zip(answers, chunk, strict=True))
    return right / len(samples)


def skills(
    model: PreTrainedModel, processor: ProcessorMixin, names: Iterable[str]
) -> dict[str, float]:
    """The accuracy in each toy task, on 300 held-out questions."""
    return {name: accuracy(model, processor, list(toy_task(name, "test", 300))) for name in names}


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """Writes the folder; returns the weights' SHA-256.

    The file is bf16, but its config says float32: on a CPU it is loaded as fp32 unless told not to.
    """
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
    parser.add_argument("--see", type=int, default=None, help="steps of stage 1")
    parser.add_argument("--say", type=int, default=None, help="steps of stage 2")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="default: the package's assets")
    args = parser.parse_args()
    args.see, args.say = args.see or STEPS[args.kind][0], args.say or STEPS[args.kind][1]
    folder = args.out or ASSETS / f"tiny-{args.kind}"
    processor = toy_processor(args.kind)
    model = tiny_model(args.kind, processor.tokenizer, args.seed)
    start = time.process_time()
    torch.manual_seed(args.seed)
    batches = stream(args.batch_size, args.seed)
    see(model, processor, batches, steps=args.see, lr=args.lr)
    say(model, processor, batches, steps=args.say, lr=args.lr)
    seconds = time.process_time() - start
    digest = save(folder, model, processor)
    saved = AutoModelForImageTextToText.from_pretrained(folder).eval()
    log = {
        "command": f"python recipes/make_base.py --kind {args.kind} --see {args.see} "
        f"--say {args.say} --batch-size {args.batch_size} --lr {args.lr:g} --seed {args.seed}",
        "parameters": sum(p.numel() for p in saved.parameters()),
        "cpu_seconds": round(seconds),
        "base_accuracy": skills(saved, processor, BASE_SKILLS),
        "zero_shot_accuracy": skills(saved, processor, TOY_TASKS),
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
