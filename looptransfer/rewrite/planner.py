"""From an analysis and a rule to the plan."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from looptransfer.checks import is_number
from looptransfer.errors import InputError
from looptransfer.rewrite.analysis import Analysis, fullest
from looptransfer.rewrite.branches import DECLARE, Group, scaled
from looptransfer.rewrite.caveats import find_caveats
from looptransfer.rewrite.ends import factors, last_maps
from looptransfer.rewrite.plan import Branch, LeftAlone, ScalingPlan
from looptransfer.rewrite.roles import roles_of
from looptransfer.text import few

REASONS = {
    "composite": "the added branch holds residual adds of its own (an input injection or a long skip)",
    "inner": "it lies inside a scaled branch and never becomes the stream",
    "time": "a recurrence over time",
    "fixed": "no learned matrix acts in the branch",
    "frozen": "no gradient reaches the branch or goes through it: a frozen backbone or a teacher",
    "leaf": "not declared as a branch",
}


def make_plan(
    model: nn.Module,
    draws: Sequence[Analysis],
    settings: Mapping[str, Any],
    *,
    declared: bool,
    layers: int | None,
    loops: float | None,
    preserve: bool,
) -> ScalingPlan:
    """Decide multiplier and block of every residual branch.

    N is counted in chains of tied branches. L counts blocks; layers outside the loop count too (our extension: the
    paper leaves multi-stage models open).

    Args:
        model: the model that was analysed.
        draws: forwards of it, with other random numbers and weights; the first is that of the model as it stands.
        settings: rule, lam and base_layers.
        declared: the user named the branches.
        layers: L where it is not to be counted.
        loops: as for `parametrize`.
        preserve: as for `parametrize`.

    Raises:
        InputError: no residual add was found, or `loops` does not fit what was traced.
    """
    analysis = fullest(draws)
    _check_found(analysis)
    visits, uses = counts(draws, loops, declared)
    plan = ScalingPlan(
        **settings,
        layers=layers or analysis.layers,
        branches=tuple(_branch(model, analysis, place) for place in range(len(analysis.groups))),
        left_alone=_left_alone(analysis),
        roles=roles_of(model, analysis),
        declared=declared,
        random_loops=loops is not None,
    ).with_counts(visits, uses)
    return replace(plan, caveats=find_caveats(model, draws, plan, preserve))


def _check_found(analysis: Analysis) -> None:
    """Refuse a forward without residual adds, with the lines that might have been some."""
    if analysis.groups:
        return
    graph, paths = analysis.trace.graph, analysis.rest.paths
    met = [n for n in range(len(graph.nodes)) if paths.live >> n & 1 and paths.gates(n, -1)]
    lines = dict.fromkeys(graph.line(n) for n in [*(total.node for total in graph.sums), *met])
    seen = f" What meets at {few(lines)} is not of that form." if lines else ""
    raise InputError(
        "no residual add was found: nothing of the form x + f(x), with learned matrices in f and x carried on, ran "
        f"in the forward.{seen} Check that the example inputs reach the looped layers and that the model was not "
        "compiled. Where a branch is added in another way, mark it there: looptransfer.residual(…, 'name'). "
        f"{DECLARE}"
    )


def counts(
    draws: Sequence[Analysis], loops: float | None, declared: bool
) -> tuple[Mapping[Any, float], Mapping[Any, float]]:
    """The visits of every branch and the uses of every parameter on the stream, if the loops ran `loops` times.

    What varies over the draws follows the loop, each in its own way (twice a loop, once before it). Where nothing
    varies, the traced forward must loop as often as the mean, rounded; what users declare is theirs to count.

    Raises:
        InputError: `loops` is no number from 1 up, or does not fit what was traced.
    """
    if loops is None:
        return fullest(draws).visits, fullest(draws).rest.uses
    if not is_number(loops) or loops < 1:
        raise InputError(f"loops is {loops!r}; it must be a number from 1 up")
    visits, uses = [draw.visits for draw in draws], [draw.rest.uses for draw in draws]
    moving = {handle for draw in visits for handle in draw if len({other.get(handle, 0) for other in visits}) > 1}
    if moving:
        drawn = [min((draw[handle] for handle in moving if draw.get(handle)), default=0) for draw in visits]
        return _follow(visits, drawn, loops), _follow(uses, drawn, loops)
    traced = _fitting({n for n in visits[0].values() if n > 1}, loops, declared)

    def scaled(counted: Mapping[Any, int]) -> dict[Any, float]:
        return {key: _whole(n * loops / traced) if n > 1 and n % traced == 0 else n for key, n in counted.items()}

    return scaled(visits[0]), scaled(uses[0])


def _fitting(repeated: set[int], loops: float, declared: bool) -> float:
    """The traced visits that are those of `loops` loops."""
    if declared and len(repeated) == 1:
        return repeated.pop()
    if loops == 1 and not repeated:
        return loops  # a count whose mean is 1 is never drawn higher
    near = [n for n in repeated if abs(n - loops) < 1]
    if near:
        return near[0]
    if repeated and all(n % loops == 0 for n in repeated):
        return loops  # each loop visits them several times
    seen = ", ".join(f"{n:g}" for n in sorted(repeated)) or "1"
    raise InputError(
        f"loops is {loops:g}, and the branches were visited {seen} times in every forward: nothing is drawn at random. "
        "Leave loops out, since visits are counted; or give example inputs that make the model loop as often as the "
        "mean, rounded"
    )


def _follow(draws: Sequence[Mapping[Any, int]], drawn: Sequence[int], loops: float) -> dict[Any, float]:
    """Each number as a line in the loop counts that were drawn, by least squares; exact where there is one loop."""
    mean = sum(drawn) / len(drawn)
    spread = sum((n - mean) ** 2 for n in drawn)
    followed = {}
    for key in {key: None for draw in draws for key in draw}:
        values = [draw.get(key, 0) for draw in draws]
        slope = sum((n - mean) * value for n, value in zip(drawn, values, strict=True)) / spread
        followed[key] = _whole(max(1.0, round(sum(values) / len(values) + slope * (loops - mean), 6)))
    return followed


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _branch(model: nn.Module, analysis: Analysis, place: int) -> Branch:
    group: Group = analysis.groups[place]
    names, unfoldable = last_maps(model, analysis.trace, group)
    handle = group.handle
    return Branch(
        layer=analysis.blocks[place],
        module=handle.module,
        output=handle.output,
        mark=handle.mark,
        source=group.adds[0].site.source,
        visits=group.visits,
        multiplier=1.0,
        parameters=tuple(sorted(group.parameters)),
        last_map=names,
        unfoldable=unfoldable,
        factors=factors(analysis.trace, group),
    )


def _left_alone(analysis: Analysis) -> tuple[LeftAlone, ...]:
    forward = analysis.trace
    taken = {id(add) for add in scaled(forward, analysis.groups)}
    others = Counter((add.site.source, REASONS[add.kind]) for add in forward.adds if id(add) not in taken)
    for join in analysis.rest.joins:
        file, line = forward.graph.nodes[join.node].place
        others[f"{file}:{line}", "data gets past learned matrices there, and what they make is not declared"] += 1
    return tuple(LeftAlone(source, reason) for source, reason in others)
