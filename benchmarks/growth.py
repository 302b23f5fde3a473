"""A loop count that grows in training, 1 → 2 → 4 → 8 at one LR, against N = 8 throughout.

    python benchmarks/growth.py

The reference model and corpus (2 layers, width 32, bytes), AdamW, warm-up – stable – linear decay. The LR is chosen at
N = 1 on seeds of its own and used everywhere. When N grows, `rescale` changes ε in the live model.
Arms share initialisation and data by seed. Beside "8 throughout" stand the same with fewer steps, so that FLOPs can be
compared with both runs decayed to the end. FLOPs of a step are counted by torch at every N. Writes reports/growth/;
finished runs are kept in curves.csv and not repeated. About 20 minutes on one core.
"""

import argparse
import csv
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import looptransfer as lt
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.transfer.optimum import t_interval

COLUMNS = ["arm", "seed", "lr", "step", "loops", "tokens", "flops", "loss"]
WARMUP, DECAY = 0.05, 0.2  # shares of the steps
REFERENCE = "8 throughout"
Schedule = Mapping[float, int]  # from this share of the steps on, so many loops
GROWN: Schedule = {0.0: 1, 0.15: 2, 0.30: 4, 0.55: 8}
LATE: Schedule = {0.0: 1, 0.25: 2, 0.50: 4, 0.75: 8}


@dataclass(frozen=True)
class Arm:
    """A way to spend a budget: the loop counts over time, and the share of the full number of steps."""

    schedule: Schedule
    share: float = 1.0


ARMS = {
    REFERENCE: Arm({0.0: 8}),
    "8, 65 % of the steps": Arm({0.0: 8}, 0.645),
    "8, 49 % of the steps": Arm({0.0: 8}, 0.49),
    "grown": Arm(GROWN),
    "grown late": Arm(LATE),
}
COLOURS = dict(zip(ARMS, ["#0072B2", "#56B4E9", "#9AD0F0", "#D55E00", "#009E73"], strict=True))


@dataclass(frozen=True)
class Scale:
    """Sizes of the comparison."""

    size: ReferenceSize
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    tuning_seeds: tuple[int, ...] = (100, 101)
    evaluations: int = 20


def lr_share(step: int, steps: int) -> float:
    """Warm-up – stable – linear decay to zero."""
    return min(1.0, (step + 1) / (WARMUP * steps), (steps - step) / (DECAY * steps))


def loops_at(schedule: Schedule, progress: float) -> int:
    return schedule[max(start for start in schedule if start <= progress)]


