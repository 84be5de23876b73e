"""GCondFused: conflict-resolving gradient accumulation around any torch optimizer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gcond_kernels import ops, tables
from gcond_kernels.accumulator import Accumulator, is_distributed
from gcond_kernels.base_step import step_if
from gcond_kernels.checks import (
    check_base,
    check_choice,
    check_chosen,
    check_count,
    check_loss,
    check_method,
    check_nonfinite,
    check_range,
    check_scaler,
    check_steps,
    check_storage,
    check_sync,
    check_task_names,
    check_tasks,
    check_update,
    warn_of_double_smoothing,
)
from gcond_kernels.data_parallel import DataParallel
from gcond_kernels.distributed import WAYS, Local, Sync, Work, peers_of, way_of
from gcond_kernels.dtensor import check_materialized
from gcond_kernels.loss_scale import LossScale
from gcond_kernels.mask import check_mask
from gcond_kernels.methods import GCond, GradDrop, Method
from gcond_kernels.methods.method import Function, Known, fresh_state
from gcond_kernels.nonfinite import describe, nonfinite_tasks, without_tasks
from gcond_kernels.recorder import Recorder
from gcond_kernels.report import Report, Resolution
from gcond_kernels.saving import check_method_state, check_owner, check_window, in_own_order
from gcond_kernels.scope import Scope, scope_of

Loss: TypeAlias = "Tensor | Callable[[], Tensor]"

STATE_VERSION = 3


@dataclass
class Progress:
    """What changes from call to call, in one object.

    Trainers wrap an optimizer in an object that borrows its methods and reads its attributes, but
    keeps those that are set (Lightning's does). So nothing is set on the optimizer itself.

    Attributes:
        on_nonfinite: what becomes of a step in which a gradient is not finite.
        method_state: the small tensors of the method.
        counters: [2 + K] int64: resolutions, those that were skipped, and of each task those in
            which its gradient was not finite. On the device, so that replays of a CUDA graph count.
        nonfinite: [K] bool: tasks whose gradient was not finite in the last resolution.
        losses: [K] float64: the sum of each task's losses in this window; None where not needed.
        position: micro-batches of this window so far.
        resolved: whether `.grad` holds this window's result.
        told: whether the scaler was told of it.
        last: the last resolution.
        written: what it wrote to `.grad`, to tell it from a gradient of somebody else's.
    """

    on_nonfinite: str
    method_state: dict[str, Tensor]
    counters: Tensor
    nonfinite: Tensor
    losses: Tensor | None = None
    position: int = 0
    resolved: bool = False
    told: bool = False
    last: Resolution | None = None
    written: list[weakref.ref[Tensor]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; without them a .grad counts as somebody else's.
        return {**self.__dict__, "written": [], "last": None}


class GCondFused(torch.optim.Optimizer):
    """Accumulates each task's gradient apart, resolves conflicts, then steps the optimizer.

    ::

        for x, y in loader:
            losses = {task: loss_functions[task](model(x), y) for task in optimizer.active_tasks}
            if optimizer.backward(losses):  # True when the window is full
                optimizer.step()

    It is a `torch.optim.Optimizer` and shares `param_groups`, `state` and `defaults` with the
    one it wraps, so schedulers take either. Persistent memory per parameter: 4 bytes per task
    for the accumulators, with GCond 2 per task for the history of its arbitrator, 4 with momentum.

    Args:
        base: any torch optimizer. Its parameters must be on one device; those that require no
            gradient cost nothing, and may start to require one at any time.
        tasks: task → loss weight λ ≥ 0. The order is that of the blocks in stochastic mode.
        accumulation_steps: micro-batches per optimizer step, A; of each rank, where there are some.
        mode: "exact": every micro-batch has a loss of every task. "stochastic": the window is
            cut into one block of micro-batches per task, each with a loss of that task alone:
            one backward pass per micro-batch instead of K.
        method: how conflicts are resolved: one of `gcond_kernels.methods`, or a function of your
            own from the Gramian of the task gradients [K, K] (float64, on their device) to one
            weight per task [K]. None is `GCond()`. (In a step that is skipped the function sees the
            identity.)
        granularity: "model": the tasks' gradients are compared as one vector of all parameters that
            they share. "tensor": each parameter tensor resolves its own conflicts, with a state of
            its own. A parameter that only one task ever had a gradient for is that task's own in
            either case: it takes no part in a conflict, and gets its gradient as it is. A gradient
            of zeros counts as one: leave `0 * output.sum()` out of the losses of others. (Where
            tasks come to share others than before, GCond's history starts anew.)
        mask: parameter → bool tensor of its shape, as `neuron_mask` makes them: only where it is
            True is a parameter trained. Other elements take no part in a conflict, and `.grad` is
            exactly 0 there. Parameters that are not in it are trained whole.
        momentum: β of a moving average of the resolved gradient, 0 ≤ β < 1; 0 leaves smoothing
            to the base optimizer.
        update: "momentum" writes the (averaged) gradient; "lion_lars" writes its sign, times a
            trust ratio per parameter tensor.
        trust_ratio_coef: factor of "lion_lars".
        trust_ratio_clip: bound of the ratio ‖p‖ / ‖m̂‖ of "lion_lars"; with a mask ‖p‖ is still that
            of the whole parameter.
        max_norm: what is written to `.grad` is shortened to this norm; costs no pass over memory.
        accumulator_dtype: torch.float32, or torch.bfloat16 for half the memory; bfloat16 loses
            small gradients beside large sums.
        history_dtype: torch.bfloat16 or torch.float32.
        harvest: "bucketed" takes gradients from a backward pass while it runs, some 32 MB at a
            time; "whole" takes all of them when it is over, which keeps a whole gradient alive, but
            loses nothing where a pass fails in the middle (see `backward`). DTensors are taken
            whole, and so is everything where there are other ranks and `module` is not given.
        on_nonfinite: what becomes of a step in which a task's gradient holds a NaN or an infinity.
            "skip": it is left out; parameters and all state stay as they are. "drop_task": that
            task sits it out, as one without a micro-batch does (parameters that it alone uses get
            a gradient of zeros, or what is left of their momentum, for the host does not know);
            without any other, "skip".
            "raise": `resolve` raises and changes nothing; for that it waits for the device. May be
            set at any time.
        grad_scaler: a `torch.amp.GradScaler`. `backward` scales the losses with it and accumulates
            gradients without the scale; `step` tells it of overflows. After each step call its
            `update`; `unscale_` is not to be called. `scaler.step(optimizer)` is `step()`. A copy
            of the optimizer has a copy of the scaler.
        module: the model, where it is or holds a `DistributedDataParallel`: that is kept from
            reducing gradients in every backward pass (by `no_sync`, for as long as this optimizer
            lives; its `require_backward_grad_sync = True` ends it before), since it is done once a
            window here; its buffers are broadcast after every step. May be assigned later
            (`optimizer.module = model`). Where it is not given the first `backward` looks for one.
        sync: how several ranks with the same parameters come to one gradient. "shard" (default):
            accumulators are reduce-scattered, each rank resolves its shard and keeps its part of
            history and momentum, the result is gathered. "replicate": accumulators are all-reduced.
            "local": each rank resolves its own, the results are averaged, as the published
            implementation does. Of no effect with one rank; not for DTensors (FSDP2, tensor
            parallel), whose gradients the backward pass reduces.
        process_group: the ranks that train together; None is that of `module`, else all. Each of
            them makes its GCondFused at the same point of the program.
        record_steps: how many of the latest steps `recorder` keeps; 0 records nothing.
        backend: "auto", "python", "triton" or "cuda"; see `gcond_kernels.ops.choose_backend`.

    Attributes:
        recorder: what happened in the latest steps; see `gcond_kernels.recorder.Recorder`.

    Raises:
        TypeError, ValueError: an option is out of its range; the message names it.
        RuntimeError: the backend that was asked for is not there.
    """

    # So GradScaler.step calls `step` and leaves the rest to it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: torch.optim.Optimizer,
        tasks: Mapping[str, float],
        *,
        accumulation_steps: int = 1,
        mode: Literal["exact", "stochastic"] = "exact",
        method: Method | Callable[[Tensor], Tensor] | None = None,
        granularity: Literal["model", "tensor"] = "model",
        mask: Mapping[Tensor, Tensor] | None = None,
        momentum: float = 0.0,
        update: Literal["momentum", "lion_lars"] = "momentum",
        trust_ratio_coef: float = 1e-4,
        trust_ratio_clip: float = 100.0,
        max_norm: float | None = None,
        accumulator_dtype: torch.dtype = torch.float32,
        history_dtype: torch.dtype = torch.bfloat16,
        harvest: Literal["bucketed", "whole"] = "bucketed",
        on_nonfinite: Literal["skip", "drop_task", "raise"] = "skip",
        grad_scaler: torch.amp.GradScaler | None = None,
        record_steps: int = 1000,
        module: torch.nn.Module | None = None,
        sync: Literal["shard", "replicate", "local"] | None = None,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        check_base(base)
        if isinstance(base, GCondFused):
            raise TypeError("base must be the optimizer itself, not another GCondFused")
        check_tasks(tasks)
        check_steps(accumulation_steps, mode, len(tasks))
        check_choice("granularity", granularity, ("model", "tensor"))
        method = method_of(method)
        check_range("momentum", momentum, 0.0, 1.0, open_low=False)
        check_update(update, max_norm)
        check_method(method, granularity, update, max_norm)
        check_range("trust_ratio_coef", trust_ratio_coef, 0.0, math.inf, open_low=True)
        check_range("trust_ratio_clip", trust_ratio_clip, 0.0, math.inf, open_low=True)
        check_storage(accumulator_dtype, history_dtype)
        check_choice("harvest", harvest, ("bucketed", "whole"))
        check_scaler(grad_scaler)
        check_nonfinite(on_nonfinite, grad_scaler)
        check_count("record_steps", record_steps)
        check_sync(module, sync)
        named = list(parameters_of(base))
        check_materialized(named)
        parameters = [parameter for parameter, _ in named]
        check_chosen(method, [name for _, name in named])
        masked = None if mask is None else check_mask(mask, named)
        device = parameters[0].device
        for operation in ops.OPERATIONS:  # raises now rather than in training
            ops.choose_backend(backend, device, operation)
        peers = peers_of(process_group, module)
        way = way_of(sync, parameters, peers)
        self._data_parallel = DataParallel(peers, process_group is not None)
        if module is not None:
            self._data_parallel.take(module, parameters)

        # Not super().__init__: that would make lists of parameters and state of our own.
        self.base = base
        super().__setstate__({})
        self._weights = {task: float(weight) for task, weight in tasks.items()}
        self.accumulation_steps = accumulation_steps
        self.mode = mode
        self.method = method
        self.granularity = granularity
        self.beta = float(momentum)
        self.update = update
        self.trust_ratio_coef = float(trust_ratio_coef)
        self.trust_ratio_clip = float(trust_ratio_clip)
        self.max_norm = max_norm
        self.grad_scaler = grad_scaler
        self.backend = backend
        self._names = tuple(self._weights)
        self._schedule = schedule(len(tasks), accumulation_steps, mode)
        self._accumulator = Accumulator(
            len(tasks),
            accumulator_dtype,
            history_dtype if self.method.needs_history else None,
            self.beta > 0.0,
            harvest == "bucketed",
            cuts=peers.size if peers is not None and way == "shard" else 1,
            part=peers.rank if peers is not None and way == "shard" else 0,
            spread=way == "mesh",
            alone=module is not None,
            masked=masked,
        )
        self._knows_ranks = peers is not None
        self._sync = Sync(self._accumulator, backend)
        if way is not None and peers is not None:
            self._sync = WAYS[way](self._accumulator, backend, peers)
        self._loss_scale: LossScale | None = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            self._loss_scale = LossScale(grad_scaler)
            if self._sync.size > 1:
                # Now: GradScaler.step asks for a scale also where a rank had no loss to scale.
                self._loss_scale.inverse(device)
        self._now = Progress(
            on_nonfinite,
            self._new_method_state(0, device),
            torch.zeros(2 + len(tasks), dtype=torch.int64, device=device),
            torch.zeros(len(tasks), dtype=torch.bool, device=device),
        )
        if self.method.needs_losses:
            self._now.losses = torch.zeros(len(tasks), dtype=torch.float64, device=device)
        self.recorder = Recorder(self._names, self.method.thresholds, record_steps)
        if self.beta > 0.0:
            warn_of_double_smoothing(base)

    # What is shared with the wrapped optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer: the same list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The per-parameter state of the wrapped optimizer: the same mapping."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, at any time; with several ranks between two windows."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears `.grad`. What the window has accumulated stays: `step` starts a new one.

        So a loop that calls this for every micro-batch, as is the habit, does no harm.
        """
        self.base.zero_grad(set_to_none)

    @property
    def tasks(self) -> Mapping[str, float]:
        """Task → loss weight; not to be changed."""
        return MappingProxyType(self._weights)

    @property
    def on_nonfinite(self) -> str:
        """What becomes of a step in which a gradient is not finite; may be set at any time."""
        return self._now.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, choice: str) -> None:
        check_nonfinite(choice, self.grad_scaler)
        self._now.on_nonfinite = choice

    @property
    def module(self) -> torch.nn.Module | None:
        """The model; may be given later than the constructor's `module=`, with the same effect."""
        return self._data_parallel.module

    @module.setter
    def module(self, module: torch.nn.Module | None) -> None:
        if module is None or module is self.module:
            return
        self._data_parallel.take(module, [parameter for parameter, _ in self._parameters()])
        self._accumulator.alone = True

    # One window: backward … backward, resolve, step.

    @property
    def active_tasks(self) -> tuple[str, ...]:
        """The tasks whose losses the next `backward` takes; none once the window is full."""
        if self._now.position >= self.accumulation_steps:
            return ()
        return tuple(self._names[task] for task in self._schedule[self._now.position])

    def backward(self, losses: Mapping[str, Loss]) -> bool:
        """Back-propagates one micro-batch and accumulates each task's gradient.

        Args:
            losses: for each of `active_tasks` a scalar loss, without the loss weight, or a
                function without arguments that returns one. Losses may share a graph; it is
                freed after the last of them. Functions are called one at a time, each graph
                freed before the next is built. Parameters that this optimizer does not hold
                get their `.grad` as from any backward pass.

        Returns:
            True when the window is full and `step` is due.

        Raises:
            KeyError: a task is unknown, missing, or not active now.
            TypeError, ValueError: a loss is not a scalar tensor with a graph, or a gradient
                cannot be accumulated. Losses given as tensors are all checked before anything
                is accumulated. Where a later loss fails in its function or its backward pass,
                the gradients of those before it are taken back in the first micro-batch of a
                window; later that would need a copy of the accumulators, so they stay, each
                task is divided by its own count of micro-batches, and a warning says so. Where
                a backward pass fails after a bucket of it was added, its task forgets the
                micro-batches that it had in this window, and a warning says that.
            RuntimeError: the window is full already, or a parameter has a `.grad` that came
                from elsewhere. (Call `zero_grad` before backward passes of your own: what `step`
                left in `.grad` is dropped here, with what was added to it.) Or the ranks were
                joined after this optimizer was made; or FSDP or DistributedDataParallel are set
                otherwise than this can work with; the message says how.
        """
        self._check_window_open()
        self._check_ranks()
        check_task_names(losses, self.active_tasks, self._names)
        for task, loss in losses.items():
            if not callable(loss):
                check_loss(task, loss)
        self._include_new_parameters()
        self._find_wrapper()
        self._sync.check_wrapper()
        self._clear_gradients()

        # Tensors first: their graphs exist already, and go before a function builds another.
        # In the order of the tasks, which is that in which ranks exchange them.
        order = sorted(losses, key=lambda task: (callable(losses[task]), self._names.index(task)))
        tensors_left = sum(not callable(loss) for loss in losses.values())
        before = list(self._accumulator.counts)
        try:
            for task in order:
                tensors_left -= 1
                self._backward_one(task, losses[task], tensors_left > 0)
                self._send_if_final(task)
        except BaseException as error:
            self._accumulator.drop_gradients()
            self._take_back(before, error)
            raise
        self._now.position += 1
        return self._now.position == self.accumulation_steps

    def _backward_one(self, task: str, loss: Loss, retain_graph: bool) -> None:
        if not isinstance(loss, Tensor):
            loss = loss()
            check_loss(task, loss)
            self._sync.check_wrapper()  # the function may have changed it
        k, value = self._names.index(task), loss.detach()  # without the scale
        unscale: float | Tensor = 1.0
        if self._loss_scale is not None:
            unscale = self._loss_scale.inverse(self._device())
            loss = self._loss_scale.scaled(loss)
        with self._accumulator.harvesting(k, unscale, self.backend):
            try:
                loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if "ready only once" in str(error) and not self._data_parallel.modules:
                    raise RuntimeError(
                        "the model is wrapped in DistributedDataParallel, which reduces gradients "
                        "in every backward pass and takes one for each forward pass: give "
                        "GCondFused(..., module=model), which turns that off"
                        f"{self._data_parallel.left_alone}"
                    ) from error
                if "donated buffer" not in str(error):
                    raise
                raise RuntimeError(
                    "a compiled model cannot be passed through twice where its backward pass was "
                    "compiled for once: give the losses as functions, each with a forward pass of "
                    "its own, or set torch._functorch.config.donated_buffer = False before the "
                    "model is compiled"
                ) from error
        if self._now.losses is not None:
            self._now.losses[k] += value.to(self._now.losses).reshape(())

    def _send_if_final(self, task: str) -> None:
        """Lets the other ranks have what nothing will be added to."""
        if self._sync.size == 1:
            return
        k = self._names.index(task)
        if not any(k in tasks for tasks in self._schedule[self._now.position + 1 :]):
            self._sync.row_is_final(k)

    def resolve(self) -> None:
        """Resolves the window's conflicts and writes `.grad`; to clip or log before `step`.

        Parameters that no task had a gradient for keep `.grad` None. Where `.grad` is of the
        accumulators' type it is a view of them: clone it to keep it beyond the next `backward`.

        Raises:
            RuntimeError: nothing was accumulated, or the window is resolved already; or ranks
                differ in tasks, settings, parameters or state, which all of them raise, each naming
                the difference; or a CUDA graph is being captured, and there are several ranks.
            FloatingPointError: with on_nonfinite="raise": a gradient is not finite. Nothing has
                changed: `on_nonfinite` may be set to go on.
        """
        if self._now.resolved:
            raise RuntimeError("resolve() was called already in this window: call step()")
        if self._sync.size > 1:
            if tables.is_capturing(self._device()):
                raise RuntimeError(
                    "a CUDA graph cannot hold what several ranks tell each other in a step: "
                    "capture forward and backward passes of the model alone"
                )
            self._include_new_parameters()  # the others may have had a micro-batch, and this not
            self._find_wrapper()
        try:
            counts = self._sync.meet(self._alike, self.on_nonfinite)
        finally:
            if self._sync.started:  # what the ranks have exchanged cannot be added to
                self._now.position = self.accumulation_steps
        # What may fail for want of memory comes before what changes state.
        work = self._sync.work()
        scale = self._scale(counts)
        self._move_to(scale.device)
        scope = self._scope(counts)
        self._fit_method_state(scale.device)
        try:
            products, decision = self._resolve_into(work, scale, scope, counts)
            gradients = self._sync.gradients(work)
        except KeyboardInterrupt:
            # Nobody knows what was written: a gradient that lies in a row has taken its place.
            self._start_window()
            warnings.warn(
                "interrupted in resolve(): what this window accumulated is lost", stacklevel=2
            )
            raise
        given = self._accumulator.give(gradients)
        self._now.written = [weakref.ref(gradient) for gradient in given]
        self._now.resolved = True
        if self.on_nonfinite == "skip":
            self._now.nonfinite = nonfinite_tasks(products.total)
        self._note(products, decision, counts, scope)

    def _resolve_into(
        self, work: Work, scale: Tensor, scope: Scope, counts: Sequence[int]
    ) -> tuple[ops.Gramians, ops.Arbitration]:
        signs = self.update == "lion_lars"
        squares = self._sync.squared_norms() if signs else None  # [T]
        state = self._now.method_state
        writing: dict[str, Any] = {
            "scale": scale,
            "history": work.history,
            "momentum": work.momentum,
            "momentum_steps": self._accumulator.momentum_steps,
            "beta": self.beta,
            "max_norm": self.max_norm,
            "trust_ratio_coef": self.trust_ratio_coef,
            "trust_ratio_clip": self.trust_ratio_clip,
            "mask": work.mask,
            "backend": self.backend,
        }
        where = (work.rows, work.outputs, work.offsets, work.sizes)
        alone = self._sync.size == 1 and self.on_nonfinite == "skip"
        if alone and scope.is_whole and isinstance(self.method, GCond):
            settings = self.method.settings(len(self.tasks))
            norms = None if squares is None else squares.sqrt()
            self._note_scope(scope)
            return ops.resolve(
                *where, state=state, settings=settings, parameter_norms=norms, **writing
            )
        products = ops.gramian(
            work.rows,
            *work.counted,
            scale=scale,
            history=work.history,
            history_scale=state.get("history_scale"),
            momentum=work.momentum if signs or self.max_norm is not None else None,
            mask=work.mask,
            backend=self.backend,
        )
        products = scope.needed(products)
        products, squares, losses = self._sync.total(products, squares, self._now.losses)
        products, scale = self._between(products, scale)
        self._note_scope(scope)
        if isinstance(self.method, GradDrop):
            return products, self._drop_signs(work, products, scale)
        S, X = scope.gramians(products, len(self.tasks))
        means = self._mean_losses(losses, counts)
        chosen = scope.chosen_gramian(products, len(self.tasks))
        known = Known(losses=means)
        decision = self.method.resolve(S, X, scale, state, self.backend, known, chosen)
        decision = decision._replace(finite=decision.finite.all())  # one flag, or the same of each
        ops.combine(
            *where,
            weights=scope.weights(decision.weights),
            finite=decision.finite,
            per_tensor=products.per_tensor,
            parameter_norms=None if squares is None else squares.sqrt(),
            **{**writing, "scale": scale},
        )
        return products, decision

    def _drop_signs(self, work: Work, products: ops.Gramians, scale: Tensor) -> ops.Arbitration:
        """What GradDrop writes; it has no weights to tell of."""
        assert isinstance(self.method, GradDrop)
        finite = products.total.isfinite().all()
        draws = self._now.method_state["draws"]
        ops.graddrop(
            work.rows,
            work.outputs,
            work.offsets,
            work.sizes,
            scale=scale,
            finite=finite,
            seed=self.method.seed,
            draws=draws,
            leak=self.method.leak,
            momentum=work.momentum,
            momentum_steps=self._accumulator.momentum_steps,
            beta=self.beta,
            mask=work.mask,
            first=work.first,
            backend=self.backend,
        )
        draws += finite
        none = scale.new_empty(0)
        unknown = torch.full_like(scale, math.nan)
        return ops.Arbitration(unknown, none.view(0, 0), none.view(0, 5), finite)

    def _note_scope(self, scope: Scope) -> None:
        """What this window showed of the tensors is remembered; only the method may raise now."""
        changed = self._accumulator.note_compared(scope.shared)
        if changed and not scope.by_tensor and "history_gramian" in self._now.method_state:
            # Norms of the history are known of the tensors alone that were compared before.
            self._now.method_state["history_gramian"].zero_()

    def _scope(self, counts: Sequence[int]) -> Scope:
        """Which tensors are compared in this resolution."""
        acc = self._accumulator
        names = [segment.name for segment in acc.segments]
        by_tensor = self.granularity == "tensor"
        # GCond keeps an average of each task's norm, also of one that comes alone.
        alone = isinstance(self.method, GCond)
        return scope_of(acc.owners_now(), counts, names, by_tensor, self.method.parameters, alone)

    def _mean_losses(self, sums: Tensor | None, counts: Sequence[int]) -> Tensor | None:
        """[K] mean loss of each task in this window; NaN of a task without a micro-batch."""
        if sums is None:
            return None
        holders = self._sync.losses_per_micro_batch
        shares = tuple(1.0 / (count * holders) if count else math.nan for count in counts)
        share = tables.settings_tensor(shares, sums.device)
        tables.keep_if_captured(share)
        return sums * share

    def _new_method_state(self, tensors: int, device: torch.device) -> dict[str, Tensor]:
        """The state of the method before its first step; by tensor for so many."""
        batch = (tensors,) if self.granularity == "tensor" else ()
        return fresh_state(self.method, len(self._names), batch, device)

    def _fit_method_state(self, device: torch.device) -> None:
        """A state for each tensor, also for those that are new."""
        state, tensors = self._now.method_state, len(self._accumulator.segments)
        own = [name for name in state if name not in self.method.shared_state]
        if self.granularity == "model" or not own or len(state[own[0]]) == tensors:
            return
        new = self._new_method_state(tensors - len(state[own[0]]), device)
        for name in own:
            state[name] = torch.cat([state[name], new[name]])

    def _note(
        self,
        products: ops.Gramians,
        decision: ops.Arbitration,
        counts: Sequence[int],
        scope: Scope,
    ) -> None:
        """Counts and records a resolution; all of it stays on the device."""
        now, acc = self._now, self._accumulator
        skipped = (~decision.finite).view(1)
        now.counters += torch.cat([torch.ones_like(skipped), skipped, now.nonfinite])
        names = [segment.name for segment in acc.segments]
        K = len(self._names)
        now.last = Resolution(
            counters=now.counters,
            nonfinite=now.nonfinite,
            counts=list(counts),
            parameter_names=names,
            per_tensor=products.per_tensor[:, :K, :K],
            squares=products.total.diagonal(),
            gramian=scope.shared_gramian(products, K),
            decision=decision,
            scope=scope,
            norm_ema=now.method_state.get("norm_ema"),
            winners=now.method_state.get("winners"),
            thresholds=self.method.thresholds,
        )
        weights = scope.mean_weights(decision, now.last.squares)
        shown = decision._replace(weights=weights)
        self.recorder.record(
            now.counters[0], names, now.last.gramian, now.last.per_tensor, shown, now.nonfinite,
            now.last.squares,
        )  # fmt: skip

    def _between(self, products: ops.Gramians, scale: Tensor) -> tuple[ops.Gramians, Tensor]:
        """What on_nonfinite other than "skip" does between the two passes."""
        if self.on_nonfinite == "skip":
            return products, scale
        self._now.nonfinite = nonfinite_tasks(products.total)
        if self.on_nonfinite == "drop_task":
            return without_tasks(products, scale, self._now.nonfinite)
        if tables.is_capturing(scale.device):
            raise RuntimeError(
                "on_nonfinite='raise' asks the device in every step, which a CUDA graph cannot: "
                "use 'skip' or 'drop_task'"
            )
        names = [segment.name for segment in self._accumulator.segments]
        where = describe(products.per_tensor, self._names, names)
        if where is None and bool(self._now.nonfinite.any()):
            where = "a task on another rank"
        if where is not None:
            raise FloatingPointError(
                f"the gradient holds a NaN, an infinity, or values beyond 1e19 in {where}. Nothing "
                "was changed; to go on, set optimizer.on_nonfinite to 'skip' or 'drop_task' and "
                "call step() again"
            )
        return products, scale

    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        """Resolves where `resolve` has not been called, steps the base optimizer, starts a window.

        A window that is not full is used as it is. Where a gradient held a NaN or an infinity,
        the base optimizer is not stepped and no state changes (but see `on_nonfinite`). With
        torch's fused optimizers, and with `capturable=True`, the device sees to that; with any
        other the host reads one flag, and on a GPU waits for it.

        Args:
            closure: must do nothing; there are trainers that call `step` with such a one.

        Raises:
            TypeError: the closure computes a loss.
            RuntimeError: nothing was accumulated; or GradScaler.unscale_ was called on this
                optimizer, or its step without `grad_scaler=`, or its update was not called.
        """
        self._check_scaler_calls()
        if not self._now.resolved:
            self._sync.check_begun()
        if closure is not None:
            self._call(closure)
        if not self._now.resolved:
            self.resolve()
        assert self._now.last is not None
        finite = self._now.last.decision.finite
        if self._loss_scale is not None and not self._now.told:
            self._loss_scale.tell(~finite | self._now.nonfinite.any())
            self._now.told = True
        step_if(finite, self.base)
        self._data_parallel.broadcast_buffers()
        # Who clipped them may have put others in their place.
        left = [s.parameter.grad for s in self._accumulator.segments]
        self._now.written = [weakref.ref(gradient) for gradient in left if gradient is not None]
        self._start_window()

    def _start_window(self) -> None:
        self._sync.end_window()
        self._accumulator.start_window()
        if self._now.losses is not None:
            self._now.losses.zero_()
        self._now.position = 0
        self._now.resolved = self._now.told = False

    def _call(self, closure: Callable[[], object]) -> None:
        result = closure()
        gradients = [s.parameter.grad for s in self._accumulator.segments]
        computed = not self._now.resolved and any(g is not None for g in gradients)
        if result is not None or computed:
            if not self._now.resolved:
                self._accumulator.drop_gradients()
            raise TypeError(
                "GCondFused.step takes no closure that computes a loss: call backward(losses) for "
                "each micro-batch"
            )

    def report(self) -> Report:
        """The last resolution as plain Python numbers. On a GPU this waits for the device.

        Raises:
            RuntimeError: there has been none since the start or the last `load_state_dict`.
        """
        if self._now.last is None:
            raise RuntimeError("there is nothing to report before the first resolve() or step()")
        return self._now.last.report(self._names)

    def advise(self) -> str:
        """Whether there is a conflict worth resolving in this run, in plain words.

        From the steps that `recorder` holds; on a GPU this waits for the device.
        """
        advice = self.recorder.advise()
        if self.mode == "stochastic":
            advice += (
                "\n\nIn stochastic mode the tasks' gradients come from different micro-batches: "
                "their cosines hold the noise of those too. Some steps in exact mode show the "
                "conflict itself."
            )
        return advice

    def _device(self) -> torch.device:
        return self._accumulator.rows.device

    def _move_to(self, device: torch.device) -> None:
        """What was made before the parameters were moved follows them."""
        if self._now.counters.device != device:
            self._now.counters = self._now.counters.to(device)
            self._now.method_state = {k: v.to(device) for k, v in self._now.method_state.items()}
            if self._now.losses is not None:
                self._now.losses = self._now.losses.to(device)

    def _check_scaler_calls(self) -> None:
        """What GradScaler.step leaves on the optimizer that it steps tells how it was used."""
        if self._loss_scale is None and "found_inf" in self.__dict__:
            self._forget_scalers_step()
            raise RuntimeError(
                "GradScaler.step was called on an optimizer that was not told of the scaler: give "
                "GCondFused(..., grad_scaler=scaler), and losses without a scale to backward()"
            )
        # Before resolve() there was nothing that unscale_ could have spoilt.
        scale = self._loss_scale if self._now.resolved else None
        if scale is not None and scale.was_unscaled(self):
            self._forget_scalers_step()
            self._start_window()
            raise RuntimeError(
                "GradScaler.unscale_ was called on a GCondFused, whose gradients have no scale: it "
                "has spoilt what resolve() wrote, and this window is lost. Leave the call out; "
                ".grad may be clipped right after resolve()"
            )

    def _forget_scalers_step(self) -> None:
        """GradScaler.step would take this off after a step that it gets back from."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _check_window_open(self) -> None:
        if self._now.resolved:
            raise RuntimeError("resolve() has written .grad: call step() before backward()")
        if self._now.position == self.accumulation_steps:
            raise RuntimeError(
                f"the window of {self.accumulation_steps} micro-batches is full: call step()"
            )

    def _check_ranks(self) -> None:
        if self._knows_ranks or not is_distributed():
            return
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "torch.distributed was initialized after this GCondFused was made, which knows no "
                "other ranks: make it after init_process_group"
            )

    def _find_wrapper(self) -> None:
        """Look once for a DistributedDataParallel that this optimizer was not told of."""
        if self._data_parallel.look(self._parameters()):
            self._accumulator.alone = True

    def _take_back(self, before: list[int], error: BaseException) -> None:
        """Undoes what a failed `backward` added, or says what had to stay, or was lost."""
        counts = self._accumulator.counts
        lost = [
            f"{count} of {name!r}"
            for name, count, now in zip(self._names, before, counts, strict=True)
            if now < count
        ]
        if lost:
            warnings.warn(
                f"a backward pass failed ({type(error).__name__}) after a part of its gradient was "
                f"accumulated; the micro-batches of its task before it are lost ({', '.join(lost)})"
                ", and what follows in this window counts alone. harvest='whole' would keep them",
                stacklevel=3,
            )
        sent = self._sync.started
        self._sync.take_back()
        sent_now = any(now > was for was, now in zip(before[:sent], counts[:sent], strict=True))
        # Where it cannot be made again nothing of it is taken back.
        sent = len(counts) if sent_now else sent
        kept = [repr(self._names[k]) for k in self._accumulator.take_back(before, sent)]
        if self._now.losses is not None:
            for k, count in enumerate(self._accumulator.counts):
                if count == 0:
                    self._now.losses[k] = 0.0
        if sent_now:
            # What is on its way cannot be added to.
            self._now.position = self.accumulation_steps
        if kept:
            warnings.warn(
                f"this micro-batch failed ({type(error).__name__}) after the gradient of "
                f"{', '.join(kept)} was accumulated; it stays, and each task is divided by its "
                "own number of micro-batches"
                + (". It is on its way to the other ranks: call step()" if sent_now else ""),
                stacklevel=3,
            )

    def _parameters(self) -> Iterator[tuple[Tensor, str]]:
        """Every parameter and what to call it, in the order of the parameter groups."""
        return parameters_of(self.base)

    def _include_new_parameters(self) -> None:
        knows = self._accumulator.knows
        new = [(p, name) for p, name in self._parameters() if p.requires_grad and not knows(p)]
        if not new:
            return
        if self._sync.started:
            raise RuntimeError(
                f"{new[0][1]} is new, and the other ranks have a part of this window already: add "
                "and thaw parameters between step() and backward()"
            )
        self._accumulator.grow(new)

    def _clear_gradients(self) -> None:
        """Makes way for one task's gradients; what others computed is not thrown away.

        What `step` left is its own, whatever was added to it since.
        """
        own = {id(gradient()) for gradient in self._now.written}
        for segment in self._accumulator.segments:
            gradient = segment.parameter.grad
            if gradient is not None and id(gradient) not in own:
                raise RuntimeError(
                    f"{segment.name} has a .grad that this optimizer did not write (it comes from "
                    "another backward pass or optimizer, or was replaced): give its loss a task of "
                    "its own, or drop it with zero_grad()"
                )
        self._accumulator.drop_gradients()
        self._now.written = []

    def _alike(self) -> dict[str, str]:
        """What all ranks must have alike, by name. On a GPU this waits for the device."""
        acc, history = self._accumulator, self._accumulator.history
        state = {key: value.tolist() for key, value in self._now.method_state.items()}
        # Other things may show their address, which differs from rank to rank.
        plain = (int, float, str, type(None), Tensor)
        groups = [
            {k: v for k, v in group.items() if isinstance(v, plain)}
            for group in self.base.param_groups
        ]
        drifts = isinstance(self._sync, Local)
        return {
            "tasks": repr(self._weights),
            "mode": repr(self.mode),
            "method": repr(self.method),
            "granularity": repr(self.granularity),
            "mask": repr(acc.mask is not None),
            "momentum": repr(self.beta),
            "update": repr(self.update),
            "trust_ratio_coef": repr(self.trust_ratio_coef),
            "trust_ratio_clip": repr(self.trust_ratio_clip),
            "max_norm": repr(self.max_norm),
            "accumulator_dtype": repr(acc.dtype),
            "history_dtype": repr(None if history is None else history.dtype),
            "sync": self._sync.way,
            "options of base": repr(groups),
            "resolutions so far": repr(self._now.counters.tolist()[0]),
            "state of the method": "its own" if drifts else repr(state),
        }

    def _scale(self, counts: Sequence[int]) -> Tensor:
        """[K] λ_k / n_k, which makes an accumulated sum the weighted mean gradient (eq. 1)."""
        shares = [
            weight / count if count else 0.0
            for weight, count in zip(self.tasks.values(), counts, strict=True)
        ]
        scale = tables.settings_tensor(tuple(shares), self._device())
        tables.keep_if_captured(scale)
        return scale

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped optimizer, and under "gcond" what this one adds.

        In the middle of a window it holds the accumulators too, so that training goes on from
        there to the same bits; with several ranks it is to be taken between windows, and is this
        rank's own but for sync="replicate" (see `TrainingState`). As with torch's optimizers the
        tensors are not copies. What `recorder` holds is not in it, nor the state of `grad_scaler`,
        nor the settings of the method.

        Raises:
            RuntimeError: between resolve() and step(): `.grad` is in no state dict; or, with
                several ranks, in the middle of a window.
        """
        if self._now.resolved:
            raise RuntimeError("there is a resolved gradient in .grad: call step() before saving")
        if self._sync.size > 1 and any(self._accumulator.counts):
            raise RuntimeError(
                "with several ranks a state is saved between windows: call step() before saving"
            )
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.base.state_dict()
        state["gcond"] = {
            "version": STATE_VERSION,
            "tasks": list(self._names),
            "owner": self._sync.owner,
            "window": {
                "mode": self.mode,
                "accumulation_steps": self.accumulation_steps,
                "position": self._now.position,
                "losses": self._now.losses,
            },
            "counters": self._now.counters,
            "method_name": type(self.method).__name__,
            "granularity": self.granularity,
            "method": dict(self._now.method_state),
            "accumulator": self._accumulator.state_dict([p for p, _ in self._parameters()]),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; tensors are moved to this process's device.

        Where the parameters have names, here and in the state (a base optimizer made of
        `model.named_parameters()`), they are matched by those, whatever their order in a group.

        Raises:
            ValueError: the state is of other tasks, parameters, a window of another shape, or a
                plain optimizer; the message names the difference and nothing has changed.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state_dict = in_own_order(state_dict, self.base.param_groups)
        own = self._check_state(state_dict)
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "gcond"})
        self._load_own(own["accumulator"], own["method"], own["counters"])
        self._now.position = own["window"]["position"]
        if self._now.losses is not None:
            self._now.losses.copy_(own["window"]["losses"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_own(
        self, accumulated: dict[str, Any], method_state: Mapping[str, Tensor], counters: Tensor
    ) -> None:
        """Takes over what `_check_own` has passed; a window begins."""
        here = self._accumulator.load_state_dict(accumulated, list(self._parameters()))
        device = self._now.counters.device
        loaded = self._new_method_state(len(self._accumulator.segments), device)
        for key, value in loaded.items():
            saved = method_state[key].to(value)
            if self.granularity == "model" or key in self.method.shared_state:
                value.copy_(saved)
            else:  # where the method saw no tensor yet there is none in the state
                value[here[: len(saved)]] = saved
        self._now.method_state = loaded
        self._now.counters = counters.to(device, copy=True)
        if self._now.losses is not None:  # new: the state may hold the very tensor that is here
            self._now.losses = torch.zeros_like(self._now.losses)
        self._sync.end_window()
        self._sync.forget_agreement()
        self._now.position = 0
        self._now.resolved = self._now.told = False
        self._now.last = None

    def _check_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = state_dict["gcond"]
        if self._sync.is_sending:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: load a state between "
                "step() and backward()"
            )
        self._check_own(own)
        check_owner(own.get("owner"), self._sync.owner)
        check_window(own["window"], self.mode, self.accumulation_steps)
        self._accumulator.check_state(own["accumulator"], list(self._parameters()))
        return own

    def _check_own(self, own: Mapping[str, Any]) -> None:
        if own["version"] != STATE_VERSION:
            raise ValueError(
                f"the state has format {own['version']}, this version reads {STATE_VERSION}"
            )
        if own["tasks"] != list(self._names):
            raise ValueError(
                f"the state has tasks {own['tasks']}, this optimizer {list(self._names)}"
            )
        for what, here in (
            ("method_name", type(self.method).__name__),
            ("granularity", self.granularity),
        ):
            if own[what] != here:
                raise ValueError(f"the state has {what} {own[what]!r}, this optimizer {here!r}")
        check_method_state(
            own["method"], self._now.method_state,
            self.method.shared_state if self.granularity == "tensor" else None,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        if self._now.resolved:
            raise RuntimeError("there is a resolved gradient in .grad: call step() before copying")
        if self._sync.size > 1:
            raise RuntimeError("an optimizer that is one of several ranks cannot be copied")
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)

    def __repr__(self) -> str:
        return (
            f"GCondFused(tasks={self._weights}, accumulation_steps={self.accumulation_steps}, "
            f"mode={self.mode!r}, method={self.method}, base={self.base!r})"
        )


def parameters_of(base: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str]]:
    """Every parameter and what to call it, in the order of the parameter groups."""
    index = 0
    for group in base.param_groups:
        names = group.get("param_names")
        for position, parameter in enumerate(group["params"]):
            name = names[position] if names else f"parameter {index}"
            yield parameter, name
            index += 1


def method_of(method: object) -> Method:
    """The method that was asked for; a function of the user's own as one."""
    if method is None:
        return GCond()
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be {method.__name__}(...), not the class itself")
    if callable(method) and not isinstance(method, type):
        return Function(method)
    raise TypeError(
        "method must be one of gcond_kernels.methods, such as GCond() or PCGrad(), or a function "
        f"from a Gramian [K, K] to weights [K], not {method!r}"
    )


def schedule(
    tasks: int, accumulation_steps: int, mode: Literal["exact", "stochastic"]
) -> list[tuple[int, ...]]:
    """The active tasks of every micro-batch in a window.

    In stochastic mode every task has one block; where the tasks do not divide the window evenly
    the first blocks are one longer.
    """
    if mode == "exact":
        return [tuple(range(tasks))] * accumulation_steps
    length, longer = divmod(accumulation_steps, tasks)
    return [(task,) for task in range(tasks) for _ in range(length + (task < longer))]
