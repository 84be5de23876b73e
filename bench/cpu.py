"""The costs on a CPU: each operation, aggregation and training step beside what it is held to.

"resolution" is what the optimizer calls: `ops.resolve` of GCond without its checks, with a bfloat16
history and without momentum, and the result in the first accumulator. It must move 12K + 4 bytes
per parameter, 4K + 2K to compare, 4K + 4 + 2K to combine, and stands beside a copy of as many
bytes, half of them read and half written; the reference; and TorchJD's PCGrad, which is given the
same gradients as a matrix and keeps no history. "accumulate" moves e + 4 bytes of gradients of e
bytes in the first micro-batch, e + 8 in a later one. "aggregation" is `gramian`, the method's
weights and `combine`, as the optimizer calls them, without history, beside TorchJD's aggregator of
the same name. "step" is
`backward` and `step` of GCondFused, beside a forward pass, K backward passes and a step of the same
optimizer in exact mode, and beside plain accumulation of as many micro-batches in stochastic mode;
one forward pass per micro-batch in all.

All ways of a comparison take turns within a round, in one order and the other; "relative" is our
time over the other's, round by round. Operations on a million parameters or more go over memory
that no cache holds; 10 k parameters stay in it, where the fixed cost of a call is what counts.
Every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from bench import others, training
from bench.clock import MOST_ROUNDS, Clock, Competitor, Run, copies, laps_of
from bench.inputs import TOLERANCE, Gradients, Layout, Storage, layout_of
from bench.operations import (
    Case,
    Target,
    even_sizes,
    lacking_memory,
    model_layout,
    torchjd_aggregations,
)
from bench.recipe import Benchmark
from bench.record import Figure, InputError, cache_bytes, quartiles
from bench.sections import group_of, target_of
from bench.table import Column, ratio_of, text, timed
from bench.training import Training
from bench.workloads import LinearTraining, MlpTraining
from gcond_kernels import methods, ops

CPU = torch.device("cpu")
OURS, COPY, REFERENCE, THEIRS = "auto", "copy", "reference", "TorchJD"
CHECKED = "ops.resolve"  # which checks its arguments
PCGRAD = f"{THEIRS} PCGrad"
ROUNDS, QUICK_ROUNDS = 15, 5
SECONDS = 2.0

MILLION = 1_000_000
EVEN = {
    "even 10 k": 10_000,
    "even 1 M": MILLION,
    "even 25 M": 25 * MILLION,
    "even 300 M": 300 * MILLION,
}
SMALLEST, MOBILENET = "even 10 k", "mobilenetv3_small"
# The layouts of a section, and numbers of tasks; what takes longest comes last.
RESOLUTION = {
    SMALLEST: (2,),
    "even 1 M": (2,),
    MOBILENET: (2, 4, 8, 16, 50),
    "even 25 M": (2, 4),
    "convnext_tiny": (2, 4, 8),
    "convnext_base": (2,),
    "even 300 M": (2,),
}
ACCUMULATE = {MOBILENET: (1,), "even 25 M": (1,)}
AGGREGATION = {name: RESOLUTION[name] for name in (SMALLEST, "even 1 M", MOBILENET, "even 25 M")}
LINEAR = "even 1 M", MOBILENET, "even 25 M"
MLPS = 2, 4  # by their tasks
TRAINED = (MOBILENET, "convnext_tiny", "bert_small")
MICRO_BATCHES = 4  # of a window in stochastic mode
WEIGHTED_TASKS = 256
QUICK_PARAMETERS, QUICK_TASKS = 3 * MILLION, 4

# Aims, by what stands beside: a median is at most this.
AS_A_COPY, OF_THEIRS = Target("relative", 1.0), Target("relative", 0.4)
MANY_TASKS, FEW_TASKS = Target("relative", 3.0), 8
ACCUMULATED = Target("relative", 1.1)
FIXED_COST = Target("seconds", 60e-6)
EXACT, EXACT_OF_A_MODEL = Target("relative", 1.5), Target("relative", 1.08)
STOCHASTIC = Target("relative", 1.03)
WEIGHTING, ARBITRATION = Target("relative", 1.0), Target("seconds", 0.5)

Aims = Mapping[str, Target]


class Timing(NamedTuple):
    """How a comparison is timed, and what is left out."""

    clock: Clock
    cache: int
    quick: bool

    def takes(self, parameters: int, tasks: int) -> bool:
        """Return whether a case is measured."""
        return not self.quick or (parameters <= QUICK_PARAMETERS and tasks <= QUICK_TASKS)

    def cases(self, operation: str, models: Mapping[str, Sequence[int]]) -> Iterator[Case]:
        """Yield the cases of a section."""
        for model, numbers in models.items():
            layout = layout_named(model)
            for tasks in numbers:
                if self.takes(layout.parameters, tasks):
                    yield Case(operation, model, layout, tasks)

    def laps(self, case: Case, size: int) -> int:
        """Return on how many memories a case is timed; what is small may stay in the caches."""
        return laps_of(size, self.cache) if case.layout.parameters > MILLION / 2 else 1

    def compare(
        self, case: Case, competitors: Mapping[str, Competitor], aims: Aims
    ) -> Iterator[Figure]:
        """Time ours and all others in turn; yield a figure for each other, and of our own aim."""
        times = self.clock.times(competitors)
        own = times[OURS]
        for beside, taken in times.items():
            figure = case.figure(OURS, section="cpu", rounds=len(own), seconds=quartiles(own))
            figure["backend"] = ops.backend_for(OURS, CPU).name
            if beside != OURS:
                figure["beside"], figure["beside_seconds"] = beside, quartiles(taken)
                ratios = [a / b for a, b in zip(own, taken, strict=True)]
                figure["relative"] = quartiles(ratios)
            target = aims.get(beside)
            if target is not None:
                figure |= target.judged(figure[target.quantity]["median"])
            if target is not None or beside != OURS:
                yield figure


def safely(case: Case, measure: Callable[[Case], Iterator[Figure]]) -> Iterator[Figure]:
    """Make a figure of an error: the others can be measured still."""
    try:
        yield from measure(case)
    except Exception as error:
        yield case.figure(OURS, section="cpu", error=f"{type(error).__name__}: {error}")
    gc.collect()


def layout_named(name: str) -> Layout:
    """Return the layout of a model, or of 300 even tensors."""
    if name not in EVEN:
        return model_layout(name)
    return layout_of(even_sizes(EVEN[name], bias=min(1024, EVEN[name] // 600)))


def resolution_figures(timing: Timing) -> Iterator[Figure]:
    """Measure a resolution beside a copy, the reference and TorchJD."""
    for case in timing.cases("resolution", RESOLUTION):
        yield from safely(case, partial(measure_resolution, timing))


def measure_resolution(timing: Timing, case: Case) -> Iterator[Figure]:
    """Time ops.resolve of one case beside all others."""
    size = Storage.bytes_of(case.tasks, case.layout)
    laps, budget = timing.laps(case, size), case.layout.parameters * (12 * case.tasks + 4)
    # And the copy of the accumulators, and the result that TorchJD allocates.
    more = 4 * case.layout.length * (case.tasks * laps + 1)
    if lacking := lacking_memory(size * laps + more, budget * laps, CPU):
        yield case.figure(OURS, section="cpu", skipped=lacking)
        return
    pool = [Storage(case.tasks, case.layout, CPU, has_momentum=False) for _ in range(laps)]
    weights = pool[0].arbitrate(pool[0].products_in_float64(), "python").weights
    # As the optimizer, which knows its own tensors.
    fused = ops.backend_for(OURS, CPU).resolves_at_once(pool[0].gradients())
    resolve = Storage.resolve_at_once if fused else Storage.resolve
    ways: dict[str, Callable[[Storage], None]] = {
        OURS: lambda storage: resolve(storage, OURS),
        REFERENCE: lambda storage: storage.resolve("python"),
    }
    if case.model == SMALLEST:
        ways[CHECKED] = lambda storage: storage.resolve(OURS)
    for by, way in ways.items():
        pool[0].check_step(partial(way, pool[0]), weights, by)
    failed: list[Figure] = []
    theirs = torchjd_aggregations(case, pool, failed, ["PCGrad"])
    for storage in pool:
        storage.write_in_place()
    competitors = {
        by: Competitor([partial(way, storage) for storage in pool]) for by, way in ways.items()
    }
    aims = {PCGRAD: OF_THEIRS}
    if case.model == SMALLEST:
        aims[OURS] = FIXED_COST
    else:
        competitors[COPY] = copies(budget, laps, CPU)
        aims[COPY] = MANY_TASKS if case.tasks > FEW_TASKS else AS_A_COPY
    yield from timing.compare(case, competitors | theirs, aims)
    yield from failed


def accumulate_figures(timing: Timing) -> Iterator[Figure]:
    """Measure the accumulation of one task's gradients beside a copy."""
    dtypes = torch.float32, torch.bfloat16
    for case, dtype, turn in product(
        timing.cases("accumulate", ACCUMULATE), dtypes, ("first", "later")
    ):
        named = case._replace(what=f"{str(dtype)[6:]}, {turn}")
        yield from safely(named, partial(measure_accumulate, timing, dtype, turn == "first"))


