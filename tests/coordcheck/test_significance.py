import json
import math

import numpy as np
import pandas as pd
import pytest

from looptransfer.coordcheck.exponents import COLUMNS, on_axis
from looptransfer.coordcheck.result import Context, CoordCheck, WatchedBranch
from looptransfer.coordcheck.significance import judge_frame
from looptransfer.errors import InputError

LOOPS = [1, 2, 4, 8]
CONTEXT = Context((WatchedBranch("f", "f", 8),))


def frame(exponent: float, scatter: float = 0.01, seeds: int = 3, **changes: float) -> pd.DataFrame:
    """What a check would have seen of one branch that adds N^exponent, whose visits point the same way."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for loops in LOOPS:
            for step in (0, 1):
                for visit in range(1, loops + 1):
                    noise = 2 ** (scatter * rng.normal(size=2))
                    added = loops**exponent
                    rows.append(("branch_rms", "f", visit, step, loops, seed, added * noise[0]))
                    rows.append(("added_rms", "f", visit, step, loops, seed, visit * added * noise[1]))
                rows.append(("stream_rms", "f", loops, step, loops, seed, 0.1 + loops * added))
                rows.append(("output_rms", "output", 0, step, loops, seed, 1.0))
            for module in ("f", "outside"):
                rows.append(("update_rms", module, 0, 1, loops, seed, 1e-3))
                rows.append(("lost_to_eps", module, 0, 1, loops, seed, changes.get("lost", 0.0)))
                rows.append(("gradient_rms", module, 0, 1, loops, seed, 1e-2))
    table = pd.DataFrame(rows, columns=["statistic", "module", "visit", "step", "loops", "seed", "value"])
    return table.assign(rule="factored", width=math.nan, layers=1)[COLUMNS]


def verdict(table: pd.DataFrame, **options: float) -> CoordCheck:
    return judge_frame(table, ["factored"], CONTEXT, **options)


def test_a_model_that_keeps_its_promises_passes() -> None:
    result = verdict(frame(-1))
    assert (result.answer, result.passed, result.exit_status) == ("PASSES", True, 0)
    assert result.reasons == []


@pytest.mark.parametrize(
    ("exponent", "words"),
    [
        (0.0, "the multiplier of f is not applied"),
        (-0.5, "the multiplier of f is 1/√N where 1/N is needed"),
        (-2.0, "the multiplier of f is applied twice"),
        (-0.75, "what f adds at its first visit falls as N^-0.75 where N^-1 is promised"),
    ],
)
def test_a_wrong_multiplier_fails_and_is_called_by_its_name(exponent: float, words: str) -> None:
    result = verdict(frame(exponent))
    assert result.exit_status == 1
    assert result.reasons[0].startswith(words)
    assert words in str(result)


def test_a_stream_that_grows_is_told_with_its_exponent() -> None:
    stream = next(finding for finding in verdict(frame(-0.5)).judged if finding.statistic == "stream_rms")
    assert stream.reading.startswith("the stream at initialisation grows as N^0.4")
    assert "1/√N where 1/N is needed" in stream.reading


def test_scattered_seeds_are_inconclusive_and_ask_for_more() -> None:
    result = verdict(frame(-1, scatter=1.0))
    assert result.exit_status == 3
    assert all(reason.endswith("more seeds would tell") for reason in result.reasons)


def test_what_is_not_finite_fails_and_says_where() -> None:
    table = frame(-1)
    table.loc[(table["loops"] == 8) & (table["statistic"] == "output_rms"), "value"] = math.inf
    result = verdict(table)
    assert result.exit_status == 1
    assert "output: output_rms is not finite at loops = 8" in result.reasons


def test_a_training_that_ended_early_fails() -> None:
    table = frame(-1)
    extra = table[table["statistic"] == "stream_rms"].assign(statistic="change_since_step")
    table = pd.concat([table, extra[(extra["step"] == 1) & (extra["loops"] < 8)]])
    ended = [finding for finding in verdict(table).failures if finding.exponent is None]
    assert {finding.statistic for finding in ended} == {"change_since_step"}


def test_branches_that_start_at_zero_are_judged_at_the_first_step_at_which_they_do_not() -> None:
    table = frame(-1)
    table.loc[(table["step"] == 0) & table["statistic"].isin(["branch_rms", "added_rms"]), "value"] = 0
    found = {finding.statistic: finding.answer for finding in verdict(table).judged}
    assert found["branch_rms"] == found["added_rms"] == "passes"


def test_eps_that_takes_much_of_the_step_fails() -> None:
    result = verdict(frame(-1, lost=0.3))
    assert result.reasons[0].startswith("Adam's eps takes 30.0 % of the first step of f")


def test_steps_of_the_branches_are_held_against_those_outside() -> None:
    table = frame(-1).assign(layers=4)  # base layers 1: LR × 4^−½ is promised
    found = [finding for finding in verdict(table).failures if finding.statistic == "step_ratio"]
    assert found[0].reading.startswith("the step of f is 1 times that outside the branches where 0.5 is promised")


def test_the_json_holds_every_finding_and_a_schema_version() -> None:
    result = verdict(frame(-0.5, lost=0.3))
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["schema_version"] == 1
    assert len(told["findings"]) == len(result.findings)


def test_axes_are_told_apart() -> None:
    table = frame(-1)
    deeper = table[table["loops"] == 2].assign(layers=3)
    both = pd.concat([table, deeper])
    assert set(on_axis(both, "loops")["layers"]) == {1}
    assert set(on_axis(both, "layers")["loops"]) == {2}


def test_any_exponent_can_be_asked_for() -> None:
    result = verdict(frame(-0.5))
    assert result.exponent("added_rms", "f").estimate == pytest.approx(0.5, abs=0.02)
    assert result.exponent("branch_rms", which="first").estimate == pytest.approx(-0.5, abs=0.02)
    with pytest.raises(InputError, match="there is no finite other above 0"):
        result.exponent("other")
    with pytest.raises(InputError, match="at two or more values of width"):
        result.exponent("stream_rms", axis="width")
