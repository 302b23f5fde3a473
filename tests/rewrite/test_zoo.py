"""Every model of the zoo: the plan by hand, the numbers against an oracle, the verification."""

import functools
import linecache
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import looptransfer as lt
from tests.oracle import both_runs
from tests.zoo import ZOO, Entry

PLANNED = [entry for entry in ZOO if entry.refusal is None]
REFUSED = [entry for entry in ZOO if entry.refusal is not None]
MODES = {"": None, "train": True, "eval": False}


def each(entries: list[Entry], test: str, *modes: str) -> Any:
    """Parametrises a test over entries, and over modes where there are any."""

    def parameter(entry: Entry, mode: str) -> Any:
        known = [reason for key, reason in entry.bugs.items() if key in {test, f"{test} {mode}"}]
        marks = [pytest.mark.xfail(strict=True, reason=reason) for reason in known]
        marks.append(pytest.mark.skipif(not entry.available(), reason=f"needs {', '.join(entry.needs)}"))
        values = (entry, MODES[mode]) if mode else (entry,)
        return pytest.param(*values, id=f"{entry.name}, {mode}" if mode else entry.name, marks=marks)

    cases = [parameter(entry, mode) for entry in entries for mode in modes or ("",)]
    return pytest.mark.parametrize(("entry", "training") if modes else ("entry",), cases)


# -- the plan


@functools.cache
def rewritten(entry: Entry) -> tuple[nn.Module, lt.ScalingPlan, tuple[str, ...]]:
    """The model after `parametrize`, its plan, and what was warned of."""
    model = entry.build()
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(entry.gradients):
        warnings.simplefilter("always", lt.ScalingWarning)
        plan = lt.parametrize(model, entry.example(), **entry.kwargs)
    said = tuple(str(one.message) for one in caught if issubclass(one.category, lt.ScalingWarning))
    return model, plan, said


@each(PLANNED, "plan")
def test_the_plan_is_the_one_of_the_theory(entry: Entry) -> None:
    _, plan, _ = rewritten(entry)
    assert [(str(branch.handle), branch.visits) for branch in plan.branches] == [row[1:] for row in entry.rows]
    assert plan.layers == entry.layers
    assert [branch.multiplier for branch in plan.branches] == pytest.approx(entry.multipliers(), rel=1e-12)
    assert plan.proved


@each(PLANNED, "labels")
def test_every_branch_is_listed_under_its_block(entry: Entry) -> None:
    _, plan, _ = rewritten(entry)
    assert [branch.layer for branch in plan.branches] == [layer for layer, _, _ in entry.rows]


@each(PLANNED, "warnings")
def test_what_the_rule_was_not_derived_for_is_warned_of_and_nothing_else(entry: Entry) -> None:
    _, plan, said = rewritten(entry)
    assert said == plan.caveats
    heads = [next((words for words in entry.warns if caveat.startswith(words)), caveat) for caveat in said]
    assert sorted(heads) == sorted(entry.warns)


# What a model's own forward adds is a layer each; the same forward of a module inside a model adds blocks.
OWN_FORWARD = {
    "inline in the model itself and marked",
    "the model is the block",
    "numbered attributes",
    "reading and writing",
    "learned queries, declared",
}


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@each([entry for entry in PLANNED if entry.name not in OWN_FORWARD], "wrapped")
def test_a_module_around_the_model_changes_no_multiplier(entry: Entry) -> None:
    kwargs = dict(entry.kwargs)
    if "branches" in kwargs:
        kwargs["branches"] = [f"inner.{name}" for name in kwargs["branches"]]
    with torch.set_grad_enabled(entry.gradients):
        plan = lt.parametrize(Wrapper(entry.build()), entry.example(), **kwargs)
    bare = rewritten(entry)[1]
    assert plan.layers == bare.layers
    assert [branch.multiplier for branch in plan.branches] == [branch.multiplier for branch in bare.branches]
    assert len(plan.caveats) == len(bare.caveats)


@each(REFUSED, "refusal")
def test_a_model_without_a_faithful_rewrite_is_refused_at_its_line(entry: Entry) -> None:
    model = entry.build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(lt.InputError, match=entry.refusal) as caught:
        lt.parametrize(model, entry.example(), **entry.kwargs)
    named = re.search(r"(\S+\.py):(\d+)", str(caught.value))
    assert named
    assert entry.line in linecache.getline(named[1], int(named[2]))
    assert [type(module) for module in model.modules()] == kinds


# -- the numbers


@each(PLANNED, "numbers", "train", "eval")
def test_outputs_and_gradients_are_those_of_multiplied_additions(entry: Entry, training: bool) -> None:
    (found, ours_gradients), (wanted, gradients) = both_runs(entry, rewritten(entry)[0], training)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert ours_gradients.keys() == gradients.keys()
    assert bool(gradients) == entry.gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


# -- the verification


@each(PLANNED, "verify", "train", "eval")
def test_the_rewritten_model_is_verified(entry: Entry, training: bool) -> None:
    model, plan, _ = rewritten(entry)
    with torch.set_grad_enabled(entry.gradients):
        assert lt.verify(model.train(training), entry.example()) == plan
