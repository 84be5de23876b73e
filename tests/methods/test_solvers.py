"""The solvers of K×K problems, against others and by looking at every possible set of zeros."""

import itertools
import math

import pytest
import torch

from gcond_kernels.methods import solvers
from tests.helpers.gramians import FAMILIES, gradients, gramian, norms_apart, raised, unit_gramian


def symmetric(kind: str, size: int, seed: int) -> torch.Tensor:
    """[20, size, size] symmetric matrices."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(20, size, size, generator=generator, dtype=torch.float64)
    power = 24.0 * torch.rand(20, size, generator=generator, dtype=torch.float64) - 12.0
    if kind == "random":
        return A + A.mT
    if kind == "diagonal":
        return torch.diag_embed(10.0**power)
    if kind == "graded":  # a Gramian of gradients with lengths of 1e-6 to 1e6
        length = 10.0 ** (power / 2.0)
        return (A @ A.mT) * length[:, :, None] * length[:, None, :]
    Q = torch.linalg.qr(A)[0]
    few = torch.randint(0, 3, (20, size), generator=generator).double()
    values = few if kind == "repeated" else 10.0**power
    M = (Q * values[:, None, :]) @ Q.mT
    return (M + M.mT) / 2.0


@pytest.mark.parametrize("eigh", [solvers.jacobi, solvers.eigh])
@pytest.mark.parametrize("kind", ["random", "repeated", "diagonal", "graded", "spectrum"])
@pytest.mark.parametrize("size", range(1, 13))
def test_eigenvalues_and_vectors(eigh, kind, size):
    M = symmetric(kind, size, size)
    values, vectors = eigh(M)
    largest = M.abs().amax((-2, -1))
    # Rounding of some 100 rotations of each row; off the diagonal there is more left of matrices
    # whose eigenvalues repeat: see SWEEPS.
    rebuilt = (vectors * values[:, None, :]) @ vectors.mT
    left = 1e-13 if size <= 5 else 1e-10
    assert ((rebuilt - M).abs().amax((-2, -1)) <= left * largest).all()
    assert (vectors.mT @ vectors - torch.eye(size)).abs().amax() < 5e-14
    theirs = torch.linalg.eigvalsh(M)
    assert ((values.sort(-1)[0] - theirs).abs().amax(-1) <= 1e-13 * largest).all()


@pytest.mark.parametrize("size", [2, 3, 5, 10])
def test_eigenvalues_of_a_graded_gramian_are_exact_each_by_itself(size):
    """Where those of LAPACK are exact to rounding of the largest."""
    J = gradients("random", size, size)
    length = torch.logspace(-5, 5, size, dtype=torch.float64)
    S = gramian(J) * length[:, None] * length[None, :]
    product = 2.0 * (torch.linalg.slogdet(gramian(J))[1] / 2.0 + length.log().sum())
    values = solvers.jacobi(S)[0]
    assert (values > 0.0).all()
    # The logarithm of a product of numbers of 1e-10 to 1e10, each exact to some roundings.
    assert abs(values.log().sum() - product) < 1e-11


def test_a_diagonal_matrix_is_left_as_it_is():
    M = torch.diag(torch.tensor([3.0, 0.0, -1.0, 1e-300], dtype=torch.float64))
    values, vectors = solvers.jacobi(M)
    assert torch.equal(values, M.diagonal())
    assert torch.equal(vectors, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("count", range(1, 14))
def test_each_pair_occurs_once_in_all_rounds(count):
    rounds = []
    for number in range(count - 1 + count % 2):
        p, q = solvers.pairs_of_round(number, count, torch.device("cpu"))
        assert len(torch.cat([p, q]).unique()) == 2 * len(p)
        rounds += zip(p.tolist(), q.tolist(), strict=True)
    assert sorted(rounds) == list(itertools.combinations(range(count), 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rounding", [solvers.FLOAT32_ROUNDING, solvers.FLOAT64_ROUNDING])
@pytest.mark.parametrize("tasks", [2, 3, 5, 10])
def test_eigenvalues_of_rounding_are_raised(family, rounding, tasks):
    C = unit_gramian(gradients(family, tasks, 1))
    made = solvers.definite(C, rounding)
    assert torch.allclose(made, raised(C, rounding), rtol=1e-13, atol=1e-14)
    # To some roundings of the largest eigenvalue.
    assert torch.linalg.eigvalsh(made).amin() >= rounding - 1e-14
    if family == "deficient" or (family == "opposite" and rounding > 1e-9):
        assert 0.0 < (made - C).abs().amax() <= 1.01 * rounding
    else:
        assert torch.equal(made, C)  # to the bit


def enumerated_minimum(C: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The x ≥ 0 at which ½ xᵀ C x + qᵀ x is smallest, C definite: over all sets of zeros."""
    best, lowest = torch.zeros_like(q), 0.0
    for size in range(1, len(q) + 1):
        for kept in itertools.combinations(range(len(q)), size):
            part = torch.linalg.solve(C[list(kept)][:, list(kept)], -q[list(kept)])
            if (part >= 0.0).all() and 0.5 * (q[list(kept)] @ part) < lowest:
                lowest = float(0.5 * (q[list(kept)] @ part))
                best = torch.zeros_like(q)
                best[list(kept)] = part
    return best


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", [2, 3, 4, 5])
def test_nonnegative_minimum_by_enumeration(family, tasks):
    generator = torch.Generator().manual_seed(tasks)
    for seed in range(6):
        C = raised(unit_gramian(gradients(family, tasks, seed)))
        for scale in (1e-8, 1.0, 1e8):
            q = scale * torch.randn(tasks, generator=generator, dtype=torch.float64)
            x, expected = solvers.nonnegative_minimum(C, q), enumerated_minimum(C, q)
            # Rounding times the condition of C, 1e6 / 2 per task.
            assert torch.allclose(x, expected, rtol=1e-8, atol=1e-8 * float(expected.amax()))
            assert torch.equal(x == 0.0, expected == 0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", [6, 8, 10])
def test_nonnegative_minimum_by_its_conditions(family, tasks):
    """x ≥ 0, C x + q ≥ 0, and of each pair one is 0."""
    generator = torch.Generator().manual_seed(tasks)
    C = torch.stack([raised(unit_gramian(gradients(family, tasks, seed))) for seed in range(30)])
    q = torch.randn(30, tasks, generator=generator, dtype=torch.float64)
    x = solvers.nonnegative_minimum(C, q)
    slope = (C @ x[..., None])[..., 0] + q
    size = 1.0 + x.amax(-1)
    # What polishing leaves is rounding.
    assert (torch.minimum(x, slope).abs().amax(-1) <= 1e-12 * size).all()


@pytest.mark.parametrize(
    ("C", "q", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [-1.0, -2.0], [1.0, 2.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], [0.0, 0.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [0.0, -1.0], [0.0, 1.0]),  # a zero whose slope is 0 as well
        ([[1.0, 0.5], [0.5, 1.0]], [-1.0, -0.5], [1.0, 0.0]),  # the same, but for rounding
        ([[1.0, -0.5], [-0.5, 1.0]], [1.0, 1.0], [0.0, 0.0]),
    ],
)
def test_nonnegative_minimum_at_the_edge(C, q, expected):
    C, q = torch.tensor(C, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    x = solvers.nonnegative_minimum(C, q)
    assert torch.allclose(x, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def worst(C, b, a, y):
    return (((C @ y[..., None])[..., 0] + b) / a).amin(-1)


def gap(C, b, a, y, radius):
    """How far above `worst` of this y the best is at most: by the dual.

    For u ≥ 0 with uᵀ a = 1: min_i (C y + b)_i / a_i ≤ uᵀ (C y + b) ≤ radius ‖u‖_C + uᵀ b.
    """
    u = y / (y * a).sum(-1, keepdim=True)
    length = (u * (C @ u[..., None])[..., 0]).sum(-1).clamp(min=0.0).sqrt()
    return radius * length + (u * b).sum(-1) - worst(C, b, a, y)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("radius", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("tasks", [2, 3, 5, 8, 12])
def test_best_for_the_worst_leaves_no_gap(family, radius, tasks):
    generator = torch.Generator().manual_seed(tasks)
    C = torch.stack([raised(unit_gramian(gradients(family, tasks, seed))) for seed in range(30)])
    mean = torch.rand(30, tasks, generator=generator, dtype=torch.float64)
    length = (mean * (C @ mean[..., None])[..., 0]).sum(-1, keepdim=True).sqrt()
    b = (C @ mean[..., None])[..., 0] / length
    a = 0.1 + 0.9 * torch.rand(30, tasks, generator=generator, dtype=torch.float64)
    y = solvers.best_for_the_worst(C, b, a, radius)
    assert (y >= 0.0).all()
    size = (y * (C @ y[..., None])[..., 0]).sum(-1).sqrt()
    # Squares of an y of up to 1e3 cancel out: 1e6 · 1e-16, and some more for the solving.
    assert torch.allclose(size, torch.full_like(size, radius), rtol=1e-8)
    assert (gap(C, b, a, y, radius).abs() < 1e-9).all()


EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("C", "best"),
    [
        (EYE, 0.5 / math.sqrt(3.0)),  # tight all at once; 0.5 along the mean of three
        (torch.ones_like(EYE), 0.5),
        (1.5 * EYE - 0.5, 0.0),  # singular: three that cancel out, no y is any good
        (0.7 * EYE + 0.3, 0.5 * math.sqrt((1.0 + 2.0 * 0.3) / 3.0)),
        (torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]], dtype=torch.float64), 0.0),
    ],
    ids=["identity", "identical", "cancelling", "equicorrelated", "anti-parallel"],
)
def test_best_for_the_worst_with_ties(C, best):
    b, a = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    made = solvers.definite(C, solvers.FLOAT32_ROUNDING)
    y = solvers.best_for_the_worst(made, b, a, 0.5)
    assert y.isfinite().all()
    assert (y >= 0.0).all()
    # Where gradients cancel out, y makes nothing but what an eigenvalue of 2^-20 makes of it: its
    # root, 1e-3, of the radius.
    assert abs(float(worst(made, b, a, y)) - best) < 1e-3
    assert float(y @ made @ y) <= 0.25 * (1.0 + 1e-9)
    assert abs(float(gap(made, b, a, y, 0.5))) < 1e-9


