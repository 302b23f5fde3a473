"""How far one learning rate carries: what its drift over loops and over layers depends on.

    python -m benchmarks.transfer [--minutes M] [--out reports/transfer]

Every cell is a sweep of the reference experiment, a file in the folder once it is finished; a cell that stops in the
middle goes on from its ledger. So the same command goes on where the last one ended, and writes the report of what is
finished. `--minutes` begins no further cell after that time.

Two starts: every matrix at 0.02, as the paper has it at width 768, and the matrices of the layers √(768/width) larger,
which gives branches as large beside the embedding as at that width. Over layers, ε is 1/(N·m_L^a) and the branches' LR
falls as m_L^(−b), with m_L = L / 2; the paper has a = b = 1/2 (Table 1), CompleteP a = 1 and b = 0, which is the rule
`completep` but for Adam's eps: the branches' goes as m_L^(−1/2) in all sweeps here.

Beside the sweeps stands what a few steps say: how the movement of the output grows with L where no LR falls (b = 0),
under either a. Its exponent c is the b that would keep the movement the same at every L, so that under another b the
best base LR should move by b − c octaves per doubling.

That holds where one base LR serves all parameters. In the arm “of the branches alone” the LR of embedding, final norm
and head stays at twice the centre of the grid, and only that of the branches is searched. Further arms have another λ,
or keep LR × decay as it is over L, not the decay.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from benchmarks.cells import CENTRE, MORE_SEEDS, SEEDS, Cell, draw_drifts, footer, options, publish, rows_of, run_cells
from benchmarks.paper import enlarge_matrices, paper_gain
from benchmarks.verdict_simulations import table
from looptransfer.optim import DecayPolicy
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.report.figures import plot_curves
from looptransfer.rewrite.plan import Role
from looptransfer.transfer.optimum import t_interval

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "reports" / "transfer"
BASE_LAYERS = 2
OCTAVES = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5)
SMALL, LARGER = "0.02", "0.02·√(768/width)"
STARTS = {SMALL: 1.0, LARGER: paper_gain(ReferenceSize().width)}
FEWEST_DEPTHS = 3
HELD = 2 * CENTRE  # LR of embedding, final norm and head where the search is for the branches' alone
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


@dataclass(frozen=True)
class Arm:
    """A rule over layers: the exponents of m_L in ε and in the branches' LR, both downwards, λ, and what else differs.

    `held`: the LR of all but the branches stays where it is.
    """

    multiplier: float = 0.5
    lr: float = 0.5
    lam: float = 1.0
    held: bool = False
    decay_policy: DecayPolicy = "coefficient"

    @property
    def title(self) -> str:
        """The rule in words."""
        words = {0.0: "0", 0.5: "1/2", 1.0: "1"}
        further = {
            " (the paper)": self == PAPER,
            " (completep)": self == COMPLETEP,
            f", λ = {words.get(self.lam, f'{self.lam:g}')}": self.lam != 1,
            ", of the branches alone": self.held,
            ", LR × decay constant": self.decay_policy == "product",
        }
        return f"ε: {words[self.multiplier]}, LR: {words[self.lr]}" + "".join(w for w, true in further.items() if true)

    @property
    def name(self) -> str:
        """The rule in the name of a file."""
        further = {
            f"-lambda{self.lam:g}": self.lam != 1,
            "-held": self.held,
            "-product": self.decay_policy == "product",
        }
        return f"eps{self.multiplier:g}-lr{self.lr:g}" + "".join(part for part, true in further.items() if true)

    def at(self, layers: int) -> "Arm":
        """The arm that is trained at that depth: at the base depth the exponents and the decay do not matter."""
        return replace(self, multiplier=0.5, lr=0.5, decay_policy="coefficient") if layers == BASE_LAYERS else self

    def optimizer(self, model: nn.Module, lr: float, depth: float) -> torch.optim.Optimizer:
        """AdamW whose LR of the branches falls as m_L^(−lr) where `depth` is m_L."""
        rest = dict.fromkeys(get_args(Role), HELD / lr if self.held else 1.0)
        factor = depth ** (0.5 - self.lr)  # beside the paper's m_L^(−1/2)
        ratio = {**rest, "branch matrix": factor, "branch vector": factor}
        groups = lt.param_groups(
            model, torch.optim.AdamW, lr=lr, weight_decay=0.1, lr_ratio=ratio, decay_policy=self.decay_policy
        )
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))


PAPER, NO_LR_FACTOR, COMPLETEP = Arm(), Arm(lr=0.0), Arm(multiplier=1.0, lr=0.0)
NAMED_RULES = {PAPER: "factored", COMPLETEP: "completep"}
MOVED_ARMS = (NO_LR_FACTOR, COMPLETEP)
ARMS = (
    PAPER,
    COMPLETEP,
    NO_LR_FACTOR,
    Arm(lam=0.5),
    Arm(lam=2.0),
    Arm(held=True),
    Arm(decay_policy="product"),
    Arm(lr=1.0),
    Arm(multiplier=1.0),
    Arm(multiplier=1.0, lr=1.0),
)


def experiment(start: str, layers: int, steps: int, arm: Arm = PAPER) -> lt.Experiment:
    """The reference experiment at a start, a depth, a length, and a rule over layers."""
    reference = lt.reference_experiment(ReferenceSize(layers=layers, steps=steps, held_out=8_192))
    depth = layers / BASE_LAYERS
    return replace(
        reference,
        make_model=Larger(reference.make_model, STARTS[start]),
        base_layers=BASE_LAYERS,
        lam=arm.lam * depth ** (0.5 - arm.multiplier),
        optimizer=partial(arm.optimizer, depth=depth),
        settings={**reference.settings, "start": start},
    )


def name_of_start(start: str) -> str:
    """Its name in that of a file."""
    return "larger" if STARTS[start] > 1 else "small"


@dataclass(frozen=True)
class OverLayers:
    """Sweeps over L, under every arm."""

    start: str
    steps: int
    arms: tuple[Arm, ...]
    depths: tuple[int, ...]
    loops: int = 1
    seeds: int = SEEDS
    candidates: tuple[Arm, ...] = ()  # what was looked at with MORE_SEEDS, after fewer

    @property
    def title(self) -> str:
        """The sweeps in words."""
        return f"over layers, N = {self.loops}, {self.steps} steps, start {self.start}"

    def cell(self, arm: Arm, layers: int) -> Cell:
        """The sweep of an arm at a depth."""
        trained = arm.at(layers)
        name = f"{name_of_start(self.start)}-L{layers}-{trained.name}-{self.steps}-N{self.loops}"
        seeds = MORE_SEEDS if trained in self.candidates else self.seeds
        make_experiment = partial(experiment, self.start, layers, self.steps, trained)
        return Cell(name, make_experiment, (self.loops,), ("factored",), OCTAVES, seeds=seeds)

    def cells(self) -> Iterable[Cell]:
        """All sweeps, those that several arms share once."""
        by_name = {cell.name: cell for arm in self.arms for cell in (self.cell(arm, n) for n in self.depths)}
        return by_name.values()

    def verdict(self, out: Path) -> lt.Verdict | None:
        """The verdict over L of every arm that is made at three depths or more, the paper's first."""
        return self._judged(out, {arm: arm.title for arm in self.arms})

    def picture(self, out: Path) -> str:
        """The file of a picture of the candidates' curves; empty where there are none."""
        verdict = self._judged(out, {arm: NAMED_RULES[arm] for arm in self.candidates})
        name = f"curves-N{self.loops}-{self.steps}.png"
        if verdict is None:
            return ""
        plot_curves(verdict).savefig(out / name, dpi=150)
        return name

    def _judged(self, out: Path, names: Mapping[Arm, str]) -> lt.Verdict | None:
        tables = []
        for arm, name in names.items():
            files = [self.cell(arm, layers).table(out) for layers in self.depths]
            made = [file for file in files if file.exists()]
            if len(made) >= FEWEST_DEPTHS:
                tables += [pd.read_csv(file).assign(rule=name) for file in made]
        if not any(frame["rule"].iloc[0] == names[PAPER] for frame in tables):
            return None
        return lt.check(pd.concat(tables, ignore_index=True), names[PAPER], axis="layers")


