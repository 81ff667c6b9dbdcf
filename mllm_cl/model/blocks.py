"""Where the parts of a vision transformer are: the names that adapters and prompts are put at.

Read from classes, shapes and the order of registration rather than from a table of families: ViT,
DINOv2 and the vision towers of CLIP and SigLIP differ in names only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from mllm_cl import engine

# The only parts that nothing but their name tells apart. The longer are older.
_PROJECTIONS = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")


@dataclass(frozen=True)
class Block:
    """The names of one block and of its parts, as `backbone.get_submodule` takes them.

    `branch` is the last module of the MLP's branch before the residual stream takes it up: the MLP
    itself, or the layer scale after it.
    """

    name: str
    ln1: str
    q: str
    k: str
    v: str
    o: str
    ln2: str
    fc1: str
    fc2: str
    branch: str

    @property
    def attention(self) -> str:
        """The name of what holds both `q` and `o`, which older attentions keep apart."""
        pairs = zip(self.q.split("."), self.o.split("."), strict=False)
        return ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class Anatomy:
    """The names of a vision transformer's parts; `norm` is the LayerNorm after the last block."""

    patches: str
    embeddings: str
    blocks: tuple[Block, ...]
    norm: str
    width: int


def resolve(backbone: nn.Module) -> Anatomy:
    """The parts of the vision transformer in `backbone`, which may hold a text tower beside it.

    Raises ValueError where a part is missing or allows two readings, with what was looked for.
    """
    patches = _patches(backbone)
    tower, blocks = _tower(backbone, patches)
    width = engine.shape(backbone.get_submodule(patches).weight)[0]
    own = dict(backbone.get_submodule(tower).named_children())
    after = list(own)[list(own).index(_below(tower, blocks[0]).partition(".")[0]) :]
    norms = [name for name in after if isinstance(own[name], nn.LayerNorm)]
    if not norms:
        raise _missing(backbone, "a LayerNorm after the last block", list(own))
    embeddings = _below(tower, patches).partition(".")[0]
    return Anatomy(
        patches=patches,
        embeddings=_join(tower, embeddings),
        blocks=tuple(_block(backbone, name) for name in blocks),
        norm=_join(tower, norms[-1]),
        width=width,
    )


def _patches(backbone: nn.Module) -> str:
    """The convolution that cuts a picture into patches: its stride is its kernel."""
    found = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1)
    ]
    if len(found) != 1:
        raise _missing(backbone, "one convolution whose stride is its kernel", found)
    return found[0]


def _tower(backbone: nn.Module, patches: str) -> tuple[str, list[str]]:
    """The smallest module around the patches that holds blocks, and the names of these."""
    for tower in _around(patches):
        stacks = [
            _join(tower, name)
            for name, module in backbone.get_submodule(tower).named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and _is_block(module[0])
        ]
        if len(stacks) > 1:
            raise _missing(backbone, "one list of transformer blocks", stacks)
        if stacks:
            count = len(backbone.get_submodule(stacks[0]))
            return tower, [f"{stacks[0]}.{index}" for index in range(count)]
    raise _missing(backbone, "a ModuleList of blocks with two LayerNorms and six linears each", [])


def _around(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_block(module: nn.Module) -> bool:
    return len(_norms(module)) == 2 and len(_linears(module)) >= 6


def _norms(block: nn.Module) -> list[str]:
    return [name for name, child in block.named_children() if isinstance(child, nn.LayerNorm)]


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}


def _block(backbone: nn.Module, name: str) -> Block:
    block = backbone.get_submodule(name)
    ln1, ln2 = _norms(block)
    found = _linears(block)
    q, k, v = (_called(backbone, name, found, *words) for words in _PROJECTIONS)
    attention = q.partition(".")[0]
    others = [one for one in found if one.startswith(f"{attention}.") and one not in (q, k, v)]
    rest = [one for one in found if not one.startswith(f"{attention}.")]
    if len(others) != 1 or len(rest) != 2:
        raise _missing(
            backbone,
            f"one output projection and a plain MLP of two linears in {name}",
            [*others, *rest],
        )
    mlp = rest[0].rpartition(".")[0]
    parts = (ln1, q, k, v, others[0], ln2, *rest, _last(block, mlp))
    return Block(name, *(f"{name}.{part}" for part in parts))


def _called(backbone: nn.Module, block: str, found: dict[str, nn.Linear], *words: str) -> str:
    named = [name for name in found if name.rpartition(".")[2] in words]
    if len(named) != 1:
        wanted = f"one linear called {' or '.join(words)} in {block}"
        raise _missing(backbone, wanted, list(found))
    return named[0]


def _last(block: nn.Module, mlp: str) -> str:
    """The layer scale that follows the MLP: one vector as long as the block is wide; or the MLP."""
    children = list(block.named_children())
    names = [name for name, _ in children]
    for name, child in children[names.index(mlp) + 1 :]:
        own = list(child.parameters(recurse=False))  # what was put beside it is not its own
        if len(own) == 1 and not isinstance(child, nn.LayerNorm) and own[0].dim() == 1:
            return name
    return mlp


def _below(tower: str, name: str) -> str:
    return name.removeprefix(f"{tower}.") if tower else name


def _join(tower: str, name: str) -> str:
    return f"{tower}.{name}" if tower and name else tower or name


def _missing(backbone: nn.Module, wanted: str, found: list[str]) -> ValueError:
    return ValueError(
        f"adapters and prompts do not know the parts of {type(backbone).__name__}: looked for "
        f"{wanted}, found {', '.join(found[:8]) or 'none'}. ViT, DINOv2 and the vision towers of "
        "CLIP and SigLIP have all of them."
    )
