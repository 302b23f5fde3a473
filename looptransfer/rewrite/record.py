"""One forward under observation: every operation is seen below autograd and becomes a node of the graph.

- Below autograd there are a few hundred operators of torch's, and no spelling of the user's is lost.
- A tensor is known by its memory, so that a view is what it views. Who wrote an element last is kept per memory, and
  per element where only a part of it was written.
- Nothing is copied and nothing stays on the model; memory is kept alive until the graph is dropped.
- An operator's row in `ops` says what it does to its arguments; where there is none, the operation is run again on
  changed arguments when somebody asks (`Graph.scales_with`), which costs nothing where nobody does.
- Lines are those of the user's file: frames of torch and of this module are skipped.
"""

import functools
import hashlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import or_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from looptransfer.errors import InputError
from looptransfer.rewrite import marker
from looptransfer.rewrite.forward import (
    ExampleInputs,
    as_seeded,
    chance_told,
    copied_arguments,
    parts_of,
    run,
    tensors_held,
    values_told,
)
from looptransfer.rewrite.graph import Call, Graph, Handle, Node, Part, Site, Sum, bits, tensors_in, versions
from looptransfer.rewrite.memory import Memory, has_no_memory, is_whole, key_of, part_of, region
from looptransfer.rewrite.names import homes, named_parameters
from looptransfer.rewrite.ops import GATHERED, GIVEN, Operator, operator
from looptransfer.rewrite.proportion import note_proportion, sign_of
from looptransfer.rewrite.sites import SiteCounter
from looptransfer.rewrite.twin import state_kept
from looptransfer.user_code import described, line_of


