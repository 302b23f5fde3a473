"""One forward under observation: every operation is seen below autograd and becomes a node of the graph."""

import copy
import functools
import random
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looptransfer.errors import InputError
from looptransfer.rewrite import marker
from looptransfer.rewrite.graph import ANY, Graph, Handle, Node, Site, Sum
from looptransfer.rewrite.names import homes, named_parameters, plain_names
from looptransfer.rewrite.twin import state_kept
from looptransfer.user_code import described

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

IDENTITIES = {"_to_copy", "clone", "native_dropout", "_unsafe_view", "lift_fresh_copy", "alias_copy"}
# The result is proportional to the first argument.
REARRANGEMENTS = {"index", "gather", "index_select", "flip", "roll", "repeat", "constant_pad_nd", "sum", "mean", "take"}
REARRANGEMENTS |= {"masked_select", "squeeze_copy", "permute_copy", "select_copy", "slice_copy", "_index_put_impl"}
# The result is proportional to all arguments that hold data, taken together.
COLLECTIONS = {"cat", "stack", "index_add", "index_put", "scatter_add", "scatter", "index_copy", "slice_scatter"}
PRODUCTS = {"mul", "mm", "bmm", "mv", "dot", "convolution"}
SUMS = {"add", "sub"}
# A learned tensor that enters here does not act on the data as a matrix does: a table, a bias, a gate.
PASSIVE = {"add", "sub", "rsub", "mul", "div", "cat", "stack", "where", "copy", "lerp", "masked_fill", "embedding"}
PASSIVE |= {"index_add", "index_put", "index_copy", "scatter_add", "slice_scatter", "select_scatter", "expand"}
# One operation that adds to its first argument what it makes of the others.
FUSED_SUMS = {"addmm", "baddbmm", "addbmm", "addmv", "addcmul", "addcdiv", "index_add", "scatter_add", "lerp"}
# Made like another tensor, but holding nothing of it. A random mask is one of these, drawn in place.
SHAPED_LIKE = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "zero", "fill"}
SHAPED_LIKE |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
DRAWS = ("bernoulli", "rand", "uniform")
OPAQUE = {"_transformer_encoder_layer_fwd"}  # whole layers in one kernel
# Frames between an operator and the line that spelled it.
HIDDEN_FRAMES: tuple[str, ...] = (
    "torch/_tensor.py",
    "torch/_ops.py",
    "torch/_dynamo/",
    "torch/_compile.py",
    "torch/functional.py",
)
HIDDEN_FRAMES += ("rewrite/record.py", "coordcheck/observe.py")
HIDDEN_FRAMES += ("torch/utils/_contextlib.py", "torch/_library/", "torch/autograd/function.py")


@dataclass(frozen=True)
class _Call:
    """One operation, before it runs."""

    func: Any
    name: str  # without overload and trailing underscore
    args: Any
    kwargs: Any
    inputs: list[Tensor]
    before: list[int | None]  # the node of each input
    shapes: list[torch.Size]
    written: list[Tensor]
    sources: list[int]  # the nodes that the result is made of
    gradients_to: frozenset[int]  # those of them that autograd follows, or may follow once no_grad is over
    parts: frozenset[tuple[int, int]]  # (node, offset) of inputs that are part of a storage


class SiteCounter(TorchDispatchMode):
    """Knows which modules run, and which run of which line an addition is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(module): name for name, module in plain_names(model).items()}
        self.running: list[str] = []
        self.runs: Counter[Site] = Counter()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Hook before a module's forward."""
        name = self.names.get(id(module))
        if name is not None:
            self.running.append(name)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook after a module's forward."""
        if id(module) in self.names:
            self.running.pop()

    def site(self, name: str, shapes: list[torch.Size]) -> tuple[Site, int] | None:
        """Where a plain sum of two tensors is spelled, and which run of it this is; None for any other operation."""
        if name not in SUMS or len(shapes) != 2 or not _broadcasts(shapes):
            return None
        return self.next_run()

    def next_run(self) -> tuple[Site, int]:
        """The line that runs now, and which run of it this is."""
        line, place = _place()
        where = Site(line, place, tuple(self.running))
        self.runs[where] += 1
        return where, self.runs[where] - 1


