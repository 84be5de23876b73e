"""Recorders with steps of known gradients."""

import math

import torch

from gcond_kernels import GCond
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.report import Resolution
from gcond_kernels.methods.method import Comparison
from gcond_kernels.ops import Gramians
from gcond_kernels.storage.shared_parameters import SharedParameters

THRESHOLDS = (-0.8, -0.5, 0.0)
NAMES = ("first.weight", "first.bias", "last.weight")


def resolution_of(number, names, gramian, per_tensor, decision, nonfinite) -> Resolution:
    """What a recorder reads of a resolution; all gradients are of shared parameters."""
    number = torch.as_tensor(number, device=gramian.device)
    zeros = torch.zeros(1 + len(nonfinite), dtype=torch.int64, device=gramian.device)
    return Resolution(
        counters=torch.cat([number.view(1), zeros]),
        nonfinite=nonfinite,
        counts=[1] * len(nonfinite),
        names=list(names),
        products=Gramians(gramian, None, per_tensor, None),
        decision=decision,
        shared=SharedParameters(
            False, per_tensor.new_ones(len(per_tensor), dtype=torch.bool), True
        ),
        losses=gramian.new_full((len(nonfinite),), math.nan),
        norm_ema=None,
        winners=None,
        thresholds=THRESHOLDS,
    )


def gradients_of(tasks: int, seed: int, tensors: int = len(NAMES)) -> list[torch.Tensor]:
    """Per tensor the gradients of all tasks: [K, 5] float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tasks, 5, generator=generator, dtype=torch.float64) for _ in range(tensors)]


def two_tasks(cosine: float) -> list[torch.Tensor]:
    """One tensor in which the gradients of two tasks have this cosine."""
    other = [cosine, math.sqrt(1.0 - cosine**2)]
    return [torch.tensor([[1.0, 0.0], other], dtype=torch.float64)]


def resolved(gradients, number=1, names=NAMES, *, dropped=(), skipped=False, **options):
    """The resolution of a step by GCond(**options).

    Args:
        gradients: per tensor [K, n].
        number: which step.
        names: of the tensors.
        dropped: indices of tasks whose gradient was not finite.
        skipped: whether those make the step a skipped one.
        **options: of GCond.
    """
    K = len(gradients[0])
    nonfinite = torch.tensor([task in dropped for task in range(K)])
    J = torch.stack(gradients).masked_fill(nonfinite[:, None], math.nan if skipped else 0.0)
    per_tensor = J @ J.mT
    gramian = per_tensor.sum(0)
    method, scale = GCond(**options), torch.ones(K, dtype=torch.float64)
    state = method.new_state(K, torch.device("cpu"))
    decision = method.decide(Comparison(gramian, gramian, scale, backend="python"), state)
    return resolution_of(number, names[: len(gradients)], gramian, per_tensor, decision, nonfinite)


def add(kept: Recorder, gradients, number=1, **options) -> None:
    """Record one step."""
    kept.record(resolved(gradients, number, thresholds=kept.thresholds, **options))


def filled(steps: int, tasks: int = 2, keep: int = 1000, **options) -> Recorder:
    """A recorder after some steps of random gradients."""
    kept = Recorder([f"task{task}" for task in range(tasks)], THRESHOLDS, keep)
    for number in range(1, steps + 1):
        add(kept, gradients_of(tasks, number), number, **options)
    return kept


def with_cosines(cosines, thresholds=THRESHOLDS) -> Recorder:
    """A recorder after a step of two tasks with each of the cosines."""
    kept = Recorder("ab", thresholds, 1000)
    for number, cosine in enumerate(cosines, start=1):
        add(kept, two_tasks(cosine), number)
    return kept


# Names of layers, their conflicts and comparisons.
LAYERS = [("head", 3, 40), ("body.2.0", 30, 40), ("", 0, 20), ("x" * 100 + "." + "y" * 100, 29, 30)]


class RecordedLayers:
    """A recorder with layers of given names, conflicts and comparisons."""

    def __init__(self, layers):
        self._layers = layers
        self.threshold = None

    def layers(self, *, threshold):
        self.threshold = threshold
        records = [
            {"layer": name, "compared": compared, "conflicts": below, "share": below / compared}
            for name, below, compared in self._layers
        ]
        return sorted(records, key=lambda record: -record["conflicts"])
