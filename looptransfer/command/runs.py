"""The run of every command. What it needs is imported when it runs: `check` loads no torch, and help loads nothing."""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import looptransfer as lt
from looptransfer.command.options import (
    LEDGER,
    OPTIMA,
    RULE,
    centre_of,
    columns_of,
    learning_rates,
    limit_of,
    numbers_of,
    seeds_of,
    trainable_of,
    training_of,
    training_words,
)
from looptransfer.errors import FailedRunError, InputError
from looptransfer.files import check_new, check_writable, locked, same_file, write_file
from looptransfer.text import plain_lines, without_password

if TYPE_CHECKING:
    from looptransfer.transfer.comparison import Comparison

Answer = tuple[str, int]  # what a command prints on standard output, and its exit status


def _demo(arguments: argparse.Namespace) -> Answer:
    from looptransfer.command.demo import run_demo

    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; it must be 0 or more")
    return "\n".join(run_demo(arguments.out, arguments.quick, arguments.seed, arguments.text)), 0


def _inspect(arguments: argparse.Namespace) -> Answer:
    from looptransfer.command.inspection import rewritten

    _, plan = rewritten(arguments.target, arguments.inputs, **_settings(arguments))
    return plan.to_json() if arguments.json else str(plan), 0


def _explain(arguments: argparse.Namespace) -> Answer:
    from looptransfer.command.inspection import rewritten

    model, _ = rewritten(arguments.target, arguments.inputs, **_settings(arguments))
    lrs = {"lr": arguments.lr, "adamw_lr": arguments.adamw_lr}
    groups = lt.param_groups(model, arguments.optimizer, **lrs, weight_decay=arguments.weight_decay)
    explanation = lt.explain(model, groups)
    return _json([asdict(row) for row in explanation.rows]) if arguments.json else str(explanation), 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `parametrize`."""
    names = ("rule", "lam", "base_layers", "branches", "layers", "loops")
    return {name: getattr(arguments, name) for name in names}


def _coordcheck(arguments: argparse.Namespace) -> Answer:
    loops, seeds = numbers_of("--loops", arguments.loops, int, "1,2,4,8"), seeds_of(arguments.seeds)
    source = arguments.experiment.partition(".py")[0] + ".py"
    _keep_apart({"the experiment": source}, {"--html": arguments.html, "--output": arguments.output})
    home = Path.cwd()  # the user's file may change it
    for path in filter(None, (arguments.html, arguments.output)):
        write_file(path, None)  # before the training
    from looptransfer.command.targets import load_experiment
    from looptransfer.trials.hooks import one_thread

    started = time.perf_counter()
    with one_thread():
        result = lt.coord_check(
            load_experiment(arguments.experiment),
            loops=loops,
            rules=arguments.rules and [rule.strip() for rule in arguments.rules.split(",")],
            steps=arguments.steps,
            seeds=seeds,
            lr=arguments.lr,
            tolerance=arguments.tolerance,
        )
    if arguments.html:
        from looptransfer.transfer.provenance import page_origin

        provenance = {
            **page_origin("torch"),
            "experiment": arguments.experiment,
            "steps": arguments.steps,
            "seeds": arguments.seeds,
            "LR": arguments.lr,
            "seconds": f"{time.perf_counter() - started:.0f}",
        }
        lt.write_html(result, home / arguments.html, provenance=provenance)
    if arguments.output:
        write_file(home / arguments.output, result.frame.to_csv(index=False))
    if arguments.json:
        return _json(result.to_dict()), result.exit_status
    lines = [str(result)]
    if result.context.looped and max(loops) >= 4 * min(loops):
        try:
            lines.append(f"multiplier that this model needs: {result.recommend()}")
        except InputError as error:  # the verdict stands
            lines.append(f"multiplier that this model needs: not known, {error}")
    return "\n".join(lines), result.exit_status


def _tune(arguments: argparse.Namespace) -> Answer:
    seeds = seeds_of(arguments.seeds)
    if arguments.output:
        check_new(arguments.output)
        check_writable(arguments.output, arguments.ledger)
    home, ledger = Path.cwd(), _absolute(arguments.ledger)  # the user's file may change the working directory
    train = trainable_of(arguments)
    terms = {"regret": arguments.regret, "precision": arguments.precision}
    best = lt.tune(train, arguments.loops, seeds, ledger, rule=arguments.rule, **terms, **_places(arguments))
    if arguments.output:
        write_file(home / arguments.output, json.dumps(best.to_dict(), indent=2) + "\n")
    around = arguments.output or f"{best.lr:.6g}"
    follow = ["sweep", *training_words(arguments), "--loops", "1,2,4,8,16", "--around", around, "-o", "results.csv"]
    follow += ["--rules", arguments.rule] if arguments.rule != RULE else []
    follow += ["--ledger", arguments.ledger] if arguments.ledger != LEDGER else []
    return f"{best}\n{_next(*follow)}", 0


def _sweep(arguments: argparse.Namespace) -> Answer:
    loops, seeds = numbers_of("--loops", arguments.loops, int, "1,2,4,8,16"), seeds_of(arguments.seeds)
    path = arguments.append or arguments.output
    from looptransfer.trials.table import grown, loss_table, read_table

    if arguments.output:
        check_new(path)
    present = read_table(path)[1] if arguments.append else []
    check_writable(path, arguments.ledger)
    lrs = learning_rates(arguments)
    from looptransfer.trials.run import Run

    home, ledger = Path.cwd(), _absolute(arguments.ledger)  # the user's file may change the working directory
    train, rules = trainable_of(arguments), [rule.strip() for rule in arguments.rules.split(",")]
    if "around" in lrs:
        lrs["around"] = centre_of(lrs["around"], train.identity(), rules, home)
    failure: FailedRunError | None = None
    try:
        results = lt.sweep(
            train,
            loops,
            rules=rules,
            seeds=seeds,
            ledger=ledger,
            known=[Run(*run) for run in present],
            **_places(arguments),
            **lrs,
        )
    except FailedRunError as error:
        if error.finished is None or error.finished.empty:
            raise
        results, failure = error.finished, error
    with locked(home / path):
        if arguments.output:
            check_new(home / path)  # another sweep may have written it meanwhile
        text = grown(home / path, results) if arguments.append else results.to_csv(index=False)
        write_file(home / path, text)
    if failure is not None:
        raise InputError(f"{failure}. The {len(results)} others are in {path}; --append {path} adds what lacks")
    if len(results) and results["diverged"].all():
        raise InputError(
            f"all {len(results)} runs, now in {path}, diverged, so there is nothing to judge; lower the LRs"
        )
    table = plain_lines(f"{loss_table(text)}\nruns written to {path}: {len(results)}")
    judged = ["--rule", rules[0]] if rules[0] != RULE else []
    carried = ["--lr", f"{lrs['around']:.6g}"] if "around" in lrs else []
    return f"{table}\n{_next('check', path, *judged, *carried)}", 0


def _places(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `tune` and `sweep`: workers, their devices, the limit of a run, and the training's words."""
    return {
        "workers": arguments.workers,
        "devices": arguments.devices,
        "limit": limit_of(arguments),
        "target": shlex.join(training_words(arguments)),
    }


