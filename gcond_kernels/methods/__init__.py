"""Methods: each turns the Gramian of the task gradients into one weight per task."""

from gcond_kernels.methods.gcond import GCond

__all__ = ["GCond"]
