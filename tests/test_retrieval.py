"""Continual cross-modal retrieval: data, loss and rank against loops, and whole runs."""

import json
import shutil
from math import exp, log
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from class_cells import assert_alike, run_together
from clip import reading_folder, tokenizer
from encoders import backbone, pictures
from mllm_cl import Recipe, cli, run
from mllm_cl.data.captioned import captioned, cut
from mllm_cl.data.errors import DataError
from mllm_cl.data.pairs import PairCollator
from mllm_cl.data.pixels import preset
from mllm_cl.data.words import assigned, forms
from mllm_cl.forecast import Launch
from mllm_cl.forecast_classes import forecast_classes
from mllm_cl.method import names
from mllm_cl.methods.retrieval.memo import MEMO
from mllm_cl.metrics.recall import recalls, summary
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.meeting import Fused, SideBySide
from mllm_cl.model.pairs import pair_losses
from mllm_cl.model.tails import attach_towers, own_weights
from mllm_cl.ranking import ranks
from mllm_cl.recipe import RecipeError
from mllm_cl.report import read
from mllm_cl.report.stages import planes

WORDS, TRAIN, TEST, WIDTH = ("left", "top", "centre"), 12, 5, 8
METHODS = ("zs", "finetune", "der", "memo", "proof")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# Words and tasks


def test_a_word_is_known_in_the_forms_that_english_has_for_it():
    assert forms("walk") == {"walk", "walks", "walking", "walked"}
    assert forms("run") == {"run", "runs", "running", "ran"}
    assert forms("ride") == {"ride", "rides", "riding", "rode", "ridden"}
    assert forms("stand") == {"stand", "stands", "standing", "stood"}
    assert forms("play") == {"play", "plays", "playing", "played"}
    assert {"carries", "carried", "carrying"} < forms("carry")
    assert {"stopped", "stopping"} < forms("stop") and "visited" in forms("visit")


def test_a_picture_belongs_to_the_first_word_that_any_caption_says():
    words = {word: forms(word) for word in ("walk", "stand", "run")}
    captions = ["Men STOOD by.", "Someone standing.", "A man, walking-stick in hand."]
    assert assigned(captions, words, "first") == "walk"
    assert assigned(captions, words, "majority") == "stand"
    assert assigned(["A runway.", "Standardised."], words, "first") is None
    assert assigned(["He stands.", "He runs."], words, "majority") == "stand"


def write_rows(folder: Path, rows: list[dict]) -> str:
    for index, row in enumerate(rows):
        Image.new("RGB", (16, 16), (20 * index, 99, 7)).save(folder / f"{index}.png")
        row["image"] = f"{index}.png"
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_karpathys_splits_in_a_column_are_honoured_and_each_picture_is_in_one_task(tmp_path):
    said = ["a man walks", "a dog runs and walks", "two stand", "nobody"]
    sides = ["train", "test", "val", "train"]
    rows = [{"caption": [f"{one} {n}" for n in range(2)], "split": side}
            for one in said for side in sides]  # fmt: skip
    data = write_rows(tmp_path, rows)
    for side, number in (("train", 8), ("test", 4)):
        found = cut(captioned(data, side), ["run", "walk", "stand"], given={})
        every = [one.id(place) for one in found.tasks.values() for place in range(len(one))]
        assert len(set(every)) == len(every) == number - found.dropped
        assert found.dropped == number / 4
        assert {word: len(one) for word, one in found.tasks.items()} == dict.fromkeys(
            ("run", "walk", "stand"), number / 4
        )
    sample = captioned(data, "test")[1]
    assert sample["captions"] == ["a dog runs and walks 0", "a dog runs and walks 1"]
    assert sample["images"][0].getpixel((0, 0)) == (100, 99, 7)


def test_forms_that_a_recipe_lists_take_the_place_of_the_rules(tmp_path):
    data = write_rows(tmp_path, [{"captions": ["he strolls"], "split": "train"},
                                 {"captions": ["he walks"], "split": "test"}])  # fmt: skip
    found = cut(captioned(data, "train"), ["walk"], given={"walk": ("stroll", "strolls")})
    assert len(found.tasks["walk"]) == 1


