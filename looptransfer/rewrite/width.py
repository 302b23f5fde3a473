"""Widths: what grows from a small instance of a model to this one, and what μP makes of it.

Two instances tell which dimensions of a parameter are widths: those in which they differ. By arXiv 2203.03466, Table
8, as `mup` applies it, a matrix that grows both ways starts with a standard deviation by fan-in^(−1/2), everything else
as at the base width; a matrix whose fan-in alone grows (the head) has its input multiplied by base fan-in / fan-in; LRs
are by `width_divisor`.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError
from looptransfer.rewrite.analysis import Analysis
from looptransfer.rewrite.graph import Graph
from looptransfer.rewrite.names import named_parameters, plain_names
from looptransfer.rules import Family
from looptransfer.text import few

SURE = 4.0  # standard errors within which a measured scale is taken for a half power of the width
Shape = tuple[int, ...]
Growth = tuple[float | None, ...]


def base_shapes(model: nn.Module, base: nn.Module) -> dict[str, Shape]:
    """The shapes that those parameters of `model` have in `base` which are larger or smaller there.

    Raises:
        InputError: the two have other parameters, or one that differs in more than two dimensions.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(model).items()}
    small = {name: tuple(parameter.shape) for name, parameter in named_parameters(base).items()}
    odd = sorted(shapes.keys() ^ small.keys())
    odd += [name for name in shapes if name in small and len(shapes[name]) != len(small[name])]
    if odd:
        raise InputError(
            f"model and base do not have the same parameters ({few(odd)}); base must be the same model built "
            "at a smaller width: same layers, heads of the same size"
        )
    grown = {name: small[name] for name, shape in shapes.items() if shape != small[name]}
    for name, shape in grown.items():
        if len(_ratios(shape, shapes[name])) > 2:
            raise InputError(
                f"{name} is {shapes[name]}, and {shape} in base: more than two of its dimensions grow, for which μP "
                "has no rule; keep the other dimensions fixed"
            )
    return grown


def growth(base: Shape, shape: Shape) -> Growth:
    """The ratio by which each dimension grows; None where it stays."""
    return tuple(n / small if n != small else None for small, n in zip(base, shape, strict=True))


def width_divisor(ratios: Growth, family: Family) -> float:
    """μP's divisor of the LR (arXiv 2203.03466, Table 8, as `mup` applies it). Muon's step is right over widths."""
    widths = [ratio for ratio in ratios if ratio is not None]
    if family == "muon" or not widths:
        return 1.0
    if len(widths) == 2:
        return (ratios[1] or 1.0) / (ratios[0] or 1.0) if family == "sgd" else widths[-1]
    return 1.0 / widths[-1] if family == "sgd" and len(widths) == 1 else 1.0


def read_outs(model: nn.Module, analysis: Analysis, bases: Mapping[str, Shape]) -> dict[str, float]:
    """The modules whose matrices grow in fan-in alone, each with the factor on its input.

    Raises:
        InputError: such a matrix is used in the forward of a module that does not own it.
    """
    graph, modules = analysis.trace.graph, plain_names(model)
    parameters = named_parameters(model)
    factors = {}
    for name, base in bases.items():
        shape = tuple(parameters[name].shape)
        for number in _acting(graph, name):
            if not _reads_width(graph, number, base, shape):
                continue
            owners = {key for key, module in modules.items() if any(p is parameters[name] for p in _own(module))}
            owner = _handed_over_by(graph, number, owners)
            if owner is None:
                raise InputError(
                    f"{name} grows with the width in what it reads and not in what it makes, and {graph.line(number)} "
                    "uses it outside of a module of its own, where no factor can be put; write it as a module that "
                    "shares the weight: head = nn.Linear(…); head.weight = embedding.weight"
                )
            factors[owner] = 1 / _ratios(base, shape)[-1]
    return factors


def check_attention(small: Graph, graph: Graph) -> None:
    """Refuse a head dimension that grows: μP would have attention scaled by 1/d, which a forward spells as it likes.

    Raises:
        InputError: names the line at which data is multiplied with data over more numbers than in the base.
    """
    sizes = _contracted(small)
    for place, contracted in _contracted(graph).items():
        if place in sizes and contracted != sizes[place]:
            sizes_here, sizes_in_base = (", ".join(map(str, sorted(numbers))) for numbers in (contracted, sizes[place]))
            raise InputError(
                f"at {place} activations are multiplied over {sizes_here} numbers, and over {sizes_in_base} in base: "
                "the head dimension grows, and the attention scale in the forward is not ours to change; keep the head "
                "dimension and let the number of heads grow"
            )


