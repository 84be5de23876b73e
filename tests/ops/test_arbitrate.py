"""arbitrate: the resolution on inner products, against the same on whole vectors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gcond_kernels import GCond, ops
from gcond_kernels.methods.method import Comparison
from tests.helpers.naive import NaiveGCond

METHODS = st.builds(
    GCond,
    # θ_crit and θ_main not at 0: there a full projection ends, and rounding decides the zone.
    thresholds=st.tuples(
        st.floats(-0.95, -0.55), st.floats(-0.5, -0.05), st.sampled_from([-0.01, 0.0, 0.3])
    ),
    remap_power=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    arbitration=st.sampled_from(["smooth", "zones"]),
    max_iterations=st.sampled_from([None, None, 0, 1, 3]),
    dominance_window=st.integers(0, 4),
    tie_breaking_weights=st.sampled_from([(0.8, 0.2), (0.0, 1.0), (1.0, 0.0)]),
    # Not 0: then every norm is its own average, and rounding decides the ties.
    norm_ema_beta=st.sampled_from([0.1, 0.5, 0.95]),
    norm_ema_start=st.sampled_from([None, 1.0]),
    norm_cap=st.sampled_from([None, 0.5]),
    history=st.sampled_from(["raw", "resolved"]),
    eps=st.sampled_from([1e-8, 0.3]),
)


def conflicting(seed: int, tasks: int, size: int, spread: float = 1.0) -> np.ndarray:
    """Random gradients [K, N], pulled apart so that every zone occurs."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(tasks, size))
    g -= rng.uniform(0.0, 1.2) * g.mean(axis=0) * min(1, tasks - 1)
    return g * np.exp(spread * rng.normal(size=(tasks, 1)))


def warm_state(method, tasks, seed):
    """State with averages of no particular value: a first step is full of exact ties."""
    state = new_state(method, tasks)
    state["norm_ema"] += torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 2.0, tasks))
    return state


def new_state(method, tasks):
    return method.new_state(tasks, torch.device("cpu"))


def decide(backend, method, S, X=None, *, scale=None, state=None):
    """One resolution from inner products; where not given, scales are 1 and the state is new."""
    K = S.shape[-1]
    scale = torch.ones(K, dtype=torch.float64) if scale is None else scale
    state = new_state(method, K) if state is None else state
    return method.decide(Comparison(S, X, scale, backend=backend), state)


def arbitrate(backend, method, g, previous=None, *, state=None, present=None):
    """One resolution from vectors; `present` says which tasks take part."""
    scale = torch.ones(len(g), dtype=torch.float64)
    if present is not None:
        scale *= torch.tensor(present)
    scaled = torch.from_numpy(g) * scale[:, None]
    cross = scaled @ torch.from_numpy(np.zeros_like(g) if previous is None else previous).T
    return decide(backend, method, scaled @ scaled.T, cross, scale=scale, state=state)


@pytest.mark.quick
# Three elements at least: with one, every cosine is ±1 and rounding decides among pairs.
@given(METHODS, st.integers(1, 6), st.integers(3, 30), st.integers(0, 2**32 - 1), st.data())
def test_decides_as_on_full_vectors(backend, method, tasks, size, seed, data):
    naive, state = NaiveGCond(method, tasks), warm_state(method, tasks, seed)
    naive.ema = state["norm_ema"].tolist()
    previous = np.zeros((tasks, size))
    for step in range(4):
        g = conflicting(seed + step, tasks, size)
        present = data.draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks))
        present[data.draw(st.integers(0, tasks - 1))] = True
        missing = [k for k in range(tasks) if not present[k]]
        if missing and method.history == "resolved":
            return  # there, a task that sat out compares with its own gradient: see below
        decision = arbitrate(backend, method, g, previous, state=state, present=present)
        expected = naive.resolve([g[k] if present[k] else None for k in range(tasks)])
        if naive.tied:
            return  # two pairs left orthogonal, where that is below θ_weak, differ by rounding
        resolved = decision.weights.numpy() @ np.where(np.array(present)[:, None], g, 0.0)
        events = [
            (int(i), int(j), None if winner < 0 else int(winner))
            for i, j, _, winner, _ in decision.events.tolist()
            if not math.isnan(i)
        ]
        assert events == naive.log
        assert [w for w in state["winners"].tolist() if w >= 0] == naive.winners
        # float64 on both sides; a projection may cancel all but 2^-11.5 of a gradient and the
        # other is then moved along what is left: 1e-16 grows to at most some 1e-9 in two rounds.
        scale = np.abs(decision.coefficients.numpy()) @ np.linalg.norm(g, axis=1)
        np.testing.assert_allclose(resolved, expected, rtol=0, atol=1e-9 * scale.sum())
        np.testing.assert_allclose(state["norm_ema"].numpy(), naive.ema, rtol=1e-12)
        previous = np.where(np.array(present)[:, None], g, previous)


