"""A CLIP of open_clip's as transformers' `CLIPModel`: names, shapes and activation.

open_clip keeps q, k and v in one matrix and multiplies with its projections from the right; all
else differs in names. Its ViT-B-16 of LAION-400M (`laion400m_e32`) has exact GELU; OpenAI's own
weights have the quick one.

    open_clip                                     transformers
    visual.conv1, visual.class_embedding          vision_model.embeddings.patch_embedding, ...
    visual.positional_embedding                   vision_model.embeddings.position_embedding
    visual.ln_pre, visual.ln_post                 vision_model.pre_layrnorm, post_layernorm
    visual.proj (D, P)                            visual_projection (P, D)
    token_embedding, positional_embedding         text_model.embeddings.token_embedding, ...
    ln_final                                      text_model.final_layer_norm
    text_projection (D, P)                        text_projection (P, D)
    logit_scale                                   logit_scale
    visual.transformer.resblocks.i                vision_model.encoder.layers.i
    transformer.resblocks.i                       text_model.encoder.layers.i
      ln_1, ln_2                                    layer_norm1, layer_norm2
      attn.in_proj_weight (3D, D), its bias         self_attn.{q,k,v}_proj (D, D)
      attn.out_proj, mlp.c_fc, mlp.c_proj           self_attn.out_proj, mlp.fc1, mlp.fc2
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IGNORED = {"attn_mask"}  # made anew by transformers, a buffer of old checkpoints


def clip_model(
    tensors: Mapping[str, Tensor],
    *,
    quick_gelu: bool = False,
    head_width: int = 64,
    eos_token_id: int = 49407,
) -> CLIPModel:
    """The `CLIPModel` of an open_clip state dict, in eval mode; `save_pretrained` makes a folder.

    What the weights do not tell are the activation, the width of an attention head (64 in all of
    open_clip's ViT-B and ViT-L) and the token that ends a text.
    Raises ValueError for weights of another architecture (a ResNet, a text model of Hugging Face).
    """
    described = config(
        tensors, quick_gelu=quick_gelu, head_width=head_width, eos_token_id=eos_token_id
    )
    model = CLIPModel(described)
    try:
        model.load_state_dict(renamed(tensors))
    except RuntimeError as error:
        raise ValueError(f"these weights are no CLIP of open_clip's: {error}") from error
    return model.eval()


def config(
    tensors: Mapping[str, Tensor], *, quick_gelu: bool, head_width: int, eos_token_id: int
) -> CLIPConfig:
    """The sizes that the weights have, with the activation that they were trained with."""
    for name in ("visual.conv1.weight", "visual.proj", "text_projection", "token_embedding.weight"):
        if name not in tensors:
            raise ValueError(
                f"these weights have no {name!r}: expected the state dict of an open_clip model "
                "with a ViT and open_clip's own text tower, such as ViT-B-16"
            )
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    common = {"hidden_act": "quick_gelu" if quick_gelu else "gelu", "layer_norm_eps": 1e-5}
    projection = tensors["visual.proj"].shape[1]
    vision = {
        **common,
        **_tower(tensors, "visual.transformer.resblocks", width, head_width),
        "patch_size": patch,
        "image_size": side * patch,
        "projection_dim": projection,
    }
    text = {
        **common,
        **_tower(tensors, "transformer.resblocks", text_width, head_width),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        "projection_dim": projection,
        "eos_token_id": eos_token_id,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def _tower(
    tensors: Mapping[str, Tensor], blocks: str, width: int, head_width: int
) -> dict[str, int]:
    norm = re.compile(rf"{re.escape(blocks)}\.\d+\.ln_1\.weight")
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors[f"{blocks}.0.mlp.c_fc.weight"]),
        "num_hidden_layers": sum(norm.fullmatch(name) is not None for name in tensors),
        "num_attention_heads": width // head_width,
    }


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names. ValueError for a name that has no place."""
    return {
        name: value.contiguous()
        for old, tensor in tensors.items()
        if old not in _IGNORED
        for name, value in _placed(old, tensor)
    }


def _placed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = _BLOCK.fullmatch(name)
    if block is None:
        yield _outside(name, tensor)
        return
    tower, part = "vision_model" if block[1] else "text_model", block[3]
    head = f"{tower}.encoder.layers.{block[2]}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        for letter, value in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{head}.self_attn.{letter}_proj.{kind}", value
        return
    stem, _, kind = part.rpartition(".")
    if stem not in _PARTS:
        raise _unknown(name)
    yield f"{head}.{_PARTS[stem]}.{kind}", tensor


def _outside(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A weight outside of blocks: by its whole name, or by its module's."""
    if name in ("visual.proj", "text_projection"):
        return _NAMES[name], tensor.T
    if name in _NAMES:
        # transformers takes the scale as a number without dimensions.
        return _NAMES[name], tensor.reshape(()) if name == "logit_scale" else tensor
    stem, _, kind = name.rpartition(".")
    if stem not in _NAMES:
        raise _unknown(name)
    return f"{_NAMES[stem]}.{kind}", tensor


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"there is no place for {name!r} in transformers' CLIPModel: expected the state dict of an "
        "open_clip model with a ViT and open_clip's own text tower, such as ViT-B-16"
    )
