"""One base LR from the smallest model to 32 × the loops, 8 × the layers and 4 × the width, all at once.

    python -m benchmarks.corner [--minutes M] [--scale gpu] [--out reports/transfer/corner]

The base LR is tuned at N = 1, L = 1, width 32, and carried along each axis, to a point on the way and to the far
corner: ε = 1/(N√L), the paper's factors over L, μP over widths, nothing tuned again. At every point the LRs around it
are trained as well, so that what the carried LR loses can be told: its regret, by the fitted optimum of that point.
Over N stands the `unscaled` control. The smallest model is trained four times as long besides, which tells how far the
horizon alone moves the LR.

A killed run goes on from its ledgers, and `--minutes` begins no further point after that time. `--scale gpu` is the
same at width 256 to 1024, with longer text and training, on the GPUs that torch sees.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import looptransfer as lt
from benchmarks.cells import SEEDS, Cell, draw_losses, footer, options, publish, run_cells
from benchmarks.paper import enlarge_matrices, paper_gain
from benchmarks.verdict_simulations import table
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.rules import Rule
from looptransfer.transfer.optimum import Interval, t_interval
from looptransfer.transfer.verdict import RuleVerdict

REPORT = Path(__file__).parent.parent / "reports" / "transfer" / "corner"
HEAD = 16  # width of a head: the number of heads grows with the width
GOAL = 0.01  # of the loss, at the far corner
TUNING_SEEDS = (100, 101, 102)
FAR_SEEDS = 6  # where three had left it open
FAR = "the far corner"


@dataclass(frozen=True)
class Scale:
    """Sizes of the study; `base` is (N, L, width) of the smallest model."""

    base: tuple[int, int, int] = (1, 1, 32)
    growth: tuple[int, int, int] = (32, 8, 4)
    halfway: tuple[int, int, int] = (8, 4, 2)
    batch: int = 8
    sequence: int = 32
    steps: int = 100
    longer: int = 4

    @property
    def far(self) -> tuple[int, int, int]:
        """The far corner."""
        return self.grown(self.growth)

    def grown(self, factors: tuple[int, int, int]) -> tuple[int, int, int]:
        """N, L and width so many times the smallest ones."""
        n, layers, width = (size * factor for size, factor in zip(self.base, factors, strict=True))
        return n, layers, width


SCALES = {"cpu": Scale(), "gpu": Scale(base=(1, 2, 256), batch=32, sequence=256, steps=2000)}
OCTAVES, OCTAVES_FAR = (-1.5, -0.75, 0.0, 0.75, 1.5), (-0.75, 0.0, 0.75)


@dataclass(frozen=True)
class Grown:
    """loop count -> a rewritten decoder of so many layers and such a width, by μP from the base width."""

    layers: int
    width: int
    base_width: int
    base_layers: int

    def __call__(self, loops: int) -> nn.Module:
        model = self.decoder(self.width, loops)
        tokens = torch.zeros(2, 8, dtype=torch.long)
        lt.parametrize(model, tokens, base=self.decoder(self.base_width, loops), base_layers=self.base_layers)
        return model

    def decoder(self, width: int, loops: int) -> nn.Module:
        """The model before it is rewritten, its branches as large beside the embedding as at the paper's width."""
        model = lt.LoopedDecoder(width=width, heads=width // HEAD, layers=self.layers, loops=loops, tied_head=False)
        enlarge_matrices(model.layers, paper_gain(self.base_width))
        return model


def experiment(scale: Scale, layers: int, width: int, steps: int) -> lt.Experiment:
    """The reference experiment at a depth and a width, at the base depth and width of the scale."""
    _, base_layers, base_width = scale.base
    size = ReferenceSize(
        width=width,
        heads=width // HEAD,
        layers=layers,
        sequence=scale.sequence,
        batch=scale.batch,
        steps=steps,
        held_out=8_192,
    )
    reference = lt.reference_experiment(size)
    return replace(reference, make_model=Grown(layers, width, base_width, base_layers), base_layers=base_layers)


@dataclass(frozen=True)
class Point:
    """Where the carried LR is tried."""

    title: str
    loops: int
    layers: int
    width: int
    steps: int
    octaves: tuple[float, ...] = OCTAVES
    rules: tuple[Rule, ...] = ("factored",)
    extensions: int = 2
    seeds: int = SEEDS

    def cell(self, scale: Scale, lr: float) -> Cell:
        """Its sweep."""
        name = f"N{self.loops}-L{self.layers}-width{self.width}-{self.steps}"
        trained = experiment(scale, self.layers, self.width, self.steps)
        return Cell(
            name, lambda: trained, (self.loops,), self.rules, self.octaves, lr, self.seeds, extensions=self.extensions
        )


def points(scale: Scale) -> Iterator[Point]:
    """The smallest model, the axes, halfway and the far corner, each of growing cost."""
    loops, layers, width = scale.growth
    yield Point("the smallest", *scale.base, scale.steps)
    yield Point("trained longer", *scale.base, scale.longer * scale.steps)
    yield Point("wider", *scale.grown((1, 1, width)), scale.steps)
    yield Point("deeper", *scale.grown((1, layers, 1)), scale.steps)
    yield Point("more loops", *scale.grown((loops, 1, 1)), scale.steps, rules=("factored", "unscaled"))
    yield Point("halfway", *scale.grown(scale.halfway), scale.steps)
    yield Point(FAR, *scale.far, scale.steps, OCTAVES_FAR, extensions=1, seeds=FAR_SEEDS)  # a run there takes minutes


def tuned(scale: Scale, out: Path, workers: int) -> float:
    """The base LR, tuned at the smallest corner with seeds of its own."""
    stored = out / "tuned.json"
    if not stored.exists():
        loops, layers, width = scale.base
        (out / "tuning").mkdir(parents=True, exist_ok=True)
        trained = experiment(scale, layers, width, scale.steps)
        result = lt.tune(trained, loops=loops, seeds=TUNING_SEEDS, ledger=out / "tuning" / "ledger.db", workers=workers)
        stored.write_text(json.dumps({"lr": result.lr, "runs": len(result.results)}) + "\n")
    return float(json.loads(stored.read_text())["lr"])


def judge(out: Path, cell: Cell, lr: float) -> lt.Verdict:
    """What the carried LR loses at a point."""
    return lt.check(pd.read_csv(cell.table(out), float_precision="round_trip"), "factored", transferred_lr=lr)


def losses_at(judged: RuleVerdict, lr: float) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """The losses of a point, those at the carried LR, and those at the LR of the lowest mean."""
    (losses,) = judged.tables.values()
    carried = losses.loc[losses.index[abs(losses.index - math.log2(lr)).argmin()]]
    return losses, carried, losses.loc[losses.mean(axis=1).idxmin()]


def regret_of(judged: RuleVerdict, lr: float) -> Interval:
    """What the carried LR loses, in nats: by the fitted optimum, or else by the grid."""
    _, carried, lowest = losses_at(judged, lr)
    return judged.regret or t_interval(carried - lowest, 0.9)


def share_of(judged: RuleVerdict, lr: float) -> Interval:
    """The same in percent of the loss at the carried LR."""
    _, carried, _ = losses_at(judged, lr)
    return Interval(*(end * 100 / carried.mean() for end in astuple(regret_of(judged, lr))))


def row_of(point: Point, verdict: lt.Verdict, rule: str, lr: float) -> dict[str, str]:
    """The numbers of a point under a rule."""
    judged = verdict.rules[rule]
    (optimum,), center = judged.optima, math.log2(lr)
    losses, carried, lowest = losses_at(judged, lr)
    best, regret = optimum.log2_lr, regret_of(judged, lr)
    at_the_edge = lowest.name in {losses.index[0], losses.index[-1]}
    how = "" if judged.regret else " by the grid, or more: the best LR is its last" if at_the_edge else " by the grid"
    return {
        "point": point.title if rule == "factored" else f"{point.title}, {rule}",
        "N": str(point.loops),
        "L": str(point.layers),
        "width": str(point.width),
        "steps": str(point.steps),
        "best LR, octaves from the carried": f"none: {optimum.censored}"
        if best is None
        else Interval(best.estimate - center, best.low - center, best.high - center).text(2),
        "loss at the carried LR": f"{carried.mean():.3f}",
        "lowest mean loss": f"{lowest.mean():.3f}",
        "regret": f"{regret.text(3)}{how}",
        "regret, % of the loss": share_of(judged, lr).text(2),
    }


def draw(verdicts: dict[str, lt.Verdict], lr: float) -> Figure:
    """Loss against LR at every point, less the lowest mean of the point."""
    columns = 4
    figure = Figure(figsize=(10.5, 2.6 * math.ceil(len(verdicts) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(verdicts) / columns), columns, squeeze=False).ravel()
    for panel, (title, verdict) in zip(panels, verdicts.items(), strict=False):
        draw_losses(panel, verdict.judged)
        panel.axvline(lr, color="0.4", linestyle="--", linewidth=1)
        panel.set_title(title, loc="left", fontsize="medium")
        panel.set_xlabel("base LR")
    for panel in panels[len(verdicts) :]:
        panel.remove()
    panels[0].set_ylabel("held-out loss, nats")
    return figure


def first_line(share: Interval | None, scale: Scale) -> str:
    """The answer of the study; `share`: of the loss that the carried LR loses at the far corner, in percent."""
    loops, layers, width = scale.far
    if share is None:
        return f"The far corner (N = {loops}, L = {layers}, width {width}) is not trained yet."
    goal = 100 * GOAL
    estimate = f"by the estimate the goal of {goal:.0f} % is {'met' if share.estimate <= goal else 'missed'}"
    agrees = share.high <= goal or share.low > goal
    settled = "and the interval agrees" if agrees else "which so few seeds do not settle"
    return (
        f"At N = {loops}, L = {layers}, width {width} the LR that was tuned at the smallest model loses "
        f"{share.text(2)} % of the loss: {estimate}, {settled}."
    )


def report(scale: Scale, out: Path, finished: dict[Point, Cell], lr: float) -> str:
    """The README of the points that are finished."""
    verdicts = {point: judge(out, cell, lr) for point, cell in finished.items()}
    rows = pd.DataFrame([row_of(p, verdict, rule, lr) for p, verdict in verdicts.items() for rule in verdict.rules])
    draw({point.title: verdict for point, verdict in verdicts.items()}, lr).savefig(out / "corner.png", dpi=150)
    tables = [pd.read_csv(cell.table(out)) for cell in finished.values()]
    tokens = scale.batch * scale.sequence * scale.steps
    lines = [
        "# How far one base LR carries, over loops, layers and width at once",
        "",
        first_line(next((share_of(v.judged, lr) for p, v in verdicts.items() if p.title == FAR), None), scale),
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        f"Base LR {lr:.4g}, by {json.loads((out / 'tuned.json').read_text())['runs']} runs of seeds "
        f"{', '.join(map(str, TUNING_SEEDS))}. {SEEDS} paired seeds from 0 up, {FAR_SEEDS} at the far corner, "
        f"{tokens:,} tokens a training ({scale.steps} steps of {scale.batch} × {scale.sequence} bytes), {scale.longer} "
        f"times as many where it says {scale.longer * scale.steps} steps. 90 % intervals over seeds; regret in nats, "
        "by the fitted optimum, or by the best LR of the grid where there is none.",
        "",
        "![loss over LR at every point](corner.png)",
        "",
        "Shaded: the range of the seeds; starred: the fitted optimum; dashed: the carried LR; ×: a seed diverges.",
        "",
        table(rows),
        "",
        *footer(tables),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, REPORT)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    out = arguments.out if arguments.scale == "cpu" else arguments.out / "gpu"
    if arguments.scale == "gpu" and not torch.cuda.is_available():
        parser.error("--scale gpu needs a CUDA device and torch sees none; use --scale cpu")
    lr = tuned(scale, out, arguments.workers)
    cells = {point: point.cell(scale, lr) for point in points(scale)}
    made = run_cells(list(cells.values()), out, arguments.minutes, arguments.workers)
    publish(out, report(scale, out, {point: cell for point, cell in cells.items() if cell in made}, lr))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
