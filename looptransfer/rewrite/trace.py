"""The residual adds among the additions of a forward, and their kinds.

A residual add is `a + b` where some x reaches a by identity operations only, and b on a way on which learned matrices
act: a is the stream, b the branch. Without the matrices an activation that is written out, a manual norm or RoPE would
qualify. The way must not lead through another residual branch: values that are made once and added in every attention
come round to themselves only by way of the stream.

    x = embed(ids)
    for _ in range(2):
        x = x + f(norm(x))          two leaves: root and stream x, path norm → f, matrices {f.weight}
        x = x + e                   no residual add: e comes from no x on the stream
    y = x + g(norm(x) + norm(x))    a leaf; the addition inside g's argument has no matrix on either side

Candidates are judged together, again and again until none changes: whether one is a branch depends on which others are.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from looptransfer.rewrite.forward import ExampleInputs
from looptransfer.rewrite.graph import Graph, Site, Sum
from looptransfer.rewrite.order import Order
from looptransfer.rewrite.paths import ZEROS, Paths
from looptransfer.rewrite.record import record
from looptransfer.rewrite.recurrence import Rerun, runs_over_time

# leaf: the branch is to be scaled. composite: the branch holds the stream itself (an input injection, a long skip).
# inner: it stands alone inside a leaf's branch and never becomes the stream. time: a recurrence over time, not depth.
# fixed: the branch has no learned matrix. frozen: nothing in or before the branch is trained.
Kind = Literal["leaf", "composite", "inner", "time", "fixed", "frozen"]


@dataclass
class ResidualAdd:
    """One execution of one residual add."""

    kind: Kind
    site: Site
    occurrence: int  # which run of its site
    total: int  # the node of the sum
    stream: int
    branch: int
    position: int  # which operand of the addition is the branch
    root: int  # what the stream and the branch both come from
    path: frozenset[int]  # the nodes from there to the branch
    recorded: bool = True  # autograd was on
    followed: bool = True  # a gradient gets there
    named: bool = False  # the user marked all that is added
    begun: int = -1  # the sum of the first add of those it stands in one sum with, as x + a(h) + b(h), itself included
    within: int | None = None  # the sum of the leaf in whose branch it makes a stream of its own
    matrices: frozenset[str] = frozenset()  # those that act in the branch, outside the branches inside it
    last: frozenset[str] = frozenset()  # those of them that no other comes after


@dataclass
class Trace:
    """One forward, and its residual adds in the order they ran."""

    graph: Graph
    adds: list[ResidualAdd] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)  # the sum of an add -> what it is identical to but for it

    @functools.cached_property
    def by_total(self) -> dict[int, ResidualAdd]:
        """The adds by the node of their sum."""
        return {add.total: add for add in self.adds}

    def of(self, kind: Kind) -> list[ResidualAdd]:
        """The adds of one kind."""
        return [add for add in self.adds if add.kind == kind]

    def inside(self, add: ResidualAdd) -> list[ResidualAdd]:
        """The adds whose sums lie in the branch of one, in the order they ran."""
        return [self.by_total[n] for n in sorted(add.path & self.by_total.keys()) if n != add.total]

    def proportional(self, add: ResidualAdd) -> list[int]:
        """The nodes that a branch is proportional to, inside it, from the add backwards, no further than its marks."""
        queue, seen = [add.branch], dict[int, None]()
        while queue:
            number = queue.pop(0)
            if number in add.path and number not in seen:
                seen[number] = None
                if add.named and number in self.graph.marked:
                    continue
                queue += [n for alternative in self.graph.scaling(number) for n in alternative]
        return list(seen)

    def chains(self) -> list[list[ResidualAdd]]:
        """The leaves, together where their branches end in the same learned tensors."""
        chains: defaultdict[frozenset[str], list[ResidualAdd]] = defaultdict(list)
        for add in self.of("leaf"):
            chains[add.last].append(add)
        return list(chains.values())

    def marked(self, add: ResidualAdd) -> bool:
        """The user marked what is added there."""
        return any(h.mark is not None for n in self.proportional(add) for h in self.graph.nodes[n].handles)

    def same(self, number: int) -> Iterator[int]:
        """A node and those it is identical to but for branches and constants added, the nearest first."""
        step: int | None = number
        while step is not None:
            yield step
            step = self.streams[step] if step in self.streams else self.graph.same_but_constants(step)

    def origin(self, number: int, seen: set[int]) -> int | None:
        """The oldest node that one is identical to; None where the way there was seen before. Adds to what was seen."""
        oldest: int | None = None
        for n in self.same(number):
            if n in seen:
                return None
            seen.add(n)
            oldest = n
        return oldest


def trace(model: nn.Module, example_inputs: ExampleInputs, **options: Any) -> Trace:
    """Run `model` once on `example_inputs` and report its residual adds; options and errors as for `record`."""
    forward = _find_adds(record(model, example_inputs, **options))
    for add in forward.adds:
        add.last = forward.graph.matrices_on(_last(forward, add))
    _mark_time(forward, lambda change, watch: record(model, example_inputs, change=change, watch=watch, seed=0).watched)
    _mark_frozen(forward)
    _mark_composites(forward)
    _mark_nested(forward)
    _note_matrices(forward)
    _note_begun(forward)
    forward.adds += _fixed_adds(forward)
    return forward


# -- adds


def _find_adds(graph: Graph) -> Trace:
    """Candidates first; each is then judged with the branches of all others cut, anew until nothing changes."""
    refused, composite, again = set[int](), set[int](), set[Site]()
    while True:
        forward = _candidates(graph, refused, composite, again)
        injecting = {add.site for add in forward.adds if add.named and _runs_through_itself(forward, add)}
        if injecting:
            again |= injecting  # h = e + A(h) injects e, whoever marks A
            continue
        cut = {add.total: add.stream for add in forward.of("leaf")}
        paths = Paths(graph, cut, frozenset(add.total for add in forward.adds), zeros_carry=True)
        carried = {
            add.total
            for add in forward.of("leaf")
            if not add.named and paths.skips(add.root, add.branch) and not paths.acts(add.root, add.branch)
        }
        roundabout = set() if carried else _roundabout(forward, paths)
        if not carried and not roundabout:
            return forward
        composite |= carried  # what comes round is identical to the stream: an input injection, a long skip
        refused |= roundabout


def _candidates(graph: Graph, refused: set[int], composite: set[int], again: set[Site]) -> Trace:
    forward = Trace(graph)
    added: defaultdict[Site, set[int]] = defaultdict(set)  # operands so far
    for total in graph.sums:
        if total.node in refused:
            add = None
        else:
            add = _candidate(forward, total, added[total.site], may_be_named=total.site not in again)
        if add is not None:
            add.kind = "composite" if add.total in composite else add.kind
            forward.adds.append(add)
            forward.streams[add.total] = add.branch if add.kind == "composite" else add.stream
        for operand in total.operands:
            forward.origin(operand, added[total.site])
    return forward


def _candidate(forward: Trace, total: Sum, added: set[int], may_be_named: bool) -> ResidualAdd | None:
    graph = forward.graph
    if not graph.is_live(total.node) or len(graph.nodes[total.node].slices) > len(set(total.operands)):
        return None  # it is read by nothing, or adds parts of one tensor
    for s, b in ((0, 1), (1, 0)):
        stream, branch = total.operands[s], total.operands[b]
        root = next((n for n in forward.same(stream) if graph.precedes(n, branch)), None)
        if root is None or total.signs[s] != 1:
            continue
        named = may_be_named and _is_named(graph, root, branch)
        held = not named and _holds_stream(forward, branch, root)
        path = frozenset() if held else frozenset(graph.between(root, branch))
        if not held and (not graph.matrices_on(path) or _share(graph, branch, root) == -total.signs[b]):
            continue  # in x + (q - x) nothing is left of x
        if graph.nodes[root].data:
            if not total.whole[s]:
                continue  # a statistic that is spread over what it was taken from
        elif root in added or (forward.streams.keys() & path and graph.nodes[root].op.name not in ZEROS):
            continue  # a table or a bias has become an ancestor of everything by the second visit
        elif graph.nodes[root].weights_of & graph.matrices_on(path):
            continue  # a weight that is stepped, as in training at test time
        kind: Kind = "composite" if held else "leaf"
        return ResidualAdd(
            kind,
            total.site,
            total.occurrence,
            total.node,
            stream,
            branch,
            b,
            root,
            path,
            total.recorded,
            total.followed,
            named,
        )
    return None


def _is_named(graph: Graph, root: int, branch: int) -> bool:
    """A branch scales with what the user marked on its way, and with nothing beside it."""
    if not graph.marked:
        return False
    named = set[int]()
    for n in graph.between(root, branch):
        if n in graph.marked or (named and any(named.issuperset(sources) for sources in graph.scaling(n))):
            named.add(n)
    return branch in named


def _runs_through_itself(forward: Trace, add: ResidualAdd) -> bool:
    return any(add.site == other.site for other in forward.inside(add))


def _holds_stream(forward: Trace, branch: int, root: int) -> bool:
    """A branch is a stream itself, and one that did not begin inside it."""
    chain = list(forward.same(branch))
    begun = chain[-1] != root and forward.graph.precedes(root, chain[-1])
    return any(n in forward.streams for n in chain) and not (
        begun and forward.graph.matrices_on(forward.graph.between(root, chain[-1]))
    )


def _share(graph: Graph, number: int, part: int) -> float:
    """The factor with which one node is in another that is a sum."""
    if number == part:
        return 1.0
    node = graph.nodes[number]
    if number < part or node.op.relation not in {"sum", "same"}:
        return 0.0
    weights = node.signs or (1.0,) * len(node.sources)
    return sum(weight * _share(graph, s, part) for s, weight in zip(node.sources, weights, strict=False))


def _roundabout(forward: Trace, paths: Paths) -> set[int]:
    """The sums of leaves whose branch comes from their stream only by way of other branches.

    They stay where the stream is one, by another add or since the model reads it: two streams may be each other's only
    source. An accumulator of single numbers (a halting probability, a clock) is no stream of the model.
    """
    leaves = forward.of("leaf")
    direct = [add for add in leaves if paths.acts(add.root, add.branch)]
    indirect = [add for add in leaves if not add.named and not paths.acts(add.root, add.branch)]

    def on_a_stream(add: ResidualAdd) -> bool:
        return any(paths.skips(d.total, add.stream) or paths.skips(add.total, d.stream) for d in direct)

    def is_read(add: ResidualAdd) -> bool:
        numbers = [forward.graph.nodes[n].shape for n in _last(forward, add)]
        wide = any(shape and shape[-1] > 1 for shape in numbers)
        return wide and bool(paths.live >> add.total & 1)

    return {add.total for add in indirect if not on_a_stream(add) and not is_read(add)}


def _last(forward: Trace, add: ResidualAdd) -> frozenset[int]:
    """The nodes on a branch's way where matrices of its own act and no other comes after."""
    graph = forward.graph
    last, queue, seen = set[int](), [add.branch], set[int]()
    while queue:
        number = queue.pop()
        if number in seen or number not in add.path:
            continue
        seen.add(number)
        if graph.nodes[number].matrices:
            last.add(number)
        else:
            queue += [forward.streams[number]] if number in forward.streams else graph.nodes[number].sources
    return frozenset(last)


