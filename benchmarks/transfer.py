"""How far one learning rate carries: what its drift over loops and over layers depends on.

    python -m benchmarks.transfer [--minutes M] [--out reports/transfer]

Every cell is a sweep of the reference experiment, a file in the folder once it is finished; a cell that stops in the
middle goes on from its ledger. So the same command goes on where the last one ended, and writes the report of what is
finished. `--minutes` begins no further cell after that time.

Two starts: every matrix at 0.02, as the paper has it at width 768, and the matrices of the layers √(768/width) larger,
which gives branches as large beside the embedding as at that width. Over layers, ε is 1/(N·m_L^a) and the branches' LR
falls as m_L^(−b), with m_L = L / 2; the paper has a = b = 1/2 (Table 1), CompleteP a = 1.

Beside the sweeps stands what a few steps say: how the movement of the output grows with L where ε is the paper's and
no LR falls (a = 1/2, b = 0). Its exponent c is the b that would keep the movement the same at every L, so that under
another b the best base LR should move by b − c octaves per doubling.
"""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import looptransfer as lt
from benchmarks.paper import PAPER_WIDTH, enlarge_matrices
from benchmarks.verdict_simulations import table
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.rules import Rule
from looptransfer.transfer.optimum import t_interval

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "reports" / "transfer"
BASE_LAYERS = 2
CENTRE = 0.014  # near the optimum of reports/sweep at N = 2
OCTAVES = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5)
SEEDS = 3
STARTS = {"0.02": 1.0, "0.02·√(768/width)": math.sqrt(PAPER_WIDTH / ReferenceSize().width)}
EXPONENTS = tuple(product((0.5, 1.0), (0.0, 0.5, 1.0)))  # of ε and of the LR, over layers
PAPER = (0.5, 0.5)
DEPTHS = (2, 4, 8)
MOVED_DEPTHS, MOVED_STEPS, MOVED_LR = (2, 4, 8, 16), (1, 10, 30), CENTRE / 8  # of the movement of the output
LOOPS = (1, 4, 16)
COLOURS = {"FLAT": "#0072B2", "DRIFTS": "#D55E00", "INCONCLUSIVE": "#7F7F7F"}
MARKERS = {"FLAT": "o", "DRIFTS": "s", "INCONCLUSIVE": "D"}


@dataclass(frozen=True)
class Larger:
    """`make_model` with the matrices of the looped layers `gain` times as large at the start."""

    make_model: Callable[[int], nn.Module]
    gain: float

    def __call__(self, loops: int) -> nn.Module:
        model = self.make_model(loops)
        enlarge_matrices(model.get_submodule("layers"), self.gain)
        return model


def branches_slower(model: nn.Module, lr: float, factor: float) -> torch.optim.Optimizer:
    """AdamW whose LR of the branches has a further factor."""
    ratio = {"branch matrix": factor, "branch vector": factor}
    groups = lt.param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=0.1, lr_ratio=ratio)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def experiment(start: str, layers: int, steps: int, exponents: tuple[float, float] = PAPER) -> lt.Experiment:
    """The reference experiment at a start, a depth, a length, and exponents of depth in ε and in the LR."""
    reference = lt.reference_experiment(ReferenceSize(layers=layers, steps=steps, held_out=8_192))
    depth, (of_multiplier, of_lr) = layers / BASE_LAYERS, exponents
    return replace(
        reference,
        make_model=Larger(reference.make_model, STARTS[start]),
        base_layers=BASE_LAYERS,
        lam=depth ** (0.5 - of_multiplier),
        optimizer=None if of_lr == 0.5 else partial(branches_slower, factor=depth ** (0.5 - of_lr)),
        settings={**reference.settings, "start": start, "exponents": list(exponents)},
    )


def name_of_start(start: str) -> str:
    """Its name in that of a file."""
    return "larger" if STARTS[start] > 1 else "small"


@dataclass(frozen=True)
class Cell:
    """One sweep: a file of the report."""

    start: str
    layers: int
    steps: int
    exponents: tuple[float, float]
    loops: tuple[int, ...]
    rules: tuple[Rule, ...]

    @property
    def file(self) -> str:
        """The name of its table."""
        of_multiplier, of_lr = self.exponents
        size, exponents = f"L{self.layers}", f"eps{of_multiplier:g}-lr{of_lr:g}"
        return f"{name_of_start(self.start)}-{size}-{exponents}-{self.steps}-N{max(self.loops)}.csv"

    def run(self, out: Path, workers: int) -> None:
        """Make the sweep, or the rest of it."""
        ledger = out / Path(self.file).stem / "ledger.db"
        ledger.parent.mkdir(parents=True, exist_ok=True)
        trained = experiment(self.start, self.layers, self.steps, self.exponents)
        runs = lt.sweep(
            trained, self.loops, CENTRE, self.rules, seeds=SEEDS, octaves=OCTAVES, ledger=ledger, workers=workers
        )
        runs.to_csv(out / self.file, index=False)


