import multiprocessing
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.errors import InputError, LedgerError
from looptransfer.transfer.sources import read_results
from looptransfer.trials import ledger as ledger_module
from looptransfer.trials.identity import NOISE, check_probe
from looptransfer.trials.ledger import Claim, Ledger
from looptransfer.trials.run import Outcome, Run
from tests.postgres import Server, running_server, why_not

RUNS = [Run("factored", loops, 2.0**-4, seed) for loops in (1, 2) for seed in range(4)]
OUTCOME = Outcome(1, 8, 30, 0.5, False, 0.1, 0.6)
IDENTITY = {"name": "tiny", "steps": 30}
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if why_not():
        pytest.skip(why_not())
    with running_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new ledger may be made, of each kind."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("server").url()
        return url
    return str(tmp_path / "ledger.db") if request.param == "sqlite" else f"journal://{tmp_path / 'ledger.log'}"


def ledger_at(place: str | Path, name: str = "", **options: Any) -> Ledger:
    ledger = Ledger(place, name, **options)
    ledger.admit(IDENTITY, {})
    return ledger


def claimed(ledger: Ledger, run: Run) -> Claim:
    claim = ledger.claim(run)
    assert claim is not None
    return claim


# -- claims


def test_a_claimed_run_is_nobody_elses_and_a_finished_one_is_known_to_all(place: str) -> None:
    first, second = ledger_at(place), ledger_at(place)
    claim = claimed(first, RUNS[0])
    assert second.claim(RUNS[0]) is None
    claimed(second, RUNS[1])
    first.finish(claim, OUTCOME)
    assert second.claim(RUNS[0]) is None
    assert second.losses == {RUNS[0]: 0.5}
    assert [making.run for making in second.making.values()] == [RUNS[1]]
    third = Ledger(place)
    assert third.losses == {RUNS[0]: 0.5}
    assert third.finished[RUNS[0]]["steps"] == 30


def test_a_failed_run_is_open_again_with_its_error_kept(place: str) -> None:
    first, second = ledger_at(place), ledger_at(place)
    first.fail(claimed(first, RUNS[0]), "no second batch")
    second.refresh()
    assert second.failed == {RUNS[0]: "no second batch"}
    assert Ledger(place).failed == {}  # of an earlier call
    first.finish(claimed(second, RUNS[0]), OUTCOME)
    first.refresh()
    assert first.losses == {RUNS[0]: 0.5}
    assert not first.failed


def claim_all(place: str, start: Any, answers: Any) -> None:
    ledger = ledger_at(place)
    start.wait()
    made = []
    for run in RUNS:
        claim = ledger.claim(run)
        if claim is not None:
            made.append(run)
            ledger.finish(claim, OUTCOME)
    answers.put(made)


