"""Encoders: which output is the feature, what opens them, and where their parts are."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel, ViTConfig, ViTForImageClassification
from transformers.utils import is_timm_available

from encoders import BLOCKS, SIDE, TRANSFORMERS, TYPES, WIDTH, backbone, pictures, vit_b16
from mllm_cl.model.blocks import resolve
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder, empty_encoder, family, load_encoder
from mllm_cl.model.heads import Linear
from mllm_cl.model.open_clip import clip_model, renamed
from mllm_cl.model.precision import widen
from mllm_cl.recipe import ModelBlock


def settings(folder) -> ModelBlock:
    return ModelBlock(model_name_or_path=str(folder))


def expected(model_type: str, model, pixel_values):
    """The feature of a picture by the backbone's own outputs, written out."""
    if model_type in ("clip", "siglip"):
        seen = model.vision_model(pixel_values=pixel_values).pooler_output
        return model.visual_projection(seen) if model_type == "clip" else seen
    output = model(pixel_values=pixel_values)
    if model_type == "resnet":
        return output.last_hidden_state.mean((2, 3))
    if model_type in ("vit", "dinov2"):
        return output.last_hidden_state[:, 0]
    return output.pooler_output


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_opens_as_the_encoder_that_its_config_names(model_type, tmp_path):
    model, pixel_values = backbone(model_type), pictures()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(settings(tmp_path))
    features_BD = encoder(pixel_values)
    assert features_BD.shape == (3, encoder.width)
    assert not encoder.training
    torch.testing.assert_close(
        features_BD, expected(model_type, model, pixel_values), rtol=0, atol=1e-6
    )
    empty = empty_encoder(settings(tmp_path))
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in encoder.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_vit_b16_has_the_parameters_of_the_papers():
    assert sum(parameter.numel() for parameter in vit_b16().parameters()) == 85_798_656


@torch.no_grad()
def test_a_classifier_on_the_hub_opens_as_its_encoder(tmp_path):
    config = ViTConfig(**backbone("vit").config.to_diff_dict(), num_labels=5)
    classifier = ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    encoder = load_encoder(settings(tmp_path))
    output = classifier.vit(pixel_values=pictures())
    expected = output.last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(pictures()), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["clip", "siglip"])
def test_texts_have_features_beside_those_of_pictures(model_type):
    model = backbone(model_type)
    input_ids = torch.tensor([[3, 4, 31, 31], [5, 6, 7, 31]])
    features_CD = Encoder(model).text(input_ids, torch.ones_like(input_ids))
    read = model.text_model(input_ids=input_ids).pooler_output
    assert features_CD.shape == (2, Encoder(model).width)
    assert torch.equal(features_CD, model.text_projection(read) if model_type == "clip" else read)


@torch.no_grad()
def test_the_backbone_of_an_encoder_is_saved_as_transformers_reads_it(tmp_path):
    encoder = Encoder(backbone("clip"))
    assert all(parameter.dim() for parameter in encoder.parameters())  # as FSDP2 wants it
    encoder.backbone.save_pretrained(tmp_path)
    again = CLIPModel.from_pretrained(tmp_path).eval()
    assert again.logit_scale.shape == () and again.logit_scale == encoder.backbone.logit_scale
    inputs = {"pixel_values": pictures(), "input_ids": torch.tensor([[3, 31]])}
    found, expected = again(**inputs), encoder.backbone(**inputs)
    # What is read from a file lies elsewhere in memory, and products round by that.
    logits = expected.logits_per_image
    torch.testing.assert_close(found.logits_per_image, logits, rtol=0, atol=1e-6)


def test_an_encoder_without_a_text_tower_says_so():
    with pytest.raises(ValueError, match="ViTModel has no text tower"):
        Encoder(backbone("vit")).text(torch.tensor([[1]]))