def depth_cells(start: str) -> list[Cell]:
    """L = 2, 4, 8 at N = 1 under each pair of exponents; at L = 2 they are all one."""
    cells = [Cell(start, BASE_LAYERS, 250, PAPER, (1,), ("factored",))]
    pairs = sorted(EXPONENTS, key=lambda pair: pair != PAPER)
    return cells + [Cell(start, layers, 250, pair, (1,), ("factored",)) for pair in pairs for layers in DEPTHS[1:]]


def loop_cells(steps: int) -> list[Cell]:
    """N = 1, 4, 16 from the larger start, with the 1/√N arm beside the rule."""
    return [Cell("0.02·√(768/width)", 2, steps, PAPER, LOOPS, ("factored", "sqrt"))]


CELLS = [*loop_cells(250), *loop_cells(1000), *depth_cells("0.02·√(768/width)"), *depth_cells("0.02")]


def movements(start: str) -> pd.DataFrame:
    """How far steps of all parameters, or of the branches' alone, move the output of a probe batch, by L and seed."""
    rows = []
    for layers, seed, moved in product(MOVED_DEPTHS, range(SEEDS), ("branches", "all")):
        trained = experiment(start, layers, 250, (0.5, 0.0))
        torch.manual_seed(seed)
        model, batches = trained.make_model(1), trained.batches(seed)
        probe, _ = next(batches)
        lt.parametrize(model, probe, lam=trained.lam, base_layers=trained.base_layers)
        optimizer = trained.optimizer(model, MOVED_LR)
        for group in optimizer.param_groups:
            if moved == "branches" and "branch" not in group["name"]:
                group["lr"] = 0.0
        with torch.no_grad():
            before = model(probe)
        for step, (inputs, targets) in zip(range(1, MOVED_STEPS[-1] + 1), batches, strict=False):
            loss = trained.loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in MOVED_STEPS:
                with torch.no_grad():
                    change = float((model(probe) - before).square().mean().sqrt())
                rows.append({"moved": moved, "steps": step, "layers": layers, "seed": seed, "change": change})
    return pd.DataFrame(rows)


def movement_exponents(frame: pd.DataFrame) -> pd.DataFrame:
    """The exponent in L of every movement, with its interval over seeds."""
    rows = []
    for (moved, steps), group in frame.groupby(["moved", "steps"]):
        logs = np.log2(group.pivot(index="layers", columns="seed", values="change"))
        slopes = np.polyfit(np.log2(logs.index.to_numpy(float)), logs.to_numpy(), 1)[0]
        exponent = t_interval(pd.Series(slopes, logs.columns), 0.90)
        rows.append({"moved by": moved, "steps": steps, "c": exponent.text(2)})
    return pd.DataFrame(rows)


def name_of(exponents: tuple[float, float]) -> str:
    """The exponents in words."""
    words = {0.0: "0", 0.5: "1/2", 1.0: "1"}
    paper = " (the paper)" if exponents == PAPER else ""
    return f"ε: {words[exponents[0]]}, LR: {words[exponents[1]]}{paper}"


def over_layers(out: Path, start: str) -> lt.Verdict | None:
    """The verdict over L of every pair of exponents that is finished, the paper's first."""
    cells = {(cell.exponents, cell.layers): out / cell.file for cell in depth_cells(start)}
    tables = []
    for pair in EXPONENTS:
        files = [cells[PAPER, BASE_LAYERS], *(cells[pair, layers] for layers in DEPTHS[1:])]
        if all(file.exists() for file in files):
            tables += [pd.read_csv(file).assign(rule=name_of(pair)) for file in files]
    if not any(frame["rule"].iloc[0] == name_of(PAPER) for frame in tables):
        return None
    return lt.check(pd.concat(tables, ignore_index=True), name_of(PAPER), axis="layers")


def over_loops(out: Path, start: str, steps: int) -> lt.Verdict | None:
    """The verdict over N at a start and a length."""
    if start == "0.02" and steps == 250:
        runs = pd.read_csv(ROOT / "reports" / "sweep" / "results.csv")
        return lt.check(runs[runs["loops"].isin(LOOPS) & (runs["seed"] < SEEDS)], "factored")
    cells = [cell for cell in loop_cells(steps) if cell.start == start]
    files = [out / cell.file for cell in cells if (out / cell.file).exists()]
    return lt.check(pd.read_csv(files[0]), "factored") if files else None


