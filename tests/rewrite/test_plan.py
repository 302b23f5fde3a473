import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.rewrite.plan import Branch, check_one_parameterization
from looptransfer.rules import Rule
from looptransfer.trials.pairing import check_start
from looptransfer.trials.run import Trial
from tests import models
from tests.experiments import LoopedMLP, tiny_experiment
from tests.models import WIDTH, Looped, inputs, line_of, noisy, small_decoder, tokens


def rows(plan: lt.ScalingPlan) -> list[tuple[str, str, int]]:
    return [(branch.layer, branch.module, branch.visits) for branch in plan.branches]


def plan_of(model: nn.Module, example: Tensor | None = None) -> lt.ScalingPlan:
    return lt.parametrize(noisy(model, std=0.1), inputs(2, 4, WIDTH) if example is None else example)


# -- the reference decoder


def test_the_plan_of_a_decoder_names_every_branch_in_order() -> None:
    plan = lt.parametrize(small_decoder(layers=2, loops=3), tokens())
    assert rows(plan) == [
        ("layers.0", "layers.0.attention", 3),
        ("layers.0", "layers.0.mlp", 3),
        ("layers.1", "layers.1.attention", 3),
        ("layers.1", "layers.1.mlp", 3),
    ]
    assert [branch.output for branch in plan.branches] == [None] * 4
    assert [branch.multiplier for branch in plan.branches] == pytest.approx([1 / (3 * math.sqrt(2))] * 4, rel=1e-15)
    assert (plan.rule, plan.lam, plan.base_layers, plan.layers, plan.loops) == ("factored", 1.0, 1, 2, 3)
    assert plan.depth_multiplier == 2
    assert plan.left_alone == ()


def test_a_source_names_the_line_of_its_add() -> None:
    plan = lt.parametrize(small_decoder(layers=1), tokens())
    attention, mlp = plan.branches
    assert Path(attention.source.rsplit(":", 1)[0]).parts[-3:] == ("looptransfer", "reference", "model.py")
    assert line_of(attention.source) == "x = x + self.attention(self.attention_norm(x), table)"
    assert line_of(mlp.source) == "x = x + self.mlp(self.mlp_norm(x))"


def test_prelude_and_coda_are_visited_once_and_count_as_layers() -> None:
    plan = lt.parametrize(small_decoder(layers=1, loops=4, prelude=1, coda=1), tokens(), lam=2.0, base_layers=2)
    assert plan.layers == 3
    assert plan.loops == frozenset({1, 4})
    expected = {"prelude.0": 2 / math.sqrt(1.5), "layers.0": 2 / (4 * math.sqrt(1.5)), "coda.0": 2 / math.sqrt(1.5)}
    for branch in plan.branches:
        assert branch.multiplier == pytest.approx(expected[branch.layer], rel=1e-14)
    assert len(plan.branches) == 6


def test_one_visit_is_a_legitimate_proxy() -> None:
    plan = lt.parametrize(small_decoder(layers=2, loops=1), tokens(), base_layers=2)
    assert plan.loops == 1
    assert [branch.multiplier for branch in plan.branches] == [1.0] * 4


def test_a_branch_holds_its_norm_and_matrices_and_nothing_else() -> None:
    plan = lt.parametrize(small_decoder(layers=1), tokens())
    held = {name for branch in plan.branches for name in branch.parameters}
    assert held == {name for name, _ in small_decoder(layers=1).named_parameters() if name.startswith("layers.")}
    assert plan.branches[1].parameters == tuple(f"layers.0.{n}.weight" for n in ("mlp.down", "mlp.up", "mlp_norm"))


def test_the_printed_plan_shows_layers_visits_multipliers_lines_and_the_lr_factor() -> None:
    plan = lt.parametrize(small_decoder(layers=4, loops=2), tokens())
    head, factors, header, *table = str(plan).splitlines()
    assert head == "rule factored: N = 2, L = 4, base layers 1, λ = 1"
    assert factors == "AdamW: LR and eps of the branches' parameters × 0.5, everything else × 1"
    assert header.split() == ["layer", "branch", "visits", "multiplier", "added", "at"]
    assert len(table) == 8
    for line, branch in zip(table, plan.branches, strict=True):
        layer, module, visits, multiplier, source = line.split()
        assert (layer, module, visits, multiplier) == (branch.layer, branch.module, "2", "0.25")
        assert branch.source.endswith(source)
        assert Path(source.rsplit(":", 1)[0]).name == "model.py"


def test_the_printed_plan_says_what_the_optimizer_gets_under_completep() -> None:
    plan = lt.parametrize(small_decoder(layers=4, loops=2), tokens(), "completep")
    _, factors, *_ = str(plan).splitlines()
    assert factors == "AdamW: LR of the branches' parameters × 1, their eps × 0.25, everything else × 1"


