"""DualPrompt: keys and values that all tasks share in early attention, and a task's own behind it.

Source: Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning",
arXiv:2204.04799, section 4. Unlike L2P it knows in training which prompts are the task's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mllm_cl import engine
from mllm_cl.learner import KeyedLearner
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.prompts import (
    Choice,
    Keys,
    Prefix,
    attach_keys,
    attach_prefix,
    chosen_blocks,
    drawn,
)
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class DualPrompt(KeyedLearner):
    """`general` keys and `general` values join those of the attention in `general_blocks`; every
    task trains them (G). In `expert_blocks` join `expert` keys and values of the task (E), which
    has one key for all of these blocks. In training all pictures have their task's; at test each
    has those of the task whose key is nearest to the frozen encoder's feature q of it, by cosine.
    A linear head answers the encoder's feature.

        loss = CE over the task's classes − pull · mean over pictures of cos(q, key of the task)

    A task brings its own E and key, and what others learnt stays to the bit. With `inherit` its E
    begins as the last task's was left. Defaults: LAMDA-PILOT's configuration (the paper's E has
    20), from U(−1, 1); it trains with Adam at 0.001 and batches of 24. There a pool of ten is made
    at the start, so that at test keys of tasks to come are chosen from, too, and the pictures of a
    batch share E (`batchwise: true` here). Its mistakes are not made: E in the wrong order, which
    gives half of a batch keys in the place of values, and in C3Box a G that is never trained.
    """

    general: int = 5
    general_blocks: tuple[int, ...] = (0, 1)
    expert: int = 5
    expert_blocks: tuple[int, ...] = (2, 3, 4)
    inherit: bool = True

    def __post_init__(self) -> None:
        """ValueError for a block that would get both."""
        super().__post_init__()
        both = set(self.general_blocks) & set(self.expert_blocks)
        if both:
            raise ValueError(
                f"block {min(both)} is among general_blocks and expert_blocks: an attention has "
                "one prefix, so leave it out of one of them"
            )

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The task's E begins where the last one ended."""
        if not self.inherit or task.index < 2:
            return
        for module in model.encoder.modules():
            if isinstance(module, Prefix) and len(module.pool) > 1:
                engine.write(module.pool[-1], engine.full(module.pool[-2]))

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """G, the newest E and its key; earlier ones are frozen."""
        device, width = next(encoder.parameters()).device, encoder.anatomy.width
        made = {"seed": self.seed, "device": device}
        keys_tPQ = [drawn(1, encoder.width, name=f"key.{task}", **made) for task in range(tasks)]
        keys = Keys(keys_tPQ, top_k=1, forced=tasks - 1, batchwise=self.batchwise)
        trained = [keys.keys[-1]]
        for block in chosen_blocks(encoder, self.general_blocks):
            shared_PSLD = drawn(1, 2, self.general, width, name=block.name, **made)
            prefix = Prefix([shared_PSLD], Choice())
            attach_prefix(encoder, block, prefix)
            trained.append(prefix.pool[0])
        for block in chosen_blocks(encoder, self.expert_blocks):
            names = [f"{block.name}.{task}" for task in range(tasks)]
            pool = [drawn(1, 2, self.expert, width, name=name, **made) for name in names]
            prefix = Prefix(pool, keys.choice)
            attach_prefix(encoder, block, prefix)
            trained.append(prefix.pool[-1])
        attach_keys(encoder, keys)
        return trained
