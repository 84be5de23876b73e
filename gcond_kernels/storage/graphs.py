"""The graphs of losses: freed after their backward pass, and checked where losses share them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

# A custom autograd function is checked so many times, and so many nodes from each loss: a fused
# loss is near, and the search costs time in every micro-batch.
ENOUGH_CHECKS = 16
NEAR = 32


class FreedGraph(torch.autograd.Function):
    """Takes the place of freed graphs, and raises an error where it is passed back through."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
        """Return the losses themselves, with this as their graph."""
        ctx.mark_dirty(*losses)
        return losses

    @staticmethod
    def backward(_ctx: Any, *_gradients: Any) -> Any:
        """Raise the error."""
        raise RuntimeError(
            "this loss was given to GCondFused.backward, which has freed its graph: back-propagate "
            "what else is made of it before, or compute it anew"
        )


def free(losses: Iterable[Tensor]) -> None:
    """Free the graphs of losses after their backward passes.

    The last backward pass frees what the losses share. What the others have for themselves, a head
    or a forward pass, is freed when nothing refers to it: so each loss is detached, in place.
    """
    # A parameter has no graph, a view cannot be detached, and subclasses have ways of their own.
    detached = [
        loss.detach_()
        for loss in losses
        if type(loss) is Tensor and loss.grad_fn is not None and not loss._is_view()
    ]
    if not detached:
        return
    # The value is as it was: where it was saved, detached, what was made of it stays valid.
    unchanged = _unsafe_preserve_version_counter(tuple(detached))
    with torch.inference_mode(False), torch.enable_grad(), unchanged:
        FreedGraph.apply(_anchor(), *detached)  # type: ignore[no-untyped-call]


@functools.cache
def _anchor() -> Tensor:
    """Return a tensor that requires a gradient, so that what is made of it has a graph."""
    return torch.zeros((), device="cpu", requires_grad=True)


class SharedFunctions:
    """Checks what the custom autograd functions have saved that several losses share.

    The backward pass of some overwrites it: a fused cross entropy multiplies a saved gradient in
    place. The second loss would read what the first has left, which autograd does not detect.

    `checks` counts by a function's name how often it was found to overwrite nothing; `everywhere`
    searches whole graphs, and not near the losses alone.
    """

    def __init__(self, losses: Sequence[Tensor], checks: dict[str, int], everywhere: bool) -> None:
        shared = shared_nodes(losses, None if everywhere else NEAR)
        self._nodes = [n for n in shared if checks.get(type(n).__name__, 0) < ENOUGH_CHECKS]
        self._checks = checks
        self._sums = self._read() if self._nodes else None

    def _read(self) -> Tensor:
        """Return a sum of each saved tensor, all of them in one tensor."""
        saved = chain.from_iterable([node.saved_tensors for node in self._nodes])
        tensors = [t.detach() for t in saved if t is not None and t.is_floating_point()]
        sums = [t.abs().sum(dtype=torch.float64) for t in tensors]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device="cpu")

    def check(self) -> None:
        """Raise a RuntimeError if a backward pass has overwritten what was saved."""
        if self._sums is None:
            return
        names = sorted({type(node).__name__ for node in self._nodes})
        if not torch.equal(self._read(), self._sums):
            functions = " or ".join([name.removesuffix("Backward") for name in names])
            raise RuntimeError(
                f"a backward pass of {functions} overwrites what its forward pass has saved, so it "
                "can be passed back through once, and losses share it: give the losses as "
                "functions, each with a forward pass of its own"
            )
        self._checks.update({name: self._checks.get(name, 0) + 1 for name in names})


def shared_nodes(losses: Sequence[Tensor], most: int | None) -> list[Any]:
    """Return the custom functions that losses share, among the `most` nearest nodes of each."""
    seen = Counter[Any]()
    for loss in losses[:-1]:
        seen.update(custom_nodes_of(loss, most))
    if seen:  # the last loss shares none otherwise
        seen.update(custom_nodes_of(losses[-1], most))
    return [node for node, count in seen.items() if count > 1]


def custom_nodes_of(loss: Tensor, most: int | None) -> list[Any]:
    """Return the custom functions among the `most` nearest nodes of a loss's graph; None is all."""
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    found: set[Any] = set(nodes)
    for node in nodes:  # which grows
        if most is not None and len(nodes) >= most:
            break
        for following, _ in node.next_functions:
            if following is not None and following not in found:
                found.add(following)
                nodes.append(following)
    custom = torch.autograd.function.BackwardCFunction
    return [node for node in nodes[:most] if isinstance(node, custom)]