# -- kinds


def _mark_frozen(forward: Trace) -> None:
    """A teacher, or a backbone before anything that is trained: no gradient comes to the matrices, nor through them."""

    def names(add: ResidualAdd) -> frozenset[str]:
        return frozenset[str]().union(*(forward.graph.nodes[n].parameters for n in add.path))

    followed = [add for add in forward.of("leaf") if add.followed]
    trained = frozenset[str]().union(*map(names, followed))
    for add in forward.of("leaf") if followed else []:
        if not add.followed and not names(add) & trained:  # a visit under no_grad has its twin under autograd
            add.kind = "frozen"


def _mark_composites(forward: Trace) -> None:
    """A branch that runs through itself again, as in h = e + A(h), holds the stream: the add injects something."""
    again: set[int] = set()
    for add in forward.of("leaf"):
        inside = [
            other.total
            for other in forward.inside(add)
            if other.kind == "leaf" and other.site == add.site and other.last & add.last
        ]
        again |= {add.total, *inside} if inside else set()
    for add in forward.adds:
        if add.total in again:
            add.kind = "composite"
            forward.streams[add.total] = add.branch


def _mark_nested(forward: Trace) -> None:
    """Settle what becomes of residual adds inside the branch of another one.

    A stream that only passes through is not nested. An add that stands alone there and feeds nothing else is part of
    that branch: inner. Adds that follow each other make a stream of their own and are leaves; the outer add is one too
    if a matrix of its own comes after them, and else only hands that stream on: composite.
    """
    followers: defaultdict[int | None, list[ResidualAdd]] = defaultdict(list)
    for add in forward.adds:
        before = next((n for n in forward.same(add.stream) if n in forward.by_total), None)
        followers[before].append(add)
    for outer in forward.of("leaf"):
        inside = [add for add in forward.inside(outer) if feeds_only(forward, add.total, outer)]
        closed = set[int]()  # those on whose stream nothing is added but in this branch
        for add in reversed(inside):
            if all(later.total in closed for later in followers[add.total]):
                closed.add(add.total)
        stream = [add for add in _streams_begun(forward, outer, inside) if add.total in closed]
        if any(_follows(forward, a, b) for a, b in pairwise(stream)):
            _mark_stream_within(forward, outer, inside, stream)
        elif outer.kind == "leaf":
            for add in stream:
                add.kind = "inner"
        for add in inside:
            if add.kind in {"composite", "time"} and outer.kind == "leaf":
                add.kind = "inner"


