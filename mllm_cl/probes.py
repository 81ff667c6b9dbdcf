"""What a stage keeps of the tasks that it learnt, so that later ones can tell what has moved.

T tokens, N kept tokens, D model width, E experts, K kept directions.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mllm_cl import checkpoint
from mllm_cl.drift.subspace import Spectrum
from mllm_cl.memory import load_tensors, save_tensors
from mllm_cl.model.layers import State
from mllm_cl.model.probe import Sight

MARK = "probe.json"


@dataclass(frozen=True)
class Kept:
    """The probes of some tasks as they were when the tasks had just been learnt.

    `routing` holds probabilities (T, E) by `task::router`. `tensors` holds, by
    `task::kind::module`: `inputs` (N, D), `logits` (N, E), `energy` (), and the spectrum of the
    inputs. Modules that are handed the very same inputs share them: `source_of[task][module]`.
    `state` is what the model differed from its base by.
    """

    state: State
    routing: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    source_of: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, task: str, sight: Sight, num_bytes: int) -> None:
        """Keep what one task's probe met, at most `num_bytes` of it for the inputs (or 8 rows)."""
        self.source_of[task] = dict(sight.source_of)
        sources = sorted(set(sight.source_of.values()) & sight.inputs.keys())
        row_bytes = sum(2 * sight.inputs[path].shape[-1] for path in sources)
        rows = max(8, num_bytes // max(1, row_bytes))
        for path in sources:
            # bf16, since massive activations overflow fp16.
            self._put(task, "inputs", path, spread(sight.inputs[path], rows).bfloat16())
            spectrum = sight.spectra[path]
            self._put(task, "basis", path, spectrum.basis_DK.half())
            self._put(task, "eigenvalue", path, spectrum.eigenvalue_K)
            self._put(task, "trace", path, spectrum.trace)
        for path, logits_NE in sight.logits.items():
            self._put(task, "logits", path, spread(logits_NE, rows))
        for path, energy in sight.energy.items():
            self._put(task, "energy", path, torch.tensor(energy))
        for path, probability_TE in sight.routing.items():
            self.routing[f"{task}::{path}"] = probability_TE

    def _put(self, task: str, kind: str, path: str, tensor: Tensor) -> None:
        self.tensors[f"{task}::{kind}::{path}"] = tensor

    def get(self, task: str, kind: str, path: str) -> Tensor | None:
        """A kept tensor, fp32; None where there is none."""
        if kind == "inputs":
            path = self.source_of[task].get(path, path)
        tensor = self.tensors.get(f"{task}::{kind}::{path}")
        return None if tensor is None else tensor.float()

    def spectra(self, task: str) -> dict[str, Spectrum]:
        """The second moments of a task's inputs, by the module that was handed them first."""
        head = f"{task}::basis::"
        found = {}
        for key in self.tensors:
            if key.startswith(head):
                parts = (
                    self.get(task, kind, key[len(head) :])
                    for kind in ("basis", "eigenvalue", "trace")
                )
                found[key[len(head) :]] = Spectrum(*parts)
        return found

    def save(self, folder: Path) -> None:
        """Write all but the state, which the stage writes itself; `MARK` last."""
        save_tensors(self.routing, folder / "routing.safetensors")
        save_tensors(self.tensors, folder / "probe.safetensors")
        checkpoint.write_json(folder / MARK, self.source_of)

    @classmethod
    def read(cls, folder: Path) -> "Kept":
        """What a stage has kept, with its state."""
        state, routing, tensors = (
            load_tensors(folder / f"{name}.safetensors") for name in ("state", "routing", "probe")
        )
        return cls(state, routing, tensors, tasks_in(folder))


def tasks_in(folder: Path) -> dict[str, dict[str, str]]:
    """The tasks that a stage has learnt, with `source_of` each; none before it kept anything."""
    if not (folder / MARK).exists():
        return {}
    return json.loads((folder / MARK).read_text(encoding="utf-8"))


def spread(rows: Tensor, number: int) -> Tensor:
    """At most `number` rows, evenly spaced: the same of any tensor of that length."""
    number = min(number, len(rows))
    return rows[torch.linspace(0, len(rows) - 1, number).round().long()]
