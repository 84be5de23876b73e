"""The backend in C++ for CPUs: the operations, and a whole resolution in one call.

The kernels are in the extension module `gcond_kernels._cpu`; these files allocate the memory that
they write to.
"""

import torch

from gcond_kernels import _cpu
from gcond_kernels.cpu._accumulate import accumulate
from gcond_kernels.cpu._arbitrate import arbitrate
from gcond_kernels.cpu._combine import combine
from gcond_kernels.cpu._gramian import gramian
from gcond_kernels.cpu._resolve import resolve, resolves_at_once

__all__ = ["accumulate", "arbitrate", "combine", "gramian", "resolve", "resolves_at_once"]

# An editable installation keeps its module when the sources change.
if getattr(_cpu, "INTERFACE", 0) != 1:
    raise ImportError("it was compiled from other sources: pip install again compiles these")

# The C functions by which torch's tensors are read.
_cpu.use_exchange(torch.Tensor.__dlpack_c_exchange_api__)
