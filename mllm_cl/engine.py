"""The only file that knows how parameters are sharded: names the engine, gathers, writes, reduces.

Engines: `single`, `ddp`, `zero1`, `zero2`, `zero3` (DeepSpeed) and `fsdp2` (DTensors).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

JSON = str | int | float | bool | None | list["JSON"] | dict[str, "JSON"]
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


def name(accelerator: Accelerator) -> str:
    """The engine that `accelerator` trains with, one of `ENGINES`."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return with_zero(stage, accelerator.num_processes)
    if kind == DistributedType.FSDP:
        return with_fsdp(accelerator.state.fsdp_plugin.fsdp_version)
    return with_zero(0, accelerator.num_processes)


def asked(arguments: "TrainingArguments") -> str:
    """The engine that these arguments and the launch ask for, known before there is a model.

    What DeepSpeed is told is read from its plugin: a launch file may leave the stage to a
    DeepSpeed file of its own.
    """
    if arguments.deepspeed_plugin is not None:
        return with_zero(arguments.deepspeed_plugin.zero_stage, arguments.world_size)
    if arguments.fsdp_plugin_args is not None:
        return with_fsdp(arguments.fsdp_plugin_args["fsdp_version"])
    if _wants("ACCELERATE_USE_FSDP"):
        return with_fsdp(int(os.environ.get("FSDP_VERSION", "1")))
    return with_zero(0, arguments.world_size)


def with_zero(stage: int, processes: int) -> str:
    """The engine of a ZeRO stage; 0 is none."""
    return f"zero{stage}" if stage else "ddp" if processes > 1 else "single"


def with_fsdp(version: int) -> str:
    """The engine of an FSDP version. ValueError for the first, whose parameters are no DTensors."""
    if version != 2:
        raise ValueError("FSDP version 1 was asked for; set 'fsdp_version: 2' in the launch file")
    return "fsdp2"


def _wants(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def launched_processes() -> int:
    """How many processes the launcher started, known before they form a group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meeting_point() -> dist.Store | None:
    """A connection of the caller's own to the store of the launch, None before there is one."""
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    named = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    if not named or not (launchers or dist.is_initialized()):
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=30))
    return dist.PrefixStore(f"mllm_cl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def tell_launcher(error: BaseException) -> None:
    """Leave the trace of the error that is being handled where torchrun looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def asked_precision() -> str:
    """The launch file's `mixed_precision`, which the Trainer follows where it is told no other."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def launched_precision() -> dict[str, bool]:
    """The launch file's `mixed_precision` as an argument of the Trainer, where that has to
    repeat it: DeepSpeed refuses to train where the two differ.
    """
    precision = asked_precision()
    repeated = _wants("ACCELERATE_USE_DEEPSPEED") and precision in ("bf16", "fp16")
    return {precision: True} if repeated else {}


def check_launch(accelerator: Accelerator, model: nn.Module | None = None) -> None:
    """Refuse the launches that train something else than was asked for, without a word.

    A launcher that starts n processes of which each believes to be alone, FSDP that turned into DDP
    (accelerate on a CPU does both), and ZeRO whose ranks read the same data are errors here.
    """
    if launched_processes() != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched_processes()} processes, but accelerate sees "
            f"{accelerator.num_processes}: each would train a model of its own. On a machine "
            "without accelerators set use_cpu=True in TrainingArguments (mllm-cl run does)."
        )
    kind = accelerator.distributed_type
    if _wants("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise ValueError(
            "FSDP was asked for, but accelerate would train with "
            f"{kind.value} (it does so on a machine without accelerators). "
            "Choose another launch file."
        )
    if _wants("ACCELERATE_USE_DEEPSPEED") and kind != DistributedType.DEEPSPEED:
        raise ValueError(
            f"DeepSpeed was asked for, but accelerate would train with {kind.value}. "
            "Unset ACCELERATE_USE_CPU, or put 'use_cpu: true' into the launch file instead."
        )
    sharded = model is None or any(_is_dtensor(parameter) for parameter in model.parameters())
    if name(accelerator) == "fsdp2" and not sharded:
        raise ValueError(
            "FSDP2 was asked for, but no parameter of the model is sharded (no DTensor found)"
        )


