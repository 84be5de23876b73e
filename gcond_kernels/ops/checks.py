"""Checks of the operations' arguments. Each raises a ValueError before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS, ArbitrationState, Layout, Momentum, TaskGradients

ACCUMULATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HISTORY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT64 = (torch.float64,)


def check_gradients(gradients: TaskGradients) -> None:
    """Check accumulators, history, scale and mask."""
    accumulators, layout, scale, history, mask = gradients
    shape, device = accumulators.shape, accumulators.device
    check_flat("accumulators", accumulators, layout, ACCUMULATOR_DTYPES, device, rank=2)
    check_tensor("scale", scale, shape[:1], FLOAT64, device)
    if history is not None:
        check_tensor("history", history, shape, HISTORY_DTYPES, device)
    if mask is not None:
        check_tensor("mask", mask, [-(-shape[1] // WORD_BITS)], (torch.int32,), device)


def check_momentum(buffer: Tensor, gradients: TaskGradients) -> None:
    """Check a momentum buffer."""
    accumulators = gradients.accumulators
    wanted = (momentum_dtype(accumulators.dtype),)
    check_flat("momentum", buffer, gradients.layout, wanted, accumulators.device)


def momentum_dtype(accumulators: torch.dtype) -> torch.dtype:
    """Return the type of the momentum buffer, which is that of sums of accumulators."""
    return torch.promote_types(accumulators, torch.float32)


def check_written(
    gradients: TaskGradients, outputs: Sequence[Tensor | None], momentum: Momentum | None
) -> None:
    """Check the gradients, and what is written."""
    check_gradients(gradients)
    sizes, device = gradients.layout.sizes, gradients.accumulators.device
    check_dense("outputs", outputs, sizes, device)
    if momentum is not None:
        check_momentum(momentum.buffer, gradients)
        check_tensor("momentum.steps", momentum.steps, [len(sizes)], (torch.int64,), device)
        if not 0.0 < momentum.beta < 1.0:
            raise ValueError(f"momentum.beta must be in (0, 1), not {momentum.beta}")


def check_max_norm(max_norm: float | None) -> None:
    """Check a bound of the norm."""
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}")


def check_state(state: ArbitrationState, shape: Sequence[int], device: torch.device) -> None:
    """Check the state of arbitration for Gramians of a shape, [K, K] or [B, K, K]."""
    window = state.winners.shape[-1] if state.winners.dim() else 0
    check_tensor("norm_ema", state.norm_ema, shape[:-1], FLOAT64, device)
    check_tensor("winners", state.winners, [*shape[:-2], window], (torch.int64,), device)
    check_tensor("history_gramian", state.history_gramian, shape, FLOAT64, device)
    check_tensor("history_coefficients", state.history_coefficients, shape, FLOAT64, device)
    check_tensor("history_scale", state.history_scale, shape[-1:], FLOAT64, device)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Check shape, dtype, contiguity and device of a tensor."""
    fits = tensor.shape == tuple(shape) and tensor.dtype in dtypes
    if not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {list(shape)} {_names(dtypes)}, contiguous, not {list(tensor.shape)} "
            f"{_names([tensor.dtype])} of stride {tensor.stride()}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")


def check_flat(
    name: str,
    tensor: Tensor,
    layout: Layout,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    rank: int = 1,
) -> None:
    """Check flat storage of a layout: of rank 1 [N'], of rank 2 [K, N']."""
    if tensor.dim() != rank or 0 in tensor.shape[:-1]:
        wanted = "[N']" if rank == 1 else "[K, N'] of at least one task"
        raise ValueError(f"{name} must be {wanted}, not {list(tensor.shape)}")
    check_tensor(name, tensor, tensor.shape, dtypes, device)
    length, end = tensor.shape[-1], _end_of(layout)
    if end > length:
        raise ValueError(f"{name} has {length} elements, but the segments end at {end}")


def check_dense(
    name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device
) -> None:
    """Check gradients or outputs: one for each segment, of its size, without gaps in memory."""
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
        if tensor is not None:
            _check_one_dense(f"{name}[{t}]", tensor, size, device)


def _check_one_dense(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    if tensor.dtype not in GRADIENT_DTYPES:
        raise ValueError(f"{name} must be {_names(GRADIENT_DTYPES)}, not {_names([tensor.dtype])}")
    if tensor.numel() != size or not is_dense(tensor):
        raise ValueError(
            f"{name} must have {size} elements without gaps in memory, not shape "
            f"{list(tensor.shape)} and stride {tensor.stride()}"
        )
    if tensor.is_neg():
        raise ValueError(f"{name} is a negated view: resolve_neg() gives it memory")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps or overlap, in any order."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


@functools.lru_cache(maxsize=256)
def _end_of(layout: Layout) -> int:
    """Return where the last segment ends."""
    offsets, sizes = layout
    if len(offsets) != len(sizes):
        raise ValueError(f"{len(offsets)} offsets do not go with {len(sizes)} sizes")
    if min(offsets, default=0) < 0 or min(sizes, default=0) < 0:
        raise ValueError("offsets and sizes must not be negative")
    return max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
