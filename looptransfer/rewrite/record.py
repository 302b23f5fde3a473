"""One forward under observation: every operation is seen below autograd and becomes a node of the graph.

- Below autograd there are a few hundred operators of torch's, and no spelling of the user's is lost.
- A tensor is known by its memory, so that a view is what it views. Who wrote an element last is kept per memory, and
  per element where only a part of it was written.
- Nothing is copied and nothing stays on the model; memory is kept alive until the graph is dropped.
- An operator's row in `ops` says what it does to its arguments; where there is none, the operation is run again on
  changed arguments when somebody asks (`Graph.scales_with`), which costs nothing where nobody does.
- Lines are those of the user's file: frames of torch and of this module are skipped.
"""

import copy
import functools
import hashlib
import random
import re
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looptransfer.errors import InputError
from looptransfer.rewrite import marker
from looptransfer.rewrite.graph import ANY, Call, Graph, Handle, Node, Part, Site, Sum, tensors_in, versions
from looptransfer.rewrite.names import homes, named_parameters, plain_names
from looptransfer.rewrite.ops import GATHERED, GIVEN, Operator, operator
from looptransfer.rewrite.twin import state_kept
from looptransfer.user_code import described, line_of

Scale = Mapping[tuple[Site, int], tuple[int, float]]  # additions -> which operand is multiplied, by what
ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class RejectedInputsError(InputError):
    """The model itself does not take the example inputs."""


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


@dataclass
class _Memory:
    """A memory, and the node that wrote it last."""

    storage: Any  # kept alive, so that its key stays its own
    node: int
    parts: Any = None  # the node per element, where a part was written after the whole; numpy, which is not observed
    pieces: dict[Part, tuple[int, Part | None]] = field(default_factory=dict)  # of cat and stack: what each repeats


