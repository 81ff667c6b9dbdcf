"""What is shown of a run: its score matrix, on the terminal and as a figure."""

import json
import re
from pathlib import Path
from typing import Any

from mllm_cl.report.figure import draw
from mllm_cl.report.terminal import show

__all__ = ["draw", "load_scores", "show"]


def load_scores(folder: str | Path) -> dict[str, Any]:
    """The content of a run's `scores.json`: its own, or that of its last finished task.

    Raises ValueError when there is none or it cannot be read.
    """
    folder = Path(folder)
    tasks = [
        path for path in folder.glob("task_*/scores.json") if re.search(r"\d+$", path.parent.name)
    ]
    tasks.sort(key=lambda path: int(re.search(r"\d+$", path.parent.name)[0]))
    own = folder / "scores.json"
    found = own if own.is_file() else tasks[-1] if tasks else None
    if found is None:
        raise ValueError(f"{folder} holds no scores.json; expected the output folder of a run")
    try:
        scores = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is not JSON: {error}") from None
    if not isinstance(scores, dict) or not {"tasks", "retain", "rows", "summary"} <= scores.keys():
        raise ValueError(
            f"{found} is no score matrix: expected the keys tasks, retain, rows and summary"
        )
    return scores
