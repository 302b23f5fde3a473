"""A model and its live optimizer, checked together and changed together."""

import math
import operator
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from looptransfer.errors import InputError, ScalingWarning, VerificationError, explained_in
from looptransfer.optim import MAKE, Group, follow_groups, follow_plan, planned_settings, strange_groups, tensors_in
from looptransfer.rewrite.forward import ExampleInputs
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.parametrize import rescale_model
from looptransfer.rewrite.plan import SHOWN, ScalingPlan
from looptransfer.rewrite.verify import verify_model

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
TOLERANCE = 1e-6  # relative, of a setting


def verify(model: nn.Module, example_inputs: ExampleInputs, *, optimizer: Optimizers | None = None) -> ScalingPlan:
    """Measure on the live model what reaches the stream of each branch, and return the plan if it is what it says.

    One eager forward is traced, as the model stands: the constant factor between each branch's last learned map and its
    residual add, and how often it is added. Where `model` is compiled, the compiled callable is run too, on random
    weights that are taken out again, and must compute what the eager model does. An unproved plan is proved.

    More or fewer visits than planned are an error in train mode, a warning in eval mode (loops added at inference), and
    accepted where the plan was made for a random loop count.

    Args:
        model: rewritten by `parametrize`; compiled or wrapped in DDP, it is given as it is trained.
        example_inputs: as for `parametrize`.
        optimizer: made of `param_groups`; several where Muon and AdamW share the model. Every trained parameter must be
            in one group, with the factors of the plan, the LRs in the ratio of the factors, and state of its own shape.
            Call it after the first steps too: a scheduler shows what it does only then.

    Warns:
        ScalingWarning: the model is in eval mode and has more or fewer visits than planned.

    Raises:
        VerificationError: the branches, groups or parameters that disagree, each with what was planned and what is.
        InputError: the model was not rewritten, or rejects the inputs.
    """
    plan = verify_model(model, example_inputs)
    if optimizer is None:
        return plan
    optimizers = _listed(optimizer)
    problems = optimizer_problems(model, optimizers)
    if problems:
        raise VerificationError(
            "the optimizer does not do what the plan says:\n" + "\n".join(f"- {problem}" for problem in problems)
        )
    return plan


@explained_in("random-loops.md")
def rescale(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    loops: float | None = None,
    optimizer: Optimizers | None = None,
    scheduler: Any = None,
) -> ScalingPlan:
    """Recompute the multipliers in place for the loop count that `model` has now, and return the new plan.

    Needed where N changes in training. Set the loop count on the model first: its branches are traced and counted anew,
    so that a layer outside the loop, or one that is used twice a loop, gets what a fresh model would get; the way from
    and to one loop is open. Nothing is compiled anew for it. Without a call the multipliers stay as they were trained,
    which public evidence favours where loops are added only at inference.

    Args:
        model: rewritten by `parametrize`; it may be wrapped or compiled. Under DDP every rank must call, and all must
            come to the same plan.
        example_inputs: as for `parametrize`.
        loops: the new mean, where the loop count is drawn afresh in every forward.
        optimizer: made of `param_groups`, one or several: the LRs of what acts on the stream (`plan.on_stream`) follow;
            base LR and state stay. A group whose parameters are to differ now is split, so where the growth begins at
            one loop set LRs by `set_lr`; torch's schedulers do not know the new group.
        scheduler: torch's or timm's over the optimizer, one or several: the LRs that it keeps for each group follow.

    Raises:
        InputError: the model was not rewritten, no example inputs are given, it has other branches at this N, another
            rank has another plan, the optimizer was not made of `param_groups` or holds what was frozen since, or the
            scheduler is none of that optimizer. Then nothing was changed.

    Warns:
        ScalingWarning: LRs were changed that a scheduler had begun with, and it was not given.
    """
    optimizers = [] if optimizer is None else _listed(optimizer)
    schedulers = _of_optimizers(scheduler, optimizers)
    problems = [problem for live in optimizers for problem in _strange_groups(live)]
    problems += [*_membership_problems(model, optimizers), *_frozen_problems(model, optimizers)] if optimizers else []
    if problems:
        raise InputError(problems[0])
    plan = rescale_model(model, example_inputs, loops)
    for live in optimizers:
        ratios = follow_plan(model, live)
        over_it = [schedule for schedule in schedulers if schedule.optimizer is live]
        for schedule in over_it:
            follow_groups(schedule, ratios)
        changed = [
            group["name"] for group, ratio in zip(live.param_groups, ratios, strict=False) if not _near(ratio, 1)
        ]
        if changed and not over_it and any("initial_lr" in group for group in live.param_groups):
            warnings.warn(
                f"the LR of {', '.join(map(repr, changed[:SHOWN]))} follows the plan, and a scheduler that keeps the "
                "LR it began with (LambdaLR) puts it back at its next step; give it too: rescale(…, scheduler=…)",
                ScalingWarning,
                stacklevel=3,
            )
    return plan


