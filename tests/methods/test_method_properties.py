"""What must hold of every method that weights the tasks by their Gramian, for all Gramians."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcond_kernels.methods import (
    DWA,
    FAMO,
    IMTLG,
    MGDA,
    STCH,
    AlignedMTL,
    CAGrad,
    ConFIG,
    ExcessMTL,
    FairGrad,
    GCond,
    GradDrop,
    GradNorm,
    GradVac,
    NashMTL,
    NormBalancing,
    PCGrad,
    Sum,
    UncertaintyWeighting,
    UPGrad,
    aligned_mtl,
    imtl_g,
    solvers,
)
from gcond_kernels.methods.method import fresh_state
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING
from tests.conftest import slow
from tests.helpers.as_on_gpu import late_flags, no_reads
from tests.helpers.gramians import (
    CPU,
    METHODS,
    OF_ALL_TENSORS,
    RANDOM,
    SOLVED,
    every_method,
    float64,
    gradients,
    gramian,
    is_unchanged,
    name_of,
    norms_apart,
    random_gramian,
    resolve,
    snapshot,
    warm,
    weights,
)
from tests.helpers.host_reads import HostReads, Uploads

# The older form of GCond, which projects both gradients of a pair.
MUTUAL = GCond(arbitration="zones", thresholds=(-1.0, -1.0, 0.0))

SEEDS = st.integers(0, 2**31)


# ---- Weights are finite wherever gradients are.

DEFINED = {
    "one task": [[3.0, 4.0]],
    "two identical": [[1.0, 2.0]] * 2,
    "three identical": [[1.0, 2.0]] * 3,
    "five identical": [[0.1, 0.7]] * 5,
    "two anti-parallel": [[1.0, 2.0], [-1.0, -2.0]],
    "two anti-parallel, of different norms": [[0.3, 0.7], [-3e3, -7e3]],
    "two parallel, of different norms": [[0.3, 0.7], [3e3, 7e3]],
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


def largest(method):
    """The weight of normalized gradients that cancel out: with a ridge ε of 1e-12, its root.

    ε y = ‖ĝ‖^(1/α − 1) y^(−1/α) of FairGrad is another power of it; norms are up to 1e4 apart.
    """
    return 1e14 ** (method.alpha / (method.alpha + 1.0)) if isinstance(method, FairGrad) else 1e6


@every_method
@pytest.mark.parametrize("case", DEFINED)
def test_weights_are_finite(method, case):
    state = fresh_state(method, len(DEFINED[case]), (), CPU)
    for scale in (1.0, 1.0, 1e-12, 1e12):
        J = scale * float64(DEFINED[case])
        decision = resolve(method, J @ J.mT, state)
        assert bool(decision.finite)
        assert decision.weights.isfinite().all()
        assert decision.weights.dtype == torch.float64
        # Dependent gradients have a bound when normalized; Nash has it for each task, and K of
        # them.
        n = J.norm(dim=-1)
        assert (decision.weights * n).abs().amax() <= 4.0 * largest(method) * n.amax()
    assert all(value.isfinite().all() for value in state.values())


@every_method
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 12])
def test_weights_are_finite_where_float32_leaves_the_gramian_indefinite(method, tasks):
    """A Gramian is a sum of float32 products: what should be 0 is 1e-7 of either sign."""
    generator = torch.Generator().manual_seed(tasks)
    for rank in (1, 2, 4):
        J = torch.randn(20, tasks, rank, generator=generator)
        w = weights(method, (J @ J.mT).double())
        assert w.isfinite().all()
        n = J.double().norm(dim=-1)
        assert ((w * n).abs() <= 100.0 * largest(method) * n.amax(-1, keepdim=True)).all()


@every_method
def test_weights_are_finite_with_norms_far_apart(method):
    for seed in range(10):
        S = gramian(norms_apart(gradients("conflicting", 6, seed), 9.0, seed))
        assert weights(method, S).isfinite().all()


@pytest.mark.parametrize(
    ("method", "total"),
    [
        (Sum(), 3.0),
        (UPGrad(), 1.0),
        (MGDA(), 1.0),
        (CAGrad(c=0.4), 1.4),
        (IMTLG(), 1.0),
        (ConFIG(), 3.0),
        (FairGrad(), 3.0),
        (NormBalancing(beta=0.0), 9.0),
        (ExcessMTL(), 3.0),
        (NashMTL(), 3.0),  # each has α² · 3 of S_kk, and 3 of it is the norm of S
        # √(λ / λ) of the one component.
        (AlignedMTL(), 1.0),
        (PCGrad(), 3.0),
        (GradVac(), 3.0),
        (GradNorm(), 3.0),
        (DWA(), 3.0),
        (FAMO(), 1.0),
        (STCH(), 3.0),  # of losses of 1
        (UncertaintyWeighting(), 1.5 * math.exp(0.5)),
        (GCond(), 3.0),
    ],
    ids=name_of,
)
def test_identical_tasks_have_equal_weights(method, total):
    S = float64([[5.0] * 3] * 3)
    w = weights(method, S)
    assert abs(float(w.sum()) - total) < 1e-9
    # CAGrad's correction may go to any of them; with a float64 S dependent gradients keep 1e-4.
    if not isinstance(method, CAGrad):
        assert (w - w.mean()).abs().amax() < 1e-4


def test_two_gradients_that_cancel_out():
    J = float64([[1.0, 2.0], [-3.0, -6.0]])
    S = J @ J.mT
    for method, expected in (
        (MGDA(), [0.75, 0.25]),
        (IMTLG(), [0.0, 0.0]),
        (ConFIG(), [0.0, 0.0]),
        (PCGrad(), [4.0, 4 / 3]),
        (GradVac(), [4.0, 4 / 3]),
        (UPGrad(), [2.0, 2 / 3]),
    ):
        assert torch.allclose(weights(method, S), float64(expected), rtol=1e-9, atol=1e-12)
    assert (weights(NashMTL(), S) @ J).norm() < 1e-3 * weights(NashMTL(), S)[0]


# ---- A task with a gradient of zero takes no part.


@every_method
@pytest.mark.parametrize("family", ["conflicting", "anti-parallel"])
def test_a_zero_gradient_takes_no_part(method, family):
    # Two others have one order.
    others = 2 if method in RANDOM else 4
    if isinstance(method, GCond):
        method = GCond(max_iterations=8)  # its own bound, 2 K, counts all tasks
    for seed, index in enumerate((0, 1, 2, 0, 1)):
        S = random_gramian(others, seed, family)
        kept = [k for k in range(others + 1) if k != index]
        padded = torch.zeros(others + 1, others + 1, dtype=torch.float64)
        padded[torch.tensor(kept)[:, None], torch.tensor(kept)] = S
        w, expected = weights(method, padded), weights(method, S)
        assert w[index] == 0.0
        # The same up to rounding, times the condition of the pair: 2e6.
        assert torch.allclose(
            w[kept], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().amax())
        )


@every_method
@pytest.mark.parametrize(("tasks", "index"), [(2, 0), (2, 1), (4, 2)])
def test_a_task_beside_zero_gradients_has_the_weight_of_one_task(method, tasks, index):
    S = torch.zeros(tasks, tasks, dtype=torch.float64)
    S[index, index] = 7.0
    w = weights(method, S)
    assert torch.allclose(w[index], weights(method, float64([[7.0]]))[0], rtol=1e-12)
    assert w.count_nonzero() == 1


# ---- What is not finite.


@every_method
def test_where_the_gramian_is_not_finite_nothing_changes(method):
    state = warm(method, 3)
    before = snapshot(state)
    for value in (math.nan, math.inf, -math.inf):
        for entry in ((0, 0), (2, 2), (0, 2)):
            S = random_gramian(3)
            S[entry] = S[entry[::-1]] = value
            decision = resolve(method, S, state, float64([1.0, 2.0, 3.0]))
            assert not bool(decision.finite)
            assert decision.weights.tolist() == [0.0] * 3
            assert is_unchanged(state, before)
    assert bool(resolve(method, random_gramian(3), state).finite)


@every_method
def test_of_a_batch_with_one_that_is_not_finite_nothing_changes(method):
    state = warm(method, 3, (4,))
    before = snapshot(state)
    S = torch.stack([random_gramian(3, seed) for seed in range(4)])
    S[2, 1, 1] = math.nan
    decision = resolve(method, S, state)
    assert not bool(decision.finite.any())
    assert decision.weights.abs().sum() == 0.0
    assert is_unchanged(state, before)


def test_graddrop_has_no_weights():
    S = random_gramian(3)
    with pytest.raises(TypeError, match="it has no weights"):
        GradDrop()(S)
    with pytest.raises(TypeError, match="it has no weights"):
        GradDrop().weights(S, GradDrop().new_state(3, CPU), None)


# ---- Batches, scales, names.


@every_method
def test_a_batch_has_the_weights_of_its_gramians(method):
    tasks = 2 if method in RANDOM else 4  # the orders of two are all the same
    S = torch.stack([random_gramian(tasks, seed) for seed in range(6)])
    if method not in OF_ALL_TENSORS:
        S[0, 1, :] = S[0, :, 1] = 0.0
    one_by_one = torch.stack([weights(method, S[b]) for b in range(6)])
    for shape in ((6,), (2, 3), (1, 2, 3)):
        at_once = weights(method, S.view(*shape, tasks, tasks))
        assert at_once.shape == (*shape, tasks)
        # Batched products and solves may round differently.
        assert torch.allclose(at_once.view(6, tasks), one_by_one, rtol=1e-9, atol=1e-12)
    assert torch.allclose(weights(method, S[:1]), one_by_one[:1], rtol=1e-9, atol=1e-12)


@every_method
def test_a_batch_has_the_states_of_its_gramians(method):
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
    # 3 and 10 are no powers of two: S is rounded differently.
    assert torch.allclose(weights(method, by**2 * S), weights(method, S), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [Sum(), *SOLVED, MUTUAL], ids=name_of)
@given(seed=SEEDS, order=st.permutations(range(5)))
@settings(max_examples=20)
def test_tasks_in_another_order_have_the_same_weights(method, seed, order):
    S = random_gramian(5, seed)
    moved = S[order][:, order]
    assert torch.allclose(weights(method, moved), weights(method, S)[order], rtol=1e-7, atol=1e-9)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_have_the_type_of_the_gramian_which_is_not_changed(method, dtype):
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
    of_float32 = resolve(method, S, {}, rounding=FLOAT32_ROUNDING).weights
    assert torch.allclose(of_float32, root * float64([1024.0, 1024.0]), rtol=1e-2)


# ---- Two tasks: PCGrad is GCond with mutual projection.


@given(
    seed=SEEDS,
    cosine=st.one_of(st.floats(-1.0, 1.0), st.sampled_from([-1.0, -1.0 + 1e-7, -1e-5, 0.0, 1.0])),
    decades=st.floats(-6.0, 6.0),
)
@settings(max_examples=50)
def test_two_tasks_have_the_weights_of_gcond_with_mutual_projection(seed, cosine, decades):
    norm = 10.0**decades
    S = float64([[1.0, cosine * norm], [cosine * norm, norm**2]])
    ours, theirs = PCGrad(seed=seed)(S), MUTUAL(S)
    # A cosine of -1e-6 or more is no conflict for GCond; PCGrad projects by that much.
    apart = 1e-6 * max(norm, 1.0 / norm) if -1e-6 <= cosine < 0.0 else 0.0
    assert ((ours - theirs).abs() <= apart + 1e-12 * theirs.abs()).all()


# ---- Nothing synchronizes with the device.


@pytest.fixture(params=["", "jacobi"])
def eigenvalues(request, monkeypatch):
    """Eigenvalues by torch's own routine, as on a CPU, and as on a GPU, where that synchronizes."""
    if request.param == "jacobi":
        for module in (solvers, aligned_mtl, imtl_g):
            monkeypatch.setattr(module, "eigh", solvers.jacobi)


