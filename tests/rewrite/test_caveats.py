import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from tests import models
from tests.models import WIDTH, Looped, inputs, line_of, noisy, small_decoder, tokens
from tests.rewrite.answers import Residual, planned

X = inputs(2, 4, WIDTH).float()


def caveats_of(model: nn.Module, example: Any = X, **told: Any) -> tuple[str, ...]:
    """What is warned of, once each, and kept and printed in the plan."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan = lt.parametrize(model, example, **told)
    ours = [one for one in seen if issubclass(one.category, lt.ScalingWarning)]
    assert [str(one.message) for one in ours] == list(plan.caveats)
    assert {one.filename for one in ours} <= {__file__}  # the line that called parametrize
    assert all(f"note        {caveat}" in str(plan) for caveat in plan.caveats)
    return plan.caveats


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


class Branches(nn.Module):
    """h = h + f(h), or whatever `step` says."""

    def __init__(self, f: nn.Module | None = None, loops: int = 4) -> None:
        super().__init__()
        self.f, self.loops = f or models.mlp(), loops

    def forward(self, h: Tensor) -> Tensor:
        for number in range(self.loops):
            h = self.step(h, number)
        return h

    def step(self, h: Tensor, number: int) -> Tensor:
        return h + self.f(h)


# -- nothing to say


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layers", "loops"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2)])
def test_the_pre_norm_reference_model_is_warned_of_nothing(layers: int, loops: int, training: bool) -> None:
    assert caveats_of(small_decoder(layers, loops).train(training), tokens()) == ()


@pytest.mark.parametrize("loops", [1, 2, 5])
@pytest.mark.parametrize(
    "make",
    [
        models.ResidualMLP,
        models.BareMLP,
        models.InPlaceMLP,
        lambda loops: models.TheoryModel(1, loops),
        lambda loops: models.TheoryModel(2, loops),
        lambda loops: Looped([models.ParallelBlock()], loops),
        lambda loops: Looped([models.DropoutBlock(), models.DropoutBlock()], loops),
        lambda loops: Looped([models.GeluBlock()], loops).double(),
        lambda loops: Looped([models.TupleBlock()], loops),
    ],
    ids=["mlp", "bare", "in place", "one branch", "two branches", "parallel", "dropout", "written-out gelu", "tuple"],
)
def test_other_pre_norm_models_are_warned_of_nothing_however_small(
    make: Callable[[int], nn.Module], loops: int
) -> None:
    model = build(lambda: make(loops))
    assert caveats_of(model, X.to(next(model.parameters()).dtype)) == ()


def test_a_model_is_used_without_gradients_and_warned_of_nothing() -> None:
    with torch.no_grad():
        assert caveats_of(build(models.ResidualMLP)) == ()
    with torch.inference_mode():
        assert caveats_of(build(models.ResidualMLP)) == ()


# -- post-norm


class PostNormBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.mix, self.mlp = models.Mixer(), nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.first, self.second = norm(WIDTH), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.mix(x))
        return self.second(x + self.mlp(x))


class WrittenOutNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Looped([PostNormBlock()]),
        lambda: Looped([PostNormBlock(nn.RMSNorm), PostNormBlock(nn.RMSNorm)]),
        lambda: Looped([PostNormBlock(lambda width: nn.LayerNorm(width, elementwise_affine=False))]),
        lambda: Looped([PostNormBlock(WrittenOutNorm)]),
        lambda: Looped([models.AlbertBlock()]),
        lambda: Looped([encoder_layer(), encoder_layer()]),
    ],
    ids=["one block", "RMSNorm", "without gain", "written out", "ALBERT", "torch's own layer"],
)
def test_a_post_norm_model_is_warned_of(make: Callable[[], nn.Module], training: bool) -> None:
    (caveat,) = caveats_of(build(make).train(training))
    assert caveat.startswith("post-norm: the sum at ")
    assert "pre-norm" in caveat
    assert line_of(caveat.removeprefix("post-norm: the sum at ").split(" is normalised")[0])


def test_pytest_sees_the_warning() -> None:
    with pytest.warns(lt.ScalingWarning, match="^post-norm: "):
        lt.parametrize(build(lambda: Looped([PostNormBlock()])), X)


def test_the_gains_of_post_norms_are_listed_as_on_the_stream() -> None:
    plan = lt.parametrize(build(lambda: Looped([PostNormBlock()])), X)
    assert {name for name, uses in plan.on_stream.items() if uses == 3} == {
        f"blocks.0.{norm}.{name}" for norm in ("first", "second") for name in ("weight", "bias")
    }


class NormAtTheLoopsEnd(nn.Module):
    """Pre-norm blocks, and a norm before each loop starts anew."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([models.DropoutBlock(), models.DropoutBlock()])
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        return x


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_a_norm_at_the_end_of_the_branch_is_told_and_makes_no_post_norm_model(norm: type[nn.Module]) -> None:
    sandwich = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), norm(WIDTH))
    (caveat,) = caveats_of(Branches(sandwich))
    assert caveat.startswith("norm on the branch: f ends in a norm")
    for ends in (nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0), nn.Tanh()):
        pre_norm = nn.Sequential(norm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), ends)
        assert caveats_of(Branches(pre_norm)) == ()


