"""Bytes, launches, host reads and allocations: how they are counted, and that none has grown."""

import functools
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import counting, record
from bench import counts as recording
from bench.counting import Counts, count
from gcond_kernels import ops
from tests.helpers import by_name

RECORD = record.read(recording.RECORD)
COUNTED = Counts._fields
IDENTITY = ("operation", "what", "by", "tasks", "parameters", "tensors")

# Beside the fewest bytes kernels move those of their tables, and gramian its sums, 3.1 % with eight
# tasks. One accumulator read once more would be 3.7 % of a resolution.
SLACK = 1.035


# ---- How it is counted ------------------------------------------------------------------------


def vector(elements=1000, dtype=torch.float32):
    return torch.ones(elements, dtype=dtype)


def moved(run):
    counted = count(run)
    return counted.launches, counted.bytes_moved


@pytest.mark.parametrize(
    ("run", "launches", "bytes_moved"),
    [
        (lambda x, y: x + y, 1, 12_000),
        (lambda x, y: x.add_(y), 1, 12_000),
        (lambda x, _: x.mul_(2.0), 1, 8_000),
        (lambda x, y: x.copy_(y), 1, 8_000),
        (lambda x, _: x.zero_(), 1, 4_000),
        (lambda x, y: torch.mul(x, 2.0, out=y), 1, 8_000),
        (lambda x, y: x.add_(y[:500].repeat(2)), 2, 2_000 + 4_000 + 12_000),
        (lambda x, _: x.sum(), 1, 4_004),
        (lambda x, _: x.to(torch.bfloat16), 1, 6_000),
        (lambda x, _: x.to(torch.float32), 0, 0),
        (lambda x, _: x.view(10, 100).T[3:].detach().unsqueeze(0).expand(7, -1, -1), 0, 0),
        (lambda x, _: x.view(10, 100).reshape(-1).unsqueeze_(0).split(100), 0, 0),
        (lambda x, y: x[:1].expand(1000) + y, 1, 4 + 8_000),
        (lambda *_: torch.zeros(100), 1, 400),
        (lambda *_: torch.empty(100), 0, 0),
        (lambda x, _: torch.empty_like(x).new_empty(3), 0, 0),
        (lambda x, _: torch.zeros_like(x).new_ones(3), 2, 4_000 + 12),
        (lambda x, y: x[:0] + y[:0], 0, 0),
        (lambda x, y: torch._foreach_add_([x, y], [y, x]), 1, 24_000),
        (lambda x, y: torch._foreach_mul([x, y], 2.0), 1, 16_000),
        (lambda x, y: torch._foreach_copy_([x[:10]], [y[:10]]), 1, 80),
        (lambda x, y: torch._foreach_zero_([x, y]), 1, 8_000),
        (lambda x, y: x @ y, 1, 8_004),
        (lambda x, y: x.view(10, 100) @ y.view(100, 10), 1, 8_400),
    ],
)
def test_bytes_and_launches_of_torch_operations(run, launches, bytes_moved):
    x, y = vector(), vector()
    assert moved(lambda: run(x, y)) == (launches, bytes_moved)


def test_a_backward_pass_is_counted():
    w, x = vector().requires_grad_(), vector()
    # w * x, and its sum; the gradient of the sum, one, is expanded to all, then multiplied.
    launches, bytes_moved = moved(lambda: (w * x).sum().backward())
    assert launches == 4
    assert bytes_moved == 12_000 + 4_004 + 4 + (4 + 4_000 + 4_000)


def test_allocations_are_storages_and_their_bytes():
    x = vector()
    counted = count(lambda: (x + x, x.view(10, 100), torch.empty(5), x.add_(1.0), x[:0] + 1.0))
    assert (counted.allocations, counted.allocated_bytes) == (2, 4_000 + 20)
    counted = count(lambda: torch._foreach_neg([x, x[:10]]))
    assert (counted.allocations, counted.allocated_bytes) == (2, 4_040)


ONE = torch.tensor([1.0])


@pytest.mark.parametrize(
    ("read", "times"),
    [
        (lambda: ONE.item(), 1),
        (lambda: ONE.tolist(), 1),
        (lambda: ONE.numpy(), 1),
        (lambda: np.asarray(ONE), 1),
        (lambda: ONE.double().cpu().numpy(), 1),
        (lambda: bool(ONE), 1),
        (lambda: not ONE, 1),
        (lambda: int(ONE), 1),
        (lambda: float(ONE), 1),
        (lambda: math.sqrt(ONE), 1),
        (lambda: range(torch.tensor(2)), 1),
        (lambda: ONE.is_nonzero(), 1),
        (lambda: torch.is_nonzero(ONE), 1),
        (lambda: ONE.nonzero(), 1),
        (lambda: torch.equal(ONE, ONE), 1),
        (lambda: ONE[ONE > 0.0], 1),
        (lambda: torch.masked_select(ONE, ONE > 0.0), 1),
        (lambda: torch.unique(ONE), 1),
        (lambda: torch.linalg.eigh(ONE.view(1, 1)), 1),
        (lambda: (ONE.item(), float(ONE)), 2),
        (lambda: ONE[torch.tensor([0])], 0),
        (lambda: torch.where(ONE > 0.0, ONE, 0.0), 0),
        (lambda: ONE.cpu().sum().max(), 0),
    ],
)
def test_every_read_by_the_host_is_counted_once(read, times):
    assert count(read).synchronisations == times


