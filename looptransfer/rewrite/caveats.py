"""The things a model does that the rule was not derived for. Each is shown in the plan and warned of once."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from looptransfer.rewrite.analysis import Analysis, fullest
from looptransfer.rewrite.branches import DECLARED, Group, is_added, live_marks, nested, scaled
from looptransfer.rewrite.ends import depth_constants, gates
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.plan import Branch, ScalingPlan
from looptransfer.rewrite.trace import ResidualAdd, Trace
from looptransfer.text import few

DIFFER = "visits differ"
VARIES = (
    "visits vary: in other forwards (with other weights and random numbers, or later ones) the branches were visited "
    "another number of times (a random loop count, a counter, adaptive halting, layer dropout). N is the largest that "
    "was seen; give the mean, loops=…"
)


def other_in_training(visits: Sequence[str]) -> str:
    """The sentence for a plan that was made in eval mode; `visits`: of the branches, there and here."""
    return (
        f"other visits in training: the model is in eval mode, and in training mode it visits {few(visits)} times. N "
        "is that of eval mode; for that of training call model.train() first, and give the mean, loops=…, of a count "
        "that is drawn there"
    )


def find_caveats(model: nn.Module, draws: Sequence[Analysis], plan: ScalingPlan, preserved: bool) -> tuple[str, ...]:
    """Sentences for the user, the gravest first.

    `draws`: as `make_plan` takes them. `preserved`: the rewrite leaves the function as it is.
    """
    analysis, branches = fullest(draws), plan.branches
    forward, groups = analysis.trace, analysis.groups
    checks = [
        _unused(model, forward, groups),
        _not_added(forward, groups),
        _nested(forward, groups),
        None if plan.declared else _marks_left_alone(forward, groups),
        _injection(analysis),
        _gated(analysis),
        _shared(analysis.shared),
        _fixed(forward, groups),
        _post_norm(forward),
        _end_norm(forward, groups),
        _depth_scaling(forward, groups),
        _cut_loops(model, forward, groups),
    ]
    checks += [
        _prelude(branches),
        _frozen(model, branches),
        _left_frozen(forward),
        None if preserved else _trained(model),
        None if plan.random_loops or all(draw.visits == draws[0].visits for draw in draws) else VARIES,
        _unnamed(analysis) if plan.declared else None,
        _unscaled(analysis.rest.matrices),
    ]
    return tuple(caveat for caveat in checks if caveat)


def _unused(model: nn.Module, forward: Trace, groups: list[Group]) -> str | None:
    inside = tuple(group.handle.module + "." for group in groups if group.handle.mark is None)
    wide = [name for name, parameter in named_parameters(model).items() if parameter.ndim >= 2]
    idle = [name for name in wide if name not in forward.graph.touched and not name.startswith(inside)]
    if not idle:
        return None
    return (
        f"never used in the traced forward: {few(idle)}. Branches that it passed by "
        "get no multiplier and do not count in L; if layers are dropped at random in training, call model.eval() first"
    )


def _not_added(forward: Trace, groups: list[Group]) -> str | None:
    """The sentence on what the user names and nothing adds as it is."""
    nodes = forward.graph.nodes
    named = {add.total: group for group in groups for add in group.adds if add.site.source == DECLARED}
    inert = {str(group.handle) for n, group in named.items() if nodes[n].data and not is_added(forward.graph, n)}
    if not inert:
        return None
    return (
        f"not what is added: {few(sorted(inert))} goes through an activation, a norm or a bias before it is added to "
        "anything, or is only a factor, so ε there does not multiply a branch; mark or name what is added itself"
    )


def _nested(forward: Trace, groups: list[Group]) -> str | None:
    pairs = [f"{inner.handle} in {outer.handle}" for inner, outer in nested(forward.graph, groups)]
    if not pairs:
        return None
    return (
        f"branches inside branches: {few(pairs)} goes on only as a part of that. Unless it is a stream of its own, ε "
        "counts twice there; then mark or name one of them"
    )


def _marks_left_alone(forward: Trace, groups: list[Group]) -> str | None:
    scaled = {group.handle for group in groups}
    idle = [str(handle) for handle in live_marks(forward) if handle not in scaled]
    if not idle:
        return None
    return (
        f"marks left alone: {few(idle)} lie inside branches that are scaled as a whole, where ε would count twice, or "
        "on a stream that is handed on"
    )


def _injection(analysis: Analysis) -> str | None:
    composites = [add.site.source for add in analysis.trace.of("composite")]
    others = [analysis.trace.graph.line(n) for n in analysis.rest.injections]
    sources = list(dict.fromkeys([*composites, *others]))
    if not sources:
        return None
    return (
        f"streams left alone: what is added at {', '.join(sources)} is an input injection or a long skip and keeps "
        "factor 1, so its balance to the scaled branches changes with N"
    )


def _gated(analysis: Analysis) -> str | None:
    if not analysis.rest.gates:
        return None
    lines = list(dict.fromkeys(analysis.trace.graph.line(n) for n in analysis.rest.gates))
    where = ", ".join(lines)
    return f"gated stream: at {where} the stream is multiplied by what learned matrices made, which no ε controls"


def _shared(names: tuple[str, ...]) -> str | None:
    if not names:
        return None
    return (
        f"shared in part: {few(names)} act in branches that have most of their "
        "weights to themselves (a projection, a router or a block that layers share). Such branches do not point the "
        "same way, and each counts its own visits"
    )


def _fixed(forward: Trace, groups: list[Group]) -> str | None:
    taken = scaled(forward, groups)
    sources = list(dict.fromkeys(add.site.source for add in forward.of("fixed") if add not in taken))
    if not sources:
        return None
    return (
        f"branches without a learned matrix: what is added at {', '.join(sources)} (a Fourier transform, a pooling) "
        "keeps factor 1 and grows with N; to scale it too, mark it, looptransfer.residual(…, 'name'), or name all "
        "branches, branches=[…]"
    )


def _post_norm(forward: Trace) -> str | None:
    """A sum that goes on only through something without matrices: the stream itself is normalised."""
    leaves = forward.of("leaf")
    carried = set[int]()
    for number in [*(add.stream for add in leaves), *forward.graph.outputs]:
        forward.origin(number, carried)
    normed = [add for n, add in enumerate(leaves) if _normed(forward, add, leaves[n + 1 : n + 9], carried)]
    if not normed:
        return None
    if len(normed) < len(leaves) // 2:
        return _loop_norm(normed)
    return (
        f"post-norm: the sum at {normed[0].site.source} is normalised before it goes on, and the rule was derived for "
        "pre-norm. The 1/N for branch matrices was seen to hold there; what it has for L was not checked, and the "
        "gains of norms on the stream grow in effect with N (see on_stream)"
    )


def _loop_norm(normed: Sequence[ResidualAdd]) -> str | None:
    """A norm on the stream at the end of each loop, as `benchmarks/families.py` has it."""
    repeated = [source for source, times in Counter(add.site.source for add in normed).items() if times > 1]
    if not repeated:
        return None
    return (
        f"norm in the loop: the sum at {repeated[0]} is normalised before the next loop, and the rule was derived for "
        "streams that are not. In a small model of that kind the best LR rose by 0.3 octave per doubling of N; check "
        "yours over N before you carry an LR far"
    )


def _normed(forward: Trace, add: ResidualAdd, later: list[ResidualAdd], carried: set[int]) -> bool:
    following = next((then for then in later if forward.graph.precedes(add.total, then.stream)), None)
    if add.total in carried or following is None:
        return False
    path = forward.graph.between(add.total, following.stream)
    return any(forward.graph.nodes[n].op.relation == "norm" for n in path) and not forward.graph.matrices_on(path)


def _end_norm(forward: Trace, groups: list[Group]) -> str | None:
    """A norm after the last matrices of a branch, as `benchmarks/families.py` has it."""
    ended = [group.handle for group in groups if any(_ends_in_norm(forward, add) for add in group.adds)]
    if not ended:
        return None
    return (
        f"norm on the branch: {few(ended)} {'ends' if len(ended) == 1 else 'end'} in a norm, so that what is added has "
        "a size of its own, whatever the matrices make. In a small model of that kind the best LR rose by 0.8 octave "
        "per doubling of N; check yours over N before you carry an LR far"
    )


def _ends_in_norm(forward: Trace, add: ResidualAdd) -> bool:
    nodes, queue, seen = forward.graph.nodes, [add.branch], set[int]()
    while queue:
        number = queue.pop()
        if number in add.path and number not in seen and not nodes[number].matrices:
            seen.add(number)
            if nodes[number].op.relation == "norm":
                before = [n for n in add.path if nodes[number].ancestors >> n & 1]
                if forward.graph.matrices_on(before):
                    return True
            queue += [n for alternative in forward.graph.scaling(number) for n in alternative]
    return False


def _depth_scaling(forward: Trace, groups: list[Group]) -> str | None:
    named = [f"{group.handle} × {factors[0]:g}" for group in groups if (factors := depth_constants(forward, group))]
    learned = sorted(frozenset[str]().union(*(gates(forward, group) for group in groups)))
    causes = [f"a constant factor ({named[0]}, as residual_multiplier in some configurations)"] if named else []
    causes += [f"learned factors ({few(learned)}; LayerScale, ReZero)"] if learned else []
    if not causes:
        return None
    return (
        f"existing depth scaling: {' and '.join(causes)} already on the branches. ε comes on top of it: if it was "
        "chosen for depth, set it to 1 first, or depth is counted twice"
    )


def _cut_loops(model: nn.Module, forward: Trace, groups: list[Group]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    trained = {name for name, parameter in named_parameters(model).items() if parameter.requires_grad}
    for group in groups:
        if not group.parameters & trained:
            continue
        follow = [
            (a, b) for a, b in pairwise(group.adds) if a.total == b.stream or forward.graph.precedes(a.total, b.stream)
        ]
        cut = [add for add in group.adds if not add.recorded]
        cut += [later for earlier, later in follow if earlier.recorded and _cut_between(forward, earlier, later)]
        if cut:
            return (
                f"loops cut by detach or no_grad: {len(cut)} of {len(group.adds)} visits at "
                f"{group.adds[0].site.source} get no gradient from later ones (truncated backpropagation). N counts "
                "every visit of the forward; the rule was derived for gradients through all of them"
            )
    return None


def _cut_between(forward: Trace, earlier: ResidualAdd, later: ResidualAdd) -> bool:
    """No gradient comes from the later sum back to the earlier one on any way."""
    reached = {earlier.total}
    for n in forward.graph.between(earlier.total, later.total):
        if forward.graph.nodes[n].gradients_to & reached:
            reached.add(n)
    return forward.graph.nodes[earlier.total].followed and later.total not in reached


def renewed(caveats: tuple[str, ...], branches: tuple[Branch, ...]) -> tuple[str, ...]:
    """A plan's caveats after its branches are visited another number of times."""
    fresh = _prelude(branches)
    kept = [fresh if caveat.startswith(DIFFER) else caveat for caveat in caveats]
    kept += [fresh] if fresh not in kept else []
    return tuple(caveat for caveat in kept if caveat)


