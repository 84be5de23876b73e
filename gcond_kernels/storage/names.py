"""Names of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# The modules in which torch.compile, DistributedDataParallel and checkpoint_wrapper put a model.
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")


def without_wrappers(names: Sequence[str]) -> list[str]:
    """Return names of parameters without the modules that wrappers of a model add."""
    return [".".join([m for m in name.split(".") if m not in WRAPPERS]) for name in names]


def labels_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return a label for each parameter of an optimizer, in order; no two are the same.

    Where two groups have parameters of one name, as two models do, it is "group0.name".
    """
    numbered, index = [], 0
    for number, group in enumerate(groups):
        size = len(group["params"])
        names = group.get("param_names") or [f"parameter {i}" for i in range(index, index + size)]
        numbered += [(number, names[position]) for position in range(size)]
        index += size
    counts = Counter([name for _, name in numbered])
    labels = [name if counts[name] == 1 else f"group{g}.{name}" for g, name in numbered]
    again = Counter(labels)
    if max(again.values(), default=1) == 1:
        return labels
    return [
        label if again[label] == 1 else f"{label} (parameter {i})" for i, label in enumerate(labels)
    ]
