"""Recon: layers by their conflicts, and a model in which each task has some layers of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from inspect import signature
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.records import check_count, percent, shortened
from gcond_kernels.storage.names import without_wrappers

COLUMNS = 80  # of a table at most


class SplitModel(nn.Module):
    """Hold a model for each task, which share everything but the layers each has for itself.

    `split_conflicting_layers` makes it. What is shared exists once, so that `.to()`, `train()`,
    `state_dict()` (with what is shared under each model's name, as torch does with tied weights),
    `copy.deepcopy`, `torch.save`, `torch.compile` and activation checkpointing work as with any
    model. `named_parameters()` gives shared ones once, by the name in the first model:
    "models.0.body.0.weight"; a layer of the second task is "models.1.body.2.weight".

    The modules that contain a split layer exist once per task too, with the same parameters and
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
        # A model that takes the task already, to choose its head for example, gets it as before.
        self._takes_task = "task" in signature(self.models[0].forward).parameters

    def for_task(self, task: str) -> nn.Module:
        """Return the model of one task: of the class, and with the names, that it was split from.

        Raises:
            KeyError: there is no such task.
        """
        if task not in self.tasks:
            raise KeyError(f"unknown task {task!r}: the tasks are {list(self.tasks)}")
        return self.models[self.tasks.index(task)]

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """Run the model of one task; a model that has an argument called task gets it too.

        Raises:
            TypeError: without a task.
            KeyError: there is no such task.
        """
        if task is None:
            raise TypeError(
                f"name the task whose layers run, model(..., task=...): one of {list(self.tasks)}"
            )
        if self._takes_task:
            kwargs["task"] = task
        return self.for_task(task)(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the tasks and layers, for print(model)."""
        return f"tasks={list(self.tasks)}, layers={list(self.layers)}"


def split_conflicting_layers(
    model: nn.Module, layers: Iterable[str], tasks: Iterable[str]
) -> SplitModel:
    """Return a copy of the model in which each task has some layers for itself.

    Recon (Shi et al. 2023, "Recon: Reducing Conflicting Gradients from the Root for Multi-Task
    Learning", arXiv 2302.11289): a model is trained for a while, the layers in which the gradients
    of tasks conflict most often become task-specific, once, and training starts over::

        worst = [row["layer"] for row in optimizer.recorder.layers(threshold=-0.02)[:25]]
        model = split_conflicting_layers(make_model(), worst, tasks)
        optimizer = GCondFused(torch.optim.AdamW(model.named_parameters()), tasks)
        ...
        optimizer.backward({t: loss(model(x, task=t), y[t]) for t, loss in losses.items()})

    Every task's layers start with the values of the given model: training starts over where that is
    a new one, as above, and continues where it is the trained one.

    Args:
        model: is not changed. Split it before it is compiled or wrapped (FSDP2,
            DistributedDataParallel), which keep references to the modules that they are given.
        layers: names as in `model.named_modules()`: those of parameters without their last part.
            With a layer everything in it becomes task-specific; a parameter of the model itself is
            in none, and stays shared. A module with several names may be given by any; it stays one
            module for all its uses, once per task.
        tasks: names, any strings; a mapping gives its keys.

    Returns:
        The new model: `model(*args, task=name, **kwargs)` runs one task's.

    Raises:
        TypeError: model is no module; layers or tasks are one string, or not of strings.
        ValueError: there are none of them, or a task is repeated; a layer is unknown, is the whole
            model, has no parameters, or is in another; a parameter of a layer is tied to one
            outside of them, as embeddings often are; a shared module refers to a layer, or to what
            contains it, by an attribute that is no submodule, and so would always use the first
            task's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    layers = list(dict.fromkeys(_checked_names("layers", layers)))
    tasks = _checked_names("tasks", tasks)
    if repeated := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ValueError(f"tasks: {repeated[0]!r} is there twice")
    first = copy.deepcopy(model)
    split = _Split(first, _selected(first, layers))
    split.check_ties()
    split.check_references()
    models = [first, *(split.model_of_another_task() for _ in tasks[1:])]
    return SplitModel(models, list(split.layers), tasks)


def conflict_table(recorder: Recorder, threshold: float = 0.0, most: int | None = None) -> str:
    """Return the layers by their number of conflicts, highest first, as text of 80 columns.

    A line per layer: rank, how often two tasks conflicted in it, how often two were compared, the
    share, and the name, without its middle where it is long. On a GPU this synchronizes with the
    device.

    Args:
        recorder: its `layers(threshold=threshold)` are shown.
        threshold: a pair with a cosine below it is a conflict. Recon (Shi et al. 2023, arXiv
            2302.11289) counts in this way, with a threshold of 0 or a little less.
        most: the largest number of layers, 1 or more; None for all.

    Raises:
        ValueError: `most` is out of its range.
    """
    if most is not None:
        check_count("most", most, 1)
    layers = recorder.layers(threshold=threshold)
    title = f"Conflicts by layer: pairs of tasks with a cosine below {threshold:g}"
    if not layers:
        return f"{title}\nno layer had a gradient of two tasks"
    numbers = [("rank", "conflicts", "compared", "share")]
    for rank, layer in enumerate(layers[:most], 1):
        counts = str(layer["conflicts"]), str(layer["compared"])
        numbers.append((str(rank), *counts, percent(layer["share"])))
    widths = [max(len(line[column]) for line in numbers) for column in range(4)]
    length = max(COLUMNS - sum(widths) - 2 * len(widths), 1)
    names = ["layer", *(shortened(layer["layer"], length) for layer in layers[:most])]
    lines = [
        "  ".join([*(text.rjust(width) for text, width in zip(line, widths, strict=True)), name])
        for line, name in zip(numbers, names, strict=True)
    ]
    if more := len(layers) - len(names) + 1:
        lines.append(f"and {more} more layer{'' if more == 1 else 's'}")
    return "\n".join([title, *lines])


def _checked_names(option: str, names: object) -> list[str]:
    """Check that names are strings, one or more, and return their list."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{option} must be a list of names, not {names!r}")
    checked = list(names)
    if others := [name for name in checked if not isinstance(name, str)]:
        raise TypeError(f"{option}: a name must be a string, not {others[0]!r}")
    if not checked:
        raise ValueError(f"{option} must have at least one name")
    return checked


def _selected(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers by these names; a module of two names by the first of them."""
    known = dict(model.named_modules(remove_duplicate=False))
    plain = dict(zip(without_wrappers(list(known)), known, strict=True))
    selected: dict[str, nn.Module] = {}
    for given in layers:
        # A recorder's names are without what wrappers add; the model's may have it.
        name = given if given in known else plain.get(without_wrappers([given])[0], given)
        if error := _error_in(name, model, known):
            raise ValueError(f"layers: {error}")
        if known[name] not in selected.values():
            selected[name] = known[name]
    for (outer, module), (inner, other) in permutations(selected.items(), 2):
        if other in set(module.modules()):
            raise ValueError(
                f"layers: {inner!r} is in {outer!r}, with which it becomes task-specific already: "
                "leave one of them out"
            )
    return selected


def _error_in(name: str, model: nn.Module, known: dict[str, nn.Module]) -> str | None:
    """Return what is wrong with a layer's name; None where nothing is."""
    if name == "":
        return (
            "'' is the whole model, which leaves nothing to share: train a model per task, or name "
            "the layers in it"
        )
    if name in model._parameters:
        return (
            f"{name!r} is a parameter of the model itself, in no layer: leave it out, or put it "
            "into a module"
        )
    if name not in known:
        close = get_close_matches(name, [other for other in known if other], 1, 0.0)
        hint = f": did you mean {close[0]!r}?" if close else ", which has none"
        return f"there is no {name!r} in {type(model).__name__}{hint}"
    if next(known[name].parameters(), None) is None:
        return f"{name!r} has no parameters that tasks could conflict in"
    return None


class _Split:
    """Find which modules and tensors are shared when some layers become task-specific."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.model, self.layers = model, layers  # of the first task
        self.containers: dict[str, nn.Module] = {}  # have such a layer: each task gets its own
        self.shared: dict[str, nn.Module] = {}  # all other modules
        self.tensors: dict[str, Tensor] = {}  # of containers and shared modules
        specific = set(layers.values())
        for path, module in _walk("", model, set(specific)):
            contains = not specific.isdisjoint(module.modules())
            (self.containers if contains else self.shared)[path] = module
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tensors[_join(path, name)] = tensor

    def model_of_another_task(self) -> nn.Module:
        """Return a model in which the layers and their containers alone are copied."""
        kept = (*self.shared.values(), *self.tensors.values())
        another = copy.deepcopy(self.model, {id(value): value for value in kept})
        for path, module in self.containers.items():
            own = another.get_submodule(path)
            # The dictionaries too: what `.to()` assigns in one holds for all tasks.
            own._parameters, own._buffers = module._parameters, module._buffers
            own._non_persistent_buffers_set = module._non_persistent_buffers_set
        return another

    def check_ties(self) -> None:
        """Check that no parameter would have to be both shared and task-specific."""
        known = {id(tensor): name for name, tensor in self.tensors.items()}
        for layer, module in self.layers.items():
            for name, parameter in module.named_parameters():
                if id(parameter) in known:
                    raise ValueError(
                        f"layers: {_join(layer, name)!r} is tied to {known[id(parameter)]!r}, "
                        f"which is outside of {layer!r}: name the layers of both, or neither, or "
                        "untie them"
                    )

    def check_references(self) -> None:
        """Check that no shared module refers to a module of the first task's own."""
        shared = set(self.shared.values())
        own = {id(module): name for name, module in self.containers.items()}
        for layer, module in self.layers.items():
            own |= {id(part): layer for part in module.modules() if part not in shared}
        reached: dict[int, Any] = {id(tensor): tensor for tensor in self.tensors.values()}
        for path, module in self.shared.items():
            copy.deepcopy(module, reached)  # adds all that it reaches
            if found := reached.keys() & own.keys():
                layer = min(own[key] for key in found) or "the model"
                raise ValueError(
                    f"layers: {path!r} is to be shared and refers to {layer!r} by an attribute "
                    "that is no submodule of it, so that all tasks would use the first one's: name "
                    "it too, or remove the reference"
                )


def _walk(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Return all modules by their names, except those seen before and what is in those alone."""
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, child in module.named_children():
            yield from _walk(_join(path, name), child, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
