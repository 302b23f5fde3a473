"""Planted faults against `verify` and the coordinate check, false alarms of clean runs, and mup's check beside ours.

    python benchmarks/coordcheck_faults.py [--clean RUNS]

Every fault is planted in a copy of three projects (a pre-norm decoder, an ALBERT-like post-norm encoder, a prelude-loop-coda
decoder), which are rewritten by `parametrize` and trained on the groups of `param_groups`. Writes
reports/coordcheck/README.md and clean.csv. Takes under ten minutes with one thread.
"""

import argparse
import platform
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from coordcheck_models import KINDS, Project

import looptransfer as lt

REPORT = Path(__file__).parent.parent / "reports" / "coordcheck"
CI_SIZED: dict[str, Any] = {"loops": [1, 4, 16], "layers": [2, 8], "steps": 2, "seeds": 3}
LR = 1e-3


@dataclass(frozen=True)
class Fault:
    """What is done to a rewritten model with its plan, and how its optimizer is made."""

    name: str
    model: Callable[[nn.Module, lt.ScalingPlan], Any] = lambda model, plan: None
    optimizer: Callable[[nn.Module], Any] = lambda model: adamw(groups(model))
    before: Callable[[nn.Module], Any] = lambda model: None  # the rewrite
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


def looped(model: nn.Module, plan: lt.ScalingPlan) -> list[tuple[nn.Module, lt.Branch]]:
    """The branches in the loop."""
    return [(model.get_submodule(b.module), b) for b in plan.branches if b.module.startswith("layers.")]


def rescaled(
    factor: Callable[[lt.Branch], float], which: slice = slice(None), at: Callable[[int, int], bool] = lambda n, of: True
) -> Callable[[nn.Module, lt.ScalingPlan], None]:
    """Multiply the outputs of some looped branches, at some visits."""

    def plant(model: nn.Module, plan: lt.ScalingPlan) -> None:
        for module, branch in looped(model, plan)[which]:
            value, visits = factor(branch), int(branch.visits)
            scaled_output(module, lambda n, value=value, visits=visits: value if at(n, visits) else 1.0)
        counted(model)

    return plant


def lost(branch: lt.Branch) -> float:
    return 1 / branch.multiplier


def normalised_again(model: nn.Module, plan: lt.ScalingPlan) -> None:
    """The norm moved from before the branch to behind its multiplier."""
    for module, _ in looped(model, plan):
        module.register_forward_hook(lambda m, args, out: nn.functional.rms_norm(out, out.shape[-1:], eps=1e-20))


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
    """Initialise a matrix of every looped branch with another scale: 0 its first, −1 its last."""

    def plant(model: nn.Module, plan: lt.ScalingPlan) -> None:
        for module, _ in looped(model, plan):
            matrices = [p for p in module.parameters() if p.ndim >= 2]
            with torch.no_grad():
                matrices[which].mul_(factor(model.loops))  # type: ignore[arg-type]

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


def of_depth(branch: lt.Branch) -> float:
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
    Fault("the stream is scaled too, by 1 − 1/N", on_stream(lambda n: 1 - 1 / n if n > 1 else 1.0)),
    Fault("the stream is doubled after every loop's blocks", on_stream(lambda n: 1.1)),
    Fault("input injected in every loop, unscaled", before=injected),
    Fault("embedding scaled by N", times("embedding", float), only=("reference", "prelude-loop-coda")),
    Fault("last maps start √N larger", weights(lambda n: n**0.5, -1)),
    Fault("last maps start 1/N smaller", weights(lambda n: 1 / n, -1)),
    Fault("attention logits × 1/N", attention_temperature),
    Fault("gradient of the last loop alone", last_loop_only),
    Fault("LR of the branches × 1/N", optimizer=lr_scaled(lambda n: 1 / n)),
    Fault("LR of the branches × √N", optimizer=lr_scaled(lambda n: n**0.5)),
    Fault("coda scaled by 1/N as well", times("coda.0.mlp", lambda n: 1 / n), only=("prelude-loop-coda",)),
    Fault("LR of parameters on the stream left", optimizer=lambda m: adamw(groups(m, on_stream="leave")), only=("ALBERT-like",)),
]  # fmt: skip


def faulty(project: Project, fault: Fault) -> Callable[..., nn.Module]:
    """The project's factory with the fault in it."""

    def make(loops: int, layers: int = 2) -> nn.Module:
        model = project.plain(fault.planned_loops(loops), layers)
        fault.before(model)
        plan = lt.parametrize(model, next(project.batches(0))[0])
        model.loops = loops  # type: ignore[assignment]
        fault.model(model, plan)
        return model

    return make


def verified(project: Project, fault: Fault) -> tuple[bool, float]:
    """Whether `verify` finds the fault at N = 4, and in what time."""
    torch.manual_seed(0)
    model = faulty(project, fault)(4)
    started = time.perf_counter()
    try:
        lt.verify(model, next(project.batches(0))[0])
    except lt.VerificationError:
        return True, time.perf_counter() - started
    return False, time.perf_counter() - started


def checked(project: Project, fault: Fault) -> tuple[lt.CoordCheck, float]:
    started = time.perf_counter()
    result = lt.coord_check(faulty(project, fault), project.batches, make_optimizer=fault.optimizer, **CI_SIZED)
    return result, time.perf_counter() - started


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faults_table()
