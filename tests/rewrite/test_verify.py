import copy
import functools
import json
import operator
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import looptransfer as lt
from looptransfer.rewrite.insert import set_multiplier
from looptransfer.rules import Rule
from tests import models
from tests.models import WIDTH, Looped, inputs, noisy, small_decoder, tokens
from tests.rewrite.answers import Stepped, planned


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Marked(nn.Module):
    """Two branches that no module hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + lt.residual(x.tanh() @ self.first, "first")
            x = x + lt.residual(x.tanh() @ self.second, "second")
        return x


class ScaledSkip(nn.Module):
    """A gate on the skip: a branch only where it is declared to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.f = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = 0.9 * x + self.f(x)
        return x


X = inputs(2, 4, WIDTH)
# How to build it, its example inputs, and what parametrize is told
FRESH: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "decoder": (small_decoder, tokens(), {}),
    "prelude and coda": (lambda: small_decoder(prelude=1, coda=1), tokens(), {"lam": 0.3, "base_layers": 2}),
    "one visit": (lambda: small_decoder(loops=1), tokens(), {}),
    "sqrt": (small_decoder, tokens(), {"rule": "sqrt"}),
    "unscaled": (small_decoder, tokens(), {"rule": "unscaled"}),
    "random loops": (small_decoder, tokens(), {"loops": 2.5}),
    "ALBERT": (lambda: Looped([models.AlbertBlock(), models.AlbertBlock()]), X, {}),
    "parallel": (lambda: Looped([models.ParallelBlock(), models.ParallelBlock()]), X, {}),
    "dropout": (lambda: Looped([models.DropoutBlock(), models.DropoutBlock()]), X, {}),
    "tuple": (lambda: Looped([models.TupleBlock()]), X, {}),
    "mapping": (lambda: Looped([models.DictBlock()]), X, {}),
    "tied": (lambda: Looped(models.tied_blocks()), X, {}),
    "in place": (models.InPlaceMLP, X, {}),
    "input injection": (models.InjectedMLP, X, {}),
    "declared": (small_decoder, tokens(), {"branches": ["layers.*.mlp", "layers.*.attention"]}),
    "declared in part": (small_decoder, tokens(), {"branches": ["layers.*.mlp"]}),
    "declared behind a gate": (ScaledSkip, X, {"branches": ["f"]}),
    "marks": (Marked, X, {}),
    "preserved": (small_decoder, tokens(), {"preserve": True}),
    "statistics": (models.NormedMLP, inputs(4, WIDTH), {}),
}


def fresh(name: str) -> tuple[nn.Module, Tensor, lt.ScalingPlan]:
    build, example, told = FRESH[name]
    torch.manual_seed(0)
    model = noisy(build(), std=0.1)
    return model, example, lt.parametrize(model, example, **told)


def decoder(**told: Any) -> nn.Module:
    """Two layers, two loops."""
    model = noisy(small_decoder(loops=2), std=0.1)
    lt.parametrize(model, tokens(), **told)
    return model


# -- what is right passes


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FRESH)
def test_a_model_that_was_just_rewritten_passes(name: str, training: bool) -> None:
    model, example, plan = fresh(name)
    assert lt.verify(model.train(training), example) == plan
    assert plan.proved


@pytest.mark.parametrize("name", FRESH)
def test_verify_leaves_every_bit_of_the_model_and_of_the_random_state(name: str) -> None:
    model, example, _ = fresh(name)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    *_, last = model.modules()
    last.eval()  # a mode of its own, which must not be evened out
    if name in {"prelude and coda", "marks", "statistics"}:
        model = torch.compile(model, backend="eager")
    objects = [(id(p), p._version) for p in model.buffers()]
    held = [
        (p, id(p), p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    given = example.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    lt.verify(model, example)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert [id(buffer) for buffer in model.buffers()] == [identity for identity, _ in objects]
    assert all(torch.equal(buffer, value) for buffer, value in buffers)
    for parameter, (_, identity, value, gradient, numbers) in zip(model.parameters(), held, strict=True):
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, numbers)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(example, given)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args).mean()


@pytest.mark.parametrize("wrap", [nn.Sequential, Wrapper, lambda m: torch.compile(Wrapper(m), backend="eager")])
def test_a_wrapped_model_is_verified_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = decoder()
    wrapped = wrap(model)
    assert lt.verify(wrapped, tokens()).loops == 2
    spoil_attribute(model)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp"):
        lt.verify(wrapped, tokens())


