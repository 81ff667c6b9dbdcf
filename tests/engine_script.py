"""Trains every case of the engine matrix on whatever engine this process was launched with.

python engine_script.py OUT MODELS      # OUT/ENGINE.json, OUT/ENGINE.safetensors
torchrun --standalone --nproc_per_node 2 engine_script.py OUT MODELS
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

NUM_STEPS, DISPLACED_AT = 20, 5


@dataclass(frozen=True)
class Case:
    """One cell of the matrix, the engine apart."""

    method: str
    kind: str
    checkpointing: bool
    accumulation: int
    mixed: bool = False
    native: bool = False  # the model's own experts train, through adapters
    skewed: bool = False  # every token of the second of two processes goes to the same experts
    balanced: bool = False  # with the balancing loss of routers, which each micro-batch has its own

    @property
    def name(self) -> str:
        way = "checkpointed" if self.checkpointing else "plain"
        kinds = [kind for kind in ("mixed", "native", "skewed", "balanced") if getattr(self, kind)]
        return "/".join([self.method, self.kind, way, str(self.accumulation), *kinds])

    @property
    def plain(self) -> "Case":
        """The case of the same numbers that takes each batch at once and keeps what it computes."""
        return replace(self, checkpointing=False, accumulation=1)


class Mixed(Sequence):
    """Samples that lose their picture: to the second of two processes always, now and then to both.

    Read in order, eight to a step and four to a process.
    """

    def __init__(self, samples: Sequence) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        if index // 4 % 2 == 0 and index // 8 % 3 < 2:
            return sample
        asked, answered = sample["messages"]
        asked = {**asked, "content": [p for p in asked["content"] if p["type"] == "text"]}
        return {**sample, "messages": [asked, answered], "images": []}


def cases(engine: str = "single") -> list[Case]:
    """The cells of an engine; those that differ by little from another have the experts' alone."""
    found = []
    for method, kind in (
        ("finetune", "qwen3-vl-moe"),
        ("moe_lora", "llava"),
        ("same", "llava"),
        ("same", "qwen3-vl-moe"),
        ("router_kl", "qwen3-vl-moe"),
        ("router_replay", "qwen3-vl-moe"),
    ):
        found += [Case(method, kind, False, 1), Case(method, kind, True, 1)]
    found += [Case("same", "llava", False, 2), Case("same", "qwen3-vl-moe", False, 2)]
    found += [Case("expert_lora", "qwen3-vl-moe", False, 1, native=True)]
    found += [Case("same", "qwen3-vl-moe", way, 1, native=True) for way in (False, True)]
    found += [Case("same", "qwen3-vl-moe", False, 1, native=True, skewed=True)]
    found += [Case("same", "qwen3-vl-moe", False, 1, native=True, balanced=True)]
    found += [
        Case(method, kind, False, 1, mixed=True)
        for method, kind in (("finetune", "qwen3-vl-moe"), ("same", "llava"))
    ]
    return [case for case in found if case.native or engine not in FEW]


FEW = ("zero1", "zero3-offload")


FLAWED = Case("finetune", "llava", False, 1)


def skew(model) -> None:
    """In training, send every token of the later half of the batch to the first experts.

    Of two processes that is all the second one has.
    """
    from mllm_cl.model.anatomy import routers

    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))

    def chosen(router, inputs, output):
        if not torch.is_grad_enabled():
            return output  # what measures shares its samples out in another way
        logits_TE, scores_TK, chosen_TK = output
        first = len(chosen_TK) // 2 if world == 1 else len(chosen_TK) * (1 - rank)
        same_K = torch.arange(chosen_TK.shape[1])
        late_T = torch.arange(len(chosen_TK)) >= first
        return logits_TE, scores_TK, torch.where(late_T[:, None], same_K, chosen_TK)

    for router in routers(model).values():
        router.register_forward_hook(chosen)


def shard_on_cpu() -> None:
    """Let accelerate run FSDP2 on gloo: it turns it into DDP on a CPU. Test-only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed import init_process_group, is_initialized

    def backend(self, cpu=False, sagemaker_dp=False, backend=None):
        if int(os.environ.get("LOCAL_RANK", -1)) != -1:
            if cpu and not is_initialized():  # what accelerate leaves out where it is told use_cpu
                init_process_group("gloo")
            return "gloo", DistributedType.MULTI_GPU
        return backend, DistributedType.NO

    PartialState._prepare_backend = backend


def skip_shared_memory_op() -> None:
    """DeepSpeed would compile a shared-memory all-reduce for the CPU first; gloo gives the same
    numbers.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare_launch() -> str:
    """Make this process ready for the engine it was launched for, and name that engine."""
    expected = os.environ["EXPECTED_ENGINE"]
    if expected == "fsdp2":
        shard_on_cpu()
    if expected.startswith("zero"):
        skip_shared_memory_op()
    return expected


def method_of(case: Case):
    from mllm_cl import load_method

    if case.kind == "llava":
        settings = {
            "lora_target_modules": ("q_proj", "v_proj", "down_proj"),
            "lora_r": 4,
            "num_experts": 4,
        }
    else:
        settings = {
            "lora_target_modules": ("q_proj", "o_proj"),
            "use_peft": False,
            "num_experts": 0,
        }
    if case.native:
        settings |= {"experts": "lora", "lora_target_modules": (), "lora_r": 4}
    if case.balanced:
        settings["router_aux_loss_coef"] = 0.2
    if case.mixed:  # a regular expression reaches the vision tower too
        settings["lora_target_modules"] = r".*\.(q_proj|qkv|linear_fc1)"
    if case.method == "finetune":
        settings.pop("num_experts")
    return load_method(case.method)(**settings, calibration_tokens=2000)


