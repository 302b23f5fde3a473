"""Live optimizers, checked against the plan and changed with it: every planted fault is named."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import mup
import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.rules import Rule
from tests.models import WIDTH, inputs, mlp, small_decoder, tokens
from tests.rewrite.test_survival import in_two_processes, start
from tests.test_optim import MultipliedByScale, wide

AdamW = torch.optim.AdamW
schedulers = torch.optim.lr_scheduler


def rewritten(layers: int = 4) -> nn.Module:
    model = small_decoder(layers=layers, loops=2)
    lt.parametrize(model, tokens())
    return model


def optimizer_of(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return AdamW(lt.param_groups(model, AdamW, lr=0.01, weight_decay=0.1, **settings))


class Growing(nn.Module):
    """A loop with a norm at its end, and a norm of each visit's own before the branch."""

    def __init__(self, loops: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loops = loops
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(8))
        self.f, self.loop_norm, self.last_norm = mlp(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.double()

    def forward(self, h: Tensor) -> Tensor:
        for visit in range(self.loops):
            h = self.loop_norm(h + self.f(self.norms[visit](h)))
        return self.last_norm(h)


X = inputs(3, WIDTH)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# -- ten planted faults: each gives the model, its inputs, and the optimizer as it stands


def one_cycle_with_one_number() -> Any:
    model = rewritten()
    optimizer = optimizer_of(model)
    schedulers.OneCycleLR(optimizer, max_lr=0.01, total_steps=10)
    return model, optimizer


def one_lr_by_hand() -> Any:
    model = rewritten()
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    return model, optimizer


def cosine_floor() -> Any:
    model = rewritten()
    optimizer = optimizer_of(model)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 10, eta_min=1e-3)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    return model, optimizer


def timm_on_groups_with_its_key() -> Any:
    """What timm's scheduler does where somebody gives it the factor by its own key too."""
    model = rewritten()
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr_factor"]
    MultipliedByScale(optimizer).step()
    return model, optimizer


def trainers_own_groups() -> Any:
    pt_utils = pytest.importorskip("transformers.trainer_pt_utils")
    model = rewritten()
    decayed = set(pt_utils.get_parameter_names(model, [nn.RMSNorm], ["bias"]))
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return model, AdamW(groups, lr=0.01)


def forgotten_parameter() -> Any:
    model = rewritten()
    groups = lt.param_groups(model, AdamW, lr=0.01)
    next(group for group in groups if group["name"] == "branches")["params"].pop(3)
    return model, AdamW(groups)


def doubled_parameter() -> Any:
    model = rewritten()
    return model, [optimizer_of(model), torch.optim.SGD(lt.param_groups(model, "sgd", lr=0.1)[:1])]


def stale_loop_count() -> Any:
    model = Growing(2)
    lt.parametrize(model, X)
    optimizer = optimizer_of(model)
    model.loops = 4
    lt.rescale(model, X)
    return model, optimizer


def mup_on_top() -> Any:
    model = wide((8, 16), (32, 64))
    return model, mup.MuAdamW(lt.param_groups(model, AdamW, lr=0.01, weight_decay=0.1), lr=0.01)


def state_of_another_size() -> Any:
    small, large = (wide((8, 16), size) for size in ((8, 16), (32, 64)))
    trained, optimizer = optimizer_of(small), optimizer_of(large)
    step(small, trained, torch.ones(4, 3))
    state = trained.state_dict()
    groups = optimizer.state_dict()["param_groups"]
    state["state"] = dict(enumerate(state["state"].values()))
    state["param_groups"] = groups
    optimizer.load_state_dict(state)
    return large, optimizer


