"""A task that needs its loops: prefix sums modulo 3, by a block that sees two digits further back at each loop.

    python -m benchmarks.prefix_sums [--minutes M] [--out reports/prefix_sums]

Running sums of 16 random digits, after the prefix sums of Schwarzschild et al. (arXiv 2106.04537); task and model are
our own writing. The model is one gated causal convolution over three positions, applied N times with the same weights,
with the embedded digits fed to it again at each loop. So N loops see 2N digits back: the running sums at the first 2N
positions can be known, and of those after them hardly more than a guess, however long one trains.

The base LR is tuned at N = 2 under `factored` and carried to every N and rule; beside it each rule carries its own best
LR at N = 2, by its sweep. A killed run goes on from the tables in the folder and `ledger.db`, and `--minutes` begins no
further part after that time.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from benchmarks.cells import draw_losses
from benchmarks.verdict_simulations import table
from looptransfer.rules import Rule
from looptransfer.transfer.optimum import Interval, t_interval

REPORT = Path(__file__).parent.parent / "reports" / "prefix_sums"
KERNEL = 3
LOOPS = (1, 2, 4, 8)
JUDGED_FROM = 2  # at N = 1 every LR soon reaches what one loop can see, so that none is the best
RULES: tuple[Rule, ...] = ("factored", "unscaled", "sqrt")
OCTAVES = (-2.25, -1.5, -0.75, 0.0, 0.75, 1.5, 2.25)
LOWER: dict[Rule, tuple[float, ...]] = {"unscaled": (-3.75, -3.0)}  # further LRs, where the best lay at the low edge
SEEDS = 6
TUNING_SEEDS = (100, 101, 102, 103)
CHOSEN = """\
How the task was chosen: by hand, before the sweep, one or two seeds a cell, not kept. Modulo 2 the same model is right
nearly everywhere at N = 8, at most LRs, so its loss tells little of the LR. With a norm in the branch and before the
head the size of the stream does not matter, and `unscaled` hardly moves. Without a norm, a branch that nothing bounds
(SiLU instead of sigmoid and tanh) diverges at N = 8 from LR 0.016 up."""
STYLES = {"factored": ("#0072B2", "o"), "unscaled": ("#D55E00", "s"), "sqrt": ("#009E73", "^")}
LABELS = {"factored": "factored, 1/N", "unscaled": "unscaled, 1", "sqrt": "sqrt, 1/√N"}


@dataclass(frozen=True)
class Size:
    """Sizes of the task and its training; `held_out` in sequences."""

    modulus: int = 3
    length: int = 16
    width: int = 32
    batch: int = 32
    steps: int = 100
    held_out: int = 512


class Branch(nn.Module):
    """A gated causal convolution over three positions of the stream and of the embedded digits beside it.

    It has no norm, and tanh bounds it: the size of the stream is what the loops add to it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(KERNEL * 2 * width, 4 * width, bias=False)
        self.write = nn.Linear(2 * width, width, bias=False)
        for matrix in (self.read.weight, self.write.weight):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)

    def forward(self, stream: Tensor, recalled: Tensor) -> Tensor:
        seen = F.pad(torch.cat([stream, recalled], dim=-1), (0, 0, KERNEL - 1, 0))
        near = torch.cat([seen[:, back : back + stream.shape[1]] for back in range(KERNEL)], dim=-1)
        gate, value = self.read(near).chunk(2, dim=-1)
        written: Tensor = self.write(torch.sigmoid(gate) * torch.tanh(value))
        return written


class RunningSums(nn.Module):
    """Digits (batch, time) to logits of their running sums: one branch, applied `loops` times."""

    def __init__(self, modulus: int, width: int, loops: int) -> None:
        super().__init__()
        self.loops = loops
        self.embedding = nn.Embedding(modulus, width)
        self.branch = Branch(width)
        self.head = nn.Linear(width, modulus, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, digits: Tensor) -> Tensor:
        recalled = stream = self.embedding(digits)
        for _ in range(self.loops):
            stream = stream + self.branch(stream, recalled)
        logits: Tensor = self.head(stream)
        return logits


