"""What is known of a launch before it trains, and what an engine owes the scores."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mllm_cl import Memory, continual, engine
from mllm_cl.method import Tuned
from mllm_cl.model.surgery import guards
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.runner import run
from toy_run import collator_of, load, logits, probe, toy_tasks

ASK = """
from engine_script import skip_shared_memory_op
skip_shared_memory_op()
from transformers import TrainingArguments
from mllm_cl import engine
from mllm_cl.model.load import load_model
from mllm_cl.recipe import ModelBlock
import sys
arguments = TrainingArguments("unused", use_cpu=True)
model = load_model(ModelBlock(model_name_or_path=sys.argv[1]))
shards = all(parameter.shape == (0,) for parameter in model.parameters())
with engine.unsharded_loading():
    model = load_model(ModelBlock(model_name_or_path=sys.argv[1]))
whole = all(parameter.numel() > 0 for parameter in model.parameters())
print("asked", engine.asked(arguments), shards, whole)
import torch
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_the_zero_stage_is_read_from_a_deepspeed_file(stage, tiny_folder, tmp_path):
    """As `deepspeed_config_file` in a launch file hands it over: no variable names the stage."""
    file = tmp_path / "deepspeed.json"
    settings = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    file.write_text(json.dumps(settings))
    with socket.socket() as opened:
        opened.bind(("", 0))
        port = opened.getsockname()[1]
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tiny_folder["llava"])],
        env={**os.environ, **here, **asked, "MASTER_PORT": str(port), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = [line for line in done.stdout.splitlines() if line.startswith("asked")][-1]
    assert last == f"asked zero{stage} {stage == 3} True"


METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from mllm_cl.method import Tuned

@dataclass(frozen=True, kw_only=True)
class Elsewhere(Tuned):
    engines: ClassVar[tuple[str, ...]] = ("fsdp2",)
"""


def test_a_method_that_cannot_run_here_is_refused_before_a_weight_is_read(tmp_path):
    (tmp_path / "elsewhere.py").write_text(METHOD)
    (tmp_path / "model").mkdir()  # nothing could be loaded from it
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "method": {"name": str(tmp_path / "elsewhere.py")},
        "tasks": [{"name": "arrow", "data": "toy:arrow", "train_size": 8, "eval_size": 2}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match="cannot run on single: it needs what only fsdp2 offer"):
        run(Recipe.load(tmp_path / "recipe.yaml"))


class Sharded(Tuned):
    """Fine-tuning that asks for shards."""

    engines = ("zero3",)


def arguments(folder, **settings) -> TrainingArguments:
    own = {"per_device_train_batch_size": 8, "save_strategy": "no", "remove_unused_columns": False}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(folder), **{**own, **quiet, **settings})


def trainer_of(model, folder, method, given) -> Trainer:
    task, collator = toy_tasks()[0], collator_of(folder)
    return continual(Trainer)(
        model, given, collator, task.train, method=method, task=task, memory=Memory()
    )


def test_a_trainer_refuses_a_method_before_it_operates_on_the_model(tiny_folder, tmp_path):
    folder = tiny_folder["llava"]
    model = load(folder)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="cannot run on single"):
        trainer_of(model, folder, Sharded(), arguments(tmp_path))
    assert [name for name, _ in model.named_parameters()] == names
    assert not guards(model) and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_before_and_after_training_are_of_one_precision(bf16, tiny_folder, tmp_path):
    """A training of rate 0 changes nothing: neither may what is computed before and after it."""
    folder, method = tiny_folder["qwen3-vl-moe"], Tuned(lora_target_modules=("q_proj",))
    given = arguments(tmp_path, max_steps=1, learning_rate=0.0, bf16=bf16)
    batch = probe(folder)
    before = trainer_of(load(folder), folder, method, given)
    before.prepare_for_evaluation()
    after = trainer_of(load(folder), folder, method, given)
    after.train()
    found = logits(before.bare_model(), batch)
    assert torch.equal(found, logits(after.bare_model(), batch))
    assert torch.equal(found, logits(load(folder), batch)) == (not bf16)


def test_the_engine_of_one_process_is_known_from_its_arguments(tmp_path):
    assert engine.asked(arguments(tmp_path)) == "single"


def test_fsdp_version_1_is_refused_from_the_arguments(tmp_path, monkeypatch):
    given = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert engine.asked(given) == "fsdp2"
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        engine.asked(given)
