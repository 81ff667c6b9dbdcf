"""Trains the small CLIP in `mllm_cl/assets` from scratch, on the drawn pictures and captions of
`toy:compositions_base`: the backbone of class-incremental recipes that read class names.

    OMP_NUM_THREADS=1 python recipes/make_clip_base.py

It sees every colour, texture and shape of `toy:compositions`, but none of the kinds of things that
these make there. Three minutes on one core. Writes a folder of transformers' own, with
`make_base.log`: what was run and what came out.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from make_base import ASSETS, adamw, descend, report, save
from PIL.Image import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from mllm_cl.data.benchmarks import templates
from mllm_cl.data.labelled import labelled
from mllm_cl.data.toy import COLOURS, SIDE
from mllm_cl.data.toy_classes import TEXTURES, words

# What one says of a picture: its caption or its class alone, mostly in a prompt. (ours)
SAID = ("{}", "a photo of a {}.", *templates("cifar224"))
# Texts leave out what one sees, as those of the web do. Without this the base tells 98 % of
# `toy:compositions` by name (measured, 600 steps), which leaves nothing to learn.
OFTEN, LEFT_OUT = (*TEXTURES, *COLOURS), 0.4
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32  # tokens of a text
WIDTH, JOINT = 96, 64


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of captions and prompts is one token; others are spelt.

    Not CLIP's own class: what its suffix of words makes of ties differs from one run to the next.
    """
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # never reached
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([one.format(word) for word in words() for one in SAID], trainer)
    ends = [(token, made.token_to_id(token)) for token in (START, END)]
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ends
    )
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **special)


def model(tokens: PreTrainedTokenizerFast, seed: int) -> CLIPModel:
    """An untrained CLIP of less than a million parameters, with exact GELU."""
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": JOINT}
    vision = {
        **common,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    }
    text = {
        **common,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT))


def processor(tokens: PreTrainedTokenizerFast) -> CLIPProcessor:
    """The whole picture, whatever its shape, and the tokenizer."""
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, do_center_crop=False, resample=3)
    return CLIPProcessor(image_processor=images, tokenizer=tokens)


def batches(size: int, seed: int) -> Iterator[tuple[list[Image], list[str]]]:
    """Endless pictures and what is said of them: in a batch either their captions, or their
    classes, which say neither how many there are nor where; with words left out.
    """
    draw, drawn = random.Random(seed), labelled("toy:compositions_base", "train", 10_000)
    while True:
        said = draw.choice(["caption", "label"])
        samples = [drawn[draw.randrange(len(drawn))] for _ in range(size)]
        texts = [one[said].split() for one in samples]
        kept = [[w for w in text if w not in OFTEN or draw.random() > LEFT_OUT] for text in texts]
        yield [one["images"][0] for one in samples], [" ".join(words) for words in kept]


def contrast(logits_BB: Tensor, said: Sequence[str]) -> Tensor:
    """CLIP's loss, both ways, with pictures of which the same is said left out of the negatives."""
    number = {text: place for place, text in enumerate(dict.fromkeys(said))}
    said_B = torch.tensor([number[text] for text in said])
    same_BB = said_B[:, None] == said_B[None]
    logits_BB = logits_BB.masked_fill(same_BB.fill_diagonal_(False), -torch.inf)
    right_B = torch.arange(len(said))
    ways = [functional.cross_entropy(each, right_B) for each in (logits_BB, logits_BB.T)]
    return sum(ways) / 2


def learn(model: CLIPModel, made: CLIPProcessor, *, steps: int, size: int, lr: float, seed: int):
    """Train all weights."""
    draw, stream = random.Random(seed + 1), batches(size, seed)
    optimizer, schedule = adamw(model.parameters(), lr, steps)
    for step in range(steps):
        images, said = next(stream)
        texts = [draw.choice(SAID).format(text) for text in said]
        output = model(**made(text=texts, images=images, padding=True, return_tensors="pt"))
        loss = contrast(output.logits_per_image, said)
        descend(loss, optimizer, schedule)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP was trained
        report("learn", step, steps, loss)


@torch.no_grad()
def features(model: CLIPModel, made: CLIPProcessor, samples: Sequence[dict]) -> Tensor:
    """Unit image features (N, D)."""
    parts = []
    for start in range(0, len(samples), 100):
        images = [one["images"][0] for one in samples[start : start + 100]]
        pixels = made.image_processor(images, return_tensors="pt")
        parts.append(model.get_image_features(**pixels).pooler_output)
    return functional.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def scores(model: CLIPModel, made: CLIPProcessor, data: str) -> dict[str, float]:
    """The share of held-out pictures whose class is nearest: by its name, and by the mean of
    20 pictures.
    """
    train, test = labelled(data, "train", 20), labelled(data, "test", 20)
    prompts = [template.format(name) for name in train.names for template in templates("plain")]
    tokens = made.tokenizer(prompts, padding=True, return_tensors="pt")
    named_CD = functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    mean_CD = torch.stack([features(model, made, train.of([n])).mean(0) for n in train.names])
    seen_ND, right_N = features(model, made, test), torch.tensor(test.targets)
    found = {"zero_shot": named_CD, "class means": functional.normalize(mean_CD, dim=-1)}
    return {
        how: ((seen_ND @ weight_CD.T).argmax(1) == right_N).double().mean().item()
        for how, weight_CD in found.items()
    }


def main() -> None:
    """Make the tokenizer, train the model, write it with its scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny-clip")
    args = parser.parse_args()
    made = processor(tokenizer())
    made_model, start = model(made.tokenizer, args.seed), time.process_time()
    learn(made_model, made, steps=args.steps, size=args.batch_size, lr=args.lr, seed=args.seed)
    seconds = time.process_time() - start
    digest = save(args.out, made_model, made)
    saved = CLIPModel.from_pretrained(args.out).eval()
    log = {
        "command": f"python recipes/make_clip_base.py --steps {args.steps} --batch-size "
        f"{args.batch_size} --lr {args.lr:g} --seed {args.seed}",
        "parameters": sum(p.numel() for p in saved.parameters()),
        "cpu_seconds": round(seconds),
        "accuracy": {
            data: scores(saved, made, data)
            for data in ("toy:compositions_base", "toy:compositions", "toy:compositions_placed")
        },
        "sha256": digest,
    }
    (args.out / "make_base.log").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(log, indent=2))


if __name__ == "__main__":
    main()
