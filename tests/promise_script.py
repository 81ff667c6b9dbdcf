"""What engines promise besides the losses of a Trainer: a loop of one's own learns the same, and
notices what does not train, experts that one process has no tokens for train, small updates of a
bf16 model arrive, and scores before and after training are of one precision.

python promise_script.py OUT MODELS      # OUT/promise-ENGINE.safetensors
torchrun --standalone --nproc_per_node 2 promise_script.py OUT MODELS
"""

import os
import sys
import tempfile
from pathlib import Path

from engine_script import FLAWED, Case, cut_off, method_of, prepare_launch, remember

NUM_STEPS, RATE = 6, 1e-5
LOOPS = [Case("same", "llava", False, 1), Case("same", "qwen3-vl-moe", False, 1)]


def loop(case: Case, models: Path, memory, flaw=lambda model: None) -> dict:
    """Losses and displacements of two tasks, learnt in a loop over what accelerate prepared; the
    model gets a flaw before it is wrapped.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader
    from transformers import AutoModelForImageTextToText

    from mllm_cl import Task, engine, learning
    from mllm_cl.data.toy import toy_task
    from mllm_cl.metrics.answers import metric
    from mllm_cl.model.surgery import guards
    from toy_run import collator_of

    # As TrainingArguments does: else FSDP2 looks for the first model's blocks in the second.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=os.environ["EXPECTED_ENGINE"] != "fsdp2")
    accelerator = Accelerator()
    assert engine.name(accelerator) == os.environ["EXPECTED_ENGINE"]
    set_seed(3)
    with engine.unsharded_loading():
        model = AutoModelForImageTextToText.from_pretrained(models / case.kind, dtype=torch.float32)
    collator = collator_of(models / case.kind)
    method, losses = method_of(case), []
    for index, name in enumerate(("arrow", "colour")):
        samples = toy_task(name, "train", 8 * NUM_STEPS)
        task = Task(name, index + 1, samples, samples, metric("exact_match"))
        method.before_task(model, task, memory)
        flaw(model)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
        loader = DataLoader(samples, batch_size=8 // accelerator.num_processes, collate_fn=collator)
        if engine.name(accelerator) == "fsdp2":
            engine.make_ready(accelerator, model)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with learning(
            wrapped, loader, task=task, method=method, memory=memory, accelerator=accelerator
        ) as term:
            for batch in loader:
                outputs = wrapped(**batch)
                accelerator.backward(outputs.loss + term(batch, outputs))
                # DeepSpeed clips by itself, at the same norm.
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(engine.sum_over_ranks(outputs.loss.detach()))
        accelerator.free_memory()
    found = {f"{case.name}::moved::{key}": one.displacement for key, one in guards(model).items()}
    found |= {f"{case.name}::memory::{key}": memory[key] for key in memory}
    return {f"{case.name}::losses": torch.stack(losses) / accelerator.num_processes, **found}


def verdict(models: Path) -> dict:
    """How many tensors a loop names, on each process, where an adapter is out of the graph; -1
    where DDP, which wants a gradient of all, has refused the second step.
    """
    import torch

    from mllm_cl import Memory, engine
    from mllm_cl.truth import NotTraining

    try:
        loop(FLAWED, models, Memory(), cut_off)
        named = 0
    except NotTraining as error:
        assert "had no gradient" in str(error)
        named = len(error.names)
    except RuntimeError as error:
        assert "did not receive grad" in str(error), error
        named = -1
    return {"flawed::named": torch.tensor(engine.gather([named]))}


def lopsided() -> dict:
    """Displacements after four steps of an Ernie, whose text and pictures have experts each, where
    one of two processes never has a picture.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    from families import FAMILIES, inputs
    from mllm_cl import Memory, engine, load_method
    from mllm_cl.model.idle import visit_idle
    from mllm_cl.model.surgery import guards
    from toy_run import toy_tasks

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=os.environ["EXPECTED_ENGINE"] != "fsdp2")
    accelerator = Accelerator()
    with engine.unsharded_loading():
        model = FAMILIES["ernie4_5_vl_moe"]()
    settings = {"experts": "lora", "lora_target_modules": (), "num_experts": 0, "router": "free"}
    method = load_method("same")(**settings, activation="none")
    method.before_task(model, toy_tasks()[0], Memory())
    engine.make_ready(accelerator, model)
    visit_idle(model)
    text = inputs(model)
    text["labels"] = text["input_ids"].clone()
    both = text | {"moe_mm_token_type_ids": (text["input_ids"] < 50).int()}
    mine = (text, both) if accelerator.num_processes == 1 else ((text, both)[engine.rank()],)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    if accelerator.state.deepspeed_plugin is not None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = len(text["input_ids"])
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    for _ in range(4):
        for batch in mine:
            accelerator.backward(wrapped(**batch).loss / len(mine))
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)  # DeepSpeed does by itself
        optimizer.step()
        optimizer.zero_grad()
    moved = {key: engine.full(one.delta).float() for key, one in guards(model).items()}
    accelerator.free_memory()
    return {f"lopsided::{name}": delta for name, delta in moved.items()}


