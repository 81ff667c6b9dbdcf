"""SAME, stabilised mixture of experts (arXiv:2602.01990): routers confined to the task and forbidden the
past, experts slowed where old inputs would feel it, idle experts at rest.

It differs from the released code in what DESIGN calls coordinates: the displacement is guarded, not the
gradient, so the promise holds in the weights under any optimizer. docs/architecture.md has the reasons.
E experts, R LoRA rank, D model width.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.drift.activation import ExpertUsage, active_experts
from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.drift.guard import DriftGuard
from mllm_cl.drift.subspace import Spectrum
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce, Tuned
from mllm_cl.model.adapt import Site, resting_experts
from mllm_cl.model.surgery import guard, installed_on, only_train
from mllm_cl.model.watch import Watch, measure
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class Same(Tuned):
    """Guards on every trained weight, built from the second moments of what earlier tasks fed it.

    router: `guarded` confines the update to directions that hold `confine_energy` of the task's input and
        forbids those that hold `forbid_energy` of all earlier input; `spectral` is the paper's own
        re-weighting; `free` and `frozen` are the references.
    experts (LoRA factors, or whole linears): slowed by damping (C + damping I)^-1, damping relative to the
        mean eigenvalue of C. `factors: a` is the paper's form, `both` slows B by A C A^T too, where most
        of the drift of old inputs comes from; `none` leaves them free.
    activation: experts that this task uses little and earlier ones needed rest for the task: they answer
        as they did, and do not move (`mode: paper`, decided once from a pass over the task's data with the
        incoming router). `off` lets all move.
    update: `coordinates` guards the displacement, `gradient` the gradient as the paper writes it, which
        AdamW undoes; kept for comparison.
    """

    num_experts: int = 8
    router: Literal["guarded", "spectral", "free", "frozen"] = "guarded"
    forbid_energy: float = 0.99
    confine_energy: float = 0.99
    factors: Literal["both", "a", "none"] = "both"
    damping: float = 0.1
    activation: Literal["paper", "off"] = "paper"
    activation_threshold: float = 0.1
    update: Literal["coordinates", "gradient"] = "coordinates"
    rank: int = 256

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Put a guard on every weight that trains; what it allows is decided in `start_task`."""
        for site in self.sites(model):
            if site.role == "router" and self.router == "frozen":
                continue
            one = guard(site.module, site.name, in_fp32=site.native)
            one.update = self.update
        only_train(model, [])

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Measure the task's input with the incoming model and set what each guard allows."""
        watch = self._measure(model, batches, reduce)
        past = {source: self._past(memory, source) for source in watch.trackers}
        spectra = {source: tracker.spectrum() for source, tracker in past.items() if tracker}
        for site in self._guarded(model):
            one = installed_on(site.module)[site.name]
            source = watch.source_of[site.source]
            one.g = self._guard(site, watch.trackers[source], spectra.get(source))
            one.move(one.displacement.device)
        self._rest(model, watch, memory)

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Add the task's input, as the finished model sees it, to the history of all tasks."""
        watch = self._measure(model, batches, reduce)
        for source, tracker in watch.trackers.items():
            past = self._past(memory, source)
            if past is not None:
                tracker.merge(past)
            memory.put(f"same/moment/{source}", tracker.state())
        for path, use in watch.use.items():
            past = memory.under(f"same/use/{path}")
            if past:
                use.merge(ExpertUsage.from_state(past))
            memory.put(f"same/use/{path}", use.state())

    def _guarded(self, model: nn.Module) -> list[Site]:
        return [site for site in self.sites(model) if site.name in installed_on(site.module)]

    def _measure(self, model: nn.Module, batches: Batches, reduce: Reduce) -> Watch:
        modules = {site.source: model.get_submodule(site.source) for site in self._guarded(model)}
        routers = {path: moe.router for path, moe in resting_experts(model).items()}
        watch = measure(model, modules, routers, batches, rank=self.rank)
        watch.reduce(reduce)
        return watch

    def _past(self, memory: Memory, source: str) -> CovarianceTracker | None:
        state = memory.under(f"same/moment/{source}")
        return CovarianceTracker.from_state(state) if state else None

    def _guard(self, site: Site, now: CovarianceTracker, past: Spectrum | None) -> DriftGuard:
        """What `site` may do, given what it meets now and what it met before."""
        if site.role == "router" and self.router != "free":
            return self._router_guard(now.spectrum(), past)
        slowed = site.role in {"both": ("A", "B", "weight"), "a": ("A", "weight"), "none": ()}[self.factors]
        if past is None or not slowed:
            return DriftGuard.free(engine.shape(site.weight)[-1])
        c = low_rank_moment(self._a_of(site), past) if site.role == "B" else past
        return DriftGuard.slow(c, damping=self.damping)

    def _router_guard(self, now: Spectrum, past: Spectrum | None) -> DriftGuard:
        if self.router == "spectral":
            return DriftGuard.spectral(now)
        confined = DriftGuard.confine(now, energy=self.confine_energy)
        if past is None:
            return confined
        # What the last one forbids stays forbidden exactly.
        return DriftGuard.compose(confined, DriftGuard.forbid(past, energy=self.forbid_energy))

    def _a_of(self, site: Site) -> Tensor:
        """The effective A (…, R, D) that feeds the B at `site`. Collective under sharding."""
        assert site.before is not None
        one = installed_on(site.before.module)[site.before.name]
        return engine.full(site.before.weight).float() + one.displacement

    def _rest(self, model: nn.Module, watch: Watch, memory: Memory) -> None:
        """Decide which LoRA experts move in this task, from sums over all ranks, and tell their guards."""
        if self.activation == "off":
            return
        for path, moe in resting_experts(model).items():
            past = memory.under(f"same/use/{path}")
            if not past:
                continue
            active_E = active_experts(
                watch.use[path].utilisation_E.cpu(),
                ExpertUsage.from_state(past).importance_E,
                threshold=self.activation_threshold,
            )
            moe.active = active_E
            for name in ("lora_A", "lora_B"):
                one = installed_on(moe)[name]
                one.active_E = active_E.float().to(one.displacement.device)


def low_rank_moment(a_RD: Tensor, c: Spectrum) -> Tensor:
    """A C A^T (…, R, R): the second moment of what a LoRA B meets, from that of x.

    Beyond the kept directions C is taken as isotropic, with the trace that they leave over.
    """
    kept_RK = a_RD.float() @ c.basis_DK.float()
    rest = (c.trace - c.eigenvalue_K.sum(-1)).clamp_min(0) / max(c.dim - c.eigenvalue_K.shape[-1], 1)
    inside = (kept_RK * (c.eigenvalue_K - rest[..., None])[..., None, :]) @ kept_RK.mT
    return inside + rest[..., None, None] * (a_RD.float() @ a_RD.float().mT)
