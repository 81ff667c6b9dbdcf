"""Trains the base of real_small.yaml and real_text.yaml: the shipped tiny Qwen3-VL-MoE gets a
tokenizer for real text, goes on with its skills, and learns what real photographs show.

    OMP_NUM_THREADS=1 python recipes/make_real_base.py

No question or picture of the recipes' tasks is trained on. Their training texts say which words the
tokenizer has, and their answers are repeated, alone, as a base knows words before it knows a task.
Ten minutes on one core. Writes bases/real, with `make_base.log`: what was run and what came out.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from make_base import accuracy, adamw, answer, descend, report, save, skills, stream
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from mllm_cl.data import read
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import BASE_SKILLS
from mllm_cl.model.tiny import CHAT_TEMPLATE, tiny_base, tiny_model, toy_processor
from mllm_cl.task import Sample

KIND = "qwen3-vl-moe"
DATA = "${MLLM_CL_DATA:-../shared/data}/"
WORDS = ("vl/easy_vqa", "vl/bccd", "vl/gtsrb", "vl/nlvr", "vl/tabmwp")
WORDS += ("text/agnews", "text/boolq", "text/dbpedia", "text/mnli")
# Pictures of 32 px become 16 image tokens, of 224 x 168 px 63. (ours)
PIXELS = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}


def written(sample: Sample) -> str:
    """All that is said in a sample."""
    parts = [part for message in sample["messages"] for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def real_processor(vocabulary: int) -> ProcessorMixin:
    """The toy processor with larger pictures, and a tokenizer that has the words of the tasks."""
    toy = toy_processor(KIND)
    texts = [written(sample) for name in WORDS for sample in read(DATA + name, "train", None, 0)]
    # So often that every word of the skills becomes one token, as it is in the shipped base.
    tokens = [*toy.tokenizer.get_vocab()]
    texts += 1000 * [toy.tokenizer.convert_tokens_to_string([token]) for token in tokens]
    tokenizer = toy.tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)
    toy.image_processor.size = PIXELS
    return type(toy)(
        image_processor=toy.image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE
    )


def widened(processor: ProcessorMixin, seed: int) -> PreTrainedModel:
    """The shipped base with an embedding for every token; what both vocabularies have is kept."""
    shipped = AutoModelForImageTextToText.from_pretrained(tiny_base(KIND))
    model = tiny_model(KIND, processor.tokenizer, seed)
    place, known = processor.tokenizer.get_vocab(), toy_processor(KIND).tokenizer.get_vocab()
    shared = sorted(set(place) & set(known))
    weights, new = shipped.state_dict(), model.state_dict()
    for name in [name for name in weights if weights[name].shape != new[name].shape]:
        rows = weights[name][[known[token] for token in shared]]
        weights[name] = new[name].index_put((torch.tensor([place[t] for t in shared]),), rows)
    model.load_state_dict(weights)
    return model


def photographs(split: str) -> Sequence[Sample]:
    """CIFAR-10, its classes as answers."""
    asked = {"prompt": "What is in the picture?", "answer": "class_name"}
    return read(DATA + "cil/cifar10", split, None, 0, **asked)


def chat(question: str, told: str, images: Sequence[Image] = ()) -> Sample:
    """One question, below its pictures, and its answer."""
    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    told = [{"type": "text", "text": told}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return {"id": question, "messages": messages, "images": list(images)}


def chosen(photograph: Sample, classes: Sequence[str], draw: random.Random) -> Sample:
    """A photograph whose answer is one of four."""
    told = answer(photograph)
    others = draw.sample([each for each in classes if each != told], 3)
    options = ", ".join(draw.sample([told, *others], 4))
    return chat(f"What is in the picture? One of: {options}.", told, photograph["images"])


def choices(seed: int) -> list[Sample]:
    """The held-out photographs, each with four answers to choose from."""
    draw, seen = random.Random(seed), photographs("test")
    classes = sorted({answer(sample) for sample in seen})
    return [chosen(sample, classes, draw) for sample in seen]


def repeated(
    phrases: Sequence[str], most: int, draw: random.Random, images: Sequence[Image]
) -> Sample:
    """One to `most` phrases to say again.

    Without these, what is no skill's answer is never answered: training would only push it away,
    and in the recipes the embeddings are frozen.
    """
    said = " ".join(draw.choices(phrases, k=draw.randint(1, most)))
    return chat(f"Repeat:\n{said}", said, images)


def found(phrases: Sequence[str], words: Sequence[str], draw: random.Random) -> Sample:
    """A text in which one of up to eight phrases occurs: which?"""
    options = draw.sample(phrases, draw.randint(2, min(8, len(phrases))))
    told, text = draw.choice(options), draw.choices(words, k=draw.randint(2, 12))
    text.insert(draw.randint(0, len(text)), told)
    return chat(f"{' '.join(text)}\nOne of: {', '.join(options)}.", told)


def words_of(processor: ProcessorMixin) -> list[str]:
    """The tokens that are words."""
    to_text = processor.tokenizer.convert_tokens_to_string
    words = [to_text([token]) for token in sorted(processor.tokenizer.get_vocab())]
    return [word.strip() for word in words if word[0] == " " and word.strip().isalnum()]


def answers_of(name: str) -> list[str]:
    """The answers that occur in a task's training set, each once and without its question."""
    return sorted({answer(sample) for sample in read(DATA + name, "train", None, 0)})


