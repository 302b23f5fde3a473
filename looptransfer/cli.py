"""The command line. Commands import what they need when they run, so that help and `check` load no torch."""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from looptransfer.arguments import centre_of, columns_of, learning_rates, listed, seeds_of
from looptransfer.errors import FailedRunError, InputError
from looptransfer.files import check_new, check_writable, locked, same_file, write_file
from looptransfer.text import plain_lines, without_password
from looptransfer.user_code import end_with_parent

if TYPE_CHECKING:
    from looptransfer.transfer.comparison import Comparison
    from looptransfer.transfer.verdict import Verdict

USAGE, UNEXPECTED, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141
LEAVE = 5.0  # seconds in which a process has to end that has answered or was interrupted
LEDGER, OPTIMA = "looptransfer.db", "lr-optima.json"
STATUS = "exit status: 0 flat, 1 drifts or moved, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"
HELD = "exit status: 0 holds, 1 moved or worse, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"
START = """\
start here:   looptransfer demo --quick
your model:   looptransfer inspect my_project.model:make
your LR:      looptransfer tune experiment.py --loops 2 -o best.json
your results: looptransfer check results.csv"""
ABOUT = "Tune the LR of a looped Transformer at small N, carry it to large N, and check that it holds."
DEMO = """\
Tunes the LR of a small looped decoder at N = 2, sweeps around it at N = 1…16 under the
paper's rule and two controls, and writes report.html, results.csv and verdict.json.
About 18 minutes on two cores. Stopped at any moment, the same command goes on where it was."""
INSPECT = """\
Prints the plan of a model: every residual branch with its layer, its visits, its multiplier and
the line where it is added, and what is left alone. Changes nothing.

  looptransfer inspect looptransfer:LoopedDecoder --inputs long:2x16
  looptransfer inspect my_project.model:make --inputs input_ids=long:2x16 loops=8

FACTORY takes no arguments and returns a model, or a model and example inputs. Where the trace
cannot tell the branches, the message says what settles it, often --branches 'layers.*.mlp'."""
CHECK = """\
Says FLAT, DRIFTS or INCONCLUSIVE for the LR optimum over N, and why. Trains nothing.

  looptransfer check results.csv
  looptransfer check wandb.csv --columns loops=n_loops loss=val_loss --where State=finished
  looptransfer check mlflow.csv --columns lr=params.lr loss=metrics.loss --diverged status=FAILED,KILLED
  looptransfer check 'sqlite:///optuna.db#study' --axis width --markdown >> "$GITHUB_STEP_SUMMARY"
  zcat runs.csv.gz | looptransfer check -

SOURCE is a table in CSV, JSON lines or Parquet, a pipe or - for standard input, a ledger of tune and sweep, or the URL
of an Optuna study; it is only read. It has one row per training run, with columns
  loops     N, a whole number from 1 (or the column that --axis names)
  lr        absolute learning rate
  loss      final loss, in nats unless --unit says otherwise; inf or nan where the run diverged. An empty cell, or a
            column State or status that says crashed or running, is a run without a result: leave it out with --where,
            or count it as diverged with --diverged
  seed      optional; runs of one seed are compared with each other, and one seed settles nothing
  rule      optional; the other rules serve as controls
  diverged  optional; true or false
  step      optional; where there is a row for every step, the optimum at 50 and 75 % of the training is shown too"""

