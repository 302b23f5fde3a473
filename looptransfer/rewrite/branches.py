"""The places where each residual branch can be taken hold of."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.graph import Graph, Handle, Site, bits
from looptransfer.rewrite.names import module_of, parameter_names
from looptransfer.rewrite.trace import ResidualAdd, Trace, feeds_only

DECLARED = "declared"  # the source of a branch that only the user knows
DECLARE = "Or name the modules whose outputs are the branches: parametrize(…, branches=[…]), by name or glob"


@dataclass
class Group:
    """All residual adds whose branch one handle hands over."""

    handle: Handle
    adds: list[ResidualAdd]
    parameters: frozenset[str] = frozenset()
    visits: int = 0
    nodes: set[int] = field(default_factory=set)  # where the handle handed the branch over
    routes: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)  # from each add, and its own factor


def added_together(group: Group, groups: Sequence[Group], sum_of: Callable[[ResidualAdd], int] = id) -> list[Group]:
    """The branches that stand in one sum with this one, as attention and MLP in parallel do, the principal one first.

    The principal one is in most adds, as the shared matrix is beside which each visit has an adapter of its own; among
    equals it is the first in the module that adds. `sum_of` tells the sum that an add belongs to: one addition, unless
    it says otherwise.
    """

    def rank(other: Group) -> tuple[int, bool]:
        container = other.adds[0].site.container[-1:]
        return len(other.adds), all(other.handle.module.startswith(f"{name}.") for name in container if name)

    sums = {sum_of(add) for add in group.adds}
    together = [other for other in groups if not sums.isdisjoint(map(sum_of, other.adds))]
    return sorted(together, key=rank, reverse=True)


def branches_of(forward: Trace, groups: list[Group]) -> list[ResidualAdd]:
    """The adds whose branches are to be scaled: those that were found, and those of groups that the user names."""
    marked = [add for add in forward.of("time") if forward.marked(add)]
    return [*forward.of("leaf"), *marked, *(add for group in groups for add in group.adds)]


def refuse_time(forward: Trace) -> None:
    """Refuse visits that follow time and not depth, where nothing is marked.

    Raises:
        InputError: names the line.
    """
    for add in forward.of("time"):
        if not forward.marked(add):
            raise InputError(
                f"the residual add at {add.site.source} runs over time, not over depth: what it depends on grows with "
                f"every one of its visits, so their number is no loop count. {DECLARE}, and N with loops="
            )


def find_groups(forward: Trace) -> list[Group]:
    """One group per handle, in the order in which the branches are first added.

    The handle is the module that returned the branch, or something to which the branch is proportional, at every one of
    its calls: the one that serves most adds, and of those the outermost. A dropout object that serves several branches
    is no handle: no matrix acts in all of them.

    Raises:
        InputError: a branch has no handle, or feeds something else too.
    """
    return _Finder(forward).groups()


class _Finder:
    """Finds a handle for every branch of a trace."""

    def __init__(self, forward: Trace) -> None:
        self.forward, self.graph = forward, forward.graph
        self.adds = sorted(branches_of(forward, []), key=lambda add: add.total)
        self.usable = self._usable()

    def groups(self) -> list[Group]:
        groups: dict[Handle, Group] = {}
        for add in self.adds:
            cut = self._cut(add, add.branch, ())
            if cut is None:
                raise InputError(
                    f"the residual branch added at {add.site.source} is not the output of a module of its own, so it "
                    "cannot be multiplied on its way to the stream (a module that hands over something else too at "
                    f"another call is none). Mark it there: x + looptransfer.residual(…, 'name'). {DECLARE}"
                )
            route = {add.total} | {n for _, path in cut for n in path}
            for handle, path in cut:
                self._check_use(add, handle, path, route)
                group = groups.setdefault(handle, Group(handle, []))
                if add not in group.adds[-1:]:  # chunks are handed over apart and added together
                    group.adds.append(add)
                group.nodes.add(path[-1])
                signs = self.graph.nodes[add.total].signs
                group.routes.append((signs[add.position] if signs else 1.0, path))
        return list(groups.values())

    def _check_use(self, add: ResidualAdd, handle: Handle, path: tuple[int, ...], route: set[int]) -> None:
        inside = range(self.graph.nodes[path[-1]].handed_over[handle])  # what the module itself makes of its branch
        users = [self.graph.users(n) for n in path[:-1]]
        users.append({n for n in self.graph.users(path[-1]) if n not in inside})
        if any(numbers - route for numbers in users) or path[-1] in self.graph.outputs:
            raise InputError(
                f"the residual branch added at {add.site.source} also feeds something else, so it cannot be "
                f"multiplied on its way to the stream. Mark it at the add: x + looptransfer.residual(…, 'name'). "
                f"{DECLARE}"
            )

    def _usable(self) -> Counter[Handle]:
        """The handles of branches alone, none twice, with a matrix in common, and the number of adds of each."""
        handed: defaultdict[Handle, set[int]] = defaultdict(set)
        common: dict[Handle, frozenset[str]] = {}
        serves: Counter[Handle] = Counter()
        twice: set[Handle] = set()
        for add in self.adds:
            for node in self.forward.proportional(add):
                for handle in self.graph.nodes[node].handles:
                    earlier = handed[handle] & add.path
                    twice |= {handle} if any(self.graph.precedes(node, n) for n in earlier) else set()
                    handed[handle].add(node)
                    common[handle] = common.get(handle, add.matrices) & add.matrices
                    serves[handle] += handle.mark is not None or handle.module not in add.site.container
        calls = Counter(h for n, node in enumerate(self.graph.nodes) if self.graph.is_live(n) for h in node.handles)

        def whole(handle: Handle) -> bool:
            if handle.mark is not None or handle in twice or not handle.module or not common[handle]:
                return handle.mark is not None
            return sum(self.graph.nodes[n].handles.count(handle) for n in handed[handle]) == calls[handle]

        return Counter({handle: serves[handle] for handle in handed if whole(handle)})

    def _cut(self, add: ResidualAdd, number: int, path: tuple[int, ...]) -> list[tuple[Handle, tuple[int, ...]]] | None:
        """The handles that scale the branch together, each with the nodes from the add back to it.

        Of those that lie one behind the other it is the one that serves most adds, and of these the nearest.
        """
        path = (*path, number)
        handles = [h for h in self.graph.nodes[number].handles if h in self.usable]
        fit = [h for h in handles if h.mark is not None or h.module not in add.site.container]
        marks = [h for h in fit if h.mark is not None]
        if not self._apart(number, path):
            fit = marks = []
        if marks:
            return [(marks[-1], path)]
        best = [max(reversed(fit), key=self.usable.__getitem__)] if fit else []
        for alternative in self.graph.scaling(number) if number in add.path else ():
            parts = [self._cut(add, source, path) for source in alternative]
            cut = [piece for part in parts if part for piece in part]
            if parts and None not in parts and (not best or min(self.usable[h] for h, _ in cut) > self.usable[best[0]]):
                return cut
        return [(best[0], path)] if best else None

    def _apart(self, number: int, path: tuple[int, ...]) -> bool:
        """Nothing beside the way holds the branch too, as the norm does in y / |y|."""
        beside = {s for n in path[:-1] for s in self.graph.nodes[n].sources} - set(path)
        return not any(s == number or self.graph.precedes(number, s) for s in beside)


# -- named by the user


def marked_alone(forward: Trace) -> list[Group]:
    """Marks on what no addition that is recognised takes up, and that no branch around them is scaled with.

    Raises:
        InputError: a mark inside a branch is left alone there, but has the name of a mark around it, or stands alone at
            other runs.
    """
    marks = set(live_marks(forward))
    if not marks:
        return []
    scaled, idle = (
        {h for add in adds for n in forward.proportional(add) for h in _marks_at(forward, n)}
        for adds in (branches_of(forward, []), [add for add in forward.adds if add.kind in {"inner", "composite"}])
    )
    for handle in idle - scaled:
        around = [h for h in scaled if h.mark == handle.mark and (handle.module + ".").startswith(h.module)]
        if around:
            raise InputError(
                f"the mark {handle} lies inside a branch and is left alone, but has the name of {around[0]} around "
                "it and would be taken for it; give it another name: looptransfer.residual(…, 'inner')"
            )
    groups = [_marked_alone(forward, handle) for handle in sorted(marks - scaled - idle, key=str)]
    return [group for group in groups if group is not None]


def live_marks(forward: Trace) -> list[Handle]:
    """The marks on what the model's output depends on, in the order in which they first ran."""
    live = [n for n in sorted(forward.graph.marked) if forward.graph.is_live(n)]
    return list(dict.fromkeys(handle for n in live for handle in _marks_at(forward, n)))


