"""Checkpoints that any number of ranks can load, by torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gcond_kernels.accumulator import ALIGNMENT, Accumulator, Segment, aligned, rows_of
from gcond_kernels.distributed import Local, Sharded
from gcond_kernels.dtensor import local_part, placed_like
from gcond_kernels.optimizer import STATE_VERSION, GCondFused
from gcond_kernels.saving import without_wrappers


class TrainingState:
    """A model and its GCondFused as `torch.distributed.checkpoint` saves and loads them.

    ::

        import torch.distributed.checkpoint as dcp

        state = {"training": TrainingState(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)  # all ranks, between two windows
        dcp.load(state, checkpoint_id=folder)  # in as many ranks as there are now

    Every rank writes what it holds. What was saved from FSDP2 or tensor parallelism is loaded into
    any mesh; what was saved with `sync="shard"` or "replicate", or by one process, into any of
    these three. Parameters are matched by their names in the model.

    Args:
        model: as it is trained, wrapped or not.
        optimizer: of its parameters.

    Raises:
        ValueError: sync="local", where every rank has a state of its own; or the optimizer has
            parameters that are not in the model.
    """

    def __init__(self, model: nn.Module, optimizer: GCondFused) -> None:
        if not isinstance(optimizer, GCondFused):
            raise TypeError(f"optimizer must be a GCondFused, not {optimizer!r}")
        if isinstance(optimizer._sync, Local):
            raise ValueError(
                "with sync='local' every rank has a state of its own: save each rank's "
                "model.state_dict() and optimizer.state_dict()"
            )
        names, parameters = zip(*model.named_parameters(), strict=True)
        self._names = dict(zip(parameters, without_wrappers(names), strict=True))
        for parameter, name in optimizer._parameters():
            if parameter not in self._names:
                raise ValueError(f"{name} of the optimizer is no parameter of the model")
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and DTensors that share memory with the optimizer's.

        All ranks call it. What has no memory yet gets some, so that there is a place to load into.

        Raises:
            RuntimeError: in the middle of a window, whose accumulators belong to their ranks.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        optimizer = self.optimizer
        if optimizer._now.resolved or any(optimizer._accumulator.counts):
            raise RuntimeError("a TrainingState is saved and loaded between windows: call step()")
        optimizer._include_new_parameters()
        if isinstance(optimizer._sync, Sharded):
            optimizer._sync.fit_kept()
        with state_for_all(optimizer.base) as without:
            model_state, base_state = get_state_dict(self.model, optimizer.base)
        return {
            "model": model_state,
            "base": base_state,
            "gcond": {**self._own_state(), "without_state": [self._names[p] for p in without]},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state; all ranks call it.

        Raises:
            ValueError: it is of other tasks, parameters or settings; nothing has changed then,
                but for what torch.distributed.checkpoint has read into place already.
        """
        from torch.distributed.checkpoint.state_dict import set_state_dict

        own = state_dict["gcond"]
        listed = self._check(own)
        set_state_dict(
            self.model,
            self.optimizer.base,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["base"],
        )
        by_name = {name: parameter for parameter, name in self._names.items()}
        for name in own["without_state"]:
            self.optimizer.base.state.pop(by_name[name], None)
        self.optimizer._load_own(self._as_accumulated(own, listed), own)

    @property
    def _segment_names(self) -> list[str]:
        return [self._names[s.parameter] for s in self.optimizer._accumulator.segments]

    def _own_state(self) -> dict[str, Any]:
        """What GCondFused adds, in a form that does not depend on the number of ranks."""
        optimizer, acc = self.optimizer, self.optimizer._accumulator
        return {
            "version": STATE_VERSION,
            "tasks": list(optimizer._names),
            "method": dict(optimizer._now.method_state),
            "counters": optimizer._now.counters,
            "names": self._segment_names,
            "strides": None if acc.spread else [list(s.stride) for s in acc.segments],
            "history": self._kept(acc.history),
            "momentum": self._kept(acc.momentum),
            "momentum_steps": acc.momentum_steps,
        }

    def _kept(self, kept: Tensor | None) -> Any:
        """History or momentum, [..., n]: by parameter where these are spread, else as blocks."""
        acc = self.optimizer._accumulator
        if kept is None:
            return None
        if acc.spread:
            named = list(zip(self._segment_names, acc.segments, strict=True))
            return [
                {name: placed_like(s.parameter, s.view(row)) for name, s in named}
                for row in rows_of(kept)
            ]
        if not isinstance(self.optimizer._sync, Sharded):
            return blocks_of(kept[..., : acc.end])
        return sharded_blocks(kept, acc, self.optimizer._sync)

    def _check(self, own: dict[str, Any]) -> list[Segment]:
        """The segments that are here, in the order of the state."""
        self.optimizer._check_own(own)
        here = dict(zip(self._segment_names, self.optimizer._accumulator.segments, strict=True))
        if missing := sorted(set(own["names"]) ^ set(here)):
            where = "in the state" if missing[0] not in here else "here"
            raise ValueError(f"{missing[0]} is trained only {where}")
        return [here[name] for name in own["names"]]

    def _as_accumulated(self, own: dict[str, Any], listed: list[Segment]) -> dict[str, Any]:
        """The state of `Accumulator` that a state is."""
        acc = self.optimizer._accumulator
        index = {p: i for i, (p, _) in enumerate(self.optimizer._parameters())}
        strides = [list(s.stride) for s in listed] if own["strides"] is None else own["strides"]
        offsets, end = [], 0
        for segment in listed:
            offsets.append(end)
            end += aligned(segment.shape.numel())
        state = {
            "parameters": [index[segment.parameter] for segment in listed],
            "shapes": [list(segment.shape) for segment in listed],
            "strides": strides,
            "offsets": offsets,
            "counts": [0] * len(acc.counts),
            "touched": [0] * len(listed),
            "rows": None,
            "momentum_steps": own["momentum_steps"],
        }
        moved = listed != acc.segments or strides != [list(s.stride) for s in acc.segments]
        cut = isinstance(self.optimizer._sync, Sharded) and not moved
        state["cuts"] = acc.cuts if cut else 1
        for key, kept in (("history", acc.history), ("momentum", acc.momentum)):
            state[key] = None if kept is None else self._flat(own[key], kept, listed, end, cut)
        return state

    def _flat(self, saved: Any, kept: Tensor, listed: list[Segment], end: int, cut: bool) -> Tensor:
        """History or momentum of a state, as flat rows: this rank's part of them, or all."""
        acc = self.optimizer._accumulator
        if acc.spread:
            flat = torch.zeros_like(kept)
            for row, by_name in zip(rows_of(flat), saved, strict=True):
                for segment, name in zip(acc.segments, self._segment_names, strict=True):
                    segment.view(row).copy_(local_part(by_name[name]))
            return flat
        local = local_part(saved).flatten(-2)  # [..., what this rank has of it]
        if not isinstance(self.optimizer._sync, Sharded):
            return local
        part = torch.zeros_like(kept)
        part[..., : local.shape[-1]] = local
        return part if cut else self.optimizer._sync.whole(part)[..., :end]


def blocks_of(rows: Tensor) -> Tensor:
    """Rows [..., n] as blocks [..., n / ALIGNMENT, ALIGNMENT], which say nothing of ranks."""
    return rows.view(*rows.shape[:-1], rows.shape[-1] // ALIGNMENT, ALIGNMENT)


def sharded_blocks(kept: Tensor, accumulator: Accumulator, sync: Sharded) -> Tensor:
    """This rank's part [..., n] of rows as the part of a DTensor of blocks that is cut as it is.

    A part is as many blocks as torch gives a rank, ⌈blocks / ranks⌉, and at the end fewer or none.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    blocks, each = accumulator.end // ALIGNMENT, kept.shape[-1] // ALIGNMENT
    own = max(0, min(blocks - sync.peers.rank * each, each))
    shape = torch.Size((*kept.shape[:-1], blocks, ALIGNMENT))
    return DTensor.from_local(
        blocks_of(kept)[..., :own, :],
        DeviceMesh.from_group(sync.peers.group, kept.device.type),
        [Shard(len(shape) - 2)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


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
    options = [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups]
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
            group.update(values)
        for p, gradient in of_others:
            p.grad = gradient
