"""Methods: each turns the Gramian of the task gradients into one weight per task."""

import dataclasses

from gcond_kernels.methods.aligned_mtl import AlignedMTL
from gcond_kernels.methods.cagrad import CAGrad
from gcond_kernels.methods.checks import refuse_assignment
from gcond_kernels.methods.config import ConFIG
from gcond_kernels.methods.dwa import DWA
from gcond_kernels.methods.excess_mtl import ExcessMTL
from gcond_kernels.methods.fairgrad import FairGrad
from gcond_kernels.methods.famo import FAMO
from gcond_kernels.methods.gcond import GCond
from gcond_kernels.methods.graddrop import GradDrop
from gcond_kernels.methods.gradnorm import GradNorm
from gcond_kernels.methods.gradvac import GradVac
from gcond_kernels.methods.imtl_g import IMTLG
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.mgda import MGDA
from gcond_kernels.methods.nash_mtl import NashMTL
from gcond_kernels.methods.non_conflicting import NonConflicting
from gcond_kernels.methods.norm_balancing import NormBalancing
from gcond_kernels.methods.pcgrad import PCGrad
from gcond_kernels.methods.rlw import RLW
from gcond_kernels.methods.stch import STCH
from gcond_kernels.methods.sum import Sum
from gcond_kernels.methods.uncertainty import UncertaintyWeighting
from gcond_kernels.methods.upgrad import UPGrad

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
    "ExcessMTL",
    "FairGrad",
    "GCond",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Known",
    "Method",
    "NashMTL",
    "NonConflicting",
    "NormBalancing",
    "PCGrad",
    "State",
    "Sum",
    "UPGrad",
    "UncertaintyWeighting",
]

for _method in map(globals().get, __all__):
    if dataclasses.is_dataclass(_method):
        # A frozen dataclass says that it is frozen, and this what to do.
        _method.__setattr__ = refuse_assignment  # type: ignore[method-assign]
