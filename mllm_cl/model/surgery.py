"""Surgery on weights: a guard trains a displacement beside a frozen weight, inside `forward`.

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
from mllm_cl.model.heads import Head
from mllm_cl.model.moe_lora import Router


class Guard(nn.Module):
    """The displacement of one frozen weight: what earlier tasks left, and what this task may add.

        effective weight = W + displacement + g(delta)

    `delta` (the weight's shape, zeros at task start) is the only parameter. `displacement` and the
    guard `g` stay fp32 whatever happens to the model, and are no buffers: engines neither cast, nor
    broadcast, nor shard them, and `save_pretrained` does not see them.
    `update="gradient"` lets delta act as it is and guards its gradient instead (the paper's form,
    which an adaptive optimizer undoes). `active_E`, a float mask over the leading dimension, keeps
    resting experts exactly where they were: masking their gradient would not, since Adam's momentum
    moves on without one. `left_out` leaves this task's step out of forward (`teacher.incoming`).
    """

    def __init__(self, weight: nn.Parameter, g: DriftGuard, *, in_fp32: bool) -> None:
        super().__init__()
        size = engine.shape(weight)
        zeros = torch.zeros(size, device=weight.device, dtype=torch.float32)
        self.delta = nn.Parameter(zeros)
        self.displacement = torch.zeros_like(zeros)
        self.g = g.to(weight.device)
        self.active_E: Tensor | None = None
        self.update: Literal["coordinates", "gradient"] = "coordinates"
        self.in_fp32 = in_fp32
        self.left_out = False

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
            return self.displacement if self.left_out else self.displacement + self.step()

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
    their own, stacked experts (E, O, D) under one basis or one each. Installing it changes no
    output and renames no key of the state dict. On a weight that is guarded already, the task's
    step joins the displacement first, `g` takes over and all experts move again. `g` None moves
    freely. `in_fp32` runs the whole module in fp32 with autocast off: for routers, whose small
    displacements bf16 would round away before top-k sees them.
    Raises ValueError where there is nothing of that name, or nothing a guard can act on.
    """
    weight = module._parameters.get(name)
    if weight is None:
        known = ", ".join(key for key, value in module._parameters.items() if value is not None)
        raise ValueError(
            f"{type(module).__name__} has no parameter {name!r} to guard; it has {known or 'none'}"
        )
    g = DriftGuard.free(engine.shape(weight)[-1]) if g is None else g
    _check_fits(name, weight, g)
    installed = installed_on(module).get(name)
    if installed is not None:
        advance(installed)
        installed.g, installed.active_E = g.to(installed.displacement.device), None
        return installed
    weight.requires_grad_(False)
    installed = Guard(weight, g, in_fp32=in_fp32)
    module.add_module(f"{name}_guard", installed)
    if "_unguarded_forward" not in vars(module):
        module._unguarded_forward = module.forward
        module.forward = MethodType(_guarded_forward, module)
    return installed


def _check_fits(name: str, weight: nn.Parameter, g: DriftGuard) -> None:
    size, lead = engine.shape(weight), g.basis_DK.shape[:-2]
    if not weight.is_floating_point() or len(size) < 2:
        raise ValueError(
            f"{name!r} is {weight.dtype} of shape {tuple(size)}; a guard acts on floating-point "
            "weights (..., O, D). Beside a quantised layer guard an adapter's weights."
        )
    if g.dim != size[-1]:
        raise ValueError(
            f"the guard acts on inputs of width {g.dim}, but {name!r} has shape {tuple(size)}"
        )
    if lead not in (torch.Size(), size[:-2]):
        raise ValueError(
            f"the guard has bases for {tuple(lead)} experts, but {name!r} has shape {tuple(size)}"
        )


def installed_on(module: nn.Module) -> dict[str, Guard]:
    """The guards of one module by the name of the parameter they guard."""
    return {
        name.removesuffix("_guard"): child
        for name, child in module.named_children()
        if isinstance(child, Guard)
    }


def guards(model: nn.Module) -> dict[str, Guard]:
    """All guards of a model by the qualified name of the weight they guard."""
    return {
        name.removesuffix("_guard"): module
        for name, module in model.named_modules()
        if isinstance(module, Guard)
    }


def _guarded_forward(self: nn.Module, *args, **kwargs):
    installed = installed_on(self)
    parts = {name: one() for name, one in installed.items()}
    if any(one.in_fp32 for one in installed.values()):
        return _forward_in_fp32(self, parts, args, kwargs)
    if type(self).forward is nn.Linear.forward and _multiplies_narrow(self.weight):
        # Adding into a bf16 weight would round the displacement away; a second product keeps it.
        input = args[0] if args else kwargs["input"]
        output = self._unguarded_forward(*args, **kwargs)
        moved = functional.linear(input, parts["weight"].to(input.dtype))
        return output + moved.to(output.dtype)
    with _Swapped(self, parts):
        return self._unguarded_forward(*args, **kwargs)


def _multiplies_narrow(weight: Tensor) -> bool:
    """Whether a product with `weight` runs in less than fp32: by its own dtype or by autocast's."""
    device = weight.device.type
    return weight.dtype.itemsize < 4 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device).itemsize < 4
    )


