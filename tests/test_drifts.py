"""What a run records about drift: the three parts against swapping them by hand, and its files."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mllm_cl import Memory, load_method, tracking
from mllm_cl.cost import Cost
from mllm_cl.data.toy import toy_task
from mllm_cl.drift.measure import rerouting_accuracy
from mllm_cl.drifts import Drift, _routers, _rows, measure
from mllm_cl.memory import save_tensors
from mllm_cl.metrics.answers import metric
from mllm_cl.model.layers import trained_layers
from mllm_cl.model.probe import KEPT, look
from mllm_cl.model.surgery import guards, restore_state, trained_state
from mllm_cl.model.watch import router_logits
from mllm_cl.probes import Kept, spread
from mllm_cl.task import Task
from toy_run import NAMES, collator_of, load

WHOLE = {"use_peft": False, "num_experts": 0, "lora_target_modules": ("q_proj", "k_proj", "o_proj")}
MIXED = {"num_experts": 3, "lora_r": 4, "top_k": 2, "lora_target_modules": ("q_proj", "down_proj")}
CASES = {  # model, method, settings
    "native routers and whole linears": ("qwen3-vl-moe", "same", WHOLE),
    "mixtures of LoRA experts": ("llava", "same", MIXED),
    "a plain LoRA": ("llava", "finetune", {"lora_r": 4, "lora_target_modules": ("q_proj",)}),
}


def tasks(size: int = 8) -> list[Task]:
    exact = metric("exact_match")
    sets = [toy_task(name, "test", size) for name in NAMES]
    return [Task(n, i + 1, s, s, exact) for i, (n, s) in enumerate(zip(NAMES, sets, strict=True))]


def made(folder: Path, method: str, settings: dict):
    """A model with the method's surgery, its base's names, and a collator."""
    model = load(folder)
    base = {name for name, _ in model.named_parameters()}
    load_method(method)(**settings).before_task(model, tasks()[0], Memory())
    return model, base, collator_of(folder)


def shaken(model, base: set[str], seed: int) -> dict[str, torch.Tensor]:
    """The state of the model after something has moved all that trains by about its size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in guards(model).values():
            one.displacement = 0.05 * torch.randn(one.displacement.shape, generator=generator)
        for name, weight in model.named_parameters():
            if weight.requires_grad and not name.endswith("_guard.delta"):
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return {name: tensor.clone() for name, tensor in trained_state(model, base).items()}


def stage(folder: Path, drift: Drift, state: dict[str, torch.Tensor]) -> Path:
    """The files of a stage that drift needs."""
    folder.mkdir()
    drift.save(folder)
    save_tensors(state, folder / "state.safetensors")
    return folder


