"""The scaling rules as plain arithmetic: no torch, no models.

Symbols: N visits (applications of a layer in one forward), L unique layers, L_ref base layers (the depth at which the
base LR was tuned), λ the one free constant, m_L = L / L_ref the depth multiplier.
"""

from dataclasses import dataclass
from typing import Literal

from looptransfer.checks import check_count, check_number, is_number
from looptransfer.errors import InputError

Rule = Literal["factored", "completep", "sqrt", "unscaled"]
Family = Literal["adamw", "adam", "sgd", "muon"]


@dataclass(frozen=True)
class Exponents:
    """How ε falls: ε = λ·N^(−visits)·m_L^(−layers)."""

    visits: float
    layers: float


RULES: dict[Rule, Exponents] = {
    # Tied visits add coherently, layers as a random walk (arXiv 2606.18524, Theorem 3 and Table 1).
    "factored": Exponents(visits=1.0, layers=0.5),
    # Tied visits as above, layers as CompleteP has them (arXiv 2505.01618, Table 1 with α = 1); together our extension.
    "completep": Exponents(visits=1.0, layers=1.0),
    # The usual 1/√depth for layers that are not tied (the paper's second arm; Depth-μP's branch multiplier).
    "sqrt": Exponents(visits=0.5, layers=0.5),
    # 1, whatever N, L and λ: the standard parameterization, as a control (the paper's first arm).
    "unscaled": Exponents(visits=0.0, layers=0.0),
}

# The finding of our sweeps over layers (reports/transfer/), for where a base LR is taken over layers.
OVER_LAYERS = "in our sweeps the best base LR rises with L under this rule, and stays under completep"


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
    `base_layers=1` writes the rule absolutely, λ/(N√L) for "factored"; `base_layers=12` relative to a model tuned with
    12 layers.

    Raises:
        InputError: an unknown rule, a count below 1, or a λ that is not a positive finite number.
    """
    check_rule(rule)
    check_number("lam", lam)
    if not is_number(visits) or visits < 1:
        raise InputError(f"visits is {visits!r}; it must be a number from 1 up")
    exponents, depth = RULES[rule], depth_multiplier(layers, base_layers)
    return 1.0 if rule == "unscaled" else float(lam) / (visits**exponents.visits * depth**exponents.layers)


def drifts_over_layers(rule: str) -> bool:
    """Whether `OVER_LAYERS` is about a rule: it has the paper's exponent for L. Tables may hold other rules."""
    return any(name == rule and exponents.layers == RULES["factored"].layers for name, exponents in RULES.items())


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
    """Optimizer factors of the looped stack's parameters; everything outside the branches keeps 1."""
    depth, exponents = depth_multiplier(layers, base_layers), depth_exponents(rule, family)
    return DepthFactors(depth**exponents.lr, depth**exponents.eps, depth**exponents.weight_decay)


def depth_exponents(rule: Rule, family: Family) -> DepthFactors:
    """The powers of m_L that `depth_factors` are.

    AdamW under `factored`: LR and Adam eps × m_L^(−1/2), decoupled weight decay unchanged (arXiv 2606.18524, Table 1
    and appendix); `sqrt` takes the same, because they depend on L alone. Under `completep` LR × 1, eps × m_L^(−1)
    (arXiv 2505.01618, Table 1). Both are one rule: a step of every layer is to move the output by ε·LR, and the steps
    of L layers add up to the same at every L. `unscaled` takes none.

    Adam, SGD and Muon are our extension. Muon's step has the size that its LR says, as Adam's has, and no eps that
    stands beside a gradient. A branch's gradient shrinks with ε, and so do the eps beside it and an L2 penalty that is
    added to it; SGD's step carries that factor already, so its LR has that much less to shrink by.
    """
    if rule == "unscaled":
        return DepthFactors(0.0, 0.0, 0.0)
    gradient = -RULES[rule].layers
    step = -1 - gradient
    return {
        "adamw": DepthFactors(lr=step, eps=gradient, weight_decay=0.0),
        "adam": DepthFactors(lr=step, eps=gradient, weight_decay=gradient),
        "sgd": DepthFactors(lr=step - gradient, eps=0.0, weight_decay=gradient),
        "muon": DepthFactors(lr=step, eps=0.0, weight_decay=0.0),
    }[family]