@pytest.mark.slow
def test_processes_that_begin_a_ledger_together_and_claim_at_once_share_the_runs(place: str) -> None:
    start, answers = SPAWN.Barrier(4), SPAWN.Queue()
    processes = [SPAWN.Process(target=claim_all, args=(place, start, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    made = [run for _ in processes for run in answers.get(timeout=120)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert Counter(made) == Counter(RUNS)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Ledger]:
    place = tmp_path_factory.mktemp("three") / "ledger.db"
    return [ledger_at(place) for _ in range(3)]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_of_several_that_want_one_run_one_at_most_has_it_whatever_the_order(
    three: list[Ledger], order: list[int]
) -> None:
    ledgers, run = three, Run("factored", 1, 0.1, three[0]._read + 1)
    holder: tuple[int, Claim] | None = None
    for who in order:
        claim = ledgers[who].claim(run)
        assert claim is None or holder is None
        if claim is not None:
            holder = who, claim
        elif holder is not None and holder[0] == who:
            ledgers[who].fail(holder[1], "broken")
            holder = None


# -- makers that stand still


def test_a_run_whose_maker_stands_still_is_open_again_after_the_grace(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "GRACE", 0.5)
    dead, alive = ledger_at(place), ledger_at(place)
    claimed(dead, RUNS[0])
    end = time.monotonic() + 20
    while (claim := alive.claim(RUNS[0])) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    alive.finish(claim, OUTCOME)


def test_a_maker_that_counts_on_keeps_its_run_for_longer_than_the_grace(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "HEARTBEAT", 0.1)
    monkeypatch.setattr(ledger_module, "GRACE", 2.0)
    first, second = ledger_at(place), ledger_at(place)
    claim = claimed(first, RUNS[0])
    with first.counting(claim):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert second.claim(RUNS[0]) is None
            time.sleep(0.1)
    first.finish(claim, OUTCOME)
    second.refresh()
    assert second.losses == {RUNS[0]: 0.5}


def test_an_observer_that_slept_gives_nobody_up(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ledger_at(place), ledger_at(place)
    claimed(first, RUNS[0])
    second.refresh()
    slept = time.monotonic() + 10 * ledger_module.GRACE
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: slept)
    second.refresh()
    assert second.claim(RUNS[0]) is None


@pytest.mark.parametrize("taken", [False, True])
def test_what_a_maker_finished_after_it_was_given_up_counts_if_nobody_else_has_the_run(place: str, taken: bool) -> None:
    sleeper, other = ledger_at(place), ledger_at(place)
    claim = claimed(sleeper, RUNS[0])
    other.refresh()
    other.release(claim.number)
    again = claimed(other, RUNS[0]) if taken else None
    sleeper.finish(claim, OUTCOME)
    other.refresh()
    assert other.losses == ({} if taken else {RUNS[0]: 0.5})
    if again is not None:
        other.finish(again, OUTCOME)
    other.refresh()
    assert other.losses == {RUNS[0]: 0.5}


def test_a_run_that_ends_while_it_is_given_up_is_finished(place: str) -> None:
    maker, other = ledger_at(place), ledger_at(place)
    claim = claimed(maker, RUNS[0])
    other.refresh()
    maker.finish(claim, OUTCOME)
    other.release(claim.number, "it took too long")
    other.refresh()
    assert other.losses == {RUNS[0]: 0.5}
    assert not other.failed


def test_what_sqlite_is_writing_while_a_run_is_given_up_is_not_written_over(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "ledger.db")
    claim = claimed(ledger, RUNS[0])
    maker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)
    maker.execute("begin immediate")
    maker.execute("update trials set state = 'COMPLETE' where trial_id = ?", [claim.trial])
    maker.execute("insert into trial_values values (1, ?, 0, 0.5, 'FINITE')", [claim.trial])
    threading.Timer(1.0, lambda: maker.execute("commit")).start()
    ledger.release(claim.number)
    ledger.refresh()
    assert ledger.losses == {RUNS[0]: 0.5}
    maker.close()


# -- storages that do not answer


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "ledger.db")
    database = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)
    database.execute("begin exclusive")
    threading.Timer(2.0, lambda: database.execute("rollback")).start()
    claim = claimed(ledger, RUNS[0])
    ledger.finish(claim, OUTCOME)
    assert Ledger(tmp_path / "ledger.db").losses == {RUNS[0]: 0.5}
    database.close()


def test_a_lock_that_stays_is_an_error_that_names_the_ledger_and_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger_module, "BUSY", 0.1)
    monkeypatch.setattr(ledger_module, "PATIENCE", 4.0)
    ledger = ledger_at(tmp_path / "ledger.db")
    database = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    database.execute("begin exclusive")
    with pytest.raises(LedgerError, match=r"ledger\.db does not answer: database is locked; finished runs"):
        ledger.ask({"kind": "tune"})
    assert "does not answer: database is locked; trying for" in capsys.readouterr().err
    database.execute("rollback")
    database.close()
    claimed(ledger, RUNS[0])


def test_a_server_that_restarts_is_waited_for(server: Server) -> None:
    ledger = ledger_at(server.url())
    claim = claimed(ledger, RUNS[0])
    server.stop("immediate")
    threading.Timer(2.0, server.start).start()
    ledger.finish(claim, OUTCOME)
    claimed(ledger, RUNS[1])
    assert ledger.losses == {RUNS[0]: 0.5}


def test_a_server_that_never_answered_is_told_within_seconds_and_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if why_not():
        pytest.skip(why_not())
    monkeypatch.setattr(ledger_module, "OPENING", 1.0)
    with pytest.raises(InputError, match=r"the ledger .* does not answer") as told:
        Ledger("postgresql://user:hidden-word@127.0.0.1:1/none")
    assert "hidden-word" not in str(told.value)


# -- whose ledger it is


@pytest.mark.parametrize("identified", [False, True])
def test_a_study_with_trials_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path, identified: bool) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    theirs = optuna.create_study(storage=url, study_name="theirs")
    theirs.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=2)
    with pytest.raises(InputError, match="has trials that looptransfer did not make"):
        ledger_at(url, "theirs")
    assert not optuna.load_study(storage=url, study_name="theirs").user_attrs
    assert len(theirs.get_trials()) == 2


