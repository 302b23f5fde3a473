"""The options of every command, and the words of a command line read as values."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from looptransfer.errors import InputError
from looptransfer.text import plain_lines

if TYPE_CHECKING:
    from looptransfer.trials.run import Trainable

LEDGER, OPTIMA, RULE = "looptransfer.db", "lr-optima.json", "factored"
MOST_SEEDS = 1000
T = TypeVar("T")

STATUS = "exit status: 0 {}, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"
START = """\
start here:   looptransfer demo --quick
your model:   looptransfer inspect my_project.model:make
your LR:      looptransfer tune experiment.py --loops 2 -o best.json
your results: looptransfer check results.csv"""
ABOUT = "Tune the LR of a looped Transformer at small N, carry it to large N, and check that it holds."
DEMO = """\
Tunes the LR of a small looped decoder at N = 2, sweeps around it at N = 1, 4 and 16 under the
paper's rule and at N = 16 under controls, watches the residual stream over N, and writes
report.html, coordinates.html, results.csv and verdict.json.
16 min 26 s, measured on two cores; 2 min 37 s with --quick, which may leave the verdict open.
Stopped at any moment, the same command goes on where it was."""
INSPECT = """\
Prints the plan of a model: every residual branch with its layer, its visits, its multiplier and
the line where it is added, and what is left alone. Changes nothing.

  looptransfer inspect looptransfer:LoopedDecoder --inputs long:2x16
  looptransfer inspect my_project.model:make --inputs input_ids=long:2x16 loops=8

FACTORY takes no arguments and returns a model, or a model and example inputs. Where the trace
cannot tell the branches, the message says what settles it, often --branches 'layers.*.mlp'."""
EXPLAIN = """\
Prints what every tensor of a model gets from its optimizer: its role, each factor on the LR (loops,
layers, width), the effective LR, eps and weight decay, and the rule with its source.

  looptransfer explain looptransfer:LoopedDecoder --inputs long:2x16 --lr 3e-3
  looptransfer explain my_project.model:make --optimizer muon --lr 0.02 --adamw-lr 3e-3 --weight-decay 0.1

FACTORY is that of `looptransfer inspect`."""
CHECK = """\
Says FLAT, DRIFTS or INCONCLUSIVE for the LR optimum over N, and why. Trains nothing.

  looptransfer check results.csv
  looptransfer check wandb.csv --columns loops=n_loops loss=val_loss --where State=finished
  looptransfer check mlflow.csv --columns loss=val_loss --diverged status=FAILED,KILLED
  looptransfer check wandb_plot.csv --columns loss=val_loss --run-name 'n{loops}-lr{lr}-s{seed}'
  looptransfer check 'sqlite:///optuna.db#study' --axis width --markdown >> "$GITHUB_STEP_SUMMARY"
  zcat runs.csv.gz | looptransfer check -

SOURCE is a table in CSV, JSON or Parquet, a pipe or - for standard input, a ledger of tune and sweep, or the URL
of an Optuna study; it is only read. It has one row per training run, with columns (or the only ones that end so, such
as params.lr)
  loops     N, a whole number from 1 (or the column that --axis names)
  lr        absolute learning rate
  loss      final loss, in nats unless --unit says otherwise; inf or nan where the run diverged. An empty cell, or a
            column State or status that says crashed or running, is a run without a result: leave it out with --where,
            or count it as diverged with --diverged
  seed      optional; runs of one seed are compared with each other, and one seed settles nothing
  rule      optional; the other rules serve as controls
  diverged  optional; true or false
  step      optional; where there is a row for every step, the optimum at 50 and 75 % of the training is shown too
