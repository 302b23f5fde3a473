import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import looptransfer as lt
from looptransfer.errors import FailedRunError, InputError
from looptransfer.trials.command import LOG, Command
from looptransfer.trials.run import Outcome, Trial

LR = 2.0**-8
ALL = "{lr} {loops} {seed}"
METRIC = "{dir}/log.jsonl:val_loss"
PYTHON = shlex.quote(sys.executable)

# A script as people have them: reads its options, writes a log of JSON lines.
SCRIPT = """
import argparse, json, math, pathlib, random
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--n", type=int)
parser.add_argument("--seed", type=int)
parser.add_argument("--rule", default="factored")
parser.add_argument("--out", type=pathlib.Path)
args = parser.parse_args()
drift = {"factored": 0.0, "sqrt": 0.5, "unscaled": 1.0}[args.rule]
noise = random.Random(args.seed).gauss(0, 0.05)
curve = 0.05 * (math.log2(args.lr) + 8 + drift * math.log2(args.n) + noise) ** 2
with (args.out / "log.jsonl").open("w") as log:
    for step in (1, 2, 3, 4):
        print(json.dumps({"step": step, "val_loss": 2 + curve + 0.01 * math.log2(args.n) + 1 / step}), file=log)
"""


def trial(directory: Path, **changes: Any) -> Trial:
    values: dict[str, Any] = {"rule": "factored", "loops": 2, "lr": LR, "seed": 0, "device": "cpu"} | changes
    return Trial(**values, directory=directory / "run")


def script(folder: Path, text: str, metric: str = METRIC, words: str = ALL + " {dir}", **options: Any) -> Command:
    """A command that runs a script, whose words are argv[1:]."""
    path = folder / "a script.py"
    path.write_text(text)
    return Command(f"{PYTHON} {shlex.quote(str(path))} {words}", metric, **options)


def trained(folder: Path, text: str, metric: str = METRIC, **options: Any) -> Outcome:
    return script(folder, text, metric, **options).train(trial(folder))


def log_of(folder: Path) -> str:
    return (folder / "run" / LOG).read_text()


def writing(*lines: str) -> str:
    """A script that writes lines into log.jsonl."""
    return f"import sys\nopen(sys.argv[4] + '/log.jsonl', 'w').write({chr(10).join(lines)!r})"


# -- what is said before anything is started


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x {lr} {loops} {seed} {width}", r"holds \{width\}, which is no placeholder; there are \{loops\}, \{lr\}"),
        ("x {lr} {loops} {seed} {}", r"holds \{\}, which is no placeholder"),
        ("x {lr} {loops} {seed.real}", r"holds \{seed.real\}"),
        ("x {lr} {loops}", r"lacks \{seed\}, so that all runs would have the same seed"),
        ("x {seed} {loops}", r"lacks \{lr\}"),
        ("x {seed} {lr}", r"lacks \{loops\}"),
        ("x {lr} {loops} {seed} '{\"a\": 1}'", "a brace itself is written twice|cannot be filled in"),
        ("x {lr} {loops} {seed} {", "cannot be filled in: .*write a brace itself twice"),
        ("x {lr} {loops} {seed} 'open", "cannot be split into words: No closing quotation"),
        ("  ", "the command is empty"),
    ],
)
def test_a_command_with_wrong_placeholders_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Command(text, METRIC)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("log.jsonl", "write FILE:KEY"),
        ("{dir}/log.jsonl:", "write FILE:KEY"),
        ("log.jsonl:val_loss", r"lacks \{dir\}, so that runs would read each other's losses"),
        ("{out}/log.jsonl:val_loss", r"holds \{out\}, which is no placeholder"),
        ("stdout:loss", "must have one group, round the loss"),
        ("stdout:(loss) (.*)", "must have one group, round the loss"),
        ("stdout:(", "the pattern of the metric 'stdout:.' is wrong: missing"),
    ],
)
def test_a_metric_of_another_form_is_refused(metric: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Command("x " + ALL, metric)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"time_limit": 0}, "the time limit, in seconds, is 0; it must be a finite number above 0"),
        ({"time_limit": math.nan}, "the time limit, in seconds, is nan"),
        ({"retries": -1}, "retries is -1; it must be a whole number from 0 up"),
        ({"env": {"X": "{nothing}"}}, r"env X '\{nothing\}' holds \{nothing\}"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Command("x " + ALL, METRIC, **option)


def test_a_rule_that_cannot_reach_the_command_is_refused_where_there_are_several(tmp_path: Path) -> None:
    command = script(tmp_path, "raise SystemExit('not to be started')")
    with pytest.raises(InputError, match=r"does not use \{rule\}, so that factored, sqrt would train the same; add"):
        command.check(trial(tmp_path), [1, 2], [0, 1], ["factored", "sqrt"])
    assert Command("x " + ALL, METRIC, env={"RULE": "{rule}"}).uses("rule")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be started: there is no program 'no-such-program'; see the PATH"):
        Command("no-such-program " + ALL, METRIC).train(trial(tmp_path))


def test_the_identity_is_what_is_run_and_where_its_loss_is() -> None:
    command = Command("x " + ALL, METRIC, "2", time_limit=5, retries=1, env={"A": "1"})
    identity = command.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity.items() >= {"command": "x " + ALL, "metric": METRIC, "version": "2", "env": {"A": "1"}}.items()
    assert Command("x " + ALL, METRIC, "2", env={"A": "1"}).identity() == identity
    assert Command("x " + ALL, METRIC, "3", env={"A": "1"}).identity() != identity


# -- what it is started with


def test_the_words_and_the_environment_are_filled_in(tmp_path: Path) -> None:
    text = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['N'], os.environ['GPU']])); print('loss 1')"
    )
    words = "--lr={lr} --n={loops} {seed} {rule} {dir} {device} {{x}}"
    command = script(tmp_path, text, "stdout:loss (.*)", words, env={"N": "n is {loops}"})
    run = trial(tmp_path / "a folder", lr=3e-05, seed=7, device="cuda:1", environment={"GPU": "1"})
    assert command.train(run).loss == 1.0
    seen = json.loads((run.directory / LOG).read_text().splitlines()[0])
    assert seen == [["--lr=3e-05", "--n=2", "7", "factored", str(run.directory), "cuda", "{x}"], "n is 2", "1"]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lr=st.floats(1e-30, 1e30))
