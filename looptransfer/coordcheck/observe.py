"""One forward of a live model under observation: what reaches the stream at every visit of every branch.

A trace finds the residual adds once; from then on every forward is watched by a light dispatch mode that knows only
those adds. What is measured is the operand of the addition itself, so that a multiplier which was lost on the way
shows, whatever the plan says. Nothing but numbers is kept, apart from one running sum and one last state per branch
and a few positions of the stream per loop: memory grows with branches, not with their visits.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from looptransfer.coordcheck.result import OUTPUT, WatchedBranch
from looptransfer.coordcheck.statistics import (
    VISIT_STATISTICS,
    Visit,
    attention_logit_rms,
    cosines,
    rms,
    written_out_logit_rms,
)
from looptransfer.errors import InputError
from looptransfer.rewrite.analysis import analyse
from looptransfer.rewrite.branches import DECLARED, added_together
from looptransfer.rewrite.ends import factors
from looptransfer.rewrite.forward import (
    ExampleInputs,
    as_seeded,
    call_arguments,
    tensors_held,
)
from looptransfer.rewrite.graph import Site, tensors_in
from looptransfer.rewrite.ops import operator
from looptransfer.rewrite.plan import ScalingPlan
from looptransfer.rewrite.sites import SiteCounter
from looptransfer.user_code import user_code

POSITIONS = 32  # of the stream, evenly spread, on which the cosines of increments are taken
PROBE_SEED = 0  # dropout draws the same masks in every probe

Key = tuple[Site, int]


@dataclass(frozen=True)
class TracedBranch(WatchedBranch):
    """A residual branch with the additions that take it to the stream."""

    adds: tuple[tuple[Key, int], ...]  # which addition, and which of its operands is the branch
    parameters: tuple[str, ...]
    multiplier: float  # the constant factor between the branch's last learned map and the stream, as traced


@dataclass
class Observation:
    """Values and states that one forward showed."""

    values: list[tuple[str, int, str, float]] = field(default_factory=list)  # module, visit, statistic, value
    states: dict[str, Tensor] = field(default_factory=dict)  # stream after the last visit of each branch, and output
    cosines: Tensor | None = None  # between the increments of the loops; None where there is only one


def find_branches(
    model: nn.Module, example_inputs: ExampleInputs, plan: ScalingPlan | None = None
) -> list[TracedBranch]:
    """The residual branches of a live model, rewritten or not, by one traced forward. Nothing stays on the model.

    Branches that are added in one sum are watched as one, by the name of the principal one.

    Raises:
        InputError: as `parametrize`; or no branch is added by a plain addition.
    """
    analysis = analyse(model, example_inputs, plan.declared_modules if plan else None)
    branches = []
    for group, block in zip(analysis.groups, analysis.blocks, strict=True):
        plain = [add for add in group.adds if add.site.source != DECLARED]
        together = added_together(group, analysis.groups)
        if plain and group is together[0]:
            adds = tuple(((add.site, add.occurrence), add.position) for add in plain)
            constants = factors(analysis.trace, group) or (1.0,)
            parameters = tuple(sorted(frozenset[str]().union(*(part.parameters for part in together))))
            branches.append(TracedBranch(str(group.handle), block, len(adds), adds, parameters, constants[0]))
    if not branches:
        raise InputError(
            "no residual branch of the model is added by a plain addition, so there is nothing to observe; check that "
            "the inputs reach the looped layers, or write x + f(x)"
        )
    return branches


def observe(
    model: nn.Module,
    inputs: ExampleInputs,
    branches: list[TracedBranch],
    statistics: Mapping[str, Callable[[Visit], Any]] = VISIT_STATISTICS,
    loss: Callable[[Any], Tensor] | None = None,
) -> Observation:
    """Run one forward and measure; with a loss also a backward, which leaves the gradients of parameters alone.

    The model is run in the mode it is in, with a fixed random seed; random state and buffers are given back. Cosines
    are those of the increments δ_n = h_n − h_(n−1) of the stream over loops, or over layers where nothing is looped, at
    32 positions (arXiv 2606.18524, its cosine figures). "gradient_rms" is that of the loss with respect to the stream
    after the addition, which is that with respect to what was added as well.

    Args:
        loss: model output -> loss.

    Raises:
        InputError: the forward no longer runs the additions that were traced, or the loss has no gradient.
    """
    observer = _Observer(model, branches, statistics)
    streams = _Streams(observer)
    args, kwargs = call_arguments(inputs)
    with torch.set_grad_enabled(loss is not None), as_seeded(model, PROBE_SEED, observer.enter, observer.leave):
        with observer, streams if loss else nullcontext():
            output = model(*args, **kwargs)
        if loss:
            streams.backward(loss, output)
    for branch in branches:
        visits = observer.visits[branch.module]
        if visits == branch.visits:
            continue
        raise InputError(
            f"{branch.module} was added {visits} times and traced {branch.visits} times; a coordinate "
            "check needs a forward that does the same every time (no random loop count or halting)"
        )
    return observer.finish(output)


class _Streams(TorchFunctionMode):
    """Where the streams that an observer sees stand in the graph of autograd, which the observer is below."""

    def __init__(self, observer: "_Observer") -> None:
        super().__init__()
        self.observer = observer
        self.edges: dict[tuple[str, int], GradientEdge] = {}  # branch and visit -> the stream after the addition

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.observer.latest = None
        out = func(*args, **(kwargs or {}))
        if self.observer.latest and isinstance(out, Tensor) and out.requires_grad:
            self.edges[self.observer.latest] = get_gradient_edge(out)  # the tensor itself may be added to in place
        return out

    def backward(self, loss: Callable[[Any], Tensor], output: Any) -> None:
        """Note the gradient of the loss at every visit that has one."""
        if not self.edges:
            raise InputError(
                "no branch has a gradient: none is trained, or all are added in torch.cond; leave out loss="
            )
        with user_code("the gradient of loss(output) cannot be measured", loss):
            gradients = torch.autograd.grad(loss(output), list(self.edges.values()), allow_unused=True)
        for (module, visit), gradient in zip(self.edges, gradients, strict=True):
            if gradient is not None:
                self.observer.note(module, visit, "gradient_rms", rms(gradient))


class _Observer(SiteCounter):
    def __init__(
        self, model: nn.Module, branches: list[TracedBranch], statistics: Mapping[str, Callable[[Visit], Any]]
    ) -> None:
        super().__init__(model, hidden=__file__)
        self.statistics = statistics
        self.by_key = {key: (branch, position) for branch in branches for key, position in branch.adds}
        self.boundaries, self.last = _boundaries(branches)
        self.visits: Counter[str] = Counter()
        self.latest: tuple[str, int] | None = None  # branch and visit that were seen last
        self.attention: Counter[str] = Counter()
        self.added: dict[str, Tensor] = {}
        self.points: list[Tensor] = []  # the stream at the boundaries of loops, at a few positions
        self.labels: list[tuple[str, int, str]] = []
        self.numbers: list[Tensor] = []
        self.states: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.inside(func, args, kwargs)
        op = operator(func)
        name, key = op.name, None
        if op.relation == "sum":
            key = self.site(op, [tensor.shape for tensor in tensors_in(args)])
        elif "attention" in name or name in {"_softmax", "_safe_softmax"}:
            self._see_attention(name, args, kwargs)
        if key not in self.by_key:
            return func(*args, **kwargs)
        branch, position = self.by_key[key]
        if (branch.module, self.visits[branch.module]) in self.boundaries:
            self.points.append(_few(args[1 - position]))
        operand = args[position]
        factor = kwargs.get("alpha", 1) * (-1 if name == "sub" else 1) if position == 1 else 1
        operand = operand * factor if factor != 1 else operand
        out = func(*args, **kwargs)
        self._see(branch, operand, out)
        return out

    def _see(self, branch: TracedBranch, operand: Tensor, stream: Tensor) -> None:
        module = branch.module
        self.visits[module] += 1
        number = self.visits[module]
        self.latest = (module, number)
        added = self.added.get(module)
        self.added[module] = operand.detach().clone() if added is None else added.add_(operand)
        visit = Visit(module, number, operand.detach(), self.added[module], stream.detach())
        for name, function in self.statistics.items():
            self.note(module, number, name, function(visit))
        if number == branch.visits:
            self.states[module] = stream.detach().clone()
            if module == self.last:
                self.points.append(_few(stream))

    def _see_attention(self, name: str, args: Any, kwargs: Any) -> None:
        if name.startswith("_scaled_dot_product"):
            value = attention_logit_rms(args[0], args[1], kwargs.get("scale"))
        elif args[0].ndim >= 3 and args[1] in {-1, args[0].ndim - 1}:
            if args[0].ndim == 3 and args[0].shape[-1] != args[0].shape[-2]:
                return  # a router, not attention
            value = written_out_logit_rms(args[0])
        else:
            return
        module = self.running[-1] if self.running else ""
        self.attention[module] += 1
        self.note(module, self.attention[module], "attention_logit_rms", value)

    def note(self, module: str, number: int, statistic: str, value: Any) -> None:
        """Keep a value, on its device until the end."""
        self.labels.append((module, number, statistic))
        self.numbers.append(torch.as_tensor(value).detach().double())

    def finish(self, output: Any) -> Observation:
        logits = next((tensor for tensor in tensors_held(output) if tensor.is_floating_point()), None)
        if logits is not None:
            self.states[OUTPUT] = logits.detach().clone()
            self.note(OUTPUT, 0, "output_rms", VISIT_STATISTICS["stream_rms"](Visit(OUTPUT, 0, logits, logits, logits)))
        increments = torch.stack(self.points).diff(dim=0) if len(self.points) > 1 else None
        matrix = cosines(increments) if increments is not None and len(increments) > 1 else None
        if matrix is not None:
            count = len(matrix)
            self.note("increments", 0, "alignment", (matrix.sum() - matrix.trace()) / (count * (count - 1)))
        numbers = torch.stack([number.cpu() for number in self.numbers]).tolist() if self.numbers else []
        values = [(*label, value) for label, value in zip(self.labels, numbers, strict=True)]
        return Observation(values, self.states, matrix)


def _boundaries(branches: list[TracedBranch]) -> tuple[set[tuple[str, int]], str]:
    """Before which adds (branch, earlier visits) a loop begins, and after whose last visit the last loop ends."""
    most = max(branch.visits for branch in branches)
    if most == 1:
        first_of_layer = {branch.layer: branch.module for branch in reversed(branches)}
        return {(module, 0) for module in first_of_layer.values()}, branches[-1].module
    looped = [branch for branch in branches if branch.visits == most]
    return {(looped[0].module, n) for n in range(most)}, looped[-1].module


def _few(stream: Tensor) -> Tensor:
    """The stream at a few positions, (positions, width)."""
    flat = stream.detach().flatten(0, -2) if stream.ndim > 1 else stream.detach()[None]
    chosen = torch.linspace(0, len(flat) - 1, min(POSITIONS, len(flat)), device=flat.device).long()
    kept = flat[chosen]
    return kept if kept.dtype == torch.float64 else kept.float()
