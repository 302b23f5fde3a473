"""A tiny experiment: a looped decoder that learns a made-up language. Put your model and your data in its place."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

import looptransfer as lt

LETTERS, LENGTH, BATCH = 8, 10, 96
RULE = np.random.default_rng(0).integers(0, LETTERS, (LETTERS, LETTERS))  # the next letter, from the last two


def make_model(loops: int) -> nn.Module:
    return lt.LoopedDecoder(vocab=LETTERS, width=16, heads=2, loops=loops, tied_head=False)


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches: the seed alone decides their order, so that every LR and loop count sees the same."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample(rng, BATCH)


def held_out() -> list[tuple[Tensor, Tensor]]:
    """The same batches at every call."""
    return [sample(np.random.default_rng(10_000), 512)]


def sample(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Texts (count, LENGTH) and their next letters; one letter in eight breaks the rule."""
    text = rng.integers(0, LETTERS, (count, LENGTH + 1))
    keeps = rng.random(text.shape) < 7 / 8
    for t in range(2, LENGTH + 1):
        text[:, t] = np.where(keeps[:, t], RULE[text[:, t - 1], text[:, t - 2]], text[:, t])
    return torch.from_numpy(text[:, :-1]), torch.from_numpy(text[:, 1:])


experiment = lt.Experiment(
    name="tiny",
    make_model=make_model,
    batches=batches,
    held_out=held_out,
    steps=50,
    width=16,
)
