"""What each operation costs: every backend, plain torch, TorchJD, the published code, a copy.

Bytes that must move per parameter, with gradients of e bytes and K tasks: accumulate e + 4 in the
first micro-batch, which overwrites, and e + 8 in a later one; gramian 4K + 2K with a bfloat16
history; combine 4K + 8 + 4 + 2K with momentum, float32 outputs and the new history; graddrop
4K + 8 + 4; aggregation, another method without history and momentum as TorchJD does it,
4K + 4K + 4. A mask adds an eighth of one. The copy reads half of the bytes and writes half;
"fraction" is its time divided by that of the operation, round by round. TorchJD and the published
code move other bytes; the copy beside them is that of ours. In "resolution" TorchJD stands beside
GCond with history and momentum, in "aggregation" beside the same method.

Nobody's result is timed before it was checked: ours and plain torch's against float64 (accumulate
against the same sum in float32, graddrop for being sums of one sign), TorchJD's against our methods
of the same names, the published code's for being a combination of the gradients. What prepares the
published code for a call, which is not timed, leaves a part of its accumulators in the cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import others
from bench.clock import Clock, Run, Way, copies, laps_of, quartiles
from bench.counting import count
from bench.inputs import BETA, TOLERANCE, Gradients, Layout, Storage, layout_of
from bench.models import shapes_of
from bench.record import cache_bytes, free_bytes
from gcond_kernels import ops

Figure = dict[str, Any]

EVEN = "even"
# Weights and biases in turn, as in a model, where no model is named.
PAIRS, BIAS = 150, 1024
# Memory that torch and the graphs need beside the tensors.
SPARE_BYTES = 2_000_000_000
SECONDS_OF_A_COMPARISON = 2.0
TASKS_OF_SIZES = 2
# Of so many tasks variants are measured too: masks, weights of each tensor's own, graddrop.
TASKS_OF_VARIANTS = 2
# The published code moves kilobytes per parameter, by the square of the tasks: what would take it
# minutes is left out.
MOST_OF_PUBLISHED = 500_000_000
MOST_TASKS_WITH_TARGET = 8
LEAST_PARAMETERS_WITH_TARGET = 80_000_000
SMALL_MODEL = "mobilenetv3_small"
CPU_MODEL = "convnext_tiny"


class Case(NamedTuple):
    """What is measured: an operation on the tensors of a model, and so many tasks."""

    operation: str
    model: str
    layout: Layout
    tasks: int
    what: str = ""

    def figure(self, by: str, **values: Any) -> Figure:
        """A figure of this case by someone."""
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
    """What a figure is held to: at least `bound` of a fraction, at most that of all else."""

    quantity: str
    bound: float

    def judged(self, median: float) -> Figure:
        """The fields of a figure that say so."""
        met = median >= self.bound if self.quantity == "fraction" else median <= self.bound
        return {"target": {self.quantity: self.bound}, "met": met}


OPERATION = Target("fraction", 0.90)
RESOLUTION = Target("fraction", 0.88)
RESOLUTION_ON_CPU = Target("fraction", 1 / 1.6)
GRAPH = Target("seconds", 25e-6)
EAGER = Target("seconds", 150e-6)
ACCUMULATE = Target("seconds", 60e-6)


class Bench:
    """Measures operations on one device.

    Args:
        device: where.
        models: names of shape lists, see `shapes_of`.
        sizes: parameters of models of even tensors beside those, for cost against N.
        tasks: numbers of tasks K.
        published: the module of the published implementation, if a user has it at hand.
        seconds: about how long all rounds of a comparison take.
    """

    def __init__(
        self,
        device: torch.device,
        models: Sequence[str],
        sizes: Sequence[int],
        tasks: Sequence[int],
        published: ModuleType | None = None,
        seconds: float = SECONDS_OF_A_COMPARISON,
    ) -> None:
        self.device, self.tasks, self.published = device, tasks, published
        self.clock = Clock(device, seconds)
        self.cache = cache_bytes(device)
        self.backends = backends_of(device)
        named = [(name, layout_of([count_of(s) for s in shapes_of(name)])) for name in models]
        even = [(EVEN, layout_of(even_sizes(size))) for size in sizes]
        self.models = sorted(named + even, key=lambda model: model[1].parameters)

    def figures(self) -> Iterator[Figure]:
        """All figures; what takes longest comes last."""
        for tasks in self.tasks:
            yield from self._safely(Case("arbitrate", EVEN, layout_of([1024]), tasks), self._tiny)
        if self.device.type == "cuda":
            yield from self._host_figures()
        for model, layout in self.models:
            yield from self._accumulate_figures(model, layout)
            for tasks in (TASKS_OF_SIZES,) if model == EVEN else self.tasks:
                yield from self._safely(Case("resolution", model, layout, tasks), self._resolution)

    def _safely(self, case: Case, measure: Callable[[Case], Iterator[Figure]]) -> Iterator[Figure]:
        """What goes wrong is a figure too: the others can be measured still."""
        try:
            yield from measure(case)
        except Exception as error:
            yield case.figure("all", error=f"{type(error).__name__}: {error}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _lacking(self, tensors: int, budget: int) -> str | None:
        """Says so where the tensors and the buffers of the copy are more than is free."""
        needed, free = tensors + min(budget, 2_000_000_000) + SPARE_BYTES, free_bytes(self.device)
        if needed <= free:
            return None
        return f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"

    def compare(
        self,
        case: Case,
        ways: Mapping[str, Way],
        budget: int,
        target: Target | None = None,
        counted: Sequence[str] = (),
    ) -> Iterator[Figure]:
        """Times ways of doing the same, and a copy of `budget` bytes; all take turns.

        Args:
            case: what is done.
            ways: by whom.
            budget: the fewest bytes that must move.
            target: what ours are held to.
            counted: of whom bytes, launches and reads by the host are counted as well: of all
                that goes through torch's operations.
        """
        counts = {by: counts_of(ways[by]) for by in counted}
        every = dict(ways)
        if budget:
            laps = len(next(iter(ways.values())).calls)
            every["copy"] = copies(budget, laps, self.device)
        times = self.clock.times(every)
        for by in ways:
            seconds = quartiles(times[by])
            figure = case.figure(by, bytes=budget, rounds=len(times[by]), seconds=seconds)
            if budget:
                pairs = zip(times["copy"], times[by], strict=True)
                figure["copy_seconds"] = quartiles(times["copy"])
                figure["fraction"] = quartiles([copy / own for copy, own in pairs])
            if target and self._is_judged(by):
                figure |= target.judged(figure[target.quantity]["median"])
            yield figure | counts.get(by, {})

    def _is_judged(self, by: str) -> bool:
        """Ours are held to targets, on a GPU the kernels."""
        kernels = by.partition(",")[0] in ("triton", "cuda")
        return kernels or (by == "python" and self.device.type == "cpu")

    def _laps(self, bytes_of_one: int) -> int:
        return laps_of(bytes_of_one, self.cache)

    def _tiny(self, case: Case) -> Iterator[Figure]:
        """Arbitrate, which moves next to nothing."""
        storage = Storage(case.tasks, case.layout, self.device)
        products = storage.products_in_float64()
        exact = storage.arbitrate(products, "python").weights
        ways = {}
        for backend in self.backends:
            storage.forget()
            weights = storage.arbitrate(products, backend).weights
            if not torch.allclose(weights, exact):
                raise AssertionError(f"arbitrate by {backend}: weights {weights}, not {exact}")
            run = partial(storage.arbitrate, products, backend)
            ways[backend] = Way([run], waits=backend == "python")
        yield from self.compare(case, ways, 0, counted=python_of(ways))

    def _host_figures(self) -> Iterator[Figure]:
        """What single calls cost the host; accumulate also without the checks around it."""
        layout = layout_of([count_of(shape) for shape in shapes_of(SMALL_MODEL)])
        storage = Storage(2, layout, self.device)
        case = Case("resolution", SMALL_MODEL, layout, 2, "host time")
        for backend in self.backends:
            run = partial(storage.resolve, backend)
            yield from self._safely(case, partial(self._on_host, backend, run, EAGER))
        layout = layout_of(even_sizes(2_500_000, bias=128))
        gradients = Gradients(layout, torch.float32, self.device)
        for backend in self.backends:
            case = Case("accumulate", EVEN, layout, 1, "host time")
            room = ops.backend_for(backend, self.device)
            where = ops.Layout.of(layout.offsets, layout.sizes)
            run = partial(room.accumulate, gradients.row, gradients.gradients, where, 1.0, False)
            yield from self._safely(case, partial(self._on_host, backend, run, ACCUMULATE))
            case = case._replace(what="host time with checks")
            run = partial(gradients.accumulate, backend, False)
            yield from self._safely(case, partial(self._on_host, backend, run, ACCUMULATE))

    def _on_host(self, backend: str, run: Run, target: Target, case: Case) -> Iterator[Figure]:
        run()
        seconds = quartiles(self.clock.host_times(run))
        judged = {} if backend == "python" else target.judged(seconds["median"])
        yield case.figure(backend, seconds=seconds, **judged)

    def _accumulate_figures(self, model: str, layout: Layout) -> Iterator[Figure]:
        """Accumulate, for gradients of two types, in a first and in a later micro-batch."""
        for dtype in (torch.float32, torch.bfloat16):
            for turn in ("first", "later"):
                case = Case("accumulate", model, layout, 1, f"{str(dtype)[6:]}, {turn}")
                yield from self._safely(case, partial(self._accumulate, dtype, turn == "first"))

    def _accumulate(self, dtype: torch.dtype, overwrite: bool, case: Case) -> Iterator[Figure]:
        budget = case.layout.parameters * (dtype.itemsize + (4 if overwrite else 8))
        size = Gradients.bytes_of(case.layout, dtype)
        laps = self._laps(size)
        if lacking := self._lacking(size * laps, budget * laps):
            yield case.figure("all", skipped=lacking)
            return
        pool = [Gradients(case.layout, dtype, self.device) for _ in range(laps)]
        runs = [self._accumulations(gradients, overwrite) for gradients in pool]
        for by, run in runs[0].items():
            before = pool[0].row.clone()
            run()
            pool[0].check(before, overwrite, by)
        ways = ways_of(runs)
        target = OPERATION if self._has_target(case) else None
        yield from self.compare(case, ways, budget, target, counted_of(ways))

    def _accumulations(self, gradients: Gradients, overwrite: bool) -> dict[str, Run]:
        runs: dict[str, Run] = {
            backend: partial(gradients.accumulate, backend, overwrite) for backend in self.backends
        }
        return runs | others.accumulations(gradients, overwrite)

    def _has_target(self, case: Case) -> bool:
        """Whether the caches and the launches hardly count, and so the copy is a measure."""
        return (
            self.device.type == "cuda"
            and case.tasks <= MOST_TASKS_WITH_TARGET
            and case.layout.parameters >= LEAST_PARAMETERS_WITH_TARGET
        )

    def _resolution(self, case: Case) -> Iterator[Figure]:
        """Gramian, combine and a whole resolution."""
        layout, tasks = case.layout, case.tasks
        size = Storage.bytes_of(tasks, layout)
        laps = self._laps(size)
        # And what plain torch and TorchJD allocate within.
        needed = size * laps + 8 * layout.length
        if lacking := self._lacking(needed, layout.parameters * (12 * tasks + 12) * laps):
            yield case.figure("all", skipped=lacking)
            return
        pool = [Storage(tasks, layout, self.device) for _ in range(laps)]
        yield from self._gramian(case._replace(operation="gramian"), pool)
        yield from self._combine(case._replace(operation="combine"), pool)
        if tasks == TASKS_OF_VARIANTS and case.model != EVEN:
            yield from self._variants(case, pool)
        yield from self._whole(case, pool)
        yield from self._aggregation(case._replace(operation="aggregation"), pool)

    def _gramian(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        def runs_of(storage: Storage) -> dict[str, Run]:
            runs: dict[str, Run] = {b: partial(storage.gramian, b) for b in self.backends}
            if not others.takes_long(storage):
                runs |= others.products(storage)
            return runs

        for by, run in runs_of(pool[0]).items():
            pool[0].check_products(gramians_of(run()), f"gramian by {by}")
        ways = ways_of([runs_of(storage) for storage in pool])
        target = OPERATION if self._has_target(case) else None
        budget = case.layout.parameters * 6 * case.tasks
        yield from self.compare(case, ways, budget, target, counted_of(ways))

    def _combine(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        products = pool[0].products_in_float64()
        decision = pool[0].arbitrate(products, "python")

        def runs_of(storage: Storage) -> dict[str, Run]:
            runs: dict[str, Run] = {
                b: partial(storage.combine, products, decision, b) for b in self.backends
            }
            return runs | others.combinations(storage, decision.weights.tolist())

        for by, run in runs_of(pool[0]).items():
            pool[0].forget()
            run()
            pool[0].check_written(decision.weights, f"combine by {by}")
            pool[0].check_kept(f"combine by {by}")
        ways = ways_of([runs_of(storage) for storage in pool])
        target = OPERATION if self._has_target(case) else None
        budget = case.layout.parameters * (6 * case.tasks + 12)
        yield from self.compare(case, ways, budget, target, counted_of(ways))

    def _variants(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        """Gramian and combine with a mask and weights per tensor; graddrop."""
        total, tensors = case.layout.parameters, len(case.layout.sizes)
        words = -(-case.layout.length // 32)
        mask = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device=self.device)
        products = pool[0].products_in_float64()
        decision = pool[0].arbitrate(products, "python")
        each = decision._replace(weights=decision.weights.repeat(tensors, 1))
        variants: list[tuple[str, str, int, Callable[[Storage, str], object]]] = [
            ("gramian", "masked", total * 12 + total // 8, lambda s, b: s.gramian(b, mask)),
            (
                "combine",
                "masked, weights per tensor",
                total * 24 + total // 8,
                lambda s, b: s.combine(products, each, b, mask),
            ),
            ("graddrop", "", total * 20, lambda s, b: s.graddrop(b)),
        ]
        for backend in self.backends:
            self._check_variants(pool[0], mask, each, backend)
        for operation, what, budget, run in variants:
            runs = [{b: partial(run, storage, b) for b in self.backends} for storage in pool]
            ways = ways_of(runs)
            yield from self.compare(
                case._replace(operation=operation, what=what), ways, budget, None, python_of(ways)
            )

    def _check_variants(
        self, storage: Storage, mask: Tensor, each: ops.Arbitration, backend: str
    ) -> None:
        storage.forget()
        products = storage.gramian(backend, mask)
        with storage.masked(mask):
            storage.check_products(products, f"masked gramian by {backend}")
        storage.combine(products, each, backend, mask)
        with storage.masked(mask):
            storage.check_written(each.weights[0], f"masked combine by {backend}")
        storage.forget()
        storage.graddrop(backend)
        storage.check_dropped(f"graddrop by {backend}")

    def _whole(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        """A whole resolution, beside all others."""
        weights = self._weights_of(pool[0])
        for by, run in self._resolutions(pool[0]).items():
            pool[0].forget()
            run()
            # Inner products of plain torch are float32 throughout, and so are the weights.
            tolerance = TOLERANCE if by.partition(",")[0] in ops.BACKENDS else others.TOLERANCE
            pool[0].check_written(weights, f"resolution by {by}", tolerance)
            pool[0].check_kept(f"resolution by {by}")
        runs = [self._resolutions(storage) for storage in pool]
        ways = ways_of(runs, ("python", others.FOREACH, others.LOOP))  # the host reads the weights
        theirs, failed = self._aggregations(case, pool)
        ways |= theirs
        if self.published is not None:
            made, left_out = self._published(self.published, case, pool)
            ways, failed = ways | made, failed + left_out
        budget = case.layout.parameters * (12 * case.tasks + 12)
        target = self._target_of_whole(case)
        yield from self.compare(case, ways, budget, target, counted_of(ways))
        yield from failed
        if others.takes_long(pool[0]):
            yield case.figure("plain torch", skipped="all pairs, one by one, take too long")

    def _aggregation(self, case: Case, pool: Sequence[Storage]) -> Iterator[Figure]:
        """Methods that TorchJD has too, by each of us."""
        theirs, _ = self._aggregations(case, pool)
        if not theirs:
            return
        ours = others.our_methods()

        def runs_of(storage: Storage) -> dict[str, Run]:
            return {
                f"{backend}, {name}": partial(storage.aggregate, method, backend)
                for name, method in ours.items()
                for backend in self.backends
            }

        S = pool[0].products_in_float64().total
        for by, run in runs_of(pool[0]).items():
            pool[0].forget()
            run()
            # A solver may magnify the rounding of the inner products.
            weights = ours[by.partition(", ")[2]](S)
            pool[0].check_written(weights, f"aggregation by {by}", others.TOLERANCE)
        runs = [runs_of(storage) for storage in pool]
        ways = ways_of(runs, runs[0]) | theirs  # with the solvers, as TorchJD with its own
        budget = case.layout.parameters * (8 * case.tasks + 4)
        yield from self.compare(case, ways, budget, None, counted_of(ways))

    def _target_of_whole(self, case: Case) -> Target | None:
        if self.device.type == "cpu":
            small = case.tasks > 4 or case.model != CPU_MODEL
            return None if small else RESOLUTION_ON_CPU
        if case.model == SMALL_MODEL and case.tasks == 2:
            return GRAPH
        return RESOLUTION if self._has_target(case) else None

    def _weights_of(self, storage: Storage) -> Tensor:
        """What GCond decides on the storage's gradients in its first step, in float64."""
        storage.forget()
        decision = storage.arbitrate(storage.products_in_float64(), "python")
        return decision.weights

    def _resolutions(self, storage: Storage) -> dict[str, Run]:
        """By each backend, in each form that can be had, and in plain torch."""
        runs: dict[str, Run] = {}
        for backend in self.backends:
            if backend != "cuda":
                runs[backend] = partial(storage.resolve, backend)
                continue
            runs["cuda, apart"] = partial(storage.resolve_apart, backend)
            # Would it be so with rows of one element? Then nothing but their size is against it.
            short = storage.gradients()._replace(accumulators=storage.rows[:, :1])
            if ops.backend_for("cuda", self.device).resolves_at_once(short):
                runs["cuda, one launch"] = storage.resolve_at_once
        if not others.takes_long(storage):
            runs |= others.resolutions(storage)
        return runs

    def _aggregations(
        self, case: Case, pool: Sequence[Storage]
    ) -> tuple[dict[str, Way], list[Figure]]:
        """TorchJD's, of the same gradients; and figures that say which of them take no part."""
        if reason := others.torchjd_missing():
            return {}, [case.figure("TorchJD", skipped=reason)]
        runs = [others.aggregations(storage.rows) for storage in pool]
        ways, failed = {}, []
        for by, run in runs[0].items():
            try:
                others.check_aggregation(by, run, pool[0])
            except (AssertionError, RuntimeError) as error:
                failed.append(case.figure(by, error=f"{type(error).__name__}: {error}"))
            else:
                ways[by] = Way([each[by] for each in runs], waits=True)
        return ways, failed

    def _published(
        self, published: ModuleType, case: Case, pool: Sequence[Storage]
    ) -> tuple[dict[str, Way], list[Figure]]:
        """The published implementation's, of the same gradients; or a figure that says why not."""
        from bench.published import PublishedResolution

        layout, by = case.layout, others.PUBLISHED
        if layout.parameters * case.tasks**2 > MOST_OF_PUBLISHED:
            return {}, [case.figure(by, skipped="takes too long")]
        # Twice accumulators in bfloat16, a copy of the gradients, parameters and their gradients,
        # momentum, and what it allocates within.
        if lacking := self._lacking(len(pool) * layout.parameters * 16 * (case.tasks + 1), 0):
            return {}, [case.figure(by, skipped=lacking)]
        made = [
            PublishedResolution(published, storage.layout.sizes, storage.packed(), BETA)
            for storage in pool
        ]
        made[0].fill()
        made[0].run()
        try:
            others.check_combination(made[0].outputs, pool[0], by)
        except AssertionError as error:
            return {}, [case.figure(by, error=str(error))]
        runs, fills = [each.run for each in made], [each.fill for each in made]
        return {by: Way(runs, waits=True, prepare=fills)}, []


