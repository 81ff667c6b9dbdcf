"""Continual fine-tuning of multimodal language models, on stock Hugging Face libraries."""

from importlib import import_module

__version__ = "0.1.0"

# Public names and where they live; each is imported when it is first used, so `import mllm_cl` is
# quick.
_HOME = {
    "CovarianceTracker": "mllm_cl.drift.covariance",
    "DriftGuard": "mllm_cl.drift.guard",
    "Memory": "mllm_cl.memory",
    "Method": "mllm_cl.method",
    "Recipe": "mllm_cl.recipe",
    "Task": "mllm_cl.task",
    "TaskSequence": "mllm_cl.task",
    "classifier": "mllm_cl.classify",
    "continual": "mllm_cl.trainer",
    "fold": "mllm_cl.model.surgery",
    "guard": "mllm_cl.model.surgery",
    "learning": "mllm_cl.trainer",
    "load_method": "mllm_cl.method",
    "routers": "mllm_cl.model.anatomy",
    "run": "mllm_cl.runner",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mllm_cl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
