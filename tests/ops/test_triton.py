"""Tests of the Triton backend alone: launch tables, elements beyond 2^31, why it is unavailable."""

import mmap

import pytest
import torch

from gcond_kernels import GCond, ops
from gcond_kernels.methods.method import Comparison
from gcond_kernels.ops import backends
from gcond_kernels.ops import launch_tables as tables
from tests.helpers.flat import filled, layout_of, random_mask

triton = pytest.importorskip("triton", reason="Triton is not installed")
plans = pytest.importorskip("gcond_kernels.triton_kernels.plans")

HERE = torch.device("cpu")
# On a GPU machine the kernels are not interpreted: tests/gpu checks these things there.
needs_interpreter = pytest.mark.skipif(
    ops.unavailable("triton", HERE) is not None,
    reason=f"no Triton on CPU tensors: {ops.unavailable('triton', HERE)}",
)


def accumulate(accumulator, gradients, layout, overwrite=True):
    layout = ops.Layout.of(layout.offsets, layout.sizes)
    ops.accumulate(accumulator, gradients, layout, overwrite=overwrite, backend="triton")


@needs_interpreter
def test_a_plan_is_cached_by_addresses_dtypes_and_sizes_alone():
    layout = layout_of([5, 7])
    storage = torch.arange(1, 65).float()  # no bits of these are a NaN of another dtype
    accumulator = torch.zeros(layout.length)

    def misses(gradients, layout=layout):
        before = plans.plan.cache_info().misses
        accumulate(accumulator, gradients, layout)
        return plans.plan.cache_info().misses - before

    assert misses([storage[:5], storage[32:39]]) == 1
    assert misses([storage[:5], storage[32:39]]) == 0  # other objects, same addresses
    assert misses([storage[:5], None]) == 1
    assert misses([storage[1:6], storage[32:39]]) == 1
    assert misses([storage[:5].view(torch.int32).view(torch.float32), storage[32:39]]) == 0
    halves = storage.view(torch.bfloat16)
    assert misses([halves[:5], halves[64:71]]) == 1  # same addresses, another dtype
    assert torch.equal(accumulator[:5], halves[:5].float())
    assert misses([halves.view(torch.float16)[:5], halves[64:71]]) == 1
    assert torch.equal(accumulator[:5], halves.view(torch.float16)[:5].float())
    assert misses([storage[:4], storage[32:39]], layout_of([4, 7])) == 1


@pytest.fixture
def captured(monkeypatch):
    """Simulate the capture of a CUDA graph: nothing new can be copied to the GPU."""
    copied, plan = tables.to_device, plans.plan
    monkeypatch.setattr(tables, "is_capturing", lambda _: True)

    def no_copies(array, device):
        if tables.is_capturing(device):
            raise tables.CaptureMissError("run it once before the capture")
        return copied(array, device)

    monkeypatch.setattr(tables, "to_device", no_copies)
    monkeypatch.setattr(plans, "plan", plan.__wrapped__)  # on the CPU addresses come back
    return lambda on: monkeypatch.setattr(tables, "is_capturing", lambda _: on)


@needs_interpreter
def test_addresses_that_are_new_to_a_capture(captured):
    """They travel with launches: 70 tensors, more than one launch takes."""
    layout = layout_of([5, 0, 3000, 8] * 17 + [4, 1])
    gradients = [torch.randn(size) for size in layout.sizes]
    gradients[0] = gradients[3] = None
    expected = filled(layout, 1, 0)[0]
    accumulator = expected.clone()
    plans.table_without_addresses.cache_clear()
    with pytest.raises(tables.CaptureMissError, match="before the capture"):
        accumulate(accumulator, gradients, layout, overwrite=False)
    captured(False)
    for _ in range(2):
        accumulate(expected, gradients, layout, overwrite=False)
    accumulate(accumulator, gradients, layout, overwrite=False)
    captured(True)
    gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
    accumulate(accumulator, gradients, layout, overwrite=False)
    assert torch.equal(accumulator, expected)


