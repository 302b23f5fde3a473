"""A model that is named on the command line, rewritten."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from looptransfer.command.targets import load_target
from looptransfer.errors import InputError, ScalingWarning
from looptransfer.rewrite.parametrize import parametrize
from looptransfer.rewrite.plan import ScalingPlan
from looptransfer.user_code import calls_back

DTYPES = {"float": torch.float32, "long": torch.long, "bool": torch.bool}
FORMS = "float:2x16x32, long:2x16, bool:2x16 or a number; NAME=… for a keyword argument"


def rewritten(target: str, inputs: Sequence[str] = (), **settings: Any) -> tuple[nn.Module, ScalingPlan]:
    """The model that `target`, "package.module:factory" or "path/to/file.py:factory", makes, rewritten; and its plan.

    The factory takes no arguments and returns a model, or a model and example inputs; a model will do as well. `inputs`
    describe the example inputs, see `FORMS`; tensors of kind long hold zeros and ones, which fit any vocabulary.
    `settings` are those of `parametrize`.

    Raises:
        InputError: the target cannot be imported or makes no model, or the inputs are not understood; and all that
            `parametrize` refuses.
    """
    model, example = _make(target)
    if inputs:
        example = parse_inputs(inputs)
    if example is None:
        raise InputError(f"{target} gives no example inputs; return (model, inputs) from it, or give --inputs: {FORMS}")
    with calls_back(f"the rewriting of {target} fails"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ScalingWarning)  # the plan shows them
        return model, parametrize(model, example, **settings)


def parse_inputs(texts: Sequence[str]) -> Any:
    """Example inputs from texts such as "long:2x16" or "loops=4": a tuple, or a dict where they have names.

    Raises:
        InputError: a text is not understood, or some have names and some have not.
    """
    parsed = [_parse_input(text) for text in texts]
    named = [name for name, _ in parsed if name]
    if named and len(named) != len(parsed):
        raise InputError(f"--inputs {' '.join(texts)}: give either all of them a name (NAME=…) or none")
    return dict(parsed) if named else tuple(value for _, value in parsed)


def _parse_input(text: str) -> tuple[str, Any]:
    match = re.fullmatch(r"(?:(\w+)=)?(?:(float|long|bool):(\d+(?:x\d+)*)|(-?\d+)|(-?\d*\.\d+))", text)
    if match is None:
        raise InputError(f"--inputs {text!r} is not understood; write {FORMS}")
    name, kind, shape, whole, decimal = match.groups()
    if kind is None:
        return name or "", int(whole) if whole else float(decimal)
    size = [int(n) for n in shape.split("x")]
    generator = torch.Generator().manual_seed(0)
    if kind == "float":
        return name or "", torch.randn(size, generator=generator)
    return name or "", torch.randint(2, size, generator=generator).to(DTYPES[kind])


def _make(target: str) -> tuple[nn.Module, Any]:
    product = load_target(target, nn.Module, "factory")
    model, example = product if isinstance(product, tuple) and len(product) == 2 else (product, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{target}() returns a {type(model).__name__}; it must return a model, or (model, inputs)")
    return model, example
