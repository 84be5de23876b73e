"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from gcond_kernels.methods.checks import check_number, check_option
from gcond_kernels.methods.host import Array, in_numpy, module_of
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import (
    cosines,
    from_normalized,
    inverse_norms,
    mean_weights,
    norms,
    quotient,
)
from gcond_kernels.methods.solvers import best_for_the_worst, definite, product


@dataclass(frozen=True)
class CAGrad(Method):
    """Take, of all vectors near the mean gradient, the one that is best for the worst-off task.

    B. Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv
    2110.14048. With g0 the mean gradient: the g within c ‖g0‖ of g0 whose smallest g·ĝ_k is the
    largest. Its dual is u on the simplex that minimises g_u·g0 + c ‖g0‖ ‖g_u‖, g_u = Σ_k u_k ĝ_k,
    and then g = g0 + c ‖g0‖ g_u / ‖g_u‖. Solved exactly.

    Args:
        c: radius of the ball around the mean gradient, relative to its norm, 0 or more.
        rescale: 0 leaves the result as it is (as TorchJD does), 1 divides it by 1 + c², 2 by 1 + c
            (LibMTL's options; its default is 1).

    Raises:
        ValueError: an option is out of its range.
    """

    c: float = 0.5
    rescale: int = 0

    def __post_init__(self) -> None:
        check_number(self, "c")
        known = type(self.rescale) is int and self.rescale in (0, 1, 2)
        check_option(self, "rescale", "0, 1 or 2", known)

    @in_numpy
    def weights(self, gramian: Array, state: State, known: Known) -> Array:
        """Return 1/K + c ‖g0‖ u / ‖g_u‖, divided by what `rescale` chooses."""
        divisor = (1.0, 1.0 + self.c**2, 1.0 + self.c)[self.rescale]
        mean = mean_weights(gramian)
        if self.c == 0.0:
            return mean / divisor
        C, n = definite(cosines(gramian), known.rounding), norms(gramian)
        normalized_mean = mean * n
        products = product(C, normalized_mean)  # g0 · ĝ_k / ‖ĝ_k‖
        module = module_of(gramian)
        square = (normalized_mean * products).sum(-1)[..., None]
        norm = module.sqrt(module.where(square > 0.0, square, 0.0))
        slope = module.clip(quotient(products, norm), -1.0, 1.0)
        # A task without a gradient is never the one that is worst off.
        slope = module.where(n > 0.0, slope, 10.0 * (1.0 + self.c))
        inverse = module.where(n > 0.0, inverse_norms(gramian), 1.0)
        y = best_for_the_worst(C, slope, inverse, self.c)
        return (mean + norm * from_normalized(y, gramian)) / divisor
