"""From a trace and a rule to a ScalingPlan: layers, visits and multiplier per branch, and what was left alone."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.trace import ResidualAdd, Returned, Trace
from looptransfer.rules import Rule, depth_factors, depth_multiplier, residual_multiplier


@dataclass(frozen=True)
class Branch:
    """One residual branch: where its output is taken, where it is added, and the factor ε it gets."""

    layer: str  # the block that holds it
    module: str  # its output is the branch; names as in `model.named_modules()`
    output: int | str | None  # which part of that output, where it is a tuple or a mapping
    source: str  # file:line of the residual add
    visits: int
    multiplier: float
    parameters: tuple[str, ...]  # pre-norm gains included


@dataclass(frozen=True)
class LeftAlone:
    """A residual add that is not scaled, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class ScalingPlan:
    """What `parametrize` does to a model. `print(plan)` shows it as a table."""

    rule: Rule
    lam: float
    base_layers: int
    layers: int
    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    on_stream: tuple[str, ...] = ()  # parameters used again and again outside every scaled branch

    @property
    def loops(self) -> int | frozenset[int]:
        """N, or the set of visit counts where branches differ (a prelude is visited once)."""
        visits = frozenset(branch.visits for branch in self.branches)
        return next(iter(visits)) if len(visits) == 1 else visits

    @property
    def depth_multiplier(self) -> float:
        """m_L = L / L_ref."""
        return depth_multiplier(self.layers, self.base_layers)

    def __str__(self) -> str:
        rows = [("layer", "branch", "visits", "multiplier", "added at")]
        rows += [(b.layer, _label(b), str(b.visits), f"{b.multiplier:.6g}", _short(b.source)) for b in self.branches]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        loops = self.loops if isinstance(self.loops, int) else "{" + ", ".join(map(str, sorted(self.loops))) + "}"
        factors = depth_factors(self.rule, "adamw", self.layers, self.base_layers)
        head = (
            f"rule {self.rule}: N = {loops}, L = {self.layers}, base layers {self.base_layers}, λ = {self.lam:g}\n"
            f"AdamW: LR and eps of the branches' parameters × {factors.lr:.4g}, everything else × 1"
        )
        notes = [f"left alone  {_short(left.source)}: {left.reason}" for left in self.left_alone]
        if self.on_stream:
            notes.append(f"not scaled   used again and again outside the branches: {', '.join(self.on_stream)}")
        if isinstance(self.loops, frozenset):
            notes.append(
                "note: layers outside the loop count in L with one visit each (our extension of the paper's rule)"
            )
        return "\n".join([head, *lines, *notes])


@dataclass
class _Group:
    """All adds whose branch one module output hands over."""

    handle: Returned
    adds: list[ResidualAdd]
    parameters: frozenset[str] = frozenset()
    visits: int = 0


def make_plan(model: nn.Module, trace: Trace, rule: Rule, lam: float, base_layers: int) -> ScalingPlan:
    """Decide multiplier and block of every residual branch in `trace`.

    N is counted per learned matrix: the number of residual adds whose branch it acts in, so tied weights count
    together, whatever modules hold them. L counts blocks that share no matrix; layers outside the loop count too
    (our extension: the paper leaves multi-stage models open).

    Raises:
        InputError: no residual add was found, or a branch has no module whose output could be multiplied.
    """
    leaves = [add for add in trace.adds if add.kind == "leaf"]
    if not leaves:
        raise InputError(
            "no residual add was found: nothing of the form x + f(x), with learned matrices in f, ran in the forward. "
            "Check that the example inputs reach the looped layers and that the model was not compiled"
        )
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    groups = _group(leaves, trace.calls, matrices)
    seen = Counter(name for add in leaves for name in add.parameters & matrices)
    canonical = {name for name, _ in model.named_parameters()}
    for group in groups:
        group.visits = max(seen[name] for add in group.adds for name in add.parameters & matrices)
        owned = {name for name, _ in model.get_submodule(group.handle.module).named_parameters(group.handle.module)}
        group.parameters = frozenset().union(*(add.parameters for add in group.adds)) | (owned & canonical)
    blocks = _blocks(model, groups)
    layers = _count_unlinked(blocks, [group.parameters & matrices for group in groups])
    branches = tuple(
        Branch(
            layer=block,
            module=group.handle.module,
            output=group.handle.index,
            source=group.adds[0].source,
            visits=group.visits,
            multiplier=residual_multiplier(rule, visits=group.visits, layers=layers, lam=lam, base_layers=base_layers),
            parameters=tuple(sorted(group.parameters)),
        )
        for block, group in zip(blocks, groups, strict=True)
    )
    others = Counter((add.source, add.kind) for add in trace.adds if add.kind != "leaf")
    return ScalingPlan(rule, lam, base_layers, layers, branches, tuple(_left_alone(*key) for key in others))


