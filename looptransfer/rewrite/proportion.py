"""What the result of an operation repeats, or is proportional to: a rule per operator.

Of z = (a * b) @ w, with data in a and b, it is ((a,), (b,)): z doubles with either. Of z = a + b it is ((a, b),): z
doubles if both do. To add an operator, give it a row in `ops`; where its relation does not say enough, give it a rule
of its own in `BY_NAME`. An operator without a rule is run again where somebody asks (`graph.Graph.scales_with`).
"""

from collections.abc import Callable

from torch import Tensor

from looptransfer.rewrite.graph import Call, Node
from looptransfer.rewrite.ops import Relation


def note_proportion(node: Node, call: Call, nodes: list[Node]) -> None:
    """Note on the node of a call's result what it repeats and what it is proportional to."""
    named = None if call.op.foreign else BY_NAME.get(call.op.name)
    rule = named or BY_RELATION.get(call.op.relation)
    if rule is not None:
        rule(node, call, nodes)
    if node.repeats is not None:
        node.proportional_to = ((node.repeats,),)


def sign_of(call: Call) -> float:
    """The factor that a sum puts on its second operand."""
    return (1.0 if call.op.name == "add" else -1.0) * float(call.kwargs.get("alpha", 1))


def _amounts(node: Node, nodes: list[Node]) -> list[int]:
    """The sources that are numbers made of data."""
    return [n for n in node.sources if nodes[n].data and not nodes[n].choice]


def _repeat(node: Node, call: Call, nodes: list[Node]) -> None:
    node.repeats = node.sources[0] if node.sources else None


def _copy(node: Node, call: Call, nodes: list[Node]) -> None:
    amounts = _amounts(node, nodes)
    node.repeats = amounts[0] if len(node.sources) == 1 and amounts else None
    _together(node, call, nodes)


def _nothing(node: Node, call: Call, nodes: list[Node]) -> None:
    """A choice of one source or the other is proportional to neither."""


def _together(node: Node, call: Call, nodes: list[Node]) -> None:
    amounts = tuple(_amounts(node, nodes))
    node.proportional_to = (amounts,) if amounts else ()


def _first(node: Node, call: Call, nodes: list[Node]) -> None:
    first = call.before[0] if call.before else None
    if first is not None and first in _amounts(node, nodes):
        node.proportional_to = ((first,),)


def _sum(node: Node, call: Call, nodes: list[Node]) -> None:
    """Of 0 + x, with which Python's sum() begins, it is x."""
    amounts = _amounts(node, nodes)
    if len(node.sources) == 2:
        node.proportional_to = (tuple(amounts),) if len(amounts) == 2 else ()
        node.signs = (1.0, sign_of(call))
    elif len(node.sources) == 1 and any(isinstance(arg, (int, float)) and arg == 0 for arg in call.args):
        node.repeats = node.sources[0]


def _negative(node: Node, call: Call, nodes: list[Node]) -> None:
    _together(node, call, nodes)
    node.factor = -1.0


def _product_of_matrices(node: Node, call: Call, nodes: list[Node]) -> None:
    """An attention is proportional to its values alone, and a convolution with a bias to nothing."""
    amounts = _amounts(node, nodes)
    if call.op.name == "convolution" and len(node.sources) > 2:
        return
    factors = amounts[2:3] if "attention" in call.op.name else amounts
    node.proportional_to = tuple((n,) for n in factors if amounts.count(n) == 1)


def _product(node: Node, call: Call, nodes: list[Node]) -> None:
    if call.op.name == "mul" and len(node.sources) == 2 and any(nodes[n].noise for n in node.sources):
        first, second = node.sources  # dropout, as it is spelled on a CPU
        node.repeats, node.masked = first if nodes[second].noise else second, True
        return
    amounts = _dividends(node, nodes) if call.op.name == "div" else _amounts(node, nodes)
    constant = _note_constant(node, call, nodes)
    node.repeats = amounts[0] if constant and amounts and node.factor == 1 else None
    node.proportional_to = tuple((n,) for n in amounts) if len(set(amounts)) == len(amounts) else ()


def _dividends(node: Node, nodes: list[Node]) -> list[int]:
    amounts, sources = _amounts(node, nodes), node.sources
    if len(sources) == 2 and nodes[sources[1]].data:
        return amounts[:1] if sources[0] != sources[1] and nodes[sources[0]].data else []
    return amounts


def _note_constant(node: Node, call: Call, nodes: list[Node]) -> bool:
    """Note the constant that a product multiplies by or divides by; whether it is one number."""
    second = call.args[1] if len(call.args) > 1 else None
    constants = [t for n, t in zip(call.before, call.inputs, strict=True) if n is None or not nodes[n].data]
    if isinstance(second, Tensor) and second.ndim == 0 and call.before[-1] is None and not second.is_meta:
        second = second.item()  # a constant on a tensor, such as a multiplier of ours, is a number
    if isinstance(second, (int, float)):
        node.factor = float(second)
    elif isinstance(second, Tensor) and constants and not node.parameters:
        node.factor, node.even = _size(constants[0])
    if call.op.name == "div" and node.factor:
        node.factor = 1 / node.factor
    return isinstance(second, (int, float)) or (not node.parameters and any(t.numel() == 1 for t in constants))


def _size(tensor: Tensor) -> tuple[float, bool]:
    """The factor that a constant tensor is, where it varies its root mean square; and whether it is even."""
    if tensor.is_meta or not tensor.numel() or tensor.dtype.is_complex:
        return 1.0, True
    values = tensor.detach().double()
    return float(values.pow(2).mean().sqrt()), bool((values == values.flatten()[0]).all())


Rule = Callable[[Node, Call, list[Node]], None]


BY_RELATION: dict[Relation, Rule] = {
    "same": _repeat,
    "sum": _sum,
    "product": _product_of_matrices,
    "side by side": _together,
    "moved": _first,
}
BY_NAME: dict[str, Rule] = {
    "copy": _copy,
    "mul": _product,
    "div": _product,
    "neg": _negative,
    "where": _nothing,
    "index_add": _together,
    "scatter_add": _together,
    "sum": _first,
    "mean": _first,
}
