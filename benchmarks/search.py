"""What an LR that was searched loses to the best, beside what a user would do instead: simulated losses over log2(LR).

    python -m benchmarks.search [--times 3] [--out reports/search]

`shaped` are the surfaces on which the search was shaped, `held out` those by which nothing was chosen but `MARGIN`,
after a choice that diverged on one of 144 cliffs. Each is drawn `--times` times, its optimum moved by up to three
octaves. Real ones are smoothed means over the seeds of reports/sweep/results.csv and reports/paper/layers.csv, a
seed's deviation from them a random mixture of those measured.
Optuna's Gaussian process takes seconds a choice, and is measured on the first draw of the held-out surfaces alone.
"""

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import optuna
import pandas as pd
from scipy.interpolate import PchipInterpolator, UnivariateSpline

from looptransfer.reference.experiment import reference_experiment
from looptransfer.trials.search import LIMITS, REGRET, ProxySearch
from looptransfer.trials.sweep import sweep, tune

Mean = Callable[[float], float]
Noise = Callable[[float, np.random.Generator, np.random.Generator], float]  # LR, draws of the seed, draws of the run
SEEDS = (0, 1, 2, 3)
SWEEP = "reports/sweep/results.csv"
RANGE = (2.0**-14, 2.0**-1)  # the LRs of a range test
SPAN = 20  # steps over which its losses are smoothed


@dataclass(frozen=True)
class Surface:
    """Losses over log2(LR), infinite from a cliff on, whose place differs by 0.1 octave between seeds."""

    name: str
    kind: str  # real, smooth, cliff
    mean: Mean
    noise: Noise
    cliff: float = np.inf


@dataclass(frozen=True)
class Draw:
    """A surface moved along the LRs, and the losses of runs on it."""

    surface: Surface
    number: int
    shift: float

    def mean(self, log2: float) -> float:
        place = log2 - self.shift
        return self.surface.mean(place) if place < self.surface.cliff else np.inf

    def loss(self, log2: float, seed: int) -> float:
        of_seed = np.random.default_rng([self.number, seed])
        of_run = np.random.default_rng([self.number, seed, round(4096 * log2) + 2**20])
        place = log2 - self.shift
        if place >= self.surface.cliff + 0.1 * of_seed.normal():
            return np.inf
        return self.surface.mean(place) + self.surface.noise(place, of_seed, of_run)

    def best(self) -> tuple[float, float]:
        """The log2(LR) of the optimum, and the mean loss there."""
        log2_lrs = np.linspace(*LIMITS, 2401)
        means = [self.mean(log2) for log2 in log2_lrs]
        return float(log2_lrs[np.argmin(means)]), min(means)


def white(deviation: float, level: float, slope: float, growth: float = 0.0, centre: float = 0.0) -> Noise:
    """Noise of a run that grows above the centre, and the level and slope of its seed, in standard deviations of it."""

    def noise(place: float, of_seed: np.random.Generator, of_run: np.random.Generator) -> float:
        scale = 1 + growth * float(np.clip(place - centre, 0, 8))
        of_level, of_slope = of_seed.normal(size=2)
        return deviation * float(scale * of_run.normal() + level * of_level + slope * of_slope * place)

    return noise


def real(path: str, keys: Sequence[str]) -> Iterator[Surface]:
    """Measured curves whose lowest mean is not at an edge."""
    runs = pd.read_csv(path)
    runs.loc[runs["diverged"], "loss"] = np.inf
    for key, group in runs.groupby(list(keys)):
        table = group.pivot_table(index="lr", columns="seed", values="loss", aggfunc="first")
        table = table[np.isfinite(table).all(axis=1)]
        if 0 < table.mean(axis=1).to_numpy().argmin() < len(table) - 1:
            name = " ".join([Path(path).stem, *map(str, key)])
            yield measured(name, np.log2(table.index.to_numpy()), table.to_numpy())


def measured(name: str, x: np.ndarray, losses: np.ndarray) -> Surface:
    """A smoothed mean, straight beyond its ends, and seeds that are mixtures of those measured."""
    seeds, level = losses.shape[1], losses.mean(axis=0)
    rest = losses - losses.mean(axis=1, keepdims=True) - (level - level.mean())
    rest *= np.sqrt(seeds / (seeds - 1))
    error = np.maximum(np.sqrt((rest**2).mean(axis=1) / seeds), 1e-4)
    smooth = UnivariateSpline(x, losses.mean(axis=1), w=1 / error, s=len(x))
    points = np.linspace(x[0], x[-1], 200)
    curve = PchipInterpolator(points, smooth(points))
    low, high = float(curve(x[0], 1)), max(float(curve(x[-1], 1)), 0.05)

    def mean(place: float) -> float:
        inside = min(max(place, x[0]), x[-1])
        return float(curve(inside)) + low * min(place - x[0], 0) + high * max(place - x[-1], 0)

    def noise(place: float, of_seed: np.random.Generator, of_run: np.random.Generator) -> float:
        mixture = rest @ of_seed.normal(size=seeds) / np.sqrt(seeds)
        return float(np.interp(place, x, mixture)) + float(level.std(ddof=1) * of_seed.normal())

    return Surface(name, "real", mean, noise)


