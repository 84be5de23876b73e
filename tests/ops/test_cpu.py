"""The backend in C++ for CPUs: its variants for processors, its conversions, its threads."""

import math

import pytest
import torch

from gcond_kernels import GCond, ops
from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.types import Gramians
from tests.helpers.flat import random_mask, unwritten

CPU = torch.device("cpu")
_cpu = pytest.importorskip("gcond_kernels._cpu", reason="backend 'cpu' is not built")
VARIANTS = _cpu.kernels_here()
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Each variant of the kernels that runs on this processor."""
    before = _cpu.kernels_in_use()
    _cpu.use_kernels(request.param)
    yield request.param
    _cpu.use_kernels(before)


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_variant(name, run):
    before = _cpu.kernels_in_use()
    _cpu.use_kernels(name)
    try:
        return run()
    finally:
        _cpu.use_kernels(before)


def case(tasks, sizes, *, gap=3, masked=False, history=torch.bfloat16, dtype=torch.float32):
    """Task gradients whose segments begin anywhere; what lies between them is NaN."""
    torch.manual_seed(tasks + sum(sizes))
    offsets, end = [], gap
    for size in sizes:
        offsets.append(end)
        end += size + gap
    length = -(-end // 32) * 32
    layout = ops.Layout.of(offsets, sizes)
    accumulators = unwritten(tasks, length, dtype=dtype)
    before = unwritten(tasks, length, dtype=history)
    for offset, size in zip(offsets, sizes, strict=True):
        accumulators[:, offset : offset + size] = torch.randn(tasks, size)
        before[:, offset : offset + size] = torch.randn(tasks, size)
    mask = random_mask(length, tasks)[1] if masked else None
    scale = torch.rand(tasks, dtype=torch.float64) + 0.5
    return ops.TaskGradients(accumulators, layout, scale, before, mask)


def resolve(gradients, backend, momentum=False, max_norm=None):
    """A resolution of a copy; all that it returned and wrote, in one list."""
    g = gradients._replace(
        accumulators=gradients.accumulators.clone(),
        history=gradients.history.clone(),
    )
    tasks, sizes = len(g.scale), g.layout.sizes
    state = ops.ArbitrationState(**ops_state(tasks))
    outputs = [unwritten(size) for size in sizes]
    kept = None
    if momentum:
        kept = ops.Momentum(
            torch.zeros_like(g.accumulators[0], dtype=torch.float32),
            torch.zeros(len(sizes), dtype=torch.int64),
            0.9,
        )
    found, decision = ops.resolve(
        g,
        outputs,
        state=state,
        settings=GCond(),
        momentum=kept,
        max_norm=max_norm,
        backend=backend,
    )
    history = [segment(g.history, g.layout)]
    buffer = [] if kept is None else [segment(kept.buffer[None], g.layout), kept.steps]
    return [*present(found), *decision, *outputs, *history, *buffer, *state]


def ops_state(tasks):
    state = GCond().new_state(tasks, CPU)
    state["history_scale"] = torch.ones(tasks, dtype=torch.float64)
    state["history_gramian"] = 10.0 * torch.eye(tasks, dtype=torch.float64)
    return state


def segments(rows, layout):
    return [rows[:, o : o + s] for o, s in zip(*layout, strict=True)]


def segment(rows, layout):
    return torch.cat(segments(rows, layout), dim=1)


def present(found: Gramians):
    return [tensor for tensor in found if tensor is not None]


def same_bits(left, right):
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(left, right, strict=True)
    )


SIZES = (1, 15, 16, 17, 31, 33, 0, 257, 511, 513, 16384, 16385, 40000)


@pytest.mark.parametrize(
    ("tasks", "dtype", "history"),
    [
        *((tasks, torch.float32, torch.bfloat16) for tasks in (1, 2, 3, 4, 5, 8, 9, 17)),
        *((3, torch.float32, history) for history in (torch.float32, torch.float16)),
        *((3, torch.bfloat16, history) for history in (torch.float32, *HALVES)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.usefixtures("variant")
def test_every_variant_finds_what_the_reference_finds(tasks, masked, dtype, history):
    g = case(tasks, SIZES, masked=masked, dtype=dtype, history=history)
    momentum = torch.randn(g.accumulators.shape[1])
    found = ops.gramian(g, history_scale=g.scale, momentum=momentum, backend="cpu")
    rows = [*(g.scale[:, None] * g.accumulators.double()), momentum.double()]
    rows += list(g.scale[:, None] * g.history.double())
    vectors = torch.stack(rows)
    if g.mask is not None:
        vectors[:, ~trainable(g.mask, 0, vectors.shape[1])] = 0.0
    exact = [v @ v.T for v in segments(vectors, g.layout)]
    # Float32 sums of at most 16,384 products, beside norms of some 1.5² · size.
    tolerance = {"rtol": 0.0, "atol": 5e-7 * 2.25 * sum(SIZES)}
    for tensor, products in enumerate(exact):
        S, X = products[: tasks + 1, : tasks + 1], products[:tasks, tasks + 1 :]
        torch.testing.assert_close(found.per_tensor[tensor], S, **tolerance)
        torch.testing.assert_close(found.cross_per_tensor[tensor], X, **tolerance)
    products = torch.stack(exact).sum(0)
    torch.testing.assert_close(found.total, products[:tasks, :tasks], **tolerance)
    torch.testing.assert_close(found.cross, products[:tasks, tasks + 1 :], **tolerance)
    torch.testing.assert_close(
        combined(g, "cpu"), combined(g, "python"), rtol=1e-6, atol=1e-6 * tasks
    )


def combined(gradients, backend):
    """What is written with weights of each tensor's own, as one list."""
    g = gradients._replace(history=gradients.history.clone())
    torch.manual_seed(1)
    weights = torch.randn(len(g.layout.sizes), len(g.scale), dtype=torch.float64)
    buffer = torch.ones(g.accumulators.shape[1])
    momentum = ops.Momentum(buffer, torch.zeros(len(g.layout.sizes), dtype=torch.int64), 0.9)
    outputs = [unwritten(size) for size in g.layout.sizes]
    ops.combine(
        g, outputs, weights=weights, finite=torch.tensor(True), momentum=momentum, backend=backend
    )
    history = segment(g.history, g.layout).float()
    return [*outputs, segment(buffer[None], g.layout), history, momentum.steps.float()]


