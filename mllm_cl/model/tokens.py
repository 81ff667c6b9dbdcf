"""Which of a batch's tokens a module is handed, so that padding counts nowhere.

B batch, T all tokens of a batch, N rows that a module is handed, D width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mllm_cl.model.linears import vision_names


class Tokens:
    """Follows a batch's attention mask from the model's door to its modules, by hooks.

    Nearly all modules of a decoder are handed every token, flattened or not. A block that shares
    tokens out, text here and images there, hands its `routers` and experts some: a row is found
    again among the rows that entered the block, of which it is a copy. An image encoder's patches
    are no tokens, even where there are as many. `close()` removes the hooks.
    """

    def __init__(self, model: nn.Module, routers: Iterable[str] = ()) -> None:
        self._outside = vision_names(model)
        self._blocks = {block for path in routers for block in _around(path)}
        self.mask: Tensor | None = None  # (T,), True where a token is no padding
        self._entered: dict[str, Tensor] = {}
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for block in self._blocks:
            module = model.get_submodule(block)
            self._handles += [
                module.register_forward_pre_hook(self._enter_block(block), with_kwargs=True),
                module.register_forward_hook(self._leave_block(block), always_call=True),
            ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def index_of(self, path: str, input_ND: Tensor) -> Tensor | None:
        """Which of the batch's T tokens the rows handed to `path` are (N,), None if not known:
        without a mask, for patches, and for whatever brings its own number of rows.
        """
        if self.mask is None or path in self._outside:
            return None
        num_rows = input_ND.shape[:-1].numel()
        if num_rows == self.mask.numel():
            return torch.arange(num_rows, device=input_ND.device)
        for block in _around(path):
            entered_TD = self._entered.get(block)
            if entered_TD is not None and num_rows:
                return _copies(input_ND.reshape(-1, input_ND.shape[-1]), entered_TD)
        return None

    def mask_of(self, path: str, input_ND: Tensor) -> Tensor | None:
        """Which rows handed to `path` are no padding: bool (N,), None where no mask tells.

        Raises ValueError for rows in a block that shares tokens out by other means.
        """
        if self.mask is not None and self.mask.numel() == input_ND.shape[:-1].numel():
            return None if path in self._outside else self.mask
        index_N = self.index_of(path, input_ND)
        if index_N is not None:
            return self.mask.to(index_N.device)[index_N]
        shared = input_ND.numel() and self._blocks.intersection(_around(path))
        if shared and self.mask is not None and not self.mask.all():
            raise ValueError(
                f"{path} is handed {input_ND.shape[:-1].numel()} rows of a batch of "
                f"{self.mask.numel()} tokens, and which of them are padding is not known. Train "
                "on batches without padding (per_device_train_batch_size 1), or leave the experts "
                "and routers of this model alone."
            )
        return None

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        mask_BT = kwargs.get("attention_mask")
        known = mask_BT is not None and mask_BT.dim() == 2
        self.mask = mask_BT.reshape(-1).bool() if known else None

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        self.mask = None
        self._entered.clear()

    def _enter_block(self, block: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for value in (*args, *kwargs.values()):
                is_hidden = torch.is_tensor(value) and value.is_floating_point()
                if is_hidden and self.mask is not None:
                    if value.shape[:-1].numel() == self.mask.numel():
                        self._entered[block] = value.detach().reshape(-1, value.shape[-1])
                    return

        return hook

    def _leave_block(self, block: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            # Or the inputs of all layers would be alive at once.
            self._entered.pop(block, None)

        return hook


def _around(path: str) -> list[str]:
    """The names of the blocks around a module, innermost first, within its layer."""
    found = []
    while (path := path.rpartition(".")[0]) and not path.rpartition(".")[2].isdigit():
        found.append(path)
    return found


def _copies(row_ND: Tensor, token_TD: Tensor) -> Tensor | None:
    """For each row the index of the token that it is a copy of, bit by bit; None: some is none.

    Equal tokens stand for one another: what is the same for a model counts the same.
    """
    if row_ND.shape[-1] != token_TD.shape[-1] or row_ND.dtype != token_TD.dtype:
        return None
    hash_T, hash_N = _hashed(token_TD), _hashed(row_ND.detach())
    _, kind = torch.cat([hash_T, hash_N]).unique(return_inverse=True)
    order_T = torch.arange(len(hash_T), device=kind.device)
    first = torch.full_like(kind, -1)
    first.scatter_reduce_(0, kind[: len(hash_T)], order_T, "amin", include_self=False)
    index_N = first[kind[len(hash_T) :]]
    return None if bool((index_N < 0).any()) else index_N


def _hashed(row_ND: Tensor) -> Tensor:
    """The bits of each row as one number, int64; equal for unequal rows once in 2^64."""
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[row_ND.dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    factor_D = torch.randint(least, most, (row_ND.shape[-1],), generator=generator)
    bits_ND = row_ND.contiguous().view(dtype).long()
    return (bits_ND * factor_D.to(row_ND.device)).sum(-1)  # overflow wraps around