def test_an_lr_reaches_the_command_to_the_last_bit(lr: float) -> None:
    assert float(f"{lr}") == lr


def test_two_commands_at_once_are_given_ports_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("PET_MASTER_PORT", raising=False)
    text = "import os; print('loss', os.environ['MASTER_PORT']); assert os.environ['PET_MASTER_PORT']"
    command = script(tmp_path, text, "stdout:loss (.*)")
    assert 1024 < command.train(trial(tmp_path)).loss < 65536
    monkeypatch.setenv("MASTER_PORT", "5")
    assert command.train(trial(tmp_path)).loss == 5


# -- where its loss is


def test_the_last_json_line_with_the_key_counts(tmp_path: Path) -> None:
    lines = ['{"step": 1, "val_loss": 3}', "no json", '{"step": 2, "val_loss": 2.5}', '{"step": 3, "loss": 9}', "[1]"]
    outcome = trained(tmp_path, writing(*lines, '{"step": 4, "val_loss": null}'))
    assert (outcome.loss, outcome.steps, outcome.layers, outcome.diverged) == (2.5, 2, None, False)


def test_a_column_of_a_csv_is_read(tmp_path: Path) -> None:
    text = "import sys\nopen(sys.argv[4] + '/log.csv', 'w').write('step,train,val loss\\n1,5,3.5\\n2,4,3.25\\n3,4,\\n')"
    outcome = trained(tmp_path, text, "{dir}/log.csv:val loss")
    assert (outcome.loss, outcome.steps) == (3.25, 2)
    with pytest.raises(InputError, match=r"log\.csv has no column 'val'; there are step, train, val loss"):
        trained(tmp_path, text, "{dir}/log.csv:val")


def test_a_pattern_is_read_from_the_output(tmp_path: Path) -> None:
    text = "import sys\nprint('step 1: val loss 3.5')\nprint('step 20: val loss 3.25', file=sys.stderr)\nprint('bye')"
    outcome = trained(tmp_path, text, r"stdout:val loss (\S+)")
    assert (outcome.loss, outcome.steps) == (3.25, None)
    assert trained(tmp_path, text, r"stdout:step (?P<step>\d+): val loss (\S+)").steps == 20


@pytest.mark.parametrize(("value", "loss"), [('"2.5"', 2.5), ("1e-3", 1e-3), ("-4", -4.0)])
def test_numbers_may_stand_as_text(tmp_path: Path, value: str, loss: float) -> None:
    assert trained(tmp_path, writing(f'{{"val_loss": {value}}}')).loss == loss


@pytest.mark.parametrize("value", ['"best"', "[2]", "{}"])
def test_what_is_no_number_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match=r"log.jsonl, line 2: val_loss is .*, which is no number"):
        trained(tmp_path, writing('{"val_loss": 2}', f'{{"val_loss": {value}}}'))


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"nan"', "-Infinity", "true"])
def test_a_loss_that_is_no_finite_number_has_diverged_whatever_the_exit_status(tmp_path: Path, value: str) -> None:
    for ending in ("", "\nraise SystemExit('loss is nan')"):
        outcome = trained(tmp_path, writing('{"val_loss": 2}', f'{{"val_loss": {value}}}') + ending)
        assert (outcome.loss, outcome.diverged, outcome.last_loss) == (math.inf, True, 2.0)


def test_a_run_that_diverges_is_ended_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    outcome = trained(tmp_path, writing('{"val_loss": NaN}', "") + "\nimport time; time.sleep(600)")
    assert outcome.diverged
    assert time.monotonic() - started < 60


