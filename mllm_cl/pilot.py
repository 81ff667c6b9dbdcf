"""JSON configs of LAMDA-PILOT, C3Box and PROOF as recipes: what can be said in one is, and every
other key is named with the reason.

Their keys are those of the released code. Nothing is fetched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mllm_cl.data.benchmarks import classes_block
from mllm_cl.recipe import Recipe
from mllm_cl.recipe.convert import settable
from mllm_cl.recipe.errors import RecipeError, nearest

# Their names of methods and ours; APER's say what is put in.
METHODS = {
    "coda_prompt": "coda_prompt",
    "coda": "coda_prompt",
    "dualprompt": "dual_prompt",
    "dual": "dual_prompt",
    "zs_clip": "zs_clip",
    "zs-clip": "zs_clip",
}
ADAPTED = {"adapter": "adapter", "ssf": "ssf", "vpt": "vpt_shallow"}
DATASETS = {
    "cifar224": "cifar100",
    "cifar100": "cifar100",
    "cub": "cub",
    "cub200": "cub",
    "imagenetr": "imagenet_r",
    "imageneta": "imagenet_a",
    "objectnet": "objectnet",
    "omnibenchmark": "omnibench",
    "vtab": "vtab",
    "aircraft": "aircraft",
    "cars": "cars",
    "food101": "food101",
    "food": "food101",
    "sun": "sun397",
    "ucf101": "ucf101",
    "ucf": "ucf101",
    "tv100": "tv100",
}
# Folders that recipes/convert.py makes.
IN21K = "converted/vit-b-16-augreg-in21k"
IN1K = "converted/vit-b-16-augreg-in1k"
LAION = "converted/clip-vit-b-16-laion400m"
BACKBONES = {
    "vit_base_patch16_224": IN1K,
    "vit_b16_224": IN1K,
    "vit_base_patch16_224_in21k": IN21K,
    "vit_b16_224_in21k": IN21K,
    "clip": LAION,
    "openai_clip": "openai/clip-vit-base-patch16",
    "clip_laion2b": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
}
# Their settings and ours of the same meaning: the first that the method has takes the value.
SETTINGS = (
    ("ffn_num", "rank"),
    ("prompt_token_num", "prompts"),
    ("size", "pool"),
    ("length", "length"),
    ("length", "expert"),  # of DualPrompt, whose other prompts have a key of their own
    ("top_k", "top_k"),
    ("pull_constraint_coeff", "pull"),
    ("batchwise_prompt", "batchwise"),
    ("g_prompt_length", "general"),
    ("g_prompt_layer_idx", "general_blocks"),
    ("e_prompt_layer_idx", "expert_blocks"),
    ("alpha", "alpha"),
    ("M", "dim"),
    ("T", "temperature"),
    ("ca_epochs", "align_epochs"),
    ("ca_with_logit_norm", "temperature"),
    ("alpha_aux", "alpha"),
    ("train_base", "train_base"),
    ("ema_decay", "decay"),
    ("pet_length", "length"),
    ("down_sample_dim", "rank"),
    ("text_des", "text_des"),
    ("image_aug", "image_aug"),
    ("sample_noise", "noise"),
    ("stat", "stat"),
    ("rerank", "rerank"),
    ("rerank_top", "rerank_top"),
)
EPOCHS = ("tuned_epoch", "epochs", "epoch", "init_epoch", "init_epochs", "later_epochs")
RATES = ("init_lr", "lr", "lrate", "init_lrate", "later_lr")
DECAYS = ("weight_decay", "init_weight_decay")
SCHEDULES = {"cosine": "cosine", "constant": "constant"}
REASONS = {
    "prefix": "a name for their log files",
    "device": "hardware belongs in the launch file",
    "print_forget": "forgetting is always told",
    "pretrained": "weights are always those of the model's folder",
    "num_workers": "set training.dataloader_num_workers if loading is slow",
    "milestones": "there is no schedule in steps",
    "init_milestones": "there is no schedule in steps",
    "lrate_decay": "there is no schedule in steps",
    "init_lr_decay": "there is no schedule in steps",
    "use_prompt_mask": "which prompts train is part of the method",
    "sample_num": "all old classes are in every batch, as with 0 there",
}
NO_EXEMPLARS = "{} keeps no exemplars; there it is a placeholder"


@dataclass
class Imported:
    """A recipe as a tree, and their keys that it does not say, each with the reason."""

    tree: dict[str, Any]
    unmapped: dict[str, str] = field(default_factory=dict)

    def text(self, source: str) -> str:
        """The recipe as a file, which names at its top what is not in it."""
        head = [f"# From {source}. What of it is not here:"]
        head += [f"#   {key}: {why}" for key, why in self.unmapped.items()] or ["#   nothing"]
        model = self.tree["model"]["model_name_or_path"]
        if model.startswith("converted/"):
            head.append(f"# recipes/convert.py makes {model}, once.")
        body = yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)
        return "\n".join([*head, body])


def imported(path: str | Path) -> Imported:
    """The recipe of a config. RecipeError where it is none, or names what is not known here."""
    path = Path(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reading = isinstance(error, OSError)
        problem = f"cannot be read: {error.strerror}" if reading else f"is no JSON file: {error}"
        raise RecipeError("import", f"{path} {problem}") from None
    if not isinstance(config, dict) or not {"model_name", "dataset"} <= config.keys():
        raise RecipeError("import", f"{path} has no 'model_name' and 'dataset', as configs do")
    try:
        found = _recipe(config, path.stem)
        Recipe.from_tree(json.loads(json.dumps(found.tree)), path)
    except RecipeError as error:
        raise RecipeError(error.key, error.problem, f"{path}") from None
    return found


def _recipe(config: Mapping[str, Any], stem: str) -> Imported:
    left = dict(config)
    found = Imported({"output_dir": f"runs/{stem}", "model": {}, "method": {}})
    name, kind = _method(left, found)
    _model(left, found)
    data = _classes(left, found)
    if "future" in settable(kind):  # what their files say of classes to come is not left out there
        found.tree["method"]["future"] = True
        found.tree["classes"]["descriptions"] = f"${{MLLM_CL_CIL:-data/cil}}/{data}.json"
    _exemplars(left, found, kind)
    _settings(left, found, kind)
    _training(left, found)
    for key in left:
        found.unmapped[key] = REASONS.get(key, f"{name} here has no such setting")
    return found


# --- the parts; each takes from `left` the keys that it has read ----------------------------------


def _method(left: dict[str, Any], found: Imported) -> tuple[str, type]:
    """Our name of the method and its class. RecipeError for one that is not here."""
    from mllm_cl.method import load_method, names

    theirs = str(left.pop("model_name")).lower()
    head, _, tail = theirs.partition("_")
    if head in ("aper", "adam") and tail in (*ADAPTED, "finetune", "bn"):
        name = "aper"
        found.tree["method"] |= {"adaptation": _adaptation(tail, left)}
    else:
        name = METHODS.get(theirs, theirs)
    known = names("class_incremental")
    if name not in known:
        problem = f"found {theirs!r}, and no such method is here{nearest(name, known)}"
        raise RecipeError("model_name", problem)
    kind = load_method(name, "class_incremental")
    found.tree["method"] = {"name": name} | found.tree["method"]
    if "mode" in settable(kind):
        found.tree["method"]["mode"] = "released"  # whose config this is
    return name, kind


def _adaptation(tail: str, left: dict[str, Any]) -> str:
    """What APER puts in."""
    if tail != "vpt":
        return ADAPTED.get(tail, tail)
    return f"vpt_{left.pop('vpt_type', 'shallow')}".lower()


def _model(left: dict[str, Any], found: Imported) -> None:
    key = next((one for one in ("backbone_type", "convnet_type") if one in left), None)
    theirs = str(left.pop(key)).lower() if key else "vit_base_patch16_224"
    bare = theirs.removeprefix("pretrained_")
    for end in (
        "_adapter",
        "_ssf",
        "_vpt",
        "_l2p",
        "_dualprompt",
        "_coda_prompt",
        "_ease",
        "_lae",
        "_memo",
    ):
        bare = bare.removesuffix(end)
    if bare not in BACKBONES:
        problem = f"found {theirs!r}, a backbone that is not known{nearest(bare, BACKBONES)}"
        raise RecipeError(key or "backbone_type", problem)
    found.tree["model"]["model_name_or_path"] = BACKBONES[bare]


def _classes(left: dict[str, Any], found: Imported) -> str:
    """Our name of the data set."""
    theirs = str(left.pop("dataset")).lower()
    if theirs not in DATASETS:
        problem = f"found {theirs!r}, a data set that is not known{nearest(theirs, DATASETS)}"
        raise RecipeError("dataset", problem)
    for key in ("init_cls", "increment"):
        if key not in left:
            raise RecipeError(key, "is missing")
    of_clip = "clip" in found.tree["model"]["model_name_or_path"].lower()
    sizes = left.pop("init_cls"), left.pop("increment")
    block = classes_block(DATASETS[theirs], *sizes, of_clip=of_clip)
    seeds = left.pop("seed", 1993)
    seeds = seeds if isinstance(seeds, list) else [seeds]
    block["order"] = seeds[0] if left.pop("shuffle", True) else None
    found.tree["classes"] = block
    if len(seeds) > 1:
        more = ",".join(map(str, seeds))
        found.unmapped["seed"] = f"the first is here; all: --sweep classes.order={more}"
    return DATASETS[theirs]


def _exemplars(left: dict[str, Any], found: Imported, kind: type) -> None:
    """The memory: so many of each class, or a number that all share."""
    fixed = bool(left.pop("fixed_memory", False))
    used, unused = ("memory_per_class", "memory_size")[:: 1 if fixed else -1]
    for key in (used, unused):
        value = left.pop(key, None)
        if key == used and key in settable(kind) and value:
            own = settable(kind)[unused].default
            found.tree["method"] |= {key: value} | ({} if own is None else {unused: None})
        elif value and not kind.rehearsal:
            found.unmapped[key] = NO_EXEMPLARS.format(found.tree["method"]["name"])
        elif value:
            found.unmapped[key] = f"not used there with 'fixed_memory: {str(fixed).lower()}'"


def _settings(left: dict[str, Any], found: Imported, kind: type) -> None:
    """The method's own numbers, as far as the method here has them."""
    for theirs, ours in SETTINGS:
        if theirs in left and ours in settable(kind):
            found.tree["method"][ours] = left.pop(theirs)


