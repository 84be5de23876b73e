"""The operations by others: plain torch, and TorchJD's aggregation."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.clock import Run
from bench.inputs import BETA, Gradients, Storage, segments_of
from gcond_kernels import methods, ops

FOREACH, LOOP = "torch foreach", "torch loop"
PUBLISHED = "published code"
# Methods that TorchJD has too.
METHODS = ("PCGrad", "UPGrad", "CAGrad")
# What the paper of CAGrad takes for most of its experiments.
CAGRAD_C = 0.4
# Of plain torch, which sums in float32 alone.
TOLERANCE = 1e-3
# TorchJD sums in float32 alone too, and its solvers stop early: 0.01 is seen of UPGrad.
TORCHJD_TOLERANCE = 0.1
UPGRAD_REGULARISATION = 1e-4
# Of what is kept in bfloat16, through several projections: 0.02 is seen.
BFLOAT16_TOLERANCE = 0.05
# Parameters times the square of the tasks: of more the pairs, one by one, take too long.
MOST_OF_PAIRS = 500_000_000


def accumulations(gradients: Gradients, overwrite: bool) -> dict[str, Run]:
    segments, given = gradients.segments(), gradients.gradients

    def foreach() -> None:
        if overwrite:
            torch._foreach_copy_(segments, given)
        else:
            torch._foreach_add_(segments, given)

    def loop() -> None:
        for segment, gradient in zip(segments, given, strict=True):
            segment.copy_(gradient) if overwrite else segment.add_(gradient)

    return {FOREACH: foreach, LOOP: loop}


class Plain:
    """A resolution in plain torch, of a list of gradients per task, which are views."""

    def __init__(self, storage: Storage) -> None:
        layout, self.storage = storage.layout, storage
        self.gradients = [segments_of(flat, layout) for flat in storage.accumulators]
        self.history = [segments_of(flat, layout) for flat in storage.history]
        self.momentum = segments_of(storage.momentum.buffer, layout)
        self.step = 0

    def products(self, pair: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Tensor:
        """Return S and X [2, K, K] from inner products of pairs of gradients."""
        tasks = range(len(self.gradients))
        own = [
            [pair(self.gradients[i], self.gradients[j]) if i <= j else None for j in tasks]
            for i in tasks
        ]
        S = [[own[min(i, j)][max(i, j)] for j in tasks] for i in tasks]
        X = [[pair(self.gradients[i], self.history[j]) for j in tasks] for i in tasks]
        return torch.stack([torch.stack([torch.stack(row) for row in M]) for M in (S, X)])

    def combine_foreach(self, weights: Sequence[float]) -> None:
        """Write the weighted sum with momentum, and the new history, by torch's lists."""
        torch._foreach_mul_(self.momentum, BETA)
        for gradients, weight in zip(self.gradients, weights, strict=True):
            torch._foreach_add_(self.momentum, gradients, alpha=(1 - BETA) * weight)
        self.step += 1
        torch._foreach_copy_(self.storage.outputs, self.momentum)
        torch._foreach_div_(self.storage.outputs, 1 - BETA**self.step)
        for old, gradients in zip(self.history, self.gradients, strict=True):
            torch._foreach_copy_(old, gradients)

    def combine_loop(self, weights: Sequence[float]) -> None:
        """Write the same, tensor by tensor."""
        self.step += 1
        correction = 1 - BETA**self.step
        for place, momentum in enumerate(self.momentum):
            momentum.mul_(BETA)
            for gradients, weight in zip(self.gradients, weights, strict=True):
                momentum.add_(gradients[place], alpha=(1 - BETA) * weight)
            torch.div(momentum, correction, out=self.storage.outputs[place])
            for old, gradients in zip(self.history, self.gradients, strict=True):
                old[place].copy_(gradients[place])

    def resolve(self, pair: Callable[..., Tensor], combine: Callable[..., None]) -> None:
        """Compute all inner products, decide, and write; the host reads the weights."""
        S, X = self.products(pair).double()
        storage = self.storage
        decision = ops.arbitrate(
            S, X, storage.scale, state=storage.state, settings=storage.method, backend="python"
        )
        combine(decision.weights.tolist())


def products(storage: Storage) -> dict[str, Run]:
    """Return all inner products by both."""
    plain = Plain(storage)
    return {
        FOREACH: partial(plain.products, dot_foreach),
        LOOP: partial(plain.products, dot_loop),
    }


