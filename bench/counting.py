"""Counts of a call, which is not timed: bytes, launches, reads by the host, allocations.

Counts are the same on every machine and from run to run: where one of them changed, so did the
code, or torch.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], object]

# Methods that give the host a tensor's value; on the CPU some of them pass no dispatcher.
READS = {
    *("item", "tolist", "numpy", "is_nonzero", "__array__", "__bool__", "__int__", "__float__"),
    *("__complex__", "__index__"),
}
# Of these the shape of the result, or the result, is known to the host when the device has it.
WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# The host reads whether they went well; no tag says so.
WAITING = {
    *("aten::_linalg_check_errors", "aten::_linalg_eigh", "aten::_linalg_svd"),
    *("aten::linalg_eig", "aten::linalg_lstsq"),
}
# They change a tensor without reading what it held.
OVERWRITING = {
    *("aten::copy_", "aten::zero_", "aten::fill_", "aten::_foreach_copy_", "aten::_foreach_zero_"),
    *("aten::normal_", "aten::uniform_", "aten::random_", "aten::bernoulli_"),
}
# They reserve memory and write none of it.
RESERVING = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided"),
    *("aten::new_empty", "aten::new_empty_strided"),
}
# Launches that a call of the CUDA extension makes on a GPU, as csrc/cuda/*.cu have them.
LAUNCHES_OF_CALLS = {
    "accumulate": 1,
    "gramian": 2,
    "arbitrate": 1,
    "find_factors": 1,
    "find_clip_factor": 1,
    "combine": 1,
    "resolve": 1,
}
# Calls of the CPU extension count as one launch each.
CALLS_ON_THE_CPU = dict.fromkeys(("accumulate", "gramian", "arbitrate", "combine", "resolve"), 1)


class Counts(NamedTuple):
    """What `count` counted.

    Attributes:
        launches: of Triton's kernels and of those in CUDA C++, and operations of torch that move
            bytes, one each whatever they launch.
        bytes_moved: of torch's operations all that they take, change and make, in full, as if
            nothing stayed in a cache; of Triton's interpreted kernels what they load and store.
            None where a compiled kernel ran.
        synchronisations: reads of a tensor's value by the host; of CPU tensors only where there
            are no others.
        allocations: storages that operations of torch made, but for those within an operation.
        allocated_bytes: their sizes, summed up.
    """

    launches: int
    bytes_moved: int | None
    synchronisations: int
    allocations: int
    allocated_bytes: int


def count(run: Run) -> Counts:
    """Call `run` once and count what it does, with what a first call alone does."""
    tally = _Tally()
    with ExitStack() as hooks:
        for hook in (_triton_launches, _Operations, _Reads):
            hooks.enter_context(hook(tally))
        for module, launches in (("_cuda", LAUNCHES_OF_CALLS), ("_cpu", CALLS_ON_THE_CPU)):
            hooks.enter_context(_extension_calls(tally, module, launches))
        run()
    return tally.counts()


class _Tally:
    """The counts so far; while it is paused no operation is added."""

    def __init__(self) -> None:
        self.launches = self.bytes_moved = self.allocations = self.allocated_bytes = 0
        self.waits: Counter[str] = Counter()  # by type of device
        self.bytes_known = True
        self.on_accelerator = False
        self.paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def counts(self) -> Counts:
        on_host = self.waits.pop("cpu", 0)
        return Counts(
            self.launches,
            self.bytes_moved if self.bytes_known else None,
            self.waits.total() if self.on_accelerator else on_host,
            self.allocations,
            self.allocated_bytes,
        )


class _Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.tally.paused:
            self.add(function, args, kwargs, result)
        return result

    def add(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Add one operation."""
        tally, name = self.tally, function._schema.name
        read, written = _arguments(function, args, kwargs)
        known = {_storage(tensor) for tensor in read + written}
        made = [tensor for tensor in _tensors(result) if _storage(tensor) not in known]
        for storage in {_storage(tensor): tensor.untyped_storage() for tensor in made}.values():
            tally.allocations += storage.nbytes() > 0
            tally.allocated_bytes += storage.nbytes()
        written += made
        places = [tensor.device.type for tensor in read + written]
        tally.on_accelerator |= any(place not in ("cpu", "meta") for place in places)
        if _waits(function, args, read, written):
            tally.waits[next((place for place in places if place != "cpu"), "cpu")] += 1
        moves = written and name not in RESERVING and torch.Tag.inplace_view not in function.tags
        bytes_moved = sum(map(_extent, read + written)) if moves else 0
        tally.launches += bytes_moved > 0
        tally.bytes_moved += bytes_moved


