import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from looptransfer.rules import Rule
from tests import models
from tests.models import WIDTH, Looped, inputs, noisy, small_decoder, tokens

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, 0.1),
    "Adam": (torch.optim.Adam, {}, 3e-3),
    "AdamW": (torch.optim.AdamW, {}, 3e-3),
}


class BranchLoop(nn.Module):
    """h = h + f(h), any f."""

    def __init__(self, f: nn.Module, loops: int = 3) -> None:
        super().__init__()
        self.f, self.loops = f, loops

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = h + self.f(h)
        return h


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gamma = models.mlp(), nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gamma


class ReZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.alpha = models.mlp(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * self.inner(x)


class BiasApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.weight + self.bias


class Convolution(nn.Module):
    """Along the second last dimension, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Conv1d(WIDTH, 12, 3, padding=1), nn.Conv1d(12, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(self.norm(x).transpose(-1, -2)))).transpose(-1, -2)


class MixtureOfExperts(nn.Module):
    """Every token to its best two experts, collected with index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


class StackedExperts(nn.Module):
    """All experts in one batched product, mixed by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(3, WIDTH, 12) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(3, 12, WIDTH) / 12**0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, WIDTH).expand(3, -1, -1)
        out = torch.bmm(F.gelu(torch.bmm(flat, self.up)), self.down)
        return (out * self.router(flat[0]).softmax(-1).T[..., None]).sum(0).view_as(x)


def normed_at_the_end(affine: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH, elementwise_affine=affine))


def sandwich() -> nn.Module:
    return nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH))


# What folds: how to build it, and the end of the names of what ε goes into (None: every branch's own)
FOLDABLE: dict[str, tuple[Callable[[], nn.Module], set[str] | None]] = {
    "mlp": (models.ResidualMLP, {"f.3.weight", "f.3.bias"}),
    "parallel": (lambda: Looped([models.ParallelBlock(), models.ParallelBlock()]), None),
    "dropout": (lambda: Looped([models.DropoutBlock(), models.DropoutBlock()]), None),
    "tuple": (lambda: Looped([models.TupleBlock(), models.TupleBlock()]), None),
    "mapping": (lambda: Looped([models.DictBlock(), models.DictBlock()]), None),
    "shared modules": (lambda: shared("ABAB"), None),
    "ALBERT": (lambda: Looped([models.AlbertBlock()]), None),
    "input injection": (models.InjectedMLP, {"f.3.weight", "f.3.bias"}),
    "a norm with gain at the end": (lambda: BranchLoop(normed_at_the_end()), {"f.2.weight", "f.2.bias"}),
    "a norm at both ends": (lambda: BranchLoop(sandwich()), {"f.2.weight"}),
    "LayerScale": (lambda: BranchLoop(LayerScale()), {"f.gamma"}),
    "ReZero": (lambda: BranchLoop(ReZero()), {"f.alpha"}),
    "a bias added apart": (lambda: BranchLoop(BiasApart()), {"f.weight", "f.bias"}),
    "convolution": (lambda: BranchLoop(Convolution()), {"f.narrow.weight", "f.narrow.bias"}),
    "experts": (
        lambda: BranchLoop(MixtureOfExperts()),
        {f"f.experts.{number}.2.{name}" for number in range(3) for name in ("weight", "bias")},
    ),
    "stacked experts": (lambda: BranchLoop(StackedExperts()), {"f.down"}),
}


def shared(order: str) -> nn.Module:
    blocks = {letter: models.MLPBlock() for letter in sorted(set(order))}
    return Looped([blocks[letter] for letter in order], loops=2)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return noisy(FOLDABLE[name][0](), std=0.1)


def folded_names(plan: lt.ScalingPlan) -> set[str]:
    return {name for branch in plan.branches for name in branch.last_map}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def without_epsilon(model: nn.Module, plan: lt.ScalingPlan) -> dict[str, Tensor]:
    """The weights that a folded model stands for."""
    epsilon = {name: branch.multiplier for branch in plan.branches for name in branch.last_map}
    return {name: parameter.detach() / epsilon.get(name, 1.0) for name, parameter in model.named_parameters()}


def run(model: nn.Module, *args: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(*args)


# -- the same function


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_model_computes_what_its_multipliers_compute(name: str, training: bool) -> None:
    model, x = build(name).train(training), inputs(2, 4, WIDTH)
    plan = lt.parametrize(model, x, lam=0.7, base_layers=3)
    scaled, before = copy.deepcopy(model), run(model, x)
    folded = lt.fold(model)
    assert (plan.realisation, folded.realisation) == ("multiplier", "folded")
    torch.testing.assert_close(run(model, x), before, rtol=1e-12, atol=1e-12)
    for key, value in without_epsilon(model, folded).items():
        torch.testing.assert_close(value, scaled.get_parameter(key), rtol=1e-14, atol=0, msg=key)
    assert folded_names(plan) == (FOLDABLE[name][1] or folded_names(plan))
    assert all(branch.last_map for branch in plan.branches)
    lt.verify(model, x)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(["factored", "sqrt", "unscaled"]),
    layers=st.integers(1, 3),
    loops=st.integers(1, 5),
    prelude=st.integers(0, 1),
    lam=st.floats(0.05, 20),
    base_layers=st.integers(1, 12),
)
def test_folded_at_once_or_later_a_decoder_is_the_same(
    rule: Rule, layers: int, loops: int, prelude: int, lam: float, base_layers: int
) -> None:
    scaled = noisy(small_decoder(layers, loops, prelude), std=0.1)
    at_once, later = copy.deepcopy(scaled), copy.deepcopy(scaled)
    lt.parametrize(scaled, tokens(), rule, lam, base_layers)
    lt.parametrize(later, tokens(), rule, lam, base_layers)
    plan = lt.parametrize(at_once, tokens(), rule, lam, base_layers, realisation="folded")
    assert lt.fold(later) == plan
    torch.testing.assert_close(at_once(tokens()), scaled(tokens()), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), later.parameters(), strict=True))


def test_a_folded_model_is_made_of_the_plain_classes_and_adds_nothing_to_the_forward() -> None:
    model, plain = noisy(small_decoder(), std=0.1), small_decoder()
    lt.parametrize(model, tokens(), realisation="folded")
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    plain.double().load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens()), model(tokens()))


def test_folding_keeps_the_parameter_objects_and_what_an_optimizer_holds_of_them() -> None:
    model = noisy(small_decoder())
    lt.parametrize(model, tokens())
    held = [id(parameter) for parameter in model.parameters()]
    lt.fold(model)
    lt.unfold(model)
    assert [id(parameter) for parameter in model.parameters()] == held


def test_a_folded_plan_says_so_when_printed() -> None:
    plan = lt.parametrize(small_decoder(), tokens(), realisation="folded")
    assert "the multipliers are in the weights of the branches' last maps" in str(plan)


# -- the same training


class Trainee(nn.Module):
    """Biases, gains, a learned factor and a convolution at the branches' ends, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.prelude = models.MLPBlock()
        self.stack = Looped([models.ParallelBlock(), models.ParallelBlock()])
        self.others = Looped([BranchLoop(f, 1) for f in (normed_at_the_end(), LayerScale(), BiasApart())], 2)
        self.convolution = BranchLoop(Convolution(), 2)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.prelude(self.embedding(tokens))
        return self.head(self.norm(self.convolution(self.others(self.stack(x)))))


TRAINEES: dict[str, Callable[[], nn.Module]] = {
    "decoder": lambda: small_decoder(layers=2, loops=3, prelude=1),
    "everything": Trainee,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 50) -> list[float]:
    losses = []
    for step in range(steps):
        given, wanted = tokens(seed=2 * step), tokens(seed=2 * step + 1)
        loss = F.cross_entropy(model(given).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("trainee", TRAINEES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_folded_weights_train_as_multiplied_branches_do(name: str, trainee: str) -> None:
    optimizer, given, lr = OPTIMIZERS[name]
    torch.manual_seed(0)
    scaled = noisy(TRAINEES[trainee](), std=0.1)
    folded, start = copy.deepcopy(scaled), weights(scaled)
    losses = []
    for model, realisation in ((scaled, "multiplier"), (folded, "folded")):
        plan = lt.parametrize(model, tokens(), lam=1.7, base_layers=3, realisation=realisation)
        groups = lt.param_groups(model, optimizer, lr=lr, weight_decay=0.1, eps=1e-5)
        losses.append(train(model, optimizer(groups, **given)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    effective = without_epsilon(folded, plan)
    for key, value in scaled.named_parameters():
        assert (value - start[key]).abs().max() > 1e-4, key
        torch.testing.assert_close(effective[key], value.detach(), rtol=1e-9, atol=1e-9, msg=key)


def test_the_groups_of_a_folded_model_are_told_apart_by_their_multiplier() -> None:
    model = small_decoder(layers=2, loops=3, prelude=1)
    plan = lt.parametrize(model, tokens(), realisation="folded")
    groups = lt.param_groups(model, torch.optim.AdamW, lr=1.0, weight_decay=0.1)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    named = {f"branches, folded ε = {branch.multiplier:.6g}" for branch in plan.branches}
    assert len(named) == 2
    assert named <= set(names)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# -- undone


@pytest.mark.parametrize("name", FOLDABLE)
def test_unfold_gives_the_weights_and_the_plan_back(name: str) -> None:
    model, x = build(name), inputs(2, 4, WIDTH)
    plan = lt.parametrize(model, x, lam=0.7)
    before, out = weights(model), run(model, x)
    lt.fold(model)
    assert lt.unfold(model) == plan
    for key, value in weights(model).items():
        torch.testing.assert_close(value, before[key], rtol=1e-15, atol=0, msg=key)
    torch.testing.assert_close(run(model, x), out, rtol=1e-12, atol=1e-12)
    lt.verify(model, x)


@pytest.mark.parametrize("realisation", ["multiplier", "folded"])
@pytest.mark.parametrize("name", FOLDABLE)
def test_remove_gives_the_plain_model_back(name: str, realisation: Any) -> None:
    plain, x = build(name), inputs(2, 4, WIDTH)
    model = copy.deepcopy(plain)
    state = [set(vars(module)) for module in plain.modules()]
    lt.parametrize(model, x, realisation=realisation)
    lt.remove(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [set(vars(module)) for module in model.modules()] == state
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-12, atol=1e-12)
    assert "looptransfer" not in str(model.state_dict()._metadata)
    with pytest.raises(lt.InputError, match="not rewritten"):
        lt.remove(model)
    assert lt.parametrize(model, x, realisation=realisation).branches


def test_multipliers_that_are_removed_leave_no_bit_changed() -> None:
    plain = noisy(small_decoder())
    model = copy.deepcopy(plain)
    lt.parametrize(model, tokens())
    assert not torch.equal(model(tokens()), plain(tokens()))
    lt.remove(model)
    assert torch.equal(model(tokens()), plain(tokens()))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_the_fused_path_of_a_transformer_layer_comes_back_with_fold_and_with_remove() -> None:
    torch.manual_seed(0)
    model = Looped([nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)]).double().eval()
    x, usual = inputs(2, 3, WIDTH), model.blocks[0].activation_relu_or_gelu
    lt.parametrize(model, x)
    assert model.blocks[0].activation_relu_or_gelu == 0
    scaled = model(x)
    for undo in (lt.fold, lt.unfold, lt.remove):
        undo(model)
        assert model.blocks[0].activation_relu_or_gelu == (0 if undo is lt.unfold else usual)
        if undo is not lt.remove:
            with torch.no_grad():
                torch.testing.assert_close(model(x), scaled, rtol=1e-12, atol=1e-12)


# -- preserve=True


@pytest.mark.parametrize("realisation", ["multiplier", "folded"])
@pytest.mark.parametrize("name", FOLDABLE)
def test_preserve_leaves_the_function_as_it_was(name: str, realisation: Any) -> None:
    plain, x = build(name), inputs(2, 4, WIDTH)
    model = copy.deepcopy(plain)
    plan = lt.parametrize(model, x, lam=0.7, preserve=True, realisation=realisation)
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-12, atol=1e-12)
    assert any(branch.multiplier != 1 for branch in plan.branches)
    assert lt.verify(model, x) == plan
    if realisation == "multiplier":
        for branch in plan.branches:
            for key in branch.last_map:
                expected = plain.get_parameter(key) / branch.multiplier
                torch.testing.assert_close(model.get_parameter(key), expected, rtol=1e-14, atol=0, msg=key)


# -- what cannot be folded


class TiedInTheEnd(nn.Module):
    """The branch's last matrix is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.f.weight

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = h + self.f(h.tanh())
        return self.head(h)


class ComputedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm())


class WithItself(nn.Module):
    """A product of the last map's output and something that is made of it."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.map, self.product = nn.Linear(WIDTH, WIDTH), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.map(x.tanh()), x)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "its norm": lambda y, _: y / y.norm(),
    "its norm on the left": lambda y, _: y.pow(2).mean(-1, keepdim=True).rsqrt() * y,
    "F.normalize": lambda y, _: F.normalize(y, dim=-1),
    "its gate": lambda y, _: F.dropout(y, 0.1) * y.sigmoid(),
    "attention with keys for values": lambda y, x: (x @ y.transpose(1, 2)).softmax(-1) @ y,
    "fused attention with keys for values": lambda y, x: F.scaled_dot_product_attention(x, y, y),
}


class WeightPerVisit(nn.Module):
    """A matrix of low rank on the last map, put in by functional_call."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.low = models.mlp(), nn.Parameter(torch.randn(3, WIDTH, 1))

    def forward(self, h: Tensor) -> Tensor:
        for low in self.low:
            own = {"3.weight": self.f[3].weight + low @ self.f[3].weight.mean(0, keepdim=True)}
            h = h + torch.func.functional_call(self.f, own, (h,))
        return h


class LaterLayersShareTheWeights(nn.Module):
    """Hugging Face style: distinct modules with the same parameters, so that each has its place in a KV cache."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = models.mlp(), models.mlp()
        for first, later in zip(self.f, self.g, strict=True):
            for name, parameter in first.named_parameters(recurse=False):
                setattr(later, name, parameter)

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = h + self.f(h)
            h = h + self.g(h)
        return h


UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm without gain": (lambda: BranchLoop(normed_at_the_end(affine=False)), "a norm without gain"),
    "an activation": (models.BareMLP, "does not end in a learned map"),
    "a tied weight": (TiedInTheEnd, r"f\.weight of its last map is used elsewhere too"),
    "two branches' weight": (LaterLayersShareTheWeights, r"f\.3\.bias, f\.3\.weight of its last map is used elsewhere"),
    **{
        name: (lambda p=product: BranchLoop(WithItself(p)), "does not end in a learned")
        for name, product in PRODUCTS.items()
    },
    "a computed weight": (lambda: BranchLoop(ComputedWeight()), "computed from its parameters"),
    "a weight put in for the call": (WeightPerVisit, "computed from its parameters"),
    "spectral norm": (
        lambda: BranchLoop(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
        "computed from its parameters",
    ),
}


def unfoldable(name: str) -> nn.Module:
    torch.manual_seed(0)
    return UNFOLDABLE[name][0]().double()


@pytest.mark.parametrize("way", ["fold", "realisation", "preserve"])
@pytest.mark.parametrize("name", UNFOLDABLE)
def test_a_branch_that_cannot_take_epsilon_into_its_weights_is_refused_and_nothing_is_changed(
    name: str, way: str
) -> None:
    model, x = unfoldable(name), inputs(2, 4, WIDTH)
    if way == "fold":
        lt.parametrize(model, x)
    before, out = weights(model), run(model.eval(), x)
    classes = [type(module) for module in model.modules()]
    what = {"fold": "fold", "realisation": "realisation='folded'", "preserve": "preserve=True"}[way]
    change: Callable[[], Any] = {
        "fold": lambda: lt.fold(model),
        "realisation": lambda: lt.parametrize(model, x, realisation="folded"),
        "preserve": lambda: lt.parametrize(model, x, preserve=True),
    }[way]
    why = rf"^{what}: the branch f cannot .*{UNFOLDABLE[name][1]}.*Keep realisation='multiplier'"
    with pytest.raises(lt.InputError, match=why):
        change()
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert torch.equal(run(model, x), out)


def test_what_cannot_be_folded_is_multiplied_all_the_same() -> None:
    for name in UNFOLDABLE:
        model, x = unfoldable(name).eval(), inputs(2, 4, WIDTH)
        plain = copy.deepcopy(model)
        plan = lt.parametrize(model, x)
        assert plan.branches[0].last_map == ()
        assert plan.branches[0].unfoldable
        assert (model(x) - plain(x)).abs().max() > 1e-3


def test_folding_twice_is_refused_and_names_unfold() -> None:
    model = noisy(small_decoder())
    lt.parametrize(model, tokens(), realisation="folded")
    before = weights(model)
    with pytest.raises(lt.InputError, match=r"folded already; a second ε .*unfold\(model\)"):
        lt.fold(model)
    with pytest.raises(lt.InputError, match=r"rewritten already, .*looptransfer\.remove\(model\)"):
        lt.parametrize(model, tokens())
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_unfolding_what_is_not_folded_is_refused_and_names_fold() -> None:
    model = small_decoder()
    lt.parametrize(model, tokens())
    with pytest.raises(lt.InputError, match=r"not folded into the weights; fold\(model\) does that"):
        lt.unfold(model)


@pytest.mark.parametrize("change", [lt.fold, lt.unfold, lt.remove])
def test_a_model_that_was_not_rewritten_is_told_to_be(change: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(lt.InputError, match=r"not rewritten; call looptransfer\.parametrize"):
        change(small_decoder())


def test_weights_do_not_follow_a_random_loop_count() -> None:
    model = small_decoder()
    with pytest.raises(lt.InputError, match="random loop count; use 'multiplier'"):
        lt.parametrize(model, tokens(), loops=2.5, realisation="folded")
    lt.parametrize(model, tokens(), loops=2.5)
    with pytest.raises(lt.InputError, match=r"loop count is random.*keep the multipliers"):
        lt.fold(model)


def test_an_unknown_realisation_is_refused() -> None:
    with pytest.raises(lt.InputError, match="realisation is 'both'; choose multiplier or folded"):
        lt.parametrize(small_decoder(), tokens(), realisation="both")  # type: ignore[arg-type]


# -- checkpoints


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


def decoder(realisation: Any = None, seed: int = 0, **given: Any) -> nn.Module:
    model = noisy(small_decoder(), seed=seed, std=0.1)
    if realisation:
        lt.parametrize(model, tokens(), realisation=realisation, **given)
    return model


@pytest.mark.parametrize(
    ("saved", "into"), [(None, "multiplier"), ("multiplier", None), ("multiplier", "multiplier"), ("folded", "folded")]
)
def test_a_checkpoint_that_fits_is_loaded(saved: Any, into: Any) -> None:
    source, target = decoder(saved, seed=1), decoder(into)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(through_a_file(source.state_dict()))
    if saved == into:
        assert torch.equal(target(tokens()), source(tokens()))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_a_folded_checkpoint_serves_a_plain_model() -> None:
    source, plain = decoder("folded", seed=1), decoder()
    plain.load_state_dict(through_a_file(source.state_dict()))
    assert torch.equal(plain(tokens()), source(tokens()))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["itself", "inside another"])
@pytest.mark.parametrize(
    ("saved", "into", "why"),
    [
        (
            "folded",
            "multiplier",
            r"ε folded into its weights.*count twice.*fold\(model\), load it, and unfold\(model\)",
        ),
        (None, "folded", r"holds plain weights.*unfold\(model\), load .*, and fold\(model\)"),
        ("multiplier", "folded", r"holds plain weights.*unfold\(model\), load .*, and fold\(model\)"),
    ],
)
def test_a_checkpoint_in_which_epsilon_would_count_twice_or_not_at_all_is_refused(
    saved: Any, into: Any, why: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    source, target = wrap(decoder(saved, seed=1)), wrap(decoder(into))
    before = weights(target)
    with pytest.raises(lt.InputError, match=why):
        target.load_state_dict(through_a_file(source.state_dict()))
    assert all(torch.equal(value, before[key]) for key, value in weights(target).items())


def test_the_way_out_that_the_refusal_names_works() -> None:
    folded, target = decoder("folded", seed=1), decoder("multiplier")
    lt.fold(target)
    target.load_state_dict(through_a_file(folded.state_dict()))
    lt.unfold(target)
    torch.testing.assert_close(target(tokens()), folded(tokens()), rtol=1e-12, atol=1e-12)
    plain, target = decoder(seed=2), decoder("folded")
    lt.unfold(target)
    target.load_state_dict(through_a_file(plain.state_dict()))
    lt.fold(target)
    lt.parametrize(plain, tokens())
    torch.testing.assert_close(target(tokens()), plain(tokens()), rtol=1e-12, atol=1e-12)


def test_a_checkpoint_with_other_multipliers_folded_in_is_refused() -> None:
    source, target = decoder("folded", seed=1, lam=2.0), decoder("folded")
    with pytest.raises(lt.InputError, match=r"weights with other multipliers"):
        target.load_state_dict(through_a_file(source.state_dict()))


def test_unfolded_and_removed_models_stamp_their_checkpoints_anew() -> None:
    model = decoder("folded", seed=1)
    lt.unfold(model)
    decoder("multiplier").load_state_dict(through_a_file(model.state_dict()))
    lt.remove(model)
    decoder("multiplier").load_state_dict(through_a_file(model.state_dict()))
    with pytest.raises(lt.InputError, match="plain weights"):
        decoder("folded").load_state_dict(through_a_file(model.state_dict()))


def test_a_copy_of_a_folded_model_is_folded() -> None:
    model = decoder("folded", seed=1)
    twin = copy.deepcopy(model)
    with pytest.raises(lt.InputError, match="folded already"):
        lt.fold(twin)
    with pytest.raises(lt.InputError, match="count twice"):
        decoder("multiplier").load_state_dict(twin.state_dict())
    lt.unfold(twin)
    with pytest.raises(lt.InputError, match="folded already"):
        lt.fold(model)
    twin.load_state_dict(decoder().state_dict())  # a hook of its own


def test_a_state_dict_without_metadata_is_loaded_into_a_folded_model_with_a_warning() -> None:
    source, target = decoder("folded", seed=1), decoder("folded")
    with pytest.warns(lt.ScalingWarning, match=r"does not tell whether ε is folded.*unfold\(model\)"):
        target.load_state_dict(dict(source.state_dict()))
    assert torch.equal(target(tokens()), source(tokens()))
    unfolded = decoder("multiplier")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfolded.load_state_dict(dict(decoder().state_dict()))


def test_a_model_rewritten_with_preserve_loads_its_own_checkpoints() -> None:
    source = decoder("multiplier", seed=1, preserve=True)
    target = decoder("multiplier")
    target.load_state_dict(through_a_file(source.state_dict()))
    assert torch.equal(target(tokens()), source(tokens()))
