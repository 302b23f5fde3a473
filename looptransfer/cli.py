"""The command line. Commands import what they need when they run, so that help and `check` load no torch."""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from looptransfer.errors import InputError

USAGE, UNEXPECTED, INTERRUPTED = 2, 70, 130
STATUS = "exit status: 0 flat, 1 drifts, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"
START = """\
start here:   looptransfer demo --quick
your model:   looptransfer inspect my_project.model:make
your results: looptransfer check results.csv"""
ABOUT = "Tune the LR of a looped Transformer at small N, carry it to large N, and check that it holds."
DEMO = """\
Tunes the LR of a small looped decoder at N = 2, sweeps around it at N = 1…16 under the
paper's rule and two controls, and writes report.html, results.csv and verdict.json.
About 15 minutes on two cores. Stopped at any moment, the same command goes on where it was."""
INSPECT = """\
Prints the plan of a model: every residual branch with its layer, its visits, its multiplier and
the line where it is added, and what is left alone. Changes nothing.

  looptransfer inspect looptransfer:LoopedDecoder --inputs long:2x16
  looptransfer inspect my_project.model:make --inputs input_ids=long:2x16 loops=8

FACTORY takes no arguments and returns a model, or a model and example inputs. Where the trace
cannot tell the branches, the message says what settles it, often --branches 'layers.*.mlp'."""
CHECK = """\
Says FLAT, DRIFTS or INCONCLUSIVE for the LR optimum over N, and why. Trains nothing.

The CSV has one row per training run, with columns
  loops     N, a whole number from 1
  lr        absolute learning rate
  loss      final loss in nats; inf or nan where the run diverged
  seed      optional; runs of one seed are compared with each other, and one seed settles nothing
  rule      optional; the other rules serve as controls
  diverged  optional; true or false"""

COORDCHECK = """\
Trains a few steps at every loop count, watches what reaches the residual stream at every visit of
every branch, and says whether it grows with N as the rule promises, and if not, why.

  looptransfer coordcheck experiment.py --loops 1,2,4,8,16,32,64 --html coordinates.html

EXPERIMENT is path/to/file.py:NAME or package.module:NAME (NAME is `experiment` where left out): a
looptransfer.Experiment, or a function of no arguments that returns one."""
CHECKED = "exit status: 0 passes, 1 fails, 2 bad usage or input, 3 inconclusive, 70 anything unexpected"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except InputError as error:
        print(f"looptransfer: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("looptransfer: interrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print("looptransfer: this is unexpected; please report it with the lines above", file=sys.stderr)
        return UNEXPECTED


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="looptransfer", description=ABOUT, epilog=START, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"looptransfer {version('looptransfer')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    story = "the whole story on the embedded model and text"
    _add_demo(commands.add_parser("demo", help=story, description=DEMO, formatter_class=raw))
    look = "show what would be rewritten in a model"
    _add_inspect(commands.add_parser("inspect", help=look, description=INSPECT, formatter_class=raw))
    watch = "watch the residual stream over N in a few short trainings"
    _add_coordcheck(
        commands.add_parser("coordcheck", help=watch, description=COORDCHECK, epilog=CHECKED, formatter_class=raw)
    )
    judge = "judge a table of results; trains nothing"
    _add_check(commands.add_parser("check", help=judge, description=CHECK, epilog=STATUS, formatter_class=raw))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="smaller, within three minutes; may end inconclusive")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="first seed, from 0 up (default: 0)")
    parser.add_argument("--text", metavar="FILE_OR_DIR", help="your own text (default: Python's standard library)")
    parser.set_defaults(run=_demo)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="PACKAGE.MODULE:FACTORY", help="what makes the model")
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
    parser.set_defaults(run=_inspect)


