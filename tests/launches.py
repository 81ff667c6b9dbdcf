"""Scripts of this folder on an engine, two gloo processes each: `launch(engine, script, ...)`."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
LAUNCHES: dict[str, tuple[list[str], dict[str, str]]] = {
    "single": ([], {}),
    "ddp": (TORCHRUN, {}),
    "zero1": ([*ACCELERATE, str(HERE.parent / "launch/cpu/zero2.yaml"), "--zero_stage", "1"], {}),
    "zero2": ([*ACCELERATE, str(HERE.parent / "launch/cpu/zero2.yaml")], {}),
    "zero3": ([*ACCELERATE, str(HERE.parent / "launch/cpu/zero3.yaml")], {}),
    "zero3-offload": ([*ACCELERATE, str(HERE / "zero3_offload.yaml")], {}),
    "fsdp2": (TORCHRUN, SHARDED),
}
LIMIT = 1100  # seconds


def launch(
    engine: str,
    script: str,
    *arguments: str,
    words: Sequence[str] = (),
    returns: int = 0,
    fresh: bool = False,
    **extra: str,
) -> str:
    """Run a script of this folder on an engine, and return what it said; shown where it fails.

    Its processes are forks of one that has imported everything, which saves most of a small
    launch. `fresh` starts a launcher and interpreters of its own, as a user does; so do `words`
    for the launcher, and runs on ZeRO-3, whose processes replace themselves. `extra` goes into
    the environment; `returns` is the expected exit code.
    """
    _, variables = LAUNCHES[engine]
    own = {**variables, "EXPECTED_ENGINE": engine, "OMP_NUM_THREADS": "1", **extra}
    environment = {**os.environ, **own}
    replaces = engine.startswith("zero3") and script == "run_script.py"
    start = _start if fresh or words or replaces else _fork
    launcher = [*LAUNCHES[engine][0], *words]
    code, said = start(launcher, script, arguments, environment)
    assert code == returns, f"{engine} ended with {code}:\n{said[-9000:]}"
    return said


def _start(
    launcher: list[str], script: str, arguments: Sequence[str], environment: dict[str, str]
) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / script), *arguments],
        env=environment,
        stderr=subprocess.PIPE,  # what they print besides is shown where the test fails
        text=True,
        timeout=LIMIT,
        cwd=HERE,  # where a launch file of this folder looks for its DeepSpeed file
    )
    return done.returncode, done.stderr


def _fork(
    launcher: list[str], script: str, arguments: Sequence[str], environment: dict[str, str]
) -> tuple[int, str]:
    parent, numbers = _parent()
    number = next(numbers)
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        asked = {
            "number": number,
            "launcher": launcher,
            "script": script,
            "arguments": list(arguments),
            "environment": environment,
            "log": log.name,
            "limit": LIMIT,
        }
        parent.stdin.write(json.dumps(asked) + "\n")
        parent.stdin.flush()
        for line in parent.stdout:
            told = json.loads(line)
            if told["number"] == number:  # and no launch that a test did not wait for
                return told["code"], log.read()
    raise AssertionError(f"the parent of all launches has ended with {parent.wait()}")


@cache
def _parent() -> tuple[subprocess.Popen, "itertools.count[int]"]:
    """The process that forks, of this session; it ends when its standard input does."""
    parent = subprocess.Popen(
        [sys.executable, str(HERE / "launch_script.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return parent, itertools.count()
