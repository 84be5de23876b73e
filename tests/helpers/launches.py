"""Make every launch of the Triton backend up to the launch itself, with no GPU present.

Run as a script, where Triton does not interpret: arguments are bound and specialized and the
kernels compiled for sm_90, on CPU tensors; twice, so that a second launch finds the cached kernels.
"""

import os
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gcond_kernels import ops
from gcond_kernels.ops import backends
from gcond_kernels.ops.types import (
    ArbitrationState,
    Layout,
    Momentum,
    Rescale,
    Settings,
    SignDropout,
    TaskGradients,
)
from gcond_kernels.triton_kernels import plans
from gcond_kernels.triton_kernels._graddrop import graddrop_kernel
from tests.helpers.flat import filled, layout_of


def pretend() -> None:
    """Install a driver that has a GPU and launches nothing; let Triton serve CPU tensors."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda *_: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    run = triton.JITFunction.run

    def warm_up(self, *args, grid, **options):
        assert len(grid) <= 3
        assert all(0 < size < 2**31 for size in grid[:1])
        assert all(0 < size < 2**16 for size in grid[1:])
        compiled = run(self, *args, grid=grid, **{**options, "warmup": True})
        # A product fused into a sum rounds otherwise, and so picks otherwise.
        assert self is not graddrop_kernel or "fma." not in compiled.asm["ptx"]
        return compiled

    triton.JITFunction.run = warm_up
    backends.unavailable = lambda *_: None
    os.environ["GCOND_BACKEND"] = "triton"


def variants_of(kernel: triton.JITFunction) -> int:
    """Return how many variants of a kernel were compiled."""
    (variants,) = (caches[0] for caches in kernel.device_caches.values())
    return len(variants)


def launch_gramian(gradients: TaskGradients, momentum: torch.Tensor, mask: torch.Tensor) -> None:
    ops.gramian(gradients)
    with_history = gradients._replace(history=gradients.accumulators.bfloat16())
    ops.gramian(with_history, history_scale=gradients.scale, momentum=momentum)
    ops.gramian(with_history._replace(mask=mask), history_scale=gradients.scale)
    ops.multi_tensor_norm([torch.randn(1)])
    ops.multi_tensor_norm([])
    ops.multi_tensor_cosine_similarity([torch.randn(9, 9)], [torch.randn(9, 9).half()])


def launch_arbitrate(scale: torch.Tensor) -> None:
    S = torch.eye(2).double()
    batch = S.expand(3, 2, 2).clone()
    for settings in (
        Settings(),
        Settings(max_iterations=1, dominance_window=0),
        Settings(max_iterations=0, norm_cap=1.0, arbitration="zones", history="resolved"),
    ):
        winners = torch.full((settings.dominance_window,), -1)
        state = ArbitrationState(scale.clone(), winners, S.clone(), S.clone(), scale.clone())
        ops.arbitrate(S, S, scale, state=state, settings=settings)
        ops.arbitrate(S, None, scale, state=state, settings=settings)
        *own, history_scale = state
        own = [tensor.expand(3, *tensor.shape).clone() for tensor in own]
        state = ArbitrationState(*own, history_scale)
        ops.arbitrate(batch, batch, scale, state=state, settings=settings)


def launch_combine(
    gradients: TaskGradients, outputs: list, momentum: Momentum, mask: torch.Tensor
) -> None:
    weights, finite = gradients.scale, torch.tensor(True)
    rescale = Rescale(1.0, torch.ones(3, 3, 3).double())
    with_history = gradients._replace(history=gradients.accumulators.bfloat16())
    ops.combine(
        with_history, outputs, weights=weights, finite=finite, momentum=momentum, rescale=rescale
    )
    one = torch.ones(1).double()
    single = TaskGradients(torch.ones(1, 1), Layout((0,), (1,)), one)
    ops.combine(single, [torch.empty(1)], weights=one, finite=finite)
    ops.combine(
        gradients._replace(mask=mask),
        outputs,
        weights=torch.ones(3, 2).double(),
        finite=finite,
        momentum=momentum,
        rescale=rescale,
    )


def launch_graddrop(
    gradients: TaskGradients, outputs: list, momentum: Momentum, mask: torch.Tensor
) -> None:
    """Launch with seeds and places of any size, which are one variant."""
    finite, counter = torch.tensor(True), torch.tensor(0)
    masked = gradients._replace(mask=mask)
    for seed, first in ((0, 0), (1, 1), (-5, 16), (2**31, 2**31), (2**63, 2**62), (2**70 + 1, 7)):
        dropout = SignDropout(seed, counter, 0.5, first)
        ops.graddrop(gradients, outputs, finite=finite, dropout=dropout)
        ops.graddrop(masked, outputs, finite=finite, dropout=dropout, momentum=momentum)
    assert variants_of(graddrop_kernel) == 2


def launch_everything() -> None:
    flat = layout_of([5000, 3, 0])
    layout = Layout.of(flat.offsets, flat.sizes)
    gradients = TaskGradients(filled(flat, 2, 0), layout, torch.ones(2).double())
    momentum = Momentum(filled(flat, 1, 2)[0], torch.zeros(3, dtype=torch.int64), 0.9)
    mask = torch.full((flat.length // 32,), -1, dtype=torch.int32)
    outputs = [torch.empty(5000), None, torch.empty(0).bfloat16()]
    accumulator = gradients.accumulators[0]
    for scale in (1, 0.5, torch.tensor(2.0)):
        ops.accumulate(accumulator, outputs, layout, scale=scale)
    ops.accumulate(accumulator[1:], [torch.randn(3)], Layout((0,), (3,)), overwrite=True)
    launch_gramian(gradients, momentum.buffer, mask)
    launch_arbitrate(gradients.scale)
    launch_combine(gradients, outputs, momentum, mask)
    launch_graddrop(gradients, outputs, momentum, mask)
    # As while a graph is captured; addresses of any size, and of none, are one variant.
    table = torch.zeros(130, 4, dtype=torch.int64)
    for addresses in ([0, 1, 16] + 127 * [0x7F0000000000], list(range(130))):
        plans.with_addresses(table, tuple(addresses))
    assert variants_of(plans.write_addresses) == 1


if __name__ == "__main__":
    pretend()
    for _ in range(2):
        launch_everything()
    print("fine")
