"""The backend in Triton: the operations, a launch or two each, whatever the tensors.

Nothing here waits for the device; a CUDA graph can capture every operation once it has run on
tensors of the same sizes and types. With TRITON_INTERPRET=1 in the environment the kernels run on
the CPU, interpreted: slow, for tests.
"""

from gcond_kernels.triton_kernels._accumulate import accumulate
from gcond_kernels.triton_kernels._arbitrate import arbitrate
from gcond_kernels.triton_kernels._combine import combine
from gcond_kernels.triton_kernels._graddrop import graddrop
from gcond_kernels.triton_kernels._gramian import gramian, multi_tensor_dot

__all__ = ["accumulate", "arbitrate", "combine", "graddrop", "gramian", "multi_tensor_dot"]
