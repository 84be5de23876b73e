"""Peak memory, read from torch's allocator: CUDA's own statistics, or the profiler's on the CPU."""

import pytest
import torch
from torch import nn

from bench.training import peak_bytes
from gcond_kernels import GCondFused, ops
from gcond_kernels.python import _gramian, chunks
from gcond_kernels.storage import collect

WIDTH = 256
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """A chunk's memory is the same whatever the model; beside this small one it would show."""
    for module in (chunks, _gramian):
        monkeypatch.setattr(module, "CHUNK", chunks.PARTIAL)
    monkeypatch.setattr(collect, "BUCKET_BYTES", WIDTH * WIDTH)  # a quarter of a layer


def window(
    tasks: int,
    micro_batches: int,
    device: str,
    as_functions: bool = True,
    batch: int = 64,
    **options,
):
    """A whole window of GCondFused, from the first micro-batch to the step."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(8)]).to(device)
    optimizer = GCondFused(
        torch.optim.SGD(model.parameters(), lr=0.1),
        {f"t{k}": 1.0 for k in range(tasks)},
        accumulation_steps=micro_batches,
        **options,
    )
    x = torch.randn(batch, WIDTH, device=device)

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


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_alive_a_bucket_at_a_time(device, monkeypatch):
    peaks = []
    for bucket in (collect.BUCKET_BYTES, 32 << 20):
        monkeypatch.setattr(collect, "BUCKET_BYTES", bucket)
        run, size = window(2, 2, device, batch=1)
        peaks.append(peak_bytes(run, device) / size)
    # 6 bytes per parameter and task; then 4 for two layers of eight, the one that waits for its
    # launch and the one whose gradient is being made, or for all of a model that fits into one
    # bucket. What is written to `.grad` needs none.
    assert 12.0 <= peaks[0] <= 12.0 + 4 * 2 / 8 + 0.2, peaks
    assert 12.0 + 4 <= peaks[1] <= 12.0 + 4 + 0.2, peaks


def test_the_reference_widens_a_chunk_at_a_time():
    tasks, size = 3, 1 << 20
    history, ones = torch.randn(tasks, size).bfloat16(), torch.ones(tasks).double()
    layout = ops.Layout((0,), (size,))
    gradients = ops.TaskGradients(history.float(), layout, ones, history)
    outputs, gradient = [torch.empty(size)], torch.randn(size).bfloat16()
    options = {"weights": ones, "finite": torch.tensor(True), "backend": "python"}
    for run in (
        lambda: ops.accumulate(history[0], [gradient], layout, backend="python"),
        lambda: ops.gramian(gradients, history_scale=ones, backend="python"),
        lambda: ops.combine(gradients, outputs, **options),
    ):
        peak = peak_bytes(run, "cpu")
        assert 0 < peak <= 2 * (2 * tasks * 4 * chunks.PARTIAL)  # not 4 MB for a vector


def test_the_measure_sees_graphs_that_are_kept():
    # Losses given as tensors, one forward pass each: all graphs are alive at once.
    functions = peak_bytes(window(4, 1, "cpu")[0], "cpu")
    tensors = peak_bytes(window(4, 1, "cpu", as_functions=False)[0], "cpu")
    activations = 8 * 64 * WIDTH * 4
    assert tensors > functions + 0.9 * 3 * activations
