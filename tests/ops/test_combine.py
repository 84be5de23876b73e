"""combine: gradients, momentum and history from one weighted sum, against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels.ops import checks as contracts
from gcond_kernels.python import chunks
from tests.helpers import by_name
from tests.helpers.flat import (
    DTYPES,
    UNITS,
    filled,
    layout_of,
    misaligned,
    packed_layout_of,
    random_mask,
    rounding,
    unwritten,
)
from tests.helpers.sizes import SIZE_LISTS, SIZES_AT_BOUNDARIES

TRUE = torch.tensor(True)
# K + 2 roundings in the weighted sum, the average and the factor.
ROUNDINGS = 8


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def products_of(accumulators, layout, scale, momentum):
    options = {"scale": scale, "momentum": momentum, "backend": "python"}
    return by_name.gramian(accumulators, layout, **options).per_tensor


def combine(backend, accumulators, outputs, layout, **options):
    """Combine; where not given, weights and scales are 1 and the momentum starts."""
    ones = torch.ones(len(accumulators), dtype=torch.float64)
    given = {"weights": ones, "scale": ones, "finite": TRUE} | options
    if given.get("momentum") is not None:
        given.setdefault("momentum_steps", torch.zeros(len(outputs), dtype=torch.int64))
    if given.get("max_norm") is not None and "per_tensor" not in given:
        given["per_tensor"] = products_of(
            accumulators, layout, given["scale"], given.get("momentum")
        )
    by_name.combine(accumulators, outputs, layout, **given, backend=backend)


@given(
    SIZE_LISTS,
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([None, 0.01, 1e6]),
    st.integers(0, 2**31),
    st.data(),
)
def test_against_float64(backend, sizes, tasks, beta, max_norm, seed, data):
    layout = layout_of(sizes)
    dtype = data.draw(st.sampled_from(contracts.ACCUMULATOR_DTYPES))
    accumulators = filled(layout, tasks, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(tasks, generator=generator).double()
    scale = torch.rand(tasks, generator=generator).double() + 0.1
    momentum = filled(layout, 1, seed + 1, contracts.momentum_dtype(dtype))[0] if beta else None
    steps = torch.randint(0, 5, (len(sizes),), generator=generator) if beta else None
    history = unwritten(tasks, layout.length, dtype=torch.bfloat16)
    outputs = []
    for size in sizes:
        kind = data.draw(st.sampled_from([None, *DTYPES]))
        output = None if kind is None else unwritten(size, dtype=kind)
        outputs.append(misaligned(output) if output is not None and seed % 2 else output)
    momentum_before = None if momentum is None else momentum.double().clone()
    steps_before = None if steps is None else steps.clone()
    combine(
        backend,
        accumulators,
        outputs,
        layout,
        weights=weights,
        scale=scale,
        history=history,
        momentum=momentum,
        momentum_steps=steps,
        beta=beta,
        max_norm=max_norm,
    )

    g = (weights * scale) @ accumulators.double()
    m = g if momentum_before is None else beta * momentum_before + (1 - beta) * g
    hats = []
    for t, part in enumerate(layout.split(m)):
        count = 0 if steps_before is None else int(steps_before[t]) + 1
        hats.append(part / (1 - beta**count) if beta else part)
    total = math.sqrt(
        sum(float(h @ h) for h, o in zip(hats, outputs, strict=True) if o is not None)
    )
    unit = UNITS[dtype]
    magnitude = (weights * scale).abs() @ accumulators.abs().double()
    if momentum_before is not None:
        magnitude += momentum_before.abs()
    for t, output in enumerate(outputs):
        inside = slice(layout.offsets[t], layout.offsets[t] + layout.sizes[t])
        if output is None:
            if momentum is not None:
                assert torch.equal(momentum[inside].double(), momentum_before[inside])
                assert steps[t] == steps_before[t]
            continue
        if momentum is not None:
            error = (momentum[inside].double() - m[inside]).abs()
            assert (error <= ROUNDINGS * unit * magnitude[inside]).all()
            assert steps[t] == steps_before[t] + 1
        expected, allowed = hats[t], 10 * ROUNDINGS * unit * magnitude[inside]  # 1 / (1-β) ≤ 10
        if max_norm is not None:
            factor = min(1.0, max_norm / total) if total else 1.0
            expected = factor * expected
            allowed = factor * allowed + 1e-6 * unit / UNITS[torch.float32] * expected.abs()
        relative, absolute = rounding(output.dtype, dtype)
        error = (output.double() - expected).abs()
        assert (error <= allowed + relative * (expected.abs() + allowed) + absolute).all()

    mask = layout.mask()
    assert torch.equal(history[:, mask], accumulators.bfloat16()[:, mask])
    assert history[:, ~mask].isnan().all()


@pytest.mark.parametrize("sizes", [[5000], [3] * 299 + [0]])
def test_weights_of_one_give_the_plain_sum(backend, sizes):
    layout = layout_of(sizes)
    accumulators = filled(layout, 2, 0)
    outputs = [unwritten(size) for size in layout.sizes]
    outputs[7:8] = [None] * len(outputs[7:8])
    combine(backend, accumulators, outputs, layout)
    for output, part in zip(outputs, layout.split(accumulators.sum(0)), strict=True):
        assert output is None or torch.equal(output, part)


def test_segments_longer_than_a_chunk(backend, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 1 << 13)
    layout = layout_of([70_001, 5, 16_384])
    accumulators = filled(layout, 3, 0)
    weights, scale = vector(1.0, 0.0, 2.0), vector(0.5, 0.0, 1.0)
    history = unwritten(3, layout.length, dtype=torch.bfloat16)
    outputs = [unwritten(size) for size in layout.sizes]
    combine(backend, accumulators, outputs, layout, weights=weights, scale=scale, history=history)
    expected = layout.split((weights * scale) @ accumulators.double())
    for output, part in zip(outputs, expected, strict=True):
        assert torch.allclose(output.double(), part, rtol=1e-6, atol=1e-6)
    assert history[1].isnan().all()  # it took no part: its history row is kept
    assert torch.equal(history[2, :70_001], accumulators[2, :70_001].bfloat16())


@pytest.mark.parametrize("with_momentum", [False, True])
def test_an_accumulator_of_weight_zero_is_not_read(backend, with_momentum):
    layout = layout_of([40])
    accumulators = filled(layout, 2, 0)
    accumulators[1] = math.nan
    one, output = vector(1.0, 0.0), unwritten(40)
    momentum = torch.zeros(layout.length) if with_momentum else None
    combine(backend, accumulators, [output], layout, weights=one, scale=one, momentum=momentum)
    assert torch.allclose(output, accumulators[0, :40], rtol=1e-6)


@pytest.mark.sanitize
def test_what_is_not_finite_writes_zeros_and_keeps_the_state(backend):
    layout = layout_of([40, 3])
    accumulators = filled(layout, 2, 0)
    accumulators[0, 7] = math.nan
    momentum, steps = filled(layout, 1, 1)[0], torch.tensor([3, 4])
    history = filled(layout, 2, 2, torch.bfloat16)
    before = momentum.clone(), steps.clone(), history.clone()
    outputs = [unwritten(40), None]
    combine(
        backend,
        accumulators,
        outputs,
        layout,
        weights=vector(0.0, 0.0),
        finite=torch.tensor(False),
        history=history,
        momentum=momentum,
        momentum_steps=steps,
        max_norm=1.0,
    )
    assert (outputs[0] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (momentum, steps, history), strict=True))


@pytest.mark.parametrize("with_momentum", [False, True])
def test_zero_gradients_are_written_as_zeros(backend, with_momentum):
    layout = layout_of([40])
    output = unwritten(40)
    momentum = torch.zeros(layout.length) if with_momentum else None
    accumulators = torch.zeros(2, layout.length)
    combine(backend, accumulators, [output], layout, max_norm=1.0, momentum=momentum)
    assert (output == 0).all()


def test_options_that_do_not_go_together_are_refused_before_anything_is_written(backend):
    layout = layout_of([4])
    accumulators, output = filled(layout, 2, 0), torch.full((4,), 7.0)
    momentum = torch.zeros(layout.length)

    def refused(words, **options):
        with pytest.raises(ValueError, match=words):
            combine(backend, accumulators, [output], layout, **options)
        assert (output == 7.0).all()

    for beta in (0.0, 1.0):
        refused("beta must be in", momentum=momentum, beta=beta)
    refused("max_norm must be above 0", max_norm=0.0)
    without = torch.zeros(1, 2, 2).double()
    refused("must hold the momentum", max_norm=1.0, momentum=momentum, per_tensor=without)
    refused("history must be", history=torch.zeros(1, layout.length))
    refused(r"weights must be \[2\] float64", weights=vector(1.0))
    refused(r"weights must be \[1, 2\] float64", weights=torch.ones(2, 2).double())
    refused(r"mask must be \[1\] int32", mask=torch.ones(1))


@pytest.mark.sanitize
@pytest.mark.parametrize("tasks", [7, 8, 9, 17])
def test_many_tasks(backend, tasks):
    layout = layout_of([1500, 3])
    accumulators = filled(layout, tasks, 0)
    weights = torch.rand(tasks, dtype=torch.float64)
    weights[3] = 0.0
    history = unwritten(tasks, layout.length, dtype=torch.bfloat16)
    outputs = [unwritten(size) for size in layout.sizes]
    combine(backend, accumulators, outputs, layout, weights=weights, history=history)
    exact = layout.split(weights @ accumulators.double())
    size = layout.split(weights @ accumulators.double().abs())
    for output, part, bound in zip(outputs, exact, size, strict=True):
        assert ((output.double() - part).abs() <= tasks * 2.0**-24 * bound).all()
    mask = layout.mask()
    assert torch.equal(history[:, mask], accumulators.bfloat16()[:, mask])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4500, 8999])
def test_values_that_are_not_finite_stay_where_they_are(backend, bad, place):
    # `finite` says so of inner products; that a value is passed on as it is, is the sum's matter.
    layout = layout_of([3, 9000])
    accumulators = filled(layout, 2, 0)
    accumulators[1, layout.offsets[1] + place] = bad
    outputs = [unwritten(size) for size in layout.sizes]
    combine(backend, accumulators, outputs, layout)
    assert outputs[0].isfinite().all()
    broken = ~outputs[1].isfinite()
    assert broken[place]
    assert broken.sum() == 1


def test_outputs_in_any_memory_order(backend):
    output = torch.full((2, 3, 4, 4), math.nan).to(memory_format=torch.channels_last)
    layout = layout_of([output.numel()])
    accumulators = filled(layout, 1, 0)
    combine(backend, accumulators, [output], layout)
    assert torch.equal(output.as_strided((96,), (1,)), accumulators[0, :96])


@pytest.mark.sanitize
def test_sizes_at_the_ends_of_vectors_tiles_and_chunks(backend):
    layout = layout_of(SIZES_AT_BOUNDARIES)
    accumulators = filled(layout, 2, 0)
    history, momentum = unwritten(2, layout.length, dtype=torch.bfloat16), unwritten(layout.length)
    momentum[layout.mask()] = 0.0
    outputs = [unwritten(size) for size in layout.sizes]
    combine(backend, accumulators, outputs, layout, history=history, momentum=momentum, beta=0.5)
    for output, part in zip(outputs, layout.split(accumulators.sum(0)), strict=True):
        assert torch.allclose(output, part, rtol=1e-6, atol=1e-6)
    assert history[:, ~layout.mask()].isnan().all()
    assert momentum[~layout.mask()].isnan().all()


def test_a_gramian_of_other_tensors_is_refused(backend):
    layout = layout_of([5, 6])
    accumulators, outputs = filled(layout, 2, 0), [torch.empty(5), None]
    momentum, steps = torch.zeros(layout.length), torch.zeros(2, dtype=torch.int64)
    options = {"max_norm": 1.0, "momentum": momentum, "momentum_steps": steps}
    for shape in ((5, 3, 3), (1, 3, 3), (2, 4, 4), (2, 3, 2), ()):
        products = torch.zeros(shape).double()
        with pytest.raises(ValueError, match="per_tensor"):
            combine(backend, accumulators, outputs, layout, per_tensor=products, **options)
        assert steps.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 2, 9])
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("options", [{}, {"beta": 0.9}, {"max_norm": 0.1}])
def test_outputs_in_the_first_accumulator_itself(backend, dtype, tasks, finite, options):
    """An optimizer whose gradients are of the accumulators' type needs no memory for `.grad`."""
    layout = layout_of([3, 0, 1024, 1023, 4097, 1])
    scale = torch.full((tasks,), 0.5).double()
    scale[-1] = 0.0 if tasks > 2 else 0.5  # a task that takes no part
    weights = torch.linspace(-1.0, 2.0, tasks).double()
    weights[0] = 0.0 if tasks == 9 else 1.0  # the first row's own share
    results = []
    for inside in (False, True):
        accumulators, history = filled(layout, tasks, 0, dtype), filled(layout, tasks, 1, dtype)
        given = {"weights": weights, "scale": scale, "finite": torch.tensor(finite)}
        if options.get("beta"):
            given["momentum"] = filled(layout, 1, 2)[0]
            given["momentum_steps"] = torch.ones(6, dtype=torch.int64)
        outputs = [unwritten(size, dtype=dtype) for size in layout.sizes]
        if inside:
            outputs = layout.split(accumulators[0])
        outputs[3] = None
        combine(backend, accumulators, outputs, layout, **given, **options, history=history)
        written = [output.clone() for output in outputs if output is not None]
        results.append([*written, history, *(given[k] for k in given if "momentum" in k)])
    for apart, within in zip(*results, strict=True):
        assert torch.equal(apart, within)


