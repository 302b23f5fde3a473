"""The experiment's functions, each called behind the boundary and held to what it must give."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from looptransfer.errors import UserCodeError
from looptransfer.rewrite.forward import call_arguments
from looptransfer.user_code import place, user_code

if TYPE_CHECKING:
    from looptransfer.trials.experiment import Experiment

Batch = tuple[Any, Any]  # inputs of the model, targets of the loss
Batches = Callable[[int], Iterable[Any]]

MOST_HELD_OUT = 10_000  # batches; what goes on beyond is taken to be endless
END = object()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (…, vocab) against token ids (…)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's, numpy's and Python's random states, set by a seed and given back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, as in a worker: at small sizes more take longer, and sums come out the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fresh_model(make_model: Callable[..., nn.Module], loops: int, **sizes: int) -> nn.Module:
    """A model with trainable weights from make_model(loops)."""
    call = f"make_model({', '.join([str(loops), *(f'{name}={n}' for name, n in sizes.items())])})"
    with user_code(f"{call} fails", make_model):
        model = make_model(loops, **sizes)
    if not isinstance(model, nn.Module):
        raise UserCodeError(
            f"{call} gives a {type(model).__name__}{place(make_model)}; it must return a torch.nn.Module"
        )
    with user_code(f"the parameters of {call} fail", make_model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained or any(parameter.is_meta for parameter in trained):
        problem = "has no weights, it is on the meta device" if trained else "has no parameter that requires a gradient"
        raise UserCodeError(f"{call} gives a model that {problem}{place(make_model)}; return one that can be trained")
    return model


def on_device(batch: Batch, device: str, hook: object) -> Batch:
    """A batch whose tensors are on a device, as is what can be moved by a method `to`; a fault is told at `hook`."""
    parts = batch[:1] if batch[0] is batch[1] else batch  # a dict is both, and is moved once
    with user_code(f"a batch cannot be moved to {device}", hook):
        moved = tree_map(lambda leaf: leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf, parts)
    return moved[0], moved[-1]


def autocast(dtype: torch.dtype | None, device: str) -> AbstractContextManager[object]:
    """Torch's autocast to `dtype`, or none."""
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


def batch_stream(batches: Batches, seed: int, count: int) -> Iterator[Batch]:
    """The first `count` batches of a seed; an early end is an error."""
    call = f"batches({seed})"
    with user_code(f"{call} fails", batches):
        stream = iter(batches(seed))
    for number in range(count):
        with user_code(f"{call} fails", batches):
            batch = next(stream, END)
        if batch is END:
            raise UserCodeError(
                f"{call} ended after {number} of the {count} batches that are needed{place(batches)}; give more of "
                "them, such as by an endless generator, or take fewer steps"
            )
        yield _pair(batch, call, batches)


def held_out_batches(held_out: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    """The held-out batches: one or more, and an end."""
    with user_code("held_out() fails", held_out):
        stream = iter(held_out())
    for number in itertools.count():
        with user_code("held_out() fails", held_out):
            batch = next(stream, END)
        if batch is END and number:
            return
        if batch is END or number == MOST_HELD_OUT:
            problem = f"gave {number} batches and goes on" if number else "gave no batch"
            raise UserCodeError(f"held_out() {problem}{place(held_out)}; it must give one or more, and end")
        yield _pair(batch, "held_out()", held_out)


def _pair(batch: Any, call: str, hook: object) -> Batch:
    if isinstance(batch, Mapping):
        return batch, batch
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise UserCodeError(
            f"{call} gives a batch that is a {type(batch).__name__}{size}{place(hook)}; a batch is a pair, the inputs "
            "of the model and the targets of the loss, or a dict, which is both: the arguments by name, and what the "
            "loss is given beside the output"
        )
    return batch[0], batch[1]


def loss_of(
    loss: Callable[[Any, Any], Tensor], model: nn.Module, batch: Batch, make_model: object
) -> tuple[Tensor, float]:
    """The loss of a model on a batch, as a tensor and as a number; a fault may be told at `make_model`."""
    args, kwargs = call_arguments(batch[0])
    with user_code("the model's forward fails", model, make_model):
        output = model(*args, **kwargs)
    hooks = loss, model, make_model
    hint = "; without loss=… it takes logits (…, vocab) and token ids" if loss is token_loss else ""
    hint = "; of a batch that is a dict it is given the whole dict as targets" if batch[0] is batch[1] else hint
    with user_code("loss(output, targets) fails", *hooks, fix=hint):
        value = loss(output, batch[1])
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        kind = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)[:100]
        raise UserCodeError(
            f"loss(output, targets) gives {kind}{place(*hooks)}; it must return one floating-point number as a tensor"
        )
    with user_code("the loss cannot be read", *hooks):
        return value, float(value.detach())


def held_out_loss(experiment: "Experiment", model: nn.Module, device: str = "cpu") -> float:
    """Mean loss in nats over the held-out batches, each counted alike."""
    with user_code("model.eval() fails", model):
        model.eval()
    losses = []
    with torch.no_grad(), autocast(experiment.autocast, device):
        for batch in held_out_batches(experiment.held_out):
            moved = on_device(batch, device, experiment.held_out)
            losses.append(loss_of(experiment.loss, model, moved, experiment.make_model)[1])
    return sum(losses) / len(losses)