def _marks_at(forward: Trace, number: int) -> list[Handle]:
    return [handle for handle in forward.graph.nodes[number].handles if handle.mark is not None]


def _marked_alone(forward: Trace, handle: Handle) -> Group | None:
    """A mark on what is added in a way that is not recognised: what acts between its runs is its branch's.

    Inside a branch that is scaled it is part of that (None), or makes a stream of its own, which begins anew there.
    """
    graph = forward.graph
    ways = {path[-1]: frozenset(path) for n in _places(forward, handle) for path in [_up_to_use(graph, n)]}
    places, around, earlier = list(ways), [_branch_around(forward, n) for n in ways], list[int | None]()
    for i, n in enumerate(places):
        before = (m for m in range(i - 1, -1, -1) if around[m] is around[i] and graph.precedes(places[m], n))
        earlier.append(next((places[m] for m in before), None))
    follows = [leaf for n, m, leaf in zip(places, earlier, around, strict=True) if m is not None and is_added(graph, n)]
    if any(around) and not any(follows):
        _refuse_inside_and_alone(handle, around)
        return None
    acting = [
        graph.matrices_on(graph.between(m, n)) if m is not None else frozenset[str]()
        for n, m in zip(places, earlier, strict=True)
    ]
    common = next((names for names in acting if names), frozenset([str(handle)]))
    adds = [
        _standing_alone(n, ways[n], names or common, names or common) for n, names in zip(places, acting, strict=True)
    ]
    for add, leaf in zip(adds, around, strict=True):
        add.within = leaf.total if leaf is not None else None
    return _at(handle, places, adds)