# Forms of the update, each with what it is given beside weights and rows.
FORMS = {
    "plain": {},
    "momentum": {"beta": 0.9},
    "clipped": {"max_norm": 1.0},
    "clipped momentum": {"beta": 0.5, "max_norm": 1.0},
}
ODD_SIZES = [4099, 1, 0, 65, 1024, 33]


class Update:
    """What combine reads and writes: the same each time that it is made."""

    def __init__(self, tasks, dtype, *, beta=0.0, max_norm=None, packed=False):
        self.layout = layout = (packed_layout_of if packed else layout_of)(ODD_SIZES)
        self.accumulators = filled(layout, tasks, 0, dtype)
        self.history = filled(layout, tasks, 1, torch.bfloat16)
        self.momentum = filled(layout, 1, 2)[0] if beta else None
        self.steps = torch.arange(len(ODD_SIZES)) if beta else None
        self.scale = torch.linspace(0.5, 1.5, tasks).double()
        if tasks > 2:
            self.scale[1] = 0.0
        self.beta, self.max_norm = beta, max_norm
        kinds = [*DTYPES, None, torch.float32]
        self.outputs = [
            None if kind is None else unwritten(size, dtype=kind)
            for size, kind in zip(ODD_SIZES, kinds, strict=True)
        ]
        # Of what is there now: a test may put garbage where a mask is 0.
        self.per_tensor = products_of(self.accumulators, layout, self.scale, self.momentum)

    def run(self, backend, weights, tensors=None, mask=None):
        """Runs it, for some of the tensors alone if asked for; returns outputs, and the rest."""
        some = slice(None) if tensors is None else tensors
        combine(
            backend,
            self.accumulators,
            self.outputs[some],
            (self.layout.offsets[some], self.layout.sizes[some]),
            weights=weights,
            scale=self.scale,
            per_tensor=self.per_tensor[some],
            history=self.history,
            momentum=self.momentum,
            momentum_steps=None if self.steps is None else self.steps[some],
            beta=self.beta,
            max_norm=self.max_norm,
            mask=mask,
        )
        return self.outputs, [self.history, self.momentum, self.steps]


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_weights_per_tensor_are_those_of_a_call_per_tensor(backend, form, tasks):
    options = dict(FORMS[form])
    max_norm = options.pop("max_norm", None)
    tensors = len(ODD_SIZES)
    weights = torch.randn(tensors, tasks, generator=torch.Generator().manual_seed(3)).double()
    weights[3] = 0.0
    at_once = Update(tasks, torch.float32, **options, max_norm=max_norm)
    apart = Update(tasks, torch.float32, **options)
    outputs, changed = at_once.run(backend, weights)
    for t in range(tensors):
        expected, expected_changed = apart.run(backend, weights[t], slice(t, t + 1))
    for a, b in zip(changed, expected_changed, strict=True):
        assert (a is b is None) or torch.equal(a, b)
    factor = 1.0
    if max_norm is not None:  # the norm is that of all tensors together
        factor = max_norm / float(torch.cat([b.double() for b in expected if b is not None]).norm())
        assert factor < 1.0
    for a, b in zip(outputs, expected, strict=True):
        if b is None or "clipped" not in form:
            assert (a is b is None) or torch.equal(a, b)
        else:
            # A norm of inner products is as exact as those; outputs have a rounding of their own.
            tolerance = 1e-4 if a.dtype.itemsize > 2 else 1e-2
            torch.testing.assert_close(a.double(), factor * b.double(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_a_mask_leaves_out_becomes_exactly_zero(backend, form, dtype, own, packed):
    plain, masked = (Update(3, dtype, **FORMS[form], packed=packed) for _ in range(2))
    layout = plain.layout
    weights = torch.randn(len(ODD_SIZES), 3, generator=torch.Generator().manual_seed(3)).double()
    weights = weights if own else weights[0]
    trained, mask = random_mask(layout.length, 4)
    masked.accumulators[:, ~trained] = torch.tensor([[math.nan], [1.0], [math.inf]]).to(dtype)
    if masked.momentum is not None:
        masked.momentum[~trained] = math.nan
    plain.run(backend, weights)
    masked.run(backend, weights, mask=mask)
    for t, part in enumerate(layout.split(trained)):
        output, whole = masked.outputs[t], plain.outputs[t]
        if output is None:
            continue
        assert torch.equal(output, whole.masked_fill(~part, 0.0))
        assert not output[~part].signbit().any()
        if masked.momentum is not None:
            momentum, kept = (layout.split(each.momentum)[t] for each in (masked, plain))
            assert torch.equal(momentum, kept.masked_fill(~part, 0.0))
    assert masked.steps is plain.steps is None or torch.equal(masked.steps, plain.steps)
    # The history is of the gradients as they are.
    copied = masked.accumulators[::2].bfloat16()[:, layout.mask()]
    assert torch.equal(
        masked.history[::2][:, layout.mask()].nan_to_num(7.0), copied.nan_to_num(7.0)
    )
