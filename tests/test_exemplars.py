"""Exemplars: herding against a plain loop, what is kept when classes come, what a budget buys."""

from itertools import pairwise

import pytest
import torch

from mllm_cl import Memory, Task
from mllm_cl.data.labelled import labelled
from mllm_cl.exemplars import Exemplars, affordable, herding
from mllm_cl.method import load_method
from mllm_cl.metrics.answers import metric


def herded(features: list[list[float]], number: int) -> list[int]:
    """iCaRL's algorithm 4, one number at a time."""
    unit = [[x / sum(y * y for y in row) ** 0.5 for x in row] for row in features]
    mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    chosen: list[int] = []
    for _ in range(min(number, len(unit))):
        distance = {}
        for place in range(len(unit)):
            if place not in chosen:
                rows = [unit[one] for one in (*chosen, place)]
                now = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
                distance[place] = sum((a - b) ** 2 for a, b in zip(mean, now, strict=True))
        chosen.append(min(distance, key=distance.get))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_herding_chooses_what_a_plain_loop_chooses(seed):
    generator = torch.Generator().manual_seed(seed)
    features = 3 * torch.randn(20, 5, generator=generator, dtype=torch.float64) + 1
    assert herding(features, 12).tolist() == herded(features.tolist(), 12)


def test_the_first_m_of_a_longer_herding_are_a_shorter_one():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    every = herding(features, 30).tolist()
    assert sorted(every) == list(range(30))
    assert all(herding(features, m).tolist() == every[:m] for m in (1, 7, 29))


def test_of_equal_pictures_the_first_is_chosen():
    row = torch.tensor([[0.3, 0.7, -0.2]])
    assert herding(row.repeat(6, 1), 4).tolist() == [0, 1, 2, 3]
    assert herding(torch.cat([-row, row, row, -row, row]), 2).tolist()[0] == 1


def test_a_class_with_fewer_pictures_keeps_all_of_them():
    assert sorted(herding(torch.eye(3), 20).tolist()) == [0, 1, 2]


def test_only_the_direction_of_a_feature_counts():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    longer = features * torch.linspace(1, 30, 9)[:, None]
    assert torch.equal(herding(features, 5), herding(longer, 5))


def kept(sizes: list[int], number: int) -> Exemplars:
    label_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    features_ND = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(2))
    return Exemplars.herded(features_ND, label_N, number)


def test_old_lists_are_cut_to_their_first():
    before = kept([5, 2, 9], 4)
    assert before.label_M.tolist() == [0] * 4 + [1] * 2 + [2] * 4
    after = before.first(3)
    assert after.label_M.tolist() == [0] * 3 + [1] * 2 + [2] * 3
    assert after.place_M.tolist() == [before.place_M[k] for k in (0, 1, 2, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize(
    ("parameters", "side", "total_mb", "number"),
    [
        (463_504, 32, 23.54, 7_431),  # ResNet-32 on CIFAR-100, B0 Inc10
        (463_504, 32, 41.22, 13_466),  # B0 Inc5
        (11_176_512, 224, 713.33, 4_672),  # ResNet-18 on ImageNet-100, B0 Inc10
    ],
)
def test_a_budget_buys_what_memos_calculator_says(parameters, side, total_mb, number):
    found = affordable(total_mb, 4 * parameters, 3 * side * side)
    assert found == pytest.approx(number, abs=3.4)  # the budget is rounded to 10 kB


def test_a_model_is_worth_603_pictures():
    model = 4 * 463_504
    assert affordable((model + 603.6 * 3072) / 2**20, model, 3072) == 603


def test_a_budget_below_the_model_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"budget_mb is 1, but the encoder alone takes 1\.77 MB"):
        affordable(1, 4 * 463_504, 3072)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        (
            "lit",
            {"memory_size": 2000},
            "memory_per_class 0, which keeps none",
        ),
        ("coop", {"budget_mb": 500}, "memory_per_class 0, which keeps none"),
        ("proof", {"memory_size": 2000}, "memory_size 2000 and memory_per_class 20.*to null"),
        ("icarl", {"memory_size": 9, "budget_mb": 5}, "memory_size 9 and budget_mb 5.*to null"),
    ],
)
def test_two_sizes_are_refused_also_where_one_is_the_default(name, settings, told):
    with pytest.raises(ValueError, match=told):
        load_method(name, "class_incremental")(**settings)


def test_a_size_in_the_place_of_the_default_is_taken():
    one = load_method("proof", "class_incremental")(memory_size=2000, memory_per_class=None)
    assert one.quota(None, 100) == 20


def tasks() -> list[Task]:
    train = labelled("toy:compositions", "train", 4, number=4)
    pairs = pairwise([0, 1, 4])
    names = [tuple(train.names[::-1][a:b]) for a, b in pairs]
    exact = metric("exact_match")
    return [
        Task(str(place), place, train.of(each), train.of(each), exact, labels=each)
        for place, each in enumerate(names, start=1)
    ]


def test_exemplars_are_read_from_the_training_set_of_their_own_task():
    first, second = tasks()
    # classes 0 | 1 2 3 in the order of tasks; the data have them the other way round
    chosen = Exemplars(torch.tensor([0, 0, 2]), torch.tensor([3, 1, 5]))
    one, other = chosen.samples([first, second])
    assert [one.id(k) for k in range(2)] == [first.train.id(3), first.train.id(1)]
    assert [sample["label"] for sample in other] == [second.labels[1]]
    every = second.train.joined(one)
    assert len(every) == 14 and every[12]["id"] == first.train.id(3)


def test_exemplars_of_data_that_have_changed_are_refused():
    first, second = tasks()
    for label, place in ((0, 4), (1, 0)):  # no such picture, and one of another class
        chosen = Exemplars(torch.tensor([label]), torch.tensor([place]))
        with pytest.raises(ValueError, match="has changed since its exemplars were chosen"):
            chosen.samples([first, second])


def test_exemplars_come_back_from_a_memory():
    one = kept([3, 3], 2)
    memory = Memory({"a/exemplars/label": one.label_M, "a/exemplars/place": one.place_M})
    assert torch.equal(Exemplars.of(memory, "a/exemplars").place_M, one.place_M)
    assert len(Exemplars.of(Memory(), "a/exemplars")) == 0
