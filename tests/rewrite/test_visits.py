"""N counts visits that reach the output, in chains of branches that most of their learned numbers tie."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import looptransfer as lt
from tests.models import WIDTH, inputs, mlp
from tests.rewrite.answers import Residual, Stepped, X, planned, refusal, visits

# -- ties


def weights(count: int = 3) -> Tensor:
    return torch.randn(count, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / 3


class Bank(nn.Module):
    """Layers that apply matrices of a bank; `pick(model, i)` is that of layer i."""

    def __init__(self, pick: Callable[[Any, int], Tensor], loops: int) -> None:
        super().__init__()
        self.stacked = nn.Parameter(weights())
        self.apart = nn.ParameterList(nn.Parameter(matrix) for matrix in weights())
        self.pick, self.loops = pick, loops

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for i in range(3):
                x = x + lt.residual(x.tanh() @ self.pick(self, i))
        return x


def one_hot(i: int) -> Tensor:
    return F.one_hot(torch.tensor(i), 3).double()


PICKS: dict[str, tuple[Callable[[Any, int], Tensor], int]] = {  # and the layers that there are
    "a list": (lambda m, i: m.apart[i], 3),
    "a slice": (lambda m, i: m.stacked[i], 3),
    "by index": (lambda m, i: m.stacked.index_select(0, torch.tensor([i]))[0], 3),
    "by an index that is a tensor": (lambda m, i: m.stacked[torch.tensor(i)], 3),
    "one-hot": (lambda m, i: torch.einsum("k,kij->ij", one_hot(i), m.stacked), 3),
    "by a mask": (lambda m, i: (one_hot(i)[:, None, None] * m.stacked).sum(0), 3),
    "unbound": (lambda m, i: m.stacked.unbind(0)[i], 3),
    "stacked from a list": (lambda m, i: torch.stack(list(m.apart))[i], 3),
    "the same slice again": (lambda m, i: m.stacked[0], 1),
    "the same one of a list": (lambda m, i: m.apart[1], 1),
    "all, in a mean": (lambda m, i: m.stacked.mean(0), 1),
}


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("pick", PICKS)
def test_matrices_of_a_bank_are_tied_where_the_same_numbers_act(pick: str, loops: int) -> None:
    read, layers = PICKS[pick]
    plan = planned(Bank(read, loops))
    assert (plan.loops, plan.layers) == (3 * loops / layers, layers)


class Skeleton(nn.Module):
    """One module runs with the weights of each layer in turn; `adds` says whether it holds the residual add."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.adds = nn.ModuleList(Residual() if adds else Residual().f for _ in range(3)), adds

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = functional_call(self.layers[0], dict(layer.named_parameters()), (x,))
            x = out if self.adds else x + lt.residual(out)
        return x


def test_one_module_run_with_many_weights_is_not_tied() -> None:
    plan = planned(Skeleton(adds=False))
    assert [(str(b.handle), b.visits) for b in plan.branches] == [(":branch", 1)]
    assert plan.layers == 3
    assert "layers.2.3.weight" in plan.branches[0].parameters
    assert "not the output of a module of its own" in refusal(Skeleton(adds=True), "return x + self.f(x)")


def tied(how: str) -> nn.Module:
    model = nn.Sequential(*(Residual() for _ in range(3)))
    for layer in model[1:]:
        for old, new in zip(model[0].parameters(), layer.parameters(), strict=True):
            if how in {"data", "a view"}:
                new.data = old.data if how == "data" else old.data.flatten().view_as(old)
        if how == "parameters":
            layer.f[1].weight, layer.f[3].weight = model[0].f[1].weight, model[0].f[3].weight
    return model


@pytest.mark.parametrize("how", ["data", "a view"])
def test_two_parameters_in_one_memory_are_refused_by_their_names(how: str) -> None:
    with pytest.raises(lt.InputError, match=r"1\.f\..*weight and 0\.f\..*weight are two parameters in one memory"):
        lt.parametrize(tied(how), X.float())


