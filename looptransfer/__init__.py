"""μP-style hyperparameter transfer for looped (weight-tied) Transformers: tune at small N, train at large N."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looptransfer.audit import rescale as rescale
    from looptransfer.audit import verify as verify
    from looptransfer.coordcheck.monitor import Monitor as Monitor
    from looptransfer.coordcheck.result import CoordCheck as CoordCheck
    from looptransfer.coordcheck.run import coord_check as coord_check
    from looptransfer.errors import InputError as InputError
    from looptransfer.errors import PairingWarning as PairingWarning
    from looptransfer.errors import ScalingWarning as ScalingWarning
    from looptransfer.errors import VerificationError as VerificationError
    from looptransfer.explanation import Explanation as Explanation
    from looptransfer.explanation import explain as explain
    from looptransfer.optim import param_groups as param_groups
    from looptransfer.optim import set_lr as set_lr
    from looptransfer.reference.experiment import reference_experiment as reference_experiment
    from looptransfer.reference.model import LoopedDecoder as LoopedDecoder
    from looptransfer.report.page import write_html as write_html
    from looptransfer.rewrite.fold import fold as fold
    from looptransfer.rewrite.fold import remove as remove
    from looptransfer.rewrite.marker import residual as residual
    from looptransfer.rewrite.parametrize import apply_plan as apply_plan
    from looptransfer.rewrite.parametrize import parametrize as parametrize
    from looptransfer.rewrite.plan import ScalingPlan as ScalingPlan
    from looptransfer.rules import residual_multiplier as residual_multiplier
    from looptransfer.transfer.baseline import Baseline as Baseline
    from looptransfer.transfer.check import check as check
    from looptransfer.transfer.sources import read_results as read_results
    from looptransfer.transfer.verdict import Verdict as Verdict
    from looptransfer.trials.command import Command as Command
    from looptransfer.trials.experiment import Experiment as Experiment
    from looptransfer.trials.function import Function as Function
    from looptransfer.trials.gate import gate as gate
    from looptransfer.trials.run import Trial as Trial
    from looptransfer.trials.sampler import LRSampler as LRSampler
    from looptransfer.trials.sweep import sweep as sweep
    from looptransfer.trials.sweep import tune as tune

# Each name is imported when it is first used: `import looptransfer` and judging a table load no torch (PEP 562).
_HOMES = {
    "Baseline": "transfer.baseline",
    "Command": "trials.command",
    "CoordCheck": "coordcheck.result",
    "Experiment": "trials.experiment",
    "Explanation": "explanation",
    "Function": "trials.function",
    "InputError": "errors",
    "LRSampler": "trials.sampler",
    "LoopedDecoder": "reference.model",
    "Monitor": "coordcheck.monitor",
    "PairingWarning": "errors",
    "ScalingPlan": "rewrite.plan",
    "ScalingWarning": "errors",
    "Trial": "trials.run",
    "Verdict": "transfer.verdict",
    "VerificationError": "errors",
    "apply_plan": "rewrite.parametrize",
    "check": "transfer.check",
    "coord_check": "coordcheck.run",
    "explain": "explanation",
    "fold": "rewrite.fold",
    "gate": "trials.gate",
    "param_groups": "optim",
    "set_lr": "optim",
    "parametrize": "rewrite.parametrize",
    "read_results": "transfer.sources",
    "reference_experiment": "reference.experiment",
    "remove": "rewrite.fold",
    "rescale": "audit",
    "residual": "rewrite.marker",
    "residual_multiplier": "rules",
    "sweep": "trials.sweep",
    "tune": "trials.sweep",
    "verify": "audit",
    "write_html": "report.page",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'looptransfer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"looptransfer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