def _mark_stream_within(
    forward: Trace, outer: ResidualAdd, inside: list[ResidualAdd], stream: list[ResidualAdd]
) -> None:
    """Note that a branch holds a stream of its own, and whether it only hands that on."""
    within = frozenset[int]().union(*(add.path for add in inside))
    after = [n for n in outer.path - within if any(forward.graph.precedes(add.total, n) for add in stream)]
    if not outer.named and not forward.graph.matrices_on(after):
        outer.kind = "composite"
        forward.streams[outer.total] = outer.branch
    else:
        for add in stream:
            add.within = outer.total


def feeds_only(forward: Trace, number: int, outer: ResidualAdd) -> bool:
    """All that is made of a node goes into one branch."""
    queue, seen = [number], set[int]()
    while queue:
        users = forward.graph.users(queue.pop()) - seen - {outer.total}
        if not users <= outer.path:
            return False
        seen |= users
        queue += users
    return True


def _streams_begun(forward: Trace, outer: ResidualAdd, inside: list[ResidualAdd]) -> list[ResidualAdd]:
    """The leaves among adds in a branch whose stream begins there, or is the outer one's own."""
    begun_at = {add.total for add in inside if add.kind != "leaf"} | {outer.root}
    begun = []
    for add in inside:
        met = next(
            (n for n in forward.same(add.stream) if n in begun_at or n in forward.by_total or n not in outer.path), None
        )
        if add.kind == "leaf" and (met is None or met in begun_at):
            begun.append(add)
            begun_at.add(add.total)
    return begun


