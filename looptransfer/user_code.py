"""The boundary behind which the user's code runs: whatever it does there becomes one error with their file and line."""

import faulthandler
import functools
import inspect
import linecache
import multiprocessing
import multiprocessing.connection
import os
import site
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from looptransfer.errors import InputError, UserCodeError

PACKAGE = __name__.partition(".")[0]
LIBRARIES = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
LIBRARIES |= {*site.getsitepackages(), site.getusersitepackages()}
INSTALLED = ("<frozen", *(folder + os.sep for folder in LIBRARIES))  # how the names of files begin
WORKER = "looptransfer worker"  # the name of our worker processes
UNGUARDED = 97  # exit status of one that is asked to train while it imports the user's script
LONGEST = 500  # characters of somebody else's message


@contextmanager
def user_code(failure: str, *hooks: object, fix: str = "") -> Iterator[None]:
    """Make one error of all that a call of the user's code raises. An interrupt alone goes through.

    Args:
        failure: what the message begins with, such as "batches(0) fails".
        hooks: their functions; where no line of theirs raised, as with a wrong number of arguments, the definition of
            the first of them is named that is not ours or installed.
        fix: what the message ends with.

    Raises:
        UserCodeError: anything was raised, SystemExit and other BaseExceptions included.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserCodeError(f"{failure}: {described(error)}{line_of(error) or place(*hooks)}{fix}") from error


@contextmanager
def calls_back(failure: str, *hooks: object) -> Iterator[None]:
    """Make one error of what the user's code raises when our own calls it; what ours raises goes through.

    Args:
        failure: as for `user_code`.
        hooks: as for `user_code`; without any, an `InputError` that no line of theirs brought about stays as it is.

    Raises:
        UserCodeError: a line of theirs raised, or ours raised an `InputError`, to which their line is added.
    """
    try:
        yield
    except (KeyboardInterrupt, UserCodeError):
        raise
    except InputError as error:
        line = (error.__cause__ and line_of(error.__cause__)) or line_of(error) or place(*hooks)
        if not line:
            raise
        raise UserCodeError(f"{_on_one_line(str(error))}{line}") from error
    except BaseException as error:
        frames = [frame for frame, _ in _frames(error) if not _is_installed(frame)]
        if not frames or _is_ours(frames[-1]):
            raise
        raise UserCodeError(f"{failure}: {described(error)}{line_of(error)}") from error


@contextmanager
def directory_kept() -> Iterator[None]:
    """Give the working directory back as it was, where the user's code changes it."""
    before = None
    with suppress(OSError):  # it was removed
        before = os.getcwd()
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):
                os.chdir(before)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that comes about; a crash shows its line."""
    if sys.stderr is not None:
        faulthandler.enable(all_threads=False)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def refuse_unguarded() -> None:
    """End a worker process of ours that comes here while it imports the user's script, which then lacks a guard."""
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False) and process.name == WORKER:
        os._exit(UNGUARDED)


def described(error: BaseException) -> str:
    """An exception on one line."""
    try:
        text = _on_one_line(str(error))
    except BaseException:
        text = "(its message cannot be shown)"
    return f"{type(error).__name__}: {text}"


def line_of(error: BaseException) -> str:
    """The innermost line of the user's that an exception went through, in brackets."""
    for frame, number in reversed(_frames(error)):
        if not _is_installed(frame) and not _is_ours(frame):
            file = frame.f_code.co_filename
            text = _on_one_line(linecache.getline(file, number, frame.f_globals))
            return f" ({file}, line {number}{': ' * bool(text)}{text})"
    return ""


def place(*hooks: object) -> str:
    """File and line of the first of the functions that is the user's own, in brackets; empty if none is."""
    return next(filter(None, map(_definition, hooks)), "")


def qualified(function: object) -> str:
    """The name of a function, or of a callable object's class, within its module."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _definition(hook: object) -> str:
    if hook is None:
        return ""
    while isinstance(hook, functools.partial):
        hook = hook.func
    forward = getattr(type(hook), "forward", None)  # of a model
    target = hook if inspect.isroutine(hook) or inspect.isclass(hook) else forward or type(hook)
    try:
        target = inspect.unwrap(target)
        file, number = inspect.getsourcefile(target), inspect.getsourcelines(target)[1]
    except Exception:  # what has no source, or one that has changed
        return ""
    module = inspect.getmodule(target)
    in_package = module is not None and module.__name__.partition(".")[0] == PACKAGE
    return "" if file is None or in_package or file.startswith(INSTALLED) else f" ({file}, line {max(number, 1)})"


def _on_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def _is_installed(frame: FrameType) -> bool:
    return not _is_ours(frame) and frame.f_code.co_filename.startswith(INSTALLED)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE
