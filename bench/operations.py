"""The operations: every backend, plain torch, TorchJD, the published code, and a copy.

Bytes that must move per parameter, with gradients of e bytes and K tasks: accumulate e + 4 in the
first micro-batch, which overwrites, and e + 8 in a later one; gramian 4K + 2K with a bfloat16
history; combine 4K + 8 + 4 + 2K with momentum, float32 outputs and the new history; graddrop
4K + 8 + 4; aggregation, another method without history and momentum as TorchJD does it,
4K + 4K + 4. A mask adds an eighth of one. The copy reads half of the bytes and writes half, of ours
also beside others; "fraction" is its time divided by that of the operation, round by round.

Every result is checked before anything is timed: ours and plain torch's against float64 (accumulate
against the same sum in float32, graddrop for being sums of one sign), TorchJD's against our methods
of the same names, the published code's for being a combination of the gradients.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import others
from bench.clock import Clock, Competitor, Run, copies, laps_of
from bench.counting import count
from bench.inputs import BETA, TOLERANCE, Gradients, Layout, Storage, layout_of
from bench.models import shapes_of
from bench.published import PublishedResolution
from bench.record import Figure, InputError, cache_bytes, free_bytes, quartiles
from gcond_kernels import ops

TASKS = (2, 4, 8, 16, 50)
MODELS = ("mobilenetv3_small", "convnext_tiny", "convnext_base", "transformer_1b")
MILLIONS = (1.0, 5.0, 25.0, 100.0, 400.0, 1000.0)
EVEN = "even"
# Weights and biases in turn, as in a model, where no model is named.
PAIRS, BIAS = 150, 1024
# Memory that torch and the graphs need beside the tensors.
SPARE_BYTES = 2_000_000_000
# Of so many tasks sizes are compared, and variants: masks, weights of each tensor, graddrop.
FEW_TASKS = 2
# Parameters times the square of the tasks: of more the published code takes minutes.
MOST_OF_PUBLISHED = 500_000_000
MOST_TASKS_WITH_TARGET = 8
LEAST_PARAMETERS_WITH_TARGET = 80_000_000
SMALL_MODEL = "mobilenetv3_small"


class Case(NamedTuple):
    """An operation on the tensors of a model, and so many tasks."""

    operation: str
    model: str
    layout: Layout
    tasks: int
    what: str = ""

    def figure(self, by: str, **values: Any) -> Figure:
        """Return a figure of one competitor."""
        ours = by.partition(",")[0] in ops.BACKENDS
        return {
            "section": "operations" if ours else "others",
            "operation": self.operation,
            "what": self.what,
            "by": by,
            "model": self.model,
            "parameters": self.layout.parameters,
            "tensors": len(self.layout.sizes),
            "tasks": self.tasks,
            **values,
        }


class Target(NamedTuple):
    """A bound of a figure: the least of a fraction, the most of all else."""

    quantity: str
    bound: float

    def judged(self, median: float) -> Figure:
        """Return the fields of a figure with this median."""
        met = median >= self.bound if self.quantity == "fraction" else median <= self.bound
        return {"target": {self.quantity: self.bound}, "met": met}


# Of a GPU; `cpu.py` has those of a CPU.
OPERATION, RESOLUTION = (Target("fraction", f) for f in (0.90, 0.88))
GRAPH, EAGER, ACCUMULATE = (Target("seconds", 1e-6 * us) for us in (25, 150, 60))
KERNELS = ("triton", "cuda", "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this section."""
    add = parser.add_argument_group("operations").add_argument
    about = "whose tensors the operations work on (default: all that fit in memory)"
    add("--models", nargs="*", choices=MODELS, default=MODELS, help=about)
    about = "millions of parameters in even tensors, for cost against size (default: %(default)s)"
    add("--millions", type=float, nargs="*", default=MILLIONS, metavar="N", help=about)
    about = "numbers of tasks (default: %(default)s)"
    add("--tasks", type=int, nargs="+", default=TASKS, metavar="K", help=about)


