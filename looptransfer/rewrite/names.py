"""Modules and parameters by names that wrappers around them do not change."""

import sys
from collections.abc import Iterator

from torch import nn

from looptransfer.errors import InputError


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name; wrappers of activation checkpointing, torch.compile and FSDP add nothing to it."""
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        named[_plain(name)] = module  # of a wrapper and what it wraps, the latter comes last
    return named


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name, as `plain_names` has it."""
    return {_plain(name): parameter for name, parameter in model.named_parameters()}


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of every parameter by its id."""
    return {id(parameter): name for name, parameter in named_parameters(model).items()}


def compiled_modules(model: nn.Module) -> list[str]:
    """The modules that torch.compile was called on."""
    compiler = sys.modules.get("torch._dynamo")  # importing it for the question would cost two seconds
    return [
        name
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None or (compiler and isinstance(module, compiler.OptimizedModule))
    ]


def sharded_modules(model: nn.Module) -> list[str]:
    """The modules that FSDP was put on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule) if fsdp else ()
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a name that a plan gives.

    Raises:
        InputError: there is none any more.
    """
    module = plain_names(model).get(name)
    if module is None:
        raise InputError(f"the plan names the module {name}, which this {type(model).__name__} does not have")
    return module


WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # what torch's wrappers call their inside


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def around(modules: dict[str, nn.Module], name: str) -> Iterator[list[nn.Parameter]]:
    """The parameters in each module around the place of a parameter, from the smallest module that is there."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            yield list(modules[name].parameters())


def homes(model: nn.Module) -> dict[tuple[int, str], str]:
    """The homes of parameters: (module, attribute) -> the parameter's name."""
    names = parameter_names(model)
    held = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    return {(id(module), name): names[id(parameter)] for module, name, parameter in held}
