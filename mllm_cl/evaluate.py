"""Answers of a model to the questions of a task, and its loss on the right ones: the same for any
batch size and any number of processes.

That holds in fp32, where only an exact tie of two tokens could fall otherwise. In bf16 a product of
another shape rounds otherwise, and near ties are common.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import nn
from tqdm import tqdm

from mllm_cl import engine
from mllm_cl.data.chat import ChatCollator
from mllm_cl.metrics.answers import metric
from mllm_cl.metrics.pairs import Reference, most_common
from mllm_cl.metrics.scores import CONSTANT, LOSSES, MATCHES
from mllm_cl.model.watch import evaluating
from mllm_cl.progress import Progress
from mllm_cl.respond import respond, weigh
from mllm_cl.task import Sample, Task

JSON = engine.JSON
WINDOW = 8  # batches whose samples are in memory at a time, to be sorted by length


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample, what it should have said, and how likely that was to it.

    `nll` is the negative log-likelihood of the sample's own answer, summed over its `num_tokens`
    tokens, the end of turn included; None where it is no number.
    """

    id: str
    prediction: str
    reference: Reference
    nll: float | None
    num_tokens: int


def answers(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None = None,
    name: str = "",
    quiet: bool = True,
) -> list[Answer]:
    """Greedy answers to all samples, in their order, on every rank. Collective.

    Each rank answers its share, in batches of similar length; all make the same number of calls,
    which sharded parameters need to be gathered. With `progress`, what an interrupted call had
    answered is not answered again.
    """
    collate, share = ChatCollator(processor), _share(len(samples))
    total = -(-len(share) // batch_size)
    if progress:
        how = f"{engine.world_size()} {batch_size} {max_new_tokens}"
        progress = replace(progress, made_by=f"{progress.made_by} {how}")
    rounds = progress.read() if progress else []
    bar = tqdm(desc=f"scoring {name}", total=total, initial=len(rounds), disable=quiet, leave=False)
    engine.let_generate(model)
    with evaluating(model), bar:
        for batch in _batches(samples, share, batch_size, skip=len(rounds)):
            rows = _answer(model, collate, batch, max_new_tokens)
            rounds.append(engine.gather(rows))
            if progress:
                progress.append(len(rounds) - 1, rounds[-1])
            bar.update()
    by_index = {index: row for rows in rounds for index, *row in rows}
    return [Answer(*by_index[index]) for index in range(len(samples))]


def loss(rows: Sequence[Answer]) -> float:
    """The mean negative log-likelihood per token of the right answers; NaN where one is none."""
    total = sum(math.nan if row.nll is None else row.nll for row in rows)
    return total / sum(row.num_tokens for row in rows)


def row(
    tasks: Iterable[Task], given: Mapping[str, Sequence[Answer]]
) -> dict[str, dict[str, float | None]]:
    """What answers add to the matrices of a run, by matrix and task: the score by the task's own
    metric, that of giving the most common right answer every time, the matches by `MATCHES`, and
    the loss; None where it is no number. Of classes one answer is given to all stages alike.
    """
    tasks = [task for task in tasks if task.name in given]
    classes = [one.reference for task in tasks if task.labels for one in given[task.name]]
    kinds = ("scores", CONSTANT, *MATCHES, LOSSES)
    found: dict[str, dict[str, float | None]] = {key: {} for key in kinds}
    for task in tasks:
        said = [answer.prediction for answer in given[task.name]]
        right = [answer.reference for answer in given[task.name]]
        found["scores"][task.name] = task.metric(said, right)
        every = classes if task.labels else right
        found[CONSTANT][task.name] = task.metric([most_common(every)] * len(every), every)
        for key in MATCHES:
            found[key][task.name] = metric(key)(said, right)
        mean = loss(given[task.name])
        found[LOSSES][task.name] = mean if math.isfinite(mean) else None
    return found


def reference(sample: Sample) -> Reference:
    """What should be answered: the sample's `references`, or the text of its last message."""
    if sample.get("references"):
        return [str(each) for each in sample["references"]]
    content = sample["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _share(number: int) -> list[int]:
    """This rank's indices; short shares are filled with the last index, which is answered twice."""
    world = engine.world_size()
    padded = [min(index, number - 1) for index in range(-(-number // world) * world)]
    return padded[engine.rank() :: world]


def _batches(
    samples: Sequence[Sample], share: Sequence[int], batch_size: int, *, skip: int
) -> Iterator[list[tuple[int, Sample]]]:
    """The share's batches of (index, sample) but for the first `skip`: of each window the longest
    first, so that little is padded. Each sample is read once.
    """
    size = WINDOW * batch_size
    for start in range(0, len(share), size):
        indices = share[start : start + size]
        done = max(skip - start // batch_size, 0) * batch_size
        if done >= len(indices):
            continue
        window = [(index, samples[index]) for index in indices]
        window.sort(key=lambda pair: -_length(pair[1]))
        for first in range(done, len(window), batch_size):
            yield window[first : first + batch_size]


def _length(sample: Sample) -> float:
    """About how many tokens a prompt has, of 4 letters or 1024 pixels each: only for the order."""
    texts = [
        content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        for content in (message["content"] for message in sample["messages"][:-1])
    ]
    pixels = sum(image.width * image.height for image in sample.get("images") or ())
    return sum(map(len, texts)) / 4 + pixels / 1024


def _answer(
    model: nn.Module, collate: ChatCollator, batch: list[tuple[int, Sample]], max_new_tokens: int
) -> list[list[JSON]]:
    """A row per sample: its index, then what an `Answer` holds."""
    device, samples = next(model.parameters()).device, [sample for _, sample in batch]
    sees = collate.processor is not collate.tokenizer
    if engine.world_size() > 1 and sees and not any(sample.get("images") for sample in samples):
        # Where another process has a picture its vision tower is called, before the first token,
        # and sharded weights of the tower are gathered by all or by none.
        samples.append(_pictured())
    inputs = {name: value.to(device) for name, value in collate(samples).items()}
    weights = weigh(model, inputs)
    texts = respond(model, collate.tokenizer, inputs, max_new_tokens)
    rows = zip(batch, texts, weights, strict=False)  # without the one that only has a picture
    return [
        [
            index,
            str(sample["id"]),
            text,
            reference(sample),
            nll if math.isfinite(nll) else None,
            number,
        ]
        for (index, sample), text, (nll, number) in rows
    ]


def _pictured() -> Sample:
    """A question about a grey picture that nobody asks."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "."}]
    return {"id": "grey", "messages": messages, "images": [Image.new("RGB", (64, 64), "grey")]}