class SiteCounter(TorchDispatchMode):
    """Knows which modules run, and which run of which line an addition is."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under `as_written`; the skip alone would import TorchDynamo, 1.5 s

    def __init__(self, model: nn.Module, hidden: str = __file__) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(module): name for name, module in plain_names(model).items()}
        self.running: list[str] = []
        self.runs: Counter[Site] = Counter()
        self.hidden = {__file__, hidden}

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

    def inside(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """cond, scan or flex_attention is written in operations that can be seen."""
        dense = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if dense is None:
            raise InputError(
                f"the trace cannot look into {func} at {place_of(self.caller())[0]}; replace it for the trace"
            )
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


class Recorder(SiteCounter):
    """Builds the graph of one forward."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        strangers: frozenset[int],
        watch: frozenset[int],
        change: Mapping[int, Callable[[Tensor], None]],
    ) -> None:
        super().__init__(model)
        self.nodes: list[Node] = []
        self.owner: dict[int, _Memory] = {}
        self.gathered: dict[tuple[int, ...], int] = {}
        self.homes, self.strangers, self.watch, self.change = homes(model), strangers, watch, change
        self.calls: Counter[Handle] = Counter()
        self.sums: list[Sum] = []
        self.outputs: list[int | None] = []
        self.watched: dict[int, Tensor] = {}
        self.fused_kernels: list[str] = []
        self.chance_steers = self.weights_steer = False
        self.learned = named_parameters(model)
        for _, tensor in model.named_buffers():
            self._own(tensor, Node())
        for name, parameter in self.learned.items():
            self._own(parameter, self._parameter(name))
        self.registered = len(self.nodes)
        for tensor in held(example):
            self._see(tensor, self._own(tensor, Node(data=True, choice=_chooses(tensor), shape=tuple(tensor.shape))))

    # -- what ran where

    def enter(self, module: nn.Module) -> None:
        super().enter(module)
        name = self.names.get(id(module))
        if name is not None:
            self.calls[Handle(name)] += 1
            for attribute, parameter in module._parameters.items():
                if isinstance(parameter, nn.Parameter) and (id(module), attribute) in self.homes:
                    self._learn(parameter, self.homes[id(module), attribute])
        elif id(module) in self.strangers:
            raise InputError(
                f"a copy of the model runs a {type(module).__name__} of the original: some function or closure kept on "
                "the model holds it, so that deepcopy (and a trace on a copy) misses it. Make it a method"
            )

    def _learn(self, parameter: Tensor, name: str) -> None:
        """FSDP gathers a parameter into another one for the forward; `functional_call` puts another's in its place."""
        memory = self.owner.get(_key(parameter))
        if memory is None or (memory.node >= self.registered and self.nodes[memory.node].parameters != {name}):
            self._own(parameter, self._parameter(name))

    def _parameter(self, name: str) -> Node:
        wide = frozenset([name]) if self.learned[name].ndim >= 2 else frozenset[str]()
        shape = tuple(self.learned[name].shape)
        return Node(parameters=frozenset([name]), weights_of=wide, learned=True, shape=shape)

    def leave(self, module: nn.Module, output: Any) -> None:
        super().leave(module, output)
        name = self.names.get(id(module))
        if name is not None:
            for index, tensor in parts_of(output):
                self._handed_over(tensor, Handle(name, index))
        if name == "":
            self.outputs = [self._node_of(tensor) for tensor in held(output)]

    def mark(self, tensor: Tensor, name: str) -> None:
        """Hook of `residual`."""
        handle = Handle(self.running[-1] if self.running else "", mark=name)
        self.calls[handle] += 1
        self._handed_over(tensor, handle)

    def tell(self, *tensors: Tensor) -> None:
        """Values of these go to Python."""
        seen = [self.nodes[n] for tensor in tensors if (n := self._node_of(tensor)) is not None]
        self.chance_steers |= any(node.random for node in seen)
        self.weights_steer |= any(node.learned for node in seen)

    def _handed_over(self, tensor: Tensor, handle: Handle) -> None:
        number = self._node_of(tensor)
        if number is not None:
            self.nodes[number].handles.append(handle)
            self.nodes[number].handed_over[handle] = len(self.nodes)

    # -- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.inside(func, args, kwargs)
        op = operator(func)
        if op.accumulates is not None and _argument(op.accumulates, args, kwargs):
            op = replace(op, relation="onto")
        inputs = tensors_in(args) + tensors_in(kwargs)
        before = [self._node_of(tensor) for tensor in inputs]
        for number, tensor in zip(before, inputs, strict=True):
            if number is None and tensor.grad_fn is not None:
                raise InputError(
                    f"at {place_of(self.caller())[0]} the model uses a tensor that the trace did not see being made, "
                    "such as one of another thread; compute it in the thread that calls the model, for the trace"
                )
        for number, tensor in zip(before, inputs, strict=True):
            if number is not None and tensor.requires_grad:
                self.nodes[number].followed = True
        if op.view:
            return func(*args, **kwargs)
        if op.tells and (op.name != "index" or any(tensor.dtype == torch.bool for tensor in inputs)):
            self.tell(*inputs)
        call = Call(op, func, args, kwargs, inputs, before, versions(inputs))
        site = self.site(op, [tensor.shape for tensor in inputs])
        written = [tensor for position in op.writes for tensor in tensors_in(_argument(position, args, kwargs))]
        node = self._derive(call, {id(tensor) for tensor in written} if op.overwrites else set())
        if op.foreign:
            self._look_into_kernel(call)
        out = func(*args, **kwargs)
        self._note_results(node, written, tensors_in(out))
        if op.name in {"cat", "stack"} and not written:
            self._note_pieces(call, out)
        if site is not None and isinstance(out, Tensor) and not node.backward:
            self._note_sum(call, out, site)
        return out

    def _derive(self, call: Call, overwritten: set[int]) -> Node:
        op, nodes = call.op, self.nodes
        blank = op.relation == "blank"
        reads = [(n, t) for n, t in zip(call.before, call.inputs, strict=True) if n is not None]
        reads = [] if blank else [(n, tensor) for n, tensor in reads if id(tensor) not in overwritten]
        frame = self.caller()
        node = Node(op, tuple(n for n, _ in reads), place=(frame.f_code.co_filename, frame.f_lineno))
        node.backward = frame.f_code.co_filename == torch.autograd.graph.__file__
        node.slices = frozenset((n, part) for n, t in reads if (part := self._part_read(t)) is not None)
        node.gradients_to = frozenset(n for n, t in reads if t.requires_grad or not torch.is_grad_enabled())
        node.data = any(nodes[n].data for n in node.sources)
        node.random = op.draws or any(nodes[n].random for n in node.sources)
        node.learned = any(nodes[n].learned for n in node.sources)
        for number in node.sources:
            source = nodes[number]
            node.ancestors |= 0 if source.choice else source.ancestors | 1 << number
            if not source.data:
                node.parameters |= source.parameters
        noise = op.draws or any(nodes[n].noise for n in node.sources)
        node.noise = noise and not node.data and not node.parameters
        if op.relation in {"moved", "same"} and reads:
            first = nodes[reads[0][0]]
            picked = any(nodes[n].picked for n in node.sources)
            node.selected = first.selected if first.data else first.weights_of if picked else frozenset()
        if node.data and not op.passive:
            node.matrices = frozenset[str]().union(*(self._acting(n, tensor) for n, tensor in reads))
        elif node.data and op.name == "mul":
            node.matrices = self._spread(reads)
        elif not node.data and node.parameters:
            contracts = (op.relation == "product" and not op.pointwise) or op.relation == "onto"
            factors = reads[-1:] if contracts else reads  # of W @ table it is W
            node.weights_of = frozenset[str]().union(*(self._selected(call, n, tensor) for n, tensor in factors))
        if op.relation in {"product", "onto"} and not op.pointwise and sum(nodes[n].data for n, _ in reads) > 1:
            node.contracted = _contracted(call)
        self._note_proportion(node, call)
        amounts = sum(nodes[n].data and not nodes[n].choice for n in set(node.sources))
        node.call = call if amounts > 1 or (amounts and not node.proportional_to) else None
        return node

    def _note_results(self, node: Node, written: list[Tensor], results: list[Tensor]) -> None:
        keys = {_key(tensor) for tensor in written}
        fresh = {_key(tensor): (slot, tensor) for slot, tensor in enumerate(results) if _key(tensor) not in self.owner}
        places = [*enumerate(written), *((slot, t) for key, (slot, t) in fresh.items() if key not in keys)]
        sources = [self.nodes[n] for n in node.sources]
        ancestors, picked = node.ancestors, any(s.picked or (s.data and not s.choice) for s in sources)
        for count, (slot, tensor) in enumerate(places):
            part = node if count == 0 else replace(node, handles=[], handed_over={}, consumers=[])
            part.slot, part.shape, part.choice = slot, tuple(tensor.shape), _chooses(tensor)
            part.ancestors = 0 if part.choice else ancestors
            part.picked = part.choice and picked
            number = self._own(tensor, part)
            for source in node.sources:
                self.nodes[source].consumers.append(number)
            self._see(tensor, number)

    def _note_pieces(self, call: Call, out: Tensor) -> None:
        """Data that is put side by side and taken apart again is what it was."""
        pieces, start, dim = self.owner[_key(out)].pieces, 0, int(_argument(1, call.args, call.kwargs) or 0)
        for number, tensor in zip(call.before, call.inputs, strict=True):
            if tensor.ndim < out.ndim and call.op.name == "cat":  # an empty list to begin with
                continue
            size = tensor.shape[dim] if call.op.name == "cat" else 1
            piece = out.narrow(dim, start, size) if call.op.name == "cat" else out.select(dim, start)
            if number is not None and self.nodes[number].data:
                pieces[_part_of(piece)] = number, self._part_read(tensor)
            start += size

    def _see(self, tensor: Tensor, number: int) -> None:
        if number in self.change and not tensor.is_meta:
            with torch.no_grad():
                self.change[number](tensor)
        if number in self.watch:
            self.watched[number] = tensor.detach().double().nan_to_num().sum()

    # -- whose memory it is

    def _node_of(self, tensor: Tensor) -> int | None:
        memory = self.owner.get(_key(tensor))
        if memory is None or memory.parts is None:
            piece = memory.pieces.get(_part_of(tensor)) if memory is not None and memory.pieces else None
            return piece[0] if piece is not None else None if memory is None else memory.node
        writers = tuple(np.unique(_region(memory.parts, tensor)).tolist())
        if len(writers) == 1:
            return int(writers[0])
        if writers not in self.gathered:
            part = Node(GATHERED, writers, shape=tuple(tensor.shape), proportional_to=(writers,))
            part.gradients_to = frozenset(writers)
            part.data = any(self.nodes[n].data for n in writers)
            part.random = any(self.nodes[n].random for n in writers)
            part.learned = any(self.nodes[n].learned for n in writers)
            part.ancestors = functools.reduce(lambda seen, n: seen | self.nodes[n].ancestors | 1 << n, writers, 0)
            self.gathered[writers] = len(self.nodes)
            for n in writers:
                self.nodes[n].consumers.append(len(self.nodes))
            self.nodes.append(part)
        return self.gathered[writers]

    def _part_read(self, tensor: Tensor) -> Part | None:
        """The part of its node that a tensor is; None where it is all of it."""
        if _whole(tensor):
            return None
        piece = self.owner[_key(tensor)].pieces.get(part := _part_of(tensor))
        return piece[1] if piece is not None else part

    def _own(self, tensor: Tensor, node: Node) -> int:
        number, key = len(self.nodes), _key(tensor)
        self.nodes.append(node)
        memory = self.owner.get(key)
        if memory is None or _whole(tensor) or tensor.is_meta:
            self.owner[key] = _Memory(tensor if _has_no_memory(tensor) else tensor.untyped_storage(), number)
        else:
            if memory.parts is None:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                memory.parts, memory.pieces = np.full(size, memory.node, dtype=np.int32), {}
            _region(memory.parts, tensor)[...] = number
        return number

    # -- learned tensors

    def _acting(self, number: int, tensor: Tensor) -> frozenset[str]:
        """The matrices that a tensor without data is, with the part that acts where it is a part."""
        node = self.nodes[number]
        if node.data:
            return node.selected
        names = self._part(number, tensor)
        if not names or node.op is GIVEN or any("+" in name for name in names) or not tensor.requires_grad:
            return names
        learned = [self.learned[name] for name in sorted(names)]
        try:
            gradients = torch.autograd.grad(
                tensor, learned, torch.ones_like(tensor), retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # not computed under autograd
            return names
        marks = [_support(gradient) for gradient in gradients]
        return frozenset(f"{name}+{mark}" if mark else name for name, mark in zip(sorted(names), marks, strict=True))

    def _part(self, number: int, tensor: Tensor) -> frozenset[str]:
        """The matrices that a tensor is; a slice, as of all layers' weights in one, is one of its own."""
        names = self.nodes[number].weights_of
        if _whole(tensor):
            return names
        return frozenset(name if "+" in name else f"{name}+{int(tensor.storage_offset())}" for name in names)

    def _selected(self, call: Call, number: int, tensor: Tensor) -> frozenset[str]:
        """The same where an operation takes a part by index."""
        names = self._part(number, tensor)
        chosen = [t for t in call.inputs if _chooses(t) and not t.is_meta] if call.op.relation == "moved" else []
        if not chosen or not names:
            return names
        digest = hashlib.blake2b(b"".join(t.cpu().numpy().tobytes() for t in chosen), digest_size=6).hexdigest()
        return frozenset(name if "+" in name else f"{name}+{digest}" for name in names)

    def _spread(self, reads: list[tuple[int, Tensor]]) -> frozenset[str]:
        """A learned matrix that is multiplied into more numbers than it meets acts as one; their sum is to come."""
        names = frozenset[str]().union(*(self._acting(n, tensor) for n, tensor in reads))
        if not names:
            return names
        data = max((t.numel() for n, t in reads if self.nodes[n].data and not self.nodes[n].selected), default=0)
        return names if torch.broadcast_shapes(*(t.shape for _, t in reads)).numel() > data else frozenset()

    # -- proportions

    def _note_proportion(self, node: Node, call: Call) -> None:
        """Note what the result repeats or is proportional to. Python's sum() begins with 0 + x."""
        op, sources, nodes = call.op, node.sources, self.nodes
        held = [n for n in sources if nodes[n].data and not nodes[n].choice]
        first = call.before[0] if call.before else None
        if op.name == "copy":
            node.repeats = held[0] if len(sources) == 1 and held else None
            node.proportional_to = (tuple(held),) if held else ()
        elif sources and (
            op.relation == "same" or (op.relation == "sum" and len(sources) == 1 and _adds_zero(call.args))
        ):
            node.repeats = sources[0]
        elif op.name == "mul" and len(sources) == 2 and nodes[sources[1]].noise:
            node.repeats, node.masked = sources[0], True  # how dropout is spelled on a CPU
        elif op.name == "mul" and len(sources) == 2 and nodes[sources[0]].noise:
            node.repeats, node.masked = sources[1], True
        if node.repeats is not None:
            node.proportional_to = ((node.repeats,),)
        elif op.name == "neg":
            node.proportional_to, node.factor = (tuple(held),), -1.0
        elif op.name in {"mul", "div"}:
            self._note_product(node, call, held)
        elif op.relation == "sum" and len(sources) == 2:
            node.proportional_to = (tuple(held),) if len(held) == 2 else ()
            node.signs = (1.0, _sign(call))
        elif op.relation == "product" and not (op.name == "convolution" and len(sources) > 2):
            distinct = len(set(held)) == len(held)
            values = held[2:3] if "attention" in op.name else held  # of queries, keys and values
            node.proportional_to = tuple((n,) for n in values if distinct or held.count(n) == 1)
        elif op.relation == "side by side" or op.name in {"index_add", "scatter_add"}:
            node.proportional_to = (tuple(held),) if held and op.name != "where" else ()
        elif (op.relation == "moved" or op.name in {"sum", "mean"}) and first in held:
            node.proportional_to = ((first,),)

    def _note_product(self, node: Node, call: Call, held: list[int]) -> None:
        op, args, sources = call.op, call.args, node.sources
        second = args[1] if len(args) > 1 else None
        still = [t for n, t in zip(call.before, call.inputs, strict=True) if n is None or not self.nodes[n].data]
        if op.name == "div" and len(sources) == 2 and self.nodes[sources[1]].data:
            held = held[:1] if sources[0] != sources[1] and self.nodes[sources[0]].data else []
        if isinstance(second, Tensor) and second.ndim == 0 and call.before[-1] is None and not second.is_meta:
            second = second.item()  # a constant on a tensor, such as a multiplier of ours, is a number
        if isinstance(second, (int, float)):
            node.factor = float(second)
        elif isinstance(second, Tensor) and still and not node.parameters:
            node.factor, node.even = _size(still[0])
        if op.name == "div" and node.factor:
            node.factor = 1 / node.factor
        constant = isinstance(second, (int, float)) or (not node.parameters and any(t.numel() == 1 for t in still))
        node.repeats = held[0] if constant and held and node.factor == 1 else None
        node.proportional_to = tuple((number,) for number in held) if len(set(held)) == len(held) else ()

    # -- sums

    def _note_sum(self, call: Call, out: Tensor, site: tuple[Site, int]) -> None:
        total, before = self._node_of(out), call.before
        if total is None or None in before or not (out.is_floating_point() or out.is_complex()):
            return
        if not any(self.nodes[n].data for n in before if n is not None):
            return
        whole = tuple(tensor.shape == out.shape for tensor in call.inputs)
        inside = _in_function()
        recorded = torch.is_grad_enabled() or inside
        followed = any(t.requires_grad for t in call.inputs) if torch.is_grad_enabled() else inside
        signs = (1.0, _sign(call))
        self.sums.append(Sum(total, tuple(before), signs, whole, *site, recorded, followed))  # type: ignore[arg-type]

    def _look_into_kernel(self, call: Call) -> None:
        """With its parameters at zero, a kernel that hands an input back adds a residual branch of its own."""
        seen = [(n, tensor) for n, tensor in zip(call.before, call.inputs, strict=True) if n is not None]
        learned = {n for n, _ in seen if self.nodes[n].parameters and not self.nodes[n].data}
        data = [tensor for n, tensor in seen if self.nodes[n].data]
        if not learned or call.op.writes or any(tensor.is_meta for tensor in data):
            return
        silent = call.again(lambda n, tensor: torch.zeros_like(tensor) if n in learned else tensor) or []
        if any(a.shape == b.shape and torch.equal(a.to(b.dtype), b) for a in silent for b in data):
            self.fused_kernels.append(self._line())

    def _line(self) -> str:
        return place_of(self.caller())[0]

    def finish(self) -> Graph:
        """The graph of the forward that has run."""
        kernels = tuple(dict.fromkeys(self.fused_kernels))
        outputs = tuple(n for n in self.outputs if n is not None)
        backward = functools.reduce(lambda mask, n: mask | self.nodes[n].backward << n, range(len(self.nodes)), 0)
        results = tuple(
            place
            for place, n in enumerate(self.outputs)
            if n is None or not (self.nodes[n].ancestors | 1 << n) & backward
        )
        steers = self.chance_steers, self.weights_steer
        return Graph(self.nodes, self.sums, self.calls, outputs, results, kernels, *steers, self.watched)


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
        site = self.site(op, [tensor.shape for tensor in tensors_in(args)]) if op.relation == "sum" else None
        if site is not None:
            position, multiplier = self.scale.get(site, self.scale.get((site[0], ANY), (0, 1.0)))
            args = _with_multiplier(args, position, multiplier, in_place=bool(op.writes)) if multiplier != 1 else args
        return func(*args, **kwargs)


def record(
    model: nn.Module,
    example_inputs: ExampleInputs,
    seed: int | None = None,
    copy_of: nn.Module | None = None,
    watch: frozenset[int] = frozenset(),
    change: Mapping[int, Callable[[Tensor], None]] | None = None,
) -> Graph:
    """Run `model` once on `example_inputs` and note what it did.

    Random state and buffers are given back as they were, and the inputs are copied.

    Args:
        model: run in eager mode, also where it was compiled, and without the fused paths of torch's Transformer layers.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        seed: of all random numbers drawn in the forward; None leaves them to the random state as it is.
        copy_of: the model of which `model` is a copy; that none of its modules runs is checked.
        watch: nodes whose sums are wanted in `Graph.watched`.
        change: nodes that are to hold other values, and what changes them in place.

    Raises:
        InputError: the model rejects the example inputs; its own error is shown.
    """
    args, kwargs = torch.utils._pytree.tree_map(_copied, call_arguments(example_inputs))
    if any(tensor.is_nested for tensor in held((args, kwargs))):
        raise InputError("the example inputs hold a nested tensor, which the trace cannot follow; give a padded one")
    strangers = frozenset(map(id, copy_of.modules())) if copy_of is not None else frozenset()
    recorder = Recorder(model, (args, kwargs), strangers, watch, change or {})
    try:
        with _as_seeded(model, recorder, seed), _values_told(recorder.tell), marker.observed(recorder.mark):
            drawn = random.getstate(), _numpy_state()
            with recorder:
                model(*args, **kwargs)
            recorder.chance_steers |= drawn[0] != random.getstate() or not _same_state(drawn[1])
    except InputError:
        raise
    except Exception as error:
        raise _explained(model, example_inputs, error) from error
    return recorder.finish()


def run_scaled(model: nn.Module, example_inputs: ExampleInputs, scale: Scale, seed: int) -> list[Tensor]:
    """The tensors that a forward, run as `record` does, hands back where operands of some additions are multiplied."""
    args, kwargs = torch.utils._pytree.tree_map(_copied, call_arguments(example_inputs))
    scaler = Scaler(model, scale)
    with _as_seeded(model, scaler, seed), scaler:
        return held(model(*args, **kwargs))


@contextmanager
def _as_seeded(model: nn.Module, counter: SiteCounter, seed: int | None) -> Iterator[None]:
    """Run as written, with modules counted, and give random state and buffers back."""
    torch.clear_autocast_cache()  # casts of an earlier trace would be missing from this one
    with as_written(), state_kept(model), module_hooks(counter.enter, counter.leave):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        yield


@contextmanager
def _values_told(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `tell` where values leave torch in a way that no operator shows."""
    plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}

    def telling(method: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            tell(tensor)
            return method(tensor, *args, **kwargs)

        return read

    for name, method in plain.items():
        setattr(Tensor, name, telling(method))
    try:
        yield
    finally:
        for name in plain:
            delattr(Tensor, name)


def _numpy_state() -> Any:
    state: Any = np.random.get_state()
    return state[1], state[2]


def _same_state(before: Any) -> bool:
    keys, position = _numpy_state()
    return bool(position == before[1] and (keys == before[0]).all())


def _explained(model: nn.Module, example_inputs: ExampleInputs, error: Exception) -> InputError:
    """Whose fault it is: the model runs without an observer, or it does not."""
    cause = f"{described(error)}{line_of(error)}"
    try:
        with state_kept(model):
            run(model, example_inputs)
    except Exception:
        return RejectedInputsError(
            f"the model rejects the example inputs: {cause}. "
            "Give what its forward takes: a tensor, a tuple of positional arguments or a dict of keyword arguments"
        )
    return InputError(
        f"the trace cannot follow this model, which runs without it ({cause}). It observes plain tensors and torch's "
        "own operations: pass ordinary tensors, and replace a custom kernel for the trace"
    )


def run(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """The tensors that a forward on a copy of `example_inputs` hands back."""
    args, kwargs = torch.utils._pytree.tree_map(_copied, call_arguments(example_inputs))
    return held(model(*args, **kwargs))


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call on `example_inputs`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


@contextmanager
def as_written() -> Iterator[None]:
    """Eager, and without the kernels that run a whole Transformer layer or compile themselves."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    uncompiled = getattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", None)
    if uncompiled is not None:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # type: ignore[union-attr]
    compiler = sys.modules.get("torch._dynamo")  # importing it for the question would cost two seconds
    compile_function = torch.compile
    try:
        if compiler:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            torch.compile = _as_it_is  # cond and scan compile themselves
            yield
    finally:
        torch.compile = compile_function
        torch.backends.mha.set_fastpath_enabled(fast)
        if uncompiled is not None:
            flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = uncompiled  # type: ignore[union-attr]


def _as_it_is(model: Any = None, **settings: Any) -> Any:
    """In the place of torch.compile."""
    return model if model is not None else lambda function: function


@contextmanager
def module_hooks(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call `enter` before and `leave` after every call of a module in this thread, hooks of its own included."""
    plain, thread = nn.Module.__call__, threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return plain(module, *args, **kwargs)
        enter(module)
        output = plain(module, *args, **kwargs)
        leave(module, output)
        return output

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = plain  # type: ignore[method-assign]


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a generator, a lock: what cannot be copied is shared
        return leaf


# -- tensors


def held(tree: Any) -> list[Tensor]:
    """The tensors in nested containers, and in the fields of an object such as a dataclass."""
    tensors: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            tensors += [value for value in tree_leaves(list(vars(leaf).values())) if isinstance(value, Tensor)]
    return tensors


def parts_of(output: Any) -> list[tuple[int | str | None, Tensor]]:
    """The tensors that a module returned, each with where it stands."""
    if isinstance(output, Tensor):
        return [(None, output)]
    if isinstance(output, Mapping):
        return [(key, value) for key, value in output.items() if isinstance(value, Tensor)]
    if isinstance(output, (tuple, list)):
        return [(index, value) for index, value in enumerate(output) if isinstance(value, Tensor)]
    return []


def _key(tensor: Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return id(tensor) if _has_no_memory(tensor) else int(tensor.untyped_storage()._cdata)


def _has_no_memory(tensor: Tensor) -> bool:
    """A sparse tensor."""
    return tensor.layout is not torch.strided


def _whole(tensor: Tensor) -> bool:
    """The tensor covers its memory."""
    return _has_no_memory(tensor) or tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def _part_of(tensor: Tensor) -> Part:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _region(parts: Any, tensor: Tensor) -> Any:
    """The elements of a memory that a tensor covers; all of them where it counts in another size."""
    if parts.size != tensor.untyped_storage().nbytes() // tensor.element_size():
        return parts
    strides = [stride * parts.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(parts[tensor.storage_offset() :], tensor.shape, strides)


def _chooses(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _support(gradient: Tensor | None) -> str:
    """A name for the elements that have a gradient; empty where all have one, or none is known."""
    mask = (gradient != 0).flatten() if gradient is not None and not gradient.is_meta else torch.ones(1)
    if bool(mask.all()) or not bool(mask.any()):
        return ""
    return hashlib.blake2b(mask.cpu().numpy().tobytes(), digest_size=6).hexdigest()


def _size(tensor: Tensor) -> tuple[float, bool]:
    """The factor that a constant tensor is, where it varies its root mean square; and whether it is even."""
    if tensor.is_meta or not tensor.numel() or tensor.dtype.is_complex:
        return 1.0, True
    values = tensor.detach().double()
    return float(values.pow(2).mean().sqrt()), bool((values == values.flatten()[0]).all())


def _broadcasts(shapes: list[torch.Size]) -> bool:
    """One of two shapes is that of their sum."""
    if shapes[0] == shapes[1]:
        return True
    try:
        return torch.broadcast_shapes(*shapes) in shapes
    except RuntimeError:
        return False


# -- arguments


def _with_multiplier(args: Any, position: int, multiplier: float, in_place: bool) -> Any:
    scaled = args[position] * multiplier
    if position == 0 and in_place:
        args[0].copy_(scaled)
        return args
    return tuple(scaled if place == position else arg for place, arg in enumerate(args))


def _argument(position: int | str, args: Any, kwargs: Any) -> Any:
    if isinstance(position, int):
        return args[position] if position < len(args) else None
    return kwargs.get(position)


def _sign(call: Call) -> float:
    """The factor that a sum puts on its second operand."""
    return (1.0 if call.op.name == "add" else -1.0) * float(call.kwargs.get("alpha", 1))


def _contracted(call: Call) -> int:
    """The numbers that a product of matrices sums over."""
    first = call.inputs[0] if "attention" in call.op.name or len(call.inputs) == 1 else call.inputs[-2]
    return first.shape[-1] if first.ndim else 1


def _adds_zero(args: Any) -> bool:
    return any(isinstance(arg, (int, float)) and arg == 0 for arg in args)


# -- frames


def _in_function() -> bool:
    """The forward is that of an autograd.Function, such as a reversible layer or a checkpoint."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename == torch.autograd.function.__file__:
            return True
        frame = frame.f_back
    return False


def _is_hidden(frame: types.FrameType) -> bool:
    return _is_hidden_file(frame.f_code.co_filename)


@functools.cache
def _is_hidden_file(filename: str) -> bool:
    return any(part in Path(filename).as_posix() for part in HIDDEN_FRAMES)


def place_of(frame: types.FrameType) -> tuple[str, int]:
    """The line that a frame is at, as file:line, and the column of the expression."""
    columns = _columns(frame.f_code)
    file = re.sub(r"^(<.*>)\.\d+$", r"\1", frame.f_code.co_filename)  # code that torch.fx makes anew for every copy
    return f"{file}:{frame.f_lineno}", columns[frame.f_lasti // 2] if columns else frame.f_lasti


@functools.cache
def _columns(code: types.CodeType) -> tuple[int, ...]:
    """The column at which every instruction's expression ends on its line; before Python 3.11 nobody knows."""
    if sys.version_info < (3, 11):
        return ()
    return tuple(10_000 * (end or 0) + (start or 0) for _, _, start, end in code.co_positions())
