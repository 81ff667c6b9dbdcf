"""MEMO against plain float64, its copies against encoders of their own, and whole runs of it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoders import backbone, pictures, vit_b16
from mllm_cl import Recipe, run
from mllm_cl.data.labelled import labelled
from mllm_cl.memory import Memory
from mllm_cl.method import load_method
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.surgery import restore_state
from mllm_cl.model.tails import Expanding, attach_tails, own_weights, start_tail
from mllm_cl.task import Task
from test_class_incremental import DATA, NUMBER, TEST, answers, features, recipe

ORDER = [0, 2, 3, 4, 5, 1]  # numpy.random.RandomState(1993).permutation(6), written out
TYPES = ["vit", "clip", "clip_vision_model"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def memo(folder: Path, vit: Path, batch_size: int = 5, **settings) -> Recipe:
    tree = recipe(folder, vit, "memo").resolved()
    tree["method"] |= {"memory_per_class": 3} | settings  # so that batches are never cut
    tree["eval"] = {"batch_size": batch_size}
    tree["training"] |= {"learning_rate": 0.003}
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory) -> Path:
    return run(memo(tmp_path_factory.mktemp("memo"), vit))


def state(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"task_{stage}/state.safetensors")


# The loss, and the head


def test_the_loss_is_both_cross_entropies():
    generator = torch.Generator().manual_seed(0)
    head = Expanding(6, 3)
    head.grow(2)
    head.watch(4, 0.7)
    x, labels = torch.randn(7, 6, generator=generator), torch.tensor([0, 1, 2, 3, 4, 3, 0])
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    aside, shift = (one.detach().double() for one in head.auxiliary.parameters())
    assert aside.shape == (3, 4)  # an old class, and two new ones
    expected = []
    for row, label in zip(x.double(), labels.tolist(), strict=True):
        logits, newest = weight @ row + bias, aside @ row[2:] + shift
        own = logits.exp().sum().log() - logits[label]
        newer = max(label - 2, 0)
        expected.append(own + 0.7 * (newest.exp().sum().log() - newest[newer]))
    found = head.losses(x, labels).double()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=0)


def test_the_first_task_has_no_second_term():
    assert Expanding(6, 3).losses(torch.randn(2, 6), torch.tensor([0, 1])) is None


def test_new_rows_become_as_long_as_old_ones_and_stay_so():
    head = Expanding(6, 3)
    head.grow(2)
    head.watch(3, 1.0)
    with torch.no_grad():
        head.weight[3:] *= 5
    before = head.weight.detach().clone()
    settled = head.settled()
    length = settled.weight.norm(dim=1)
    torch.testing.assert_close(length[3:].mean(), length[:3].mean())
    assert torch.equal(settled.weight[:3], before[:3]) and settled.old == 3
    ratio = settled.weight[3:] / before[3:]
    torch.testing.assert_close(ratio, ratio[0, 0].expand(2, 6))
    again = Expanding(6, 5)
    again.old, again.weight = 3, settled.weight
    torch.testing.assert_close(again.settled().weight, settled.weight)


def test_old_rows_and_columns_are_kept_when_features_join():
    model = torch.nn.Module()
    model.head = Expanding(4, 2)
    before = {f"head.{name}": one.detach().clone() for name, one in model.head.named_parameters()}
    model.head = Expanding(8, 2, seed=1)
    model.head.grow(3)
    fresh = model.head.weight.detach().clone()
    restore_state(model, before)
    assert torch.equal(model.head.weight[:2, :4], before["head.weight"])
    assert torch.equal(model.head.weight[2:], fresh[2:])
    assert torch.equal(model.head.weight[:2, 4:], fresh[:2, 4:])


# Copies behind shared blocks


def moved(encoder: Encoder, number: int, blocks: int = 1) -> list[torch.nn.Module]:
    ends, generator = (
        attach_tails(encoder, number, blocks=blocks),
        torch.Generator().manual_seed(5),
    )
    for module in ends:
        for tail in range(2, number + 1):
            for value in own_weights(module, tail).values():
                value.data += 0.2 * torch.randn(value.shape, generator=generator)
    return ends


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("model_type", TYPES)
def test_each_copy_answers_as_an_encoder_of_its_own(model_type, blocks):
    encoder, paths = Encoder(backbone(model_type)), {}
    for name, module in encoder.named_modules():
        paths[id(module)] = name
    width = encoder.width
    ends = moved(encoder, 3, blocks)
    assert len(ends) == blocks + 1 + (model_type == "clip")
    together = encoder(pictures())
    assert together.shape == (3, 3 * width) == (3, encoder.width)
    for tail in (1, 2, 3):
        one = Encoder(backbone(model_type))
        for module in ends:
            one.get_submodule(paths[id(module)]).load_state_dict(own_weights(module, tail))
        part = together[:, (tail - 1) * width : tail * width]
        torch.testing.assert_close(part, one(pictures()), atol=2e-6, rtol=1e-6)
        with encoder.showing([f"tail_{tail}"]):
            torch.testing.assert_close(encoder(pictures()), one(pictures()), atol=2e-6, rtol=1e-6)


@torch.no_grad()
def test_shared_blocks_run_once():
    encoder, seen = Encoder(backbone("vit")), []
    moved(encoder, 3)
    for layer in encoder.backbone.layers:
        layer.register_forward_hook(lambda _, given, out: seen.append((len(given[0]), len(out))))
    encoder(pictures(4))
    assert seen == [(4, 4), (4, 4), (4, 12)]


@torch.no_grad()
def test_a_copy_begins_where_the_one_before_it_ended():
    encoder = Encoder(backbone("vit"))
    moved(encoder, 3)
    width = encoder.width // 3
    _, second, third = encoder(pictures()).split(width, dim=1)
    assert (second - third).abs().max() > 1e-2
    start_tail(encoder, 3)
    first, second, third = encoder(pictures()).split(width, dim=1)
    assert torch.equal(second, third) and (first - second).abs().max() > 1e-2
    start_tail(encoder, 2)
    first, second, _ = encoder(pictures()).split(width, dim=1)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_no_block_left_to_share_is_told():
    with pytest.raises(ValueError, match="expected 1 to 2"):
        attach_tails(Encoder(backbone("vit")), 2, blocks=3)


@pytest.mark.parametrize(
    ("stage", "settings", "count"),
    [
        (1, {}, 85_798_656),
        (1, {"first": "head"}, 0),
        (2, {}, 7_089_408),
        (3, {"train_base": True}, 85_798_656),
    ],
)
def test_what_trains_of_a_vit_b16(stage, settings, count):
    samples = labelled(DATA, "train", 1, number=2)
    encoder = Encoder(vit_b16())
    model, memory = Classifier(encoder, Prototype(encoder.width)), Memory()
    memory["memo/classes"] = torch.tensor(2 * stage - 2)
    task = Task("new", stage, samples, samples, lambda *_: 0.0, labels=samples.names)
    load_method("memo", "class_incremental")(**settings).before_task(model, task, memory)
    trained = [one.numel() for one in model.encoder.parameters() if one.requires_grad]
    assert sum(trained) == count
    every = sum(one.numel() for one in model.encoder.parameters())
    assert every == 85_798_656 + (stage - 1) * 7_089_408
    assert all(one.requires_grad for one in model.head.parameters())


# Whole runs


def test_a_run_answers_with_all_copies_and_the_aligned_head(alone):
    encoder = Encoder(backbone("vit"))
    attach_tails(encoder, 3)
    model = Classifier(encoder, Expanding(encoder.width, NUMBER))
    restore_state(model, state(alone, 3))
    test = labelled(DATA, "test", TEST, number=NUMBER)
    names = [test.names[place] for place in ORDER]
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    for first in range(0, NUMBER, 2):
        logits = features(encoder, test.of(names[first : first + 2])) @ weight.T + bias
        expected = [names[place] for place in logits.argmax(1)]
        assert answers(alone, 3)[f"{first + 1}-{first + 2}"] == expected
    length = weight.norm(dim=1)
    torch.testing.assert_close(length[4:].mean(), length[:4].mean(), atol=1e-6, rtol=0)


def test_what_is_shared_and_earlier_copies_stay(alone):
    states = [state(alone, stage) for stage in (1, 2, 3)]
    plain = dict(Encoder(backbone("vit")).named_parameters())
    own = [name for name in states[0] if name.startswith("encoder.")]
    assert {name.removeprefix("encoder.") for name in own} >= plain.keys() - {
        "backbone.embeddings.mask_token"
    }
    assert any(not torch.equal(states[0][name], plain[name[8:]]) for name in own)
    for earlier, later in zip(states, states[1:], strict=False):
        for name, value in earlier.items():
            assert name.startswith("head.") or torch.equal(later[name], value), name
    assert states[1]["head.weight"].shape[1] == 2 * states[0]["head.weight"].shape[1]
    assert not any("auxiliary" in name for one in states for name in one)


def test_training_the_base_moves_what_is_shared(vit, tmp_path):
    folder = run(memo(tmp_path, vit, train_base=True))
    first, last = state(folder, 1), state(folder, 3)
    shared = [name for name in first if ".layers.0." in name]
    copies = [name for name in state(folder, 2) if ".tail_2." in name]
    assert shared and copies
    assert not any(torch.equal(first[name], last[name]) for name in shared if "weight" in name)
    assert all(torch.equal(state(folder, 2)[name], last[name]) for name in copies)


def test_exemplars_are_kept_and_counted(alone, vit, tmp_path):
    memory, method = Memory.load(alone / "task_3/memory.safetensors"), memo(tmp_path, vit).method
    assert method.num_kept(memory) == 3 * NUMBER
    assert method.kept_bytes(memory) == memory.num_bytes + 3 * NUMBER * 3 * 16 * 16


def test_the_batch_size_of_a_test_changes_no_answer(alone, vit, tmp_path):
    other = run(memo(tmp_path, vit, batch_size=1))
    for stage in (1, 2, 3):
        assert answers(other, stage) == answers(alone, stage)


def test_a_deleted_stage_comes_back_to_the_same_bytes(alone, vit, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(folder / "task_3")
    run(memo(folder, vit))
    for name in ("memory.safetensors", "state.safetensors", "scores.json"):
        assert (folder / "task_3" / name).read_bytes() == (alone / "task_3" / name).read_bytes()
    assert answers(folder, 3) == answers(alone, 3)
