"""Do parameters that act on the stream, outside every branch, need LR/n? One optimizer step, measured over N.

    python benchmarks/on_stream.py

Three looped models, rewritten with ε = 1/(N√L): post-norm blocks (gains on the stream), a norm at every loop's end,
an adapter at the loop's entry. AdamW takes one step, or ten, at a fixed base LR, first with only the parameters on the
stream trained and then with all; printed is the growth exponent in N of the RMS change of the output: 0 is right, 1 is
what ε is there to prevent. Intervals: 90 % t over seeds. Takes three minutes on two cores.
"""

import math
import time
import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from looptransfer.transfer.optimum import t_interval

WIDTH, LOOPS, SEEDS, LR = 32, [1, 2, 4, 8, 16, 32, 64], 6, 1e-3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class Looped(nn.Module):
    """Two residual MLPs in a loop; `kind` says what else acts on the stream."""

    def __init__(self, kind: str, loops: int) -> None:
        super().__init__()
        self.kind, self.loops = kind, loops
        self.layers = nn.ModuleList(mlp() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.adapter = nn.Linear(2 * WIDTH, WIDTH)
        self.loop_norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(self.loops):
            if self.kind == "adapter":
                h = self.adapter(torch.cat([h, x], -1))
            for layer, norm in zip(self.layers, self.norms, strict=True):
                h = norm(h + layer(h)) if self.kind == "post-norm" else h + layer(norm(h))
            if self.kind != "post-norm":
                h = self.loop_norm(h)
        return h


def change(kind: str, on_stream: str, only: bool, loops: int, steps: int, seed: int) -> float:
    """RMS change of the output after so many steps."""
    torch.manual_seed(seed)
    model, x, target = Looped(kind, loops), torch.randn(64, WIDTH), torch.randn(64, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.ScalingWarning)
        plan = lt.parametrize(model, x)
    if only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in {"norms", "adapter", "loop_norm"} - branch_norms(kind))
    del plan
    groups = lt.param_groups(model, torch.optim.AdamW, lr=LR, on_stream=on_stream)
    optimizer = torch.optim.AdamW(groups)
    before = model(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    return float((model(x).detach() - before).pow(2).mean().sqrt())


def branch_norms(kind: str) -> set[str]:
    return set() if kind == "post-norm" else {"norms"}


def exponent(kind: str, on_stream: str, only: bool, steps: int) -> str:
    """Growth exponent in N from 4 up, with its interval over seeds, and the change at the largest N."""
    loops = [n for n in LOOPS if n >= 4]
    slopes, last = [], []
    for seed in range(SEEDS):
        changes = [change(kind, on_stream, only, n, steps, seed) for n in loops]
        slopes.append(np.polyfit(np.log2(loops), np.log2(changes), 1)[0])
        last.append(changes[-1])
    interval = t_interval(slopes, 0.90)
    return (
        f"N^{np.mean(slopes):+.2f} [{interval.low:+.2f}, {interval.high:+.2f}], {math.fsum(last) / SEEDS:.3f} at N = 64"
    )


if __name__ == "__main__":
    started = time.monotonic()
    print(f"python benchmarks/on_stream.py: torch {torch.__version__}, AdamW, base LR {LR}, seeds 0–{SEEDS - 1}")
    for kind in ("post-norm", "loop norm", "adapter"):
        for only in (True, False):
            for steps in (1, 10):
                shown = "  ".join(f"{how}: {exponent(kind, how, only, steps)}" for how in ("leave", "scale"))
                print(
                    f"{kind:10} {'on stream only' if only else 'all parameters':15} {steps:2} steps  {shown}",
                    flush=True,
                )
    print(f"took {time.monotonic() - started:.0f} s")
