"""A file that work in rounds leaves behind while it goes on, so that it can go on after a kill."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mllm_cl import engine

JSON = engine.JSON


def unfinished(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of all names, kinds and bytes: what tells one trained model from another."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Progress:
    """The rounds that are done, a line each: a digest of `made_by` and the round, then the round.

    `made_by` names everything that the rounds depend on. A line that was torn, changed, or made by
    something else does not have its digest: it and whatever follows are dropped.
    """

    path: Path
    made_by: str

    def read(self) -> list[JSON]:
        """The rounds that are done, the same on every rank; cuts off what is not. Collective."""
        rounds: list[JSON] = []
        if engine.rank() == 0 and self.path.exists():
            with open(self.path, "rb+") as file:
                whole = 0
                for line in file:
                    digest, _, text = line.partition(b" ")
                    if digest != self._digest(len(rounds), text):
                        break
                    rounds.append(json.loads(text))
                    whole += len(line)
                file.truncate(whole)
        return engine.gather(rounds)

    def append(self, number: int, done: JSON) -> None:
        """Add the round of that number, counted from 0."""
        if engine.rank() == 0:
            text = json.dumps(done).encode() + b"\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(self._digest(number, text) + b" " + text)

    def _digest(self, number: int, text: bytes) -> bytes:
        head = f"{self.made_by} {number} ".encode()
        return hashlib.sha256(head + text).hexdigest()[:16].encode()
