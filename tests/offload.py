"""Runs the Triton kernels on the GPU for tests whose tensors lie on the CPU.

So the tests of every operation, of the optimizer and of the recorded runs check the real kernels
where there is a GPU, word for word as they check the interpreted ones elsewhere.
"""

from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map_only

from gcond_kernels import ops


def install(monkeypatch) -> None:
    """For one test: `backend="triton"` takes CPU tensors, by way of the GPU."""
    unavailable, backend_module = ops.unavailable, ops.backend_module

    def is_ours(backend, device):
        return backend == "triton" and device.type == "cpu"

    def module(requested, device):
        return OFFLOADED if is_ours(requested, device) else backend_module(requested, device)

    monkeypatch.setattr(
        ops, "unavailable", lambda b, d: None if is_ours(b, d) else unavailable(b, d)
    )
    monkeypatch.setattr(ops, "backend_module", module)


def offloaded(name):
    def call(*arguments, **options):
        from gcond_kernels import triton_kernels

        storages = {}

        def to_gpu(tensor):
            # The whole storage: views stay views of it, and as misaligned as they are.
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in storages:
                storages[key] = storage, storage.cuda()
            twin = torch.empty(0, dtype=tensor.dtype, device="cuda")
            return twin.set_(
                storages[key][1], tensor.storage_offset(), tensor.size(), tensor.stride()
            )

        moved, moved_options = tree_map_only(torch.Tensor, to_gpu, (arguments, options))
        result = getattr(triton_kernels, name)(*moved, **moved_options)
        for storage, on_gpu in storages.values():
            storage.copy_(on_gpu)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

    return call


OFFLOADED = SimpleNamespace(
    **{name: offloaded(name) for name in (*ops.OPERATIONS, "multi_tensor_dot")}
)
