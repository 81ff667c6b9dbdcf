"""What is installed, what runs here, and what does not go together: `mllm-cl doctor`, which changes
nothing.

Facts are gathered first; what is wrong with them is said by plain functions of those facts.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm_cl.recipe import Recipe

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
OPTIONAL = {
    "deepspeed": "ZeRO-1, 2 and 3",
    "bitsandbytes": "bases in 4 or 8 bits, and 8-bit optimizers",
    "torchvision": "the processors of Qwen-VL, InternVL and LLaVA-OneVision",
    "kernels": "attention and experts fetched as compiled kernels",
    "flash_attn": "'attn_implementation: flash_attention_2'",
    "timm": "encoders of timm's checkpoints",
    "trl": "SFTTrainer as the trainer",
}
VISION_AHEAD = 15  # torchvision 0.(N + 15) belongs to torch 2.N


@dataclass(frozen=True)
class Gpu:
    """One accelerator: name, bytes, and whether it computes in bf16."""

    name: str
    memory: int
    bf16: bool


@dataclass(frozen=True)
class Facts:
    """All that the checks look at. Versions are None where a package is not installed."""

    versions: Mapping[str, str | None]
    gpus: tuple[Gpu, ...] = ()
    cuda: str | None = None  # what torch was built for
    driver: str | None = None  # of a GPU that the machine has, whether torch sees it or not
    compiler: str | None = None
    vision_error: str | None = None  # the last line of what `import torchvision` raised
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Two things that do not go together: what breaks, and what to do."""

    what: str
    breaks: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}: {self.breaks}. {self.do}"


def doctor(recipe: "Recipe | None" = None) -> int:
    """Print what there is and what is wrong; 0 if nothing is, else 1.

    With a recipe, its model and its data are opened too; no weights are loaded.
    """
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    facts = gather()
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for title, lines in (
        ("Packages", packages(facts.versions)),
        ("Devices", devices(facts)),
        ("Engines", [f"{name}: {why}" for name, why in engines(facts).items()]),
        ("Kernels", kernels(facts, recipe)),
        ("Good to know", known(facts)),
    ):
        print("\n".join([f"\n{title}", *(f"  {line}" for line in lines)]))
    problems = [str(one) for one in wrong(facts)]
    if recipe is not None:
        fine, bad = reach(recipe)
        print("\n".join(["\nRecipe", *(f"  {line}" for line in fine)]))
        problems += bad
    print("\nNothing is wrong." if not problems else f"\nProblems: {len(problems)}")
    for number, text in enumerate(problems, start=1):
        print(f"  {number}. {text}")
    return 1 if problems else 0


def gather() -> Facts:
    """The facts about this machine and this Python."""
    import torch

    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Facts(
        versions=versions,
        gpus=tuple(_gpu(index) for index in range(count)),
        cuda=torch.version.cuda or torch.version.hip,
        driver=_driver(),
        compiler=shutil.which("c++") or shutil.which("g++"),
        vision_error=_vision_error() if versions["torchvision"] else None,
        environment=dict(os.environ),
    )


def packages(versions: Mapping[str, str | None]) -> list[str]:
    """A line for each package; an absent one says what it would be for."""
    lines = [f"{name} {versions.get(name) or 'is not installed'}" for name in PACKAGES]
    for name, use in OPTIONAL.items():
        found = versions.get(name)
        lines.append(f"{name} {found}" if found else f"{name} is not installed; it is for {use}")
    return lines


def devices(facts: Facts) -> list[str]:
    """Processors, memory and accelerators."""
    lines = [f"{_cores()} processor cores, {_memory()} of memory"]
    for index, gpu in enumerate(facts.gpus):
        bf16 = "bf16" if gpu.bf16 else "no bf16: use fp16 or fp32"
        lines.append(f"GPU {index}: {gpu.name}, {gpu.memory / 2**30:.0f} GiB, {bf16}")
    if not facts.gpus:
        lines.append("no GPU that torch can use: runs take the processor, in fp32")
    built = f"for CUDA {facts.cuda}" if facts.cuda else "without CUDA"
    return [*lines, f"torch is built {built}, driver {facts.driver or 'none found'}"]


def engines(facts: Facts) -> dict[str, str]:
    """Each engine, and whether it can train here; if not, why."""
    found = dict.fromkeys(("single", "ddp", "zero1", "zero2", "zero3", "fsdp2"), "yes")
    if len(facts.gpus) < 2:
        there = f"{len(facts.gpus)} GPU" if facts.gpus else "no GPU"
        found["ddp"] = f"yes, but there is {there}: for tests, on processors with gloo"
    for name in ("zero1", "zero2", "zero3"):
        if not facts.versions.get("deepspeed"):
            found[name] = "no: deepspeed is not installed (pip install 'mllm_cl[deepspeed]')"
        elif not facts.gpus and not facts.compiler:
            found[name] = "no: without a GPU deepspeed compiles what it needs, and there is no g++"
        elif not facts.gpus:
            found[name] = "yes, on processors with gloo: for tests"
    if not facts.gpus:
        found["fsdp2"] = "no: without a GPU accelerate trains with DDP instead"
    return found


