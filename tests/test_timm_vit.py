"""A ViT of timm's computes the same as transformers' with its weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from encoders import pictures
from mllm_cl.model.encoder import load_encoder
from mllm_cl.model.timm_vit import vit_model
from mllm_cl.recipe import ModelBlock

WIDTH, BLOCKS, HEAD = 24, 2, 8


def timm_weights(width: int = WIDTH) -> dict[str, Tensor]:
    """A state dict in timm's layout: patch 8, pictures of 16, a head of 5 classes."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "norm.weight": (width,),
        "head.weight": (5, width),
    }
    for index in range(BLOCKS):
        own = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width)}
        own |= {"attn.proj": (width, width), "mlp.fc1": (40, width), "mlp.fc2": (width, 40)}
        shapes |= {f"blocks.{index}.{name}.weight": shape for name, shape in own.items()}
    for name, (size, *_) in [item for item in shapes.items() if item[0].endswith(".weight")]:
        shapes[name.replace(".weight", ".bias")] = (size,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def timm_features(weights: dict[str, Tensor], pixel_values_BCHW: Tensor) -> Tensor:
    """The class token after the last norm, as timm computes it, in float64."""
    w = {name: value.double() for name, value in weights.items()}

    def norm(x, name):
        return layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def apply(x, name):
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    patches = conv2d(
        pixel_values_BCHW.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 8
    )
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for index in range(BLOCKS):
        head = f"blocks.{index}"
        qkv = apply(norm(x, f"{head}.norm1"), f"{head}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, WIDTH // HEAD, HEAD)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / HEAD**0.5).softmax(-1) @ v
        x = x + apply(attended.transpose(1, 2).flatten(2), f"{head}.attn.proj")
        hidden = gelu(apply(norm(x, f"{head}.norm2"), f"{head}.mlp.fc1"))
        x = x + apply(hidden, f"{head}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@torch.no_grad()
def test_the_features_are_those_that_timm_computes(tmp_path):
    weights, images = timm_weights(), pictures()
    vit_model(weights, head_width=HEAD).save_pretrained(tmp_path)
    encoder = load_encoder(ModelBlock(model_name_or_path=str(tmp_path)))
    expected = timm_features(weights, images)
    torch.testing.assert_close(encoder(images).double(), expected, rtol=1e-5, atol=1e-5)
    assert len(encoder.anatomy.blocks) == BLOCKS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cls_token": None}, "no 'cls_token'"),
        ({"blocks.0.ls1.gamma": torch.ones(WIDTH)}, "'blocks.0.ls1.gamma'"),
        ({"blocks.1.mlp.fc2.weight": None}, "no plain ViT"),
    ],
)
def test_other_architectures_are_refused(change, said):
    weights = {name: one for name, one in (timm_weights() | change).items() if one is not None}
    with pytest.raises(ValueError, match=said):
        vit_model(weights, head_width=HEAD)


def test_the_script_makes_a_folder_that_opens(tmp_path):
    save_file(timm_weights(64), tmp_path / "timm.safetensors")
    script = Path(__file__).parents[1] / "recipes" / "convert.py"
    words = [sys.executable, script, "timm", tmp_path / "timm.safetensors", tmp_path / "vit"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ViTModel with" in done.stdout, done.stderr
    assert load_encoder(ModelBlock(model_name_or_path=str(tmp_path / "vit"))).width == 64
