"""Whether what should train does, looked at once in a task's first steps: a run that learns nothing
ends there, with names, and not days later in a table of scores.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer, TrainerCallback

from mllm_cl import engine
from mllm_cl.model.encoding import Encoding
from mllm_cl.model.heads import Head
from mllm_cl.model.idle import idle
from mllm_cl.model.moe_lora import MoELoRA
from mllm_cl.model.surgery import guards
from mllm_cl.model.tower import Sees, guard_picture
from mllm_cl.model.vision import Adaptation
from mllm_cl.stopping import Failed

# A LoRA's B starts at zero, so its A has no gradient in the first step, nor what routes to it.
STEPS = 3
KEY_BIASES = ("k_proj.bias", "key.bias")


class NotTraining(Failed):
    """Something that should train does not; `names` are the parameters."""

    everywhere = True

    def __init__(self, problem: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(problem)
        self.names = names


class Trial:
    """The first three steps of a task with a learning rate above zero, on any engine; a context
    manager, opened when the optimizer exists. `judge` raises NotTraining, on all processes, if

    * a parameter that trains has had no gradient other than zero,
    * a parameter that trains has not moved. Small steps round away beside large weights, so only
      steps of at least half of the `peak` rate count (None: the rate that a schedule started
      from): three of them, after a warm-up;
    * a batch had pictures and the vision tower was not called.

    Exempt is what has no way to move: a guard that lets nothing through or whose experts all rest,
    an adaptation at rest, what of a head fades (`Head.fading`), a mixture whose resting experts
    leave the routing or in which one expert answers, experts that are modules of their own (they
    may meet no token for a while), and as long as no batch had a picture everything outside the
    language model, and experts that no token was meant for.

    Nothing is gathered: each process compares a sum of bits of what it keeps, and one sum over the
    processes says whether any of them moved. Runs of fewer steps, and of a learning rate of zero,
    are not judged.
    """

    def __init__(self, model: nn.Module, *, peak: float | None = None) -> None:
        self.model, self.peak = model, peak
        self.watched = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.before = {name: _bits(weight) for name, weight in self.watched.items()}
        self.reached: dict[str, Tensor] = {}
        self.rate, self.full, self.fresh = 0.0, False, False
        self.made = self.steps = self.full_steps = self.pictures = self.calls = 0
        self.judged, self.tower = False, None
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> "Trial":
        self.open()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def open(self) -> None:
        """Begin to watch."""
        if not self.watched:
            return
        self.handles += [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        for name, weight in self.watched.items():
            # ZeRO has no gradients left when the optimizer steps.
            if engine.keeps_master(weight):
                self.handles.append(weight.register_hook(partial(self._arrive, name)))
        whole = _sees(self.model)
        if whole is not None:
            self.tower = whole.get_encoder(modality="image")
            self.handles.append(self.tower.register_forward_pre_hook(self._enter_tower))

    def look(self, inputs: Mapping[str, Any]) -> None:
        """Note a batch that trains, before its backward, and whether it has pictures."""
        self.fresh = True
        keys = [key for key in inputs if key.startswith("pixel_values")]
        self.pictures += int(any(inputs[key] is not None for key in keys))

    def judge(self) -> None:
        """Judge where enough steps were made: of gradients, and later of movement. Collective
        then.
        """
        last = self.full_steps >= STEPS
        first = self.steps >= STEPS and not self.judged
        if self.handles and (first or last):
            self.judged = True
            if last:
                self.close()
            self._judge(moved=last)

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # ZeRO steps once for each of its partitions: only the first after a batch is a step.
        if not self.fresh:
            return
        self.rate = max(float(group["lr"]) for group in optimizer.param_groups)
        peak = self.peak or max(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups)
        self.full = self.rate > 0 and self.rate >= peak / 2
        for name, weight in self.watched.items():
            if weight.grad is not None:
                self._arrive(name, engine.local(weight.grad))

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self.fresh:
            self.made += 1
            self.steps += int(self.rate > 0)
            self.full_steps += int(self.full)
            self.fresh = False

    def _arrive(self, name: str, gradient: Tensor) -> None:
        found = gradient.count_nonzero()  # nothing waits for the device here
        self.reached[name] = self.reached[name] + found if name in self.reached else found

    def _enter_tower(self, tower: nn.Module, args: tuple) -> None:
        guard = guard_picture(self.model)
        self.calls += int(guard is None or not guard.shown)

    def _judge(self, *, moved: bool) -> None:
        names, steps = list(self.watched), f"in {self.made} steps"
        reached = [name in self.reached and bool(self.reached[name] > 0) for name in names]
        change = [_differ(self.before[name], _bits(self.watched[name])) for name in names]
        told = [float(self.pictures), float(self.calls), *map(float, [*reached, *change])]
        pictures, calls, *found = engine.sum_over_ranks(torch.tensor(told)).tolist()
        exempt = _exempt(self.model, names, seen=pictures > 0)
        if pictures and not calls and self.tower is not None:
            raise NotTraining(
                f"{pictures:.0f} batches had pictures, but {steps} the vision tower was never "
                "called: the model answers without looking. Check that the collator's "
                "'pixel_values' are what the model's forward takes."
            )
        named = {name: pair for name, *pair in zip(names, found, found[len(names) :], strict=False)}
        named = {name: pair for name, pair in named.items() if name not in exempt}
        without = [name for name, (gradient, _) in named.items() if not gradient]
        if without:
            raise NotTraining(
                f"{steps} {len(without)} of {len(names)} trained tensors had no gradient: "
                f"{_listed(without)}. The loss does not depend on them, so they cannot learn. "
                "Leave them out of what trains (lora_target_modules, train_router), or let the "
                "model's forward use them.",
                tuple(without),
            )
        # A softmax does not feel what is added to all of its keys: such a gradient is rounding.
        still = [
            name
            for name, (_, change) in named.items()
            if not change and not name.endswith(KEY_BIASES)
        ]
        if moved and still:
            raise NotTraining(
                f"{steps} {len(still)} of {len(names)} trained tensors have not moved: "
                f"{_listed(still)}. Either the optimizer does not hold them, or the learning rate "
                f"({self.rate:g}) is lost in rounding. Raise it, or leave them out of what trains.",
                tuple(still),
            )


class Truth(TrainerCallback):
    """Puts every task that a Trainer trains on `Trial`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.trial: Trial | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start afresh with what trains now."""
        self.close()
        self.trial = Trial(self.trainer.bare_model(), peak=args.learning_rate)
        self.trial.open()

    def look(self, inputs: Mapping[str, Any]) -> None:
        """Note a batch that is about to train."""
        if self.trial is not None:
            self.trial.look(inputs)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Judge, once enough steps were made. Collective then."""
        self.trial.judge()

    def close(self) -> None:
        """Take all hooks off, also those of a run that was too short to be judged."""
        if self.trial is not None:
            self.trial.close()
            self.trial = None


