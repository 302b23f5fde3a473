"""A plan is accepted only when a randomised copy of the model behaves as the plan says."""

import math
from collections import Counter

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError
from looptransfer.rewrite.branches import DECLARE, Group, find_groups
from looptransfer.rewrite.graph import ANY, ExampleInputs, Site, record
from looptransfer.rewrite.insert import clear_multipliers, set_multiplier
from looptransfer.rewrite.plan import ScalingPlan
from looptransfer.rewrite.trace import Trace, trace


def prove(twin: nn.Module, example_inputs: ExampleInputs, found: Trace, plan: ScalingPlan) -> dict[str, int]:
    """Run three checks on `twin`, and return the parameters that escape ε, with how often each is used.

    1. With every ε = 0, every branch operand is exactly zero.
    2. With every ε = 0, a parameter used twice or more that the output still depends on is under no scaled branch: it
       acts on the stream, and is returned.
    3. With a different ε on every branch, the rewritten copy computes what the plain one computes when the operands of
       the traced additions are multiplied: the handles are those branches and nothing else.

    Raises:
        InputError: a check fails, so that no faithful rewrite is known.
    """
    groups = find_groups(twin, found, [branch.module for branch in plan.branches] if plan.declared else None)
    expected = {add.site for group in groups for add in group.adds if add.source != "declared"}
    for group in groups:
        set_multiplier(twin, group.handle, 0.0)
    silent = trace(twin, example_inputs, peaks=True)
    _check_silenced(silent, expected)
    uses = found.graph.uses
    escaping = {name: uses[name] for name in sorted(silent.graph.reaching) if uses[name] > 1}
    if all(add.source != "declared" for group in groups for add in group.adds):
        _check_equality(twin, example_inputs, found, groups)
    clear_multipliers(twin)
    return escaping


def _check_silenced(silent: Trace, expected: set[tuple[str, tuple[str, ...]]]) -> None:
    adds = [add for add in silent.adds if add.site in expected and add.kind != "composite"]
    leaking = sorted({add.source for add in adds if not (add.peak == 0 or math.isnan(add.peak))})
    if not leaking and {add.site for add in adds} != expected:
        leaking = ["an addition that is no residual add then"]
    if leaking:
        raise InputError(
            f"with every multiplier at 0 the stream still receives something at: {', '.join(leaking)}. The branch "
            "found is not what is added there, so no faithful rewrite is known. Mark it: "
            f"x + looptransfer.residual(…). {DECLARE}"
        )


def _check_equality(twin: nn.Module, example_inputs: ExampleInputs, found: Trace, groups: list[Group]) -> None:
    scale: dict[Site, tuple[int, float]] = {}
    for number, together in enumerate(_added_together(groups)):
        multiplier = 0.25 + 0.5 * math.modf(0.618 * number)[0]
        for group in together:
            set_multiplier(twin, group.handle, multiplier)
            scale |= {(*add.site, add.occurrence): (add.position, multiplier) for add in group.adds}
    runs = Counter(total.site for total in found.graph.sums)
    for (line, container), times in runs.items():  # other values may loop more often; all runs of a line may be alike
        alike = {scale.get((line, container, occurrence)) for occurrence in range(times)}
        if len(alike) == 1 and (one := alike.pop()):
            scale[line, container, ANY] = one
    rewritten = record(twin, example_inputs).results
    clear_multipliers(twin)
    wanted = record(twin, example_inputs, scale=scale).results
    for ours, theirs in zip(rewritten, wanted, strict=True):
        if not agree(ours, theirs, twin):
            raise InputError(
                f"multiplying what {', '.join(str(g.handle) for g in groups[:4])}… hand over is not the same as "
                "multiplying what is added to the stream, so no faithful rewrite is known. Mark the branches: "
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


def agree(ours: Tensor, theirs: Tensor, model: nn.Module) -> bool:
    """Two results are the same but for rounding: within 1e-4 of their norm in float32, 6 % in bfloat16."""
    if not ours.is_floating_point() or ours.is_meta:
        return True
    dtypes = {ours.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(ours.device.type):
        dtypes.add(torch.get_autocast_dtype(ours.device.type))
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    room = 1e-8 if coarsest < 1e-12 else max(8 * coarsest, 1e-4)
    a, b = ours.detach().double(), theirs.detach().double()
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    return float((a - b)[finite].norm()) <= room * float(b[finite].norm())
