"""The two things a user asks for: the best LR of a proxy, and a sweep around it over N."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.rules import Rule, check_rule
from looptransfer.transfer.optimum import Optimum
from looptransfer.transfer.results import COLUMNS
from looptransfer.trials.devices import here, slots
from looptransfer.trials.function import as_trainable
from looptransfer.trials.run import Run, Trainable
from looptransfer.trials.search import COARSE, Grid, ProxySearch, runs_of
from looptransfer.trials.study import run_search, runs_directory

LEDGER = "looptransfer.db"
OCTAVES = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5)
SCHEMA = 1  # of a tuned LR as JSON
SAME_LR = 1e-6  # relative distance below which two LRs are one


@dataclass(frozen=True)
class TunedLR:
    """The best base LR of a proxy model, absolute, with the t-interval over seeds that `optimum` holds.

    Where no optimum could be fitted, `lr` is the best one that was run and `optimum.censored` says why. `experiment` is
    the identity of what was trained.
    """

    lr: float
    loops: int
    optimum: Optimum
    results: pd.DataFrame = field(repr=False, compare=False)
    rule: Rule = "factored"
    experiment: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what was found, and the seeds and the identity of the experiment it was found with."""
        interval = self.optimum.log2_lr
        return {
            "schema_version": SCHEMA,
            "loops": self.loops,
            "lr": self.lr,
            "rule": self.rule,
            "log2_lr": asdict(interval) if interval else None,
            "censored": self.optimum.censored,
            "seeds": sorted(int(seed) for seed in self.results["seed"].unique()),
            "experiment": dict(self.experiment),
        }

    def __str__(self) -> str:
        interval = self.optimum.log2_lr
        if interval is None:
            return f"best LR run at N = {self.loops}: {self.lr:.4g} (no fitted optimum: {self.optimum.censored})"
        return f"best LR at N = {self.loops}: {self.lr:.4g} [{2**interval.low:.4g}, {2**interval.high:.4g}]"


def tune(
    train: Any,
    loops: int,
    seeds: int | Sequence[int] = 4,
    ledger: str | Path = LEDGER,
    workers: int | None = None,
    rule: Rule = "factored",
    devices: str | None = None,
) -> TunedLR:
    """Find the LR optimum of the proxy with `loops` loops: a coarse look, then half-octave steps with every seed.

    Args:
        train: what is trained: a function, train(run) -> loss in nats, or one that yields (step, loss) as it goes,
            where `run` has loops, lr (absolute), seed, rule, device and a directory of its own; or an `Experiment`, or
            a `Command`.
        loops: N of the proxy; small is cheap, and under "factored" as good as large.
        seeds: how many, or which; paired across LRs. Two at least.
        ledger: SQLite file (or Optuna storage URL) of finished runs; calling again goes on where it was. The runs'
            directories are beside it.
        workers: how many runs are made at once, each in a process of its own; 1 trains in this process. Default one per
            GPU, or one per core where torch sees none.
        rule: the scaling rule.
        devices: GPUs, one worker each, such as "0,1,3"; "0+1,2+3" gives each of two workers two, "all" gives all to
            one, "cpu" none.

    Raises:
        InputError: as `Trainable.check` and `run_search`, or numbers out of range.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    chosen = _seeds(seeds)
    if len(chosen) < 2:
        raise InputError(f"seeds is {seeds!r}; give two or more, since one cannot tell noise from an optimum")
    check_rule(rule)
    experiment = as_trainable(train)
    lr = 2.0 ** COARSE[len(COARSE) // 2]
    starts = [Run(rule, count, lr, seed) for count in _loop_counts([loops]) for seed in chosen]
    check_first(experiment, starts, ledger, workers, devices)
    search = ProxySearch(loops, chosen, rule)
    results = run_search(experiment, search, ledger, f"tune N={loops} {rule}", workers, devices)
    wanted = set(search.wanted(results))
    results = results[[run in wanted for run in runs_of(results)]]
    optimum = search.optimum(results, search.confidence)
    if optimum.log2_lr is not None:
        return TunedLR(2.0**optimum.log2_lr.estimate, loops, optimum, results, rule, experiment.identity())
    mean = results.groupby("lr")["loss"].mean()
    if not math.isfinite(mean.min()):
        raise InputError(f"every run at N = {loops} diverged; the experiment does not train at any LR tried")
    return TunedLR(float(str(mean.idxmin())), loops, optimum, results, rule, experiment.identity())


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
    if not isinstance(lr, int | float) or not 0 < lr < math.inf or not isinstance(identity, dict):
        raise InputError(f"{path} holds the LR {lr!r} and is damaged; tune again, or give an LR")
    return data


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
) -> pd.DataFrame:
    """Train at every loop count, LR and seed, and return the table that `check` judges.

    Runs that two rules share, as all do at N = 1 when L is the base depth, are made once and stand in the table under
    each of the rules.

    Args:
        train: what is trained, as `tune` takes it.
        loops: the loop counts of every rule, or a mapping from each rule to its own.
        around: centre of the LRs: a tuned LR, or an absolute one.
        rules: the rule of interest and its controls; a mapping of `loops` decides by itself.
        seeds: how many, or which; paired across LRs, loop counts and rules.
        octaves: the LRs as log2 distances from the centre.
        ledger: SQLite file (or Optuna storage URL) of finished runs; calling again goes on where it was.
        workers, devices: as `tune` takes them.
        lrs: the LRs themselves, absolute, instead of `around` and `octaves`.
        known: runs that another table holds, left out here; an LR within a millionth of one of theirs becomes theirs.

    Returns:
        One row per run, with columns rule, layers, loops, width, lr, seed, steps, loss (nats), diverged, seconds;
        layers, width and steps are empty where the training does not say them.

    Raises:
        InputError: as `Trainable.check` and `run_search`, or numbers out of range.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    plan_of_loops = {rule: _loop_counts(counts) for rule, counts in _by_rule(loops, rules).items()}
    if not plan_of_loops:
        raise InputError("rules is empty; name one rule or more")
    chosen = _seeds(seeds)
    grid = list(product(_as_known(_absolute(around, octaves, lrs), known), chosen))
    pairs = [(rule, count) for rule, counts in plan_of_loops.items() for count in counts]
    reported = {Run(rule, count, lr, seed) for rule, count in pairs for lr, seed in grid}
    missing = sorted(reported - set(known))
    experiment = as_trainable(train)
    plans = check_first(experiment, missing, ledger, workers, devices) if missing else {}
    stand_in = _stand_ins(plans, pairs)
    made = {run: replace(run, rule=stand_in[run.rule, run.loops]) for run in missing}
    done = run_search(experiment, Grid(tuple(dict.fromkeys(made.values()))), ledger, "sweep", workers, devices)
    by_run = dict(zip(runs_of(done), done.to_dict("records"), strict=True))
    rows = [{**by_run[made[run]], "rule": run.rule} for run in missing]
    return pd.DataFrame(rows, columns=COLUMNS)


