"""The weights of every method against TorchJD's, and against what is known of the exact ones.

TorchJD solves in the units of the Gramian, ours for normalized gradients. Where the norms lie far
apart, float64 holds nothing of the smaller ones beside the largest in TorchJD's form: then it is
given the Gramian of normalized gradients, and its weights are divided by the norms.

Where gradients depend on each other, as far as their precision can tell, the weights are those of a
Gramian whose smallest eigenvalues, normalized, are raised (see `definite`): that is what others are
given then, and their weights are the same. Of all other gradients it is the Gramian itself.
"""

import itertools

import numpy as np
import pytest
import torch

from gcond_kernels.methods import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    ExcessMTL,
    FairGrad,
    GradVac,
    NashMTL,
    NonConflicting,
    NormBalancing,
    PCGrad,
    Sum,
    UPGrad,
)
from gcond_kernels.methods.method import fresh_state
from gcond_kernels.methods.pcgrad import projected
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING, FLOAT64_ROUNDING
from tests.conftest import slow
from tests.helpers.gramians import (
    FAMILIES,
    float64,
    gradients,
    gramian,
    name_of,
    norms_apart,
    raised,
    resolve,
    unit_gramian,
)

WHY = "others' weights are TorchJD's: pip install 'torchjd[cagrad,nash-mtl,quadprog-projector]'"
jd = pytest.importorskip("torchjd.aggregation", reason=WHY)
for module in ("cvxpy", "clarabel", "ecos", "quadprog", "qpsolvers"):
    pytest.importorskip(module, reason=WHY)
QuadprogProjector = pytest.importorskip("torchjd.linalg", reason=WHY).QuadprogProjector

TASKS = [2, 3, 5, 10, *map(slow, (4, 6, 7, 8, 9))]
# Of what is compared in units of the gradients as they are: 1e-6 and 1e6 for all of them alike.
SCALES = (1.0, 1e-6, 1e6)


def norms(S):
    return S.diagonal(dim1=-2, dim2=-1).sqrt()


def close(ours, theirs, relative=1e-4):
    """Within a share of the largest weight."""
    return (ours - theirs).abs().amax() <= relative * theirs.abs().amax()


def with_lengths(C, n):
    return C * n[:, None] * n[None, :]


# Families of gradients, and to what their inner products are known. Dependent gradients are solved
# for with eigenvalues of 1e-6 in one case, and of 1e-12 in the other: there float64 has 1e-4 left.
CASES = [
    ("random", FLOAT64_ROUNDING),
    ("conflicting", FLOAT64_ROUNDING),
    ("conflicting", FLOAT32_ROUNDING),
    ("anti-parallel", FLOAT32_ROUNDING),
    ("opposite", FLOAT64_ROUNDING),
    ("opposite", FLOAT32_ROUNDING),
    ("deficient", FLOAT32_ROUNDING),
]
IDS = [f"{family}-{'32' if rounding == FLOAT32_ROUNDING else '64'}" for family, rounding in CASES]
every_case = pytest.mark.parametrize(("family", "rounding"), CASES, ids=IDS)


def drawn(family, rounding, decades, tasks, seed, scale=1.0):
    """The Gramian that our method is given, the cosines that it is to solve with, and lengths."""
    J = scale * norms_apart(gradients(family, tasks, seed), decades, seed)
    return gramian(J), raised(unit_gramian(J), rounding), J.norm(dim=-1)


def weigh(method, S, rounding):
    """As in a first step, with what the Gramian is known to."""
    if rounding == FLOAT64_ROUNDING:
        return method(S)
    state = fresh_state(method, len(S), (), S.device)
    return resolve(method, S, state, rounding=rounding).weights


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
    ids=name_of,
)
def test_check_values(method, expected, theirs, apart):
    # Ours to the digits that are given here.
    assert torch.allclose(method(S_2), float64(expected), rtol=1e-12, atol=5e-10)
    assert (theirs()(S_2) - float64(expected)).abs().amax() <= apart + 1e-9


# ---- IMTL-G and Aligned-MTL: closed forms by eigenvalues.


