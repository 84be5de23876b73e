"""The backend in Triton: each operation is a launch or two, whatever the number of tensors.

Nothing here synchronizes with the device; a CUDA graph can capture every operation once it has run
on tensors of the same sizes and dtypes. With TRITON_INTERPRET=1 in the environment the kernels run
on the CPU, interpreted: slow, for tests.
"""

from gcond_kernels.triton_kernels._accumulate import accumulate
from gcond_kernels.triton_kernels._arbitrate import arbitrate
from gcond_kernels.triton_kernels._combine import combine
from gcond_kernels.triton_kernels._graddrop import graddrop
from gcond_kernels.triton_kernels._gramian import gramian, multi_tensor_dot

__all__ = ["accumulate", "arbitrate", "combine", "graddrop", "gramian", "multi_tensor_dot"]
