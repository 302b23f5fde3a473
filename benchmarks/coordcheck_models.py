"""The three projects in which faults are planted: small token models, rewritten and trained as a user would."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt

VOCAB = 64


class SelfAttention(nn.Module):
    """Attention with its own residual add and post-norm, as in ALBERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, width))
        return out


class PostNormBlock(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x))
        normed: Tensor = self.mlp_norm(x + self.mlp(x))
        return normed


class AlbertLike(nn.Module):
    """Post-norm blocks that share their weights over the loops. Tokens (batch, time) → (batch, time, vocab)."""

    def __init__(self, width: int, heads: int, layers: int, loops: int) -> None:
        super().__init__()
        self.loops = loops
        self.embedding, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(512, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(PostNormBlock(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.embedding_norm(self.embedding(tokens) + self.positions(places))
        for _ in range(self.loops):
            for block in self.layers:
                x = block(x)
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True)
class Project:
    """A model kind with its sizes, and the data it is trained on."""

    kind: str  # "reference", "ALBERT-like" or "prelude-loop-coda"
    width: int = 32
    heads: int = 2
    sequence: int = 16
    batch: int = 8

    def plain(self, loops: int, layers: int = 2) -> nn.Module:
        """A fresh model, not rewritten."""
        if self.kind == "ALBERT-like":
            return AlbertLike(self.width, self.heads, layers, loops)
        around = 1 if self.kind == "prelude-loop-coda" else 0
        sizes = {"width": self.width, "heads": self.heads, "layers": layers, "prelude": around, "coda": around}
        return lt.LoopedDecoder(vocab=VOCAB, loops=loops, tied_head=False, **sizes)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Copies of a short random text: something to learn."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            half = torch.randint(VOCAB, (self.batch, self.sequence // 2 + 1), generator=generator)
            windows = torch.cat([half, half], dim=1)[:, : self.sequence + 1]
            yield windows[:, :-1], windows[:, 1:]

    def experiment(self, make_model: Callable[..., nn.Module]) -> lt.Experiment:
        """An experiment with a model of this kind, rewritten or not."""
        return lt.Experiment(self.kind, make_model, self.batches, lambda: [next(self.batches(10**6))])


KINDS = ("reference", "ALBERT-like", "prelude-loop-coda")
