"""The CUDA C++ backend: one launch, many tensors, large offsets, and its errors.

Here its code runs on the host (GCOND_CUDA_HOST=1); tests/gpu checks the launches.
"""

import math
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcond_kernels import GCond, GCondFused, LionLars, ops
from gcond_kernels.ops import backends
from tests.helpers.flat import (
    filled,
    layout_of,
    misaligned,
    packed_layout_of,
    random_mask,
    unwritten,
)
from tests.helpers.sizes import SIZE_LISTS, SIZES_AT_BOUNDARIES

CPU = torch.device("cpu")
UNAVAILABLE = ops.unavailable("cuda", CPU)
needs_cuda_on_host = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


class Case(NamedTuple):
    """What a resolution is made of."""

    sizes: list[int]
    tasks: int = 2
    seed: int = 0
    history: torch.dtype | None = torch.bfloat16
    momentum: bool = True
    dtype: torch.dtype = torch.float32
    settings: GCond = GCond()
    infinite: bool = False
    packed: bool = False
    masked: bool = False


CASES = st.builds(
    Case,
    sizes=st.one_of(
        SIZE_LISTS, st.lists(st.sampled_from(SIZES_AT_BOUNDARIES), min_size=1, max_size=3)
    ),
    tasks=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    history=st.sampled_from([None, torch.bfloat16, torch.float32, torch.float16]),
    momentum=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    settings=st.sampled_from(
        [GCond(), GCond.published(), GCond.paper(), GCond(arbitration="zones", norm_cap=1.0)]
    ),
    infinite=st.sampled_from([False, False, False, True]),
    packed=st.booleans(),
    masked=st.booleans(),
)


class Resolution:
    """The arguments of `resolve`, the same for equal cases."""

    def __init__(self, case: Case):
        layout = packed_layout_of(case.sizes) if case.packed else layout_of(case.sizes)
        accumulators = filled(layout, case.tasks, case.seed, case.dtype)
        accumulators -= 0.9 * accumulators.float().mean(0).to(case.dtype)
        if case.infinite and layout.length:
            accumulators[-1, 0] = math.inf
        mask = None
        if case.masked:
            trainable, mask = random_mask(layout.length, case.seed + 3)
            accumulators[:, ~trainable] = math.nan
        scale = torch.tensor([0.5 + 0.25 * k for k in range(case.tasks)], dtype=torch.float64)
        if case.tasks > 2:
            scale[1] = 0.0  # a task that takes no part
        self.gradients = ops.TaskGradients(
            accumulators,
            ops.Layout.of(layout.offsets, layout.sizes),
            scale,
            None
            if case.history is None
            else filled(layout, case.tasks, case.seed + 1, case.history),
            mask,
        )
        self.momentum = None
        if case.momentum:
            buffer, steps = filled(layout, 1, case.seed + 2)[0], torch.arange(len(case.sizes))
            self.momentum = ops.Momentum(buffer, steps, 0.9)
        self.outputs = [self.output(case, t) for t in range(len(case.sizes))]
        self.settings = case.settings
        self.state = ops.ArbitrationState(**case.settings.new_state(case.tasks, CPU))
        self.state.history_scale.add_(1.0)
        self.state.history_gramian.add_(100.0 * torch.eye(case.tasks, dtype=torch.float64))

    @staticmethod
    def output(case: Case, t: int) -> torch.Tensor | None:
        made = unwritten(case.sizes[t], dtype=[torch.float32, torch.bfloat16, torch.float16][t % 3])
        if (case.seed + t) % 7 == 0:
            return misaligned(made)
        return None if (case.seed + t) % 5 == 0 else made

    def run(self, one_launch: bool, max_norm: float | None = None) -> list[torch.Tensor | None]:
        """Return everything that a resolution returns or changes."""
        from gcond_kernels import cuda

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "resolves_at_once", lambda _: one_launch)
            gramians, arbitration = ops.resolve(
                self.gradients,
                self.outputs,
                state=self.state,
                settings=self.settings,
                momentum=self.momentum,
                max_norm=max_norm,
                backend="cuda",
            )
        changed = [self.gradients.history, *(self.momentum or ())[:2], *self.outputs, *self.state]
        return [self.gradients.accumulators, *changed, *gramians, *arbitration]


