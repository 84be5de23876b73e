"""Every operation on a GPU, by each backend, beside a copy of as many bytes in the same run.

    python bench/kernels_gpu.py [--output FILE.json] [--millions 2.5 28 88 1000] [--tasks 2 4 8]

The bytes that must move per parameter, with gradients of e bytes and K tasks: accumulate e + 4
in the first micro-batch, which overwrites, and e + 8 in a later one; gramian 4K + 2K with a
bfloat16 history; combine 4K + 8 + 4 + 2K with momentum, float32 outputs and the new history;
graddrop 4K + 8 + 4. A mask adds an eighth of one. The copy reads half of the bytes and writes half.
"fraction" is the time of the copy divided by the time of the operation.

On the device a call is timed as a CUDA graph that is replayed, without what it costs the host; the
backends and the copy take turns, round by round. "cuda, one launch" is a whole resolution in one
cooperative launch, "cuda, apart" the three operations one after the other; `ops.resolve` takes the
one that has a target. Fractions have targets from 80 M parameters on: below, the caches and the
launches themselves count, and the copy, which the caches serve too, is no measure.
"""

import argparse
import functools
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gcond_kernels
from gcond_kernels import GCond, GCondFused, ops

DEVICE = torch.device("cuda", 0)
BACKENDS = ("triton", "cuda")
MILLIONS = (2.5, 28.0, 88.0, 1000.0)
ROUNDS = 31
# Where one call takes milliseconds its time hardly varies, and a round is two of them.
ROUNDS_OF_LONG_CALLS = 9
WARM_UP = 10
# Calls before the clock starts: while the device is busy with them the host gets ahead of it.
LEAD = 5
# A round of some milliseconds, far longer than the clock's grain.
BYTES_A_ROUND = 16e9
LEAST_REPETITIONS = 2
# A round of what moves next to nothing.
REPETITIONS_OF_SMALL = 200
# Calls timed on the host before it waits: few enough that no launch waits for a full queue.
BATCH = 20
# A longer copy goes over the same memory again: far beyond any cache, and gigabytes are left over.
MOST_BYTES_OF_COPY = 2_000_000_000
# Free memory that torch and the graphs need beside the tensors.
SPARE_BYTES = 2_000_000_000

# Weights and biases in turn, as in a real model.
PAIRS, BIAS = 150, 1024
SMALL_PAIRS, SMALL_BIAS, SMALL_PARAMETERS = 71, 128, 2_500_000
# Below this a model has as few and small tensors as SMALL_PAIRS and SMALL_BIAS say.
SMALL_MODEL = 10_000_000
TRAINED_LAYERS, TRAINED_WIDTH = 5, 2048
MOST_TASKS_WITH_TARGET = 8
# Of so many tasks variants are measured too: masks, weights of each tensor's own, graddrop.
TASKS_OF_VARIANTS = 2
LEAST_PARAMETERS_WITH_TARGET = 80_000_000
NAME_WIDTH, WAY_WIDTH = 57, 16

Figure = dict[str, Any]
Run = Callable[[], object]


class Way(NamedTuple):
    """Who does it: a backend, and where it has several forms which of them."""

    backend: str
    form: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


TRITON, APART, AT_ONCE = Way("triton"), Way("cuda", "apart"), Way("cuda", "one launch")


class Case(NamedTuple):
    """What is measured: an operation on so many parameters, tensors and tasks."""

    operation: str
    parameters: int = 0
    tensors: int = 0
    tasks: int = 0
    what: str = ""

    def __str__(self) -> str:
        parts = [self.operation + (f" {self.what}" if self.what else "")]
        if self.tasks:
            parts.append(f"K = {self.tasks}")
        if self.parameters:
            parts.append(f"{self.parameters / 1e6:.4g} M in {self.tensors} tensors")
        return ", ".join(parts)


