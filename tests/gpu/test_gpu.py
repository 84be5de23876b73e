"""The kernels on a real GPU: what no interpreter and no driver on the host can show."""

import pytest
import torch

from gcond_kernels import GCond, GCondFused, LionLars, ops
from gcond_kernels.ops.host_flag import HostFlag
from tests.helpers import by_name
from tests.helpers.flat import layout_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
GPU = torch.device("cuda:0")
SIZES = [100_003, 17, 0, 4096, 1_000_000, 1]


def why_not(backend):
    """Why a backend is not tested here; without a GPU the mark above says so for all."""
    return ops.unavailable(backend, GPU) if torch.cuda.is_available() else None


def backends(*names):
    marks = {
        name: pytest.mark.skipif(bool(why_not(name)), reason=f"{name}: {why_not(name)}")
        for name in names
    }
    return pytest.mark.parametrize(
        "backend", [pytest.param(name, marks=mark) for name, mark in marks.items()]
    )


both = backends("triton", "cuda")
needs_triton, needs_cuda = backends("triton"), backends("cuda")


@pytest.fixture(params=["triton", "cuda", "cuda, one launch"])
def way(request, monkeypatch):
    """A backend, by `ops.resolve` with its three operations apart or, where it can, at once."""
    backend, _, form = request.param.partition(", ")
    if why_not(backend):
        pytest.skip(f"{backend}: {why_not(backend)}")
    if backend == "cuda":
        resolve_at_once(monkeypatch, bool(form))
    return backend


def resolve_at_once(monkeypatch, wanted):
    """Makes `ops.resolve` take one launch of the CUDA backend, or none, whatever the size."""
    module = ops.backend_for("cuda", GPU).module("cuda")
    monkeypatch.setattr(module, "resolves_at_once", lambda _: wanted)


class Resolution:
    """All operations on tensors that stay where they are.

    Args:
        backend: that does it.
        tasks: K.
        sizes: elements of each tensor.
        options: of `ops.resolve`; `momentum` and `history` say whether there is any.
    """

    def __init__(self, backend, tasks, sizes=SIZES, *, momentum=True, history=True, **options):
        torch.manual_seed(0)
        self.backend, self.layout = backend, layout_of(sizes)
        mask = self.layout.mask().to(GPU)
        self.gradients = [
            [torch.randn(size, device=GPU, dtype=dtype) for size in sizes]
            for dtype in [torch.float32, torch.bfloat16, torch.float16, torch.float64] * 2
        ][:tasks]
        self.rows = torch.zeros(tasks, self.layout.length, device=GPU)
        self.history = (torch.randn_like(self.rows) * mask).bfloat16() if history else None
        self.momentum = torch.randn(self.layout.length, device=GPU) * mask if momentum else None
        self.steps = torch.zeros(len(sizes), dtype=torch.int64, device=GPU) if momentum else None
        self.outputs = [torch.empty(size, device=GPU) for size in sizes]
        self.scale = torch.ones(tasks, dtype=torch.float64, device=GPU)
        self.method = GCond()
        self.state = self.method.new_state(tasks, GPU)
        self.state["history_scale"] += 1.0
        self.options = {"beta": 0.9 if momentum else 0.0, **options}

    def accumulate(self):
        for row, gradients in zip(self.rows, self.gradients, strict=True):
            by_name.accumulate(row, gradients, self.layout, overwrite=True, backend=self.backend)
            by_name.accumulate(row, gradients, self.layout, scale=0.5, backend=self.backend)

    def run(self) -> list[torch.Tensor]:
        self.accumulate()
        products, decision = by_name.resolve(
            self.rows,
            self.outputs,
            self.layout,
            scale=self.scale,
            state=self.state,
            settings=self.method,
            history=self.history,
            momentum=self.momentum,
            momentum_steps=self.steps,
            backend=self.backend,
            **self.options,
        )
        results = [
            *self.outputs,
            *products,
            decision.weights,
            decision.coefficients,
            decision.finite,
        ]
        return [tensor for tensor in results if tensor is not None]

    def kept(self) -> list[torch.Tensor]:
        """All that one step leaves to the next."""
        kept = [self.rows, self.history, self.momentum, self.steps, *self.state.values()]
        return [tensor for tensor in kept if tensor is not None]

    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.kept()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        for tensor, before in zip(self.kept(), snapshot, strict=True):
            tensor.copy_(before)