def test_a_copy_to_the_host_waits():
    far, near = torch.ones(1, device="meta"), torch.ones(1)  # no GPU needs to be there
    waits = functools.partial(counting._waits, torch.ops.aten._to_copy.default)
    assert waits([far], [far], [near])
    assert not waits([near], [near], [far])
    assert not waits([far], [far], [far])


@pytest.mark.parametrize(("on_accelerator", "waits"), [(True, 1), (False, 2)])
def test_beside_a_gpu_reads_of_cpu_tensors_are_no_waits(on_accelerator, waits):
    tally = counting._Tally()
    tally.waits.update(cpu=2, cuda=1 * on_accelerator)
    tally.on_accelerator = on_accelerator
    assert tally.counts().synchronisations == waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_reads_of_a_gpu_are_counted_and_those_of_the_host_are_not():
    x = torch.ones(3, device="cuda")
    assert count(lambda: x.cpu().tolist()).synchronisations == 1
    assert count(lambda: (x.sum().item(), ONE.item())).synchronisations == 1
    assert count(lambda: (x + 1, ONE.item())).synchronisations == 0


def needs(backend):
    reason = ops.unavailable(backend, torch.device("cpu"))
    return pytest.mark.skipif(reason is not None, reason=f"backend {backend!r}: {reason}")


@needs("triton")
def test_nothing_is_left_behind():
    from triton.runtime import interpreter, jit

    owners = [interpreter.InterpreterBuilder, interpreter.GridExecutor, jit.JITFunction]
    if ops.unavailable("cuda", torch.device("cpu")) is None:
        owners.append(importlib.import_module("gcond_kernels._cuda"))
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 / 0)
    assert [dict(vars(owner)) for owner in owners] == before
    assert count(lambda: None) == Counts(0, 0, 0, 0, 0)


BACKENDS = [pytest.param(backend, marks=needs(backend)) for backend in ops.BACKENDS]


def accumulation(backend, dtype=torch.float32):
    target, gradients = vector(), [vector(100, dtype), None, vector(333, dtype)]
    return lambda: by_name.accumulate(
        target, gradients, ([0, 100, 400], [100, 300, 333]), backend=backend
    )


@needs("triton")
def test_interpreted_kernels_count_what_their_masks_let_through():
    # Three chunks, each of which reads two numbers of its own, of 4 bytes, and four of its tensor.
    tables = 3 * (8 + 32)
    assert moved(accumulation("triton")) == (1, tables + 433 * (4 + 8))
    assert moved(accumulation("triton", torch.bfloat16)) == (1, tables + 433 * (2 + 8))


@needs("triton")
def test_an_unsupported_interpreter_is_detected(monkeypatch):
    import triton.runtime.interpreter as interpreter

    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_masked_load")
    counting.interpreter_problem.cache_clear()
    try:
        assert "create_masked_load(self, ptrs, mask, ...)" in counting.interpreter_problem()
    finally:
        counting.interpreter_problem.cache_clear()


@needs("triton")
def test_loads_and_stores_are_counted_with_older_signatures():
    class Builder:  # as in Triton 3.6, where hints came one by one
        def create_masked_load(*_):
            return "loaded"

        def create_masked_store(*_, **__):
            return "stored"

    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    pointers = TensorHandle(np.zeros(4, dtype=np.uint64), tl.pointer_type(tl.bfloat16))
    mask = TensorHandle(np.array([True, False, True, True]), tl.int1)
    tally = counting._Tally()
    with counting._accesses(Builder, tally):
        builder = Builder()
        assert builder.create_masked_load(pointers, mask, None, None, None, False) == "loaded"
        assert builder.create_masked_store(pointers, None, mask, None, eviction=None) == "stored"
    assert tally.bytes_moved == 2 * 3 * 2


NO_LAUNCHES = {"use_exchange", "device_problem", "kernels_in_use", "kernels_here", "use_kernels"}


@pytest.mark.parametrize(
    ("backend", "counted"),
    [
        pytest.param("cuda", counting.LAUNCHES_OF_CALLS, marks=needs("cuda")),
        pytest.param("cpu", counting.CALLS_ON_THE_CPU, marks=needs("cpu")),
    ],
)
def test_calls_of_an_extension_count_as_the_launches_they_make(backend, counted):
    assert moved(accumulation(backend)) == (1, None)
    module = importlib.import_module(f"gcond_kernels._{backend}")
    functions = {name for name in dir(module) if name.islower() and not name.startswith("_")}
    assert functions - NO_LAUNCHES == set(counted)