def relative(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("case", CASES)
def test_each_part_of_drift_is_what_swapping_it_by_hand_gives(case, tiny_folder, tmp_path):
    kind, method, settings = CASES[case]
    model, base, collate = made(tiny_folder[kind], method, settings)
    task = tasks()[:1]
    before = shaken(model, base, 1)
    first = measure(model, collate, task, [], before, batch_size=4)
    old = stage(tmp_path / "task_1", first, before)
    layers, routers = trained_layers(model), _routers(model)
    batches = [collate([task[0].eval[i] for i in range(8)])]
    then = look(model, layers, routers, batches)
    after = shaken(model, base, 2)
    second = measure(model, collate, task, [old], after, batch_size=4)
    now = look(model, layers, routers, batches)
    assert bool(routers) == (method == "same")
    for path, router in routers.items():
        row = second.rows[f"{task[0].name}::{path}"]
        old_router_new_inputs = router_on(model, router, before, now.inputs[path], after)
        new_router_old_inputs = router_logits(router, then.inputs[path])
        assert row["inputs"] == pytest.approx(relative(then.inputs[path], now.inputs[path]), 0.02)
        moved = relative(centred(then.logits[path]), centred(new_router_old_inputs))
        assert row["router"] == pytest.approx(moved, rel=0.02)
        k = 2
        for part, other in (("inputs", old_router_new_inputs), ("router", new_router_old_inputs)):
            shared = shared_experts(then.logits[path], other, k)
            # inputs are kept in bf16, which may turn the choice of a token on the verge
            assert row[f"overlap_by_{part}"] == pytest.approx(shared, abs=0.05)
    for path, layer in layers.items():
        row = second.rows[f"{task[0].name}::{path}"]
        moved = answers_moved(model, layer, before, after, then.inputs[path])
        assert row["experts"] == pytest.approx(moved, rel=0.03) and row["experts"] > 0.01


def router_on(model, router, state, inputs, back) -> torch.Tensor:
    """The logits of a router as it was in `state`; the model is put back."""
    restore_state(model, state)
    found = router_logits(router, inputs)
    restore_state(model, back)
    return found


def answers_moved(model, layer, before, after, inputs) -> float:
    """||y' - y|| / ||y|| of a layer run on the same inputs, routing of mixtures held as before."""
    with torch.no_grad():
        restore_state(model, before)
        old = layer.module(inputs)
        held = {name: value for name, value in before.items() if ".router." in name}
        restore_state(model, {**after, **held})
        new = layer.module(inputs)
        restore_state(model, after)
    return relative(old, new)


def shared_experts(one: torch.Tensor, other: torch.Tensor, k: int) -> float:
    pairs = zip(one.topk(k).indices.tolist(), other.topk(k).indices.tolist(), strict=True)
    return sum(len(set(a) & set(b)) / k for a, b in pairs) / len(one)


def test_what_has_not_moved_has_no_drift(tiny_folder, tmp_path):
    model, base, collate = made(tiny_folder["qwen3-vl-moe"], "same", WHOLE)
    state = shaken(model, base, 1)
    first = measure(model, collate, tasks()[:1], [], state, batch_size=4)
    old = stage(tmp_path / "task_1", first, state)
    again = measure(model, collate, tasks()[:1], [old], state, batch_size=4)
    for name, row in again.rows.items():
        for key, value in row.items():
            kept = "overlap" in key or key == "rerouting_accuracy"
            if key == "distribution_overlap":  # a sum of probabilities in half precision
                assert value == pytest.approx(1.0, abs=1e-3)
            elif key != "entropy":
                assert value == (1.0 if kept else 0.0), (name, key)
    assert first.rows == again.rows


def test_a_task_is_compared_with_the_stage_that_learnt_it(tiny_folder, tmp_path):
    model, base, collate = made(tiny_folder["qwen3-vl-moe"], "same", WHOLE)
    one, two = tasks()
    folders, rows = [], []
    for number, learnt in enumerate(([one], [one, two], [one, two])):
        state = shaken(model, base, number)
        drift = measure(model, collate, learnt, list(folders), state, batch_size=8)
        folders.append(stage(tmp_path / f"task_{number}", drift, state))
        rows.append(drift.rows)
    module = next(name.partition("::")[2] for name in rows[0] if "router" in rows[0][name])
    changes = [
        [row.get(f"{task.name}::{module}", {}).get("router") for row in rows] for task in (one, two)
    ]
    assert changes[0][0] == 0 and min(changes[0][1:]) > 0
    assert changes[1][:2] == [None, 0] and changes[1][2] > 0
    trajectory = json.loads((folders[1] / "covariance.json").read_text())[module]
    assert set(trajectory) == set(NAMES) and set(trajectory[one.name]) == {two.name}
    assert trajectory[two.name][two.name] >= 0.9  # what its own directions hold by their choice
    assert json.loads((folders[2] / "covariance.json").read_text()) == {}


def test_the_tokens_looked_at_do_not_depend_on_the_batches_and_are_no_padding(tiny_folder):
    model, _, collate = made(tiny_folder["qwen3-vl-moe"], "same", WHOLE)
    samples = [tasks()[0].eval[i] for i in range(4)] + [tasks()[1].eval[i] for i in range(4)]
    layers, routers = trained_layers(model), _routers(model)
    seen = [
        look(model, layers, routers, [collate(samples[i : i + n]) for i in range(0, 8, n)])
        for n in (8, 3)
    ]
    assert seen[0].inputs and all(len(part) == 8 * KEPT for part in seen[0].inputs.values())
    for path, part in seen[0].inputs.items():
        torch.testing.assert_close(part, seen[1].inputs[path], rtol=1e-4, atol=1e-5)


class Scattering(torch.nn.Module):
    """An expert with a linear of its own, which only tokens of one parity reach."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.expert = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)
        self.embed.requires_grad_(False)
        self.parity = 0

    def forward(self, input_ids, attention_mask, use_cache=False):
        return self.expert(self.embed(input_ids)[input_ids % 2 == self.parity])


def test_other_tokens_at_an_expert_are_not_taken_for_moved_ones():
    model, ids = Scattering(), torch.arange(8).view(2, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    layers = trained_layers(model)
    assert list(layers) == ["expert"]
    sights = []
    for model.parity in (0, 1):
        sights.append(look(model, layers, {}, [batch], moments=True))
    assert sights[0].scattered == {"expert"}
    state = {"expert.weight": model.expert.weight.detach()}
    kept = Kept(state)
    kept.add("one", sights[0], 2**20)
    moved = {"expert.weight": 2 * state["expert.weight"]}
    ((path, row),) = _rows("one", kept, sights[1], moved, layers, {})
    assert path == "expert" and set(row) == {"experts"} and row["experts"] > 0.1


def test_what_a_stage_keeps_is_bounded(tiny_folder):
    model, _, collate = made(tiny_folder["qwen3-vl-moe"], "same", WHOLE)
    batch = collate([tasks()[0].eval[i] for i in range(8)])
    sight = look(model, trained_layers(model), _routers(model), [batch], moments=True)
    widths = {path: part.shape[-1] for path, part in sight.inputs.items()}
    row = sum(2 * widths[path] for path in set(sight.source_of.values()))
    kept = Kept({})
    kept.add("one", sight, 12 * row)
    inputs = [part for name, part in kept.tensors.items() if "::inputs::" in name]
    assert sum(part.numel() * part.element_size() for part in inputs) == 12 * row
    # q and k are handed the same tensor, which is kept once
    assert len(inputs) < len(widths)
    some = next(iter(sight.inputs))
    assert torch.equal(
        kept.get("one", "inputs", some), spread(sight.inputs[some], 12).bfloat16().float()
    )


def test_rerouting_accuracy_counts_tokens_that_go_to_exactly_their_experts():
    before = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4]])
    after = torch.tensor([[3.0, 4, 2, 1], [4, 1, 2, 3], [1, 2, 3, 4]])
    assert float(rerouting_accuracy(before, after, 2)) == pytest.approx(2 / 3)
    assert float(rerouting_accuracy(before, after, 1)) == pytest.approx(2 / 3)
    assert float(rerouting_accuracy(before, after, 4)) == 1.0


@pytest.fixture(scope="module")
def drift_on(tiny_folder, tmp_path_factory):
    """The drift that a run of two tasks records on an engine, by stage."""
    from launches import launch

    def of(kind: str, engine: str) -> list[dict]:
        if (kind, engine) not in known:
            folder = tmp_path_factory.mktemp(engine)
            settings = MIXED if kind == "llava" else WHOLE
            method = {name: settings[name] for name in ("num_experts", "top_k") if name in settings}
            tree = {
                "output_dir": str(folder / "run"),
                "model": {"model_name_or_path": str(tiny_folder[kind])}
                | {name: value for name, value in settings.items() if name not in method},
                "method": {"name": "same", "calibration_tokens": 512, **method},
                "tasks": [
                    {"name": name, "data": f"toy:{name}", "train_size": 16, "eval_size": 8}
                    for name in NAMES
                ],
                "training": {
                    "per_device_train_batch_size": 8 if engine == "single" else 4,
                    "max_steps": 2,
                    "learning_rate": 0.01,
                    "save_strategy": "no",
                },
                "eval": {"batch_size": 8, "max_new_tokens": 1},
            }
            tree["model"]["lora_target_modules"] = list(settings["lora_target_modules"])
            (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
            launch(engine, "run_script.py", str(folder / "recipe.yaml"))
            known[kind, engine] = [
                json.loads((folder / "run" / f"task_{stage}" / "drift.json").read_text())
                for stage in range(3)
            ]
        return known[kind, engine]

    known: dict[tuple[str, str], list[dict]] = {}
    return of


@pytest.mark.engines
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
@pytest.mark.parametrize("kind", ["qwen3-vl-moe", "llava"])
def test_drift_is_the_same_on_every_engine(kind, engine, drift_on):
    alone, together = drift_on(kind, "single"), drift_on(kind, engine)
    assert [rows.keys() for rows in alone] == [rows.keys() for rows in together]
    assert any(row.get("experts", 0) > 1e-3 for row in alone[2].values())
    for stage, rows in enumerate(alone):
        for name, row in rows.items():
            # chosen experts may turn on the verge, and bf16 rounds inputs
            assert together[stage][name] == pytest.approx(row, abs=0.02), name


SCORES = {
    "tasks": ["a", "b"],
    "retain": [],
    "rows": [
        {"after": "zero-shot", "scores": {"a": 0.1, "b": 0.0}},
        {"after": "a", "scores": {"a": 0.9, "b": 0.2}},
    ],
    "summary": {"average": 0.9, "forgetting": None},
}
DRIFT = {"a::x.0.gate": {"overlap": 0.5, "kl": 9.0, "inputs": 0.2}, "a::x.1.gate": {"overlap": 0.7}}


def test_trackers_get_scores_and_drift_under_stable_names():
    cost = Cost()
    cost.lap("train")
    found = tracking.values(SCORES, DRIFT, cost.table({"w": torch.zeros(3)}))
    seconds = found.pop("cost/seconds")
    assert seconds >= 0 and found == {
        "score/a": 0.9,
        "score/b": 0.2,
        "average": 0.9,
        "drift/router_overlap/a": pytest.approx(0.6),
        "drift/inputs/a": 0.2,
        "cost/state_bytes": 12,
    }


def test_tensorboard_draws_a_score_as_one_curve_over_the_stages(tmp_path):
    pytest.importorskip("tensorboard")
    from accelerate import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState()
    for number, score in enumerate((0.1, 0.9, 0.4)):
        tracking.send({"score/a": score}, ["tensorboard", "codecarbon"], tmp_path, number)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("score/a")]
    assert points == [(0, pytest.approx(0.1)), (1, pytest.approx(0.9)), (2, pytest.approx(0.4))]
