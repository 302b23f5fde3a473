"""Ordinary parameter groups for an ordinary optimizer, scaled as the model's plan says."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from looptransfer.checks import is_number
from looptransfer.errors import InputError, explained_in
from looptransfer.rewrite.names import around, module_of, named_parameters, parameter_names, plain_names
from looptransfer.rewrite.plan import ROLES, SHOWN, Branch, Role, ScalingPlan, check_dimensions, planned
from looptransfer.rewrite.width import Growth, growth, width_divisor
from looptransfer.rules import DepthFactors, Family, depth_factors

# A class belongs to the first family that its name, or else the name of one of its bases, holds: a fused, 8-bit or
# paged AdamW is an AdamW, and NAdam, RAdam and Adamax take steps of Adam's size. SGD's are in proportion to the
# gradient, and those of SignSGD or NormalizedSGD are not: another word in the name is another kind. A new family has a
# name in `rules.Family`, factors in `rules.depth_factors` and `width.width_divisor`, a pattern here, words in
# `explanation`.
FAMILIES: dict[Family, str] = {
    "muon": "muon",
    "adamw": "adamw|adamatan2",
    "adam": "adam",
    "sgd": r"^(fused|foreach|paged|cpu|dp|distributed)*sgd(\d+bit)?$",
}
OnStream = Literal["scale", "leave"]
DecayPolicy = Literal["coefficient", "product"]
Group = dict[str, Any]
NONE = DepthFactors(1.0, 1.0, 1.0)
MAKE = "make the optimizer of looptransfer.param_groups(model, …)"


@dataclass(frozen=True)
class TensorFactors:
    """The factors that the plan puts on the optimizer's settings for one parameter."""

    name: str
    parameter: nn.Parameter
    role: Role
    in_branch: bool
    family: Family  # of the optimizer that takes it
    uses: float  # on the stream, a forward; 1 for all others, and where they are left
    depth: DepthFactors
    width: float  # divides the LR

    @property
    def lr(self) -> float:
        """The factor on the LR."""
        return self.depth.lr / (self.width * self.uses)

    def weight_decay(self, policy: DecayPolicy) -> float:
        """The factor on the weight decay."""
        return self.depth.weight_decay * self.width if policy == "coefficient" else 1 / self.lr


