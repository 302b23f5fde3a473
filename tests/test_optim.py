import math
from collections.abc import Callable
from typing import Any

import mup
import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.optim import family_of
from tests.models import WIDTH, AlbertBlock, BareMLP, Looped, MLPBlock, ParallelBlock, inputs, small_decoder, tokens

OPTIMIZERS = [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD]
Settings = dict[str, dict[str, Any]]


def rewritten(layers: int = 4, **settings: Any) -> nn.Module:
    model = small_decoder(layers=layers, loops=2)
    lt.parametrize(model, tokens(), **settings)
    return model


def by_parameter(model: nn.Module, groups: list[dict[str, Any]]) -> Settings:
    """The settings of each parameter by its name; fails where one stands in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len({name for name, _ in listed}) == len(listed)
    return dict(listed)


def test_adamw_takes_lr_and_eps_by_root_depth_inside_the_branches() -> None:
    model = rewritten()
    groups = lt.param_groups(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-6)
    settings = by_parameter(model, groups)
    assert set(settings) == {name for name, _ in model.named_parameters()}
    for name, setting in settings.items():
        factor = 0.5 if name.startswith("layers.") else 1.0
        assert setting["lr"] == pytest.approx(0.01 * factor, rel=1e-15), name
        assert setting["lr_factor"] == factor, name
        assert setting["eps"] == pytest.approx(1e-6 * factor, rel=1e-15), name
        assert setting["weight_decay"] == (0.0 if "norm" in name else 0.1), name


def test_adam_takes_its_decay_by_root_depth_too() -> None:
    model = rewritten()
    settings = by_parameter(model, lt.param_groups(model, torch.optim.Adam, lr=0.01, weight_decay=0.1))
    inside, outside = settings["layers.2.mlp.up.weight"], settings["embedding.weight"]
    assert (inside["lr"], inside["eps"], inside["weight_decay"]) == pytest.approx((0.005, 5e-9, 0.05), rel=1e-15)
    assert (outside["lr"], outside["eps"], outside["weight_decay"]) == (0.01, 1e-8, 0.1)


def test_sgd_keeps_its_lr_and_has_no_eps() -> None:
    model = rewritten()
    groups = lt.param_groups(model, torch.optim.SGD, lr=0.01, weight_decay=0.1)
    settings = by_parameter(model, groups)
    assert {setting["lr"] for setting in settings.values()} == {0.01}
    assert settings["layers.2.mlp.up.weight"]["weight_decay"] == pytest.approx(0.05, rel=1e-15)
    assert settings["embedding.weight"]["weight_decay"] == 0.1
    assert not any("eps" in group for group in groups)


@pytest.mark.parametrize("settings", [{"rule": "unscaled"}, {"base_layers": 4}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_scaled_without_a_rule_or_at_the_base_depth(
    optimizer: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    for group in lt.param_groups(rewritten(**settings), optimizer, lr=0.01, weight_decay=0.1):
        assert (group["lr"], group["lr_factor"]) == (0.01, 1.0)
        assert group["weight_decay"] in (0.0, 0.1)


def test_base_layers_enter_the_factor() -> None:
    model = rewritten(base_layers=2)
    settings = by_parameter(model, lt.param_groups(model, torch.optim.AdamW, lr=1.0))
    assert settings["layers.0.mlp.up.weight"]["lr"] == pytest.approx(math.sqrt(0.5), rel=1e-15)


def test_groups_have_names_of_their_own_and_decay_nothing_by_default() -> None:
    groups = lt.param_groups(rewritten(), torch.optim.AdamW, lr=0.01)
    assert [group["name"] for group in groups] == [
        "outside",
        "branches, no decay",
        "branches",
        "outside, no decay",
    ]
    by_role = lt.param_groups(rewritten(), torch.optim.AdamW, lr=0.01, lr_ratio={"embedding": 5.0})
    assert "outside, embedding, no decay" in {group["name"] for group in by_role}
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_biases_and_gains_are_not_decayed() -> None:
    model = Looped([ParallelBlock()])
    lt.parametrize(model.double(), inputs(2, 4, WIDTH))
    settings = by_parameter(model, lt.param_groups(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1))
    undecayed = {name for name, setting in settings.items() if setting["weight_decay"] == 0}
    assert undecayed == {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert undecayed


def test_frozen_parameters_are_left_out() -> None:
    model = rewritten()
    model.embedding.weight.requires_grad_(False)
    model.layers[0].mlp.requires_grad_(False)
    settings = by_parameter(model, lt.param_groups(model, torch.optim.AdamW, lr=0.01))
    assert set(settings) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "layers.0.mlp.up.weight" not in settings
    assert "layers.1.mlp.up.weight" in settings


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_takes_the_groups_and_moves_every_parameter(optimizer: Callable[..., Any]) -> None:
    model = rewritten()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer(lt.param_groups(model, optimizer, lr=0.01, weight_decay=0.1), lr=123.0)
    assert {group["lr"] for group in optimizer.param_groups} <= {0.01, 0.005}
    nn.functional.cross_entropy(model(tokens()).flatten(0, 1), tokens(seed=1).flatten()).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_adams_first_step_is_as_long_as_its_group_says() -> None:
    model = rewritten()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=0.01, eps=1e-16))
    model(tokens()).pow(2).mean().backward()
    optimizer.step()
    for name, factor in (("layers.3.mlp.down.weight", 0.5), ("norm.weight", 1.0)):
        step = (dict(model.named_parameters())[name] - before[name]).abs()
        assert step.max().item() == pytest.approx(0.01 * factor, rel=1e-3), name


def test_a_compiled_model_gives_the_groups_of_the_model_inside() -> None:
    model = rewritten()
    plain = by_parameter(model, lt.param_groups(model, torch.optim.AdamW, lr=0.01))
    through = by_parameter(model, lt.param_groups(torch.compile(model, backend="eager"), torch.optim.AdamW, lr=0.01))
    assert {n: s["lr"] for n, s in through.items()} == {n: s["lr"] for n, s in plain.items()}


def test_a_model_inside_another_module_gives_its_own_groups() -> None:
    model = rewritten()
    groups = lt.param_groups(nn.Sequential(model), torch.optim.AdamW, lr=0.01)
    assert set(by_parameter(model, groups)) == {name for name, _ in model.named_parameters()}


# -- widths


class WideMLP(nn.Module):
    """A looped MLP between two layers of fixed width."""

    def __init__(self, width: int, hidden: int, loops: int = 2) -> None:
        super().__init__()
        self.loops = loops
        self.read_in = nn.Linear(3, width)
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.read_out = nn.Parameter(torch.randn(5, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read_in(x)
        for _ in range(self.loops):
            h = h + self.f(h)
        return h @ self.read_out.T


def wide(base: tuple[int, int], target: tuple[int, int]) -> WideMLP:
    model = WideMLP(*target)
    mup.set_base_shapes(model, WideMLP(*base), delta=WideMLP(base[0] + 1, base[1] + 1))
    lt.parametrize(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [(torch.optim.AdamW, mup.MuAdamW), (torch.optim.Adam, mup.MuAdam), (torch.optim.SGD, mup.MuSGD)],
)
@pytest.mark.parametrize("target", [(8, 16), (32, 64), (24, 96), (4, 4)])
def test_widths_scale_as_mups_own_optimizers_do(
    optimizer: type[torch.optim.Optimizer], reference: Callable[..., torch.optim.Optimizer], target: tuple[int, int]
) -> None:
    model = wide((8, 16), target)  # one layer at base depth one: no depth factor
    ours = by_parameter(model, lt.param_groups(model, optimizer, lr=0.01, weight_decay=0.1))
    theirs = by_parameter(model, reference(model.parameters(), lr=0.01, weight_decay=0.1).param_groups)
    assert set(ours) == set(theirs)
    for name, parameter in model.named_parameters():
        assert ours[name]["lr"] == pytest.approx(theirs[name]["lr"], rel=1e-12), name
        assert ours[name]["lr_factor"] == pytest.approx(theirs[name]["lr"] / 0.01, rel=1e-12), name
        decay = theirs[name]["weight_decay"] if parameter.ndim >= 2 else 0.0
        assert ours[name]["weight_decay"] == pytest.approx(decay, rel=1e-12), name


def test_groups_of_different_widths_have_different_names() -> None:
    groups = lt.param_groups(wide((8, 16), (24, 96)), torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    assert {"branches, width × 3", "branches, width × 6"} <= {group["name"] for group in groups}


def test_depth_and_width_factors_multiply() -> None:
    class Deep(WideMLP):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)
            self.g = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            h = self.read_in(x)
            for _ in range(self.loops):
                h = h + self.f(h)
                h = h + self.g(h)
            return h @ self.read_out.T

    model = Deep(32)
    mup.set_base_shapes(model, Deep(8), delta=Deep(9))
    plan = lt.parametrize(model, torch.ones(4, 3))
    assert plan.layers == 2
    settings = by_parameter(model, lt.param_groups(model, torch.optim.AdamW, lr=1.0, weight_decay=0.1))
    assert settings["g.weight"]["lr"] == pytest.approx(1 / 4 / math.sqrt(2), rel=1e-15)
    assert settings["g.weight"]["weight_decay"] == pytest.approx(0.4, rel=1e-15)


# -- families


class Plain(torch.optim.AdamW):
    """A subclass whose name tells nothing."""


def named(name: str, *bases: type) -> type:
    return type(name, bases or (torch.optim.Optimizer,), {})


@pytest.mark.parametrize(
    ("optimizer", "family"),
    [
        (Plain, "adamw"),
        (named("FusedAdam"), "adam"),
        (named("PagedAdamW8bit"), "adamw"),
        (named("AdamATan2"), "adamw"),
        (torch.optim.NAdam, "adam"),
        (torch.optim.RAdam, "adam"),
        (torch.optim.Adamax, "adam"),
        (named("SGD8bit"), "sgd"),
        (named("FusedSGD"), "sgd"),
        (named("Mine", torch.optim.SGD), "sgd"),
        (torch.optim.Muon, "muon"),
        (named("Mine", named("CPUAdam")), "adam"),
    ],
)
def test_the_family_is_told_by_the_class_or_its_base(optimizer: Any, family: Any) -> None:
    assert family_of(optimizer) == family
    assert family_of(family) == family


# -- roles


def test_the_users_own_split_is_by_role() -> None:
    model = rewritten()
    settings = by_parameter(
        model,
        lt.param_groups(model, "adamw", lr=0.01, weight_decay={"branch matrix": 0.2}, lr_ratio={"embedding": 5.0}),
    )
    assert settings["embedding.weight"]["lr"] == pytest.approx(0.05)
    assert {name for name, s in settings.items() if s["weight_decay"]} == {
        name for name in settings if name.startswith("layers.") and "norm" not in name
    }


def test_the_product_of_lr_and_decay_may_stay_instead_of_the_coefficient() -> None:
    model = rewritten()
    groups = lt.param_groups(model, "adamw", lr=0.01, weight_decay=0.1, decay_policy="product")
    decayed = [group for group in groups if group["weight_decay"]]
    assert [group["lr"] * group["weight_decay"] for group in decayed] == pytest.approx([0.001] * len(decayed))
    assert len({group["lr"] for group in decayed}) == 2


class Roles(nn.Module):
    """One parameter of every role; the names tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.ParameterDict(
            {"a": torch.randn(7, WIDTH), "b": torch.randn(3, WIDTH), "c": torch.ones(WIDTH), "d": torch.ones(WIDTH)}
        )
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.p["a"][tokens]
        for visit in range(3):
            x = (x + self.f(nn.functional.layer_norm(x, (WIDTH,)) * self.p["b"][visit])) * self.p["c"]
        return self.g(x * self.p["d"])