# GCond on a CPU has the backend in Python, which resolves on the host.
on_the_device = pytest.mark.parametrize(
    "method", [method for method in METHODS if not isinstance(method, GCond)], ids=name_of
)


@on_the_device
@pytest.mark.parametrize("batch", [(), (5,)])
@pytest.mark.usefixtures("eigenvalues")
def test_no_value_is_read_by_the_host(method, batch, monkeypatch):
    late_flags(monkeypatch)
    no_reads(monkeypatch)
    S = random_gramian(4).expand(*batch, 4, 4).contiguous()
    state = fresh_state(method, 4, batch, CPU)
    resolve(method, S, state)
    with HostReads() as reads, Uploads() as uploads:
        resolve(method, S, state)
    assert reads.found == []
    assert uploads.found == []


def test_reads_by_the_host_are_found():
    with HostReads() as reads:
        resolve(UPGrad(), random_gramian(2), {})
    assert reads.found
    with Uploads() as uploads:
        torch.tensor([1.0])
    assert uploads.found == ["tensor"]


@pytest.mark.parametrize("method", SOLVED, ids=name_of)
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_weights_are_the_same_with_the_eigenvalues_of_a_gpu(monkeypatch, method, tasks):
    # Of float32 gradients: eigenvalues of 1e-12 have 1e-4 of rounding.
    S = torch.stack([random_gramian(tasks, seed) for seed in range(10)]).float()
    S[0] = 0.0
    if tasks > 1:
        S[1, 1, :] = S[1, :, 1] = 0.0
        J = torch.randn(tasks, 1, generator=torch.Generator().manual_seed(tasks))
        S[2] = J @ J.mT
    w = weights(method, S)
    no_reads(monkeypatch)
    for module in (solvers, aligned_mtl, imtl_g):
        monkeypatch.setattr(module, "eigh", solvers.jacobi)
    assert torch.allclose(weights(method, S), w, rtol=1e-5, atol=1e-6)


