"""What must hold of every method that weighs tasks by their Gramian, whatever the Gramian."""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from gcond_kernels.methods import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    GCond,
    GradDrop,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
    aligned_mtl,
    imtl_g,
    solvers,
)
from gcond_kernels.methods.function import Function
from gcond_kernels.methods.method import Comparison, Known, fresh_state
from gcond_kernels.methods.pcgrad import random_orders
from gcond_kernels.methods.solvers import FLOAT64_ROUNDING
from tests.conftest import slow
from tests.helpers.as_on_gpu import late_flags
from tests.helpers.host_reads import HostReads
from tests.methods.test_solvers import gradients, gramian, spread

# The older form of GCond whose pairs give way to each other, whichever comes first.
MUTUAL = GCond(arbitration="zones", thresholds=(-1.0, -1.0, 0.0))

SOLVED = [UPGrad(), MGDA(), CAGrad(), IMTLG(), NashMTL(), AlignedMTL()]
RANDOM = [PCGrad(), GradVac()]
METHODS = [Sum(), *SOLVED, *RANDOM, GradNorm(), GCond()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**31)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(method, S):
    """From a fresh state; where losses are needed they are those of a first step."""
    return method(S, S.new_ones(S.shape[-1]) if method.needs_losses else None)


def resolve(method, S, state, losses=None):
    if method.needs_losses and losses is None:
        losses = S.new_ones(S.shape[-1])
    known = Known(FLOAT64_ROUNDING, losses)
    return method.decide(Comparison(S, None, S.new_ones(S.shape[-1]), known=known), state)


def random_gramian(tasks, seed=0, family="conflicting"):
    return gramian(gradients(family, tasks, seed))


def warm(method, tasks, batch=()):
    """A state with something in it."""
    state = fresh_state(method, tasks, batch, CPU)
    for seed in range(3):
        S = random_gramian(tasks, seed)
        losses = float64([1.0 + seed * k for k in range(tasks)])
        resolve(method, S.expand(*batch, tasks, tasks).contiguous(), state, losses)
    return state


# ---- Defined wherever gradients are.

DEFINED = {
    "one task": [[3.0, 4.0]],
    "two identical": [[1.0, 2.0]] * 2,
    "three identical": [[1.0, 2.0]] * 3,
    "five identical": [[0.1, 0.7]] * 5,
    "two anti-parallel": [[1.0, 2.0], [-1.0, -2.0]],
    "two anti-parallel, unlike": [[0.3, 0.7], [-3e3, -7e3]],
    "two parallel, unlike": [[0.3, 0.7], [3e3, 7e3]],
    "four that cancel out": [[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0], [-2.0, 1.0]],
    "three that cancel out": [[1.0, 0.0], [-0.6, 0.8], [-0.4, -0.8]],
    "more than there are dimensions": [[1.0], [-2.0], [0.5], [-0.25]],
    "a zero gradient": [[1.0, 2.0], [0.0, 0.0], [-2.0, 0.5]],
    "two zero gradients": [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]],
    "one beside a zero gradient": [[0.0, 0.0], [1.0, 2.0]],
    "one before a zero gradient": [[1.0, 2.0], [0.0, 0.0]],
    "anti-parallel beside a zero gradient": [[1.0, 2.0], [0.0, 0.0], [-1.0, -2.0]],
    "all zero": [[0.0, 0.0]] * 3,
    "two, both zero": [[0.0]] * 2,
    "one task without a gradient": [[0.0]],
}


@every_method
@pytest.mark.parametrize("case", DEFINED)
def test_defined(method, case):
    state = fresh_state(method, len(DEFINED[case]), (), CPU)
    for scale in (1.0, 1.0, 1e-12, 1e12):
        J = scale * float64(DEFINED[case])
        decision = resolve(method, J @ J.mT, state)
        assert bool(decision.finite)
        assert decision.weights.isfinite().all()
        assert decision.weights.dtype == torch.float64
        # Dependent gradients have a bound of 1e6, the root of a ridge of 1e-12, at length 1; Nash
        # has it for each task, and K of them.
        lengths = J.norm(dim=-1)
        assert (decision.weights * lengths).abs().amax() <= 4e6 * lengths.amax()
    assert all(value.isfinite().all() for value in state.values())


