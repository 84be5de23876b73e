"""The backend in CUDA C++: the operations, and a whole resolution in one launch.

The kernels are in the extension module `gcond_kernels._cuda`; these files allocate the memory that
they work on. With GCOND_CUDA_HOST=1 in the environment CPU tensors are served too, by the kernels'
own code compiled for the CPU: slow, for tests.
"""

import torch

from gcond_kernels import _cuda
from gcond_kernels.cuda._accumulate import accumulate
from gcond_kernels.cuda._arbitrate import arbitrate
from gcond_kernels.cuda._combine import combine
from gcond_kernels.cuda._gramian import gramian
from gcond_kernels.cuda._resolve import resolve, resolves_at_once

__all__ = ["accumulate", "arbitrate", "combine", "gramian", "resolve", "resolves_at_once"]

# The C functions by which torch's tensors are read.
_cuda.use_exchange(torch.Tensor.__dlpack_c_exchange_api__)