class Target(NamedTuple):
    """What a figure is held to: at least `bound` of a fraction, at most that of all else."""

    quantity: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether a value of this quantity is as good as the target."""
        if self.quantity == "fraction":
            return value >= self.bound
        if self.quantity == "bytes_per_parameter_and_task":
            # Sums of K×K numbers grow with the tasks too, by some hundredths of a byte.
            value = round(value, 1)
        return value <= self.bound

    def __str__(self) -> str:
        if self.quantity == "fraction":
            return f">= {self.bound:.2f}"
        if self.quantity == "seconds":
            return f"<= {self.bound * 1e6:.0f} us"
        return f"<= {self.bound:.1f} B"


OPERATION = Target("fraction", 0.90)
RESOLUTION = Target("fraction", 0.88)
GRAPH = Target("seconds", 25e-6)
EAGER = Target("seconds", 150e-6)
ACCUMULATE = Target("seconds", 60e-6)
MEMORY = Target("bytes_per_parameter_and_task", 6.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    parser.add_argument(
        "--millions", type=float, nargs="+", default=MILLIONS, help="parameters, in millions"
    )
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[2, 4, 8], help="numbers of tasks K"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench/kernels_gpu.py measures on a GPU: torch finds no CUDA device here",
            file=sys.stderr,
        )
        return 2

    torch.cuda.set_device(DEVICE)
    torch.manual_seed(0)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    backends = available()
    if not backends:
        return 1
    record: dict[str, Any] = {"machine": about, "backends": backends, "figures": []}
    print_row("figure", "by", "time (quartiles)", "copy", "fraction (quartiles)", "target", "")
    parameters = [round(millions * 1e6) for millions in arguments.millions]
    failed = False
    for group in groups(backends, arguments.tasks, parameters):
        failed |= not finished(group, record, arguments.output)
        gc.collect()  # the tensors of a group that failed too
        torch.cuda.empty_cache()
    print(f"medians of {ROUNDS} rounds, of {ROUNDS_OF_LONG_CALLS} where a call takes milliseconds;")
    print("the fraction is copy / time, round by round")
    print_comparison(record["figures"])
    return int(failed)


def available() -> list[str]:
    """The backends that run here; says why another does not."""
    reasons = {backend: ops.unavailable(backend, DEVICE) for backend in BACKENDS}
    for backend, reason in reasons.items():
        if reason is not None:
            print(f"not {backend}: {reason}")
    return [backend for backend, reason in reasons.items() if reason is None]


def finished(group: Iterator[Figure], record: dict[str, Any], output: Path | None) -> bool:
    """Prints and keeps the figures of a group; whether all could be measured."""
    fine = True
    try:
        for figure in group:
            print_figure(figure)
            fine &= "error" not in figure
            record["figures"].append(figure)
            if output:  # now: what comes later may fail, or be stopped
                output.write_text(json.dumps(record, indent=1) + "\n")
    except Exception as error:
        print(f"failed: {type(error).__name__}: {error}", flush=True)
        return False
    return fine


def groups(
    backends: Sequence[str], tasks: Sequence[int], sizes: Sequence[int]
) -> Iterator[Iterator[Figure]]:
    """All figures, in groups that share their tensors; what takes longest comes last."""
    for count in tasks:
        yield arbitrate_figures(backends, count)
    yield host_figures(backends)
    for backend in backends:
        yield memory_figures(backend)
    for parameters in sorted(sizes):
        yield accumulate_figures(backends, parameters)
        for count in tasks:
            yield operation_figures(backends, count, parameters)


# What is measured.


class Storage:
    """Everything that a resolution of K tasks reads and writes, filled at random.

    Args:
        tasks: K.
        sizes: elements of each parameter tensor.
    """

    def __init__(self, tasks: int, sizes: Sequence[int]) -> None:
        self.sizes, self.offsets, self.total = list(sizes), offsets_of(sizes), sum(sizes)
        self.rows = torch.randn(tasks, self.total, device=DEVICE)
        self.rows -= 1.1 * self.rows.mean(0)  # there is a conflict to resolve
        self.history = self.rows.bfloat16()
        self.momentum = torch.randn(self.total, device=DEVICE)
        self.steps = torch.zeros(len(sizes), dtype=torch.int64, device=DEVICE)
        self.outputs = [torch.randn(size, device=DEVICE) for size in sizes]
        self.scale = torch.ones(tasks, dtype=torch.float64, device=DEVICE)
        words = -(-self.total // 32)
        self.mask = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device=DEVICE)
        self.finite = torch.ones((), dtype=torch.bool, device=DEVICE)
        self.draws = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.method = GCond()
        self.state = self.method.new_state(tasks, DEVICE)
        self.state["history_scale"] += 1.0

    @staticmethod
    def bytes_of(tasks: int, parameters: int) -> int:
        """What it takes on the device: rows, history, momentum, outputs, and two means."""
        return parameters * (4 * tasks + 2 * tasks + 4 + 4 + 8)

    def sample(self) -> tuple[ops.Gramians, ops.Arbitration]:
        """Products and a decision from the first elements, by none of the backends measured."""
        head, past = self.rows[:, :4096].double(), self.history[:, :4096].double()
        per_tensor = head.new_zeros(len(self.sizes), len(head), len(head))
        products = ops.Gramians(head @ head.T, head @ past.T, per_tensor, per_tensor)
        return products, self.arbitrate(products, "python")

    def gramian(self, backend: str, mask: torch.Tensor | None = None) -> ops.Gramians:
        """All inner products, as of now."""
        return ops.gramian(
            self.rows,
            self.offsets,
            self.sizes,
            scale=self.scale,
            history=self.history,
            history_scale=self.state["history_scale"],
            mask=mask,
            backend=backend,
        )

    def arbitrate(self, products: ops.Gramians, backend: str) -> ops.Arbitration:
        """The weights that follow from the products."""
        return self.method.resolve(
            products.total, products.cross, self.scale, self.state, backend=backend
        )

    def combine(
        self,
        products: ops.Gramians,
        decision: ops.Arbitration,
        backend: str,
        mask: torch.Tensor | None = None,
    ) -> ops.Arbitration:
        """Writes outputs, momentum and history by the decision, and gives it back."""
        ops.combine(
            self.rows,
            self.outputs,
            self.offsets,
            self.sizes,
            weights=decision.weights,
            scale=self.scale,
            finite=decision.finite,
            per_tensor=products.per_tensor,
            history=self.history,
            momentum=self.momentum,
            momentum_steps=self.steps,
            beta=0.9,
            mask=mask,
            backend=backend,
        )
        return decision

    def graddrop(self, backend: str) -> None:
        """Writes outputs and momentum by signs picked at random."""
        ops.graddrop(
            self.rows,
            self.outputs,
            self.offsets,
            self.sizes,
            scale=self.scale,
            finite=self.finite,
            seed=0,
            draws=self.draws,
            momentum=self.momentum,
            momentum_steps=self.steps,
            beta=0.9,
            backend=backend,
        )

    def resolve_apart(self, backend: str) -> ops.Arbitration:
        """A whole resolution by the three operations, one after the other."""
        products = self.gramian(backend)
        return self.combine(products, self.arbitrate(products, backend), backend)

    def resolve_at_once(self) -> object:
        """A whole resolution in one launch, whether `ops.resolve` would take that or not."""
        return ops.backend_module("cuda", DEVICE, "resolve").resolve(
            self.rows,
            self.outputs,
            self.offsets,
            self.sizes,
            self.scale,
            self.history,
            self.momentum,
            self.steps,
            0.9,
            None,
            None,
            1e-4,
            100.0,
            self.state,
            self.method.settings(len(self.rows)),
            None,
        )

    def resolve(self, backend: str) -> object:
        """A whole resolution as the optimizer asks for it."""
        return ops.resolve(
            self.rows,
            self.outputs,
            self.offsets,
            self.sizes,
            scale=self.scale,
            state=self.state,
            settings=self.method.settings(len(self.rows)),
            history=self.history,
            momentum=self.momentum,
            momentum_steps=self.steps,
            beta=0.9,
            backend=backend,
        )

    def resolutions(self, backends: Sequence[str]) -> dict[Way, Run]:
        """A whole resolution by each backend, in each form that can be had."""
        runs: dict[Way, Run] = {}
        if "triton" in backends:
            runs[TRITON] = lambda: self.resolve_apart("triton")
        if "cuda" in backends:
            runs[APART] = lambda: self.resolve_apart("cuda")
            # Would it be so with rows of one element? Then nothing but their size is against it.
            if resolves_at_once(self.rows[:, :1], self.sizes):
                runs[AT_ONCE] = self.resolve_at_once
        return runs

    def way_taken(self, backend: str) -> Way:
        """How `ops.resolve` does it."""
        if backend == "triton":
            return TRITON
        return AT_ONCE if resolves_at_once(self.rows, self.sizes) else APART


def resolves_at_once(rows: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Whether `ops.resolve` does with one launch."""
    room = ops.backend_module("cuda", DEVICE, "resolve")
    return bool(room.resolves_at_once(rows, sizes))


