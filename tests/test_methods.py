"""The weights of every method against TorchJD's, and against what is known of the exact ones.

TorchJD solves in the units of the Gramian, ours at gradients of length 1. Where the lengths lie far
apart, float64 holds nothing of the shorter ones beside the longest in TorchJD's form: then it is
given the Gramian at length 1, and what it says is taken back to the lengths.
"""

import itertools

import pytest
import torch
from test_solvers import FAMILIES, gradients, gramian, spread, unit_gramian

from gcond_kernels.methods import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    GradVac,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)
from gcond_kernels.methods.pcgrad import projected

WHY = "others' weights are TorchJD's: pip install 'torchjd[cagrad,nash-mtl,quadprog-projector]'"
jd = pytest.importorskip("torchjd.aggregation", reason=WHY)
for module in ("cvxpy", "clarabel", "ecos", "quadprog", "qpsolvers"):
    pytest.importorskip(module, reason=WHY)
QuadprogProjector = pytest.importorskip("torchjd.linalg", reason=WHY).QuadprogProjector

TASKS = range(2, 11)
# Of what is compared in units of the gradients as they are: 1e-6 and 1e6 for all of them alike.
SCALES = (1.0, 1e-6, 1e6)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lengths(S):
    return S.diagonal(dim1=-2, dim2=-1).sqrt()


def close(ours, theirs, relative=1e-4):
    """Within a share of the largest weight."""
    return (ours - theirs).abs().amax() <= relative * theirs.abs().amax()


def result_size(S, w):
    """‖Σ_k w_k ĝ_k‖ over the lengths of its terms."""
    n = lengths(S)
    C = S / n[..., :, None] / n[..., None, :]
    a = w * n
    square = (a * (C @ a[..., None])[..., 0]).sum(-1).clamp(min=0.0)
    return square.sqrt() / a.abs().amax(-1)


# ---- Values that can be checked by hand, or that others have published.

S_2 = float64([[18.0, -22.0], [-22.0, 38.0]])  # of [-4, 1, 1] and [6, 1, 1]


@pytest.mark.parametrize(
    ("method", "expected", "theirs", "apart"),
    [
        (Sum(), [1.0, 1.0], lambda: jd.SumWeighting(), 0.0),
        (PCGrad(), [1 + 22 / 18, 1 + 22 / 38], lambda: jd.PCGradWeighting(), 1e-12),
        (GradVac(), [1 + 22 / 18, 1 + 22 / 38], lambda: jd.GradVacWeighting(eps=0.0), 1e-12),
        (MGDA(), [0.6, 0.4], lambda: jd.MGDAWeighting(), 1e-12),
        # Halves of [1, 22/38] and [22/18, 1]; TorchJD adds 1e-4 of the trace to the diagonal.
        (
            UPGrad(),
            [(1 + 22 / 18) / 2, (1 + 22 / 38) / 2],
            lambda: jd.UPGradWeighting(),
            2.5e-4,
        ),
        # CLARABEL stops at 1e-8.
        (CAGrad(c=0.5), [0.704124145, 0.5], lambda: jd.CAGradWeighting(c=0.5), 1e-7),
        (IMTLG(), [0.592330316938, 0.407669683062], lambda: jd.IMTLGWeighting(), 1e-12),
        (AlignedMTL(), [0.559071915657, 0.408261068099], lambda: jd.AlignedMTLWeighting(), 1e-12),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "weights") else "",
)
def test_check_values(method, expected, theirs, apart):
    # Ours to the digits that are given here; UPGrad and MGDA's ridge of 1e-12 counts tenfold.
    assert torch.allclose(method(S_2), float64(expected), rtol=2e-11, atol=5e-10)
    assert (theirs()(S_2) - float64(expected)).abs().amax() <= apart + 1e-9


# ---- IMTL-G and Aligned-MTL: closed forms by eigenvalues.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", TASKS)
def test_imtl_g(family, tasks):
    for seed, scale in enumerate(SCALES):
        J = gradients(family, tasks, seed)
        C = unit_gramian(J)
        # At length 1 both are by the pseudo-inverse of the same matrix, with the same cut. Rounding
        # times its condition, 2e6 where two are nearly anti-parallel.
        assert close(IMTLG()(scale**2 * C), jd.IMTLGWeighting()(C), 1e-8)
        if family == "deficient":
            continue  # the pseudo-inverses of S and C then mean different things: see below
        S = gramian(scale * spread(J, 1.0, seed))
        assert close(IMTLG()(S), jd.IMTLGWeighting()(S))


