"""A plan put into a model, and changed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from looptransfer.errors import InputError, ScalingWarning, explained_in
from looptransfer.rewrite.analysis import Analysis, analyse, fullest
from looptransfer.rewrite.caveats import VARIES, other_in_training, renewed
from looptransfer.rewrite.fold import check_foldable, keep_makeup, scale_last_maps
from looptransfer.rewrite.forward import ExampleInputs
from looptransfer.rewrite.graph import Handle
from looptransfer.rewrite.insert import OUTPUTS, set_input_multiplier, set_multiplier
from looptransfer.rewrite.names import compiled_modules, named_parameters, plain_names, sharded_modules
from looptransfer.rewrite.plan import PLAN, ScalingPlan, check_dimensions, holds_saved_plan, planned
from looptransfer.rewrite.planner import counts, make_plan
from looptransfer.rewrite.pretrained import carry, forget_saved_plan, saved_plan
from looptransfer.rewrite.proof import SEED, prove
from looptransfer.rewrite.record import record
from looptransfer.rewrite.roles import roles_of
from looptransfer.rewrite.sites import OperationCounter, ending, run_counted
from looptransfer.rewrite.twin import check_ties, twin_of
from looptransfer.rewrite.width import base_shapes, check_attention, read_outs, rescale_weights
from looptransfer.rules import Rule, check_rule, depth_multiplier, residual_multiplier
from looptransfer.text import few

DRAWS = 7  # further forwards where random numbers steer the model
FOLLOWING = 4  # forwards of one copy, to see whether they are alike


@explained_in("models.md#what-is-refused-and-what-settles-it")
def parametrize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    rule: Rule = "factored",
    lam: float = 1.0,
    base_layers: int = 1,
    *,
    branches: Sequence[str] | None = None,
    layers: int | None = None,
    loops: float | None = None,
    base: nn.Module | Callable[[], nn.Module] | None = None,
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
        rule: "factored" λ/(N√(L/L_ref)), "sqrt" λ/√(N·L/L_ref) or "unscaled" 1 (arXiv 2606.18524, Table 1), or
            "completep" λ/(N·L/L_ref), CompleteP's rule for L (arXiv 2505.01618) beside the paper's for N: the one to
            take where an LR is to serve other L as well (our extension; reports/transfer/).
        lam: λ.
        base_layers: L_ref; 1 writes the rule absolutely.
        branches: names or globs of the modules whose outputs are the branches, where the trace cannot tell.
        layers: L, where the blocks are not what should be counted.
        loops: the mean loop count, where it is drawn afresh in every forward: one trace cannot know it.
        base: for μP over widths (arXiv 2203.03466): the model at the width where the base LR was tuned, or what makes
            it; heads of the same size, the same layers. What differs between the two is width. The weights of `model`
            get the scale at the start that μP gives them, so call it on fresh ones; the input of the head gets base
            width / width; `param_groups` divides LRs. A user of `mup.set_base_shapes` leaves it out.
        preserve: divide the last map of every branch by its ε, so that the function of trained weights stays.

    Raises:
        InputError: not a module, compiled or rewritten already, inputs the model rejects, numbers out of range, or a
            residual add that cannot be scaled faithfully; the message names its line and what settles it.

    Warns:
        ScalingWarning: the model does something that the rule was not derived for; each is in `plan.caveats`.
    """
    _check_model(model)
    _check_settings(rule, lam, base_layers, branches, layers)
    meta = any(parameter.is_meta for parameter in model.parameters())
    _check_weights(model, meta, preserve)
    declared = None if branches is None else list(branches)
    small = None if base is None else _base_of(model, base, meta, preserve)
    draws = _draws(model, example_inputs, declared, meta)
    plan = make_plan(
        model,
        draws,
        {"rule": rule, "lam": lam, "base_layers": base_layers, "proved": not meta},
        declared=declared is not None,
        layers=layers,
        loops=loops,
        preserve=preserve,
    )
    if preserve:
        check_foldable(plan, "preserve=True")
    plan = _in_training(model, example_inputs, declared, plan)
    if small is not None:
        plan = _with_widths(model, small, example_inputs, fullest(draws), plan)
    for caveat in plan.caveats:
        warnings.warn(caveat, ScalingWarning, stacklevel=3)
    if preserve:
        scale_last_maps(model, plan, inverse=True)
    if small is not None:
        rescale_weights(model, small, plan.base_shapes)
    _attach(model, plan)
    return plan


def _base_of(model: nn.Module, base: nn.Module | Callable[[], nn.Module], meta: bool, preserve: bool) -> nn.Module:
    """The base model, where widths can be taken from it."""
    small = base if isinstance(base, nn.Module) else base() if callable(base) else None
    if not isinstance(small, nn.Module):
        raise InputError(f"base is {base!r}; give the model at its base width, or a function that makes it")
    if meta or any(parameter.is_meta for parameter in small.parameters()):
        raise InputError("with base=… weights get their scale, and on the meta device there are none; make them first")
    if preserve:
        raise InputError("preserve=True keeps trained weights, and base=… gives fresh ones their scale; choose one")
    if any(hasattr(parameter, "infshape") for parameter in model.parameters()):
        raise InputError("mup.set_base_shapes was called on the model, which tells its widths; leave base out")
    return small


