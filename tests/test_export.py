"""What a run has learnt opens in plain transformers and PEFT, and answers as it did in the run;
what a form cannot hold is refused.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from families import FAMILIES, inputs
from mllm_cl import cli
from mllm_cl.data.toy import toy_task
from mllm_cl.export import MARK, _check_form, _ready_to_fold
from mllm_cl.hub import Hub
from mllm_cl.likeness import Difference, Unlike, check
from mllm_cl.memory import save_tensors
from mllm_cl.model.adapt import lora_sites
from mllm_cl.model.adapter_file import in_expert_layout, in_peft_layout, low_rank
from mllm_cl.model.expert_lora import adapted, attach_expert_lora, merge_expert_lora
from mllm_cl.model.experts import experts
from mllm_cl.model.merge import merge
from mllm_cl.model.surgery import fold, guard
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.respond import weigh
from mllm_cl.runner import run
from toy_run import collator_of

LINEARS = {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 4}
WHOLE = {"lora_target_modules": ["q_proj", "v_proj"], "use_peft": False}
EXPERTS = {"num_experts": 0, "experts": "lora"}
# By name: the model, its settings, the method's.
KINDS = {
    "finetune_lora": ("llava", LINEARS, {"name": "finetune"}),
    "finetune_whole": ("qwen3-vl-moe", WHOLE, {"name": "finetune"}),
    "finetune_bf16": ("llava", {**WHOLE, "dtype": "bfloat16"}, {"name": "finetune"}),
    "same_whole": ("qwen3-vl-moe", WHOLE, {"name": "same", "num_experts": 0}),
    "same_lora": ("llava", LINEARS, {"name": "same", "num_experts": 0, "router": "frozen"}),
    "same_experts": (
        "qwen3-vl-moe",
        LINEARS,
        {"name": "same", **EXPERTS},
    ),
    "expert_lora": ("qwen3-vl-moe", LINEARS, {"name": "expert_lora"}),
    "moe_lora": ("llava", LINEARS, {"name": "moe_lora", "num_experts": 2}),
}
TWICE = {"finetune_lora"}  # the others learn one task


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> Callable[[str], Path]:
    """Finished runs by kind, made when they are first asked for."""
    done: dict[str, Path] = {}

    def run_of(kind: str) -> Path:
        if kind not in done:
            name, model, method = KINDS[kind]
            names = ["arrow", "word"][: 1 + (kind in TWICE)]
            tree = {
                "output_dir": str(tmp_path_factory.mktemp(kind) / "run"),
                "model": {"model_name_or_path": str(tiny_folder[name]), **model},
                "method": method,
                "tasks": [
                    {"name": name, "data": f"toy:{name}", "train_size": 24, "eval_size": 4}
                    for name in names
                ],
                "training": {
                    "per_device_train_batch_size": 8,
                    "max_steps": 3,
                    "learning_rate": 1e-2,
                    "save_strategy": "no",
                },
            }
            done[kind] = run(Recipe.from_tree(tree, "test"))
        return done[kind]

    return run_of


def base_of(folder: Path) -> Path:
    tree = json.loads((folder / "task_1" / "recipe.json").read_text())
    return Path(tree["model"]["model_name_or_path"])


def surprise(model: nn.Module, base: Path, task: str) -> torch.Tensor:
    """The negative log-likelihood of every right answer to the task."""
    batch = collator_of(base)(list(toy_task(task, "test", 4)))
    with torch.no_grad():
        return torch.tensor([nll for nll, _ in weigh(model.eval(), batch)])


def scored(folder: Path, stage: int, task: str) -> torch.Tensor:
    """The same as the run itself has written it down."""
    lines = (folder / f"task_{stage}" / "predictions" / f"{task}.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["nll"] for line in lines])


def plain(folder: Path, **settings) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, **settings)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("finetune_lora", "merged"),
        ("finetune_lora", "peft"),
        ("finetune_whole", "merged"),
        ("finetune_bf16", "merged"),
        ("same_whole", "merged"),
        ("same_lora", "merged"),
        ("same_lora", "peft"),
        ("same_experts", "merged"),
        ("expert_lora", "merged"),
        ("expert_lora", "peft"),
    ],
)
def test_an_export_opens_without_us_and_answers_as_the_run_did(runs, tmp_path, kind, form):
    folder = runs(kind)
    stage, task = (2, "word") if kind in TWICE else (1, "arrow")
    assert cli.main(["export", str(folder), "--to", form, "--output", str(tmp_path / "out")]) == 0
    base = base_of(folder)
    if form == "merged":
        model = plain(tmp_path / "out")
        AutoProcessor.from_pretrained(tmp_path / "out")
    else:
        model = PeftModel.from_pretrained(plain(base), tmp_path / "out")
    bf16 = kind == "finetune_bf16"
    assert next(model.parameters()).dtype == (torch.bfloat16 if bf16 else torch.float32)
    expected, found = scored(folder, stage, task), surprise(model, base, task)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    untrained = surprise(plain(base, dtype=torch.float32), base, task)
    assert (untrained - expected).abs().max() > 0.05  # there was something to bring along
    numbers = json.loads((tmp_path / "out" / MARK).read_text())
    assert numbers["relative"] < 1e-5 < 1e-3 < numbers["learnt"]


def test_factors_for_every_expert_are_measured_too(runs, tmp_path):
    words = ["--to", "per-expert-peft", "--output", str(tmp_path / "out")]
    assert cli.main(["export", str(runs("expert_lora")), *words]) == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"
    assert tensors[name].shape == (4, 128)
    numbers = json.loads((tmp_path / "out" / MARK).read_text())
    assert numbers["relative"] < 1e-5 < 1e-3 < numbers["learnt"]


# The layouts, in families whose stacks lie otherwise


FUSED = ["qwen3_vl_moe", "qwen3_moe", "llama4", "gpt_oss"]
TURNED = {"llama4", "gpt_oss"}  # stacks (E, D, O)


def adapted_model(family: str) -> tuple[nn.Module, nn.Module]:
    """A model, and the same with adapters of rank 3 on its experts and on q_proj."""
    base = FAMILIES[family]().eval()
    model = copy.deepcopy(base)
    lora_sites(model, ["q_proj"], rank=3, alpha=6.0, dropout=0.0, seed=0)
    attach_expert_lora(model, experts(model), rank=3, alpha=6.0)
    _fill(model)
    return base, model.eval()


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def opened(base: nn.Module, folder: Path, tensors, config) -> nn.Module:
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FUSED)
def test_stacks_of_experts_open_in_plain_peft(family, tmp_path):
    base, model = adapted_model(family)
    with torch.device("meta"):
        empty = type(base)(base.config)
    tensors, config = in_peft_layout(low_rank(model), empty)
    for lora in adapted(model).values():
        layout = lora.layout
        widths = {layout.width, 2 * layout.inner, layout.inner}
        both = [f"base_model.model.{layout.path}{one}" for one in (".base_layer", "")]
        for place in both:
            first, second = (tensors[f"{place}.lora_{one}.weight"] for one in "AB")
            assert first.shape[0] == second.shape[1] == 3 * layout.num_experts
            assert {first.shape[1], second.shape[0]} <= widths
    batch = inputs(base)
    found = opened(base, tmp_path, tensors, config)(**batch).logits
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert (found - base(**batch).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", FUSED)
def test_every_expert_gets_its_own_part_of_both_stacks(family):
    base, model = adapted_model(family)
    tensors, config = in_expert_layout(low_rank(model))
    merged = copy.deepcopy(base).double()
    for name, parameter in model.named_parameters():
        if name in merged.state_dict():
            merged.get_parameter(name).data = parameter.data.double()
    attach_expert_lora(merged, experts(merged), rank=3, alpha=6.0)
    _copy_adapters(model, merged)
    merge_expert_lora(merged)
    for path in adapted(model):
        stacks = [merged.get_submodule(path)._parameters[n] for n in ("gate_up_proj", "down_proj")]
        before = [base.get_submodule(path)._parameters[n] for n in ("gate_up_proj", "down_proj")]
        moved = [one.double() - two.double() for one, two in zip(stacks, before, strict=True)]
        up, down = (one.mT if family in TURNED else one for one in moved)
        gate, up = (up[:, 0::2], up[:, 1::2]) if family == "gpt_oss" else up.chunk(2, dim=1)
        for expert in range(len(up)):
            expected = {"gate_proj": gate[expert], "up_proj": up[expert], "down_proj": down[expert]}
            for part, weight in expected.items():
                head = f"base_model.model.{path}.{expert}.{part}"
                first, second = (tensors[f"{head}.lora_{one}.weight"].double() for one in "AB")
                assert (len(first), second.shape[1]) == (config.r, config.r)
                found = config.lora_alpha / config.r * (second @ first)
                torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)


def _copy_adapters(source: nn.Module, target: nn.Module) -> None:
    own = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if "_lora_" in name:
            own[name].data = parameter.data.to(own[name].dtype)


@torch.no_grad()
def test_plain_peft_reads_factors_of_every_expert_where_it_knows_the_family(tmp_path):
    base, model = adapted_model("qwen3_moe")
    batch = inputs(base)
    found = opened(base, tmp_path, *in_expert_layout(low_rank(model)))(**batch).logits
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_adapters_that_answer_together_become_one(tmp_path):
    base = FAMILIES["llava"]().eval()
    model = copy.deepcopy(base)
    for number, alpha in ((1, 6.0), (2, 3.0)):
        adapter = f"task_{number}"
        lora_sites(model, ["q_proj"], rank=3, alpha=alpha, dropout=0, seed=0, adapter=adapter)
    _fill(model)
    with torch.device("meta"):
        empty = type(base)(base.config)
    tensors, config = in_peft_layout(low_rank(model.eval()), empty)
    batch, expected = inputs(base), model(**inputs(base)).logits
    found = opened(base, tmp_path, tensors, config)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    merge(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def test_folding_rounds_weights_of_bf16_and_no_factor():
    model = FAMILIES["llava"]().bfloat16()
    factor = lora_sites(model, ["q_proj"], rank=3, alpha=6.0, dropout=0, seed=0)[0]
    whole = model.get_submodule(factor.path.rpartition(".lora_A")[0]).base_layer
    for module in (factor.module, whole):
        one = guard(module, "weight")
        one.displacement = 1e-3 * torch.randn(one.displacement.shape)
    _ready_to_fold(model)
    of_factor, of_whole = (leak for _, leak in sorted(fold(model).items(), key=lambda x: x[1]))
    assert 0 < of_factor < 1e-4 < 1e-2 < of_whole


@torch.no_grad()
def test_a_weight_that_two_modules_share_is_not_merged():
    model = FAMILIES["qwen2"]()
    model.lm_head.weight = model.model.embed_tokens.weight
    lora_sites(model, ["lm_head"], rank=3, alpha=6.0, dropout=0, seed=0)
    with pytest.raises(ValueError, match="shares its weight"):
        merge(model)


# What is refused


@pytest.mark.parametrize(
    ("kind", "form", "told"),
    [
        ("moe_lora", "merged", "for every token"),
        ("moe_lora", "peft", "for every token"),
        ("finetune_whole", "peft", "moved themselves"),
        ("same_experts", "peft", "no router"),
        ("same_experts", "per-expert-peft", "no router"),
        ("finetune_lora", "per-expert-peft", "no adapter is on experts"),
    ],
)
def test_a_form_that_cannot_hold_the_state_is_refused(runs, tmp_path, capsys, kind, form, told):
    words = ["--to", form, "--output", str(tmp_path / "out")]
    assert cli.main(["export", str(runs(kind)), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and told in lines[0] and f"--to {form}" in lines[0]
    assert not list(tmp_path.iterdir())


def recipe_with(**model) -> Recipe:
    tree = {
        "model": {"model_name_or_path": "toy:llava", **model},
        "method": {"name": "finetune"},
        "tasks": [{"name": "arrow", "data": "toy:arrow"}],
    }
    return Recipe.from_tree(tree, "test")


def test_a_base_that_the_file_would_not_name_is_refused(tmp_path):
    state = {"model.q_proj.lora_A.default.weight": torch.ones(2, 3)}
    with pytest.raises(RecipeError, match="four bits"):
        _check_form("merged", recipe_with(load_in_4bit=True), state)
    _check_form("peft", recipe_with(load_in_4bit=True), state)
    joined = recipe_with(adapter_name_or_path=str(tmp_path))
    with pytest.raises(RecipeError, match="had joined the base"):
        _check_form("peft", joined, state)
    _check_form("merged", joined, state)


def test_a_guarded_weight_that_never_moved_hinders_no_adapter():
    state = {
        "model.gate.weight::displacement": torch.zeros(2, 3),
        "model.q_proj.lora_A.default.weight": torch.ones(2, 3),
    }
    _check_form("peft", recipe_with(), state)
    with pytest.raises(RecipeError, match="trained nothing"):
        _check_form("peft", recipe_with(), {})


def test_a_folder_of_somebody_else_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / MARK).write_text('{"chapters": 7}')
    words = ["export", str(runs("finetune_lora")), "--to", "peft", "--output", str(tmp_path)]
    assert cli.main(words) == 2
    assert "no export of ours" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "thesis.txt"]


def test_an_earlier_task_can_be_exported_and_an_export_made_anew(runs, capsys):
    folder = runs("finetune_lora")
    words = ["export", str(folder), "--to", "peft", "--task", "arrow"]
    for _ in range(2):
        assert cli.main(words) == 0
    out = folder / "export" / "arrow-peft"
    assert [path.name for path in out.parent.iterdir()] == ["arrow-peft"]
    model = PeftModel.from_pretrained(plain(base_of(folder)), out)
    found = surprise(model, base_of(folder), "arrow")
    torch.testing.assert_close(found, scored(folder, 1, "arrow"), rtol=1e-5, atol=1e-5)
    shutil.rmtree(out.parent)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "nothing"], "complete in"),
        (["--push-to-hub"], "no name to upload to"),
        (["--push-to-hub", "--hub-model-id", "me/mine"], "HF_HUB_OFFLINE"),
        (["--hub-model-id", "me/mine"], "goes with --push-to-hub"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_before_the_work(runs, capsys, words, told):
    folder = runs("finetune_lora")
    assert cli.main(["export", str(folder), "--to", "merged", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and told in lines[0]
    assert not (folder / "export").exists()


def test_the_recipe_may_say_where_an_export_goes():
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        Hub().checked({"hub_model_id": "me/mine", "learning_rate": 1.0})


@pytest.mark.parametrize(("relative", "learnt"), [(0.5, 1.0), (0.01, 0.01), (float("nan"), 1.0)])
def test_a_folder_that_lost_what_was_learnt_is_not_left_behind(relative, learnt):
    found = Difference(relative, 1.0, 0.9, learnt, 0.0, 4)
    with pytest.raises(Unlike, match="answers otherwise"):
        check(found, torch.float32, "merged")


def test_a_folder_that_is_no_run_or_was_edited_is_refused(runs, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "--to", "merged"]) == 2
    assert "no complete task" in capsys.readouterr().err
    shutil.copytree(runs("finetune_lora"), tmp_path / "run")
    (tmp_path / "run" / "task_2" / "log.json").write_text("[]")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "merged"]) == 2
    assert "not as it was written" in capsys.readouterr().err


def test_the_card_says_what_was_learnt_from_what_and_how_far_it_is_off(runs, tmp_path):
    folder = runs("same_lora")
    licence = base_of(folder) / "README.md"
    licence.write_text("---\nlicense: apache-2.0\n---\n")
    try:
        words = ["--to", "peft", "--output", str(tmp_path / "out")]
        assert cli.main(["export", str(folder), *words]) == 0
    finally:
        licence.unlink()
    text = (tmp_path / "out" / "README.md").read_text()
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    score = f"| arrow | {rows[-1]['scores']['arrow']:.3f} |"
    for told in ("license: apache-2.0", "| method | same |", "folding leak", score):
        assert told in text
    assert "difference of the logits, over their norm" in text
