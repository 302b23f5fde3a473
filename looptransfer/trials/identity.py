"""Comparison of an experiment with the one of a ledger: by what it declares, and by the start of a training."""

import math
from collections.abc import Mapping
from typing import Any

from looptransfer.errors import InputError

ENVIRONMENT = ("torch", "looptransfer", "machine")  # may differ where a training starts the same
BOUND = "value"  # in the identity of a function: the values that it is bound to, by name
NOISE = 1e-4  # relative, of numbers that other machines and devices round otherwise


def check_identity(shown: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Compare what the experiment of a ledger says of itself with what this one says; return what is worth telling.

    Raises:
        InputError: they differ in more than versions and machine.
    """
    stored, given = _flat(stored), _flat(given)
    differing = sorted(key for key in stored.keys() | given.keys() if stored.get(key) != given.get(key))
    remarks = [f"{key} {stored.get(key)} there, {given.get(key)} here" for key in differing if key in ENVIRONMENT]
    refused = [key for key in differing if key not in ENVIRONMENT]
    bound = any(key.startswith(f"{BOUND} ") for key in refused)
    _refuse(
        shown,
        [f"{key}: {stored.get(key)!r} there, {given.get(key)!r} here" for key in refused],
        ", or name the state of the function where that value does not matter: lt.Function(train, version=…)" * bound,
    )
    return remarks


def check_probe(shown: str, moment: str, stored: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """Compare two probes of one start, as `Start.probe` has them; return what is worth telling.

    Args:
        shown: the ledger.
        moment: the start, such as "N = 2".
        stored, measured: the probes.

    Raises:
        InputError: they differ by more than rounding.
    """
    noise, refused = [], []
    for name in sorted(stored.keys() & measured.keys()):
        old, new = stored[name], measured[name]
        numbers = isinstance(old, float) and isinstance(new, float)
        if old == new or (numbers and math.isnan(old) and math.isnan(new)):
            continue
        if numbers and math.isclose(old, new, rel_tol=NOISE):
            noise.append(f"{name} at {moment} by {abs(old / new - 1):.1g}")
        else:
            values = f": {old:.6g} there, {new:.6g} here" if numbers else ""
            refused.append(f"{name} at {moment}{values}")
    _refuse(shown, refused)
    return noise


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity with the entries of its mappings by their own names."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        entries = {f"{key} {name}": entry for name, entry in value.items()} if isinstance(value, Mapping) else None
        flat |= {key: value} if entries is None else entries
    return flat


def _refuse(shown: str, differing: list[str], other_fix: str = "") -> None:
    if differing:
        raise InputError(
            f"the ledger {shown} holds another experiment ({', '.join(differing)}); choose another ledger or remove "
            f"this one{other_fix}"
        )
