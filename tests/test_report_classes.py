"""What the report says of runs whose classes come in stages."""

import json
from itertools import product
from pathlib import Path

import pytest

from mllm_cl import cli
from mllm_cl.metrics.scores import table
from mllm_cl.metrics.stages import summary
from mllm_cl.report import read
from mllm_cl.report.page import page
from mllm_cl.report.stages import accuracies, by_name, kept, over_classes, over_memory, planes
from mllm_cl.report.words import told
from test_report import Outline, make_run, plain, put

STAGES = ("1-4", "5-6", "7-8")
IMAGES = {"1-4": 40, "5-6": 20, "7-8": 20}


def make_class_run(
    folder: Path,
    *,
    method: str = "simplecil",
    order: int | None = 1993,
    seed: int = 0,
    stages: int = 3,
    lost: float = 0.1,
    memory: int = 1000,
    zero_shot: bool = False,
    **settings,
) -> Path:
    """A run as the runner leaves it: 0.9 when new, `lost` less with every later stage."""
    rows = []
    for stage in range(stages + 1):
        path, names = folder / f"task_{stage}", STAGES[:stage]
        after = STAGES[stage - 1] if stage else "zero-shot"
        scores = {name: 0.9 - lost * (stage - 1 - k) for k, name in enumerate(names)}
        rows.append({"after": after, "scores": scores, "counts": {n: IMAGES[n] for n in names}})
        if zero_shot:
            rows[-1]["zero_shot"] = zero_shot_after(stage, lost)
        put(path / "scores.json", rows[-1])
        recipe = {
            "seed": seed,
            "model": {"model_name_or_path": "some/vit"},
            "method": {"name": method, **settings},
            "classes": {"data": "some/data", "number": 8, "first": 4, "increment": 2}
            | {"order": order, "stages": stage},
        }
        put(path / "recipe.json", recipe)
        put(path / "manifest.json", {"memory_bytes": memory, "trained_parameters": 0})
        seconds = {"load": 1.0, "total": 6.0}
        cost = {"seconds": seconds, "peak_host_bytes": 10**9, "peak_accelerator_bytes": None}
        put(path / "cost.json", cost | {"state_bytes": 500})
    if stages == len(STAGES):
        found = table(STAGES, [], rows)
        found["summary"] |= summary(rows)
        put(folder / "scores.json", found)
    return folder


def zero_shot_after(stage: int, lost: float) -> dict[str, float | None]:
    """What is known by name falls; at first nothing is seen, and at last nothing is to come."""
    kinds = {"seen": 0.6 + 0.1 * stage, "unseen": 0.6 - lost * stage, "harmonic_mean": 0.5}
    absent = {0: ("seen", "harmonic_mean"), 3: ("unseen", "harmonic_mean")}.get(stage, ())
    return {key: None if key in absent else value for key, value in kinds.items()}


def test_a_curve_counts_images_and_goes_over_the_classes_seen(tmp_path):
    (group,) = read([make_class_run(tmp_path / "run")])
    # 0.9; (0.8 40 + 0.9 20) / 60; (0.7 40 + 0.8 20 + 0.9 20) / 80
    expected = {4: 0.9, 6: 50 / 60, 8: 62 / 80}
    assert accuracies(group.runs[0]) == pytest.approx(expected)
    (plane,) = over_classes([group])
    assert [(p.x, p.y.mean) for p in plane.curves[0].points] == [
        (x, pytest.approx(y)) for x, y in expected.items()
    ]
    assert group.summary("last") == [pytest.approx(expected[8])]


def test_a_run_that_was_cut_off_is_unfinished_and_knows_how_many_stages_there_are(tmp_path):
    (group,) = read([make_class_run(tmp_path / "run", stages=2)])
    assert group.tasks == list(STAGES) and not group.finished
    assert told([group]).endswith("One of three is to come.")
    assert group.summary("last") == [pytest.approx(50 / 60)]
    assert "2, unfinished" not in page([group]) and "3, unfinished" in page([group])


def test_orders_of_classes_and_seeds_are_replicates_also_when_cut_off(tmp_path):
    for order, seed in product((1993, 1994, None), (0, 1)):
        make_class_run(tmp_path / f"{order}-{seed}", order=order, seed=seed)
    make_class_run(tmp_path / "cut", order=7, stages=1)
    make_class_run(tmp_path / "other", method="aper", rank=4)
    groups = read([tmp_path])
    assert [(one.label, len(one.runs)) for one in groups] == [("simplecil", 7), ("aper", 1)]
    assert "more than once" not in page(groups)
    make_class_run(tmp_path / "again")
    assert "simplecil has seed 0 more than once: no replicates." in page(read([tmp_path]))


def test_replicates_make_a_band(tmp_path):
    for order, lost in ((1, 0.1), (2, 0.2), (3, 0.3)):
        make_class_run(tmp_path / str(order), order=order, lost=lost)
    (group,) = read([tmp_path])
    first, _, last = over_classes([group])[0].curves[0].points
    assert first.y.half == pytest.approx(0)
    assert last.y.mean == pytest.approx(0.9 - 0.2 * (2 * 40 + 20) / 80)
    # t_{0.975, 2} s / sqrt(3) with s = 0.1 (2 40 + 20) / 80
    assert last.y.half == pytest.approx(4.303 * 0.125 / 3**0.5, rel=1e-4)
    assert 'class="band' in page([group])


