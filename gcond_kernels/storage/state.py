"""The state dict of GCondFused: that of the wrapped optimizer, and beside it what GCondFused keeps.

One form serves `state_dict`, torch.distributed.checkpoint and every way of sharding: what belongs
to a parameter lies in the state of that parameter, under "gcond", in the parameter's shape and
sharded as it is; what belongs to the method lies in every parameter group, under "gcond", as
plain Python values:

    {"state": {0: {"exp_avg": ..., "gcond": {"history": {"0": ...}, "momentum": ..., ...}}, ...},
     "param_groups": [{"lr": ..., "params": [0, ...], "gcond": {"tasks": [...], ...}}]}

Whatever else the base's state dict has stays in it. That of a base which is a wrapper itself may
have another form: then it lies under "base" as it is, and the rest is as torch would make it.

torch takes states apart, down to each number of a list, and looks up every value by its path: so
with one optimizer they have the same paths at any time. What one method has and another has not
is one string, for else a state of another method would be refused before it is checked here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import is_dtensor, local_shard, placed_like, without_offset
from gcond_kernels.storage.layout import Segment, as_matrix
from gcond_kernels.storage.trainable_mask import write_mask

VERSION = 5
KEY = "gcond"
BASE = "base"

Entry = dict[str, Any]  # what is kept of one parameter


@dataclass
class Saved:
    """What is saved of an optimizer beside the state of its base.

    Attributes:
        storage: layout, counts and accumulators of the window.
        history: [K, N'] of all tensors, or None.
        momentum: [N'] of all tensors, or None.
        by_tensor: the method's state of each tensor, by name: [T, ...].
        common: what belongs to the method, as plain values.
        without_state: parameters that the base keeps nothing of; what it may show now was made for
            torch.distributed.checkpoint, which loads only what has a place.
    """

    storage: GradientStorage
    history: Tensor | None
    momentum: Tensor | None
    by_tensor: Mapping[str, Tensor]
    common: dict[str, Any]
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
        if any(storage.counts):  # between windows nothing reads the accumulators
            counted = [k for k, count in enumerate(storage.counts) if count]
            entry["accumulators"] = {str(k): shaped(storage.accumulators[k]) for k in counted}
        return entry


def add_to_base(base: torch.optim.Optimizer, saved: Saved) -> dict[str, Any]:
    """Return the state dict of the base with what is saved beside it; no tensor is copied."""
    parameters = [p for group in base.param_groups for p in group["params"]]
    state = base_state_dict(base)
    if not is_plain(state):
        numbers = itertools.count()
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]}
            for group in base.param_groups
        ]
        state = {"state": {}, "param_groups": groups, BASE: state}
    places, of_base = saved.storage.places, state["state"]
    states = {
        i: {**of_base.get(i, {}), KEY: saved.entry(places[p])} if p in places else of_base[i]
        for i, p in enumerate(parameters)
        if p in places or i in of_base
    }
    # What is of the base as a whole, and not of a parameter.
    states.update({i: one for i, one in of_base.items() if i not in range(len(parameters))})
    groups = [{**group, KEY: dict(saved.common)} for group in state["param_groups"]]
    return {**state, "state": states, "param_groups": groups}


def remove_from_base(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of the base, without what is saved beside it."""
    if BASE in state:
        return dict(state[BASE])
    states = {
        i: {k: v for k, v in one.items() if k != KEY} if isinstance(one, Mapping) else one
        for i, one in state["state"].items()
    }
    # Of a parameter that the base keeps nothing of there is no entry.
    states = {i: s for i, s in states.items() if s != {} or KEY not in state["state"][i]}
    groups = [{k: v for k, v in group.items() if k != KEY} for group in state["param_groups"]]
    others = {k: v for k, v in state.items() if k != KEY}
    return {**others, "state": states, "param_groups": groups}


def is_plain(state: Mapping[str, Any]) -> bool:
    """Return whether the state dict of a base has the form of torch's."""
    return {"state", "param_groups"} <= state.keys()


def base_state_dict(base: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of the base, without states of parameters that are in no group now."""
    parameters = {p for group in base.param_groups for p in group["params"]}
    of_base: Any = base.state
    removed = [p for p in of_base if isinstance(p, Tensor) and p not in parameters]
    kept = {p: of_base.pop(p) for p in removed}
    try:
        return base.state_dict()
    finally:
        of_base.update(kept)


def check_form(base: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise a ValueError where a state lacks that of a base which has a form of its own."""
    if BASE not in state and not is_plain(base_state_dict(base)):
        raise ValueError(
            f"the state of {type(base).__name__}, whose state dict has a form of its own, is not "
            "in this state: torch.distributed.checkpoint leaves it out, and a state of another "
            "base has none. Save optimizer.state_dict() with torch.save"
        )


def check_kind(state_dict: Mapping[str, Any]) -> None:
    """Raise a ValueError that says what to do if this is no state of a GCondFused."""
    if "param_groups" not in state_dict:
        raise ValueError(
            f"this is no state of an optimizer: it has {list(state_dict)}, not 'param_groups'"
        )
    if not any(group.get(KEY) for group in state_dict["param_groups"]):
        if KEY in state_dict:
            raise ValueError(
                "the state has the format of an older version of gcond-kernels, which this one "
                "does not read: load it with the version that saved it"
            )
        raise ValueError(
            'this is the state of a plain optimizer, without "gcond": load it with '
            "optimizer.base.load_state_dict"
        )


def read(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[Entry | None]]:
    """Return what belongs to the method, and what belongs to each parameter, in order.

    Raises:
        ValueError: this is no state of a GCondFused, or of another version.
    """
    check_kind(state)
    common: dict[str, Any] = next(g[KEY] for g in state["param_groups"] if g.get(KEY))
    if common.get("version") != VERSION:
        raise ValueError(
            f"the state has format {common.get('version')}, this version reads {VERSION}: load it "
            "with the version of gcond-kernels that saved it"
        )
    ids = [i for group in state["param_groups"] for i in group["params"]]
    return common, [state["state"].get(i, {}).get(KEY) for i in ids]


def check_window(window: Mapping[str, Any], mode: str, accumulation_steps: int) -> None:
    """Raise a ValueError where a window that has begun cannot go on with these settings."""
    own = {"mode": mode, "accumulation_steps": accumulation_steps}
    for option, value in own.items():
        if window["position"] > 0 and window[option] != value:
            raise ValueError(
                f"the state was taken in the middle of a window with {option}="
                f"{window[option]!r}, this optimizer has {value!r}"
            )


class Restored:
    """What a state holds of the parameters of this optimizer, to be written to a storage.

    Args:
        entries: of each parameter what the state holds of it, or None.
        parameters: every parameter and its name.
        common: what belongs to the method.
    """

    def __init__(
        self,
        entries: Sequence[Entry | None],
        parameters: Sequence[tuple[Tensor, str]],
        common: Mapping[str, Any],
    ) -> None:
        pairs = zip(parameters, entries, strict=True)
        self.entries = {p: entry for (p, _), entry in pairs if entry is not None}
        self.parameters = [(p, name) for p, name in parameters if p in self.entries]
        self.common = common

    @property
    def without_state(self) -> list[Tensor]:
        """The parameters of which the base kept nothing."""
        return [p for p, entry in self.entries.items() if not entry["base_has_state"]]

    def check(self, storage: GradientStorage) -> None:
        """Raise a ValueError that names the difference if this is of other parameters."""
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
                reason = (
                    ", which was taken in the middle of a window: save between step() and "
                    "backward(), or load it without torch.distributed.checkpoint"
                )
                raise ValueError(
                    f"{label} has no {missing[0]} in the state"
                    + (reason if missing[0] == "accumulators" else "")
                )
            tensors = [*entry.get("history", {}).values()]
            for tensor in [*tensors, *[entry[name] for name in ("momentum",) if name in entry]]:
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{label} has shape {list(parameter.shape)}, in the state it has "
                        f"{list(tensor.shape)}"
                    )

    def write_to(
        self, storage: GradientStorage, shard: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Write everything to a storage, in new memory: the state may hold what is there.

        Args:
            storage: laid out for these parameters.
            shard: of flat storage [N'] the shard of history and momentum that this process keeps;
                None is all.
        """
        storage.accumulators = self._flat(storage, storage.accumulators, "accumulators", None)
        if storage.history is not None:
            storage.history = self._flat(storage, storage.history, "history", shard)
        if storage.momentum is not None:
            storage.momentum = self._flat(storage, storage.momentum, "momentum", shard)
        storage.sharded_layout = storage.segments, storage.accumulators.shape[1]
        entries = [self.entries.get(segment.parameter) for segment in storage.segments]

        def stacked(name: str, own: Tensor, fill: int) -> Tensor:
            result = torch.full_like(own, fill)
            for t, entry in enumerate(entries):
                if entry is not None:
                    result[t] = local_shard(entry[name]).to(own)
            return result

        storage.counts = list(self.common["window"]["counts"])
        storage.window_tasks = [int(e.get("window_tasks", 0)) if e else 0 for e in entries]
        storage.parameter_tasks = stacked("tasks", storage.parameter_tasks, 0)
        storage.was_shared = stacked("was_shared", storage.was_shared, -1)
        if storage.momentum_steps is not None:
            storage.momentum_steps = stacked("momentum_steps", storage.momentum_steps, 0)
        if storage.mask is not None:
            storage.mask = storage.mask.clone()
            for segment, entry in zip(storage.segments, entries, strict=True):
                if entry is not None and "mask" in entry:
                    write_mask(storage.mask, segment, local_like(segment, entry["mask"]))

    def _flat(
        self,
        storage: GradientStorage,
        own: Tensor,
        name: str,
        shard: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Return flat storage like `own` with what the state has of that name."""
        length, device = storage.accumulators.shape[1], storage.accumulators.device
        results = []
        for k in range(len(as_matrix(own))):
            flat = torch.zeros(length, dtype=own.dtype, device=device)
            for segment in storage.segments:
                value = self.entries.get(segment.parameter, {}).get(name)
                if isinstance(value, Mapping):
                    value = value.get(str(k))
                if value is not None:
                    segment.view(flat).copy_(local_like(segment, value))
            results.append(flat if shard is None else shard(flat).clone())
        return torch.stack(results) if own.dim() == 2 else results[0]

    def method_state(
        self, storage: GradientStorage, fresh: dict[str, Tensor], common: frozenset[str] | None
    ) -> dict[str, Tensor]:
        """Return the method's state, from one that is fresh.

        Args:
            storage: with the tensors of this optimizer.
            fresh: by name, of those tensors where it is by tensor.
            common: names of what all tensors have in common; None where everything is.

        Raises:
            ValueError: the state is of a method with other settings.
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
                entry = self.entries.get(segment.parameter)
                if entry is not None and "method" in entry:
                    state[name][t] = checked(name, entry["method"].get(name), value[t])
        return state


def to_json(state: Mapping[str, Tensor]) -> str:
    """Return small tensors by name as JSON: their shapes and, to the bit, their numbers."""
    return json.dumps({k: [list(v.shape), v.flatten().tolist()] for k, v in state.items()})


def checked(name: str, saved: Tensor | None, own: Tensor) -> Tensor:
    """Return a copy of a saved tensor of a method's state, of the type and device of its own.

    Raises:
        ValueError: it is missing, or of another shape.
    """
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
            value.to(segment.parameter.device), parameter.device_mesh, parameter.placements
        )
    if is_dtensor(value) and not is_dtensor(parameter):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return local_shard(value)
