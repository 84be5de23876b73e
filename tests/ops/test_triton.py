"""What is particular to the Triton backend: plans, far offsets, what it says when it cannot."""

import importlib
import mmap

import pytest
import torch

from gcond_kernels import ops
from gcond_kernels.methods.method import Comparison
from gcond_kernels.ops import backends
from tests.helpers import by_name
from tests.helpers.flat import filled, layout_of, random_mask

triton = pytest.importorskip("triton", reason="Triton is not installed")
triton_kernels = pytest.importorskip("gcond_kernels.triton_kernels")
from gcond_kernels.ops import launch_tables as tables

accumulating = importlib.import_module("gcond_kernels.triton_kernels._accumulate")

HERE = torch.device("cpu")
# On a GPU machine the kernels are not interpreted: tests/gpu checks these things there.
needs_interpreter = pytest.mark.skipif(
    ops.unavailable("triton", HERE) is not None,
    reason=f"no Triton on CPU tensors: {ops.unavailable('triton', HERE)}",
)


def accumulate(accumulator, gradients, layout):
    by_name.accumulate(accumulator, gradients, layout, overwrite=True, backend="triton")


@needs_interpreter
def test_a_plan_is_found_again_by_addresses_types_and_sizes_alone():
    layout = layout_of([5, 7])
    storage = torch.arange(1, 65).float()  # no bits of these are a NaN of another type
    accumulator = torch.zeros(layout.length)

    def misses(gradients, layout=layout):
        before = tables.plan.cache_info().misses
        accumulate(accumulator, gradients, layout)
        return tables.plan.cache_info().misses - before

    assert misses([storage[:5], storage[32:39]]) == 1
    assert misses([storage[:5], storage[32:39]]) == 0  # other objects, same addresses
    assert misses([storage[:5], None]) == 1
    assert misses([storage[1:6], storage[32:39]]) == 1
    assert misses([storage[:5].view(torch.int32).view(torch.float32), storage[32:39]]) == 0
    halves = storage.view(torch.bfloat16)
    assert misses([halves[:5], halves[64:71]]) == 1  # same addresses, another type
    assert torch.equal(accumulator[:5], halves[:5].float())
    assert misses([halves.view(torch.float16)[:5], halves[64:71]]) == 1
    assert torch.equal(accumulator[:5], halves.view(torch.float16)[:5].float())
    assert misses([storage[:4], storage[32:39]], layout_of([4, 7])) == 1


@pytest.fixture
def captured(monkeypatch):
    """As while a CUDA graph is captured: what is not in a table yet cannot be copied to the GPU."""
    copied, plan = tables.to_device, tables.plan
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)

    def no_copies(array, device):
        if tables.is_capturing(device):
            raise tables.CaptureMissError("run it once before the capture")
        return copied(array, device)

    monkeypatch.setattr(tables, "to_device", no_copies)
    monkeypatch.setattr(tables, "plan", plan.__wrapped__)  # on the CPU addresses come back
    return lambda on: monkeypatch.setattr(tables, "is_capturing", lambda device: on)


@needs_interpreter
def test_tensors_that_a_capture_meets_first(captured):
    """Their addresses travel with launches: 70 tensors, more than one launch takes."""
    layout = layout_of([5, 0, 3000, 8] * 17 + [4, 1])
    gradients = [torch.randn(size) for size in layout.sizes]
    gradients[0] = gradients[3] = None
    expected = filled(layout, 1, 0)[0]
    row = expected.clone()
    tables.table_without_addresses.cache_clear()
    with pytest.raises(tables.CaptureMissError, match="before the capture"):
        by_name.accumulate(row, gradients, layout, backend="triton")
    captured(False)
    for _ in range(2):
        by_name.accumulate(expected, gradients, layout, backend="triton")
    by_name.accumulate(row, gradients, layout, backend="triton")
    captured(True)
    gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
    by_name.accumulate(row, gradients, layout, backend="triton")
    assert torch.equal(row, expected)


@needs_interpreter
def test_elements_beyond_2_31():
    # Memory that is only reserved: nothing but the pages that are used becomes real.
    far, row = 2**31 + 4096, 2**31 + 8192
    accumulators, history = (
        torch.frombuffer(mmap.mmap(-1, 2 * row * 2), dtype=torch.bfloat16).view(2, row)
        for _ in range(2)
    )
    values = torch.randn(2, 3000).bfloat16()
    one = torch.ones(2, dtype=torch.float64)
    for k in range(2):
        by_name.accumulate(
            accumulators[k], [values[k]], ([far], [3000]), overwrite=True, backend="triton"
        )
        assert torch.equal(accumulators[k, far : far + 3000], values[k])
    products = by_name.gramian(
        accumulators, ([far], [3000]), scale=one, history=history, history_scale=one,
        backend="triton",
    )  # fmt: skip
    exact = values.double() @ values.double().T
    assert torch.allclose(products.total, exact, rtol=1e-5, atol=1e-5)
    output = torch.empty(3000)
    by_name.combine(
        accumulators, [output], ([far], [3000]), weights=one, scale=one, finite=torch.tensor(True),
        per_tensor=products.per_tensor, history=history, backend="triton",
    )  # fmt: skip
    assert torch.equal(output, values[0].float() + values[1].float())
    assert torch.equal(history[:, far : far + 3000], values)


