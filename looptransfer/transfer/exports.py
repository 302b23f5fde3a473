"""What trackers export in other shapes than a row per run: plots, and tables with a row per value of any metric."""

import re
import shlex

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.text import printable, short
from looptransfer.transfer.rows import find, is_missing

FIELD = re.compile(r"\{(\w+)\}")  # of a pattern that runs are called by
ENDS = ("__MIN", "__MAX")  # behind the name of a series of a plot export: the ends of what a point is the mean of


def of_metric(frame: pd.DataFrame, metric: str, file: str) -> pd.DataFrame:
    """A table with columns run, step and the metric, from a plot export or a long table; any other as it is.

    A plot export has a column of steps, and one "RUN - METRIC" for every run; a long table has columns tag, step and
    value, and run unless it is the file of one. A run that lacks the metric keeps a row, without a value.

    Raises:
        InputError: the metric is not there or not clear, or a plot has means of several runs or steps.
    """
    steps, *series = [name for name in frame.columns if not str(name).endswith(ENDS)] or [""]
    if series and all(" - " in str(name) for name in series):
        table = _long(frame, steps, series)
    elif {"tag", "step", "value"} <= set(frame.columns):
        table, series = frame if "run" in frame else frame.assign(run=file), []
    else:
        return frame
    tags = [str(tag) for tag in table["tag"].unique()]
    tag = find(metric, tags, "--columns loss={}")
    if tag is None:
        ways = [shlex.quote(f"loss={tag}") for tag in tags if not tag.startswith("_")]
        raise InputError(f"no metric of the table is called {metric}; write --columns {' or '.join(ways[:8])}")
    _refuse_means(frame, [name for name in series if name.endswith(f" - {tag}")])
    rows = table[table["tag"] == tag]
    without = table[~table["run"].isin(rows["run"])].drop_duplicates("run", keep="last").assign(value=None)
    return pd.concat([rows, without]).drop(columns="tag").rename(columns={"value": tag})


def _refuse_means(frame: pd.DataFrame, series: list[str]) -> None:
    for name in series:
        low, high = (f"{name}{end}" for end in ENDS)
        if {low, high} <= set(frame.columns) and (frame[low] != frame[high]).any():
            raise InputError(
                f"the points of {short(name)} are means of several runs or steps, as its __MIN and __MAX differ; "
                "ungroup the runs before the export, or export the table of runs, which has their last losses"
            )


def _long(frame: pd.DataFrame, steps: str, series: list[str]) -> pd.DataFrame:
    """A plot export with a row per point; a cell is empty where a run has no point at a step."""
    table = frame.rename(columns={steps: "step"}).melt("step", series, "series", ignore_index=False)
    parts = table["series"].str.rpartition(" - ")
    table = table.assign(run=parts[0], tag=parts[2]).drop(columns="series")
    table.index = pd.Index(
        [f"{line} ({run})" for line, run in zip(table.index, table["run"].map(printable), strict=True)]
    )
    points = ~table["value"].map(is_missing)
    return table[points | ~points.groupby([table["run"], table["tag"]]).transform("any")]


def named(frame: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """The table with a column for each {NAME} of a pattern that runs are called by; empty where a run is not.

    Raises:
        InputError: the pattern is none, fits no name, or fits one in two ways.
    """
    texts = FIELD.split(pattern)
    fields = texts[1::2]
    if not fields or len({*fields}) < len(fields) or not all(field.isidentifier() for field in fields):
        raise InputError(
            f"--run-name is {pattern!r}; write what runs are called, such as 'n{{loops}}-lr{{lr}}-s{{seed}}'"
        )
    shortest, longest = (
        "".join(f"(?P<{text}>{span})" if place % 2 else re.escape(text) for place, text in enumerate(texts))
        for span in (".+?", ".+")
    )
    names = frame["run"].map(str)
    cells: dict[str, dict[str, str]] = {}
    for run in names.unique():
        matches = [re.fullmatch(expression, run) for expression in (shortest, longest)]
        ways = [match.groupdict() for match in matches if match]
        if ways and ways[0] != ways[1]:
            told = " or ".join(", ".join(f"{name} {value}" for name, value in way.items()) for way in ways)
            raise InputError(
                f"--run-name {pattern!r} fits the run {short(run)} in two ways: {told}; fix more of its text"
            )
        cells[run] = ways[0] if ways else {}
    if not any(cells.values()):
        raise InputError(
            f"--run-name {pattern!r} fits none of the {len(cells)} runs, such as {short(next(iter(cells)))}; write "
            "{loops}, {lr}, {seed} where a name has them, {other} for what varies besides, and the rest as it is"
        )
    columns = {field: [cells[run].get(field) for run in names] for field in fields}
    return frame.assign(**columns)


def refuse_unnamed(frame: pd.DataFrame, pattern: str) -> None:
    """Refuse a table in which a run's name does not follow the pattern, unless conditions have left it out."""
    field = FIELD.findall(pattern)[0]
    others = frame["run"][frame[field].map(is_missing)]
    if len(others):
        words = shlex.quote(f"run!={others.iloc[0]}")
        raise InputError(
            f"row {others.index[0]}: the run {short(others.iloc[0])} is not called as --run-name {pattern!r} says; "
            f"leave it out with --where {words}"
        )
