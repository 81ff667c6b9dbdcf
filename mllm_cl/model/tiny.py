"""Vision-language models of one or two million parameters, with tokenizer and processor, offline.

`tiny_qwen3_vl_moe` has experts and routers from birth; `tiny_llava` is dense. The quickstart and
the tests use them; what they save is an ordinary Hugging Face folder.
"""

from itertools import chain
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from mllm_cl.data.toy import BASE_SKILLS, TOY_TASKS, toy_task

KINDS = ("qwen3-vl-moe", "llava")
WIDTH = 128
IMAGE, IMAGE_START, IMAGE_END, VIDEO = (
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML; {% generation %} marks what the assistant said: `return_assistant_tokens_mask` reads it.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- elif message['content'] is string %}{{- message['content'] + '<|im_end|>' }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def _toy_texts() -> list[str]:
    """Every question and answer of the toy tasks, as they stand in a chat."""
    tasks = [toy_task(name, "train", 0) for name in BASE_SKILLS + TOY_TASKS]
    texts = chain.from_iterable(task.questions + task.answers for task in tasks)
    return ["user\n", "assistant\n", "system\n", *dict.fromkeys(texts)]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the toy tasks is one token.

    Any other text still round-trips.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging stops when every word is whole
        min_frequency=1,
        special_tokens=[PAD, START, END, IMAGE_START, IMAGE_END, IMAGE, VIDEO],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_toy_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, IMAGE_START, IMAGE_END, IMAGE, VIDEO],
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def _qwen_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Qwen's image grid without Qwen's video processor, which needs torchvision even for pictures.

    PaddleOCR-VL's processor is the stock class that is exactly (image processor, tokenizer) with
    Qwen's rule `tokens = t * h * w / merge^2` and `mm_token_type_ids`; being stock, `AutoProcessor`
    reloads the folder also in a process that has not imported this package (transformers 5.17 does
    so only where torchvision is; `load_processor` always).
    """
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return PaddleOCRVLProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE
    )


def _llava_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def toy_processor(kind: str) -> ProcessorMixin:
    """The processor of a tiny model; it needs no torchvision."""
    make = {"qwen3-vl-moe": _qwen_processor, "llava": _llava_processor}
    if kind not in make:
        raise ValueError(f"unknown tiny model {kind!r}; choose one of {', '.join(KINDS)}")
    return make[kind](toy_tokenizer())


def tiny_qwen3_vl_moe(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Qwen3-VL-MoE: 3 layers, 8 experts, 2 per token; 64 px become 16 image tokens."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
        },
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(IMAGE_START),
        vision_end_token_id=token(IMAGE_END),
        tie_word_embeddings=True,
    )
    return _ready(Qwen3VLMoeForConditionalGeneration(config), tokenizer)


def tiny_llava(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained dense LLaVA: a 3-layer CLIP tower of 16 patches and a 3-layer Llama."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    return _ready(LlavaForConditionalGeneration(config), tokenizer)


def _ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model, told when `generate` has to stop."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def tiny_model(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An untrained tiny model whose weights depend on `seed` alone.

    The caller's random state is left as it was.
    """
    make = {"qwen3-vl-moe": tiny_qwen3_vl_moe, "llava": tiny_llava}
    if kind not in make:
        raise ValueError(f"unknown tiny model {kind!r}; choose one of {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make[kind](tokenizer)


def save_tiny(folder: str | Path, kind: str, seed: int) -> Path:
    """Writes an untrained model with tokenizer and processor; the Auto classes load the folder."""
    processor = toy_processor(kind)
    tiny_model(kind, processor.tokenizer, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def tiny_base(kind: str) -> Path:
    """The folder of the trained base that ships with the package (recipes/make_base.py)."""
    folder = Path(__file__).parent.parent / "assets" / f"tiny-{kind}"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no base of kind {kind!r} at {folder}; found {KINDS}, or run recipes/make_base.py"
        )
    return folder
