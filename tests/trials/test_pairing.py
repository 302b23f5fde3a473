import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.trials.pairing import LR, check_start
from looptransfer.trials.run import Trial
from tests.experiments import BATCH, FEATURES, WIDTH, LoopedMLP, TinyTask, samples, squared_error, tiny_experiment

HERE = r"\(.*test_pairing\.py, line \d+\)"
Batch = tuple[Any, Any]


def start(loops: tuple[int, ...] = (1, 2), seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Any:
    first = Trial("factored", 1, 1.0, 0, device="cpu", directory=Path("/there/is/none"))
    return check_start(tiny_experiment(**({"steps": 4} | changes)), first, loops, seeds)


def test_a_sound_experiment_gives_the_plan_of_every_n_and_leaves_the_random_states() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("error", lt.PairingWarning)
        starts = start((4, 1))
    assert {n: made.plan.loops for n, made in starts.items() if made.plan} == {1: 1, 4: 4}
    assert [made.plan.branches[0].multiplier for made in starts.values() if made.plan] == [1, 0.25]
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def stream(rng: Callable[[int], np.random.Generator]) -> Callable[[int], Iterator[Batch]]:
    def batches(seed: int) -> Iterator[Batch]:
        own = rng(seed)
        while True:
            yield samples(own, BATCH)

    return batches


def first_batch(seed: int) -> Iterator[Batch]:
    return itertools.repeat(samples(np.random.default_rng(seed), BATCH))


def from_the_global_state(seed: int) -> Iterator[Batch]:
    while True:
        yield torch.randn(BATCH, FEATURES), torch.randn(BATCH, 1)


class Dropped(LoopedMLP):
    """Draws random numbers as often as it loops."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + 0 * torch.rand(self.loops).sum())


class Shrinking(LoopedMLP):
    """No more than two loops."""

    def __init__(self, loops: int) -> None:
        super().__init__(min(loops, 2))


def of_one_seed(loops: int) -> nn.Module:
    torch.manual_seed(0)
    return LoopedMLP(loops)


def of_no_seed(loops: int) -> nn.Module:
    model = LoopedMLP(loops)
    generator = torch.Generator()
    generator.seed()
    nn.init.normal_(model.head.weight, generator=generator)
    return model


MODEL = LoopedMLP(2)


def cached(loops: int) -> nn.Module:
    MODEL.loops = loops
    return MODEL


def unrolled(loops: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), *(LoopedOnce() for _ in range(loops)), nn.Linear(8, 1))


class LoopedOnce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def deeper(loops: int) -> nn.Module:
    """Two blocks from N = 2 on."""
    return Twice(loops) if loops > 1 else LoopedMLP(1)


class Twice(LoopedMLP):
    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.more = LoopedOnce()

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = self.more(stream + self.block(self.norm(stream)))
        return self.head(stream)


def of_no_seed_and_silent(loops: int) -> nn.Module:
    """As above, behind a head of zeros: the initial loss does not tell."""
    model = of_no_seed(loops)
    generator = torch.Generator()
    generator.seed()
    nn.init.normal_(model.get_submodule("embed").weight, generator=generator)  # type: ignore[arg-type]
    return silent(model)


def silent(model: nn.Module) -> nn.Module:
    for parameter in model.get_submodule("head").parameters():
        nn.init.zeros_(parameter)
    return model


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Noise from a generator that nobody seeds."""
    generator = torch.Generator()
    generator.seed()
    return squared_error(outputs, targets + torch.randn(targets.shape, generator=generator))


def held_out(count: int, rng: Any) -> Callable[[], list[Batch]]:
    return lambda: [samples(rng, 16) for _ in range(count)]


SHARED = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"batches": stream(lambda seed: np.random.default_rng())},
            "gives another batch 0 at its second",
        ),
        (
            {"batches": from_the_global_state, "make_model": Dropped},
            r"batches\(0\) gives another batch 1 at N = 2 than at N = 1",
        ),
        (
            {"batches": first_batch, "make_model": of_one_seed, "steps": 2} | {"batches": lambda seed: first_batch(0)},
            "seeds 0 and 1 give the same batches and the same weights",
        ),
        ({"make_model": of_no_seed}, "make_model gives other weights at each call with the same seed"),
        ({"make_model": of_no_seed_and_silent}, "make_model gives other weights at each call with the same seed"),
        (
            {"loss": noisy, "make_model": lambda loops: LoopedMLP(loops + 0)},
            r"the same weights and batch give the losses [\d.]+ and [\d.]+",
        ),
        ({"make_model": cached}, r"make_model\(1\) gives the same weights at each call"),
        (
            {"make_model": Shrinking, "loops": (2, 4)},
            "the models at N = 2 and N = 4 loop equally often",
        ),
        (
            {"make_model": unrolled, "loops": (2,)},
            "the model at N = 2 applies no layer more than once",
        ),
        ({"make_model": deeper}, "N = 1 and N = 2 are not one parameterization: L 1 there, 2 here"),
        ({"held_out": held_out(2, SHARED)}, r"held_out\(\) gives another batch 0 at its second call"),
        (
            {"held_out": lambda: itertools.repeat(samples(np.random.default_rng(0), 2))},
            "gave 10000 batches",
        ),
        ({"batches": lambda seed: itertools.islice(TinyTask().batches(seed), 3)}, "ended after 3 of the 4 batches"),
        ({"loss": lambda o, y: squared_error(o, y) * torch.nan}, "the loss at initialisation is nan at N = 1, seed 0"),
        ({"loss": lambda o, y: squared_error(o, y).log() / 0}, "the loss at initialisation is -?inf"),
        (
            {"held_out": lambda: [(torch.full((2, FEATURES), torch.nan), torch.zeros(2, 1))]},
            "initialisation is nan at N = 1, seed 0, held out",
        ),
        ({"make_model": lambda loops: LoopedMLP(loops).requires_grad_(False)}, "no parameter that requires a gradient"),
    ],
)
def test_runs_that_would_not_be_what_they_are_called_are_refused_before_the_training(
    changes: dict[str, Any], said: str
) -> None:
    changes = dict(changes)
    loops = changes.pop("loops", (1, 2))
    with pytest.raises(lt.InputError, match=rf"{said}.*{HERE}"):
        start(loops, **changes)


