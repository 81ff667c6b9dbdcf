"""Tiny random models of many families for tests: `FAMILIES[name]()`, and `inputs(model)`.

Sizes differ (width 48, 6 experts, feed-forward 56 and 40), so that a transposed or mistaken weight
does not pass for the right one. Image encoders are there, but text alone runs in every model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

NUM_EXPERTS = 6
TOP_K = 2
HIDDEN = 48
NUM_LAYERS = 3

_TEXT = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # A wider initialisation than a checkpoint's: routing must differ visibly between tokens.
    "initializer_range": 0.2,
}
_ROUTED = {"num_experts_per_tok": TOP_K, "moe_intermediate_size": 40}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _built(cls: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(config).eval()


def _qwen_vision(**extra: object) -> dict[str, object]:
    sizes = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_heads": 2,
        "patch_size": 8,
    }
    rest = {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": HIDDEN}
    return sizes | rest | extra


def qwen3_vl_moe() -> nn.Module:
    text = (
        _TEXT
        | _ROUTED
        | {"num_experts": NUM_EXPERTS, "rope_parameters": _ROPE, "mlp_only_layers": [0]}
    )
    vision = _qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0])
    return _built(
        Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )


def qwen3_5_moe() -> nn.Module:
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    text = (
        _TEXT
        | _ROUTED
        | linear
        | {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 24}
    )
    text |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text |= {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}}
    vision = _qwen_vision(num_position_embeddings=16)
    return _built(
        Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    )


def qwen3_moe() -> nn.Module:
    config = Qwen3MoeConfig(**_TEXT, **_ROUTED, num_experts=NUM_EXPERTS, mlp_only_layers=[1])
    return _built(Qwen3MoeForCausalLM, config)


def mixtral() -> nn.Module:
    config = MixtralConfig(**_TEXT, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    return _built(MixtralForCausalLM, config)


def olmoe() -> nn.Module:
    config = OlmoeConfig(**_TEXT, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    return _built(OlmoeForCausalLM, config)


def deepseek_v3() -> nn.Module:
    latent = {
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    }
    text = {
        key: value for key, value in _TEXT.items() if key not in ("head_dim", "num_key_value_heads")
    }
    routed = _ROUTED | {
        "n_routed_experts": NUM_EXPERTS,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    }
    return _built(
        DeepseekV3ForCausalLM, DeepseekV3Config(**text, **latent, **routed, num_key_value_heads=4)
    )


def glm4v_moe() -> nn.Module:
    text = _TEXT | _ROUTED | {"n_routed_experts": NUM_EXPERTS, "first_k_dense_replace": 1}
    text |= {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}}
    vision = _qwen_vision(image_size=16)
    return _built(
        Glm4vMoeForConditionalGeneration, Glm4vMoeConfig(text_config=text, vision_config=vision)
    )


def llama4() -> nn.Module:
    text = _TEXT | {
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "intermediate_size_mlp": 56,
    }
    text |= {"moe_layers": [1, 2]}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    image = {"image_size": 16, "patch_size": 8, "vision_output_dim": 32}
    projector = {"projector_input_dim": 32, "projector_output_dim": 32}
    config = Llama4Config(text_config=text, vision_config=sizes | image | projector)
    return _built(Llama4ForConditionalGeneration, config)


def gpt_oss() -> nn.Module:
    config = GptOssConfig(**_TEXT, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    return _built(GptOssForCausalLM, config)


def gemma4() -> nn.Module:
    text = _TEXT | {"enable_moe_block": True, "num_experts": NUM_EXPERTS, "top_k_experts": TOP_K}
    text |= {"moe_intermediate_size": 40, "hidden_size_per_layer_input": 0, "global_head_dim": 12}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 8,
        "position_embedding_size": 16,
    }
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    return _built(Gemma4ForConditionalGeneration, config)


def ernie4_5_vl_moe() -> nn.Module:
    text = _TEXT | {"moe_num_experts": NUM_EXPERTS, "moe_k": TOP_K, "moe_num_shared_experts": 1}
    text |= {"moe_intermediate_size": [40, 24], "mlp_layer_types": ["dense", "sparse", "sparse"]}
    text |= {"rope_parameters": _ROPE}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_heads": 2,
        "patch_size": 8,
    }
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    return _built(Ernie4_5_VLMoeForConditionalGeneration, config)


def aria() -> nn.Module:
    text = _TEXT | {"moe_num_experts": NUM_EXPERTS, "moe_topk": TOP_K, "moe_num_shared_experts": 1}
    vision = _CLIP | {"model_type": "idefics3_vision"}
    config = AriaConfig(text_config=text | {"model_type": "aria_text"}, vision_config=vision)
    config.projector_patch_to_query_dict = {4: 2}
    return _built(AriaForConditionalGeneration, config)


def phimoe() -> nn.Module:
    config = PhimoeConfig(**_TEXT, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    return _built(PhimoeForCausalLM, config)


def granitemoe() -> nn.Module:
    config = GraniteMoeConfig(**_TEXT, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    return _built(GraniteMoeForCausalLM, config)


def jetmoe() -> nn.Module:
    """Routes its attention as well: two routers per layer."""
    text = {
        key: _TEXT[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    routed = {
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "initializer_range": 0.2,
    }
    return _built(
        JetMoeForCausalLM, JetMoeConfig(**text, **routed, num_key_value_heads=2, kv_channels=12)
    )


def _llava(text_config: object) -> nn.Module:
    config = LlavaConfig(
        vision_config=_CLIP, text_config=text_config, image_token_index=127, image_seq_length=4
    )
    return _built(LlavaForConditionalGeneration, config)


def llava_mixtral() -> nn.Module:
    """A dense composite class around a sparse model: its own class declares no routers."""
    return _llava(MixtralConfig(**_TEXT, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K))


def llava() -> nn.Module:
    return _llava(_TEXT | {"model_type": "llama"})


def qwen3_vl() -> nn.Module:
    vision = _qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0])
    config = Qwen3VLConfig(text_config=_TEXT | {"rope_parameters": _ROPE}, vision_config=vision)
    return _built(Qwen3VLForConditionalGeneration, config)


def qwen2() -> nn.Module:
    return _built(
        Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in _TEXT.items() if k != "head_dim"})
    )


_SPARSE_BUILDERS = (
    qwen3_vl_moe,
    qwen3_5_moe,
    qwen3_moe,
    mixtral,
    olmoe,
    deepseek_v3,
    glm4v_moe,
    llama4,
    gpt_oss,
    gemma4,
    ernie4_5_vl_moe,
    aria,
    phimoe,
    granitemoe,
    jetmoe,
    llava_mixtral,
)
SPARSE: dict[str, Callable[[], nn.Module]] = {build.__name__: build for build in _SPARSE_BUILDERS}
DENSE: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (llava, qwen3_vl, qwen2)
}
FAMILIES: dict[str, Callable[[], nn.Module]] = SPARSE | DENSE


def inputs(model: nn.Module, num_tokens: int = 7) -> dict[str, Tensor]:
    """Two rows of text without special tokens, the same for every model."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(10, 100, (2, num_tokens), generator=generator)
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": torch.ones_like(input_ids, device=model.device),
    }
