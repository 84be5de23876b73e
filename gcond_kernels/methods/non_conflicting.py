"""NonConflicting: the weights of another method, moved until no task goes up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods import host
from gcond_kernels.methods.function import method_of
from gcond_kernels.methods.host import Array, in_numpy, module_of
from gcond_kernels.methods.method import Comparison, Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized, norms
from gcond_kernels.methods.solvers import (
    definite,
    identity,
    nonnegative_minimum,
    product,
    solve,
)
from gcond_kernels.ops.contexts import fixed_precision

# A cosine above minus this, relative to the terms that it is the sum of, is rounding.
ROUNDING = 1e-12
# What the optimizer reads of a method, and what is as the inner method has it.
OF_INNER_METHOD = (
    *("needs_losses", "history_dtype", "shared_state", "parameters", "thresholds"),
    # Not bounded_weights: where gradients depend on each other or cancel out, w + λ may be large.
    "compares_single_task",
    "follows_loss_weights",
)


@dataclass(frozen=True, init=False)
class NonConflicting(Method):
    """Move the weights of a method as little as possible, so that no task's loss goes up.

    ::

        optimizer = GCondFused(base, tasks, method=NonConflicting(GCond()))

    Of the gradients that have no negative inner product with any task's, take the one that is next
    to the method's own, g = Σ_k w_k ĝ_k: its projection onto the dual cone of the tasks' gradients.
    It has the weights w + λ, with the λ ≥ 0 at which ½ λᵀ S λ + λᵀ S w is smallest (P. Quinton and
    V. Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, Proposition 1; D.
    Lopez-Paz and M. Ranzato, "Gradient Episodic Memory", NeurIPS 2017, arXiv 1706.08840, equation
    11). It is no longer than g. Where S w ≥ 0 already, the weights stay as they are, to the bit.
    `NonConflicting(Sum())` is K times the DualProj of TorchJD.

    All tasks are compared over all parameters that they share (with granularity="tensor" over each
    tensor), also where the inner method looks at some of them. S w ≥ 0 holds up to rounding, of
    gradients in float32, as in training, 1e-6 of ‖ĝ_k‖ Σ_j |w_j| ‖ĝ_j‖: what is left of gradients
    that depend on each other, or cancel out, is not known any better. Momentum, and what the base
    optimizer makes of the gradient, may go against a task all the same.

    Everything else is as of the inner method: state, history, random numbers, losses, thresholds.
    Its state goes on where NonConflicting is put around it in training, or loads its checkpoint.

    Args:
        method: one of `gcond_kernels.methods`, or a function from the Gramian [K, K] to weights
            [K].

    Raises:
        TypeError: the method is none.
        ValueError: the method is applied otherwise than by weights, as GradDrop is.
    """

    method: Method

    def __init__(self, method: Method | Callable[[Tensor], Tensor]) -> None:
        inner = method_of(method)
        if type(inner).apply is not Method.apply:
            raise ValueError(
                f"NonConflicting moves the weights of a method, and {inner!r} has none that "
                "determine its result: give it a method that weights the tasks, such as GCond()"
            )
        object.__setattr__(self, "method", inner)
        for name in OF_INNER_METHOD:
            object.__setattr__(self, name, getattr(inner, name))

    @property
    def needs_history(self) -> bool:
        """Whether the inner method compares with the last step's gradients."""
        return self.method.needs_history

    @property
    def state_owner(self) -> Method:
        """The inner method, whose state this is."""
        return self.method.state_owner

    def with_thresholds(self, thresholds: tuple[float, float, float]) -> Method:
        """Return the same around the inner method with other thresholds."""
        return replace(self, method=self.method.with_thresholds(thresholds))

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return the inner method's state before the first step."""
        return self.method.new_state(tasks, device)

    def check(self, granularity: str, sized_by: str | None) -> None:
        """Raise a ValueError where other options of the optimizer do not go with the method."""
        self.method.check(granularity, sized_by)

    @fixed_precision
    def decide(self, comparison: Comparison, state: State) -> ops.Arbitration:
        """Return what the inner method decides, with its weights moved where they are finite."""
        decision, S = self.method.decide(comparison, state), comparison.gramian
        # Where it is not finite, and weights are 0, solvers are not to be shown it.
        S = torch.where(decision.finite[..., None, None], S, identity(S))
        return decision._replace(weights=self.moved(S, decision.weights, comparison.known))

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the inner method's weights, moved."""
        return self.moved(gramian, self.method.weights(gramian, state, known), known)

    @in_numpy
    def moved(self, gramian: Array, weights: Array, known: Known) -> Array:
        """Return weights + λ, [..., K], of finite Gramians [..., K, K]."""
        where, C, y = module_of(gramian).where, cosines(gramian), weights * norms(gramian)
        # Of the normalized gradients: the inner product of each with g, and its terms.
        along, terms = product(C, y), product(abs(C), abs(y))
        against = along < -ROUNDING * terms
        if host.may_read(gramian) and not against.any():
            return weights
        C = definite(C, known.rounding)
        active = (nonnegative_minimum(C, product(C, y)) > 0.0) & against.any(-1)[..., None]
        # These get an inner product of 0. Solved for as a whole: in y + λ a negative y cancels out.
        system = where(active[..., None], C, identity(C))
        y = solve(system, where(active, 0.0, y))
        return where(active, from_normalized(y, gramian), weights)
