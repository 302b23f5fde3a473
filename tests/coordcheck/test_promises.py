import pytest

from looptransfer.coordcheck.promises import promises
from looptransfer.rules import Rule


def bounds(rule: Rule, adam: bool = True) -> dict[tuple[str, str, str, str, str], tuple[float, float]]:
    return {(p.axis, p.statistic, p.where, p.moment, p.which): (p.low, p.high) for p in promises(rule, adam)}


@pytest.mark.parametrize(("rule", "alpha"), [("factored", 1), ("completep", 1), ("sqrt", 0.5), ("unscaled", 0)])
def test_a_branch_falls_with_its_multiplier_and_sums_grow_between_walk_and_line(rule: Rule, alpha: float) -> None:
    found = bounds(rule)
    assert found["loops", "branch_rms", "looped", "init", "first"] == (-alpha, -alpha)
    assert found["loops", "added_rms", "looped", "init", "last"] == (0.5 - alpha, 1 - alpha)
    assert found["loops", "branch_rms", "once", "init", "all"] == (0, 0)


def test_under_factored_nothing_may_grow() -> None:
    assert all(high <= 0 for _, high in bounds("factored").values())


def test_depth_is_promised_to_the_rules_that_scale_with_it() -> None:
    assert bounds("factored")["layers", "multiplier", "looped", "init", "all"] == (-0.5, -0.5)
    assert bounds("completep")["layers", "multiplier", "looped", "init", "all"] == (-1, -1)
    assert bounds("unscaled")["layers", "multiplier", "looped", "init", "all"] == (0, 0)


def test_only_adams_step_is_promised_not_to_depend_on_the_gradient() -> None:
    where = ("loops", "update_rms", "branches", "one", "all")
    assert bounds("factored")[where] == (0, 0)
    assert bounds("factored", adam=False)[where] == (-0.5, 0)
    over_layers = ("layers", "update_rms", "all branches", "one", "all")
    assert (bounds("factored")[over_layers], bounds("completep")[over_layers]) == ((-0.5, -0.5), (0, 0))
    assert over_layers not in bounds("factored", adam=False)