def bowl(place: float, height: float) -> float:
    return 3 + height * (place + 8) ** 2 / 2


def lopsided(place: float, height: float) -> float:
    return 3 + height * (float(np.exp(np.clip(place + 8, -50, 12))) - 1 - (place + 8))


def steep(place: float, height: float) -> float:
    """A bowl with a wall of finite losses an octave above its lowest point."""
    return bowl(place, height) + 20 * max(place + 7, 0)


def powers(place: float, low: float, high: float, height: float, wall: float = 0.0) -> float:
    left, right = 2 ** (-low * (place + 7.3)) / low, 2 ** (high * min(place + 7.3, 20)) / high
    return 2.5 + height * (left + right - 1 / low - 1 / high) + wall * (1 - float(np.exp(-6 * max(place + 6.8, 0))))


def saturating(place: float) -> float:
    return 2.5 + 0.5 * float(np.log1p(((place + 7.3) / 3) ** 2))


def flat(place: float) -> float:
    return 2.5 + 0.01 * abs(place + 7.3) ** 3 / 6


def shaped() -> Iterator[Surface]:
    yield from real(SWEEP, ["rule", "loops"])
    for deviation, height in itertools.product((0.003, 0.01, 0.025), (0.02, 0.06, 0.15)):
        noise = white(deviation, 2, 0.3)
        size = f"{height} ± {deviation}"
        yield Surface(f"bowl {size}", "smooth", partial(bowl, height=height), noise)
        growing = white(deviation, 2, 0.3, growth=1, centre=-8)
        yield Surface(f"lopsided {size}", "smooth", partial(lopsided, height=height), growing)
        yield Surface(f"steep {size}", "cliff", partial(steep, height=height), noise)
        yield Surface(f"cut off {size}", "cliff", partial(bowl, height=height), noise, -7.0)


def held_out() -> Iterator[Surface]:
    yield from real("reports/paper/layers.csv", ["arm", "layers"])
    for deviation in (0.004, 0.012, 0.03):
        noise = white(deviation, 1.5, 0.4, growth=0.5, centre=-7.3)
        for low, high, height in ((0.6, 0.9, 0.15), (0.4, 1.4, 0.06), (0.9, 0.5, 0.3)):
            size, sides = f"{low}, {high}, {height} ± {deviation}", {"low": low, "high": high, "height": height}
            yield Surface(f"powers {size}", "smooth", partial(powers, **sides), noise)
            yield Surface(f"walled {size}", "cliff", partial(powers, **sides, wall=4.0), noise)
            yield Surface(f"cut off {size}", "cliff", partial(powers, **sides), noise, -7.0)
        yield Surface(f"saturating ± {deviation}", "smooth", saturating, white(deviation, 1, 0.3))
        yield Surface(f"flat ± {deviation}", "smooth", flat, white(deviation, 1, 0.3))


def draws(surfaces: Sequence[Surface], times: int, seed: int) -> Iterator[Draw]:
    rng = np.random.default_rng(seed)
    for number, surface in enumerate(list(surfaces) * times):
        yield Draw(surface, 10**6 * seed + number, float(rng.uniform(-3, 3)))


@dataclass(frozen=True)
class Choice:
    """What a way to choose an LR returned."""

    log2: float
    trainings: int
    limit: float = np.nan  # of the regret, as it told
    interval: tuple[float, float] = (np.nan, np.nan)


def ours(draw: Draw, precision: float | None = None) -> Choice:
    search = ProxySearch(1, SEEDS, precision=precision)
    losses: dict = {}
    while left := [run for run in search.wanted(losses) if run not in losses]:
        losses |= {run: draw.loss(float(np.log2(run.lr)), run.seed) for run in left}
    optimum = search.optimum(losses)
    assert optimum is not None
    return Choice(float(np.log2(optimum.lr)), len(losses), optimum.regret, optimum.log2_lr)