@every_method
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 12])
def test_defined_where_float32_has_left_the_gramian_indefinite(method, tasks):
    """A Gramian is a sum of float32 products: what ought to be 0 is 1e-7 of either sign."""
    generator = torch.Generator().manual_seed(tasks)
    for rank in (1, 2, 4):
        J = torch.randn(20, tasks, rank, generator=generator)
        w = weights(method, (J @ J.mT).double())
        assert w.isfinite().all()
        lengths = J.double().norm(dim=-1)
        largest = lengths.amax(-1, keepdim=True)
        assert ((w * lengths).abs() <= 1e8 * largest).all()


@pytest.mark.parametrize(
    ("method", "total"),
    [
        (Sum(), 3.0),
        (UPGrad(), 1.0),
        (MGDA(), 1.0),
        (CAGrad(c=0.4), 1.4),
        (IMTLG(), 1.0),
        (NashMTL(), 3.0),  # each has α² · 3 of S_kk, and 3 of it is the norm of S
        # √(λ / λ) of the one component.
        (AlignedMTL(), 1.0),
        (PCGrad(), 3.0),
        (GradVac(), 3.0),
        (GradNorm(), 3.0),
        (GCond(), 3.0),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "weights") else "",
)
def test_identical_tasks_share_alike_or_as_the_method_has_it(method, total):
    S = float64([[5.0] * 3] * 3)
    w = weights(method, S)
    assert abs(float(w.sum()) - total) < 1e-9
    # CAGrad's part for the worst-off may be anyone's; of a float64 S dependent gradients keep 1e-4.
    if not isinstance(method, CAGrad):
        assert (w - w.mean()).abs().amax() < 1e-4


def test_two_that_cancel_out():
    J = float64([[1.0, 2.0], [-3.0, -6.0]])
    S = J @ J.mT
    for method, expected in (
        (MGDA(), [0.75, 0.25]),
        (IMTLG(), [0.0, 0.0]),
        (PCGrad(), [4.0, 4 / 3]),
        (GradVac(), [4.0, 4 / 3]),
        (UPGrad(), [2.0, 2 / 3]),
    ):
        assert torch.allclose(weights(method, S), float64(expected), rtol=1e-9, atol=1e-12)
    assert (weights(NashMTL(), S) @ J).norm() < 1e-3 * weights(NashMTL(), S)[0]


# ---- Where one gradient is zero the others are weighed as if it were not there.


@every_method
@pytest.mark.parametrize("family", ["conflicting", "anti-parallel"])
def test_a_zero_gradient_takes_no_part(method, family):
    # Two others, where a random order of theirs is none.
    others = 2 if method in RANDOM else 4
    if isinstance(method, GCond):
        method = GCond(max_iterations=8)  # its own bound, 2 K, is of all tasks
    for seed, place in enumerate((0, 1, 2, 0, 1)):
        S = random_gramian(others, seed, family)
        kept = [k for k in range(others + 1) if k != place]
        padded = torch.zeros(others + 1, others + 1, dtype=torch.float64)
        padded[torch.tensor(kept)[:, None], torch.tensor(kept)] = S
        w, expected = weights(method, padded), weights(method, S)
        assert w[place] == 0.0
        # The same up to rounding, times the condition of the pair: 2e6.
        assert torch.allclose(
            w[kept], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().amax())
        )


@every_method
@pytest.mark.parametrize(("tasks", "place"), [(2, 0), (2, 1), (4, 2)])
def test_a_task_beside_zero_gradients_is_alone(method, tasks, place):
    S = torch.zeros(tasks, tasks, dtype=torch.float64)
    S[place, place] = 7.0
    w = weights(method, S)
    assert torch.allclose(w[place], weights(method, float64([[7.0]]))[0], rtol=1e-12)
    assert w.count_nonzero() == 1


# ---- What is not finite.


@every_method
def test_where_the_gramian_is_not_finite_nothing_changes(method):
    state = warm(method, 3)
    before = {name: tensor.clone() for name, tensor in state.items()}
    for value in (math.nan, math.inf, -math.inf):
        for place in ((0, 0), (2, 2), (0, 2)):
            S = random_gramian(3)
            S[place] = S[place[::-1]] = value
            decision = resolve(method, S, state, float64([1.0, 2.0, 3.0]))
            assert not bool(decision.finite)
            assert decision.weights.tolist() == [0.0] * 3
            for name, tensor in state.items():
                assert tensor.numpy().tobytes() == before[name].numpy().tobytes(), name
    assert bool(resolve(method, random_gramian(3), state).finite)


