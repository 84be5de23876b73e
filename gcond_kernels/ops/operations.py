"""The operations: what they take, what they return, and what they write.

K tasks, T parameter tensors, N' elements of flat storage. Gradients and outputs are tensors of any
shape without gaps in memory; they and the segments of flat storage list a parameter's elements in
the same memory order. Each operation raises a ValueError that names the argument which does not
fit, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops import checks
from gcond_kernels.ops.backends import Backend, backend_for
from gcond_kernels.ops.checks import FLOAT64, check_tensor
from gcond_kernels.ops.contexts import operation
from gcond_kernels.ops.registration import is_traced, operator
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Layout,
    Momentum,
    Rescale,
    Settings,
    SignDropout,
    TaskGradients,
)


def _nothing(**_: object) -> None:
    """Do nothing; the fake of an operation that only changes its arguments."""


@operator(
    "accumulate(Tensor(a!) accumulator, Tensor[] gradients, bool[] present, int[] offsets, "
    "int[] sizes, float scale, Tensor? scale_tensor, bool overwrite, str backend) -> ()",
    fake=_nothing,
)
def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    *,
    scale: float | Tensor = 1.0,
    overwrite: bool = False,
    backend: str | Backend = "auto",
) -> None:
    """Add one task's gradients, times `scale`, to its accumulator.

    Args:
        accumulator: [N'] float32, bfloat16 or float64, changed in place. The sum is formed in
            float32, in float64 where the accumulator is.
        gradients: T tensors of `GRADIENT_DTYPES`, or None where a parameter has none.
        layout: where each gradient's segment lies.
        scale: a number, or a tensor [] on the accumulator's device that the host does not read.
        overwrite: set the segments instead of adding to them, to zero where there is no gradient;
            what they held before, NaN included, is forgotten.
        backend: a name, or what `backend_for` returned.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    device = accumulator.device
    checks.check_flat("accumulator", accumulator, layout, checks.ACCUMULATOR_DTYPES, device)
    checks.check_dense("gradients", gradients, layout.sizes, device)
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, [], checks.GRADIENT_DTYPES, device)
    else:
        scale = float(scale)
    chosen = backend_for(backend, device, accumulator.dtype)
    chosen.accumulate(accumulator, gradients, layout, scale, overwrite)


def _empty_gramians(gradients: TaskGradients, momentum: Tensor | None, **_: object) -> Gramians:
    return Gramians.empty(gradients, momentum is not None)


