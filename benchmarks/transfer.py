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

That holds where one base LR serves all parameters. In the arm “of the branches alone” the LR of embedding, final norm
and head stays at twice the centre of the grid, and only that of the branches is searched.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

import looptransfer as lt
from benchmarks.cells import CENTRE, SEEDS, Cell, draw_drifts, footer, options, publish, rows_of, run_cells
from benchmarks.paper import enlarge_matrices, paper_gain
from benchmarks.verdict_simulations import table
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.rewrite.plan import Role
from looptransfer.rules import Rule
from looptransfer.transfer.optimum import t_interval

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "reports" / "transfer"
BASE_LAYERS = 2
OCTAVES = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5)
STARTS = {"0.02": 1.0, "0.02·√(768/width)": paper_gain(ReferenceSize().width)}
EXPONENTS = tuple(product((0.5, 1.0), (0.0, 0.5, 1.0)))  # of ε and of the LR, over layers
PAPER = (0.5, 0.5)
HELD = 2 * CENTRE  # LR of embedding, final norm and head where the search is for the branches' alone
DEPTHS = (2, 4, 8)
MOVED_DEPTHS, MOVED_STEPS, MOVED_LR = (2, 4, 8, 16), (1, 10, 30), CENTRE / 8  # of the movement of the output
LOOPS = (1, 4, 16)


@dataclass(frozen=True)
class Larger:
    """`make_model` with the matrices of the looped layers `gain` times as large at the start."""

    make_model: Callable[[int], nn.Module]
    gain: float

    def __call__(self, loops: int) -> nn.Module:
        model = self.make_model(loops)
        enlarge_matrices(model.get_submodule("layers"), self.gain)
        return model


def adamw(model: nn.Module, lr: float, factor: float, held: bool) -> torch.optim.Optimizer:
    """AdamW whose LR of the branches has a further factor; `held`: the LR of the rest stays where it is."""
    rest = dict.fromkeys(get_args(Role), HELD / lr if held else 1.0)
    ratio = {**rest, "branch matrix": factor, "branch vector": factor}
    groups = lt.param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=0.1, lr_ratio=ratio)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def experiment(
    start: str, layers: int, steps: int, exponents: tuple[float, float] = PAPER, held: bool = False
) -> lt.Experiment:
    """The reference experiment at a start, a depth, a length, and exponents of depth in ε and in the LR."""
    reference = lt.reference_experiment(ReferenceSize(layers=layers, steps=steps, held_out=8_192))
    depth, (of_multiplier, of_lr) = layers / BASE_LAYERS, exponents
    return replace(
        reference,
        make_model=Larger(reference.make_model, STARTS[start]),
        base_layers=BASE_LAYERS,
        lam=depth ** (0.5 - of_multiplier),
        optimizer=partial(adamw, factor=depth ** (0.5 - of_lr), held=held) if held or of_lr != 0.5 else None,
        settings={**reference.settings, "start": start, "exponents": list(exponents), "held": held},
    )


def name_of_start(start: str) -> str:
    """Its name in that of a file."""
    return "larger" if STARTS[start] > 1 else "small"


@dataclass(frozen=True)
class Setting:
    """What is trained in one sweep."""

    start: str
    layers: int
    steps: int
    exponents: tuple[float, float]
    loops: tuple[int, ...]
    rules: tuple[Rule, ...]
    held: bool = False

    @property
    def cell(self) -> Cell:
        """The sweep."""
        of_multiplier, of_lr = self.exponents
        size, exponents = f"L{self.layers}", f"eps{of_multiplier:g}-lr{of_lr:g}"
        name = f"{name_of_start(self.start)}-{size}-{exponents}-{self.steps}-N{max(self.loops)}"
        name += "-held" if self.held else ""
        trained = partial(experiment, self.start, self.layers, self.steps, self.exponents, self.held)
        return Cell(name, trained, self.loops, self.rules, OCTAVES)


def depth_settings(start: str) -> list[Setting]:
    """L = 2, 4, 8 at N = 1 under each pair of exponents; at L = 2 they are all one, but where LRs are held."""
    settings = [Setting(start, BASE_LAYERS, 250, PAPER, (1,), ("factored",))]
    settings += [Setting(start, layers, 250, PAPER, (1,), ("factored",), held=True) for layers in DEPTHS]
    pairs = sorted(EXPONENTS, key=lambda pair: pair != PAPER)
    return settings + [
        Setting(start, layers, 250, pair, (1,), ("factored",)) for pair in pairs for layers in DEPTHS[1:]
    ]


def loop_settings(steps: int) -> list[Setting]:
    """N = 1, 4, 16 from the larger start, with the 1/√N arm beside the rule."""
    return [Setting("0.02·√(768/width)", 2, steps, PAPER, LOOPS, ("factored", "sqrt"))]


