"""What is particular to the CUDA C++ backend: one launch, many tensors, what it refuses.

Here its code runs on the host (GCOND_CUDA_HOST=1); tests/gpu checks the launches.
"""

import math
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels import GCond, GCondFused, LionLars, ops
from gcond_kernels.methods.method import Comparison
from gcond_kernels.ops import backends
from tests.helpers import by_name
from tests.helpers.flat import layout_of, misaligned, packed_layout_of, random_mask, rows, unwritten
from tests.helpers.sizes import SIZE_LISTS, SIZES_AT_BOUNDARIES

CPU = torch.device("cpu")
UNAVAILABLE = ops.unavailable("cuda", CPU)
needs_host_driver = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


class Problem:
    """What a resolution reads and writes, the same for the same seed."""

    def __init__(
        self,
        sizes,
        tasks,
        seed,
        *,
        history,
        momentum,
        dtype,
        method,
        broken,
        packed=False,
        masked=False,
    ):
        layout = packed_layout_of(sizes) if packed else layout_of(sizes)
        self.layout, self.method = layout, method
        self.accumulators = rows(layout, tasks, seed, dtype)
        self.accumulators -= 0.9 * self.accumulators.float().mean(0).to(dtype)
        if broken and layout.length:
            self.accumulators[-1, 0] = math.inf
        self.history = None if history is None else rows(layout, tasks, seed + 1, history)
        self.momentum = rows(layout, 1, seed + 2)[0] if momentum else None
        self.mask = None
        if masked:
            trained, self.mask = random_mask(layout.length, seed + 3)
            self.accumulators[:, ~trained] = math.nan
        self.steps = torch.arange(len(sizes)) if momentum else None
        self.outputs = []
        for t, size in enumerate(sizes):
            made = unwritten(size, dtype=[torch.float32, torch.bfloat16, torch.float16][t % 3])
            self.outputs.append(None if (seed + t) % 5 == 0 else made)
            if (seed + t) % 7 == 0:
                self.outputs[-1] = misaligned(made)
        self.scale = torch.tensor([0.5 + 0.25 * k for k in range(tasks)], dtype=torch.float64)
        if tasks > 2:
            self.scale[1] = 0.0  # sits this step out
        self.state = method.new_state(tasks, CPU)
        self.state["history_scale"] += 1.0
        self.state["history_gramian"] += 100.0 * torch.eye(tasks, dtype=torch.float64)

    def run(self, at_once, monkeypatch, **options):
        """Everything that a resolution returns or changes."""
        from gcond_kernels import cuda

        monkeypatch.setattr(cuda, "resolves_at_once", lambda _gradients: at_once)
        products, decision = by_name.resolve(
            self.accumulators, self.outputs, self.layout, scale=self.scale,
            state=self.state, settings=self.method, history=self.history,
            momentum=self.momentum, momentum_steps=self.steps,
            beta=0.0 if self.momentum is None else 0.9, mask=self.mask, backend="cuda", **options,
        )  # fmt: skip
        given = [self.accumulators, self.history, self.momentum, self.steps, *self.outputs]
        return [*given, *self.state.values(), *products, *decision]