@on_the_device
@pytest.mark.parametrize("tasks", [1, slow(2), 5])
@pytest.mark.usefixtures("eigenvalues")
def test_shapes_alone_are_enough(method, tasks):
    """On the device "meta" there are no values: reading one raises."""
    meta = torch.device("meta")
    S = torch.empty(3, tasks, tasks, dtype=torch.float64, device=meta)
    state = fresh_state(method, tasks, (3,), meta)
    decision = resolve(method, S, state)
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
        *((FairGrad, "alpha", value) for value in (0.0, 0.05, 11.0, math.nan, "2", None, True)),
        *((NormBalancing, "beta", value) for value in (-0.1, 1.5, None)),
        *((ExcessMTL, "step_size", value) for value in (-0.1, math.inf, None)),
        *((GradNorm, "alpha", value) for value in (-1.0, math.inf, math.nan, None)),
        *((GradNorm, "lr", value) for value in (-1e-3, math.inf, "1e-3")),
        *((DWA, "temperature", value) for value in (0.0, math.inf, "2")),
        *((DWA, "steps_per_epoch", value) for value in (0, 1.5, True)),
        *((FAMO, "lr", value) for value in (-1e-3, None)),
        *((FAMO, "gamma", value) for value in (-1e-3, math.nan)),
        *((STCH, "mu", value) for value in (0.0, True)),
        (STCH, "warmup_steps", 0),
        (UncertaintyWeighting, "lr", -1.0),
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
        (FairGrad, {"alpha": 10}),
        (FairGrad, {"alpha": 0.1}),
        (NormBalancing, {"beta": 1}),
        (ExcessMTL, {"step_size": 0}),
        (GradDrop, {"leak": 1, "seed": 2**63 - 1}),
        (GradNorm, {"alpha": 0, "lr": 0.0, "parameters": ["trunk.last"]}),
        (PCGrad, {"seed": -(2**63)}),
    ],
)
def test_options_at_the_ends_of_their_range(method, options):
    made = method(**options)
    if method is GradDrop:
        return  # without weights
    assert weights(made, random_gramian(3)).isfinite().all()
    if method is GradNorm:
        assert made.parameters == ("trunk.last",)
