"""What gets where past learned matrices and through them, and where the two meet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looptransfer.rewrite.graph import Graph
from looptransfer.rewrite.paths import Paths
from looptransfer.rewrite.record import record
from tests.models import WIDTH
from tests.rewrite.answers import Stepped, X

Step = Callable[[Any, Tensor], Tensor]


def recorded(step: Step) -> tuple[Graph, int, int]:
    """The graph of one step, with the numbers of its input and its output."""
    graph = record(Stepped(step, 1, a=nn.Linear(WIDTH, WIDTH), gain=nn.Parameter(torch.ones(WIDTH))).double(), X)
    (out,) = graph.outputs
    return graph, next(n for n, node in enumerate(graph.nodes) if node.data), out


# A step; whether its input reaches the output past matrices alone, and through some; and whether the two meet there.
CASES: dict[str, tuple[Step, bool, bool, bool]] = {
    "pointwise": (lambda m, x: x.tanh() * 2, True, False, False),
    "a norm": (lambda m, x: nn.functional.layer_norm(x, (WIDTH,)) * m.gain, True, False, False),
    "a matrix": (lambda m, x: m.a(x), False, True, False),
    "a mean": (lambda m, x: x.mean(1, keepdim=True), False, False, False),
    "a residual branch": (lambda m, x: x + m.a(x), False, True, True),
    "a residual branch of a norm": (lambda m, x: x + m.a(x.relu()), False, True, True),
    "a gate": (lambda m, x: x * torch.sigmoid(m.a(x)), True, True, False),
    "a contraction": (lambda m, x: (x @ m.a(x).transpose(1, 2)).softmax(-1) @ x, False, True, False),
    "a maximum": (lambda m, x: torch.maximum(x, m.a(x)), False, True, True),
    "side by side": (lambda m, x: torch.cat([x, m.a(x)], -1), True, True, False),
    "summed side by side": (lambda m, x: torch.stack([x, m.a(x)]).sum(0), False, True, True),
    "pooled side by side": (lambda m, x: torch.cat([x, m.a(x)], 1).mean(1), False, True, False),
    "a read-out of two matrices": (lambda m, x: m.a(x) + m.a(x.relu()), False, True, False),
    "a statistic": (lambda m, x: m.a(x) - m.a(x).mean(-1, keepdim=True), False, True, False),
    "a choice": (lambda m, x: torch.where(m.a(x) > 0, x, -x), True, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_ways_past_matrices_and_through_them_are_told_apart(name: str) -> None:
    step, past, through, joined = CASES[name]
    graph, start, end = recorded(step)
    paths = Paths(graph, {})
    assert paths.skips(start, end) == past
    assert bool(paths.through[end] >> start & 1) == through
    assert paths.acts(start, end) == (through and not past)
    joins = [join for n in range(len(graph.nodes)) if (join := paths.join_at(n)) is not None]
    assert bool(joins) == joined
    assert all(join.root == start or graph.precedes(start, join.root) for join in joins)


def test_a_branch_that_is_cut_leaves_the_stream_and_no_join() -> None:
    graph, start, end = recorded(lambda m, x: x + m.a(x) + m.g(x))
    first, second = (total.node for total in graph.sums if graph.nodes[total.node].data and total.whole == (True, True))
    stream = {total.node: total.operands[0] for total in graph.sums}
    assert second == end
    both = Paths(graph, {n: stream[n] for n in (first, second)})
    assert both.skips(start, end)
    assert not both.through[end]
    assert not any(both.join_at(n) for n in range(len(graph.nodes)))
    one = Paths(graph, {first: stream[first]})
    join = one.join_at(second)
    assert join is not None
    assert (join.root, join.learned_skip) == (start, False)
    assert Paths(graph, {first: None}).gone == {first}


def test_what_comes_through_matrices_on_both_ways_is_a_learned_skip() -> None:
    graph, start, end = recorded(lambda m, x: m.a(x) + m.g(x))
    join = Paths(graph, {}).join_at(end)
    assert join is not None
    assert (join.root, join.learned_skip) == (start, True)
