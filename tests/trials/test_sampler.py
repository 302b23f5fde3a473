import math
from collections import Counter
from pathlib import Path

import optuna
import pytest

import looptransfer as lt
from looptransfer.errors import InputError
from looptransfer.trials.run import Trial
from looptransfer.trials.search import ProxyOptimum
from tests.trainings import loss_of

optuna.logging.set_verbosity(optuna.logging.ERROR)


def objective(trial: optuna.Trial) -> float:
    lr, seed = trial.suggest_float("lr", 1e-8, 100, log=True), trial.suggest_int("seed", 0, 9)
    return loss_of(Trial("factored", 1, lr, seed, device="cpu", directory=Path()))


def searched(function: object = objective, seeds: int = 3, direction: str = "minimize", jobs: int = 1) -> optuna.Study:
    study = optuna.create_study(sampler=lt.LRSampler(seeds), direction=direction)
    study.optimize(function, n_trials=500, n_jobs=jobs, catch=(ArithmeticError,))  # type: ignore[arg-type]
    return study


def optimum_of(study: optuna.Study) -> ProxyOptimum:
    assert isinstance(study.sampler, lt.LRSampler)
    optimum = study.sampler.optimum(study)
    assert optimum is not None
    return optimum


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_study_ends_by_itself_with_the_optimum(jobs: int) -> None:
    study = searched(jobs=jobs)
    assert len(study.trials) <= 24
    assert math.log2(optimum_of(study).lr) == pytest.approx(-8, abs=0.3)


def test_more_is_better_where_the_study_says_so() -> None:
    study = searched(lambda trial: -objective(trial), direction="maximize")
    assert math.log2(optimum_of(study).lr) == pytest.approx(-8, abs=0.3)


def test_trials_that_fail_count_as_diverged_and_are_not_repeated() -> None:
    def failing(trial: optuna.Trial) -> float:
        loss = objective(trial)
        if trial.params["lr"] > 2.0**-7:
            raise ArithmeticError("too high")
        return math.nan if trial.params["lr"] > 2.0**-7.75 else loss

    study = searched(failing)
    runs = Counter((trial.params["lr"], trial.params["seed"]) for trial in study.trials)
    assert set(runs.values()) == {1}
    assert study.best_params["lr"] <= 2.0**-7.75


def test_trials_may_be_asked_for_by_hand() -> None:
    study = optuna.create_study(sampler=lt.LRSampler(2))
    trials = [study.ask() for _ in range(2)]
    losses = [objective(trial) for trial in trials]
    assert len({trial.params["lr"] for trial in trials}) == 2
    for trial, loss in zip(trials, losses, strict=True):
        study.tell(trial, loss)
    assert study.ask().suggest_float("lr", 1e-8, 100, log=True) not in {trial.params["lr"] for trial in trials}


def test_what_the_search_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="seeds is 1; it must be a whole number from 2 up"):
        lt.LRSampler(1)
    trial = optuna.create_study(sampler=lt.LRSampler()).ask()
    with pytest.raises(InputError, match="'width' cannot be searched; LRSampler knows lr and seed alone"):
        trial.suggest_int("width", 1, 10)
    with pytest.raises(InputError, match=r"the search wants lr = .*, outside of FloatDistribution.*; widen it"):
        trial.suggest_float("lr", 1, 2)