def _branch_around(forward: Trace, number: int) -> ResidualAdd | None:
    """The innermost leaf in whose branch a node lies; a stream that only passes through does not."""
    for leaf in sorted(branches_of(forward, []), key=lambda leaf: leaf.total):
        if number in leaf.path and (feeds_only(forward, number, leaf) or not is_added(forward.graph, number)):
            return leaf
    return None


def _refuse_inside_and_alone(handle: Handle, around: list[ResidualAdd | None]) -> None:
    lines = [leaf.site.source for leaf in around if leaf is not None]
    if None in around:
        raise InputError(
            f"the mark {handle} lies inside the branch added at {lines[0]} at some of its runs, where ε would count "
            "twice, and not at others; give them names of their own: looptransfer.residual(…, 'inner')"
        )


def is_added(graph: Graph, number: int, end: Collection[int] = ()) -> bool:
    """Something proportional to a node is one term of several, before the end, and the others were not made of it.

    It is not where an activation, a norm or a bias comes first, nor where it is a factor.
    """
    nodes, held, waiting = graph.nodes, {number}, graph.users(number)
    while waiting:
        n = min(waiting)
        waiting.remove(n)
        if n in end:
            continue
        terms = graph.terms.get(n, frozenset())
        others = {s for s in nodes[n].sources if (nodes[s].data and not nodes[s].choice) or s in terms} - held
        apart = {s for s in others if not graph.precedes(number, s)}
        if apart == others and any(held.issuperset(sources) for sources in graph.scaling(n)):
            held.add(n)
            waiting |= graph.users(n)
        elif apart and nodes[n].op.relation != "product":
            return True
    return False


