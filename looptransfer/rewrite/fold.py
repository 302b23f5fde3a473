"""A plan moved into the weights, and taken out of a model again."""

from collections import Counter

import torch
from torch import nn

from looptransfer.errors import InputError, explained_in
from looptransfer.rewrite.insert import check_clearable, clear_multipliers, has_multiplier
from looptransfer.rewrite.names import named_parameters, plain_names
from looptransfer.rewrite.plan import PLAN, ScalingPlan, planned
from looptransfer.rewrite.pretrained import drop
from looptransfer.rewrite.twin import check_ties
from looptransfer.text import few

MAKEUP = "_looptransfer_makeup"  # on a rewritten model: what ε acts through, as `makeup` has it


@explained_in("models.md#keep-it-load-it-export-it")
def fold(model: nn.Module) -> None:
    """Make a plain model of a rewritten one, in place, for export and serving; its function stays the same.

    The multipliers go into the weights of the branches' last maps, every module has its own class again, and the plan
    is forgotten. A checkpoint of it belongs into a plain model: in a rewritten one ε would count twice.

    Raises:
        InputError: not rewritten, a random loop count, a branch whose last map cannot take a factor, or one that was
            changed after the rewrite: replaced, tied to another weight, or given hooks.
    """
    inner, plan = planned(model)
    if plan.random_loops:
        raise InputError("the loop count is random, and weights cannot follow it; keep the multipliers")
    check_foldable(plan, "fold")
    check_clearable(inner)
    _last_maps(inner, plan)
    _check_writable(inner, plan)
    _check_read_outs(inner, plan)
    _check_unchanged(inner, plan)
    remove(model)
    scale_last_maps(inner, plan)
    with torch.no_grad():
        for name, factor in plan.read_outs.items():
            named_parameters(inner)[f"{name}.weight"].mul_(factor)


@explained_in("models.md#keep-it-load-it-export-it")
def remove(model: nn.Module) -> None:
    """Take the multipliers out again, in place: every branch is added with factor 1, every module has its own class.

    Weights are as they were trained. With `preserve=True` they keep the factor that made up for ε.

    Raises:
        InputError: the model was not rewritten, or its modules were compiled or wrapped since.
    """
    inner, _ = planned(model)
    clear_multipliers(inner)
    drop(inner)
    delattr(inner, PLAN)
    delattr(inner, MAKEUP)


def scale_last_maps(model: nn.Module, plan: ScalingPlan, inverse: bool = False) -> None:
    """Multiply the weights of every branch's last map by its ε, or divide them."""
    with torch.no_grad():
        for parameter, multiplier in _last_maps(model, plan):
            parameter.mul_(1 / multiplier if inverse else multiplier)


def _last_maps(model: nn.Module, plan: ScalingPlan) -> list[tuple[nn.Parameter, float]]:
    """The parameters that take ε, and the ε of each."""
    live = named_parameters(model)
    missing = [name for branch in plan.branches for name in branch.last_map if name not in live]
    if missing:
        raise InputError(
            f"the plan names {missing[0]}, which the model no longer has (was a layer replaced or wrapped, as LoRA "
            "does?), so ε cannot go into it; fold before that, or merge it first"
        )
    return [(live[name], branch.multiplier) for branch in plan.branches for name in branch.last_map]


# -- checks


def check_foldable(plan: ScalingPlan, option: str) -> None:
    """Refuse a plan with a branch whose last map cannot take ε; `option` is the user's word for what is to be done."""
    stuck = next((branch for branch in plan.branches if not branch.last_map), None)
    if stuck is not None:
        raise InputError(
            f"{option}: the branch {stuck.handle} cannot take ε into its weights: {stuck.unfoldable}. "
            "Keep the multipliers, which need no such weight"
        )


def _check_read_outs(model: nn.Module, plan: ScalingPlan) -> None:
    parameters = named_parameters(model)
    for name in plan.read_outs:
        if f"{name}.weight" not in parameters:
            raise InputError(f"fold: {name} shares its weight or holds several, which cannot take its factor alone")


def _check_writable(model: nn.Module, plan: ScalingPlan) -> None:
    live = named_parameters(model)
    for name in [name for branch in plan.branches for name in branch.last_map]:
        if live[name].is_meta or live[name].is_inference():
            kind = "on the meta device" if live[name].is_meta else "an inference tensor"
            raise InputError(
                f"fold: {name} takes ε and is {kind}, which cannot be written; load the weights into memory, outside "
                "torch.inference_mode and without offloading"
            )


def keep_makeup(model: nn.Module, plan: ScalingPlan) -> None:
    """Note what ε acts through, so that `fold` can tell whether that was changed since.

    What is noted already stays as it is noted, but for modules that a smaller loop count no longer has.
    """
    current, noted = makeup(model, plan), model.__dict__.get(MAKEUP, {})
    setattr(model, MAKEUP, {**current, **{name: description for name, description in noted.items() if name in current}})


def makeup(model: nn.Module, plan: ScalingPlan) -> dict[str, str]:
    """The makeup of the modules in the layers, and the number of places that hold each weight that takes ε, by name.

    While these stay, ε in the weights is ε on the branch.
    """
    inside = {branch.layer for branch in plan.branches}
    around = {name.rpartition(".")[0] for branch in plan.branches for name in branch.last_map}
    around |= {branch.module for branch in plan.branches}
    described = {
        name: _described(module)
        for name, module in plain_names(model).items()
        if any(_within(name, layer) and name != layer for layer in inside) or any(_within(name, m) for m in around)
    }
    held = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    live = named_parameters(model)
    return described | {n: f"held {held[id(live[n])]}×" for branch in plan.branches for n in branch.last_map}


def _within(name: str, module: str) -> bool:
    return not module or f"{name}.".startswith(f"{module}.")


def _described(module: nn.Module) -> str:
    """The class of a module, its own parameters, and what was put on the instance: functions and hooks."""
    cls = type(module)
    shapes = sorted(f"{name} {tuple(p.shape)}" for name, p in module._parameters.items() if p is not None)
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hung = [f"hook {_called(hook)}" for hook in hooks]
    hung += [
        f"{name} = {_called(value)}"
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, nn.Module) and not name.startswith("_")
    ]
    return ", ".join([f"{cls.__module__}.{cls.__qualname__}", *shapes, *hung])


def _called(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _check_unchanged(model: nn.Module, plan: ScalingPlan) -> None:
    lost = [str(b.handle) for b in plan.branches if not has_multiplier(model, b.handle, b.multiplier)]
    if lost:
        raise InputError(
            f"fold: the branch {few(lost)} no longer has its ε (was its module replaced?), so that its weights cannot "
            f"take it over; {ANEW}"
        )
    check_ties(model)
    noted, current = model.__dict__[MAKEUP], makeup(model, plan)
    changed = [
        f"{name} ({noted.get(name, 'absent')} then; {current.get(name, 'absent')} now)"
        for name in sorted(noted.keys() | current.keys())
        if noted.get(name) != current.get(name)
    ]
    if changed:
        raise InputError(
            f"fold: changed since the rewrite: {few(changed)}; take that back first (merge adapters, remove hooks), or "
            f"{ANEW}"
        )


ANEW = "parametrize a fresh model as it is now, load the weights into it, and fold that"