def test_a_role_is_by_effect() -> None:
    model = Roles()
    plan = lt.parametrize(model, tokens(vocab=7))
    assert {name: plan.role(name) for name in plan.roles} == {
        "p.a": "embedding",
        "p.b": "per-visit part",
        "p.c": "on stream",
        "p.d": "outside",
        "f.weight": "branch matrix",
        "f.bias": "branch vector",
        "g.weight": "head",
        "g.bias": "outside",
    }
    assert lt.ScalingPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": {"matrix": 0.1}}, "weight_decay names the role 'matrix'; the roles are branch matrix, "),
        ({"lr_ratio": {"heads": 2.0}}, "lr_ratio names the role 'heads'"),
        ({"lr_ratio": {"head": 0.0}}, "lr_ratio is 0.0; it must be a finite number above 0"),
        ({"decay_policy": "lr"}, "decay_policy is 'lr'; choose coefficient or product"),
        ({"adamw_lr": 0.1}, "give it with muon, and only there"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(lt.InputError, match=message):
        lt.param_groups(rewritten(), "adamw", lr=0.01, **settings)


# -- bad input


@pytest.mark.parametrize("model", [small_decoder(), nn.Sequential(), Looped([MLPBlock()])])
def test_a_model_that_was_not_rewritten_is_refused(model: nn.Module) -> None:
    with pytest.raises(lt.InputError, match=r"the model was not rewritten; call looptransfer\.parametrize\("):
        lt.param_groups(model, torch.optim.AdamW, lr=0.01)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.RMSprop,
        torch.optim.Optimizer,
        "AdamW",
        named("SignSGD"),
        named("NormalizedSGD", torch.optim.SGD),
        named("Lion", named("SignSGD", torch.optim.SGD)),
    ],
)
def test_another_optimizer_is_answered_with_the_known_ones(optimizer: Any) -> None:
    with pytest.raises(lt.InputError, match="factors are known for the families adamw, adam, sgd, muon: give one of"):
        lt.param_groups(rewritten(), optimizer, lr=0.01)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "eps"])
