"""What methods compute on the host, of a CPU: closed forms and converged solvers.

They are compared with the fixed numbers of steps of a GPU, with TorchJD, and by their conditions.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcond_kernels.methods import CAGrad, NashMTL, PCGrad, UPGrad, host, solvers
from gcond_kernels.methods.nash_mtl import bargain
from gcond_kernels.methods.pcgrad import projected, random_orders, weights_on_host
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING, FLOAT64_ROUNDING
from tests.helpers.as_on_gpu import no_reads
from tests.helpers.gramians import (
    CPU,
    FAMILIES,
    METHODS,
    float64,
    gradients,
    gramian,
    name_of,
    norms_apart,
    raised,
    random_gramian,
    resolve,
    unit_gramian,
)

SEEDS = st.integers(0, 2**31)
COSINES = st.one_of(
    st.floats(-1.0, 1.0), st.sampled_from([-1.0, -1.0 + 1e-7, -1.0 + 1e-13, 0.0, 1.0 - 1e-7, 1.0])
)
ROUNDINGS = st.sampled_from([FLOAT32_ROUNDING, FLOAT64_ROUNDING])


def pair(cosine, decades, scale=1.0):
    """The Gramian of two gradients with this cosine, and norms 10^decades apart."""
    n = 10.0**decades
    return scale**2 * float64([[1.0, cosine * n], [cosine * n, n * n]])


def cosines_of(cosine, rounding):
    return raised(float64([[1.0, cosine], [cosine, 1.0]]), rounding)


# ---- Two tasks: closed forms.


@given(
    cosine=COSINES,
    decades=st.floats(-6.0, 6.0),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    rounding=ROUNDINGS,
)
@settings(max_examples=60)
def test_upgrad_of_two_is_the_general_solution(cosine, decades, scale, rounding):
    S, n = pair(cosine, decades, scale), float64([1.0, 10.0**decades])
    C = cosines_of(cosine, rounding)
    x = solvers.interior_minimum(C[None].expand(2, 2, 2).contiguous(), C)
    expected = ((x + torch.eye(2)) * n[:, None]).sum(0) / 2.0
    w = resolve(UPGrad(), S, {}, rounding=rounding).weights * n
    assert torch.allclose(w, expected, rtol=1e-9, atol=1e-12 * float(n.amax()))


@given(cosine=COSINES, decades=st.floats(-2.0, 2.0))
@settings(max_examples=40)
def test_upgrad_of_two_is_torchjds(cosine, decades):
    jd = pytest.importorskip("torchjd.aggregation")
    S = pair(cosine, decades)
    theirs = jd.UPGradWeighting()(S)
    n = S.diagonal().sqrt()
    # Theirs adds 1e-4 of the trace to the diagonal.
    apart = ((UPGrad()(S) - theirs) * n).abs().amax()
    assert apart <= 1e-3 * n.amax() * max(1.0, float(n.amax() / n.amin()) ** 2)


@given(
    cosine=COSINES,
    decades=st.floats(-6.0, 6.0),
    radius=st.sampled_from([0.1, 0.5, 0.9, 2.0]),
    first=st.floats(-1.0, 1.0),
    second=st.floats(-1.0, 1.0),
)
@settings(max_examples=100)
def test_best_of_two_leaves_no_gap(cosine, decades, radius, first, second):
    C = cosines_of(cosine, FLOAT32_ROUNDING)
    a, b = float64([1.0, 10.0 ** -abs(decades)]), float64([first, second])
    y = solvers.best_for_the_worst(C, b, a, radius)
    assert (y >= 0.0).all()
    assert float(y @ C @ y) <= radius**2 * (1.0 + 1e-8)
    u = y / (y @ a)
    best = radius * float(u @ C @ u) ** 0.5 + float(u @ b)  # no y is better: the dual
    assert best - float(((C @ y + b) / a).amin()) <= 1e-8 / float(a.amin())


@given(cosine=COSINES, rounding=ROUNDINGS)
@settings(max_examples=40)
def test_the_bargain_of_two_is_that_of_newtons_method(cosine, rounding):
    S, C = pair(cosine, 0.0), cosines_of(cosine, rounding)
    w = resolve(NashMTL(), S, {}, rounding=rounding).weights / S.norm() ** 0.5
    ones = torch.ones_like(w)
    # 1 + c to 1e-16, of 1e-12 at least.
    rtol = 1e-9 if rounding == FLOAT32_ROUNDING else 1e-3
    assert torch.allclose(w, bargain(C, ones, 1.0, rounding, ones), rtol=rtol)


# ---- Solvers that stop when they have converged.


@given(
    seed=SEEDS,
    tasks=st.integers(1, 24),
    family=st.sampled_from(FAMILIES[:-1]),
    decades=st.floats(-8, 8),
)
@settings(max_examples=60)
def test_nonnegative_minima_fulfil_their_conditions(seed, tasks, family, decades):
    """x ≥ 0, slope ≥ 0, and of each pair one is 0."""
    tasks = max(tasks, 2) if family in ("anti-parallel", "opposite") else tasks
    C = raised(unit_gramian(gradients(family, tasks, seed)))
    generator = torch.Generator().manual_seed(seed)
    q = 10.0**decades * torch.randn(3, tasks, generator=generator, dtype=torch.float64)
    x, left = host.nonnegative_minima(C.numpy()[None], q.numpy()[None])
    slope = x[0] @ C.numpy() + q.numpy()
    size = q.abs().amax(-1).numpy() + x[0].max(-1)
    assert not left.any()
    assert (np.abs(np.minimum(x[0], slope)).max(-1) <= 1e-12 * size).all()


@pytest.mark.parametrize("tasks", [40, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_of_many_tasks_fulfils_its_conditions(family, tasks):
    C = raised(unit_gramian(gradients(family, tasks, 0)))
    x = solvers.nonnegative_minima(C, C)
    slope = x @ C + C
    size = 1.0 + x.amax(-1)
    assert (torch.minimum(x, slope).abs().amax(-1) <= 1e-9 * size).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", [3, 8, 40])
def test_best_for_the_worst_is_that_of_the_path(family, tasks):
    C = torch.stack([raised(unit_gramian(gradients(family, tasks, seed))) for seed in range(8)])
    b = C.mean(-1) / C.mean((-2, -1)).sqrt()[:, None]
    a = torch.linspace(0.2, 1.0, tasks, dtype=torch.float64).expand(8, tasks).contiguous()
    y, path = (f(C, b, a, 0.5) for f in (solvers.best_for_the_worst, solvers.path_to_the_best))

    def worst(y):
        return (((C @ y[..., None])[..., 0] + b) / a).amin(-1)

    assert (y >= 0.0).all()
    assert torch.allclose(worst(y), worst(path), rtol=0.0, atol=1e-8)


def test_what_is_not_found_is_solved_in_a_fixed_number_of_steps(monkeypatch):
    S = torch.stack([random_gramian(6, seed) for seed in range(4)])
    expected = [method(S) for method in (UPGrad(), CAGrad())]
    monkeypatch.setattr(host, "TURNS_OF_ALL", 1)
    monkeypatch.setattr(host, "TURNS_OF_ONE", 0)
    C = unit_gramian(gradients("conflicting", 6, 0)).numpy()[None]
    assert host.nonnegative_minima(C, C)[1].any()
    for method, weights in zip((UPGrad(), CAGrad()), expected, strict=True):
        assert torch.allclose(method(S), weights, rtol=1e-7, atol=1e-9)


def test_only_the_last_entry_changes_sides_where_all_at_once_do_not_converge(monkeypatch):
    monkeypatch.setattr(host, "TURNS_OF_ALL", 0)
    monkeypatch.setattr(host, "TURNS_OF_ONE", 400)
    for seed in range(5):
        C = raised(unit_gramian(gradients("conflicting", 8, seed)))
        x, left = host.nonnegative_minima(C.numpy()[None], C.numpy()[None])
        assert not left.any()
        assert torch.allclose(
            torch.from_numpy(x[0]), solvers.interior_minimum(C.expand(8, 8, 8), C)
        )


# ---- The same weights on the host as on a device that is not read.


@pytest.mark.parametrize("method", METHODS[:-1], ids=name_of)
@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
def test_weights_are_those_of_a_device_that_is_not_read(monkeypatch, method, tasks):
    S = torch.stack(
        [gramian(norms_apart(gradients("conflicting", tasks, s), 2.0, s)) for s in range(6)]
    )
    S[1] = 0.0
    S[2, 0, :] = S[2, :, 0] = 0.0
    losses = torch.arange(1.0, tasks + 1.0).double()

    def steps():
        state = {k: v.clone() for k, v in method.new_state(tasks, CPU).items()}
        found = [resolve(method, S[b], state, losses, FLOAT32_ROUNDING).weights for b in range(6)]
        return torch.stack(found), state

    (w, state) = steps()
    no_reads(monkeypatch)
    expected, other = steps()
    size = expected.abs().amax(-1, keepdim=True)
    assert ((w - expected).abs() <= 1e-7 * size).all()
    assert all(torch.allclose(state[name].double(), other[name].double()) for name in state)


@given(
    seed=st.integers(-(2**63), 2**63 - 1), counter=st.integers(0, 2**40), tasks=st.integers(1, 6)
)
@settings(max_examples=30)
def test_random_orders_have_the_bits_of_the_device(seed, counter, tasks):
    shape = (2, tasks, tasks)
    expected = random_orders(torch.zeros(shape), seed, torch.tensor(counter))
    assert np.array_equal(host.random_orders(shape, seed, counter), expected.numpy())


@given(seed=SEEDS, tasks=st.integers(2, 7), family=st.sampled_from(FAMILIES))
@settings(max_examples=30)
def test_pcgrad_on_the_host_projects_in_the_same_order(seed, tasks, family):
    S = random_gramian(tasks, seed, family)
    expected = projected(S, random_orders(S, 5, torch.tensor(seed))).sum(-2)
    w = torch.from_numpy(weights_on_host(S.numpy(), 5, seed))
    assert torch.allclose(w, expected, rtol=1e-9, atol=1e-9)
    assert int(PCGrad().new_state(tasks, CPU)["counter"]) == 0


def test_a_method_of_ones_own_may_change_the_gramian_that_it_is_given():
    class Own(PCGrad):
        def weights(self, gramian, _state, _known):
            return gramian.zero_().diagonal() + 1.0

    S = random_gramian(3)
    before = S.clone()
    assert resolve(Own(), S, Own().new_state(3, CPU)).weights.tolist() == [1.0] * 3
    assert torch.equal(S, before)


def test_a_singular_system_is_not_found():
    C = np.ones((1, 3, 3))
    x, left = host.nonnegative_minima(C, -np.ones((1, 1, 3)))
    assert left.all() or np.allclose(x.sum(), 1.0)
    assert np.isnan(host.solve(C, np.ones((1, 3)))).all()
