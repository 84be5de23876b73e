"""Training on a real GPU: whole windows that never wait for it, or that a CUDA graph replays."""

import copy
import math

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused, LionLars, ops
from gcond_kernels.storage import collect
from tests.helpers.models import TASKS, same, without_counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
GPU = torch.device("cuda:0")
WINDOW = 4
# Bytes: a gradient fills one, or all of a pass go into one, when it is over.
BUCKETS = [1, 1 << 30]

BASES = {
    "AdamW fused": lambda p: torch.optim.AdamW(
        p, lr=0.01, betas=(0.0, 0.9), fused=True, capturable=True
    ),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.9), capturable=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
}


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """Launches come from hooks, in the thread of the backward pass, and not from its end alone."""
    monkeypatch.setattr(collect, "BUCKET_BYTES", 1)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = ops.unavailable(request.param, GPU)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


class Training:
    """A model, its optimizer, and inputs that stay where they are."""

    def __init__(self, backend, base, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 30), nn.LayerNorm(30), nn.Linear(30, 4)
        ).to(GPU)
        # Its gradients are not views of an accumulator.
        self.shift = nn.Parameter(torch.zeros(20, device=GPU, dtype=torch.bfloat16))
        options = {"accumulation_steps": WINDOW, "momentum": 0.9} | options
        self.optimizer = GCondFused(
            BASES[base]([*self.model.parameters(), self.shift]), TASKS, backend=backend, **options
        )
        self.inputs = torch.empty(WINDOW, 16, 20, device=GPU)
        self.bad = torch.zeros((), device=GPU)

    def feed(self, seed, bad=0.0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs.copy_(torch.randn(WINDOW, 16, 20, generator=generator))
        self.bad.fill_(bad)

    def window(self):
        for x in self.inputs:
            y = self.model(x + self.shift)
            losses = {"a": y.square().mean() + self.bad * y.sum(), "b": (y - x[:, :4]).abs().mean()}
            self.optimizer.backward({task: losses[task] for task in self.optimizer.active_tasks})
        self.optimizer.step()
        if self.optimizer.grad_scaler is not None:
            self.optimizer.grad_scaler.update()

    def kept(self):
        """All that training leaves, copied."""
        state = copy.deepcopy(self.optimizer.state_dict())
        return [p.detach().clone() for p in (*self.model.parameters(), self.shift)], state


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "stochastic"},
        {"on_nonfinite": "drop_task"},
        {"max_norm": 1.0},
        {"update": LionLars()},
        {"grad_scaler": True},
    ],
    ids=str,
)
def test_nothing_in_backward_or_step_waits_for_the_device(backend, base, options):
    if "grad_scaler" in options:
        options = {"grad_scaler": torch.amp.GradScaler("cuda")}
    training = Training(backend, base, **options)
    for seed in range(2):
        training.feed(seed)
        training.window()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            training.window()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.optimizer.report().step == 4


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", ["exact", "stochastic"])
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task"])
def test_a_graph_of_a_full_window(backend, base, mode, bucket, on_nonfinite, monkeypatch):
    monkeypatch.setattr(collect, "BUCKET_BYTES", bucket)
    options = {"mode": mode, "on_nonfinite": on_nonfinite}
    eager, captured = Training(backend, base, **options), Training(backend, base, **options)
    for training in (eager, captured):
        # On a side stream, as torch asks for what is to be captured after it.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for seed in range(3):
                training.feed(seed)
                training.window()
        torch.cuda.current_stream().wait_stream(stream)
    captured.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.window()
    for seed, bad in ((10, 0.0), (11, math.nan), (12, 0.0), (13, math.inf), (14, 0.0)):
        eager.feed(seed, bad)
        captured.feed(seed, bad)
        eager.window()
        graph.replay()
        assert same(eager.kept(), captured.kept())
        ours, theirs = captured.optimizer.report(), eager.optimizer.report()
        assert ours.skipped == theirs.skipped == (bool(bad) and on_nonfinite == "skip")
        assert ours.nonfinite_steps == theirs.nonfinite_steps
        assert ours.step == theirs.step
        assert ours.losses == theirs.losses
        assert ours.descent == theirs.descent
    assert captured.optimizer.recorder.rows() == eager.optimizer.recorder.rows()
    assert [row["step"] for row in captured.optimizer.recorder.rows()] == list(range(1, 9))


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_model_on_two_streams(backend, bucket, monkeypatch):
    """A gradient is ready, and its memory free again, in the order of its own stream."""
    monkeypatch.setattr(collect, "BUCKET_BYTES", bucket)
    results = []
    for streams in (1, 2):
        torch.manual_seed(0)
        left, right = (nn.Linear(2000, 2000).to(GPU) for _ in range(2))
        optimizer = GCondFused(
            torch.optim.SGD([*left.parameters(), *right.parameters()], lr=0.1),
            TASKS,
            accumulation_steps=2,
            backend=backend,
        )
        side = torch.cuda.Stream() if streams == 2 else torch.cuda.current_stream()
        for seed in range(10):
            x = torch.randn(64, 2000, generator=torch.Generator().manual_seed(seed)).to(GPU)

            def loss(task, x=x, left=left, right=right, side=side):
                main = torch.cuda.current_stream()
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    other = right(x).square().mean()
                own = left(x).abs().mean()
                main.wait_stream(side)
                return own + other if task == "a" else own - other

            if optimizer.backward({task: lambda task=task: loss(task) for task in TASKS}):
                optimizer.step()
        results.append([p.detach().clone() for p in (*left.parameters(), *right.parameters())])
    assert same(*results)


def test_raise_cannot_be_captured(backend):
    training = Training(backend, "AdamW fused", on_nonfinite="raise")
    for seed in range(2):
        training.feed(seed)
        training.window()
    with (
        pytest.raises(RuntimeError, match="use 'skip' or 'drop_task'"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        training.window()


@pytest.mark.parametrize("by_scaler", [False, True])
def test_half_precision_with_a_scaler(backend, by_scaler):
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=1000)
    training = Training(backend, "AdamW fused", grad_scaler=scaler)
    for seed in range(12):
        training.feed(seed)
        for x in training.inputs:
            with torch.autocast("cuda", dtype=torch.float16):
                y = training.model(x)
            losses = {"a": y.square().mean(), "b": (y - x[:, :4]).abs().mean()}
            training.optimizer.backward(losses)
        if by_scaler:
            scaler.step(training.optimizer)
        else:
            training.optimizer.step()
        scaler.update()
    report = training.optimizer.report()
    assert 0 < report.skipped_steps < 12  # float16 overflows at first, and then no more
    assert scaler.get_scale() == 2.0 ** (24 - report.skipped_steps)
    assert all(p.isfinite().all() for p in training.model.parameters())


def test_an_optimizer_that_the_host_must_tell_is_skipped_too(backend):
    training = Training(backend, "AdamW fused")
    training.optimizer.base = torch.optim.SGD(training.model.parameters(), lr=0.1, momentum=0.9)
    training.feed(0)
    training.window()
    parameters, state = training.kept()
    training.feed(1, math.nan)
    training.window()
    after, state_after = training.kept()
    assert same(parameters, after)
    assert same(without_counters(state), without_counters(state_after))