@every_case
@pytest.mark.parametrize("decades", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_imtl_g(family, rounding, decades, tasks):
    for seed, scale in enumerate(SCALES):
        S, _, n = drawn(family, rounding, decades, tasks, seed, scale)
        C = S / n[:, None] / n[None, :]
        # What is rounding is no eigenvalue for us, which theirs has no way to say.
        values, vectors = torch.linalg.eigh(C)
        kept = (vectors * torch.where(values > rounding, values, 0.0)) @ vectors.mT
        beta = jd.IMTLGWeighting()(kept) / n
        w = weigh(IMTLG(), S, rounding)
        if not beta.any():
            assert not w.any()  # normalized gradients cancel out
            continue
        # Normalized, both are by the pseudo-inverse of the same matrix: rounding times its
        # condition, 2e6 at most, and what cancels out in the sum that they are divided by.
        cancelled = float(beta.abs().sum() / beta.sum().abs())
        assert close(w * n, beta / beta.sum() * n, 1e-8 * cancelled)
        if decades <= 1.0 and values.amin() > rounding:  # or the inverses of S and C differ
            assert close(w, jd.IMTLGWeighting()(S))


@pytest.mark.parametrize(("tasks", "size"), [(3, 2), (4, 2), (6, 3), (8, 5)])
def test_imtl_g_of_dependent_gradients_has_equal_projections_where_there_are_any(tasks, size):
    for seed in range(10):
        # Half the length of each is in common: that part has equal projections onto all of them.
        J = gradients("random", tasks, seed)[:, : size - 1]
        J = torch.cat([J / J.norm(dim=-1, keepdim=True), torch.ones_like(J[:, :1])], 1)
        J = norms_apart(J, 2.0, seed)
        w = IMTLG()(gramian(J))
        projections = (J @ (w @ J)) / J.norm(dim=-1)
        assert close(projections, projections.mean().expand(tasks), 1e-9)
        assert abs(float(w.sum()) - 1.0) < 1e-12


@pytest.mark.parametrize("tasks", [4, 6, 8])
def test_imtl_g_has_no_weights_where_gradients_of_length_one_cancel_out(tasks):
    """As many one way as the other: nothing but rounding is left of β."""
    for seed in range(20):
        J = gradients("random", tasks, seed)
        J = J[:1] / J[0].norm() * J.norm(dim=-1, keepdim=True)
        J[::2] *= -1.0
        assert IMTLG()(gramian(J)).tolist() == [0.0] * tasks
        J = torch.cat([J, torch.zeros_like(J[:1])])
        assert IMTLG()(gramian(J)).tolist() == [0.0] * (tasks + 1)


def test_imtl_g_has_no_weights_where_they_sum_to_zero():
    C = float64([[1.0, -0.25, 0.5], [-0.25, 1.0, 0.5], [0.5, 0.5, 1.0]])
    assert torch.allclose(C @ float64([2.0, 2.0, -1.0]), float64([1.0, 1.0, 1.0]))
    S = with_lengths(C, float64([1.0, 1.0, 0.25]))  # 2 / 1 + 2 / 1 - 1 / 0.25
    assert IMTLG()(S).tolist() == jd.IMTLGWeighting()(S).tolist() == [0.0, 0.0, 0.0]


# ---- ConFIG: as a vector, which is what others return.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", TASKS)
def test_config(family, tasks):
    for seed, (scale, decades) in enumerate(zip(SCALES, (0.0, 1.0, 3.0), strict=True)):
        J = scale * norms_apart(gradients(family, tasks, seed), decades, seed)
        w = ConFIG()(gramian(J))
        if not w.any():  # two that are opposite, to the bit: theirs is noise, of the rounding of J
            assert family == "deficient"
            assert tasks == 2
            continue
        # A pseudo-inverse of the gradients, to rounding times their condition; ours squares it,
        # and 1 + cos is some 5e-7.
        assert close(w @ J, jd.ConFIG()(J), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", [2, 3, 5, 10])
def test_config_of_its_authors(family, tasks):
    theirs = pytest.importorskip("conflictfree.grad_operator", reason="pip install conflictfree")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the ones that they solve for
    try:
        for seed in range(3):
            J = norms_apart(gradients(family, tasks, seed), 1.0, seed)
            w = ConFIG()(gramian(J))
            if not w.any():
                continue
            # The least squares of LAPACK, of the gradients themselves.
            assert close(w @ J, theirs.ConFIG_update(J), 1e-9)
            if tasks == 2 and family != "deficient":  # which divides by what is across
                assert close(w @ J, theirs.ConFIG_update_double(*J), 1e-7)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_config_has_one_cosine_to_all_and_the_norm_of_their_projections(tasks):
    for seed, family in itertools.product(range(5), FAMILIES[:-1]):
        J = norms_apart(gradients(family, tasks, seed), 3.0, seed)
        g = ConFIG()(gramian(J)) @ J
        along = J @ g / J.norm(dim=-1) / g.norm()
        assert along.amin() > 0.0
        assert torch.allclose(along, along.mean().expand(tasks), rtol=1e-7)
        assert torch.allclose(g.norm(), (J @ g / g.norm()).sum(), rtol=1e-9)


@every_case
@pytest.mark.parametrize("tasks", TASKS)
def test_aligned_mtl(family, rounding, tasks):
    for seed, scale in enumerate(SCALES):
        # Lengths up to 1e4 apart are eigenvalues 1e8 apart (more, where gradients nearly cancel
        # out): LAPACK's, which TorchJD takes, are exact to 1e-16 of the largest, so that the
        # smallest are known to 1e-8, and 1e-4 where two of them are nearly anti-parallel too.
        # Where some are 0, their rounding must be below TorchJD's cut of K · 2^-52 of the largest
        # and all others above: with lengths up to 10 apart it is.
        decades = 0.5 if family in ("opposite", "deficient") else 2.0
        S, _, n = drawn(family, rounding, decades, tasks, seed, scale)
        values, vectors = torch.linalg.eigh(unit_gramian(gradients(family, tasks, seed)))
        kept = (vectors * torch.where(values > rounding, values, 0.0)) @ vectors.mT
        theirs = jd.AlignedMTLWeighting()(with_lengths(kept, n))
        assert close(weigh(AlignedMTL(), S, rounding), theirs)


def test_aligned_mtl_of_lengths_that_leave_an_eigenvalue_to_rounding():
    """1e9 apart are 1e18 as squares: the shortest is below the cut, as in TorchJD's."""
    S = torch.diag(float64([1.0, 4.0, 1e-18]))
    assert torch.allclose(AlignedMTL()(S), float64([1 / 3, 1 / 6, 0.0]))
    assert torch.allclose(jd.AlignedMTLWeighting()(S), float64([1 / 3, 1 / 6, 0.0]))


# ---- UPGrad.


@every_case
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_upgrad(family, rounding, decades, tasks):
    # All but nothing is added to the diagonal: a thousandth of the rounding of raised eigenvalues.
    projector = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-15)
    for seed, scale in enumerate(SCALES):
        S, C, n = drawn(family, rounding, decades, tasks, seed, scale)
        # Rows n_i v_i of the normalized gradients.
        v = projector(torch.eye(tasks, dtype=torch.float64), C)
        # 1e-16 · 1e6, the condition of what was raised; over 1e12 the cosines round otherwise.
        assert close(weigh(UPGrad(), S, rounding) * n, (n @ v) / tasks, 1e-6)
        if decades == 0.0:
            theirs = jd.UPGradWeighting(projector=projector)(with_lengths(C, n))
            assert close(weigh(UPGrad(), S, rounding), theirs, 1e-6)


@every_case
def test_upgrad_makes_no_task_worse(family, rounding):
    for seed in range(20):
        J = norms_apart(gradients(family, 6, seed), 3.0, seed)
        w = weigh(UPGrad(), gramian(J), rounding)
        terms = (w * J.norm(dim=-1)).norm()
        along = (J @ (w @ J)) / J.norm(dim=-1)
        # Rounding; where eigenvalues were raised, up to that much of the terms.
        assert (along >= -max(rounding, 1e-12) * terms).all()


def test_upgrad_of_dependent_float64_gradients():
    """Float64 has four digits left of the weights, which are many as good: the result has more."""
    for seed in range(20):
        J = gradients("deficient", 6, seed)
        C, w = unit_gramian(J), UPGrad()(unit_gramian(J))
        v = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-10)(torch.eye(6).double(), C).mean(0)
        assert size_of(C, w - v) <= 1e-6
        assert w.abs().amax() <= 1.1 * v.abs().amax()


