import copy
import io
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


def run(model: nn.Module, *args: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(*args)


# -- the same function


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_model_is_a_plain_one_that_computes_what_its_multipliers_computed(name: str, training: bool) -> None:
    plain, x = build(name).train(training), inputs(2, 4, WIDTH)
    model, attributes = copy.deepcopy(plain), [set(vars(module)) for module in plain.modules()]
    plan = lt.parametrize(model, x, lam=0.7, base_layers=3)
    result, parameters = run(model, x), [id(parameter) for parameter in model.parameters()]
    lt.fold(model)
    torch.testing.assert_close(run(model, x), result, rtol=1e-12, atol=1e-12)
    epsilon = {key: branch.multiplier for branch in plan.branches for key in branch.last_map}
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, plain.get_parameter(key) * epsilon.get(key, 1.0), rtol=1e-14, atol=0, msg=key)
    assert set(epsilon) == (FOLDABLE[name][1] or set(epsilon))
    assert all(branch.last_map for branch in plan.branches)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [set(vars(module)) for module in model.modules()] == attributes
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(plain, x), run(model, x))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(["factored", "completep", "sqrt", "unscaled"]),
    layers=st.integers(1, 3),
    loops=st.integers(1, 5),
    prelude=st.integers(0, 1),
    lam=st.floats(0.05, 20),
    base_layers=st.integers(1, 12),
)
def test_a_decoder_of_any_size_and_rule_folds(
    rule: Rule, layers: int, loops: int, prelude: int, lam: float, base_layers: int
) -> None:
    scaled = noisy(small_decoder(layers, loops, prelude), std=0.1)
    folded = copy.deepcopy(scaled)
    for model in (scaled, folded):
        lt.parametrize(model, tokens(), rule, lam, base_layers)
    lt.fold(folded)
    torch.testing.assert_close(folded(tokens()), scaled(tokens()), rtol=1e-12, atol=1e-12)


# -- undone


@pytest.mark.parametrize("name", FOLDABLE)
def test_multipliers_that_are_removed_leave_no_bit_changed(name: str) -> None:
    plain, x = build(name), inputs(2, 4, WIDTH)
    model = copy.deepcopy(plain)
    attributes = [set(vars(module)) for module in plain.modules()]
    lt.parametrize(model, x)
    assert not torch.equal(run(model, x), run(plain, x))
    lt.remove(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(run(model, x), run(plain, x))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_the_fused_path_of_a_transformer_layer_comes_back_with_fold_and_with_remove() -> None:
    for undo in (lt.fold, lt.remove):
        torch.manual_seed(0)
        model = Looped([nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)]).double().eval()
        x, usual = inputs(2, 3, WIDTH), model.blocks[0].activation_relu_or_gelu
        lt.parametrize(model, x)
        assert model.blocks[0].activation_relu_or_gelu == 0
        undo(model)
        assert model.blocks[0].activation_relu_or_gelu == usual


# -- preserve=True


@pytest.mark.parametrize("name", FOLDABLE)
def test_preserve_leaves_the_function_as_it_was(name: str) -> None:
    plain, x = build(name), inputs(2, 4, WIDTH)
    model = copy.deepcopy(plain)
    plan = lt.parametrize(model, x, lam=0.7, preserve=True)
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-12, atol=1e-12)
    assert any(branch.multiplier != 1 for branch in plan.branches)
    assert lt.verify(model, x) == plan
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


