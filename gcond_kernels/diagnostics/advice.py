"""Advice in words: conflict or imbalance, what the result did to each task, what to try first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from gcond_kernels.diagnostics.records import (
    ALL_ZONES,
    InUse,
    Record,
    mean_incidence,
    percent,
    record_key,
    signed,
)

if TYPE_CHECKING:
    from gcond_kernels.diagnostics.recorder import Recorder

# The verdict's bounds are rules of thumb. Those with a scene were set on the plain sum's steps
# there, where it is measured what helps (bench/experiments/README.md).
# With 20 steps a share is known to about 20 points; the same holds for the comparisons of a layer.
ENOUGH_STEPS = 20
# Whom the result follows least changes at first: early on Burgers' equation that may be its
# boundary alone, and with that loss x 10 it ends at 1.7 times the plain sum's error.
ENOUGH_FOR_WEIGHTS = 500
# Where fewer steps have a conflict, the other 95 % are the plain sum to the last bit.
RARE_SHARE = 0.05
# A projection at this cosine takes 5 % of a gradient's norm away: less than the gradients of
# two micro-batches usually differ by.
WEAK_COSINE = -0.05
# Moderate and critical conflicts in one step of ten are a part of training, not a mishap.
NOTABLE_SHARE = 0.1
# So are steps against a task in one of twenty.
AGAINST_SHARE = 0.05
# Mean cosines of the result with the tasks' gradients are so far apart. (Not medians: where steps
# go against one task and another in turn, the median is that of either.) Half of it separates those
# that are raised together, as Burgers' boundary and initial values are to be.
UNEQUAL = 0.25
# A loss weight is raised tenfold at a time: a finer step changes less than another seed does, and
# 100 at once may overshoot. With the known values' losses x 10 Burgers' equation ends with 0.75 of
# the plain sum's error and with x 100 at 2.2 times as much; Kovasznay's flow, with 0.30 and 0.24.
FACTOR = 10
# From this ratio of norms on FACTOR is nearer to it than 1.
IMBALANCED = math.sqrt(FACTOR)
LAYERS_NAMED = 3
# NashMTL is FairGrad with α = 1.
BALANCING = ("NashMTL", "FairGrad")
PROTECTING = ("UPGrad", "NonConflicting")
LABELS = {"none": "no conflict"}
LATER = (
    "It is too early for loss weights: whom the result follows changes at first. Ask again after\n"
    f"{ENOUGH_FOR_WEIGHTS} steps with the same weights and method."
)
COMPARE = (
    "Whether the model gets better by it, only validation scores tell: compare with the plain sum, "
    "both\nwith several seeds, for another seed alone may change more than the method does."
)


class Figures(NamedTuple):
    """Hold what the verdict is made from, of the steps that compared tasks.

    Attributes:
        steps: their number.
        zones: zone → share of the steps.
        strong: the share that is moderate or critical, and not weak.
        median: the median cosine of the steps in conflict; None without one.
        against: task → share of the steps that raised its loss to first order; empty where it is
            not known, as with GradDrop.
        descent: task → mean cosine of the result with its gradient; empty where against is.
        least: the tasks that it follows least, in both halves of the steps; none where all alike.
        norms: task → median norm of its gradient over shared parameters.
        ratio: median of the largest norm divided by the smallest.
    """

    steps: int
    zones: Mapping[str, float]
    strong: float
    median: float | None
    against: Mapping[str, float]
    descent: Mapping[str, float]
    least: tuple[str, ...]
    norms: Mapping[str, float]
    ratio: float


class Verdict(NamedTuple):
    """Hold a verdict.

    Attributes:
        found: "nothing", "imbalance", "conflict", or "imbalance and conflict".
        raised: the tasks whose loss weight is to be raised first; none where the weights are fine.
        balance: whether a method that balances tasks may be tried.
        protect: whether one may be with which no task's loss rises to first order.
    """

    found: str
    raised: tuple[str, ...] = ()
    balance: bool = False
    protect: bool = False


def verdict_on(figures: Figures) -> Verdict:
    """Return what the figures support, and no more."""
    against = max(figures.against.values(), default=0.0) >= AGAINST_SHARE
    raised = figures.least if figures.steps >= ENOUGH_FOR_WEIGHTS else ()
    if figures.strong >= NOTABLE_SHARE:
        found = "imbalance and conflict" if raised else "conflict"
        return Verdict(found, raised, balance=against or bool(raised), protect=against)
    if raised and figures.ratio >= IMBALANCED:
        return Verdict("imbalance", raised, balance=True)
    return Verdict("nothing")


def served_least(descent: Mapping[str, float], norms: Mapping[str, float]) -> tuple[str, ...]:
    """Return the tasks that the result follows by far less than the best; none where all alike.

    All of them: one weighted alone takes from the others. Where it is not known what the result
    does, those of small gradients.

    Args:
        descent: task → mean cosine of the result with its gradient.
        norms: task → median norm of its gradient.
    """
    if descent:
        best = max(descent.values())
        if best - min(descent.values()) < UNEQUAL:
            return ()
        return tuple(task for task, cosine in descent.items() if best - cosine >= UNEQUAL / 2.0)
    largest = max(norms.values(), default=0.0)
    return tuple(task for task, norm in norms.items() if largest >= IMBALANCED * norm)


def _served_least_all_along(compared: Sequence[Record], tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks served least, where both halves of the records have the same."""
    half = len(compared) // 2
    first, last = (
        served_least(*_service(records, tasks)) for records in (compared[:half], compared[half:])
    )
    return first if first == last else ()


