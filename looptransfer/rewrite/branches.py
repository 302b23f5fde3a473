"""Where each residual branch can be taken hold of, and how often it is visited."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.graph import Graph, Handle, Site
from looptransfer.rewrite.names import module_of, parameter_names
from looptransfer.rewrite.trace import Kind, ResidualAdd, Trace

DECLARED = "declared"  # the source of a branch that only the user knows
REFUSED: tuple[Kind, ...] = ("gated", "fused", "time")
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


def find_groups(model: nn.Module, found: Trace, declared: list[str] | None) -> list[Group]:
    """One group per handle, in the order in which the branches are first added.

    The handle is the outermost module that returned the branch, or something to which the branch is proportional, at
    every one of its calls. A dropout object that serves several branches is no handle: no matrix acts in all of them.

    Raises:
        InputError: a branch has no handle or feeds something else too, the skip is scaled, a kernel adds its own
            branch, visits follow time and not depth, or a declared name fits no module.
    """
    if declared is not None:
        groups = _declared(model, found, declared)
    else:
        _refuse_what_cannot_be_scaled(found)
        groups = _traced(found)
    _count_visits(model, found, groups)
    return groups


# -- handles


def _traced(found: Trace) -> list[Group]:
    usable = _usable(found)
    groups: dict[Handle, Group] = {}
    for add in _scalable(found):
        cut = _cut(found.graph, add, add.branch, usable)
        if cut is None:
            raise InputError(
                f"the residual branch added at {add.site.source} is not the output of a module of its own, so it "
                f"cannot be multiplied on its way to the stream. Mark it there: x + looptransfer.residual(…). {DECLARE}"
            )
        route = {add.total} | {n for _, way in cut for n in way}
        for handle, way in cut:
            if any(found.graph.users(n) - route for n in way) or way[-1] in found.graph.outputs:
                raise InputError(
                    f"the residual branch added at {add.site.source} also feeds something else, so it cannot be "
                    f"multiplied on its way to the stream. Mark it at the add: x + looptransfer.residual(…). {DECLARE}"
                )
            group = groups.setdefault(handle, Group(handle, []))
            if add not in group.adds[-1:]:  # chunks are handed over apart and added together
                group.adds.append(add)
            group.nodes.add(way[-1])
            weights = found.graph.nodes[add.total].weights
            group.routes.append((weights[add.position] if weights else 1.0, way))
    for handle in _marks_left_over(found, groups):
        groups[handle] = _marked_alone(found, handle)
    return list(groups.values())


def _marks_left_over(found: Trace, groups: Iterable[Handle]) -> list[Handle]:
    """Marks on what no addition that is recognised takes up.

    Raises:
        InputError: a mark inside a branch is left alone there, but has the name of a mark around it.
    """
    marks = {handle for handle in found.graph.calls if handle.mark is not None} - set(groups)
    others = [add for add in found.adds if add.kind in {"inner", "composite"}]
    nodes = found.graph.nodes
    idle = {h for add in others for n in proportional(found.graph, add.branch, add.way) for h in nodes[n].handles}
    for handle in marks & idle:
        around = [h for h in groups if h.mark == handle.mark and (handle.module + ".").startswith(h.module)]
        if around:
            raise InputError(
                f"the mark {handle} lies inside a branch and is left alone, but has the name of {around[0]} around it "
                "and would be taken for it; give it another name: looptransfer.residual(…, 'inner')"
            )
    return sorted(marks - idle, key=str)


def _scalable(found: Trace) -> list[ResidualAdd]:
    """Leaves, and what is no plain x + f(x) but marked by the user."""
    marked = [add for add in found.adds if add.kind in {"gated", "time"} and _marks(found, add)]
    return sorted([*found.of("leaf"), *marked], key=lambda add: add.total)


def _marks(found: Trace, add: ResidualAdd) -> bool:
    """The user marked what is added there."""
    handles = [h for n in proportional(found.graph, add.branch, add.way) for h in found.graph.nodes[n].handles]
    return any(handle.mark is not None for handle in handles)


def _marked_alone(found: Trace, handle: Handle) -> Group:
    """A mark on what is added in a way that is not recognised: what acts between its runs is its branch's."""
    places, acting = _places(found, handle), set[int]()
    for n in places:
        earlier = max((m for m in places if m < n and found.graph.precedes(m, n)), default=None)
        acting |= set(found.graph.way(earlier, n)) if earlier is not None else {n}
    learned = frozenset[str]().union(*(found.graph.nodes[m].parameters for m in acting))
    return _at(handle, places, _standing_alone(places, learned, frozenset([str(handle)])))