def _forward_in_fp32(module: nn.Module, parts: dict[str, Tensor], args: tuple, kwargs: dict):
    """Run a module on fp32 inputs and weights; its outputs get the dtype they would have had."""
    device = next(iter(parts.values())).device.type
    inputs = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    with torch.autocast(device, enabled=False), _Swapped(module, parts, others_in_fp32=True):
        output = module._unguarded_forward(
            *[_as_float(value) for value in args],
            **{key: _as_float(value) for key, value in kwargs.items()},
        )
    if torch.is_tensor(output):
        return output.to(dtype)
    return type(output)(_with_dtype(value, dtype) for value in output)


def _as_float(value):
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def _with_dtype(value, dtype: torch.dtype):
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


class _Swapped:
    """While open, `module.<name>` reads as the effective weight.

    An instance attribute hides the parameter, which stays registered: ZeRO-3's hooks on modules
    that are called inside look through the registered parameters of all.
    """

    def __init__(
        self, module: nn.Module, parts: dict[str, Tensor], *, others_in_fp32: bool = False
    ) -> None:
        self.module, self.parts, self.others_in_fp32 = module, parts, others_in_fp32

    def __enter__(self) -> None:
        self.hidden = self._effective()
        vars(self.module).update(self.hidden)

    def __exit__(self, *error) -> None:
        for name in self.hidden:
            del vars(self.module)[name]

    def _effective(self) -> dict[str, Tensor]:
        found = {}
        for name, weight in self.module._parameters.items():
            if name in self.parts:
                moved = weight.float() + self.parts[name]
                # A MoELoRA's router multiplies in fp32 whatever the dtypes: no rounding for it.
                wide = self.others_in_fp32 or isinstance(self.module, Router)
                found[name] = moved if wide else moved.to(weight.dtype)
            elif self.others_in_fp32 and weight is not None:
                found[name] = weight.float()
        return found


@torch.no_grad()
def advance(one: Guard, shrink: DriftGuard | None = None) -> None:
    """End a task for one guard: its step joins the displacement, delta restarts. Collective.

    `shrink` is applied to the step before it joins.
    """
    delta = engine.full(one.delta).float()
    step = one.step(delta.to(one.displacement.device))
    one.displacement = one.displacement + (step if shrink is None else shrink(step))
    engine.write(one.delta, torch.zeros_like(delta))


