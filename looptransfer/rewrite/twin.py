"""Copies to try things on, and states to give back."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from looptransfer.errors import InputError


def twin_of(model: nn.Module, randomised: bool = False) -> nn.Module:
    """A copy of `model`, so that its buffers, gradients and caches stay as they are.

    `randomised` fills its parameters with non-zero random numbers, the same ones at every call: a zero-initialised
    branch end would make a test for ε = 0 vacuous.

    Raises:
        InputError: the model cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise InputError(f"the model cannot be copied for the trace: {type(error).__name__}: {error}") from error
    for ours, copied in zip(model.parameters(), twin.parameters(), strict=True):
        vars(copied).update(vars(ours))  # mup keeps its width shapes there, and deepcopy drops them
    if randomised:
        randomise(twin)
    return twin


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
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, value in buffers:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
