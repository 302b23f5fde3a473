"""Every model of the zoo: the plan by hand, the numbers against an oracle, the verification."""

import copy
import dataclasses
import functools
import linecache
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

import looptransfer as lt
from looptransfer.rewrite.branches import find_groups
from looptransfer.rewrite.graph import Site, place_of
from looptransfer.rewrite.trace import trace
from tests.models import noisy
from tests.zoo import ZOO, Entry

Run = tuple[Site, int]
HIDDEN = (__file__, "torch/_tensor.py", "torch/overrides.py", "torch/_ops.py")
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "subtract"}
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


# What a model's own forward adds is a layer each; the same forward of a module inside a model is a block.
OWN_FORWARD = {"inline in the model itself and marked", "the model is the block"}


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


class Multiplied(TorchFunctionMode):
    """Runs a plain model and multiplies one operand of chosen additions, above autograd."""

    def __init__(self, model: nn.Module, factors: Mapping[Run, tuple[int, float]]) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.factors, self.met = factors, set[Run]()
        self.running: list[str] = []
        self.runs: Counter[Site] = Counter()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Notes which modules run."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running += [self.names[id(module)]] if id(module) in self.names else []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self.names:
                self.running.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") not in SUMS:
            return func(*args, **kwargs)
        operands = [*args, *(kwargs.pop(name) for name in ("input", "other") if name in kwargs)]
        if all(isinstance(one, Tensor) for one in operands) and is_spread(*(one.shape for one in operands[:2])):
            where = (*spelled_at(), tuple(self.running))
            run = (where, self.runs[where])
            self.runs[where] += 1
            if run in self.factors:
                self.met.add(run)
                self._multiply(operands, *self.factors[run], in_place=func.__name__.rstrip("_") + "_" == func.__name__)
        return func(*operands, **kwargs)

    @staticmethod
    def _multiply(operands: list[Any], position: int, factor: float, in_place: bool) -> None:
        if position == 0 and in_place:
            operands[0].mul_(factor)
        else:
            operands[position] = operands[position] * factor


def is_spread(first: torch.Size, second: torch.Size) -> bool:
    """One operand is spread over the other, or as large; such sums are counted on their line."""
    return torch.broadcast_shapes(first, second) in {first, second}


def spelled_at() -> tuple[str, int]:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(HIDDEN):
        frame = frame.f_back
    return place_of(frame)


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)


def factors_of(entry: Entry, plain: nn.Module) -> dict[Run, tuple[int, float]]:
    """Which additions of the plain model are multiplied, and by what: sizes from the entry, places from a trace.

    A declared branch that no addition is known for is multiplied by a hook on its module.
    """
    seed()
    found = trace(plain, entry.example())
    sizes = dict(zip([branch for _, branch, _ in entry.rows], entry.multipliers(), strict=True))
    groups = {str(group.handle): group for group in find_groups(plain, found, entry.kwargs.get("branches"))}
    assert groups.keys() == sizes.keys()
    factors: dict[Run, tuple[int, float]] = {}
    for branch, group in groups.items():
        known = [add for add in group.adds if add.source != "declared"]
        factors |= {(add.site, add.occurrence): (add.position, sizes[branch]) for add in known}
        if not known:
            plain.get_submodule(branch).register_forward_hook(lambda _, args, out, size=sizes[branch]: out * size)
    return factors


def results(output: Any) -> list[Tensor]:
    """The tensors of real numbers in an output of any form."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if dataclasses.is_dataclass(output):
        output = vars(output)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in results(part)]


def measured(entry: Entry, model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one run."""
    example = entry.example()
    args, kwargs = (
        ((), example) if isinstance(example, dict) else (example if isinstance(example, tuple) else (example,), {})
    )
    seed()
    with torch.set_grad_enabled(entry.gradients):
        found = results(model(*args, **kwargs))
    assert found
    followed = [tensor for tensor in found if tensor.requires_grad]
    if followed:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in followed]
        sum((tensor * weight).sum() for tensor, weight in zip(followed, weights, strict=True)).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each(PLANNED, "numbers", "train", "eval")
def test_outputs_and_gradients_are_those_of_multiplied_additions(entry: Entry, training: bool) -> None:
    plain, ours = noisy(entry.build(), std=0.1), noisy(copy.deepcopy(rewritten(entry)[0]), std=0.1)
    for model in (plain, ours):
        model.train(training)
    for module in plain.modules():  # a recomputed addition would count twice
        if hasattr(module, "checkpointing"):
            module.checkpointing = False
    with torch.set_grad_enabled(entry.gradients):
        factors = factors_of(entry, plain)
    oracle = Multiplied(plain, factors)
    with oracle.following():
        wanted, gradients = measured(entry, plain)
    assert oracle.met == set(factors)
    found, ours_gradients = measured(entry, ours)
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
