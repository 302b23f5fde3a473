"""A mark that users set on a residual branch which no module of its own computes."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from looptransfer.errors import InputError

# The multiplier per mark of one module, the checkpoints around its forward, and whether the module itself was called: a
# mark belongs to the module whose call runs, and where none does to that whose method runs.
Scope = tuple[dict[str, Tensor], int, bool]

# Per thread. `scopes`: of the modules that hold marks and whose forward runs now, the innermost last. `observer`:
# during a trace, who is told of every mark.
_state = threading.local()


def residual(branch: Tensor, name: str = "branch") -> Tensor:
    """Mark `branch` as a residual branch, in your own forward: `x = x + looptransfer.residual(f(x))`.

    The identity until `parametrize` gives it a multiplier; needed only where no module hands the branch over. The mark
    belongs to the module whose forward runs it; two different branches in one forward need two names. A function inside
    a forward that activation checkpointing runs again cannot hold it: checkpoint the whole module.

    Args:
        branch: any shape.
        name: tells the marks of one forward apart.

    Raises:
        InputError: a checkpointed function inside the forward sets the mark.
    """
    observer = getattr(_state, "observer", None)
    if observer is not None:
        branch = branch.clone()  # what is marked is what is added, though the branch may go elsewhere too
        observer(branch, name)
    scopes: list[Scope] = list(getattr(_state, "scopes", ()))
    multipliers, outside, _ = scopes[-1] if scopes else ({}, 0, False)
    if name not in multipliers:
        return branch
    if not torch.compiler.is_compiling() and checkpoints() > outside:
        raise InputError(
            f"the mark {name!r} is set by a function that activation checkpointing runs again outside its module's "
            "forward, where its multiplier would be lost; checkpoint the whole module that sets the mark"
        )
    return branch * multipliers[name]


def checkpoints() -> int:
    """The number of activation checkpoints that are running."""
    frame: Any = sys._getframe(1)
    count = 0
    while frame is not None:
        count += frame.f_code.co_name == "checkpoint" and frame.f_code.co_filename.endswith("checkpoint.py")
        frame = frame.f_back
    return count


@contextmanager
def observed(observer: Callable[[Tensor, str], None]) -> Iterator[None]:
    """Tell `observer` of every mark that runs in this thread."""
    _state.observer = observer
    try:
        yield
    finally:
        _state.observer = None


def enter_scope(multipliers: dict[str, Tensor], called: bool = True) -> tuple[Scope, ...]:
    """The marks that run from now on are those of one module; returns the scopes to go back to."""
    before: tuple[Scope, ...] = getattr(_state, "scopes", ())
    _state.scopes = (*before, (multipliers, 0 if torch.compiler.is_compiling() else checkpoints(), called))
    return before


def is_called() -> bool:
    """The marks that run now are those of a module that was called."""
    scopes: tuple[Scope, ...] = getattr(_state, "scopes", ())
    return bool(scopes) and scopes[-1][2]


def leave_scope(before: tuple[Scope, ...]) -> None:
    """Undo `enter_scope`."""
    _state.scopes = before