def trainer_of(models: Path, folder: Path, *, dtype: str, rate: float, use_peft: bool):
    """A Trainer that makes one step of AdamW under bf16 mixed precision."""
    from transformers import AutoProcessor, Trainer, TrainingArguments, set_seed

    from mllm_cl import Task, continual, load_method
    from mllm_cl.data.chat import ChatCollator
    from mllm_cl.data.toy import toy_task
    from mllm_cl.metrics.answers import metric
    from mllm_cl.model.load import load_model
    from mllm_cl.recipe import ModelBlock

    # FSDP2 on a CPU is the tests' own: there only the launch can ask for bf16.
    sharded = os.environ["EXPECTED_ENGINE"] == "fsdp2"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not sharded,
        bf16=not sharded,
    )
    set_seed(3)
    samples = toy_task("arrow", "train", 8)
    return continual(Trainer)(
        model=load_model(ModelBlock(model_name_or_path=str(models / "llava"), dtype=dtype)),
        args=arguments,
        train_dataset=samples,
        data_collator=ChatCollator(AutoProcessor.from_pretrained(models / "llava")),
        method=load_method("finetune")(lora_target_modules=("q_proj",), use_peft=use_peft),
        task=Task("arrow", 1, samples, samples, metric("exact_match")),
    )


def steps(models: Path, folder: Path, *, use_peft: bool) -> dict:
    """What one step of `RATE` adds to every trained weight of a bf16 model."""
    from mllm_cl import engine

    def trained() -> dict:
        return {name: engine.full(weight).float() for name, weight in one.trained().items()}

    one = trainer_of(models, folder, dtype="bfloat16", rate=RATE, use_peft=use_peft)
    before = trained()
    one.train()
    head, after = "lora" if use_peft else "whole", trained()
    one.accelerator.free_memory()
    return {f"{head}::{name}": after[name] - start for name, start in before.items()}


def answers(models: Path, folder: Path, *, trains: bool) -> dict:
    """Logits of an fp32 model that answers only, or that made a step of rate 0 before."""
    from mllm_cl.model.watch import evaluating, forward

    one = trainer_of(models, folder, dtype="float32", rate=0.0, use_peft=True)
    probe = one.data_collator([one.train_dataset[index] for index in range(4)])
    if trains:
        one.train()
    else:
        one.prepare_for_evaluation()
    bare = one.bare_model()
    with evaluating(bare):
        logits = forward(bare, probe).logits.float()
    one.accelerator.free_memory()
    return {f"still::{'after' if trains else 'before'}": logits}


def main(out: Path, models: Path) -> None:
    expected = prepare_launch()
    import torch
    from safetensors.torch import save_file

    from mllm_cl import Memory, engine

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in LOOPS:
            past = out / f"past-{case.kind}.safetensors"
            if expected == "single" and not past.exists():
                remember(case, models, folder).save(past)
            found |= loop(case, models, Memory.load(past))
        found |= verdict(models)
        found |= lopsided()
        for use_peft in (True, False):
            found |= steps(models, folder, use_peft=use_peft)
        for trains in (False, True):
            found |= answers(models, folder, trains=trains)
    if engine.rank() == 0:
        tensors = {key: value.detach().cpu().contiguous() for key, value in found.items()}
        save_file(tensors, out / f"promise-{expected}.safetensors")
    engine.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
