"""Checks arguments of configs and public functions: their types by the annotations, ranges and choices.

None stands for the default if there is one. NumPy's numbers, and arrays without axes, become Python's. A bool
is not a number, and a float is not an integer. An error names the given type and the annotated one. Sequences
and callables are checked by the function itself.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from hyperrt.errors import UsageError
from hyperrt.text import short_repr

P = ParamSpec("P")
T = TypeVar("T")
SCALARS = (bool, int, float, str)
UNCHECKED = (Sequence, Iterable, Callable)  # the function itself checks their items or arguments
_REQUIRED = inspect.Parameter.empty


class _Unfit(Exception):
    """The value is not of the annotated type."""


@dataclasses.dataclass(frozen=True, eq=False)  # subclasses choose how they are compared
class Checked:
    """Base of a dataclass that converts its fields to the annotated types.

    Raises:
        UsageError: a value has another type.
    """

    def __post_init__(self) -> None:
        owner: Any = type(self)
        hints = _hints(owner)
        for field in dataclasses.fields(self):
            default = _REQUIRED if field.default is dataclasses.MISSING else field.default
            value = taken(field.name, getattr(self, field.name), hints[field.name], default)
            object.__setattr__(self, field.name, value)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: converts arguments to the annotated types, or raises UsageError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        hints, bound = _hints(function), signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = taken(name, value, hints[name], signature.parameters[name].default)
        return function(*bound.args, **bound.kwargs)

    return call


def taken(name: str, value: object, hint: Any, default: object = _REQUIRED) -> Any:
    """The value, converted to the annotated type; the default for None.

    Args:
        name: of the argument, for the message.
        hint: the annotation, resolved.
        default: the argument's, if it has one.

    Raises:
        UsageError: it has another type.
    """
    if value is None and default is not _REQUIRED:
        return default
    try:
        return _converted(hint, value)
    except _Unfit:
        raise UsageError(
            f"{name.replace('_', ' ')} is {short_repr(value)}",
            f"its type is {type(value).__name__}; it must be {_in_words(hint)}",
            "correct it" if default is _REQUIRED else "correct it, or leave it out for the default",
        ) from None


def in_range(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse a number outside the range; None is not checked.

    Raises:
        UsageError: naming the value and the range.
    """
    if value is not None and not low <= value <= high:  # NaN is in no range
        raise UsageError(f"{name} is {short_repr(value)}", f"it must be from {low} to {high}")


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not among the choices.

    Raises:
        UsageError: naming the value and the choices.
    """
    if value not in (choices := tuple(choices)):
        raise UsageError(f"{name} is {short_repr(value)}", f"it must be one of {', '.join(choices)}")


def not_empty(name: str, *paths: str | None) -> None:
    """Refuse an empty path; None is not checked.

    Raises:
        UsageError: a path is "".
    """
    if "" in paths:
        why = "an empty name would mean the current folder"
        raise UsageError(f"{name} is an empty name", why, "name a file or a folder")


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _converted(hint: Any, value: object) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first(args, value)
    if hint in SCALARS:
        return _scalar(hint, value)
    if origin is tuple and args[-1] is Ellipsis:
        if not isinstance(value, (tuple, list)):
            raise _Unfit
        return tuple(_converted(args[0], item) for item in value)
    kind = origin or hint
    if not isinstance(kind, type) or kind in UNCHECKED:
        return value
    if not isinstance(value, kind):
        raise _Unfit
    return _mapping(args, value) if kind is Mapping and args else value


def _first(hints: tuple[Any, ...], value: object) -> Any:
    for hint in hints:
        try:
            return _converted(hint, value)
        except _Unfit:
            continue
    raise _Unfit


def _mapping(hints: tuple[Any, ...], value: Any) -> Any:
    """The mapping, with keys and scalar values checked; other values may be on a GPU."""
    for key in value:
        _converted(hints[0], key)
    return {key: _converted(hints[1], value[key]) for key in value} if hints[1] in SCALARS else value


def _scalar(kind: type, value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # NumPy's, or a tensor's
        value = value.item()
    is_bool = isinstance(value, bool)
    if kind is bool and is_bool:
        return value
    if kind is str and isinstance(value, str):
        return str.__str__(value)  # not of a subclass
    if kind is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    if kind is float and isinstance(value, numbers.Real) and not is_bool:
        try:
            return float(value)
        except OverflowError:
            return float("inf")  # which is out of every range
    raise _Unfit


def _in_words(hint: Any) -> str:
    """The annotation in words: "int or None"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, args))
    if origin is tuple:
        return f"a tuple of {_in_words(args[0])}"
    return "None" if hint is type(None) else str(getattr(origin or hint, "__name__", hint))