def optimizer_problems(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """All that is wrong with live optimizers of a rewritten model, a sentence each."""
    strange = [problem for optimizer in optimizers for problem in _strange_groups(optimizer)]
    problems = [*strange, *_membership_problems(model, optimizers)]
    for optimizer in optimizers:
        problems += _state_problems(model, optimizer)
        groups = [group for group in optimizer.param_groups if group["params"]]
        if groups and not _strange_groups(optimizer):
            problems += _factor_problems(model, groups) + _lr_problems(model, groups) + _setting_problems(model, groups)
    return problems


def _listed(optimizer: Any) -> list[torch.optim.Optimizer]:
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers or not all(hasattr(live, "param_groups") and hasattr(live, "state") for live in optimizers):
        raise InputError(f"optimizer is {optimizer!r}; give an optimizer, or a list of them")
    return optimizers


def _of_optimizers(scheduler: Any, optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    schedulers = list(scheduler) if isinstance(scheduler, Sequence) else [] if scheduler is None else [scheduler]
    for schedule in schedulers:
        if not any(getattr(schedule, "optimizer", None) is live for live in optimizers):
            raise InputError(f"scheduler is {schedule!r}; give one that was made over the optimizer that is given")
    return schedulers


# -- membership


def _strange_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    return strange_groups(optimizer.param_groups, f"the {type(optimizer).__name__}")


def _membership_problems(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    times = Counter(map(id, held))
    foreign = sum(key not in names for key in times)
    return [
        *_about([names[key] for key in names if key in trained and key not in times], "in no group: never trained"),
        *_about([names[key] for key in names if times[key] > 1], "in two groups: stepped twice"),
        *([f"{foreign} parameters of the optimizer are not the model's; {MAKE}"] if foreign else []),
    ]


def _frozen_problems(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    frozen = [name for name, p in named_parameters(model).items() if id(p) in held and not p.requires_grad]
    return _about(frozen, f"frozen since the optimizer was made; unfreeze it for the call of rescale, or {MAKE} anew")


def _about(names: list[str], fault: str) -> list[str]:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{', '.join(names[:SHOWN])}{more}: {fault}"] if names else []


# -- factors


def _factor_problems(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    stale, other = list[str](), list[str]()
    for group, tensor in tensors_in(model, groups):
        expected = planned_settings(group, tensor)["lr_factor"]
        if not _near(group["lr_factor"], expected):
            without_uses = group["lr_factor"] / expected / tensor.uses
            on_stream = tensor.role == "on stream" or "on the stream" in group["name"]
            (stale if on_stream and without_uses <= 1 + TOLERANCE else other).append(
                f"{tensor.name} (factor {group['lr_factor']:.6g}, now {expected:.6g})"
            )
    stale_fault = (
        "stale N: the LR is by another number of uses a forward; "
        "rescale(model, example_inputs, optimizer=…) follows a loop count that changed"
    )
    other_fault = (
        f"LR factor of another size or role: was the state of another model loaded, or a factor edited? {MAKE}"
    )
    return [*_about(stale, stale_fault), *_about(other, other_fault)]


def _setting_problems(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    wrong: dict[str, None] = {}
    for group, tensor in tensors_in(model, groups):
        for setting, value in planned_settings(group, tensor).items():
            if setting != "lr_factor" and not _near(float(group[setting]), value):
                wrong[
                    f"group {group['name']!r}: {setting} is {float(group[setting]):.6g}, planned {value:.6g}; "
                    "it was edited by hand, or a factor was applied again (a mup optimizer on top)"
                ] = None
    return list(wrong)


# -- LRs


def _lr_problems(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """The LRs of an optimizer's groups are one base LR times the factor of each; told by what else they are."""
    lrs, factors = [float(group["lr"]) for group in groups], [float(group["lr_factor"]) for group in groups]
    bases = [lr / factor for lr, factor in zip(lrs, factors, strict=True)]
    if _agree(bases):
        return []
    by_group = {id(group): tensor.width for group, tensor in tensors_in(model, groups)}
    widths = [by_group.get(id(group), 1.0) for group in groups]
    told = " for ".join(
        f"{name} {', '.join(f'{value:.4g}' for value in values[:SHOWN])}"
        for name, values in (("LRs", lrs), ("factors", factors))
    )
    if _agree(lrs):
        fault = (
            f"one LR, {lrs[0]:.6g}, was set for all groups (OneCycleLR with one number, a floor that was reached, "
            "group['lr'] = …); give a number per group, or use looptransfer.set_lr"
        )
    elif set(widths) != {1.0} and _agree([base * width for base, width in zip(bases, widths, strict=True)]):
        fault = f"the width factors were applied twice, as by a mup optimizer on top of ours: {told}; take torch's"
    elif _agree([base / factor for base, factor in zip(bases, factors, strict=True)]):
        fault = f"the factors were applied twice, as by a scheduler that multiplies by a group's scale: {told}"
    elif _is_floored(lrs, factors):
        fault = (
            f"the LRs have a floor that is the same for all groups (as CosineAnnealingLR's eta_min), or were edited by "
            f"hand: {told}; schedule the base LR by looptransfer.set_lr"
        )
    else:
        usual = Counter(f"{base:.6g}" for base in bases).most_common(1)[0][0]
        edited = [group["name"] for group, base in zip(groups, bases, strict=True) if f"{base:.6g}" != usual]
        fault = f"groups edited by hand ({', '.join(map(repr, edited[:SHOWN]))}; base LR of the others {usual}): {told}"
    return [fault]


def _is_floored(lrs: Sequence[float], factors: Sequence[float]) -> bool:
    """lr = floor + rest × factor, with both above zero, for all groups."""
    low, high = factors.index(min(factors)), factors.index(max(factors))
    if _near(factors[low], factors[high]):
        return False
    rest = (lrs[high] - lrs[low]) / (factors[high] - factors[low])
    floor = lrs[low] - rest * factors[low]
    planned = [floor + rest * factor for factor in factors]
    return floor > 0 and rest > 0 and all(map(_near, lrs, planned))


def _agree(values: Sequence[float]) -> bool:
    return all(_near(value, values[0]) for value in values)


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=1e-30)


# -- state


def _state_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the tensors in a parameter's state one is of its size at least, or holds its rows, columns or a projection."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    wrong = []
    for parameter, state in optimizer.state.items():
        shapes = [value.shape for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
        if shapes and not any(_fits(shape, parameter.shape) for shape in shapes):
            wrong.append(
                f"{names.get(id(parameter), 'a parameter')} {tuple(parameter.shape)}, state {tuple(shapes[0])}"
            )
    return _about(wrong, "the optimizer's state is that of a model of another size; begin with fresh state")


def _fits(state: torch.Size, shape: torch.Size) -> bool:
    """State is of that shape, flat, factored (Adafactor, Shampoo), or projected along one dimension (GaLore)."""
    parts = set(state) <= {1, *shape}
    projected = len(state) == len(shape) > 1 and sum(map(operator.ne, state, shape)) == 1
    return state.numel() == shape.numel() or parts or projected