def takes_long(storage: Storage) -> bool:
    """Return whether all pairs of gradients, one by one, take too long to be measured."""
    return storage.layout.parameters * len(storage.accumulators) ** 2 > MOST_OF_PAIRS


def combinations(storage: Storage, weights: Sequence[float]) -> dict[str, Run]:
    """Return the write by both, from a first step on."""
    return {
        FOREACH: partial(Plain(storage).combine_foreach, weights),
        LOOP: partial(Plain(storage).combine_loop, weights),
    }


def resolutions(storage: Storage) -> dict[str, Run]:
    """Return a full resolution by both, from a first step on."""
    foreach, loop = Plain(storage), Plain(storage)
    return {
        FOREACH: partial(foreach.resolve, dot_foreach, foreach.combine_foreach),
        LOOP: partial(loop.resolve, dot_loop, loop.combine_loop),
    }


def dot_foreach(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors, by torch's lists as far as they go."""
    if a[0].dtype != b[0].dtype:
        b = [tensor.to(a[0].dtype) for tensor in b]
    products = torch._foreach_mul(tuple(a), tuple(b))
    return torch.stack([product.sum() for product in products]).sum()


def dot_loop(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors, one tensor after the other."""
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.dot(x, y.to(x.dtype)) for x, y in pairs]).sum()


def torchjd_missing() -> str | None:
    """Return why TorchJD takes no part; None where it does."""
    here = importlib.util.find_spec("torchjd") is not None
    return None if here else 'not installed: pip install "torchjd[cagrad,quadprog-projector]"'


def aggregations(
    gradients: Tensor, names: Sequence[str] = METHODS
) -> dict[str, Callable[[], Tensor]]:
    """Return those of TorchJD's aggregations of the gradients [K, N] into one [N], by name."""
    theirs: Any = importlib.import_module("torchjd.aggregation")
    options = {"CAGrad": {"c": CAGRAD_C}}
    return {
        f"TorchJD {name}": partial(getattr(theirs, name)(**options.get(name, {})), gradients)
        for name in names
        if hasattr(theirs, name)  # CAGrad needs a solver of its own
    }


def our_methods() -> dict[str, methods.Method]:
    """Return our methods of the same names and settings."""
    return {
        "PCGrad": methods.PCGrad(),
        "UPGrad": methods.UPGrad(),
        "CAGrad": methods.CAGrad(c=CAGRAD_C),
    }


def upgrad_weighting() -> Callable[[Tensor], Tensor]:
    """Return TorchJD's UPGrad from a Gramian to weights."""
    theirs: Any = importlib.import_module("torchjd.aggregation")
    weighting: Callable[[Tensor], Tensor] = theirs.UPGradWeighting()
    return weighting


def check_aggregation(by: str, run: Callable[[], Tensor], storage: Storage) -> None:
    """Compare a result of TorchJD's with that of our method of the same name."""
    name, result = by.removeprefix("TorchJD "), run()
    S = storage.products_in_float64().total
    if name == "PCGrad" and len(S) > 2:  # it depends on the order of the tasks, which is random
        packed = torch.cat([result[chunk] for _, chunk in storage.chunks()])
        check_combination([packed], storage, by)
        return
    if name == "UPGrad":
        S = S + UPGRAD_REGULARISATION * S.trace() * torch.eye(len(S), device=S.device)
    expected = our_methods()[name](S).to(result) @ storage.accumulators
    # Where gradients cancel out the result is short: what counts is their norm.
    longest = S.diagonal().max().sqrt()
    if not bool((result - expected).norm() <= TORCHJD_TOLERANCE * longest):
        raise AssertionError(f"{by}: the result is another than that of our {name}")


def check_combination(outputs: Sequence[Tensor], storage: Storage, who: str) -> None:
    """Check that a result is a combination of the gradients, up to the rounding of bfloat16."""
    gradients = storage.packed()
    result = torch.cat([output.view(-1) for output in outputs])
    S = storage.products_in_float64().total
    found = torch.linalg.lstsq(S, (gradients @ result).double()[:, None]).solution[:, 0]
    residual = (result - found.to(result) @ gradients).norm()
    if not bool(residual <= BFLOAT16_TOLERANCE * S.diagonal().max().sqrt()):
        raise AssertionError(f"{who}: the result is no combination of the gradients")