@pytest.mark.parametrize("tasks", TASKS)
def test_imtl_g_of_lengths_far_apart(tasks):
    for seed in range(5):
        J = spread(gradients("conflicting", tasks, seed), 6.0, seed)
        expected = jd.IMTLGWeighting()(unit_gramian(J)) / J.norm(dim=-1)
        assert close(IMTLG()(gramian(J)), expected / expected.sum(), 1e-8)


@pytest.mark.parametrize(("tasks", "size"), [(3, 2), (4, 2), (6, 3), (8, 5)])
def test_imtl_g_of_dependent_gradients_has_equal_projections_where_there_are_any(tasks, size):
    for seed in range(10):
        # Half the length of each is in common: that part has equal projections onto all of them.
        J = gradients("random", tasks, seed)[:, : size - 1]
        J = torch.cat([J / J.norm(dim=-1, keepdim=True), torch.ones_like(J[:, :1])], 1)
        J = spread(J, 2.0, seed)
        w = IMTLG()(gramian(J))
        projections = (J @ (w @ J)) / J.norm(dim=-1)
        assert close(projections, projections.mean().expand(tasks), 1e-9)
        assert abs(float(w.sum()) - 1.0) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", TASKS)
def test_aligned_mtl(family, tasks):
    for seed, scale in enumerate(SCALES):
        # Lengths up to 1e4 apart are eigenvalues 1e8 apart (more, where gradients nearly cancel
        # out): LAPACK's, which TorchJD takes, are exact to 1e-16 of the largest, so that the
        # smallest are known to 1e-8 (2e-2 · 1e-6 nearly anti-parallel: there, up to 10 apart).
        decades = 0.5 if family == "anti-parallel" else 2.0
        J = scale * spread(gradients(family, tasks, seed), decades, seed)
        if family == "deficient" and tasks > 3:
            # What is 0 is below the cut of K · 2^-52, by four times and more; the rest must not be.
            J = scale * spread(gradients(family, tasks, seed), 0.5, seed)
        assert close(AlignedMTL()(gramian(J)), jd.AlignedMTLWeighting()(gramian(J)))


# ---- UPGrad.


def in_their_units(C, n):
    """UPGrad from TorchJD's projector at length 1: rows n_i v_i of the gradients at length 1."""
    # With nothing added quadprog refuses a matrix that is singular to rounding.
    projector = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-14)
    v = projector(torch.eye(len(C), dtype=torch.float64), C)
    return (n @ v) / n / len(C)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_upgrad(family, decades, tasks):
    for seed, scale in enumerate(SCALES):
        J = spread(gradients(family, tasks, seed), decades, seed)
        S, C, n = gramian(scale * J), unit_gramian(J), J.norm(dim=-1)
        w, theirs = UPGrad()(S), in_their_units(C, n)
        if family == "deficient":
            # Many weights make the same result, which is compared instead.
            unit = n / n.amax()
            assert float(result_size(C, (w - theirs) * unit)) * float(
                ((w - theirs) * unit).abs().amax()
            ) <= 1e-6 * float((theirs * unit).abs().amax())
            continue
        assert close(w * n, theirs * n)
        if decades == 0.0:
            tiny = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-13)
            assert close(w, jd.UPGradWeighting(projector=tiny)(S))


@pytest.mark.parametrize("family", ["random", "conflicting", "anti-parallel"])
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", [2, 3, 4, 5])
def test_upgrad_by_enumeration(family, decades, tasks):
    for seed in range(4):
        J = spread(gradients(family, tasks, seed), decades, seed)
        C, n = unit_gramian(J), J.norm(dim=-1)
        expected = torch.zeros(tasks, dtype=torch.float64)
        for i in range(tasks):
            expected += n[i] * projection(C, i) / n / tasks
        # The ridge of 1e-12, times the condition: 2e6 where two are nearly anti-parallel.
        assert close(UPGrad()(gramian(J)) * n, expected * n, 1e-5)
        if family != "anti-parallel":
            assert close(UPGrad()(gramian(J)) * n, expected * n, 1e-8)


