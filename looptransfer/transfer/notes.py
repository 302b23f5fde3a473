"""Notes on what in a table of runs may stand behind a verdict besides N; none of them changes the answer."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import numpy as np
import pandas as pd

from looptransfer.rules import OVER_LAYERS, drifts_over_layers
from looptransfer.transfer.optimum import paired_interval
from looptransfer.transfer.results import OF_A_RUN, axis_label
from looptransfer.transfer.rows import is_state
from looptransfer.transfer.verdict import RuleVerdict, Terms

MOST_NAMED = 8  # LRs in a note; values of a setting
HALFWAY = 0.5  # of the training: an optimum that moves after it is told
FEWEST = 3  # losses that are equal by no chance; LRs that have a shape


def notes(
    runs: pd.DataFrame, verdicts: Mapping[str, RuleVerdict], rule: str, terms: Terms, maximize: bool
) -> Iterator[str]:
    """Notes on a tidy table of runs and its verdicts: other causes, and what is left out of the fits.

    Args:
        rule: the one asked for.
        maximize: its losses are those of a metric, negated.
    """
    experiments = runs["fingerprint"] if "fingerprint" in runs else pd.Series(dtype=str)
    other_sizes = terms.axis != "loops" and experiments.groupby(runs[terms.axis]).nunique().max() == 1
    if experiments.nunique() > 1 and not other_sizes:  # which are experiments of their own, while N is a loop count
        yield f"the rows come from {experiments.nunique()} different experiments (column fingerprint)"
    yield from _confounds(runs[~runs["diverged"]], terms)
    yield from _copies(runs, terms)
    yield from _partial_lrs(runs, terms)
    if terms.axis == "layers" and _rises(verdicts[rule]) and "completep" not in verdicts:
        yield f"{OVER_LAYERS}: train these L under it as well"
    yield from _directions(verdicts[rule], runs, maximize, terms.axis_label)
    yield from _late_moves(verdicts.values(), terms)


def _rises(judged: RuleVerdict) -> bool:
    """The best LR goes up with L, as it may under a rule with the paper's factors for L."""
    up = judged.answer == "DRIFTS" and judged.drift is not None and judged.drift.estimate > 0
    return up and drifts_over_layers(judged.rule)


def _confounds(runs: pd.DataFrame, terms: Terms) -> Iterator[str]:
    """A note for every setting, a column of few values, that differs between the N or the LRs of a rule."""
    label = terms.axis_label
    sizes = {"loops", "layers", "width", "steps"}
    for name in runs.columns.difference([*OF_A_RUN, terms.axis, "fingerprint", "run"], sort=False):
        texts = runs[name].map(str)
        numbers = pd.to_numeric(texts, errors="coerce").notna().all()
        few = texts.nunique() <= max(MOST_NAMED, runs[terms.axis].nunique()) and texts.nunique() < len(runs) / 3
        if texts.nunique() < 2 or not (few or name in sizes) or is_state(runs[name]):
            continue
        cells = [runs["rule"], runs[terms.axis]]
        mixed = texts.groupby([*cells, runs["seed"]]).nunique() > 1
        if not (texts.groupby(cells).nunique() > 1).any():
            if (texts.groupby(runs["rule"]).nunique() > 1).any() or name in sizes:
                yield f"{name} differs between the rows, so a drift in {label} may be a drift in {name}"
        elif mixed.any() and (numbers or name in sizes):
            n = mixed.index[mixed][0][1]
            yield f"{name} differs between the LRs of {label} = {n}, so that their losses may not be comparable"


def _copies(runs: pd.DataFrame, terms: Terms) -> Iterator[str]:
    """A note on seeds, and on N, that have the very same losses: neither the seed nor N has reached the training."""
    label = terms.axis_label
    for column, across, reason in (
        ("seed", ["rule", terms.axis, "lr"], "they are one seed, and intervals over them are too narrow"),
        (terms.axis, ["rule", "lr", "seed"], f"{label} may not have reached the training"),
    ):
        losses = runs[~runs["diverged"]].pivot_table(index=across, columns=column, values="loss")
        pairs = {pair: losses[list(pair)].dropna() for pair in pairwise(losses.columns)}
        copies = [f"{first} and {second}" for (first, second), both in pairs.items()
                  if len(both) >= FEWEST and both[first].equals(both[second].rename(first))]  # fmt: skip
        if copies:
            yield f"{axis_label(column)} {', '.join(copies)} have the same losses to the last digit: {reason}"


def _partial_lrs(runs: pd.DataFrame, terms: Terms) -> Iterator[str]:
    """A note for every rule and N with LRs that not every seed ran."""
    for (rule, n), group in runs.groupby(["rule", terms.axis]):
        seeds, per_lr = group["seed"].nunique(), group.groupby("lr")["seed"].nunique()
        partial = [f"{lr:.6g}" for lr in per_lr.index[per_lr < seeds]]
        if partial:
            more = f" and {len(partial) - MOST_NAMED} more" if partial[MOST_NAMED:] else ""
            named = ", ".join(partial[:MOST_NAMED]) + more
            yield f"{rule}, {terms.axis_label} = {n}: LR {named} is left out, without a result of all {seeds} seeds"


def _directions(judged: RuleVerdict, runs: pd.DataFrame, maximize: bool, label: str) -> Iterator[str]:
    """Notes on a metric that seems to be turned round, and on LRs that seem to be logarithms or numbers of a grid."""
    means = [table.mean(axis=1) for table in judged.tables.values() if len(table) >= FEWEST]
    ends = [(mean.index[0], mean.index[-1]) for mean in means]
    if means and all(m.idxmin() in end and m.idxmax() not in end for m, end in zip(means, ends, strict=True)):
        fix = "leave out --maximize where less is better" if maximize else "say --maximize where more is better"
        yield f"at every {label} the worst LR lies between better ones; {fix}"
    lrs = np.sort(runs["lr"].unique())
    steps = np.diff(lrs)
    if len(lrs) > FEWEST and lrs[0] >= 1 and np.allclose(steps, steps[0], rtol=1e-6):
        yield f"the LRs are {lrs[0]:g}, {lrs[1]:g}, … {lrs[-1]:g}, evenly spaced: are they logarithms of the LR?"


def _late_moves(verdicts: Iterable[RuleVerdict], terms: Terms) -> Iterator[str]:
    """A note for every N whose optimum still moved by more than the tolerance over the last half of the training."""
    for verdict in verdicts:
        for halfway, end in zip(verdict.horizons.get(HALFWAY, ()), verdict.optima, strict=False):
            moved = paired_interval(end.by_seed, halfway.by_seed, terms.confidence)
            if moved is not None and moved.outside(0.0) and abs(moved.estimate) > terms.tolerance:
                yield (
                    f"{verdict.rule}, {terms.axis_label} = {end.n}: over the last half of the training the optimum "
                    f"still moved by {moved} octaves; train longer before it is transferred"
                )
