"""Tables and sentences of the experiments: scores, and differences to a run with the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtr

from bench.experiments.common import SCENES, Record, scene_of, seeds_of
from bench.experiments.training import Variant

Columns = dict[str, Callable[[Sequence[Record]], str]]


class Scores(NamedTuple):
    """One variant's values of a score over the seeds, and the differences to another's."""

    values: list[float]
    gaps: list[float]  # of the seeds that there is a baseline of
    percent: bool  # whether the values are shares

    @property
    def error(self) -> float | None:
        """Standard error of the mean difference; None of a single seed."""
        if len(self.gaps) < 2:
            return None
        return statistics.stdev(self.gaps) / math.sqrt(len(self.gaps))

    @property
    def is_beyond(self) -> bool:
        """Whether the mean difference is beyond twice that, and more than rounding."""
        if self.error is None or float(self.number(self.gap)) == 0.0:
            return False
        return abs(self.gap) > 2.0 * self.error

    @property
    def gap(self) -> float:
        """The mean difference."""
        return statistics.fmean(self.gaps)

    def number(self, value: float, sign: str = "") -> str:
        """Return a value as it is printed; rounded, for a comparison, without a sign."""
        digits, factor = (2, 100.0) if self.percent else (4, 1.0)
        rounded = round(factor * value, digits) + 0.0  # which leaves no minus before a zero
        text = f"{rounded:{sign}.{digits}f}"
        return text.replace("-", "−") if sign else text

    def cells(self) -> list[str]:
        """Return mean ± standard deviation, and mean difference ± standard error or ""."""
        mean, gap = self.number(statistics.fmean(self.values)), ""
        if len(self.values) > 1:
            mean += f" ± {self.number(statistics.stdev(self.values))}"
        if self.gaps:
            gap = self.number(self.gap, "+")
            gap += "" if self.error is None else f" ± {self.number(self.error)}"
        return [mean, gap]


def scores_of(records: Sequence[Record], scene: str, variant: Variant, score: str) -> Scores:
    """Return a variant's values of one score."""
    own = by_seed(records, scene, variant.key)
    plain = by_seed(records, scene, variant.baseline)
    values = {seed: found["scores"][score] for seed, found in own.items()}
    gaps = [v - plain[seed]["scores"][score] for seed, v in values.items() if seed in plain]
    return Scores(list(values.values()), gaps, SCENES[scene].score_in_percent)


def by_seed(records: Sequence[Record], scene: str, method: str) -> dict[int, Record]:
    """Return the records of one variant of a scene."""
    return {r["seed"]: r for r in records if r["scene"] == scene and r["method"] == method}


def better(scene: str) -> str:
    """Return which scores of a scene are better."""
    return "in %, higher is better" if SCENES[scene].score_in_percent else "lower is better"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its heads, the first column text."""
    lines = [rows[0], [":--", *["--:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def score_section(
    records: Sequence[Record],
    scene: str,
    variants: Sequence[Variant],
    what: str,
    columns: Columns | None = None,
) -> list[str]:
    """Return heading, table and sentence of a scene's scores; `what` says how it was trained."""
    kind = scene_of(scene)
    return [
        f"## {scene}: {kind.title}",
        f"{what} Scores ({better(scene)}): mean ± standard deviation over the seeds; difference "
        f"with the same seed, mean ± standard error. Validation: {kind.validation_note}.",
        score_table(records, scene, variants, columns or {"incidence": mean_of("incidence")}),
        beyond_sentence(records, scene, variants),
    ]


def score_table(
    records: Sequence[Record], scene: str, variants: Sequence[Variant], columns: Columns
) -> str:
    """Return scores, differences to each variant's baseline, and more columns of its records."""
    labels = SCENES[scene].score_labels
    rows = [["", *(head for label in labels.values() for head in (label, "difference")), *columns]]
    for variant in variants:
        own = list(by_seed(records, scene, variant.key).values())
        if own:
            rows.append([variant.name])
            for score in labels:
                rows[-1] += scores_of(records, scene, variant, score).cells()
            rows[-1] += [column(own) for column in columns.values()]
    return markdown(rows)


def beyond_sentence(records: Sequence[Record], scene: str, variants: Sequence[Variant]) -> str:
    """Return which differences to the baselines are beyond twice their standard error."""
    count, number, beyond = 0, 0, []
    seeds = len(seeds_of(records, scene))
    if seeds < 2:
        return "With a single seed there is no telling a difference from chance."
    for variant in variants:
        found = []
        for score, label in SCENES[scene].score_labels.items():
            scores = scores_of(records, scene, variant, score)
            count += scores.error is not None
            if scores.is_beyond:
                unit = " points" if scores.percent else ""
                found.append(f"{scores.number(scores.gap, '+')}{unit} in {label}")
        number += len(found)
        if found:
            beyond.append(f"{variant.name} ({', '.join(found)})")
    chance = 2.0 * float(stdtr(seeds - 1, -2.0))  # of Student's t
    which = f": {'; '.join(beyond)}" if beyond else ""
    return (
        f"Beyond twice their standard error over the seeds are {number} of {count} differences"
        f"{which}. {seeds} seeds are few: between methods that do not differ at all, chance alone "
        f"would take {100.0 * chance:.0f} % of the differences beyond that, here some "
        f"{chance * count:.0f} of {count}."
    )


def percent(share: float | None) -> str:
    """Return a share in %."""
    return "" if share is None else f"{100.0 * share:.0f} %"


def mean_of(key: str) -> Callable[[Sequence[Record]], str]:
    """Return a column with the mean of a share over the seeds, in %."""

    def column(records: Sequence[Record]) -> str:
        known: list[Any] = [found[key] for found in records if found[key] is not None]
        return percent(statistics.fmean(known)) if known else ""

    return column
