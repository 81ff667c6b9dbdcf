"""From a recipe's `model:` block to an encoder: pictures in, one feature vector for each out.

B batch, C classes, D feature width, H height, W width, L text length.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_timm_available

from mllm_cl import engine
from mllm_cl.model.blocks import Anatomy, resolve
from mllm_cl.model.load import ModelSettings, found_at, hub_options, location, with_adapter


class Encoder(nn.Module):
    """A backbone of transformers and which of its outputs is the feature: `encoder(pixel_values)`.

    Features are as they come, not normalised: `width` numbers for a picture. ViT and DINOv2 give
    the class token after the last LayerNorm, CLIP what its projection and SigLIP what its pooling
    makes of a picture, a CLIP vision tower alone its class token, ResNet and timm the pooled map.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.family = family(backbone.config.model_type)
        _give_dimensions(backbone)
        self.width = self.joint_width = self.family.width(backbone)
        self.projected = True
        # The features that stand side by side in an answer, with the names of what was put in for
        # each of them alone; and which of them are given.
        self.parts: dict[str, tuple[str, ...]] = {"": ()}
        self.shown: tuple[str, ...] = ("",)
        self.batchwise = False  # whether what a picture is given depends on others of its batch

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """The features (B, D)."""
        answer = self.family.features if self.projected else self.family.tower
        return answer(self.backbone, pixel_values_BCHW)

    def unproject(self) -> Tensor:
        """Answer from here on with what the vision tower makes of a picture, (B, V), and return the
        projection (D, V) from there to where texts are, in fp32; for SigLIP, which has none, I.

        ValueError where there is no such place.
        """
        if not self.family.reads:
            raise ValueError(
                f"{type(self.backbone).__name__} has no text tower, so nothing is projected to "
                "where texts are: choose a CLIP or SigLIP model"
            )
        if not self.family.projection:
            return torch.eye(self.width)
        weight_DV = self.backbone.get_submodule(self.family.projection).weight
        self.projected, self.width = False, weight_DV.shape[1]
        self.joint_width = self.width
        return weight_DV.detach().float().clone()

    def text(self, input_ids_CL: Tensor, attention_mask_CL: Tensor | None = None) -> Tensor:
        """The features (C, D) of texts, where the model reads them. ValueError where it does not.

        SigLIP learnt from texts padded to their full length and without a mask: give it none.
        """
        if not self.family.reads:
            raise ValueError(
                f"{type(self.backbone).__name__} has no text tower, so there are no features of "
                "class names: choose a CLIP or SigLIP model"
            )
        output = self.backbone.get_text_features(
            input_ids=input_ids_CL, attention_mask=attention_mask_CL
        )
        return output.pooler_output

    @property
    def sight(self) -> dict[str, nn.Parameter]:
        """The parameters that features of pictures depend on, by name: all but a text tower's and
        the token that stands for patches that are hidden.
        """
        seeing = {id(one) for module in self.seeing for one in module.parameters()}
        return {
            name: one
            for name, one in self.backbone.named_parameters()
            if id(one) in seeing and not name.endswith("mask_token")
        }

    @property
    def towers(self) -> list[nn.Parameter]:
        """The parameters of both towers and their projections, where there are two."""
        return [one for part in self.backbone.children() for one in part.parameters()]

    @property
    def seeing(self) -> list[nn.Module]:
        """What pictures pass through: the backbone, or its tower and projection beside those of
        texts.
        """
        if not self.family.reads:
            return [self.backbone]
        parts = self.backbone.named_children()
        return [part for name, part in parts if not name.startswith("text_")]

    @property
    def steady(self) -> bool:
        """Whether a picture has the same features whenever it trains: nothing that they depend on
        moves, and nothing is dropped at random.
        """
        seen = {id(one) for one in self.sight.values()}
        blind = {id(one) for one in self.backbone.parameters()} - seen
        moves = any(one.requires_grad and id(one) not in blind for one in self.parameters())
        return not moves and not any(map(_drops, self.modules()))

    @property
    def joint(self) -> bool:
        """Whether features of pictures can be compared with those of texts: CLIP's and SigLIP's
        own, also before the projection, can.
        """
        return self.family.reads and self.width == self.joint_width

    @contextmanager
    def showing(self, parts: Iterable[str]) -> Iterator[None]:
        """Inside, an answer has these of its parts alone."""
        before, self.shown = self.shown, tuple(parts)
        try:
            yield
        finally:
            self.shown = before

    def weights_of(self, part: str | None, *, reading: bool = False) -> dict[str, Tensor]:
        """The parameters and buffers that are a part's own, None: those that all parts share;
        without those of a text tower, which pictures do not pass through. `reading`: of texts.
        """
        owners = {name: owner for owner, names in self.parts.items() for name in names}
        blind = ("backbone.text_", "backbone.logit_") if self.family.reads else ()
        if not self.projected:
            blind += (f"backbone.{self.family.projection}.",)
        return {
            name: value
            for name, value in chain(self.named_parameters(), self.named_buffers())
            if (name.startswith("backbone.text_") if reading else not name.startswith(blind))
            and next((owners[one] for one in name.split(".") if one in owners), None) == part
        }

    @property
    def anatomy(self) -> Anatomy:
        """The names, in `backbone`, of what adapters and prompts are put at."""
        return resolve(self.backbone)


