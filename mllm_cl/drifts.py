"""How far the inputs, the routers and the experts of each learnt task have moved since it was
learnt, told apart by swapping them on a fixed probe.

The forward passes cost 32 samples per learnt task and stage; all else is arithmetic on the kept
tokens. T tokens, N kept tokens, D model width, E experts, K kept directions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from mllm_cl import checkpoint, engine
from mllm_cl.drift.measure import (
    distribution_overlap,
    logit_change,
    rerouting_accuracy,
    routing_entropy,
    routing_kl,
    routing_overlap,
)
from mllm_cl.drift.subspace import Spectrum, energy_inside, energy_rank
from mllm_cl.model import anatomy
from mllm_cl.model.adapt import resting_experts
from mllm_cl.model.layers import Layer, State, effective, trained_layers
from mllm_cl.model.probe import Sight, look
from mllm_cl.probes import Kept, spread, tasks_in
from mllm_cl.task import Task

PROBE_SAMPLES = 32  # per task, the first of its evaluation data
PROBE_BYTES = 64 * 2**20  # of inputs that a stage keeps, over all tasks that it learnt. ours
ENERGY = 0.9  # of a task's inputs, in the directions that stand for it in the trajectory. ours

Row = dict[str, float]


@dataclass(frozen=True)
class Drift:
    """What a stage says about drift (`rows`, `trajectory`), and what it keeps for later ones.

    `rows` are by `task::module`. Relative changes are ||new - old||_F / ||old||_F.

    every module   inputs                 relative change of what enters it
    trained layer  experts                relative change of its answer to old inputs
    router         router                 relative change of its centred logits on old inputs
                   overlap                share of the experts per token that stayed
                   distribution_overlap   sum_e min(p_e, q_e)
                   kl, entropy            KL(learnt || now) in nats; entropy now, over log E
                   rerouting_accuracy     share of tokens that still go to exactly their experts
                   overlap_by_inputs, kl_by_inputs    had only the inputs moved
                   overlap_by_router, kl_by_router    had only the router moved

    `trajectory[module][s][t]` is tr(U_s^T C_t U_s) / tr C_t: U_s are the leading directions that
    hold 90 % of the inputs of task s when it was learnt. C_t is known in 32 directions, so it is a
    lower bound, on the diagonal too.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    trajectory: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    kept: Kept = field(default_factory=lambda: Kept({}))

    def save(self, folder: Path) -> None:
        """Write the stage's files: drift.json and covariance.json, and what is kept."""
        self.kept.save(folder)
        checkpoint.write_json(folder / "drift.json", self.rows)
        checkpoint.write_json(folder / "covariance.json", self.trajectory)


