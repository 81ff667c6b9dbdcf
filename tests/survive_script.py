"""Runs a recipe again and again, each time cut off at a random moment, until it is finished:
`survive_script.py RECIPE SIGNAL LIVES SEED`. Prints, as JSON, the exit codes of every life and the
digests of what each left.

The processes are forks of this one, which has imported everything, so that a life takes seconds.
"""

import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

WHAT_COUNTS = ("state.safetensors", "memory.safetensors", "scores.json", "routing.safetensors")


def digests(folder: Path) -> dict[str, str]:
    """The bytes of everything that a stage hands on, by stage and file."""
    files = [path for path in sorted(folder.glob("task_*/*")) if path.name in WHAT_COUNTS]
    files += sorted(folder.glob("task_*/predictions/*.jsonl"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def cut_off(words: list[str], number: int, after: float | None) -> int:
    """The exit code (minus the signal's number) of one run that is sent a signal in time."""
    child = os.fork()
    if child == 0:
        from mllm_cl.cli import main

        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit(main(["run", *words]))
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if after is not None and time.monotonic() - start > after:
            os.kill(child, number)
            after = None
        time.sleep(0.002)


def main() -> None:
    recipe, name, lives, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import torch

    # What every life needs, once.
    importlib.import_module("mllm_cl.runner")
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)
    rng, root = random.Random(seed), Path(recipe).parent
    number = signal.Signals[name]
    start = time.monotonic()
    whole = cut_off([recipe, "--output_dir", str(root / "whole")], number, None)
    took = time.monotonic() - start
    told = {"whole": [whole, digests(root / "whole")], "lives": []}
    for life in range(lives):
        folder, codes = root / f"life-{life}", []
        while codes in ([], [0]) or codes[-1] != 0:
            if codes == [0]:  # it was finished before the signal: that proves nothing
                shutil.rmtree(folder)
                codes.clear()
            # Longer with every life: a machine that has become busy would let none of them finish.
            after = rng.uniform(0.1, 1.0) * took * (1 + len(codes) / 16)
            codes.append(cut_off([recipe, "--output_dir", str(folder)], number, after))
            if codes[-1] not in (0, 3, -number):
                break
        told["lives"].append([codes, digests(folder)])
        shutil.rmtree(folder)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
