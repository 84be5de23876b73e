"""Gradient conflict resolution for multi-task training, in two passes over memory."""

from gcond_kernels.diagnostics.plots import plot_conflicts, plot_layer_conflicts
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.report import Report
from gcond_kernels.distributed.checkpoint import TrainingState
from gcond_kernels.distributed.options import Distributed
from gcond_kernels.functional import gramian, resolve_gradients
from gcond_kernels.lion_lars import LionLars
from gcond_kernels.methods import (
    DWA,
    FAMO,
    IMTLG,
    MGDA,
    RLW,
    STCH,
    AlignedMTL,
    CAGrad,
    ConFIG,
    ExcessMTL,
    FairGrad,
    GCond,
    GradDrop,
    GradNorm,
    GradVac,
    NashMTL,
    NonConflicting,
    NormBalancing,
    PCGrad,
    Sum,
    UncertaintyWeighting,
    UPGrad,
)
from gcond_kernels.optimizer import GCondFused
from gcond_kernels.precision.batchnorm import frozen_batchnorm
from gcond_kernels.recipes.recon import conflict_table, split_conflicting_layers
from gcond_kernels.recipes.sparse import neuron_mask

__version__ = "0.1.0"
__all__ = [
    "DWA",
    "FAMO",
    "IMTLG",
    "MGDA",
    "RLW",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Distributed",
    "ExcessMTL",
    "FairGrad",
    "GCond",
    "GCondFused",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "LionLars",
    "NashMTL",
    "NonConflicting",
    "NormBalancing",
    "PCGrad",
    "Recorder",
    "Report",
    "Sum",
    "TrainingState",
    "UPGrad",
    "UncertaintyWeighting",
    "conflict_table",
    "frozen_batchnorm",
    "gramian",
    "neuron_mask",
    "ops",
    "plot_conflicts",
    "plot_layer_conflicts",
    "resolve_gradients",
    "split_conflicting_layers",
]

from gcond_kernels import ops
