"""Twenty losses that a change meant to change nothing leaves as they are, on the bases that ship.

python tests/test_golden.py     # writes tests/golden/losses.json anew: say why in the commit
"""

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from engine_script import Case, remember, train

FILE = Path(__file__).parent / "golden" / "losses.json"
CASES = [
    Case("finetune", "qwen3-vl-moe", False, 1),
    Case("moe_lora", "llava", False, 1),
    Case("same", "llava", False, 1),
    Case("same", "qwen3-vl-moe", False, 1),
]


def losses(case: Case, folder: Path) -> list[float]:
    """The losses of a second task, after the model met a first one that is to be protected."""
    from mllm_cl.model.tiny import tiny_base

    models = folder / "models"
    models.mkdir()
    (models / case.kind).symlink_to(tiny_base(case.kind))
    memory = remember(case, models, folder)
    return train(case, models, memory, folder)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_losses_are_those_on_record(case, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPECTED_ENGINE", "single")
    record = json.loads(FILE.read_text())
    expected = record["losses"][case.name]
    # 1e-4: other processors and thread counts round otherwise, and twenty steps multiply that.
    found = losses(case, tmp_path)
    assert len(found) == len(expected) == 20
    assert found == pytest.approx(expected, abs=1e-4), f"recorded with {record['versions']}"


def write() -> None:
    """Record the losses of all cases, and what they were computed with."""
    os.environ["EXPECTED_ENGINE"] = "single"
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = losses(case, Path(folder))
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"versions": versions, "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    write()
