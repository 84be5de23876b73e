"""How windows of micro-batches begin and end, and what options take effect in each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.records import InUse
from gcond_kernels.distributed.data_parallel import DataParallel
from gcond_kernels.distributed.options import Distributed
from gcond_kernels.options import (
    Option,
    Options,
    OptionsInUse,
    TaskWeights,
    check_nonfinite,
    check_selected,
    plain_name,
)
from gcond_kernels.precision.loss_scale import LossScale
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.collect import Collector, is_distributed
from gcond_kernels.storage.dtensor import local_shard
from gcond_kernels.storage.layout import check_materialized
from gcond_kernels.storage.names import labels_of
from gcond_kernels.storage.trainable_mask import check_mask
from gcond_kernels.training.losses import LossBackward
from gcond_kernels.training.resolution import Resolver
from gcond_kernels.training.window import Window, schedule_of
from gcond_kernels.training.wrapper import OptimizerWrapper


class WindowedOptimizer(OptimizerWrapper):
    """An optimizer that is stepped once for a window, with options that can be assigned."""

    accumulation_steps = Option()
    mode = Option()
    method = Option()
    granularity = Option()
    momentum = Option()
    update = Option()
    max_norm = Option()
    backend = Option()
    accumulator_dtype = Option(fixed=True)
    mask = Option(fixed=True)
    grad_scaler = Option(fixed=True)
    distributed = Option(fixed=True)

    def __init__(
        self,
        base: torch.optim.Optimizer,
        weights: TaskWeights,
        options: OptionsInUse,
        fixed: dict[str, Any],
    ) -> None:
        super().__init__(base)
        self._weights = weights
        self._options = options
        self._fixed = fixed
        self._window = Window()
        self.recorder = Recorder(tuple(weights), options.current.method.thresholds)
        self.recorder.in_use = in_use(options.current)

    def _make_parts(self, ranks: Distributed) -> None:
        """Make what collects, stores, exchanges and resolves the gradients."""
        options, named = self._options.current, list(self._parameters())
        parameters = [parameter for parameter, _ in named]
        check_materialized(named)
        check_selected(options.method, [name for _, name in named])
        masks = None if self.mask is None else check_mask(self.mask, named)
        # Without any parameters yet, those that are added later determine the device.
        device = parameters[0].device if parameters else torch.device("cpu")
        ops.backend_for(options.backend, device)  # now, rather than in training
        group = ranks.connect()
        strategy = ranks.choose_strategy(parameters, group)
        self._knows_ranks = group is not None
        self._data_parallel = DataParallel(group, ranks.process_group is not None)
        if ranks.module is not None:
            self._data_parallel.take(ranks.module, parameters)
        self._storage = GradientStorage(
            len(self._weights),
            self.accumulator_dtype,
            shards=group.size if group is not None and strategy.shards_state else 1,
            has_dtensors=strategy.name == "mesh",
            masks=masks,
        )
        self._storage.configure(options.history, options.momentum > 0.0)
        self._collector = Collector(self._storage)
        self._collector.wrapper_known = ranks.module is not None
        # Not _strategy: Fabric sets an attribute of that name on what borrows these methods.
        self._rank_strategy = strategy(self._storage, group)
        self._resolver = Resolver(
            self._storage, self._rank_strategy, self._options, self._weights, device
        )
        self._loss_scale = None
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            self._loss_scale = LossScale(self.grad_scaler)
            if self._rank_strategy.size > 1:
                # Now: GradScaler.step asks for a scale also where a rank had no loss to scale.
                self._loss_scale.inverse(device)
        self._losses = LossBackward(
            self._resolver, self._collector, self._data_parallel, self._loss_scale
        )

    @property
    def tasks(self) -> TaskWeights:
        """Task → loss weight. One that is assigned holds from the next window on."""
        return self._weights

    @tasks.setter
    def tasks(self, weights: Mapping[str, float]) -> None:
        new = TaskWeights(weights)
        if set(new) != set(self._weights):
            raise ValueError(
                f"tasks: {list(new)} are not the tasks {list(self._weights)} of this optimizer: "
                "add one with add_task(name, weight), leave one out of backward(losses)"
            )
        self._weights.update(new)

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
        if self._window.position or self._window.resolved or any(self._storage.counts):
            raise RuntimeError("a task is added between two windows: after step() or drop_window()")
        self._options.assigned = Options.checked(
            len(self._weights) + 1, **vars(self._options.assigned)
        )
        self._weights.add(name, weight)
        self._storage.add_task()
        self.recorder.add_task(plain_name(name))
        self._resolver.add_task()
        self._renew()

    @property
    def on_nonfinite(self) -> str:
        """What becomes of a step in which a gradient is not finite; may be set at any time."""
        return self._options.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, choice: str) -> None:
        check_nonfinite(choice, self.grad_scaler)
        self._options.on_nonfinite = choice

    @property
    def module(self) -> torch.nn.Module | None:
        """The model; assigned, it has the effect of `Distributed(module=model)`."""
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
        self.method = self.method.with_thresholds(thresholds)

    def _assign(self, name: str, value: object) -> None:
        """Check an option; it takes effect from the next window on."""
        options = Options.checked(
            len(self._weights), **{**vars(self._options.assigned), name: value}
        )
        check_selected(options.method, labels_of(self.base.param_groups))
        ops.backend_for(options.backend, self._resolver.device)
        self._options.assigned = options
        if self._window.position == 0 and not self._window.resolved:
            self._renew()

    # How windows begin and end.

    def _begin_window(self) -> None:
        """Let what was assigned take effect, where this is the first micro-batch of a window."""
        if self._window.position > 0:
            return
        if not any(self._weights.values()):
            raise ValueError("tasks: at least one loss weight must be above 0, now all are 0")
        o = self._options.assigned
        if self._options.current is not o:
            self._renew()
        turns = schedule_of(len(self._weights), o.accumulation_steps, o.mode)
        self._window.begin(tuple(self._weights.values()), turns)

    def _start_window(self) -> None:
        self._rank_strategy.end_window()
        self._storage.start_window()
        self._resolver.losses.zero_()
        self._window.reset()
        if self._options.current is not self._options.assigned:
            self._renew()

    def _renew(self) -> None:
        """Let the assigned options take effect."""
        self._resolver.renew()
        self.recorder.thresholds = self._options.current.method.thresholds
        self.recorder.in_use = in_use(self._options.current)
        self._rank_strategy.require_check()

    def drop_window(self) -> None:
        """Drop what this window has accumulated; the next `backward` starts a new one.

        Momentum, history and averages stay: of a window that is resolved already they hold its
        gradient, and only the step is not made. Parameters of other optimizers keep what they
        were given: call `zero_grad` of those. With several ranks all of them call it.

        Raises:
            RuntimeError: a part of the window is on its way to other ranks.
        """
        self._check_not_within("drop_window")
        if self._rank_strategy.is_sending:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: call step() instead"
            )
        self._storage.clear_gradients()
        self._start_window()

    def _void_window(self, error: BaseException, before: int) -> None:
        """Drop the window of a call that has failed after `before` micro-batches, and say so."""
        window, storage, names = self._window, self._storage, tuple(self._weights)
        self._rank_strategy.roll_back()
        started = self._rank_strategy.sent
        if not started:
            lost = f", the {before} micro-batches before it are lost" if before else ""
            self._start_window()
            result = (
                f": its window is dropped{lost}, and the next call starts a new one. Parameters of "
                "other optimizers keep what they were given: call zero_grad() of those"
            )
        else:
            sent = [names[k] for k in range(started) if storage.counts[k]]
            for k in range(started, len(names)):
                storage.drop_task(k)
            self._resolver.losses[started:].zero_()
            window.position = len(window.schedule)
            result = (
                f" after the gradients of {sent} were sent to the other ranks: those stay, what "
                "else this window had is lost. Call step()"
            )
        warnings.warn(f"backward() failed ({type(error).__name__}){result}", stacklevel=3)

    # What has to hold, and what has changed, before a micro-batch.

    def _check_not_within(self, call: str) -> None:
        if self._window.in_backward:
            raise RuntimeError(
                f"{call}() was called within backward(): by a loss function, or by a hook of its "
                "backward pass. Call it before or after"
            )

    def _check_window_open(self) -> None:
        window = self._window
        if window.resolved:
            raise RuntimeError(
                "the window is full and .grad holds its result: call step() before backward(), or "
                "drop_window(). (Where Accelerate or another trainer decides when step() steps, it "
                "may have done nothing: end the window where it synchronizes, with resolve(), as "
                "in `if accelerator.sync_gradients: optimizer.resolve()`)"
            )
        if not window.weights or window.position < len(window.schedule):
            return
        if self._rank_strategy.sent:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: call step() before "
                "backward()"
            )
        # The error that resolve() raised was passed over.
        warnings.warn(
            f"the window of {window.position} micro-batches could not be resolved, and is dropped: "
            "backward() starts a new one",
            stacklevel=3,
        )
        self._start_window()

    def _check_ranks(self) -> None:
        if self._knows_ranks or not is_distributed():
            return
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "torch.distributed was initialized after this GCondFused was made, which knows no "
                "other ranks: make it after init_process_group"
            )

    def _find_wrapper(self) -> None:
        """Look once for a DistributedDataParallel that this optimizer does not know."""
        listed = (p for group in self.base.param_groups for p in group["params"])
        if self._data_parallel.search(listed):
            self._collector.wrapper_known = True

    def _update_layout(self) -> None:
        """Lay out the parameters that the base has now."""
        groups = self.base.param_groups
        places = self._storage.update_layout(
            groups, lambda: labels_of(groups), self._rank_strategy.sent > 0
        )
        if places:
            self._resolver.follow_layout(places)

    def _clear_gradients(self) -> None:
        """Make way for one task's gradients; what others computed is not thrown away.

        What `step` left is its own, whatever was added to it since; and zeros are nobody's.
        """
        storage = self._storage
        if storage.name_with_gradient() is None:
            self._assigned_gradients.remember([])
            return
        own = self._assigned_gradients.ids()
        for parameter, name in zip(storage.parameters, storage.names, strict=True):
            gradient = parameter.grad
            if gradient is not None and id(gradient) not in own and not is_empty(gradient):
                raise RuntimeError(
                    f"{name} has a .grad that this optimizer did not write (it comes from "
                    "another backward pass or optimizer, or was replaced): give its loss a task of "
                    "its own, back-propagate it between the last backward() of a window and "
                    "step(), or drop it with zero_grad()"
                )
        storage.clear_gradients()
        self._assigned_gradients.remember([])


def is_zero(values: list[Any]) -> bool:
    """Return whether all numbers and all elements of tensors are zero."""
    return not any(bool(v.any()) if isinstance(v, Tensor) else v for v in values)


def is_empty(gradient: Tensor) -> bool:
    """Return whether what this process holds of a gradient is all zeros."""
    part = local_shard(gradient)
    return part.layout == torch.strided and is_zero([part])


def in_use(options: Options) -> InUse:
    """Return what advice has to know of the options."""
    method = options.method
    return InUse(
        method=type(method).__name__,
        settings=f"{method!r}, granularity={options.granularity!r}, mode={options.mode!r}",
        state_of=method.state_type.__name__,
        follows_loss_weights=method.follows_loss_weights,
    )