def _left_alone(source: str, kind: str) -> LeftAlone:
    reason = {
        "composite": "the added branch holds residual adds of its own (an input injection or a long skip)",
        "inner": "it lies inside a scaled branch and never becomes the stream",
    }[kind]
    return LeftAlone(source, reason)


def _group(leaves: list[ResidualAdd], calls: Counter[str], matrices: set[str]) -> list[_Group]:
    """One group per handle: the outermost module output that is a branch at every call, and the same branch each time.

    A dropout object that serves several branches is no handle: no matrix acts in all of them.
    """
    offered: Counter[Returned] = Counter()
    common: dict[Returned, frozenset[str]] = {}
    for add in leaves:
        for one in set(add.returned):
            offered[one] += 1
            common[one] = common.get(one, add.parameters) & add.parameters & matrices

    def is_handle(one: Returned) -> bool:
        return bool(one.module and common[one]) and offered[one] == calls[one.module]

    groups: dict[Returned, _Group] = {}
    for add in leaves:
        handles = [one for one in add.returned if is_handle(one)]
        if not handles or add.used_elsewhere:
            problem = "also feeds something else" if handles else "is not the output of a module of its own"
            raise InputError(
                f"the residual branch added at {add.source} {problem}, so it cannot be multiplied on its way to the "
                "stream. Compute the branch in an nn.Module whose output is added there and nowhere else"
            )
        groups.setdefault(handles[-1], _Group(handles[-1], [])).adds.append(add)
    return list(groups.values())


def _blocks(model: nn.Module, groups: list[_Group]) -> list[str]:
    """The block of every branch: the innermost module that holds two or more of them, where those differ in kind.

    Siblings of one class are layers, siblings of different classes are the branches of one layer. Where that names no
    module, the one whose forward does the add is the block, and in a model without blocks the branch itself.
    """
    holders = [group.adds[0].container for group in groups]

    def kinds(block: str) -> list[str]:
        """Classes of the next modules inside `block` towards each distinct branch holder."""
        inner = {path[path.index(block) + 1] for path in holders if block in path and path[-1] != block}
        return [type(model.get_submodule(name)).__qualname__ for name in sorted(inner)]

    def block_of(group: _Group, path: tuple[str, ...]) -> str:
        for name in reversed(path[1:]):  # path[0] is the model itself
            held = sum(name in other for other in holders)
            if held >= 2:
                inner = kinds(name)
                if len(set(inner)) == len(inner):
                    return name
                break
        return path[-1] if len(path) > 1 else group.handle.module

    return [block_of(group, path) for group, path in zip(groups, holders, strict=True)]


def _count_unlinked(blocks: list[str], matrices: list[frozenset[str]]) -> int:
    """How many blocks are left when those that share a matrix count as one."""
    parent = {block: block for block in blocks}

    def root(block: str) -> str:
        while parent[block] != block:
            block = parent[block]
        return block

    users: defaultdict[str, list[str]] = defaultdict(list)
    for block, names in zip(blocks, matrices, strict=True):
        for name in names:
            users[name].append(block)
    for first, *others in users.values():
        for other in others:
            parent[root(other)] = root(first)
    return len({root(block) for block in blocks})


def check_silenced(adds: Iterable[ResidualAdd], expected: int) -> None:
    """Refuse a plan under which, with every ε = 0, something still reaches the stream.

    `adds` are the leaf adds of the rewritten, randomised twin with ε = 0, `expected` how many the plan knew.
    """
    adds = list(adds)
    leaking = sorted({add.source for add in adds if not (add.peak == 0 or math.isnan(add.peak))})
    if leaking or len(adds) != expected:
        what = ", ".join(leaking) or f"{len(adds)} residual adds where the plan knew {expected}"
        raise InputError(
            f"with every multiplier at 0 the stream still receives something at: {what}. The branch found is not what "
            "is added there, so no faithful rewrite is known. Compute the branch in an nn.Module whose output is added"
        )


def _label(branch: Branch) -> str:
    return branch.module if branch.output is None else f"{branch.module}[{branch.output}]"


def _short(source: str) -> str:
    path = os.path.relpath(source)
    return source if path.startswith("..") else path