@pytest.mark.parametrize("value", [[], [3], "", None])
def test_a_row_without_captions_is_named(tmp_path, value):
    rows = [{"captions": ["fine"], "split": "train"}, {"captions": value, "split": "test"}]
    with pytest.raises(DataError, match="row 2: the captions are"):
        captioned(write_rows(tmp_path, rows), "test")


def test_an_epoch_reads_one_caption_of_each_image_the_same_in_any_batch():
    samples = list(captioned("toy:compositions", "train").select(range(6)))
    words = [caption for one in samples for caption in one["captions"]]
    collator = PairCollator(
        preset("clip", side=16),
        lambda texts: {"input_ids": torch.tensor([[words.index(text)] for text in texts])},
    )
    read = []
    for epoch in range(12):
        collator.epoch.fill_(epoch)
        whole = collator(samples)["text_ids"]
        alone = torch.cat([collator([one])["text_ids"] for one in reversed(samples)]).flip(0)
        assert torch.equal(whole, alone)
        said = [words[place] for place in whole.flatten().tolist()]
        assert all(text in one["captions"] for text, one in zip(said, samples, strict=True))
        read.append(said)
    assert {text for said in read for text in said} == set(words)


# The loss, the rank and the score, by loops in float64


def test_the_loss_of_pairs_is_clips_without_other_captions_of_the_same_image():
    image, text, label = unit(draw(5, WIDTH)), unit(draw(5, WIDTH, seed=1)), [7, 3, 7, 1, 2]
    scale, expected = 4.0, []
    for i in range(5):
        among = [j for j in range(5) if j == i or label[j] != label[i]]
        there = [scale * float(image[i].double() @ text[j].double()) for j in among]
        back = [scale * float(image[j].double() @ text[i].double()) for j in among]
        place = among.index(i)
        nll = [log(sum(map(exp, way))) - way[place] for way in (there, back)]
        expected.append(sum(nll) / 2)
    found = pair_losses(image, text, torch.tensor(label), torch.tensor(scale))
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)


def test_ranks_are_those_of_a_loop_whatever_is_asked_together():
    query, gallery = draw(300, WIDTH), draw(70, WIDTH, seed=1)
    owners = torch.arange(300) % 35, torch.arange(70) % 35
    found, first = ranks(query, owners[0], gallery, owners[1])
    for place in range(0, 300, 7):
        score = gallery.double() @ query[place].double()
        own = owners[1] == owners[0][place]
        best = score[own].max()
        assert found[place] == 1 + int((score[~own] >= best).sum())
        assert first[place] == score.argmax()
        alone, _ = ranks(query[place][None], owners[0][place][None], gallery, owners[1])
        assert alone[0] == found[place]


def test_what_ties_with_the_right_one_comes_before_it():
    same = draw(1, WIDTH).expand(3, WIDTH)
    found, first = ranks(same, torch.arange(3), same, torch.arange(3))
    assert found.tolist() == [3, 3, 3] and first.tolist() == [1, 0, 0]


def test_recall_is_the_share_of_queries_up_to_a_rank():
    found = recalls([1, 2, 11, 6], [1, 10])
    assert (found["i2t_r1"], found["i2t_r5"], found["i2t_r10"]) == (0.25, 0.5, 0.75)
    assert (found["t2i_r1"], found["t2i_r5"], found["t2i_r10"]) == (0.5, 0.5, 1.0)


def test_the_summary_has_the_mean_over_the_stages_and_the_last():
    rows = [{"after": "zero-shot"}]
    rows += [{"after": f"{n}", "recall": recalls([n], [1])} for n in (1, 6)]
    found = summary(rows)
    assert (found["last_i2t_r1"], found["mean_i2t_r1"], found["mean_i2t_r10"]) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("residual", [False, True])