def operation_figures(backends: Sequence[str], tasks: int, parameters: int) -> Iterator[Figure]:
    """Device time of gramian, combine and a whole resolution."""
    sizes = model_of(parameters)
    total, small = sum(sizes), parameters < SMALL_MODEL
    reading, writing = total * 6 * tasks, total * (6 * tasks + 12)
    resolution = Case("resolution", total, len(sizes), tasks)
    lacking = lacking_memory(Storage.bytes_of(tasks, total), reading + writing)
    if lacking:
        yield {**named(resolution), "skipped": lacking}
        return
    storage = Storage(tasks, sizes)
    products, decision = storage.sample()
    with_target = tasks <= MOST_TASKS_WITH_TARGET
    bandwidth = OPERATION if with_target and total >= LEAST_PARAMETERS_WITH_TARGET else None

    gramians = {Way(b): lambda b=b: storage.gramian(b) for b in backends}
    targets = dict.fromkeys(gramians, bandwidth)
    yield from beside_copy(resolution._replace(operation="gramian"), gramians, reading, targets)
    combines = {Way(b): lambda b=b: storage.combine(products, decision, b) for b in backends}
    yield from beside_copy(resolution._replace(operation="combine"), combines, writing, targets)
    if tasks == TASKS_OF_VARIANTS:
        yield from variant_figures(backends, storage, resolution)
    whole = RESOLUTION if bandwidth else GRAPH if small and tasks == 2 else None
    targets = {storage.way_taken(backend): whole for backend in backends}
    runs = storage.resolutions(backends)
    yield from beside_copy(resolution, runs, reading + writing, targets)