def _prelude(branches: tuple[Branch, ...]) -> str | None:
    visits = {branch.visits for branch in branches}
    if len(visits) < 2:
        return None
    return (
        f"{DIFFER} ({', '.join(f'{n:g}' for n in sorted(visits))}): layers outside the loop and streams inside a "
        "branch count in L with their own visits. That is our extension; the paper leaves models with prelude and coda "
        "open"
    )


def _frozen(model: nn.Module, branches: tuple[Branch, ...]) -> str | None:
    trained = {name for name, parameter in named_parameters(model).items() if parameter.requires_grad}
    still = [str(branch.handle) for branch in branches if branch.parameters and not trained & set(branch.parameters)]
    if not still or len(still) == len(branches):
        return None
    return (
        f"frozen weights: {few(still)} hold nothing that is trained and are scaled "
        "all the same, since gradients go through them; if what they compute is to stay, declare the other branches, "
        "branches=[…]"
    )


def _left_frozen(forward: Trace) -> str | None:
    sources = list(dict.fromkeys(add.site.source for add in forward.of("frozen")))
    if not sources:
        return None
    return (
        f"left as they are: no gradient comes to the branches added at {', '.join(sources)}, as in a teacher or a "
        "frozen backbone. One that copies trained weights must compute with their ε: name all branches, branches=[…]"
    )


