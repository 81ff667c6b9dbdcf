"""LoRA on fused experts says and learns what the merged weights would, in every family."""

import copy

import pytest
import torch
from torch import nn

from families import FAMILIES, inputs
from families import SPARSE as WITH_EXPERTS
from mllm_cl.model.anatomy import routers
from mllm_cl.model.expert_lora import adapted, attach_expert_lora, merge_expert_lora, stacks
from mllm_cl.model.experts import experts
from mllm_cl.model.surgery import fold, guard

SPARSE = [name for name in WITH_EXPERTS if name != "jetmoe"]


def adapted_model(family: str, dtype=torch.float64) -> nn.Module:
    """A model whose experts have rank-3 adapters that are not zero."""
    model = FAMILIES[family]().to(dtype).eval()  # some routers add noise while they train
    model.requires_grad_(False)
    attach_expert_lora(model, experts(model), rank=3, alpha=6.0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "_lora_" in name:
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.data = (0.1 * draw).to(dtype)
    return model


def merged_reference(model: nn.Module, family: str) -> nn.Module:
    """The model as it comes, eager experts, with W + s B A written into its weights."""
    reference = FAMILIES[family]().to(next(model.parameters()).dtype).eval()
    reference.set_experts_implementation("eager")
    reference.load_state_dict(model.state_dict(), strict=False)
    for path, lora in adapted(model).items():
        module, own = lora.layout.module, reference.get_submodule(path)
        for name, _, _ in stacks(lora.layout):
            a, b = (module._parameters[f"{name}_lora_{one}"] for one in "AB")
            moved = torch.stack([2.0 * b[e] @ a[e] for e in range(len(a))])
            own._parameters[name].data += moved.mT if lora.layout.transposed else moved
    return reference


@pytest.mark.parametrize("family", SPARSE)
def test_output_and_gradients_are_those_of_the_merged_weights(family):
    model = adapted_model(family)
    reference = merged_reference(model, family)
    batch = inputs(model)
    said, expected = model(**batch).logits, reference(**batch).logits
    torch.testing.assert_close(said, expected, rtol=1e-9, atol=1e-9)
    said.square().mean().backward()
    expected.square().mean().backward()
    for path, lora in adapted(model).items():
        module, own = lora.layout.module, reference.get_submodule(path)
        for name, _, _ in stacks(lora.layout):
            gradient = own._parameters[name].grad
            a, b = (module._parameters[f"{name}_lora_{one}"] for one in "AB")
            if gradient is None:  # Ernie's experts for pictures, which text does not visit
                assert a.grad is None and b.grad is None
                continue
            gradient = gradient.mT if lora.layout.transposed else gradient
            torch.testing.assert_close(a.grad, 2.0 * b.mT @ gradient, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(b.grad, 2.0 * gradient @ a.mT, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4", "gpt_oss"])
def test_merging_leaves_the_function_unchanged(family):
    model = adapted_model(family, torch.float32)
    batch = inputs(model)
    before = model(**batch).logits
    merge_expert_lora(model)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == FAMILIES[family]().state_dict().keys()
    assert not adapted(model)


def test_merging_guarded_adapters_is_refused_until_they_are_folded():
    model = adapted_model("qwen3_vl_moe", torch.float32)
    batch = inputs(model)
    for lora in adapted(model).values():
        guard(lora.layout.module, f"{lora.layout.up}_lora_B").displacement += 0.1
    before = model(**batch).logits
    with pytest.raises(ValueError, match="have guards .*fold"):
        merge_expert_lora(model)
    assert torch.equal(model(**batch).logits, before)
    fold(model)
    merge_expert_lora(model)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_no_answer():
    model = FAMILIES["qwen3_vl_moe"]().eval()
    batch = inputs(model)
    before = model(**batch).logits
    attach_expert_lora(model, experts(model), rank=4, alpha=8.0)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_gives_the_same_gradients():
    model = adapted_model("qwen3_moe")
    twin = copy.deepcopy(model)
    twin.train()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one in (model, twin):
        one(**inputs(one)).logits.square().mean().backward()
    found = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name].grad, parameter.grad)


def test_an_expert_without_tokens_has_a_zero_gradient_and_others_theirs():
    model = adapted_model("qwen3_moe")
    for router in routers(model).values():
        router.weight.data[1:] = 0.0
        router.weight.data[0] = 0.0  # all logits equal: top-k takes the same experts always
    model(**inputs(model)).logits.square().mean().backward()
    for lora in adapted(model).values():
        gradient = lora.layout.module._parameters[f"{lora.layout.up}_lora_A"].grad
        used = gradient.flatten(1).any(1)
        assert used.sum() == lora.layout.top_k
        assert gradient.shape == (lora.layout.num_experts, 3, lora.layout.width)


def test_adapters_do_not_depend_on_which_layers_have_them():
    whole, part = (FAMILIES["qwen3_moe"]() for _ in range(2))
    attach_expert_lora(whole, experts(whole), rank=2, alpha=4.0, seed=5)
    path, layout = list(experts(part).items())[-1]
    attach_expert_lora(part, {path: layout}, rank=2, alpha=4.0, seed=5)
    for name, _, _ in stacks(layout):
        one = whole.get_parameter(f"{path}.{name}_lora_A")
        assert torch.equal(one, part.get_parameter(f"{path}.{name}_lora_A"))


def test_experts_with_a_forward_of_their_own_are_refused():
    model = FAMILIES["jetmoe"]()
    with pytest.raises(ValueError, match="experts"):
        attach_expert_lora(model, experts(model), rank=2, alpha=4.0)