Plots (a column "RUN - METRIC" per run) and tables with columns run, tag, step and value have what names of runs say by
--run-name; where there is no column run, each of several files is a run."""

TRAINED = "exit status: 0 done, 2 bad usage or input, 70 anything unexpected, 130 interrupted"
EXPERIMENT = """\
EXPERIMENT is path/to/file.py:NAME or package.module:NAME (NAME is `experiment` where left out): a
looptransfer.Experiment, or a function of no arguments that returns one. Before any training its start
is made twice and compared: seeds must pair the runs, and loops follow N. What its code prints goes to
standard error; what fails in it ends with 2, and is told with its file and line."""
TRAINING = f"""\
{EXPERIMENT} NAME may also be a
training function of yours: train(run) returns the loss, or yields (step, loss) as it goes, where run
has loops, lr, seed, rule, device, and a directory of its own that outlives a kill.

--cmd trains by your own script in place of EXPERIMENT. Three lines in it rewrite its model:

  import looptransfer as lt
  lt.parametrize(model, example_batch, args.rule)         # once it is built; before compile and DDP
  optimizer = AdamW(lt.param_groups(model, AdamW, lr=args.lr))    # for model.parameters()

A loop that writes group["lr"] itself says lt.set_lr(optimizer, lr) instead, which keeps the groups' factors.

Its words hold {{loops}}, {{lr}} (absolute), {{seed}}, {{rule}}, {{dir}}, the run's own directory, and {{device}}; a
brace is written twice. {{dir}}/output.log keeps what it prints, and a script that finds its checkpoint in
{{dir}} goes on from there. A run whose loss is nan or inf has diverged. One that fails leaves the others
alone. --metric says where the loss is:

  '{{dir}}/log.jsonl:val_loss'     a key of JSON lines; the last line that has it counts
  '{{dir}}/log.csv:val_loss'       a column of a CSV
  'stdout:val loss (\\S+)'        a regular expression on its output, with a group round the loss
"""
KEPT = """\
Finished runs are kept in the ledger: stopped at any moment, the same command goes on where it was. A
run that fails leaves the others alone, and is tried again by the same command."""
TUNE = f"""\
Finds the LR to use for a proxy, your experiment with few loops, by the fewest runs that tell, about
eight: two LRs at first, edges followed, then runs where they tell most, until the LR that it
returns loses at most --regret to the best.

  looptransfer tune experiment.py --loops 2 -o best.json
  looptransfer tune --cmd 'torchrun train.py --lr {{lr}} --n {{loops}} --seed {{seed}} --rule {{rule}} --out {{dir}}' \\
      --metric '{{dir}}/log.jsonl:val_loss' --loops 2 -o best.json

{TRAINING}
{KEPT}"""
SWEEP = f"""\
Trains at every loop count, LR and seed around the LR that was tuned, and writes the table that
`looptransfer check` judges. Control rules show whether the sweep could have seen a drift.

  looptransfer sweep experiment.py --loops 1,2,4,8,16 --around best.json -o results.csv
  looptransfer sweep experiment.py --loops 1,4,16 --lrs 0.001,0.002,0.004 --seeds 4-7 --append results.csv

{TRAINING}
{KEPT}"""
GATE = f"""\
Says whether stored LR optima still hold: a check for every commit, at the smallest and the largest stored N.

First two of the stored runs of each are made again, of one seed at about half and once the stored LR. Where they give
the losses that they gave, but for float noise, the optimum holds. Elsewhere half, once and twice the stored LR are
trained with a few seeds, and the optimum should still lie between.

  looptransfer check results.csv --baseline {OPTIMA} --update-baseline
  looptransfer gate experiment.py --baseline {OPTIMA}

{TRAINING}
No run is kept: those of another state of the code would say nothing of this one."""

WORK = """\
Takes runs of a study that `tune` or `sweep` began with --ledger URL#STUDY, on this machine or any other, until none
is left. The study is never begun here, and one of another training is refused.

  looptransfer sweep experiment.py … --ledger postgresql://user@host/runs#widths -o results.csv
  looptransfer work --storage postgresql://user@host/runs widths

