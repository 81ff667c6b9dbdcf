"""What the command line prints and returns."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm_cl import cli
from mllm_cl.metrics.scores import table
from mllm_cl.report import draw, load_scores, show

ROWS = [
    {"after": "zero-shot", "scores": {"bars": 0.1, "dice": None, "base": 0.95}},
    {"after": "bars", "scores": {"bars": 0.9, "base": 0.9}},
    {"after": "dice", "scores": {"bars": 0.4, "dice": 0.8, "base": 0.7}},
]
SCORES = table(["bars", "dice"], ["base"], ROWS)


def mllm_cl(*words):
    command = [sys.executable, "-m", "mllm_cl", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed: 1\nmodle: {}\n", "modle"),
        ("model: {}\nmethod: {name: same}\ntasks: [{name: a, data: 'toy:bars'}]\n", "model.model"),
        ("seed: [1\n", "not YAML"),
        ("model: {}\nmethod: {name: same}\ntasks: []\n", "tasks"),
    ],
)
def test_a_bad_recipe_is_one_line_on_stderr_and_code_2(tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    done = mllm_cl("run", path)
    assert done.returncode == 2 and done.stdout == ""
    assert named in done.stderr and "bad.yaml" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_bad_override_or_a_missing_file_is_code_2(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("seed: 1\n")
    for words in (
        ["run", path, "--sead", "1"],
        ["run", tmp_path / "none.yaml"],
        ["report", tmp_path],
    ):
        done = mllm_cl(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_what_another_method_leaves_out_is_told_by_one_process(
    tmp_path, monkeypatch, capsys, rank, told
):
    path = tmp_path / "short.yaml"
    path.write_text(  # the data is not there: the run ends before a model is loaded
        "model: {model_name_or_path: toy:llava}\nmethod: {name: same, damping: 0.1, router: free}\n"
        "tasks: [{name: one, data: 'toy:no_such_task'}]\n"
    )
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert cli.main(["run", str(path), "--method.name", "finetune"]) == 2
    lines = capsys.readouterr().err.splitlines()
    note = "mllm-cl: method finetune does not take damping, router: left out"
    assert (lines[:1] == [note]) == told and bool(lines) == told


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys; from mllm_cl.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'matplotlib', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    seconds = time.perf_counter() - start
    assert done.stderr.strip() == "[]" and "run" in done.stdout
    assert seconds < 5  # half a second on an idle machine; ten times that on a busy one


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("mllm-cl 0.")


def test_an_interrupted_command_returns_130(monkeypatch, capsys):
    def interrupted(path, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr("mllm_cl.recipe.Recipe.load", interrupted)
    assert cli.main(["run", "x.yaml"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_tasks_are_listed(capsys):
    assert cli.main(["list", "tasks"]) == 0
    assert "toy:bars\n" in capsys.readouterr().out


def test_every_method_is_listed_with_its_setting(capsys):
    from mllm_cl.method import SETTINGS, names

    assert cli.main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[n, s] for s in SETTINGS for n in names(s)]


def test_a_report_prints_the_matrix_and_draws_it(tmp_path, capsys):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    assert load_scores(tmp_path) == SCORES
    assert cli.main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "average 0.600" in out and "forgetting 0.500" in out and "retain average 0.700" in out
    assert (tmp_path / "report" / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_report_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.json"):
        load_scores(tmp_path)


def test_the_matrix_is_plain_where_nobody_looks_and_every_score_is_there():
    file = io.StringIO()
    show(SCORES, file)
    assert "\x1b" not in file.getvalue() and file.getvalue().isascii()
    for text in ("0.100", "0.900", "0.400", "0.800", "(base)", "after", "zero-shot"):
        assert text in file.getvalue()


def test_a_figure_needs_no_retained_data_and_takes_unfinished_runs(tmp_path):
    draw(table(["bars", "dice"], [], ROWS[1:2]), tmp_path / "deep" / "one.png")
    assert (tmp_path / "deep" / "one.png").stat().st_size > 5000


@pytest.mark.parametrize("words", [["run"], ["run", "--dry-run"], ["data check"]])
def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys, words):
    recipe = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")
    place = ["--model.model_name_or_path", "nobody/none"]
    folder = ["--output_dir", str(tmp_path / "run")]
    command = [*words[0].split(), recipe, *words[1:], *place, *folder]
    assert cli.main(command) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "nobody/none is no folder of a model" in told[0]
