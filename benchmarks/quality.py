"""Every method on a recipe, several seeds each, as rows that are written when they finish:
`python -m benchmarks.quality recipes/quickstart.yaml --methods finetune,same --seeds 0,1,2,3,4`.

Cells that are done are not run again. `--set same:--method.damping=0.3` adds settings to one
method, and `--set NAME=same:…` gives a variant a name of its own. `--table` prints mean and 95 %
interval of what is there. Each recipe wants `--rows` and `--folder` of its own. Of classes that
come in stages `--vary classes.order --seeds 1993,1994,1995` gives three orders.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from mllm_cl.report.interval import interval

FIGURES = (
    "average",
    "newest",
    "forgetting",
    "retain_average",
    "overlap",
    "memory_bytes",
    "seconds",
)
CLASS_FIGURES = (
    "average_incremental",
    "last",
    "forgetting",
    "old",
    "new",
    "zero_shot_unseen",
    "memory_bytes",
    "seconds",
)


def cell(
    recipe: str, variant: str, method: str, words: list[str], seed: int, folder: Path, vary: str
) -> dict:
    """Run one cell and return its row; `seed` is the value of the setting `vary`."""
    output = folder / f"{variant}-{seed}"
    command = ["-m", "mllm_cl", "run", recipe, "--method.name", method, f"--{vary}", str(seed)]
    start = time.time()
    subprocess.run(
        [sys.executable, *command, "--output_dir", str(output), *words],
        check=True,
        capture_output=True,
    )
    return {
        "variant": variant,
        "seed": seed,
        **figures(output),
        "seconds": round(time.time() - start),
    }


def figures(output: Path) -> dict[str, float | None]:
    """What a finished run says: scores, routing of the first task, bytes of state."""
    scores = json.loads((output / "scores.json").read_text())
    last = scores["rows"][-1]["scores"]
    stage = max(output.glob("task_*"), key=lambda path: int(path.name.removeprefix("task_")))
    kept = json.loads((stage / "manifest.json").read_text())["memory_bytes"]
    if "average_incremental" in scores["summary"]:
        return {**scores["summary"], "memory_bytes": kept, "scores": last}
    drift = json.loads((stage / "drift.json").read_text())
    first = [
        row["overlap"]
        for name, row in drift.items()
        if name.startswith(f"{scores['tasks'][0]}::") and "overlap" in row
    ]
    newest = [
        row["scores"][row["after"]] for row in scores["rows"] if row["after"] in scores["tasks"]
    ]
    return {
        "average": scores["summary"]["average"],
        "average_of_all": sum(last[name] for name in scores["tasks"]) / len(scores["tasks"]),
        "newest": sum(newest) / len(newest),
        "forgetting": scores["summary"].get("forgetting"),
        "retain_average": scores["summary"].get("retain_average"),
        "overlap": sum(first) / len(first) if first else None,
        "memory_bytes": kept,
        "scores": last,
    }


def told(values: list[float]) -> str:
    """Mean ± half of the 95 % interval, where there are seeds enough for one."""
    found = interval(values)
    if found is None:
        return "–"
    half = "" if math.isnan(found.half) else f" ± {found.half:.3f}"
    return f"{found.mean:.3f}{half}"


def table(rows: list[dict]) -> str:
    """One Markdown line per variant."""
    if any("average_incremental" in row for row in rows):
        return _lines(rows, [name for name in CLASS_FIGURES if any(name in row for row in rows)])
    return _lines(rows, ["average_of_all", *[name for name in FIGURES if name != "average"]])


def by_set(rows: list[dict]) -> str:
    """The same of the last score in each task and retained set."""
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    return _lines([{**row, **row["scores"]} for row in rows], list(names))


def _lines(rows: list[dict], names: list[str]) -> str:
    lines = ["| variant | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        cells = [[row[name] for row in mine if row.get(name) is not None] for name in names]
        texts = [told(values) for values in cells]
        lines.append(f"| {variant} | {len(mine)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def parse_variants(methods: str, settings: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Variant -> (method, extra words)."""
    found: dict[str, tuple[str, list[str]]] = {
        name: (name, []) for name in methods.split(",") if name
    }
    for text in settings:
        head, _, words = text.partition(":")
        variant, _, method = head.rpartition("=")
        found[variant or method] = (method, words.split())
    return found


def main() -> None:
    """Parse, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--methods", default="")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--vary", default="seed", help="what takes the values of --seeds")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/quality.jsonl"))
    parser.add_argument("--table", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = (
        [json.loads(line) for line in arguments.rows.read_text().splitlines()]
        if arguments.rows.exists()
        else []
    )
    variants = {} if arguments.table else parse_variants(arguments.methods, arguments.settings)
    for seed in [int(word) for word in arguments.seeds.split(",")]:
        for variant, (method, words) in variants.items():
            if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
                continue
            place = arguments.folder, arguments.vary
            rows.append(cell(arguments.recipe, variant, method, words, seed, *place))
            with arguments.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(
                json.dumps({key: value for key, value in rows[-1].items() if key != "scores"}),
                flush=True,
            )
    print(table(rows), by_set(rows), sep="\n\n")


if __name__ == "__main__":
    main()
