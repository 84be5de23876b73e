"""`optimizer.state`: the state of the base, and what GCondFused keeps beside it."""

from __future__ import annotations

from collections import ChainMap, UserDict
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.storage.state import Entry
from gcond_kernels.storage.state_format import KEY


class ParameterState(ChainMap[str, Any], dict[str, Any]):  # type: ignore[misc]
    """The state of one parameter: of the base, which writes go to, and "gcond".

    It passes for a dict, which code that moves the state of any optimizer expects.
    """


class LazyEntry(dict[str, Any]):
    """What GCondFused keeps of one parameter, under "gcond"; computed where it is read."""

    def __init__(self, entry: Callable[[], Entry]) -> None:
        super().__init__({KEY: entry})

    def __getitem__(self, key: str) -> Entry:
        return super().__getitem__(key)()  # type: ignore[no-any-return]


class StateView(UserDict[Tensor, Any]):
    """The state of each parameter: of the base, and under "gcond" what GCondFused keeps beside it.

    The base does not see the latter: many optimizers take a state that is not empty for theirs.
    What is written goes to the base.

    Args:
        base: the wrapped optimizer.
        entry_of: a function from a parameter to what is kept of it.
    """

    def __init__(self, base: torch.optim.Optimizer, entry_of: Callable[[Tensor], Entry]) -> None:
        self.data = base.state
        self._entry_of = entry_of

    def __getitem__(self, parameter: Tensor) -> Any:
        state = self.data[parameter]
        if not parameter.requires_grad or not isinstance(state, MutableMapping):
            return state
        return ParameterState(state, LazyEntry(lambda: self._entry_of(parameter)))

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        if isinstance(state, ParameterState):
            state = state.maps[0]
        if isinstance(state, MutableMapping):
            state.pop(KEY, None)  # a copy of all of it has that too
        self.data[parameter] = state
