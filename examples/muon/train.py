"""A looped GPT with Muon for the matrices of its branches, AdamW for the rest, and a warm-up–stable–decay schedule.

    python train.py --steps 200 --loops 4

The groups are made by looptransfer, and checked by it before the first step and after the last.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class LoopedGPT(nn.Module):
    """Blocks that are applied `loops` times; bytes to logits of the next byte."""

    def __init__(self, loops: int, width: int = 64, heads: int = 4, layers: int = 2, length: int = 64) -> None:
        super().__init__()
        self.loops = loops
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.loop_norm, self.norm, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
            x = self.loop_norm(x)
        return self.head(self.norm(x))


def optimizers_of(model: nn.Module, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW; each has a base LR of its own, and no decay on embeddings."""
    groups = lt.param_groups(
        model, "muon", lr=muon_lr, adamw_lr=adamw_lr, weight_decay={"branch matrix": 0.1, "head": 0.1}
    )
    return [
        torch.optim.Muon([group for group in groups if group["family"] == "muon"]),
        torch.optim.AdamW([group for group in groups if group["family"] == "adamw"], betas=(0.9, 0.95)),
    ]


def warmup_stable_decay(step: int, steps: int, warmup: float = 0.1, decay: float = 0.3) -> float:
    """The share of the base LR at a step."""
    return min(1.0, (step + 1) / (warmup * steps), (steps - step) / (decay * steps))


def batches(seed: int, batch: int = 8, length: int = 64):
    """Random windows of Python's own sources, endlessly: inputs and targets, (batch, length) each."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40])
    data, generator = torch.frombuffer(bytearray(text), dtype=torch.uint8), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length - 1, (batch, 1), generator=generator)
        windows = data[starts + torch.arange(length + 1)].long()
        yield windows[:, :-1], windows[:, 1:]


def train(steps: int, loops: int, muon_lr: float = 0.02, adamw_lr: float = 3e-3, seed: int = 0) -> list[float]:
    """Train, and return the loss of every step."""
    torch.manual_seed(seed)
    model, stream = LoopedGPT(loops), batches(seed)
    inputs, targets = next(stream)
    lt.parametrize(model, inputs, base_layers=2)
    optimizers = optimizers_of(model, muon_lr, adamw_lr)
    print(lt.explain(model, optimizers))
    lt.verify(model, inputs, optimizer=optimizers)
    losses = []
    for step in range(steps):
        share = warmup_stable_decay(step, steps)
        for optimizer, lr in zip(optimizers, (muon_lr, adamw_lr), strict=True):
            lt.set_lr(optimizer, lr * share)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        inputs, targets = next(stream)
    lt.verify(model, inputs, optimizer=optimizers)  # what the schedule did to the groups shows only now
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loops", type=int, default=4)
    arguments = parser.parse_args()
    losses = train(arguments.steps, arguments.loops)
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-10:]) / len(losses[-10:]):.3f} at the end")
