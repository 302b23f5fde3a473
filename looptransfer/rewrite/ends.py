"""The end of a branch: its last learned maps, what can be folded into them, and what stands on them already."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from looptransfer.rewrite.branches import Group
from looptransfer.rewrite.graph import Node
from looptransfer.rewrite.ops import LINEAR_IN_WEIGHTS
from looptransfer.rewrite.trace import Trace


@dataclass(frozen=True)
class End:
    """The last learned map of a branch, and the constant factor from there to the stream."""

    node: int
    factor: float
    parameters: frozenset[str]  # none: the branch ends in something that is no learned map


def find_ends(forward: Trace, group: Group) -> list[End]:
    """Follow a branch from its adds back to its last learned maps."""
    return [end for ends in _ends_of_visits(forward, group) for end in ends]


def _ends_of_visits(forward: Trace, group: Group) -> Iterator[list[End]]:
    walk = _Walk(forward, frozenset[int]().union(*(add.path for add in group.adds)))
    for weight, route in group.routes:
        outside = weight * walk.share(route[0], route[-1])
        yield [End(n, outside * share, walk.learned(n)) for n, share in walk.shares(route[-1]).items()]


class _Walk:
    """From a node back to the learned maps that it is a sum of, with the constant share of each."""

    def __init__(self, forward: Trace, inside: frozenset[int]) -> None:
        self.graph, self.nodes, self.inside = forward.graph, forward.graph.nodes, inside
        self.computed: dict[int, dict[int, float]] = {}

    def shares(self, number: int) -> dict[int, float]:
        if number not in self.computed:
            self.computed[number] = self._shares(number)
        return self.computed[number]

    def share(self, number: int, part: int) -> float:
        """The share of one node that there is in another that is proportional to it."""
        if number == part:
            return 1.0
        node = self.nodes[number]
        if number not in self.inside or number < part:
            return 0.0
        alternatives = self.graph.scaling(number)
        ways = [
            sum(weight * self.share(source, part) for source, weight in zip(path, _weights(node, path), strict=True))
            for path in alternatives
        ]
        return self._factor(node) * next((path for path in ways if path), 0.0)

    def _factor(self, node: Node) -> float:
        """Drop path divides by the share that it keeps, before its mask and in training only: no factor on average."""
        before = abs(self.nodes[node.sources[0]].factor) if node.masked else 1.0
        return node.factor / before if before > 1 else node.factor

    def learned(self, number: int) -> frozenset[str]:
        node = self.nodes[number]
        return node.parameters if node.op.name in LINEAR_IN_WEIGHTS else frozenset()

    def _shares(self, number: int) -> dict[int, float]:
        node = self.nodes[number]
        factor = self._factor(node)
        if node.parameters:
            shares = {number: factor}
            if node.op.name == "add":  # a bias that is added apart: it and the map before it end the branch together
                shares |= self._sum([s for s in node.sources if self.nodes[s].data], factor)
            return shares
        alternatives = self.graph.scaling(number) if number in self.inside else ()
        if not alternatives:
            return {number: factor}
        ways = [path for alternative in alternatives if (path := self._way(node, alternative, factor))]
        if len(alternatives) == 1 and ways:
            return ways[0]
        whole = [path for path in ways if all(self.learned(end) for end in path)]
        return whole[0] if whole else {number: factor}  # a product of two things that both depend on data

    def _way(self, node: Node, alternative: tuple[int, ...], factor: float) -> dict[int, float]:
        """Empty where the other factor holds what it ends in, as in y / |y|: ε would not come out of the product."""
        others = [n for n in node.sources if self.nodes[n].data and n not in alternative]
        ends = self._sum(alternative, factor, _weights(node, alternative))
        apart = all(end != n and not self.graph.precedes(end, n) for end in ends for n in others)
        return ends if apart else {}

    def _sum(self, sources: Sequence[int], factor: float, weights: Sequence[float] = ()) -> dict[int, float]:
        total: dict[int, float] = {}
        for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
            for end, share in self.shares(source).items():
                total[end] = total.get(end, 0.0) + factor * weight * share
        return total


def _weights(node: Node, sources: Sequence[int]) -> Sequence[float]:
    return node.signs if len(node.signs) == len(sources) else (1.0,) * len(sources)


def factors(forward: Trace, group: Group) -> tuple[float, ...]:
    """The constant factors that stand on a branch between its last learned maps and the stream, each once."""
    return _distinct(find_ends(forward, group))


def depth_constants(forward: Trace, group: Group) -> tuple[float, ...]:
    """Those of the visits at which none of the branch's maps goes without: beside a scaled part it is no depth scaling.

    They may differ from visit to visit, as in f(x) / (i + 1).
    """
    visits = [_distinct(ends) for ends in _ends_of_visits(forward, group)]
    scaled = {f for constants in visits if all(abs(f - 1) > 1e-6 for f in constants) for f in constants}
    return tuple(sorted(scaled))


def _distinct(ends: list[End]) -> tuple[float, ...]:
    return tuple(sorted({float(f"{abs(end.factor):.9g}") for end in ends}))


def last_maps(model: nn.Module, forward: Trace, group: Group) -> tuple[tuple[str, ...], str]:
    """The parameters that can take a branch's multiplier, or none and the reason why not."""
    ends = find_ends(forward, group)
    names = frozenset[str]().union(*(end.parameters for end in ends))
    reason = (
        _did_not_run(model, forward, group)
        or _ends_in_no_map(ends)
        or _computed_weights(forward, ends)
        or _weights_used_elsewhere(forward, ends, names)
        or _result_used_elsewhere(forward, ends, group)
    )
    return ((), reason) if reason else (tuple(sorted(names)), "")


