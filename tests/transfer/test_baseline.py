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
from looptransfer.transfer.baseline import Baseline
from looptransfer.transfer.bracket import stored_lrs
from looptransfer.transfer.check import check
from looptransfer.transfer.comparison import Comparison
from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.provenance import code_version, differing, fingerprint_of
from looptransfer.transfer.results import tidy
from looptransfer.transfer.stored import StoredOptimum

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


def cut(table: pd.DataFrame) -> pd.DataFrame:
    """The table in which the optimum of N = 16 lies beyond the highest LR."""
    return table[(table["loops"] < 16) | (table["lr"] < 2.0**-7)]


def baseline(table: pd.DataFrame | None = None, **columns: Any) -> Baseline:
    return Baseline.of(check(runs(**columns) if table is None else table))


@pytest.fixture(scope="module")
def before() -> Baseline:
    return baseline()


def answers(comparison: Comparison) -> list[str]:
    return [finding.answer for finding in comparison.findings]


# -- stored and read


def test_a_baseline_reads_back_as_it_was_written(tmp_path: Path) -> None:
    stored = Baseline.of(check(runs(layers=2)), tmp_path / "optima.json")
    stored.write()
    assert Baseline.read(tmp_path / "optima.json") == stored
    assert (stored.fingerprint["layers"], stored.fingerprint["seeds"]) == ("2", "0, 1, 2, 3")


def test_a_baseline_keeps_the_loss_of_every_run_by_lr_and_seed() -> None:
    table = runs()
    table.loc[(table["lr"] > 0.1) & (table["seed"] == 3), "loss"] = np.inf
    stored = baseline(table).of_rule("factored")[4].losses
    assert {float(lr) for lr in stored} == set(table["lr"])
    for row in table[table["loops"] == 4].itertuples():
        assert stored[repr(row.lr)][str(row.seed)] == (row.loss if np.isfinite(row.loss) else None)