class _Reads(TorchFunctionMode):
    """Counts reads of a value by the host, with all that they do inside."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_read = getattr(function, "__name__", "") in READS and isinstance(args[0], Tensor)
        if not is_read or self.tally.paused:
            return function(*args, **kwargs)
        place = args[0].device.type
        self.tally.waits[place] += 1
        self.tally.on_accelerator |= place != "cpu"
        with self.tally.pause():
            return function(*args, **kwargs)


def _arguments(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operation reads, and those that it changes."""
    name = function._schema.name
    shape_alone = name.endswith("_like") or name.startswith("aten::new_")
    read: list[Tensor] = []
    written: list[Tensor] = []
    for place, argument in enumerate(function._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = _tensors(given)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += tensors
        overwritten = changed and (argument.is_out or name in OVERWRITING)
        if not overwritten and not shape_alone:
            read += tensors
    return read, written


def _waits(function: Any, args: Sequence[Any], read: list[Tensor], written: list[Tensor]) -> bool:
    """Return whether the host must know what the device has computed before it goes on."""
    if any(tensor.device.type != "cpu" for tensor in read) and any(
        tensor.device.type == "cpu" for tensor in written
    ):
        return True  # a copy to the host
    name = function._schema.name
    if name == "aten::index":  # by numbers the shape is known, by a mask it is not
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))
    return name in WAITING or not WAITING_TAGS.isdisjoint(function.tags)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _extent(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory; what is expanded is there once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


@contextmanager
def _triton_launches(tally: _Tally) -> Iterator[None]:
    """Count launches of Triton's kernels, and bytes of those that run interpreted."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter, jit

    compiled, interpreted = jit.JITFunction.run, interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        tally.launches += not warmup
        tally.bytes_known = False
        with tally.pause():
            return compiled(self, *args, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tally.launches += 1
        tally.bytes_known &= interpreter_problem() is None
        with tally.pause():
            return interpreted(self, *args, **kwargs)

    with ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        replaced.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", call))
        if interpreter_problem() is None:
            replaced.enter_context(_accesses(interpreter.InterpreterBuilder, tally))
        yield


# What every load and every store of Triton's interpreter goes through, with what we read of it.
ACCESSES = {
    "create_masked_load": ["self", "ptrs", "mask"],
    "create_masked_store": ["self", "ptrs", "value", "mask"],
}


@functools.cache
def interpreter_problem() -> str | None:
    """Return why bytes cannot be counted in this Triton's interpreter; None where they can."""
    import triton
    from triton.runtime import interpreter

    for name, expected in ACCESSES.items():
        method = getattr(interpreter.InterpreterBuilder, name, None)
        names = [] if method is None else list(inspect.signature(method).parameters)
        if names[: len(expected)] != expected:
            return (
                f"bytes of Triton's kernels are not counted: the interpreter of Triton "
                f"{triton.__version__} has no {name}({', '.join(expected)}, ...)"
            )
    return None


@contextmanager
def _accesses(builder: Any, tally: _Tally) -> Iterator[None]:
    """Count the bytes that interpreted kernels load and store."""
    load, store = (getattr(builder, name) for name in ACCESSES)

    def add(pointers: Any, mask: Any) -> None:
        inside = np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))
        bits = pointers.get_element_ty().primitive_bitwidth
        tally.bytes_moved += int(inside) * -(-bits // 8)

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        add(ptrs, mask)
        return load(self, ptrs, mask, *rest, **named)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        add(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **named)

    counted = dict(zip(ACCESSES, (counted_load, counted_store), strict=True))
    with mock.patch.multiple(builder, **counted):
        yield


@contextmanager
def _extension_calls(tally: _Tally, name: str, launches_of: dict[str, int]) -> Iterator[None]:
    """Count calls of an extension module, as the launches that each makes."""
    try:
        module = importlib.import_module(f"gcond_kernels.{name}")
    except ImportError:  # not built
        yield
        return

    def counted(function: Callable[..., Any], launches: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            tally.launches += launches
            tally.bytes_known = False
            return function(*args)

        return call

    calls = {call: counted(getattr(module, call), n) for call, n in launches_of.items()}
    with mock.patch.multiple(module, **calls):
        yield
