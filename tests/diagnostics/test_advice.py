"""Advice in words: what it says, and when."""

import pytest
import torch

from examples.demo.digits import Digits
from examples.demo.physics import Burgers, Kovasznay
from gcond_kernels import (
    MGDA,
    ConFIG,
    FairGrad,
    GCond,
    GCondFused,
    GradDrop,
    NashMTL,
    NonConflicting,
    Sum,
    UPGrad,
)
from gcond_kernels.diagnostics.advice import (
    ENOUGH_FOR_WEIGHTS,
    ENOUGH_STEPS,
    Figures,
    Verdict,
    figures_of,
    served_least,
    verdict_on,
)
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.records import signed
from gcond_kernels.methods import Method
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
        ([0.5] * 90 + [-0.6] * 10, "the tasks conflict: moderate or critical in 10.0 %"),
        ([-0.03] * 80 + [-0.9] * 20, "the tasks conflict: moderate or critical in 20.0 %"),
    ],
)
def test_the_verdict_follows_the_numbers(cosines, verdict):
    said = with_cosines(cosines).advise()
    assert verdict in said
    plain = any(word in verdict for word in ("hardly", "weak", "mild"))  # and not "few"
    plain &= "few" not in verdict
    assert (
        "The plain sum, with loss weights that suit you, will likely do as well." in said
    ) == plain
    assert ("compare with the plain sum" in said) != plain
    assert ("1 of 2 backward passes" in said) == plain


class Against(Method):
    """Weights that go against the second task, whatever its loss weight."""

    follows_loss_weights = False

    def weights(self, gramian, *_):
        return gramian.new_tensor([1.0, 0.0]).expand(gramian.shape[:-1])


class AgainstNash(Against):
    @property
    def state_type(self):
        return NashMTL


def figures(**changed) -> Figures:
    """Those of two tasks that conflict in every other step and are served the same."""
    plain = Figures(
        steps=500,
        zones={"none": 0.5, "mild": 0.0, "moderate": 0.4, "critical": 0.1},
        strong=0.5,
        median=-0.6,
        against={"a": 0.0, "b": 0.0},
        descent={"a": 0.6, "b": 0.5},
        least=(),
        norms={"a": 1.0, "b": 1.0},
        ratio=1.5,
    )
    return plain._replace(**changed)


CALM = {"zones": {"none": 1.0, "mild": 0.0, "moderate": 0.0, "critical": 0.0}, "strong": 0.0}
UNKNOWN = {"against": {}, "descent": {}}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, Verdict("conflict")),
        ({"against": {"a": 0.0, "b": 0.05}}, Verdict("conflict", (), True, True)),
        ({"against": {"a": 0.04, "b": 0.0}}, Verdict("conflict")),
        ({"least": ("b",)}, Verdict("imbalance and conflict", ("b",), True)),
        ({"least": ("a", "c")}, Verdict("imbalance and conflict", ("a", "c"), True)),
        ({"least": ("b",), "steps": 499}, Verdict("conflict")),  # too early for weights
        # Without a conflict.
        (CALM, Verdict("nothing")),
        ({**CALM, "least": ("b",)}, Verdict("nothing")),  # and as long
        ({**CALM, "ratio": 20.0}, Verdict("nothing")),  # the method has balanced them
        ({**CALM, "least": ("b",), "ratio": 4.0}, Verdict("imbalance", ("b",), True)),
        # Of GradDrop, with which it is not known what the result does.
        (UNKNOWN, Verdict("conflict")),
        (
            {**UNKNOWN, **CALM, "least": ("b",), "ratio": 8.0},
            Verdict("imbalance", ("b",), True),
        ),
    ],
)
def test_the_verdict_is_a_function_of_few_figures(changed, verdict):
    assert verdict_on(figures(**changed)) == verdict


@pytest.mark.parametrize(
    ("cosines", "least"),
    [
        ([0.9, 0.65], "b"),
        ([0.9, 0.66], ""),
        ([0.1, 0.9, 0.2], "ac"),
        ([0.76, 0.9, 0.6], "ac"),  # all that are nearer to the worst than to the best
        ([0.78, 0.9, 0.6], "c"),
        ([0.7, 0.9, 0.66], ""),
        ([], "b"),  # the norm alone is known
    ],
)
def test_all_tasks_that_are_served_least_are_named_together(cosines, least):
    descent = dict(zip("abc", cosines, strict=False))
    assert "".join(served_least(descent, {"a": 8.0, "b": 1.0, "c": 3.0})) == least


