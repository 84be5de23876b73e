"""Conflict resolution without the optimizer, for those who compute task gradients themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods import Method
from gcond_kernels.methods.function import method_of
from gcond_kernels.methods.method import (
    Comparison,
    Destination,
    Known,
    forget_history,
    fresh_state,
    rounding_of,
)
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.ops.norms import multi_tensor_dot
from gcond_kernels.ops.types import Layout, TaskGradients, within_range
from gcond_kernels.storage.collect import in_memory_order
from gcond_kernels.storage.dtensor import is_dtensor
from gcond_kernels.storage.layout import Segment, accumulator_dtype_of, check_parameter, segments_of
from gcond_kernels.storage.shared_parameters import SharedParameters, update_shared

Gradients: TypeAlias = "Sequence[Sequence[Tensor | None]]"


@fixed_precision
def gramian(gradients: Gradients) -> Tensor:
    """Return the inner products of the task gradients, S_ij = g_i · g_j.

    ::

        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        S = gramian(gradients)
        weights = gcond_kernels.UPGrad()(S)

    Args:
        gradients: as for `resolve_gradients`: K sequences of T tensors of float32, bfloat16,
            float16 or float64, or None. They are read where they are, not copied.

    Returns:
        [K, K] float64, on the device of the gradients. Squares are formed in float32: numbers
        beyond 1e19 or below 1e-22 leave its range. Those of float64 gradients are in float64.

    Raises:
        TypeError, ValueError: the gradients do not go together; the message says which.
    """
    tasks = _by_task(gradients)
    # What no task has a gradient for adds nothing; what some have is zero for the others.
    columns = [column for column in zip(*tasks, strict=True) if any(g is not None for g in column)]
    if not columns:
        return torch.zeros((len(tasks), len(tasks)), dtype=torch.float64, device="cpu")
    full = [_without_none(t, column) for t, column in enumerate(columns)]
    return multi_tensor_dot([list(task) for task in zip(*full, strict=True)], "auto")[0]


@fixed_precision
def resolve_gradients(
    parameters: Iterable[Tensor],
    gradients: Gradients,
    method: Method | Callable[[Tensor], Tensor] | None,
    state: dict[str, Any] | None = None,
) -> Tensor:
    """Write the gradient that resolves the tasks' conflicts to `.grad`; return the weights.

    ::

        parameters = list(model.parameters())
        state = {}
        for x, y in loader:
            losses = [loss_function(model(x), y) for loss_function in loss_functions]
            gradients = [
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                for loss in losses
            ]
            resolve_gradients(parameters, gradients, GCond(), state)
            optimizer.step()

    As in GCondFused, a parameter that one task alone has a gradient for takes no part in a conflict
    and keeps that gradient, and a gradient of zeros is none. What was in `.grad` is replaced;
    where no task has a gradient it becomes None. With several ranks reduce the gradients before.

    Args:
        parameters: T parameters on one device, no DTensors.
        gradients: K sequences, one for each task, of T tensors in the parameters' shapes or None,
            as `torch.autograd.grad` returns them. Of T Jacobians [K, ...], as `torch.func.vmap`
            and `jacrev` return them and TorchJD leaves them in `.jac`, give
            `list(zip(*jacobians, strict=True))`. They are copied to float32, 4 bytes per
            parameter and task while this runs; to float64 where all parameters are.
        method: one of `gcond_kernels.methods`, or a function from the Gramian [K, K] to weights
            [K]; None is `GCond()`.
        state: what is kept from step to step (averages, history, which tasks use a parameter): pass
            the same dict, {} at first, in every step; it is filled and changed in place, and may be
            saved. It goes on where `NonConflicting` is put around the method. None starts afresh:
            without history, averages and random numbers so far.

    Returns:
        [K] float64 weights, on the device: the resolved gradient is Σ_k weights[k] · g_k. NaN for
        GradDrop, which has none. Where a gradient holds a NaN, an infinity or values beyond 1e19,
        all weights and all of `.grad` are NaN, and the state stays as it is (but for GradDrop's
        counter): GradScaler skips such a step.

    Raises:
        TypeError, ValueError: the gradients do not go with the parameters, the method needs what
            only GCondFused knows (losses, names), or the state is of another method, other options,
            tasks or parameters. The message says which, and nothing has changed.
    """
    method = method_of(method)
    _check_method(method)
    segments, length = _segments(list(parameters))
    tasks = _in_order(segments, _by_task(gradients))
    memory = _prepared(method, segments, len(tasks), length, state)
    has_any = [any(g is not None for g in column) for column in zip(*tasks, strict=True)]
    outputs = [
        segment.empty(segment.parameter.dtype, segment.parameter.device) if written else None
        for segment, written in zip(segments, has_any, strict=True)
    ]
    accumulated = _accumulated(segments, tasks, length)._replace(history=memory["history"])
    present = sum(any(g is not None for g in task) for task in tasks)
    weights = _resolve(method, accumulated, outputs, memory, present)
    for segment, output in zip(segments, outputs, strict=True):
        segment.parameter.grad = output
    return weights


def _resolve(
    method: Method,
    gradients: TaskGradients,
    outputs: list[Tensor | None],
    memory: dict[str, Any],
    present: int,
) -> Tensor:
    """Compare, decide and write; where something is not finite, write NaN and keep the state."""
    state: dict[str, Tensor] = memory["method_state"]
    products = ops.gramian(gradients, history_scale=state.get("history_scale"))
    alone = method.compares_single_task and present <= 1
    flags, changed = update_shared(memory["parameter_tasks"], memory["was_shared"], products, alone)
    forget_history(state, changed)
    shared = SharedParameters(False, flags, False)
    S, X = shared.gramians(products, len(gradients.accumulators))
    known = Known(rounding_of(gradients.accumulators.dtype))
    decision = method.decide(Comparison(S, X, gradients.scale, known=known), state)
    finite = decision.finite & products.total.isfinite().all()
    weights = torch.where(finite, decision.weights, torch.nan)
    # What is not finite is to be seen in `.grad`: there is no step here that could be skipped.
    decision = decision._replace(weights=weights, finite=torch.ones_like(finite))
    scale = torch.where(finite, gradients.scale, torch.nan)
    written = gradients._replace(scale=scale, history=None)
    decision = method.apply(written, Destination(outputs), shared.weights(weights), decision, state)
    if gradients.history is not None:
        keep = finite & (gradients.scale > 0.0)[:, None]
        kept_type = gradients.history.dtype
        new = within_range(gradients.accumulators, kept_type).to(kept_type)
        gradients.history.copy_(torch.where(keep, new, gradients.history))
    return decision.weights


def _check_method(method: Method) -> None:
    """Raise a ValueError where a method needs what is not known here."""
    needs = "the losses" if method.needs_losses else None
    if method.parameters is not None:
        needs = f"names, for parameters={method.parameters}"
    if needs:
        raise ValueError(
            f"{type(method).__name__} needs {needs}, which resolve_gradients does not have: use it "
            "with GCondFused"
        )


def _by_task(gradients: Gradients) -> list[list[Tensor | None]]:
    """Return K lists of T gradients, or raise where they are none."""
    if isinstance(gradients, (Tensor, Mapping)) or not isinstance(gradients, Iterable):
        raise TypeError(f"gradients must be a sequence for each task, not {type(gradients)}")
    tasks: list[list[Tensor | None]] = []
    for k, task in enumerate(gradients):
        if isinstance(task, Tensor):
            raise TypeError(
                f"gradients[{k}] is a tensor, not the gradients of a task: of one task give "
                "[gradients], of flat gradients [[g] for g in gradients], of Jacobians [K, ...] "
                "list(zip(*jacobians, strict=True))"
            )
        if isinstance(task, Mapping) or not isinstance(task, Iterable):
            raise TypeError(f"gradients[{k}] must be a sequence of tensors, not {type(task)}")
        tasks.append(list(task))
        for t, gradient in enumerate(tasks[-1]):
            if gradient is not None and not isinstance(gradient, Tensor):
                raise TypeError(
                    f"gradients[{k}][{t}] must be a tensor or None, not {type(gradient)}"
                )
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(f"gradients[{k}][{t}] has layout {gradient.layout}: make it dense")
    lengths = [len(task) for task in tasks]
    if not tasks:
        raise ValueError("gradients are empty: give those of one task or more")
    if len(set(lengths)) > 1:
        raise ValueError(f"every task needs as many gradients (None for none), not {lengths}")
    return tasks


def _without_none(place: int, column: Sequence[Tensor | None]) -> list[Tensor]:
    """Return every task's gradient of one parameter, with zeros for none."""
    example = next(gradient for gradient in column if gradient is not None)
    full = [torch.zeros_like(example) if gradient is None else gradient for gradient in column]
    for task, gradient in enumerate(full):
        if gradient.shape != example.shape:
            raise ValueError(
                f"gradient {place} of task {task} has shape {list(gradient.shape)}, that of others "
                f"{list(example.shape)}"
            )
    return full


