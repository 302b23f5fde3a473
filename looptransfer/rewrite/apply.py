"""A plan put into a model.

The module that hands over a branch gets a subclass of its own class whose forward multiplies the branch. Bare forward
hooks would be shorter and wrong: TorchDynamo does not guard on them, so where an unhooked model of the same class was
compiled before, a hooked one runs unscaled without a word. It does guard on the class.
"""

import functools
import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.plan import ScalingPlan, check_silenced, make_plan
from looptransfer.rewrite.trace import ExampleInputs, randomised_twin, trace
from looptransfer.rules import Rule, check_rule, residual_multiplier

PLAN = "_looptransfer_plan"  # on the model
OUTPUTS = "_looptransfer_multipliers"  # on a branch's module: which output -> ε


def parametrize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    rule: Rule = "factored",
    lam: float = 1.0,
    base_layers: int = 1,
) -> ScalingPlan:
    """Rewrite `model` in place so that every residual branch is multiplied as `rule` says, and return the plan.

    The branches are found by tracing one forward of a copy on `example_inputs`: N and L are counted, not asked for.
    A model with N = 1 is legitimate: it is the natural proxy. `state_dict` keys stay as they are; deepcopy, pickle and
    `torch.compile` keep the multipliers. Compile after rewriting.

    Args:
        model: any module with residual branches; it is not run and its random state, buffers and gradients stay.
        example_inputs: what its forward takes: a tensor, a tuple of positional or a dict of keyword arguments.
        rule: "factored" λ/(N√(L/L_ref)), "sqrt" λ/√(N·L/L_ref) or "unscaled" 1 (arXiv 2606.18524, Table 1).
        lam: λ.
        base_layers: L_ref; 1 writes the rule absolutely.

    Raises:
        InputError: not a module, compiled or rewritten already, inputs the model rejects, λ or base_layers out of
            range, no residual add found, or a branch that no module's output stands for.
    """
    _check_model(model)
    check_rule(rule)
    residual_multiplier(rule, visits=1, layers=1, lam=lam, base_layers=base_layers)  # bad numbers before a slow trace
    twin = randomised_twin(model)
    seen = trace(twin, example_inputs)
    plan = make_plan(twin, seen, rule, lam, base_layers)
    _insert(twin, plan, silenced=True)
    silent = trace(twin, example_inputs)
    check_silenced([add for add in silent.adds if add.kind == "leaf"], sum(add.kind == "leaf" for add in seen.adds))
    plan = replace(plan, on_stream=tuple(sorted(name for name in silent.reaching if seen.uses[name] > 1)))
    _warn_of_matrices(twin, plan)
    _insert(model, plan)
    setattr(model, PLAN, plan)
    return plan


def _warn_of_matrices(twin: nn.Module, plan: ScalingPlan) -> None:
    matrices = [name for name in plan.on_stream if twin.get_parameter(name).ndim >= 2]
    if matrices:
        warnings.warn(
            f"not scaled: {', '.join(matrices)} act on the stream more than once outside every residual branch found, "
            "and no ε controls them. That is right for an adapter at the loop's entry; a branch that is added in a way "
            "that is not recognised must be computed in an nn.Module and added with +",
            stacklevel=3,
        )


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


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    compiler = sys.modules.get("torch._dynamo")  # importing it for the question would cost two seconds
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or (compiler and isinstance(module, compiler.OptimizedModule)):
            where = f"its module {name}" if name else "the model"
            raise InputError(f"{where} is compiled already; call parametrize first and torch.compile after")
    if any(PLAN in module.__dict__ or OUTPUTS in module.__dict__ for module in model.modules()):
        raise InputError("the model is rewritten already, and a second ε would multiply the first; build a fresh model")


def _insert(model: nn.Module, plan: ScalingPlan, silenced: bool = False) -> None:
    for branch in plan.branches:
        module = model.get_submodule(branch.module)
        if OUTPUTS not in module.__dict__:
            setattr(module, OUTPUTS, {})
            module.__class__ = _scaled_class(type(module))
        for name in _parents(branch.module):
            layer = model.get_submodule(name)
            if isinstance(layer, nn.TransformerEncoderLayer):
                layer.activation_relu_or_gelu = 0  # its fused path in eval mode would pass the branch's module by
        module.__dict__[OUTPUTS][branch.output] = 0.0 if silenced else branch.multiplier


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]


_scaled_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _scaled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with a forward that multiplies the outputs named in the instance. One class per class, shared by all."""
    if cls not in _scaled_classes:

        @functools.wraps(cls.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = cls.forward(self, *args, **kwargs)
            for index, multiplier in self.__dict__[OUTPUTS].items():
                output = _multiply(output, index, multiplier)
            return output

        def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
            state = cast(tuple[Any, ...], cls.__reduce_ex__(self, protocol))[2:]
            return _rebuild, (cls,), *state

        body = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__}
        _scaled_classes[cls] = types.new_class(f"Scaled{cls.__name__}", (cls,), {}, lambda space: space.update(body))
    return _scaled_classes[cls]


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    """An empty scaled instance, for pickle and deepcopy: a class made at run time has no name to be found by."""
    return cls.__new__(_scaled_class(cls))


def _multiply(output: Any, index: int | str | None, multiplier: float) -> Any:
    if index is None:
        return output * multiplier
    if isinstance(output, Mapping):
        output[index] = output[index] * multiplier  # type: ignore[index]
        return output
    parts = [part * multiplier if position == index else part for position, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
