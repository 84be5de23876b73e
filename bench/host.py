"""The time that operations cost the host before their launches, and the calls of a step.

300 tensors, two tasks, tables known. Needs no GPU, for launches are left out: Triton's are replaced
by calls that do nothing, and the CUDA backend is given tables without chunks, of which its driver
on the host only makes the sums in gramian ("sums on the host", timed apart: no launch costs them).
Beside them stands one call of `data_ptr` for each of the 300 tensors, the least that any table of
addresses costs in Python. The calls are those of this package's functions in one `backward` and one
`step` (142 tensors, two tasks, by what `auto` takes here).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import sys
import timeit
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gcond_kernels
from bench.inputs import Storage, layout_of
from bench.recipe import Benchmark
from bench.record import Figure, InputError, quartiles
from bench.table import Column, text, timed
from gcond_kernels import GCondFused, ops

TENSORS, TASKS = 300, 2
TENSORS_OF_A_STEP = 142
ROUNDS, CALLS = 15, 200
TARGET = 60e-6
CPU = torch.device("cpu")
# Where the functions of the package are: below it, and the backends beside it.
ROOT = Path(gcond_kernels.__file__).resolve().parents[1]
FOLDERS = tuple(f"{ROOT / name}/" for name in ("gcond_kernels", "python", "triton_kernels", "csrc"))


def check(_: argparse.Namespace) -> None:
    """Raise InputError where a backend is missing."""
    for backend in ("triton", "cuda"):
        if reason := ops.unavailable(backend, CPU):
            raise InputError(f"backend {backend!r}: {reason}")


def figures(_: argparse.Namespace) -> Iterator[Figure]:
    """Count the calls, and time every operation of both backends."""
    for operation, calls in package_calls().items():
        yield figure_of(
            operation,
            "package",
            tensors=TENSORS_OF_A_STEP,
            calls=calls.total(),
            files=len({file for file, _ in calls}),
        )
    without_launches()
    gradients = [torch.randn(7) for _ in range(TENSORS)]
    addresses = seconds(lambda: list(map(torch.Tensor.data_ptr, gradients)))
    yield figure_of("data_ptr of each", "torch", seconds=addresses)
    for backend in ("triton", "cuda"):
        for operation, call in operations(backend, gradients).items():
            yield figure_of(operation, backend, seconds=seconds(call))
    yield figure_of("gramian, sums on the host", "cuda", seconds=sums_on_host())


def figure_of(operation: str, by: str, tensors: int = TENSORS, **values: Any) -> Figure:
    head = {"section": "host", "operation": operation, "by": by}
    return {**head, "tensors": tensors, "tasks": TASKS, **values}


def package_calls() -> dict[str, Counter[tuple[str, str]]]:
    """Return "backward" and "step" → the calls of each function (file, name), of a third window."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(16, 8)) for _ in range(TENSORS_OF_A_STEP)]
    inputs = [torch.randn(16, 8) for _ in parameters]
    base = torch.optim.SGD(parameters, lr=1e-3)
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0})
    found = {}
    for _ in range(3):
        products = [(p * x).sum() for p, x in zip(parameters, inputs, strict=True)]
        losses = {"a": sum(products), "b": sum((p * p).sum() for p in parameters)}
        found["backward"] = calls_of(lambda losses=losses: optimizer.backward(losses))
        found["step"] = calls_of(optimizer.step)
    return found


def calls_of(run: Callable[[], object]) -> Counter[tuple[str, str]]:
    """Return how often each function of the package is called."""
    found: Counter[tuple[str, str]] = Counter()
    resolved: dict[str, str] = {}  # the backends are reached by symbolic links

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            name = frame.f_code.co_filename
            if name not in resolved:
                resolved[name] = str(Path(name).resolve())
            if resolved[name].startswith(FOLDERS):
                found[resolved[name], frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def operations(name: str, gradients: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Return the operations of a backend, without and with the checks around them."""
    s = Storage(TASKS, layout_of([len(gradient) for gradient in gradients]), CPU)
    own, S, backend = s.gradients(), torch.eye(TASKS).double(), ops.backend_for(name, CPU)
    target, dropout = (s.accumulators[0], gradients, s.layout), ops.SignDropout(0, s.counter)
    kept = {"state": s.state, "settings": s.method, "momentum": s.momentum}
    calls = {
        "accumulate": lambda: backend.accumulate(*target, 1.0, False),
        "gramian": lambda: backend.gramian(own, s.scale, None),
        "arbitrate": lambda: backend.arbitrate(S, S, s.scale, s.state, s.method),
        "combine": lambda: backend.combine(own, gradients, s.scale, s.finite, s.momentum, None),
        "graddrop": lambda: backend.graddrop(own, gradients, s.finite, dropout, s.momentum),
        "ops.accumulate, with its checks": lambda: ops.accumulate(*target, backend=backend),
        "ops.resolve, with its checks": lambda: ops.resolve(
            own, gradients, **kept, backend=backend
        ),
    }
    if backend.serves("graddrop") != name:
        del calls["graddrop"]
    return calls


def sums_on_host() -> dict[str, float]:
    """Return what the host's driver spends on the 10 sums of gramian of two tasks with history.

    A call without the 4 that history adds is shorter by 4 of them.
    """
    from gcond_kernels import _cuda

    module = importlib.import_module("gcond_kernels.cuda._gramian")
    layout, scale = ops.Layout((0,), (7,)), torch.ones(TASKS, dtype=torch.float64)
    chunks = module.chunk_tables(layout, 4096, scale.device).chunks
    accumulators = torch.zeros(TASKS, 32)

    def time_of(history: torch.Tensor | None) -> dict[str, float]:
        own = ops.TaskGradients(accumulators, layout, scale, history)
        written = module.new_partials(own, 0), ops.Gramians.empty(own, False)
        return seconds(lambda: _cuda.gramian((-1, 0), chunks, own, None, scale, *written))

    with_history, without = time_of(accumulators), time_of(None)
    return {key: 10 / 4 * (with_history[key] - without[key]) for key in without}


def without_launches() -> None:
    """Replace Triton's launches by nothing, and leave those in CUDA C++ no chunks."""
    from gcond_kernels import _cuda

    kernels = importlib.import_module("gcond_kernels.triton_kernels")
    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, defaultdict(lambda: lambda *_, **__: None))  # kernel[grid](...)
    launch = importlib.import_module("gcond_kernels.cuda.launch")
    tables_of = launch._chunk_tables

    @functools.cache
    def without_chunks(layout: ops.Layout, length: int, device: torch.device) -> Any:
        made = tables_of(layout, length, device)
        return made._replace(chunks=_cuda.Chunks(*made.tables, 0, 0, length))

    launch._chunk_tables = without_chunks


def seconds(call: Callable[[], object]) -> dict[str, float]:
    call()
    return quartiles([t / CALLS for t in timeit.repeat(call, number=CALLS, repeat=ROUNDS)])


def calls_in(figure: Figure) -> str:
    return f"{figure['calls']} calls in {figure['files']} files" if "calls" in figure else ""


COLUMNS = (
    Column("  operation", 36, lambda figure: f"  {figure['operation']}", left=True),
    Column("by", 8, text("by"), left=True),
    Column("tensors", 7, text("tensors")),
    Column("time (quartiles)", 24, timed("seconds")),
    Column("", 0, calls_in),
)
FOOT = f"{ROUNDS} rounds of {CALLS} calls; target of accumulate: {TARGET * 1e6:.0f} us"
BENCHMARK = Benchmark(__doc__.splitlines()[0], COLUMNS, figures, check=check, foot=lambda _: FOOT)
