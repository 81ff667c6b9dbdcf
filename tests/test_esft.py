"""ESFT: the experts that a task uses most train, and nothing else moves."""

import pytest
import torch

from families import FAMILIES, inputs
from mllm_cl import Memory
from mllm_cl.methods.instruction.esft import ESFT, best
from mllm_cl.model.experts import experts
from mllm_cl.model.surgery import installed_on
from toy_run import collator_of, learn, load, logits, toy_tasks

FOLDER = "qwen3-vl-moe"


def chosen_by_hand(folder, samples, score: str, share: float) -> dict[str, set[int]]:
    """The paper's rule in plain Python, from what the router of a fresh model says."""
    model, batch = load(folder), collator_of(folder)(list(samples))
    real, found = batch["attention_mask"].flatten().bool(), {}

    def look(path):
        def hook(module, args):
            _, index_TK, weight_TK = args
            points: dict[int, float] = {}
            for row, (index_K, weight_K) in enumerate(zip(index_TK, weight_TK, strict=True)):
                if not real[row]:
                    continue
                for expert, weight in zip(index_K.tolist(), weight_K.tolist(), strict=True):
                    points[expert] = points.get(expert, 0) + (1 if score == "token" else weight)
            total, held, taken = sum(points.values()), 0.0, set()
            for expert in sorted(points, key=points.get, reverse=True):
                if held >= share * total:
                    break
                taken.add(expert)
                held += points[expert]
            found[path] = taken

        return hook

    for path, one in experts(model).items():
        one.module.register_forward_pre_hook(look(path))
    logits(model, batch)
    return found


@pytest.mark.parametrize("how", ["whole", "lora"])
@pytest.mark.parametrize(("score", "share"), [("token", 0.2), ("gate", 0.5)])
def test_only_the_experts_that_hold_the_share_move(tiny_folder, how, score, share):
    folder, task = tiny_folder[FOLDER], toy_tasks()[0]
    expected = chosen_by_hand(folder, task.train.samples, score, share)
    model, memory = load(folder), Memory()
    method = ESFT(score=score, share=share, experts=how, calibration_tokens=10**6)
    learn(model, folder, method, task, memory, weight_decay=0.0)
    for path, one in experts(model).items():
        assert set(memory[f"esft/{task.name}/{path}"].nonzero()[:, 0].tolist()) == expected[path]
        assert 0 < len(expected[path]) < one.num_experts
        moved = torch.zeros(one.num_experts, dtype=torch.bool)
        for guarded in installed_on(one.module).values():
            moved |= guarded.displacement.flatten(1).any(1)
        assert set(moved.nonzero()[:, 0].tolist()) == expected[path]


def test_every_task_chooses_anew_and_keeps_what_was_learnt(tiny_folder):
    folder, tasks = tiny_folder[FOLDER], toy_tasks()
    model, memory = load(folder), Memory()
    method = ESFT(calibration_tokens=10**6)
    learn(model, folder, method, tasks[0], memory)
    first = {
        (path, name): guarded.displacement.clone()
        for path, one in experts(model).items()
        for name, guarded in installed_on(one.module).items()
    }
    learn(model, folder, method, tasks[1], memory)
    for path, one in experts(model).items():
        rests = ~memory[f"esft/{tasks[1].name}/{path}"]
        for name, guarded in installed_on(one.module).items():
            assert torch.equal(guarded.displacement[rests], first[path, name][rests])


def test_experts_that_no_token_reached_are_named():
    model, method = FAMILIES["ernie4_5_vl_moe"](), ESFT()  # its experts for pictures
    task, memory = toy_tasks()[0], Memory()
    method.before_task(model, task, memory)
    with pytest.raises(ValueError, match="no token of the task's data reached .*vision_moe"):
        method.start_task(model, task, memory, [inputs(model)], lambda tensor: tensor)


def test_the_fewest_experts_that_hold_the_share():
    score_E = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    assert best(score_E, 0.4).tolist() == [False, True, False, False]
    assert best(score_E, 0.41).tolist() == [False, True, True, False]
    assert best(score_E, 1.0).all()


@pytest.mark.parametrize(
    "settings", [{"share": 0.0}, {"experts": "frozen"}, {"train_router": True}]
)
def test_settings_that_are_no_esft_are_refused(settings):
    with pytest.raises(ValueError, match="share|esft"):
        ESFT(**settings)
