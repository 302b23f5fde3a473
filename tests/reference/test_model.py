import pytest
import torch

import looptransfer as lt
from looptransfer.reference.model import rotary_table, rotate
from tests.models import decoder_oracle, inputs, noisy, small_decoder, tokens


@pytest.mark.parametrize(("prelude", "coda"), [(0, 0), (1, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize(("layers", "loops"), [(1, 1), (1, 3), (3, 2)])
def test_the_decoder_is_its_layers_in_turn(prelude: int, coda: int, layers: int, loops: int) -> None:
    model = noisy(small_decoder(layers, loops, prelude, coda))
    expected = decoder_oracle(model.state_dict(), tokens(), 2, loops, 1.0, 1.0)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-12, atol=1e-12)


def test_more_loops_add_no_parameters() -> None:
    few, many = small_decoder(2, 1), small_decoder(2, 9)
    assert {n: p.shape for n, p in few.named_parameters()} == {n: p.shape for n, p in many.named_parameters()}


def test_a_token_sees_only_itself_and_the_past() -> None:
    model, before = noisy(small_decoder()), tokens()
    after = before.clone()
    after[:, 3] = (after[:, 3] + 1) % 11
    same, changed = model(before), model(after)
    assert torch.equal(same[:, :3], changed[:, :3])
    assert (same[:, 3:] != changed[:, 3:]).any(-1).all()


def test_rotation_keeps_lengths_and_leaves_position_zero() -> None:
    x = inputs(2, 6, 8)
    turned = rotate(x, rotary_table(6, 8, like=x))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, 0], x[:, 0])
    assert (turned[:, 1:] != x[:, 1:]).all()


def test_rotated_products_depend_on_the_distance_alone() -> None:
    query, key = inputs(1, 8, seed=1), inputs(1, 8, seed=2)
    table = rotary_table(12, 8, like=query)
    q, k = rotate(query.expand(12, 8), table), rotate(key.expand(12, 8), table)
    scores = q @ k.T
    for distance in (1, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert abs(scores[0, 1] - scores[0, 4]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_come_in_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    logits = small_decoder().to(dtype)(tokens())
    assert logits.dtype == dtype
    assert logits.shape == (2, 5, 11)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied = lt.LoopedDecoder(vocab=11, width=8, heads=2)
    untied = lt.LoopedDecoder(vocab=11, width=8, heads=2, tied_head=False)
    assert tied.head.weight is tied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def test_matrices_start_small_and_gains_at_one() -> None:
    torch.manual_seed(0)
    model = lt.LoopedDecoder(width=64, heads=4, layers=2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize(("width", "heads"), [(8, 3), (10, 2), (12, 4)])
def test_a_width_without_even_heads_is_refused(width: int, heads: int) -> None:
    # 12 / 4 = 3 is whole but odd, and rotary positions pair the channels up.
    with pytest.raises(ValueError, match=rf"width {width} does not divide into {heads} heads of even size"):
        lt.LoopedDecoder(width=width, heads=heads)


@pytest.mark.parametrize("count", [{"layers": 0}, {"loops": 0}, {"prelude": -1}, {"coda": -1}])
def test_counts_below_their_least_are_refused(count: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="layers and loops start at 1, prelude and coda at 0"):
        lt.LoopedDecoder(**count)
