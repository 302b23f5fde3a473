"""What a sweep's ledger withstands: kills, locks, a server that restarts, a full disk, clocks that jump, broken runs.

    python -m benchmarks.faults [--out reports/faults] [--kills 50] [--only NAME]

Each fault is brought about while a sweep of 200 short runs is made by two worker processes, on SQLite and on
PostgreSQL (Debian's, started here on a loopback port). Counted are finished runs that were lost or made twice, and the
table at the end is held against that of an undisturbed sweep. Every finished part is in faults.json: stopped, the
same command goes on with the next. A disk that fills needs root (a small tmpfs is mounted), clocks that jump need
Debian's faketime; a part that cannot be done here says why.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from looptransfer.errors import InputError
from looptransfer.trials import ledger as ledger_module
from looptransfer.trials.sweep import sweep
from tests.experiments import PAUSE, TinyTask, squared_error, tiny_experiment
from tests.postgres import Server, running_server, why_not

ROOT = Path(__file__).parents[1]
SWEEP: dict[str, Any] = {
    "loops": [1, 2],
    "around": 2.0**-4,
    "octaves": [-6 + k / 2 for k in range(10)],
    "seeds": 10,
}
SMALL: dict[str, Any] = SWEEP | {"octaves": [-3.0, -1.5], "seeds": 4}
FAULT = "LOOPTRANSFER_FAULT"  # environment: what goes wrong in the runs of seed 1 at N = 2
SETTINGS = "LOOPTRANSFER_FAULTS"  # environment: heartbeat, grace and patience of the ledger
TOGETHER = 4
LOCKED = 150.0  # seconds
if SETTINGS in os.environ:  # workers import this, too
    ledger_module.HEARTBEAT, ledger_module.GRACE, ledger_module.PATIENCE = map(float, os.environ[SETTINGS].split())
Where = Callable[[], str]  # makes the place of a new ledger


# -- what is trained


class BrokenTask(TinyTask):
    """The tiny task, in which seed 1 breaks as the environment says."""

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        fault = os.environ.get(FAULT) if seed == 1 else None
        for number, batch in enumerate(super().batches(seed)):
            if number >= 4 and fault == "raises":
                raise ArithmeticError("a batch that cannot be drawn")
            if number == 4 and fault == "hangs":
                time.sleep(3600)
            if number == 4 and fault == "ends its process":
                os._exit(0)
            if number == 4 and fault == "fills the memory":
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does
            yield batch

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        loss = squared_error(outputs, targets)
        fault = os.environ.get(FAULT)
        late = loss.item() < 0.5  # once trained, so that the start is sound
        if late and fault == "returns text":
            return "a third"
        return loss * float("nan") if late and fault == "is NaN" else loss


def make_sweep(place: str, out: str, small: bool) -> None:
    """The process that is disturbed."""
    task = BrokenTask()
    own = {"batches": task.batches, "loss": task.loss} if FAULT in os.environ else {}
    options = SMALL if small else SWEEP
    limit = 20.0 if os.environ.get(FAULT) == "hangs" else None
    try:
        table = sweep(tiny_experiment(**own), ledger=place, workers=2, limit=limit, **options)
    except InputError as error:
        print(error, file=sys.stderr)
        finished = getattr(error, "finished", None)
        if finished is not None:
            finished.to_csv(out, index=False)
        sys.exit(2)
    table.to_csv(out, index=False)


class Sweeper:
    """A sweep in a process group of its own."""

    def __init__(self, folder: Path, place: str, small: bool = False, **environment: str) -> None:
        self.place, self.out, self.small = place, folder / "table.csv", small
        self.log, self.environment = folder / "log.txt", environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, pause: float = 0.0, prefix: list[str] | None = None) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), PAUSE: str(pause)} | self.environment
        words = ["-m", "benchmarks.faults", "--sweep", self.place, str(self.out), *(["--small"] if self.small else [])]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*(prefix or []), sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait()

    def works(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def workers(self) -> list[int]:
        assert self.process is not None
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        except OSError:
            return []

    def kill(self) -> None:
        if self.works():
            assert self.process is not None
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.out).drop(columns="seconds")


def finished(place: str) -> Counter[str]:
    """How often each run stands in the ledger as finished, read past our own code."""
    query = """select a.value_json from trials t join trial_user_attributes a using (trial_id)
               where t.state = 'COMPLETE' and a.key = 'run'"""
    try:
        if "://" not in place:
            with contextlib.closing(sqlite3.connect(f"file:{place}?mode=ro", uri=True, timeout=60)) as database:
                return Counter(row[0] for row in database.execute(query))
        import psycopg  # noqa: PLC0415

        with psycopg.connect(place) as server:
            return Counter(row[0] for row in server.execute(query).fetchall())
    except Exception:  # it is not there yet
        return Counter()


class Watch:
    """What was finished when it was last looked at, and what was lost since."""

    def __init__(self, place: str) -> None:
        self.place, self.before, self.lost = place, Counter[str](), 0

    def look(self) -> int:
        done = finished(self.place)
        if done or not self.before:
            self.lost += sum((self.before - done).values())
            self.before = done
        return sum(done.values())

    def result(self, sweeper: Sweeper, calm: pd.DataFrame) -> dict[str, Any]:
        self.look()
        twice = sum(count - 1 for count in self.before.values())
        same = sweeper.out.exists() and sweeper.table().equals(calm)
        return {"runs": len(self.before), "lost": self.lost, "twice": twice, "same_table": bool(same)}


# -- faults


def kills(folder: Path, where: Where, calm: pd.DataFrame, count: int, seed: int) -> dict[str, Any]:
    """kill -9 of a worker, or of the parent, at random moments until `count` of them; then left alone."""
    rng, place = random.Random(seed), where()
    sweeper, watch = Sweeper(folder, place), Watch(place)
    struck: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    while sum(struck.values()) < count:
        if not sweeper.works():
            if sweeper.process is not None and sweeper.process.returncode != -signal.SIGKILL:
                statuses[sweeper.process.returncode] += 1
                if sweeper.process.returncode == 0:
                    break  # all is made: no more moments
            before = watch.look()
            sweeper.start(pause=100 / count)
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 6))  # struck while it starts
            else:
                while watch.look() <= before and sweeper.works():
                    time.sleep(0.1)
        time.sleep(rng.uniform(0, 3))
        watch.look()
        workers = sweeper.workers()
        if rng.random() < 0.5 and workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                struck["worker"] += 1
        elif sweeper.works():
            assert sweeper.process is not None
            sweeper.process.kill()
            sweeper.process.wait()
            struck["parent"] += 1
    sweeper.kill()
    sweeper.start()
    status = sweeper.wait()
    return {**watch.result(sweeper, calm), "kills": dict(struck), "status": status}


def started_together(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """Four sweeps are started at once on a new ledger, five times; they share the runs."""
    statuses: Counter[str] = Counter()
    result: dict[str, Any] = {}
    for number in range(5):
        place = where()
        sweepers = []
        for k in range(TOGETHER):
            own = folder / f"{number}-{k}"
            own.mkdir()
            sweepers.append(Sweeper(own, place, small=True))
        for sweeper in sweepers:
            sweeper.start()
        for sweeper in sweepers:
            statuses[str(sweeper.wait())] += 1
        watch = Watch(place)
        each = watch.result(sweepers[0], calm)
        each["same_table"] = all(s.out.exists() and s.table().equals(calm) for s in sweepers)
        for key, value in each.items():
            result[key] = result[key] and value if isinstance(value, bool) and key in result else value
    return {**result, "statuses": dict(statuses)}


def locked(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """Somebody holds a lock on the database for 150 s."""
    place = where()
    sweeper, watch = Sweeper(folder, place), Watch(place)
    sweeper.start(pause=0.1)
    while watch.look() < 20:
        time.sleep(0.5)
    if "://" in place:
        import psycopg  # noqa: PLC0415

        with psycopg.connect(place) as server:
            server.execute("lock table trials in access exclusive mode")
            time.sleep(LOCKED)
    else:
        with contextlib.closing(sqlite3.connect(place, timeout=60, isolation_level=None)) as database:
            database.execute("begin exclusive")
            time.sleep(LOCKED)
            database.execute("rollback")
    status = sweeper.wait()
    return {**watch.result(sweeper, calm), "seconds": LOCKED, "status": status}


def restarted(folder: Path, where: Where, calm: pd.DataFrame, server: Server) -> dict[str, Any]:
    """The server is restarted five times, each time away for five seconds."""
    place = where()
    sweeper, watch = Sweeper(folder, place), Watch(place)
    sweeper.start(pause=0.2)
    for restart in range(5):
        while watch.look() < 20 + 30 * restart and sweeper.works():
            time.sleep(0.5)
        server.stop("immediate" if restart % 2 else "fast")
        time.sleep(5)
        server.start()
    status = sweeper.wait()
    return {**watch.result(sweeper, calm), "restarts": 5, "status": status}


def disk_full(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """The disk of the ledger is full for 30 s; and for good, with the patience of 20 s instead of five minutes."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        return {"skipped": f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}"}
    try:
        place = str(disk / "ledger.db")
        sweeper, watch = Sweeper(folder, place, **{SETTINGS: "5 30 20"}), Watch(place)
        fill = disk / "fill"

        def fill_up() -> None:
            with contextlib.suppress(OSError), fill.open("ab", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))

        sweeper.start(pause=0.1)
        while watch.look() < 20:
            time.sleep(0.5)
        fill_up()
        given_up = sweeper.wait()
        told = sweeper.log.read_text().strip().splitlines()[-1].replace(str(folder), "…")
        after = watch.look()
        fill.unlink()
        sweeper.environment = {}
        sweeper.start(pause=0.1)
        while watch.look() < after + 20:
            time.sleep(0.5)
        fill_up()
        time.sleep(30)
        fill.unlink()
        status = sweeper.wait()
        result = watch.result(sweeper, calm)
        return {**result, "status_where_it_stays_full": given_up, "told": told, "status": status}
    finally:
        sweeper.kill()
        subprocess.run(["umount", disk], check=True)


