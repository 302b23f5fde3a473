import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import mup
import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.coordcheck.exponents import COLUMNS
from looptransfer.rules import Rule
from tests.experiments import FEATURES, LoopedMLP, TinyTask, tiny_experiment

QUICK: dict[str, Any] = {"loops": [1, 2, 4, 8], "steps": 2}


@pytest.fixture(scope="module")
def checked() -> lt.CoordCheck:
    return lt.coord_check(tiny_experiment(), rules=["factored", "sqrt", "unscaled"], **QUICK)


def test_a_rewritten_model_passes_and_the_controls_grow_as_theory_says(checked: lt.CoordCheck) -> None:
    assert checked.passed, str(checked)
    grown = {
        finding.rule: finding.exponent.estimate
        for finding in checked.findings
        if finding.statistic == "branch_rms" and finding.which == "first" and finding.exponent
    }
    assert grown == pytest.approx({"factored": -1, "sqrt": -0.5, "unscaled": 0}, abs=0.01)


def test_the_frame_is_tidy(checked: lt.CoordCheck) -> None:
    frame = checked.frame
    assert list(frame.columns) == COLUMNS
    assert not frame.duplicated(COLUMNS[:-1]).any()
    assert set(frame["step"]) == {0, 1, 2}
    visits = frame[(frame["statistic"] == "stream_rms") & (frame["loops"] == 8) & (frame["rule"] == "sqrt")]
    assert sorted(visits["visit"].unique()) == list(range(1, 9))
    wanted = {"stream_rms", "branch_rms", "added_rms", "change_since_init", "change_since_step", "output_rms"}
    assert wanted | {"gradient_rms", "update_rms", "alignment"} <= set(frame["statistic"])
    assert checked.cosines["factored", 8, 0].shape == (8, 8)


def test_the_same_check_gives_the_same_frame_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    first, second = (lt.coord_check(tiny_experiment(), loops=[1, 2], steps=1, seeds=2).frame for _ in range(2))
    assert first.equals(second)
    assert torch.equal(before, torch.random.get_rng_state())


def scaled(loops: int, power: float = 1.0, lost: bool = False) -> nn.Module:
    """A model that its author rewrote, and in which something went wrong afterwards."""
    model = LoopedMLP(loops)
    plan = lt.parametrize(model, torch.zeros(2, FEATURES))
    if lost:
        model.block.register_forward_hook(lambda module, args, out: out / plan.branches[0].multiplier)
    elif power != 1:
        model.block.register_forward_hook(lambda module, args, out: out * loops ** (1 - power))
    return model


def check(make: Any, **options: Any) -> lt.CoordCheck:
    return lt.coord_check(tiny_experiment(make_model=make), **{**QUICK, **options})


def test_a_model_that_was_rewritten_is_taken_as_it_is() -> None:
    result = check(scaled)
    assert result.rules == ("as made",)
    assert result.passed, str(result)


def test_a_lost_multiplier_is_named() -> None:
    result = check(functools.partial(scaled, lost=True))
    assert result.exit_status == 1
    assert result.reasons[0].startswith("the multiplier of block is not applied, or not recomputed for N")


def test_the_square_root_is_named() -> None:
    result = check(functools.partial(scaled, power=0.5))
    assert result.reasons[0].startswith("the multiplier of block is 1/√N where 1/N is needed")


@pytest.mark.parametrize("rule", ["completep", "sqrt"])
def test_a_model_that_was_rewritten_is_held_to_its_own_rule(rule: Rule) -> None:
    def make(loops: int, layers: int) -> nn.Module:
        model = lt.LoopedDecoder(width=8, heads=2, layers=layers, loops=loops, tied_head=False, vocab=16)
        lt.parametrize(model, torch.zeros(2, 4, dtype=torch.long), rule)
        return model

    batch = (torch.arange(8).reshape(2, 4), torch.ones(2, 4, dtype=torch.long))
    experiment = tokens(make, lambda seed: [batch] * 2)
    result = lt.coord_check(experiment, [1, 2, 4], steps=1, seeds=2, layers=[1, 4])
    assert result.rules == ("as made",)
    multipliers = [
        f for f in result.judged if f.statistic in {"multiplier", "branch_rms"} and f.which in {"all", "first"}
    ]
    assert {f.answer for f in multipliers if f.statistic == "multiplier"} == {"passes"}
    assert "fails" not in {f.answer for f in multipliers}


class HandScaled(LoopedMLP):
    """h + f(h)/N, written out by the user."""

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = stream + self.block(self.norm(stream)) / self.loops
        return self.head(stream)


def test_a_model_that_scales_by_itself_is_checked_as_made() -> None:
    result = check(HandScaled, rules=["as made"])
    assert result.passed, str(result)


class UndoneAtTheAdd(LoopedMLP):
    """The branch's module hands over 1/N of it, and the forward takes that back."""

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = stream + self.block(self.norm(stream)) * self.loops
        return self.head(stream)


def undone(loops: int) -> nn.Module:
    model = LoopedMLP(loops)
    lt.parametrize(model, torch.zeros(2, FEATURES))
    model.__class__ = UndoneAtTheAdd
    return model


