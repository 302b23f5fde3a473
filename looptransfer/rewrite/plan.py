"""The ScalingPlan: which branch gets which multiplier, and why. Printable, and JSON with a schema version."""

import json
import math
import os
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from looptransfer.checks import is_count, is_number
from looptransfer.errors import InputError
from looptransfer.rewrite.graph import Handle
from looptransfer.rewrite.names import around, named_parameters, plain_names
from looptransfer.rules import (
    OVER_LAYERS,
    Rule,
    check_rule,
    depth_factors,
    depth_multiplier,
    drifts_over_layers,
    residual_multiplier,
)

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 2
Role = Literal["branch matrix", "branch vector", "per-visit part", "on stream", "embedding", "head", "outside"]
ROLES: tuple[Role, ...] = get_args(Role)
MATRICES: frozenset[Role] = frozenset({"branch matrix", "embedding", "head"})  # these have two dimensions or more
PLAN = "_looptransfer_plan"  # the attribute of a rewritten model
IN_CONFIG = "looptransfer_plan"  # the attribute of the config that `from_pretrained` read with the weights
SHOWN = 6  # names in a printed list; all of them are in the plan


@dataclass(frozen=True)
class Branch:
    """One residual branch: where its output is taken, where it is added, and the factor ε it gets."""

    layer: str  # the block that holds it
    module: str  # its output is the branch; names as in `model.named_modules()`
    output: int | str | None  # which part of that output, where it is a tuple or a mapping
    mark: str | None  # the name given to `residual`, where the module's forward marks the branch
    source: str  # file:line of the residual add
    visits: float  # residual adds per forward; a mean where the user gave one
    multiplier: float
    parameters: tuple[str, ...]  # those that act in the branch, pre-norm gains included
    last_map: tuple[str, ...] = ()  # those that ε can be folded into; empty: see `unfoldable`
    unfoldable: str = ""
    factors: tuple[float, ...] = (1.0,)  # constants that the model itself puts on the branch after its last map

    @property
    def handle(self) -> Handle:
        """The place where the branch can be taken hold of."""
        return Handle(self.module, self.output, self.mark)


