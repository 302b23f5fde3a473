"""Planted faults against `verify` and the coordinate check, false alarms of clean runs, and mup's check beside ours.

    python benchmarks/coordcheck_faults.py [--clean RUNS]

Every fault is planted in a copy of three projects (a pre-norm decoder, an ALBERT-like post-norm encoder, a
prelude-loop-coda decoder), which are rewritten by `parametrize` and trained on the groups of `param_groups`. Writes
reports/coordcheck/README.md and clean.csv. Takes ten minutes with one thread.
"""

import argparse
import functools
import multiprocessing
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from coordcheck_models import KINDS, Project

import looptransfer as lt
from looptransfer.reference.model import Block
from looptransfer.rewrite.plan import Branch

REPORT = Path(__file__).parent.parent / "reports" / "coordcheck"
CI_SIZED: dict[str, Any] = {"loops": [1, 4, 16], "layers": [2, 8], "steps": 2, "seeds": 3}
LR = 1e-3


def nothing(model: nn.Module) -> None:
    """No change."""


@dataclass(frozen=True)
class Fault:
    """What is done to a rewritten model with its plan, and how its optimizer is made."""

    name: str
    model: Callable[[nn.Module, lt.ScalingPlan], Any] = lambda model, plan: None
    optimizer: Callable[[nn.Module], Any] = lambda model: adamw(groups(model))
    before: Callable[[nn.Module], Any] = nothing  # the rewrite
    planned_loops: Callable[[int], int] = lambda loops: loops  # at which the plan is made
    scaling: bool = True  # it touches how something scales with N or L
    only: tuple[str, ...] = KINDS


def groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    return lt.param_groups(model, torch.optim.AdamW, lr=LR, **options)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)


# -- how faults are planted


def scaled_output(module: nn.Module, factor: Callable[[int], float]) -> None:
    """Multiply what a module hands back at its n-th call of a forward, n from 0."""
    calls = [0]
    module.register_forward_hook(lambda m, args, out: out * factor(calls.__setitem__(0, calls[0] + 1) or calls[0] - 1))
    module._restart = lambda: calls.__setitem__(0, 0)  # type: ignore[assignment]


def counted(model: nn.Module) -> None:
    """Begin the count of calls anew at every forward."""
    modules = [module for module in model.modules() if hasattr(module, "_restart")]
    model.register_forward_pre_hook(lambda m, args: [module._restart() for module in modules] and None)


def looped(model: nn.Module, plan: lt.ScalingPlan) -> list[tuple[nn.Module, Branch]]:
    """The branches in the loop."""
    return [(model.get_submodule(b.module), b) for b in plan.branches if b.module.startswith("layers.")]


def rescaled(
    factor: Callable[[Branch], float],
    which: slice = slice(None),
    at: Callable[[int, int], bool] = lambda n, of: True,
) -> Callable[[nn.Module, lt.ScalingPlan], None]:
    """Multiply the outputs of some looped branches, at some visits."""

    def plant(model: nn.Module, plan: lt.ScalingPlan) -> None:
        for module, branch in looped(model, plan)[which]:
            value, visits = factor(branch), int(branch.visits)
            scaled_output(module, lambda n, value=value, visits=visits: value if at(n, visits) else 1.0)
        counted(model)

    return plant


def lost(branch: Branch) -> float:
    return 1 / branch.multiplier


def normalised_again(model: nn.Module, plan: lt.ScalingPlan) -> None:
    """The norm moved from before the branch to behind its multiplier."""
    for module, _ in looped(model, plan):
        scaled: Any = type(module)

        def forward(self: nn.Module, *inputs: Tensor, scaled: Any = scaled) -> Tensor:
            out = scaled.forward(self, *inputs)
            return F.layer_norm(out, out.shape[-1:], eps=1e-20)

        module.__class__ = type(f"Normed{scaled.__name__}", (scaled,), {"forward": forward})


def on_stream(factor: Callable[[int], float]) -> Callable[[nn.Module, lt.ScalingPlan], None]:
    """Multiply the stream after every block."""

    def plant(model: nn.Module, plan: lt.ScalingPlan) -> None:
        for block in model.layers:  # type: ignore[union-attr]
            block.register_forward_hook(lambda m, args, out: out * factor(model.loops))  # type: ignore[arg-type]

    return plant


def injected(model: nn.Module) -> None:
    """The embedding is added again in every loop, unscaled."""
    kept: list[Tensor] = []
    block = model.layers[0]  # type: ignore[index]
    model.register_forward_pre_hook(lambda m, args: kept.clear())

    def add(m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0]) if not kept else None
        return (args[0] + kept[0], *args[1:])

    block.register_forward_pre_hook(add)


def times(name: str, factor: Callable[[int], float]) -> Callable[[nn.Module, lt.ScalingPlan], None]:
    """Multiply what one module hands back by a function of N."""

    def plant(model: nn.Module, plan: lt.ScalingPlan) -> None:
        model.get_submodule(name).register_forward_hook(lambda m, args, out: out * factor(model.loops))  # type: ignore[arg-type]

    return plant


def weights(factor: Callable[[int], float], which: int) -> Callable[[nn.Module, lt.ScalingPlan], None]:
    """Initialise a map of every looped branch, its bias included, with another scale: 0 its first, −1 its last."""

    def plant(model: nn.Module, plan: lt.ScalingPlan) -> None:
        for module, _ in looped(model, plan):
            linear = [one for one in module.modules() if isinstance(one, nn.Linear)][which]
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.mul_(factor(model.loops))  # type: ignore[arg-type]

    return plant


def attention_temperature(model: nn.Module, plan: lt.ScalingPlan) -> None:
    for module, branch in looped(model, plan):
        if branch.module.endswith("attention"):
            width = module.qkv.out_features // 3  # type: ignore[union-attr,operator]
            scale = torch.cat([torch.full((width,), 1 / model.loops), torch.ones(2 * width)])  # type: ignore[operator]
            module.qkv.register_forward_hook(lambda m, args, out, scale=scale: out * scale)  # type: ignore[union-attr]


def last_loop_only(model: nn.Module, plan: lt.ScalingPlan) -> None:
    """Gradients of the last visit alone, as in one-step gradients of recurrent-depth models."""
    for module, branch in looped(model, plan):
        scaled_output(module, lambda n: 1.0)
        visits, seen = int(branch.visits), [0]

        def hook(m: nn.Module, args: Any, out: Tensor, visits: int = visits, seen: list[int] = seen) -> Tensor:
            seen[0] += 1
            return out.detach() if seen[0] % visits else out

        module.register_forward_hook(hook)


def of_depth(branch: Branch) -> float:
    """What takes 1/√m_L out again, N staying."""
    return 1 / (branch.multiplier * branch.visits)


