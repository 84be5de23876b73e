"""The four operations: their contracts, their checks, and the choice of a backend.

    accumulate   gradients of one task  →  added into that task's accumulator
    gramian      accumulators, history  →  inner products
    arbitrate    inner products, state  →  one weight per task
    combine      accumulators, weights  →  the gradient of every parameter

Shapes: K tasks, T parameter tensors, N' elements in a row of flat storage. `offsets` and
`sizes` say where in a row each tensor's segment lies; what is between the segments is zero.
Every flat tensor lists its parameter's elements in the parameter's own memory order.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "python")
OPERATIONS = ("accumulate", "gramian", "arbitrate", "combine")
ACCUMULATOR_DTYPES = (torch.float32, torch.bfloat16)


class Arbitration(NamedTuple):
    """What a resolution decided. All tensors are on the Gramian's device.

    Attributes:
        weights: [K] float64; the resolved gradient is Σ_k weights[k] · ĝ_k.
        rows: [K, K] float64; row i makes the resolved gradient of task i.
        events: [max_iterations, 5] float64, a row per resolved conflict: i, j, cosine,
            winner (-1: none was chosen), zone (0 mild, 1 moderate, 2 critical); NaN after the last.
        finite: [] bool; False where a gradient held a NaN or an infinity. Then the weights
            are zero and no state has changed.
    """

    weights: Tensor
    rows: Tensor
    events: Tensor
    finite: Tensor


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors on this device; None where it can."""
    if backend == "python":
        return None
    if backend in BACKENDS:
        return f"this version of gcond-kernels has no {backend} backend yet"
    return f"there is no such backend; choose from {', '.join(('auto', *BACKENDS))}"


def choose_backend(requested: str, device: torch.device) -> str:
    """The backend that serves `device`.

    Args:
        requested: "auto", or one of `BACKENDS`. "auto" reads the environment variable
            GCOND_BACKEND and, where that is unset or "auto" too, takes the first backend of
            `BACKENDS` that is there; on the CPU always "python".
        device: of the tensors.

    Raises:
        RuntimeError: the requested backend cannot serve the device. Nothing is chosen instead.
    """
    source = f"backend={requested!r}"
    if requested == "auto":
        requested = os.environ.get("GCOND_BACKEND", "") or "auto"
        source = f"GCOND_BACKEND={requested}"
    if requested != "auto":
        reason = unavailable(requested, device)
        if reason is not None:
            raise RuntimeError(f"{source} cannot be used on {device}: {reason}")
        return requested
    candidates = BACKENDS if device.type == "cuda" else ("python",)
    return next(backend for backend in candidates if unavailable(backend, device) is None)


def _backend(requested: str, device: torch.device) -> ModuleType:
    return importlib.import_module(f"gcond_kernels.{choose_backend(requested, device)}")


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    scale: float | Tensor = 1.0,
    overwrite: bool = False,
    backend: str = "auto",
) -> None:
    """Adds one task's gradients, times `scale`, to its accumulator.

    Args:
        accumulator: [N'] float32 or bfloat16, changed in place. The sum is formed in float32.
        gradients: T flat tensors of any floating type, or None where a parameter has none.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments; `gradients[t]` has `sizes[t]` elements.
        scale: a number, or a tensor [] on the accumulator's device.
        overwrite: the segments are set instead of added to, to zero where there is no
            gradient; what they held before, NaN included, is forgotten.
        backend: see `choose_backend`.

    Raises:
        ValueError: a size, dtype or device does not fit; nothing has been written.
    """
    _check_row("accumulator", accumulator, offsets, sizes)
    _check_flat("gradients", gradients, sizes, accumulator.device)
    _backend(backend, accumulator.device).accumulate(
        accumulator, gradients, offsets, sizes, scale, overwrite
    )


