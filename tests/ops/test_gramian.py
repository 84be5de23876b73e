"""gramian: inner products from flat storage, against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels import ops
from gcond_kernels.ops import checks as contracts
from gcond_kernels.python import chunks
from tests.conftest import slow
from tests.helpers import by_name
from tests.helpers.flat import UNITS, filled, layout_of, misaligned, packed_layout_of, random_mask
from tests.helpers.sizes import SIZE_LISTS, SIZES_AT_BOUNDARIES

# A float32 partial sum of n terms in c parallel chains errs by at most (n / c) · 2^-24 · Σ|a·b|;
# a BLAS has c ≥ 64 for the n = 4096 of a partial sum: 64 roundings, 3.8e-6.
PARTIAL_SUM_ERROR = 4e-6


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double().T


def gramian(backend, accumulators, layout, **options):
    """Return the Gramians; where not given, scales are 1."""
    ones = torch.ones(len(accumulators), dtype=torch.float64)
    given = {"scale": ones, "history_scale": ones} | options
    return by_name.gramian(accumulators, layout, **given, backend=backend)


def parts_of(layout, *storage):
    """Return the tensors' segments of each flat storage [K, N']; of None those are None."""
    for offset, size in zip(layout.offsets, layout.sizes, strict=True):
        yield [None if each is None else each[:, offset : offset + size] for each in storage]


def check(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype=torch.float32) -> None:
    assert got.dtype == torch.float64
    error = PARTIAL_SUM_ERROR * UNITS[dtype] / UNITS[torch.float32]
    assert ((got - exact(a, b)).abs() <= error * exact(a.abs(), b.abs())).all()


@given(
    SIZE_LISTS,
    st.integers(1, 5),
    st.sampled_from(contracts.ACCUMULATOR_DTYPES),
    st.sampled_from([None, torch.bfloat16, torch.float32]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_against_float64(backend, sizes, tasks, dtype, history_dtype, with_momentum, seed):
    layout = layout_of(sizes)
    accumulators = filled(layout, tasks, seed, dtype)
    history = None if history_dtype is None else filled(layout, tasks, seed + 1, history_dtype)
    momentum = filled(layout, 1, seed + 2, contracts.momentum_dtype(dtype))[0]
    momentum = momentum if with_momentum else None
    scale = torch.rand(tasks, dtype=torch.float64) + 0.1
    history_scale = torch.rand(tasks, dtype=torch.float64)
    total, cross, per_tensor, crosses = gramian(
        backend,
        accumulators,
        layout,
        scale=scale,
        history=history,
        history_scale=history_scale,
        momentum=momentum,
    )
    g = accumulators.double() * scale[:, None]
    left = g if momentum is None else torch.cat([g, momentum.double()[None]])
    assert per_tensor.shape == (len(sizes), len(left), len(left))
    check(total, g, g, dtype)
    past = None if history is None else history.double() * history_scale[:, None]
    for t, (own, tasks_own, past_own) in enumerate(parts_of(layout, left, g, past)):
        check(per_tensor[t], own, own, dtype)
        if past is not None:
            check(crosses[t], tasks_own, past_own, dtype)
    if past is None:
        assert cross is crosses is None
    else:
        assert crosses.shape == (len(sizes), tasks, tasks)
        check(cross, g, past, dtype)


def test_segments_longer_than_a_chunk(backend, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 1 << 13)
    layout = layout_of([70_001, 5, 0, 16_384])
    accumulators, history = filled(layout, 3, 0), filled(layout, 3, 1, torch.bfloat16)
    total, cross, _, _ = gramian(backend, accumulators, layout, history=history)
    check(total, accumulators, accumulators)
    check(cross, accumulators, history)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_a_task_that_takes_no_part_is_zero_whatever_it_holds(backend, garbage):
    layout = layout_of([100, 7])
    accumulators, history = filled(layout, 3, 0), filled(layout, 3, 1)
    accumulators[1] = garbage
    scale = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    history_scale = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    history[2] = garbage
    _total, cross, per_tensor, crosses = gramian(
        backend, accumulators, layout, scale=scale, history=history, history_scale=history_scale
    )
    for zeros in (crosses[:, 1], crosses[:, :, 2], cross[1], cross[:, 2]):
        assert (zeros == 0).all()
    assert (per_tensor[:, 1] == 0).all()
    assert (per_tensor[:, :, 1] == 0).all()
    kept = [0, 2]
    check(per_tensor.sum(0)[kept][:, kept], accumulators[kept], accumulators[kept])
    check(cross[kept][:, :1], accumulators[kept], history[:1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4500, 8999])
def test_what_is_not_finite_shows_on_the_diagonal(backend, bad, place):
    layout = layout_of([3, 9000])
    accumulators = filled(layout, 2, 0)
    accumulators[1, layout.offsets[1] + place] = bad
    per_tensor = gramian(backend, accumulators, layout).per_tensor
    assert per_tensor[0].isfinite().all()
    assert per_tensor[1, 0, 0].isfinite()
    assert not per_tensor[1, 1, 1].isfinite()


@pytest.mark.parametrize("place", [8191, 999_999])
def test_across_partial_sums_the_addition_is_float64(backend, place):
    layout = layout_of([1_000_000])
    accumulators = torch.zeros(2, layout.length)
    accumulators[:, 0] = 4096.0
    accumulators[:, place] = 1.0
    _total, *products = gramian(backend, accumulators, layout, history=accumulators.bfloat16())
    for sums in products:  # 2^24 + 1 is no float32
        assert (sums == 2**24 + 1).all()


def test_same_input_same_bits(backend):
    layout = layout_of([20_000, 33])
    accumulators = filled(layout, 4, 0)
    runs = [gramian(backend, accumulators.clone(), layout).per_tensor for _ in range(10)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": torch.ones(3, dtype=torch.float64)}, r"scale must be \[2\] float64"),
        ({"history": torch.zeros(1, 32)}, "history must be"),
        ({"history": torch.zeros(2, 32), "history_scale": None}, "needs its history_scale"),
        ({"momentum": torch.zeros(3)}, "momentum has 3 elements"),
        ({"mask": torch.zeros(2, dtype=torch.int32)}, r"mask must be \[1\] int32"),
    ],
)
def test_what_does_not_fit_is_refused(backend, options, words):
    layout = layout_of([5])
    with pytest.raises(ValueError, match=words):
        gramian(backend, filled(layout, 2, 0), layout, **options)


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 2, 32)])
def test_accumulators_of_another_rank_are_refused(backend, shape):
    words = r"accumulators must be \[K, N'\] of at least one task, not \["
    with pytest.raises(ValueError, match=words):
        gramian(backend, torch.zeros(shape), layout_of([5]))
    words = r"accumulator must be \[N'\], not \["
    with pytest.raises(ValueError, match=words):
        ops.accumulate(torch.zeros(2, 32), [torch.ones(5)], layout_of([5]), backend=backend)


@given(
    st.lists(st.sampled_from([(), (0,), (1,), (3, 5), (2, 3, 4, 4), (9000,)]), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**31),
)
def test_norm_and_cosine_of_tensor_lists(backend, shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    b = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if seed % 2:
        a = [misaligned(t.reshape(-1)).reshape(t.shape) for t in a]
        b = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in b]
    flat_a, flat_b = (
        torch.cat([t.double().reshape(-1) for t in ts] or [torch.zeros(0).double()])
        for ts in (a, b)
    )
    norm = ops.multi_tensor_norm(a, backend=backend)
    assert norm.item() == pytest.approx(flat_a.norm().item(), rel=PARTIAL_SUM_ERROR)
    each = ops.multi_tensor_norm(a, per_tensor=True, backend=backend)
    assert each.tolist() == pytest.approx(
        [t.double().norm().item() for t in a], rel=PARTIAL_SUM_ERROR
    )
    cosine = ops.multi_tensor_cosine_similarity(a, b, backend=backend)
    product = flat_a.norm() * flat_b.norm()
    exact_cosine = (flat_a @ flat_b / product).item() if product > 0 else 0.0
    assert cosine.item() == pytest.approx(exact_cosine, abs=PARTIAL_SUM_ERROR)


def test_lists_that_do_not_match_are_refused(backend):
    with pytest.raises(ValueError, match="same shapes"):
        ops.multi_tensor_cosine_similarity([torch.ones(3)], [torch.ones(4)], backend=backend)
    with pytest.raises(ValueError, match=r"tensors\[0\] must be float32 or"):
        ops.multi_tensor_norm([torch.ones(3, dtype=torch.int64)], backend=backend)


def test_three_hundred_tiny_tensors_and_an_empty_last_one(backend):
    layout = layout_of([3] * 299 + [0])
    accumulators = filled(layout, 1, 0)
    total, _, per_tensor, _ = gramian(backend, accumulators, layout)
    check(total, accumulators, accumulators)
    for t, (part,) in enumerate(parts_of(layout, accumulators)):
        check(per_tensor[t], part, part)


@pytest.mark.sanitize
@pytest.mark.parametrize("tasks", [6, 7, 8, 9, 12])
@pytest.mark.parametrize("with_momentum", [False, True])
def test_many_tasks(backend, tasks, with_momentum):
    layout = layout_of([4100, 1, 513])
    accumulators, history = filled(layout, tasks, 0), filled(layout, tasks, 1, torch.bfloat16)
    momentum = filled(layout, 1, 2)[0] if with_momentum else None
    total, cross, per_tensor, crosses = gramian(
        backend, accumulators, layout, history=history, momentum=momentum
    )
    left = accumulators if momentum is None else torch.cat([accumulators, momentum[None]])
    check(total, accumulators, accumulators)
    check(cross, accumulators, history)
    check(per_tensor.sum(0), left, left)
    torch.testing.assert_close(crosses.sum(0), cross, rtol=1e-12, atol=1e-12)
    for t, (part, past) in enumerate(parts_of(layout, accumulators, history)):
        check(crosses[t], part, past)


MASKED_SIZES = [4101, 1, 0, 513, 64]


def masked_storage(tasks: int, dtype, history_dtype, packed: bool):
    """Return accumulators, history, momentum and their mask, in segments with or without gaps."""
    layout = packed_layout_of(MASKED_SIZES) if packed else layout_of(MASKED_SIZES)
    trained, mask = random_mask(layout.length, 0)
    given = {
        "accumulators": filled(layout, tasks, 1, dtype),
        "history": None if history_dtype is None else filled(layout, tasks, 2, history_dtype),
        "momentum": filled(layout, 1, 3)[0],
    }
    return layout, trained, mask, given


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("tasks", "packed", "dtype", "history_dtype"),
    [
        *(
            (tasks, packed, *dtypes)
            for tasks in (1, 2, 3, 9)
            for packed in (False, True)
            for dtypes in (
                (torch.float32, None),
                (torch.float32, torch.bfloat16),
                (torch.bfloat16, torch.float16),
                (torch.bfloat16, torch.float32),
            )
        ),
        # The most that are unrolled: interpreted, each takes seconds.
        slow(8, False, torch.float32, torch.bfloat16),
        slow(8, True, torch.bfloat16, torch.float32),
    ],
)
def test_what_a_mask_leaves_out_counts_as_zero(backend, tasks, packed, dtype, history_dtype):
    layout, trained, mask, given = masked_storage(tasks, dtype, history_dtype, packed)
    options = {"scale": torch.linspace(0.5, 1.0, tasks).double(), "backend": backend}
    if history_dtype is not None:
        options["history_scale"] = torch.linspace(1.0, 0.5, tasks).double()

    def products(garbage, **more):
        values = {
            name: None if value is None else value.masked_fill(~trained, garbage)
            for name, value in given.items()
        }
        first = values.pop("accumulators")
        return by_name.gramian(first, layout, **values, **options, **more)

    expected = products(0.0)
    for garbage in (1.0, math.nan, math.inf):
        for got, zeros in zip(products(garbage, mask=mask), expected, strict=True):
            assert (got is zeros is None) or torch.equal(got, zeros)


def test_a_mask_of_nothing_and_one_of_all(backend):
    layout = layout_of([5000, 3])
    accumulators = filled(layout, 2, 0)
    words = torch.zeros(layout.length // 32, dtype=torch.int32)

    def products(**options):
        return gramian(backend, accumulators, layout, history=accumulators, **options)

    assert all(torch.equal(*pair) for pair in zip(products(mask=~words), products(), strict=True))
    accumulators[:] = math.nan
    assert all((sums == 0.0).all() for sums in products(mask=words))


@pytest.mark.sanitize
def test_lists_in_different_memory_orders(backend):
    a = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    b = torch.randn(2, 3, 4, 5)
    got = ops.multi_tensor_cosine_similarity([a], [b], backend=backend)
    expected = torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
    assert got.item() == pytest.approx(expected.item(), abs=PARTIAL_SUM_ERROR)


@pytest.mark.sanitize
def test_sizes_at_the_ends_of_vectors_tiles_and_chunks(backend):
    layout = layout_of(SIZES_AT_BOUNDARIES)
    accumulators = filled(layout, 2, 0)
    accumulators[:, ~layout.mask()] = math.nan  # what lies between the segments is not read
    products = gramian(backend, accumulators, layout).per_tensor
    for t, (part,) in enumerate(parts_of(layout, accumulators)):
        check(products[t], part, part)


def test_products_are_symmetric_to_the_bit(backend):
    """Else what is left of a full projection is a cosine of some 1e-5: another conflict."""
    layout = layout_of([4096 * 3 + 7, 33, 5])
    for seed in range(20):
        accumulators = filled(layout, 3, seed)
        scale, momentum = torch.rand(3).double(), filled(layout, 1, seed + 100)[0]
        total, _, per_tensor, _ = gramian(
            backend, accumulators, layout, scale=scale, momentum=momentum
        )
        assert torch.equal(total, total.T)
        assert torch.equal(per_tensor, per_tensor.transpose(1, 2))
