"""Advice in words: whether the recorded conflicts are worth resolving."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from gcond_kernels.diagnostics.records import (
    ALL_ZONES,
    Record,
    mean_incidence,
    percent,
    record_key,
)

if TYPE_CHECKING:
    from gcond_kernels.diagnostics.recorder import Recorder

# The verdict's bounds are rules of thumb, not results of experiments.
# With 20 steps a share is known to about 20 points; the same holds for the comparisons of a layer.
ENOUGH_STEPS = 20
# Where fewer steps have a conflict, the other 95 % are the plain sum to the last bit.
RARE_SHARE = 0.05
# A projection at this cosine takes 5 % of a gradient's norm away: less than the gradients of
# two micro-batches usually differ by.
WEAK_COSINE = -0.05
# Moderate and critical conflicts in one step of ten are a part of training, not a mishap.
NOTABLE_SHARE = 0.1
LAYERS_NAMED = 3
LABELS = {"none": "no conflict"}
COMPARE = (
    "Whether the model gets better by it, only validation scores tell: compare with the plain sum."
)


def advise(recorder: Recorder) -> str:
    """Return whether there is a conflict worth resolving, in words and with the figures.

    On a GPU this synchronizes with the device.
    """
    if recorder.capacity == 0:
        return "Nothing is recorded: the recorder's capacity is 0."
    records, tasks = recorder.rows(), recorder.tasks
    if not records:
        return "Nothing is recorded yet: train some steps, then ask again."
    compared = [record for record in records if record["zone"] is not None]
    first, last = records[0]["step"], records[-1]["step"]
    which = f"{first} to {last}" if len(records) > 1 else f"step {last}"
    paragraphs = (
        f"Looked at {_steps(len(records))} ({which}).",
        _zones(compared),
        _worst_pair(compared, tasks, recorder.thresholds[2]),
        _worst_layers(recorder.layers()),
        _left_out(records, tasks),
        "Verdict: " + _verdict(compared, len(tasks)),
    )
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _zones(compared: Sequence[Record]) -> str:
    """Return the share of steps in each zone, and the mean incidence."""
    incidence = mean_incidence(compared)
    if incidence is None:
        return ""
    zones = [record["zone"] for record in compared]
    shares = {zone: percent(zones.count(zone), len(zones)) for zone in ALL_ZONES}
    lines = [f"  {LABELS.get(zone, zone):<12}{share:>8}" for zone, share in shares.items()]
    return "\n".join(
        [
            "Steps by the zone of their smallest cosine:",
            *lines,
            "\nIncidence of conflict (pairs of tasks with a cosine below 0, mean over the steps): "
            f"{percent(incidence)}.",
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
                f"The median cosine in those is {median:+.2f}."
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
    title = "Layers that conflict most (cosine below 0 within the layer):"
    return "\n".join([title, *lines]) if lines else ""


def _left_out(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Return how many steps were skipped, and how many left a task out."""
    counts = {"Skipped, as a gradient": sum(record["skipped"] for record in records)}
    for task in tasks:
        key = record_key("dropped", task)
        counts[f"Without {task}, as it"] = sum(r[key] and not r["skipped"] for r in records)
    return "\n".join(
        f"{what} was not finite: {_steps(count)} ({percent(count, len(records))})."
        for what, count in counts.items()
        if count
    )


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _verdict(compared: Sequence[Record], tasks: int) -> str:
    """Return what the figures support, and no more."""
    if tasks == 1:
        return "one task alone has nothing to conflict with."
    if not compared:
        return "none. No step had finite gradients of two tasks to compare."
    if len(compared) < ENOUGH_STEPS:
        return f"too early to say. Ask again after {ENOUGH_STEPS} steps or more that compare tasks."
    below = [record["min_cosine"] for record in compared if record["zone"] != "none"]
    strong = sum(
        record["zone"] in ("moderate", "critical") and record["min_cosine"] <= WEAK_COSINE
        for record in compared
    )
    if strong >= NOTABLE_SHARE * len(compared):
        return (
            "this conflict is worth resolving: it is moderate or critical in "
            f"{percent(strong, len(compared))} of the steps.\n{COMPARE}"
        )
    plain_sum = (
        "The result is close to the plain sum.\n"
        "Tuning the loss weights, or the plain sum as it is, will likely do as well.\n"
        f"That saves the memory for the gradients of {tasks} tasks, and in exact mode "
        f"{tasks - 1} of {tasks} backward passes."
    )
    if len(below) < RARE_SHARE * len(compared):
        return f"the tasks hardly ever conflict.\n{plain_sum}"
    median = statistics.median(below)
    if median > WEAK_COSINE:
        return f"the conflicts are weak, with a median cosine of {median:+.3f}.\n{plain_sum}"
    if 2 * strong > len(below):
        return f"the conflicts are few, but not mild: those are where it matters.\n{COMPARE}"
    return f"the conflicts are mostly mild, and resolving them changes little at a time.\n{COMPARE}"
