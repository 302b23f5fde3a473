"""One forward under observation: which additions are residual adds, of which branch, and how often each ran.

Every operation is seen below autograd. A *node* is one version of one storage, so views, detach and in-place updates
need no cases of their own, and a node's lineage is a bitmask of the nodes it was computed from.

A residual add is `a + b` where some x reaches a by identity operations only, x is an ancestor of b, the shapes agree
and learned matrices act on the way from x to b: a is the stream, b the branch. Without the matrices an activation that
is written out, a manual norm or RoPE would qualify.
"""

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looptransfer.errors import InputError

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Kind = Literal["leaf", "composite", "inner"]

ADDS = {"add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor"}
IDENTITIES = {"_to_copy.default", "clone.default", "native_dropout.default", "_unsafe_view.default"}
# Made like another tensor, but holding nothing of it. A random mask is one of these, drawn in place.
SHAPED_LIKE = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
SHAPED_LIKE |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
DRAWS = ("bernoulli", "rand", "uniform")
# Frames between an operator and the line that spelled it.
HIDDEN_FRAMES = ("torch/_tensor.py", "torch/_ops.py", "torch/_dynamo/", "torch/_compile.py", "rewrite/trace.py")


@dataclass(frozen=True)
class Returned:
    """A module that handed a tensor back: its name, and where in the output it stood (None: it was the output)."""

    module: str
    index: int | str | None


@dataclass
class ResidualAdd:
    """One execution of one residual add."""

    source: str  # file:line
    kind: Kind
    returned: tuple[Returned, ...]  # who handed out the branch operand, the outermost last
    container: tuple[str, ...]  # the modules running at the add, the outermost first
    parameters: frozenset[str]  # those that act on the way from the stream to the branch operand
    peak: float  # max |branch operand|; NaN where there are no numbers
    used_elsewhere: bool = False  # the operand also feeds something that is not this add


@dataclass
class Trace:
    """What one forward did."""

    adds: list[ResidualAdd]
    calls: Counter[str]  # forward calls per module
    reaching: frozenset[str]  # parameters that the output depends on, other than through a branch multiplied by 0
    uses: Counter[str]  # how often one operator took a parameter up; an embedding tied to a head counts once