@pytest.mark.parametrize("directions", [["minimize", "minimize"], ["maximize"]])
def test_a_study_of_two_objectives_or_one_that_is_maximized_is_refused(tmp_path: Path, directions: list[str]) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=url, study_name="sweep", directions=directions)
    with pytest.raises(InputError, match="it is no ledger; choose another name or file"):
        Ledger(url)


@pytest.mark.parametrize("names", [("run?lr=1.db", "run?lr=2.db"), ("a#1.db", "a#2.db"), ("{x}.db", "%41.db")])
def test_every_file_name_is_a_file_of_its_own(
    tmp_path: Path, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(names):
        ledger = ledger_at(name)
        ledger.finish(claimed(ledger, RUNS[number]), OUTCOME)
    for number, name in enumerate(names):
        assert list(Ledger(name).finished) == [RUNS[number]]
        assert list(read_results(tmp_path / name)["seed"]) == [str(RUNS[number].seed)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_study_that_is_joined_must_be_there(tmp_path: Path) -> None:
    ledger_at(tmp_path / "ledger.db", "widths")
    with pytest.raises(InputError, match=r"has no study 'depths'; it has 'widths'"):
        Ledger(tmp_path / "ledger.db", "depths", create=False)


def test_a_shared_disk_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_disk", lambda path: "nfs4")
    with pytest.warns(UserWarning, match=r"lies on a shared disk \(nfs4\).*give --ledger journal://"):
        Ledger(tmp_path / "ledger.db")


# -- what a probe tells


PROBE = {"the first batches": "ab", "the loss after a step": 2.0}


def test_a_probe_that_differs_by_rounding_is_told_and_one_that_differs_by_more_refused() -> None:
    assert check_probe("runs.db", "N = 2", PROBE, dict(PROBE)) == []
    told = check_probe("runs.db", "N = 2", PROBE, PROBE | {"the loss after a step": 2 * (1 + NOISE / 10)})
    assert told == ["the loss after a step at N = 2 by 1e-05"]
    with pytest.raises(InputError, match=r"another experiment \(the loss after a step at N = 2: 2 there"):
        check_probe("runs.db", "N = 2", PROBE, PROBE | {"the loss after a step": 2 * (1 + 10 * NOISE)})
    with pytest.raises(InputError, match=r"holds another experiment \(the first batches at N = 2\)"):
        check_probe("runs.db", "N = 2", PROBE, PROBE | {"the first batches": "cd"})


def test_a_probe_of_other_coordinates_is_made_again_at_those_that_are_known(place: str) -> None:
    known, other = Run("factored", 2, 0.1, 0), Run("sqrt", 4, 0.1, 7)
    Ledger(place).admit(IDENTITY, {known: PROBE})
    asked: list[Run] = []

    def probe(run: Run) -> dict[str, Any]:
        asked.append(run)
        return PROBE | {"the first batches": "cd"}

    with pytest.raises(InputError, match="the first batches at N = 2"):
        Ledger(place).admit(IDENTITY, {other: PROBE}, probe)
    assert [(run.rule, run.loops, run.seed) for run in asked] == [("factored", 2, 0)]


def test_other_versions_and_machines_are_told_where_trainings_start_the_same(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("factored", 2, 0.1, 0)
    Ledger(place).admit(IDENTITY | {"torch": "2.13.0", "machine": "x86_64"}, {run: PROBE})
    Ledger(place).admit(IDENTITY | {"torch": "2.14.0", "machine": "aarch64"}, {run: PROBE})
    told = capsys.readouterr().err
    assert "torch 2.13.0 there, 2.14.0 here" in told
    assert "machine x86_64 there, aarch64 here" in told


def test_requests_of_several_calls_are_kept_once_each_and_in_their_order(place: str) -> None:
    requests = [{"kind": "tune", "loops": loops, "seeds": [0, 1], "rule": "sqrt"} for loops in (4, 2, 3)]
    for request in (*requests, requests[0]):
        ledger_at(place).ask(request)
    assert ledger_at(place).requests == requests


def test_a_study_that_is_not_there_is_told_at_once(place: str) -> None:
    ledger_at(place)
    with pytest.raises(InputError, match="has no study 'others'; it has 'sweep'"):
        Ledger(place, "others", create=False)