def measure_accumulate(
    timing: Timing, dtype: torch.dtype, overwrite: bool, case: Case
) -> Iterator[Figure]:
    """Time ops.accumulate of one case beside a copy."""
    laps = timing.laps(case, Gradients.bytes_of(case.layout, dtype))
    budget = case.layout.parameters * (dtype.itemsize + (4 if overwrite else 8))
    pool = [Gradients(case.layout, dtype, CPU) for _ in range(laps)]
    before = pool[0].accumulator.clone()
    pool[0].accumulate(OURS, overwrite)
    pool[0].check(before, overwrite, OURS)
    own = Competitor([partial(each.accumulate, OURS, overwrite) for each in pool])
    competitors = {OURS: own, COPY: copies(budget, laps, CPU)}
    yield from timing.compare(case, competitors, {COPY: ACCUMULATED})


def aggregation_figures(timing: Timing) -> Iterator[Figure]:
    """Measure the methods that TorchJD has too beside its."""
    for case, name in product(timing.cases("aggregation", AGGREGATION), others.METHODS):
        yield from safely(case._replace(what=name), partial(measure_aggregation, timing))


def measure_aggregation(timing: Timing, case: Case) -> Iterator[Figure]:
    """Time one method on one case beside TorchJD's."""
    method = others.our_methods()[case.what]
    laps = timing.laps(case, Storage.bytes_of(case.tasks, case.layout))
    pool = [Storage(case.tasks, case.layout, CPU, has_momentum=False) for _ in range(laps)]
    weights = method(pool[0].products_in_float64().total)
    pool[0].aggregation(method, OURS)()
    if case.what == "PCGrad" and case.tasks > 2:  # it draws another order each time
        others.check_combination(pool[0].outputs, pool[0], OURS)
    else:  # a solver may magnify the rounding of the inner products
        pool[0].check_written(weights, OURS, others.TOLERANCE)
    failed: list[Figure] = []
    theirs = torchjd_aggregations(case, pool, failed, [case.what])
    for storage in pool:
        storage.write_in_place()
    own = Competitor([storage.aggregation(method, OURS) for storage in pool])
    aims = dict.fromkeys(theirs, OF_THEIRS)
    yield from timing.compare(case, {OURS: own} | theirs, aims)
    yield from failed