def test_success_without_a_loss_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"loss at .*run/log.jsonl:val_loss \(No such file or directory\); the end of .*output.log:"
    ):
        trained(tmp_path, "print('all is well')")
    assert log_of(tmp_path) == "all is well\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"loss": 2, "step": 1}'], "no line has a value for 'val_loss'; there are loss, step"),
        (["{", '"val_loss": 2', "}"], "no line of it is a JSON object; write one object a line"),
        (['[{"val_loss": 2}]'], "no line of it is a JSON object"),
    ],
)
def test_what_stands_in_a_file_without_the_loss_is_told(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(InputError, match=rf"ended without a loss at .*log\.jsonl:val_loss \({said}"):
        trained(tmp_path, writing(*lines))


def test_a_mark_of_the_byte_order_is_no_part_of_a_column(tmp_path: Path) -> None:
    text = "import sys\nopen(sys.argv[4] + '/log.csv', 'w', encoding='utf-8-sig').write('loss,step\\n3.5,1\\n')"
    assert trained(tmp_path, text, "{dir}/log.csv:loss").loss == 3.5


# -- how it fails


def test_the_end_of_the_log_is_shown_where_it_fails(tmp_path: Path) -> None:
    text = "for k in range(60): print('line', k)\nraise ValueError('too small')"
    with pytest.raises(InputError, match=r"ended with exit status 1; the end of .*output\.log:") as caught:
        trained(tmp_path, text)
    shown = str(caught.value).splitlines()
    assert len(shown) == 41
    assert shown[-1] == "  | ValueError: too small"
    assert "line 0\n" in log_of(tmp_path)


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was ended by SIGKILL, out of memory perhaps"):
        trained(tmp_path, "import os; os.kill(os.getpid(), 9)")


COUNTED = """
import pathlib, sys
count = pathlib.Path(sys.argv[4], 'count')
count.write_text(count.read_text() + 'x' if count.exists() else 'x')
print('attempt', len(count.read_text()))
"""


def test_an_attempt_that_fails_is_followed_by_others_in_the_same_directory(tmp_path: Path) -> None:
    text = COUNTED + "if len(count.read_text()) < 3: raise SystemExit(5)\nprint('loss 2.5')"
    assert trained(tmp_path, text, "stdout:loss (.*)", retries=2).loss == 2.5
    assert log_of(tmp_path) == "attempt 1\nattempt 2\nattempt 3\nloss 2.5\n"


def test_the_last_attempt_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exit status 5(.|\n)*\| attempt 3"):
        trained(tmp_path, COUNTED + "raise SystemExit(5)", retries=2)


def test_an_attempt_past_its_time_limit_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    text = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with pytest.raises(InputError, match="ran past its limit of 3 s"):
        trained(tmp_path, text, time_limit=3)
    ends(int(log_of(tmp_path)))


def ends(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


STARTER = """
import sys
from pathlib import Path
from looptransfer.trials.command import Command
from looptransfer.trials.run import Trial
folder = Path(sys.argv[1])
command = Command(sys.argv[2], "stdout:loss (.*)")
command.train(Trial("factored", 2, 0.01, 0, device="cpu", directory=folder))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_command_ends_with_the_process_that_started_it(tmp_path: Path, number: int) -> None:
    text = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    command = script(tmp_path, text, "stdout:loss (.*)").text
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "run"), command], stderr=subprocess.DEVNULL
    )
    log = tmp_path / "run" / LOG
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.1)
    starter.send_signal(number)
    starter.wait()
    ends(int(log.read_text()))


# -- from a script to a verdict


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("toy") / "train.py"
    path.write_text(SCRIPT)
    words = "--lr {lr} --n {loops} --seed {seed} --rule {rule} --out {dir}"
    return f"{PYTHON} {shlex.quote(str(path))} {words}"


def test_a_sweep_of_a_command_gives_the_table_that_check_judges(tmp_path: Path, toy: str) -> None:
    rules: Any = ["factored", "unscaled"]
    octaves = [-4.0, -2.0, 0.0, 2.0]
    results = lt.sweep(
        Command(toy, METRIC),
        [1, 4],
        around=LR,
        rules=rules,
        octaves=octaves,
        seeds=2,
        ledger=tmp_path / "l.db",
        workers=2,
    )
    assert len(results) == 2 * 2 * 4 * 2
    assert (results["steps"] == 4).all()
    verdict = lt.check(results)
    assert {name: one.answer for name, one in verdict.rules.items()} == {"factored": "FLAT", "unscaled": "DRIFTS"}


def test_one_command_that_fails_does_not_take_the_sweep_with_it(tmp_path: Path, toy: str) -> None:
    broken = toy.replace("--n {loops}", "--n {loops} $BROKEN")
    text = SCRIPT.replace("drift =", "assert not (args.seed == 1 and args.lr > 0.01), 'this one is broken'\ndrift =")
    command = script(tmp_path, text, words=broken.partition("train.py ")[2].replace(" $BROKEN", ""))
    options: dict[str, Any] = {"lrs": [LR, 2 * LR, 4 * LR], "seeds": 2, "ledger": tmp_path / "l.db", "workers": 1}
    with pytest.raises(FailedRunError, match=r"1 of 6 runs are missing.*(.|\n)*this one is broken"):
        lt.sweep(command, [2], **options)
    script(tmp_path, SCRIPT)
    assert len(lt.sweep(command, [2], **options)) == 6
