"""Saving what GCondFused keeps beside its base, and writing it back; see `state_format`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import is_dtensor, local_shard, placed_like, without_offset
from gcond_kernels.storage.layout import Segment
from gcond_kernels.storage.state_format import (
    BASE,
    KEY,
    base_state_dict,
    common_of,
    is_plain,
    reordered,
    without_gcond,
)
from gcond_kernels.storage.trainable_mask import write_mask

Entry: TypeAlias = "dict[str, Any]"  # what is kept of one parameter


@dataclass
class Saved:
    """What is saved of an optimizer beside the state of its base."""

    storage: GradientStorage
    history: Tensor | None  # [K, N'], of all ranks
    momentum: Tensor | None  # [N'], of all ranks
    by_tensor: Mapping[str, Tensor]  # the method's state of each tensor, by name: [T, ...]
    common: dict[str, Any]  # what belongs to the method, as plain values
    # Parameters that the base keeps nothing of; what it may show now was made for
    # torch.distributed.checkpoint, which loads only what has a place.
    without_state: set[Tensor]

    def entry(self, t: int) -> Entry:
        """Return what is saved of one parameter; no tensor is copied."""
        storage, segment = self.storage, self.storage.segments[t]
        parameter = segment.parameter

        def shaped(flat: Tensor) -> Tensor:
            view = segment.view(flat)
            return placed_like(parameter, without_offset(view) if is_dtensor(parameter) else view)

        entry: Entry = {
            "tasks": storage.parameter_tasks[t],
            "was_shared": storage.was_shared[t],
            "window_tasks": storage.window_tasks[t],
            "base_has_state": int(parameter not in self.without_state),
        }
        if self.history is not None:
            entry["history"] = {str(k): shaped(flat) for k, flat in enumerate(self.history)}
        if self.momentum is not None and storage.momentum_steps is not None:
            entry["momentum"] = shaped(self.momentum)
            entry["momentum_steps"] = storage.momentum_steps[t]
        mask = storage.mask_of(segment)
        if mask is not None:
            entry["mask"] = placed_like(parameter, mask)
        if self.by_tensor:
            entry["method"] = {name: value[t] for name, value in self.by_tensor.items()}
        # Between windows nothing reads the accumulators.
        if counted := [k for k, count in enumerate(storage.counts) if count]:
            entry["accumulators"] = {str(k): shaped(storage.accumulators[k]) for k in counted}
        return entry

    def state_dict(self, base: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state dict of the base with what is saved beside it; no tensor is copied."""
        parameters = [p for group in base.param_groups for p in group["params"]]
        state = base_state_dict(base)
        if not is_plain(state):
            numbers = itertools.count()
            groups = [
                {**group, "params": list(itertools.islice(numbers, len(group["params"])))}
                for group in base.param_groups
            ]
            state = {"state": {}, "param_groups": groups, BASE: state}
        places, of_base = self.storage.places, state["state"]
        states = {
            i: {**of_base.get(i, {}), KEY: self.entry(places[p])} if p in places else of_base[i]
            for i, p in enumerate(parameters)
            if p in places or i in of_base
        }
        # What is of the base as a whole, and not of a parameter.
        states.update({i: one for i, one in of_base.items() if i not in range(len(parameters))})
        groups = [{**group, KEY: dict(self.common)} for group in state["param_groups"]]
        return {**state, "state": states, "param_groups": groups}


