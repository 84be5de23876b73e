"""PCGrad and GradVac: random orders of the tasks, and target cosines."""

import itertools

import pytest
import torch

from gcond_kernels.methods import GradVac, PCGrad
from gcond_kernels.methods.pcgrad import random_orders
from tests.helpers.gramians import CPU, RANDOM, float64, random_gramian, resolve


@pytest.mark.parametrize("method", [PCGrad, GradVac])
def test_random_orders_are_a_function_of_seed_and_counter(method):
    S = random_gramian(5)

    def run(seed, steps=6):
        seeded = method(seed=seed)
        state = seeded.new_state(5, CPU)
        found = [resolve(seeded, S, state).weights for _ in range(steps)]
        assert int(state["counter"]) == steps
        return torch.stack(found)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert len(run(3).unique(dim=0)) > 1  # not the same order at every step
    for seed in (-1, 2**63 - 1, -(2**63)):
        assert torch.equal(run(seed, 2), run(seed, 2))


def test_each_row_has_a_permutation_of_its_own():
    S = torch.zeros(7, 5, 5)
    order = random_orders(S, 0, torch.tensor(0))
    assert order.shape == S.shape
    assert torch.equal(order.sort(-1)[0], torch.arange(5).expand(7, 5, 5))
    assert len(order.view(-1, 5).unique(dim=0)) > 25  # of 35 rows and 120 orders: 30 are expected
    assert not torch.equal(order, random_orders(S, 0, torch.tensor(1)))
    assert not torch.equal(order, random_orders(S, 1, torch.tensor(0)))


def test_all_orders_are_about_as_frequent():
    every = list(itertools.permutations(range(3)))
    drawn = torch.stack(
        [random_orders(torch.zeros(5, 3, 3), 1, torch.tensor(n)) for n in range(240)]
    )
    code = (drawn * torch.tensor([9, 3, 1])).sum(-1)  # [steps, batch, row]
    index = torch.stack([code == 9 * a + 3 * b + c for a, b, c in every]).int().argmax(0)
    # χ² of 5 and of 35 degrees of freedom, below what one in a thousand exceeds.
    counts = index.flatten().bincount(minlength=6).double()
    assert ((counts - 600.0) ** 2 / 600.0).sum() < 20.5
    for row in range(3):
        assert ((index[..., row].flatten().bincount(minlength=6) - 200.0) ** 2 / 200.0).sum() < 20.5
    # Two rows, and two steps, are independent.
    for pairs in (6 * index[..., 0] + index[..., 1], 6 * index[1:, :, 0] + index[:-1, :, 0]):
        counts = pairs.flatten().bincount(minlength=36).double()
        expected = counts.sum() / 36.0
        assert ((counts - expected) ** 2 / expected).sum() < 66.6


# ---- GradVac's targets.


def step_of_gradvac(beta, targets, J):
    """The weights and the new targets, of a step that finds these targets."""
    method = GradVac(beta=beta)
    state = method.new_state(len(J), CPU)
    state["target_cosines"].copy_(float64(targets))
    J = float64(J)
    return resolve(method, J @ J.mT, state).weights, state["target_cosines"]


def test_a_target_of_one_cannot_be_reached():
    """No multiple of another gradient makes two of them parallel."""
    state = GradVac(beta=1.0).new_state(2, CPU)
    resolve(GradVac(beta=1.0), float64([[1.0, 2.0], [2.0, 4.0]]), state)
    assert state["target_cosines"].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    w, targets = step_of_gradvac(1.0, state["target_cosines"].tolist(), [[1.0, 0.0], [0.6, 0.8]])
    assert w.tolist() == [1.0, 1.0]
    assert torch.allclose(targets, float64([[0.0, 0.6], [0.6, 0.0]]))


def test_the_targets_of_a_task_without_a_gradient_stay():
    before = [[0.0, 0.1, 0.2], [0.3, 0.0, 0.4], [0.5, 0.6, 0.0]]
    _, targets = step_of_gradvac(0.5, before, [[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    assert torch.equal(targets[1], float64(before[1]))
    assert torch.equal(targets[:, 1], float64(before)[:, 1])
    assert torch.allclose(targets[0, 2], float64(0.4))  # halfway to 0.6


def test_a_gradient_that_was_projected_to_zero_has_no_cosine(monkeypatch):
    order = torch.tensor([[1, 2, 0], [0, 2, 1], [0, 1, 2]])
    monkeypatch.setattr("gcond_kernels.methods.gradvac.random_orders", lambda *_: order)
    before = [[0.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    w, targets = step_of_gradvac(0.5, before, [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert targets[0, 2] == 0.5
    assert w.tolist() == [2.0, 2.0, 1.0]


def test_random_orders_of_gradients_on_one_line_are_defined():
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(2000, 4, 1, generator=generator, dtype=torch.float64)
    J = J * torch.randn(2000, 1, 3, generator=generator, dtype=torch.float64)
    for method in RANDOM:
        assert method(J @ J.mT).abs().amax() > 0.0  # not finite are 0, all of them
