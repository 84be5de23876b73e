"""What a saved state must agree with, and the order of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The modules in which torch.compile, DistributedDataParallel and checkpoint_wrapper put a model.
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")


def check_kind(state_dict: Mapping[str, Any]) -> None:
    """Raises a ValueError that says what to do if this is no state of a GCondFused."""
    if "gcond" in state_dict and "param_groups" in state_dict:
        return
    if "param_groups" in state_dict:
        raise ValueError(
            'this is the state of a plain optimizer, without "gcond": load it with '
            "optimizer.base.load_state_dict"
        )
    raise ValueError(
        f"this is no state of an optimizer: it has {list(state_dict)}, not 'param_groups'"
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


def check_owner(owner: Sequence[Any] | None, own: Sequence[Any] | None) -> None:
    """Raises a ValueError where a state is that of one of several ranks, and not of this one.

    Args:
        owner: (way, rank, ranks) of the state; None where it is that of any rank.
        own: of this process.
    """
    if owner is None or (own is not None and list(owner) == list(own)):
        return
    way, rank, ranks = owner
    here = "one process" if own is None else f"rank {own[1]} of {own[2]} ({own[0]})"
    raise ValueError(
        f"the state is that of rank {rank} of {ranks} ({way}) alone, and this is {here}: save "
        "every rank's own, or a TrainingState with torch.distributed.checkpoint, which other "
        "numbers of ranks can load"
    )


def in_own_order(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state with the parameters of each group in the order that they have here, by their names.

    Where a group has no names, here or in the state, its order stays: they are matched by place.

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
    if ordered == [group["params"] for group in saved]:
        return state_dict
    # A parameter is known by its place in the state; this is where that place is now.
    now = {place: new for new, place in enumerate(p for group in ordered for p in group)}
    own = dict(state_dict["gcond"])
    own["accumulator"] = dict(own["accumulator"])
    own["accumulator"]["parameters"] = [now[p] for p in own["accumulator"]["parameters"]]
    matched = [
        {**there, "params": places, "param_names": list(here["param_names"])}
        if here.get("param_names")
        else {**there, "params": places}
        for there, here, places in zip(saved, groups, ordered, strict=True)
    ]
    return {**state_dict, "param_groups": matched, "gcond": own}


def check_method_state(
    saved: Mapping[str, Any], own: Mapping[str, Any], shared: frozenset[str] | None
) -> None:
    """That a method's state is of this method and its settings.

    Args:
        saved: of a state.
        own: of the method.
        shared: the entries that all tensors have in common, where the others are by tensor.
    """
    for key, value in own.items():
        there = saved.get(key)
        first = 0 if shared is None or key in shared else 1
        if there is None or there.shape[first:] != value.shape[first:]:
            raise ValueError(
                f"the state's method has {key} "
                f"{'missing' if there is None else list(there.shape)}, this one "
                f"{list(value.shape)}: was it saved with another dominance_window?"
            )


def group_in_order(number: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[int]:
    """The places of one group's parameters, in the order that they have here."""
    places: list[int] = list(there["params"])
    if len(places) != len(here["params"]):
        raise ValueError(
            f"parameter group {number} has {len(places)} parameters in the state, here "
            f"{len(here['params'])}"
        )
    if not there.get("param_names") or not here.get("param_names"):
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


def without_wrappers(names: Sequence[str]) -> list[str]:
    """Names of parameters without the parts that wrappers of a model add."""
    return [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
