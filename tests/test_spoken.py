"""CoOp and LiT: what trains on the side of texts, against loops in float64, and whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip import reading_folder, tokenizer
from encoders import backbone
from mllm_cl import Recipe, run
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.spoken import Spoken, attach_words
from mllm_cl.model.texts import Reader
from test_class_incremental import NUMBER, TEST, TRAIN, recipe
from test_encoded import counted

TEMPLATES = ("{}", "a photo {}")
NAMES = ("red circle", "striped green square", "blue cross")
SCALE, NUMBER_OF_WORDS = 3.0, 2


def reader() -> Reader:
    return Reader(tokenizer(), TEMPLATES, 7)


def features(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))


def spoken(*, pairs: bool, names: tuple[str, ...] = NAMES) -> tuple[Spoken, Encoder]:
    encoder = Encoder(backbone("clip"))
    head = Spoken(encoder.width, encoder.text, scale=SCALE, pairs=pairs)
    head.grow(len(names))
    head.learn(names, reader())
    return head, encoder


def read(encoder: Encoder, text: str) -> torch.Tensor:
    """The unit feature of one text, float64."""
    found = encoder.text(**_named(reader().tokens([text])))[0].double()
    return found / found.norm()


def _named(tokens: dict) -> dict:
    return {"input_ids_CL": tokens["input_ids"], "attention_mask_CL": tokens["attention_mask"]}


def nll(logits: list[torch.Tensor], right: int) -> torch.Tensor:
    return torch.stack(logits).logsumexp(0) - logits[right]


def test_lits_loss_is_clips_without_negatives_of_ones_own_class():
    head, encoder = spoken(pairs=True)
    images, right = features(), [0, 1, 0, 2, 1]
    units = [image.double() / image.double().norm() for image in images]
    texts = [read(encoder, NAMES[label]) for label in right]
    expected = []
    for b, label in enumerate(right):
        others = [c for c, other in enumerate(right) if c == b or other != label]
        there = [SCALE * units[b] @ texts[c] for c in others]
        back = [SCALE * units[c] @ texts[b] for c in others]
        place = others.index(b)
        expected.append((nll(there, place) + nll(back, place)) / 2)
    found = head.precisely(head.train().losses, images, torch.tensor(right))
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_the_answer_is_by_all_prompts_and_training_by_the_first():
    head, encoder = spoken(pairs=False)
    for training, templates in ((True, TEMPLATES[:1]), (False, TEMPLATES)):
        rows = []
        for name in NAMES:
            parts = [read(encoder, template.replace("{}", name)) for template in templates]
            mean = sum(parts) / len(parts)
            rows.append(mean / mean.norm())
        unit = features().double() / features().double().norm(dim=1)[:, None]
        found = head.train(training)(features())
        expected = SCALE * unit @ torch.stack(rows).T
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert head.precisely(head.losses, features(), torch.tensor([0] * 5)) is None


def test_learnt_words_stand_where_their_places_are_and_nowhere_else():
    encoder = Encoder(backbone("clip"))
    embedding = encoder.backbone.text_model.embeddings.token_embedding
    made, words = attach_words(encoder, reader(), number=NUMBER_OF_WORDS)
    tokens = made.tokens(made.prompts(["red circle"]))
    assert made.prompts(["red circle"]) == ["X X red circle."]
    given = embedding(tokens["input_ids"])[0]
    plain = embedding.weight[tokens["input_ids"][0]]
    assert torch.equal(given[:NUMBER_OF_WORDS], words)
    assert torch.equal(given[NUMBER_OF_WORDS:], plain[NUMBER_OF_WORDS:])
    assert words.std() < 0.06  # N(0, 0.02^2)
    model = Classifier(encoder, Prototype(encoder.width), reader=made)
    before = model.texts(NAMES)
    with torch.no_grad():
        words.copy_(torch.randn(words.shape, generator=torch.Generator().manual_seed(3)))
    assert not torch.allclose(model.texts(NAMES), before, atol=1e-3)


def test_more_words_than_a_text_has_room_for_are_an_error():
    with pytest.raises(ValueError, match=r"8 learnt words do not fit .* 7 tokens"):
        attach_words(Encoder(backbone("clip")), reader(), number=8)


# Whole runs


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("clip"))


def spoken_run(folder: Path, model: Path, method: str, **settings) -> Recipe:
    classes = {"templates": [*TEMPLATES], "preprocessing": "clip", "stages": 2}
    tree = recipe(folder, model, method, **classes).resolved()
    tree["method"] |= {"words": NUMBER_OF_WORDS} if method == "coop" else {}
    tree["method"] |= settings
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.mark.parametrize(
    ("method", "trained"), [("coop", ("words",)), ("lit", ("text_model", "text_projection"))]
)
def test_the_side_of_texts_trains_on_images_that_are_encoded_once(method, trained, clip, tmp_path):
    with counted() as seen:
        run(spoken_run(tmp_path, clip, method))
    assert sum(seen) == 4 * TRAIN + NUMBER * TEST
    states = [load_file(tmp_path / f"task_{stage}/state.safetensors") for stage in (1, 2)]
    assert states[0].keys() == states[1].keys()
    assert all(any(part in name for part in trained) for name in states[0])
    assert all(not torch.equal(states[0][name], states[1][name])
               for name in states[0] if "words" in name or "text_projection" in name)  # fmt: skip


def test_exemplars_of_the_past_are_trained_on_if_asked_for(clip, tmp_path):
    run(spoken_run(tmp_path, clip, "coop", memory_per_class=2))
    memory = load_file(tmp_path / "task_2/memory.safetensors")
    assert memory["coop/exemplars/label"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