def _drops(module: nn.Module) -> bool:
    """Whether a module drops at random: as a layer of its own, or as a rate that it keeps.

    Families call it dropout, dropout_prob, drop_prob ...: there is no other sign of it.
    """
    rates = [value for name, value in vars(module).items() if "drop" in name]
    rates += [module.p] if isinstance(module, _DropoutNd) else []
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _give_dimensions(backbone: nn.Module) -> None:
    """Make vectors of the numbers among a model's parameters (CLIP's `logit_scale`), which FSDP2
    does not take; what is saved has the shape that transformers reads.
    """
    names = [name for name, one in backbone.named_parameters(recurse=False) if one.dim() == 0]
    for name in names:
        number = backbone._parameters[name]
        backbone._parameters[name] = nn.Parameter(
            number.detach().reshape(1), requires_grad=number.requires_grad
        )

    def as_saved(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        for name in names:
            value = state[prefix + name]
            if type(value) in (Tensor, nn.Parameter):  # and no shard of one
                state[prefix + name] = value.reshape(())

    if names:
        backbone.register_state_dict_post_hook(as_saved)


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` see: their class, and which of their outputs is meant.

    `reads`: they have a text tower, too, whose texts are `padded` to their full length or not.
    `projection`: the linear after the `tower`, from which features come.
    """

    backbone: type[PreTrainedModel]
    features: Callable[[PreTrainedModel, Tensor], Tensor]
    width: Callable[[PreTrainedModel], int]
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: bool = False
    padded: bool = False
    projection: str = ""
    tower: Callable[[PreTrainedModel, Tensor], Tensor] | None = None


def family(model_type: str) -> Family:
    """How models of this type see. ValueError for a type that is not known."""
    known = _families()
    if model_type not in known:
        raise ValueError(
            f"no encoder is known for models of type {model_type!r}. Expected 'model_type' in the "
            f"config to be one of {', '.join(sorted(known))}; a language model that sees pictures "
            "belongs into an instruction recipe."
        )
    return known[model_type]


def _families() -> dict[str, Family]:
    # Each of these imports its modelling file when it is named, so not with this file.
    from transformers import (
        CLIPModel,
        CLIPVisionModel,
        Dinov2Model,
        ResNetModel,
        SiglipModel,
        SiglipVisionModel,
        TimmWrapperModel,
        ViTModel,
    )

    # The pooler (a dense layer and tanh) is no part of any method here: without it a ViT-B/16 has
    # the 85,798,656 parameters of the papers.
    plain = {"add_pooling_layer": False}
    return {
        "vit": Family(ViTModel, _class_token, _hidden, plain),
        "dinov2": Family(Dinov2Model, _class_token, _hidden),
        "clip": Family(
            CLIPModel,
            _joint,
            lambda model: model.config.projection_dim,
            reads=True,
            projection="visual_projection",
            tower=lambda model, pixels: _pooled(model.vision_model, pixels),
        ),
        "clip_vision_model": Family(CLIPVisionModel, _pooled, _hidden),
        "siglip": Family(
            SiglipModel,
            _joint,
            lambda model: model.config.vision_config.hidden_size,
            reads=True,
            padded=True,
        ),
        "siglip_vision_model": Family(SiglipVisionModel, _pooled, _hidden),
        "resnet": Family(ResNetModel, _convolved, lambda model: model.config.hidden_sizes[-1]),
        "timm_wrapper": Family(
            TimmWrapperModel, _pooled, lambda model: model.timm_model.head_hidden_size
        ),
    }


def _hidden(backbone: PreTrainedModel) -> int:
    return backbone.config.hidden_size


def _class_token(backbone: PreTrainedModel, pixel_values_BCHW: Tensor) -> Tensor:
    return backbone(pixel_values=pixel_values_BCHW).last_hidden_state[:, 0]


def _pooled(backbone: PreTrainedModel, pixel_values_BCHW: Tensor) -> Tensor:
    return backbone(pixel_values=pixel_values_BCHW).pooler_output.flatten(1)


def _convolved(backbone: PreTrainedModel, pixel_values_BCHW: Tensor) -> Tensor:
    """Of a ResNet, which alone takes pictures as they come; what trains may be kept in fp32."""
    dtype = backbone.embedder.embedder.normalization.running_mean.dtype
    narrow = dtype.itemsize < 4  # else FSDP2 may have made them so on purpose
    return _pooled(backbone, pixel_values_BCHW.to(dtype) if narrow else pixel_values_BCHW)


def _joint(backbone: PreTrainedModel, pixel_values_BCHW: Tensor) -> Tensor:
    """Where pictures and texts meet: CLIP's projection, SigLIP's attention pooling."""
    return backbone.get_image_features(pixel_values=pixel_values_BCHW).pooler_output


def load_encoder(settings: ModelSettings) -> Encoder:
    """The encoder with its weights, by `from_pretrained` on any hub id or folder, in eval mode.

    Its class comes from the config's `model_type`. A PEFT adapter joins the weights, as in
    `load_model`. Raises ValueError for a type that is not known, for a timm checkpoint where timm
    is not installed, and for four bits, which encoders are not kept in.
    """
    where, options = location(settings.model_name_or_path), hub_options(settings)
    if settings.load_in_4bit:
        raise ValueError("encoders are not kept in four bits: leave out load_in_4bit")
    kind = _family(settings)
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    options |= {"dtype": dtype, **kind.options}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    adapter = settings.adapter_name_or_path
    with engine.unsharded_loading() if adapter is not None else nullcontext(), found_at(where):
        backbone = kind.backbone.from_pretrained(where, **options)
        if adapter is not None:
            backbone = with_adapter(backbone, adapter)
    return Encoder(backbone).eval()


def empty_encoder(settings: ModelSettings) -> Encoder:
    """The encoder on the meta device: every shape, no weights; only its config is read."""
    where, kind = location(settings.model_name_or_path), _family(settings)
    with found_at(where):
        config = kind.backbone.config_class.from_pretrained(where, **hub_options(settings))
    with torch.device("meta"):
        return Encoder(kind.backbone(config, **kind.options))


def described(settings: ModelSettings) -> dict[str, Any]:
    """What the model's config says, which is all that is read of it. ValueError without any."""
    where = location(settings.model_name_or_path)
    with found_at(where):
        found, _ = PreTrainedConfig.get_config_dict(where, **hub_options(settings))
    if "model_type" not in found:
        raise ValueError(f"{where} has no config.json that names a 'model_type': no model is there")
    return found


def _family(settings: ModelSettings) -> Family:
    """The family that the config names: timm's own needs timm."""
    name = described(settings)["model_type"]
    kind = family(name)
    if name == "timm_wrapper" and not is_timm_available():
        where = location(settings.model_name_or_path)
        raise ValueError(f"{where} is a timm checkpoint, which needs timm: pip install timm")
    return kind