def test_nothing_is_stored_where_no_optimum_is_known() -> None:
    with pytest.raises(InputError, match="high edge"):
        baseline(runs().query("lr < 2**-7"))


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path, before: Baseline) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        before.write(tmp_path / "nowhere" / "optima.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no baseline .*--update-baseline"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"schema_version": 1, "transferred_lr": NaN}', "NaN is no JSON number"),
        (b"[]", "has no schema_version"),
        (b'{"schema_version": 99}', "has schema_version 99, not 1; make it again with --update-baseline"),
        (b'{"schema_version": 1, "rules": {}}', "is damaged: axis is missing"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "lr-optima.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Baseline.read(path)
    with pytest.raises(InputError, match="cannot read the baseline"):
        Baseline.read(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("axis",), 3, "axis is '3', not a str"),
        (("confidence",), "much", "confidence is 'much', not a finite number"),
        (("confidence",), 2.0, "confidence is 2"),
        (("transferred_lr",), True, "transferred_lr is 'True'"),
        (("fingerprint",), [], "fingerprint is '\\[\\]', not a dict"),
        (("more",), 1, "'more' is unknown"),
        (("rules",), {}, "it holds no optimum"),
        (("rules", "factored"), "none", "rules factored"),
        (("rules", "factored", 0, "at"), 1.5, "at is '1.5', not a int"),
        (("rules", "factored", 0, "at"), 0, "at is 0"),
        (("rules", "factored", 0, "at"), 4, "two optima of one place"),
        (("rules", "factored", 0, "log2_lr"), None, "log2_lr is missing"),
        (("rules", "factored", 0, "log2_lr"), {"estimate": 0, "low": 1, "high": 2}, "log2_lr is no interval"),
        (("rules", "factored", 0, "log2_lr"), {"estimate": 0, "low": -9, "high": 2}, "log2_lr is 0, and its mean"),
        (("rules", "factored", 0, "log2_lr_by_seed"), {"0": 1.0}, "fewer than two seeds"),
        (("rules", "factored", 0, "log2_lr_by_seed"), {"0": 1e9, "1": 1e9}, "between -1000 and 1000"),
        (("rules", "factored", 0, "loss_by_seed"), {"7": 2.0, "8": 2.0}, "its mean over seeds"),
        (("rules", "factored", 0, "loss_by_seed"), {"7": 1.0, "8": None}, "loss_by_seed 8 is 'None'"),
        (("rules", "factored", 0, "losses"), [], "losses is"),
        (
            ("rules", "factored", 0, "losses"),
            {"much": {"0": 1.0}},
            "losses has the LR 'much', not a finite number above 0",
        ),
        (("rules", "factored", 0, "losses"), {"-1": {"0": 1.0}}, "losses has the LR '-1'"),
        (("rules", "factored", 0, "losses"), {"0.1": {"0": "1"}}, "losses 0.1 0 is '1', not a finite number"),
        (("rules", "factored", 0, "losses"), {"0.1": {"0": 1e300}}, "losses 0.1 holds"),
        (("rules", "factored", 0), 5, ""),
    ],
)
def test_a_damaged_baseline_is_refused_by_name(
    tmp_path: Path, before: Baseline, place: tuple[Any, ...], value: object, message: str
) -> None:
    data: Any = json.loads(json.dumps(before.to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"(?s)damaged.*{message}.*--update-baseline"):
        Baseline.read(path)


def test_seeds_that_differ_between_optima_and_losses_are_refused(tmp_path: Path, before: Baseline) -> None:
    data: Any = json.loads(json.dumps(before.to_dict()))
    optimum = data["rules"]["factored"][0]
    optimum["loss_by_seed"] = {f"1{seed}": loss for seed, loss in optimum["loss_by_seed"].items()}
    (tmp_path / "damaged.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="the seeds of 1 differ"):
        Baseline.read(tmp_path / "damaged.json")


def test_the_code_version_is_known_inside_a_repository_only(tmp_path: Path) -> None:
    assert code_version(tmp_path) is None


# -- compared


def test_the_same_runs_hold_with_no_difference_at_all(before: Baseline) -> None:
    comparison = before.compare(check(runs()))
    assert (comparison.answer, comparison.exit_status, comparison.differing) == ("HOLDS", 0, {})
    assert all(finding.shift == Interval(0, 0, 0) and finding.paired for finding in comparison.findings)


@reproducible
@given(st.floats(0.6, 2.0), st.sampled_from([-1, 1]))
def test_an_optimum_that_moved_beyond_the_tolerance_is_named(octaves: float, sign: int) -> None:
    comparison = baseline().compare(check(runs(moved=sign * octaves)))
    assert (answers(comparison), comparison.exit_status) == (["HOLDS", "HOLDS", "MOVED"], 1)
    shift = comparison.findings[2].shift
    assert shift is not None
    assert shift.estimate == pytest.approx(sign * octaves, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "options", "answer"),
    [
        ({"moved": 0.3}, {}, "HOLDS"),
        ({"moved": 0.3}, {"tolerance": 0.2}, "MOVED"),
        ({"worse": 0.05}, {}, "WORSE"),
        ({"worse": -0.05}, {}, "HOLDS"),
    ],
)
def test_the_tolerances_decide(before: Baseline, changes: Any, options: Any, answer: str) -> None:
    comparison = before.compare(check(runs(**changes)), **options)
    assert (comparison.answer, answers(comparison)[:2]) == (answer, ["HOLDS", "HOLDS"])


@pytest.mark.parametrize(
    ("table", "seeds"), [(cut(runs()), 4), (runs().query("loops < 16"), 0)], ids=["censored", "not run"]
)
def test_an_optimum_that_cannot_be_told_any_more_is_not_passed(
    before: Baseline, table: pd.DataFrame, seeds: int
) -> None:
    comparison = before.compare(check(table))
    assert (answers(comparison), comparison.exit_status) == (["HOLDS", "HOLDS", "INCONCLUSIVE"], 3)
    assert (comparison.findings[2].shift, comparison.findings[2].seeds) == (None, seeds)


def test_what_only_one_side_knows_is_a_note(before: Baseline) -> None:
    table = runs()
    comparison = before.compare(check(pd.concat([table, table[table["loops"] == 16].assign(loops=32)])))
    assert (comparison.exit_status, comparison.notes) == (0, ("N = 32 is not in the baseline",))
    comparison = baseline(cut(table)).compare(check(table))
    assert (comparison.exit_status, len(comparison.findings), len(comparison.notes)) == (0, 2, 1)


def test_other_seeds_are_compared_by_welch_and_noise_asks_for_the_same_seeds(before: Baseline) -> None:
    comparison = before.compare(check(runs(seeds=range(10, 14))))
    assert comparison.answer == "HOLDS"
    assert not any(finding.paired for finding in comparison.findings)
    assert comparison.differing["seeds"] == ("0, 1, 2, 3", "10, 11, 12, 13")
    comparison = baseline(noise=0.04).compare(check(runs(seeds=range(10, 14), noise=0.04)))
    assert comparison.answer == "INCONCLUSIVE"
    assert not any(finding.paired for finding in comparison.findings)


def test_a_fingerprint_that_differs_is_told_key_by_key() -> None:
    comparison = baseline(steps=250).compare(check(runs(steps=500)))
    assert comparison.differing == {"steps": ("250", "500")}
    assert comparison.to_dict()["differing"] == {"steps": {"then": "250", "now": "500"}}


def test_another_commit_is_in_the_record_and_no_line_of_the_text(before: Baseline) -> None:
    elsewhere = replace(before, fingerprint={**before.fingerprint, "code": "0123456789ab"})
    comparison = elsewhere.compare(check(runs()))
    assert comparison.to_dict()["differing"]["code"]["then"] == "0123456789ab"
    assert "made differently" not in str(comparison) + comparison.to_markdown()


def test_the_settings_of_an_experiment_are_compared_where_both_are_known() -> None:
    table = tidy(runs())
    table.attrs["experiment"] = {"corpus_sha256": "a", "steps": 250}
    first, unknown = fingerprint_of(table, "loops"), fingerprint_of(tidy(runs()), "loops")
    table.attrs["experiment"] = {"corpus_sha256": "b", "steps": 250}
    assert differing(first, fingerprint_of(table, "loops")) == {"experiment corpus_sha256": ("a", "b")}
    assert differing(first, unknown) == {}


def test_a_baseline_of_another_axis_rule_or_metric_is_refused(before: Baseline) -> None:
    wide = check(runs().rename(columns={"loops": "width"}), axis="width")
    negated = check(runs().assign(loss=lambda t: -t["loss"]), maximize=True)
    for verdict, message in ((wide, "axis"), (check(runs(rule="sqrt")), "rule 'sqrt'"), (negated, "unit")):
        with pytest.raises(InputError, match=message):
            before.compare(verdict)
    with pytest.raises(InputError, match="tolerance is 0"):
        before.compare(check(runs()), tolerance=0)


def test_nothing_holds_where_nothing_is_left_to_compare() -> None:
    table = runs()
    censored = table[table["lr"] < 2.0**-7]
    stored = Baseline.of(check(pd.concat([censored, table.assign(rule="sqrt")]), rule="sqrt"))
    comparison = stored.compare(check(censored))
    assert (comparison.findings, comparison.answer, comparison.exit_status) == ((), "INCONCLUSIVE", 3)
    assert "no optimum of the baseline could be compared" in comparison.to_markdown()


def test_a_tolerance_of_the_loss_above_the_whole_curve_holds_nothing(before: Baseline) -> None:
    comparison = before.compare(check(runs(), regret_tolerance=0.5))
    assert (answers(comparison), comparison.exit_status) == (["INCONCLUSIVE"] * 3, 3)


def test_a_loss_in_a_small_unit_has_a_small_tolerance() -> None:
    def small(factor: float = 1.0) -> pd.DataFrame:
        return runs().assign(loss=lambda t: 1e-3 * factor * t["loss"])

    stored = baseline(small())
    assert stored.unit == "of the loss"
    assert stored.loss_tolerance == pytest.approx(0.05 * 6.25 * 0.06e-3, rel=0.1)
    assert stored.compare(check(small())).answer == "HOLDS"
    comparison = stored.compare(check(small(1.5)))
    assert (comparison.answer, comparison.unit) == ("WORSE", "of the loss")
    assert "is worse by 0.00100" in comparison.findings[0].reason


def test_a_unit_that_only_the_height_of_the_curve_tells_is_no_other_unit() -> None:
    """The same loss, against which 0.02 was small and is large."""
    stored, verdict = (
        baseline(runs().assign(loss=lambda t: 0.5 * t["loss"])),
        check(runs().assign(loss=lambda t: 0.08 * t["loss"])),
    )
    assert {stored.unit, verdict.unit} == {"nats", "of the loss"}
    assert stored.compare(verdict).findings


def test_text_markdown_and_json_come_from_one_result_and_escape_foreign_words() -> None:
    comparison = baseline(tag="<b>old|</b>").compare(check(runs(tag="new", moved=1.0)))
    assert "<b>" not in comparison.to_markdown()
    assert "| 16 | MOVED |" in comparison.to_markdown()
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["findings"][2]["answer"] == data["answer"] == "MOVED"


# -- the cheap mode


def bracketed(
    stored: Baseline, moved: float = 0.0, worse: float = 0.0, diverged: int | None = None, **options: Any
) -> Comparison:
    """Half, once and twice the stored LR at N = 1 and 16; `diverged` is the position of an LR that diverges."""
    rows = []
    for n in (1, 16):
        for position, lr in enumerate(stored_lrs(stored.of_rule("factored")[n])):
            for seed in options.get("seeds", range(4)):
                rng = np.random.default_rng([seed, n, position])
                u = np.log2(lr) + 6.3 - (moved if n == 16 else 0.0)
                loss = 2 + 0.06 * u**2 + (worse if n == 16 else 0.0) + rng.normal(0, options.get("noise", 0.002))
                rows.append(
                    {"loops": n, "lr": lr, "seed": seed, "loss": np.inf if n == 16 and position == diverged else loss}
                )
    return stored.bracket(tidy(pd.DataFrame(rows)), "factored", options.get("tolerance", 0.02), 0.90)


@reproducible
@given(st.floats(0.65, 3.0), st.sampled_from([-1, 1]))
def test_an_optimum_beyond_half_an_octave_has_moved(octaves: float, sign: int) -> None:
    comparison = bracketed(baseline(), moved=sign * octaves)
    assert (answers(comparison), comparison.exit_status) == (["HOLDS", "MOVED"], 1)
    assert ("twice" if sign > 0 else "half") in comparison.findings[1].reason


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "HOLDS"),
        ({"worse": 0.05}, "WORSE"),
        ({"worse": 0.05, "tolerance": 0.1}, "HOLDS"),
        ({"worse": 0.03, "tolerance": None}, "WORSE"),  # that of the baseline
        ({"diverged": 0}, "HOLDS"),
        ({"diverged": 1}, "MOVED"),
        ({"diverged": 2}, "HOLDS"),
    ],
)
def test_the_optimum_in_its_place_is_bracketed_by_worse_or_diverged_neighbours(
    before: Baseline, changes: Any, answer: str
) -> None:
    comparison = bracketed(before, **changes)
    assert (answers(comparison), comparison.differing) == (["HOLDS", answer], {})


