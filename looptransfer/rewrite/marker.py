"""A mark that users set on a residual branch which no module of its own computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from looptransfer.errors import InputError

# Of the modules whose forward runs now and holds marks: multiplier per mark. The innermost is the last.
scopes: list[dict[str, float]] = []
# During a trace: who is told of every mark.
_observers: list[Callable[[Tensor, str], None]] = []
# Multipliers exist somewhere in this process, so a mark that runs outside every scope may have lost its own.
_in_use: list[bool] = []


def residual(branch: Tensor, name: str = "branch") -> Tensor:
    """Mark `branch` as a residual branch, in your own forward: `x = x + looptransfer.residual(f(x))`.

    The identity until `parametrize` gives it a multiplier; needed only where no module hands the branch over. The mark
    belongs to the module whose forward runs it; two different branches in one forward need two names.

    Args:
        branch: any shape.
        name: tells the marks of one forward apart.

    Raises:
        InputError: run by activation checkpointing outside the module that it belongs to, where its multiplier is lost.
    """
    if _observers:
        _observers[-1](branch, name)
    if scopes:
        multiplier = scopes[-1].get(name)
        return branch if multiplier is None else branch * multiplier
    if _in_use and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise InputError(
            f"the mark {name!r} is recomputed in the backward pass outside its module's forward, so its multiplier is "
            "lost; checkpoint the whole module that sets the mark, not a function inside its forward"
        )
    return branch


def in_use() -> None:
    """Note that some mark in this process has a multiplier."""
    if not _in_use:
        _in_use.append(True)


@contextmanager
def observed(observer: Callable[[Tensor, str], None]) -> Iterator[None]:
    """Tell `observer` of every mark that runs."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()