def _segments(parameters: list[Tensor]) -> tuple[list[Segment], int]:
    """Return a segment for each parameter, and the length of an accumulator."""
    if not parameters:
        raise ValueError("parameters are empty: give one or more")
    named = [(parameter, f"parameter {t}") for t, parameter in enumerate(parameters)]
    for parameter, name in named:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(parameter)}: give values alone")
        if is_dtensor(parameter):
            raise ValueError(
                f"{name} is a DTensor, whose gradients ranks have to exchange: use GCondFused"
            )
        if not parameter.is_leaf:
            raise ValueError(f"{name} is not a leaf: no optimizer reads its .grad")
        check_parameter(parameter, name, parameters[0].device, False)
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("a parameter is listed twice: its gradient would count twice")
    return segments_of(named)


def _in_order(
    segments: Sequence[Segment], tasks: Sequence[list[Tensor | None]]
) -> list[list[Tensor | None]]:
    """Return the gradients in memory order, or raise where they are not of the parameters."""
    for k, task in enumerate(tasks):
        if len(task) != len(segments):
            raise ValueError(f"task {k} has {len(task)} gradients for {len(segments)} parameters")
        for segment, gradient in zip(segments, task, strict=True):
            if gradient is not None and gradient.shape != segment.shape:
                raise ValueError(
                    f"the gradient of {segment.name} for task {k} has shape "
                    f"{list(gradient.shape)}, not {list(segment.shape)}"
                )
    device = segments[0].parameter.device
    return [in_memory_order(segments, task, device) for task in tasks]