def rescale_weights(model: nn.Module, base: nn.Module, bases: Mapping[str, Shape]) -> None:
    """Give the weights, in place, the scale at the start that they have in `base`, by width as μP has it.

    Measured are the root mean squares of both. Where those of a matrix differ by a half power of the width, which is
    what initialisers do, the factor is exact. A bias has either the power of its matrix, as torch starts it, or none.
    """
    parameters, small = named_parameters(model), named_parameters(base)
    powers: dict[str, float] = {}
    for name, parameter in parameters.items():
        if parameter.ndim >= 2 and name in bases:
            ratios = _ratios(bases[name], tuple(parameter.shape))
            powers[name] = _power(parameter, small[name], ratios[-1])
            _multiply(parameter, (ratios[-1] ** -0.5 if len(ratios) == 2 else 1.0) / powers[name])
    for name, parameter in parameters.items():
        beside = [other for other in powers if other.rpartition(".")[0] == name.rpartition(".")[0]]
        numbers, base_numbers = _size(parameter), _size(small[name])
        if parameter.ndim < 2 and len(beside) == 1 and numbers and base_numbers:
            power = min(1.0, powers[beside[0]], key=lambda power: abs(math.log(numbers / base_numbers / power)))
            _multiply(parameter, 1 / power)


def _power(parameter: Tensor, small: Tensor, width: float) -> float:
    """The growth of a matrix's scale with the width: a half power, where it may be one."""
    numbers, base_numbers = _size(parameter), _size(small)
    if not numbers or not base_numbers:
        return 1.0
    power = width ** (round(2 * math.log(numbers / base_numbers) / math.log(width)) / 2)
    error = math.sqrt(1 / (2 * parameter.numel()) + 1 / (2 * small.numel()))
    return power if abs(math.log(numbers / base_numbers / power)) <= SURE * error + 1e-6 else numbers / base_numbers


def _multiply(parameter: Tensor, factor: float) -> None:
    if factor != 1:
        with torch.no_grad():
            parameter.mul_(factor)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().double().pow(2).mean().sqrt()) if tensor.numel() else 0.0


def _ratios(base: Shape, shape: Shape) -> list[float]:
    """The growth of each dimension that grows."""
    return [ratio for ratio in growth(base, shape) if ratio is not None]


def _acting(graph: Graph, name: str) -> Iterator[int]:
    """The nodes at which a parameter acts on data as a matrix."""
    for number, node in enumerate(graph.nodes):
        if graph.is_live(number) and any(matrix.split("+")[0] == name for matrix in node.matrices - node.selected):
            yield number


def _reads_width(graph: Graph, number: int, base: Shape, shape: Shape) -> bool:
    """Of the dimensions of the matrix that acts there the one that is summed over grows, and no other."""
    if len(_ratios(base, shape)) != 1:
        return False
    axis = next(axis for axis, size in enumerate(shape) if size != base[axis])
    node = graph.nodes[number]
    read = {graph.nodes[n].shape[-1] for n in node.sources if graph.nodes[n].data and graph.nodes[n].shape}
    last_size = node.shape[-1] if node.shape else 0
    if (shape[axis] in read) == (shape[axis] == last_size):  # the sizes do not tell: as nn.Linear keeps them
        return axis == 1
    return shape[axis] in read


def _handed_over_by(graph: Graph, number: int, owners: set[str]) -> str | None:
    """The module, of those that own the matrix, that returns what was made with it: the first thereafter."""
    for later in range(number, len(graph.nodes)):
        if later == number or graph.precedes(number, later):
            for handle in graph.nodes[later].handles:
                if handle.module in owners:
                    return handle.module
    return None


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _contracted(graph: Graph) -> dict[str, set[int]]:
    """The sizes over which data is multiplied with data, by line."""
    sizes: dict[str, set[int]] = {}
    for number, node in enumerate(graph.nodes):
        if node.contracted:
            sizes.setdefault(graph.line(number), set()).add(node.contracted)
    return sizes
