"""Counts that follow N, several draws of a random depth, and what is left alone."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from tests.models import WIDTH, inputs, line_of
from tests.rewrite.answers import Residual, Stepped, X, planned

Count = Callable[[], int]


class Scheduled(nn.Module):
    """A prelude, a loop that a test writes with a norm at its end, a coda."""

    def __init__(self, loop: Callable[[Any, Tensor], Tensor], loops: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pre, self.block, self.coda, self.norm = Residual(), Residual(), Residual(), nn.LayerNorm(WIDTH)
        self.loop, self.loops = loop, loops

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for _ in range(self.loops):
            x = self.norm(self.loop(self, x))
        return self.coda(x)  # type: ignore[no-any-return]


LOOPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "twice a loop": lambda m, x: m.block(m.block(x)),
    "the prelude too": lambda m, x: m.block(m.block(m.pre(x))),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_rescaled_from_one_loop_and_back_a_model_is_what_a_fresh_one_is(loop: str) -> None:
    model = Scheduled(LOOPS[loop], 1).double()
    lt.parametrize(model, X)
    for n in (2, 4, 7, 1):
        model.loops = n
        plan, fresh = lt.rescale(model, X), lt.parametrize(Scheduled(LOOPS[loop], n).double(), X)
        assert (plan.branches, plan.layers, plan.on_stream) == (fresh.branches, fresh.layers, fresh.on_stream)
        assert lt.verify(model, X) == plan
        scales = {group["name"]: group["lr"] for group in lt.param_groups(model, torch.optim.AdamW, lr=1.0)}
        assert n == 1 or scales[f"outside, no decay, on the stream {n}×"] == pytest.approx(1 / n)


def test_a_mean_that_was_traced_gives_each_branch_its_own_count() -> None:
    plan = lt.parametrize(Scheduled(LOOPS["twice a loop"], 6).double(), X, loops=6)
    assert [branch.visits for branch in plan.branches] == [1, 12, 1]
    assert plan.on_stream == {"norm.weight": 6, "norm.bias": 6}
    assert plan.random_loops


DRAWS: dict[str, Count] = {
    "python": lambda: random.choice([4, 8]),
    "torch": lambda: int(torch.randint(3, 6, ())),
    "an item": lambda: 2 + torch.rand(()).gt(0.5).item(),
    "a list": lambda: torch.randperm(4).tolist()[0] + 2,
}


class Drawn(Scheduled):
    def __init__(self, draw: Count) -> None:
        super().__init__(lambda m, x: m.block(x), 1)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        self.loops = self.draw()
        return super().forward(x)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_random_depth_is_noticed_whatever_the_random_state_is(draw: str) -> None:
    for seed in range(6):
        random.seed(seed)
        torch.manual_seed(seed)
        plan = lt.parametrize(Drawn(DRAWS[draw]).double(), X)
        assert any(caveat.startswith("visits vary") for caveat in plan.caveats)
        mean = lt.parametrize(Drawn(DRAWS[draw]).double(), X, loops=4)
        assert [branch.visits for branch in mean.branches] == [1, 4, 1]
        assert mean.on_stream == {"norm.weight": 4, "norm.bias": 4}


def test_layers_that_weights_choose_are_noticed() -> None:
    def until_small(m: Any, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + m.f(x)
            if float(m.halt(x).detach().mean()) > 0:
                break
        return x

    model = Stepped(until_small, 1, halt=nn.Linear(WIDTH, 1)).double()
    with torch.no_grad():
        model.halt.bias.fill_(-100.0)
    plan = lt.parametrize(model, X)
    assert plan.branches[0].visits == 6
    assert any(caveat.startswith("visits vary") for caveat in plan.caveats)


def test_what_is_left_alone_is_listed_with_its_line_and_why() -> None:
    def step(m: Any, x: Tensor, start: Tensor) -> Tensor:
        h = x + m.f(x)
        h = h + torch.fft.fft(h, dim=1).real
        return h + start

    plan = planned(Stepped(step, 3), (X, inputs(2, 4, WIDTH, seed=1)))
    reasons = {line_of(left.source): left.reason for left in plan.left_alone}
    assert "no learned matrix" in reasons["h = h + torch.fft.fft(h, dim=1).real"]
    assert any(c.startswith("streams left alone") and "test_planner.py" in c for c in plan.caveats)
