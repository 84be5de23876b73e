"""What GCondFused adds to the state dict of the optimizer that it wraps.

One form serves `state_dict`, torch.distributed.checkpoint and every way of sharding: what belongs
to a parameter lies in the state of that parameter, under "gcond", in the parameter's shape and
sharded as it is; what belongs to the method lies in every parameter group, under "gcond", as
plain Python values:

    {"state": {0: {"exp_avg": ..., "gcond": {"history": {"0": ...}, "momentum": ..., ...}}, ...},
     "param_groups": [{"lr": ..., "params": [0, ...], "gcond": {"tasks": [...], ...}}]}

Whatever else the base's state dict has stays in it. That of a base which is a wrapper itself may
have another form: then it lies under "base" as it is, and the rest is as torch would make it.

torch takes states apart, down to each number of a list, and asks for every piece by its place: so
with one optimizer they have the same places at any time. What one method has and another has not
is one string, for else a state of another method would be refused before it is looked at here.
"""

from __future__ import annotations

import itertools
import json
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import is_dtensor, local_shard, placed_like, without_offset
from gcond_kernels.storage.layout import Segment, as_matrix
from gcond_kernels.storage.names import without_wrappers
from gcond_kernels.storage.trainable_mask import write_mask

VERSION = 4
KEY = "gcond"
BASE = "base"


@dataclass
class Saved:
    """What is saved of an optimizer beside its base.

    Attributes:
        accumulator: layout, counts and sums of the window.
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


def with_own(base: torch.optim.Optimizer, saved: Saved) -> dict[str, Any]:
    """Return the state dict of the base with what is saved beside it; no tensor is copied."""
    parameters = [p for group in base.param_groups for p in group["params"]]
    state = state_of(base, set(parameters))
    if not is_plain(state):
        state = {"state": {}, "param_groups": packed_groups(base), BASE: state}
    place = {s.parameter: t for t, s in enumerate(saved.storage.segments)}
    of_base = state["state"]
    states = {
        i: {**of_base.get(i, {}), KEY: of_parameter(saved, place[p])} if p in place else of_base[i]
        for i, p in enumerate(parameters)
        if p in place or i in of_base
    }
    # What is of the base as a whole, and not of a parameter.
    states.update({i: one for i, one in of_base.items() if i not in range(len(parameters))})
    groups = [{**group, KEY: dict(saved.common)} for group in state["param_groups"]]
    return {**state, "state": states, "param_groups": groups}


def is_plain(state: Mapping[str, Any]) -> bool:
    """Return whether the state dict of a base has the form of torch's."""
    return {"state", "param_groups"} <= state.keys()


def state_of(base: torch.optim.Optimizer, parameters: set[Tensor]) -> dict[str, Any]:
    """Return the state dict of the base, without states of parameters that are in no group now."""
    of_base: Any = base.state
    gone = [p for p in of_base if isinstance(p, Tensor) and p not in parameters]
    kept = {p: of_base.pop(p) for p in gone}
    try:
        return base.state_dict()
    finally:
        of_base.update(kept)