def training_figures(timing: Timing) -> Iterator[Figure]:
    """Measure training steps of small and of real models, exact and stochastic."""
    for mode, micro_batches in (("exact", 1), ("stochastic", MICRO_BATCHES)):
        for trained in trainings(micro_batches):
            sizes = [parameter.numel() for parameter in trained.new_model().parameters()]
            tasks = len(trained.tasks)
            if not timing.takes(sum(sizes), tasks):
                continue
            case = Case("step", trained.name, layout_of(sizes), tasks, mode)
            yield from safely(case, partial(measure_step, timing, trained))


def trainings(micro_batches: int) -> Iterator[Training]:
    """Yield what is trained; what takes longest comes last."""
    for heads in MLPS:
        yield MlpTraining("5x64 MLP", CPU, 64, 0, micro_batches, SECONDS, heads)
    for name in LINEAR:
        sizes = layout_named(name).sizes
        yield LinearTraining(f"linear losses, {name}", CPU, 1, 0, micro_batches, SECONDS, sizes)
    for name in TRAINED:
        yield Training(name, CPU, 2 if name == "bert_small" else 8, 64, micro_batches, SECONDS)


def measure_step(timing: Timing, trained: Training, case: Case) -> Iterator[Figure]:
    """Time backward and step of one training beside what needs no resolution."""
    exact = case.what == "exact"
    training.check_sum(trained, case.what)
    ways = {
        OURS: partial(training.gcond, mode=case.what),
        "K backward passes" if exact else "plain accumulation": (
            training.backward_passes if exact else training.plain
        ),
    }
    windows = {by: training.new_window(trained, made_by)[1] for by, made_by in ways.items()}
    competitors = {by: Competitor([partial(w, trained.batches)]) for by, w in windows.items()}
    of_a_model = EXACT_OF_A_MODEL if trained.name in TRAINED else EXACT
    aims = {by: of_a_model if exact else STOCHASTIC for by in ways if by != OURS}
    yield from timing.compare(case, competitors, aims)


