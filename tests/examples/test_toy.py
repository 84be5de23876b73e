"""The two-dimensional objective: its values, its Pareto set, and the ways to it."""

import math

import pytest
import torch

from examples import toy
from gcond_kernels.methods import Sum


def value(x, y, left):
    """One loss, as CAGrad's appendix has it, in plain numbers."""
    c1, c2 = max(math.tanh(0.5 * y), 0.0), max(math.tanh(-0.5 * y), 0.0)
    inner = 0.5 * (-x - 7.0) - math.tanh(-y) if left else 0.5 * (-x + 3.0) - math.tanh(-y) + 2.0
    f = math.log(max(abs(inner), 0.000005)) + 6.0
    g = ((-x + (7.0 if left else -7.0)) ** 2 + 0.1 * (-y - 8.0) ** 2) / 10.0 - 20.0
    return c1 * f + c2 * g


@pytest.mark.parametrize("place", [*toy.STARTS, (-5.0, 3.0), (9.0, 20.0), (2.0, -8.0)])
def test_the_losses_are_those_of_the_paper(place):
    found = toy.losses(torch.tensor(place, dtype=torch.float64))
    expected = [toy.SCALE * value(*place, left=True), value(*place, left=False)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def largest_cosine_of_gradients(points):
    points = points.clone().requires_grad_()
    both = toy.losses(points).sum(0)
    first, second = (torch.autograd.grad(one, points, retain_graph=True)[0] for one in both)
    return torch.cosine_similarity(first, second).max()


def test_on_the_pareto_set_the_gradients_are_opposite():
    points = toy.pareto_set(21)[1:-1]
    # The grid's distance of 0.025 turns a gradient by a little.
    assert largest_cosine_of_gradients(points) < -0.99
    assert largest_cosine_of_gradients(points + torch.tensor([0.0, 2.0])) > -0.99


def test_every_start_goes_its_own_way(monkeypatch):
    """As a plain loop of Adam takes it, by the sum of both losses."""
    monkeypatch.setattr(toy, "STEPS", 3)
    found = toy.trajectories(Sum())
    for number, start in enumerate(toy.STARTS):
        point = torch.nn.Parameter(torch.tensor(start))
        adam = torch.optim.Adam([point], lr=toy.LEARNING_RATE, betas=(0.9, 0.95), eps=1e-3)
        for step in range(1, 4):
            adam.zero_grad()
            toy.losses(point).sum().backward()
            adam.step()
            assert torch.allclose(found[step, number], point.detach(), atol=1e-5)


def test_the_picture_has_a_panel_for_each_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy, "STEPS", 2)
    drawn = []
    picture = toy.picture
    monkeypatch.setattr(toy, "picture", lambda ways: drawn.append(picture(ways)) or drawn[0])
    toy.main([str(tmp_path / "ways.png")])
    assert "ways.png" in capsys.readouterr().out
    assert (tmp_path / "ways.png").stat().st_size > 10_000
    assert [axes.get_title() for axes in drawn[0].axes] == list(toy.METHODS)
