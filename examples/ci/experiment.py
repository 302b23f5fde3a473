"""A tiny experiment: a looped residual MLP that learns a function. Put your model and your data in its place."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt

FEATURES, WIDTH, BATCH = 4, 64, 512


class LoopedMLP(nn.Module):
    """One residual block, applied `loops` times with the same weights."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.loops = loops
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = stream + self.block(self.norm(stream))
        return self.head(stream)


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches: the seed alone decides their order, so that every LR and loop count sees the same."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample(rng, BATCH)


def held_out() -> list[tuple[Tensor, Tensor]]:
    """The same batches at every call."""
    return [sample(np.random.default_rng(10_000), 2048)]


def sample(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    inputs = rng.normal(size=(count, FEATURES)).astype(np.float32)
    targets = np.sin(inputs[:, :1] + inputs[:, 1:2]) + inputs[:, 2:3]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


experiment = lt.Experiment(
    name="tiny",
    make_model=LoopedMLP,
    batches=batches,
    held_out=held_out,
    loss=squared_error,
    steps=50,
    lam=0.5,
    width=WIDTH,
)
