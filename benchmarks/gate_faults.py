"""Ten faults planted in the reference project, and which gate sees them.

    python benchmarks/gate_faults.py [--reference] [--out reports/gate] [--ledgers build/gate-faults] [--seeds 4]

A fault is a change of the code that trains: of the model, of the rewrite, of the optimizer's groups, of the schedule or
of the data. Each project is first swept without fault, and its optima stored. Then, fault by fault: `verify` on the
model at the target N, the cheap mode (`lt.gate`), and the full check (five LRs around the stored optimum, compared with
it). Every finished run is in a ledger, every finished fault in faults.json: stopped, the same command goes on.

By default the reference model is small and learns a made-up language within 100 steps; with --reference it has the
size and the text of the demo, which takes hours on one core.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

import looptransfer as lt
from looptransfer.optim import param_groups
from looptransfer.reference.model import Block, LoopedDecoder
from looptransfer.rewrite.insert import set_multiplier
from looptransfer.transfer.baseline import Baseline, baseline_of, read_baseline
from looptransfer.transfer.comparison import compare
from looptransfer.trials import trial
from looptransfer.trials.gate import gate

OCTAVES = (-2, -1, 0, 1, 2)  # of the full check, around the stored optimum


@dataclass(frozen=True)
class Project:
    """A reference experiment with its stored N; the last one is the target."""

    name: str
    layers: int
    loops: tuple[int, ...]

    def size(self, full: bool) -> lt.ReferenceSize:
        if full:
            return lt.ReferenceSize(layers=self.layers)
        return lt.ReferenceSize(width=16, layers=self.layers, sequence=16, batch=16, steps=100)

    def experiment(self, text: Path | None) -> lt.Experiment:
        made = lt.reference_experiment(self.size(text is None), None if text is None else str(text))
        return replace(made, name=f"gate, {self.name}", base_layers=1)


LOOPED = Project("looped", layers=1, loops=(1, 8))
DEEP = Project("deep", layers=4, loops=(1,))  # parameter groups matter where L is above the base depth


def made_up_text(path: Path) -> Path:
    """A language of eight letters: the next is a function of the last two, but for one in eight, which is any."""
    rng = np.random.default_rng(0)
    rule, count = rng.integers(0, 8, (8, 8)), 200_000
    slip, other = rng.random(count) < 0.125, rng.integers(0, 8, count)
    letters = [0, 1]
    for i in range(count):
        letters.append(int(other[i]) if slip[i] else int(rule[letters[-1], letters[-2]]))
    path.write_text("".join("abcdefgh"[letter] for letter in letters))
    return path


@dataclass(frozen=True)
class Fault:
    """A change of the code, as a context in which it is there; the experiment is what the context trains."""

    name: str
    project: Project
    plant: Callable[[lt.Experiment, contextlib.ExitStack], lt.Experiment]


def in_trial(name: str, change: Callable[..., Any]) -> Callable[[lt.Experiment, contextlib.ExitStack], lt.Experiment]:
    """A fault in the training function: `change` instead of what it calls `name`."""

    def plant(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
        stack.enter_context(mock.patch.object(trial, name, change))
        return experiment

    return plant


def lost_on_one_branch(model: torch.nn.Module, *arguments: Any) -> lt.ScalingPlan:
    plan = lt.parametrize(model, *arguments)
    set_multiplier(model, plan.branches[-1].handle, 1.0)
    return plan


def sqrt_rule(model: torch.nn.Module, inputs: Any, rule: str, *arguments: Any) -> lt.ScalingPlan:
    return lt.parametrize(model, inputs, "sqrt", *arguments)


def half_the_loops(model: torch.nn.Module, *arguments: Any) -> lt.ScalingPlan:
    loops, model.loops = model.loops, max(1, model.loops // 2)
    plan = lt.parametrize(model, *arguments)
    model.loops = loops
    return plan


def one_group(model: torch.nn.Module, optimizer: Any, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "lr": lr, "weight_decay": weight_decay}]


def scaled_by_hand(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
    """The model multiplies its branches itself, and is rewritten on top."""

    def forward(self: Block, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = x + self.by_hand * self.attention(self.attention_norm(x), table)
        return x + self.by_hand * self.mlp(self.mlp_norm(x))

    def make(loops: int) -> torch.nn.Module:
        model = experiment.make_model(loops)
        for block in model.layers:
            block.by_hand = 1 / (loops * math.sqrt(len(model.layers)))
        return model

    stack.enter_context(mock.patch.object(Block, "forward", forward))
    return replace(experiment, make_model=make)


def post_norm(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
    def forward(self: Block, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, table))
        return self.mlp_norm(x + self.mlp(x))

    stack.enter_context(mock.patch.object(Block, "forward", forward))
    return experiment


def quartered_logits(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
    forward = LoopedDecoder.forward
    stack.enter_context(mock.patch.object(LoopedDecoder, "forward", lambda self, x: forward(self, x) / 4))
    return experiment


class AbsoluteSchedule:
    """A scheduler that writes one LR into every group."""

    def __init__(self, optimizer: torch.optim.Optimizer, share: Callable[[int], float]) -> None:
        self.groups, self.share, self.steps = optimizer.param_groups, share, -1
        self.lr = max(group["lr"] for group in self.groups)
        self.step()

    def step(self) -> None:
        self.steps += 1
        for group in self.groups:
            group["lr"] = self.lr * self.share(self.steps)


def absolute_schedule(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
    stack.enter_context(mock.patch.object(torch.optim.lr_scheduler, "LambdaLR", AbsoluteSchedule))
    return experiment


def unpaired(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
    """Every run sees its own data order, whatever its seed."""
    calls = itertools.count()
    return replace(experiment, batches=lambda seed: experiment.batches(10_000 * (1 + next(calls)) + seed))


def no_fault(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
    return experiment


OTHER_SEEDS = "none (seeds that the baseline lacks)"
FAULTS = (
    Fault(OTHER_SEEDS, LOOPED, no_fault),
    Fault("multiplier lost on one branch", LOOPED, in_trial("parametrize", lost_on_one_branch)),
    Fault("1/√N for 1/N", LOOPED, in_trial("parametrize", sqrt_rule)),
    Fault("N miscounted (half)", LOOPED, in_trial("parametrize", half_the_loops)),
    Fault("multiplier applied twice", LOOPED, scaled_by_hand),
    Fault("norm moved (pre- to post-norm)", LOOPED, post_norm),
    Fault(OTHER_SEEDS, DEEP, no_fault),
    Fault("parameter groups dropped", DEEP, in_trial("param_groups", one_group)),
    Fault("scheduler overwrites the groups' LRs", DEEP, absolute_schedule),
    Fault("head scaled (logits / 4)", DEEP, quartered_logits),
    Fault("Adam eps × 1000", DEEP, in_trial("param_groups", partial(param_groups, eps=1e-5))),
    Fault("data order unpaired", DEEP, unpaired),
    Fault("none", LOOPED, no_fault),
    Fault("none", DEEP, no_fault),
)


# -- the gates


@dataclass(frozen=True)
class Case:
    """What a gate is given."""

    fault: Fault
    experiment: lt.Experiment
    baseline: Baseline
    ledger: Path
    seeds: tuple[int, ...]


def by_verify(case: Case) -> tuple[str, str]:
    """The model as it is trained, at the target N: `parametrize`, which warns, then `verify`."""
    torch.manual_seed(0)
    model = case.experiment.make_model(case.fault.project.loops[-1])
    inputs, _ = next(case.experiment.batches(0))
    try:
        plan = trial.parametrize(model, inputs, "factored", case.experiment.lam, case.experiment.base_layers)
        lt.verify(model, inputs)
    except (lt.VerificationError, lt.InputError) as error:
        return "refused", str(error)
    return ("warned", "\n".join(plan.caveats)) if plan.caveats else ("passed", "")


def by_cheap_mode(case: Case) -> tuple[str, str]:
    told = gate(_of_seeds(case), case.baseline, seeds=len(case.seeds), ledger=case.ledger, workers=1)
    return told.answer, str(told)


def by_full_check(case: Case) -> tuple[str, str]:
    tables = []
    for at, stored in case.baseline.of_rule("factored").items():
        assert stored.log2_lr is not None
        lrs = [float(f"{2.0 ** (stored.log2_lr.estimate + octaves):.6g}") for octaves in OCTAVES]
        seeds = range(len(case.seeds))
        tables.append(lt.sweep(_of_seeds(case), [at], lrs=lrs, seeds=seeds, ledger=case.ledger, workers=1))
    verdict = lt.check(pd.concat(tables, ignore_index=True))
    told = compare(verdict, case.baseline)
    return told.answer, f"{verdict}\n{told}"


def _of_seeds(case: Case) -> lt.Experiment:
    """The experiment whose seed 0 is the case's first seed: a gate chooses the baseline's own seeds."""
    first, experiment = case.seeds[0], case.experiment
    if first == 0:
        return experiment
    make = experiment.make_model

    def reseeded(loops: int) -> torch.nn.Module:
        torch.manual_seed(torch.initial_seed() + first)
        return make(loops)

    return replace(experiment, batches=lambda seed: experiment.batches(seed + first), make_model=reseeded)


GATES: dict[str, Callable[[Case], tuple[str, str]]] = {
    "verify": by_verify, "cheap mode": by_cheap_mode, "full check": by_full_check,
}  # fmt: skip
PASSED, CAUGHT = {"passed", "HOLDS"}, {"refused", "warned", "MOVED", "WORSE"}


def stored_optima(project: Project, text: Path | None, out: Path, ledgers: Path) -> Baseline:
    """The optima without fault, from the file or a sweep of seven LRs and four seeds."""
    path = out / f"lr-optima-{project.name}.json"
    if not path.exists():
        ledger = ledgers / f"{project.name}.db"
        highest = -4 if text is None else -2
        lrs = [2.0**log2 for log2 in range(highest - 6, highest + 1)]
        runs = lt.sweep(project.experiment(text), project.loops, lrs=lrs, seeds=4, ledger=ledger, workers=1)
        verdict = lt.check(runs)
        print(verdict, flush=True)
        baseline_of(verdict).write(path)
    return read_baseline(path)


def judge(fault: Fault, name: str, text: Path | None, out: Path, ledgers: Path, seeds: int) -> dict[str, Any]:
    """A gate's answer to a fault, with its words and its CPU seconds."""
    baseline = stored_optima(fault.project, text, out, ledgers)
    ledger = ledgers / f"{fault.project.name}, {fault.name.replace('/', ' per ')}.db"
    chosen = tuple(range(4, 4 + seeds)) if fault.name == OTHER_SEEDS else tuple(range(seeds))
    with contextlib.ExitStack() as stack:
        experiment = fault.plant(fault.project.experiment(text), stack)
        started = time.process_time()
        answer, words = GATES[name](Case(fault, experiment, baseline, ledger, chosen))
    told = {"fault": fault.name, "project": fault.project.name, "gate": name, "answer": answer}
    told |= {"seconds": round(time.process_time() - started, 1), "words": words}
    print(*told.values(), sep="\n", flush=True)
    return told