def backends_of(device: torch.device) -> list[str]:
    """The backends that compute there; on a CPU the kernels are for tests, not for speed."""
    if device.type == "cpu":
        return ["python"]
    return [backend for backend in ops.BACKENDS if ops.unavailable(backend, device) is None]


def count_of(shape: Sequence[int]) -> int:
    """Elements of a tensor."""
    return torch.Size(shape).numel()


def even_sizes(parameters: int, bias: int = BIAS) -> list[int]:
    """Elements of weights and biases in turn, about `parameters` together."""
    weight = max(1, round(parameters / PAIRS) - bias)
    return [weight, bias] * PAIRS


def gramians_of(products: object) -> ops.Gramians:
    """What an operation gave back: ours, or S and X [2, K, K] of plain torch."""
    if isinstance(products, ops.Gramians):
        return products
    assert isinstance(products, Tensor)
    total, cross = products.double()
    return ops.Gramians(total, cross, total[None], cross[None])


def ways_of(
    runs: Sequence[Mapping[str, Run]], waiting: Collection[str] = ("python",)
) -> dict[str, Way]:
    """Each way on all memories in turn; of the reference all operations wait for the device."""
    return {by: Way([each[by] for each in runs], waits=by in waiting) for by in runs[0]}


def counts_of(way: Way) -> dict[str, int]:
    """Bytes, launches, allocations and reads by the host of one call."""
    if way.prepare:
        way.prepare[0]()
    return count(way.calls[0])._asdict()


def counted_of(ways: Mapping[str, Way]) -> list[str]:
    """Those that work by torch's operations alone, which can be counted."""
    return [by for by in ways if by.partition(",")[0] not in ("triton", "cuda")]


def python_of(ways: Mapping[str, Way]) -> list[str]:
    """The reference, where it takes part."""
    return [by for by in ways if by == "python"]
