"""The backend in plain PyTorch: what every other backend is compared with.

It is written to be read: tensor by tensor, in chunks. It serves where no other backend can, and
makes the Gramians of more tasks than the kernels of a GPU take.
"""

from gcond_kernels.python._accumulate import accumulate
from gcond_kernels.python._arbitrate import arbitrate
from gcond_kernels.python._combine import combine
from gcond_kernels.python._graddrop import graddrop
from gcond_kernels.python._gramian import gramian
from gcond_kernels.python.norms import multi_tensor_dot

__all__ = ["accumulate", "arbitrate", "combine", "graddrop", "gramian", "multi_tensor_dot"]
