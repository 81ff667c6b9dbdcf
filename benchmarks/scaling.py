"""Two processes beside one, each with a batch of its own: `python -m benchmarks.scaling`.

Weak scaling of whole steps (forward, backward, all-reduce, clipping, AdamW) on the native
quickstart's model, DDP over gloo: a step of one process over a step of two, each process on one
thread, so a machine with two idle cores is asked for. What two cores share (memory, caches, or a
core, where they are threads of one) slows two processes that know nothing of each other as well:
`apart` is a step of such a pair, and `efficiency` the share of it that is left together. Launches
take turns; each reports the median of its steps. Tokens a second count what is not padding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import timing

METHODS = {
    "finetune": {},
    "same": {"num_experts": 0},
    "same, experts": {"num_experts": 0, "experts": "lora"},
}
ALONE = [sys.executable]
PAIR = [*ALONE, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(variant: str, steps: int, batch: int, folder: str) -> dict[str, float]:
    """Seconds a step and tokens a second of this process."""
    import torch
    from transformers import Trainer, TrainingArguments

    from benchmarks.overhead import Clock
    from mllm_cl import Memory, Task, continual, load_method
    from mllm_cl.data.chat import ChatCollator
    from mllm_cl.data.toy import toy_task
    from mllm_cl.model.load import load_model, load_processor
    from mllm_cl.recipe import ModelBlock

    torch.set_num_threads(1)
    block = ModelBlock(model_name_or_path="toy:qwen3_vl_moe")
    clock, memory = Clock(time.perf_counter), Memory()
    collator = ChatCollator(load_processor(block))
    model = load_model(block)
    method = load_method(variant.partition(",")[0])(
        lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        use_peft=False,
        **METHODS[variant],
        **({"calibration_tokens": 2048} if variant != "finetune" else {}),
    )
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=steps,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    for index, name in enumerate(("colour", "arrow")):  # the second has something to protect
        samples = toy_task(name, "train", 1024)
        continual(Trainer)(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            callbacks=[clock],
            method=method,
            task=Task(name, index + 1, samples, samples, lambda predictions, references: 0.0),
            memory=memory,
        ).train()
    ticks = clock.ticks
    step = median(later - tick for tick, later in zip(ticks, ticks[1:], strict=False))
    tokens = int(collator([samples[index] for index in range(batch)])["attention_mask"].sum())
    return {"seconds": step, "tokens": tokens / step}


def launch(
    words: list[str], variant: str, arguments: argparse.Namespace, times: int = 1
) -> dict[str, float]:
    """What `times` launches at once found; of several processes the slowest one."""
    with tempfile.TemporaryDirectory() as home:
        folders = [Path(home, str(number)) for number in range(times)]
        for folder in folders:
            folder.mkdir()
        started = [
            subprocess.Popen(
                [*words, "-m", "benchmarks.scaling"]
                + ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
                + ["--train", variant, "--folder", str(folder)],
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for folder in folders
        ]
        codes = [one.wait() for one in started]
        assert not any(codes), codes
        found = [json.loads(path.read_text()) for path in Path(home).glob("*/rank*.json")]
    return max(found, key=lambda row: row["seconds"])


def compare(arguments: argparse.Namespace) -> list[dict]:
    """A row for each method."""
    context = timing.environment("cpu") | {"benchmark": "scaling"}
    rows = []
    for variant in METHODS:
        rounds = [
            (
                launch(ALONE, variant, arguments),
                launch(ALONE, variant, arguments, times=2),
                launch(PAIR, variant, arguments),
            )
            for _ in range(arguments.rounds)
        ]
        rows.append(
            {
                **context,
                "variant": variant,
                "ms, one": round(median(one["seconds"] for one, _, _ in rounds) * 1e3, 1),
                "ms, apart": round(median(pair["seconds"] for _, pair, _ in rounds) * 1e3, 1),
                "ms, two": round(median(two["seconds"] for _, _, two in rounds) * 1e3, 1),
                "tokens/s, one": round(median(one["tokens"] for one, _, _ in rounds)),
                "tokens/s, two": round(median(2 * two["tokens"] for _, _, two in rounds)),
                "efficiency": round(
                    median(pair["seconds"] / two["seconds"] for _, pair, two in rounds), 3
                ),
                "of one": round(
                    median(one["seconds"] / two["seconds"] for one, _, two in rounds), 3
                ),
                "rounds": arguments.rounds,
            }
        )
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--train", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        found = train(arguments.train, arguments.steps, arguments.batch, arguments.folder)
        rank = os.environ.get("RANK", "0")
        Path(arguments.folder, f"rank{rank}.json").write_text(json.dumps(found))
        return
    columns = ("variant", "ms, one", "ms, apart", "ms, two", "tokens/s, one", "tokens/s, two")
    columns += ("efficiency", "of one")
    print(timing.table("scaling", compare(arguments), columns))


if __name__ == "__main__":
    main()
