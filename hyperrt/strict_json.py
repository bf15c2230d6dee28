"""Reads JSON into frozen dataclasses and back, without undeclared or missing keys.

The dataclass is the schema.  Supported types: str, int, float, bool, Literal, `X | Y`, tuple[X, ...],
tuple[X, Y, Z], Mapping[str, X] and dataclasses of these.  A field with a default may be absent.  An error
names the place: `graphs.denoiser.inputs[2].shape[0] is true; it must be a whole number or a text`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from hyperrt.text import shortened

T = TypeVar("T")
SCALARS: Mapping[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class StrictError(ValueError):
    """The JSON does not fit the dataclass; the message names the place."""


def loads(text: bytes) -> Any:
    """Parse strict JSON: UTF-8, perhaps with a byte order mark, no duplicate keys, no NaN or Infinity.

    Raises:
        StrictError: it is not JSON.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except StrictError:
        raise
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, numbers of 5000 digits
        raise StrictError(f"it is not JSON: {error}"[:200]) from error


def read(kind: Callable[..., T], data: object, where: str = "") -> T:
    """`data`, from `loads`, as an instance of the dataclass `kind`.

    Raises:
        StrictError: a key is missing or unknown, a value has the wrong type, or `kind` itself refuses it.
    """
    if not isinstance(data, dict):
        _wrong(data, where, "an object")
    fields, hints = _schema(kind)
    for name in data.keys() - fields.keys():
        key, known = _join(where, shortened(name)), ", ".join(fields)
        raise StrictError(f"the key {key} is unknown; known are {known}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(where, name))
        elif field.default is dataclasses.MISSING:
            raise StrictError(f"the key {_join(where, name)} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise StrictError(f"{where + ': ' if where else ''}{error}") from error


def dump(value: object) -> Any:
    """The inverse of `read`, for `json.dumps`; fields equal to their defaults are left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: dump(item) for field, item in pairs if item is not None and item != field.default}
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [dump(item) for item in value]
    return value


def check_sha256(**hashes: str) -> None:
    """Refuse a hash that is not 64 lower-case hexadecimal digits; for the `__post_init__` of a dataclass.

    Raises:
        ValueError: naming the field.
    """
    for name, value in hashes.items():
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(f"{name} is {value[:20]!r}; it must be 64 hex digits")


@functools.cache
def _schema(kind: Any) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, Any]]:
    """Fields and types of a dataclass; cached: resolving types is slow and a manifest has many sites."""
    return {field.name: field for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)


def _value(hint: Any, data: object, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return _scalar(hint, data, where)
    if origin is typing.Literal:
        if data not in args or type(data) not in {type(arg) for arg in args}:
            _wrong(data, where, f"one of {', '.join(map(str, args))}")
        return data
    if origin in (typing.Union, types.UnionType):
        return _union([arg for arg in args if arg is not type(None)], data, where)
    if origin is tuple:
        return _tuple(args, data, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            _wrong(data, where, "an object")
        return {
            _scalar(str, key, f"a key of {where}"): _value(args[1], item, _join(where, shortened(key)))
            for key, item in data.items()
        }
    return read(hint, data, where)


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is float and type(data) is int and abs(data) < 2**53:
        return float(data)
    if type(data) is not hint or (hint is float and not math.isfinite(data)):
        _wrong(data, where, SCALARS[hint])
    if hint is str and not data.isprintable():
        _wrong(data, where, "a text without control characters")
    return data


def _union(kinds: list[Any], data: object, where: str) -> Any:
    for kind in kinds:
        if kind not in SCALARS or type(data) is kind:
            return _value(kind, data, where)
    return _wrong(data, where, " or ".join(SCALARS[kind] for kind in kinds))


def _tuple(args: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        _wrong(data, where, "a list")
    hints = [args[0]] * len(data) if args[-1] is Ellipsis else list(args)
    if len(data) != len(hints):
        raise StrictError(f"{where} has {len(data)} entries; it must have {len(hints)}")
    pairs = enumerate(zip(hints, data, strict=True))
    return tuple(_value(hint, item, f"{where}[{i}]") for i, (hint, item) in pairs)


def _wrong(data: object, where: str, expected: str) -> NoReturn:
    raise StrictError(f"{where or 'it'} is {shortened(json.dumps(data))}; it must be {expected}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise StrictError(f"the key {shortened(twice)} occurs twice")
    return unique


def _no_constant(text: str) -> NoReturn:
    raise StrictError(f"{text} is not a JSON number")
