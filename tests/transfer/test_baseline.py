import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.command.cli import main
from looptransfer.errors import InputError
from looptransfer.transfer.baseline import (
    Baseline,
    StoredOptimum,
    baseline_of,
    code_version,
    fingerprint_of,
    read_baseline,
)
from looptransfer.transfer.bracket import bracket, stored_lrs
from looptransfer.transfer.check import check
from looptransfer.transfer.comparison import compare, differing
from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.results import tidy

reproducible = settings(derandomize=True, deadline=None, max_examples=20)


def runs(
    moved: float = 0.0, worse: float = 0.0, seeds: range = range(4), noise: float = 0.002, **columns: Any
) -> pd.DataFrame:
    """A sweep over N = 1, 4, 16 whose optimum at 16 moved and whose loss there is worse; noise goes with the seed."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for n in (1, 4, 16):
            for x in np.arange(-10.0, -2.9):
                u = x + 6.3 - (moved if n == 16 else 0.0)
                loss = 2 + 0.06 * u**2 + (worse if n == 16 else 0.0) + rng.normal(0, noise)
                rows.append({"rule": "factored", "loops": n, "lr": 2.0**x, "seed": seed, "loss": loss, **columns})
    return pd.DataFrame(rows)


def stored(tmp_path: Path, **arguments: Any) -> Baseline:
    path = tmp_path / "lr-optima.json"
    baseline_of(check(runs(**arguments)), path).write(path)
    return read_baseline(path)


def answers(told: Any) -> list[str]:
    return [finding.answer for finding in told.findings]


# -- stored and read


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    made = baseline_of(check(runs(layers=2)), tmp_path / "optima.json")
    made.write(tmp_path / "optima.json")
    assert read_baseline(tmp_path / "optima.json") == made
    assert made.fingerprint["layers"] == "2"
    assert made.fingerprint["seeds"] == "0, 1, 2, 3"


def test_nothing_is_stored_where_no_optimum_is_known() -> None:
    table = runs()
    with pytest.raises(InputError, match=r"no optimum of rule 'factored' is known \(high edge\)"):
        baseline_of(check(table[table["lr"] < 2.0**-7]))


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    made = stored(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*choose a file in a folder that exists"):
        made.write(tmp_path / "nowhere" / "optima.json")
    assert [path.name for path in tmp_path.iterdir()] == ["lr-optima.json"]


def test_an_absent_baseline_says_how_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no baseline .*gone\.json; make it with --update-baseline"):
        read_baseline(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no schema_version"),
        ('{"schema_version": 99}', "has schema_version 99, not 1; make it again with --update-baseline"),
        ('{"schema_version": 1}', "is damaged: transferred_lr is missing"),
        ('{"schema_version": 1, "transferred_lr": NaN}', "NaN is no JSON number"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lr-optima.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_baseline(path)


def test_a_file_of_other_bytes_or_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lr-optima.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not JSON"):
        read_baseline(path)
    with pytest.raises(InputError, match="cannot read the baseline"):
        read_baseline(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("axis",), 3, "axis is '3', not a str"),
        (("confidence",), "much", "confidence is 'much', not a finite number"),
        (("transferred_lr",), True, "transferred_lr is True"),
        (("fingerprint",), [], "fingerprint is '\\[\\]', not a dict"),
        (("rules",), {}, "it holds no optimum"),
        (("rules", "factored"), "none", "rules factored is 'none', not a list"),
        (("rules", "factored", 0, "at"), 1.5, "at is '1.5', not a int"),
        (("rules", "factored", 0, "log2_lr"), {"estimate": 0, "low": 1, "high": 2}, "log2_lr is no interval"),
        (("rules", "factored", 0, "log2_lr_by_seed"), {"0": 1.0}, "fewer than two seeds"),
        (("rules", "factored", 0, "loss_by_seed"), {"7": 1.0, "8": 1.0}, "the seeds of 1 differ"),
        (("rules", "factored", 0, "loss_by_seed"), {"7": 1.0, "8": None}, "loss_by_seed is None"),
        (("rules", "factored", 0), 5, "not subscriptable"),
    ],
)
def test_a_damaged_baseline_is_refused_by_name(
    tmp_path: Path, place: tuple[Any, ...], value: object, message: str
) -> None:
    data = stored(tmp_path).to_dict()
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"(?s)damaged.*{message}.*--update-baseline"):
        read_baseline(path)


def test_the_code_version_is_known_inside_a_repository_only(tmp_path: Path) -> None:
    assert code_version(tmp_path) is None


# -- compared


def test_the_same_runs_hold_with_no_difference_at_all(tmp_path: Path) -> None:
    told = compare(check(runs()), stored(tmp_path))
    assert (told.answer, told.exit_status, told.differing) == ("HOLDS", 0, {})
    assert all(finding.shift == Interval(0, 0, 0) and finding.paired for finding in told.findings)


@reproducible
@given(st.floats(0.6, 2.0), st.sampled_from([-1, 1]))
def test_an_optimum_that_moved_beyond_the_tolerance_is_named(
    tmp_path_factory: pytest.TempPathFactory, by: float, way: int
) -> None:
    told = compare(check(runs(moved=way * by)), stored(tmp_path_factory.mktemp("moved")))
    assert (answers(told), told.exit_status) == (["HOLDS", "HOLDS", "MOVED"], 1)
    assert told.findings[2].shift is not None
    assert told.findings[2].shift.estimate == pytest.approx(way * by, abs=0.03)
    assert "N = 16: the optimum moved by " in str(told)


def test_an_optimum_that_moved_within_the_tolerance_holds(tmp_path: Path) -> None:
    assert compare(check(runs(moved=0.3)), stored(tmp_path)).answer == "HOLDS"
    assert compare(check(runs(moved=0.3)), stored(tmp_path), tolerance=0.2).answer == "MOVED"


def test_a_loss_that_got_worse_is_named_and_a_better_one_holds(tmp_path: Path) -> None:
    before = stored(tmp_path)
    told = compare(check(runs(worse=0.05)), before)
    assert (answers(told), told.exit_status) == (["HOLDS", "HOLDS", "WORSE"], 1)
    assert compare(check(runs(worse=-0.05)), before).answer == "HOLDS"


def test_an_optimum_that_cannot_be_told_any_more_is_not_passed(tmp_path: Path) -> None:
    table = runs()
    told = compare(check(table[(table["loops"] < 16) | (table["lr"] < 2.0**-7)]), stored(tmp_path))
    assert (answers(told), told.exit_status) == (["HOLDS", "HOLDS", "INCONCLUSIVE"], 3)
    assert "the highest LR is the best" in str(told)


def test_an_n_that_was_not_run_is_not_passed_and_a_new_one_is_told(tmp_path: Path) -> None:
    table = runs()
    told = compare(check(table[table["loops"] < 16]), stored(tmp_path))
    assert (answers(told)[-1], told.exit_status) == ("INCONCLUSIVE", 3)
    assert "N = 16: it was not run" in str(told)
    told = compare(check(pd.concat([table, table[table["loops"] == 16].assign(loops=32)])), stored(tmp_path))
    assert told.exit_status == 0
    assert "N = 32 is not in the baseline" in str(told)


def test_other_seeds_are_compared_by_welch_and_noise_asks_for_the_same_seeds(tmp_path: Path) -> None:
    before = stored(tmp_path)
    told = compare(check(runs(seeds=range(10, 14))), before)
    assert told.answer == "HOLDS"
    assert not any(finding.paired for finding in told.findings)
    assert told.differing["seeds"] == ("0, 1, 2, 3", "10, 11, 12, 13")
    noisy = stored(tmp_path, noise=0.04)
    told = compare(check(runs(seeds=range(10, 14), noise=0.04)), noisy)
    assert told.answer == "INCONCLUSIVE"
    assert "run the seeds of the baseline" in str(told)


def test_a_fingerprint_that_differs_is_told_key_by_key(tmp_path: Path) -> None:
    told = compare(check(runs(steps=500)), stored(tmp_path, steps=250))
    assert told.differing == {"steps": ("250", "500")}
    assert "made differently: steps was 250, is 500" in str(told)
    assert told.to_dict()["differing"] == {"steps": {"then": "250", "now": "500"}}


def test_the_settings_of_an_experiment_are_compared_where_both_are_known() -> None:
    table = tidy(runs())
    table.attrs["experiment"] = {"corpus_sha256": "a", "steps": 250}
    then, other = fingerprint_of(table, "loops"), fingerprint_of(tidy(runs()), "loops")
    table.attrs["experiment"] = {"corpus_sha256": "b", "steps": 250}
    assert differing(then, fingerprint_of(table, "loops")) == {"experiment corpus_sha256": ("a", "b")}
    assert differing(then, other) == {}


def test_a_baseline_of_another_axis_rule_or_metric_is_refused(tmp_path: Path) -> None:
    before = stored(tmp_path)
    with pytest.raises(InputError, match="made with axis 'loops', not 'width'"):
        compare(check(runs().rename(columns={"loops": "width"}), axis="width"), before)
    with pytest.raises(InputError, match="has no optima of rule 'sqrt', only of factored"):
        compare(check(runs(rule="sqrt")), before)
    with pytest.raises(InputError, match="made with unit 'nats', not 'of the metric'"):
        compare(check(runs().assign(loss=lambda t: -t["loss"]), maximize=True), before)
    with pytest.raises(InputError, match=r"tolerance is 0; it must be a finite number of octaves above 0"):
        compare(check(runs()), before, tolerance=0)


def test_an_optimum_that_was_censored_then_is_a_note(tmp_path: Path) -> None:
    table, path = runs(), tmp_path / "optima.json"
    some = table[(table["loops"] < 16) | (table["lr"] < 2.0**-7)]
    baseline_of(check(some), path).write(path)
    told = compare(check(table), read_baseline(path))
    assert told.exit_status == 0
    assert "N = 16 was censored in the baseline (high edge)" in str(told)


def test_nothing_holds_where_nothing_is_left_to_compare(tmp_path: Path) -> None:
    table = runs()
    cut = table[table["lr"] < 2.0**-7]
    verdict = check(pd.concat([cut, table.assign(rule="sqrt")]), rule="sqrt")
    path = tmp_path / "optima.json"
    baseline_of(verdict, path).write(path)
    told = compare(check(cut), read_baseline(path))
    assert (told.findings, told.answer, told.exit_status) == ((), "INCONCLUSIVE", 3)
    assert "no optimum of the baseline could be compared" in str(told)
    assert "no optimum of the baseline could be compared" in told.to_markdown()


def test_a_tolerance_of_the_loss_above_the_whole_curve_holds_nothing(tmp_path: Path) -> None:
    told = compare(check(runs(), regret_tolerance=0.5), stored(tmp_path))
    assert (answers(told), told.exit_status) == (["INCONCLUSIVE"] * 3, 3)
    assert "as large as the whole curve is high" in str(told)


def test_a_loss_in_a_small_unit_has_a_small_tolerance(tmp_path: Path) -> None:
    def small(table: pd.DataFrame, by: float = 1.0) -> Any:
        return check(table.assign(loss=1e-3 * by * table["loss"]))

    path = tmp_path / "optima.json"
    baseline_of(small(runs()), path).write(path)
    before = read_baseline(path)
    assert before.unit == "of the loss"
    assert before.loss_tolerance == pytest.approx(0.05 * 6.25 * 0.06e-3, rel=0.1)
    assert compare(small(runs()), before).answer == "HOLDS"
    told = compare(small(runs(), by=1.5), before)
    assert (told.answer, told.unit) == ("WORSE", "of the loss")
    assert "nats" not in str(told)
    assert "is worse by 0.00100" in str(told)


def test_what_only_the_height_of_the_curve_tells_is_no_other_unit(tmp_path: Path) -> None:
    """The same loss, against which 0.02 was small then and is large now."""
    path = tmp_path / "optima.json"
    baseline_of(check(runs().assign(loss=lambda t: 0.5 * t["loss"])), path).write(path)
    before, verdict = read_baseline(path), check(runs().assign(loss=lambda t: 0.08 * t["loss"]))
    assert {before.unit, verdict.unit} == {"nats", "of the loss"}
    assert compare(verdict, before).findings


def test_words_markdown_and_json_come_from_one_result_and_escape_what_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "lr-optima.json"
    baseline_of(check(runs(tag="<b>old|</b>")), path).write(path)
    told = compare(check(runs(tag="new", moved=1.0)), read_baseline(path))
    page = told.to_markdown()
    assert "<b>" not in page
    assert "| 16 | MOVED |" in page
    data = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["findings"][2]["answer"] == data["answer"] == "MOVED"


# -- the cheap mode


def looked(baseline: Baseline, moved: float = 0.0, worse: float = 0.0, diverged: int | None = None, **more: Any) -> Any:
    """Half, once and twice the stored LR at N = 1 and 16; `diverged` is the position of an LR that diverges."""
    rows = []
    for at, one in baseline.of_rule("factored").items():
        for position, lr in enumerate(stored_lrs(one)):
            if at == 4:
                continue
            for seed in more.get("seeds", range(4)):
                rng = np.random.default_rng([seed, at, position])
                u = np.log2(lr) + 6.3 - (moved if at == 16 else 0.0)
                loss = 2 + 0.06 * u**2 + (worse if at == 16 else 0.0) + rng.normal(0, more.get("noise", 0.002))
                lost = at == 16 and position == diverged
                rows.append({"loops": at, "lr": lr, "seed": seed, "loss": np.inf if lost else loss})
    return bracket(tidy(pd.DataFrame(rows)), baseline, "factored", 0.02, 0.90)


def test_an_optimum_in_its_place_is_bracketed(tmp_path: Path) -> None:
    told = looked(stored(tmp_path))
    assert (answers(told), told.exit_status, told.differing) == (["HOLDS", "HOLDS"], 0, {})


@reproducible
@given(st.floats(0.65, 3.0), st.sampled_from([-1, 1]))
def test_an_optimum_beyond_half_an_octave_has_moved(
    tmp_path_factory: pytest.TempPathFactory, by: float, way: int
) -> None:
    told = looked(stored(tmp_path_factory.mktemp("bracket")), moved=way * by)
    assert (answers(told), told.exit_status) == (["HOLDS", "MOVED"], 1)
    assert ("twice" if way > 0 else "half") + " the stored LR is better" in str(told)


def test_a_worse_loss_is_seen_without_a_shift(tmp_path: Path) -> None:
    assert answers(looked(stored(tmp_path), worse=0.05)) == ["HOLDS", "WORSE"]


@pytest.mark.parametrize(("diverged", "answer"), [(0, "HOLDS"), (1, "MOVED"), (2, "HOLDS")])
def test_divergence_bounds_the_optimum_beside_it_and_moves_it_at_its_place(
    tmp_path: Path, diverged: int, answer: str
) -> None:
    told = looked(stored(tmp_path), diverged=diverged)
    assert answers(told) == ["HOLDS", answer]


def test_noise_is_inconclusive_and_says_how_many_seeds(tmp_path: Path) -> None:
    told = looked(stored(tmp_path), noise=0.2, seeds=range(2))
    assert told.exit_status == 3
    assert "seeds" in str(told)


def test_every_n_that_was_asked_for_has_a_finding_also_where_it_was_not_run(tmp_path: Path) -> None:
    before = stored(tmp_path)
    lrs = stored_lrs(before.of_rule("factored")[1])
    rows = [(1, lr, seed, 2 + 0.06 * (np.log2(lr) + 6.3) ** 2) for lr in lrs for seed in range(4)]
    table = tidy(pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"]))
    told = bracket(table, before, "factored", None, 0.90, [1, 16])
    assert (answers(told), told.exit_status) == (["HOLDS", "INCONCLUSIVE"], 3)
    assert "N = 16: half, once and twice the stored LR were not run by every seed" in str(told)
    assert bracket(table, before, "factored", None, 0.90, []).exit_status == 3
    lacking = table[(table["seed"] != "2") | (table["lr"] != table["lr"].max())]
    assert bracket(lacking, before, "factored", None, 0.90).exit_status == 3
    elsewhere = table.assign(lr=2 * table["lr"])
    assert bracket(elsewhere, before, "factored", None, 0.90).exit_status == 3


def test_the_loss_may_become_worse_by_what_the_baseline_allows(tmp_path: Path) -> None:
    before = stored(tmp_path)
    assert answers(looked(before, worse=0.03)) == ["HOLDS", "WORSE"]
    lenient = replace(before, loss_tolerance=0.1)
    lrs = {at: stored_lrs(one) for at, one in before.of_rule("factored").items() if at != 4}
    rows = [
        (at, lr, seed, 2.03 + 0.06 * (np.log2(lr) + 6.3) ** 2)
        for at, some in lrs.items()
        for lr in some
        for seed in range(4)
    ]
    table = tidy(pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"]))
    assert bracket(table, before, "factored", None, 0.90).answer == "WORSE"
    assert bracket(table, lenient, "factored", None, 0.90).answer == "HOLDS"


def test_a_stored_lr_is_what_the_optimum_is(tmp_path: Path) -> None:
    one = StoredOptimum(1, None, Interval(-6.0, -6.1, -5.9))
    assert stored_lrs(one) == (2.0**-7, 2.0**-6, 2.0**-5)


# -- on the command line


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runs().to_csv("results.csv", index=False)
    return tmp_path


def test_check_writes_a_baseline_and_compares_with_it(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "results.csv", "--baseline", "lr-optima.json", "--update-baseline"]) == 0
    assert main(["check", "results.csv", "--baseline", "lr-optima.json"]) == 0
    runs(moved=0.7).to_csv("results.csv", index=False)
    capsys.readouterr()
    assert main(["check", "results.csv", "--baseline", "lr-optima.json"]) == 1
    assert "the optimum moved by +0.70 octave" in capsys.readouterr().out
    assert main(["check", "results.csv", "--baseline", "lr-optima.json", "--moved", "0.9", "--regret", "0.1"]) == 0
    capsys.readouterr()
    assert main(["check", "results.csv", "--baseline", "lr-optima.json", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["baseline"]["answer"] == "MOVED"
    assert main(["check", "results.csv", "--baseline", "lr-optima.json", "--markdown"]) == 1
    assert "factored against lr-optima.json: MOVED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "gone.json"], "there is no baseline gone.json"),
        (["--update-baseline"], "--update-baseline needs to know which; add --baseline lr-optima.json"),
        (["--baseline", "results.csv", "--update-baseline"], "would overwrite the table"),
        (["--baseline", "nowhere/optima.json", "--update-baseline"], "cannot write nowhere/optima.json"),
        (["--baseline", "results.csv"], "is not JSON"),
    ],
)
def test_bad_use_of_a_baseline_is_told(
    table: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["check", "results.csv", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert (table / "results.csv").read_text().startswith("rule,loops,lr")