TRAINED = "exit status: 0 done, 2 bad usage or input, 70 anything unexpected, 130 interrupted"
EXPERIMENT = """\
EXPERIMENT is path/to/file.py:NAME or package.module:NAME (NAME is `experiment` where left out): a
looptransfer.Experiment, or a function of no arguments that returns one. Before any training its start
is made twice and compared: seeds must pair the runs, and loops follow N. What its code prints goes to
standard error; what fails in it ends with 2, and is told with its file and line."""
KEPT = """\
Finished runs are kept in the ledger: stopped at any moment, the same command goes on where it was. A
run that fails leaves the others alone, and is tried again by the same command."""
TUNE = f"""\
Finds the best LR of a proxy, your experiment with few loops: a coarse look with one seed, then
half-octave steps with every seed, and the optimum with its interval over seeds.

  looptransfer tune experiment.py --loops 2 -o best.json

{EXPERIMENT}
{KEPT}"""
SWEEP = f"""\
Trains at every loop count, LR and seed around the LR that was tuned, and writes the table that
`looptransfer check` judges. Control rules show whether the sweep could have seen a drift.

  looptransfer sweep experiment.py --loops 1,2,4,8,16 --around best.json -o results.csv
  looptransfer sweep experiment.py --loops 1,4,16 --lrs 0.001,0.002,0.004 --seeds 4-7 --append results.csv

{EXPERIMENT}
{KEPT}"""
GATE = f"""\
Trains at half, once and twice the stored LR optimum, at the smallest and the largest stored N with a
few seeds, and says whether the optimum still lies between: a check for every commit.

  looptransfer check results.csv --baseline {OPTIMA} --update-baseline
  looptransfer gate experiment.py --baseline {OPTIMA}

{EXPERIMENT}
No run is kept: those of another state of the code would say nothing of this one."""

COORDCHECK = f"""\
Trains a few steps at every loop count, watches what reaches the residual stream at every visit of
every branch, and says whether it grows with N as the rule promises, and if not, why.

  looptransfer coordcheck experiment.py --loops 1,2,4,8,16,32,64 --html coordinates.html

{EXPERIMENT}"""
WORK = """\
Takes runs of a study that `tune` or `sweep` began with --ledger URL#STUDY, on this machine or any other, until none
is left. The study is never begun here, and one of another experiment is refused.

  looptransfer sweep experiment.py … --ledger postgresql://user@host/runs#widths -o results.csv
  looptransfer work --storage postgresql://user@host/runs widths

EXPERIMENT is what the study says where it is left out, as it would be named here.
URL is that of a database, best of PostgreSQL; journal:///path/to/file (Optuna's journal) where there is only a shared
disk; or a SQLite file, on one machine."""
CHECKED = "exit status: 0 passes, 1 fails, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"


Answer = tuple[str, int]  # what a command prints on standard output, and its exit status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 and 3 only with an answer that was printed.

    While a command runs, standard output is standard error: what the user's code prints is not part of the answer.

    Args:
        argv: words of a command line, to be run in this process. Where left out, those of this process; a command that
            runs the user's code then does so in a process of its own, which may end as it likes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what its encoding lacks, as ε in a C locale, is no reason to fail
    arguments = _parser().parse_args(argv)
    if sys.stdout is None:
        print("looptransfer: cannot print the answer: standard output is closed", file=sys.stderr)
        return USAGE
    apart = argv is None and arguments.user_code
    return _print(*(_answer_apart() if apart else _answer(arguments)))


def _answer(arguments: argparse.Namespace) -> Answer:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer: Answer = arguments.run(arguments)
            return answer
    except InputError as error:
        print(plain_lines(f"looptransfer: {error}"), file=sys.stderr)
        return "", USAGE
    except KeyboardInterrupt:
        print("looptransfer: interrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return "", INTERRUPTED
    except BaseException:
        traceback.print_exc()
        print("looptransfer: this is unexpected; please report it with the lines above", file=sys.stderr)
        return "", UNEXPECTED


def _answer_apart() -> Answer:
    """The answer of a process that runs this process's command line, and bad input where it ends without one."""
    while (
        free := os.open(os.devnull, os.O_RDWR)
    ) < 3:  # no pipe may take the place of a standard stream that is closed
        os.set_inheritable(free, True)
    os.close(free)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_answer, args=(sender, sys.argv[1:]))
    process.start()
    sender.close()
    answer: Answer = "", INTERRUPTED
    try:
        while process.is_alive() and not receiver.poll(1.0):
            pass  # the pipe's end alone would tell nothing where a process that the user's code started keeps it open
        answer = receiver.recv() if receiver.poll() else _no_answer(process)
    except EOFError:
        answer = _no_answer(process)
    except KeyboardInterrupt:
        process.join(1.0)  # a terminal interrupts both, and it says so
        if process.is_alive():
            os.kill(int(str(process.pid)), signal.SIGINT)
    process.join(LEAVE)
    process.kill()  # a thread that was left running
    return answer