def test_other_inputs_than_those_of_the_rewrite_will_do() -> None:
    model = decoder()
    assert lt.verify(model, tokens(batch=3, time=9, seed=4)).proved
    assert lt.verify(model, {"tokens": tokens()}).proved
    assert lt.verify(model, (tokens(),)).proved


def test_a_model_after_some_training_passes() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=0.01))
    for seed in range(3):
        model(tokens(seed=seed)).pow(2).mean().backward()
        optimizer.step()
    lt.verify(model, tokens())


def test_zero_initialised_branch_ends_hide_nothing() -> None:
    model = small_decoder()
    for layer in model.layers:
        nn.init.zeros_(layer.mlp.down.weight)
        nn.init.zeros_(layer.attention.out.weight)
    lt.parametrize(model, tokens())
    lt.verify(model, tokens())
    spoil_attribute(model)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp: multiplier"):
        lt.verify(model, tokens())
    assert not model.layers[1].mlp.down.weight.any()


# -- what is wrong is caught


def spoil_class(model: nn.Module) -> None:
    """What a library does that resets a module's class."""
    mlp = model.layers[1].mlp
    mlp.__class__ = type(mlp).__mro__[1]


def spoil_attribute(model: nn.Module) -> None:
    model.layers[1].mlp.__dict__["_looptransfer_multipliers"].clear()


def spoil_with_a_hook(model: nn.Module) -> None:
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 0.25)


def spoil_with_a_wrapped_forward(model: nn.Module) -> None:
    mlp = model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda *args: inner(*args) * 0.25


def spoil_by_doubling(model: nn.Module) -> None:
    held = model.layers[1].mlp.__dict__["_looptransfer_multipliers"]
    held[None] *= 2


def spoil_by_a_percent(model: nn.Module) -> None:
    held = model.layers[1].mlp.__dict__["_looptransfer_multipliers"]
    held[None] *= 1.01


def spoil_with_a_fresh_block(model: nn.Module) -> None:
    mlp = model.layers[1].mlp
    model.layers[1].mlp = type(small_decoder().layers[1].mlp)(WIDTH).double()
    assert type(mlp) is not type(model.layers[1].mlp)


def spoil_with_a_block_that_adds_nothing(model: nn.Module) -> None:
    model.layers[1].mlp = nn.Identity()


def spoil_with_a_plain_copy_of_a_layer(model: nn.Module) -> None:
    model.layers[1] = small_decoder().double().layers[1]