@pytest.mark.parametrize(
    ("rule", "base_layers", "told"),
    [("factored", 2, True), ("sqrt", 2, True), ("completep", 2, False), ("unscaled", 2, False), ("factored", 4, False),
     ("factored", 1, False)],
)  # fmt: skip
def test_the_printed_plan_tells_of_completep_where_an_lr_is_taken_to_another_depth(
    rule: Rule, base_layers: int, told: bool
) -> None:
    text = str(lt.parametrize(small_decoder(layers=4), tokens(), rule, base_layers=base_layers))
    assert (
        "depth       a base LR of 2 layers is taken to 4: in our sweeps the best base LR rises with L" in text
    ) == told


def test_the_printed_plan_lists_visit_counts_that_differ_and_says_whose_rule_that_is() -> None:
    text = str(lt.parametrize(small_decoder(layers=1, loops=4, prelude=1), tokens()))
    assert text.startswith("rule factored: N = {1, 4}, L = 2,")
    assert "our extension; the paper leaves models with prelude and coda open" in text


def test_the_printed_plan_names_what_was_left_alone() -> None:
    plan = plan_of(models.InjectedMLP())
    (left,) = plan.left_alone
    assert line_of(left.source) == "h = h + e"
    assert left.reason.startswith("the added branch holds residual adds of its own (an input injection")
    (line,) = [line for line in str(plan).splitlines() if line.startswith("left alone  ")]
    assert left.source.rsplit("/", 1)[1] in line


# -- other people's models


@pytest.mark.parametrize(
    "kind", [models.ResidualMLP, models.BareMLP, models.TorchAddMLP, models.BranchFirstMLP, models.InjectedMLP]
)
def test_a_single_module_in_a_loop_is_one_layer(kind: type[models.ResidualMLP]) -> None:
    plan = plan_of(kind(loops=5))
    assert rows(plan) == [("f", "f", 5)]
    assert (plan.layers, plan.loops) == (1, 5)
    assert plan.branches[0].multiplier == pytest.approx(0.2, rel=1e-15)


def test_each_matrix_of_the_theory_model_is_a_layer() -> None:
    plan = plan_of(models.TheoryModel(layers=3, loops=2))
    assert rows(plan) == [(f"layers.{i}", f"layers.{i}", 2) for i in range(3)]
    assert (plan.layers, plan.loops) == (3, 2)


def test_parallel_branches_are_two_branches_of_one_layer() -> None:
    plan = plan_of(Looped([models.ParallelBlock(), models.ParallelBlock()]))
    assert rows(plan) == [(f"blocks.{i}", f"blocks.{i}.{b}", 3) for i in range(2) for b in ("attn", "mlp")]
    assert plan.layers == 2
    assert plan.branches[0].source == plan.branches[1].source
    assert "blocks.0.n.weight" in plan.branches[0].parameters
    assert "blocks.0.n.weight" in plan.branches[1].parameters


def test_dropout_of_its_own_hands_the_branch_over() -> None:
    plan = plan_of(Looped([models.DropoutBlock(), models.DropoutBlock()]))
    names = ("attn_dropout", "mlp_dropout")
    assert rows(plan) == [(f"blocks.{i}", f"blocks.{i}.{name}", 3) for i in range(2) for name in names]
    assert plan.layers == 2


@pytest.mark.parametrize("order", ["ABCABC", "AABBCC"])
def test_the_same_object_several_times_is_one_layer_visited_several_times(order: str) -> None:
    blocks = {letter: models.MLPBlock() for letter in "ABC"}
    plan = plan_of(Looped([blocks[letter] for letter in order], loops=1))
    first = [order.index(letter) for letter in "ABC"]
    assert rows(plan) == [(f"blocks.{i}", f"blocks.{i}.mlp", 2) for i in first]
    assert (plan.layers, plan.loops) == (3, 2)


@pytest.mark.parametrize("model", [Looped(models.tied_blocks()), models.HalfTiedBlocks()], ids=["all", "one matrix"])
def test_tied_parameters_are_counted_together_across_distinct_modules(model: nn.Module) -> None:
    plan = plan_of(model)
    assert len(plan.branches) == 2
    assert (plan.layers, plan.loops) == (1, 6)
    assert [branch.multiplier for branch in plan.branches] == pytest.approx([1 / 6] * 2, rel=1e-15)


def test_a_part_of_a_tuple_or_mapping_is_named_by_its_place() -> None:
    (part,) = plan_of(Looped([models.TupleBlock()])).branches
    assert (part.module, part.output) == ("blocks.0.attn", 1)
    plan = plan_of(Looped([models.DictBlock()]))
    assert (plan.branches[0].module, plan.branches[0].output) == ("blocks.0.attn", "hidden")
    assert "blocks.0.attn[hidden]" in str(plan)