@pytest.mark.sanitize
def test_a_task_that_sat_out_compares_with_its_own_last_gradient(backend):
    # Step 1: tasks 0 and 1 conflict, so the resolved history of task 0 holds some of task 1.
    # Step 2: task 0 sits out. Step 3: its history must be its gradient of step 1 as it was.
    method = GCond(history="resolved", dominance_window=0, tie_breaking_weights=(1.0, 0.0))
    state = new_state(method, 2)
    first = np.array([[1.0, 0.0], [-0.4, 0.9]])
    arbitrate(backend, method, first, state=state)
    assert state["history_coefficients"][0, 1] != 0.0
    second = np.array([[9.0, 9.0], [0.0, 1.0]])
    arbitrate(backend, method, second, first, state=state, present=[False, True])
    assert state["history_coefficients"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert state["history_gramian"][0, 0] == 1.0
    assert state["history_gramian"][1, 1] == 1.0
    assert state["history_scale"].tolist() == [1.0, 1.0]  # and so it is read in the next step


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_without_conflict_the_weights_are_exactly_one(backend, tasks, seed):
    g = np.abs(np.random.default_rng(seed).normal(size=(tasks, 7)))
    decision = arbitrate(backend, GCond(), g)
    assert decision.weights.tolist() == [1.0] * tasks
    assert decision.events.isnan().all()


@given(
    st.integers(2, 5),
    st.integers(2, 20),
    st.sampled_from([2.0**-40, 2.0**20, 1e-6, 1e6]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["smooth", "zones"]),
    st.sampled_from([(0.8, 0.2), (0.0, 1.0)]),
)
def test_the_scale_of_the_gradients_decides_nothing(
    backend, tasks, size, by, seed, arbitration, scores
):
    # Of linearly dependent gradients rounding decides: only powers of two scale without any.
    assume(size > tasks or math.frexp(by)[0] == 0.5)
    method = GCond(arbitration=arbitration, tie_breaking_weights=scores)
    plain, scaled = (warm_state(method, tasks, seed) for _ in range(2))
    scaled["norm_ema"] *= by
    previous = np.zeros((tasks, size))
    for step in range(4):
        g = conflicting(seed + step, tasks, size, spread=3.0)
        a = arbitrate(backend, method, g, previous, state=plain)
        b = arbitrate(backend, method, by * g, by * previous, state=scaled)
        assert a.events[:, [0, 1, 3, 4]].nan_to_num(-9).tolist() == (
            b.events[:, [0, 1, 3, 4]].nan_to_num(-9).tolist()
        )
        # A power of two scales without rounding, 1e±6 rounds in the 16th digit.
        assert torch.allclose(a.weights, b.weights, rtol=1e-6, atol=1e-9)
        assert plain["winners"].tolist() == scaled["winners"].tolist()
        previous = g


@given(st.integers(2, 5), st.integers(3, 20), st.integers(0, 2**32 - 1), st.randoms())
def test_relabelling_the_tasks_changes_nothing(backend, tasks, size, seed, random):
    order = list(range(tasks))
    random.shuffle(order)
    method = GCond(thresholds=(-0.6, -0.3, 0.0))
    plain, moved = (warm_state(method, tasks, seed) for _ in range(2))
    moved["norm_ema"] = moved["norm_ema"][order]
    previous = np.zeros((tasks, size))
    for step in range(4):
        g = conflicting(seed + step, tasks, size)
        a = arbitrate(backend, method, g, previous, state=plain)
        b = arbitrate(backend, method, g[order], previous[order], state=moved)
        assert torch.allclose(a.weights[order], b.weights, rtol=1e-9, atol=1e-12)
        winners = [order[w] if w >= 0 else -1 for w in moved["winners"].tolist()]
        assert plain["winners"].tolist() == winners
        previous = g


@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(-0.999, -0.8 - 1e-9))
def test_critical_conflict(backend, size, seed, cosine):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, 2)))[0].T
    g = np.stack([basis[0], cosine * basis[0] + math.sqrt(1 - cosine**2) * basis[1]])
    g *= rng.uniform(0.1, 10.0, size=(2, 1))
    decision = arbitrate(backend, GCond(), g)
    winner = int(decision.events[0, 3])
    rows = decision.coefficients.numpy()
    assert decision.events[0, 4] == 2
    assert rows[winner].tolist() == np.eye(2)[winner].tolist()
    loser = rows[1 - winner] @ g
    assert abs(loser @ g[winner]) <= 1e-12 * np.linalg.norm(g[winner]) * np.linalg.norm(g)


