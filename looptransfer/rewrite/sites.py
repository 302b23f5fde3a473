"""Where a model spells its additions, and what one of their operands is multiplied by.

An addition is known by its line, its column, the modules that run it, and the number of that run. Lines are those of
the user's file: frames of torch and of the observers are skipped.
"""

import functools
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from looptransfer.errors import InputError
from looptransfer.rewrite import forward
from looptransfer.rewrite.forward import (
    ExampleInputs,
    as_seeded,
    as_written,
    copied_arguments,
    seed_all,
    tensors_held,
)
from looptransfer.rewrite.graph import ANY, Site, tensors_in
from looptransfer.rewrite.names import plain_names
from looptransfer.rewrite.ops import Operator, operator
from looptransfer.rewrite.twin import random_state_kept

# The operations of a forward that is made to prove something: so many times those of the model as it stands, or so many
# in any case. A loop that a cap ends may use it up where other weights or ε = 0 let it, and is to get there.
TIMES, ANYWAY = 100, 20_000

Scale = Mapping[tuple[Site, int], tuple[int, float]]  # additions -> which operand is multiplied, by what

# Frames between an operator and the line that spelled it.
HIDDEN_FRAMES = (
    "torch/_tensor.py",
    "torch/_ops.py",
    "torch/_dynamo/",
    "torch/_compile.py",
    "torch/functional.py",
    "torch/utils/_contextlib.py",
    "torch/_library/",
    "torch/autograd/function.py",
    "torch/_higher_order_ops/",
    "torch/utils/_python_dispatch.py",
)


_most: ContextVar[int | None] = ContextVar("operations of a forward at most", default=None)


@contextmanager
def ending(plain: int | None) -> Iterator[None]:
    """Refuse forwards that do not come to their end; `plain` is the number of operations of the model as it stands."""
    token = _most.set(None if plain is None else max(TIMES * plain, ANYWAY))
    try:
        yield
    finally:
        _most.reset(token)


class OperationCounter(TorchDispatchMode):
    """Counts the operations of a forward, and the additions among them."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under `as_written`; the skip alone would import TorchDynamo, 1.5 s

    def __init__(self, hidden: str = __file__) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.additions, self.most, self.read = 0, 0, _most.get(), ""
        self.hidden = {__file__, forward.__file__, hidden}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            return self.inside(func, args, kwargs or {})
        self.count(operator(func))
        return func(*args, **(kwargs or {}))

    def count(self, op: Operator) -> None:
        """Before an operation.

        Raises:
            InputError: there are too many; names the line that last handed values to Python, which may loop by them.
        """
        self.operations += 1
        self.additions += op.relation == "sum"
        if op.tells:
            self.read = self.line(outside="torch")
        if self.most is not None and self.operations > self.most:
            raise InputError(
                "with other weights, or with its branches multiplied, the model does not come to its end: it still "
                f"runs after {self.most:,} operations. The loop at {self.read or self.line(outside='torch')} goes on "
                "by values; let a number of loops end it too, for the trace"
            )

    def inside(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """cond, scan or flex_attention is written in operations that can be seen."""
        dense = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if dense is None:
            raise InputError(f"the trace cannot look into {func} at {self.line()}; replace it for the trace")
        names, check = dense.__globals__, "_get_current_dispatch_mode"
        kept = names.get(check)
        names.update({check: lambda: None} if kept else {})  # cond and scan refuse to run where somebody watches
        try:
            with self:
                return dense(*args, **kwargs)
        finally:
            names.update({check: kept} if kept else {})

    def caller(self) -> types.FrameType:
        """The frame that spelled the operation that runs now."""
        frame = sys._getframe(1)
        while frame.f_back is not None and (frame.f_code.co_filename in self.hidden or _is_hidden(frame)):
            frame = frame.f_back
        return frame

    def line(self, outside: str | None = None) -> str:
        """The line that runs now, as file:line; `outside` of a package, the line that called into it."""
        frame = self.caller()
        while frame.f_back is not None and (
            frame.f_code.co_filename in self.hidden or str(frame.f_globals.get("__name__")).split(".")[0] == outside
        ):
            frame = frame.f_back
        return place_of(frame)[0]


class SiteCounter(OperationCounter):
    """Knows which modules run, and which run of which line an addition is."""

    def __init__(self, model: nn.Module, hidden: str = __file__) -> None:
        super().__init__(hidden)
        self.names = {id(module): name for name, module in plain_names(model).items()}
        self.running: list[str] = []
        self.runs: Counter[Site] = Counter()

    def enter(self, module: nn.Module) -> None:
        """Before a module's call."""
        name = self.names.get(id(module))
        if name is not None:
            self.running.append(name)

    def leave(self, module: nn.Module, output: Any) -> None:
        """After a module's call."""
        if id(module) in self.names:
            self.running.pop()

    def site(self, op: Operator, shapes: list[torch.Size]) -> tuple[Site, int] | None:
        """The place where a plain sum of two tensors is spelled, and the number of this run; None for anything else."""
        if op.relation != "sum" or len(shapes) != 2 or not _broadcasts(shapes):
            return None
        line, column = place_of(self.caller())
        site = Site(line, column, tuple(self.running))
        self.runs[site] += 1
        return site, self.runs[site] - 1


