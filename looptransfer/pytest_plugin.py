"""A pytest plugin, off unless used: the fixture `lr_transfer`, and --looptransfer-update.

    def test_the_lr_transfers(lr_transfer):
        results = lr_transfer.sweep(experiment, loops=[1, 2, 4, 8], around=0.01)
        lr_transfer.assert_flat(results)
        lr_transfer.assert_optimum(results, baseline="lr-optima.json")

    def test_the_optimum_is_still_bracketed(lr_transfer):
        lr_transfer.assert_bracketed(experiment, baseline="lr-optima.json")

    def test_the_stream_grows_as_promised(lr_transfer):
        lr_transfer.assert_coordinates(experiment, loops=[1, 2, 4, 8])

Nothing heavy is imported before the fixture is asked for something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import looptransfer as lt
from looptransfer.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from looptransfer.transfer.comparison import Comparison
    from looptransfer.trials.run import Trainable

UPDATE = "--looptransfer-update"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --looptransfer-update."""
    group = parser.getgroup("looptransfer")
    group.addoption(UPDATE, action="store_true", help="write the optima found into the baselines instead of comparing")


@pytest.fixture(scope="session")
def lr_transfer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "LRTransfer":
    """Sweeps, tables, and assertions on the LR optimum over N."""
    config = request.config
    kept = _kept_ledgers(config)
    return LRTransfer(config.rootpath, kept or tmp_path_factory.mktemp("looptransfer"), config.getoption(UPDATE))


def _kept_ledgers(config: pytest.Config) -> Path | None:
    """A folder of pytest's cache for runs of the commit that is checked out; None where files differ from it.

    Runs of other code must never be taken for runs of this one.
    """
    from looptransfer.transfer.provenance import code_version

    code = code_version(config.rootpath)
    if code is None or code.endswith("+changes") or not hasattr(config, "cache") or config.cache is None:
        return None
    return Path(config.cache.mkdir(f"looptransfer-{code}"))


@dataclass(frozen=True)
class LRTransfer:
    """The fixture `lr_transfer`. Relative paths start at pytest's root folder.

    Attributes:
        root: pytest's root folder.
        ledgers: where finished runs are kept: in pytest's cache while the working tree is that of a commit, so that a
            stopped session goes on where it was, else for this session only.
        update: --looptransfer-update was given.
    """

    root: Path
    ledgers: Path
    update: bool

    def load(self, source: str | Path, axis: str = "loops") -> "pd.DataFrame":
        """A table of runs, as `looptransfer.read_results` reads it."""
        path = self.root / source
        return lt.read_results(path if path.exists() else source, axis=axis)

    def sweep(self, train: Any, loops: Sequence[int], **options: Any) -> "pd.DataFrame":
        """Train, as `looptransfer.sweep` does; runs that another test made are not made again."""
        from looptransfer.trials.function import as_trainable

        trainable = as_trainable(train)
        results = lt.sweep(trainable, loops, ledger=self._ledger(trainable), **options)
        results.attrs["experiment"] = trainable.identity()
        return results

    def assert_flat(self, results: "pd.DataFrame", **terms: Any) -> "lt.Verdict":
        """Fail unless `looptransfer.check`, which takes the terms, says FLAT."""
        __tracebackhide__ = True
        verdict = lt.check(results, **terms)
        if verdict.answer != "FLAT":
            pytest.fail(f"the LR optimum is not flat over {verdict.axis_label}\n{verdict}", pytrace=False)
        return verdict

    def assert_optimum(
        self,
        results: "pd.DataFrame | lt.Verdict",
        baseline: str | Path = "lr-optima.json",
        moved: float = 0.5,
        **terms: Any,
    ) -> "Comparison | None":
        """Fail unless the optima are where the baseline has them, within `moved` octaves, and their loss is as good.

        With --looptransfer-update the baseline is written instead, and None returned.
        """
        __tracebackhide__ = True
        verdict = results if isinstance(results, lt.Verdict) else lt.check(results, **terms)
        path = self.root / baseline
        if self.update:
            lt.Baseline.of(verdict, path).write()
            return None
        comparison = _stored(path).compare(verdict, moved)
        if comparison.exit_status:
            pytest.fail(f"{comparison}\n\nthe runs now:\n{verdict}\n{FIX}", pytrace=False)
        return comparison

    def assert_bracketed(self, train: Any, baseline: str | Path = "lr-optima.json", **options: Any) -> "Comparison":
        """Fail unless `looptransfer.gate`, which takes the options, still brackets the stored optima."""
        __tracebackhide__ = True
        from looptransfer.trials.function import as_trainable

        stored, trainable = _stored(self.root / baseline), as_trainable(train)
        comparison = lt.gate(trainable, stored, ledger=self._ledger(trainable), **options)
        if comparison.exit_status:
            pytest.fail(f"{comparison}\n{FIX}", pytrace=False)
        return comparison

    def assert_coordinates(self, experiment: "lt.Experiment", *arguments: Any, **options: Any) -> "lt.CoordCheck":
        """Fail unless `looptransfer.coord_check`, which takes it all, finds every statistic as the rule promises."""
        __tracebackhide__ = True
        result = lt.coord_check(experiment, *arguments, **options)
        if not result.passed:
            pytest.fail(str(result), pytrace=False)
        return result

    def _ledger(self, trainable: "Trainable") -> Path:
        """The ledger of a training: it refuses runs of another."""
        from looptransfer.transfer.provenance import fingerprint

        return self.ledgers / f"{fingerprint(trainable.identity())}.db"


FIX = f"where this is meant, run a full sweep against the baseline with pytest {UPDATE}"


def _stored(path: Path) -> "lt.Baseline":
    try:
        return lt.Baseline.read(path)
    except InputError as error:
        raise InputError(f"{error} (in pytest: {UPDATE})") from None
