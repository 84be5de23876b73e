"""The losses of a micro-batch: their checks, and the backward pass of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gcond_kernels.distributed.data_parallel import DataParallel
from gcond_kernels.methods import host
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.options import plain_name
from gcond_kernels.precision.loss_scale import LossScale
from gcond_kernels.storage import graphs
from gcond_kernels.storage.collect import Collector
from gcond_kernels.storage.dtensor import full_value
from gcond_kernels.training.resolution import Resolver
from gcond_kernels.training.window import Window

Loss: TypeAlias = "Tensor | Callable[[], Tensor]"

NOTHING_FOR_TASK = "Where a micro-batch has nothing for a task, leave the task out, or give None"
NOT_REACHED = (
    "no loss has reached a parameter of this optimizer: they are not the model's (any more). "
    "load_state_dict(assign=True), to_empty, fully_shard and parametrizations replace a model's "
    "parameters: make both optimizers after that, of model.parameters() as they are then. Or a "
    "hook takes .grad away in the backward pass, as an optimizer that steps in it does: remove it"
)


class LossBackward:
    """Back-propagates losses, each into the accumulator of its task."""

    def __init__(
        self,
        resolver: Resolver,
        collector: Collector,
        data_parallel: DataParallel,
        loss_scale: LossScale | None,
    ) -> None:
        self._resolver = resolver
        self._collector = collector
        self._data_parallel = data_parallel
        self._loss_scale = loss_scale
        self._reached = False  # whether any loss ever reached a parameter
        # How often custom autograd functions were found to overwrite nothing that is shared.
        self._looks: dict[str, int] = {}

    def run(self, losses: Mapping[str, Loss], window: Window) -> None:
        """Back-propagate the losses of one micro-batch, by task."""
        resolver = self._resolver
        names = tuple(resolver.tasks)
        if not losses and self._loss_scale is not None:
            # GradScaler.step asks for a scale also where there was no loss to scale.
            self._loss_scale.inverse(resolver.device)
        # Tensors first: their graphs exist already, and go before a function builds another.
        # In the order of the tasks, which is that in which ranks exchange them.
        order = sorted(losses, key=lambda task: (callable(losses[task]), names.index(task)))
        tensors = [loss for task in order if isinstance(loss := losses[task], Tensor)]
        shared = None
        if len(tensors) > 1 and not tables.is_capturing(resolver.device):
            shared = graphs.SharedFunctions(tensors, self._looks, not self._reached)
        to_free = tensors
        try:
            for number, task in enumerate(order, start=1):
                loss, k = losses[task], names.index(task)
                if not isinstance(loss, Tensor):
                    loss = self._loss_of(task, loss)
                self._back_propagate(k, loss, window, number < len(tensors))
                if shared is not None and number < len(tensors):
                    shared.check()
                del loss
                # Nothing will be added to it any more: the other ranks may have it.
                if resolver.strategy.size > 1 and not window.comes_again(k):
                    resolver.strategy.mark_complete(k)
            to_free = tensors[:-1]  # the backward pass of the last one has freed its own
        finally:
            graphs.free(to_free)
        self._check_reached()

    def _loss_of(self, task: str, function: Callable[[], Tensor]) -> Tensor:
        """Call a loss function, which is to leave the gradients alone."""
        loss = function()
        self._resolver.strategy.check_gradient_sync()  # the function may have changed it
        name = self._resolver.storage.name_with_gradient()
        if name is not None:
            raise RuntimeError(
                f"the loss function of task {task!r} ran a backward pass of its own, which left a "
                f"gradient on {name}: use torch.autograd.grad there, or do it before backward()"
            )
        check_loss(task, loss)
        return loss

    def _back_propagate(self, task: int, loss: Tensor, window: Window, retain_graph: bool) -> None:
        resolver, value = self._resolver, loss
        # As a plain loop has it, for parameters that other optimizers hold.
        factor, unscale = representable(window.loss_factor(task), loss.dtype)
        if self._loss_scale is not None:
            unscale = self._loss_scale.inverse(resolver.device) * unscale
            loss = self._loss_scale.scaled(loss)
        gradient = None if factor == 1.0 else torch.full_like(loss, factor, requires_grad=False)
        with self._collector.collect(task, unscale, resolver.backend):
            try:
                # Outside of autocast, as torch recommends for backward passes.
                with fixed_precision():
                    loss.backward(gradient, retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise explained(error, self._data_parallel) from error
        add_loss(resolver.losses, task, value)

    def _check_reached(self) -> None:
        """Raise where the optimizer holds other parameters than those that the losses train."""
        storage = self._resolver.storage
        if self._reached or not any(storage.counts):
            return
        self._reached = any(storage.window_tasks)
        if not self._reached and any(s.parameter.requires_grad for s in storage.segments):
            raise RuntimeError(NOT_REACHED)


def check_losses(
    losses: object, active: Iterable[Any], known: Sequence[str], exact: bool
) -> dict[str, Any]:
    """Return the losses that the user gave by plain names; where `exact`, some may be left out."""
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must map each active task to its loss, not {type(losses)}")
    given = {plain_name(task): loss for task, loss in losses.items()}
    active = [plain_name(task) for task in active]
    for task in given:
        if task not in known:
            raise KeyError(f"unknown task {task!r}: the tasks are {list(known)}")
        if task not in active:
            raise KeyError(
                f"task {task!r} is not active in this micro-batch: give losses for "
                f"optimizer.active_tasks, now {active}"
            )
    missing = [] if exact else [task for task in active if task not in given]
    if missing:
        raise KeyError(
            f"no loss for task {missing[0]!r}: optimizer.active_tasks is {active}. Where this "
            "micro-batch has nothing for it, give None"
        )
    there = {task: loss for task, loss in given.items() if loss is not None}
    for task, loss in there.items():
        if not callable(loss):
            check_loss(task, loss)
    return there


def check_loss(task: str, loss: object) -> None:
    """Raise an error where a loss cannot be back-propagated."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss of task {task!r} must be a scalar tensor or a function that returns one, "
            f"not {type(loss)}. {NOTHING_FOR_TASK}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the loss of task {task!r} must be a scalar, not of shape {list(loss.shape)}: "
            "reduce it, e.g. with .mean()"
        )
    if loss.is_complex():
        raise ValueError(
            f"the loss of task {task!r} is {loss.dtype}, and only a real number can be made small: "
            "take its .real or .abs()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of task {task!r} has no graph: it was computed under torch.no_grad(), was "
            f"detached, or depends on no parameter that requires a gradient. {NOTHING_FOR_TASK}"
        )


