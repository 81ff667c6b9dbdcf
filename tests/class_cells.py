"""Runs of classes by two processes, held to what one process learnt and answered."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from launches import launch
from mllm_cl.recipe import Recipe


def answers(folder: Path, stage: int) -> dict[str, list[str]]:
    """What was said to the images of each stage."""
    return {
        path.stem: [json.loads(line)["prediction"] for line in path.read_text().splitlines()]
        for path in sorted((folder / f"task_{stage}/predictions").glob("*.jsonl"))
    }


def run_together(engine: str, alone: Recipe, folder: Path, *, fresh: bool = False) -> Path:
    """The run, below `folder`, of two processes that take half of each batch of one; `fresh` as in
    `launch`.
    """
    tree = alone.resolved()
    half, rest = divmod(tree["training"]["per_device_train_batch_size"], 2)
    assert not rest, "two processes would see other batches"
    tree["output_dir"] = str(folder / "together")
    tree["training"] |= {"per_device_train_batch_size": half}
    path = folder / "together.yaml"
    path.write_text(yaml.safe_dump(tree))
    launch(engine, "run_script.py", str(path), fresh=fresh)
    return folder / "together"


def assert_alike(
    engine: str,
    found: Path,
    expected: Path,
    *files: str,
    stages: Sequence[int] = (1, 2, 3),
    atol: float,
    rtol: float,
    but: tuple[str, ...] = (),
) -> None:
    """The same answers in every stage, of which the engine says that it trained it; and the same
    tensors in `files` (`state`, `memory`) of the last one, all but those whose names end as told.
    """
    for stage in stages:
        manifest = json.loads((found / f"task_{stage}/manifest.json").read_text())
        assert manifest["engine"] == engine, stage
        assert answers(found, stage) == answers(expected, stage), stage
    for file in files:
        ours, theirs = (
            load_file(folder / f"task_{stages[-1]}/{file}.safetensors")
            for folder in (found, expected)
        )
        assert ours.keys() == theirs.keys()
        assert theirs, f"the run of one process has an empty {file}"
        for name in (name for name in theirs if not name.endswith(but)):
            close = {"atol": atol, "rtol": rtol, "msg": lambda told, name=name: f"{name}: {told}"}
            torch.testing.assert_close(ours[name], theirs[name], **close)