def test_proofs_terms_are_those_of_loops(residual):
    head = Fused(
        WIDTH, log_scale=torch.zeros(()), context=2, dropout=0.3, residual=residual, seed=0
    )
    for _ in range(2):
        head.expand()
    with torch.no_grad():
        for place, one in enumerate(head.parameters()):
            one += 0.1 * draw(*one.shape, seed=20 + place)
    head.eval()
    w = {name: one.detach().double() for name, one in head.named_parameters()}
    sides = {"images": draw(3, WIDTH, seed=1), "texts": draw(3, WIDTH, seed=2)}
    expected = {}
    for side, rows in sides.items():
        terms = []
        for x in rows.double():
            z = torch.zeros(WIDTH, dtype=torch.float64)
            for task in range(2):
                z += w[f"{side}.{task}.weight"] @ x + w[f"{side}.{task}.bias"]
                z += x if residual else 0
            z = unit(z)
            tokens = [z, *w["context.0"], *w["context.1"]]
            query = w["attention.query.weight"] @ z
            keys = [float(query @ (w["attention.key.weight"] @ y)) / WIDTH**0.5 for y in tokens]
            total = sum(map(exp, keys))
            mixed = sum(exp(k) / total * (w["attention.value.weight"] @ y)
                        for k, y in zip(keys, tokens, strict=True))  # fmt: skip
            out = w["attention.out.weight"] @ mixed + w["attention.out.bias"] + z
            out = (out - out.mean()) / (out.var(correction=0) + 1e-5).sqrt()
            out = out * w["attention.norm.weight"] + w["attention.norm.bias"]
            terms.append((z, unit(out)))
        expected[side] = terms
    found = head.of_images(sides["images"]), head.of_texts(sides["texts"])
    for terms, side in zip(found, sides, strict=True):
        for k in range(2):
            wanted = torch.stack([one[k] for one in expected[side]])
            torch.testing.assert_close(terms[k].double(), wanted, rtol=0, atol=2e-6)
    score = head.embedding(found[0]) @ head.embedding(found[1]).T
    wanted = [[sum(float(a @ b) for a, b in zip(i, t, strict=True)) for t in expected["texts"]]
              for i in expected["images"]]  # fmt: skip
    torch.testing.assert_close(score.double(), torch.tensor(wanted).double(), rtol=0, atol=5e-6)


