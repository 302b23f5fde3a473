"""A plan is accepted only when a randomised copy of the model behaves as the plan says."""

import math
from collections import Counter

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError
from looptransfer.rewrite.analysis import Analysis
from looptransfer.rewrite.branches import DECLARE, DECLARED, Group
from looptransfer.rewrite.forward import ExampleInputs, as_written, run
from looptransfer.rewrite.graph import ANY, Handle, Site
from looptransfer.rewrite.insert import set_multiplier
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.sites import OperationCounter, run_scaled
from looptransfer.rewrite.twin import twin_of
from looptransfer.text import few
from looptransfer.user_code import described, line_of

SEED = 1  # of what a model draws while it is put to the proof


def prove(twin: nn.Module, example_inputs: ExampleInputs, analysis: Analysis) -> frozenset[str]:
    """Run the proof on copies of `twin`, a randomised copy of a model without multipliers that was analysed so.

    With a different ε on every branch, the rewritten copy must compute what the plain one computes when the operands of
    the traced additions are multiplied: the handles are those branches and nothing else. The weights are random, since
    a zero-initialised branch end would make this vacuous.

    Returns:
        The parameters that have no effect where every ε is 0, though data of theirs comes along on the stream.

    Raises:
        InputError: the two differ, so that no faithful rewrite is known.
    """
    groups = analysis.groups
    if all(add.site.source != DECLARED for group in groups for add in group.adds):
        _check_equality(twin, example_inputs, analysis)
    inside = frozenset[str]().union(*(group.parameters for group in groups))
    silent = _effective(_with(twin, {group.handle: 0.0 for group in groups}), example_inputs)
    suspects = analysis.trace.graph.touched - inside - silent if silent is not None else frozenset[str]()
    return suspects & (_effective(twin_of(twin), example_inputs) or frozenset()) if suspects else suspects


def _effective(model: nn.Module, example_inputs: ExampleInputs) -> frozenset[str] | None:
    """The parameters that a gradient of the outputs reaches; losses are left out where there are others.

    None where the model has no backward here, as under inference mode.
    """
    parameters = {name: p for name, p in named_parameters(model).items() if p.is_floating_point()}
    try:
        with torch.enable_grad(), as_written(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            for parameter in parameters.values():
                parameter.requires_grad_()
            with OperationCounter():
                outputs = run(model, example_inputs)
            results = [t for t in outputs if t.requires_grad and not t.is_complex()]
            results = [t for t in results if t.ndim] or results
            weighted = sum((tensor * torch.randn_like(tensor)).sum() for tensor in results)
            gradients = torch.autograd.grad(weighted, list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception:
        return None
    pairs = zip(parameters, gradients, strict=True)
    return frozenset(name for name, gradient in pairs if gradient is not None and bool((gradient != 0).any()))


def _with(twin: nn.Module, multipliers: dict[Handle, float]) -> nn.Module:
    """A fresh copy with multipliers: what a forward leaves in a module does not reach the next one."""
    scaled = twin_of(twin)
    for handle, multiplier in multipliers.items():
        set_multiplier(scaled, handle, multiplier)
    return scaled


def _check_equality(twin: nn.Module, example_inputs: ExampleInputs, analysis: Analysis) -> None:
    groups, graph = analysis.groups, analysis.trace.graph
    scale: dict[tuple[Site, int], tuple[int, float]] = {}
    multipliers: dict[Handle, float] = {}
    for number, together in enumerate(_added_together(groups)):
        multiplier = 0.25 + 0.5 * math.modf(0.618 * number)[0]
        for group in together:
            multipliers[group.handle] = multiplier
            scale |= {(add.site, add.occurrence): (add.position, multiplier) for add in group.adds}
    for site, times in Counter(total.site for total in graph.sums).items():
        # other values may loop more often, and all runs of a site may be alike
        factors = {scale.get((site, occurrence)) for occurrence in range(times)}
        if len(factors) == 1 and (factor := factors.pop()):
            scale[site, ANY] = factor
    try:
        rewritten = dict(enumerate(run_scaled(_with(twin, multipliers), example_inputs, {}, SEED)))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the model fails where its branches are multiplied ({described(error)}{line_of(error)}), perhaps asking "
            "for a module's exact class, and a multiplied module is of a subclass; ask by isinstance"
        ) from error
    expected = dict(enumerate(run_scaled(twin_of(twin), example_inputs, scale, SEED)))
    if len(rewritten) != len(expected) or not all_agree(
        [rewritten[n] for n in graph.results if n in rewritten],
        [expected[n] for n in graph.results if n in expected],
        twin,
    ):
        names = few(group.handle for group in groups)
        lines = few(dict.fromkeys(add.site.source for group in groups for add in group.adds))
        raise InputError(
            f"multiplying what {names} hand over is not the same as multiplying what is "
            f"added to the stream at {lines}, so no faithful rewrite is known. Mark the branches: "
            f"x + looptransfer.residual(…, 'name'). {DECLARE}"
        )


def _added_together(groups: list[Group]) -> list[list[Group]]:
    """Groups that meet in one addition, as in x + (a(x) + b(x)), can only be told apart together."""
    parts: list[list[Group]] = []
    for group in groups:
        adds = {id(add) for add in group.adds}
        meeting = [part for part in parts if any(id(add) in adds for other in part for add in other.adds)]
        parts = [part for part in parts if part not in meeting] + [[*(g for part in meeting for g in part), group]]
    return parts


def all_agree(rewritten: list[Tensor], expected: list[Tensor], model: nn.Module, double: float = 1e-8) -> bool:
    """Two runs gave the same but for rounding: within 1e-4 of the norm in float32, 6 % in bfloat16, else `double`."""
    if len(rewritten) != len(expected):
        return False
    dtypes = {tensor.dtype for tensor in [*rewritten, *model.parameters()] if tensor.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    room = double if coarsest < 1e-12 else max(8 * coarsest, 1e-4)
    return all(_agree(a, b, room) for a, b in zip(rewritten, expected, strict=True))


def _agree(rewritten: Tensor, expected: Tensor, room: float) -> bool:
    if not rewritten.is_floating_point() or rewritten.is_meta:
        return True
    a, b = (tensor.detach().to_dense().double() for tensor in (rewritten, expected))
    finite = a.isfinite() & b.isfinite()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    return float((a - b)[finite].norm()) <= room * float(b[finite].norm())