def _usable(found: Trace) -> set[Handle]:
    """The handles that hand over nothing but branches, none of them twice, and branches with a matrix in common."""
    handed: defaultdict[Handle, set[int]] = defaultdict(set)
    common: dict[Handle, frozenset[str]] = {}
    twice: set[Handle] = set()
    for add in _scalable(found):
        for node in proportional(found.graph, add.branch, add.way):
            for handle in found.graph.nodes[node].handles:
                twice |= {handle} if any(found.graph.precedes(node, n) for n in handed[handle] & add.way) else set()
                handed[handle].add(node)
                common[handle] = common.get(handle, add.matrices) & add.matrices

    def times(handle: Handle) -> int:
        return sum(found.graph.nodes[node].handles.count(handle) for node in handed[handle])

    def calls(handle: Handle) -> int:
        return found.graph.calls[handle if handle.mark is not None else Handle(handle.module)]

    marked = {handle for handle in handed if handle.mark is not None}
    return marked | {h for h in handed.keys() - twice if h.module and common[h] and times(h) == calls(h)}


def proportional(graph: Graph, number: int, inside: frozenset[int]) -> Iterator[int]:
    """A node and all that it is proportional to, inside a branch."""
    queue, seen = [number], set[int]()
    while queue:
        number = queue.pop(0)
        if number in inside and number not in seen:
            seen.add(number)
            yield number
            queue += [n for alternative in graph.nodes[number].proportional_to for n in alternative]


def _cut(
    graph: Graph, add: ResidualAdd, number: int, usable: set[Handle], way: tuple[int, ...] = ()
) -> list[tuple[Handle, tuple[int, ...]]] | None:
    """The nearest handles that scale the branch together, each with the nodes from the add back to it."""
    way = (*way, number)
    fit = [h for h in graph.nodes[number].handles if h in usable and (h.mark or h.module not in add.site.container)]
    if fit:
        return [(next((h for h in fit if h.mark), fit[-1]), way)]
    if number not in add.way:
        return None
    for alternative in graph.nodes[number].proportional_to:
        parts = [_cut(graph, add, source, usable, way) for source in alternative]
        if parts and None not in parts:
            return [one for part in parts if part for one in part]
    return None


def _declared(model: nn.Module, found: Trace, patterns: list[str]) -> list[Group]:
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    canonical = {id(module): name for name, module in model.named_modules()}
    groups: dict[Handle, Group] = {}
    for pattern in patterns:
        fitting = [canonical[id(module)] for name, module in names.items() if fnmatchcase(name, pattern)]
        called = [name for name in dict.fromkeys(fitting) if found.graph.calls[Handle(name)]]
        if not called:
            some = ", ".join(name for name in list(names)[:8])
            raise InputError(
                f"branches holds {pattern!r}, which fits no module that ran in the forward; modules are named as in "
                f"model.named_modules(): {some}, …"
            )
        for name in called:
            group = _handed_over_by(model, found, name)
            groups.setdefault(group.handle, group)
    nested = [(a, b) for a in groups for b in groups if a.module.startswith(b.module + ".")]
    if nested:
        inner, outer = nested[0]
        raise InputError(
            f"branches holds {inner.module} and {outer.module} around it, so ε would count twice; keep one"
        )
    return list(groups.values())


def _handed_over_by(model: nn.Module, found: Trace, name: str) -> Group:
    """The first tensor that a module returns, as a branch: with the residual adds it reaches, where there are any."""
    graph = found.graph
    handles = [h for node in graph.nodes for h in node.handles if h.module == name and h.mark is None]
    if not handles:
        raise InputError(f"branches holds {name}, which returns no tensor; name a module whose output is the branch")
    places = _places(found, handles[0])
    reached = [(add, set(places) & set(proportional(graph, add.branch, add.way))) for add in found.of("leaf")]
    adds = [add for add, nodes in reached if nodes]
    canonical = parameter_names(model)
    owned = {p: canonical[id(p)] for p in module_of(model, name).parameters()}
    matrices = frozenset(name for p, name in owned.items() if p.ndim >= 2) or frozenset([str(handles[0])])
    others = [n for n in places if not any(n in nodes for _, nodes in reached)]
    return _at(handles[0], places, adds + _standing_alone(others, frozenset(owned.values()), matrices))


