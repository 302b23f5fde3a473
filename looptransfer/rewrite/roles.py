"""The role of each parameter in a forward, told by what it does there and not by its name."""

from collections import Counter

from torch import nn

from looptransfer.rewrite.analysis import Analysis
from looptransfer.rewrite.complete import uses_in
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.plan import Role


def roles_of(model: nn.Module, analysis: Analysis) -> dict[str, Role]:
    """The role of every parameter of `model`, by its name.

    branch matrix: a matrix multiplies by it, in a residual branch. branch vector: any other parameter of a branch, such
    as a gain, a bias or a table. per-visit part: of a branch that is visited several times it acts in one visit alone,
    as a norm, a scale or a LoRA of that loop does. embedding, head: with two dimensions or more, before and after the
    residual adds; a head that is tied to an embedding is one. outside: any other.
    """
    graph = analysis.trace.graph
    live = [n for n in range(len(graph.nodes)) if graph.is_live(n)]
    uses = uses_in(graph, graph.precedes, live)
    acting = {name.split("+")[0] for name in graph.matrices_on(live)}
    visits = Counter[str]()
    for group in analysis.groups:
        for name in group.parameters:
            visits[name] = max(visits[name], group.visits)
    late = _after_the_adds(analysis, live)
    roles: dict[str, Role] = {}
    for name, parameter in named_parameters(model).items():
        if name in visits:
            once = uses.get(name) == 1 and visits[name] > 1
            roles[name] = "per-visit part" if once else "branch matrix" if name in acting else "branch vector"
        elif parameter.ndim >= 2 and name in late:
            roles[name] = "head" if late[name] else "embedding"
        else:
            roles[name] = "outside"
    return roles


def _after_the_adds(analysis: Analysis, live: list[int]) -> dict[str, bool]:
    """Whether a parameter meets data only after a residual add, by its name."""
    nodes = analysis.trace.graph.nodes
    totals = 0
    for group in analysis.groups:
        for add in group.adds:
            totals |= 1 << add.total
    late: dict[str, bool] = {}
    for number in live:
        if nodes[number].data:
            for name in nodes[number].parameters:
                late[name] = late.get(name, True) and bool(nodes[number].ancestors & totals)
    return late
