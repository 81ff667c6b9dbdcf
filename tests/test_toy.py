"""The toy tasks are reproducible, held out where they say so, and cannot be answered blind."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.toy import BASE_SKILLS, TOY_TASKS, toy_task
from mllm_cl.model.load import load_processor
from mllm_cl.model.tiny import KINDS, save_tiny, tiny_base, toy_tokenizer
from mllm_cl.recipe import ModelBlock
from toy_run import collator_of

ALL = BASE_SKILLS + TOY_TASKS


def _question(sample: dict) -> str:
    return sample["messages"][0]["content"][1]["text"]


def _answer(sample: dict) -> str:
    return sample["messages"][1]["content"][0]["text"]


def _fingerprint(sample: dict) -> str:
    return hashlib.sha256(sample["images"][0].tobytes() + _question(sample).encode()).hexdigest()


@pytest.mark.parametrize("name", ALL)
def test_train_and_test_share_no_sample_and_repeat_none(name: str):
    train = {_fingerprint(sample) for sample in toy_task(name, "train", 150)}
    test = {_fingerprint(sample) for sample in toy_task(name, "test", 150)}
    other_seed = {_fingerprint(sample) for sample in toy_task(name, "train", 150, seed=1)}
    assert len(train) == len(test) == 150
    assert not train & test and not train & other_seed


@pytest.mark.parametrize("name", ALL)
def test_a_sample_depends_on_name_split_seed_and_index_alone(name: str):
    short, long = toy_task(name, "train", 5, seed=3), toy_task(name, "train", 50, seed=3)
    assert [_fingerprint(s) for s in short] == [_fingerprint(s) for s in long[:5]]
    assert [s["id"] for s in short] == [s["id"] for s in long[:5]]
    assert short[4]["messages"] == long[4]["messages"]


def test_handwritten_digits_of_the_test_split_were_never_drawn_in_training():
    from sklearn.datasets import load_digits

    from mllm_cl.data import toy

    labels = load_digits().target
    pools = {split: toy.digit_pool(split) for split in ("train", "test")}
    assert not set(pools["train"]) & set(pools["test"])
    assert sorted([*pools["train"], *pools["test"]]) == list(range(len(labels)))
    assert set(labels[pools["test"]]) == set(range(10))


@pytest.mark.parametrize("name", ALL)
def test_a_blind_answer_is_at_chance(name: str):
    """Even the best answer given the question alone is right at most 1.6 times as often as chance.

    The majority of C classes among 400 stays within 1/C + 4 standard errors, which is below that.
    """
    samples = toy_task(name, "test", 400)
    best = sum(
        Counter(_answer(s) for s in samples if _question(s) == question).most_common(1)[0][1]
        for question in samples.questions
    )
    assert best / 400 <= 1.6 / len(samples.answers)
    assert not any(
        answer in question.split() for answer in samples.answers for question in samples.questions
    )


def test_answers_are_shared_between_tasks_so_that_they_interfere():
    answers = {name: set(toy_task(name, "train", 1).answers) for name in ALL}
    for name in TOY_TASKS[:5]:
        assert any(answers[name] & answers[other] for other in ALL if other != name)


def test_pictures_are_64_pixel_rgb_and_look_different_from_task_to_task():
    means = {}
    for name in ALL:
        images = [sample["images"][0] for sample in toy_task(name, "train", 40)]
        assert {(image.size, image.mode) for image in images} == {((64, 64), "RGB")}
        means[name] = np.mean([np.asarray(image, dtype=float) for image in images], axis=0)
    for i, first in enumerate(TOY_TASKS):
        for second in TOY_TASKS[i + 1 :] + BASE_SKILLS:
            assert np.abs(means[first] - means[second]).mean() > 10  # grey levels


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(ValueError, match="choose one of digit"):
        toy_task("chess", "train", 1)
    with pytest.raises(ValueError, match="'train' and 'test'"):
        toy_task("bars", "validation", 1)
    with pytest.raises(IndexError):
        toy_task("bars", "train", 3)[3]


def test_a_changed_rule_has_the_same_pictures_and_questions_and_no_answer_of_the_old_one():
    old, new = toy_task("dial", "test", 20), toy_task("dial", "test", 20, shift=3)
    for before, after in zip(old, new, strict=True):
        assert before["images"][0].tobytes() == after["images"][0].tobytes()
        assert before["messages"][0] == after["messages"][0]
        answers = [sample["messages"][1]["content"][0]["text"] for sample in (before, after)]
        assert (int(answers[0]) - 1 + 3) % 8 == int(answers[1]) - 1


def test_every_toy_word_is_one_token_and_other_text_round_trips():
    tokenizer = toy_tokenizer()
    for name in ALL:
        assert all(
            len(tokenizer(answer)["input_ids"]) == 1
            for answer in toy_task(name, "train", 1).answers
        )
    text = "Grüße, 3 < 4 & done.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tiny_model_reloads_to_equal_logits(kind: str, tmp_path: Path):
    folder = save_tiny(tmp_path / "a", kind, seed=5)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = load_processor(ModelBlock(model_name_or_path=str(folder)))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == toy_tokenizer().get_vocab()
    assert 1e6 <= model.num_parameters() <= 3e6
    model.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    batch = ChatCollator(processor)(toy_task("bars", "train", 4))
    batch_again = collator_of(tmp_path / "b")(toy_task("bars", "train", 4))
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, again(**batch_again).logits, rtol=0, atol=0
        )
    weights = [save_tiny(tmp_path / str(seed), kind, seed) / "model.safetensors" for seed in (5, 6)]
    first, second = (path.read_bytes() for path in weights)
    assert first == (folder / "model.safetensors").read_bytes() != second


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_base_is_the_one_its_log_describes(kind: str):
    folder = tiny_base(kind)
    log = json.loads((folder / "make_base.log").read_text(encoding="utf-8"))
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == log["sha256"]
    assert log["command"].startswith(f"python recipes/make_base.py --kind {kind}")
    assert set(log["base_accuracy"]) == set(BASE_SKILLS) and set(log["zero_shot_accuracy"]) == set(
        TOY_TASKS
    )


def test_the_shipped_bases_are_8_megabytes_at_most():
    folders = [tiny_base(kind) for kind in KINDS]
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*")) <= 8e6


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_base_answers_as_well_as_its_log_says(kind: str):
    """Within 4 standard errors on 60 generated answers of one skill; `generate` stops by itself."""
    folder = tiny_base(kind)
    log = json.loads((folder / "make_base.log").read_text(encoding="utf-8"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = load_processor(ModelBlock(model_name_or_path=str(folder)))
    assert model.dtype == torch.float32
    samples = toy_task("colour", "test", 60, seed=1)
    batch = ChatCollator(processor, prompt_only=True)(samples)
    written = model.generate(**batch, max_new_tokens=8, do_sample=False)[
        :, batch["input_ids"].shape[1] :
    ]
    assert written.shape[1] <= 3
    answers = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
    share = np.mean(
        [answer == _answer(sample) for answer, sample in zip(answers, samples, strict=True)]
    )
    expected = log["base_accuracy"]["colour"]
    assert share >= expected - 4 * max(expected * (1 - expected) / 60, 0.001) ** 0.5