def variant_figures(backends: Sequence[str], storage: Storage, case: Case) -> Iterator[Figure]:
    """Device time of gramian and combine with a mask and weights per tensor, and of graddrop."""
    tasks, total = case.tasks, case.parameters
    products, decision = storage.sample()
    each = decision._replace(weights=decision.weights.repeat(len(storage.sizes), 1))
    mask, by_mask = storage.mask, total // 8
    for operation, what, run, budget in (
        ("gramian", "masked", lambda b: storage.gramian(b, mask), total * 6 * tasks + by_mask),
        (
            "combine",
            "masked, per tensor",
            lambda b: storage.combine(products, each, b, mask),
            total * (6 * tasks + 12) + by_mask,
        ),
        ("graddrop", "", storage.graddrop, total * (4 * tasks + 12)),
    ):
        runs = {Way(b): functools.partial(run, b) for b in backends}
        yield from beside_copy(case._replace(operation=operation, what=what), runs, budget, {})


def accumulate_figures(backends: Sequence[str], parameters: int) -> Iterator[Figure]:
    """Device time of accumulate, for gradients of two types."""
    sizes = model_of(parameters)
    total = sum(sizes)
    bandwidth = OPERATION if total >= LEAST_PARAMETERS_WITH_TARGET else None
    targets = {Way(backend): bandwidth for backend in backends}
    for dtype in (torch.float32, torch.bfloat16):
        e = dtype.itemsize
        for turn, budget in (("first", total * (e + 4)), ("later", total * (e + 8))):
            case = Case("accumulate", total, len(sizes), what=f"{str(dtype)[6:]}, {turn}")
            lacking = lacking_memory(total * (4 + e), budget)
            if lacking:
                yield {**named(case), "skipped": lacking}
                continue
            calls = accumulate_of(sizes, dtype, overwrite=turn == "first")
            runs = {Way(backend): calls(backend) for backend in backends}
            yield from beside_copy(case, runs, budget, targets)
            del calls, runs  # before the next ones are made


