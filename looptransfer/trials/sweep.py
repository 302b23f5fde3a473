"""The two things a user asks for: the best LR of a proxy, and a sweep around it over N."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from looptransfer.checks import check_count, check_number, counts_of, is_number, seeds_of
from looptransfer.errors import FailedRunError, InputError, explained_in
from looptransfer.rules import RULES, Rule, check_rule, depth_factors
from looptransfer.transfer.results import COLUMNS
from looptransfer.transfer.studies import asked, expanded
from looptransfer.trials.devices import Slot, here, slots
from looptransfer.trials.function import as_trainable
from looptransfer.trials.ledger import TARGET, Ledger, absolute, runs_directory
from looptransfer.trials.run import Run, Trainable
from looptransfer.trials.search import REGRET, START, Grid, ProxyOptimum, ProxySearch, Search, Several
from looptransfer.trials.workers import check_limit, run_search
from looptransfer.user_code import directory_kept

LEDGER = "looptransfer.db"
OCTAVES = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5)
SCHEMA = 2  # of a tuned LR as JSON
SAME_LR = 1e-6  # relative distance below which two LRs are one


@dataclass(frozen=True)
class TunedLR:
    """The base LR to use, by the runs of a proxy model.

    Attributes:
        optimum: that LR, its loss, the upper limit of its regret and the interval of the optimum.
        loops: N of the proxy.
        results: one row per run.
        asked: the regret that was asked for, as a share of the loss; None where a precision was.
        experiment: the identity of what was trained.
    """

    optimum: ProxyOptimum
    loops: int
    results: pd.DataFrame = field(repr=False, compare=False)
    rule: Rule = "factored"
    asked: float | None = REGRET
    experiment: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def lr(self) -> float:
        """The base LR, absolute."""
        return self.optimum.lr

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the optimum, and the seeds and the identity of the experiment it was found with."""
        return {
            "schema_version": SCHEMA,
            "loops": self.loops,
            "rule": self.rule,
            **asdict(self.optimum),
            "seeds": sorted(int(seed) for seed in self.results["seed"].unique()),
            "experiment": dict(self.experiment),
        }

    def __str__(self) -> str:
        low, high = (2**end for end in self.optimum.log2_lr)
        share = self.optimum.regret / (abs(self.optimum.loss) or 1.0)
        text = (
            f"best LR at N = {self.loops}: {self.lr:.4g} [{low:.4g}, {high:.4g}]; it loses at most {100 * share:.2g} % "
            f"of the loss to the best, by {len(self.results)} runs"
        )
        if self.asked is None or share <= self.asked:
            return text
        return f"{text}; {100 * self.asked:g} % was asked for: runs of equal LR differ too much, or every LR is as good"