def test_what_is_undone_at_the_addition_is_seen_there() -> None:
    assert check(undone).reasons[0].startswith("the multiplier of block is not applied")


def tokens(make: Any, batches: Any) -> lt.Experiment:
    return lt.Experiment("tokens", make, batches, lambda: batches(10**6))


def test_param_groups_that_were_dropped_are_missed_by_their_steps() -> None:
    def make(loops: int) -> nn.Module:
        return lt.LoopedDecoder(width=16, heads=2, layers=4, loops=loops, tied_head=False, vocab=16)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            tokens = torch.randint(16, (4, 9), generator=generator)
            yield tokens[:, :-1], tokens[:, 1:]

    experiment, options = tokens(make, batches), {"loops": [1, 4], "steps": 1, "seeds": 2}
    result = lt.coord_check(experiment, make_optimizer=lambda model: torch.optim.AdamW(model.parameters()), **options)
    assert "step_ratio" in {finding.statistic for finding in result.failures}
    assert lt.coord_check(experiment, **options).failures == []


def test_a_scheduler_and_another_optimizer_are_the_users() -> None:
    def make_optimizer(model: nn.Module) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)

    result = check(scaled, make_optimizer=make_optimizer)
    assert not result.context.adam
    assert {finding.statistic for finding in result.findings}.isdisjoint({"step_ratio", "lost_to_eps"})


@pytest.mark.parametrize("rule", ["factored", "completep"])
def test_width_and_depth_are_axes_too(rule: Rule) -> None:
    def make(loops: int, width: int, layers: int) -> nn.Module:
        return lt.LoopedDecoder(width=width, heads=2, layers=layers, loops=loops, tied_head=False, vocab=16)

    batch = (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))
    experiment = tokens(make, lambda seed: [batch] * 2)
    options: dict[str, Any] = {"steps": 1, "seeds": 2, "widths": [8, 16], "layers": [1, 4]}
    result = lt.coord_check(experiment, [1, 2], [rule], **options)
    assert set(result.frame["width"]) == {8, 16}
    assert set(result.frame["layers"]) == {1, 4}
    depth = [finding for finding in result.judged if finding.axis == "layers" and finding.statistic == "multiplier"]
    assert [finding.answer for finding in depth] == ["passes"] * 2
    steps = [f for f in result.judged if f.axis == "layers" and f.statistic == "update_rms"]
    assert {finding.answer for finding in steps} == {"passes"}
    assert set(result.cosines) == {(rule, 2, 0), (rule, 2, 1)}


def mup_scaled(loops: int, width: int, shaped: bool = True) -> nn.Module:
    """The decoder under μP: its standard deviations and LRs follow the width."""
    model = lt.LoopedDecoder(width=width, heads=2, layers=1, loops=loops, tied_head=False, vocab=16)
    model.head = mup.MuReadout(width, 16, bias=False)
    if shaped:
        base, delta = mup_scaled(1, 8, shaped=False), mup_scaled(1, 16, shaped=False)
        mup.set_base_shapes(model, base, delta=delta)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                mup.init.normal_(parameter, std=0.1)
    return model


def test_width_is_judged_under_mup_alone() -> None:
    batch = torch.randint(16, (8, 9), generator=torch.Generator().manual_seed(0)).split((8, 1), dim=1)
    batch = batch[0], torch.cat((batch[0][:, 1:], batch[1]), dim=1)
    result = lt.coord_check(tokens(mup_scaled, lambda seed: [batch] * 2), [1, 2], steps=1, seeds=4, widths=[8, 32, 128])
    over_width = [finding for finding in result.judged if finding.axis == "width"]
    assert [finding.statistic for finding in over_width] == ["stream_rms", "change_since_step"]
    assert all(finding.answer != "fails" for finding in over_width)
    assert result.exponent("change_since_step", axis="width", moment="one").estimate < 0.3

    def plain(loops: int, width: int) -> nn.Module:
        return lt.LoopedDecoder(width=width, heads=2, layers=1, loops=loops, tied_head=False, vocab=16)

    other = lt.coord_check(tokens(plain, lambda seed: [batch] * 2), [1, 2], steps=1, seeds=4, widths=[8, 32, 128])
    assert not [finding for finding in other.judged if finding.axis == "width"]
    assert other.exponent("change_since_step", axis="width", moment="one").estimate > 0.5


def test_a_users_statistic_stands_in_the_frame() -> None:
    result = check(scaled, statistics={"peak": lambda visit: visit.branch.abs().max()})
    assert (result.frame["statistic"] == "peak").sum() == 15 * 3 * 3


def test_branches_that_start_at_zero_pass() -> None:
    def make(loops: int) -> nn.Module:
        model = LoopedMLP(loops)
        nn.init.zeros_(model.block[2].weight)
        nn.init.zeros_(model.block[2].bias)
        return model

    assert check(make).failures == []


def exploding(loops: int) -> nn.Module:
    model = LoopedMLP(loops)
    if loops == 8:
        with torch.no_grad():
            model.head.weight.fill_(float("inf"))
    return model