def projection(C, i):
    """argmin vᵀ C v over v ≥ e_i: by which of the bounds are tight."""
    K = len(C)
    for size in range(K + 1):
        for free in itertools.combinations(range(K), size):
            v = torch.zeros(K, dtype=torch.float64)
            v[i] = 1.0
            if free:
                F = list(free)
                rest = C[F] @ v - C[F, i] * 0.0
                v[F] -= torch.linalg.solve(C[F][:, F], rest)
            slope, bound = C @ v, torch.eye(K, dtype=torch.float64)[i]
            if (v >= bound - 1e-12).all() and (slope >= -1e-12).all():
                return v
    raise AssertionError("no set of tight bounds is the minimum")


@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_makes_no_task_worse(family):
    for seed in range(20):
        J = spread(gradients(family, 6, seed), 3.0, seed)
        w = UPGrad()(gramian(J))
        g = w @ J
        # Rounding, and 1e-12 of the largest of the terms that cancel out.
        terms = (w * J.norm(dim=-1)).abs().amax()
        assert ((J @ g) / J.norm(dim=-1) >= -1e-10 * terms).all()


# ---- MGDA.


def mgda_objective(S, w):
    n = lengths(S)
    C = S / n[:, None] / n[None, :]
    return max(float((w * n) @ C @ (w * n)), 0.0) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_mgda_is_no_longer_than_theirs(family, decades, tasks):
    """Frank-Wolfe gets within some percent of the shortest in its 100 steps: ours is as short."""
    for seed, scale in enumerate(SCALES):
        S = gramian(scale * spread(gradients(family, tasks, seed), decades, seed))
        w, theirs = MGDA()(S), jd.MGDAWeighting(epsilon=1e-9, max_iters=300)(S)
        assert (w >= 0.0).all()
        assert abs(float(w.sum()) - 1.0) < 1e-12
        shortest = float(lengths(S).amin())
        # 1e-9 of what no combination needs to be longer than: the ridge, where it cancels out.
        assert mgda_objective(S, w) <= mgda_objective(S, theirs) + 2e-6 * shortest
        if family in ("random", "conflicting"):
            assert mgda_objective(S, w) <= mgda_objective(S, theirs) + 1e-9 * shortest


