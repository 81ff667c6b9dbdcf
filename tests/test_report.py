"""The report on runs: what it says, what it refuses, and that the page needs nothing but itself."""

import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from mllm_cl import cli
from mllm_cl.metrics.scores import table
from mllm_cl.report import compare, read, show
from mllm_cl.report.costs import duration, size
from mllm_cl.report.grids import at_the_end, by_layer, by_task, covariance, layers, over_stages
from mllm_cl.report.interval import interval
from mllm_cl.report.page import page
from mllm_cl.report.pictures import _draw_lines
from mllm_cl.report.series import drifts, over_time, round_up
from mllm_cl.report.words import told

TASKS, RETAIN = ("dial", "bars", "dice"), ("digit",)
ROUTERS = tuple(f"model.layers.{i}.mlp.gate" for i in range(2))
LINEARS = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def scores_after(stage: int, lost: float, tasks=TASKS) -> dict[str, float]:
    """0.9 when new and `lost` less with every later task; the next task is scored, too."""
    found = {name: 0.9 - lost * (stage - 1 - i) for i, name in enumerate(tasks[:stage])}
    found |= dict.fromkeys(tasks if stage == 0 else tasks[stage : stage + 1], 0.1)
    return found | dict.fromkeys(RETAIN, 0.8 - lost * stage)


def make_run(
    folder: Path,
    *,
    method: str = "same",
    seed: int = 0,
    lost: float = 0.1,
    stages: int = 4,
    damping: float = 0.1,
    drift: bool = True,
    tasks=TASKS,
) -> Path:
    """A run folder as the runner leaves it, with scores and drift that are easy to work out."""
    rows = []
    for stage in range(stages):
        path, after = folder / f"task_{stage}", tasks[stage - 1] if stage else "zero-shot"
        rows.append({"after": after, "scores": scores_after(stage, lost, tasks)})
        put(path / "scores.json", rows[-1])
        recipe = {
            "seed": seed,
            "model": {"model_name_or_path": "some/model"},
            "method": {"name": method, "damping": damping},
            "tasks": [{"name": name, "train_size": 100} for name in tasks[:stage]],
            "retain": [{"name": name} for name in RETAIN],
        }
        put(path / "recipe.json", recipe)
        put(path / "manifest.json", {"memory_bytes": 500, "trained_parameters": 12_000})
        if drift:
            put_drift(path, stage, tasks)
    if stages > len(tasks):
        put(folder / "scores.json", table(tasks, RETAIN, rows))
    return folder


def put_drift(path: Path, stage: int, tasks) -> None:
    rows, trajectory = {}, {}
    for learnt, name in enumerate((*RETAIN, *tasks[:stage])):
        since = stage - learnt
        for layer, (router, linear) in enumerate(zip(ROUTERS, LINEARS, strict=True)):
            part = 0.1 * since * (layer + 1)
            rows[f"{name}::{linear}"] = {"inputs": part, "experts": part / 2}
            rows[f"{name}::{router}"] = {
                "inputs": part,
                "router": part / 4,
                "overlap": 1 - part,
                "rerouting_accuracy": 1 - part,
                "entropy": 0.7,
            }
    for other in (*RETAIN, *tasks[:stage]):
        name = (*RETAIN, *tasks)[stage]
        trajectory.setdefault(name, {})[other] = 0.9 if other == name else 0.5
        trajectory.setdefault(other, {})[name] = 0.9 if other == name else 0.6
    put(path / "drift.json", rows)
    put(path / "covariance.json", {ROUTERS[0]: trajectory})
    seconds = {"load": 1.0, "train": 50.0, "score": 8.0, "drift": 1.0, "total": 60.0}
    peaks = {"peak_host_bytes": 2_000_000_000, "peak_accelerator_bytes": None}
    put(path / "cost.json", {"seconds": seconds, **peaks, "state_bytes": 1_500_000})


