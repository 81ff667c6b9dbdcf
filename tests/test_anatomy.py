"""Routers and linear layers are found in every family by what models declare, none being named."""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    LongcatFlashConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ZayaConfig,
)

import families
from families import DENSE, FAMILIES, HIDDEN, NUM_EXPERTS, SPARSE, TOP_K
from mllm_cl.model import anatomy
from mllm_cl.model.linears import linears
from mllm_cl.model.moe_lora import attach_moe_lora
from mllm_cl.model.walk import walk

# What several families say of their routers came between the two versions that we test.
OLD = Version(transformers.__version__) < Version("5.23")

# Sparse layers x routers per layer, by hand from the configs: 3 layers, of which some are dense.
NUM_ROUTERS = dict.fromkeys(SPARSE, 3) | {
    "qwen3_vl_moe": 2,
    "qwen3_moe": 2,
    "deepseek_v3": 2,
    "glm4v_moe": 2,
    "llama4": 2,
    "ernie4_5_vl_moe": 2 * 2,  # one for text, one for images
    "jetmoe": 3 * 2,  # one for attention, one for the feed-forward
}


def sparse(names: list[str] | None = None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names or list(SPARSE))


def inputs(model: nn.Module, *, images: bool = False) -> dict[str, Tensor]:
    """Text; with `images` every other token says it is one where the model routes those apart."""
    given = families.inputs(model)
    if images and "moe_mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["moe_mm_token_type_ids"] = (
            torch.arange(given["input_ids"].numel()).view_as(given["input_ids"]) % 2
        )
    return given


