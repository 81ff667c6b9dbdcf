"""SAME in a `transformers.Trainer` of your own: two toy tasks in turn on a small LLaVA.

    python recipes/own_trainer.py

Exchange the model, the processor and the tasks for yours; nothing else knows that they are small.
"""

from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from mllm_cl import Memory, Task, continual, fold, load_method
from mllm_cl.data import read
from mllm_cl.data.chat import ChatCollator
from mllm_cl.metrics.answers import metric
from mllm_cl.model.load import location

folder = location("toy:llava")  # any folder or name on the hub would do
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
tasks = [
    Task(
        name=name,
        index=number,
        train=read(
            f"toy:{name}", "train", 320, 0
        ),  # or your files: read("my_data/first", "train", None, 0)
        eval=read(f"toy:{name}", "test", 20, 0),
        metric=metric("exact_match"),
    )
    for number, name in enumerate(("dial", "bars"), start=1)
]

method = load_method("same")(num_experts=4, lora_target_modules=["q_proj", "v_proj"], damping=0.1)
memory = Memory()
for task in tasks:
    trainer = continual(Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir=f"runs/own_trainer/{task.name}",
            per_device_train_batch_size=16,
            num_train_epochs=1,
            learning_rate=3e-2,
            weight_decay=5,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the collator wants messages and images
        ),
        train_dataset=task.train,
        data_collator=ChatCollator(processor),
        method=method,
        task=task,
        memory=memory,
    )
    trainer.train()
memory.save("runs/own_trainer/memory.safetensors")
fold(model)  # every displacement joins its weight; LoRA experts stay what they are, adapters
