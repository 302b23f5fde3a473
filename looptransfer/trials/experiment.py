"""What a user hands in to be tuned: a model factory, batches, a loss."""

import pickle
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from looptransfer.errors import InputError

Batch = tuple[Any, Any]  # inputs of the model, targets of the loss


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (…, vocab) against token ids (…)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@dataclass(frozen=True)
class Experiment:
    """A training run as a function of rule, loop count, LR and seed.

    Training is AdamW with linear warm-up and linear decay to zero, gradients clipped, and ends with the loss on a fixed
    held-out set. Runs of one seed share initialisation and data order whatever their LR, loop count and rule (paired
    seeds). Worker processes receive the experiment by pickle, so its callables live at module level.

    Attributes:
        name: what it is called; with `settings`, the numbers below and the versions it identifies a ledger.
        make_model: loop count -> fresh model. Torch's random state is seeded before the call.
        batches: seed -> training batches (inputs, targets), at least `steps` of them.
        held_out: -> the held-out batches, the same at every call.
        loss: (model output, targets) -> mean loss in nats.
        steps: optimizer steps of one run.
        warmup: share of the steps over which the LR rises.
        clip: largest norm of the whole gradient.
        settings: JSON values that tell this experiment from others, such as sizes and the hash of the data.
        width: written into the results, where given.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
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

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise InputError(f"steps is {self.steps}; a run needs 2 or more")
        if not 0 < self.warmup < 1:
            raise InputError(f"warmup is {self.warmup}; it is a share of the steps, between 0 and 1")

    def identity(self) -> dict[str, Any]:
        """What makes results comparable: the settings and the versions of what ran."""
        return {
            "name": self.name,
            **{key: getattr(self, key) for key in ("steps", "warmup", "weight_decay", "clip", "lam", "base_layers")},
            "betas": list(self.betas),
            **self.settings,
            "torch": version("torch"),
            "looptransfer": version("looptransfer"),
            "machine": platform.machine(),
        }

    def check_portable(self) -> None:
        """Refuse an experiment that worker processes cannot be given."""
        try:
            pickle.dumps(self)
        except Exception as error:
            raise InputError(
                f"the experiment cannot be sent to worker processes ({error}); define its functions at the top "
                "level of a module, or pass workers=1"
            ) from None
