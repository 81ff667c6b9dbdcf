"""Forks launches for `launches.py`: reads one from each line of its standard input, as JSON, and
answers with a line of its number and exit code.

It has imported everything and does nothing else, so that a launch takes the time of what it does.
The forks of a launch are under torchrun's own agent, with the variables that accelerate would set.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

HERE = Path(__file__).parent


def variables(launcher: list[str]) -> dict[str, str]:
    """What `accelerate launch` puts into the environment; nothing of torchrun."""
    if "accelerate.commands.launch" not in launcher:
        return {}
    from accelerate.commands.launch import (
        _validate_launch_command,
        launch_command_parser,
        prepare_deepspeed_cmd_env,
    )

    words = launcher[launcher.index("accelerate.commands.launch") + 1 :]
    parsed = launch_command_parser().parse_args([*words, "script.py"])
    arguments, file, own_precision = _validate_launch_command(parsed)
    named = [*file.deepspeed_config, *["mixed_precision"] * own_precision]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(named)
    return prepare_deepspeed_cmd_env(arguments)[1]


def life(script: str, arguments: list[str]) -> None:
    """One process of a launch, from its first to its last moment."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ends:
        code = ends.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # past the agent, which would tell of it once more


def together(asked: dict) -> int:
    """The exit code of the two processes of a launch, or of the one that has no launcher."""
    words = str(HERE / asked["script"]), asked["arguments"]
    if not asked["launcher"]:
        life(*words)
        return 0
    os.environ.update(variables(asked["launcher"]))
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
    )
    config.max_restarts = 0
    try:
        elastic_launch(config, life)(*words)
    except ChildFailedError:
        return 1
    return 0


def alone(asked: dict) -> None:
    """A launch in this fork, which it ends."""
    os.setpgid(0, 0)
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(HERE)
    os.environ.clear()
    os.environ.update(asked["environment"])
    try:
        code = together(asked)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, limit: float) -> int:
    """The exit code of a fork; 124 where it took too long, and all of its launch was ended."""
    end = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124
        time.sleep(0.02)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is said while importing is no answer
    for name in ("mllm_cl.runner", "mllm_cl.settings.class_incremental", "deepspeed", "peft"):
        importlib.import_module(name)
    from mllm_cl.model.encoder import family

    family("vit")  # whose models are imported when one is asked for
    gc.collect()
    gc.freeze()  # a fork that collects garbage need not look through it, nor copy it
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            alone(asked)
        answers.write(json.dumps({"number": asked["number"], "code": wait(child, asked["limit"])}))
        answers.write("\n")
        answers.flush()


if __name__ == "__main__":
    main()