@dataclass(frozen=True)
class Task:
    """The experiment's callables, as methods of a value that pickles."""

    size: Size

    def make_model(self, loops: int) -> nn.Module:
        return RunningSums(self.size.modulus, self.size.width, loops)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Some sequences of digits, and their running sums."""
        digits = torch.randint(self.size.modulus, (count, self.size.length), generator=generator)
        return digits, digits.cumsum(1) % self.size.modulus

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(self.size.batch, generator)

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        return [self.draw(self.size.held_out, torch.Generator().manual_seed(10**6))]


def experiment(size: Size) -> lt.Experiment:
    """The task as an experiment."""
    task = Task(size)
    return lt.Experiment(
        name="prefix sums",
        make_model=task.make_model,
        batches=task.batches,
        held_out=task.held_out,
        steps=size.steps,
        width=size.width,
        settings=vars(size),
    )


def most(size: Size, loops: int) -> float:
    """The accuracy that N loops allow: 2N positions for certain, the next by the same rule, and a guess after it."""
    certain = min(size.length, (KERNEL - 1) * loops + 1)
    return (certain + (size.length - certain) / size.modulus) / size.length


def accuracy(trained: lt.Experiment, rule: Rule, loops: int, lr: float, seed: int) -> tuple[float, float]:
    """Loss and held-out accuracy of a run, which is made again to have its model."""
    models: list[nn.Module] = []

    def kept(count: int) -> nn.Module:
        models.append(trained.make_model(count))
        return models[-1]

    with tempfile.TemporaryDirectory() as folder:
        run = lt.Trial(rule, loops, lr, seed, "cpu", Path(folder))
        outcome = replace(trained, make_model=kept).train(run)
    with torch.no_grad():
        hits = [models[-1](digits).argmax(-1) == sums for digits, sums in trained.held_out()]
    return outcome.loss, float(torch.cat(hits).float().mean())


@dataclass(frozen=True)
class Study:
    """What is measured, and the folder it is written into."""

    size: Size
    out: Path
    seeds: int = SEEDS
    octaves: tuple[float, ...] = OCTAVES
    loops: tuple[int, ...] = LOOPS
    rules: tuple[Rule, ...] = RULES

    @property
    def ledger(self) -> Path:
        """Where finished runs are kept."""
        return self.out / "ledger.db"

    def parts(self) -> Iterator[Callable[[], None]]:
        """What is left to do, in order."""
        if not (self.out / "tuned.json").exists():
            yield self.tune
        for rule, count in product(self.rules, self.loops):
            if not self.holds("runs.csv", rule, count):
                yield partial(self.sweep, rule, count)
            if not self.holds("accuracy.csv", rule, count):
                yield partial(self.score, "accuracy.csv", self.tuned()["lr"], rule, count)
        for rule, count in product(self.rules, self.loops):
            if not self.holds("own_lr.csv", rule, count):
                yield partial(self.score, "own_lr.csv", self.own(rule), rule, count)

    def holds(self, name: str, rule: Rule, count: int) -> bool:
        """Whether a table of the report has that cell."""
        rows = self.read(name)
        return not rows.empty and bool(((rows["rule"] == rule) & (rows["loops"] == count)).any())

    def finished(self) -> list[Rule]:
        """The rules of which every cell is measured."""
        return [rule for rule in self.rules if all(self.holds("own_lr.csv", rule, count) for count in self.loops)]

    def read(self, name: str) -> pd.DataFrame:
        """A table of the report, so far as it is made."""
        path = self.out / name
        return pd.read_csv(path, float_precision="round_trip") if path.exists() else pd.DataFrame()

    def append(self, name: str, rows: pd.DataFrame) -> None:
        """Write further rows of a table of the report."""
        pd.concat([self.read(name), rows], ignore_index=True).to_csv(self.out / name, index=False)

    def tuned(self) -> dict[str, float]:
        """The LR that is carried, and what is known of it."""
        stored: dict[str, float] = json.loads((self.out / "tuned.json").read_text())
        return stored

    def tune(self) -> None:
        """Tune the LR at N = 2."""
        tuned = lt.tune(experiment(self.size), loops=2, seeds=TUNING_SEEDS, ledger=self.ledger, workers=1)
        kept = {"lr": tuned.lr, "loss": tuned.optimum.loss, "regret": tuned.optimum.regret, "runs": len(tuned.results)}
        (self.out / "tuned.json").write_text(json.dumps(kept) + "\n")

    def sweep(self, rule: Rule, count: int) -> None:
        """The runs of one N under one rule."""
        runs = lt.sweep(
            experiment(self.size),
            [count],
            self.tuned()["lr"],
            [rule],
            seeds=self.seeds,
            octaves=(*LOWER.get(rule, ()), *self.octaves),
            ledger=self.ledger,
            workers=1,
        )
        self.append("runs.csv", runs)

    def own(self, rule: Rule) -> float:
        """The best LR of a rule at the smallest N that is judged: the fitted one, or else the best of the grid."""
        runs = self.read("runs.csv")
        (judged,) = lt.check(runs[(runs["rule"] == rule) & (runs["loops"] == JUDGED_FROM)]).rules.values()
        best = judged.optima[0].log2_lr
        lowest = float(judged.tables[JUDGED_FROM].mean(axis=1).idxmin())
        return math.exp2(lowest if best is None else best.estimate)

    def score(self, name: str, lr: float, rule: Rule, count: int) -> None:
        """The loss and the accuracy at an LR under one rule at one N."""
        scores = [accuracy(experiment(self.size), rule, count, lr, seed) for seed in range(self.seeds)]
        rows = [
            {"rule": rule, "loops": count, "lr": lr, "seed": seed, "loss": loss, "accuracy": share}
            for seed, (loss, share) in enumerate(scores)
        ]
        self.append(name, pd.DataFrame(rows))

    def measure(self, minutes: float) -> bool:
        """Do what is left; whether all is done."""
        self.out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        for part in self.parts():
            if time.monotonic() - started > 60 * minutes:
                return False
            wall, core = time.monotonic(), time.process_time()
            part()
            spent = {"wall": time.monotonic() - wall, "core": time.process_time() - core}
            self.append("cost.csv", pd.DataFrame([spent]))
        return True


def intervals(scores: pd.DataFrame, rule: str) -> dict[int, Interval]:
    """The accuracy at each N under a rule, with its interval over seeds."""
    rows = scores[scores["rule"] == rule]
    return {int(str(count)): t_interval(group["accuracy"], 0.9) for count, group in rows.groupby("loops")}


def draw(study: Study, every: lt.Verdict, judged: lt.Verdict) -> Figure:
    """Accuracy against N under every rule, and loss against LR at each N under the first."""
    figure = Figure(figsize=(9.0, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, study)
    draw_losses_and_lr(right, every)
    drift = f": drift {judged.judged.drift.text(2)}" if judged.judged.drift else ""
    right.set_title(f"{LABELS[judged.rule]}{drift}", loc="left", fontsize="medium")
    return figure


def draw_accuracy(axis: Axes, study: Study) -> None:
    """Accuracy at the carried LR, dashed at each rule's own, and what N loops allow at most."""
    ceiling = [100 * most(study.size, count) for count in study.loops]
    axis.plot(study.loops, ceiling, color="0.55", linestyle=":", linewidth=1.2, label="all that N loops can see")
    for rule in study.finished():
        colour, marker = STYLES[rule]
        carried, own = (intervals(study.read(name), rule) for name in ("accuracy.csv", "own_lr.csv"))
        low, mean, high = (
            [100 * getattr(share, part) for share in carried.values()] for part in ("low", "estimate", "high")
        )
        axis.plot(list(carried), mean, color=colour, marker=marker, label=LABELS[rule])
        axis.fill_between(list(carried), low, high, color=colour, alpha=0.18, linewidth=0)
        shares = [100 * share.estimate for share in own.values()]
        axis.plot(
            list(own), shares, "--", color=colour, marker=marker, markerfacecolor="white", linewidth=1, zorder=1.9
        )
    axis.plot([], [], color="0.35", linestyle="--", linewidth=1, label="each with its own best LR at N = 2")
    axis.axhline(100 / study.size.modulus, color="0.8", linewidth=0.8)
    axis.text(
        study.loops[-1], 100 / study.size.modulus, "a guess", ha="right", va="bottom", color="0.5", fontsize="small"
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(study.loops, [str(count) for count in study.loops])
    axis.set_ylim(25, 104)
    axis.set(xlabel="loops N", ylabel="running sums right, %")
    axis.set_title(
        f"One base LR, {study.tuned()['lr']:.3g}, tuned at N = 2 under factored", loc="left", fontsize="medium"
    )
    axis.legend(frameon=False, fontsize="small", loc="upper left")


def draw_losses_and_lr(axis: Axes, verdict: lt.Verdict) -> None:
    """Loss against LR, with the carried LR."""
    draw_losses(axis, verdict.judged)
    if verdict.transferred_lr is not None:
        axis.axvline(verdict.transferred_lr, color="0.4", linestyle="--", linewidth=1)
    axis.set(xlabel="base LR (dashed: the one on the left; ×: a seed diverges)", ylabel="held-out loss, nats")
    axis.legend(frameon=False, fontsize="small", loc="lower right")


def rows_by_loops(study: Study, verdict: lt.Verdict) -> pd.DataFrame:
    """A row per rule and N: its best LR, and what the carried LR gives."""
    scores, own, rows = study.read("accuracy.csv"), study.read("own_lr.csv"), []
    for rule, judged in verdict.rules.items():
        by_loops, with_own = intervals(scores, rule), intervals(own, rule)
        for optimum in judged.optima:
            here = scores[(scores["rule"] == rule) & (scores["loops"] == optimum.n)]
            means = judged.tables[optimum.n].mean(axis=1)
            fitted = optimum.log2_lr
            rows.append(
                {
                    "rule": rule,
                    "N": optimum.n,
                    "best LR": f"none: {optimum.censored}" if fitted is None else f"{2**fitted.estimate:.3g}",
                    "log2 of it": fitted.text(2) if fitted else "",
                    "lowest mean loss on the grid": f"{means.min():.3f}",
                    "loss at the carried LR": f"{here['loss'].mean():.3f}",
                    "accuracy there, %": percent(by_loops.get(optimum.n)),
                    f"accuracy at its own of N = {JUDGED_FROM}, %": percent(with_own.get(optimum.n)),
                    "at most, %": f"{100 * most(study.size, optimum.n):.1f}",
                }
            )
    return pd.DataFrame(rows)


def percent(share: Interval | None) -> str:
    """A share with its interval."""
    return "" if share is None else f"{100 * share.estimate:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def rows_by_rule(carried: lt.Verdict, best: lt.Verdict) -> pd.DataFrame:
    """A row per rule: the drift, and the verdicts with the tuned LR and with the rule's own best at the smallest N."""
    differences = {difference.control: difference.drift for difference in carried.differences}
    rows = []
    for rule, judged in carried.rules.items():
        difference, own = differences.get(rule), best.rules[rule]
        rows.append(
            {
                "rule": rule,
                "drift": judged.drift.text(3) if judged.drift else "not known",
                f"minus {carried.rule}": difference.text(3) if difference else "",
                "regret of the tuned LR": regret_text(carried, rule),
                "verdict": f"{judged.answer}: {judged.cause}",
                f"regret of its own best at N = {judged.optima[0].n}": regret_text(best, rule),
                "verdict with that": f"{own.answer}: {own.cause}",
            }
        )
    return pd.DataFrame(rows)


def regret_text(verdict: lt.Verdict, rule: str) -> str:
    """The regret with its interval, or that runs with that LR diverge."""
    regret = verdict.rules[rule].regret
    return "diverges" if regret and math.isinf(regret.estimate) else verdict.regret_text(regret)


def same_runs(study: Study) -> str:
    """Whether the runs that were made again for their accuracy came to the losses of the sweep."""
    runs, scores = study.read("runs.csv"), study.read("accuracy.csv")
    pairs = scores.merge(runs, on=["rule", "loops", "lr", "seed"], suffixes=("", "_swept"))
    apart = (pairs["loss"] - pairs["loss_swept"]).abs().max()
    return (
        f"{len(pairs)} runs were made again for their accuracy; their losses are the sweep's to {apart:.1g} nats. "
        "A run that diverges counts with the model that it had when it ended."
    )


def plans(study: Study) -> str:
    """The plans of the smallest and the largest model, as the package prints them."""
    task, texts = Task(study.size), []
    for count in (study.loops[0], study.loops[-1]):
        texts.append(str(lt.parametrize(task.make_model(count), next(task.batches(0))[0])))
    return "\n\n".join(texts)


def judge(study: Study, fewest: int, lr: float | None = None) -> lt.Verdict:
    """The verdict on the rules that are finished, from some N up, for an LR or for the best of the smallest N."""
    runs = study.read("runs.csv")
    kept = runs[runs["rule"].isin(study.finished()) & (runs["loops"] >= fewest)]
    return lt.check(kept, "factored", transferred_lr=lr)


def short_of(every: lt.Verdict, carried: lt.Verdict, best: lt.Verdict) -> str:
    """What falls short."""
    smallest, judged = every.judged.optima[0], carried.judged
    first, counts = judged.optima[0].n, ", ".join(str(optimum.n) for optimum in judged.optima)
    losses = every.judged.tables[smallest.n].mean(axis=1)
    stable = losses[losses.map(math.isfinite)]
    texts = [
        f"**What falls short.** With the LR that `tune` gave at N = 2, `factored` is {carried.answer} ({judged.cause}) "
        f"over N = {counts}; with its best LR at N = {first} by the sweep it is {best.answer} ({best.judged.cause}).",
        f"N = {smallest.n} has no best LR ({smallest.censored}): its mean loss is {stable.min():.3f} to "
        f"{stable.max():.3f} at all {len(stable)} LRs that are stable. So the verdicts leave it out, which was decided "
        f"after it was seen; with it `factored` is {every.answer}.",
    ]
    for rule, control in list(carried.rules.items())[1:]:
        ours, theirs = (answer.tables[judged.optima[-1].n].mean(axis=1).min() for answer in (judged, control))
        texts.append(
            f"`{rule}` is {control.answer} ({control.cause}); at the best LR of its own, its mean loss at "
            f"N = {judged.optima[-1].n} is {theirs:.3f}, that of `factored` {ours:.3f}."
        )
    return "\n".join(texts)


def with_its_own(study: Study) -> str:
    """What each control comes to with its own best LR at the smallest judged N, less the rule with its own."""
    own, last = study.read("own_lr.csv"), study.loops[-1]
    shares = own[own["loops"] == last].pivot(index="seed", columns="rule", values="accuracy")
    rule, *controls = study.finished()
    right = percent(t_interval(shares[rule], 0.9))
    less = [f"`{control}` {points(shares[control] - shares[rule])}" for control in controls]
    return (
        f"The gap between the rules at N = {last} in the picture comes from the LR, which was tuned under `{rule}`. "
        f"Where each rule carries its own best LR of N = {JUDGED_FROM} (dashed), {right} % of the sums are right "
        f"under `{rule}`; less that, paired by seed, {', '.join(less)} percentage points."
    )


def points(differences: pd.Series) -> str:
    """A mean difference of shares in percentage points, with its interval."""
    return t_interval(100 * differences, 0.9).text(1)


def report(study: Study) -> str:
    """The README of the finished rules."""
    tuned, runs, cost, size = study.tuned(), study.read("runs.csv"), study.read("cost.csv"), study.size
    every, best = judge(study, 1, tuned["lr"]), judge(study, JUDGED_FROM)
    carried = judge(study, JUDGED_FROM, tuned["lr"])
    draw(study, every, carried).savefig(study.out / "prefix_sums.png", dpi=150)
    lines = [
        "# A task that needs its loops: prefix sums",
        "",
        short_of(every, carried, best),
        with_its_own(study),
        "",
        *(__doc__ or "").splitlines()[2:],
        "",
        "![accuracy over N, and loss over LR](prefix_sums.png)",
        "",
        f"Modulo {size.modulus}, {size.length} digits, width {size.width}, {size.steps} AdamW steps of {size.batch} "
        f"sequences, {size.held_out} held-out sequences, λ = 1, weights start at 1/√(inputs).",
        f"{study.seeds} paired seeds (0 to {study.seeds - 1}), {len(study.octaves)} LRs 0.75 octave apart, two lower "
        "ones under `unscaled`, whose best LR at N = 8 was the lowest at first.",
        f"LR {tuned['lr']:.4g} was tuned at N = 2 by {tuned['runs']} runs of seeds {TUNING_SEEDS[0]} to "
        f"{TUNING_SEEDS[-1]}: by them it loses at most {tuned['regret']:.4f} nats there.",
        "",
        table(rows_by_rule(carried, best)),
        "",
        f"Drift in octaves of the best base LR per doubling of N, N = {JUDGED_FROM} and more; regret at "
        f"N = {study.loops[-1]}, {carried.unit} (tolerance {carried.regret_tolerance:.3g}); 90 % intervals. The LR was "
        f"tuned under `factored`, which does the controls no justice: what each loses with its own best LR at "
        f"N = {JUDGED_FROM} stands in the last two columns, and in the picture's dashed lines.",
        "",
        table(rows_by_loops(study, every)),
        "",
        same_runs(study),
        "",
        CHOSEN,
        "",
        "```",
        plans(study),
        "```",
        "",
        f"{len(runs)} rows, {int(runs['diverged'].sum())} of them diverged; the rules share their runs at N = 1. "
        f"Measured: {cost['core'].sum():.0f} core-seconds, {cost['wall'].sum():.0f} s of wall time, on one worker of a "
        "machine that others used, with the parts that were killed and begun again.",
        f"Python {platform.python_version()}, torch {version('torch')}, looptransfer {version('looptransfer')}, "
        f"{platform.machine()}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further part after that time")
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    study = Study(Size(), arguments.out)
    complete = study.measure(arguments.minutes)
    if "factored" not in study.finished():
        sys.exit("nothing to report yet; the same command goes on")
    text = report(study)
    (arguments.out / "README.md").write_text(text)
    print(text)
    if not complete:
        print("not all is done; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
