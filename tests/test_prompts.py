"""Prompts that pictures choose, against a plain ViT in float64, and the promises of L2P, DualPrompt
and CODA-Prompt.
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from encoders import BLOCKS, SIDE, TRANSFORMERS, WIDTH, backbone, pictures, vit_b16
from mllm_cl import Memory, Recipe, load_method, run
from mllm_cl.data.labelled import labelled
from mllm_cl.data.pixels import preset
from mllm_cl.metrics.answers import metric
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.vision import unadapted
from mllm_cl.task import Task
from test_class_incremental import DATA, NUMBER, TEST, answers, recipe

SMALL = {
    "l2p": {"pool": 5, "length": 2, "top_k": 2},
    "dual_prompt": {"general": 2, "general_blocks": (0,), "expert": 3, "expert_blocks": (1, 2)},
    "coda_prompt": {"components": 2, "length": 4, "blocks": (0, 2), "orthogonality": 0.3},
}


def task(index: int, number: int = 2) -> Task:
    """The `index`-th task, of new classes that have no images."""
    return Task(f"{index}", index, [], [], metric("exact_match"), labels=("x",) * number)


def learner(name: str, index: int = 2, *, model_type: str = "vit", **settings):
    """A method and a classifier on which it has done its surgery for the `index`-th task, with
    what was put in moved away from where it starts.
    """
    method = load_method(name, "class_incremental")(**(SMALL[name] | settings))
    encoder = Encoder(backbone(model_type))
    frozen = set(dict(encoder.named_parameters()))
    model = Classifier(encoder, Prototype(encoder.width))
    method.before_task(model, task(index), Memory())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for at, parameter in encoder.named_parameters():
            if at not in frozen:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        with unadapted(encoder):
            queries = encoder(pictures(8))
        # Pictures differ little to a random model: keys of what differs, so that choices do, too.
        keys = iter(queries - queries.mean(0))
        for at, parameter in encoder.named_parameters():
            if at.startswith("keys.keys"):
                parameter.copy_(torch.stack([next(keys) for _ in parameter]))
    return method, model


# A plain ViT in float64


def soft(q, k, v, number):
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v


def plain(encoder, pixel_values, *, joining=None, prefixes=None, attend=soft, heads=2, eps=1e-12):
    """All tokens after the last LayerNorm, of one picture after the other.

    `joining` (B, M, D) come after the class token; `prefixes` are keys and values (B, 2, L, D) by
    the place of their block, and `attend` is told how many there are.
    """
    weights = {name: p.detach().double() for name, p in encoder.backbone.named_parameters()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(name, y, prefix):
        q, k, v = (linear(f"{name}.{letter}_proj", y) for letter in "qkv")
        rule, number = (soft, 0) if prefix is None else (attend, prefix.shape[1])
        if prefix is not None:
            k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
        parts = []
        for part in range(heads):
            own = slice(part * WIDTH // heads, (part + 1) * WIDTH // heads)
            parts.append(rule(q[:, own], k[:, own], v[:, own], number))
        return linear(f"{name}.o_proj", torch.cat(parts, -1))

    def answer(place, picture):
        at = "embeddings.patch_embeddings.projection"
        x = functional.unfold(picture.double()[None], 8, stride=8)[0].T
        x = x @ weights[f"{at}.weight"].flatten(1).T + weights[f"{at}.bias"]
        x = torch.cat([weights["embeddings.cls_token"][0], x])
        x = x + weights["embeddings.position_embeddings"][0]
        if joining is not None:
            x = torch.cat([x[:1], joining[place], x[1:]])
        for block in range(BLOCKS):
            prefix = None if block not in (prefixes or {}) else prefixes[block][place]
            at = f"layers.{block}"
            x = x + attention(f"{at}.attention", norm(f"{at}.layernorm_before", x), prefix)
            y = linear(f"{at}.mlp.fc1", norm(f"{at}.layernorm_after", x))
            x = x + linear(f"{at}.mlp.fc2", 0.5 * y * (1 + torch.erf(y / 2**0.5)))
        return norm("layernorm", x)

    return torch.stack([answer(place, one) for place, one in enumerate(pixel_values)])


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def nearest(query, keys, number):
    """The places of the `number` keys of largest cosine, and the sum of these cosines."""
    order = sorted(range(len(keys)), key=lambda place: -cosine(query, keys[place]))[:number]
    return order, sum(cosine(query, keys[place]) for place in order)


# L2P


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature", ["prompts", "class"])
def test_l2p_is_the_papers_in_float64(feature, attention):
    method, model = learner("l2p", feature=feature)
    model.encoder.backbone.set_attn_implementation(attention)
    x, found = pictures(6), dict(model.encoder.named_parameters())
    pool = found["backbone.embeddings.pool.pool.0"].detach().double()
    keys = found["keys.keys.0"].detach().double()
    queries = plain(model.encoder, x)[:, 0]
    chosen = [nearest(query, keys, 2) for query in queries]
    assert len({tuple(order) for order, _ in chosen}) > 1, "all pictures choose the same"
    joining = torch.stack([pool[order].flatten(0, 1) for order, _ in chosen])
    tokens = plain(model.encoder, x, joining=joining)
    expected = tokens[:, 1:5].mean(1) if feature == "prompts" else tokens[:, 0]
    for mode in (True, False):
        out = model.train(mode)(pixel_values=x)
        torch.testing.assert_close(out.features.double(), expected, rtol=0, atol=5e-5)
        pull = sum(sum_of_cosines for _, sum_of_cosines in chosen) / 6
        loss = method.loss(model, {}, out, Memory())
        assert float(loss.detach()) == pytest.approx(-0.1 * pull, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("feature", ["prompts", "class"])
def test_in_a_clip_prompts_join_before_the_first_norm_and_end_in_the_projection(feature):
    _, model = learner("l2p", model_type="clip", feature=feature)
    encoder, clip, x = model.encoder.eval(), model.encoder.backbone, pictures(5)
    vision, found = clip.vision_model, dict(encoder.named_parameters())
    with unadapted(encoder):
        queries = clip.get_image_features(pixel_values=x).pooler_output
        h = vision.embeddings(x)
        pool, keys = found["backbone.vision_model.embeddings.pool.pool.0"], found["keys.keys.0"]
        orders = [nearest(query, keys, 2)[0] for query in queries]
        joining = torch.stack([pool[order].flatten(0, 1) for order in orders])
        h = vision.pre_layrnorm(torch.cat([h[:, :1], joining, h[:, 1:]], 1))
        y = vision.post_layernorm(vision.encoder(inputs_embeds=h).last_hidden_state)
        expected = clip.visual_projection(y[:, 1:5].mean(1) if feature == "prompts" else y[:, 0])
    torch.testing.assert_close(encoder(x), expected, rtol=0, atol=1e-5)


# Prefixes of attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dual_prompt_is_the_papers_in_float64(attention):
    method, model = learner("dual_prompt", 3)
    model.encoder.backbone.set_attn_implementation(attention)
    x = pictures(6)
    found = {name: p.detach().double() for name, p in model.encoder.named_parameters()}
    keys = torch.cat([found[f"keys.keys.{place}"] for place in range(3)])
    queries = plain(model.encoder, x)[:, 0]
    at = "backbone.layers.{}.attention.prefix.pool.{}"
    for mode in (True, False):
        # In training it is the task's own, at test the one whose key is nearest.
        chosen = [2 if mode else nearest(query, keys, 1)[0][0] for query in queries]
        assert mode or len(set(chosen)) > 1, "all pictures choose the same"
        prefixes = {0: found[at.format(0, 0)].expand(6, -1, -1, -1)}
        for block in (1, 2):
            prefixes[block] = torch.cat([found[at.format(block, place)] for place in chosen])
        expected = plain(model.encoder, x, prefixes=prefixes)[:, 0]
        out = model.train(mode)(pixel_values=x)
        torch.testing.assert_close(out.features.double(), expected, rtol=0, atol=5e-5)
        pull = sum(cosine(q, keys[place]) for q, place in zip(queries, chosen, strict=True)) / 6
        loss = method.loss(model, {}, out, Memory())
        assert float(loss.detach()) == pytest.approx(-0.1 * pull, abs=1e-5)


def test_coda_prompt_is_the_papers_in_float64():
    method, model = learner("coda_prompt", 3)
    x, prefixes, owed = pictures(6), {}, 0.0
    found = {name: p.detach().double() for name, p in model.encoder.named_parameters()}
    queries = plain(model.encoder, x)[:, 0]

    def family(block, name):
        at = f"backbone.layers.{block}.attention.prefix.{name}"
        return torch.cat([found[f"{at}.{place}"] for place in range(3)])

    for block in (0, 2):
        p, a, k = (family(block, name) for name in ("pool", "looks", "keys"))
        sums = [sum(cosine(q * a[m], k[m]) * p[m] for m in range(6)) for q in queries]
        prefixes[block] = torch.stack(sums)
        for rows in (p.flatten(1), a, k):
            errors = [float(rows[i] @ rows[j]) - float(i == j) for i in range(6) for j in range(6)]
            owed += 0.3 * sum(error**2 for error in errors) / 36
    expected = plain(model.encoder, x, prefixes=prefixes)[:, 0]
    out = model(pixel_values=x)
    torch.testing.assert_close(out.features.double(), expected, rtol=0, atol=5e-5)
    loss = method.loss(model, {}, out, Memory())
    assert float(loss.detach()) == pytest.approx(owed, rel=1e-5)


def test_new_components_are_orthogonal_to_whatever_the_old_ones_became():
    method, model = learner("coda_prompt", 3)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    method.start_task(model, task(3), Memory(), (), lambda tensor: tensor)
    after = dict(model.encoder.named_parameters())
    for block in (0, 2):
        for name in ("pool", "looks", "keys"):
            at = f"backbone.layers.{block}.attention.prefix.{name}"
            rows = [after[f"{at}.{place}"].detach().double().flatten(1) for place in range(3)]
            assert all(torch.equal(after[f"{at}.{old}"], before[f"{at}.{old}"]) for old in (0, 1))
            assert (rows[2] @ torch.cat(rows[:2]).T).abs().max() < 1e-6
            torch.testing.assert_close(
                rows[2] @ rows[2].T, torch.eye(2).double(), rtol=0, atol=1e-6
            )
    with pytest.raises(ValueError, match="26 components of 24 numbers"):
        method, model = learner("coda_prompt", 2, components=13)
        method.start_task(model, task(2), Memory(), (), lambda tensor: tensor)


def test_a_tasks_own_prompts_begin_where_the_last_ones_ended():
    for inherit in (True, False):
        method, model = learner("dual_prompt", 3, inherit=inherit)
        method.start_task(model, task(3), Memory(), (), lambda tensor: tensor)
        found = dict(model.encoder.named_parameters())
        for block in (1, 2):
            at = f"backbone.layers.{block}.attention.prefix.pool"
            assert torch.equal(found[f"{at}.2"], found[f"{at}.1"]) == inherit
        assert not torch.equal(found["keys.keys.2"], found["keys.keys.1"])


def test_a_prefix_meets_no_attention_that_drops_what_it_attends_to():
    encoder = Encoder(backbone("vit"))
    encoder.backbone.config.attention_probs_dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"layers\.0.*dropout"):
        method = load_method("dual_prompt", "class_incremental")(**SMALL["dual_prompt"])
        method.before_task(Classifier(encoder, Prototype(WIDTH)), task(1), Memory())


# What holds for all of them


@torch.no_grad()
@pytest.mark.parametrize("model_type", TRANSFORMERS)
@pytest.mark.parametrize("name", SMALL)
def test_prompts_reach_the_features_of_every_family_and_can_be_left_out(name, model_type):
    encoder, x = Encoder(backbone(model_type)), pictures()
    before = encoder(x)
    _, model = learner(name, model_type=model_type)
    model.eval()
    assert (model.encoder(x) - before).abs().max() > 1e-3
    with unadapted(model.encoder):
        torch.testing.assert_close(model.encoder(x), before, rtol=0, atol=1e-6)
    again = copy.deepcopy(model.encoder)
    torch.testing.assert_close(again(x), model.encoder(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_what_trains_has_gradients_and_what_no_picture_chose_has_zeros(name):
    method, model = learner(name)
    frozen = {at for at, one in model.named_parameters() if not one.requires_grad}
    for one in model.parameters():
        one.requires_grad_(True)  # so that what may not train would show
    model.train()
    out = model(pixel_values=pictures(1), labels=torch.tensor([1]))
    (out.loss + method.loss(model, {}, out, Memory())).backward()
    found = {at: one.grad for at, one in model.named_parameters()}
    own = {at for at in found if any(part in at for part in ("pool", "prefix", "keys.", "head"))}
    assert own - frozen and all(found[at] is not None for at in own)
    if name == "l2p":
        assert (found["encoder.keys.keys.0"].any(1)).sum() == 2
        assert (found["encoder.backbone.embeddings.pool.pool.0"].any(-1).any(-1)).sum() == 2
    # All components are summed, but DualPrompt's earlier ones are not even looked at.
    else:
        expected = own if name == "coda_prompt" else own - frozen
        assert {at for at in own if found[at].any()} == expected


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointed in (False, True):
        method, model = learner(name)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        out = model(pixel_values=pictures(4), labels=torch.tensor([0, 1, 1, 0]))
        (out.loss + method.loss(model, {}, out, Memory())).backward()
        gradients.append({at: p.grad for at, p in model.named_parameters() if p.requires_grad})
    for at, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][at], gradient, rtol=0, atol=1e-6, msg=at)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_all_of_it_works_in_bf16_and_under_autocast(name, autocast):
    method, model = learner(name)
    model.to(torch.float32 if autocast else torch.bfloat16).train()
    x = pictures(3) if autocast else pictures(3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(pixel_values=x, labels=torch.tensor([0, 1, 1]))
    (out.loss + method.loss(model, {}, out, Memory())).backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["vit", "clip"])
@pytest.mark.parametrize("name", SMALL)
def test_what_a_picture_gets_does_not_depend_on_the_others_in_its_batch(name, model_type):
    _, model = learner(name, 4, model_type=model_type)
    model.eval()
    x = pictures(8)
    alone = torch.cat([model(pixel_values=one[None]).logits for one in x])
    torch.testing.assert_close(model(pixel_values=x).logits, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model(pixel_values=x.flip(0)).logits.flip(0), alone, rtol=0, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["l2p", "dual_prompt"])
def test_a_batch_that_votes_warns_and_shares_what_most_of_it_chose(name):
    with pytest.warns(UserWarning, match="batchwise.*know the task"):
        _, model = learner(name, 4, batchwise=True)
    _, alone = learner(name, 4)
    x = pictures(7)
    weights = []
    for one in (alone, model):
        one.eval()(pixel_values=x)
        weights.append(one.encoder.keys.choice.weight_BKP)
    votes = weights[0].sum((0, 1)).tolist()
    top = sorted(range(len(votes)), key=lambda place: (-votes[place], place))
    assert weights[1].argmax(-1).tolist() == [top[: weights[1].shape[1]]] * 7
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    ("name", "tasks", "count", "each"),
    [
        ("l2p", 1, 10 * 5 * 768 + 10 * 768, 46_080),
        ("dual_prompt", 10, 2 * 2 * 5 * 768 + 10 * (3 * 2 * 5 * 768 + 768), 39_168),
        ("coda_prompt", 10, 3_840_000, 384_000),
    ],
)
def test_a_vit_b16_gets_as_many_numbers_as_the_papers_say(name, tasks, count, each):
    encoder = Encoder(vit_b16())
    before = sum(one.numel() for one in encoder.parameters())
    model = Classifier(encoder, Prototype(encoder.width))
    load_method(name, "class_incremental")().before_task(model, task(tasks, 10), Memory())
    assert sum(one.numel() for one in encoder.parameters()) - before == count
    assert sum(one.numel() for one in encoder.parameters() if one.requires_grad) == each
    assert sum(one.numel() for one in model.head.parameters()) == 7690


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("l2p", {"top_k": 6}, "top_k 6 with a pool of 5"),
        ("l2p", {"pull": 0.0}, "pull 0.0"),
        ("dual_prompt", {"expert_blocks": (0, 1)}, "block 0"),
        ("dual_prompt", {"expert_blocks": (3,)}, "block 3.*from 0 to 2"),
        ("coda_prompt", {"length": 3}, "length 3"),
        ("coda_prompt", {"orthogonality": -1.0}, "found -1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, settings, match):
    with pytest.raises(ValueError, match=match):
        learner(name, **settings)


# Whole runs


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    backbone("vit").save_pretrained(folder)
    return folder


def prompted(folder: Path, model: Path, name: str, **settings) -> Recipe:
    tree = recipe(folder, model, name).resolved()
    # Where a gradient is rounding alone, Adam would make a step of it.
    tree["training"] |= {"adam_epsilon": 1e-4}
    tree["method"] |= {key: list(value) if isinstance(value, tuple) else value
                       for key, value in (SMALL[name] | settings).items()}  # fmt: skip
    return Recipe.from_tree(tree, "recipe.yaml")


@pytest.fixture(scope="module")
def runs(vit, tmp_path_factory):
    """The folder of a whole run of a method, made once."""
    made = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            run(prompted(made[name], vit, name))
        return made[name]

    return of


@pytest.mark.parametrize("name", SMALL)
def test_a_deleted_stage_comes_back_to_the_same_bytes(name, vit, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs(name), folder)
    timed = {"cost.json", "log.json", "complete.json"}  # the last has the hashes of the others
    files = [p for p in (folder / "task_3").rglob("*") if p.is_file() and p.name not in timed]
    before = {path: path.read_bytes() for path in files}
    assert any(path.name == "state.safetensors" for path in files)
    shutil.rmtree(folder / "task_3")
    shutil.rmtree(folder / "features")
    run(prompted(folder, vit, name))
    assert [path.name for path in files if path.read_bytes() != before[path]] == []


@pytest.mark.parametrize("name", ["dual_prompt", "coda_prompt"])
def test_what_earlier_tasks_learnt_stays_to_the_bit(name, runs):
    states = [load_file(runs(name) / f"task_{stage}/state.safetensors") for stage in (1, 2, 3)]
    for before, after in zip(states, states[1:], strict=False):
        old = {at for at in before if at.startswith("encoder.")}
        shared = {at for at in old if ".layers.0." in at} if name == "dual_prompt" else set()
        assert {at for at in old if torch.equal(before[at], after[at])} == old - shared
        assert len(after) > len(before)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_the_answers_of_a_run_are_those_of_its_weights_to_one_picture_at_a_time(name, vit, runs):
    method = load_method(name, "class_incremental")(**SMALL[name])
    encoder = Encoder(backbone("vit"))
    model = Classifier(encoder, Prototype(encoder.width))
    memory = Memory.load(runs(name) / "task_2/memory.safetensors")
    method.before_task(model, task(3), memory)
    model.load_state_dict(load_file(runs(name) / "task_3/state.safetensors"), strict=False)
    model.eval()
    pixels = preset("paper_compat", side=SIDE)
    names = [str(one) for one in labelled(DATA, "test", TEST, number=NUMBER).names]
    names = [names[place] for place in (0, 2, 3, 4, 5, 1)]
    given = answers(runs(name), 3)
    for first in range(0, NUMBER, 2):
        test = labelled(DATA, "test", TEST, number=NUMBER).of(names[first : first + 2])
        said = [
            names[int(model(pixel_values=pixels.test(one["images"][0])[None]).logits.argmax())]
            for one in test
        ]
        assert said == given[f"{first + 1}-{first + 2}"]