def test_lr_and_eps_must_be_finite_and_positive(name: str, value: float) -> None:
    with pytest.raises(lt.InputError, match=rf"^{name} is .*must be a finite number above 0"):
        lt.param_groups(rewritten(), torch.optim.AdamW, **{"lr": 0.01, name: value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_weight_decay_must_be_finite_and_not_negative(value: float) -> None:
    with pytest.raises(lt.InputError, match=r"^weight_decay is .*must be a finite number from 0 up"):
        lt.param_groups(rewritten(), torch.optim.AdamW, lr=0.01, weight_decay=value)


def test_a_bare_branch_has_groups_too() -> None:
    model = BareMLP()
    lt.parametrize(model, torch.ones(4, WIDTH))
    (group,) = lt.param_groups(model, torch.optim.SGD, lr=0.01)
    assert group["params"] == [model.f[0].weight]


def test_a_mup_read_out_does_not_stop_the_trace() -> None:
    class Wide(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.f, self.out = torch.nn.Linear(width, width), mup.MuReadout(width, 5)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                h = h + self.f(h)
            return self.out(h)

    model = Wide(32)
    mup.set_base_shapes(model, Wide(8), delta=Wide(9))
    assert lt.parametrize(model, torch.ones(4, 32)).loops == 2


@pytest.mark.parametrize("lr", ["0.1", None])
def test_an_lr_that_is_no_number_is_refused(lr: object) -> None:
    model = lt.LoopedDecoder(width=16, heads=2)
    lt.parametrize(model, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(lt.InputError, match="lr is"):
        lt.param_groups(model, torch.optim.AdamW, lr=lr)  # type: ignore[arg-type]


def test_groups_of_a_model_whose_part_was_rewritten_hold_all_its_parameters() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), Looped([MLPBlock()]).float(), nn.Linear(8, 9))
    model = model.float()
    lt.parametrize(model[1], torch.ones(2, 3, WIDTH))
    groups = lt.param_groups(model, torch.optim.AdamW, lr=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_model_whose_parts_were_rewritten_apart_is_refused() -> None:
    model = nn.Sequential(Looped([MLPBlock()]), Looped([MLPBlock()])).float()
    for part in model:
        lt.parametrize(part, torch.ones(2, 3, WIDTH))
    with pytest.raises(lt.InputError, match="2 parts of the model were rewritten apart"):
        lt.param_groups(model, torch.optim.AdamW, lr=0.1)


# -- parameters on the stream


def post_norm_model() -> nn.Module:
    torch.manual_seed(0)
    model = Looped([AlbertBlock()], loops=3)
    lt.parametrize(model, torch.ones(2, 4, WIDTH))
    return model


def test_parameters_on_the_stream_get_the_lr_by_their_uses() -> None:
    model = post_norm_model()
    scale = {
        p: group["lr_factor"] for group in lt.param_groups(model, torch.optim.AdamW, lr=0.1) for p in group["params"]
    }
    left = lt.param_groups(model, torch.optim.AdamW, lr=0.1, on_stream="leave")
    gains = {model.blocks[0].norm.weight, model.blocks[0].attention.norm.bias}
    assert {scale[gain] for gain in gains} == {1 / 3}
    assert scale[model.blocks[0].ffn.weight] == 1
    assert {group["lr_factor"] for group in left} == {1.0}
    names = [group["name"] for group in lt.param_groups(model, torch.optim.AdamW, lr=0.1)]
    assert "outside, no decay, on the stream 3×" in names


def test_another_word_for_on_stream_is_refused() -> None:
    with pytest.raises(lt.InputError, match="on_stream is 'ignore'; choose scale or leave"):
        lt.param_groups(post_norm_model(), torch.optim.AdamW, lr=0.1, on_stream="ignore")


# -- schedules


def optimizer_of(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=0.1), **settings)


def ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """The LR of each group by its own factor: the base LR, were there one."""
    return [float(group["lr"]) / group["lr_factor"] for group in optimizer.param_groups]


def per_group(optimizer: torch.optim.Optimizer, lr: float) -> list[float]:
    return [lr * group["lr_factor"] for group in optimizer.param_groups]


class MultipliedByScale:
    """timm's way: a value per group from the LR that it began with, times lr_scale where the group has that key."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.first = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def step(self) -> None:
        self.steps += 1
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = first * 0.5 * (1 + math.cos(math.pi * self.steps / 5)) * group.get("lr_scale", 1.0)


schedulers = torch.optim.lr_scheduler
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=7),
    "warm-up and decay": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.7)], milestones=[2]
    ),
    "OneCycleLR, one number per group": lambda o: schedulers.OneCycleLR(o, per_group(o, 0.3), total_steps=6),
    "timm": MultipliedByScale,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_keeps_the_ratio_of_the_groups_and_scales_nothing_twice(schedule: str) -> None:
    optimizer = optimizer_of(rewritten())
    scheduler = SCHEDULES[schedule](optimizer)
    seen = set()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        base = ratios(optimizer)
        assert base == pytest.approx([base[0]] * 4, rel=1e-12)
        seen.add(round(base[0], 9))
    assert len(seen) > 2
    assert not any("lr_scale" in group for group in optimizer.param_groups)


def test_what_sets_one_lr_for_all_loses_the_ratio_and_set_lr_gives_it_back() -> None:
    optimizer = optimizer_of(rewritten())
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    assert len(set(ratios(optimizer))) == 2
    for lr in (0.02, 0, 0.3):
        lt.set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(per_group(optimizer, lr), rel=1e-15)
        assert ratios(optimizer) == pytest.approx([lr] * 4, rel=1e-15)


def test_an_lr_in_a_tensor_is_set_in_place() -> None:
    optimizer = optimizer_of(rewritten(), capturable=True)
    tensors = [torch.tensor(group["lr"]) for group in optimizer.param_groups]
    for group, tensor in zip(optimizer.param_groups, tensors, strict=True):
        group["lr"] = tensor
    lt.set_lr(optimizer, 0.02)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    assert ratios(optimizer) == pytest.approx([0.02] * 4)


def test_the_factor_survives_the_state_dict() -> None:
    first, second = optimizer_of(rewritten()), optimizer_of(rewritten())
    lt.set_lr(first, 0.02)
    second.load_state_dict(first.state_dict())
    assert ratios(second) == pytest.approx([0.02] * 4)
    lt.set_lr(second, 0.04)


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "0.1", None])
def test_a_base_lr_out_of_range_is_refused_and_changes_nothing(lr: Any) -> None:
    optimizer = optimizer_of(rewritten())
    with pytest.raises(lt.InputError, match=r"^lr is .*must be a finite number from 0 up"):
        lt.set_lr(optimizer, lr)
    assert ratios(optimizer) == pytest.approx([0.1] * 4)


def test_an_optimizer_of_other_groups_is_refused_before_anything_is_set() -> None:
    optimizer, before = optimizer_of(rewritten()), optimizer_of(rewritten())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1.0})
    with pytest.raises(lt.InputError, match="group 4 of the optimizer holds no lr_factor"):
        lt.set_lr(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [*per_group(before, 0.1), 1.0]
