"""The CUDA C++ kernels on a GPU, and the same code on the host: the same bits."""

import pytest
import torch

from gcond_kernels import GCond, ops
from tests.helpers import by_name
from tests.helpers.flat import filled, layout_of, misaligned, unwritten

REASON = ops.unavailable("cuda", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
SIZES = [70_001, 17, 0, 4096, 4097, 1, 8191]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _host_driver(monkeypatch):
    monkeypatch.setenv("GCOND_CUDA_HOST", "1")


def resolution(device, tasks, dtype, at_once, options):
    """Everything that accumulate and a whole resolution write, on the CPU."""
    from gcond_kernels import cuda

    layout = layout_of(SIZES)
    generator = torch.Generator().manual_seed(tasks)

    def tensors(k):
        made = [torch.randn(s, generator=generator).to(TYPES[(k + s) % 4]) for s in SIZES]
        made[3] = None if k % 2 else misaligned(made[3])
        # The whole memory moves: what is misaligned stays so.
        return [t if t is None else moved(t, device) for t in made]

    accumulators = unwritten(tasks, layout.length, dtype=dtype).to(device)
    accumulators.masked_fill_(~layout.mask().to(device), 0.0)
    for k in range(tasks):
        for overwrite in (True, False):
            by_name.accumulate(
                accumulators[k],
                tensors(k),
                layout,
                scale=0.7,
                overwrite=overwrite,
                backend="cuda",
            )
    for k in range(1, tasks):  # a conflict; one by one, for a sum is formed in orders of its own
        accumulators[0] -= accumulators[k]
    history = filled(layout, tasks, 1, torch.bfloat16).to(device)
    momentum, steps = filled(layout, 1, 2)[0].to(device), torch.arange(len(SIZES)).to(device)
    method = GCond()
    state = {key: value.to(device) for key, value in method.new_state(tasks, device).items()}
    state["history_scale"] += 1.0
    state["history_gramian"] += torch.eye(tasks, dtype=torch.float64, device=device)
    outputs = tensors(0)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "resolves_at_once", lambda _: at_once)
        products, decision = by_name.resolve(
            accumulators,
            outputs,
            layout,
            scale=torch.ones(tasks, dtype=torch.float64, device=device),
            state=state,
            settings=method,
            history=history,
            momentum=momentum,
            momentum_steps=steps,
            beta=0.9,
            backend="cuda",
            **options,
        )
    written = [accumulators, history, momentum, steps, *outputs, *state.values()]
    written += [*products, *decision]
    return [t.cpu().nan_to_num(12345.0) for t in written if t is not None]


def moved(tensor, device):
    storage = tensor.untyped_storage()
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage).to(device)
    return there.set_(
        whole.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [True, False], ids=["one launch", "apart"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_gpu_and_host_come_to_the_same_bits(tasks, options, at_once, dtype):
    on_gpu = resolution(torch.device("cuda", 0), tasks, dtype, at_once, options)
    on_host = resolution(torch.device("cpu"), tasks, dtype, at_once, options)
    for number, (ours, other) in enumerate(zip(on_gpu, on_host, strict=True)):
        assert torch.equal(ours, other), number
