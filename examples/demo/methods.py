"""The methods that the demo can compare, and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from gcond_kernels import methods
from gcond_kernels.methods import GCond

ALL = "all"


class Method(NamedTuple):
    """A method to make one gradient from the tasks' losses."""

    key: str  # on the command line
    name: str  # in tables and pictures
    mode: Literal["exact", "stochastic"] | None  # of GCondFused; None is the plain sum, without it
    step_cost: float  # rough time of a step, plain sum is 1
    resolver: methods.Method | None = None  # of GCondFused, with its class's default options
    # Task → factor of its loss weight.
    factors: Mapping[str, float] = {}  # never changed

    @property
    def names_winners(self) -> bool:
        """Whether it names the winner of a conflict; others weight the tasks and name none."""
        return self.resolver is not None and self.resolver.state_type is GCond


PLAIN = Method("plain", "plain sum", None, 1.0)
METHODS = (
    PLAIN,
    Method("sum", "Sum", "exact", 1.6, methods.Sum()),
    Method("gcond", "GCond exact", "exact", 1.6, GCond()),
    Method("gcond-stochastic", "GCond stochastic", "stochastic", 1.0, GCond()),
    Method("pcgrad", "PCGrad", "exact", 1.6, methods.PCGrad()),
    Method("cagrad", "CAGrad", "exact", 1.6, methods.CAGrad()),
    Method("mgda", "MGDA", "exact", 1.6, methods.MGDA()),
    Method("gradnorm", "GradNorm", "exact", 1.6, methods.GradNorm()),
    Method("upgrad", "UPGrad", "exact", 1.8, methods.UPGrad()),
    Method("gradvac", "GradVac", "exact", 1.6, methods.GradVac()),
    Method("alignedmtl", "AlignedMTL", "exact", 1.6, methods.AlignedMTL()),
    Method("imtlg", "IMTLG", "exact", 1.6, methods.IMTLG()),
    Method("nashmtl", "NashMTL", "exact", 1.7, methods.NashMTL()),
    Method("dwa", "DWA", "exact", 1.6, methods.DWA()),
    Method("famo", "FAMO", "exact", 1.6, methods.FAMO()),
    Method("stch", "STCH", "exact", 1.6, methods.STCH()),
    Method("rlw", "RLW", "exact", 1.6, methods.RLW()),
    Method("uncertainty", "Uncertainty", "exact", 1.6, methods.UncertaintyWeighting()),
    Method("config", "ConFIG", "exact", 1.6, methods.ConFIG()),
    Method("fairgrad", "FairGrad", "exact", 1.8, methods.FairGrad()),
    Method("normbalancing", "NormBalancing", "exact", 1.6, methods.NormBalancing()),
    Method("excessmtl", "ExcessMTL", "exact", 1.6, methods.ExcessMTL()),
    Method("nonconflicting", "NonConflicting", "exact", 1.7, methods.NonConflicting(GCond())),
    Method("graddrop", "GradDrop", "exact", 1.7, methods.GradDrop()),
)
# What often helps more than any method, where one task's loss is too small beside another's.
BOUNDARY_X10 = Method("boundary-x10", "boundary x 10", None, 1.0, factors={"boundary": 10.0})
KEYS = tuple(method.key for method in METHODS)
DEFAULT = ("plain", "gcond", "gcond-stochastic")


def methods_of(names: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names in their order, each once, behind the plain sum.

    Raises:
        ValueError: there is no such method; the message lists those that there are.
    """
    by_key = {method.key: method for method in (*METHODS, BOUNDARY_X10)}
    chosen = {PLAIN.key: PLAIN}
    for name in names:
        key = name.lower()
        if key != ALL and key not in by_key:
            raise ValueError(f"there is no method {name!r}; known: {', '.join(by_key)}, {ALL}")
        for one in KEYS if key == ALL else (key,):
            chosen[one] = by_key[one]
    return tuple(chosen.values())
