"""NonConflicting: what it does to the weights of another method, and what it leaves as it is.

That the weights are those of TorchJD's DualProj is tested in `test_methods.py`, what holds of every
method in `test_method_properties.py`.
"""

import copy
import itertools
import pickle

import pytest
import torch

from gcond_kernels import GCondFused
from gcond_kernels.methods import (
    IMTLG,
    MGDA,
    GCond,
    GradDrop,
    GradNorm,
    GradVac,
    NonConflicting,
    PCGrad,
    Sum,
    UPGrad,
)
from gcond_kernels.methods.method import Comparison, Known, fresh_state
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING
from tests.conftest import slow
from tests.helpers.as_on_gpu import no_reads
from tests.helpers.gramians import (
    CPU,
    FAMILIES,
    float64,
    gradients,
    gramian,
    is_unchanged,
    name_of,
    norms_apart,
    random_gramian,
    resolve,
)
from tests.helpers.models import TASKS, batches, flat_gradients, losses_of, model_of, task_gradient


def alternating(S):
    """Weights that go against every other task."""
    return torch.linspace(1.0, -1.0, len(S), dtype=S.dtype)


INNER = [Sum(), GCond(), GradVac(), IMTLG(), alternating]
on_both = pytest.mark.parametrize("device", ["host", "not read"])


def use(device, monkeypatch):
    if device == "not read":
        no_reads(monkeypatch)


# ---- No task goes up.


def many(count, seed):
    """Random Gramians of 2 to 10 tasks, of every family and scale, in batches [B, K, K]."""
    per_batch = count // (9 * len(FAMILIES))
    for tasks, family in itertools.product(range(2, 11), FAMILIES):
        start = seed + 1000 * tasks
        J = torch.stack([gradients(family, tasks, start + b) for b in range(per_batch)])
        scales = 10.0 ** torch.linspace(-9.0, 9.0, per_batch, dtype=torch.float64)
        apart = [norms_apart(one, b % 7, start + b) for b, one in enumerate(J)]
        yield gramian(scales[:, None, None] * torch.stack(apart))


def against(S, w):
    """The inner products with the result: the least, over ‖S‖‖w‖."""
    size = torch.linalg.matrix_norm(S) * w.norm(dim=-1)
    return float(((S @ w[..., None])[..., 0].amin(-1) / size.clamp(min=1e-300)).amin())


@pytest.mark.parametrize("count", [450, slow(10_000)])
@on_both
def test_no_task_goes_up(device, count, monkeypatch):
    use(device, monkeypatch)
    worse = 0
    for place, S in enumerate(many(count, 0)):
        inner = INNER[place % len(INNER)]
        method = NonConflicting(inner)
        w = resolve(method, S, fresh_state(method, S.shape[-1], S.shape[:1], CPU)).weights
        assert against(S, w) >= -1e-9
        state = fresh_state(method, S.shape[-1], S.shape[:1], CPU)
        worse += against(S, resolve(method.method, S, state).weights) < -1e-9
    assert worse > 20  # of 45 batches: their methods alone go against a task


@pytest.mark.parametrize("family", FAMILIES)
def test_no_task_of_float32_gradients_goes_up_but_for_rounding(family):
    """Eigenvalues are raised to 1e-6: up to that much of the terms."""
    for seed, method in itertools.product(range(20), (Sum(), GCond(), PCGrad())):
        J = norms_apart(gradients(family, 5, seed), 2.0, seed).float()
        S, n = (J @ J.mT).double(), J.double().norm(dim=-1)
        w = resolve(NonConflicting(method), S, method.new_state(5, CPU), None, FLOAT32_ROUNDING)
        terms = n * (w.weights.abs() * n).sum()
        # Of the gradients themselves; their Gramian is a sum in float32, to 1e-6 of the norms.
        along = J.double() @ (w.weights @ J.double())
        assert (along >= -4.0 * FLOAT32_ROUNDING * terms).all()


def nearest(S, w):
    """The nearest g without a negative inner product: of all sets of tight ones, the best."""
    best, chosen = float("inf"), None
    tasks = range(len(S))
    for size in range(len(S) + 1):
        for tight in map(list, itertools.combinations(tasks, size)):
            moved = w.clone()
            if tight:
                A = S[tight][:, tight]
                moved[tight] -= torch.linalg.solve(A, (S @ w)[tight])
            feasible = (S @ moved >= -1e-9 * S.abs().sum(-1) * moved.abs().amax()).all()
            distance = float((moved - w) @ S @ (moved - w))
            if feasible and distance < best:
                best, chosen = distance, moved
    return chosen