# -- existing depth scaling


class LayerScale(nn.Module):
    def __init__(self, start: float = 1e-4) -> None:
        super().__init__()
        self.inner, self.gamma = models.mlp(), nn.Parameter(torch.full((WIDTH,), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.inner(x)


class Outside(Branches):
    """The factor is put on where the branch is added."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor

    def step(self, h: Tensor, number: int) -> Tensor:
        return h + self.f(h) * self.factor


class OutsideByVisit(Branches):
    """The factor is 1, 1/2, 1/3, …"""

    def step(self, h: Tensor, number: int) -> Tensor:
        return h + self.f(h) / (number + 1)


class ReZero(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def step(self, h: Tensor, number: int) -> Tensor:
        return h + self.alpha * self.f(h)


class LayerScaleOutside(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def step(self, h: Tensor, number: int) -> Tensor:
        return h + self.f(h) * self.gamma


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 8**0.5


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Branches(LayerScale()), r"learned factors \(f\.gamma; LayerScale, ReZero\)"),
        (LayerScaleOutside, r"learned factors \(gamma; LayerScale, ReZero\)"),
        (ReZero, r"learned factors \(alpha; LayerScale, ReZero\)"),
        (lambda: Outside(0.22), r"a constant factor \(f × 0\.22, as residual_multiplier"),
        (lambda: Outside(-2.0), r"a constant factor \(f × 2, as residual_multiplier"),
        (lambda: Outside(torch.tensor(0.5)), r"a constant factor \(f × 0\.5, as residual_multiplier"),
        (OutsideByVisit, r"a constant factor \(f × 0\.25, as residual_multiplier"),
        (lambda: Branches(Divided()), r"a constant factor \(f × 0\.353553, as residual_multiplier"),
    ],
    ids=["LayerScale", "LayerScale outside", "ReZero", "constant", "negative", "tensor", "by visit", "divided"],
)
def test_depth_scaling_that_is_there_already_is_warned_of(make: Callable[[], nn.Module], named: str) -> None:
    model = build(make)
    with pytest.warns(lt.ScalingWarning, match=rf"^existing depth scaling: {named}.*or depth is counted twice"):
        plan = lt.parametrize(model, X)
    assert len(plan.caveats) == 1
    lt.verify(model, X)


def test_a_constant_on_a_part_of_the_branch_is_no_depth_scaling() -> None:
    class Adapted(nn.Module):
        """A low-rank map with the factor α/r, beside the one that it adapts."""

        def __init__(self) -> None:
            super().__init__()
            self.plain, self.low = models.mlp(), nn.Sequential(nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + 2 * self.low(x)

    assert caveats_of(build(lambda: Branches(Adapted()))) == ()


def test_many_learned_factors_are_shortened_and_both_kinds_told() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Branches(LayerScale(), 1) for _ in range(6))
            self.constant = Outside(0.5)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return self.constant(x)

    (caveat, *others) = caveats_of(build(Both))
    assert "constant × 0.5" in caveat or "constant.f × 0.5" in caveat
    assert "parts.0.f.gamma, parts.1.f.gamma, parts.2.f.gamma, parts.3.f.gamma, …;" in caveat
    assert [other.split(":")[0] for other in others] == ["visits differ (1, 4)"]


def test_what_stands_before_the_last_matrix_is_no_depth_scaling() -> None:
    class Tempered(nn.Module):
        """A constant, a learned gain, a GLU and a temperature, all inside the branch."""

        def __init__(self) -> None:
            super().__init__()
            self.gain, self.up, self.down = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, 32), nn.Linear(16, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.up(x * 0.5 * self.gain).chunk(2, -1)
            return self.down(gate.sigmoid() * value / 3)

    assert caveats_of(build(lambda: Branches(Tempered()))) == ()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_is_no_depth_scaling(training: bool) -> None:
    f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.25))
    assert caveats_of(build(lambda: Branches(f)).train(training)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [0.22, 1.0])
def test_hugging_faces_granite_is_warned_of_unless_its_residual_multiplier_is_one(multiplier: float) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        residual_multiplier=multiplier,
    )
    model = transformers.GraniteForCausalLM(config)
    caveats = caveats_of(model, {"input_ids": tokens()})
    assert len(caveats) == (multiplier != 1)
    if caveats:
        assert caveats[0].startswith("existing depth scaling: a constant factor (model.layers.0.self_attn[0] × 0.22")
    lt.verify(model, {"input_ids": tokens()})


# -- input injection


def test_an_input_injection_is_left_alone_and_warned_of_with_its_line() -> None:
    model = build(models.InjectedMLP)
    with pytest.warns(lt.ScalingWarning, match=r"^streams left alone: .*an input injection or a long skip") as seen:
        plan = lt.parametrize(model, X)
    assert len(seen) == 1
    place = plan.caveats[0].removeprefix("streams left alone: what is added at ").split(" is an")[0]
    assert line_of(place) == "h = h + e"
    assert [left.source for left in plan.left_alone] == [place]


def test_an_injection_by_concatenation_is_warned_of_as_an_adapter_and_not_as_an_injection() -> None:
    (caveat,) = caveats_of(build(Adapter))
    assert caveat.startswith("not scaled: adapter.weight ")


# -- prelude and coda


@pytest.mark.parametrize(
    ("size", "visits"), [({"prelude": 1}, "1, 3"), ({"coda": 2}, "1, 3"), ({"prelude": 1, "coda": 1}, "1, 3")]
)
def test_layers_outside_the_loop_are_warned_of(size: dict[str, int], visits: str) -> None:
    with pytest.warns(
        lt.ScalingWarning, match=rf"^visits differ \({visits}\): layers outside the loop .*our extension"
    ):
        plan = lt.parametrize(small_decoder(**size), tokens())
    assert len(plan.caveats) == 1


def test_one_loop_with_a_prelude_is_a_plain_stack() -> None:
    assert caveats_of(small_decoder(loops=1, prelude=1, coda=1), tokens()) == ()


# -- loops that are cut


class DetachedLoops(Branches):
    def step(self, h: Tensor, number: int) -> Tensor:
        h = h.detach() if number == 2 else h
        return h + self.f(h)


class NoGradLoops(Branches):
    """All loops but the last run without gradients."""

    def step(self, h: Tensor, number: int) -> Tensor:
        with torch.set_grad_enabled(number == self.loops - 1):
            return h + self.f(h)


class DetachedEveryLoop(Branches):
    def step(self, h: Tensor, number: int) -> Tensor:
        return super().step(h.detach(), number)


@pytest.mark.parametrize(
    ("make", "cut"), [(DetachedLoops, 1), (NoGradLoops, 3), (DetachedEveryLoop, 3)], ids=["once", "no_grad", "each"]
)
def test_loops_that_are_cut_are_warned_of_with_how_many(make: Callable[[], nn.Module], cut: int) -> None:
    with pytest.warns(lt.ScalingWarning, match=rf"^loops cut by detach or no_grad: {cut} of 4 visits at ") as seen:
        plan = lt.parametrize(build(make), X)
    assert len(seen) == 1
    assert plan.loops == 4
    source = plan.caveats[0].split("visits at ")[1].split(" get no gradient")[0]
    assert "+ self.f(h)" in line_of(source)


class DetachedMaximum(Branches):
    """A softmax that is written out takes its maximum away without a gradient, which flows beside it."""

    def step(self, h: Tensor, number: int) -> Tensor:
        return h + self.f((h - h.amax(-1, keepdim=True).detach()).exp())


class OwnBackward(torch.autograd.Function):
    """The step of a reversible layer, which autograd does not follow and whose backward does."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, f: nn.Module) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(h)
        return h + f(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            h = ctx.saved_tensors[0].detach().requires_grad_()
            (h + ctx.f(h)).backward(gradient)
        return h.grad, None


class ReversibleLoops(Branches):
    def step(self, h: Tensor, number: int) -> Tensor:
        stepped: Tensor = OwnBackward.apply(h, self.f)
        return stepped


@pytest.mark.parametrize("make", [DetachedMaximum, ReversibleLoops])
def test_what_gradients_flow_past_cuts_no_loops(make: Callable[[], nn.Module]) -> None:
    x = X.clone().requires_grad_()
    assert caveats_of(build(make), x) == ()


def test_a_frozen_embedding_cuts_no_loops() -> None:
    model = small_decoder()
    model.embedding.weight.requires_grad_(False)
    assert caveats_of(model, tokens()) == ()


def test_frozen_branches_cut_no_loops() -> None:
    """Only the head is trained: nothing was cut by the forward."""
    model = nn.Sequential(build(models.ResidualMLP), nn.Linear(WIDTH, 3))
    model[0].requires_grad_(False)
    assert caveats_of(model) == ()


# -- weights that look trained


def trained(model: nn.Module) -> nn.Module:
    return noisy(model, std=0.1).float()


@pytest.mark.parametrize(
    ("make", "example", "name"),
    [
        (small_decoder, tokens(), r"layers\.0\.attention_norm\.weight"),
        (models.ResidualMLP, X, r"f\.0\.weight"),
    ],
)
def test_weights_that_look_trained_are_warned_of_and_preserve_silences_it(
    make: Callable[[], nn.Module], example: Tensor, name: str
) -> None:
    with pytest.warns(lt.ScalingWarning, match=rf"look trained \({name} is not constant\).*preserve=True"):
        lt.parametrize(trained(build(make)), example)
    assert caveats_of(trained(build(make)), example, preserve=True) == ()


def test_preserve_silences_nothing_else() -> None:
    caveats = caveats_of(trained(small_decoder(prelude=1)), tokens(), preserve=True)
    assert [caveat.split(" (")[0] for caveat in caveats] == ["visits differ"]


@pytest.mark.parametrize("start", [0.0, 1.0, 0.5])
def test_gains_that_are_all_equal_look_fresh_whatever_they_start_at(start: float) -> None:
    model = small_decoder()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.constant_(parameter, start)
    assert caveats_of(model, tokens()) == ()


def test_a_model_on_the_meta_device_does_not_look_trained() -> None:
    with torch.device("meta"):
        model = small_decoder()
    assert caveats_of(model, tokens()) == ()


# -- matrices on the stream


class Adapter(nn.Module):
    """Stream and input are mixed at each loop's entry, as in Huginn."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList([models.MLPBlock(), models.MLPBlock()])

    def forward(self, e: Tensor) -> Tensor:
        x = torch.zeros_like(e)
        for _ in range(3):
            x = self.adapter(torch.cat([x, e], -1))
            for block in self.blocks:
                x = block(x)
        return x


def test_matrices_that_act_on_the_stream_again_and_again_are_warned_of() -> None:
    model = build(Adapter)
    with pytest.warns(
        lt.ScalingWarning, match=r"^not scaled: adapter\.weight act.* on the stream more than once"
    ) as seen:
        plan = lt.parametrize(model, X)
    assert len(seen) == 1
    assert plan.on_stream == {"adapter.weight": 3}
    assert "adapter.weight (3×)" in str(plan)
    assert "those on the stream × 1/visits, everything else × 1" in str(plan)
    assert len(plan.branches) == 2


def test_matrices_at_the_models_ends_are_not_on_the_stream() -> None:
    class Ends(models.ResidualMLP):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.write(super().forward(self.read(x)))

    assert caveats_of(build(Ends)) == ()


def test_a_norm_at_the_end_of_each_loop_is_warned_of_and_its_gains_are_listed() -> None:
    model = build(NormAtTheLoopsEnd)
    with pytest.warns(lt.ScalingWarning, match=r"norm in the loop: the sum at \S+ is normalised before the next loop"):
        plan = lt.parametrize(model, X)
    assert plan.on_stream == {"norm.weight": 3}
    assert len(plan.caveats) == 1


def test_a_norm_that_is_passed_once_is_not_warned_of() -> None:
    class NormAfterThePrelude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prelude, self.norm, self.f = models.mlp(), nn.LayerNorm(WIDTH), models.mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x + self.prelude(x))
            for _ in range(4):
                x = x + self.f(x)
            return x

    assert [caveat.partition(":")[0][:13] for caveat in caveats_of(build(NormAfterThePrelude))] == ["visits differ"]


# -- several at once


def test_every_caveat_is_told_apart_and_survives_json() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prelude, self.adapter = models.MLPBlock(), nn.Linear(2 * WIDTH, WIDTH)
            self.f, self.gamma = models.mlp(), nn.Parameter(torch.ones(WIDTH))

        def forward(self, e: Tensor) -> Tensor:
            x = e = self.prelude(e)
            for number in range(4):
                x = self.adapter(torch.cat([x, e], -1))
                x = x.detach() if number == 2 else x
                x = x + self.gamma * self.f(x)
            return x

    model = trained(build(Everything))
    caveats = caveats_of(model)
    wanted = ["existing depth scaling", "loops cut", "visits differ", "the weights look trained", "not scaled"]
    assert [next(word for word in wanted if caveat.startswith(word)) for caveat in caveats] == wanted
    plan = lt.verify(model, X)
    assert lt.ScalingPlan.from_json(plan.to_json()).caveats == caveats


@pytest.mark.parametrize("rule", ["factored", "sqrt"])
def test_warnings_can_be_made_errors_and_leave_the_model_as_it_was(rule: Any) -> None:
    model = small_decoder(prelude=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lt.ScalingWarning)
        with pytest.raises(lt.ScalingWarning, match="visits differ"):
            lt.parametrize(model, tokens(), rule)
    lt.parametrize(model, tokens(), rule)


# -- what is not trained


class Backbone(nn.Module):
    """Two frozen layers, a trained one in a loop, and what comes between and after as a test says."""

    def __init__(self, before: Callable[[Any, Tensor], Tensor], after: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.frozen = nn.Sequential(Residual(), Residual()).requires_grad_(False)
        self.core, self.enter, self.before, self.after = Residual(), nn.Linear(WIDTH, WIDTH), before, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self, x)
        for _ in range(3):
            x = self.core(x)
        return self.after(self, x)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.frozen(x)  # type: ignore[no-any-return]


def as_it_is(m: Any, x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    "before",
    [without_gradient, lambda m, x: m.frozen(x), lambda m, x: m.frozen(x).detach()],
    ids=["no_grad", "", "cut"],
)
def test_a_frozen_backbone_keeps_its_features_and_is_no_layer(before: Any) -> None:
    model = Backbone(before, as_it_is).double()
    features = model.frozen(X.double())
    plan = planned(model, X.double())
    assert [(str(b.handle), b.visits) for b in plan.branches] == [("core.f", 3)]
    assert plan.layers == 1
    assert [left.reason for left in plan.left_alone] == [
        "no gradient reaches the branch or goes through it: a frozen backbone or a teacher"
    ]
    assert torch.equal(model.frozen(X.double()), features)


@pytest.mark.parametrize(
    ("before", "after"),
    [(lambda m, x: m.frozen(m.enter(x)), as_it_is), (as_it_is, lambda m, x: m.frozen(x))],
    ids=["after a trained map", "after the loop"],
)
def test_frozen_layers_that_gradients_go_through_are_scaled_and_warned_of(before: Any, after: Any) -> None:
    caveats = caveats_of(Backbone(before, after).double(), X.double())
    (frozen,) = (caveat for caveat in caveats if caveat.startswith("frozen weights"))
    assert "frozen.0.f, frozen.1.f hold nothing that is trained" in frozen
    assert "branches=[…]" in frozen


class Distilled(nn.Module):
    """A student in a loop, and a teacher that is a moving average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Residual(), Residual().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(self.teacher(x))
        return self.student(self.student(x)), wanted


def test_a_teacher_is_not_scaled() -> None:
    plan = planned(Distilled(), X.double())
    assert [(str(b.handle), b.visits) for b in plan.branches] == [("student.f", 2)]
    assert plan.layers == 1
    assert any(caveat.startswith("left as they are: no gradient comes") for caveat in plan.caveats)
