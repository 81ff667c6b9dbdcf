"""A model in four bits says and learns what its unpacked weights would, and says what it holds."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from families import FAMILIES, SPARSE, inputs
from launches import launch
from mllm_cl import routers
from mllm_cl.model import four_bit
from mllm_cl.model.adapt import expert_sites, weight_sites
from mllm_cl.model.expert_lora import adapted, attach_expert_lora, merge_expert_lora
from mllm_cl.model.experts import experts
from mllm_cl.model.load import empty_model, load_model
from mllm_cl.model.quantised import (
    Packed,
    is_packed_linear,
    pack,
    stacks_in,
    weight_bytes,
    weight_of,
    whole,
)
from mllm_cl.recipe import ModelBlock, Recipe, RecipeError
from mllm_cl.runner import run
from mllm_cl.stopping import Stopped, Stopping
from survive_script import digests

bnb = pytest.importorskip("bitsandbytes")

RUN_HERE = [name for name in SPARSE if name != "jetmoe"]
# (E, 2I, D); transposed; transposed, with biases, gate and up interleaved; all experts at once.
LAYOUTS = ("qwen3_vl_moe", "aria", "gpt_oss", "llama4")


def block(folder: Path | str = "none", **settings) -> ModelBlock:
    return ModelBlock(model_name_or_path=str(folder), load_in_4bit=True, **settings)


def packed_and_dense(family: str) -> tuple[nn.Module, nn.Module]:
    """A model with packed experts, and one as it comes with the weights that these unpack to."""
    model = FAMILIES[family]().eval()
    dense = copy.deepcopy(model)
    dense.set_experts_implementation("eager")
    four_bit.pack_experts(model, block(use_bnb_nested_quant=True))
    for path, layout in experts(model).items():
        for name in (layout.up, layout.down):
            stack = dense.get_submodule(path)._parameters[name]
            stack.data = whole(layout.module, name)
            assert isinstance(weight_of(layout.module, name), Packed)
    for one in (model, dense):
        one.requires_grad_(False)
    return model, dense


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [(4, 96, 128), (3, 80, 42)])
def test_each_expert_unpacks_as_bitsandbytes_unpacks_it_alone(quant_type, nested, size):
    stack_EOD = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = pack(stack_EOD, quant_type=quant_type, nested=nested)
    for expert, weight_OD in enumerate(stack_EOD):
        alone = bnb.functional.quantize_4bit(
            weight_OD, blocksize=64, quant_type=quant_type, compress_statistics=nested
        )
        expected = bnb.functional.dequantize_4bit(*alone)
        assert torch.equal(packed[expert], expected)
        assert torch.equal(packed.mT[expert], expected.mT)
        error = (expected - weight_OD).float().norm() / weight_OD.float().norm()
        assert 0.05 < error < 0.2  # of a normal weight NF4 keeps about 0.09, FP4 about 0.12


@pytest.mark.parametrize(("nested", "most"), [(False, 0.2825), (True, 0.262)])
def test_a_packed_stack_takes_little_more_than_a_quarter_of_bf16(nested, most):
    stack_EOD = torch.randn(2, 192, 512).bfloat16()
    packed = pack(stack_EOD, nested=nested)
    assert 0.25 < packed.nbytes / stack_EOD.nbytes < most


@pytest.mark.parametrize("family", RUN_HERE)
def test_frozen_packed_experts_answer_and_pass_on_gradients_as_unpacked_ones(family):
    model, dense = packed_and_dense(family)
    for one in (model, dense):
        for router in routers(one).values():
            router.weight.requires_grad_(True)
    said, expected = (one(**inputs(one)).logits for one in (model, dense))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    said.square().mean().backward()
    expected.square().mean().backward()
    known, seen = routers(dense), 0.0
    for path, router in routers(model).items():
        if router.weight.grad is None:  # Ernie's router for pictures, which text does not visit
            assert known[path].weight.grad is None
            continue
        seen += float(router.weight.grad.abs().max())
        torch.testing.assert_close(
            router.weight.grad, known[path].weight.grad, rtol=1e-3, atol=1e-6
        )
    assert seen > 0


@pytest.mark.parametrize("family", LAYOUTS)
def test_adapters_beside_packed_experts_learn_what_they_would_beside_unpacked_ones(family):
    model, dense = packed_and_dense(family)
    for one in (model, dense):
        attach_expert_lora(one, experts(one), rank=3, alpha=6.0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in one.named_parameters():
            if "_lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    said, expected = (one(**inputs(one)).logits for one in (model, dense))
    torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-6)
    said.square().mean().backward()
    expected.square().mean().backward()
    known = dict(dense.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * len(adapted(model))
    for name, parameter in trained.items():
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, known[name].grad, rtol=1e-5, atol=1e-8)


def test_only_experts_with_tokens_are_unpacked_and_one_at_a_time(monkeypatch):
    model, _ = packed_and_dense("qwen3_moe")
    for router in routers(model).values():
        router.weight.data.zero_()  # all logits equal: top-k takes the same experts always
    unpacked = []
    unpack = bnb.functional.dequantize_4bit
    monkeypatch.setattr(
        bnb.functional,
        "dequantize_4bit",
        lambda nibbles, state: unpacked.append(state.shape) or unpack(nibbles, state),
    )
    model(**inputs(model))
    found = list(experts(model).values())
    assert len(unpacked) == sum(2 * layout.top_k for layout in found)
    assert {len(shape) for shape in unpacked} == {2}


def test_packed_stacks_are_no_parameters_and_follow_no_dtype():
    model, _ = packed_and_dense("qwen3_moe")
    layout = next(iter(experts(model).values()))
    before = stacks_in(layout.module)[layout.up][0]
    names = {layout.up, layout.down}
    assert not names & set(layout.module.state_dict())
    assert not names & {name for name, _ in layout.module.named_parameters()}
    twin = copy.deepcopy(model).to(torch.bfloat16)
    moved = experts(twin)[layout.path]
    assert torch.equal(stacks_in(moved.module)[layout.up][0], before)


def saved(family: str, folder: Path) -> Path:
    FAMILIES[family]().save_pretrained(folder)
    return folder


def test_all_but_routers_and_heads_is_packed_as_a_model_loads(tmp_path):
    # Gemma 4's router is a plain linear, which bitsandbytes would take for one.
    model = load_model(block(saved("gemma4", tmp_path)))
    kept = {id(router) for router in routers(model).values()} | {id(model.lm_head)}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in kept]
    assert linears and all(is_packed_linear(linear) for linear in linears)
    assert not any(is_packed_linear(router) for router in routers(model).values())
    assert all(len(stacks_in(one.module)) == 2 for one in experts(model).values())


def test_the_table_counts_every_byte_and_every_weight(tmp_path):
    folder = saved("qwen3_moe", tmp_path)
    dense, model = load_model(ModelBlock(model_name_or_path=str(folder))), load_model(block(folder))
    number, size = (four_bit.table(model).columns[one]._cells[-1] for one in (2, 3))
    assert int(number.replace(",", "")) == sum(weight.numel() for weight in dense.parameters())
    stores = [s for module in model.modules() for s in stacks_in(module).values()]
    least = sum(weight.nbytes for weight in model.parameters()) + sum(s.nbytes for s in stores)
    assert least < int(size.replace(",", "")) < 1.1 * least


@pytest.mark.parametrize("nested", [False, True])
def test_a_forecast_knows_what_four_bits_save_to_a_few_thousandths(nested, tiny_folder):
    settings = block(tiny_folder["qwen3-vl-moe"], use_bnb_nested_quant=nested)
    empty, model = empty_model(settings), load_model(settings)
    stores = [s for module in model.modules() for s in stacks_in(module).values()]
    linears = [module for module in model.modules() if is_packed_linear(module)]
    packed = sum(s.nbytes for s in stores) + sum(weight_bytes(one) for one in linears)
    numbers = sum(s.shape.numel() for s in stores)
    numbers += sum(one.in_features * one.out_features for one in linears)
    saved = four_bit.saved_bytes(empty, settings)
    # What it leaves out are the code books, a kilobyte each, which a model of this size feels.
    codes = 1024 * (len(stores) + 2 * len(linears))
    assert 0 <= packed - (4 * numbers - saved) < codes


def test_experts_that_cannot_be_packed_have_to_be_allowed_by_name(tmp_path):
    folder = saved("jetmoe", tmp_path)
    with pytest.raises(ValueError, match=r"leave 100% of the experts' bytes .*model.unquantised"):
        load_model(block(folder))
    model = load_model(block(folder, unquantised=("experts", "mlp")))
    assert not any(stacks_in(module) for module in model.modules())
    with pytest.raises(ValueError, match="'nothing' is the end of no module's name"):
        load_model(block(folder, unquantised=("nothing",)))


def test_what_is_left_by_name_is_as_it_was(tmp_path):
    folder = saved("qwen3_moe", tmp_path)
    model = load_model(block(folder, unquantised=("layers.0.mlp.experts", "q_proj")))
    with_stacks = [path for path, one in experts(model).items() if stacks_in(one.module)]
    assert with_stacks and not any("layers.0." in path for path in with_stacks)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = {name.rpartition(".")[2] for name, one in linears.items() if is_packed_linear(one)}
    assert "q_proj" not in packed and "k_proj" in packed
    assert model(**inputs(model)).logits.isfinite().all()


def test_adapters_are_not_merged_into_packed_experts():
    model, _ = packed_and_dense("qwen3_moe")
    attach_expert_lora(model, experts(model), rank=2, alpha=4.0)
    with pytest.raises(ValueError, match="kept in four bits"):
        merge_expert_lora(model)


def test_packed_weights_do_not_train_whole(tmp_path):
    model = load_model(block(saved("qwen3_moe", tmp_path)))
    with pytest.raises(ValueError, match="q_proj is kept in four bits.*'use_peft: true'"):
        weight_sites(model, ["q_proj"])
    with pytest.raises(ValueError, match="experts at .* kept in four bits.*'experts: lora'"):
        expert_sites(model)


# Recipes

METHODS = {
    "finetune": {},
    "moe_lora": {"num_experts": 2},
    "expert_lora": {},
    "same": {"num_experts": 2, "experts": "lora", "calibration_tokens": 500, "budget": 0.01},
}


def recipe(folder: Path, model: object, method: str, *overrides: str, **settings) -> Recipe:
    """Two tiny tasks with a method on a model in four bits."""
    sizes = {"train_size": 16, "eval_size": 4}
    tree = {
        "output_dir": str(folder),
        "model": {
            "model_name_or_path": str(model),
            "lora_target_modules": ["q_proj"],
            "lora_r": 2,
            "load_in_4bit": True,
        },
        "method": {"name": method, **METHODS.get(method, {}), **settings},
        "tasks": [{"name": name, "data": f"toy:{name}", **sizes} for name in ("arrow", "word")],
        "training": {"per_device_train_batch_size": 8, "max_steps": 2, "save_steps": 1},
        "eval": {"max_new_tokens": 2},
    }
    return Recipe.from_tree(tree, "test", overrides)


def stopped_and_gone_on(wanted: Recipe) -> Path:
    """The folder of a run that left after the first step of its first task, and came back."""
    stopping = Stopping()
    stopping.asked = True
    with pytest.raises(Stopped):
        run(wanted, stopping)
    folder = Path(wanted.output_dir)
    assert list((folder / "task_1").glob("checkpoint-1/complete.json"))
    return run(wanted)


@pytest.mark.parametrize("method", ["finetune", "moe_lora", "expert_lora"])
def test_a_run_in_four_bits_goes_on_where_it_was_stopped(method, tiny_folder, tmp_path, capsys):
    folder = stopped_and_gone_on(recipe(tmp_path / "run", tiny_folder["qwen3-vl-moe"], method))
    told = capsys.readouterr().out
    assert "Qwen3VLMoeTextExperts" in told and "nf4" in told
    learnt = load_file(folder / "task_2" / "state.safetensors")
    assert learnt and all(name.count("lora") or name.count("gate") for name in learnt)
    assert any(tensor.any() for name, tensor in learnt.items() if "lora_B" in name)


def test_a_stopped_run_of_same_in_four_bits_ends_bit_equal(tiny_folder, tmp_path):
    whole_one = run(recipe(tmp_path / "whole", tiny_folder["qwen3-vl-moe"], "same"))
    cut = stopped_and_gone_on(recipe(tmp_path / "cut", tiny_folder["qwen3-vl-moe"], "same"))
    assert digests(cut) == digests(whole_one)


@pytest.mark.engines
@pytest.mark.timeout(1200)
def test_engines_of_two_processes_learn_what_one_learns(tiny_folder, tmp_path):
    states = {}
    for engine, size in (("single", 8), ("ddp", 4), ("zero2", 4)):
        wanted = recipe(tmp_path / engine, tiny_folder["qwen3-vl-moe"], "expert_lora")
        wanted.training["per_device_train_batch_size"] = size
        wanted.save(tmp_path / f"{engine}.yaml")
        launch(engine, "run_script.py", str(tmp_path / f"{engine}.yaml"))
        states[engine] = load_file(tmp_path / engine / "task_2" / "state.safetensors")
    for engine in ("ddp", "zero2"):
        for name, expected in states["single"].items():
            torch.testing.assert_close(states[engine][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "overrides", "words"),
    [
        (
            "finetune",
            {},
            ("--model.use_peft=false",),
            "finetune with these settings trains weights",
        ),
        ("expert_lora", {"experts": "whole"}, (), "'method.experts: lora'"),
        ("finetune", {}, ("--model.adapter_name_or_path=.",), "merge it into the base first"),
        (
            "finetune",
            {},
            ("--model.load_in_4bit=false", "--model.bnb_4bit_quant_type=fp4"),
            "without 'load_in_4bit: true'; remove it",
        ),
    ],
)
def test_what_cannot_be_in_four_bits_is_refused_as_the_recipe_is_read(
    method, settings, overrides, words, tiny_folder, tmp_path
):
    with pytest.raises(RecipeError, match=words):
        recipe(tmp_path, tiny_folder["qwen3-vl-moe"], method, *overrides, **settings)


def test_engines_that_shard_weights_are_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RecipeError, match="fsdp2 takes no packed weights"):
        run(recipe(tmp_path, "toy:qwen3_vl_moe", "finetune"))