def train(scale: Scale, name: str, arm: Arm, seed: int, lr: float) -> Iterator[dict[str, object]]:
    """One training; rows of the held-out loss over it."""
    experiment, size = lt.reference_experiment(scale.size), scale.size
    steps = round(size.steps * arm.share)
    torch.manual_seed(seed)
    model = experiment.make_model(loops_at(arm.schedule, 0.0))
    held_out, batches = list(experiment.held_out()), experiment.batches(seed)
    example = held_out[0][0][:1]
    lt.parametrize(model, example, base_layers=size.layers)
    optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=0.1))
    flops, cost = 0.0, {n: flops_of_step(scale, n) for n in set(arm.schedule.values())}
    every = max(1, steps // scale.evaluations)
    for step, (inputs, targets) in enumerate(islice(batches, steps)):
        loops = loops_at(arm.schedule, step / steps)
        if loops != model.loops:
            model.loops = loops
            lt.rescale(model, example)
        lt.set_lr(optimizer, lr * lr_share(step, steps))
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        flops += cost[loops]
        if (step + 1) % every == 0 or step + 1 == steps:
            tokens, loss = (step + 1) * size.batch * size.sequence, loss_of(model, held_out)
            yield dict(zip(COLUMNS, [name, seed, lr, step + 1, loops, tokens, flops, loss], strict=True))


def loss_of(model: nn.Module, held_out: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in held_out]
    return float(np.mean(losses))


def flops_of_step(scale: Scale, loops: int) -> float:
    """FLOPs of a forward and backward at N."""
    experiment = lt.reference_experiment(scale.size)
    inputs, targets = next(experiment.batches(0))
    model = experiment.make_model(loops)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    return float(counter.get_total_flops())


# -- runs


class Table:
    """The finished runs, in a CSV file that outlives an interruption."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")

    def read(self) -> pd.DataFrame:
        return pd.read_csv(self.path)

    def run(self, scale: Scale, name: str, arm: Arm, seed: int, lr: float) -> None:
        table = self.read()
        if ((table["arm"] == name) & (table["seed"] == seed) & np.isclose(table["lr"], lr)).any():
            return
        rows = list(train(scale, name, arm, seed, lr))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
        print(f"{name:22} seed {seed} LR {lr:.4g}: {rows[-1]['loss']:.4f}", flush=True)


def measure(scale: Scale, out: Path) -> None:
    table = Table(out / "curves.csv")
    for seed in scale.tuning_seeds:
        for lr in scale.lrs:
            table.run(scale, "tuning, N = 1", Arm({0.0: 1}), seed, lr)
    lr = tuned_lr(table.read())
    for seed in scale.seeds:
        for name, arm in ARMS.items():
            table.run(scale, name, arm, seed, lr)


def tuned_lr(table: pd.DataFrame) -> float:
    """The LR with the lowest mean loss at N = 1."""
    tuning = final(table[table["arm"] == "tuning, N = 1"])
    return float(tuning.groupby("lr")["loss"].mean().idxmin())


def final(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("step").groupby(["arm", "seed", "lr"], as_index=False).last()


# -- the report


def report(scale: Scale, out: Path, seconds: float) -> None:
    table = pd.read_csv(out / "curves.csv")
    lr = tuned_lr(table)
    runs = table[table["arm"].isin(list(ARMS)) & np.isclose(table["lr"], lr)]
    draw(runs).savefig(out / "growth.png", dpi=130)
    (out / "README.md").write_text(words(scale, table, final(runs), lr, seconds))


def draw(runs: pd.DataFrame) -> Figure:
    """Held-out loss against tokens and against FLOPs, mean over seeds with their range."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, x, label in zip(
        figure.subplots(1, 2, sharey=True), ("tokens", "flops"), ("tokens", "FLOPs"), strict=True
    ):
        for name in ARMS:
            of_arm = runs[runs["arm"] == name].groupby("step").agg({x: "mean", "loss": ["mean", "min", "max"]})
            along, loss, colour = of_arm[x, "mean"], of_arm["loss"], COLOURS[name]
            axis.fill_between(along, loss["min"], loss["max"], color=colour, alpha=0.2)
            axis.plot(along, loss["mean"], color=colour, label=name)
        axis.set(xlabel=label, xscale="log")
        axis.grid(alpha=0.25)
    lowest = runs["loss"].min()
    axis.set_ylim(lowest - 0.03, lowest + 0.8)
    figure.axes[0].set_ylabel("held-out loss (nats a byte)")
    axis.legend(frameon=False)
    return figure


