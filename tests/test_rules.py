import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import looptransfer as lt
from looptransfer import rules
from looptransfer.rules import DepthFactors, Family, Rule, depth_factors

reproducible = settings(derandomize=True, deadline=None)
counts = st.integers(min_value=1, max_value=10_000)
lams = st.floats(min_value=1e-3, max_value=1e3)
scaling_rules = st.sampled_from(["factored", "sqrt"])
every_rule = st.sampled_from(list(rules.RULES))


@reproducible
@given(counts, counts, lams, counts)
def test_factored_is_lambda_over_visits_and_root_depth(visits: int, layers: int, lam: float, base: int) -> None:
    epsilon = lt.residual_multiplier("factored", visits=visits, layers=layers, lam=lam, base_layers=base)
    assert epsilon == pytest.approx(lam * math.sqrt(base) / (visits * math.sqrt(layers)), rel=1e-12)


@reproducible
@given(counts, counts, lams, counts)
def test_sqrt_is_lambda_over_root_of_visits_and_depth(visits: int, layers: int, lam: float, base: int) -> None:
    epsilon = lt.residual_multiplier("sqrt", visits=visits, layers=layers, lam=lam, base_layers=base)
    assert epsilon**2 == pytest.approx(lam**2 * base / (visits * layers), rel=1e-12)


@reproducible
@given(counts, counts, lams, counts)
def test_completep_is_lambda_over_visits_and_depth(visits: int, layers: int, lam: float, base: int) -> None:
    epsilon = lt.residual_multiplier("completep", visits=visits, layers=layers, lam=lam, base_layers=base)
    assert epsilon == pytest.approx(lam * base / (visits * layers), rel=1e-12)


@reproducible
@given(counts, lams, counts)
def test_completep_and_factored_agree_exactly_at_the_base_depth(visits: int, lam: float, layers: int) -> None:
    size: dict[str, Any] = {"visits": visits, "layers": layers, "lam": lam, "base_layers": layers}
    assert lt.residual_multiplier("completep", **size) == lt.residual_multiplier("factored", **size)
    assert depth_factors("completep", "sgd", layers, layers) == depth_factors("factored", "sgd", layers, layers)


@reproducible
@given(counts, counts, counts, lams)
def test_factored_times_visits_is_the_same_for_every_visit_count(n: int, m: int, layers: int, lam: float) -> None:
    once = n * lt.residual_multiplier("factored", visits=n, layers=layers, lam=lam)
    again = m * lt.residual_multiplier("factored", visits=m, layers=layers, lam=lam)
    assert once == pytest.approx(again, rel=1e-12)


@reproducible
@given(scaling_rules, counts, counts, lams)
def test_doubling_the_layers_divides_by_root_two(rule: Rule, visits: int, layers: int, lam: float) -> None:
    single = lt.residual_multiplier(rule, visits=visits, layers=layers, lam=lam)
    double = lt.residual_multiplier(rule, visits=visits, layers=2 * layers, lam=lam)
    assert single / double == pytest.approx(math.sqrt(2), rel=1e-12)


@reproducible
@given(scaling_rules, counts, counts, counts)
def test_base_layers_multiply_by_their_root(rule: Rule, visits: int, layers: int, base: int) -> None:
    absolute = lt.residual_multiplier(rule, visits=visits, layers=layers)
    relative = lt.residual_multiplier(rule, visits=visits, layers=layers, base_layers=base)
    assert relative == pytest.approx(absolute * math.sqrt(base), rel=1e-12)


@reproducible
@given(scaling_rules, counts, lams)
def test_a_model_at_its_base_depth_with_one_visit_is_multiplied_by_lambda(rule: Rule, layers: int, lam: float) -> None:
    assert lt.residual_multiplier(rule, visits=1, layers=layers, lam=lam, base_layers=layers) == pytest.approx(lam)


@reproducible
@given(counts, lams, counts)
def test_factored_and_sqrt_agree_exactly_at_one_visit(layers: int, lam: float, base: int) -> None:
    arms = [lt.residual_multiplier(r, visits=1, layers=layers, lam=lam, base_layers=base) for r in ("factored", "sqrt")]
    assert arms[0] == arms[1]


@reproducible
@given(st.integers(min_value=2, max_value=10_000), counts)
def test_factored_is_smaller_than_sqrt_by_the_root_of_the_visits(visits: int, layers: int) -> None:
    factored, sqrt = (lt.residual_multiplier(r, visits=visits, layers=layers) for r in ("factored", "sqrt"))
    assert sqrt / factored == pytest.approx(math.sqrt(visits), rel=1e-12)


