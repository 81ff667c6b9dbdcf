"""Surgery on weights: a guard trains a displacement beside a frozen weight and acts inside `forward`.

It is the one place where an update can be shaped that every engine respects: gradient hooks never
fire under FSDP2 and callbacks come after the step under ZeRO. See docs/architecture.md.
"""

from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.drift.guard import DriftGuard, guarded_gradient


class Guard(nn.Module):
    """The displacement of one frozen weight: what earlier tasks left, and what this task may add.

        effective weight = W + displacement + g(delta)

    `delta` (the weight's shape, zeros at task start) is the only parameter. `displacement` and the
    guard `g` stay fp32 whatever happens to the model, and are no buffers: engines neither cast, nor
    broadcast, nor shard them, and `save_pretrained` does not see them.
    `update="gradient"` lets delta act as it is and guards its gradient instead (the paper's form, which
    an adaptive optimizer undoes). `active_E`, a float mask over the leading dimension, keeps resting experts exactly where they were:
    masking their gradient would not, since Adam's momentum moves on without one.
    """

    def __init__(self, weight: nn.Parameter, g: DriftGuard, *, in_fp32: bool) -> None:
        super().__init__()
        size = engine.shape(weight)
        self.delta = nn.Parameter(torch.zeros(size, device=weight.device))
        self.displacement = torch.zeros(size, device=weight.device)
        self.g = g.to(weight.device)
        self.active_E: Tensor | None = None
        self.update: Literal["coordinates", "gradient"] = "coordinates"
        self.in_fp32 = in_fp32

    def step(self, delta: Tensor | None = None) -> Tensor:
        """What this task adds: g(delta), fp32, zero for resting experts."""
        delta = (self.delta if delta is None else delta).float()
        moved = guarded_gradient(delta, self.g) if self.update == "gradient" else self.g(delta)
        if self.active_E is None:
            return moved
        return moved * self.active_E.view(-1, *[1] * (moved.dim() - 1))

    def forward(self) -> Tensor:
        """The whole displacement, fp32: what is added to the frozen weight."""
        with torch.autocast(self.displacement.device.type, enabled=False):
            return self.displacement + self.step()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Follow the model to its device, not to its dtype; `meta` would lose what is kept here.
        device = fn(torch.empty(0, device=self.displacement.device)).device
        if device.type != "meta":
            self.move(device)
        return self

    def move(self, device: torch.device | str) -> None:
        """Bring everything but the parameter to `device`."""
        self.displacement = self.displacement.to(device)
        self.g = self.g.to(device)
        if self.active_E is not None:
            self.active_E = self.active_E.to(device)


def guard(
    module: nn.Module, name: str, g: DriftGuard | None = None, *, in_fp32: bool = False
) -> Guard:
    """Freeze `module.<name>` and train a guarded displacement beside it; returns the `Guard`.

    Works on any module whose forward reads the parameter: `nn.Linear`, routers with a `weight` of
    their own, stacked experts (E, O, D). Installing it changes no output and renames no key of the
    state dict. On a weight that is guarded already, the task's step joins the displacement first
    and `g` takes over. `g` None moves freely.
    `in_fp32` runs the whole module in fp32 with autocast off: for routers, whose small displacements
    bf16 would round away before top-k sees them.
    """
    weight = module._parameters.get(name)
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} to guard")
    size = engine.shape(weight)
    g = DriftGuard.free(size[-1]) if g is None else g
    if g.basis_DK.shape[-2] != size[-1]:
        raise ValueError(
            f"the guard acts on inputs of width {g.basis_DK.shape[-2]}, but {name!r} has shape {tuple(size)}"
        )
    installed = installed_on(module).get(name)
    if installed is not None:
        advance(installed)
        installed.g = g.to(installed.displacement.device)
        return installed
    weight.requires_grad_(False)
    installed = Guard(weight, g, in_fp32=in_fp32)
    module.add_module(f"{name}_guard", installed)
    if "_unguarded_forward" not in vars(module):
        module._unguarded_forward = module.forward
        module.forward = MethodType(_guarded_forward, module)
    return installed


def installed_on(module: nn.Module) -> dict[str, Guard]:
    """The guards of one module by the name of the parameter they guard."""
    return {
        name.removesuffix("_guard"): child for name, child in module.named_children() if isinstance(child, Guard)
    }


def guards(model: nn.Module) -> dict[str, Guard]:
    """All guards of a model by the qualified name of the weight they guard."""
    return {
        name.removesuffix("_guard"): module for name, module in model.named_modules() if isinstance(module, Guard)
    }


def _guarded_forward(self: nn.Module, *args, **kwargs):
    parts = {name: one() for name, one in installed_on(self).items()}
    first = self._parameters[next(iter(parts))]
    if any(one.in_fp32 for one in installed_on(self).values()):
        return _forward_in_fp32(self, parts, args, kwargs)
    if first.dtype != torch.float32 and type(self).forward is nn.Linear.forward:
        # Adding into a bf16 weight would round the displacement away; a second product keeps it.
        output = self._unguarded_forward(*args, **kwargs)
        moved = functional.linear(args[0], parts["weight"].to(args[0].dtype))
        return output + moved.to(output.dtype)
    with _Swapped(self, parts):
        return self._unguarded_forward(*args, **kwargs)


