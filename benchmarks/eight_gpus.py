"""What eight GPUs of 80 GB give, on paper: `python -m benchmarks.eight_gpus`.

Qwen3-VL-30B-A3B from its config alone, one sample of `--tokens` tokens a GPU, gradient
checkpointing, bf16. Bytes are those of `mllm-cl run --dry-run`. Time is a model, not a measurement:
a token takes 6 floating point operations per active parameter (forward, forward again, and the
gradient of what enters; frozen weights have none of their own) at `--mfu` of 989 teraflops, and
gradients and gathered weights cross NVLink at `--bandwidth` bytes a second, none of it overlapped.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import Qwen3VLMoeConfig

from benchmarks import timing
from mllm_cl.forecast import Forecast, Launch, forecast
from mllm_cl.recipe import Recipe

GPUS, PEAK = 8, 989e12
ACTIVE = 3.3e9  # parameters that a token meets, as the model's card says
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"lora_target_modules": ATTENTION, "lora_r": 8}
VARIANTS = {
    "finetune, LoRA on attention": ({"name": "finetune"}, {}),
    "expert_lora": ({"name": "expert_lora"}, {}),
    "same on experts and routers": ({"name": "same", "num_experts": 0, "experts": "lora"}, {}),
    "the same in four bits": (
        {"name": "same", "num_experts": 0, "experts": "lora"},
        {"load_in_4bit": True},
    ),
}


def config() -> Qwen3VLMoeConfig:
    """The shape of Qwen3-VL-30B-A3B."""
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }
    vision = {"hidden_size": 1152, "depth": 27, "num_heads": 16, "out_hidden_size": 2048}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision)


def recipe(model: str, method: dict, extra: dict) -> Recipe:
    """Two tasks on that model; their data are never looked at."""
    tasks = [{"name": name, "data": f"toy:{name}"} for name in ("arrow", "dial")]
    training = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    tree = {
        "model": {"model_name_or_path": model, "dtype": "bfloat16", **EXPERTS, **extra},
        "method": method,
        "tasks": tasks,
        "training": training,
    }
    return Recipe.from_tree(tree, "eight_gpus")


def seconds(found: Forecast, arguments: argparse.Namespace) -> tuple[float, float]:
    """Of a step of one sample a GPU: computing, and what crosses between the GPUs."""
    computing = 6 * ACTIVE * arguments.tokens / (arguments.mfu * PEAK)
    # A ring hands each byte on to all others but one; gradients are summed, then spread.
    crossing = 2 * GPUS * found.device_bytes["gradients"] * (GPUS - 1) / GPUS
    if found.launch.shards("gradients") == 1:
        crossing /= GPUS
    if found.launch.shards("weights") > 1:  # gathered for forward, forward again and backward
        crossing += 3 * found.device_bytes["frozen weights"] * (GPUS - 1)
    return computing, crossing / arguments.bandwidth


def row(variant: str, engine: str, model: str, arguments: argparse.Namespace) -> dict | None:
    """Bytes and time; None where the engine cannot."""
    method, extra = VARIANTS[variant]
    sharded = engine in ("zero3", "fsdp2")
    if extra and sharded:
        return None
    found = forecast(recipe(model, method, extra), Launch(engine, GPUS, "bf16"), arguments.tokens)
    computing, crossing = seconds(found, arguments)
    rate = GPUS * arguments.tokens / (computing + crossing)
    parts = {name: f"{size / 2**30:.1f}" for name, size in found.device_bytes.items()}
    total = sum(found.device_bytes.values()) / 2**30
    return {
        "variant": variant,
        "engine": engine,
        **parts,
        "GiB a GPU": f"{total:.1f}" + (" (too much)" if total > 74 else ""),
        "kept": f"{found.kept_bytes / 2**30:.2f}",
        "ms computing": round(computing * 1e3),
        "ms crossing": round(crossing * 1e3),
        "tokens/s": f"{rate / 1e3:.0f}k",
    }


def main() -> None:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--mfu", type=float, default=0.25)
    parser.add_argument("--bandwidth", type=float, default=300e9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config().save_pretrained(Path(folder))
        found = [
            row(variant, engine, folder, arguments)
            for variant in VARIANTS
            for engine in ("ddp", "zero2", "zero3")
        ]
    rows = [each for each in found if each is not None]
    print(timing.table("eight GPUs, on paper", rows, tuple(rows[0])))


if __name__ == "__main__":
    main()
