"""The identity of a function of the user's beside others of its name: its code, and the plain values it was made with.

Plain are numbers, text, None, containers of these, and objects of the user's own classes by what they hold. Of all
else, such as tensors, models and open files, the type counts alone: nothing here depends on a process, an address or an
order of hashes. What the function calls is not looked at.
"""

import argparse
import contextlib
import dis
import functools
import inspect
import json
import math
import numbers
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from looptransfer.transfer.provenance import fingerprint
from looptransfer.user_code import INSTALLED

MOST = 2000  # values of one function that are looked at
LONG = 10_000  # characters of a text that are looked at
NAMESPACES = (argparse.Namespace, SimpleNamespace)  # of the standard library, and hold what their maker put there


def module_of(thing: object) -> str:
    """Its module, by its file's stem where that is run as a script, as a worker process imports it."""
    name = getattr(thing, "__module__", type(thing).__module__)
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file).stem if name == "__main__" and file else str(name)


def code_of(function: Any) -> dict[str, str]:
    """A hash of the source of a function or of a callable object's class, or else of what it was compiled to."""
    function = _inner(function)
    routine = inspect.isroutine(function)
    code = _plain_function(function)
    text = None
    if code is None or not (code.__name__ == "<lambda>" or code.__code__.co_filename.startswith("<")):
        with contextlib.suppress(OSError, TypeError):  # a line holds several lambdas, and <stdin> is no file
            text = inspect.getsource(function if routine else type(function))
    if text is not None:
        return {"source": fingerprint({"text": text})}
    return {} if code is None else {"code": fingerprint({"code": _compiled(code.__code__)})}


def values_of(function: Any) -> dict[str, Any]:
    """The values that a function is bound to, or reads from its module, by name: numbers as they are, else hashes."""
    return _Reader().values(function)


class _Reader:
    """Describes values as JSON; the first of them, where there are very many."""

    def __init__(self) -> None:
        self.left = MOST
        self.inside: set[int] = set()  # what is being described: it may hold itself

    def values(self, function: Any) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name, value in _bound(function):
            if name not in named:  # a partial's argument goes before the default
                named[name] = self.described(value)
        return named

    def described(self, value: Any) -> Any:
        kind = type(value)
        self.left -= 1
        if value is None or kind is bool:
            return value
        if issubclass(kind, numbers.Integral):
            return int(value)
        if issubclass(kind, numbers.Real):
            return float(value) if math.isfinite(value) else repr(float(value))
        if issubclass(kind, (str, bytes)):  # it may be a secret
            return _hashed([kind.__name__, len(value), repr(value[:LONG])])
        if isinstance(value, (type, ModuleType)):
            return _name(value)
        if self.left < 0 or id(value) in self.inside:
            return _name(kind)
        self.inside.add(id(value))
        try:
            parts = self._parts(value, kind)
        finally:
            self.inside.remove(id(value))
        return _name(kind) if parts is None else _hashed([_name(kind), parts])

    def _parts(self, value: Any, kind: type) -> Any:
        """The parts of a value; None where its type alone counts."""
        if issubclass(kind, (FunctionType, MethodType, functools.partial)):
            function = _plain_function(value)
            users = function is not None and not _is_installed(function)
            return [code_of(value), self.values(value)] if users else _name(value)
        if issubclass(kind, dict):
            return sorted((json.dumps([self.described(k), self.described(v)]) for k, v in _first(value.items())))
        if issubclass(kind, (list, tuple)):
            return [self.described(item) for item in _first(value)]
        if issubclass(kind, (set, frozenset)):
            items = sorted(json.dumps(self.described(item)) for item in _first(value))
            return None if self.left < 0 else items  # which are the first depends on hashes
        if issubclass(kind, complex):
            return complex.__repr__(value)
        if kind in NAMESPACES or not (_is_installed(kind) or any(map(_is_of_library, kind.__mro__))):
            return self.described(_state(value))
        return None


def _bound(function: Any) -> Iterator[tuple[str, Any]]:
    """The values that a callable was made with, and those that it reads from its module, by name."""
    while isinstance(function, functools.partial):
        yield from function.keywords.items()
        yield from ((f"argument {number}", value) for number, value in enumerate(function.args))
        function = function.func
    owner = getattr(function, "__self__", function)
    if not isinstance(owner, (FunctionType, type, ModuleType)):
        yield from ((f"self.{name}", value) for name, value in _state(owner).items())
    plain = _plain_function(function)
    if plain is None:
        return
    code, defaults = plain.__code__, plain.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
    yield from (plain.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, plain.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is empty as yet
            yield name, cell.cell_contents
    for name in sorted(_read(code) & plain.__globals__.keys()):
        value = plain.__globals__[name]
        if not callable(value) and not isinstance(value, ModuleType):
            yield name, value


def _inner(function: Any) -> Any:
    """The function inside partials."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _plain_function(function: Any) -> FunctionType | None:
    """The function that runs where a callable is called, if it is written in Python."""
    function = _inner(function)
    if not isinstance(function, (FunctionType, MethodType)):
        function = inspect.getattr_static(type(function), "__call__", None)
    function = getattr(function, "__func__", function)
    return function if isinstance(function, FunctionType) else None


def _state(thing: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots too."""
    with contextlib.suppress(Exception):
        state = object.__getstate__(thing)
        parts = state if isinstance(state, tuple) else (state,)
        return {name: value for part in parts if part for name, value in part.items()}
    return {}


def _read(code: CodeType) -> set[str]:
    """The names that code, and what is defined in it, reads from its module."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*map(_read, inner))


def _compiled(code: CodeType) -> list[Any]:
    consts = [_compiled(c) if isinstance(c, CodeType) else _Reader().described(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, consts]


def _first(items: Iterable[Any]) -> Iterator[Any]:
    return islice(items, MOST)


def _hashed(description: Any) -> str:
    return fingerprint({"": description})


def _name(thing: Any) -> str:
    return f"{module_of(thing)}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _is_installed(thing: Any) -> bool:
    """A class or a function is Python's or a library's."""
    return _is_of_python(thing) or _is_of_library(thing)


def _is_of_python(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] in sys.stdlib_module_names


def _is_of_library(thing: Any) -> bool:
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return not _is_of_python(thing) and str(file).startswith(INSTALLED)
