"""One forward, as a graph. Nothing is judged here.

A *node* is what one operation wrote: one version of one memory, or of the part of it that was written. So views,
detach and in-place updates need no cases of their own. The nodes are numbered in the order they ran, and a set of nodes
is a bitmask of their numbers:

    x = embed(ids)      0: ids, 1: embed.weight, 2 <- 0, 1
    y = f(norm(x))      3: f.weight, 4 <- 2, 5 <- 3, 4
    x = x + y           6 <- 2, 5          node 6 has the ancestors 1, 2, 3, 4, 5

The words of this folder:

    stream     what is carried on by identity and added to: x above
    branch     what is added to it, and learned matrices made: y above
    handle     where a branch can be multiplied: the module that returns it, or a mark in a forward (`residual`)
    site       the line and column of an addition, and the modules that run it; its runs are numbered
    end        the last learned map of a branch, into which ε could be folded
    twin       a copy of the model, mostly with random weights, on which everything is tried
    to steer   of random numbers or weights: their values go to Python, which may loop more or less often for it
    stranger   a module of the original that runs in a forward of its copy
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptransfer.rewrite.ops import GIVEN, Operator


@dataclass(frozen=True)
class Handle:
    """A place where a tensor can be taken hold of: a module's output, or a mark that a module's forward sets."""

    module: str
    output: int | str | None = None  # where it stands in that output; None: it is the output
    mark: str | None = None

    def __str__(self) -> str:
        if self.mark is not None:
            return f"{self.module}:{self.mark}"
        return self.module if self.output is None else f"{self.module}[{self.output}]"


ANY = -1  # every further run of a site
Part = tuple[int, tuple[int, ...], tuple[int, ...]]  # of a memory: offset, shape and strides, in elements


class Site(NamedTuple):
    """A place where an addition is spelled, and the modules that run it."""

    source: str  # file:line
    column: int  # on the line, as far as Python tells
    container: tuple[str, ...]  # the modules running, the outermost first


@dataclass(frozen=True)
class Call:
    """An operation as it ran, to be run again on changed arguments."""

    op: Operator
    func: Any
    args: Any
    kwargs: Any
    inputs: list[Tensor]
    before: list[int | None]  # the node that each input holds
    versions: list[int]

    def again(self, change: Callable[[int | None, Tensor], Tensor]) -> list[Tensor] | None:
        """The results with every input changed so; None where that cannot be told any more."""
        if self.op.draws or self.op.writes or versions(self.inputs) != self.versions or any(map(is_gone, self.inputs)):
            return None
        changed = {id(tensor): change(n, tensor) for n, tensor in zip(self.before, self.inputs, strict=True)}

        def put(leaf: Any) -> Any:
            return changed[id(leaf)] if isinstance(leaf, Tensor) else leaf

        args, kwargs = torch.utils._pytree.tree_map(put, (self.args, self.kwargs))
        with torch.no_grad():
            return tensors_in(self.func(*args, **kwargs))


@dataclass
class Node:
    """One version of one memory.

    `proportional_to` of z = (a * b) @ w, with data in a and b, is ((a,), (b,)): z doubles with either. Of z = a + b it
    is ((a, b),): z doubles if both do. A branch can be multiplied wherever it is proportional to what stands there.
    """

    op: Operator = GIVEN
    sources: tuple[int, ...] = ()
    ancestors: int = 0  # what it was computed from, other than through a choice
    shape: tuple[int, ...] = ()
    place: tuple[str, int] = ("", 0)  # file and line that spelled the operation
    data: bool = False  # depends on the example inputs
    choice: bool = False  # whole numbers or truth values: it chooses, and no gradient gets through
    picked: bool = False  # a choice made by numbers of the forward, and not by the inputs themselves
    backward: bool = False  # autograd computes a gradient here
    random: bool = False  # depends on random numbers
    learned: bool = False  # depends on learned tensors, a choice by them included
    noise: bool = False  # random numbers and what is made of them alone: a dropout mask
    parameters: frozenset[str] = frozenset()  # learned tensors that enter here
    matrices: frozenset[str] = frozenset()  # those that act as matrices; "name+part" where only a part does
    weights_of: frozenset[str] = frozenset()  # without data: the matrices that it is, not those that made it
    selected: frozenset[str] = frozenset()  # the matrices that it holds rows of, as data chose them
    repeats: int | None = None  # the node it is identical to
    proportional_to: tuple[tuple[int, ...], ...] = ()  # alternatives; the nodes of one alternative scale together
    factor: float = 1.0  # the constant in that proportion
    even: bool = True  # it is the same for all elements
    signs: tuple[float, ...] = ()  # of a sum: the factor of each source
    masked: bool = False  # a product with random numbers
    followed: bool = False  # autograd follows it
    gradients_to: frozenset[int] = frozenset()  # the sources that autograd followed into it
    slices: frozenset[tuple[int, Part]] = frozenset()  # the sources of which it reads a part
    slot: int = 0  # which result of its call it is
    contracted: int = 0  # of data multiplied with data: the numbers summed over
    call: Call | None = None  # where what it does to its sources is not known from its name
    handles: list[Handle] = field(default_factory=list)
    handed_over: dict[Handle, int] = field(default_factory=dict)  # the number of the next node then
    consumers: list[int] = field(default_factory=list)


@dataclass
class Sum:
    """One addition of two tensors."""

    node: int
    operands: tuple[int, int]
    signs: tuple[float, float]  # what the addition itself multiplies each operand by
    whole: tuple[bool, bool]  # whether that operand has the shape of the sum; else it is spread over the other
    site: Site
    occurrence: int  # which run of that site
    recorded: bool  # autograd was on
    followed: bool  # a gradient gets there


@dataclass
class Graph:
    """One forward: its nodes and sums, and what it handed back."""

    nodes: list[Node]
    sums: list[Sum]
    calls: Counter[Handle]  # how often a module ran (as a handle without output) or a mark was met
    outputs: tuple[int, ...]  # the nodes that the model handed back
    results: tuple[int, ...]  # which of the tensors that it handed back are no gradients that it took itself
    fused_kernels: tuple[str, ...]  # lines where one kernel adds a branch to its own input
    chance_steers: bool  # random numbers may have told Python what to do
    weights_steer: bool  # what learned tensors made may have
    watched: dict[int, Tensor]  # the values of the nodes that were asked for

    @functools.cached_property
    def ends(self) -> list[int]:
        """The outputs that matter: numbers, and no losses where there is anything else.

        Of a model that hands back nothing that can be opened, they are what nothing else was made of.
        """
        amounts = [n for n in self.outputs if not self.nodes[n].choice]
        if not amounts:
            amounts = [n for n, node in enumerate(self.nodes) if node.data and not node.consumers and not node.choice]
        return [n for n in amounts if self.nodes[n].shape] or amounts

    @functools.cached_property
    def live(self) -> int:
        """Bitmask of the nodes that the model's output depends on."""
        if all(self.nodes[n].choice for n in self.outputs):
            return -1  # it handed back nothing that we know how to open
        return functools.reduce(lambda seen, n: seen | self.nodes[n].ancestors | 1 << n, self.outputs, 0)

    @functools.cached_property
    def touched(self) -> frozenset[str]:
        """Parameters that met data."""
        return frozenset[str]().union(*(node.parameters for node in self.nodes if node.data))

    @functools.cached_property
    def terms(self) -> dict[int, frozenset[int]]:
        """The operands of every addition that have its shape; else they are spread over it, as a bias is."""
        return {
            total.node: frozenset(n for n, whole in zip(total.operands, total.whole, strict=True) if whole)
            for total in self.sums
        }

    @functools.cached_property
    def marked(self) -> frozenset[int]:
        """The nodes that the user marked."""
        return frozenset(n for n, node in enumerate(self.nodes) if any(h.mark is not None for h in node.handles))

    def is_live(self, number: int) -> bool:
        """The model's output depends on the node."""
        return bool(self.live >> number & 1)

    def line(self, number: int) -> str:
        """The line that spelled a node's operation, as file:line."""
        return ":".join(map(str, self.nodes[number].place))

    def users(self, number: int) -> set[int]:
        """The nodes that are computed from a node and reach the model's output."""
        return {n for n in self.nodes[number].consumers if self.live >> n & 1}

    def same(self, number: int) -> Iterator[int]:
        """A node and those it is identical to, the nearest first."""
        step: int | None = number
        while step is not None:
            yield step
            step = self.nodes[step].repeats

    def same_but_constants(self, number: int) -> int | None:
        """The node that a node is identical to, or was before a table, a bias or noise was added to it."""
        node = self.nodes[number]
        if node.repeats is None and node.op.relation == "sum" and node.shape:
            data = [(s, sign) for s, sign in zip(node.sources, node.signs, strict=False) if self.nodes[s].data]
            return data[0][0] if len(data) == 1 and data[0][1] == 1 and len(node.sources) == 2 else None
        return node.repeats

    def precedes(self, old: int, new: int) -> bool:
        """`old` is an ancestor of `new`."""
        return bool(self.nodes[new].ancestors >> old & 1)

    def between(self, start: int, end: int) -> list[int]:
        """The nodes on the paths from `start` to `end`, `end` included."""
        later = self.nodes[end].ancestors >> (start + 1) << (start + 1)
        return [*(n for n in bits(later) if self.precedes(start, n)), end] if self.precedes(start, end) else []

    def matrices_on(self, nodes: "list[int] | frozenset[int] | range") -> frozenset[str]:
        """The matrices that act at these nodes."""
        return frozenset[str]().union(*(self.nodes[n].matrices for n in nodes))

    def scaling(self, number: int) -> tuple[tuple[int, ...], ...]:
        """The alternatives of sources that a node is proportional to; tried out where its operator has no row."""
        node = self.nodes[number]
        if node.call is not None and not node.proportional_to:
            amounts = [n for n in dict.fromkeys(node.sources) if self.nodes[n].data and not self.nodes[n].choice]
            choices = [(n,) for n in amounts] + ([tuple(amounts)] if len(amounts) > 1 else [])
            node.proportional_to = tuple(choice for choice in choices if self.scales_with(number, choice))
            node.call = node.call if node.proportional_to else None
        return node.proportional_to

    def scales_with(self, number: int, sources: tuple[int, ...]) -> bool:
        """A node doubles where these sources do and the others stay. In floating point that is exact."""
        node = self.nodes[number]
        if node.call is None:
            return sources in node.proportional_to
        plain = node.call.again(lambda _, tensor: tensor)
        doubled = node.call.again(lambda n, tensor: tensor * 2 if n in sources else tensor)
        if plain is None or doubled is None or plain[node.slot].is_meta:
            return False
        return torch.equal(doubled[node.slot], plain[node.slot] * 2)


def bits(mask: int) -> Iterator[int]:
    """The numbers in a bitmask, the smallest first."""
    number = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        number += zeros
        yield number
        mask >>= zeros + 1
        number += 1


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in an operator's arguments or results: they hold lists at most."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for leaf in tree for tensor in tensors_in(leaf)]
    return [tensor for leaf in tree.values() for tensor in tensors_in(leaf)] if isinstance(tree, dict) else []


def is_gone(tensor: Tensor) -> bool:
    """The memory was given back, as FSDP does with a gathered parameter after its module's forward."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return False
    return tensor.untyped_storage().nbytes() == 0


def versions(inputs: list[Tensor]) -> list[int]:
    """The number of times that each tensor was written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in inputs]
