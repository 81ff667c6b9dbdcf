"""A ViT of timm's as transformers' `ViTModel`: the AugReg weights of class-incremental tables are
timm's alone, and it keeps q, k and v in one matrix, which adapters and prompts do not know.

    timm                                       here
    cls_token, pos_embed, patch_embed.proj     embeddings: class token, positions, patches
    blocks.i.norm1, norm2, mlp.fc1, mlp.fc2    the block's LayerNorms and MLP
    blocks.i.attn.qkv (3D, D)                  q, k and v (D, D)
    blocks.i.attn.proj                         the output projection
    norm                                       the LayerNorm after the last block
    head, fc_norm, pre_logits                  nothing: features are the class token after `norm`
"""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import ViTConfig, ViTModel

from mllm_cl.model.blocks import Anatomy, resolve

_LEFT_OUT = re.compile(r"(head|fc_norm|pre_logits)(\.|$)")
EPSILON = 1e-6  # of timm's LayerNorms; transformers' own checkpoints have 1e-12


def vit_model(tensors: Mapping[str, Tensor], *, head_width: int = 64) -> ViTModel:
    """The `ViTModel` of a timm state dict, in eval mode; `save_pretrained` makes a folder.

    What the weights do not tell is the width of an attention head, 64 in ViT-S, B and L.
    Raises ValueError for weights of another architecture, such as one without a class token.
    """
    model = ViTModel(config(tensors, head_width=head_width), add_pooling_layer=False)
    try:
        model.load_state_dict(renamed(tensors, resolve(model)))
    except RuntimeError as error:
        raise ValueError(f"these weights are no plain ViT of timm's: {error}") from error
    return model.eval()


def config(tensors: Mapping[str, Tensor], *, head_width: int) -> ViTConfig:
    """The sizes that the weights have."""
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in tensors:
            raise ValueError(
                f"these weights have no {name!r}: expected the state dict of a plain ViT of timm's "
                "with a class token, such as vit_base_patch16_224"
            )
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    return ViTConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in tensors),
        num_attention_heads=width // head_width,
        patch_size=patch,
        image_size=round((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        layer_norm_eps=EPSILON,
    )


def renamed(tensors: Mapping[str, Tensor], parts: Anatomy) -> dict[str, Tensor]:
    """The same weights under the names of a model with these parts. ValueError for a name that has
    no place.
    """
    names = {"patch_embed.proj": parts.patches, "norm": parts.norm}
    for index, block in enumerate(parts.blocks):
        own = {"norm1": block.ln1, "norm2": block.ln2, "attn.proj": block.o}
        own |= {"mlp.fc1": block.fc1, "mlp.fc2": block.fc2}
        names |= {f"blocks.{index}.{part}": name for part, name in own.items()}
    found = {
        f"{parts.embeddings}.cls_token": tensors["cls_token"],
        f"{parts.embeddings}.position_embeddings": tensors["pos_embed"],
    }
    for old, tensor in tensors.items():
        stem, _, kind = old.rpartition(".")
        split = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv", stem)
        if old in ("cls_token", "pos_embed") or _LEFT_OUT.match(old):
            continue
        if split and int(split[1]) < len(parts.blocks):
            block = parts.blocks[int(split[1])]
            thirds = zip((block.q, block.k, block.v), tensor.chunk(3), strict=True)
            found |= {f"{name}.{kind}": value.contiguous() for name, value in thirds}
        elif stem in names:
            found[f"{names[stem]}.{kind}"] = tensor
        else:
            raise ValueError(f"these weights have {old!r}, for which a plain ViT has no place")
    return found
