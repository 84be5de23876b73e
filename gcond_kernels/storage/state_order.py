"""Matching the parameters of a state dict with those of an optimizer, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gcond_kernels.storage.names import without_wrappers
from gcond_kernels.storage.state import BASE, check_kind


def reordered(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a state dict with the parameters of each group in the order of an optimizer's groups.

    Where a group has no names, here or in the state, its order stays: they are matched by place.
    torch.distributed.checkpoint.state_dict has put them in order already, but for their names.

    Args:
        state_dict: as GCondFused makes it.
        groups: the parameter groups of the optimizer.

    Raises:
        ValueError: the groups do not match; the message names the difference.
    """
    check_kind(state_dict)
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the state has {len(saved)} parameter groups, this optimizer {len(groups)}"
        )
    ordered = [places_in(n, *pair) for n, pair in enumerate(zip(saved, groups, strict=True))]
    if BASE in state_dict and ordered != [group["params"] for group in saved]:
        raise ValueError(
            "the state has the parameters in another order, and that of base has a form of its "
            "own, which cannot be put in order: give the parameters in the order of the state"
        )
    matched = [
        {**there, "params": places}
        | ({"param_names": list(here["param_names"])} if here.get("param_names") else {})
        for there, here, places in zip(saved, groups, ordered, strict=True)
    ]
    return {**state_dict, "param_groups": matched}


def places_in(number: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Any]:
    """Return the places of a group's parameters in a state, in the order that they have here."""
    places: list[Any] = list(there["params"])
    group = f"parameter group {number}"
    if len(places) != len(here["params"]):
        raise ValueError(
            f"{group} has {len(places)} parameters in the state, here {len(here['params'])}"
        )
    by_name = bool(places) and all(isinstance(place, str) for place in places)
    saved, own = list(there.get("param_names") or []), list(here.get("param_names") or [])
    if by_name or not saved or not own or saved == own:
        return places
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
    place = dict(zip(saved, places, strict=True))
    return [place[name] for name in own]