PLANNED = 1 / (2 * 2**0.5)
# How, and what is measured: of the factor where there is one, by the message's number
SPOILT: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "class reset": (spoil_class, "1 measured"),
    "attribute removed": (spoil_attribute, "1 measured"),
    "hook that multiplies again": (spoil_with_a_hook, f"{PLANNED / 4:.6g} measured"),
    "forward that multiplies again": (spoil_with_a_wrapped_forward, f"{PLANNED / 4:.6g} measured"),
    "multiplier doubled": (spoil_by_doubling, f"{2 * PLANNED:.6g} measured"),
    "multiplier off by a percent": (spoil_by_a_percent, f"{1.01 * PLANNED:.6g} measured"),
    "fresh block": (spoil_with_a_fresh_block, "1 measured"),
    "fresh layer": (spoil_with_a_plain_copy_of_a_layer, "1 measured"),
    "block that adds nothing": (spoil_with_a_block_that_adds_nothing, ""),
}


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def a_part_compiled_in_place(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


FAST = {("class reset", compiled), ("hook that multiplies again", compiled), ("fresh block", compiled)}
FAST |= {("attribute removed", compiled_in_place), ("hook that multiplies again", a_part_compiled_in_place)}
COMPILED = [
    pytest.param(name, way, marks=[] if (name, way) in FAST else [pytest.mark.slow])
    for name in SPOILT
    for way in (compiled, compiled_in_place, a_part_compiled_in_place)
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_branch_that_lost_its_multiplier_or_has_two_is_named(name: str, training: bool) -> None:
    model = decoder().train(training)
    SPOILT[name][0](model)
    assert complaints(model) == expected_complaints(name)


@pytest.mark.parametrize(("name", "way"), COMPILED)
def test_compilation_hides_no_wrong_multiplier(name: str, way: Callable[[nn.Module], nn.Module]) -> None:
    model = decoder()
    live = way(model)
    lt.verify(live, tokens())
    SPOILT[name][0](model)
    found = complaints(live)
    wanted = expected_complaints(name)
    assert found[: len(wanted)] == wanted
    # TorchDynamo guards on no hook, so the model that is trained went its own way
    assert not found[len(wanted) :] or "the compiled model does not compute" in found[-1]


def complaints(model: nn.Module) -> list[str]:
    with pytest.raises(lt.VerificationError) as caught:
        lt.verify(model, tokens())
    head, *lines = str(caught.value).splitlines()
    assert head == "the model does not do what its plan says:"
    return [line.removeprefix("- ") for line in lines]


def expected_complaints(name: str) -> list[str]:
    measured = SPOILT[name][1]
    if not measured:
        return ["layers.1.mlp: no longer a residual branch of its own (was it replaced?)"]
    branches = ["layers.1.attention", "layers.1.mlp"] if name == "fresh layer" else ["layers.1.mlp"]
    return [f"{branch}: multiplier {PLANNED:.6g} planned, {measured}" for branch in branches]


@pytest.mark.parametrize("way", [as_it_is, compiled])
def test_every_branch_that_disagrees_is_listed_with_its_numbers(way: Callable[[nn.Module], nn.Module]) -> None:
    model = noisy(small_decoder(prelude=1), std=0.1)
    plan = lt.parametrize(model, tokens())
    for module in model.modules():
        held = module.__dict__.get("_looptransfer_multipliers", {})
        held.update({output: 3 * factor for output, factor in held.items()})
    with pytest.raises(lt.VerificationError) as caught:
        lt.verify(way(model), tokens())
    assert [line for line in str(caught.value).splitlines() if "multiplier " in line] == [
        f"- {branch.handle}: multiplier {branch.multiplier:.6g} planned, {3 * branch.multiplier:.6g} measured"
        for branch in plan.branches
    ]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(factor=st.floats(0.01, 100).filter(lambda f: abs(f - 1) > 2e-3))
def test_no_factor_on_a_branch_goes_unnoticed(factor: float) -> None:
    model = models.ResidualMLP()
    lt.parametrize(model, inputs(2, WIDTH).float())
    model.f.__dict__["_looptransfer_multipliers"][None] *= factor
    with pytest.raises(lt.VerificationError, match=r"^.*\n- f: multiplier 0\.333333 planned, .* measured$"):
        lt.verify(model, inputs(2, WIDTH).float())


QUARTER = torch.tensor(0.25, dtype=torch.float64)


def with_buffer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * module.quarter


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: output * QUARTER,
        lambda module, args, output: QUARTER * output,
        lambda module, args, output: output * torch.tensor(0.25, dtype=output.dtype),
        lambda module, args, output: output * torch.full((WIDTH,), 0.25, dtype=output.dtype),
        lambda module, args, output: output * QUARTER.expand(WIDTH),
        with_buffer,
        lambda module, args, output: output.mul_(0.25),
        lambda module, args, output: output.mul_(QUARTER),
        lambda module, args, output: output / 4,
        lambda module, args, output: output / (1 / QUARTER),
        lambda module, args, output: output + output,
        lambda module, args, output: output + 3 * output,
        lambda module, args, output: output - 0.75 * output,
        lambda module, args, output: torch.stack([output, output]).sum(0),
    ],
    ids=[
        "tensor",
        "tensor first",
        "tensor made there",
        "vector made there",
        "vector",
        "buffer",
        "in place",
        "tensor in place",
        "division",
        "division by a tensor",
        "added to itself",
        "added to thrice itself",
        "subtracted from itself",
        "stacked on itself",
    ],
)
def test_a_second_factor_is_caught_however_it_is_put_on(hook: Callable[..., Tensor]) -> None:
    model = decoder()
    model.layers[1].mlp.register_buffer("quarter", QUARTER.clone(), persistent=False)
    lt.verify(model, tokens())
    model.layers[1].mlp.register_forward_hook(hook)
    with pytest.raises(lt.VerificationError, match=r"^[^\n]*\n- layers\.1\.mlp: "):
        lt.verify(model, tokens())