def _no_answer(process: BaseProcess) -> Answer:
    process.join()
    reason = f"your code, or a library that it uses, ended its process (exit status {process.exitcode}) or crashed"
    print(f"looptransfer: there is no answer: {reason}", file=sys.stderr)
    return "", USAGE


def _send_answer(sender: Connection, argv: Sequence[str]) -> None:
    end_with_parent()
    os.dup2(2, 1)
    sender.send(_answer(_parser().parse_args(argv)))


def _print(text: str, status: int) -> int:
    """Print the answer and return its status; that of a failure where it cannot be printed."""
    try:
        if text:
            print(text, flush=True)
        return status
    except BrokenPipeError:  # `looptransfer check … | head` has read enough
        status = PIPE_CLOSED
    except (OSError, ValueError) as error:
        print(f"looptransfer: cannot print the answer: {error}", file=sys.stderr)
        status = USAGE
    with contextlib.suppress(AttributeError, OSError, ValueError):  # or the rest would be tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="looptransfer", description=ABOUT, epilog=START, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"looptransfer {version('looptransfer')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    story = "the whole story on the embedded model and text"
    _add_demo(commands.add_parser("demo", help=story, description=DEMO, formatter_class=raw))
    look = "show what would be rewritten in a model"
    _add_inspect(commands.add_parser("inspect", help=look, description=INSPECT, formatter_class=raw))
    search = "find the best LR of a proxy"
    _add_tune(commands.add_parser("tune", help=search, description=TUNE, epilog=TRAINED, formatter_class=raw))
    spread = "train over loop counts and LRs, for a table of results"
    _add_sweep(commands.add_parser("sweep", help=spread, description=SWEEP, epilog=TRAINED, formatter_class=raw))
    join = "one more machine for a sweep that is under way"
    _add_work(commands.add_parser("work", help=join, description=WORK, epilog=TRAINED, formatter_class=raw))
    watch = "watch the residual stream over N in a few short trainings"
    _add_coordcheck(
        commands.add_parser("coordcheck", help=watch, description=COORDCHECK, epilog=CHECKED, formatter_class=raw)
    )
    judge = "judge a table of results; trains nothing"
    _add_check(commands.add_parser("check", help=judge, description=CHECK, epilog=STATUS, formatter_class=raw))
    guard = "train a little, and see whether stored optima still hold"
    _add_gate(commands.add_parser("gate", help=guard, description=GATE, epilog=HELD, formatter_class=raw))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="smaller, within three minutes; may end inconclusive")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="first seed, from 0 up (default: 0)")
    parser.add_argument("--text", metavar="FILE_OR_DIR", help="your own text (default: Python's standard library)")
    parser.set_defaults(run=_demo, user_code=False)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="FACTORY", help="package.module:factory or path/to/file.py:factory")
    parser.add_argument(
        "--inputs",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="example inputs: float:2x16x32, long:2x16, bool:2x16 or a number; NAME=… for a keyword argument",
    )
    parser.add_argument("--rule", default="factored", help="factored, sqrt or unscaled (default: factored)")
    parser.add_argument("--base-layers", type=int, default=1, help="L_ref, the depth you tuned at (default: 1)")
    parser.add_argument("--branches", nargs="+", metavar="NAME", help="the branches' modules, by name or glob")
    parser.add_argument("--layers", type=int, help="L, where blocks are not what should be counted")
    parser.add_argument("--json", action="store_true", help="the plan as JSON on standard output")
    parser.set_defaults(run=_inspect, user_code=True)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    _add_experiment(parser)
    parser.add_argument("--loops", type=int, required=True, metavar="N", help="loop count of the proxy")
    parser.add_argument("--rule", default="factored", help="factored, sqrt or unscaled (default: factored)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write what was found as JSON, for sweep")
    parser.set_defaults(run=_tune, user_code=True)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_experiment(parser)
    parser.add_argument("--loops", required=True, metavar="N,N,…", help="loop counts, such as 1,2,4,8,16")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--around", metavar="LR", help="centre of the LRs: a number, or the file that tune wrote")
    where.add_argument("--lrs", metavar="LR,LR,…", help="the LRs themselves")
    octaves = "LRs as log2 distances from the centre (default: -3,-2.25,-1.5,-0.75,0,0.75,1.5); write --octaves=-1,0,1"
    parser.add_argument("--octaves", metavar="X,X,…", help=octaves)
    rules = "factored, sqrt, unscaled; all but the one judged are controls (default: factored)"
    parser.add_argument("--rules", default="factored", metavar="RULE,…", help=rules)
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table as CSV into a new file")
    table.add_argument("--append", type=Path, metavar="FILE", help="make what this table lacks and add it there")
    parser.set_defaults(run=_sweep, user_code=True)


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="what is trained: file.py, file.py:NAME, module:NAME")
    parser.add_argument("--seeds", default="4", help="how many, or which: 4, 0-3 or 0,2,5 (default: 4)")
    kept = f"finished runs: SQLite, journal:///FILE or a database's URL with #STUDY (default: {LEDGER})"
    parser.add_argument("--ledger", default=LEDGER, metavar="FILE", help=kept)
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="K", help="processes of one thread (default: one per core)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="a run that takes longer counts as failed")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="its name in the storage")
    parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help="what is trained (default: as begun)")
    parser.add_argument("--storage", required=True, metavar="URL", help="where it is kept")
    _add_workers(parser)
    parser.set_defaults(run=_work, user_code=True)


