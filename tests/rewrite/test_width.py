"""Widths from two instances of a model, beside mup's own."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import mup
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import looptransfer as lt

TOKENS = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(0))


def decoder(width: int, heads: int | None = None, *, tied_head: bool = False, layers: int = 2) -> lt.LoopedDecoder:
    torch.manual_seed(1)
    heads = heads or width // 8
    return lt.LoopedDecoder(width=width, heads=heads, layers=layers, loops=2, tied_head=tied_head).double()


class Tower(nn.Module):
    """A looped MLP with biases and torch's own initialisation, between two layers of fixed width."""

    def __init__(self, width: int, read_out: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.read_in = nn.Linear(3, width)
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = read_out(width, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.read_in(x)
        for _ in range(2):
            h = h + self.f(h)
        logits: Tensor = self.out(h)
        return logits


X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> list[float]:
    trained = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trained.append(float(loss.detach()))
    return trained


OPTIMIZERS: list[tuple[Any, Any, float]] = [
    (torch.optim.AdamW, mup.MuAdamW, 0.01),
    (torch.optim.Adam, mup.MuAdam, 0.01),
    (torch.optim.SGD, mup.MuSGD, 0.5),
]


@pytest.mark.parametrize(("optimizer", "reference", "lr"), OPTIMIZERS)
def test_the_reference_model_trains_as_with_mups_own_optimizers_and_read_out(
    optimizer: Any, reference: Any, lr: float
) -> None:
    targets = TOKENS.roll(-1, dims=1)
    ours = decoder(32)
    lt.parametrize(ours, TOKENS, base_layers=2, base=decoder(8))
    theirs = decoder(32)
    theirs.head = mup.MuReadout(32, 256, bias=False).double()
    mup.set_base_shapes(theirs, decoder(8), rescale_params=False)
    theirs.load_state_dict(ours.state_dict())
    lt.parametrize(theirs, TOKENS, base_layers=2)
    decay = dict.fromkeys(("branch matrix", "branch vector", "embedding", "head", "outside"), 0.1)
    groups = lt.param_groups(ours, optimizer, lr=lr, weight_decay=decay)  # type: ignore[arg-type]
    expected = losses(theirs, reference(theirs.parameters(), lr=lr, weight_decay=0.1), TOKENS, targets)
    assert losses(ours, optimizer(groups, lr=lr), TOKENS, targets) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(("optimizer", "reference", "lr"), OPTIMIZERS)
def test_a_model_with_torchs_own_initialisation_starts_and_trains_as_mup_has_it(
    optimizer: Any, reference: Any, lr: float
) -> None:
    theirs = Tower(32, mup.MuReadout)
    mup.set_base_shapes(theirs, Tower(8, mup.MuReadout))
    ours = Tower(32)
    lt.parametrize(ours, X, base=Tower(8))
    lt.parametrize(theirs, X)
    for (name, here), there in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(here, there, rtol=1e-12), name
    targets = torch.arange(6) % 5
    expected = losses(theirs, reference(theirs.parameters(), lr=lr), X, targets)
    assert losses(ours, optimizer(lt.param_groups(ours, optimizer, lr=lr)), X, targets) == pytest.approx(
        expected, rel=1e-9
    )


@settings(derandomize=True, deadline=None, max_examples=30)
@given(exponent=st.sampled_from([0.0, 0.5, 1.0]), ratio=st.sampled_from([2, 3, 8]), scale=st.floats(0.001, 10.0))
def test_the_scale_at_the_start_follows_the_width_whatever_the_initialiser(
    exponent: float, ratio: int, scale: float
) -> None:
    def made(width: int) -> Tower:
        model = Tower(width)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=scale * width**-exponent)
        return model

    model, base = made(32 * ratio), made(32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lt.parametrize(model, X, base=base)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            wanted = ratio ** (exponent - (0.5 if name.startswith("f.") else 0.0))
            assert torch.allclose(parameter, before[name] * wanted, rtol=1e-12), name


def test_a_scale_that_is_no_half_power_of_the_width_is_measured() -> None:
    model, base = Tower(64), Tower(16)
    with torch.no_grad():
        model.f[1].weight.mul_(1.3)
    lt.parametrize(model, X, base=base)
    size = {m: m.f[1].weight.detach().pow(2).mean().sqrt().item() for m in (model, base)}
    assert size[model] / size[base] == pytest.approx(0.5, rel=1e-12)


def test_the_base_itself_is_left_as_it_is() -> None:
    model, plain = decoder(16), decoder(16)
    plan = lt.parametrize(model, TOKENS, base=lambda: decoder(16))
    lt.parametrize(plain, TOKENS)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert (plan.base_shapes, plan.read_outs) == ({}, {})


def test_a_tied_head_has_its_input_scaled() -> None:
    model = decoder(32, tied_head=True)
    plan = lt.parametrize(model, TOKENS, base=decoder(8, tied_head=True))
    assert plan.read_outs == {"head": 0.25}
    assert "the input of head × 0.25" in str(plan)
    hidden = torch.randn(2, 32, dtype=torch.float64)
    assert torch.allclose(model.head(hidden), hidden / 4 @ model.embedding.weight.T)
    assert torch.allclose(model.head(input=hidden), hidden / 4 @ model.embedding.weight.T)
    with pytest.raises(lt.InputError, match="head shares its weight"):
        lt.fold(model)


def test_the_widths_stay_with_copies_and_with_a_plan_from_text() -> None:
    model = decoder(32)
    plan = lt.parametrize(model, TOKENS, base=decoder(8))
    assert lt.ScalingPlan.from_json(plan.to_json()) == plan
    fresh = decoder(32)
    fresh.load_state_dict(model.state_dict())
    lt.apply_plan(fresh, lt.ScalingPlan.from_json(plan.to_json()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(TOKENS), model(TOKENS))
        factors = {group["name"]: group["lr_factor"] for group in lt.param_groups(other, "adamw", lr=1.0)}
        assert factors["branches, width × 4"] == pytest.approx(0.25 / math.sqrt(2))


def test_a_plan_is_refused_for_a_model_without_its_head_which_stays_as_it_is() -> None:
    plan = lt.parametrize(decoder(32), TOKENS, base=decoder(8))
    model = decoder(32)
    model.read_out = model.head
    del model.head
    with pytest.raises(lt.InputError, match="the plan names head"):
        lt.apply_plan(model, plan)
    assert type(model.layers[0].mlp) is type(decoder(32).layers[0].mlp)


def test_folding_puts_the_factor_of_the_head_into_its_weights() -> None:
    model = decoder(32)
    lt.parametrize(model, TOKENS, base=decoder(8))
    before = model(TOKENS)
    lt.fold(model)
    assert type(model.head) is nn.Linear
    assert torch.allclose(model(TOKENS), before, rtol=1e-12)


def test_verify_misses_the_factor_of_a_head_that_was_replaced() -> None:
    model = decoder(32)
    lt.parametrize(model, TOKENS, base=decoder(8))
    lt.verify(model, TOKENS)
    model.head = nn.Linear(32, 256, bias=False).double()
    with pytest.raises(lt.VerificationError, match=r"head: the factor 0\.25 on its input is gone"):
        lt.verify(model, TOKENS)


class Functional(nn.Module):
    """Its head is a matrix that no module owns the use of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.f = nn.Embedding(7, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for _ in range(2):
            h = h + self.f(torch.tanh(h))
        return h @ self.embedding.weight.T


class Residual(nn.Module):
    """The width of its input is its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.linear(x)
        return x


@pytest.mark.parametrize(
    ("model", "base", "inputs", "message"),
    [
        (lambda: decoder(32, 2), decoder(16, 2), TOKENS, r"over 16 numbers, and over 8 in base: the head dim"),
        (lambda: decoder(32), decoder(8, layers=1), TOKENS, "do not have the same parameters"),
        (lambda: Functional(8), Functional(4), TOKENS % 7, r"head = nn\.Linear\(…\); head\.weight = embedding\.weight"),
        (lambda: decoder(32), 8, TOKENS, "base is 8; give the model at its base width"),
        (lambda: decoder(32), lambda: None, TOKENS, "give the model at its base width"),
        (lambda: decoder(32).to("meta"), decoder(8), TOKENS, "on the meta device there are none"),
        (lambda: mup.set_base_shapes(decoder(32), None, do_assert=False), decoder(8), TOKENS, "leave base out"),
        (lambda: Residual(32), Residual(8), torch.ones(2, 32), "base: the model rejects the example inputs"),
    ],
)
def test_a_base_that_tells_no_widths_is_refused_and_nothing_changes(
    model: Callable[[], nn.Module], base: Any, inputs: Tensor, message: str
) -> None:
    target = model()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(lt.InputError, match=message):
        lt.parametrize(target, inputs, base=base)
    if not any(tensor.is_meta for tensor in before.values()):
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_trained_weights_and_a_base_exclude_each_other() -> None:
    with pytest.raises(lt.InputError, match="preserve=True keeps trained weights"):
        lt.parametrize(decoder(32), TOKENS, base=decoder(8), preserve=True)


def test_a_matrix_of_a_branch_that_grows_in_fan_in_alone_is_a_read_out_too() -> None:
    """A router, keys of a fixed number of heads: μP has 1/width on what they read."""

    class Gated(Tower):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.gate = nn.Linear(width, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.read_in(x)
            for _ in range(2):
                h = h + self.f(h) * self.gate(h).softmax(-1)[..., :1]
            logits: Tensor = self.out(h)
            return logits

    plan = lt.parametrize(Gated(32), X, base=Gated(16))
    assert plan.read_outs == {"gate": 0.5, "out": 0.5}
