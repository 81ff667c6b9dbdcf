"""What the package adds around somebody's own training: `python -m benchmarks.overhead`.

continual(Trainer) with `finetune` over the plain Trainer, both full runs of the same steps on the
same tiny model; seconds of `import mllm_cl` and `mllm-cl --help` in new processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile

from benchmarks import timing
from mllm_cl import Task, continual, load_method
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.recipe import ModelBlock

SETTINGS = {"lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "use_peft": False}


def trainers(folder: str, steps: int):
    """Two functions that train the same weights on the same batches, plainly and continually."""
    from transformers import Trainer, TrainingArguments

    block = ModelBlock(model_name_or_path="toy:qwen3_vl_moe")
    processor, samples = load_processor(block), toy_task("arrow", "train", 512)
    samples = [samples[index] for index in range(512)]
    method = load_method("finetune")(**SETTINGS)
    task = Task("arrow", 1, samples, samples, lambda predictions, references: 0.0)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        max_steps=steps,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    common = {"args": arguments, "train_dataset": samples, "data_collator": ChatCollator(processor)}
    plain_model, model = load_model(block), load_model(block)
    method.before_task(plain_model, task, None)
    plain = Trainer(model=plain_model, **common)
    ours = continual(Trainer)(model=model, method=method, task=task, **common)
    return plain.train, ours.train


def seconds_of(*command: str) -> None:
    """Run a command in a new process."""
    subprocess.run([sys.executable, *command], check=True, capture_output=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", help="append the rows to this file, one a line")
    arguments = parser.parse_args()
    context = timing.environment("cpu") | {"benchmark": "overhead"}
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = trainers(folder, arguments.steps)
        timings = timing.compare(
            {"Trainer": plain, "continual(Trainer)": ours}, rounds=arguments.rounds, warmup=1
        )
    found = timing.rows(timings, baseline="Trainer", context=context)
    starts = {
        "python -c pass": lambda: seconds_of("-c", "pass"),
        "import mllm_cl": lambda: seconds_of("-c", "import mllm_cl"),
        "mllm-cl --help": lambda: seconds_of("-m", "mllm_cl", "--help"),
    }
    timings = timing.compare(starts, rounds=arguments.rounds, warmup=1)
    found += timing.rows(timings, baseline="python -c pass", context=context)
    print(timing.table("overhead", found, ("variant", "median_ms", "ratio")))
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)


if __name__ == "__main__":
    main()