@on_both
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_result_is_the_nearest(device, tasks, monkeypatch):
    use(device, monkeypatch)
    families = ["random"] if tasks == 1 else ["random", "conflicting", "anti-parallel"]
    drawn = [norms_apart(gradients(f, tasks, s), 1.0, s) for f in families for s in range(8)]
    S = torch.stack(list(map(gramian, drawn)))
    for inner in (Sum(), GCond(), alternating):
        method, n = NonConflicting(inner), S.diagonal(dim1=-2, dim2=-1).sqrt()
        w = zip(S, method.method(S), strict=True)
        expected = torch.stack([nearest(*one) for one in w])
        # 1 + cos is 5e-5 at the least: rounding times 2e4, and room for both.
        apart = (n * (method(S) - expected)).abs().amax(-1)
        assert (apart <= 1e-9 * (n * expected).abs().amax(-1)).all()


@on_both
def test_of_two_that_are_opposite_the_weaker_is_left_in_balance(device, monkeypatch):
    use(device, monkeypatch)
    w = NonConflicting(Sum())(float64([[4.0, -3.0], [-3.0, 2.25 * 1.0001]]))
    # The result has no inner product with the second: w_2 = 3 / (2.25 · 1.0001), of w_1 = 1.
    assert torch.allclose(w, float64([1.0, 3.0 / 2.250225]), rtol=1e-9)


# ---- What is left as it is.


@on_both
def test_where_no_task_goes_up_no_bit_changes(device, monkeypatch):
    use(device, monkeypatch)
    S = torch.stack([random_gramian(4, seed, "random") for seed in range(40)])
    for method in (Sum(), PCGrad(), MGDA(), UPGrad(), GCond()):
        alone, moved = method(S), NonConflicting(method)(S)
        against_none = ((S @ alone[..., None]) >= 0.0).all((-2, -1))
        assert against_none.any() or isinstance(method, (MGDA, UPGrad))  # 0 but for rounding
        stays = (moved == alone).all(-1)
        expected = torch.ones_like(stays) if isinstance(method, (MGDA, UPGrad)) else against_none
        assert torch.equal(stays, expected)