@pytest.mark.parametrize("family", ["random", "conflicting", "anti-parallel"])
@pytest.mark.parametrize("decades", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("tasks", [2, 3, 4, 5])
def test_mgda_by_enumeration(family, decades, tasks):
    for seed in range(4):
        J = spread(gradients(family, tasks, seed), decades, seed)
        C, n = unit_gramian(J), J.norm(dim=-1)
        best, shortest = None, float("inf")
        for size in range(1, tasks + 1):
            for kept in map(list, itertools.combinations(range(tasks), size)):
                # S α = 1 on what is kept, solved at length 1.
                part = torch.linalg.solve(C[kept][:, kept], n.amin() / n[kept]) / n[kept]
                part = part / part.sum()
                length = float((part * n[kept]) @ C[kept][:, kept] @ (part * n[kept]))
                if (part >= 0.0).all() and length < shortest:
                    shortest, best = length, torch.zeros(tasks, dtype=torch.float64)
                    best[kept] = part
        # The ridge of 1e-12, times the condition: 2e6 where two are nearly anti-parallel.
        assert close(MGDA()(gramian(J)), best, 1e-4 if family == "anti-parallel" else 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_mgda_by_its_conditions(family, decades, tasks):
    """ĝ_k · g is ‖g‖² where α_k > 0, and no less elsewhere."""
    for seed in range(10):
        J = spread(gradients(family, tasks, seed), decades, seed)
        J = J / J.norm(dim=-1).amin()
        n = J.norm(dim=-1)
        w = MGDA()(gramian(J))
        g = w @ J
        over = (J @ g - g @ g) / n
        # What the ridge of 1e-12 adds to ‖g‖² and takes from C α, and rounding; dependent
        # gradients leave the steps in a valley that is flat to 1e-9.
        y = w * n
        tolerance = 1e-9 + 2e-12 * float(y @ y + y.amax())
        tolerance = 1e-5 if family == "deficient" else tolerance
        assert (over >= -tolerance).all()
        assert (torch.minimum(over, w * n).abs() <= tolerance).all()


# ---- CAGrad.


def for_the_worst(S, w):
    """min_k g · ĝ_k, and ‖g − g0‖ / ‖g0‖, all at length 1."""
    n, K = lengths(S), len(S)
    C = S / n[:, None] / n[None, :]
    a, mean = w * n, n / K
    away = a - mean
    radius = float((away @ C @ away).clamp(min=0.0) / (mean @ C @ mean)) ** 0.5
    return float((n * (C @ a)).amin()), radius, float((mean @ C @ mean).clamp(min=0.0)) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 1.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_cagrad_is_as_good_for_the_worst_as_theirs(family, decades, tasks):
    """CLARABEL stops at some 1e-8 of the objective in its own units, where that is flat."""
    for seed, (scale, c) in enumerate(zip(SCALES, (0.5, 0.2, 0.9), strict=True)):
        S = gramian(scale * spread(gradients(family, tasks, seed), decades, seed))
        w, theirs = CAGrad(c=c)(S), jd.CAGradWeighting(c=c, norm_eps=1e-30)(S)
        (value, radius, mean), (their_value, _, _) = for_the_worst(S, w), for_the_worst(S, theirs)
        unit = mean * float(lengths(S).amin())
        # In exact arithmetic none is better than the best: 1e-9 are for rounding and the ridge.
        assert value >= their_value - 1e-8 * unit
        assert radius <= c * (1.0 + 1e-9)
        if family in ("random", "conflicting"):
            # Ours is better by up to 4e-4: so far off are its weights.
            n = lengths(S)
            assert close(w * n, theirs * n, 1e-3)


@pytest.mark.parametrize("tasks", TASKS)
def test_cagrad_of_lengths_far_apart(tasks):
    """TorchJD gets nowhere near: what is checked is that it is no better."""
    for seed in range(3):
        S = gramian(spread(gradients("conflicting", tasks, seed), 6.0, seed))
        w, theirs = CAGrad()(S), jd.CAGradWeighting(c=0.5, norm_eps=1e-30)(S)
        value, radius, mean = for_the_worst(S, w)
        # g · ĝ_k of the longest is a sum whose terms are this large, to rounding.
        rounding = 1e-14 * mean * float(lengths(S).amax())
        assert value >= for_the_worst(S, theirs)[0] - rounding - 1e-9 * mean * float(
            lengths(S).amin()
        )
        assert radius <= 0.5 * (1.0 + 1e-9)


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.16), (2, 1.4)])
def test_cagrad_rescales(rescale, divisor):
    S = gramian(gradients("conflicting", 4, 0))
    assert torch.allclose(CAGrad(c=0.4, rescale=rescale)(S), CAGrad(c=0.4)(S) / divisor, rtol=1e-15)


def test_cagrad_without_a_radius_is_the_mean():
    assert CAGrad(c=0.0)(S_2).tolist() == [0.5, 0.5]


# ---- Nash-MTL.


def bargain(S, w):
    """½ wᵀ S w − Σ log w, which the solution has the least of."""
    return float(0.5 * (w @ S @ w) - w.log().sum()) if (w > 0.0).all() else float("inf")


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_nash_mtl_is_as_good_a_bargain_as_theirs(family, tasks):
    """ECOS linearises a concave part: from some starts it stops far from the solution."""
    solved = 0
    for seed in range(2):
        J = gradients(family, tasks, seed)
        S = gramian(J)
        # Theirs are the weights for S as it is, and not divided by its norm.
        w = NashMTL()(S) / S.norm() ** 0.5
        theirs = jd.NashMTL(n_tasks=tasks, max_norm=0.0, optim_niter=50).weighting(J)
        # 1e-9 of the squares of terms that are 1 each.
        assert bargain(S, w) <= bargain(S, theirs) + 1e-9 * tasks
        shares = theirs * (S @ theirs)
        if (theirs > 0.0).all() and (shares - 1.0).abs().amax() < 1e-5:
            # Where it gets there, to 1e-5 of C: the weights of it, times the condition's root.
            assert close(w, theirs, 1e-4)
            solved += 1
    assert solved > 0 or family in ("deficient", "anti-parallel")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_nash_mtl_solves_its_equation(family, decades, tasks):
    """S α = ‖S‖ / α, α > 0."""
    for seed, scale in enumerate(SCALES):
        J = scale * spread(gradients(family, tasks, seed), decades, seed)
        S, n = gramian(J), J.norm(dim=-1)
        w = NashMTL()(S)
        assert (w > 0.0).all()
        C = S / n[:, None] / n[None, :]
        y = w * n / S.norm() ** 0.5
        shares = y * (C @ y)
        # Without the ridge dependent gradients have no solution: 1 is shared with 1e-12 y². Terms
        # as large as y² cancel out: 1e6 of them make rounding of 1e-10, and 1e12 of them 1e-3.
        tolerance = 1e-2 if family == "deficient" else 1e-8
        assert (shares + 1e-12 * y**2 - 1.0).abs().amax() <= tolerance
        if family != "deficient":
            assert (shares - 1.0).abs().amax() <= 1e-5


