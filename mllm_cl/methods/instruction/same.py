"""SAME, stabilised mixture of experts (arXiv:2602.01990): routers confined to the task and
forbidden the past, experts slowed where old inputs would feel it, idle experts at rest.

It differs from the released code in that the displacement is guarded, not the gradient, so that the
promise holds in the weights under any optimizer. docs/architecture.md has the reasons.
E experts, R LoRA rank, D model width, T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.drift.activation import ExpertUsage, ReleasedActivation, active_experts
from mllm_cl.drift.covariance import CovarianceTracker, recomputing, sketch_width
from mllm_cl.drift.expert_moments import ExpertMoments
from mllm_cl.drift.factors import answer_energy, low_rank_moment, slow_a_within, slow_b_within
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.drift.subspace import Spectrum, without
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce, Tuned
from mllm_cl.model.adapt import Site, rest, resting_experts, router_sites
from mllm_cl.model.expert_lora import adapted, stacks
from mllm_cl.model.moe_lora import MoELoRA
from mllm_cl.model.quantised import weight_of, whole
from mllm_cl.model.surgery import Guard, advance, guard, installed_on, only_train
from mllm_cl.model.watch import Watch, kept_rank, measure
from mllm_cl.model.watch_experts import LayerWatch, expert_moments
from mllm_cl.task import Task

SLOWED = {"both": ("A", "B", "weight"), "a": ("A", "weight"), "none": ()}


@dataclass(frozen=True, kw_only=True)
class Same(Tuned):
    """Guards on every trained weight, built from the second moments of what earlier tasks fed it.

    router: `guarded` confines the update to directions that hold `confine_energy` of the task's
        input and forbids those that hold `forbid_energy` of all earlier input; `spectral` is the
        paper's own re-weighting; `free` and `frozen` are the references.
    experts (LoRA factors, or whole linears): slowed by damping (C + damping I)^-1, damping relative
        to the mean eigenvalue of C. `factors: a` is the paper's form, `both` slows B by A C A^T
        too, where most of the drift of old inputs comes from; `none` leaves them free.
    budget: at the end of a task an expert's step is slowed once more, as little as it takes to keep
        tr(dW C dW^T) <= budget tr(W C W^T) on earlier inputs. dW is what this task adds to an
        adapted layer or a whole linear, W the layer without adapters, or the linear as earlier
        tasks left it. The traces are over the kept directions, all of them below width 1024.
    experts (of the model itself): with `lora` each is slowed by the history of the tokens that were
        routed to it, in a basis of `expert_rank` directions that the experts of a layer share.
    activation: experts that this task uses little and earlier ones needed rest: they answer as
        before, and do not move. `paper` decides once per task, from a pass over its data with the
        incoming router. `released` decides at every step as the published code does, whose resting
        experts leave the routing too: it tends to one expert and a router without gradient. `none`
        lets all move.
    update: `coordinates` guards the displacement, `gradient` the gradient as the paper writes it,
        which AdamW undoes. This and `released` are kept for comparison.
    """

    unlearns: ClassVar[bool] = True

    num_experts: int = 8
    router: Literal["guarded", "spectral", "free", "frozen"] = "guarded"
    forbid_energy: float = 0.99
    confine_energy: float = 0.99
    factors: Literal["both", "a", "none"] = "both"
    damping: float = 0.001  # measured: benchmarks/RESULTS.md
    budget: float | None = None
    activation: Literal["paper", "released", "none"] = "paper"
    activation_threshold: float = 0.1
    update: Literal["coordinates", "gradient"] = "coordinates"
    rank: int = 256
    expert_rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("forbid_energy", "confine_energy"):
            if not 0 < vars(self)[name] <= 1:
                raise ValueError(f"{name} is a share in (0, 1], found {vars(self)[name]}")
        for name in ("damping", "budget", "rank", "expert_rank"):
            value = vars(self)[name]
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, found {value}")
        if self.num_experts == 1 or (self.num_experts and self.top_k == 1):
            raise ValueError(
                f"found num_experts {self.num_experts} and top_k {self.top_k}: where one expert "
                "answers, its weight is the constant 1 and a router learns nothing. Set both to "
                "two or more, or 'num_experts: 0' for a plain LoRA."
            )
        if self.experts == "whole":
            raise ValueError(
                "same slows experts through adapters, whose inputs it can watch; found 'experts: "
                "whole'. Set 'experts: lora', or train them whole with esft or finetune."
            )
        if self.budget is not None and self.factors != "both":
            raise ValueError(
                f"budget bounds the drift of a whole expert, but 'factors: {self.factors}' leaves "
                "a part of it free. Set 'factors: both', or leave budget out."
            )

    @property
    def trains_router(self) -> bool:
        return super().trains_router and self.router != "frozen"

    @property
    def runs_on(self) -> tuple[str, ...]:
        # The released averages are one process's own: ranks would decide differently.
        return ("single",) if self.activation == "released" else self.engines

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        """The moment of every guarded input, as if no two modules shared one, and what is counted
        of each task and of what is known before the first.
        """
        met = [site for site in self._guarded(model) if site.role != "B"]
        widths = {site.source: engine.shape(site.weight)[-1] for site in met if not site.experts}
        moments = sum(
            4 * dim * sketch_width(dim, kept_rank(dim, self.rank)) for dim in widths.values()
        )
        moments += sum(self._expert_bytes(site) for site in met if site.experts)
        used = sum(16 * number + 8 for number in _number_of_experts(model).values())
        counted = (num_tasks + 1) * (8 * len(met) + used)
        return moments + counted + used + sum(len(_module_of(site)) for site in met)

    def _expert_bytes(self, site: Site) -> int:
        """The basis, Grams, traces and counts of one stack."""
        return self._basis_bytes(site) + site.experts.num_experts * 16

    def forecast_guard_bytes(self, model: nn.Module) -> int:
        """As if no two modules shared an input, and routers closed or opened all that is kept."""
        return sum(self._basis_bytes(site) for site in self._guarded(model))

    def _basis_bytes(self, site: Site) -> int:
        """A basis, of experts one with a turn for each; where B meets A x, one for each expert."""
        *experts, _, dim = engine.shape(site.weight)
        if site.role == "B":
            return 4 * math.prod(experts) * dim * dim
        if site.experts:
            rank = min(dim, self.expert_rank)
            return 4 * (dim * rank + site.experts.num_experts * rank * rank)
        return 4 * dim * (kept_rank(dim, self.rank) or dim)

    def captured(self, memory: Memory) -> dict[str, Tensor]:
        known = memory.under("same/experts")
        sources = sorted(name.removesuffix("/basis") for name in known if name.endswith("/basis"))
        found = {}
        for source in sources:
            one = ExpertMoments.from_state(memory.under(f"same/experts/{source}"))
            found[source] = one.captured_E[one.count_E > 0]
        return found

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Put a guard on every weight that trains; what it allows is decided in `start_task`."""
        sites = self.sites(model)
        self._check(model, sites)
        trained = [one for one in sites if (one.role, self.router) != ("router", "frozen")]
        self._check_memory(model, trained, memory)
        for site in trained:
            one = guard(site.module, site.name, in_fp32=site.native)
            one.update = self.update
        rest(model)
        if self.activation == "released":
            for path, moe in resting_experts(model).items():
                key, expert = f"same/released/{path}", (task.index - 1) % self.num_experts
                importance_E = memory.get(f"{key}/importance")
                rule = ReleasedActivation(self.num_experts, expert, importance_E)
                memory.put(key, rule.state())
                _follow(moe, memory, key)
        only_train(model, [])

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Measure the task's input with the incoming model and set what each guard allows."""
        watch, layers = self._measure(model, batches, reduce)
        spectra = self._past(watch, task, memory)
        now = None
        if task.supersedes:
            now = self._moments(model, watch, layers, batches, reduce)
        spectra |= self._past_experts(model, task, memory, now)
        shared: dict[tuple[str, str], DriftGuard] = {}
        for site in self._guarded(model):
            one = installed_on(site.module)[site.name]
            source = site.source if site.experts else watch.source_of[site.source]
            # What meets one tensor in one role, as q, k and v do, shares the basis in memory too.
            key = (site.role, site.path if site.role == "B" else source)
            if key not in shared:
                shared[key] = self._guard(site, watch.trackers.get(source), spectra.get(source))
            one.g = shared[key]
            one.move(one.displacement.device)
        if self.activation == "paper":
            self._rest(model, watch.use | layers.use, task, memory)

    def _past(self, watch: Watch, task: Task, memory: Memory) -> dict[str, Spectrum]:
        """What earlier tasks fed each watched module, without a task that this one supersedes.

        Only the answers of that one are wrong, so what it asked is what this task asks: its part
        is the task's own moment, of as many tokens as it put in.
        """
        spectra, old = {}, self._tokens(memory, task.supersedes)
        for source, now in watch.trackers.items():
            past = self._history(memory, source, now.device)
            if past is None:
                continue
            spectra[source] = past.spectrum()
            if source in old:
                share = (old[source].to(now.device) / past.count).clamp_max(1)
                spectra[source] = without(spectra[source], now.spectrum(), share)
        return spectra

    def _past_experts(
        self, model: nn.Module, task: Task, memory: Memory, now: dict[str, ExpertMoments] | None
    ) -> dict[str, Spectrum]:
        """The same for the model's own experts, `now` being given where a task is superseded."""
        known = self._expert_history(model, memory)
        old = self._tokens(memory, task.supersedes, kind="rows") if known else {}
        if not old:
            return {source: past.spectrum() for source, past in known.items()}
        return {
            source: past.without(now[source], min(1.0, float(old[source] / past.count_E.sum())))
            for source, past in known.items()
        }

    def _tokens(self, memory: Memory, name: str | None, kind: str = "tokens") -> dict[str, Tensor]:
        """How many tokens task `name`, and what it superseded, put into each module's history."""
        if name is None:
            return {}
        known = memory.under(f"same/{kind}/{name}")
        if not known:
            tasks = {key.rpartition("/")[0]: None for key in memory.under("same/tokens")}
            raise ValueError(
                f"the task supersedes {name!r}, of which the memory knows nothing; it knows "
                f"{', '.join(tasks) or 'no task'}"
            )
        return known

    def _remember_tokens(
        self, memory: Memory, task: Task, counts: dict[str, Tensor], kind: str = "tokens"
    ) -> None:
        """Keep how many tokens are this task's; those of a task that it supersedes became so."""
        old = self._tokens(memory, task.supersedes, kind)
        counts = {path: count.cpu() + old.get(path, 0) for path, count in counts.items()}
        memory.put(f"same/{kind}/{task.name}", counts)

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Add the task's input, as the finished model sees it, to the history of all tasks."""
        if self.budget is not None:
            self._keep_within_budget(model, task, memory, batches, reduce)
        watch, layers = self._measure(model, batches, reduce)
        past = {
            source: self._history(memory, source, tracker.device)
            for source, tracker in watch.trackers.items()
        }
        for path, source in watch.source_of.items():
            memory[f"same/source/{path}"] = _text(source)
        counts = {path: watch.trackers[source].count for path, source in watch.source_of.items()}
        self._remember_tokens(memory, task, counts)
        for source, tracker in watch.trackers.items():
            if past[source] is not None:
                tracker.merge(past[source])
            memory.put(f"same/moment/{source}", tracker.state())
        for path, use in (watch.use | layers.use).items():
            self._remember_use(memory, task, path, use)
        moments = self._moments(model, watch, layers, batches, reduce)
        if moments:
            rows = {source: one.count_E.sum() for source, one in moments.items()}
            self._remember_tokens(memory, task, rows, kind="rows")
        known = self._expert_history(model, memory)
        for source, here in moments.items():
            both = here.merge(known[source], self.expert_rank) if source in known else here
            memory.put(f"same/experts/{source}", both.state())

    def _remember_use(self, memory: Memory, task: Task, path: str, use: ExpertUsage) -> None:
        """Add the use of the experts at `path` to that by all tasks, and keep it as this task's,
        together with that of a task that it supersedes.
        """
        own, total = (ExpertUsage.from_state(use.state()) for _ in range(2))
        replaced = self._superseded_use(memory, task, path)
        if replaced is not None:
            own.merge(replaced)
        before = memory.under(f"same/use/{path}")
        if before:
            total.merge(ExpertUsage.from_state(before))
        memory.put(f"same/used/{task.name}/{path}", own.state())
        memory.put(f"same/use/{path}", total.state())

    def _superseded_use(self, memory: Memory, task: Task, path: str) -> ExpertUsage | None:
        """What the task that this one supersedes asked of the experts at `path`."""
        if task.supersedes is None:
            return None
        state = memory.under(f"same/used/{task.supersedes}/{path}")
        return ExpertUsage.from_state(state) if state else None

    def _guarded(self, model: nn.Module) -> list[Site]:
        return [site for site in self.sites(model) if site.name in installed_on(site.module)]

    def _check(self, model: nn.Module, sites: list[Site]) -> None:
        """Refuse settings under which the method would protect less than it says."""
        mixtures = resting_experts(model)
        if self.activation == "released" and not mixtures:
            raise ValueError(
                "'activation: released' rests LoRA experts, but num_experts is 0. Set num_experts "
                "to two or more, or leave activation out."
            )
        if self.router in ("free", "frozen") or any(site.role == "router" for site in sites):
            return
        native = len(router_sites(model))
        raise ValueError(
            f"same protects routers, but in {type(model).__name__} none trains ({native} native "
            f"routers, train_router is {self.train_router}, num_experts is {self.num_experts}). "
            "Set num_experts to two or more for a routed mixture of LoRA experts, or "
            "'router: frozen' to slow the trained weights alone."
        )

    def _check_memory(self, model: nn.Module, sites: list[Site], memory: Memory) -> None:
        """Refuse a memory that covers only a part of what trains, or was measured otherwise."""
        known = memory.under("same/source")
        again = "Measure again with the settings of this run."
        for path in (_module_of(site) for site in sites if known):
            if path not in known:
                raise ValueError(
                    f"the memory was measured at other modules ({next(iter(known))} ...) than "
                    f"those that train: of {path} it knows nothing, so it would move freely. "
                    f"{again}"
                )
        for path, there, here in self._sizes(model, sites, memory):
            if there != here:
                raise ValueError(
                    f"the memory was measured with {there} at {path}, but this run has {here} "
                    f"there, and the two do not add up. {again}"
                )

    def _sizes(
        self, model: nn.Module, sites: list[Site], memory: Memory
    ) -> Iterator[tuple[str, str, str]]:
        """What has to agree with the memory: where, how much it is there, how much it is here."""
        for site in (one for one in sites if one.role != "B"):
            dim, path = engine.shape(site.weight)[-1], _module_of(site)
            basis_DK = memory.get(f"same/experts/{site.source}/basis")
            if site.experts and basis_DK is not None:
                yield site.source, f"width {len(basis_DK)}", f"width {dim}"
            dim = site.experts.width if site.experts else dim
            keeper = memory.get(f"same/source/{path}")
            if keeper is not None:
                settings = memory[f"same/moment/{_string(keeper)}/settings"].tolist()
                here = f"width {dim} and rank {kept_rank(dim, self.rank) or dim}"
                yield path, f"width {settings[0]} and rank {settings[1] or settings[0]}", here
        for path, number in _number_of_experts(model).items():
            weight_E = memory.get(f"same/use/{path}/weight")
            if weight_E is not None:
                yield path, f"{len(weight_E)} experts", f"{number} experts"

    def _measure(
        self, model: nn.Module, batches: Batches, reduce: Reduce
    ) -> tuple[Watch, LayerWatch]:
        modules = {
            # What enters the up products of experts is what enters their module.
            source: model.get_submodule(source)
            for source in (_module_of(site) for site in self._guarded(model))
        }
        routers = {path: moe.router for path, moe in resting_experts(model).items()}
        layers = LayerWatch(model, rank=self.rank)
        watch = measure(model, modules, routers, batches, rank=self.rank, gather=layers.gather)
        watch.reduce(reduce)
        layers.reduce(reduce)
        # A rank that saw nothing has its sums on the CPU; all ranks must compute the same bases.
        for site in self._guarded(model):
            device = installed_on(site.module)[site.name].displacement.device
            watch.trackers[watch.source_of[_module_of(site)]].to(device)
            layers.move(site.source, device)
        return watch, layers

    def _moments(
        self, model: nn.Module, watch: Watch, layers: LayerWatch, batches: Batches, reduce: Reduce
    ) -> dict[str, ExpertMoments]:
        """What enters each of the model's own experts: a second pass, in bases of the first."""
        if not adapted(model):
            return {}
        device = next(model.parameters()).device
        bases = layers.bases(watch, self.expert_rank)
        bases = {source: basis_DK.to(device) for source, basis_DK in bases.items()}
        return expert_moments(model, bases, batches, reduce)

    def _expert_history(self, model: nn.Module, memory: Memory) -> dict[str, ExpertMoments]:
        """What earlier tasks fed each of the model's own experts, by stack."""
        device = next(model.parameters()).device
        sources = {site.source for site in self._guarded(model) if site.experts}
        states = {source: memory.under(f"same/experts/{source}") for source in sorted(sources)}
        return {
            source: ExpertMoments.from_state(state).to(device)
            for source, state in states.items()
            if state
        }

    def _history(self, memory: Memory, path: str, device: torch.device) -> CovarianceTracker | None:
        """The moments of what earlier tasks fed the module at `path`, None without one."""
        keeper = memory.get(f"same/source/{path}")
        if keeper is None:
            return None
        state = memory.under(f"same/moment/{_string(keeper)}")
        return CovarianceTracker.from_state(state).to(device)

    def _guard(
        self, site: Site, now: CovarianceTracker | None, past: Spectrum | None
    ) -> DriftGuard:
        """What `site` may do, given what it meets now and what it met before."""
        if site.role == "router" and self.router != "free":
            return self._router_guard(now.spectrum(), past)
        if past is None or site.role not in SLOWED[self.factors]:
            return DriftGuard.free(engine.shape(site.weight)[-1])
        c = low_rank_moment(_effective(site.before), past) if site.role == "B" else past
        return DriftGuard.slow(c, damping=self.damping)

    def _router_guard(self, now: Spectrum, past: Spectrum | None) -> DriftGuard:
        if self.router == "spectral":
            return DriftGuard.spectral(now)
        confined = DriftGuard.confine(now, energy=self.confine_energy)
        if past is None:
            return confined
        # What the last one forbids stays forbidden exactly.
        forbidden = DriftGuard.forbid(past, energy=self.forbid_energy)
        return DriftGuard.compose(confined, forbidden).compact()

    def _rest(
        self, model: nn.Module, use: dict[str, ExpertUsage], task: Task, memory: Memory
    ) -> None:
        """Decide which experts move in this task, from sums over all ranks."""
        for path, (module, weights) in _experts_of(model).items():
            known = memory.under(f"same/use/{path}")
            if not known:
                continue
            past = ExpertUsage.from_state(known)
            replaced = self._superseded_use(memory, task, path)
            if replaced is not None:  # what has to change is no reason to rest
                past = past.without(replaced)
            active_E = active_experts(
                use[path].utilisation_E.cpu(),
                past.importance_E,
                threshold=self.activation_threshold,
            )
            for name in weights:
                one = installed_on(module)[name]
                one.active_E = active_E.float().to(one.displacement.device)
        rest(model)

    def _keep_within_budget(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Join every expert's step to its displacement, slowed as the budget demands. Collective.

        At the end, since only the finished step says what old inputs feel of it; and before this
        task is measured, whose inputs depend on it. A task that supersedes another is measured here
        too, since a resumed one has nothing left of what `start_task` saw.
        """
        known = self._expert_history(model, memory)
        left = self._left(model, task, memory, batches, reduce) if task.supersedes else {}
        for site in self._guarded(model):
            one = installed_on(site.module)[site.name]
            if site.experts:
                history = known.get(site.source)
            else:
                history = self._history(memory, site.source, one.displacement.device)
            if history is None or site.role not in ("weight", "B"):
                continue
            past = left[site.source] if left else history.spectrum()
            if site.role == "B":
                _join_factors(site, past, self.budget)
            else:
                step, weight_OD = one.step(engine.full(one.delta)), _effective(site)
                _join(one, DriftGuard.slow(past, budget=self.budget, weight=weight_OD, delta=step))

    def _left(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> dict[str, Spectrum]:
        """What is left of the history without the superseded task's part, which is what this task's
        data gives the model as it is now; by module and by stack.
        """
        watch, layers = self._measure(model, batches, reduce)
        spectra = self._past(watch, task, memory)
        found = {
            path: spectra[source] for path, source in watch.source_of.items() if source in spectra
        }
        now = self._moments(model, watch, layers, batches, reduce)
        return found | self._past_experts(model, task, memory, now)


def _join_factors(site: Site, past: Spectrum, budget: float) -> None:
    """Join the steps of both factors of the LoRA whose B is at `site`, A's first. Collective."""
    a_site, energy = site.before, _answer_energy(site, past)
    a, b = (installed_on(one.module)[one.name] for one in (a_site, site))
    b_OR, step_RD = site.scale * _effective(site), a.step(engine.full(a.delta))
    _join(a, slow_a_within(budget, past, energy, b_OR=b_OR, step_RD=step_RD))
    step_OR = site.scale * b.step(engine.full(b.delta))
    a_RD = _effective(a_site)
    _join(b, slow_b_within(budget, past, energy, a_RD=a_RD, step_OR=step_OR))


def _join(one: Guard, slowed: DriftGuard) -> None:
    # A step within its budget joins as it is, without even the rounding of a change of basis.
    advance(one, slowed if (slowed.gain_K < 1).any() else None)


def _effective(site: Site) -> Tensor:
    """The weight that earlier tasks left at `site`, fp32. Collective under sharding."""
    return engine.full(site.weight).float() + installed_on(site.module)[site.name].displacement


def _answer_energy(site: Site, past: Spectrum) -> Tensor:
    """tr(W C W^T) of the weight beside which a LoRA answers, or of each expert's, (E,); float64.

    A stack in fp32 may be larger than the model: one expert is widened at a time. Collective under
    sharding.
    """
    if site.experts is None:
        return answer_energy(whole(site.layer, "weight"), past)
    weight = weight_of(site.layer, site.source.rpartition(".")[2])
    stack = engine.full(weight) if isinstance(weight, nn.Parameter) else weight
    stack = stack.mT if site.experts.transposed else stack
    return torch.stack([answer_energy(stack[e], past.of(e)) for e in range(len(past.trace))])


def _module_of(site: Site) -> str:
    """The name of the module whose input is watched for a site."""
    return site.experts.path if site.experts else site.source


def _experts_of(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """The modules whose experts may rest, with the names of their guarded stacks, by where their
    use is kept: LoRA experts by their router, a model's own by their module.
    """
    mixtures = {path: (moe, ("lora_A", "lora_B")) for path, moe in resting_experts(model).items()}
    native = {
        path: (
            lora.layout.module,
            tuple(f"{name}_lora_{one}" for name, _, _ in stacks(lora.layout) for one in "AB"),
        )
        for path, lora in adapted(model).items()
    }
    return mixtures | native


def _number_of_experts(model: nn.Module) -> dict[str, int]:
    """How many experts may rest, by where their use is kept."""
    mixtures = {path: moe.num_experts for path, moe in resting_experts(model).items()}
    return mixtures | {path: one.layout.num_experts for path, one in adapted(model).items()}


def _follow(moe: MoELoRA, memory: Memory, key: str) -> None:
    """Let the released rule, whose state is in `memory`, decide at every training step which
    experts of `moe` answer and learn.
    """
    moe.masks_routing = True
    if "released_hook" in vars(moe):
        moe.released_hook.remove()
    moe.released_hook = moe.router.register_forward_hook(partial(_decide, moe, memory, key))


def _decide(
    moe: MoELoRA, memory: Memory, key: str, router: nn.Module, args: tuple, logits_TE: Tensor
) -> None:
    # A recompute has to find the experts that its own forward had.
    if moe.training and not recomputing():
        weight_TE = logits_TE.detach().softmax(-1).flatten(0, -2).cpu()
        input_TD = args[0].detach().flatten(0, -2).cpu()
        # In the memory, so that a checkpoint in the middle of a task has it.
        parts = ReleasedActivation(moe.num_experts).state()
        rule = ReleasedActivation.from_state({part: memory[f"{key}/{part}"] for part in parts})
        moe.active = rule.step(weight_TE, input_TD).to(logits_TE.device)
        for part, value in rule.state().items():
            memory[f"{key}/{part}"] = value


def _text(name: str) -> Tensor:
    return torch.tensor(list(name.encode()), dtype=torch.uint8)


def _string(name: Tensor) -> str:
    return bytes(name.tolist()).decode()
