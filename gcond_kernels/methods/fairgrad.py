"""FairGrad: gradients that share the gain fairly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_number, check_option
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.nash_mtl import bargain
from gcond_kernels.methods.normalized import cosines, from_normalized, norms
from gcond_kernels.methods.solvers import definite

# Newton steps, which all of 6,000 Gramians took or fewer with α of 0.5 to 2; of norms 1e12 apart 16
# in 500 are left unsolved with α = 0.1, and 2 with 5.
STEPS = 40
POLISHING = 3  # steps that remove the rounding of an inverse


@dataclass(frozen=True)
class FairGrad(Method):
    """Share the decrease of the losses by α-fairness.

    H. Ban and K. Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, arXiv
    2402.15638, equation 4: S w = w^(−1/α), w > 0. α = 1 is `NashMTL`; the larger α, the more goes
    to the task that gains least, and towards 0 the result becomes the plain sum. S is divided by
    its Frobenius norm before, as for `NashMTL`, so that a factor common to all gradients does not
    change the weights. A factor of one loss changes the direction, unless α = 1.

    Args:
        alpha: α, in [0.1, 10].

    Raises:
        ValueError: α is out of its range.
    """

    follows_loss_weights = False
    alpha: float = 2.0

    def __post_init__(self) -> None:
        check_number(self, "alpha", 10.0)
        check_option(self, "alpha", "a number in [0.1, 10]", self.alpha >= 0.1)

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return w of S w = ‖S‖ w^(−1/α)."""
        C = definite(cosines(gramian), known.rounding)
        size = torch.linalg.matrix_norm(gramian)[..., None].sqrt()
        n = norms(gramian) / torch.where(size > 0.0, size, 1.0)
        power = 1.0 / self.alpha
        # w_k ‖ĝ_k‖ = u_k v_k, where v is 1 for orthogonal gradients.
        unit = torch.where(n > 0.0, n, 1.0) ** ((power - 1.0) / (power + 1.0))
        weights: Tensor = size * from_normalized(
            unit * self.shares(C, unit, known.rounding), gramian
        )
        return weights

    def shares(self, C: Tensor, unit: Tensor, rounding: float) -> Tensor:
        """Return the v > 0 of C (u ∘ v) = u / v^(1/α) for definite cosines C, [..., K]."""
        power, start = 1.0 / self.alpha, torch.ones_like(unit)
        if self.alpha <= 1.0:
            return bargain(C, unit, power, rounding, start, STEPS)
        # First for t = v^(−1/α), of C⁻¹ (u ∘ t) = u / t^α: Newton's method likes a large power. No
        # eigenvalue of C is larger than its trace, K.
        inverse = torch.linalg.inv_ex(C)[0]
        t = bargain(inverse, unit, self.alpha, 1.0 / C.shape[-1], start, STEPS)
        return bargain(C, unit, power, rounding, t**-self.alpha, POLISHING)