def test_a_mark_that_lost_its_multiplier_is_caught() -> None:
    model = Marked().double()
    lt.parametrize(model, X)
    del model.__dict__["_looptransfer_marks"]["second"]
    with pytest.raises(lt.VerificationError, match=r"^.*\n- :second: multiplier \S+ planned, 1 measured$"):
        lt.verify(model, X)


def test_a_declared_branch_that_lost_its_multiplier_is_caught() -> None:
    model = ScaledSkip().double()
    lt.parametrize(model, X, branches=["f"])
    model.f.__dict__["_looptransfer_multipliers"].clear()
    with pytest.raises(lt.VerificationError, match=r"- f: multiplier 0\.333333 planned, 1 measured"):
        lt.verify(model, X)


def test_a_branch_that_was_added_later_is_caught() -> None:
    model = decoder()
    model.layers.append(small_decoder().double().layers[0])
    with pytest.raises(lt.VerificationError) as caught:
        lt.verify(model, tokens())
    assert "- layers.2.attention: a residual branch that the plan does not know" in str(caught.value)
    assert "- layers.2.mlp: a residual branch that the plan does not know" in str(caught.value)


def test_a_compiled_model_that_lost_a_multiplier_on_its_way_is_caught() -> None:
    """The eager model is right, and the compiled one runs other code."""

    def careless(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        for node in list(graph.graph.nodes):
            if node.target is operator.mul and node.args[1].meta["example_value"].ndim == 0:  # ε is an input
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
                break
        graph.recompile()
        return graph.forward

    model = decoder()
    right, wrong = torch.compile(model, backend="eager"), torch.compile(model, backend=careless)
    lt.verify(right, tokens())
    with pytest.raises(lt.VerificationError, match="the compiled model does not compute what the rewritten model does"):
        lt.verify(wrong, tokens())


def test_a_stale_compilation_is_caught() -> None:
    """A hook that multiplies is no guard of TorchDynamo: the eager model is spoilt and the compiled one is not."""
    model = decoder()
    live = torch.compile(model, backend="eager")
    live(tokens())
    spoil_with_a_hook(model)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp"):
        lt.verify(live, tokens())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class reset", "hook that multiplies again", "multiplier off by a percent"])
def test_inductor_hides_nothing(name: str) -> None:
    model = decoder()
    live = torch.compile(model)
    lt.verify(live, tokens())
    SPOILT[name][0](model)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp: multiplier"):
        lt.verify(live, tokens())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductors_own_dropout_is_no_disagreement(training: bool) -> None:
    model = Looped([models.DropoutBlock()]).float().train(training)
    lt.parametrize(model, X.float())
    lt.verify(torch.compile(model), X.float())


# -- loop counts


@pytest.mark.parametrize(("loops", "way"), [(1, as_it_is), (3, as_it_is), (5, as_it_is), (3, compiled)])
def test_another_loop_count_is_an_error_in_training_and_a_warning_in_eval(
    loops: int, way: Callable[[nn.Module], nn.Module]
) -> None:
    model = decoder()
    live = way(model)
    model.loops = loops
    with pytest.raises(
        lt.VerificationError, match=rf"2 visits planned, {loops} measured; rescale\(model, example_inputs\)"
    ):
        lt.verify(live, tokens())
    with pytest.warns(lt.ScalingWarning, match=rf"2 visits planned, {loops} measured; in eval mode") as told:
        assert lt.verify(live.eval(), tokens()).loops == 2
    assert [warning.filename for warning in told] == [__file__]


def test_a_loop_count_that_is_drawn_afresh_is_no_error() -> None:
    model = decoder(loops=2.5)
    for loops in (1, 3, 5):
        model.loops = loops
        assert lt.verify(model, tokens()).random_loops
    spoil_by_doubling(model)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp: multiplier"):
        lt.verify(model, tokens())


def test_a_wrong_multiplier_is_caught_in_eval_with_more_loops_too() -> None:
    model = decoder().eval()
    model.loops = 7
    lt.verify(model, tokens())
    spoil_by_doubling(model)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp: multiplier"):
        lt.verify(model, tokens())


# -- bad input


@pytest.mark.parametrize("model", [small_decoder(), torch.compile(small_decoder(), backend="eager"), nn.Sequential()])
def test_a_model_that_was_not_rewritten_is_a_mistake_of_the_call(model: nn.Module) -> None:
    with pytest.raises(lt.InputError, match=r"not rewritten; call looptransfer\.parametrize") as caught:
        lt.verify(model, tokens())
    assert not isinstance(caught.value, lt.VerificationError)


def test_rejected_example_inputs_show_the_models_own_error() -> None:
    with pytest.raises(lt.InputError, match=r"rejects the example inputs: TypeError") as caught:
        lt.verify(decoder(), {"ids": tokens()})
    assert not isinstance(caught.value, lt.VerificationError)


def test_after_remove_there_is_nothing_to_verify() -> None:
    model = decoder()
    lt.remove(model)
    with pytest.raises(lt.InputError, match="not rewritten"):
        lt.verify(model, tokens())


# -- rescale


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(["factored", "completep", "sqrt", "unscaled"]),
    before=st.integers(1, 5),
    after=st.integers(1, 9),
    prelude=st.integers(0, 1),
    lam=st.floats(0.1, 10),
)
def test_rescaled_multipliers_are_those_of_a_fresh_model(
    rule: Rule, before: int, after: int, prelude: int, lam: float
) -> None:
    model = noisy(small_decoder(1, before, prelude), std=0.1)
    other = noisy(small_decoder(1, after, prelude), std=0.1)
    lt.parametrize(model, tokens(), rule, lam)
    model.loops = after
    plan = lt.rescale(model, tokens())
    fresh_plan = lt.parametrize(other, tokens(), rule, lam)
    for ours, theirs in zip(plan.branches, fresh_plan.branches, strict=True):
        assert (ours.handle, ours.visits) == (theirs.handle, theirs.visits)
        assert ours.multiplier == pytest.approx(theirs.multiplier, rel=1e-15)
    torch.testing.assert_close(model(tokens()), other(tokens()), rtol=1e-12, atol=1e-12)
    assert lt.verify(model, tokens()) == plan


