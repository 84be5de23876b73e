"""Gradient conflict resolution for multi-task training, in two passes over memory."""

from gcond_kernels.batchnorm import frozen_batchnorm
from gcond_kernels.checkpoint import TrainingState
from gcond_kernels.methods import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    GCond,
    GradDrop,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)
from gcond_kernels.optimizer import GCondFused
from gcond_kernels.plot import plot_conflicts, plot_layer_conflicts
from gcond_kernels.recon import conflict_table, split_conflicting_layers
from gcond_kernels.recorder import Recorder
from gcond_kernels.report import Report
from gcond_kernels.sparse import neuron_mask

__version__ = "0.1.0"
__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "GCond",
    "GCondFused",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "NashMTL",
    "PCGrad",
    "Recorder",
    "Report",
    "Sum",
    "TrainingState",
    "UPGrad",
    "conflict_table",
    "frozen_batchnorm",
    "neuron_mask",
    "ops",
    "plot_conflicts",
    "plot_layer_conflicts",
    "split_conflicting_layers",
]

from gcond_kernels import ops
