"""Kill the demo with SIGKILL at ten random moments, let it finish, and hold it against an undisturbed run.

    python benchmarks/kill_demo.py [--full]

Prints what was lost or made twice (nothing, if all is well) and whether both end in the same verdict.json; exits 1
where they do not. Takes about ten minutes with the quick demo.
"""

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

KILLS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole demo instead of the quick one")
    command = [sys.executable, "-m", "looptransfer", "demo", *([] if parser.parse_args().full else ["--quick"])]
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    subprocess.run([*command, "--out", str(folder / "calm")], check=True, capture_output=True)
    calm = time.monotonic() - started
    moments = random.Random(0)
    lost = 0
    before: Counter[str] = Counter()
    for number in range(KILLS):
        demo = subprocess.Popen(
            [*command, "--out", str(folder / "killed")], start_new_session=True, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.5, 2 * calm / KILLS))
        os.killpg(demo.pid, signal.SIGKILL)
        demo.wait()
        done = finished(folder / "killed" / "ledger.db")
        lost += sum((before - done).values())
        before = done
        print(f"kill {number + 1}: {sum(done.values())} runs finished", flush=True)
    subprocess.run([*command, "--out", str(folder / "killed")], check=True, capture_output=True)
    done = finished(folder / "killed" / "ledger.db")
    lost += sum((before - done).values())
    twice = sum(count - 1 for count in done.values())
    same = (folder / "calm" / "verdict.json").read_bytes() == (folder / "killed" / "verdict.json").read_bytes()
    print(f"undisturbed: {calm:.0f} s, {sum(finished(folder / 'calm' / 'ledger.db').values())} runs")
    print(f"after {KILLS} kills: {sum(done.values())} runs, {lost} lost, {twice} made twice, verdict.json same: {same}")
    shutil.rmtree(folder)
    return 0 if same and not lost and not twice else 1


def finished(ledger: Path) -> Counter[str]:
    """How often each run stands in the ledger as finished, read past Optuna."""
    if not ledger.exists():
        return Counter()
    query = """select s.study_name || a.value_json from trials t join studies s using (study_id)
               join trial_user_attributes a using (trial_id) where t.state = 'COMPLETE' and a.key = 'run'"""
    with sqlite3.connect(ledger) as connection:
        try:
            return Counter(row[0] for row in connection.execute(query))
        except sqlite3.OperationalError:  # killed before the tables were made
            return Counter()


if __name__ == "__main__":
    sys.exit(main())
