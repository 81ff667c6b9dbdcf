"""Fused experts are found in every family, and lie as said: a reference answers as they do."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import families
from families import DENSE, HIDDEN, NUM_EXPERTS, SPARSE, TOP_K
from mllm_cl.model.experts import Experts, experts
from mllm_cl.model.walk import bare

# Aria's experts were fused later than the oldest version that we test.
OLD = Version(transformers.__version__) < Version("5.23")

USUAL = {
    "up": "gate_up_proj",
    "down": "down_proj",
    "num_experts": NUM_EXPERTS,
    "width": HIDDEN,
    "transposed": False,
    "gated": True,
    "interleaved": False,
    "biased": False,
    "switched": True,
    "top_k": TOP_K,
    "scales_input": False,
}


@dataclass(frozen=True)
class Written:
    """What there is, by hand from the source and the configs of `families`; the first in full."""

    count: int
    block: str
    inner: int
    experts: str = "experts"
    router: str = "gate"
    shared: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()
    unusual: dict[str, object] = field(default_factory=dict)

    def fields(self) -> dict[str, object]:
        return USUAL | {
            "path": f"{self.block}.{self.experts}",
            "router": f"{self.block}.{self.router}",
            "inner": self.inner,
            "shared": self.shared,
            "corrections": tuple(f"{self.block}.{name}" for name in self.corrections),
            **self.unusual,
        }


def in_text(layer: int, block: str = "mlp") -> str:
    return f"model.language_model.layers.{layer}.{block}"


def in_model(layer: int, block: str = "mlp") -> str:
    return f"model.layers.{layer}.{block}"


LLAMA4_BLOCK = "language_model.model.layers.1.feed_forward"
WRITTEN = {
    "qwen3_vl_moe": Written(2, in_text(1), 40),
    "qwen3_5_moe": Written(3, in_text(0), 40, shared=(in_text(0, "mlp.shared_expert"),)),
    "qwen3_moe": Written(2, in_model(0), 40),
    "mixtral": Written(3, in_model(0), 56),
    "olmoe": Written(3, in_model(0), 56),
    "deepseek_v3": Written(
        2,
        in_model(1),
        40,
        shared=(in_model(1, "mlp.shared_experts"),),
        corrections=("gate.e_score_correction_bias",),
    ),
    "glm4v_moe": Written(
        2,
        in_text(1),
        40,
        shared=(in_text(1, "mlp.shared_experts"),),
        corrections=("gate.e_score_correction_bias",),
    ),
    "llama4": Written(
        2,
        LLAMA4_BLOCK,
        56,
        router="router",
        shared=(f"{LLAMA4_BLOCK}.shared_expert",),
        unusual={"transposed": True, "switched": False, "scales_input": True},
    ),
    "gpt_oss": Written(
        3,
        in_model(0),
        56,
        router="router",  # whose plain `bias` belongs to the logits: no correction
        unusual={"transposed": True, "interleaved": True, "biased": True},
    ),
    "gemma4": Written(3, "model.language_model.layers.0", 40, router="router.proj"),
    "ernie4_5_vl_moe": Written(
        2 * 2,
        in_text(1, "mlp.text_moe"),
        40,
        shared=(in_text(1, "mlp.shared_experts"),),
        corrections=("gate.moe_statics.e_score_correction_bias",),
    ),
    "aria": Written(
        3,
        in_text(0),
        56,
        router="router",
        shared=(in_text(0, "mlp.shared_experts"),),
        unusual={"transposed": True},
    ),
    "phimoe": Written(3, in_model(0), 56, router="router"),
    "granitemoe": Written(3, in_model(0, "block_sparse_moe"), 56, router="router"),
    "llava_mixtral": Written(3, in_text(0), 56),
    "nemotron_h": Written(
        2,
        in_model(0, "mixer"),
        40,
        shared=(in_model(0, "mixer.shared_experts"),),
        corrections=("gate.e_score_correction_bias",),
        unusual={"up": "up_proj", "gated": False, "width": 24},
    ),
}


def nemotron_h() -> nn.Module:
    """Experts without a gate, behind a projection to another width."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=56,
        layers_block_type=["moe", "attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=40,
        moe_latent_size=24,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        topk_group=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return NemotronHForCausalLM(config).eval()


FOUND: dict[str, Callable[[], nn.Module]] = SPARSE | {"nemotron_h": nemotron_h}
every_family = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(OLD, reason="not fused then"))
        if name == "aria"
        else name
        for name in WRITTEN
    ],
)


def described(found: Experts) -> dict[str, object]:
    return {key: value for key, value in vars(found).items() if key != "module"}