def test_the_sources_launch_as_often_as_is_counted():
    sources = Path(__file__).parents[2] / "csrc" / "cuda"
    for name, launches in counting.LAUNCHES_OF_CALLS.items():
        file = {"find_factors": "combine", "find_clip_factor": "combine"}.get(name, name)
        text = (sources / f"{file}.cu").read_text(encoding="utf-8")
        start = text.rindex(f"\nvoid {name}(")
        body = text[start : text.index("\n}\n", start)]
        found = (text if name == "gramian" else body).count(" launch(") == launches
        assert found, (
            f"{file}.cu: {name} no longer makes {launches} launches: see LAUNCHES_OF_CALLS"
        )


@pytest.mark.parametrize("backend", BACKENDS[:1] + BACKENDS[2:])
def test_a_first_call_counts_as_any_other(backend):
    for case in recording.cases(backend):
        assert count(case.run) == count(case.run), case


# ---- None has grown ---------------------------------------------------------------------------


def differences(figures):
    """What differs from the record, a sentence each."""
    recorded = {tuple(figure[field] for field in IDENTITY): figure for figure in RECORD["figures"]}
    said = []
    for figure in figures:
        named = "{operation} {what} by {by}, K = {tasks}".format_map(figure).replace("  ", " ")
        before = recorded.get(tuple(figure[field] for field in IDENTITY))
        if before is None:
            said.append(f"{named}: nothing is recorded")
            continue
        for quantity in COUNTED:
            old, new = before[quantity], figure[quantity]
            if old != new:
                how = "grew" if None in (old, new) or new > old else "shrank"
                said.append(f"{named}: {quantity} {how}: {old} -> {new}")
    return said


def explained(said):
    return "\n".join([*said, f"If that is meant, record it: {recording.COMMAND}"])


@functools.cache
def figures_of(backend):
    return list(recording.figures_of(backend))


def skip_other_versions(backend):
    """Torch decides what its operations are made of, and Triton what can be counted."""
    here, recorded = torch.__version__, RECORD["machine"]["torch"]
    if backend == "python" and here.split("+")[0] != recorded.split("+")[0]:
        pytest.skip(
            f"operations of torch {here} were not counted: the record is of torch {recorded}"
        )
    if backend == "triton" and counting.interpreter_problem():
        pytest.skip(counting.interpreter_problem())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_count_has_changed(backend):
    skip_other_versions(backend)
    said = differences(figures_of(backend))
    assert not said, explained(said)


def test_everything_recorded_is_counted_still():
    counted = {case[:4] for backend in ops.BACKENDS for case in recording.cases(backend)}
    recorded = {tuple(figure[field] for field in IDENTITY[:4]) for figure in RECORD["figures"]}
    assert recorded == counted, explained([])


@needs("triton")
def test_kernels_move_few_bytes_beyond_the_fewest():
    skip_other_versions("triton")
    budgeted = [figure for figure in figures_of("triton") if "budget_per_parameter" in figure]
    assert {figure["operation"] for figure in budgeted} == set(ops.OPERATIONS) - {"arbitrate"}
    for figure in budgeted:
        fewest = figure["budget_per_parameter"]
        assert fewest <= figure["moved_per_parameter"] <= SLACK * fewest, figure


def test_fewest_bytes_are_those_computed_by_hand():
    operations = ("gramian", "combine", "graddrop", "arbitrate")
    assert [recording.budget(name, "", 2) for name in operations] == [12, 24, 20, None]
    turns = recording.FIRST, recording.LATER
    assert [recording.budget("accumulate", turn, 1) for turn in turns] == [8, 12]
    assert recording.budget("resolve", "", 8) == 48 + 60


# ---- And would be seen if it had --------------------------------------------------------------

FAULTS = {
    "launches": lambda accumulator: accumulator.mul_(1.0),
    "synchronisations": lambda accumulator: accumulator[0].item(),
    "allocations": lambda _: torch.empty(1),
    "allocated_bytes": lambda accumulator: accumulator.clone(),
}


@pytest.mark.parametrize("quantity", [*FAULTS, "bytes_moved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_in_a_backend_shows(backend, quantity, monkeypatch):
    skip_other_versions(backend)
    if backend in ("cuda", "cpu") and quantity == "bytes_moved":
        pytest.skip("its bytes are not counted")
    found = ops.backend_for(backend, torch.device("cpu"))
    accumulate = found.accumulate

    def faulty(accumulator, *others):
        if quantity in FAULTS:
            FAULTS[quantity](accumulator)
        else:
            accumulate(accumulator, *others)
        accumulate(accumulator, *others)

    monkeypatch.setattr(found, "accumulate", faulty)
    case = next(recording.cases(backend))
    said = differences([recording.figure_of(case, count(case.run))])
    named = f"accumulate first micro-batch by {backend}, K = 1: {{}} grew: "
    expected = [quantity] if quantity in FAULTS else [quantity, "launches"]
    for each in expected:
        assert any(sentence.startswith(named.format(each)) for sentence in said), said
    assert recording.COMMAND in explained(said)


def test_a_count_that_shrank_is_to_be_recorded():
    figure = dict(RECORD["figures"][0])
    figure["launches"] -= 1
    old, new = RECORD["figures"][0]["launches"], figure["launches"]
    (said,) = differences([figure])
    assert said.endswith(f": launches shrank: {old} -> {new}")
    assert differences([figure | {"tasks": 99}])[0].endswith("K = 99: nothing is recorded")
