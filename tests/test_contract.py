"""The promises that every method keeps: one case for each file of methods/, and some settings more.

A method's exceptions are declared in the method: `train_set` None (nothing trains), `rehearsal`,
`num_experts` (routed adapters, which no plain linear can hold), `starts_exact` (to the last bit).
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mllm_cl import Memory, Method, Task, fold, load_method, routers
from mllm_cl.method import Tuned, names
from mllm_cl.model.adapt import resting_experts
from mllm_cl.model.expert_lora import merge_expert_lora
from mllm_cl.model.surgery import guards
from toy_run import NAMES, Learnt, learn, load, logits, probe, toy_tasks

SETTINGS = {"lora_target_modules": ("q_proj", "o_proj"), "lora_r": 4, "calibration_tokens": 500}
WHOLE = {"num_experts": 0, "use_peft": False}
MORE = (
    ("finetune", WHOLE),
    ("same", WHOLE),
    ("same", {"num_experts": 0}),
    ("ewc", {"num_experts": 4}),
    ("router_kl", {"buffer_bytes": 0}),
    ("router_replay", {"num_experts": 4, "top_k": 2}),
)


@dataclass(frozen=True)
class Case:
    """A method with settings and the tiny model that suits it."""

    name: str
    settings: tuple = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings)])

    @property
    def method(self) -> Method:
        kind = load_method(self.name)
        given = SETTINGS if issubclass(kind, Tuned) else {}
        known = kind.__dataclass_fields__
        # What trains experts alone by default has no linears to be told of.
        given = {k: v for k, v in given.items() if k in known and known[k].default != ()}
        return kind(**{k: v for k, v in (given | dict(self.settings)).items() if k in known})

    @property
    def kind(self) -> str:
        """Routed adapters make sparse what is dense; all else trains on what is sparse already."""
        return "llava" if self.routed else "qwen3-vl-moe"

    @property
    def routed(self) -> bool:
        return isinstance(self.method, Tuned) and self.method.num_experts > 0


CASES = [Case(name) for name in names("instruction")]
CASES += [Case(name, tuple(settings.items())) for name, settings in MORE]
LEARNING = [
    case for case in CASES if case.method.train_set(toy_tasks()[0], Memory(), ()) is not None
]
FOLDABLE = [case for case in CASES if not case.routed]


@dataclass
class Story:
    """Two tasks learnt in turn, and what was seen on the way."""

    model: nn.Module
    folder: Path
    before: Tensor
    operated: Tensor
    first: Learnt
    second: Learnt
    memory: Memory
    reads_of_the_past: int


def tell(case: Case, folder: Path) -> Story:
    model, batch, tasks, memory = load(folder), probe(folder), toy_tasks(), Memory()
    before, operated = logits(model, batch), []
    look = {"before_training": lambda model: operated.append(logits(model, batch))}
    first = learn(model, folder, case.method, tasks[0], memory, steps=4, **look)
    reads, past = tasks[0].train.reads, tasks[:1] if case.method.rehearsal else []
    second = learn(model, folder, case.method, tasks[1], memory, past=past, steps=3)
    late = tasks[0].train.reads - reads
    return Story(model, folder, before, operated[0], first, second, memory, late)


@pytest.fixture(scope="module")
def stories(tiny_folder) -> dict[Case, Story]:
    """Each case's story, told when it is asked for the first time."""

    class Told(dict):
        def __missing__(self, case: Case) -> Story:
            self[case] = tell(case, tiny_folder[case.kind])
            return self[case]

    return Told()


