"""The same numbers on every engine: one script, seven launches, two gloo processes each.

Losses are compared over 20 steps (chaos takes over later: a difference of 1e-7 becomes 1e-3 by step
200), displacements after 5, and what a method measures at the end of the task.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine_script import FEW, cases
from launches import LAUNCHES, launch

WHOLE = [name for name in LAUNCHES if name not in FEW]  # those that take every cell

EIGHT = "--training.per_device_train_batch_size=8"

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory):
    """What an engine found: losses and leaks, tensors, and what it said to flaws. All but one
    process go on from its memories, so that comes first.
    """
    out = tmp_path_factory.mktemp("engines")
    models = tiny_folder["llava"].parent

    def of(engine: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, list[str]]]:
        if not (out / f"{engine}.json").exists():
            launch(engine, "engine_script.py", str(out), str(models), fresh=True)
        found, said = (
            json.loads((out / f"{engine}{kind}.json").read_text()) for kind in ("", "-verdicts")
        )
        return found, load_file(out / f"{engine}.safetensors"), said

    return of


def moments(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What enters the model's own experts, U G U^T of each, float64."""
    found = {}
    for name, basis_DK in tensors.items():
        if "/experts/" in name and name.endswith("/basis"):
            basis_DK, gram_EKK = basis_DK.double(), tensors[name[: -len("basis")] + "gram"].double()
            found[name] = basis_DK @ gram_EKK @ basis_DK.mT
    return found


@pytest.mark.parametrize("engine", [name for name in LAUNCHES if name != "single"])
def test_the_engine_gives_the_numbers_of_one_process(engine, results):
    alone, alone_tensors, _ = results("single")
    found, tensors, _ = results(engine)
    mine = [case.name for case in cases(engine)]
    assert list(found) == mine
    for name in mine:
        losses = torch.tensor([alone[name]["losses"], found[name]["losses"]])
        assert losses.shape == (2, 20)
        assert (losses[0] - losses[1]).abs().max() < 1e-4, name
        for leak in found[name]["leaks"].values():
            assert leak < 1e-5, name
    alone_tensors = {n: t for n, t in alone_tensors.items() if n.partition("::")[0] in mine}
    assert tensors.keys() == alone_tensors.keys()
    for name, expected in moments(alone_tensors).items():
        difference = (moments(tensors)[name] - expected).norm() / expected.norm()
        assert difference < 1e-5, name
    for name, expected in alone_tensors.items():
        if "/experts/" in name and name.endswith(("/basis", "/gram")):
            continue  # eigenvectors have no sign: what they hold together was compared above
        if name.endswith("/count"):
            assert torch.equal(expected, tensors[name]), name
        elif "::moved::" in name:
            torch.testing.assert_close(tensors[name], expected, atol=1e-4, rtol=0, msg=name)
        elif expected.is_floating_point() and expected.numel():
            difference = (tensors[name] - expected).norm() / expected.norm().clamp_min(1e-12)
            assert difference < 1e-5, name


def test_checkpointing_and_accumulation_change_nothing(results):
    found, _, _ = results("single")
    for case in cases():
        plain = found[case.plain.name]["losses"]
        difference = torch.tensor(plain) - torch.tensor(found[case.name]["losses"])
        assert difference.abs().max() < 1e-4, case.name


def test_same_protects_something_in_this_matrix(results):
    """The leaks above would be zero for guards that forbid nothing."""
    _, tensors, _ = results("single")
    moved = [name for name in tensors if name.startswith("same/") and "::moved::" in name]
    assert moved
    assert all(tensors[name].abs().max() > 0 for name in moved if "experts" not in name)


UNUSED = r"in 3 steps 1 of 19 trained tensors had no gradient: spare\.weight\."
CUT = r"in 3 steps 2 of 18 trained tensors had no gradient: .*lora_A.*lora_B.*"
BLIND = r"[36] batches had pictures, but in 3 steps the vision tower was never called"
STILL = r"in 3 steps 9 of 18 trained tensors have not moved: .*lora_A"


@pytest.mark.parametrize("engine", LAUNCHES)
def test_every_process_names_what_does_not_train(engine, results):
    """The sound runs of the matrix are judged alike, and pass."""
    said = results(engine)[2]
    kinds = (
        ("never_called", UNUSED),
        ("cut_off", CUT),
        ("blind", BLIND),
        ("lost_in_rounding", STILL),
    )
    for flaw, expected in kinds:
        assert len(said[flaw]) == (1 if engine == "single" else 2), flaw
        for words in said[flaw]:
            assert re.match(expected, words), words


