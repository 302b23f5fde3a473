"""JSON, read strictly: what is given twice, is missing, unknown, of another type or not finite is a ValueError."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from looptransfer.checks import is_number
from looptransfer.text import short

T = TypeVar("T")


def parse_json(text: str) -> Any:
    """JSON values; a name twice in one object, and NaN and Infinity, are a ValueError."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=unique)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of pairs whose names all differ."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{short(max(names, key=names.count))} stands there twice")
    return dict(pairs)


def record_of(cls: type[T], data: Any, name: str = "") -> T:
    """A dataclass from JSON values, by the types of its fields; a field with a default may be missing."""
    values = value_of(dict[str, Any], data, name or cls.__name__)
    types = get_type_hints(cls)
    required = {field.name for field in fields(cls) if field.init and field.default is field.default_factory}  # type: ignore[arg-type]
    missing, unknown = required - values.keys(), values.keys() - types.keys()
    if missing or unknown:
        raise ValueError(f"{min(missing)} is missing" if missing else f"{short(min(unknown))} is unknown")
    return cls(**{key: value_of(types[key], value, key) for key, value in values.items()})


def value_of(kind: Any, data: Any, name: str) -> Any:
    """A JSON value as a type says: a dataclass, tuple[T, ...], Mapping, Optional or a plain type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if data is None else value_of(next(part for part in parts if part is not NoneType), data, name)
    if is_dataclass(kind):
        return record_of(kind, data, name)  # type: ignore[arg-type]
    if origin is tuple:
        return tuple(value_of(parts[0], value, name) for value in value_of(list, data, name))
    if origin in (dict, Mapping):
        return {key: value_of(parts[1], value, f"{name} {key}") for key, value in value_of(dict, data, name).items()}
    if kind is float and is_number(data):
        return float(data)
    if kind is float or (kind is not Any and (not isinstance(data, kind) or (kind is int and isinstance(data, bool)))):
        raise ValueError(f"{name} is {short(data)}, not a {'finite number' if kind is float else kind.__name__}")
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
