"""CPP: prompts of a task that keep its pictures apart from what is kept of earlier classes, and
several prototypes for each class.

Source: Li et al., "Steering Prototypes with Prompt-tuning for Rehearsal-free Continual Learning",
arXiv:2303.09447, section 4. Unlike DualPrompt it has no head: what answers are centroids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.learner import ClassMethod
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.centroids import Centroids, Finder, attach_finder, centroids
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.contrast import Contrast
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.prompts import Pool, attach_block_pool
from mllm_cl.model.surgery import only_train
from mllm_cl.model.vision import drawn_prompts
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class CPP(ClassMethod):
    """A task's prompts, `length` before every block, drawn in the first task and afterwards as the
    last task left them, train with a neck of three linears that is thrown away. With z its unit
    output for a picture, and S the pictures and the kept centroids of a batch,

        loss_i = − mean over p of i's class (z_i·z_p / τ) + log Σ over n of others exp(z_i·z_n / τ),

    p and n from S. Kept are centroids of earlier classes, `negatives` of them drawn for every step
    with normal noise of their cluster's deviation. Each class then gets `centroids` keys (means of
    what the frozen encoder makes of its pictures, by k-means) and as many values (with the task's
    prompts). A test picture's `candidates` nearest keys name tasks; with the prompts of each of
    them it is compared with all values, and has the class of the nearest. Cosines throughout.

    `mode: released` has centroids for i, too, where the paper's sum is over pictures. Defaults:
    the released arguments (length 1, τ 0.6, 5 centroids, 3 candidates, a neck of 2048, 256
    negatives); it trains with AdamW at 0.001 on a cosine, 50 epochs, batches of 256. Its clusters
    are spectral ones unless k-means is asked for. A contrast sees the pictures that are trained on
    at once, over all processes: accumulated steps have fewer than a large batch.
    """

    length: int = 1
    temperature: float = 0.6
    centroids: int = 5
    candidates: int = 3
    hidden: int = 2048
    negatives: int = 256
    noise: float = 1.0
    mode: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        """ValueError for numbers below one, and a temperature that is none."""
        for name in ("length", "centroids", "candidates", "hidden"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is 1 or more, found {vars(self)[name]}")
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, found {self.temperature}")

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The task's prompts and the neck train; earlier prompts are frozen."""
        if task.index == 0:
            only_train(model, [])
            return
        trained = self._attached(model.encoder, task.index)
        width, both = model.encoder.width, self.mode == "released"
        model.head = Contrast(
            width, self.hidden, temperature=self.temperature, both=both, seed=self.seed
        )
        only_train(model, [*trained, *model.head.parameters()])

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """Keys, values and variances, and whose, if no later stage has more classes."""
        kept = self.centroids * model.head.number * num_tasks
        return kept * (4 * 3 * model.encoder.width + 2 * 8) + 8

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The task's prompts begin where the last one's ended."""
        for module in model.encoder.modules():
            if isinstance(module, Pool) and len(module.pool) > 1:
                engine.write(module.pool[-1], engine.full(module.pool[-2]))

    def before_step(self, model: nn.Module, memory: Memory, done: float) -> None:
        """The centroids that this step is contrasted with: the same on every process."""
        known = memory.under(self.name)
        if not self.negatives or "value" not in known:
            return
        value_KD, number = known["value"], self.negatives
        generator = seeded(self.seed, f"negatives.{self.seen(memory)}.{done!r}")
        chosen = torch.randint(len(value_KD), (number,), generator=generator)
        draws = torch.randn(number, value_KD.shape[1], generator=generator)
        deviation = self.noise * known["variance"][chosen].sqrt()
        model.head.known_KD = value_KD[chosen] + deviation * draws
        model.head.label_K = known["class"][chosen]

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Keys and values of the task's classes; from here on all of them answer."""
        finder, known = model.encoder.finder, memory.under(self.name)
        found: dict[str, list[Tensor]] = {}
        first = self.seen(memory)
        for shown, name in ((Finder.FROZEN, "key"), (Finder.NEWEST, "value")):
            finder.show(shown)
            features_ND, labels_N = batches.whole()
            for place in range(first, first + len(task.labels)):
                generator = seeded(self.seed, f"{name}.{place}")
                own_ND = features_ND[labels_N == place]
                mean_KD, variance_KD = centroids(own_ND, self.centroids, generator)
                found.setdefault(name, []).append(mean_KD.float())
                if name == "key":
                    found.setdefault("task", []).append(torch.full((len(mean_KD),), task.index - 1))
                else:
                    found.setdefault("variance", []).append(variance_KD.float())
                    found.setdefault("class", []).append(torch.full((len(mean_KD),), place))
        for name, parts in found.items():
            before = [known[name]] if name in known else []
            memory[f"{self.name}/{name}"] = torch.cat([*before, *parts])
        super().after_task(model, task, memory, batches, reduce)
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The prompts that keys find, and the values."""
        finder, known = model.encoder.finder, memory.under(self.name)
        finder.know(known["key"], known["task"])
        finder.show(Finder.FOUND)
        model.head = Centroids(model.encoder.width, known["value"], known["class"])

    def _attached(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        device, finder = next(encoder.parameters()).device, Finder(tasks, self.candidates)
        trained = []
        for block in encoder.anatomy.blocks:
            size = 1, self.length, encoder.anatomy.width
            first = drawn_prompts(*size, generator=seeded(self.seed, block.name)).to(device)
            pool = Pool([first.clone() for _ in range(tasks)], finder.choice)
            attach_block_pool(encoder, block, pool)
            trained.append(pool.pool[-1])
        attach_finder(encoder, finder)
        return trained