# What else an engine owes: promise_script.py


@pytest.fixture(scope="module")
def promises(tiny_folder, tmp_path_factory):
    """What promise_script.py found on an engine, by name."""
    out = tmp_path_factory.mktemp("promises")
    models = tiny_folder["llava"].parent

    def of(engine: str) -> dict[str, torch.Tensor]:
        file = out / f"promise-{engine}.safetensors"
        if not file.exists():
            launch(engine, "promise_script.py", str(out), str(models))
        return load_file(file)

    return of


@pytest.mark.parametrize("engine", [name for name in WHOLE if name != "single"])
def test_a_loop_of_ones_own_learns_on_the_engine_what_it_learns_alone(engine, promises):
    """test_plug.py compares the loop of one process with the Trainer."""
    alone, found = promises("single"), promises(engine)
    assert alone.keys() == found.keys()
    for name in [name for name in alone if name.startswith("same/")]:
        if name.endswith("::losses"):
            torch.testing.assert_close(found[name], alone[name], atol=1e-4, rtol=0, msg=name)
        elif alone[name].is_floating_point() and alone[name].numel():
            # Two tasks of Adam magnify what sums in another order differ by.
            apart = (found[name] - alone[name]).norm() / alone[name].norm().clamp_min(1e-12)
            assert apart < (1e-2 if "::moved::" in name else 1e-3), name
        else:
            assert torch.equal(found[name], alone[name]), name


@pytest.mark.parametrize("engine", WHOLE)
def test_a_loop_of_ones_own_names_what_does_not_train(engine, promises):
    """On every process: both matrices of the adapter that is out of the graph. DDP is faster."""
    expected = {"single": [2], "ddp": [-1, -1]}.get(engine, [2, 2])
    assert promises(engine)["flawed::named"].tolist() == expected


