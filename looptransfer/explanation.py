"""A table of what every tensor of a model gets from its optimizer, and by which rule."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from looptransfer.errors import InputError
from looptransfer.optim import Group, TensorFactors, strange_groups, tensors_in
from looptransfer.rewrite.plan import planned
from looptransfer.rules import Family, Rule, depth_exponents
from looptransfer.text import text_table

if TYPE_CHECKING:
    import pandas as pd

PAPER = "arXiv 2606.18524, Table 1"
SOURCES: dict[Rule, str] = {"factored": PAPER, "completep": "arXiv 2505.01618, Table 1", "sqrt": PAPER}  # of AdamW's
OURS = "our extension"
POWERS = {-1.0: " / m_L", -0.5: " × m_L^(−1/2)", 0.0: " as it is", 1.0: " × m_L"}


@dataclass(frozen=True)
class TensorExplanation:
    """The settings of one parameter, and the factors that made them."""

    parameter: str
    shape: tuple[int, ...]
    role: str
    family: str  # of the optimizer that takes it
    loops: float  # the factor on the LR for acting on the stream again and again
    layers: float  # that for depth
    width: float  # that for width
    ratio: float  # the user's own, by role
    lr: float  # effective, absolute
    eps: float | None  # None where the optimizer has none, or keeps its own
    weight_decay: float
    rule: str
    source: str


@dataclass(frozen=True)
class Explanation:
    """A row per trained parameter. `print(explanation)` shows a table, `explanation.frame` is one of pandas."""

    rows: tuple[TensorExplanation, ...]

    @property
    def frame(self) -> "pd.DataFrame":
        """The rows as a table, with a column for each field of `TensorExplanation`."""
        import pandas as pd  # noqa: PLC0415  for those who only print, nothing to load

        return pd.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        rules = list(dict.fromkeys((row.rule, row.source) for row in self.rows))
        table = [_cells(row, rules.index((row.rule, row.source)) + 1) for row in self.rows]
        notes = [f"{number}  {rule} ({source})" for number, (rule, source) in enumerate(rules, 1)]
        return "\n".join([*text_table(table), "", *notes])


def explain(
    model: nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer | Mapping[str, Any]]
) -> Explanation:
    """Role, factors, effective LR, eps and weight decay of every trained parameter, with the rule and its source.

    Args:
        model: rewritten by `parametrize`.
        optimizer: made of `param_groups`; several where Muon and AdamW share the model; or the groups themselves.

    Raises:
        InputError: the model was not rewritten, or a group was not made by `param_groups`.
    """
    _, plan = planned(model)
    groups = list(_groups(optimizer))
    for problem in strange_groups(groups):
        raise InputError(problem)
    rows = {tensor.name: _explained(tensor, group, plan.rule) for group, tensor in tensors_in(model, groups)}
    order = [name for name, _ in model.named_parameters()]
    return Explanation(tuple(sorted(rows.values(), key=lambda row: _place(order, row.parameter))))


def _groups(optimizer: Any) -> Iterable[Group]:
    for item in optimizer if isinstance(optimizer, Sequence) else [optimizer]:
        if isinstance(item, dict):
            yield item
        elif hasattr(item, "param_groups"):
            yield from item.param_groups
        else:
            raise InputError(f"optimizer holds {item!r}; give optimizers, or groups of looptransfer.param_groups")


def _place(order: list[str], name: str) -> int:
    return next((n for n, other in enumerate(order) if other == name or other.endswith("." + name)), len(order))


def _explained(tensor: TensorFactors, group: Group, rule: Rule) -> TensorExplanation:
    meaning, source = _rule(tensor, rule)
    return TensorExplanation(
        parameter=tensor.name,
        shape=tuple(tensor.parameter.shape),
        role=tensor.role,
        family=group["family"],
        loops=1 / tensor.uses,
        layers=tensor.depth.lr,
        width=1 / tensor.width,
        ratio=group["lr_ratio"],
        lr=float(group["lr"]),
        eps=group.get("eps"),
        weight_decay=group["weight_decay"],
        rule=meaning,
        source=source,
    )


def _rule(tensor: TensorFactors, rule: Rule) -> tuple[str, str]:
    """The rule in words, and where it comes from."""
    meaning, source = "LR × 1: outside the branches", PAPER
    if tensor.role.startswith("branch") or tensor.role == "per-visit part":
        meaning, source = _by_layers(tensor.family, rule)
    elif tensor.role == "on stream" and tensor.uses > 1:
        meaning, source = "LR / n: acts on the stream n times a forward, which no ε controls", OURS
    if tensor.width != 1:
        meaning, source = f"{meaning}; LR by width as μP has it", f"{source}; arXiv 2203.03466, Table 8"
    return meaning, source


def _by_layers(family: Family, rule: Rule) -> tuple[str, str]:
    """The rule for a parameter of a branch."""
    if rule == "unscaled":
        return "LR × 1: no rule is applied", "the control"
    powers = depth_exponents(rule, family)
    eps = f", eps{POWERS[powers.eps]}" if family in {"adamw", "adam"} else ""
    meaning = f"LR{POWERS[powers.lr]}{eps}, decay{POWERS[powers.weight_decay]}: in a branch"
    meaning += ", whose gradient holds ε already" if family == "sgd" else ""
    return meaning, SOURCES[rule] if family == "adamw" else OURS


def _cells(row: TensorExplanation, rule: int) -> dict[str, str]:
    def factor(value: float) -> str:
        return "" if value == 1 else f"{value:.4g}"

    return {
        "parameter": row.parameter,
        "role": row.role,
        "optimizer": row.family,
        "loops ×": factor(row.loops),
        "layers ×": factor(row.layers),
        "width ×": factor(row.width),
        "own ×": factor(row.ratio),
        "LR": f"{row.lr:.4g}",
        "eps": "" if row.eps is None else f"{row.eps:.3g}",
        "decay": f"{row.weight_decay:.4g}",
        "rule": str(rule),
    }
