"""Where each residual branch can be taken hold of, how often it is visited, and where its last map is."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.graph import Graph, Handle
from looptransfer.rewrite.trace import ResidualAdd, Trace

# Operations whose result is proportional to the learned tensors that enter there, weight and bias together.
MAPS = {"addmm", "mm", "bmm", "mul", "convolution", "add", "native_layer_norm", "native_group_norm", "_fused_rms_norm"}
MAPS |= {"native_batch_norm", "baddbmm", "linear"}
DECLARE = "Or name the modules whose outputs are the branches: parametrize(…, branches=[…]), by name or glob"


@dataclass(frozen=True)
class End:
    """The last learned map of a branch, and the constant factor from there to the stream."""

    node: int
    factor: float
    parameters: frozenset[str]  # none: the branch ends in something that is no learned map


@dataclass
class Group:
    """All residual adds whose branch one handle hands over."""

    handle: Handle
    adds: list[ResidualAdd]
    parameters: frozenset[str] = frozenset()
    visits: int = 0
    nodes: set[int] = field(default_factory=set)  # where the handle handed the branch over
    routes: list[tuple[int, ...]] = field(default_factory=list)  # from each add back to there
    ends: list[End] = field(default_factory=list)


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
        for group in groups:
            _refuse_time(found, group)
    _count_visits(model, found, groups)
    for group in groups:
        group.ends = [end for way in group.routes for end in _ends(found, group, way)]
    return groups


# -- handles


def _traced(found: Trace) -> list[Group]:
    usable = _usable(found)
    groups: dict[Handle, Group] = {}
    for add in found.of("leaf"):
        cut = _cut(found.graph, add, add.branch, usable)
        if cut is None:
            raise InputError(
                f"the residual branch added at {add.source} is not the output of a module of its own, so it cannot be "
                f"multiplied on its way to the stream. Mark it there: x + looptransfer.residual(…). {DECLARE}"
            )
        route = {add.total} | {n for _, way in cut for n in way}
        for handle, way in cut:
            if any(found.graph.users(n) - route for n in way) or way[-1] in found.graph.outputs:
                raise InputError(
                    f"the residual branch added at {add.source} also feeds something else, so it cannot be multiplied "
                    f"on its way to the stream. Mark it at the add: x + looptransfer.residual(…). {DECLARE}"
                )
            group = groups.setdefault(handle, Group(handle, []))
            if add not in group.adds[-1:]:  # chunks are handed over apart and added together
                group.adds.append(add)
            group.nodes.add(way[-1])
            group.routes.append(way)
    return list(groups.values())


def _usable(found: Trace) -> set[Handle]:
    """The handles that hand over nothing but branches, and branches with a matrix in common."""
    handed: defaultdict[Handle, set[int]] = defaultdict(set)
    common: dict[Handle, frozenset[str]] = {}
    for add in found.of("leaf"):
        for node in _proportional(found.graph, add.branch, add.way):
            for handle in found.graph.nodes[node].handles:
                handed[handle].add(node)
                common[handle] = common.get(handle, add.parameters) & add.parameters & found.matrices

    def times(handle: Handle) -> int:
        return sum(found.graph.nodes[node].handles.count(handle) for node in handed[handle])

    def calls(handle: Handle) -> int:
        return found.graph.calls[handle if handle.mark is not None else Handle(handle.module)]

    marked = {handle for handle in handed if handle.mark is not None}
    return marked | {h for h in handed if h.module and common[h] and times(h) == calls(h)}


def _proportional(graph: Graph, number: int, inside: frozenset[int]) -> Iterator[int]:
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
    fit = [h for h in graph.nodes[number].handles if h in usable and (h.mark or h.module not in add.container)]
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
            group = _handed_over_by(found, name)
            groups.setdefault(group.handle, group)
    nested = [(a, b) for a in groups for b in groups if a.module.startswith(b.module + ".")]
    if nested:
        inner, outer = nested[0]
        raise InputError(
            f"branches holds {inner.module} and {outer.module} around it, so ε would count twice; keep one"
        )
    return list(groups.values())


def _handed_over_by(found: Trace, name: str) -> Group:
    """The first tensor that a module returns, as a branch: with the residual adds it reaches, where there are any."""
    graph = found.graph
    places = [(n, h) for n, node in enumerate(graph.nodes) for h in node.handles if h.module == name and h.mark is None]
    if not places:
        raise InputError(f"branches holds {name}, which returns no tensor; name a module whose output is the branch")
    handle = places[0][1]
    nodes = {n for n, h in places if h == handle}
    adds = [add for add in found.of("leaf") if nodes & set(_proportional(graph, add.branch, add.way))]
    if not adds:  # an add that is not recognised as residual: each output stands for one
        owned = frozenset[str]()
        for n in nodes:
            owned |= _inside(found, name, n)
        adds = [
            ResidualAdd("leaf", "declared", (), n, n, n, frozenset([n]), owned, followed=True) for n in sorted(nodes)
        ]
    return Group(handle, adds, nodes=nodes, routes=[(n,) for n in sorted(nodes)])


def _inside(found: Trace, name: str, node: int) -> frozenset[str]:
    """Parameters of a module, by name, that act on one of its outputs."""
    ancestors = found.graph.nodes[node].ancestors | 1 << node
    acting = frozenset[str]().union(*(n.parameters for i, n in enumerate(found.graph.nodes) if ancestors >> i & 1))
    return frozenset(p for p in acting if p.startswith(name + "."))


# -- refusals


def _refuse_what_cannot_be_scaled(found: Trace) -> None:
    gated, fused = found.of("gated"), found.of("fused")
    if found.graph.fused_kernels:
        raise InputError(
            f"the kernel called at {found.graph.fused_kernels[0]} adds a residual branch to its own input, where no "
            f"multiplier can reach; use an unfused form of it. {DECLARE}"
        )
    if gated:
        raise InputError(
            f"the skip added at {gated[0].source} is scaled (a gate as in GRU and highway, lerp, or a constant as in "
            "DeepNorm), and the rule is derived for x + f(x): its 1/N is not known to hold. To scale the branch all "
            f"the same, mark it: looptransfer.residual(…). {DECLARE}"
        )
    if fused:
        raise InputError(
            f"the operation at {fused[0].source} computes a residual branch and adds it at once, so the branch cannot "
            f"be multiplied on its way. Write it as x + looptransfer.residual(…). {DECLARE}"
        )


def _refuse_time(found: Trace, group: Group) -> None:
    """A recurrence over time: each visit reads another slice of the same input."""
    if len(group.adds) < 2:
        return
    read: list[frozenset[tuple[int, int]]] = []
    for add in group.adds:
        inside = add.way
        fresh = {s for n in inside for s in found.graph.nodes[n].sources if s not in inside and s != add.stream}
        fresh = {s for s in fresh if found.graph.nodes[s].data and not found.graph.precedes(add.stream, s)}
        own = frozenset[tuple[int, int]]().union(*(found.graph.nodes[n].slices for n in inside))
        read.append(
            frozenset(one for one in own if one[0] in fresh).union(*(found.graph.nodes[s].slices for s in fresh))
        )
    cut_up = {source for one in read for source, _ in one}
    for source in cut_up:
        offsets = [frozenset(o for s, o in one if s == source) for one in read]
        if all(offsets) and len(set(offsets)) == len(offsets):
            raise InputError(
                f"each visit of the residual add at {group.adds[0].source} reads another slice of the input: that is a "
                f"recurrence over time, not over depth, and its length is no loop count. {DECLARE}"
            )


# -- visits and last maps


def _count_visits(model: nn.Module, found: Trace, groups: list[Group]) -> None:
    """N per learned matrix: the longest chain of residual adds in whose branches it acts.

    Tied weights count together, whatever modules hold them; chunks of one stream are no chain.
    """
    canonical = {name for name, _ in model.named_parameters()}
    depth: dict[tuple[str, int], int] = {}  # (matrix, sum) -> the chain that ends there
    runs: defaultdict[str, list[int]] = defaultdict(list)
    for add in sorted({id(a): a for g in groups for a in g.adds}.values(), key=lambda one: one.total):
        for name in add.parameters & found.matrices:
            earlier = [depth[name, t] for t in runs[name] if found.graph.precedes(t, add.total)]
            depth[name, add.total] = 1 + max(earlier, default=0)
            runs[name].append(add.total)
    longest: Counter[str] = Counter()
    for (name, _), length in depth.items():
        longest[name] = max(longest[name], length)
    for group in groups:
        acting = frozenset[str]().union(*(add.parameters for add in group.adds))
        group.visits = max((longest[name] for name in acting & found.matrices), default=1)
        module = model.get_submodule(group.handle.module)
        owned = set() if group.handle.mark is not None else {n for n, _ in module.named_parameters(group.handle.module)}
        group.parameters = acting | (owned & canonical)


def _ends(found: Trace, group: Group, route: tuple[int, ...]) -> Iterator[End]:
    """Follow a branch from its add back to its last learned maps."""
    nodes, factor = found.graph.nodes, 1.0
    for number in route[:-1]:
        factor *= nodes[number].factor
    inside = frozenset[int]().union(*(add.way for add in group.adds))
    queue, seen = [(route[-1], factor)], set[int]()
    while queue:
        number, factor = queue.pop()
        node = nodes[number]
        factor *= node.factor
        if number in seen:
            continue
        seen.add(number)
        data = [s for s in node.sources if nodes[s].data]
        if node.parameters:
            yield End(number, factor, node.parameters if node.op in MAPS else frozenset())
            if node.op == "add":  # a bias that is added apart: it and the map before it end the branch together
                queue += [(s, factor) for s in data]
        elif number not in inside or not node.proportional_to or (node.op == "mul" and len(data) == 2):
            yield End(number, factor, frozenset())
        else:
            queue += [(s, factor) for s in node.proportional_to[0]]


def factors(group: Group) -> tuple[float, ...]:
    """The constant factors that stand on a branch between its last learned maps and the stream, each once."""
    return tuple(sorted({float(f"{abs(end.factor):.9g}") for end in group.ends}))


def last_maps(found: Trace, group: Group) -> tuple[tuple[str, ...], str]:
    """The parameters that can take a branch's multiplier, or none and the reason why not."""
    nodes = found.graph.nodes
    names = frozenset[str]().union(*(end.parameters for end in group.ends))
    if not group.ends or any(not end.parameters for end in group.ends):
        return (), "it does not end in a learned map that its multiplier could go into, such as a norm without gain"
    for end in group.ends:
        direct = {name for s in nodes[end.node].sources for n in found.graph.same(s) for name in nodes[n].parameters}
        computed = [
            n for n in nodes[end.node].sources if not nodes[n].data and nodes[n].op and nodes[n].repeats is None
        ]
        if computed or not end.parameters <= direct:
            return (), "the weights of its last map are computed from its parameters"
    own = {end.node for end in group.ends}
    for number, node in enumerate(nodes):
        if node.data and node.parameters & names and number not in own:
            return (), f"{', '.join(sorted(node.parameters & names))} of its last map is used elsewhere too"
    return tuple(sorted(names)), ""


def gates(found: Trace, group: Group) -> frozenset[str]:
    """Learned factors on the branch, after its last matrix: LayerScale, ReZero."""
    nodes = found.graph.nodes
    inside = frozenset[int]().union(*(add.way for add in group.adds))
    found_gates = frozenset[str]()
    for route in group.routes:
        for number in route[:-1]:
            found_gates |= nodes[number].parameters if nodes[number].op in {"mul", "div"} else frozenset()
    for end in group.ends:
        node = nodes[end.node]
        if node.op == "mul" and node.proportional_to:
            below = node.proportional_to[0][0]
            if any(nodes[n].parameters & found.matrices for n in _proportional(found.graph, below, inside)):
                found_gates |= end.parameters
    return found_gates - found.matrices
