"""Time or depth: does a chain of additions run over a sequence, or over layers?

It is time where all that a link of the chain depends on grows with the links. Proposed where links read parts of
something that was there before, one after the other; settled by changing halves of that: in time the first link does
not know what the last one knows. A loop over depth that reads its own slice of a condition, or of a cache, knows its
other inputs from the start.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from looptransfer.rewrite.graph import Graph, Part, bits

Change = Callable[[Tensor], None]  # in place
Read = tuple[int, Part | None]  # a node, and which part of it; None: all
# Runs the forward again with some nodes changed, and tells the values of others.
Rerun = Callable[[Mapping[int, Change], frozenset[int]], Mapping[int, Tensor]]


def runs_over_time(
    graph: Graph, chain: list[int], again: Rerun, follows: Callable[[int, int], bool] | None = None
) -> bool:
    """The nodes of a chain, in the order they ran, are steps of a recurrence over time.

    `follows` tells of two nodes whether the first comes after the second; left out, where it is computed from it.
    """
    links, parts = _links(graph, chain, follows or (lambda later, earlier: graph.precedes(earlier, later)))
    if len(links) < 2 or _knows_more(graph, links[0], {source for source, _ in parts}):
        return False
    watch = frozenset([links[0], links[-1]])
    plain = again({}, watch)
    if len(plain) < 2 or plain[links[0]].is_meta:
        return len(plain) == 2  # without numbers, what was proposed stands
    earlier = bits(graph.nodes[links[0]].ancestors | 1 << links[0])
    changed, kept = (
        _by_node(read) for read in (parts, _parts_read(graph, [n for n in earlier if graph.nodes[n].data]))
    )
    values = again({n: functools.partial(_change, changed[n], kept.get(n, [])) for n in changed}, watch)
    first, last = (bool(n in values and not torch.equal(values[n], plain[n])) for n in (links[0], links[-1]))
    return last and not first


def _by_node(parts: set[Read]) -> dict[int, list[Part | None]]:
    regions: defaultdict[int, list[Part | None]] = defaultdict(list)
    for number, part in parts:
        regions[number].append(part)
    return dict(regions)


def _links(graph: Graph, chain: list[int], follows: Callable[[int, int], bool]) -> tuple[list[int], set[Read]]:
    """The first link, and those that read something that none before them read; and what that is.

    What is new to the second link, and read again by all that follow, is injected after every visit.
    """
    links, new, read, passed = chain[:1], set[Read](), set[Read](), 0
    used: list[set[Read]] = []
    for count, link in enumerate(chain):
        earlier = next((n for n in chain[count - 1 :: -1] if count and follows(link, n)), None)
        before = 0 if earlier is None else graph.nodes[earlier].ancestors | 1 << earlier
        fresh = [n for n in [*bits(graph.nodes[link].ancestors & ~before), link] if graph.nodes[n].data]
        parts = _parts_read(graph, fresh)
        if earlier is not None:
            beside = {(n, p) for n, p in parts - read if not (graph.nodes[n].ancestors | 1 << n) & passed}
            links += [link] if beside else []
            new |= beside
        read |= parts
        passed |= 1 << link
        used.append(parts | {(source, None) for n in fresh for source in graph.nodes[n].sources})
    injected = links == chain[:2] and len(chain) > 2 and all(reads & new for reads in used[2:])
    return (chain[:1], set()) if injected else (links, new)


def _parts_read(graph: Graph, fresh: list[int]) -> set[Read]:
    """The parts of data that some nodes read; an input, and what is taken by index, is read as a whole."""
    nodes = graph.nodes
    parts: set[Read] = {(s, part) for n in fresh for s, part in nodes[n].slices if nodes[s].data}
    taken = {n for n in fresh if nodes[n].op.relation == "moved" and nodes[nodes[n].sources[0]].data}
    return parts | {(n, None) for n in fresh if not nodes[n].sources or n in taken}


def _knows_more(graph: Graph, link: int, sequences: set[int]) -> bool:
    """A link depends on data other than the sequences, such as the tokens beside a condition."""
    shapes = {graph.nodes[number].shape for number in sequences if not graph.nodes[number].sources}
    indexed = {graph.nodes[n].sources[0] for n in sequences if graph.nodes[n].op.relation == "moved"}
    queue, seen = [link], set[int]()
    while queue:
        number = queue.pop()
        node = graph.nodes[number]
        if number in seen or number in sequences or not node.data:
            continue
        if node.op.relation == "moved" and node.sources[0] in indexed:  # the first link takes its own part
            continue
        seen.add(number)
        if not node.sources and node.shape not in shapes:  # frames that come as a list are inputs of one shape
            return True
        queue += node.sources
    return False


def _change(regions: list[Part | None], kept: list[Part | None], tensor: Tensor) -> None:
    """Put other values of the same range into some parts of a tensor, in place, and into no element to be kept."""
    plain = tensor.clone()
    for part in regions:
        view = _view(tensor, part)
        if not view.numel():  # as of the first step of a growing prefix
            continue
        other = ~view if view.dtype == torch.bool else view.max() + view.min() - view
        view.copy_(other + 0.5 if view.is_floating_point() else other)
    for part in kept:
        if part is not None:
            _view(tensor, part).copy_(_view(plain, part))


def _view(tensor: Tensor, part: Part | None) -> Tensor:
    return tensor if part is None else tensor.as_strided(part[1], part[2], part[0])