# ---- NonConflicting: of the plain sum it is K times TorchJD's DualProj.


@every_case
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_non_conflicting_sum(family, rounding, decades, tasks):
    projector = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-15)
    for seed, scale in enumerate(SCALES):
        S, C, n = drawn(family, rounding, decades, tasks, seed, scale)
        y = weigh(NonConflicting(Sum()), S, rounding) * n
        assert close(y, projector(n, C), 1e-6)
        if decades == 0.0:
            theirs = jd.DualProjWeighting(projector=projector)(with_lengths(C, n))
            assert close(y / n, tasks * theirs, 1e-6)


# ---- MGDA.


def size_of(C, a):
    """‖Σ_k a_k ĝ_k / ‖ĝ_k‖‖."""
    return max(float(a @ C @ a), 0.0) ** 0.5


@every_case
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_mgda_is_no_longer_than_theirs(family, rounding, decades, tasks):
    """Frank-Wolfe gets near the shortest slowly: ours is as short."""
    for seed, scale in enumerate(SCALES):
        S, C, n = drawn(family, rounding, decades, tasks, seed, scale)
        w = weigh(MGDA(), S, rounding)
        if tasks == 2:  # in closed form, of S as it is
            C = S / n[:, None] / n[None, :]
        theirs = jd.MGDAWeighting(epsilon=1e-9)(with_lengths(C, n))
        assert (w >= 0.0).all()
        assert abs(float(w.sum()) - 1.0) < 1e-12
        # Rounding of what cancels out, of the shortest: nothing needs to be longer.
        assert size_of(C, w * n) <= size_of(C, theirs * n) + 1e-9 * float(n.amin())


