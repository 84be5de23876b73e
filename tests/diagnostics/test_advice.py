"""Advice in words: what it says, and when."""

import pytest
import torch

from gcond_kernels.diagnostics.advice import ENOUGH_STEPS
from gcond_kernels.diagnostics.recorder import Recorder
from tests.helpers.recorded import THRESHOLDS, add, gradients_of, two_tasks, with_cosines


def test_advice_needs_enough_steps():
    assert "Verdict: too early" in with_cosines([-0.9] * 19).advise()
    assert "Verdict: too early" not in with_cosines([-0.9] * 20).advise()


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        ([0.5] * 96 + [-0.9] * 4, "hardly ever conflict"),
        ([0.5] * 50 + [-0.03] * 50, "the conflicts are weak, with a median cosine of -0.030"),
        ([0.5] * 50 + [-0.3] * 50, "mostly mild"),
        ([0.5] * 90 + [-0.3] * 1 + [-0.9] * 9, "few, but not mild"),
        ([0.5] * 90 + [-0.6] * 10, "worth resolving: it is moderate or critical in 10.0 %"),
        ([-0.03] * 80 + [-0.9] * 20, "worth resolving: it is moderate or critical in 20.0 %"),
    ],
)
def test_the_verdict_follows_the_numbers(cosines, verdict):
    said = with_cosines(cosines).advise()
    assert verdict in said
    plain = "hardly" in verdict or "weak" in verdict
    assert ("The result is close to the plain sum." in said) == plain
    assert ("compare with the plain sum" in said) != plain
    assert ("1 of 2 backward passes" in said) == plain


def test_advice_reports_the_figures():
    said = with_cosines([0.5] * 50 + [-0.2] * 25 + [-0.6] * 15 + [-0.9] * 10).advise()
    assert "Looked at 100 steps (1 to 100)." in said
    lines = [line.split() for line in said.splitlines()]
    assert ["no", "conflict", "50.0", "%"] in lines
    assert ["mild", "25.0", "%"] in lines
    assert ["moderate", "15.0", "%"] in lines
    assert ["critical", "10.0", "%"] in lines
    assert "a and b conflict: in 50.0 % of 100 comparisons." in said
    assert "The median cosine in those is -0.40." in said
    assert "50.0 % of 100 comparisons: first" in said
    assert "Skipped" not in said


def test_advice_names_the_worst_pair_and_layers():
    kept = Recorder("abc", THRESHOLDS, 100)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    opposed = torch.stack([a, b, 0.3 * a - b]).double()  # only b and c
    agreeing = torch.stack([a, a, a]).double() * 0.01
    for number in range(1, 25):
        torn = opposed if number % 2 else agreeing
        if number == 2:
            torn = torch.stack([a, -a, -a]).double()  # a and b, a and c: a rare pair comes first
        add(kept, [agreeing, torn], number, names=("calm", "torn"))
    said = kept.advise()
    assert "b and c conflict most: in 50.0 % of 24 comparisons." in said
    assert "19.4 % of 72 comparisons: torn" in said
    assert "calm" not in said


def test_advice_uses_the_thresholds_of_the_method():
    """With θ_weak at 0.3 a cosine of 0.1 is a conflict, below it at -0.3 one of -0.1 is none."""
    assert "the conflicts are weak" in with_cosines([-0.02] * 30, (-0.01, -0.01, 0.0)).advise()
    cosines = 30 * [0.1, -0.1, -0.4]
    assert "in 100.0 % of 90 comparisons" in with_cosines(cosines, (-0.8, -0.5, 0.3)).advise()
    assert "in 33.3 % of 90 comparisons" in with_cosines(cosines, (-0.8, -0.5, -0.3)).advise()


def test_advice_names_no_layer_with_too_few_comparisons():
    kept = with_cosines(30 * [-0.1])
    opposed = [*two_tasks(-0.1), *two_tasks(-1.0)]
    for number in range(ENOUGH_STEPS - 1):
        add(kept, opposed, number, names=("first.weight", "seldom"))
    assert "comparisons: first" in kept.advise()
    assert "seldom" not in kept.advise()
    add(kept, opposed, names=("first.weight", "seldom"))
    assert "comparisons: seldom" in kept.advise()


def test_advice_counts_what_was_left_out():
    kept = Recorder("abc", THRESHOLDS, 100)
    for number in range(1, 41):
        skipped, dropped = number <= 4, (1,) if number <= 6 else ()
        add(kept, gradients_of(3, number), number, dropped=dropped, skipped=skipped)
    said = kept.advise()
    assert "Skipped, as a gradient was not finite: 4 steps (10.0 %)." in said
    assert "Without b, as it was not finite: 2 steps (5.0 %)." in said
    assert "Without a" not in said


def test_advice_without_a_comparison():
    kept = Recorder("ab", THRESHOLDS, 100)
    for number in range(1, 31):
        add(kept, gradients_of(2, number), number, dropped=(0, 1), skipped=True)
    assert "Verdict: none." in kept.advise()
