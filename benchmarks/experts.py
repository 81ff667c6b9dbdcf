"""Steps and peak memory of what trains in a sparse model: `python -m benchmarks.experts --device
cpu --dtype bfloat16`, `--device cuda --layers 4 --tokens 4096`.

Layers of Qwen3-VL-30B-A3B's language model (2048 wide, 128 experts of 768, 8 a token). Everywhere
a LoRA on attention trains; then nothing else (`frozen experts`), PEFT's `target_parameters`,
`expert_lora`, and `same` on both, routers too, its guards full of a second task's bases. On a GPU
also how often the host waits for it within a step: what a method adds to the frozen model's should
be nothing.
"""

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks import timing
from benchmarks.step import Variant
from mllm_cl import load_method

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NAMES = ("frozen experts", "PEFT target_parameters", "expert_lora", "same")


def build(layers: int, experts: int, device: str, dtype: torch.dtype) -> nn.Module:
    """That many layers, with a small vocabulary."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=layers,
        vocab_size=1024,
        use_cache=False,
    )
    # Born in their dtype: fp32 weights would be the peak of every variant.
    with torch.device(device), torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """A copy whose weights are the model's own: surgery adds to them and changes none."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


class Peft:
    """The step that PEFT's own expert adapters take."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=list(ATTENTION), target_parameters=stacks
        )
        self.model, self.batch = inject_adapter_in_model(config, model).train(), batch
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self.trained:
            weight.data = weight.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    step = Variant.step


def step_of(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One training step of a variant, ready to be repeated."""
    linears = {"lora_target_modules": ATTENTION, "lora_r": 8, "lora_alpha": 16.0}
    if name == "PEFT target_parameters":
        return Peft(model, batch).step
    if name == "frozen experts":
        method = load_method("finetune")(train_router=False, **linears)
    elif name == "expert_lora":
        method = load_method("expert_lora")(**linears)
    else:
        method = load_method("same")(num_experts=0, experts="lora", **linears)
    return Variant(model, method, batch).step


def batch_of(tokens: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(0, 1024, (1, tokens), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def peak_bytes(name: str, arguments: argparse.Namespace) -> int:
    """The most bytes that a variant holds from the model's making to its third step."""

    def live() -> None:
        step = step_of(name, made(arguments), batch_of(arguments.tokens, arguments.device))
        for _ in range(3):
            step()

    return timing.most_allocated(live, arguments.device)


def made(arguments: argparse.Namespace) -> nn.Module:
    dtype = getattr(torch, arguments.dtype)
    return build(arguments.layers, arguments.experts, arguments.device, dtype)


def measure(arguments: argparse.Namespace) -> list[dict]:
    """The rows of all variants, timed in turn on one set of weights."""
    model, batch = made(arguments), batch_of(arguments.tokens, arguments.device)
    steps = {name: step_of(name, sharing(model), batch) for name in NAMES}
    timings = timing.compare(steps, rounds=arguments.rounds, warmup=2, device=arguments.device)
    rows = timing.rows(timings, baseline="frozen experts", context=context_of(arguments))
    if arguments.device == "cuda":
        for row in rows:
            row["waits"] = waits(steps[row["variant"]])
    return rows


def waits(step: Callable[[], None]) -> int:
    """How often the host waits for the GPU in a step that was made before."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)


def context_of(arguments: argparse.Namespace) -> dict:
    chosen = {key: vars(arguments)[key] for key in ("dtype", "layers", "experts", "tokens")}
    return timing.environment(arguments.device) | chosen | {"benchmark": "experts"}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="append the rows to this file, one a line")
    parser.add_argument("--peak", metavar="VARIANT", help="only print the peak memory of a variant")
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_bytes(arguments.peak, arguments))
        return
    found = measure(arguments)
    command = ["benchmarks.experts"]
    for key in ("device", "dtype", "layers", "experts", "tokens"):
        command += [f"--{key}", str(vars(arguments)[key])]
    found += timing.peak_rows(command, list(NAMES), context_of(arguments))
    columns = ("variant", "median_ms", "ratio", "waits")
    shown = [{"waits": "", **row} for row in found]
    print(timing.table("experts", shown, columns))
    if arguments.json:
        timing.append(found, arguments.json)


if __name__ == "__main__":
    main()
