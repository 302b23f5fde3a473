"""A baseline: the optima of a table in a file, lr-optima.json, and what a later table says of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from looptransfer.checks import check_number, is_number
from looptransfer.errors import InputError, explained_in
from looptransfer.files import MOST_BYTES, open_file, write_file
from looptransfer.records import parse_json, record_of, value_of
from looptransfer.transfer.bracket import bracket_optimum
from looptransfer.transfer.comparison import TOLERANCE, ComparedOptimum, Comparison, compare_optimum, not_told_by_loss
from looptransfer.transfer.optimum import Optimum, curves
from looptransfer.transfer.provenance import differing, fingerprint_of
from looptransfer.transfer.stored import KEY, StoredOptimum, losses_of, renamed
from looptransfer.transfer.verdict import LOSS, NATS, Verdict

SCHEMA_VERSION = 1
PATH = "lr-optima.json"
REMAKE = "make it again with --update-baseline"
BRACKET = 0.5  # octaves from the stored optimum beyond which a neighbour's loss is the lower one
BY_DESIGN = {"seeds", "lrs"}  # parts of the fingerprint in which three LRs differ from a sweep


@dataclass(frozen=True)
class Baseline:
    """The optima of every rule of a table, and its origin.

    `fingerprint` maps names to what made the table: looptransfer, code, seeds, lrs, columns of numbers that are the
    same in every row such as layers, the column fingerprint, and experiment, the settings of ours where a ledger knew
    them. `loss_tolerance` is how much worse the loss may become, in its unit.
    """

    axis: str
    unit: str
    confidence: float
    transferred_lr: float | None
    fingerprint: Mapping[str, Any]
    optima: Mapping[str, tuple[StoredOptimum, ...]]
    path: str = PATH
    loss_tolerance: float = 0.02

    @classmethod
    def of(cls, verdict: Verdict, path: str | Path = PATH) -> "Baseline":
        """The optima of a verdict, to be written to `path`.

        Raises:
            InputError: no optimum of the rule that was judged is known.
        """
        if all(optimum.censored for optimum in verdict.judged.optima):
            reason = verdict.judged.optima[0].censored
            raise InputError(f"no optimum of rule {verdict.rule!r} is known ({reason}), so there is nothing to store")
        optima = {
            name: tuple(
                StoredOptimum.of(optimum, verdict.confidence, losses_of(runs[runs[verdict.axis] == optimum.n]))
                for optimum in judged.optima
            )
            for name, judged in verdict.rules.items()
            for runs in [verdict.runs[verdict.runs["rule"] == name]]
        }
        return cls(
            verdict.axis,
            verdict.unit,
            verdict.confidence,
            verdict.transferred_lr,
            fingerprint_of(verdict.runs, verdict.axis),
            optima,
            str(path),
            verdict.regret_tolerance,
        )

    @classmethod
    @explained_in("ci.md")
    def read(cls, path: str | Path = PATH) -> "Baseline":
        """Read what `write` wrote.

        Raises:
            InputError: the file is absent, no JSON, of another schema version, or damaged.
        """
        try:
            with open_file(path) as stream:
                data = parse_json(stream.read(MOST_BYTES).decode("utf-8-sig"))
        except FileNotFoundError:
            raise InputError(f"there is no baseline {path}; make it with --update-baseline") from None
        except OSError as error:
            fix = "give a file that you may read"
            raise InputError(f"cannot read the baseline {path}: {error.strerror}; {fix}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"the baseline {path} is not JSON: {error}; {REMAKE}") from None
        if not isinstance(data, dict) or "schema_version" not in data:
            raise InputError(f"{path} is no baseline: it has no schema_version; give lr-optima.json, or {REMAKE}")
        version = data.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {version!r:.60}, not {SCHEMA_VERSION}; {REMAKE}")
        try:
            return _from_json(data, str(path))
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"the baseline {path} is damaged: {str(error)[:300]}; {REMAKE}") from None

    def write(self, path: str | Path | None = None) -> None:
        """Write it as JSON, by default to its path; a reader never sees half a file.

        Raises:
            InputError: the place cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        write_file(self.path if path is None else path, text + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the schema has a version."""
        fields = asdict(self)
        optima = {
            rule: [renamed(stored, "n", KEY) for stored in optima] for rule, optima in fields.pop("optima").items()
        }
        del fields["path"]
        return {"schema_version": SCHEMA_VERSION, **fields, "rules": optima}

    def of_rule(self, rule: str) -> dict[int, StoredOptimum]:
        """The optima of a rule by N, censored ones too.

        Raises:
            InputError: there are none.
        """
        if rule not in self.optima:
            rules = ", ".join(self.optima)
            raise InputError(
                f"{self.path} has no optima of rule {rule!r}, only of {rules}; choose one (--rule), or {REMAKE}"
            )
        return {stored.n: stored for stored in self.optima[rule]}

    def fitted(self, rule: str) -> dict[int, StoredOptimum]:
        """The optima of a rule by N, without the censored ones; raises as `of_rule`."""
        return {n: stored for n, stored in self.of_rule(rule).items() if stored.log2_lr is not None}

    def compare(self, verdict: Verdict, tolerance: float = TOLERANCE) -> Comparison:
        """Compare the optima of the rule that a verdict is about with the stored ones.

        MOVED: the interval of the shift lies outside ±tolerance. WORSE: that of the change of the loss at the optimum
        lies above the verdict's regret tolerance. HOLDS: both lie inside. Otherwise INCONCLUSIVE, as is an optimum that
        can no longer be told, a baseline with nothing to compare, and a tolerance of the loss as large as the curve is
        high. Seeds are compared one by one where one side has all of the other's, else by Welch's interval.

        Args:
            verdict: of the later runs.
            tolerance: octaves that an optimum may move.

        Raises:
            InputError: a baseline of another axis, metric or rule, or a tolerance that is not above 0.
        """
        check_number("tolerance", tolerance)
        for name, stored, later in (("axis", self.axis, verdict.axis), ("unit", self.unit, verdict.unit)):
            if stored != later and {stored, later} != {NATS, LOSS}:  # a curve's height may tell these two differently
                raise InputError(
                    f"{self.path} was made with {name} {stored!r}, not {later!r}; give the same, or {REMAKE}"
                )
        optima = {optimum.n: optimum for optimum in verdict.judged.optima}
        terms = (tolerance, verdict.regret_tolerance, verdict.confidence)
        findings = [compare_optimum(stored, optima.get(n), *terms) for n, stored in self.fitted(verdict.rule).items()]
        if verdict.judged.height is not None and verdict.regret_tolerance >= verdict.judged.height:
            findings = [not_told_by_loss(finding) for finding in findings]
        return Comparison(
            self.path,
            verdict.rule,
            verdict.axis,
            verdict.unit,
            "Optima of full fits",
            *terms,
            tuple(findings),
            differing(self.fingerprint, fingerprint_of(verdict.runs, verdict.axis)),
            tuple(_notes(self.of_rule(verdict.rule), optima, verdict.axis_label)),
        )

    def bracket(
        self,
        runs: pd.DataFrame,
        rule: str,
        loss_tolerance: float | None,
        confidence: float,
        counts: Sequence[int] | None = None,
        confirmed: Mapping[int, ComparedOptimum] | None = None,
    ) -> Comparison:
        """Judge runs at `stored_lrs` of some N, a tidy table of one rule, but for those that are `confirmed` already.

        Every N of `counts`, or every N in the table where none are given, has a finding; one that was not run whole is
        INCONCLUSIVE. The tolerance of the loss is by default the baseline's.

        MOVED: a neighbour is better than the stored optimum beyond noise, or a run at the stored optimum diverges; the
        optimum then lies more than half an octave away. WORSE: the interval of the change of the loss there lies above
        `loss_tolerance`. HOLDS: the slopes at half and at twice the LR both point inwards beyond noise, so that the
        optimum lies between them; a diverged neighbour bounds it as well. Otherwise INCONCLUSIVE.
        """
        stored = self.of_rule(rule)
        loss_tolerance = self.loss_tolerance if loss_tolerance is None else loss_tolerance
        tables, repeated = curves(runs, self.axis), confirmed or {}
        findings = [
            repeated.get(n) or bracket_optimum(stored[n], tables.get(n, pd.DataFrame()), loss_tolerance, confidence)
            for n in (tables if counts is None else counts)
        ]
        method = "Half, once and twice the stored LR"
        if repeated:
            method = "Stored runs made again" + (
                ", else half, once and twice the stored LR" if len(repeated) < len(findings) else ""
            )
        changes = differing(self.fingerprint, fingerprint_of(runs, self.axis))
        return Comparison(
            self.path,
            rule,
            self.axis,
            self.unit,
            method,
            BRACKET,
            loss_tolerance,
            confidence,
            tuple(findings),
            {name: pair for name, pair in changes.items() if name not in BY_DESIGN},
        )


def _notes(stored: Mapping[int, StoredOptimum], optima: Mapping[int, Optimum], label: str) -> Iterator[str]:
    for n, optimum in stored.items():
        if optimum.censored is not None:
            yield f"{label} = {n} was censored in the baseline ({optimum.censored}), so it is not compared"
    for n in optima.keys() - stored.keys():
        yield f"{label} = {n} is not in the baseline"


def _from_json(data: dict[str, Any], path: str) -> Baseline:
    """A baseline from the values of its file; what cannot be so is a ValueError."""
    rules = value_of(dict[str, tuple[dict[str, Any], ...]], data.pop("rules", None), "rules")
    for stored in (stored for optima in rules.values() for stored in optima):
        stored["n"] = value_of(int, stored.pop(KEY, None), KEY)
    baseline = record_of(
        Baseline, {**data, "optima": {rule: list(stored) for rule, stored in rules.items()}, "path": path}
    )
    for name, high in (("confidence", 1.0), ("loss_tolerance", float("inf")), ("transferred_lr", float("inf"))):
        value = getattr(baseline, name)
        if value is not None and not is_number(value, 0, high):
            raise ValueError(f"{name} is {value:g}, not between 0 and {high:g}")
    for rule, optima in baseline.optima.items():
        for optimum in optima:
            optimum.check()
        if len({optimum.n for optimum in optima}) < len(optima):
            raise ValueError(f"rules {rule} has two optima of one place")
    if not any(optimum.log2_lr for optima in baseline.optima.values() for optimum in optima):
        raise ValueError("it holds no optimum")
    return baseline