def accumulate_of(
    sizes: Sequence[int], dtype: torch.dtype, overwrite: bool = False, checked: bool = False
) -> Callable[[str], Run]:
    """Makes calls of accumulate by a backend, on the same gradients; `checked`: as is public."""
    offsets, lengths = offsets_of(sizes), list(sizes)
    accumulator = torch.randn(sum(sizes), device=DEVICE)
    gradients = [torch.randn(size, dtype=dtype, device=DEVICE) for size in sizes]

    def call_of(backend: str) -> Run:
        direct = ops.backend_module(backend, DEVICE, "accumulate").accumulate

        def run() -> None:
            direct(accumulator, gradients, offsets, lengths, 1.0, overwrite)

        def run_checked() -> None:
            ops.accumulate(
                accumulator, gradients, offsets, lengths, overwrite=overwrite, backend=backend
            )

        return run_checked if checked else run

    return call_of


def arbitrate_figures(backends: Sequence[str], tasks: int) -> Iterator[Figure]:
    """Device time of arbitrate, which moves next to nothing."""
    storage = Storage(tasks, [1024])
    products, _ = storage.sample()
    runs = {Way(b): lambda b=b: storage.arbitrate(products, b) for b in backends}
    yield from beside_copy(Case("arbitrate", tasks=tasks), runs, 0, {})


def host_figures(backends: Sequence[str]) -> Iterator[Figure]:
    """What single calls cost the host; accumulate also with the checks of the public function."""
    storage = Storage(2, model_of(SMALL_PARAMETERS))
    case = Case("host: resolution", storage.total, len(storage.sizes), 2)
    for backend in backends:
        way = storage.way_taken(backend)
        yield on_host(case, way, lambda b=backend: storage.resolve(b), EAGER)
    if "cuda" in backends:
        yield on_host(case, APART, lambda: storage.resolve_apart("cuda"), None)
    sizes = sizes_of(SMALL_PARAMETERS, PAIRS, SMALL_BIAS)
    for checked, what in ((False, ""), (True, "with checks")):
        case = Case("host: accumulate", sum(sizes), len(sizes), what=what)
        calls = accumulate_of(sizes, torch.float32, checked=checked)
        for backend in backends:
            yield on_host(case, Way(backend), calls(backend), ACCUMULATE)


def memory_figures(backend: str) -> Iterator[Figure]:
    """How much the peak of device memory grows with the tasks."""
    peak_of_training(2, backend)  # from here on torch has what it keeps for good
    peaks = {}
    for tasks in (2, 4):
        peaks[tasks], parameters = peak_of_training(tasks, backend)
    growth = (peaks[4] - peaks[2]) / 2 / parameters
    case = Case("peak memory, K = 2 to 4", parameters, 2 * TRAINED_LAYERS)
    record = {"peak_bytes": peaks, MEMORY.quantity: growth}
    yield {**named(case, Way(backend)), **record, **judged(MEMORY, growth)}


def peak_of_training(tasks: int, backend: str) -> tuple[int, int]:
    """Bytes that a window of training has allocated at most, and the number of parameters."""
    model = torch.nn.Sequential()
    for _ in range(TRAINED_LAYERS):
        model.append(torch.nn.Linear(TRAINED_WIDTH, TRAINED_WIDTH)).append(torch.nn.ReLU())
    model.to(DEVICE)
    weights = {f"task {task}": 1.0 for task in range(tasks)}
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = GCondFused(base, weights, accumulation_steps=2, backend=backend)
    x = torch.randn(64, TRAINED_WIDTH, device=DEVICE)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(2):
        optimizer.backward({task: lambda: model(x).pow(2).mean() for task in optimizer.tasks})
    optimizer.step()
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    return peak, sum(p.numel() for p in model.parameters())