class Restored:
    """A state dict, split into what is the base's and what is written to a storage.

    A state of anything but a GCondFused of this version and these groups raises a ValueError.

    Attributes:
        common: what belongs to the method.
        of_base: the state dict of the base.
        entries: what the state holds of each parameter that it knows.
        parameters: these parameters, and their names.
    """

    def __init__(
        self,
        state_dict: dict[str, Any],
        base: torch.optim.Optimizer,
        parameters: Sequence[tuple[Tensor, str]],
    ) -> None:
        self.common = common_of(state_dict)
        state = reordered(state_dict, base.param_groups)
        if BASE not in state and not is_plain(base_state_dict(base)):
            raise ValueError(
                f"the state of {type(base).__name__}, whose state dict has a form of its own, is "
                "not in this state: torch.distributed.checkpoint leaves it out, and a state of "
                "another base has none. Save optimizer.state_dict() with torch.save"
            )
        self.of_base = without_gcond(state)
        ids = [i for group in state["param_groups"] for i in group["params"]]
        entries = [state["state"].get(i, {}).get(KEY) for i in ids]
        named = zip(parameters, entries, strict=True)
        self.entries: dict[Tensor, Entry] = {p: e for (p, _), e in named if e is not None}
        self.parameters = [(p, name) for p, name in parameters if p in self.entries]

    def check(self, storage: GradientStorage) -> None:
        """Raise a ValueError that names the difference if the state does not fit a storage."""
        kept = {"history": storage.history, "momentum": storage.momentum, "mask": storage.mask}
        for name, own in kept.items():
            if self.common["kept"][name] != (own is not None):
                there, here = ("no ", "") if own is not None else ("", "no ")
                raise ValueError(f"the state has {there}{name}, this optimizer has {here}{name}")
        names = [name for name in ("history", "momentum") if kept[name] is not None]
        if any(self.common["window"]["counts"]):
            names.append("accumulators")
        for parameter, label in self.parameters:
            entry = self.entries[parameter]
            if missing := [name for name in names if name not in entry]:
                reason = ""
                if missing[0] == "accumulators":
                    reason = (
                        ", which was taken in the middle of a window: save between step() and "
                        "backward(), or load it without torch.distributed.checkpoint"
                    )
                raise ValueError(f"{label} has no {missing[0]} in the state{reason}")
            for tensor in [*entry.get("history", {}).values(), entry.get("momentum", parameter)]:
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{label} has shape {list(parameter.shape)}, in the state it has "
                        f"{list(tensor.shape)}"
                    )

    def write_to(
        self, storage: GradientStorage, shard: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Write everything to a storage, in new memory: the state may hold what is there.

        `shard` takes from flat storage [N'] what this process keeps of history and momentum.
        """
        keep = shard or Tensor.detach
        tasks = [str(k) for k in range(len(storage.counts))]
        entries = [self.entries.get(segment.parameter, {}) for segment in storage.segments]

        def flat(name: str, dtype: torch.dtype, key: str) -> Tensor:
            result = storage.accumulators.new_zeros(storage.accumulators.shape[1], dtype=dtype)
            for segment, entry in zip(storage.segments, entries, strict=True):
                saved = entry.get(name, {})
                value = saved.get(key) if isinstance(saved, Mapping) else saved
                if value is not None:
                    segment.view(result).copy_(local_like(segment, value))
            return result

        storage.sharded_layout = storage.segments, storage.accumulators.shape[1]
        accumulators = [flat("accumulators", storage.dtype, k) for k in tasks]
        storage.accumulators = torch.stack(accumulators)
        if storage.history is not None:
            dtype = storage.history.dtype
            storage.history = torch.stack([keep(flat("history", dtype, k)) for k in tasks])
        if storage.momentum is not None and storage.momentum_steps is not None:
            storage.momentum = keep(flat("momentum", storage.momentum.dtype, "")).clone()
            storage.momentum_steps = stacked(entries, "momentum_steps", storage.momentum_steps)
        storage.counts = list(self.common["window"]["counts"])
        storage.window_tasks = [int(entry.get("window_tasks", 0)) for entry in entries]
        storage.parameter_tasks = stacked(entries, "tasks", storage.parameter_tasks)
        storage.was_shared = stacked(entries, "was_shared", storage.was_shared, -1)
        if storage.mask is not None:
            storage.mask = storage.mask.clone()
            for segment, entry in zip(storage.segments, entries, strict=True):
                if "mask" in entry:
                    write_mask(storage.mask, segment, local_like(segment, entry["mask"]))

    def method_state(
        self, storage: GradientStorage, fresh: dict[str, Tensor], common: frozenset[str] | None
    ) -> dict[str, Tensor]:
        """Return the method's state, from one that is fresh.

        The entries named in `common` belong to all tensors, the others to one each; None is all.
        """
        state = {}
        of_all = json.loads(self.common["method"])
        for name, value in fresh.items():
            if common is None or name in common:
                saved = None
                if name in of_all:
                    shape, numbers = of_all[name]
                    saved = torch.tensor(numbers, dtype=value.dtype, device="cpu").view(shape)
                state[name] = checked(name, saved, value)
                continue
            state[name] = value.clone()
            for t, segment in enumerate(storage.segments):
                entry = self.entries.get(segment.parameter, {})
                if "method" in entry:
                    state[name][t] = checked(name, entry["method"].get(name), value[t])
        return state


def stacked(entries: Sequence[Entry], name: str, like: Tensor, fill: int = 0) -> Tensor:
    """Return [T, ...] of what the entries have of that name; `fill` of those that are empty."""
    result = torch.full_like(like, fill)
    for t, entry in enumerate(entries):
        if entry:
            result[t] = local_shard(entry[name]).to(like)
    return result


def to_json(state: Mapping[str, Tensor]) -> str:
    """Return small tensors by name as JSON: their shapes and, to the bit, their numbers."""
    return json.dumps({k: [list(v.shape), v.flatten().tolist()] for k, v in state.items()})


def checked(name: str, saved: Tensor | None, own: Tensor) -> Tensor:
    """Return a copy of a saved tensor like its own, or raise a ValueError if the shape differs."""
    if saved is None or saved.shape != own.shape:
        there = "missing" if saved is None else list(saved.shape)
        raise ValueError(
            f"the state's method has {name} {there}, this one {list(own.shape)}: was it saved with "
            "another dominance_window?"
        )
    return saved.to(own, copy=True)


def local_like(segment: Segment, value: Tensor) -> Tensor:
    """Return this process's shard of a saved tensor, sharded as the parameter is, or full."""
    parameter: Any = segment.parameter
    if is_dtensor(parameter) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    if is_dtensor(value) and not is_dtensor(parameter):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return local_shard(value)
