"""What `mllm-cl doctor` says of a machine, from facts about it."""

import dataclasses

import pytest

from mllm_cl import cli
from mllm_cl.doctor import Facts, Gpu, devices, engines, gather, known, packages, wrong

VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "torchvision": "0.28.0",
}
H100 = Gpu("H100", 80 * 2**30, True)
SOUND = Facts(VERSIONS, (H100, H100), cuda="12.8", driver="570.1", compiler="/usr/bin/c++")


def but(versions=None, **changes) -> Facts:
    return dataclasses.replace(SOUND, versions={**VERSIONS, **(versions or {})}, **changes)


def test_nothing_is_wrong_with_a_sound_machine():
    assert list(wrong(SOUND)) == []
    assert set(engines(SOUND).values()) == {"yes"}


@pytest.mark.parametrize(
    ("facts", "what", "do"),
    [
        (but({"torchvision": "0.21.0"}), "torchvision 0.21.0 with torch 2.13.0", "==0.28.*"),
        (but(vision_error="operator torchvision::nms does not exist"), "torchvision", "one index"),
        (but({"transformers": "5.1.0"}), "transformers 5.1.0", "transformers>=5.17"),
        (but({"peft": None}), "no peft", "peft>=0.19"),
        (but({"deepspeed": "0.1.0"}), "deepspeed 0.1.0", "deepspeed>=0.17"),
        (but(compiler=None), "deepspeed without a compiler", "g++"),
        (but(gpus=(), cuda=None), "torch without CUDA", "Install the build"),
        (but(gpus=()), "driver 570.1", "Update the driver"),
        (
            but(environment={"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"}),
            "ACCELERATE_USE_CPU",
            "use_cpu: true",
        ),
        (
            but(gpus=(), driver=None, environment={"ACCELERATE_USE_FSDP": "1"}),
            "FSDP without an accelerator",
            "launch/cpu",
        ),
    ],
)
def test_a_bad_pair_says_what_it_is_and_what_to_do(facts, what, do):
    (problem,) = wrong(facts)
    assert what in problem.what and do in problem.do and problem.breaks


def test_an_engine_that_cannot_train_here_says_why():
    bare = but({"deepspeed": None}, gpus=(), cuda=None, driver=None, compiler=None)
    assert "fsdp2" in engines(bare) and engines(bare)["fsdp2"].startswith("no: without a GPU")
    assert engines(bare)["zero3"].startswith("no: deepspeed is not installed")
    assert engines(but(gpus=(), compiler=None))["zero2"].startswith("no: without a GPU")
    assert not wrong(bare)  # what is not there breaks nothing


def test_what_is_absent_says_what_it_is_for():
    lines = packages({**VERSIONS, "torchvision": None})
    assert any("torchvision is not installed" in line and "Qwen-VL" in line for line in lines)
    assert any("torchvision is absent" in line for line in known(but({"torchvision": None})))


def test_a_gpu_is_named_with_its_memory_and_whether_it_computes_in_bf16():
    old = Gpu("Tesla T4", 16 * 2**30, False)
    text = "\n".join(devices(but(gpus=(H100, old))))
    assert "GPU 0: H100, 80 GiB, bf16" in text and "GPU 1: Tesla T4, 16 GiB, no bf16" in text


RECIPE = """
model: {{model_name_or_path: {model}}}
method: {{name: zeroshot}}
tasks: [{{name: one, data: "{data}"}}]
"""


def test_the_code_is_1_with_a_problem_and_0_without(tmp_path, tiny_folder, capsys):
    found = len(wrong(gather()))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_folder["llava"], data="toy:bars"))
    assert cli.main(["doctor", str(path)]) == int(found > 0)
    assert "train opens, test opens" in capsys.readouterr().out
    path.write_text(RECIPE.format(model=tmp_path, data="toy:bras"))
    assert cli.main(["doctor", str(path)]) == 1
    told = capsys.readouterr().out
    assert f"Problems: {found + 4}" in told and "bras" in told and "weights of" in told


def test_a_broken_recipe_is_code_2(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: one")
    assert cli.main(["doctor", str(path)]) == 2
    assert "model: is missing" in capsys.readouterr().err
