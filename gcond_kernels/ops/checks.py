"""What the operations ask of their arguments. Every error is raised before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS

ACCUMULATOR_DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HISTORY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT64 = (torch.float64,)


def check_gramian(
    accumulators: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    history: Tensor | None,
    history_scale: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Of `gramian`."""
    device = accumulators.device
    check_mask(mask, accumulators)
    check_rows("accumulators", accumulators, accumulators, offsets, sizes)
    check_small("scale", scale, [len(accumulators)], FLOAT64, device)
    if momentum is not None:
        check_row("momentum", momentum, offsets, sizes, (torch.float32,))
        check_device("momentum", momentum, device)
    if history is not None:
        check_rows("history", history, accumulators, offsets, sizes, HISTORY_DTYPES)
        if history_scale is None:
            raise ValueError("history needs its history_scale [K]")
        check_small("history_scale", history_scale, [len(accumulators)], FLOAT64, device)


def check_mask(mask: Tensor | None, accumulators: Tensor) -> None:
    """Of a mask: a bit for every element of a row."""
    if mask is not None:
        words = -(-accumulators.shape[1] // WORD_BITS)
        check_small("mask", mask, [words], (torch.int32,), accumulators.device)


def check_state(
    shape: Sequence[int],
    device: torch.device,
    norm_ema: Tensor,
    winners: Tensor,
    history_gramian: Tensor,
    history_rows: Tensor,
    history_scale: Tensor,
) -> None:
    """Of the state that `arbitrate` changes, of Gramians of this shape: [K, K] or [B, K, K]."""
    for name, matrix in (("history_gramian", history_gramian), ("history_rows", history_rows)):
        check_small(name, matrix, shape, FLOAT64, device)
    check_small("norm_ema", norm_ema, shape[:-1], FLOAT64, device)
    check_small("history_scale", history_scale, shape[-1:], FLOAT64, device)
    window = winners.shape[-1] if winners.dim() else 0
    check_small("winners", winners, [*shape[:-2], window], (torch.int64,), device)


def check_settings(thresholds: Sequence[float], max_iterations: int) -> None:
    """Of the settings of `arbitrate`."""
    if len(thresholds) != 3:
        raise ValueError(f"thresholds must be three cosines, not {thresholds}")
    if max_iterations < 0:
        raise ValueError(f"max_iterations must be 0 or more, not {max_iterations}")


def check_combine(
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
    mask: Tensor | None,
) -> None:
    """Of `combine` and `graddrop`, but for what the resolution came to."""
    K, T, device = len(accumulators), len(sizes), accumulators.device
    check_rows("accumulators", accumulators, accumulators, offsets, sizes)
    check_mask(mask, accumulators)
    check_dense("outputs", outputs, sizes, device)
    check_small("scale", scale, [K], FLOAT64, device)
    if (momentum is None) != (beta == 0.0) or (momentum is None) != (momentum_steps is None):
        raise ValueError("momentum, momentum_steps and beta > 0 go together")
    if momentum is not None and momentum_steps is not None:
        check_row("momentum", momentum, offsets, sizes, (torch.float32,))
        check_device("momentum", momentum, device)
        check_small("momentum_steps", momentum_steps, [T], (torch.int64,), device)
    if max_norm is not None and parameter_norms is not None:
        raise ValueError("max_norm does not go with the sign update: its size is the trust ratio")
    if parameter_norms is not None:
        check_small("parameter_norms", parameter_norms, [T], FLOAT64, device)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be in [0, 1), not {beta}")
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}")
    if history is not None:
        check_rows("history", history, accumulators, offsets, sizes, HISTORY_DTYPES)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


@functools.lru_cache(maxsize=256)
def _end_of(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """Where the last segment ends."""
    if len(offsets) != len(sizes):
        raise ValueError(f"{len(offsets)} offsets do not go with {len(sizes)} sizes")
    if min(offsets, default=0) < 0 or min(sizes, default=0) < 0:
        raise ValueError("offsets and sizes must not be negative")
    return max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)


def check_row(
    name: str,
    row: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype] = ACCUMULATOR_DTYPES,
) -> None:
    """Of one row of flat storage, [N']."""
    if row.dim() != 1 or not row.is_contiguous() or row.dtype not in dtypes:
        raise ValueError(
            f"{name} must hold contiguous rows of {' or '.join(map(str, dtypes))}, "
            f"not {row.dtype} of shape {list(row.shape)} and stride {row.stride()}"
        )
    end = _end_of(tuple(offsets), tuple(sizes))
    if end > row.numel():
        raise ValueError(f"{name} has {row.numel()} elements, but the segments end at {end}")


def check_rows(
    name: str,
    matrix: Tensor,
    accumulators: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype] = ACCUMULATOR_DTYPES,
) -> None:
    """Of the rows of flat storage, [K, N']."""
    if matrix.dim() != 2 or matrix.shape != accumulators.shape:
        raise ValueError(f"{name} must be [K, N'] like the accumulators, not {list(matrix.shape)}")
    if len(matrix) == 0:
        raise ValueError(f"{name} must have a row for at least one task")
    if not matrix.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of stride {matrix.stride()}")
    check_device(name, matrix, accumulators.device)
    check_row(name, matrix[0], offsets, sizes, dtypes)


def check_dense(
    name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device
) -> None:
    """Of gradients or outputs."""
    if len(tensors) != len(sizes):
        raise ValueError(f"{len(tensors)} {name} do not go with {len(sizes)} sizes")
    # Hundreds of tensors for every micro-batch: all at once where nothing is wrong.
    present = [tensor for tensor in tensors if tensor is not None]
    wanted = [size for tensor, size in zip(tensors, sizes, strict=True) if tensor is not None]
    if (
        list(map(Tensor.numel, present)) == wanted
        and all(map(Tensor.is_contiguous, present))
        and not any(map(Tensor.is_neg, present))
        and set(map(attrgetter("dtype"), present)) <= set(GRADIENT_DTYPES)
        and set(map(attrgetter("device"), present)) <= {device}
    ):
        return
    for t, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if tensor is None:
            continue
        if tensor.dtype not in GRADIENT_DTYPES:
            raise ValueError(
                f"{name}[{t}] must be of {', '.join(map(str, GRADIENT_DTYPES))}, not {tensor.dtype}"
            )
        if tensor.numel() != size or not is_dense(tensor):
            raise ValueError(
                f"{name}[{t}] must have {size} elements without gaps in memory, not shape "
                f"{list(tensor.shape)} and stride {tensor.stride()}"
            )
        if tensor.is_neg():
            raise ValueError(f"{name}[{t}] is a negated view: resolve_neg() gives it memory")
        check_device(f"{name}[{t}]", tensor, device)


def check_small(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Of tensors of K×K numbers and the like."""
    if list(tensor.shape) != list(shape) or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} must be {list(shape)} {' or '.join(str(d)[6:] for d in dtypes)}, "
            f"not {list(tensor.shape)} {str(tensor.dtype)[6:]}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of stride {tensor.stride()}")
    check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """That a tensor is where the others are."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")
