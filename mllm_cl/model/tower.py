"""The vision tower takes part in every forward, also where a batch has no picture.

Processes that train together have to use the same parameters: with a text-only batch on one of them
DDP waits for gradients that never come, and ZeRO-3 and FSDP2 for weights that nobody else gathers.
B batch, T tokens, D model width.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mllm_cl import engine


@runtime_checkable
class Sees(Protocol):
    """What the vision-language models of transformers have in common."""

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any: ...


class GuardPicture:
    """Shows a model one picture wherever a forward has none; what it sees goes nowhere.

    Right after the token embedding, where models look at pictures, the features of the picture are
    scattered into none of the tokens. The hidden states keep every bit, and the tower gets the
    gradient zero, as from a picture that does not matter: an image in the text itself would move
    tokens and round all others differently. Hooks on the model and its embedding do it, inside the
    engine's wrappers and in the order of a batch with pictures, which ZeRO-3 goes by.
    A lone process that computes no gradients needs none of this and is left alone, and so are the
    steps of generation after the first.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.inputs = model, dict(inputs)
        self.shown = False
        self._hook: RemovableHandle | None = None
        model.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen = [key for key in kwargs if key.startswith("pixel_values") and kwargs[key] is not None]
        cache = kwargs.get("past_key_values")
        goes_on = cache is not None and cache.get_seq_length() > 0
        needed = torch.is_grad_enabled() or engine.world_size() > 1
        self._withdraw()
        if needed and not seen and not goes_on:
            # Anew each time, to come after the engine's own hooks: ZeRO-3 would otherwise fetch the
            # embedding before the tower in the backward, and after it where there are pictures.
            embedding = self.model.get_input_embeddings()
            self._hook = embedding.register_forward_hook(self._look)

    def _withdraw(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, embedding: nn.Module, args: tuple, embedded_BTD: Tensor) -> Tensor:
        self._withdraw()
        self.shown = True
        try:
            output = self._seen(embedded_BTD.device)
        finally:
            self.shown = False
        if "pooler_output" not in output:  # Llama 4 projects them elsewhere, out of our reach
            if engine.world_size() == 1:
                return embedded_BTD
            raise ValueError(
                f"{type(self.model).__name__} does not give its finished image features, so "
                "several processes cannot train on a batch without a picture. Use data with a "
                "picture in every row, or one process."
            )
        nowhere_BTD = torch.zeros_like(embedded_BTD, dtype=torch.bool)
        for feature in (output["pooler_output"], output.get("deepstack_features")):
            for part in _tensors(feature):
                if part.requires_grad:
                    part = part.to(embedded_BTD.dtype)
                    embedded_BTD = embedded_BTD.masked_scatter(nowhere_BTD, part)
        return embedded_BTD

    def _seen(self, device: torch.device) -> Mapping[str, Any]:
        """The tower's output; empty where it is to be told what of it to select (older Llama 4)."""
        known = inspect.signature(self.model.get_image_features).parameters.values()
        asked = [one for one in known if one.kind is one.POSITIONAL_OR_KEYWORD]
        if {one.name for one in asked if one.default is one.empty} - self.inputs.keys():
            return {}
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        return self.model.get_image_features(**inputs, return_dict=True)


def show_guard_picture(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Let the vision tower of `model` look at `inputs` wherever a batch has no picture; once.

    `inputs` is what the processor makes of a picture. Nothing happens to a model without a tower.
    """
    wholes = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    whole = next(wholes, None)
    if inputs and isinstance(whole, Sees) and guard_picture(model) is None:
        whole._guard_picture = GuardPicture(whole, inputs)


def guard_picture(model: nn.Module) -> GuardPicture | None:
    """The guard picture of a model, if it has one."""
    found = (vars(module).get("_guard_picture") for module in model.modules())
    return next((one for one in found if one is not None), None)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for each in value or () for part in _tensors(each)]