class Outline(HTMLParser):
    """What a page consists of, and whether its elements are closed in order."""

    VOID = {"meta", "br", "line", "path", "img", "link", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        self.text += data


# The numbers


def test_an_interval_is_that_of_students_t():
    found = interval([0.1, 0.2, 0.4])
    # t_{0.975, 2} = 4.303, s = sqrt(((2/15)^2 + (1/30)^2 + (1/6)^2) / 2) = 0.152753
    assert found.mean == pytest.approx(0.7 / 3)
    assert found.half == pytest.approx(4.303 * 0.1527525 / math.sqrt(3), rel=1e-5)
    assert math.isnan(interval([0.5]).half) and math.isnan(interval([0.5, 0.6]).half)
    assert interval([]) is None
    normal = interval([0.0, 1.0] * 500)
    assert normal.half == pytest.approx(1.962 * 0.50025 / math.sqrt(1000), rel=1e-3)


def test_runs_that_differ_in_the_seed_alone_are_replicates(tmp_path):
    for seed, method in product(range(3), ("same", "finetune")):
        make_run(tmp_path / f"{method}-{seed}", method=method, seed=seed, lost=0.1 + 0.05 * seed)
    groups = read([tmp_path])
    assert [(one.label, len(one.runs)) for one in groups] == [("finetune", 3), ("same", 3)]
    assert groups[1].summary("forgetting") == pytest.approx([0.15, 0.225, 0.3])


def test_groups_of_one_method_are_called_by_what_tells_them_apart(tmp_path):
    folders = [make_run(tmp_path / str(d), damping=d) for d in (0.1, 0.3)]
    folders.append(make_run(tmp_path / "other", method="finetune"))
    assert [one.label for one in read(folders)] == [
        "same (damping 0.1)",
        "same (damping 0.3)",
        "finetune",
    ]


def test_drift_is_averaged_over_layers_tasks_and_seeds_of_what_was_learnt_before(tmp_path):
    (group,) = read([make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)])
    # at the end dial is two tasks old, bars one and digit three; layers drift by 0.1 and 0.2 a task
    assert over_stages(group, "overlap")["dice"] == pytest.approx(1 - 0.15 * (3 + 2 + 1) / 3)
    assert at_the_end(group, ["experts"])["dial"] == {"experts": pytest.approx(0.15)}
    grid = by_layer(group, "inputs", "")
    assert grid.rows == ["0", "1"] and grid.columns == list(TASKS)
    assert grid.values[1] == pytest.approx([0.2, 0.3, 0.4])
    overlap = by_task(group, "overlap", "")
    assert overlap.rows == [*RETAIN, *TASKS] and overlap.values[1][1:] == pytest.approx(
        [1, 0.85, 0.7]
    )
    assert math.isnan(overlap.values[1][0])  # dial had not been learnt
    pairs = covariance(group, "")
    assert pairs.values[1][2] == pytest.approx(0.6) and pairs.values[2][1] == pytest.approx(0.5)


def test_layers_are_called_by_their_number_and_by_their_tower_if_there_are_two():
    text, image = "model.language_model.layers.11.mlp.gate", "model.visual.blocks.2.attn.qkv"
    assert layers([text]) == {text: "11"}
    assert layers([text, image]) == {text: "language_model 11", image: "visual 2"}


def test_a_line_counts_from_where_its_task_was_learnt(tmp_path):
    (group,) = read([make_run(tmp_path / "one")])
    tasks, known = over_time(group)
    assert [one.start for one in tasks.series] == list(TASKS)
    assert tasks.series[1].values["dial"] == 0.1 and tasks.series[1].values["bars"] == 0.9
    assert known.series[0].start is None


def test_pictures_of_drift_have_numbers_on_both_sides(tmp_path):
    """Of a line without a point before its task matplotlib would make names instead."""
    (group,) = read([make_run(tmp_path / "one")])
    figure = _draw_lines(drifts([group]))
    for axes in figure.axes:
        assert axes.yaxis.get_units() is None


def test_numbers_are_said_as_a_person_says_them():
    assert [size(n) for n in (0, 999, 1_500, 2.5e9)] == ["0 B", "999 B", "1.5 KB", "2.5 GB"]
    said = [duration(s) for s in (4.4, 59.4, 75, 3600, 3_900)]
    assert said == ["4 s", "59 s", "1 min", "1 h 0 min", "1 h 5 min"]
    assert [round_up(x) for x in (0, 0.11, 0.7, 1.0, 1.3)] == [1, pytest.approx(0.12), 0.8, 1, 1.6]


# The sentences