class OverLoops:
    """A sweep over N from the larger start, with the 1/√N arm beside the rule."""

    title = f"over loops, 250 steps, start {LARGER}"

    def cells(self) -> Iterable[Cell]:
        """The sweep."""
        name = f"larger-L{BASE_LAYERS}-{PAPER.name}-250-N{max(LOOPS)}"
        return [Cell(name, partial(experiment, LARGER, BASE_LAYERS, 250), LOOPS, ("factored", "sqrt"), OCTAVES)]

    def verdict(self, out: Path) -> lt.Verdict | None:
        """The verdict over N."""
        (cell,) = self.cells()
        return lt.check(pd.read_csv(cell.table(out)), "factored") if cell.finished(out) else None


STUDIES = (
    OverLoops(),
    OverLayers(LARGER, 250, ARMS, (2, 4, 8, 16), seeds=4, candidates=(PAPER, COMPLETEP)),
    OverLayers(LARGER, 250, (PAPER, COMPLETEP), (2, 4, 8, 16), loops=2, seeds=4, candidates=(PAPER, COMPLETEP)),
    OverLayers(LARGER, 1000, (PAPER, NO_LR_FACTOR, COMPLETEP), (2, 4, 8), candidates=(PAPER, COMPLETEP)),
    OverLayers(SMALL, 250, (PAPER, NO_LR_FACTOR, Arm(lr=1.0), COMPLETEP), (2, 4, 8)),
)

