"""A residual branch in any spelling is scaled, or refused at its line; the same holds at N = 1 and inside a branch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from tests.models import WIDTH, inputs, mlp
from tests.rewrite.answers import Residual, Stepped, X, planned, refusal, visits

Step = Callable[[Any, Tensor], Tensor]
ROWS = torch.arange(2)
ONES = torch.ones(2, dtype=torch.float64)
EYES = torch.eye(WIDTH, dtype=torch.float64).repeat(2, 1)


def into_list(m: Any, x: Tensor) -> Tensor:
    streams = [x.clone()]
    torch._foreach_add_(streams, [m.f(x)])
    return streams[0]


def by_assignment(m: Any, x: Tensor) -> Tensor:
    z = x.clone()
    z[ROWS] = z[ROWS] + m.f(x)
    return z


def packed_and_scaled(m: Any, x: Tensor) -> Tensor:
    stream, branch = torch.stack([0.9 * x, m.f(x)], 1).unbind(1)
    return stream + branch


def packed_and_masked(m: Any, x: Tensor) -> Tensor:
    both = torch.stack([x, m.f(x)]).masked_fill(torch.zeros(2, 1, 1, 1, dtype=torch.bool), 0.0)
    return both[0] + both[1]


def packed_and_halved(m: Any, x: Tensor) -> Tensor:
    both = torch.cat([x, m.f(x)], -1).tanh()
    return both[..., :WIDTH] + 0.5 * both[..., WIDTH:]


def first_token_to_all(m: Any, x: Tensor) -> Tensor:
    z = torch.cat([m.f(x.mean(1, keepdim=True)), x], 1)
    z = z + m.g(z)
    return z[:, 1:] + z[:, :1]


def in_frequencies(m: Any, x: Tensor) -> Tensor:
    total = torch.fft.rfft(x, dim=-1) + torch.fft.rfft(m.f(x), dim=-1)
    return torch.fft.irfft(total, n=WIDTH, dim=-1)


# A step of which no x + f(x) can be read, and what stands on the line where the two ways meet.
SPELLINGS: dict[str, tuple[Step, str]] = {
    "mean of a stack": (lambda m, x: torch.stack([x, m.f(x)], -1).mean(-1) * 2, ".mean(-1)"),
    "nansum": (lambda m, x: torch.stack([x, m.f(x)]).nansum(0), ".nansum(0)"),
    "a stack with weights": (lambda m, x: (torch.stack([x, m.f(x)], -1) * ONES).sum(-1), "* ONES"),
    "a stack with learned weights": (lambda m, x: (torch.stack([x, m.f(x)], -1) * m.w.softmax(0)).sum(-1), ".softmax"),
    "a stack behind a ReLU": (lambda m, x: F.relu(torch.stack([x, m.f(x)])).sum(0), "F.relu"),
    "einsum": (lambda m, x: torch.einsum("k...,k->...", torch.stack([x, m.f(x)]), ONES), "einsum"),
    "tensordot": (lambda m, x: torch.tensordot(ONES, torch.stack([x, m.f(x)]), 1), "tensordot"),
    "matmul of both": (lambda m, x: torch.cat([x, m.f(x)], -1) @ EYES, "@ EYES"),
    "a convolution over both": (
        lambda m, x: F.conv1d(torch.stack([x, m.f(x)], 2).flatten(0, 1), ONES[None, :, None]).view_as(x),
        "conv1d",
    ),
    "cumsum": (lambda m, x: torch.stack([x, m.f(x)], 1).cumsum(1)[:, -1], "cumsum"),
    "a product of exponentials": (lambda m, x: torch.stack([x.exp(), m.f(x).exp()]).prod(0).log(), ".prod(0)"),
    "trapezoid": (lambda m, x: torch.trapezoid(torch.stack([x, m.f(x)]), dim=0) * 2, "trapezoid"),
    "index_put": (lambda m, x: x.index_put((ROWS,), m.f(x), accumulate=True), "index_put"),
    "index_put in place": (lambda m, x: x.clone().index_put_((ROWS,), m.f(x), accumulate=True), "index_put_"),
    "assignment by index": (by_assignment, "z[ROWS] ="),
    "scatter_reduce": (lambda m, x: x.scatter_reduce(2, torch.arange(8).expand_as(x), m.f(x), "sum"), "scatter_reduce"),
    "_foreach_add": (lambda m, x: torch._foreach_add((x,), (m.f(x),))[0], "_foreach_add"),
    "_foreach_add_": (into_list, "_foreach_add_"),
    "_foreach_sub": (lambda m, x: torch._foreach_sub([x], [m.f(x)])[0], "_foreach_sub"),
    "rsub": (lambda m, x: torch.rsub(m.f(x), x), "rsub"),
    "the negative": (lambda m, x: m.f(x) - x, "- x"),
    "addcdiv": (lambda m, x: torch.addcdiv(x, m.f(x), torch.ones_like(x)), "addcdiv"),
    "out=": (lambda m, x: torch.add(x, m.f(x), out=torch.empty_like(x)), "out="),
    "a sum with out=": (lambda m, x: torch.sum(torch.stack([x, m.f(x)]), 0, out=torch.empty_like(x)), "out="),
    "in frequencies": (in_frequencies, "rfft(x"),
    "as complex numbers": (lambda m, x: torch.view_as_real(torch.complex(x, m.f(x))).sum(-1), "complex"),
    "maximum": (lambda m, x: torch.maximum(x, m.f(x)), "maximum"),
    "a flipped skip": (lambda m, x: x.flip(-1) + m.f(x), "flip"),
    "a skip moved along": (lambda m, x: x.roll(1, 1) + m.f(x), "roll"),
    "a padded skip": (lambda m, x: F.pad(x[..., :4], (0, 4)) + m.f(x), "F.pad"),
    "a permuted skip": (lambda m, x: x[..., torch.randperm(WIDTH)] + m.f(x), "randperm"),
    "a pooled skip": (lambda m, x: F.avg_pool1d(x, 3, 1, 1) + m.f(x), "avg_pool1d"),
    "a token of its own, added to all": (first_token_to_all, "+ z[:, :1]"),
    "packed, scaled and unpacked": (packed_and_scaled, "stream + branch"),
    "packed, masked and unpacked": (packed_and_masked, "both[0] + both[1]"),
    "packed, squashed and unpacked": (packed_and_halved, "0.5 * both"),
}


def written(spelling: str, loops: int, beside: bool, **parts: Any) -> Stepped:
    step = SPELLINGS[spelling][0]
    steps: Step = (lambda m, x: step(m, x + m.g(x))) if beside else step
    return Stepped(steps, loops, w=nn.Parameter(torch.zeros(2)), **parts)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a plain one"])
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_branch_in_a_spelling_that_cannot_be_scaled_is_refused_at_its_line(
    spelling: str, loops: int, beside: bool
) -> None:
    with torch.set_grad_enabled("out=" not in spelling):
        message = refusal(written(spelling, loops, beside), SPELLINGS[spelling][1])
    assert "looptransfer.residual(…" in message


def unpacked(m: Any, x: Tensor) -> Tensor:
    stream, branch = torch.cat([x, m.f(x)], -1).chunk(2, -1)
    return stream + branch


def by_number(m: Any, x: Tensor) -> Tensor:
    both = torch.stack([x, m.f(x)])
    return both[0] + both[1]


def from_a_buffer(m: Any, x: Tensor) -> Tensor:
    both = x.new_empty(2, *x.shape)
    both[0], both[1] = x, m.f(x)
    return both[0] + both[1]


def some_features(m: Any, x: Tensor) -> Tensor:
    z = x.clone()
    z[..., :4] += m.f(x)[..., :4]
    return z


FOLLOWED: dict[str, Step] = {
    "packed and unpacked": unpacked,
    "stacked and taken by number": by_number,
    "stacked and unbound": lambda m, x: sum(torch.stack([x, m.f(x)], 2).unbind(2)),  # type: ignore[arg-type, return-value]
    "kept in a buffer": from_a_buffer,
    "some features": some_features,
    "some features, side by side": lambda m, x: torch.cat([x[..., :4] + m.f(x)[..., :4], x[..., 4:]], -1),
    "vmap": lambda m, x: torch.vmap(torch.add)(x, m.f(x)),
    "where": lambda m, x: torch.where(x > 0, x, x + m.f(x)),
    "times one": lambda m, x: 1.0 * x + m.f(x),
}


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("spelling", FOLLOWED)
def test_a_branch_in_a_spelling_that_the_trace_follows_is_scaled(spelling: str, loops: int) -> None:
    step = FOLLOWED[spelling]
    model = Stepped(lambda m, x: step(m, x + m.g(x)), loops)
    plan = planned(model)
    assert {str(b.handle): b.visits for b in plan.branches} == {"g": loops, "f": loops}
    assert plan.caveats == ()


class LearnedStart(nn.Module):
    """A state of learned numbers that is spread over the batch by its first addition."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.read, self.f, self.expanded = nn.Parameter(torch.randn(4, WIDTH)), mlp(), mlp(), expanded

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand_as(x) if self.expanded else self.start
        h = h + self.read(torch.tanh(h) * x)
        for _ in range(3):
            h = h + self.f(h)
        return h