@explained_in("training-script.md#tune-sweep-check")
def tune(
    train: Any,
    loops: int,
    seeds: int | Sequence[int] = 4,
    ledger: str | Path = LEDGER,
    workers: int | None = None,
    rule: Rule = "factored",
    devices: str | None = None,
    limit: float | None = None,
    target: str | None = None,
    regret: float = REGRET,
    precision: float | None = None,
) -> TunedLR:
    """Find the LR to use for the proxy with `loops` loops, by the fewest runs that tell: about eight.

    Two LRs at first, edges followed, then two runs a round where they tell most, until the LR that is returned loses
    little enough to the best, by the upper limit of its regret (reports/search/). 24 runs at most.

    Args:
        train: what is trained: a function, train(run) -> loss in nats, or one that yields (step, loss) as it goes,
            where `run` has loops, lr (absolute), seed, rule, device and a directory of its own; or an `Experiment`, or
            a `Command`.
        loops: N of the proxy; small is cheap, and under "factored" as good as large.
        seeds: how many, or which; paired across LRs. Two at least.
        ledger: where finished runs are kept, and calling again goes on: a SQLite file, or the URL of an Optuna storage
            with #STUDY behind it, which workers on other machines may join. The runs' directories are beside it.
        workers: how many runs are made at once, each in a process of its own; 1 trains in this process. Default one per
            GPU, or one per core where torch sees none.
        rule: the scaling rule.
        devices: GPUs, one worker each, such as "0,1,3"; "0+1,2+3" gives each of two workers two, "all" gives all to
            one, "cpu" none.
        limit: seconds that a run may take; one that takes longer counts as failed.
        target: what is trained as it is called on a command line, for workers that join.
        regret: what the LR may lose to the best, as a share of the loss.
        precision: octaves; to know the optimum itself, as for a baseline: half the width that its interval may have.

    Raises:
        InputError: as `Trainable.check`, `Ledger` and `run_search`, or numbers out of range.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    check_count("loops", loops)
    chosen = seeds_of(seeds)
    check_number("regret", regret)
    if precision is not None:
        check_number("precision", precision)
    check_rule(rule)
    check_limit(limit)
    trainable = as_trainable(train)
    lr = 2.0 ** START[0]
    starts = [Run(rule, loops, lr, seed) for seed in chosen]
    places = slots(devices, workers)
    study, begun = open_ledger(trainable, starts, ledger, places[0], target)
    stored = _stored_rule(begun.get(loops), rule)
    request = {"kind": "tune", "loops": loops, "seeds": chosen, "rule": stored}
    request |= {"regret": regret, "precision": precision}
    search = _proxy_search(request)
    study.ask(request)
    run_search(trainable, search, study, places, limit, f"tune at N = {loops}", alone=workers is None)
    losses = {run: study.losses[run] for run in search.wanted(study.losses)}
    rows = [{**study.finished[run], "rule": rule} for run in losses]
    results = pd.DataFrame(rows, columns=[*COLUMNS, "last_loss"])
    optimum = search.optimum(losses)
    if optimum is None:
        raise InputError(f"every run at N = {loops} diverged; the experiment does not train at any LR tried")
    asked = regret if precision is None else None
    return TunedLR(optimum, loops, results, rule, asked, trainable.identity())


def read_tuned(path: str | Path) -> dict[str, Any]:
    """Read what `TunedLR.to_dict` gave and was written as JSON.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; give an LR, or the JSON file that tune wrote"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; give an LR, or the JSON file that tune wrote") from None
    if not isinstance(data, dict) or not {"schema_version", "lr", "loops", "experiment"} <= data.keys():
        raise InputError(f"{path} holds no tuned LR; give an LR, or the JSON file that tune wrote")
    if data["schema_version"] != SCHEMA:
        raise InputError(
            f"{path} has schema_version {data['schema_version']!r}, not {SCHEMA}; tune again, or give its LR"
        )
    lr, identity = data["lr"], data["experiment"]
    if not is_number(lr, 0) or not isinstance(identity, dict):
        raise InputError(f"{path} holds the LR {lr!r} and is damaged; tune again, or give an LR")
    return data


