"""What a user hands in to be tuned: a model factory, batches, a loss."""

import json
import pickle
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from looptransfer.errors import InputError
from looptransfer.user_code import user_code

Batch = tuple[Any, Any]  # inputs of the model, targets of the loss
Batches = Callable[[int], Iterable[Batch]]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (…, vocab) against token ids (…)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@dataclass(frozen=True)
class Experiment:
    """A training run as a function of rule, loop count, LR and seed.

    Training is AdamW with linear warm-up and linear decay to zero, gradients clipped, and ends with the loss on a fixed
    held-out set. Runs of one seed share initialisation and data order whatever their LR, loop count and rule (paired
    seeds). Worker processes receive the experiment by pickle, so its callables live at module level.

    A model that `make_model` rewrote itself keeps its plan; under another rule its multipliers are exchanged.

    Attributes:
        name: what it is called; with `settings`, the numbers below and the versions it identifies a ledger.
        make_model: loop count -> fresh model. Torch's, numpy's and Python's random states are seeded before the call.
        batches: seed -> training batches (inputs, targets), at least `steps` of them. Inputs are what the model's
            forward takes: one value, a tuple of positional or a mapping of keyword arguments.
        held_out: -> the held-out batches, the same at every call.
        loss: (model output, targets) -> mean loss in nats.
        steps: optimizer steps of one run.
        warmup: share of the steps over which the LR rises.
        clip: largest norm of the whole gradient.
        settings: JSON values that tell this experiment from others, such as sizes and the hash of the data.
        width: written into the results, where given.
        branches, layers: as `parametrize` takes them, where the trace cannot tell.
        loops: N -> mean loop count, of a model that draws its loop count afresh in every forward; `loops=float` where
            N is the mean.
        on_stream: as `param_groups` takes it.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    batches: Batches
    held_out: Callable[[], Iterable[Batch]]
    loss: Callable[[Any, Any], Tensor] = token_loss
    steps: int = 300
    warmup: float = 0.3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
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
            ("steps", _whole(self.steps, 2), "a run needs 2 or more, as an int"),
            ("warmup", _between(self.warmup, 1e-9, 1 - 1e-9), "it is a share of the steps, between 0 and 1"),
            ("weight_decay", _between(self.weight_decay, 0, 1e9), "it must be a number from 0 up"),
            ("betas", _betas(self.betas), "give AdamW's two, each from 0 to below 1"),
            ("clip", _between(self.clip, 1e-30, 1e30), "it must be a finite number above 0"),
            ("lam", _between(self.lam, 1e-30, 1e30), "it must be a number above 0"),
            ("base_layers", _whole(self.base_layers, 1), "it must be a whole number from 1 up"),
            ("width", self.width is None or _whole(self.width, 1), "it must be a whole number from 1 up"),
            ("branches", self.branches is None or _names(self.branches), "give names such as ['layers.*.mlp']"),
            ("layers", self.layers is None or _whole(self.layers, 1), "it must be a whole number from 1 up"),
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
        """What makes results comparable: the settings and the versions of what ran."""
        leave = None if self.on_stream == "scale" else self.on_stream
        random_loops = None if self.loops is None else True
        given = {"branches": self.branches, "layers": self.layers, "on_stream": leave, "random_loops": random_loops}
        return {
            "name": self.name,
            **{key: getattr(self, key) for key in ("steps", "warmup", "weight_decay", "clip", "lam", "base_layers")},
            "betas": list(self.betas),
            **{key: value for key, value in given.items() if value is not None},
            **self.settings,
            "torch": version("torch"),
            "looptransfer": version("looptransfer"),
            "machine": platform.machine(),
        }

    def pickled(self) -> bytes:
        """The experiment as worker processes are sent it.

        Raises:
            InputError: it cannot be pickled, or stands in a notebook or `python -c`, which no other process can import.
        """
        fix = "; define its functions at the top level of a module, or pass workers=1"
        with user_code("the experiment cannot be sent to worker processes", fix=fix):
            data = pickle.dumps(self)
        main = sys.modules["__main__"]
        file = getattr(main, "__file__", None)
        importable = getattr(main, "__spec__", None) is not None or (file is not None and Path(file).is_file())
        if b"__main__" in data and not importable:
            raise InputError(
                "the experiment cannot be sent to worker processes: it is defined in a notebook, in python -c or on "
                f"standard input, which they cannot import{fix}"
            )
        return data


def _betas(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_between(beta, 0, 1 - 1e-9) for beta in value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
