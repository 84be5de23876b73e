"""Makes every launch as the host makes it, up to the launch itself, with no GPU present.

Run as a script, where Triton does not interpret: arguments are bound and specialized and the
kernels compiled for sm_90, on CPU tensors; twice, for a second launch finds what the first left.
"""

import os
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gcond_kernels import GCond, ops
from gcond_kernels.methods.method import Comparison
from gcond_kernels.ops import backends
from gcond_kernels.triton_kernels import memory
from gcond_kernels.triton_kernels._graddrop import graddrop_kernel
from tests.helpers import by_name
from tests.helpers.flat import filled, layout_of


def pretend() -> None:
    """A driver that knows a GPU and launches nothing; the Triton backend for CPU tensors."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    run = triton.JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        assert len(grid) <= 3
        assert all(0 < size < 2**31 for size in grid[:1])
        assert all(0 < size < 2**16 for size in grid[1:])
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        # A product fused into a sum rounds otherwise, and so picks otherwise.
        assert self is not graddrop_kernel or "fma." not in compiled.asm["ptx"]
        return compiled

    triton.JITFunction.run = warm_up
    backends.unavailable = lambda backend, device: None
    os.environ["GCOND_BACKEND"] = "triton"


def variants_of(kernel: triton.JITFunction) -> int:
    """How many variants of a kernel were compiled."""
    (variants,) = (caches[0] for caches in kernel.device_caches.values())
    return len(variants)


def launch_graddrop(where: tuple, one: torch.Tensor, moving: dict, mask: torch.Tensor) -> None:
    """Seeds and places of any size are one variant."""
    given = {"scale": one, "finite": torch.tensor(True), "counter": torch.tensor(0)}
    for seed, first in ((0, 0), (1, 1), (-5, 16), (2**31, 2**31), (2**63, 2**62), (2**70 + 1, 7)):
        by_name.graddrop(*where, **given, seed=seed, first=first, leak=0.5)
        by_name.graddrop(*where, **given, **moving, seed=seed, beta=0.9, mask=mask)
    assert variants_of(graddrop_kernel) == 2


def launch_everything() -> None:
    layout = layout_of([5000, 3, 0])
    accumulators, history = filled(layout, 2, 0), filled(layout, 2, 1, torch.bfloat16)
    momentum, one = filled(layout, 1, 2)[0], torch.ones(2).double()
    mask = torch.full((layout.length // 32,), -1, dtype=torch.int32)
    gradients = [torch.randn(5000), None, torch.randn(0).bfloat16()]
    for scale in (1, 0.5, torch.tensor(2.0)):
        by_name.accumulate(accumulators[0], gradients, layout, scale=scale)
    by_name.accumulate(accumulators[0, 1:], [torch.randn(3)], ([0], [3]), overwrite=True)
    by_name.gramian(accumulators, layout, scale=one)
    products = by_name.gramian(
        accumulators, layout, scale=one, history=history, history_scale=one,
        momentum=momentum,
    )  # fmt: skip
    by_name.gramian(
        accumulators, layout, scale=one, history=history, history_scale=one, mask=mask
    )
    for method in (GCond(), GCond(max_iterations=1, dominance_window=0), GCond(max_iterations=0)):
        state = method.new_state(2, torch.device("cpu"))
        method.decide(Comparison(products.total, products.cross, one), state)
        method.decide(Comparison(products.total, None, one), state)
        own = state.pop("history_scale")
        states = {name: value.expand(3, *value.shape).clone() for name, value in state.items()}
        by_name.arbitrate(
            products.per_tensor[:, :2, :2].contiguous(), products.cross_per_tensor, one, **states,
            history_scale=own, settings=method,
        )  # fmt: skip
    given = {"weights": one, "scale": one, "finite": torch.tensor(True)}
    given |= {"per_tensor": products.per_tensor}
    moving = {"momentum": momentum, "momentum_steps": torch.zeros(3, dtype=torch.int64)}
    outputs = [torch.empty(5000), None, torch.empty(0).bfloat16()]
    by_name.combine(
        accumulators, outputs, layout, **given, history=history, **moving, beta=0.9,
        max_norm=1.0,
    )  # fmt: skip
    by_name.combine(torch.ones(1, 1), [torch.empty(1)], ([0], [1]), **given | {
        "weights": one[:1], "scale": one[:1], "per_tensor": torch.ones(1, 1, 1).double(),
    })  # fmt: skip
    given["weights"] = torch.ones(3, 2).double()
    by_name.combine(
        accumulators, outputs, layout, **given, **moving, beta=0.9, max_norm=1.0, mask=mask
    )
    launch_graddrop((accumulators, outputs, layout), one, moving, mask)
    # As while a graph is captured; addresses of any size, and of none, are one variant.
    table = torch.zeros(130, 4, dtype=torch.int64)
    for addresses in ([0, 1, 16] + 127 * [0x7F0000000000], list(range(130))):
        memory.with_addresses(table, tuple(addresses))
    assert variants_of(memory.write_addresses) == 1
    ops.multi_tensor_norm([torch.randn(1)])
    ops.multi_tensor_norm([])
    ops.multi_tensor_cosine_similarity([torch.randn(9, 9)], [torch.randn(9, 9).half()])


if __name__ == "__main__":
    pretend()
    for _ in range(2):
        launch_everything()
    print("fine")