def reserved(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that is only reserved: no page becomes real but those that are used."""
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)


FAR, LENGTH = 2**31 + 4096, 2**31 + 8192
SEGMENT = ops.Layout((FAR,), (3000,))


@needs_interpreter
def test_elements_beyond_2_31():
    accumulators, history = (reserved(2 * LENGTH, torch.bfloat16).view(2, LENGTH) for _ in range(2))
    values = torch.randn(2, 3000).bfloat16()
    one = torch.ones(2, dtype=torch.float64)
    for accumulator, value in zip(accumulators, values, strict=True):
        accumulate(accumulator, [value], SEGMENT)
        assert torch.equal(accumulator[FAR : FAR + 3000], value)
    gradients = ops.TaskGradients(accumulators, SEGMENT, one, history)
    gramians = ops.gramian(gradients, history_scale=one, backend="triton")
    exact = values.double() @ values.double().T
    assert torch.allclose(gramians.total, exact, rtol=1e-5, atol=1e-5)
    output = torch.empty(3000)
    ops.combine(gradients, [output], weights=one, finite=torch.tensor(True), backend="triton")
    assert torch.equal(output, values[0].float() + values[1].float())
    assert torch.equal(history[:, FAR : FAR + 3000], values)


@needs_interpreter
def test_masks_beyond_2_31():
    accumulators = reserved(2 * LENGTH, torch.bfloat16).view(2, LENGTH)
    mask = reserved(LENGTH // 32, torch.int32)
    trainable, mask[FAR // 32 : FAR // 32 + 94] = random_mask(94 * 32, 0)
    values = accumulators[:, FAR : FAR + 3000] = torch.randn(2, 3000).bfloat16()
    kept = values.masked_fill(~trainable[:3000], 0.0)
    one, finite = torch.ones(2, dtype=torch.float64), torch.tensor(True)
    gradients = ops.TaskGradients(accumulators, SEGMENT, one, mask=mask)
    gramians = ops.gramian(
        gradients._replace(history=accumulators), history_scale=one, backend="triton"
    )
    exact = kept.double() @ kept.double().T
    for products in (gramians.total, gramians.cross, gramians.cross_per_tensor[0]):
        assert torch.allclose(products, exact, rtol=1e-5, atol=1e-5)
    output = torch.empty(3000)
    ops.combine(gradients, [output], weights=one, finite=finite, backend="triton")
    assert torch.equal(output, kept[0].float() + kept[1].float())
    dropout, expected = ops.SignDropout(1, torch.tensor(2)), torch.empty(3000)
    for result, backend in ((output, "triton"), (expected, "python")):
        ops.graddrop(gradients, [result], finite=finite, dropout=dropout, backend=backend)
    assert torch.equal(output, expected)


@needs_interpreter
def test_a_chunk_beyond_2_31_elements():
    from gcond_kernels.triton_kernels import _accumulate

    size = 2**31 + 3000
    gradient, accumulator = (reserved(size, torch.bfloat16) for _ in range(2))
    gradient[-3000:] = torch.randn(3000).bfloat16()
    layout = ops.Layout((0,), (size,))
    plan = plans.plan(plans.keys_of([gradient]), layout, True, _accumulate.CHUNK, HERE)
    last = plan.chunks.table[-2:].contiguous()  # the others would take the interpreter hours
    _accumulate.accumulate_kernel[(2,)](
        accumulator, plan.table, last, 1.0, None, True, plan.types, _accumulate.CHUNK
    )
    assert torch.equal(accumulator[-3000:], gradient[-3000:])


@pytest.mark.parametrize("misplaced", ["nothing", "tensor", "offset", "storage"])
def test_what_is_not_aligned_is_marked(misplaced):
    address, offset = 2**20 + 4 * (misplaced == "tensor"), 32 + (misplaced == "offset")
    keys, layout = ((address,), (torch.float32,)), ops.Layout((offset,), (5,))
    plan = plans.plan(keys, layout, misplaced != "storage", 1024, HERE)
    assert bool(plan.table[0, 1] & plans.ALIGNED) == (misplaced == "nothing")
    storage = torch.zeros(2, 33)
    assert plans.is_aligned(storage[0], None)
    assert not plans.is_aligned(storage[0], storage[1])
    assert not plans.is_aligned(storage)  # its second accumulator


def test_chunks_of_tensors_beyond_2_31_are_counted_in_integers():
    sizes = (2**33 + 1, 0, 5)
    chunks = tables.chunk_table(sizes, 32768, HERE)
    assert chunks.total == 2**18 + 2
    assert chunks.first.tolist() == [0, 2**18 + 1, 2**18 + 1, 2**18 + 2]
    assert chunks.table[2**18].tolist() == [0, 2**18]
    assert chunks.table[-1].tolist() == [2, 0]


def decide(gramian, backend, norm_ema=0.0):
    """Return the arbitration of K tasks by a GCond with that average of norms."""
    K, method = len(gramian), GCond()
    state = method.new_state(K, HERE)
    state["norm_ema"] += norm_ema
    scale = torch.ones(K, dtype=torch.float64)
    return method.decide(Comparison(gramian, None, scale, backend=backend), state)


@needs_interpreter
def test_too_many_tasks_to_arbitrate_are_refused_with_the_number():
    with pytest.raises(ValueError, match="up to 64 tasks, not 65"):
        decide(torch.eye(65).double(), "triton")


@needs_interpreter
@pytest.mark.parametrize("tasks", [11, 32, 33])
def test_many_tasks_arbitrate_as_the_reference_does(tasks):
    g = filled(layout_of([50]), tasks, 0).double()
    g -= 0.9 * g.mean(0)
    norm_ema = torch.linspace(0.5, 2.0, tasks).double()
    a, b = (decide(g @ g.T, backend, norm_ema) for backend in ("python", "triton"))
    assert torch.equal(a.events[:, [0, 1, 3, 4]], b.events[:, [0, 1, 3, 4]])
    assert torch.allclose(a.weights, b.weights, rtol=1e-9, atol=1e-12)


def test_the_reason_why_it_is_unavailable_is_reported(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "CPU tensors alone" in ops.unavailable("triton", torch.device("cuda"))
    monkeypatch.setattr("triton.language.zeros", object.__new__(triton.JITFunction))
    assert "after Triton was imported" in ops.unavailable("triton", HERE)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in ops.unavailable("triton", HERE)
    assert ops.unavailable("triton", torch.device("cuda")) is None
    assert "not on mps" in ops.unavailable("triton", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(backends, "_cuda_unavailable", lambda _: "not here")
    turing = torch.device("cuda", 7)
    assert "8.0, this GPU has 7.5" in ops.unavailable("triton", turing)
    assert ops.backend_for("auto", turing).name == "python"
    backends._too_old.cache_clear()
    monkeypatch.setattr(backends, "_is_installed", lambda _: False)
    assert "pip install triton" in ops.unavailable("triton", torch.device("cuda"))