def test_variants_with_fused_multiplication_give_the_same_bits():
    if not {"avx512", "avx2"} <= set(VARIANTS):
        pytest.skip(f"this processor runs {VARIANTS}, of which no two have fused multiplication")
    g = case(5, SIZES, masked=True)
    results = [
        with_variant(name, lambda: resolve(g, "cpu", momentum=True)) for name in ("avx512", "avx2")
    ]
    assert same_bits(*results)


@pytest.mark.parametrize("tasks", [2, 8])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads, tasks):
    g = case(tasks, (300_000, 7, 100_000, 1, 64) * 3)
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        results.append(resolve(g, "cpu", momentum=True, max_norm=1.0))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_accumulation_does_not_depend_on_the_number_of_threads(threads):
    gradients = [torch.randn(size) for size in (300_000, 7, 100_000)]
    layout = ops.Layout.of([0, 300_000, 300_007], [300_000, 7, 100_000])
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        results.append(torch.zeros(400_032))
        ops.accumulate(results[-1], gradients, layout, scale=0.5, backend="cpu")
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("variant")
def test_every_number_of_half_precision_is_read_exactly(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    accumulator = torch.full((len(numbers),), math.nan)
    layout = ops.Layout.of([0], [len(numbers)])
    ops.accumulate(accumulator, [numbers], layout, overwrite=True, backend="cpu")
    torch.testing.assert_close(accumulator, numbers.float(), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("variant")
def test_numbers_are_rounded_to_half_precision_as_torch_rounds(dtype):
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
    # Halfway between two numbers, and one bit beside it.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (numbers.view(torch.int32)[:-1] // 2 + numbers.view(torch.int32)[1:] // 2).view(
        torch.float32
    )
    beside = [(between.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1, 2)]
    extreme = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 65519.99, 65520.0, 3e38, 1e-45]
    )
    values = torch.cat([bits.view(torch.float32), *beside, numbers, extreme])
    # Infinity and NaN would be refused as gradients: the history takes what the accumulators hold.
    g = ops.TaskGradients(
        values[None],
        ops.Layout.of([0], [len(values)]),
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, len(values), dtype=dtype),
    )
    written = {"weights": torch.zeros(1, dtype=torch.float64), "finite": torch.tensor(True)}
    ops.combine(g, [None], **written, backend="cpu")
    torch.testing.assert_close(g.history[0], values.to(dtype), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.usefixtures("variant")
def test_nothing_is_written_beside_the_segments():
    g = case(3, (5, 20, 600), gap=7)
    outputs = [torch.full((size + 8,), 3.0)[4:-4] for size in g.layout.sizes]
    weights, finite = torch.ones(3, dtype=torch.float64), torch.tensor(True)
    ops.combine(g, outputs, weights=weights, finite=finite, backend="cpu")
    for output in outputs:
        around = output.as_strided((len(output) + 8,), (1,), output.storage_offset() - 4)
        assert around[:4].eq(3.0).all()
        assert around[-4:].eq(3.0).all()
    inside = torch.zeros(g.history.shape[1], dtype=torch.bool)
    for offset, size in zip(*g.layout, strict=True):
        inside[offset : offset + size] = True
    assert g.history[:, ~inside].isnan().all()
    assert not g.history[:, inside].isnan().any()


@pytest.mark.usefixtures("variant")
def test_a_large_history_is_written_past_the_caches_to_the_same_bits():
    sizes = (1_500_000, 999, 1_700_000)  # beyond the size from which it is
    g = case(2, sizes, gap=32)
    small = case(2, sizes, gap=32)
    ops.combine(g, [None] * 3, **written(2), backend="cpu")
    ops.combine(small, [None] * 3, **written(2), backend="python")
    assert torch.equal(segment(g.history, g.layout), segment(small.history, small.layout))


def written(tasks):
    return {"weights": torch.ones(tasks, dtype=torch.float64), "finite": torch.tensor(True)}


def test_unknown_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match="no kernels sse9"):
        _cpu.use_kernels("sse9")


def test_many_tasks_are_arbitrated():
    torch.manual_seed(0)
    J = torch.randn(70, 40, dtype=torch.float64)
    S = J @ J.T
    found = {
        backend: ops.arbitrate(
            S,
            None,
            torch.ones(70, dtype=torch.float64),
            state=ops.ArbitrationState(**ops_state(70)),
            settings=GCond(),
            backend=backend,
        )
        for backend in ("cpu", "python")
    }
    torch.testing.assert_close(found["cpu"].weights, found["python"].weights, rtol=1e-9, atol=1e-9)