@explained_in("optimizers.md")
def param_groups(
    model: nn.Module,
    optimizer: str | type[torch.optim.Optimizer],
    *,
    lr: float,
    adamw_lr: float | None = None,
    weight_decay: float | Mapping[Role, float] = 0.0,
    eps: float = 1e-8,
    lr_ratio: Mapping[Role, float] | None = None,
    on_stream: OnStream = "scale",
    decay_policy: DecayPolicy = "coefficient",
) -> list[Group]:
    """Parameter groups of a rewritten model for `optimizer`, by the paper's table (arXiv 2606.18524, Table 1).

    Parameters of the residual branches, pre-norm gains included, get LR and Adam eps × m_L^(−1/2), or under "completep"
    LR × 1 and eps / m_L (arXiv 2505.01618, Table 1); embedding, final norm and head × 1. With μP
    (`parametrize(…, base=…)`, or `mup.set_base_shapes` was called on the model) LR and decay are also divided and
    multiplied by the width multiplier, as `mup.MuAdamW`, `mup.MuAdam` and `mup.MuSGD` have it.

    Muon takes the 2-D matrices of the branches, and AdamW all else: the groups tell by `group["family"]` which
    optimizer they are for, each with a base LR of its own. Muon's LR has no width factor: its step is right over
    widths with torch's `adjust_lr_fn="original"`.

    Each group has a `name` and remembers its factor as `lr_factor`, a key that no scheduler acts on. Schedulers that
    multiply the LRs they find (torch's LambdaLR, CosineAnnealingLR with eta_min=0, timm's with lr_min=0) keep the ratio
    of the groups; one that sets LRs (OneCycleLR, a floor, `group["lr"] = …`) needs a number per group, or `set_lr`.
    `verify(model, inputs, optimizer=…)` finds out. Frozen parameters are left out.

    Args:
        model: rewritten by `parametrize`; a wrapper such as DDP or a compiled model will do.
        optimizer: "adamw", "adam", "sgd" or "muon", or a class whose own name or base tells that: a subclass, torch's
            fused and bitsandbytes' 8-bit ones, NAdam, RAdam, Adamax, AdamATan2.
        lr: base LR, absolute; of Muon where that is the optimizer.
        adamw_lr: base LR of what Muon does not take, absolute.
        weight_decay: base weight decay, as that optimizer takes it. A number decays all but norm gains and biases (one
            dimension or none); a mapping from roles, such as {"branch matrix": 0.1}, decays those alone.
        eps: base Adam eps; SGD has none, and Muon keeps its own.
        lr_ratio: the user's own factors on the LR by role, such as {"embedding": 5.0}. Roles: see `plan.role`.
        on_stream: what to do with parameters that act on the stream n times a forward outside every branch (gains of
            post-norms, adapters at the loop's entry; see `plan.on_stream`) and that ε does not control: "scale" their
            LR to LR/n, or "leave" it (our extension; by `benchmarks/on_stream.py` the change that a step makes to the
            output then stays the same over N where gains are on the stream, and grows as N^0.6 to N^0.8 if left).
        decay_policy: what stays the same over sizes: the "coefficient" of decoupled decay (the paper), or its "product"
            with the LR, the share that each step takes off a weight (AdamW and Muon only).

    Raises:
        InputError: an unknown optimizer, role or word, numbers out of range, or a model that was not rewritten.
    """
    family = family_of(optimizer)
    ratios = dict(lr_ratio or {})
    _check_settings(family, lr, adamw_lr, eps, weight_decay, ratios, on_stream, decay_policy)
    by_dimensions = family == "muon" or (not isinstance(weight_decay, Mapping) and weight_decay > 0)
    check_dimensions(*planned(model), "param_groups", alone=by_dimensions)
    groups: dict[str, Group] = {}
    for tensor in tensors_of(model, family, on_stream):
        ratio = ratios.get(tensor.role, 1.0)
        decay = _base_decay(tensor, weight_decay)
        group: Group = {
            "family": tensor.family,
            "on_stream": on_stream,
            "decay_policy": decay_policy,
            "lr_ratio": ratio,
            "by_role": bool(ratios) or isinstance(weight_decay, Mapping),
            "base_weight_decay": decay,
        }
        if tensor.family in {"adamw", "adam"}:
            group["base_eps"] = eps
        group |= planned_settings(group, tensor)
        group["lr"] = (lr if tensor.family == family else float(adamw_lr or lr)) * group["lr_factor"]
        name = name_of(tensor, group)
        groups.setdefault(name, {"name": name, **group, "params": []})["params"].append(tensor.parameter)
    return list(groups.values())


@explained_in("optimizers.md#schedulers")
def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the base LR of an optimizer over `param_groups`, each group's in its own proportion.

    For schedules by hand, `lt.set_lr(optimizer, schedule(step))`.

    Args:
        optimizer: made of groups of `param_groups`.
        lr: the base LR, absolute.

    Raises:
        InputError: a group that `param_groups` did not make, or an LR that is not a finite number from 0 up.
    """
    if not is_number(lr) or lr < 0:
        raise InputError(f"lr is {lr!r}; it must be a finite number from 0 up")
    for problem in strange_groups(optimizer.param_groups):
        raise InputError(problem)
    for group in optimizer.param_groups:
        _put_lr(group, lr * group["lr_factor"])


def strange_groups(groups: Iterable[Mapping[str, Any]], owner: str = "the optimizer") -> list[str]:
    """A sentence on the groups of an optimizer that `param_groups` did not make; none where it made them all."""
    strange = [str(number) for number, group in enumerate(groups) if "lr_factor" not in group]
    if not strange:
        return []
    return [
        f"group {', '.join(strange[:SHOWN])} of {owner} holds no lr_factor: it was not made by "
        "looptransfer.param_groups, as where a trainer groups the parameters itself, or its state was loaded from such "
        f"an optimizer; {MAKE} and hand it to the trainer"
    ]


def follow_plan(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Give the groups of a live optimizer the factors that the model's plan has now; the base LR and its state stay.

    Parameters of one group that are to differ now are split: the new groups come last, and a scheduler that was made
    before them does not know them.

    Returns:
        What the LR of each group that it had was multiplied by.
    """
    before = [group["lr_factor"] for group in optimizer.param_groups]
    for group in list(optimizer.param_groups):
        by_id = {id(t.parameter): t for t in tensors_of(model, group["family"], group["on_stream"])}
        parts: dict[str, tuple[TensorFactors, list[nn.Parameter]]] = {}
        for parameter in group["params"]:
            tensor = by_id[id(parameter)]
            parts.setdefault(name_of(tensor, group), (tensor, []))[1].append(parameter)
        for number, (name, (tensor, parameters)) in enumerate(parts.items()):
            part = group if number == len(parts) - 1 else dict(group)
            if part is not group:
                part["lr"] = group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else group["lr"]
                optimizer.param_groups.append(part)
            part |= {"name": name, "params": parameters}
            _put_factors(part, tensor)
    return [group["lr_factor"] / factor for group, factor in zip(optimizer.param_groups, before, strict=False)]


