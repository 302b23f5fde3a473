import json
import os
from pathlib import Path
from typing import Any

import pytest

from looptransfer.errors import InputError
from looptransfer.trials import devices
from looptransfer.trials.devices import THREADS, VISIBLE, Slot, available_cores, environment, here, slots
from looptransfer.trials.function import Function
from looptransfer.trials.run import Run
from looptransfer.trials.search import Grid
from looptransfer.trials.workers import run_search
from tests import trainings
from tests.trainings import new_ledger

RUNS = tuple(Run("factored", 2, 2.0**-8, seed) for seed in range(6))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes it seem that torch sees some GPUs, by the numbers or UUIDs that CUDA_VISIBLE_DEVICES would give."""

    def seen(*names: str) -> None:
        monkeypatch.setattr(devices, "visible_gpus", lambda: list(names))

    return seen


@pytest.fixture(autouse=True)
def _no_threads_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)


def test_every_gpu_has_a_worker(gpus: Any) -> None:
    gpus("0", "1", "2")
    assert [(slot.device, slot.gpus) for slot in slots()] == [("cuda", "0"), ("cuda", "1"), ("cuda", "2")]


def test_without_a_gpu_every_core_has_a_worker_of_one_thread(gpus: Any) -> None:
    gpus()
    places = slots()
    assert len(places) == available_cores()
    assert {(slot.device, slot.gpus) for slot in places} == {("cpu", None)}
    assert {slot.threads for slot in places} == {None if len(places) == 1 else 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2", ["2"]),
        ("0,3", ["0", "3"]),
        ("0+1,2+3", ["0,1", "2,3"]),
        ("all", ["0,1,2,3"]),
    ],
)
def test_devices_say_which_gpus_each_worker_sees(gpus: Any, given: str, expected: list[str]) -> None:
    gpus("0", "1", "2", "3")
    assert [slot.gpus for slot in slots(given)] == expected
    assert {slot.environment()[VISIBLE] for slot in slots(given)} == set(expected)


def test_more_workers_than_gpus_share_them_in_turn(gpus: Any) -> None:
    gpus("0", "1")
    assert [slot.gpus for slot in slots(workers=3)] == ["0", "1", "0"]
    assert [slot.gpus for slot in slots(workers=1)] == ["0"]


def test_the_cpu_hides_the_gpus(gpus: Any) -> None:
    gpus("0", "1")
    assert {(slot.device, slot.gpus) for slot in slots("cpu")} == {("cpu", "")}
    assert len(slots("cpu")) == available_cores()


def test_another_device_of_torchs_is_named(gpus: Any) -> None:
    gpus()
    assert [(slot.device, slot.gpus) for slot in slots("mps")] == [("mps", "")]


def test_gpus_of_a_command_in_another_environment_may_be_named_where_torch_sees_none(gpus: Any) -> None:
    gpus()
    assert [slot.gpus for slot in slots("0,1")] == ["0", "1"]


@pytest.mark.parametrize("given", ["4", "0,0", "0,", "+", "0+0", "0;1"])
def test_gpus_that_are_not_there_or_given_twice_are_refused(gpus: Any, given: str) -> None:
    gpus("0", "1")
    with pytest.raises(InputError, match=r"write GPUs, each once, such as 0,1 or .*there are 0, 1"):
        slots(given)


def test_all_gpus_where_there_is_none_are_refused(gpus: Any) -> None:
    gpus()
    with pytest.raises(InputError, match="devices is 'all', and torch sees no GPU"):
        slots("all")


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_worker_are_refused(workers: int) -> None:
    with pytest.raises(InputError, match=f"workers is {workers}; it must be a whole number from 1 up"):
        slots("cpu", workers)


@pytest.mark.parametrize(("workers", "threads"), [(1, None), (2, "4"), (3, "2"), (8, "1"), (20, "1")])
def test_threads_of_all_workers_fill_the_cores_and_no_more(
    monkeypatch: pytest.MonkeyPatch, workers: int, threads: str | None
) -> None:
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    found = [slot.environment() for slot in slots("cpu", workers)]
    assert len(found) == workers
    assert {variables.get(name) for variables in found for name in THREADS} == {threads}


def test_a_number_of_threads_that_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in Slot("cpu", threads=2).environment()
    assert Slot("cpu", threads=2).environment()["MKL_NUM_THREADS"] == "2"


def test_this_process_calls_a_gpu_by_its_place_among_those_it_sees(gpus: Any) -> None:
    gpus("4", "GPU-5ac")
    assert here(Slot("cuda", "GPU-5ac")).device == "cuda:1"
    assert here(Slot("cuda", "4,GPU-5ac")).device == "cuda:0"
    assert here(Slot("cpu")).device == "cpu"


def test_variables_of_the_environment_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.delenv("FRESH", raising=False)
    with environment({"KEPT": "new", "FRESH": "1"}):
        assert (os.environ["KEPT"], os.environ["FRESH"]) == ("new", "1")
    assert os.environ["KEPT"] == "old"
    assert "FRESH" not in os.environ


@pytest.mark.parametrize(
    ("given", "places"),
    [("0,1", {("cuda", "0"), ("cuda", "1")}), ("0+1,2+3", {("cuda", "0,1"), ("cuda", "2,3")}), ("cpu", {("cpu", "")})],
)
def test_worker_processes_see_their_own_devices_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, places: set[tuple[str, str]]
) -> None:
    monkeypatch.setenv(trainings.SEEN, str(tmp_path))
    before = dict(os.environ)
    run_search(Function(trainings.placed), Grid(RUNS), new_ledger(tmp_path / "l.db"), slots(given, 2))
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(seen) == len(RUNS)
    assert {(record["device"], record[VISIBLE]) for record in seen} == places
    assert len({record["pid"] for record in seen}) == 2
    assert all(len({r[VISIBLE] for r in seen if r["pid"] == record["pid"]}) == 1 for record in seen)
    assert {record["OMP_NUM_THREADS"] for record in seen} == {str(max(1, available_cores() // 2))}
    assert len({record["directory"] for record in seen}) == len(RUNS)
    assert dict(os.environ) == before
