"""From a recipe's `model:` block to a model and its processor."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from mllm_cl import engine
from mllm_cl.model import four_bit

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ASSETS = Path(__file__).parent.parent / "assets"


class ModelSettings(Protocol):
    """What loading reads, in the names of TRL's `ModelConfig` where that has one."""

    model_name_or_path: str
    model_revision: str | None
    adapter_name_or_path: str | None
    dtype: str
    attn_implementation: str | None
    trust_remote_code: bool
    load_in_4bit: bool | None
    bnb_4bit_quant_type: str | None
    use_bnb_nested_quant: bool | None
    unquantised: tuple[str, ...] | None


def location(name: str) -> str:
    """The folder or hub id behind a name: `toy:KIND` is a small model of the package's own."""
    if not name.startswith("toy:"):
        return name
    folder = ASSETS / f"tiny-{name.removeprefix('toy:').replace('_', '-')}"
    if not folder.is_dir():
        known = ", ".join(
            f"toy:{path.name.removeprefix('tiny-').replace('-', '_')}"
            for path in sorted(ASSETS.glob("tiny-*"))
        )
        raise ValueError(f"there is no {name}; the package has {known}")
    return str(folder)


def load_model(settings: ModelSettings) -> nn.Module:
    """The model with its weights, by `from_pretrained` on any hub id or folder.

    Vision-language models open as such, text-only ones as causal language models. An adapter joins
    the weights: what it knows is then part of the base. In four bits, linears and experts are
    packed on the way (`four_bit`); frozen, they are made again from the base with every load.
    """
    where, common = location(settings.model_name_or_path), hub_options(settings)
    config, auto = _config(settings)
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    kwargs: dict[str, Any] = {"dtype": dtype, **common}
    if settings.attn_implementation is not None:
        kwargs["attn_implementation"] = settings.attn_implementation
    if settings.load_in_4bit:
        kwargs |= _packing(settings)
    adapter = settings.adapter_name_or_path
    whole = adapter is not None or _transposes(config.model_type)
    with engine.unsharded_loading() if whole else nullcontext():
        model = auto.from_pretrained(where, **kwargs)
        if adapter is not None:
            model = with_adapter(model, adapter)
    if settings.load_in_4bit:
        four_bit.pack_experts(model, settings)
        # The Trainer refuses packed weights beside which it sees no PeftModel. Ours have adapters.
        model.is_quantized = False
    model.config.use_cache = False
    return model


def _packing(settings: ModelSettings) -> dict[str, Any]:
    """The arguments of `from_pretrained` by which linears are packed as they load."""
    empty = empty_model(settings)
    # Into the host's memory first, as a model that is not packed: its experts, which only then are
    # packed, may be more than the device holds. The Trainer moves it.
    whole = next(p.dtype for p in empty.parameters() if p.is_floating_point())
    return {
        "quantization_config": four_bit.config(settings, empty, whole),
        "device_map": {"": "cpu"},
    }


def with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """The model with a PEFT adapter merged into its weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{adapter} is no PEFT adapter of this model: {error}") from error


def empty_model(settings: ModelSettings) -> nn.Module:
    """The model on the meta device: every shape, no weights; only its config is read."""
    config, auto = _config(settings)
    dtype = config.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)


def _config(settings: ModelSettings):
    """The config, and the class that opens such models."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    where = location(settings.model_name_or_path)
    with found_at(where):
        config = AutoConfig.from_pretrained(where, **hub_options(settings))
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return config, AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _transposes(model_type: str) -> bool:
    """Whether the family's checkpoints are turned by their shape as they load (Qwen3-VL-MoE's
    experts).

    Under ZeRO-3 every parameter has shape (0,) at that moment, so transformers 5.23 leaves them as
    they are and fails; such a model is loaded whole and sharded afterwards.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    converters = get_checkpoint_conversion_mapping(model_type) or []
    operations = [
        op for one in converters if isinstance(one, WeightConverter) for op in one.operations
    ]
    return any(isinstance(op, Transpose) and op.check_dims for op in operations)


def load_processor(settings: ModelSettings):
    """The processor (or, for text-only models, the tokenizer) that belongs to the model."""
    from transformers import AutoProcessor

    where, common = location(settings.model_name_or_path), hub_options(settings)
    try:
        with found_at(where):
            return AutoProcessor.from_pretrained(where, **common)
    except ImportError:
        processor = _assembled(where, common)
        if processor is None:
            raise
        return processor


@contextmanager
def found_at(where: str) -> Iterator[None]:
    """ValueError in the place of the many errors of a model that is not there."""
    try:
        yield
    except OSError as error:
        told = str(error).splitlines()[0]
        problem = f"{where} is no folder of a model, and the hub does not give one: {told}"
        raise ValueError(problem) from error


def _assembled(where: str, common: dict[str, Any]) -> "ProcessorMixin | None":
    """The processor put together from its picture and its text part; None if it has other parts.

    A class that names its picture part "AutoImageProcessor" does not open without torchvision in
    transformers 5.17, which takes that name for one of torchvision's; its module knows better.
    """
    from transformers import AutoTokenizer, ProcessorMixin
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import processor_class_from_name

    described, _ = ProcessorMixin.get_processor_dict(where, **common)
    cls = processor_class_from_name(described.get("processor_class", ""))
    if cls is None or cls.get_attributes() != ["image_processor", "tokenizer"]:
        return None
    parts = [auto.from_pretrained(where, **common) for auto in (AutoImageProcessor, AutoTokenizer)]
    return cls.from_args_and_dict(parts, described)


def hub_options(settings: ModelSettings) -> dict[str, Any]:
    """What `from_pretrained` is told of the hub, whatever it loads."""
    return {"revision": settings.model_revision, "trust_remote_code": settings.trust_remote_code}
