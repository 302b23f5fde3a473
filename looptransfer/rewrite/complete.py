"""Are the branches found all there are? The graph without them tells, and whose the parameters are.

With every branch cut (ε = 0), what reaches the output is the stream. A learned matrix that acts there must be one that
all of its data goes through: an embedding, a head, an adapter at a loop's entry. Where data gets past it and is added
to what comes out of it, there is a residual branch that was not recognised, however it is spelled.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.branches import DECLARE, Group
from looptransfer.rewrite.graph import Graph, bits
from looptransfer.rewrite.names import module_of, parameter_names
from looptransfer.rewrite.paths import Join, Paths
from looptransfer.rewrite.recurrence import Rerun, runs_over_time
from looptransfer.rewrite.trace import ResidualAdd, Trace


@dataclass
class Remainder:
    """One forward, as far as it goes where its branches are multiplied by 0."""

    paths: Paths
    joins: list[Join]  # where data is added to what learned matrices made of it all the same
    uses: dict[str, int]  # how often each parameter acts on the stream
    matrices: tuple[str, ...]  # those that do so more than once, as matrices and not as tables
    injections: list[int]  # where older data is added to the stream, between branches
    gates: list[int]  # where the stream is multiplied by what learned matrices made, between branches

    def forget(self, names: frozenset[str]) -> None:
        """Parameters that have no effect on the stream after all."""
        self.uses = {name: times for name, times in self.uses.items() if name not in names}
        self.matrices = tuple(name for name in self.matrices if name not in names)


def without_branches(forward: Trace, adds: list[ResidualAdd]) -> Remainder:
    """Cut the branches of some adds out of a trace, and those that are not trained."""
    nodes = forward.graph.nodes
    cut: dict[int, int | None] = {add.total: add.stream for add in forward.of("frozen")}
    cut |= {add.total: add.stream if add.total != add.branch else None for add in adds}
    recognised = frozenset(add.total for add in forward.adds if add.kind != "fixed") - cut.keys()
    paths = Paths(forward.graph, cut, recognised)
    live = [n for n in range(len(nodes)) if paths.live >> n & 1]
    joins = [join for n in live if (join := paths.join_at(n)) is not None]
    uses = uses_in(forward.graph, paths.reaches, live)
    totals = functools.reduce(lambda mask, add: mask | 1 << add.total, adds, 0)
    looped = [n for n in _between_branches(paths, adds, totals) if n not in recognised and paths.live >> n & 1]
    injections = [n for n in looped if nodes[n].op.relation == "sum" and _brings_older(paths, n, totals)]
    gates = [n for n in looped if paths.gates(n, totals)]
    return Remainder(paths, joins, uses, _used_again(forward, live, uses), injections, gates)


def _used_again(forward: Trace, live: list[int], uses: Mapping[str, int]) -> tuple[str, ...]:
    """The parameters that act more than once as matrices."""
    acting = {name.split("+")[0] for name in forward.graph.matrices_on(live)}
    return tuple(name for name, times in sorted(uses.items()) if times > 1 and name in acting)


def _between_branches(paths: Paths, adds: list[ResidualAdd], totals: int) -> list[int]:
    """The nodes that carry the stream from one add to another."""
    carried = functools.reduce(lambda mask, add: mask | paths.free[add.stream] | 1 << add.stream, adds, 0)
    return [n for n in bits(carried) if paths.free[n] & totals]


def _brings_older(paths: Paths, number: int, totals: int) -> bool:
    """A sum of the stream and data that was there before its last branch."""
    nodes = paths.graph.nodes
    operands = [s for s in nodes[number].sources if nodes[s].data and nodes[s].shape == nodes[number].shape]
    if number in paths.cut or len(operands) < 2 or paths.gone & set(operands):
        return False
    first, second = (paths.reach[s] | 1 << s for s in operands[:2])
    return bool((first ^ second) & totals) and bool(first & totals != second & totals)


def uses_in(graph: Graph, reaches: Callable[[int, int], bool], live: list[int]) -> dict[str, int]:
    """The number of times that a parameter, or one part of it, acts on what it acted on before, in the same way.

    `reaches`: an earlier node, by its number, counts as a source of a later one.
    """
    chains: defaultdict[str, list[tuple[tuple[str, int], int, int]]] = defaultdict(list)
    for number in live:
        node = graph.nodes[number]
        for name in node.parameters if node.data and node.op.name != "embedding" else ():
            offset = max((part[0] for s, part in node.slices if name in graph.nodes[s].parameters), default=0)
            use = (node.op.name, offset)
            earlier = (n for other, old, n in reversed(chains[name]) if other == use and reaches(old, number))
            chains[name].append((use, number, 1 + next(earlier, 0)))
    return {name: max(n for _, _, n in uses) for name, uses in chains.items()}


def note_members(
    model: nn.Module, forward: Trace, groups: list[Group], rest: Remainder, hidden: frozenset[str]
) -> None:
    """Set the parameters of every group: those that reach the output through its branch, and not at ε = 0.

    `hidden` are known to have no effect then: what they make is on the stream, and cut off before the output. Of the
    module that hands a branch over its parameters are also those that did not run, such as an expert not chosen.
    """
    names = {n: node.parameters for n, node in enumerate(forward.graph.nodes) if node.parameters and not node.sources}
    canonical = parameter_names(model)

    def reaching(mask: int) -> set[str]:
        return {name for n, entering in names.items() if mask >> n & 1 for name in entering}

    outside = reaching(rest.paths.live) - hidden

    def ancestors(number: int) -> int:
        """Those of a branch, as they are left; of one that is cut itself those of what it is made of."""
        sources = forward.graph.nodes[number].sources if number in rest.paths.cut else (number,)
        return functools.reduce(lambda mask, n: mask | rest.paths.reach[n] | 1 << n, sources, 0)

    for group in groups:
        inside = set[str]().union(*(reaching(ancestors(n)) for n in {add.branch for add in group.adds}))
        module = module_of(model, group.handle.module) if group.handle.mark is None else None
        idle = {canonical[id(p)] for p in module.parameters()} - forward.graph.touched if module is not None else set()
        group.parameters = frozenset(inside - outside) | idle


def refuse_unrecognised(forward: Trace, rest: Remainder, again: Rerun) -> None:
    """Refuse what adds data to what learned matrices made of it, and is no residual add that was found.

    Inside a branch that is its own affair, unless it is a loop: one that runs on through the same matrices. `again`
    runs the forward once more, to tell time from depth.

    Raises:
        InputError: names the line where the two meet.
    """
    _refuse_streams(forward, rest)
    joins = [join for join in _over_depth(forward, rest.joins, again) if _matters(forward, join)]
    if joins:
        raise _unrecognised(forward, joins[0], "")
    for add in {add.last: add for add in reversed(forward.of("leaf"))}.values():
        looped = _over_depth(forward, _joins_of_a_loop(forward, rest, add), again)
        if looped:
            raise _unrecognised(forward, looped[0], f" It runs in a loop inside the branch added at {add.site.source}.")


def _joins_of_a_loop(forward: Trace, rest: Remainder, add: ResidualAdd) -> list[Join]:
    """The joins in a branch that run on through the same matrices."""
    inside = [n for n in sorted(add.path) if forward.graph.nodes[n].data]
    matrices = [name for n in inside for name in forward.graph.nodes[n].matrices]
    if len(matrices) == len(set(matrices)):
        return []
    roots = {add.root, *inside}
    joins = [join for n in inside if (join := rest.paths.join_at(n)) is not None and join.root in roots]
    return [join for join in joins if any(_runs_on(forward, rest.paths, join, other) for other in joins)]


def _refuse_streams(forward: Trace, rest: Remainder) -> None:
    """Refuse a stream that is added to where no multiplier can reach, or is multiplied between its adds."""
    if forward.graph.fused_kernels:
        raise InputError(
            f"the kernel called at {forward.graph.fused_kernels[0]} adds a residual branch to its own input, where no "
            f"multiplier can reach; use an unfused form of it. {DECLARE}"
        )
    scaled = next((line for add in forward.of("leaf") if (line := _scaled_stream(forward, add))), None)
    if scaled is not None:
        raise InputError(
            f"the stream is multiplied by a constant at {scaled} between two residual adds, and the rule is derived "
            f"for x + f(x): its 1/N is not known to hold. {DECLARE}"
        )
    gated = next((line for line in _gated_streams(forward, rest)), None)
    if gated is not None:
        raise InputError(
            f"at {gated} the stream is multiplied by what learned matrices made of data (a gate on the skip, as in "
            "GRU, highway or squeeze-and-excitation over the sum), and the rule is derived for x + f(x): its 1/N is "
            f"not known to hold. {DECLARE}"
        )


def _gated_streams(forward: Trace, rest: Remainder) -> Iterator[str]:
    """The lines where the skip of a loop is gated: a product of the stream, added to it or before its next add."""
    for add in forward.of("composite"):
        if add.root == add.stream and rest.paths.is_gated(add.root, add.branch):
            yield forward.graph.line(add.total)
    for adds in forward.chains():
        for first, then in pairwise(adds):
            between = (n for n in rest.gates if rest.paths.skips(first.total, n) and rest.paths.skips(n, then.stream))
            yield from (forward.graph.line(n) for n in between)


def _scaled_stream(forward: Trace, add: ResidualAdd) -> str | None:
    """The line where the stream is scaled, as in (x + f(x))/2, since the add before."""
    totals = {other.total for other in forward.of("leaf")}
    number, factor, line = add.stream, 1.0, None
    while number not in totals:
        node = forward.graph.nodes[number]
        alternatives = forward.graph.scaling(number)
        if [len(sources) for sources in alternatives] != [1] or node.masked or node.parameters:
            return None
        if node.op.name in {"mul", "div"} and sum(forward.graph.nodes[s].data for s in node.sources) > 1:
            return None  # divided by its own norm
        if node.even and node.factor != 1:
            factor, line = factor * node.factor, forward.graph.line(number)
        number = alternatives[0][0]
    return line if abs(factor - 1) > 1e-6 else None


def _matters(forward: Trace, join: Join) -> bool:
    """Something learned comes after it, or the model hands it back: it is no loss."""
    graph = forward.graph
    return any(graph.nodes[n].shape for n in graph.ends) or any(
        node.matrices and graph.precedes(join.node, n) for n, node in enumerate(graph.nodes)
    )


def _runs_on(forward: Trace, paths: Paths, join: Join, later: Join) -> bool:
    """One join is computed from another through the same matrices again."""
    if not forward.graph.precedes(join.node, later.node):
        return False
    first = forward.graph.matrices_on(paths.between(join.root, join.through))
    return bool(first & forward.graph.matrices_on(forward.graph.between(join.node, later.node)))


def _over_depth(forward: Trace, joins: list[Join], again: Rerun) -> list[Join]:
    """Without the joins of a recurrence over time."""
    lines: defaultdict[tuple[str, int], list[Join]] = defaultdict(list)
    for join in joins:
        lines[forward.graph.nodes[join.node].place].append(join)
    kept = []
    for together in lines.values():
        over_time = runs_over_time(forward.graph, [join.node for join in together], again)
        kept += [] if over_time else together
    return sorted(kept, key=lambda join: join.node)


def _unrecognised(forward: Trace, join: Join, more: str) -> InputError:
    if join.learned_skip:
        reason = (
            "and its skip goes through other learned matrices (hyper-connections, a projected or mixed stream), while "
            "the rule is derived for x + f(x)"
        )
    else:
        reason = (
            "which is no x + f(x) that the trace recognises: the skip is scaled, gated or moved (GRU, highway, lerp, "
            "DeepNorm, flip), or it is added by another operation"
        )
    return InputError(
        f"at {forward.graph.line(join.node)} data meets what learned matrices made of it: a residual branch, "
        f"{reason}.{more} To scale the branch all the same, mark what is added: "
        f"looptransfer.residual(…, 'name'). {DECLARE}"
    )