def measure(
    model: nn.Module,
    collate: Callable[[list], dict[str, Tensor]],
    learnt: Sequence[Task],
    earlier: Sequence[Path],
    state: State,
    *,
    batch_size: int,
    quiet: bool = True,
) -> Drift:
    """The drift of the `learnt` tasks, of which those that no `earlier` stage knows are learnt now.

    `earlier` are the folders of the stages before, and `state` is what the model differs from its
    base by. Collective: rank 0 gets the result, the others an empty one.
    """
    layers, routers = trained_layers(model), _routers(model)
    state = {name: tensor.cpu() for name, tensor in state.items()}
    found = Drift(kept=Kept(state))
    if not layers and not routers:
        return found
    top_k, spectra = _top_k(model), {}
    known = {name: folder for folder in reversed(earlier) for name in tasks_in(folder)}
    new = [task.name for task in learnt if task.name not in known]
    for folder, tasks in groupby(learnt, key=lambda task: known.get(task.name)):
        first = found.kept if folder is None or engine.rank() else Kept.read(folder)
        for task in tasks:
            batches = _batches(task, collate, batch_size, quiet)
            sight = look(model, layers, routers, batches, moments=folder is None)
            if engine.rank():
                continue
            if folder is None:
                first.add(task.name, sight, PROBE_BYTES // len(new))
            spectra[task.name] = first.spectra(task.name)
            for path, row in _rows(task.name, first, sight, state, layers, top_k):
                found.rows[f"{task.name}::{path}"] = row
    found.trajectory.update(_trajectory(spectra, new))
    return found


def _batches(task: Task, collate: Callable, batch_size: int, quiet: bool):
    number = min(PROBE_SAMPLES, len(task.eval))
    starts = range(0, number, batch_size)
    for start in tqdm(starts, desc=f"probing {task.name}", disable=quiet, leave=False):
        stop = min(start + batch_size, number)
        yield collate([task.eval[index] for index in range(start, stop)])


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model: native ones, and those of mixtures of LoRA experts."""
    mixtures = {path: moe.router for path, moe in resting_experts(model).items()}
    return dict(anatomy.routers(model)) | mixtures


def _top_k(model: nn.Module) -> dict[str, int]:
    """The experts per token of each router; two of a mixture of LoRA experts that weighs all."""
    mixtures = {
        path: moe.top_k or min(2, moe.num_experts) for path, moe in resting_experts(model).items()
    }
    return anatomy.top_k(model) | mixtures


def _rows(
    task: str,
    first: Kept,
    now: Sight,
    state: State,
    layers: Mapping[str, Layer],
    top_k: Mapping[str, int],
):
    """The rows of one task, by module; what the states or the probe do not tell is left out."""
    for path in sorted({*layers, *now.routing}):
        row: Row = {}
        old_ND, new_ND = first.get(task, "inputs", path), now.inputs.get(path)
        if old_ND is not None and path in layers:
            row |= _layer_row(task, first, state, layers[path], old_ND)
        if old_ND is not None and new_ND is not None and path not in now.scattered:
            # Rounded as what was kept: what did not move is 0 exactly.
            new_ND = spread(new_ND, len(old_ND)).bfloat16().float()
            row["inputs"] = float(logit_change(old_ND, new_ND))
            learnt_NE = first.get(task, "logits", path)
            if learnt_NE is not None and path in now.logits:
                step_ED = _step(path, first.state, state)
                logits_NE = learnt_NE, spread(now.logits[path], len(old_ND))
                row |= _swapped(logits_NE, (old_ND, new_ND), step_ED, top_k[path])
        learnt_TE = first.routing.get(f"{task}::{path}")
        if learnt_TE is not None and path in now.routing:
            row |= _routing_row(learnt_TE.float(), now.routing[path].float(), top_k[path])
        if row:
            yield path, row


def _layer_row(task: str, first: Kept, state: State, layer: Layer, old_ND: Tensor) -> Row:
    logits_NE = first.get(task, "logits", f"{layer.path}.moe_lora.router")
    change_NO = layer.change(first.state, state, old_ND, logits_NE)
    energy = first.get(task, "energy", layer.path)
    if change_NO is None or not energy:
        return {}
    return {"experts": float((change_NO.square().sum(-1).mean() / energy).sqrt())}


def _step(path: str, before: State, after: State) -> Tensor | float:
    """How far the weight (E, D) of a router moved; 0 where it does not train."""
    old_ED, new_ED = (effective(state, f"{path}.weight") for state in (before, after))
    return 0.0 if old_ED is None or new_ED is None else new_ED - old_ED


def _swapped(
    logits_NE: tuple[Tensor, Tensor],
    inputs_ND: tuple[Tensor, Tensor],
    step_ED: Tensor | float,
    k: int,
) -> Row:
    """The drift of routing in two parts: with only the inputs new, and with only the router new.

    A router is linear, so its logits on other inputs follow from its step: with W' = W + S,
    W' x = W x + S x and W x' = W' x' - S x'.
    """
    learnt_NE, now_NE = (part - part.mean(-1, keepdim=True) for part in logits_NE)
    if isinstance(step_ED, Tensor):
        step_ED = step_ED - step_ED.mean(0)
        old_router_NE = now_NE - inputs_ND[1] @ step_ED.mT
        new_router_NE = learnt_NE + inputs_ND[0] @ step_ED.mT
    else:
        old_router_NE, new_router_NE = now_NE, learnt_NE
    return {
        "router": float(logit_change(learnt_NE, new_router_NE)),
        "overlap_by_inputs": float(routing_overlap(learnt_NE, old_router_NE, k)),
        "overlap_by_router": float(routing_overlap(learnt_NE, new_router_NE, k)),
        "kl_by_inputs": float(routing_kl(learnt_NE, old_router_NE)),
        "kl_by_router": float(routing_kl(learnt_NE, new_router_NE)),
    }


def _routing_row(learnt_TE: Tensor, now_TE: Tensor, k: int) -> Row:
    # Half precision rounds small probabilities to 0, whose logarithm is no number.
    logits = [part.clamp_min(1e-7).log() for part in (learnt_TE, now_TE)]
    return {
        "overlap": float(routing_overlap(learnt_TE, now_TE, k)),
        "distribution_overlap": float(distribution_overlap(learnt_TE, now_TE)),
        "kl": float(routing_kl(*logits)),
        "entropy": float(routing_entropy(now_TE)),
        "rerouting_accuracy": float(rerouting_accuracy(learnt_TE, now_TE, k)),
    }


def _trajectory(spectra: Mapping[str, Mapping[str, Spectrum]], new: Sequence[str]):
    """tr(U_s^T C_t U_s) / tr C_t for the pairs of tasks that have a new one in them, by module."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for s, of_s in spectra.items():
        for t, of_t in spectra.items():
            for path in of_s.keys() & of_t.keys() if s in new or t in new else ():
                k = max(1, int(energy_rank(of_s[path].eigenvalue_K, of_s[path].trace, ENERGY)))
                inside = energy_inside(of_s[path].truncate(k).basis_DK, of_t[path])
                found.setdefault(path, {}).setdefault(s, {})[t] = float(inside)
    return {path: found[path] for path in sorted(found)}