def _did_not_run(model: nn.Module, forward: Trace, group: Group) -> str:
    idle = sorted(name for name in group.parameters - forward.graph.touched if model.get_parameter(name).ndim >= 2)
    if not idle:
        return ""
    return f"{idle[0]} did not run in the trace (an expert that was not chosen?), and might end it another time"


def _ends_in_no_map(ends: list[End]) -> str:
    if ends and all(end.parameters for end in ends):
        return ""
    return "it does not end in a learned map that its multiplier could go into, such as a norm without gain"


def _computed_weights(forward: Trace, ends: list[End]) -> str:
    nodes = forward.graph.nodes
    for end in ends:
        sources = nodes[end.node].sources
        direct = {name for s in sources for n in forward.same(s) for name in nodes[n].parameters}
        computed = [n for n in sources if not nodes[n].data and nodes[n].sources and nodes[n].repeats is None]
        if computed or not end.parameters <= direct:
            return "the weights of its last map are computed from its parameters"
    return ""


def _weights_used_elsewhere(forward: Trace, ends: list[End], names: frozenset[str]) -> str:
    ended = {end.node for end in ends}
    for number, node in enumerate(forward.graph.nodes):
        if node.data and node.parameters & names and number not in ended and forward.graph.is_live(number):
            return f"{', '.join(sorted(node.parameters & names))} of its last map is used elsewhere too"
    return ""


def _result_used_elsewhere(forward: Trace, ends: list[End], group: Group) -> str:
    """The reason against folding, if any: the result of a last map may only be carried to the stream.

    Fed to another of them, ε would count twice.
    """
    graph, ended = forward.graph, {end.node for end in ends}
    totals = {add.total for add in group.adds}
    route = totals.union(*(add.path for add in group.adds))
    after, used, queue = set[int](), set[int](), sorted(ended)
    while queue:
        number = queue.pop()
        if number not in after | totals:
            after.add(number)
            used |= graph.users(number)
            queue += graph.users(number) & route
    if used - route:
        return "what its last map makes is used elsewhere too, and would change there"
    if any(graph.nodes[n].op.name != "add" for n in used & ended):  # a bias that is added apart ends it with the map
        return "one of its last maps is fed by another, as in y + l(y), and ε would count twice there"
    return ""


def gates(forward: Trace, group: Group) -> frozenset[str]:
    """Learned factors on the branch, after its last matrix: LayerScale, ReZero."""
    nodes = forward.graph.nodes
    inside = frozenset[int]().union(*(add.path for add in group.adds))
    learned_factors = frozenset[str]()
    for _, route in group.routes:
        for number in route[:-1]:
            learned_factors |= nodes[number].parameters if nodes[number].op.name in {"mul", "div"} else frozenset()
    for end in find_ends(forward, group):
        node = nodes[end.node]
        below = node.proportional_to[0][0] if node.op.name == "mul" and node.proportional_to else None
        while below in inside and len(nodes[below].proportional_to) == 1 and not nodes[below].matrices:
            below = nodes[below].proportional_to[0][0]
        if below in inside and nodes[below].matrices:  # a norm's gain stands on something that is no map
            learned_factors |= end.parameters
    return learned_factors