def _forward_in_fp32(module: nn.Module, parts: dict[str, Tensor], args: tuple, kwargs: dict):
    """Run a module on fp32 inputs and weights; its outputs get the dtype that they would have had."""
    device = next(iter(parts.values())).device.type
    inputs = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    with torch.autocast(device, enabled=False), _Swapped(module, parts, others_in_fp32=True):
        output = module._unguarded_forward(
            *[_as_float(value) for value in args], **{key: _as_float(value) for key, value in kwargs.items()}
        )
    if torch.is_tensor(output):
        return output.to(dtype)
    return type(output)(_with_dtype(value, dtype) for value in output)


def _as_float(value):
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def _with_dtype(value, dtype: torch.dtype):
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


class _Swapped:
    """While open, `module.<name>` reads as the effective weight; engines' hooks run outside of it."""

    def __init__(self, module: nn.Module, parts: dict[str, Tensor], *, others_in_fp32: bool = False) -> None:
        self.module, self.parts, self.others_in_fp32 = module, parts, others_in_fp32

    def __enter__(self) -> None:
        parameters = self.module._parameters
        self.kept = dict(parameters.items())
        for name, weight in self.kept.items():
            if name in self.parts:
                moved = weight.float() + self.parts[name]
                parameters[name] = moved if self.others_in_fp32 else moved.to(weight.dtype)
            elif self.others_in_fp32 and weight is not None:
                parameters[name] = weight.float()

    def __exit__(self, *error) -> None:
        for name, weight in self.kept.items():
            self.module._parameters[name] = weight


@torch.no_grad()
def advance(one: Guard) -> None:
    """End a task for one guard: its step joins the displacement, `delta` starts again from zero. Collective."""
    delta = engine.full(one.delta).float()
    one.displacement = one.displacement + one.step(delta.to(one.displacement.device))
    engine.write(one.delta, torch.zeros_like(delta))


@torch.no_grad()
def fold(model: nn.Module) -> dict[str, float]:
    """Write every displacement into its weight, remove all guards, and return the leak of each.

    The function stays the same to rounding and plain transformers can save and reload the model.
    Leak: the share of the displacement's norm that rounding to the weight's dtype put into forbidden
    directions (fp32: about 1e-7 of the weight over the displacement; bf16: 2 to 45 % of a small one).
    """
    leaks = {}
    for path, one in guards(model).items():
        owner_path, _, name = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        weight = owner._parameters[name]
        advance(one)
        before = engine.full(weight)
        after = (before.float() + one.displacement).to(before.dtype)
        leaks[path] = float(one.g.leak(after.float() - before.float()))
        engine.write(weight, after)
        _remove(owner, name)
    return leaks


def _remove(module: nn.Module, name: str) -> None:
    delattr(module, f"{name}_guard")
    if installed_on(module):
        return
    original = module._unguarded_forward
    del module._unguarded_forward, module.forward
    if original.__func__ is not type(module).forward:
        module.forward = original


def only_train(model: nn.Module, patterns: list[nn.Parameter]) -> None:
    """Freeze all of `model` but the given parameters and every guard's delta."""
    chosen = {id(parameter) for parameter in patterns}
    chosen |= {id(one.delta) for one in guards(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def trained_state(model: nn.Module, base: set[str]) -> dict[str, Tensor]:
    """Everything that makes this model differ from its base, whole and fp32 where it is a displacement.

    `base` are the parameter names before any surgery. Adapters come under their own names, base weights
    that train directly too, guarded ones as `name::displacement`. Collective.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        adapter = name not in base and ".base_layer." not in name and not name.endswith("_guard.delta")
        if adapter or (parameter.requires_grad and name in base):
            tensors[name] = engine.full(parameter)
    for path, one in guards(model).items():
        tensors[f"{path}::displacement"] = one.displacement
    return tensors


@torch.no_grad()
def restore_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `trained_state` returned, into a model that had the same surgery. Collective.

    Raises ValueError where the model lacks a place for a tensor, or the tensor has another shape.
    """
    parameters, installed = dict(model.named_parameters()), guards(model)
    for name, value in tensors.items():
        path, _, kind = name.partition("::")
        place = installed.get(path) if kind else parameters.get(path)
        if place is None:
            raise ValueError(
                f"the state holds {name!r}, for which this model has no place: the recipe's method or its "
                "targets differ from those that wrote it"
            )
        size = place.displacement.shape if kind else engine.shape(place)
        if value.shape != size:
            raise ValueError(f"the state holds {name!r} of shape {tuple(value.shape)}, the model {tuple(size)}")
        if kind:
            place.displacement = value.to(place.displacement.device, torch.float32)
        else:
            engine.write(place, value)
