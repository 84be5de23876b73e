"""GradNorm: weights that are trained by the norms of the gradients and the losses."""

import copy
import math
import pickle

import pytest
import torch

from gcond_kernels.methods import GradNorm
from gcond_kernels.methods.method import fresh_state
from tests.helpers.as_on_gpu import late_flags
from tests.helpers.gramians import (
    CPU,
    float64,
    is_unchanged,
    random_gramian,
    resolve,
    snapshot,
    warm,
)

EYE = torch.eye(2, dtype=torch.float64)


class AutogradGradNorm:
    """The formula of the paper, its gradient by autograd, and torch's own Adam."""

    def __init__(self, tasks, alpha, lr):
        self.w = torch.ones(tasks, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.w], lr=lr)
        self.alpha, self.first = alpha, {}

    def step(self, norms, losses):
        before = self.w.detach().clone()
        for k, loss in enumerate(losses):
            if math.isfinite(loss):
                self.first.setdefault(k, loss)
        K = len(losses)
        part = [k for k in range(K) if math.isfinite(losses[k]) and norms[k] > 0.0]
        self.w.grad = torch.zeros_like(self.w)
        if part:
            weighted = torch.stack([self.w[k] * norms[k] for k in part])
            ratio = float64([losses[k] / self.first[k] for k in part])
            target = (weighted.mean() * (ratio / ratio.mean()) ** self.alpha).detach()
            unit = sum(norms[k] for k in part) / len(part)
            ((weighted - target).abs().sum() / unit).backward()
        self.adam.step()
        with torch.no_grad():
            self.w.clamp_(min=0.0)
            kept = [k for k in range(K) if k not in part]
            self.w[kept] = before[kept]
            if part and self.w[part].sum() > 0.0:
                self.w[part] *= (K - self.w[kept].sum()) / self.w[part].sum()
            elif part:
                self.w[part] = before[part]
        return before


