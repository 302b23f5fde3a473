"""Ordinary parameter groups for an ordinary optimizer, scaled as the model's plan says."""

import math
from typing import Any

import torch
from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.apply import planned
from looptransfer.rules import Family, depth_factors

FAMILIES: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.AdamW: "adamw",
    torch.optim.Adam: "adam",
    torch.optim.SGD: "sgd",
}


def param_groups(
    model: nn.Module,
    optimizer: type[torch.optim.Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> list[dict[str, Any]]:
    """Parameter groups of a rewritten model for `optimizer`, by the paper's table (arXiv 2606.18524, Table 1).

    Parameters of the residual branches, pre-norm gains included, get LR and Adam eps × m_L^(−1/2); embedding, final
    norm and head × 1. Norm gains and biases (one dimension or none) are not decayed. With μP (`mup.set_base_shapes` was
    called on the model) LR and decay are also divided and multiplied by the width multiplier, as `mup.MuAdamW`,
    `mup.MuAdam` and `mup.MuSGD` have it.

    Each group has a `name` and remembers its factor as `lr_scale`: a scheduler that sets LRs absolutely must multiply
    by it. Frozen parameters are left out.

    Args:
        model: rewritten by `parametrize`; a wrapper such as DDP or a compiled model will do.
        optimizer: the class, since it decides the factors: AdamW, Adam or SGD.
        lr: base LR, absolute.
        weight_decay: base weight decay, as that optimizer takes it.
        eps: base Adam eps; SGD has none.

    Raises:
        InputError: another optimizer, numbers out of range, or a model that was not rewritten.
    """
    family = FAMILIES.get(optimizer)
    if family is None:
        known = ", ".join(cls.__name__ for cls in FAMILIES)
        raise InputError(f"optimizer is {optimizer!r}; factors are known for torch.optim's {known}, given as a class")
    _check_settings(lr, eps, weight_decay)
    inner, plan = planned(model)
    factors = depth_factors(plan.rule, family, plan.layers, plan.base_layers)
    in_branches = {id(inner.get_parameter(name)) for branch in plan.branches for name in branch.parameters}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        branch, decayed, width = id(parameter) in in_branches, parameter.ndim >= 2, _width_multiplier(parameter, family)
        lr_scale = (factors.lr if branch else 1.0) / width
        label = ("branches" if branch else "outside") + ("" if decayed else ", no decay")
        label += "" if width == 1 else f", width × {width:g}"
        settings = {"name": label, "lr": lr * lr_scale, "lr_scale": lr_scale, "params": []}
        decay = weight_decay * (factors.weight_decay if branch else 1.0) * width
        settings["weight_decay"] = decay if decayed else 0.0
        if family != "sgd":
            settings["eps"] = eps * (factors.eps if branch else 1.0)
        groups.setdefault(label, settings)["params"].append(parameter)
    return list(groups.values())


def _check_settings(lr: float, eps: float, weight_decay: float) -> None:
    for name, value, least in (
        ("lr", lr, "above 0"),
        ("eps", eps, "above 0"),
        ("weight_decay", weight_decay, "from 0 up"),
    ):
        if (
            not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < 0
            or (value == 0 and name != "weight_decay")
        ):
            raise InputError(f"{name} is {value!r}; it must be a finite number {least}")


def _width_multiplier(parameter: nn.Parameter, family: Family) -> float:
    """μP's divisor of the LR (arXiv 2203.03466, Table 8, as `mup` applies it); 1 where mup set no shapes."""
    shape = getattr(parameter, "infshape", None)
    if shape is None:
        return 1.0
    if shape.ninf() == 2:
        return float(shape.fanin_fanout_mult_ratio() if family == "sgd" else shape.width_mult())
    return 1.0 / float(shape.width_mult()) if shape.ninf() == 1 and family == "sgd" else 1.0
