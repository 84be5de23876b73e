"""Names of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# The modules in which torch.compile, DistributedDataParallel and checkpoint_wrapper put a model.
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")


def without_wrappers(names: Sequence[str]) -> list[str]:
    """Names of parameters without the parts that wrappers of a model add."""
    return [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]


def labels_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return what to call each parameter of an optimizer, in order; no two have the same label.

    Where two groups have parameters of one name, as two models do, it is "group0.name".
    """
    names, index = [], 0
    for number, group in enumerate(groups):
        given = group.get("param_names")
        for position in range(len(group["params"])):
            names.append((number, given[position] if given else f"parameter {index}"))
            index += 1
    counts = Counter(name for _, name in names)
    labels = [name if counts[name] == 1 else f"group{g}.{name}" for g, name in names]
    again = Counter(labels)
    if max(again.values(), default=1) == 1:
        return labels
    return [
        label if again[label] == 1 else f"{label} (parameter {i})" for i, label in enumerate(labels)
    ]
