"""The scaling rules as plain arithmetic: no torch, no models.

Symbols: N visits (applications of a layer in one forward), L unique layers, L_ref base layers (the depth at which the
base LR was tuned), λ the one free constant, m_L = L / L_ref the depth multiplier.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from looptransfer.checks import check_count, check_number, is_number
from looptransfer.errors import InputError

Rule = Literal["factored", "sqrt", "unscaled"]
Family = Literal["adamw", "adam", "sgd", "muon"]


def factored(visits: float, depth_multiplier: float, lam: float) -> float:
    """λ/(N·√m_L): tied visits add coherently, layers add as a random walk (arXiv 2606.18524, Theorem 3 and Table 1)."""
    return lam / (visits * math.sqrt(depth_multiplier))


def sqrt(visits: float, depth_multiplier: float, lam: float) -> float:
    """λ/√(N·m_L): the usual 1/√depth rule for untied layers (the paper's second arm; Depth-μP's branch multiplier)."""
    return lam / math.sqrt(visits * depth_multiplier)


def unscaled(visits: float, depth_multiplier: float, lam: float) -> float:
    """1, whatever N, L and λ: the standard parameterization, as a control (the paper's first arm)."""
    return 1.0


RULES: dict[Rule, Callable[[float, float, float], float]] = {"factored": factored, "sqrt": sqrt, "unscaled": unscaled}


def depth_multiplier(layers: int, base_layers: int) -> float:
    """m_L = L / L_ref (arXiv 2606.18524, Table 1).

    Raises:
        InputError: either count is not a whole number from 1 up.
    """
    check_count("layers", layers)
    check_count("base_layers", base_layers)
    return layers / base_layers


def residual_multiplier(rule: Rule, *, visits: float, layers: int, lam: float = 1.0, base_layers: int = 1) -> float:
    """The factor ε on a residual branch that is visited `visits` times in a model of `layers` unique layers.

    It is all that a stack needs which `parametrize` cannot rewrite: x = x + ε·f(x), with the LR factors of
    `param_groups`.

    `visits` may be a mean, where the loop count is random (our extension).
    `base_layers=1` writes the rule absolutely, λ/(N√L); `base_layers=12` relative to a model tuned with 12 layers.

    Raises:
        InputError: an unknown rule, a count below 1, or a λ that is not a positive finite number.
    """
    check_rule(rule)
    check_number("lam", lam)
    if not is_number(visits) or visits < 1:
        raise InputError(f"visits is {visits!r}; it must be a number from 1 up")
    return RULES[rule](visits, depth_multiplier(layers, base_layers), float(lam))


def check_rule(rule: str) -> None:
    """Refuse a rule that is not one of ours, by name."""
    if rule not in RULES:
        raise InputError(f"rule is {rule!r}; choose one of {', '.join(RULES)}")


@dataclass(frozen=True)
class DepthFactors:
    """The factors on the optimizer's settings for some parameters."""

    lr: float
    eps: float
    weight_decay: float


def depth_factors(rule: Rule, family: Family, layers: int, base_layers: int) -> DepthFactors:
    """Optimizer factors of the looped stack's parameters; everything outside the branches keeps 1.

    AdamW: LR and Adam eps × m_L^(−1/2), decoupled weight decay unchanged (arXiv 2606.18524, Table 1 and appendix).
    `sqrt` takes the same factors, because they depend on L alone; `unscaled` takes none.

    Adam, SGD and Muon are our extension. Muon's step has the size that its LR says, as Adam's has, and no eps that
    stands beside a gradient. A branch's gradient shrinks with ε, as m_L^(−1/2), so an L2 penalty that is added to
    the gradient shrinks with it; SGD's step carries that factor already, so its LR stays.
    """
    if rule == "unscaled":
        return DepthFactors(1.0, 1.0, 1.0)
    shrink = depth_multiplier(layers, base_layers) ** -0.5
    return {
        "adamw": DepthFactors(lr=shrink, eps=shrink, weight_decay=1.0),
        "adam": DepthFactors(lr=shrink, eps=shrink, weight_decay=shrink),
        "sgd": DepthFactors(lr=1.0, eps=1.0, weight_decay=shrink),
        "muon": DepthFactors(lr=shrink, eps=1.0, weight_decay=1.0),
    }[family]