CELLS = [cell for study in STUDIES for cell in study.cells()]


def movements(start: str) -> pd.DataFrame:
    """How far steps of all parameters, or of the branches alone, move the output of a probe batch, by a, L and seed."""
    rows = []
    for arm, layers, seed, moved in product(MOVED_ARMS, MOVED_DEPTHS, range(SEEDS), ("branches", "all")):
        trained = experiment(start, layers, 250, arm)
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
                row = {"a": arm.multiplier, "moved": moved, "steps": step, "layers": layers, "seed": seed}
                rows.append({**row, "change": change})
    return pd.DataFrame(rows)


def movement_exponents(frame: pd.DataFrame) -> pd.DataFrame:
    """The exponent in L of every movement, with its interval over seeds."""
    rows = []
    for (a, moved, steps), group in frame.groupby(["a", "moved", "steps"]):
        logs = np.log2(group.pivot(index="layers", columns="seed", values="change"))
        slopes = np.polyfit(np.log2(logs.index.to_numpy(float)), logs.to_numpy(), 1)[0]
        exponent = t_interval(pd.Series(slopes, logs.columns), 0.90)
        rows.append({"a": f"{a:g}", "moved by": moved, "steps": steps, "c": exponent.text(2)})
    return pd.DataFrame(rows)


def flattest(verdict: lt.Verdict) -> str:
    """Which exponents move the optimum least over L, and which end lowest at the largest L."""
    means = verdict.runs.groupby(["rule", "layers", "lr"])["loss"].mean()
    deepest = means.xs(int(verdict.runs["layers"].max()), level="layers").groupby(level=0).min()
    flat = [rule for rule, judged in verdict.rules.items() if judged.answer == "FLAT"]
    lowest = str(deepest.idxmin())
    sentences = [f"FLAT: {'; '.join(flat) or 'none'}.", f"Lowest at the largest L: {deepest[lowest]:.3f}, {lowest}."]
    drifts = {rule: judged.drift for rule, judged in verdict.rules.items() if judged.drift and rule in deepest}
    if drifts:
        least = min(drifts, key=lambda rule: abs(drifts[rule].estimate))
        moved = f"The optimum moves least, {drifts[least].text(2)}, with {least}, whose best loss there is "
        sentences.append(f"{moved}{deepest[least]:.3f}.")
    return " ".join(sentences)


def over_loops_from_small() -> lt.Verdict:
    """The verdict over N from the small start, of another report's sweep."""
    runs = pd.read_csv(ROOT / "reports" / "sweep" / "results.csv")
    return lt.check(runs[runs["loops"].isin(LOOPS) & (runs["seed"] < SEEDS)], "factored")


def report(out: Path, finished: Sequence[Cell]) -> str:
    """The README of what is finished."""
    made = {study.title: verdict for study in STUDIES if (verdict := study.verdict(out))}
    verdicts = {f"over loops, 250 steps, start {SMALL}": over_loops_from_small(), **made}
    pictures = {study.title: study.picture(out) for study in STUDIES if isinstance(study, OverLayers)}
    draw_drifts(verdicts).savefig(out / "drifts.png", dpi=150)
    lines = [
        "# How far one learning rate carries",
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        f"Reference experiment (width {ReferenceSize().width}, 16 × 32 bytes a step), paired seeds, {len(OCTAVES)} LRs "
        f"0.75 octave apart around {CENTRE}, the grid two or four LRs longer where the best was its last.",
        "",
        "![drifts](drifts.png)",
    ]
    for title, verdict in verdicts.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", table(rows_of(verdict))]
        if verdict.axis == "layers":
            lines += ["", flattest(verdict)]
        if pictures.get(title):
            lines += ["", f"![loss over LR at every L]({pictures[title]})"]
    for start in STARTS:
        exponents = movement_exponents(pd.read_csv(out / f"movements-{name_of_start(start)}.csv"))
        lines += ["", f"## How the output moves as L grows, start {start}", "", table(exponents)]
    lines += [
        "",
        f"{len(finished)} of {len(CELLS)} sweeps are finished. The small start over loops is reports/sweep/.",
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
    finished = run_cells(CELLS, arguments.out, arguments.minutes, arguments.workers)
    publish(arguments.out, report(arguments.out, finished))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
