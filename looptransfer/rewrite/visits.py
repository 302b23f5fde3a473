"""The number of visits to every branch.

N counts a chain of residual adds whose branches are tied: they point the same way because the same weights made them.
One matrix that untied branches share does not do that (the outputs of blocks of their own around it are as far apart as
without it), and a small matrix of each visit's own beside shared ones does not undo it. So two branches are tied where
they have most of their learned numbers in common, on their whole way and where it ends.
"""

import functools
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.branches import DECLARED, Group
from looptransfer.rewrite.graph import Graph, Handle
from looptransfer.rewrite.names import module_of, named_parameters, parameter_names
from looptransfer.rewrite.order import Order
from looptransfer.rewrite.recurrence import Rerun
from looptransfer.rewrite.trace import ResidualAdd, Trace

Weights = tuple[frozenset[str], frozenset[str]]  # the matrices of a branch: those on its whole way, those at its end
Branch = tuple[Weights, frozenset[int]]  # and the nodes where they act


@dataclass(frozen=True)
class Added:
    """The weights of one handle's part in one visit."""

    weights: Weights
    together: Weights  # those of the whole sum in which it stands, such as attention and MLP in parallel


class Ties:
    """The ties between branches."""

    def __init__(self, model: nn.Module, forward: Trace, groups: list[Group]) -> None:
        self.forward = forward
        names = {name for group in groups for add in group.adds for name in add.matrices | add.last}
        parts = Counter(name.split("+")[0] for name in names)
        sizes = {name: parameter.numel() for name, parameter in named_parameters(model).items()}
        self.sizes = {n: sizes.get(n.split("+")[0], 1) / parts[n.split("+")[0]] for n in names}
        canonical = parameter_names(model)
        self.weights: dict[tuple[Handle, int], Weights] = {}  # by handle, and the number of its add's sum
        self.sums: dict[int, Weights] = {}
        self.paths: defaultdict[int, frozenset[int]] = defaultdict(frozenset)
        apart = _others(groups)
        for group in groups:
            owned = {canonical[id(p)] for p in module_of(model, group.handle.module).parameters()}
            own = [_without(forward.graph, add, apart[add.total] - group.nodes) for add in group.adds]
            for add, weights in zip(group.adds, _weights(group, own, owned), strict=True):
                self.weights[group.handle, add.total] = weights
                whole = self.sums.get(add.begun, (frozenset(), frozenset()))
                self.sums[add.begun] = whole[0] | weights[0], whole[1] | weights[1]
                self.paths[add.begun] |= add.path

    def added(self, group: Group, add: ResidualAdd) -> Added:
        """The weights of a group's part in one of its adds."""
        return Added(self.weights[group.handle, add.total], self.sums[add.begun])

    def tied(self, these: Weights, those: Weights) -> bool:
        """Most of the learned numbers of the branch that has fewer are the same, on its whole way and where it ends.

        Where a condition is made of the first visit's stream, its map acts in that visit's branch besides.
        """
        return all(self._share(a, b) >= 0.5 for a, b in zip(these, those, strict=True))

    def follow(self, this: Added, that: Added) -> bool:
        """Both are tied, or the sums are in which they stand: a small map of a visit's own goes with what it adapts."""
        sums = this.together, that.together
        return self.tied(this.weights, that.weights) or (sums[0] != sums[1] and self.tied(*sums))

    def alike(self, these: list[Branch], those: list[Branch]) -> bool:
        """Each of the first branches is tied to one of the others, or made by the same run of a matrix."""
        return all(any(self.tied(a, b) or runs & other for b, other in those) for a, runs in these)

    def apart(self, group: Group) -> list[Branch]:
        """A group's branch; several where its runs are not tied."""
        weights = [self.weights[group.handle, add.total] for add in group.adds]
        return self._kinds([(w, self.applied(add.path, w)) for add, w in zip(group.adds, weights, strict=True)])

    def sums_apart(self, group: Group) -> list[Branch]:
        """The sums in which a group's branch stands, those that are tied once."""
        sums = [(self.sums[add.begun], self.paths[add.begun]) for add in group.adds]
        return self._kinds([(weights, self.applied(path, weights)) for weights, path in sums])

    def shared(self, groups: list[Group]) -> tuple[str, ...]:
        """The matrices that act in several branches, by runs of their own, and do not tie them."""
        branches = [branch for group in groups for branch in self.apart(group)]
        loose = [(a, b) for (a, ran), (b, runs) in combinations(branches, 2) if not (ran & runs or self.tied(a, b))]
        return tuple(sorted({name for a, b in loose for name in a[0] & b[0]}))

    def applied(self, path: frozenset[int], weights: Weights) -> frozenset[int]:
        """The nodes on a branch's way where its matrices act."""
        nodes = self.forward.graph.nodes
        return frozenset(n for n in path if nodes[n].matrices & weights[0]) or path

    def _kinds(self, branches: list[Branch]) -> list[Branch]:
        kinds: list[Branch] = []
        for weights, runs in branches:
            if not any(self.tied(weights, other) for other, _ in kinds):
                kinds.append((weights, runs))
        return kinds

    def _share(self, these: frozenset[str], those: frozenset[str]) -> float:
        size = min(self._size(these), self._size(those))
        return self._size(these & those) / size if size else float(these == those)

    def _size(self, names: frozenset[str]) -> float:
        return sum(self.sizes[name] for name in names)