def test_what_is_known_by_name_is_drawn_where_stages_were_asked(tmp_path):
    make_class_run(tmp_path / "a", method="proof", zero_shot=True)
    make_class_run(tmp_path / "b", method="zs_clip", lost=0.0, zero_shot=True)
    make_class_run(tmp_path / "c")
    groups = read([tmp_path])
    (alone,) = by_name(groups[:1])
    points = {one.label: [(p.x, p.y.mean) for p in one.points] for one in alone.curves}
    assert points == {
        "classes seen": [(4, pytest.approx(0.7)), (6, pytest.approx(0.8)), (8, pytest.approx(0.9))],
        "classes to come": [(0, 0.6), (4, 0.5), (6, pytest.approx(0.4))],
        "harmonic mean": [(4, 0.5), (6, 0.5)],
    }
    several = by_name(groups)
    assert [plane.title.rpartition(": ")[2] for plane in several] == list(points)
    assert all([c.label for c in plane.curves] == ["proof", "zs_clip"] for plane in several)
    text = page(groups)
    assert text.count("Asked by name, among all classes") == 6  # three titles, twice each
    colours = {(c.label, c.number) for plane in planes(groups) for c in plane.curves}
    assert len(colours) == 3  # a method has one colour in all pictures
    assert by_name(groups[2:]) == [] and "Asked by name" not in page(groups[2:])


def test_settings_of_a_method_are_one_line_over_what_they_keep(tmp_path):
    for budget, lost in ((1_000, 0.3), (100_000, 0.1)):
        folder = tmp_path / f"{budget}"
        make_class_run(folder, method="icarl", memory=budget, lost=lost, budget=budget)
    make_class_run(tmp_path / "plain", memory=0)
    groups = read([tmp_path])
    assert kept(groups[0]) == 1500
    (plane,) = over_memory(groups)
    by_label = {curve.label: curve.points for curve in plane.curves}
    assert [len(points) for points in by_label.values()] == [2, 1]
    assert [point.x for point in by_label["icarl"]] == pytest.approx([3.17609, 5.00217], abs=1e-4)
    assert by_label["simplecil"][0].x == pytest.approx(2.69897, abs=1e-4)  # 500 bytes of weights
    assert [text for _, text in plane.ticks] == ["100 B", "1.0 KB", "10 KB", "100 KB", "1.0 MB"]


def test_a_method_that_keeps_nothing_has_a_place_too(tmp_path):
    for name, memory in (("zs_clip", -500), ("simplecil", 10_000)):
        make_class_run(tmp_path / name, method=name, memory=memory)
    (plane,) = over_memory(read([tmp_path]))
    assert plane.ticks[0] == (3.0, "nothing") and plane.curves[-1].points[0].x == 3.0


def test_unfinished_runs_and_runs_of_tasks_are_on_no_memory_curve(tmp_path):
    make_class_run(tmp_path / "a")
    make_class_run(tmp_path / "b", method="aper", stages=2)
    make_run(tmp_path / "c", method="same")
    groups = read([tmp_path])
    assert over_memory([group for group in groups if group.of_classes]) == []
    assert [curve.label for plane in planes(groups) for curve in plane.curves] == [
        "simplecil",
        "aper",
    ]
    text = Outline(page(groups)).text
    assert "Stage by stage" in text and "What drifted" in text


def test_the_first_sentences_are_about_classes(tmp_path):
    said = plain(told(read([make_class_run(tmp_path / "run")])))
    assert said == (
        "8 classes were learnt in three stages. Of the test images of all of them 78 % are "
        "recognised at the end, 84 % on average over the stages; of old classes 73 %, of the "
        "newest 90 %. "
        "Most was lost on 1-4: from 90 % to 70 %."
    )


def test_several_methods_are_compared_by_the_accuracy_over_all_classes(tmp_path):
    make_class_run(tmp_path / "a", method="aper", lost=0.05)
    make_class_run(tmp_path / "b", method="finetune", lost=0.4)
    make_class_run(tmp_path / "c", method="early", lost=0.0, stages=1)
    groups = read([tmp_path])
    assert plain(told(groups)) == (
        "aper recognises 84 % of the test images of all classes, best of two methods; finetune, "
        "worst, 40 %. Stages fell below their best score by 8 points with aper, by 60 points with "
        "finetune. Unfinished: early."
    )
    text = page(groups)
    rows = text[text.index('id="methods"') : text.index('id="time"')]
    assert rows.index("early") < rows.index("aper") < rows.index("finetune")
    assert "Framed" in text and text.index(">aper</h3>") < text.index("Stage by stage")


def test_the_page_has_the_matrix_first_and_no_empty_sections(tmp_path):
    for method in ("simplecil", "aper"):
        make_class_run(tmp_path / method, method=method)
    text = page(read([tmp_path]))
    outline = Outline(text)
    assert text.index('class="heat') < text.index("<svg")
    for words in ("PD", "Ā", "A_B", "Stage by stage", "The matrix of every method"):
        assert words in outline.text
    for words in ("What drifted", "Routing of learnt", "Where the inputs"):
        assert words not in outline.text
    assert outline.tags.count("svg") == 1 + 1 + 2  # over classes, over memory, and stages by method


def test_the_command_compares_and_draws_the_curves(tmp_path, capsys):
    for method, lost in (("simplecil", 0.1), ("finetune", 0.4)):
        make_class_run(tmp_path / method, method=method, lost=lost)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "A_B, at the end" in lines[1] and "Ā" in lines[1] and "PD" in lines[1]
    ranks = [next(i for i, line in enumerate(lines) if name in line) for name in
             ("simplecil", "finetune")]  # fmt: skip
    assert ranks == sorted(ranks) and "0.775" in lines[ranks[0]]
    for name in ("stages.png", "methods.png", "scores_simplecil.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_learnt_stage_has_a_page(tmp_path):
    groups = read([make_class_run(tmp_path / "run", stages=0)])
    Outline(page(groups))
    assert planes(groups) == [] and told(groups) == "No class has been learnt yet."
    assert json.dumps(groups[0].runs[0].scores["summary"]) == "{}"