@explained_in("training-script.md#tune-sweep-check")
def sweep(
    train: Any,
    loops: Sequence[int] | Mapping[Rule, Sequence[int]],
    around: TunedLR | float | None = None,
    rules: Sequence[Rule] = ("factored",),
    seeds: int | Sequence[int] = 4,
    octaves: Sequence[float] = OCTAVES,
    ledger: str | Path = LEDGER,
    workers: int | None = None,
    lrs: Sequence[float] | None = None,
    known: Collection[Run] = (),
    devices: str | None = None,
    limit: float | None = None,
    target: str | None = None,
) -> pd.DataFrame:
    """Train at every loop count, LR and seed, and return the table that `check` judges.

    Runs that two rules share, as all do at N = 1 when L is the base depth, are made and kept once, and stand in the
    table under each of the rules, as they do where `check` reads the ledger.

    Args:
        train: what is trained, as `tune` takes it.
        loops: the loop counts of every rule, or a mapping from each rule to its own.
        around: centre of the LRs: a tuned LR, or an absolute one.
        rules: the rule of interest and its controls; a mapping of `loops` decides by itself.
        seeds: how many, or which; paired across LRs, loop counts and rules.
        octaves: the LRs as log2 distances from the centre.
        ledger: as `tune` takes it.
        workers: as `tune` takes it.
        devices: as `tune` takes it.
        limit: as `tune` takes it.
        target: as `tune` takes it.
        lrs: the LRs themselves, absolute, instead of `around` and `octaves`.
        known: runs that another table holds, left out here; an LR within a millionth of one of theirs becomes theirs.

    Returns:
        One row per run, with columns rule, layers, loops, width, lr, seed, steps, loss (nats), diverged, seconds;
        layers, width and steps are empty where the training does not say them.

    Raises:
        InputError: as `Trainable.check`, `Ledger` and `run_search`, or numbers out of range.
        FailedRunError: a run failed; an InputError and a RuntimeError. Its `finished` is the table of the others.
    """
    plan_of_loops = {rule: counts_of("loops", counts, 1) for rule, counts in _by_rule(loops, rules).items()}
    if not plan_of_loops:
        raise InputError("rules is empty; name one rule or more")
    check_limit(limit)
    chosen = seeds_of(seeds, 1)
    grid = list(product(_as_known(_absolute(around, octaves, lrs), known), chosen))
    pairs = [(rule, count) for rule, counts in plan_of_loops.items() for count in counts]
    reported = {Run(rule, count, lr, seed) for rule, count in pairs for lr, seed in grid}
    missing = sorted(reported - set(known))
    if not missing:
        return pd.DataFrame(columns=COLUMNS)
    trainable = as_trainable(train)
    places = slots(devices, workers)
    study, starts = open_ledger(trainable, missing, ledger, places[0], target)
    cells = [(rule, count, _stored_rule(starts.get(count), rule)) for rule, count in pairs]
    request = request_for(cells, {lr for lr, _ in grid}, chosen, reported & set(known))
    study.ask(request)
    try:
        run_search(trainable, search_of(request), study, places, limit, alone=workers is None)
    except FailedRunError as error:
        error.finished = _table(study, request)
        raise
    return _table(study, request)


def request_for(
    cells: Iterable[tuple[Rule, int, Rule]], lrs: Iterable[float], seeds: Iterable[int], without: Iterable[Run] = ()
) -> dict[str, Any]:
    """A request of every LR and seed in every cell (rule, N, rule it is stored as), as `asked` reads it."""
    return {
        "kind": "sweep",
        "cells": sorted(map(list, cells)),
        "lrs": sorted(lrs),
        "seeds": sorted(seeds),
        "without": [list(astuple(run)) for run in sorted(without)],
    }


def _table(ledger: Ledger, request: Mapping[str, Any]) -> pd.DataFrame:
    """The finished runs of a sweep, each under the rules that it was asked for."""
    rows, _ = expanded([request], {astuple(run): row for run, row in ledger.finished.items()})
    return pd.DataFrame(rows, columns=COLUMNS)


def search_of(request: Mapping[str, Any]) -> Search:
    """The search by which a request is met."""
    if request["kind"] == "tune":
        return _proxy_search(request)
    return Grid({Run(*stored): None for _, stored in asked(request)})  # type: ignore[arg-type]


def _proxy_search(request: Mapping[str, Any]) -> ProxySearch:
    terms = request["regret"], request["precision"]
    return ProxySearch(request["loops"], tuple(request["seeds"]), request["rule"], *terms)