def check_first(
    experiment: Trainable, runs: Sequence[Run], ledger: str | Path, workers: int | None, devices: str | None
) -> Mapping[int, Any]:
    """Look at the start of the training before the runs are made, and return the plans by N, where they can be known.

    Raises:
        InputError: as `Trainable.check` and `slots`.
    """
    loops, seeds, rules = ([*dict.fromkeys(getattr(run, name) for run in runs)] for name in ("loops", "seed", "rule"))
    lrs = sorted({run.lr for run in runs})
    first = Run(rules[0], min(loops), lrs[(len(lrs) - 1) // 2], seeds[0])
    place = here(slots(devices, workers)[0])
    return experiment.check(place.trial(first, runs_directory(ledger)), loops, seeds, rules)


def _stand_ins(plans: Mapping[int, Any], pairs: Sequence[tuple[Rule, int]]) -> dict[tuple[Rule, int], Rule]:
    """For each rule and loop count the first rule whose runs are known to be the same there."""
    first: dict[tuple[int, object], Rule] = {}
    return {
        (rule, count): first.setdefault((count, _scales(plans[count].under(rule)) if count in plans else rule), rule)
        for rule, count in pairs
    }


def _scales(plan: Any) -> object:
    """Everything by which a rule changes a run: multipliers, and the optimizer's factors."""
    factor = 1.0 if plan.rule == "unscaled" else plan.depth_multiplier
    return factor, tuple((branch.module, branch.multiplier) for branch in plan.branches)


def _absolute(around: TunedLR | float | None, octaves: Sequence[float], lrs: Sequence[float] | None) -> Sequence[float]:
    if (around is None) == (lrs is None):
        raise InputError("give either around, the centre of the LRs, or lrs, the LRs themselves")
    if lrs is not None:
        if not lrs or len(set(lrs)) < len(lrs) or not all(0 < lr < math.inf for lr in lrs):
            raise InputError(f"lrs is {lrs!r}; give finite LRs above 0, each once, such as 0.001, 0.002, 0.004")
        return [float(lr) for lr in lrs]
    centre = around.lr if isinstance(around, TunedLR) else around
    if centre is None or not 0 < centre < math.inf:
        raise InputError(f"around is {around!r}; the LR must be a finite number above 0")
    apart = len(set(octaves)) == len(octaves)
    if not octaves or not apart or not all(abs(math.log2(centre) + octave) < 1000 for octave in octaves):
        raise InputError(f"octaves is {octaves!r}; give log2 distances from the centre, each once, such as -1, 0, 1")
    return [centre * 2.0**octave for octave in octaves]


def _as_known(lrs: Sequence[float], known: Collection[Run]) -> list[float]:
    """The LRs, where they are in a table already as they stand there: the seeds of one LR must be found together."""
    there = sorted({run.lr for run in known})
    return [next((other for other in there if math.isclose(lr, other, rel_tol=SAME_LR)), lr) for lr in lrs]


def _by_rule(
    loops: Sequence[int] | Mapping[Rule, Sequence[int]], rules: Sequence[Rule]
) -> Mapping[Rule, Sequence[int]]:
    mapping: Mapping[Rule, Sequence[int]] = loops if isinstance(loops, Mapping) else dict.fromkeys(rules, loops)
    for rule in mapping:
        check_rule(rule)
    return mapping


def _loop_counts(loops: Sequence[int]) -> list[int]:
    wrong = [count for count in loops if not isinstance(count, int) or count < 1]
    if wrong or not loops or len(set(loops)) < len(loops):
        raise InputError(
            f"loops is {wrong[0] if wrong else loops!r}; loop counts are whole numbers from 1 up, each once"
        )
    return list(loops)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds is {seeds!r}; give a count from 1 up, or seeds that all differ")
    return chosen