@pytest.mark.parametrize("arbitration", ["smooth", "zones"])
@pytest.mark.parametrize("factor", [-1.0, -0.5, -3.0, -1e-3, -1e5])
def test_anti_parallel_gradients_give_the_winner_alone(backend, factor, arbitration):
    a = np.random.default_rng(0).normal(size=1000)
    g = np.stack([a, factor * a])
    # As float32 partial sums would have it: inner products with rounding in the 7th digit, so
    # that much of the longer gradient may be left.
    gramian = torch.from_numpy((g @ g.T).astype(np.float32)).double()
    decision = decide(backend, GCond(arbitration=arbitration), gramian)
    winner = int(decision.events[0, 3])
    resolved = decision.weights.numpy() @ g
    np.testing.assert_allclose(resolved, g[winner], rtol=0, atol=3e-7 * np.abs(g).max())
    assert decision.events[1:].isnan().all()


@given(
    st.integers(0, 2**32 - 1),
    st.floats(-10, -0.1),
    st.integers(-46, -24),
    st.sampled_from([-(2.0**-24), -(2.0**-26), 2.0**-26, 2.0**-24]),
)
def test_rounding_left_of_a_cancelled_gradient_is_no_conflict(backend, seed, factor, one, other):
    # Two anti-parallel tasks and a third: what is left of the loser is rounding, of any angle to
    # the third. Taken for a gradient it would be scaled up to the size of the third one.
    g = np.random.default_rng(seed).normal(size=(3, 50))
    g[1] = factor * g[0]
    S = g @ g.T
    S[0, 1] = S[1, 0] = S[0, 1] * (1 - 2.0**one)
    S[2, 1] = S[1, 2] = S[2, 1] * (1 + other)
    decision = decide(backend, GCond(), torch.from_numpy(S))
    # No weight may leave the order of magnitude that the ratio of the norms explains.
    assert decision.weights.abs().max() < 3 * (1 + max(-factor, -1 / factor))


def test_what_is_really_left_of_a_cancelled_gradient_conflicts_on(backend):
    # 2^-9 of the loser is left: its square is 2^-18, far above rounding, and opposes task 2.
    g = np.array([[1.0, 0.0], [-1.0, 2.0**-9], [0.0, -1.0]])
    decision = arbitrate(backend, GCond(), g)
    assert decision.events[:2, :2].tolist() == [[0, 1], [1, 2]]
    assert decision.events[1, 2] == pytest.approx(-1.0)


@given(st.integers(2, 5), st.integers(0, 2**32 - 1), METHODS)
def test_degenerate_input_is_defined(backend, tasks, seed, method):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(tasks, 1))  # N = 1: every pair is parallel or anti-parallel
    g[rng.integers(tasks)] = 0.0
    state = new_state(method, tasks)
    for _ in range(5):
        decision = arbitrate(backend, method, g, g, state=state)
        assert decision.weights.isfinite().all()
        assert all(value.isfinite().all() for value in state.values())


@given(st.sampled_from([math.nan, math.inf]), st.integers(0, 2), st.integers(0, 2**32 - 1), METHODS)
def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(backend, bad, task, seed, method):
    state = new_state(method, 3)
    g = conflicting(seed, 3, 10)
    arbitrate(backend, method, g, state=state)
    before = {key: value.clone() for key, value in state.items()}
    broken = conflicting(seed + 1, 3, 10)
    broken[task, 4] = bad
    decision = arbitrate(backend, method, broken, g, state=state)
    assert not decision.finite
    assert decision.weights.tolist() == [0.0, 0.0, 0.0]
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.sanitize
def test_dominance_ends_after_the_window(backend):
    method = GCond(dominance_window=2, tie_breaking_weights=(0.0, 1.0))
    state = new_state(method, 2)
    g = np.array([[1.0, 0.0], [-0.9, 0.1]])
    winners = [arbitrate(backend, method, g, state=state).events[0, 3] for _ in range(6)]
    assert winners == [0, 0, 1, 0, 0, 1]


def test_ties_go_to_the_first_pair(backend):
    g = np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, -1.0, 0]])
    decision = arbitrate(backend, GCond(), g)
    assert decision.events[:2, :2].tolist() == [[0, 1], [2, 3]]


