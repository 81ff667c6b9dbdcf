"""A recipe: one YAML file that says everything about a continual run except the hardware.

The dataclasses in `recipe` and `blocks` are the documentation of its keys; `training` takes the
names of `transformers.TrainingArguments`, `method` the fields of the method's own dataclass. What
nobody reads is an error.
"""

from mllm_cl.recipe.blocks import DataBlock, EvalBlock, ModelBlock, RetainBlock, TaskBlock
from mllm_cl.recipe.errors import RecipeError
from mllm_cl.recipe.hints import training_hints
from mllm_cl.recipe.recipe import Recipe

__all__ = [
    "DataBlock",
    "EvalBlock",
    "ModelBlock",
    "Recipe",
    "RecipeError",
    "RetainBlock",
    "TaskBlock",
    "training_hints",
]
