"""Answers the questions of test_evaluate.py on whatever engine this process was launched with:
`evaluate_script.py OUT`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from engine_script import prepare_launch


def answer(kind: str) -> list[dict]:
    """The answers of a shipped base, as the stages that train nothing bring it to the engine."""
    from transformers import Trainer, TrainingArguments

    from mllm_cl import Task, continual, load_method
    from mllm_cl.data.chat import ChatCollator
    from mllm_cl.evaluate import answers
    from mllm_cl.metrics.answers import metric
    from mllm_cl.model.load import load_model, load_processor
    from mllm_cl.recipe import ModelBlock
    from test_evaluate import asked

    block, samples = ModelBlock(model_name_or_path=f"toy:{kind}"), asked()
    processor = load_processor(block)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "") == "true"
    with tempfile.TemporaryDirectory() as folder:
        trainer = continual(Trainer)(
            model=load_model(block),
            args=TrainingArguments(folder, report_to="none", use_cpu=not sharded),
            data_collator=ChatCollator(processor),
            method=load_method("finetune")(lora_target_modules=("q_proj", "v_proj"), lora_r=4),
            task=Task("asked", 1, samples, samples, metric("exact_match")),
        )
        expected = os.environ["EXPECTED_ENGINE"]
        assert trainer.engine == expected, f"launched {expected}, but runs on {trainer.engine}"
        trainer.prepare_for_evaluation()
        rows = answers(trainer.bare_model(), processor, samples, batch_size=3, max_new_tokens=4)
    return [vars(row) for row in rows]


def main(out: Path) -> None:
    prepare_launch()
    import torch

    from mllm_cl import engine

    torch.set_num_threads(1)
    found = {kind: answer(kind) for kind in ("qwen3_vl_moe", "llava")}
    if engine.rank() == 0:
        out.write_text(json.dumps(found))
    engine.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
