"""The graphs of the losses, which are let go of as soon as they were passed back through."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


class PassedBack(torch.autograd.Function):
    """Stands in for the graph of a loss that was freed, and says so where it is used again."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor) -> Tensor:
        """Return the loss itself, with this as its graph."""
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raise the error."""
        raise RuntimeError(
            "this loss was given to GCondFused.backward, which has freed its graph: back-propagate "
            "what else is made of it before, or compute it anew"
        )


def free(losses: Iterable[Tensor]) -> None:
    """Let go of the graphs of losses that were passed back through.

    A graph that several losses share is kept by autograd until the last of them was passed back
    through, which frees what it reaches. What the others have for themselves, a head or a forward
    pass, is freed when nothing refers to it any more: so each loss is detached, in place. Used
    again it raises, as any loss does that was passed back through.
    """
    detached = [loss for loss in losses if detach(loss)]
    if not detached:
        return
    # Its value is as it was: who has saved it, detached, may still pass back through what he made.
    kept = _unsafe_preserve_version_counter(tuple(detached))
    with torch.inference_mode(False), torch.enable_grad(), kept:
        for loss in detached:
            PassedBack.apply(loss, loss.new_zeros((), requires_grad=True))  # type: ignore[no-untyped-call]


def detach(loss: Tensor) -> bool:
    """Detach a loss from its graph, in place; return whether that was possible.

    A parameter has no graph, a view cannot be detached, and subclasses have ways of their own.
    """
    if type(loss) is not Tensor or loss.grad_fn is None or loss._is_view():
        return False
    loss.detach_()
    return True


# So often a function is looked at before it is trusted, and so far from the losses: a fused loss is
# near them, and every micro-batch pays for the way.
ENOUGH_LOOKS = 16
NEAR = 32


class SharedFunctions:
    """What the custom autograd functions have saved that several losses share.

    The backward pass of some overwrites it: a fused cross entropy multiplies a saved gradient in
    place. The second loss would find what the first has left, and autograd has no way to tell.

    Args:
        losses: with graphs that may share a part.
        looks: by the name of a function, how often it was found to overwrite nothing.
        everywhere: whether to look at whole graphs, and not near the losses alone.
    """

    def __init__(self, losses: Sequence[Tensor], looks: dict[str, int], everywhere: bool) -> None:
        seen: dict[Any, int] = {}
        for loss in losses:
            for node in nodes_of(loss, None if everywhere else NEAR):
                seen[node] = seen.get(node, 0) + 1
        custom = torch.autograd.function.BackwardCFunction
        shared = [n for n, count in seen.items() if count > 1 and isinstance(n, custom)]
        self._nodes = [n for n in shared if looks.get(type(n).__name__, 0) < ENOUGH_LOOKS]
        self._looks = looks
        self._sums = self._read()

    def _read(self) -> Tensor:
        """A sum of each tensor that is saved, all of them in one tensor."""
        tensors = [t for node in self._nodes for t in node.saved_tensors if t is not None]
        sums = [t.detach().abs().sum(dtype=torch.float64) for t in tensors if t.is_floating_point()]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device="cpu")

    def check(self) -> None:
        """Raise a RuntimeError if a backward pass has overwritten what was saved."""
        names = sorted({type(node).__name__ for node in self._nodes})
        if self._nodes and not torch.equal(self._read(), self._sums):
            functions = " or ".join(name.removesuffix("Backward") for name in names)
            raise RuntimeError(
                f"a backward pass of {functions} overwrites what its forward pass has saved, so it "
                "can be passed back through once, and losses share it: give the losses as "
                "functions, each with a forward pass of its own"
            )
        self._looks.update({name: self._looks.get(name, 0) + 1 for name in names})


def nodes_of(loss: Tensor, most: int | None) -> set[Any]:
    """Return the nodes of a loss's graph, the nearest first, so many at most; None is all."""
    found: set[Any] = set()
    left = deque([loss.grad_fn])
    while left and (most is None or len(found) < most):
        node = left.popleft()
        if node is not None and node not in found:
            found.add(node)
            left.extend(following for following, _ in node.next_functions)
    return found
