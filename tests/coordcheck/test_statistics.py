import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from looptransfer.coordcheck.statistics import (
    Step,
    attention_logit_rms,
    cosines,
    lost_to_eps,
    moved_rms,
    rms,
    rms_of,
    written_out_logit_rms,
)


@given(st.integers(1, 40), st.floats(1e-6, 1e6))
def test_rms_scales_with_its_tensor(count: int, factor: float) -> None:
    tensor = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    assert float(rms(factor * tensor)) == pytest.approx(factor * float(rms(tensor)), rel=1e-12)


def test_rms_of_half_precision_does_not_overflow() -> None:
    assert float(rms(torch.full((70_000,), 300.0, dtype=torch.float16))) == pytest.approx(300, rel=1e-3)


def test_rms_over_several_tensors_weighs_every_element_alike() -> None:
    tensors = [torch.ones(3, 2), torch.full((6,), 3.0)]
    assert float(rms_of(tensors)) == pytest.approx(math.sqrt(5))
    assert float(rms_of([])) == 0


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_logits_are_those_written_out(shared: int, scale: float | None) -> None:
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key = torch.randn(2, 4 // shared, 7, 8, dtype=torch.float64)
    factor = 8**-0.5 if scale is None else scale
    logits = query @ key.repeat_interleave(shared, dim=1).mT * factor
    assert float(attention_logit_rms(query, key, scale)) == pytest.approx(float(rms(logits)), rel=1e-12)


def test_masked_logits_do_not_count() -> None:
    logits = torch.tensor([[3.0, -math.inf], [3.0, 3.0]])
    assert float(written_out_logit_rms(logits)) == pytest.approx(3)


def test_cosines_are_averaged_over_positions() -> None:
    x, y = torch.eye(2, dtype=torch.float64)
    increments = torch.stack([torch.stack([x, y]), torch.stack([2 * x, 5 * x])])
    assert torch.allclose(cosines(increments), torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))


def test_rows_without_a_gradient_do_not_count_as_a_small_step() -> None:
    gradient = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    assert float(moved_rms(Step([gradient], [-0.1 * gradient.sign()]))) == pytest.approx(0.1)


def test_what_eps_takes_of_adams_first_step() -> None:
    gradient = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = []
    for eps in (1e-12, 1e-1):
        update = gradient / (gradient.abs() + eps)
        shares.append(float(lost_to_eps(Step([gradient], [update]))))
    assert shares[0] < 1e-6
    assert shares[1] > 0.1


def test_nothing_is_lost_where_nothing_moved() -> None:
    assert float(lost_to_eps(Step([torch.zeros(2, 2)], [torch.zeros(2, 2)]))) == 0
