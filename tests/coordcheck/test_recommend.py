import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.coordcheck.recommend import Recommendation
from tests.experiments import LoopedMLP, tiny_experiment


class Turning(LoopedMLP):
    """Each visit's branch is rotated into directions of its own: visits walk at random, though the weights are tied."""

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.loops):
            signs = torch.randint(2, stream.shape, generator=generator) * 2 - 1
            stream = stream + self.block(self.norm(stream)) * signs
        return self.head(stream)


def recommended(make: type[nn.Module]) -> Recommendation:
    check = lt.coord_check(tiny_experiment(make_model=make), [1, 2, 4, 8, 16, 32], steps=2, seeds=4)
    return check.recommend()


def test_full_alignment_asks_for_the_papers_rule() -> None:
    measured = recommended(LoopedMLP)
    assert measured.supports_paper
    assert measured.exponent == 1
    assert measured.at_init.estimate == pytest.approx(1, abs=0.1)


def test_visits_that_walk_at_random_do_not_support_it() -> None:
    measured = recommended(Turning)
    assert not measured.supports_paper
    assert measured.at_init.estimate == pytest.approx(0.5, abs=0.15)
    assert 0.5 <= measured.exponent < 0.9
    assert set(measured.evidence["moment"]) == {"init", "end"}


def test_it_reads_the_same_off_another_rule() -> None:
    check = lt.coord_check(tiny_experiment(), loops=[1, 2, 4, 8], rules=["sqrt"], steps=1)
    assert check.recommend().at_init.estimate == pytest.approx(1, abs=0.15)


def test_a_short_span_of_n_tells_nothing() -> None:
    check = lt.coord_check(tiny_experiment(), loops=[1, 2], steps=1, seeds=2)
    with pytest.raises(lt.InputError, match="span less than 2 doublings"):
        check.recommend()
