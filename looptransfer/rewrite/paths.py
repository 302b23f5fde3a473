"""All that still gets anywhere in a graph whose branches are cut, with learned matrices on its way and without.

A residual branch is a way through learned matrices around which the same data gets without any, so that the two are
added. Where every branch that is known is cut and data still meets itself so, a branch was not recognised, however the
addition is spelled. Products do not count: a gate on the stream leaves a product of the stream.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from looptransfer.rewrite.graph import Graph, Node, bits

ZEROS = {"zeros", "zeros_like", "new_zeros", "zero"}


@dataclass(frozen=True)
class Join:
    """A node where data meets itself after learned matrices acted on one of its ways."""

    node: int
    root: int  # the data, as late as it is still the same on both ways
    through: int  # the operand that came through the matrices, and not past them
    learned_skip: bool = False  # other learned matrices act on the way past


@dataclass
class Paths:
    """For every node, as bitmasks of nodes: what reaches it, and how."""

    graph: Graph
    cut: Mapping[int, int | None]  # nodes of which one source remains, or nothing
    recognised: frozenset[int] = frozenset()  # sums that are recognised and not cut
    zeros_carry: bool = False  # a state that starts at zero counts as one; else nothing comes of a product with it
    reach: list[int] = field(default_factory=list)  # all that reaches it
    free: list[int] = field(default_factory=list)  # what reaches it on a way without learned matrices
    through: list[int] = field(default_factory=list)  # what reaches it on a way with some
    beside: list[int] = field(default_factory=list)  # what reaches some of its elements so, and others so
    gone: set[int] = field(default_factory=set)  # the nodes that are zero

    def __post_init__(self) -> None:
        for number, node in enumerate(self.graph.nodes):
            if self._is_gone(number, node):
                self.gone.add(number)
            sources = self._sources(number)
            ways = self._ways(number, sources) if sources else (0, 0, 0)
            self.reach.append(_union(self.reach[s] | 1 << s for s in sources))
            for masks, mask in zip((self.free, self.through, self.beside), ways, strict=True):
                masks.append(mask)

    def reaches(self, old: int, new: int) -> bool:
        """There is a path left from `old` to `new`."""
        return old == new or bool(self.reach[new] >> old & 1)

    def skips(self, old: int, new: int) -> bool:
        """There is a path left on which no learned matrix acts."""
        return old == new or bool(self.free[new] >> old & 1)

    def acts(self, old: int, new: int) -> bool:
        """There are paths left, and on all of them one does."""
        return bool(self._only(new) >> old & 1)

    def is_gated(self, old: int, new: int) -> bool:
        """One is in the other as a product with what learned matrices made of it."""
        return bool((self.through[new] & self.free[new] & ~self.beside[new]) >> old & 1)

    def between(self, start: int, end: int) -> list[int]:
        """The nodes on the paths from `start` to `end` that are left, `end` included."""
        later = self.reach[end] >> (start + 1) << (start + 1)
        return [*(n for n in bits(later) if self.reach[n] >> start & 1), end]

    @functools.cached_property
    def live(self) -> int:
        """The nodes that still reach the model's output."""
        return _union(self.reach[n] | 1 << n for n in self.graph.ends)

    @functools.cached_property
    def data(self) -> int:
        """The nodes that depend on the inputs; one that is cut is what remains of it."""
        return _union(1 << n for n, node in enumerate(self.graph.nodes) if node.data and n not in self.cut)

    # -- one node

    def _is_gone(self, number: int, node: Node) -> bool:
        """A node is zero: cut, a constant, or a product with such a one."""
        if number in self.cut or node.op.name in ZEROS:
            return self.cut.get(number, -1) is None or (node.op.name in ZEROS and not self.zeros_carry)
        gone = {s for s in node.sources if s in self.gone}
        if not gone or node.choice:
            return False
        product = node.op.relation == "product" and node.op.name != "convolution" and "attention" not in node.op.name
        return product or any(set(sources) <= gone for sources in self.graph.scaling(number))

    def _sources(self, number: int) -> list[int]:
        """The sources of a node that count: numbers, and no zeros."""
        if number in self.gone:
            return []
        if number in self.cut:
            return [s for s in [self.cut[number]] if s is not None]
        node = self.graph.nodes[number]
        if node.op.relation == "onto" and node.op.name.startswith("add") and self.gone & set(node.sources[1:]):
            return [s for s in node.sources[:1] if s not in self.gone]
        sources = [] if node.choice else dict.fromkeys(node.sources)
        return [s for s in sources if s not in self.gone and not self.graph.nodes[s].choice]

    def _ways(self, number: int, sources: list[int]) -> tuple[int, int, int]:
        node = self.graph.nodes[number]
        free, through = _union(map(self._free, sources)), _union(self.through[s] for s in sources)
        beside = _union(self.beside[s] for s in sources)
        if number in self.cut:
            return free, through, beside
        if node.op.relation == "side by side":
            pairs = ((p, q) for p in sources for q in sources if p != q)
            return free, through, beside | _union(self._free(p) & self._only(q) for p, q in pairs) & self.data
        if node.matrices:
            return 0, _union(self.reach[s] | 1 << s for s in sources), 0
        if self._multiplies(number, sources):  # a gate leaves a product of the stream, a contraction does not
            return (free if node.op.pointwise else free & ~through), through, beside
        if len(self._data(sources)) > 1:  # what is spread over a larger sum is a statistic, and no skip
            whole = [s for s in sources if prod(self.graph.nodes[s].shape) >= prod(node.shape)]
            free = _union(map(self._free, whole)) & ~_union(map(self._only, sources))
        return 0 if node.op.reduces else free, through, beside

    def _free(self, number: int) -> int:
        return self.free[number] | 1 << number

    def _only(self, number: int) -> int:
        """The nodes that reach a node through learned matrices and not past them too, as through a gate."""
        return self.through[number] & ~self.free[number]

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
        past = [p for p in operands if self._past(p, operands)]
        return bool(past) and all(self.graph.scales_with(number, (p,)) for p in past)

    def gates(self, number: int, stream: int) -> bool:
        """A product of the stream in which another operand went through learned matrices that it did not.

        `stream`: bitmask of nodes of which the stream holds some; a mask from outside holds none.
        """
        operands = self._data(self._sources(number))
        pairs = ((p, q) for p in operands for q in operands if p != q)
        op = self.graph.nodes[number].op
        return (op.relation == "product" and op.pointwise) and any(
            self._free(p) & stream and self._only(q) & ~self.through[p] & self.data for p, q in pairs
        )

    def _past(self, operand: int, operands: list[int]) -> int:
        """The nodes that reach one operand on a way without matrices, and another only on a way with some."""
        return self._free(operand) & _union(self._only(s) for s in operands if s != operand) & self.data

    # -- joins

    def join_at(self, number: int) -> Join | None:
        """The join at a node that adds data to what learned matrices made of it; None where it does not."""
        node, sources = self.graph.nodes[number], self._sources(number)
        operands = self._data(sources)
        if number in self.cut or number in self.recognised or not operands or node.backward:
            return None
        if node.op.relation == "side by side":
            return None
        if node.matrices:
            return self._onto(number) if node.op.relation == "onto" else None
        if len(operands) == 1:
            return self._mixed(number, operands[0])
        if self._multiplies(number, sources):
            return None
        return (
            self._brought_past(number, operands)
            or self._taken_apart(number, operands)
            or self._learned_skip(number, operands)
        )

    def _brought_past(self, number: int, operands: list[int]) -> Join | None:
        """One operand is as large as the result and came past the matrices, or is gated in another."""
        size = prod(self.graph.nodes[number].shape)
        for operand in (s for s in operands if prod(self.graph.nodes[s].shape) >= size):
            past = self._past(operand, operands)
            if past:
                root = past.bit_length() - 1
                others = [s for s in operands if s != operand and self.acts(root, s)]
                return Join(number, root, others[0])
            gated = [s for s in operands if s != operand and self.is_gated(operand, s)]
            if gated:
                return Join(number, operand, gated[0])
        return None

    def _mixed(self, number: int, source: int) -> Join | None:
        """An operation on one tensor that holds both side by side, and makes sums of its elements."""
        node, both = self.graph.nodes[number], self.beside[source]
        parts = sum(s == source for s, _ in node.slices)
        summed = parts > 1 and node.op.relation != "product" if node.op.pointwise else True
        if not both or not summed or node.op.relation in {"same", "moved", "norm"} or node.matrices:
            return None
        root = both.bit_length() - 1
        if node.op.reduces and prod(node.shape) < prod(self.graph.nodes[root].shape):
            return None  # a mean over positions
        return Join(number, root, source)

    def _taken_apart(self, number: int, operands: list[int]) -> Join | None:
        """A sum of different parts of one tensor that holds both side by side."""
        for p, q in ((p, q) for p in operands for q in operands if p < q and self.beside[p] & self.beside[q]):
            for held in bits(self._free(p) & self._free(q)):
                if self.beside[held] and self._parts(held, p, number) != self._parts(held, q, number):
                    return Join(number, self.beside[held].bit_length() - 1, q)
        return None

    def _parts(self, held: int, end: int, number: int) -> set[object]:
        """The parts of a tensor that are read on the path to a node."""
        path = self.between(held, end) if held != end else [number]
        slices = {part for n in path for s, part in self.graph.nodes[n].slices if s == held}
        return slices | {n for n in path if self.graph.nodes[n].op.relation == "moved" and held in self._sources(n)}

    def _onto(self, number: int) -> Join | None:
        """A product that is added to the first argument at once."""
        first, *others = self.graph.nodes[number].sources
        others = [s for s in self._data(others) if s not in self.gone]
        past = self._free(first) & _union(self._free(s) | self.through[s] for s in others) & self.data
        return Join(number, past.bit_length() - 1, others[0]) if past else None

    def _learned_skip(self, number: int, operands: list[int]) -> Join | None:
        """Both came through matrices of their own, and what they come from is as large: a skip with a map on it."""
        shape = self.graph.nodes[number].shape
        for p, q in ((p, q) for p in operands for q in operands if p < q and self.through[p] and self.through[q]):
            common = self.reach[p] & self.reach[q] & self.data
            while common:
                root = common.bit_length() - 1
                common ^= 1 << root
                if self.graph.nodes[root].shape == shape:
                    ways = [self._matrices(root, end) for end in (p, q)]
                    if all(ways) and not ways[0] & ways[1]:
                        return Join(number, root, q, learned_skip=True)
                    break
        return None

    def _matrices(self, start: int, end: int) -> frozenset[str]:
        names = self.graph.matrices_on(self.between(start, end)) if self.reaches(start, end) else frozenset[str]()
        return frozenset(name.split("+")[0] for name in names)


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(lambda a, b: a | b, masks, 0)
