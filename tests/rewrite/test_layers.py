"""L follows the depth, however the layers of a looped module are written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from tests.models import WIDTH, Mixer, mlp
from tests.rewrite.answers import Stepped, planned


class Written(nn.Module):
    """Layers without modules of their own; `layer` adds one of them to the stream."""

    def __init__(self, depth: int, layer: Callable[[Any, Tensor, int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depth, self.layer = depth, layer
        self.bank = nn.Parameter(torch.randn(depth, WIDTH, WIDTH) / 3)
        self.up = nn.ParameterList(torch.randn(WIDTH, 2 * WIDTH) / 3 for _ in range(depth))
        self.down = nn.ParameterList(torch.randn(2 * WIDTH, WIDTH) / 3 for _ in range(depth))
        for i, name in zip(range(depth), "abcd", strict=False):
            self.add_module(f"{name}_mixer", Mixer())
            self.add_module(f"{name}_mlp", mlp())
            self.add_module(f"mixer{i}", Mixer())
            self.add_module(f"mlp{i}", mlp())

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.layer(self, x, i)
        return x


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def by_name(m: Any, x: Tensor, mixer: str, late: str) -> Tensor:
    x = x + m.get_submodule(mixer)(normed(x))
    return x + m.get_submodule(late)(normed(x))  # type: ignore[no-any-return]


def two_marks(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + lt.residual(normed(x) @ m.bank[i], f"mixer of layer {i}")
    return x + lt.residual((normed(x) @ m.up[i]).tanh() @ m.down[i], f"mlp of layer {i}")


LAYERS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "attributes with numbers": lambda m, x, i: by_name(m, x, f"mixer{i}", f"mlp{i}"),
    "attributes with names": lambda m, x, i: by_name(m, x, f"{'abcd'[i]}_mixer", f"{'abcd'[i]}_mlp"),
    "a mark a layer": lambda m, x, i: x + lt.residual(normed(x) @ m.bank[i], f"layer {i}"),
    "two marks a layer": two_marks,
    "in one sum": lambda m, x, i: x + getattr(m, f"mixer{i}")(normed(x)) + getattr(m, f"mlp{i}")(normed(x)),
}


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_l_is_the_depth_of_a_looped_module_whose_layers_are_no_modules(layer: str, depth: int) -> None:
    plan = planned(Stepped(lambda m, x: m.body(x), 3, body=Written(depth, LAYERS[layer])))
    assert (plan.loops, plan.layers) == (3, depth)
    assert len({branch.layer for branch in plan.branches}) == depth


def with_two_mixers(m: Any, x: Tensor, i: int) -> Tensor:
    x = by_name(m, x, "mixer0", "mixer1") if i == 0 else x
    return x + m.mlp0(normed(x)) if i == 1 else x  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "layer", [with_two_mixers, lambda m, x, i: x if i else by_name(m, x, "a_mlp", "b_mlp")], ids=["no twin", "one kind"]
)
def test_branches_that_differ_in_kind_or_by_their_names_are_one_block(
    layer: Callable[[Any, Tensor, int], Tensor],
) -> None:
    plan = planned(Stepped(lambda m, x: m.body(x), 3, body=Written(2, layer)))
    assert {branch.layer for branch in plan.branches} == {"body"}
    assert plan.layers == 1