def test_the_loss_may_become_worse_by_what_the_baseline_allows(before: Baseline) -> None:
    assert answers(bracketed(replace(before, loss_tolerance=0.1), worse=0.03, tolerance=None)) == ["HOLDS", "HOLDS"]


def test_noise_is_inconclusive_and_says_how_many_seeds(before: Baseline) -> None:
    comparison = bracketed(before, noise=0.2, seeds=range(2))
    assert comparison.exit_status == 3
    assert "seeds" in str(comparison)


def test_every_n_that_was_asked_for_has_a_finding_also_where_it_was_not_run(before: Baseline) -> None:
    lrs = stored_lrs(before.of_rule("factored")[1])
    rows = [(1, lr, seed, 2 + 0.06 * (np.log2(lr) + 6.3) ** 2) for lr in lrs for seed in range(4)]
    table = tidy(pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"]))
    comparison = before.bracket(table, "factored", None, 0.90, [1, 16])
    assert (answers(comparison), comparison.exit_status) == (["HOLDS", "INCONCLUSIVE"], 3)
    lacking = table[(table["seed"] != "2") | (table["lr"] != table["lr"].max())]
    assert before.bracket(table, "factored", None, 0.90, []).exit_status == 3
    for partial in (lacking, table.assign(lr=2 * table["lr"])):
        assert before.bracket(partial, "factored", None, 0.90).exit_status == 3


def test_the_lrs_of_the_cheap_mode_are_half_once_and_twice_the_stored_one() -> None:
    assert stored_lrs(StoredOptimum(1, None, Interval(-6.0, -6.1, -5.9))) == (2.0**-7, 2.0**-6, 2.0**-5)


# -- on the command line


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runs().to_csv("results.csv", index=False)
    return tmp_path


def test_check_writes_a_baseline_and_compares_with_it(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "results.csv", "--baseline", "lr-optima.json"]
    assert main([*command, "--update-baseline"]) == 0
    assert main(command) == 0
    runs(moved=0.7).to_csv("results.csv", index=False)
    assert main([*command, "--moved", "0.9", "--regret", "0.1"]) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["baseline"]["answer"] == "MOVED"
    for form in ([], ["--markdown"]):
        assert main([*command, *form]) == 1
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