def graph_of(run):
    """A CUDA graph of the call, and what the call returned: a replay writes it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_a_hundred_runs_give_the_same_bits(way, tasks):
    resolution = Resolution(way, tasks, max_norm=1.0)
    start = resolution.snapshot()
    first = [tensor.clone() for tensor in resolution.run()]
    end = resolution.snapshot()
    for _ in range(100):
        resolution.restore(start)
        assert same(resolution.run(), first)
        assert same(resolution.snapshot(), end)


@needs_cuda
@pytest.mark.parametrize("tasks", range(1, 9))
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": False},
        {},
        {"momentum": False, "max_norm": 1.0},
        {"max_norm": 1.0},
        {"history": False},
    ],
    ids=lambda options: ", ".join(options) or "momentum",
)
def test_one_launch_gives_the_bits_of_three_operations(monkeypatch, backend, tasks, options):
    results = []
    for at_once in (True, False):
        resolve_at_once(monkeypatch, at_once)
        resolution = Resolution(backend, tasks, **options)
        for _ in range(3):
            found = resolution.run()
        results.append([*found, *resolution.kept()])
    assert same(*results)
    assert all(tensor.isfinite().all() for tensor in results[0])


@pytest.mark.parametrize("tasks", [2, 3])
def test_a_graph_replays_with_changed_contents(way, tasks):
    resolution = Resolution(way, tasks, max_norm=1.0)
    resolution.run()  # compiles, and makes the tables
    start = resolution.snapshot()
    graph, captured = graph_of(resolution.run)
    for seed in range(3):
        torch.manual_seed(seed)
        for gradients in resolution.gradients:
            for gradient in gradients:
                gradient.normal_()
        resolution.restore(start)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        end = resolution.snapshot()
        resolution.restore(start)
        assert same(resolution.run(), replayed)
        assert same(resolution.snapshot(), end)


@both
def test_a_capture_of_sizes_not_seen_before_says_what_to_do(backend):
    layout = layout_of([1009])
    row, gradient = torch.zeros(layout.length, device=GPU), torch.randn(1009, device=GPU)
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="before the capture"), graph:
        by_name.accumulate(row, [gradient], layout, backend=backend)


def test_a_capture_takes_tensors_not_seen_before(way):
    seen = Resolution(way, 3, max_norm=1.0)
    seen.run()  # makes the tables, which know the sizes alone
    resolution = Resolution(way, 3, max_norm=1.0)
    assert resolution.outputs[0].data_ptr() != seen.outputs[0].data_ptr()
    start = resolution.snapshot()
    graph, captured = graph_of(resolution.run)
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    end = resolution.snapshot()
    resolution.restore(start)
    assert same(resolution.run(), replayed)
    assert same(resolution.snapshot(), end)


def test_nothing_waits_for_the_device(way):
    resolution = Resolution(way, 3, max_norm=1.0)
    resolution.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            resolution.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=str)
def test_more_than_a_thousand_tensors(backend, options):
    sizes = [7 * (t % 5) for t in range(2503)]
    results = {}
    for name in (backend, "python"):
        resolution = Resolution(name, 2, sizes, **options)
        resolution.run()
        results[name] = [*resolution.outputs, resolution.rows, resolution.momentum]
    for ours, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@both
def test_a_row_of_more_than_2_31_elements(backend):
    sizes = [2**31 + 5, 1000]
    layout = layout_of(sizes)
    needed = 2 * 2 * layout.length * 3
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    bfloat16 = {"dtype": torch.bfloat16, "device": GPU}
    rows = torch.zeros(2, layout.length, **bfloat16)
    gradients = [torch.full((size,), 0.5, **bfloat16) for size in sizes]
    gradients[0][-1], gradients[0][0] = 4.0, 2.0
    one = torch.ones(2, dtype=torch.float64, device=GPU)
    for k in range(2):
        by_name.accumulate(rows[k], gradients, layout, overwrite=True, backend=backend)
    assert torch.equal(rows[1, : sizes[0]], gradients[0])
    products = by_name.gramian(rows, layout, scale=one, backend=backend)
    # Sums of a few powers of two: exact in float32 within a piece, in float64 across them.
    exact = 0.25 * (sum(sizes) - 2) + 16.0 + 4.0
    assert (products.total == exact).all()
    outputs = gradients
    for output in outputs:
        output.fill_(torch.nan)
    by_name.combine(
        rows,
        outputs,
        layout,
        weights=one,
        scale=one,
        finite=torch.ones((), dtype=torch.bool, device=GPU),
        per_tensor=products.per_tensor,
        backend=backend,
    )
    assert (outputs[0][0], outputs[0][-1]) == (4.0, 8.0)
    assert (outputs[0][1:-1] == 1.0).all()
    assert (outputs[1] == 1.0).all()


@both
@pytest.mark.parametrize("update", [None, LionLars()])
def test_training_is_that_of_the_reference_and_backward_waits_for_nothing(backend, update):
    def trained(by):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)
        ).to(GPU)
        optimizer = GCondFused(
            torch.optim.SGD(model.parameters(), lr=0.05),
            {"a": 1.0, "b": 0.5},
            accumulation_steps=4,
            momentum=0.9,
            update=update,
            backend=by,
        )
        for step in range(8):
            for _ in range(4):
                x = torch.randn(16, 20, device=GPU)
                y = model(x)
                losses = {"a": y.square().mean(), "b": (y - x[:, :4]).abs().mean()}
                if by != "python" and step > 3:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    optimizer.backward(losses)  # the last one resolves
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    # The same in float32, summed in another order.
    assert torch.allclose(trained(backend), trained("python"), rtol=1e-3, atol=1e-5)


@both
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(backend):
    layout = layout_of([5000])
    row = torch.zeros(layout.length, device="cuda:1")
    gradient = torch.randn(5000, device="cuda:1")
    with torch.cuda.device(0):
        by_name.accumulate(row, [gradient], layout, backend=backend)
    assert torch.equal(row[:5000], gradient)


def test_the_host_learns_of_a_flag_without_waiting():
    flag = HostFlag()
    for value in (False, True):
        noted = torch.tensor(value, device=GPU)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert flag.note(noted)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert flag.known is value


def test_auto_takes_the_first_backend_that_is_there(monkeypatch):
    monkeypatch.delenv("GCOND_BACKEND", raising=False)
    there = [backend for backend in ops.BACKENDS if why_not(backend) is None]
    assert ops.backend_for("auto", GPU).name == there[0]