@needs_interpreter
def test_masks_beyond_2_31():
    far, row = 2**31 + 4096, 2**31 + 8192
    accumulators = torch.frombuffer(mmap.mmap(-1, row * 4), dtype=torch.bfloat16).view(2, row)
    mask = torch.frombuffer(mmap.mmap(-1, row // 8), dtype=torch.int32)
    trained, mask[far // 32 : far // 32 + 94] = random_mask(94 * 32, 0)
    values = accumulators[:, far : far + 3000] = torch.randn(2, 3000).bfloat16()
    kept = values.masked_fill(~trained[:3000], 0.0)
    given = {"scale": torch.ones(2, dtype=torch.float64), "mask": mask}
    products = by_name.gramian(
        accumulators, ([far], [3000]), **given, history=accumulators,
        history_scale=given["scale"], backend="triton",
    )  # fmt: skip
    exact = kept.double() @ kept.double().T
    for sums in (products.total, products.cross, products.cross_per_tensor[0]):
        assert torch.allclose(sums, exact, rtol=1e-5, atol=1e-5)
    output, given["finite"] = torch.empty(3000), torch.tensor(True)
    by_name.combine(
        accumulators, [output], ([far], [3000]), **given, weights=given["scale"],
        per_tensor=products.per_tensor, backend="triton",
    )  # fmt: skip
    assert torch.equal(output, kept[0].float() + kept[1].float())
    picked = []
    for backend in ("triton", "python"):
        output = torch.empty(3000)
        by_name.graddrop(
            accumulators, [output], ([far], [3000]), **given, seed=1, counter=torch.tensor(2),
            backend=backend,
        )  # fmt: skip
        picked.append(output)
    assert torch.equal(*picked)


@needs_interpreter
def test_a_piece_beyond_2_31_elements():
    size = 2**31 + 3000
    gradient, row = (
        torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.bfloat16) for _ in range(2)
    )
    gradient[-3000:] = torch.randn(3000).bfloat16()
    plan = tables.plan(tables.keys_of([gradient]), (0,), (size,), True, accumulating.CHUNK, HERE)
    last = plan.chunks.table[-2:].contiguous()  # the others would take the interpreter hours
    accumulating.accumulate_kernel[(2,)](
        row, plan.table, last, 1.0, None, True, plan.types, accumulating.CHUNK
    )
    assert torch.equal(row[-3000:], gradient[-3000:])


@pytest.mark.parametrize("misplaced", ["nothing", "tensor", "offset", "row"])
def test_what_is_not_aligned_is_marked(misplaced):
    address, offset = 2**20 + 4 * (misplaced == "tensor"), 32 + (misplaced == "offset")
    plan = tables.plan(
        ((address,), (torch.float32,)), (offset,), (5,), misplaced != "row", 1024, HERE
    )
    assert bool(plan.table[0, 1] & tables.ALIGNED) == (misplaced == "nothing")
    storage = torch.zeros(2, 33)
    assert tables.is_aligned(storage[0], None)
    assert not tables.is_aligned(storage[0], storage[1])
    assert not tables.is_aligned(storage)  # its second row


def test_pieces_of_tensors_beyond_2_31_are_counted_in_integers():
    sizes = (2**33 + 1, 0, 5)
    chunks = tables.chunk_table(sizes, 32768, HERE)
    assert chunks.total == 2**18 + 2
    assert chunks.first.tolist() == [0, 2**18 + 1, 2**18 + 1, 2**18 + 2]
    assert chunks.table[2**18].tolist() == [0, 2**18]
    assert chunks.table[-1].tolist() == [2, 0]


@needs_interpreter
def test_too_many_tasks_to_arbitrate_are_refused_with_the_number():
    from gcond_kernels import GCond

    state = GCond().new_state(65, HERE)
    with pytest.raises(ValueError, match="up to 64 tasks, not 65"):
        GCond().decide(
            Comparison(torch.eye(65).double(), None, torch.ones(65).double(), backend="triton"),
            state,
        )


@needs_interpreter
@pytest.mark.parametrize("tasks", [11, 32, 33])
def test_many_tasks_arbitrate_as_the_reference_does(tasks):
    from gcond_kernels import GCond

    layout = layout_of([50])
    g = filled(layout, tasks, 0).double()
    g -= 0.9 * g.mean(0)
    method = GCond()
    decisions = []
    for backend in ("python", "triton"):
        state = method.new_state(tasks, HERE)
        state["norm_ema"] += torch.linspace(0.5, 2.0, tasks).double()
        decisions.append(
            method.decide(
                Comparison(g @ g.T, None, torch.ones(tasks).double(), backend=backend), state
            )
        )
    a, b = decisions
    assert torch.equal(a.events[:, [0, 1, 3, 4]], b.events[:, [0, 1, 3, 4]])
    assert torch.allclose(a.weights, b.weights, rtol=1e-9, atol=1e-12)


def test_what_stands_in_the_way_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "CPU tensors alone" in ops.unavailable("triton", torch.device("cuda"))
    monkeypatch.setattr("triton.language.zeros", object.__new__(triton.JITFunction))
    assert "after Triton was imported" in ops.unavailable("triton", HERE)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in ops.unavailable("triton", HERE)
    assert ops.unavailable("triton", torch.device("cuda")) is None
    assert "not on mps" in ops.unavailable("triton", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backends, "_cuda_unavailable", lambda device: "not here")
    turing = torch.device("cuda", 7)
    assert "8.0, this GPU has 7.5" in ops.unavailable("triton", turing)
    assert ops.backend_for("auto", turing).name == "python"
    backends._too_old.cache_clear()
    monkeypatch.setattr(backends, "_is_installed", lambda module: False)
    assert "pip install triton" in ops.unavailable("triton", torch.device("cuda"))