def test_rescale_keeps_the_prelude_and_the_weights() -> None:
    model = noisy(small_decoder(loops=3, prelude=1, coda=1), std=0.1)
    plan = lt.parametrize(model, tokens())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.loops = 6
    new = lt.rescale(model, tokens())
    for old, branch in zip(plan.branches, new.branches, strict=True):
        looped = branch.module.startswith("layers")
        assert (branch.visits, branch.multiplier) == (
            pytest.approx((6, old.multiplier / 2)) if looped else (1, old.multiplier)
        )
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rescale_there_and_back_is_the_same_plan() -> None:
    model = decoder()
    plan, out = lt.verify(model, tokens()), model(tokens())
    for loops in (17, 1):
        model.loops = loops
        lt.rescale(model, tokens())
        model.loops = 2
        assert not torch.equal(model(tokens()), out)
    assert lt.rescale(model, tokens()) == plan
    assert torch.equal(model(tokens()), out)


@pytest.mark.parametrize("way", [compiled, pytest.param(compiled_in_place, marks=pytest.mark.slow)])
def test_rescale_reaches_a_compiled_model(way: Callable[[nn.Module], nn.Module]) -> None:
    model = decoder()
    live = way(model)
    live(tokens())
    model.loops = 3
    lt.rescale(live, tokens())
    other = noisy(small_decoder(loops=3), std=0.1)
    lt.parametrize(other, tokens())
    torch.testing.assert_close(live(tokens()), other(tokens()), rtol=1e-12, atol=1e-12)
    lt.verify(live, tokens())


@pytest.mark.parametrize("marked", [False, True], ids=["modules", "marks"])
def test_a_new_multiplier_compiles_nothing_anew(marked: bool) -> None:
    """The loop runs in Python and its blocks are compiled; ε is what a rescale changes for them."""

    class Unrolled(nn.Module):
        def __init__(self, loops: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loops, self.block = loops, MarkedBlock() if marked else models.MLPBlock()

        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.loops):
                h = self.block(h)
            return h

    counter, x = CompileCounter(), inputs(2, WIDTH)
    model = noisy(Unrolled(2))
    lt.parametrize(model, x)
    model.block.compile(backend=counter)
    model(x)  # once for inputs without gradient, once for those with
    compilations = counter.frame_count
    for loops in (1, 4, 8, 2):
        model.loops = loops
        lt.rescale(model, x)
        fresh_model = noisy(Unrolled(loops))
        lt.parametrize(fresh_model, x)
        torch.testing.assert_close(model(x), fresh_model(x), rtol=1e-12, atol=1e-12)
    assert (compilations, counter.frame_count) == (2, 2)


class MarkedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.f(x)
        return x + lt.residual(branch, "f")


class Drawn(nn.Module):
    """A block before the loop, one that is used twice in each loop, and a norm at its end."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.once, self.twice, self.norm, self.counts = models.mlp(), models.mlp(), nn.LayerNorm(WIDTH), counts

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.once(h)
        for _ in range(random.choice(self.counts)):
            h = h + self.once(h)
            for _ in range(2):
                h = h + self.twice(h)
            h = self.norm(h)
        return h


@pytest.mark.parametrize("seed", range(5))
def test_a_mean_loop_count_gives_every_branch_its_own_visits_whatever_is_drawn(seed: int) -> None:
    random.seed(seed)
    model = Drawn((1, 2, 5)).double()
    plan = lt.parametrize(model, inputs(2, WIDTH), loops=2.5)
    assert [(branch.module, branch.visits) for branch in plan.branches] == [("once", 2.5), ("twice", 3)]
    assert plan.on_stream == {"norm.weight": 1.5, "norm.bias": 1.5}
    differ = next(caveat for caveat in plan.caveats if caveat.startswith("visits differ"))
    assert differ.startswith("visits differ (2.5, 3)")
    model.counts = (4, 8, 9)
    assert [branch.visits for branch in lt.rescale(model, inputs(2, WIDTH), loops=7).branches] == [7, 12]


@pytest.mark.parametrize("seed", range(8))
def test_a_loop_count_that_is_drawn_is_noticed_whatever_is_drawn_first(seed: int) -> None:
    random.seed(seed)
    plan = lt.parametrize(Drawn((4, 8)).double(), inputs(2, WIDTH))
    assert any(caveat.startswith("visits vary") for caveat in plan.caveats)


def test_a_mean_of_what_is_not_drawn_must_be_near_the_traced_count() -> None:
    assert lt.parametrize(models.ResidualMLP(5).double(), inputs(2, WIDTH), loops=4.5).loops == 4.5
    assert lt.parametrize(models.ResidualMLP(1).double(), inputs(2, WIDTH), loops=1).loops == 1
    with pytest.raises(lt.InputError, match=r"visited 5 times in every forward: nothing is drawn at random"):
        lt.parametrize(models.ResidualMLP(5).double(), inputs(2, WIDTH), loops=3)


@pytest.mark.parametrize("loops", [0, -1, 0.5, float("nan"), float("inf"), "3", True])
def test_a_loop_count_out_of_range_is_refused(loops: Any) -> None:
    model = decoder()
    plan = lt.verify(model, tokens())
    with pytest.raises(lt.InputError, match=r"loops is .*must be a number from 1 up"):
        lt.rescale(model, tokens(), loops=loops)
    assert lt.verify(model, tokens()) == plan


@pytest.mark.parametrize("given", [(), (6,)])
def test_a_loop_count_alone_is_answered_with_what_is_missing(given: tuple[Any, ...]) -> None:
    model = decoder()
    with pytest.raises(lt.InputError, match=r"set it on the model and give example inputs: rescale\(model, example_in"):
        lt.rescale(model, *given)


def test_rescale_follows_loops_that_differ() -> None:
    model = nn.Sequential(models.ResidualMLP(1), models.ResidualMLP(5)).double()
    lt.parametrize(model, inputs(2, WIDTH))
    model[0].loops = 4
    assert [branch.visits for branch in lt.rescale(model, inputs(2, WIDTH)).branches] == [4, 5]


def test_what_acts_on_the_stream_follows_the_loop_count() -> None:
    model = Drawn((1,)).double()
    assert lt.parametrize(model, inputs(2, WIDTH)).on_stream == {}
    model.counts = (3,)
    assert lt.rescale(model, inputs(2, WIDTH)).on_stream == {"norm.weight": 3, "norm.bias": 3}
    scales = {group["name"]: group["lr"] for group in lt.param_groups(model, torch.optim.AdamW, lr=1.0)}
    assert scales["outside, no decay, on the stream 3×"] == pytest.approx(1 / 3)


def test_a_count_at_which_the_model_has_other_branches_is_refused() -> None:
    class Growing(models.ResidualMLP):
        def __init__(self) -> None:
            super().__init__(2)
            self.late = models.mlp()

        def forward(self, h: Tensor) -> Tensor:
            h = super().forward(h)
            return h + self.late(h) if self.loops > 2 else h

    model = Growing().double()
    lt.parametrize(model, inputs(2, WIDTH))
    model.loops = 3
    with pytest.raises(lt.InputError, match=r"other branches than before \(late\); parametrize a fresh model"):
        lt.rescale(model, inputs(2, WIDTH))


def test_rescale_of_a_plain_model_is_refused() -> None:
    with pytest.raises(lt.InputError, match="not rewritten"):
        lt.rescale(small_decoder(), tokens())


# -- the plan as text


@pytest.mark.parametrize("name", FRESH)
def test_a_plan_comes_back_from_json_as_it_was_and_makes_a_fresh_model_the_same(name: str) -> None:
    model, example, plan = fresh(name)
    again = lt.ScalingPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)
    torch.manual_seed(5)
    other = noisy(FRESH[name][0](), seed=1)
    lt.apply_plan(other, again)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one.eval()
    torch.manual_seed(1)
    wanted = model(example)
    torch.manual_seed(1)
    assert torch.equal(other(example), wanted)
    assert lt.verify(other, example) == plan
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        ours, theirs = (lt.param_groups(one, optimizer, lr=0.1, weight_decay=0.2) for one in (other, model))
        assert [{k: v for k, v in g.items() if k != "params"} for g in ours] == [
            {k: v for k, v in g.items() if k != "params"} for g in theirs
        ]


def test_a_plan_of_another_process_keeps_its_integers_whole() -> None:
    plan = lt.parametrize(small_decoder(prelude=1), tokens())
    again = lt.ScalingPlan.from_json(json.dumps(json.loads(plan.to_json())))
    assert again.loops == frozenset({1, 3})
    assert hash(again.branches) == hash(plan.branches)


def test_applying_a_plan_runs_no_forward_and_warns_of_nothing() -> None:
    plan = lt.verify(decoder(), tokens())

    def forbidden(*_: Any) -> Any:
        raise AssertionError("ran")

    other = noisy(small_decoder(), std=0.1)
    other.register_forward_pre_hook(forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.apply_plan(other, plan)


@functools.cache
def plan_text() -> str:
    return lt.parametrize(small_decoder(), tokens()).to_json()


def plan_data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(plan_text())
    return data


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', "{}", '{"schema_version": 1}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(lt.InputError, match="plan"):
        lt.ScalingPlan.from_json(text)


@pytest.mark.parametrize("version", [None, 0, 1, "2"])
def test_another_schema_version_is_refused_by_its_number(version: Any) -> None:
    data = plan_data() | {"schema_version": version}
    with pytest.raises(lt.InputError, match=rf"schema version {version!r}; this looptransfer reads 2"):
        lt.ScalingPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("part", ["plan", "branch"])
def test_a_field_that_is_unknown_or_missing_is_refused_by_its_name(part: str) -> None:
    names = set(plan_data() if part == "plan" else plan_data()["branches"][0])
    for name in [*names, "colour"]:
        data = plan_data()
        target = data if part == "plan" else data["branches"][0]
        if name in target:
            del target[name]
        else:
            target[name] = "red"
        with pytest.raises(lt.InputError, match="schema version None" if name == "schema_version" else name):
            lt.ScalingPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(("field", "value"), [("rule", "completep"), ("lam", 2.0), ("base_layers", 4), ("layers", 9)])
def test_multipliers_that_are_not_those_of_the_rule_are_refused(field: str, value: Any) -> None:
    data = plan_data() | {field: value}
    with pytest.raises(lt.InputError, match=r"the multiplier of .* is 0.\d+, and its rule, \w+, gives \d"):
        lt.ScalingPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("multiplier", 0),
        ("multiplier", -0.5),
        ("multiplier", float("nan")),
        ("multiplier", float("inf")),
        ("multiplier", "0.5"),
        ("multiplier", None),
        ("visits", 0),
        ("visits", "3"),
        ("visits", float("nan")),
    ],
)
def test_a_branch_out_of_range_is_refused(field: str, value: Any) -> None:
    data = plan_data()
    data["branches"][1][field] = value
    with pytest.raises(lt.InputError):
        lt.ScalingPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "mup"),
        ("rule", None),
        ("rule", []),
        ("lam", 0),
        ("lam", "1"),
        ("base_layers", 0),
        ("base_layers", 1.5),
        ("layers", 0),
        ("layers", "2"),
        ("branches", None),
        ("branches", 3),
        ("branches", [3]),
        ("left_alone", None),
        ("on_stream", None),
        ("caveats", None),
    ],
)
def test_a_setting_out_of_range_is_refused(field: str, value: Any) -> None:
    data = plan_data() | {field: value}
    with pytest.raises(lt.InputError):
        lt.ScalingPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "other",
    [lambda: small_decoder(layers=1), models.ResidualMLP, lambda: Looped([models.MLPBlock()])],
    ids=["fewer layers", "another kind", "other names"],
)
def test_a_plan_is_refused_for_another_architecture_which_stays_as_it_is(
    other: Callable[[], nn.Module],
) -> None:
    plan = lt.parametrize(small_decoder(layers=2), tokens())
    model = other()
    before = copy.deepcopy(model)
    with pytest.raises(lt.InputError, match=r"the plan names layers\.\S+, which this \w+ does not have"):
        lt.apply_plan(model, plan)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_plan_is_applied_once() -> None:
    plan = lt.parametrize(small_decoder(), tokens())
    model = noisy(small_decoder(), std=0.1)
    lt.apply_plan(model, plan)
    out = model(tokens())
    for again in (plan, lt.verify(model, tokens())):
        with pytest.raises(lt.InputError, match="rewritten already"):
            lt.apply_plan(model, again)
    assert torch.equal(model(tokens()), out)


def test_a_plan_is_refused_for_a_compiled_model_and_for_what_is_no_module() -> None:
    plan = lt.parametrize(small_decoder(), tokens())
    with pytest.raises(lt.InputError, match="compiled already"):
        lt.apply_plan(torch.compile(small_decoder(), backend="eager"), plan)
    with pytest.raises(lt.InputError, match="model is a str"):
        lt.apply_plan("model", plan)  # type: ignore[arg-type]


# -- marks where nothing is recognised

ROWS = torch.arange(2)
MARKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "stacked": lambda m, x: torch.stack([x, lt.residual(m.f(x))]).mean(0) * 2,
    "einsum": lambda m, x: torch.einsum("k...,k->...", torch.stack([x, lt.residual(m.f(x))]), torch.ones(2).double()),
    "lerp": lambda m, x: torch.lerp(x, lt.residual(m.f(x)), 0.5),
    "flipped": lambda m, x: x.flip(1) + lt.residual(m.f(x)),
    "scattered": lambda m, x: x.index_put((ROWS,), lt.residual(m.f(x)), accumulate=True),
    "_foreach_add": lambda m, x: torch._foreach_add([x], [lt.residual(m.f(x))])[0],
    "gated": lambda m, x: x * torch.sigmoid(m.g(x)) + lt.residual(m.f(x)),
    "rsub": lambda m, x: torch.rsub(-lt.residual(m.f(x)), x),
    "clamped": lambda m, x: x + lt.residual(m.f(x).clamp(-1, 1)),
    "packed": lambda m, x: sum((torch.cat([x, lt.residual(m.f(x))], -1) * 1.5).chunk(2, -1)),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("how", MARKED)
def test_a_branch_that_is_marked_as_the_refusal_says_is_scaled_and_verified(how: str) -> None:
    with (
        mock.patch.object(lt, "residual", lambda branch, name="branch": branch),
        pytest.raises(lt.InputError) as caught,
    ):
        lt.parametrize(Stepped(MARKED[how], 3).double(), X)
    assert "looptransfer.residual(…" in str(caught.value)
    model = Stepped(MARKED[how], 3).double()
    assert [(str(b.handle), b.visits) for b in planned(model).branches] == [(":branch", 3)]
    ours = model(X)
    with mock.patch.object(lt, "residual", lambda branch, name="branch": branch / 3):
        torch.testing.assert_close(ours, Stepped(MARKED[how], 3).double()(X), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("how", ["stacked", "scattered", "clamped"])
def test_a_mark_that_was_rewritten_and_lost_its_multiplier_is_caught(how: str) -> None:
    model = Stepped(MARKED[how], 3).double()
    plan = planned(model)
    set_multiplier(model, plan.branches[0].handle, 1.0)
    with pytest.raises(lt.VerificationError, match=r":branch: multiplier 0\.333333 planned, 1 measured"):
        lt.verify(model, X)
