"""The model card of an export: what was learnt from which base, what folding and rounding changed,
and the scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm_cl.likeness import Difference
from mllm_cl.model.load import location
from mllm_cl.recipe import Recipe
from mllm_cl.recipe.blocks import ADAPTER
from mllm_cl.reload import POSITIONS

CODE = {
    "merged": """\
from transformers import {auto}, AutoProcessor

model = {auto}.from_pretrained("THIS_FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")""",
    "peft": """\
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")""",
    "per-expert-peft": """\
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules learnt=THIS_FOLDER""",
}
OPENED = {
    "merged": "by plain transformers",
    "peft": "by plain transformers and PEFT",
    "per-expert-peft": "by adding each expert's product B A to its weight in plain transformers",
}
NOTES = {
    "per-expert-peft": "Every expert's `gate_proj`, `up_proj` and `down_proj` has factors of its "
    "own, for servers that read them so. Plain PEFT, on experts that transformers keeps in one "
    "stack, leaves them out of most families without saying so: for it, export `peft`.",
    "4bit": "The run kept its base in four bits. Below, the base is as it comes, in the trained "
    "model as in this folder; what packing had changed is told apart.",
}


@dataclass(frozen=True)
class Made:
    """What an export is: its folder's name, its form, the base's commit and whether it sees, the
    rank of its adapters, what folding leaked by weight, and how it compares.
    """

    name: str
    form: str
    revision: str | None
    sees: bool
    rank: int
    leaks: Mapping[str, float]
    difference: Difference


def card(made: Made, recipe: Recipe, scores: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The README.md of an export: Markdown below the YAML that the hub reads.

    `recipe` is that of the stage, whose tasks end with it, and `scores` its matrix.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    base, tree = location(recipe.model.model_name_or_path), recipe.resolved()
    licence = _licence_of(base, made.revision)
    auto = "AutoModelForImageTextToText" if made.sees else "AutoModelForCausalLM"
    return templates.get_template("card.jinja").render(
        made=made,
        front=_front(base, made, licence),
        title=_title(made, recipe),
        base=recipe.model.model_name_or_path,
        adapter=recipe.model.adapter_name_or_path,
        licence=licence,
        tasks=[block.name for block in recipe.tasks],
        method=tree["method"].pop("name"),
        settings={key: tree["model"][key] for key in ADAPTER if key in tree["model"]}
        | tree["method"],
        seed=recipe.seed,
        versions={name: value for name, value in manifest["versions"].items() if value},
        code=CODE[made.form].format(auto=auto, base=base, rank=made.rank),
        notes=_notes(made.form, recipe),
        opened=OPENED[made.form],
        positions=POSITIONS,
        scores=scores,
    )


def _title(made: Made, recipe: Recipe) -> str:
    what = "weights" if made.form == "merged" else "LoRA"
    number = len(recipe.tasks)
    how = "together" if recipe.method.trains_once else "one after another"
    learnt = f"{number} tasks, learnt {how}" if number > 1 else "one task"
    return f"The {what} of {recipe.model.model_name_or_path} after {learnt}"


def _notes(form: str, recipe: Recipe) -> list[str]:
    kinds = (form, "4bit" if recipe.model.load_in_4bit else "")
    return [NOTES[kind] for kind in kinds if kind in NOTES]


def _front(base: str, made: Made, licence: str | None) -> str:
    """What the hub reads of a card, as YAML."""
    tree: dict[str, Any] = {
        "license": licence or "unknown",
        "library_name": "transformers" if made.form == "merged" else "peft",
        "pipeline_tag": "image-text-to-text" if made.sees else "text-generation",
        "tags": ["continual-learning", "mllm_cl"],
    }
    if not Path(base).exists():  # a name on the hub
        tree["base_model"] = base
        tree["base_model_relation"] = "finetune" if made.form == "merged" else "adapter"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _licence_of(base: str, revision: str | None) -> str | None:
    """The licence that the card of the base names, None where there is no card or it names none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.repocard import metadata_load

    path = Path(base) / "README.md"
    try:
        if not Path(base).is_dir():
            path = Path(hf_hub_download(base, "README.md", revision=revision))
        told = metadata_load(path) if path.is_file() else None
    except (OSError, ValueError):  # no network, no such file; no YAML that says anything
        return None
    name = (told or {}).get("license")
    return name if isinstance(name, str) else None