def test_towers_side_by_side_are_compared_by_the_mean_of_their_cosines():
    head = SideBySide(WIDTH, 3, log_scale=torch.zeros(()), weight=0.5)
    image, text = draw(4, 3 * WIDTH), draw(5, 3 * WIDTH, seed=1)
    score = head.embedding(head.of_images(image)) @ head.embedding(head.of_texts(text)).T
    cosines = [
        unit(i) @ unit(t).T for i, t in zip(image.chunk(3, 1), text.chunk(3, 1), strict=True)
    ]
    torch.testing.assert_close(score, sum(cosines) / 3)
    assert head.weights == (1.0, 0.5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("blocks", [0, 1])
def test_each_copy_of_the_towers_answers_pictures_and_texts_as_a_model_of_its_own(kind, blocks):
    ids = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 31
    alone = Encoder(backbone(kind))
    both = Encoder(backbone(kind))
    ends = attach_towers(both, 2, blocks=blocks)
    own = [one for end in ends for one in own_weights(end, 2).values()]
    with torch.no_grad():
        before = alone(pictures()), alone.text(ids)
        for one in own:
            one += 0.1 * draw(*one.shape, seed=4)
        for side, now in zip(before, (both(pictures()), both.text(ids)), strict=True):
            assert now.shape == (3, 2 * alone.width)
            torch.testing.assert_close(now[:, : alone.width], side)
            assert not torch.allclose(now[:, alone.width :], side, atol=1e-2)
    whole = sum(one.numel() for one in alone.towers)
    assert (sum(one.numel() for one in own) == whole) == (blocks == 0)
    for side, answer in ((pictures(), both), (ids, both.text)):
        with both.showing(["tail_2"]):
            part = answer(side)
        torch.testing.assert_close(part, answer(side)[:, alone.width :])


# Whole runs


def test_the_quickstart_is_for_every_method():
    path = Path(__file__).parents[1] / "recipes" / "quickstart_retrieval.yaml"
    assert "method.name=zs,proof,finetune" in path.read_text(encoding="utf-8")
    for method in METHODS:
        one = Recipe.load(path, ["--method.name", method])
        assert [task.name for task in one.tasks] == ["left", "right", "top", "bottom", "centre"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


def recipe(folder: Path, model: Path, method: str, *, training=None, **retrieval) -> Recipe:
    tree = {
        "output_dir": str(folder),
        "model": {"model_name_or_path": str(model)},
        "method": {"name": method} | ({"dropout": 0.0} if method == "proof" else {}),
        "retrieval": {
            "data": "toy:compositions",
            "words": list(WORDS),
            "preprocessing": "clip",
            "train_size": TRAIN,
            "eval_size": TEST,
        }
        | retrieval,
        "training": {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 0.003}
        | (training or {}),
        "eval": {"batch_size": 4},
    }
    return Recipe.from_tree(tree, "recipe.yaml")


def state(folder: Path, stage: int) -> dict[str, Tensor]:
    return load_file(folder / f"task_{stage}/state.safetensors")


def found(folder: Path, stage: int) -> dict[str, list[dict]]:
    """What was found for the images of each task."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / f"task_{stage}/predictions").glob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def runs(clip, tmp_path_factory):
    """The folder of a run of each method, made when it is asked for."""

    class Made(dict):
        def __missing__(self, method: str) -> Path:
            folder = tmp_path_factory.mktemp(method)
            run(recipe(folder, clip, method))
            self[method] = folder
            return folder

    return Made()


def test_every_method_of_the_package_is_run_here():
    assert set(names("retrieval")) == set(METHODS)


def test_zero_shot_ranks_are_those_of_the_model_asked_pair_by_pair(clip, runs):
    encoder, pixels = Encoder(backbone("clip")), preset("clip", side=16)
    tests = cut(captioned("toy:compositions", "test"), WORDS, given={}, size=TEST).tasks
    samples = [one for word in WORDS[:2] for one in tests[word]]
    with torch.no_grad():
        images = [encoder(pixels.test(one["images"][0])[None])[0].double() for one in samples]
        texts = [
            [
                encoder.text(
                    torch.tensor([tokenizer()(text, truncation=True, max_length=7).input_ids])
                )
                for text in one["captions"]
            ]
            for one in samples
        ]
    rows = [row for word in WORDS[:2] for row in found(runs["zs"], 2)[word]]
    table = [[[float(unit(x) @ unit(t[0].double())) for t in own] for own in texts] for x in images]
    for i, row in enumerate(rows):
        best = max(table[i][i])
        others = [s for j, own in enumerate(table[i]) for s in own if j != i]
        sure = [s for s in others if abs(s - best) > 1e-5]
        assert len(sure) == len(others) or row["rank"] > 1
        if len(sure) == len(others):
            assert row["rank"] == 1 + sum(s > best for s in others)
        assert row["id"] == samples[i]["id"] and len(row["caption_ranks"]) == len(texts[i])


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_is_scored_on_all_tasks_so_far(method, runs):
    rows = json.loads((runs[method] / "scores.json").read_text())["rows"]
    assert [list(row["scores"]) for row in rows] == [list(WORDS[:n]) for n in range(4)]
    for stage in (1, 2, 3):
        given, row = found(runs[method], stage), rows[stage]
        every = [one for word in WORDS[:stage] for one in given[word]]
        images, captions = len(every), sum(len(one["caption_ranks"]) for one in every)
        assert images == stage * TEST and max(one["rank"] for one in every) <= captions
        assert all(1 <= rank <= images for one in every for rank in one["caption_ranks"])
        at_one = sum(one["rank"] == 1 for one in every) / images
        assert row["recall"]["i2t_r1"] == pytest.approx(at_one)
        for word in WORDS[:stage]:
            assert row["scores"][word] == row["recall_by_task"][word]["i2t_r1"]
            assert all((one["rank"] == 1) == (one["prediction"] in one["reference"])
                       for one in given[word])  # fmt: skip


def test_the_images_of_a_task_are_written_down_once(runs):
    every = []
    for stage in (1, 2, 3):
        listed = json.loads((runs["zs"] / f"task_{stage}/images.json").read_text())
        assert (len(listed["train"]), len(listed["test"])) == (TRAIN, TEST)
        every += listed["train"] + listed["test"]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("method", ["zs", "proof"])
def test_frozen_encoders_see_every_image_and_read_every_text_once(
    method, clip, tmp_path, monkeypatch
):
    seen, read = [], []
    forward, text = Encoder.forward, Encoder.text
    monkeypatch.setattr(
        Encoder, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1]
    )
    monkeypatch.setattr(
        Encoder, "text", lambda self, x, *mask: (read.append(len(x)), text(self, x, *mask))[1]
    )
    run(recipe(tmp_path, clip, method))
    assert sum(seen) == len(WORDS) * (TEST + (TRAIN if method == "proof" else 0))
    sets = ["test"] + (["train"] if method == "proof" else [])
    sizes = {"test": TEST, "train": TRAIN}
    said = [
        {text for captions in one.captions for text in captions}
        for side in sets
        for one in cut(
            captioned("toy:compositions", side), WORDS, given={}, size=sizes[side]
        ).tasks.values()
    ]
    assert sum(read) == sum(map(len, said))


def test_batches_of_another_size_find_the_same(clip, runs, tmp_path):
    tree = recipe(tmp_path, clip, "zs").resolved()
    tree["eval"]["batch_size"] = 1
    run(Recipe.from_tree(tree, "recipe.yaml"))
    assert found(tmp_path, 3) == found(runs["zs"], 3)


@pytest.mark.parametrize("method", ["finetune", "der", "memo", "proof"])
def test_a_deleted_stage_comes_back_to_the_same_bytes(method, clip, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[method], folder)
    shutil.rmtree(folder / "task_3")
    run(recipe(folder, clip, method))
    for name in ("state.safetensors", "memory.safetensors", "scores.json", "images.json"):
        whole = runs[method] / f"task_3/{name}"
        assert (folder / f"task_3/{name}").read_bytes() == whole.read_bytes()


def test_a_run_that_was_killed_within_a_task_ends_where_it_would_have(
    clip, runs, tmp_path, monkeypatch
):
    saving = recipe(tmp_path, clip, "memo", training={"save_strategy": "steps", "save_steps": 2})
    forward, calls = MEMO.before_forward, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 4 + 4:  # in the second task, after its first checkpoint
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(MEMO, "before_forward", dying)
    with pytest.raises(KeyboardInterrupt):
        run(saving)
    assert list((tmp_path / "task_2").glob("checkpoint-*"))
    run(saving)
    assert len(calls) == 8 + 2 + 4
    for name, value in state(runs["memo"], 3).items():
        assert torch.equal(state(tmp_path, 3)[name], value), name


def test_a_model_that_learnt_to_retrieve_is_not_exported_yet(runs, capsys):
    assert cli.main(["export", str(runs["zs"]), "--to", "merged"]) == 2
    assert "learnt retrieval" in capsys.readouterr().err


def test_what_an_earlier_task_has_of_its_own_stays_to_the_bit(runs):
    heads = {
        "proof": ("head.images.0", "head.texts.0", "head.context.0"),
        "der": ("encoder.",),
        "memo": ("encoder.",),
    }
    for method, begin in heads.items():
        before, now = state(runs[method], 2), state(runs[method], 3)
        old = [name for name in before if name.startswith(begin)]
        assert old and all(torch.equal(now[name], before[name]) for name in old), method
        newer = now.keys() - before.keys()
        assert newer and not torch.equal(now["head.log_scale"], before["head.log_scale"])


def test_a_copy_begins_where_the_one_before_it_ended(runs):
    last = state(runs["memo"], 2)
    for name, value in state(runs["memo"], 3).items():
        if "tail_3.own." in name:
            before = last[name.replace("tail_3", "tail_2")]
            assert 0 < (value - before).abs().max() < 0.05, name


def test_memo_copies_ends_alone_and_der_whole_towers(runs):
    sizes = {}
    for method in ("memo", "der"):
        now = state(runs[method], 3)
        sizes[method] = sum(v.numel() for name, v in now.items() if "tail_3." in name)
    towers = sum(one.numel() for one in Encoder(backbone("clip")).towers)
    assert 0 < sizes["memo"] < towers / 2 and sizes["der"] == towers


@pytest.mark.parametrize("method", ["finetune", "memo", "proof"])
def test_siglip_learns_and_answers_too(method, tmp_path):
    model = reading_folder(tmp_path / "siglip", "siglip")
    run(recipe(tmp_path / "run", model, method, stages=2))
    assert len(found(tmp_path / "run", 2)) == 2


def test_the_summary_and_the_curves_have_recall_both_ways(runs):
    scores = json.loads((runs["proof"] / "scores.json").read_text())
    each = [row["recall"]["t2i_r5"] for row in scores["rows"][1:]]
    assert scores["summary"]["mean_t2i_r5"] == pytest.approx(sum(each) / 3)
    assert scores["summary"]["last_t2i_r5"] == each[-1]
    alone, both = planes(read([runs["proof"]])), planes(read([runs["proof"], runs["zs"]]))
    assert [curve.label for curve in alone[0].curves] == ["R@1", "R@5", "R@10"]
    assert [curve.label for curve in both[1].curves] == ["proof", "zs"]
    assert [point.y.mean for point in alone[1].curves[1].points] == each


def test_a_report_is_written(runs, tmp_path, capsys):
    folders = [str(runs["proof"]), str(runs["zs"])]
    assert cli.main(["report", *folders, "--output", str(tmp_path)]) == 0
    assert "R_B@1, image to text" in capsys.readouterr().out
    assert "image to text, over all tasks so far" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "stages.png").exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tasks": [{"name": "a", "data": "toy:arrow"}]}, "tasks"),
        ({"classes": {"data": "toy:compositions", "number": 6, "increment": 2}}, "retrieval"),
        ({"method": {"name": "simplecil"}}, "method.name"),
        ({"data": {"on_error": "skip"}}, "data"),
        ({"retrieval": {"data": "toy:compositions", "words": []}}, "retrieval.words"),
        ({"retrieval": {"data": "toy:compositions", "words": ["a b"]}}, "retrieval.words.0"),
        ({"retrieval": {"data": "toy:compositions", "words": ["a", "a"]}}, "retrieval.words"),
        (
            {"retrieval": {"data": "toy:compositions", "forms": {"go": ["went"]}}},
            "retrieval.forms.go",
        ),
        ({"retrieval": {"data": "toy:compositions", "stages": 6}}, "retrieval.stages"),
    ],
)
def test_a_recipe_that_cannot_be_meant_names_the_key(clip, tmp_path, change, key):
    tree = recipe(tmp_path, clip, "zs").resolved() | change
    with pytest.raises(RecipeError) as told:
        Recipe.from_tree(tree, "recipe.yaml")
    assert told.value.key == key


def test_a_recipe_comes_back_from_what_is_saved_of_it(clip, tmp_path):
    one = recipe(tmp_path, clip, "memo", forms={"left": ["left"]}, stages=2)
    assert Recipe.from_tree(yaml.safe_load(yaml.safe_dump(one.resolved())), "saved") == one
    assert [task.name for task in one.tasks] == ["left", "top"]


def test_a_word_that_no_image_says_and_a_model_that_does_not_read_are_refused(clip, tmp_path):
    with pytest.raises(RecipeError, match=r"retrieval\.words.*'train' says 'walk'"):
        run(recipe(tmp_path, clip, "zs", words=["walk"]))
    backbone("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(RecipeError, match="no text tower; retrieval takes a CLIP"):
        run(recipe(tmp_path, tmp_path / "vit", "zs"))


def test_it_is_looked_at_before_it_runs(clip, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path / "run", clip, "der").resolved()))
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    towers = sum(one.numel() for one in Encoder(backbone("clip")).towers)
    assert f"{towers + 1:,} parameters train" in said and "image and caption once" in said
    assert cli.main(["data", "check", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train left 12 pictures" in said and "A run would start" in said
    cli.main(["doctor", str(path)])
    assert "3 stages, 36 pictures to train, 15 to test" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", names("retrieval"))
def test_no_more_is_kept_than_a_dry_run_says(method, clip, tmp_path):
    one = recipe(tmp_path / "run", clip, method, stages=2)
    said = forecast_classes(one, Launch()).kept_bytes
    run(one)
    kept = json.loads((tmp_path / "run/task_2/manifest.json").read_text())["memory_bytes"]
    assert kept <= said <= kept + 64


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("engine", "method"),
    [("ddp", "finetune"), ("ddp", "proof"), ("zero2", "memo"), ("fsdp2", "memo")],
)
def test_two_processes_learn_and_find_as_one_does(engine, method, clip, tmp_path):
    """Each has half of a batch, and the negatives of both."""
    one = recipe(tmp_path / "alone", clip, method, stages=2)
    run(one)
    both = run_together(engine, one, tmp_path)
    # No softmax feels what all its keys share, and Adam enlarges rounding.
    close = {"stages": (1, 2), "atol": 1e-4, "rtol": 0, "but": ("k_proj.bias",)}
    assert_alike(engine, both, tmp_path / "alone", "state", **close)
    for stage in (1, 2):
        told = [
            {
                word: [row["caption_ranks"] for row in rows]
                for word, rows in found(folder, stage).items()
            }
            for folder in (both, tmp_path / "alone")
        ]
        assert told[0] == told[1]
