"""Ten faults planted in the reference project, and which gate sees them.

    python benchmarks/gate_faults.py [--out reports/gate] [--ledgers build/gate-faults] [--workers N]

A fault is a change of the code that trains: of the model, of the rewrite, of the optimizer's groups, of the schedule or
of the data. The project is the reference model at its usual size, whose optima reports/sweep/results.csv holds,
and a deeper one, which is first swept. Then, fault by fault: `verify` on the model at the target N, the coordinate
check, the cheap mode (`lt.gate`), and the full check (a sweep, compared with the baseline). An hour and a half on two
cores. Every finished run is in a ledger, every finished fault in faults.json: stopped, the same command goes on.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
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

import torch

import looptransfer as lt
from looptransfer.optim import param_groups
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.reference.model import Block, LoopedDecoder
from looptransfer.rewrite.insert import set_multiplier
from looptransfer.trials import training
from looptransfer.trials.gate import gate

SWEEP = Path("reports/sweep/results.csv")
CHEAP_SEEDS = 6  # as `lt.gate` takes by default
FULL_SEEDS = 4
COORDINATES: dict[str, Any] = {"loops": [1, 4, 16], "steps": 2, "seeds": 3}


@dataclass(frozen=True)
class Project:
    """A reference experiment with the N that are trained, the target last, and the middle of its LRs as log2."""

    name: str
    layers: int
    base_layers: int
    loops: tuple[int, ...]
    middle: float

    def experiment(self) -> lt.Experiment:
        made = lt.reference_experiment(ReferenceSize(layers=self.layers))
        return replace(made, name=f"gate, {self.name}", base_layers=self.base_layers)

    @property
    def lrs(self) -> list[float]:
        """Seven, 0.75 octave apart, as in that sweep."""
        return [float(f"{2.0 ** (self.middle + 0.75 * step):.6g}") for step in range(-3, 4)]


LOOPED = Project("looped", layers=2, base_layers=2, loops=(2, 16), middle=-7.1038)  # about those of that sweep
DEEP = Project("deep", layers=4, base_layers=1, loops=(1, 2), middle=-6.0)  # its branches have an LR of their own


@dataclass(frozen=True)
class Fault:
    """A change of the code, as a context in which it is there; the experiment is what the context trains."""

    name: str
    project: Project
    plant: Callable[[lt.Experiment, contextlib.ExitStack], lt.Experiment]


def in_trial(name: str, change: Callable[..., Any]) -> Callable[[lt.Experiment, contextlib.ExitStack], lt.Experiment]:
    """A fault in the training function: `change` instead of what it calls `name`."""

    def plant(experiment: lt.Experiment, stack: contextlib.ExitStack) -> lt.Experiment:
        stack.enter_context(mock.patch.object(training, name, change))
        return experiment

    return plant


def lost_on_one_branch(model: torch.nn.Module, *arguments: Any, **named: Any) -> lt.ScalingPlan:
    plan = lt.parametrize(model, *arguments, **named)
    set_multiplier(model, plan.branches[-1].handle, 1.0)
    return plan


def sqrt_rule(model: torch.nn.Module, inputs: Any, rule: str, *arguments: Any, **named: Any) -> lt.ScalingPlan:
    return lt.parametrize(model, inputs, "sqrt", *arguments, **named)


def half_the_loops(model: torch.nn.Module, *arguments: Any, **named: Any) -> lt.ScalingPlan:
    loops, model.loops = model.loops, max(1, model.loops // 2)
    plan = lt.parametrize(model, *arguments, **named)
    model.loops = loops
    return plan


def one_group(
    model: torch.nn.Module, optimizer: Any, *, lr: float, weight_decay: float, **others: Any
) -> list[dict[str, Any]]:
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
    """In training, which multiplies LRs by itself, and in a scheduler of torch."""
    begin = training.Training.__init__

    def with_one_lr(self: training.Training, *arguments: Any) -> None:
        begin(self, *arguments)
        largest = max(lr for _, lr in self.base_lrs)
        self.base_lrs = [(group, largest) for group, _ in self.base_lrs]

    stack.enter_context(mock.patch.object(training.Training, "__init__", with_one_lr))
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
)


# -- the gates


@dataclass(frozen=True)
class Case:
    """What a gate is given: `first` is the first seed."""

    fault: Fault
    experiment: lt.Experiment
    baseline: lt.Baseline
    ledger: Path
    first: int


def rewritten(case: Case, loops: int) -> tuple[torch.nn.Module, lt.ScalingPlan]:
    """The model as it is trained: made, then rewritten on the first batch."""
    experiment = case.experiment
    model = experiment.make_model(loops)
    inputs, _ = next(experiment.batches(0))
    return model, training.parametrize(model, inputs, "factored", experiment.lam, experiment.base_layers)


def by_verify(case: Case) -> tuple[str, str]:
    """At the target N: `parametrize`, which warns, then `verify`."""
    torch.manual_seed(0)
    model, plan = rewritten(case, case.fault.project.loops[-1])
    lt.verify(model, next(case.experiment.batches(0))[0])
    return ("warned", "\n".join(plan.caveats)) if plan.caveats else ("passed", "")


def by_coordinates(case: Case) -> tuple[str, str]:
    """The coordinate check of the rewritten model, its optimizer and its scheduler."""
    experiment, lr = case.experiment, case.fault.project.lrs[3]

    def make_optimizer(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        groups = training.param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)
        optimizer = torch.optim.AdamW(groups, betas=experiment.betas)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    told = lt.coord_check(
        dataclasses.replace(experiment, make_model=lambda loops: rewritten(case, loops)[0]),
        make_optimizer=make_optimizer,
        **COORDINATES,
    )
    return told.answer, str(told)


def by_cheap_mode(case: Case) -> tuple[str, str]:
    loops = case.fault.project.loops
    told = gate(_of_seeds(case), case.baseline, loops, CHEAP_SEEDS, ledger=case.ledger, workers=1)
    return told.answer, str(told)


def by_full_check(case: Case) -> tuple[str, str]:
    project = case.fault.project
    runs = lt.sweep(
        _of_seeds(case), project.loops, lrs=project.lrs, seeds=FULL_SEEDS, ledger=case.ledger, workers=1
    )  # fmt: skip
    verdict = lt.check(runs)
    told = case.baseline.compare(verdict)
    return told.answer, f"{verdict}\n{told}"


def _of_seeds(case: Case) -> lt.Experiment:
    """The experiment whose seed 0 is the case's first seed: a gate chooses the baseline's own seeds."""
    first, experiment = case.first, case.experiment
    if first == 0:
        return experiment
    make = experiment.make_model

    def reseeded(loops: int) -> torch.nn.Module:
        torch.manual_seed(torch.initial_seed() + first)
        return make(loops)

    return replace(experiment, batches=lambda seed: experiment.batches(seed + first), make_model=reseeded)


GATES: dict[str, Callable[[Case], tuple[str, str]]] = {
    "verify": by_verify,
    "coordinate check": by_coordinates,
    "cheap mode": by_cheap_mode,
    "full check": by_full_check,
}
PASSED, CAUGHT = {"passed", "HOLDS", "PASSES"}, {"refused", "warned", "MOVED", "WORSE", "FAILS"}


def stored_optima(project: Project, ledgers: Path, workers: int) -> lt.Baseline:
    """The optima without fault: those of that table, or of a sweep of the same LRs and four seeds."""
    if project is LOOPED:
        runs = lt.read_results(SWEEP)
    else:
        ledger = ledgers / f"{project.name}.db"
        runs = lt.sweep(
            project.experiment(), project.loops, lrs=project.lrs, seeds=FULL_SEEDS, ledger=ledger, workers=workers
        )  # fmt: skip
    return lt.Baseline.of(lt.check(runs[runs["loops"].isin(project.loops)], rule="factored"))


Job = tuple[int, str, lt.Baseline, Path]


def judge(job: Job) -> dict[str, Any]:
    """A gate's answer to a fault, with its words and its CPU seconds."""
    number, name, baseline, ledgers = job
    torch.set_num_threads(1)
    fault = FAULTS[number]
    ledger = ledgers / f"{number}, {name}.db"
    with contextlib.ExitStack() as stack:
        experiment = fault.plant(fault.project.experiment(), stack)
        started = time.process_time()
        try:
            case = Case(fault, experiment, baseline, ledger, 4 if fault.name == OTHER_SEEDS else 0)
            answer, words = GATES[name](case)
        except lt.InputError as error:
            answer, words = "refused", str(error)
    told = {"fault": fault.name, "project": fault.project.name, "gate": name, "answer": answer}
    return told | {"seconds": round(time.process_time() - started, 1), "words": words}