def follow_groups(scheduler: Any, ratios: Sequence[float]) -> None:
    """Multiply the LRs that a scheduler keeps, a list with one for each group, as those of the groups were."""
    for inner in getattr(scheduler, "_schedulers", ()):  # of SequentialLR and ChainedScheduler
        follow_groups(inner, ratios)
    for name in {"base_lrs", "max_lrs", "min_lrs", "base_values"} & set(vars(scheduler)):  # torch's, the last is timm's
        kept = getattr(scheduler, name)
        setattr(scheduler, name, [lr * ratio for lr, ratio in zip(kept, ratios, strict=False)])


def tensors_of(model: nn.Module, family: Family, on_stream: OnStream) -> Iterator[TensorFactors]:
    """The factors on every parameter of a rewritten model that is trained."""
    inner, plan = planned(model)
    names, members = parameter_names(inner), _members(inner, plan)
    for outer_name, parameter in named_parameters(model).items():
        if not parameter.requires_grad:
            continue
        name, in_branch = names.get(id(parameter), outer_name), id(parameter) in members
        role = plan.role(name) if id(parameter) in names else "outside"
        if in_branch and name not in plan.roles:  # put there since, as LoRA does
            role = "branch matrix" if parameter.ndim == 2 else "branch vector"
        muons = family == "muon" and role == "branch matrix" and parameter.ndim == 2
        taker: Family = "adamw" if family == "muon" and not muons else family
        depth = depth_factors(plan.rule, taker, plan.layers, plan.base_layers) if in_branch else NONE
        uses = plan.on_stream.get(name, 1) if on_stream == "scale" and role == "on stream" else 1
        width = width_divisor(_growth(plan, name, parameter), taker)
        yield TensorFactors(name, parameter, role, in_branch, taker, uses, depth, width)


def tensors_in(model: nn.Module, groups: Iterable[Group]) -> Iterator[tuple[Group, TensorFactors]]:
    """The factors on every parameter of the groups, in their order; what is not trained in the model is left out."""
    by_kind: dict[tuple[str, str], dict[int, TensorFactors]] = {}
    for group in groups:
        family, on_stream = kind = (group["family"], group["on_stream"])
        if kind not in by_kind:
            by_kind[kind] = {id(tensor.parameter): tensor for tensor in tensors_of(model, family, on_stream)}
        for parameter in group["params"]:
            if id(parameter) in by_kind[kind]:
                yield group, by_kind[kind][id(parameter)]


def planned_settings(group: Group, tensor: TensorFactors) -> dict[str, float]:
    """The settings of a group by the plan, for a tensor of it: LR factor, weight decay, and eps where it has one."""
    settings = {
        "lr_factor": tensor.lr * group["lr_ratio"],
        "weight_decay": group["base_weight_decay"] * tensor.weight_decay(group["decay_policy"]),
    }
    return settings | ({"eps": group["base_eps"] * tensor.depth.eps} if "base_eps" in group else {})


def family_of(optimizer: object) -> Family:
    """The family of an optimizer's name, class or instance.

    Raises:
        InputError: none can be told; the message lists them.
    """
    families = get_args(Family)
    if isinstance(optimizer, str) and optimizer in families:
        return optimizer  # type: ignore[return-value]
    if isinstance(optimizer, type):
        for cls in optimizer.__mro__:
            plain = re.sub("[^a-z0-9]", "", cls.__name__.lower())
            family = next((family for family, pattern in FAMILIES.items() if re.search(pattern, plain)), None)
            if family is not None:
                return family
            if "sgd" in plain:  # of another kind, whatever it derives from
                break
    raise InputError(
        f"optimizer is {optimizer!r}; factors are known for the families {', '.join(families)}: give one of these "
        "names if its steps are of that kind, or a class whose name or base tells"
    )


def name_of(tensor: TensorFactors, group: Mapping[str, Any]) -> str:
    """The name of a group: all that sets it apart from the others."""
    label = ("branches" if tensor.in_branch else "outside") + (f", {tensor.role}" if group["by_role"] else "")
    label += ", Muon" if group["family"] == "muon" else ""
    decayed = group["base_weight_decay"] > 0 if group["by_role"] else tensor.parameter.ndim >= 2
    label += "" if decayed else ", no decay"
    label += "" if tensor.uses == 1 else f", on the stream {tensor.uses:g}×"
    return label + ("" if tensor.width == 1 else f", width × {tensor.width:g}")


