import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import looptransfer as lt
from tests.models import WIDTH, Looped, MLPBlock, inputs, noisy, small_decoder, tokens

X = inputs(2, 5, WIDTH)


@pytest.fixture(autouse=True)
def _no_warning_but_those_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", lt.ScalingWarning)
        yield


def rewritten(model: nn.Module, x: torch.Tensor, rule: Any = "factored", loops: float | None = None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.ScalingWarning)
        lt.parametrize(model, x, rule, loops=loops)
    return model


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def decoder() -> nn.Module:
    return rewritten(noisy(small_decoder(loops=4), std=0.1), tokens())


def test_every_visit_is_measured_by_name_and_nothing_between() -> None:
    model = decoder()
    monitor = lt.Monitor(model, tokens(), every=5)
    assert [bool(monitor(step)) for step in range(7)] == [True, *[False] * 4, True, False]
    values = monitor(10)
    assert {f"layers.0.mlp/{name}/{visit}" for name in ("stream_rms", "increment_rms") for visit in range(1, 5)} <= {
        *values
    }
    assert -1 <= values["alignment"] <= 1
    assert 0 <= values["exponent"] <= 1 + 1e-6
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())


def test_what_is_measured_is_what_is_added() -> None:
    """One loop of one branch: the increment is the difference of the streams."""
    block = MLPBlock()
    model = rewritten(Looped([block], loops=2).double(), X)
    seen: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    model(X)
    handle.remove()
    values = lt.Monitor(model, X)(0)
    for visit, (before, after) in enumerate(zip(seen[::2], seen[1::2], strict=True), start=1):
        name = next(key for key in values if key.endswith(f"increment_rms/{visit}"))
        assert values[name] == pytest.approx((after - before).square().mean().sqrt().item(), rel=1e-6)
        assert values[name.replace("increment", "stream")] == pytest.approx(after.square().mean().sqrt().item())


class Written(nn.Module):
    """Two loops whose streams are kept, for autograd to be asked about them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.way = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), way
        self.streams: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, self.streams = x.clone(), []
        for _ in range(3):
            if self.way == "in place":
                x += self.f(2 * x)
            elif self.way == "recomputed":
                x = x + checkpoint.checkpoint(self.f, 2 * x, use_reentrant=False)
            else:
                x = x + self.f(2 * x)
            self.streams.append(x)
        return x


@pytest.mark.parametrize("way", ["plain", "in place", "recomputed"])
def test_the_gradient_is_that_of_the_stream_at_every_visit(way: str) -> None:
    model, plain = (rewritten(Written(name).double(), X) for name in (way, "plain"))
    gradients = torch.autograd.grad(mean_square(plain(X)), plain.streams)
    values = lt.Monitor(model, X, loss=mean_square)(0)
    for visit, gradient in enumerate(gradients, start=1):
        expected = gradient.square().mean().sqrt().item()
        assert values[f"f/gradient_rms/{visit}"] == pytest.approx(expected, rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("gradient" in name for name in lt.Monitor(model, X)(0))


def test_watching_changes_nothing_in_the_training() -> None:
    def trained(watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = decoder()
        optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=1e-2))
        monitor = lt.Monitor(model, tokens(), every=1, loss=mean_square)
        for step in range(3):
            if watched:
                monitor(step)
            x = tokens() + torch.randint(2, tokens().shape)
            optimizer.zero_grad()
            model(x % 11).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    assert all(map(torch.equal, trained(True), trained(False)))


def test_loops_that_point_the_same_way_are_too_much_for_sqrt() -> None:
    model = Looped([MLPBlock()], loops=8).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # every visit adds in one direction
    for rule in ("factored", "unscaled"):
        lt.Monitor(rewritten(copy.deepcopy(model), X, rule), X)(0)
    monitor = lt.Monitor(rewritten(model, X, "sqrt"), X)
    with pytest.warns(lt.ScalingWarning, match=r"at step 200 the loops add up as N\^.*'sqrt' makes up for N\^0\.5"):
        assert monitor(200)["exponent"] > 0.75
    monitor(400)  # once


def test_a_branch_that_was_replaced_is_told() -> None:
    model = decoder()
    monitor = lt.Monitor(model, tokens())
    monitor(0)
    model.layers[0].mlp = small_decoder().double().layers[0].mlp
    with pytest.warns(lt.ScalingWarning, match=r"layers\.0\.mlp has lost its ε"):
        monitor(200)


def test_a_model_that_loops_otherwise_is_told_and_trains_on() -> None:
    model = decoder()
    monitor = lt.Monitor(model, tokens())
    model.loops = 3
    with pytest.warns(lt.ScalingWarning, match="at step 0 the model cannot be measured as its plan says"):
        assert monitor(0) == {}
    lt.rescale(model, tokens())
    assert "layers.0.mlp/stream_rms/3" in monitor(200)


def test_a_stream_that_is_not_finite_is_told() -> None:
    model = decoder()
    monitor = lt.Monitor(model, tokens())
    with torch.no_grad():
        next(model.layers[0].mlp.parameters()).fill_(math.inf)
    with pytest.warns(lt.ScalingWarning, match="at step 0 layers"):
        monitor(0)


def test_a_compiled_model_is_watched_too() -> None:
    model = decoder()
    plain = lt.Monitor(model, tokens(), loss=mean_square)(0)
    compiled = torch.compile(model, backend="eager")
    compiled(tokens())
    assert lt.Monitor(compiled, tokens(), loss=mean_square)(0) == plain
    assert "layers.1.mlp/gradient_rms/4" in plain


def test_bad_input() -> None:
    with pytest.raises(lt.InputError, match="not rewritten"):
        lt.Monitor(small_decoder(), tokens())
    with pytest.raises(lt.InputError, match=r"every is 0; give a whole number"):
        lt.Monitor(decoder(), tokens(), every=0)
    for loss in (lambda output: output, lambda output: output.loss, lambda output: output.detach().sum()):
        with pytest.raises(lt.InputError, match=r"the gradient of loss\(output\) cannot be measured.*test_monitor"):
            lt.Monitor(decoder(), tokens(), loss=loss)
    with pytest.raises(lt.InputError, match=r"no branch has a gradient.*leave out loss="):
        lt.Monitor(decoder().requires_grad_(False), tokens(), loss=mean_square)
    model = rewritten(small_decoder(loops=4), tokens(), loops=4)
    with pytest.raises(lt.InputError, match="random"):
        lt.Monitor(model, tokens())