def report(told: list[dict[str, Any]], full: bool, seeds: int) -> str:
    lines = [
        "# Which gate sees which fault",
        "",
        "`python benchmarks/gate_faults.py` plants ten faults in the reference project and asks each gate. The words",
        "of every answer are in faults.json.",
        "",
        f"| fault | project | {' | '.join(GATES)} |",
        "|---|---|" + "---|" * len(GATES),
    ]
    found = {(one["fault"], one["project"], one["gate"]): one for one in told}
    for fault in FAULTS:
        cells = [_cell(found.get((fault.name, fault.project.name, name))) for name in GATES]
        lines.append(f"| {fault.name} | {fault.project.name} | {' | '.join(cells)} |")
    planted = [one for one in told if not one["fault"].startswith("none")]
    counts = []
    for name in GATES:
        answers = [one["answer"] for one in planted if one["gate"] == name]
        caught, passed = (sum(answer in some for answer in answers) for some in (CAUGHT, PASSED))
        counts.append(f"{name} names {caught} of {len(answers)} and lets {passed} pass")
    lines += [
        "",
        f"{'; '.join(counts)}. INCONCLUSIVE names no fault but is no pass: its exit status is 3.",
        "",
        f"The reference model {'at the size of the demo' if full else 'reduced, on a made-up language'}; looped: "
        f"{_words(LOOPED, full)}; deep: {_words(DEEP, full)}. The base depth is 1.",
        f"Stored optima: 7 LRs an octave apart, 4 seeds. Cheap mode: 3 LRs, {seeds} seeds. Full check: 5 LRs, {seeds} "
        "seeds.",
        f"CPU seconds of one thread. Python {platform.python_version()}, torch {version('torch')}, "
        f"looptransfer {version('looptransfer')}, {platform.machine()}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "not run"
    mark = "**" if one["answer"] in CAUGHT else ""
    return f"{mark}{one['answer']}{mark}, {one['seconds']:.1f} s"


def _words(project: Project, full: bool) -> str:
    size, loops = project.size(full), " and ".join(map(str, project.loops))
    tokens = f"{size.batch} × {size.sequence} tokens"
    return f"L = {size.layers}, N = {loops}, width {size.width}, {size.steps} steps of {tokens}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true", help="at the size of the demo")
    parser.add_argument("--out", type=Path, default=Path("reports/gate"))
    parser.add_argument("--ledgers", type=Path, default=Path("build/gate-faults"))
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    for folder in (arguments.out, arguments.ledgers):
        folder.mkdir(parents=True, exist_ok=True)
    text = None if arguments.reference else made_up_text(arguments.ledgers / "text.txt")
    path = arguments.out / "faults.json"
    told = json.loads(path.read_text()) if path.exists() else []
    done = {(one["fault"], one["project"], one["gate"]) for one in told}
    for name, fault in itertools.product(GATES, FAULTS):  # the quickest gate first
        if (fault.name, fault.project.name, name) not in done:
            told.append(judge(fault, name, text, arguments.out, arguments.ledgers, arguments.seeds))
            path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
            (arguments.out / "README.md").write_text(report(told, arguments.reference, arguments.seeds))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
