"""The rewritten model against the same model with ε written into it: outputs, and three steps of AdamW."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from tests.models import WIDTH, inputs, mlp, noisy, tokens
from tests.rewrite.answers import Stepped, X, refusal

Memory = Any  # what earlier layers left for later ones


class Layer(nn.Module):
    """Attention and MLP; `kind` says what is added or handed in inside the branches. ε is 1, or written in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.epsilon = kind, 1.0
        self.n1, self.n2, self.own, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), mlp(), mlp()
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"})
        self.table, self.gate, self.mix = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 1), nn.Parameter(torch.tensor(0.4))
        self.ada, self.values = nn.Linear(WIDTH, 3 * WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, ids: Tensor, side: Tensor, memory: Memory, visit: int) -> tuple[Tensor, Memory]:
        a, h = self.attn, self.n1(x)
        q, k, v = a["q"](h), a["k"](h), a["v"](h)
        shift = scale = gate = x.new_zeros(())
        if self.kind == "value residual":
            v, memory = (v, v) if memory is None else (v + memory, memory)
        elif self.kind == "mixed value residual":
            v, memory = (v, v) if memory is None else ((1 - self.mix) * v + self.mix * memory, memory)
        elif self.kind == "running keys":
            k = memory = k if memory is None else k + memory
        elif self.kind == "value embedding":
            v = v + torch.sigmoid(self.gate(h)) * self.table(ids)
        elif self.kind == "query positions":
            q = q + side
        elif self.kind == "keys and values of a context":
            k, v = a["k"](side), a["v"](side)
        elif self.kind == "a value map for each depth":
            v = self.values[visit](side)
        elif self.kind == "adaLN":
            shift, scale, gate = self.ada(F.silu(side.mean(1, keepdim=True))).chunk(3, -1)
        out = a["o"](F.scaled_dot_product_attention(q * (1 + scale) + shift, k, v))
        x = x + self.epsilon * (1 + gate) * out
        return x + self.epsilon * self.mlp(self.n2(x)), memory


class Stack(nn.Module):
    def __init__(self, kind: str, layers: int, loops: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.side, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 11)
        self.layers, self.loops = nn.ModuleList(Layer(kind) for _ in range(layers)), loops

    def forward(self, ids: Tensor) -> Tensor:
        x, memory = self.embed(ids), None
        side = self.side(x.detach())
        for visit in range(self.loops):
            for layer in self.layers:
                x, memory = layer(x, ids, side, memory, visit)
        logits: Tensor = self.head(x)
        return logits


INSIDE = ("value residual", "mixed value residual", "running keys", "value embedding", "query positions")
BESIDE = ("keys and values of a context", "a value map for each depth", "adaLN")
IDS = tokens()


def written(kind: str, layers: int, loops: int, rewrite: bool) -> Any:
    """A model that is rewritten, or the same one with ε in its forward."""
    model = noisy(Stack(kind, layers, loops), std=0.1)
    if rewrite:
        plan = lt.parametrize(model, IDS)
        assert (plan.layers, plan.loops, len(plan.branches)) == (layers, loops, 2 * layers)
    for layer in model.layers if not rewrite else []:
        layer.epsilon = 1 / loops / math.sqrt(layers)
    return model


@pytest.mark.parametrize(("layers", "loops"), [(1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("kind", INSIDE + BESIDE)
def test_what_is_added_inside_a_branch_gets_no_epsilon_of_its_own(kind: str, layers: int, loops: int) -> None:
    ours, theirs = (written(kind, layers, loops, rewrite) for rewrite in (True, False))
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-11, atol=1e-11)
    lt.verify(ours, IDS)


def by_hand(model: nn.Module, layers: int) -> list[dict[str, Any]]:
    """What acts through branches alone: all but embedding and head."""
    ends = [p for name, p in model.named_parameters() if name.startswith(("embed.", "head."))]
    inside = [p for name, p in model.named_parameters() if not name.startswith(("embed.", "head."))]
    factor = layers**-0.5
    return [{"params": ends}, {"params": inside, "lr": 0.01 * factor, "eps": 1e-8 * factor}]


@pytest.mark.parametrize("kind", INSIDE + BESIDE)
def test_three_steps_of_adamw_are_those_of_a_model_written_by_hand(kind: str) -> None:
    ours, theirs = (written(kind, 2, 2, rewrite) for rewrite in (True, False))
    optimizers = [
        torch.optim.AdamW(lt.param_groups(ours, torch.optim.AdamW, lr=0.01), weight_decay=0.0),
        torch.optim.AdamW(by_hand(theirs, 2), lr=0.01, weight_decay=0.0),
    ]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
            optimizer.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, msg=name)


class Latents(nn.Module):
    """Learned latents read the input, which they see through branches alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.latents, self.embed, self.norm = nn.Parameter(torch.randn(1, 3, WIDTH)), mlp(), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.latents.expand(len(x), -1, -1), self.embed(x)
        for _ in range(3):
            h = h + self.o(F.scaled_dot_product_attention(self.q(self.norm(h)), self.k(x), self.v(x)))
        return self.head(h)  # type: ignore[no-any-return]


class HiddenOnTheStream(nn.Module):
    """A step count rides along in a feature of its own, and is cut off before the head; the branches read it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.extra, self.head = (nn.Linear(*size) for size in ((5, WIDTH - 2), (5, 2), (WIDTH - 2, 3)))
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.embed(x), self.extra(x)], -1)
        for _ in range(3):
            h = h + self.f(h)
        return self.head(h[..., : WIDTH - 2])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "example", "outside"),
    [(Latents, X, {"latents", "head"}), (HiddenOnTheStream, inputs(2, 4, 5), {"embed", "head"})],
)
def test_what_has_no_effect_at_epsilon_zero_is_in_the_branches(
    make: Callable[[], nn.Module], example: Tensor, outside: set[str]
) -> None:
    model = make().double()
    plan = lt.parametrize(model, example)
    inside = {name for branch in plan.branches for name in branch.parameters}
    assert {name.split(".")[0] for name, _ in model.named_parameters() if name not in inside} == outside


# -- loops that end by values


def until_large(m: Any, x: Tensor) -> Tensor:
    while float(x.detach().norm()) < m.enough:
        x = x + m.f(x)
    return x


def until_near(m: Any, x: Tensor) -> Tensor:
    gap = m.enough
    while gap > 0.1:
        x, before = x + m.f(x), x
        gap = min(gap, (x - before).detach().norm().tolist())
    return x


@pytest.mark.parametrize("loop", [until_large, until_near])
def test_a_loop_that_other_weights_never_end_is_refused_at_the_line_that_reads_values(loop: Any) -> None:
    model = Stepped(loop, 1)
    model.enough = 40.0
    with torch.no_grad():
        model.f[3].weight.mul_(0.001 if loop is until_near else 1.0)
        model.f[3].bias.zero_()
    message = refusal(model, "float(" if loop is until_large else "m.f(x)")
    assert "does not come to its end: it still runs after" in message
    assert "let a number of loops end it too" in message


def test_a_loop_that_a_cap_ends_where_values_do_not_is_scaled() -> None:
    def capped(m: Any, x: Tensor) -> Tensor:
        for _ in range(300):
            if float(x.detach().norm()) > m.enough:
                break
            x = x + m.f(x)
        return x

    model = Stepped(capped, 1).double()
    model.enough = float(X.norm()) + 4
    plan = lt.parametrize(model, X)
    assert 1 < plan.branches[0].visits < 300