def open_ledger(
    trainable: Trainable,
    runs: Sequence[Run],
    place: str | Path,
    slot: Slot,
    target: str | None = None,
) -> tuple[Ledger, Mapping[int, Any]]:
    """Look at the start of a training before runs of it are made, and open its ledger; with the starts by N.

    Raises:
        InputError: as `Trainable.check`, `Ledger` and `Ledger.admit`.
    """
    loops, seeds, rules = ([*dict.fromkeys(getattr(run, name) for run in runs)] for name in ("loops", "seed", "rule"))
    lrs = sorted({run.lr for run in runs})
    place = absolute(place)  # before the user's code, which may change the working directory
    first = here(slot).trial(Run(rules[0], min(loops), lrs[(len(lrs) - 1) // 2], seeds[0]), runs_directory(place))
    with directory_kept():
        starts = trainable.check(first, loops, seeds, rules)
    ledger = Ledger(place)
    probes = {Run(first.rule, count, first.lr, first.seed): start.probe() for count, start in starts.items()}
    ledger.admit(trainable.identity(), probes, _prober(trainable, slot, place), target)
    return ledger, starts


def _prober(trainable: Trainable, slot: Slot, place: str | Path) -> Callable[[Run], Mapping[str, Any]]:
    def probe(run: Run) -> Mapping[str, Any]:
        with directory_kept():
            return trainable.probe(here(slot).trial(run, runs_directory(place)))

    return probe


@explained_in("cluster.md#many-machines")
def join(
    train: Any,
    storage: str | Path,
    study: str,
    workers: int | None = None,
    devices: str | None = None,
    limit: float | None = None,
) -> int:
    """Make the runs that are asked of a study until none is left, beside whoever else does, and return how many are
    finished.

    Args:
        train: what is trained, as `tune` takes it; measured to be that of the study.
        storage: where the study is kept.
        study: its name.
        workers, devices, limit: as for `tune`.

    Raises:
        InputError: there is no such study, it is none of `tune` and `sweep`, or of another experiment.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    check_limit(limit)
    trainable = as_trainable(train)
    storage = absolute(storage)
    ledger = Ledger(storage, study, create=False)
    if ledger.identity is None:
        raise InputError(f"the study {study} of {ledger.shown} was not begun by tune or sweep; begin it by one of them")
    places = slots(devices, workers)
    ledger.admit(trainable.identity(), {}, _prober(trainable, places[0], storage))
    searches = Several([search_of(request) for request in ledger.requests])
    run_search(trainable, searches, ledger, places, limit, study, alone=workers is None)
    return len(ledger.finished)


def target_of(storage: str | Path, study: str) -> str:
    """The training of a study, as it is called on a command line.

    Raises:
        InputError: there is no such study, or it does not say.
    """
    ledger = Ledger(storage, study, create=False)
    if TARGET not in ledger.attributes:
        raise InputError(f"the study {study} of {ledger.shown} does not say what it trains; give EXPERIMENT or --cmd")
    return str(ledger.attributes[TARGET])


def _stored_rule(start: Any, rule: Rule) -> Rule:
    """The rule under which runs are stored: the first that scales as this one does at the N of a start, if one is."""
    if start is None:
        return rule
    return next(other for other in RULES if _scales(start.plan.under(other)) == _scales(start.plan.under(rule)))


def _scales(plan: Any) -> object:
    """Everything by which a rule changes a run: multipliers, and the optimizer's factors."""
    factors = depth_factors(plan.rule, "adamw", plan.layers, plan.base_layers)  # apart wherever another family's are
    return factors, tuple((branch.module, branch.multiplier) for branch in plan.branches)


def _absolute(around: TunedLR | float | None, octaves: Sequence[float], lrs: Sequence[float] | None) -> Sequence[float]:
    if (around is None) == (lrs is None):
        raise InputError("give either around, the centre of the LRs, or lrs, the LRs themselves")
    if lrs is not None:
        if not lrs or len(set(lrs)) < len(lrs) or not all(is_number(lr, 0) for lr in lrs):
            raise InputError(f"lrs is {lrs!r}; give finite LRs above 0, each once, such as 0.001, 0.002, 0.004")
        return [float(lr) for lr in lrs]
    centre = around.lr if isinstance(around, TunedLR) else around
    if centre is None or not is_number(centre, 0):
        raise InputError(f"around is {around!r}; the LR must be a finite number above 0")
    apart = len(set(octaves)) == len(octaves)
    if not octaves or not apart or not all(abs(math.log2(centre) + octave) < 1000 for octave in octaves):
        raise InputError(f"octaves is {octaves!r}; give log2 distances from the centre, each once, such as -1, 0, 1")
    return [centre * 2.0**octave for octave in octaves]


def _as_known(lrs: Sequence[float], known: Collection[Run]) -> list[float]:
    """The LRs, where they are in a table already as they stand there: the seeds of one LR must be found together."""
    stored = sorted({run.lr for run in known})
    return [next((other for other in stored if math.isclose(lr, other, rel_tol=SAME_LR)), lr) for lr in lrs]


def _by_rule(
    loops: Sequence[int] | Mapping[Rule, Sequence[int]], rules: Sequence[Rule]
) -> Mapping[Rule, Sequence[int]]:
    mapping: Mapping[Rule, Sequence[int]] = loops if isinstance(loops, Mapping) else dict.fromkeys(rules, loops)
    for rule in mapping:
        check_rule(rule)
    return mapping