def test_the_advice_says_whom_steps_went_against_and_what_to_try():
    """Of two gradients the plain sum follows the one that is 3 times as long."""
    kept = Recorder("ab", THRESHOLDS, 1000)
    for number in range(1, 501):
        torn = two_tasks(-0.6 if number % 2 else 0.2)
        add(kept, [torn[0] * torch.tensor([[3.0], [1.0]])], number, max_iterations=0)
    said = kept.advise()
    # b · (3a + b) is 1 - 1.8, or 1 + 0.6; divided by ‖3a + b‖ = √(10 - 3.6), or √(10 + 1.2).
    cosine = (-0.8 / 6.4**0.5 + 1.6 / 11.2**0.5) / 2
    assert f"The result went against b in 50.0 % of the steps (mean cosine {cosine:+.2f})." in said
    assert "The result went against a in 0.0 % of the steps" in said
    assert "The largest gradient is 3 times as long as the smallest" in said
    verdict = said.partition("Verdict: ")[2].splitlines()
    assert verdict[:2] == [
        "the tasks conflict: moderate or critical in 50.0 % of the steps.",
        "And the result follows a much more than b.",
    ]
    assert verdict[3].endswith("of b: optimizer.tasks['b'] *= 10")
    assert verdict[4].endswith("method=NashMTL()")
    assert verdict[5].endswith("to first order: method=UPGrad()")
    assert "Ask again" not in said
    kept.capacity = 499
    said = kept.advise()
    assert "optimizer.tasks" not in said
    assert said.endswith("Ask again after\n500 steps with the same weights and method.")


def test_the_code_in_the_advice_does_what_it_says():
    optimizer = trained_apart()
    said = optimizer.advise()
    (line,) = [line for line in said.splitlines() if "optimizer.tasks" in line]
    before = dict(optimizer.tasks)
    exec(line.partition(": ")[2], {"optimizer": optimizer})
    factors = {task: weight / before[task] for task, weight in optimizer.tasks.items()}
    assert factors == {"it's a": 1.0, "b": 10.0}


def trained_apart() -> GCondFused:
    """A task whose gradient is short and opposed to the other's, by the plain sum."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    base = torch.optim.SGD([parameter], lr=1e-4)
    optimizer = GCondFused(base, {"it's a": 1.0, "b": 1.0}, method=Sum())
    for _ in range(ENOUGH_FOR_WEIGHTS):
        optimizer.backward({"it's a": 3.0 * parameter.sum(), "b": -parameter[0]})
        optimizer.step()
    return optimizer


def trained(method, steps=ENOUGH_FOR_WEIGHTS, second=-1.0) -> GCondFused:
    """By two tasks in conflict, one with a gradient 4 times as long; the second may have none."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    base = torch.optim.SGD([parameter], lr=1e-6)
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0}, method=method)
    train_on(optimizer, parameter, steps, second)
    return optimizer


def train_on(optimizer, parameter, steps, second=-1.0):
    for _ in range(steps):
        optimizer.backward({"a": 3.0 * parameter.sum(), "b": second * parameter[0]})
        optimizer.step()


