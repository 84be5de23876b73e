"""The operations: their contracts, their checks, and the choice of a backend.

    accumulate   gradients of one task  →  added into that task's accumulator
    gramian      accumulators, history  →  inner products
    arbitrate    inner products, state  →  one weight per task
    combine      accumulators, weights  →  the gradient of every parameter

and `graddrop`, which takes the place of the last two where signs are picked element by element,
and `resolve`, which is gramian, arbitrate and combine in one call, and in one launch where a
backend can.

Shapes: K tasks, T parameter tensors, N' elements in a row of flat storage. `offsets` and
`sizes` say where in a row each tensor's segment lies; what is between the segments is zero.
Gradients and outputs are tensors of any shape without gaps in memory; they and the segments list
a parameter's elements in the same memory order.

But for `resolve` they are torch library operators too, `torch.ops.gcond_kernels.*`, for graphs and
tracing. Eager calls do not go through the dispatcher, which would cost more than the launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels.ops.checks import (
    FLOAT64,
    GRADIENT_DTYPES,
    check_combine,
    check_dense,
    check_gramian,
    check_row,
    check_settings,
    check_small,
    check_state,
    is_dense,
)
from gcond_kernels.ops.contexts import fixed_precision, operation

BACKENDS = ("cuda", "triton", "python")
OPERATIONS = ("accumulate", "gramian", "arbitrate", "combine", "graddrop", "resolve")

# Which backend "auto" tries first on a GPU, for each operation, and what that was decided by.
AUTO = dict.fromkeys(OPERATIONS, ("cuda", "triton", "python"))
MEASURED = {
    "accumulate": "cuda 19 µs, triton 33 µs",
    "gramian": "cuda 13 µs, triton 14 µs",
    "arbitrate": "cuda 11 µs, triton 12 µs",
    "combine": "cuda 30 µs, triton 40 µs",
    "graddrop": "cuda 32 µs, triton 39 µs",
    "resolve": "cuda 164 µs, triton 202 µs with all checks; cuda is one launch in the L2 cache",
}
MEASURED_HOW = (
    "host time of a call on 300 tensors, without the launch (make bench WHAT=host); "
    "neither has been timed on a GPU yet"
)


class Gramians(NamedTuple):
    """Inner products of the scaled accumulators. All tensors are float64.

    Attributes:
        total: [K, K], S_ij = ĝ_i · ĝ_j.
        cross: [K, K], X_ij = ĝ_i · h_j; None without history.
        per_tensor: [T, R, R], a Gramian per tensor, R = K, or K + 1 with momentum as the last row.
        cross_per_tensor: [T, K, K], X of each tensor; None without history.
    """

    total: Tensor
    cross: Tensor | None
    per_tensor: Tensor
    cross_per_tensor: Tensor | None


class Arbitration(NamedTuple):
    """What a resolution decided. All tensors are on the Gramian's device.

    Of a batch of Gramians all of these have a leading dimension [B].

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
    if backend == "triton":
        return _triton_unavailable(device)
    if backend == "cuda":
        return _cuda_unavailable(device)
    return f"there is no such backend; choose from {', '.join(('auto', *BACKENDS))}"


@functools.cache
def _is_installed(module: str) -> bool:
    """Asked for every micro-batch: looking for what is not there takes 20 µs."""
    return importlib.util.find_spec(module) is not None


def _triton_unavailable(device: torch.device) -> str | None:
    if not _is_installed("triton"):
        return "Triton is not installed: pip install triton (Linux only)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, and interpreted its kernels reach CPU tensors alone"
    if device.type == "cuda":
        return _too_old(device)
    if device.type != "cpu":
        return f"its kernels run on CUDA and ROCm devices, not on {device.type}"
    if interpreted:
        import triton

        if isinstance(triton.language.zeros, triton.JITFunction):
            return (
                "TRITON_INTERPRET=1 was set after Triton was imported, which then takes no notice"
            )
        return None
    return (
        "its kernels need a GPU; with TRITON_INTERPRET=1 in the environment they run on the CPU, "
        "interpreted, which is for tests"
    )