@reproducible
@given(counts, counts, lams, counts)
def test_unscaled_is_one_whatever_the_model(visits: int, layers: int, lam: float, base: int) -> None:
    assert lt.residual_multiplier("unscaled", visits=visits, layers=layers, lam=lam, base_layers=base) == 1.0


@pytest.mark.parametrize("lam", [0, 0.0, -1, -1e-9, math.nan, math.inf, -math.inf, "1", None])
@pytest.mark.parametrize("rule", list(rules.RULES))
def test_lambda_must_be_finite_and_positive_under_every_rule(rule: Rule, lam: object) -> None:
    with pytest.raises(lt.InputError, match=r"lam is .*must be a finite number above 0"):
        lt.residual_multiplier(rule, visits=1, layers=1, lam=lam)  # type: ignore[arg-type]


@pytest.mark.parametrize("visits", [0, -1, 0.5, float("inf"), float("nan"), "3", None, True])
def test_visits_must_be_a_number_from_one_up(visits: object) -> None:
    with pytest.raises(lt.InputError, match=r"visits is .*a number from 1 up"):
        lt.residual_multiplier("factored", visits=visits, layers=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, "3", None, True])
@pytest.mark.parametrize("name", ["layers", "base_layers"])
def test_layer_counts_must_be_whole_numbers_from_one_up(name: str, count: object) -> None:
    given_counts = {"layers": 1, "base_layers": 1} | {name: count}
    with pytest.raises(lt.InputError, match=rf"^{name} is .*whole number from 1 up"):
        lt.residual_multiplier("factored", visits=1, **given_counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["Factored", "", "1/N", None])
def test_an_unknown_rule_is_answered_with_the_known_ones(rule: object) -> None:
    with pytest.raises(lt.InputError, match=r"rule is .*choose one of factored, completep, sqrt, unscaled"):
        lt.residual_multiplier(rule, visits=1, layers=1)  # type: ignore[arg-type]


def test_an_input_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        lt.residual_multiplier("other", visits=1, layers=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["factored", "sqrt"])
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("adamw", DepthFactors(lr=0.5, eps=0.5, weight_decay=1.0)),
        ("adam", DepthFactors(lr=0.5, eps=0.5, weight_decay=0.5)),
        ("sgd", DepthFactors(lr=1.0, eps=1.0, weight_decay=0.5)),
    ],
)
def test_depth_factors_at_four_times_the_base_depth(rule: Rule, family: Family, expected: DepthFactors) -> None:
    assert depth_factors(rule, family, 4, 1) == expected
    assert depth_factors(rule, family, 12, 3) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("adamw", DepthFactors(lr=1.0, eps=0.25, weight_decay=1.0)),
        ("adam", DepthFactors(lr=1.0, eps=0.25, weight_decay=0.25)),
        ("sgd", DepthFactors(lr=4.0, eps=1.0, weight_decay=0.25)),
        ("muon", DepthFactors(lr=1.0, eps=1.0, weight_decay=1.0)),
    ],
)
def test_depth_factors_of_completep_at_four_times_the_base_depth(family: Family, expected: DepthFactors) -> None:
    assert depth_factors("completep", family, 4, 1) == expected
    assert depth_factors("completep", family, 12, 3) == expected


@reproducible
@given(
    st.sampled_from(["factored", "completep", "sqrt"]),
    st.sampled_from(["adamw", "adam", "sgd", "muon"]),
    counts,
    counts,
)
def test_steps_of_all_layers_move_the_output_alike_at_every_depth(
    rule: Rule, family: Family, layers: int, base: int
) -> None:
    epsilon = lt.residual_multiplier(rule, visits=1, layers=layers, base_layers=base)
    gradient = epsilon if family == "sgd" else 1.0  # all others divide it out
    moved = layers / base * epsilon * depth_factors(rule, family, layers, base).lr * gradient
    assert moved == pytest.approx(1.0, rel=1e-12)


@reproducible
@given(st.sampled_from(["adamw", "adam", "sgd"]), counts, counts)
def test_unscaled_leaves_the_optimizer_alone(family: Family, layers: int, base: int) -> None:
    assert depth_factors("unscaled", family, layers, base) == DepthFactors(1.0, 1.0, 1.0)


@reproducible
@given(every_rule, st.sampled_from(["adamw", "adam", "sgd"]), counts)
def test_depth_factors_are_one_at_the_base_depth(rule: Rule, family: Family, layers: int) -> None:
    assert depth_factors(rule, family, layers, layers) == DepthFactors(1.0, 1.0, 1.0)