@every_method
def test_of_a_batch_with_one_that_is_not_finite_nothing_changes(method):
    state = warm(method, 3, (4,))
    before = {name: tensor.clone() for name, tensor in state.items()}
    S = torch.stack([random_gramian(3, seed) for seed in range(4)])
    S[2, 1, 1] = math.nan
    decision = resolve(method, S, state)
    assert not bool(decision.finite.any())
    assert decision.weights.abs().sum() == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_graddrop_has_no_weights():
    S = random_gramian(3)
    with pytest.raises(TypeError, match="it has no weights"):
        GradDrop()(S)
    with pytest.raises(TypeError, match="it has no weights"):
        GradDrop().weights(S, GradDrop().new_state(3, CPU), None)


# ---- Batches, scales, names.


@every_method
def test_a_batch_is_weighed_one_by_one(method):
    tasks = 2 if method in RANDOM else 4  # the orders of two are all the same
    S = torch.stack([random_gramian(tasks, seed) for seed in range(6)])
    S[0, 1, :] = S[0, :, 1] = 0.0
    one_by_one = torch.stack([weights(method, S[b]) for b in range(6)])
    for shape in ((6,), (2, 3), (1, 2, 3)):
        at_once = weights(method, S.view(*shape, tasks, tasks))
        assert at_once.shape == (*shape, tasks)
        # Batched products and solves may round otherwise.
        assert torch.allclose(at_once.view(6, tasks), one_by_one, rtol=1e-9, atol=1e-12)
    assert torch.allclose(weights(method, S[:1]), one_by_one[:1], rtol=1e-9, atol=1e-12)


@every_method
def test_states_of_a_batch_are_of_each_gramian(method):
    tasks = 2 if method in RANDOM else 3
    batch = fresh_state(method, tasks, (4,), CPU)
    alone = [fresh_state(method, tasks, (), CPU) for _ in range(4)]
    for step in range(4):
        S = torch.stack([random_gramian(tasks, 4 * step + b) for b in range(4)])
        losses = float64([1.0 + 0.3 * step * k for k in range(tasks)])
        at_once = resolve(method, S, batch, losses).weights
        for b in range(4):
            one = resolve(method, S[b], alone[b], losses).weights
            assert torch.allclose(at_once[b], one, rtol=1e-9, atol=1e-12)
    for name, value in batch.items():
        for b in range(4):
            own = value if name in method.shared_state else value[b]
            assert torch.allclose(own.double(), alone[b][name].double(), rtol=1e-9, atol=1e-12)


@every_method
@given(seed=SEEDS, tasks=st.integers(1, 5), by=st.sampled_from([1e-6, 1e6, 3.0, 1e-12, 1e12]))
@settings(max_examples=20)
def test_the_scale_of_the_gradients_does_not_matter(method, seed, tasks, by):
    S = random_gramian(tasks, seed, "random")
    # 3 and 10 are no powers of two: S is rounded anew.
    assert torch.allclose(weights(method, by**2 * S), weights(method, S), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [Sum(), *SOLVED, MUTUAL], ids=lambda m: type(m).__name__)
@given(seed=SEEDS, order=st.permutations(range(5)))
@settings(max_examples=20)
def test_tasks_in_another_order_have_the_same_weights(method, seed, order):
    S = random_gramian(5, seed)
    moved = S[order][:, order]
    assert torch.allclose(weights(method, moved), weights(method, S)[order], rtol=1e-7, atol=1e-9)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_of_the_type_of_the_gramian_which_is_left_alone(method, dtype):
    S = random_gramian(3).to(dtype)
    before = S.clone()
    w = weights(method, S)
    assert w.dtype == dtype
    assert torch.equal(S, before)
    assert torch.equal(w, weights(method, S.double()).to(dtype))


@every_method
def test_weights_have_no_graph(method):
    S = random_gramian(3).requires_grad_()
    assert not weights(method, S).requires_grad


def test_gradients_of_float32_are_dependent_sooner_than_those_of_float64():
    """Whether two are opposite to 1e-8: float64 knows, and the sums of float32 do not."""
    S = float64([[1.0, -1.0 + 1e-8], [-1.0 + 1e-8, 1.0]])
    method, root = NashMTL(), float(torch.linalg.matrix_norm(S)) ** 0.5
    assert torch.allclose(method(S), root * float64([1e4, 1e4]), rtol=1e-6)
    assert torch.allclose(method(S.float()).double(), root * float64([1024.0, 1024.0]), rtol=1e-2)
    # Nobody said that these are of float64.
    untold = method.decide(Comparison(S, None, S.new_ones(2)), {}).weights
    assert torch.allclose(untold, root * float64([1024.0, 1024.0]), rtol=1e-2)