def test_a_written_out_activation_and_a_rotation_are_no_branches() -> None:
    plan = plan_of(Looped([models.GeluBlock()]))
    assert rows(plan) == [("blocks.0", "blocks.0.f", 3)]
    assert plan.left_alone == ()


def test_an_attention_module_with_its_own_add_belongs_to_the_layer_around_it() -> None:
    plan = plan_of(Looped([models.AlbertBlock(), models.AlbertBlock()]))
    assert rows(plan) == [
        (f"blocks.{i}", f"blocks.{i}.{branch}", 3) for i in range(2) for branch in ("attention.mix", "ffn_output")
    ]
    assert plan.layers == 2
    assert line_of(plan.branches[0].source) == "normed: Tensor = self.norm(x + self.mix(x))"


@pytest.mark.parametrize("kind", [models.MLPBlock, models.ParallelBlock, models.DropoutBlock, models.AlbertBlock])
def test_doubling_the_blocks_doubles_the_layers(kind: type[nn.Module]) -> None:
    few, many = (plan_of(Looped([kind() for _ in range(count)])) for count in (2, 4))
    assert (few.layers, many.layers) == (2, 4)
    assert len(many.branches) == 2 * len(few.branches)
    for branch in many.branches:
        assert branch.multiplier == pytest.approx(few.branches[0].multiplier / math.sqrt(2), rel=1e-14)


def test_blocks_inside_a_wrapper_keep_their_count() -> None:
    plan = plan_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), Looped([models.MLPBlock(), models.MLPBlock()], loops=2)))
    assert rows(plan) == [(f"1.blocks.{i}", f"1.blocks.{i}.mlp", 2) for i in range(2)]
    assert plan.layers == 2


# -- models without a plan


def refused(model: nn.Module, match: str) -> None:
    with pytest.raises(lt.InputError, match=match) as caught:
        lt.parametrize(model.double(), inputs(2, 4, WIDTH))
    source = str(caught.value).split("added at ")[1].split(" ")[0] if "added at " in str(caught.value) else ""
    if source:
        assert "+" in line_of(source)
        assert Path(source.rsplit(":", 1)[0]).name == "models.py"


def test_a_purely_functional_branch_is_refused_at_its_line() -> None:
    refused(
        models.FunctionalBranch(),
        r"branch added at .*models\.py:\d+ is not the output of a module of its own, .*"
        r"residual\(…, 'name'\).*branches=\[…\]",
    )


def test_a_branch_that_is_used_elsewhere_is_refused_at_its_line() -> None:
    refused(models.ReusedBranch(), r"branch added at .*models\.py:\d+ also feeds something else")


def test_a_model_without_residual_adds_is_refused() -> None:
    with pytest.raises(
        lt.InputError,
        match=r"no residual add was found: .*the example inputs reach .*looptransfer\.residual.*branches=",
    ):
        lt.parametrize(models.mlp().double(), inputs(4, WIDTH))


def test_a_module_that_is_a_branch_only_now_and_then_is_refused() -> None:
    class Sometimes(models.ResidualMLP):
        def forward(self, h: Tensor) -> Tensor:
            h = self.f(h)
            return h + self.f(h)

    with pytest.raises(lt.InputError, match="is not the output of a module of its own"):
        lt.parametrize(Sometimes().double(), inputs(4, WIDTH))


def test_a_branch_that_is_scaled_after_its_module_is_refused() -> None:
    class Gated(models.ResidualMLP):
        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.loops):
                h = h + torch.sigmoid(self.f(h))
            return h

    with pytest.raises(lt.InputError, match="is not the output of a module of its own"):
        lt.parametrize(Gated().double(), inputs(4, WIDTH))


# -- one parameterization for proxy and target

COUNTS = (1, 2, 4)
Counts = Mapping[int, Mapping[str, float]]  # visits of every branch, by N


def plan_with(visits: Mapping[str, float], layers: int = 1, members: tuple[str, ...] = ("weight",)) -> lt.ScalingPlan:
    branches = tuple(
        Branch(name, name, None, None, "model.py:1", n, 1 / n, tuple(f"{name}.{member}" for member in members))
        for name, n in visits.items()
    )
    return lt.ScalingPlan("factored", 1.0, 1, layers, branches)


def check_plans(plans: Mapping[int, lt.ScalingPlan], owned: Any = None) -> None:
    names = {n: {name for b in plan.branches for name in b.parameters} for n, plan in plans.items()}
    check_one_parameterization(plans, names | (owned or {}))


