"""Counts that follow N, several draws of a random depth, and what is left alone."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
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


OWN: dict[str, Callable[[Any], int]] = {
    "Python's": lambda m: m.python.randint(2, 5),
    "numpy's": lambda m: int(m.numpy.integers(2, 6)),
    "torch's": lambda m: int(torch.randint(2, 6, (), generator=m.torch)),
    "a permutation": lambda m: int(torch.randperm(4, generator=m.torch)[0]) + 2,
    "in turn": lambda m: next(m.turns),
    "a counter": lambda m: 2 + m.count % 3,
    "a counter in a buffer": lambda m: 2 + int(m.steps) % 3,
}


class OwnState(Scheduled):
    """A loop count that what the model holds decides."""

    def __init__(self, decide: Callable[[Any], int]) -> None:
        super().__init__(lambda m, x: m.block(x), 1)
        self.decide, self.count, self.turns = decide, 0, itertools.cycle([2, 4])
        self.python, self.numpy, self.torch = random.Random(0), np.random.default_rng(0), torch.Generator()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.steps += 1
        self.loops = self.decide(self)
        return super().forward(x)


@pytest.mark.parametrize("name", OWN)
def test_a_depth_that_follows_the_models_own_state_is_noticed(name: str) -> None:
    model = OwnState(OWN[name]).double()
    plan = lt.parametrize(model, X)
    assert any(caveat.startswith("visits vary") for caveat in plan.caveats)
    assert plan.branches[1].visits > 2
    assert model.count == int(model.steps) == 0
    mean = lt.parametrize(OwnState(OWN[name]).double(), X, loops=3)
    assert [branch.visits for branch in mean.branches] == [1, 3, 1]
    assert mean.on_stream == {"norm.weight": 3, "norm.bias": 3}


@pytest.mark.parametrize(("training", "visits"), [(False, 8), (True, 2)])
def test_another_depth_in_training_is_told_in_eval_mode(training: bool, visits: int) -> None:
    model = OwnState(lambda m: 2 if m.training else 8).double().train(training)
    plan = lt.parametrize(model, X)
    assert [branch.visits for branch in plan.branches] == [1, visits, 1]
    told = [caveat for caveat in plan.caveats if caveat.startswith("other visits in training")]
    assert len(told) == (not training)
    assert training or "it visits block.f 2, not 8 times" in told[0]
    assert not any(caveat.startswith("visits vary") for caveat in plan.caveats)
    assert model.training == training


def test_a_layer_that_training_drops_is_no_other_depth() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        x = x + m.f(x)
        return x if m.training else x + m.g(x)

    plan = lt.parametrize(Stepped(step, 1).double().eval(), X)
    assert [branch.visits for branch in plan.branches] == [1, 1]
    assert plan.caveats == ()


class Remembers(Scheduled):
    """Batch statistics, a moving average, a cache and a table that the first forward makes: state, and no depth."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.block(m.batch(x.mT).mT), 3)
        self.batch, self.table, self.cache = nn.BatchNorm1d(WIDTH), None, torch.zeros(0)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(WIDTH, dtype=x.dtype) + torch.ones(WIDTH, dtype=x.dtype)
        self.average.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        self.cache = torch.cat([self.cache, x.detach().flatten()])
        return super().forward(x + self.table * self.average + self.cache.mean())


@pytest.mark.parametrize("training", [True, False])
def test_state_that_leaves_the_depth_alone_is_no_varying_depth(training: bool) -> None:
    plan = lt.parametrize(Remembers().double().train(training), X)
    assert [branch.visits for branch in plan.branches] == [1, 3, 1]
    assert not any(caveat.startswith(("visits vary", "other visits")) for caveat in plan.caveats)


class OnceOnly(Scheduled):
    """A second forward fails."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.loops
        result, self.loops = super().forward(x), 0
        return result


def test_a_model_that_runs_once_is_planned() -> None:
    plan = lt.parametrize(OnceOnly(lambda m, x: m.block(x), 3).double(), X)
    assert [branch.visits for branch in plan.branches] == [1, 3, 1]
    assert not any(caveat.startswith("visits vary") for caveat in plan.caveats)


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
