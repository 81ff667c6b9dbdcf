"""What every class-incremental method owes, on the package's own CLIP: a dry run says what it keeps
at most, class names are answered after every stage, a stage answers alike when it is opened again,
and two processes learn and answer as one.
"""

import json
from pathlib import Path

import pytest

from class_cells import answers, assert_alike, run_together
from mllm_cl import Recipe, classifier, run
from mllm_cl.forecast import Launch
from mllm_cl.forecast_classes import forecast_classes
from mllm_cl.method import names
from mllm_cl.settings.class_incremental import tasks_of

BLOCKS = {"blocks": [0, 1]}  # of a tower that has four
STILL = {"dropout": 0.0}  # two processes draw other numbers than one
OWN = {
    "aper": STILL,
    "ease": STILL,
    "finetune_adapter": STILL,
    "coda_prompt": BLOCKS,
    "dual_prompt": {"general_blocks": [0], "expert_blocks": [1, 2]},
    "lae": BLOCKS,
    "engine": {"image_aug": 0, "text_des": 0, "rerank": 0},
    "ranpac": {"dim": 64} | STILL,
    "cpp": {"negatives": 4, "centroids": 2},
    "coop": {"words": 4, "memory_per_class": 2},
    "icarl": {"memory_per_class": 2},
    "lit": {"memory_per_class": 2},
    "memo": {"memory_per_class": 2},
    "proof": {"memory_per_class": 2} | STILL,
    "proof_released": {"name": "proof", "mode": "released", "memory_per_class": 2} | STILL,
}
STAGES = 2
# AdamW moves what has no gradient by rounding alone; its epsilon keeps that small.
TRAINING = {
    "max_steps": 3,  # what trains is judged then
    "per_device_train_batch_size": 6,  # two of one of four classes at least
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-3,
}
NAMES = sorted({*names("class_incremental"), *OWN})
TRAIN = [name for name in NAMES if name not in ("simplecil", "zs_clip")]


@pytest.fixture(scope="module", params=NAMES)
def done(request, tmp_path_factory) -> Recipe:
    """A finished run of a method."""
    tree = {
        "output_dir": str(tmp_path_factory.mktemp(request.param) / "run"),
        "model": {"model_name_or_path": "toy:clip"},
        "method": {"name": request.param} | OWN.get(request.param, {}),
        "classes": {
            "data": "toy:compositions_placed",  # whose names the model gets wrong
            "number": 4 * STAGES,
            "increment": 4,
            "preprocessing": "clip",
            "train_size": 3,
            "eval_size": 2,
        },
        "training": TRAINING,
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


def test_a_stage_that_is_opened_again_gives_every_picture_the_answer_of_the_run(done):
    for stage, task in enumerate(tasks_of(done), start=1):
        again = classifier(done.output_dir, task.name)
        assert again.names == (*task.earlier, *task.labels)
        said = again([sample["images"][0] for sample in task.eval])
        assert said == answers(Path(done.output_dir), stage)[task.name]


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
@pytest.mark.parametrize("done", TRAIN, indirect=True)
def test_two_processes_train_and_answer_as_one_does(done, engine, tmp_path):
    found = run_together(engine, done, tmp_path)
    close = {"stages": range(1, STAGES + 1), "atol": 1e-5, "rtol": 1e-4}
    assert_alike(engine, found, Path(done.output_dir), "state", "memory", **close)