def _up_to_use(graph: Graph, number: int) -> list[int]:
    """A marked node and what it is multiplied by on its way to where it is used: ε stands there after the rewrite."""
    path, users = [number], graph.users(number)
    while len(users) == 1:
        user = graph.nodes[next(iter(users))]
        others = [graph.nodes[s] for s in user.sources if s != path[-1]]
        if user.op.name not in {"mul", "div"} or any(other.data or other.parameters for other in others):
            break
        path.append(users.pop())
        users = graph.users(path[-1])
    return path


def declared_groups(model: nn.Module, forward: Trace, patterns: list[str]) -> list[Group]:
    """The outputs of modules that the user names as branches.

    Raises:
        InputError: a name fits no module that ran, or one of them lies in another.
    """
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    canonical = {id(module): name for name, module in model.named_modules()}
    groups: dict[Handle, Group] = {}
    for pattern in patterns:
        fitting = [canonical[id(module)] for name, module in names.items() if fnmatchcase(name, pattern)]
        called = [name for name in dict.fromkeys(fitting) if forward.graph.calls[Handle(name)]]
        if not called:
            some = ", ".join(name for name in list(names)[:8])
            raise InputError(
                f"branches holds {pattern!r}, which fits no module that ran in the forward; modules are named as in "
                f"model.named_modules(): {some}, …"
            )
        for name in called:
            for group in _handed_over_by(model, forward, name):
                groups.setdefault(group.handle, group)
    nested = [(a, b) for a in groups for b in groups if a.module.startswith(b.module + ".")]
    if nested:
        inner, outer = nested[0]
        raise InputError(
            f"branches holds {inner.module} and {outer.module} around it, so ε would count twice; keep one"
        )
    return list(groups.values())


def _handed_over_by(model: nn.Module, forward: Trace, name: str) -> list[Group]:
    """The outputs of a module as branches: with the residual adds it reaches, where there are any.

    Of several tensors each that reaches an add first is a branch. Where none does, it is one that the next visit
    depends on, then one that meets what it was made of, then the one in which most of the module's matrices act (in
    attention weights the values' do not), and of those the first.
    """
    nodes = forward.graph.nodes
    handles = dict.fromkeys(h for node in nodes for h in node.handles if h.module == name and h.mark is None)
    order = {h: places for h in handles if (places := _places(forward, h))}
    if not order:
        raise InputError(
            f"branches holds {name}, which returns no tensor that reaches the output; name a module whose output is "
            "the branch"
        )
    owned = {name: p for p, name in _owned(model, name)}

    def rank(handle: Handle) -> tuple[bool, bool, int]:
        first, *_, last = order[handle] * 2
        acting = forward.graph.matrices_on([first, *bits(nodes[first].ancestors)])
        carried, meets = forward.graph.precedes(first, last), _meets_its_origin(forward.graph, first)
        return carried, meets, len(acting & owned.keys())

    indexed = sorted(order, key=lambda h: (h.output is not None, str(h.output)))
    served: dict[Handle, list[tuple[ResidualAdd, set[int]]]] = {}
    for add in forward.of("leaf") + forward.of("time"):
        path = set(forward.proportional(add))
        reached = {h: max(path & set(order[h])) for h in indexed if path & set(order[h])}
        if reached:
            served.setdefault(max(reached, key=reached.__getitem__), []).append((add, path))
    served = served or {max(indexed, key=rank): []}
    matrices = frozenset(name for name, p in owned.items() if p.ndim >= 2) or frozenset([name])
    return [_declared(forward, handle, order[handle], near, matrices) for handle, near in served.items()]


def _declared(
    forward: Trace, handle: Handle, places: list[int], near: list[tuple[ResidualAdd, set[int]]], owned: frozenset[str]
) -> Group:
    """A group of what a module returns at some nodes, which reaches these adds; `owned` are the module's matrices."""
    adds = [add for add, _ in near]
    others = [n for n in places if not any(n in path for _, path in near)]
    for n in others:
        total = next((same for same in forward.same(n) if same in forward.streams), None)
        if total is not None and not is_added(forward.graph, n):
            raise InputError(
                f"branches holds {handle}, which returns the stream itself, the sum at {forward.graph.line(total)}, so "
                "ε would multiply the stream and not what is added to it; name the modules whose outputs are added"
            )
    matrices, last = (adds[-1].matrices, adds[-1].last) if adds else (owned, owned)
    paths = {n: _up_to_use(forward.graph, n) for n in places}
    alone = [_standing_alone(paths[n][-1], frozenset(paths[n]), matrices, last) for n in others]
    return _at(handle, [path[-1] for path in paths.values()], adds + alone)


