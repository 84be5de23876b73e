"""Patch Triton's interpreter, so that it is fast and exact enough for a test suite.

- A call of one jit function by another patches the language again, which takes longer than running
  it: here each module that defines such functions is patched once.
- It ignores hints of alignment; here a hint that is false is an error, as on a GPU.
- After a launch it copies every storage back to the device, also where that is the CPU and the
  copy is the storage itself; for memory that was only reserved this would allocate gigabytes.
- It truncates float32 to bfloat16, where a GPU rounds to nearest, ties to even.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def patch() -> None:
    """Patch Triton's interpreter, for this process."""
    interpreter.InterpretedFunction.__call__ = call_without_patching
    interpreter._convert_float = convert_float
    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


_patched: set[int] = set()  # ids of the namespaces of modules


def call_without_patching(self, *args, **kwargs):
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*args, **kwargs)


def patch_lang(function, original=interpreter._patch_lang):
    scope = original(function)
    scope.set_attr(tl, "multiple_of", checked_multiple_of)
    return scope


def checked_multiple_of(pointer, value):
    assert (pointer.handle.data % np.uint64(value) == 0).all(), "misaligned address"
    return pointer


def convert_float(data, source, target, rounding, original=interpreter._convert_float):
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return original(data, source, target, rounding)
