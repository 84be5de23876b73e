"""The graphs of the losses, which are let go of as soon as they were passed back through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


class PassedBack(torch.autograd.Function):
    """Stands in for the graph of a loss that was freed, and says so where it is used again."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
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