def plain(draw: Draw) -> Choice:
    """Five LRs two octaves apart, edges followed; three an octave apart with two seeds, moved until the middle is the
    lowest; the lowest point of the parabola through their means.
    """
    made: dict[tuple[float, int], float] = {}

    def loss(log2: float, seed: int) -> float:
        made.setdefault((log2, seed), draw.loss(log2, seed))
        return made[log2, seed]

    looks = list(np.arange(-12.0, -2, 2))
    while (best := min(looks, key=lambda log2: loss(log2, 0))) in (looks[0], looks[-1]) and -24 < best < 6:
        looks = [best - 2, *looks] if best == looks[0] else [*looks, best + 2]
    for _ in range(10):
        low, middle, high = (np.mean([loss(best + step, seed) for seed in SEEDS[:2]]) for step in (-1, 0, 1))
        if middle <= min(low, high):
            break
        best += -1 if low < high else 1
    if not np.isfinite(high):
        return Choice(best - 0.5, len(made))
    bend = low - 2 * middle + high
    return Choice(best + (0.5 * (low - high) / bend if bend > 0 else 0.0), len(made))


def grid(draw: Draw) -> Choice:
    """Eight LRs an octave apart with three seeds, the lowest mean."""
    log2_lrs = np.arange(-12.0, -4)
    return Choice(min(log2_lrs, key=lambda log2: np.mean([draw.loss(log2, seed) for seed in SEEDS[:3]])), 24)


def optunas(draw: Draw, sampler: str, trials: int) -> Choice:
    """The best trial of one seed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=draw.number))

    def objective(trial: optuna.Trial) -> float:
        return min(draw.loss(float(np.log2(trial.suggest_float("lr", 2.0**-14, 2.0**-2, log=True))), 0), 1e3)

    study.optimize(objective, n_trials=trials)
    return Choice(float(np.log2(study.best_params["lr"])), trials)


SLOW = "Optuna GP"
WAYS: dict[str, Callable[[Draw], Choice]] = {
    "`tune`": ours,
    "`tune --precision 0.25`": partial(ours, precision=0.25),
    "five LRs, then three with two seeds, a parabola": plain,
    "grid, 8 LRs × 3 seeds": grid,
    "Optuna TPE, 16 trials": partial(optunas, sampler="TPESampler", trials=16),
    "Optuna TPE, 40 trials": partial(optunas, sampler="TPESampler", trials=40),
    "Optuna GP, 16 trials": partial(optunas, sampler="GPSampler", trials=16),
    "Optuna GP, 40 trials": partial(optunas, sampler="GPSampler", trials=40),
}


def measure(times: int) -> pd.DataFrame:
    """One row per surface drawn and way: the regret in % of the lowest mean loss, capped where the choice diverges."""
    rows = []
    for seed, (group, surfaces) in enumerate({"shaped": list(shaped()), "held out": list(held_out())}.items()):
        for number, draw in enumerate(draws(surfaces, times, seed)):
            optimum, best = draw.best()
            for way, choose in WAYS.items():
                if way.startswith(SLOW) and (group == "shaped" or number >= len(surfaces)):
                    continue
                choice = choose(draw)
                regret = 100 * min((draw.mean(choice.log2) - best) / best, 10.0)
                low, high = choice.interval
                rows.append(
                    {
                        "way": way,
                        "surfaces": group,
                        "kind": draw.surface.kind,
                        "surface": draw.surface.name,
                        "trainings": choice.trainings,
                        "regret": regret,
                        "below the limit": np.nan
                        if np.isnan(choice.limit)
                        else float(regret <= 100 * choice.limit / best),
                        "interval covers": np.nan if np.isnan(low) else float(low <= optimum <= high),
                    }
                )
    return pd.DataFrame(rows)


class Target:
    """N = 16 of the demo's model, by the smoothed means of reports/sweep/results.csv."""

    def __init__(self) -> None:
        self.surface = next(surface for surface in real(SWEEP, ["rule", "loops"]) if "factored 16" in surface.name)
        self.best = min(self.surface.mean(log2) for log2 in np.linspace(-12, -2, 2001))

    def regret(self, lr: float) -> float:
        """What an LR loses there, in % of the lowest loss."""
        return 100 * (self.surface.mean(float(np.log2(lr))) - self.best) / self.best


def live(target: Target) -> pd.DataFrame:
    """The demo's model tuned at small N: the bill against a grid of 8 LRs × 3 seeds at N = 16, and the regret there."""
    rows = []
    for loops, first in itertools.product((1, 2), (0, 4, 8)):
        seeds = range(first, first + len(SEEDS))
        with TemporaryDirectory() as folder:
            tuned = tune(reference_experiment(), loops, seeds, Path(folder, "ledger.db"), devices="cpu")
        rows.append(
            {
                "N of the proxy": float(loops),
                "seeds": f"{seeds[0]} to {seeds[-1]}",
                "trainings": float(len(tuned.results)),
                "LR": tuned.lr,
                "regret told %": 100 * tuned.optimum.regret / tuned.optimum.loss,
                "regret at N = 16 %": target.regret(tuned.lr),
                "grid's visits ÷ proxy's": 24 * 16 / (len(tuned.results) * loops),
            }
        )
    return pd.DataFrame(rows)


