"""The backend in plain PyTorch: what every other backend is compared with.

It runs on any device that PyTorch runs on, reads memory in two passes, and is the
fallback where neither Triton nor CUDA is to be had.
"""

from gcond_kernels.python._accumulate import accumulate
from gcond_kernels.python._arbitrate import arbitrate
from gcond_kernels.python._combine import combine
from gcond_kernels.python._graddrop import graddrop
from gcond_kernels.python._gramian import gramian
from gcond_kernels.python.norms import multi_tensor_dot

__all__ = ["accumulate", "arbitrate", "combine", "graddrop", "gramian", "multi_tensor_dot"]
