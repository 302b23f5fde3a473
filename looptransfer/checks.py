"""Numbers that a user gives, held to their range. A refusal names the value, the range and the fix."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from looptransfer.errors import InputError


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """A finite number strictly between two others; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value) and low < float(value) < high
    except OverflowError:  # a whole number that no float holds
        return False


def is_numeral(text: str, low: float = -math.inf, high: float = math.inf) -> bool:
    """The text of a finite number strictly between two others."""
    try:
        return is_number(float(text), low, high)
    except ValueError:
        return False


def is_count(value: Any, least: int = 1) -> bool:
    """A whole number from `least` up."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse what is no finite number strictly between `low` and `high`."""
    if not is_number(value, low, high):
        above = f"be a finite number above {low:g}" if high == math.inf else f"lie between {low:g} and {high:g}"
        raise InputError(f"{name} is {value!r}; it must {above}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number from `least` up."""
    if not is_count(value, least):
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least} up")


def counts_of(name: str, counts: Any, least: int = 0) -> list[int]:
    """Whole numbers from 1 up, such as loop counts, each once and `least` of them or more, in their order."""
    listed = list(counts) if isinstance(counts, Iterable) and not isinstance(counts, str) else [counts]
    if not all(map(is_count, listed)) or len(listed) < least or len(set(listed)) < len(listed):
        enough = f", {least} or more of them" if least > 1 else ""
        raise InputError(f"{name} is {counts!r}; give whole numbers from 1 up, each once{enough}, such as 1, 2, 4, 8")
    return listed


def seeds_of(seeds: int | Sequence[int], least: int = 2) -> list[int]:
    """Seeds from how many there are, or which: whole numbers from 0 up, each once and `least` of them or more."""
    listed = list(range(seeds)) if is_count(seeds, 0) else list(seeds) if isinstance(seeds, Iterable) else []  # type: ignore[arg-type]
    if len(listed) < least or len(set(listed)) < len(listed) or not all(is_count(seed, 0) for seed in listed):
        reason = ": one seed has no interval" if least > 1 else ""
        raise InputError(f"seeds is {seeds!r}; give {least} or more, each once, such as 3 or [0, 1, 2]{reason}")
    return listed