def _cuda_unavailable(device: torch.device) -> str | None:
    if not _is_installed("gcond_kernels._cuda"):
        return (
            "its CUDA C++ extension is not built: GCOND_BUILD_CUDA=1 pip install . compiles it "
            "(needs nvcc)"
        )
    if device.type == "cpu":
        if os.environ.get("GCOND_CUDA_HOST") == "1":
            return _cuda_import_problem()
        return (
            "its kernels need a GPU; with GCOND_CUDA_HOST=1 in the environment they run on the "
            "CPU, compiled for it, which is for tests"
        )
    if device in _cuda_works_on:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _cuda_problem(device)


def _cuda_import_problem() -> str | None:
    """Why the extension, which is there, cannot be used: another system, or another torch."""
    try:
        importlib.import_module("gcond_kernels.cuda")
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"its extension is there, but cannot be imported: {error}"
    return None


# Found to run the compiled kernels. What failed once, for want of memory, say, is asked again.
_cuda_works_on: set[torch.device] = set()


def _cuda_problem(device: torch.device) -> str | None:
    """Why the compiled kernels do not run on this GPU: its driver, or what they were built for."""
    if problem := _cuda_import_problem():
        return problem
    from gcond_kernels import _cuda

    with torch.cuda.device(device):
        problem = _cuda.problem_on(device.index)
    if problem:
        return f"{problem} (built for {_cuda.ARCHITECTURES})"
    _cuda_works_on.add(device)
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU: before Ampere there is no bfloat16."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"