def gramian(
    accumulators: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    scale: Tensor,
    history: Tensor | None = None,
    history_scale: Tensor | None = None,
    momentum: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Inner products of the scaled accumulators, from one read of them.

    With ĝ_k = scale[k] · accumulators[k] and h_k = history_scale[k] · history[k]. A task whose
    scale is 0 takes no part: its products are 0, whatever its accumulator holds.

    Args:
        accumulators: [K, N'] float32 or bfloat16.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        scale: [K] float64.
        history: [K, N'] of any floating type, or None.
        history_scale: [K] float64; goes with `history`.
        momentum: [N'] float32, or None; where given it is one more row, with scale 1.
        backend: see `choose_backend`.

    Returns:
        per_tensor: [T, R, R] float64, a Gramian per tensor, R = K, or K + 1 with momentum as
            the last row. Their sum over T, first K rows and columns, is S_ij = ĝ_i · ĝ_j.
        cross: [K, K] float64, X_ij = ĝ_i · h_j; None without history.

    Raises:
        ValueError: a size, dtype or device does not fit.
    """
    tasks = len(accumulators)
    for name, matrix in (("accumulators", accumulators), ("history", history)):
        if matrix is not None:
            if matrix.shape != accumulators.shape or matrix.dim() != 2:
                raise ValueError(
                    f"{name} must be [K, N'] like the accumulators, not {list(matrix.shape)}"
                )
            _check_row(name, matrix[0], offsets, sizes)
    _check_vector("scale", scale, tasks)
    if momentum is not None:
        _check_row("momentum", momentum, offsets, sizes)
    if history is not None:
        if history_scale is None:
            raise ValueError("history needs its history_scale [K]")
        _check_vector("history_scale", history_scale, tasks)
    per_tensor, cross = _backend(backend, accumulators.device).gramian(
        accumulators,
        history,
        momentum,
        offsets,
        sizes,
        scale,
        scale if history_scale is None else history_scale,
    )
    return per_tensor, cross


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    *,
    norm_ema: Tensor,
    winners: Tensor,
    history_gramian: Tensor,
    history_rows: Tensor,
    history_scale: Tensor,
    thresholds: tuple[float, float, float],
    remap_power: float,
    smooth: bool,
    max_iterations: int,
    tolerance: float,
    stability_weight: float,
    strength_weight: float,
    norm_ema_beta: float,
    norm_ema_floor: float,
    norm_cap: float | None,
    resolved_history: bool,
    eps: float,
    backend: str = "auto",
) -> Arbitration:
    """One weight per task: the GCond resolution on inner products (see `GCond`).

    Args:
        gramian: S, [K, K] float64.
        cross: X, [K, K] float64, or None for no history: every stability is 0.
        scale: [K] float64; where it is 0 the task takes no part and keeps its state.
        norm_ema: [K] float64, ν; 0 is "not started". Changed in place, like all that follow.
        winners: [W] int64, the last winners, oldest first, -1 where there is none yet.
        history_gramian: [K, K] float64, S of the last step that a task took part in.
        history_rows: [K, K] float64: h_i = Σ_j rows[i, j] · (last step's ĝ_j).
        history_scale: [K] float64, the scale of each history row.
        thresholds: (θ_crit, θ_main, θ_weak).
        remap_power: exponent of the moderate zone.
        smooth: the smooth form, not the one with steps.
        max_iterations: bound on the number of projections.
        tolerance: a pair conflicts where its cosine is below θ_weak - tolerance.
        stability_weight: of the stability in the winner's score.
        strength_weight: of the relative norm in the winner's score.
        norm_ema_beta: decay of ν.
        norm_ema_floor: least value of ν, also added to it where it divides.
        norm_cap: longer gradients are shortened to this norm; None is no cap.
        resolved_history: whether the next history is that of the resolved gradients.
        eps: added to the sum of strengths that divides.
        backend: see `choose_backend`.

    Raises:
        ValueError: a shape does not fit.
    """
    tasks = gramian.shape[0]
    for name, matrix in (
        ("gramian", gramian),
        ("cross", cross),
        ("history_gramian", history_gramian),
        ("history_rows", history_rows),
    ):
        if matrix is not None and matrix.shape != (tasks, tasks):
            raise ValueError(f"{name} must be [{tasks}, {tasks}], not {list(matrix.shape)}")
    for name, vector in (
        ("scale", scale),
        ("norm_ema", norm_ema),
        ("history_scale", history_scale),
    ):
        _check_vector(name, vector, tasks)
    return Arbitration(
        *_backend(backend, gramian.device).arbitrate(
            gramian,
            cross,
            scale,
            norm_ema,
            winners,
            history_gramian,
            history_rows,
            history_scale,
            thresholds=thresholds,
            remap_power=remap_power,
            smooth=smooth,
            max_iterations=max_iterations,
            tolerance=tolerance,
            stability_weight=stability_weight,
            strength_weight=strength_weight,
            norm_ema_beta=norm_ema_beta,
            norm_ema_floor=norm_ema_floor,
            norm_cap=norm_cap,
            resolved_history=resolved_history,
            eps=eps,
        )
    )


def combine(
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    weights: Tensor,
    scale: Tensor,
    finite: Tensor,
    per_tensor: Tensor,
    history: Tensor | None = None,
    momentum: Tensor | None = None,
    momentum_steps: Tensor | None = None,
    beta: float = 0.0,
    max_norm: float | None = None,
    parameter_norms: Tensor | None = None,
    trust_ratio_coef: float = 1e-4,
    trust_ratio_clip: float = 100.0,
    backend: str = "auto",
) -> None:
    """Writes the gradient of every parameter, momentum and history, from one read.

        g = Σ_k weights[k] · scale[k] · accumulators[k]
        m ← β m + (1-β) g        m̂ = m / (1 - β^t)
        output = m̂ · min(1, max_norm / ‖m̂‖), or with parameter_norms
        output = sign(m̂) · min(‖p‖ / ‖m̂‖, trust_ratio_clip) · trust_ratio_coef

    Where `finite` is False the outputs are set to zero and nothing else changes. Where an
    output is None the tensor had no gradient: its momentum stays as it is.

    Args:
        accumulators: [K, N'] float32 or bfloat16. Rows of weight 0 are not read.
        outputs: T flat tensors of any floating type to be written, or None.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        weights: [K] float64.
        scale: [K] float64; the history row of a task with scale 0 is kept.
        finite: [] bool.
        per_tensor: [T, R, R] float64 as `gramian` returns it; it must hold the momentum row
            where a norm of m̂ is asked for (max_norm or parameter_norms) and there is momentum.
        history: [K, N'], receives the accumulators as they are; None keeps none.
        momentum: [N'] float32, m; None where β = 0.
        momentum_steps: [T] int64, t of each tensor, counted up; goes with `momentum`.
        beta: β in [0, 1).
        max_norm: bound of the norm of all outputs together.
        parameter_norms: [T] float64, ‖p‖ of each tensor; turns the sign update on, where a
            ratio is 1 if either norm is below 1e-8.
        trust_ratio_coef: factor of the sign update.
        trust_ratio_clip: bound of the ratio of the sign update.
        backend: see `choose_backend`.

    Raises:
        ValueError: a size, dtype or device does not fit, or two options do not go together;
            nothing has been written.
    """
    tasks, device = len(accumulators), accumulators.device
    _check_row("accumulators", accumulators[0], offsets, sizes)
    _check_flat("outputs", outputs, sizes, device)
    _check_vector("weights", weights, tasks)
    _check_vector("scale", scale, tasks)
    if (momentum is None) != (beta == 0.0) or (momentum is None) != (momentum_steps is None):
        raise ValueError("momentum, momentum_steps and beta > 0 go together")
    if max_norm is not None and parameter_norms is not None:
        raise ValueError("max_norm does not go with the sign update: its size is the trust ratio")
    norm_wanted = max_norm is not None or parameter_norms is not None
    if norm_wanted and per_tensor.shape[1] != tasks + (momentum is not None):
        raise ValueError("per_tensor must hold the momentum row: give momentum to gramian too")
    if history is not None and history.shape != accumulators.shape:
        raise ValueError(f"history must be {list(accumulators.shape)}, not {list(history.shape)}")
    _backend(backend, device).combine(
        accumulators,
        weights,
        scale,
        finite,
        outputs,
        offsets,
        sizes,
        history,
        momentum,
        momentum_steps,
        beta,
        per_tensor,
        max_norm,
        parameter_norms,
        trust_ratio_coef,
        trust_ratio_clip,
    )


def multi_tensor_norm(
    tensors: Sequence[Tensor], *, per_tensor: bool = False, backend: str = "auto"
) -> Tensor:
    """Euclidean norm of a list of tensors, [] float64, or of each of them, [T] float64.

    Args:
        tensors: T tensors of any floating type and shape, on one device; T may be 0.
        per_tensor: one norm for each tensor instead of one for all.
        backend: see `choose_backend`.

    Raises:
        ValueError: a tensor is not floating or lies on another device.
    """
    products = _multi_tensor_dot([tensors], backend)[:, 0, 0]
    return products.sqrt() if per_tensor else products.sum().sqrt()


def multi_tensor_cosine_similarity(
    a: Sequence[Tensor], b: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Cosine of the angle between two lists of tensors, each taken as one long vector.

    Args:
        a: T tensors of any floating type, on one device.
        b: T tensors; `b[t]` has as many elements as `a[t]`, in the same logical order.
        backend: see `choose_backend`.

    Returns:
        [] float64; 0 where either vector is zero.

    Raises:
        ValueError: the lists do not match.
    """
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        raise ValueError("the two lists must hold tensors of the same shapes in the same order")
    products = _multi_tensor_dot([a, b], backend).sum(0)
    norms = products[0, 0].sqrt() * products[1, 1].sqrt()
    return torch.where(norms > 0.0, products[0, 1] / norms, 0.0)


def _multi_tensor_dot(lists: Sequence[Sequence[Tensor]], backend: str) -> Tensor:
    flat = [[tensor.detach().reshape(-1) for tensor in tensors] for tensors in lists]
    device = flat[0][0].device if flat[0] else torch.device("cpu")
    for tensors in flat:
        _check_flat("tensors", tensors, [tensor.numel() for tensor in tensors], device)
    products: Tensor = _backend(backend, device).multi_tensor_dot(flat)
    return products


def _check_row(name: str, row: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> None:
    allowed = (*ACCUMULATOR_DTYPES, torch.float16) if name == "history" else ACCUMULATOR_DTYPES
    if row.dim() != 1 or not row.is_contiguous() or row.dtype not in allowed:
        raise ValueError(
            f"{name} must hold contiguous rows of {' or '.join(map(str, allowed))}, "
            f"not {row.dtype} of shape {list(row.shape)} and stride {row.stride()}"
        )
    if len(offsets) != len(sizes):
        raise ValueError(f"{len(offsets)} offsets do not go with {len(sizes)} sizes")
    end = max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)
    if end > row.numel() or min(offsets, default=0) < 0 or min(sizes, default=0) < 0:
        raise ValueError(f"{name} has {row.numel()} elements, but the segments end at {end}")


def _check_flat(
    name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device
) -> None:
    if len(tensors) != len(sizes):
        raise ValueError(f"{len(tensors)} {name} do not go with {len(sizes)} sizes")
    for t, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if tensor is None:
            continue
        if tensor.shape != (size,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{t}] must be flat with {size} elements, not {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}[{t}] must be of a floating type, not {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}[{t}] is on {tensor.device}, not on {device}")


def _check_vector(name: str, vector: Tensor, length: int) -> None:
    if vector.shape != (length,) or vector.dtype != torch.float64:
        raise ValueError(
            f"{name} must be [{length}] float64, not {list(vector.shape)} {vector.dtype}"
        )