EXPERIMENT, or --cmd with its options, is what the study says where it is left out, as it would be named here.
URL is that of a database, best of PostgreSQL; journal:///path/to/file (Optuna's journal) where there is only a shared
disk; or a SQLite file, on one machine."""
COORDCHECK = f"""\
Trains a few steps at every loop count, watches what reaches the residual stream at every visit of
every branch, and says whether it grows with N as the rule promises, and if not, why.

  looptransfer coordcheck experiment.py --loops 1,2,4,8,16,32,64 --html coordinates.html

{EXPERIMENT}"""
CHECKED = "exit status: 0 passes, 1 fails, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"


def parser() -> argparse.ArgumentParser:
    """The parser of a command line; what it gives has the command's name as `command`."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="looptransfer", description=ABOUT, epilog=START, formatter_class=raw)
    whole.add_argument("--version", action="version", version=f"looptransfer {version('looptransfer')}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    shared = _shared()
    for name, (add_options, parents, summary, description, epilog) in COMMANDS.items():
        add_options(
            commands.add_parser(
                name,
                parents=[shared[parent] for parent in parents.split()],
                help=summary,
                description=description,
                epilog=epilog,
                formatter_class=raw,
            )
        )
    return whole


def _shared() -> dict[str, argparse.ArgumentParser]:
    """Options that several commands have."""
    names = ("experiment", "training", "rule", "kept", "form")
    parents = {name: argparse.ArgumentParser(add_help=False) for name in names}
    target = "what is trained: file.py, file.py:NAME, module:NAME"
    parents["experiment"].add_argument("experiment", metavar="EXPERIMENT", help=target)
    parents["training"].add_argument("experiment", nargs="?", metavar="EXPERIMENT", help=target)
    _training(parents["training"])
    rules = "factored, sqrt or unscaled; completep where the LR is to serve other L too (default: factored)"
    parents["rule"].add_argument("--rule", default=RULE, help=rules)
    parents["kept"].add_argument("--seeds", default="4", help="how many, or which: 4, 0-3 or 0,2,5 (default: 4)")
    ledger = f"finished runs: SQLite, journal:///FILE or a database's URL with #STUDY (default: {LEDGER})"
    parents["kept"].add_argument("--ledger", default=LEDGER, metavar="FILE", help=ledger)
    form = parents["form"].add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the answer as JSON on standard output")
    form.add_argument("--markdown", action="store_true", help="the answer as Markdown on standard output")
    return parents


def _training(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that train by an EXPERIMENT or by a command line."""
    parser.add_argument("--cmd", metavar="COMMAND", help="train by this command in place of EXPERIMENT")
    parser.add_argument("--metric", metavar="WHERE", help="where the command leaves its loss, in nats")
    version_help = "of what the command runs; another one is another experiment"
    parser.add_argument("--cmd-version", default="", metavar="TEXT", help=version_help)
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="a run, or an attempt of --cmd, that takes longer failed"
    )
    parser.add_argument("--retries", type=int, default=0, metavar="K", help="further attempts where the command fails")
    variables = "a variable of the command's environment; VALUE may hold placeholders"
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help=variables)
    processes = "runs at once, each in a process (default: one per GPU, or per core)"
    parser.add_argument("--workers", type=int, metavar="K", help=processes)
    gpus = (
        "GPUs, one worker each: 0,1,3; 0+1,2+3: two each; all: one worker has all; cpu (default: every GPU, else cpu)"
    )
    parser.add_argument("--devices", metavar="GPU,…", help=gpus)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="smaller, 100 steps, one control; may end inconclusive")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="first seed, from 0 up (default: 0)")
    parser.add_argument("--text", metavar="FILE_OR_DIR", help="your own text (default: Python's standard library)")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="FACTORY", help="package.module:factory or path/to/file.py:factory")
    parser.add_argument(
        "--inputs",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="example inputs: float:2x16x32, long:2x16, bool:2x16 or a number; NAME=… for a keyword argument",
    )
    parser.add_argument("--base-layers", type=int, default=1, help="L_ref, the depth you tuned at (default: 1)")
    parser.add_argument(
        "--lam", type=float, default=1.0, metavar="X", help="λ, the strength of all branches (default: 1)"
    )
    parser.add_argument("--loops", type=float, metavar="N", help="the mean of a loop count that is drawn at random")
    parser.add_argument("--branches", nargs="+", metavar="NAME", help="the branches' modules, by name or glob")
    parser.add_argument("--layers", type=int, help="L, where blocks are not what should be counted")
    parser.add_argument("--json", action="store_true", help="the answer as JSON on standard output")


def _explain(parser: argparse.ArgumentParser) -> None:
    _inspect(parser)
    parser.add_argument("--optimizer", default="adamw", help="adamw, adam, sgd or muon (default: adamw)")
    parser.add_argument("--lr", type=float, default=1e-3, help="base LR (default: 0.001)")
    parser.add_argument("--adamw-lr", type=float, metavar="LR", help="base LR of what Muon does not take")
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="base weight decay (default: 0)")


def _tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loops", type=int, required=True, metavar="N", help="loop count of the proxy")
    regret = "what the LR may lose to the best, as a share of the loss (default: 0.005)"
    parser.add_argument("--regret", type=float, default=0.005, metavar="SHARE", help=regret)
    precision = "go on until the optimum itself is known to so many octaves, as for a baseline"
    parser.add_argument("--precision", type=float, metavar="OCTAVES", help=precision)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write what was found as JSON, for sweep")


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loops", required=True, metavar="N,N,…", help="loop counts, such as 1,2,4,8,16")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--around", metavar="LR", help="centre of the LRs: a number, or the file that tune wrote")
    where.add_argument("--lrs", metavar="LR,LR,…", help="the LRs themselves")
    octaves = "LRs as log2 distances from the centre (default: -3,-2.25,-1.5,-0.75,0,0.75,1.5); write --octaves=-1,0,1"
    parser.add_argument("--octaves", metavar="X,X,…", help=octaves)
    rules = "factored, completep, sqrt, unscaled; all but the one judged are controls (default: factored)"
    parser.add_argument("--rules", default=RULE, metavar="RULE,…", help=rules)
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table as CSV into a new file")
    table.add_argument("--append", type=Path, metavar="FILE", help="make what this table lacks and add it there")


def _work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="its name in the storage")
    parser.add_argument("--storage", required=True, metavar="URL", help="where the study is kept")


def _coordcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loops", default="1,2,4,8,16,32,64", metavar="N,N,…", help="loop counts (default: 1 to 64)")
    rules = "factored, completep, sqrt, unscaled, 'as made'; the first is judged (default: factored, or as made)"
    parser.add_argument("--rules", metavar="RULE,…", help=rules)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--seeds", default="3", help="how many, or which: 3, 0-2 or 0,2,5 (default: 3)")
    parser.add_argument("--lr", type=float, default=1e-3, help="base LR (default: 0.001)")
    parser.add_argument("--tolerance", type=float, default=0.15, help="of an exponent (default: 0.15)")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON on standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the frame as CSV as well")


def _check(parser: argparse.ArgumentParser) -> None:
    places = "table, ledger or study, such as results.csv; - is stdin; several files are one table"
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=places)
    called = "what a column is called in SOURCE, such as lr=config.lr"
    parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="NAME=THERE", help=called)
    kept = "judge only rows such as State=finished or loss!= (not empty); VALUE,VALUE is either"
    parser.add_argument("--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help=kept)
    names = "how runs are called, such as 'n{loops}-lr{lr}-s{seed}', where no columns say it"
    parser.add_argument("--run-name", default="", metavar="PATTERN", help=names)
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
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.add_argument("--title", default="", help="the heading of that page (default: the question it answers)")
    todo = "write the runs that would settle the verdict as CSV, a row per run"
    parser.add_argument("--todo", type=Path, metavar="FILE", help=todo)
    stored = "compare the optima with these: exit status 1 where one moved or its loss got worse"
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=f"{stored} (such as lr-optima.json)")
    parser.add_argument("--update-baseline", action="store_true", help="write the optima into --baseline instead")
    moved = "octaves that an optimum may be away from the stored one (default: 0.5)"
    parser.add_argument("--moved", type=float, default=0.5, metavar="OCTAVES", help=moved)


def _gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=Path, default=Path(OPTIMA), metavar="FILE", help=f"(default: {OPTIMA})")
    parser.add_argument(
        "--loops", metavar="N,N,…", help="which of the stored N (default: the smallest and the largest)"
    )
    parser.add_argument("--seeds", type=int, default=6, help="how many, where a loss differs (default: 6)")


COMMANDS: Mapping[str, tuple[Callable[[argparse.ArgumentParser], None], str, str, str, str]] = {
    "demo": (_demo, "", "the whole story on the embedded model and text", DEMO, ""),
    "inspect": (_inspect, "rule", "show what would be rewritten in a model", INSPECT, ""),
    "tune": (_tune, "training kept rule", "find the best LR of a proxy", TUNE, TRAINED),
    "explain": (_explain, "rule", "show what every tensor gets from its optimizer, and why", EXPLAIN, ""),
    "sweep": (
        _sweep, "training kept", "train over loop counts and LRs, for a table of results", SWEEP, TRAINED
    ),
    "work": (_work, "training", "one more machine for a sweep that is under way", WORK, TRAINED),
    "coordcheck": (
        _coordcheck, "experiment", "watch the residual stream over N in a few short trainings", COORDCHECK,
        STATUS.format("passes, 1 fails"),
    ),
    "check": (
        _check, "form", "judge a table of results; trains nothing", CHECK, STATUS.format("flat, 1 drifts or moved")
    ),
    "gate": (
        _gate, "training rule form", "train a little, and see whether stored optima still hold", GATE,
        STATUS.format("holds, 1 moved or worse"),
    ),
}  # fmt: skip


# -- words as values


def columns_of(texts: Sequence[str]) -> dict[str, str]:
    """{"lr": "config.lr"} from "lr=config.lr"; what is no pair, or there twice, is refused."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, source) in zip(texts, pairs, strict=True) if not name or not source]
    if wrong:
        raise InputError(f"--columns {wrong[0]!r}; write NAME=THERE, such as lr=config.lr")
    names = [name for name, _, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--columns names {twice[0]!r} twice; give each once")
    return {name: source for name, _, source in pairs}


def numbers_of(option: str, text: str, number: Callable[[str], T], example: str) -> list[T]:
    """Numbers separated by commas; anything else is refused."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if number is int else "numbers"
        raise InputError(f"{option} is {text!r}; write {kind} separated by commas, such as {example}") from None


def seeds_of(text: str) -> int | list[int]:
    """A count from "4"; seeds from "0-3" or "0,2,5"; anything else is refused."""
    spans = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part) for part in text.split(",")]
    ends = [(int(span[1]), int(span[2] or span[1])) for span in spans if span]
    alone = text.isdecimal()
    count = int(text) if alone else sum(high - low + 1 for low, high in ends)
    if len(ends) < len(spans) or any(high < low for low, high in ends) or count > MOST_SEEDS:
        fix = f"write how many, up to {MOST_SEEDS}, or which ones: 4, 0-3, 0,2,5 or 7-7"
        raise InputError(f"--seeds is {text!r}; {fix}")
    return count if alone else [seed for low, high in ends for seed in range(low, high + 1)]


def trainable_of(arguments: argparse.Namespace) -> "Trainable":
    """The training that EXPERIMENT names, or --cmd with its options.

    Raises:
        InputError: neither or both are given, or one is wrong.
    """
    if (arguments.experiment is None) == (arguments.cmd is None):
        raise InputError("give either EXPERIMENT, such as experiment.py, or --cmd with --metric")
    if arguments.cmd is None:
        options = {"--metric": arguments.metric, "--cmd-version": arguments.cmd_version, "--env": arguments.env}
        options |= {"--retries": arguments.retries}
        for option in [option for option, value in options.items() if value]:
            raise InputError(f"{option} is for --cmd; an EXPERIMENT has no use for it")
        from looptransfer.command.targets import load_trainable  # noqa: PLC0415

        return load_trainable(arguments.experiment)
    if arguments.metric is None:
        raise InputError("--cmd needs --metric, where the loss is, such as '{dir}/log.jsonl:val_loss'")
    from looptransfer.trials.command import Command  # noqa: PLC0415

    return Command(
        arguments.cmd,
        arguments.metric,
        arguments.cmd_version,
        arguments.time_limit,
        arguments.retries,
        _variables(arguments.env),
    )


def limit_of(arguments: argparse.Namespace) -> float | None:
    """The time limit of a run's process; a command has its own, of each attempt."""
    return arguments.time_limit if arguments.cmd is None else None


def training_of(text: str) -> argparse.Namespace:
    """The arguments whose `training_words` joined in a shell's way are the text."""
    return _shared()["training"].parse_args(shlex.split(text))


def training_words(arguments: argparse.Namespace) -> list[str]:
    """The words by which another command trains the same."""
    limit = ["--time-limit", f"{arguments.time_limit}"] if arguments.time_limit else []
    if arguments.cmd is None:
        return [arguments.experiment, *limit]
    words = ["--cmd", arguments.cmd, "--metric", arguments.metric]
    options = {"--cmd-version": arguments.cmd_version, "--retries": arguments.retries}
    words += [word for option, value in options.items() if value for word in (option, f"{value}")] + limit
    return words + [word for variable in arguments.env for word in ("--env", variable)]


def _variables(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, sign, _) in zip(texts, pairs, strict=True) if not name or not sign]
    if wrong:
        raise InputError(f"--env {wrong[0]!r}; write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def learning_rates(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `sweep` that say which LRs, `around` still as text; --octaves beside --lrs are refused."""
    if arguments.lrs is not None:
        if arguments.octaves is not None:
            raise InputError("--octaves are distances from --around; with --lrs give the LRs alone")
        return {"lrs": numbers_of("--lrs", arguments.lrs, float, "0.001,0.002,0.004")}
    if arguments.octaves is None:
        return {"around": arguments.around}
    octaves = numbers_of("--octaves", arguments.octaves, float, "--octaves=-1,0,1")
    return {"around": arguments.around, "octaves": octaves}


def centre_of(text: str, identity: Mapping[str, Any], rules: Sequence[str], home: Path) -> float:
    """The LR of --around. A file of another experiment or rule earns a warning: tuning on one and sweeping another is a
    use."""
    from looptransfer.trials.sweep import read_tuned  # noqa: PLC0415

    try:
        return float(text)
    except ValueError:
        tuned = read_tuned(home / text)
    tuned_on, trained = tuned["experiment"], json.loads(json.dumps(identity))
    keys = sorted(key for key in tuned_on.keys() | trained.keys() if tuned_on.get(key) != trained.get(key))
    changes = ", ".join(f"{key}: {tuned_on.get(key)!r} there, {trained.get(key)!r} here" for key in keys)
    remarks = [f"on another experiment ({changes})"] if keys else []
    rule = tuned.get("rule", rules[0])
    remarks += [f"under the rule {rule}, which is none of --rules {','.join(rules)}"] if rule not in rules else []
    for remark in remarks:
        print(plain_lines(f"looptransfer: warning: {text} was tuned {remark}"), file=sys.stderr)
    return float(tuned["lr"])