@pytest.mark.parametrize("engine", [name for name in WHOLE if name != "single"])
def test_experts_that_one_process_has_no_tokens_for_train_as_in_one_process(engine, promises):
    alone = {n: t for n, t in promises("single").items() if n.startswith("lopsided::")}
    assert any("vision" in name and t.norm() > 0 for name, t in alone.items()), list(alone)
    for name, expected in alone.items():
        apart = (promises(engine)[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert apart < 2e-2, name  # Adam magnifies what gradients near zero differ by


@pytest.mark.parametrize("engine", WHOLE)
def test_a_small_step_arrives_in_a_bf16_model(engine, promises):
    """AdamW's first step is the rate, 1e-5; in bf16 it would be rounded away."""
    steps = {n: s for n, s in promises(engine).items() if n.startswith(("lora::", "whole::"))}
    assert len(steps) == 9  # A and B of three layers, and three whole weights
    for name, step in steps.items():
        arrived = ((step.abs() - 1e-5).abs() < 2e-6).float().mean()
        # B is zero at first, so A has no gradient.
        assert (arrived == 0) if ".lora_A." in name else (arrived > 0.9), name


@pytest.mark.parametrize("engine", WHOLE)
def test_scores_before_and_after_training_are_of_one_precision_on_the_engine(engine, promises):
    """Bitwise: the step between them had rate 0."""
    found = promises(engine)
    assert torch.equal(found["still::before"], found["still::after"])


# Whole runs


def recipe(folder: Path, model: Path) -> Path:
    """Two tiny tasks, whose steps see the same samples however they are cut."""
    tree = {
        "seed": 1,
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(model), "lora_target_modules": ["q_proj"]},
        "method": {"name": "same", "num_experts": 2, "calibration_tokens": 512},
        "tasks": [
            {"name": name, "data": f"toy:{name}", "train_size": 32, "eval_size": 4}
            for name in ("arrow", "word")
        ],
        "training": {
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "eval": {"batch_size": 4, "max_new_tokens": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def manifests(folder: Path) -> list[dict]:
    return [json.loads((folder / f"task_{stage}/manifest.json").read_text()) for stage in range(3)]


@pytest.fixture(scope="module")
def run_alone(tiny_folder, tmp_path_factory) -> Path:
    """The folder of a whole run of one process, which takes eight samples at once."""
    folder = tmp_path_factory.mktemp("alone")
    path = str(recipe(folder, tiny_folder["llava"]))
    launch("single", "run_script.py", path, EIGHT, SEEN=str(made(folder / "seen")))
    return folder / "run"


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def seen(folder: Path) -> dict[tuple[str, int], list[str]]:
    """The samples of every step in their order, from what each process wrote."""
    found: dict[tuple[str, int], list[str]] = {}
    for file in sorted(folder.iterdir()):
        for task, step, samples in map(json.loads, file.read_text().splitlines()):
            found.setdefault((task, step), []).extend(samples)
    return found


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_ends_alike(found: Path, expected: Path) -> None:
    """The same displacements after the last task, and the same answers on the way."""
    state, wanted = (load_file(run / "task_2/state.safetensors") for run in (found, expected))
    assert state.keys() == wanted.keys()
    moved = [name for name in wanted if "::" in name]
    assert moved
    for name in moved:
        assert wanted[name].norm() > 0
        assert (state[name] - wanted[name]).norm() < 1e-3 * wanted[name].norm(), name
    for path in expected.glob("task_*/predictions/*.jsonl"):
        for now, then in zip(rows(found / path.relative_to(expected)), rows(path), strict=True):
            assert now["prediction"] == then["prediction"], path
            assert now["nll"] == pytest.approx(then["nll"], abs=1e-4), path


def test_fsdp2_runs_all_stages_as_one_process_does(run_alone, tiny_folder, tmp_path):
    path = str(recipe(tmp_path, tiny_folder["llava"]))
    launch("fsdp2", "run_script.py", path, fresh=True)
    assert {made["engine"] for made in manifests(tmp_path / "run")} == {"fsdp2"}
    assert_ends_alike(tmp_path / "run", run_alone)


def test_the_stage_and_the_precision_of_a_launch_are_deepspeeds_own(tiny_folder, tmp_path):
    """`mixed_precision` of the launch file is DeepSpeed's, without a word in the recipe."""
    words = ["--mixed_precision", "bf16"]
    launch("zero2", "run_script.py", str(recipe(tmp_path, tiny_folder["llava"])), words=words)
    for made in manifests(tmp_path / "run"):
        assert (made["engine"], made["mixed_precision"]) == ("zero2", "bf16")


def test_two_processes_that_do_not_train_end_with_one_message(tiny_folder, tmp_path):
    """Seen on ZeRO-1, which has no row of its own above. The launcher adds words of its own."""
    path = str(recipe(tmp_path, tiny_folder["llava"]))
    words = ["--zero_stage", "1", "--mixed_precision", "bf16"]
    still = "--training.learning_rate=1e-30"
    told = launch("zero2", "run_script.py", path, still, words=words, returns=1)
    assert len(re.findall(r"mllm-cl: in 3 steps .* have not moved", told)) == 1, told[-3000:]
    assert "NotTraining" not in told


def test_zero3_that_offloads_is_killed_goes_on_and_ends_as_one_process(
    run_alone, tiny_folder, tmp_path
):
    """The launch file names no stage."""
    path = str(recipe(tmp_path, tiny_folder["llava"]))
    launch("zero3-offload", "run_script.py", path, returns=1, KILL_AT_STEP="3")
    assert (tmp_path / "run/task_1/checkpoint-2/complete.json").exists()
    launch("zero3-offload", "run_script.py", path)
    assert {made["engine"] for made in manifests(tmp_path / "run")} == {"zero3"}
    assert_ends_alike(tmp_path / "run", run_alone)


@pytest.mark.parametrize(("first", "then"), [("ddp", "single"), ("single", "ddp")])
def test_a_task_goes_on_with_other_processes_where_the_effective_batch_stays(
    run_alone, tiny_folder, tmp_path, first, then
):
    """Two processes with four samples each, one with eight: every step sees the same samples."""
    path = str(recipe(tmp_path, tiny_folder["llava"]))
    words = {"ddp": [path], "single": [path, EIGHT]}
    before, after = made(tmp_path / "before"), made(tmp_path / "after")
    # torchrun exits with 1 where a process exits with 9
    code = 1 if first == "ddp" else 9
    launch(first, "run_script.py", *words[first], returns=code, KILL_AT_STEP="3", SEEN=str(before))
    assert (tmp_path / "run/task_1/checkpoint-2/complete.json").exists()
    if then == "single":
        launch(then, "run_script.py", path, returns=2)
        assert not (tmp_path / "run/task_1/scores.json").exists(), "four samples a step are refused"
    launch(then, "run_script.py", *words[then], SEEN=str(after))
    whole = seen(run_alone.parent / "seen")
    assert {len(samples) for samples in whole.values()} == {8}
    early, late = seen(before), seen(after)
    assert sorted(early) == [("arrow", step) for step in range(3)]
    assert sorted(late) == sorted(whole.keys() - {("arrow", 0), ("arrow", 1)})
    assert early.items() <= whole.items() and late.items() <= whole.items()
    assert_ends_alike(tmp_path / "run", run_alone)