def remember(case: Case, models: Path, folder: Path):
    """The memory of a model that has already met another task: what there is to protect."""
    trainer = make_trainer(case, models, None, folder, "colour")
    trainer.prepare_for_evaluation()
    trainer.measure_task()
    return trainer.memory


def train(case: Case, models: Path, memory, folder: Path) -> tuple[list[float], dict, dict]:
    """Losses, displacements after five steps with their leaks; the memory then holds what was
    measured.
    """
    from transformers import TrainerCallback

    from mllm_cl import engine
    from mllm_cl.model.surgery import guards

    class Displacements(TrainerCallback):
        """What every trained weight had moved by, whole, after a few steps."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != DISPLACED_AT:
                return
            for name, one in guards(trainer.bare_model()).items():
                step = one.step(engine.full(one.delta).float())
                found[name], leaks[name] = step.clone(), float(one.g.leak(step).max())
            if not found:
                for name, parameter in trainer.trained().items():
                    found[name] = engine.full(parameter)

    found, leaks = {}, {}
    trainer = make_trainer(case, models, memory, folder, "arrow", [Displacements()])
    expected, _, _ = os.environ["EXPECTED_ENGINE"].partition("-")
    assert trainer.engine == expected, f"launched {expected}, but trains with {trainer.engine}"
    trainer.train()
    if expected == "fsdp2":
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in trainer.trained().values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.detach().cpu() for name, tensor in found.items()}, leaks


def never_called(model) -> None:
    """Let a module train that no forward uses."""
    model.spare = torch.nn.Linear(2, 3, bias=False)


def cut_off(model) -> None:
    """Take the first adapter out of the graph."""
    first = next(module for name, module in model.named_modules() if "lora_B." in name)
    first.register_forward_hook(lambda module, args, output: output.detach())


def blind(model) -> None:
    """Let the model answer without looking."""
    forward = model.forward
    model.forward = lambda pixel_values=None, **inputs: forward(**inputs)


def lost_in_rounding(model) -> None:
    """Leave the model as it is: the rate is too small."""


FLAWS = (never_called, cut_off, blind, lost_in_rounding)


def verdicts(models: Path, folder: Path) -> dict[str, list[str]]:
    """What training says to each flaw, once per process; "trained" where it notices nothing."""
    from mllm_cl import engine
    from mllm_cl.truth import NotTraining

    found = {}
    for flaw in FLAWS:
        trainer = make_trainer(FLAWED, models, None, folder, "arrow")
        flaw(trainer.model)
        if flaw is lost_in_rounding:
            trainer.args.learning_rate, trainer.args.weight_decay = 1e-30, 0.0
        try:
            trainer.train()
            said = "trained"
        except NotTraining as error:
            said = str(error)
        found[flaw.__name__] = engine.gather([said])
        trainer.accelerator.free_memory()
    return found


def make_trainer(case: Case, models: Path, memory, folder: Path, task_name: str, callbacks=()):
    """The Trainer of one cell: a global batch of eight however it is cut, every engine alike."""
    from transformers import Trainer, TrainingArguments, set_seed

    from mllm_cl import Task, continual
    from mllm_cl.data.chat import ChatCollator
    from mllm_cl.data.toy import toy_task
    from mllm_cl.metrics.answers import metric
    from mllm_cl.model.load import load_model, load_processor
    from mllm_cl.recipe import ModelBlock

    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = case.accumulation * (2 if case.balanced and world == 1 else 1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // world // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=NUM_STEPS,
        learning_rate=1e-3,
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=case.checkpointing,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential" if case.mixed or case.skewed else "random",
        ddp_find_unused_parameters=False if case.mixed else None,  # would hide an idle tower
        use_cpu=os.environ.get("ACCELERATE_USE_FSDP", "") != "true",
        seed=3,
    )
    set_seed(3)
    block = ModelBlock(model_name_or_path=str(models / case.kind))
    model, processor = load_model(block), load_processor(block)
    if case.skewed:
        skew(model)
    samples = toy_task(task_name, "train", 160)
    samples = Mixed(samples) if case.mixed else samples
    trainer = continual(Trainer)(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=ChatCollator(processor),
        method=method_of(case),
        task=Task(task_name, 1, samples, samples, metric("exact_match")),
        memory=memory,
        callbacks=list(callbacks),
    )
    trainer.tries_largest = world > 1  # no number of the matrix may differ by it
    return trainer


def main(out: Path, models: Path) -> None:
    expected = prepare_launch()
    from safetensors.torch import save_file

    from mllm_cl import Memory, engine

    torch.set_num_threads(1)
    result, tensors = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        said = verdicts(models, Path(folder))
    for case in cases(expected):
        past = out / f"memory-{case.plain.name.replace('/', '-')}.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            if expected == "single" and not past.exists():
                remember(case, models, Path(folder)).save(past)
            memory = Memory.load(past)
            losses, moved, leaks = train(case, models, memory, Path(folder))
        result[case.name] = {"losses": losses, "leaks": leaks}
        tensors |= {f"{case.name}::moved::{name}": tensor for name, tensor in moved.items()}
        tensors |= {f"{case.name}::memory::{name}": memory[name] for name in memory}
    if engine.rank() == 0:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            out / f"{expected}.safetensors",
        )
        (out / f"{expected}.json").write_text(json.dumps(result))
        (out / f"{expected}-verdicts.json").write_text(json.dumps(said))
    engine.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