def _service(
    records: Sequence[Record], tasks: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the tasks' mean cosines with the result, and their gradients' median norms."""
    descent, norms = (_known(records, quantity, tasks) for quantity in ("descent", "shared_norm"))
    return (
        {task: statistics.fmean(values) for task, values in descent.items()},
        {task: statistics.median(values) for task, values in norms.items()},
    )


def figures_of(compared: Sequence[Record], tasks: Sequence[str]) -> Figures:
    """Return the figures of records, at least one, of steps that compared tasks."""
    zones = [record["zone"] for record in compared]
    cosines = [record["min_cosine"] for record in compared]
    strong = [
        zone in ("moderate", "critical") and cosine <= WEAK_COSINE
        for zone, cosine in zip(zones, cosines, strict=True)
    ]
    below = [cosine for zone, cosine in zip(zones, cosines, strict=True) if zone != "none"]
    rising, (descent, norms) = _known(compared, "rising", tasks), _service(compared, tasks)
    return Figures(
        steps=len(compared),
        zones={zone: zones.count(zone) / len(zones) for zone in ALL_ZONES},
        strong=statistics.fmean(strong),
        median=statistics.median(below) if below else None,
        against={task: statistics.fmean(values) for task, values in rising.items()},
        descent=descent,
        least=_served_least_all_along(compared, tasks),
        norms=norms,
        ratio=statistics.median(record["norm_ratio"] for record in compared),
    )


def _known(
    records: Sequence[Record], quantity: str, tasks: Iterable[str]
) -> dict[str, list[float]]:
    """Return task → a quantity's values in all records that know it; not where none does."""
    found = {
        task: [v for record in records if (v := record[record_key(quantity, task)]) is not None]
        for task in tasks
    }
    return {task: values for task, values in found.items() if values}


def advise(recorder: Recorder) -> str:
    """Return what to try first, in words and with the figures that it follows from.

    Where tasks conflict, or are served unequally, it names loss weights and methods to try; where
    they do not, that the plain sum is as good. Of the steps since the loss weights or the method
    changed last. On a GPU this synchronizes with the device.
    """
    if recorder.capacity == 0:
        return "Nothing is recorded: the recorder's capacity is 0."
    rows, tasks = recorder.rows(), recorder.tasks
    if not rows:
        return "Nothing is recorded yet: train some steps, then ask again."
    records = [record for record in rows if record["changes"] == rows[-1]["changes"]]
    compared = [record for record in records if record["zone"] is not None]
    figures = figures_of(compared, tasks) if compared else None
    paragraphs = (
        _looked_at(records, len(rows)),
        _zones(figures, mean_incidence(compared)) if figures else "",
        _worst_pair(compared, tasks, recorder.thresholds[2]),
        _worst_layers(recorder.layers()),
        _what_was_done(figures) if figures else "",
        _left_out(records, tasks),
        "Verdict: " + _verdict(figures, tasks, recorder.in_use),
    )
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _looked_at(records: Sequence[Record], recorded: int) -> str:
    """Return which steps of those that are recorded the advice is about."""
    first, last = records[0]["step"], records[-1]["step"]
    which = f"{first} to {last}" if len(records) > 1 else f"step {last}"
    changed = ""
    if len(records) < recorded:
        changed = ", those since the loss weights or the method changed last"
    return f"Looked at {_steps(len(records))} ({which}){changed}."


def _zones(figures: Figures, incidence: float | None) -> str:
    """Return the share of steps in each zone, and the mean incidence."""
    shares = {zone: percent(share) for zone, share in figures.zones.items()}
    lines = [f"  {LABELS.get(zone, zone):<12}{share:>8}" for zone, share in shares.items()]
    return "\n".join(
        [
            "Steps by the zone of their smallest cosine:",
            *lines,
            "\nIncidence of conflict (pairs of tasks with a cosine below 0, mean over the steps): "
            f"{percent(incidence or 0.0)}.",
        ]
    )


def _worst_pair(compared: Sequence[Record], tasks: Sequence[str], weak: float) -> str:
    """Return which pair conflicts in the largest share of the steps that compared it."""
    found = []
    for a, b in combinations(tasks, 2):
        key = record_key("cosine", a, b)
        cosines = [record[key] for record in compared if record[key] is not None]
        below = [cosine for cosine in cosines if cosine < weak]
        if below:
            median = statistics.median(below)
            text = (
                f"{a} and {b} conflict{'' if len(tasks) == 2 else ' most'}: "
                f"in {percent(len(below), len(cosines))} of {len(cosines)} comparisons.\n"
                f"The median cosine in those is {signed(median)}."
            )
            found.append((len(below) / len(cosines), -median, text))
    return max(found, key=lambda pair: pair[:2])[2] if found else ""


def _worst_layers(layers: Sequence[Record]) -> str:
    """Return the layers with the largest share of conflicts, of those compared often enough."""
    worst = [layer for layer in layers if layer["compared"] >= ENOUGH_STEPS and layer["conflicts"]]
    lines = [
        f"  {percent(layer['conflicts'], layer['compared']):>7} of {layer['compared']} "
        f"comparisons: {layer['layer']}"
        for layer in sorted(worst, key=lambda layer: -layer["share"])[:LAYERS_NAMED]
    ]
    title = "Layers that conflict most (cosine below 0 within the layer, over all steps):"
    return "\n".join([title, *lines]) if lines else ""


def _what_was_done(figures: Figures) -> str:
    """Return how the result lies to each task's gradient, and how far apart their norms are."""
    lines = [
        f"The result went against {task} in {percent(share)} of the steps "
        f"(mean cosine {signed(figures.descent[task])})."
        for task, share in figures.against.items()
    ]
    if not lines:
        lines = ["What the result does to the tasks is not known: it is zero, or without weights."]
    return "\n".join(
        [
            *lines,
            f"The largest gradient is {_times_as_long_as(figures.ratio)} the smallest (median, "
            "over shared parameters).",
        ]
    )


def _times_as_long_as(ratio: float) -> str:
    if ratio < 1.05:
        return "about as long as"
    return f"{ratio:.3g} times as long as" if ratio < 100.0 else f"{ratio:.0f} times as long as"


def _left_out(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Return how many steps were skipped, and how many were without a task."""
    taken = [record for record in records if not record["skipped"]]
    counts = {"Skipped, as a gradient": len(records) - len(taken)}
    for task in tasks:
        counts[f"Without {task}, as it"] = sum(r[record_key("dropped", task)] for r in taken)
    lines = [
        f"{what} was not finite: {_steps(count)} ({percent(count, len(records))})."
        for what, count in counts.items()
        if count
    ]
    without = {task: sum(r[record_key("norm", task)] == 0.0 for r in taken) for task in tasks}
    lines += [
        f"{task} had no gradient in {count} of {_steps(len(records))}."
        for task, count in without.items()
        if count
    ]
    return "\n".join(lines)


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _verdict(figures: Figures | None, tasks: Sequence[str], in_use: InUse) -> str:
    """Return the verdict in words."""
    if len(tasks) == 1:
        return "one task alone has nothing to conflict with."
    if figures is None:
        return "none. No step had finite gradients of two tasks to compare."
    if figures.steps < ENOUGH_STEPS:
        return f"too early to say. Ask again after {ENOUGH_STEPS} steps or more that compare tasks."
    verdict = verdict_on(figures)
    early = figures.steps < ENOUGH_FOR_WEIGHTS and in_use.follows_loss_weights
    later = f"\n{LATER}" if early else ""
    if verdict.found == "nothing":
        return _nothing(figures, len(tasks)) + later
    return _in_words(figures, verdict, in_use) + later


def _in_words(figures: Figures, verdict: Verdict, in_use: InUse) -> str:
    """Return a verdict other than "nothing", and what is to be tried."""
    said = []
    if "conflict" in verdict.found:
        said.append(
            f"the tasks conflict: moderate or critical in {percent(figures.strong)} of the steps."
        )
    if "imbalance" in verdict.found:
        unequal = _unequal(figures, verdict.raised)
        said.append(f"And {unequal}" if said else unequal)
        if not in_use.follows_loss_weights:
            said.append(f"With {in_use.method} a larger loss weight does not change that.")
    trials = _trials(verdict, in_use)
    if not trials:
        return "\n".join([*said, _no_trial(figures, verdict), COMPARE])
    numbered = [f"  {number}. {trial}" for number, trial in enumerate(trials, start=1)]
    how = "To be tried, one at a time and in this order:" if len(trials) > 1 else "To be tried:"
    return "\n".join([*said, how, *numbered, COMPARE])


def _unequal(figures: Figures, least: Sequence[str]) -> str:
    """Return whom the result follows more than those tasks, or who has the longer gradients."""
    others = [task for task in figures.descent or figures.norms if task not in least]
    if figures.descent:
        return f"the result follows {_listed(others)} much more than {_listed(least)}."
    return f"the gradients of {_listed(least)} are much shorter than those of {_listed(others)}."


def _no_trial(figures: Figures, verdict: Verdict) -> str:
    """Return why nothing is to be tried."""
    if not figures.against:
        return "No method is named: what the result does to the tasks is not known."
    if verdict.balance or verdict.protect:
        return "No other method is named: what would be tried is in use."
    return "But the result goes against no task often."


def _trials(verdict: Verdict, in_use: InUse) -> list[str]:
    """Return what to try, first things first; nothing that is in use."""
    trials, names = [], {in_use.method, in_use.state_of}
    if verdict.raised and in_use.follows_loss_weights:
        code = "; ".join(f"optimizer.tasks[{task!r}] *= {FACTOR}" for task in verdict.raised)
        trials.append(f"a larger loss weight of {_listed(verdict.raised)}: {code}")
    if verdict.balance and names.isdisjoint(BALANCING):
        trials.append("a method that balances the tasks itself: method=NashMTL()")
    if verdict.protect and names.isdisjoint(PROTECTING):
        # Not NonConflicting, which has the same guarantee: it did not help on Burgers' equation.
        trials.append("a method with which no task's loss rises to first order: method=UPGrad()")
    return trials


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _nothing(figures: Figures, tasks: int) -> str:
    """Return that conflicts are not what matters here."""
    share = 1.0 - figures.zones["none"]
    if figures.median is None or share < RARE_SHARE:
        found = "the tasks hardly ever conflict."
    elif figures.median > WEAK_COSINE:
        found = f"the conflicts are weak, with a median cosine of {signed(figures.median, 3)}."
    elif 2.0 * figures.strong > share:
        return f"the conflicts are few, but not mild: those are where it matters.\n{COMPARE}"
    else:
        found = "the conflicts are mostly mild, and resolving them changes little at a time."
    return (
        f"{found}\nThe plain sum, with loss weights that suit you, will likely do as well.\n"
        f"It saves the memory for the gradients of {tasks} tasks, and in exact mode "
        f"{tasks - 1} of {tasks} backward passes."
    )