@dataclass(frozen=True)
class LeftAlone:
    """A residual add that is not scaled, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class ScalingPlan:
    """The changes that `parametrize` makes to a model. `print(plan)` shows it as a table."""

    rule: Rule
    lam: float
    base_layers: int
    layers: int
    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    on_stream: dict[str, float] = field(
        default_factory=dict
    )  # parameters used again and again outside every branch: uses
    roles: dict[str, Role] = field(default_factory=dict)  # of every parameter; see `role`
    base_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of parameters that grow with the width
    read_outs: dict[str, float] = field(default_factory=dict)  # modules -> the factor on their input, by width
    caveats: tuple[str, ...] = ()
    declared: bool = False  # the user named the branches
    random_loops: bool = False  # the visits are a mean: the loop count is drawn afresh in every forward
    proved: bool = False  # the checks with ε = 0 have passed; they need weights

    @property
    def loops(self) -> float | frozenset[float]:
        """N, or the set of visit counts where branches differ (a prelude is visited once)."""
        visits = frozenset(branch.visits for branch in self.branches)
        return next(iter(visits)) if len(visits) == 1 else visits

    @property
    def declared_modules(self) -> list[str] | None:
        """The branches' modules where the user named them; None where the trace finds them."""
        return [branch.module for branch in self.branches] if self.declared else None

    @property
    def depth_multiplier(self) -> float:
        """m_L = L / L_ref."""
        return depth_multiplier(self.layers, self.base_layers)

    def role(self, name: str) -> Role:
        """The role of a parameter; "on stream" if it acts on the stream again and again, at this N."""
        return "on stream" if name in self.on_stream else self.roles.get(name, "outside")

    def with_counts(self, visits: Mapping[Handle, float], uses: Mapping[str, float]) -> "ScalingPlan":
        """The same branches visited so many times each, with the multipliers that belong to that.

        `uses`: how often each parameter acts on the stream.
        """

        def multiplier(n: float) -> float:
            return residual_multiplier(
                self.rule, visits=n, layers=self.layers, lam=self.lam, base_layers=self.base_layers
            )

        counts = [visits[branch.handle] for branch in self.branches]
        branches = tuple(
            replace(b, visits=n, multiplier=multiplier(n)) for b, n in zip(self.branches, counts, strict=True)
        )
        on_stream = {name: times for name, times in sorted(uses.items()) if times > 1}
        return replace(self, branches=branches, on_stream=on_stream)

    def under(self, rule: Rule) -> "ScalingPlan":
        """The same branches and visits with the multipliers of another rule."""
        visits = {branch.handle: branch.visits for branch in self.branches}
        return replace(self, rule=rule).with_counts(visits, self.on_stream)

    def part(self, prefix: str) -> "ScalingPlan":
        """The plan of one submodule, by the names that it gives its own."""
        begin = f"{prefix}." if prefix else ""

        def inside(name: str) -> bool:
            return name.startswith(begin)

        def own(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.removeprefix(begin) for name in names if inside(name))

        def named(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(begin): value for name, value in values.items() if inside(name)}

        branches = tuple(
            replace(
                b,
                layer=b.layer.removeprefix(begin),
                module=b.module.removeprefix(begin),
                parameters=own(b.parameters),
                last_map=own(b.last_map),
            )
            for b in self.branches
            if inside(b.module)
        )
        return replace(
            self,
            branches=branches,
            on_stream=named(self.on_stream),
            roles=named(self.roles),
            base_shapes=named(self.base_shapes),
            read_outs=named(self.read_outs),
        )

    def to_json(self) -> str:
        """The plan as text, to be kept beside a checkpoint; `from_json` reads it back and `apply_plan` uses it."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ScalingPlan":
        """Read what `to_json` wrote.

        Raises:
            InputError: no JSON, another schema version, or fields that are missing, unknown or out of range.
        """
        try:
            return _from_fields(cls, json.loads(text))
        except InputError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"this is no plan ({error}); give the text that plan.to_json() wrote") from error

    def __str__(self) -> str:
        rows = [("layer", "branch", "visits", "multiplier", "added at")]
        rows += [
            (b.layer, str(b.handle), f"{b.visits:g}", f"{b.multiplier:.6g}", _short(b.source)) for b in self.branches
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join([self._head(), *lines, *self._notes()])

    def _head(self) -> str:
        visits = self.loops if isinstance(self.loops, frozenset) else {self.loops}
        loops = ", ".join(f"{n:g}" for n in sorted(visits))
        loops = f"{{{loops}}}" if len(visits) > 1 else loops
        drawn = " (mean of a random count)" if self.random_loops else ""
        factors = depth_factors(self.rule, "adamw", self.layers, self.base_layers)
        settings = f"LR and eps of the branches' parameters × {factors.lr:.4g}"
        if factors.eps != factors.lr:
            settings = f"LR of the branches' parameters × {factors.lr:.4g}, their eps × {factors.eps:.4g}"
        on_stream = "those on the stream × 1/visits, " if self.on_stream else ""
        return (
            f"rule {self.rule}: N = {loops}{drawn}, L = {self.layers}, base layers {self.base_layers}, "
            f"λ = {self.lam:g}\n"
            f"AdamW: {settings}, {on_stream}everything else × 1"
        )

    def _notes(self) -> list[str]:
        notes = [f"left alone  {_short(left.source)}: {left.reason}" for left in self.left_alone]
        if self.on_stream:
            named = ", ".join(f"{name} ({times:g}×)" for name, times in list(self.on_stream.items())[:SHOWN])
            named += f" and {len(self.on_stream) - SHOWN} more" if len(self.on_stream) > SHOWN else ""
            notes.append(f"on stream   used again and again outside the branches, not controlled by ε: {named}")
        if self.base_shapes:
            factors = ", ".join(f"the input of {name} × {factor:.4g}" for name, factor in self.read_outs.items())
            notes.append(f"width       {len(self.base_shapes)} parameters grow{factors and '; '}{factors}")
        if drifts_over_layers(self.rule) and self.base_layers not in {1, self.layers}:
            notes.append(f"depth       a base LR of {self.base_layers} layers is taken to {self.layers}: {OVER_LAYERS}")
        if not self.proved:
            notes.append("unproved    made without weights; looptransfer.verify proves it once there are some")
        return [*notes, *(f"note        {caveat}" for caveat in self.caveats)]


def planned(model: "nn.Module") -> "tuple[nn.Module, ScalingPlan]":
    """The module that `parametrize` rewrote and its plan, also inside a wrapper such as DDP or a compiled model.

    Raises:
        InputError: the model was not rewritten, or its parts were.
    """
    parts = [module for module in model.modules() if PLAN in module.__dict__]
    if len(parts) > 1:
        raise InputError(
            f"{len(parts)} parts of the model were rewritten apart; call parametrize once on the whole model"
        )
    if parts:
        return parts[0], parts[0].__dict__[PLAN]
    if holds_saved_plan(model):
        raise InputError(
            "the model was not rewritten, and its config holds a plan: call looptransfer.apply_plan(model)"
        )
    raise InputError("the model was not rewritten; call looptransfer.parametrize(model, example_inputs) first")


def check_dimensions(model: "nn.Module", plan: ScalingPlan, call: str, alone: bool = True) -> None:
    """Refuse a model whose parameters lie flat, each alone or all of a module in one, as FSDP1 and DeepSpeed keep them.

    Args:
        model: the one that was rewritten.
        plan: of it.
        call: the call that is to be made before that.
        alone: a parameter that lies flat and has its name still is refused too.

    Raises:
        InputError: names a matrix of the plan that has one dimension, or in whose place there are but strange
            parameters of one.
    """
    live, modules = named_parameters(model), plain_names(model)
    known = {id(live[name]) for name in plan.roles if name in live}
    for name in [name for name, role in plan.roles.items() if role in MATRICES]:
        place = [live[name]] if name in live else next(filter(None, around(modules, name)), [])
        refused = alone if name in live else not any(id(parameter) in known for parameter in place)
        if refused and place and all(parameter.ndim < 2 for parameter in place):
            raise InputError(
                f"{name} is a matrix by the plan and lies flat here, as FSDP1 and DeepSpeed keep parameters; call "
                f"{call} before FSDP(model, use_orig_params=True), or shard the model by fully_shard"
            )


def holds_saved_plan(model: "nn.Module") -> bool:
    """A config in the model holds the plan that its weights were trained with, and nobody has applied it."""
    return any(hasattr(getattr(module, "config", None), IN_CONFIG) for module in model.modules())


def check_one_parameterization(plans: Mapping[int, ScalingPlan], parameters: Mapping[int, Container[str]]) -> None:
    """Refuse plans of one model at several N that are not one parameterization: its LRs would mean different things.

    They agree in L, in the branches but for those that belong to a visit, and in which of the parameters that both
    models have are in the branches; a branch is visited equally often at every N, in proportion to N, or some whole
    number of times more for each loop more.

    Args:
        plans: by N.
        parameters: by N, the names that the model has.

    Raises:
        InputError: they differ; the message says in what, and at which N.
    """
    (least, first), *others = sorted(plans.items())
    for n, plan in others:
        differences = [
            _difference("L", {first.layers}, {plan.layers}),
            _difference(
                "residual branches",
                _handles(first, plan, parameters[n]),
                _handles(plan, first, parameters[least]),
            ),
            _difference(
                "parameters in the branches",
                {name for name in _members(first) if name in parameters[n]},
                {name for name in _members(plan) if name in parameters[least]},
            ),
        ]
        difference = next(filter(None, differences), "")
        if difference:
            raise InputError(f"N = {least} and N = {n} are not one parameterization: {difference}. {ONE_MODEL}")
    _check_visits({n: {str(b.handle): b.visits for b in plan.branches} for n, plan in sorted(plans.items())})


ONE_MODEL = (
    "The proxy and the target must be one model that loops more or less often; build it so in make_model, or name what "
    "both have: branches=[…] for the branches, layers=… for L"
)


def _handles(plan: ScalingPlan, other: ScalingPlan, parameters: Container[str]) -> set[str]:
    """The branches that the model at another N, with those parameters, should have too.

    It need not have modules that belong to a visit, as an adapter does, where it adds a branch at the same line.
    """
    lines = {branch.source for branch in other.branches}

    def of_a_visit(branch: Branch) -> bool:
        own = [name for name in branch.parameters if name.startswith(f"{branch.module}.")]
        return branch.source in lines and bool(own) and not any(name in parameters for name in own)

    return {str(branch.handle) for branch in plan.branches if not of_a_visit(branch)}


def _members(plan: ScalingPlan) -> set[str]:
    return {name for branch in plan.branches for name in branch.parameters}


def _difference(name: str, first: set[Any], second: set[Any]) -> str:
    only = [", ".join(sorted(map(str, part))[:SHOWN]) or "nothing" for part in (first - second, second - first)]
    return f"{name} {only[0]} there, {only[1]} here" if first != second else ""


def _check_visits(visits: Mapping[int, Mapping[str, float]]) -> None:
    for n, of_branch in visits.items():
        if n > 1 and max(of_branch.values()) == 1:
            raise InputError(f"the model at N = {n} applies no layer more than once. {FOLLOW}")
    by_branch = {name: {n: of_branch[name] for n, of_branch in visits.items()} for name in visits[min(visits)]}
    for name, counts in by_branch.items():
        if not _follows(counts):
            seen = ", ".join(f"{count:g} at N = {n}" for n, count in counts.items())
            raise InputError(f"the branch {name} is visited {seen}, which does not follow N. {FOLLOW}")
    if len(visits) > 1 and all(len(set(counts.values())) == 1 for counts in by_branch.values()):
        raise InputError(
            f"the models at N = {min(visits)} and N = {max(visits)} loop equally often: no branch is visited more "
            f"often as N grows. {FOLLOW}"
        )


def _follows(counts: Mapping[int, float]) -> bool:
    """Visits by N are constant, in proportion to N, or grow by a whole number with every loop."""
    (least, fewest), *others = counts.items()
    slopes = [(count - fewest) / (n - least) for n, count in others]
    steady = all(math.isclose(slope, slopes[0], rel_tol=1e-9, abs_tol=1e-12) for slope in slopes)
    proportional = all(math.isclose(slope * least, fewest, rel_tol=1e-9) for slope in slopes)
    return steady and all(slope >= 0 for slope in slopes) and (proportional or all(s.is_integer() for s in slopes))


FOLLOW = "N is the loop count: make the model loop that often, by the argument of make_model"


def _from_fields(cls: type[ScalingPlan], data: dict[str, Any]) -> ScalingPlan:
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InputError(f"the plan has schema version {version!r}; this looptransfer reads {SCHEMA_VERSION}")
    data["branches"] = tuple(_strict(Branch, branch) for branch in data["branches"])
    data["left_alone"] = tuple(_strict(LeftAlone, left) for left in data["left_alone"])
    data["caveats"] = tuple(data["caveats"])
    data["on_stream"] = {str(name): _count(times) for name, times in data["on_stream"].items()}
    data["base_shapes"] = {str(name): _shape(shape) for name, shape in data["base_shapes"].items()}
    data["read_outs"] = {str(name): _factor(factor) for name, factor in data["read_outs"].items()}
    data["roles"] = {str(name): _role(role) for name, role in data["roles"].items()}
    plan: ScalingPlan = _strict(cls, data)
    check_rule(plan.rule)
    for branch in plan.branches:
        multiplier = residual_multiplier(
            plan.rule, visits=branch.visits, layers=plan.layers, lam=plan.lam, base_layers=plan.base_layers
        )
        if not is_number(branch.multiplier, 0) or not math.isclose(branch.multiplier, multiplier, rel_tol=1e-9):
            raise InputError(
                f"the multiplier of {branch.handle} is {branch.multiplier!r}, and its rule, {plan.rule}, gives "
                f"{multiplier:.6g}; give the text that plan.to_json() wrote"
            )
    return plan


def _count(value: Any) -> float:
    if not is_number(value) or value < 1:
        raise InputError(f"on_stream holds {value!r}; it must hold numbers from 1 up")
    count: float = value
    return count


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(is_count(size) for size in value):
        raise InputError(f"base_shapes holds {value!r}; it must hold lists of whole numbers from 1 up")
    return tuple(value)


def _factor(value: Any) -> float:
    if not is_number(value, 0):
        raise InputError(f"read_outs holds {value!r}; it must hold finite numbers above 0")
    return float(value)


def _role(value: Any) -> Role:
    if value not in ROLES:
        raise InputError(f"roles holds {value!r}; it must hold some of {', '.join(ROLES)}")
    role: Role = value
    return role


def _strict(cls: Any, data: dict[str, Any]) -> Any:
    names = {item.name for item in fields(cls)}
    if set(data) != names:
        wrong = sorted(set(data) ^ names)
        raise InputError(f"this is no plan: fields {', '.join(wrong)} of {cls.__name__} are missing or unknown")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def _short(source: str) -> str:
    path = os.path.relpath(source)
    return source if path.startswith("..") else path
