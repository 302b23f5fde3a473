"""What one forward did, as a graph. Nothing is judged here.

A *node* is one version of one storage, so views, detach and in-place updates need no cases of their own, and a node's
lineage is a bitmask of the nodes it was computed from.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Handle:
    """Where a tensor can be taken hold of: a module's output, or a mark that a module's forward sets."""

    module: str
    output: int | str | None = None  # where it stands in that output; None: it is the output
    mark: str | None = None

    def __str__(self) -> str:
        if self.mark is not None:
            return f"{self.module}:{self.mark}"
        return self.module if self.output is None else f"{self.module}[{self.output}]"


ANY = -1  # every further run of a site


class Site(NamedTuple):
    """Where an addition is spelled, and what runs it."""

    source: str  # file:line
    column: int  # on the line, as far as Python tells
    container: tuple[str, ...]  # the modules running, the outermost first


@dataclass
class Node:
    """One version of one storage."""

    op: str = ""  # empty: it was there before the forward
    sources: tuple[int, ...] = ()
    ancestors: int = 0  # bitmask of node numbers
    data: bool = False  # depends on the example inputs
    parameters: frozenset[str] = frozenset()  # learned tensors that enter here
    matrices: frozenset[str] = frozenset()  # those that act as matrices; "name+offset" where only a part does
    weights_of: frozenset[str] = frozenset()  # without data: the matrices that it is, not those that made it
    zero: bool = False  # a product with 0.0
    masked: bool = False  # a product with random numbers
    reaching: int = 0  # bitmask of all parameters it depends on, other than through a product with 0.0
    repeats: int | None = None  # the node it is identical to
    proportional_to: tuple[tuple[int, ...], ...] = ()  # alternatives; the nodes of one alternative scale together
    factor: float = 1.0  # the constant in that proportion
    even: bool = True  # it is the same for all elements
    weights: tuple[float, ...] = ()  # of each node of an alternative, where they are not 1
    followed: bool = False  # autograd follows it
    gradients_to: frozenset[int] = frozenset()  # the sources that autograd followed into it
    index: bool = False  # whole numbers or truth values: it chooses, and is no amount
    noise: bool = False  # random numbers and what is made of them alone: a dropout mask
    slices: frozenset[tuple[int, int]] = frozenset()  # (source, offset) where it reads a part of it
    handles: list[Handle] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)


@dataclass
class Sum:
    """One execution of an operation that adds tensors of one shape."""

    node: int
    operands: tuple[int, ...]
    scaled: tuple[bool, ...]  # whether the operation itself multiplies that operand
    whole: tuple[bool, ...]  # whether that operand has the shape of the sum; else it is spread over the others
    fused: bool  # an operand is computed by the operation itself, or it is no plain addition
    name: str
    site: Site
    occurrence: int  # which run of that site
    recorded: bool  # autograd was on
    peaks: tuple[float, ...]  # max |operand|, where asked for; NaN where there are no numbers


@dataclass
class Graph:
    """What one forward did."""

    nodes: list[Node]
    sums: list[Sum]
    calls: Counter[Handle]  # how often a module ran (as a handle without output) or a mark was met
    outputs: tuple[int, ...]  # the nodes that the model handed back
    results: list[Tensor]  # the tensors that it handed back
    reaching: frozenset[str]  # parameters that the output depends on, other than through a branch multiplied by 0
    fused_kernels: tuple[str, ...]  # lines where one kernel adds a branch to its own input

    @functools.cached_property
    def live(self) -> int:
        """Bitmask of the nodes that the model's output depends on."""
        if not self.outputs:
            return -1  # it handed back nothing that we know how to open
        return functools.reduce(lambda seen, n: seen | self.nodes[n].ancestors | 1 << n, self.outputs, 0)

    @functools.cached_property
    def touched(self) -> frozenset[str]:
        """Parameters that met data."""
        return frozenset[str]().union(*(node.parameters for node in self.nodes if node.data))

    def repeats(self, parameter: str) -> int:
        """How often a parameter, or the same part of it, acts on what it acted on before, in the same way."""
        chains: dict[int, tuple[tuple[str, int], int]] = {}  # node -> (how it is used, how manieth in a row)
        for number, node in enumerate(self.nodes):
            if node.data and parameter in node.parameters and node.op != "embedding":
                offset = max((o for s, o in node.slices if parameter in self.nodes[s].parameters), default=0)
                part = (node.op, offset)
                earlier = [n for old, (one, n) in chains.items() if one == part and self.precedes(old, number)]
                chains[number] = (part, 1 + max(earlier, default=0))
        return max((n for _, n in chains.values()), default=0)

    def users(self, number: int) -> set[int]:
        """What is computed from a node and reaches the model's output."""
        return {n for n in self.nodes[number].consumers if self.live >> n & 1}

    def same(self, number: int) -> Iterator[int]:
        """A node and those it is identical to, the nearest first."""
        step: int | None = number
        while step is not None:
            yield step
            step = self.nodes[step].repeats

    def precedes(self, old: int, new: int) -> bool:
        """`old` is an ancestor of `new`."""
        return bool(self.nodes[new].ancestors >> old & 1)

    def way(self, start: int, end: int) -> list[int]:
        """The nodes on the paths from `start` to `end`, `end` included."""
        later = self.nodes[end].ancestors >> (start + 1) << (start + 1)
        found = [number for number in bits(later) if self.precedes(start, number)]
        return [*found, end] if self.precedes(start, end) else []


def bits(mask: int) -> Iterator[int]:
    """The numbers in a bitmask, the smallest first."""
    number = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        number += zeros
        yield number
        mask >>= zeros + 1
        number += 1
