"""Which additions of a forward are residual adds, and of which kind.

A residual add is `a + b` where some x reaches a by identity operations only, x is an ancestor of b, the shapes agree
and learned matrices act on the way from x to b: a is the stream, b the branch. Without the matrices an activation that
is written out, a manual norm or RoPE would qualify.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from looptransfer.rewrite.graph import Graph, Site, Sum, bits
from looptransfer.rewrite.record import ExampleInputs, record

Kind = Literal["leaf", "composite", "inner", "gated", "fused", "time", "read-out", "fixed"]
NORMS = {
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "_fused_rms_norm",
    "rsqrt",
    "sqrt",
    "var",
    "std",
}
NORMS |= {"linalg_vector_norm", "_native_batch_norm_legit", "var_mean", "cudnn_batch_norm"}
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
    inner: it stands alone inside a leaf's branch and never becomes the stream. gated: the skip is scaled. fused: the
    branch is computed by the very operation that adds it. time: a recurrence over time, not depth. read-out: a sum
    of states that does not come back into the stream. fixed: the branch has no learned matrix.
    """

    kind: Kind
    site: Site
    stream: int
    branch: int
    total: int
    way: frozenset[int]  # the nodes from the stream to the branch
    parameters: frozenset[str]  # those that enter on that way, outside the branches inside it
    matrices: frozenset[str]  # those of them that act as matrices
    roots: frozenset[int] = frozenset()  # what the stream and the branch both come from
    position: int = 1  # which operand of the addition is the branch
    occurrence: int = 0  # which run of its site
    recorded: bool = True  # autograd was on
    within: int | None = None  # the sum of the leaf in whose branch it makes a stream of its own
    peak: float = float("nan")  # max |branch|, where it was asked for


@dataclass
class Trace:
    """What one forward did, and its residual adds in the order they ran."""

    graph: Graph
    adds: list[ResidualAdd] = field(default_factory=list)

    def matrices_on(self, nodes: Iterable[int]) -> frozenset[str]:
        """The matrices that act at these nodes."""
        return frozenset[str]().union(*(self.graph.nodes[n].matrices for n in nodes))

    @functools.cached_property
    def by_total(self) -> dict[int, ResidualAdd]:
        """The adds by the node of their sum."""
        return {add.total: add for add in self.adds}

    def inside(self, add: ResidualAdd) -> list[ResidualAdd]:
        """The adds whose sums lie in the branch of one, in the order they ran."""
        return [self.by_total[n] for n in sorted(add.way & self.by_total.keys()) if n != add.total]

    def of(self, kind: Kind) -> list[ResidualAdd]:
        """The adds of one kind."""
        return [add for add in self.adds if add.kind == kind]


def trace(model: nn.Module, example_inputs: ExampleInputs, **options: Any) -> Trace:
    """Run `model` once on `example_inputs` and report its residual adds; options and errors as for `record`."""
    found = Trace(record(model, example_inputs, **options))
    found.adds += [add for add in map(_Judge(found).judge, found.graph.sums) if add is not None]
    _tell_time(found)
    _tell_gated(found)
    _tell_composites(found)
    _tell_nested(found)
    _tell_read_outs(found)
    _note_parameters(found)
    found.adds += _fixed_adds(found)
    return found


Reading = tuple[ResidualAdd, list[int]]  # an add, and the offsets at which it reads a part of something