FAULTS: dict[Callable[[], Any], str] = {
    one_cycle_with_one_number: r"one LR, .*, was set for all groups \(OneCycleLR with one number",
    one_lr_by_hand: r"one LR, 0\.0005, was set for all groups",
    cosine_floor: r"a floor that is the same for all groups \(as CosineAnnealingLR's eta_min\)",
    timm_on_groups_with_its_key: "the factors were applied twice, as by a scheduler that multiplies",
    trainers_own_groups: r"group 0, 1 of the AdamW holds no lr_factor: it was not made by .* as where a trainer groups",
    forgotten_parameter: r"layers\.\d\.[a-z]+\.[a-z]+\.weight: in no group: never trained",
    doubled_parameter: r"embedding\.weight: in two groups: stepped twice",
    stale_loop_count: r"loop_norm\.weight \(factor 0\.5, now 0\.25\), .*: stale N",
    mup_on_top: "the width factors were applied twice, as by a mup optimizer on top",
    state_of_another_size: "the optimizer's state is that of a model of another size",
}
EXAMPLES = {mup_on_top: torch.ones(4, 3), state_of_another_size: torch.ones(4, 3), stale_loop_count: X}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_verify_names_the_fault_of_an_optimizer(plant: Callable[[], Any]) -> None:
    model, optimizer = plant()
    with pytest.raises(
        lt.VerificationError, match=rf"^the optimizer does not do what the plan says:\n- .*{FAULTS[plant]}"
    ):
        lt.verify(model, EXAMPLES.get(plant, tokens()), optimizer=optimizer)


# -- what is right passes


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.LambdaLR(optimizer, lambda n: min(1.0, n / 3))