@every_family
def test_the_experts_of_every_family_are_found(name):
    model = FOUND[name]()
    found = experts(model)
    assert len(found) == WRITTEN[name].count
    first = next(iter(found.values()))
    assert described(first) == WRITTEN[name].fields()
    for path, each in found.items():
        assert each.path == path and model.get_submodule(path) is each.module
        assert all(model.get_submodule(shared) for shared in each.shared)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        assert {tensors[at].numel() for at in each.corrections} <= {NUM_EXPERTS}


def test_only_jetmoe_of_the_families_is_missing():
    assert set(FOUND) - set(WRITTEN) == {"jetmoe"}


def test_text_and_images_have_experts_of_their_own():
    found = list(experts(families.ernie4_5_vl_moe()).values())[:2]
    assert [each.path.split(".")[-2] for each in found] == ["text_moe", "vision_moe"]
    assert [each.inner for each in found] == [40, 24]
    assert all(each.router.rpartition(".")[0] == each.path.rpartition(".")[0] for each in found)
    assert found[0].corrections != found[1].corrections
    assert found[0].shared == found[1].shared


def answer(found: Experts, expert: int, input_D: Tensor) -> Tensor:
    """What one expert gives for one token, in float64, as the layout found says it is stored."""
    own = dict(found.module.named_parameters(recurse=False))

    def product(name: str, x: Tensor) -> Tensor:
        weight = own[name][expert].double()
        y = (weight.mT if found.transposed else weight) @ x
        return y + own[f"{name}_bias"][expert].double() if found.biased else y

    inner = product(found.up, input_D.double())
    if found.gated:
        halves = (inner[::2], inner[1::2]) if found.interleaved else inner.chunk(2)
        inner = gate_times_up(found.module, *halves)
    else:
        inner = found.module.act_fn(inner)
    assert inner.shape == (found.inner,)
    return product(found.down, inner)