def clocks(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """A sweep is killed, and goes on with its clocks three hours back; killed again, and a day ahead."""
    if shutil.which("faketime") is None:
        return {"skipped": "faketime is not installed"}
    place = where()
    sweeper, watch = Sweeper(folder, place), Watch(place)
    seconds = {}
    for more, offset in ((40, None), (40, "-3h"), (None, "+1d")):
        started, before = time.monotonic(), watch.look()
        sweeper.start(pause=0.1, prefix=[] if offset is None else ["faketime", "-m", "-f", offset])
        if more is None:
            break
        while watch.look() < before + more and sweeper.works():
            time.sleep(0.2)
        seconds[str(offset)] = round(time.monotonic() - started)
        sweeper.kill()
    status = sweeper.wait()
    return {**watch.result(sweeper, calm), "seconds_for_40_runs": seconds, "status": status}


def slept(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """Workers are stopped in turn for longer than their grace (4 s here), five times, and go on."""
    place = where()
    sweeper, watch = Sweeper(folder, place, **{SETTINGS: "1 4 300"}), Watch(place)
    sweeper.start(pause=0.2)
    stops = 0
    while stops < 5 and sweeper.works():
        while watch.look() < 20 + 30 * stops and sweeper.works():
            time.sleep(0.2)
        for worker in sweeper.workers()[stops % 2 : stops % 2 + 1]:
            os.kill(worker, signal.SIGSTOP)
            time.sleep(10)
            os.kill(worker, signal.SIGCONT)
            stops += 1
    status = sweeper.wait()
    return {**watch.result(sweeper, calm), "stops": stops, "status": status}


def broken(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """The runs of one seed break, in six ways; the same call without the fault makes what lacks."""
    result = {}
    for number, fault in enumerate(
        ("raises", "returns text", "is NaN", "hangs", "ends its process", "fills the memory")
    ):
        own = folder / str(number)
        own.mkdir()
        place = where()
        sweeper, watch = Sweeper(own, place, small=True, **{FAULT: fault}), Watch(place)
        sweeper.start()
        status = sweeper.wait()
        done = watch.look()
        rows = len(sweeper.table()) if sweeper.out.exists() else 0
        told = sweeper.log.read_text().strip().splitlines()[-1].replace(str(ROOT), "…")
        result[fault] = {"status": status, "finished": done, "rows": rows, "told": told}
        if fault not in ("is NaN", "returns text"):  # whose loss is another function
            sweeper.environment = {FAULT: ""}
            sweeper.start()
            result[fault] |= {"status_after": sweeper.wait(), **watch.result(sweeper, calm)}
    return result


def versions(folder: Path, where: Where, calm: pd.DataFrame) -> dict[str, Any]:
    """Seven changes of the code between two calls on one ledger."""
    from tests.experiments import CHANGES  # noqa: PLC0415

    result = {}
    for name, change in CHANGES.items():
        place = where()
        options = SMALL | {"octaves": [0.0], "seeds": 2, "ledger": place, "workers": 1}
        sweep(tiny_experiment(), **options)
        try:
            sweep(tiny_experiment(**change), **options)
            result[name] = "taken"
        except InputError as error:
            result[name] = f"refused: {str(error).partition('holds another experiment ')[2]}"
    return result


# -- all of them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/faults"))
    parser.add_argument("--kills", type=int, default=50, help="on each storage")
    parser.add_argument("--only", help="parts whose name begins so")
    parser.add_argument("--sweep", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sweep:
        make_sweep(*arguments.sweep, arguments.small)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "faults.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        server = stack.enter_context(running_server()) if not why_not() else None
        places: dict[str, Where] = {"SQLite": Files(folder)}
        if server is not None:
            places["PostgreSQL"] = server.url
        calm, small = (undisturbed(folder, arguments.out, options) for options in (SWEEP, SMALL))
        for part, fault in parts(places, calm, small, arguments.kills, server).items():
            if part in results or (arguments.only and not part.startswith(arguments.only)):
                continue
            own = folder / part
            own.mkdir()
            started = time.monotonic()
            results[part] = {**fault(own), "wall_seconds": round(time.monotonic() - started)}
            results[part]["code"] = commit()
            results["made with"] = provenance(server)
            kept.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
            print(f"{part}: {json.dumps(results[part], ensure_ascii=False)}", flush=True)
    (arguments.out / "README.md").write_text(page(results))
    return 0


def parts(
    places: dict[str, Where], calm: pd.DataFrame, small: pd.DataFrame, count: int, server: Server | None
) -> dict[str, Callable[[Path], dict[str, Any]]]:
    made: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for number, (name, where) in enumerate(places.items()):
        made |= {
            f"two versions, {name}": lambda own, w=where: versions(own, w, small),
            f"broken runs, {name}": lambda own, w=where: broken(own, w, small),
            f"started together, {name}": lambda own, w=where: started_together(own, w, small),
            f"workers that slept, {name}": lambda own, w=where: slept(own, w, calm),
            f"clocks that jump, {name}": lambda own, w=where: clocks(own, w, calm),
            f"lock, {name}": lambda own, w=where: locked(own, w, calm),
            f"kill -9, {name}": lambda own, w=where, n=number: kills(own, w, calm, count, n),
        }
        if name == "SQLite":
            made["full disk, SQLite"] = lambda own, w=where: disk_full(own, w, calm)
        elif server is not None:
            made["server restarts, PostgreSQL"] = lambda own, w=where: restarted(own, w, calm, server)
    return made


class Files:
    """Makes the paths of new ledgers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def __call__(self) -> str:
        self.number += 1
        return str(self.folder / f"ledger{self.number}.db")


def undisturbed(folder: Path, out: Path, options: dict[str, Any]) -> pd.DataFrame:
    """The table of a sweep that is left alone, made once."""
    table = out / f"undisturbed-{options['seeds'] * len(options['octaves'] * 2)}.csv"
    if not table.exists():
        sweep(tiny_experiment(), ledger=folder / f"{table.stem}.db", workers=1, **options).to_csv(table, index=False)
    return pd.read_csv(table).drop(columns="seconds")


def commit() -> str:
    """The commit that is tried out."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()


def provenance(server: Server | None) -> dict[str, Any]:
    versions_of = {name: version(name) for name in ("looptransfer", "torch", "optuna", "sqlalchemy")}
    made = {**versions_of, "python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    if server is not None:
        made |= {"PostgreSQL": server.version(), "psycopg": version("psycopg")}
    return {**made, "machine": f"{platform.platform()}, {os.cpu_count()} cores"}


def page(results: dict[str, Any]) -> str:
    lines = ["# What a ledger withstands", "", *(__doc__ or "").splitlines()[4:], ""]
    lines += ["| fault | finished runs | lost | twice | table as undisturbed | exit status | more | wall time |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    ones = {part: result for part, result in results.items() if "runs" in result}
    for part, result in ones.items():
        known = ("runs", "lost", "twice", "same_table", "status", "statuses", "wall_seconds", "told")
        more = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.items() if key not in known)
        status = result.get("status", result.get("statuses"))
        cells = [part, result["runs"], result["lost"], result["twice"], "yes" if result["same_table"] else "NO"]
        lines.append(f"| {' | '.join(map(str, [*cells, status, more, str(result['wall_seconds']) + ' s']))} |")
    for part, result in results.items():
        if part.startswith("broken"):
            lines += ["", f"## {part}", "", "| what a run does | status | finished of 16 | table | then | told |"]
            lines += ["|---|---|---|---|---|---|"]
            for fault, each in result.items():
                if isinstance(each, dict):
                    then = f"status {each['status_after']}, same table: {each['same_table']}" if "lost" in each else ""
                    told = str(each["told"]).replace("|", "\\|")
                    cells = [fault, each["status"], each["finished"], f"{each['rows']} rows", then, told]
                    lines.append(f"| {' | '.join(map(str, cells))} |")
        if part.startswith("two versions"):
            lines += ["", f"## {part}", ""]
            lines += [f"- {name}: {told}" for name, told in result.items() if name not in ("wall_seconds", "code")]
        if "told" in result:
            lines += ["", f"What is told of a {part.partition(',')[0]}: {result['told']}"]
        if "skipped" in result:
            lines += ["", f"{part}: left out, {result['skipped']}"]
    lines += ["", *results.get("notes", [])]
    made = ", ".join(f"{key} {value}" for key, value in results["made with"].items())
    seeds = "moments drawn with seeds 0 (SQLite) and 1 (PostgreSQL)"
    return "\n".join([*lines, "", f"Made with {made}; {seeds}.", ""])


if __name__ == "__main__":
    sys.exit(main())