def check_form(base: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise a ValueError where a state lacks that of a base which has a form of its own."""
    parameters = {p for group in base.param_groups for p in group["params"]}
    if BASE not in state and not is_plain(state_of(base, parameters)):
        raise ValueError(
            f"the state of {type(base).__name__}, whose state dict has a form of its own, is not "
            "in this state: torch.distributed.checkpoint leaves it out, and a state of another "
            "base has none. Save optimizer.state_dict() with torch.save"
        )


def packed_groups(base: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the parameter groups with numbers for their parameters, as in torch's state dicts."""
    ends = list(itertools.accumulate(len(group["params"]) for group in base.param_groups))
    return [
        {**group, "params": list(range(end - len(group["params"]), end))}
        for group, end in zip(base.param_groups, ends, strict=True)
    ]


def of_parameter(saved: Saved, t: int) -> dict[str, Any]:
    """Return what is saved of one parameter."""
    storage = saved.storage
    segment = storage.segments[t]

    def shaped(row: Tensor) -> Tensor:
        part = segment.view(row)
        if is_dtensor(segment.parameter):
            part = without_offset(part)
        return placed_like(segment.parameter, part)

    own: dict[str, Any] = {"tasks": storage.parameter_tasks[t], "compared": storage.was_shared[t]}
    own["base_has_state"] = int(segment.parameter not in saved.without_state)
    own["touched"] = storage.window_tasks[t]
    if saved.history is not None:
        own["history"] = {str(k): shaped(row) for k, row in enumerate(saved.history)}
    if saved.momentum is not None and storage.momentum_steps is not None:
        own["momentum"] = shaped(saved.momentum)
        own["momentum_steps"] = storage.momentum_steps[t]
    bits = storage.mask_of(segment)
    if bits is not None:
        own["mask"] = placed_like(segment.parameter, bits)
    if saved.by_tensor:
        own["method"] = {name: value[t] for name, value in saved.by_tensor.items()}
    if any(storage.counts):  # between windows nothing reads the sums
        counted = [k for k, count in enumerate(storage.counts) if count]
        own["sums"] = {str(k): shaped(storage.accumulators[k]) for k in counted}
    return own


def without_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is the base's own of a state dict."""
    if BASE in state:
        return dict(state[BASE])
    states = {
        i: {k: v for k, v in one.items() if k != KEY} if isinstance(one, Mapping) else one
        for i, one in state["state"].items()
    }
    groups = [{k: v for k, v in group.items() if k != KEY} for group in state["param_groups"]]
    ours_alone = [i for i, one in states.items() if one == {} and KEY in state["state"][i]]
    filled = {i: one for i, one in states.items() if i not in ours_alone}
    others = {k: v for k, v in state.items() if k != KEY}
    return {**others, "state": filled, "param_groups": groups}


def own_of(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
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


class Restored:
    """What a state holds of the parameters that are here, to be put into flat storage."""

    def __init__(
        self,
        entries: Sequence[dict[str, Any] | None],
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
        kept = (
            ("history", storage.history),
            ("momentum", storage.momentum),
            ("mask", storage.mask),
        )
        for name, own in kept:
            if self.common["kept"][name] != (own is not None):
                there, here = ("no ", "") if own is not None else ("", "no ")
                raise ValueError(f"the state has {there}{name}, this optimizer has {here}{name}")
        names = {name for name, own in kept if own is not None} - {"mask"}
        if any(self.common["window"]["counts"]):
            names.add("sums")
        for parameter, label in self.parameters:
            entry = self.entries[parameter]
            for name in names:
                if name not in entry:
                    raise ValueError(
                        f"{label} has no {name} in the state, which was taken in the middle of a "
                        "window: save between step() and backward(), or load it without "
                        "torch.distributed.checkpoint"
                        if name == "sums"
                        else f"{label} has no {name} in the state"
                    )
            for tensor in tensors_of(entry.get("history")) + tensors_of(entry.get("momentum")):
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{label} has shape {list(parameter.shape)}, in the state it has "
                        f"{list(tensor.shape)}"
                    )

    def fill(self, storage: GradientStorage, cut: Callable[[Tensor], Tensor] | None) -> None:
        """Put all of it into an accumulator, in new memory: the state may hold what is here.

        Args:
            storage: laid out for these parameters.
            cut: of a row [N'] the part that this process keeps of history and momentum; None is
                all.
        """
        counts = list(self.common["window"]["counts"])
        storage.accumulators = self._flat(storage, storage.accumulators, "sums", None)
        if storage.history is not None:
            storage.history = self._flat(storage, storage.history, "history", cut)
        if storage.momentum is not None:
            storage.momentum = self._flat(storage, storage.momentum, "momentum", cut)
        storage.sharded_layout = storage.segments, storage.accumulators.shape[1]
        entries = [self.entries.get(segment.parameter) for segment in storage.segments]
        storage.counts = counts
        storage.window_tasks = [0 if e is None else int(e.get("touched", 0)) for e in entries]
        storage.parameter_tasks = stacked(entries_of(entries, "tasks"), storage.parameter_tasks, 0)
        storage.was_shared = stacked(entries_of(entries, "compared"), storage.was_shared, -1)
        if storage.momentum_steps is not None:
            steps = entries_of(entries, "momentum_steps")
            storage.momentum_steps = stacked(steps, storage.momentum_steps, 0)
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
        cut: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Rows like `own` with what the state has of that name."""
        length, device = storage.accumulators.shape[1], storage.accumulators.device
        rows = []
        for k in range(len(as_matrix(own))):
            row = torch.zeros(length, dtype=own.dtype, device=device)
            for segment in storage.segments:
                value = self.entries.get(segment.parameter, {}).get(name)
                if isinstance(value, Mapping):
                    value = value.get(str(k))
                if value is not None:
                    segment.view(row).copy_(local_like(segment, value))
            rows.append(row if cut is None else cut(row).clone())
        return torch.stack(rows) if own.dim() == 2 else rows[0]

    def method_state(
        self, storage: GradientStorage, fresh: dict[str, Tensor], common: frozenset[str] | None
    ) -> dict[str, Tensor]:
        """Return the method's state, from one that is fresh.

        Args:
            storage: with the tensors that are here.
            fresh: by name, of the tensors that are here where it is by tensor.
            common: the entries that all tensors have in common; None where all are.

        Raises:
            ValueError: the state is of a method with other settings.
        """
        state = {}
        of_all = json.loads(self.common["method"])
        for name, value in fresh.items():
            if common is None or name in common:
                there = of_all.get(name)
                if there is not None:
                    shape, numbers = there
                    there = torch.tensor(numbers, dtype=value.dtype, device="cpu").view(shape)
                state[name] = fitting(name, there, value)
                continue
            state[name] = value.clone()
            for t, segment in enumerate(storage.segments):
                entry = self.entries.get(segment.parameter)
                if entry is not None and "method" in entry:
                    state[name][t] = fitting(name, entry["method"].get(name), value[t])
        return state


def written(state: Mapping[str, Tensor]) -> str:
    """Return small tensors by name as JSON: their shapes and, to the bit, their numbers."""
    return json.dumps({k: [list(v.shape), v.flatten().tolist()] for k, v in state.items()})


def fitting(name: str, saved: Tensor | None, own: Tensor) -> Tensor:
    """Return an entry of a method's state as it is kept here.

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


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of an entry that is one, or has one for each task."""
    if value is None:
        return []
    return list(value.values()) if isinstance(value, Mapping) else [value]


def local_like(segment: Segment, value: Tensor) -> Tensor:
    """Return what this process holds of a saved tensor, sharded as the parameter is, or full."""
    parameter: Any = segment.parameter
    if is_dtensor(parameter) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(segment.parameter.device), parameter.device_mesh, parameter.placements
        )
    if is_dtensor(value) and not is_dtensor(parameter):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return local_shard(value)


def entries_of(entries: Sequence[dict[str, Any] | None], name: str) -> list[Tensor | None]:
    """Return what each parameter has of that name; None where nothing is saved of it."""
    return [None if entry is None else entry[name] for entry in entries]


def stacked(values: Sequence[Tensor | None], own: Tensor, fill: int) -> Tensor:
    """Return a tensor like `own` of one entry for each tensor; `fill` where there is none."""
    result = torch.full((len(values), *own.shape[1:]), fill, dtype=own.dtype, device=own.device)
    for t, value in enumerate(values):
        if value is not None:
            result[t] = local_shard(value).to(own)
    return result


class ParameterState(ChainMap[str, Any], dict[str, Any]):  # type: ignore[misc]
    """The state of a parameter: of the base, where what is written goes, and "gcond".

    It is a dict for those who ask, as code that moves the state of any optimizer does.
    """


class StateView(MutableMapping[Tensor, Any]):
    """The per-parameter state: the base's own, and under "gcond" what GCondFused keeps beside it.

    The base does not see the latter: many optimizers take a state that is not empty for theirs.
    What is written goes to the base.
    """

    def __init__(
        self, base: torch.optim.Optimizer, own: Callable[[Tensor], dict[str, Any]]
    ) -> None:
        self._base = base
        self._own = own

    def __getitem__(self, parameter: Tensor) -> Any:
        state = self._base.state[parameter]
        if not parameter.requires_grad or not isinstance(state, MutableMapping):
            return state
        return ParameterState(state, OwnState(parameter, self._own))

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        if isinstance(state, ParameterState):
            state = state.maps[0]
        if isinstance(state, MutableMapping):
            state.pop(KEY, None)  # who copied all of it has copied that
        self._base.state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._base.state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._base.state

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._base.state)

    def __len__(self) -> int:
        return len(self._base.state)

    def __repr__(self) -> str:
        return repr(self._base.state)


class OwnState(MutableMapping[str, Any]):
    """What GCondFused keeps of one parameter, under "gcond"; found out where it is asked for."""

    def __init__(self, parameter: Tensor, own: Callable[[Tensor], dict[str, Any]]) -> None:
        self._parameter = parameter
        self._own = own

    def __getitem__(self, key: str) -> Any:
        if key != KEY:
            raise KeyError(key)
        return self._own(self._parameter)

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("what GCondFused keeps of a parameter is not to be written")

    def __delitem__(self, key: str) -> None:
        raise TypeError("what GCondFused keeps of a parameter is not to be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter((KEY,))

    def __len__(self) -> int:
        return 1


def check_kind(state_dict: Mapping[str, Any]) -> None:
    """Raises a ValueError that says what to do if this is no state of a GCondFused."""
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


def check_window(window: Mapping[str, Any], mode: str, accumulation_steps: int) -> None:
    """Raises a ValueError where a window that has begun cannot go on with these settings."""
    own = {"mode": mode, "accumulation_steps": accumulation_steps}
    for option, value in own.items():
        if window["position"] > 0 and window[option] != value:
            raise ValueError(
                f"the state was taken in the middle of a window with {option}="
                f"{window[option]!r}, this optimizer has {value!r}"
            )


def in_own_order(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state with the parameters of each group in the order that they have here, by their names.

    Where a group has no names, here or in the state, its order stays: they are matched by place.
    torch.distributed.checkpoint.state_dict has put them in order already, but for their names.

    Args:
        state_dict: as GCondFused makes it.
        groups: the parameter groups of this process's optimizer.

    Raises:
        ValueError: the groups do not match; the message names the difference.
    """
    check_kind(state_dict)
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the state has {len(saved)} parameter groups, this optimizer {len(groups)}"
        )
    ordered = [group_in_order(n, *pair) for n, pair in enumerate(zip(saved, groups, strict=True))]
    if BASE in state_dict and ordered != [group["params"] for group in saved]:
        raise ValueError(
            "the state has the parameters in another order, and that of base has a form of its "
            "own, which cannot be put in order: give the parameters in the order of the state"
        )
    matched = [
        {**there, "params": places, "param_names": list(here["param_names"])}
        if here.get("param_names")
        else {**there, "params": places}
        for there, here, places in zip(saved, groups, ordered, strict=True)
    ]
    return {**state_dict, "param_groups": matched}


def group_in_order(number: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Any]:
    """The places of one group's parameters, in the order that they have here."""
    places: list[Any] = list(there["params"])
    by_name = bool(places) and all(isinstance(place, str) for place in places)
    if len(places) != len(here["params"]):
        raise ValueError(
            f"parameter group {number} has {len(places)} parameters in the state, here "
            f"{len(here['params'])}"
        )
    if by_name or not there.get("param_names") or not here.get("param_names"):
        return places
    saved, own = list(there["param_names"]), list(here["param_names"])
    if saved == own:
        return places
    if set(saved) != set(own):
        saved, own = without_wrappers(saved), without_wrappers(own)
    if missing := sorted(set(saved) ^ set(own)):
        where = "in the state" if missing[0] in saved else "in this optimizer"
        raise ValueError(f"parameter group {number} has {missing[0]} only {where}")
    if twice := sorted({name for name in saved if saved.count(name) > 1}):
        raise ValueError(
            f"parameter group {number} has more than one parameter called {twice[0]}, and the "
            "state has them in another order: give each a name of its own"
        )
    place = dict(zip(saved, places, strict=True))
    return [place[name] for name in own]
