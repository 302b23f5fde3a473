"""A looped GPT on bytes, trained as one trains by hand: Muon and AdamW, warm-up, stable and decay, bf16, DDP.

    torchrun --nproc-per-node 2 train.py --lr 0.02 --loops 4 --seed 0 --out run

The three lines marked "looptransfer" are all that was added for the LR to transfer over the loops.
"""

import argparse
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import looptransfer as lt  # looptransfer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, required=True, help="of Muon; AdamW has 0.3 of it")
    parser.add_argument("--loops", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rule", default="factored")  # looptransfer
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="over all ranks")
    return parser.parse_args()


class Block(nn.Module):
    """Attention and an MLP, pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LoopedGPT(nn.Module):
    """`layers` blocks with tied weights, applied `loops` times one after the other."""

    def __init__(self, loops: int, layers: int, width: int, sequence: int) -> None:
        super().__init__()
        self.loops = loops
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(sequence, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if parameter is self.head.weight else width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are brought near an orthogonal one by five Newton-Schulz steps."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(average, group["momentum"]))
                parameter.add_(update, alpha=-group["lr"] * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    tall = matrix.shape[0] > matrix.shape[1]
    x = F.normalize(matrix.T if tall else matrix, dim=(0, 1))
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def optimizers(model: LoopedGPT, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=0.3 * lr, betas=(0.9, 0.95), weight_decay=0.0)]


def share_of_lr(step: int, steps: int) -> float:
    """Warm-up over a tenth, stable, decay over the last three tenths."""
    return min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.3 * steps))


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Python's own sources as bytes; the last tenth is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8)
    return data[: -len(data) // 10], data[-len(data) // 10 :]


def batches(data: np.ndarray, seed: int, size: int, sequence: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for one seed, whatever else differs. Every rank takes its part of each."""
    rng, rank, world = np.random.default_rng(seed), dist.get_rank(), dist.get_world_size()
    while True:
        starts = rng.integers(len(data) - sequence - 1, size=size)[rank::world]
        windows = torch.from_numpy(np.stack([data[start : start + sequence + 1] for start in starts]).astype(np.int64))
        yield windows[:, :-1], windows[:, 1:]


def main() -> None:
    args = arguments()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # without torchrun: one rank
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone())
    train(args)
    dist.barrier()  # a rank that ends while gloo still holds its last tensors aborts
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    train_data, held_out = corpus()
    stream = batches(train_data, args.seed, args.batch, args.sequence)
    fixed = batches(held_out, 10**6, 8 * args.batch, args.sequence)
    evaluation = next(fixed)

    torch.manual_seed(args.seed)
    model = LoopedGPT(args.loops, args.layers, args.width, args.sequence).to(device)
    lt.parametrize(model, evaluation[0][:1].to(device), args.rule, base_layers=args.layers)  # looptransfer
    ours = optimizers(model, args.lr)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in ours]
    parallel = DistributedDataParallel(model)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = parallel(inputs.to(device))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten())

    first, checkpoint, log = 0, args.out / "checkpoint.pt", args.out / "log.jsonl"
    if checkpoint.exists():  # an earlier attempt at this run was stopped
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(ours, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    for step in range(args.steps):
        inputs, targets = next(stream)
        if step < first:
            continue
        for optimizer, lrs in zip(ours, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = peak * share_of_lr(step, args.steps)
            optimizer.zero_grad()
        loss_of(inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in ours:
            optimizer.step()
        if (step + 1) % max(1, args.steps // 4) == 0:
            with torch.no_grad():
                val_loss = loss_of(*evaluation)
            dist.all_reduce(val_loss)
            if rank == 0:
                with log.open("a") as lines:
                    print(
                        json.dumps({"step": step + 1, "val_loss": val_loss.item() / dist.get_world_size()}), file=lines
                    )
                kept = {"step": step + 1, "model": model.state_dict(), "optimizers": [o.state_dict() for o in ours]}
                torch.save(kept, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)


def alone() -> dict[str, object]:
    """Arguments of init_process_group where no torchrun has set the ranks."""
    if "RANK" in os.environ:
        return {}
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


if __name__ == "__main__":
    main()
