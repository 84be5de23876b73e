"""graddrop: signs chosen element by element, against a loop over single elements."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels.ops import checks as contracts
from gcond_kernels.ops import random
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
from tests.helpers.sizes import SIZES_AT_BOUNDARIES

TRUE = torch.tensor(True)
# One rounding of every product and of every sum: of K rows, the average, the factor.
ROUNDINGS = 16
# A purity is a quotient of two sums of rounded numbers: so close to a random number, either wins.
PURITY_ERROR = 1e-5
SEEDS = st.integers(-(2**70), 2**70)
# To draw lists of; together few enough for a loop over elements in Python.
SMALL_SIZES = st.sampled_from([0, 1, 3, 31, 33, 130])


def splitmix64(state: int) -> tuple[int, int]:
    """The next state, and the next number, as the authors' program has them."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return state, z ^ (z >> 31)


def random_number(seed: int, counter: int, place: int) -> float:
    """U of one element: number `place` of the stream of this seed and counter."""
    _, start = splitmix64((seed + (counter - 1) * 0x9E3779B97F4A7C15) % 2**64)
    _, number = splitmix64((start + place * 0x9E3779B97F4A7C15) % 2**64)
    return (number // 2**41 + 0.5) / 2**23


def kept_sum(values, u: float, leak: float) -> tuple[float, bool]:
    """The sum of one element's values that are let through, and whether rounding decides it."""
    size = sum(abs(v) for v in values)
    if size == 0.0:
        return 0.0, False
    purity = (1.0 + sum(values) / size) / 2.0
    kept = [(v > 0 and purity > u) or (v < 0 and purity < u) for v in values]
    total = sum((leak + (1.0 - leak) * k) * v for k, v in zip(kept, values, strict=True))
    return total, abs(purity - u) < PURITY_ERROR


def scaled(accumulators: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The values v_k, [K, N'], 0 where the task takes no part; float32, of float64 sums float64."""
    wide = contracts.momentum_dtype(accumulators.dtype)
    values = accumulators.to(wide).numpy() * scale.to(wide).numpy()[:, None]
    return np.where(scale.numpy()[:, None] != 0.0, values, 0.0).astype(np.float64)


def run(backend, accumulators, outputs, layout, **options):
    ones = torch.ones(len(accumulators), dtype=torch.float64)
    given = {"scale": ones, "finite": TRUE, "seed": 5, "counter": torch.tensor(3)} | options
    by_name.graddrop(accumulators, outputs, layout, **given, backend=backend)


def test_the_numbers_are_those_of_splitmix64():
    # What the authors' program prints for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    numbers, state = [], 1234567
    for _ in expected:
        state, number = splitmix64(state)
        numbers.append(number)
    assert numbers == expected
    places = torch.arange(4)
    uniform = random.uniform(torch.tensor(1234567), places)
    assert uniform.tolist() == [(n // 2**41 + 0.5) / 2**23 for n in expected]
    for seed, counter in ((0, 0), (-3, 7), (2**64 - 3, 7), (2**63, 2**62)):
        uniform = random.uniform(random.start_of(seed, torch.tensor(counter)), places + 2**40)
        assert uniform.tolist() == [random_number(seed, counter, 2**40 + p) for p in range(4)]


@given(
    st.lists(SMALL_SIZES, max_size=4),
    st.sampled_from([1, 2, 3, 9]),
    st.sampled_from(contracts.ACCUMULATOR_DTYPES),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from([0.0, 0.9]),
    st.booleans(),
    st.booleans(),
    SEEDS,
    st.integers(0, 2**40),
    st.data(),
)
def test_against_a_loop(  # noqa: PLR0913 - one argument for each strategy
    backend, sizes, tasks, dtype, leak, beta, masked, packed, seed, first, data
):
    layout = (packed_layout_of if packed else layout_of)(sizes)
    accumulators = filled(layout, tasks, seed % 2**32, dtype)
    scale = torch.linspace(0.3, 1.2, tasks, dtype=torch.float64)
    scale[data.draw(st.integers(0, tasks - 1))] *= data.draw(st.sampled_from([0.0, 1.0, -1.0]))
    counter = data.draw(st.integers(0, 2**40))
    kinds = [data.draw(st.sampled_from([None, *DTYPES])) for _ in sizes]
    outputs = [
        None if kind is None else unwritten(size, dtype=kind)
        for kind, size in zip(kinds, sizes, strict=True)
    ]
    if seed % 2:
        outputs = [None if output is None else misaligned(output) for output in outputs]
    momentum = filled(layout, 1, 1, contracts.momentum_dtype(dtype))[0] if beta else None
    steps = torch.arange(len(sizes)) if beta else None
    trained, mask = random_mask(layout.length, 2)
    before = None if momentum is None else momentum.tolist()
    dropout = {"seed": seed, "counter": torch.tensor(counter), "leak": leak, "first": first}
    average = {"momentum": momentum, "momentum_steps": steps, "beta": beta}
    mask = mask if masked else None
    run(backend, accumulators, outputs, layout, scale=scale, mask=mask, **dropout, **average)

    values = scaled(accumulators, scale).T.tolist()
    for t, (offset, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        if momentum is not None:
            assert steps[t] == t + (outputs[t] is not None)
        for e in range(offset, offset + size):
            if outputs[t] is None:
                assert momentum is None or momentum[e] == before[e]
                continue
            expected, rounding_decides = kept_sum(
                values[e], random_number(seed, counter, first + e), leak
            )
            bound = ROUNDINGS * UNITS[dtype] * sum(abs(v) for v in values[e])
            if beta:
                expected = beta * before[e] + (1.0 - beta) * expected
                bound += ROUNDINGS * UNITS[dtype] * abs(before[e])
            if masked and not trained[e]:
                expected = bound = 0.0
            elif rounding_decides:
                continue
            if momentum is not None:
                assert abs(momentum[e] - expected) <= bound
            correction = 1.0 / (1.0 - beta ** (t + 1)) if beta else 1.0
            relative, absolute = rounding(kinds[t], dtype)
            bound = bound * correction + relative * abs(expected * correction) + absolute
            assert abs(outputs[t][e - offset].double() - expected * correction) <= 1.01 * bound


class Step:
    """What graddrop reads and writes: the same each time that it is made."""

    def __init__(self, tasks, *, dtype=torch.float32, packed=False, beta=0.0, masked=False):
        self.layout = layout = (packed_layout_of if packed else layout_of)(SIZES_AT_BOUNDARIES)
        self.accumulators = filled(layout, tasks, 0, dtype)
        self.scale = torch.linspace(0.5, 1.5, tasks).double()
        if tasks > 2:
            self.scale[1] = 0.0
            self.accumulators[1] = math.nan
        kinds = [*DTYPES, None, torch.float32] * 2
        self.outputs = [
            None if kind is None else unwritten(size, dtype=kind)
            for kind, size in zip(kinds, layout.sizes, strict=True)
        ]
        self.beta = beta
        self.momentum = filled(layout, 1, 1)[0] if beta else None
        self.steps = torch.arange(len(kinds)) if beta else None
        self.mask = random_mask(layout.length, 2)[1] if masked else None

    def run(self, backend, **options):
        """Everything that may have changed."""
        given = {"scale": self.scale, "mask": self.mask, "beta": self.beta} | options
        given |= {"momentum": self.momentum, "momentum_steps": self.steps}
        run(backend, self.accumulators, self.outputs, self.layout, **given)
        changed = [*self.outputs, self.momentum, self.steps]
        return [value for value in changed if value is not None]


def all_equal(some, others) -> bool:
    return all(
        torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {}),
        ({"dtype": torch.bfloat16}, {"leak": 0.3}),
        ({"beta": 0.9, "masked": True}, {"leak": 0.1, "seed": -1, "first": 2**40 + 5}),
        ({"masked": True}, {"seed": 2**63 + 11, "counter": torch.tensor(2**62)}),
    ],
)
def test_the_bits_are_those_of_the_reference(backend, tasks, packed, options, how):
    results = [
        Step(tasks, packed=packed, **options).run(which, **how) for which in (backend, "python")
    ]
    assert all_equal(*results)
    assert all(value.isfinite().all() for value in results[0])


@pytest.mark.sanitize
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_what_is_not_finite_writes_zeros_and_keeps_the_state(backend, beta):
    step, same = (Step(3, beta=beta, masked=True) for _ in range(2))
    step.accumulators[:] = math.nan
    step.run(backend, finite=torch.tensor(False))
    assert all((output == 0.0).all() for output in step.outputs if output is not None)
    if beta:
        assert torch.equal(step.momentum, same.momentum)
        assert torch.equal(step.steps, same.steps)


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tasks", [2, 9])
def test_values_that_are_not_finite_stay_where_they_are(backend, bad, tasks):
    results = []
    for which in (backend, "python"):
        step = Step(tasks)
        for offset, size in zip(step.layout.offsets, step.layout.sizes, strict=True):
            step.accumulators[0, offset + size // 3] = bad
        results.append(step.run(which, leak=0.5))
    assert all_equal(*results)
    assert all((~output.isfinite()).sum() == 1 for output in results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 2, 9])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("finite", [True, False])
def test_outputs_in_the_first_accumulator_itself(backend, dtype, tasks, beta, finite):
    results = []
    for inside in (False, True):
        step = Step(tasks, dtype=dtype, beta=beta, masked=True)
        parts = step.layout.split(step.accumulators[0])
        step.outputs = [
            None if output is None else part if inside else unwritten(len(part), dtype=dtype)
            for output, part in zip(step.outputs, parts, strict=True)
        ]
        results.append(step.run(backend, finite=torch.tensor(finite)))
    assert all_equal(*results)


@pytest.mark.parametrize("split", [1, 32, 1024, 5000])
@pytest.mark.parametrize("first", [0, 3, 2**33])
def test_two_shards_give_the_bits_of_the_full_accumulators(backend, split, first):
    layout = layout_of([6000])
    accumulators = filled(layout, 3, 0)
    whole, *parts = unwritten(6000), unwritten(split), unwritten(6000 - split)
    run(backend, accumulators, [whole], layout, first=first)
    for part, start in zip(parts, (0, split), strict=True):
        own = accumulators[:, start : start + len(part)].contiguous()
        run(backend, own, [part], packed_layout_of([len(part)]), first=first + start)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.0), (3.0, 1.0), (1.0, 9.0)])
@pytest.mark.parametrize("leak", [0.0, 0.25])
def test_a_sign_is_chosen_with_the_probability_of_the_purity(backend, positive, negative, leak):
    size = 20_000
    layout = layout_of([size])
    accumulators = torch.tensor([[positive], [-negative]]).expand(2, layout.length).contiguous()
    output = unwritten(size)
    run(backend, accumulators, [output], layout, leak=leak, seed=11)
    either = output == positive - leak * negative
    assert (either | (output == leak * positive - negative)).all()
    purity = positive / (positive + negative)
    deviation = math.sqrt(purity * (1.0 - purity) / size)
    assert abs(either.double().mean() - purity) < 4.0 * deviation
    # Neighbours are independent of each other.
    both = (either[1:] & either[:-1]).double().mean()
    assert abs(both - purity**2) < 8.0 * deviation


@pytest.mark.parametrize(("apart", "kept"), [(0.0, (0, 0)), (2.0, (1, 0)), (-2.0, (0, 1))])
def test_a_purity_at_the_random_number_chooses_neither_sign(backend, apart, kept):
    """All of this is exact: U is an odd number of halves of 2^-23, and the sizes add up to 2^24."""
    layout = layout_of([3000])
    numbers = [random_number(5, 3, place) for place in range(layout.length)]
    positive = torch.tensor(numbers) * 2.0**24 + apart
    accumulators = torch.stack([positive, positive - 2.0**24])
    output = unwritten(3000)
    run(backend, accumulators, [output], layout)
    expected = kept[0] * accumulators[0] + kept[1] * accumulators[1]
    assert torch.equal(output, expected[:3000])


def test_where_all_signs_are_equal_everything_is_kept(backend):
    layout = layout_of([3000])
    sign = torch.where(filled(layout, 1, 1) > 0.0, 1.0, -1.0)
    accumulators = filled(layout, 3, 0).abs() * sign
    output = unwritten(3000)
    run(backend, accumulators, [output], layout)
    exact = accumulators[0] + accumulators[1] + accumulators[2]
    assert torch.equal(output, exact[:3000])
    run(backend, accumulators[:1], [output], layout, seed=6)
    assert torch.equal(output, accumulators[0, :3000])


def test_seed_and_counter_decide_and_nothing_else(backend):
    layout = layout_of([2000, 70])
    accumulators = torch.tensor([[1.0], [-1.0]]).expand(2, layout.length).contiguous()

    def outputs_of(seed, counter):
        outputs = [unwritten(2000), unwritten(70)]
        counter = torch.tensor(counter)
        run(backend, accumulators.clone(), outputs, layout, seed=seed, counter=counter)
        return torch.cat(outputs)

    base = outputs_of(8, 0)
    assert torch.equal(outputs_of(8, 0), base)
    assert torch.equal(outputs_of(8 + 2**64, 0), base)
    for seed, counter in ((8, 1), (8, 2**40), (9, 0), (8 + 2**32, 0), (8 - 2**63, 0)):
        differing = outputs_of(seed, counter) != base
        assert 0.4 < differing.double().mean() < 0.6


@pytest.mark.sanitize
def test_many_tiny_tensors_and_an_empty_last_one(backend):
    layout = layout_of([3] * 99 + [0])
    accumulators = filled(layout, 2, 0)
    outputs = [unwritten(size) for size in layout.sizes]
    expected = [unwritten(size) for size in layout.sizes]
    outputs[7] = expected[7] = None
    run(backend, accumulators, outputs, layout)
    run("python", accumulators, expected, layout)
    for a, b in zip(outputs, expected, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_outputs_in_any_memory_order(backend):
    output = torch.full((2, 3, 4, 4), math.nan).to(memory_format=torch.channels_last)
    layout = layout_of([96])
    accumulators = filled(layout, 1, 0)
    run(backend, accumulators, [output], layout)
    assert torch.equal(output.as_strided((96,), (1,)), accumulators[0, :96])


def test_what_does_not_fit_is_refused_before_anything_is_written(backend):
    layout = layout_of([4])
    accumulators, output = filled(layout, 2, 0), torch.full((4,), 7.0)
    momentum, steps = torch.zeros(layout.length), torch.zeros(1, dtype=torch.int64)
    for words, options in (
        ("leak must be", {"leak": 1.5}),
        ("leak must be", {"leak": math.nan}),
        ("first must be", {"first": -1}),
        (r"counter must be \[\] int64", {"counter": torch.tensor(1.0)}),
        (r"finite must be \[\] bool", {"finite": torch.tensor(1)}),
        (r"scale must be \[2\] float64", {"scale": torch.ones(2)}),
        (r"mask must be \[1\] int32", {"mask": torch.ones(1, dtype=torch.int64)}),
        ("beta must be", {"momentum": momentum, "momentum_steps": steps, "beta": 1.0}),
    ):
        with pytest.raises(ValueError, match=words):
            run(backend, accumulators, [output], layout, **options)
        assert (output == 7.0).all()
        assert steps.tolist() == [0]