def report(told: list[dict[str, Any]], seconds: float) -> str:
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
    named = {one["fault"] for one in planted if one["answer"] in CAUGHT}
    lines += [
        "",
        f"{'; '.join(counts)}. {len(named)} of {len({one['fault'] for one in planted})} are named by some gate. "
        "INCONCLUSIVE names no fault but is no pass: its exit status is 3.",
        "",
        "The reference model at its usual size; looped: " + _words(LOOPED) + "; deep: " + _words(DEEP) + ".",
        f"Stored optima: 7 LRs 0.75 octave apart; of looped from {SWEEP}, of deep {FULL_SEEDS} seeds.",
        f"Coordinate check: {_settings(COORDINATES)}. Cheap mode: 3 LRs, {CHEAP_SEEDS} seeds. Full check: 7 LRs 0.75 "
        f"octave apart, {FULL_SEEDS} seeds, by the optima of its own fit. Runs of unchanged code repeat those of the",
        "baseline where their seeds are the same; the controls have others, which is harder.",
        f"CPU seconds of one thread; {seconds:.0f} s in all on {os.cpu_count()} cores. "
        f"Python {platform.python_version()}, torch {version('torch')}, looptransfer {version('looptransfer')}, "
        f"{platform.machine()}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "not run"
    mark = "**" if one["answer"] in CAUGHT else ""
    return f"{mark}{one['answer']}{mark}, {one['seconds']:.1f} s"


def _words(project: Project) -> str:
    size = ReferenceSize(layers=project.layers)
    return (
        f"L = {size.layers}, base depth {project.base_layers}, N = {' and '.join(map(str, project.loops))}, width "
        f"{size.width}, {size.steps} steps of {size.batch} × {size.sequence} tokens"
    )


def _settings(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/gate"))
    parser.add_argument("--ledgers", type=Path, default=Path("build/gate-faults"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    for folder in (arguments.out, arguments.ledgers):
        folder.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "faults.json"
    kept = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "answers": []}
    told, started = kept["answers"], time.perf_counter() - kept["seconds"]
    done = {(one["fault"], one["project"], one["gate"]) for one in told}
    baselines = {project: stored_optima(project, arguments.ledgers, arguments.workers) for project in (LOOPED, DEEP)}
    for project, baseline in baselines.items():
        baseline.write(arguments.out / f"lr-optima-{project.name}.json")
    jobs: list[Job] = [
        (number, name, baselines[fault.project], arguments.ledgers)
        for name, (number, fault) in itertools.product(GATES, enumerate(FAULTS))  # the quickest gate first
        if (fault.name, fault.project.name, name) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for one in pool.imap_unordered(judge, jobs):
            print(*one.values(), sep="\n", flush=True)
            told.append(one)
            seconds = time.perf_counter() - started
            path.write_text(json.dumps({"seconds": seconds, "answers": told}, indent=1, ensure_ascii=False) + "\n")
            (arguments.out / "README.md").write_text(report(told, seconds))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
