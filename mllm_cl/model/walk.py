"""A walk through the modules that are live in a model, with what transformers records of each.

PEFT's wrappers are looked through, and adapters left out, PEFT's and our own.
"""

import re
from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from mllm_cl.model.moe_lora import MoELoRA


def walk(
    module: nn.Module, name: str = "", recorders: Sequence[OutputRecorder] = ()
) -> Iterator[tuple[str, nn.Module, Sequence[OutputRecorder]]]:
    """(name, module, router recorders in force) of all in `module` but adapters.

    A submodel's declaration replaces that of the model around it, as in transformers' own hooks.
    """
    if isinstance(module, PreTrainedModel):
        recorders = _router_recorders(module)
    yield name, module, recorders
    for child_name, child in _live_children(module):
        yield from walk(child, f"{name}.{child_name}" if name else child_name, recorders)


def _live_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, BaseTunerLayer):
        yield from (
            (name, child) for name, child in module.named_children() if name == "base_layer"
        )
    elif isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or not module.active_adapters:
            yield "original_module", module.original_module
        else:
            active = module.active_adapters[0]
            yield f"modules_to_save.{active}", module.modules_to_save[active]
    else:
        yield from (
            (name, child)
            for name, child in module.named_children()
            if name != "parametrizations" and not isinstance(child, MoELoRA)
        )


def _router_recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    """What `model` declares under keys that name routers: a class, a name, a recorder or a list."""
    declared = []
    for key, value in model.can_record_outputs.items():
        if "router" in key:
            declared += value if isinstance(value, (list, tuple)) else [value]
    return [_recorder(value) for value in declared]


def _recorder(value: OutputRecorder | type[nn.Module] | str) -> OutputRecorder:
    if isinstance(value, str):
        return OutputRecorder(target_class=None, class_name=value)
    return value if isinstance(value, OutputRecorder) else OutputRecorder(target_class=value)


def is_recorded(name: str, module: nn.Module, recorder: OutputRecorder) -> bool:
    """Whether transformers takes the router's logits from the module called `name`."""
    by_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    by_name = recorder.class_name is not None and f".{name}".endswith(recorder.class_name)
    place = f".{recorder.layer_name.strip('.')}." if recorder.layer_name is not None else "."
    return (by_class or by_name) and place in f".{name}."


def bare(name: str) -> str:
    """A module's name as it was before PEFT: without the names of its wrappers."""
    name = re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.|$)", "", name)
    return name.removeprefix("base_model.model.")