def test_ties_of_one_task_go_to_its_first_pair(backend):
    g = np.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    decision = arbitrate(backend, GCond(max_iterations=1), g)
    assert decision.events[0, :3].tolist() == [0, 1, -1]


def test_cosines_beyond_minus_one_by_rounding_are_ties(backend):
    # Inner products as float32 sums leave them: both pairs are anti-parallel.
    S = -torch.ones(4, 4, dtype=torch.float64)
    S += 2.0 * torch.eye(4, dtype=torch.float64)
    S[2, 3] = S[3, 2] = -1.0 - 1e-7
    decision = decide(backend, GCond(max_iterations=1), S)
    assert decision.events[0, :3].tolist() == [0, 1, -1]


def test_a_cosine_of_the_critical_threshold_is_critical_in_the_smooth_form_alone(backend):
    S = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    for arbitration, zone in (("smooth", 2), ("zones", 1)):
        method = GCond(thresholds=(-0.5, -0.25, 0.0), arbitration=arbitration)
        decision = decide(backend, method, S)
        assert decision.events[0, 4] == zone
        winner = int(decision.events[0, 3])
        assert decision.coefficients[winner].tolist() == [float(k == winner) for k in range(2)]


def test_the_average_of_the_norms_never_falls_below_its_floor(backend):
    method = GCond.published(eps=0.25, norm_ema_beta=0.0)
    state = new_state(method, 2)
    g = np.array([[1e-3, 0.0], [0.0, 2.0]])
    arbitrate(backend, method, g, state=state)
    assert state["norm_ema"].tolist() == [0.25, 2.0]


def test_the_inner_products_of_a_task_that_sat_out_are_kept(backend):
    method = GCond()
    state = new_state(method, 2)
    g = np.array([[1.0, 2.0], [3.0, -1.0]])
    arbitrate(backend, method, g, state=state)
    first = state["history_gramian"].clone()
    arbitrate(backend, method, 2.0 * g, g, state=state, present=[True, False])
    assert state["history_gramian"][0, 0] == 4.0 * first[0, 0]
    assert torch.equal(state["history_gramian"][1], first[1])
    assert state["history_gramian"][0, 1] == first[0, 1]


def test_wrong_shapes_are_refused(backend):
    S = torch.eye(2).double()
    with pytest.raises(ValueError, match=r"cross must be \[2, 2\]"):
        decide(backend, GCond(), S, torch.eye(3).double())
    with pytest.raises(ValueError, match=r"scale must be \[2\] float64"):
        decide(backend, GCond(), S, scale=torch.ones(2))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("thresholds", (-0.5, -0.8, 0.0)),
        ("thresholds", (-0.5, 0.0)),
        ("thresholds", (-1.5, -0.8, 0.0)),
        ("remap_power", 0.0),
        ("remap_power", math.nan),
        ("arbitration", "hard"),
        ("max_iterations", -1),
        ("max_iterations", 1.5),
        ("tolerance", -1e-6),
        ("dominance_window", -1),
        ("tie_breaking_weights", (0.8,)),
        ("tie_breaking_weights", (-0.1, 1.0)),
        ("norm_ema_beta", 1.0),
        ("norm_ema_start", 0.0),
        ("norm_cap", -2.0),
        ("history", "old"),
        ("eps", 0.0),
        ("remap_power", "2"),
        ("thresholds", 0.5),
        ("thresholds", "abc"),
        ("tie_breaking_weights", 1.0),
        ("norm_ema_beta", None),
        ("norm_cap", "1"),
        ("max_iterations", True),
    ],
)
def test_settings_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=f"GCond: {option} must be"):
        GCond(**{option: value})


def test_presets():
    published = GCond.published(dominance_window=5)
    assert (published.history, published.norm_ema_start, published.tolerance) == ("resolved", 1, 0)
    assert published.dominance_window == 5
    paper = GCond.paper()
    assert (paper.dominance_window, paper.max_iterations) == (0, 3)
    assert GCond.paper(dominance_window=2).dominance_window == 2
    assert not GCond(tie_breaking_weights=(0.0, 1.0)).needs_history
    assert ops.Arbitration._fields == ("weights", "coefficients", "events", "finite")