class Scaler(SiteCounter):
    """Multiplies one operand of some additions before it is added."""

    def __init__(self, model: nn.Module, scale: Scale) -> None:
        super().__init__(model)
        self.scale = scale

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.inside(func, args, kwargs)
        op = operator(func)
        self.count(op)
        site = self.site(op, [tensor.shape for tensor in tensors_in(args)]) if op.relation == "sum" else None
        if site is not None:
            position, multiplier = self.scale.get(site, self.scale.get((site[0], ANY), (0, 1.0)))
            args = _with_multiplier(args, position, multiplier, in_place=bool(op.writes)) if multiplier != 1 else args
        return func(*args, **kwargs)


def run_scaled(model: nn.Module, example_inputs: ExampleInputs, scale: Scale, seed: int) -> list[Tensor]:
    """The tensors that a forward, run as `record` does, hands back where operands of some additions are multiplied."""
    args, kwargs = copied_arguments(example_inputs)
    scaler = Scaler(model, scale)
    with as_seeded(model, seed, scaler.enter, scaler.leave), scaler:
        return tensors_held(model(*args, **kwargs))


def run_counted(model: nn.Module, example_inputs: ExampleInputs, seed: int) -> OperationCounter | None:
    """Run a forward that leaves in the model what it leaves there, and count; None where it fails."""
    args, kwargs = copied_arguments(example_inputs)
    counter = OperationCounter()
    try:
        with as_written(), random_state_kept(model), counter:
            seed_all(seed)
            model(*args, **kwargs)
    except Exception:
        return None
    return counter


def _with_multiplier(args: Any, position: int, multiplier: float, in_place: bool) -> Any:
    scaled = args[position] * multiplier
    if position == 0 and in_place:
        args[0].copy_(scaled)
        return args
    return tuple(scaled if place == position else arg for place, arg in enumerate(args))


def _broadcasts(shapes: list[torch.Size]) -> bool:
    """One of two shapes is that of their sum."""
    if shapes[0] == shapes[1]:
        return True
    try:
        return torch.broadcast_shapes(*shapes) in shapes
    except RuntimeError:
        return False


# -- frames


def _is_hidden(frame: types.FrameType) -> bool:
    return _is_hidden_file(frame.f_code.co_filename)


@functools.cache
def _is_hidden_file(filename: str) -> bool:
    return any(part in Path(filename).as_posix() for part in HIDDEN_FRAMES)


def place_of(frame: types.FrameType) -> tuple[str, int]:
    """The line that a frame is at, as file:line, and the column of the expression."""
    columns = _columns(frame.f_code)
    file = re.sub(r"^(<.*>)\.\d+$", r"\1", frame.f_code.co_filename)  # code that torch.fx makes anew for every copy
    return f"{file}:{frame.f_lineno}", columns[frame.f_lasti // 2]


@functools.cache
def _columns(code: types.CodeType) -> tuple[int, ...]:
    """The column at which every instruction's expression ends on its line."""
    return tuple(10_000 * (end or 0) + (start or 0) for _, _, start, end in code.co_positions())
