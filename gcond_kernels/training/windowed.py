"""An optimizer that is stepped once for a window of micro-batches: how windows begin and end."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.distributed.data_parallel import DataParallel
from gcond_kernels.distributed.strategy import SingleProcess
from gcond_kernels.options import OptionsInUse, TaskWeights
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.collect import Collector, is_distributed
from gcond_kernels.storage.dtensor import local_shard
from gcond_kernels.storage.names import labels_of
from gcond_kernels.training.resolution import Resolver
from gcond_kernels.training.window import Window, schedule_of
from gcond_kernels.training.wrapper import OptimizerWrapper


class WindowedOptimizer(OptimizerWrapper):
    """An optimizer with accumulators, which a window fills and a step empties."""

    recorder: Recorder
    _weights: TaskWeights
    _options: OptionsInUse
    _storage: GradientStorage
    _collector: Collector
    # Not _strategy: Fabric sets an attribute of that name on what borrows these methods.
    _rank_strategy: SingleProcess
    _data_parallel: DataParallel
    _knows_ranks: bool
    _resolver: Resolver
    _window: Window

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
        if self._resolver.losses is not None:
            self._resolver.losses.zero_()
        self._window.reset()
        if self._options.current is not self._options.assigned:
            self._renew()

    def _renew(self) -> None:
        """Let the assigned options take effect."""
        self._resolver.renew()
        self.recorder.thresholds = self._options.current.method.thresholds
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

    def _void_window(self, error: BaseException) -> None:
        """Drop the window of a call that has failed, and say so."""
        window, storage, names = self._window, self._storage, tuple(self._weights)
        self._rank_strategy.roll_back()
        started = self._rank_strategy.sent
        if not started:
            position = window.position
            lost = f", the {position} micro-batches before it are lost" if position else ""
            self._start_window()
            warnings.warn(
                f"backward() failed ({type(error).__name__}): its window is dropped{lost}, and the "
                "next call starts a new one. Parameters of other optimizers keep what they were "
                "given: call zero_grad() of those",
                stacklevel=3,
            )
            return
        sent = [names[k] for k in range(started) if storage.counts[k]]
        for k in range(started, len(names)):
            storage.drop_task(k)
        window.position = len(window.schedule)
        warnings.warn(
            f"backward() failed ({type(error).__name__}) after the gradients of {sent} were sent "
            "to the other ranks: those stay, what else this window had is lost. Call step()",
            stacklevel=3,
        )

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
        own = self._assigned_gradients.ids()
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
        self._assigned_gradients.remember([])


def is_zero(values: list[Any]) -> bool:
    """Return whether all numbers and all elements of tensors are zero."""
    return not any(bool(v.any()) if isinstance(v, Tensor) else v for v in values)


def is_empty(gradient: Tensor) -> bool:
    """Return whether what this process holds of a gradient is all zeros."""
    part = local_shard(gradient)
    return part.layout == torch.strided and is_zero([part])