def _add_coordcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="what is trained: file.py, file.py:NAME, module:NAME")
    parser.add_argument("--loops", default="1,2,4,8,16,32,64", metavar="N,N,…", help="loop counts (default: 1 to 64)")
    rules = "factored, sqrt, unscaled, 'as made'; the first is judged (default: factored, or as made if rewritten)"
    parser.add_argument("--rules", metavar="RULE,…", help=rules)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="how many, two at least (default: 3)")
    parser.add_argument("--lr", type=float, default=1e-3, help="base LR (default: 0.001)")
    parser.add_argument("--tolerance", type=float, default=0.15, help="of an exponent (default: 0.15)")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON on standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the frame as CSV as well")
    parser.set_defaults(run=_coordcheck)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="RESULTS.csv", help="the table")
    parser.add_argument("--rule", help="the rule to judge (default: factored, or the only one there)")
    parser.add_argument(
        "--lr", type=float, help="the transferred LR, absolute (default: the optimum at the smallest N)"
    )
    parser.add_argument("--tolerance", type=float, default=0.20, help="octaves per doubling of N (default: 0.20)")
    parser.add_argument("--regret", type=float, default=0.02, help="tolerated regret in nats (default: 0.02)")
    parser.add_argument("--confidence", type=float, default=0.90, help="of the intervals (default: 0.90)")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON on standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.set_defaults(run=_check)


def _demo(arguments: argparse.Namespace) -> int:
    from looptransfer.demo import run_demo  # noqa: PLC0415

    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; it must be 0 or more")
    print("\n".join(run_demo(arguments.out, arguments.quick, arguments.seed, arguments.text)))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from looptransfer.inspection import inspect_model  # noqa: PLC0415

    plan = inspect_model(
        arguments.target,
        arguments.inputs,
        rule=arguments.rule,
        base_layers=arguments.base_layers,
        branches=arguments.branches,
        layers=arguments.layers,
    )
    print(plan.to_json() if arguments.json else plan)
    return 0


def _coordcheck(arguments: argparse.Namespace) -> int:
    try:
        loops = [int(part) for part in arguments.loops.split(",")]
    except ValueError:
        raise InputError(f"--loops is {arguments.loops!r}; write whole numbers such as 1,2,4,8") from None
    from looptransfer.coordcheck.recommend import recommend  # noqa: PLC0415
    from looptransfer.coordcheck.run import coord_check  # noqa: PLC0415
    from looptransfer.targets import load_experiment  # noqa: PLC0415

    started = time.perf_counter()
    result = coord_check(
        load_experiment(arguments.experiment),
        loops=loops,
        rules=arguments.rules and [rule.strip() for rule in arguments.rules.split(",")],
        steps=arguments.steps,
        seeds=arguments.seeds,
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
    try:
        if arguments.html:
            from looptransfer.report.coordinates import write_coord_html  # noqa: PLC0415

            write_coord_html(result, arguments.html, provenance=made)
        if arguments.output:
            result.frame.to_csv(arguments.output, index=False)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; choose another file") from None
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        print(result)
        if result.context.looped and max(loops) >= 4 * min(loops):
            print(f"multiplier that this model needs: {recommend(result)}")
    return result.exit_status


def _check(arguments: argparse.Namespace) -> int:
    from looptransfer.transfer.results import read_results  # noqa: PLC0415
    from looptransfer.transfer.verdict import check  # noqa: PLC0415

    if arguments.html and arguments.html.resolve() == arguments.results.resolve():
        raise InputError(f"--html {arguments.html} would overwrite the table; choose another file")
    verdict = check(
        read_results(arguments.results),
        rule=arguments.rule,
        transferred_lr=arguments.lr,
        tolerance=arguments.tolerance,
        regret_tolerance=arguments.regret,
        confidence=arguments.confidence,
    )
    if arguments.html:
        from looptransfer.report.page import write_html  # noqa: PLC0415

        try:
            write_html(verdict, arguments.html, provenance={"results": arguments.results})
        except OSError as error:
            raise InputError(f"cannot write {arguments.html}: {error.strerror}; choose another file") from None
    print(json.dumps(verdict.to_dict(), indent=2, allow_nan=False) if arguments.json else verdict)
    return verdict.exit_status