def test_parameters_that_are_one_are_tied_and_those_in_one_flat_memory_are_not() -> None:
    assert visits(tied("parameters")) == {"0.f": 3, "1.f": 3, "2.f": 3}
    flat = tied("not at all").double()
    memory, start = torch.randn(sum(p.numel() for p in flat.parameters()), dtype=torch.float64), 0
    for parameter in flat.parameters():
        end = start + parameter.numel()
        parameter.data, start = memory[start:end].view_as(parameter), end
    assert set(visits(flat).values()) == {1}


class Shared(nn.Module):
    """Layers of their own around one part: a projection of the positions, a router, or a whole block."""

    def __init__(self, part: nn.Module, use: Callable[[nn.Module, nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.part, self.use = part, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.part, self.own, F.layer_norm(x, (WIDTH,)))


def projected(part: nn.Module, own: nn.ModuleList, x: Tensor) -> Tensor:
    query, keys = own[0](x), part(own[1](x).transpose(1, 2)).transpose(1, 2)
    return own[2]((query @ keys.transpose(1, 2)).softmax(-1) @ keys)  # type: ignore[no-any-return]


def routed(part: nn.Module, own: nn.ModuleList, x: Tensor) -> Tensor:
    gates = part(x).softmax(-1)
    return sum(gates[..., i, None] * expert(x) for i, expert in enumerate(own))  # type: ignore[return-value]


def around(part: nn.Module, own: nn.ModuleList, x: Tensor) -> Tensor:
    return own[2](part(own[1](own[0](x))).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("use", "part"),
    [(projected, (5, 3)), (routed, (WIDTH, 3)), (around, (WIDTH, WIDTH))],
    ids=["projection", "router", "matrix"],
)
def test_a_small_part_that_untied_layers_share_does_not_tie_them_and_is_named(use: Any, part: tuple[int, int]) -> None:
    shared = nn.Linear(*part, bias=False)
    plan = planned(nn.Sequential(*(Wrapped(Shared(shared, use)) for _ in range(3))), inputs(2, 5, WIDTH))
    assert ({b.visits for b in plan.branches}, plan.layers) == ({1}, 3)
    assert any(caveat.startswith("shared in part: 0.f.part.weight") for caveat in plan.caveats)


class Wrapped(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)  # type: ignore[no-any-return]


# -- visits that count


class Solver(nn.Module):
    """A block in a loop, whose forward a test writes."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.halt, self.run = Residual(), nn.Sequential(nn.Linear(WIDTH, 1), nn.Sigmoid()), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def with_a_look(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.block(x)
        m.gap = float((m.block(x) - x).detach().norm())
    return x


def with_a_hook(m: Any, x: Tensor) -> Tensor:
    x = m.block(m.block(x))
    again = x.detach().requires_grad_()
    with torch.enable_grad():
        step = m.block(again)
    if x.requires_grad:
        x.register_hook(lambda grad: grad + torch.autograd.grad(step, again, grad, retain_graph=True)[0])
    return x


def until_still(m: Any, x: Tensor) -> Tensor:
    for _ in range(5):
        after = m.block(x)
        if torch.allclose(after, x):
            break
        x = after
    return x


def with_a_look_handed_back(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(3):
        x = m.block(x)
    return x, (m.block(x) - x).detach().norm(dim=-1)


def with_a_look_without_gradients(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(3):
        x = m.block(x)
    with torch.no_grad():
        return x, (m.block(x) - x).norm(dim=-1)


def in_two_halves(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        first = m.block(m.block(x))
    return m.block(m.block(first)), first


@pytest.mark.parametrize(
    ("run", "count"),
    [
        (with_a_look, 3),
        (with_a_look_handed_back, 3),
        (with_a_look_without_gradients, 3),
        (with_a_hook, 2),
        (until_still, 5),
        (in_two_halves, 4),
    ],
)
def test_visits_that_do_not_reach_the_output_do_not_count(run: Any, count: int) -> None:
    assert visits(Solver(run)) == {"block.f": count}


def summed_scores(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, out = x.new_zeros(2, 4, 1), torch.zeros_like(x)
    for _ in range(4):
        x = m.block(x)
        score = m.halt(x)
        scores, out = scores + score, out + score * x
    return out / scores, scores


def remaining_probability(m: Any, x: Tensor) -> Tensor:
    left, out = x.new_ones(2, 4, 1), torch.zeros_like(x)
    for _ in range(4):
        x = m.block(x)
        score = m.halt(x)
        out, left = out + left * score * x, left * (1 - score)
    return out + left * x


def frozen_tokens(m: Any, x: Tensor) -> Tensor:
    scores = x.new_zeros(2, 4, 1)
    for _ in range(4):
        x = torch.where(scores < 0.99, m.block(x), x)
        scores = scores + (1 - scores) * m.halt(x)
    return x


def steps_and_scores(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = steps = x.new_zeros(2, 4, 1)
    for _ in range(4):
        x = m.block(x)
        scores, steps = scores + m.halt(x), steps + (scores < 0.99)
    return x, steps + scores


def ponder_cost(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    cost = x.new_zeros(())
    for _ in range(4):
        x = m.block(x)
        cost = cost + m.halt(x).mean()
    return x, cost


@pytest.mark.parametrize("run", [summed_scores, remaining_probability, frozen_tokens, steps_and_scores, ponder_cost])
def test_a_halting_score_is_no_stream(run: Any) -> None:
    model = Solver(run).double()
    before = model.halt(X)
    plan = planned(model)
    assert [(str(b.handle), b.visits) for b in plan.branches] == [("block.f", 4)]
    assert plan.layers == 1
    assert torch.equal(model.halt(X), before)


# -- parts of one memory


def by_rows(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    for i in range(len(x)):
        x[i] += m.f(x[i])
    return x


def by_windows(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    for i in (0, 2):
        x[:, i : i + 2].add_(m.f(x[:, i : i + 2]))
    return x


def by_copies(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    for i in range(x.shape[1]):
        x[:, i].copy_(x[:, i] + m.f(x[:, i]))
    return x


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("step", [by_rows, by_windows, by_copies])
def test_slices_that_are_updated_in_place_are_no_streams_of_their_own(step: Any, loops: int) -> None:
    assert visits(Stepped(step, loops)) == {"f": loops}


def one_after_the_other(put: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Each column is updated in its turn, and `put` puts it into the others."""

    def step(m: Any, x: Tensor) -> Tensor:
        for i in range(x.shape[1]):
            x = put(x, x[:, i] + m.f(x[:, i]), i)
        return x

    return step


COLUMNS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "select_scatter": lambda x, y, i: torch.select_scatter(x, y, 1, i),
    "slice_scatter": lambda x, y, i: torch.slice_scatter(x, y[:, None], 1, i, i + 1),
    "scatter": lambda x, y, i: x.scatter(1, torch.full((2, 1, WIDTH), i), y[:, None]),
    "index_copy": lambda x, y, i: x.index_copy(1, torch.tensor([i]), y[:, None]),
    "where": lambda x, y, i: torch.where((torch.arange(4) == i)[:, None], y[:, None], x),
    "cat": lambda x, y, i: torch.cat([x[:, :i], y[:, None], x[:, i + 1 :]], 1),
    "stack": lambda x, y, i: torch.stack([y if i == k else x[:, k] for k in range(4)], 1),
}


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("put", COLUMNS)
def test_parts_that_are_put_together_are_no_chain(put: str, loops: int) -> None:
    assert visits(Stepped(one_after_the_other(COLUMNS[put]), loops)) == {"f": loops}


@pytest.mark.parametrize("loops", [1, 3])
def test_branches_that_are_padded_to_the_stream_are_no_chain_where_they_do_not_overlap(loops: int) -> None:
    def step(m: Any, x: Tensor, size: int) -> Tensor:
        for i in range(3):
            x = x + F.pad(m.f(x[:, i : i + size]), (0, 0, i, 4 - size - i))
        return x

    assert visits(Stepped(step, loops), (X, 1)) == {"f": loops}
    assert visits(Stepped(step, loops), (X, 2)) == {"f": 2 * loops + 1}  # the next begins when the last but one is done


def test_parts_that_overlap_are_a_chain() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        for i in range(2):
            x = torch.slice_scatter(x, x[:, i : i + 3] + m.f(x[:, i : i + 3]), 1, i, i + 3)
        return x

    assert visits(Stepped(step, 3)) == {"f": 6}


# -- sums


class InOneSum(nn.Module):
    """Beside a map that all visits share, each has one of its own; `spell` adds the stream and both."""

    def __init__(self, own: Callable[[], nn.Module], spell: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.own = mlp(), nn.ModuleList(own() for _ in range(4))
        self.spell = spell

    def forward(self, x: Tensor, factors: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        for own in self.own:
            h = F.layer_norm(x, (WIDTH,))
            x = self.spell(x, factors[0] * self.shared(h), factors[1] * own(h))
        return x


class InOneSumOfBlocks(InOneSum):
    """The same with a block for each visit, which holds the shared map."""

    def __init__(self, own: Callable[[], nn.Module], spell: Callable[..., Tensor]) -> None:
        super().__init__(own, spell)
        self.blocks = nn.ModuleList(Block(self.shared, module, spell) for module in self.own)
        del self.shared, self.own

    def forward(self, x: Tensor, factors: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        for block in self.blocks:
            x = block(x, factors)
        return x


class Block(nn.Module):
    def __init__(self, shared: nn.Module, own: nn.Module, spell: Callable[..., Tensor]) -> None:
        super().__init__()
        self.shared, self.own, self.spell = shared, own, spell

    def forward(self, x: Tensor, factors: tuple[float, float]) -> Tensor:
        h = F.layer_norm(x, (WIDTH,))
        return self.spell(x, factors[0] * self.shared(h), factors[1] * self.own(h))


SUMS: dict[str, Callable[..., Tensor]] = {
    "one after the other": lambda x, a, b: x + a + b,
    "the other way round": lambda x, a, b: x + b + a,
    "in parentheses": lambda x, a, b: x + (a + b),
    "in place": lambda x, a, b: x.clone().add_(a).add_(b),
    "stacked": lambda x, a, b: x + torch.stack([a, b]).sum(0),
}


@pytest.mark.parametrize("make", [InOneSum, InOneSumOfBlocks])
@pytest.mark.parametrize("spell", SUMS)
@pytest.mark.parametrize(
    ("own", "visited", "layers"),
    [
        (lambda: nn.Sequential(mlp(), mlp()), (4, 1), 4),  # most is a visit's own: as many layers, which share a map
        (lambda: nn.Linear(WIDTH, WIDTH), (4, 4), 1),  # an adapter goes with what it adapts
    ],
    ids=["large", "small"],
)
def test_what_is_added_in_one_sum_is_visited_equally_often_however_its_parentheses_are_put(
    own: Callable[[], nn.Module], visited: tuple[int, int], layers: int, spell: str, make: type[InOneSum]
) -> None:
    model = make(own, SUMS[spell]).double()
    factors = tuple(1 / (n * layers**0.5) for n in visited)
    expected = model(X, factors)
    plan = planned(model)
    assert plan.layers == layers
    seen = {("shared" if "shared" in branch.module else "own", branch.visits) for branch in plan.branches}
    assert seen == {("shared", visited[0]), ("own", visited[1])}
    assert torch.allclose(model(X), expected, rtol=1e-10)


def test_a_map_that_stands_twice_in_one_sum_is_visited_twice() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return x + m.f(x) + m.f(x.flip(1))

    assert visits(Stepped(step, 3)) == {"f": 6}


# -- marks


@pytest.mark.parametrize("name", ["branch", "after"])
def test_two_marks_of_one_name_that_are_visited_differently_often_are_refused(name: str) -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + lt.residual(m.f(x))
        return x + lt.residual(m.g(x), name)

    if name == "branch":
        assert "visited 2 times at" in refusal(Stepped(step, 2), "residual(m.")
    else:
        assert visits(Stepped(step, 2)) == {":branch": 6, ":after": 2}