def test_a_learned_start_that_is_spread_over_the_batch_is_a_stream() -> None:
    assert visits(LearnedStart(expanded=True)) == {"read": 1, "f": 3}
    assert visits(LearnedStart(expanded=False)) == {"read": 1, "f": 3}


def sum_and_norm(y: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + y
    return F.rms_norm(total, (total.shape[-1],), gain), total


def add_into(y: Tensor, residual: Tensor) -> None:
    residual.add_(y)


sum_and_norm_kernel = torch.library.custom_op("looptransfer_tests::sum_and_norm", mutates_args=())(sum_and_norm)
add_into_kernel = torch.library.custom_op("looptransfer_tests::add_into", mutates_args=("residual",))(add_into)


def fused(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(x)
    return sum_and_norm_kernel(m.g(x), x, m.gain)[1]  # type: ignore[no-any-return]


def fused_in_place(m: Any, x: Tensor) -> Tensor:
    x = x + m.f(x)
    y = m.g(x)
    add_into_kernel(y, x)
    return x


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize(("step", "text"), [(fused, "sum_and_norm_kernel("), (fused_in_place, "add_into_kernel(")])
def test_a_kernel_that_adds_and_hands_back_several_results_or_none_is_refused(
    step: Step, text: str, loops: int
) -> None:
    with torch.no_grad():
        refusal(Stepped(step, loops, gain=nn.Parameter(torch.ones(WIDTH))), text)


# -- a skip around a loop


def gated(m: Any, h: Tensor) -> Tensor:
    keep = torch.sigmoid(m.gate(h))
    return keep * h + (1 - keep) * m.f(h)


LOOPS: dict[str, tuple[Step, str]] = {
    "a GRU": (lambda m, h: m.cell(m.f(h).flatten(0, 1), h.flatten(0, 1)).view_as(h), "gru_cell"),
    "a gate": (gated, "(1 - keep)"),
    "a highway": (lambda m, h: h * torch.sigmoid(m.gate(h)) + m.f(h), "m.gate(h)"),
    "lerp": (lambda m, h: h.lerp(m.f(h), 0.2), "h.lerp"),
    "DeepNorm": (lambda m, h: m.norm(2 * h + m.f(h)), "2 * h"),
    "addcmul": (lambda m, h: h.addcmul(m.f(h), torch.ones_like(h)), "addcmul"),
    "a sum of a stack": (lambda m, h: torch.stack((h, m.f(h)), 2).sum(2), ".sum(2)"),
    "_foreach_add": (lambda m, h: torch._foreach_add([h], [m.f(h)])[0], "_foreach_add"),
}


class Around(nn.Module):
    """x + tail(loop(x))."""

    def __init__(self, step: Step, tail: nn.Module) -> None:
        super().__init__()
        norm, cell, gate = nn.LayerNorm(WIDTH), nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.loop, self.tail = Stepped(step, 4, norm=norm, cell=cell, gate=gate), tail

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.tail(self.loop(x))
        return out


@pytest.mark.parametrize("loop", LOOPS)
def test_a_skip_around_a_loop_hides_no_loop(loop: str) -> None:
    step, text = LOOPS[loop]
    assert "in a loop inside the branch" in refusal(Around(step, nn.Linear(WIDTH, WIDTH)), text)


def test_a_skip_around_a_loop_of_plain_steps_is_a_branch_of_its_own() -> None:
    assert visits(Around(lambda m, h: h + m.f(h), nn.Linear(WIDTH, WIDTH))) == {"loop.f": 4, "tail": 1}


# -- what is no branch


class ReadOut(nn.Module):
    """Layers, and a read-out of all their states before another layer."""

    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.coda, self.halt, self.read = Residual(), Residual(), nn.Linear(WIDTH, 1), read

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for _ in range(3):
            x = self.body(x)
            states.append(x)
        weights = torch.stack([torch.sigmoid(self.halt(state)) for state in states]).softmax(0)
        out: Tensor = self.coda(self.read(states, weights))
        return out


@pytest.mark.parametrize(
    "read",
    [
        lambda states, weights: torch.stack(states).sum(0),
        lambda states, weights: torch.stack(states, -1).mean(-1),
        lambda states, weights: (torch.stack(states) * weights).sum(0),
        lambda states, weights: sum(state * weight for state, weight in zip(states, weights, strict=True)),
        lambda states, weights: torch.einsum("nbtd,nbtk->btd", torch.stack(states), weights),
    ],
    ids=["sum", "mean", "halting average", "halting average by hand", "halting average in an einsum"],
)
def test_a_read_out_of_all_states_is_no_branch(read: Callable[..., Tensor]) -> None:
    assert visits(ReadOut(read)) == {"body.f": 3, "coda.f": 1}


class HyperConnections(nn.Module):
    """Two streams that learned numbers mix before every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(2))
        self.mix, self.give = nn.Parameter(torch.rand(2, 2, 2)), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([x, x], -2)
        for i, layer in enumerate(self.layers):
            out = self.give[i, :, None] * layer(h.sum(-2))[..., None, :]
            h = torch.einsum("kj,btjd->btkd", self.mix[i], h) + out
        return h.sum(-2)


def test_hyper_connections_are_refused_by_name() -> None:
    assert "hyper-connections" in refusal(HyperConnections(), "+ out")


def test_a_mark_settles_what_is_refused() -> None:
    model = Stepped(lambda m, x: torch.stack([x, lt.residual(m.f(x))]).mean(0) * 2, 3).double()
    plain = Stepped(lambda m, x: x + m.f(x) / 3, 3).double()
    assert visits(model) == {":branch": 3}
    torch.testing.assert_close(model(X), plain(X), rtol=1e-12, atol=1e-12)


def test_a_head_and_an_adapter_that_all_data_goes_through_are_no_branches() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        x = m.adapter(torch.cat([x, m.start(x)], -1))
        return x + m.f(x)

    model = Stepped(step, 3, adapter=nn.Linear(2 * WIDTH, WIDTH), start=nn.Identity())
    plan = lt.parametrize(nn.Sequential(nn.Linear(5, WIDTH), model, nn.Linear(WIDTH, 3)).double(), inputs(2, 5))
    assert [(str(b.handle), b.visits) for b in plan.branches] == [("1.f", 3)]
    assert plan.on_stream == {"1.adapter.weight": 3, "1.adapter.bias": 3}
