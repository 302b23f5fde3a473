"""One self-contained HTML page of a result."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from looptransfer.coordcheck.result import CoordCheck
from looptransfer.files import write_file
from looptransfer.report import coordinates as pictures
from looptransfer.report.figures import curve_panels, draw_optima, draw_regret, runs_above
from looptransfer.report.panels import alone
from looptransfer.report.svg import inline_svg
from looptransfer.text import printable
from looptransfer.transfer.verdict import RuleVerdict, Verdict

LINKS = {"best LR": "censored", "log2(LR)": "octave", "stable up to": "edge", "seeds": "interval"}  # words of a header


def write_html(
    result: Verdict | CoordCheck,
    path: str | Path,
    *,
    title: str = "",
    summary: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    coordinates: str = "",
) -> None:
    """Write the page of a verdict or a coordinate check. Nothing in it is loaded from elsewhere.

    It holds the answer, figures with their data, tables, and how it was made.

    Args:
        result: from `check` or `coord_check`.
        path: the file to write.
        title: the page's heading; default the question that the result answers.
        summary: sentences under the answer.
        provenance: what made the results: command, versions, seeds, wall time.
        coordinates: the page of a coordinate check that the page of a verdict links to, such as "coordinates.html".

    Raises:
        InputError: the file cannot be written.
    """
    if isinstance(result, Verdict):
        template, values = "verdict.html", {**_of_verdict(result), "coordinates": coordinates}
    else:
        template, values = "coordinates.html", _of_coordinates(result)
    page = _render(template, result=result, title=title, summary=summary, provenance=provenance or {}, **values)
    write_file(path, page)


def _render(template: str, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("looptransfer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # what is marked as HTML is ours
    )
    return environment.get_template(template).render(**values)


def _of_verdict(verdict: Verdict) -> dict[str, Any]:
    above = runs_above(verdict)
    rows = _costs(verdict)
    return {
        "curves": _curves(verdict),
        "optima": _optima(verdict),
        "runs_csv": _csv(verdict.runs[["rule", verdict.axis, "lr", "seed", "loss"]]),
        "optima_csv": _csv(_optima_frame(verdict)),
        "above": len(above),
        "highest": above["loss"].max(),
        "lost": int(verdict.runs["diverged"].sum()),
        "links": LINKS,
        "perplexity": math.expm1(min(verdict.regret_tolerance, 1.0)),
        "cost": [] if rows is None else _cost_rows(verdict, rows),
        "saving": "" if rows is None else _saving(verdict, rows),
    }


def _curves(verdict: Verdict) -> list[Markup]:
    panels = zip(curve_panels(verdict), verdict.rules.values(), strict=True)
    return [
        Markup(inline_svg(alone(panel), f"curves {place}", _best_lrs(verdict, judged)))
        for place, (panel, judged) in enumerate(panels)
    ]


def _best_lrs(verdict: Verdict, judged: RuleVerdict) -> str:
    """The result of the curves of one rule, for those who do not see them."""
    known = [optimum for optimum in judged.optima if optimum.log2_lr is not None]
    ends = {known[0].n: known[0], known[-1].n: known[-1]} if known else {}
    lrs = [f"{2**o.log2_lr.estimate:.3g} at {verdict.axis_label} = {n}" for n, o in ends.items() if o.log2_lr]
    unknown = "" if len(known) == len(judged.optima) else f"; not known at {len(judged.optima) - len(known)} others"
    return f"Loss against LR, {judged.rule}, {judged.answer}. Best LR: {', '.join(lrs) or 'not known'}{unknown}."


def _optima(verdict: Verdict) -> list[Markup]:
    """What becomes of the optimum, and its regret; nothing is drawn of which nothing is known."""
    rules = verdict.rules.values()
    drifts = "; ".join(f"{judged.rule} {judged.drift or 'not known'}" for judged in rules)
    regrets = "; ".join(f"{judged.rule} {verdict.regret_text(judged.regret)}" for judged in rules)
    panels = []
    if any(judged.fitted for judged in rules):
        panels.append((draw_optima, f"Best LR against {verdict.axis_label}. Drift, octaves per doubling: {drifts}."))
    if any(judged.regret is not None and math.isfinite(judged.regret.estimate) for judged in rules):
        panels.append((draw_regret, f"Regret of the transferred LR, {verdict.unit}: {regrets}."))
    return [
        Markup(inline_svg(alone(partial(draw, verdict=verdict)), f"optima {place}", text))
        for place, (draw, text) in enumerate(panels)
    ]


def _optima_frame(verdict: Verdict) -> pd.DataFrame:
    rows = [
        (judged.rule, optimum.n, optimum.seeds, optimum.censored, *vars(optimum.log2_lr).values())
        if optimum.log2_lr
        else (judged.rule, optimum.n, optimum.seeds, optimum.censored, None, None, None)
        for judged in verdict.rules.values()
        for optimum in judged.optima
    ]
    return pd.DataFrame(rows, columns=["rule", verdict.axis, "seeds", "censored", "log2_lr", "low", "high"])


def _costs(verdict: Verdict) -> pd.DataFrame | None:
    """Runs, seconds in all and seconds a run by N; None where the table does not tell, a run under two rules once."""
    if "seconds" not in verdict.runs:
        return None
    runs = verdict.runs.assign(seconds=pd.to_numeric(verdict.runs["seconds"], errors="coerce")).dropna(subset="seconds")
    runs = runs.drop_duplicates([verdict.axis, "lr", "seed", "seconds"])
    rows = runs.groupby(verdict.axis)["seconds"].agg(["count", "sum", "mean"])
    return rows if len(rows) else None


def _cost_rows(verdict: Verdict, costs: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {verdict.axis_label: str(n), "runs": f"{runs:.0f}", "seconds in all": f"{sum_:.0f}", "a run": f"{mean:.3g}"}
        for n, runs, sum_, mean in costs.itertuples()
    ]


def _saving(verdict: Verdict, costs: pd.DataFrame) -> str:
    """What a search at the smallest N saves against one at the largest."""
    small, large = costs.index[0], costs.index[-1]
    if small == large or not costs["mean"][small] > 0:
        return ""
    label, ratio = verdict.axis_label, costs["mean"][large] / costs["mean"][small]
    return (
        f"A run at {label} = {large} takes {ratio:.2g} times as long as one at {label} = {small}: so much is saved on "
        f"every run of a search for the LR that is made at {label} = {small} instead."
    )


def _of_coordinates(check: CoordCheck) -> dict[str, Any]:
    answer = f"{check.rule} {check.answer}"
    groups = {
        "growth": (pictures.growth_panels(check), f"Against the loop count N: {answer}."),
        "stream": (pictures.stream_panels(check), f"The stream after every visit: {answer}."),
        "cosines": (pictures.cosine_panels(check), "Cosines between the increments of the loops."),
    }
    return {
        **{
            name: [Markup(inline_svg(alone(panel), f"{name} {n}", text)) for n, panel in enumerate(panels)]
            for name, (panels, text) in groups.items()
        },
        "exponents": [Markup(inline_svg(pictures.plot_exponents(check), "exponents", f"Exponents: {answer}."))],
        "frame_csv": _csv(pictures.drawn(check)),
        "cosines_csv": _csv(pd.DataFrame(_cosines(check), columns=["rule", "loops", "step", "m", "n", "cosine"])),
    }


def _cosines(check: CoordCheck) -> Iterator[tuple[Any, ...]]:
    for key, matrix in check.cosines.items():
        for (m, n), cosine in pd.DataFrame(matrix).stack().items():
            yield (*key, m + 1, n + 1, cosine)


def _csv(frame: pd.DataFrame) -> str:
    """A table as a link to itself."""
    text = frame.to_csv(index=False).encode(errors="backslashreplace")
    return f"data:text/csv;base64,{base64.b64encode(text).decode()}"