def scheduled(model: nn.Module) -> Any:
    """A scheduler that sets every group's LR to its own schedule."""
    optimizer = adamw(groups(model))

    class Absolute(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            return [LR for _ in self.optimizer.param_groups]

    return optimizer, Absolute(optimizer)


def lr_scaled(factor: Callable[[int], float]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        given = groups(model)
        for group in given:
            group["lr"] *= factor(model.loops) if group["name"].startswith("branches") else 1.0  # type: ignore[arg-type]
        return adamw(given)

    return make


FAULTS = [
    # those of the verdict's issue
    Fault("multiplier lost on one branch", rescaled(lost, slice(1, 2))),
    Fault("1/√N for 1/N", rescaled(lambda b: b.visits**0.5)),
    Fault("N miscounted: planned at N = 2", planned_loops=lambda n: min(n, 2)),
    Fault("multiplier applied twice", rescaled(lambda b: b.multiplier)),
    Fault("param groups dropped", optimizer=lambda model: adamw(model.parameters())),
    Fault("scheduler overwrites the groups' LRs", optimizer=scheduled),
    Fault("norm moved behind the multiplier", normalised_again),
    Fault("head scaled by 1/N", times("head", lambda n: 1 / n)),
    Fault("Adam eps × 1000", optimizer=lambda model: adamw(groups(model, eps=1e-5))),
    Fault("head scaled by 3", times("head", lambda n: 3.0), scaling=False),
    # more that touch scaling
    Fault("multiplier lost on all branches", rescaled(lost)),
    Fault("multiplier lost on one layer", rescaled(lost, slice(2, 4))),
    Fault("multiplier only in the first loop", rescaled(lost, at=lambda n, of: n > 0)),
    Fault("multiplier lost in the last loop", rescaled(lost, at=lambda n, of: n == of - 1)),
    Fault("multiplier lost in every other loop", rescaled(lost, at=lambda n, of: n % 2 == 1)),
    Fault("N counted one too many", rescaled(lambda b: b.visits / (b.visits + 1))),
    Fault("N counts both branches: 1/2N", rescaled(lambda b: 0.5), scaling=False),
    Fault("1/√m_L lost", rescaled(of_depth)),
    Fault("1/m_L for 1/√m_L", rescaled(lambda b: b.multiplier * b.visits)),
    Fault("the stream is scaled too", on_stream(lambda n: 0.9), only=("reference", "prelude-loop-coda")),
    Fault("input injected in every loop, unscaled", before=injected),
    Fault("embedding scaled by N", times("embedding", float), only=("reference", "prelude-loop-coda")),
    Fault("last maps start √N larger", weights(lambda n: n**0.5, -1)),
    Fault("last maps start 1/N smaller", weights(lambda n: 1 / n, -1)),
    Fault("attention logits × 1/N", attention_temperature),
    Fault("gradient of the last loop alone", last_loop_only),
    Fault("LR of the branches × 1/N", optimizer=lr_scaled(lambda n: 1 / n)),
    Fault("LR of the branches × √N", optimizer=lr_scaled(lambda n: n**0.5)),
    Fault("coda scaled by 1/N as well", times("coda.0.mlp", lambda n: 1 / n), only=("prelude-loop-coda",)),
    Fault("LR on the stream left", optimizer=lambda model: adamw(groups(model, on_stream="leave")), only=KINDS[1:2]),
]  # fmt: skip


PLANS: dict[str, str] = {}  # JSON of the plan of a size; processes that measure are handed them


def planned(project: Project, before: Callable[[nn.Module], Any], loops: int, layers: int) -> lt.ScalingPlan:
    """The plan of a size: a project makes it once and keeps it."""
    key = f"{project} {before.__name__} {loops} {layers}"
    if key not in PLANS:
        with torch.random.fork_rng():
            model = project.plain(loops, layers)
            before(model)
            PLANS[key] = lt.parametrize(model, next(project.batches(0))[0]).to_json()
    return lt.ScalingPlan.from_json(PLANS[key])


def faulty(project: Project, fault: Fault) -> Callable[..., nn.Module]:
    """The project's factory with the fault in it."""

    def make(loops: int, layers: int = 2) -> nn.Module:
        model = project.plain(loops, layers)
        fault.before(model)
        plan = planned(project, fault.before, fault.planned_loops(loops), layers)
        lt.apply_plan(model, plan)
        fault.model(model, plan)
        return model

    return make


def verified(project: Project, fault: Fault) -> tuple[bool, float]:
    """Whether `verify` finds the fault at N = 4, and in what time."""
    torch.manual_seed(0)
    model = faulty(project, fault)(4)
    started = time.process_time()
    try:
        lt.verify(model, next(project.batches(0))[0])
    except lt.VerificationError:
        return True, time.process_time() - started
    return False, time.process_time() - started


def checked(project: Project, fault: Fault) -> tuple[lt.CoordCheck, float]:
    started = time.process_time()
    result = lt.coord_check(project.experiment(faulty(project, fault)), make_optimizer=fault.optimizer, **CI_SIZED)
    return result, time.process_time() - started


def faults_table() -> list[dict[str, Any]]:
    rows = []
    for fault in FAULTS:
        for kind in fault.only:
            project = Project(kind)
            found, seconds = verified(project, fault)
            try:
                result, took = checked(project, fault)
                answer, why = result.answer, (result.reasons or [""])[0]
            except lt.InputError as error:
                answer, why, took = "REFUSED", str(error), float("nan")
            row = {"fault": fault.name, "project": kind, "scaling": fault.scaling, "verify": found, "verify_s": seconds}
            rows.append({**row, "coordcheck": answer, "coordcheck_s": took, "why": why})
            print(f"{kind:18} {fault.name:48} verify {found!s:5} {answer:13} {took:5.1f} s  {why[:110]}", flush=True)
    return rows


# -- clean runs


def clean_runs(count: int) -> pd.DataFrame:
    """Checks of projects without a fault, each with seeds, a size and a base LR of its own."""
    rows = []
    for run in range(count):
        kind, width, layers = KINDS[run % 3], (16, 32, 48)[run // 3 % 3], 1 + run // 9 % 3
        loops = ([1, 2, 4, 8], [1, 4, 16])[run // 27 % 2]
        project = Project(kind, width=width)
        lr = LR * (1 / 3, 1, 3)[run // 54 % 3]
        result = lt.coord_check(
            project.experiment(functools.partial(faulty(project, CLEAN), layers=layers)),
            loops,
            steps=2,
            seeds=range(3 * run, 3 * run + 3),
            make_optimizer=lambda model, lr=lr: torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=lr)),
        )
        size = {
            "run": run,
            "project": kind,
            "width": width,
            "layers": layers,
            "loops": " ".join(map(str, loops)),
            "lr": lr,
        }
        why = "; ".join(result.reasons)
        rows.append({**size, "statistics": len(result.judged), "answer": result.answer, "why": why})
        if result.answer != "PASSES":
            print(size, str(result)[:900], flush=True)
    return pd.DataFrame(rows)


CLEAN = Fault("none")


# -- beside mup's


class UndoneBlock(Block):
    """The MLP's multiplier is undone where it is added."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.mlp(self.mlp_norm(x)) * self.undo


def undone(model: nn.Module, plan: lt.ScalingPlan) -> None:
    block = model.layers[0]  # type: ignore[index]
    block.__class__, block.undo = UndoneBlock, model.loops


SIDE_BY_SIDE = {
    "none": CLEAN,
    "multiplier lost on layers.0.mlp": Fault("lost", rescaled(lost, slice(1, 2))),
    "multiplier undone at the add": Fault("undone", undone),
}
SIZES = {"N": [1, 4, 16, 64], "width": [16, 32, 64, 128]}


def mup_slopes(fault: str, axis: str) -> dict[str, Any]:
    """What mup's check records of the reference model: slopes of log2 l1 in log2 of the axis, after the last step."""
    from mup.coord_check import get_coord_data  # noqa: PLC0415

    def make(size: int) -> Callable[[], nn.Module]:
        project = Project("reference", width=32 if axis == "N" else size)
        return lambda: faulty(project, SIDE_BY_SIDE[fault])(size if axis == "N" else 16)

    tokens, targets = next(Project("reference").batches(0))
    data = get_coord_data(
        {size: make(size) for size in SIZES[axis]}, [(tokens, targets.flatten())], optimizer="adam", mup=False,
        lr=LR, nsteps=3, nseeds=3, flatten_output=True, cuda=False, show_progress=False,
    )  # fmt: skip
    last = data[data["t"] == 3].groupby(["module", "width"])["l1"].mean().unstack()
    x = np.log2(last.columns.to_numpy(dtype=float))
    slopes = {str(module): float(np.polyfit(x, np.log2(row), 1)[0]) for module, row in last.iterrows()}
    branches = {name: slopes[name] for name in ("layers.0.attention", "layers.0.mlp", "layers.0", "head")}
    return {"rows": len(data), "said": ", ".join(f"{name} {slope:+.2f}" for name, slope in branches.items())}


def our_verdict(fault: str, axis: str) -> dict[str, Any]:
    project = Project("reference")
    result = lt.coord_check(project.experiment(faulty(project, SIDE_BY_SIDE[fault])), SIZES["N"], steps=3)
    return {"rows": len(result.frame), "said": f"{result.answer}. {(result.reasons or [''])[0]}"}


def measured(function: str, fault: str, axis: str, plans: dict[str, str]) -> dict[str, Any]:
    """Run in a process of its own: CPU seconds without imports, and by how much the peak of its memory grew."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PLANS.update(plans)
    project = Project("reference")
    for size in SIZES["N"]:  # what every training needs is there before anything is measured
        F.cross_entropy(
            project.plain(size)(next(project.batches(0))[0]).flatten(0, 1), torch.zeros(128).long()
        ).backward()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = globals()[function](fault, axis)
    seconds = time.process_time() - started
    return {**found, "s": seconds, "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def side_by_side() -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    for size in SIZES["N"]:
        planned(Project("reference"), nothing, size, 2)
    for width in SIZES["width"]:
        planned(Project("reference", width=width), nothing, 16, 2)
    rows = []
    for fault in SIDE_BY_SIDE:
        for name, function, axis in (
            ("mup, over width", "mup_slopes", "width"),
            ("mup, N given as width", "mup_slopes", "N"),
            ("looptransfer, over N", "our_verdict", "N"),
        ):
            with context.Pool(1) as pool:
                found = pool.apply(measured, (function, fault, axis, PLANS))
            rows.append({"fault": fault, "check": name, **found})
            print(rows[-1], flush=True)
    return rows


# -- the report

HEAD = """# Does the coordinate check see what is wrong?

Made by `python benchmarks/coordcheck_faults.py` in {seconds:.0f} s ({cpu:.0f} s of CPU time;
all other seconds here are CPU time of one thread, since the machine was shared): looptransfer {looptransfer}, torch
{torch}, mup {mup}, Python {python}. Seeds 0–2 for the faults, {seeds} for the clean runs.

Three projects are rewritten by `parametrize` and trained on the groups of `param_groups`: a pre-norm decoder
(*reference*), an *ALBERT-like* post-norm encoder, and a *prelude-loop-coda* decoder; width 32, two layers in the loop.
Into each a fault is planted. The coordinate check has the size meant for CI: N = 1, 4, 16, L = 2 and 8 at N = 4, two
steps, three seeds. It fails (exit 1), refuses a model that is no longer a plain x + f(x) (exit 2), or is not sure
(exit 3); all three stop a CI job, and count as caught. `verify` is given the model at N = 4.
"""


def report(faults: list[dict[str, Any]], clean: pd.DataFrame, beside: list[dict[str, Any]], seconds: float) -> str:
    versions = {name: version(name) for name in ("looptransfer", "torch", "mup")}
    head = HEAD.format(
        seconds=seconds,
        cpu=time.process_time(),
        python=platform.python_version(),
        seeds=f"0–{3 * len(clean) - 1}",
        **versions,
    )
    return (
        "\n".join([head, *_faults_section(pd.DataFrame(faults)), *_clean_section(clean), *_beside_section(beside)])
        + "\n"
    )


def _faults_section(table: pd.DataFrame) -> list[str]:
    caught = table["coordcheck"] != "PASSES"
    scaling = table["scaling"]
    lines = [
        "## Planted faults\n",
        f"Of {scaling.sum()} faults that touch scaling (in all projects) the coordinate check catches "
        f"{(caught & scaling).sum()}, `verify` {(table['verify'] & scaling).sum()}; the check takes "
        f"{table['coordcheck_s'].median():.1f} s at the median and {table['coordcheck_s'].max():.1f} s at most, "
        f"`verify` {table['verify_s'].median():.2f} s. The last rows are constants that do not depend on N or L: "
        "another λ, or another scale of the output. They are no fault of scaling, and the coordinate check passes.\n",
        "| fault | project | verify | coordinate check | s | its first reason |",
        "|---|---|---|---|---|---|",
    ]
    for _, row in table.sort_values("scaling", ascending=False, kind="stable").iterrows():
        answer = {"PASSES": "missed", "FAILS": "caught", "INCONCLUSIVE": "not sure", "REFUSED": "refused"}[
            row["coordcheck"]
        ]
        why = row["why"].replace("|", "/").replace(str(Path.cwd()) + "/", "")
        seen = "caught" if row["verify"] else "missed"
        lines.append(f"| {row['fault']} | {row['project']} | {seen} | {answer} | {row['coordcheck_s']:.1f} | {why} |")
    return lines


def _clean_section(clean: pd.DataFrame) -> list[str]:
    counts = clean["answer"].value_counts()
    fails, unsure = int(counts.get("FAILS", 0)), int(counts.get("INCONCLUSIVE", 0))
    lines = [
        "\n## False alarms\n",
        f"{len(clean)} clean checks over projects, widths 16–48, 1–3 looped layers, base LRs 1/3–3 × 10⁻³, N up to 8 "
        f"or 16, with seeds of their own; {clean['statistics'].min()} to {clean['statistics'].max()} statistics in "
        "each, all counted. "
        f"Stated level: 5 % for one false alarm or more in a check. Seen: **{fails} FAILS** "
        f"({100 * fails / len(clean):.1f} %), {unsure} inconclusive, {len(clean) - fails - unsure} passes "
        "([all runs](clean.csv)).\n",
        "| project | checks | fails | inconclusive |",
        "|---|---|---|---|",
    ]
    for kind, rows in clean.groupby("project"):
        answers = rows["answer"]
        lines.append(f"| {kind} | {len(rows)} | {(answers == 'FAILS').sum()} | {(answers == 'INCONCLUSIVE').sum()} |")
    return lines


def _beside_section(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "\n## Beside `mup.coord_check`\n",
        "The reference model, three steps, three seeds, each check in a process of its own; plans made beforehand. "
        "mup is run over width at N = 16, as it is meant, and with N handed in as the width. It returns a frame and a "
        "picture; given here are the slopes of its l1, the mean over visits and seeds, after the last step. It looks "
        "at what modules return: a multiplier lost inside the module shows as one slope among many when N is handed "
        "in, and not in the picture over width; one undone at the addition shows in neither. MiB: growth of the "
        "process's peak memory beyond that of one plain training step at the largest N.\n",
        "| fault | check | s | MiB | rows | what it says |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['fault']} | {row['check']} | {row['s']:.1f} | {row['MiB']:.0f} | {row['rows']} | {row['said']} |"
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", type=int, default=200, metavar="RUNS", help="clean runs (default: 200)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    beside, faults, clean = side_by_side(), faults_table(), clean_runs(arguments.clean)
    REPORT.mkdir(parents=True, exist_ok=True)
    clean.to_csv(REPORT / "clean.csv", index=False)
    text = report(faults, clean, beside, time.perf_counter() - started)
    (REPORT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
