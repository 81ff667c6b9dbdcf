"""The recipe that trains a backbone on the classes that a run begins with."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mllm_cl import Recipe
from mllm_cl.data.classes import class_order
from mllm_cl.data.labelled import labelled
from mllm_cl.settings.class_incremental import load, tasks_of

ROOT = Path(__file__).parents[1]
DATA = "toy:compositions"


def test_the_backbone_opens_in_a_run_that_begins_with_the_classes_it_saw(tmp_path):
    words = f"{DATA} --first 3 --order 1993 --side 32 --epochs 1 --out {tmp_path}".split()
    command = [sys.executable, str(ROOT / "recipes/make_class_base.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    names = labelled(DATA, "train", 1).names
    first = [names[place] for place in class_order(len(names), 1993)[:3]]
    assert json.loads((tmp_path / "make_base.log").read_text())["classes"] == first
    classes = {"data": DATA, "number": len(names), "first": 3, "increment": 17, "order": 1993}
    tree = {
        "model": {"model_name_or_path": str(tmp_path)},
        "method": {"name": "simplecil"},
        "classes": classes | {"preprocessing": "paper_compat"},
    }
    recipe = Recipe.from_tree(tree, "recipe.yaml")
    sequence = tasks_of(recipe)
    model, collator = load(recipe, sequence)
    assert list(sequence[0].labels) == first and model.encoder.width == 256
    assert collator([sequence[0].train[0]])["pixel_values"].shape == (1, 3, 32, 32)