def _add_coordcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="what is trained: file.py, file.py:NAME, module:NAME")
    parser.add_argument("--loops", default="1,2,4,8,16,32,64", metavar="N,N,…", help="loop counts (default: 1 to 64)")
    rules = "factored, sqrt, unscaled, 'as made'; the first is judged (default: factored, or as made if rewritten)"
    parser.add_argument("--rules", metavar="RULE,…", help=rules)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--seeds", default="3", help="how many, or which: 3, 0-2 or 0,2,5 (default: 3)")
    parser.add_argument("--lr", type=float, default=1e-3, help="base LR (default: 0.001)")
    parser.add_argument("--tolerance", type=float, default=0.15, help="of an exponent (default: 0.15)")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON on standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the frame as CSV as well")
    parser.set_defaults(run=_coordcheck, user_code=True)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="table, ledger or study, such as results.csv; - is stdin")
    called = "what a column is called in SOURCE, such as lr=config.lr"
    parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="NAME=THERE", help=called)
    kept = "judge only rows such as State=finished or loss!= (not empty); VALUE,VALUE is either"
    parser.add_argument("--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help=kept)
    lost = "runs that diverged whatever their loss, such as State=crashed or loss= (empty)"
    parser.add_argument("--diverged", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help=lost)
    parser.add_argument("--axis", default="loops", metavar="COLUMN", help="what grows: loops, width, layers, …")
    parser.add_argument("--maximize", action="store_true", help="loss is a metric of which more is better")
    unit = "of the loss (default: nats where the column is called …loss and its curve is not too flat for them)"
    parser.add_argument("--unit", help=unit)
    parser.add_argument("--rule", help="the rule to judge (default: factored, or the only one there)")
    parser.add_argument(
        "--lr", type=float, help="the transferred LR, absolute (default: the optimum at the smallest N)"
    )
    parser.add_argument("--tolerance", type=float, default=0.20, help="octaves per doubling of N (default: 0.20)")
    regret = "tolerated regret in the unit of the loss (default: 0.02 nats, else 5 %% of the curve's height)"
    parser.add_argument("--regret", type=float, help=regret)
    parser.add_argument("--confidence", type=float, default=0.90, help="of the intervals (default: 0.90)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the verdict as JSON on standard output")
    form.add_argument("--markdown", action="store_true", help="the verdict as Markdown on standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    todo = "write the runs that would settle the verdict as CSV, a row per run"
    parser.add_argument("--todo", type=Path, metavar="FILE", help=todo)
    stored = "compare the optima with these: exit status 1 where one moved or its loss got worse"
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=f"{stored} (such as lr-optima.json)")
    parser.add_argument("--update-baseline", action="store_true", help="write the optima into --baseline instead")
    moved = "octaves that an optimum may be away from the stored one (default: 0.5)"
    parser.add_argument("--moved", type=float, default=0.5, metavar="OCTAVES", help=moved)
    parser.set_defaults(run=_check, user_code=False)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="what is trained: file.py, file.py:NAME, module:NAME")
    parser.add_argument("--baseline", type=Path, default=Path(OPTIMA), metavar="FILE", help=f"(default: {OPTIMA})")
    parser.add_argument(
        "--loops", metavar="N,N,…", help="which of the stored N (default: the smallest and the largest)"
    )
    parser.add_argument("--seeds", type=int, default=6, help="how many (default: 6)")
    parser.add_argument("--rule", default="factored", help="factored, sqrt or unscaled (default: factored)")
    parser.add_argument("--workers", type=int, metavar="K", help="processes of one thread (default: one per core)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the answer as JSON on standard output")
    form.add_argument("--markdown", action="store_true", help="the answer as Markdown on standard output")
    parser.set_defaults(run=_gate, user_code=True)


