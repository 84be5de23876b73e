"""Layers in which tasks conflict most, as a table, and a model in which each task has its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from inspect import signature
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.records import shortened
from gcond_kernels.storage.names import without_wrappers

MOST_COLUMNS = 80


class SplitModel(nn.Module):
    """A model per task; they share everything but the layers that each has for itself.

    `split_conflicting_layers` makes it. What is shared is there once: the models hold the same
    modules, parameters and buffers, so that `.to()`, `train()`, `state_dict()` (with the shared
    ones under each model's name, as torch has it of tied weights), `copy.deepcopy`, `torch.save`
    and `torch.compile` do what they do of any model, and so does activation checkpointing.
    `parameters()` and `named_parameters()` give shared ones once, by the name in the first model:
    "models.0.body.0.weight"; a layer of the second task is "models.1.body.2.weight".

    The modules that a split layer lies in exist once per task too, with the same parameters and
    buffers: any other attribute that is set on one of them is set for its task alone.

    Attributes:
        tasks: the names.
        layers: what was split, by the names in the model it was split from.
        models: one for each task, in this order.
    """

    def __init__(
        self, models: Iterable[nn.Module], layers: Sequence[str], tasks: Sequence[str]
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.layers = tuple(layers)
        self.models = nn.ModuleList(models)
        self._places = {task: place for place, task in enumerate(self.tasks)}
        # A model that is told the task already, say to choose its head, is told it as before.
        self._tells = "task" in signature(self.models[0].forward).parameters

    def for_task(self, task: str) -> nn.Module:
        """The model of one task: of the class, and with the names, that it was split from.

        Raises:
            KeyError: there is no such task.
        """
        if task not in self._places:
            raise KeyError(f"unknown task {task!r}: the tasks are {list(self.tasks)}")
        return self.models[self._places[task]]

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """Runs the model of one task.

        Args:
            *args: what the model takes.
            task: its name. It is handed on only where the model's own forward has an argument
                called task.
            **kwargs: what the model takes.

        Raises:
            TypeError: without a task.
            KeyError: there is no such task.
        """
        if task is None:
            raise TypeError(
                f"say whose layers are to run, model(..., task=...): one of {list(self.tasks)}"
            )
        if self._tells:
            kwargs["task"] = task
        return self.for_task(task)(*args, **kwargs)

    def extra_repr(self) -> str:
        """The tasks and layers, for print(model)."""
        return f"tasks={list(self.tasks)}, layers={list(self.layers)}"


def split_conflicting_layers(
    model: nn.Module, layers: Iterable[str], tasks: Iterable[str]
) -> SplitModel:
    """A copy of the model in which each task has some layers for itself.

    Recon (Shi et al. 2023, "Recon: Reducing Conflicting Gradients from the Root for Multi-Task
    Learning", arXiv 2302.11289): a model is trained for a while, the layers in which the gradients
    of tasks conflict most often become task-specific, once, and training starts over::

        worst = [row["layer"] for row in optimizer.recorder.layers(threshold=-0.02)[:25]]
        model = split_conflicting_layers(make_model(), worst, tasks)
        optimizer = GCondFused(torch.optim.AdamW(model.named_parameters()), tasks)
        ...
        optimizer.backward({t: loss(model(x, task=t), y[t]) for t, loss in losses.items()})

    Every task's layers start with the values of the model that is given. Training starts over
    where that is a new one, as above, or has its pretrained weights loaded once more; it goes on
    where it is the trained one.

    Args:
        model: is not changed. Split it before it is compiled or wrapped (FSDP2,
            DistributedDataParallel), which hold on to the modules that they are given.
        layers: names as in `model.named_modules()`: those of parameters without their last part.
            With a layer all that is in it becomes task-specific; a parameter of the model itself is
            in none, and stays shared. A module that is reached by several names may be given by
            any; it stays one for all its uses, once per task.
        tasks: names, any strings; a mapping gives its keys.

    Returns:
        The new model: `model(*args, task=name, **kwargs)` runs one task's.

    Raises:
        TypeError: model is no module; layers or tasks are one string, or not of strings.
        ValueError: there are none of them, or a task is there twice; a layer is unknown, is the
            whole model, has no parameters, or lies in another; a parameter of a layer is tied to
            one outside of them, as embeddings often are; a shared module refers to a layer, or to
            what that lies in, by an attribute that is no submodule, and so would always use the
            first task's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    layers = list(dict.fromkeys(_names("layers", layers)))
    tasks = _names("tasks", tasks)
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ValueError(f"tasks: {twice[0]!r} is there twice")
    first = copy.deepcopy(model)
    chosen = _chosen(first, layers)
    _check_nesting(chosen)
    outside = _Outside(first, chosen)
    _check_ties(chosen, outside)
    _check_references(chosen, outside)
    models = [first, *(outside.model_of_another_task(first) for _ in tasks[1:])]
    return SplitModel(models, list(chosen), tasks)


def conflict_table(recorder: Recorder, threshold: float = 0.0, most: int | None = None) -> str:
    """The layers by their number of conflicts, highest first, as text of 80 columns.

    A line per layer: its rank; s(l), how often two tasks conflicted in it; how often two were
    compared; the share of the one in the other; and its name, without its middle where it is long.
    On a GPU this waits for the device.

    Args:
        recorder: its `layers(threshold=threshold)` are the rows.
        threshold: a pair with a cosine below it is a conflict. Recon (Shi et al. 2023, arXiv
            2302.11289) counts in this way, with a threshold of 0 or a little less.
        most: so many layers at most, 1 or more; None for all.

    Raises:
        ValueError: most is no such number.
    """
    if most is not None and (not isinstance(most, Integral) or isinstance(most, bool) or most < 1):
        raise ValueError(f"most must be a whole number, 1 or more, or None, not {most!r}")
    layers = recorder.layers(threshold=threshold)
    title = f"Conflicts by layer: pairs of tasks with a cosine below {threshold:g}"
    if not layers:
        return f"{title}\nno layer had a gradient of two tasks"
    numbers = [("rank", "conflicts", "compared", "share")]
    for rank, row in enumerate(layers[:most], 1):
        share = f"{100.0 * row['share']:.1f} %"
        numbers.append((str(rank), str(row["conflicts"]), str(row["compared"]), share))
    widths = [max(len(line[column]) for line in numbers) for column in range(4)]
    room = max(MOST_COLUMNS - sum(widths) - 2 * len(widths), 1)
    names = ["layer", *(shortened(row["layer"], room) for row in layers[:most])]
    lines = [
        "  ".join([*(text.rjust(width) for text, width in zip(line, widths, strict=True)), name])
        for line, name in zip(numbers, names, strict=True)
    ]
    if more := len(layers) - len(names) + 1:
        lines.append(f"and {more} more layer{'' if more == 1 else 's'}")
    return "\n".join([title, *lines])


def _names(what: str, names: object) -> list[str]:
    """A list of strings, at least one."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{what} must be a list of names, not {names!r}")
    listed = list(names)
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"{what}: a name must be a string, not {name!r}")
    if not listed:
        raise ValueError(f"{what} must have at least one name")
    return listed


def _chosen(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names; of a module that is given by two only the first."""
    known = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[str, nn.Module] = {}
    plain = dict(zip(without_wrappers(list(known)), known, strict=True))
    for given in layers:
        # A recorder's names are without what wrappers add: here there may be some, or not.
        name = given if given in known else plain.get(without_wrappers([given])[0], given)
        if given == "":
            raise ValueError(
                "layers: '' is the whole model, which leaves nothing to share: train a model per "
                "task, or name the layers in it"
            )
        if name in model._parameters:
            raise ValueError(
                f"layers: {name!r} is a parameter of the model itself, in no layer: leave it out, "
                "or put it into a module"
            )
        if name not in known:
            close = get_close_matches(name, [other for other in known if other], 1, 0.0)
            hint = f": did you mean {close[0]!r}?" if close else ", which has none"
            raise ValueError(f"layers: there is no {name!r} in {type(model).__name__}{hint}")
        if next(known[name].parameters(), None) is None:
            raise ValueError(f"layers: {name!r} has no parameters that tasks could conflict in")
        if known[name] not in chosen.values():
            chosen[name] = known[name]
    return chosen


def _check_nesting(chosen: dict[str, nn.Module]) -> None:
    for outer, around in chosen.items():
        within = set(around.modules()) - {around}
        for inner, module in chosen.items():
            if module in within:
                raise ValueError(
                    f"layers: {inner!r} is in {outer!r}, with which it becomes task-specific "
                    "already: leave one of them out"
                )


class _Outside:
    """What tasks go on to share: all that is reached without passing through a chosen layer.

    Attributes:
        around: the modules that a chosen layer lies in, by their names. Each task gets its own,
            with the parameters and buffers of the first.
        shared: all other modules, by their names.
        tensors: the parameters and buffers of both, by their names.
    """

    def __init__(self, model: nn.Module, chosen: dict[str, nn.Module]) -> None:
        layers = set(chosen.values())
        self.around: dict[str, nn.Module] = {}
        self.shared: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        for path, module in _walk("", model, set(layers)):
            holds = not layers.isdisjoint(module.modules())
            (self.around if holds else self.shared)[path] = module
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tensors[_join(path, name)] = tensor

    def model_of_another_task(self, model: nn.Module) -> nn.Module:
        """The model once more, with nothing copied but the chosen layers and what is around."""
        kept = (*self.shared.values(), *self.tensors.values())
        another = copy.deepcopy(model, {id(value): value for value in kept})
        for path, module in self.around.items():
            own = another.get_submodule(path)
            # The dictionaries too: what `.to()` puts into one reaches all tasks.
            own._parameters, own._buffers = module._parameters, module._buffers
            own._non_persistent_buffers_set = module._non_persistent_buffers_set
        return another


def _walk(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """All modules by their names, except those seen before and what is in those alone."""
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, child in module.named_children():
            yield from _walk(_join(path, name), child, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_ties(chosen: dict[str, nn.Module], outside: _Outside) -> None:
    """Raises where a parameter would have to be shared and each task's own."""
    known = {id(tensor): name for name, tensor in outside.tensors.items()}
    for layer, module in chosen.items():
        for name, parameter in module.named_parameters():
            if id(parameter) in known:
                raise ValueError(
                    f"layers: {_join(layer, name)!r} is tied to {known[id(parameter)]!r}, which "
                    f"is outside of {layer!r}: name the layers of both, or neither, or untie them"
                )


def _check_references(chosen: dict[str, nn.Module], outside: _Outside) -> None:
    """Raises where a shared module would go past the choice, to what is the first task's."""
    shared = set(outside.shared.values())
    own = {id(module): name for name, module in outside.around.items()}
    for layer, module in chosen.items():
        own |= {id(part): layer for part in module.modules() if part not in shared}
    reached: dict[int, Any] = {id(tensor): tensor for tensor in outside.tensors.values()}
    for path, module in outside.shared.items():
        copy.deepcopy(module, reached)  # notes all that it meets
        if found := reached.keys() & own.keys():
            layer = min(own[key] for key in found) or "the model"
            raise ValueError(
                f"layers: {path!r} is to be shared and refers to {layer!r} by an attribute that is "
                "no submodule of it, so that all tasks would use the first one's: name it too, or "
                "take the reference away"
            )
