"""The form of a state dict, which serves torch, torch.distributed.checkpoint and all strategies.

What belongs to a parameter lies in the state of that parameter, under "gcond", in the parameter's
shape and sharded as it is; what belongs to the method lies in every parameter group, under
"gcond", as plain Python values:

    {"state": {0: {"exp_avg": ..., "gcond": {"history": {"0": ...}, "momentum": ..., ...}}, ...},
     "param_groups": [{"lr": ..., "params": [0, ...], "gcond": {"tasks": [...], ...}}]}

Whatever else the base's state dict has stays in it. That of a base which is a wrapper itself may
have another form: then it lies under "base" as it is, and the rest is as torch would make it.

torch takes states apart, down to each number of a list, and looks up every value by its path: so
with one optimizer they have the same paths at any time. What one method has and another has not
is one string, for else a state of another method would be refused before it is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.storage.names import without_wrappers

VERSION = 6
KEY = "gcond"
BASE = "base"


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


def without_gcond(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's own state dict out of one of GCondFused."""
    if BASE in state:
        return dict(state[BASE])
    states = {
        i: {k: v for k, v in one.items() if k != KEY} if isinstance(one, Mapping) else one
        for i, one in state["state"].items()
    }
    # Of a parameter that the base keeps nothing of there is no entry.
    states = {i: one for i, one in states.items() if one != {} or KEY not in state["state"][i]}
    groups = [{k: v for k, v in group.items() if k != KEY} for group in state["param_groups"]]
    others = {k: v for k, v in state.items() if k != KEY}
    return {**others, "state": states, "param_groups": groups}


def common_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state holds beside the parameters.

    Raises:
        ValueError: this is no state of a GCondFused, or of another version.
    """
    if "param_groups" not in state:
        raise ValueError(
            f"this is no state of an optimizer: it has {list(state)}, not 'param_groups'"
        )
    found = [group[KEY] for group in state["param_groups"] if group.get(KEY)]
    if not found and KEY not in state:
        raise ValueError(
            'this is the state of a plain optimizer, without "gcond": load it with '
            "optimizer.base.load_state_dict"
        )
    common: dict[str, Any] = found[0] if found else state[KEY]
    if not found or common.get("version") != VERSION:
        raise ValueError(
            f"the state has format {common.get('version')}, this version reads {VERSION}: load it "
            "with the version of gcond-kernels that saved it"
        )
    return common


def reordered(state: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a state dict with the parameters of each group in the order of an optimizer's groups.

    Where a group has no names, here or in the state, its order stays: they are matched by place.
    torch.distributed.checkpoint.state_dict has put them in order already, but for their names.

    Raises:
        ValueError: the groups do not match; the message names the difference.
    """
    saved = state["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the state has {len(saved)} parameter groups, this optimizer {len(groups)}"
        )
    ordered = [ids_in_order(n, *pair) for n, pair in enumerate(zip(saved, groups, strict=True))]
    if BASE in state and ordered != [group["params"] for group in saved]:
        raise ValueError(
            "the state has the parameters in another order, and that of base has a form of its "
            "own, which cannot be put in order: give the parameters in the order of the state"
        )
    matched = [
        {**there, "params": ids}
        | ({"param_names": list(here["param_names"])} if here.get("param_names") else {})
        for there, here, ids in zip(saved, groups, ordered, strict=True)
    ]
    return {**state, "param_groups": matched}


def ids_in_order(number: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Any]:
    """Return the ids of a saved group's parameters, in the order of an optimizer's group."""
    ids: list[Any] = list(there["params"])
    group = f"parameter group {number}"
    if len(ids) != len(here["params"]):
        raise ValueError(
            f"{group} has {len(ids)} parameters in the state, here {len(here['params'])}"
        )
    saved, own = list(there.get("param_names") or []), list(here.get("param_names") or [])
    by_name = bool(ids) and all(isinstance(one, str) for one in ids)
    if by_name or not saved or not own or saved == own:
        return ids
    if set(saved) != set(own):
        saved, own = without_wrappers(saved), without_wrappers(own)
    if missing := sorted(set(saved) ^ set(own)):
        where = "in the state" if missing[0] in saved else "in this optimizer"
        raise ValueError(f"{group} has {missing[0]} only {where}")
    if twice := sorted({name for name in saved if saved.count(name) > 1}):
        raise ValueError(
            f"{group} has more than one parameter called {twice[0]}, and the state has them in "
            "another order: give each a name of its own"
        )
    id_of = dict(zip(saved, ids, strict=True))
    return [id_of[name] for name in own]