class SkipInside(nn.Module):
    """y + l(y): the first map reaches the stream past the second and through it."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.tanh())
        return y + self.second(self.between(y))


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
    "a map on what another made": (lambda: BranchLoop(SkipInside(lambda y: y)), "fed by another"),
    "a map and an activation on it": (lambda: BranchLoop(SkipInside(torch.tanh)), "fed by another"),
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


def preserve(model: nn.Module) -> None:
    lt.parametrize(model, inputs(2, 4, WIDTH), preserve=True)


@pytest.mark.parametrize("change", [lt.fold, preserve])
@pytest.mark.parametrize("name", UNFOLDABLE)
def test_a_branch_that_cannot_take_epsilon_into_its_weights_is_refused_and_nothing_is_changed(
    name: str, change: Callable[[nn.Module], None]
) -> None:
    model, x = unfoldable(name), inputs(2, 4, WIDTH)
    if change is lt.fold:
        lt.parametrize(model, x)
    before, result = weights(model), run(model.eval(), x)
    with pytest.raises(lt.InputError, match=rf"the branch f cannot .*{UNFOLDABLE[name][1]}"):
        change(model)
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert torch.equal(run(model, x), result)


def test_what_cannot_be_folded_is_multiplied_all_the_same() -> None:
    for name in UNFOLDABLE:
        model, x = unfoldable(name).eval(), inputs(2, 4, WIDTH)
        plain = copy.deepcopy(model)
        plan = lt.parametrize(model, x)
        assert plan.branches[0].last_map == ()
        assert plan.branches[0].unfoldable
        assert (model(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("change", [lt.fold, lt.remove])
def test_a_model_that_is_plain_is_neither_folded_nor_freed_of_multipliers(change: Callable[[nn.Module], Any]) -> None:
    model = small_decoder()
    with pytest.raises(lt.InputError, match=r"not rewritten; call looptransfer\.parametrize"):
        change(model)
    lt.parametrize(model, tokens())
    change(model)
    with pytest.raises(lt.InputError, match="not rewritten"):
        change(model)
    assert lt.parametrize(model, tokens()).branches


def test_weights_do_not_follow_a_random_loop_count() -> None:
    model = small_decoder()
    lt.parametrize(model, tokens(), loops=2.5)
    with pytest.raises(lt.InputError, match="loop count is random"):
        lt.fold(model)


@pytest.mark.parametrize("scaled", [(True, True), (True, False), (False, True)], ids=str)
def test_checkpoints_keep_the_keys_of_a_plain_model(scaled: tuple[bool, bool]) -> None:
    source, target = (noisy(small_decoder(), seed=seed, std=0.1) for seed in (1, 2))
    for model, rewritten in zip((source, target), scaled, strict=True):
        if rewritten:
            lt.parametrize(model, tokens())
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert torch.equal(target(tokens()), source(tokens())) == (scaled[0] == scaled[1])


# -- changed after the rewrite


def tied_elsewhere(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(f"layers.0.mlp.{name}.weight")
    model.extra = nn.Linear(*weight.shape[::-1])
    model.extra.weight = weight


def tie(model: nn.Module) -> None:
    tied_elsewhere(model, "down")


def replace(model: nn.Module) -> None:
    model.layers[0].mlp = copy.deepcopy(small_decoder().layers[0].mlp)  # type: ignore[union-attr,index]


def replace_part(model: nn.Module) -> None:
    down = model.layers[0].mlp.down  # type: ignore[union-attr,index]
    model.layers[0].mlp.down = Shifted(down.in_features, down.out_features, bias=False)  # type: ignore[union-attr,index]


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hook(model: nn.Module) -> None:
    model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 1)  # type: ignore[union-attr,index]


def grow(model: nn.Module) -> None:
    model.layers[0].mlp.down.scale = nn.Linear(2, 2)  # type: ignore[union-attr,index]


def bias(model: nn.Module) -> None:
    model.layers[0].mlp.down.bias = nn.Parameter(torch.ones(8))  # type: ignore[union-attr,index]


def patch(model: nn.Module) -> None:
    down = model.layers[0].mlp.down  # type: ignore[union-attr,index]
    down.forward = lambda x: F.linear(x, down.weight) + 1


def exchange_hooks(model: nn.Module) -> None:
    mlp = model.layers[1].mlp  # type: ignore[union-attr,index]
    mlp._forward_hooks.clear()
    mlp.register_forward_hook(lambda module, args, output: output + 1)


def share(model: nn.Module) -> None:
    model.extra = model.layers[0].mlp.down  # type: ignore[union-attr,index]


def tie_memory(model: nn.Module) -> None:
    model.layers[1].mlp.down.weight.data = model.layers[0].mlp.down.weight.data  # type: ignore[union-attr,index]


def activate(model: nn.Module) -> None:
    model.layers[0].drop = nn.Tanh()  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tie, r"layers.0.mlp.down.weight \(held 1× then; held 2× now\)"),
        (share, r"layers.0.mlp.down.weight \(held 1× then; held 2× now\)"),
        (replace, r"the branch layers.0.mlp no longer has its ε"),
        (replace_part, r"layers.0.mlp.down \(torch.*Linear, weight \(8, 24\) then; .*Shifted, weight \(8, 24\) now\)"),
        (bias, r"layers.0.mlp.down \(.*weight \(8, 24\) then; .*, bias \(8,\), weight \(8, 24\) now\)"),
        (patch, r"layers.0.mlp.down \(.* then; .*, forward = patch.<locals>.<lambda> now\)"),
        (hook, r"layers.0.mlp \(.* then; .*, hook hook.<locals>.<lambda> now\)"),
        (exchange_hooks, r"layers.1.mlp \(.*, hook observe then; .*, hook exchange_hooks.<locals>.<lambda> now\)"),
        (grow, r"layers.0.mlp.down.scale \(absent then; .*Linear.* now\)"),
        (activate, r"layers.0.drop \(absent then; .*Tanh now\)"),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_a_branch_that_was_changed_after_the_rewrite_is_not_folded(
    change: Callable[[nn.Module], None], message: str, copied: bool
) -> None:
    model: nn.Module = small_decoder()
    model.layers[1].mlp.register_forward_hook(observe)  # type: ignore[union-attr,index]
    lt.parametrize(model, tokens())
    model = copy.deepcopy(model) if copied else model
    change(model)
    result = model(tokens())
    with pytest.raises(lt.InputError, match=f"{message}.*parametrize a fresh model as it is now"):
        lt.fold(model)
    assert torch.equal(model(tokens()), result)


def observe(module: nn.Module, args: Any, output: Tensor) -> None:
    """What a user hung on a module before the rewrite."""


def test_weights_that_came_to_share_their_memory_are_not_folded() -> None:
    model = small_decoder()
    lt.parametrize(model, tokens())
    tie_memory(model)
    with pytest.raises(lt.InputError, match="two parameters in one memory"):
        lt.fold(model)


@pytest.mark.parametrize(("place", "told"), [("meta", "on the meta device"), ("inference", "an inference tensor")])
def test_weights_that_cannot_be_written_are_refused_before_anything_is_changed(place: str, told: str) -> None:
    model = small_decoder()
    lt.parametrize(model, tokens())
    with torch.inference_mode(place == "inference"):
        for parameter in list(model.layers[0].parameters()):
            parameter.data = parameter.data.clone()
        model.layers[0].mlp.down.weight = nn.Parameter(  # type: ignore[union-attr]
            torch.ones(8, 24, device="meta" if place == "meta" else "cpu")
        )
    with pytest.raises(lt.InputError, match=rf"fold: layers.0.\S+ takes ε and is {told}"):
        lt.fold(model)
    with pytest.raises(lt.InputError, match="rewritten already"):
        lt.parametrize(model, tokens())


@pytest.mark.parametrize("change", [lt.fold, lt.remove])
def test_a_branch_that_was_compiled_by_itself_keeps_its_multipliers(change: Callable[[nn.Module], Any]) -> None:
    model = small_decoder()
    lt.parametrize(model, tokens())
    model.layers[0].mlp.compile(backend="eager")
    result = model(tokens())
    with pytest.raises(lt.InputError, match=r"was compiled by its own compile\(\)"):
        change(model)
    torch.testing.assert_close(model(tokens()), result)


def test_changes_that_do_not_reach_a_last_map_do_not_keep_a_model_from_being_folded() -> None:
    model = small_decoder()
    lt.parametrize(model, tokens())
    tied_elsewhere(model, "up")
    model.register_forward_hook(lambda module, args, output: None)
    result = model(tokens())
    lt.fold(model)
    torch.testing.assert_close(model(tokens()), result)


def test_a_model_that_was_rescaled_is_folded_as_it_is_then() -> None:
    model, x = small_decoder(loops=2), tokens()
    lt.parametrize(model, x)
    model.loops = 4
    lt.rescale(model, x)
    result = model(x)
    lt.fold(model)
    torch.testing.assert_close(model(x), result)