def _is_dtensor(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _is_zero3(parameter: Tensor) -> bool:
    # DeepSpeed marks what it partitions by attributes of its own; there is no type to ask for.
    return "ds_id" in vars(parameter)


def _is_zero(parameter: Tensor) -> bool:
    return "_hp_mapping" in vars(parameter) or (
        _is_zero3(parameter) and "_z3_optimizer" in vars(parameter)
    )


def keeps_master(parameter: Tensor) -> bool:
    """Whether the engine itself keeps an fp32 master of this trained parameter, as ZeRO does."""
    return _is_zero3(parameter) or _is_zero(parameter)


def shape(parameter: Tensor) -> torch.Size:
    """The true shape of a parameter (under `zero.Init` the tensor itself has shape (0,))."""
    return torch.Size(vars(parameter)["ds_shape"]) if _is_zero3(parameter) else parameter.shape


def full(parameter: Tensor) -> Tensor:
    """A detached copy of the whole parameter, from the fp32 master if there is one. Collective."""
    if parameter.requires_grad and _is_zero(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().clone()
    if _is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    if _is_dtensor(parameter):
        return parameter.detach().full_tensor().clone()
    return parameter.detach().clone()


def local(parameter: Tensor) -> Tensor | None:
    """What this process keeps of a parameter or gradient, of the fp32 master if there is one; None
    where it keeps nothing. Not collective.
    """
    if _is_zero3(parameter):
        if "_z3_optimizer" not in vars(parameter):
            return vars(parameter)["ds_tensor"]
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(parameter)
    if _is_zero(parameter):
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.hp_fragment
    return parameter.to_local() if _is_dtensor(parameter) else parameter


def try_backward(loss: Tensor, parameters: list[Tensor]) -> None:
    """A backward pass as training makes it, of which nothing stays: no gradient is kept.

    Collective where weights are sharded.
    """
    if any(_is_dtensor(parameter) for parameter in parameters):
        loss.backward()  # what the graph holds are FSDP2's whole weights, not these shards
        for parameter in parameters:
            parameter.grad = None
        return
    # ZeRO hands each gradient on as it comes; none may wait here for the last.
    hooks = [
        parameter.register_hook(lambda gradient: gradient.new_zeros(()).expand_as(gradient))
        for parameter in parameters
        if keeps_master(parameter)
    ]
    try:
        # Past the nodes that add to .grad, where the engines' own hooks sit.
        torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Set the whole parameter, its shards and its fp32 master, to `value`. Collective."""
    value = value.to(parameter.device)
    if parameter.requires_grad and _is_zero(parameter):
        _set_zero(parameter, value, None)
    if _is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if rank() == 0:
                parameter.data.copy_(value)
    elif _is_dtensor(parameter):
        parameter.copy_(_like(parameter, value.to(parameter.dtype)))
    else:
        parameter.copy_(value)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _set_zero(parameter: Tensor, value: Tensor, key: str | None) -> None:
    """Set the fp32 master (key None) or an optimizer state of a parameter that ZeRO partitions."""
    from deepspeed import utils

    value = value.to(torch.float32)
    if not _is_zero3(parameter):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # ZeRO-3's setter of whole tensors fails where their length is no multiple of the world size.
    part = vars(parameter)["ds_tensor"].numel()
    flat = torch.zeros(part * world_size(), device=value.device)
    flat[: value.numel()] = value.flatten()
    local = flat.narrow(0, part * rank(), part)
    if key is None:
        utils.safe_set_local_fp32_param(parameter, local)
    else:
        utils.safe_set_local_optimizer_state(parameter, local, key)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The whole optimizer state by `parameter name::state name`, the same on every engine.
    Collective.

    Scalars (Adam's step) are kept per parameter; on ZeRO they are those of the flat partition, as
    a process knows them that has a part of the parameter.
    """
    inner = _inner(optimizer)
    tensors: dict[str, Tensor] = {}
    known: dict[str, float] = {}
    for parameter_name, parameter in parameters.items():
        parted = _is_zero(parameter)
        mine = not parted or _flat_partition(inner, parameter) is not None
        for key, value in _own_state(inner, parameter).items():
            if value.dim() == 0:
                known |= {f"{parameter_name}::{key}": float(value)} if parted and mine else {}
                tensors[f"{parameter_name}::{key}"] = value.detach().float().cpu()
            elif _is_zero(parameter):
                from deepspeed.utils import safe_get_full_optimizer_state

                _link_state(inner, parameter)
                tensors[f"{parameter_name}::{key}"] = safe_get_full_optimizer_state(
                    parameter, key
                ).clone()
            else:
                tensors[f"{parameter_name}::{key}"] = full(value)
    for one in gather([known]):
        tensors |= {name: torch.tensor(value) for name, value in one.items()}
    return tensors


def room_for_moments(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """As much memory as Adam takes in its first step, for as long as the list is held; nothing for
    an optimizer that has its states already, as ZeRO's, or that is no Adam of torch.
    """
    inner = _inner(optimizer)
    if inner.state or not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        return []
    kept = [one for one in map(local, parameters) if one is not None]
    return [torch.empty_like(one) for one in kept for _ in range(2)]


def forget(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Take what an optimizer has seen of some parameters back to zero, with its count of steps.

    Under ZeRO they must be all that is in their groups, which have one count each.
    """
    inner, done = _inner(optimizer), set()
    for parameter in parameters:
        owner = _flat_partition(inner, parameter) if _is_zero(parameter) else parameter
        if owner is None or id(owner) in done:
            continue
        done.add(id(owner))
        state = inner.state.get(owner, {})
        if not all(map(torch.is_tensor, state.values())):
            # Counts that are no tensors, beside tables of 8 bits: the next step makes them anew.
            del inner.state[owner]
            continue
        for value in state.values():
            value.zero_()


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_state` returned; the parameters keep their values. Collective."""
    inner = _inner(optimizer)
    for parameter_name, parameter in parameters.items():
        head = f"{parameter_name}::"
        saved = {key[len(head) :]: value for key, value in tensors.items() if key.startswith(head)}
        if _is_zero(parameter):
            _load_zero_state(inner, parameter, saved)
        else:
            inner.state[parameter] = {
                key: _placed(inner, parameter, value) for key, value in saved.items()
            }


def _placed(inner: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> Tensor:
    """A saved state where the optimizer wants it: fused kernels take their step from the device."""
    if value.dim() == 0:
        on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
        return value.to(parameter.device) if on_device else value.clone()
    if _is_dtensor(parameter):
        return _like(parameter, value.to(parameter.device))
    return value.to(parameter.device)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that keeps the state, below accelerate's and DeepSpeed's wrappers."""
    while "optimizer" in vars(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _flat_partition(inner: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """The flat fp32 partition that holds `parameter` on this rank, None where none of it is."""
    if _is_zero3(parameter):
        zero = vars(parameter)["_z3_optimizer"]
        return zero.fp32_partitioned_groups_flat[
            zero.grad_position[zero.get_param_id(parameter)][0]
        ]
    mapping = parameter._hp_mapping
    return None if mapping is None else _owner(inner, mapping.hp_fragment)


def _owner(inner: torch.optim.Optimizer, fragment: Tensor) -> Tensor:
    """The flat tensor of `inner` whose storage `fragment` is a view of."""
    for group in inner.param_groups:
        for flat in group["params"]:
            if flat.untyped_storage().data_ptr() == fragment.untyped_storage().data_ptr():
                return flat
    raise AssertionError("a ZeRO fragment belongs to no partition of the optimizer")


def _own_state(inner: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if not _is_zero(parameter):
        state = inner.state[parameter]
        odd = [key for key, value in state.items() if not torch.is_tensor(value)]
        if odd:
            raise ValueError(
                f"{type(inner).__name__} keeps {odd[0]!r} outside of tensors, where a checkpoint "
                "cannot hold it; choose an AdamW, or set 'save_strategy: no'"
            )
        return dict(state)
    # A rank may own no part of a small parameter; the collectives below need the same keys on all.
    flat = _flat_partition(inner, parameter)
    if flat is not None and inner.state.get(flat):
        return dict(inner.state[flat])
    return next((dict(state) for state in inner.state.values() if state), {})


def _load_zero_state(
    inner: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Tensor]
) -> None:
    flat = _flat_partition(inner, parameter)
    if flat is not None:
        state = inner.state[flat]
        for key, value in saved.items():
            if value.dim() == 0:
                state[key] = _placed(inner, flat, value)
            elif key not in state:
                state[key] = torch.zeros_like(flat)
        _link_state(inner, parameter)
    for key, value in saved.items():
        if value.dim() > 0:
            _set_zero(parameter, value.to(parameter.device), key)


def _link_state(inner: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Point the parameter's fragment at the optimizer state. ZeRO-1/2 does so after the first step
    of its first group of parameters alone, when the others have none.
    """
    flat = None if _is_zero3(parameter) else _flat_partition(inner, parameter)
    if flat is None:
        return
    mapping = parameter._hp_mapping
    mapping.optim_fragment = {
        key: value.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
        for key, value in inner.state[flat].items()
        if torch.is_tensor(value) and value.dim() > 0 and value.shape == flat.shape
    }


def make_ready(accelerator: Accelerator, model: nn.Module) -> None:
    """Give a bare model what its engine needs of it; on FSDP2 before `accelerator.prepare`."""
    used = name(accelerator)
    if used == "zero3":
        # Its backward hooks hang on a forward whose first trained weight lies behind frozen ones.
        model.enable_input_require_grads()
    if used == "fsdp2":
        _wrap_what_exists(accelerator, model)


def _wrap_what_exists(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell FSDP2 which of the blocks that the model's class names are in this model.

    A LLaVA names its vision tower's text blocks too, and accelerate stops at the first that is
    missing.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules or ()))


def wrap_for_answers(trainer: "Trainer") -> nn.Module:
    """The trainer's model where it can answer, without an optimizer, in the precision in which it
    would train: scores before and after training are then of one arithmetic. Collective.
    """
    accelerator, model = trainer.accelerator, trainer.model
    used = name(accelerator)
    if used == "zero3":
        from transformers.integrations.deepspeed import deepspeed_init

        deepspeed_init(trainer, num_training_steps=0, inference=True)
        return accelerator.prepare(model)
    if used == "fsdp2":
        # accelerate shards no model without an optimizer; this one never steps.
        return accelerator.prepare(model, torch.optim.SGD(model.parameters()))[0]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _cast_as_deepspeed_does(model, accelerator.state.deepspeed_plugin.deepspeed_config)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _cast_as_deepspeed_does(model: nn.Module, config: dict) -> None:
    """Round the parameters as a DeepSpeed engine would: it casts where others use autocast."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(key, {}).get("enabled") is True:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)


def let_generate(model: nn.Module) -> None:
    """Make `generate` safe on a wrapped model, which calls parts of it outside of its forward.

    There FSDP2 would leave the parameters sharded that belong to no block of their own.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule) and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")


def shard_again(model: nn.Module) -> None:
    """Let go of what a forward without a backward left whole: FSDP2 keeps the outermost module's
    own parameters until then, and whoever lists the model's parameters meanwhile (as an optimizer,
    or a check of what trains) holds others than those that train.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def outlives_its_task(used: str) -> bool:
    """Whether an engine that was destroyed holds on to memory, so that the next task needs a
    process of its own.
    """
    return used == "zero3"


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Inside, `from_pretrained` builds whole models even when ZeRO-3 is launched."""
    from transformers.integrations import deepspeed

    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed.deepspeed_config()
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
        assert deepspeed.deepspeed_config() is config


def rank() -> int:
    """This process's number in the group; the launcher's, before there is a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, on its own device. Collective."""
    if world_size() == 1:
        return tensor
    on_cpu = dist.get_backend() == "gloo"
    total = tensor.detach().clone() if on_cpu or tensor.is_cuda else tensor.detach().cuda()
    dist.all_reduce(total)
    return total.to(tensor.device)


def gathered(tensor: Tensor) -> Tensor:
    """The rows of all processes, which bring equally many, in the order of the ranks; gradients
    find their way back. Collective, and once more in backward.
    """
    return tensor if world_size() == 1 else _Gathered.apply(tensor)


class _Gathered(torch.autograd.Function):
    """A sum with zeros at the others' places, whose gradient is the sum of all gradients there."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        whole = tensor.new_zeros(world_size() * len(tensor), *tensor.shape[1:])
        whole[rank() * len(tensor) :][: len(tensor)] = tensor
        return sum_over_ranks(whole)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        number = len(gradient) // world_size()
        return sum_over_ranks(gradient.contiguous())[rank() * number :][:number]


def any_rank(asked: bool) -> bool:
    """Whether `asked` is true on any process. Collective."""
    return asked if world_size() == 1 else bool(sum_over_ranks(torch.tensor(float(asked))) > 0)


def gather(items: list[JSON]) -> list[JSON]:
    """All processes' lists, joined in the order of the ranks. Collective.

    Items travel as JSON text, not pickled: what arrives is data, whoever sent it.
    """
    if world_size() == 1:
        return items
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    text = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([text.numel()], device=device))
    longest = int(max(size.item() for size in sizes))
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())))
    parts = [
        bytes(part[: int(size)].cpu().tolist()) for part, size in zip(texts, sizes, strict=True)
    ]
    return [item for part in parts for item in json.loads(part)]
