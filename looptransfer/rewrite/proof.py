"""A plan is accepted only when a randomised copy of the model behaves as the plan says."""

import math
from collections import Counter

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError
from looptransfer.rewrite.analysis import Analysis, analyse
from looptransfer.rewrite.branches import DECLARE, DECLARED, Group
from looptransfer.rewrite.graph import ANY, Handle, Site
from looptransfer.rewrite.insert import set_multiplier
from looptransfer.rewrite.record import ExampleInputs, record
from looptransfer.rewrite.twin import twin_of

SEED = 1  # of what a model draws while it is put to the proof


def prove(twin: nn.Module, example_inputs: ExampleInputs, declared: list[str] | None) -> Analysis:
    """Run the proof on copies of `twin`, a randomised copy of a model without multipliers; returns its analysis.

    With a different ε on every branch, the rewritten copy must compute what the plain one computes when the operands of
    the traced additions are multiplied: the handles are those branches and nothing else. The weights are random, since a
    zero-initialised branch end would make this vacuous.

    Raises:
        InputError: it does not, so that no faithful rewrite is known.
    """
    analysis = analyse(twin_of(twin), example_inputs, declared, seed=SEED)
    groups = analysis.groups
    if all(add.site.source != DECLARED for group in groups for add in group.adds):
        _check_equality(twin, example_inputs, groups, Counter(total.site for total in analysis.trace.graph.sums))
    return analysis


def _with(twin: nn.Module, multipliers: dict[Handle, float]) -> nn.Module:
    """A fresh copy with multipliers: what a forward leaves in a module does not reach the next one."""
    scaled = twin_of(twin)
    for handle, multiplier in multipliers.items():
        set_multiplier(scaled, handle, multiplier)
    return scaled


def _check_equality(twin: nn.Module, example_inputs: ExampleInputs, groups: list[Group], runs: Counter[Site]) -> None:
    scale: dict[tuple[Site, int], tuple[int, float]] = {}
    multipliers: dict[Handle, float] = {}
    for number, together in enumerate(_added_together(groups)):
        multiplier = 0.25 + 0.5 * math.modf(0.618 * number)[0]
        for group in together:
            multipliers[group.handle] = multiplier
            scale |= {(add.site, add.occurrence): (add.position, multiplier) for add in group.adds}
    for site, times in runs.items():  # other values may loop more often, and all runs of a site may be alike
        alike = {scale.get((site, occurrence)) for occurrence in range(times)}
        if len(alike) == 1 and (one := alike.pop()):
            scale[site, ANY] = one
    rewritten = record(_with(twin, multipliers), example_inputs, seed=SEED).results
    wanted = record(twin_of(twin), example_inputs, seed=SEED, scale=scale).results
    if not all_agree(rewritten, wanted, twin):
        names = ", ".join(str(group.handle) for group in groups[:4])
        lines = list(dict.fromkeys(add.site.source for group in groups for add in group.adds))
        raise InputError(
            f"multiplying what {names}{', …' * (len(groups) > 4)} hand over is not the same as multiplying what is "
            f"added to the stream at {', '.join(lines[:4])}, so no faithful rewrite is known. Mark the branches: "
            f"x + looptransfer.residual(…). {DECLARE}"
        )


def _added_together(groups: list[Group]) -> list[list[Group]]:
    """Groups that meet in one addition, as in x + (a(x) + b(x)), can only be told apart together."""
    parts: list[list[Group]] = []
    for group in groups:
        adds = {id(add) for add in group.adds}
        meeting = [part for part in parts if any(id(add) in adds for other in part for add in other.adds)]
        parts = [part for part in parts if part not in meeting] + [[*(g for part in meeting for g in part), group]]
    return parts


def all_agree(ours: list[Tensor], theirs: list[Tensor], model: nn.Module) -> bool:
    """Two runs gave the same but for rounding: within 1e-4 of the norm in float32, 6 % in bfloat16."""
    if len(ours) != len(theirs):
        return False
    dtypes = {tensor.dtype for tensor in [*ours, *model.parameters()] if tensor.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    room = 1e-8 if coarsest < 1e-12 else max(8 * coarsest, 1e-4)
    return all(_agree(a, b, room) for a, b in zip(ours, theirs, strict=True))


def _agree(ours: Tensor, theirs: Tensor, room: float) -> bool:
    if not ours.is_floating_point() or ours.is_meta:
        return True
    a, b = ours.detach().double(), theirs.detach().double()
    finite = a.isfinite() & b.isfinite()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    return float((a - b)[finite].norm()) <= room * float(b[finite].norm())
