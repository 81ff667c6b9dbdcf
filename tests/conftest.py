"""What all tests share: no network, one thread, upstream deprecations raised by our own lines are
errors.
"""

import gc
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """What was imported stays: every stage of a run collects garbage, and would look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> dict[str, Path]:
    """Untrained tiny models by kind, as Hugging Face folders."""
    from mllm_cl.model.tiny import KINDS, save_tiny

    root = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(root / kind, kind, seed=0) for kind in KINDS}
