"""Task gradients, their Gramians, and methods that weight the tasks by them."""

import numpy as np
import pytest
import torch

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
from gcond_kernels.methods.method import Comparison, Known, fresh_state
from gcond_kernels.methods.solvers import FLOAT32_ROUNDING, FLOAT64_ROUNDING

CPU = torch.device("cpu")

SOLVED = [
    *(UPGrad(), MGDA(), CAGrad(), IMTLG(), ConFIG(), NashMTL(), FairGrad(), AlignedMTL()),
    NonConflicting(Sum()),
]
RANDOM = [PCGrad(), GradVac(), NonConflicting(GradVac())]
# Weights that are the same for all Gramians of a batch, by the losses or at random.
LOSSES = [DWA(), FAMO(), STCH(), UncertaintyWeighting()]
OF_ALL_TENSORS = [*LOSSES, RLW()]
KEPT = [GradNorm(), NormBalancing(), ExcessMTL()]  # from step to step
METHODS = [Sum(), *SOLVED, *RANDOM, *KEPT, *OF_ALL_TENSORS, GCond()]


def name_of(value) -> str:
    """What a test with a method as its parameter is called."""
    if isinstance(value, NonConflicting):
        return f"NonConflicting-{name_of(value.method)}"
    return type(value).__name__ if hasattr(value, "weights") else ""


every_method = pytest.mark.parametrize("method", METHODS, ids=name_of)

FAMILIES = ("random", "conflicting", "anti-parallel", "opposite", "deficient")


def gradients(family: str, tasks: int, seed: int) -> torch.Tensor:
    """[K, N] gradients of a family.

    "anti-parallel": the first two nearly, 1 + cos is some 5e-5; "opposite": some 5e-7.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if family == "deficient":
        return normal(tasks, max(1, tasks // 2)) @ normal(max(1, tasks // 2), 2 * tasks)
    J = normal(tasks, 2 * tasks)
    if family == "conflicting":
        J = J - torch.rand((), generator=generator, dtype=torch.float64) * 1.2 * J.mean(0)
    if family in ("anti-parallel", "opposite"):
        off = 1e-2 if family == "anti-parallel" else 1e-3
        across = normal(2 * tasks)
        across -= (across @ J[0]) / (J[0] @ J[0]) * J[0]
        J[1] = -J[0] + off * J[0].norm() * across / across.norm()
    return J


def norms_apart(J: torch.Tensor, decades: float, seed: int) -> torch.Tensor:
    """The same directions, with norms changed by factors of up to 10^±decades."""
    generator = torch.Generator().manual_seed(seed)
    exponents = 2.0 * torch.rand(len(J), 1, generator=generator, dtype=torch.float64) - 1.0
    return J * 10.0 ** (decades * exponents)


def gramian(J: torch.Tensor) -> torch.Tensor:
    S = J @ J.mT
    return (S + S.mT) / 2.0


def unit_gramian(J: torch.Tensor) -> torch.Tensor:
    return gramian(J / J.norm(dim=-1, keepdim=True)).fill_diagonal_(1.0)


def raised(C: torch.Tensor, rounding: float = FLOAT32_ROUNDING) -> torch.Tensor:
    """What `definite` is to make of cosines, in another arithmetic."""
    values, vectors = np.linalg.eigh(C.numpy())
    if values.min() >= rounding:
        return C
    return torch.from_numpy((vectors * np.maximum(values, rounding)) @ vectors.T)


def random_gramian(tasks: int, seed: int = 0, family: str = "conflicting") -> torch.Tensor:
    return gramian(gradients(family, tasks, seed))


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(method, S):
    """The weights of a first step, with losses of 1 where they are needed."""
    return method(S, S.new_ones(S.shape[-1]) if method.needs_losses else None)


def resolve(method, S, state, losses=None, rounding=FLOAT64_ROUNDING, tasks=None):
    """What a step decides, with losses of 1 where they are needed and none are given."""
    if method.needs_losses and losses is None:
        losses = S.new_ones(S.shape[-1])
    known = Known(rounding, losses, tasks)
    return method.decide(Comparison(S, None, S.new_ones(S.shape[-1]), known=known), state)


def warm(method, tasks, batch=()):
    """A state after three steps."""
    state = fresh_state(method, tasks, batch, CPU)
    for seed in range(3):
        S = random_gramian(tasks, seed)
        losses = float64([1.0 + seed * k for k in range(tasks)])
        resolve(method, S.expand(*batch, tasks, tasks).contiguous(), state, losses)
    return state


def snapshot(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def is_unchanged(state, before) -> bool:
    """Whether a state has the same bits, NaN included."""
    return all(
        tensor.numpy().tobytes() == before[name].numpy().tobytes() for name, tensor in state.items()
    )
