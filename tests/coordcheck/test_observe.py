import gc
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.coordcheck.observe import OUTPUT, POSITIONS, Observation, find_branches, observe
from looptransfer.coordcheck.statistics import Visit
from tests.experiments import LoopedMLP
from tests.models import (
    WIDTH,
    BranchFirstMLP,
    InjectedMLP,
    InPlaceMLP,
    Looped,
    ParallelBlock,
    ResidualMLP,
    TorchAddMLP,
    inputs,
)


def table(observation: Observation) -> dict[tuple[str, int, str], float]:
    return {(module, visit, statistic): value for module, visit, statistic, value in observation.values}


def rms(tensor: Tensor) -> float:
    return float(tensor.pow(2).mean().sqrt())


@pytest.mark.parametrize("spelling", [ResidualMLP, InPlaceMLP, TorchAddMLP, BranchFirstMLP])
@pytest.mark.parametrize("rewritten", [False, True])
def test_the_statistics_are_those_of_a_loop_written_by_hand(spelling: type[ResidualMLP], rewritten: bool) -> None:
    torch.manual_seed(0)
    model = spelling(loops=5).double()
    h = start = inputs(3, 4, WIDTH).double()
    epsilon = 1.0
    if rewritten:
        epsilon = lt.parametrize(model, h).branches[0].multiplier
    observation = observe(model, h, find_branches(model, h))
    seen, points = table(observation), [h]
    with torch.no_grad():
        for visit in range(1, 6):
            branch = model.f(h) if rewritten else epsilon * model.f(h)
            h = h + branch
            points.append(h)
            assert seen["f", visit, "branch_rms"] == pytest.approx(rms(branch), rel=1e-12)
            assert seen["f", visit, "stream_rms"] == pytest.approx(rms(h), rel=1e-12)
            assert seen["f", visit, "added_rms"] == pytest.approx(rms(h - start), rel=1e-12)
    assert seen[OUTPUT, 0, "output_rms"] == pytest.approx(rms(h), rel=1e-12)
    increments = torch.stack(points).diff(dim=0).flatten(1, 2)
    unit = increments / increments.norm(dim=-1, keepdim=True)
    expected = torch.einsum("npd,mpd->nm", unit, unit) / 12
    assert observation.cosines is not None
    assert torch.allclose(observation.cosines, expected, rtol=1e-10)


def test_what_reaches_the_stream_is_measured_whatever_the_plan_says() -> None:
    torch.manual_seed(0)
    model = ResidualMLP(loops=4).double()
    x = inputs(2, 3, 8).double() if WIDTH == 8 else inputs(2, 3, WIDTH).double()
    plain = table(observe(model, x, find_branches(model, x)))
    lt.parametrize(model, x)
    branches = find_branches(model, x)
    scaled = table(observe(model, x, branches))
    model.f.register_forward_hook(lambda module, args, out: 4 * out)
    lost = table(observe(model, x, branches))
    assert scaled["f", 1, "branch_rms"] == pytest.approx(plain["f", 1, "branch_rms"] / 4)
    assert lost["f", 1, "branch_rms"] == pytest.approx(plain["f", 1, "branch_rms"])


def test_a_factor_of_the_addition_belongs_to_the_branch() -> None:
    class Subtracting(ResidualMLP):
        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.loops):
                h = torch.add(h, self.f(h), alpha=3)
            return h

    torch.manual_seed(0)
    model = Subtracting(loops=2).double()
    h = inputs(2, 3, WIDTH).double()
    seen = table(observe(model, h, find_branches(model, h)))
    with torch.no_grad():
        assert seen["f", 1, "branch_rms"] == pytest.approx(3 * rms(model.f(h)))


def test_every_branch_of_a_block_has_its_own_visits() -> None:
    model = Looped([ParallelBlock(), ParallelBlock()], loops=3)
    x = inputs(2, 4, WIDTH).to(next(model.parameters()).dtype)
    branches = find_branches(model, x)
    assert [(branch.module, branch.visits) for branch in branches] == [
        (f"blocks.{i}.{name}", 3) for i in range(2) for name in ("attn", "mlp")
    ]
    seen = table(observe(model, x, branches))
    assert seen["blocks.1.attn", 3, "attention_logit_rms"] > 0


