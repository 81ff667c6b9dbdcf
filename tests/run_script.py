"""The command `mllm-cl run` on whatever engine this process was launched with: `run_script.py
RECIPE [--KEY VALUE ...]`.

With KILL_AT_STEP in the environment, every process ends at once after that step was made and saved.
With SEEN, each process appends a line per batch that it trains on: the step, and a digest of every
sample's picture. With FOOTPRINT, each process appends a line of memory, open files, children and
its own number per stage.
"""

import gc
import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from engine_script import prepare_launch


def write_footprint(folder: Path) -> None:
    """Bytes in memory, open files, child processes, process number."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = 0
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # of a thread that has just ended
            children += len(path.read_text().split())
    files = len(list(Path("/proc/self/fd").iterdir()))
    line = f"{pages * os.sysconf('SC_PAGE_SIZE')} {files} {children} {os.getpid()}\n"
    with open(folder / os.environ.get("RANK", "0"), "a") as file:
        file.write(line)


def write_what_is_seen(folder: Path) -> None:
    """From here on, a line per batch of every Trainer."""
    from transformers import Trainer

    step = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        pictures = [picture.numpy().tobytes() for picture in inputs["pixel_values"]]
        seen = [hashlib.sha256(picture).hexdigest()[:8] for picture in pictures]
        with open(folder / os.environ.get("RANK", "0"), "a") as file:
            file.write(json.dumps([self.task.name, self.state.global_step, seen]) + "\n")
        return step(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step


def main() -> None:
    prepare_launch()
    import torch
    from transformers import Trainer

    from mllm_cl import cli, runner

    gc.collect()
    gc.freeze()  # each stage collects garbage, and would look through all that was imported
    torch.set_num_threads(1)
    if "SEEN" in os.environ:
        write_what_is_seen(Path(os.environ["SEEN"]))
    kill_at = int(os.environ.get("KILL_AT_STEP", "0"))
    if kill_at:
        step = Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == kill_at:
                os._exit(9)
            return step(self, *args, **kwargs)

        Trainer.training_step = training_step
    if "FOOTPRINT" in os.environ:
        stage = runner._step

        def watched(*args):
            used = stage(*args)
            write_footprint(Path(os.environ["FOOTPRINT"]))
            return used

        runner._step = watched
    code = cli.main(["run", *sys.argv[1:]])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
