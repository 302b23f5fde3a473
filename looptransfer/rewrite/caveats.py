"""What a model does that the rule was not derived for. Each is shown in the plan and warned of once."""

from itertools import pairwise

import torch
from torch import nn

from looptransfer.rewrite.branches import Group, factors, gates
from looptransfer.rewrite.trace import ResidualAdd, Trace


def find_caveats(model: nn.Module, found: Trace, groups: list[Group], preserved: bool) -> tuple[str, ...]:
    """Sentences for the user, the gravest first. `preserved`: the rewrite leaves the function as it is."""
    checks = [_injection(found), _post_norm(found), _depth_scaling(found, groups), _cut_loops(found, groups)]
    checks += [_prelude(groups), None if preserved else _trained(model)]
    return tuple(caveat for caveat in checks if caveat)


def _injection(found: Trace) -> str | None:
    sources = list(dict.fromkeys(add.source for add in found.of("composite")))
    if not sources:
        return None
    return (
        f"streams left alone: what is added at {', '.join(sources)} is an input injection or a long skip and keeps "
        "factor 1, so its balance to the scaled branches changes with N"
    )


def _post_norm(found: Trace) -> str | None:
    """A sum that goes on only through something without matrices: the stream itself is normalised."""
    leaves = found.of("leaf")
    carried = {n for add in leaves for n in found.graph.same(add.stream)}
    carried |= {n for number in found.graph.outputs for n in found.graph.same(number)}
    normed = [add for add, later in pairwise(leaves) if _normed(found, add, later, carried)]
    if len(normed) <= len(leaves) // 2 - 1:  # more than a norm at the end of each loop
        return None
    return (
        f"post-norm: the sum at {normed[0].source} is normalised before it goes on, and the rule was derived for "
        "pre-norm. The 1/N for branch matrices was seen to hold there; the √L was not checked, and the gains of norms "
        "on the stream grow in effect with N (see on_stream)"
    )


def _normed(found: Trace, add: ResidualAdd, later: ResidualAdd, carried: set[int]) -> bool:
    if add.total in carried or not found.graph.precedes(add.total, later.stream):
        return False
    way = found.graph.way(add.total, later.stream)
    return not any(found.graph.nodes[n].parameters & found.matrices for n in way)


def _depth_scaling(found: Trace, groups: list[Group]) -> str | None:
    constants = [(group, [f for f in factors(group) if abs(f - 1) > 1e-6]) for group in groups]
    named = [f"{group.handle} × {f[0]:g}" for group, f in constants if f]
    learned = sorted(frozenset[str]().union(*(gates(found, group) for group in groups)))
    what = [f"a constant factor ({named[0]}, as residual_multiplier in some configurations)"] if named else []
    what += (
        [f"learned factors ({', '.join(learned[:4])}{', …' * (len(learned) > 4)}; LayerScale, ReZero)"]
        if learned
        else []
    )
    if not what:
        return None
    return (
        f"existing depth scaling: {' and '.join(what)} already on the branches. ε comes on top of it: if it was "
        "chosen for depth, set it to 1 first, or depth is counted twice"
    )


def _cut_loops(found: Trace, groups: list[Group]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    for group in groups:
        cut = [add for add in group.adds[1:] if not add.followed]
        if cut:
            return (
                f"loops cut by detach or no_grad: {len(cut)} of {len(group.adds)} visits at {group.adds[0].source} "
                "get no gradient from later ones (truncated backpropagation). N counts every visit of the forward; the "
                "rule was derived for gradients through all of them"
            )
    return None


def _prelude(groups: list[Group]) -> str | None:
    visits = {group.visits for group in groups}
    if len(visits) < 2:
        return None
    return (
        f"visits differ ({', '.join(map(str, sorted(visits)))}): layers outside the loop count in L with their own "
        "visits. That is our extension; the paper leaves models with prelude and coda open"
    )


def _trained(model: nn.Module) -> str | None:
    """Norm gains start out equal; where they differ, the model was trained."""
    for name, module in model.named_modules():
        gain = getattr(module, "weight", None)
        if "Norm" not in type(module).__name__ or not isinstance(gain, torch.Tensor) or gain.is_meta:
            continue
        if gain.ndim == 1 and gain.numel() > 1 and bool((gain != gain[0]).any()):
            return (
                f"the weights look trained ({name}.weight is not constant), and ε changes the model's function; "
                "preserve=True puts ε in without changing it"
            )
    return None
