"""The resolution of a window: from the accumulators to the gradient of every parameter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.diagnostics.report import Resolution
from gcond_kernels.distributed.strategy import LocalGradients, SingleProcess
from gcond_kernels.lion_lars import averaged_norms
from gcond_kernels.methods.method import (
    Comparison,
    Destination,
    Known,
    forget_history,
    fresh_state,
    rounding_of,
)
from gcond_kernels.ops import host_flag
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Rescale, TaskGradients
from gcond_kernels.options import OptionsInUse, TaskWeights
from gcond_kernels.precision import overflow
from gcond_kernels.precision.nonfinite import describe, nonfinite_tasks, without_tasks
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.layout import accumulator_dtype_of
from gcond_kernels.storage.shared_parameters import SharedParameters, Sharing

NOTHING_CHANGED = (
    "Nothing was changed; to go on, set optimizer.on_nonfinite to 'skip' or 'drop_task' and call "
    "step()"
)


class Outcome(NamedTuple):
    """What a resolution computed."""

    products: ops.Gramians  # of all ranks
    decision: ops.Arbitration
    shared: SharedParameters
    losses: Tensor  # [K] float64, means of all ranks; NaN of a task without a micro-batch
    gradients: list[Tensor | None]  # T, local; None where there is none


class Resolver:
    """Resolves windows, and keeps what a resolution needs from one to the next.

    Attributes:
        method_state: the small tensors of the method.
        counters: [2 + K] int64: resolutions, those that were skipped, and of each task those in
            which its gradient was not finite. On the device.
        nonfinite: [K] bool: tasks whose gradient was not finite in the last resolution.
        losses: [K] float64: the sum of each task's losses in this window, without the loss weight.
        last: the last resolution.
    """

    def __init__(
        self,
        storage: GradientStorage,
        strategy: SingleProcess,
        options: OptionsInUse,
        tasks: TaskWeights,
        device: torch.device,
    ) -> None:
        self.storage = storage
        self.strategy = strategy
        self.options = options
        self.tasks = tasks
        self.sharing = Sharing(storage)
        self.counters = torch.zeros(2 + len(tasks), dtype=torch.int64, device=device)
        self.nonfinite = torch.zeros(len(tasks), dtype=torch.bool, device=device)
        self.method_state = self.fresh_state()
        self.losses = torch.zeros(len(tasks), dtype=torch.float64, device=device)
        self.last: Resolution | None = None
        self._backend: ops.Backend | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "last": None, "_backend": None}

    @property
    def backend(self) -> ops.Backend:
        """The backend, looked up once for an option that is assigned, a device and a type."""
        requested = self._backend or self.options.current.backend
        self._backend = ops.backend_for(requested, self.device, self.storage.dtype)
        return self._backend

    # What is kept between windows.

    @property
    def device(self) -> torch.device:
        """Where the small tensors lie."""
        return self.counters.device

    def fresh_state(self) -> dict[str, Tensor]:
        """Return the method's state before its first step, as the assigned options want it."""
        o = self.options.assigned
        batch = (len(self.storage.segments),) if o.granularity == "tensor" else ()
        return fresh_state(o.method, len(self.tasks), batch, self.device)

    def renew(self) -> None:
        """Let the assigned options take effect: make what they need, keep what they still need."""
        before, o = self.options.current, self.options.assigned
        self.options.current, self._backend = o, None
        self.storage.configure(o.history, o.momentum > 0.0)
        state = self.fresh_state()
        same = o.method.state_type is before.method.state_type
        if same and o.granularity == before.granularity:
            old = self.method_state
            state = {name: carried_over(old.get(name), new) for name, new in state.items()}
        self.method_state = state
        self.sharing.selection_found = False

    def add_task(self) -> None:
        """Count for one task more, the last one."""
        self.nonfinite = torch.cat([self.nonfinite, torch.zeros_like(self.nonfinite[:1])])
        self.counters = torch.cat([self.counters, torch.zeros_like(self.counters[:1])])
        self.losses = torch.cat([self.losses, torch.zeros_like(self.losses[:1])])
        self.last = None

    def follow_layout(self, places: Sequence[int]) -> None:
        """Let what is kept follow the tensors, by their places before; -1 is a new one."""
        self._move_to(self.storage.accumulators.device)
        self._arrange_state(places)
        self.sharing.forget()

    def _move_to(self, device: torch.device) -> None:
        """Let what was made before the parameters were moved follow them."""
        if self.device == device:
            return
        self.counters = self.counters.to(device)
        self.nonfinite = self.nonfinite.to(device)
        self.method_state = {name: value.to(device) for name, value in self.method_state.items()}
        self.losses = self.losses.to(device)

    def restore(self, counters: Sequence[int], losses: Sequence[float]) -> None:
        """Take over the counters, and the sums of the losses, of a state that is loaded."""
        self.counters = torch.tensor(counters, dtype=torch.int64, device="cpu").to(self.device)
        sums = torch.tensor(losses, dtype=torch.float64, device="cpu")
        self.losses = sums.to(self.device)
        self.last = None
        self.sharing.forget()

    def _arrange_state(self, places: Sequence[int]) -> None:
        o, state = self.options.current, self.method_state
        if o.granularity == "model":
            return
        new = fresh_state(o.method, len(self.tasks), (len(places),), self.device)
        for name, value in new.items():
            if name not in o.method.shared_state:
                for t, place in enumerate(places):
                    if 0 <= place < len(state[name]):
                        value[t] = state[name][place]
                state[name] = value

    def fit_state(self) -> None:
        """Make a state for each tensor, also for those that are new."""
        o, tensors = self.options.current, len(self.storage.segments)
        if o.granularity == "model":
            return
        own = [v for k, v in self.method_state.items() if k not in o.method.shared_state]
        if own and len(own[0]) != tensors:
            self._arrange_state([*range(len(own[0])), *[-1] * tensors][:tensors])

    def describe(
        self, groups: Sequence[Mapping[str, Any]], weights: Sequence[float]
    ) -> dict[str, str]:
        """Return what all ranks must have the same of, by name; synchronizes with the device."""
        state = {key: value.tolist() for key, value in self.method_state.items()}
        # Other things may show their address, which differs from rank to rank.
        plain = (int, float, str, type(None), Tensor)
        shown = [{k: v for k, v in g.items() if isinstance(v, plain)} for g in groups]
        options = {name: repr(value) for name, value in vars(self.options.current).items()}
        del options["backend"]
        return {
            "tasks": f"{list(self.tasks)}, with weights {weights!r}",
            **options,
            "mask": repr(self.storage.mask is not None),
            "accumulator_dtype": repr(self.storage.dtype),
            "strategy": self.strategy.name,
            "options of base": repr(shown),
            "resolutions so far": repr(self.counters.tolist()[0]),
            "state of the method": repr(state),
        }

    # One resolution.

    def prepare(self, scale: Tensor) -> LocalGradients:
        """Return what is to be resolved here: what may fail for want of memory comes first."""
        local = self.strategy.local_gradients(scale, self.options.current.momentum)
        self._move_to(scale.device)
        self.fit_state()
        return local

    def run(self, local: LocalGradients, counts: Sequence[int]) -> Outcome:
        """Resolve the window's conflicts, and write the gradients; raising changes nothing."""
        o = self.options.current
        target = Destination(local.outputs, local.momentum, None, local.first, self.backend)
        fused = None
        if self._nothing_between(counts):
            fused = o.method.resolve(local.gradients, target, self.method_state, o.max_norm)
        if fused is None:
            products, decision, shared, losses = self._run_in_turn(local, target, counts)
        else:
            products, decision = fused
            shared = self._shared_parameters(products, counts)
            losses = self._mean_losses(self.losses, counts)
        return Outcome(products, decision, shared, losses, self.strategy.gather(local))

    def _nothing_between(self, counts: Sequence[int]) -> bool:
        """Return whether nothing is to be done between the operations of a resolution."""
        o = self.options.current
        return (
            self.strategy.size == 1
            and self.options.on_nonfinite == "skip"
            and o.update is None
            and all(counts)
            and self._compares_all()
            and not self._halves()
        )

    def _compares_all(self) -> bool:
        """Return whether the host knows that tasks are compared over all tensors together."""
        return self.options.current.granularity == "model" and self.sharing.all_shared

    def _run_in_turn(
        self, local: LocalGradients, target: Destination, counts: Sequence[int]
    ) -> tuple[ops.Gramians, ops.Arbitration, SharedParameters, Tensor]:
        """Compare, decide and write, with what lies between."""
        o, K, backend = self.options.current, len(self.tasks), self.backend
        squares = None if o.update is None else self.strategy.squared_norms(backend)  # [T]
        products, squares, sums = self.strategy.sum_over_ranks(
            self._local_products(local), squares, self.losses
        )
        losses = self._mean_losses(sums, counts)
        products, scale = self._treat_nonfinite(products, local.gradients.scale)
        gradients = local.gradients._replace(scale=scale)
        before = self._snapshot()
        shared = self._shared_parameters(products, counts)
        self.sharing.clear_absent(local.outputs, counts, products.total)
        S, X = shared.gramians(products, K)
        given = losses if o.method.needs_losses else None
        known = Known(rounding_of(self.storage.dtype), given, tuple(self.tasks))
        selected = shared.selected_gramian(products, K)
        comparison = Comparison(S, X, scale, selected, known, backend)
        decision = o.method.decide(comparison, self.method_state)
        weights = shared.weights(decision.weights)
        decision, weights = self._checked(decision, weights, gradients, products)
        self._undo_if_not_finite(before, decision.finite)
        if o.max_norm is not None:
            target = target._replace(rescale=Rescale(o.max_norm, products.per_tensor))
        decision = o.method.apply(gradients, target, weights, decision, self.method_state)
        if o.update is not None and squares is not None:
            norms = averaged_norms(products.per_tensor, weights, target.momentum)
            o.update.apply(local.outputs, norms, squares.sqrt(), decision.finite)
        return products, decision, shared, losses

    def _local_products(self, local: LocalGradients) -> ops.Gramians:
        """Return the inner products of what this process counts."""
        o, momentum = self.options.current, local.momentum
        # What needs the norm of the result needs its products with the momentum.
        if o.update is None and o.max_norm is None:
            momentum = None
        products = self.backend.gramian(
            local.gradients._replace(layout=local.counted),
            None if local.gradients.history is None else self.method_state["history_scale"],
            None if momentum is None else momentum.buffer,
        )
        # What is not needed is not sent to other ranks.
        return products._replace(cross_per_tensor=None) if self._compares_all() else products

    def _shared_parameters(self, products: ops.Gramians, counts: Sequence[int]) -> SharedParameters:
        method = self.options.current.method
        shared, changed = self.sharing.update(
            products,
            counts,
            by_tensor=self.options.current.granularity == "tensor",
            single=method.compares_single_task,
            selected=method.parameters,
        )
        if changed is not None and not shared.by_tensor:
            forget_history(self.method_state, changed)
        return shared

    def _mean_losses(self, sums: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the mean loss of each task, [K]; NaN of a task without a micro-batch."""
        holders = self.strategy.losses_per_micro_batch
        shares = tuple(1.0 / (count * holders) if count else float("nan") for count in counts)
        share = tables.settings_tensor(shares, sums.device)
        tables.keep_if_captured(share)
        return sums * share

    # Numbers that are not finite.

    def _treat_nonfinite(
        self, products: ops.Gramians, scale: Tensor
    ) -> tuple[ops.Gramians, Tensor]:
        """Leave out the tasks whose gradient is not finite, or raise, where that is wanted."""
        if self.options.on_nonfinite == "skip":
            return products, scale
        self.nonfinite = nonfinite_tasks(products.total)
        if self.options.on_nonfinite == "drop_task":
            return without_tasks(products, scale, self.nonfinite)
        if tables.is_capturing(scale.device):
            raise RuntimeError(
                "on_nonfinite='raise' synchronizes with the device in every step, which a CUDA "
                "graph cannot: use 'skip' or 'drop_task'"
            )
        where = describe(products.per_tensor, tuple(self.tasks), self.storage.names)
        if where is None and bool(self.nonfinite.any()):
            where = "a task on another rank"
        if where is not None:
            raise FloatingPointError(
                "the gradient holds a NaN, an infinity, or values whose square leaves the range "
                f"of the accumulators (of float32 beyond 1e19) in {where}. {NOTHING_CHANGED}"
            )
        return products, scale

    def _halves(self) -> list[int]:
        """Return the places of tensors whose `.grad` is float16."""
        dtypes = self.storage.gradient_dtypes()
        pairs = enumerate(zip(dtypes, self.storage.window_tasks, strict=True))
        return [t for t, (dtype, hit) in pairs if hit and dtype == torch.float16]

    def _widest_written(self) -> torch.dtype:
        """Return float64 where all of `.grad` is, else float32, whose range the others lie in."""
        return accumulator_dtype_of(self.storage.gradient_dtypes())

    def _narrows(self) -> bool:
        """Return whether `.grad` has a smaller range than float64 accumulators."""
        return self.storage.dtype == torch.float64 and self._widest_written() != torch.float64

    def _always_fits(self) -> bool:
        """Return whether the result of finite gradients is in the range of `.grad`'s types."""
        bounded = self.options.current.method.bounded_weights
        return bounded and not self._halves() and not self._narrows()

    def _checked(
        self,
        decision: ops.Arbitration,
        weights: Tensor,
        gradients: TaskGradients,
        products: ops.Gramians,
    ) -> tuple[ops.Arbitration, Tensor]:
        """Return decision and weights, to skip where the result is not finite in its type."""
        o, K = self.options.current, len(self.tasks)
        if decision.finite.dim():  # the same of each tensor
            decision = decision._replace(finite=decision.finite.all())
        if self._always_fits():
            return decision, weights
        halves, finite = self._halves(), decision.finite
        if not o.method.bounded_weights or self._narrows():
            finite = finite & overflow.norms_fit(products, weights, self._widest_written())
        clipped = o.max_norm is not None and o.max_norm <= overflow.LARGEST_HALF
        if halves and not clipped and o.update is None:
            sums, (offsets, sizes) = gradients.accumulators, gradients.layout
            fit = overflow.halves_fit(
                sums.abs() if o.method.adds_magnitudes else sums,
                [(offsets[t], sizes[t]) for t in halves],
                (weights.expand(len(sizes), K) * gradients.scale)[halves],
                overflow.norms(products, weights)[halves],
            )
            finite = finite & self.strategy.on_all_ranks(fit)
        kept = torch.where(finite, decision.weights, 0.0)
        events = torch.where(finite, decision.events, float("nan"))
        weights = torch.where(finite, weights, 0.0)
        return decision._replace(weights=kept, events=events, finite=finite), weights

    def _snapshot(self) -> list[tuple[Tensor, Tensor]]:
        """Return what a decision changes before it is known to fit, beside copies of it."""
        if self._always_fits():
            return []
        storage = self.storage
        changed = (*self.method_state.values(), storage.parameter_tasks, storage.was_shared)
        return [(tensor, tensor.clone()) for tensor in changed]

    def _undo_if_not_finite(self, before: list[tuple[Tensor, Tensor]], finite: Tensor) -> None:
        """Put the snapshot back where the result does not fit; raise where that is wanted."""
        for tensor, old in before:
            tensor.copy_(torch.where(finite, tensor, old))
        if before:
            self.sharing.note_roll_back(~finite)
        if self.options.on_nonfinite == "raise" and before and not bool(finite):
            name = type(self.options.current.method).__name__
            raise FloatingPointError(
                "the resolved gradient is not finite: the sum of the tasks' gradients leaves the "
                f"range of .grad's type, or {name} has given a weight that is not finite. "
                f"{NOTHING_CHANGED}"
            )

    def note(self, outcome: Outcome, counts: Sequence[int]) -> Resolution:
        """Count a resolution, and return it for reports; all of it stays on the device."""
        products, decision, shared, losses, _ = outcome
        self._count(products.total, decision.finite)
        self.sharing.note()
        self.last = Resolution(
            counters=self.counters,
            nonfinite=self.nonfinite,
            counts=list(counts),
            names=self.storage.names,
            # Without what no report shows: a recorder keeps several.
            products=products._replace(cross=None, cross_per_tensor=None),
            decision=decision,
            shared=shared,
            losses=losses,
            norm_ema=self.method_state.get("norm_ema"),
            winners=self.method_state.get("winners"),
            thresholds=self.options.current.method.thresholds,
        )
        return self.last

    def _count(self, total: Tensor, finite: Tensor) -> None:
        """Count a resolution, whether it is skipped, and the tasks that are not finite in it."""
        skip, known = self.options.on_nonfinite == "skip", host_flag.reads_at_once(self.device)
        if known and skip and bool(finite):  # nothing else is to be counted
            self.nonfinite, one_more = _one_step(len(self.nonfinite), self.device)
            self.counters = self.counters + one_more
            return
        if known:  # else in place, so that replays of a CUDA graph count
            self.counters = self.counters.clone()  # the record of each step keeps its own
        if skip:
            self.nonfinite = nonfinite_tasks(total)
        skipped = (~finite).view(1)
        self.counters += torch.cat([torch.ones_like(skipped), skipped, self.nonfinite])


@functools.lru_cache(maxsize=64)
def _one_step(tasks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return flags and counts of a step in which nothing happened; neither is ever changed."""
    counts = torch.tensor([1, *[0] * (1 + tasks)], dtype=torch.int64, device=device)
    return torch.zeros(tasks, dtype=torch.bool, device=device), counts


def carried_over(old: Tensor | None, new: Tensor) -> Tensor:
    """Return an entry of a method's state with what the old one had; of added tasks it is new."""
    if old is None or old.dim() != new.dim() or old.dtype != new.dtype:
        return new
    if any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
        return new
    result = new.clone()
    result[tuple(slice(n) for n in old.shape)] = old.to(new.device)
    return result
