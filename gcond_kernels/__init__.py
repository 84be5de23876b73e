"""Gradient conflict resolution for multi-task training, in two passes over memory."""

from gcond_kernels.batchnorm import frozen_batchnorm
from gcond_kernels.checkpoint import TrainingState
from gcond_kernels.methods import GCond
from gcond_kernels.optimizer import GCondFused
from gcond_kernels.plot import plot_conflicts
from gcond_kernels.recorder import Recorder
from gcond_kernels.report import Report

__version__ = "0.1.0"
__all__ = [
    "GCond",
    "GCondFused",
    "Recorder",
    "Report",
    "TrainingState",
    "frozen_batchnorm",
    "ops",
    "plot_conflicts",
]

from gcond_kernels import ops
