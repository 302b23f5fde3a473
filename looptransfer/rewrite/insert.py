"""Multipliers put into modules, and taken out again.

The module that hands over a branch gets a subclass of its own class whose call multiplies the branch. Bare forward
hooks would be shorter and wrong: TorchDynamo does not guard on them, so where an unhooked model of the same class was
compiled before, a hooked one runs unscaled without a word. It does guard on the class. What is multiplied is the result
of nn.Module's own call: with what hooks make of it, with a forward that was put on the instance, and before what a
__call__ of the class's own adds. Marks are multiplied where they run, so the class's methods open their scope too: a
user or a tool may go past the call, as `model.encode(x)` and torch.fx do.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from looptransfer.errors import InputError
from looptransfer.rewrite import marker
from looptransfer.rewrite.graph import Handle
from looptransfer.rewrite.names import module_of, plain_names

OUTPUTS = "_looptransfer_multipliers"  # on a branch's module: which output -> ε, as a tensor of no dimension
INPUTS = "_looptransfer_input_multipliers"  # on a read-out: 0, its first argument -> its factor over widths
MARKS = "_looptransfer_marks"  # on a module whose forward sets marks: which mark -> ε


def set_multiplier(model: nn.Module, handle: Handle, multiplier: float) -> None:
    """Multiply what `handle` names, from now on.

    ε is a tensor on the CPU, which combines with any device and dtype as a number does. A compiled model reads it when
    it runs, where a number would be compiled into it, so a new ε is written into the tensor that is there.
    """
    module = _scaled(model, handle.module)
    if handle.mark is not None:
        _write(module.__dict__[MARKS], handle.mark, multiplier)
    else:
        _write(module.__dict__[OUTPUTS], handle.output, multiplier)
        _leave_fused_path(model, handle.module)


def has_multiplier(model: nn.Module, handle: Handle, multiplier: float) -> bool:
    """What `handle` names is multiplied so."""
    module = plain_names(model).get(handle.module)
    if handle.mark is not None:
        return _holds(module, MARKS, handle.mark, multiplier)
    return _holds(module, OUTPUTS, handle.output, multiplier)


def set_input_multiplier(model: nn.Module, name: str, multiplier: float) -> None:
    """Multiply the first argument of a module, from now on."""
    _write(_scaled(model, name).__dict__[INPUTS], 0, multiplier)


def has_input_multiplier(module: nn.Module | None, multiplier: float) -> bool:
    """The first argument of the module is multiplied so."""
    return _holds(module, INPUTS, 0, multiplier)


def _holds(module: nn.Module | None, kind: str, key: Any, multiplier: float) -> bool:
    held = module.__dict__.get(kind, {}).get(key) if module is not None else None
    return held is not None and float(held) == multiplier


def _scaled(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, of a class that multiplies."""
    module = module_of(model, name)
    if OUTPUTS not in module.__dict__:
        try:
            module.__class__ = _scaled_class(type(module), is_parametrized(module))
        except TypeError as error:
            raise InputError(
                f"module {name} is a {type(module).__name__}, whose class cannot be extended ({error}); "
                "rewrite the model that it was made of, before it is wrapped"
            ) from error
        module.__dict__.update({OUTPUTS: {}, INPUTS: {}, MARKS: {}})
    return module


def _write(multipliers: dict[Any, Tensor], key: Any, multiplier: float) -> None:
    with torch.inference_mode(False), torch.no_grad():
        if key in multipliers:
            multipliers[key].fill_(multiplier)
        else:
            multipliers[key] = torch.tensor(multiplier, dtype=torch.float64, device="cpu")


def clear_multipliers(model: nn.Module) -> None:
    """Give every module its own class back; raises as `check_clearable`."""
    check_clearable(model)
    for module in _multiplied(model):
        del module.__dict__[OUTPUTS], module.__dict__[INPUTS], module.__dict__[MARKS]
        module.__class__ = _plain_classes[type(module)]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and FUSED in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(FUSED)


def check_clearable(model: nn.Module) -> None:
    """Refuse modules that cannot have their own class back.

    Raises:
        InputError: a module was wrapped by a class of its own, or compiled, since.
    """
    for module in _multiplied(model):
        if type(module) not in _plain_classes:
            raise InputError(
                f"a {type(module).__name__} was made of a rewritten module (FSDP does that); take the multipliers out "
                "before the model is wrapped"
            )
        if module._compiled_call_impl is not None:
            raise InputError(
                f"a {type(module).__name__} was compiled by its own compile(), and that call multiplies; take the "
                "multipliers out of a model before its modules are compiled"
            )