@every_case
@pytest.mark.parametrize("decades", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_mgda_by_its_conditions(family, rounding, decades, tasks):
    """ĝ_k · g is ‖g‖² where α_k > 0, and no less elsewhere."""
    for seed in range(3, 6):
        S, C, n = drawn(family, rounding, decades, tasks, seed)
        if tasks == 2:
            C = S / n[:, None] / n[None, :]
        n = n / n.amin()
        y = weigh(MGDA(), S, rounding) * n
        over = C @ y - (y @ C @ y) / n
        # Terms of up to 1e3 cancel out, whose squares are subtracted.
        assert (over >= -1e-9).all()
        assert (torch.minimum(over, y).abs() <= 1e-9).all()


@pytest.mark.parametrize("apart", [1.0, 1e3, 1e9])
def test_mgda_of_two(apart):
    """In closed form each share is a quotient of its own, however small it is."""
    n = float64([1.0, apart])
    for cosine in (-1.0, -1.0 + 1e-7, -0.5, 0.0, 0.5, 1.0):
        w = MGDA()(with_lengths(float64([[1.0, cosine], [cosine, 1.0]]), n))
        # n_2² − c n_1 n_2 and n_1² − c n_1 n_2, or 0 where that is below.
        shares = [max(apart * (apart - cosine), 0.0), max(1.0 - cosine * apart, 0.0)]
        if sum(shares) == 0.0:
            shares = [1.0, 1.0]
        assert torch.allclose(w, float64(shares) / sum(shares), rtol=1e-9, atol=0.0)


# ---- CAGrad.


def for_the_worst(C, n, a):
    """min_k g · ĝ_k of g = Σ_k a_k ĝ_k / ‖ĝ_k‖, ‖g − g0‖ / ‖g0‖, and ‖g0‖."""
    mean = n / len(n)
    away = size_of(C, a - mean) / size_of(C, mean)
    return float((n * (C @ a)).amin()), away, size_of(C, mean)


@every_case
@pytest.mark.parametrize("decades", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_cagrad_is_as_good_for_the_worst_as_theirs(family, rounding, decades, tasks):
    """CLARABEL stops at some 1e-8 of the objective in its own units, where that is flat."""
    for seed, (scale, c) in enumerate(zip(SCALES, (0.5, 0.2, 0.9), strict=True)):
        S, C, n = drawn(family, rounding, decades, tasks, seed, scale)
        w = weigh(CAGrad(c=c), S, rounding)
        theirs = jd.CAGradWeighting(c=c, norm_eps=1e-30)(with_lengths(C, n))
        value, away, mean = for_the_worst(C, n, w * n)
        # In exact arithmetic none is better than the best; but g · ĝ_k of the longest is a sum of
        # terms as long, to rounding.
        rounding = 1e-9 * mean * float(n.amin()) + 1e-14 * mean * float(n.amax())
        assert value >= for_the_worst(C, n, theirs * n)[0] - rounding
        assert away <= c * (1.0 + 1e-8)
        if family in ("random", "conflicting") and decades < 6.0:
            # Ours is better by up to 4e-4: so far off are its weights. Where lengths are 1e12
            # apart it gets nowhere near.
            assert close(w * n, theirs * n, 1e-3)


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
@every_case
@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_nash_mtl_is_as_good_a_bargain_as_theirs(family, rounding, tasks):
    """ECOS linearises a concave part: from some starts it stops far from the solution."""
    solved = 0
    for seed in range(2):
        S, C, n = drawn(family, rounding, 0.0, tasks, seed)
        # Theirs are the weights for S as it is, and not divided by its norm.
        w, S = weigh(NashMTL(), S, rounding) / S.norm() ** 0.5, with_lengths(C, n)
        values, vectors = torch.linalg.eigh(S)
        J = vectors * values.sqrt()
        theirs = jd.NashMTL(n_tasks=tasks, max_norm=0.0, optim_niter=50).weighting(J)
        # Rounding of K terms that are 1 each, of squares that may be 1e6.
        assert bargain(S, w) <= bargain(S, theirs) + 1e-9 * tasks
        shares = theirs * (S @ theirs)
        if (theirs > 0.0).all() and (shares - 1.0).abs().amax() < 1e-5:
            # Where it gets there, to 1e-5: the weights too.
            assert close(w, theirs, 1e-4)
            solved += 1
    assert solved > 0 or family in ("anti-parallel", "opposite", "deficient")


@every_case
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_nash_mtl_solves_its_equation(family, rounding, decades, tasks):
    """S α = ‖S‖ / α, α > 0."""
    for seed, scale in enumerate(SCALES):
        S, C, n = drawn(family, rounding, decades, tasks, seed, scale)
        w = weigh(NashMTL(), S, rounding)
        assert (w > 0.0).all()
        y = w * n / S.norm() ** 0.5
        # Terms as large as y² cancel out: 1e6 of them at most make rounding of 1e-10.
        assert (y * (C @ y) - 1.0).abs().amax() <= 1e-8


@pytest.mark.parametrize("tasks", [3, 6, 12])
def test_nash_mtl_of_several_pairs_nearly_anti_parallel(tasks):
    """Each by another angle: the weights are 1 to 1e3, and the steps have a long way to go."""
    for seed in range(20):
        J = gradients("random", tasks, seed)
        J = J / J.norm(dim=-1, keepdim=True)
        for k in range(1, tasks, 2):
            J[k] = -J[k - 1] + 10.0 ** -(0.5 + 2.0 * ((7 * k + seed) % 10) / 10.0) * J[k]
        S, w = gramian(J), NashMTL()(gramian(J))
        n = J.norm(dim=-1)
        y = w * n / S.norm() ** 0.5
        assert (y * (unit_gramian(J) @ y) - 1.0).abs().amax() <= 1e-8


# ---- FairGrad.


@every_case
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("tasks", TASKS)
def test_fairgrad_solves_its_equation(family, rounding, alpha, tasks):
    """S w = ‖S‖ w^(−1/α), w > 0; relative to the terms, which cancel out in conflict."""
    for seed, (scale, decades) in enumerate(zip(SCALES, (0.0, 1.0, 3.0), strict=True)):
        S, C, n = drawn(family, rounding, decades, tasks, seed, scale)
        w = weigh(FairGrad(alpha), S, rounding)
        assert (w > 0.0).all()
        y, right = w * n, S.norm() * w ** (-1.0 / alpha) / n
        terms = C.abs() @ y
        # Above α = 1 by the inverse of C: rounding times a condition of 1e6.
        assert ((C @ y - right).abs() <= 1e-8 * terms).all()


@pytest.mark.parametrize("family", ["random", "conflicting", "anti-parallel"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("tasks", [2, 3, 6, slow(10)])
def test_fairgrad_is_theirs_where_that_converges(family, alpha, tasks):
    pytest.importorskip("scipy")
    solved = 0
    for seed in range(4):
        S = gramian(gradients(family, tasks, seed))
        S = S / S.norm()
        w, theirs = FairGrad(alpha)(S), jd.FairGradWeighting(alpha=alpha)(S)
        left = (S @ theirs * theirs ** (1.0 / alpha) - 1.0).abs().amax()
        if left < 1e-6:  # a general least-squares solver, which stops where its steps are small
            solved += 1
            assert close(w, theirs, 1e-4)
    assert solved > 0 or family == "anti-parallel"


@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_fairgrad_of_1_is_nash_mtl_and_of_little_the_sum(tasks):
    S = gramian(norms_apart(gradients("conflicting", tasks, 1), 2.0, 1))
    assert torch.allclose(FairGrad(1.0)(S), NashMTL()(S), rtol=1e-9)
    near = gramian(gradients("random", tasks, 1))
    off = [(FairGrad(alpha)(near) - 1.0).abs().amax() for alpha in (0.1, 0.2, 1.0)]
    assert 4.0 * off[0] < 2.5 * off[1] < off[2]


# ---- Methods that keep weights: their recurrences, written out again.


def steps_of(method, J):
    """The weights in every step of gradients J [steps, K, N], and the state."""
    state = method.new_state(J.shape[1], J.device)
    found = [resolve(method, gramian(one), state).weights for one in J]
    return torch.stack(found), state


def changing(tasks, size, steps=12):
    generator = torch.Generator().manual_seed(tasks)
    norms = 10.0 ** torch.randn(steps, tasks, 1, generator=generator, dtype=torch.float64)
    return norms * torch.randn(steps, tasks, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.9, 0.0])
@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_norm_balancing(beta, tasks):
    J, average = changing(tasks, 5), np.ones(tasks)
    found, _ = steps_of(NormBalancing(beta), J)
    for one, w in zip(J.numpy(), found, strict=True):
        n = np.linalg.norm(one, axis=-1)
        average = beta * average + (1.0 - beta) * n.sum() / n
        assert np.allclose(w.numpy(), average, rtol=1e-12)
        if beta == 0.0:
            assert np.allclose(w.numpy() * n, n.sum())


def test_a_gradient_that_nearly_vanishes_does_not_rule_the_average_of_norms():
    J = torch.ones(2, 2, 3, dtype=torch.float64)
    J[0, 1] *= 1e-15
    found, _ = steps_of(NormBalancing(), J)
    # Σ ‖ĝ‖ / (1e-5 · mean) = 2e5, which counts for 0.1.
    assert torch.allclose(found[0], float64([0.9 + 0.1, 0.9 + 2e4]), rtol=1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_excess_mtl_of_one_parameter_is_that_of_its_paper(tasks):
    """By elements, and the sum over one element: LibMTL's recurrence, and TorchJD."""
    J, step = changing(tasks, 1), 0.3
    found, _ = steps_of(ExcessMTL(step), J)
    theirs = jd.ExcessMTL(robust_step_size=step).weighting
    theirs(J[0])
    theirs._weights.fill_(1.0 / tasks)  # its first step weights by risks that are not relative
    squares, w = np.zeros((tasks, 1)), np.ones(tasks)
    for place, one in enumerate(J.numpy()):
        squares += one**2
        risk = (one**2 / np.sqrt(squares + 1e-7)).sum(-1)
        if place == 0:
            first = risk
        else:
            w = w * np.exp(step * risk / first)
            w = w / w.sum() * tasks
            # They add 1e-7 to sums of squares, of which the least here is some 1e-4.
            assert np.allclose(theirs(J[place]).numpy() * tasks, w, rtol=1e-3)
        assert np.allclose(found[place].numpy(), w, rtol=1e-3)


def test_excess_mtl_of_several_parameters_is_not():
    """Their estimate is by elements, and no function of the Gramian."""
    J = changing(3, 20)
    found, _ = steps_of(ExcessMTL(0.3), J)
    squares, w = np.zeros((3, 20)), np.ones(3)
    first = np.linalg.norm(J[0], ord=1, axis=-1)
    for one in J.numpy():
        squares += one**2
        risk = (one**2 / np.sqrt(squares)).sum(-1)
        w = w * np.exp(0.3 * risk / first)
        w = w / w.sum() * 3
    assert not np.allclose(found[-1].numpy(), w, rtol=0.01)


def test_a_task_without_a_gradient_keeps_what_it_has():
    for method in (ExcessMTL(0.3), NormBalancing()):
        J = changing(3, 4)
        alone, _ = steps_of(method, J[:, :2])
        J[1:, 2] = 0.0
        found, state = steps_of(method, J)
        assert (found[1:, 2] == 0.0).all()
        kept = (
            state["task_weights"][2] if "task_weights" in state else state["log_weights"].exp()[2]
        )
        assert torch.allclose(kept, found[0, 2], rtol=1e-12)
        if isinstance(method, ExcessMTL):  # its first step weights all alike
            assert torch.allclose(found[:, :2], alone, rtol=1e-9)


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
        monkeypatch.setattr(torch, "randperm", lambda _: torch.tensor(next(drawn)))

    return use


def orders(tasks, seed):
    """All orders of 3 tasks, each with others for the rows after the first; or 8 random ones."""
    if tasks == 3:
        every = list(itertools.permutations(range(3)))
        for i, first in enumerate(every):
            yield torch.tensor([first, every[(i + 1) % 6], every[(i + 4) % 6]])
            yield torch.tensor([every[(i + 2) % 6], first, every[(i + 5) % 6]])
            yield torch.tensor([every[(i + 3) % 6], every[(i + 1) % 6], first])
    else:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(8):
            yield torch.rand(tasks, tasks, generator=generator).argsort(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize("tasks", [3, 4, 6, 10])
def test_pcgrad_in_every_order(their_orders, family, decades, tasks):
    for seed, scale in enumerate(SCALES):
        S = gramian(scale * norms_apart(gradients(family, tasks, seed), decades, seed))
        n = norms(S)
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
        S = gramian(norms_apart(gradients(family, tasks, step), 2.0, step))
        their_orders(order, others=True)
        monkeypatch.setattr(
            "gcond_kernels.methods.gradvac.random_orders", lambda *_, order=order: order
        )
        w = resolve(ours, S, state, rounding=FLOAT32_ROUNDING).weights
        # Sines of nearly anti-parallel gradients: 1 − φ² is 1e-6, to 1e-10.
        assert close(w * norms(S), theirs(S) * norms(S), 1e-7)
        assert torch.allclose(state["target_cosines"], theirs._phi_t, rtol=1e-7, atol=1e-9)
    assert int(state["counter"]) == step + 1


def test_gradvac_without_memory_is_pcgrad():
    S = torch.stack([gramian(gradients("conflicting", 5, seed)) for seed in range(20)])
    # The same seed, the same orders.
    assert torch.allclose(GradVac(beta=0.0, seed=7)(S), PCGrad(seed=7)(S), rtol=1e-9, atol=1e-12)
