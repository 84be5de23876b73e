"""Peak memory, read from torch's allocator: CUDA's own statistics, or the profiler's on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gcond_kernels import GCondFused
from gcond_kernels.python import blocks

WIDTH = 256
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _small_scratch(monkeypatch):
    """Scratch memory is bounded (8 MB) whatever the model; beside this small one it would show."""
    monkeypatch.setattr(blocks, "SCRATCH_ELEMENTS", 1 << 14)


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """The most that `run` had allocated at any time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        run()
    events = recording.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert changes, "the profiler recorded no allocation"
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


def window(tasks: int, micro_batches: int, device: str, as_functions: bool = True):
    """A whole window of GCondFused, from the first micro-batch to the step."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(8)]).to(device)
    optimizer = GCondFused(
        torch.optim.SGD(model.parameters(), lr=0.1),
        {f"t{k}": 1.0 for k in range(tasks)},
        accumulation_steps=micro_batches,
    )
    x = torch.randn(64, WIDTH, device=device)

    def run():
        for _ in range(micro_batches):
            losses = {t: (lambda: model(x).pow(2).mean()) for t in optimizer.tasks}
            optimizer.backward(
                losses if as_functions else {t: loss() for t, loss in losses.items()}
            )
        optimizer.step()

    return run, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_peak_does_not_grow_with_the_number_of_micro_batches(device):
    peaks = [peak_bytes(window(2, n, device)[0], device) for n in (1, 2, 8)]
    assert max(peaks) <= 1.01 * min(peaks)


@pytest.mark.parametrize("device", DEVICES)
def test_peak_grows_with_the_tasks_by_the_accumulators_alone(device):
    size = window(1, 2, device)[1]
    peaks = {tasks: peak_bytes(window(tasks, 2, device)[0], device) for tasks in (1, 2, 5)}
    for tasks, peak in peaks.items():
        # 4 bytes of accumulator and 2 of history per parameter and task; the rest is alignment
        # and the numbers of K×K size.
        growth = (peak - peaks[1]) / (tasks - 1) / size if tasks > 1 else 6.0
        assert 5.9 <= growth <= 6.1, peaks


def test_the_measure_sees_graphs_that_are_kept():
    # Losses given as tensors, one forward pass each: all graphs are alive at once.
    functions = peak_bytes(window(4, 1, "cpu")[0], "cpu")
    tensors = peak_bytes(window(4, 1, "cpu", as_functions=False)[0], "cpu")
    activations = 8 * 64 * WIDTH * 4
    assert tensors > functions + 0.9 * 3 * activations
