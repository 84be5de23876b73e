"""Checkpoints that any number of ranks can load, by torch.distributed.checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gcond_kernels.accumulator import Segment, rows_of
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

    Every rank writes its share, and any number of ranks can load it, spread in another way if need
    be: one process, DistributedDataParallel, FSDP2, tensor parallel. Parameters are matched by
    their names in the model.

    Args:
        model: as it is trained, wrapped or not.
        optimizer: of its parameters.

    Raises:
        ValueError: sync="local", where every rank has a state of its own; or the optimizer has
            parameters that are not in the model; or two parameters of the model have one name.
    """

    def __init__(self, model: nn.Module, optimizer: GCondFused) -> None:
        if not isinstance(optimizer, GCondFused):
            raise TypeError(f"optimizer must be a GCondFused, not {optimizer!r}")
        if isinstance(optimizer._sync, Local):
            raise ValueError(
                "with sync='local' every rank has a state of its own: save each rank's "
                "model.state_dict() and optimizer.state_dict()"
            )
        named = dict(model.named_parameters())
        names = without_wrappers(list(named))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"the model has more than one parameter called {twice[0]}, apart from what "
                "wrappers (torch.compile, DistributedDataParallel) put into names: rename one"
            )
        self._names: dict[Tensor, str] = dict(zip(named.values(), names, strict=True))
        for parameter, name in optimizer._parameters():
            if parameter not in self._names:
                raise ValueError(f"{name} of the optimizer is no parameter of the model")
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and DTensors.

        All ranks call it. What has no memory yet gets some, so that there is a place to load into.

        Raises:
            RuntimeError: in the middle of a window, whose accumulators belong to their ranks.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        optimizer = self.optimizer
        in_window = optimizer._now.resolved or any(optimizer._accumulator.counts)
        if optimizer._sync.any_rank(in_window):
            raise RuntimeError("a TrainingState is saved and loaded between windows: call step()")
        optimizer._include_new_parameters()
        optimizer._fit_method_state(optimizer._now.counters.device)
        if isinstance(optimizer._sync, Sharded):
            optimizer._sync.fit_kept()
        with state_for_all(optimizer.base) as without, unstepped(optimizer.base):
            model_state, base_state = get_state_dict(self.model, optimizer.base)
        return {
            "model": model_state,
            "base": base_state,
            "gcond": {**self._own_state(), "without_state": [self._names[p] for p in without]},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state; all ranks call it.

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

        own = state_dict["gcond"]
        self._check(own)
        set_model_state_dict(self.model, state_dict["model"])
        base = self.optimizer.base
        names = [group.get("param_names") for group in base.param_groups]
        # Not strict: SGD has no state of parameters whose group has no momentum.
        options = StateDictOptions(strict=False)
        with unstepped(base):
            set_optimizer_state_dict(self.model, base, state_dict["base"], options=options)
        for group, own_names in zip(base.param_groups, names, strict=True):
            if own_names is not None:  # the state has them in the order in which it was saved
                group["param_names"] = own_names
        by_name = {name: parameter for parameter, name in self._names.items()}
        for name in own["without_state"]:
            base.state.pop(by_name[name], None)
        counters = torch.tensor(own["counters"], dtype=torch.int64, device="cpu")
        self.optimizer._load_own(self._as_accumulated(own), self._method_of(own), counters)

    @property
    def _segments(self) -> list[tuple[str, Segment]]:
        """The segments, by the names of their parameters in the model."""
        return [(self._names[s.parameter], s) for s in self.optimizer._accumulator.segments]

    def _own_state(self) -> dict[str, Any]:
        """What GCondFused adds, in a form that is the same however the parameters are spread.

        torch.distributed.checkpoint loads only what it finds by the names that are here, before it
        asks whether the state fits. So what is small is in lists, of which it reads whatever there
        is, and what an optimizer does not keep has no name.
        """
        optimizer, acc = self.optimizer, self.optimizer._accumulator
        return {
            "version": STATE_VERSION,
            "tasks": list(optimizer._names),
            "method_name": type(optimizer.method).__name__,
            "granularity": optimizer.granularity,
            "method": [
                [key, list(value.shape), value.flatten().tolist()]
                for key, value in optimizer._now.method_state.items()
            ],
            "counters": optimizer._now.counters.tolist(),
            "names": [name for name, _ in self._segments],
            "owners": list(acc.owners),
            "compared": list(acc.compared),
            "kept": self._kept(),
            "masks": self._masks(),
            "history": self._by_name(acc.history),
            "momentum": self._by_name(acc.momentum),
            "momentum_steps": self._steps_by_name(),
        }

    def _kept(self) -> list[str]:
        """What there is a tensor of for every parameter."""
        acc = self.optimizer._accumulator
        kept = {"history": acc.history, "momentum": acc.momentum, "masks": acc.mask}
        return [what for what, there in kept.items() if there is not None]

    def _masks(self) -> dict[str, Tensor]:
        """Which elements of each parameter are trained; nothing without a mask."""
        masks = {}
        for name, segment in self._segments:
            bits = self.optimizer._accumulator.mask_of(segment)
            if bits is not None:
                masks[name] = placed_like(segment.parameter, bits.clone())
        return masks

    def _steps_by_name(self) -> dict[str, Tensor]:
        steps = self.optimizer._accumulator.momentum_steps
        if steps is None:
            return {}
        return {name: steps[t].clone() for t, (name, _) in enumerate(self._segments)}

    def _by_name(self, kept: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """History or momentum, of every row a tensor per parameter, in the parameter's shape."""
        sync = self.optimizer._sync
        if kept is None:
            return {}
        if not isinstance(sync, Sharded):
            # In memory of its own: what copies a state behind a training's back asks for that.
            rows = [
                {name: placed_like(s.parameter, s.view(row).clone()) for name, s in self._segments}
                for row in rows_of(kept)
            ]
        else:
            mesh, rows = sync.peers.mesh(kept.device), []
            for row in rows_of(kept):
                whole = sync.whole(row)  # one at a time
                rows.append({name: share_of(s.view(whole), mesh) for name, s in self._segments})
        return {str(k): by_name for k, by_name in enumerate(rows)}

    def _method_of(self, own: dict[str, Any]) -> dict[str, Tensor]:
        """A method's state as it is kept here: of each tensor in the order of the segments."""
        places, shared = self._places_in(own), self.optimizer.method.shared_state
        state = {}
        for key, shape, values in own["method"]:
            value = torch.tensor(values, dtype=torch.float64, device="cpu").view(shape)
            # Of another method, which is yet to be refused, it is not known which are shared.
            of_tensors = key not in shared and shape[:1] == [len(own["names"])]
            by_tensor = own["granularity"] == "tensor" and of_tensors
            state[key] = value[places] if by_tensor else value
        return state

    def _places_in(self, own: dict[str, Any]) -> list[int]:
        """Of each segment its place among the parameters of a state."""
        place = {name: t for t, name in enumerate(own["names"])}
        return [place[name] for name, _ in self._segments]

    def _check(self, own: dict[str, Any]) -> None:
        # What was frozen since then may be missing here.
        if missing := sorted({name for name, _ in self._segments} - set(own["names"])):
            raise ValueError(
                f"{missing[0]} was not trained when the state was saved: freeze it until the state "
                "is loaded"
            )
        self.optimizer._check_own({**own, "method": self._method_of(own)})
        for what in own["kept"]:
            if what not in self._kept():
                raise ValueError(f"the state has {what}, this optimizer has no {what}")

    def _as_accumulated(self, own: dict[str, Any]) -> dict[str, Any]:
        """The state of `Accumulator` that a state is."""
        acc, places = self.optimizer._accumulator, self._places_in(own)
        parameters = [parameter for parameter, _ in self.optimizer._parameters()]
        state = acc.state_dict(parameters)
        state["owners"] = [own["owners"][place] for place in places]
        state["compared"] = [own["compared"][place] for place in places]
        if acc.mask is not None:
            state["masks"] = [local_part(own["masks"][name]) for name, _ in self._segments]
        if acc.history is not None:
            state["history"] = self._flat(own["history"], acc.history)
        if acc.momentum is not None:
            state["momentum"] = self._flat(own["momentum"], acc.momentum).view_as(acc.momentum)
            steps = [own["momentum_steps"][name] for name, _ in self._segments]
            state["momentum_steps"] = torch.stack(steps)
        return state

    def _flat(self, saved: dict[str, dict[str, Tensor]], kept: Tensor) -> Tensor:
        """History or momentum of a state, as rows like those that are kept here."""
        sync, rows = self.optimizer._sync, []
        for k in range(len(rows_of(kept))):
            by_name = saved[str(k)]
            row = kept.new_zeros(self.optimizer._accumulator.rows.shape[1])
            for name, segment in self._segments:
                here = segment.view(row)
                if isinstance(sync, Sharded):
                    here = share_within(here, sync.peers.rank, sync.size)
                here.copy_(local_part(by_name[name]))
            # Every rank has put its share into zeros: their sum is the row.
            rows.append(sync.own_sum(row) if isinstance(sync, Sharded) else row)
        return torch.stack(rows)


def share_within(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's share of a tensor, as torch cuts it along its first dimension; may be empty.

    A tensor without dimensions is the first rank's.
    """
    if tensor.dim() == 0:
        return tensor if rank == 0 else tensor.new_empty(())
    each = -(-len(tensor) // ranks)
    return tensor[rank * each : (rank + 1) * each]


def share_of(whole: Tensor, mesh: Any) -> Tensor:
    """This rank's share of a tensor that every rank has, as a part of a DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    if whole.dim() == 0:
        return whole.clone()
    share = share_within(whole, mesh.get_local_rank(), mesh.size())
    own_memory = share.clone(memory_format=torch.contiguous_format)  # so that the whole may go
    return DTensor.from_local(
        own_memory, mesh, [Shard(0)], run_check=False, shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )  # fmt: skip


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


@contextmanager
def unstepped(base: torch.optim.Optimizer) -> Iterator[None]:
    """Keeps torch from stepping an optimizer that has no state to find out whether it has some.

    It does not where there is a gradient.
    """
    parameters = [p for group in base.param_groups for p in group["params"]]
    if any(p.grad is not None for p in parameters) or not parameters:
        yield
        return
    parameters[0].grad = torch.zeros_like(parameters[0])
    try:
        yield
    finally:
        parameters[0].grad = None


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
