"""A run that is cut off anywhere, and started again, ends as the one that was not."""

import errno
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from mllm_cl import checkpoint, load_method, record
from mllm_cl.model.surgery import guards
from mllm_cl.recipe import Recipe
from mllm_cl.watchdog import SAVING, Steps, Watchdog
from test_runner import recipe, run_in_process, trainer_of

HERE = Path(__file__).parent


def survive(folder: Path, model: Path, signal: str, lives: int, seed: int) -> dict:
    path = recipe(folder, model)
    done = subprocess.run(
        [sys.executable, HERE / "survive_script.py", path, signal, str(lives), str(seed)],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engines
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", -9), ("SIGTERM", 3)])
@pytest.mark.parametrize("model", ["qwen3-vl-moe", "llava"])
def test_a_run_cut_off_at_random_moments_ends_bit_equal(tiny_folder, tmp_path, signal, code, model):
    told = survive(tmp_path, tiny_folder[model], signal, lives=1, seed=len(signal + model))
    whole, wanted = told["whole"]
    assert whole == 0 and wanted
    cuts = [one for codes, _ in told["lives"] for one in codes[:-1]]
    # Before the command listens, a signal is a signal.
    assert code in cuts and set(cuts) <= {code, -15}
    for codes, found in told["lives"]:
        assert codes[-1] == 0 and found == wanted


@pytest.fixture(scope="module")
def pairs() -> dict[str, list]:
    """How the first process of each pair of `watchdog_script.py` ended, and what it said."""
    done = subprocess.run(
        [sys.executable, HERE / "watchdog_script.py"], capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("killed", "process 1 of 2 was not heard of for"),
        ("suspended", "process 1 of 2 was not heard of for"),
        ("interrupted", "process 1 of 2 was interrupted"),
        ("store gone", "the process that keeps the launch's store has ended"),
        ("store silent", "the process that keeps the launch's store has ended"),
    ],
)
def test_who_is_left_ends_with_a_line_about_what_is_gone(pairs, case, words):
    code, said = pairs[case]
    # Of a connection that breaks torch has something to say, too.
    assert code == 1 and said.count("mllm-cl: ") == 1 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith(f"mllm-cl: process 0 of 2 ends: {words}"), said


def test_a_damaged_file_of_a_finished_stage_is_found_before_anything_starts(tiny_folder, tmp_path):
    path = recipe(tmp_path, tiny_folder["llava"])
    run_in_process(path)
    state = tmp_path / "run" / "task_1" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match="task_1 is not as it was written"):
        run_in_process(path)


def test_every_process_finds_the_damage_and_none_waits_for_it(tiny_folder, tmp_path, monkeypatch):
    path = recipe(tmp_path, tiny_folder["llava"])
    folder = run_in_process(path)
    (folder / "task_0" / "state.safetensors").write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="task_0 is not as it was written"):
        record.is_done(Recipe.load(path), folder, 0)


def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_found(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder["llava"], tmp_path, per_device_train_batch_size=8)
    trainer.train()
    good, bad = tmp_path / "checkpoint-3", tmp_path / "checkpoint-4"
    assert checkpoint.newest(tmp_path) == bad
    rng, files = random.Random(0), sorted(path for path in bad.iterdir() if path.stat().st_size)
    for turn in range(100):
        file = rng.choice(files)
        content = file.read_bytes()
        place = rng.randrange(len(content))
        flipped = bytes([content[place] ^ (1 << rng.randrange(8))])
        changed = content[:place] + (b"" if turn % 2 else flipped + content[place + 1 :])
        file.write_bytes(changed)
        assert checkpoint.newest(tmp_path) == good, (file.name, place)
        file.write_bytes(content)
    assert checkpoint.newest(tmp_path) == bad


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_whoever_saves_may_take_any_time(tiny_folder, tmp_path, strategy):
    phases = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            phases.append(watchdog.place[2])

    settings = {"per_device_train_batch_size": 8, "save_strategy": strategy}
    trainer, watchdog = trainer_of(tiny_folder["llava"], tmp_path, **settings), Watchdog(60)
    trainer.add_callback(Look())
    trainer.add_callback(Steps(watchdog, trainer))
    trainer.train()
    assert set(phases) == {SAVING}


def test_guards_that_share_a_basis_share_it_after_a_resume(tiny_folder, tmp_path):
    settings = {"per_device_train_batch_size": 8, "targets": ("q_proj", "v_proj")}

    def shared(trainer) -> list[set[str]]:
        at: dict[int, set[str]] = {}
        for path, one in guards(trainer.model).items():
            at.setdefault(one.g.basis_DK.data_ptr(), set()).add(path)
        return sorted(at.values(), key=sorted)

    trainer, resumed = (trainer_of(tiny_folder["llava"], tmp_path, **settings) for _ in range(2))
    trainer.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("q_proj" in str(one) and "v_proj" in str(one) for one in shared(trainer))
    assert shared(resumed) == shared(trainer)


def test_a_full_disk_leaves_the_checkpoint_before(tiny_folder, tmp_path, monkeypatch):
    trainer = trainer_of(tiny_folder["llava"], tmp_path, per_device_train_batch_size=8)
    whole = checkpoint.save_tensors

    def full(tensors, path):
        if "4" in path.parent.name and path.name == "optimizer.safetensors":
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-3"


def test_weights_that_are_no_numbers_are_never_saved(tiny_folder, tmp_path):
    trainer = trainer_of(
        tiny_folder["llava"], tmp_path, per_device_train_batch_size=8, max_grad_norm=0.0
    )

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        trainer.train()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-2"


def test_a_loss_that_is_no_number_stops_before_a_weight_takes_it_up(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder["llava"], tmp_path, per_device_train_batch_size=8)
    collate, seen = trainer.data_collator, []

    def spoilt(samples):
        batch = collate(samples)
        seen.append(batch)
        if len(seen) == 3:  # the third batch of training or of what is measured before it
            batch["pixel_values"].fill_(float("nan"))
        return batch

    trainer.method = load_method("finetune")(lora_target_modules=("q_proj",))  # measures nothing
    trainer.data_collator = spoilt
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.trained().values())
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-2"