def windows(tasks, seed, with_gaps):
    """Norms and losses of 30 steps; with gaps some tasks take no part in some of them."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(30):
        losses = torch.rand(tasks, generator=generator, dtype=torch.float64) + 0.1
        norms = torch.rand(tasks, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5)
        losses, norms = losses.tolist(), (norms + 1e-3).tolist()
        if with_gaps and step % 3 == 0:
            losses[step % tasks], norms[step % tasks] = math.nan, 0.0
        if with_gaps and step % 7 == 5:
            norms[0] = 0.0  # it has a loss, but no gradient
        if with_gaps and step % 11 == 7:
            losses[-1] = math.inf  # a gradient, but no loss
        if with_gaps and step == 20:
            losses, norms = [math.nan] * tasks, [0.0] * tasks
        yield norms, losses


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize(("alpha", "lr"), [(1.5, 1e-3), (0.0, 0.025), (0.5, 0.3), (1.5, 0.3)])
@pytest.mark.parametrize("with_gaps", [False, True])
def test_weights_are_those_of_autograd_and_adam(tasks, alpha, lr, with_gaps):
    method, reference = GradNorm(alpha=alpha, lr=lr), AutogradGradNorm(tasks, alpha, lr)
    state = method.new_state(tasks, CPU)
    for step, (norms, losses) in enumerate(windows(tasks, tasks, with_gaps)):
        S = torch.diag(float64(norms) ** 2)
        present = (float64(norms) > 0.0).double()
        decision = resolve(method, S, state, float64(losses))
        expected = reference.step(norms, losses)
        if step == 0:
            assert decision.weights.tolist() == present.tolist()
        # The same formulas in another order, over 30 steps that each divide by a root.
        assert torch.allclose(decision.weights, expected * present, rtol=1e-9, atol=1e-12)
        assert torch.allclose(state["task_weights"], reference.w.detach(), rtol=1e-9, atol=1e-12)
        assert abs(float(state["task_weights"].sum()) - tasks) < 1e-9


def test_windows_without_any_gradient_leave_the_state_finite():
    method = GradNorm(lr=0.1)
    state = method.new_state(2, CPU)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    for losses in ([math.nan, math.nan], [1.0, 2.0], [0.0, 0.0], [math.inf, 1.0]):
        assert bool(resolve(method, nothing, state, float64(losses)).finite)
    resolve(method, EYE, state, float64([1.0, 3.0]))
    assert all(value.isfinite().all() for value in state.values())
    assert state["task_weights"][0] != state["task_weights"][1]


def test_weights_that_would_all_fall_to_zero_stay():
    method = GradNorm(alpha=0.5, lr=2.0)
    state = method.new_state(2, CPU)
    resolve(method, EYE, state, float64([1.0, 1.0]))
    # Both are longer than their targets, 1 · √1.6 and 1 · √0.4.
    resolve(method, torch.diag(float64([1.3, 0.7]) ** 2), state, float64([1.6, 0.4]))
    assert state["task_weights"].tolist() == [1.0, 1.0]
    assert (state["average"] > 0.0).all()


def test_a_batch_of_gramians_shares_the_losses():
    state = fresh_state(GradNorm(), 3, (4,), CPU)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    own = dict.fromkeys(("task_weights", "average", "square_average"), (4, 3))
    assert shapes == {"initial_losses": (3,), "updates": (), **own}


def test_losses_are_required():
    with pytest.raises(ValueError, match="GradNorm: losses must be given"):
        GradNorm()(random_gramian(2))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0, -0.5], "the loss of task 'depth' is -0.5"),
        ([1.0, 0.0], "the loss of task 'depth' is 0"),
        ([-1.0, -2.0], "the loss of task 'pose' is -1 and the loss of task 'depth' is -2"),
    ],
)
def test_a_loss_that_is_not_positive_is_named_and_changes_nothing(batch, losses, message):
    method = GradNorm(lr=0.1)
    state, S = fresh_state(method, 2, batch, CPU), random_gramian(2).expand(*batch, 2, 2)
    for step in range(2):
        before = snapshot(state)
        with pytest.raises(ValueError, match=f"GradNorm .* positive, but {message}. .* constant"):
            resolve(method, S, state, float64(losses), tasks=("pose", "depth"))
        assert is_unchanged(state, before)
        after = resolve(method, S, state, float64([1.0, 2.0 + step]))  # it can go on
        assert bool(after.finite)
    assert int(state["updates"]) == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_counts_as_missing(loss):
    state, losses = warm(GradNorm(), 2), float64([1, loss])
    assert bool(resolve(GradNorm(), random_gramian(2), state, losses).finite)


def test_a_loss_of_zero_without_a_gradient_counts_as_missing():
    S = torch.diag(float64([1.0, 0.0]))
    assert GradNorm()(S, [1.0, 0.0]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="task 1 is -1"):  # without a name by its number
        GradNorm()(S, [1.0, -1.0])


def test_losses_of_a_skipped_step_are_not_checked():
    S = torch.diag(float64([math.nan, 0.0]))
    state = GradNorm().new_state(2, CPU)
    assert not bool(resolve(GradNorm(), S, state, float64([-1.0, 0.0])).finite)


def test_on_a_gpu_the_step_is_skipped_and_a_later_one_raises(monkeypatch):
    events = late_flags(monkeypatch)
    method, S = GradNorm(lr=0.1), random_gramian(2)
    state = warm(method, 2)
    events[-1].done = True
    before = snapshot(state)
    losses = float64([1.0, -0.5])
    decision = resolve(method, S, state, losses)
    assert not bool(decision.finite)
    assert decision.weights.tolist() == [0.0, 0.0]
    assert is_unchanged(state, before)
    losses += 5.0  # what was noted is not what stands here later
    assert bool(resolve(method, S, state, losses).finite)  # the flag is on its way
    before = snapshot(state)
    events[-1].done = True
    with pytest.raises(ValueError, match=r"the loss of task 1 is -0\.5"):
        resolve(method, S, state, losses)
    assert is_unchanged(state, before)
    assert bool(resolve(method, S, state, losses).finite)


def test_a_flag_that_arrives_during_a_call_raises(monkeypatch):
    events, method = late_flags(monkeypatch), GradNorm()
    state, S = method.new_state(2, CPU), random_gramian(2)
    resolve(method, S, state, float64([1.0, -0.5]))
    answers = iter([False, True, True])
    events[-1].query = lambda: next(answers)
    with pytest.raises(ValueError, match=r"but the loss of task 1 is -0\.5\. That"):
        resolve(method, S, state, float64([1.0, 1.0]))


def test_copies_and_comparisons_ignore_the_flag(monkeypatch):
    late_flags(monkeypatch)
    method = GradNorm(lr=0.1)
    resolve(method, random_gramian(2), method.new_state(2, CPU), float64([1.0, -0.5]))
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method)), GradNorm(lr=0.1)):
        assert twin == method
        assert hash(twin) == hash(method)
        assert repr(twin) == repr(method) == "GradNorm(alpha=1.5, lr=0.1, parameters=None)"
        assert twin._positive._kept is None