# ---- Two tasks: PCGrad is GCond where both give way.


@given(
    seed=SEEDS,
    cosine=st.one_of(st.floats(-1.0, 1.0), st.sampled_from([-1.0, -1.0 + 1e-7, -1e-5, 0.0, 1.0])),
    decades=st.floats(-6.0, 6.0),
)
@settings(max_examples=50)
def test_two_tasks_of_pcgrad_are_those_of_gcond_where_both_give_way(seed, cosine, decades):
    length = 10.0**decades
    S = float64([[1.0, cosine * length], [cosine * length, length**2]])
    ours, theirs = PCGrad(seed=seed)(S), MUTUAL(S)
    # A cosine of -1e-6 or more is no conflict for GCond: PCGrad gives way by that much. -1 itself
    # is no more than its θ_crit, and resolved as all others are.
    apart = 1e-6 * max(length, 1.0 / length) if -1e-6 <= cosine < 0.0 else 0.0
    assert ((ours - theirs).abs() <= apart + 1e-12 * theirs.abs()).all()


# ---- Random orders.


@pytest.mark.parametrize("method", [PCGrad, GradVac])
def test_random_orders_are_a_function_of_seed_and_draws(method):
    S = random_gramian(5)

    def run(seed, steps=6):
        m = method(seed=seed)
        state = m.new_state(5, CPU)
        found = [resolve(m, S, state).weights for _ in range(steps)]
        assert int(state["counter"]) == steps
        return torch.stack(found)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert len(run(3).unique(dim=0)) > 1  # not the same order at every step
    for seed in (-1, 2**63 - 1, -(2**63)):
        assert torch.equal(run(seed, 2), run(seed, 2))


def test_orders_are_permutations_and_each_row_has_its_own():
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
        [random_orders(torch.zeros(5, 3, 3), 1, torch.tensor(d)) for d in range(240)]
    )
    code = (drawn * torch.tensor([9, 3, 1])).sum(-1)  # [draws, batch, row]
    index = torch.stack([code == 9 * a + 3 * b + c for a, b, c in every]).int().argmax(0)
    # χ² of 5 and of 35 degrees of freedom, below what one in a thousand exceeds.
    counts = index.flatten().bincount(minlength=6).double()
    assert ((counts - 600.0) ** 2 / 600.0).sum() < 20.5
    for row in range(3):
        assert ((index[..., row].flatten().bincount(minlength=6) - 200.0) ** 2 / 200.0).sum() < 20.5
    # Nor do two rows, or two draws, have to do with each other.
    for pairs in (6 * index[..., 0] + index[..., 1], 6 * index[1:, :, 0] + index[:-1, :, 0]):
        counts = pairs.flatten().bincount(minlength=36).double()
        expected = counts.sum() / 36.0
        assert ((counts - expected) ** 2 / expected).sum() < 66.6


# ---- GradVac: what its targets follow.


def vaccinated(beta, targets, J):
    """The weights and the new targets, of a step that finds these targets."""
    method = GradVac(beta=beta)
    state = method.new_state(len(J), CPU)
    state["target_cosines"].copy_(float64(targets))
    J = float64(J)
    return resolve(method, J @ J.mT, state).weights, state["target_cosines"]


def test_a_target_of_one_is_not_to_be_had():
    """No multiple of another gradient makes two of them parallel."""
    state = GradVac(beta=1.0).new_state(2, CPU)
    resolve(GradVac(beta=1.0), float64([[1.0, 2.0], [2.0, 4.0]]), state)
    assert state["target_cosines"].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    w, targets = vaccinated(1.0, state["target_cosines"].tolist(), [[1.0, 0.0], [0.6, 0.8]])
    assert w.tolist() == [1.0, 1.0]
    assert torch.allclose(targets, float64([[0.0, 0.6], [0.6, 0.0]]))


