"""Does the live model do what its plan says? One line for a user's CI."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError, ScalingWarning, VerificationError
from looptransfer.rewrite.analysis import analyse
from looptransfer.rewrite.branches import Group
from looptransfer.rewrite.ends import factors
from looptransfer.rewrite.forward import ExampleInputs, call_arguments, tensors_held
from looptransfer.rewrite.insert import clear_multipliers, has_input_multiplier
from looptransfer.rewrite.names import compiled_modules, plain_names
from looptransfer.rewrite.plan import PLAN, Branch, ScalingPlan, check_dimensions, planned
from looptransfer.rewrite.proof import SEED, all_agree, prove
from looptransfer.rewrite.record import RejectedInputsError
from looptransfer.rewrite.trace import Trace
from looptransfer.rewrite.twin import randomise, state_kept, twin_of
from looptransfer.text import few

TOLERANCE = 1e-3  # relative, of a multiplier
COMPILED = 1e-5  # share of the norm; inductor's float64 functions are not float64 throughout on every CPU


def verify_model(model: nn.Module, example_inputs: ExampleInputs) -> ScalingPlan:
    """Measure the branches of a rewritten model; see `audit.verify`."""
    inner, plan = planned(model)
    check_dimensions(inner, plan, "verify")
    try:
        analysis = analyse(inner, example_inputs, plan.declared_modules)
    except RejectedInputsError:
        raise
    except InputError as error:
        raise VerificationError(f"the model is no longer the one that was planned: {error}") from error
    problems = _disagreements(inner, plan, analysis.trace, analysis.groups)
    meta = any(parameter.is_meta for parameter in inner.parameters())
    if compiled_modules(model) and not meta and not _compiled_agrees(model, inner, example_inputs):
        problems.append("the compiled model does not compute what the rewritten model does; compile it again")
    if problems:
        raise VerificationError("the model does not do what its plan says:\n" + "\n".join(f"- {p}" for p in problems))
    if not plan.proved and not meta:
        twin = twin_of(inner, randomised=True)
        clear_multipliers(twin)
        prove(twin, example_inputs, analyse(twin_of(twin), example_inputs, plan.declared_modules, seed=SEED))
        plan = replace(plan, proved=True)
        setattr(inner, PLAN, plan)
    return plan


def _disagreements(model: nn.Module, plan: ScalingPlan, forward: Trace, groups: list[Group]) -> list[str]:
    live = {group.handle: group for group in groups}
    problems, others = [], []
    for branch in plan.branches:
        group = live.pop(branch.handle, None)
        if group is None:
            problems.append(f"{branch.handle}: no longer a residual branch of its own (was it replaced?)")
            continue
        measured = _measured(branch, forward, group)
        if measured is not None:
            problems.append(f"{branch.handle}: multiplier {branch.multiplier:.6g} planned, {measured} measured")
        if group.visits != branch.visits and not plan.random_loops:
            visits = f"{branch.handle}: {branch.visits:g} visits planned, {group.visits} measured"
            if model.training:
                fix = "rescale(model, example_inputs) follows a loop count that changed in training"
                problems.append(f"{visits}; {fix}")
            else:
                others.append(visits)
    if others:
        told = "in eval mode other loop counts are taken as meant for inference; before training call rescale"
        warnings.warn(f"{few(others)}; {told}", ScalingWarning, stacklevel=4)
    problems += [f"{handle}: a residual branch that the plan does not know" for handle in live]
    modules = plain_names(model)
    return problems + [
        f"{name}: the factor {factor:.6g} on its input is gone (was it replaced?)"
        for name, factor in plan.read_outs.items()
        if not has_input_multiplier(modules.get(name), factor)
    ]


def _measured(branch: Branch, forward: Trace, group: Group) -> str | None:
    """The factor that stands on a branch instead of its multiplier; None where it is that."""
    measured = factors(forward, group)
    first = measured[0] / branch.factors[0] if measured and branch.factors and branch.factors[0] else 0.0
    for constant in branch.factors:  # there may be more by now, of adapters put on the last map
        if not any(_near(factor, constant * branch.multiplier) for factor in measured):
            return f"{first:.6g}"
    last = [abs(forward.graph.nodes[route[-1]].factor) for _, route in group.routes]
    if branch.multiplier != 1 and branch.mark is None and not all(_near(f, branch.multiplier) for f in last):
        return f"{branch.multiplier:.6g} on a part of it"
    return None


def _near(value: float, expected: float) -> bool:
    return abs(value - expected) <= TOLERANCE * abs(expected)


def _compiled_agrees(model: nn.Module, inner: nn.Module, example_inputs: ExampleInputs) -> bool:
    args, kwargs = call_arguments(example_inputs)

    def run() -> list[Tensor]:
        with state_kept(inner):
            torch.manual_seed(0)
            return [tensor.detach().clone() for tensor in tensors_held(model(*args, **kwargs))]

    def eagerly() -> list[Tensor]:
        with torch.compiler.set_stance("force_eager"):
            return run()

    with _random_weights(inner):
        compiled, eager = run(), eagerly()
        if all_agree(compiled, eager, inner, COMPILED):
            return True
        if not inner.training:
            return False
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # compiled and eager code draw different random numbers for dropout
        try:
            return all_agree(run(), eagerly(), inner, COMPILED)
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _random_weights(model: nn.Module) -> Iterator[None]:
    """Zero-initialised branch ends would hide a wrong multiplier; the weights come back bit for bit."""
    kept = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    try:
        randomise(model)
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in kept:
                parameter.copy_(value)
                parameter.grad = gradient