def plain(text: str) -> str:
    """Without the spaces that keep a number and its unit on one line."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_first_sentence_says_what_was_learnt_and_what_was_forgotten(tmp_path):
    said = plain(told(read([make_run(tmp_path / "one")])))
    assert said == (
        "Three tasks were learnt. Each scored 90 % when it was new, on average; at the end they "
        "score 80 %. Most was lost on dial: from 90 % to 70 %. What the model knew before fell "
        "from 80 % to 50 %."
    )
    assert "Nothing was forgotten." in told(read([make_run(tmp_path / "kept", lost=0.0)]))


def test_a_task_that_scores_like_one_constant_answer_was_not_learnt(tmp_path):
    run = make_run(tmp_path / "one")
    scores = json.loads((run / "scores.json").read_text())
    put(run / "scores.json", scores | {"constant": {"dial": 0.3, "bars": 0.9, "dice": 0.8}})
    said = plain(told(read([run])))
    assert "bars (90 %) scores no more than one constant answer does" in said


def test_several_methods_are_compared_in_a_sentence(tmp_path):
    make_run(tmp_path / "a", method="same", lost=0.05)
    make_run(tmp_path / "b", method="finetune", lost=0.3)
    assert plain(told(read([tmp_path]))) == (
        "Of two methods, same scores best at the end: 85 % on average; finetune worst: 60 %. "
        "Tasks fell below their best score by 8 points with same, by 45 points with finetune."
    )


def test_what_does_not_learn_task_after_task_is_told_apart(tmp_path):
    make_run(tmp_path / "a", method="same", lost=0.05)
    make_run(tmp_path / "b", method="finetune", lost=0.3, stages=3)
    put(
        make_run(tmp_path / "c", method="zeroshot") / "task_3/manifest.json",
        {"trained_parameters": 0},
    )
    joint = make_run(tmp_path / "d", method="joint", lost=0.0)
    for stage in (1, 2):
        shutil.rmtree(joint / f"task_{stage}")
    rows = json.loads((joint / "scores.json").read_text())["rows"]
    put(joint / "scores.json", table(TASKS, RETAIN, [rows[0], rows[-1]]))
    said = plain(told(read([tmp_path])))
    assert said.startswith("Of two methods, same scores best at the end: 85 % on average; finetune")
    assert "With no training (zeroshot): 80 %. With all tasks at once (joint): 90 %." in said
    assert said.endswith("Unfinished: finetune.")


def test_an_unfinished_run_says_what_is_to_come(tmp_path):
    (group,) = read([make_run(tmp_path / "run", stages=3)])
    assert group.tasks == list(TASKS)
    assert told([group]).endswith("One of three is to come.")
    assert told(read([make_run(tmp_path / "new", stages=1)])).startswith("No task has been learnt")


# The page


def test_a_page_is_whole_and_needs_no_network(tmp_path):
    text = page(read([make_run(tmp_path / "run")]))
    outline = Outline(text)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not [
        name for name, _ in outline.attributes if name in ("src", "href") or name[:2] == "on"
    ]
    assert "default-src 'none'" in text
    for words in ("What drifted", "Routing of learnt tasks", "Where the inputs", "Cost", "4 min"):
        assert words in outline.text
    assert outline.tags.count("svg") == 2 + 3  # scores over time, drifts


def test_what_a_run_is_called_cannot_become_markup(tmp_path):
    tasks = ("<script>alert(1)</script>", 'quo"te', "a & b")
    outline = Outline(page(read([make_run(tmp_path / "<b>run", tasks=tasks, method="<i>x")])))
    assert not {"script", "b"} & set(outline.tags)
    assert "<script>alert(1)<" in outline.text and "<b>run" in outline.text


def test_sections_without_data_say_so_in_a_line(tmp_path):
    outline = Outline(page(read([make_run(tmp_path / "run", drift=False, stages=1)])))
    for said in (
        "No drift was recorded",
        "No routing was recorded",
        "No second moments",
        "No cost",
    ):
        assert said in outline.text
    assert "svg" not in outline.tags


def test_losses_are_shown_where_they_were_kept(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Loss on answer tokens" not in page(read([run]))
    scores = json.loads((run / "scores.json").read_text())
    for row in scores["rows"]:
        row["losses"] = dict.fromkeys(row["scores"], 3.25)
    put(run / "scores.json", scores)
    text = page(read([run]))
    assert "Loss on answer tokens" in text and text.count(">3.25<") == 15


def test_thirty_runs_fit_on_a_page(tmp_path):
    for seed, number in product(range(3), range(10)):
        run = tmp_path / f"{number}-{seed}"
        make_run(run, method=f"method{number}", seed=seed, lost=0.02 * number + 0.01 * seed)
    text = page(read([tmp_path]))
    Outline(text)
    assert "Ten methods, 30 runs" in text and len(text) < 2_000_000
    assert text.index("method0") < text.index("method9")


def test_runs_with_other_tasks_are_not_passed_off_as_comparable(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", tasks=("arrow", "size", "count"), method="finetune")
    outline = Outline(page(read([tmp_path])))
    assert "their means are not comparable" in outline.text
    assert "But they did not learn the same tasks." in outline.text


def test_a_seed_that_is_there_twice_is_named(tmp_path):
    folders = [make_run(tmp_path / name, seed=5) for name in ("a", "b", "c")]
    assert "same has seed 5 more than once: no replicates." in page(read(folders))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_light_and_dark(tmp_path):
    path, pictures = tmp_path / "report.html", {}
    path.write_text(page(read([make_run(tmp_path / "run")])))
    for scheme, number in (("light", 1), ("dark", 0)):
        pictures[scheme] = tmp_path / f"{scheme}.png"
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        words += [f"--user-data-dir={tmp_path / scheme}", "--window-size=1280,900"]
        words += [f"--blink-settings=preferredColorScheme={number}"]
        words += [f"--screenshot={pictures[scheme]}", path.as_uri()]
        subprocess.run([CHROMIUM, *words], check=True, capture_output=True, timeout=60)
    light, dark = (Image.open(pictures[scheme]).convert("RGB") for scheme in pictures)
    assert light.size == dark.size == (1280, 900)
    assert min(light.getpixel((2, 2))) > 240 and max(dark.getpixel((2, 2))) < 40
    for image in (light, dark):  # more than a blank page: text, cells and frames
        assert len(image.getcolors(1280 * 900)) > 100


# The commands and files


def test_the_command_writes_a_page_and_pictures(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "average 0.800" in out and f"report: {run / 'report' / 'report.html'}" in out
    found = {path.name for path in (run / "report").iterdir()}
    assert found >= {
        "report.html",
        "scores.png",
        "scores_over_time.png",
        "drift.png",
        "routing.png",
    }
    for path in (run / "report").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_several_runs_are_compared_on_the_terminal(tmp_path, capsys):
    for seed in range(3):
        make_run(tmp_path / f"{seed}", seed=seed, lost=0.1 + 0.02 * seed, drift=False)
    make_run(tmp_path / "worse", method="finetune", lost=0.4, drift=False)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    same = next(line for line in lines if "same" in line)
    assert same[3:8] == ["3", "|", "0.780", "±", "0.050"]
    assert lines.index(same) < next(i for i, line in enumerate(lines) if "finetune" in line)
    assert (tmp_path / "out" / "methods.png").is_file()


@pytest.mark.parametrize("damage", ["absent", "empty", "not JSON", "a list"])
def test_what_is_no_run_is_refused_by_name(tmp_path, damage, capsys):
    run = tmp_path / "run"
    if damage != "absent":
        make_run(run)
    if damage == "empty":
        shutil.rmtree(run)
        run.mkdir()
    if damage in ("not JSON", "a list"):
        (run / "task_2" / "drift.json").write_text("{" if damage == "not JSON" else "[]")
    assert cli.main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert str(run) in said and "Traceback" not in said


def test_the_matrix_ends_with_what_one_constant_answer_scores():
    file = io.StringIO()
    row = {"after": "a", "scores": {"a": 0.5}, "constant": {"a": 0.25}}
    show(table(["a"], [], [row]), file)
    assert "| one answer | 0.250 |" in file.getvalue()


def test_the_table_of_methods_is_plain_in_a_file(tmp_path):
    with open(tmp_path / "log", "w") as file:
        compare(read([make_run(tmp_path / "run")]), file)
    assert "\x1b" not in (tmp_path / "log").read_text()
