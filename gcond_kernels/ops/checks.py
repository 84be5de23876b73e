"""Checks of the operations' arguments. Each raises a ValueError before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS, ArbitrationState, Layout, Momentum, TaskGradients

ACCUMULATOR_DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HISTORY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT64 = (torch.float64,)


def check_gradients(gradients: TaskGradients) -> None:
    """Check accumulators, history, scale and mask."""
    accumulators, layout, scale, history, mask = gradients
    if accumulators.dim() != 2 or len(accumulators) == 0:
        raise ValueError(
            f"accumulators must be [K, N'] of at least one task, not {list(accumulators.shape)}"
        )
    device = accumulators.device
    check_flat("accumulators", accumulators, layout, device)
    check_small("scale", scale, [len(accumulators)], FLOAT64, device)
    if history is not None:
        if history.shape != accumulators.shape:
            raise ValueError(
                f"history must be {list(accumulators.shape)} like the accumulators, not "
                f"{list(history.shape)}"
            )
        check_flat("history", history, layout, device, HISTORY_DTYPES)
    if mask is not None:
        words = -(-accumulators.shape[1] // WORD_BITS)
        check_small("mask", mask, [words], (torch.int32,), device)


def check_momentum(momentum: Tensor, gradients: TaskGradients) -> None:
    """Check a momentum buffer."""
    if momentum.dim() != 1:
        raise ValueError(f"momentum must be [N'], not {list(momentum.shape)}")
    device = gradients.accumulators.device
    check_flat("momentum", momentum, gradients.layout, device, (torch.float32,))


def check_written(
    gradients: TaskGradients, outputs: Sequence[Tensor | None], momentum: Momentum | None
) -> None:
    """Check the gradients, and what is written."""
    check_gradients(gradients)
    sizes, device = gradients.layout.sizes, gradients.accumulators.device
    check_dense("outputs", outputs, sizes, device)
    if momentum is not None:
        check_momentum(momentum.buffer, gradients)
        check_small("momentum.steps", momentum.steps, [len(sizes)], (torch.int64,), device)
        if not 0.0 < momentum.beta < 1.0:
            raise ValueError(f"momentum.beta must be in (0, 1), not {momentum.beta}")


def check_max_norm(max_norm: float | None) -> None:
    """Check a bound of the norm."""
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}")


def check_state(state: ArbitrationState, shape: Sequence[int], device: torch.device) -> None:
    """Check the state of arbitration for Gramians of a shape, [K, K] or [B, K, K]."""
    window = state.winners.shape[-1] if state.winners.dim() else 0
    check_small("norm_ema", state.norm_ema, shape[:-1], FLOAT64, device)
    check_small("winners", state.winners, [*shape[:-2], window], (torch.int64,), device)
    check_small("history_gramian", state.history_gramian, shape, FLOAT64, device)
    check_small("history_coefficients", state.history_coefficients, shape, FLOAT64, device)
    check_small("history_scale", state.history_scale, shape[-1:], FLOAT64, device)


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


def check_flat(
    name: str,
    tensor: Tensor,
    layout: Layout,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = ACCUMULATOR_DTYPES,
) -> None:
    """Check flat storage, [N'] or [K, N']."""
    if not tensor.is_contiguous() or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} must be contiguous, of {' or '.join(map(str, dtypes))}, not {tensor.dtype} "
            f"of shape {list(tensor.shape)} and stride {tensor.stride()}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")
    end = _end_of(layout)
    if end > tensor.shape[-1]:
        raise ValueError(f"{name} has {tensor.shape[-1]} elements, but the segments end at {end}")


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
            _check_dense(f"{name}[{t}]", tensor, size, device)


def _check_dense(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    if tensor.dtype not in GRADIENT_DTYPES:
        raise ValueError(
            f"{name} must be of {', '.join(map(str, GRADIENT_DTYPES))}, not {tensor.dtype}"
        )
    if tensor.numel() != size or not is_dense(tensor):
        raise ValueError(
            f"{name} must have {size} elements without gaps in memory, not shape "
            f"{list(tensor.shape)} and stride {tensor.stride()}"
        )
    if tensor.is_neg():
        raise ValueError(f"{name} is a negated view: resolve_neg() gives it memory")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")


def check_small(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Check a tensor of a known shape: K×K numbers and the like."""
    if list(tensor.shape) != list(shape) or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} must be {list(shape)} {' or '.join(str(d)[6:] for d in dtypes)}, "
            f"not {list(tensor.shape)} {str(tensor.dtype)[6:]}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of stride {tensor.stride()}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")
