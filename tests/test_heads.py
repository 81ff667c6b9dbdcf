"""Heads that grow, prototypes against a plain loop, and the classifier that the Trainer trains."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from encoders import backbone, pictures
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Cosine, Linear, Prototype, class_sums

HEADS = [Linear, Cosine]


def features(count=12, width=6, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).to(dtype)


def labels(count=12, number=4):
    return torch.arange(count) * 7 % number


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_grows_keeps_its_old_rows_to_the_bit(kind):
    head = kind(6, 3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn_like(parameter)
    before = copy.deepcopy(head)
    head.grow(2)
    assert (head.old, head.number) == (3, 5)
    for name, parameter in before.named_parameters():
        assert torch.equal(head.get_parameter(name)[: len(parameter)], parameter)
        assert head.get_parameter(name).requires_grad
    # A product with more rows rounds in another order.
    old = head(features())[:, :3]
    torch.testing.assert_close(old, before(features()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_a_new_row_does_not_depend_on_how_classes_are_cut_into_tasks(kind):
    grown = kind(6, 2)
    grown.grow(1)
    grown.grow(4)
    assert torch.equal(grown.weight, kind(6, 7).weight)
    assert not torch.equal(grown.weight, kind(6, 7, seed=1).weight)


@pytest.mark.parametrize(("kind", "bound"), [(Linear, (3 / 64) ** 0.5), (Cosine, 64**-0.5)])
def test_rows_are_uniform_within_the_bounds_of_the_papers(kind, bound):
    weight = kind(64, 200).weight
    assert weight.abs().max() <= bound
    # Of 12,800 draws: the deviation of a uniform variable, to a hundredth of it.
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_linear_logits_are_a_product_and_a_bias():
    head = Linear(6, 4)
    torch.nn.init.normal_(head.bias)
    expected = features().double() @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(head(features()).double(), expected, rtol=0, atol=1e-6)
    assert not Linear(6, 4).bias.any()


@pytest.mark.parametrize("learns_sigma", [True, False])
def test_cosine_logits_are_sigma_times_the_cosine(learns_sigma):
    head = Cosine(6, 4, sigma=3.0, learns_sigma=learns_sigma)
    head.grow(1)
    x, w = features().double(), head.weight.double()
    expected = 3 * (x @ w.T) / x.norm(dim=1)[:, None] / w.norm(dim=1)
    torch.testing.assert_close(head(features()).double(), expected, rtol=0, atol=1e-6)
    assert ("sigma" in dict(head.named_parameters())) == learns_sigma


def test_logits_are_fp32_whatever_the_features_are():
    for head in (Linear(6, 4), Cosine(6, 4)):
        narrow = features(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = head(narrow)
        assert found.dtype == torch.float32
        assert torch.equal(found, head(narrow.float()))


# Prototypes


def learnt(parts, number=4) -> Prototype:
    """A head that saw these batches of (features, labels)."""
    head = Prototype(6, number)
    for features_BD, labels_B in parts:
        head.add(features_BD, labels_B)
    head.share()
    return head


def test_a_prototype_is_the_mean_of_the_raw_features_of_its_class():
    x, y = features(), labels()
    head = learnt([(x, y)])
    for label in range(4):
        rows = [x[index].double() for index in range(len(y)) if y[index] == label]
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(head.weight_CD[label], mean, rtol=0, atol=1e-15)
        for query, logit in zip(features(seed=5), head(features(seed=5))[:, label], strict=True):
            cosine = query.double() @ mean / query.double().norm() / mean.norm()
            assert logit.item() == pytest.approx(cosine.item(), abs=1e-6)
    assert list(head.parameters()) == list(head.buffers()) == []


def test_batches_and_their_order_do_not_move_a_prototype():
    x, y = features(40), labels(40)
    whole = learnt([(x, y)]).weight_CD
    for size in (1, 7, 39):
        pieces = list(zip(x.split(size), y.split(size), strict=True))
        for parts in (pieces, pieces[::-1]):
            torch.testing.assert_close(learnt(parts).weight_CD, whole, rtol=0, atol=1e-15)


def test_sums_of_shards_add_up_to_the_sums_of_all():
    x, y = features(), labels()
    first, second = (class_sums(x[rank::2], y[rank::2], 4) for rank in range(2))
    for whole, one, other in zip(class_sums(x, y, 4), first, second, strict=True):
        torch.testing.assert_close(one + other, whole, rtol=0, atol=1e-15)


def test_the_order_of_tasks_does_not_change_the_final_prototypes():
    x, y = features(), labels()
    heads = []
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        head = Prototype(6)
        for old in (0, 2):
            head.grow(2)
            for place in (old, old + 1):
                own = x[y == order[place]]
                head.add(own, torch.full((len(own),), place))
            head.share()
        heads.append(head.weight_CD[torch.tensor(order).argsort()])
    assert torch.equal(*heads)


def test_growing_moves_no_old_prototype_and_remembered_sums_make_the_same_head():
    head = learnt([(features(), labels())])
    before = head.weight_CD
    again = Prototype(6, 4)
    again.restore(head.sum_CD, head.count_C)
    for one in (head, again):
        one.grow(1)
        one.add(features(3, seed=9), torch.full((3,), 4))
        one.share()
    assert torch.equal(head.weight_CD[:4], before)
    assert torch.equal(again.weight_CD, head.weight_CD)
    with pytest.raises(ValueError, match="do not fit a head of 4 classes"):
        Prototype(6, 4).restore(head.sum_CD, head.count_C)


def test_a_class_without_a_picture_is_named_and_never_answered():
    head = learnt([(features(), labels(number=3))])
    with pytest.raises(ValueError, match=r"no training image of 1 of 4 classes \(.* number 3\)"):
        head(features())


def test_a_prototype_survives_a_model_that_turns_bf16():
    head = learnt([(features(), labels())])
    before = head.weight_CD
    assert torch.equal(head.bfloat16().weight_CD, before)


def test_a_head_grows_by_one_class_or_more():
    with pytest.raises(ValueError, match="not by 0"):
        Linear(6, 2).grow(0)


# The classifier


def classifier(*, local=False, old=3, new=2) -> Classifier:
    encoder = Encoder(backbone("vit"))
    head = Cosine(encoder.width, old)
    head.grow(new)
    return Classifier(encoder, head, local=local)


def test_the_loss_is_the_cross_entropy_over_all_seen_classes():
    model, right = classifier(), torch.tensor([0, 4, 2])
    output = model(pixel_values=pictures(), labels=right)
    logits = output.logits.double()
    expected = (logits.exp().sum(1).log() - logits[range(3), right]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    again = model(features=model.encoder(pictures()), labels=right)
    assert torch.equal(again.loss, output.loss)
    assert "loss" not in model(pixel_values=pictures())


def test_a_local_loss_leaves_the_old_classes_alone():
    model, right = classifier(local=True), torch.tensor([3, 4, 3])
    output = model(pixel_values=pictures(), labels=right)
    newest = output.logits[:, 3:].double()
    expected = functional.cross_entropy(newest, right - 3)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    output.loss.backward()
    assert not model.head.weight.grad[:3].any() and model.head.weight.grad[3:].any()


def test_an_old_label_under_a_local_loss_is_an_error_and_never_skipped():
    model = classifier(local=True, old=103, new=2)
    # 3 - 103 is the label that torch skips unless told otherwise.
    for label in (3, 50):
        with pytest.raises(IndexError):
            model(pixel_values=pictures(1), labels=torch.tensor([label]))


def test_a_classifier_takes_pictures_or_features():
    model = classifier()
    with pytest.raises(ValueError, match="either pixel_values or features"):
        model(labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="width 7, but the encoder gives 24"):
        Classifier(model.encoder, Linear(7, 2))


def rows(count=8):
    return [
        {"pixel_values": picture, "labels": index % 5}
        for index, picture in enumerate(pictures(count))
    ]


def trained(tmp_path, **arguments) -> dict[str, torch.Tensor]:
    model = classifier()
    given = {"output_dir": str(tmp_path), "report_to": [], "save_strategy": "no", "use_cpu": True}
    given |= {"learning_rate": 0.1, "optim": "sgd", "disable_tqdm": True, "max_steps": 2}
    Trainer(model, TrainingArguments(**given, **arguments), train_dataset=rows()).train()
    return {name: value.detach() for name, value in model.named_parameters()}


def test_the_stock_trainer_takes_the_same_step_however_a_batch_is_cut_up(tmp_path):
    whole = trained(tmp_path, per_device_train_batch_size=8)
    # Of 3, 3 and 2 rows: a mean of means would weigh the last ones more.
    cut = trained(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    start = dict(classifier().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-3
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-6, msg=name)


def test_the_stock_trainer_checkpoints_activations_without_moving_a_step(tmp_path):
    whole = trained(tmp_path, per_device_train_batch_size=8)
    saved = trained(tmp_path, per_device_train_batch_size=8, gradient_checkpointing=True)
    for name, value in whole.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-6, msg=name)