@dataclass
class _Node:
    ancestors: int = 0  # bitmask of node numbers
    data: bool = False  # depends on the example inputs
    parameters: frozenset[str] = frozenset()  # learned tensors that enter here
    reaching: int = 0  # bitmask of all parameters it depends on, other than through a product with 0.0
    same_as: int | None = None  # the node this one repeats, by an identity operation
    stream: bool = False  # the sum of a residual add
    noise: bool = False  # random numbers and what is made of them alone: a dropout mask
    returned: list[Returned] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[_Node] = []
        # Storage -> its node, and the storage itself: kept alive so that its key stays its own.
        self.owner: dict[int, tuple[int, Any]] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
        self.running: list[str] = []
        self.calls: Counter[str] = Counter()
        self.uses: Counter[tuple[str, str]] = Counter()
        self.adds: list[ResidualAdd] = []
        self.operands: list[tuple[int, int]] = []  # per add: the branch's node, the sum's node
        self.output = 0  # `reaching` of the model's output
        self.parameters = [name for name, _ in model.named_parameters()]
        for _, tensor in model.named_buffers():
            self._own(tensor, _Node())
        for position, (name, parameter) in enumerate(model.named_parameters()):
            self._own(parameter, _Node(parameters=frozenset([name]), reaching=1 << position))
        for tensor in _tensors(example):
            self._own(tensor, _Node(data=True))

    # -- what ran where

    def enter(self, module: nn.Module, args: Any) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.running.append(name)
            self.calls[name] += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.running.pop()
            for index, tensor in _outputs(output):
                number = self._node_of(tensor)
                if number is not None:
                    self.nodes[number].returned.append(Returned(name, index))
        if name == "":
            for tensor in _tensors(output):
                number = self._node_of(tensor)
                self.output |= 0 if number is None else self.nodes[number].reaching

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        before = [self._node_of(tensor) for tensor in inputs]
        shapes = [tensor.shape for tensor in inputs]
        out = func(*args, **kwargs)
        name = str(func).removeprefix("aten.")
        sources = [] if name.split(".")[0] in SHAPED_LIKE else [number for number in before if number is not None]
        written = {_key(tensor): tensor for tensor in _written(func, args, kwargs)}
        results = written | {_key(tensor): tensor for tensor in _tensors(out)}
        with_zero = any(isinstance(arg, (int, float)) and arg == 0 for arg in args)
        for key, tensor in results.items():  # a view shares its base's key, and so its node
            if key not in self.owner or key in written:
                self._own(tensor, self._derive(name, sources, with_zero))
        if name in ADDS and len(before) == 2 and shapes[0] == shapes[1]:
            sign = -1 if name.startswith("sub") else 1
            self._judge_add(before, inputs, self._node_of(out), sign * kwargs.get("alpha", 1))
        return out

    # -- lineage

    def _node_of(self, tensor: Tensor) -> int | None:
        entry = self.owner.get(_key(tensor))
        return None if entry is None else entry[0]

    def _own(self, tensor: Tensor, node: _Node) -> None:
        self.nodes.append(node)
        self.owner[_key(tensor)] = (len(self.nodes) - 1, tensor.untyped_storage())

    def _derive(self, name: str, sources: list[int], with_zero: bool) -> _Node:
        node = _Node()
        for number in sources:
            source = self.nodes[number]
            source.consumers.append(len(self.nodes))
            node.reaching |= source.reaching
            if source.data:
                node.data = True
                node.ancestors |= source.ancestors | (1 << number)
            else:
                node.parameters |= source.parameters
        if node.data:
            self.uses.update((parameter, name) for parameter in node.parameters)
        if name == "mul.Tensor" and with_zero:
            node.reaching = 0
        drawn = any(word in name for word in DRAWS) or any(self.nodes[number].noise for number in sources)
        node.noise = drawn and not node.data and not node.parameters
        node.same_as = self._repeated(name, sources, with_zero)
        return node

    def _repeated(self, name: str, sources: list[int], with_zero: bool) -> int | None:
        """The source that an identity operation repeats. Python's sum() begins with 0 + x."""
        if name == "copy_.default" and len(sources) == 2:
            return sources[1]
        plus_nothing = name in ADDS and len(sources) == 1 and with_zero
        if sources and (name in IDENTITIES or plus_nothing or self._is_dropout(name, sources)):
            return sources[0]
        return None

    def _is_dropout(self, name: str, sources: list[int]) -> bool:
        """`x * mask` with a random mask: how dropout is spelled on a CPU. A constant factor is no identity."""
        return name == "mul.Tensor" and len(sources) == 2 and self.nodes[sources[1]].noise

    def _same(self, number: int) -> Iterator[int]:
        """A node and those that it repeats, the nearest first."""
        step: int | None = number
        while step is not None:
            yield step
            step = self.nodes[step].same_as

    # -- residual adds

    def _judge_add(self, operands: list[int | None], tensors: list[Tensor], total: int | None, factor: float) -> None:
        left, right = operands
        if left is None or right is None or total is None or not (self.nodes[left].data and self.nodes[right].data):
            return
        for stream, branch, tensor in ((left, right, tensors[1]), (right, left, tensors[0])):
            scaled_skip = branch == left and factor != 1
            root = next((x for x in self._same(stream) if self._is_ancestor(x, branch)), None)
            if root is None or scaled_skip:
                continue
            way = [n for n in range(root + 1, branch + 1) if self._is_ancestor(root, n) and self._leads_to(n, branch)]
            parameters = frozenset[str]().union(*(self.nodes[n].parameters for n in way))
            if parameters & self.matrices:
                inside = any(self.nodes[n].stream for n in self._same(branch))
                self._record(way, branch, tensor, total, parameters, "composite" if inside else "leaf")
                self.nodes[total].same_as = branch if inside else stream
                self.nodes[total].stream = True
                return

    def _record(
        self, way: list[int], branch: int, tensor: Tensor, total: int, parameters: frozenset[str], kind: Kind
    ) -> None:
        returned = [handed for n in reversed(list(self._same(branch))) for handed in self.nodes[n].returned]
        if kind == "leaf":
            within = {self.operands[i][1]: i for i in range(len(self.adds))}
            for n in way:  # an add inside this branch never became the stream
                if n in within:
                    self.adds[within[n]].kind = "inner"
        peak = float("nan") if tensor.is_meta else float(tensor.detach().abs().max())
        self.adds.append(ResidualAdd(_source(), kind, tuple(returned), tuple(self.running), parameters, peak))
        self.operands.append((branch, total))

    def _is_ancestor(self, old: int, new: int) -> bool:
        return bool(self.nodes[new].ancestors >> old & 1)

    def _leads_to(self, number: int, branch: int) -> bool:
        return number == branch or self._is_ancestor(number, branch)

    def finish(self) -> Trace:
        for add, (branch, total) in zip(self.adds, self.operands, strict=True):
            same = list(self._same(branch))
            users = {user for n in same for user in self.nodes[n].consumers} - {total, *same}
            add.used_elsewhere = any(self.nodes[user].data for user in users)
        uses: Counter[str] = Counter()
        for (parameter, _), times in self.uses.items():
            uses[parameter] = max(uses[parameter], times)
        reaching = frozenset(name for place, name in enumerate(self.parameters) if self.output >> place & 1)
        return Trace(self.adds, self.calls, reaching, uses)


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """Run `model` once on `example_inputs` and report its residual adds.

    Random state is given back as it was; the model's own state is the caller's to protect (see `randomised_twin`).

    Raises:
        InputError: the model rejects the example inputs; its own error is shown.
    """
    args, kwargs = call_arguments(example_inputs)
    recorder = _Recorder(model, (args, kwargs))
    torch.clear_autocast_cache()  # casts of an earlier trace would be missing from this one
    with _random_state_kept(model), _module_hooks(recorder.enter, recorder.leave):
        try:
            with recorder:
                model(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"the model rejects the example inputs: {type(error).__name__}: {error}. "
                "Give what its forward takes: a tensor, a tuple of positional arguments or a dict of keyword arguments"
            ) from error
    return recorder.finish()


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call on `example_inputs`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def randomised_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters are all non-zero random numbers, the same ones at every call.

    A zero-initialised branch end would make a test for ε = 0 vacuous, and a copy keeps the buffers, gradients and
    caches of the user's model as they are.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise InputError(f"the model cannot be copied for the trace: {type(error).__name__}: {error}") from error
    for ours, copied in zip(model.parameters(), twin.parameters(), strict=True):
        vars(copied).update(vars(ours))  # mup keeps its width shapes there, and deepcopy drops them
    with torch.no_grad():
        for position, parameter in enumerate(twin.parameters()):
            parameter.grad = None
            if parameter.is_floating_point() and not parameter.is_meta:
                generator = torch.Generator().manual_seed(position)
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = parameter[0].numel() if parameter.ndim >= 2 else 1
                parameter.copy_(noise / fan_in**0.5 if parameter.ndim >= 2 else 1 + 0.1 * noise)
    return twin


@contextmanager
def _module_hooks(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    # Global hooks touch no module, so nothing is left behind on the model.
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _outputs(output: Any) -> list[tuple[int | str | None, Tensor]]:
    if isinstance(output, Tensor):
        return [(None, output)]
    if isinstance(output, Mapping):
        return [(key, value) for key, value in output.items() if isinstance(value, Tensor)]
    if isinstance(output, (tuple, list)):
        return [(index, value) for index, value in enumerate(output) if isinstance(value, Tensor)]
    return []


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to."""
    schema = func._schema.arguments
    given = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    return [t for a, value in given if a.alias_info is not None and a.alias_info.is_write for t in _tensors(value)]


def _source() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in Path(frame.f_code.co_filename).as_posix() for part in HIDDEN_FRAMES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