def _demo(arguments: argparse.Namespace) -> Answer:
    from looptransfer.demo import run_demo  # noqa: PLC0415

    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; it must be 0 or more")
    return "\n".join(run_demo(arguments.out, arguments.quick, arguments.seed, arguments.text)), 0


def _inspect(arguments: argparse.Namespace) -> Answer:
    from looptransfer.inspection import inspect_model  # noqa: PLC0415

    plan = inspect_model(
        arguments.target,
        arguments.inputs,
        rule=arguments.rule,
        base_layers=arguments.base_layers,
        branches=arguments.branches,
        layers=arguments.layers,
    )
    return plan.to_json() if arguments.json else str(plan), 0


def _coordcheck(arguments: argparse.Namespace) -> Answer:
    loops, seeds = listed("--loops", arguments.loops, int, "1,2,4,8"), seeds_of(arguments.seeds)
    source = arguments.experiment.partition(".py")[0] + ".py"
    _keep_apart({"the experiment": source}, {"--html": arguments.html, "--output": arguments.output})
    home = Path.cwd()  # the user's file may change it
    for path in filter(None, (arguments.html, arguments.output)):
        write_file(path, None)  # before the training
    import torch  # noqa: PLC0415

    from looptransfer.coordcheck.recommend import recommend  # noqa: PLC0415
    from looptransfer.coordcheck.run import coord_check  # noqa: PLC0415
    from looptransfer.targets import load_experiment  # noqa: PLC0415

    torch.set_num_threads(1)  # as in a sweep's workers: at these sizes more threads take longer
    started = time.perf_counter()
    result = coord_check(
        load_experiment(arguments.experiment),
        loops=loops,
        rules=arguments.rules and [rule.strip() for rule in arguments.rules.split(",")],
        steps=arguments.steps,
        seeds=seeds,
        lr=arguments.lr,
        tolerance=arguments.tolerance,
    )
    made = {
        "experiment": arguments.experiment,
        "looptransfer": version("looptransfer"),
        "torch": version("torch"),
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "LR": arguments.lr,
        "seconds": f"{time.perf_counter() - started:.0f}",
    }
    if arguments.html:
        from looptransfer.report.coordinates import write_coord_html  # noqa: PLC0415

        write_coord_html(result, home / arguments.html, provenance=made)
    if arguments.output:
        write_file(home / arguments.output, result.frame.to_csv(index=False))
    if arguments.json:
        return json.dumps(result.to_dict(), indent=2, allow_nan=False), result.exit_status
    lines = [str(result)]
    if result.context.looped and max(loops) >= 4 * min(loops):
        try:
            lines.append(f"multiplier that this model needs: {recommend(result)}")
        except InputError as error:  # the verdict stands
            lines.append(f"multiplier that this model needs: not known, {error}")
    return "\n".join(lines), result.exit_status