class RejectedInputsError(InputError):
    """The model itself does not take the example inputs."""


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
        super().__init__(model, hidden=__file__)
        self.nodes: list[Node] = []
        self.owner: dict[int, Memory] = {}
        self.gathered: dict[tuple[int, ...], int] = {}
        self.homes, self.strangers, self.watch, self.change = homes(model), strangers, watch, change
        self.calls: Counter[Handle] = Counter()
        self.sums: list[Sum] = []
        self.outputs: list[tuple[int | None, bool]] = []  # what was handed back, and whether autograd follows it
        self.watched: dict[int, Tensor] = {}
        self.fused_kernels: list[str] = []
        self.chance_steers = self.weights_steer = False
        self.learned = named_parameters(model)
        for _, tensor in model.named_buffers():
            self._own(tensor, Node())
        for name, parameter in self.learned.items():
            self._own(parameter, self._parameter(name))
        self.registered = len(self.nodes)
        for tensor in tensors_held(example):
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
        memory = self.owner.get(key_of(parameter))
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
            self.outputs = [(self._node_of(tensor), tensor.requires_grad) for tensor in tensors_held(output)]

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

    def tell_chance(self) -> None:
        """Python or numpy draws random numbers."""
        self.chance_steers = True

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
        self.count(op)
        if op.accumulates is not None and _argument(op.accumulates, args, kwargs):
            op = replace(op, relation="onto")
        inputs = tensors_in(args) + tensors_in(kwargs)
        before = [self._node_of(tensor) for tensor in inputs]
        self._note_followed(op, before, inputs)
        if op.view:
            return func(*args, **kwargs)
        if op.tells and (op.name != "index" or _has_mask(inputs)):
            self.tell(*inputs)
        call = Call(op, func, args, kwargs, inputs, before, versions(inputs))
        site = self.site(op, [tensor.shape for tensor in inputs])
        written = [tensor for position in op.writes for tensor in tensors_in(_argument(position, args, kwargs))]
        node = self._derive(call, written)
        if op.foreign:
            self._look_into_kernel(call)
        out = func(*args, **kwargs)
        self._note_results(node, written, tensors_in(out))
        if op.name in {"cat", "stack"} and not written:
            self._note_pieces(call, out)
        if site is not None and isinstance(out, Tensor) and not node.backward:
            self._note_sum(call, out, site)
        return out

    def _note_followed(self, op: Operator, before: list[int | None], inputs: list[Tensor]) -> None:
        acts = not op.passive and not op.view and any(self.nodes[n].data for n in before if n is not None)
        for number, tensor in zip(before, inputs, strict=True):
            if number is not None:
                self.nodes[number].followed |= tensor.requires_grad
            elif _is_trained(tensor) and (tensor.grad_fn is not None or (acts and tensor.ndim >= 2)):
                raise InputError(
                    f"at {self.line(outside='torch')} the model computes with a trained tensor of shape "
                    f"{tuple(tensor.shape)} that is no parameter of it, as in a plain list, an attribute or a closure: "
                    "the trace misses it, as optimizers and checkpoints do. Register it: nn.Parameter, "
                    "nn.ParameterList, nn.ModuleList"
                )
            elif tensor.grad_fn is not None:
                raise InputError(
                    f"at {self.line()} the model uses a tensor that the trace did not see being made, such as one of "
                    "another thread; compute it in the thread that calls the model, for the trace"
                )

    def _derive(self, call: Call, written: list[Tensor]) -> Node:
        """The node of what a call makes, as far as that is known before it runs."""
        unread = {id(tensor) for tensor in written} if call.op.overwrites else set()
        reads = [(n, t) for n, t in zip(call.before, call.inputs, strict=True) if n is not None and id(t) not in unread]
        reads = [] if call.op.relation == "blank" else reads
        frame = self.caller()
        node = Node(call.op, tuple(n for n, _ in reads), place=(frame.f_code.co_filename, frame.f_lineno))
        node.backward = frame.f_code.co_filename == torch.autograd.graph.__file__
        node.slices = frozenset((n, part) for n, t in reads if (part := self._part_read(t)) is not None)
        node.gradients_to = frozenset(n for n, t in reads if t.requires_grad or not torch.is_grad_enabled())
        self._note_origin(node)
        self._note_matrices(node, call, reads)
        note_proportion(node, call, self.nodes)
        amounts = sum(self.nodes[n].data and not self.nodes[n].choice for n in set(node.sources))
        node.call = call if amounts > 1 or (amounts and not node.proportional_to) else None
        return node

    def _note_origin(self, node: Node) -> None:
        """Note whether it is made of data, of random numbers, of learned tensors."""
        sources = [self.nodes[n] for n in node.sources]
        node.data = any(source.data for source in sources)
        node.random = node.op.draws or any(source.random for source in sources)
        node.learned = any(source.learned for source in sources)
        for number, source in zip(node.sources, sources, strict=True):
            node.ancestors |= 0 if source.choice else source.ancestors | 1 << number
            if not source.data:
                node.parameters |= source.parameters
        noise = node.op.draws or any(source.noise for source in sources)
        node.noise = noise and not node.data and not node.parameters

    def _note_matrices(self, node: Node, call: Call, reads: list[tuple[int, Tensor]]) -> None:
        """Note the learned matrices that act on data here, and those that it is itself."""
        op, nodes = call.op, self.nodes
        multiplies = op.relation in {"product", "onto"} and not op.pointwise
        if op.relation in {"moved", "same"} and reads:
            first = nodes[reads[0][0]]
            picked = any(nodes[n].picked for n in node.sources)
            node.selected = first.selected if first.data else first.weights_of if picked else frozenset()
        if node.data and not op.passive:
            node.matrices = frozenset[str]().union(*(self._acting(n, tensor) for n, tensor in reads))
        elif node.data and op.name == "mul":
            node.matrices = self._spread(reads)
        elif not node.data and node.parameters:
            contracts = multiplies or op.relation == "onto"
            factors = reads[-1:] if contracts else reads  # of W @ table it is W
            node.weights_of = frozenset[str]().union(*(self._selected(call, n, tensor) for n, tensor in factors))
        if multiplies and sum(nodes[n].data for n, _ in reads) > 1:
            node.contracted = _contracted(call)

    def _note_results(self, node: Node, written: list[Tensor], results: list[Tensor]) -> None:
        keys = {key_of(tensor) for tensor in written}
        fresh = {
            key_of(tensor): (slot, tensor) for slot, tensor in enumerate(results) if key_of(tensor) not in self.owner
        }
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
        pieces, start, dim = self.owner[key_of(out)].pieces, 0, int(_argument(1, call.args, call.kwargs) or 0)
        for number, tensor in zip(call.before, call.inputs, strict=True):
            if tensor.ndim < out.ndim and call.op.name == "cat":  # an empty list to begin with
                continue
            size = tensor.shape[dim] if call.op.name == "cat" else 1
            piece = out.narrow(dim, start, size) if call.op.name == "cat" else out.select(dim, start)
            if number is not None and self.nodes[number].data:
                pieces[part_of(piece)] = number, self._part_read(tensor)
            start += size

    def _see(self, tensor: Tensor, number: int) -> None:
        if number in self.watch:
            self.watched[number] = tensor.detach().clone().nan_to_num()
        if number in self.change and not tensor.is_meta:
            with torch.no_grad():
                self.change[number](tensor)

    # -- whose memory it is

    def _node_of(self, tensor: Tensor) -> int | None:
        memory = self.owner.get(key_of(tensor))
        if memory is None or memory.parts is None:
            piece = memory.pieces.get(part_of(tensor)) if memory is not None and memory.pieces else None
            return piece[0] if piece is not None else None if memory is None else memory.node
        writers = tuple(np.unique(region(memory.parts, tensor)).tolist())
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
        if is_whole(tensor):
            return None
        piece = self.owner[key_of(tensor)].pieces.get(part := part_of(tensor))
        return piece[1] if piece is not None else part

    def _own(self, tensor: Tensor, node: Node) -> int:
        number, key = len(self.nodes), key_of(tensor)
        self.nodes.append(node)
        memory = self.owner.get(key)
        if memory is None or is_whole(tensor) or tensor.is_meta:
            self.owner[key] = Memory(tensor if has_no_memory(tensor) else tensor.untyped_storage(), number)
        else:
            if memory.parts is None:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                memory.parts, memory.pieces = np.full(size, memory.node, dtype=np.int32), {}
            region(memory.parts, tensor)[...] = number
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
        if is_whole(tensor):
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
        signs = (1.0, sign_of(call))
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
            self.fused_kernels.append(self.line())

    def finish(self) -> Graph:
        """The graph of the forward that has run."""
        kernels = tuple(dict.fromkeys(self.fused_kernels))
        looks, backward = self._looks(), sum(node.backward << n for n, node in enumerate(self.nodes))
        kept = [(place, n) for place, (n, _) in enumerate(self.outputs) if n not in looks]
        outputs = tuple(n for _, n in kept if n is not None)
        results = tuple(place for place, n in kept if n is None or not self._made_of(n) & backward)
        steers = self.chance_steers, self.weights_steer
        return Graph(self.nodes, self.sums, self.calls, outputs, results, kernels, *steers, self.watched)

    def _looks(self) -> set[int]:
        """Outputs that only tell of the others, as a last step's size does: autograd follows others, and not these.

        The same matrices made them. A teacher, which has its own, is none.
        """
        others = {n for n, f in self.outputs if n is not None and not f}
        followed = functools.reduce(or_, (self._made_of(n) for n, f in self.outputs if f and n is not None), 0)
        matrices = self._matrices_in(followed)
        own = {n: self._matrices_in(self._made_of(n) & ~followed) for n in others}
        return {n for n in others if own[n] and own[n] <= matrices}

    def _made_of(self, number: int) -> int:
        return self.nodes[number].ancestors | 1 << number

    def _matrices_in(self, mask: int) -> frozenset[str]:
        return frozenset[str]().union(*(self.nodes[n].matrices for n in bits(mask)))


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
        watch: nodes whose values, before they are changed, are wanted in `Graph.watched`.
        change: nodes that are to hold other values, and what changes them in place.

    Raises:
        InputError: the model rejects the example inputs; its own error is shown.
    """
    args, kwargs = copied_arguments(example_inputs)
    if any(tensor.is_nested for tensor in tensors_held((args, kwargs))):
        raise InputError("the example inputs hold a nested tensor, which the trace cannot follow; give a padded one")
    strangers = frozenset(map(id, copy_of.modules())) if copy_of is not None else frozenset()
    recorder = Recorder(model, (args, kwargs), strangers, watch, change or {})
    try:
        with (
            as_seeded(model, seed, recorder.enter, recorder.leave),
            values_told(recorder.tell),
            marker.observed(recorder.mark),
            chance_told(recorder.tell_chance),
            recorder,
        ):
            model(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        raise _explained(model, example_inputs, error) from error
    return recorder.finish()


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


# -- tensors


def _is_trained(tensor: Tensor) -> bool:
    """A tensor that gets a gradient of its own, or a view of one."""
    whole = tensor if tensor._base is None else tensor._base
    return whole.is_leaf and tensor.requires_grad and torch.is_grad_enabled()


def _has_mask(tensors: list[Tensor]) -> bool:
    return any(tensor.dtype == torch.bool for tensor in tensors)


def _chooses(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _support(gradient: Tensor | None) -> str:
    """A name for the elements that have a gradient; empty where all have one, or none is known."""
    mask = (gradient != 0).flatten() if gradient is not None and not gradient.is_meta else torch.ones(1)
    if bool(mask.all()) or not bool(mask.any()):
        return ""
    return hashlib.blake2b(mask.cpu().numpy().tobytes(), digest_size=6).hexdigest()


def _argument(position: int | str, args: Any, kwargs: Any) -> Any:
    if isinstance(position, int):
        return args[position] if position < len(args) else None
    return kwargs.get(position)


def _contracted(call: Call) -> int:
    """The numbers that a product of matrices sums over."""
    first = call.inputs[0] if "attention" in call.op.name or len(call.inputs) == 1 else call.inputs[-2]
    return first.shape[-1] if first.ndim else 1


# -- frames


def _in_function() -> bool:
    """The forward is that of an autograd.Function, such as a reversible layer or a checkpoint."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename == torch.autograd.function.__file__:
            return True
        frame = frame.f_back
    return False
