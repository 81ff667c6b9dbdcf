"""What a method must remember between tasks: a flat dictionary of CPU tensors, one safetensors
file.
"""

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class Memory(MutableMapping[str, Tensor]):
    """A flat mapping of names to CPU tensors that survives from task to task.

    Names are paths, `same/model.layers.0.mlp.gate/moment`; `memory.under(prefix)` is the view below
    one. Nothing but tensors goes in, so nothing has to be pickled.
    """

    def __init__(self, tensors: dict[str, Tensor] | None = None) -> None:
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in (tensors or {}).items():
            self[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"memory holds tensors only, but {name!r} is a {type(tensor).__name__}"
            )
        self._tensors[name] = tensor.detach().cpu().contiguous().clone()

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensors take, in memory and (header aside) on disk."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix/`, by what follows it."""
        head = prefix.rstrip("/") + "/"
        return {name[len(head) :]: self[name] for name in self if name.startswith(head)}

    def put(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Replace everything below `prefix/` by `tensors`."""
        head = prefix.rstrip("/") + "/"
        for name in [name for name in self if name.startswith(head)]:
            del self[name]
        for name, tensor in tensors.items():
            self[head + name] = tensor

    def save(self, path: str | Path) -> None:
        """Write the tensors to `path` atomically, in the order of their names (equal memory, equal
        bytes).
        """
        save_tensors({name: self[name] for name in self}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Memory":
        """Read what `save` wrote; FileNotFoundError without it: nothing would be protected."""
        return cls(load_tensors(path))


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write a dictionary of tensors as safetensors, atomically: the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    # Views of one storage cannot be written; clones also drop whatever lay around a slice.
    whole = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    save_file(whole, str(partial))
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file into a dictionary of CPU tensors."""
    # A file's tensors lie at any offset, and matrix products round by alignment: the copies do not
    # differ.
    return {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
