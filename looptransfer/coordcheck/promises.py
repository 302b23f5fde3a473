"""Promises of a rule on every statistic, as exponents of N, L or width: plain data, no torch.

With ε ∝ N^−α (α = 1 factored and completep, ½ sqrt, 0 unscaled), a branch adds N^−α at each of its N visits. Visits of
tied weights point the same way at best and walk at random at worst, so that their sum grows as N^(½−α) to N^(1−α)
(arXiv 2606.18524, Theorem 1); an Adam-like step changes the output alike (Theorem 2). Over L with ε ∝ L^−½ and
LR ∝ L^−½ both stay bounded (Theorem 3 and the section on many layers), as with ε ∝ L^−1 and one LR (arXiv 2505.01618).
"""

from dataclasses import dataclass
from typing import Literal

from looptransfer.rules import RULES, Rule, depth_exponents

Axis = Literal["loops", "layers", "width"]
Where = Literal["looped", "once", "final", "output", "attention", "branches", "outside", "on stream"]
Together = Literal["all branches"]  # one value: root mean square over the branches
Moment = Literal["init", "one", "end"]  # before training, after one step, after the last
Which = Literal["first", "all", "last"]  # visit; all: root mean square over the visits


@dataclass(frozen=True)
class Promise:
    """The exponent of one statistic lies between `low` and `high`."""

    axis: Axis
    statistic: str
    where: Where | Together
    moment: Moment
    which: Which
    low: float
    high: float


def promises(rule: Rule, adam: bool, width_scaled: bool = False) -> list[Promise]:
    """All that `rule` promises.

    What has no theory under a rule is left out: gradients under the controls, whose stream grows, for one.

    Args:
        rule: a scaling rule.
        adam: the optimizer is Adam or AdamW, whose step does not depend on the gradient's size.
        width_scaled: `mup.set_base_shapes` was called; without μP nothing is promised over width.
    """
    alpha = RULES[rule].visits
    low, high = 0.5 - alpha, 1.0 - alpha
    promised = [
        Promise("loops", "branch_rms", "looped", "init", "first", -alpha, -alpha),
        Promise("loops", "branch_rms", "looped", "init", "all", -alpha - (1 - alpha) / 2, -alpha + (1 - alpha) / 2),
        Promise("loops", "branch_rms", "once", "init", "all", 0, 0),
        Promise("loops", "added_rms", "looped", "init", "last", low, high),
        Promise("loops", "stream_rms", "final", "init", "last", min(0, low), high),
        Promise("loops", "stream_rms", "final", "end", "last", min(0, low), high),
        Promise("loops", "change_since_step", "final", "one", "last", low, high),
        Promise("loops", "change_since_init", "final", "end", "last", min(0, low), high),
        Promise("loops", "update_rms", "outside", "one", "all", 0, 0),
    ]
    if alpha == 1:
        promised += [
            Promise("loops", "output_rms", "output", "init", "all", 0, 0),
            Promise("loops", "change_since_step", "output", "one", "all", low, high),
            Promise("loops", "change_since_init", "output", "end", "all", low, high),
            Promise("loops", "attention_logit_rms", "attention", "init", "last", 0, 0),
            Promise("loops", "gradient_rms", "branches", "one", "all", low, high),
            Promise("loops", "gradient_rms", "outside", "one", "all", 0, 0),
        ]
    promised.append(Promise("loops", "update_rms", "branches", "one", "all", 0 if adam else low, 0))
    if adam:  # LR/n, as `param_groups` makes it (our extension)
        promised.append(Promise("loops", "update_rms", "on stream", "one", "all", -1, -1))
    if width_scaled:  # activations keep their size and change by as much at every width (arXiv 2203.03466)
        promised += [
            Promise("width", "stream_rms", "final", "init", "last", -0.5, 0),
            Promise("width", "change_since_step", "final", "one", "last", -0.5, 0),
        ]
    return promised + _over_layers(rule, adam)


def _over_layers(rule: Rule, adam: bool) -> list[Promise]:
    fall, lr = 0.0 - RULES[rule].layers, depth_exponents(rule, "adamw").lr
    promised = [Promise("layers", "multiplier", "looped", "init", "all", fall, fall)]
    if rule == "unscaled":
        return promised
    promised += [
        Promise("layers", "stream_rms", "final", "init", "last", fall, 0),
        Promise("layers", "change_since_step", "final", "one", "last", -0.5, 0),
        Promise("layers", "update_rms", "outside", "one", "all", 0, 0),
    ]
    return [*promised, Promise("layers", "update_rms", "all branches", "one", "all", lr, lr)] if adam else promised