def kernels(facts: Facts, recipe: "Recipe | None" = None) -> list[str]:
    """The attention and the experts that transformers would choose, for the recipe's model."""
    from mllm_cl.model.load import empty_model
    from mllm_cl.recipe import ModelBlock

    settings = ModelBlock(model_name_or_path="toy:qwen3_vl_moe")
    name = "a Qwen3-VL-MoE"
    if recipe is not None:
        settings, name = recipe.model, recipe.model.model_name_or_path
    of_images = recipe is not None and recipe.of_images
    try:
        config = _encoder_config(settings) if of_images else empty_model(settings).config
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        return [f"{name} cannot be opened, so nothing is chosen ({_short(error)})"]
    # `attn_implementation` is asked for where weights are loaded; a config alone has the default
    attention = settings.attn_implementation or config._attn_implementation
    lines = [f"attention of {name}: {attention}"]
    if not of_images:
        experts = config.get_text_config()._experts_implementation
        lines.append(f"experts, where a model has them: {experts}")
    flash = facts.versions.get("flash_attn") or facts.versions.get("kernels")
    if facts.gpus and not flash:
        lines.append("flash attention: neither flash_attn nor kernels is installed; sdpa is used")
    return lines


def _encoder_config(settings):
    from mllm_cl.model.encoder import empty_encoder

    return empty_encoder(settings).backbone.config


def known(facts: Facts) -> list[str]:
    """Traps of the stack that are no fault of this machine, and what is done about them."""
    notes = [
        "Qwen3-VL-MoE under ZeRO-3: transformers cannot turn its checkpoint in shards; it is "
        "loaded whole on every process and sharded afterwards (memory for one whole copy each)",
        "'accelerate launch --cpu --num_processes 2' starts ONE process; use torchrun or a file "
        "of launch/cpu",
        "FSDP on a machine without accelerators trains with DDP; mllm-cl refuses it",
        "DeepSpeed without a launcher asks for mpi4py; start it with accelerate or torchrun",
    ]
    if not facts.versions.get("torchvision"):
        notes.append(f"torchvision is absent: {OPTIONAL['torchvision']} will not open")
    if facts.versions.get("deepspeed") and "TORCH_EXTENSIONS_DIR" not in facts.environment:
        notes.append(
            "TORCH_EXTENSIONS_DIR is not set: environments that share a home build DeepSpeed's "
            "kernels over each other; give each a folder of its own"
        )
    if facts.cuda and not facts.driver and not facts.gpus:
        notes.append("torch is built for CUDA, and this machine shows no GPU")
    if facts.environment.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        notes.append("HF_HUB_OFFLINE is set: only models and data that are on this disk open")
    return notes


def wrong(facts: Facts) -> list[Problem]:
    """What is installed or set here and does not work."""
    return [*_old(facts.versions), *_vision(facts), *_gpus(facts), *_launch(facts)]


def _old(versions: Mapping[str, str | None]) -> Iterable[Problem]:
    from packaging.requirements import Requirement

    for line in requires("mllm_cl") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": "deepspeed"}):
            continue
        found = versions[needed.name] if needed.name in versions else _version(needed.name)
        if found is None and needed.marker is None:
            yield Problem(f"no {needed.name}", "nothing runs", f"pip install '{needed}'")
        elif found is not None and not needed.specifier.contains(found, prereleases=True):
            breaks = f"mllm_cl needs {needed.specifier} and is not tested below"
            yield Problem(f"{needed.name} {found}", breaks, f"pip install -U '{needed}'")


def _vision(facts: Facts) -> Iterable[Problem]:
    found, torch = facts.versions.get("torchvision"), facts.versions.get("torch")
    if not found or not torch:
        return
    minor = int(torch.split(".")[1]) + VISION_AHEAD
    pair = f"torchvision {found} with torch {torch}"
    breaks = "image processors fail to import, and transformers with them"
    if found.split(".")[:2] != ["0", f"{minor}"] and torch.startswith("2."):
        yield Problem(pair, breaks, f"pip install 'torchvision==0.{minor}.*'")
    elif facts.vision_error is not None:
        do = "Take both from one index of pytorch.org (CPU or one CUDA), or remove torchvision"
        yield Problem(pair, f"{breaks} ({facts.vision_error})", do)