def rising(step: int, steps: int) -> float:
    """The schedule of an LR range test: from the lowest LR to the highest in equal ratios."""
    low, high = np.log2(RANGE)
    return float(2.0 ** ((low - high) * (1 - step / steps)))


def range_tests(target: Target) -> pd.DataFrame:
    """An LR range test of the same proxies, one training each, read in the two usual ways."""
    rows = []
    for loops, seed in itertools.product((1, 2), range(3)):
        losses: list[float] = []
        experiment = replace(
            reference_experiment(), schedule=rising, log=lambda run, step, loss, losses=losses: losses.append(loss)
        )
        with TemporaryDirectory() as folder:
            sweep(experiment, [loops], lrs=[RANGE[1]], seeds=[seed], ledger=Path(folder, "ledger.db"), workers=1)
        lrs = [RANGE[1] * rising(step, experiment.steps) for step in range(len(losses))]
        smooth = pd.Series(losses).ewm(span=SPAN).mean()
        readings = {"a tenth of the LR of the lowest loss": lrs[int(smooth.idxmin())] / 10}
        readings["where the loss falls fastest"] = lrs[int(smooth.diff().iloc[SPAN:].idxmin())]
        rows += [
            {
                "N": float(loops),
                "seed": str(seed),
                "reading": reading,
                "LR": lr,
                "regret at N = 16 %": target.regret(lr),
            }
            for reading, lr in readings.items()
        ]
    return pd.DataFrame(rows)


def summary(results: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    groups = results.groupby(list(keys), sort=False)
    return pd.DataFrame(
        {
            "trainings, median": groups["trainings"].median(),
            "90th": groups["trainings"].quantile(0.9),
            "regret %, median": groups["regret"].median(),
            "90th %": groups["regret"].quantile(0.9),
            "worst %": groups["regret"].max(),
            "below the limit told %": 100 * groups["below the limit"].mean(),
            "interval covers %": 100 * groups["interval covers"].mean(),
        }
    ).reset_index()


def markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * table.shape[1]]
    for row in table.itertuples(index=False):
        rows.append([cell if isinstance(cell, str) else "—" if np.isnan(cell) else f"{cell:.3g}" for cell in row])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def report(results: pd.DataFrame, tuned: pd.DataFrame, ranges: pd.DataFrame, times: int, seconds: float) -> str:
    mine = results[results["way"] == "`tune`"]
    held = mine[mine["surfaces"] == "held out"]
    limit = 100 * held["below the limit"].mean()
    worst = held.loc[held["regret"].idxmax()]
    low, high = RANGE
    return f"""# The LR that `tune` finds, and what it costs

`python -m benchmarks.search --times {times}` wrote this in {seconds:.0f} core-s besides the trainings, with
numpy {np.__version__}, Optuna {optuna.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores,
{platform.machine()}. Losses are simulated; `benchmarks/search.py` says how. Regret: what the mean loss at the chosen LR
is above the lowest, in % of it; 1000 where the choice diverges. Optuna's Gaussian process is measured on one draw of a
surface, the others on {times}.

**What falls short.** The regret that `tune` tells as its upper limit (90 %) holds for {limit:.0f} % of the held-out
surfaces. The worst of them ({worst["surface"]}) loses {worst["regret"]:.2g} %, where {100 * REGRET:g} % was asked for.
No model but the demo's is trained.

## Against what a user would do instead

{markdown(summary(results, ["surfaces", "way"]))}

## By the kind of surface

{markdown(summary(mine, ["surfaces", "kind"]))}

## The tuning bill, in live trainings

The reference model of `looptransfer demo`, tuned at small N. Against it stands a grid of 8 LRs × 3 seeds at N = 16, by
visits of the looped layers; the regret at N = 16 is on the smoothed means of reports/sweep/results.csv.

{markdown(tuned)}

## An LR range test beside it

One training in which the LR rises from {low:.3g} to {high:.3g} in equal ratios, its losses smoothed over {SPAN} steps.
It costs one training, and says neither which reading to take nor what it loses.

{markdown(ranges)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="draws of every surface (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("reports/search"))
    arguments = parser.parse_args()
    started = time.process_time()
    target = Target()
    tuned, ranges = live(target), range_tests(target)
    results = measure(arguments.times)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results.to_csv(arguments.out / "choices.csv", index=False, float_format="%.5g")
    text = report(results, tuned, ranges, arguments.times, time.process_time() - started)
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
