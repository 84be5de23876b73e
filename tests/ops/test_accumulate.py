"""accumulate: sums of gradients in flat storage, against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels.ops import checks as contracts
from tests.helpers import by_name
from tests.helpers.flat import DTYPES, filled, layout_of, misaligned, unwritten
from tests.helpers.sizes import SIZE_LISTS, SIZES_AT_BOUNDARIES

# One rounding of the scaled gradient and one of the sum.
ULPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-52}


@st.composite
def gradient_lists(draw, layout, seed):
    gradients = []
    for t, size in enumerate(layout.sizes):
        if draw(st.integers(0, 4)) == 0:
            gradients.append(None)
            continue
        generator = torch.Generator().manual_seed(seed + t)
        dtype = draw(st.sampled_from(DTYPES))
        gradient = torch.randn(size, generator=generator).to(dtype)
        gradients.append(misaligned(gradient) if draw(st.booleans()) else gradient)
    return gradients


def write(backend, accumulator, gradients, layout, **options):
    by_name.accumulate(accumulator, gradients, layout, overwrite=True, backend=backend, **options)


@given(
    SIZE_LISTS,
    st.sampled_from(contracts.ACCUMULATOR_DTYPES),
    st.sampled_from([1.0, 0.3, 2.0**-16, torch.tensor(0.7)]),
    st.integers(0, 2**31),
    st.data(),
)
def test_against_float64(backend, sizes, dtype, scale, seed, data):
    layout = layout_of(sizes)
    first = data.draw(gradient_lists(layout, seed))
    second = data.draw(gradient_lists(layout, seed + 1000))
    accumulator = unwritten(layout.length, dtype=dtype)
    accumulator[~layout.mask()] = 0.0
    for gradients, overwrite in ((first, True), (second, False)):
        by_name.accumulate(
            accumulator, gradients, layout, scale=scale, overwrite=overwrite, backend=backend
        )
    assert (accumulator[~layout.mask()] == 0).all()
    for t, part in enumerate(layout.split(accumulator)):
        exact = torch.zeros(layout.sizes[t], dtype=torch.float64)
        size = exact.clone()
        for gradients in (first, second):
            if gradients[t] is not None:
                exact += gradients[t].double() * float(scale)
                size += (gradients[t].double() * float(scale)).abs()
        assert ((part.double() - exact).abs() <= 2 * ULPS[dtype] * size).all()


@pytest.mark.slow_interpreted
def test_a_thousand_equal_micro_batches_add_up(backend):
    # The same in a bfloat16 buffer ends at 0.5: there a 2^-9 is lost beside a larger sum.
    layout = layout_of([5, 33])
    gradients = [torch.full((size,), 2.0**-9, dtype=torch.bfloat16) for size in layout.sizes]
    for value in (2.0**-9, 0.0019):
        gradients = [torch.full_like(g, value) for g in gradients]
        exact = 1024 * gradients[0][0].double()
        accumulator = unwritten(layout.length)
        for step in range(1024):
            by_name.accumulate(accumulator, gradients, layout, overwrite=step == 0, backend=backend)
        assert ((accumulator[layout.mask()] - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is_and_is_overwritten(backend, bad):
    layout = layout_of([100, 9000])
    for place in (0, 4500, 8999):
        gradients = [torch.zeros(100), torch.ones(9000)]
        gradients[1][place] = bad
        accumulator = unwritten(layout.length)
        write(backend, accumulator, gradients, layout)
        finite = accumulator[layout.mask()].isfinite()
        assert not finite[100 + place]
        assert finite.sum() == finite.numel() - 1
        write(backend, accumulator, [None, None], layout)
        assert (accumulator[layout.mask()] == 0).all()


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        (torch.zeros(4), r"gradients\[1\] must have 5 elements"),
        (torch.zeros(5, 2)[:, 0], r"gradients\[1\] must have 5 elements without gaps"),
        (torch.zeros(10)[::2], r"gradients\[1\] must have 5 elements without gaps"),
        (torch.zeros(1).expand(5), r"gradients\[1\] must have 5 elements without gaps"),
        (torch.zeros(5, dtype=torch.int32), r"gradients\[1\] must be float32 or .*int32"),
        (torch.zeros(5, device="meta"), r"gradients\[1\] is on meta"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(backend, gradient, words):
    layout = layout_of([3, 5])
    accumulator = filled(layout, 1, 0)[0]
    before = accumulator.clone()
    with pytest.raises(ValueError, match=words):
        by_name.accumulate(accumulator, [torch.ones(3), gradient], layout, backend=backend)
    assert torch.equal(accumulator, before)


@pytest.mark.parametrize(
    ("accumulator", "layout", "words"),
    [
        (torch.zeros(6), ([4], [3]), "the segments end at 7"),
        (torch.zeros(6).half(), ([0], [3]), "float32 or bfloat16 or float64, contiguous"),
        (torch.zeros(12)[::2], ([0], [3]), "float32 or bfloat16 or float64, contiguous"),
        (torch.zeros(6), ([0, 3], [3]), "2 offsets do not go with 1 sizes"),
    ],
)
def test_storage_that_does_not_fit_is_refused(backend, accumulator, layout, words):
    with pytest.raises(ValueError, match=words):
        write(backend, accumulator, [torch.ones(3)], layout)


@pytest.mark.sanitize
def test_three_hundred_tiny_tensors_and_an_empty_last_one(backend):
    layout = layout_of([3] * 299 + [0])
    gradients = [torch.full((size,), float(t)) for t, size in enumerate(layout.sizes)]
    gradients[150] = None
    accumulator = unwritten(layout.length)
    write(backend, accumulator, gradients, layout)
    for t, part in enumerate(layout.split(accumulator)):
        assert (part == (0.0 if t == 150 else float(t))).all()


@given(st.sampled_from([(), (1,), (2, 3, 4, 4), (1, 3, 1, 2), (2, 3, 2, 2, 2)]), st.booleans())
def test_elements_go_in_memory_order_whatever_the_shape(backend, shape, transposed):
    gradient = torch.randn(shape)
    if gradient.dim() == 4:
        gradient = gradient.to(memory_format=torch.channels_last)
    if transposed and gradient.dim() > 1:
        gradient = gradient.transpose(0, -1)
    layout = layout_of([gradient.numel()])
    accumulator = unwritten(layout.length)
    write(backend, accumulator, [gradient], layout)
    in_memory = gradient.as_strided((gradient.numel(),), (1,))
    assert torch.equal(accumulator[: gradient.numel()], in_memory)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_spares_what_has_no_gradient(backend, bad):
    layout = layout_of([4, 5])
    accumulator = unwritten(layout.length)
    write(backend, accumulator, [torch.ones(4), None], layout, scale=torch.tensor(bad))
    first, second = layout.split(accumulator)
    assert not first.isfinite().any()
    assert (second == 0).all()


@pytest.mark.sanitize
def test_an_accumulator_that_is_not_aligned(backend):
    gradients = [torch.randn(5000), torch.randn(3)]
    storage = unwritten(6000)
    accumulator = storage[1:5005]
    write(backend, accumulator, gradients, ([0, 5001], [5000, 3]))
    assert torch.equal(accumulator[:5000], gradients[0])
    assert torch.equal(accumulator[5001:], gradients[1])
    assert storage[0].isnan()
    assert accumulator[5000].isnan()
    assert storage[5005:].isnan().all()


@pytest.mark.sanitize
def test_sizes_at_the_ends_of_vectors_tiles_and_chunks(backend):
    layout = layout_of(SIZES_AT_BOUNDARIES)
    accumulator = unwritten(layout.length)
    gradients = [torch.randn(size) for size in SIZES_AT_BOUNDARIES]
    write(backend, accumulator, gradients, layout)
    for part, gradient in zip(layout.split(accumulator), gradients, strict=True):
        assert torch.equal(part, gradient)
    assert accumulator[~layout.mask()].isnan().all()  # nothing was written between the segments