def test_dtype_and_attention_are_those_of_the_recipe(tmp_path):
    backbone("vit").save_pretrained(tmp_path)
    asked = replace(settings(tmp_path), dtype="bfloat16", attn_implementation="eager")
    model = load_encoder(asked).backbone
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_model_that_is_no_encoder_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"'bert'. Expected 'model_type' .* clip, .* vit"):
        load_encoder(settings(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model is there"):
        load_encoder(settings(tmp_path / "empty"))
    with pytest.raises(ValueError, match="four bits"):
        load_encoder(replace(settings(tmp_path), load_in_4bit=True))


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_a_timm_checkpoint_without_timm_is_refused_before_it_loads(tmp_path):
    described = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"tag": "a1"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="pip install timm"):
        load_encoder(settings(tmp_path))
    assert family("timm_wrapper").backbone.__name__ == "TimmWrapperModel"


# Where the parts are


@torch.no_grad()
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_the_parts_of_a_transformer_run_in_the_order_of_their_names(model_type):
    model = backbone(model_type)
    anatomy = resolve(model)
    order = [anatomy.patches, anatomy.embeddings]
    for block in anatomy.blocks:
        order += [block.ln1, *sorted((block.q, block.k, block.v)), block.o]
        order += [block.ln2, block.fc1, block.fc2, block.branch, block.name]
    order.append(anatomy.norm)
    ran = []
    for name in order:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    Encoder(model)(pictures())
    assert len(anatomy.blocks) == BLOCKS and anatomy.width == WIDTH
    for place in range(BLOCKS):
        three = slice(3 + 10 * place, 6 + 10 * place)
        ran[three] = sorted(ran[three])  # families differ in which of q, k and v comes first
    assert ran == order


def test_the_blocks_of_a_vit_have_the_names_of_transformers():
    first = resolve(vit_b16()).blocks[0]
    assert first.ln1 == "layers.0.layernorm_before" and first.ln2 == "layers.0.layernorm_after"
    assert [first.q, first.k, first.v, first.o] == [
        f"layers.0.attention.{letter}_proj" for letter in "qkvo"
    ]
    assert [first.fc1, first.fc2] == ["layers.0.mlp.fc1", "layers.0.mlp.fc2"]


def test_a_layer_scale_ends_the_branch_of_a_dinov2():
    assert resolve(backbone("dinov2")).blocks[1].branch == "encoder.layer.1.layer_scale2"


def test_a_resnet_has_no_parts_of_a_transformer():
    with pytest.raises(ValueError, match="ResNetModel: looked for"):
        resolve(backbone("resnet"))


# Weights of open_clip

ENDS = ("weight", "bias")
TEXTS = torch.tensor([[3, 4, 31, 0], [5, 6, 7, 31]])


def open_clip_weights() -> dict[str, torch.Tensor]:
    """A state dict in open_clip's layout: widths 24 and 16, patch 8, projection 20, 32 tokens."""
    shapes = {
        **open_clip_shapes("visual.", 24),
        **open_clip_shapes("", 16),
        "visual.class_embedding": (24,),
        "visual.positional_embedding": (5, 24),
        "visual.conv1.weight": (24, 3, 8, 8),
        **{f"visual.{norm}.{end}": (24,) for norm in ("ln_pre", "ln_post") for end in ENDS},
        "visual.proj": (24, 20),
        "positional_embedding": (7, 16),
        "token_embedding.weight": (32, 16),
        **{f"ln_final.{end}": (16,) for end in ENDS},
        "text_projection": (16, 20),
        "logit_scale": (),
    }
    generator = torch.Generator().manual_seed(0)
    # fp32 numbers, as a checkpoint has them, for sums in float64
    return {
        name: (0.3 * torch.randn(s, generator=generator)).double() for name, s in shapes.items()
    }


def open_clip_shapes(tower: str, width: int, blocks: int = 2) -> dict[str, tuple[int, ...]]:
    shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (40, width),
        "mlp.c_fc.bias": (40,),
        "mlp.c_proj.weight": (width, 40),
        "mlp.c_proj.bias": (width,),
        **{f"{norm}.{end}": (width,) for norm in ("ln_1", "ln_2") for end in ENDS},
    }
    return {
        f"{tower}transformer.resblocks.{index}.{name}": shape
        for index in range(blocks)
        for name, shape in shapes.items()
    }


def normed(weights, x, name):
    weight, bias = (weights[f"{name}.{end}"] for end in ENDS)
    return functional.layer_norm(x, x.shape[-1:], weight, bias)


def multiplied(weights, x, name, end=".weight"):
    return x @ weights[f"{name}{end}"].T + weights[f"{name}{end.replace('weight', 'bias')}"]