@contextmanager
def recomputed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The logits of each router that is called inside the context."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            seen[name] = anatomy.logits(module, args[0])

        return keep

    handles = [
        module.register_forward_hook(hook(name)) for name, module in anatomy.routers(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


@contextmanager
def chosen(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The (T, k) expert indices that modules named `experts` are given inside the context."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = next(arg for arg in args if not arg.is_floating_point())

        return keep

    handles = [
        m.register_forward_pre_hook(hook(n))
        for n, m in model.named_modules()
        if n.endswith(".experts")
    ]
    yield seen
    for handle in handles:
        handle.remove()


@sparse()
def test_every_sparse_layer_has_its_routers(name):
    model = SPARSE[name]()
    found = anatomy.routers(model)
    assert len(found) == NUM_ROUTERS[name]
    assert all(model.get_submodule(at) is module for at, module in found.items())
    assert {tuple(module.weight.shape) for module in found.values()} == {(NUM_EXPERTS, HIDDEN)}
    assert len({id(module) for module in found.values()}) == len(found)


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_has_no_routers(name):
    assert anatomy.routers(DENSE[name]()) == {}


@sparse()
@torch.no_grad()
def test_what_was_found_is_what_routes(name):
    model = SPARSE[name]()
    given = inputs(model, images=True)
    before = model(**given).logits
    for module in anatomy.routers(model).values():
        kept = module.weight.clone()
        module.weight.copy_(-kept)
        assert (model(**given).logits - before).abs().max() > 1e-4
        module.weight.copy_(kept)
    assert torch.equal(model(**given).logits, before)


# Not in these: a composite class around a sparse language model returns no router logits.
@sparse([name for name in SPARSE if name != "llava_mixtral"])
@torch.no_grad()
def test_recomputed_logits_are_those_the_model_returns(name):
    model = SPARSE[name]()
    with recomputed(model) as seen:
        returned = model(**inputs(model), output_router_logits=True).get("router_logits")
    if returned is None and OLD:
        pytest.skip(f"transformers {transformers.__version__} returns no router logits here")
    if name == "gemma4":  # which returns probabilities under that name
        seen = {at: logits_TE.softmax(-1) for at, logits_TE in seen.items()}
    assert seen
    for logits_TE in seen.values():
        assert logits_TE.std() > 1e-3
        assert any(
            torch.allclose(logits_TE, other.view_as(logits_TE), atol=1e-5) for other in returned
        )
    for other in returned:
        assert any(
            torch.allclose(logits_TE, other.view_as(logits_TE), atol=1e-5)
            for logits_TE in seen.values()
        )


# Not in these: llama4 runs every expert on every token, jetmoe hands its experts sorted tokens.
@sparse([name for name in SPARSE if name not in ("llama4", "jetmoe")])
@torch.no_grad()
def test_the_largest_recomputed_logits_are_the_experts_that_run(name):
    if name == "aria" and OLD:
        pytest.skip(f"the experts of transformers {transformers.__version__} are given no indices")
    model = SPARSE[name]()
    with recomputed(model) as seen, chosen(model) as ran:
        model(**inputs(model, images=True))
    assert len(seen) == len(ran) == NUM_ROUTERS[name]
    for logits_TE, index_TK in zip(seen.values(), ran.values(), strict=True):
        assert torch.equal(logits_TE.topk(TOP_K).indices.sort().values, index_TK.sort().values)


def test_logits_are_differentiable_and_fp32_also_under_autocast():
    router = nn.Linear(HIDDEN, NUM_EXPERTS, dtype=torch.bfloat16)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE = anatomy.logits(router, x)
    exact = x.view(-1, HIDDEN).double() @ router.weight.double().T + router.bias.double()
    assert logits_TE.dtype == torch.float32
    assert (logits_TE - exact).abs().max() < 1e-5
    logits_TE.sum().backward()
    assert router.weight.grad.abs().sum() > 0 and router.bias.grad.abs().sum() > 0


@sparse()
def test_the_experts_of_a_token_are_counted(name):
    assert anatomy.top_k(SPARSE[name]()) == dict.fromkeys(anatomy.routers(SPARSE[name]()), TOP_K)


def test_an_unknown_number_of_experts_per_token_is_an_error():
    model = families.gemma4()
    model.model.language_model.config.top_k_experts = None
    with pytest.raises(ValueError, match="layers.0.router.proj is not known.*Gemma4TextModel"):
        anatomy.top_k(model)


@sparse()
def test_a_router_class_of_another_name_is_found(name):
    model = SPARSE[name]()
    before = anatomy.routers(model)
    for module in list(model.modules()):
        # What PEFT wrappers and parametrizations do as well: a subclass made on the spot.
        module.__class__ = type("Other", (type(module),), {})
    assert anatomy.routers(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_named(name):
    for function in (anatomy.routers, linears, walk):
        assert name not in inspect.getsource(inspect.getmodule(function))


def router_shapes(config: PreTrainedConfig) -> set[tuple[int, ...]]:
    """Those of the routers of a model that is built without weights."""
    with torch.device("meta"):
        found = anatomy.routers(AutoModelForCausalLM.from_config(config))
    return {tuple(module.weight.shape) for module in found.values()}


_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
_LAYERS = {"intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}


def test_unusual_routers_are_found():
    doge = DogeConfig(**_SMALL, **_LAYERS, is_moe=True, num_experts=25, num_experts_per_tok=3)
    dense_doge = DogeConfig(**_SMALL, **_LAYERS, num_experts=25)
    zaya = ZayaConfig(**_SMALL, **_LAYERS, num_experts=6, router_hidden_size=16)
    # Product keys: two halves of sqrt(25) scores. A seventh expert that skips.
    assert router_shapes(doge) == {(10, 32)}
    assert router_shapes(dense_doge) == set()
    assert router_shapes(zaya) == {(7, 16)}


@pytest.mark.skipif(OLD, reason=f"LongCat declares no routers in {transformers.__version__}")
def test_a_router_to_experts_that_do_nothing_is_found():
    latent = {"kv_lora_rank": 16, "q_lora_rank": 24}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    routed = {"num_layers": 1, "n_routed_experts": 6, "zero_expert_num": 2}
    assert router_shapes(LongcatFlashConfig(**_SMALL, **latent, **heads, **routed)) == {(8, 32)}


def silent(model: nn.Module) -> nn.Module:
    """The model of a class, in which no submodel declares what it records."""
    for module in [m for m in model.modules() if isinstance(m, PreTrainedModel)]:
        module.__class__ = type("Silent", (type(module),), {"_can_record_outputs": None})
    return model


# Not in these: gemma4's router is a part of the layer, among projections of any width.
@sparse([name for name in SPARSE if name != "gemma4"])
def test_routers_that_no_class_declares_are_found_beside_their_experts(name):
    declared = anatomy.routers(SPARSE[name]())
    assert list(anatomy.routers(silent(SPARSE[name]()))) == list(declared)


def test_adapters_that_are_mixtures_are_no_experts_of_the_model():
    model = silent(families.deepseek_v3())
    before = anatomy.routers(model)
    shared = linears(model, ["shared_experts.down_proj"])
    attach_moe_lora(model, shared, num_experts=NUM_EXPERTS, rank=2, alpha=4.0)
    assert anatomy.routers(model) == before


def test_experts_beside_two_weights_that_may_route_are_refused():
    model = silent(families.mixtral())
    for layer in model.model.layers:
        layer.mlp.other = nn.Linear(HIDDEN, NUM_EXPERTS)
    with pytest.raises(
        ValueError, match=r"num_local_experts=6.*no router was found.*_can_record_outputs.*no class"
    ):
        anatomy.routers(model)


def test_experts_behind_an_undeclared_router_are_refused():
    model = families.mixtral()
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(HIDDEN, NUM_EXPERTS)
    with pytest.raises(ValueError, match="no router was found.*no module of the classes declared"):
        anatomy.routers(model)


def test_a_sparse_family_with_dense_layers_alone_is_dense():
    model = families.qwen3_moe()
    config = model.config
    config.mlp_only_layers = list(range(config.num_hidden_layers))
    assert anatomy.routers(type(model)(config)) == {}


def test_a_recorded_module_without_a_routing_weight_is_refused():
    model = families.gemma4()
    router = model.model.language_model.layers[1].router
    router.proj = nn.Sequential(nn.Linear(HIDDEN, 20), nn.Linear(20, NUM_EXPERTS + 1))
    with pytest.raises(
        ValueError, match=r"layers.1.router \(Gemma4TextRouter\).*one row per expert.*\(7, 20\)"
    ):
        anatomy.routers(model)


def test_a_fused_kernel_around_the_router_is_refused():
    model = families.gpt_oss()
    block = model.model.layers[1].mlp
    block.__class__ = type("Marked", (type(block),), {"kernel_layer_name": "MoeMLP"})
    block.forward = types.MethodType(type(block).forward, block)  # what falling back leaves behind
    assert len(anatomy.routers(model)) == 3
    block.forward = types.MethodType(lambda self, hidden_states: hidden_states, block)
    with pytest.raises(ValueError, match="layers.1.mlp.router runs a fused kernel.*use_kernels"):
        anatomy.routers(model)


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (
            families.mixtral,
            LoraConfig(target_parameters=["mlp.gate.weight"], target_modules=["q_proj"]),
        ),
        (
            families.qwen3_vl_moe,
            LoraConfig(target_parameters=["mlp.gate.weight"], target_modules=["q_proj"]),
        ),
        (families.gemma4, LoraConfig(r=NUM_EXPERTS, target_modules=r".*layers\.\d\.router\.proj")),
    ],
)
def test_peft_around_a_router_is_looked_through(build, config):
    model = build()
    before = anatomy.routers(model)
    wrapped = get_peft_model(model, config)
    found = anatomy.routers(wrapped)
    assert [id(module) for module in found.values()] == [id(module) for module in before.values()]
    assert all(wrapped.get_submodule(name) is module for name, module in found.items())
    assert set(anatomy.top_k(wrapped).values()) == {TOP_K}


@torch.no_grad()
def test_logits_inside_peft_are_those_of_the_adapted_router():
    config = LoraConfig(target_parameters=["mlp.gate.weight"], init_lora_weights=False)
    model = get_peft_model(families.mixtral(), config).eval()
    with recomputed(model) as seen:
        returned = model(**families.inputs(model), output_router_logits=True).router_logits
    for logits_TE, expected_TE in zip(seen.values(), returned, strict=True):
        torch.testing.assert_close(logits_TE, expected_TE)


def test_a_router_that_peft_saves_whole_is_its_trained_copy():
    model = get_peft_model(
        families.mixtral(), LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    )
    found = anatomy.routers(model)
    assert len(found) == 3
    assert all(module.weight.requires_grad for module in found.values())
    assert anatomy.top_k(model) == dict.fromkeys(found, TOP_K)
    with model.disable_adapter():
        assert not any(module.weight.requires_grad for module in anatomy.routers(model).values())


def test_a_parametrized_router_is_still_found():
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = families.mixtral()
    before = anatomy.routers(model)
    for module in before.values():
        parametrize.register_parametrization(module, "weight", Halved())
    assert anatomy.routers(model) == before


def ends(modules: dict[str, nn.Module]) -> set[str]:
    return {name.rpartition(".")[2] for name in modules}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llava_mixtral", "aria", "llama4", "gemma4"])
def test_names_stay_in_the_language_model_unless_told(name):
    model = FAMILIES[name]()
    language = linears(model, ["q_proj", "v_proj"])
    assert len(language) == 2 * families.NUM_LAYERS
    assert all(at.startswith(("model.language_model.", "language_model.")) for at in language)
    vision = linears(model, "all-linear", scope="vision")
    assert vision and not language.keys() & vision.keys()
    everything = linears(model, "all-linear", scope="all")
    assert everything.keys() > vision.keys() | language.keys()


def test_a_regular_expression_reaches_everything_and_can_be_held_back():
    model = families.llava()
    reached = linears(model, r".*\.(q_proj|linear_1)")
    assert len(reached) == 3 + 2 + 1
    held = linears(model, r".*\.(q_proj|linear_1)", scope="language")
    assert held == linears(model, ["q_proj"])


def test_dotted_names_choose_by_what_is_around():
    model = families.qwen3_5_moe()
    assert (
        len(linears(model, ["down_proj"])) == len(linears(model, ["shared_expert.down_proj"])) == 3
    )
    assert len(linears(model, ["layers.1.self_attn.q_proj"])) == 1
    assert linears(model, ["down_proj"]) == linears(model, ["down_proj", "shared_expert.down_proj"])


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_leaves_routers_and_heads_out(name):
    model = FAMILIES[name]()
    found = linears(model, "all-linear")
    assert found and all(type(module) is nn.Linear for module in found.values())
    assert not {id(module) for module in found.values()} & {
        id(module) for module in anatomy.routers(model).values()
    }
    assert not {"lm_head", "embed_tokens"} & ends(found)
    assert ends(linears(model, ["lm_head"])) == {"lm_head"}


def test_linear_layers_keep_their_names_inside_peft():
    model = get_peft_model(families.llava(), LoraConfig(target_modules=["q_proj"]))
    found = linears(model, ["q_proj", "v_proj"])
    assert len(found) == 6
    assert all(model.get_submodule(at) is module for at, module in found.items())
    assert all(module.weight.shape[1] == HIDDEN for module in found.values())
    assert len(linears(model, r"model\.language_model\.layers\.0\.self_attn\..*")) == 4


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["q_proj", "v_porj"],
            "'v_porj' matches no linear layer of scope 'language'. Nearest: v_proj",
        ),
        (["self_attn.qproj"], "Nearest: self_attn.q_proj"),
        (["linear_1"], "outside, such as model.multi_modal_projector.linear_1: pass scope='all'"),
        (["input_layernorm"], "is no nn.Linear but LlamaRMSNorm"),
        ("q_proj", "put names into a list"),
        ("(q_proj", "no regular expression"),
        ([], "no pattern given"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_helps(patterns, message):
    with pytest.raises(ValueError) as error:
        linears(families.llava(), patterns)
    assert message in str(error.value)


def test_vision_of_a_text_model_is_an_error():
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no image encoder"):
        linears(families.qwen2(), ["q_proj"], scope="vision")


def test_an_unknown_scope_is_an_error():
    with pytest.raises(ValueError, match="scope is one of language, vision, all, not 'text'"):
        linears(families.qwen2(), ["q_proj"], scope="text")


def test_plain_modules_have_linear_layers_and_no_routers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert anatomy.routers(model) == {}
    assert list(linears(model, "all-linear")) == ["0", "2"]


def test_the_table_counts_modules_and_weights():
    model = families.mixtral()
    shown = anatomy.table(anatomy.routers(model) | linears(model, ["k_proj"]))
    names, counts, shapes, weights = (list(column.cells) for column in shown.columns)
    assert names == ["model.layers.*.mlp.gate", "model.layers.*.self_attn.k_proj", "total"]
    assert (counts, shapes) == (["3", "3", "6"], ["6 x 48", "24 x 48", ""])
    assert weights == ["864", "3,456", "4,320"]