def _training(left: dict[str, Any], found: Imported) -> None:
    training: dict[str, Any] = {}
    for keys, ours in (
        (EPOCHS, "num_train_epochs"),
        (RATES, "learning_rate"),
        (("batch_size",), "per_device_train_batch_size"),
        (DECAYS, "weight_decay"),
    ):
        _first_of(keys, ours, left, training, found)
    optimizer = str(left.pop("optimizer", "sgd")).lower()
    if optimizer == "sgd":
        training |= {"optim": "sgd", "optim_args": f"momentum={left.pop('momentum', 0.9)}"}
    else:  # which their "adam" is, too
        training["optim"] = "adamw_torch"
    _schedule(left, training, found)
    training["max_grad_norm"] = 0  # they do not clip; the Trainer does, at 1
    found.tree["training"] = training


def _first_of(
    keys: Sequence[str],
    ours: str,
    left: dict[str, Any],
    training: dict[str, Any],
    found: Imported,
) -> None:
    """One setting of the training for all stages; another value for later stages has no place."""
    given = {key: left.pop(key) for key in keys if key in left}
    if not given:
        return
    chosen = next(iter(given))
    training[ours] = given.pop(chosen)
    for key, value in given.items():
        if value != training[ours]:
            found.unmapped[key] = f"all stages train alike: training.{ours} is that of {chosen}"


def _schedule(left: dict[str, Any], training: dict[str, Any], found: Imported) -> None:
    usual = "constant" if {"milestones", "init_milestones"} & left.keys() else "cosine"
    name, floor = str(left.pop("scheduler", usual)).lower(), left.pop("min_lr", None)
    # In most configs the steps of "steplr" lie behind the last epoch.
    chosen = SCHEDULES.get(name, "constant" if name == "steplr" else "cosine")
    if name not in SCHEDULES:
        found.unmapped["scheduler"] = f"there is no schedule {name!r}; {chosen} is here"
    training["lr_scheduler_type"] = chosen
    if floor and training["lr_scheduler_type"] == "cosine":
        training["lr_scheduler_type"] = "cosine_with_min_lr"
        training["lr_scheduler_kwargs"] = {"min_lr": floor}
    elif floor:
        found.unmapped["min_lr"] = "a constant rate has no end"
