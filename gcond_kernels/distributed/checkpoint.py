"""A model and its optimizer as torch.distributed.checkpoint saves and loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from gcond_kernels.storage.names import labels_of
from gcond_kernels.storage.state_format import is_plain

if TYPE_CHECKING:
    from gcond_kernels.optimizer import GCondFused


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
        TypeError: the optimizer is no GCondFused.
        ValueError: the optimizer has parameters that are not in the model, or its base a state dict
            of a form of its own.
    """

    def __init__(self, model: nn.Module, optimizer: GCondFused) -> None:
        if not hasattr(optimizer, "_rank_strategy"):
            raise TypeError(f"optimizer must be a GCondFused, not {optimizer!r}")
        if not is_plain(optimizer.base.state_dict()):
            raise ValueError(
                f"the state dict of {type(optimizer.base).__name__} has a form of its own, which "
                "torch.distributed.checkpoint leaves out: save optimizer.state_dict() with "
                "torch.save"
            )
        of_model = set(model.parameters())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p, name in zip(parameters, labels_of(optimizer.param_groups), strict=True):
            if p not in of_model:
                raise ValueError(f"{name} of the optimizer is no parameter of the model")
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as tensors and DTensors; all ranks call it.

        Raises:
            RuntimeError: in the middle of a window, whose sums belong to their ranks.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        self.optimizer._prepare_saving()
        model_state, state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; all ranks call it.

        Raises:
            ValueError: it is of other tasks, parameters or another method, or has history, momentum
                or masks where this optimizer has none. What fits was read into place by then, so
                that the model is not to be used; nor after an error of torch.distributed.checkpoint
                where sizes differ, or something that is kept here is missing.
        """
        from torch.distributed.checkpoint import state_dict as torchs

        torchs.set_model_state_dict(self.model, state_dict["model"])
        options = torchs.StateDictOptions(strict=False)
        torchs.set_optimizer_state_dict(
            self.model, self.optimizer, state_dict["optimizer"], options=options
        )
