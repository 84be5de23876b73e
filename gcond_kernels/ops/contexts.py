"""What computes the same whatever context the caller is in: autocast, inference mode, gradients.

A default dtype or device is not undone here, for it belongs to the whole process: whoever makes a
tensor in this package says of which type it is and where it lies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class _Fixed:
    """Leaves what the caller has entered, and comes back to it; each is entered once."""

    __slots__ = ("_autocast", "_inference", "_leaves_inference", "_no_grad")

    def __init__(self, leaves_inference: bool = True) -> None:
        self._leaves_inference = leaves_inference
        self._inference: torch.inference_mode | None = None
        self._no_grad: torch.no_grad | None = None

    def __enter__(self) -> None:
        if self._leaves_inference and torch.is_inference_mode_enabled():
            self._inference = torch.inference_mode(False)
            self._inference.__enter__()
        if torch.is_grad_enabled():  # asked now, for leaving inference mode turns gradients on
            self._no_grad = torch.no_grad()
            self._no_grad.__enter__()
        self._autocast = [kind for kind in _device_types() if torch.is_autocast_enabled(kind)]
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, False)

    def __exit__(self, *error: object) -> None:
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, True)
        if self._no_grad is not None:
            self._no_grad.__exit__(None, None, None)
        if self._inference is not None:
            self._inference.__exit__(None, None, None)


@functools.cache
def _device_types() -> tuple[str, ...]:
    """The types of devices that autocast may be on for: each has a switch of its own."""
    accelerator = torch.accelerator.current_accelerator()
    return tuple(dict.fromkeys(["cpu", "cuda", *([accelerator.type] if accelerator else [])]))


@overload
def fixed_precision(function: F) -> F: ...
@overload
def fixed_precision() -> AbstractContextManager[None]: ...


def fixed_precision(function: F | None = None) -> F | AbstractContextManager[None]:
    """Compute outside of autocast, inference mode and the recording of gradients.

    A decorator, `@fixed_precision`, and a context manager, `with fixed_precision():`. One may lie
    within another. What is made within is no inference tensor, so that it can be kept and changed.
    While torch.compile traces, the context manager changes nothing, and the decorator leaves no
    inference mode.
    """
    if function is not None:
        return _wrapped(function, leaves_inference=True)
    return nullcontext() if torch.compiler.is_compiling() else _Fixed()


def operation(function: F) -> F:
    """Make an operation that writes to the caller's memory compute the same in every context.

    As `fixed_precision`, but it stays in inference mode: what was made there can be changed there
    alone. What it returns, tensors or tuples of them, is no inference tensor even so.
    """
    return _wrapped(function, leaves_inference=False)


def _wrapped(function: F, leaves_inference: bool) -> F:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _traced(function, args, kwargs)
        with _Fixed(leaves_inference):
            result = function(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with _Fixed():
                return _normal(result)
        return result

    return run  # type: ignore[return-value]


def _traced(function: F, args: Any, kwargs: Any) -> Any:
    """Call a function that torch.compile traces: it knows these contexts, and not `_Fixed`."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        with torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)


def _normal(result: Any) -> Any:
    """What an operation returned, without inference tensors."""
    if isinstance(result, Tensor):
        return result.clone() if result.is_inference() else result
    if isinstance(result, tuple):
        parts = [_normal(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result


@contextmanager
def users_code(device: torch.device) -> Iterator[None]:
    """Run code of the user's within `fixed_precision`: it may compute gradients of its own.

    A default device where there are none of its tensors is none that it was written for. The
    default dtype stays: it is the user's to set, and of the whole process.

    Args:
        device: of the tensors that the code is given.
    """
    elsewhere = torch.get_default_device().type not in ("cpu", device.type)
    with torch.enable_grad(), full_float32(), torch.device("cpu") if elsewhere else nullcontext():
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep matrix products out of TF32 and bfloat16, which the user may have allowed for his own.

    There are an older and a newer interface, and torch refuses to go on where they disagree: both
    are set, and set back.
    """
    units = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [unit.fp32_precision for unit in units]
    if not set(before) & {"tf32", "bf16"}:
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # only the newer interface was used: the older knows of no change
        legacy = None
    for unit in units:
        unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = "none"  # it follows what is set for all backends, if that is so
            if unit.fp32_precision != precision:
                unit.fp32_precision = precision
