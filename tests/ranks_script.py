"""Runs a recipe on two processes of which the second fails, as often as asked: `ranks_script.py
RECIPE FOLDER=HOW:WHERE ...`; without HOW and WHERE nothing happens to it. Prints, as JSON, what
each launch left: the launcher's words, the exit codes of the processes that failed, the standard
error of all, the seconds it took, and what is in the folder of the first task.

The processes are forks of this one, which has imported everything, under torchrun's own agent.
"""

import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def spoil(how: str, where: str) -> None:
    """Let this process fail in its third step, third round of answers or third measured batch."""
    from mllm_cl import evaluate, trainer

    owner, name = {
        "training": (trainer.Trainer, "training_step"),
        "evaluation": (evaluate, "respond"),
        "boundary": (trainer.Calibration, "_collate"),
    }[where]
    whole, calls = vars(owner)[name], []

    def spoilt(*args, **kwargs):
        calls.append(name)
        if len(calls) == 3 and how == "nan":
            args[2]["pixel_values"].fill_(float("nan"))
        elif len(calls) == 3:
            fail(how)
        return whole(*args, **kwargs)

    setattr(owner, name, spoilt)


def fail(how: str) -> None:
    if how == "raises":
        raise KeyError("spoilt")
    if how == "exits":
        os._exit(7)
    time.sleep(1000)


def life(case: str, words: list[str]) -> None:
    """One process, from its first to its last moment."""
    import torch

    from mllm_cl.cli import main

    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and case:
        spoil(*case.split(":"))
    try:
        code = main(["run", *words])
    except SystemExit as ends:
        code = ends.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code:
        os._exit(code)
    torch.distributed.destroy_process_group()


def launch(case: str, words: list[str]) -> dict:
    """What one launch of two processes leaves."""
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            1,
            1,
            2,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        start, codes, told = time.monotonic(), {}, ""
        try:
            elastic_launch(config, life)(case, words)
        except ChildFailedError as error:
            codes, told = {rank: one.exitcode for rank, one in error.failures.items()}, str(error)
        took = time.monotonic() - start
        errors = sorted(Path(folder).rglob("stderr.log"))
        said = {path.parent.name: path.read_text() for path in errors}
    return {"codes": codes, "told": told, "said": said, "seconds": took}


def main() -> None:
    importlib.import_module("mllm_cl.runner")
    gc.collect()
    gc.freeze()
    found = []
    for word in sys.argv[2:]:
        name, _, case = word.partition("=")
        folder = Path(sys.argv[1]).parent / name
        left = launch(case, [sys.argv[1], "--output_dir", str(folder)])
        found.append(left | {"files": sorted(path.name for path in folder.glob("task_1/*"))})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
