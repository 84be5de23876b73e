"""Figures and names that the report, the recorder, the advice and the plots share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from itertools import combinations
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Record: TypeAlias = "dict[str, Any]"

ZONES = ("mild", "moderate", "critical")
ALL_ZONES = ("none", *ZONES)


class InUse(NamedTuple):
    """Hold what advice has to know of how the tasks' gradients are compared and resolved.

    Attributes:
        method: the name of the method's class.
        settings: the method's options, granularity and mode, in words that differ where they do.
        state_of: the name of the class whose state it keeps: of the method that it is around.
        follows_loss_weights: whether a larger loss weight turns the result to the task.
    """

    method: str = ""
    settings: str = ""
    state_of: str = ""
    follows_loss_weights: bool = True


def pair_cosines(gramian: Tensor) -> dict[tuple[int, int], float]:
    """Return the cosine of each pair of tasks whose norms are above zero and finite.

    Args:
        gramian: [K, K] float64 on the CPU.
    """
    norms = gramian.diagonal().sqrt()
    cosines = (gramian / torch.outer(norms, norms)).clamp(-1.0, 1.0).tolist()
    usable = ((norms > 0.0) & norms.isfinite()).tolist()
    pairs = combinations(range(len(usable)), 2)
    return {(i, j): cosines[i][j] for i, j in pairs if usable[i] and usable[j]}


def norms_of(gramian: Tensor) -> list[float | None]:
    """Return the norm of each task's gradient, from [K, K] float64; None where not finite."""
    return known(gramian.diagonal().clamp(min=0.0).sqrt())


def ratio_of(norms: Collection[float | None]) -> float | None:
    """Return the largest of the norms above zero divided by the smallest; None without two."""
    found = [norm for norm in norms if norm]
    return max(found) / min(found) if len(found) > 1 else None


def known(values: Tensor) -> list[float | None]:
    """Return the numbers of a vector; None for what is NaN or infinite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def zone_of(cosine: float, thresholds: tuple[float, float, float]) -> str:
    """Return the zone of a cosine: "none" from θ_weak on, "critical" at θ_crit and below."""
    critical, main, weak = thresholds
    if not cosine < weak:
        return "none"
    if cosine <= critical:
        return "critical"
    return "moderate" if cosine < main else "mild"


def incidence_of(cosines: Collection[float]) -> float | None:
    """Return the share of pairs with a cosine below 0 (Zhang et al. 2024, arXiv 2411.18615)."""
    return sum(cosine < 0.0 for cosine in cosines) / len(cosines) if cosines else None


def mean_incidence(records: Sequence[Record]) -> float | None:
    """Return the mean incidence of the steps that compared tasks; None where none did."""
    shares = [record["incidence"] for record in records if record["incidence"] is not None]
    return statistics.fmean(shares) if shares else None


def percent(part: float, whole: float = 1.0, digits: int = 1) -> str:
    """Return a part of a whole in percent."""
    return f"{100.0 * part / whole:.{digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign; what is rounded to 0 is positive."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def record_key(quantity: str, *tasks: str) -> str:
    """Return the key of a value in a record: "cosine/a/b" for the cosine of tasks "a" and "b".

    A slash within a name is written "%2F", and "%2" as "%252", so that different names never share
    a key.
    """
    return "/".join([quantity, *(task.replace("%2", "%252").replace("/", "%2F") for task in tasks)])


def shortened(layer: str, length: int) -> str:
    """Return a layer's name in at most `length` characters, without the middle of a long one."""
    layer = layer or "(the model itself)"
    if len(layer) <= length:
        return layer
    end = 2 * (length - 1) // 3  # the ends of names differ more often than their starts
    return f"{layer[: length - 1 - end]}…{layer[len(layer) - end :]}"


def check_count(option: str, value: object, least: int) -> None:
    """Check that an option is an integer of at least `least`; a bool is none.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{option} must be a whole number, {least} or more, not {value!r}")