def _work(arguments: argparse.Namespace) -> Answer:
    from looptransfer.trials.sweep import join, target_of

    storage = _absolute(arguments.storage)  # the user's file may change the working directory
    training = arguments
    if arguments.experiment is None and arguments.cmd is None:
        target = target_of(storage, arguments.study)
        print(plain_lines(f"looptransfer: training {target}"), file=sys.stderr)
        training = training_of(target)
        training.time_limit = arguments.time_limit or training.time_limit
    train = trainable_of(training)
    finished = join(train, storage, arguments.study, arguments.workers, arguments.devices, limit_of(training))
    return f"{arguments.study}: {finished} runs are finished, and none is left to make", 0


def _check(arguments: argparse.Namespace) -> Answer:
    places = [re.sub(r"^sqlite[^:]*:///", "", source.partition("#")[0]) for source in arguments.source]
    reads = {f"the table {place}": place for place in places}
    writes = {"--html": arguments.html, "--todo": arguments.todo}
    (writes if arguments.update_baseline else reads)["--baseline"] = arguments.baseline
    _keep_apart(reads, writes)
    columns = columns_of(arguments.columns)
    verdict = lt.check(
        lt.read_results(
            arguments.source, columns, arguments.axis, arguments.where, arguments.diverged, arguments.run_name
        ),
        rule=arguments.rule,
        transferred_lr=arguments.lr,
        tolerance=arguments.tolerance,
        regret_tolerance=arguments.regret,
        confidence=arguments.confidence,
        axis=arguments.axis,
        maximize=arguments.maximize,
        unit=arguments.unit,
    )
    comparison = _against_baseline(arguments, verdict)
    if arguments.html:
        from looptransfer.transfer.provenance import fingerprint_of, page_origin

        source = without_password(", ".join(arguments.source))
        origin = {"source": source} | fingerprint_of(verdict.runs, verdict.axis)
        known = {name: value for name, value in origin.items() if value is not None}
        provenance = page_origin("numpy", "scipy", "pandas") | known
        lt.write_html(verdict, arguments.html, title=arguments.title, provenance=provenance)
    if arguments.todo:
        further = verdict.rows_to_run()
        write_file(arguments.todo, further.to_csv(index=False))
        if further.empty:
            print(f"looptransfer: {arguments.todo} has no row: no further runs are advised", file=sys.stderr)
    results = [result for result in (verdict, comparison) if result is not None]
    statuses = [result.exit_status for result in results]
    status = 1 if 1 in statuses else max(statuses)
    if arguments.json:
        return _json(verdict.to_dict() | ({} if comparison is None else {"baseline": comparison.to_dict()})), status
    return "\n".join(result.to_markdown() if arguments.markdown else str(result) for result in results), status