SETTINGS = [*loop_settings(250), *depth_settings("0.02·√(768/width)"), *depth_settings("0.02"), *loop_settings(1000)]


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


def name_of(exponents: tuple[float, float], held: bool = False) -> str:
    """The exponents in words."""
    words = {0.0: "0", 0.5: "1/2", 1.0: "1"}
    paper = ", of the branches alone" if held else " (the paper)" if exponents == PAPER else ""
    return f"ε: {words[exponents[0]]}, LR: {words[exponents[1]]}{paper}"


def over_layers(out: Path, start: str) -> lt.Verdict | None:
    """The verdict over L of every pair of exponents that is finished, the paper's first."""
    files_of = {(s.exponents, s.held, s.layers): s.cell.table(out) for s in depth_settings(start)}
    tables = []
    for pair, held in [(PAPER, True), *((pair, False) for pair in EXPONENTS)]:
        files = [files_of[pair if held else PAPER, held, BASE_LAYERS], *(files_of[pair, held, n] for n in DEPTHS[1:])]
        if all(file.exists() for file in files):
            tables += [pd.read_csv(file).assign(rule=name_of(pair, held)) for file in files]
    if not any(frame["rule"].iloc[0] == name_of(PAPER) for frame in tables):
        return None
    return lt.check(pd.concat(tables, ignore_index=True), name_of(PAPER), axis="layers")


def over_loops(out: Path, start: str, steps: int) -> lt.Verdict | None:
    """The verdict over N at a start and a length."""
    if start == "0.02" and steps == 250:
        runs = pd.read_csv(ROOT / "reports" / "sweep" / "results.csv")
        return lt.check(runs[runs["loops"].isin(LOOPS) & (runs["seed"] < SEEDS)], "factored")
    tables = [setting.cell.table(out) for setting in loop_settings(steps) if setting.start == start]
    files = [file for file in tables if file.exists()]
    return lt.check(pd.read_csv(files[0]), "factored") if files else None


def flattest(verdict: lt.Verdict) -> str:
    """Which exponents move the optimum least over L, and which end lowest at the largest L."""
    means = verdict.runs.groupby(["rule", "layers", "lr"])["loss"].mean()
    deepest = means.xs(int(verdict.runs["layers"].max()), level="layers").groupby(level=0).min()
    flat = [rule for rule, judged in verdict.rules.items() if judged.answer == "FLAT"]
    lowest = str(deepest.idxmin())
    sentences = [f"FLAT: {'; '.join(flat) or 'none'}.", f"Lowest at the largest L: {deepest[lowest]:.3f}, {lowest}."]
    drifts = {rule: judged.drift for rule, judged in verdict.rules.items() if judged.drift}
    if drifts:
        least = min(drifts, key=lambda rule: abs(drifts[rule].estimate))
        moved = f"The optimum moves least, {drifts[least].text(2)}, with {least}, whose best loss there is "
        sentences.append(f"{moved}{deepest[least]:.3f}.")
    return " ".join(sentences)


def report(out: Path, finished: Sequence[Cell]) -> str:
    """The README of what is finished."""
    depth = {f"over layers, matrices start at {start}": over_layers(out, start) for start in STARTS}
    loops = {
        f"over loops, matrices start at {start}, {steps} steps": over_loops(out, start, steps)
        for start, steps in (("0.02", 250), ("0.02·√(768/width)", 250), ("0.02·√(768/width)", 1000))
    }
    verdicts = {title: verdict for title, verdict in (depth | loops).items() if verdict}
    draw_drifts(verdicts).savefig(out / "drifts.png", dpi=150)
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
        if verdict.axis == "layers":
            lines += ["", flattest(verdict)]
    for start in STARTS:
        exponents = movement_exponents(pd.read_csv(out / f"movements-{name_of_start(start)}.csv"))
        lines += ["", f"## How the output moves as L grows, matrices start at {start}", "", table(exponents)]
    lines += [
        "",
        f"{len(finished)} of {len(SETTINGS)} sweeps are finished. The small start over loops is reports/sweep/.",
        "Differences are paired by seed, over the sizes at which both rules have an optimum.",
        *footer(pd.read_csv(cell.table(out)) for cell in finished),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = options(__doc__, REPORT).parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for start in STARTS:
        file = arguments.out / f"movements-{name_of_start(start)}.csv"
        if not file.exists():
            movements(start).to_csv(file, index=False)
    cells = [setting.cell for setting in SETTINGS]
    finished = run_cells(cells, arguments.out, arguments.minutes, arguments.workers)
    publish(arguments.out, report(arguments.out, finished))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