def _trained(model: nn.Module) -> str | None:
    """Norm gains start out equal; where they differ, the model was trained."""
    for name, module in model.named_modules():
        gain = module._parameters.get("weight")  # an attribute may be computed, and move the buffers of spectral norm
        if "Norm" not in type(module).__name__ or gain is None or gain.is_meta:
            continue
        if gain.ndim == 1 and gain.numel() > 1 and bool((gain != gain[0]).any()):
            return (
                f"the weights look trained ({name}.weight is not constant), and ε changes the model's function; "
                "preserve=True puts ε in without changing it"
            )
    return None


def _unnamed(analysis: Analysis) -> str | None:
    lines = dict.fromkeys(analysis.trace.graph.line(join.node) for join in analysis.rest.joins)
    if not lines:
        return None
    return (
        f"branches that are not named: at {few(lines)} data meets what learned matrices made of it, "
        "which keeps factor 1"
    )


def _unscaled(matrices: Sequence[str]) -> str | None:
    if not matrices:
        return None
    return (
        f"not scaled: {', '.join(matrices)} act on the stream more than once outside every residual branch found, "
        "and no ε controls them. That is right for an adapter or an injection at the loop's entry, whose LR "
        "param_groups divides by its visits; a branch that is added in a way that is not recognised must be marked, "
        "looptransfer.residual(…, 'name'), or named, branches=[…]"
    )
