"""The results of the runs: numbers, sentences, the table and results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

import gcond_kernels
from gcond_kernels.diagnostics.records import ALL_ZONES

from .scenes import Scene, Supervised
from .training import Evaluation, Run

RARE, FREQUENT = 10.0, 30.0  # % of steps with a conflict
WEAK = -0.1  # cosine; gradients above it are close to orthogonal
FEW = 3  # so many methods have a sentence each; more of them one together
OPTIONS_SENTENCES = (
    "Each has the default options of its class. Some make a sum of the gradients and some a "
    "mean, but all share a learning rate: AdamW, the optimizer of all of them, makes the same "
    "steps whatever constant factor the gradients have. (A factor that changes from step to step, "
    "as some methods have, weights the steps against each other.)"
)
METHODS_SENTENCE = f"Methods: {OPTIONS_SENTENCES} Zones are those of GCond's default thresholds."
SUM_SENTENCE = (
    "Sum makes the gradients of the plain sum but for rounding, which training amplifies: "
    "what lies between the two is chance."
)

ANOTHER_SEED = "What another seed would change"
ONE_SEED = "one seed proves nothing about which method is better."


def cosines(run: Run) -> list[float]:
    """Return the cosine of every step that had one."""
    return [step.cosine for step in run.history if step.cosine is not None]


def zone_shares(run: Run) -> dict[str, float] | None:
    """Return zone → share of the steps with a cosine; None without any, as in plain sum."""
    zones = [step.zone for step in run.history if step.zone is not None]
    return {zone: zones.count(zone) / len(zones) for zone in ALL_ZONES} if zones else None


def incidence(run: Run) -> float | None:
    """Return the mean over the steps of the share of pairs of tasks with a cosine below 0."""
    shares = [step.incidence for step in run.history if step.incidence is not None]
    return statistics.fmean(shares) if shares else None


def against(run: Run) -> dict[str, float] | None:
    """Return task → share of the steps whose gradient raises its loss, to first order.

    None without any comparison, as in plain sum.
    """
    compared = [step.rising for step in run.history if step.rising is not None]
    if not compared:
        return None
    return {task: sum(task in one for one in compared) / len(compared) for task in run.scene.tasks}


def against_any(run: Run) -> float:
    """Return the share of the compared steps whose gradient raises some task's loss."""
    compared = [step.rising for step in run.history if step.rising is not None]
    return sum(map(bool, compared)) / len(compared)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the mean difference on the same samples, and twice its standard error."""
    differences = (a - b).double()
    error = differences.std() / math.sqrt(len(differences))
    return float(differences.mean()), 2.0 * float(error)


def table(runs: Sequence[Run]) -> Table:
    """Return the table of a scene's runs; it fits a terminal of 80 columns."""
    scene = runs[0].scene
    made = Table(
        title=f"\n{scene.name}: {scene.title}, scores on validation data",
        title_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    made.add_column("method")
    for header in (
        *(label.replace(" ", "\n") for label in scene.score_labels.values()),
        "back-\nward\npasses",
        "time\n(s)",
        "% of steps:\nnone/mild/\nmod./crit.",
        "median\ncosine",
        "a loss\nrises",
    ):
        made.add_column(header, justify="right")
    made.add_row("untrained", *scores(scene, runs[0].evaluations[0]), "0", "", "", "", "")
    for run in runs:
        shares = zone_shares(run)
        made.add_row(
            run.method.name + ("" if run.complete else f"\n({run.progress})"),
            *scores(scene, run.evaluations[-1]),
            str(run.backward_passes),
            f"{run.seconds:.1f}",
            "/".join(f"{100.0 * share:.0f}" for share in shares.values()) if shares else "-",
            f"{statistics.median(cosines(run)):+.2f}" if shares else "-",
            f"{100.0 * against_any(run):.0f} %" if against(run) else "-",
        )
    return made


def scores(scene: Scene, evaluation: Evaluation) -> list[str]:
    """Return the validation scores, as the table shows them."""
    values = [float(evaluation.scores[score].mean()) for score in scene.score_labels]
    return [f"{100.0 * v:.1f} %" if scene.score_in_percent else f"{v:.4f}" for v in values]


def sentences(runs: Sequence[Run]) -> list[str]:
    """Return what one scene's numbers say, and what they do not."""
    said = [f"Validation: {runs[0].scene.validation_note}."]
    if any(run.method.mode and not run.method.names_winners for run in runs):
        said.append(METHODS_SENTENCE)
    if any(run.method.key == "sum" for run in runs):
        said.append(SUM_SENTENCE)
    if any(zone_shares(run) for run in runs):
        said.append(conflict_sentence([run for run in runs if zone_shares(run)]))
        said.append(against_sentence([run for run in runs if against(run)]))
    complete = [run for run in runs if run.complete]
    if len(complete) > 1:
        said += difference_sentences(complete)
    return said


def conflict_sentence(runs: Sequence[Run]) -> str:
    """Return whether there was a conflict to resolve; the verdict is on the first run."""
    percent = percent_in_conflict(runs[0])
    if percent < RARE:
        verdict = "hardly a conflict worth resolving"
    else:
        frequency = "frequent" if percent >= FREQUENT else "occasional"
        strength = statistics.median(cosine for cosine in cosines(runs[0]) if cosine < 0.0)
        verdict = f"{frequency} conflicts, with a median cosine of {strength:+.2f} among them"
        if strength > WEAK:
            verdict += ": so weak that there is little to resolve"
    if len(runs) > FEW:
        seen = range_of_conflicts(runs)
    else:
        seen = "; ".join(conflicts_seen(run) for run in runs)
    tasks = listed(runs[0].scene.tasks)
    name = runs[0].method.name
    return f"Conflict: the gradients of {tasks} disagreed in {seen}. With {name}: {verdict}."


def listed(names: Iterable[str]) -> str:
    """Return names as in a sentence: a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def conflicts_seen(run: Run) -> str:
    """Return how often the gradients disagreed in one run."""
    # The cosine of gradients of different data is closer to 0 for that alone.
    data = run.scene.data if run.method.mode == "exact" else "different data"
    return (
        f"{percent_in_conflict(run):.0f} % of the steps of {run.method.name} "
        f"(gradients of {data}, median cosine {statistics.median(cosines(run)):+.2f})"
    )


def range_of_conflicts(runs: Sequence[Run]) -> str:
    """Return how often the gradients disagreed in the runs with fewest and most conflicts."""
    ordered = sorted(runs, key=percent_in_conflict)
    medians = [statistics.median(cosines(run)) for run in runs]
    ends = " to ".join(
        f"{percent_in_conflict(run):.0f} % ({run.method.name})" for run in (ordered[0], ordered[-1])
    )
    return f"{ends} of the steps, with median cosines of {min(medians):+.2f} to {max(medians):+.2f}"


def against_sentence(runs: Sequence[Run]) -> str:
    """Return in how many steps the result went against a task, of the methods that ever did."""
    said = []
    for run in (run for run in runs if against_any(run)):
        tasks = ", ".join(f"{task} {100.0 * s:.0f} %" for task, s in (against(run) or {}).items())
        said.append(f"{100.0 * against_any(run):.0f} % of {run.method.name} ({tasks})")
    if len(said) < len(runs):
        said.append("0 % of the others" if said else "none of any method")
    return (
        "Against a task: in these steps the resolved gradient raises its loss, to first order: "
        f"{'; '.join(said)}. What AdamW makes of it is not counted."
    )


def percent_in_conflict(run: Run) -> float:
    """Return the share of the compared steps in a zone of conflict, in %."""
    zones = [step.zone for step in run.history if step.zone is not None]
    return 100.0 * (1.0 - zones.count("none") / len(zones))


def difference_sentences(runs: Sequence[Run]) -> list[str]:
    """Return how far the methods are from the first one at the end, and what that means."""
    if not isinstance(runs[0].scene, Supervised):
        return [ratio_sentence(runs[0], runs[1:])]
    if samples(runs[0]) < 2:
        return ["Difference: a single validation sample cannot tell the methods apart."]
    others = runs[1:]
    if len(others) > FEW:
        said = [beyond_sentence(runs[0], others)]
    else:
        said = [difference_sentence(runs[0], run) for run in others]
    said.append(
        "+/- is twice the standard error over the validation samples. "
        f"{ANOTHER_SEED} comes on top and is not measured here: {ONE_SEED}"
    )
    if any(run.method.mode == "stochastic" for run in runs):
        said.append(
            "In stochastic mode each task sees only its block of a step's micro-batches, so less "
            "data than with the other methods."
        )
    return said


def ratio_sentence(first: Run, others: Sequence[Run]) -> str:
    """Return how the scores of others compare with those of the first, which are no means."""
    said = []
    for score, label in first.scene.score_labels.items():
        least = float(first.evaluations[-1].scores[score])
        ratios = ", ".join(
            f"{run.method.name} {float(run.evaluations[-1].scores[score]) / least:.2f}"
            for run in others
        )
        said.append(f"{label}, as a multiple of the {least:.4f} of {first.method.name}: {ratios}")
    return f"Difference: {'; '.join(said)}. {ANOTHER_SEED} is not measured here: {ONE_SEED}"


def samples(run: Run) -> int:
    """Return how many samples the scores of a run are means over."""
    return max(map(len, run.evaluations[0].scores.values()))


def gaps(first: Run, other: Run) -> list[tuple[str, str, bool]]:
    """Return label and text of the difference in each score, and whether it is beyond the noise."""
    scene = first.scene
    factor, form, unit = (100.0, "+.1f", " points") if scene.score_in_percent else (1, "+.4f", "")
    found = []
    for task, label in scene.score_labels.items():
        final = [run.evaluations[-1].scores[task] for run in (other, first)]
        gap, error = difference(final[0], final[1])
        margin = f"{factor * error:{form}}".lstrip("+")
        text = f"{factor * gap:{form}}{unit} (+/- {margin}) in {label}"
        # Not where only rounding differs: then both print as zero.
        beyond = abs(gap) > error and float(f"{factor * gap:{form}}") != 0.0
        found.append((label, text, beyond))
    return found


def difference_sentence(first: Run, other: Run) -> str:
    """Return how far one method is from another, in every score."""
    found = gaps(first, other)
    beyond = " and ".join(label for label, _, is_beyond in found if is_beyond)
    verdict = (
        f"beyond the validation noise in {beyond}" if beyond else "within the validation noise"
    )
    names = f"{other.method.name} against {first.method.name}"
    return f"Difference of {names}: {' and '.join(text for _, text, _ in found)}, {verdict}."


def beyond_sentence(first: Run, others: Sequence[Run]) -> str:
    """Return which of many methods differ from the first by more than the validation noise."""
    beyond, within = [], []
    for run in others:
        found = " and ".join(text for _, text, is_beyond in gaps(first, run) if is_beyond)
        if found:
            beyond.append(f"{run.method.name} {found}")
        else:
            within.append(run.method.name)
    said = f"Difference against {first.method.name}, beyond the validation noise: "
    said += f"{'; '.join(beyond) or 'none'}."
    return said + (f" Within it: {', '.join(within)}." if within else "")


def results(runs: Sequence[Run], settings: dict[str, Any], interrupted: bool) -> dict[str, Any]:
    """Return everything measured, for results.json; what is not a finite number is null."""
    scenes = {}
    for name, group in groupby(runs, key=lambda run: run.scene.name):
        of_scene = list(group)
        first = of_scene[0]
        scenes[name] = {
            **about_scene(first.scene),
            "steps": first.steps,
            "validation_samples": samples(first),
            "untrained": means(first.evaluations[0]),
            "methods": {run.method.name: run_results(run) for run in of_scene},
            "sentences": sentences(of_scene),
        }
    versions = {"gcond_kernels": gcond_kernels.__version__, "torch": torch.__version__}
    return finite({"versions": versions, **settings, "interrupted": interrupted, "scenes": scenes})


def about_scene(scene: Scene) -> dict[str, Any]:
    """Return what a record says of a scene."""
    return {
        "title": scene.title,
        "loss_weights": scene.tasks,
        "accumulation_steps": scene.accumulation_steps,
        "learning_rate": scene.learning_rate,
        "validation": scene.validation_note,
        "scores": scene.score_labels,
    }


def run_results(run: Run) -> dict[str, Any]:
    """Return one method's numbers."""
    values = cosines(run)
    return {
        "mode": run.method.mode,
        "loss_weights": run.scene.tasks,
        "resolver": None if run.method.resolver is None else repr(run.method.resolver),
        "steps": len(run.history),
        "backward_passes": run.backward_passes,
        "seconds": run.seconds,
        "validation": means(run.evaluations[-1]),
        "zone_shares": zone_shares(run),
        "incidence": incidence(run),
        "against": against(run),
        "median_cosine": statistics.median(values) if values else None,
        "history": [step._asdict() for step in run.history],
        "evaluations": [{"step": e.step, **means(e)} for e in run.evaluations],
    }


def means(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return the mean loss of every task and the mean of every score."""
    return {
        "losses": {task: float(values.mean()) for task, values in evaluation.losses.items()},
        "scores": {score: float(values.mean()) for score, values in evaluation.scores.items()},
    }


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