def _follows(forward: Trace, first: ResidualAdd, then: ResidualAdd) -> bool:
    """The second adds to the stream that the first added to, possibly normalised between."""
    if first.total in itertools.takewhile(lambda n: n >= first.total, forward.same(then.stream)):
        return True
    if not forward.graph.precedes(first.total, then.stream):
        return False
    return not forward.graph.matrices_on(forward.graph.between(first.total, then.stream))


def _note_matrices(forward: Trace) -> None:
    """Note the matrices of every branch, without those that act in the branches inside it.

    A branch that has none besides is told from others by those inside, under names that are not theirs.
    """
    for add in forward.adds:
        within = frozenset[int]().union(*(inner.path for inner in forward.inside(add) if inner.kind == "leaf"))
        inside = (f"{name} within" for name in forward.graph.matrices_on(add.path))
        add.matrices = forward.graph.matrices_on(add.path - within) or frozenset(inside)


def _note_begun(forward: Trace) -> None:
    """Note which adds stand in one sum: what a later one adds does not depend on the earlier ones."""
    for add in forward.adds:
        before = next((forward.by_total[n] for n in forward.graph.same(add.stream) if n in forward.by_total), add)
        beside = before is not add and not forward.graph.precedes(before.begun, add.branch)
        add.begun = before.begun if beside else add.total


def _fixed_adds(forward: Trace) -> list[ResidualAdd]:
    """The adds to the stream without a learned matrix, as a Fourier transform or a pooling is."""
    nodes = forward.graph.nodes
    sums = {total.node: total for total in forward.graph.sums if total.node not in forward.by_total}
    fixed: dict[int, ResidualAdd] = {}
    seen = set[int]()
    for leaf in forward.of("leaf"):
        start: int | None = leaf.stream
        while start is not None and (start := forward.origin(start, seen)) is not None:
            if nodes[start].op.relation == "norm":
                start = next((n for n in nodes[start].sources if nodes[n].data), None)
            elif start in sums.keys() - fixed.keys():
                add = _fixed(forward, sums[start])
                if add is not None:
                    fixed[start] = add
                    forward.streams[start] = add.stream
                start = add.stream if add is not None else None
            else:
                start = None
    return list(fixed.values())


def _is_scaled(graph: Graph, number: int, part: int) -> bool:
    """A node is another one, multiplied."""
    while number > part and graph.nodes[number].op.pointwise and [len(a) for a in graph.scaling(number)] == [1]:
        number = graph.scaling(number)[0][0]
    return number == part


def _fixed(forward: Trace, total: Sum) -> ResidualAdd | None:
    """A sum of a stream and something as large that is made of it, whatever acts on the way."""
    for s, b in ((0, 1), (1, 0)):
        stream, branch = total.operands[s], total.operands[b]
        root = next((n for n in forward.same(stream) if forward.graph.precedes(n, branch)), None)
        if root is None or _share(forward.graph, branch, root) or _is_scaled(forward.graph, branch, root):
            continue  # an injection, or x + (q - x)
        if forward.graph.nodes[root].data and all(total.whole) and total.signs[s] == 1:
            path = frozenset(forward.graph.between(root, branch))
            return ResidualAdd("fixed", total.site, total.occurrence, total.node, stream, branch, b, root, path)
    return None


def _mark_time(forward: Trace, again: Rerun) -> None:
    """A recurrence over time. All adds of a chain are of one kind, also where the chain begins anew in every loop."""
    order = Order(forward.graph, {add.total: (add.stream, add.branch) for add in forward.of("leaf")}, again)
    for adds in forward.chains():
        chain = [add.total for add in adds]
        if runs_over_time(forward.graph, chain, again, functools.partial(order.follows, among=frozenset(chain))):
            for add in adds:
                add.kind = "time"
