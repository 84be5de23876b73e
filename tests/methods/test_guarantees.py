"""What the table of docs/methods.md says of every method, and what is said of GCond beside it."""

import inspect
from pathlib import Path

import pytest
import torch

from gcond_kernels import methods
from gcond_kernels.methods import GCond, GradDrop, NonConflicting, NormBalancing, PCGrad, Sum
from gcond_kernels.methods.method import fresh_state
from tests.helpers.gramians import (
    CPU,
    FAMILIES,
    float64,
    gradients,
    gramian,
    norms_apart,
    random_gramian,
    resolve,
)

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "methods.md").read_text()


def rows():
    """Name → what it is said to guarantee, by the table's headings."""
    lines = TEXT[TEXT.index("| | weights w |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        name.split("`")[1].split("(")[0]: dict(zip(cells[0][1:], others, strict=True))
        for name, *others in cells[2:]
    }


ROWS = rows()
NAMES = sorted(set(ROWS) - {"GradDrop"})  # which has no weights
# The first step of an average is mostly its start.
STEPS = {"NormBalancing": 400}


def made(name):
    """The method of a row, around the plain sum where it is made around one."""
    return NonConflicting(Sum()) if name == "NonConflicting" else getattr(methods, name)()


def weights_of(name, S, losses=None):
    """Of Gramians [B, K, K], each from its own fresh state, after the steps that it needs."""
    method, tasks = made(name), S.shape[-1]
    losses = S.new_ones(tasks) if losses is None else losses
    state = fresh_state(method, tasks, S.shape[:-2], CPU)
    for _ in range(STEPS.get(name, 1)):
        decision = resolve(method, S, state, losses if method.needs_losses else None)
    return decision.weights


def independent(tasks, family="random"):
    J = [norms_apart(gradients(family, tasks, s), s % 2, s) for s in range(40)]
    return torch.stack(list(map(gramian, J)))


def rises(name, tasks, families):
    """Whether of some gradients a task goes up, by more than rounding."""
    for family in families:
        S = independent(tasks, family)
        w = weights_of(name, S)
        n = S.diagonal(dim1=-2, dim2=-1).sqrt()
        terms = n * (w.abs() * n).sum(-1, keepdim=True)
        if ((S @ w[..., None])[..., 0] < -1e-9 * terms).any():
            return True
    return False


def test_every_method_has_a_row():
    named = {name for name in methods.__all__ if inspect.isclass(getattr(methods, name))}
    assert set(ROWS) == named - {"Known", "Method", "State"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_tasks_that_go_up(name):
    said = ROWS[name]["no task goes up"]
    assert said in ("always", "of two", "no")
    # Of dependent gradients ConFIG's guarantee does not hold, as is said below the table.
    families = FAMILIES[:-1] if name == "ConFIG" else FAMILIES
    found = {tasks: rises(name, tasks, families) for tasks in (2, 3, 5)}
    if said == "always":
        assert not any(found.values())
    else:
        assert found[3] or found[5]
    if said == "of two":
        assert not found[2]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_the_scale_of_a_loss(name):
    said = ROWS[name]["direction without the scale of a loss"]
    stays = [tasks for tasks in (2, 3) if direction_stays(name, tasks)]
    assert stays == {"yes": [2, 3], "of two": [2], "no": []}[said]


def direction_stays(name, tasks):
    """Whether the result has the same direction where the losses are scaled."""
    S, scale = independent(tasks), float64([1.0, 0.1, 30.0])[:tasks]
    losses = float64([1.0, 2.0, 3.0])[:tasks]
    alone = weights_of(name, S, losses)
    scaled = weights_of(name, S * scale[:, None] * scale, losses * scale) * scale
    n = S.diagonal(dim1=-2, dim2=-1).sqrt()
    before, after = (torch.nn.functional.normalize(n * w, dim=-1) for w in (alone, scaled))
    return torch.allclose(before, after, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_whether_the_result_follows_a_larger_loss_weight(name):
    """Losses themselves, which some methods look at, are without the loss weight."""
    S, weight = independent(3), float64([10.0, 1.0, 1.0])
    turned = []
    for G in (S, S * weight[:, None] * weight):
        w = weights_of(name, G, float64([1.0, 2.0, 3.0]))
        along = (G @ w[..., None])[..., 0]
        length = (along * w).sum(-1).clamp(min=0.0).sqrt() * G[:, 0, 0].sqrt()
        turned.append(float((along[:, 0] / length).nan_to_num().mean()))
    assert made(name).follows_loss_weights == (turned[1] > turned[0] + 0.1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tasks", [2, 4])
def test_what_is_said_of_the_norm(name, tasks):
    said = ROWS[name]["norm"]
    S = float64([[5.0] * tasks] * tasks)[None]
    total = float(weights_of(name, S).sum())
    if name in ("CAGrad", "NonConflicting", "RLW", "STCH"):
        assert said in (
            *("at most 1 + c times the mean", "as the method's, or shorter"),
            *("of the sum, on average", "of Σ_k ĝ_k / L_k"),
        )
        assert 1.0 - 1e-6 <= total <= tasks + 1e-6
        return
    expected = {"mean": 1.0, "Σ w": 1.0, "sum": float(tasks)}
    key = next(key for key in expected if key in said)
    factor = {"NormBalancing": float(tasks), "UncertaintyWeighting": 0.8244}.get(name, 1.0)
    assert total == pytest.approx(factor * expected[key], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_its_needs(name):
    method, needs = made(name), ROWS[name]["needs"]
    state = method.new_state(3, CPU)
    assert ("losses" in needs) == method.needs_losses
    assert ("random" in needs) == ("counter" in state)
    assert ("state" in needs) == bool(set(state) - {"counter"})
    assert ("history" in needs) == method.needs_history


def test_graddrop_has_no_weights_to_guarantee_anything():
    assert [ROWS["GradDrop"]["no task goes up"], GradDrop().needs_losses] == ["no", False]


def test_what_gcond_does_to_the_loser():
    """Cosines of the result with both gradients."""
    S = float64([[1.0, -0.95], [-0.95, 1.0]])
    said = {
        GCond(): ["+0.95", "−0.81"],
        PCGrad(): ["+0.16", "+0.16"],
        NonConflicting(GCond()): ["+0.31", "0"],
    }
    section = TEXT.split("## What GCond does")[1].split("\n## ")[0]
    for method, expected in said.items():
        w = method(S)
        cosines = sorted((S @ w / (w @ S @ w).sqrt()).tolist(), reverse=True)
        numbers = [float(one.replace("−", "-")) for one in expected]
        assert cosines == pytest.approx(numbers, abs=0.005)
        assert all(one in section for one in expected)


def test_a_conflict_may_remain():
    remain, at_the_bound = 0, 0
    for seed in range(200):
        S = random_gramian(3, seed)
        decision = resolve(GCond(), S, GCond().new_state(3, CPU))
        G = decision.coefficients @ S @ decision.coefficients.mT
        n = G.diagonal().sqrt()
        remain += int((G / n[:, None] / n < -1e-4).any())
        at_the_bound += int(decision.events[-1].isfinite().all())
    assert at_the_bound >= remain > 0


def test_how_often_gcond_reaches_its_bound_is_as_recorded():
    record = DOCS.parent / "bench" / "results" / "experiments" / "i_physics.md"
    rows = [line for line in record.read_text().splitlines() if line.startswith("| GCond |")]
    shares = [row.split("|")[-3].strip() for row in rows[1::2]]  # a second table in each scene
    assert len(shares) == 2
    said = f"in {shares[0]} of GCond's steps on Kovasznay's flow and {shares[1]} on Burgers'"
    assert said in TEXT.replace("\n", " ")


def test_norm_balancing_makes_weighted_gradients_of_one_norm():
    S = random_gramian(3)
    n = S.diagonal().sqrt()
    state = NormBalancing().new_state(3, CPU)
    for _ in range(400):
        w = resolve(NormBalancing(), S, state).weights
    assert torch.allclose(w * n, n.sum().expand(3), rtol=1e-12)
