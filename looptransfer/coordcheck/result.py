"""The result of a coordinate check: findings against what the rule promises, in words and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from looptransfer.coordcheck.exponents import Array, exponent_table, fit_exponents, on_axis
from looptransfer.coordcheck.promises import Axis, Moment, Promise, Which
from looptransfer.coordcheck.recommend import CONFIDENCE, Recommendation, recommended
from looptransfer.errors import InputError
from looptransfer.rules import RULES, Rule
from looptransfer.text import text_table
from looptransfer.transfer.optimum import Interval, t_interval

SCHEMA_VERSION = 1
PER_VISIT = {"branch_rms", "added_rms", "stream_rms", "attention_logit_rms"}
PLAIN_FIRST = ["branch_rms", "step_ratio", "lost_to_eps", "update_rms", "added_rms", "stream_rms"]
OUTPUT, OUTSIDE, ON_STREAM = "output", "outside", "on stream"
EXIT_STATUS = {"PASSES": 0, "FAILS": 1, "INCONCLUSIVE": 3}

Answer = Literal["passes", "fails", "inconclusive"]


@dataclass(frozen=True)
class WatchedBranch:
    """A residual branch of the model with most loops: its module, the block that holds it, adds per forward."""

    module: str
    layer: str
    visits: int


@dataclass(frozen=True)
class Context:
    """The facts beside the frame. Branches stand in the order in which they are added."""

    branches: Sequence[WatchedBranch]
    base_layers: int = 1
    adam: bool = True
    width_scaled: bool = False  # μP sets LRs by width, so steps of different parameters differ
    rule_as_made: Rule = "factored"  # of the plan that a model had when it was made

    def held_to(self, rule: str) -> Rule:
        """The scaling rule whose promises count: a model as made is held to that of its plan."""
        return rule if rule in RULES else self.rule_as_made

    @property
    def looped(self) -> list[str]:
        """The branches that are visited more than once."""
        return [branch.module for branch in self.branches if branch.visits > 1]

    def members(self, where: str, present: Sequence[str]) -> list[tuple[str, list[str]]]:
        """The modules of the frame that a promise speaks of, each with those that it stands for.

        That is itself, or all of its kind taken together.
        """
        names = [branch.module for branch in self.branches]
        kinds = {
            "looped": self.looped,
            "once": [name for name in names if name not in self.looped],
            "final": names[-1:],
            "branches": names,
            "attention": [name for name in present if name not in {OUTPUT, OUTSIDE, ON_STREAM}],
        }
        kind = where.removeprefix("all ")
        chosen = [name for name in kinds.get(kind, [kind]) if name in set(present)]
        if kind == where:
            return [(name, [name]) for name in chosen]
        return [(where, chosen)] if chosen else []


@dataclass(frozen=True)
class Finding:
    """A statistic of a module: what was measured, what was promised, and what that says.

    `exponent` is that of the axis, or the value itself where `axis` is "level"; None where it is not finite.
    `p` is the corrected p-value of lying outside the promised range by more than the tolerance.
    """

    rule: str
    axis: str
    statistic: str
    module: str
    moment: str
    which: str
    exponent: Interval | None
    low: float
    high: float
    tolerance: float
    answer: Answer
    p: float
    reading: str

    @property
    def promised(self) -> str:
        """The range in short."""
        if math.isinf(self.low):
            return f"≤ {self.high:g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} … {self.high:g}"


@dataclass(frozen=True)
class CoordCheck:
    """The result. `frame` is tidy; `cosines` holds the matrix of increments, mean over seeds, by (rule, N, step)."""

    rule: str
    rules: tuple[str, ...]
    findings: tuple[Finding, ...]
    frame: pd.DataFrame = field(repr=False, compare=False)
    cosines: dict[tuple[str, int, int], Array] = field(repr=False, compare=False)
    context: Context
    tolerance: float
    level: float

    @property
    def judged(self) -> list[Finding]:
        """The findings of the rule that was asked for."""
        return [finding for finding in self.findings if finding.rule == self.rule]

    @property
    def failures(self) -> list[Finding]:
        """The findings that do not keep their promise."""
        return [finding for finding in self.judged if finding.answer == "fails"]

    @property
    def answer(self) -> str:
        """PASSES, FAILS or INCONCLUSIVE."""
        if self.failures:
            return "FAILS"
        return "PASSES" if all(finding.answer == "passes" for finding in self.judged) else "INCONCLUSIVE"

    @property
    def passed(self) -> bool:
        """Every statistic keeps its promise."""
        return self.answer == "PASSES"

    @property
    def exit_status(self) -> int:
        """0 passes, 1 fails, 3 inconclusive."""
        return EXIT_STATUS[self.answer]

    @property
    def reasons(self) -> list[str]:
        """The readings that matter, the plainest first: one of every statistic of a module."""
        first: dict[tuple[str, str], str] = {}
        for finding in sorted(self.failures or self._inconclusive, key=_plainness):
            first.setdefault((finding.statistic, finding.module), finding.reading)
        return list(dict.fromkeys(first.values()))

    @property
    def _inconclusive(self) -> list[Finding]:
        return [finding for finding in self.judged if finding.answer == "inconclusive"]

    def exponent(
        self,
        statistic: str,
        module: str | None = None,
        *,
        axis: Axis = "loops",
        moment: Moment = "init",
        which: Which = "last",
        rule: str | None = None,
    ) -> Interval:
        """The growth exponent of any statistic in the frame along an axis, with its 90 % t-interval over seeds.

        Args:
            statistic: a name in the frame; what changes has no value at initialisation, take moment "one" or "end".
            module: a module in the frame; default the last branch.
            axis: "loops", "layers" or "width".
            moment: "init", "one" (after one step) or "end".
            which: the "first" or "last" visit, or "all" as their root mean square.
            rule: default the one judged.

        Raises:
            InputError: the frame has no finite positive values for it at two places of the axis or more.
        """
        rows = on_axis(self.frame[self.frame["rule"] == (rule or self.rule)], axis)
        module = module or self.context.branches[-1].module
        chosen = rows[(rows["statistic"] == statistic) & (rows["module"] == module)]
        table = exponent_table(chosen, Promise(axis, statistic, "final", moment, which, 0, 0), rows)
        if table is None or table.shape[1] < 2 or not ((table > 0) & np.isfinite(table)).all(axis=None):
            raise InputError(
                f"there is no finite {statistic} above 0 at two or more values of {axis} for module {module!r} at "
                f"moment {moment!r}; the frame has {', '.join(sorted(rows['statistic'].unique()))}"
            )
        return t_interval(fit_exponents(table), CONFIDENCE)

    def recommend(self) -> Recommendation:
        """The exponent p in ε ∝ N^−p that the model needs, from how its visits add up (our extension).

        ‖Σ_n r_n‖ grows as N^½ where the visits of a branch point anywhere, and as N where they point the same way
        (arXiv 2606.18524, Theorem 1). What is measured is ε‖Σ r_n‖ under the rule of the check, from which the measured
        exponent of ε itself is taken off. Alignment depends on how far the stream moves, and so on ε: take it from a
        check under "factored" over two doublings of N at least, and where another exponent comes out, check again with
        a model scaled that way ("as made"). With more steps it is that after more training.

        Raises:
            InputError: nothing is looped, N spans too little, or the branches were not finite or zero.
        """
        rows = on_axis(self.frame[self.frame["rule"] == self.rule], "loops")
        return recommended(rows, self.context.looped)

    def __str__(self) -> str:
        head = f"coordinate check, {self.rule}: {self.answer} ({len(self.judged)} statistics, level {self.level:g})"
        shown = [*self.failures, *self._inconclusive] or self.judged
        table = text_table([_row(finding) for finding in sorted(shown, key=_plainness)])
        return "\n".join([head, *(f"- {reason}" for reason in self.reasons), *table])

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values; the frame is not in it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rule": self.rule,
            "answer": self.answer,
            "reasons": self.reasons,
            "tolerance": self.tolerance,
            "level": self.level,
            "confidence": CONFIDENCE,
            "findings": [_as_json(finding) for finding in self.findings],
        }


def _plainness(finding: Finding) -> tuple[int, int]:
    """Causes before consequences: what a branch adds, what a step does, and then the stream."""
    place = PLAIN_FIRST.index(finding.statistic) if finding.statistic in PLAIN_FIRST else len(PLAIN_FIRST)
    return finding.answer != "fails", place


def _row(finding: Finding) -> dict[str, str]:
    visit = f"{finding.which} visit{'s' if finding.which == 'all' else ''}, " if finding.statistic in PER_VISIT else ""
    return {
        "statistic": finding.statistic,
        "module": finding.module,
        "when": f"{visit}{finding.moment}" + ("" if finding.axis in {"loops", "level"} else f", over {finding.axis}"),
        "exponent": str(finding.exponent or "not finite"),
        "promised": finding.promised,
        "answer": finding.answer,
    }


def _as_json(finding: Finding) -> dict[str, Any]:
    values = {key: value for key, value in vars(finding).items() if key != "exponent"}
    values["low"] = None if math.isinf(finding.low) else finding.low
    if finding.exponent is not None:
        values["exponent"] = vars(finding.exponent)
    return values
