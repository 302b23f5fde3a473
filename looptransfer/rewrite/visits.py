"""The number of visits to every branch.

N counts a chain of residual adds whose branches are tied: they point the same way because the same weights made them.
One matrix that untied branches share does not do that (the outputs of blocks of their own around it are as far apart as
without it), and a small matrix of each visit's own beside shared ones does not undo it. So two branches are tied where
they have most of their learned numbers in common, on their whole way and where it ends.
"""

from collections import Counter, defaultdict
from itertools import combinations

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.branches import DECLARED, Group
from looptransfer.rewrite.names import module_of, named_parameters, parameter_names
from looptransfer.rewrite.trace import ResidualAdd, Trace

Weights = tuple[frozenset[str], frozenset[str]]  # the matrices of a branch: those on its whole way, those at its end
Branch = tuple[Weights, frozenset[int]]  # and the nodes where they act


class Ties:
    """The ties between branches."""

    def __init__(self, model: nn.Module, forward: Trace, groups: list[Group]) -> None:
        self.forward = forward
        names = {name for group in groups for add in group.adds for name in add.matrices | add.last}
        parts = Counter(name.split("+")[0] for name in names)
        sizes = {name: parameter.numel() for name, parameter in named_parameters(model).items()}
        self.sizes = {n: sizes.get(n.split("+")[0], 1) / parts[n.split("+")[0]] for n in names}
        canonical = parameter_names(model)
        self.weights: dict[int, Weights] = {}
        for group in groups:
            owned = {canonical[id(p)] for p in module_of(model, group.handle.module).parameters()}
            self.weights |= _weights(group, owned)

    def tied(self, these: Weights, those: Weights) -> bool:
        """Most of the learned numbers of the branch that has fewer are the same, on its whole way and where it ends.

        Where a condition is made of the first visit's stream, its map acts in that visit's branch besides.
        """
        return all(self._share(a, b) >= 0.5 for a, b in zip(these, those, strict=True))

    def alike(self, these: list[Branch], those: list[Branch]) -> bool:
        """Each of the first branches is tied to one of the others, or made by the same run of a matrix."""
        return all(any(self.tied(a, b) or runs & other for b, other in those) for a, runs in these)

    def apart(self, group: Group) -> list[Branch]:
        """A group's branch; several where its runs are not tied."""
        kinds: list[Branch] = []
        for add in group.adds:
            weights, runs = self.weights[id(add)], _applied(self.forward, add, self.weights[id(add)])
            if not any(self.tied(weights, other) for other, _ in kinds):
                kinds.append((weights, runs))
        return kinds

    def shared(self, groups: list[Group]) -> tuple[str, ...]:
        """The matrices that act in several branches, by runs of their own, and do not tie them."""
        branches = [branch for group in groups for branch in self.apart(group)]
        loose = [(a, b) for (a, ran), (b, runs) in combinations(branches, 2) if not (ran & runs or self.tied(a, b))]
        return tuple(sorted({name for a, b in loose for name in a[0] & b[0]}))

    def _share(self, these: frozenset[str], those: frozenset[str]) -> float:
        size = min(self._size(these), self._size(those))
        return self._size(these & those) / size if size else float(these == those)

    def _size(self, names: frozenset[str]) -> float:
        return sum(self.sizes[name] for name in names)


def _weights(group: Group, owned: set[str]) -> dict[int, Weights]:
    """The weights of every add of a group, by id.

    Of the module's own matrices, those that act in some visits only come beside those that always act, as experts do.
    """
    always = frozenset[str].intersection(*(add.matrices for add in group.adds))
    if not always or group.handle.mark is not None:
        return {id(add): (add.matrices, add.last) for add in group.adds}
    weights = {}
    for add in group.adds:
        rest = frozenset(name for name in add.matrices | add.last if name.split("+")[0] in owned) - always
        weights[id(add)] = add.matrices - rest, (add.last - rest) or always
    return weights


def count_visits(model: nn.Module, forward: Trace, groups: list[Group]) -> Ties:
    """Set N of every group: the longest chain of residual adds that are tied to its own.

    Tied weights count together, whatever modules hold them; chunks of one stream are no chain. A stream inside a branch
    begins anew at every visit of that branch, and so does its count.

    Raises:
        InputError: one handle hands over branches that are visited differently often.
    """
    ties = Ties(model, forward, groups)
    longest: Counter[Weights] = Counter()
    most = 0
    runs: defaultdict[int | None, list[tuple[Weights, int, int, frozenset[int]]]] = defaultdict(list)
    for add in sorted({id(a): a for g in groups for a in g.adds}.values(), key=lambda add: add.total):
        weights, depth = ties.weights[id(add)], 1
        applied = _applied(forward, add, weights)
        for other, total, length, before in reversed(runs[add.within]):
            if length >= depth and ties.tied(weights, other) and forward.graph.precedes(total, add.total):
                depth = max(depth, length + (not applied <= before))  # one application may serve several branches
                if length == most:
                    break
        longest[weights], most = max(longest[weights], depth), max(most, depth)
        runs[add.within].append((weights, add.total, depth, applied))
    for group in groups:
        owned = {ties.weights[id(add)] for add in group.adds}
        counts = {w: max(n for other, n in longest.items() if ties.tied(w, other)) for w in owned}
        group.visits = max(counts.values(), default=1)
        if len(set(counts.values())) > 1:
            raise _mixed(group, {id(add): counts[ties.weights[id(add)]] for add in group.adds})
    return ties


def _applied(forward: Trace, add: ResidualAdd, weights: Weights) -> frozenset[int]:
    return frozenset(n for n in add.path if forward.graph.nodes[n].matrices & weights[0]) or frozenset([add.total])


def _mixed(group: Group, counts: dict[int, int]) -> InputError:
    lines = {counts[id(add)]: add.site.source for add in group.adds if add.site.source != DECLARED}
    seen = " and ".join(f"{n} times at {line}" for n, line in sorted(lines.items())) or "differently often"
    fix = (
        "give the marks names of their own: looptransfer.residual(…, 'name')"
        if group.handle.mark is not None
        else "give each its own module, or mark them: looptransfer.residual(…, 'name')"
    )
    return InputError(f"{group.handle} hands over different branches, visited {seen}, which one ε cannot serve; {fix}")
