"""Two processes of which one fails: both end within a minute, and what is said is about the one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from survive_script import digests
from test_runner import recipe

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
PHASES = {"training": "step 3 of arrow", "evaluation": "scoring", "boundary": "measuring arrow"}
CASES = [
    *(("raises", where) for where in PHASES),
    ("exits", "training"),
    ("exits", "evaluation"),
    ("hangs", "training"),
    ("hangs", "evaluation"),
]
NAMES = [f"{how}-{where}={how}:{where}" for how, where in CASES]


@pytest.fixture(scope="module")
def launches(tiny_folder, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """The folder of all launches, and what each left: nothing happens to `whole`, and `again` is
    the same command after `nan`.
    """
    folder = tmp_path_factory.mktemp("ranks")
    training = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "ddp_timeout": 45,  # a third of it to stand still, behind the other
    }
    path = recipe(
        folder,
        tiny_folder["llava"],
        tasks=[{"name": "arrow", "data": "toy:arrow", "train_size": 64, "eval_size": 32}],
        retain=[],
        training=training,
        eval={"batch_size": 4, "max_new_tokens": 2},
    )
    words = [*NAMES, "whole=", "nan=nan:training", "nan="]
    done = subprocess.run(
        [sys.executable, HERE / "ranks_script.py", path, *words],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = [word.partition("=")[0] for word in words[:-1]] + ["again"]
    return folder, dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("how", "where"), CASES)
def test_all_end_within_a_minute_and_name_who_and_where(launches, how, where):
    found = launches[1][f"{how}-{where}"]
    assert found["codes"] and 0 not in found["codes"].values()
    assert found["seconds"] < 60
    told = {
        "raises": "process 1 of 2 failed in",
        "exits": "process 1 of 2 has ended without a word",
        "hangs": "process 1 of 2 stood still for",
    }
    ends = found["said"]["0"].splitlines()[-1]
    assert ends.startswith(f"mllm-cl: process 0 of 2 ends: {told[how]}"), ends
    assert PHASES[where] in ends


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_the_one_trace_is_that_of_the_process_that_failed(launches, where):
    raised, hung = (launches[1][f"{how}-{where}"] for how in ("raises", "hangs"))
    assert "Traceback" not in raised["said"]["0"] + hung["said"]["0"]
    assert raised["said"]["1"].count("Traceback") == 1
    assert "KeyError: 'spoilt'" in raised["said"]["1"]
    assert "KeyError: 'spoilt'" in raised["told"], "the launcher's last words have it, too"
    assert "time.sleep" in hung["said"]["1"]


def test_nan_on_one_process_stops_both_and_leaves_no_trace_of_it(launches):
    folder, found = launches
    spoilt, again = found["nan"], found["again"]
    assert spoilt["codes"] and set(spoilt["codes"].values()) == {1}
    assert "the loss of step 3 is nan" in spoilt["said"]["0"]
    assert "Traceback" not in spoilt["said"]["0"] + spoilt["said"]["1"]
    assert spoilt["files"] == ["checkpoint-1", "checkpoint-2"], "no memory, no state"
    assert found["whole"]["codes"] == again["codes"] == {}
    assert digests(folder / "nan") == digests(folder / "whole")