@pytest.mark.parametrize(
    "visits",
    [
        {1: {"f": 1}},
        {4: {"f": 4}},
        {n: {"f": n} for n in COUNTS},
        {n: {"f": n / 2} for n in (3, 4, 8)},  # a mean over draws
        {n: {"f": 2 * n} for n in COUNTS},
        {n: {"f": n, "prelude": 1} for n in COUNTS},
        {n: {"f": n, "prelude": 2} for n in COUNTS},
        {n: {"f": n + 1} for n in COUNTS},  # once outside the loop
        {n: {"f": 2 * n - 1, "g": 3 * n + 2} for n in COUNTS},
    ],
)
def test_visits_that_follow_n_are_one_parameterization(visits: Counts) -> None:
    check_plans({n: plan_with(of_branch) for n, of_branch in visits.items()})


@pytest.mark.parametrize(
    ("visits", "said"),
    [
        ({2: {"f": 1}}, "N = 2 applies no layer more than once"),
        ({1: {"f": 1}, 2: {"f": 1}}, "N = 2 applies no layer more than once"),
        ({2: {"f": 3}, 4: {"f": 3}}, "N = 2 and N = 4 loop equally often"),
        ({1: {"f": 1, "g": 4}, 2: {"f": 2, "g": 3}}, "the branch g is visited 4 at N = 1, 3 at N = 2"),
        ({1: {"f": 1}, 2: {"f": 2}, 4: {"f": 3}}, "the branch f is visited 1 at N = 1, 2 at N = 2, 3 at N = 4"),
        ({1: {"f": 1}, 2: {"f": 4}, 4: {"f": 16}}, "does not follow N"),
        ({2: {"f": 3}, 4: {"f": 4}}, "does not follow N"),  # half a visit more for each loop
    ],
)
def test_visits_that_do_not_follow_n_are_refused_with_the_counts(visits: Counts, said: str) -> None:
    with pytest.raises(lt.InputError, match=f"{said}.*N is the loop count"):
        check_plans({n: plan_with(of_branch) for n, of_branch in visits.items()})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (plan_with({"f": 2}, layers=2), "L 1 there, 2 here"),
        (plan_with({"f": 2, "late": 1}), "residual branches nothing there, late here"),
        (plan_with({"g": 2}), "residual branches f there, g here"),
        (plan_with({"f": 2}, members=("weight", "gain")), "parameters in the branches nothing there, f.gain here"),
        (plan_with({"f": 2}, members=()), "parameters in the branches f.weight there, nothing here"),
    ],
)
def test_plans_that_differ_in_more_than_visits_are_refused_with_the_difference(
    other: lt.ScalingPlan, said: str
) -> None:
    names = {"f.weight", "f.gain", "g.weight", "late.weight"}
    with pytest.raises(lt.InputError, match=f"N = 1 and N = 2 are not one parameterization: {said}"):
        check_plans({1: plan_with({"f": 1}), 2: other}, {1: names, 2: names})


def test_a_parameter_that_only_one_of_the_models_has_is_no_difference() -> None:
    target = plan_with({"f": 2}, members=("weight", "gain_of_visit_2"))
    check_plans({1: plan_with({"f": 1}), 2: target}, {1: {"f.weight"}, 2: {"f.weight", "f.gain_of_visit_2"}})


class MapsOfVisits(LoopedMLP):
    """Beside the shared block every visit has a map of its own, in one sum."""

    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(loops))

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for own in self.maps:
            normed = self.norm(stream)
            stream = stream + (own(normed) + self.block(normed))
        return self.head(stream)


def test_maps_that_belong_to_a_visit_are_no_difference() -> None:
    first = Trial("factored", 1, 0.01, 0, device="cpu", directory=Path("none"))
    starts = check_start(tiny_experiment(make_model=MapsOfVisits), first, (1, 2, 3), (0,))
    assert {n: begun.plan.layers for n, begun in starts.items() if begun.plan} == {1: 1, 2: 1, 3: 1}
    assert lt.coord_check(tiny_experiment(make_model=MapsOfVisits), [1, 2, 4], steps=1).answer


class LateBranch(LoopedMLP):
    """From two loops on a layer of its own comes after them."""

    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.late = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = stream + self.block(self.norm(stream))
        return self.head(stream + self.late(stream) if self.loops > 1 else stream)


def test_sweeps_and_coordinate_checks_refuse_models_that_are_not_one() -> None:
    said = "N = 1 and N = 2 are not one parameterization: L 1 there, 2 here"
    first = Trial("factored", 1, 0.01, 0, device="cpu", directory=Path("none"))
    with pytest.raises(lt.InputError, match=said):
        check_start(tiny_experiment(make_model=LateBranch), first, (1, 2), (0,))
    with pytest.raises(lt.InputError, match=said):
        lt.coord_check(tiny_experiment(make_model=LateBranch), [1, 2], steps=1)