def test_a_model_that_is_not_finite_fails_and_says_where() -> None:
    result = check(exploding)
    assert result.exit_status == 1
    assert any("is not finite at loops = 8" in reason for reason in result.reasons)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loops": [0, 2]}, r"loops is \[0, 2\]; give whole numbers from 1 up"),
        ({"loops": [4]}, "2 or more of them"),
        ({"loops": [2, 2]}, "each once"),
        ({"loops": [1, 2.5]}, "whole numbers"),
        ({"loops": "1,2"}, "whole numbers"),
        ({"seeds": 1}, "one seed has no interval"),
        ({"seeds": [3, 3]}, "give 2 or more"),
        ({"steps": 0}, "steps is 0; it must be a whole number from 1 up"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"level": 1}, "level is 1"),
        ({"rules": ["linear"]}, "choose one of factored, completep, sqrt, unscaled"),
        ({"rules": []}, "rules is"),
        ({"rules": "factored"}, "give a list"),
        ({"layers": [0]}, "layers is"),
    ],
)
def test_bad_numbers_are_refused_before_anything_runs(change: dict[str, Any], message: str) -> None:
    def make(loops: int) -> nn.Module:
        raise AssertionError("nothing may run")

    with pytest.raises(lt.InputError, match=message):
        check(make, **change)


def test_batches_that_end_are_counted() -> None:
    batch = (torch.zeros(2, FEATURES), torch.zeros(2, 1))
    with pytest.raises(lt.InputError, match=r"batches\(0\) ended after 2 of the 3 batches"):
        lt.coord_check(tiny_experiment(batches=lambda seed: [batch] * 2), **QUICK)


def test_a_model_without_branches_is_refused() -> None:
    with pytest.raises(lt.InputError, match="no residual"):
        check(lambda loops: nn.Linear(FEATURES, 1))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(lt.InputError, match=r"make_model\(1\) gives a int \(.*test_run.py, line"):
        check(lambda loops: loops)


def test_an_experiment_brings_its_lambda_and_base_layers() -> None:
    result = lt.coord_check(dataclasses.replace(tiny_experiment(), base_layers=4), loops=[1, 2], steps=1, seeds=2)
    assert result.context.base_layers == 4


def test_inputs_by_name_are_watched_as_others_are() -> None:
    def by_name(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        return (({"inputs": inputs}, targets) for inputs, targets in TinyTask().batches(seed))

    options: dict[str, Any] = {"loops": [1, 2], "steps": 1, "seeds": 2}
    named, plain = (lt.coord_check(tiny_experiment(batches=b), **options) for b in (by_name, TinyTask().batches))
    assert named.frame.equals(plain.frame)


def test_an_experiment_brings_its_branches_and_layers() -> None:
    experiment = tiny_experiment(branches=["block"], layers=4)
    frame = lt.coord_check(experiment, loops=[1, 2], steps=1, seeds=2).frame
    assert set(frame["layers"]) == {4}
    assert frame.loc[(frame["statistic"] == "multiplier") & (frame["loops"] == 2), "value"].unique() == [0.25]


@pytest.mark.parametrize("rule", ["factored", "sqrt", "unscaled"])
def test_the_rule_of_a_rewritten_model_is_exchanged_where_another_is_asked_for(rule: str) -> None:
    options: dict[str, Any] = {"loops": [1, 4], "steps": 1, "seeds": 2, "rules": [rule]}
    assert check(scaled, **options).frame.equals(check(LoopedMLP, **options).frame)


class DrawnDepth(LoopedMLP):
    """2 to 2N − 2 loops in a forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(2 + int(torch.randint(max(1, 2 * self.loops - 3), ()))):
            stream = stream + self.block(self.norm(stream))
        return self.head(stream)


def test_a_random_loop_count_is_refused_whether_it_is_declared_or_not() -> None:
    with pytest.raises(lt.InputError, match=r"random loop count \(loops=…\).*does the same every time"):
        lt.coord_check(tiny_experiment(make_model=DrawnDepth, loops=float), loops=[8, 16])
    with pytest.raises(lt.InputError, match=r"make_model\(8\) loops another number of times.*test_run.py, line \d+\)"):
        lt.coord_check(tiny_experiment(make_model=DrawnDepth), loops=[8, 16], steps=1)


def test_seeds_must_pair_the_trainings() -> None:
    def unseeded(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return TinyTask().batches(int(torch.Generator().seed() % 2**31))

    with pytest.raises(
        lt.InputError, match=r"batches\(0\) gives another batch 0 at its second call.*test_run.py, line"
    ):
        lt.coord_check(tiny_experiment(batches=unseeded), loops=[1, 2], steps=1)


def test_what_the_users_code_raises_in_a_training_is_told_with_its_line() -> None:
    def make_optimizer(model: nn.Module) -> Any:
        raise SystemExit(0)

    with pytest.raises(lt.InputError, match=r"make_optimizer\(model\) fails: SystemExit: 0 \(.*test_run.py, line \d+"):
        check(LoopedMLP, loops=[1, 2], make_optimizer=make_optimizer)