def rows_of(verdict: lt.Verdict) -> pd.DataFrame:
    """A row per rule: what a reader wants to compare."""
    differences = {difference.control: difference.drift for difference in verdict.differences}
    axis, rows = verdict.axis, []
    means = verdict.runs.groupby(["rule", axis, "lr"])["loss"].mean()
    for name, judged in verdict.rules.items():
        best = means[name].groupby(level=0).min()
        rows.append(
            {
                "rule": name,
                "verdict": judged.answer,
                "drift": judged.drift.text(2) if judged.drift else f"none: {judged.cause}",
                "minus the first": "" if not differences.get(name) else differences[name].text(2),
                "regret": judged.regret.text(3) if judged.regret else "",
                "best mean loss": ", ".join(f"{loss:.3f}" for loss in best),
                "at LR 2^": ", ".join(f"{math.log2(means[name][size].idxmin()):.2f}" for size in best.index),
            }
        )
    return pd.DataFrame(rows)


def draw(verdicts: dict[str, lt.Verdict]) -> Figure:
    """The drift of every rule with its interval, a panel per start or length."""
    heights = [len(verdict.rules) for verdict in verdicts.values()]
    figure = Figure(figsize=(7.2, 0.7 * len(heights) + 0.36 * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, verdict) in zip(panels, verdicts.items(), strict=True):
        panel.axvspan(-verdict.tolerance, verdict.tolerance, color="0.9", linewidth=0)
        for row, judged in enumerate(verdict.rules.values()):
            if judged.drift:
                drift, colour = judged.drift, COLOURS[judged.answer]
                panel.plot([drift.low, drift.high], [row, row], color=colour, linewidth=2)
                panel.plot([drift.estimate], [row], color=colour, marker=MARKERS[judged.answer])
            else:
                panel.text(0, row, judged.cause, ha="center", va="center", fontsize="small", color="0.35")
        panel.set_yticks(range(len(verdict.rules)), list(verdict.rules))
        panel.set_ylim(len(verdict.rules) - 0.5, -0.5)
        panel.set_title(title, loc="left", fontsize="medium")
        panel.axvline(0, color="0.6", linewidth=0.8)
    panels[-1].set_xlabel("drift of the best base LR, octaves per doubling (grey: within the tolerance)")
    for answer, colour in COLOURS.items():
        panels[0].plot([], [], color=colour, marker=MARKERS[answer], label=answer)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def report(out: Path, finished: Sequence[Cell]) -> str:
    """The README of what is finished."""
    depth = {f"over layers, matrices start at {start}": over_layers(out, start) for start in STARTS}
    loops = {
        f"over loops, matrices start at {start}, {steps} steps": over_loops(out, start, steps)
        for start, steps in (("0.02", 250), ("0.02·√(768/width)", 250), ("0.02·√(768/width)", 1000))
    }
    verdicts = {title: verdict for title, verdict in (depth | loops).items() if verdict}
    draw(verdicts).savefig(out / "drifts.png", dpi=150)
    seconds = sum(float(pd.read_csv(out / cell.file)["seconds"].sum()) for cell in finished)
    lines = [
        "# How far one learning rate carries",
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        f"Reference experiment (width {ReferenceSize().width}, 16 × 32 bytes a step), {SEEDS} paired seeds, "
        f"{len(OCTAVES)} LRs 0.75 octave apart around {CENTRE}. Over layers N = 1, 250 steps.",
        "",
        "![drifts](drifts.png)",
    ]
    for title, verdict in verdicts.items():
        lines += ["", f"## {title.capitalize()}", "", table(rows_of(verdict))]
    for start in STARTS:
        exponents = movement_exponents(pd.read_csv(out / f"movements-{name_of_start(start)}.csv"))
        lines += ["", f"## How the output moves as L grows, matrices start at {start}", "", table(exponents)]
    lines += [
        "",
        f"{len(finished)} of {len(CELLS)} cells are finished; their runs took {seconds:.0f} s in all,",
        "as long as each lasted, on a machine that others used and that stood still at times.",
        "The small start over loops is reports/sweep/.",
        "Differences are paired by seed, over the sizes at which both rules have an optimum.",
        f"Python {platform.python_version()}, torch {version('torch')}, looptransfer {version('looptransfer')}, "
        f"{platform.machine()}, {os.cpu_count()} cores.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further cell after that time")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for start in STARTS:
        file = arguments.out / f"movements-{name_of_start(start)}.csv"
        if not file.exists():
            movements(start).to_csv(file, index=False)
    for cell in CELLS:
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        if not (arguments.out / cell.file).exists():
            print(cell.file, file=sys.stderr, flush=True)
            cell.run(arguments.out, arguments.workers)
    finished = [cell for cell in CELLS if (arguments.out / cell.file).exists()]
    text = report(arguments.out, finished)
    (arguments.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