def mixture(
    phrases: Sequence[Sequence[str]],
    words: Sequence[str],
    *,
    most: int,
    batch_size: int,
    seed: int,
) -> Iterator[list[Sample]]:
    """Endless batches: skills, photographs, and phrases to repeat and to find, a quarter each."""
    draw, share = random.Random(seed), batch_size // 4
    skill, seen = stream(share, seed), photographs("train")
    classes = sorted({answer(sample) for sample in seen})
    while True:
        shown = [seen[row] for row in draw.sample(range(len(seen)), 2 * share)]
        batch = next(skill)[1] + [found(draw.choice(phrases), words, draw) for _ in range(share)]
        batch += [chosen(each, classes, draw) for each in shown[:share]]
        for each in shown[share:]:
            images = draw.choice([[], each["images"]])
            batch.append(repeated(draw.choice(phrases), most, draw, images))
        yield batch


def learn(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batches: Iterator[list[Sample]],
    *,
    steps: int,
    lr: float,
) -> None:
    """Train all weights on the batches."""
    collate = ChatCollator(processor)
    optimizer, schedule = adamw(model.parameters(), lr, steps)
    for step in range(steps):
        loss = model(**collate(next(batches)), output_router_logits=True).loss
        descend(loss, optimizer, schedule)
        report("learn", step, steps, loss)


def main() -> None:
    """Make the processor, widen the shipped base, train it, write it with its scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--words", type=int, default=1100, help="steps with words of any kind")
    parser.add_argument("--phrases", type=int, default=400, help="steps with the tasks' answers")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bases/real"))
    args = parser.parse_args()
    processor = real_processor(args.vocabulary)
    model, start = widened(processor, args.seed), time.process_time()
    words = words_of(processor)
    size, seed = args.batch_size, args.seed
    batches = mixture([words], words, most=8, batch_size=size, seed=seed)
    learn(model, processor, batches, steps=args.words, lr=args.lr)
    phrases = [answers_of(name) for name in WORDS]
    batches = mixture(phrases, words, most=1, batch_size=size, seed=seed + 1)
    learn(model, processor, batches, steps=args.phrases, lr=args.lr / 2)
    seconds = time.process_time() - start
    digest = save(args.out, model, processor)
    saved = AutoModelForImageTextToText.from_pretrained(args.out).eval()
    log = {
        "command": f"python recipes/make_real_base.py --words {args.words} --phrases "
        f"{args.phrases} --batch-size {args.batch_size} --lr {args.lr:g} "
        f"--vocabulary {args.vocabulary} --seed {args.seed}",
        "parameters": sum(p.numel() for p in saved.parameters()),
        "cpu_seconds": round(seconds),
        "skills": skills(saved, processor, BASE_SKILLS),
        "cifar10, one of four": accuracy(saved, processor, choices(seed)),
        "sha256": digest,
    }
    (args.out / "make_base.log").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(log, indent=2))


if __name__ == "__main__":
    main()