def _gpus(facts: Facts) -> Iterable[Problem]:
    if facts.driver and not facts.gpus:
        if facts.cuda is None:
            do = "Install the build of torch for your CUDA (pytorch.org)"
            yield Problem("a GPU with a torch without CUDA", "runs take the processor", do)
        else:
            do = f"Update the driver to one for CUDA {facts.cuda}, or see CUDA_VISIBLE_DEVICES"
            what = f"driver {facts.driver} with torch for CUDA {facts.cuda}"
            yield Problem(what, "torch sees no GPU, runs take the processor", do)
    if facts.versions.get("deepspeed") and not facts.compiler:
        what, do = "deepspeed without a compiler", "Install g++, or take another launch file"
        yield Problem(what, "its kernels are built at the first start, which fails", do)


def _launch(facts: Facts) -> Iterable[Problem]:
    def on(name: str) -> bool:
        return facts.environment.get(name, "false").lower() in ("1", "true")

    if on("ACCELERATE_USE_CPU") and on("ACCELERATE_USE_DEEPSPEED"):
        do = "Unset ACCELERATE_USE_CPU; put 'use_cpu: true' into the launch file"
        yield Problem("ACCELERATE_USE_CPU with DeepSpeed", "DDP trains instead of ZeRO", do)
    if on("ACCELERATE_USE_FSDP") and not facts.gpus:
        do = "Choose a file of launch/cpu, or a machine with GPUs"
        yield Problem("FSDP without an accelerator", "DDP trains instead of FSDP2", do)


def reach(recipe: "Recipe") -> tuple[list[str], list[str]]:
    """What of a recipe opens, and what does not: model, processor and every set of data."""
    from mllm_cl.model.load import location

    fine, bad = [], []
    where = recipe.model.model_name_or_path
    first = ("encoder", _open_encoder) if recipe.of_images else ("processor", _open_processor)
    for what, opened in (first, ("weights", _find_weights)):
        try:
            fine.append(f"{what} of {where}: {opened(recipe, location(where))}")
        except (OSError, ValueError, ImportError, RuntimeError, AttributeError) as error:
            bad.append(f"the {what} of {where} cannot be reached: {_short(error)}")
    more = _reach_images(recipe) if recipe.of_images else _reach_tasks(recipe)
    return [*fine, *more[0]], [*bad, *more[1]]


def _reach_tasks(recipe: "Recipe") -> tuple[list[str], list[str]]:
    from mllm_cl.data import read

    fine, bad = [], []
    for block in (*recipe.tasks, *recipe.retain):
        sizes = []
        for split in ("train", "test"):
            try:
                samples = read(block.data, split, block.eval_size, recipe.seed, **block.args)
                sizes.append(f"{split} opens" if len(samples) else f"{split} is empty")
            except (OSError, ValueError, ImportError) as error:
                bad.append(f"{block.name}, {split}: {_short(error)}")
        if sizes:
            fine.append(f"data of {block.name} ({block.data}): {', '.join(sizes)}")
    return fine, bad


def _reach_images(recipe: "Recipe") -> tuple[list[str], list[str]]:
    from mllm_cl.settings import setting_of

    try:
        sequence = setting_of(recipe).tasks_of(recipe)
    except ValueError as error:
        return [], [_short(error)]
    train, test = (sum(len(vars(task)[side]) for task in sequence) for side in ("train", "eval"))
    stages = f"{len(sequence)} stages, {train} pictures to train, {test} to test"
    return [f"data of {recipe.tasks[0].data}: {stages}"], []


def _open_encoder(recipe: "Recipe", where: str) -> str:
    """What sees and what prepares pictures; and what reads class names, where a method needs it."""
    from mllm_cl.model.encoder import empty_encoder
    from mllm_cl.settings import opened

    model, pixels = opened(recipe, empty_encoder)
    seen = f"{type(model.encoder.backbone).__name__}, {model.encoder.width} features"
    return f"{seen}, pictures prepared by {pixels.key}"


def _open_processor(recipe: "Recipe", where: str) -> str:
    from mllm_cl.model.load import load_processor

    return type(load_processor(recipe.model)).__name__


def _find_weights(recipe: "Recipe", where: str) -> str:
    """The file with the weights, or with their places; nothing is fetched."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    revision = recipe.model.model_revision
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if Path(where).is_dir():
            if (Path(where) / name).is_file():
                return name
        elif isinstance(try_to_load_from_cache(where, name, revision=revision), str):
            return f"{name}, on this disk"
        elif file_exists(where, name, revision=revision):
            return f"{name}, on the hub"
    raise ValueError("found neither model.safetensors nor its index")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    # a Turing answers that it knows bf16 and emulates it
    return Gpu(properties.name, properties.total_memory, properties.major >= 8)


def _driver() -> str | None:
    """The version of the NVIDIA driver, None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _vision_error() -> str | None:
    """What `import torchvision` raises, in a process of its own: a broken one stays broken."""
    command = [sys.executable, "-c", "import torchvision"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else None


def _cores() -> int:
    mine = "sched_getaffinity" in vars(os)
    return len(os.sched_getaffinity(0)) if mine else os.cpu_count() or 1


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not on Windows
        return "an unknown amount"
    return f"{size / 2**30:.0f} GiB"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
