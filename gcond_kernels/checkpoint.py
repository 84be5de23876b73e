"""A model and its optimizer as torch.distributed.checkpoint saves and loads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gcond_kernels.names import without_wrappers
from gcond_kernels.optimizer import GCondFused
from gcond_kernels.saving import is_plain


class TrainingState:
    """A model and its GCondFused, together, for `torch.distributed.checkpoint`.

    ::

        import torch.distributed.checkpoint as dcp

        state = {"training": TrainingState(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)  # all ranks, between two windows
        dcp.load(state, checkpoint_id=folder)  # in as many ranks as there are now

    It is `get_state_dict` and `set_state_dict` of torch, which do as well by themselves, and serves
    parameters that have had no gradient yet, for which those find no place in the checkpoint.

    Args:
        model: as it is trained, wrapped or not.
        optimizer: of its parameters.

    Raises:
        ValueError: the optimizer has parameters that are not in the model, or its base a state dict
            of a form of its own.
    """

    def __init__(self, model: nn.Module, optimizer: GCondFused) -> None:
        if not isinstance(optimizer, GCondFused):
            raise TypeError(f"optimizer must be a GCondFused, not {optimizer!r}")
        if not is_plain(optimizer.base.state_dict()):
            raise ValueError(
                f"the state dict of {type(optimizer.base).__name__} has a form of its own, which "
                "torch.distributed.checkpoint leaves out: save optimizer.state_dict() with "
                "torch.save"
            )
        named = dict(model.named_parameters())
        self._names = dict(zip(named.values(), without_wrappers(list(named)), strict=True))
        for parameter, name in optimizer._parameters():
            if parameter not in self._names:
                raise ValueError(f"{name} of the optimizer is no parameter of the model")
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as tensors and DTensors; all ranks call it.

        Raises:
            RuntimeError: in the middle of a window, whose sums belong to their ranks.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        optimizer = self.optimizer
        in_window = optimizer._now.resolved or any(optimizer._accumulator.counts)
        if optimizer._sync.any_rank(in_window):
            raise RuntimeError("a TrainingState is saved and loaded between windows: call step()")
        with state_for_all(optimizer.base) as without:
            model_state, state = get_state_dict(self.model, optimizer)
        names = [self._names[p] for p in without]
        return {"model": model_state, "optimizer": state, "without_state": names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; all ranks call it.

        Raises:
            ValueError: it is of other tasks, parameters or another method, or has history, momentum
                or masks where this optimizer has none. torch.distributed.checkpoint has read into
                place by then what fits, and raises itself where sizes do not, or where it lacks
                what is kept here: the model is not to be used after either.
        """
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        base = self.optimizer.base
        names = [group.get("param_names") for group in base.param_groups]
        set_model_state_dict(self.model, state_dict["model"])
        set_optimizer_state_dict(
            self.model,
            self.optimizer,
            state_dict["optimizer"],
            options=StateDictOptions(strict=False),
        )
        for group, own_names in zip(base.param_groups, names, strict=True):
            if own_names is not None:  # the state has them in the order in which it was saved
                group["param_names"] = own_names
        by_name = {name: parameter for parameter, name in self._names.items()}
        for name in state_dict["without_state"]:
            base.state.pop(by_name[name], None)


@contextmanager
def state_for_all(base: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Gives every parameter that has no state in the optimizer one, for as long as this is open.

    A parameter without a gradient so far has none, and torch.distributed.checkpoint loads only what
    has a place: it is made by a step of gradients of zero at a learning rate of zero.

    Yields:
        The parameters that have none.
    """
    parameters = [p for group in base.param_groups for p in group["params"]]
    without = [p for p in parameters if p.requires_grad and not base.state.get(p)]
    try:
        if without:
            step_of_zeros(base, without)
        yield without
    finally:
        for p in without:
            base.state.pop(p, None)


def step_of_zeros(base: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Steps these parameters alone, by nothing; gradients and options are then as before."""
    of_others = [(p, p.grad) for group in base.param_groups for p in group["params"]]
    options = [
        {k: (v, copy.deepcopy(v)) for k, v in group.items() if k != "params"}
        for group in base.param_groups
    ]
    try:
        for p, _ in of_others:
            p.grad = None
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for group in base.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * 0.0
        base.step()
    finally:
        for group, values in zip(base.param_groups, options, strict=True):
            for added in group.keys() - values.keys() - {"params"}:
                del group[added]
            for key, (own, value) in values.items():
                # The tensor itself: a CUDA graph may read it.
                group[key] = own.copy_(value) if isinstance(own, Tensor) else value
        for p, gradient in of_others:
            p.grad = gradient
