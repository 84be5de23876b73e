"""GCondFused: conflict-resolving gradient accumulation around any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from gcond_kernels.diagnostics.report import Report
from gcond_kernels.distributed.options import Distributed
from gcond_kernels.lion_lars import LionLars
from gcond_kernels.methods import Method
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.checks import ACCUMULATOR_DTYPES
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.options import (
    Options,
    OptionsInUse,
    TaskWeights,
    check_choice,
    check_nonfinite,
)
from gcond_kernels.precision.guarded_step import step_if
from gcond_kernels.storage.layout import accumulator_dtype_of
from gcond_kernels.training.losses import NOT_REACHED, Loss, check_losses
from gcond_kernels.training.saving import SavedOptimizer
from gcond_kernels.training.window import schedule_of
from gcond_kernels.training.wrapper import check_base, warn_of_double_smoothing


class GCondFused(SavedOptimizer):
    """Accumulates the gradient of each task, resolves their conflicts, then steps the optimizer.

    ::

        for x, y in loader:
            losses = {task: loss_functions[task](model(x), y) for task in optimizer.active_tasks}
            if optimizer.backward(losses):  # True when the window is full: .grad is resolved
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as in any loop
                optimizer.step()

    It is a `torch.optim.Optimizer` and shares `param_groups`, `state` and `defaults` with the
    one it wraps, so schedulers take either. Persistent memory per parameter: 4 bytes per task
    for the accumulators, with GCond 2 per task for the history of its arbitrator, 4 with momentum.
    (In float64 8 per task, and 8 with momentum.)

    Args:
        base: any torch optimizer. Its parameters must be on one device; those that require no
            gradient cost nothing, and may start to require one at any time. Parameters and groups
            may be added, replaced and removed between two windows. Its other methods and attributes
            are reached through this one.
        tasks: task → loss weight λ ≥ 0, in the order of the blocks of stochastic mode. Weights may
            be assigned (`optimizer.tasks[name] = weight`), and tasks added (`add_task`).
        accumulation_steps: micro-batches per optimizer step, of each rank. A task's gradient is the
            mean over its micro-batches of a window, so losses are not to be divided by this.
        mode: "exact": every micro-batch has a loss of every task. "stochastic": the window is
            divided into one block of micro-batches per task, each with a loss of that task alone:
            one backward pass per micro-batch instead of K.
        method: how conflicts are resolved: one of `gcond_kernels.methods`, or a function of your
            own from the Gramian of the task gradients [K, K] (float64, on their device) to one
            weight per task [K]; None is `GCond()`. (In a step that is skipped the function gets the
            identity.)
        granularity: "model": the tasks' gradients are compared as one vector of all parameters that
            they share. "tensor": each parameter tensor resolves its own conflicts, with a state of
            its own. In either case a parameter that only one task ever had a gradient for (zeros
            are none) takes no part in a conflict, and gets its gradient as it is. (Where tasks come
            to share other parameters than before, GCond's history starts anew.)
        mask: parameter → bool tensor of its shape, as `neuron_mask` makes them: the elements that
            are trained. Others take no part in a conflict, and their `.grad` is exactly 0.
            Parameters that are not in it are trained in full.
        momentum: β of a moving average of the resolved gradient, 0 ≤ β < 1; 0 leaves smoothing
            to the base optimizer.
        update: None writes the (averaged) gradient; `LionLars()` its sign, times a trust ratio per
            parameter tensor.
        max_norm: bound of the norm of what is written to `.grad`; costs no pass over memory.
        on_nonfinite: what becomes of a step in which a task's gradient holds a NaN or an infinity,
            or the resolved one leaves the range of `.grad`'s type. "skip": parameters and all state
            stay as they are. "drop_task": the task is left out, as one without a micro-batch is
            (parameters that it alone uses get a gradient of zeros, or of their momentum); without
            any other task, "skip". "raise": `backward` raises and changes nothing; it synchronizes
            with the device. May be set at any time.
        grad_scaler: a `torch.amp.GradScaler`. `backward` scales the losses with it and accumulates
            gradients without the scale; `step` reports overflows to it. Call its `update` after
            each step; `unscale_` does nothing, and `scaler.step(optimizer)` is `step()`. A copy of
            the optimizer has a copy of the scaler.
        distributed: how several ranks train together, `Distributed(strategy, module,
            process_group)`; None finds it out. `optimizer.module = model` may be assigned later.
        accumulator_dtype: torch.float32, or torch.bfloat16 for half the memory; bfloat16 loses
            small gradients beside large sums. torch.float64 computes in float64 all the way,
            momentum included, in plain torch (backend "python") whatever the backend. None is
            float64 where all parameters are, as they are now, else float32.
        backend: "auto", "cpu", "cuda", "triton" or "python"; see `gcond_kernels.ops.backend_for`.

    Attributes:
        recorder: the latest 1,000 steps; `recorder.capacity` changes their number. See `Recorder`.

    Options may be assigned in training and take effect from the next window on; those that cannot
    be assigned raise an error.

    Raises:
        TypeError, ValueError: an option is out of its range; the message names it.
        RuntimeError: the backend that was asked for is not there.
    """

    def __init__(  # noqa: PLR0913  keywords that the user sets
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
        on_nonfinite: Literal["skip", "drop_task", "raise"] = "skip",
        grad_scaler: torch.amp.GradScaler | None = None,
        distributed: Distributed | None = None,
        accumulator_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        check_base(base)
        weights = TaskWeights(tasks)
        options = Options.checked(
            len(weights),
            accumulation_steps=accumulation_steps,
            mode=mode,
            method=method,
            granularity=granularity,
            momentum=momentum,
            update=update,
            max_norm=max_norm,
            backend=backend,
        )
        if accumulator_dtype is None:
            groups = base.param_groups
            accumulator_dtype = accumulator_dtype_of(p.dtype for g in groups for p in g["params"])
        check_choice("accumulator_dtype", accumulator_dtype, ACCUMULATOR_DTYPES)
        check_nonfinite(on_nonfinite, grad_scaler)
        ranks = Distributed() if distributed is None else distributed
        if not isinstance(ranks, Distributed):
            raise TypeError(f"distributed must be a Distributed(...), not {distributed!r}")
        fixed = {
            "accumulator_dtype": accumulator_dtype,
            "mask": mask,
            "grad_scaler": grad_scaler,
            # A copy of this optimizer is none of the model.
            "distributed": None if distributed is None else replace(ranks, module=None),
        }
        super().__init__(base, weights, OptionsInUse(options, options, on_nonfinite), fixed)
        self._make_parts(ranks)
        if options.momentum > 0.0:
            warn_of_double_smoothing(base)

    # One window: backward … backward, step.

    @property
    def active_tasks(self) -> tuple[str, ...]:
        """The tasks whose losses the next `backward` takes; none once the window is full."""
        window, o = self._window, self._options.assigned
        schedule, position = window.schedule, window.position
        if window.resolved or (position and position >= len(schedule) and self._rank_strategy.sent):
            return ()
        if not 0 < position < len(schedule):  # a full one could not be resolved, and is dropped
            schedule, position = schedule_of(len(self._weights), o.accumulation_steps, o.mode), 0
        return tuple(self._weights.keys_given[task] for task in schedule[position])

    @_disable_dynamo
    def backward(self, losses: Mapping[str, Loss | None]) -> bool:
        """Back-propagate one micro-batch and accumulate each task's gradient.

        The last micro-batch of a window ends it: conflicts are resolved, and `.grad` holds the
        result, as after the last `loss.backward()` of a plain loop. It may be clipped, logged or
        added to before `step`. Parameters that no task had a gradient for keep `.grad` None.

        As in a plain loop, each loss is multiplied by its weight and divided by the micro-batches
        that the window has for its task. So parameters that this optimizer does not hold get the
        gradient of the plain sum, for their own optimizer.

        Args:
            losses: for `active_tasks` a scalar loss, without the loss weight, or a function without
                arguments that returns one. In exact mode tasks may be left out, or be None: this
                micro-batch has nothing for them, and each task is divided by its own count.
                Functions are called one at a time, each graph freed before the next is built.

        Returns:
            True when the window is full, `.grad` written and `step` due.

        Memory: losses may share a graph. What one loss alone has, its head or a forward pass of its
        own, is freed after the backward passes, what they share in the last one; all losses but the
        last are left without a graph. Autograd keeps what is still referred to: delete outputs of
        heads and losses that are views (indexed out of another tensor), or give the losses as
        functions.

        A loss whose backward pass overwrites what it has saved (some fused cross entropies scale
        their gradient in place) can be passed back through once. Where two tasks share it, that
        raises (it is looked for near the losses, and of each function a number of times): give
        them as functions, each with a forward pass of its own.

        Raises:
            KeyError: a task is unknown, or not active now.
            TypeError, ValueError: a loss is not a scalar tensor with a graph, or a gradient
                cannot be accumulated.
            FloatingPointError: with on_nonfinite="raise"; see `resolve`.
            RuntimeError: the window is resolved, and `step` was not called; or a parameter has a
                `.grad` that came from elsewhere (call `zero_grad` before backward passes of your
                own; what `step` left in `.grad` is dropped here); or no loss reaches any parameter;
                or the ranks, FSDP or DistributedDataParallel are set up in a way that does not go
                with this; the message names it.

        What the arguments show to be wrong is raised before anything has changed. An exception
        while losses are computed or passed back through voids the window: what it accumulated is
        lost, a warning reports it, and the next call starts a new one. Momentum, history and
        averages are as they were. (Parameters of other optimizers keep what they were given: call
        `zero_grad` of those.) What a rank has sent by then stays, and `step` is due.
        """
        window, storage = self._window, self._storage
        self._check_not_within("backward")
        self._check_window_open()
        self._check_ranks()
        o = self._options.current if window.position else self._options.assigned
        given = check_losses(losses, self.active_tasks, tuple(self._weights), o.mode == "exact")
        self._find_wrapper()
        self._update_layout()
        self._rank_strategy.check_gradient_sync()
        self._clear_gradients()
        self._begin_window()
        window.in_backward = True
        try:
            self._losses.run(given, window)
        except BaseException as error:
            storage.clear_gradients()
            self._void_window(error, window.position)
            raise
        finally:
            window.in_backward = False
        window.position += 1
        if window.position < len(window.schedule):
            return False
        try:
            self.resolve()
        except Exception as error:
            # All ranks have raised it; and what is not finite is the user's to decide.
            if self._rank_strategy.size == 1 and not isinstance(error, FloatingPointError):
                self._void_window(error, window.position - 1)
            raise
        return True

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
        if self._window.resolved:
            return
        name = self._storage.name_with_gradient() if self._window.position else None
        if name is not None:
            raise RuntimeError(
                f"{name} has a .grad from another backward pass, which the window's would replace: "
                "call resolve() first and back-propagate the other loss after it, or drop it with "
                "zero_grad()"
            )
        with fixed_precision():
            self._resolve()

    def _resolve(self) -> None:
        window, storage, resolver = self._window, self._storage, self._resolver
        if self._rank_strategy.size > 1:
            if tables.is_capturing(resolver.device):
                raise RuntimeError(
                    "a CUDA graph cannot hold the exchange between ranks in a step: "
                    "capture forward and backward passes of the model alone"
                )
            self._find_wrapper()
            self._update_layout()  # the others may have had a micro-batch, and this not
        try:
            weights = window.weights or tuple(self._weights.values())
            describe = partial(resolver.describe, self.base.param_groups, weights)
            begun = window.position > 0
            counts = self._rank_strategy.synchronize(describe, self._options.on_nonfinite, begun)
        finally:
            if self._rank_strategy.sent:  # what the ranks have exchanged cannot be added to
                self._begin_window()
                window.position = len(window.schedule)
        if not any(storage.window_tasks):
            self._resolve_nothing(any(counts))
            return
        self._begin_window()  # another rank may have begun, and this one not
        scale = window.scale(counts, storage.accumulators.device)
        local = resolver.prepare(scale)
        try:
            outcome = resolver.run(local, counts)
        except KeyboardInterrupt:
            # An accumulator may be overwritten by a gradient that is a view of it.
            self._start_window()
            warnings.warn(
                "interrupted in resolve(): what this window accumulated is lost", stacklevel=2
            )
            raise
        self._assigned_gradients.remember(storage.assign_gradients(outcome.gradients))
        window.resolved, window.finite = True, outcome.decision.finite
        noted = resolver.note(outcome, counts)
        try:
            self.recorder.loss_weights = window.weights
            self.recorder.record(noted)
        except Exception as error:  # for want of memory, say: the step itself is complete
            warnings.warn(f"optimizer.recorder has lost its latest steps: {error!r}", stacklevel=2)

    def _resolve_nothing(self, had_losses: bool) -> None:
        """End a window in which no parameter was given a gradient."""
        storage, resolver = self._storage, self._resolver
        if had_losses and any(s.parameter.requires_grad for s in storage.segments):
            raise RuntimeError(NOT_REACHED)
        storage.clear_gradients()
        self._assigned_gradients.remember([])
        self._window.resolved = True
        self._window.finite = torch.ones((), dtype=torch.bool, device=resolver.device)
        resolver.nonfinite = torch.zeros_like(resolver.nonfinite)

    @_disable_dynamo
    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        """Step the base optimizer with `.grad`, and start a new window.

        A window that is not full is resolved as it is. Where a gradient held a NaN or an infinity,
        the base optimizer is not stepped and no state changes (but see `on_nonfinite`). With
        torch's fused optimizers, and with `capturable=True`, the device does that; with any
        other it synchronizes with the device, for one flag.

        Args:
            closure: must do nothing; there are trainers that call `step` with such a one.

        Raises:
            TypeError: the closure computes a loss.
            RuntimeError: nothing was accumulated; or GradScaler.step was called without
                `grad_scaler=`, or its update was not called; or the base optimizer needs a closure
                or a graph of the gradient.
        """
        window = self._window
        self._check_not_within("step")
        if self._loss_scale is None:
            self._check_scaler_calls()
        if closure is None and not window.resolved and self._is_no_step():
            self._initialize_base()
            return
        self._forget_initialized()
        if closure is not None:
            self._call(closure)
        if not window.resolved:
            self.resolve()
        assert window.finite is not None
        if self._loss_scale is not None and not window.scaler_updated:
            self._loss_scale.report(~window.finite | self._resolver.nonfinite.any())
            window.scaler_updated = True
        step_if(window.finite, self.base)
        self._data_parallel.broadcast_buffers()
        # Who clipped them may have put others in their place.
        self._assigned_gradients.remember([p.grad for p in self._storage.parameters])
        self._start_window()

    def _call(self, closure: Callable[[], object]) -> None:
        result = closure()
        computed = not self._window.resolved and self._storage.name_with_gradient() is not None
        if result is not None or computed:
            if not self._window.resolved:
                self._storage.clear_gradients()
            raise TypeError(
                "GCondFused.step takes no closure that computes a loss: call backward(losses) for "
                "each micro-batch, then step(). (In Lightning: set self.automatic_optimization = "
                "False and do both in training_step)"
            )

    def report(self) -> Report:
        """Return the last resolution as plain Python numbers; synchronizes with the device.

        Raises:
            RuntimeError: there has been none since the start, the last `load_state_dict` or
                `add_task`, or since this optimizer was copied or unpickled.
        """
        last = self._resolver.last
        if last is None:
            raise RuntimeError("there is nothing to report before the first resolve() or step()")
        return last.report(tuple(self._weights))

    def advise(self) -> str:
        """Return what to try first in this run, in plain words, and the figures that say so.

        Whether tasks conflict, how unequally the result serves them, and the loss weight or the
        method to try; or that the plain sum is as good. From the steps that `recorder` holds, so
        ask late in training; synchronizes with the device.
        """
        advice = self.recorder.advise()
        if self.mode == "stochastic":
            advice += (
                "\n\nIn stochastic mode the tasks' gradients come from different micro-batches: "
                "their cosines hold the noise of those too. Some steps in exact mode show the "
                "conflict itself."
            )
        return advice

    def __repr__(self) -> str:
        return (
            f"GCondFused(tasks={self._weights}, accumulation_steps={self.accumulation_steps}, "
            f"mode={self.mode!r}, method={self.method}, base={self.base!r})"
        )