@on_both
@pytest.mark.parametrize("inner", [Sum(), GCond(), PCGrad()], ids=name_of)
def test_it_changes_nothing_the_second_time(device, inner, monkeypatch):
    use(device, monkeypatch)
    for family in FAMILIES:
        J = [norms_apart(gradients(family, 5, seed), 2.0, seed) for seed in range(8)]
        S, once = torch.stack(list(map(gramian, J))), NonConflicting(inner)
        w, twice = once(S), NonConflicting(once)(S)
        assert not torch.equal(w, inner(S))
        if family == "deficient":  # raised eigenvalues are a cosine of up to 1e-12
            assert torch.allclose(twice, w, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(twice, w)


@on_both
def test_a_negative_weight_does_not_cancel_out(device, monkeypatch):
    """Of −1 and norms 1e6 to 1e12 apart little is left: its rounding is not that of −1."""
    use(device, monkeypatch)
    for seed in range(20):
        S = gramian(norms_apart(gradients("random", 2, seed), 6.0, seed))
        n, w = S.diagonal().sqrt(), NonConflicting(alternating)(S)
        assert (S @ w >= -1e-12 * n * (n * w.abs()).sum()).all()


def test_of_a_task_that_is_no_longer_against_the_weight_stays():
    """Only tasks whose inner product becomes 0 get another weight."""
    S = gramian(gradients("conflicting", 6, 3))
    w = NonConflicting(Sum())(S)
    moved = w != 1.0
    assert moved.any()
    assert not moved.all()
    assert (w >= 1.0).all()
    assert ((S @ w).abs()[moved] <= 1e-12 * S.abs().amax()).all()


# ---- The inner method's state, history and events.


@pytest.mark.parametrize("backend", ["python", "cpu"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_state_and_events_are_those_of_gcond_alone(backend, batch):
    if backend == "cpu":
        pytest.importorskip("gcond_kernels._cpu", reason="the CPU's kernels are not built")
    inner = GCond(thresholds=(-0.9, -0.6, -0.1), dominance_window=3)
    method = NonConflicting(inner)
    states = [fresh_state(each, 4, batch, CPU) for each in (inner, method)]
    for seed in range(6):
        S = random_gramian(4, seed).expand(*batch, 4, 4).contiguous()
        X = 0.1 * random_gramian(4, seed + 50).expand(*batch, 4, 4).contiguous()
        scale = float64([1.0, 1.0, float(seed % 2), 1.0])
        comparison = Comparison(S, X, scale, backend=backend)
        alone, moved = (
            each.decide(comparison, state)
            for each, state in zip((inner, method), states, strict=True)
        )
        assert is_unchanged(*states)
        for name in ("coefficients", "events", "finite"):
            assert getattr(moved, name).numpy().tobytes() == getattr(alone, name).numpy().tobytes()


def test_what_is_not_finite_is_as_the_inner_method_has_it():
    """Of a batch GCond leaves out one entry, where others leave out all."""
    S = torch.stack([random_gramian(3, seed, "anti-parallel") for seed in range(3)])
    S[0] *= float64([1.0, 9.0, 1.0]) * float64([1.0, 9.0, 1.0])[:, None]
    assert not torch.equal(NonConflicting(GCond())(S[:1]), GCond()(S[:1]))
    S[1, 0, 0] = float("nan")
    for inner in (GCond(), Sum(), GradVac()):
        method = NonConflicting(inner)
        alone = resolve(inner, S, fresh_state(inner, 3, (3,), CPU))
        moved = resolve(method, S, fresh_state(method, 3, (3,), CPU))
        assert torch.equal(moved.finite, alone.finite)
        assert moved.weights[1].tolist() == [0.0] * 3
        assert moved.weights.isfinite().all()


@pytest.mark.parametrize(
    "inner",
    [GCond(history_dtype=torch.float32), GCond(tie_breaking_weights=(0.0, 1.0)), GradNorm(lr=0.1)],
)
def test_the_optimizer_finds_what_the_inner_method_needs(inner):
    method = NonConflicting(inner)
    names = ("needs_losses", "needs_history", "history_dtype", "shared_state", "parameters")
    names += ("thresholds", "adds_magnitudes", "compares_single_task")
    for name in names:
        assert getattr(method, name) == getattr(inner, name), name
    assert not method.bounded_weights  # where gradients cancel out, weights may be large
    assert repr(method) == f"NonConflicting(method={inner!r})"
    again = pickle.loads(pickle.dumps(method))
    assert again == copy.deepcopy(method) == method
    assert again.needs_losses == inner.needs_losses


def test_all_shared_parameters_count_where_the_inner_method_looks_at_some():
    method = NonConflicting(GradNorm(parameters=("last",)))
    for seed in range(10):
        S, selected = random_gramian(4, seed), random_gramian(4, seed + 10)
        known = Known(losses=float64([1.0, 2.0, 3.0, 4.0]))
        comparison = Comparison(S, None, S.new_ones(4), selected, known)
        w = method.decide(comparison, method.new_state(4, CPU)).weights
        assert against(S, w) >= -1e-6  # rounding of float32, which is that of `Known`


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"GradDrop.* has none .* such as GCond"):
        NonConflicting(GradDrop())
    with pytest.raises(TypeError, match=r"method must be GCond\(\.\.\.\), not the class itself"):
        NonConflicting(GCond)
    with pytest.raises(TypeError, match="method must be one of"):
        NonConflicting("sum")
    with pytest.raises(ValueError, match=r"parameters=.* of GradNorm"):
        NonConflicting(GradNorm(parameters=("body",))).check("tensor", None)


# ---- In training.


def optimizer_of(model, method, **options):
    base = torch.optim.SGD(model.named_parameters(), lr=0.05)
    return GCondFused(base, TASKS, method=method, **options)


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("inner", [Sum(), GCond()], ids=["Sum", "GCond"])
def test_the_gradient_goes_against_no_task(inner, granularity):
    """Autograd's own gradients, over all parameters, each task's alone too."""
    model, x = model_of(), batches(6)
    optimizer = optimizer_of(model, NonConflicting(inner), granularity=granularity)
    for one in x:
        optimizer.backward(losses_of(model, one))
        written = flat_gradients(model).double()
        for g in (task_gradient(model, [one], task) for task in TASKS):
            assert written @ g >= -1e-5 * written.norm() * g.norm()
        optimizer.step()


def test_averages_go_on_where_it_is_put_around_a_method_in_training():
    model, x = model_of(), batches(4)
    optimizer = optimizer_of(model, GCond())
    for one in x[:2]:
        optimizer.backward(losses_of(model, one))
        optimizer.step()
    before = optimizer._resolver.method_state["norm_ema"].clone()
    assert (before > 0.0).all()
    optimizer.method = NonConflicting(GCond())
    assert torch.equal(optimizer._resolver.method_state["norm_ema"], before)
    optimizer.thresholds = (-0.9, -0.6, -0.1)
    assert optimizer.method == NonConflicting(GCond(thresholds=(-0.9, -0.6, -0.1)))
    assert optimizer.recorder.thresholds == (-0.9, -0.6, -0.1)
    optimizer.method = NonConflicting(Sum())
    assert optimizer._resolver.method_state == {}
    with pytest.raises(AttributeError, match="Sum has no thresholds"):
        optimizer.thresholds = (-0.9, -0.6, -0.1)


def test_a_checkpoint_of_the_inner_method_loads():
    model, other = model_of(), model_of(5)
    first, second = optimizer_of(model, GCond()), optimizer_of(other, NonConflicting(GCond()))
    first.backward(losses_of(model, batches(1)[0]))
    first.step()
    second.load_state_dict(first.state_dict())
    assert is_unchanged(second._resolver.method_state, first._resolver.method_state)
    third = optimizer_of(other, NonConflicting(PCGrad()))
    with pytest.raises(ValueError, match="method_name 'GCond', this optimizer 'PCGrad'"):
        third.load_state_dict(first.state_dict())
