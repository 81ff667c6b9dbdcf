"""ENGINE: what a language model says of classes, and what other views show of pictures, injected
into a frozen CLIP.

Source: Zhou et al., "External Knowledge Injection for CLIP-Based Class-Incremental Learning",
arXiv:2503.08510 (ICCV 2025), and its released code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl.learner import Expanding
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.descriptions import told
from mllm_cl.model.discriminant import Discriminant
from mllm_cl.model.heads import class_sums
from mllm_cl.model.injection import Injection, Rules
from mllm_cl.model.moe_lora import seeded
from mllm_cl.task import Task

ROUNDS = 3  # of one description of each pair, in the released code


@dataclass(frozen=True, kw_only=True)
class ENGINE(Expanding):
    """Both encoders stay as they are, and no picture is kept. A task adds a linear unit u_i for
    images and one u_t for texts; old ones are frozen, and those of a side add up to one matrix:

        L = L_c + text_des · L_t + image_aug · L_i
        L_c  CLIP's loss between u_i(z) and u_t(w) of class names, in a batch
        L_t = − cos(u_t(w), g_t(d)),  d what is said of the class in `classes.descriptions`
        L_i = − cos(u_i(z), g_i(A(x))),  A AutoAugment

    (section 4.1). Old classes take part in L_c and L_t as the means of their features with noise
    N(0, noise²). At test the `rerank_top` nearest classes are compared once more, by what is said
    of each against the others (4.2), with weight `rerank`: 0.5 is the paper's sum of both. Most
    of the released code's answer, which the paper does not tell of, is a Gaussian discriminant on
    features before the projection (`model.discriminant`), with weight `stat`: 0 is the paper alone.
    It has length 1 over all classes, so that its differences are smaller the more there are: 0.8
    says less than it seems.

    mode released differs: L_t and L_i are contrasts within the batch at temperature 1, as is L_c
    with the logarithm of the scale, all with negatives of the own class; A is noise on pixels;
    covariances are merged after they were inverted; d are those of pairs, and of these a few are
    drawn for the answer (from the seed, and not anew each time). Descriptions against classes to
    come are left out unless `future`, as there. With `emulate_legacy_decay` old units fade: on
    CIFAR-100 a task left 6e-7 of them.

    Where `image_aug` is 0 training runs on features from the cache; otherwise every step encodes
    the views. `text_des` and `image_aug` 1, `noise` 0.25 and `rerank_top` 5 are the paper's, `stat`
    0.8 that of most released configurations. Trained with SGD (momentum 0.9, lr 0.05, weight decay
    0.05, cosine, batch 64) for 10 epochs. A contrast sees what is trained on at once, over all
    processes: accumulated steps have fewer than a large batch.
    """

    reads: ClassVar[bool] = True

    text_des: float = 1.0
    image_aug: float = 1.0
    noise: float = 0.25
    stat: float = 0.8
    rerank: float = 0.5
    rerank_top: int = 5
    future: bool = False

    def __post_init__(self) -> None:
        """ValueError for weights that are none."""
        for name in ("text_des", "image_aug", "noise"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} is 0 or more, found {vars(self)[name]}")
        for name in ("stat", "rerank"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} is from 0 to 1, found {vars(self)[name]}")
        if self.rerank_top < 2:
            raise ValueError(f"rerank_top is 2 or more, found {self.rerank_top}")
        self.check_decay()

    @property
    def describes(self) -> frozenset[str]:
        trains = ["classes" if self.mode == "paper" else "pairs"] if self.text_des else []
        return frozenset([*trains, *(["pairs"] if self._reranks else [])])

    @property
    def view(self) -> str:
        if not self.image_aug:
            return ""
        return "autoaugment" if self.mode == "paper" else "noise"

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """A unit of each side for every task so far; the newest train."""
        projection_DV = model.encoder.unproject()
        model.head = Injection(
            model.encoder.width,
            projection_DV=projection_DV,
            log_scale=float(model.encoder.backbone.logit_scale.detach()),
            rules=Rules(
                paper=self.mode == "paper",
                text_des=self.text_des,
                image_aug=self.image_aug,
                noise=self.noise,
                stat=self.stat,
                rerank=self.rerank if self._reranks else 0.0,
                rerank_top=self.rerank_top,
                fades=self.emulate_legacy_decay,
            ),
            seed=self.seed,
        )
        self.expand(model, task)

    def before_step(self, model: Classifier, memory: Memory, done: float) -> None:
        """What a step draws depends on the step alone."""
        model.head.draws = seeded(self.seed, f"draws.{model.head.number}.{done!r}")

    def before_forward(self, model: Classifier, inputs: dict[str, Tensor], memory: Memory) -> None:
        """Names, means and descriptions, once: a run that goes on from a checkpoint comes here."""
        self._inform(model, memory)

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The means of the new classes, and the discriminant of all."""
        self._inform(model, memory)
        head, known = model.head, memory.under(self.name)
        features_NV, label_N = batches.whole()
        label_N, number = label_N - len(task.earlier), len(task.labels)
        sum_CV, count_C = class_sums(features_NV, label_N, number)
        mean_CD = (sum_CV / count_C[:, None]) @ head.projection_DV.double().cpu().mT
        memory[f"{self.name}/prototypes"] = torch.cat([_known(known, mean_CD), mean_CD.float()])
        found = Discriminant.of(features_NV, label_N, number)
        if "count" in known:
            old = Discriminant.restored(known)
            found = old.joined(found) if self.mode == "paper" else old.merged(found)
        for name, tensor in found.tensors().items():
            memory[f"{self.name}/{name}"] = tensor
        super().after_task(model, task, memory, batches, reduce)
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """What the text tower says of names and descriptions, and the discriminant."""
        self._inform(model, memory)
        found = Discriminant.restored(memory.under(self.name))
        model.head.judge(found, self._apart(model) if self._reranks else None)

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """Means and the discriminant, if no later stage brings more classes than the first."""
        classes, width = model.head.number * num_tasks, model.encoder.width
        means = 4 * len(model.head.projection_DV) + 8 * width
        return classes * means + 4 * width * (width + 1) + 16

    def _inform(self, model: Classifier, memory: Memory) -> None:
        head = model.head
        if head.prompts_CPD is not None:
            return
        prompts_CPD = model.prompts(head.names)
        mean_KD = _known(memory.under(self.name), prompts_CPD)[: head.old]
        texts = [self._said_of(model, name) for name in head.names] if self.text_des else []
        head.inform(mean_KD, prompts_CPD, _read(model, texts) if texts else None)

    @property
    def _reranks(self) -> bool:
        return self.rerank > 0 and self.stat < 1

    def _said_of(self, model: Classifier, name: str) -> list[str]:
        """The descriptions that a class is drawn to. ValueError where there is none."""
        known = model.descriptions
        others = None if self.future else model.head.names
        found = known.of(name) if self.mode == "paper" else ()
        found = found or known.pooled(name, others)
        if not found:
            raise ValueError(
                f"nothing is said of {name!r} against a class that was seen by now: describe it "
                "by itself, let the first stage have more classes, or set 'future: true'"
            )
        return [told(model.called(name), text) for text in found]

    def _apart(self, model: Classifier) -> Tensor:
        """The features (C, C, R, D) of what tells each class from each other one."""
        names, rows = model.head.names, []
        for name in names:
            others = [other for other in names if other != name]
            texts = [self._chosen(model, name, other) for other in others]
            read_XRD = list(map(self._rounds, _read(model, texts))) if texts else []
            none_RD = torch.zeros(self._num_rounds, len(model.head.projection_DV))
            read_XRD.insert(names.index(name), none_RD)
            rows.append(torch.stack(read_XRD))
        return torch.stack(rows)

    def _chosen(self, model: Classifier, name: str, other: str) -> list[str]:
        """What is said of a class against another; in mode released, one for each round."""
        known = model.descriptions.against(name, other)
        if self.mode == "released":
            draws = seeded(self.seed, f"{name} against {other}")
            places = torch.randint(len(known), (self._num_rounds,), generator=draws)
            known = [known[place] for place in places]
        return [told(model.called(name), text) for text in known]

    @property
    def _num_rounds(self) -> int:
        return 1 if self.mode == "paper" else ROUNDS

    def _rounds(self, read_XD: Tensor) -> Tensor:
        """(R, D): the mean direction of all, or as they are, one in each round."""
        if self.mode == "released":
            return read_XD
        return functional.normalize(read_XD, dim=-1).mean(0, keepdim=True)


def _read(model: Classifier, texts: list[list[str]]) -> list[Tensor]:
    """The features (X, D) of each group of texts."""
    read_ND = model.read([text for own in texts for text in own])
    return list(read_ND.split(list(map(len, texts))))


def _known(known: dict[str, Tensor], like: Tensor) -> Tensor:
    """The means of the classes that were seen, none before the first task."""
    return known.get("prototypes", torch.zeros(0, like.shape[-1]))
