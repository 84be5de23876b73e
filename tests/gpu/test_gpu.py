"""The Triton backend on a real GPU: what no interpreter can show."""

import pytest
import torch
from flat import layout_of

from gcond_kernels import GCond, GCondFused, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
GPU = torch.device("cuda:0")
SIZES = [100_003, 17, 0, 4096, 1_000_000, 1]


class Resolution:
    """All four operations on tensors that stay where they are."""

    def __init__(self, tasks: int, sizes: list[int], *, momentum: bool = True) -> None:
        torch.manual_seed(0)
        self.layout = layout_of(sizes)
        mask = self.layout.mask().to(GPU)
        self.gradients = [
            [torch.randn(size, device=GPU, dtype=dtype) for size in sizes]
            for dtype in [torch.float32, torch.bfloat16, torch.float16, torch.float64] * 2
        ][:tasks]
        self.rows = torch.zeros(tasks, self.layout.length, device=GPU)
        self.history = (torch.randn_like(self.rows) * mask).bfloat16()
        self.momentum = torch.randn(self.layout.length, device=GPU) * mask if momentum else None
        self.steps = torch.zeros(len(sizes), dtype=torch.int64, device=GPU) if momentum else None
        self.outputs = [torch.empty(size, device=GPU) for size in sizes]
        self.scale = torch.ones(tasks, dtype=torch.float64, device=GPU)
        self.method = GCond()
        self.state = self.method.new_state(tasks, GPU)
        self.state["history_scale"] += 1.0

    def run(self) -> list[torch.Tensor]:
        offsets, sizes = self.layout.offsets, self.layout.sizes
        for row, gradients in zip(self.rows, self.gradients, strict=True):
            ops.accumulate(row, gradients, offsets, sizes, overwrite=True, backend="triton")
            ops.accumulate(row, gradients, offsets, sizes, scale=0.5, backend="triton")
        products = ops.gramian(
            self.rows, offsets, sizes, scale=self.scale, history=self.history,
            history_scale=self.state["history_scale"], momentum=self.momentum, backend="triton",
        )  # fmt: skip
        decision = self.method.resolve(
            products.total, products.cross, self.scale, self.state, "triton"
        )
        ops.combine(
            self.rows, self.outputs, offsets, sizes, weights=decision.weights, scale=self.scale,
            finite=decision.finite, per_tensor=products.per_tensor, history=self.history,
            momentum=self.momentum, momentum_steps=self.steps,
            beta=0.9 if self.momentum is not None else 0.0, max_norm=1.0, backend="triton",
        )  # fmt: skip
        return [*self.outputs, products.total, products.cross, decision.weights, decision.rows]

    def snapshot(self) -> list[torch.Tensor]:
        kept = [self.rows, self.history, self.momentum, self.steps, *self.state.values()]
        return [tensor.clone() for tensor in kept if tensor is not None]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        kept = [self.rows, self.history, self.momentum, self.steps, *self.state.values()]
        for tensor, before in zip([t for t in kept if t is not None], snapshot, strict=True):
            tensor.copy_(before)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_a_hundred_runs_give_the_same_bits(tasks):
    resolution = Resolution(tasks, SIZES)
    start = resolution.snapshot()
    first = [tensor.clone() for tensor in resolution.run()]
    end = resolution.snapshot()
    for _ in range(100):
        resolution.restore(start)
        assert same(resolution.run(), first)
        assert same(resolution.snapshot(), end)


def test_a_graph_replays_with_changed_contents():
    resolution = Resolution(3, SIZES)
    resolution.run()  # compiles, and makes the tables
    start = resolution.snapshot()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        resolution.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = resolution.run()
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


def test_a_capture_of_tensors_not_seen_before_says_what_to_do():
    layout = layout_of([1000])
    row, gradient = torch.zeros(layout.length, device=GPU), torch.randn(1000, device=GPU)
    other = torch.randn(1000, device=GPU)
    arguments = (layout.offsets, layout.sizes)
    ops.accumulate(row, [gradient], *arguments, backend="triton")
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="before the capture"), graph:
        ops.accumulate(row, [other], *arguments, backend="triton")


def test_nothing_waits_for_the_device():
    resolution = Resolution(3, SIZES)
    resolution.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            resolution.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_of_more_than_2_31_elements():
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
        ops.accumulate(rows[k], gradients, layout.offsets, sizes, overwrite=True, backend="triton")
    assert torch.equal(rows[1, : sizes[0]], gradients[0])
    products = ops.gramian(rows, layout.offsets, sizes, scale=one, backend="triton")
    # Sums of a few powers of two: exact in float32 within a piece, in float64 across them.
    exact = 0.25 * (sum(sizes) - 2) + 16.0 + 4.0
    assert (products.total == exact).all()
    outputs = gradients
    for output in outputs:
        output.fill_(torch.nan)
    ops.combine(
        rows, outputs, layout.offsets, sizes, weights=one, scale=one,
        finite=torch.ones((), dtype=torch.bool, device=GPU), per_tensor=products.per_tensor,
        backend="triton",
    )  # fmt: skip
    assert (outputs[0][0], outputs[0][-1]) == (4.0, 8.0)
    assert (outputs[0][1:-1] == 1.0).all()
    assert (outputs[1] == 1.0).all()


@pytest.mark.parametrize("update", ["momentum", "lion_lars"])
def test_training_is_that_of_the_reference_and_resolve_waits_for_nothing(update):
    def trained(backend):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)
        ).to(GPU)
        optimizer = GCondFused(
            torch.optim.SGD(model.parameters(), lr=0.05), {"a": 1.0, "b": 0.5},
            accumulation_steps=4, momentum=0.9, update=update, backend=backend,
        )  # fmt: skip
        for step in range(8):
            for _ in range(4):
                x = torch.randn(16, 20, device=GPU)
                y = model(x)
                optimizer.backward({"a": y.square().mean(), "b": (y - x[:, :4]).abs().mean()})
            if backend == "triton" and step > 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.resolve()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    # The same in float32, summed in another order.
    assert torch.allclose(trained("triton"), trained("python"), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    layout = layout_of([5000])
    row = torch.zeros(layout.length, device="cuda:1")
    gradient = torch.randn(5000, device="cuda:1")
    with torch.cuda.device(0):
        ops.accumulate(row, [gradient], layout.offsets, layout.sizes, backend="triton")
    assert torch.equal(row[:5000], gradient)


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    monkeypatch.delenv("GCOND_BACKEND", raising=False)
    assert ops.choose_backend("auto", GPU, "gramian") == "triton"