def same_bits(a, b):
    """NaN included: events have it where there is none."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


METHODS = st.sampled_from(
    [GCond(), GCond.published(), GCond.paper(), GCond(arbitration="zones", norm_cap=1.0)]
)


@needs_host_driver
@given(
    st.one_of(SIZE_LISTS, st.lists(st.sampled_from(SIZES_AT_BOUNDARIES), min_size=1, max_size=3)),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.sampled_from([None, torch.bfloat16, torch.float32, torch.float16]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    METHODS,
    st.sampled_from([False, False, False, True]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_one_launch_gives_the_bits_of_the_operations_apart(
    sizes, tasks, seed, history, momentum, dtype, method, broken, clip, packed, masked
):
    options = {"max_norm": 0.1} if clip else {}
    given = {"history": history, "momentum": momentum, "dtype": dtype, "method": method}
    given |= {"packed": packed, "masked": masked}
    results = []
    for at_once in (True, False):
        with pytest.MonkeyPatch.context() as monkeypatch:
            problem = Problem(sizes, tasks, seed, **given, broken=broken)
            results.append(problem.run(at_once, monkeypatch, **options))
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert same_bits(a, b), number
    assert not any(out.isnan().any() for out in problem.outputs if out is not None)


@needs_host_driver
@pytest.mark.parametrize("sizes", [[4096, 5000], [4099, 5000], [3, 8192, 4101], [8, 4096]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_no_vector_is_read_where_none_may_begin(sizes, dtype, shift):
    """On the host a misaligned vector is an error; here rows, tensors and starts are misaligned."""
    layout = packed_layout_of(sizes)
    length = layout.length + 3  # the second row begins somewhere
    accumulators = unwritten(2 * length + shift, dtype=dtype)[shift:].view(2, length)
    accumulators.copy_(torch.randn(2, length))
    history = torch.randn(2, length).bfloat16()
    gradients = [misaligned(torch.randn(size)) for size in sizes]
    by_name.accumulate(accumulators[1], gradients, layout, backend="cuda")
    method = GCond()
    one = torch.ones(2, dtype=torch.float64)
    mask = torch.full((-(-length // 32),), -1, dtype=torch.int32)
    options = {"beta": 0.5, "mask": mask, "backend": "cuda"}
    by_name.graddrop(
        accumulators, gradients, layout, scale=one, finite=torch.tensor(True),
        seed=0, counter=torch.tensor(0), momentum=torch.zeros(length),
        momentum_steps=torch.zeros(len(sizes), dtype=torch.int64), **options,
    )  # fmt: skip
    products, decision = by_name.resolve(
        accumulators, gradients, layout, scale=one,
        state=method.new_state(2, CPU), settings=method, history=history,
        momentum=torch.zeros(length), momentum_steps=torch.zeros(len(sizes), dtype=torch.int64),
        **options,
    )  # fmt: skip
    used = accumulators[:, : layout.length].double()
    # Float32 sums of 16 thousand products at most.
    assert torch.allclose(products.total, used @ used.T, rtol=1e-4, atol=1e-2)
    expected = decision.weights @ used
    assert torch.allclose(torch.cat(gradients).double(), expected, rtol=1e-5, atol=1e-5)
    ops.multi_tensor_cosine_similarity(gradients, list(layout.split(history[1])), backend="cuda")


@needs_host_driver
def test_the_optimizer_resolves_in_one_call(monkeypatch):
    from gcond_kernels import cuda

    calls = []
    resolve = cuda.resolve
    monkeypatch.setattr(cuda, "resolve", lambda *given: calls.append(1) or resolve(*given))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GCondFused(torch.optim.SGD([p], lr=1.0), {"a": 1.0, "b": 1.0}, backend="cuda")
    for windows in (0, 1):  # the first shows that the tasks share all there is
        optimizer.backward({"a": p.sum(), "b": -0.9 * p.sum()})
        assert len(calls) == windows
        optimizer.step()
    assert optimizer.report().zone == "critical"


@needs_host_driver
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("update", [None, LionLars(), "max_norm"])
def test_more_tensors_than_one_launch_holds(momentum, update):
    from gcond_kernels import _cuda

    def written(backend):
        torch.manual_seed(0)
        shapes = [int(size) for size in torch.randint(0, 9, (_cuda.MAX_TENSORS + 203,))]
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in shapes]
        options = {"max_norm": 1.0} if update == "max_norm" else {"update": update}
        optimizer = GCondFused(
            torch.optim.SGD(parameters, lr=0.0), {"a": 1.0, "b": 1.0}, momentum=momentum,
            backend=backend, **options,
        )  # fmt: skip
        for _ in range(2):
            a = sum((p * torch.randn(p.shape)).sum() for p in parameters[1:])
            b = sum((p * torch.randn(p.shape)).sum() for p in parameters[1:]) - 0.8 * a
            optimizer.backward({"a": a, "b": b})
            optimizer.step()
        norms = ops.multi_tensor_norm(parameters, per_tensor=True, backend=backend)
        cosine = ops.multi_tensor_cosine_similarity(
            parameters, [p.sign() for p in parameters], backend=backend
        )
        grads = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        return grads, norms, cosine, ops.multi_tensor_norm(parameters, backend=backend)

    for ours, reference in zip(written("cuda"), written("python"), strict=True):
        # Float32 sums in another order.
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@needs_host_driver
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_weights_and_signs_of_more_tensors_than_one_launch_holds(beta):
    from gcond_kernels import _cuda

    sizes = torch.randint(0, 9, (_cuda.MAX_TENSORS + 203,)).tolist()
    layout = layout_of(sizes)
    accumulators, scale = rows(layout, 2, 0), torch.ones(2, dtype=torch.float64)
    weights = torch.randn(len(sizes), 2, dtype=torch.float64)
    _, mask = random_mask(layout.length, 1)
    results = {}
    for backend in ("cuda", "python"):
        given = {"scale": scale, "finite": torch.tensor(True), "mask": mask, "backend": backend}
        if beta:
            given["momentum"] = rows(layout, 1, 2)[0]
            given |= {"beta": beta, "momentum_steps": torch.arange(len(sizes))}
        products = by_name.gramian(
            accumulators, layout, scale=scale, history=accumulators,
            history_scale=scale, mask=mask, momentum=given.get("momentum"), backend=backend,
        )  # fmt: skip
        weighted, picked = ([unwritten(size) for size in sizes] for _ in range(2))
        by_name.combine(
            accumulators, weighted, layout, weights=weights,
            per_tensor=products.per_tensor, max_norm=1.0, **given,
        )  # fmt: skip
        by_name.graddrop(accumulators, picked, layout, seed=3, counter=torch.tensor(5), **given)
        results[backend] = [torch.cat(weighted), torch.cat(picked), *products]
    for ours, reference in zip(*results.values(), strict=True):
        # Float32 sums in another order.
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@needs_host_driver
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
            accumulators[k], [values[k]], ([far], [3000]), overwrite=True, backend="cuda"
        )
        assert torch.equal(accumulators[k, far : far + 3000], values[k])
    method = GCond()
    output = unwritten(3000)
    products, decision = by_name.resolve(
        accumulators, [output], ([far], [3000]), scale=one, state=method.new_state(2, CPU),
        settings=method, history=history, backend="cuda",
    )  # fmt: skip
    exact = values.double() @ values.double().T
    assert torch.allclose(products.total, exact, rtol=1e-5, atol=1e-5)
    expected = (decision.weights[:, None] * values.double()).sum(0)
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(history[:, far : far + 3000], values)

    mask = torch.frombuffer(mmap.mmap(-1, row // 8), dtype=torch.int32)
    mask[far // 32 : far // 32 + 3000 // 64] = -1
    trained = 3000 // 64 * 32
    masked = by_name.gramian(
        accumulators, ([far], [3000]), scale=one, mask=mask, backend="cuda"
    ).total
    exact = values[:, :trained].double() @ values[:, :trained].double().T
    assert torch.allclose(masked, exact, rtol=1e-5, atol=1e-5)
    picked = {backend: unwritten(3000) for backend in ("cuda", "python")}
    for backend, output in picked.items():
        by_name.graddrop(
            accumulators, [output], ([far], [3000]), scale=one, finite=torch.tensor(True), seed=0,
            counter=torch.tensor(0), mask=mask, backend=backend,
        )  # fmt: skip
    assert torch.equal(*picked.values())
    assert (picked["cuda"] != 0.0).nonzero().max() == trained - 1


@needs_host_driver
def test_up_to_64_tasks_are_arbitrated_and_more_are_an_error():
    method = GCond()
    for tasks in (64, 65):
        g = torch.randn(tasks, 80, dtype=torch.float64)
        state = method.new_state(tasks, CPU)
        scale = torch.ones(tasks, dtype=torch.float64)
        if tasks > 64:
            with pytest.raises(ValueError, match="up to 64 tasks, not 65: use backend='python'"):
                method.decide(Comparison(g @ g.T, None, scale, backend="cuda"), state)
            return
        weights = method.decide(Comparison(g @ g.T, None, scale, backend="cuda"), state).weights
        state = method.new_state(tasks, CPU)
        expected = method.decide(Comparison(g @ g.T, None, scale, backend="python"), state).weights
        assert torch.allclose(weights, expected, rtol=1e-9)


@needs_host_driver
def test_a_resolution_that_cannot_be_done_changes_nothing():
    with pytest.MonkeyPatch.context() as monkeypatch:
        problem = Problem(
            [50], 2, 0, history=torch.bfloat16, momentum=True, dtype=torch.float32,
            method=GCond(), broken=False,
        )  # fmt: skip
        before = [t.clone() for t in (problem.accumulators, problem.history, problem.momentum)]
        with pytest.raises(ValueError, match="max_norm must be above 0"):
            problem.run(True, monkeypatch, max_norm=-1.0)
        problem.state["norm_ema"] = torch.zeros(3).double()
        with pytest.raises(ValueError, match=r"norm_ema must be \[2\]"):
            problem.run(True, monkeypatch)
    assert all(map(torch.equal, before, (problem.accumulators, problem.history, problem.momentum)))


@needs_host_driver
def test_what_the_module_itself_refuses():
    from gcond_kernels import _cuda

    for tensors, message in (
        ([torch.ones(1)] * 1001, "at most 1000 tensors in a launch, not 1001"),
        ([torch.ones(1).int()], "a tensor of a type that no kernel reads"),
    ):
        with pytest.raises(ValueError, match=message):
            _cuda.TensorList(tensors)


@pytest.mark.skipif(
    "not built" in (UNAVAILABLE or ""), reason=f"of a module that is there: {UNAVAILABLE}"
)
def test_without_the_variable_cpu_tensors_are_refused():
    code = """
