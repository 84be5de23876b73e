"""Operations as torch library operators, for graphs: `torch.ops.gcond_kernels.*`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from inspect import signature
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor

from gcond_kernels.ops.backends import Backend
from gcond_kernels.ops.contexts import operation
from gcond_kernels.ops.types import TaskGradients

F = TypeVar("F", bound=Callable[..., Any])

_library = torch.library.Library("gcond_kernels", "DEF")  # what it holds is unregistered with it
_LIST, _NUMBER = "list of tensors or None", "number or tensor"
_NAMES = {Sequence[Tensor | None]: _LIST, float | Tensor: _NUMBER}


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register an operation as a torch library operator, which traced calls go through.

    Eager calls do not: the dispatcher would cost more than the launch. A schema lists the fields of
    the argument objects, in the order of the operation's signature. A list of tensors or None is
    two arguments, the tensors and a flag for each place; a number or a tensor is two, the number
    and the tensor or None. For a result None the operator returns an empty vector. `fake` has the
    operation's parameters and returns its results without values.
    """

    def decorate(function: F) -> F:
        run, hints, accepted = operation(function), get_type_hints(function), signature(function)
        parameters = {name: _parameter_type(hints[name]) for name in accepted.parameters}
        first, *_ = parameters
        name = schema.partition("(")[0]
        _library.define(schema)
        flat_run = operation(_with_objects(function, parameters))
        _library.impl(name, flat_run, "CompositeExplicitAutograd")
        flat_fake = _with_objects(fake, parameters)
        torch.library.register_fake(f"gcond_kernels::{name}", flat_fake, lib=_library)
        registered = getattr(torch.ops.gcond_kernels, name)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if not is_traced(args[0] if args else options.get(first)):
                return run(*args, **options)
            given = accepted.bind(*args, **options)  # an unknown keyword is refused
            given.apply_defaults()
            pairs = zip(given.arguments.values(), parameters.values(), strict=True)
            results = registered(
                *[item for value, accepts in pairs for item in _apart(value, accepts)]
            )
            if results is None:
                return None
            return hints["return"](*[None if item.shape == (0,) else item for item in results])

        return cast(F, call)

    return decorate


def is_traced(first: Tensor | TaskGradients | None) -> bool:
    """Return whether a call with this first argument must show in a graph."""
    if torch.compiler.is_compiling():
        return True
    tensor = first.accumulators if isinstance(first, TaskGradients) else first
    return type(tensor) not in (Tensor, torch.nn.Parameter)  # fake tensors, for example


class _ParameterType(NamedTuple):
    """What a parameter takes: an argument object and its fields, or a value."""

    type: Any
    fields: tuple[tuple[str, _ParameterType], ...] = ()


def _parameter_type(hint: Any) -> _ParameterType:
    for member in (hint, *get_args(hint)):
        if hasattr(member, "_fields") or is_dataclass(member):
            fields = get_type_hints(member).items()
            return _ParameterType(
                member, tuple((name, _parameter_type(field)) for name, field in fields)
            )
    return _ParameterType(_NAMES.get(hint, "plain value"))  # torch.compile compares no types


def _apart(value: Any, accepts: _ParameterType) -> list[Any]:
    """Return the operator's arguments that make up one of the operation's."""
    if accepts.fields:
        arguments: list[Any] = []
        for name, field in accepts.fields:
            arguments += _apart(None if value is None else getattr(value, name), field)
        return arguments
    if accepts.type is _LIST:
        return [[item for item in value if item is not None], [item is not None for item in value]]
    if accepts.type is _NUMBER:
        return [1.0, value] if isinstance(value, Tensor) else [float(value), None]
    return [value.requested if isinstance(value, Backend) else value]


def _together(arguments: Iterator[Any], accepts: _ParameterType) -> Any:
    """Return one of the operation's arguments from the operator's."""
    if accepts.fields:
        values = {name: _together(arguments, field) for name, field in accepts.fields}
        return None if next(iter(values.values())) is None else accepts.type(**values)
    value = next(arguments)
    if accepts.type is _LIST:
        present = iter(value)
        return [next(present) if flag else None for flag in next(arguments)]
    if accepts.type is _NUMBER:
        tensor = next(arguments)
        return value if tensor is None else tensor
    return tuple(value) if isinstance(value, list) else value


def _with_objects(
    function: Callable[..., Any], parameters: dict[str, _ParameterType]
) -> Callable[..., tuple[Tensor, ...] | None]:
    """Return an operation as a function of the operator's arguments, and with its results."""

    def call(*flat: Any) -> tuple[Tensor, ...] | None:
        arguments = iter(flat)
        results = function(
            **{name: _together(arguments, accepts) for name, accepts in parameters.items()}
        )
        if results is None:
            return None
        return tuple([results[0].new_empty(0) if item is None else item for item in results])

    return call
