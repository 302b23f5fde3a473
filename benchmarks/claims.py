"""The cost of a claim and of a resume in a ledger of 10,000 finished runs, with 8 workers on PostgreSQL and on SQLite.

    python -m benchmarks.claims [--out reports/faults]

A claim is everything between asking for the next run and having it: the ledger's news, the search, the ticket and the
look at it. The runs are asleep for about a second instead of trained, so that workers meet as they would; medians hold
on a machine with no other work. Resume is a call of `sweep`'s search on a finished ledger, read anew.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.storages._rdb.models import TrialModel, TrialUserAttributeModel, TrialValueModel
from optuna.trial import TrialState
from sqlalchemy import insert

from looptransfer.transfer.studies import read_study
from looptransfer.trials.ledger import Ledger
from looptransfer.trials.run import Outcome, Run
from looptransfer.trials.search import Grid
from looptransfer.trials.workers import _Todo
from tests.postgres import running_server, why_not

FINISHED, MORE, WORKERS = 10_000, 160, 8
OUTCOME = Outcome(1, 8, 30, 1.0, False, 1.0, 1.0)
RUNS = [Run("factored", 2, 0.001 * (1 + number), number % 7) for number in range(FINISHED + MORE)]


def fill(ledger: Ledger, runs: Sequence[Run]) -> None:
    """Write finished runs as Optuna would, all at once."""
    study = ledger.study._study_id
    with ledger.study._storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
        numbered = list(enumerate(runs))
        trials = [
            {"trial_id": n + 1, "number": n, "study_id": study, "state": TrialState.COMPLETE} for n, _ in numbered
        ]
        kind = TrialValueModel.TrialValueType.FINITE
        values = [{"trial_id": n + 1, "objective": 0, "value": 1.0, "value_type": kind} for n, _ in numbered]
        attributes = [
            {"trial_id": n + 1, "key": key, "value_json": json.dumps(asdict(value))}
            for n, run in numbered
            for key, value in (("run", run), ("outcome", OUTCOME))
        ]
        connection.execute(insert(TrialModel), trials)
        connection.execute(insert(TrialValueModel), values)
        connection.execute(insert(TrialUserAttributeModel), attributes)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("select setval('trials_trial_id_seq', (select max(trial_id) from trials))")


def worker(place: str, answers: Any) -> None:
    ledger = Ledger(place, create=False)
    todo, seconds, lost = _Todo(ledger, Grid(RUNS)), [], 0
    used = 0.0
    while not todo.ends():
        started, before = time.perf_counter(), time.process_time()
        todo.update()
        run = todo.next_run()
        claim = None if run is None else ledger.claim(run)
        if claim is not None:
            seconds.append(time.perf_counter() - started)
            used += time.process_time() - before
            time.sleep(random.uniform(0.5, 1.5))
            ledger.finish(claim, OUTCOME)
        elif run is None:
            time.sleep(0.2)
        else:
            lost += 1
    answers.put((seconds, used, lost))


def measure(place: str) -> dict[str, Any]:
    ledger = Ledger(place)
    ledger.admit({"name": "claims"}, {})
    ledger.ask(
        {"kind": "sweep", "cells": [["factored", 2, "factored"]], "lrs": [run.lr for run in RUNS[:1400]]}
        | {"seeds": list(range(7)), "without": []}
    )
    fill(ledger, RUNS[:FINISHED])
    started = time.perf_counter()
    resumed = _Todo(Ledger(place), Grid(RUNS[:FINISHED]))
    resume = time.perf_counter() - started
    assert resumed.ends()
    started = time.perf_counter()
    read_study(place, "", place)
    read = time.perf_counter() - started
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=worker, args=(place, answers)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    made = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    claims = sorted(second for seconds, *_ in made for second in seconds)
    assert len(claims) == MORE
    return {
        "claims": len(claims),
        "median_ms": round(1000 * statistics.median(claims), 1),
        "p90_ms": round(1000 * claims[int(0.9 * len(claims))], 1),
        "cpu_ms": round(1000 * sum(used for _, used, _ in made) / MORE, 1),
        "tickets_withdrawn": sum(lost for *_, lost in made),
        "resume_s": round(resume, 2),
        "read_by_check_s": round(read, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/faults"))
    out = parser.parse_args().out
    result: dict[str, Any] = {"finished_runs": FINISHED, "workers": WORKERS}
    with tempfile.TemporaryDirectory() as folder:
        result["SQLite"] = measure(str(Path(folder, "ledger.db")))
    if not why_not():
        with running_server() as server:
            result["PostgreSQL"] = measure(server.url()) | {"version": server.version()}
    result["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    out.mkdir(parents=True, exist_ok=True)
    (out / "claims.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
