"""Adapters, scales and prompts in a ViT against a plain one in float64, and their promises."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import ResNetConfig, ResNetModel, ViTModel

from encoders import BLOCKS, TRANSFORMERS, WIDTH, backbone, pictures, vit_b16
from mllm_cl.model.batch_norm import adapt_batch_norm
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.surgery import only_train, restore_state, trained_state
from mllm_cl.model.vision import (
    attach_adapters,
    attach_prompts,
    attach_ssf,
    merge_ssf,
    show_both,
    unadapted,
)


def adapters(encoder):
    return attach_adapters(encoder, rank=5)


def shallow(encoder):
    return attach_prompts(encoder, number=3, deep=False)


def deep(encoder):
    return attach_prompts(encoder, number=3, deep=True)


KINDS = [adapters, attach_ssf, shallow, deep]


def moved(encoder, trained):
    """The encoder after its adaptation went somewhere."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return encoder


def adapted(kind, model_type="vit"):
    encoder = Encoder(backbone(model_type))
    return moved(encoder, kind(encoder))


# A plain ViT in float64


def reference(encoder, pixel_values, *, heads=2, eps=1e-12):
    """The class token of an adapted ViT, from its weights by name alone; prompts after that token.

    SSF scales what each linear and LayerNorm answers; an adapter sees the residual stream before
    the second LayerNorm; prompts join before a block and leave after it.
    """
    weights = {name: p.detach().double() for name, p in encoder.backbone.named_parameters()}

    def ssf(name, y):
        if f"{name}.ssf.gamma_D" not in weights:
            return y
        return y * weights[f"{name}.ssf.gamma_D"] + weights[f"{name}.ssf.beta_D"]

    def linear(name, x):
        return ssf(name, x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return ssf(name, x * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def joined(x, index):
        prompts = weights.get(f"layers.{index}.prompts.prompts_PD")
        if prompts is None:
            return x
        # Where the paper puts them: in what attention does to the others nothing differs.
        return torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], 1)

    deep = "layers.1.prompts.prompts_PD" in weights
    count = len(weights.get("layers.0.prompts.prompts_PD", ()))
    at = "embeddings.patch_embeddings.projection"
    x = functional.unfold(pixel_values.double(), 8, stride=8).mT
    x = ssf(at, x @ weights[f"{at}.weight"].flatten(1).T + weights[f"{at}.bias"])
    x = torch.cat([weights["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + weights["embeddings.position_embeddings"]
    for index in range(BLOCKS):
        x = block(f"layers.{index}", joined(x, index), weights, linear, norm, heads)
        if count and (deep or index == BLOCKS - 1):
            x = torch.cat([x[:, :1], x[:, 1 + count :]], 1)
    return norm("layernorm", x)[:, 0]


def block(at, x, weights, linear, norm, heads):
    y = norm(f"{at}.layernorm_before", x)
    q, k, v = (linear(f"{at}.attention.{letter}_proj", y) for letter in "qkv")
    answers = []
    for part in range(heads):
        own = slice(part * WIDTH // heads, (part + 1) * WIDTH // heads)
        scores = q[..., own] @ k[..., own].mT / (WIDTH // heads) ** 0.5
        answers.append(scores.softmax(-1) @ v[..., own])
    x = x + linear(f"{at}.attention.o_proj", torch.cat(answers, -1))
    y = linear(f"{at}.mlp.fc1", norm(f"{at}.layernorm_after", x))
    y = linear(f"{at}.mlp.fc2", 0.5 * y * (1 + torch.erf(y / 2**0.5)))
    if f"{at}.mlp.bottleneck.up_DR" not in weights:
        return x + y
    down, down_bias, up, up_bias = (
        weights[f"{at}.mlp.bottleneck.{name}"] for name in ("down_RD", "down_R", "up_DR", "up_D")
    )
    return x + y + 0.1 * ((x @ down.T + down_bias).clamp(min=0) @ up.T + up_bias)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_vit_is_the_papers_in_float64(kind, attention):
    encoder = adapted(kind)
    encoder.backbone.set_attn_implementation(attention)
    expected = reference(encoder, pictures())
    torch.testing.assert_close(encoder(pictures()).double(), expected, rtol=0, atol=2e-5)
    with unadapted(encoder):
        assert (encoder(pictures()) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_all_kinds_in_one_vit_are_still_the_papers():
    encoder = Encoder(backbone("vit"))
    for kind in (adapters, attach_ssf, deep):
        moved(encoder, kind(encoder))
    expected = reference(encoder, pictures())
    torch.testing.assert_close(encoder(pictures()).double(), expected, rtol=0, atol=2e-5)


# Counts and starts


@pytest.mark.parametrize(
    ("attach", "count"),
    [
        (attach_adapters, 1_189_632),
        (attach_ssf, 205_824),
        (lambda encoder: attach_prompts(encoder, deep=True), 46_080),
        (lambda encoder: attach_prompts(encoder, deep=False), 3_840),
    ],
)
def test_a_vit_b16_trains_as_many_numbers_as_the_official_logs_say(attach, count):
    encoder = Encoder(vit_b16())
    frozen = set(encoder.state_dict())
    trained = attach(encoder)
    assert sum(parameter.numel() for parameter in trained.values()) == count
    assert set(encoder.state_dict()) == frozen | trained.keys()
    assert all(encoder.get_parameter(name) is value for name, value in trained.items())


def test_a_resnet_18_has_one_scale_and_shift_after_its_pooling():
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4}
    with torch.device("meta"):
        model = ResNetModel(ResNetConfig(**sizes, layer_type="basic"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_176_512
    assert sum(parameter.numel() for parameter in attach_ssf(Encoder(model)).values()) == 1024
    encoder = Encoder(backbone("resnet"))
    before = encoder(pictures())
    trained = moved(encoder, attach_ssf(encoder)).backbone.pooler.ssf
    expected = before * trained.gamma_D + trained.beta_D
    torch.testing.assert_close(encoder(pictures()), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_new_adapters_leave_every_bit_of_the_features(model_type, dtype):
    encoder = Encoder(backbone(model_type).to(dtype))
    before = encoder(pictures())
    attach_adapters(encoder)
    encoder.train()  # dropout of an answer that is zero
    assert torch.equal(encoder(pictures()), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_what_is_put_in_reaches_the_features_of_every_family(model_type, kind):
    encoder = Encoder(backbone(model_type))
    before = encoder(pictures())
    moved(encoder, kind(encoder))
    assert (encoder(pictures()) - before).abs().max() > 1e-3
    with unadapted(encoder):
        assert torch.equal(encoder(pictures()), before)


@torch.no_grad()
def test_an_adapter_in_a_dinov2_is_not_scaled_with_the_mlp():
    encoder = Encoder(backbone("dinov2"))
    attach_adapters(encoder, rank=5)
    last = encoder.backbone.encoder.layer[-1]
    seen = []
    last.register_forward_hook(lambda block, given, out: seen.append(out))
    encoder(pictures())
    last.layer_scale2.bottleneck.up_D += 1
    encoder(pictures())
    torch.testing.assert_close(seen[1] - seen[0], torch.full_like(seen[0], 0.1), rtol=0, atol=1e-5)


def test_draws_depend_on_the_seed_and_the_place_alone():
    first, again, other = (
        attach_ssf(Encoder(backbone("vit", seed=number)), seed=seed)
        for number, seed in ((0, 7), (1, 7), (0, 8))
    )
    for name, value in first.items():
        assert torch.equal(again[name], value) and not torch.equal(other[name], value)
    gammas = torch.cat([value for name, value in first.items() if name.endswith("gamma_D")])
    assert gammas.mean().item() == pytest.approx(1, abs=0.003)
    assert gammas.std().item() == pytest.approx(0.02, rel=0.1)


# What stays


def learn(encoder, trained, steps=3):
    only_train(encoder, list(trained.values()))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        encoder(pictures(seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_after_adamw_only_what_was_put_in_has_moved(kind):
    encoder = Encoder(backbone("vit"))
    features = encoder(pictures())
    frozen = {name: value.clone() for name, value in encoder.state_dict().items()}
    trained = kind(encoder)
    start = {name: value.detach().clone() for name, value in trained.items()}
    learn(encoder, trained)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in frozen.items())
    # A scale on the keys' shift moves no attention: softmax does not see it.
    still = [name for name in start if torch.equal(start[name], trained[name])]
    assert all("k_proj.ssf.beta_D" in name for name in still)
    with unadapted(encoder):
        assert torch.equal(encoder(pictures()), features)
    assert not torch.equal(encoder(pictures()), features)


def test_an_error_inside_unadapted_switches_everything_on_again():
    encoder = adapted(adapters)
    before = encoder(pictures())
    with pytest.raises(KeyError), unadapted(encoder), unadapted(encoder):
        raise KeyError
    assert torch.equal(encoder(pictures()), before)


@torch.no_grad()
def test_both_features_come_from_one_copy_of_the_frozen_weights():
    plain, encoder = Encoder(backbone("vit")), adapted(deep)
    alone, names = encoder(pictures()), [name for name, _ in encoder.named_parameters()]
    show_both(encoder)
    features_BD = encoder(pictures())
    assert features_BD.shape == (3, encoder.width)
    assert torch.equal(features_BD[:, :WIDTH], plain(pictures()))
    assert torch.equal(features_BD[:, WIDTH:], alone)
    assert [name for name, _ in encoder.named_parameters()] == names
    head = Prototype(encoder.width, 1)
    head.add(features_BD, torch.zeros(3, dtype=torch.long))
    head.share()
    assert torch.equal(Classifier(encoder, head)(pictures()).logits, head(features_BD))


@torch.no_grad()
def test_both_features_count_alike_if_they_are_normalised():
    encoder = adapted(deep)
    show_both(encoder, normalised=True)
    halves = encoder(pictures()).view(3, 2, WIDTH)
    torch.testing.assert_close(halves.norm(dim=-1), torch.ones(3, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_when_blocks_are_checkpointed(kind, reentrant):
    gradients = []
    for checkpointed in (False, True):
        encoder = Encoder(backbone("vit"))
        trained = kind(encoder)
        moved(encoder, trained)
        only_train(encoder, list(trained.values()))
        encoder.train()
        if checkpointed:
            encoder.backbone._set_gradient_checkpointing(
                gradient_checkpointing_func=partial(checkpoint, use_reentrant=reentrant)
            )
        pixel_values = pictures().requires_grad_()  # reentrant checkpoints ask for it
        torch.manual_seed(0)  # dropout
        encoder(pixel_values).square().mean().backward()
        gradients.append({name: value.grad for name, value in trained.items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_trains_is_fp32_under_a_bf16_model(kind, autocast):
    encoder = Encoder(backbone("vit").to(torch.float32 if autocast else torch.bfloat16))
    trained = kind(encoder)
    expected = moved(encoder, trained)(pictures()).float().detach()
    only_train(encoder, list(trained.values()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features_BD = encoder(pictures())
    features_BD.float().square().mean().backward()
    # bf16 has 8 bits: a hundredth of features around 1, over three blocks.
    torch.testing.assert_close(features_BD.float(), expected, rtol=0.1, atol=0.1)
    for value in trained.values():
        assert value.dtype == value.grad.dtype == torch.float32
        assert torch.isfinite(value.grad).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_adapters_of_its_own(kind):
    encoder = adapted(kind)
    before = encoder(pictures())
    twin = copy.deepcopy(encoder)
    moved(twin, dict(twin.named_parameters()))
    with unadapted(twin):
        assert torch.equal(encoder(pictures()), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learnt_comes_back_from_a_state(kind):
    plain = Encoder(backbone("vit"))
    base = set(dict(plain.named_parameters()))
    encoder = adapted(kind)
    state = trained_state(encoder.requires_grad_(False), base)
    kind(plain)
    restore_state(plain, state)
    assert torch.equal(plain(pictures()), encoder(pictures()))


def test_one_of_a_kind_is_what_an_encoder_takes():
    encoder = Encoder(backbone("vit"))
    for kind in (adapters, attach_ssf, deep):
        kind(encoder)
        with pytest.raises(ValueError, match="already"):
            kind(encoder)


# Prompts


@torch.no_grad()
@pytest.mark.parametrize("kind", [shallow, deep])
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_prompts_leave_the_sequence_as_long_as_it_was(model_type, kind):
    encoder = adapted(kind, model_type)
    anatomy = encoder.anatomy
    lengths = {}
    for name in [block.name for block in anatomy.blocks] + [anatomy.blocks[1].ln1]:
        module = encoder.backbone.get_submodule(name)
        module.register_forward_hook(
            lambda _, given, out, name=name: lengths.update({name: out.shape[1]})
        )
    encoder(pictures())
    tokens = 4 + (not model_type.startswith("siglip"))
    assert lengths[anatomy.blocks[-1].name] == tokens
    assert lengths[anatomy.blocks[1].ln1] == tokens + 3


def test_an_attention_mask_is_refused_and_not_ignored():
    encoder = adapted(deep)
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 3)
    with pytest.raises(ValueError, match="an attention mask does not fit"):
        encoder.backbone(pixel_values=pictures(), attention_mask=mask)


# Merging


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["vit", "dinov2", "siglip"])
def test_ssf_joins_the_weights_and_plain_transformers_reads_them(model_type, tmp_path):
    encoder = adapted(attach_ssf, model_type)
    before, plain = encoder(pictures()), backbone(model_type)
    merge_ssf(encoder)
    torch.testing.assert_close(encoder(pictures()), before, rtol=0, atol=1e-5)
    assert encoder.backbone.state_dict().keys() == plain.state_dict().keys()
    assert not any("forward" in vars(module) for module in encoder.modules())
    if model_type == "vit":
        encoder.backbone.save_pretrained(tmp_path)
        again = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
        torch.testing.assert_close(Encoder(again)(pictures()), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_ssf_that_has_no_bias_to_go_to_is_left_where_it_is():
    encoder = adapted(attach_ssf, "clip")
    before = encoder(pictures())
    with pytest.raises(ValueError, match="patch_embedding has no bias"):
        merge_ssf(encoder)
    assert torch.equal(encoder(pictures()), before)


# Batch statistics


def test_batch_statistics_start_at_zero_and_follow_the_pictures():
    encoder = Encoder(backbone("resnet"))
    start = {name: value.clone() for name, value in encoder.named_parameters()}
    batches = [pictures(4, seed=seed) for seed in range(3)]
    adapt_batch_norm(encoder, batches)
    first = encoder.backbone.embedder.embedder
    mean, variance = 0, 0
    for batch in batches:
        seen = functional.conv2d(
            batch.double(), first.convolution.weight.double(), stride=2, padding=3
        )
        mean = 0.9 * mean + 0.1 * seen.mean((0, 2, 3))
        variance = 0.9 * variance + 0.1 * seen.var((0, 2, 3))
    found = first.normalization
    torch.testing.assert_close(found.running_mean.double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.running_var.double(), variance, rtol=0, atol=1e-6)
    assert not any(module.training for module in encoder.backbone.modules())
    for name, value in encoder.named_parameters():
        assert torch.equal(value, start[name]) and value.grad is None


def test_statistics_need_batch_normalisation_and_pictures():
    with pytest.raises(ValueError, match="ViTModel has no batch normalisation"):
        adapt_batch_norm(Encoder(backbone("vit")), [pictures()])
    with pytest.raises(ValueError, match="no picture"):
        adapt_batch_norm(Encoder(backbone("resnet")), [])


# The first step


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_first_step_of_prompts_is_small_where_a_layer_norm_has_no_epsilon(kind, deep):
    """As in google/vit-base-patch16-224, of 1e-12: a row of zeros would have a gradient of 1e6."""
    encoder = Encoder(backbone("vit"))
    assert encoder.backbone.config.layer_norm_eps == 1e-12
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.bias.zero_()  # of zeros nothing would be left
    trained = attach_prompts(encoder, number=3, deep=deep)
    optimizer = getattr(torch.optim, kind)(trained.values(), lr=1e-3)
    start = {name: one.detach().clone() for name, one in trained.items()}
    before = encoder(pictures())
    wanted = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    (before * wanted).mean().backward()
    optimizer.step()
    for name, one in trained.items():
        step = (one - start[name]).abs().max()
        assert 0 < step < 0.005, name
    moved = (encoder(pictures()) - before).norm() / before.norm()
    assert moved < 0.1


def test_prompts_start_from_their_seed_alone():
    one, same, other = (
        attach_prompts(Encoder(backbone("vit")), deep=True, seed=seed) for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    first, second, _ = one.values()
    assert not torch.equal(first, second)
    assert abs(float(torch.cat([*one.values()]).detach().std()) - 0.02) < 0.002