class Recorder(SiteCounter):
    """Builds the graph of one forward."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        peaks: bool,
        scale: Mapping[tuple[Site, int], tuple[int, float]],
        strangers: frozenset[int],
    ) -> None:
        super().__init__(model)
        self.nodes: list[Node] = []
        # Storage -> its node, and the storage itself: kept alive so that its key stays its own.
        self.owner: dict[int, tuple[int, Any]] = {}
        self.homes = homes(model)
        self.peaks, self.scale = peaks, scale
        self.calls: Counter[Handle] = Counter()
        self.sums: list[Sum] = []
        self.outputs: list[int] = []
        self.results: list[Tensor] = []
        self.fused_kernels: list[str] = []
        learned = named_parameters(model)
        self.parameters = list(learned)
        self.wide = {name for name, parameter in learned.items() if parameter.ndim >= 2}
        self.strangers = strangers
        for _, tensor in model.named_buffers():
            self._own(tensor, Node())
        for position, (name, parameter) in enumerate(learned.items()):
            self._own(parameter, self._parameter(name, position))
        for tensor in [tensor for leaf in tree_leaves(example) for tensor in held(leaf)]:
            self._own(tensor, Node(data=True))

    # -- what ran where

    def enter(self, module: nn.Module, args: Any) -> None:
        super().enter(module, args)
        name = self.names.get(id(module))
        if name is not None:
            self.calls[Handle(name)] += 1
            for own, parameter in module._parameters.items():
                if isinstance(parameter, nn.Parameter) and (id(module), own) in self.homes:  # no computed weight
                    self._learn(parameter, self.homes[id(module), own])
        elif id(module) in self.strangers:
            raise InputError(
                f"a copy of the model runs a {type(module).__name__} of the original: some function or closure kept on "
                "the model holds it, so that deepcopy (and a trace on a copy) misses it. Make it a method"
            )

    def _learn(self, parameter: Tensor, name: str) -> None:
        """FSDP gathers a parameter into another one for the forward."""
        number = self._node_of(parameter)
        if number is None or self.nodes[number].parameters != {name}:
            position = self.parameters.index(name)
            self._own(parameter, self._parameter(name, position))

    def _parameter(self, name: str, position: int) -> Node:
        own = frozenset([name])
        return Node(parameters=own, weights_of=own & self.wide, reaching=1 << position)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        super().leave(module, args, output)
        name = self.names.get(id(module))
        if name is not None:
            for index, tensor in _parts(output):
                self._handed_over(tensor, Handle(name, index))
        if name == "":
            self.results = [found for leaf in tree_leaves(output) for found in held(leaf)]
            self.outputs = [n for n in map(self._node_of, self.results) if n is not None]

    def mark(self, tensor: Tensor, name: str) -> None:
        handle = Handle(self.running[-1] if self.running else "", mark=name)
        self.calls[handle] += 1
        self._handed_over(tensor, handle)

    def _handed_over(self, tensor: Tensor, handle: Handle) -> None:
        number = self._node_of(tensor)
        if number is not None:
            self.nodes[number].handles.append(handle)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self._call(func, args, kwargs or {})
        self._note_followed(call)
        site = self.site(call.name, call.shapes)
        scaled = self.scale.get(site, self.scale.get((site[0], ANY))) if site and self.scale else None
        peaks = tuple(_peak(tensor) for tensor in call.inputs) if site and self.peaks else ()
        given = _with_multiplier(args, *scaled, in_place=bool(call.written)) if scaled else args
        out = func(*given, **call.kwargs)
        written = {_key(tensor) for tensor in call.written}
        results = {_key(tensor): tensor for tensor in [*call.written, *tensors(out)]}
        for key, tensor in results.items():  # a view shares its base's key, and so its node
            if key not in self.owner or key in written:
                self._own(tensor, self._derive(call))
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    self.nodes[-1].index, self.nodes[-1].reaching = True, 0
        self._look_for_sum(call, out, site, peaks)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> _Call:
        inputs = tensors((args, kwargs))
        before = [self._node_of(tensor) for tensor in inputs]
        name, writes = schema(func)
        written = [tensor for position in writes for tensor in tensors(_argument(position, args, kwargs))]
        overwritten = {_key(tensor) for tensor in written if name in {"copy", "zero", "fill"} and _whole(tensor)}
        known = [(n, tensor) for n, tensor in zip(before, inputs, strict=True) if n is not None]
        sources = [n for n, tensor in known if name not in SHAPED_LIKE and _key(tensor) not in overwritten]
        parts = frozenset((n, int(tensor.storage_offset())) for n, tensor in known if not _whole(tensor))
        followed = frozenset(n for n, tensor in known if tensor.requires_grad or not torch.is_grad_enabled())
        shapes = [tensor.shape for tensor in inputs]
        return _Call(func, name, args, kwargs, inputs, before, shapes, written, sources, followed, parts)

    def _note_followed(self, call: _Call) -> None:
        for tensor, number in zip(call.inputs, call.before, strict=True):
            if number is not None and tensor.requires_grad and torch.is_grad_enabled():
                self.nodes[number].followed = True

    # -- lineage

    def _node_of(self, tensor: Tensor) -> int | None:
        entry = self.owner.get(_key(tensor))
        return None if entry is None else entry[0]

    def _holds_data(self, tensor: Tensor) -> bool:
        number = self._node_of(tensor)
        return number is not None and self.nodes[number].data

    def _own(self, tensor: Tensor, node: Node) -> None:
        self.nodes.append(node)
        self.owner[_key(tensor)] = (len(self.nodes) - 1, tensor.untyped_storage())

    def _derive(self, call: _Call) -> Node:
        name, sources, parts = call.name, call.sources, call.parts
        node = Node(op=name, sources=tuple(sources), slices=parts, gradients_to=call.gradients_to)
        learned: set[str] = set()
        for number in sources:
            source = self.nodes[number]
            source.consumers.append(len(self.nodes))
            node.reaching |= source.reaching
            node.data |= source.data
            node.ancestors |= source.ancestors | (1 << number)
            if not source.data:
                learned |= source.parameters
        node.parameters = frozenset(learned)
        if node.data and name not in PASSIVE:
            node.matrices = frozenset[str]().union(*(self._weights(n, parts) for n in sources))
        elif not node.data:
            made = sources[-1:] if name in PRODUCTS - {"mul"} or name in FUSED_SUMS else sources
            node.weights_of = frozenset[str]().union(*(self._weights(n, parts) for n in made))
        zeros = [self.nodes[number].zero for number in sources if self.nodes[number].data]
        product = name in PRODUCTS or name == "div"
        if name == "addcmul" and len(sources) == 3 and any(self.nodes[n].zero for n in sources[1:]):
            node.reaching = self.nodes[sources[0]].reaching
        node.zero = (name == "mul" and _holds_zero(call.args)) or (product and any(zeros))
        drawn = any(word in name for word in DRAWS) or any(self.nodes[number].noise for number in sources)
        node.noise = drawn and not node.data and not node.parameters
        self._note_proportion(node, call)
        of_zeros = bool(zeros) and all(zeros) and bool(node.proportional_to)
        if node.zero or (of_zeros and (name not in SUMS or len(zeros) == len(sources))):
            node.zero, node.reaching = True, 0
        return node

    def _weights(self, number: int, parts: frozenset[tuple[int, int]]) -> frozenset[str]:
        """The matrices that a tensor without data is; a slice, as of all layers' weights in one, is one of its own."""
        offsets = sorted(offset for n, offset in parts if n == number)
        names = self.nodes[number].weights_of
        return frozenset(f"{name}+{offsets[0]}" if offsets and "+" not in name else name for name in names)

    def _note_proportion(self, node: Node, call: _Call) -> None:
        """What the result repeats or is proportional to. Python's sum() begins with 0 + x."""
        name, sources, before = call.name, call.sources, call.before
        held = [number for number in sources if self.nodes[number].data and not self.nodes[number].index]
        first = before[0] if before else None
        if name == "copy":
            held = held[-1:] if len(sources) == 1 else held
            node.repeats = held[0] if len(sources) == 1 and held else None
        elif sources and (name in IDENTITIES or (name in SUMS and len(sources) == 1 and _holds_zero(call.args))):
            node.repeats = sources[0]
        elif name == "mul" and len(sources) == 2 and self.nodes[sources[1]].noise:
            node.repeats, node.masked = sources[0], True  # how dropout is spelled on a CPU
        if node.repeats is not None:
            node.proportional_to = ((node.repeats,),)
        elif name == "neg":
            node.proportional_to, node.factor = (tuple(held),), -1.0
        elif name in {"mul", "div"} and (held or not node.data):
            self._note_product(node, call, held)
        elif name in SUMS and len(held) == 2:
            sign = 1.0 if name == "add" else -1.0
            node.proportional_to, node.weights = (tuple(held),), (1.0, sign * float(call.kwargs.get("alpha", 1)))
        elif name in PRODUCTS and not (name == "convolution" and len(sources) > 2):
            node.proportional_to = tuple((number,) for number in held)
        elif name in COLLECTIONS or name == "copy":
            node.proportional_to = (tuple(held),) if held else ()
        elif name in REARRANGEMENTS and first is not None and self.nodes[first].data:
            node.proportional_to = ((first,),)
        elif name.startswith("_scaled_dot_product") and before[2] is not None and before[2] not in before[:2]:
            node.proportional_to = ((before[2],),)

    def _note_product(self, node: Node, call: _Call, held: list[int]) -> None:
        name, args, sources = call.name, call.args, call.sources
        second = args[1] if len(args) > 1 else None
        if name == "div" and len(sources) == 2 and self.nodes[sources[1]].data:
            held = held[:1] if sources[0] != sources[1] and self.nodes[sources[0]].data else []
        if isinstance(second, (int, float)):
            node.factor = float(second)
        elif isinstance(second, Tensor):
            still = [t for t in args[:2] if isinstance(t, Tensor) and not self._holds_data(t)]
            if still and not node.parameters:
                node.factor, node.even = _size(still[0])
        if name == "div" and node.factor:
            node.factor = 1 / node.factor
        node.proportional_to = tuple((number,) for number in held) if len(set(held)) == len(held) else ()

    # -- sums

    def _look_for_sum(self, call: _Call, out: Any, site: tuple[Site, int] | None, peaks: tuple[float, ...]) -> None:
        name, before, shapes = call.name, call.before, call.shapes
        foreign = call.func.namespace not in {"aten", "prims", "prim"} or name in OPAQUE
        if foreign:
            self._look_into_kernel(call, out)
        if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
            return
        total = self._node_of(out)
        scaled: tuple[bool, ...]
        whole = (True,) * max(len(before), 64)
        if site is not None:
            operands = before
            scaled, fused = (False, call.kwargs.get("alpha", 1) * (1 if name == "add" else -1) != 1), False
            whole = tuple(shape == out.shape for shape in shapes)
        elif name == "sum" and before and before[0] is not None and self.nodes[before[0]].op in {"stack", "cat"}:
            operands = list(self.nodes[before[0]].sources)
            scaled, fused = (False,) * len(operands), True
        elif foreign:
            operands = [n for n, shape in zip(before, shapes, strict=True) if shape == out.shape]
            scaled, fused, name = (False,) * len(operands), True, f"{call.func.namespace}::{name}"
        elif name in FUSED_SUMS and shapes[0] == out.shape:
            operands = before
            scaled, fused = (name == "lerp",) * len(before), True
        else:
            return
        known = tuple(number for number in operands if number is not None)
        if total is None or len(known) != len(operands) or not any(self.nodes[number].data for number in known):
            return
        self.sums.append(Sum(total, known, scaled, whole, fused, name, *(site or self.next_run()), _recorded(), peaks))

    def _look_into_kernel(self, call: _Call, out: Any) -> None:
        """With its parameters at zero, a kernel that hands its input back adds a residual branch of its own."""
        known = [(t, self.nodes[n]) for t, n in zip(call.inputs, call.before, strict=True) if n is not None]
        learned = {id(tensor) for tensor, node in known if node.parameters and not node.data}
        first = next(iter(tensors(out)), None)
        if not learned or first is None or first.is_meta or call.func._schema.is_mutable:
            return

        def silent(leaf: Any) -> Any:
            return torch.zeros_like(leaf) if id(leaf) in learned else leaf

        silenced = torch.utils._pytree.tree_map(silent, (call.args, call.kwargs))
        with torch.no_grad():
            result = next(iter(tensors(call.func(*silenced[0], **silenced[1]))))
        data = [tensor for tensor, node in known if node.data and tensor.shape == result.shape]
        if any(torch.equal(tensor.to(result.dtype), result) for tensor in data):
            self.fused_kernels.append(_place()[0])

    def finish(self) -> Graph:
        mask = functools.reduce(lambda seen, number: seen | self.nodes[number].reaching, self.outputs, 0)
        reaching = frozenset(name for place, name in enumerate(self.parameters) if mask >> place & 1)
        kernels = tuple(dict.fromkeys(self.fused_kernels))
        outputs = tuple(self.outputs)
        return Graph(self.nodes, self.sums, self.calls, outputs, self.results, reaching, kernels)


