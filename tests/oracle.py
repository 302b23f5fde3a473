"""The same forward with ε applied at the additions, above autograd: what a rewritten model is held against.

It shares with the package which additions those are; what they are multiplied by comes from the zoo's entry.
"""

import copy
import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

import looptransfer as lt
from looptransfer.rewrite.analysis import analyse
from looptransfer.rewrite.graph import Site
from looptransfer.rewrite.sites import place_of
from tests.models import noisy
from tests.zoo import Entry

Run = tuple[Site, int]
Results = tuple[list[Tensor], dict[str, Tensor]]  # outputs, and gradients by name
HIDDEN = (__file__, "torch/_tensor.py", "torch/overrides.py", "torch/_ops.py")
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "subtract"}


def both_runs(entry: Entry, rewritten: nn.Module, training: bool) -> tuple[Results, Results]:
    """Outputs and gradients of a rewritten model, and of its plain twin with its additions multiplied."""
    plain, ours = noisy(entry.build(), std=0.1), noisy(copy.deepcopy(rewritten), std=0.1)
    for model in (plain, ours):
        model.train(training)
    for module in plain.modules():  # a recomputed addition would count twice
        if hasattr(module, "checkpointing"):
            module.checkpointing = False
    with torch.set_grad_enabled(entry.gradients):
        factors, marks = factors_of(entry, plain)
    oracle = Multiplied(plain, factors)
    multiplied = lambda branch, name="branch": branch * marks.get(name, 1.0)  # noqa: E731
    with oracle.following(), mock.patch.object(lt, "residual", multiplied):
        wanted = measured(entry, plain)
    assert oracle.met == set(factors)
    return measured(entry, ours), wanted


class Multiplied(TorchFunctionMode):
    """Runs a plain model and multiplies one operand of chosen additions, above autograd."""

    def __init__(self, model: nn.Module, factors: Mapping[Run, tuple[int, float]]) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.factors, self.met = factors, set[Run]()
        self.running: list[str] = []
        self.runs: Counter[Site] = Counter()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Notes which modules run."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running += [self.names[id(module)]] if id(module) in self.names else []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self.names:
                self.running.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") not in SUMS:
            return func(*args, **kwargs)
        operands = [*args, *(kwargs.pop(name) for name in ("input", "other") if name in kwargs)]
        if all(isinstance(one, Tensor) for one in operands) and is_spread(*(one.shape for one in operands[:2])):
            where = Site(*spelled_at(), tuple(self.running))
            run = (where, self.runs[where])
            self.runs[where] += 1
            if run in self.factors:
                self.met.add(run)
                self._multiply(operands, *self.factors[run], in_place=func.__name__.rstrip("_") + "_" == func.__name__)
        return func(*operands, **kwargs)

    @staticmethod
    def _multiply(operands: list[Any], position: int, factor: float, in_place: bool) -> None:
        if position == 0 and in_place:
            operands[0].mul_(factor)
        else:
            operands[position] = operands[position] * factor


def is_spread(first: torch.Size, second: torch.Size) -> bool:
    """One operand is spread over the other, or as large; such sums are counted on their line."""
    return torch.broadcast_shapes(first, second) in {first, second}


def spelled_at() -> tuple[str, int]:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(HIDDEN):
        frame = frame.f_back
    return place_of(frame)


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)


def factors_of(entry: Entry, plain: nn.Module) -> tuple[dict[Run, tuple[int, float]], dict[str, float]]:
    """Which additions of the plain model are multiplied, and by what: sizes from the entry, places from a trace.

    A declared branch that no addition is known for is multiplied by a hook on its module; of marks without one the
    sizes come back too.
    """
    seed()
    analysis = analyse(plain, entry.example(), entry.kwargs.get("branches"))
    sizes = dict(zip([branch for _, branch, _ in entry.rows], entry.multipliers(), strict=True))
    groups = {str(group.handle): group for group in analysis.groups}
    assert groups.keys() == sizes.keys()
    factors: dict[Run, tuple[int, float]] = {}
    marks: dict[str, float] = {}
    for branch, group in groups.items():
        known = [add for add in group.adds if add.site.source != "declared"]
        known = known if len(known) == len(group.adds) else []
        factors |= {(add.site, add.occurrence): (add.position, sizes[branch]) for add in known}
        if not known and ":" in branch:
            marks[branch.split(":")[1]] = sizes[branch]
        elif not known:
            plain.get_submodule(branch).register_forward_hook(lambda _, args, out, size=sizes[branch]: out * size)
    return factors, marks


def results(output: Any) -> list[Tensor]:
    """The tensors of real numbers in an output of any form."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if dataclasses.is_dataclass(output):
        output = vars(output)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in results(part)]


def measured(entry: Entry, model: nn.Module) -> Results:
    """Outputs and gradients of one run."""
    example = entry.example()
    args, kwargs = (
        ((), example) if isinstance(example, dict) else (example if isinstance(example, tuple) else (example,), {})
    )
    seed()
    with torch.set_grad_enabled(entry.gradients):
        found = results(model(*args, **kwargs))
    assert found
    followed = [tensor for tensor in found if tensor.requires_grad]
    if followed:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in followed]
        sum((tensor * weight).sum() for tensor, weight in zip(followed, weights, strict=True)).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
