"""Tiny random backbones of every encoder that is known, for tests: `backbone(model_type)`.

Sizes differ (width 24, feed-forward 40, projection 20), so that a transposed or mistaken weight
does not pass for the right one. Biases and norms are away from where they start.
"""

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

SIDE, WIDTH, BLOCKS = 16, 24, 3
_TOWER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
_VISION = {**_TOWER, "image_size": SIDE, "patch_size": 8}
_TEXT = {**_TOWER, "hidden_size": 16, "vocab_size": 32, "max_position_embeddings": 7}
_DINO = {key: value for key, value in _VISION.items() if key != "intermediate_size"}


def backbone(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model of that type in eval mode."""
    torch.manual_seed(seed)
    model = _make(model_type).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _make(model_type: str) -> PreTrainedModel:
    match model_type:
        case "vit":
            return ViTModel(ViTConfig(**_VISION), add_pooling_layer=False)
        case "dinov2":
            return Dinov2Model(Dinov2Config(**_DINO, mlp_ratio=2))
        case "clip":
            return CLIPModel(
                CLIPConfig(
                    text_config={**_TEXT, "eos_token_id": 31, "projection_dim": 20},
                    vision_config={**_VISION, "projection_dim": 20},
                    projection_dim=20,
                )
            )
        case "clip_vision_model":
            return CLIPVisionModel(CLIPVisionConfig(**_VISION))
        case "siglip":
            text = {**_TEXT, "projection_size": WIDTH}
            return SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
        case "siglip_vision_model":
            return SiglipVisionModel(SiglipVisionConfig(**_VISION))
        case "resnet":
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
            return ResNetModel(ResNetConfig(**sizes, layer_type="basic"))
    raise ValueError(f"there is no tiny {model_type}")


TYPES = ("vit", "dinov2", "clip", "clip_vision_model", "siglip", "siglip_vision_model", "resnet")
TRANSFORMERS = TYPES[:-1]


def pictures(count: int = 3, *, seed: int = 1) -> Tensor:
    """Pixel values (count, 3, SIDE, SIDE)."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def vit_b16() -> ViTModel:
    """A ViT-B/16 on the meta device."""
    with torch.device("meta"):
        return ViTModel(ViTConfig(), add_pooling_layer=False)
