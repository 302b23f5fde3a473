"""Targets on the command line: path/to/file.py:NAME or package.module:NAME."""

import contextlib
import functools
import importlib
import inspect
import os
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from looptransfer.errors import InputError
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.function import Function, is_trainable
from looptransfer.trials.run import Trainable
from looptransfer.user_code import user_code


def load_experiment(target: str) -> Experiment:
    """The experiment that `target` names; NAME is `experiment` where it is left out.

    Raises:
        InputError: as `load_target`, or the name stands for something else.
    """
    experiment = load_target(target, Experiment, "experiment", default="experiment")
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"{target} gives a {type(experiment).__name__}; it must be a looptransfer.Experiment, or a function of no "
            "arguments that returns one"
        )
    return experiment


def load_trainable(target: str) -> Trainable:
    """The experiment that `target` names, or the training function; NAME is `experiment` where it is left out.

    A function that cannot be called without an argument is a training function, train(run).

    Raises:
        InputError: as `load_experiment`.
    """
    named = _named(target, "experiment", default="experiment")
    if is_trainable(named):
        return named
    return Function(named) if _takes_a_run(named) else load_experiment(target)


def _takes_a_run(named: Any) -> bool:
    if not callable(named) or inspect.isclass(named):
        return False
    try:
        signature = inspect.signature(named)
    except (TypeError, ValueError):
        return False
    with contextlib.suppress(TypeError):
        signature.bind()
        return False
    return True


def load_target(target: str, kind: type, noun: str, default: str = "") -> Any:
    """The object that `target` names: a `kind` as it stands, anything else is called and its result returned.

    A file is imported by its stem. Its folder, or for a package.module the working directory, stays first on sys.path,
    as it does with `python file.py`: worker processes inherit the path and find the module there.

    Args:
        target: path/to/file.py:NAME or package.module:NAME; NAME may have dots.
        kind: what is not called.
        noun: what an error calls it.
        default: NAME where the target has none.

    Raises:
        InputError: there is no such file, module or name, its stem cannot be imported, or it raises.
    """
    value = _named(target, noun, default)
    if isinstance(value, kind):
        return value
    if not callable(value):
        raise InputError(f"{target} is of type {type(value).__name__}; name a factory that takes no arguments")
    with user_code(f"{target}() fails", value, fix="; name a factory that takes no arguments"):
        return value()


def _named(target: str, noun: str, default: str) -> Any:
    """The object that a target names, as it stands."""
    home, name = _split(target, default)
    if not home or not name:
        option = noun.upper()
        raise InputError(
            f"{target!r} names no {noun}; write PACKAGE.MODULE:{option}, such as looptransfer:LoopedDecoder, or "
            f"path/to/file.py:{option}"
        )
    module = _from_file(home) if home.endswith(".py") else _from_package(target, home)
    with user_code(f"cannot import {target}", fix=f"; give a name that is in it: {home}:{_names_in(module)}"):
        return functools.reduce(getattr, name.split("."), module)


def _names_in(module: ModuleType) -> str:
    """The names of the functions, classes and experiments that a module makes itself."""
    made = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Experiment)
        or (isinstance(value, (type, FunctionType)) and value.__module__ == module.__name__)
    ]
    return " or ".join(name for name in made if not name.startswith("_")) or "NAME"


def _split(target: str, default: str) -> tuple[str, str]:
    if target.endswith(".py") or ":" not in target:
        return target, default
    home, _, name = target.rpartition(":")
    return home, name


def _from_package(target: str, name: str) -> ModuleType:
    _put_first(os.getcwd())  # as `python -m` does
    with user_code(f"cannot import {target}", fix=f"; run the command where `import {name}` works"):
        return importlib.import_module(name)


def _from_file(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"there is no file {file}; write path/to/file.py:NAME or package.module:NAME")
    _check_stem(path)
    _put_first(str(path.parent))
    with user_code(f"cannot load {file}", fix="; correct the file"):
        module = importlib.import_module(path.stem)
    if not _is(module, path):
        raise InputError(f"{file} is hidden by {module.__file__}, which has the same name; rename one of them")
    return module


def _check_stem(path: Path) -> None:
    """Refuse a file that cannot be imported by its stem, here or in a worker process."""
    stem = path.stem
    if not stem.isidentifier():
        raise InputError(f"{path.name} cannot be imported: {stem!r} is no Python name; use letters, digits and _ only")
    other = sys.modules.get(stem)
    if stem in sys.stdlib_module_names or (other is not None and not _is(other, path)):
        raise InputError(f"{path.name} has the name of another module, {stem}; rename the file")


def _is(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


def _put_first(folder: str) -> None:
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
