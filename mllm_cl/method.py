"""What a continual method is: settings, and a few verbs that act on the model and on a memory."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from mllm_cl.memory import Memory
from mllm_cl.model import adapt
from mllm_cl.model.adapt import Site
from mllm_cl.model.routing import imbalance, listen_for_balance
from mllm_cl.model.surgery import guard, only_train
from mllm_cl.task import Sample, Task, kept_samples

# What a recipe of each setting brings, by the key that it stands under.
SETTINGS = {
    "instruction": "tasks",
    "class_incremental": "classes",
    "retrieval": "images with captions",
}

Batches = Iterable[dict[str, Tensor]]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of a continual method; whatever must survive a task goes into the memory.

    A method acts on the model in two places that every engine respects: inside `forward` (surgery
    in `before_task`) and in the loss. The runner calls the verbs in this order, once per task, on
    all ranks: `before_task` (bare model), `train_set`, `start_task` (model on its engine, before
    the first step), `before_step` (every optimizer step), `before_forward` and `loss` (every
    micro-batch, before and after the model's forward), `after_task` (trained model). `batches` are
    collated samples of the task's training data, this rank's share of a fixed seeded selection;
    `reduce` sums a tensor over ranks.
    """

    setting: ClassVar[str] = "instruction"
    engines: ClassVar[tuple[str, ...]] = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
    rehearsal: ClassVar[bool] = False
    trains_once: ClassVar[bool] = False  # on all tasks at their end, instead of one after another
    calibration_batch: ClassVar[int | None] = None  # samples in one of `batches`; None: any number
    reads: ClassVar[bool] = False  # class names, by the text tower of a CLIP or SigLIP
    unlearns: ClassVar[bool] = False  # it protects no answer that a task supersedes
    starts_exact: ClassVar[bool] = True  # the surgery changes no output, not even by rounding

    # What `batches` may hold of a task; ESFT scores experts on as many (arXiv:2407.01906, 32 x
    # 4096).
    calibration_tokens: int = 131_072

    @property
    def name(self) -> str:
        """The name of the method: that of its file."""
        return Path(type(self).__module__.replace(".", "/")).name

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The engines on which the promise holds with these settings."""
        return self.engines

    @property
    def trains_base(self) -> bool:
        """Whether weights of linears or experts train themselves: no model in four bits has any."""
        return False

    @property
    def rates(self) -> Mapping[str, float]:
        """What the recipe's learning rate is multiplied by, by the beginning of a parameter's name;
        all others have the rate itself. Each is a group of the optimizer, which in a loop of one's
        own is one's own.
        """
        return {}

    @property
    def legacy_decay(self) -> bool:
        """Whether SGD's weight decay falls on all parameters, biases and norms as well, and on what
        is frozen of earlier tasks (`Head.fading`), as it did before torch 2.
        """
        return False

    @property
    def told_apart(self) -> str:
        """Which classes the loss tells from each other: the "own" of a task, of which one alone
        teaches nothing; "all" so far, where nothing is learnt of one that comes first; or "",
        where one can be learnt by itself.
        """
        return ""

    @property
    def describes(self) -> frozenset[str]:
        """The parts that it needs of a file of descriptions: "classes", "pairs"."""
        return frozenset()

    @property
    def view(self) -> str:
        """By which name in `data.views` it wants other views of the pictures that it trains on, to
        learn from beside them; empty: none.
        """
        return ""

    def kept_bytes(self, memory: Memory) -> int:
        """What the method keeps of the past, in bytes: its memory, and samples if it keeps any."""
        return memory.num_bytes

    def num_kept(self, memory: Memory) -> int:
        """How many samples of the past it keeps."""
        return 0

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        """At most how much `kept_bytes` will be after `num_tasks` tasks, from shapes alone; asked
        after `before_task`.
        """
        return 0

    def forecast_guard_bytes(self, model: nn.Module) -> int:
        """At most how much the bases of its guards take on every device, the displacements beside
        them left out; asked after `before_task`.
        """
        return 0

    def captured(self, memory: Memory) -> dict[str, Tensor]:
        """Where the memory approximates what it keeps: the share of it that is held exactly, by
        stack of experts, of each expert that was used (E,).
        """
        return {}

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Put adapters and guards into the model and freeze the rest."""

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """What to train on, None: nothing. `past` is empty without `rehearsal`."""
        return task.train

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Measure the task's data with the incoming model, before the first step."""

    def before_step(self, model: nn.Module, memory: Memory, done: float) -> None:
        """Look at the model before an optimizer step; `done` is the share of the task's steps that
        were made, 0 before the first.
        """

    def before_forward(self, model: nn.Module, inputs: dict[str, Tensor], memory: Memory) -> None:
        """Look at a batch that the model is about to train on."""

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        """A term to add to the task's loss (a mean per optimizer step), or None."""
        return None

    def term(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        """All that joins the task's loss: `loss`, and what settings ask for beside it."""
        return self.loss(model, inputs, outputs, memory)

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Measure what the next task needs, and put it into the memory."""


@dataclass(frozen=True, kw_only=True)
class Untrained(Method):
    """A method that trains nothing: what it learns, if anything, it measures."""

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Everything frozen."""
        only_train(model, [])

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """Nothing to train on."""
        return None


@dataclass(frozen=True, kw_only=True)
class Tuned(Method):
    """A method that trains chosen linears and the native routers; the settings are TRL's names.

    `lora_target_modules` are suffixes, one regular expression, or "all-linear". With `use_peft`
    they get a LoRA, without it their weights train whole. `num_experts` above 0 puts a routed
    mixture of as many LoRA experts there instead, whatever `use_peft` is (CoIN's MoELoRA,
    arXiv:2403.08350): rank and alpha are per expert. `train_router` trains the routers that a
    sparse model was born with, `experts` their experts: `lora` puts a LoRA of the same rank and
    alpha on each, `whole` trains their weights. Empty `lora_target_modules` leave linears alone.
    `router_aux_loss_coef` times the imbalance of all routers that train joins the loss (Switch,
    arXiv:2101.03961; most checkpoints were made with 0.001); the model's own such loss is off then.
    """

    lora_target_modules: tuple[str, ...] | str = "all-linear"
    use_peft: bool = True
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    num_experts: int = 0
    top_k: int | None = None
    train_router: bool = True
    experts: Literal["frozen", "lora", "whole"] = "frozen"
    router_aux_loss_coef: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would be asked for and not happen; a subclass with checks calls this too."""
        if self.top_k is not None and not self.num_experts:
            raise ValueError(
                f"found top_k {self.top_k} with num_experts 0, which leaves no LoRA experts to "
                "choose from. Set num_experts to two or more, or leave top_k out: how many of its "
                "own experts a sparse model uses, its config says."
            )
        if self.top_k is not None and not self.lora_target_modules:
            raise ValueError(
                f"found top_k {self.top_k} with empty lora_target_modules, beside which no LoRA "
                "experts stand to choose from. Name linears, or leave top_k out."
            )
        if self.lora_dropout and self._no_plain_lora:
            raise ValueError(
                f"found lora_dropout {self.lora_dropout} with {self._no_plain_lora}, but only a "
                "plain LoRA of linears has dropout. Set 'lora_dropout: 0', or name linears in "
                "lora_target_modules with 'num_experts: 0' and 'use_peft: true'."
            )
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                f"router_aux_loss_coef is 0 or more, found {self.router_aux_loss_coef}"
            )
        if self.router_aux_loss_coef and not self.trains_router:
            raise ValueError(
                f"found router_aux_loss_coef {self.router_aux_loss_coef}, but no router trains, so "
                "it could only bend what comes before them. Train routers (train_router: true), or "
                "leave it out."
            )

    @property
    def trains_router(self) -> bool:
        """Whether routers are asked to train: the model's own, or those of LoRA experts."""
        return self.train_router or self.num_experts > 0

    @property
    def _no_plain_lora(self) -> str:
        """The setting by which no linear gets a plain LoRA; empty where they do."""
        if self.num_experts:
            return f"num_experts {self.num_experts}"
        if not self.use_peft:
            return "use_peft false"
        return "" if self.lora_target_modules else "empty lora_target_modules"

    @property
    def trains_base(self) -> bool:
        linears = bool(self.lora_target_modules) and not (self.num_experts or self.use_peft)
        return linears or self.experts == "whole"

    def sites(self, model: nn.Module) -> list[Site]:
        """The weights to train; adapters are put in place at the first call."""
        native = adapt.router_sites(model) if self.train_router else []
        found = [*self._adapter_sites(model), *self._expert_sites(model), *native]
        self.listen(model, found)
        return found

    def listen(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Prepare the routers among `sites` for `term`, once; before guards are put in place.

        Raises ValueError where there is none that chooses.
        """
        if self.router_aux_loss_coef:
            listen_for_balance(model, [site.module for site in sites if site.role == "router"])

    def term(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        """The method's `loss` and, with `router_aux_loss_coef`, the imbalance of its routers."""
        uneven = None
        if self.router_aux_loss_coef:  # first: a method's loss may ask the model something else
            uneven = imbalance(model, inputs.get("attention_mask"))
        own = super().term(model, inputs, outputs, memory)
        if uneven is None:
            return own
        uneven = self.router_aux_loss_coef * uneven
        return uneven if own is None else own + uneven

    def _expert_sites(self, model: nn.Module) -> list[Site]:
        if self.experts == "lora":
            return adapt.expert_lora_sites(
                model, rank=self.lora_r, alpha=self.lora_alpha, seed=self.seed
            )
        return adapt.expert_sites(model) if self.experts == "whole" else []

    def _adapter_sites(self, model: nn.Module) -> list[Site]:
        patterns = self.lora_target_modules
        if not patterns:
            return []
        if self.num_experts:
            return adapt.moe_lora_sites(
                model,
                patterns,
                num_experts=self.num_experts,
                rank=self.lora_r,
                alpha=self.lora_alpha,
                top_k=self.top_k,
                seed=self.seed,
            )
        if self.use_peft:
            return adapt.lora_sites(
                model,
                patterns,
                rank=self.lora_r,
                alpha=self.lora_alpha,
                dropout=self.lora_dropout,
                seed=self.seed,
            )
        return adapt.weight_sites(model, patterns)

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Adapters in place, their weights and the routers trainable, the rest frozen."""
        only_train(model, [site.weight for site in self.sites(model)])


@dataclass(frozen=True, kw_only=True)
class Displaced(Tuned):
    """A method that trains a displacement beside each weight instead of the weight.

    So the incoming model is at hand while a task is learnt (`model.teacher`), and weight decay
    pulls to where the last task left the weights. What counts as known are earlier tasks and, if
    the recipe has any, the `retain` sets; as long as nothing does, there is nothing to keep.
    """

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """A guard that forbids nothing on every weight that trains, the rest frozen."""
        for site in self.sites(model):
            guard(site.module, site.name, in_fp32=site.native)
        only_train(model, [])

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Count the task among what is known."""
        memory[f"{self.name}/known"] = memory.get(f"{self.name}/known", torch.tensor(0)) + 1

    def knows(self, memory: Memory) -> bool:
        """Whether there is anything to keep yet."""
        return f"{self.name}/known" in memory

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        return 8


@dataclass(frozen=True, kw_only=True)
class Rehearsing(Tuned):
    """A method that keeps `buffer_bytes` of past samples (PNG and text), shared by the past tasks.

    The budget is in bytes, so that methods can be compared at equal state. Which samples are kept
    is drawn once per task from the seed; each is seen `repeats` times in a task.
    """

    buffer_bytes: int = 2**20
    repeats: int = 1

    def train_set(self, task: Task, memory: Memory, past: Sequence[Task]) -> Sequence[Sample]:
        """This task's samples and the kept ones of the past; puts their bytes into the memory."""
        kept = [kept_samples(one, self.buffer_bytes // len(past), self.seed) for one in past]
        memory[f"{self.name}/bytes"] = torch.tensor(sum(size for _, size in kept))
        memory[f"{self.name}/samples"] = torch.tensor(sum(len(samples) for samples, _ in kept))
        return ConcatDataset(
            [task.train, *[samples for samples, _ in kept for _ in range(self.repeats)]]
        )

    def kept_bytes(self, memory: Memory) -> int:
        return memory.num_bytes + int(memory.get(f"{self.name}/bytes", torch.tensor(0)))

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        return self.buffer_bytes + 16


def names(setting: str = "instruction") -> dict[str, Path]:
    """The package's methods for a setting by name: one file each, which has the method's name."""
    files = sorted((Path(__file__).parent / "methods" / setting).glob("*.py"))
    return {path.stem: path for path in files if not path.stem.startswith("_")}


def load_method(name: str, setting: str = "instruction") -> type[Method]:
    """The class of a method, by its name or by the path of a user's own `.py` file.

    Several settings may have a method of one name: `finetune` trains a language model on tasks, or
    a classifier on classes. Raises ValueError for a name that the setting does not know (with the
    nearest that it does) and for a file that does not define exactly one `Method`.
    """
    if name.endswith(".py"):
        return _the_method(_import_file(Path(name)), name)
    known = names(setting)
    if name not in known:
        others = [other for other in SETTINGS if name in names(other)]
        if others:
            raise ValueError(
                f"method {name!r} learns {SETTINGS[others[0]]}, but here are {SETTINGS[setting]} "
                f"to learn, which {', '.join(known)} do"
            )
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown method {name!r}: {hint}known are {', '.join(known)}, or a path to a .py file"
        )
    module = importlib.import_module(f"mllm_cl.methods.{setting}.{name}")
    return _the_method(module, name)


def _import_file(path: Path):
    if not path.is_file():
        raise ValueError(f"method file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the names in annotations
    spec.loader.exec_module(module)
    return module


def _the_method(module, name: str) -> type[Method]:
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ValueError(
            f"{name} must define exactly one subclass of Method, but defines {len(own)}"
        )
    return own[0]