def add_loss(sums: Tensor, task: int, loss: Tensor) -> None:
    """Add a loss to the sum of its task, in [K] float64, without synchronizing with a GPU."""
    value = full_value(loss)
    if host.may_read(sums):
        # In a fraction of the time of torch's operations; and NumPy would warn of ∞ − ∞.
        numbers = sums.numpy()
        numbers[task] = numbers.item(task) + value.item()
        return
    with fixed_precision():
        value = value.reshape(())  # one on a CPU goes into the launch, without a copy
        sums[task].add_(value if value.device.type == "cpu" else value.to(sums.device))


@functools.lru_cache(maxsize=256)
def representable(factor: float, dtype: torch.dtype) -> tuple[float, float | Tensor]:
    """Return a factor as a loss of that type can have it, and what makes up for the rounding."""
    if dtype in (torch.float32, torch.float64) or factor == 0.0:
        return factor, 1.0
    rounded = torch.tensor(max(factor, torch.finfo(dtype).tiny), dtype=dtype, device="cpu").item()
    return rounded, factor / rounded


def explained(error: RuntimeError, data_parallel: DataParallel) -> RuntimeError:
    """Return an error of a backward pass, with what to do where that is known."""
    words = str(error)
    if "ready only once" in words and not data_parallel.modules:
        return RuntimeError(
            "the model is wrapped in DistributedDataParallel, which reduces gradients in every "
            "backward pass and takes one for each forward pass: set "
            f"optimizer.module = model, which turns that off{data_parallel.left_alone}"
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
