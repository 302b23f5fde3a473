"""How many unique layers hold the branches.

Branches belong to blocks. A block is the module whose forward adds two or more of them; where a model's own forward
adds the branches of modules that it keeps in lists, each element of a list is one. Siblings that are built alike are
blocks of their own, and siblings that differ are parts of one: attention and MLP in lists of their own, or each in a
residual wrapper, make one block a pair. What matters is consistency: doubling the blocks doubles L.
"""

from collections import Counter, defaultdict

from torch import nn

from looptransfer.rewrite.branches import Group

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module, groups: list[Group]) -> list[str]:
    """The name of every group's block: a module, or where a block is spread over several, its first part."""
    holders = [_holder(group) for group in groups]
    held = Counter(part for name in holders for part in _path(name))
    numbered: dict[str, int] = {}
    alike: Counter[tuple[str, str]] = Counter()
    first = {(name, 0): name for name in holders if name and held[name] >= 2}  # it adds branches of its own
    names = []
    for group, holder in zip(groups, holders, strict=True):
        around = next((part for part in reversed(_path(holder)) if held[part] >= 2), "")
        unit = _unit(model, around, holder, group.handle.module)
        if holder == around and around and unit.rpartition(".")[0] == around:
            names.append(around)  # a block's own branch
        elif held[unit] >= 2 or (not around and "." not in unit):
            names.append(unit)  # in the model itself each branch is a layer
        else:
            if unit not in numbered:
                build = (around, _build(model, unit, group))
                numbered[unit] = alike[build]
                alike[build] += 1
            names.append(first.setdefault((around, numbered[unit]), unit))
    spread = Counter(names)
    return [_whole_block(held, name, spread) for name in names]


def _whole_block(held: Counter[str], name: str, spread: Counter[str]) -> str:
    """The module around all parts of a block, where it holds nothing else."""
    around = name.rpartition(".")[0]
    return around if around and held[around] == spread[name] > held[name] else name


def count_layers(blocks: list[str], matrices: list[frozenset[str]]) -> int:
    """L: blocks of which every branch shares a matrix with a branch of the other are one block twice."""
    parts: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
    for block, names in zip(blocks, matrices, strict=True):
        parts[block].append(names)
    unique: list[list[frozenset[str]]] = []
    for branches in parts.values():
        if not any(_tied(branches, one) and _tied(one, branches) for one in unique):
            unique.append(branches)
    return len(unique)


def _tied(these: list[frozenset[str]], those: list[frozenset[str]]) -> bool:
    return all(any(one & other for other in those) for one in these)


def _holder(group: Group) -> str:
    """The module whose forward adds the branch, or for a branch that the model's own forward adds, its handle."""
    container = group.adds[0].container
    return container[-1] if container and container[-1] else group.handle.module


def _path(name: str) -> list[str]:
    """A module's name and those around it, the outermost (the model, "") first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _unit(model: nn.Module, around: str, holder: str, handle: str) -> str:
    """The part of `around` that holds the branch; of a list, the element."""
    name = holder if holder != around else handle
    for part in _path(name):
        inside = part != around and part.startswith(around + "." if around else "") and part
        if inside and not isinstance(model.get_submodule(part), LISTS):
            return part
        parent = part.rpartition(".")[0]
        if inside and parent != around and isinstance(model.get_submodule(parent), LISTS):
            return part  # a list in a list is one element
    return name


def _build(model: nn.Module, unit: str, group: Group) -> str:
    """What a unit is made of: the classes in it and the shapes of its branch's matrices."""
    classes = [type(module).__qualname__ for module in model.get_submodule(unit).modules()]
    shapes = sorted(str(tuple(model.get_parameter(p).shape)) for p in group.parameters)
    return " ".join([*classes, *(shapes if not classes[1:] else [])])
