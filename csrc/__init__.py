"""The backend in CUDA C++: the operations, and a whole resolution in one launch.

The kernels are in the extension module `gcond_kernels._cuda`; these files find the memory that it
works on. With GCOND_CUDA_HOST=1 in the environment CPU tensors are served too, by a driver that
runs the kernels' own code on the host: slow, for tests.
"""

import torch

from gcond_kernels import _cuda
from gcond_kernels.cuda.accumulate import accumulate
from gcond_kernels.cuda.arbitrate import arbitrate
from gcond_kernels.cuda.combine import combine
from gcond_kernels.cuda.graddrop import graddrop
from gcond_kernels.cuda.gramian import gramian, multi_tensor_dot
from gcond_kernels.cuda.resolve import resolve, resolves_at_once

__all__ = [
    "accumulate",
    "arbitrate",
    "combine",
    "graddrop",
    "gramian",
    "multi_tensor_dot",
    "resolve",
    "resolves_at_once",
]

# How the module reads tensors: by C functions that torch offers, without a header of torch.
_cuda.use_exchange(torch.Tensor.__dlpack_c_exchange_api__)
