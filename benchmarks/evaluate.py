"""How fast a task is scored: `python -m benchmarks.evaluate`.

Answers and losses in batches over the same one question at a time; beside them a plain loop of
`generate`, one by one, which gives answers only. On the shipped bases, with questions of several
lengths.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks import timing
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.evaluate import answers
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.model.tiny import KINDS
from mllm_cl.recipe import ModelBlock
from mllm_cl.task import Sample

NEW_TOKENS = 3  # as recipes/quickstart.yaml has it


def one_by_one(model: nn.Module, processor, samples: Sequence[Sample]) -> None:
    """A plain loop."""
    ask, tokenizer = ChatCollator(processor, prompt_only=True), processor.tokenizer
    model.eval()
    for sample in samples:
        inputs = ask([sample])
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def variants(kind: str, number: int, sizes: Sequence[int]) -> dict[str, Callable[[], object]]:
    """The loop, and ours by batch size, on the same samples."""
    block = ModelBlock(model_name_or_path=f"toy:{kind.replace('-', '_')}")
    model, processor = load_model(block), load_processor(block)
    tasks = [toy_task(name, "test", number // 3) for name in ("digit", "word", "size")]
    samples = [task[index] for task in tasks for index in range(len(task))]

    def ours(size: int) -> Callable[[], object]:
        return lambda: answers(
            model, processor, samples, batch_size=size, max_new_tokens=NEW_TOKENS
        )

    found = {f"batch {size}": ours(size) for size in (1, *sizes)}
    return found | {"answers only, one by one": lambda: one_by_one(model, processor, samples)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--json", help="append the rows to this file, one a line")
    arguments = parser.parse_args()
    found = []
    for kind in KINDS:
        context = timing.environment("cpu") | {"benchmark": "evaluate", "model": kind}
        chosen = variants(kind, arguments.samples, arguments.sizes)
        timings = timing.compare(chosen, rounds=arguments.rounds, warmup=1)
        found += timing.rows(timings, baseline="batch 1", context=context)
    print(timing.table("evaluate", found, ("model", "variant", "median_ms", "ratio")))
    if arguments.json:
        timing.append(found, arguments.json)


if __name__ == "__main__":
    main()
