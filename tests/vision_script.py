"""Trains a classifier with each adaptation on whatever engine this process was launched with.

python vision_script.py OUT      # OUT/ENGINE.safetensors; EXPECTED_ENGINE says which
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from encoders import backbone, pictures
from engine_script import prepare_launch

NUM_STEPS = 4
CASES = [
    (kind, model_type, checkpointed)
    for kind, model_type in (
        ("adapters", "vit"),
        ("ssf", "vit"),
        ("shallow", "vit"),
        ("deep", "vit"),
        ("deep", "dinov2"),
        ("adapters", "clip_vision_model"),
        ("adapters", "clip"),
    )
    for checkpointed in (False, True)
]


def classifier(kind: str, model_type: str):
    """A classifier of which the adaptation and the head train, and its prototypes' head."""
    from mllm_cl import engine
    from mllm_cl.model.classifier import Classifier
    from mllm_cl.model.encoder import Encoder
    from mllm_cl.model.heads import Cosine
    from mllm_cl.model.surgery import only_train
    from mllm_cl.model.vision import attach_adapters, attach_prompts, attach_ssf

    # CLIP makes its towers by `_from_config`, which ZeRO-3 would shard before they are random.
    with engine.unsharded_loading():
        encoder = Encoder(backbone(model_type))
    if kind == "adapters":
        trained = attach_adapters(encoder, rank=4, dropout=0.0)  # processes draw differently
    elif kind == "ssf":
        trained = attach_ssf(encoder)
    else:
        trained = attach_prompts(encoder, number=3, deep=kind == "deep")
    model = Classifier(encoder, Cosine(encoder.width, 5, sigma=8.0))
    only_train(model, [*trained.values(), *model.head.parameters()])
    return model


def train(kind: str, model_type: str, checkpointed: bool, folder: str) -> dict[str, torch.Tensor]:
    """The losses and the trained weights after a few steps, and features without adaptation."""
    from transformers import Trainer, TrainingArguments

    from mllm_cl import engine
    from mllm_cl.model.vision import unadapted

    rows = [{"pixel_values": x, "labels": i % 5} for i, x in enumerate(pictures(32))]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=checkpointed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=os.environ.get("ACCELERATE_USE_FSDP", "") != "true",
    )
    model = classifier(kind, model_type)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    found = {
        name: engine.full(value) for name, value in model.named_parameters() if value.requires_grad
    }
    with torch.no_grad(), unadapted(model.encoder):
        # Through the door of the engine, which gathers; the logits of prompts that are left out.
        found["logits"] = trainer.model_wrapped(pixel_values=pictures(4)).logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    used = engine.name(trainer.accelerator)
    assert used == os.environ["EXPECTED_ENGINE"], f"trains with {used}"
    return {**found, "losses": torch.tensor(losses)}


def prototypes() -> dict[str, torch.Tensor]:
    """Class means of samples of which every process saw its own."""
    from mllm_cl import engine
    from mllm_cl.model.heads import Prototype

    generator = torch.Generator().manual_seed(0)
    features_BD, labels_B = torch.randn(30, 6, generator=generator), torch.arange(30) % 4
    head = Prototype(6)
    for _ in range(2):  # two tasks of two classes
        head.grow(2)
        mine = torch.arange(30) % engine.world_size() == engine.rank()
        mine &= (labels_B >= head.old) & (labels_B < head.number)
        head.add(features_BD[mine], labels_B[mine])
        head.share()
    return {"prototypes": head.weight_CD}


def main(out: Path) -> None:
    expected = prepare_launch()
    from safetensors.torch import save_file

    from mllm_cl import engine

    torch.set_num_threads(1)
    tensors = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = train(*case, folder)
        name = "/".join(map(str, case))
        tensors |= {f"{name}/{key}": value.detach().cpu() for key, value in found.items()}
    tensors |= prototypes()
    if engine.rank() == 0:
        kept = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(kept, out / f"{expected}.safetensors")
    engine.barrier()  # who leaves while another still talks to it aborts
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
