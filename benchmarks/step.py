"""Whole training steps, the task boundary and peak memory, each as a ratio inside one run:
`python -m benchmarks.step --device cpu --shape tiny`, `--device cuda --shape llava-7b --dtype
bfloat16`.

Variants of one step (forward, backward, clipping, AdamW) on the same model and batch: `moe_lora`;
`same` with its guards full of a second task's bases; `same` with the covariance tracked while
training as well.
"""

import argparse
import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import timing
from mllm_cl import Memory, Method, Task, load_method
from mllm_cl.model.adapt import Site
from mllm_cl.model.surgery import advance, guards
from mllm_cl.model.watch import Watch

TRACK_EVERY = 20  # as often as the released SAME refreshes


@dataclass(frozen=True)
class Shape:
    """The language model of a vision-language model, with fewer layers than the real one."""

    width: int
    inner: int
    heads: int
    layers: int
    batch: int
    tokens: int
    steps_per_task: int


SHAPES = {
    "tiny": Shape(512, 1408, 8, 2, 4, 128, 1000),
    "llava-7b-1": Shape(4096, 11008, 32, 1, 1, 768, 1000),  # one layer: what a CPU can hold
    "llava-7b": Shape(4096, 11008, 32, 8, 4, 768, 1000),
}


def build(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama of that shape, as in LLaVA-1.5-7B, with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_hidden_layers=shape.layers,
        vocab_size=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype)


class Variant:
    """One method on a copy of the model, with its optimizer."""

    def __init__(self, model: nn.Module, method: Method, batch: dict[str, Tensor]) -> None:
        self.model, self.method, self.batch, self.memory = model, method, batch, Memory()
        self.task = Task("one", 1, [], [], lambda predictions, references: 0.0)
        self.method.before_task(model, self.task, self.memory)
        self.boundary_seconds = self._second_task()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.trained = trained
        model.train()

    def _second_task(self) -> float:
        """End a first task and start a second, so that guards have bases; the seconds beside the
        forwards.
        """
        batches, start = [self.batch], time.perf_counter()
        self.method.start_task(self.model, self.task, self.memory, batches, lambda total: total)
        self.method.after_task(self.model, self.task, self.memory, batches, lambda total: total)
        for one in guards(self.model).values():
            advance(one)
        self.method.start_task(self.model, self.task, self.memory, batches, lambda total: total)
        return time.perf_counter() - start

    def step(self) -> None:
        """Forward, backward, clipping and AdamW."""
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def on_linears(name: str) -> Method:
    """A method that trains adapters on the feed-forward linears, as SAME's paper does."""
    return load_method(name)(lora_target_modules=("gate_proj", "up_proj", "down_proj"))


def sources(variant: Variant) -> dict[str, nn.Module]:
    """The modules whose input `same` tracks."""
    sites: list[Site] = variant.method.sites(variant.model)
    return {site.source: variant.model.get_submodule(site.source) for site in sites}


def batch_of(shape: Shape, device: str) -> dict[str, Tensor]:
    tokens = torch.randint(0, 1024, (shape.batch, shape.tokens), device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def peak_bytes(name: str, shape: Shape, device: str, dtype: torch.dtype) -> int:
    """The most bytes of tensors that a method holds from the model's making to its second task's
    third step, as torch's allocator counts them. For a process that does nothing else.
    """

    def live() -> None:
        variant = Variant(build(shape, device, dtype), on_linears(name), batch_of(shape, device))
        for _ in range(3):
            variant.step()

    return timing.most_allocated(live, device)


def peaks(shape: str, device: str, dtype: str) -> list[dict]:
    """A row of peak memory per method, each measured in a process of its own."""
    command = ["benchmarks.step", "--shape", shape, "--device", device, "--dtype", dtype]
    context = {**timing.environment(device), "benchmark": "step", "dtype": dtype}
    return timing.peak_rows(command, ["moe_lora", "same"], context)


def measure(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    """The rows of all variants."""
    model = build(shape, device, dtype)
    batch = batch_of(shape, device)
    plain = Variant(copy.deepcopy(model), on_linears("moe_lora"), batch)
    same = Variant(copy.deepcopy(model), on_linears("same"), batch)
    tracked = Variant(model, on_linears("same"), batch)
    watch = Watch(tracked.model, sources(tracked), every=TRACK_EVERY)
    variants = {
        "moe_lora": plain.step,
        "same": same.step,
        f"same, tracked every {TRACK_EVERY}": tracked.step,
    }
    timings = timing.compare(variants, rounds=rounds, warmup=3, device=device)
    watch.close()
    context = timing.environment(device) | {"dtype": str(dtype), "benchmark": "step"}
    found = timing.rows(timings, baseline="moe_lora", context=context)
    task = shape.steps_per_task * timings["same"].median
    share = same.boundary_seconds / task
    found.append(
        {**context, "variant": "task boundary / task", "median_ms": 0, "ratio": round(share, 4)}
    )
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="append the rows to this file, one a line")
    parser.add_argument("--peak", metavar="METHOD", help="only print the peak memory of a method")
    arguments = parser.parse_args()
    shape, device, dtype = SHAPES[arguments.shape], arguments.device, arguments.dtype
    if arguments.peak:
        print(peak_bytes(arguments.peak, shape, device, getattr(torch, dtype)))
        return
    found = measure(shape, device, getattr(torch, dtype), arguments.rounds)
    found += peaks(arguments.shape, device, dtype)
    print(
        timing.table(
            f"step, {arguments.shape}, {arguments.dtype}", found, ("variant", "median_ms", "ratio")
        )
    )
    if arguments.json:
        timing.append(found, arguments.json)


if __name__ == "__main__":
    main()