@torch.no_grad()
def fold(model: nn.Module) -> dict[str, float]:
    """Write every displacement into its weight, remove all guards, and return the leak of each.

    The function stays the same to rounding and plain transformers can save and reload the model.
    Leak: what rounding to the weight's dtype put into forbidden directions, relative to the
    displacement, of the worst expert (fp32: about 1e-7 of the weight over the displacement; bf16:
    2 to 45 % of a small one). Collective.
    Raises ValueError, before anything is written, for a weight that another module shares and for
    a module whose forward was replaced once more after it was guarded.
    """
    _check_foldable(model)
    leaks = {}
    for path, one in guards(model).items():
        owner_path, _, name = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        weight = owner._parameters[name]
        advance(one)
        before = engine.full(weight)
        after = (before.float() + one.displacement).to(before.dtype)
        rounding = after.double() - before.double() - one.displacement
        leaked = one.g.leak(rounding) * torch.linalg.matrix_norm(rounding)
        whole = torch.linalg.matrix_norm(one.displacement.double())
        leaks[path] = float(torch.where(whole > 0, leaked / whole, 0.0).max())
        engine.write(weight, after)
        _remove(owner, name)
    return leaks


def _check_foldable(model: nn.Module) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for path, parameter in parameters.items():
        places.setdefault(id(parameter), []).append(path)
    for path in guards(model):
        others = [other for other in places[id(parameters[path])] if other != path]
        if others:
            raise ValueError(
                f"{path} is also {others[0]}, which has no displacement: folding would move both. "
                "Untie them (tie_word_embeddings: false), or leave it out of what trains."
            )
        owner = model.get_submodule(path.rpartition(".")[0])
        if owner.forward != MethodType(_guarded_forward, owner):
            raise ValueError(
                f"something replaced the forward of {path.rpartition('.')[0]} after it was "
                "guarded: take that off first"
            )


def _remove(module: nn.Module, name: str) -> None:
    delattr(module, f"{name}_guard")
    if installed_on(module):
        return
    original = module._unguarded_forward
    del module._unguarded_forward, module.forward
    if original != MethodType(type(module).forward, module):
        module.forward = original


def _has_grown(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.partition("::")[0].rpartition(".")[0]), Head)


def only_train(model: nn.Module, weights: list[nn.Parameter]) -> None:
    """Freeze all of `model` but the given parameters and every guard's delta."""
    chosen = {id(parameter) for parameter in weights}
    chosen |= {id(one.delta) for one in guards(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def trained_state(model: nn.Module, base: set[str]) -> dict[str, Tensor]:
    """Everything that makes this model differ from its base, whole; displacements are fp32.

    `base` are the parameter names before any surgery. Adapters come under their own names, base
    weights that train directly too, guarded ones as `name::displacement`. Collective.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        adapter = (
            name not in base and ".base_layer." not in name and not name.endswith("_guard.delta")
        )
        if adapter or (parameter.requires_grad and name in base):
            tensors[name] = engine.full(parameter)
    for path, one in guards(model).items():
        tensors[f"{path}::displacement"] = one.displacement
    return tensors


@torch.no_grad()
def restore_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `trained_state` returned, into a model that had the same surgery. Collective.

    A head that has grown since keeps its own new rows, and columns, after the old ones. Raises
    ValueError where the model lacks a place for a tensor, or the tensor has another shape.
    """
    parameters, installed = dict(model.named_parameters()), guards(model)
    for name, value in tensors.items():
        path, _, kind = name.partition("::")
        place = installed.get(path) if kind else parameters.get(path)
        if place is None:
            raise ValueError(
                f"the state holds {name!r}, for which this model has no place: the recipe's method "
                "or its targets differ from those that wrote it"
            )
        size = place.displacement.shape if kind else engine.shape(place)
        if _has_grown(model, name) and all(map(int.__le__, value.shape, size)):
            whole = engine.full(place)
            whole[tuple(map(slice, value.shape))] = value.to(whole)
            value = whole
        if value.shape != size:
            raise ValueError(
                f"the state holds {name!r} of shape {tuple(value.shape)}, the model {tuple(size)}"
            )
        if kind:
            place.displacement = value.to(place.displacement.device, torch.float32)
        else:
            engine.write(place, value)