@pytest.mark.parametrize("tasks", [3, 6, 12])
def test_nash_mtl_of_several_pairs_nearly_anti_parallel(tasks):
    """Each by another angle: the weights are 10 to 1e5, and the steps have a long way to go."""
    for seed in range(20):
        J = gradients("random", tasks, seed)
        J = J / J.norm(dim=-1, keepdim=True)
        for k in range(1, tasks, 2):
            J[k] = -J[k - 1] + 10.0 ** -(1.0 + 4.0 * ((7 * k + seed) % 10) / 10.0) * J[k]
        S = gramian(J)
        shares = NashMTL()(S) * (S @ NashMTL()(S)) / S.norm()
        # Weights of 1e5: 1e10 · 1e-16 of rounding, and 1e10 · 1e-12 of the ridge.
        assert (shares - 1.0).abs().amax() < 2e-2


# ---- PCGrad and GradVac, order by order.


@pytest.fixture
def their_orders(monkeypatch):
    """Lets TorchJD draw the rows of an order, whether it asks for all tasks or for the others."""

    def use(order: torch.Tensor, others: bool = False):
        rows = []
        for i, row in enumerate(order.tolist()):
            left = [j for j in range(len(row)) if j != i]
            rows.append([left.index(j) for j in row if j != i] if others else row)
        drawn = iter(rows)
        monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(next(drawn)))

    return use


def orders(tasks, seed):
    """All orders of 3 tasks, each with others for the rows after the first; or 8 random ones."""
    if tasks == 3:
        every = list(itertools.permutations(range(3)))
        for at, first in enumerate(every):
            yield torch.tensor([first, every[(at + 1) % 6], every[(at + 4) % 6]])
            yield torch.tensor([every[(at + 2) % 6], first, every[(at + 5) % 6]])
            yield torch.tensor([every[(at + 3) % 6], every[(at + 1) % 6], first])
    else:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(8):
            yield torch.rand(tasks, tasks, generator=generator).argsort(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", [3, 4, 6, 10])
def test_pcgrad_in_every_order(their_orders, family, decades, tasks):
    for seed, scale in enumerate(SCALES):
        S = gramian(scale * spread(gradients(family, tasks, seed), decades, seed))
        n = lengths(S)
        for order in orders(tasks, seed):
            their_orders(order)
            theirs = jd.PCGradWeighting()(S)
            # The same sums in another order; a product that is 0 but for rounding may be a conflict
            # in one of them, and changes next to nothing.
            assert close(projected(S, order).sum(-2) * n, theirs * n, 1e-10)


@pytest.mark.parametrize("family", ["random", "conflicting", "anti-parallel"])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("tasks", [2, 3, 5, 10])
def test_gradvac_in_every_order_over_several_steps(monkeypatch, their_orders, family, beta, tasks):
    ours, theirs = GradVac(beta=beta), jd.GradVacWeighting(beta=beta, eps=0.0)
    state = ours.new_state(tasks, torch.device("cpu"))
    for step, order in enumerate(orders(tasks, tasks)):
        S = gramian(spread(gradients(family, tasks, step), 2.0, step))
        their_orders(order, others=True)
        monkeypatch.setattr(
            "gcond_kernels.methods.gradvac.random_orders", lambda *_, order=order: order
        )
        w = ours.resolve(S, None, S.new_ones(tasks), state).weights
        # Sines of nearly anti-parallel gradients: 1 − φ² is 1e-6, to 1e-10.
        assert close(w * lengths(S), theirs(S) * lengths(S), 1e-7)
        assert torch.allclose(state["target_cosines"], theirs._phi_t, rtol=1e-7, atol=1e-9)
    assert int(state["draws"]) == step + 1


def test_gradvac_without_memory_is_pcgrad():
    S = torch.stack([gramian(gradients("conflicting", 5, seed)) for seed in range(20)])
    # The same seed, the same orders.
    assert torch.allclose(GradVac(beta=0.0, seed=7)(S), PCGrad(seed=7)(S), rtol=1e-9, atol=1e-12)