def _meets_its_origin(graph: Graph, number: int) -> bool:
    """A node is used together with other data of what it was made of, and not as its factor or beside it."""
    end = _up_to_use(graph, number)[-1]
    users = (graph.nodes[n] for n in graph.users(end) if graph.nodes[n].op.relation not in {"product", "side by side"})
    others = (graph.nodes[s] for user in users for s in user.sources if s != end and graph.nodes[s].data)
    return any(other.ancestors & graph.nodes[number].ancestors for other in others)


def _owned(model: nn.Module, name: str) -> list[tuple[nn.Parameter, str]]:
    canonical = parameter_names(model)
    return [(p, canonical[id(p)]) for p in module_of(model, name).parameters()]


def refuse_nested(forward: Trace, groups: list[Group]) -> None:
    """Refuse what the user names inside the branch of another group, and what is not added to anything there.

    Raises:
        InputError: names both.
    """
    for inner, outer in nested(forward.graph, groups):
        if not any(is_added(forward.graph, add.total, outer.nodes) for add in inner.adds):
            raise InputError(
                f"what {inner.handle} hands over is a part of the branch that {outer.handle} hands over, so ε would "
                "count twice; mark or name one of them"
            )


def nested(graph: Graph, groups: list[Group]) -> Iterator[tuple[Group, Group]]:
    """Pairs of what the user names after another branch was handed over and goes on only inside it, and that branch.

    A stream inside a branch that was found begins anew there, and is left out.
    """
    alone = [g for g in groups if all(add.site.source == DECLARED and add.within is None for add in g.adds)]
    for outer in groups if alone else []:
        through = _goes_through(graph, outer.nodes)
        for inner in alone:
            after = any(graph.precedes(m, n) for m in outer.nodes for n in inner.nodes)
            if inner is not outer and after and all(through[n] is not None for n in inner.nodes):
                yield inner, outer


def _goes_through(graph: Graph, places: set[int]) -> list[int | None]:
    """For every node the one place that all that is made of it goes through."""
    through: list[int | None] = [None] * len(graph.nodes)
    for n in reversed(range(len(graph.nodes))):
        ways = {u if u in places else through[u] for u in graph.users(n)}
        through[n] = next(iter(ways)) if len(ways) == 1 and n not in graph.outputs else None
    return through


def scaled(forward: Trace, groups: list[Group]) -> list[ResidualAdd]:
    """The adds whose branch some group hands over."""
    taken, nodes = {id(add) for group in groups for add in group.adds}, {n for group in groups for n in group.nodes}
    return [
        add
        for add in forward.adds
        if id(add) in taken or (add.kind == "fixed" and nodes & set(forward.proportional(add)))
    ]


def _standing_alone(place: int, path: frozenset[int], matrices: frozenset[str], last: frozenset[str]) -> ResidualAdd:
    """A branch that the user names and that is added in a way that is not recognised: each output counts as one."""
    site = Site(DECLARED, 0, ())
    return ResidualAdd("leaf", site, 0, place, place, place, 0, place, path, begun=place, matrices=matrices, last=last)


def _at(handle: Handle, places: list[int], adds: list[ResidualAdd]) -> Group:
    """A group whose branches are what the handle hands over, as it is."""
    return Group(handle, adds, nodes=set(places), routes=[(1.0, (n,)) for n in places])


def _places(forward: Trace, handle: Handle) -> list[int]:
    live = forward.graph.is_live
    return [n for n, node in enumerate(forward.graph.nodes) if handle in node.handles and live(n)]
