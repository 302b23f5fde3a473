"""The order of residual adds, where a stream is put together of parts.

    for c in range(3):
        y = x[:, c] + f(x[:, c])
        x = select_scatter(x, y, 1, c)      as a node each x is made of the one before; in truth no y is of another

Where data goes through such parts and is read in part again, changed sums tell: the forward is run once more, and what
depends on them changes.
"""

import functools
import operator
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from looptransfer.errors import InputError
from looptransfer.rewrite.graph import Graph, Node
from looptransfer.rewrite.recurrence import Rerun

Operands = Mapping[int, tuple[int, int]]  # the stream and the branch of every add, by its sum


class _Ways(NamedTuple):
    """The sums that reach a node, as bitmasks, by how: as a whole, put together with other parts, or read in part."""

    whole: int = 0
    put: int = 0
    read: int = 0

    def __or__(self, other: "_Ways") -> "_Ways":
        return _Ways(*(a | b for a, b in zip(self, other, strict=True)))


class Order:
    """The order of some adds."""

    def __init__(self, graph: Graph, operands: Operands, again: Rerun) -> None:
        self.graph, self.operands, self.again = graph, operands, again
        self.levels: dict[frozenset[int], dict[int, int]] = {}

    def follows(self, later: int, earlier: int, among: frozenset[int]) -> bool:
        """One add's sum is computed from another's; `among` are the sums of the chain that they may be links of."""
        if not self.graph.precedes(earlier, later):
            return False
        if self._plainly[later] >> earlier & 1:
            return True
        if among not in self.levels:
            self.levels[among] = _levels(among, self.operands, self.again)
        levels = self.levels[among]
        return not levels or levels[earlier] < levels[later]

    @functools.cached_property
    def _plainly(self) -> dict[int, int]:
        """The sums that reach each add on ways where they are not both put together of parts and read in part.

        They reach its branch, or its stream where what is added to that is not itself put together of parts.
        """
        nodes, totals = self.graph.nodes, self.operands.keys()
        ways, acts = [_Ways()] * len(nodes), [False] * len(nodes)

        def reaching(n: int, reader: Node) -> _Ways:
            seen = ways[n] | _Ways(whole=1 << n if n in totals else 0)
            in_part = reader.op.relation == "moved" or any(n == s for s, _ in reader.slices)
            return _Ways(read=seen.whole | seen.read) if in_part else seen

        for n, node in enumerate(nodes):
            sources = node.sources if not node.choice else ()
            seen = functools.reduce(operator.or_, (reaching(s, node) for s in sources), _Ways())
            put_together = self._is_put_together(node)
            ways[n] = _Ways(put=seen.whole | seen.put) if put_together else seen
            acts[n] = not put_together and (bool(node.matrices) or any(acts[s] for s in sources))
        plainly = {}
        for total, (stream, branch) in self.operands.items():
            ends = [branch, stream] if acts[branch] else [branch]
            seen = functools.reduce(operator.or_, (reaching(n, nodes[total]) for n in ends))
            plainly[total] = seen.whole | seen.put | seen.read
        return plainly

    def _is_put_together(self, node: Node) -> bool:
        """Its parts come from several sources, at places that no numbers of the forward choose."""
        beside = node.op.relation == "side by side" or node.op.name == "constant_pad_nd"
        return beside and not any(self.graph.nodes[s].picked for s in node.sources)


def _levels(totals: frozenset[int], operands: Operands, again: Rerun) -> dict[int, int]:
    """The number of sums in the longest chain up to each; empty where that cannot be told.

    The sums that change where all are changed are second links, those that change where these are, third ones, …
    """
    levels = dict.fromkeys(totals, 1)
    try:
        plain = again({}, totals | {operands[n][1] for n in totals})
        while totals and all(n in plain and not plain[n].is_meta for n in totals):
            added = {n: _added(plain[n], plain.get(operands[n][1])) for n in totals}
            values = again({n: functools.partial(_change, added[n]) for n in totals}, totals)
            later = frozenset(n for n in totals if n not in values or _differ(values[n], plain[n], added[n]))
            levels |= {n: levels[n] + 1 for n in later}
            if later == totals:
                return {}  # a forward that is never twice the same
            totals = later
    except InputError:
        return {}  # the model does not run on other values
    return levels if not totals else {}


def _added(total: Tensor, branch: Tensor | None) -> Tensor:
    """The places where something is added: not beside what was padded with zeros."""
    whole = branch is not None and branch.shape == total.shape
    return branch != 0 if branch is not None and whole else torch.ones_like(total, dtype=torch.bool)


def _change(where: Tensor, tensor: Tensor) -> None:
    tensor.copy_(torch.where(where, 0.5 - tensor, tensor))


def _differ(these: Tensor, those: Tensor, where: Tensor) -> bool:
    return these.shape != those.shape or bool(((these != those) & where).any())
