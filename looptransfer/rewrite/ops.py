"""The relation of an operator's result to its arguments, by name.

torch's own tags tell which operators are pointwise, draw random numbers or reduce. The rows here are those that a plan
must know also without numbers (on the meta device), or whose constants it reads. An operator without a row is run
again on changed arguments where the answer matters: see `graph.Graph.scales_with`.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

# same: the first argument, recast or with some of it dropped. moved: elements of the first argument. side by side:
# elements of all arguments. sum, product: of two arguments. onto: the first argument plus something made of the others.
# norm: a norm or a step of one, which scales with a power of the argument. blank: shaped like an argument, and holding
# nothing of it.
Relation = Literal["same", "moved", "side by side", "sum", "product", "onto", "norm", "blank", ""]

ROWS: dict[Relation, str] = {
    "same": "_to_copy clone native_dropout _unsafe_view lift_fresh_copy alias_copy",
    "moved": "embedding index gather index_select flip roll repeat constant_pad_nd take masked_select squeeze_copy "
    "permute_copy select_copy slice_copy",
    "side by side": "cat stack index_put _index_put_impl index_copy scatter slice_scatter select_scatter where copy "
    "masked_scatter",
    "sum": "add sub",
    "product": "mul div mm bmm mv dot convolution",
    "onto": "addmm baddbmm addbmm addmv addcmul addcdiv index_add scatter_add lerp",
    "norm": "native_layer_norm native_group_norm native_batch_norm _fused_rms_norm _native_batch_norm_legit "
    "cudnn_batch_norm rsqrt sqrt var std var_mean linalg_vector_norm",
    "blank": "zero fill",
}
RELATIONS: dict[str, Relation] = {name: relation for relation, names in ROWS.items() for name in names.split()}
# The result is proportional to the learned tensors that enter, weight and bias together.
LINEAR_IN_WEIGHTS = frozenset(
    {
        *("addmm", "mm", "bmm", "mul", "convolution", "add", "baddbmm", "linear"),
        *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm"),
    }
)
# A learned tensor that enters beside data is a table, a bias or a gate there, and no matrix.
MOVERS: frozenset[Relation] = frozenset({"same", "moved", "side by side", "sum"})


@dataclass(frozen=True)
class Operator:
    """All that can be told of an operator before it runs."""

    name: str  # without overload and trailing underscore
    relation: Relation
    pointwise: bool
    reduces: bool  # a sum or a mean, or another reduction
    draws: bool  # random numbers
    tells: bool  # hands numbers, or how many there are, to Python, which may steer by them
    view: bool  # the result is a part of the argument's memory, and nothing is written
    foreign: bool  # not one of torch's own
    passive: bool  # see MOVERS
    writes: tuple[int | str, ...]  # the arguments written to: by position, or by name where keyword-only
    overwrites: bool  # what it writes to is not read
    accumulates: int | None = None  # the argument that tells whether it adds to what is there


def _unknown(name: str = "", relation: Relation = "") -> Operator:
    return Operator(name, relation, False, False, False, False, False, False, False, (), False)


GIVEN = _unknown()  # it was there before the forward
GATHERED = _unknown("gather", "side by side")  # a memory whose parts were written one by one, read as a whole


@functools.cache
def operator(func: Any) -> Operator:
    """The row of an OpOverload."""
    name = str(func).split(".")[1].rstrip("_")
    schema = func._schema
    writing = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    aliases = [value.alias_info for value in schema.returns if value.alias_info is not None]
    foreign = func.namespace not in {"aten", "prims", "prim"}
    tags, relation = _tags(func, name), _relation(name, foreign)
    pointwise = torch.Tag.pointwise in tags
    draws = torch.Tag.nondeterministic_seeded in tags
    return Operator(
        name=name,
        relation=relation,
        pointwise=pointwise,
        reduces=name in {"sum", "mean"} or getattr(torch.Tag, "reduction", None) in tags,
        draws=draws,
        tells=bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & tags),
        view=bool(aliases) and (not writing or torch.Tag.inplace_view in func.tags),
        foreign=foreign,
        passive=pointwise or relation in MOVERS,
        writes=tuple(a.name if a.kwarg_only else i for i, a in writing),
        accumulates=next((i for i, a in enumerate(schema.arguments) if a.name == "accumulate"), None),
        overwrites=relation == "blank" or name == "copy" or draws or any(a.kwarg_only for _, a in writing),
    )


def _relation(name: str, foreign: bool) -> Relation:
    if "attention" in name:
        return "product"
    if not foreign and (name.endswith("_like") or name.startswith("new_")):
        return "blank"
    return "" if foreign else RELATIONS.get(name, "")


def _tags(func: Any, name: str) -> set[Any]:
    """Those of all overloads: an in-place one may lack what its twin has."""
    packet = getattr(getattr(torch.ops, func.namespace), name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return {tag for overload in [func, *overloads] for tag in overload.tags}