def check(options: argparse.Namespace) -> None:
    """Raise InputError where an option cannot be used."""
    if min(options.tasks) < 2:
        raise InputError(f"--tasks {min(options.tasks)}: a conflict takes two tasks or more")
    if min(options.millions, default=1) < 1:
        raise InputError("--millions must be 1 or more")


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure all operations; what takes longest comes last."""
    return Bench(options).figures()


class Bench:
    """Measures operations on one device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.tasks = options.device, options.tasks
        self.published = options.published_code
        self.clock = Clock(self.device, options.seconds)
        self.cache = cache_bytes(self.device)
        self.backends = backends_of(self.device)
        named = [(name, model_layout(name)) for name in options.models]
        sizes = [round(millions * 1e6) for millions in options.millions]
        even = [(EVEN, layout_of(even_sizes(size))) for size in sizes]
        self.models = sorted(named + even, key=lambda model: model[1].parameters)

    def figures(self) -> Iterator[Figure]:
        """Measure everything."""
        for tasks in self.tasks:
            case = Case("arbitrate", EVEN, layout_of([1024]), tasks)
            yield from self._safely(case, self._arbitrate)
        if self.device.type == "cuda":
            yield from self._host_figures()
        for model, layout in self.models:
            for dtype in (torch.float32, torch.bfloat16):
                for turn in ("first", "later"):
                    case = Case("accumulate", model, layout, 1, f"{str(dtype)[6:]}, {turn}")
                    yield from self._safely(case, partial(self._accumulate, dtype, turn == "first"))
            for tasks in (FEW_TASKS,) if model == EVEN else self.tasks:
                yield from self._safely(Case("resolution", model, layout, tasks), self._operations)

    def _safely(self, case: Case, measure: Callable[[Case], Iterator[Figure]]) -> Iterator[Figure]:
        """Make a figure of an error: the others can be measured still."""
        try:
            yield from measure(case)
        except Exception as error:
            yield case.figure("all", error=f"{type(error).__name__}: {error}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def compare(
        self,
        case: Case,
        competitors: Mapping[str, Competitor],
        budget: int,
        target: Target | None = None,
    ) -> Iterator[Figure]:
        """Time competitors and a copy of `budget` bytes, in turn; count torch's operations."""
        counts = {}
        for by, each in competitors.items():
            if not by.startswith(KERNELS):
                for prepare in each.prepare[:1]:
                    prepare()
                counts[by] = count(each.calls[0])._asdict()
        every = dict(competitors)
        if budget:
            laps = len(next(iter(competitors.values())).calls)
            every["copy"] = copies(budget, laps, self.device)
        times = self.clock.times(every)
        for by in competitors:
            seconds = quartiles(times[by])
            figure = case.figure(by, bytes=budget, rounds=len(times[by]), seconds=seconds)
            if budget:
                pairs = zip(times["copy"], times[by], strict=True)
                figure["copy_seconds"] = quartiles(times["copy"])
                figure["fraction"] = quartiles([copy / own for copy, own in pairs])
            if target and by.startswith(KERNELS):
                figure |= target.judged(figure[target.quantity]["median"])
            yield figure | counts.get(by, {})

    def _arbitrate(self, case: Case) -> Iterator[Figure]:
        """Measure arbitrate, which moves next to nothing."""
        storage = Storage(case.tasks, case.layout, self.device)
        products = storage.products_in_float64()
        exact = storage.arbitrate(products, "python").weights
        runs: dict[str, Run] = {}
        for backend in self.backends:
            storage.reset()
            weights = storage.arbitrate(products, backend).weights
            if not torch.allclose(weights, exact):
                raise AssertionError(f"arbitrate by {backend}: weights {weights}, not {exact}")
            runs[backend] = partial(storage.arbitrate, products, backend)
        yield from self.compare(case, competitors_of([runs]), 0)

    def _host_figures(self) -> Iterator[Figure]:
        """Measure single calls on the host; accumulate also without the checks around it."""
        storage = Storage(2, model_layout(SMALL_MODEL), self.device)
        layout = layout_of(even_sizes(2_500_000, bias=128))
        gradients = Gradients(layout, torch.float32, self.device)
        resolution = Case("resolution", SMALL_MODEL, storage.layout, 2, "host time")
        accumulate = Case("accumulate", EVEN, gradients.layout, 1, "host time")
        checked = accumulate._replace(what="host time with checks")
        for backend in self.backends:
            for case, run, target in (
                (resolution, partial(storage.resolve, backend), EAGER),
                (accumulate, gradients.unchecked(backend), ACCUMULATE),
                (checked, partial(gradients.accumulate, backend, False), ACCUMULATE),
            ):
                yield from self._safely(case, partial(self._on_host, backend, run, target))

    def _on_host(self, backend: str, run: Run, target: Target, case: Case) -> Iterator[Figure]:
        run()
        seconds = quartiles(self.clock.host_times(run))
        judged = {} if backend == "python" else target.judged(seconds["median"])
        yield case.figure(backend, seconds=seconds, **judged)

    def _accumulate(self, dtype: torch.dtype, overwrite: bool, case: Case) -> Iterator[Figure]:
        """Measure accumulate of gradients of one type."""
        budget = case.layout.parameters * (dtype.itemsize + (4 if overwrite else 8))
        size = Gradients.bytes_of(case.layout, dtype)
        laps = laps_of(size, self.cache)
        if lacking := lacking_memory(size * laps, budget * laps, self.device):
            yield case.figure("all", skipped=lacking)
            return
        pool = [Gradients(case.layout, dtype, self.device) for _ in range(laps)]
        runs = [
            {b: partial(each.accumulate, b, overwrite) for b in self.backends}
            | others.accumulations(each, overwrite)
            for each in pool
        ]
        for by, run in runs[0].items():
            before = pool[0].accumulator.clone()
            run()
            pool[0].check(before, overwrite, by)
        yield from self.compare(case, competitors_of(runs), budget, self._target(case))

    def _target(self, case: Case) -> Target | None:
        """Return a target where caches and launches hardly count."""
        large = case.layout.parameters >= LEAST_PARAMETERS_WITH_TARGET
        few = case.tasks <= MOST_TASKS_WITH_TARGET
        return OPERATION if self.device.type == "cuda" and few and large else None

    def _operations(self, case: Case) -> Iterator[Figure]:
        """Measure gramian, combine, a full resolution and aggregation."""
        layout, tasks = case.layout, case.tasks
        size = Storage.bytes_of(tasks, layout)
        laps = laps_of(size, self.cache)
        # And what plain torch and TorchJD allocate within.
        needed = size * laps + 8 * layout.length
        budget = layout.parameters * (12 * tasks + 12)
        if lacking := lacking_memory(needed, budget * laps, self.device):
            yield case.figure("all", skipped=lacking)
            return
        pool = [Storage(tasks, layout, self.device) for _ in range(laps)]
        yield from self._gramian(case._replace(operation="gramian"), pool)
        yield from self._combine(case._replace(operation="combine"), pool)
        if tasks == FEW_TASKS and case.model != EVEN:
            yield from self._variants(case, pool)
        yield from self._resolution(case, pool)
        yield from self._aggregation(case._replace(operation="aggregation"), pool)

    def _gramian(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        def runs_of(storage: Storage) -> dict[str, Run]:
            runs: dict[str, Run] = {b: partial(storage.gramian, b) for b in self.backends}
            return runs if others.takes_long(storage) else runs | others.products(storage)

        for by, run in runs_of(pool[0]).items():
            pool[0].check_products(gramians_of(run()), f"gramian by {by}")
        competitors = competitors_of(list(map(runs_of, pool)))
        budget = case.layout.parameters * 6 * case.tasks
        yield from self.compare(case, competitors, budget, self._target(case))

    def _combine(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        products = pool[0].products_in_float64()
        decision = pool[0].arbitrate(products, "python")

        def runs_of(storage: Storage) -> dict[str, Run]:
            runs: dict[str, Run] = {b: partial(storage.combine, decision, b) for b in self.backends}
            return runs | others.combinations(storage, decision.weights.tolist())

        for by, run in runs_of(pool[0]).items():
            pool[0].check_step(run, decision.weights, f"combine by {by}")
        competitors = competitors_of(list(map(runs_of, pool)))
        budget = case.layout.parameters * (6 * case.tasks + 12)
        yield from self.compare(case, competitors, budget, self._target(case))

    def _variants(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        """Measure gramian and combine with a mask and weights per tensor, and graddrop."""
        total, tensors = case.layout.parameters, len(case.layout.sizes)
        words = case.layout.length // 32
        mask = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device=self.device)
        products = pool[0].products_in_float64()
        decision = pool[0].arbitrate(products, "python")
        each = decision._replace(weights=decision.weights.repeat(tensors, 1))
        variants: dict[tuple[str, str], tuple[int, Callable[[Storage, str], object]]] = {
            ("gramian", "masked"): (total * 12 + total // 8, lambda s, b: s.gramian(b, mask)),
            ("combine", "masked, weights per tensor"): (
                total * 24 + total // 8,
                lambda s, b: s.combine(each, b, mask),
            ),
            ("graddrop", ""): (total * 20, lambda s, b: s.graddrop(b)),
        }
        for backend in self.backends:
            check_variants(pool[0], mask, each, backend)
        for (operation, what), (budget, run) in variants.items():
            runs = [{b: partial(run, storage, b) for b in self.backends} for storage in pool]
            named = case._replace(operation=operation, what=what)
            yield from self.compare(named, competitors_of(runs), budget)

    def _resolution(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        """Measure a full resolution, beside all others."""
        pool[0].reset()
        weights = pool[0].arbitrate(pool[0].products_in_float64(), "python").weights
        for by, run in self._resolutions(pool[0]).items():
            tolerance = TOLERANCE if by.partition(",")[0] in ops.BACKENDS else others.TOLERANCE
            pool[0].check_step(run, weights, f"resolution by {by}", tolerance)
        runs = list(map(self._resolutions, pool))
        competitors = competitors_of(runs, ("python", others.FOREACH, others.LOOP))
        failed: list[Figure] = []
        competitors |= torchjd_aggregations(case, pool, failed)
        if self.published is not None:
            competitors |= self._published(case, pool, failed)
        budget = case.layout.parameters * (12 * case.tasks + 12)
        yield from self.compare(case, competitors, budget, self._target_of_resolution(case))
        yield from failed
        if others.takes_long(pool[0]):
            yield case.figure("plain torch", skipped="all pairs, one by one, take too long")

    def _target_of_resolution(self, case: Case) -> Target | None:
        if self.device.type == "cuda" and case.model == SMALL_MODEL and case.tasks == 2:
            return GRAPH
        return RESOLUTION if self._target(case) else None

    def _resolutions(self, storage: Storage) -> dict[str, Run]:
        """Return a resolution by each backend, in each form, and by plain torch."""
        runs: dict[str, Run] = {}
        for backend in self.backends:
            if backend != "cuda":
                runs[backend] = partial(storage.resolve, backend)
                continue
            runs["cuda, apart"] = partial(storage.resolve_apart, backend)
            if storage.can_resolve_at_once():
                runs["cuda, one launch"] = storage.resolve_at_once
        return runs if others.takes_long(storage) else runs | others.resolutions(storage)

    def _aggregation(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        """Measure methods that TorchJD has too, by both."""
        theirs = torchjd_aggregations(case, pool, [])
        if not theirs:
            return
        methods = others.our_methods()

        def runs_of(storage: Storage) -> dict[str, Run]:
            return {
                f"{backend}, {name}": storage.aggregation(method, backend)
                for name, method in methods.items()
                for backend in self.backends
            }

        S = pool[0].products_in_float64().total
        for by, run in runs_of(pool[0]).items():
            pool[0].reset()
            run()
            # A solver may magnify the rounding of the inner products.
            weights = methods[by.partition(", ")[2]](S)
            pool[0].check_written(weights, f"aggregation by {by}", others.TOLERANCE)
        runs = list(map(runs_of, pool))
        competitors = competitors_of(runs, runs[0]) | theirs  # with the solvers, as TorchJD's
        budget = case.layout.parameters * (8 * case.tasks + 4)
        yield from self.compare(case, competitors, budget)

    def _published(
        self, case: Case, pool: Sequence[Storage], failed: list[Figure]
    ) -> dict[str, Competitor]:
        """Return the published code, of the same gradients; or add a figure with the reason."""
        layout, by = case.layout, others.PUBLISHED
        # With two accumulators in bfloat16 and what it allocates within.
        needed = len(pool) * layout.parameters * 16 * (case.tasks + 1)
        reason = lacking_memory(needed, 0, self.device)
        if layout.parameters * case.tasks**2 > MOST_OF_PUBLISHED:
            reason = "takes too long"
        if reason:
            failed.append(case.figure(by, skipped=reason))
            return {}
        given = self.published, layout.sizes
        made = [PublishedResolution(*given, storage.packed(), BETA) for storage in pool]
        made[0].fill()
        made[0].run()
        try:
            others.check_combination(made[0].outputs, pool[0], by)
        except AssertionError as error:
            failed.append(case.figure(by, error=str(error)))
            return {}
        runs, fills = [each.run for each in made], [each.fill for each in made]
        return {by: Competitor(runs, synchronizes=True, prepare=fills)}


def torchjd_aggregations(
    case: Case,
    pool: Sequence[Storage],
    failed: list[Figure],
    names: Sequence[str] = others.METHODS,
) -> dict[str, Competitor]:
    """Return TorchJD's, of the same gradients; add figures of those that take no part."""
    if reason := others.torchjd_missing():
        failed.append(case.figure("TorchJD", skipped=reason))
        return {}
    runs = [others.aggregations(storage.accumulators, names) for storage in pool]
    competitors = {}
    for by, run in runs[0].items():
        try:
            others.check_aggregation(by, run, pool[0])
        except (AssertionError, RuntimeError) as error:  # noqa: PERF203  # of one of three
            failed.append(case.figure(by, error=f"{type(error).__name__}: {error}"))
        else:
            competitors[by] = Competitor([each[by] for each in runs], synchronizes=True)
    return competitors


def lacking_memory(tensors: int, budget: int, device: torch.device) -> str | None:
    """Return a reason where the tensors and the buffers of a copy are more than is free."""
    needed, free = tensors + min(budget, 2_000_000_000) + SPARE_BYTES, free_bytes(device)
    if needed <= free:
        return None
    return f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def check_variants(storage: Storage, mask: Tensor, each: ops.Arbitration, backend: str) -> None:
    """Check gramian and combine with a mask and weights per tensor, and graddrop."""
    storage.reset()
    products = storage.gramian(backend, mask)
    with storage.masked(mask):
        storage.check_products(products, f"masked gramian by {backend}")
    storage.combine(each, backend, mask)
    with storage.masked(mask):
        storage.check_written(each.weights[0], f"masked combine by {backend}")
    storage.reset()
    storage.graddrop(backend)
    storage.check_dropped(f"graddrop by {backend}")


def backends_of(device: torch.device) -> list[str]:
    """Return the backends to measure; on a CPU those of a GPU are for tests alone."""
    names = ("cpu", "python") if device.type == "cpu" else ops.BACKENDS
    return [backend for backend in names if ops.unavailable(backend, device) is None]


def model_layout(name: str) -> Layout:
    """Return the layout of a model's tensors."""
    return layout_of([torch.Size(shape).numel() for shape in shapes_of(name)])


def even_sizes(parameters: int, bias: int = BIAS) -> list[int]:
    """Return elements of weights and biases in turn, about `parameters` together."""
    weight = max(1, round(parameters / PAIRS) - bias)
    return [weight, bias] * PAIRS


def gramians_of(products: object) -> ops.Gramians:
    """Return ours, or S and X [2, K, K] of plain torch, as Gramians."""
    if isinstance(products, ops.Gramians):
        return products
    assert isinstance(products, Tensor)
    total, cross = products.double()
    return ops.Gramians(total, cross, total[None], cross[None])


def competitors_of(
    runs: Sequence[Mapping[str, Run]], synchronizing: Collection[str] = ("python",)
) -> dict[str, Competitor]:
    """Return each competitor on all memories in turn; the reference always synchronizes."""
    return {by: Competitor([each[by] for each in runs], by in synchronizing) for by in runs[0]}