@pytest.mark.parametrize(
    "schedule",
    [warm_up, lambda o: schedulers.CosineAnnealingLR(o, 7), MultipliedByScale],
    ids=["warm-up", "cosine", "timm"],
)
@pytest.mark.parametrize("family", ["adamw", "adam", "sgd"])
def test_an_optimizer_of_our_groups_passes_all_along_a_schedule(
    family: str, schedule: Callable[[torch.optim.Optimizer], Any]
) -> None:
    model = rewritten()
    cls = {"adamw": AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[family]
    optimizer = cls(lt.param_groups(model, family, lr=0.01, weight_decay=0.1, lr_ratio={"embedding": 3.0}), lr=1.0)
    scheduler = schedule(optimizer)
    for _ in range(3):
        step(model, optimizer, tokens())
        scheduler.step()
        lt.verify(model, tokens(), optimizer=optimizer)


def test_state_that_was_saved_and_loaded_passes() -> None:
    model = rewritten()
    optimizer, again = optimizer_of(model), optimizer_of(model)
    step(model, optimizer, tokens())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    lt.verify(torch.compile(model, backend="eager"), tokens(), optimizer=again)


def rows_and_columns(gradient: Tensor) -> dict[str, Tensor]:
    if gradient.ndim < 2:
        return {"square": gradient**2}
    return {"rows": gradient.square().mean(1, keepdim=True), "columns": gradient.square().mean(0)}


def flat_and_one_number(gradient: Tensor) -> dict[str, Tensor]:
    return {"mean": gradient.flatten(), "square": gradient.square().mean()}


def projected(gradient: Tensor) -> dict[str, Tensor]:
    return {"mean": gradient[:2].clone() if gradient.ndim > 1 else gradient.clone()}


def two_sides(gradient: Tensor) -> dict[str, Tensor]:
    return {str(dim): torch.eye(size) for dim, size in enumerate(gradient.shape)}


@pytest.mark.parametrize("kept", [rows_and_columns, flat_and_one_number, projected, two_sides])
def test_state_of_other_kinds_passes(kept: Callable[[Tensor], dict[str, Tensor]]) -> None:
    class Thrifty(AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter].update(kept(parameter.grad))

    model = rewritten()
    optimizer = Thrifty(lt.param_groups(model, Thrifty, lr=0.01))
    step(model, optimizer, tokens())
    lt.verify(model, tokens(), optimizer=optimizer)


def test_edits_by_hand_are_named_by_group_and_setting() -> None:
    model = rewritten()
    optimizer = optimizer_of(model)
    optimizer.param_groups[1]["lr"] *= 3
    optimizer.param_groups[2]["weight_decay"] = 0.2
    optimizer.param_groups[3]["eps"] = 1.0
    names = [group["name"] for group in optimizer.param_groups]
    with pytest.raises(lt.VerificationError) as caught:
        lt.verify(model, tokens(), optimizer=optimizer)
    text = str(caught.value)
    assert f"groups edited by hand ({names[1]!r}" in text
    assert f"group {names[2]!r}: weight_decay is 0.2, planned 0.1" in text
    assert f"group {names[3]!r}: eps is 1, planned 1e-08" in text


@pytest.mark.parametrize("rule", ["factored", "completep"])
def test_an_edit_by_hand_is_named_where_all_factors_are_equal(rule: Rule) -> None:
    model = small_decoder(layers=4)
    lt.parametrize(model, tokens(), rule, base_layers=4 if rule == "factored" else 2)
    optimizer = torch.optim.AdamW(lt.param_groups(model, "adamw", lr=0.01, weight_decay=0.1))
    lt.verify(model, tokens(), optimizer=optimizer)
    optimizer.param_groups[1]["lr"] *= 0.8
    with pytest.raises(lt.VerificationError, match=f"groups edited by hand .'{optimizer.param_groups[1]['name']}'"):
        lt.verify(model, tokens(), optimizer=optimizer)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(lt.InputError, match="give an optimizer, or a list of them"):
        lt.verify(rewritten(), tokens(), optimizer=[])


# -- N that changes


def factors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, ...]]:
    """LR, factor and eps of every parameter by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (float(group["lr"]), group["lr_factor"], group["eps"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_a_live_optimizer_follows_the_loop_count_from_one_and_back() -> None:
    model = Growing(1)
    lt.parametrize(model, X)
    optimizer = optimizer_of(model)
    step(model, optimizer, X)
    state = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    for loops in (2, 4, 8, 1, 3):
        model.loops = loops
        lt.rescale(model, X, optimizer=optimizer)
        lt.verify(model, X, optimizer=optimizer)
        fresh = Growing(loops)
        lt.parametrize(fresh, X)
        live, other = factors(model, optimizer), factors(fresh, optimizer_of(fresh))
        used = {name for name in live if not name.startswith("norms") or int(name.split(".")[1]) < loops}
        assert {name for name in used if live[name] != pytest.approx(other[name], rel=1e-12)} == set()
        assert live["loop_norm.weight"][1] == pytest.approx(1 / loops)
        assert live["last_norm.weight"][1] == 1.0
        assert all(torch.equal(optimizer.state[p]["exp_avg"], kept) for p, kept in state.items())
    step(model, optimizer, X)
    lt.set_lr(optimizer, 0.002)
    lt.verify(model, X, optimizer=optimizer)


def test_a_strange_optimizer_is_refused_before_anything_is_changed() -> None:
    model = rewritten()
    plan = lt.verify(model, tokens())
    model.loops = 5
    with pytest.raises(lt.InputError, match="group 0 of the AdamW holds no lr_factor"):
        lt.rescale(model, tokens(), optimizer=AdamW(model.parameters()))
    model.loops = 2
    assert lt.verify(model, tokens()) == plan


def test_a_parameter_frozen_since_the_optimizer_was_made_is_refused_before_anything_is_changed() -> None:
    model = Growing(2)
    plan = lt.parametrize(model, X)
    optimizer = optimizer_of(model)
    model.loops, before = 4, factors(model, optimizer)
    model.last_norm.requires_grad_(False)
    with pytest.raises(lt.InputError, match=r"^last_norm\.weight, last_norm\.bias: frozen since .* unfreeze it"):
        lt.rescale(model, X, optimizer=optimizer)
    assert factors(model, optimizer) == before
    model.loops = 2
    assert lt.verify(model, X, optimizer=optimizer) == plan
    model.loops = 4
    model.last_norm.requires_grad_(True)
    lt.rescale(model, X, optimizer=optimizer)
    model.last_norm.requires_grad_(False)
    lt.verify(model, X, optimizer=optimizer)


class Steady(Growing):
    """One norm before the branch for all visits: a new loop count splits no group."""

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = self.loop_norm(h + self.f(self.norms[0](h)))
        return self.last_norm(h)


KEEPING: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda n: 1 / (1 + n)),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, [group["lr"] for group in o.param_groups], total_steps=9),
    "cyclic": lambda o: schedulers.CyclicLR(
        o,
        [group["lr"] / 9 for group in o.param_groups],
        [group["lr"] for group in o.param_groups],
        2,
        mode="triangular2",
    ),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.LambdaLR(o, lambda n: 0.5**n)], [2]
    ),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_a_scheduler_goes_on_from_the_lrs_of_the_new_loop_count(kind: str) -> None:
    def begun(loops: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = Steady(loops)
        lt.parametrize(model, X)
        optimizer = torch.optim.SGD(lt.param_groups(model, "sgd", lr=0.01), momentum=0.9)
        return model, optimizer, KEEPING[kind](optimizer)

    live, fresh = begun(2), begun(4)
    for number in range(6):
        for model, optimizer, scheduler in (live, fresh):
            step(model, optimizer, X)
            scheduler.step()
        if number == 1:
            live[0].loops = 4
            lt.rescale(live[0], X, optimizer=live[1], scheduler=live[2])
        if number >= 1:
            lrs, expected = ({group["name"]: group["lr"] for group in o.param_groups} for _, o, _ in (live, fresh))
            assert lrs == pytest.approx(expected, rel=1e-12)


def test_a_scheduler_that_is_not_given_is_warned_of_where_lrs_change() -> None:
    model = Steady(2)
    lt.parametrize(model, X)
    optimizer = optimizer_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.rescale(model, X, optimizer=optimizer)
    scheduler = schedulers.LambdaLR(optimizer, lambda n: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.rescale(model, X, optimizer=optimizer)  # at the same loop count nothing changes
    model.loops = 4
    with pytest.warns(lt.ScalingWarning, match=r"the LR of .*on the stream.* rescale\(…, scheduler=…\)") as caught:
        lt.rescale(model, X, optimizer=optimizer)
    assert caught[0].filename == __file__
    model.loops = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.rescale(model, X, optimizer=optimizer, scheduler=[scheduler])


def test_a_scheduler_of_another_optimizer_is_refused_before_anything_is_changed() -> None:
    model = Growing(2)
    plan = lt.parametrize(model, X)
    optimizer, other = optimizer_of(model), optimizer_of(model)
    model.loops, before = 4, factors(model, optimizer)
    for scheduler in (schedulers.LambdaLR(other, lambda n: 1.0), "cosine", [3]):
        with pytest.raises(lt.InputError, match="give one that was made over the optimizer"):
            lt.rescale(model, X, optimizer=optimizer, scheduler=scheduler)
    assert factors(model, optimizer) == before
    model.loops = 2
    assert lt.verify(model, X) == plan


def grow_on_two_ranks(rank: int, port: int) -> None:
    start(rank, port)
    model = Growing(2)
    lt.parametrize(model, X)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optimizer_of(wrapped)
    for loops in (2, 4, 1, 3):
        model.loops = loops
        lt.rescale(wrapped, X, optimizer=optimizer)
        step(wrapped, optimizer, X[: 1 + rank])
        lt.verify(wrapped, X, optimizer=optimizer)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(weights) for _ in range(2)]
        torch.distributed.all_gather(both, weights)
        assert torch.equal(*both)
    model.loops, before = 5 + rank, factors(model, optimizer)
    with pytest.raises(lt.InputError, match="the loop counts of rank 0 and rank 1 differ"):
        lt.rescale(wrapped, X, optimizer=optimizer)
    assert factors(model, optimizer) == before


@pytest.mark.slow
def test_ranks_switch_together_or_not_at_all() -> None:
    in_two_processes(grow_on_two_ranks)


# -- Muon


def muon_and_adamw(model: nn.Module, **settings: Any) -> list[torch.optim.Optimizer]:
    groups = lt.param_groups(model, "muon", lr=0.02, adamw_lr=0.003, weight_decay=0.1, **settings)
    return [
        torch.optim.Muon([group for group in groups if group["family"] == "muon"]),
        AdamW([group for group in groups if group["family"] == "adamw"]),
    ]


def test_muon_takes_the_matrices_of_the_branches_and_adamw_the_rest() -> None:
    model = rewritten()
    optimizers = muon_and_adamw(model)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in optimizers[0].param_groups for p in group["params"]}
    assert taken == {n for n in names.values() if n.startswith("layers.") and "norm" not in n}
    assert [group["lr"] for group in optimizers[0].param_groups] == pytest.approx([0.02 / math.sqrt(4)])
    for optimizer in optimizers:
        step(model, optimizer, tokens())
    lt.verify(model, tokens(), optimizer=optimizers)
    with pytest.raises(lt.VerificationError, match="and 10 more: in no group"):
        lt.verify(model, tokens(), optimizer=optimizers[1])
