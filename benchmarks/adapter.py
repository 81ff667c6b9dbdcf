"""Forward and backward of one MoELoRA against one LoRA of equal total rank and against a loop over
the experts: `python -m benchmarks.adapter --shape small`.
"""

# T tokens, D input width, O output width, E experts, R LoRA rank of one expert.

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timing
from mllm_cl.model.moe_lora import MoELoRA

SHAPES = {  # name: (D, O, T)
    "small": (512, 1408, 1024),
    "llava-7b": (4096, 11008, 2048),  # gate_proj and up_proj of Vicuna-7B
}
NUM_EXPERTS, RANK, ALPHA = 8, 8, 16.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("variant", "median_ms", "ratio", "saved_mb")


class LoRA(nn.Module):
    """One LoRA, the baseline: y = scale * B A x.

    It scales in rank space, as ours does. PEFT scales the wide output, one pass more over (T, O).
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(0.01 * torch.randn(rank, in_features))
        self.lora_B = nn.Parameter(0.01 * torch.randn(out_features, rank))

    def forward(self, input_TD: Tensor) -> Tensor:
        low_TR = F.linear(input_TD, self.lora_A.to(input_TD.dtype))
        return F.linear(2.0 * low_TR, self.lora_B.to(input_TD.dtype))


class LoopedMoELoRA(MoELoRA):
    """The same function as MoELoRA, one expert after the other."""

    def forward(self, input_TD: Tensor) -> Tensor:
        weight_TE = (self.scale * self.route(input_TD)).to(input_TD.dtype)
        output_TO = 0.0
        for expert in range(self.num_experts):
            low_TR = F.linear(input_TD, self.lora_A[expert].to(input_TD.dtype))
            answer_TO = F.linear(low_TR, self.lora_B[expert].to(input_TD.dtype))
            output_TO = output_TO + weight_TE[:, expert, None] * answer_TO
        return output_TO


def adapters(in_features: int, out_features: int, device: str) -> dict[str, nn.Module]:
    """Variant name -> adapter, the baseline first; the mixtures all have the same weights."""
    torch.manual_seed(0)
    setting = {"num_experts": NUM_EXPERTS, "rank": RANK, "alpha": ALPHA}
    variants: dict[str, nn.Module] = {
        "one LoRA": LoRA(in_features, out_features, NUM_EXPERTS * RANK),
        "MoELoRA": MoELoRA(in_features, out_features, **setting),
        "loop over experts": LoopedMoELoRA(in_features, out_features, **setting),
        "2 of 8 learn": MoELoRA(in_features, out_features, **setting),
        "2 of 8 routed": MoELoRA(in_features, out_features, **setting),
    }
    nn.init.normal_(variants["MoELoRA"].lora_B, std=0.01)
    for name in ("loop over experts", "2 of 8 learn", "2 of 8 routed"):
        variants[name].load_state_dict(variants["MoELoRA"].state_dict())
    for name in ("2 of 8 learn", "2 of 8 routed"):
        variants[name].active = torch.arange(NUM_EXPERTS) < 2
    variants["2 of 8 routed"].masks_routing = True
    return {name: module.to(device) for name, module in variants.items()}


def step(adapter: nn.Module, base: nn.Linear | None, input_TD: Tensor, grad_TO: Tensor) -> None:
    """One forward and backward pass; the gradients are dropped."""
    output_TO = adapter(input_TD)
    if base is not None:
        output_TO = base(input_TD) + output_TO
    output_TO.backward(grad_TO)
    adapter.zero_grad(set_to_none=True)
    input_TD.grad = None


def saved_bytes(run: Callable[[], object], *, besides: list[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, the adapter's input among them.

    Each storage counts once, and those of `besides` (the parameters) not at all.
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    return sum(size for address, size in sizes.items() if address not in known)


def measure(options: argparse.Namespace, *, with_base: bool) -> list[dict]:
    """The rows of one table: every variant, with or without the frozen layer beside it."""
    in_features, out_features, num_tokens = SHAPES[options.shape]
    dtype = DTYPES[options.dtype]
    variants = adapters(in_features, out_features, options.device)
    place = {"dtype": dtype, "device": options.device}
    base = nn.Linear(in_features, out_features, **place).requires_grad_(False)
    input_TD = torch.randn(num_tokens, in_features, **place).requires_grad_()
    grad_TO = torch.randn(num_tokens, out_features, **place)
    with torch.no_grad():
        ours, looped = (variants[name](input_TD) for name in ("MoELoRA", "loop over experts"))
    # bf16 rounds each expert's answer in the loop and only their sum in ours.
    assert (ours - looped).norm() < 0.02 * looped.norm(), "the loop is not the same function"

    def runner(name: str) -> Callable[[], None]:
        return lambda: step(variants[name], base if with_base else None, input_TD, grad_TO)

    runs = {name: runner(name) for name in variants}
    timings = timing.compare(
        runs, rounds=options.rounds, warmup=options.warmup, device=options.device
    )
    context = timing.environment(options.device) | {
        "shape": options.shape,
        "dtype": options.dtype,
        "with_base": with_base,
    }
    records = timing.rows(timings, baseline="one LoRA", context=context)
    for record in records:
        adapter = variants[record["variant"]]
        parameters = [*adapter.parameters(), *base.parameters()]
        kept = saved_bytes(runs[record["variant"]], besides=parameters)
        record["saved_mb"] = round(kept / 2**20, 2)
    return records


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)

    records = []
    for with_base in (False, True):
        part = measure(options, with_base=with_base)
        title = "with the frozen linear layer" if with_base else "adapter alone"
        print(timing.table(f"\n{title}: {options.shape}, {options.dtype}", part, COLUMNS))
        records += part
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
