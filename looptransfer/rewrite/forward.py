"""One forward of a model as it is written: eager, from a seed, with all that it changes given back."""

import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from looptransfer.rewrite.twin import state_kept

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call on `example_inputs`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def copied_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same, with copies of all that can be copied."""
    args, kwargs = tree_map(_copied, call_arguments(example_inputs))
    return args, kwargs


def run(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """The tensors that a forward on a copy of `example_inputs` hands back."""
    args, kwargs = copied_arguments(example_inputs)
    return tensors_held(model(*args, **kwargs))


@contextmanager
def as_seeded(
    model: nn.Module, seed: int | None, enter: Callable[..., None], leave: Callable[..., None]
) -> Iterator[None]:
    """Run as written, with hooks around the calls of modules, and give random state and buffers back."""
    torch.clear_autocast_cache()  # casts of an earlier trace would be missing from this one
    with as_written(), state_kept(model), module_hooks(enter, leave):
        if seed is not None:
            seed_all(seed)
        yield


def seed_all(seed: int) -> None:
    """Set the random state of Python, numpy and torch."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


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


@contextmanager
def values_told(tell: Callable[[Tensor], None]) -> Iterator[None]:
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


@contextmanager
def chance_told(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` at the end where Python's or numpy's random numbers were drawn."""
    python_state, numpy_state = random.getstate(), _numpy_state()
    yield
    keys, position = _numpy_state()
    if python_state != random.getstate() or position != numpy_state[1] or not (keys == numpy_state[0]).all():
        tell()


def _numpy_state() -> tuple[Any, int]:
    state: Any = np.random.get_state()
    return state[1], state[2]


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a generator, a lock: what cannot be copied is shared
        return leaf


# -- tensors of arguments and results


def tensors_held(tree: Any) -> list[Tensor]:
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