def _base_decay(tensor: TensorFactors, weight_decay: float | Mapping[Role, float]) -> float:
    if isinstance(weight_decay, Mapping):
        return float(weight_decay.get(tensor.role, 0.0))
    return weight_decay if tensor.parameter.ndim >= 2 else 0.0


def _put_lr(group: Group, lr: float) -> None:
    if isinstance(group["lr"], torch.Tensor):  # capturable: a compiled step reads it
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _put_factors(group: Group, tensor: TensorFactors) -> None:
    before = group["lr_factor"]
    group |= planned_settings(group, tensor)
    _put_lr(group, float(group["lr"]) / before * group["lr_factor"])
    for name in {"initial_lr", "max_lr", "min_lr"} & set(group):  # of torch's schedulers
        group[name] = group[name] / before * group["lr_factor"]


def _members(inner: nn.Module, plan: ScalingPlan) -> set[int]:
    """The parameters of the branches, and new ones, as LoRA's, in a module that holds else those of one alone."""
    live, modules = named_parameters(inner), plain_names(inner)
    branches = [{id(parameter) for parameter in _of_branch(inner, live, branch)} for branch in plan.branches]
    members = set[int]().union(*branches)
    known = members | {id(live[name]) for name in plan.roles if name in live}
    for name, parameter in live.items():
        if id(parameter) not in known:
            beside = next(filter(None, ({id(p) for p in held} & known for held in around(modules, name))), {0})
            members |= {id(parameter)} if any(beside <= branch for branch in branches) else set()
    return members


def _of_branch(inner: nn.Module, live: dict[str, nn.Parameter], branch: Branch) -> Iterator[nn.Parameter]:
    """The parameters of a branch; where a layer was wrapped since, as LoRA does, all of those in its place."""
    for name in branch.parameters:
        if name in live:
            yield live[name]
        else:
            yield from module_of(inner, name.rpartition(".")[0]).parameters()


def _check_settings(
    family: Family,
    lr: float,
    adamw_lr: float | None,
    eps: float,
    weight_decay: float | Mapping[Role, float],
    ratios: Mapping[Role, float],
    on_stream: str,
    decay_policy: str,
) -> None:
    for name, word, words in (
        ("on_stream", on_stream, get_args(OnStream)),
        ("decay_policy", decay_policy, get_args(DecayPolicy)),
    ):
        if word not in words:
            raise InputError(f"{name} is {word!r}; choose {' or '.join(words)}")
    if decay_policy == "product" and family in {"adam", "sgd"}:
        raise InputError(f"decay_policy is 'product', and {family} adds its decay to the gradient; take adamw or muon")
    if (adamw_lr is None) == (family == "muon"):
        raise InputError(
            f"adamw_lr is {adamw_lr!r}; it is the base LR of what Muon does not take: give it with muon, and only there"
        )
    for name, role in [*(("weight_decay", r) for r in _roles(weight_decay)), *(("lr_ratio", r) for r in ratios)]:
        if role not in ROLES:
            raise InputError(f"{name} names the role {role!r}; the roles are {', '.join(ROLES)}")
    decays = weight_decay.values() if isinstance(weight_decay, Mapping) else [weight_decay]
    _check_numbers({"lr": [lr], "adamw_lr": [1.0 if adamw_lr is None else adamw_lr], "eps": [eps]}, positive=True)
    _check_numbers({"lr_ratio": ratios.values()}, positive=True)
    _check_numbers({"weight_decay": decays}, positive=False)


def _roles(weight_decay: float | Mapping[Role, float]) -> Iterable[str]:
    return weight_decay if isinstance(weight_decay, Mapping) else ()


def _check_numbers(settings: Mapping[str, Iterable[Any]], positive: bool) -> None:
    for name, values in settings.items():
        for value in values:
            if not is_number(value) or value < 0 or (positive and value == 0):
                least = "above 0" if positive else "from 0 up"
                raise InputError(f"{name} is {value!r}; it must be a finite number {least}")


def _growth(plan: ScalingPlan, name: str, parameter: nn.Parameter) -> Growth:
    """By how much each dimension grows over the base width: by the plan, or by mup's own marks."""
    if name in plan.base_shapes:
        return growth(plan.base_shapes[name], tuple(parameter.shape))
    return tuple(dim.width_mult() if dim.isinf() else None for dim in getattr(parameter, "infshape", ()))
