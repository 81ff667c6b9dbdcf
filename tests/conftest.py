"""What all tests share: no network, one thread, upstream deprecations raised by our own lines are
errors.
"""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> dict[str, Path]:
    """Untrained tiny models by kind, as Hugging Face folders."""
    from mllm_cl.model.tiny import KINDS, save_tiny

    root = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(root / kind, kind, seed=0) for kind in KINDS}
