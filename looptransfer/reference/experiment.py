"""The reference model on the reference corpus, as an experiment."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from looptransfer.reference.corpus import Corpus, load_corpus
from looptransfer.reference.model import LoopedDecoder
from looptransfer.trials.experiment import Experiment

HELD_OUT_BATCH = 2_048  # tokens


@dataclass(frozen=True)
class ReferenceSize:
    """Sizes of the reference experiment; `sequence` and `held_out` in tokens, `batch` in sequences."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    sequence: int = 32
    batch: int = 16
    steps: int = 250
    held_out: int = 32_768


@dataclass(frozen=True)
class _Task:
    """The experiment's callables, as methods of a value that pickles."""

    size: ReferenceSize
    text: str | None

    def corpus(self) -> Corpus:
        return load_corpus(self.text, shortest=max(1024, 2 * self.size.sequence))

    def make_model(self, loops: int) -> nn.Module:
        size = self.size
        return LoopedDecoder(width=size.width, heads=size.heads, layers=size.layers, loops=loops, tied_head=False)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        corpus, rng = self.corpus(), np.random.default_rng(seed)
        while True:
            yield _split(corpus.windows(rng, self.size.batch, self.size.sequence))

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        sequence = self.size.sequence
        windows = self.corpus().held_out_windows(self.size.held_out // sequence, sequence)
        for start in range(0, len(windows), HELD_OUT_BATCH // sequence):
            yield _split(windows[start : start + HELD_OUT_BATCH // sequence])


def reference_experiment(size: ReferenceSize | None = None, text: str | None = None) -> Experiment:
    """A looped decoder that learns the next byte of `text` (default: the standard library's Python sources).

    Its base depth is its own depth, so ε is 1/N under "factored" and all rules agree at N = 1.
    """
    size = size or ReferenceSize()
    task = _Task(size, text)
    return Experiment(
        name="reference",
        make_model=task.make_model,
        batches=task.batches,
        held_out=task.held_out,
        steps=size.steps,
        warmup=0.5,
        base_layers=size.layers,
        width=size.width,
        settings={**vars(size), "corpus_sha256": task.corpus().digest},
    )


def _split(windows: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1], tokens[:, 1:]
