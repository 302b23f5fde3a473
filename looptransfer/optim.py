"""Ordinary parameter groups for an ordinary optimizer, scaled as the model's plan says."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from looptransfer.errors import InputError
from looptransfer.rewrite.names import module_of, named_parameters
from looptransfer.rewrite.plan import Branch, planned
from looptransfer.rules import DepthFactors, Family, depth_factors

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
    on_stream: Literal["scale", "leave"] = "scale",
) -> list[dict[str, Any]]:
    """Parameter groups of a rewritten model for `optimizer`, by the paper's table (arXiv 2606.18524, Table 1).

    Parameters of the residual branches, pre-norm gains included, get LR and Adam eps × m_L^(−1/2); embedding, final
    norm and head × 1. Norm gains and biases (one dimension or none) are not decayed. With μP (`mup.set_base_shapes` was
    called on the model) LR and decay are also divided and multiplied by the width multiplier, as `mup.MuAdamW`,
    `mup.MuAdam` and `mup.MuSGD` have it.

    Each group has a `name` and remembers its factor as `lr_factor`, a key that no scheduler acts on. Schedulers that
    multiply the LRs they find (torch's LambdaLR, CosineAnnealingLR with eta_min=0, timm's with lr_min=0) keep the ratio
    of the groups; one that sets LRs (OneCycleLR, a floor, `group["lr"] = …`) needs a number per group, or `set_lr`.
    Frozen parameters are left out.

    Args:
        model: rewritten by `parametrize`; a wrapper such as DDP or a compiled model will do.
        optimizer: the class, since it decides the factors: AdamW, Adam or SGD.
        lr: base LR, absolute.
        weight_decay: base weight decay, as that optimizer takes it.
        eps: base Adam eps; SGD has none.
        on_stream: what to do with parameters that act on the stream n times a forward outside every branch (gains of
            post-norms, adapters at the loop's entry; see `plan.on_stream`) and that ε does not control: "scale" their
            LR to LR/n, or "leave" it (our extension; by `benchmarks/on_stream.py` the change that a step makes to the
            output then stays the same over N where gains are on the stream, and grows as N^0.6 to N^0.8 if left).

    Raises:
        InputError: another optimizer or word for on_stream, numbers out of range, or a model that was not rewritten.
    """
    family = _family(optimizer)
    _check_settings(lr, eps, weight_decay)
    if on_stream not in {"leave", "scale"}:
        raise InputError(f"on_stream is {on_stream!r}; choose scale or leave")
    inner, plan = planned(model)
    factors = depth_factors(plan.rule, family, plan.layers, plan.base_layers)
    live = named_parameters(inner)
    in_branches = {id(parameter) for branch in plan.branches for parameter in _of_branch(inner, live, branch)}
    uses = {id(live[name]): n for name, n in plan.on_stream.items() if name in live} if on_stream == "scale" else {}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        branch, decayed, width = id(parameter) in in_branches, parameter.ndim >= 2, _width_multiplier(parameter, family)
        depth = factors if branch else DepthFactors(1.0, 1.0, 1.0)
        times = 1 if branch else uses.get(id(parameter), 1)
        label = _label(branch, decayed, times, width)
        lr_factor = depth.lr / (width * times)
        settings = {"name": label, "lr": lr * lr_factor, "lr_factor": lr_factor, "params": []}
        decay = weight_decay * depth.weight_decay * width
        settings["weight_decay"] = decay if decayed else 0.0
        if family != "sgd":
            settings["eps"] = eps * depth.eps
        groups.setdefault(label, settings)["params"].append(parameter)
    return list(groups.values())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the base LR of an optimizer over `param_groups`, each group's in its own proportion.

    For schedules by hand, `lt.set_lr(optimizer, schedule(step))`.

    Args:
        optimizer: made of groups of `param_groups`.
        lr: the base LR, absolute.

    Raises:
        InputError: a group that `param_groups` did not make, or an LR that is not a finite number from 0 up.
    """
    if not isinstance(lr, (int, float)) or not math.isfinite(lr) or lr < 0:
        raise InputError(f"lr is {lr!r}; it must be a finite number from 0 up")
    strange = [number for number, group in enumerate(optimizer.param_groups) if "lr_factor" not in group]
    if strange:
        raise InputError(
            f"group {strange[0]} of the optimizer holds no lr_factor: it was not made by looptransfer.param_groups, or "
            "its state was loaded from such an optimizer; make the optimizer of param_groups"
        )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # capturable: a compiled step reads it
            group["lr"].fill_(lr * group["lr_factor"])
        else:
            group["lr"] = lr * group["lr_factor"]


def _family(optimizer: type[torch.optim.Optimizer]) -> Family:
    family = FAMILIES.get(optimizer)
    if family is None:
        names = ", ".join(cls.__name__ for cls in FAMILIES)
        raise InputError(f"optimizer is {optimizer!r}; factors are known for torch.optim's {names}, given as a class")
    return family


def _label(branch: bool, decayed: bool, times: float, width: float) -> str:
    """A group's name: all that sets it apart from the others."""
    label = ("branches" if branch else "outside") + ("" if decayed else ", no decay")
    label += "" if times == 1 else f", on the stream {times:g}×"
    return label + ("" if width == 1 else f", width × {width:g}")


def _of_branch(inner: nn.Module, live: dict[str, nn.Parameter], branch: Branch) -> Iterator[nn.Parameter]:
    """The parameters of a branch; where a layer was wrapped since, as LoRA does, all of those in its place."""
    for name in branch.parameters:
        if name in live:
            yield live[name]
        else:
            yield from module_of(inner, name.rpartition(".")[0]).parameters()


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
