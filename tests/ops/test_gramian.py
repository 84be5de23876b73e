"""gramian: inner products from flat storage, against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels import ops
from gcond_kernels.ops import checks as contracts
from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.python import _gramian, chunks
from tests.conftest import slow
from tests.helpers import by_name
from tests.helpers.flat import filled, layout_of, misaligned, packed_layout_of, random_mask
from tests.helpers.sizes import SIZE_LISTS, SIZES_AT_BOUNDARIES

# A float32 partial sum of n terms in c parallel chains errs by at most (n / c) · 2^-24 · Σ|a·b|;
# a BLAS has c ≥ 64 for the n = 4096 of a partial sum: 64 roundings, 3.8e-6.
PARTIAL_SUM_ERROR = 4e-6


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double().T


def check(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    assert got.dtype == torch.float64
    assert ((got - exact(a, b)).abs() <= PARTIAL_SUM_ERROR * exact(a.abs(), b.abs())).all()


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
    momentum = filled(layout, 1, seed + 2)[0] if with_momentum else None
    scale = torch.rand(tasks, dtype=torch.float64) + 0.1
    history_scale = torch.rand(tasks, dtype=torch.float64)
    total, cross, per_tensor, crosses = by_name.gramian(
        accumulators,
        layout,
        scale=scale,
        history=history,
        history_scale=history_scale,
        momentum=momentum,
        backend=backend,
    )
    g = accumulators.double() * scale[:, None]
    left = g if momentum is None else torch.cat([g, momentum.double()[None]])
    assert per_tensor.shape == (len(sizes), len(left), len(left))
    check(total, g, g)
    past = None if history is None else history.double() * history_scale[:, None]
    for t, (offset, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        inside = slice(offset, offset + size)
        check(per_tensor[t], left[:, inside], left[:, inside])
        if past is not None:
            check(crosses[t], g[:, inside], past[:, inside])
    if past is None:
        assert cross is crosses is None
    else:
        assert crosses.shape == (len(sizes), tasks, tasks)
        check(cross, g, past)


def test_segments_longer_than_a_chunk(backend, monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_ELEMENTS", 1 << 15)
    layout = layout_of([70_001, 5, 0, 16_384])
    accumulators, history = filled(layout, 3, 0), filled(layout, 3, 1, torch.bfloat16)
    ones = torch.ones(3, dtype=torch.float64)
    total, cross, _per_tensor, _ = by_name.gramian(
        accumulators, layout, scale=ones, history=history, history_scale=ones, backend=backend
    )
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
    _total, cross, per_tensor, crosses = by_name.gramian(
        accumulators,
        layout,
        scale=scale,
        history=history,
        history_scale=history_scale,
        backend=backend,
    )
    assert (crosses[:, 1] == 0).all()
    assert (crosses[:, :, 2] == 0).all()
    assert (per_tensor[:, 1] == 0).all()
    assert (per_tensor[:, :, 1] == 0).all()
    assert (cross[1] == 0).all()
    assert (cross[:, 2] == 0).all()
    kept = [0, 2]
    check(per_tensor.sum(0)[kept][:, kept], accumulators[kept], accumulators[kept])
    check(cross[kept][:, :1], accumulators[kept], history[:1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4500, 8999])
def test_what_is_not_finite_shows_on_the_diagonal(backend, bad, place):
    layout = layout_of([3, 9000])
    accumulators = filled(layout, 2, 0)
    accumulators[1, layout.offsets[1] + place] = bad
    per_tensor = by_name.gramian(
        accumulators, layout, scale=torch.ones(2, dtype=torch.float64), backend=backend
    ).per_tensor
    assert per_tensor[0].isfinite().all()
    assert per_tensor[1, 0, 0].isfinite()
    assert not per_tensor[1, 1, 1].isfinite()


def test_across_partial_sums_the_addition_is_float64(backend):
    layout = layout_of([1_000_000])
    accumulators = torch.zeros(2, layout.length)
    accumulators[:, 0] = 4096.0
    accumulators[:, 999_999] = 1.0
    ones = torch.ones(2, dtype=torch.float64)
    _total, *products = by_name.gramian(
        accumulators,
        layout,
        scale=ones,
        history=accumulators.bfloat16(),
        history_scale=ones,
        backend=backend,
    )
    for sums in products:  # 2^24 + 1 is no float32
        assert (sums == 2**24 + 1).all()


def test_same_input_same_bits(backend):
    layout = layout_of([20_000, 33])
    accumulators = filled(layout, 4, 0)
    scale = torch.ones(4, dtype=torch.float64)
    runs = [
        by_name.gramian(accumulators.clone(), layout, scale=scale, backend=backend).per_tensor
        for _ in range(10)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_what_does_not_fit_is_refused(backend):
    layout = layout_of([5])
    accumulators = filled(layout, 2, 0)
    ones = torch.ones(2, dtype=torch.float64)

    def call(**options):
        options = {"scale": ones, "backend": backend} | options
        by_name.gramian(accumulators, layout, **options)

    with pytest.raises(ValueError, match=r"scale must be \[2\] float64"):
        call(scale=torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="history must be"):
        call(history=accumulators[:1], history_scale=ones)
    with pytest.raises(ValueError, match="needs its history_scale"):
        call(history=accumulators)
    with pytest.raises(ValueError, match="momentum has 3 elements"):
        call(momentum=torch.zeros(3))
    with pytest.raises(ValueError, match=r"mask must be \[1\] int32"):
        call(mask=torch.zeros(2, dtype=torch.int32))


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
    with pytest.raises(ValueError, match=r"tensors\[0\] must be of torch.float32"):
        ops.multi_tensor_norm([torch.ones(3, dtype=torch.int64)], backend=backend)


def test_three_hundred_tiny_tensors_and_an_empty_last_one(backend):
    layout = layout_of([3] * 299 + [0])
    accumulators = filled(layout, 1, 0)
    one = torch.ones(1, dtype=torch.float64)
    total, _, per_tensor, _ = by_name.gramian(accumulators, layout, scale=one, backend=backend)
    check(total, accumulators, accumulators)
    for t, part in enumerate(layout.split(accumulators[0])):
        check(per_tensor[t], part[None], part[None])


@pytest.mark.sanitize
@pytest.mark.parametrize("tasks", [6, 7, 8, 9, 12])
@pytest.mark.parametrize("with_momentum", [False, True])
def test_many_tasks(backend, tasks, with_momentum):
    layout = layout_of([4100, 1, 513])
    accumulators, history = filled(layout, tasks, 0), filled(layout, tasks, 1, torch.bfloat16)
    momentum = filled(layout, 1, 2)[0] if with_momentum else None
    ones = torch.ones(tasks, dtype=torch.float64)
    total, cross, per_tensor, crosses = by_name.gramian(
        accumulators,
        layout,
        scale=ones,
        history=history,
        history_scale=ones,
        momentum=momentum,
        backend=backend,
    )
    left = accumulators if momentum is None else torch.cat([accumulators, momentum[None]])
    check(total, accumulators, accumulators)
    check(cross, accumulators, history)
    check(per_tensor.sum(0), left, left)
    torch.testing.assert_close(crosses.sum(0), cross, rtol=1e-12, atol=1e-12)
    for t, (offset, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        inside = slice(offset, offset + size)
        check(crosses[t], accumulators[:, inside], history[:, inside])


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
    accumulators, scale = filled(layout, 2, 0), torch.ones(2, dtype=torch.float64)
    words = torch.zeros(layout.length // 32, dtype=torch.int32)
    given = (accumulators, layout)
    options = {"scale": scale, "history": accumulators, "history_scale": scale, "backend": backend}
    plain = by_name.gramian(*given, **options)
    for got, expected in zip(by_name.gramian(*given, **options, mask=~words), plain, strict=True):
        assert torch.equal(got, expected)
    accumulators[:] = math.nan
    assert all((sums == 0.0).all() for sums in by_name.gramian(*given, **options, mask=words))


@pytest.mark.parametrize("allowed", ["high", "medium", "tf32", "bf16"])
def test_reduced_precision_that_the_user_allows_is_not_used(allowed):
    matmul, on_cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        if allowed in ("high", "medium"):
            torch.set_float32_matmul_precision(allowed)
        elif allowed == "tf32":
            matmul.fp32_precision = "tf32"
        else:
            on_cpu.fp32_precision = "bf16"
        before = matmul.fp32_precision, on_cpu.fp32_precision
        with full_float32():
            assert not {matmul.fp32_precision, on_cpu.fp32_precision} & {"tf32", "bf16"}
            torch.get_float32_matmul_precision()  # raises where the two interfaces disagree
        assert (matmul.fp32_precision, on_cpu.fp32_precision) == before
        if allowed in ("high", "medium"):
            assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = on_cpu.fp32_precision = "none"


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
    ones = torch.ones(2, dtype=torch.float64)
    products = by_name.gramian(accumulators, layout, scale=ones, backend=backend).per_tensor
    for t, (offset, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        part = accumulators[:, offset : offset + size]
        check(products[t], part, part)


def test_products_are_symmetric_to_the_bit(backend):
    """Else what is left of a full projection is a cosine of some 1e-5: another conflict."""
    layout = layout_of([4096 * 3 + 7, 33, 5])
    for seed in range(20):
        accumulators = filled(layout, 3, seed)
        total, _, per_tensor, _ = by_name.gramian(
            accumulators,
            layout,
            scale=torch.rand(3).double(),
            momentum=filled(layout, 1, seed + 100)[0],
            backend=backend,
        )
        assert torch.equal(total, total.T)
        assert torch.equal(per_tensor, per_tensor.transpose(1, 2))


def test_a_users_default_type_changes_nothing(backend):
    layout = layout_of([5000, 33])
    results = []
    for default in (torch.float32, torch.bfloat16, torch.float64):
        accumulators, history = filled(layout, 2, 0), filled(layout, 2, 1)
        scale = torch.tensor([0.5, 0.25], dtype=torch.float64)
        torch.set_default_dtype(default)
        try:
            results.append(
                by_name.gramian(
                    accumulators,
                    layout,
                    scale=scale,
                    history=history,
                    history_scale=scale,
                    backend=backend,
                )
            )
        finally:
            torch.set_default_dtype(torch.float32)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("least", [1, 4096, 1 << 18])
def test_the_reference_may_read_large_tensors_in_place(least, monkeypatch):
    monkeypatch.setattr(_gramian, "IN_PLACE", least)
    layout = layout_of([10_000, 3, 4096, 0, 5000])
    accumulators = filled(layout, 3, 0)
    products = by_name.gramian(accumulators, layout, scale=torch.ones(3).double(), backend="python")
    places = zip(layout.offsets, layout.sizes, strict=True)
    parts = [accumulators[:, first : first + size].double() for first, size in places]
    exact = torch.stack([part @ part.T for part in parts])
    torch.testing.assert_close(products.per_tensor, exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(products.total, exact.sum(0), rtol=1e-5, atol=1e-3)