class _Judge:
    def __init__(self, found: Trace) -> None:
        self.found, self.graph = found, found.graph
        self.streams: set[int] = set()  # sums of residual adds
        self.added: defaultdict[Site, set[int]] = defaultdict(set)  # operands so far

    def judge(self, total: Sum) -> ResidualAdd | None:
        add = self._residual(total)
        self.added[total.site].update(n for operand in total.operands for n in self.graph.same(operand))
        return add

    def _residual(self, total: Sum) -> ResidualAdd | None:
        for s, b in self._pairs(total):
            if not total.whole[s]:
                continue
            stream, branch = total.operands[s], total.operands[b]
            root, gated = self._root(stream, branch, total.fused), total.scaled[s]
            if root is None and len(total.operands) <= 3:
                root, gated = self._scaled_root(stream, branch), True
            if root is None:
                continue
            way = self.graph.way(root, branch) if root != branch else [branch]
            if not self.found.matrices_on([*way, total.node] if total.fused else way):
                continue
            if not self.graph.nodes[root].data and (root in self.added[total.site] or self.streams & set(way)):
                continue  # a table or a bias has become an ancestor of everything by the second visit
            add = self._add(total, s, b, frozenset(way), gated)
            add.roots = frozenset([root])
            return add
        return None

    def fixed(self, total: Sum) -> ResidualAdd | None:
        """A sum of a stream and something as large that is made of it, whatever acts on the way."""
        for s, b in self._pairs(total):
            root = self._root(total.operands[s], total.operands[b], total.fused)
            if root is not None and self.graph.nodes[root].data and all(total.whole[:2]) and not any(total.scaled):
                add = self._add(total, s, b, frozenset(self.graph.way(root, total.operands[b])), gated=False)
                add.kind = "fixed"
                return add
        return None

    @staticmethod
    def _pairs(total: Sum) -> list[tuple[int, int]]:
        """Which operand could be the stream, which the branch: an operation that adds on its own adds to its first."""
        places = range(len(total.operands))
        streams = [0] if total.fused and total.name != "sum" and "::" not in total.name else places
        return [(s, b) for s in streams for b in places if s != b]

    def _add(self, total: Sum, s: int, b: int, way: frozenset[int], gated: bool) -> ResidualAdd:
        stream, branch = total.operands[s], total.operands[b]
        inside = not total.fused and any(n in self.streams for n in self.graph.same(branch))
        kind: Kind = "composite" if inside else "gated" if gated else "fused" if total.fused else "leaf"
        if kind in {"leaf", "composite"} and not gated:
            self.graph.nodes[total.node].repeats = branch if inside else stream
        self.streams.add(total.node)
        return ResidualAdd(
            kind,
            total.site,
            stream,
            branch,
            total.node,
            way,
            frozenset(),
            frozenset(),
            frozenset(),
            b,
            total.occurrence,
            recorded=total.recorded,
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
                elif node.repeats is not None and number not in self.streams:
                    queue.append(node.repeats)


def _tell_time(found: Trace) -> None:
    """A recurrence over time: one add after the other reads another slice of the same input."""
    sites: defaultdict[Site, list[ResidualAdd]] = defaultdict(list)
    for add in found.of("leaf"):
        sites[add.site].append(add)
    begun = _slices_begun(found)
    for adds in sites.values():
        for read in (_slices_read, lambda _, add: begun[add.total]):
            parts = [read(found, add) for add in adds] if len(adds) > 1 else []
            for source in {source for one in parts for source, _ in one}:
                reading = [
                    (add, [offset for s, offset in one if s == source])
                    for add, one in zip(adds, parts, strict=True)
                    if any(s == source for s, _ in one)
                ]
                times = Counter(offset for _, offsets in reading for offset in offsets)
                apart = len(reading) > 1 and max(times.values()) == 1
                if apart and all(_in_time(found, source, *both) for both in pairwise(reading)):
                    for add, _ in reading:
                        add.kind = "time"


def _in_time(found: Trace, source: int, now: Reading, then: Reading) -> bool:
    """One add is computed from an earlier one, which did not know what it reads: no halves of a stream that swap."""
    known = {offset for n in now[0].way for s, offset in found.graph.nodes[n].slices if s == source}
    return found.graph.precedes(now[0].total, then[0].total) and not known & set(then[1])


def _tell_gated(found: Trace) -> None:
    """Skips that are scaled after the add: (x + f(x))/2, and lerp written as f + z·(x - f)."""
    nodes, leaves = found.graph.nodes, {add.total: add for add in found.of("leaf")}
    for add in list(leaves.values()):
        number, factor, masked = add.stream, 1.0, False
        while number not in leaves and [len(way) for way in nodes[number].proportional_to] == [1]:
            factor *= nodes[number].factor if nodes[number].even else 1.0
            masked |= nodes[number].masked
            number = nodes[number].proportional_to[0][0]
        if number in leaves and not masked and abs(factor - 1) > 1e-6:
            add.kind = leaves[number].kind = "gated"
    for total in found.graph.sums:
        for place, operand in enumerate(total.operands if len(total.operands) == 2 else ()):
            scaled = [n for way in nodes[total.operands[1 - place]].proportional_to for n in way]
            difference = next((leaves[n] for n in scaled if n in leaves and nodes[n].op == "sub"), None)
            if difference is not None and operand in found.graph.same(difference.branch):
                difference.kind, difference.site = "gated", total.site


def _slices_read(found: Trace, add: ResidualAdd) -> frozenset[tuple[int, int]]:
    """Which parts of which data a branch reads that do not come from its stream."""
    nodes, graph = found.graph.nodes, found.graph
    fresh = {s for n in add.way for s in nodes[n].sources if s not in add.way and s != add.stream and nodes[s].data}
    fresh = {s for s in fresh if not graph.precedes(add.stream, s)}
    own = {one for n in add.way for one in nodes[n].slices if one[0] in fresh}
    return frozenset(own | {one for s in fresh for one in nodes[s].slices if nodes[one[0]].data})


def _slices_begun(found: Trace) -> dict[int, frozenset[tuple[int, int]]]:
    """Which parts of which data the stream of each add begins with, other than through an earlier add; by its sum."""
    nodes, begun = found.graph.nodes, {}
    sliced = functools.reduce(lambda mask, n: mask | 1 << n, (n for n, node in enumerate(nodes) if node.slices), 0)
    earlier = 0
    for add in found.adds:
        chain = [add.total, *found.graph.same(add.stream)]
        own = functools.reduce(lambda mask, n: mask | 1 << n, chain, nodes[chain[-1]].ancestors) & ~earlier
        read = {one for n in bits(own & sliced) for one in nodes[n].slices}
        begun[add.total] = frozenset(one for one in read if nodes[one[0]].data)
        earlier |= nodes[add.total].ancestors | 1 << add.total
    return begun


def _tell_composites(found: Trace) -> None:
    """A branch that runs through its own site again holds the stream: the add injects something into it."""
    again = {add.site for add in found.adds if add.kind == "composite"}
    for add in [*found.of("leaf"), *found.of("gated")]:
        mine = found.matrices_on(add.way)
        if any(one.site == add.site and found.matrices_on(one.way) & mine for one in found.inside(add)):
            again.add(add.site)
    for add in found.adds:
        if add.site in again and add.kind in {"leaf", "gated"}:
            add.kind = "composite"
            found.graph.nodes[add.total].repeats = add.branch


def _tell_nested(found: Trace) -> None:
    """What becomes of residual adds inside the branch of another one.

    A stream that only passes through is not nested. An add that stands alone there and feeds nothing else is part of
    that branch: inner. Adds that follow each other make a stream of their own and are leaves; the outer add is one too
    if a matrix of its own comes after them, and else only hands that stream on: composite.
    """
    users = {add.total: found.graph.users(add.total) for add in found.adds}
    followers: defaultdict[int, list[ResidualAdd]] = defaultdict(list)
    for add in found.adds:
        for n in found.graph.same(add.stream):
            followers[n].append(add)
    for outer in found.of("leaf"):
        inside = [add for add in found.inside(outer) if users[add.total] <= outer.way | {outer.total}]
        stream = [
            add
            for add in _streams_begun(found, outer, inside)
            if all(any(later is one for one in inside) for later in followers[add.total])
        ]
        if any(_follows(found, a, b) for a, b in pairwise(stream)):
            within = frozenset[int]().union(*(add.way for add in inside))
            after = [n for n in outer.way - within if any(found.graph.precedes(add.total, n) for add in stream)]
            if not found.matrices_on(after):
                outer.kind = "composite"
                found.graph.nodes[outer.total].repeats = outer.branch
            else:
                for add in stream:
                    add.within = outer.total
        elif outer.kind == "leaf":
            for add in stream:
                add.kind = "inner"
        for add in inside:
            if add.kind in {"gated", "time", "fused", "composite"} and outer.kind == "leaf":
                add.kind = "inner"


def _streams_begun(found: Trace, outer: ResidualAdd, inside: list[ResidualAdd]) -> list[ResidualAdd]:
    """The leaves among adds in a branch whose stream begins there, or is the outer one's own."""
    own = {add.total for add in inside if add.kind != "leaf"} | outer.roots
    begun = []
    for add in inside:
        chain = found.graph.same(add.stream)
        met = next((n for n in chain if n in own or n in found.by_total or n not in outer.way), None)
        if add.kind == "leaf" and (met is None or met in own):
            begun.append(add)
            own.add(add.total)
    return begun


def _tell_read_outs(found: Trace) -> None:
    """A weighted sum of states beside the stream, as in halting, has the form of a gate and leads nowhere."""
    leaves = found.of("leaf")
    states = {n for leaf in leaves for n in (leaf.total, *found.graph.same(leaf.stream))}
    for add in found.of("gated"):
        if add.roots & states and not any(found.graph.precedes(add.total, leaf.total) for leaf in leaves):
            add.kind = "read-out"


def _fixed_adds(found: Trace) -> list[ResidualAdd]:
    """What is added to the stream without a learned matrix, as a Fourier transform or a pooling is."""
    nodes, known = found.graph.nodes, {add.site for add in found.adds}
    sums = {total.node: total for total in found.graph.sums if total.site not in known}
    fixed: dict[int, ResidualAdd] = {}
    for leaf in found.of("leaf"):
        start: int | None = leaf.stream
        while start is not None:
            *_, start = found.graph.same(start)
            if nodes[start].op in NORMS:
                start = next((n for n in nodes[start].sources if nodes[n].data), None)
            elif start in sums.keys() - fixed.keys():
                add = _Judge(found).fixed(sums[start])
                fixed |= {start: add} if add is not None else {}
                start = add.stream if add is not None else None
            else:
                start = None
    return list(fixed.values())


def _follows(found: Trace, first: ResidualAdd, then: ResidualAdd) -> bool:
    """The second adds to the stream that the first added to, possibly normalised between."""
    if first.total in found.graph.same(then.stream):
        return True
    if not found.graph.precedes(first.total, then.stream):
        return False
    return not found.matrices_on(found.graph.way(first.total, then.stream))


def _note_parameters(found: Trace) -> None:
    """What acts in a branch is not what acts in the branches inside it."""
    for add in found.adds:
        within = frozenset[int]().union(*(one.way for one in found.inside(add) if one.kind == "leaf"))
        own = add.way - within
        if add.kind == "fused":
            own |= {add.total}
        add.parameters = frozenset[str]().union(*(found.graph.nodes[n].parameters for n in own))
        add.matrices = found.matrices_on(own)