def _multiplied(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if OUTPUTS in module.__dict__]


FUSED = "_looptransfer_fused_activation"


def _leave_fused_path(model: nn.Module, name: str) -> None:
    """The fused path of torch's encoder layer in eval mode would pass the branch's module by."""
    modules, parts = plain_names(model), name.split(".")
    for end in range(len(parts)):
        layer = modules[".".join(parts[:end])]
        if isinstance(layer, nn.TransformerEncoderLayer) and FUSED not in layer.__dict__:
            layer.__dict__[FUSED] = layer.activation_relu_or_gelu
            layer.activation_relu_or_gelu = 0


_scaled_classes: dict[type[nn.Module], type[nn.Module]] = {}
_plain_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _scaled_class(cls: type[nn.Module], parametrized: bool = False) -> type[nn.Module]:
    """`cls` with a call that multiplies what the instance says. One class per class, shared by all.

    torch's parametrizations give an instance a class over its own, and go back to what that one is over: there the
    multiplier has to be.
    """
    if cls not in _scaled_classes and parametrized:
        body = {name: value for name, value in vars(cls).items() if name not in {"__dict__", "__weakref__"}}
        over = types.new_class(cls.__name__, (_scaled_class(cls.__bases__[0]),), {}, lambda space: space.update(body))
        _scaled_classes[cls], _plain_classes[over] = over, cls
    elif cls not in _scaled_classes:

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for multiplier in self.__dict__[INPUTS].values():
                args, kwargs = _multiply_first(args, kwargs, multiplier)
            marks = self.__dict__[MARKS]
            if not marks:
                output = cls._call_impl(self, *args, **kwargs)
            else:
                before = marker.enter_scope(marks)
                try:
                    output = cls._call_impl(self, *args, **kwargs)
                finally:
                    marker.leave_scope(before)
            for index, multiplier in self.__dict__[OUTPUTS].items():
                output = _multiply(output, index, multiplier)
            return output

        def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
            state = cast(tuple[Any, ...], cls.__reduce_ex__(self, protocol))[2:]
            return _rebuild, (cls,), *state

        body = {
            **{name: _in_scope(method) for name, method in _own_methods(cls).items()},
            "_call_impl": call,
            "__reduce_ex__": reduce,
            "__prepare_scriptable__": _refuse_script,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
        scaled = types.new_class(cls.__name__, (cls,), {}, lambda space: space.update(body))
        _scaled_classes[cls], _plain_classes[scaled] = scaled, cls
    return _scaled_classes[cls]


def _own_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods of a class that may set marks; torch's own do not, and Python calls those with underscores."""
    methods: dict[str, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != "torch":
            methods |= {name: value for name, value in vars(base).items() if not name.startswith("__")}
    return {name: value for name, value in methods.items() if isinstance(value, types.FunctionType)}


def _in_scope(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with the marks of its module, also where it is not the module's call that leads to it."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        marks = self.__dict__.get(MARKS)
        if not marks or marker.is_called():
            return method(self, *args, **kwargs)
        before = marker.enter_scope(marks, called=False)
        try:
            return method(self, *args, **kwargs)
        finally:
            marker.leave_scope(before)

    return run


def _refuse_script(module: nn.Module) -> nn.Module:
    """torch.jit.script compiles a module's forward, and what stands around its call is lost."""
    raise InputError(
        f"torch.jit.script would leave the multiplier of a {type(module).__name__} out; call looptransfer.fold(model) "
        "first, which puts it into the weights, and script then"
    )


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    """An empty scaled instance, for pickle and deepcopy: a class made at run time has no name to be found by."""
    return cls.__new__(_scaled_class(cls))


def _multiply_first(args: Any, kwargs: dict[str, Any], multiplier: Tensor) -> tuple[Any, dict[str, Any]]:
    if args:
        return (args[0] * multiplier, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, kwargs | {first: kwargs[first] * multiplier}


def _multiply(output: Any, index: int | str | None, multiplier: Tensor) -> Any:
    if index is None:
        return output * multiplier
    if isinstance(output, Mapping):
        output[index] = output[index] * multiplier  # type: ignore[index]
        return output
    parts = [part * multiplier if position == index else part for position, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
