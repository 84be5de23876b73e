"""Find, on CPU tensors, what would synchronize with a GPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Python's ways from a tensor to a number; on CPU tensors some of them pass no dispatcher.
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
METHODS += ("__array__", "nonzero", "is_nonzero")
OPERATIONS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")


class _Dispatched(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in OPERATIONS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Within it `found` lists every read of a tensor's value by the host."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._dispatched = _Dispatched(self.found)

    def __enter__(self):
        self._dispatched.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._dispatched.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in METHODS and isinstance(args[0], torch.Tensor):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Uploads(TorchFunctionMode):
    """Within it `found` lists each copy of numbers to a tensor, which synchronizes with a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "from_numpy", "scalar_tensor"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))
