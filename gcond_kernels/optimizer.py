"""GCondFused: conflict-resolving gradient accumulation around any torch optimizer."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from gcond_kernels import ops
from gcond_kernels.checks import (
    check_base,
    check_chosen,
    check_count,
    check_loss,
    check_nonfinite,
    check_scaler,
    check_storage,
    check_sync,
    check_task_names,
    check_tasks,
    plain_name,
    warn_of_double_smoothing,
)
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.report import Report, Resolution
from gcond_kernels.distributed.data_parallel import DataParallel
from gcond_kernels.distributed.options import Distributed
from gcond_kernels.distributed.strategy import LocalGradients
from gcond_kernels.lion_lars import LionLars, averaged_norms
from gcond_kernels.methods import GCond, GradDrop, Method
from gcond_kernels.methods.method import Known, fresh_state
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.options import Assignable, Fixed, Options, TaskWeights, schedule
from gcond_kernels.precision import overflow
from gcond_kernels.precision.guarded_step import step_if, step_of_zeros
from gcond_kernels.precision.loss_scale import LossScale
from gcond_kernels.precision.nonfinite import describe, nonfinite_tasks, without_tasks
from gcond_kernels.storage import graphs
from gcond_kernels.storage import state as saving
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.collect import Collector, is_distributed
from gcond_kernels.storage.dtensor import local_shard
from gcond_kernels.storage.layout import check_materialized
from gcond_kernels.storage.names import labels_of
from gcond_kernels.storage.shared_parameters import (
    SharedParameters,
    bool_tensor,
    is_selected,
)
from gcond_kernels.storage.state_order import reordered
from gcond_kernels.storage.state_view import StateView
from gcond_kernels.storage.trainable_mask import check_mask

Loss: TypeAlias = "Tensor | Callable[[], Tensor]"


@dataclass(frozen=True)
class Window:
    """What stays the same from the first micro-batch of a window to the last.

    Attributes:
        weights: [K] loss weights.
        planned: [K] micro-batches of each task in a full window.
    """

    weights: tuple[float, ...]
    planned: tuple[int, ...]


@dataclass
class Progress:
    """What changes from call to call, in one object.

    Trainers wrap an optimizer in an object that borrows its methods and reads its attributes, but
    keeps those that are set (Lightning's does). So nothing is set on the optimizer itself.

    Attributes:
        on_nonfinite: what becomes of a step in which a gradient is not finite.
        options: those that this window goes by.
        assigned: those that the next one goes by.
        method_state: the small tensors of the method.
        counters: [2 + K] int64: resolutions, those that were skipped, and of each task those in
            which its gradient was not finite. On the device, so that replays of a CUDA graph count.
        nonfinite: [K] bool: tasks whose gradient was not finite in the last resolution.
        losses: [K] float64: the sum of each task's losses in this window; None where not needed.
        window: what this window goes by; None before its first micro-batch.
        position: micro-batches of this window so far.
        running: whether a call of `backward` is under way.
        resolved: whether `.grad` holds this window's result.
        finite: [] bool, whether that is to be stepped with.
        told: whether the scaler was told of it.
        reached: whether any loss ever reached a parameter.
        looks: how often custom autograd functions were found to overwrite nothing that is shared.
        all_shared: whether the host knows that tasks share every tensor.
        chosen_shared: whether it knows that they share one that the method looks at.
        known_owners: what the host knows of the owners of each tensor, bits.
        initialized: parameters whose state the base made in a step that was none.
        last: the last resolution.
        written: what it wrote to `.grad`, to tell it from a gradient of somebody else's.
    """

    on_nonfinite: str
    options: Options
    assigned: Options
    method_state: dict[str, Tensor]
    counters: Tensor
    nonfinite: Tensor
    losses: Tensor | None = None
    window: Window | None = None
    position: int = 0
    running: bool = False
    resolved: bool = False
    finite: Tensor | None = None
    told: bool = False
    reached: bool = False
    looks: dict[str, int] = field(default_factory=dict)
    all_shared: tables.HostFlag = field(default_factory=tables.HostFlag)
    chosen_shared: bool = False
    known_owners: list[int] = field(default_factory=list)
    initialized: list[Tensor] = field(default_factory=list)
    last: Resolution | None = None
    written: list[Callable[[], Tensor | None]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; without them a .grad counts as somebody else's.
        return {**self.__dict__, "written": [], "last": None, "all_shared": tables.HostFlag()}


class GCondFused(torch.optim.Optimizer):
    """Accumulates each task's gradient apart, resolves conflicts, then steps the optimizer.

    ::

        for x, y in loader:
            losses = {task: loss_functions[task](model(x), y) for task in optimizer.active_tasks}
            if optimizer.backward(losses):  # True when the window is full: .grad is resolved
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as in any loop
                optimizer.step()

    It is a `torch.optim.Optimizer` and shares `param_groups`, `state` and `defaults` with the
    one it wraps, so schedulers take either. Persistent memory per parameter: 4 bytes per task
    for the accumulators, with GCond 2 per task for the history of its arbitrator, 4 with momentum.

    Args:
        base: any torch optimizer. Its parameters must be on one device; those that require no
            gradient cost nothing, and may start to require one at any time. Parameters and groups
            may be added, replaced and removed between two windows. What else it has, methods and
            attributes, is reached through this one.
        tasks: task → loss weight λ ≥ 0. The order is that of the blocks in stochastic mode. Weights
            may be assigned (`optimizer.tasks[name] = weight`), and tasks added (`add_task`).
        accumulation_steps: micro-batches per optimizer step, A; of each rank, where there are some.
            A task's gradient is the mean over its micro-batches of a window, not their sum: losses
            are not to be divided by A.
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
            of zeros is none. (Where tasks come to share others than before, GCond's history starts
            anew.)
        mask: parameter → bool tensor of its shape, as `neuron_mask` makes them: only where it is
            True is a parameter trained. Other elements take no part in a conflict, and `.grad` is
            exactly 0 there. Parameters that are not in it are trained whole.
        momentum: β of a moving average of the resolved gradient, 0 ≤ β < 1; 0 leaves smoothing
            to the base optimizer.
        update: None writes the (averaged) gradient; `LionLars()` its sign, times a trust ratio per
            parameter tensor.
        max_norm: what is written to `.grad` is shortened to this norm; costs no pass over memory.
        accumulator_dtype: torch.float32, or torch.bfloat16 for half the memory; bfloat16 loses
            small gradients beside large sums.
        history_dtype: torch.bfloat16 or torch.float32.
        on_nonfinite: what becomes of a step in which a task's gradient holds a NaN or an infinity.
            "skip": it is left out; parameters and all state stay as they are. "drop_task": that
            task sits it out, as one without a micro-batch does (parameters that it alone uses get
            a gradient of zeros, or what is left of their momentum, for the host does not know);
            without any other, "skip".
            "raise": `backward` raises and changes nothing; for that it waits for the device. May be
            set at any time. A resolved gradient that leaves the range of `.grad`'s type counts too.
        grad_scaler: a `torch.amp.GradScaler`. `backward` scales the losses with it and accumulates
            gradients without the scale; `step` tells it of overflows. After each step call its
            `update`; `unscale_` does nothing. `scaler.step(optimizer)` is `step()`. A copy of the
            optimizer has a copy of the scaler.
        module: the model, where it is or holds a `DistributedDataParallel`: that is kept from
            reducing gradients in every backward pass (by `no_sync`, for as long as this optimizer
            lives; its `require_backward_grad_sync = True` ends it before), since it is done once a
            window here; its buffers are broadcast after every step. May be assigned later
            (`optimizer.module = model`). Where it is not given the first `backward` looks for one.
        sync: how several ranks with the same parameters come to one gradient. "shard" (default):
            accumulators are reduce-scattered, each rank resolves its shard and keeps its part of
            history and momentum, the result is gathered. "replicate": accumulators are all-reduced.
            Of no effect with one rank; not for DTensors (FSDP2, tensor
            parallel), whose gradients the backward pass reduces.
        process_group: the ranks that train together; None is that of `module`, else all. Each of
            them makes its GCondFused at the same point of the program.
        record_steps: how many of the latest steps `recorder` keeps; 0 records nothing.
        backend: "auto", "python", "triton" or "cuda"; see `gcond_kernels.ops.backend_for`.

    Attributes:
        recorder: what happened in the latest steps; see `Recorder`.

    Options may be assigned in training and take effect from the next window on, with what they
    need made anew; those that cannot be assigned say so.

    Raises:
        TypeError, ValueError: an option is out of its range; the message names it.
        RuntimeError: the backend that was asked for is not there.
    """

    accumulation_steps = Assignable()
    mode = Assignable()
    method = Assignable()
    granularity = Assignable()
    momentum = Assignable()
    update = Assignable()
    max_norm = Assignable()
    history_dtype = Assignable()
    backend = Assignable()
    accumulator_dtype = Fixed()
    mask = Fixed()
    grad_scaler = Fixed()
    record_steps = Fixed()
    sync = Fixed()
    process_group = Fixed()

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
        update: LionLars | None = None,
        max_norm: float | None = None,
        accumulator_dtype: torch.dtype = torch.float32,
        history_dtype: torch.dtype = torch.bfloat16,
        on_nonfinite: Literal["skip", "drop_task", "raise"] = "skip",
        grad_scaler: torch.amp.GradScaler | None = None,
        record_steps: int = 1000,
        module: torch.nn.Module | None = None,
        sync: Literal["shard", "replicate"] | None = None,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        check_base(base)
        if isinstance(base, GCondFused):
            raise TypeError("base must be the optimizer itself, not another GCondFused")
        check_tasks(tasks)
        weights = TaskWeights(tasks)
        K = len(weights)
        options = Options.checked(
            K,
            accumulation_steps=accumulation_steps,
            mode=mode,
            method=method,
            granularity=granularity,
            momentum=momentum,
            update=update,
            max_norm=max_norm,
            history_dtype=history_dtype,
            backend=backend,
        )
        check_storage(accumulator_dtype, history_dtype)
        check_scaler(grad_scaler)
        check_nonfinite(on_nonfinite, grad_scaler)
        check_count("record_steps", record_steps)
        check_sync(module, sync)
        labels = labels_of(base.param_groups)
        parameters = [p for group in base.param_groups for p in group["params"]]
        named = list(zip(parameters, labels, strict=True))
        check_materialized(named)
        check_chosen(options.method, labels)
        masked = None if mask is None else check_mask(mask, named)
        # Without any yet, those that are added later say where they are.
        device = parameters[0].device if parameters else torch.device("cpu")
        check_backend(options.backend, device)
        distributed = Distributed(sync, module, process_group)
        group = distributed.connect()
        strategy = distributed.choose_strategy(parameters, group)
        self._data_parallel = DataParallel(group, process_group is not None)
        if module is not None:
            self._data_parallel.take(module, parameters)

        # Not super().__init__: that would make lists of parameters and state of our own.
        self.base = base
        super().__setstate__({})
        self._weights = weights
        self._fixed = {
            "accumulator_dtype": accumulator_dtype,
            "mask": mask,
            "grad_scaler": grad_scaler,
            "record_steps": int(record_steps),
            "sync": sync,
            "process_group": process_group,
        }
        self._storage = GradientStorage(
            K,
            accumulator_dtype,
            shards=group.size if group is not None and strategy.shards_state else 1,
            has_dtensors=strategy.name == "mesh",
            masks=masked,
        )
        self._collector = Collector(self._storage)
        self._collector.wrapper_known = module is not None
        self._storage.configure(options.history, options.momentum > 0.0)
        self._knows_ranks = group is not None
        self._strategy = strategy(self._storage, group)
        self._loss_scale: LossScale | None = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            self._loss_scale = LossScale(grad_scaler)
            if self._strategy.size > 1:
                # Now: GradScaler.step asks for a scale also where a rank had no loss to scale.
                self._loss_scale.inverse(device)
        self._now = Progress(
            on_nonfinite,
            options,
            options,
            new_method_state(options, K, 0, device),
            torch.zeros(2 + K, dtype=torch.int64, device=device),
            torch.zeros(K, dtype=torch.bool, device=device),
            losses=new_losses(options, K, device),
        )
        self.recorder = Recorder(tuple(weights), options.method.thresholds, int(record_steps))
        if options.momentum > 0.0:
            warn_of_double_smoothing(base)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler.step calls `step` and leaves the rest to it."""
        # Lightning does not clip for those that do, since their gradients have a scale: these have
        # none, and can be clipped.
        return sys._getframe(1).f_code.co_name != "_optimizer_handles_unscaling"

    # What is shared with the wrapped optimizer.

    def __getattr__(self, name: str) -> Any:
        # What is not ours: train() and eval() of schedule-free optimizers, and so on.
        base = self.__dict__.get("base")
        if base is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(base, name)
        except AttributeError:
            raise AttributeError(
                f"neither {type(self).__name__} nor {type(base).__name__} has an attribute {name!r}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        ours = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        # What is not ours is the base's own: it would not hear of it else.
        of_base = base is not None and not ours and hasattr(base, name)
        (setattr if of_base else object.__setattr__)(base if of_base else self, name, value)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer: the same list."""
        # GradScaler.unscale_ is part of recipes that clip, and these gradients have no scale: it
        # is shown none. It has no other place where it could be told.
        if sys._getframe(1).f_code.co_name == "_unscale_grads_":
            return []
        for group in self.base.param_groups:
            group.setdefault(saving.KEY, {})  # what loads a state group by group finds its place
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of each parameter: of the base, and under "gcond" what is kept beside it."""
        return StateView(self.base, self._kept_of)

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def _kept_of(self, parameter: Tensor) -> dict[str, Any]:
        place = self._storage.places.get(parameter)
        return {} if place is None else self._saved(alone=True).entry(place)

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; with several ranks between two windows."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad`. What the window has accumulated stays: `step` starts a new one.

        So a loop that calls this for every micro-batch, as is the habit, does no harm. What the
        window has accumulated is dropped with `drop_window`.
        """
        # There are optimizers that take no arguments here, and decide by themselves.
        takes = inspect.signature(self.base.zero_grad).parameters
        self.base.zero_grad(*[set_to_none][: len(takes)])
        # Where zeros are left, what is added to them is somebody else's.
        self._now.written = []

    # What can be assigned.

    @property
    def tasks(self) -> TaskWeights:
        """Task → loss weight. One that is assigned holds from the next window on."""
        return self._weights

    @tasks.setter
    def tasks(self, weights: Mapping[str, float]) -> None:
        check_tasks(weights)
        new = TaskWeights(weights)
        if set(new) != set(self._weights):
            raise ValueError(
                f"tasks: {list(new)} are not the tasks {list(self._weights)} of this optimizer: "
                "add one with add_task(name, weight), leave one out of backward(losses)"
            )
        for task, weight in new.items():
            self._weights[task] = weight

    def add_task(self, name: str, weight: float) -> None:
        """Add a task, the last one, between two windows; the others keep all that they have.

        Args:
            name: of the task.
            weight: λ, 0 or more.

        Raises:
            TypeError, ValueError: there is such a task, or the weight is none; or in stochastic
                mode `accumulation_steps` are too few for one more.
            RuntimeError: in the middle of a window.
        """
        now, storage = self._now, self._storage
        if now.position or now.resolved or any(storage.counts):
            raise RuntimeError("a task is added between two windows: after step() or drop_window()")
        options = Options.checked(len(self._weights) + 1, **vars(now.assigned))
        self._weights.add(name, weight)
        storage.add_task()
        self.recorder.add_task(plain_name(name))
        now.nonfinite = torch.cat([now.nonfinite, torch.zeros_like(now.nonfinite[:1])])
        now.counters = torch.cat([now.counters, torch.zeros_like(now.counters[:1])])
        now.last = None
        self._renew(options)
        self._strategy.require_check()

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
        self._collector.wrapper_known = True

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """Cosines that tell zones of conflict apart; those of GCond may be assigned."""
        thresholds: tuple[float, float, float] = self.method.thresholds
        return thresholds

    @thresholds.setter
    def thresholds(self, thresholds: tuple[float, float, float]) -> None:
        if not isinstance(self.method, GCond):
            raise AttributeError(f"{type(self.method).__name__} has no thresholds to be assigned")
        self.method = replace(self.method, thresholds=thresholds)

    def _assign(self, name: str, value: object) -> None:
        """Check an option; it takes effect from the next window on."""
        now = self._now
        options = Options.checked(len(self._weights), **{**vars(now.assigned), name: value})
        check_chosen(options.method, labels_of(self.base.param_groups))
        check_backend(options.backend, self._device())
        now.assigned = options
        if now.position == 0 and not now.resolved:
            self._renew(options)

    def _renew(self, options: Options) -> None:
        """Let options take effect: what they need is made, what they still need is kept."""
        now, storage, K = self._now, self._storage, len(self._weights)
        before, device = now.options, now.counters.device
        now.options = now.assigned = options
        storage.configure(options.history, options.momentum > 0.0)
        state = new_method_state(options, K, len(storage.segments), device)
        if (
            type(options.method) is type(before.method)
            and options.granularity == before.granularity
        ):
            state = {
                name: taken_over(now.method_state.get(name), new) for name, new in state.items()
            }
        now.method_state = state
        if (now.losses is None or len(now.losses) < K) or not options.method.needs_losses:
            now.losses = new_losses(options, K, device)
        now.chosen_shared = False
        self.recorder.thresholds = options.method.thresholds
        self._strategy.require_check()

    # One window: backward … backward, step.

    @property
    def active_tasks(self) -> tuple[str, ...]:
        """The tasks whose losses the next `backward` takes; none once the window is full."""
        now = self._now
        options, position = (now.options, now.position) if now.position else (now.assigned, 0)
        if now.resolved or (position >= options.accumulation_steps and self._strategy.sent):
            return ()
        if position >= options.accumulation_steps:  # could not be resolved: the next drops it
            options, position = now.assigned, 0
        turns = schedule(len(self._weights), options.accumulation_steps, options.mode)
        return tuple(self._weights.keys_given[task] for task in turns[position])

    @_disable_dynamo
    def backward(self, losses: Mapping[str, Loss | None]) -> bool:
        """Back-propagate one micro-batch and accumulate each task's gradient.

        The last micro-batch of a window ends it: conflicts are resolved, and `.grad` holds the
        result, as after the last `loss.backward()` of a plain loop. It may be clipped, logged or
        added to before `step`. Parameters that no task had a gradient for keep `.grad` None.

        What is passed back through is the loss as a plain loop would have it: times its weight,
        divided by the micro-batches that the window has for its task. So parameters that this
        optimizer does not hold get the gradient of the plain sum, which their own optimizer may
        step with.

        Args:
            losses: for `active_tasks` a scalar loss, without the loss weight, or a function without
                arguments that returns one. In exact mode tasks may be left out, or be None: this
                micro-batch has nothing for them, and each task is divided by its own count.
                Functions are called one at a time, each graph freed before the next is built.

        Returns:
            True when the window is full, `.grad` written and `step` due.

        Memory: losses may share a graph. What one loss alone has, its head or a forward pass of
        its own, is freed when that loss was passed back through, and the rest after the last; the
        loss is left without a graph. But autograd keeps what is still referred to: an output of a
        head that a variable holds keeps the head's activations until it is let go of, and so does
        a loss that is a view, indexed out of another tensor. Delete them, or give the losses as
        functions.

        A loss whose backward pass overwrites what it has saved (fused cross entropies that scale
        their gradient in place do) can be passed back through once. Where two tasks share it, that
        raises (it is looked for near the losses, and of each function a number of times): give
        them as functions, each with a forward pass of its own.

        Raises:
            KeyError: a task is unknown, or not active now.
            TypeError, ValueError: a loss is not a scalar tensor with a graph, or a gradient
                cannot be accumulated.
            FloatingPointError: with on_nonfinite="raise", from the last micro-batch of a window;
                see `resolve`.
            RuntimeError: the window is resolved, and `step` was not called; or a parameter has a
                `.grad` that came from elsewhere, or from a backward pass that a loss function ran.
                (Call `zero_grad` before backward passes of your own: what `step` left in `.grad` is
                dropped here, with what was added to it.) Or no loss reaches any parameter. Or the
                ranks were joined after this optimizer was made; or FSDP or DistributedDataParallel
                are set otherwise than this can work with; the message says how.

        What the arguments show to be wrong is raised before anything has changed. An exception
        while losses are computed or passed back through voids the window: what it accumulated is
        lost, a warning says so, and the next call starts afresh. Momentum, history and averages
        are as they were. (Parameters of other optimizers keep what they were given: call
        `zero_grad` of those.) Where a rank has sent a part of the window by then, that part stays,
        and `step` is due.
        """
        now, storage = self._now, self._storage
        self._check_not_within("backward")
        self._check_window_open()
        self._check_ranks()
        given = check_task_names(losses, self.active_tasks, tuple(self._weights), self._is_exact())
        for task, loss in given.items():
            if not callable(loss):
                check_loss(task, loss)
        self._find_wrapper()
        self._follow_parameters()
        self._strategy.check_gradient_sync()
        self._clear_gradients()
        self._begin_window()
        now.running = True
        try:
            if not given and self._loss_scale is not None:
                # GradScaler.step asks for a scale also where there was no loss to scale.
                self._loss_scale.inverse(self._device())
            self._back_propagate(given)
            self._check_reached()
        except BaseException as error:
            storage.clear_gradients()
            self._void_window(error)
            raise
        finally:
            now.running = False
        now.position += 1
        if now.position < now.options.accumulation_steps:
            return False
        try:
            self.resolve()
        except Exception as error:
            # Of several ranks all have raised it, and of what is not finite the user is asked.
            if self._strategy.size == 1 and not isinstance(error, FloatingPointError):
                self._void_window(error)
            raise
        return True

    def _is_exact(self) -> bool:
        now = self._now
        options = now.assigned if now.window is None else now.options
        return bool(options.mode == "exact")

    def _check_not_within(self, call: str) -> None:
        if self._now.running:
            raise RuntimeError(
                f"{call}() was called within backward(): by a loss function, or by a hook of its "
                "backward pass. Call it before or after"
            )

    def _check_window_open(self) -> None:
        now = self._now
        if now.resolved:
            raise RuntimeError(
                "the window is full and .grad holds its result: call step() before backward(), or "
                "drop_window(). (Where Accelerate or another trainer decides when step() steps, it "
                "may have done nothing: end the window where it synchronizes, with resolve(), as "
                "in `if accelerator.sync_gradients: optimizer.resolve()`)"
            )
        if now.window is None or now.position < now.options.accumulation_steps:
            return
        if self._strategy.sent:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: call step() before "
                "backward()"
            )
        # The error that resolve() raised was passed over.
        warnings.warn(
            f"the window of {now.position} micro-batches could not be resolved, and is dropped: "
            "backward() starts a new one",
            stacklevel=3,
        )
        self._start_window()

    def _begin_window(self) -> None:
        """Let what was assigned take effect, where this is the first micro-batch of a window."""
        now = self._now
        if now.window is not None and now.position > 0:
            return
        weights = tuple(self._weights.values())
        if not any(weights):
            raise ValueError("tasks: at least one loss weight must be above 0, now all are 0")
        if now.options is not now.assigned:
            self._renew(now.assigned)
        turns = schedule(len(weights), now.options.accumulation_steps, now.options.mode)
        planned = tuple(sum(k in turn for turn in turns) for k in range(len(weights)))
        now.window = Window(weights, planned)

    def _back_propagate(self, losses: Mapping[str, Loss]) -> None:
        # Tensors first: their graphs exist already, and go before a function builds another.
        # In the order of the tasks, which is that in which ranks exchange them.
        names = tuple(self._weights)
        order = sorted(losses, key=lambda task: (callable(losses[task]), names.index(task)))
        tensors = [loss for task in order if isinstance(loss := losses[task], Tensor)]
        shared = None
        if len(tensors) > 1 and not tables.is_capturing(self._device()):
            now = self._now
            shared = graphs.SharedFunctions(tensors, now.looks, not now.reached)
        try:
            for number, task in enumerate(order, start=1):
                loss = losses[task]
                if not isinstance(loss, Tensor):
                    loss = self._loss_of(task, loss)
                self._backward_one(names.index(task), loss, number < len(tensors))
                if shared is not None and number < len(tensors):
                    shared.check()
                del loss
                self._send_if_final(names.index(task))
        finally:
            graphs.free(tensors)

    def _loss_of(self, task: str, function: Callable[[], Tensor]) -> Tensor:
        """Call a loss function, which is to leave the gradients alone."""
        loss = function()
        self._strategy.check_gradient_sync()  # the function may have changed it
        name = self._storage.name_with_gradient()
        if name is not None:
            raise RuntimeError(
                f"the loss function of task {task!r} ran a backward pass of its own, which left a "
                f"gradient on {name}: use torch.autograd.grad there, or do it before backward()"
            )
        check_loss(task, loss)
        return loss

    def _backward_one(self, task: int, loss: Tensor, retain_graph: bool) -> None:
        now = self._now
        assert now.window is not None
        value = loss.detach()
        # As a plain loop has it, for parameters that other optimizers hold.
        factor = now.window.weights[task] / max(1, now.window.planned[task])
        factor, unscale = representable(factor, loss.dtype)
        if self._loss_scale is not None:
            unscale = self._loss_scale.inverse(self._device()) * unscale
            loss = self._loss_scale.scaled(loss)
        gradient = None if factor == 1.0 else torch.full_like(loss, factor, requires_grad=False)
        with self._collector.collect(task, unscale, now.options.backend):
            try:
                # Outside of autocast, as torch recommends for backward passes.
                with fixed_precision():
                    loss.backward(gradient, retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise explained(error, self._data_parallel) from error
        if now.losses is not None:
            with fixed_precision():
                now.losses[task] += value.to(now.losses).reshape(())

    def _send_if_final(self, task: int) -> None:
        """Lets the other ranks have what nothing will be added to."""
        now = self._now
        if self._strategy.size == 1:
            return
        turns = schedule(len(self._weights), now.options.accumulation_steps, now.options.mode)
        if not any(task in tasks for tasks in turns[now.position + 1 :]):
            self._strategy.mark_complete(task)

    def _check_reached(self) -> None:
        """Raise where the optimizer holds other parameters than those that the losses train."""
        now, storage = self._now, self._storage
        if now.reached or not any(storage.counts):
            return
        now.reached = any(storage.window_tasks)
        if not now.reached and any(s.parameter.requires_grad for s in storage.segments):
            raise RuntimeError(NOT_REACHED)

    def drop_window(self) -> None:
        """Drop what this window has accumulated; the next `backward` starts a new one.

        Momentum, history and averages stay: of a window that is resolved already they hold its
        gradient, and only the step is not made. Parameters of other optimizers keep what they
        were given: call `zero_grad` of those. With several ranks all of them call it.

        Raises:
            RuntimeError: a part of the window is on its way to other ranks.
        """
        self._check_not_within("drop_window")
        if self._strategy.is_sending:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: call step() instead"
            )
        self._storage.clear_gradients()
        self._start_window()

    def _void_window(self, error: BaseException) -> None:
        """Drop the window of a call that has failed, and say so."""
        now, storage, names = self._now, self._storage, tuple(self._weights)
        self._strategy.roll_back()
        sent = [names[k] for k in range(self._strategy.sent) if storage.counts[k]]
        if not self._strategy.sent:
            lost = f"the {now.position} micro-batches before it are lost" if now.position else ""
            self._start_window()
            warnings.warn(
                f"backward() failed ({type(error).__name__}): its window is dropped"
                + (f", {lost}" if lost else "")
                + ", and the next call starts a new one. Parameters of other optimizers keep what "
                "they were given: call zero_grad() of those",
                stacklevel=3,
            )
            return
        for k in range(self._strategy.sent, len(names)):
            storage.drop_task(k)
        now.position = now.options.accumulation_steps
        warnings.warn(
            f"backward() failed ({type(error).__name__}) after the gradients of {sent} were sent "
            "to the other ranks: those stay, what else this window had is lost. Call step()",
            stacklevel=3,
        )

    @_disable_dynamo
    def resolve(self) -> None:
        """Resolve the window's conflicts and write `.grad`, where `backward` has not done so.

        It ends a window that is not full: at the end of an epoch, or where a trainer clips. On a
        window that is resolved it does nothing.

        With several ranks those whose window is full wait in `backward` for the others: call this
        first where your window is short, and then what else all ranks do together.

        `.grad` is yours until the next `backward`. Where it is of the accumulators' type it is a
        view of them: clone it to keep it for longer, and write to what you have kept no more.

        Raises:
            RuntimeError: nothing was accumulated; or no loss has reached a parameter; or ranks
                differ in tasks, settings, parameters or state, which all of them raise, each naming
                the difference; or a CUDA graph is being captured, and there are several ranks.
            FloatingPointError: with on_nonfinite="raise": a gradient is not finite, or the resolved
                one does not fit into the type of `.grad`. Nothing has changed: `on_nonfinite` may
                be set to go on with `step()`; the next `backward` drops the window.
        """
        self._check_not_within("resolve")
        if self._now.resolved:
            return
        name = self._storage.name_with_gradient() if self._now.position else None
        if name is not None:
            raise RuntimeError(
                f"{name} has a .grad from another backward pass, which the window's would replace: "
                "call resolve() first and back-propagate the other loss after it, or drop it with "
                "zero_grad()"
            )
        with fixed_precision():
            self._resolve()

    def _resolve(self) -> None:
        now, storage = self._now, self._storage
        if self._strategy.size > 1:
            if tables.is_capturing(self._device()):
                raise RuntimeError(
                    "a CUDA graph cannot hold what several ranks tell each other in a step: "
                    "capture forward and backward passes of the model alone"
                )
            self._find_wrapper()
            self._follow_parameters()  # the others may have had a micro-batch, and this not
        try:
            counts = self._strategy.synchronize(self._alike, now.on_nonfinite, now.position > 0)
        finally:
            if self._strategy.sent:  # what the ranks have exchanged cannot be added to
                now.position = now.options.accumulation_steps
        if not any(storage.window_tasks):
            self._resolve_nothing(counts)
            return
        # What may fail for want of memory comes before what changes state.
        scale = self._scale(counts)
        local = self._strategy.local_gradients(scale, now.options.momentum)
        self._move_to(scale.device)
        self._fit_method_state(scale.device)
        try:
            products, decision, shared = self._resolve_into(local, scale, counts)
            gradients = self._strategy.gather(local)
        except KeyboardInterrupt:
            # Nobody knows what was written: a gradient that lies in a row has taken its place.
            self._start_window()
            warnings.warn(
                "interrupted in resolve(): what this window accumulated is lost", stacklevel=2
            )
            raise
        given = storage.assign_gradients(gradients)
        now.written = list(map(reference_to, given))
        now.resolved, now.finite = True, decision.finite
        if now.on_nonfinite == "skip":
            now.nonfinite = nonfinite_tasks(products.total)
        self._note(products, decision, counts, shared)

    def _resolve_nothing(self, counts: Sequence[int]) -> None:
        """End a window in which no parameter was given a gradient."""
        now, storage = self._now, self._storage
        if any(counts) and any(s.parameter.requires_grad for s in storage.segments):
            raise RuntimeError(NOT_REACHED)
        storage.clear_gradients()
        now.written = []
        now.resolved = True
        now.finite = torch.ones((), dtype=torch.bool, device=now.counters.device)
        now.nonfinite = torch.zeros_like(now.nonfinite)

    def _resolve_into(
        self, work: LocalGradients, scale: Tensor, counts: Sequence[int]
    ) -> tuple[ops.Gramians, ops.Arbitration, SharedParameters]:
        now, o = self._now, self._now.options
        squares = None if o.update is None else self._strategy.squared_norms(o.backend)  # [T]
        state = now.method_state
        if self._may_resolve_at_once(counts):
            assert isinstance(o.method, GCond)
            products, decision = ops.resolve(
                work.gradients,
                work.outputs,
                state=ops.ArbitrationState(**state),
                settings=o.method,
                momentum=work.momentum,
                max_norm=o.max_norm,
                backend=o.backend,
            )
            return products, decision, self._shared_parameters(products, counts)
        averaged = None if o.update is None and o.max_norm is None else work.momentum
        products = ops.gramian(
            work.gradients._replace(layout=work.counted),
            history_scale=state.get("history_scale"),
            momentum=None if averaged is None else averaged.buffer,
            backend=o.backend,
        )
        if self._compares_all():
            products = products._replace(cross_per_tensor=None)  # so it need not be sent to others
        products, squares, losses = self._strategy.sum_over_ranks(products, squares, now.losses)
        products, scale = self._between(products, scale)
        means = self._mean_losses(losses, counts)
        before = self._snapshot() if self._may_not_fit() else None
        shared = self._shared_parameters(products, counts)
        self._leave_out_absent(work, counts, products.total)
        decision = self._decide(work, products, scale, shared, means)
        if now.on_nonfinite == "raise" and before is not None and not bool(decision.finite):
            self._restore(before)
            raise FloatingPointError(
                "the resolved gradient is not finite: the sum of the tasks' gradients leaves the "
                f"range of .grad's type, or {type(o.method).__name__} has given a weight that is "
                f"not finite. {NOTHING_CHANGED}"
            )
        if before is not None:
            self._restore(before, ~decision.finite)
        if isinstance(o.method, GradDrop):
            return products, self._drop_signs(work, decision, scale), shared
        weights = shared.weights(decision.weights)
        ops.combine(
            work.gradients._replace(scale=scale),
            work.outputs,
            weights=weights,
            finite=decision.finite,
            momentum=work.momentum,
            rescale=None if o.max_norm is None else ops.Rescale(o.max_norm, products.per_tensor),
            backend=o.backend,
        )
        if o.update is not None and squares is not None:
            norms = averaged_norms(products.per_tensor, weights, work.momentum)
            o.update.apply(work.outputs, norms, squares.sqrt(), decision.finite)
        return products, decision, shared

    def _may_resolve_at_once(self, counts: Sequence[int]) -> bool:
        """Whether nothing is to be done between the operations of a resolution."""
        now, o = self._now, self._now.options
        alone = self._strategy.size == 1 and now.on_nonfinite == "skip" and all(counts)
        alone = alone and o.update is None
        return alone and self._compares_all() and isinstance(o.method, GCond) and not self._halves()

    def _may_not_fit(self) -> bool:
        """Whether what is written may leave the range of its type though the gradients do not."""
        return not isinstance(self._now.options.method, GCond) or bool(self._halves())

    def _compares_all(self) -> bool:
        """Whether the host knows that the tasks are compared over all tensors together."""
        return self._now.options.granularity == "model" and self._now.all_shared.known

    def _halves(self) -> list[int]:
        """The places of tensors whose `.grad` is float16."""
        pairs = zip(self._storage.gradient_dtypes(), self._storage.window_tasks, strict=True)
        return [t for t, (dtype, hit) in enumerate(pairs) if hit and dtype == torch.float16]

    def _decide(
        self,
        work: LocalGradients,
        products: ops.Gramians,
        scale: Tensor,
        shared: SharedParameters,
        means: Tensor | None,
    ) -> ops.Arbitration:
        """Weigh the tasks; where the result is not finite in its type, it is no step."""
        now, o, K = self._now, self._now.options, len(self._weights)
        if isinstance(o.method, GradDrop):
            none = scale.new_empty(0)
            finite = products.total.isfinite().all()
            # It adds up no more than all of the gradients' elements, without their signs.
            decision = ops.Arbitration(
                torch.ones_like(scale), none.view(0, 0), none.view(0, 5), finite
            )
        else:
            S, X = shared.gramians(products, K)
            known = Known(losses=means, tasks=tuple(self._weights))
            chosen = shared.selected_gramian(products, K)
            decision = o.method.resolve(S, X, scale, now.method_state, o.backend, known, chosen)
        # One flag, or the same of each tensor.
        finite = decision.finite.all()
        weights = shared.weights(decision.weights)
        if not isinstance(o.method, GCond):  # whose weights are bounded
            finite = finite & overflow.norms_fit(products, weights)
        halves = self._halves()
        clipped = o.max_norm is not None and o.max_norm <= overflow.LARGEST_HALF
        if halves and not clipped and o.update is None:
            layout = work.gradients.layout
            rows = work.gradients.accumulators
            rows = rows.abs() if isinstance(o.method, GradDrop) else rows
            fit = overflow.halves_fit(
                rows,
                [(layout.offsets[t], layout.sizes[t]) for t in halves],
                (weights.expand(len(layout.sizes), K) * scale)[halves],
                overflow.norms(products, weights)[halves],
            )
            finite = finite & self._strategy.on_all_ranks(fit)
        kept = torch.where(finite, decision.weights, 0.0)
        events = torch.where(finite, decision.events, float("nan"))
        return decision._replace(weights=kept, events=events, finite=finite)

    def _snapshot(self) -> dict[str, Any]:
        """What a decision changes before it is known to be one."""
        storage, state = self._storage, self._now.method_state
        return {
            "state": {name: value.clone() for name, value in state.items()},
            "owners": storage.parameter_tasks.clone(),
            "compared": storage.was_shared.clone(),
        }

    def _restore(self, before: dict[str, Any], where: Tensor | None = None) -> None:
        """Put a snapshot back, where a flag on the device says so; None is always."""
        storage, state = self._storage, self._now.method_state
        changed = [(value, before["state"][name]) for name, value in state.items()]
        changed += [
            (storage.parameter_tasks, before["owners"]),
            (storage.was_shared, before["compared"]),
        ]
        for value, old in changed:
            value.copy_(old if where is None else torch.where(where, old, value))

    def _leave_out_absent(self, work: LocalGradients, counts: Sequence[int], total: Tensor) -> None:
        """Leave `.grad` None where no task of this window has ever used a tensor.

        Autograd gives zeros for it then where it cannot tell, from a compiled model with several
        heads, say; a step with those would follow stale momentum. Only a window in which a task had
        nothing, and gradients came from tasks that are not known to use a tensor, asks the device.
        """
        now, storage = self._now, self._storage
        active = [k for k, count in enumerate(counts) if count]
        if len(active) == len(counts) or tables.is_capturing(storage.parameter_tasks.device):
            return
        bits = sum(1 << k for k in active)
        known = now.known_owners + [0] * (len(storage.segments) - len(now.known_owners))
        if not any(
            hit and not owned & bits for hit, owned in zip(storage.window_tasks, known, strict=True)
        ):
            return
        rows = storage.parameter_tasks.tolist()
        now.known_owners = [sum(1 << k for k, owned in enumerate(row) if owned) for row in rows]
        finite = all(now.known_owners) or bool(total.isfinite().all())  # else nothing is known
        for t, owned in enumerate(now.known_owners):
            if not owned & bits and (owned or (finite and storage.layout.sizes[t])):
                work.outputs[t] = None

    def _shared_parameters(self, products: ops.Gramians, counts: Sequence[int]) -> SharedParameters:
        """Which tensors are compared in this resolution; what it shows of them is remembered."""
        now, storage, o, K = self._now, self._storage, self._now.options, len(self._weights)
        finite = products.total.isfinite().all()
        seen = products.per_tensor.diagonal(dim1=1, dim2=2)[:, :K] > 0.0
        active = sum(count > 0 for count in counts)
        # GCond keeps an average of each task's norm, also of one that comes alone.
        shared, changed = storage.update_parameter_tasks(
            seen, finite, active <= 1 and isinstance(o.method, GCond)
        )
        if o.granularity == "model" and "history_gramian" in now.method_state:
            # Norms of the history are known of the tensors alone that were compared before.
            history = now.method_state["history_gramian"]
            history.copy_(torch.where(changed, 0.0, history))
        return SharedParameters(
            o.granularity == "tensor", shared, now.all_shared.known, self._chosen(shared)
        )

    def _chosen(self, shared: Tensor) -> Tensor | None:
        """Which shared tensors the method looks at.

        Raises:
            ValueError: tasks share none of those that it is to look at.
        """
        chosen = self._now.options.method.parameters
        if chosen is None:
            return None
        names = [segment.name for segment in self._storage.segments]
        looked_at = (
            bool_tensor([is_selected(name, chosen) for name in names], shared.device) & shared
        )
        # Where nothing is shared at all, it looks at nothing, and that is fine.
        if not self._now.chosen_shared and not tables.is_capturing(shared.device):
            if bool(shared.any()) and not bool(looked_at.any()):
                raise ValueError(
                    f"of parameters={tuple(chosen)}, which the method is to look at, more than one "
                    "task has a gradient for none: choose some that tasks share, and that are not "
                    "frozen"
                )
            self._now.chosen_shared = bool(looked_at.any())
        return looked_at

    def _drop_signs(
        self, work: LocalGradients, decision: ops.Arbitration, scale: Tensor
    ) -> ops.Arbitration:
        """What GradDrop writes; it has no weights to tell of."""
        o = self._now.options
        assert isinstance(o.method, GradDrop)
        draws = self._now.method_state["draws"]
        ops.graddrop(
            work.gradients._replace(scale=scale),
            work.outputs,
            finite=decision.finite,
            dropout=ops.SignDropout(o.method.seed, draws, o.method.leak, work.first),
            momentum=work.momentum,
            backend=o.backend,
        )
        draws += decision.finite
        return decision._replace(weights=torch.full_like(scale, float("nan")))

    def _mean_losses(self, sums: Tensor | None, counts: Sequence[int]) -> Tensor | None:
        """[K] mean loss of each task in this window; NaN of a task without a micro-batch."""
        if sums is None:
            return None
        holders = self._strategy.losses_per_micro_batch
        shares = tuple(1.0 / (count * holders) if count else float("nan") for count in counts)
        share = tables.settings_tensor(shares, sums.device)
        tables.keep_if_captured(share)
        return sums * share

    def _fit_method_state(self, device: torch.device) -> None:
        """A state for each tensor, also for those that are new."""
        state, tensors = self._now.method_state, len(self._storage.segments)
        own = [name for name in state if name not in self._now.options.method.shared_state]
        if self._now.options.granularity == "model" or not own or len(state[own[0]]) == tensors:
            return
        self._follow_with_state([*range(len(state[own[0]])), *[-1] * tensors][:tensors], device)

    def _follow_with_state(self, places: Sequence[int], device: torch.device) -> None:
        """Let the method's state by tensor follow tensors from their places before."""
        now = self._now
        if now.options.granularity == "model":
            return
        new = new_method_state(now.options, len(self._weights), len(places), device)
        for name, value in new.items():
            if name not in now.options.method.shared_state:
                for t, place in enumerate(places):
                    if 0 <= place < len(now.method_state[name]):
                        value[t] = now.method_state[name][place]
                now.method_state[name] = value

    def _note(
        self,
        products: ops.Gramians,
        decision: ops.Arbitration,
        counts: Sequence[int],
        shared: SharedParameters,
    ) -> None:
        """Counts and records a resolution; all of it stays on the device."""
        now, storage = self._now, self._storage
        skipped = (~decision.finite).view(1)
        now.counters += torch.cat([torch.ones_like(skipped), skipped, now.nonfinite])
        now.all_shared.note((storage.parameter_tasks.sum(1) > 1).all())
        K, squares = len(self._weights), products.total.diagonal()
        now.last = Resolution(
            counters=now.counters,
            nonfinite=now.nonfinite,
            counts=list(counts),
            parameter_names=[segment.name for segment in storage.segments],
            per_tensor=products.per_tensor[:, :K, :K],
            squares=squares,
            gramian=shared.shared_gramian(products, K),
            decision=decision,
            weights=shared.mean_weights(decision, squares),
            shared=shared,
            norm_ema=now.method_state.get("norm_ema"),
            winners=now.method_state.get("winners"),
            thresholds=now.options.method.thresholds,
        )
        self.recorder.record(now.last)

    def _between(self, products: ops.Gramians, scale: Tensor) -> tuple[ops.Gramians, Tensor]:
        """What on_nonfinite other than "skip" does between the two passes."""
        if self._now.on_nonfinite == "skip":
            return products, scale
        self._now.nonfinite = nonfinite_tasks(products.total)
        if self._now.on_nonfinite == "drop_task":
            return without_tasks(products, scale, self._now.nonfinite)
        if tables.is_capturing(scale.device):
            raise RuntimeError(
                "on_nonfinite='raise' asks the device in every step, which a CUDA graph cannot: "
                "use 'skip' or 'drop_task'"
            )
        names = [segment.name for segment in self._storage.segments]
        where = describe(products.per_tensor, tuple(self._weights), names)
        if where is None and bool(self._now.nonfinite.any()):
            where = "a task on another rank"
        if where is not None:
            raise FloatingPointError(
                f"the gradient holds a NaN, an infinity, or values beyond 1e19 in {where}. "
                f"{NOTHING_CHANGED}"
            )
        return products, scale

    @_disable_dynamo
    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        """Step the base optimizer with `.grad`, and start a new window.

        A window that is not full is resolved as it is. Where a gradient held a NaN or an infinity,
        the base optimizer is not stepped and no state changes (but see `on_nonfinite`). With
        torch's fused optimizers, and with `capturable=True`, the device sees to that; with any
        other the host reads one flag, and on a GPU waits for it.

        Args:
            closure: must do nothing; there are trainers that call `step` with such a one.

        Raises:
            TypeError: the closure computes a loss.
            RuntimeError: nothing was accumulated; or GradScaler.step was called without
                `grad_scaler=`, or its update was not called; or the base optimizer needs a closure
                or a graph of the gradient.
        """
        now = self._now
        self._check_not_within("step")
        self._check_scaler_calls()
        if closure is None and not now.resolved and self._is_no_step():
            self._initialize_base()
            return
        self._forget_initialized()
        if closure is not None:
            self._call(closure)
        self.resolve()
        assert now.finite is not None
        if self._loss_scale is not None and not now.told:
            self._loss_scale.report(~now.finite | now.nonfinite.any())
            now.told = True
        step_if(now.finite, self.base)
        self._data_parallel.broadcast_buffers()
        # Who clipped them may have put others in their place.
        left = [s.parameter.grad for s in self._storage.segments]
        now.written = [reference_to(gradient) for gradient in left if gradient is not None]
        self._start_window()

    def _is_no_step(self) -> bool:
        """Whether a step changes nothing: torch.distributed.checkpoint makes the base's state so.

        It puts gradients of zero in place, where a window that has begun has none, and the
        learning rate at zero.
        """
        if not is_zero([g.get("lr", 0.0) for g in self.base.param_groups]):
            return False
        gradients = [p.grad for p, _ in self._parameters() if p.requires_grad]
        return bool(gradients) and all(g is not None and is_zero([g]) for g in gradients)

    def _prepare_saving(self) -> None:
        """Let the base make the state that a TrainingState needs; all ranks call it."""
        if self._strategy.any_rank(self._now.resolved or any(self._storage.counts)):
            raise RuntimeError("a TrainingState is saved and loaded between windows: call step()")
        self._initialize_base()

    def _initialize_base(self) -> None:
        """Let the base make the state that it has not; it goes when the state dict is made."""
        now = self._now
        without = [
            p for p, _ in self._parameters() if p.requires_grad and not self.base.state.get(p)
        ]
        if without:
            now.initialized = [*now.initialized, *without]
            step_of_zeros(self.base, without)

    def _forget_initialized(self) -> None:
        now = self._now
        for p in now.initialized:
            self.base.state.pop(p, None)
        now.initialized = []

    def _start_window(self) -> None:
        now = self._now
        self._strategy.end_window()
        self._storage.start_window()
        if now.losses is not None:
            now.losses.zero_()
        now.window, now.position = None, 0
        now.resolved = now.told = False
        if now.options is not now.assigned:
            self._renew(now.assigned)

    def _call(self, closure: Callable[[], object]) -> None:
        result = closure()
        computed = not self._now.resolved and self._storage.name_with_gradient() is not None
        if result is not None or computed:
            if not self._now.resolved:
                self._storage.clear_gradients()
            raise TypeError(
                "GCondFused.step takes no closure that computes a loss: call backward(losses) for "
                "each micro-batch, then step(). (In Lightning: set self.automatic_optimization = "
                "False and do both in training_step)"
            )

    def report(self) -> Report:
        """The last resolution as plain Python numbers. On a GPU this waits for the device.

        Raises:
            RuntimeError: there has been none since the start or the last `load_state_dict`.
        """
        if self._now.last is None:
            raise RuntimeError("there is nothing to report before the first resolve() or step()")
        return self._now.last.report(tuple(self._weights))

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
        return self._now.counters.device

    def _move_to(self, device: torch.device) -> None:
        """What was made before the parameters were moved follows them."""
        now = self._now
        if now.counters.device != device:
            now.counters = now.counters.to(device)
            now.nonfinite = now.nonfinite.to(device)
            now.method_state = {k: v.to(device) for k, v in now.method_state.items()}
            if now.losses is not None:
                now.losses = now.losses.to(device)

    def _check_scaler_calls(self) -> None:
        """What GradScaler.step leaves on the optimizer that it steps tells how it was used."""
        if self._loss_scale is None and "found_inf" in self.__dict__:
            # GradScaler.step would take these off after a step that it gets back from.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise RuntimeError(
                "GradScaler.step was called on an optimizer that was not told of the scaler: give "
                "GCondFused(..., grad_scaler=scaler), and losses without a scale to backward()"
            )

    def _check_ranks(self) -> None:
        if self._knows_ranks or not is_distributed():
            return
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "torch.distributed was initialized after this GCondFused was made, which knows no "
                "other ranks: make it after init_process_group"
            )

    def _parameters(self) -> Iterator[tuple[Tensor, str]]:
        """Every parameter and what to call it, in the order of the parameter groups."""
        listed = [p for group in self.base.param_groups for p in group["params"]]
        return iter(zip(listed, labels_of(self.base.param_groups), strict=True))

    def _follow_parameters(self) -> None:
        """Lay out the parameters that the base has now."""
        now, storage, groups = self._now, self._storage, self.base.param_groups
        before = storage.accumulators.device
        places = storage.update_layout(groups, lambda: labels_of(groups), self._strategy.sent > 0)
        if not places:
            return
        if storage.accumulators.device != before:
            self._move_to(storage.accumulators.device)
        self._follow_with_state(places, now.counters.device)
        now.all_shared = tables.HostFlag()
        now.known_owners, now.chosen_shared = [], False

    def _find_wrapper(self) -> None:
        """Look once for a DistributedDataParallel that this optimizer was not told of."""
        if self._data_parallel.search(self._parameters()):
            self._collector.wrapper_known = True

    def _clear_gradients(self) -> None:
        """Makes way for one task's gradients; what others computed is not thrown away.

        What `step` left is its own, whatever was added to it since; and zeros are nobody's.
        """
        own = {id(gradient()) for gradient in self._now.written}
        for segment in self._storage.segments:
            gradient = segment.parameter.grad
            if gradient is not None and id(gradient) not in own and not is_empty(gradient):
                raise RuntimeError(
                    f"{segment.name} has a .grad that this optimizer did not write (it comes from "
                    "another backward pass or optimizer, or was replaced): give its loss a task of "
                    "its own, back-propagate it between the last backward() of a window and "
                    "step(), or drop it with zero_grad()"
                )
        self._storage.clear_gradients()
        self._now.written = []

    def _alike(self) -> dict[str, str]:
        """What all ranks must have alike, by name. On a GPU this waits for the device."""
        storage, now = self._storage, self._now
        state = {key: value.tolist() for key, value in now.method_state.items()}
        # Other things may show their address, which differs from rank to rank.
        plain = (int, float, str, type(None), Tensor)
        groups = [
            {k: v for k, v in group.items() if isinstance(v, plain)}
            for group in self.base.param_groups
        ]
        options = {name: repr(value) for name, value in vars(now.options).items()}
        del options["backend"]
        window = now.window
        weights = tuple(self._weights.values()) if window is None else window.weights
        return {
            "tasks": f"{list(self._weights)}, with weights {weights!r}",
            **options,
            "mask": repr(storage.mask is not None),
            "accumulator_dtype": repr(storage.dtype),
            "strategy": self._strategy.name,
            "options of base": repr(groups),
            "resolutions so far": repr(now.counters.tolist()[0]),
            "state of the method": repr(state),
        }

    def _scale(self, counts: Sequence[int]) -> Tensor:
        """[K] what makes the accumulated sum of a task its weighted mean gradient (eq. 1).

        The loss weight is in the sum, and the number of micro-batches of a full window.
        """
        window = self._now.window
        if window is None:  # another rank has begun, and this one not
            self._begin_window()
            window = self._now.window
        assert window is not None
        shares = [
            planned / count if count and weight else 0.0
            for weight, planned, count in zip(window.weights, window.planned, counts, strict=True)
        ]
        scale = tables.settings_tensor(tuple(shares), self._storage.accumulators.device)
        tables.keep_if_captured(scale)
        return scale

    # Saving and loading.

    def _saved(self, alone: bool = False) -> saving.Saved:
        """What is saved beside the state of the base; `alone` without what other ranks keep too."""
        now, storage, o = self._now, self._storage, self._now.options
        left_out = alone and self._strategy.shards_state
        history, momentum = (None, None) if left_out else self._strategy.full_state()
        base, made = self.base.state, set(now.initialized)
        without_state = {p for p, _ in self._parameters() if p in made or not base.get(p)}
        by_tensor = o.granularity == "tensor"
        state, shared = now.method_state, o.method.shared_state
        kept = {"history": history, "momentum": momentum, "mask": storage.mask}
        # As long whether a window has begun or not: torch may ask for each number by its place.
        window = now.window or Window(tuple(self._weights.values()), (0,) * len(self._weights))
        return saving.Saved(
            storage,
            history,
            momentum,
            {name: v for name, v in state.items() if by_tensor and name not in shared},
            {
                "version": saving.VERSION,
                "tasks": list(self._weights),
                "method_name": type(o.method).__name__,
                "granularity": o.granularity,
                "method": saving.to_json(
                    {k: v for k, v in state.items() if not by_tensor or k in shared}
                ),
                "counters": now.counters.tolist(),
                "kept": {name: there is not None for name, there in kept.items()},
                "window": {
                    "mode": o.mode,
                    "accumulation_steps": o.accumulation_steps,
                    "position": now.position,
                    "counts": list(storage.counts),
                    "losses": None if now.losses is None else now.losses.tolist(),
                    "weights": list(window.weights),
                    "planned": list(window.planned),
                },
            },
            without_state,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base, and beside it what this optimizer adds, under "gcond".

        What belongs to a parameter (history, momentum, the sums of a window that is not full) lies
        in the state of that parameter, in its shape and sharded as it is; what belongs to the
        method lies in the parameter groups. So `torch.distributed.checkpoint` saves it, and loads
        it into any number of ranks, however the model is sharded there.

        In the middle of a window it holds the sums too, so that training goes on from there to the
        same bits. As with torch's optimizers the tensors are not copies. With sync="shard" all
        ranks call it, and each gets all of it; with "replicate" any rank alone may. What `recorder`
        holds is not in it, nor the state of `grad_scaler`, nor the settings of the method.

        Raises:
            RuntimeError: between the last backward() of a window and step(): `.grad` is in no state
                dict; or, with several ranks, in the middle of a window; or with sync="shard" not
                all ranks have called within two minutes.
        """
        now = self._now
        if now.resolved:
            raise RuntimeError("there is a resolved gradient in .grad: call step() before saving")
        in_window = self._strategy.begin_saving(any(self._storage.counts))
        if self._strategy.size > 1 and in_window:
            raise RuntimeError(
                "with several ranks a state is saved between windows: call step() before saving"
            )
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._follow_parameters()
        self._fit_method_state(self._device())
        with fixed_precision():
            state = saving.add_to_base(self.base, self._saved())
        # For those who look into a file; loading reads the groups.
        state[saving.KEY] = {"version": saving.VERSION, "counters": now.counters}
        self._forget_initialized()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; tensors are moved to this process's device.

        Where the parameters have names, here and in the state (a base optimizer made of
        `model.named_parameters()`), they are matched by those, whatever their order in a group.

        Raises:
            ValueError: the state is of other tasks, parameters, a window of another shape, a
                plain optimizer, or another version; the message names the difference and nothing
                has changed.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_not_within("load_state_dict")
        if self._strategy.is_sending:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: load a state between "
                "step() and backward()"
            )
        state_dict = reordered(state_dict, self.base.param_groups)
        common, entries = saving.read(state_dict)
        self._check_own(common)
        saving.check_form(self.base, state_dict)
        self._follow_parameters()
        restored = saving.Restored(entries, list(self._parameters()), common)
        restored.check(self._storage)
        with fixed_precision():
            self._load_own(restored, saving.remove_from_base(state_dict))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_own(self, common: Mapping[str, Any]) -> None:
        o = self._now.assigned
        if common["tasks"] != list(self._weights):
            raise ValueError(
                f"the state has tasks {common['tasks']}, this optimizer {list(self._weights)}"
            )
        here = {"method_name": type(o.method).__name__, "granularity": o.granularity}
        for what, own in here.items():
            if common[what] != own:
                raise ValueError(f"the state has {what} {common[what]!r}, this optimizer {own!r}")
        saving.check_window(common["window"], o.mode, o.accumulation_steps)

    def _load_own(self, restored: saving.Restored, of_base: dict[str, Any]) -> None:
        now, storage, common = self._now, self._storage, restored.common
        o = now.assigned
        shared = None if o.granularity == "model" else o.method.shared_state
        # Before anything is changed: a state with other settings is refused.
        here = new_method_state(o, len(self._weights), len(storage.segments), self._device())
        restored.method_state(storage, here, shared)
        self.base.load_state_dict(of_base)
        for p in restored.without_state:
            self.base.state.pop(p, None)
        self._start_window()
        new = [(p, name) for p, name in restored.parameters if p not in storage]
        if new:  # frozen here
            storage.append(new)
        shard_of = self._strategy.local_shard if self._strategy.shards_state else None
        restored.write_to(storage, shard_of)
        window = common["window"]
        fresh = new_method_state(o, len(self._weights), len(storage.segments), self._device())
        now.method_state = restored.method_state(storage, fresh, shared)
        counters = torch.tensor(common["counters"], dtype=torch.int64, device="cpu")
        now.counters = counters.to(self._device())
        if now.losses is not None and window["losses"] is not None:
            losses = torch.tensor(window["losses"], dtype=torch.float64, device="cpu")
            now.losses = losses.to(self._device())
        now.position = window["position"]
        if now.position:
            now.window = Window(tuple(window["weights"]), tuple(window["planned"]))
        self._strategy.require_check()
        now.all_shared, now.known_owners, now.last = tables.HostFlag(), [], None
        now.initialized, now.chosen_shared = [], False

    def __getstate__(self) -> dict[str, Any]:
        if self._strategy.size > 1:
            raise RuntimeError("an optimizer that is one of several ranks cannot be copied")
        # As torch's optimizers do: hooks, and the step that a scheduler has put in place of ours,
        # are those of the original.
        left = {k: v for k, v in self.__dict__.items() if not is_of_the_original(k)}
        gradients = [(p, p.grad) for p, _ in self._parameters() if p.grad is not None]
        return {**left, "_gradients": gradients if self._now.resolved else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What a window was resolved to is to be stepped with.
        gradients = state.pop("_gradients", [])
        super().__setstate__(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if gradients:
            self._now.written = [reference_to(gradient) for _, gradient in gradients]

    def __repr__(self) -> str:
        return (
            f"GCondFused(tasks={self._weights}, accumulation_steps={self.accumulation_steps}, "
            f"mode={self.mode!r}, method={self.method}, base={self.base!r})"
        )


NOT_REACHED = (
    "no loss has reached a parameter of this optimizer: they are not the model's (any more). "
    "load_state_dict(assign=True), to_empty, fully_shard and parametrizations replace a model's "
    "parameters: make both optimizers after that, of model.parameters() as they are then. Or a "
    "hook takes .grad away in the backward pass, as an optimizer that steps in it does: remove it"
)
NOTHING_CHANGED = (
    "Nothing was changed; to go on, set optimizer.on_nonfinite to 'skip' or 'drop_task' and call "
    "step()"
)
OF_THE_ORIGINAL = ("step", "_opt_called", "_wrapped_by_lr_sched", "profile_hook_step")


def is_of_the_original(attribute: str) -> bool:
    """Return whether a copy of an optimizer is made without an attribute."""
    hooks = attribute.startswith("_optimizer_") and attribute.endswith("_hooks")
    return hooks or attribute in OF_THE_ORIGINAL


def check_backend(backend: str, device: torch.device) -> None:
    """Raise a RuntimeError now, rather than in training, where a backend is not there."""
    ops.backend_for(backend, device)


def new_method_state(
    options: Options, tasks: int, tensors: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the state of the method before its first step; by tensor for so many."""
    batch = (tensors,) if options.granularity == "tensor" else ()
    return fresh_state(options.method, tasks, batch, device)


def new_losses(options: Options, tasks: int, device: torch.device) -> Tensor | None:
    """Return [K] float64 zeros where the method looks at the losses."""
    if not options.method.needs_losses:
        return None
    return torch.zeros(tasks, dtype=torch.float64, device=device)


def taken_over(old: Tensor | None, new: Tensor) -> Tensor:
    """Return an entry of a method's state with what the old one had; of added tasks it is new."""
    if old is None or old.dim() != new.dim() or old.dtype != new.dtype:
        return new
    if any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
        return new
    result = new.clone()
    result[tuple(slice(n) for n in old.shape)] = old.to(new.device)
    return result


def reference_to(gradient: Tensor) -> Callable[[], Tensor | None]:
    """Return what leads to a gradient, without keeping it alive where that is possible.

    torch swaps the contents of tensors when it converts modules of DTensors, and refuses those
    that have weak references.
    """
    if type(gradient) is Tensor and not torch.__future__.get_swap_module_params_on_conversion():
        return weakref.ref(gradient)
    return lambda: gradient


@functools.lru_cache(maxsize=256)
def representable(factor: float, dtype: torch.dtype) -> tuple[float, float | Tensor]:
    """Return a factor as a loss of that type can have it, and what makes up for the rounding."""
    if dtype in (torch.float32, torch.float64) or factor == 0.0:
        return factor, 1.0
    rounded = torch.tensor(max(factor, torch.finfo(dtype).tiny), dtype=dtype, device="cpu").item()
    return rounded, factor / rounded


def is_zero(values: Sequence[Any]) -> bool:
    """Return whether all numbers and all elements of tensors are zero."""
    return not any(bool(v.any()) if isinstance(v, Tensor) else v for v in values)


def is_empty(gradient: Tensor) -> bool:
    """Return whether what this process holds of a gradient is all zeros."""
    part = local_shard(gradient)
    return part.layout == torch.strided and is_zero([part])


def explained(error: RuntimeError, data_parallel: DataParallel) -> RuntimeError:
    """Return an error of a backward pass, with what to do where that is known."""
    words = str(error)
    if "ready only once" in words and not data_parallel.modules:
        return RuntimeError(
            "the model is wrapped in DistributedDataParallel, which reduces gradients in every "
            "backward pass and takes one for each forward pass: give GCondFused(..., "
            f"module=model), which turns that off{data_parallel.left_alone}"
        )
    if "fabric.backward" in words:
        return RuntimeError(
            "Fabric asks for fabric.backward(loss), which is of no use for several losses: pass "
            "through the model itself, `with fabric.autocast(): output = model.module(input)`, and "
            "give GCondFused(..., grad_scaler=fabric.strategy.precision.scaler) where there is one"
        )
    functions = "give the losses as functions, each with a forward pass of its own"
    if "donated buffer" in words:
        return RuntimeError(
            "a compiled model cannot be passed through twice where its backward pass was compiled "
            f"for once: {functions}, or set torch._functorch.config.donated_buffer = False before "
            "the model is compiled"
        )
    if "selective" in words.lower() or "checkpoint" in words.lower() or "second time" in words:
        return RuntimeError(
            f"{words} Either it goes back into an earlier micro-batch, whose graph is freed: "
            "detach() what is carried over, such as a recurrent state. Or two losses share this "
            "part of the graph, and it can be passed back through once (so it is with activation "
            f"checkpoints): {functions}, or use mode='stochastic'"
        )
    return error
