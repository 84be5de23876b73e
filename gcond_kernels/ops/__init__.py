"""The operations of the kernels; each is one function, whatever the backend.

    accumulate   gradients of one task  →  added to that task's accumulator
    gramian      accumulators, history  →  inner products
    arbitrate    inner products, state  →  one weight per task
    combine      accumulators, weights  →  the gradient of every parameter

`graddrop` takes the place of the last two where signs are chosen element by element; `resolve` is
gramian, arbitrate and combine in one call. Each raises a ValueError that names the argument which
does not fit, before anything is written.
"""

from gcond_kernels.ops.backends import BACKENDS, OPERATIONS, Backend, backend_for, unavailable
from gcond_kernels.ops.norms import multi_tensor_cosine_similarity, multi_tensor_norm
from gcond_kernels.ops.operations import accumulate, arbitrate, combine, graddrop, gramian, resolve
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Layout,
    Momentum,
    Rescale,
    Settings,
    SignDropout,
    TaskGradients,
)

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "Arbitration",
    "ArbitrationState",
    "Backend",
    "Gramians",
    "Layout",
    "Momentum",
    "Rescale",
    "Settings",
    "SignDropout",
    "TaskGradients",
    "accumulate",
    "arbitrate",
    "backend_for",
    "combine",
    "graddrop",
    "gramian",
    "multi_tensor_cosine_similarity",
    "multi_tensor_norm",
    "resolve",
    "unavailable",
]
