"""Which additions of a forward are residual adds, and of which kind.

A residual add is `a + b` where some x reaches a by identity operations only, x is an ancestor of b, the shapes agree
and learned matrices act on the way from x to b: a is the stream, b the branch. Without the matrices an activation that
is written out, a manual norm or RoPE would qualify.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from looptransfer.rewrite.graph import ExampleInputs, Graph, Sum, record

Kind = Literal["leaf", "composite", "inner", "gated", "fused"]
# Operations through which a skip is still a skip, though a scaled one.
ELEMENTWISE = {
    "mul",
    "div",
    "neg",
    "add",
    "sub",
    "lerp",
    "_to_copy",
    "clone",
    "native_dropout",
    "copy",
    "lift_fresh_copy",
}


@dataclass
class ResidualAdd:
    """One execution of one residual add.

    leaf: the branch is to be scaled. composite: the branch holds the stream itself (an input injection, a long skip).
    inner: it lies inside a leaf's branch and never becomes the stream. gated: the skip is scaled. fused: the branch is
    computed by the very operation that adds it.
    """

    kind: Kind
    source: str  # file:line
    container: tuple[str, ...]  # the modules running at the add, the outermost first
    stream: int
    branch: int
    total: int
    way: frozenset[int]  # the nodes from the stream to the branch
    parameters: frozenset[str]  # those that act on that way
    position: int = 1  # which operand of the addition is the branch
    occurrence: int = 0  # which run of this line in these modules
    followed: bool = True  # autograd follows the stream into the add
    peak: float = float("nan")  # max |branch|, where it was asked for

    @property
    def site(self) -> tuple[str, tuple[str, ...]]:
        """The line, in the modules that run it."""
        return self.source, self.container


@dataclass
class Trace:
    """What one forward did, and its residual adds in the order they ran."""

    graph: Graph
    matrices: frozenset[str]
    adds: list[ResidualAdd] = field(default_factory=list)

    def of(self, kind: Kind) -> list[ResidualAdd]:
        """The adds of one kind."""
        return [add for add in self.adds if add.kind == kind]


def trace(model: nn.Module, example_inputs: ExampleInputs, peaks: bool = False) -> Trace:
    """Run `model` once on `example_inputs` and report its residual adds; arguments and errors as for `record`."""
    graph = record(model, example_inputs, peaks)
    matrices = frozenset(name for name, parameter in model.named_parameters() if parameter.ndim >= 2)
    found = Trace(graph, matrices)
    found.adds += [add for add in map(_Judge(found).judge, graph.sums) if add is not None]
    _tell_composites(found)
    _tell_inner(found)
    return found


class _Judge:
    def __init__(self, found: Trace) -> None:
        self.graph, self.matrices = found.graph, found.matrices
        self.streams: set[int] = set()  # sums of residual adds
        self.added: defaultdict[tuple[str, tuple[str, ...]], set[int]] = defaultdict(set)  # operands so far, by site

    def judge(self, total: Sum) -> ResidualAdd | None:
        add = self._residual(total)
        self.added[total.site].update(n for operand in total.operands for n in self.graph.same(operand))
        return add

    def _residual(self, total: Sum) -> ResidualAdd | None:
        for s, b in self._pairs(total):
            stream, branch = total.operands[s], total.operands[b]
            root, gated = self._root(stream, branch, total.fused), total.scaled[s]
            if root is None and len(total.operands) <= 3:
                root, gated = self._scaled_root(stream, branch), True
            if root is None:
                continue
            way = self.graph.way(root, branch) if root != branch else [branch]
            learned = frozenset[str]().union(*(self.graph.nodes[n].parameters for n in way))
            if total.fused:
                learned |= self.graph.nodes[total.node].parameters
            if not learned & self.matrices:
                continue
            if not self.graph.nodes[root].data and (root in self.added[total.site] or self.streams & set(way)):
                continue  # a table or a bias has become an ancestor of everything by the second visit
            return self._add(total, s, b, frozenset(way), learned, gated)
        return None

    @staticmethod
    def _pairs(total: Sum) -> list[tuple[int, int]]:
        """Which operand could be the stream, which the branch: an operation that adds on its own adds to its first."""
        places = range(len(total.operands))
        streams = [0] if total.fused and total.name != "sum" and "::" not in total.name else places
        return [(s, b) for s in streams for b in places if s != b]

    def _add(
        self, total: Sum, s: int, b: int, way: frozenset[int], learned: frozenset[str], gated: bool
    ) -> ResidualAdd:
        stream, branch = total.operands[s], total.operands[b]
        inside = not total.fused and any(n in self.streams for n in self.graph.same(branch))
        kind: Kind = "composite" if inside else "gated" if gated else "fused" if total.fused else "leaf"
        if kind in {"leaf", "composite"} and not gated:
            self.graph.nodes[total.node].repeats = branch if inside else stream
        self.streams.add(total.node)
        return ResidualAdd(
            kind,
            total.source,
            total.container,
            stream,
            branch,
            total.node,
            way,
            learned,
            b,
            total.occurrence,
            followed=total.gradient[s] if total.gradient else True,
            peak=total.peaks[b] if total.peaks else float("nan"),
        )

    def _root(self, stream: int, branch: int, fused: bool) -> int | None:
        same = self.graph.same(stream)
        return next((x for x in same if self.graph.precedes(x, branch) or (fused and x == branch)), None)

    def _scaled_root(self, stream: int, branch: int) -> int | None:
        """An ancestor of the branch that reaches the other operand elementwise: a skip with a gate on it."""
        for node in self._elementwise(stream):
            if self.graph.nodes[node].data and self.graph.precedes(node, branch):
                return node
        return None

    def _elementwise(self, number: int) -> Iterator[int]:
        queue, seen = [number], set[int]()
        while queue and len(seen) < 64:
            number = queue.pop(0)
            if number not in seen:
                seen.add(number)
                yield number
                node = self.graph.nodes[number]
                if node.op in ELEMENTWISE and number not in self.streams:
                    queue += [n for alternative in node.proportional_to for n in alternative]
                elif node.repeats is not None:
                    queue.append(node.repeats)


def _tell_composites(found: Trace) -> None:
    """A branch that runs through its own site again holds the stream: the add injects something into it."""
    totals = {add.total: add for add in found.adds}
    sites = {add.site for add in found.adds if add.kind == "composite"}
    for add in [*found.of("leaf"), *found.of("gated")]:
        if any(totals[n].site == add.site for n in add.way & totals.keys()):
            sites.add(add.site)
    for add in found.adds:
        if add.site in sites and add.kind in {"leaf", "gated"}:
            add.kind = "composite"


def _tell_inner(found: Trace) -> None:
    """An add is inner if all that is made of its sum ends in one leaf's branch."""
    users = {add.total: found.graph.users(add.total) for add in found.adds}
    inner: set[int] = set()
    for leaf in reversed(found.of("leaf")):
        if leaf.total in inner:
            continue
        for add in found.adds:
            if add.total in leaf.way and users[add.total] <= leaf.way | {leaf.total}:
                inner.add(add.total)
                add.kind = "inner"
