"""A looped Llama-style decoder in plain PyTorch: the embedded example model.

It imports nothing from looptransfer on purpose: the rewrite has to treat it like anybody's model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotary_table(time: int, head_dim: int, like: Tensor) -> Tensor:
    """Cosines and sines of rotary position embedding, shape (2, time, head_dim / 2)."""
    frequency = 10000.0 ** (torch.arange(0, head_dim, 2, device=like.device) / -head_dim)
    angle = torch.arange(time, device=like.device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).to(like.dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """`x` with shape (…, time, head_dim), its two halves rotated against each other by position."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = table
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], table)
        y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, width))
        return out


class SwiGLU(nn.Module):
    """Gated MLP; its hidden width is 8/3 of the model's, rounded up to a multiple of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 24) * 8
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * value)
        return out


class Block(nn.Module):
    """One pre-norm layer: two residual branches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LoopedDecoder(nn.Module):
    """Tokens (batch, time) to logits (batch, time, vocab) through `prelude + loops × layers + coda` layers.

    The `layers` unique layers of the loop are applied `loops` times with the same weights. Embedding, final
    norm and head sit outside the loop. All matrices start as a truncated normal with standard deviation 0.02
    (arXiv 2606.18524, appendix).
    """

    def __init__(
        self,
        *,
        vocab: int = 256,
        width: int = 64,
        heads: int = 4,
        layers: int = 1,
        loops: int = 1,
        prelude: int = 0,
        coda: int = 0,
        tied_head: bool = True,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width {width} does not divide into {heads} heads of even size")
        if min(layers, loops) < 1 or min(prelude, coda) < 0:
            raise ValueError("layers and loops start at 1, prelude and coda at 0")
        self.loops = loops
        self.head_dim = width // heads
        self.embedding = nn.Embedding(vocab, width)
        self.prelude = nn.ModuleList(Block(width, heads) for _ in range(prelude))
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.coda = nn.ModuleList(Block(width, heads) for _ in range(coda))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        if tied_head:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        table = rotary_table(tokens.shape[-1], self.head_dim, like=x)
        for block in self.prelude:
            x = block(x, table)
        for _ in range(self.loops):
            for block in self.layers:
                x = block(x, table)
        for block in self.coda:
            x = block(x, table)
        logits: Tensor = self.head(self.norm(x))
        return logits