def _tune(arguments: argparse.Namespace) -> Answer:
    seeds = seeds_of(arguments.seeds)
    if arguments.output:
        check_new(arguments.output)
        check_writable(arguments.output, arguments.ledger)
    from looptransfer.targets import load_experiment  # noqa: PLC0415
    from looptransfer.trials.sweep import tune  # noqa: PLC0415

    home, ledger = Path.cwd(), _absolute(arguments.ledger)  # the user's file may change the working directory
    experiment = load_experiment(arguments.experiment)
    best = tune(
        experiment,
        arguments.loops,
        seeds,
        ledger,
        arguments.workers,
        arguments.rule,
        arguments.time_limit,
        arguments.experiment,
    )
    if arguments.output:
        write_file(home / arguments.output, json.dumps(best.to_dict(), indent=2) + "\n")
    around = arguments.output or f"{best.lr:.6g}"
    follow = ["sweep", arguments.experiment, "--loops", "1,2,4,8,16", "--around", around, "-o", "results.csv"]
    follow += ["--ledger", arguments.ledger] if arguments.ledger != LEDGER else []
    return f"{best}\n{_next(*follow)}", 0


def _sweep(arguments: argparse.Namespace) -> Answer:
    loops, seeds = listed("--loops", arguments.loops, int, "1,2,4,8,16"), seeds_of(arguments.seeds)
    path = arguments.append or arguments.output
    from looptransfer.trials.table import grown, loss_table, read_table  # noqa: PLC0415

    if arguments.output:
        check_new(path)
    runs_there = read_table(path)[1] if arguments.append else []
    check_writable(path, arguments.ledger)
    where = learning_rates(arguments)
    from looptransfer.targets import load_experiment  # noqa: PLC0415
    from looptransfer.trials.sweep import sweep  # noqa: PLC0415
    from looptransfer.trials.trial import Run  # noqa: PLC0415

    home, ledger = Path.cwd(), _absolute(arguments.ledger)  # the user's file may change the working directory
    experiment = load_experiment(arguments.experiment)
    if "around" in where:
        where["around"] = centre_of(where["around"], experiment.identity(), home)
    missing: FailedRunError | None = None
    try:
        results = sweep(
            experiment,
            loops,
            rules=[rule.strip() for rule in arguments.rules.split(",")],
            seeds=seeds,
            ledger=ledger,
            workers=arguments.workers,
            known=[Run(*run) for run in runs_there],
            limit=arguments.time_limit,
            target=arguments.experiment,
            **where,
        )
    except FailedRunError as error:
        if error.finished is None or error.finished.empty:
            raise
        results, missing = error.finished, error
    with locked(home / path):
        if arguments.output:
            check_new(home / path)  # another sweep may have written it meanwhile
        text = grown(home / path, results) if arguments.append else results.to_csv(index=False)
        write_file(home / path, text)
    if missing is not None:
        raise InputError(f"{missing}. The {len(results)} others are in {path}; --append {path} adds what lacks")
    if len(results) and results["diverged"].all():
        raise InputError(
            f"all {len(results)} runs, now in {path}, diverged, so there is nothing to judge; lower the LRs"
        )
    table = plain_lines(f"{loss_table(text)}\nruns written to {path}: {len(results)}")
    return f"{table}\n{_next('check', path)}", 0


def _work(arguments: argparse.Namespace) -> Answer:
    from looptransfer.targets import load_experiment  # noqa: PLC0415
    from looptransfer.trials.sweep import join, target_of  # noqa: PLC0415

    storage = _absolute(arguments.storage)  # the user's file may change the working directory
    target = arguments.experiment or target_of(storage, arguments.study)
    finished = join(load_experiment(target), storage, arguments.study, arguments.workers, arguments.time_limit)
    return f"{arguments.study}: {finished} runs are finished, and none is left to make", 0


