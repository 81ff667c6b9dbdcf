"""The block `training`: the names of TrainingArguments, less what belongs elsewhere."""

import math
from typing import Annotated, Any

from mllm_cl.recipe.convert import convert
from mllm_cl.recipe.errors import RecipeError, unknown
from mllm_cl.recipe.hints import FINITE, Between, training_hints

BOOKKEEPING = (  # training keys, by how they begin, that never change what is learnt
    "logging_",
    "log_",
    "report_to",
    "run_name",
    "project",
    "trackio_",
    "disable_tqdm",
    "save_",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "skip_memory_metrics",
    "ddp_timeout",
)
_LAUNCH = "hardware belongs in the launch file (accelerate launch --config_file launch/...)"
_SCORING = "every task is scored after each task; see 'eval' for how"
_ELSEWHERE = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _LAUNCH),
    **dict.fromkeys(("local_rank", "ddp_backend", "use_cpu"), _LAUNCH),
    "output_dir": "set 'output_dir' at the top level",
    "seed": "set 'seed' at the top level",
    "resume_from_checkpoint": "resuming is running the same command again",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the runner always trains and scores"),
    "per_device_eval_batch_size": "set 'eval.batch_size'",
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), _SCORING),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _SCORING
    ),
    "enable_jit_checkpoint": "checkpoints are the runner's own; set 'save_steps'",
    "auto_find_batch_size": "it changes the batch while a task trains, and no resumed run would "
    "make the same steps; set 'per_device_train_batch_size'",
    "save_only_model": "a checkpoint that cannot be resumed is of no use to the runner",
    "hub_token": "secrets do not belong in a recipe; use 'hf auth login'",
    "push_to_hub": "a run is not uploaded; its folder is the result",
}
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "max_steps": -1,
}


def training_names() -> list[str]:
    """The keys that may stand in the block."""
    return [name for name in training_hints() if name not in _ELSEWHERE]


def training_block(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as the types that TrainingArguments has; RecipeError names what is wrong."""
    hints, known = training_hints(), training_names()
    training = {}
    for name, value in settings.items():
        key = f"training.{name}"
        if name in _ELSEWHERE:
            raise RecipeError(key, f"does not belong here: {_ELSEWHERE[name]}")
        if name not in known:
            raise unknown(key, value, known)
        limit = Between(_LEAST.get(name, -math.inf), FINITE if name in _LEAST else math.inf)
        training[name] = convert(value, Annotated[hints[name], limit], key)
    return training
