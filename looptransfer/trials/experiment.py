"""An experiment, as a user hands it in to be tuned: a model factory, batches, a loss."""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from looptransfer.checks import is_count, is_number
from looptransfer.errors import InputError
from looptransfer.rules import Rule
from looptransfer.trials.hooks import Batches, token_loss
from looptransfer.trials.pairing import Start, check_start, probe
from looptransfer.trials.run import Outcome, Trial
from looptransfer.trials.training import train
from looptransfer.user_code import qualified


@dataclass(frozen=True)
class Experiment:
    """A training run as a function of rule, loop count, LR and seed, for those who have no training loop of their own.

    Training is AdamW with linear warm-up and linear decay to zero, gradients clipped, unless `optimizer` and `schedule`
    say otherwise, and ends with the loss on a fixed held-out set. Runs of one seed share initialisation and data order
    whatever their LR, loop count and rule (paired seeds). Worker processes receive the experiment by pickle, so its
    callables live at module level. Model and batches are moved to the worker's device; on a CPU a run has one thread.
    A run that is killed goes on from its last checkpoint, one a minute, on a CPU to the very same result.

    A model that `make_model` rewrote itself keeps its plan; under another rule its multipliers are exchanged.

    Attributes:
        name: what it is called; with `settings`, the numbers below and the versions it identifies a ledger.
        make_model: loop count -> fresh model. Torch's, numpy's and Python's random states are seeded before the call.
        batches: seed -> training batches (inputs, targets), at least `steps` of them. Inputs are what the model's
            forward takes: one value, a tuple of positional or a mapping of keyword arguments. A batch that is a mapping
            is both: the keyword arguments, and what `loss` is given beside the output.
        held_out: -> the held-out batches, the same at every call.
        loss: (model output, targets) -> mean loss in nats.
        steps: optimizer steps of one run.
        warmup: share of the steps over which the LR rises.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: largest norm of the whole gradient; None leaves it as it is.
        optimizer: (rewritten model, base LR) -> an optimizer, or several, whose LRs are those at the schedule's top;
            make its groups with `param_groups`. Default AdamW.
        schedule: (step, steps) -> share of the LR at that step, from 0. Default a linear rise and fall.
        autocast: torch.bfloat16 runs forward and loss under torch.autocast.
        log: called as log(run, step, loss) with the training loss in nats before every step.
        lam: λ, as `parametrize` takes it.
        base_layers: L_ref, as `parametrize` takes it.
        settings: JSON values that tell this experiment from others, such as sizes and the hash of the data.
        width: written into the results, where given.
        branches: as `parametrize` takes them, where the trace cannot tell.
        layers: as `parametrize` takes it, where the trace cannot tell.
        loops: N -> mean loop count, of a model that draws its loop count afresh in every forward; `loops=float` where
            N is the mean.
        on_stream: as `param_groups` takes it.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    batches: Batches
    held_out: Callable[[], Iterable[Any]]
    loss: Callable[[Any, Any], Tensor] = token_loss
    steps: int = 300
    warmup: float = 0.3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]] | None = None
    schedule: Callable[[int, int], float] | None = None
    autocast: torch.dtype | None = None
    log: Callable[[Trial, int, float], object] | None = None
    lam: float = 1.0
    base_layers: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: int | None = None
    branches: Sequence[str] | None = None
    layers: int | None = None
    loops: Callable[[int], float] | None = None
    on_stream: Literal["scale", "leave"] = "scale"

    def __post_init__(self) -> None:
        values = [
            ("name", isinstance(self.name, str) and self.name != "", "give a word or two that say what is trained"),
            ("make_model", callable(self.make_model), "it must be a function, called as make_model(N)"),
            ("batches", callable(self.batches), "it must be a function, called as batches(seed)"),
            ("held_out", callable(self.held_out), "it must be a function, called as held_out()"),
            ("loss", callable(self.loss), "it must be a function, called as loss(output, targets)"),
            ("loops", self.loops is None or callable(self.loops), "give N -> mean loop count, such as loops=float"),
            ("steps", is_count(self.steps, 2), "a run needs 2 or more, as an int"),
            ("warmup", is_number(self.warmup, 0, 1), "it is a share of the steps, between 0 and 1"),
            ("weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "it must be a number from 0 up"),
            ("betas", _betas(self.betas), "give AdamW's two, each from 0 to below 1"),
            ("clip", self.clip is None or is_number(self.clip, 0), "it must be a finite number above 0"),
            ("optimizer", self.optimizer is None or callable(self.optimizer), "give (model, lr) -> optimizer"),
            ("schedule", self.schedule is None or callable(self.schedule), "give (step, steps) -> share of the LR"),
            ("autocast", self.autocast in (None, torch.bfloat16), "choose torch.bfloat16, which needs no loss scaling"),
            ("log", self.log is None or callable(self.log), "it must be a function, called as log(run, step, loss)"),
            ("lam", is_number(self.lam, 0), "it must be a number above 0"),
            ("base_layers", is_count(self.base_layers), "it must be a whole number from 1 up"),
            ("width", self.width is None or is_count(self.width), "it must be a whole number from 1 up"),
            ("branches", self.branches is None or _names(self.branches), "give names such as ['layers.*.mlp']"),
            ("layers", self.layers is None or is_count(self.layers), "it must be a whole number from 1 up"),
            ("on_stream", self.on_stream in ("scale", "leave"), "choose scale or leave"),
        ]
        for name, good, allowed in values:
            if not good:
                raise InputError(f"{name} is {str(getattr(self, name))[:100]}; {allowed}")
        try:
            json.dumps(self.identity(), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"settings must hold JSON values only: {error}; give numbers, text and lists") from None

    def identity(self) -> dict[str, Any]:
        """The values that make results comparable: the settings and the versions of what ran."""
        leave = None if self.on_stream == "scale" else self.on_stream
        random_loops = None if self.loops is None else True
        hooks = {"optimizer": self.optimizer, "schedule": self.schedule}
        options = {
            "branches": self.branches,
            "layers": self.layers,
            "on_stream": leave,
            "random_loops": random_loops,
            **{name: None if hook is None else qualified(hook) for name, hook in hooks.items()},
            "autocast": None if self.autocast is None else str(self.autocast),
        }
        return {
            "name": self.name,
            **{key: getattr(self, key) for key in ("steps", "warmup", "weight_decay", "clip", "lam", "base_layers")},
            "betas": list(self.betas),
            **{key: value for key, value in options.items() if value is not None},
            **self.settings,
            "torch": version("torch"),
            "looptransfer": version("looptransfer"),
            "machine": platform.machine(),
        }

    def check(
        self, first: Trial, loops: Sequence[int], seeds: Sequence[int], rules: Sequence[Rule]
    ) -> dict[int, Start]:
        """Start a training at every N, as `check_start`."""
        return check_start(self, first, loops, seeds)

    def probe(self, trial: Trial) -> dict[str, Any]:
        """The probe of a start, as `pairing.probe`."""
        return probe(self, trial)

    def train(self, trial: Trial) -> Outcome:
        """Train once, as `training.train`."""
        return train(self, trial)

    def lr_share(self, step: int) -> float:
        """The share of the LR at a step; by default linear up over the warm-up, then linear down to zero at the end."""
        if self.schedule is not None:
            return float(self.schedule(step, self.steps))
        rise = min(self.steps - 1, max(1, round(self.warmup * self.steps)))
        return min((step + 1) / rise, (self.steps - step) / (self.steps - rise))


def _betas(value: object) -> bool:
    two = isinstance(value, (list, tuple)) and len(value) == 2
    return two and all(is_number(beta) and 0 <= beta < 1 for beta in value)  # type: ignore[attr-defined]


def _names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