def test_the_targets_of_a_task_without_a_gradient_stay():
    before = [[0.0, 0.1, 0.2], [0.3, 0.0, 0.4], [0.5, 0.6, 0.0]]
    _, targets = vaccinated(0.5, before, [[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    assert torch.equal(targets[1], float64(before[1]))
    assert torch.equal(targets[:, 1], float64(before)[:, 1])
    assert torch.allclose(targets[0, 2], float64(0.4))  # halfway to 0.6


def test_what_has_given_way_entirely_has_no_cosine(monkeypatch):
    order = torch.tensor([[1, 2, 0], [0, 2, 1], [0, 1, 2]])
    monkeypatch.setattr("gcond_kernels.methods.gradvac.random_orders", lambda *_: order)
    before = [[0.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    w, targets = vaccinated(0.5, before, [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert targets[0, 2] == 0.5
    assert w.tolist() == [2.0, 2.0, 1.0]


def test_random_orders_of_gradients_on_one_line_are_defined():
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(2000, 4, 1, generator=generator, dtype=torch.float64)
    J = J * torch.randn(2000, 1, 3, generator=generator, dtype=torch.float64)
    for method in RANDOM:
        assert method(J @ J.mT).abs().amax() > 0.0  # not finite are 0, all of them


# ---- GradNorm.


class AutogradGradNorm:
    """The formula of the paper, its gradient by autograd, and torch's own Adam."""

    def __init__(self, tasks, alpha, lr):
        self.w = torch.ones(tasks, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.w], lr=lr)
        self.alpha, self.first = alpha, {}

    def step(self, lengths, losses):
        before = self.w.detach().clone()
        for k, loss in enumerate(losses):
            if math.isfinite(loss):
                self.first.setdefault(k, loss)
        K = len(losses)
        part = [k for k in range(K) if math.isfinite(losses[k]) and lengths[k] > 0.0]
        self.w.grad = torch.zeros_like(self.w)
        if part:
            norms = torch.stack([self.w[k] * lengths[k] for k in part])
            ratio = float64([losses[k] / self.first[k] for k in part])
            target = (norms.mean() * (ratio / ratio.mean()) ** self.alpha).detach()
            unit = sum(lengths[k] for k in part) / len(part)
            ((norms - target).abs().sum() / unit).backward()
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


def windows(tasks, seed, sits_out):
    """Steps of losses and lengths that change; some tasks are out of some of them."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(30):
        losses = torch.rand(tasks, generator=generator, dtype=torch.float64) + 0.1
        lengths = torch.rand(tasks, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5)
        losses, lengths = losses.tolist(), (lengths + 1e-3).tolist()
        if sits_out and step % 3 == 0:
            losses[step % tasks], lengths[step % tasks] = math.nan, 0.0
        if sits_out and step % 7 == 5:
            lengths[0] = 0.0  # it has a loss, but no gradient
        if sits_out and step % 11 == 7:
            losses[-1] = math.inf  # a gradient, but no loss to tell a rate by
        if sits_out and step == 20:
            losses, lengths = [math.nan] * tasks, [0.0] * tasks
        yield lengths, losses


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize(("alpha", "lr"), [(1.5, 1e-3), (0.0, 0.025), (0.5, 0.3), (1.5, 0.3)])
@pytest.mark.parametrize("sits_out", [False, True])
def test_gradnorm_is_autograd_and_adam(tasks, alpha, lr, sits_out):
    method, reference = GradNorm(alpha=alpha, lr=lr), AutogradGradNorm(tasks, alpha, lr)
    state = method.new_state(tasks, CPU)
    for step, (lengths, losses) in enumerate(windows(tasks, tasks, sits_out)):
        S = torch.diag(float64(lengths) ** 2)
        present = (float64(lengths) > 0.0).double()
        decision = resolve(method, S, state, float64(losses))
        expected = reference.step(lengths, losses)
        if step == 0:
            assert decision.weights.tolist() == present.tolist()
        # The same formulas in another order, over 30 steps that each divide by a root.
        assert torch.allclose(decision.weights, expected * present, rtol=1e-9, atol=1e-12)
        assert torch.allclose(state["task_weights"], reference.w.detach(), rtol=1e-9, atol=1e-12)
        assert abs(float(state["task_weights"].sum()) - tasks) < 1e-9


def test_gradnorm_keeps_the_weight_of_a_task_that_sits_out():
    method = GradNorm(lr=0.1)
    state = warm(method, 3)
    before = state["task_weights"].clone()
    S = random_gramian(3)
    S[1, :] = S[:, 1] = 0.0
    resolve(method, S, state, float64([0.5, math.nan, 2.0]))
    assert state["task_weights"][1] == before[1]
    assert (state["task_weights"][[0, 2]] != before[[0, 2]]).all()


def test_gradnorm_outlives_windows_without_any_gradient():
    method = GradNorm(lr=0.1)
    state = method.new_state(2, CPU)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    for losses in ([math.nan, math.nan], [1.0, 2.0], [0.0, 0.0], [math.inf, 1.0]):
        assert bool(resolve(method, nothing, state, float64(losses)).finite)
    resolve(method, torch.eye(2, dtype=torch.float64), state, float64([1.0, 3.0]))
    assert all(value.isfinite().all() for value in state.values())
    assert state["task_weights"][0] != state["task_weights"][1]


def test_gradnorm_keeps_the_weights_where_all_would_fall_to_zero():
    method = GradNorm(alpha=0.5, lr=2.0)
    state = method.new_state(2, CPU)
    resolve(method, torch.eye(2, dtype=torch.float64), state, float64([1.0, 1.0]))
    # Both are longer than their targets, 1 · √1.6 and 1 · √0.4.
    resolve(method, torch.diag(float64([1.3, 0.7]) ** 2), state, float64([1.6, 0.4]))
    assert state["task_weights"].tolist() == [1.0, 1.0]
    assert (state["average"] > 0.0).all()


def test_losses_are_those_of_a_whole_batch():
    state = fresh_state(GradNorm(), 3, (4,), CPU)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    own = dict.fromkeys(("task_weights", "average", "square_average"), (4, 3))
    assert shapes == {"initial_losses": (3,), "updates": (), **own}


def test_gradnorm_pulls_along_the_task_that_trains_more_slowly():
    method = GradNorm(lr=0.01)
    state = method.new_state(2, CPU)
    S = torch.eye(2, dtype=torch.float64)
    resolve(method, S, state, float64([1.0, 4.0]))
    for _ in range(20):
        resolve(method, S, state, float64([0.9, 1.0]))  # the second is at a quarter
    first, second = state["task_weights"].tolist()
    assert first > 1.05 > 0.95 > second


def test_gradnorm_without_losses_says_so():
    with pytest.raises(ValueError, match="GradNorm: losses must be given"):
        GradNorm()(random_gramian(2))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0, -0.5], "the loss of task 'depth' is -0.5"),
        ([1.0, 0.0], "the loss of task 'depth' is 0"),
        ([-1.0, -2.0], "the loss of task 'pose' is -1 and the loss of task 'depth' is -2"),
    ],
)
def test_gradnorm_says_whose_loss_is_not_positive_and_changes_nothing(batch, losses, said):
    method = GradNorm(lr=0.1)
    state, S = fresh_state(method, 2, batch, CPU), random_gramian(2).expand(*batch, 2, 2)
    for step in range(2):
        before = {name: value.clone() for name, value in state.items()}
        known = Known(losses=float64(losses), tasks=("pose", "depth"))
        with pytest.raises(ValueError, match=f"GradNorm .* positive, but {said}. .* constant"):
            method.decide(Comparison(S, None, S.new_ones(2), known=known), state)
        assert all(torch.equal(value, before[name]) for name, value in state.items())
        after = resolve(method, S, state, float64([1.0, 2.0 + step]))  # it can go on
        assert bool(after.finite)
    assert "updates" in state
    assert int(state["updates"]) == 2


def test_gradnorm_names_a_task_without_a_name_by_its_number():
    with pytest.raises(ValueError, match="the loss of task 1 is -3"):
        GradNorm()(random_gramian(2), [1.0, -3.0])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_none(loss):
    assert bool(
        resolve(GradNorm(), random_gramian(2), warm(GradNorm(), 2), float64([1, loss])).finite
    )


def test_a_loss_of_zero_without_a_gradient_is_none():
    S = torch.diag(float64([1.0, 0.0]))
    assert GradNorm()(S, [1.0, 0.0]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="task 1 is -1"):
        GradNorm()(S, [1.0, -1.0])


def test_losses_of_a_step_that_is_skipped_are_not_looked_at():
    S = torch.diag(float64([math.nan, 0.0]))
    state = GradNorm().new_state(2, CPU)
    assert not bool(resolve(GradNorm(), S, state, float64([-1.0, 0.0])).finite)


def test_on_a_gpu_gradnorm_skips_the_step_and_says_so_later(monkeypatch):
    events = late_flags(monkeypatch)
    method, S = GradNorm(lr=0.1), random_gramian(2)
    state = warm(method, 2)
    events[-1].done = True
    before = {name: value.clone() for name, value in state.items()}
    losses = float64([1.0, -0.5])
    decision = resolve(method, S, state, losses)
    assert not bool(decision.finite)
    assert decision.weights.tolist() == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    losses += 5.0  # what was noted is not what stands here later
    assert bool(resolve(method, S, state, losses).finite)  # the flag is on its way
    before = {name: value.clone() for name, value in state.items()}
    events[-1].done = True
    with pytest.raises(ValueError, match=r"the loss of task 1 is -0\.5"):
        resolve(method, S, state, losses)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert bool(resolve(method, S, state, losses).finite)


def test_a_copy_that_arrives_in_the_middle_of_a_call_is_told_of(monkeypatch):
    events, method = late_flags(monkeypatch), GradNorm()
    state, S = method.new_state(2, CPU), random_gramian(2)
    resolve(method, S, state, float64([1.0, -0.5]))
    answers = iter([False, True, True])
    events[-1].query = lambda: next(answers)
    with pytest.raises(ValueError, match=r"but the loss of task 1 is -0\.5\. That"):
        resolve(method, S, state, float64([1.0, 1.0]))


def test_gradnorm_is_copied_and_compared_without_what_it_has_noted(monkeypatch):
    late_flags(monkeypatch)
    method = GradNorm(lr=0.1)
    resolve(method, random_gramian(2), method.new_state(2, CPU), float64([1.0, -0.5]))
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method)), GradNorm(lr=0.1)):
        assert twin == method
        assert hash(twin) == hash(method)
        assert repr(twin) == repr(method) == "GradNorm(alpha=1.5, lr=0.1, parameters=None)"
        assert twin._positive._noted is None


# ---- Nothing waits for the device.


class Uploads(TorchFunctionMode):
    """Lists what makes a tensor of numbers of the host, which on a GPU waits for a copy."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "from_numpy", "scalar_tensor"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["", "jacobi"])
def eigenvalues(request, monkeypatch):
    """By torch's own routine, as on a CPU, and as on a GPU, where that would wait."""
    if request.param == "jacobi":
        for module in (solvers, aligned_mtl, imtl_g):
            monkeypatch.setattr(module, "eigh", solvers.jacobi)


# GCond's backend here is Python's, which resolves on the host (see gcond_kernels/python); with a
# kernel backend it does not. All others are operations of torch and nothing else.
ON_THE_DEVICE = [method for method in METHODS if not isinstance(method, GCond)]
on_the_device = pytest.mark.parametrize("method", ON_THE_DEVICE, ids=lambda m: type(m).__name__)


@on_the_device
@pytest.mark.parametrize("batch", [(), (5,)])
def test_no_value_is_read_by_the_host(method, batch, eigenvalues, monkeypatch):
    late_flags(monkeypatch)
    S = random_gramian(4).expand(*batch, 4, 4).contiguous()
    state = fresh_state(method, 4, batch, CPU)
    losses = torch.ones(4, dtype=torch.float64)
    resolve(method, S, state, losses)
    with HostReads() as reads, Uploads() as uploads:
        resolve(method, S, state, losses)
    assert reads.found == []
    assert uploads.found == []


def test_reads_by_the_host_would_be_found():
    with HostReads() as reads:
        resolve(GCond(), random_gramian(2), GCond().new_state(2, CPU))
    assert reads.found
    with Uploads() as uploads:
        torch.tensor([1.0])
    assert uploads.found == ["tensor"]


@pytest.mark.parametrize("method", SOLVED, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_weights_are_the_same_by_the_eigenvalues_that_a_gpu_takes(monkeypatch, method, tasks):
    # Of float32 gradients: eigenvalues of 1e-12 have 1e-4 of rounding, whichever way.
    S = torch.stack([random_gramian(tasks, seed) for seed in range(10)]).float()
    S[0] = 0.0
    if tasks > 1:
        S[1, 1, :] = S[1, :, 1] = 0.0
        J = torch.randn(tasks, 1, generator=torch.Generator().manual_seed(tasks))
        S[2] = J @ J.mT
    w = weights(method, S)
    for module in (solvers, aligned_mtl, imtl_g):
        monkeypatch.setattr(module, "eigh", solvers.jacobi)
    assert torch.allclose(weights(method, S), w, rtol=1e-5, atol=1e-6)


@on_the_device
@pytest.mark.parametrize("tasks", [1, slow(2), 5])
def test_shapes_alone_are_enough(method, tasks, eigenvalues):
    """On the device "meta" there are no values: what needs one to go on raises."""
    meta = torch.device("meta")
    S = torch.empty(3, tasks, tasks, dtype=torch.float64, device=meta)
    state = fresh_state(method, tasks, (3,), meta)
    losses = torch.empty(tasks, dtype=torch.float64, device=meta)
    decision = resolve(method, S, state, losses)
    assert decision.weights.shape == (3, tasks)
    assert decision.weights.device == decision.finite.device == meta


# ---- Options.


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        *((PCGrad, "seed", value) for value in (1.5, "1", None, True, 2**63, -(2**63) - 1)),
        *((GradVac, "seed", value) for value in (1.5, 2**63)),
        *((GradDrop, "seed", value) for value in (0.0, -(2**64))),
        *((GradVac, "beta", value) for value in (-0.1, 1.1, math.nan, "0.5", None, True)),
        *((GradDrop, "leak", value) for value in (-1e-9, 2.0, math.inf, None)),
        *((CAGrad, "c", value) for value in (-0.5, math.nan, math.inf, "1", None, True)),
        *((CAGrad, "rescale", value) for value in (3, -1, 1.0, True, "1", None)),
        *((GradNorm, "alpha", value) for value in (-1.0, math.inf, math.nan, None)),
        *((GradNorm, "lr", value) for value in (-1e-3, math.inf, "1e-3")),
        *((GradNorm, "parameters", value) for value in ("head", 5, [1, 2], (None,))),
    ],
)
def test_options_out_of_range_are_named(method, option, value):
    with pytest.raises(ValueError, match=f"^{method.__name__}: {option} must be") as error:
        method(**{option: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (CAGrad, {"c": 0, "rescale": 2}),
        (GradVac, {"beta": 1, "seed": -5}),
        (GradVac, {"beta": 0.0}),
        (GradDrop, {"leak": 1, "seed": 2**63 - 1}),
        (GradNorm, {"alpha": 0, "lr": 0.0, "parameters": ["trunk.last"]}),
        (PCGrad, {"seed": -(2**63)}),
    ],
)
def test_options_at_the_edge_of_their_range(method, options):
    made = method(**options)
    if method is GradDrop:
        return  # without weights
    assert weights(made, random_gramian(3)).isfinite().all()
    if method is GradNorm:
        assert made.parameters == ("trunk.last",)


# ---- A user's own function.


def halves(S):
    return torch.full((len(S),), 0.5, dtype=torch.float32)


def test_a_function_weighs():
    S = random_gramian(3)
    assert Function(halves)(S).tolist() == [0.5] * 3
    seen = []
    Function(lambda S: seen.append(S.clone()) or S.diagonal())(S)
    assert torch.equal(seen[0], S)


def test_a_function_weighs_batches_one_by_one():
    S = torch.stack([random_gramian(3, seed) for seed in range(6)])
    own = Function(lambda S: S.sum(-1) / S.diagonal())
    assert torch.allclose(own(S), S.sum(-1) / S.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(own(S.view(2, 3, 3, 3)), own(S).view(2, 3, 3))


def test_a_function_that_fails_on_numbers_changes_nothing():
    S = random_gramian(2)
    for value in (math.nan, math.inf):
        decision = resolve(Function(lambda S, v=value: S.new_tensor([1.0, v])), S, {})
        assert not bool(decision.finite)
        assert decision.weights.tolist() == [0.0, 0.0]
    S[0, 1] = math.nan
    asked = []
    decision = resolve(Function(lambda S: asked.append(S.clone()) or S.diagonal()), S, {})
    assert not bool(decision.finite)
    assert asked[0].isfinite().all()  # a function is not shown what is not finite


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.ones(3), r"\[3\]"),
        (torch.ones(2, 1), r"\[2, 1\]"),
        (torch.ones(()), r"\[\]"),
        ([1.0, 1.0], r"\[1.0, 1.0\]"),
        (None, "None"),
    ],
)
def test_a_function_that_returns_something_else_is_told(returned, said):
    with pytest.raises(ValueError, match=f"one weight for each of the 2 tasks.*not {said}"):
        Function(lambda S: returned)(random_gramian(2))


def test_a_function_is_named_without_an_address():
    assert repr(Function(halves)) == f"{__name__}.halves"
    assert "0x" not in repr(Function(functools.partial(halves)))

    class Callable:
        def __call__(self, S):
            return S.diagonal()

    assert "Callable" in repr(Function(Callable()))
    assert "0x" not in repr(Function(Callable()))


def test_a_graph_that_a_function_leaves_is_dropped():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    w = Function(lambda S: scale * S.diagonal())(random_gramian(2))
    assert not w.requires_grad


@every_method
def test_lengths_far_apart_leave_all_methods_defined(method):
    for seed in range(10):
        S = gramian(spread(gradients("conflicting", 6, seed), 9.0, seed))
        assert weights(method, S).isfinite().all()