def record(
    model: nn.Module,
    example_inputs: ExampleInputs,
    peaks: bool = False,
    scale: Mapping[tuple[Site, int], tuple[int, float]] | None = None,
    seed: int | None = None,
    copy_of: nn.Module | None = None,
) -> Graph:
    """Run `model` once on `example_inputs` and note what it did.

    Random state and buffers are given back as they were, and the inputs are copied.

    Args:
        model: run in eager mode, also where it was compiled, and without the fused paths of torch's Transformer layers.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        peaks: measure the operands of every addition.
        scale: additions of which one operand, by position, is to be multiplied before it is added.
        seed: of all random numbers drawn in the forward; None leaves them to the random state as it is.
        copy_of: the model of which `model` is a copy; that none of its modules runs is checked.

    Raises:
        InputError: the model rejects the example inputs; its own error is shown.
    """
    args, kwargs = torch.utils._pytree.tree_map(_copied, call_arguments(example_inputs))
    if any(tensor.is_nested for tensor in tensors((args, kwargs))):
        raise InputError("the example inputs hold a nested tensor, which the trace cannot follow; give a padded one")
    strangers = frozenset(map(id, copy_of.modules())) if copy_of is not None else frozenset()
    recorder = Recorder(model, (args, kwargs), peaks, scale or {}, strangers)
    torch.clear_autocast_cache()  # casts of an earlier trace would be missing from this one
    try:
        with as_written(), state_kept(model), module_hooks(recorder.enter, recorder.leave):
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
            with marker.observed(recorder.mark), recorder:
                model(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        raise _explained(model, example_inputs, error) from error
    return recorder.finish()


def _explained(model: nn.Module, example_inputs: ExampleInputs, error: Exception) -> InputError:
    """Whose fault it is: the model runs without an observer, or it does not."""
    what = described(error)
    args, kwargs = torch.utils._pytree.tree_map(_copied, call_arguments(example_inputs))
    try:
        with state_kept(model):
            model(*args, **kwargs)
    except Exception:
        return InputError(
            f"the model rejects the example inputs: {what}. "
            "Give what its forward takes: a tensor, a tuple of positional arguments or a dict of keyword arguments"
        )
    return InputError(
        f"the trace cannot follow this model, which runs without it ({what}). It observes plain tensors and torch's "
        "own operations: pass ordinary tensors, and replace vmap, cond or a custom kernel for the trace"
    )


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call on `example_inputs`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


@contextmanager
def as_written() -> Iterator[None]:
    """Eager, and without the kernel that runs a whole Transformer layer in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    compiler = sys.modules.get("torch._dynamo")  # importing it for the question would cost two seconds
    try:
        if compiler:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def module_hooks(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call `enter` before and `leave` after the forward of every module."""
    # Global hooks touch no module, so nothing is left behind on the model.
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a generator, a lock: what cannot be copied is shared
        return leaf


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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


def _holds_zero(args: Any) -> bool:
    return any(isinstance(arg, (int, float)) and arg == 0 for arg in args)


def held(leaf: Any) -> list[Tensor]:
    """A tensor, or those in the fields of an object."""
    if isinstance(leaf, Tensor):
        return [leaf]
    return tensors(list(vars(leaf).values())) if hasattr(leaf, "__dict__") and not callable(leaf) else []


def _parts(output: Any) -> list[tuple[int | str | None, Tensor]]:
    if isinstance(output, Tensor):
        return [(None, output)]
    if isinstance(output, Mapping):
        return [(key, value) for key, value in output.items() if isinstance(value, Tensor)]
    if isinstance(output, (tuple, list)):
        return [(index, value) for index, value in enumerate(output) if isinstance(value, Tensor)]
    return []


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _whole(tensor: Tensor) -> bool:
    """The tensor covers its storage."""
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


@functools.cache
def schema(func: Any) -> tuple[str, tuple[int | str, ...]]:
    """An operator's base name, and the arguments that it writes to: by position, or by name where keyword-only."""
    name = str(func).split(".")[1].rstrip("_")
    arguments = enumerate(func._schema.arguments)
    writing = [(i, a) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return name, tuple(a.name if a.kwarg_only else i for i, a in writing)


def _argument(position: int | str, args: Any, kwargs: Any) -> Any:
    if isinstance(position, str):
        return kwargs.get(position)
    return args[position] if position < len(args) else None


def _recorded() -> bool:
    """Autograd is on, or the forward is that of an autograd.Function, such as a reversible layer or a checkpoint."""
    return torch.is_grad_enabled() or _in_function()


def _in_function() -> bool:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename == torch.autograd.function.__file__:
            return True
        frame = frame.f_back
    return False


def _size(tensor: Tensor) -> tuple[float, bool]:
    """The factor that a constant tensor is, where it varies its root mean square; and whether it is even."""
    if tensor.is_meta or not tensor.numel() or tensor.dtype.is_complex:
        return 1.0, True
    values = tensor.detach().double()
    return float(values.pow(2).mean().sqrt()), bool((values == values.flatten()[0]).all())


def _peak(tensor: Tensor) -> float:
    if tensor.is_meta or not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return float("nan")
    return float(tensor.detach().abs().max())


def _place() -> tuple[str, int]:
    """The line that spelled an operation, and where on it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_hidden(frame.f_code.co_filename):
        frame = frame.f_back
    return place_of(frame)


@functools.cache
def _is_hidden(filename: str) -> bool:
    return any(part in Path(filename).as_posix() for part in HIDDEN_FRAMES)


def place_of(frame: types.FrameType) -> tuple[str, int]:
    """The line that a frame is at, as file:line, and the column of the expression."""
    columns = _columns(frame.f_code)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", columns[frame.f_lasti // 2] if columns else frame.f_lasti


@functools.cache
def _columns(code: types.CodeType) -> tuple[int, ...]:
    """Where every instruction's expression ends on its line; before Python 3.11 nobody knows."""
    if sys.version_info < (3, 11):
        return ()
    return tuple(10_000 * (end or 0) + (start or 0) for _, _, start, end in code.co_positions())
