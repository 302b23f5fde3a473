"""Time is where every input of the first step is less than that of the last; depth is where they are there at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from tests.models import WIDTH, inputs, tokens
from tests.rewrite.answers import Stepped, X, refusal, visits

STEPS = 4


class Recurrent(nn.Module):
    """h = h + f(h, frame), with one frame a step."""

    def __init__(self, frames: Callable[..., Any], start: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.project, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, STEPS * WIDTH)
        self.table, self.depth = nn.Embedding(11, WIDTH), nn.Parameter(torch.randn(STEPS, WIDTH))
        self.frames, self.start = frames, start

    def forward(self, x: Any, *more: Tensor) -> Tensor:
        h = self.start(x)
        for frame in self.frames(self, x, *more):
            wide = frame[:, None] if h.ndim > frame.ndim > 1 else frame
            h = h + self.f(torch.cat([h, wide.expand_as(h)], -1))
        return h


def zeros(x: Any) -> Tensor:
    return torch.zeros(2, WIDTH, dtype=torch.float64)


OVER_TIME: dict[str, tuple[Callable[..., Any], Any]] = {
    "slices": (lambda m, x: [x[:, t] for t in range(STEPS)], X),
    "projected": (lambda m, x: m.project(x).unbind(1), X),
    "projected one by one": (lambda m, x: [m.project(x[:, t]) for t in range(STEPS)], X),
    "embedded": (lambda m, x: m.table(x).unbind(1), tokens(time=STEPS)),
    "embedded one by one": (lambda m, x: [m.table(x[:, t]) for t in range(STEPS)], tokens(time=STEPS)),
    "by index": (lambda m, x: [x.index_select(1, torch.tensor([t])).squeeze(1) for t in range(STEPS)], X),
    "by gather": (lambda m, x: [x.gather(1, torch.full((2, 1, WIDTH), t)).squeeze(1) for t in range(STEPS)], X),
    "split": (lambda m, x: [part.squeeze(1) for part in m.project(x).split(1, 1)], X),
    "a list": (lambda m, x: x, ([*X.unbind(1)],)),
    "backwards": (lambda m, x: x.flip(1).unbind(1), X),
    "growing windows": (lambda m, x: [x[:, : t + 1].mean(1) for t in range(STEPS)], X),
    "sliding windows": (lambda m, x: x.unfold(1, 2, 1).mean(-1).unbind(1), X),
}


@pytest.mark.parametrize("frames", OVER_TIME)
def test_a_recurrence_over_time_is_refused_however_its_frames_come(frames: str) -> None:
    read, example = OVER_TIME[frames]
    message = refusal(Recurrent(read, zeros), "h = h + self.f(", example)
    assert "over time, not over depth" in message
    assert "loops=" in message


OVER_DEPTH: dict[str, Callable[..., Any]] = {
    "a part of a condition": lambda m, x, c: c.unbind(1),
    "a part of a condition, by index": lambda m, x, c: [c.index_select(1, torch.tensor([t]))[:, 0] for t in range(4)],
    "a mapped condition": lambda m, x, c: m.wide(c[:, 0]).chunk(STEPS, -1),
    "a map of the input": lambda m, x, c: m.wide(x.mean(1)).chunk(STEPS, -1),
    "a learned table": lambda m, x, c: m.depth,
    "an embedded step": lambda m, x, c: [m.table(torch.tensor(t)) for t in range(STEPS)],
    "a cache by layer": lambda m, x, c: [c.transpose(0, 1)[t] for t in range(STEPS)],
    "its own tokens, one after the other": lambda m, x, c: x.unbind(1),
}


@pytest.mark.parametrize("frames", OVER_DEPTH)
def test_a_loop_over_depth_may_read_a_part_of_its_own_at_each_visit(frames: str) -> None:
    model = Recurrent(OVER_DEPTH[frames], lambda x: x)
    assert visits(model, (X, inputs(2, STEPS, WIDTH, seed=1))) == {"f": STEPS}


def test_what_is_declared_is_depth_with_its_count() -> None:
    model = Recurrent(OVER_TIME["projected"][0], zeros)
    plan = lt.parametrize(model.double(), X, branches=["f"], loops=STEPS)
    assert [(b.module, b.visits) for b in plan.branches] == [("f", STEPS)]


def from_here_on(begin: Callable[[int], int]) -> Callable[..., Tensor]:
    def step(m: Any, x: Tensor) -> Tensor:
        m.visit = getattr(m, "visit", -1) + 1
        old, new = x[:, : begin(m.visit % 3)], x[:, begin(m.visit % 3) :]
        return torch.cat([old, new + m.f(new)], 1)

    return step


@pytest.mark.parametrize(
    ("begin", "count"), [(lambda i: i, 3), (lambda i: 2 * i, 2)], ids=["a growing prefix is kept", "the last is empty"]
)
def test_a_loop_over_depth_may_read_a_part_without_elements(begin: Callable[[int], int], count: int) -> None:
    assert visits(Stepped(from_here_on(begin)), X) == {"f": count}


@pytest.mark.parametrize("loops", [1, 3, 4])
def test_an_injection_after_every_visit_is_no_frame(loops: int) -> None:
    model = Stepped(lambda m, x, extra: x + m.f(x) + extra, loops)
    assert visits(model, (X, inputs(2, 4, WIDTH, seed=1))) == {"f": loops}