def _with_widths(
    model: nn.Module, small: nn.Module, example_inputs: ExampleInputs, analysis: Analysis, plan: ScalingPlan
) -> ScalingPlan:
    grown = base_shapes(model, small)
    try:
        graph = record(twin_of(small), example_inputs)
    except InputError as error:
        raise InputError(f"base: {error}") from error
    check_attention(graph, analysis.trace.graph)
    return replace(plan, base_shapes=grown, read_outs=read_outs(model, analysis, grown))


def _draws(model: nn.Module, example_inputs: ExampleInputs, declared: list[str] | None, meta: bool) -> list[Analysis]:
    """Forwards of a copy with random weights, which is put to the proof.

    Drawn again where random numbers steer the model, first as the model stands where its weights do, and further on
    where forwards that follow each other are not alike.
    """
    check_ties(model)
    plain = [run_counted(live, example_inputs, SEED) for live in _states(model)]
    with ending(plain[0].operations if plain[0] else None):
        twin = twin_of(model, randomised=True)
        analysis = analyse(twin_of(twin), example_inputs, declared, seed=SEED, copy_of=model)
        draws = [analyse(twin_of(twin), example_inputs, declared, seed=seed) for seed in _seeds(analysis)]
        if analysis.trace.graph.weights_steer:
            draws.insert(0, analyse(twin_of(model), example_inputs, declared))
        later = _later(twin, example_inputs, declared, plain)
        draws += later if any(draw.visits != analysis.visits for draw in later) else []
        if not meta and analysis.groups:
            hidden = prove(twin, example_inputs, analysis)
            for draw in [*draws, analysis]:
                draw.hide(model, hidden)
    return [*draws, analysis]


def _states(model: nn.Module) -> Iterator[nn.Module]:
    """One copy, again and again: run each time, it comes with the generators and counters of the next forward."""
    live = twin_of(model)
    for _ in range(FOLLOWING):
        yield live


def _later(
    twin: nn.Module, example_inputs: ExampleInputs, declared: list[str] | None, plain: Sequence[OperationCounter | None]
) -> list[Analysis]:
    """The forwards that ran another number of additions than the first one; those that fail are left out."""
    totals = [counter.additions if counter else None for counter in plain]
    draws = []
    for live, total in zip(_states(twin) if len(set(totals)) > 1 else (), totals, strict=False):
        if total not in {totals[0], None}:
            with suppress(InputError):
                draws.append(analyse(twin_of(live), example_inputs, declared, seed=SEED))
        run_counted(live, example_inputs, SEED)
    return draws


def _in_training(
    model: nn.Module, example_inputs: ExampleInputs, declared: list[str] | None, plan: ScalingPlan
) -> ScalingPlan:
    """The plan, with a caveat where it was made in eval mode and training mode visits the branches otherwise."""
    if model.training or plan.random_loops or VARIES in plan.caveats:
        return plan
    evaluated, trained = (run_counted(twin, example_inputs, SEED) for twin in (twin_of(model), twin_of(model).train()))
    if not evaluated or not trained or evaluated.additions == trained.additions:
        return plan
    with suppress(InputError), ending(trained.operations):
        visits = analyse(twin_of(model, randomised=True).train(), example_inputs, declared, seed=SEED).visits
        # a branch that is not visited at all is a layer that was dropped
        trained_visits = [(branch, visits.get(branch.handle, branch.visits)) for branch in plan.branches]
        other = [f"{branch.handle} {n:g}, not {branch.visits:g}" for branch, n in trained_visits if n != branch.visits]
        if other:
            return replace(plan, caveats=(*plan.caveats, other_in_training(other)))
    return plan


def _seeds(analysis: Analysis) -> range:
    """Of further forwards, where random numbers steer the model."""
    return range(DRAWS if analysis.trace.graph.chance_steers else 0)


@explained_in("models.md#keep-it-load-it-export-it")
def apply_plan(model: nn.Module, plan: ScalingPlan | None = None) -> ScalingPlan:
    """Put a plan into a fresh model in place: the one it was made for, built again. Nothing is traced.

    Weights stay as they are: load a checkpoint's, or call `parametrize` where they are to start by width.

    Args:
        model: built again, or read by Hugging Face's `from_pretrained`.
        plan: None takes the one that `save_pretrained` wrote into the config.

    Returns:
        The plan.

    Raises:
        InputError: the model is compiled or rewritten already, or has no module or parameter of a name in the plan; no
            plan is given and the config holds none.
    """
    _check_model(model)
    plan = saved_plan(model) if plan is None else plan
    held = {*plain_names(model), *named_parameters(model)}
    named = [name for branch in plan.branches for name in (*branch.parameters, branch.module)]
    missing = next((name for name in (*named, *plan.read_outs) if name not in held), None)
    if missing is not None:
        raise InputError(f"the plan names {missing}, which this {type(model).__name__} does not have")
    _attach(model, plan)
    forget_saved_plan(model)
    return plan


