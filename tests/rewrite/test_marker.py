import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import looptransfer as lt
from tests import models
from tests.models import WIDTH, Looped, inputs, noisy
from tests.rewrite.answers import Residual, Stepped, planned, refusal, visits

X = inputs(2, 4, WIDTH)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)


class Inline(nn.Module):
    """h + relu(h)·W in the model's own forward: no module hands the branch over."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.loops, self.weight = loops, matrix()

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = h + lt.residual(F.relu(h) @ self.weight)
        return h


def inline_oracle(model: Any, h: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        h = h + epsilon * (F.relu(h) @ model.weight)
    return h


class InlineBlock(nn.Module):
    """Two inline branches under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.up, self.down = nn.LayerNorm(WIDTH), matrix(), nn.Linear(WIDTH, 16), matrix()
        self.down = nn.Parameter(torch.randn(16, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + lt.residual(torch.tanh(self.norm(x)) @ self.mix, "mix")
        return x + lt.residual(F.gelu(self.up(x)) @ self.down, name="mlp")


def block_oracle(model: Any, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * (torch.tanh(block.norm(x)) @ block.mix)
            x = x + epsilon * (F.gelu(block.up(x)) @ block.down)
    return x


def inline(loops: int = 3) -> Inline:
    torch.manual_seed(0)
    return Inline(loops).double()


def blocks(count: int = 2, loops: int = 3) -> Looped:
    torch.manual_seed(0)
    return noisy(Looped([InlineBlock() for _ in range(count)], loops), std=0.1)  # type: ignore[return-value]


def rewritten(model: Any) -> Any:
    lt.parametrize(model, X)
    return model


# -- what a mark does


def test_a_mark_is_the_identity_until_the_model_is_rewritten() -> None:
    assert lt.residual(X) is X
    assert lt.residual(X, name="mlp") is X
    model = inline()
    assert torch.equal(model(X), inline_oracle(model, X, 1.0))
    rewritten(inline())
    assert lt.residual(X) is X
    assert torch.equal(model(X), inline_oracle(model, X, 1.0))
    model(X).sum().backward()


def test_an_inline_branch_is_refused_without_its_mark_and_the_refusal_names_it() -> None:
    with pytest.raises(lt.InputError, match=r"Mark it there: x \+ looptransfer\.residual\(…, 'name'\)"):
        lt.parametrize(models.FunctionalBranch(), X.float())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("loops", [1, 2, 5])
def test_a_marked_inline_branch_gets_its_epsilon(loops: int, training: bool) -> None:
    model = inline(loops).train(training)
    (branch,) = lt.parametrize(model, X, lam=0.7).branches
    assert (str(branch.handle), branch.visits) == (":branch", loops)
    assert branch.multiplier == pytest.approx(0.7 / loops)
    torch.testing.assert_close(model(X), inline_oracle(model, X, 0.7 / loops), rtol=1e-12, atol=1e-12)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(count=st.integers(1, 3), loops=st.integers(1, 4), lam=st.floats(0.1, 10))
def test_two_names_in_one_forward_are_two_branches(count: int, loops: int, lam: float) -> None:
    model = blocks(count, loops)
    plan = lt.parametrize(model, X, lam=lam)
    assert (plan.loops, plan.layers) == (loops, count)
    assert [str(branch.handle) for branch in plan.branches] == [
        f"blocks.{index}:{name}" for index in range(count) for name in ("mix", "mlp")
    ]
    expected = block_oracle(model, X, lam / (loops * count**0.5))
    torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)


def test_one_name_for_two_branches_is_one_multiplier() -> None:
    class Careless(InlineBlock):
        def forward(self, x: Tensor) -> Tensor:
            x = x + lt.residual(torch.tanh(self.norm(x)) @ self.mix)
            return x + lt.residual(F.gelu(self.up(x)) @ self.down)

    torch.manual_seed(0)
    model = noisy(Looped([Careless()]), std=0.1)
    (branch,) = lt.parametrize(model, X).branches
    assert branch.visits == 3  # each matrix acts three times
    torch.testing.assert_close(model(X), block_oracle(model, X, 1 / 3), rtol=1e-12, atol=1e-12)


def test_a_mark_and_a_module_in_one_model_are_counted_alike() -> None:
    class Mixed(InlineBlock):
        """One branch marked, one handed over by a module."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp = models.mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = x + lt.residual(torch.tanh(self.norm(x)) @ self.mix, "mix")
            return x + self.mlp(x)

    torch.manual_seed(0)
    plan = lt.parametrize(noisy(Looped([Mixed(), Mixed()]), std=0.1), X)
    assert [str(b.handle) for b in plan.branches] == ["blocks.0:mix", "blocks.0.mlp", "blocks.1:mix", "blocks.1.mlp"]
    assert (plan.loops, plan.layers) == (3, 2)


def test_marking_what_a_module_hands_over_changes_nothing_but_the_handle() -> None:
    class Marked(models.ResidualMLP):
        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.loops):
                h = h + lt.residual(self.f(h))
            return h

    torch.manual_seed(0)
    model = noisy(Marked(), std=0.1)
    plain = noisy(models.ResidualMLP(), std=0.1)
    plain.load_state_dict(model.state_dict())
    assert [str(b.handle) for b in lt.parametrize(model, X).branches] == [":branch"]
    lt.parametrize(plain, X)
    torch.testing.assert_close(model(X), plain(X), rtol=1e-12, atol=1e-12)


class TwoBranches(nn.Module):
    """Both are added in the model's own forward, marked or handed over by their modules."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.marked, self.a, self.b = marked, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for name in ("a", "b"):
                f = getattr(self, name)(x.tanh())
                x = x + (lt.residual(f, name) if self.marked else f)
        return x


def test_marks_in_the_models_own_forward_count_as_the_modules_there_do() -> None:
    plans = [lt.parametrize(TwoBranches(marked).double(), X) for marked in (False, True)]
    assert [plan.layers for plan in plans] == [2, 2]
    assert [b.multiplier for b in plans[1].branches] == [b.multiplier for b in plans[0].branches]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_untied_matrices_behind_one_mark_are_layers_of_their_own(count: int) -> None:
    class Matrices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(matrix() for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                for weight in self.weights:
                    x = x + lt.residual(F.relu(x) @ weight)
            return x

    plan = lt.parametrize(Matrices().double(), X)
    assert (plan.loops, plan.layers) == (3, count)


def test_a_mark_lets_a_scaled_skip_be_scaled() -> None:
    class Decayed(Inline):
        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.loops):
                h = 0.9 * h + lt.residual(F.relu(h) @ self.weight)
            return h

    torch.manual_seed(0)
    model = Decayed().double()
    plan = lt.parametrize(model, X)
    assert plan.loops == 3
    h = X
    for _ in range(3):
        h = 0.9 * h + (F.relu(h) @ model.weight) / 3
    torch.testing.assert_close(model(X), h, rtol=1e-12, atol=1e-12)


def test_a_mark_on_a_branch_that_feeds_something_else_too_scales_only_the_add() -> None:
    class Reused(models.ReusedBranch):
        def forward(self, h: Tensor) -> Tensor:
            penalty = torch.zeros((), dtype=h.dtype)
            for _ in range(2):
                out = self.f(h)
                penalty = penalty + out.pow(2).mean()
                h = h + lt.residual(out)
            return h * (1 + penalty)

    torch.manual_seed(0)
    model = Reused().double()
    rewritten(model)
    h, penalty = X, torch.zeros((), dtype=X.dtype)
    for _ in range(2):
        out = model.f(h)
        penalty = penalty + out.pow(2).mean()
        h = h + out / 2
    torch.testing.assert_close(model(X), h * (1 + penalty), rtol=1e-12, atol=1e-12)


def test_a_mark_inside_a_branch_must_not_have_the_name_of_the_mark_around_it() -> None:
    """Both marks bear the default name, and the inner one lies inside a branch."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x + lt.residual(self.second(x).tanh()))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + lt.residual(self.inner(x))
            return x

    torch.manual_seed(0)
    with pytest.raises(
        lt.InputError, match=r"mark inner:branch lies inside a branch .* has the name of :branch around"
    ):
        lt.parametrize(Outer().double(), X)


# -- marks inside branches


def marked(y: Tensor, name: str) -> Tensor:
    return lt.residual(y, name)


INSIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "before the activation": lambda m, x: m.f(torch.tanh(marked(m.g(x), "in"))),
    "a query": lambda m, x: m.f(F.scaled_dot_product_attention(marked(m.g(x), "in"), x, x)),
    "a gate": lambda m, x: m.f(x) * torch.sigmoid(marked(m.g(x), "in")),
    "a shift": lambda m, x: m.f(x * (1 + marked(m.g(x), "in"))),
    "a term": lambda m, x: m.f(torch.tanh(x.relu() + marked(m.g(x), "in"))),
}


@pytest.mark.parametrize("how", INSIDE)
def test_a_mark_inside_a_branch_is_left_alone_and_told(how: str) -> None:
    model = Stepped(lambda m, x: x + lt.residual(INSIDE[how](m, x), "out")).double()
    with pytest.warns(lt.ScalingWarning, match="marks left alone: :in lie inside branches"):
        assert visits(model, X) == {":out": 3}
    h = X
    for _ in range(3):
        h = h + INSIDE[how](model, h) / 3
    torch.testing.assert_close(model(X), h, rtol=1e-12, atol=1e-12)


def test_a_mark_inside_a_branch_and_alone_at_other_runs_is_refused() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return 0.9 * (x + m.f(torch.tanh(marked(m.g(x), "in")))) + marked(m.g(x), "in")

    assert "mark :in lies inside the branch" in refusal(Stepped(step), "torch.tanh", X)


@pytest.mark.parametrize("loops", [2, 3])
def test_a_marked_part_of_what_is_marked_too_is_refused_where_no_add_is_recognised(loops: int) -> None:
    model = Stepped(lambda m, x: 0.9 * x + marked(m.f(torch.tanh(marked(m.g(x), "in"))), "out"), loops).double()
    with pytest.raises(lt.InputError, match=r":in hands over is a part of the branch that :out .* count twice"):
        lt.parametrize(model, X)


@pytest.mark.parametrize("skip", [1.0, 0.9])  # with 0.9 the inner add is not recognised
def test_a_marked_stream_inside_a_branch_begins_anew_at_every_visit(skip: float) -> None:
    def branch(m: Any, h: Tensor, epsilon: float = 1.0) -> Tensor:
        for _ in range(4):
            h = skip * h + epsilon * marked(m.g(h), "in")
        return m.f(h)  # type: ignore[no-any-return]

    model = Stepped(lambda m, x: x + branch(m, m.norm(x)), norm=nn.LayerNorm(WIDTH)).double()
    plain = copy.deepcopy(model)
    plan = planned(model, X)
    assert {str(b.handle): b.visits for b in plan.branches} == {":in": 4, "f": 3}
    root, h = plan.layers**0.5, X
    for _ in range(3):
        h = h + branch(plain, plain.norm(h), 1 / (4 * root)) / (3 * root)  # type: ignore[operator, arg-type]
    torch.testing.assert_close(model(X), h, rtol=1e-12, atol=1e-12)


HANDED_ON: dict[str, Callable[[Tensor], Tensor]] = {"normed": lambda h: F.layer_norm(h, (WIDTH,)), "bare": lambda h: h}


@pytest.mark.parametrize("adds", [1, 2, 4])
@pytest.mark.parametrize("form", ["normed", "bare"])
def test_a_mark_on_a_branch_that_ends_in_residual_adds_of_its_own_is_scaled(form: str, adds: int) -> None:
    """The branch is h + f(h) and nothing learned comes after it: unmarked it counts as a long skip."""

    def branch(m: Any, x: Tensor, epsilon: float = 1.0) -> Tensor:
        h = m.norm(x)
        for _ in range(adds):
            h = h + epsilon * m.f(h)
        return HANDED_ON[form](h)

    model = Stepped(lambda m, x: x + lt.residual(branch(m, x), "out"), norm=nn.LayerNorm(WIDTH)).double()
    plain = copy.deepcopy(model)
    plan = planned(model, X)
    inner = {"f": adds} if adds > 1 else {}
    assert {str(b.handle): b.visits for b in plan.branches} == {**inner, ":out": 3}
    root, h = plan.layers**0.5, X
    for _ in range(3):
        h = h + branch(plain, h, 1 / (adds * root) if adds > 1 else 1.0) / (3 * root)
    torch.testing.assert_close(model(X), h, rtol=1e-12, atol=1e-12)


def test_marked_branches_without_matrices_of_their_own_are_tied_by_those_inside() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.f = nn.LayerNorm(WIDTH), models.mlp()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            for _ in range(4):
                h = h + self.f(h)
            return x + lt.residual(torch.tanh(h), "out")

    torch.manual_seed(0)
    plan = planned(Looped([Around(), Around()], 3), X)
    assert [b.visits for b in plan.branches] == [4, 3, 4, 3]
    assert plan.layers == 2


def test_a_mark_on_what_an_input_is_injected_into_leaves_the_injection_alone() -> None:
    class Injected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.f = nn.LayerNorm(WIDTH), Residual()

        def forward(self, x: Tensor) -> Tensor:
            h = x
            for _ in range(3):
                h = x + lt.residual(self.f(self.norm(h)), "again")
            return h

    torch.manual_seed(0)
    with pytest.warns(lt.ScalingWarning, match="marks left alone: :again"):
        assert visits(Injected(), X) == {"f.f": 3}


def test_a_mark_on_what_the_output_does_not_depend_on_is_passed_by() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        marked(m.g(x), "dead")
        return x + m.f(x)  # type: ignore[no-any-return]

    assert visits(Stepped(step), X) == {"f": 3}


def test_a_forward_that_fails_leaves_no_multiplier_behind() -> None:
    model = rewritten(inline())
    with pytest.raises(RuntimeError):
        model(torch.ones(2, WIDTH + 1, dtype=torch.float64))
    assert lt.residual(X) is X
    torch.testing.assert_close(model(X), inline_oracle(model, X, 1 / 3), rtol=1e-12, atol=1e-12)


def test_marked_models_in_two_threads_keep_their_own_multipliers() -> None:
    barrier = threading.Barrier(2, timeout=20)

    class Meeting(Inline):
        """Both threads are inside a forward when either mark runs."""

        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.loops):
                if threading.current_thread() is not threading.main_thread():
                    barrier.wait()
                h = h + lt.residual(F.relu(h) @ self.weight)
            return h

    torch.manual_seed(0)
    pair = [Meeting().double(), Meeting().double()]
    for model, lam in zip(pair, (1.0, 0.1), strict=True):
        lt.parametrize(model, X, lam=lam)
    expected = [inline_oracle(model, X, lam / 3) for model, lam in zip(pair, (1.0, 0.1), strict=True)]
    outputs: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: outputs.update({i: pair[i](X).detach()}), name=str(i)) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        torch.testing.assert_close(outputs[index], expected[index].detach(), rtol=1e-12, atol=1e-12)


# -- past the module's call


class Encoder(Inline):
    """Its marks run in a helper's helper of the method that forward calls."""

    def forward(self, h: Tensor) -> Tensor:
        return self.encode(h)

    def encode(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = self.once(h)
        return h

    def once(self, h: Tensor) -> Tensor:
        return added(h, F.relu(h) @ self.weight)


def added(h: Tensor, branch: Tensor) -> Tensor:
    return h + lt.residual(branch)


WAYS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "forward": lambda model: model.forward,
    "a method": lambda model: model.encode,
    "a checkpointed method": lambda model: lambda x: checkpoint(model.encode, x, use_reentrant=False),
    "a reentrant checkpoint": lambda model: lambda x: checkpoint(model.forward, x, use_reentrant=True),
    "a compiled method": lambda model: torch.compile(model.encode, backend="eager", fullgraph=True),
    "torch.fx": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize("way", WAYS)
def test_marks_keep_their_multiplier_past_the_modules_call(way: str) -> None:
    torch.manual_seed(0)
    model = rewritten(Encoder().double())
    x = X.clone().requires_grad_()
    out, expected = WAYS[way](model)(x), inline_oracle(model, x, 1 / 3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    (gradient,) = torch.autograd.grad(expected.sum(), model.weight)
    torch.testing.assert_close(model.weight.grad, gradient, rtol=1e-12, atol=1e-12)
    assert lt.residual(X) is X


def test_blocks_that_are_called_by_their_forward_keep_the_multipliers_of_their_marks() -> None:
    model = rewritten(blocks())
    x = X
    for _ in range(model.loops):
        for block in model.blocks:
            x = block.forward(x)
    torch.testing.assert_close(x, model(X), rtol=1e-12, atol=1e-12)


def test_a_mark_in_a_method_of_another_module_is_that_of_the_module_that_was_called() -> None:
    """The inner module is called in one place, and in another one only its method is."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.helped = Encoder(loops=1), Encoder(loops=1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.called(x)
            return self.called(self.helped.encode(x))

    torch.manual_seed(0)
    model = Both().double()
    plan = lt.parametrize(model, X)
    epsilons = {str(branch.handle): branch.multiplier for branch in plan.branches}
    assert set(epsilons) == {"called:branch", ":branch"}
    x = X
    for part, name in [(model.called, "called:branch")] * 3 + [
        (model.helped, ":branch"),
        (model.called, "called:branch"),
    ]:
        x = inline_oracle(part, x, epsilons[name])
    torch.testing.assert_close(model(X), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.forward(X), x, rtol=1e-12, atol=1e-12)


# -- torch.compile


@pytest.mark.parametrize("build", [inline, blocks])
@pytest.mark.parametrize("rewritten_first", [True, False])
def test_a_marked_model_and_its_plain_twin_compile_whole_in_both_orders(
    build: Callable[[], nn.Module], rewritten_first: bool
) -> None:
    torch._dynamo.reset()
    plain = build()
    scaled = rewritten(copy.deepcopy(plain))
    expected = {id(model): model(X) for model in (plain, scaled)}
    assert (expected[id(plain)] - expected[id(scaled)]).abs().max() > 1e-3
    order = (scaled, plain) if rewritten_first else (plain, scaled)
    compiled = {id(model): torch.compile(model, backend="eager", fullgraph=True) for model in order}
    for model in order:
        torch.testing.assert_close(compiled[id(model)](X), expected[id(model)], rtol=1e-12, atol=1e-12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for model in reversed(order):
            torch.testing.assert_close(compiled[id(model)](X), expected[id(model)], rtol=1e-12, atol=1e-12)


def test_two_marked_models_with_different_multipliers_compile_side_by_side() -> None:
    torch._dynamo.reset()
    for lam in (1.0, 0.25):
        model = inline()
        lt.parametrize(model, X, lam=lam)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), inline_oracle(model, X, lam / 3), rtol=1e-12, atol=1e-12)


def test_a_compiled_marked_model_trains_without_recompiling() -> None:
    torch._dynamo.reset()
    model = rewritten(blocks())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01) for one in (model, twin)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            for forward, optimizer in zip((compiled, twin), optimizers, strict=True):
                forward(inputs(2, 4, WIDTH, seed=seed)).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_exported_marked_model_is_scaled() -> None:
    model = rewritten(blocks())
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X), rtol=1e-12, atol=1e-12)


# -- activation checkpointing


class CheckpointedBlocks(Looped):
    """The module that sets the marks is checkpointed as a whole."""

    how: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return x


class CheckpointedInside(Inline):
    """A function inside the forward is checkpointed, and the marks are in it."""

    how: bool | None = None

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = self.twice(h) if self.how is None else checkpoint(self.twice, h, use_reentrant=self.how)
        return h

    def twice(self, h: Tensor) -> Tensor:
        h = h + lt.residual(F.relu(h) @ self.weight)
        return h + lt.residual(F.relu(h) @ self.weight)


class CheckpointedToTheMark(Inline):
    """Where nothing is computed after the mark, the other kind of checkpoint stops before it: nothing is lost."""

    how = False

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = checkpoint(lambda h: h + lt.residual(F.relu(h) @ self.weight), h, use_reentrant=False)
        return h


HOW = pytest.mark.parametrize("how", [True, False], ids=["reentrant", "not reentrant"])


@HOW
def test_checkpointing_the_module_that_sets_the_marks_changes_no_gradient(how: bool) -> None:
    torch.manual_seed(0)
    model = noisy(CheckpointedBlocks([InlineBlock(), InlineBlock()]), std=0.1)
    rewritten(model)
    found = []
    for kind in (None, how):
        model.how = kind
        x = X.clone().requires_grad_()
        model.zero_grad()
        model(x).pow(2).mean().backward()
        found.append([x.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@HOW
def test_checkpointing_a_whole_marked_model_changes_no_gradient(how: bool) -> None:
    model = rewritten(inline())
    expected = torch.autograd.grad(model(X).pow(2).mean(), model.weight)
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=how).pow(2).mean().backward()
    torch.testing.assert_close(model.weight.grad, expected[0], rtol=1e-12, atol=1e-12)


@HOW
def test_checkpointing_a_function_inside_the_forward_is_refused_before_a_wrong_gradient(how: bool) -> None:
    torch.manual_seed(0)
    model = CheckpointedInside().double()
    rewritten(model)
    model.how = how
    with pytest.raises(lt.InputError, match=r"'branch' is set by a function .*checkpoint the whole module"):
        model(X.clone().requires_grad_())
    assert model.weight.grad is None


@HOW
def test_a_plain_model_may_be_checkpointed_anywhere_although_another_one_was_rewritten(how: bool) -> None:
    rewritten(inline())
    torch.manual_seed(0)
    model = CheckpointedInside().double()
    expected = torch.autograd.grad(model(X).pow(2).mean(), model.weight)
    model.how = how
    model(X.clone().requires_grad_()).pow(2).mean().backward()
    torch.testing.assert_close(model.weight.grad, expected[0], rtol=1e-12, atol=1e-12)


# -- copies, checkpoints, fold, verify


def test_copies_and_pickles_of_a_marked_model_are_scaled() -> None:
    model = rewritten(blocks())
    expected = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(X), expected)
        assert lt.verify(twin, X) == lt.verify(model, X)
        twin.loops = 9
        lt.rescale(twin, X)
        twin.loops = model.loops
        assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


def test_state_dicts_of_a_marked_model_are_a_plain_models() -> None:
    plain, model = blocks(), rewritten(blocks())
    assert list(model.state_dict()) == list(plain.state_dict())
    fresh = rewritten(noisy(blocks(), seed=7))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(X), block_oracle(model, X, 1.0), rtol=1e-12, atol=1e-12)


def test_a_plan_with_marks_goes_through_json_onto_a_fresh_model() -> None:
    model, fresh = rewritten(blocks()), blocks()
    plan = lt.ScalingPlan.from_json(lt.verify(model, X).to_json())
    lt.apply_plan(fresh, plan)
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("build", [inline, blocks])
def test_a_marked_branch_is_folded_into_its_own_weight(build: Callable[[], nn.Module]) -> None:
    model = build()
    plain = copy.deepcopy(model)
    plan = lt.parametrize(model, X)
    scaled = model(X)
    lt.fold(model)
    torch.testing.assert_close(model(X), scaled, rtol=1e-12, atol=1e-12)
    assert all(not vars(module).get("_looptransfer_marks") for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for branch in plan.branches:
        (name,) = branch.last_map
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name) * branch.multiplier)


def test_marked_parameters_are_in_the_branches_groups() -> None:
    model = blocks()
    lt.parametrize(model, X)
    groups = lt.param_groups(model, torch.optim.AdamW, lr=0.1)
    assert {group["name"] for group in groups} == {"branches", "branches, no decay"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("way", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_verify_sees_marks_and_their_loss(way: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    model = blocks()
    plan = lt.parametrize(model, X)
    live = way(model)
    assert lt.verify(live, X) == plan
    model.blocks[1].__dict__["_looptransfer_marks"]["mlp"] *= 2
    with pytest.raises(
        lt.VerificationError, match=r"^[^\n]*\n- blocks\.1:mlp: multiplier 0\.235702 planned, 0\.471405"
    ):
        lt.verify(live, X)
