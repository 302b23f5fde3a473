"""The table of operators against numbers: what a row says of an operator is so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from looptransfer.rewrite.ops import LINEAR_IN_WEIGHTS, RELATIONS, ROWS, operator

aten = torch.ops.aten
SEEDS = st.integers(0, 2**31)
LONG = torch.tensor([2, 0, 1])
MASK = torch.tensor([[True, False, True, False]] * 3)
SAME = torch.tensor([[2, 0, 1, 1], [0, 0, 1, 2], [1, 2, 0, 0]])
# Each operator on matrices of 3 x 4 and 4 x 3 (a, b like a; m like a transposed; v a vector of 4).
A, M = (3, 4), (4, 3)
Call = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]  # of tensors of these shapes
CALLS: dict[str, Call] = {
    # same
    "_to_copy": (lambda a: aten._to_copy(a, dtype=torch.float64), (A,)),
    "clone": (aten.clone, (A,)),
    "native_dropout": (lambda a: aten.native_dropout(a, 0.5, True)[0] / 2, (A,)),
    "_unsafe_view": (lambda a: aten._unsafe_view(a, (4, 3)), (A,)),
    "lift_fresh_copy": (aten.lift_fresh_copy, (A,)),
    "alias_copy": (aten.alias_copy, (A,)),
    # moved
    "embedding": (lambda a: aten.embedding(a, LONG), (A,)),
    "index": (lambda a: aten.index(a, [LONG]), (A,)),
    "gather": (lambda a: aten.gather(a, 0, SAME), (A,)),
    "index_select": (lambda a: aten.index_select(a, 0, LONG), (A,)),
    "flip": (lambda a: aten.flip(a, [0]), (A,)),
    "roll": (lambda a: aten.roll(a, [1], [0]), (A,)),
    "repeat": (lambda a: aten.repeat(a, [2, 1]), (A,)),
    "constant_pad_nd": (lambda a: aten.constant_pad_nd(a, [1, 1]), (A,)),
    "take": (lambda a: aten.take(a, LONG), (A,)),
    "masked_select": (lambda a: aten.masked_select(a, MASK), (A,)),
    "squeeze_copy": (lambda a: aten.squeeze_copy(a[None]), (A,)),
    "permute_copy": (lambda a: aten.permute_copy(a, [1, 0]), (A,)),
    "select_copy": (lambda a: aten.select_copy(a, 0, 1), (A,)),
    "slice_copy": (lambda a: aten.slice_copy(a, 0, 1), (A,)),
    # side by side
    "cat": (lambda a, b: aten.cat([a, b]), (A, A)),
    "stack": (lambda a, b: aten.stack([a, b]), (A, A)),
    "index_put": (lambda a, b: aten.index_put(a, [LONG], b), (A, A)),
    "_index_put_impl": (lambda a, b: aten._index_put_impl(a, [LONG], b), (A, A)),
    "index_copy": (lambda a, b: aten.index_copy(a, 0, LONG, b), (A, A)),
    "scatter": (lambda a, b: aten.scatter(a, 0, SAME, b), (A, A)),
    "slice_scatter": (lambda a, b: aten.slice_scatter(a, b[:1], 0, 1, 2), (A, A)),
    "select_scatter": (lambda a, b: aten.select_scatter(a, b[0], 0, 1), (A, A)),
    "where": (lambda a, b: aten.where(MASK, a, b), (A, A)),
    "copy": (aten.copy, (A, A)),
    "masked_scatter": (lambda a, b: aten.masked_scatter(a, MASK, b), (A, A)),
    # sum, product
    "add": (aten.add, (A, A)),
    "sub": (aten.sub, (A, A)),
    "mul": (aten.mul, (A, A)),
    "div": (aten.div, (A, A)),
    "mm": (aten.mm, (A, M)),
    "bmm": (aten.bmm, ((2, *A), (2, *M))),
    "mv": (aten.mv, (A, (4,))),
    "dot": (aten.dot, ((4,), (4,))),
    "convolution": (
        lambda a, w: aten.convolution(a, w, None, [1], [0], [1], False, [0], 1),
        ((2, 3, 5), (4, 3, 2)),
    ),
    # onto
    "addmm": (aten.addmm, ((3, 3), A, M)),
    "baddbmm": (aten.baddbmm, ((2, 3, 3), (2, *A), (2, *M))),
    "addbmm": (aten.addbmm, ((3, 3), (2, *A), (2, *M))),
    "addmv": (aten.addmv, ((3,), A, (4,))),
    "addcmul": (aten.addcmul, (A, A, A)),
    "addcdiv": (aten.addcdiv, (A, A, A)),
    "index_add": (lambda a, b: aten.index_add(a, 0, LONG, b), (A, A)),
    "scatter_add": (lambda a, b: aten.scatter_add(a, 0, SAME, b), (A, A)),
    "lerp": (lambda a, b: aten.lerp(a, a + b, 0.5), (A, A)),
    # norm
    "native_layer_norm": (lambda a: aten.native_layer_norm(a, [4], None, None, 0.0)[0], (A,)),
    "native_group_norm": (lambda a: aten.native_group_norm(a[None], None, None, 1, 3, 4, 1, 0.0)[0], (A,)),
    "native_batch_norm": (lambda a: aten.native_batch_norm(a, None, None, None, None, True, 0.1, 0.0)[0], (A,)),
    "_native_batch_norm_legit": (lambda a: aten._native_batch_norm_legit(a, None, None, True, 0.1, 0.0)[0], (A,)),
    "_fused_rms_norm": (lambda a: aten._fused_rms_norm(a, [4], None, 0.0)[0], (A,)),
    "rsqrt": (lambda a: aten.rsqrt(a.abs()), (A,)),
    "sqrt": (lambda a: aten.sqrt(a.abs()), (A,)),
    "var": (lambda a: aten.var(a, [1]), (A,)),
    "std": (lambda a: aten.std(a, [1]), (A,)),
    "var_mean": (lambda a: aten.var_mean(a, [1])[0], (A,)),
    "linalg_vector_norm": (lambda a: aten.linalg_vector_norm(a, 2, [1]), (A,)),
    # blank
    "zero": (aten.zero, (A,)),
    "fill": (lambda a: aten.fill(a, 3.0), (A,)),
}
ELSEWHERE = {"cudnn_batch_norm"}  # runs on a GPU only


def drawn(name: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in CALLS[name][1]]


def result(name: str, *args: Tensor) -> Tensor:
    torch.manual_seed(0)
    out: Tensor = CALLS[name][0](*args)
    return out


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def of(*relations: str) -> Any:
    names = [name for name, relation in RELATIONS.items() if relation in relations and name not in ELSEWHERE]
    return pytest.mark.parametrize("name", names)


each_draw = settings(max_examples=5, deadline=None)


def test_every_row_is_tried() -> None:
    assert set(RELATIONS) == set(CALLS) | ELSEWHERE
    assert sum(len(names.split()) for names in ROWS.values()) == len(RELATIONS)  # no name has two rows


@of("same", "moved", "side by side")
@given(seed=SEEDS)
@each_draw
def test_what_moves_or_drops_elements_makes_no_new_ones(name: str, seed: int) -> None:
    args = drawn(name, seed)
    old = torch.cat([torch.zeros(1, dtype=torch.float64), *(arg.flatten() for arg in args)])
    assert torch.isin(result(name, *args), old).all()


@of("sum")
@given(seed=SEEDS)
@each_draw
def test_a_sum_is_additive_in_both(name: str, seed: int) -> None:
    a, b = drawn(name, seed)
    sign = 1 if name == "add" else -1
    close(result(name, a, b), a + sign * b)


@of("product")
@given(seed=SEEDS)
@each_draw
def test_a_product_doubles_with_its_first_argument_and_vanishes_with_it(name: str, seed: int) -> None:
    a, b = drawn(name, seed)
    close(result(name, 2 * a, b), 2 * result(name, a, b))
    close(result(name, a, 2 * b), result(name, a, b) * (0.5 if name == "div" else 2))
    assert not result(name, torch.zeros_like(a), b).any()


@of("onto")
@given(seed=SEEDS)
@each_draw
def test_onto_adds_to_the_first_argument_what_doubles_with_another(name: str, seed: int) -> None:
    first, *others = drawn(name, seed)
    added = result(name, first, *others) - first
    close(result(name, 3 * first, *others) - 3 * first, added)
    close(result(name, first, 2 * others[0], *others[1:]) - first, 2 * added)


@of("norm")
@given(seed=SEEDS)
@each_draw
def test_a_norm_or_a_step_of_one_scales_with_a_power_of_its_argument(name: str, seed: int) -> None:
    power = {"rsqrt": -0.5, "sqrt": 0.5, "var": 2, "var_mean": 2, "std": 1, "linalg_vector_norm": 1}.get(name, 0)
    (a,) = drawn(name, seed)
    close(result(name, 2 * a), result(name, a) * 2**power)


@of("blank")
def test_a_blank_holds_nothing_of_its_argument(name: str) -> None:
    (a,) = drawn(name, 0)
    assert torch.equal(result(name, a), result(name, 7 * a + 1))


WEIGHTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # data of 3 x 4, weights of 4 x 4
    "addmm": lambda x, w: aten.addmm(w[0], x, w),
    "mm": aten.mm,
    "bmm": lambda x, w: aten.bmm(x[None], w[None]),
    "mul": lambda x, w: aten.mul(x, w[0]),
    "add": lambda x, w: aten.add(w[0], 2 * w[1]),
    "convolution": lambda x, w: aten.convolution(x[None], w[:, :3, None], w[0], [1], [0], [1], False, [0], 1),
    "baddbmm": lambda x, w: aten.baddbmm(w[None, :3], x[None], w[None]),
    "linear": aten.linear,
    "native_layer_norm": lambda x, w: aten.native_layer_norm(x, [4], w[0], w[1], 0.0)[0],
    "native_group_norm": lambda x, w: aten.native_group_norm(x[None], w[0, :3], w[1, :3], 1, 3, 4, 1, 0.0)[0],
    "native_batch_norm": lambda x, w: aten.native_batch_norm(x, w[0], w[1], None, None, True, 0.1, 0.0)[0],
    "_fused_rms_norm": lambda x, w: aten._fused_rms_norm(x, [4], w[0], 0.0)[0],
}


@pytest.mark.parametrize("name", sorted(LINEAR_IN_WEIGHTS))
@given(seed=SEEDS)
@each_draw
def test_what_is_linear_in_its_weights_doubles_with_them(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (3, 4))
    close(WEIGHTED[name](x, 2 * w), 2 * WEIGHTED[name](x, w))


def test_an_operator_tells_what_it_writes_and_what_it_draws() -> None:
    in_place, out = operator(aten.add_.Tensor), operator(aten.add.out)
    assert (in_place.name, in_place.writes, in_place.overwrites) == ("add", (0,), False)
    assert (out.writes, out.overwrites) == (("out",), True)
    assert operator(aten.index_put.default).accumulates == 3
    assert operator(aten.bernoulli.default).draws
    assert operator(aten._local_scalar_dense.default).tells
    assert operator(aten.view.default).view
    assert operator(aten.tanh_.default).pointwise
    assert not operator(aten.mm.default).passive
    assert operator(torch.ops.aten.scaled_dot_product_attention.default).relation == "product"
