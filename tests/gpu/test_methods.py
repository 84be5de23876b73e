"""The methods on a GPU: the weights of the CPU, and no synchronization with the device."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused
from gcond_kernels.methods import GCond, GradDrop
from gcond_kernels.methods.method import fresh_state
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING
from tests.helpers.gramians import METHODS, random_gramian, resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
GPU = torch.device("cuda:0")
BY_GRAMIAN = [method for method in METHODS if not isinstance(method, GCond)]
TASKS = {"a": 1.0, "b": 0.5, "c": 2.0}


@contextmanager
def no_synchronization(checked: bool):
    """Within it what synchronizes with the device raises, if that is checked."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if checked else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", BY_GRAMIAN, ids=repr)
@pytest.mark.parametrize("tasks", [2, 5])
def test_weights_are_those_of_the_cpu(method, tasks):
    S = torch.stack([random_gramian(tasks, seed) for seed in range(9)])
    losses = torch.arange(1.0, tasks + 1.0).double()
    on_cpu = fresh_state(method, tasks, (9,), S.device)
    on_gpu = S.to(GPU), losses.to(GPU)
    for again in (False, True):  # the first time tables are copied to the device
        state = fresh_state(method, tasks, (9,), GPU)
        with no_synchronization(checked=again):
            found = resolve(method, on_gpu[0], state, on_gpu[1], FLOAT32_ROUNDING)
    expected = resolve(method, S, on_cpu, losses, FLOAT32_ROUNDING)
    torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-6, atol=1e-9)
    for key, value in on_cpu.items():
        torch.testing.assert_close(state[key].cpu(), value, rtol=1e-6, atol=1e-9)


def losses_of(model, x):
    y = model[1](model[0](x))
    return {
        "a": (y[:, 0] - 1).square().mean(),
        "b": (y[:, 0] + 1).square().mean(),
        "c": model[2](model[0](x)).abs().mean() + y[:, 1].abs().mean(),
    }


def model_and_optimizer(method, granularity):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 300), nn.Linear(300, 2), nn.Linear(300, 3)]).to(GPU)
    mask = {model[0].weight: torch.rand(300, 8, device=GPU) < 0.5}
    base = torch.optim.SGD(model.named_parameters(), lr=0.01, fused=True)
    return model, GCondFused(
        base, TASKS, method=method, granularity=granularity, mask=mask, momentum=0.5
    )


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("method", [*METHODS, GradDrop()], ids=repr)
def test_a_step_does_not_synchronize_and_is_that_of_the_cpu(method, granularity):
    """With heads, a mask, and each tensor by itself."""
    if isinstance(method, GradDrop):
        granularity = "model"
    x = torch.randn(4, 16, 8, device=GPU)
    model, optimizer = model_and_optimizer(method, granularity)
    twin = copy.deepcopy(model).cpu()
    mask = {twin[0].weight: optimizer._storage._masks[model[0].weight].cpu()}
    base = torch.optim.SGD(twin.named_parameters(), lr=0.01)
    options = {"method": method, "granularity": granularity, "mask": mask, "momentum": 0.5}
    other = GCondFused(base, TASKS, **options)
    for number, batch in enumerate(x):
        with no_synchronization(checked=number > 1):
            optimizer.backward(losses_of(model, batch))
            optimizer.step()
        other.backward(losses_of(twin, batch.cpu()))
        other.step()
        if isinstance(method, GradDrop):
            continue  # rounding of the gradients decides where two signs are as strong
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [*METHODS, GradDrop()], ids=repr)
def test_a_graph_holds_a_step(method):
    """Replays count their random numbers up, as steps do."""
    x = torch.randn(16, 8, device=GPU)
    model, optimizer = model_and_optimizer(method, "model")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.backward(losses_of(model, x))
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.backward(losses_of(model, x))
        optimizer.step()
    before = int(optimizer._resolver.counters[0])
    for _ in range(4):
        graph.replay()
    assert int(optimizer._resolver.counters[0]) == before + 4
    if "counter" in optimizer._resolver.method_state:
        assert int(optimizer._resolver.method_state["counter"]) == before + 4
    assert not optimizer.report().skipped