def gate_times_up(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    if "act_fn" in module._modules:
        return module.act_fn(gate) * up
    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    return gate * torch.sigmoid(module.alpha * gate) * (up + 1)


def reference(found: Experts, args: tuple[Tensor, ...]) -> Tensor:
    if found.scales_input:
        of_expert = args[0].unflatten(0, (found.num_experts, -1))
        answers = [answer(found, e, x) for e, rows in enumerate(of_expert) for x in rows]
        return torch.stack(answers)
    input_TD, index_TK, weight_TK = args
    assert index_TK.shape[1] == found.top_k
    return torch.stack(
        [
            sum(w * answer(found, e, x) for e, w in zip(chosen, weights, strict=True))
            for x, chosen, weights in zip(input_TD, index_TK.tolist(), weight_TK, strict=True)
        ]
    )


def called(model: nn.Module, module: nn.Module) -> tuple[tuple[Tensor, ...], object]:
    """What `module` is given by position and gives back while the model reads two rows of text."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    model(**families.inputs(model))
    handle.remove()
    ((args, output),) = seen
    return args, output


@torch.no_grad()
def assert_answers_as_found(model: nn.Module) -> None:
    found = next(iter(experts(model).values()))
    for parameter in found.module.parameters():
        parameter.normal_()  # biases start at zero
    args, output = called(model, found.module)
    expected = reference(found, args)
    assert expected.abs().max() > 1e-2
    # fp32 against float64: measured 3e-7
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


@every_family
def test_a_reference_written_from_the_layout_answers_as_the_experts_do(name):
    model = FOUND[name]()
    model.set_experts_implementation("eager")
    assert_answers_as_found(model)


@torch.no_grad()
def test_llama4_weighs_what_its_experts_are_given():
    model = families.llama4()
    found = next(iter(experts(model).values()))
    (input_TD,), (score_TE, _) = called(model, model.get_submodule(found.router))
    (given_ND,), _ = called(model, found.module)
    assert (score_TE > 0).sum(1).eq(found.top_k).all()
    expected = score_TE.T[..., None] * input_TD
    assert torch.equal(given_ND.view_as(expected), expected)


def sized(name: str, inner: int) -> nn.Module:
    """A model of width 48 whose experts are as wide inside as said."""
    text = {"vocab_size": 128, "hidden_size": HIDDEN, "num_hidden_layers": 1, "head_dim": 12}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP_K}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if name == "llama4":
        sizes = {"intermediate_size": inner, "num_local_experts": NUM_EXPERTS}
        return Llama4ForCausalLM(Llama4TextConfig(**text, **sizes)).eval()
    sizes = {"moe_intermediate_size": inner, "num_experts": NUM_EXPERTS}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**text, **sizes)).eval()


@pytest.mark.parametrize("inner", [HIDDEN // 2, HIDDEN, 2 * HIDDEN])
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_square_stacks_are_told_apart(name, inner):
    model = sized(name, inner)
    found = next(iter(experts(model).values()))
    assert (found.width, found.inner, found.transposed) == (HIDDEN, inner, name == "llama4")
    model.set_experts_implementation("eager")
    assert_answers_as_found(model)


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_has_no_experts(name):
    assert experts(DENSE[name]()) == {}


@every_family
def test_experts_are_found_without_a_weight_in_memory(name):
    with torch.device("meta"):
        found = experts(FOUND[name]())
    assert described(next(iter(found.values()))) == WRITTEN[name].fields()


@every_family
def test_experts_are_found_where_zero3_has_taken_the_weights_away(name):
    model = FOUND[name]()
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = index, parameter.shape
        parameter.data = torch.empty(0)
    assert described(next(iter(experts(model).values()))) == WRITTEN[name].fields()


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4", "deepseek_v3"])
def test_adapters_and_wrappers_are_looked_through(name):
    model = FOUND[name]()
    before = experts(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    for found in before.values():
        for stack in (found.up, found.down):
            low = nn.Parameter(torch.zeros(NUM_EXPERTS, 2, HIDDEN))
            found.module.register_parameter(f"{stack}_lora_A", low)
    for found, old in zip(experts(wrapped).values(), before.values(), strict=True):
        names = {
            "path": bare(found.path),
            "router": bare(found.router),
            "shared": tuple(map(bare, found.shared)),
            "corrections": tuple(map(bare, found.corrections)),
        }
        assert replace(found, **names) == old
        assert wrapped.get_submodule(found.path) is old.module


def test_corrections_of_a_whole_block_are_found():
    config = Lfm2MoeConfig(
        num_hidden_layers=2, layer_types=["conv", "full_attention"], num_dense_layers=1
    )
    with torch.device("meta"):
        model = Lfm2MoeForCausalLM(config)
    (found,) = experts(model).values()
    assert found.corrections == ("model.layers.1.feed_forward.expert_bias",)


def test_stacks_in_a_module_each_are_refused_by_name():
    model = families.jetmoe()
    with pytest.raises(ValueError, match=r"E = 6 experts.*mlp.input_linear.weight \(6, 112, 48\)"):
        experts(model)


def test_experts_without_a_router_are_refused():
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(num_hidden_layers=5))
    with pytest.raises(ValueError, match="no router was found for .*layers.0.mlp.experts, "):
        experts(model)


def test_flags_that_the_shapes_contradict_are_refused():
    model = families.qwen3_moe()
    model.model.layers[0].mlp.experts.is_transposed = True
    with pytest.raises(ValueError, match=r"\(6, 80, 48\).*is_transposed=True"):
        experts(model)


def test_stacks_of_unequal_numbers_of_experts_are_refused():
    model = families.mixtral()
    module = model.model.layers[0].mlp.experts
    module.down_proj = nn.Parameter(module.down_proj[1:].detach())
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts .*is not known.*\(5, 48, 56\)"):
        experts(model)


class Plain(nn.Module):
    """Experts of a class without flags, given inputs alone."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def with_plain(**shapes: tuple[int, ...]) -> nn.Module:
    model = families.qwen3_moe()
    for layer in (0, 2):
        model.model.layers[layer].mlp.experts = Plain(**shapes)
    return model


@pytest.mark.parametrize("inner", [30, 48])
def test_without_a_gate_and_flags_shapes_do_not_tell(inner):
    model = with_plain(first=(6, inner, 48), second=(6, 48, inner))
    with pytest.raises(ValueError, match="is not known.*flags of the class: none"):
        experts(model)


def test_a_gate_without_flags_is_told_by_the_shapes():
    (found, _) = experts(with_plain(first=(6, 30, 48), second=(6, 48, 60))).values()
    assert (found.up, found.down, found.inner, found.transposed) == ("second", "first", 30, True)


def test_parameters_that_the_layout_does_not_explain_are_refused():
    model = with_plain(up=(6, 48, 60), down=(6, 30, 48), scale=(6,))
    with pytest.raises(ValueError, match=r"not understood: .*scale.*\(6,\)"):
        experts(model)


def test_two_modules_of_experts_equally_near_are_refused():
    model = families.qwen3_moe()
    block = model.model.layers[0].mlp
    block.others = Plain(up=(6, 48, 60), down=(6, 30, 48))
    with pytest.raises(ValueError, match="layers.0.mlp.experts, .*mlp.others are equally near"):
        experts(model)
