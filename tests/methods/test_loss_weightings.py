"""Methods that weight the tasks by the values of their losses, and at random."""

import copy
import json
import math
import pickle
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from gcond_kernels import (
    DWA,
    FAMO,
    RLW,
    STCH,
    GCondFused,
    UncertaintyWeighting,
    resolve_gradients,
)
from gcond_kernels.methods.method import fresh_state
from tests.helpers.as_on_gpu import late_flags
from tests.helpers.gramians import CPU, LOSSES, float64, is_unchanged, name_of, resolve, snapshot

RECORDED = json.loads((Path(__file__).parents[1] / "data/libmtl_weightings.json").read_text())
EYE = torch.eye(3, dtype=torch.float64)
every_weighting = pytest.mark.parametrize("method", LOSSES, ids=name_of)


def steps_of(method, losses, gradients=None):
    """The weights of step after step; a task takes no part where its gradient is 0."""
    state = fresh_state(method, len(losses[0]), (), CPU)
    gradients = torch.ones(len(losses), len(losses[0])) if gradients is None else gradients
    pairs = zip(losses, gradients, strict=True)
    return torch.stack(
        [resolve(method, torch.diag(n.double()), state, L).weights for L, n in pairs]
    )


def losses_with_gaps(steps=60, tasks=3):
    """Losses around 1, and which tasks have a gradient; where one has none its loss is NaN or 0."""
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(steps, tasks, generator=generator, dtype=torch.float64).exp()
    present = torch.rand(steps, tasks, generator=generator) > 0.25
    present[30] = False
    present[:15, 2] = False  # a task that comes late
    losses[~present] = math.nan
    losses[::2][~present[::2]] = 0.0
    return losses, present


# ---- Against LibMTL, step by step.

# It adds 1e-8 to the losses of FAMO, and all there is else is rounding.
OF_LIBMTL = {
    "DWA": (DWA(steps_per_epoch=5), 1e-13),
    "FAMO": (FAMO(), 1e-8 / np.min(RECORDED["losses"])),
    "STCH": (STCH(warmup_steps=5), 1e-13),
    "STCH 0.3": (STCH(mu=0.3, warmup_steps=5), 1e-13),
    "UncertaintyWeighting": (UncertaintyWeighting(lr=0.05), 1e-13),
}


@pytest.mark.parametrize("name", OF_LIBMTL)
def test_weights_are_those_of_libmtl(name):
    method, tolerance = OF_LIBMTL[name]
    expected = float64(RECORDED["weights"][name])
    assert (expected[20:].std(0) > 1e-3 * expected.mean(0)).all()  # there is something to compare
    found = steps_of(method, float64(RECORDED["losses"]))
    assert ((found / expected - 1.0).abs() <= tolerance).all()


# ---- Against the formulas, also where tasks come and go.


def test_dwa_is_the_softmax_of_ratios_of_means():
    losses, present = losses_with_gaps()
    found = steps_of(DWA(steps_per_epoch=4, temperature=0.5), losses, present)
    L = losses.masked_fill(~present, 0.0).view(-1, 4, 3)
    count = present.view(-1, 4, 3).sum(1)
    means = L.sum(1) / count  # NaN without a loss
    for t, here in enumerate(present):
        epoch = t // 4
        ratio = torch.ones(3, dtype=torch.float64)
        if epoch >= 2:
            ratio = (means[epoch - 1] / means[epoch - 2]).nan_to_num(nan=1.0)
        powers = torch.where(here, (ratio / 0.5).exp(), 0.0)
        expected = here.sum() * powers / powers.sum().clamp(min=1e-300)
        assert torch.allclose(found[t], expected, rtol=1e-12, atol=0.0), t


def test_famo_descends_the_change_of_the_logarithms():
    losses, present = losses_with_gaps()
    found = steps_of(FAMO(lr=0.1, gamma=0.01), losses, present)
    logits = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    # Adam of torch leaves alone what has no gradient.
    adam, last = torch.optim.Adam(logits, lr=0.1, weight_decay=0.01), {}
    for t, here in enumerate(present):
        part = here.nonzero().flatten().tolist()
        learns = [k for k in part if k in last]
        if learns:
            adam.zero_grad()
            z = torch.stack([logits[k] for k in learns]).softmax(0)
            sum(z[i] * math.log(last[k] / losses[t, k]) for i, k in enumerate(learns)).backward()
            adam.step()
        last.update((k, float(losses[t, k])) for k in part)
        expected = torch.zeros(3, dtype=torch.float64)
        for k in part:
            expected[k] = float(logits[k].detach().exp()) / losses[t, k]
        expected /= expected.sum().clamp(min=1e-300)
        assert torch.allclose(found[t], expected, rtol=1e-10, atol=0.0), t
    assert found.std(0).min() > 0.01


