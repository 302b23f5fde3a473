"""A plan in the files that `save_pretrained` writes, as Hugging Face's models do, and read from them.

The plan goes into config.json, which is all that `from_pretrained` keeps of such a folder beside the weights. The
config of a live model is left as it is: models that are made of one config share the object, and only one of them is
rewritten. A config says nothing to who loads a plain model, so the weights get one entry more, which that model does
not expect: transformers reports it by its name, and the name says what to do.
"""

import copy
import inspect
import json
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from looptransfer.errors import InputError
from looptransfer.rewrite.names import plain_names
from looptransfer.rewrite.plan import IN_CONFIG, ScalingPlan

MARK = "call_looptransfer_apply_plan"  # the entry of the weights: ε of every branch
SAVE, LOAD = "save_pretrained", "load_state_dict"


def carry(model: nn.Module, plan: ScalingPlan) -> None:
    """Let every part of `model` that has `save_pretrained` write its part of the plan too, from now on."""
    for name, module in plain_names(model).items():
        part = plan.part(name) if _writes_itself(module) else None
        if part is not None and part.branches:
            module.__dict__[SAVE] = partial(_save, module, part)
            module.__dict__[LOAD] = partial(_load, module)


def drop(model: nn.Module) -> None:
    """Undo `carry`."""
    for module in model.modules():
        if getattr(module.__dict__.get(SAVE), "func", None) is _save:
            del module.__dict__[SAVE], module.__dict__[LOAD]


def saved_plan(model: nn.Module) -> ScalingPlan:
    """The plan that came with the weights of `model`. A base model has its own part of what stands under its prefix.

    Raises:
        InputError: its config holds none, or one that cannot be read.
    """
    if not hasattr(config := getattr(model, "config", None), IN_CONFIG):
        raise InputError(
            "the model has no config that holds a plan, as from_pretrained reads it; give the plan: "
            "apply_plan(model, ScalingPlan.from_json(text))"
        )
    plan = ScalingPlan.from_json(json.dumps(getattr(config, IN_CONFIG)))
    return plan.part(prefix) if (prefix := _base_prefix(model, plan)) else plan


def forget_saved_plan(model: nn.Module) -> None:
    """Take the plan out of the config, once the model itself has one."""
    if hasattr(config := getattr(model, "config", None), IN_CONFIG):
        delattr(config, IN_CONFIG)


def _writes_itself(module: nn.Module) -> bool:
    save = getattr(type(module), SAVE, None)
    return save is not None and hasattr(module, "config") and "state_dict" in inspect.signature(save).parameters


def _base_prefix(model: nn.Module, plan: ScalingPlan) -> str:
    """The name that a model with a head gives to `model`, where the plan was made for such a one."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and not hasattr(model, prefix) and plan.part(prefix).branches else ""


def _save(
    module: Any,
    plan: ScalingPlan,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **settings: Any,
) -> Any:
    """`save_pretrained`, with the plan in the config and the mark in the weights."""
    multipliers = torch.tensor([branch.multiplier for branch in plan.branches], dtype=torch.float64)
    marked = {**(module.state_dict() if state_dict is None else state_dict), MARK: multipliers}
    setattr(module.config, IN_CONFIG, json.loads(_without_folders(plan)))
    try:
        return type(module).save_pretrained(module, save_directory, is_main_process, marked, **settings)
    finally:
        delattr(module.config, IN_CONFIG)


def _load(module: nn.Module, state_dict: dict[str, Any], *settings: Any, **named: Any) -> Any:
    """`load_state_dict`, which knows the mark."""
    plain = copy.copy(state_dict)  # with torch's notes on versions, which a new dict would lose
    plain.pop(MARK, None)
    return type(module).load_state_dict(module, plain, *settings, **named)


def _without_folders(plan: ScalingPlan) -> str:
    """The plan as JSON, whose sources are without the folders of this machine: a checkpoint may be published."""
    text = plan.to_json()
    sources = [branch.source for branch in plan.branches] + [left.source for left in plan.left_alone]
    for folder in sorted({os.path.join(os.path.dirname(source), "") for source in sources} - {""}, key=len)[::-1]:
        text = text.replace(json.dumps(folder, ensure_ascii=False)[1:-1], "")
    return text
