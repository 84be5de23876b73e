"""Runs the kernels on the GPU for tests whose tensors lie on the CPU.

So the tests of every operation, of the optimizer and of the recorded runs check the real kernels
where there is a GPU, word for word as they check the interpreted ones elsewhere.
"""

import importlib
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map_only

from gcond_kernels import ops

ROOMS = {"triton": "gcond_kernels.triton_kernels", "cuda": "gcond_kernels.cuda"}
LAUNCHING = (*ops.OPERATIONS, "multi_tensor_dot")


def install(monkeypatch, backend: str) -> None:
    """For one test: this backend takes CPU tensors, by way of the GPU."""
    unavailable, backend_module = ops.unavailable, ops.backend_module
    room = offloaded_room(importlib.import_module(ROOMS[backend]))

    def is_ours(requested, device):
        return requested == backend and device.type == "cpu"

    def module(requested, device, operation):
        ours = is_ours(requested, device)
        return room if ours else backend_module(requested, device, operation)

    monkeypatch.setattr(
        ops, "unavailable", lambda b, d: None if is_ours(b, d) else unavailable(b, d)
    )
    monkeypatch.setattr(ops, "backend_module", module)


def offloaded_room(room):
    names = [name for name in LAUNCHING if hasattr(room, name)]
    functions = {name: offloaded(getattr(room, name)) for name in names}
    if "resolve" in functions:
        functions["resolves_at_once"] = lambda accumulators, sizes: room.resolves_at_once(
            accumulators.cuda(), sizes
        )
    return SimpleNamespace(**functions)


def offloaded(function):
    def call(*arguments, **options):
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
        result = function(*moved, **moved_options)
        for storage, on_gpu in storages.values():
            storage.copy_(on_gpu)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

    return call
