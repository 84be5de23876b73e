"""The report of a step, as plain Python numbers, and the tensors that it is made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.diagnostics.records import (
    ZONES,
    incidence_of,
    known,
    norms_of,
    pair_cosines,
    ratio_of,
    zone_of,
)
from gcond_kernels.storage.shared_parameters import SharedParameters, summed

# Products of the result with the tasks' gradients are known up to this part of their terms, as
# Gramians are sums in float32 (docs/methods.md, "What each guarantees").
ROUNDING = 1e-6


class Conflict(NamedTuple):
    """One conflict that was resolved.

    Attributes:
        tasks: the pair.
        cosine: of the two gradients when the conflict was resolved, in [-1, 1].
        zone: "mild", "moderate" or "critical".
        winner: the task that was chosen; None in the mild zone of `arbitration="zones"`, where
            both gradients are projected. In the mild zone of "smooth" both are too, and the winner
            enters the history.
        parameter: with granularity="tensor" the parameter within which the two conflict.
    """

    tasks: tuple[str, str]
    cosine: float
    zone: str
    winner: str | None
    parameter: str | None = None


@dataclass(frozen=True)
class Report:
    """Report one resolution, in plain Python numbers.

    Attributes:
        step: how many resolutions there have been, this one included.
        skipped: a gradient held a NaN or an infinity, or was so large (about 1e19) that its square
            exceeds float32 (1e154 with float64 accumulators): `.grad` is zero, the step is left
            out.
        skipped_steps: how many resolutions were skipped so far.
        nonfinite_tasks: the tasks whose gradient was not finite in this one. With
            on_nonfinite="drop_task" they took no part in it.
        nonfinite_steps: task → in how many resolutions its gradient was not finite so far.
        micro_batches: task → micro-batches that it had in the window, of all ranks where
            accumulators are summed over ranks.
        losses: task → mean of its losses in the window, without the loss weight, of all ranks; None
            without a micro-batch, and where that is not finite.
        norms: task → norm of its accumulated gradient (loss weight and mean included).
        norm_ratio: the largest such norm over shared parameters, divided by the smallest; None
            without gradients of two tasks.
        norm_ema: task → moving average of that norm over shared parameters; of GCond with
            granularity="model".
        cosines: pair of tasks → cosine of their accumulated gradients over shared parameters; pairs
            of which one task has no gradient are left out.
        incidence: the share of those pairs whose cosine is below 0; None without a pair.
        zone: of the smallest cosine: "none", "mild", "moderate" or "critical", by the thresholds of
            the method (of others than GCond, its defaults); "none" too without a pair.
        conflicts: the conflicts that GCond resolved, in order; empty with other methods.
        weights: task → its weight in the resolved gradient Σ_k weight_k · ĝ_k of shared parameters;
            1 is unchanged. With granularity="tensor" the mean over those parameters. NaN with
            GradDrop, which has none.
        tensor_weights: with granularity="tensor": parameter → task → weight, of shared parameters.
        descent: task → cosine of the resolved gradient, before momentum and clipping, with the
            task's own, over all parameters: a small step along it lowers the task's loss where it
            is positive. None where the task has no gradient, where the result is zero or the step
            is skipped, and with GradDrop.
        rising: the tasks whose loss rises to first order: the resolved gradient's product with
            their own is below 0 by more than rounding, 1e-6 of ‖ĝ_k‖ Σ_j |weight_j| ‖ĝ_j‖ (with
            granularity="tensor" summed over the tensors). Their cosines are all below 0; one that
            is may be rounding alone where gradients cancel out.
        gradient_norm: norm of the resolved gradient, before momentum and clipping; NaN with
            GradDrop, which does not compute it.
        winners: the last winners of conflicts, oldest first; of GCond with granularity="model".
        tensor_cosines: parameter → smallest cosine of any pair of tasks within that parameter;
            only parameters that more than one task has a gradient for.
    """

    step: int
    skipped: bool
    skipped_steps: int
    nonfinite_tasks: list[str]
    nonfinite_steps: dict[str, int]
    micro_batches: dict[str, int]
    losses: dict[str, float | None]
    norms: dict[str, float]
    norm_ratio: float | None
    norm_ema: dict[str, float]
    cosines: dict[tuple[str, str], float]
    incidence: float | None
    zone: str
    conflicts: list[Conflict]
    weights: dict[str, float]
    tensor_weights: dict[str, dict[str, float]]
    descent: dict[str, float | None]
    rising: list[str]
    gradient_norm: float
    winners: list[str]
    tensor_cosines: dict[str, float]

    @property
    def min_cosine(self) -> float | None:
        """The smallest cosine of any pair before anything was resolved; None without a pair."""
        return min(self.cosines.values(), default=None)


class Resolution(NamedTuple):
    """What a report and a record are made from; its tensors stay on the device until then.

    A step keeps what its operations returned, and what follows from that is computed when it is
    read. Of several steps, stacked, every tensor has a leading dimension more.
    """

    counters: Tensor  # [2 + K] int64: resolutions, skipped ones, those with each task not finite
    nonfinite: Tensor  # [K] bool
    counts: Sequence[int]  # K numbers of micro-batches
    names: Sequence[str]  # T
    products: ops.Gramians
    decision: ops.Arbitration
    shared: SharedParameters
    losses: Tensor  # [K] float64, NaN of a task without a micro-batch
    norm_ema: Tensor | None  # [K], or [T, K] with a state of each tensor
    winners: Tensor | None  # [W], or [T, W]
    thresholds: tuple[float, float, float]

    @property
    def per_tensor(self) -> Tensor:
        """Inner products in each parameter, [T, K, K] float64."""
        K = self.products.total.shape[-1]
        return self.products.per_tensor[..., :K, :K]

    @property
    def squares(self) -> Tensor:
        """Squared norms over all parameters, [K] float64."""
        return self.products.total.diagonal(dim1=-2, dim2=-1)

    @property
    def gramian(self) -> Tensor:
        """Inner products over shared parameters, [K, K] float64."""
        return self.shared.shared_gramian(self.products, self.products.total.shape[-1])

    @property
    def weights(self) -> Tensor:
        """Weights of shared parameters, [K]; the mean over them where each has its own."""
        return self.shared.mean_weights(self.decision, self.squares)

    @property
    def result_products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Products of the resolved gradient d with each task's, their terms [K], and with itself.

        In each tensor t d is Σ_k w_tk ĝ_tk: ĝ_k · d = Σ_t (S_t w_t)_k, and ‖d‖² = Σ_t w_tᵀ S_t w_t.
        The terms of ĝ_k · d are Σ_t ‖ĝ_tk‖ Σ_j |w_tj| ‖ĝ_tj‖, of which its rounding is a part.
        """
        w, shared = self.decision.weights, self.shared
        if shared.by_tensor:
            w = torch.where(shared.flags[..., None], w, 1.0)
            products, terms = _products(self.per_tensor, w)
            return products.sum(-2), terms.sum(-2), (products * w).sum((-2, -1))
        products, terms = _products(self.gramian, w)
        square = (products * w).sum(-1)
        if shared.all_shared:
            return products, terms, square
        own = summed(self.per_tensor, ~shared.flags).sum(-1)  # written as they are
        return products + own, terms + own, square + own.sum(-1)

    @property
    def descent_and_rising(self) -> tuple[Tensor, Tensor]:
        """Cosines of the resolved gradient with each task's, and whether the task's loss rises.

        Both [K]; NaN where unknown. A loss rises to first order where it is 1, else it is 0.
        """
        products, terms, square = self.result_products
        cosines = products / (self.squares.sqrt() * square.clamp(min=0.0).sqrt()[..., None])
        cosines = torch.where(self.decision.finite[..., None], cosines, math.nan).clamp(-1.0, 1.0)
        rising = (products < -ROUNDING * terms).to(cosines)
        return cosines, torch.where(cosines.isfinite(), rising, math.nan)

    @property
    def nbytes(self) -> int:
        """The memory of what the operations returned."""
        return sum(tensor.nbytes for tensor in (self.products.per_tensor, *self.decision))

    def is_like(self, other: Resolution) -> bool:
        """Return whether the two can be stacked: they are alike but for their values."""
        return self._form() == other._form()

    def _form(self) -> tuple[object, ...]:
        decision, shared = self.decision, self.shared
        shapes = [tensor.shape for tensor in (*decision, self.products.per_tensor)]
        return *shapes, shared.by_tensor, shared.all_shared

    def report(self, tasks: Sequence[str]) -> Report:
        """Return the report. On a GPU this synchronizes with the device."""
        gramian = self.gramian.cpu()
        cosines, (descent, rising) = pair_cosines(gramian), map(known, self.descent_and_rising)
        skipped = not bool(self.decision.finite)
        step, skipped_steps, *nonfinite_steps = self.counters.tolist()

        def per_task(values: Sequence[Any]) -> dict[str, Any]:
            return dict(zip(tasks, values, strict=True))

        def of_model(state: Tensor | None) -> list[Any]:
            return [] if state is None or self.shared.by_tensor else state.tolist()

        averages = of_model(self.norm_ema)
        per_tensor = map(pair_cosines, self.per_tensor.cpu())
        tensor_cosines = zip(self.names, per_tensor, strict=True)
        return Report(
            step=step,
            skipped=skipped,
            skipped_steps=skipped_steps,
            nonfinite_tasks=[*compress(tasks, self.nonfinite.tolist())],
            nonfinite_steps=per_task(nonfinite_steps),
            micro_batches=per_task(self.counts),
            losses=per_task(known(self.losses)),
            norms=per_task(self.squares.sqrt().tolist()),
            norm_ratio=ratio_of(norms_of(gramian)),
            norm_ema=per_task(averages) if averages else {},
            cosines={(tasks[i], tasks[j]): cosine for (i, j), cosine in cosines.items()},
            incidence=incidence_of(cosines.values()),
            zone=zone_of(min(cosines.values(), default=1.0), self.thresholds),
            conflicts=self._conflicts(tasks),
            weights=per_task(self.weights.tolist()),
            tensor_weights={
                name: per_task(weights) for name, weights in self._of_shared(self.decision.weights)
            },
            descent=per_task(descent),
            rising=[*compress(tasks, rising)],
            gradient_norm=math.nan if skipped else self._gradient_norm(),
            winners=[tasks[index] for index in of_model(self.winners) if index >= 0],
            tensor_cosines={name: min(pairs.values()) for name, pairs in tensor_cosines if pairs},
        )

    def _of_shared(self, values: Tensor) -> list[tuple[str, Any]]:
        """Return shared parameters' names and values [T, ...]; none where they have none each."""
        if not self.shared.by_tensor:
            return []
        each = zip(self.names, values.tolist(), strict=True)
        return [*compress(each, self.shared.flags.tolist())]

    def _conflicts(self, tasks: Sequence[str]) -> list[Conflict]:
        events = self.decision.events
        each: Sequence[tuple[str | None, Any]] = [(None, events.tolist())]
        if events.dim() > 2:
            each = self._of_shared(events)
        return [
            Conflict(
                (tasks[int(i)], tasks[int(j)]),
                cosine,
                ZONES[int(zone)],
                tasks[int(winner)] if winner >= 0 else None,
                parameter,
            )
            for parameter, of_parameter in each
            for i, j, cosine, winner, zone in of_parameter
            if not math.isnan(i)  # after the last conflict
        ]

    def _gradient_norm(self) -> float:
        return float(self.result_products[2].clamp(min=0.0).sqrt())


def _products(gramians: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of Σ_k w_k ĝ_k with each gradient, [..., K], and the sizes of terms."""
    norms = gramians.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    products = torch.einsum("...ij,...j->...i", gramians, weights)
    return products, norms * (weights.abs() * norms).sum(-1, keepdim=True)


def stacked(resolutions: Sequence[Resolution]) -> Resolution:
    """Return resolutions that are alike as one, each tensor with a leading dimension for them."""

    def stack(tensors: Iterable[Tensor]) -> Tensor:
        first, *others = tensors
        return torch.stack([first, *others]) if others else first[None]

    products = [r.products for r in resolutions]
    flags = stack(r.shared.flags for r in resolutions)
    return resolutions[-1]._replace(
        counters=stack(r.counters for r in resolutions),
        nonfinite=stack(r.nonfinite for r in resolutions),
        products=ops.Gramians(
            stack(p.total for p in products), None, stack(p.per_tensor for p in products), None
        ),
        decision=ops.Arbitration(*map(stack, zip(*[r.decision for r in resolutions], strict=True))),
        shared=resolutions[-1].shared._replace(flags=flags, factors=None),
        losses=stack(r.losses for r in resolutions),
    )
