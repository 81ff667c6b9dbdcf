"""What every class-incremental method owes, on the package's own CLIP: a dry run says what it keeps
at most, and the class names are answered after every stage.
"""

import json
from pathlib import Path

import pytest

from mllm_cl import Recipe, run
from mllm_cl.forecast import Launch
from mllm_cl.forecast_classes import forecast_classes
from mllm_cl.method import names

BLOCKS = {"blocks": [0, 1]}  # of a tower that has four
OWN = {
    "coda_prompt": BLOCKS,
    "dual_prompt": {"general_blocks": [0], "expert_blocks": [1, 2]},
    "lae": BLOCKS,
    "engine": {"image_aug": 0, "text_des": 0, "rerank": 0},
    "ranpac": {"dim": 64},
    "cpp": {"negatives": 4, "centroids": 2},
    "coop": {"words": 4, "memory_per_class": 2},
    "icarl": {"memory_per_class": 2},
    "lit": {"memory_per_class": 2},
    "memo": {"memory_per_class": 2},
    "proof": {"memory_per_class": 2},
}
STAGES = 2


@pytest.fixture(scope="module", params=names("class_incremental"))
def done(request, tmp_path_factory) -> Recipe:
    """A finished run of a method."""
    tree = {
        "output_dir": str(tmp_path_factory.mktemp(request.param) / "run"),
        "model": {"model_name_or_path": "toy:clip"},
        "method": {"name": request.param} | OWN.get(request.param, {}),
        "classes": {
            "data": "toy:compositions",
            "number": 2 * STAGES,
            "increment": 2,
            "preprocessing": "clip",
            "train_size": 5,
            "eval_size": 2,
        },
        "training": {"max_steps": 2, "per_device_train_batch_size": 5},
        "eval": {"batch_size": 12},
    }
    recipe = Recipe.from_tree(tree, "recipe.yaml")
    run(recipe)
    return recipe


def test_no_more_is_kept_than_a_dry_run_says_and_not_much_less(done):
    kept = json.loads((Path(done.output_dir) / f"task_{STAGES}/manifest.json").read_text())[
        "memory_bytes"
    ]
    said = forecast_classes(done, Launch()).kept_bytes
    assert kept <= said <= 1.25 * kept + 64


def test_class_names_are_answered_while_pictures_and_texts_share_a_space(done):
    rows = json.loads((Path(done.output_dir) / "scores.json").read_text())["rows"]
    # The features of these are several encoders' side by side.
    assert ("zero_shot" in rows[-1]) != (done.method_name in ("aper", "ease", "memo"))