def open_clip_tower(weights, tower, x_BND, gelu, mask=0.0):
    """The blocks as open_clip has them, with heads of width 8."""
    batch, count, width = x_BND.shape
    for index in range(2):
        at = f"{tower}transformer.resblocks.{index}"
        y = multiplied(
            weights, normed(weights, x_BND, f"{at}.ln_1"), f"{at}.attn.in_proj", "_weight"
        )
        q, k, v = (part.view(batch, count, -1, 8).transpose(1, 2) for part in y.split(width, 2))
        y = ((q @ k.mT / 8**0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BND = x_BND + multiplied(weights, y, f"{at}.attn.out_proj")
        y = gelu(multiplied(weights, normed(weights, x_BND, f"{at}.ln_2"), f"{at}.mlp.c_fc"))
        x_BND = x_BND + multiplied(weights, y, f"{at}.mlp.c_proj")
    return x_BND


def open_clip_image(weights, pixel_values, gelu):
    patches = functional.conv2d(pixel_values, weights["visual.conv1.weight"], stride=8)
    first = weights["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches.flatten(2).mT], 1) + weights["visual.positional_embedding"]
    x = open_clip_tower(weights, "visual.", normed(weights, x, "visual.ln_pre"), gelu)
    return normed(weights, x[:, 0], "visual.ln_post") @ weights["visual.proj"]


def open_clip_text(weights, input_ids, gelu):
    count = input_ids.shape[1]
    x = weights["token_embedding.weight"][input_ids] + weights["positional_embedding"][:count]
    mask = torch.full((count, count), float("-inf"), dtype=x.dtype).triu(1)
    x = normed(weights, open_clip_tower(weights, "", x, gelu, mask), "ln_final")
    return x[torch.arange(len(x)), input_ids.argmax(-1)] @ weights["text_projection"]


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@torch.no_grad()
@pytest.mark.parametrize("gelu", [exact_gelu, quick_gelu])
def test_weights_of_open_clip_answer_alike_in_transformers(gelu):
    weights, pixel_values = open_clip_weights(), pictures().double()
    quick = gelu is quick_gelu
    model = clip_model(weights, quick_gelu=quick, head_width=8, eos_token_id=31).double()
    encoder = Encoder(model)
    image, text = encoder(pixel_values), encoder.text(TEXTS)
    exact = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(image, open_clip_image(weights, pixel_values, gelu), **exact)
    torch.testing.assert_close(text, open_clip_text(weights, TEXTS, gelu), **exact)
    assert (image - open_clip_image(weights, pixel_values, torch.tanh)).abs().max() > 1e-3
    assert model.logit_scale.item() == weights["logit_scale"].item()
    assert model.config.vision_config.image_size == SIDE


@torch.no_grad()
def test_converted_weights_open_as_any_folder_with_exact_gelu(tmp_path):
    model = clip_model(open_clip_weights(), head_width=8, eos_token_id=31)
    model.save_pretrained(tmp_path)
    again = load_encoder(settings(tmp_path))
    expected = Encoder(model)(pictures())
    torch.testing.assert_close(again(pictures()), expected, rtol=0, atol=1e-6)
    assert torch.equal(again.backbone.logit_scale[0], open_clip_weights()["logit_scale"].float())
    config = again.backbone.config
    assert config.vision_config.hidden_act == config.text_config.hidden_act == "gelu"


def test_weights_that_are_no_vit_of_open_clip_are_refused_by_name():
    weights = open_clip_weights()
    with pytest.raises(ValueError, match=r"no place for 'visual.layer1.0.conv1.weight'"):
        renamed({**weights, "visual.layer1.0.conv1.weight": weights["visual.proj"]})
    del weights["text_projection"]
    with pytest.raises(ValueError, match="have no 'text_projection'"):
        clip_model(weights)


@pytest.mark.parametrize("trained", [False, True])
def test_a_resnet_in_bf16_sees_pictures_in_fp32(trained, tmp_path):
    backbone("resnet").save_pretrained(tmp_path)
    encoder = load_encoder(replace(settings(tmp_path), dtype="bfloat16"))
    encoder.requires_grad_(trained)
    model = Classifier(encoder, Linear(encoder.width, 2))
    assert bool(widen(model)) == trained
    out = model.train()(pixel_values=pictures(), labels=torch.zeros(len(pictures()), dtype=int))
    exact = Encoder(backbone("resnet"))(pictures())
    assert (out.features.float() - exact).norm() < 0.02 * exact.norm()
    out.loss.backward()
    gradients = [one.grad for one in encoder.parameters() if one.requires_grad]
    assert all(one is not None and one.isfinite().all() for one in gradients)
