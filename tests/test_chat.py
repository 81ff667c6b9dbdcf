"""The collator labels the answer and nothing else, for every way a batch can be mixed."""

import datasets
import pytest
import torch
from transformers import ProcessorMixin

from mllm_cl.data.chat import IGNORE, ChatCollator
from mllm_cl.data.toy import toy_task
from mllm_cl.model.tiny import IMAGE, KINDS, tiny_model, toy_processor, toy_tokenizer


@pytest.fixture(scope="module", params=KINDS)
def processor(request: pytest.FixtureRequest) -> ProcessorMixin:
    return toy_processor(request.param)


def _text_sample(question: str, answer: str) -> dict:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"id": f"text-{question}", "messages": messages, "images": []}


def _two_image_sample() -> dict:
    first, second = toy_task("bars", "train", 2)
    content = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": content}, first["messages"][1]]
    return {"id": "two", "messages": messages, "images": first["images"] + second["images"]}


def _mixed() -> list[dict]:
    return [
        *toy_task("word", "train", 2),
        _text_sample("Say a longer thing.", "Grüße, a b"),
        _two_image_sample(),
    ]


def test_labels_decode_to_exactly_the_answer_and_its_end_of_turn(processor: ProcessorMixin):
    batch = ChatCollator(processor)(_mixed())
    for sample, input_T, label_T in zip(_mixed(), batch["input_ids"], batch["labels"], strict=True):
        answer = sample["messages"][-1]["content"][0]["text"]
        assert processor.tokenizer.decode(label_T[label_T != IGNORE]) == answer + "<|im_end|>"
        assert torch.equal(label_T[label_T != IGNORE], input_T[label_T != IGNORE])


def test_training_pads_right_and_prompts_pad_left(processor: ProcessorMixin):
    pad = processor.tokenizer.pad_token_id
    train, prompt = (
        ChatCollator(processor)(_mixed()),
        ChatCollator(processor, prompt_only=True)(_mixed()),
    )
    assert "labels" not in prompt
    assert (train["attention_mask"].diff(dim=1) <= 0).all() and (
        prompt["attention_mask"].diff(dim=1) >= 0
    ).all()
    for batch in (train, prompt):
        assert (batch["attention_mask"] == 0).any()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == pad).all()


def test_a_prompt_is_exactly_what_training_sees_before_the_answer(processor: ProcessorMixin):
    train, prompt = (
        ChatCollator(processor)(_mixed()),
        ChatCollator(processor, prompt_only=True)(_mixed()),
    )
    for row in range(4):
        before = (train["labels"][row] == IGNORE) & (train["attention_mask"][row] == 1)
        assert torch.equal(
            train["input_ids"][row][before],
            prompt["input_ids"][row][prompt["attention_mask"][row] == 1],
        )


def test_the_collator_passes_on_what_the_processor_returns():
    batch = ChatCollator(toy_processor("qwen3-vl-moe"))(_mixed())
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8]] * 4
    assert batch["pixel_values"].shape == (4 * 64, 3 * 2 * 8 * 8)
    image = toy_tokenizer().convert_tokens_to_ids(IMAGE)
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == image)
    assert ChatCollator(toy_processor("llava"))(_mixed())["pixel_values"].shape == (4, 3, 64, 64)


def test_text_only_batches_have_no_pixels_and_train(processor: ProcessorMixin):
    kind = "llava" if "Llava" in type(processor).__name__ else "qwen3-vl-moe"
    batch = ChatCollator(processor)(
        [_text_sample("one", "two"), _text_sample("three is long", "four")]
    )
    assert "pixel_values" not in batch
    model = tiny_model(kind, processor.tokenizer, seed=0)
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_the_loss_of_a_mixed_batch_is_the_mean_over_answer_tokens_of_its_samples(
    processor: ProcessorMixin,
):
    """Padding, pictures of the neighbours and text-only neighbours do not leak into a sample."""
    kind = "llava" if "Llava" in type(processor).__name__ else "qwen3-vl-moe"
    model, collate = tiny_model(kind, processor.tokenizer, seed=0).eval(), ChatCollator(processor)
    with torch.no_grad():
        together = model(**collate(_mixed())).loss
        single = [collate([sample]) for sample in _mixed()]
        losses = torch.stack([model(**batch).loss for batch in single])
    counts = torch.tensor([(batch["labels"] != IGNORE).sum() for batch in single])
    torch.testing.assert_close(
        together, (losses * counts).sum() / counts.sum(), rtol=1e-4, atol=1e-5
    )


