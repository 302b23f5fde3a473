"""Statistics: named functions of a visit of a branch, of a change, and of an optimizer step.

A new one is a function in a table below; it is judged where `promises` says what a rule promises of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Value = Tensor | float


@dataclass(frozen=True)
class Visit:
    """One residual add as it ran. All tensors have the stream's shape (…, width) and must not be changed or kept."""

    module: str  # the branch
    number: int  # which visit of it, from 1
    branch: Tensor  # what was added, after ε
    added: Tensor  # the sum of what this branch has added up to now, Σ ε·r
    stream: Tensor  # the stream after the add


@dataclass(frozen=True)
class Change:
    """A tensor at three moments of a training, on the same inputs."""

    current: Tensor
    before: Tensor  # one step ago
    initial: Tensor


@dataclass(frozen=True)
class Step:
    """An optimizer step on the parameters of one branch."""

    gradients: Sequence[Tensor]
    updates: Sequence[Tensor]  # after minus before


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of the elements."""
    return rms_of([tensor])


def rms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Root mean square over all elements of some tensors, in float32 or better; 0 of none."""
    squares = [torch.linalg.vector_norm(t, dtype=_at_least_single(t)).square() for t in tensors]
    count = sum(t.numel() for t in tensors)
    return (torch.stack(squares).sum() / count).sqrt() if count else torch.zeros(())


def moved_rms(step: Step) -> Tensor:
    """RMS of the update over the elements that had a gradient: unseen rows of an embedding do not count."""
    pairs = zip(step.gradients, step.updates, strict=True)
    return rms_of([update[gradient != 0] for gradient, update in pairs])


def lost_to_eps(step: Step) -> Tensor:
    """1 − mean |update| / its 99th percentile, over matrices: Adam's first step is the LR wherever |g| ≫ eps."""
    pairs = zip(step.gradients, step.updates, strict=True)
    moved = [update[gradient != 0].abs().flatten() for gradient, update in pairs if gradient.ndim >= 2]
    sizes = torch.cat(moved) if moved else torch.zeros(0)
    if not sizes.numel():
        return torch.zeros(())
    top = sizes.kthvalue(max(1, round(0.99 * sizes.numel()))).values
    return 1 - sizes.mean() / top


# At every visit of every branch. A user's own statistics are added to these.
VISIT_STATISTICS: Mapping[str, Callable[[Visit], Value]] = {
    "stream_rms": lambda visit: rms(visit.stream),
    "branch_rms": lambda visit: rms(visit.branch),
    "added_rms": lambda visit: rms(visit.added),
}
# Of the stream after the last visit of every branch, and of the model's output.
CHANGE_STATISTICS: Mapping[str, Callable[[Change], Value]] = {
    "change_since_init": lambda change: rms(change.current - change.initial),
    "change_since_step": lambda change: rms(change.current - change.before),
}
# Of the parameters of every branch, of those on the stream and of all others, at every step.
STEP_STATISTICS: Mapping[str, Callable[[Step], Value]] = {
    "gradient_rms": lambda step: rms_of(step.gradients),
    "update_rms": moved_rms,
    "lost_to_eps": lost_to_eps,
}


def cosines(increments: Tensor) -> Tensor:
    """Cosines between increments (count, positions, width) → (count, count), averaged over positions."""
    unit = torch.nn.functional.normalize(increments, dim=-1)
    return torch.einsum("npd,mpd->nm", unit, unit) / increments.shape[1]


def attention_logit_rms(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """RMS of q·k/√d over all pairs of positions, for q and k of shape (…, time, d); a mask is not applied.

    Σ_ij (q_i·k_j)² = ⟨qᵀq, kᵀk⟩, so the (time × time) logits are never made.
    """
    query, key = (tensor.to(_at_least_single(tensor)) for tensor in (query, key))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if key.shape[:-2] != query.shape[:-2]:  # grouped queries share keys
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    squares = ((query.mT @ query) * (key.mT @ key)).sum()
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return (squares.clamp(min=0) / pairs).sqrt() * factor


def written_out_logit_rms(logits: Tensor) -> Tensor:
    """RMS of attention logits that were written out, without those that a mask took away."""
    seen = logits[logits > -1e4]
    return rms(seen)


def _at_least_single(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32
