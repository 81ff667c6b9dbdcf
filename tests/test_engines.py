"""The same numbers on every engine: one script, five launches, two gloo processes each.

Losses are compared over 20 steps (chaos takes over later: a difference of 1e-7 becomes 1e-3 by step
200), displacements after 5, and what a method measures at the end of the task.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine_script import cases

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
    "zero2": ([*ACCELERATE, str(HERE.parent / "launch/cpu/zero2.yaml")], {}),
    "zero3": ([*ACCELERATE, str(HERE.parent / "launch/cpu/zero3.yaml")], {}),
    "fsdp2": (TORCHRUN, SHARDED),
}

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]


def launch(engine: str, script: str, *arguments: str) -> None:
    """Run a script of this folder on an engine; its output is shown where it fails."""
    words, extra = LAUNCHES[engine]
    environment = {**os.environ, **extra, "EXPECTED_ENGINE": engine, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, str(HERE / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, f"{engine} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory):
    """What one process found, and a function that runs another engine on the same memories."""
    out = tmp_path_factory.mktemp("engines")
    models = tiny_folder["llava"].parent

    def of(engine: str) -> tuple[dict, dict[str, torch.Tensor]]:
        if not (out / f"{engine}.json").exists():
            launch(engine, "engine_script.py", str(out), str(models))
        return json.loads((out / f"{engine}.json").read_text()), load_file(
            out / f"{engine}.safetensors"
        )

    return of


@pytest.mark.parametrize("engine", [name for name in LAUNCHES if name != "single"])
def test_the_engine_gives_the_numbers_of_one_process(engine, results):
    alone, alone_tensors = results("single")
    found, tensors = results(engine)
    for case in cases():
        losses = torch.tensor([alone[case.name]["losses"], found[case.name]["losses"]])
        assert losses.shape == (2, 20)
        assert (losses[0] - losses[1]).abs().max() < 1e-4, case.name
        for leak in found[case.name]["leaks"].values():
            assert leak < 1e-5, case.name
    assert tensors.keys() == alone_tensors.keys()
    for name, expected in alone_tensors.items():
        if name.endswith("/count"):
            assert torch.equal(expected, tensors[name]), name
        elif "::moved::" in name:
            torch.testing.assert_close(tensors[name], expected, atol=1e-4, rtol=0, msg=name)
        elif expected.is_floating_point() and expected.numel():
            difference = (tensors[name] - expected).norm() / expected.norm().clamp_min(1e-12)
            assert difference < 1e-5, name


def test_checkpointing_and_accumulation_change_nothing(results):
    found, _ = results("single")
    for case in cases():
        plain = found[f"{case.method}/{case.kind}/plain/1"]["losses"]
        difference = torch.tensor(plain) - torch.tensor(found[case.name]["losses"])
        assert difference.abs().max() < 1e-4, case.name


def test_same_protects_something_in_this_matrix(results):
    """The leaks above would be zero for guards that forbid nothing."""
    _, tensors = results("single")
    moved = [name for name in tensors if name.startswith("same/") and "::moved::" in name]
    assert moved
    assert all(tensors[name].abs().max() > 0 for name in moved if "experts" not in name)
