"""Runs a recipe on whatever engine this process was launched with: `run_script.py RECIPE [--KEY
VALUE ...]`.

With KILL_AT_STEP in the environment, every process ends at once after that step was made and saved.
With FOOTPRINT, each process appends a line of memory, open files, children and its own number per
stage.
"""

import os
import sys
from pathlib import Path

from engine_script import prepare_launch


def write_footprint(folder: Path) -> None:
    """Bytes in memory, open files, child processes, process number."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = sum(
        len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")
    )
    files = len(list(Path("/proc/self/fd").iterdir()))
    line = f"{pages * os.sysconf('SC_PAGE_SIZE')} {files} {children} {os.getpid()}\n"
    with open(folder / os.environ.get("RANK", "0"), "a") as file:
        file.write(line)


def main() -> None:
    prepare_launch()
    import torch
    from transformers import Trainer

    from mllm_cl import runner
    from mllm_cl.recipe import Recipe

    torch.set_num_threads(1)
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
    runner.run(Recipe.load(sys.argv[1], sys.argv[2:]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