def _bits(weight: Tensor) -> Tensor | None:
    """The sum of the bit patterns of what this process keeps of a parameter, None without any."""
    kept = engine.local(weight)
    if kept is None or not kept.numel():
        return None
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[kept.itemsize]
    return kept.detach().view(whole).sum(dtype=torch.int64)


def _differ(before: Tensor | None, after: Tensor | None) -> bool:
    return before is not None and after is not None and bool(before != after)


def _exempt(model: nn.Module, names: list[str], *, seen: bool) -> set[str]:
    """The names of parameters that have no way to move."""
    heads = [
        f"{path}_guard."
        for path, one in guards(model).items()
        if (one.active_E is not None and not one.active_E.any()) or one.g.lets_nothing_move
    ]
    for path, module in model.named_modules():
        if isinstance(module, MoELoRA):
            alone = 1 in (module.num_experts, module.top_k)
            heads += [f"{path}."] * module.masks_routing + [f"{path}.router."] * alone
        elif isinstance(module, nn.ModuleList) and path.endswith("experts"):
            heads.append(f"{path}.")
        elif isinstance(module, Adaptation):
            heads += [f"{path}."] * module.resting
        elif isinstance(module, Head):
            fading = {id(one) for one in module.fading()}
            own = module.named_parameters(prefix=path)
            heads += [name for name, one in own if id(one) in fading]
    found = {name for name in names if name.startswith(tuple(heads))}
    # An encoder may have seen the pictures before training: what trains is asked all the same.
    whole = None if seen or isinstance(model, Encoding) else _sees(model)
    if whole is not None:
        waiting = tuple(f"{path}." for path in idle(model))
        found |= {name for name in names if name.startswith(waiting)}
        heard = {id(weight) for weight in whole.get_decoder().parameters()}
        found |= {name for name in names if id(model.get_parameter(name)) not in heard}
    return found


def _sees(model: nn.Module) -> PreTrainedModel | None:
    """The vision-language model in `model`, None for one that only reads."""
    wholes = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    whole = next(wholes, None)
    return whole if isinstance(whole, Sees) else None


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
