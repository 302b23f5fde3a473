"""A plan put into a model, changed, moved into the weights, and taken out again."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError, ScalingWarning
from looptransfer.rewrite.analysis import Analysis, analyse
from looptransfer.rewrite.caveats import renewed
from looptransfer.rewrite.insert import OUTPUTS, clear_multipliers, set_multiplier
from looptransfer.rewrite.names import compiled_modules, named_parameters, plain_names
from looptransfer.rewrite.plan import Branch, Realisation, ScalingPlan
from looptransfer.rewrite.planner import counts, make_plan
from looptransfer.rewrite.proof import SEED, prove
from looptransfer.rewrite.record import ExampleInputs
from looptransfer.rewrite.twin import check_ties, twin_of
from looptransfer.rules import Rule, check_rule, depth_multiplier, residual_multiplier

PLAN = "_looptransfer_plan"  # on the model
DRAWS = 7  # further forwards where random numbers steer the model


def parametrize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    rule: Rule = "factored",
    lam: float = 1.0,
    base_layers: int = 1,
    *,
    realisation: Realisation = "multiplier",
    branches: Sequence[str] | None = None,
    layers: int | None = None,
    loops: float | None = None,
    preserve: bool = False,
) -> ScalingPlan:
    """Rewrite `model` in place so that every residual branch is multiplied as `rule` says, and return the plan.

    The branches are found by tracing one forward of a copy on `example_inputs`: N and L are counted, not asked for. The
    plan is proved on a copy with random weights (see `rewrite.proof`); a model on the meta device gets an unproved one.
    A model with N = 1 is legitimate: it is the natural proxy. `state_dict` keys stay as they are; deepcopy, pickle and
    `torch.compile` keep the multipliers. Compile after rewriting.

    Args:
        model: any module with residual branches; it is not run and its random state, buffers and gradients stay.
        example_inputs: what its forward takes: a tensor, a tuple of positional or a dict of keyword arguments.
        rule: "factored" λ/(N√(L/L_ref)), "sqrt" λ/√(N·L/L_ref) or "unscaled" 1 (arXiv 2606.18524, Table 1).
        lam: λ.
        base_layers: L_ref; 1 writes the rule absolutely.
        realisation: "multiplier" multiplies the branch on its way to the stream; "folded" puts ε into the weights of
            the branch's last map, for the same function and, with `param_groups`, the same training.
        branches: names or globs of the modules whose outputs are the branches, where the trace cannot tell.
        layers: L, where the blocks are not what should be counted.
        loops: the mean loop count, where it is drawn afresh in every forward: one trace cannot know it.
        preserve: divide the last map of every branch by its ε, so that the function of trained weights stays.

    Raises:
        InputError: not a module, compiled or rewritten already, inputs the model rejects, numbers out of range, or a
            residual add that cannot be scaled faithfully; the message names its line and what settles it.

    Warns:
        ScalingWarning: the model does something that the rule was not derived for; each is in `plan.caveats`.
    """
    _check_model(model)
    _check_settings(rule, lam, base_layers, realisation, branches, layers)
    meta = any(parameter.is_meta for parameter in model.parameters())
    _check_weights(meta, realisation, loops, preserve)
    declared = None if branches is None else list(branches)
    plan = make_plan(
        model,
        _draws(model, example_inputs, declared, meta),
        {"rule": rule, "lam": lam, "base_layers": base_layers, "proved": not meta},
        declared=declared is not None,
        layers=layers,
        loops=loops,
        preserve=preserve,
    )
    if preserve or realisation == "folded":
        _check_foldable(plan, "preserve=True" if preserve else "realisation='folded'")
    for caveat in plan.caveats:
        warnings.warn(caveat, ScalingWarning, stacklevel=2)
    if preserve:
        _scale_last_maps(model, plan, inverse=True)
    _attach(model, plan)
    return fold(model) if realisation == "folded" else plan


def _draws(model: nn.Module, example_inputs: ExampleInputs, declared: list[str] | None, meta: bool) -> list[Analysis]:
    """Forwards of a copy with random weights, which is put to the proof.

    Drawn again where random numbers steer the model, and first as the model stands where its weights do.
    """
    check_ties(model)
    twin = twin_of(model, randomised=True)
    analysis = analyse(twin_of(twin), example_inputs, declared, seed=SEED, copy_of=model)
    draws = [analyse(twin_of(twin), example_inputs, declared, seed=seed) for seed in _seeds(analysis)]
    if analysis.trace.graph.weights_steer:
        draws.insert(0, analyse(twin_of(model), example_inputs, declared))
    if not meta and analysis.groups:
        hidden = prove(twin, example_inputs, analysis)
        for draw in [*draws, analysis]:
            draw.hide(model, hidden)
    return [*draws, analysis]


def _seeds(analysis: Analysis) -> range:
    """Of further forwards, where random numbers steer the model."""
    return range(DRAWS if analysis.trace.graph.chance_steers else 0)


def apply_plan(model: nn.Module, plan: ScalingPlan) -> None:
    """Put a plan into a fresh model in place: the one it was made for, built again. Nothing is traced.

    A folded plan multiplies the weights of `model` by their ε; load a folded checkpoint after it.

    Raises:
        InputError: the model is compiled or rewritten already, or has no module or parameter of a name in the plan.
    """
    _check_model(model)
    modules, parameters = plain_names(model), named_parameters(model)
    for branch in plan.branches:
        missing = [name for name in branch.parameters if name not in parameters]
        missing += [branch.module] if branch.module not in modules else []
        if missing:
            raise InputError(f"the plan names {missing[0]}, which this {type(model).__name__} does not have")
    _attach(model, replace(plan, realisation="multiplier"))
    if plan.realisation == "folded":
        fold(model)


def rescale(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, loops: float | None = None
) -> ScalingPlan:
    """Recompute the multipliers in place for the loop count that `model` has now, and return the new plan.

    Needed where N changes in training. Set the loop count on the model first: its branches are traced and counted anew,
    so that a layer outside the loop, or one that is used twice a loop, gets what a fresh model would get; the way from
    and to one loop is open. What acts on the stream is counted too (`plan.on_stream`); make the groups anew, or set the
    LRs. Without a call the multipliers stay as they were trained, which public evidence favours where loops are added
    only at inference.

    Args:
        model: rewritten by `parametrize`; it may be wrapped or compiled.
        example_inputs: as for `parametrize`.
        loops: the new mean, where the loop count is drawn afresh in every forward.

    Raises:
        InputError: the model was not rewritten, its multipliers are folded, no example inputs are given, or at its
            loop count it has other branches.
    """
    inner, plan = planned(model)
    if plan.realisation == "folded":
        raise InputError(
            "the multipliers are folded into the weights; call unfold(model), rescale it and fold it again"
        )
    if example_inputs is None or isinstance(example_inputs, (int, float)):
        raise InputError(
            "a loop count alone does not tell how often each branch is visited; set it on the model and give example "
            "inputs: rescale(model, example_inputs)"
        )
    declared = plan.declared_modules
    draws = [analyse(inner, example_inputs, declared)]
    draws += [analyse(inner, example_inputs, declared, seed=seed) for seed in _seeds(draws[0])]
    mean = loops if loops is not None or not plan.random_loops else max(branch.visits for branch in plan.branches)
    visits, uses = counts(draws, mean, plan.declared)
    known, live = {branch.handle for branch in plan.branches}, {handle for draw in draws for handle in draw.visits}
    if known != live:
        raise InputError(
            "at its loop count the model has other branches than before "
            f"({', '.join(sorted(map(str, known ^ live))[:4])}); parametrize a fresh model at that count"
        )
    inside = {name for branch in plan.branches for name in branch.parameters}
    new = plan.with_counts(visits, {name: times for name, times in uses.items() if name not in inside})
    new = replace(new, caveats=renewed(plan.caveats, new.branches))
    _insert(inner, new)
    return _note(inner, new)


def fold(model: nn.Module) -> ScalingPlan:
    """Move the multipliers into the weights of the branches' last maps, in place; the function stays the same.

    For serving and export, and for training with SGD, Adam and AdamW: make the optimizer afterwards, with
    `param_groups`, since the groups of those weights change. Clipping by the global norm is not the same then.

    Raises:
        InputError: not rewritten, folded already, a random loop count, or a branch whose last map cannot take a factor.
    """
    inner, plan = planned(model)
    if plan.realisation == "folded":
        raise InputError(
            "the multipliers are folded already; a second ε would multiply the first. unfold(model) undoes it"
        )
    if plan.random_loops:
        raise InputError("the loop count is random, and weights cannot follow it; keep the multipliers")
    _check_foldable(plan, "fold")
    _last_maps(inner, plan)
    clear_multipliers(inner)
    _scale_last_maps(inner, plan)
    return _note(inner, replace(plan, realisation="folded"))


def unfold(model: nn.Module) -> ScalingPlan:
    """Undo `fold` in place: weights without ε, branches multiplied on their way to the stream.

    Raises:
        InputError: the model was not rewritten, or is not folded.
    """
    inner, plan = planned(model)
    if plan.realisation != "folded":
        raise InputError("the multipliers are not folded into the weights; fold(model) does that")
    _scale_last_maps(inner, plan, inverse=True)
    plan = replace(plan, realisation="multiplier")
    _insert(inner, plan)
    return _note(inner, plan)


def remove(model: nn.Module) -> None:
    """Take the multipliers out again, in place: every branch is added with factor 1, every module has its own class.

    Weights are as they were trained; of a folded model they are unfolded. With `preserve=True` the weights keep the
    factor that made up for ε.

    Raises:
        InputError: the model was not rewritten.
    """
    inner, plan = planned(model)
    if plan.realisation == "folded":
        _scale_last_maps(inner, plan, inverse=True)
    clear_multipliers(inner)
    delattr(inner, PLAN)
    _forget_state_dict_hooks(inner)


def planned(model: nn.Module) -> tuple[nn.Module, ScalingPlan]:
    """The module that `parametrize` rewrote and its plan, also inside a wrapper such as DDP or a compiled model.

    Raises:
        InputError: the model was not rewritten, or its parts were.
    """
    found = [module for module in model.modules() if PLAN in module.__dict__]
    if len(found) > 1:
        raise InputError(
            f"{len(found)} parts of the model were rewritten apart; call parametrize once on the whole model"
        )
    if found:
        return found[0], found[0].__dict__[PLAN]
    raise InputError("the model was not rewritten; call looptransfer.parametrize(model, example_inputs) first")


# -- checks


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    for name in compiled_modules(model):
        where = f"its module {name}" if name else "the model"
        raise InputError(f"{where} is compiled already; call parametrize first and torch.compile after")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{name or 'the model'} is a TorchScript module; rewrite the model before it is scripted")
    if any(PLAN in module.__dict__ or OUTPUTS in module.__dict__ for module in model.modules()):
        raise InputError(
            "the model is rewritten already, and a second ε would multiply the first; build a fresh model, or call "
            "looptransfer.remove(model) first"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{name} is uninitialised (a lazy module); run the model once before parametrize")


def _check_settings(
    rule: Rule, lam: float, base_layers: int, realisation: str, branches: Any, layers: int | None
) -> None:
    check_rule(rule)
    residual_multiplier(rule, visits=1, layers=1, lam=lam, base_layers=base_layers)  # bad numbers before a slow trace
    if layers is not None:
        depth_multiplier(layers, base_layers)
    if realisation not in {"multiplier", "folded"}:
        raise InputError(f"realisation is {realisation!r}; choose multiplier or folded")
    named = isinstance(branches, Sequence) and not isinstance(branches, str)
    if branches is not None and not (named and branches and all(isinstance(name, str) for name in branches)):
        raise InputError(f"branches is {branches!r}; give a list of module names or globs, such as ['layers.*.mlp']")


def _check_weights(meta: bool, realisation: str, loops: float | None, preserve: bool) -> None:
    """Refuse what would have to change weights that are not there, or that cannot follow."""
    if realisation == "folded" and loops is not None:
        raise InputError("realisation='folded' with loops: weights cannot follow a random loop count; use 'multiplier'")
    if meta and (preserve or realisation == "folded"):
        raise InputError(
            "weights on the meta device can take no factor; give the model its weights first, then "
            f"{'preserve=True' if preserve else 'fold it'}"
        )


def _check_foldable(plan: ScalingPlan, what: str) -> None:
    stuck = next((branch for branch in plan.branches if not branch.last_map), None)
    if stuck is not None:
        raise InputError(
            f"{what}: the branch {stuck.handle} cannot take ε into its weights: {stuck.unfoldable}. "
            "Keep realisation='multiplier', which needs no such weight"
        )


# -- putting it in


def _attach(model: nn.Module, plan: ScalingPlan) -> None:
    _insert(model, plan)
    _note(model, plan)
    model._register_state_dict_hook(_stamp)
    model.register_load_state_dict_pre_hook(_check_stamp)


def _note(model: nn.Module, plan: ScalingPlan) -> ScalingPlan:
    setattr(model, PLAN, plan)
    return plan


def _insert(model: nn.Module, plan: ScalingPlan) -> None:
    for branch in plan.branches:
        set_multiplier(model, branch.handle, branch.multiplier)


def _scale_last_maps(model: nn.Module, plan: ScalingPlan, inverse: bool = False) -> None:
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


# -- checkpoints: the keys stay a plain model's, so the realisation is noted in the metadata beside them

STAMP = "looptransfer"


def _stamp(model: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]) -> None:
    plan = model.__dict__.get(PLAN)
    if plan is not None:
        local_metadata[STAMP] = _stamp_of(plan)


def _stamp_of(plan: ScalingPlan) -> list[Any]:
    def sizes(branch: Branch) -> float:
        return float(f"{branch.multiplier:.12g}")

    return [plan.realisation, [sizes(branch) for branch in plan.branches] if plan.realisation == "folded" else []]


def _check_stamp(
    model: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    plan = model.__dict__.get(PLAN)
    if plan is None:
        return
    ours, theirs = _stamp_of(plan), local_metadata.get(STAMP)
    if theirs == ours or (theirs is None and plan.realisation == "multiplier"):
        return
    if theirs is None and not local_metadata:
        warnings.warn(
            "this checkpoint does not tell whether ε is folded into its weights, and the model expects folded ones; if "
            "it holds plain weights, call unfold(model), load it, and fold(model)",
            ScalingWarning,
            stacklevel=2,
        )
        return
    if plan.realisation == "multiplier":
        raise InputError(
            "this checkpoint has ε folded into its weights, and the model multiplies its branches too: ε would count "
            "twice. Call fold(model), load it, and unfold(model)"
        )
    raise InputError(
        "the model expects weights with its own ε folded into them, and this checkpoint holds "
        f"{'plain weights' if theirs is None or theirs[0] == 'multiplier' else 'weights with other multipliers'}. "
        "Call unfold(model), load weights without ε, and fold(model)"
    )


def _forget_state_dict_hooks(model: nn.Module) -> None:
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in {_stamp, _check_stamp}:
                del hooks[key]
