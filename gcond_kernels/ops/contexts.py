"""Functions that compute the same in every context of the caller: autocast, inference, gradients.

A default dtype or device is not undone here, for it belongs to the process: code that makes a
tensor in this package names its dtype and device.
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
    """Leaves the contexts that the caller has entered, and restores them; it is entered once."""

    __slots__ = ("_autocast", "_inference", "_leaves_inference", "_records")

    def __init__(self, leaves_inference: bool = True) -> None:
        self._leaves_inference = leaves_inference
        self._inference: torch.inference_mode | None = None

    def __enter__(self) -> None:
        if self._leaves_inference and torch.is_inference_mode_enabled():
            self._inference = torch.inference_mode(False)
            self._inference.__enter__()
        self._records = torch.is_grad_enabled()  # leaving inference mode turns gradients on
        if self._records:
            torch.set_grad_enabled(False)
        self._autocast = [kind for kind in _device_types() if torch.is_autocast_enabled(kind)]
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, False)

    def __exit__(self, *error: object) -> None:
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, True)
        if self._records:
            torch.set_grad_enabled(True)
        if self._inference is not None:
            self._inference.__exit__(None, None, None)


@functools.cache
def _device_types() -> tuple[str, ...]:
    """Return the types of devices that have a switch for autocast."""
    accelerator = torch.accelerator.current_accelerator()
    return tuple(dict.fromkeys(["cpu", "cuda", *([accelerator.type] if accelerator else [])]))


@overload
def fixed_precision(function: F) -> F: ...
@overload
def fixed_precision() -> AbstractContextManager[None]: ...


def fixed_precision(function: F | None = None) -> F | AbstractContextManager[None]:
    """Compute outside of autocast, inference mode and the recording of gradients.

    A decorator, `@fixed_precision`, and a context manager, `with fixed_precision():`, which may be
    nested. Tensors made within can be kept and changed: they are no inference tensors. While
    torch.compile traces, the manager changes nothing and the decorator stays in inference mode.
    """
    if function is not None:
        return _wrapped(function, leaves_inference=True)
    return nullcontext() if torch.compiler.is_compiling() else _Fixed()


def operation(function: F) -> F:
    """Return an operation that computes outside of autocast and the recording of gradients.

    It stays in inference mode, for an inference tensor of the caller's can be changed there alone,
    but the tensors that it returns are not inference tensors.
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
    """Call a function while torch.compile traces, which knows these contexts and not `_Fixed`."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        with torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)


def _normal(result: Any) -> Any:
    """Return the results of an operation without inference tensors."""
    if isinstance(result, Tensor):
        return result.clone() if result.is_inference() else result
    if isinstance(result, tuple):
        parts = [_normal(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result


@contextmanager
def users_code(device: torch.device) -> Iterator[None]:
    """Run the user's code within `fixed_precision`, on tensors of a device; it may use autograd.

    A default device on which none of its tensors are is not used. The default dtype stays.
    """
    elsewhere = torch.get_default_device().type not in ("cpu", device.type)
    with torch.enable_grad(), full_float32(), torch.device("cpu") if elsewhere else nullcontext():
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products in float32 where the user has allowed TF32 or bfloat16.

    Torch has an older and a newer interface for that and raises an error where they differ, so both
    are set and restored.
    """
    units = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [unit.fp32_precision for unit in units]
    if not set(before) & {"tf32", "bf16"}:
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # only the newer interface was used
        legacy = None
    for unit in units:
        unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = "none"  # it follows the setting for all backends
            if unit.fp32_precision != precision:
                unit.fp32_precision = precision