def weighting_figures(timing: Timing) -> Iterator[Figure]:
    """Measure the weights of many tasks from their Gramian."""
    if timing.quick:
        return
    case = Case("weighting", "Gramian", layout_of([WEIGHTED_TASKS * 2]), WEIGHTED_TASKS)
    yield from safely(case._replace(what="UPGrad"), partial(measure_upgrad, timing))
    yield from safely(case._replace(what="GCond"), partial(measure_arbitrate, timing))


def measure_upgrad(timing: Timing, case: Case) -> Iterator[Figure]:
    """Time UPGrad's weights beside TorchJD's."""
    if reason := others.torchjd_missing():
        yield case.figure(OURS, section="cpu", skipped=reason)
        return
    J = torch.randn(case.tasks, case.layout.parameters, dtype=torch.float64)
    S = J @ J.mT
    theirs = others.upgrad_weighting()
    ridge = others.UPGRAD_REGULARISATION * S.trace() * torch.eye(case.tasks)
    difference = theirs(S) - methods.UPGrad()(S + ridge)
    if difference @ S @ difference > others.TORCHJD_TOLERANCE**2 * S.diagonal().max():
        raise AssertionError("UPGrad: TorchJD's weights are others than ours")
    runs: dict[str, Run] = {
        OURS: partial(methods.UPGrad(), S),
        f"{THEIRS} UPGrad": partial(theirs, S),
    }
    competitors = {by: Competitor([run]) for by, run in runs.items()}
    yield from timing.compare(case, competitors, {f"{THEIRS} UPGrad": WEIGHTING})


def measure_arbitrate(timing: Timing, case: Case) -> Iterator[Figure]:
    """Time GCond's weights, which must be the reference's."""
    storage = Storage(case.tasks, case.layout, CPU, has_momentum=False)
    products, weights = storage.products_in_float64(), []
    for backend in (OURS, "python"):
        storage.reset()
        weights.append(storage.arbitrate(products, backend).weights)
    torch.testing.assert_close(*weights, rtol=TOLERANCE, atol=TOLERANCE)
    own = Competitor([partial(storage.arbitrate, products, OURS)])
    yield from timing.compare(case, {OURS: own}, {OURS: ARBITRATION})


SECTIONS = {
    "resolution": resolution_figures,
    "accumulate": accumulate_figures,
    "aggregation": aggregation_figures,
    "training": training_figures,
    "weighting": weighting_figures,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    about = "what is measured (default: all)"
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help=about)
    about = f"{QUICK_ROUNDS} rounds of small models and few tasks alone, not {ROUNDS} of all"
    parser.add_argument("--quick", action="store_true", help=about)
    about = "threads of torch and of the kernels (default: %(default)s)"
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help=about)


def check(options: argparse.Namespace) -> None:
    """Set the threads and the seed."""
    if options.threads < 1:
        raise InputError(f"--threads {options.threads}: must be 1 or more")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure the sections."""
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    timing = Timing(Clock(CPU, SECONDS, rounds), cache_bytes(CPU), options.quick)
    for name in options.only:
        yield from SECTIONS[name](timing)


def foot(figures: Sequence[Figure]) -> str:
    """Return how many aims are met, and what stands in the columns."""
    met = [figure["met"] for figure in figures if "met" in figure]
    return (
        f"medians with quartiles of {ROUNDS} to {MOST_ROUNDS} rounds, {QUICK_ROUNDS} at least with "
        "--quick; ratio: our time over that beside it, round by round\n"
        f"aims: {sum(met)} of {len(met)} met"
    )


def verdict(figure: Figure) -> str:
    """Return whether the aim is met."""
    return {True: "met", False: "missed"}.get(figure.get("met", ""), "")


COLUMNS = (
    Column("  operation", 30, lambda f: f"  {f['operation']} {f.get('what', '')}", True, True),
    Column("K", 3, text("tasks"), is_name=True),
    Column("time (quartiles)", 28, timed("seconds")),
    Column("beside", 18, text("beside"), left=True),
    Column("its time", 28, timed("beside_seconds")),
    Column("ratio", 18, lambda f: ratio_of(f["relative"]) if "relative" in f else ""),
    Column("aim", 9, target_of),
    Column("", 0, verdict),
)
BENCHMARK = Benchmark(
    __doc__.splitlines()[0], COLUMNS, figures, add_arguments, check, group_of, foot
)