class OneSumBlock(ParallelBlock):
    """Attention and MLP in one sum, as in GPT-NeoX."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.n(x)) + self.mlp(self.n(x)) + x


def test_branches_in_one_sum_are_watched_as_one() -> None:
    torch.manual_seed(0)
    model = Looped([OneSumBlock()], loops=2).double()
    h = inputs(2, 4, WIDTH).double()
    epsilon = lt.parametrize(model, h).branches[0].multiplier
    branches = find_branches(model, h)
    assert [(branch.module, branch.visits, branch.multiplier) for branch in branches] == [("blocks.0.attn", 2, epsilon)]
    assert {name.split(".")[2] for name in branches[0].parameters} == {"n", "attn", "mlp"}
    seen, block = table(observe(model, h, branches)), model.blocks[0]
    with torch.no_grad():
        for visit in (1, 2):
            added = block.attn(block.n(h)) + block.mlp(block.n(h))
            h = h + added
            assert seen["blocks.0.attn", visit, "branch_rms"] == pytest.approx(rms(added), rel=1e-12)
            assert seen["blocks.0.attn", visit, "stream_rms"] == pytest.approx(rms(h), rel=1e-12)


def test_injected_input_is_no_branch() -> None:
    model = InjectedMLP(loops=3)
    x = inputs(2, 4, WIDTH).to(next(model.parameters()).dtype)
    assert [branch.module for branch in find_branches(model, x)] == ["f"]


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = LoopedMLP(3)
    model.block.insert(1, nn.Dropout(0.5))
    x = torch.randn(4, 4)
    branches = find_branches(model, x)
    before = torch.random.get_rng_state(), random.getstate()
    first, second = (observe(model, x, branches) for _ in range(2))
    assert first.values == second.values  # the same dropout masks in both
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_that_does_something_else_next_time_is_refused() -> None:
    model = LoopedMLP(3)
    x = torch.randn(4, 4)
    branches = find_branches(model, x)
    model.loops = 2
    with pytest.raises(lt.InputError, match=r"block was added 2 times and traced 3 times"):
        observe(model, x, branches)


def test_a_model_without_branches_is_refused() -> None:
    with pytest.raises(lt.InputError, match="no residual branch of the model is added by a plain addition"):
        find_branches(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))


def test_a_users_statistic_sees_every_visit() -> None:
    model, x = LoopedMLP(3), torch.randn(4, 4)

    def peak(visit: Visit) -> Tensor:
        return visit.branch.abs().max()

    seen = table(observe(model, x, find_branches(model, x), {"peak": peak}))
    assert [visit for _, visit, statistic in seen if statistic == "peak"] == [1, 2, 3]


def kept_numbers(loops: int, blocks: int) -> int:
    """Elements of all tensors that are alive when the last branch is added for the last time."""
    torch.manual_seed(0)
    model = Looped([ParallelBlock() for _ in range(blocks)], loops=loops)
    x = inputs(8, 16, WIDTH).to(next(model.parameters()).dtype)
    branches, counts = find_branches(model, x), []

    def alive(visit: Visit) -> float:
        if visit.module == branches[-1].module and visit.number == loops:
            gc.collect()
            counts.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, Tensor) and t.is_floating_point()))
        return 0.0

    observe(model, x, branches, {"alive": alive})
    return counts[0]


@pytest.mark.filterwarnings("ignore")
def test_memory_grows_neither_with_visits_nor_with_visits_times_branches() -> None:
    few_positions = POSITIONS * WIDTH + 10  # of the stream, once per loop
    for blocks in (1, 3):
        numbers = 10 * 2 * blocks  # a handful for every visit of every branch
        assert kept_numbers(33, blocks) - kept_numbers(3, blocks) <= 30 * (few_positions + numbers)


def test_nothing_looped_has_increments_of_its_layers() -> None:
    model = lt.LoopedDecoder(width=16, heads=2, layers=4, loops=1)
    x = torch.randint(256, (2, 8))
    observation = observe(model, x, find_branches(model, x))
    assert observation.cosines is not None
    assert observation.cosines.shape == (4, 4)


@pytest.mark.parametrize("make", [lambda: lt.LoopedDecoder(width=16, heads=2, loops=3).half().float()])
def test_logits_are_the_output(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randint(256, (2, 8))
    observation = observe(model, x, find_branches(model, x))
    assert observation.states[OUTPUT].shape == (2, 8, 256)