def test_a_history_that_was_projected_away_is_no_measure_of_stability(backend):
    """What rounding leaves of it has some direction, and a length near zero to divide by."""
    method = GCond(history="resolved", tie_breaking_weights=(1.0, 0.0), dominance_window=0)
    state = new_state(method, 2)
    # Of anti-parallel gradients.
    state["history_coefficients"].copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    state["history_gramian"].copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    state["history_gramian"] += 1e-12 * torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    S = torch.tensor([[1.0, -0.9], [-0.9, 1.0]], dtype=torch.float64)
    X = torch.tensor([[1.0, -1.0 + 1e-6], [0.0, 0.5]], dtype=torch.float64)
    decision = decide(backend, method, S, X, state=state)
    assert decision.events[0, 3] == 1  # not 0, at a "cosine" of 0.7


def test_a_stability_is_at_most_one(backend):
    """Inner products are sums of float32: beyond 1 there is rounding, which decides nothing."""
    method = GCond(tie_breaking_weights=(1.0, 0.0), dominance_window=0)
    state = new_state(method, 2)
    state["history_gramian"].copy_(torch.eye(2))
    S = torch.tensor([[1.0, -0.9], [-0.9, 1.0]], dtype=torch.float64)
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0 + 1e-6]], dtype=torch.float64)
    decision = decide(backend, method, S, X, state=state)
    assert decision.events[0, 3] == 0  # a tie: the first


def stacked(states):
    """The states of a batch: all that is of one resolution has a leading dimension."""
    first = states[0]
    return {
        name: first[name].clone()
        if name == "history_scale"
        else torch.stack([state[name] for state in states])
        for name in first
    }


def gramians(seed, tasks, batch, scale):
    """Gramians [B, K, K] and cross-Gramians of conflicting gradients."""
    g = torch.stack([torch.from_numpy(conflicting(seed + b, tasks, 10)) for b in range(batch)])
    h = g + 0.5 * torch.from_numpy(np.random.default_rng(seed).normal(size=g.shape))
    g = scale[:, None] * g
    return g @ g.transpose(1, 2), g @ h.transpose(1, 2)


@given(METHODS, st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_a_batch_is_its_entries_one_by_one(backend, method, tasks, batch, with_cross, seed):
    states = [warm_state(method, tasks, seed + b) for b in range(batch)]
    of_all = stacked(states)
    for step in range(3):
        scale = torch.ones(tasks, dtype=torch.float64)
        scale[step % tasks] = 0.0 if step == 1 else 0.5  # in one of the steps a task sits out
        S, X = gramians(seed + step, tasks, batch, scale)
        X = X if with_cross else None
        decision = decide(backend, method, S, X, scale=scale, state=of_all)
        crosses = [None] * batch if X is None else X
        alone = [
            decide(backend, method, *both, scale=scale, state=state)
            for *both, state in zip(S, crosses, states, strict=True)
        ]
        for whole, parts in zip(decision, zip(*alone, strict=True), strict=True):
            assert torch.equal(whole.nan_to_num(-9.0), torch.stack(parts).nan_to_num(-9.0))
        for name, value in stacked(states).items():
            assert torch.equal(of_all[name], value)


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("entry", [0, 2])
def test_one_entry_that_is_not_finite_leaves_the_state_of_all(backend, bad, entry):
    method = GCond()
    state = stacked([warm_state(method, 3, b) for b in range(3)])
    one = torch.ones(3, dtype=torch.float64)
    S, X = gramians(0, 3, 3, one)
    assert decide(backend, method, S, X, state=state).finite.all()
    before = {name: value.clone() for name, value in state.items()}
    S, X = gramians(1, 3, 3, one)
    S[entry, 1, 2] = S[entry, 2, 1] = bad
    decision = decide(backend, method, S, X, scale=2.0 * one, state=state)
    assert decision.finite.tolist() == [False] * 3
    assert (decision.weights == 0.0).all()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_a_batch_of_other_shapes_is_refused(backend):
    method, S = GCond(), torch.eye(2).double().repeat(3, 1, 1)
    state = stacked([new_state(method, 2)] * 3)
    with pytest.raises(ValueError, match=r"gramian must be \[K, K\] or \[B, K, K\]"):
        decide(backend, method, S[None], state=state)
    with pytest.raises(ValueError, match=r"cross must be \[3, 2, 2\]"):
        decide(backend, method, S, S[:2], state=state)
    for name, shape in (
        ("norm_ema", "3, 2"),
        ("winners", "3, 3"),
        ("history_coefficients", "3, 2, 2"),
    ):
        broken = state | {name: state[name][:2]}
        with pytest.raises(ValueError, match=rf"{name} must be \[{shape}\]"):
            decide(backend, method, S, state=broken)
