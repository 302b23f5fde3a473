"""What still gets where in a graph whose branches are cut, with learned matrices on its way and without.

A residual branch is a way through learned matrices around which the same data gets without any, so that the two are
added. Where every branch that is known is cut and data still meets itself so, a branch was not recognised, however the
addition is spelled. Products do not count: a gate on the stream leaves a product of the stream.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from looptransfer.rewrite.graph import Graph, bits


@dataclass(frozen=True)
class Join:
    """Where data meets itself after learned matrices acted on one of its ways."""

    node: int
    root: int  # the data, as late as it is still the same on both ways
    past: int  # the operand that came past the matrices
    through: int  # and the one that came through them
    learned_skip: bool  # other learned matrices act on the way past


@dataclass
class Paths:
    """For every node, as bitmasks of nodes: what reaches it, and how."""

    graph: Graph
    cut: Mapping[int, int | None]  # nodes of which one source remains, or nothing
    known: frozenset[int] = frozenset()  # sums that are recognised and not cut
    reach: list[int] = field(default_factory=list)  # all that reaches it
    free: list[int] = field(default_factory=list)  # what reaches it on a way without learned matrices
    through: list[int] = field(default_factory=list)  # what reaches it on a way with some
    gone: set[int] = field(default_factory=set)  # the nodes that are zero

    def __post_init__(self) -> None:
        for number in range(len(self.graph.nodes)):
            sources = self._sources(number)
            reach = free = through = 0
            if not sources and (number in self.cut or self.gone & set(self.graph.nodes[number].sources)):
                self.gone.add(number)
            if sources:
                reach = functools.reduce(lambda mask, s: mask | self.reach[s] | 1 << s, sources, 0)
                free, through = self._ways(number, sources)
            self.reach.append(reach)
            self.free.append(free)
            self.through.append(through)

    def reaches(self, old: int, new: int) -> bool:
        """There is a path left from `old` to `new`."""
        return old == new or bool(self.reach[new] >> old & 1)

    def skips(self, old: int, new: int) -> bool:
        """There is a path left on which no learned matrix acts."""
        return old == new or bool(self.free[new] >> old & 1)

    def acts(self, old: int, new: int) -> bool:
        """There is a path left on which one does."""
        return bool(self.through[new] >> old & 1)

    def between(self, start: int, end: int) -> list[int]:
        """The nodes on the paths from `start` to `end` that are left, `end` included."""
        later = self.reach[end] >> (start + 1) << (start + 1)
        return [*(n for n in bits(later) if self.reach[n] >> start & 1), end]

    @functools.cached_property
    def live(self) -> int:
        """The nodes that still reach the model's output."""
        return functools.reduce(lambda mask, n: mask | self.reach[n] | 1 << n, self.graph.ends, 0)

    @functools.cached_property
    def data(self) -> int:
        """The nodes that depend on the inputs."""
        return functools.reduce(lambda mask, n: mask | self.graph.nodes[n].data << n, range(len(self.graph.nodes)), 0)

    # -- one node

    def _sources(self, number: int) -> list[int]:
        """The sources of a node that count: numbers, and no product with what is cut to nothing."""
        if number in self.cut:
            rest = self.cut[number]
            return [] if rest is None else [rest]
        node = self.graph.nodes[number]
        sources = [] if node.choice else [s for s in dict.fromkeys(node.sources) if not self.graph.nodes[s].choice]
        gone = [s for s in sources if s in self.gone]
        if not gone:
            return sources
        if node.op.relation == "onto" and node.op.name.startswith("add") and sources[0] not in gone:
            return sources[:1]
        rest = [s for s in sources if s not in gone]
        return [] if self._vanishes(number, gone) else rest

    def _vanishes(self, number: int, gone: list[int]) -> bool:
        """A node is zero where these sources are."""
        alternatives = [set(sources) for sources in self.graph.scaling(number)]
        return self.graph.nodes[number].op.relation == "product" or any(a <= set(gone) for a in alternatives)

    def _ways(self, number: int, sources: list[int]) -> tuple[int, int]:
        node = self.graph.nodes[number]
        free = functools.reduce(lambda mask, s: mask | self.free[s] | 1 << s, sources, 0)
        through = functools.reduce(lambda mask, s: mask | self.through[s], sources, 0)
        if number in self.cut or node.op.relation == "side by side":
            return free, through
        if node.matrices:
            return 0, free | through
        if self._multiplies(number, sources):
            return free, through & ~free
        if len(self._data(sources)) > 1:  # what is spread over a larger sum is a statistic, and no skip
            whole = [s for s in sources if prod(self.graph.nodes[s].shape) >= prod(node.shape)]
            free = functools.reduce(lambda mask, s: mask | self.free[s] | 1 << s, whole, 0) & ~through
        return 0 if node.op.reduces else free, through

    def _data(self, sources: list[int]) -> list[int]:
        return [s for s in sources if self.graph.nodes[s].data]

    def _multiplies(self, number: int, sources: list[int]) -> bool:
        """A product: known, or it vanishes with what came past the matrices."""
        operands = self._data(sources)
        relation = self.graph.nodes[number].op.relation
        if len(operands) < 2 or relation in {"sum", "onto"}:
            return False
        if relation == "product":
            return True
        past = [p for p in operands if self._past(p, [q for q in operands if q != p])]
        return bool(past) and all(self.graph.scales_with(number, (p,)) for p in past)

    def is_gated(self, number: int) -> bool:
        """A product of data and of what learned matrices made of it."""
        operands = self._data(self._sources(number))
        return any(self._past(p, [q for q in operands if q != p]) for p in operands)

    def _past(self, operand: int, others: list[int]) -> int:
        """What reaches one operand on a way without matrices, and another on a way with some."""
        through = functools.reduce(lambda mask, s: mask | self.through[s], others, 0)
        return (self.free[operand] | 1 << operand) & through & self.data

    # -- joins

    def join_at(self, number: int) -> Join | None:
        """Where a node adds data to what learned matrices made of it; None where it does not."""
        node, sources = self.graph.nodes[number], self._sources(number)
        operands = self._data(sources)
        if number in self.cut or number in self.known or not operands or node.op.relation == "side by side":
            return None
        if len(operands) == 1:
            return self._mixed(number, operands[0])
        if node.matrices:
            return self._onto(number, operands) if node.op.relation == "onto" else None
        if self._multiplies(number, sources):
            return None
        whole = [s for s in operands if prod(self.graph.nodes[s].shape) >= prod(node.shape)]
        for operand in whole:
            others = [s for s in operands if s != operand]
            past = self._past(operand, others)
            if past:
                root = past.bit_length() - 1
                return Join(number, root, operand, next(s for s in others if self.acts(root, s)), learned_skip=False)
        return self._learned_skip(number, operands)

    def _mixed(self, number: int, source: int) -> Join | None:
        """An operation on one tensor that holds both side by side, and makes sums of its elements."""
        node = self.graph.nodes[number]
        both = self.free[source] & self.through[source] & self.data
        moves = node.op.pointwise or node.op.relation in {"same", "moved", "norm"}
        if moves or not both or node.matrices:
            return None
        parts = self.graph.nodes[source].sources if node.op.reduces else ()
        if node.op.reduces and prod(node.shape) < max((prod(self.graph.nodes[s].shape) for s in parts), default=0):
            return None  # a mean over positions
        return Join(number, both.bit_length() - 1, source, source, learned_skip=False)

    def _onto(self, number: int, operands: list[int]) -> Join | None:
        first, *others = operands
        made = functools.reduce(lambda mask, s: mask | self.free[s] | self.through[s] | 1 << s, others, 0)
        past = (self.free[first] | 1 << first) & made & self.data
        if first != self.graph.nodes[number].sources[0] or not past:
            return None
        return Join(number, past.bit_length() - 1, first, others[0], learned_skip=False)

    def _learned_skip(self, number: int, operands: list[int]) -> Join | None:
        """Both came through matrices of their own, and what they come from is as large: a skip with a map on it."""
        shape = self.graph.nodes[number].shape
        for p, q in ((p, q) for p in operands for q in operands if p < q):
            common = self.through[p] & self.through[q] & self.data
            while common:
                root = common.bit_length() - 1
                common ^= 1 << root
                if self.graph.nodes[root].shape == shape:
                    apart = not self._matrices(root, p) & self._matrices(root, q)
                    if apart:
                        return Join(number, root, p, q, learned_skip=True)
                    break
        return None

    def _matrices(self, start: int, end: int) -> frozenset[str]:
        return frozenset(name.split("+")[0] for name in self.graph.matrices_on(self.between(start, end)))