import torch
from gcond_kernels import ops
print(ops.unavailable("cuda", torch.device("cpu")))
try:
    ops.multi_tensor_norm([torch.ones(3)], backend="cuda")
except RuntimeError as error:
    print(error)
"""
    variables = {k: v for k, v in os.environ.items() if k != "GCOND_CUDA_HOST"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    reason = (
        "its kernels need a GPU; with GCOND_CUDA_HOST=1 in the environment they run on the CPU, "
        "compiled for it, which is for tests"
    )
    assert run.stdout.splitlines() == [
        reason,
        f"backend='cuda' cannot be used on cpu: {reason}",
    ]


def test_what_is_said_where_the_extension_is_not_built(monkeypatch):
    monkeypatch.setattr(backends, "_is_installed", lambda module: module != "gcond_kernels._cuda")
    for device in ("cpu", "cuda"):
        assert "not built: GCOND_BUILD_CUDA=1 pip install ." in ops.unavailable(
            "cuda", torch.device(device)
        )


def test_a_module_that_cannot_be_imported_is_a_reason_and_no_crash(monkeypatch):
    def fails(name):
        raise ImportError(f"{name}: GLIBC_9.9 not found")

    monkeypatch.setattr(backends.importlib, "import_module", fails)
    said = "its extension is there, but cannot be imported: gcond_kernels.cuda: GLIBC_9.9 not found"
    assert backends._cuda_problem(torch.device("cuda", 0)) == said
    if UNAVAILABLE is None:
        assert ops.unavailable("cuda", CPU) == said


def test_auto_takes_the_first_that_is_there(monkeypatch):
    there = {"python", "triton"}
    monkeypatch.delenv("GCOND_BACKEND", raising=False)
    monkeypatch.setattr(
        backends, "unavailable", lambda b, _device: None if b in there else "not here"
    )
    gpu = torch.device("cuda")
    assert ops.backend_for("auto", gpu).name == "triton"
    there.add("cuda")
    assert ops.backend_for("auto", gpu).name == "cuda"
    assert ops.backend_for("auto", CPU).name == "python"


def test_an_operation_that_a_backend_lacks_is_that_of_the_next(monkeypatch):
    modules = {
        "cuda": SimpleNamespace(accumulate=lambda: "cuda"),
        "triton": SimpleNamespace(accumulate=lambda: "triton", graddrop=lambda: "triton"),
        "python": SimpleNamespace(graddrop=lambda: "python", combine=lambda: "python"),
    }
    there = {"cuda", "triton", "python"}
    monkeypatch.setattr(
        backends, "unavailable", lambda b, _device: None if b in there else "not here"
    )
    monkeypatch.setattr(backends.Backend, "module", lambda _backend, name: modules[name])
    backend = backends.Backend("cuda", torch.device("cuda"), "cuda")
    assert (backend.accumulate(), backend.graddrop(), backend.combine()) == (
        "cuda",
        "triton",
        "python",
    )
    there.remove("triton")
    assert backend.graddrop() == "python"