def rescale_model(model: nn.Module, example_inputs: ExampleInputs | None, loops: float | None) -> ScalingPlan:
    """Recompute the multipliers for the loop count that a model has now; see `audit.rescale`."""
    inner, plan = planned(model)
    if example_inputs is None or isinstance(example_inputs, (int, float)):
        raise InputError(
            "a loop count alone does not tell how often each branch is visited; set it on the model and give example "
            "inputs: rescale(model, example_inputs)"
        )
    check_dimensions(inner, plan, "rescale")
    declared = plan.declared_modules
    draws = [analyse(inner, example_inputs, declared)]
    draws += [analyse(inner, example_inputs, declared, seed=seed) for seed in _seeds(draws[0])]
    mean = loops if loops is not None or not plan.random_loops else max(branch.visits for branch in plan.branches)
    visits, uses = counts(draws, mean, plan.declared)
    handles, live = {branch.handle for branch in plan.branches}, {handle for draw in draws for handle in draw.visits}
    if handles != live:
        raise InputError(
            "at its loop count the model has other branches than before "
            f"({few(sorted(map(str, handles ^ live)))}); parametrize a fresh model at that count"
        )
    analysis = fullest(draws)
    members = _members(plan, analysis)
    inside = frozenset[str]().union(*members.values())
    new = plan.with_counts(visits, {name: times for name, times in uses.items() if name not in inside})
    branches = tuple(replace(b, parameters=tuple(sorted(members[b.handle]))) for b in new.branches)
    roles, caveats = roles_of(inner, analysis), renewed(plan.caveats, branches)
    new = replace(new, branches=branches, roles=roles, caveats=caveats)
    _check_ranks(model, new)
    _attach(inner, new)
    return new


def _check_ranks(model: nn.Module, plan: ScalingPlan) -> None:
    """Refuse plans that differ between the ranks of a DDP model, on all of them; the ranks switch together."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    counts: list[Any] = [None] * torch.distributed.get_world_size(model.process_group)
    visits = {str(branch.handle): branch.visits for branch in plan.branches} | plan.on_stream
    torch.distributed.all_gather_object(counts, visits, group=model.process_group)
    odd = [str(rank) for rank, others in enumerate(counts) if others != counts[0]]
    if odd:
        raise InputError(
            f"the loop counts of rank 0 and rank {', '.join(odd)} differ; set the same on all before rescale"
        )


def _members(plan: ScalingPlan, analysis: Analysis) -> dict[Handle, frozenset[str]]:
    """The parameters of every branch: those that it had, and those of visits that it did not have before."""
    before = {branch.handle: frozenset(branch.parameters) for branch in plan.branches}
    for group in analysis.groups:
        group.parameters |= before[group.handle]
    return before | {group.handle: group.parameters for group in analysis.groups}


# -- checks


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    for name in compiled_modules(model):
        where = f"its module {name}" if name else "the model"
        raise InputError(f"{where} is compiled already; call parametrize first and torch.compile after")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the model'} is a TorchScript module; rewrite the model it was made of, then "
                "looptransfer.fold and script that"
            )
    if any(PLAN in module.__dict__ or OUTPUTS in module.__dict__ for module in model.modules()):
        raise InputError(
            "the model is rewritten already, and a second ε would multiply the first; build a fresh model, or call "
            "looptransfer.remove(model) first"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{name} is uninitialised (a lazy module); run the model once before parametrize")


def _check_weights(model: nn.Module, meta: bool, preserve: bool) -> None:
    if holds_saved_plan(model):
        raise InputError(
            "the config of the model holds the plan that its weights were trained with; call "
            "looptransfer.apply_plan(model), and rescale where the loop count is another"
        )
    for name in sharded_modules(model):
        raise InputError(f"{name or 'the model'} is sharded already (FSDP); call parametrize first and shard after")
    if meta and preserve:
        raise InputError(
            "weights on the meta device can take no factor; give the model its weights first, then preserve=True"
        )


def _check_settings(rule: Rule, lam: float, base_layers: int, branches: Any, layers: int | None) -> None:
    check_rule(rule)
    residual_multiplier(rule, visits=1, layers=1, lam=lam, base_layers=base_layers)  # bad numbers before a slow trace
    if layers is not None:
        depth_multiplier(layers, base_layers)
    named = isinstance(branches, Sequence) and not isinstance(branches, str)
    if branches is not None and not (named and branches and all(isinstance(name, str) for name in branches)):
        raise InputError(f"branches is {branches!r}; give a list of module names or globs, such as ['layers.*.mlp']")


# -- putting it in


def _attach(model: nn.Module, plan: ScalingPlan) -> None:
    _insert(model, plan)
    carry(model, plan)
    keep_makeup(model, plan)
    setattr(model, PLAN, plan)


def _insert(model: nn.Module, plan: ScalingPlan) -> None:
    for branch in plan.branches:
        set_multiplier(model, branch.handle, branch.multiplier)
    for name, factor in plan.read_outs.items():
        set_input_multiplier(model, name, factor)