def test_best_for_the_worst_lets_a_bound_go_again():
    """A path on which an entry grows and shrinks back to 0: more turns than there are tasks."""
    J = torch.stack([gradients("conflicting", 5, seed) for seed in range(400)])
    J = torch.stack([norms_apart(g, 2.0, seed) for seed, g in enumerate(J)])
    length = J.norm(dim=-1)
    J = J / length[..., None]
    C = J @ J.mT
    a = length.amin(-1, keepdim=True) / length
    mean = (C @ length[..., None])[..., 0]
    b = mean / (length * mean).sum(-1, keepdim=True).sqrt()
    let_go, before = torch.zeros(400, dtype=torch.bool), torch.zeros_like(b)
    for radius in (0.02, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0):
        y = solvers.best_for_the_worst(C, b, a, radius)
        let_go |= ((before > 1e-9) & (y == 0.0)).any(-1)
        before = y
        # Of a difference in units of the least a: rounding of C y is divided by it.
        assert (gap(C, b, a, y, radius).abs() < 1e-9 / a.amin(-1)).all()
    assert let_go.sum() > 5


def test_what_rounding_has_made_indefinite_ends_the_path_early():
    """A y within the radius, not one that a negative square made up."""
    C = torch.tensor(
        [[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], dtype=torch.float64
    ) * (1.0 + 3e-8 * torch.tensor([[0.0, 1, 1], [1, 0, -1], [1, -1, 0]], dtype=torch.float64))
    b = torch.tensor([0.9, -0.9, 0.9], dtype=torch.float64)
    for radius in (0.5, 1.0, 2.0):
        y = solvers.best_for_the_worst(C, b, torch.tensor([0.5, 1.0, 0.4]).double(), radius)
        assert y.isfinite().all()
        assert float(y @ C @ y) <= radius**2 + 1e-6
        assert float(worst(C, b, torch.ones(3).double(), y)) > -0.9 + min(0.4, radius)


def test_batches_of_any_shape():
    C = torch.stack([unit_gramian(gradients("random", 4, seed)) for seed in range(6)])
    q = -torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for solve in (
        solvers.nonnegative_minimum,
        lambda C, q: solvers.best_for_the_worst(C, q, torch.ones_like(q), 0.5),
        lambda C, _: solvers.eigh(C)[0],
        lambda C, _: solvers.jacobi(C)[0].sort(-1)[0],
        lambda C, _: solvers.definite(C - 0.9 * torch.eye(4), 1e-6)[..., 0],
    ):
        at_once = solve(C.view(2, 3, 4, 4), q.view(2, 3, 4)).view(6, 4)
        one_by_one = torch.stack([solve(C[i], q[i]) for i in range(6)])
        # Batched solves and products may round otherwise.
        assert torch.allclose(at_once, one_by_one, rtol=1e-12, atol=1e-13)
