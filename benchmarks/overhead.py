"""What the package adds around somebody's own training: `python -m benchmarks.overhead`.

continual(Trainer) with `finetune` over the plain Trainer, both full runs of the same steps on the
same tiny model: what a step takes, what a run takes besides its steps, and the whole. In CPU time,
which neighbours on the machine disturb less than wall time (the plain Trainer against itself gave
0.98 to 1.01), and in Python calls, which nothing disturbs. Then `import mllm_cl` and
`mllm-cl --help` in new processes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from statistics import median

from transformers import TrainerCallback

from benchmarks import timing
from mllm_cl import Task, continual, load_method
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.recipe import ModelBlock

NAMES = ("Trainer", "continual(Trainer)")
NOTHING: dict[str, tuple[float, ...]] = dict.fromkeys(NAMES, ())
SETTINGS = {"lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "use_peft": False}


class Clock(TrainerCallback):
    """What `now` said when a run began, after each of its steps, and when it ended."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.ticks = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ticks.append(self.now())

    def of(self, run: Callable[[], object]) -> tuple[float, list[float]]:
        """What a whole run takes, and each step but its first."""
        start = self.now()
        run()
        whole = self.now() - start
        return whole, [b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)]


class Calls:
    """How many functions were called since it was opened; a context manager."""

    def __enter__(self) -> "Calls":
        self.count = 0
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error) -> None:
        sys.setprofile(None)

    def _count(self, frame, event: str, argument) -> None:
        self.count += event in ("call", "c_call")

    def now(self) -> int:
        """The calls so far."""
        return self.count


def trainers(folder: str, steps: int, clock: Clock):
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
    common = {
        "args": arguments,
        "train_dataset": samples,
        "data_collator": ChatCollator(processor),
        "callbacks": [clock],
    }
    plain_model, model = load_model(block), load_model(block)
    method.before_task(plain_model, task, None)
    plain = Trainer(model=plain_model, **common)
    ours = continual(Trainer)(model=model, method=method, task=task, **common)
    return plain.train, ours.train


def training(rounds: int, steps: int, context: Mapping) -> list[dict]:
    """Rows for a step (the median of all steps of all rounds), for the rest of a run, and both."""
    clock, runs, each = Clock(time.process_time), dict(NOTHING), dict(NOTHING)
    with tempfile.TemporaryDirectory() as folder:
        pair = dict(zip(NAMES, trainers(folder, steps, clock), strict=True))
        for index in range(rounds + 1):
            # The first of a round pays for the caches of the last: everybody is first in turn.
            for name in NAMES[:: -1 if index % 2 else 1]:
                whole, ticks = clock.of(pair[name])
                if index:
                    runs[name] += (whole,)
                    each[name] += tuple(ticks)
        with Calls() as calls:
            clock.now = calls.now
            counted = {name: clock.of(pair[name]) for name in NAMES}
    seconds = {name: _parts(median(runs[name]), median(each[name]), steps) for name in NAMES}
    number = {name: _parts(run, median(ticks), steps) for name, (run, ticks) in counted.items()}
    return [
        {
            **context,
            "what": what,
            "variant": name,
            "median_ms": round(seconds[name][what] * 1e3, 3),
            "baseline": NAMES[0],
            "ratio": round(seconds[name][what] / seconds[NAMES[0]][what], 3),
            "calls": round(number[name][what]),
            "rounds": rounds,
        }
        for what in seconds[NAMES[0]]
        for name in NAMES
    ]


def _parts(run: float, step: float, steps: int) -> dict[str, float]:
    rest = run - steps * step
    return {"a step": step, "a run without its steps": rest, f"a run of {steps} steps": run}


def starting(rounds: int, context: Mapping) -> list[dict]:
    """Rows for what a new process pays before it does anything."""
    starts = {
        "python -c pass": lambda: seconds_of("-c", "pass"),
        "import mllm_cl": lambda: seconds_of("-c", "import mllm_cl"),
        "mllm-cl --help": lambda: seconds_of("-m", "mllm_cl", "--help"),
    }
    timings = timing.compare(starts, rounds=rounds, warmup=1)
    return timing.rows(timings, baseline="python -c pass", context=context)


def seconds_of(*command: str) -> None:
    """Run a command in a new process."""
    subprocess.run([sys.executable, *command], check=True, capture_output=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", help="append the rows to this file, one a line")
    arguments = parser.parse_args()
    context = timing.environment("cpu") | {"benchmark": "overhead"}
    trained = training(arguments.rounds, arguments.steps, context)
    started = starting(arguments.rounds, context)
    columns = ("variant", "median_ms", "ratio")
    print(timing.table("overhead, CPU time", trained, ("what", *columns, "calls")))
    print(timing.table("overhead, wall time", started, columns))
    if arguments.json:
        timing.append(trained + started, arguments.json)


if __name__ == "__main__":
    main()