def choose_backend(requested: str, device: torch.device, operation: str) -> str:
    """The backend that serves `device`.

    Args:
        requested: "auto", or one of `BACKENDS`. "auto" reads the environment variable
            GCOND_BACKEND and, where that is unset or "auto" too, takes the first backend of
            `AUTO[operation]` that is there; on the CPU always "python".
        device: of the tensors.
        operation: one of `OPERATIONS`.

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
    candidates = AUTO[operation] if device.type == "cuda" else ("python",)
    return next(backend for backend in candidates if unavailable(backend, device) is None)


def backend_module(requested: str, device: torch.device, operation: str) -> ModuleType:
    """The room of the backend that `choose_backend` finds: its operations, without the checks."""
    chosen = choose_backend(requested, device, operation)
    room = "triton_kernels" if chosen == "triton" else chosen
    return importlib.import_module(f"gcond_kernels.{room}")


def _traced(tensor: Tensor) -> bool:
    """Whether this call must show in a graph: under torch.compile, export, or fake tensors."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


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
        gradients: T tensors of `GRADIENT_DTYPES` without gaps in memory, or None where a
            parameter has none; read in memory order, whatever the shape.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments; `gradients[t]` has `sizes[t]` elements.
        scale: a number, or a tensor [] on the accumulator's device that no host reads.
        overwrite: the segments are set instead of added to, to zero where there is no
            gradient; what they held before, NaN included, is forgotten.
        backend: see `choose_backend`.

    Raises:
        ValueError: a size, dtype or device does not fit; nothing has been written.
    """
    run = torch.ops.gcond_kernels.accumulate if _traced(accumulator) else _accumulate
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    run(accumulator, gradients, offsets, sizes, number, tensor, overwrite, backend)


@operation
def _accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: float,
    scale_tensor: Tensor | None,
    overwrite: bool,
    backend: str,
) -> None:
    check_row("accumulator", accumulator, offsets, sizes)
    check_dense("gradients", gradients, sizes, accumulator.device)
    if scale_tensor is not None:
        check_small("scale", scale_tensor, [], GRADIENT_DTYPES, accumulator.device)
    backend_module(backend, accumulator.device, "accumulate").accumulate(
        accumulator,
        gradients,
        offsets,
        sizes,
        scale if scale_tensor is None else scale_tensor,
        overwrite,
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
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Gramians:
    """Inner products of the scaled accumulators, from one read of them.

    With ĝ_k = scale[k] · accumulators[k] and h_k = history_scale[k] · history[k]. A task whose
    scale is 0 takes no part: its products are 0, whatever its accumulator holds.

    Args:
        accumulators: [K, N'] float32 or bfloat16.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        scale: [K] float64.
        history: [K, N'] of `HISTORY_DTYPES`, or None.
        history_scale: [K] float64; goes with `history`.
        momentum: [N'] float32, or None; where given it is one more row, with scale 1.
        mask: [⌈N' / 32⌉] int32, or None: bit e % 32 of word e // 32 is 0 where element e of a row
            counts as zero, whatever it holds.
        backend: see `choose_backend`.

    Raises:
        ValueError: a size, dtype or device does not fit.
    """
    run = torch.ops.gcond_kernels.gramian if _traced(accumulators) else _gramian
    products = run(
        accumulators, offsets, sizes, scale, history, history_scale, momentum, mask, backend
    )
    return _gramians(products, history)


def _gramians(products: tuple[Tensor, Tensor, Tensor, Tensor], history: Tensor | None) -> Gramians:
    """What a backend returned; without a history it has no cross-Gramians."""
    total, cross, per_tensor, crosses = products
    if history is None:
        return Gramians(total, None, per_tensor, None)
    return Gramians(total, cross, per_tensor, crosses)


@operation
def _gramian(
    accumulators: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    history: Tensor | None,
    history_scale: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = accumulators.device
    check_gramian(accumulators, offsets, sizes, scale, history, history_scale, momentum, mask)
    room = backend_module(backend, device, "gramian")
    products: tuple[Tensor, Tensor, Tensor, Tensor] = room.gramian(
        accumulators,
        history,
        momentum,
        offsets,
        sizes,
        scale,
        scale if history_scale is None else history_scale,
        mask,
    )
    return products


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

    A batch [B, K, K] of Gramians is resolved each by itself, with states of their own: `cross`,
    `norm_ema`, `winners`, `history_gramian` and `history_rows` then have a leading dimension [B].
    Where one of them is not finite nothing is decided on any.

    Args:
        gramian: S, [K, K] float64.
        cross: X, [K, K] float64, or None for no history: every stability is 0.
        scale: [K] float64; where it is 0 the task takes no part and keeps its state.
        norm_ema: [K] float64, ν; 0 is "not started". Changed in place, like all that follow.
        winners: [W] int64, the last winners, oldest first; at the end -1 where there is none yet.
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
    run = torch.ops.gcond_kernels.arbitrate if _traced(gramian) else _arbitrate
    decision = run(
        gramian,
        cross,
        scale,
        norm_ema,
        winners,
        history_gramian,
        history_rows,
        history_scale,
        thresholds,
        remap_power,
        smooth,
        max_iterations,
        tolerance,
        stability_weight,
        strength_weight,
        norm_ema_beta,
        norm_ema_floor,
        norm_cap,
        resolved_history,
        eps,
        backend,
    )
    return Arbitration(*decision)


@operation
def _arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    norm_ema: Tensor,
    winners: Tensor,
    history_gramian: Tensor,
    history_rows: Tensor,
    history_scale: Tensor,
    thresholds: Sequence[float],
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if gramian.dim() not in (2, 3) or gramian.shape[-1] == 0:
        raise ValueError(
            f"gramian must be [K, K] or [B, K, K] of one task or more, not {list(gramian.shape)}"
        )
    K, device = gramian.shape[-1], gramian.device
    shape = [*gramian.shape[:-2], K, K]
    for name, matrix in (("gramian", gramian), ("cross", cross)):
        if matrix is not None:
            check_small(name, matrix, shape, FLOAT64, device)
    check_small("scale", scale, [K], FLOAT64, device)
    state = (norm_ema, winners, history_gramian, history_rows, history_scale)
    check_state(shape, device, *state)
    check_settings(thresholds, max_iterations)
    if gramian.dim() == 3:
        # Each resolution of a batch sees its own: told so, none of them changes its state.
        gramian = torch.where(gramian.isfinite().all(), gramian, math.nan)
    decision: tuple[Tensor, Tensor, Tensor, Tensor] = backend_module(
        backend, device, "arbitrate"
    ).arbitrate(
        gramian,
        cross,
        scale,
        *state,
        thresholds=tuple(thresholds),
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
    return decision


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
    mask: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes the gradient of every parameter, momentum and history, from one read.

        g = Σ_k weights[k] · scale[k] · accumulators[k], or 0 where the mask says so
        m ← β m + (1-β) g        m̂ = m / (1 - β^t)
        output = m̂ · min(1, max_norm / ‖m̂‖), or with parameter_norms
        output = sign(m̂) · min(‖p‖ / ‖m̂‖, trust_ratio_clip) · trust_ratio_coef

    Where `finite` is False the outputs are set to zero and nothing else changes. Where an
    output is None the tensor had no gradient: its momentum stays as it is.

    Args:
        accumulators: [K, N'] float32 or bfloat16. Rows of weight 0 are not read.
        outputs: T tensors of `GRADIENT_DTYPES` without gaps in memory, to be written in memory
            order whatever the shape, or None. An output of the accumulators' type may be the
            tensor's own segment of their first row: that is read before it is written.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        weights: [K] float64, or [T, K]: weights of each tensor's own.
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
        mask: [⌈N' / 32⌉] int32 as for `gramian`, or None: where a bit is 0, the output and the
            momentum become exactly 0.
        backend: see `choose_backend`.

    Raises:
        ValueError: a size, dtype or device does not fit, or two options do not go together;
            nothing has been written.
    """
    rest = (
        offsets,
        sizes,
        weights,
        scale,
        finite,
        per_tensor,
        history,
        momentum,
        momentum_steps,
        beta,
        max_norm,
        parameter_norms,
        trust_ratio_coef,
        trust_ratio_clip,
        mask,
        backend,
    )
    if _traced(accumulators):
        written = [t for t, output in enumerate(outputs) if output is not None]
        present = [output for output in outputs if output is not None]
        torch.ops.gcond_kernels.combine(accumulators, present, written, *rest)
    else:
        _combine(accumulators, outputs, *rest)


def _combine_listed(
    accumulators: Tensor, outputs: Sequence[Tensor], written: Sequence[int], *rest: Any
) -> None:
    """As `_combine`, for graphs, which know no list of optional tensors that are written to."""
    _combine(accumulators, _in_places(outputs, written, len(rest[1])), *rest)


def _in_places(
    outputs: Sequence[Tensor], written: Sequence[int], tensors: int
) -> list[Tensor | None]:
    """The outputs of all tensors from those that are there, and their places."""
    places: list[Tensor | None] = [None] * tensors
    for t, output in zip(written, outputs, strict=True):
        places[t] = output
    return places


@operation
def _combine(
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    weights: Tensor,
    scale: Tensor,
    finite: Tensor,
    per_tensor: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    momentum_steps: Tensor | None,
    beta: float,
    max_norm: float | None,
    parameter_norms: Tensor | None,
    trust_ratio_coef: float,
    trust_ratio_clip: float,
    mask: Tensor | None,
    backend: str,
) -> None:
    K, T, device = len(accumulators), len(sizes), accumulators.device
    check_combine(
        accumulators, outputs, offsets, sizes, scale, history, momentum, momentum_steps, beta,
        max_norm, parameter_norms, mask,
    )  # fmt: skip
    check_small("weights", weights, [K] if weights.dim() < 2 else [T, K], FLOAT64, device)
    check_small("finite", finite, [], (torch.bool,), device)
    R = per_tensor.shape[-1] if per_tensor.dim() == 3 else K
    norm_wanted = max_norm is not None or parameter_norms is not None
    if norm_wanted and momentum is not None and R == K:
        raise ValueError("per_tensor must hold the momentum row: give momentum to gramian too")
    check_small("per_tensor", per_tensor, [T, R, R], FLOAT64, device)
    if R not in (K, K + (momentum is not None)):
        raise ValueError(f"per_tensor has {R} rows a tensor, which do not go with {K} tasks")
    backend_module(backend, device, "combine").combine(
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
        mask,
    )


def graddrop(
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    scale: Tensor,
    finite: Tensor,
    seed: int,
    draws: Tensor,
    leak: float = 0.0,
    momentum: Tensor | None = None,
    momentum_steps: Tensor | None = None,
    beta: float = 0.0,
    mask: Tensor | None = None,
    first: int = 0,
    backend: str = "auto",
) -> None:
    """Writes the gradient of every parameter by gradient sign dropout, from one read.

    With v_k = scale[k] · accumulators[k], for every element by itself, and a random number
    0 < U < 1 of its own (Chen et al. 2020, arXiv 2010.06808, algorithm 1, with f the identity):

        P = (1 + Σ_k v_k / Σ_k |v_k|) / 2
        g = Σ_k (leak + (1 - leak) · [v_k > 0 and P > U, or v_k < 0 and P < U]) · v_k
        m ← β m + (1-β) g        output = m / (1 - β^t)

    U is a function of seed, draws and the element's place in a row alone, to the same bits on every
    device and in every backend (SplitMix64). Where `finite` is False the outputs are set to zero
    and nothing else changes.

    Args:
        accumulators: [K, N'] float32 or bfloat16. Rows of scale 0 are not read.
        outputs: as for `combine`.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        scale: [K] float64; rounded to float32 before it multiplies.
        finite: [] bool.
        seed: of the random numbers; its lower 64 bits count.
        draws: [] int64, which draw this is; no host reads it.
        leak: the share of the other sign that is let through, in [0, 1].
        momentum: [N'] float32, m; None where β = 0.
        momentum_steps: [T] int64, t of each tensor, counted up; goes with `momentum`.
        beta: β in [0, 1).
        mask: [⌈N' / 32⌉] int32 as for `combine`, or None.
        first: the place of the rows' first element, where they are a part of longer ones.
        backend: see `choose_backend`.

    Raises:
        ValueError: a size, dtype or device does not fit; nothing has been written.
    """
    rest = (
        offsets, sizes, scale, finite, int(seed), draws, float(leak), momentum, momentum_steps,
        beta, mask, int(first), backend,
    )  # fmt: skip
    if _traced(accumulators):
        written = [t for t, output in enumerate(outputs) if output is not None]
        present = [output for output in outputs if output is not None]
        torch.ops.gcond_kernels.graddrop(accumulators, present, written, *rest)
    else:
        _graddrop(accumulators, outputs, *rest)


def _graddrop_listed(
    accumulators: Tensor, outputs: Sequence[Tensor], written: Sequence[int], *rest: Any
) -> None:
    """As `_graddrop`, for graphs."""
    _graddrop(accumulators, _in_places(outputs, written, len(rest[1])), *rest)


@operation
def _graddrop(
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    finite: Tensor,
    seed: int,
    draws: Tensor,
    leak: float,
    momentum: Tensor | None,
    momentum_steps: Tensor | None,
    beta: float,
    mask: Tensor | None,
    first: int,
    backend: str,
) -> None:
    device = accumulators.device
    check_combine(
        accumulators, outputs, offsets, sizes, scale, None, momentum, momentum_steps, beta, None,
        None, mask,
    )  # fmt: skip
    check_small("finite", finite, [], (torch.bool,), device)
    check_small("draws", draws, [], (torch.int64,), device)
    if not 0.0 <= leak <= 1.0:
        raise ValueError(f"leak must be in [0, 1], not {leak}")
    if first < 0:
        raise ValueError(f"first must be 0 or more, not {first}")
    backend_module(backend, device, "graddrop").graddrop(
        accumulators,
        scale,
        finite,
        outputs,
        offsets,
        sizes,
        momentum,
        momentum_steps,
        beta,
        mask,
        leak,
        seed,
        draws,
        first,
    )


@operation
def resolve(
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    scale: Tensor,
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    history: Tensor | None = None,
    momentum: Tensor | None = None,
    momentum_steps: Tensor | None = None,
    beta: float = 0.0,
    max_norm: float | None = None,
    parameter_norms: Tensor | None = None,
    trust_ratio_coef: float = 1e-4,
    trust_ratio_clip: float = 100.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Gramians, Arbitration]:
    """A whole resolution: `gramian`, `arbitrate` and `combine`, to the same bits as those.

    The CUDA backend does it in one launch where the accumulators fit in the GPU's L2 cache (and
    there are at most 8 tasks and 1,000 tensors); else the three are called in turn.

    Args:
        accumulators: [K, N'] float32 or bfloat16.
        outputs: as for `combine`.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        scale: [K] float64; where it is 0 the task takes no part.
        state: what `arbitrate` changes, by name: norm_ema, winners, history_gramian,
            history_rows, history_scale.
        settings: the settings of `arbitrate`, by name, from thresholds to eps.
        history: [K, N'], read, then set to the accumulators; None keeps none.
        momentum: [N'] float32, as for `combine`, like all that follow.
        momentum_steps: [T] int64.
        beta: β in [0, 1).
        max_norm: bound of the norm of all outputs together.
        parameter_norms: [T] float64; turns the sign update on.
        trust_ratio_coef: factor of the sign update.
        trust_ratio_clip: bound of the ratio of the sign update.
        mask: [⌈N' / 32⌉] int32, as for `gramian` and `combine`; or None.
        backend: see `choose_backend`.

    Raises:
        ValueError: as of the three; nothing has been written.
    """
    if _traced(accumulators):
        raise NotImplementedError(
            "resolve is not for graphs: call gramian, arbitrate and combine, which are"
        )
    device = accumulators.device
    check_gramian(
        accumulators, offsets, sizes, scale, history, state["history_scale"], momentum, mask
    )
    check_state([len(accumulators)] * 2, device, **state)
    check_settings(settings["thresholds"], settings["max_iterations"])
    check_combine(
        accumulators, outputs, offsets, sizes, scale, history, momentum, momentum_steps, beta,
        max_norm, parameter_norms, mask,
    )  # fmt: skip
    room = backend_module(backend, device, "resolve")
    at_once = hasattr(room, "resolve") and room.resolves_at_once(accumulators, sizes)
    run = room.resolve if at_once else functools.partial(_resolve_apart, backend)
    products, decision = run(
        accumulators,
        outputs,
        offsets,
        sizes,
        scale,
        history,
        momentum,
        momentum_steps,
        beta,
        max_norm,
        parameter_norms,
        trust_ratio_coef,
        trust_ratio_clip,
        state,
        settings,
        mask,
    )
    return _gramians(products, history), Arbitration(*decision)


def _resolve_apart(
    backend: str,
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    momentum_steps: Tensor | None,
    beta: float,
    max_norm: float | None,
    parameter_norms: Tensor | None,
    trust_ratio_coef: float,
    trust_ratio_clip: float,
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    mask: Tensor | None,
) -> Any:
    """The three operations in turn. All has been checked."""
    device = accumulators.device
    norms = max_norm is not None or parameter_norms is not None
    products = backend_module(backend, device, "gramian").gramian(
        accumulators,
        history,
        momentum if norms else None,
        offsets,
        sizes,
        scale,
        state["history_scale"],
        mask,
    )
    total, cross, per_tensor, _ = products
    decision = backend_module(backend, device, "arbitrate").arbitrate(
        total, None if history is None else cross, scale, **state, **settings
    )
    weights, _, _, finite = decision
    backend_module(backend, device, "combine").combine(
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
        mask,
    )
    return products, decision


@fixed_precision
def multi_tensor_norm(
    tensors: Sequence[Tensor], *, per_tensor: bool = False, backend: str = "auto"
) -> Tensor:
    """Euclidean norm of a list of tensors, [] float64, or of each of them, [T] float64.

    Args:
        tensors: T tensors of `GRADIENT_DTYPES` and any shape, on one device; T may be 0. Squares
            are formed in float32: numbers beyond 1e19 or below 1e-22 leave its range.
        per_tensor: one norm for each tensor instead of one for all.
        backend: see `choose_backend`.

    Raises:
        ValueError: a tensor is not floating or lies on another device.
    """
    total, each = _multi_tensor_dot([tensors], backend)
    return (each if per_tensor else total)[..., 0, 0].sqrt()


@fixed_precision
def multi_tensor_cosine_similarity(
    a: Sequence[Tensor], b: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Cosine of the angle between two lists of tensors, each taken as one long vector.

    Args:
        a: T tensors of `GRADIENT_DTYPES`, on one device.
        b: T tensors; `b[t]` has as many elements as `a[t]`, in the same logical order.
        backend: see `choose_backend`.

    Returns:
        [] float64; 0 where either vector is zero.

    Raises:
        ValueError: the lists do not match.
    """
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        raise ValueError("the two lists must hold tensors of the same shapes in the same order")
    products, _ = _multi_tensor_dot([a, b], backend)
    norms = products[0, 0].sqrt() * products[1, 1].sqrt()
    return torch.where(norms > 0.0, products[0, 1] / norms, 0.0)


def _multi_tensor_dot(lists: Sequence[Sequence[Tensor]], backend: str) -> tuple[Tensor, Tensor]:
    """Gramian [L, L], and Gramian per tensor [T, L, L], of L lists of T tensors."""
    ordered = [list(in_one_order(tensors)) for tensors in zip(*lists, strict=True)]
    device = ordered[0][0].device if ordered else torch.device("cpu")
    same = [[tensors[i] for tensors in ordered] for i in range(len(lists))]
    for tensors in same:
        check_dense("tensors", tensors, [tensor.numel() for tensor in tensors], device)
    products: tuple[Tensor, Tensor] = backend_module(backend, device, "gramian").multi_tensor_dot(
        same
    )
    return products


def in_one_order(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of one shape without gaps and in the same memory order; copies only if needed."""
    first = tensors[0]
    if is_dense(first) and all(tensor.stride() == first.stride() for tensor in tensors):
        return [tensor.detach() for tensor in tensors]
    return [tensor.detach().contiguous() for tensor in tensors]


def _define() -> None:
    """Registers the operations: schemas, implementations, and what they return unevaluated."""
    library = torch.library.Library("gcond_kernels", "DEF")
    library.define(
        "accumulate(Tensor(a!) accumulator, Tensor?[] gradients, int[] offsets, int[] sizes, "
        "float scale, Tensor? scale_tensor, bool overwrite, str backend) -> ()"
    )
    library.define(
        "gramian(Tensor accumulators, int[] offsets, int[] sizes, Tensor scale, Tensor? history, "
        "Tensor? history_scale, Tensor? momentum, Tensor? mask, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "arbitrate(Tensor gramian, Tensor? cross, Tensor scale, Tensor(a!) norm_ema, "
        "Tensor(b!) winners, Tensor(c!) history_gramian, Tensor(d!) history_rows, "
        "Tensor(e!) history_scale, float[] thresholds, float remap_power, bool smooth, "
        "int max_iterations, float tolerance, float stability_weight, float strength_weight, "
        "float norm_ema_beta, float norm_ema_floor, float? norm_cap, bool resolved_history, "
        "float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "combine(Tensor accumulators, Tensor(a!)[] outputs, int[] written, int[] offsets, "
        "int[] sizes, Tensor weights, Tensor scale, Tensor finite, Tensor per_tensor, "
        "Tensor(b!)? history, Tensor(c!)? momentum, Tensor(d!)? momentum_steps, float beta, "
        "float? max_norm, Tensor? parameter_norms, float trust_ratio_coef, float trust_ratio_clip, "
        "Tensor? mask, str backend) -> ()"
    )
    library.define(
        "graddrop(Tensor accumulators, Tensor(a!)[] outputs, int[] written, int[] offsets, "
        "int[] sizes, Tensor scale, Tensor finite, int seed, Tensor draws, float leak, "
        "Tensor(b!)? momentum, Tensor(c!)? momentum_steps, float beta, Tensor? mask, int first, "
        "str backend) -> ()"
    )
    for name, function, fake in (
        ("accumulate", _accumulate, _nothing),
        ("gramian", _gramian, _fake_gramian),
        ("arbitrate", _arbitrate, _fake_arbitrate),
        ("combine", _combine_listed, _nothing),
        ("graddrop", _graddrop_listed, _nothing),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gcond_kernels::{name}", fake, lib=library)
    _libraries.append(library)  # what it holds is unregistered when it goes


def _nothing(*args: object) -> None:
    """For operations that only change what they are given."""


def _fake_gramian(
    accumulators: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    history: Tensor | None,
    history_scale: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K, R = len(accumulators), len(accumulators) + (momentum is not None)
    crosses = 0 if history is None else K
    return (
        scale.new_empty((K, K)),
        scale.new_empty((crosses, crosses)),
        scale.new_empty((len(sizes), R, R)),
        scale.new_empty((len(sizes), crosses, crosses)),
    )


def _fake_arbitrate(gramian: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (*batch, K, _), max_iterations = gramian.shape, others[10]
    return (
        gramian.new_empty((*batch, K)),
        gramian.new_empty((*batch, K, K)),
        gramian.new_empty((*batch, max_iterations, 5)),
        gramian.new_empty(tuple(batch), dtype=torch.bool),
    )


_libraries: list[torch.library.Library] = []
_define()