def _keep_apart(reads: Mapping[str, str | Path | None], writes: Mapping[str, Path | None]) -> None:
    """Refuse to write over what is read, or twice to one place."""
    places = [(option, path) for option, path in writes.items() if path is not None]
    for number, (option, path) in enumerate(places):
        for name, other in [*reads.items(), *places[:number]]:
            if other is not None and same_file(path, other):
                raise InputError(f"{option} {path} would overwrite {name}; choose another file")


def _against_baseline(arguments: argparse.Namespace, verdict: "lt.Verdict") -> "Comparison | None":
    if arguments.baseline is None:
        if arguments.update_baseline:
            raise InputError(f"--update-baseline needs to know which; add --baseline {OPTIMA}")
        return None
    if arguments.update_baseline:
        lt.Baseline.of(verdict, arguments.baseline).write()
        print(plain_lines(f"optima written to {arguments.baseline}"), file=sys.stderr)
        return None
    return lt.Baseline.read(arguments.baseline).compare(verdict, arguments.moved)


def _gate(arguments: argparse.Namespace) -> Answer:
    loops = None if arguments.loops is None else numbers_of("--loops", arguments.loops, int, "2,16")
    stored, train = lt.Baseline.read(arguments.baseline), trainable_of(arguments)
    places = {"workers": arguments.workers, "devices": arguments.devices, "limit": limit_of(arguments)}
    result = lt.gate(train, stored, loops, arguments.seeds, arguments.rule, **places)
    if arguments.json:
        return _json(result.to_dict()), result.exit_status
    return result.to_markdown() if arguments.markdown else str(result), result.exit_status


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, allow_nan=False)


def _absolute(ledger: str) -> str:
    return ledger if "://" in ledger else str(Path(ledger).absolute())


def _next(*arguments: object) -> str:
    return plain_lines("next: " + shlex.join(["looptransfer", *(without_password(str(word)) for word in arguments)]))


RUNS: Mapping[str, Callable[[argparse.Namespace], Answer]] = {
    "demo": _demo,
    "inspect": _inspect,
    "explain": _explain,
    "tune": _tune,
    "sweep": _sweep,
    "work": _work,
    "coordcheck": _coordcheck,
    "check": _check,
    "gate": _gate,
}
