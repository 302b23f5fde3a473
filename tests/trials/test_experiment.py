import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from looptransfer.errors import InputError
from looptransfer.trials.hooks import token_loss
from looptransfer.trials.run import pickled
from tests.experiments import LoopedMLP, tiny_experiment


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_fewer_than_two_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps is {steps}; a run needs 2 or more"):
        tiny_experiment(steps=steps)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": ""}, "name is ; give a word"),
        ({"make_model": LoopedMLP(1)}, None),
        ({"batches": []}, r"batches is \[\]; it must be a function, called as batches\(seed\)"),
        ({"held_out": [1]}, r"held_out is \[1\]; it must be a function"),
        ({"loops": 4}, "loops is 4; give N -> mean loop count, such as loops=float"),
        ({"steps": "30"}, "steps is 30; a run needs 2 or more, as an int"),
        ({"clip": math.nan}, "clip is nan; it must be a finite number above 0"),
        ({"clip": math.inf}, "clip is inf"),
        ({"betas": [0.9, 1]}, "betas is"),
        ({"base_layers": True}, "base_layers is True"),
        ({"settings": {"data": object()}}, "settings must hold JSON values only"),
        ({"settings": {"x": math.inf}}, "settings must hold JSON values only"),
        ({"branches": "block"}, "branches is block; give names"),
        ({"on_stream": "keep"}, "on_stream is keep; choose scale or leave"),
    ],
)
def test_values_of_the_wrong_type_or_out_of_range_are_refused(change: dict[str, Any], said: str | None) -> None:
    if said is None:
        tiny_experiment(**change)
        return
    with pytest.raises(InputError, match=said):
        tiny_experiment(**change)


@pytest.mark.parametrize("warmup", [0.0, 1.0, -0.5, 30.0, float("nan")])
def test_a_warmup_that_is_no_share_of_the_steps_is_refused(warmup: float) -> None:
    with pytest.raises(InputError, match=r"warmup is .* between 0 and 1"):
        tiny_experiment(warmup=warmup)


@settings(derandomize=True, deadline=None)
@given(steps=st.integers(4, 500), warmup=st.floats(0.01, 0.8))
def test_the_lr_rises_linearly_to_its_peak_falls_linearly_and_ends_above_zero(steps: int, warmup: float) -> None:
    shares = [tiny_experiment(steps=steps, warmup=warmup).lr_share(step) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert max(shares) == 1.0
    assert shares.index(1.0) == rise - 1
    assert min(shares) > 0
    assert shares[:rise] == pytest.approx([(k + 1) / rise for k in range(rise)])
    fall = steps - rise
    assert shares[rise:] == pytest.approx([1 - k / fall for k in range(fall)])
    assert shares[-1] == pytest.approx(1 / fall)


def test_the_identity_is_json_and_holds_what_makes_runs_comparable() -> None:
    identity = tiny_experiment(settings={"corpus": "abc"}).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["corpus"] == "abc"
    assert identity["steps"] == 30
    assert {"torch", "looptransfer", "machine"} <= identity.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"steps": 31},
        {"warmup": 0.4},
        {"weight_decay": 0.2},
        {"betas": (0.9, 0.99)},
        {"clip": 2.0},
        {"lam": 0.5},
        {"base_layers": 2},
        {"settings": {"width": 16}},
        {"branches": ["block"]},
        {"layers": 2},
        {"loops": float},
        {"on_stream": "leave"},
    ],
)
def test_the_identity_tells_experiments_apart(change: dict[str, Any]) -> None:
    assert tiny_experiment(**change).identity() != tiny_experiment().identity()


def test_an_experiment_of_module_level_functions_is_portable() -> None:
    experiment = tiny_experiment()
    assert pickle.loads(pickled(experiment)).identity() == experiment.identity()


def test_an_experiment_with_a_local_function_is_refused_and_told_how_to_mend_it() -> None:
    def make_model(loops: int) -> nn.Module:
        return LoopedMLP(loops)

    with pytest.raises(InputError, match="define its functions at the top level of a module, or pass workers=1"):
        pickled(tiny_experiment(make_model=make_model))


def test_the_token_loss_is_the_mean_cross_entropy_over_all_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(7, (3, 5), generator=generator)
    by_hand = -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(token_loss(logits, targets), by_hand)
