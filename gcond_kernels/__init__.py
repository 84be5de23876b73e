"""Gradient conflict resolution for multi-task training, in two passes over memory."""

from gcond_kernels.methods import GCond
from gcond_kernels.optimizer import GCondFused
from gcond_kernels.report import Report

__version__ = "0.1.0"
__all__ = ["GCond", "GCondFused", "Report", "ops"]

from gcond_kernels import ops
