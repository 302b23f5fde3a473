import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt
from looptransfer.errors import InputError
from looptransfer.trials import training as training_module
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.hooks import held_out_loss, on_device, seeded
from looptransfer.trials.run import Outcome, Run, Trial
from looptransfer.trials.training import CHECKPOINT, HOPELESS, Training
from tests.experiments import BATCH, FEATURES, LoopedMLP, TinyTask, squared_error, tiny_experiment

LR = 2.0**-5
NOWHERE = Path(tempfile.gettempdir(), f"looptransfer-{os.getpid()}")  # of this process: others test beside it
Rules = Literal["factored", "sqrt", "unscaled"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_cpu(run: Run, directory: Path = NOWHERE) -> Trial:
    return Trial(**asdict(run), device="cpu", directory=directory)


def train(experiment: Experiment, run: Run) -> Outcome:
    return experiment.train(on_cpu(run))


def outcome(run: Run, **changes: Any) -> dict[str, Any]:
    found = asdict(train(tiny_experiment(**changes), run))
    del found["seconds"]
    return found


def training_losses(run: Run, **changes: Any) -> list[float]:
    """What the loss was at every step, the held-out batches left out."""
    seen: list[float] = []

    def recorded(outputs: Tensor, targets: Tensor) -> Tensor:
        value = squared_error(outputs, targets)
        if len(targets) == BATCH:
            seen.append(float(value.detach()))
        return value

    train(tiny_experiment(loss=recorded, **changes), run)
    return seen


def test_training_twice_gives_the_same_outcome_whatever_the_random_state_before() -> None:
    run = Run("factored", 2, LR, 3)
    first = outcome(run)
    torch.rand(17)
    assert outcome(run) == first
    assert first["diverged"] is False
    assert math.isfinite(first["loss"])
    assert (first["steps"], first["layers"], first["width"]) == (30, 1, 8)


def test_training_at_a_good_lr_lowers_the_loss() -> None:
    losses = training_losses(Run("factored", 2, LR, 0))
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("other", [Run("factored", 1, 4 * LR, 0), Run("unscaled", 1, LR, 0), Run("sqrt", 1, LR, 0)])
def test_runs_of_one_seed_start_alike_whatever_their_lr_and_rule(other: Run) -> None:
    ours, theirs = training_losses(Run("factored", 1, LR, 0)), training_losses(other)
    assert theirs[0] == ours[0]
    assert (theirs == ours) == (other.lr == LR)  # at N = 1 and base depth the rules are one


def test_runs_of_one_seed_share_initialisation_over_the_loop_counts() -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    class Watched(TinyTask):
        def make_model(self, loops: int) -> nn.Module:
            model = super().make_model(loops)
            seen[loops] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            return model

    for loops in (1, 4):
        train(tiny_experiment(make_model=Watched().make_model, steps=2), Run("factored", loops, LR, 5))
    assert seen[1].keys() == seen[4].keys()
    assert all(torch.equal(seen[1][name], seen[4][name]) for name in seen[1])


def test_runs_of_other_seeds_start_otherwise() -> None:
    first = [training_losses(Run("factored", 1, LR, seed), steps=2)[0] for seed in (0, 1)]
    assert first[0] != first[1]


def test_the_rule_changes_a_run_at_more_than_one_loop() -> None:
    rules: list[Rules] = ["factored", "sqrt", "unscaled"]
    assert len({training_losses(Run(rule, 4, LR, 0), steps=2)[0] for rule in rules}) == 3


@pytest.mark.parametrize("lr", [1e4, 1e8])
def test_an_absurd_lr_diverges_early(lr: float) -> None:
    found = train(tiny_experiment(), Run("factored", 2, lr, 0))
    assert found.diverged
    assert found.loss == math.inf
    assert 0 < found.steps < 30
    assert math.isfinite(found.last_loss)


def test_a_run_that_stays_worse_than_at_initialisation_is_given_up_after_twenty_steps() -> None:
    losses = training_losses(Run("factored", 2, 1.0, 0), clip=1e-3, weight_decay=0.0)
    assert sum(losses[:HOPELESS]) / HOPELESS > losses[0]
    assert all(map(math.isfinite, losses))
    assert len(losses) == HOPELESS
    found = train(tiny_experiment(clip=1e-3, weight_decay=0.0), Run("factored", 2, 1.0, 0))
    assert (found.loss, found.diverged, found.steps) == (math.inf, True, HOPELESS - 1)
    assert found.last_loss == losses[-2]


def test_a_slow_start_is_no_divergence_while_the_lr_rises() -> None:
    """The LR is next to nothing, and the losses of batches lie about the first one, on either side."""
    for lr, seed in product((1e-9, 1e-3, 1e-2, 3e-2), range(6)):
        run = train(tiny_experiment(steps=60, warmup=0.9), Run("factored", 2, lr, seed))
        assert run.steps >= 54


def test_a_model_whose_held_out_loss_is_no_number_has_diverged_at_the_full_steps() -> None:
    def held_out() -> list[tuple[Tensor, Tensor]]:
        inputs, targets = TinyTask().held_out()[0]
        return [(inputs, targets * math.nan)]

    found = train(tiny_experiment(held_out=held_out), Run("factored", 1, LR, 0))
    assert (found.loss, found.diverged, found.steps) == (math.inf, True, 30)
    assert math.isfinite(found.last_loss)


def test_batches_that_run_out_are_an_error_and_not_repeated() -> None:
    def two(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        endless = TinyTask().batches(seed)
        return iter([next(endless), next(endless)])

    with pytest.raises(InputError, match=r"batches\(0\) ended after 2 of the 30 .*test_training.py, line \d+\)"):
        train(tiny_experiment(batches=two), Run("factored", 1, LR, 0))
    assert train(tiny_experiment(batches=two, steps=2), Run("factored", 1, LR, 0)).steps == 2


def test_inputs_by_name_and_by_position_train_alike() -> None:
    def by_name(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        return (({"inputs": inputs}, targets) for inputs, targets in TinyTask().batches(seed))

    def by_position(seed: int) -> Iterator[tuple[tuple[Tensor], Tensor]]:
        return (((inputs,), targets) for inputs, targets in TinyTask().batches(seed))

    run = Run("factored", 2, LR, 0)
    assert outcome(run, batches=by_name) == outcome(run, batches=by_position) == outcome(run)


def test_training_leaves_all_random_states_as_they_were() -> None:
    def states() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = states()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    train(tiny_experiment(steps=2), Run("factored", 2, LR, 0))
    assert states() == before


class Normed(LoopedMLP):
    """A norm on the stream: its gain is visited N times outside every branch."""

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = self.norm(stream + self.block(stream))
        return self.head(stream)


class DrawnDepth(LoopedMLP):
    """Loops N times on average, 2 to 2N − 2 times in a forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(2 + int(torch.randint(2 * self.loops - 3, ()))):
            stream = stream + self.block(self.norm(stream))
        return self.head(stream)


def training(make_model: Any, count: int = 4, **options: Any) -> Training:
    with seeded(0):
        return Training(tiny_experiment(make_model=make_model, **options), on_cpu(Run("factored", count, LR, 0)))


def test_branches_and_layers_reach_the_rewriting_and_on_stream_the_optimizer() -> None:
    plan = training(LoopedMLP, branches=["block"], layers=4).plan
    assert (plan.declared, plan.layers) == (True, 4)
    scaled, left = ([lr for _, lr in training(Normed, on_stream=choice).base_lrs] for choice in ("scale", "leave"))
    assert min(scaled) / max(scaled) == pytest.approx(1 / 4)
    assert min(left) == max(left)


@pytest.mark.parametrize("seed", range(5, 8))
def test_a_loop_count_that_is_drawn_is_refused_without_its_mean(seed: int) -> None:
    experiment = tiny_experiment(make_model=DrawnDepth)
    with pytest.raises(InputError, match=r"loops another number of times.*Experiment\(…, loops=float\)"):
        train(experiment, Run("factored", 8, LR, seed))


def test_the_mean_of_a_loop_count_that_is_drawn_sets_the_multiplier() -> None:
    plan = training(DrawnDepth, 8, loops=float).plan
    assert (plan.random_loops, plan.loops) == (True, 8)
    assert training(DrawnDepth, 8, loops=twice).plan.loops == 16


def twice(loops: int) -> float:
    return 2.0 * loops


@pytest.mark.parametrize("rule", ["factored", "sqrt", "unscaled"])
def test_a_model_that_make_model_rewrote_is_taken_and_its_rule_exchanged(rule: Rules) -> None:
    def rewritten(loops: int) -> nn.Module:
        model = LoopedMLP(loops)
        lt.parametrize(model, torch.ones(2, FEATURES))
        return model

    run = Run(rule, 4, LR, 0)
    assert outcome(run, make_model=rewritten) == outcome(run)


def test_a_model_rewritten_for_another_base_depth_is_refused() -> None:
    def rewritten(loops: int) -> nn.Module:
        model = LoopedMLP(loops)
        lt.parametrize(model, torch.ones(2, FEATURES), base_layers=2)
        return model

    with pytest.raises(InputError, match=r"with lam=1, base_layers=2, and the experiment says lam=1, base_layers=1 \("):
        train(tiny_experiment(make_model=rewritten), Run("factored", 4, LR, 0))


def test_the_held_out_loss_counts_each_batch_alike_and_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5))
    batches = TinyTask().held_out()
    small = (batches[1][0][:3], batches[1][1][:3])
    with torch.no_grad():
        by_hand = [float(squared_error(model[0](inputs), targets)) for inputs, targets in (batches[0], small)]
    found = held_out_loss(tiny_experiment(held_out=lambda: [batches[0], small]), model)
    assert found == pytest.approx(sum(by_hand) / 2)


def test_no_held_out_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"held_out\(\) gave no batch; it must give one or more, and end"):
        train(tiny_experiment(held_out=list, steps=2), Run("factored", 1, LR, 0))


def test_the_samples_of_the_tiny_task_depend_on_nothing_but_the_seed() -> None:
    ours, theirs = next(TinyTask().batches(3)), next(TinyTask().batches(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], next(TinyTask().batches(4))[0])


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0.9), (10, 0.96)])
def test_a_warm_up_of_nearly_all_steps_leaves_one_to_come_down(steps: int, warmup: float) -> None:
    experiment = tiny_experiment(steps=steps, warmup=warmup)
    assert [experiment.lr_share(step) for step in (steps - 2, steps - 1)] == [1.0, 1.0]


# -- from a checkpoint


class Dropping(LoopedMLP):
    """Draws from torch's random state in every forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(inputs, 0.1, self.training))


class StopError(Exception):
    pass


def stopped_at(last: int, directory: Path, **changes: Any) -> Outcome:
    """A run with a checkpoint at every step, which is stopped before step `last` and then made again."""

    def stop(run: Trial, step: int, loss: float) -> None:
        if step == last:
            raise StopError

    run = on_cpu(Run("factored", 2, LR, 3), directory)
    with pytest.raises(InputError, match="StopError"):
        tiny_experiment(log=stop, **changes).train(run)
    assert (directory / CHECKPOINT).exists() == (last > 0)
    return tiny_experiment(**changes).train(run)


def undisturbed(**changes: Any) -> Outcome:
    return train(tiny_experiment(**changes), Run("factored", 2, LR, 3))


def same(first: Outcome, second: Outcome) -> bool:
    return replace(first, seconds=0.0) == replace(second, seconds=0.0)


@pytest.fixture
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "CHECKPOINT_EVERY", 0.0)


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("last", [0, 1, 13, 29])
def test_a_run_that_was_stopped_goes_on_to_the_very_same_result(tmp_path: Path, last: int) -> None:
    changes = {"make_model": Dropping}
    assert same(stopped_at(last, tmp_path, **changes), undisturbed(**changes))
    assert not list(tmp_path.iterdir())


def from_all_random_states(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose order is drawn from the states that the training draws from as well."""
    while True:
        shift = float(torch.rand(())) + np.random.rand() + random.random()
        yield torch.full((BATCH, FEATURES), shift), torch.full((BATCH, 1), shift)


@pytest.mark.usefixtures("_every_step")
def test_batches_from_the_global_random_states_go_on_as_they_were(tmp_path: Path) -> None:
    changes = {"batches": from_all_random_states}
    assert same(stopped_at(17, tmp_path, **changes), undisturbed(**changes))


@pytest.mark.usefixtures("_every_step")
def test_a_run_whose_batches_cannot_be_had_again_is_made_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"batches": from_all_random_states, "make_model": Dropping}  # which draws between the batches
    assert same(stopped_at(17, tmp_path, **changes), undisturbed(**changes))
    assert "does not fit: batches gives other batches now" in capsys.readouterr().err


@pytest.mark.usefixtures("_every_step")
def test_optimizers_of_ones_own_go_on_as_they_were(tmp_path: Path) -> None:
    changes = {"optimizer": matrices_apart, "schedule": flat_then_down, "autocast": torch.bfloat16, "clip": None}
    assert same(stopped_at(17, tmp_path, **changes), undisturbed(**changes))


@pytest.mark.usefixtures("_every_step")
def test_a_run_that_was_given_up_is_given_up_again(tmp_path: Path) -> None:
    changes = {"clip": 1e-3, "weight_decay": 0.0}
    run = Run("factored", 2, 1.0, 0)
    with pytest.raises(InputError, match="StopError"):
        tiny_experiment(log=partial(stop_at, HOPELESS - 3), **changes).train(on_cpu(run, tmp_path))
    assert same(tiny_experiment(**changes).train(on_cpu(run, tmp_path)), train(tiny_experiment(**changes), run))


def stop_at(last: int, run: Trial, step: int, loss: float) -> None:
    if step == last:
        raise StopError


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_checkpoint_that_cannot_be_used_is_told_and_left_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    if damage is None:
        stopped_at(5, tmp_path / "other", make_model=LoopedMLP)
        torch.save({"step": 3}, tmp_path / CHECKPOINT)
    else:
        (tmp_path / CHECKPOINT).write_bytes(damage)
    found = tiny_experiment().train(on_cpu(Run("factored", 2, LR, 3), tmp_path))
    assert same(found, undisturbed())
    assert re.search("cannot be read|does not fit", capsys.readouterr().err)


@pytest.mark.usefixtures("_every_step")
def test_a_checkpoint_is_never_unpickled(tmp_path: Path) -> None:
    torch.save({"step": Bomb(tmp_path / "gone off")}, tmp_path / CHECKPOINT)
    tiny_experiment(steps=2).train(on_cpu(Run("factored", 2, LR, 3), tmp_path))
    assert not (tmp_path / "gone off").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


KILLED = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
from looptransfer.trials import training
from looptransfer.trials.run import Trial
from tests.experiments import tiny_experiment

training.CHECKPOINT_EVERY = 0.0
folder = Path(sys.argv[1])

def log(run, step, loss):
    with (folder / "steps").open("a") as steps:
        print(step, file=steps)
    time.sleep(0.02)

outcome = tiny_experiment(log=log).train(Trial("factored", 2, 2.0**-5, 3, device="cpu", directory=folder / "run"))
(folder / "outcome").write_text(json.dumps(asdict(outcome)))
"""


def test_a_run_that_is_killed_goes_on_to_the_very_same_result(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command)
    while not steps.exists() or steps.read_text().count("\n") < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = steps.read_text().split()
    subprocess.run(command, check=True)
    after = steps.read_text().split()[len(before) :]
    assert int(before[-1]) in {int(after[0]), int(after[0]) - 1}
    assert same(Outcome(**json.loads((tmp_path / "outcome").read_text())), undisturbed())


# -- with what the user brings


def matrices_apart(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Two optimizers, as with Muon."""
    groups = lt.param_groups(model, torch.optim.AdamW, lr=lr)
    return [torch.optim.AdamW(groups[:1]), torch.optim.AdamW(groups[1:], betas=(0.8, 0.9))]


def flat_then_down(step: int, steps: int) -> float:
    return min(1.0, 2 * (steps - step) / steps)


def plain_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    groups = lt.param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=0.1)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def test_an_optimizer_that_is_the_default_trains_as_the_default() -> None:
    run = Run("factored", 2, LR, 0)
    assert outcome(run, optimizer=plain_adamw) == outcome(run)
    assert outcome(run, optimizer=matrices_apart) != outcome(run)


def test_the_schedule_sets_the_share_of_every_groups_lr() -> None:
    seen: list[list[float]] = []

    def watched(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([{"params": [p], "lr": lr * k} for k, p in enumerate(model.parameters(), 1)])
        optimizer.register_step_pre_hook(lambda one, *_: seen.append([group["lr"] for group in one.param_groups]))
        return optimizer

    train(tiny_experiment(optimizer=watched, schedule=flat_then_down, steps=4), Run("factored", 2, 0.5, 0))
    assert [lrs[0] for lrs in seen] == [0.5, 0.5, 0.5, 0.25]
    assert all(lrs == pytest.approx([k * lrs[0] for k in range(1, len(lrs) + 1)]) for lrs in seen)


@pytest.mark.parametrize("given", [None, [], 3, [torch.optim.AdamW]])
def test_what_is_no_optimizer_is_refused(given: Any) -> None:
    with pytest.raises(
        InputError, match=r"optimizer\(model, 0.03125\) gives .*test_training.py, line \d+\); it must ret"
    ):
        train(tiny_experiment(optimizer=lambda model, lr: given), Run("factored", 2, LR, 0))


def test_autocast_runs_the_forward_in_bfloat16_and_keeps_the_weights() -> None:
    kinds = []

    class Watched(LoopedMLP):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            kinds.append((self.head.weight.dtype, outputs.dtype))
            return outputs

    train(tiny_experiment(make_model=Watched, autocast=torch.bfloat16, steps=2), Run("factored", 2, LR, 0))
    assert kinds[-1] == (torch.float32, torch.bfloat16)
    assert outcome(Run("factored", 2, LR, 0), autocast=torch.bfloat16) != outcome(Run("factored", 2, LR, 0))


def test_a_batch_that_is_a_dict_is_the_arguments_and_what_the_loss_is_given() -> None:
    def as_dict(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"inputs": batch[0], "labels": batch[1]}

    class Named(LoopedMLP):
        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return squared_error(super().forward(inputs), labels)

    changes = {
        "make_model": Named,
        "batches": lambda seed: map(as_dict, TinyTask().batches(seed)),
        "held_out": lambda: map(as_dict, TinyTask().held_out()),
        "loss": lambda output, batch: output + 0 * batch["labels"].sum(),
    }
    run = Run("factored", 2, LR, 0)
    assert outcome(run, **changes) == outcome(run)


def test_every_step_is_logged_with_its_loss() -> None:
    seen: list[tuple[int, float]] = []
    run = Run("factored", 2, LR, 0)
    train(tiny_experiment(log=lambda trial, step, loss: seen.append((step, loss))), run)
    assert [step for step, _ in seen] == list(range(30))
    assert [loss for _, loss in seen] == training_losses(run)


def test_model_and_batches_are_moved_to_the_runs_device() -> None:
    moved: list[str] = []

    class Watched(LoopedMLP):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moved.append(device)
            return self

    assert on_device((torch.ones(2), 3), "meta", None)[0].is_meta
    with seeded(0):
        training = Training(tiny_experiment(make_model=Watched), on_cpu(Run("factored", 2, LR, 0)))
    assert moved == ["cpu"]
    assert training.batch[0].device.type == "cpu"
