"""Short ways to ask what `parametrize` answers."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from tests.models import WIDTH, inputs, line_of, mlp

X = inputs(2, 4, WIDTH)


class Stepped(nn.Module):
    """`loops` times a step that a test writes: step(model, x, *further inputs)."""

    def __init__(self, step: Callable[..., Tensor], loops: int = 3, **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.loops = step, loops
        for name, part in {"f": mlp(), "g": mlp(), **parts}.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        for _ in range(self.loops):
            x = self.step(self, x, *more)
        return x


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def planned(model: nn.Module, example: Any = X, **told: Any) -> lt.ScalingPlan:
    """The plan of a model in float64, which is verified."""
    plan = lt.parametrize(model.double(), example, **told)
    assert lt.verify(model, example) == plan
    return plan


def visits(model: nn.Module, example: Any = X, **told: Any) -> dict[str, float]:
    """N of every branch."""
    return {str(branch.handle): branch.visits for branch in planned(model, example, **told).branches}


def refusal(model: nn.Module, text: str, example: Any = X, **told: Any) -> str:
    """The message with which a model is refused; the line that it names holds `text`."""
    with pytest.raises(lt.InputError) as caught:
        lt.parametrize(model.double(), example, **told)
    named = re.search(r"\S+\.py:\d+", str(caught.value))
    assert named, str(caught.value)
    assert text in line_of(named[0]), str(caught.value)
    return str(caught.value)
