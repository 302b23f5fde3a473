import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import looptransfer as lt
from looptransfer.errors import InputError
from looptransfer.trials.bound import values_of
from looptransfer.trials.function import Function
from looptransfer.trials.run import Trial
from tests.trainings import loss_of

WIDTH = 8


@dataclass
class Trainer:
    offset: Any

    def __call__(self, run: Trial) -> float:
        return loss_of(run) + self.offset

    def train(self, run: Trial) -> float:
        return loss_of(run) + self.offset


def shifted(run: Trial, offset: Any = 0.0) -> float:
    return loss_of(run) + offset


def closed(offset: Any) -> Callable[[Trial], float]:
    def train(run: Trial) -> float:
        return loss_of(run) + offset

    return train


def defaulted(offset: Any) -> Callable[[Trial], float]:
    def train(run: Trial, *, offset: Any = offset) -> float:
        return loss_of(run) + offset

    return train


def decorated(offset: Any) -> Callable[[Trial], float]:
    function = closed(offset)

    @functools.wraps(function)
    def call(run: Trial) -> float:
        return function(run)

    return call


def without_source(offset: Any) -> Any:
    names: dict[str, Any] = {"loss_of": loss_of}
    exec(f"def train(run): return loss_of(run) + {offset}", names)
    return names["train"]


def wide(run: Trial) -> float:
    return loss_of(run) + WIDTH


KINDS: dict[str, Callable[[Any], Any]] = {
    "partial": lambda offset: functools.partial(shifted, offset=offset),
    "positional": lambda offset: functools.partial(lambda offset, run: shifted(run, offset), offset),
    "object": Trainer,
    "method": lambda offset: Trainer(offset).train,
    "closure": closed,
    "default": defaulted,
    "decorator": decorated,
    "without source": without_source,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_is_bound_to_another_value_is_another(kind: str) -> None:
    first, again, other = (Function(KINDS[kind](offset)).identity() for offset in (1, 1, 5))
    assert first == again != other


def test_lambdas_of_one_line_are_told_apart() -> None:
    first, second = (lambda run: 2.0), (lambda run: 3.0)
    assert Function(first).identity() != Function(second).identity()


def test_a_constant_of_the_module_that_the_function_reads_tells_it_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Function(wide).identity()
    assert first["value"] == {"WIDTH": 8}
    monkeypatch.setitem(wide.__globals__, "WIDTH", 16)
    assert Function(wide).identity()["value"] == {"WIDTH": 16}
    assert Function(wide, version="1").identity() == Function(wide, version="1").identity()


def test_a_partial_argument_goes_before_the_default() -> None:
    assert values_of(functools.partial(shifted, offset=3)) == {"offset": 3}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"width": 8}, {"width": 16}),
        ([1, (2, 3)], [1, (2, 4)]),
        ("adamw", "muon"),
        (Trainer({"width": 8}), Trainer({"width": 16})),
        ({1, 2}, {1, 3}),
    ],
)
def test_containers_and_objects_of_the_users_own_count_by_what_they_hold(first: Any, second: Any) -> None:
    assert values_of(closed(first)) != values_of(closed(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(2), torch.ones(3)),
        (torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)),
        (object(), object()),
        ({"model": torch.zeros(1)}, {"model": torch.ones(1)}),
        (itertools.count(), itertools.count(5)),
    ],
)
def test_of_all_else_the_type_counts_alone(first: Any, second: Any) -> None:
    assert values_of(closed(first)) == values_of(closed(second))


def test_a_value_that_holds_itself_comes_to_an_end() -> None:
    ring: list[Any] = [1]
    ring.append(ring)

    def train(run: Trial) -> float:
        return train(run) + ring[0]

    assert set(values_of(train)) == {"ring", "train"}


def test_very_many_values_cost_little() -> None:
    assert values_of(closed([[number] * 100 for number in range(10**5)]))["offset"]


def test_the_identity_is_the_same_in_other_processes_whatever_the_hashes(tmp_path: Path) -> None:
    script = tmp_path / "bound_training.py"
    script.write_text(
        "import functools, json, torch, looptransfer as lt\n"
        "class Config:\n    def __init__(self): self.names, self.model = {'a', 'b', 'c'}, torch.zeros(2)\n"
        "KNOWN = {'x', 'y'}\n"
        "def train(run, config, data={'b': 1, 'a': None}): return KNOWN, config, data\n"
        "bound = functools.partial(train, config=Config())\n"
        "if __name__ == '__main__': print(json.dumps(lt.Function(bound).identity()))\n"
    )
    imported = (
        "import json, looptransfer as lt, bound_training as b; print(json.dumps(lt.Function(b.bound).identity()))"
    )
    said = [
        subprocess.run(
            [sys.executable, *command],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for command, seed in ((["bound_training.py"], "1"), (["bound_training.py"], "2"), (["-c", imported], "3"))
    ]
    assert said[0] == said[1] == said[2]
    assert set(json.loads(said[0])["value"]) == {"KNOWN", "config", "data"}


def swept(train: Any, ledger: Path) -> Any:
    return lt.sweep(train, [1, 2], lrs=[2.0**-8], seeds=2, ledger=ledger, workers=1)


def test_a_ledger_refuses_a_function_that_is_bound_to_another_value_and_names_it(tmp_path: Path) -> None:
    swept(functools.partial(shifted, offset=0.0), tmp_path / "l.db")
    with pytest.raises(InputError, match=r"another experiment \(value offset: 0.0 there, 5.0 here\).*version="):
        swept(functools.partial(shifted, offset=5.0), tmp_path / "l.db")


def test_what_a_training_changes_does_not_refuse_it(tmp_path: Path) -> None:
    seen: list[int] = []
    cache: dict[int, float] = {}
    count = 0

    def train(run: Trial) -> float:
        nonlocal count
        count += 1
        seen.append(run.seed)
        return cache.setdefault(len(cache), loss_of(run))

    assert swept(train, tmp_path / "l.db").equals(swept(train, tmp_path / "l.db"))
    assert count == len(seen) > 0


def test_an_object_that_counts_its_trainings_is_not_refused(tmp_path: Path) -> None:
    class Counting(Trainer):
        def __call__(self, run: Trial) -> float:
            self.offset += 0.001
            self.last = run.seed
            return super().__call__(run)

    trainer = Counting(0.0)
    for _ in range(2):
        swept(trainer, tmp_path / "l.db")


def test_a_generator_that_is_bound_is_described_too() -> None:
    def make(offset: float) -> Any:
        def train(run: Trial) -> Iterator[tuple[int, float]]:
            yield 1, loss_of(run) + offset

        return train

    assert values_of(make(1.0)) == {"offset": 1.0}