def model_of(parameters: int) -> list[int]:
    """Elements of each tensor of a model with about so many parameters."""
    if parameters < SMALL_MODEL:
        return sizes_of(parameters, SMALL_PAIRS, SMALL_BIAS)
    return sizes_of(parameters, PAIRS, BIAS)


def sizes_of(parameters: int, pairs: int, bias: int) -> list[int]:
    """Elements of weights and biases in turn, about `parameters` together."""
    weight = bias * max(1, round(parameters / pairs / bias - 1))
    return [weight, bias] * pairs


def offsets_of(sizes: Sequence[int]) -> list[int]:
    """Where each tensor's segment starts, in elements; the sizes leave all of them aligned."""
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(offsets[-1] + size)
    return offsets


# How it is measured.


def lacking_memory(needed: int, budget: int) -> str | None:
    """Says so where the tensors and the two buffers of the copy are more than is free."""
    needed += min(budget, 2 * MOST_BYTES_OF_COPY) + SPARE_BYTES
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    if needed <= free:
        return None
    return f"needs {needed / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free"


def beside_copy(
    case: Case, runs: dict[Way, Run], budget: int, targets: dict[Way, Target | None]
) -> Iterator[Figure]:
    """Times the runs and a copy that moves `budget` bytes; all take turns, round by round."""
    ready: dict[Way, Run] = {}
    for way, run in runs.items():
        try:
            ready[way] = captured(run)
        except Exception as error:  # the others can be measured still
            yield broken(case, way, error)
    every = list(ready.values())
    if budget:
        every.append(captured(copy_of(budget)))
    repetitions = repetitions_of(budget)
    for run in every:
        for _ in range(min(WARM_UP, repetitions)):
            run()
    rounds = [
        [device_seconds(run, repetitions) for run in every] for _ in range(rounds_of(repetitions))
    ]
    for place, way in enumerate(ready):
        record: Figure = {"bytes": budget, "seconds": quartiles([each[place] for each in rounds])}
        if budget:
            record["copy_seconds"] = quartiles([each[-1] for each in rounds])
            record["fraction"] = quartiles([each[-1] / each[place] for each in rounds])
        target = targets.get(way)
        value = record[target.quantity]["median"] if target else 0.0
        yield {**named(case, way), **record, **judged(target, value)}


def repetitions_of(budget: int) -> int:
    """How many calls make a round."""
    if budget == 0:
        return REPETITIONS_OF_SMALL
    return max(LEAST_REPETITIONS, round(BYTES_A_ROUND / budget))


def rounds_of(repetitions: int) -> int:
    """How many rounds there are."""
    return ROUNDS if repetitions > LEAST_REPETITIONS else ROUNDS_OF_LONG_CALLS