def _accumulated(
    segments: Sequence[Segment], tasks: Sequence[list[Tensor | None]], length: int
) -> TaskGradients:
    """Return a copy of the gradients in flat storage, in float64 where all parameters are."""
    device = segments[0].parameter.device
    layout = Layout(tuple(s.offset for s in segments), tuple(s.size for s in segments))
    dtype = accumulator_dtype_of(segment.parameter.dtype for segment in segments)
    flat = torch.zeros((len(tasks), length), dtype=dtype, device=device)
    for accumulator, task in zip(flat, tasks, strict=True):
        ops.accumulate(accumulator, task, layout, overwrite=True)
    present = tuple(float(any(g is not None for g in task)) for task in tasks)
    return TaskGradients(flat, layout, launch_tables.settings_tensor(present, device))


def _prepared(
    method: Method,
    segments: Sequence[Segment],
    tasks: int,
    length: int,
    state: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the state, filled where it was empty; check that it is of this method and layout."""
    device = segments[0].parameter.device
    made_of = {
        "method": repr(method.state_owner),
        "tasks": tasks,
        "shapes": [list(segment.shape) for segment in segments],
        "strides": [list(segment.stride) for segment in segments],
    }
    if state is not None and not isinstance(state, dict):
        raise TypeError(f"state must be a dict, {{}} at first, or None, not {type(state)}")
    if state:
        _check_same(state, made_of)
        return state
    kept = fresh_state(method, tasks, (), device)
    if state is None and "counter" in kept:
        raise ValueError(
            f"{type(method).__name__} draws random numbers, without a state the same in every "
            "call: give state={}, the same dict in every step"
        )
    state = {} if state is None else state
    history = None
    if method.needs_history:
        history = torch.zeros((tasks, length), dtype=method.history_dtype, device=device)
    used = torch.zeros((len(segments), tasks), dtype=torch.bool, device=device)
    was_shared = torch.full((len(segments),), -1, dtype=torch.int8, device=device)
    state.update(made_of, method_state=kept, history=history)
    state.update(parameter_tasks=used, was_shared=was_shared)
    return state


def _check_same(state: dict[str, Any], made_of: dict[str, Any]) -> None:
    """Raise a ValueError where a state is of another method, or of other tasks or parameters."""
    for name, value in made_of.items():
        found = state.get(name)
        if found == value:
            continue
        difference = f"{name}={found}, and this call {value}"
        if name == "method":  # without the options, which are long
            was, now = str(found).split("(")[0], value.split("(")[0]
            other = "other options" if was == now else now
            difference = f"method={was}, and this call {other}"
        raise ValueError(
            f"state has {difference}: give every method and every list of parameters a state of "
            "its own"
        )