def words(scale: Scale, table: pd.DataFrame, ends: pd.DataFrame, lr: float, seconds: float) -> str:
    by_arm = {name: ends[ends["arm"] == name].set_index("seed").sort_index() for name in ARMS}
    full = by_arm[REFERENCE]
    lines = ["| arm | tokens | FLOPs | share of FLOPs | final loss | less loss of 8 throughout, paired by seed |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, arm in by_arm.items():
        share = arm["flops"].mean() / full["flops"].mean()
        lines.append(
            f"| {name} | {arm['tokens'].iloc[0]:,} | {arm['flops'].iloc[0]:.3g} | {share:.0%} "
            f"| {arm['loss'].mean():.4f} | {'' if name == REFERENCE else paired(arm['loss'], full['loss'])} |"
        )
    equal = [
        f"- {grown} against {fixed} (equal FLOPs to {gap(by_arm[grown], by_arm[fixed])}): "
        f"{paired(by_arm[grown]['loss'], by_arm[fixed]['loss'])} nats"
        for grown, fixed in (("grown", "8, 65 % of the steps"), ("grown late", "8, 49 % of the steps"))
    ]
    tuning = final(table[table["arm"] == "tuning, N = 1"]).groupby("lr")["loss"].mean()
    tuned = ", ".join(f"{value:.4g}: {loss:.4f}" for value, loss in tuning.items())
    return TEXT.format(
        versions=f"looptransfer of this commit, torch {torch.__version__}, Python {sys.version.split()[0]}",
        size=scale.size,
        seeds=", ".join(map(str, scale.seeds)),
        tuning_seeds=", ".join(map(str, scale.tuning_seeds)),
        seconds=f"{seconds:.0f} s",
        lr=f"{lr:.4g}",
        tuned=tuned,
        table="\n".join(lines),
        single=f"{tuning.min():.4f}",
        equal="\n".join(equal),
        saved="\n".join(f"- {name}: {saving(by_arm, name)}" for name in ("grown", "grown late")),
        answer=answer(by_arm),
    )


def gap(first: pd.DataFrame, second: pd.DataFrame) -> str:
    return f"{abs(first['flops'].mean() / second['flops'].mean() - 1):.1%}"


def paired(losses: pd.Series, others: pd.Series) -> str:
    interval = t_interval(losses - others, 0.90)
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def saving(by_arm: dict[str, pd.DataFrame], name: str) -> str:
    """FLOPs of the arm over those with which N = 8 throughout gets to its loss: log-linear between its runs."""
    fixed = sorted((arm["flops"].mean(), arm["loss"].mean()) for key, arm in by_arm.items() if key.startswith("8"))
    flops, losses = np.log([f for f, _ in fixed])[::-1], np.array([loss for _, loss in fixed])[::-1]
    loss = by_arm[name]["loss"].mean()
    if not losses[0] <= loss <= losses[-1]:
        return f"its loss, {loss:.4f}, is outside those of the N = 8 runs ({losses[0]:.4f} to {losses[-1]:.4f})"
    needed = float(np.exp(np.interp(loss, losses, flops)))
    share = by_arm[name]["flops"].mean() / needed
    return f"N = 8 throughout needs {needed:.3g} FLOPs for its loss; it took {share:.0%} of that"


def answer(by_arm: dict[str, pd.DataFrame]) -> str:
    """The goal, within noise at two thirds of the FLOPs, met or not."""
    full = by_arm[REFERENCE]
    interval = t_interval(by_arm["grown"]["loss"] - full["loss"], 0.90)
    share = by_arm["grown"]["flops"].mean() / full["flops"].mean()
    cheap = f"{share:.0%} of the FLOPs, {'at most' if share <= 2 / 3 else 'more than'} the two thirds"
    if interval.low <= 0 <= interval.high:
        return f"Within noise of 8 throughout (the interval holds 0), at {cheap}."
    worse = "worse" if interval.estimate > 0 else "better"
    return f"**Not within noise**: {worse} than 8 throughout (the interval holds no 0), at {cheap}."


TEXT = """\
# Growing the loop count in training

`python benchmarks/growth.py`: {versions}; seeds {seeds}, LR chosen on seeds
{tuning_seeds}; trainings took {seconds} on one core.

{size}, AdamW, weight
decay 0.1, warm-up over 5 % of the steps, linear decay to zero over the last 20 %; held-out loss in nats a byte. "grown"
loops 1, 2, 4, 8 times from 0, 15, 30 and 55 % of the steps on, "grown late" from 0, 25, 50 and 75 %. One LR, {lr}, the
best at N = 1 (mean loss by LR: {tuned}).
FLOPs are of forward and backward, counted by `torch.utils.flop_counter` at every N. Intervals: 90 % t over seeds.

{answer}

![Held-out loss against tokens and FLOPs](growth.png)

{table}

At equal FLOPs, both decayed to the end:

{equal}

At equal loss:

{saved}

At this size and horizon loops buy next to nothing: N = 1 throughout ends at {single} on the seeds of the tuning, so a
schedule with fewer loops has little to lose. The figures show that one LR serves while N grows and that a change of N
disturbs nothing that lasts; they do not show that growth keeps what loops give to a model that needs them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/growth"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", lt.ScalingWarning)
    scale = Scale(ReferenceSize(steps=1200), seeds=(0, 1, 2, 3), lrs=tuple(2.0**-x for x in (10, 9, 8, 7, 6, 5)))
    clock, started = out / "run.json", time.monotonic()
    before = json.loads(clock.read_text())["seconds"] if clock.exists() else 0.0
    measure(scale, out)
    seconds = before + time.monotonic() - started  # of all calls that it took
    clock.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n")
    report(scale, out, seconds)


if __name__ == "__main__":
    main()
