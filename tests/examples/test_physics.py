"""The scenes of differential equations: their solutions, losses, scores and trainings."""

import math

import pytest
import torch
from scipy.integrate import quad

from examples.demo import physics, training
from examples.demo.methods import PLAIN
from examples.demo.physics import Burgers, Kovasznay
from examples.demo.scenes import Batch, reweighted
from gcond_kernels import GCondFused
from gcond_kernels.methods import Sum

CPU = torch.device("cpu")


@pytest.fixture(params=[Kovasznay, Burgers])
def scene(request):
    return request.param()


def points_inside(scene, count=200):
    generator = torch.Generator().manual_seed(1)
    return scene.inside(count, generator).double().requires_grad_()


def batch_of(scene, seed=0):
    """One of float64, whose edges are exactly where they are to be."""
    batch = scene.micro_batch(torch.Generator().manual_seed(seed))
    return Batch(batch.inputs.double(), batch.targets.double())


def by_task(scene, values):
    return dict(zip(scene.counts, values.split(list(scene.counts.values())), strict=True))


def test_the_exact_solution_satisfies_the_equations(scene):
    """By autograd of the solution's own formula, in float64."""
    points = points_inside(scene)
    residual = scene.residual(scene.exact, points)
    # Burgers' second derivative is up to 1e4 where the shock is.
    assert residual.abs().max() < (1e-12 if scene.name == "kovasznay" else 1e-8)
    # What is compared is not zero by itself.
    other = scene.residual(lambda p: 1.01 * scene.exact(p), points)
    assert other.abs().max() > 1e-3


def test_the_losses_of_the_exact_solution_are_zero(scene):
    losses = scene.losses(scene.exact, batch_of(scene), scene.tasks)
    assert set(losses) == set(scene.tasks)
    for task, values in losses.items():
        assert values.shape == (scene.counts[task],)
        assert values.max() < 1e-12  # squares; targets are rounded to float32
    off = scene.losses(lambda points: scene.exact(points) + 0.1, batch_of(scene), scene.tasks)
    for task in set(scene.tasks) - {physics.RESIDUAL}:
        assert off[task].mean() == pytest.approx(0.01 * len(scene.fields), rel=1e-4)


def test_the_error_is_relative_and_that_of_the_exact_solution_is_zero(scene):
    exact = scene.exact(scene.points.double())
    assert scene.error(exact).item() < 1e-6
    assert scene.error(1.25 * exact).item() == pytest.approx(0.25, abs=1e-6)


def test_points_lie_where_their_task_says(scene):
    points = by_task(scene, batch_of(scene).inputs)
    low, high = torch.tensor(scene.low), torch.tensor(scene.high)
    for one in points.values():
        assert bool(((one >= low) & (one <= high)).all())
    if scene.name == "burgers":
        assert set(points["boundary"][:, 1].tolist()) == {-1.0, 1.0}
        assert set(points["initial"][:, 0].tolist()) == {0.0}
        return
    edges = (points["boundary"] == low) | (points["boundary"] == high)
    assert bool((edges.sum(1) == 1).all())
    quarter = scene.counts["boundary"] // 4
    for place in (0, 1):
        for edge in (low, high):
            assert (points["boundary"][:, place] == edge[place]).sum() == quarter


def test_the_boundary_values_of_burgers_are_those_of_the_solution():
    scene = Burgers()
    points = by_task(scene, batch_of(scene).inputs)
    assert scene.exact(points["boundary"]).abs().max() < 1e-12
    start = points["initial"]
    assert torch.allclose(scene.exact(start)[:, 0], -torch.sin(math.pi * start[:, 1]), atol=1e-14)


def test_the_quadrature_of_burgers_has_converged(monkeypatch):
    scene = Burgers()
    points = points_inside(scene, 500).detach()
    found = scene.exact(points)
    monkeypatch.setattr(physics, "NODES", 160)
    assert (scene.exact(points) - found).abs().max() < 1e-10


def test_burgers_is_what_others_have_computed():
    """The steepest slope of Basdevant et al. 1986: 152.00516 at x = 0 and t = 1.6037 / π."""
    points = torch.tensor([[1.6037 / math.pi, 0.0]], dtype=torch.float64, requires_grad=True)
    slope = physics.gradient(Burgers().exact(points)[:, 0], points)[0, 1]
    assert slope.item() == pytest.approx(-152.00516, abs=1e-4)


@pytest.mark.parametrize(("t", "x"), [(0.25, 0.3), (0.75, -0.02)])
def test_burgers_is_the_ratio_of_adaptive_integrals(t, x):
    """Of Cole and Hopf's formula as it is printed, by another quadrature."""
    nu = physics.VISCOSITY

    def weight(eta):  # relative to the largest of f, e^50
        f = math.exp((-math.cos(math.pi * (x - eta)) - 1.0) / (2.0 * math.pi * nu))
        return f * math.exp(-(eta**2) / (4.0 * nu * t))

    def integral(function):
        return quad(function, -1.0, 1.0, points=[x - 1.0, 0.0, x + 1.0], epsabs=0, limit=500)[0]

    expected = -integral(lambda eta: math.sin(math.pi * (x - eta)) * weight(eta)) / integral(weight)
    found = Burgers().exact(torch.tensor([[t, x]], dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_some_tasks_are_computed_alone(scene):
    batch, model = batch_of(scene), scene.exact
    losses = scene.losses(model, batch, scene.tasks)
    for task in scene.tasks:
        alone = scene.losses(model, batch, [task])
        assert list(alone) == [task]
        assert torch.equal(alone[task], losses[task])


def test_gradients_of_all_tasks_are_those_of_autograd(scene):
    """The derivatives in a loss have a graph of their own, which GCondFused passes back through."""
    run = training.new_run(scene, PLAIN, 1, 0, CPU)
    batch = scene.micro_batch(torch.Generator().manual_seed(0))
    parameters = list(run.model.parameters())
    total = sum(training.task_losses(run, batch, scene.tasks).values())
    expected = torch.autograd.grad(total, parameters)
    optimizer = GCondFused(torch.optim.SGD(parameters, lr=0.0), scene.tasks, method=Sum())
    assert optimizer.backward(training.task_losses(run, batch, scene.tasks))
    for parameter, one in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, one, rtol=1e-4, atol=1e-6 * one.abs().max())


def test_a_short_training_lowers_the_error(scene):
    run = training.new_run(scene, PLAIN, 60, 0, CPU)
    for _ in training.train(run, 0):
        pass
    errors = [evaluation.scores["error"].item() for evaluation in run.evaluations]
    assert len(errors) == 1 + 60 / 2  # every other step, by `evaluations`
    assert errors[-1] < 0.8 * errors[0]


def test_loss_weights_are_changed_in_a_copy():
    scene = Kovasznay()
    changed = reweighted(scene, {"boundary": 10.0})
    assert changed.tasks == {"residual": 1.0, "boundary": 10.0}
    assert scene.tasks == {"residual": 1.0, "boundary": 1.0}
    assert type(changed) is Kovasznay
    with pytest.raises(KeyError, match="kovasznay has no task initial"):
        reweighted(scene, {"initial": 2.0})