def _check(arguments: argparse.Namespace) -> Answer:
    from looptransfer.transfer.check import check  # noqa: PLC0415
    from looptransfer.transfer.sources import read_results  # noqa: PLC0415

    reads = {"the table": re.sub(r"^sqlite[^:]*:///", "", arguments.source.partition("#")[0])}
    writes = {"--html": arguments.html, "--todo": arguments.todo}
    (writes if arguments.update_baseline else reads)["--baseline"] = arguments.baseline
    _keep_apart(reads, writes)
    columns, where, diverged = columns_of(arguments.columns), arguments.where, arguments.diverged
    verdict = check(
        read_results(arguments.source, columns, arguments.axis, where, diverged),
        rule=arguments.rule,
        transferred_lr=arguments.lr,
        tolerance=arguments.tolerance,
        regret_tolerance=arguments.regret,
        confidence=arguments.confidence,
        axis=arguments.axis,
        maximize=arguments.maximize,
        unit=arguments.unit,
    )
    told = _against_baseline(arguments, verdict)
    if arguments.html:
        from looptransfer.report.page import write_html  # noqa: PLC0415
        from looptransfer.transfer.baseline import fingerprint_of  # noqa: PLC0415

        made = {
            "command": shlex.join(["looptransfer", *map(without_password, sys.argv[1:])]),
            "source": without_password(arguments.source),
            **{name: version(name) for name in ("looptransfer", "numpy", "scipy", "pandas")},
            **fingerprint_of(verdict.runs, verdict.axis),
        }
        write_html(verdict, arguments.html, provenance=made)
    if arguments.todo:
        write_file(arguments.todo, verdict.rows_to_run().to_csv(index=False))
    statuses = {verdict.exit_status} | (set() if told is None else {told.exit_status})
    status = 1 if 1 in statuses else max(statuses)
    if arguments.json:
        extra = {} if told is None else {"baseline": told.to_dict()}
        return json.dumps(verdict.to_dict() | extra, indent=2, allow_nan=False), status
    return "\n".join(one.to_markdown() if arguments.markdown else str(one) for one in (verdict, told) if one), status


def _keep_apart(reads: Mapping[str, str | Path | None], writes: Mapping[str, Path | None]) -> None:
    """Refuse to write over what is read, or twice to one place."""
    places = [(option, path) for option, path in writes.items() if path is not None]
    for number, (option, path) in enumerate(places):
        for name, other in [*reads.items(), *places[:number]]:
            if other is not None and same_file(path, other):
                raise InputError(f"{option} {path} would overwrite {name}; choose another file")


def _against_baseline(arguments: argparse.Namespace, verdict: "Verdict") -> "Comparison | None":
    if arguments.baseline is None:
        if arguments.update_baseline:
            raise InputError(f"--update-baseline needs to know which; add --baseline {OPTIMA}")
        return None
    from looptransfer.transfer.baseline import baseline_of, read_baseline  # noqa: PLC0415
    from looptransfer.transfer.comparison import compare  # noqa: PLC0415

    if arguments.update_baseline:
        baseline_of(verdict, arguments.baseline).write(arguments.baseline)
        print(plain_lines(f"optima written to {arguments.baseline}"), file=sys.stderr)
        return None
    return compare(verdict, read_baseline(arguments.baseline), arguments.moved)


def _gate(arguments: argparse.Namespace) -> Answer:
    loops = None if arguments.loops is None else listed("--loops", arguments.loops, int, "2,16")
    from looptransfer.targets import load_experiment  # noqa: PLC0415
    from looptransfer.transfer.baseline import read_baseline  # noqa: PLC0415
    from looptransfer.trials.gate import gate  # noqa: PLC0415

    stored = read_baseline(arguments.baseline)
    experiment = load_experiment(arguments.experiment)
    told = gate(experiment, stored, loops, arguments.seeds, arguments.rule, workers=arguments.workers)
    if arguments.json:
        return json.dumps(told.to_dict(), indent=2, allow_nan=False), told.exit_status
    return told.to_markdown() if arguments.markdown else str(told), told.exit_status


def _absolute(ledger: str) -> str:
    return ledger if "://" in ledger else str(Path(ledger).absolute())


def _next(*arguments: object) -> str:
    return plain_lines("next: " + shlex.join(["looptransfer", *(without_password(str(word)) for word in arguments)]))
