"""The mathematics of drift: second moments, subspaces, guards and measures; imports only torch."""

from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.drift.guard import DriftGuard, guarded_gradient
from mllm_cl.drift.subspace import Spectrum, spectrum

__all__ = ["CovarianceTracker", "DriftGuard", "Spectrum", "guarded_gradient", "spectrum"]