def copy_of(budget: int) -> Run:
    """A copy that reads half of so many bytes and writes half."""
    times = -(-budget // (2 * MOST_BYTES_OF_COPY))
    source = torch.empty(budget // 2 // times, dtype=torch.uint8, device=DEVICE).random_()
    copied = torch.empty_like(source)

    def copy() -> None:
        for _ in range(times):
            copied.copy_(source)

    return copy


def on_host(case: Case, way: Way, run: Run, target: Target | None) -> Figure:
    """Times how long the host is busy with a call."""
    try:
        for _ in range(WARM_UP):
            run()
    except Exception as error:  # the others can be measured still
        return broken(case, way, error)
    seconds = quartiles([host_seconds(run, BATCH) for _ in range(ROUNDS)])
    return {**named(case, way), "seconds": seconds, **judged(target, seconds["median"])}


def device_seconds(run: Run, repetitions: int) -> float:
    """Seconds that one call takes on the device."""
    for _ in range(min(LEAD, repetitions)):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repetitions):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repetitions


def host_seconds(run: Run, repetitions: int) -> float:
    """Seconds that the host takes to issue one call; the device may be at work still."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - start) / repetitions


def captured(run: Run) -> Run:
    """The same work as a CUDA graph."""
    run()  # a capture cannot compile, or make the tables that kernels look up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def named(case: Case, way: Way | None = None) -> Figure:
    """What a figure is of, and by whom."""
    by = {} if way is None else {"backend": way.backend, "form": way.form or None}
    return {"name": str(case), **case._asdict(), **by, "target": None, "met": None}


def broken(case: Case, way: Way, error: Exception) -> Figure:
    """In place of a figure that could not be had."""
    return {**named(case, way), "error": f"{type(error).__name__}: {error}"}


def judged(target: Target | None, value: float) -> Figure:
    """What a figure was to reach, and whether it did."""
    if target is None:
        return {"target": None, "met": None}
    return {"target": {target.quantity: target.bound}, "met": target.met(value)}


# What is shown.


def machine() -> dict[str, Any]:
    """The GPU and the versions of all that takes part."""
    import triton

    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "driver": driver_version(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "gcond_kernels": gcond_kernels.__version__,
    }


def driver_version() -> str | None:
    """As nvidia-smi tells it, which torch does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def print_figure(figure: Figure) -> None:
    copy, target, met = figure.get("copy_seconds"), figure["target"], figure["met"]
    by = str(Way(figure.get("backend", ""), figure.get("form") or ""))
    for problem in ("skipped", "error"):
        if problem in figure:
            print(f"{figure['name']} {by} {problem}: {figure[problem]}", flush=True)
            return
    if "seconds" in figure:
        time_text = spread(figure["seconds"], 1e6, 1) + " us"
    else:
        time_text = f"{figure[MEMORY.quantity]:.3f} B per parameter and task"
    print_row(
        figure["name"],
        by,
        time_text,
        f"{copy['median'] * 1e6:.1f} us" if copy else "",
        spread(figure["fraction"], 1.0, 3) if copy else "",
        str(Target(*next(iter(target.items())))) if target else "",
        {True: "met", False: "missed", None: ""}[met],
    )


def spread(values: dict[str, float], unit: float, digits: int) -> str:
    """Median and quartiles in multiples of 1 / `unit`."""
    low, median, high = (f"{values[k] * unit:.{digits}f}" for k in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def print_row(*cells: str) -> None:
    widths = (NAME_WIDTH, WAY_WIDTH, 31, 11, 22, 10)
    first, by, *others, last = cells
    aligned = [f"{cell:>{width}}" for cell, width in zip(others, widths[2:], strict=True)]
    columns = [f"{first:<{NAME_WIDTH}}", f"{by:<{WAY_WIDTH}}", *aligned, last]
    print("  ".join(columns).rstrip(), flush=True)


def print_comparison(figures: Sequence[Figure]) -> None:
    """Which way of doing each thing was the fastest, for `ops.AUTO` and `resolves_at_once`."""
    timed: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        if "seconds" in figure:
            by = str(Way(figure["backend"], figure["form"] or ""))
            timed.setdefault(figure["name"], {})[by] = figure
    wins: dict[str, Counter[str]] = {}
    print("\nfastest, where there is a choice")
    for name, ways in timed.items():
        if len(ways) > 1:
            best = print_fastest(name, ways)
            wins.setdefault(ways[best]["operation"], Counter())[best] += 1
    for operation, counts in wins.items():
        by_count = ", ".join(f"{by} in {n}" for by, n in counts.most_common())
        print(f"{operation}, of {counts.total()} cases: {by_count}")


def print_fastest(name: str, ways: dict[str, Figure]) -> str:
    """Prints which way took least time, and how much longer the others took."""
    seconds = {by: figure["seconds"]["median"] for by, figure in ways.items()}
    best = min(seconds, key=seconds.__getitem__)
    others = [
        f"{by} {value / seconds[best]:.2f} times as long"
        for by, value in seconds.items()
        if by != best
    ]
    columns = f"{name:<{NAME_WIDTH}}  {best:<{WAY_WIDTH}}"
    print(f"{columns}  {'; '.join(others)}{cache_note(ways)}")
    return best


def cache_note(ways: dict[str, Figure]) -> str:
    """How large the accumulators of a resolution are: `resolves_at_once` goes by that."""
    figure = ways.get(str(AT_ONCE))
    if figure is None:
        return ""
    return f" (accumulators: {4 * figure['tasks'] * figure['parameters'] / 1e6:.0f} MB)"


if __name__ == "__main__":
    sys.exit(main())
