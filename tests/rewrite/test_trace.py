import copy
import copyreg
import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import looptransfer as lt
from looptransfer.rewrite.analysis import analyse
from looptransfer.rewrite.forward import call_arguments
from looptransfer.rewrite.graph import Handle
from looptransfer.rewrite.trace import Trace, trace
from looptransfer.rewrite.twin import twin_of
from tests import models
from tests.models import WIDTH, Looped, inputs, line_of, noisy, small_decoder, tokens
from tests.rewrite.answers import Stepped, refusal


def kinds(seen: Trace) -> list[tuple[str, str]]:
    """Kind of every add, in order, with the line that spelled it."""
    return [(add.kind, line_of(add.site.source)) for add in seen.adds]


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (models.ResidualMLP(), "h = h + self.f(h)"),
        (models.TorchAddMLP(), "h = torch.add(h, self.f(h))"),
        (models.BranchFirstMLP(), "h = self.f(h) + h"),
        (models.InPlaceMLP(), "h += self.f(h)"),
        (models.TheoryModel(layers=1), "h = h + layer(h)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_run_of_a_residual_add_is_a_leaf_at_its_own_line(model: nn.Module, line: str) -> None:
    assert kinds(trace(noisy(model), inputs(4, WIDTH))) == [("leaf", line)] * 3


def test_module_calls_are_counted_also_where_one_object_stands_twice() -> None:
    a, b = models.MLPBlock(), models.MLPBlock()
    calls = trace(Looped([a, a, b], 2).double(), inputs(4, WIDTH)).graph.calls
    expected = {"": 1, "blocks.0": 4, "blocks.2": 2, "blocks.0.mlp": 4, "blocks.2.mlp": 2}
    assert {name: calls[Handle(name)] for name in expected} == expected
    assert Handle("blocks.1") not in calls


def test_the_modules_that_hand_the_branch_over_come_innermost_first() -> None:
    seen = trace(models.ResidualMLP(loops=1).double(), inputs(4, WIDTH))
    (add,) = seen.adds
    assert seen.graph.nodes[add.branch].handles == [Handle("f.3"), Handle("f")]
    assert add.site.container == ("",)


def test_the_containers_of_an_add_come_outermost_first() -> None:
    seen = trace(small_decoder(layers=2, loops=1), tokens())
    assert [add.site.container for add in seen.adds] == [("", f"layers.{i}") for i in (0, 0, 1, 1)]


def test_the_parameters_of_a_branch_include_its_norm_and_nothing_of_other_branches() -> None:
    first, second = analyse(small_decoder(layers=1, loops=1), tokens()).groups
    assert first.parameters == {f"layers.0.{n}.weight" for n in ("attention_norm", "attention.qkv", "attention.out")}
    assert second.parameters == {f"layers.0.{n}.weight" for n in ("mlp_norm", "mlp.up", "mlp.down")}


def test_an_input_injection_is_composite_and_the_branch_beside_it_a_leaf() -> None:
    loop = [("leaf", "h = h + self.f(h)"), ("composite", "h = h + e")]
    assert kinds(trace(noisy(models.InjectedMLP()), inputs(4, WIDTH))) == loop * 3


def test_an_add_inside_a_branch_is_inner() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.up(x)
            return self.down(torch.relu(hidden + self.down(hidden)))

    model = models.ResidualMLP(loops=1)
    model.f = Nested()
    seen = trace(model.double(), inputs(4, WIDTH))
    assert [add.kind for add in seen.adds] == ["inner", "leaf"]


def test_adds_without_learned_matrices_between_their_operands_do_not_count() -> None:
    seen = trace(noisy(Looped([models.GeluBlock()])), inputs(4, WIDTH))
    assert kinds(seen) == [("leaf", "return x + self.f(self.rope(x))")] * 3


@pytest.mark.parametrize("block", [models.WrittenOutGelu(), models.Rotary(), nn.LayerNorm(WIDTH), nn.GELU()])
def test_activation_rotation_and_norm_alone_hold_no_residual_add(block: nn.Module) -> None:
    assert trace(Looped([block]).double(), inputs(4, WIDTH)).adds == []


def test_a_bias_added_to_a_projection_is_no_residual_add() -> None:
    class ManualLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.position = nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.position

    assert trace(Looped([ManualLinear()]).double(), inputs(4, WIDTH)).adds == []


def test_two_branches_that_see_different_inputs_are_not_stream_and_branch() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    assert trace(Sum().double(), inputs(4, WIDTH)).adds == []


def test_a_stream_behind_dropout_or_a_cast_is_still_the_stream() -> None:
    class Cast(models.ResidualMLP):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            for _ in range(self.loops):
                out = self.f(h)
                h = torch.dropout(h.float().double(), 0.5, self.training) + out
            return h

    assert [add.kind for add in trace(Cast().double(), inputs(4, WIDTH)).adds] == ["leaf"] * 3


def test_meta_tensors_are_traced_without_numbers() -> None:
    seen = trace(models.ResidualMLP().to("meta"), torch.empty(4, WIDTH, device="meta"))
    assert [add.kind for add in seen.adds] == ["leaf"] * 3


def test_no_hooks_stay_behind() -> None:
    registered = [torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks]
    before = [len(hooks) for hooks in registered]
    model = models.ResidualMLP().double()
    trace(model, inputs(4, WIDTH))
    with pytest.raises(lt.InputError):
        trace(model, inputs(4, WIDTH + 1))
    assert [len(hooks) for hooks in registered] == before


def test_example_inputs_are_a_tensor_a_tuple_or_keywords() -> None:
    x = inputs(2)
    assert call_arguments(x) == ((x,), {})
    assert call_arguments((x, 3)) == ((x, 3), {})
    assert call_arguments({"x": x}) == ((), {"x": x})


def test_example_inputs_may_stand_in_an_object() -> None:
    class Batch:
        def __init__(self) -> None:
            self.x = inputs(4, WIDTH).float()

    class Unpacks(models.ResidualMLP):
        def forward(self, batch: Batch) -> torch.Tensor:
            return super().forward(batch.x)

    assert len(trace(Unpacks(), (Batch(),)).of("leaf")) == 3


def test_the_twin_is_full_of_non_zero_numbers_and_always_the_same() -> None:
    model = small_decoder()
    nn.init.zeros_(model.layers[0].mlp.down.weight)
    first, second = twin_of(model, randomised=True), twin_of(model, randomised=True)
    assert all((p != 0).all() for p in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.head.weight is first.embedding.weight
    assert not model.layers[0].mlp.down.weight.any()


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = models.ResidualMLP()
    model.f[0].handle = {"lines": (line for line in [""])}
    with pytest.raises(
        lt.InputError,
        match=r"cannot be copied for the trace: TypeError: .*generator.*; take f\.0\.handle off the model",
    ):
        twin_of(model, randomised=True)


def test_what_cannot_be_copied_and_is_no_weight_is_shared_with_the_twin(tmp_path: Path) -> None:
    class Locked(models.ResidualMLP):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            with self.lock:
                return super().forward(h)

    def known() -> dict[type, Any]:
        return dict(copyreg.dispatch_table)

    before, model = known(), Locked()
    model.lock, model.queue, model.files = threading.Lock(), queue.Queue(), [(tmp_path / "log").open("w"), math]
    twin = twin_of(model)
    assert twin.lock is model.lock
    assert twin.files == model.files
    assert twin.queue is not model.queue
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert known() == before
    model.files[0].close()
    assert lt.parametrize(model, inputs(4, WIDTH).float()).loops == 3
    assert not model.lock.locked()


def test_an_object_that_refuses_to_be_copied_is_named() -> None:
    class Alone:
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("there is but one")

    model = models.ResidualMLP()
    model.own = Alone()
    with pytest.raises(lt.InputError, match=r"RuntimeError: there is but one; take own off the model for the call"):
        twin_of(model)


def test_a_skip_scaled_by_a_constant_tensor_is_no_residual_add() -> None:
    class Decayed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = torch.nn.Linear(8, 8)
            self.register_buffer("decay", torch.full((8,), 0.9))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                h = h * self.decay + self.f(h)
            return h

    with pytest.raises(lt.InputError, match=r"data meets what learned matrices made of it"):
        lt.parametrize(Decayed(), torch.ones(2, 8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_refused_with_what_to_give() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2, WIDTH), torch.ones(3, WIDTH)], layout=torch.jagged)
    with pytest.raises(lt.InputError, match="a nested tensor, which the trace cannot follow; give a padded one"):
        lt.parametrize(models.ResidualMLP(), ragged)


def test_a_model_that_only_the_trace_cannot_run_is_told_from_wrong_inputs_with_its_line() -> None:
    class Watchful(models.ResidualMLP):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            assert not is_in_torch_dispatch_mode()
            return super().forward(h)

    line = r", line \d+: assert not is_in_torch_dispatch_mode\(\)"
    with pytest.raises(lt.InputError, match=rf"the trace cannot follow this model, which runs without it .*{line}"):
        lt.parametrize(Watchful(), torch.ones(3, 2, WIDTH))


def test_a_branch_inside_vmap_is_found() -> None:
    class Mapped(models.ResidualMLP):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return torch.vmap(super().forward)(h)

    assert lt.parametrize(Mapped().double(), inputs(3, 2, WIDTH)).loops == 3


def test_a_tensor_that_another_thread_made_is_refused_at_the_line_that_uses_it() -> None:
    class Threaded(models.ResidualMLP):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as pool:
                return h + pool.submit(self.f, h).result()

    with pytest.raises(lt.InputError, match="a tensor that the trace did not see being made") as caught:
        lt.parametrize(Threaded().double(), inputs(3, WIDTH))
    place = str(caught.value).split(" ")[1]
    assert line_of(place) == "return h + pool.submit(self.f, h).result()"


Step = Callable[[Any, torch.Tensor], torch.Tensor]

HIDDEN: dict[str, tuple[Any, Step]] = {
    "an attribute": (torch.ones(WIDTH, WIDTH).requires_grad_(), lambda m, h: h + h @ m.hidden),
    "parameters in a list": ([nn.Parameter(torch.ones(WIDTH, WIDTH))], lambda m, h: h + h @ m.hidden[0]),
    "a module in a list": ([nn.Linear(WIDTH, WIDTH)], lambda m, h: h + m.hidden[0](h)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_trained_weights_that_are_not_registered_are_refused_at_the_line_that_computes_with_them(name: str) -> None:
    hidden, step = HIDDEN[name]
    message = refusal(Stepped(step, hidden=hidden), "m.hidden", inputs(3, WIDTH).float())
    assert f"a trained tensor of shape ({WIDTH}, {WIDTH}) that is no parameter of it" in message
    assert "Register it: nn.Parameter, nn.ParameterList, nn.ModuleList" in message


def put_in(m: Any, h: torch.Tensor) -> torch.Tensor:
    own = {name: p.detach().clone().requires_grad_() for name, p in m.f[1].named_parameters()}
    return m.f[3](torch.func.functional_call(m.f[1], own, (h,)))  # type: ignore[no-any-return]


KNOWN: dict[str, tuple[Any, Step]] = {
    "made in the forward": (None, lambda m, h: h @ nn.Parameter(m.f[3].weight.detach()[:, :WIDTH])),
    "put in for a call": (None, put_in),
    "a frozen module in a list": ([nn.Linear(WIDTH, WIDTH).requires_grad_(False)], lambda m, h: m.hidden[0](h)),
    "a module in a list, without gradients": ([nn.Linear(WIDTH, WIDTH)], lambda m, h: torch.no_grad()(m.hidden[0])(h)),
    "a table in a list": ([nn.Embedding(3, WIDTH)], lambda m, h: h + m.hidden[0](torch.arange(3))),
    "a gain": (torch.ones(WIDTH).requires_grad_(), lambda m, h: h * m.hidden),
}


class Ended(models.ResidualMLP):
    """A loop, and something that a test does with its end."""

    def __init__(self, end: Step, hidden: Any) -> None:
        super().__init__()
        self.end, self.hidden = end, hidden

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.end(self, super().forward(h))


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_no_trained_matrix_of_the_models_needs_no_registration(name: str) -> None:
    hidden, end = KNOWN[name]
    model = Ended(end, copy.deepcopy(hidden))
    plan = lt.parametrize(model, inputs(3, WIDTH).float().requires_grad_())
    assert [(str(branch.handle), branch.visits) for branch in plan.branches] == [("f", 3)]


def test_a_registered_weight_may_stand_in_a_list_too() -> None:
    model = Ended(lambda m, h: h @ m.hidden[0][:WIDTH].detach() @ m.hidden[0][:WIDTH], None)
    model.hidden = [model.f[1].weight]
    assert lt.parametrize(model, inputs(3, WIDTH).float()).loops == 3