def test_seeds_differ_by_their_weights_where_the_initial_loss_does_not_tell() -> None:
    with pytest.warns(lt.PairingWarning):
        start(make_model=lambda loops: silent(LoopedMLP(loops)), batches=lambda seed: first_batch(0))


def test_batches_that_are_the_same_for_every_seed_are_told() -> None:
    with pytest.warns(lt.PairingWarning, match=r"batches\(0\) and batches\(1\) are the same.*initialisation alone"):
        start(batches=lambda seed: first_batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", lt.PairingWarning)
        start(batches=lambda seed: first_batch(0), seeds=(0,))


@pytest.mark.parametrize("make_model", [LoopedMLP, Dropped])
def test_data_from_the_random_state_that_is_seeded_pair_where_the_model_draws_alike(make_model: Any) -> None:
    alike = make_model is LoopedMLP
    loops = (1, 2) if alike else (2,)
    start(loops, batches=from_the_global_state, make_model=make_model)


# -- the optimizer and the schedule


class TwoLayers(LoopedMLP):
    """Two tied blocks, so that LRs have factors."""

    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = stream + self.block(self.norm(stream))
            stream = stream + self.second(self.norm(stream))
        return self.head(stream)


def planned(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=lr))


def plain(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr)


def without_branches(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([group for group in lt.param_groups(model, "adamw", lr=lr) if group["lr"] == lr])


def of_one_lr(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return planned(model, 1e-3)


def by_hand(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    groups = [{"params": group["params"], "lr": group["lr"]} for group in lt.param_groups(model, "adamw", lr=lr)]
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (plain, "holds no lr_factor"),
        (without_branches, "in no group: never trained"),
        (of_one_lr, "the same settings for the LR 0.00390625 as for 0.0078125"),
    ],
)
def test_an_optimizer_of_ones_own_that_leaves_the_plan_is_warned_of(optimizer: Any, said: str) -> None:
    with pytest.warns(
        lt.ScalingWarning, match=rf"optimizer\(model, lr\) does not do what the plan says {HERE}: .*{said}"
    ):
        start(make_model=TwoLayers, optimizer=optimizer)


@pytest.mark.parametrize(
    ("make_model", "optimizer"),
    [(TwoLayers, planned), (TwoLayers, by_hand), (LoopedMLP, plain), (LoopedMLP, lambda model, lr: [plain(model, lr)])],
)
def test_an_optimizer_of_ones_own_that_follows_the_plan_is_not(make_model: Any, optimizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(make_model=make_model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (lambda step, steps: 0.0, r"schedule\(step, 4\) gives 0 at every step"),
        (lambda step, steps: 1.0 - step, r"schedule\(2, 4\) gives -1"),
        (lambda step, steps: float("nan"), r"schedule\(0, 4\) gives nan"),
        (lambda step, steps: 1 / (step - 3), r"schedule\(3, 4\) fails: ZeroDivisionError|gives -0.333333"),
    ],
)
def test_a_schedule_of_shares_that_are_none_is_refused(schedule: Any, said: str) -> None:
    with pytest.raises(lt.InputError, match=rf"{said}.*test_pairing\.py, line"):
        start(schedule=schedule)


def with_betas(model: nn.Module, lr: float, second: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lt.param_groups(model, "adamw", lr=lr), betas=(0.9, second))


def falling(step: int, steps: int, power: float) -> float:
    return float((1 - step / steps) ** power)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"optimizer": functools.partial(with_betas, second=beta)} for beta in (0.999, 0.9)], "optimizer's settings"),
        ([{"schedule": functools.partial(falling, power=power)} for power in (1.0, 3.0)], "the schedule"),
    ],
)
def test_a_ledger_refuses_another_optimizer_or_schedule_of_the_same_name(
    tmp_path: Path, changes: list[Any], said: str
) -> None:
    same = functools.partial(lt.sweep, loops=[1], lrs=[LR], seeds=2, ledger=tmp_path / "l.db", workers=1)
    same(tiny_experiment(steps=4, **changes[0]))
    assert len(same(tiny_experiment(steps=4, **changes[0]))) == 2
    with pytest.raises(lt.InputError, match=rf"another experiment \(.*{said} at N = 1"):
        same(tiny_experiment(steps=4, **changes[1]))
