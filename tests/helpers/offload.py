"""Kernels run on the GPU for tests whose tensors lie on the CPU.

So the tests of every operation, of the optimizer and of the recorded runs check the real kernels
where there is a GPU, word for word as they check the interpreted ones elsewhere.
"""

import importlib
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map_only

from gcond_kernels.ops import OPERATIONS, backends

LAUNCHING = (*OPERATIONS, "multi_tensor_dot")


def install(monkeypatch, backend: str) -> None:
    """Let a backend take CPU tensors for one test, by way of the GPU."""
    unavailable, module_of = backends.unavailable, backends.Backend.module
    ours = offloaded_module(importlib.import_module(backends.MODULES[backend]))

    def is_ours(name, device):
        return name == backend and device.type == "cpu"

    def module(self, name):
        return ours if is_ours(name, self.device) else module_of(self, name)

    monkeypatch.setattr(
        backends, "unavailable", lambda b, d: None if is_ours(b, d) else unavailable(b, d)
    )
    monkeypatch.setattr(backends.Backend, "module", module)


def offloaded_module(module):
    names = [name for name in LAUNCHING if hasattr(module, name)]
    functions = {name: offloaded(getattr(module, name)) for name in names}
    if "resolve" in functions:
        functions["resolves_at_once"] = lambda gradients: module.resolves_at_once(
            gradients._replace(accumulators=gradients.accumulators.cuda())
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