def same_bits(a, b):
    """Return whether two tensors are equal, NaN included: events have it where there is none."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


@needs_cuda_on_host
@given(CASES, st.sampled_from([None, 0.1]))
def test_one_launch_gives_the_bits_of_three_operations(case, max_norm):
    in_one, in_three = Resolution(case), Resolution(case)
    results = in_one.run(True, max_norm), in_three.run(False, max_norm)
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert same_bits(a, b), number
    assert not any(out.isnan().any() for out in in_three.outputs if out is not None)


@needs_cuda_on_host
@pytest.mark.parametrize("sizes", [[4096, 5000], [4099, 5000], [3, 8192, 4101], [8, 4096]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_no_vector_is_read_at_a_misaligned_address(sizes, dtype, shift):
    """On the host that is an error; accumulators, tensors and segments are misaligned."""
    layout = packed_layout_of(sizes)
    segments, length = ops.Layout.of(layout.offsets, sizes), layout.length + 3
    accumulators = unwritten(2 * length + shift, dtype=dtype)[shift:].view(2, length)
    accumulators.copy_(torch.randn(2, length))
    outputs = [misaligned(torch.randn(size)) for size in sizes]
    ops.accumulate(accumulators[1], outputs, segments, backend="cuda")
    one = torch.ones(2, dtype=torch.float64)
    history = torch.randn(2, length).bfloat16()
    mask = torch.full((-(-length // 32),), -1, dtype=torch.int32)
    steps = torch.zeros(len(sizes), dtype=torch.int64)
    method = GCond()
    gramians, arbitration = ops.resolve(
        ops.TaskGradients(accumulators, segments, one, history, mask),
        outputs,
        state=ops.ArbitrationState(**method.new_state(2, CPU)),
        settings=method,
        momentum=ops.Momentum(torch.zeros(length), steps, 0.5),
        backend="cuda",
    )
    used = accumulators[:, : layout.length].double()
    # Float32 sums of 16 thousand products at most.
    assert torch.allclose(gramians.total, used @ used.T, rtol=1e-4, atol=1e-2)
    expected = arbitration.weights @ used
    assert torch.allclose(torch.cat(outputs).double(), expected, rtol=1e-5, atol=1e-5)


@needs_cuda_on_host
def test_the_optimizer_resolves_in_one_launch(monkeypatch):
    calls, backend = [], ops.backend_for("cuda", CPU)
    resolve = backend.resolve
    monkeypatch.setattr(backend, "resolve", lambda *given: calls.append(1) or resolve(*given))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GCondFused(torch.optim.SGD([p], lr=1.0), {"a": 1.0, "b": 1.0}, backend="cuda")
    for windows in (0, 1):  # the first shows that the tasks share all parameters
        optimizer.backward({"a": p.sum(), "b": -0.9 * p.sum()})
        assert len(calls) == windows
        optimizer.step()
    assert optimizer.report().zone == "critical"


@needs_cuda_on_host
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("update", [None, LionLars(), "max_norm"])
def test_more_tensors_than_one_launch_holds(momentum, update):
    from gcond_kernels import _cuda

    def written(backend):
        torch.manual_seed(0)
        shapes = [int(size) for size in torch.randint(0, 9, (_cuda.MAX_TENSORS + 203,))]
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in shapes]
        options = {"max_norm": 1.0} if update == "max_norm" else {"update": update}
        base = torch.optim.SGD(parameters, lr=0.0)
        optimizer = GCondFused(
            base, {"a": 1.0, "b": 1.0}, momentum=momentum, backend=backend, **options
        )
        for _ in range(2):
            a = sum((p * torch.randn(p.shape)).sum() for p in parameters[1:])
            b = sum((p * torch.randn(p.shape)).sum() for p in parameters[1:]) - 0.8 * a
            optimizer.backward({"a": a, "b": b})
            optimizer.step()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    # Float32 sums in another order.
    torch.testing.assert_close(written("cuda"), written("python"), rtol=1e-5, atol=1e-6)


@needs_cuda_on_host
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_own_weights_of_more_tensors_than_one_launch_holds(beta):
    from gcond_kernels import _cuda

    sizes = torch.randint(0, 9, (_cuda.MAX_TENSORS + 203,)).tolist()
    layout = layout_of(sizes)
    scale = torch.ones(2, dtype=torch.float64)
    weights = torch.randn(len(sizes), 2, dtype=torch.float64)
    _, mask = random_mask(layout.length, 1)
    results = {}
    for backend in ("cuda", "python"):
        accumulators = filled(layout, 2, 0)
        segments = ops.Layout.of(layout.offsets, sizes)
        gradients = ops.TaskGradients(accumulators, segments, scale, accumulators.clone(), mask)
        momentum = None
        if beta:
            momentum = ops.Momentum(filled(layout, 1, 2)[0], torch.arange(len(sizes)), beta)
        gramians = ops.gramian(
            gradients,
            history_scale=scale,
            momentum=momentum and momentum.buffer,
            backend=backend,
        )
        outputs = [unwritten(size) for size in sizes]
        ops.combine(
            gradients,
            outputs,
            weights=weights,
            finite=torch.tensor(True),
            momentum=momentum,
            rescale=ops.Rescale(1.0, gramians.per_tensor),
            backend=backend,
        )
        results[backend] = [torch.cat(outputs), *gramians]
    for ours, reference in zip(*results.values(), strict=True):
        # Float32 sums in another order.
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@needs_cuda_on_host
def test_elements_beyond_2_31():
    # Memory that is only reserved: only the pages that are used become real.
    far, length = 2**31 + 4096, 2**31 + 8192
    accumulators, history = (
        torch.frombuffer(mmap.mmap(-1, 2 * length * 2), dtype=torch.bfloat16).view(2, length)
        for _ in range(2)
    )
    layout, used = ops.Layout((far,), (3000,)), slice(far, far + 3000)
    values = torch.randn(2, 3000).bfloat16()
    for accumulator, gradient in zip(accumulators, values, strict=True):
        ops.accumulate(accumulator, [gradient], layout, overwrite=True, backend="cuda")
        assert torch.equal(accumulator[used], gradient)
    gradients = ops.TaskGradients(accumulators, layout, torch.ones(2, dtype=torch.float64), history)
    method, output = GCond(), unwritten(3000)
    state = ops.ArbitrationState(**method.new_state(2, CPU))
    gramians, arbitration = ops.resolve(
        gradients, [output], state=state, settings=method, backend="cuda"
    )
    exact = values.double() @ values.double().T
    assert torch.allclose(gramians.total, exact, rtol=1e-5, atol=1e-5)
    expected = arbitration.weights @ values.double()
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(history[:, used], values)

    mask = torch.frombuffer(mmap.mmap(-1, length // 8), dtype=torch.int32)
    mask[far // 32 : far // 32 + 3000 // 64] = -1
    masked = ops.gramian(gradients._replace(history=None, mask=mask), backend="cuda").total
    trainable = values[:, : 3000 // 64 * 32].double()
    assert torch.allclose(masked, trainable @ trainable.T, rtol=1e-5, atol=1e-5)


@needs_cuda_on_host
def test_up_to_64_tasks_are_arbitrated_and_more_are_an_error():
    def weights(tasks, backend):
        g = torch.randn(tasks, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        state = ops.ArbitrationState(**GCond().new_state(tasks, CPU))
        scale = torch.ones(tasks, dtype=torch.float64)
        options = {"state": state, "settings": GCond(), "backend": backend}
        return ops.arbitrate(g @ g.T, None, scale, **options).weights

    assert torch.allclose(weights(64, "cuda"), weights(64, "python"), rtol=1e-9)
    with pytest.raises(ValueError, match="up to 64 tasks, not 65: use backend='python'"):
        weights(65, "cuda")


@needs_cuda_on_host
def test_a_resolution_that_raises_changes_nothing():
    resolution = Resolution(Case([50]))
    tensors = [*resolution.gradients[::3], resolution.momentum.buffer]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        resolution.run(True, max_norm=-1.0)
    resolution.state = resolution.state._replace(norm_ema=torch.zeros(3).double())
    with pytest.raises(ValueError, match=r"norm_ema must be \[2\]"):
        resolution.run(True)
    assert all(map(torch.equal, before, tensors))


@needs_cuda_on_host
def test_the_module_refuses_too_many_tensors_and_other_types():
    from gcond_kernels import _cuda

    for tensors, message in (
        ([torch.ones(1)] * 1001, "at most 1000 tensors in a launch, not 1001"),
        ([torch.ones(1).int()], "a tensor of a type that no kernel reads"),
    ):
        with pytest.raises(ValueError, match=message):
            _cuda.TensorList(tensors)


@pytest.mark.skipif(
    "not built" in (UNAVAILABLE or ""), reason=f"the module is not built: {UNAVAILABLE}"
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


def test_the_reason_where_the_extension_is_not_built(monkeypatch):
    monkeypatch.setattr(backends, "_is_installed", lambda module: module != "gcond_kernels._cuda")
    for device in ("cpu", "cuda"):
        assert "not built: GCOND_BUILD_CUDA=1 pip install ." in ops.unavailable(
            "cuda", torch.device(device)
        )


def test_a_module_that_cannot_be_imported_is_a_reason(monkeypatch):
    def fails(name):
        raise ImportError(f"{name}: GLIBC_9.9 not found")

    monkeypatch.setattr(backends.importlib, "import_module", fails)
    reason = (
        "its extension is there, but cannot be imported: gcond_kernels.cuda: GLIBC_9.9 not found"
    )
    assert backends._cuda_problem(torch.device("cuda", 0)) == reason
    if UNAVAILABLE is None:
        assert ops.unavailable("cuda", CPU) == reason


def test_auto_takes_the_first_that_is_there(monkeypatch):
    there = {"python", "triton"}
    monkeypatch.delenv("GCOND_BACKEND", raising=False)
    monkeypatch.setattr(
        backends, "unavailable", lambda name, _: None if name in there else "not here"
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
        backends, "unavailable", lambda name, _: None if name in there else "not here"
    )
    monkeypatch.setattr(backends.Backend, "module", lambda _, name: modules[name])
    backend = backends.Backend("cuda", torch.device("cuda"), "cuda")
    assert (backend.accumulate(), backend.graddrop(), backend.combine()) == (
        "cuda",
        "triton",
        "python",
    )
    there.remove("triton")
    another = backends.Backend("cuda", torch.device("cuda"), "cuda")
    assert (another.graddrop(), backend.graddrop()) == ("python", "triton")  # looked up once