@operator(
    "gramian(Tensor accumulators, int[] offsets, int[] sizes, Tensor scale, Tensor? history, "
    "Tensor? mask, Tensor? history_scale, Tensor? momentum, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_gramians,
)
def gramian(
    gradients: TaskGradients,
    *,
    history_scale: Tensor | None = None,
    momentum: Tensor | None = None,
    backend: str | Backend = "auto",
) -> Gramians:
    """Return the inner products of the task gradients, from one read of them.

    Products are formed in float32, and in float64 where the accumulators are; sums in float64.
    Where there is a history, h_k = history_scale[k] · history[k]. The products of a task whose
    scale is 0 are 0, whatever its accumulator holds.

    Args:
        gradients: the accumulated gradients of K tasks.
        history_scale: [K] float64; read where there is a history.
        momentum: [N'] float32, or float64 as the accumulators are, or None; where given it is one
            more gradient, of scale 1.
        backend: a name, or what `backend_for` returned.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    checks.check_gradients(gradients)
    if momentum is not None:
        checks.check_momentum(momentum, gradients)
    device = gradients.accumulators.device
    if gradients.history is not None:
        if history_scale is None:
            raise ValueError("a history needs its history_scale [K]")
        check_tensor("history_scale", history_scale, gradients.scale.shape, FLOAT64, device)
    chosen = backend_for(backend, device, gradients.accumulators.dtype)
    return chosen.gramian(gradients, history_scale, momentum)


def _empty_arbitration(gramian: Tensor, settings: Settings, **_: object) -> Arbitration:
    return Arbitration.empty(gramian, settings)


@operator(
    "arbitrate(Tensor gramian, Tensor? cross, Tensor scale, Tensor(a!) norm_ema, "
    "Tensor(b!) winners, Tensor(c!) history_gramian, Tensor(d!) history_coefficients, "
    "Tensor(e!) history_scale, float[] thresholds, float remap_power, str arbitration, "
    "int? max_iterations, float tolerance, int dominance_window, float[] tie_breaking_weights, "
    "float norm_ema_beta, float? norm_ema_start, float? norm_cap, str history, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_arbitration,
)
def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    *,
    state: ArbitrationState,
    settings: Settings,
    backend: str | Backend = "auto",
) -> Arbitration:
    """Return one weight per task: the GCond resolution on inner products (see `GCond`).

    The Gramians of a batch [B, K, K] are resolved one by one; then `cross` and the state have a
    leading dimension [B] too. Where one of them is not finite nothing is decided on any.

    Args:
        gramian: S, [K, K] float64.
        cross: X, [K, K] float64, or None for no history: every stability is 0.
        scale: [K] float64; a task whose scale is 0 takes no part and keeps its state.
        state: changed in place.
        settings: the method's numbers.
        backend: a name, or what `backend_for` returned.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    if gramian.dim() not in (2, 3) or gramian.shape[-1] == 0:
        raise ValueError(
            f"gramian must be [K, K] or [B, K, K] of one task or more, not {list(gramian.shape)}"
        )
    K, device = gramian.shape[-1], gramian.device
    shape = [*gramian.shape[:-2], K, K]
    check_tensor("gramian", gramian, shape, FLOAT64, device)
    if cross is not None:
        check_tensor("cross", cross, shape, FLOAT64, device)
    check_tensor("scale", scale, [K], FLOAT64, device)
    checks.check_state(state, shape, device)
    if gramian.dim() == 3:
        # Each resolution sees its own Gramian alone: where one is not finite, none is made finite.
        gramian = torch.where(gramian.isfinite().all(), gramian, math.nan)
    return backend_for(backend, device).arbitrate(gramian, cross, scale, state, settings)