def test_uncertainty_descends_its_objective():
    losses, present = losses_with_gaps()
    found = steps_of(UncertaintyWeighting(lr=0.1), losses, present)
    s = [torch.full((), -0.5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    adam = torch.optim.Adam(s, lr=0.1)
    for t, here in enumerate(present):
        adam.zero_grad()
        for k in range(3):
            expected = float((-s[k].detach()).exp()) / 2.0 if here[k] else 0.0
            assert float(found[t, k]) == pytest.approx(expected, rel=1e-12), t
            if here[k]:
                (losses[t, k] / (2.0 * s[k].exp()) + s[k] / 2.0).backward()
        adam.step()


def test_the_variance_of_a_constant_loss_ends_at_the_loss():
    found = steps_of(UncertaintyWeighting(lr=0.05), float64([[0.2, 1.0, 30.0]]).expand(2000, 3))
    assert torch.allclose(found[-1], float64([2.5, 0.5, 1.0 / 60.0]), rtol=1e-3)


def test_stch_is_the_slope_of_its_objective():
    losses, present = losses_with_gaps()
    found = steps_of(STCH(mu=0.4, warmup_steps=10), losses, present)
    first = [[] for _ in range(3)]
    for t, here in enumerate(present):
        leaf = losses[t].clone().requires_grad_()
        part = here.nonzero().flatten().tolist()
        joins = [k for k in part if len(first[k]) == 10]
        objective = leaf.sum() * 0.0 + sum(leaf[k].log() for k in part if k not in joins)
        if joins:
            relative = [(leaf[k] / statistics.fmean(first[k])).log() / 0.4 for k in joins]
            objective = objective + len(joins) * 0.4 * torch.stack(relative).logsumexp(0)
        objective.backward()
        for k in part:
            assert float(found[t, k]) == pytest.approx(float(leaf.grad[k]), rel=1e-12), t
            if k not in joins:
                first[k].append(float(losses[t, k]))
        assert found[t][~here].abs().sum() == 0.0
    assert all(len(one) == 10 for one in first)


# ---- At random.


def normal_numbers(seed, counter, count):
    """SplitMix64, started at a mixture of seed and counter, and the quantiles of its numbers."""
    gamma, words = 0x9E3779B97F4A7C15, 2**64

    def mixed(bits):
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % words
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % words
        return bits ^ (bits >> 31)

    start = mixed((counter * gamma + seed) % words)
    bits = [mixed((start + (place + 1) * gamma) % words) >> 41 for place in range(count)]
    return [statistics.NormalDist().inv_cdf((b + 0.5) / 2**23) for b in bits]


@pytest.mark.parametrize("seed", [0, -7])
def test_random_weights_are_a_softmax_of_normal_numbers(seed):
    state = fresh_state(RLW(), 4, (), CPU)
    for counter in range(5):
        squares = float64([2.0, 0.0 if counter == 3 else 1.0, 5.0, 1.0])
        found = resolve(RLW(seed=seed), torch.diag(squares), state).weights
        powers = np.exp(normal_numbers(seed, counter, int(squares.count_nonzero())))
        expected = len(powers) * powers / powers.sum()
        # The quantiles are of two different approximations.
        assert np.allclose(found[squares > 0.0].numpy(), expected, rtol=1e-9)
        assert (found[squares == 0.0] == 0.0).all()


def test_random_weights_are_one_on_average():
    state = fresh_state(RLW(), 3, (), CPU)
    found = torch.stack([resolve(RLW(), EYE, state).weights for _ in range(2000)])
    assert (found.mean(0) - 1.0).abs().max() < 4.0 * 0.75 / 2000**0.5  # 0.75: of one of them
    # The difference of two normal numbers has the variance 2, known to 0.063 from 2,000.
    assert abs(float((found[:, 0] / found[:, 1]).log().var()) - 2.0) < 4.0 * 0.063
    successive = torch.corrcoef(torch.stack([found[1:, 0], found[:-1, 0]]))[0, 1]
    assert abs(float(successive)) < 4.0 / 2000**0.5


def test_without_a_state_random_weights_would_be_the_same_in_every_call():
    p = torch.nn.Parameter(torch.zeros(2))
    gradients = [[torch.ones(2)], [torch.ones(2)]]
    with pytest.raises(ValueError, match="RLW draws random numbers"):
        resolve_gradients([p], gradients, RLW())
    state = {}
    assert not torch.equal(*(resolve_gradients([p], gradients, RLW(), state) for _ in range(2)))


# ---- Scales, tensors, tasks.


@every_weighting
def test_the_scale_of_a_loss(method):
    """That of the weight 1 / L goes with it; of DWA and the variances it does not matter."""
    losses = float64(RECORDED["losses"])[:12]
    if isinstance(method, DWA):
        method = DWA(steps_per_epoch=3)
    if isinstance(method, STCH):
        method = STCH(mu=0.5, warmup_steps=5)
    by = float64([7.0, 1.0, 0.01])
    found, scaled = steps_of(method, losses), steps_of(method, losses * by)
    if isinstance(method, FAMO):  # but for the common factor
        ratio = scaled * by / found
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-10)
    elif isinstance(method, STCH):
        assert torch.allclose(scaled * by, found, rtol=1e-10)
    elif isinstance(method, DWA):
        assert torch.allclose(scaled, found, rtol=1e-10)
        assert found[-1].std() > 0.01
    else:
        assert torch.equal(scaled[0], found[0])
        assert not torch.allclose(scaled[-1], found[-1], rtol=1e-3)


@pytest.mark.parametrize("method", [*LOSSES, RLW()], ids=name_of)
def test_every_tensor_has_the_same_weights(method):
    """Also those that a task has no gradient for, whose weight is 0 there."""
    S = EYE.expand(4, 3, 3).clone()
    S[1, 2, 2] = S[3, 0, 0] = 0.0
    state, alone = fresh_state(method, 3, (4,), CPU), fresh_state(method, 3, (), CPU)
    assert all(value.shape in ((), (3,)) for value in state.values())
    for losses in float64(RECORDED["losses"])[:8]:
        at_once = resolve(method, S, state, losses).weights
        one = resolve(method, EYE, alone, losses).weights
        assert torch.equal(at_once, one * (S.diagonal(0, -2, -1) > 0.0))
    assert is_unchanged(state, snapshot(alone))


# ---- Losses that cannot be.


@every_weighting
def test_losses_are_required(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__}: losses must be given"):
        method(EYE)


@every_weighting
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_loss_that_is_not_positive_is_named_and_changes_nothing(method, batch):
    state, S = fresh_state(method, 3, batch, CPU), EYE.expand(*batch, 3, 3)
    resolve(method, S, state, float64([1.0, 2.0, 3.0]))
    before = snapshot(state)
    with pytest.raises(
        ValueError, match=rf"{type(method).__name__} .* task 'b' is -0\.5\. .* cons"
    ):
        resolve(method, S, state, float64([1.0, -0.5, 1.0]), tasks=("a", "b", "c"))
    assert is_unchanged(state, before)
    assert bool(resolve(method, S, state, float64([1.0, 2.0, 1.0])).finite)


@every_weighting
def test_on_a_gpu_the_step_is_skipped_and_a_later_one_raises(method, monkeypatch):
    events = late_flags(monkeypatch)
    method = copy.deepcopy(method)  # the flag is its own
    state = fresh_state(method, 3, (), CPU)
    resolve(method, EYE, state, float64([1.0, 2.0, 3.0]))
    events[-1].done = True
    before = snapshot(state)
    assert not bool(resolve(method, EYE, state, float64([1.0, 0.0, 3.0])).finite)
    assert is_unchanged(state, before)
    events[-1].done = True
    with pytest.raises(ValueError, match="the loss of task 1 is 0"):
        resolve(method, EYE, state, float64([1.0, 2.0, 3.0]))


@every_weighting
@pytest.mark.parametrize("others", [None, ("a", "b", "c")])
def test_on_a_gpu_a_loss_at_fault_is_raised_though_a_copy_was_pending(method, others, monkeypatch):
    """Once the copy is there; or before, where the tasks are others."""
    events, method = late_flags(monkeypatch), copy.deepcopy(method)
    state, good = fresh_state(method, 3, (), CPU), float64([1.0, 2.0, 3.0])
    resolve(method, EYE, state, good)
    assert not bool(resolve(method, EYE, state, float64([1.0, 2.0, -3.0])).finite)
    assert bool(resolve(method, EYE, state, good).finite)
    assert len(events) == 1  # still pending
    if others is None:
        events[-1].done = True
        assert bool(resolve(method, EYE, state, good).finite)
        events[-1].done = True
    with pytest.raises(ValueError, match="the loss of task 2 is -3"):
        resolve(method, EYE, state, good, tasks=others)
    assert bool(resolve(method, EYE, state, good, tasks=others).finite)  # raised once


@every_weighting
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(method, loss):
    state = fresh_state(method, 3, (), CPU)
    before = snapshot(state)
    decision = resolve(method, EYE, state, float64([1.0, loss, 1.0]))
    assert not bool(decision.finite)
    assert decision.weights.tolist() == [0.0] * 3
    assert is_unchanged(state, before)
    without = torch.diag(float64([1.0, 0.0, 1.0]))  # but not that of a task without a gradient
    assert bool(resolve(method, without, state, float64([1.0, loss, 1.0])).finite)


@every_weighting
def test_copies_and_comparisons_ignore_the_flag(method, monkeypatch):
    late_flags(monkeypatch)
    used = copy.deepcopy(method)
    resolve(used, EYE, fresh_state(used, 3, (), CPU), float64([1.0, -0.5, 1.0]))
    for twin in (copy.deepcopy(used), pickle.loads(pickle.dumps(used)), type(method)()):
        assert twin == method
        assert hash(twin) == hash(method)
        assert repr(twin) == repr(method)
        assert "_positive" not in repr(twin)
        assert twin._positive._kept is None


# ---- In training.


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_step_of_the_optimizer_is_one_of_the_objective(granularity):
    """STCH: windows of three micro-batches, a head for each task, loss weights."""
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(4, 3).double(), torch.nn.Linear(3, 2).double()
    own = [torch.nn.Linear(3, 1).double() for _ in range(2)]
    parameters = [*trunk.parameters(), *heads.parameters()]
    of_heads = [list(head.parameters()) for head in own]
    base = torch.optim.SGD([*parameters, *of_heads[0], *of_heads[1]], lr=0.05)
    tasks = {"a": 1.0, "b": 0.5}
    method = STCH(mu=0.3, warmup_steps=2)
    options = {"accumulation_steps": 3, "granularity": granularity}
    optimizer = GCondFused(base, tasks, method=method, **options)
    x = torch.randn(5, 3, 8, 4, dtype=torch.float64)

    def losses_of(batch):
        y = trunk(batch).tanh()
        both = heads(y)
        first, second = (own[k](y)[:, 0] + both[:, k] for k in range(2))
        return {"a": (first - 1.0).square().mean(), "b": 9.0 * (second + 2.0).square().mean()}

    warm = {"a": [], "b": []}
    for t, window in enumerate(x):
        mean = {k: sum(losses_of(one)[k] for one in window) / 3 for k in tasks}
        if t < 2:
            objective = sum(tasks[k] * mean[k].log() for k in tasks)
            for k in tasks:
                warm[k].append(float(mean[k].detach()))
        else:
            n = {k: statistics.fmean(warm[k]) for k in tasks}
            z = torch.stack([(mean[k] / n[k]).log() for k in tasks]).div(0.3)
            share = z.detach().softmax(0) * 2.0 * float64(list(tasks.values()))
            objective = sum(share[i] * mean[k].log() for i, k in enumerate(tasks))
        expected = torch.autograd.grad(objective, parameters, retain_graph=True)
        for i, k in enumerate(tasks):  # a head's gradient is as it is
            expected += torch.autograd.grad(tasks[k] * mean[k], of_heads[i], retain_graph=True)
        for batch in window:
            optimizer.backward(losses_of(batch))
        found = [p.grad for p in (*parameters, *of_heads[0], *of_heads[1])]
        size = max(float(g.abs().max()) for g in expected)
        for gradient, wanted in zip(found, expected, strict=True):
            assert torch.allclose(gradient, wanted, rtol=0.0, atol=1e-5 * size), t
        optimizer.step()


@every_weighting
def test_a_task_that_is_added_starts_with_a_state_of_its_own(method):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GCondFused(torch.optim.SGD([p], lr=0.01), {"a": 1.0, "b": 1.0}, method=method)

    def step(names):
        optimizer.backward({k: (p + 1.0 + i).square().sum() for i, k in enumerate(names)})
        optimizer.step()
        return optimizer.report()

    step("ab")
    kept = snapshot(optimizer._resolver.method_state)
    optimizer.add_task("c", 1.0)
    for name, value in optimizer._resolver.method_state.items():
        assert torch.equal(value[:2] if value.dim() else value, kept[name])
    assert all(math.isfinite(w) and w > 0.0 for w in step("abc").weights.values())