def test_every_method_of_the_package_is_a_case():
    assert {case.name for case in CASES} == set(names("instruction"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_surgery_leaves_the_outputs_bitwise_unchanged(case, stories):
    operated, before = stories[case].operated, stories[case].before
    assert torch.equal(operated, before) == case.method.starts_exact
    assert (operated - before).norm() < 1e-6 * before.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_does_not_train_is_bitwise_frozen_under_adamw_with_weight_decay(case, stories):
    for told in (stories[case].first, stories[case].second):
        frozen = told.end.keys() - told.trained
        assert len(frozen) > len(told.trained) or not told.end
        assert all(torch.equal(told.end[name], told.start[name]) for name in frozen)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_method_that_does_not_train_routers_says_so_and_keeps_them(case, stories):
    told, model = stories[case].second, stories[case].model
    weights = {f"{path}.weight" for path in routers(model)}
    weights |= {f"{path}.weight_guard.delta" for path in routers(model)}
    trains = isinstance(case.method, Tuned) and case.method.train_router
    assert bool(weights & told.trained) == (trains and bool(weights))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_protected_is_protected_in_the_stored_displacement(case, stories):
    told = stories[case].second
    for name, one in guards(stories[case].model).items():
        step = (told.displaced_after[name] - told.displaced_before[name]).double()
        closed_K = (one.g.gain_K == 0).unsqueeze(-2)
        basis_DK = one.g.basis_DK.double()
        leaked = (step @ basis_DK * closed_K).norm()
        if one.g.outside == 0:
            leaked = torch.hypot(leaked, (step - step @ basis_DK @ basis_DK.mT).norm())
        assert step.norm() > 0 and leaked < 1e-5 * step.norm(), name


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_every_tensor_that_trains_has_a_gradient_and_moves(case, stories):
    for told in (stories[case].first, stories[case].second):
        assert told.trained
        for name in told.trained:
            assert told.gradient.get(name, 0.0) > 0, f"{name} has no gradient"
            assert not torch.equal(told.end[name], told.start[name]), f"{name} did not move"


@pytest.mark.parametrize("case", [case for case in CASES if case not in LEARNING], ids=str)
def test_a_method_that_trains_nothing_leaves_model_and_memory(case, stories):
    story = stories[case]
    assert torch.equal(logits(story.model, probe(story.folder)), story.before)
    assert not story.memory and not guards(story.model)


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_eight_samples_at_once_and_in_two_halves_lose_alike(case, stories, tiny_folder):
    folder = tiny_folder[case.kind]
    halves = learn(load(folder), folder, case.method, toy_tasks()[0], Memory(), accumulation=2)
    whole = stories[case].first.losses
    assert len(whole) == 4 and whole[0] - whole[-1] > 1e-3  # something was learnt meanwhile
    # 1e-5 at this learning rate: Adam moves a weight whose first gradient is rounding by all of it.
    assert halves.losses == pytest.approx(whole, rel=1e-5)


@dataclass(frozen=True, kw_only=True)
class Pulled(load_method("finetune")):
    """Fine-tuning with a term of its own in the loss: the size of what trains."""

    def loss(self, model, inputs, outputs, memory) -> Tensor:
        return sum(p.square().sum() for p in model.parameters() if p.requires_grad)


def test_a_methods_own_term_counts_once_per_step_however_the_batch_is_cut(tiny_folder):
    folder, settings, losses = tiny_folder["llava"], SETTINGS, []
    for accumulation in (1, 2, 4):
        task = toy_tasks()[0]
        told = learn(
            load(folder),
            folder,
            Pulled(**settings),
            task,
            Memory(),
            steps=2,
            accumulation=accumulation,
        )
        losses.append(told.losses)
    plain = learn(
        load(folder), folder, load_method("finetune")(**settings), task, Memory(), steps=1
    )
    assert losses[0][0] > plain.losses[0] + 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_memory_holds_only_what_is_the_methods_own(case, stories):
    assert all(key.startswith(f"{case.name}/") for key in stories[case].memory)


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_only_a_method_that_declares_rehearsal_looks_at_the_past(case, stories):
    assert (stories[case].reads_of_the_past > 0) == case.method.rehearsal


def without_adapters(model: nn.Module) -> nn.Module:
    """The model with every adapter merged into the weight beside it."""
    merge_expert_lora(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(path, layer.get_base_layer())
    return model


@pytest.mark.parametrize("case", FOLDABLE, ids=str)
def test_what_was_learnt_folds_into_a_model_of_plain_transformers(case, stories, tmp_path):
    story = stories[case]
    batch, keys = probe(story.folder), set(load(story.folder).state_dict())
    learnt = logits(story.model, batch)
    fold(story.model)
    without_adapters(story.model).save_pretrained(tmp_path)
    assert set(story.model.state_dict()) == keys
    again = logits(load(tmp_path), batch)
    assert (again - learnt).norm() < 1e-5 * learnt.norm()
    assert (case in LEARNING) == (not torch.allclose(learnt, story.before, atol=1e-3))


@pytest.mark.parametrize("case", [case for case in CASES if case.routed], ids=str)
def test_routed_adapters_stay_beside_their_linear_when_guards_are_folded(case, stories):
    story = stories[case]
    learnt = logits(story.model, probe(story.folder))
    fold(story.model)
    assert resting_experts(story.model) and not guards(story.model)
    assert torch.allclose(logits(story.model, probe(story.folder)), learnt, atol=1e-5)


def test_two_tasks_are_two_tasks():
    first, second = (task.train[0]["id"] for task in toy_tasks())
    assert first.startswith(NAMES[0]) and second.startswith(NAMES[1])
    assert all(isinstance(task, Task) for task in toy_tasks())