def _others(groups: list[Group]) -> dict[int, set[int]]:
    """The nodes where handles hand branches over, by the sum that they are added in."""
    handed = defaultdict[int, set[int]](set)
    for group in groups:
        for add in group.adds:
            handed[add.total] |= group.nodes
    return handed


def _without(graph: Graph, add: ResidualAdd, others: set[int]) -> Weights:
    """The matrices of a branch without those that act only in what other handles hand over beside it."""
    if others.isdisjoint(add.path):
        return add.matrices, add.last
    queue, seen = [add.branch], set[int]()
    while queue:
        number = queue.pop()
        if number in add.path and number not in seen and number not in others:
            seen.add(number)
            queue += graph.nodes[number].sources
    own = graph.matrices_on(frozenset(seen)) & add.matrices
    return own, (own & add.last) or own


def _weights(group: Group, own: list[Weights], owned: set[str]) -> list[Weights]:
    """The weights of every add of a group.

    Of the module's own matrices, those that act in some visits only come beside those that always act, as experts do.
    """
    always = frozenset[str].intersection(*(matrices for matrices, _ in own))
    if not always or group.handle.mark is not None:
        return own
    weights = []
    for matrices, last in own:
        rest = frozenset(name for name in matrices | last if name.split("+")[0] in owned) - always
        weights.append((matrices - rest, (last - rest) or always))
    return weights


def count_visits(model: nn.Module, forward: Trace, groups: list[Group], again: Rerun) -> Ties:
    """Set N of every group: the longest chain of residual adds that are tied to its own.

    Tied weights count together, whatever modules hold them; chunks of one stream are no chain. A stream inside a branch
    begins anew at every visit of that branch, and so does its count.

    Raises:
        InputError: one handle hands over branches that are visited differently often.
    """
    ties = Ties(model, forward, groups)
    pairs = sorted(((group, add) for group in groups for add in group.adds), key=lambda pair: pair[1].total)
    order = Order(forward.graph, {add.total: (add.stream, add.branch) for _, add in pairs}, again)

    @functools.cache
    def like(added: Added, within: int | None) -> frozenset[int]:
        return frozenset(a.total for g, a in pairs if a.within == within and ties.follow(added, ties.added(g, a)))

    longest: Counter[Added] = Counter()
    most = 0
    runs: defaultdict[int | None, list[tuple[Added, int, int, frozenset[int]]]] = defaultdict(list)
    for group, add in pairs:
        added, depth = ties.added(group, add), 1
        applied = ties.applied(add.path, added.weights)
        for other, total, length, before in reversed(runs[add.within]):
            if length < depth or not ties.follow(added, other):
                continue
            if order.follows(add.total, total, like(added, add.within)):
                depth = max(depth, length + (not applied <= before))  # one application may serve several branches
                if length == most:
                    break
        longest[added], most = max(longest[added], depth), max(most, depth)
        runs[add.within].append((added, add.total, depth, applied))
    for group in groups:
        visited = [ties.added(group, add) for add in group.adds]
        counts = {a: max(n for other, n in longest.items() if ties.follow(a, other)) for a in set(visited)}
        group.visits = max(counts.values(), default=1)
        if len(set(counts.values())) > 1:
            raise _mixed(group, {id(add): counts[a] for add, a in zip(group.adds, visited, strict=True)})
    return ties


def _mixed(group: Group, counts: dict[int, int]) -> InputError:
    lines = {counts[id(add)]: add.site.source for add in group.adds if add.site.source != DECLARED}
    seen = " and ".join(f"{n} times at {line}" for n, line in sorted(lines.items())) or "differently often"
    fix = (
        "give the marks names of their own: looptransfer.residual(…, 'name')"
        if group.handle.mark is not None
        else "give each its own module, or mark them: looptransfer.residual(…, 'name')"
    )
    return InputError(f"{group.handle} hands over different branches, visited {seen}, which one ε cannot serve; {fix}")