WEIGHTS, BALANCE, PROTECT = "optimizer.tasks['b'] *= 10", "method=NashMTL()", "method=UPGrad()"


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (Sum(), [WEIGHTS, BALANCE, PROTECT]),
        (NonConflicting(Sum()), [WEIGHTS, BALANCE]),
        (GradDrop(), [WEIGHTS, BALANCE]),  # by the norms
        (Against(), [BALANCE, PROTECT]),
        (AgainstNash(), [PROTECT]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_is_named_that_is_in_use_or_changes_nothing(method, named):
    said = trained(method).advise()
    assert [trial for trial in (WEIGHTS, BALANCE, PROTECT) if trial in said] == named
    changes_nothing = f"With {type(method).__name__} a larger loss weight does not change that."
    assert (changes_nothing in said) == (WEIGHTS not in named)


@pytest.mark.parametrize("method", [NashMTL(), FairGrad(), MGDA(), ConFIG()])
def test_no_loss_weight_is_named_or_promised_that_the_method_does_not_follow(method):
    for steps in (ENOUGH_STEPS, ENOUGH_FOR_WEIGHTS):
        said = trained(method, steps).advise()
        assert "optimizer.tasks" not in said
        assert "loss weights" not in said
        assert type(method).__name__ == "MGDA" or "method=" not in said


def test_of_an_unknown_result_it_is_said_that_it_is_unknown():
    said = trained(GradDrop()).advise()
    assert "What the result does to the tasks is not known" in said
    assert "And the gradients of b are much shorter than those of a." in said
    assert "goes against no task" not in said
    with_unknown = trained(GradDrop(), ENOUGH_STEPS).advise()
    assert "No method is named: what the result does to the tasks is not known." in with_unknown


def change_method(optimizer):
    optimizer.method = UPGrad()


def change_weight(optimizer):
    optimizer.tasks["b"] *= 10.0


def change_clipping(optimizer):
    optimizer.max_norm = 1.0


@pytest.mark.parametrize(
    ("change", "looked_at"),
    [
        (change_method, "21 steps (31 to 51), those since the loss weights or the method changed"),
        (change_weight, "21 steps (31 to 51), those since the loss weights or the method changed"),
        (change_clipping, "51 steps (1 to 51).\n"),
    ],
)
def test_advice_is_by_the_steps_since_the_last_change(change, looked_at):
    optimizer = trained(Sum(), 30)
    change(optimizer)
    train_on(optimizer, optimizer.param_groups[0]["params"][0], 21)
    assert f"Looked at {looked_at}" in optimizer.advise()
    rows = optimizer.recorder.rows()
    assert [row["changes"] for row in rows] == [0] * 30 + [int("since" in looked_at)] * 21


def test_a_task_without_a_gradient_is_named():
    said = trained(Sum(), 30, second=0.0).advise()
    assert "b had no gradient in 30 of 30 steps." in said
    assert "a had no gradient" not in said
    assert "Verdict: none." in said


@pytest.mark.parametrize(
    ("length", "said"),
    [(1.0, "about as long as the"), (2.5, "2.5 times as long"), (1234.0, "1234 times as long")],
)
def test_lengths_are_written_out(length, said):
    kept = Recorder("ab", THRESHOLDS, 100)
    gradients = two_tasks(0.0)[0] * torch.tensor([[length], [1.0]], dtype=torch.float64)
    for number in range(1, 31):
        add(kept, [gradients], number)
    assert f"The largest gradient is {said}" in kept.advise()


def test_a_number_that_rounds_to_zero_has_no_minus():
    assert [signed(-0.001), signed(0.004), signed(-0.006)] == ["+0.00", "+0.00", "-0.01"]


def test_who_is_served_least_in_one_half_alone_is_not_named():
    kept = Recorder("ab", THRESHOLDS, 1000)
    for number in range(1, 501):
        length = 3.0 if number <= 250 else 1.0
        torn = two_tasks(-0.6)[0] * torch.tensor([[length], [1.0]])
        add(kept, [torn], number, max_iterations=0)
    assert "optimizer.tasks" not in kept.advise()


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
    assert "Verdict: none. No step had finite gradients of two tasks" in kept.advise()


# On scenes where it was measured what helps (bench/experiments/README.md).


@pytest.mark.parametrize(
    ("scene", "method", "steps"), [(Kovasznay, Sum(), 60), (Burgers, GCond(), 30)]
)
def test_where_tasks_conflict_the_methods_are_named_that_ended_with_a_lower_error(
    scene, method, steps
):
    """NashMTL and UPGrad, on Burgers' equation within chance; the turn of weights is later."""
    verdict = verdict_on(figures_of(rows_of(scene(), method, steps), tuple(scene.tasks)))
    assert verdict == Verdict("conflict", (), balance=True, protect=True)


def test_what_is_advised_where_tasks_hardly_conflict_is_no_method_that_resolves():
    scene = Digits()
    verdict = verdict_on(figures_of(rows_of(scene, GCond(), ENOUGH_STEPS), tuple(scene.tasks)))
    assert verdict == Verdict("nothing")


def rows_of(scene, method, steps):
    torch.manual_seed(0)
    model, generator = scene.new_model(), torch.Generator().manual_seed(0)
    base = torch.optim.AdamW(model.parameters(), lr=scene.learning_rate)
    optimizer = GCondFused(base, scene.tasks, method=method)
    for _ in range(steps):
        losses = scene.losses(model, scene.micro_batch(generator), scene.tasks)
        optimizer.backward({task: values.mean() for task, values in losses.items()})
        optimizer.step()
    return optimizer.recorder.rows()
