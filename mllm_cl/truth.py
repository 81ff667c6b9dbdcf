"""Whether what should train does, looked at once in a task's first steps: a run that learns nothing
ends there, with names, and not days later in a table of scores.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from mllm_cl import engine
from mllm_cl.model.moe_lora import MoELoRA
from mllm_cl.model.surgery import guards
from mllm_cl.model.tower import Sees

# A LoRA's B starts at zero, so its A has no gradient in the first step, nor what routes to it.
STEPS = 3
JUDGED = ("single", "ddp")  # engines on which this has been seen to work; elsewhere it does nothing


class NotTraining(RuntimeError):
    """Something that should train does not; `names` are the parameters."""

    def __init__(self, problem: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(problem)
        self.names = names


class Truth(TrainerCallback):
    """Raises NotTraining after a task's first three steps with a learning rate above zero, if

    * a parameter that trains has had no gradient other than zero,
    * a parameter that trains has not moved. Small steps round away beside large weights, so only
      steps of at least half of `args.learning_rate` count: three of them, after a warm-up;
    * a batch had pictures and the vision tower was not called.

    Exempt is what has no way to move: a guard that lets nothing through or whose experts all rest,
    a mixture whose resting experts leave the routing or in which one expert answers, experts that
    are modules of their own (they may meet no token for a while), and everything outside the
    language model as long as no batch had a picture.

    Nothing is gathered: each process compares a sum of bits of what it keeps, and one sum over the
    processes says whether any of them moved. Runs of fewer steps, and of a learning rate of zero,
    are not judged, nor are those on ZeRO and FSDP2: nothing happens there (ZeRO has no gradients to
    look at by the time callbacks come, so weight decay could hide that a parameter got none).
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.rate = 0.0
        self._stop()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start afresh with what trains now."""
        self._stop()
        if self.trainer.engine not in JUDGED:
            return
        self.watched = self.trainer.trained()
        self.before = {name: _bits(weight) for name, weight in self.watched.items()}
        self.has_gradients = not self.trainer.engine.startswith("zero")
        self.active = bool(self.watched)
        whole = _sees(self.trainer.bare_model())
        if whole is not None:
            tower = whole.get_encoder(modality="image")
            self.hook = tower.register_forward_pre_hook(self._enter_tower)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Note the rate of the step to come: afterwards the schedule has moved on."""
        if self.active:
            self.rate = float(self.trainer._get_learning_rate())

    def look(self, inputs: Mapping[str, Any]) -> None:
        """Note whether a batch that is about to train has pictures."""
        if self.active:
            keys = [key for key in inputs if key.startswith("pixel_values")]
            self.shown = any(inputs[key] is not None for key in keys)
            self.pictures += int(self.shown)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Note which gradients are other than zero; nothing waits for the device here."""
        if not self.active or not self.has_gradients:
            return
        for name, weight in self.watched.items():
            if weight.grad is not None:
                found = engine.local(weight.grad).count_nonzero()
                self.reached[name] = self.reached[name] + found if name in self.reached else found

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Judge, once enough steps were made. Collective then."""
        if not self.active or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        self.steps += int(self.rate > 0)
        self.full_steps += int(self.rate > 0 and self.rate >= args.learning_rate / 2)
        first = self.steps == STEPS and self.rate > 0
        last = self.full_steps == STEPS
        if first or last:
            self._judge(state.global_step, moved=last)
        if last:
            self._stop()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take the hook off a run that was too short to be judged."""
        self._stop()

    def _stop(self) -> None:
        hook = vars(self).get("hook")
        if hook is not None:
            hook.remove()
        self.hook = None
        self.active = self.has_gradients = self.shown = False
        self.steps = self.full_steps = self.pictures = self.calls = 0
        self.watched: dict[str, nn.Parameter] = {}
        self.before: dict[str, Tensor | None] = {}
        self.reached: dict[str, Tensor] = {}

    def _enter_tower(self, tower: nn.Module, args: tuple) -> None:
        self.calls += int(self.shown)

    def _judge(self, step: int, *, moved: bool) -> None:
        names = list(self.watched)
        reached = [name in self.reached and bool(self.reached[name] > 0) for name in names]
        change = [_differ(self.before[name], _bits(self.watched[name])) for name in names]
        told = [float(self.pictures), float(self.calls), *map(float, [*reached, *change])]
        pictures, calls, *found = engine.sum_over_ranks(torch.tensor(told)).tolist()
        exempt = _exempt(self.trainer.bare_model(), names, seen=pictures > 0)
        if pictures and not calls and self.hook is not None:
            raise NotTraining(
                f"{pictures:.0f} batches had pictures, but in {step} steps the vision tower was "
                "never called: the model answers without looking. Check that the collator's "
                "'pixel_values' are what the model's forward takes."
            )
        named = {name: pair for name, *pair in zip(names, found, found[len(names) :], strict=False)}
        named = {name: pair for name, pair in named.items() if name not in exempt}
        without = [name for name, (gradient, _) in named.items() if not gradient]
        if self.has_gradients and without:
            raise NotTraining(
                f"in {step} steps {len(without)} of {len(names)} trained tensors had no gradient: "
                f"{_listed(without)}. The loss does not depend on them, so they cannot learn. "
                "Leave them out of what trains (lora_target_modules, train_router), or let the "
                "model's forward use them.",
                tuple(without),
            )
        still = [name for name, (_, change) in named.items() if not change]
        if moved and still:
            raise NotTraining(
                f"in {step} steps {len(still)} of {len(names)} trained tensors have not moved: "
                f"{_listed(still)}. Either the optimizer does not hold them, or the learning rate "
                f"({self.rate:g}) is lost in rounding. Raise it, or leave them out of what trains.",
                tuple(still),
            )


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
        if (one.active_E is not None and not one.active_E.any())
        or (one.g.outside == 0 and not one.g.gain_K.any())
    ]
    for path, module in model.named_modules():
        if isinstance(module, MoELoRA):
            alone = 1 in (module.num_experts, module.top_k)
            heads += [f"{path}."] * module.masks_routing + [f"{path}.router."] * alone
        elif isinstance(module, nn.ModuleList) and path.endswith("experts"):
            heads.append(f"{path}.")
    found = {name for name in names if name.startswith(tuple(heads))}
    whole = None if seen else _sees(model)
    if whole is not None:
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
