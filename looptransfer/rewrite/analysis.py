"""One forward, understood: its residual adds, who hands their branches over, their blocks, and what remains without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from looptransfer.rewrite.branches import (
    Group,
    branches_of,
    declared_groups,
    find_groups,
    marked_alone,
    refuse_nested,
    refuse_time,
)
from looptransfer.rewrite.complete import Remainder, note_members, refuse_unrecognised, without_branches
from looptransfer.rewrite.forward import ExampleInputs
from looptransfer.rewrite.graph import Handle
from looptransfer.rewrite.layers import count_layers, find_blocks
from looptransfer.rewrite.record import record
from looptransfer.rewrite.recurrence import Change
from looptransfer.rewrite.trace import Trace, trace
from looptransfer.rewrite.visits import count_visits


@dataclass
class Analysis:
    """All that is known of a model after one traced forward."""

    trace: Trace
    groups: list[Group]
    blocks: list[str]  # the block of every group
    layers: int  # L
    shared: tuple[str, ...]  # matrices that act in several branches and do not tie them
    rest: Remainder

    def hide(self, model: nn.Module, hidden: frozenset[str]) -> None:
        """Note parameters that act through branches alone, though data of theirs comes along on the stream."""
        note_members(model, self.trace, self.groups, self.rest, hidden)
        self.rest.forget(hidden)

    @property
    def visits(self) -> dict[Handle, int]:
        """N of every branch."""
        return {group.handle: group.visits for group in self.groups}


def analyse(
    model: nn.Module, example_inputs: ExampleInputs, declared: list[str] | None = None, **options: Any
) -> Analysis:
    """Trace one forward of `model` and find its branches; options as for `record`. `declared` names their modules.

    Raises:
        InputError: inputs that the model rejects, or a residual add that cannot be scaled faithfully; the message names
            its line.
    """

    def again(change: Mapping[int, Change], watch: frozenset[int]) -> Mapping[int, Tensor]:
        return record(model, example_inputs, change=change, watch=watch, seed=0).watched

    forward = trace(model, example_inputs, **options)
    groups = marked_alone(forward) if declared is None else declared_groups(model, forward, declared)
    adds = branches_of(forward, groups) if declared is None else [add for group in groups for add in group.adds]
    rest = without_branches(forward, adds)
    if declared is None:
        refuse_time(forward)
        refuse_unrecognised(forward, rest, again)
        groups = find_groups(forward) + groups
    refuse_nested(forward, groups)
    ties = count_visits(model, forward, groups, again)
    note_members(model, forward, groups, rest, frozenset())
    blocks = find_blocks(model, groups)
    layers = count_layers(model, blocks, groups, ties)
    return Analysis(forward, groups, blocks, layers, ties.shared(groups), rest)


def fullest(draws: Sequence[Analysis]) -> Analysis:
    """Of random depths the forward that shows most."""
    return max(draws, key=lambda draw: sum(draw.visits.values()))