@operator(
    "combine(Tensor accumulators, int[] offsets, int[] sizes, Tensor scale, Tensor(a!)? history, "
    "Tensor? mask, Tensor(b!)[] outputs, bool[] written, Tensor weights, Tensor finite, "
    "Tensor(c!)? momentum, Tensor(d!)? momentum_steps, float? beta, float? max_norm, "
    "Tensor? per_tensor, str backend) -> ()",
    fake=_nothing,
)
def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    *,
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None = None,
    rescale: Rescale | None = None,
    backend: str | Backend = "auto",
) -> None:
    """Write the gradient of every parameter, momentum and history, from one read.

        g = Σ_k weights[k] · g_k, or 0 where the mask says so
        m ← β m + (1-β) g        m̂ = m / (1 - β^t)
        output = m̂ · min(1, max_norm / ‖m̂‖)

    Where `finite` is False the outputs are set to zero and nothing else changes. Where an output is
    None the tensor had no gradient: its momentum stays as it is.

    Args:
        gradients: the accumulated gradients of K tasks; those of weight 0 are not read. The history
            receives the accumulators, but for tasks of scale 0.
        outputs: T tensors of `GRADIENT_DTYPES`, or None. An output of the accumulators' type may be
            the tensor's own segment of the first accumulator: that is read before it is written.
        weights: [K] float64, or [T, K]: weights of each tensor's own.
        finite: [] bool.
        momentum: changed in place; None writes g itself.
        rescale: a bound of the norm of all outputs together.
        backend: a name, or what `backend_for` returned.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    K, T, device = len(gradients.scale), len(gradients.layout.sizes), gradients.scale.device
    checks.check_written(gradients, outputs, momentum)
    check_tensor("weights", weights, [K] if weights.dim() < 2 else [T, K], FLOAT64, device)
    check_tensor("finite", finite, [], (torch.bool,), device)
    if rescale is not None:
        checks.check_max_norm(rescale.max_norm)
        R = K + (momentum is not None)
        if momentum is not None and rescale.per_tensor.shape[1:] == (K, K):
            raise ValueError("per_tensor must hold the momentum: give it to gramian too")
        check_tensor("per_tensor", rescale.per_tensor, [T, R, R], FLOAT64, device)
    chosen = backend_for(backend, device, gradients.accumulators.dtype)
    chosen.combine(gradients, outputs, weights, finite, momentum, rescale)


@operator(
    "graddrop(Tensor accumulators, int[] offsets, int[] sizes, Tensor scale, Tensor? history, "
    "Tensor? mask, Tensor(a!)[] outputs, bool[] written, Tensor finite, int seed, Tensor counter, "
    "float leak, int first, Tensor(b!)? momentum, Tensor(c!)? momentum_steps, float? beta, "
    "str backend) -> ()",
    fake=_nothing,
)
def graddrop(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    *,
    finite: Tensor,
    dropout: SignDropout,
    momentum: Momentum | None = None,
    backend: str | Backend = "auto",
) -> None:
    """Write the gradient of every parameter by gradient sign dropout, from one read.

    For every element by itself, and a random number 0 < U < 1 of its own (Chen et al. 2020,
    arXiv 2010.06808, algorithm 1, with f the identity):

        P = (1 + Σ_k g_k / Σ_k |g_k|) / 2
        g = Σ_k (leak + (1 - leak) · [g_k > 0 and P > U, or g_k < 0 and P < U]) · g_k
        m ← β m + (1-β) g        output = m / (1 - β^t)

    U is a function of seed, counter and the element's place alone, to the same bits on every device
    and in every backend (SplitMix64). Where `finite` is False the outputs are set to zero and
    nothing else changes.

    Args:
        gradients: the accumulated gradients of K tasks; the scale is rounded to float32 before it
            multiplies (not with float64 accumulators), and the history stays as it is.
        outputs: as for `combine`.
        finite: [] bool.
        dropout: of the random numbers.
        momentum: changed in place; None writes g itself.
        backend: a name, or what `backend_for` returned.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    device = gradients.accumulators.device
    checks.check_written(gradients, outputs, momentum)
    check_tensor("finite", finite, [], (torch.bool,), device)
    check_tensor("counter", dropout.counter, [], (torch.int64,), device)
    if not 0.0 <= dropout.leak <= 1.0:
        raise ValueError(f"leak must be in [0, 1], not {dropout.leak}")
    if dropout.first < 0:
        raise ValueError(f"first must be 0 or more, not {dropout.first}")
    chosen = backend_for(backend, device, gradients.accumulators.dtype)
    chosen.graddrop(gradients, outputs, finite, dropout, momentum)


@operation
def resolve(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    *,
    state: ArbitrationState,
    settings: Settings,
    momentum: Momentum | None = None,
    max_norm: float | None = None,
    backend: str | Backend = "auto",
) -> tuple[Gramians, Arbitration]:
    """Call `gramian`, `arbitrate` and `combine`, in one launch where a backend can.

    The CUDA backend can where the accumulators fit in the GPU's L2 cache, with at most 8 tasks and
    1,000 tensors. The bits are those of the three operations. Outputs, state and momentum are
    changed in place; `max_norm` bounds the norm of all outputs together.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    if is_traced(gradients):
        raise NotImplementedError(
            "resolve is not for graphs: call gramian, arbitrate and combine, which are"
        )
    device = gradients.accumulators.device
    checks.check_written(gradients, outputs, momentum)
    checks.check_state(state, [len(gradients.accumulators)] * 2, device)
    checks.check_max_norm(max_norm)
    chosen = backend_for(backend, device, gradients.accumulators.dtype)
    if chosen.resolves_at_once(gradients):
        return chosen.resolve(gradients, outputs, state, settings, momentum, max_norm)
    history_scale = None if gradients.history is None else state.history_scale
    buffer = None if momentum is None or max_norm is None else momentum.buffer
    products = chosen.gramian(gradients, history_scale, buffer)
    decision = chosen.arbitrate(products.total, products.cross, gradients.scale, state, settings)
    rescale = None if max_norm is None else Rescale(max_norm, products.per_tensor)
    chosen.combine(gradients, outputs, decision.weights, decision.finite, momentum, rescale)
    return products, decision
