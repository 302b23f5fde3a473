"""Copies to try things on, and states to give back."""

import copy
import copyreg
import random
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from looptransfer.errors import InputError
from looptransfer.rewrite.names import named_parameters


def twin_of(model: nn.Module, randomised: bool = False) -> nn.Module:
    """A copy of `model`, so that its buffers, gradients and caches stay as they are.

    `randomised` fills its parameters with non-zero random numbers, the same ones at every call: a zero-initialised
    branch end would make a test for ε = 0 vacuous.

    Raises:
        InputError: the model cannot be copied.
    """
    twin = _copied(model)
    for original, copied in zip(model.parameters(), twin.parameters(), strict=True):
        vars(copied).update(vars(original))  # mup keeps its width shapes there, and deepcopy drops them
    if randomised:
        randomise(twin)
    return twin


USED_UP = (
    Tensor,
    nn.Module,
    torch.Generator,
    types.GeneratorType,
)  # a forward of the twin would change the model's own


def _copied(model: nn.Module) -> nn.Module:
    """A deepcopy that shares what cannot be copied and is not used up, such as a lock or an open file."""
    shared: set[type] = set()
    while True:
        try:
            with _told_to_share(shared):
                return copy.deepcopy(model, _activations(model))
        except Exception as error:
            stuck = _stuck_at(error)
            if isinstance(stuck, USED_UP) or type(stuck) in shared:
                raise InputError(
                    f"the model cannot be copied for the trace: {type(error).__name__}: {error}{_holder(model, stuck)}"
                ) from error
            shared.add(type(stuck))


@contextmanager
def _told_to_share(kinds: set[type]) -> Iterator[None]:
    """Let deepcopy take objects of these types as they are: to it a name instead of a recipe says that."""
    before = copyreg.dispatch_table.copy()
    copyreg.dispatch_table.update(dict.fromkeys(kinds, lambda shared: ""))
    try:
        yield
    finally:
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(before)


def _stuck_at(error: BaseException) -> Any:
    """The innermost object that deepcopy was at."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is copy.deepcopy.__code__]
    return frames[-1].f_locals["x"]


def _holder(model: nn.Module, held: Any) -> str:
    """The attribute that holds an object, for an error; empty where it lies deeper."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if any(leaf is held for leaf in tree_leaves(value)):
                return f"; take {name}{name and '.'}{attribute} off the model for the call"
    return ""


def _activations(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: what a module keeps of an earlier forward, which autograd would not let be copied."""
    kept = [leaf for module in model.modules() for leaf in tree_leaves(dict(vars(module)))]
    return {id(leaf): leaf.detach() for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf}


def check_ties(model: nn.Module) -> None:
    """Refuse parameters that are two for the optimizer and one in memory.

    Raises:
        InputError: names the two.
    """
    owners: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters(model).items():
        if not parameter.is_meta and parameter.layout is torch.strided and parameter.numel():
            owners.setdefault(parameter.untyped_storage()._cdata, []).append((name, parameter))
    for together in owners.values():
        for number, (name, parameter) in enumerate(together):
            other = next((o for o, p in together[:number] if _overlap(p, parameter)), None)
            if other is not None:
                raise InputError(
                    f"{name} and {other} are two parameters in one memory (p.data = q.data), which an optimizer and a "
                    "copy take for two; tie the parameters themselves: module.weight = other.weight"
                )


def _overlap(first: nn.Parameter, second: nn.Parameter) -> bool:
    size = first.untyped_storage().nbytes() // first.element_size()
    taken = torch.zeros(size, dtype=torch.bool)
    taken.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), second.storage_offset()).any())


def randomise(model: nn.Module) -> None:
    """Fill every parameter with non-zero random numbers, the same ones at every call."""
    with torch.no_grad():
        for position, parameter in enumerate(model.parameters()):
            parameter.grad = None
            if parameter.is_floating_point() and not parameter.is_meta and parameter.numel():
                generator = torch.Generator().manual_seed(position)
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = parameter[0].numel() if parameter.ndim >= 2 else 1
                parameter.copy_(noise / fan_in**0.5 if parameter.ndim >= 2 else 1 + 0.1 * noise)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Give the model's buffers and Python's, numpy's and torch's random state back as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with random_state_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Give Python's, numpy's and torch's random state back as they were, on the model's devices too."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
