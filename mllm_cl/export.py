"""A stage of a run as a folder that others open: plain transformers, PEFT, servers.

What a form cannot hold is refused before anything is written; what it holds is opened again, and
how far its logits are from the trained model's stands in the model card.
"""

import gc
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mllm_cl import __version__, checkpoint, record
from mllm_cl.card import Made, card
from mllm_cl.data.chat import ChatCollator
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.drifts import PROBE_SAMPLES
from mllm_cl.hub import Hub
from mllm_cl.likeness import Difference, check, compare, logits
from mllm_cl.memory import Memory, load_tensors, save_tensors
from mllm_cl.model import adapter_file
from mllm_cl.model.adapt import lora_layers
from mllm_cl.model.load import empty_model, load_model, location
from mllm_cl.model.merge import merge
from mllm_cl.model.precision import widen
from mllm_cl.model.surgery import fold, guards, restore_state
from mllm_cl.recipe import ModelBlock, Recipe, RecipeError
from mllm_cl.runner import hush
from mllm_cl.settings.instruction import processor_of, tasks_of
from mllm_cl.stage import Stage, complete_stage
from mllm_cl.task import Task

MARK = "export.json"  # says that a folder is ours, and holds the numbers of the card


def export(
    run: Path,
    form: str,
    *,
    task: str | None = None,
    output: Path | None = None,
    hub: Hub | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write what `run` had learnt after `task`, the newest complete one by default, and return the
    folder: `output`, or RUN/export/TASK-FORM.

    merged            the model with everything in its weights, and its processor
    peft              a PEFT adapter for the base: linears, and stacks of experts
    per-expert-peft   the same with a module for each expert's projections, as servers read it

    The folder appears when it is whole; one that an export made before is replaced. With `hub` it
    is uploaded too. Raises RecipeError, before anything is written, where the form cannot hold
    the state, and Unlike where the folder does not answer as the model did.
    """
    hush()
    stage = complete_stage(run, task, trust_remote_code=trust_remote_code)
    target = output or run / "export" / f"{stage.task}-{form}"
    _check_target(target)
    if hub is not None:
        hub = hub.checked(stage.recipe.training)
    _check_form(form, stage.recipe, stage.state)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        difference = _fill(partial, stage, form, target.name)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    told = (
        f"{difference.relative:.1e} of their norm; learning moved them by {difference.learnt:.1e}"
    )
    print(f"{target}: logits differ by {told}", flush=True)
    if hub is not None:
        hub.push(target, f"{stage.task} of {run.name}, {form}")
    return target


def _check_target(target: Path) -> None:
    """Raise RecipeError for a place where something lies that is not an export."""
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not free and not _is_ours(target / MARK):
        problem = f"{target} exists and is no export of ours: it is left as it is"
        raise RecipeError("--output", f"{problem}. Name a folder that is not there")


def _is_ours(mark: Path) -> bool:
    try:
        return str(json.loads(mark.read_text())["made_by"]).startswith("mllm_cl ")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_form(form: str, recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    """Raise RecipeError where a form cannot hold a state."""
    mixtures = [name for name in state if ".moe_lora." in name]
    if mixtures:
        raise _refused(
            form,
            f"a router weighs the adapters anew for every token ({mixtures[0]} ...), which neither "
            "one weight nor one LoRA does. Such a model runs from the run's folder alone; with "
            "'num_experts: 0' a recipe trains one LoRA per linear, which all forms hold",
        )
    if form == "merged":
        if recipe.model.load_in_4bit:
            raise _refused(
                form,
                "the base is kept in four bits, which would round what was learnt away. Export "
                "peft: the adapter opens on the base, packed or not",
            )
        return
    if recipe.model.adapter_name_or_path is not None:
        raise _refused(
            form,
            f"{recipe.model.adapter_name_or_path} had joined the base before the run, and a LoRA "
            "on the base alone would leave it out. Export merged",
        )
    whole = [name for name, value in state.items() if not _is_factor(name) and _counts(name, value)]
    if whole:
        weight = whole[0].partition("::")[0]
        raise _refused(
            form,
            f"{len(whole)} weights moved themselves ({weight} is the first): a LoRA file holds no "
            "router and no whole weight. Export merged, or train adapters alone: "
            "'model.use_peft: true', 'method.train_router: false' and, for same, "
            "'method.router: frozen'",
        )
    if not state:
        raise _refused(form, f"{recipe.method_name} has trained nothing here. Export merged")
    if form == "per-expert-peft" and not any(_is_of_experts(name) for name in state):
        raise _refused(form, "no adapter is on experts here. Export peft, which holds all of it")


def _refused(form: str, problem: str) -> RecipeError:
    return RecipeError(f"--to {form}", problem)


def _is_factor(name: str) -> bool:
    """Whether a tensor of a state is a factor of a LoRA: of PEFT's on a linear, or on experts."""
    path = name.partition("::")[0]
    return _is_of_experts(name) or ".lora_A." in path or ".lora_B." in path


def _is_of_experts(name: str) -> bool:
    return name.partition("::")[0].endswith(("_lora_A", "_lora_B"))


def _counts(name: str, value: Tensor) -> bool:
    return "::" not in name or bool(value.any())  # a guarded weight may never have moved


def _fill(folder: Path, stage: Stage, form: str, name: str) -> Difference:
    """Write the export `name` into `folder`, open it again, and say in its card how it compares."""
    recipe = stage.recipe
    block = replace(recipe, tasks=recipe.tasks[-1:], retain=())
    (task,) = tasks_of(block)
    task = replace(task, index=stage.number)
    processor = processor_of(recipe)
    collate, number = ChatCollator(processor), min(PROBE_SAMPLES, len(task.eval))
    samples = [collate([task.eval[index]]) for index in range(number)]
    told = _write(folder, stage, form, task, samples)
    gc.collect()
    if form == "merged":
        processor.save_pretrained(folder)
    found = logits(_opened(folder, form, recipe.model), samples)
    difference = compare(found, told.live, told.before, told.packed)
    check(difference, told.live[0].dtype, form)
    made = Made(name, form, told.revision, told.sees, told.rank, told.leaks, difference)
    scores = record.scores_of(recipe, stage.run, stage.scored)
    manifest = json.loads((stage.path / "manifest.json").read_text())
    text = card(made, recipe, scores, manifest)
    (folder / "README.md").write_text(text, encoding="utf-8")
    numbers = {"task": stage.task, "form": form, **asdict(difference), "leaks": told.leaks}
    checkpoint.write_json(folder / MARK, {"made_by": f"mllm_cl {__version__}"} | numbers)
    return difference


@dataclass(frozen=True)
class Told:
    """What the trained model said before it was taken apart: its logits and the base's, those
    in the run where that had packed the base, what folding leaked at most, whether it sees, the
    base's commit, and the rank of its adapters.
    """

    before: list[Tensor]
    live: list[Tensor]
    packed: list[Tensor] | None
    leaks: dict[str, float]
    sees: bool
    revision: str | None
    rank: int


def _write(
    folder: Path, stage: Stage, form: str, task: Task, samples: Sequence[Mapping[str, Tensor]]
) -> Told:
    settings, packed = stage.recipe.model, None
    model, before, live = _trained(stage, settings, task, samples)
    if settings.load_in_4bit:  # others open the base as it is
        del model
        packed, settings = live, replace(settings, **UNPACKED)
        model, before, live = _trained(stage, settings, task, samples)
    _ready_to_fold(model)
    try:
        leaks = fold(model)
        if form == "merged":
            merge(model)
    except ValueError as error:  # weights that are tied
        raise _refused(form, str(error)) from error
    rank = 0
    if form == "merged":
        _as_published(model, settings)
        model.save_pretrained(folder)
    else:
        rank = _write_adapter(folder, adapter_file.low_rank(model), form, settings)
    revision = vars(model.config).get("_commit_hash") or settings.model_revision
    sees = model.config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return Told(before, live, packed, leaks, sees, revision, rank)


def _trained(
    stage: Stage, settings: ModelBlock, task: Task, samples: Sequence[Mapping[str, Tensor]]
) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The model as the stage left it; what the base says to the samples, and what it says."""
    model = _loaded(settings)
    before = logits(model, samples)
    memory = Memory.load(stage.before / "memory.safetensors")
    try:
        stage.recipe.method.before_task(model, task, memory)
        widen(model)
        restore_state(model, stage.state)
    except ValueError as error:  # another base than that of the run
        raise RecipeError("RUN", str(error)) from error
    return model, before, logits(model, samples)


def _ready_to_fold(model: nn.Module) -> None:
    """Bring the factors of a bf16 model's LoRAs to fp32, and let all guards forbid everything.

    So folding tells all its rounding: what of it lies in protected directions, which a stage does
    not keep, is no more.
    """
    for layer in lora_layers(model).values():
        layer.lora_A.float()
        layer.lora_B.float()
    for one in guards(model).values():
        dim, device = one.displacement.shape[-1], one.displacement.device
        closed = DriftGuard(torch.zeros(dim, 0), torch.zeros(0), outside=0.0)
        one.g = closed.to(device)


def _write_adapter(
    folder: Path, found: Mapping[str, adapter_file.LowRank], form: str, settings: ModelBlock
) -> int:
    """Write an adapter's folder, and return its rank."""
    if form == "peft":
        empty = empty_model(replace(settings, **UNPACKED))
        tensors, config = adapter_file.in_peft_layout(found, empty)
    else:
        tensors, config = adapter_file.in_expert_layout(found)
    config.base_model_name_or_path = location(settings.model_name_or_path)
    config.revision, config.inference_mode = settings.model_revision, True
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
    return config.r


UNPACKED: dict[str, None] = dict.fromkeys(
    ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "unquantised")
)


def _as_published(model: nn.Module, settings: ModelBlock) -> None:
    """Undo what loading and training had set: masters in fp32, which are read as rounded as the
    base's own dtype, and generation without a cache.
    """
    empty = empty_model(settings)
    dtypes = {path: weight.dtype for path, weight in empty.named_parameters()}
    for path, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[path])
    if "use_cache" in vars(empty.config):
        model.config.use_cache = empty.config.use_cache
    else:
        del model.config.use_cache


def _loaded(settings: ModelBlock) -> nn.Module:
    try:
        model = load_model(settings)
    except ValueError as error:
        raise RecipeError("model", str(error)) from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def _opened(folder: Path, form: str, settings: ModelBlock) -> nn.Module:
    """The export as others open it: nothing of ours is in the model."""
    if form == "merged":
        here = {"model_name_or_path": str(folder), "model_revision": None}
        return _loaded(replace(settings, adapter_name_or_path=None, **here))
    base = _loaded(replace(settings, **UNPACKED))
    if form == "peft":
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_tensors(folder / "adapter_model.safetensors")
    adapter_file.add_expert_layout(base, tensors, config["lora_alpha"] / config["r"])
    return base