def test_left_padded_generation_answers_as_each_prompt_alone(processor: ProcessorMixin):
    kind = "llava" if "Llava" in type(processor).__name__ else "qwen3-vl-moe"
    model, collate = (
        tiny_model(kind, processor.tokenizer, seed=0).eval(),
        ChatCollator(processor, prompt_only=True),
    )
    batch = collate(_mixed())
    scores = model.generate(
        **batch,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, sample in enumerate(_mixed()):
        alone = model.generate(
            **collate([sample]),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for step in range(2):
            torch.testing.assert_close(
                scores.logits[step][row], alone.logits[step][0], rtol=1e-3, atol=1e-4
            )


def test_samples_survive_arrow_which_adds_empty_fields(processor: ProcessorMixin):
    rows = datasets.Dataset.from_list(
        [
            {key: sample[key] for key in ("id", "messages")}
            for sample in toy_task("bars", "train", 3)
        ]
    )
    images = [sample["images"] for sample in toy_task("bars", "train", 3)]
    assert "text" in rows[0]["messages"][0]["content"][0]  # Arrow's None beside {"type": "image"}
    samples = [{**row, "images": image} for row, image in zip(rows, images, strict=True)]
    plain, arrow = (
        ChatCollator(processor)(toy_task("bars", "train", 3)),
        ChatCollator(processor)(samples),
    )
    assert all(torch.equal(plain[key], arrow[key]) for key in plain)


def test_too_long_a_sample_is_named_and_never_cut(processor: ProcessorMixin):
    long = _text_sample("word " * 60, "yes")
    for prompt_only in (False, True):
        with pytest.raises(ValueError, match=r"sample text-word .* max_length is 40"):
            ChatCollator(processor, max_length=40, prompt_only=prompt_only)(
                [*toy_task("bars", "train", 1), long]
            )
    assert (
        ChatCollator(processor, max_length=40)(toy_task("bars", "train", 1))["input_ids"].shape[1]
        <= 40
    )


def test_a_template_that_does_not_continue_its_prompt_is_refused():
    processor = toy_processor("qwen3-vl-moe")
    template = processor.chat_template.replace("<|im_start|>assistant", "<|im_start|>bot")
    assert template != processor.chat_template
    processor.chat_template = template
    with pytest.raises(ValueError, match="bars-train-0-0: this chat template does not continue"):
        ChatCollator(processor)(toy_task("bars", "train", 1))


def test_a_prompt_that_ends_inside_a_token_is_refused():
    processor = toy_processor("qwen3-vl-moe")
    processor.chat_template = "{{ 'answer: colou' if add_generation_prompt else 'answer: colour' }}"
    with pytest.raises(ValueError, match="the tokens of the prompt are not the first tokens"):
        ChatCollator(processor)([_text_sample("q", "r")])


def test_a_template_without_end_of_turn_gets_the_end_of_sequence_token():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ 'USER: ' + m.content + ' ASSISTANT: ' if m.role == 'user' else m.content + ' ' }}"
        "{% endfor %}"
    )
    batch = ChatCollator(tokenizer)([_text_sample("Which?", "red")])
    label_T = batch["labels"][0]
    assert tokenizer.decode(label_T[label_T != IGNORE]) == "red<|im_end|>"


def test_a_beginning_of_sequence_token_written_by_the_template_is_not_doubled():
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    batch = ChatCollator(tokenizer)([_text_sample("Which?", "red")])
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 1
    label_T = batch["labels"][0]
    assert tokenizer.decode(label_T[label_T != IGNORE]) == "red<|im_end|>"


def test_missing_images_and_missing_answers_are_named(processor: ProcessorMixin):
    sample = toy_task("bars", "train", 1)[0]
    with pytest.raises(
        ValueError, match="bars-train-0-0: the messages refer to 1 images, the sample has 0"
    ):
        ChatCollator(processor)([{**sample, "images": []}])
    with pytest.raises(ValueError, match="bars-train-0-0: the last of at least two messages"):
        ChatCollator(processor)([{**sample, "messages": sample["messages"][:1]}])
