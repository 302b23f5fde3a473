"""How often the checker is right: thousands of simulated sweeps whose drift is known.

    python benchmarks/verdict_simulations.py [--sweeps 2000] [--workers 2] [--out reports/verdict]

Writes cells.csv (a row per cell), README.md (what they say), coverage.png and power.png. The noise is drawn from a
model whose variances and correlations are those of the runs in reports/sweep/results.csv.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from looptransfer.transfer.judge import judge_tables
from looptransfer.transfer.optimum import curve, find_optimum
from looptransfer.transfer.verdict import Terms

Array = NDArray[np.float64]
REAL = Path("reports/sweep/results.csv")
TERMS = Terms("loops", None, 0.20, 0.02, 0.90)
CURVATURE = 0.06  # nats per octave squared, as in reports/sweep
SEED = 20261124


@dataclass(frozen=True)
class Cell:
    """A kind of sweep. `drift` in octaves per doubling of N, `step` in octaves, `noise` in units of the real one."""

    drift: float = 0.0
    seeds: int = 4
    lrs: int = 7
    step: float = 1.0
    shape: str = "asymmetric"
    noise: float = 0.5
    tails: str = "normal"
    loops: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Noise:
    """Noise of a loss at distance u (octaves) from the optimum, for one seed and N.

    sd(u) · (level of the seed + a curve of the seed, shared by all N + a curve of the seed at this N); the curves are
    correlated along u over `length` octaves.
    """

    u: tuple[float, ...]
    sd: tuple[float, ...]
    level: float  # shares of the variance
    shared: float
    length: float

    def draw(self, rng: np.random.Generator, cell: Cell, u: Array) -> Array:
        """Seeds × N × LRs; `u` is N × LRs."""
        seeds, (counts, lrs) = cell.seeds, u.shape
        x = np.arange(lrs) * cell.step
        root = np.linalg.cholesky(np.exp(-np.abs(x[:, None] - x) / self.length) + 1e-9 * np.eye(lrs))
        draw = rng.standard_normal if cell.tails == "normal" else lambda size: rng.standard_t(3, size) / math.sqrt(3)
        level = draw((seeds, 1, 1))
        shared = draw((seeds, 1, lrs)) @ root.T
        own = draw((seeds, counts, lrs)) @ root.T
        parts = (self.level, self.shared, 1 - self.level - self.shared)
        whole = sum(math.sqrt(part) * term for part, term in zip(parts, (level, shared, own), strict=True))
        return np.asarray(cell.noise * np.interp(u, self.u, self.sd) * whole)


def fit_noise(path: Path = REAL) -> Noise:
    """Moments of the residuals about the mean over seeds, rule "factored", every N."""
    runs = pd.read_csv(path)
    runs = runs[runs["rule"] == "factored"]
    tables = [curve(group) for _, group in runs.groupby("loops")]
    losses = np.stack([table.to_numpy().T for table in tables], axis=1)  # seeds, N, LRs
    seeds = losses.shape[0]
    residual = (losses - losses.mean(axis=0)) * math.sqrt(seeds / (seeds - 1))
    sd = np.sqrt((residual**2).mean(axis=(0, 1)))
    unit = residual / sd
    pairs = list(itertools.combinations(range(len(tables)), 2))
    far = float(np.mean([(unit[:, i, 2:] * unit[:, j, :-2]).mean() for i, j in pairs]))
    same = float(np.mean([(unit[:, i] * unit[:, j]).mean() for i, j in pairs]))
    neighbours = float((unit[:, :, 1:] * unit[:, :, :-1]).mean())
    vertices = [find_optimum(1, table, 0.9).log2_lr for table in tables]
    centre = np.mean([vertex.estimate for vertex in vertices if vertex is not None])
    x = tables[0].index.to_numpy()
    level = max(0.0, far)
    along = max(0.05, (neighbours - level) / (1 - level))
    length = -float(x[1] - x[0]) / math.log(along)
    return Noise(tuple(x - centre), tuple(sd), level, max(0.0, same - level), length)


def linex(u: Array, skew: Array | float) -> Array:
    """A bowl of the usual curvature, steeper to the right the larger `skew` (1/octave) is."""
    return np.asarray(2 * CURVATURE / np.square(skew) * (np.exp(skew * u) - skew * u - 1))


def mean_loss(cell: Cell, u: Array, doublings: Array) -> Array:
    """Mean loss, N × LRs; inf where runs diverge."""
    if cell.shape == "quadratic":
        return CURVATURE * u**2
    if cell.shape == "very asymmetric":
        return linex(u, 0.8)
    if cell.shape == "skew grows with N":
        return linex(u, 0.1 + 0.15 * doublings[:, None])
    if cell.shape == "flat bottom":
        return np.asarray(CURVATURE * np.clip(np.abs(u) - 0.75, 0, None) ** 2)
    if cell.shape == "no curvature":
        return 0.02 * CURVATURE * u**2
    bowl = linex(u, 0.4)
    if cell.shape == "cliff":
        return np.where(u > 1.2, np.inf, bowl)
    if cell.shape == "finite wall":  # unstable runs with a finite loss, at one LR whatever N; the optimum moves away
        place = u + cell.drift * doublings[:, None]
        return np.asarray(bowl + np.minimum(np.exp(24 * (place - 0.8)), 3))
    return bowl


def simulate(cell: Cell, noise: Noise, rng: np.random.Generator) -> tuple[dict[int, pd.DataFrame], Array]:
    """One sweep, and the true optima. The grid lies at random against the optima, whose middle is in its middle."""
    doublings = np.log2(cell.loops)
    grid = (np.arange(cell.lrs) - (cell.lrs - 1) / 2) * cell.step
    middle = rng.uniform(-0.5, 0.5) * cell.step
    vertices = middle + cell.drift * (doublings - doublings.mean())
    u = grid[None, :] - vertices[:, None]
    losses = 2.0 + mean_loss(cell, u, doublings) + noise.draw(rng, cell, u)
    seeds = list(map(str, range(cell.seeds)))
    index = pd.Index(grid, name="x")
    tables = {n: pd.DataFrame(losses[:, i].T, index, seeds) for i, n in enumerate(cell.loops)}
    return tables, vertices


def true_regret(cell: Cell, log2_lr: float, vertex: float) -> float:
    """Mean loss at an LR at the largest N above the lowest, in nats."""
    at = np.full((len(cell.loops), 1), log2_lr - vertex)
    return float(mean_loss(cell, at, np.log2(cell.loops))[-1, 0])


def run_cell(job: tuple[Cell, Noise, int, int]) -> dict[str, object]:
    """Simulate and judge `sweeps` sweeps of a cell."""
    cell, noise, sweeps, number = job
    rng = np.random.default_rng([SEED, number])
    answers: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    covered = intervals = 0
    widths, optima, regrets = [], [], []
    for _ in range(sweeps):
        tables, vertices = simulate(cell, noise, rng)
        one = judge_tables("factored", tables, TERMS)
        answers[one.answer] += 1
        causes[one.cause] += one.answer == "INCONCLUSIVE"
        for optimum, vertex in zip(one.optima, vertices, strict=True):
            if optimum.log2_lr is not None:
                optima.append(optimum.log2_lr.low <= vertex <= optimum.log2_lr.high)
        proxy = one.optima[0].log2_lr
        if one.regret is not None and proxy is not None:
            regrets.append(one.regret.low <= true_regret(cell, proxy.estimate, vertices[-1]) <= one.regret.high)
        if one.drift is not None and all(optimum.censored is None for optimum in one.optima):
            intervals += 1
            covered += one.drift.low <= cell.drift <= one.drift.high
            widths.append(one.drift.high - one.drift.low)
    return {
        **asdict(cell),
        "loops": " ".join(map(str, cell.loops)),
        "sweeps": sweeps,
        "with_interval": intervals / sweeps,
        "coverage": covered / intervals if intervals else math.nan,
        "coverage_of_optima": float(np.mean(optima)) if optima else math.nan,
        "coverage_of_regret": float(np.mean(regrets)) if regrets else math.nan,
        "median_half_width": float(np.median(widths)) / 2 if widths else math.nan,
        **{answer: answers[answer] / sweeps for answer in ("FLAT", "DRIFTS", "INCONCLUSIVE")},
        "why_inconclusive": ", ".join(
            f"{cause} {count / sweeps:.0%}" for cause, count in causes.most_common(3) if count
        ),
    }


DRIFTS = (0.0, 0.2, 0.6)  # none, the tolerance, three times the tolerance
GRIDS = ((4, 1.0), (5, 1.0), (7, 1.0), (9, 1.0), (4, 0.5), (7, 0.5), (9, 0.5))
SHAPES = ("quadratic", "very asymmetric", "cliff", "flat bottom", "no curvature", "skew grows with N", "finite wall")


def cells() -> list[Cell]:
    """Seeds × noise × drift on the plain grid; every grid; every shape on two grids; heavy tails; fewer N."""
    plain = Cell()
    chosen = [
        replace(plain, seeds=seeds, noise=noise, drift=drift)
        for seeds, noise, drift in itertools.product((2, 3, 4, 5, 8), (0.5, 1.0), DRIFTS)
    ]
    chosen += [
        replace(plain, lrs=lrs, step=step, drift=drift) for (lrs, step), drift in itertools.product(GRIDS, DRIFTS)
    ]
    chosen += [
        replace(plain, shape=shape, lrs=lrs, step=step, drift=-drift if shape == "finite wall" else drift)
        for shape, (lrs, step), drift in itertools.product(SHAPES, ((7, 1.0), (9, 0.5)), DRIFTS)
    ]
    chosen += [
        replace(plain, tails="heavy", seeds=seeds, noise=noise, drift=drift)
        for seeds, noise, drift in itertools.product((2, 5), (0.5, 1.0), DRIFTS)
    ]
    chosen += [replace(plain, loops=loops, drift=drift) for loops in ((1, 4), (1, 2, 4)) for drift in DRIFTS]
    return list(dict.fromkeys(chosen))


def power_cells() -> list[Cell]:
    """Zero drift: how many seeds and LRs buy a FLAT at a given noise."""
    grids = ((5, 1.0), (7, 1.0), (9, 0.5))
    return [
        Cell(seeds=seeds, noise=noise, lrs=lrs, step=step)
        for (lrs, step), noise, seeds in itertools.product(grids, (0.5, 1.0), (2, 3, 4, 5, 8))
    ]


def plot_coverage(frame: pd.DataFrame) -> Figure:
    """Coverage of the drift interval against the bar, a dot per cell; and how often a wrong answer is given."""
    figure = Figure(figsize=(9.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    enough = frame[frame["with_interval"] >= 0.05]
    styles = {0.0: ("#0072B2", "o"), 0.2: ("#D55E00", "s"), 0.6: ("#009E73", "^")}
    for drift, (colour, marker) in styles.items():
        some = enough[enough["drift"] == drift]
        error = 1.96 * np.sqrt(some["coverage"] * (1 - some["coverage"]) / (some["sweeps"] * some["with_interval"]))
        jitter = some["seeds"] + (list(styles).index(drift) - 1) * 0.16 + np.linspace(-0.06, 0.06, len(some))
        left.errorbar(
            jitter, some["coverage"], yerr=error, color=colour, marker=marker, markersize=3.5, linestyle="none",
            elinewidth=0.7, label=f"drift {drift:g}",
        )  # fmt: skip
    left.axhspan(0.87, 0.93, color="0.88", zorder=0)
    left.axhline(0.90, color="0.35", linewidth=1, linestyle="--", zorder=0)
    left.set(xlabel="seeds", ylabel="coverage of the 90 % interval", title="Coverage (grey: ±3 points)")
    left.legend(frameon=False, fontsize="small")
    edge = frame[frame["drift"] == TERMS.tolerance].sort_values(["FLAT", "DRIFTS"]).reset_index(drop=True)
    right.plot(edge.index, edge["FLAT"], color="#0072B2", marker="o", markersize=3.5, linestyle="none", label="FLAT")
    right.plot(
        edge.index, edge["DRIFTS"], color="#D55E00", marker="s", markersize=3.5, linestyle="none", label="DRIFTS"
    )
    right.axhline(0.05, color="0.35", linewidth=1, linestyle="--", label="5 %")
    right.set(
        xlabel="cells, in order",
        ylabel="share of sweeps",
        ylim=(-0.003, max(0.08, edge[["FLAT", "DRIFTS"]].max().max() * 1.1)),
        title="Answers at a drift equal to the tolerance",
    )  # fmt: skip
    right.legend(frameon=False, fontsize="small")
    return figure


def plot_power(frame: pd.DataFrame) -> Figure:
    """Share of FLAT at zero drift against seeds, a panel per noise, a line per grid."""
    noises = sorted(frame["noise"].unique())
    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(noises), sharey=True)
    styles = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")]
    for panel, noise in zip(panels, noises, strict=True):
        for (colour, marker), ((lrs, step), some) in zip(
            styles, frame[frame["noise"] == noise].sort_values("seeds").groupby(["lrs", "step"]), strict=True
        ):
            panel.plot(
                some["seeds"], some["FLAT"], color=colour, marker=marker, label=f"{lrs} LRs, {step:g} octave apart"
            )
        panel.axhline(0.8, color="0.35", linestyle="--", linewidth=1)
        panel.set(title=f"{noise:g} × real noise", xlabel="seeds", ylim=(0, 1.02))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("share of FLAT at zero drift")
    panels[-1].legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def report(frame: pd.DataFrame, power: pd.DataFrame, noise: Noise, sweeps: int, seconds: float) -> str:
    """The README: the bars, the cells that miss one, and how it was made."""
    judged = frame[frame["with_interval"] >= 0.05]
    calm = ~judged["shape"].isin(["no curvature", "skew grows with N", "finite wall"])
    few = judged[judged["seeds"].between(2, 5) & calm]
    off = few[(few["coverage"] - 0.90).abs() > 0.03]
    error = 2 * math.sqrt(0.05 * 0.95 / sweeps)
    edge = frame[frame["drift"].abs() == TERMS.tolerance]
    target = frame[
        (frame["seeds"] == 4) & (frame["lrs"] == 7) & (frame["noise"] == 0.5) & (frame["tails"] == "normal")
        & (frame["shape"] == "asymmetric") & (frame["loops"] == "1 2 4 8 16")
    ]  # fmt: skip
    kind = ["shape", "tails", "noise", "seeds", "lrs", "step", "loops", "drift"]
    columns = [*kind, "with_interval", "coverage", "FLAT", "DRIFTS"]
    wrong = edge[(edge["FLAT"] > 0.05 + error) | (edge["DRIFTS"] > 0.05 + error)]
    changing = frame[frame["shape"].isin(["skew grows with N", "finite wall", "flat bottom", "no curvature"])]
    lines = [
        "# How often the verdict is right",
        "",
        "`python benchmarks/verdict_simulations.py` simulates sweeps whose drift is known and judges each one.",
        f"{len(frame)} cells of {sweeps} sweeps; a row each in cells.csv. Coverage counts the sweeps in which every",
        "optimum was found; `with_interval` is their share. Two standard errors are about 1.3 points of coverage.",
        "",
        "![coverage](coverage.png)",
        "",
        f"- Coverage, 2 to 5 seeds, {len(few)} cells: median {few['coverage'].median():.3f}, "
        f"{len(few) - len(off)} within ±3 points of 90 %, lowest {few['coverage'].min():.3f}, "
        f"highest {few['coverage'].max():.3f}. Of each optimum's own interval: median "
        f"{few['coverage_of_optima'].median():.3f}; of the regret's: median {few['coverage_of_regret'].median():.3f}.",
        f"- At a drift equal to the tolerance, {len(edge)} cells: FLAT at most {edge['FLAT'].max():.1%}, "
        f"DRIFTS at most {edge['DRIFTS'].max():.1%}; {len(wrong)} cells above 5 % by more than two standard errors.",
        "",
        "Power with 4 seeds, 7 LRs, N = 1…16, half the real noise:",
        "",
        table(target[["step", "drift", "FLAT", "DRIFTS", "INCONCLUSIVE", "why_inconclusive"]]),
        "",
        "![power](power.png)",
        "",
        "## Cells outside ±3 points of coverage",
        "",
        table(off[columns]) if len(off) else "None.",
        "",
        "## Shapes that change with N, walls of unstable runs, flat bottoms, no curvature",
        "",
        table(changing[[*columns, "why_inconclusive"]]),
        "",
        "## Cells with too many wrong answers at the tolerance",
        "",
        table(wrong[[*columns, "why_inconclusive"]]) if len(wrong) else "None.",
        "",
        "## How this was made",
        "",
        f"Noise from {REAL}: sd {', '.join(f'{sd:.3f}' for sd in noise.sd)} nats at",
        f"{', '.join(f'{u:+.1f}' for u in noise.u)} octaves from the optimum; of its variance {noise.level:.2f} is the",
        f"seed's level and {noise.shared:.2f} a curve of the seed that all N share; correlated over {noise.length:.2f}",
        f"octaves. Tolerance {TERMS.tolerance}, regret {TERMS.regret_tolerance}, confidence {TERMS.confidence}; "
        f"seed {SEED}; {seconds:.0f} s on {os.cpu_count()} cores.",
        f"Python {platform.python_version()}, numpy {version('numpy')}, scipy {version('scipy')}, "
        f"looptransfer {version('looptransfer')}, {platform.machine()}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in frame.to_numpy()]
    rows = [list(frame.columns), ["---"] * frame.shape[1], *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=2000, help="per cell (default: 2000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("reports/verdict"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    noise = fit_noise()
    wanted = list(dict.fromkeys([*cells(), *power_cells()]))
    jobs = [(cell, noise, arguments.sweeps, number) for number, cell in enumerate(wanted)]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        rows = list(tqdm(pool.imap(run_cell, jobs), total=len(jobs), unit="cell"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    power = frame[[cell in set(power_cells()) for cell in wanted]]
    main_frame = frame[[cell in set(cells()) for cell in wanted]]
    frame.to_csv(arguments.out / "cells.csv", index=False, float_format="%.4f")
    plot_coverage(main_frame).savefig(arguments.out / "coverage.png", dpi=150)
    plot_power(power).savefig(arguments.out / "power.png", dpi=150)
    text = report(main_frame, power, noise, arguments.sweeps, time.perf_counter() - started)
    (arguments.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
