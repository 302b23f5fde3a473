"""The search for the LR of one loop count, as a sampler for an Optuna study of one's own."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from looptransfer.checks import check_count
from looptransfer.errors import InputError
from looptransfer.trials.run import Run
from looptransfer.trials.search import ProxyOptimum, ProxySearch

CHOSEN = "looptransfer:run"  # system attribute of a trial: its LR and its seed
ENDED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


class LRSampler(BaseSampler):
    """Suggests `lr` and `seed` as `tune` chooses them, and stops the study when the optimum is found.

        def objective(trial):
            lr, seed = trial.suggest_float("lr", 1e-8, 100, log=True), trial.suggest_int("seed", 0, 3)
            return train(lr, seed)

        study = optuna.create_study(sampler=lt.LRSampler(seeds=4))
        study.optimize(objective, n_trials=1000)
        study.sampler.optimum(study).lr  # by all runs; study.best_params is the run of the lowest loss

    A trial that fails or is pruned, as one is whose loss is nan, counts as diverged.

    Args:
        seeds: how many, from 0, two at least; paired across LRs.

    Raises:
        InputError: fewer than two seeds; at a suggestion, a range of `lr` or `seed` that lacks what the search wants
            next, or another parameter.
    """

    def __init__(self, seeds: int = 4) -> None:
        check_count("seeds", seeds, 2)  # one cannot tell noise from an optimum
        self.search = ProxySearch(1, tuple(range(seeds)))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose a run that is neither finished nor being made; if there is none, one that is being made."""
        wanted, losses = self._wanted(study)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        taken = {_run_of(other) for other in running if other.number != trial.number}
        left = [run for run in wanted if run not in losses]
        run = next((run for run in left if run not in taken), (left or wanted)[0])
        study._storage.set_trial_system_attr(trial._trial_id, CHOSEN, [run.lr, run.seed])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name not in ("lr", "seed"):
            raise InputError(f"parameter {param_name!r} cannot be searched; LRSampler knows lr and seed alone")
        value = getattr(_run_of(trial), param_name)
        if not param_distribution._contains(value):
            raise InputError(f"the search wants {param_name} = {value:g}, outside of {param_distribution}; widen it")
        return value

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stop the study when all that the search wants is finished."""
        loss = _loss(study, state, values)
        wanted, losses = self._wanted(study, {_run_of(trial): loss})
        if all(run in losses for run in wanted):
            with contextlib.suppress(RuntimeError):  # it was asked by hand
                study.stop()

    def optimum(self, study: Study) -> ProxyOptimum | None:
        """The LR to use, by the trials so far; None where all diverged or there are none."""
        return self.search.optimum(_losses(study))

    def _wanted(self, study: Study, ended: dict[Run, float] | None = None) -> tuple[Sequence[Run], dict[Run, float]]:
        """The runs that are wanted, and the losses of those that are finished, the one just ended among them."""
        losses = _losses(study) | (ended or {})
        return self.search.wanted(losses), losses


def _losses(study: Study) -> dict[Run, float]:
    trials = [trial for trial in study.get_trials(deepcopy=False, states=ENDED) if CHOSEN in trial.system_attrs]
    return {_run_of(trial): _loss(study, trial.state, trial.values) for trial in trials}


def _run_of(trial: FrozenTrial) -> Run:
    lr, seed = trial.system_attrs.get(CHOSEN, (math.nan, -1))
    return Run("factored", 1, lr, seed)


def _loss(study: Study, state: TrialState, values: Sequence[float] | None) -> float:
    """The value of a trial, of which less is better."""
    if state != TrialState.COMPLETE or not values:
        return math.inf
    return -values[0] if study.direction == StudyDirection.MAXIMIZE else values[0]