def scaled(found: Trace, groups: list[Group]) -> list[ResidualAdd]:
    """The adds whose branch some group hands over."""
    taken, nodes = {id(add) for group in groups for add in group.adds}, {n for group in groups for n in group.nodes}
    return [
        add
        for add in found.adds
        if id(add) in taken or (add.kind == "fixed" and nodes & set(proportional(found.graph, add.branch, add.way)))
    ]


def _standing_alone(places: list[int], parameters: frozenset[str], matrices: frozenset[str]) -> list[ResidualAdd]:
    """What the user calls a branch and is added in a way that is not recognised: each output counts as one."""
    site = Site(DECLARED, 0, ())
    return [ResidualAdd("leaf", site, n, n, n, frozenset([n]), parameters, matrices) for n in places]


def _at(handle: Handle, places: list[int], adds: list[ResidualAdd]) -> Group:
    """A group whose branches are what the handle hands over, as it is."""
    return Group(handle, adds, nodes=set(places), routes=[(1.0, (n,)) for n in places])


def _places(found: Trace, handle: Handle) -> list[int]:
    return [n for n, node in enumerate(found.graph.nodes) if handle in node.handles]


# -- refusals


def _refuse_what_cannot_be_scaled(found: Trace) -> None:
    gated, fused, time = ([add for add in found.of(kind) if not _marks(found, add)] for kind in REFUSED)
    if found.graph.fused_kernels:
        raise InputError(
            f"the kernel called at {found.graph.fused_kernels[0]} adds a residual branch to its own input, where no "
            f"multiplier can reach; use an unfused form of it. {DECLARE}"
        )
    if time:
        raise InputError(
            f"each visit of the residual add at {time[0].site.source} reads another slice of the input: that is a "
            f"recurrence over time, not over depth, and its length is no loop count. {DECLARE}, and N with loops="
        )
    if gated:
        raise InputError(
            f"the skip added at {gated[0].site.source} is scaled (a gate as in GRU and highway, lerp, or a constant as "
            "in DeepNorm), and the rule is derived for x + f(x): its 1/N is not known to hold. To scale the branch all "
            f"the same, mark it: looptransfer.residual(…). {DECLARE}"
        )
    if fused:
        raise InputError(
            f"the operation at {fused[0].site.source} computes a residual branch and adds it at once, so the branch "
            f"cannot be multiplied on its way. Write it as x + looptransfer.residual(…). {DECLARE}"
        )


# -- visits and last maps


def _count_visits(model: nn.Module, found: Trace, groups: list[Group]) -> None:
    """N per learned matrix: the longest chain of residual adds in whose branches it acts.

    Tied weights count together, whatever modules hold them; chunks of one stream are no chain. A stream inside a branch
    begins anew at every visit of that branch, and so does its count.
    """
    canonical = parameter_names(model)
    depth: dict[tuple[str, int], int] = {}  # (matrix, sum) -> the chain that ends there
    runs: defaultdict[tuple[str, int | None], list[tuple[int, set[int]]]] = defaultdict(list)
    own: defaultdict[int, set[str]] = defaultdict(set)
    for group in groups:
        always = frozenset[str].intersection(*(add.matrices for add in group.adds))
        for add in group.adds:  # what acts now and then comes in with the stream, or beside what always acts
            own[id(add)] |= always or add.matrices
    for add in sorted({id(a): a for g in groups for a in g.adds}.values(), key=lambda one: one.total):
        add.matrices = frozenset(own[id(add)])
        for name in add.matrices:
            applied = {n for n in add.way if name in found.graph.nodes[n].matrices} or {add.total}
            earlier = [
                depth[name, t] + (not applied <= before)  # one application may serve several branches
                for t, before in runs[name, add.within]
                if found.graph.precedes(t, add.total)
            ]
            depth[name, add.total] = max(earlier, default=1)
            runs[name, add.within].append((add.total, applied))
    longest: Counter[str] = Counter()
    for (name, _), length in depth.items():
        longest[name] = max(longest[name], length)
    for group in groups:
        acting = frozenset[str]().union(*(add.parameters for add in group.adds))
        group.visits = max((longest[name] for add in group.adds for name in add.matrices), default=1)
        owned = [] if group.handle.mark is not None else list(module_of(model, group.handle.module).parameters())
        group.parameters = acting | {canonical[id(parameter)] for parameter in owned}
