"""The number of unique layers that hold the branches.

Branches belong to blocks. A block is the module whose forward adds two or more of them, or an element of a module list
that holds two or more; a module in which every branch has a twin holds as many layers as there are twins. Where there
are no such modules, each branch is a layer. What matters is consistency: doubling the blocks doubles L.
"""

import re
from collections import Counter, defaultdict
from operator import attrgetter

from torch import nn

from looptransfer.rewrite.branches import Group, added_together
from looptransfer.rewrite.graph import Handle
from looptransfer.rewrite.names import named_parameters, plain_names
from looptransfer.rewrite.visits import Branch, Ties

LISTS = (nn.ModuleList, nn.ModuleDict)
Kind = dict[Handle, str]  # branches that are built alike, and a name for each


def find_blocks(model: nn.Module, groups: list[Group]) -> list[str]:
    """The name of every group's block."""
    sums = [added_together(group, groups, attrgetter("begun")) for group in groups]
    principals = [together[0] for together in sums]
    holders = [_holder(model, group, len(together) > 1) for group, together in zip(principals, sums, strict=True)]
    held = Counter(part for name in holders for part in _path(name))
    blocks = [name for name, times in held.items() if times >= 2 and _can_be_block(model, name)]
    places = [next((part for part in reversed(_path(name)) if part in blocks), "") for name in holders]
    units = [_unit(model, around, name) if around else name for around, name in zip(places, holders, strict=True)]
    layers = _layers_within(model, holders, principals)

    def block_of(around: str, holder: str, unit: str, principal: Group) -> str:
        if not around:
            return holder
        if holder == around:
            return layers.get(principal.handle, around)
        siblings = {part for part, where in zip(units, places, strict=True) if where == around and part != around}
        if _element(model, around, holder):
            return around if _in_list(model, around) and _differ(model, siblings) else unit
        stage = isinstance(model.get_submodule(around), (*LISTS, nn.Sequential)) and _alike(model, siblings)
        is_block = around in holders or (_in_list(model, around) and not stage) or _differ(model, siblings)
        return around if is_block else unit

    return [block_of(*place) for place in zip(places, holders, units, principals, strict=True)]


def count_layers(model: nn.Module, blocks: list[str], groups: list[Group], ties: Ties) -> int:
    """L: blocks of which every branch is tied to a branch of the other are one block twice.

    What stands in one sum, as attention and MLP in parallel, is one branch here, however its parentheses are put.

    So are those that one run of a matrix serves together. Runs of one handle that are not tied, as of a skeleton that
    is called with other weights, are different layers; of one mark in an element of a list they are branches of one
    layer.
    """
    parts: defaultdict[tuple[str, int], list[Branch]] = defaultdict(list)
    for block, group in zip(blocks, groups, strict=True):
        whole = group.handle.mark is not None and _in_list(model, block)
        for place, branch in enumerate(ties.sums_apart(group)):
            parts[block, 0 if whole else place].append(branch)
    unique: list[list[Branch]] = []
    for branches in parts.values():
        if not any(ties.alike(branches, block) and ties.alike(block, branches) for block in unique):
            unique.append(branches)
    return len(unique)


def _holder(model: nn.Module, group: Group, parts: bool) -> str:
    """The module whose forward adds the branch; in the model itself or through a list, what hands the branch over.

    `parts`: the branch is a sum of several modules' outputs, such as experts. Where the add runs in a module that does
    not hold the branch (a deferred residual), it is the module around the branch.
    """
    container = group.adds[0].site.container[-1] if group.adds[0].site.container else ""
    module = group.handle.module
    if container and group.handle.mark is None and not module.startswith(container + "."):
        container = module if _in_list(model, module) else module.rpartition(".")[0]
    if not container:
        return module or str(group.handle)
    return module if _element(model, container, module) and not parts else container


def _path(name: str) -> list[str]:
    """A module's name and those around it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _in_list(model: nn.Module, name: str) -> bool:
    return (
        "." in name
        and ":" not in name
        and isinstance(model.get_submodule(name.rpartition(".")[0]), (*LISTS, nn.Sequential))
    )


def _can_be_block(model: nn.Module, name: str) -> bool:
    if ":" in name:
        return False  # a mark in the model itself
    return _in_list(model, name) or not isinstance(model.get_submodule(name), (*LISTS, nn.Sequential))


def _element(model: nn.Module, around: str, inside: str) -> str | None:
    """The element of a list that stands between a module and one inside it."""
    for part in _path(inside):
        if part.startswith(around + ".") and isinstance(model.get_submodule(part.rpartition(".")[0]), LISTS):
            return part if part.rpartition(".")[0] != around else None
    return None


def _unit(model: nn.Module, around: str, holder: str) -> str:
    """The part of a module that holds a branch."""
    below = _path(holder)[len(_path(around)) :]
    return _element(model, around, holder) or (below[0] if below else holder)


def _layers_within(model: nn.Module, holders: list[str], groups: list[Group]) -> dict[Handle, str]:
    """The layers of modules in which every branch has a twin: attn0, mlp0, attn1 and mlp1 are no parts of one block.

    Twins are built alike and told apart by numbers alone; where there are several kinds of twins, by any names. So two
    MLPs stay one block, as do attention, cross-attention and MLP.
    """
    modules, parameters = plain_names(model), named_parameters(model)
    kinds: defaultdict[str, defaultdict[tuple[str, ...], Kind]] = defaultdict(lambda: defaultdict(dict))
    for holder, group in zip(holders, groups, strict=True):
        if not _in_list(model, holder):
            name = group.handle.module if group.handle.mark is None else str(group.handle)
            kinds[holder][_structure(modules, parameters, group)][group.handle] = name
    layers: dict[Handle, str] = {}
    for holder, held in kinds.items():
        built = list(held.values())
        numbered = [kind for alike in built for kind in _numbered(holder, alike)]
        twins = numbered if min(map(len, numbered)) > 1 else built
        if min(map(len, twins)) > 1 and (twins is numbered or len(twins) > 1):
            names = list(max(twins, key=len).values())
            layers |= {handle: names[n * len(names) // len(kind)] for kind in twins for n, handle in enumerate(kind)}
    return layers


def _numbered(holder: str, alike: Kind) -> list[Kind]:
    """The branches that only numbers in their names tell apart, together."""
    stems: defaultdict[str, Kind] = defaultdict(dict)
    for handle, name in alike.items():
        stems[re.sub(r"\d+", "", name.removeprefix(holder))][handle] = name
    return list(stems.values())


def _structure(modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter], group: Group) -> tuple[str, ...]:
    """The build of a branch: the modules that hand it over, and the matrices that it is made of."""
    parts = modules[group.handle.module].modules() if group.handle.mark is None else ()
    names = [name.split("+")[0] for name in group.adds[0].matrices]
    shapes = sorted(str(parameters[name].shape) for name in names if name in parameters)
    return *(type(part).__qualname__ for part in parts), *shapes


def _differ(model: nn.Module, names: set[str]) -> bool:
    """No two of the parts are built alike: attention and MLP, not two layers."""
    return len(_builds(model, names)) == len(names)


def _alike(model: nn.Module, names: set[str]) -> bool:
    """All of the parts are built alike: the layers of a stage."""
    return len(_builds(model, names)) == 1


def _builds(model: nn.Module, names: set[str]) -> set[tuple[str, ...]]:
    return {tuple(type(module).__qualname__ for module in model.get_submodule(name).modules()) for name in names}
