"""What a measurement of `Monitor` takes, as a share of a training step, measured in turns in one run.

    python -m benchmarks.monitor [--device cuda --width 768 --layers 6 --sequence 512 --bf16]

The step is that of the reference model on 16 sequences, forward, backward and AdamW, eager; a measurement sees one of
them. Medians over turns, of the processor's time on a CPU and of the clock elsewhere.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import looptransfer as lt
from looptransfer.coordcheck.monitor import EVERY

TURNS, WARM_UP, BATCH = 15, 3, 16


def shares(loops: int, width: int, layers: int, sequence: int, device: str, bf16: bool = False) -> dict[str, float]:
    """Seconds of a step, and what a measurement takes of that without and with the gradient."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (BATCH, sequence + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model = lt.LoopedDecoder(width=width, heads=max(2, width // 64), layers=layers, loops=loops).to(device)
    lt.parametrize(model, inputs[:1])
    optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=1e-3))
    plain = lt.Monitor(model, inputs[:1], every=1)
    whole = lt.Monitor(model, inputs[:1], every=1, loss=lambda logits: loss_of(logits, targets[:1]))

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    turns = [[seconds(what, device) for what in (step, lambda: plain(0), lambda: whole(0))] for _ in range(TURNS)]
    taken, without, with_gradient = map(statistics.median, zip(*turns[WARM_UP:], strict=True))
    return {"step": taken, "without": without / taken, "with": with_gradient / taken}


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def seconds(call: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    begun = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    for name, default in (("width", 32), ("layers", 2), ("sequence", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    torch.set_num_threads(1)
    for loops in (2, 8):
        share = shares(loops, **vars(parser.parse_args()))
        print(
            f"N = {loops}: a step takes {share['step'] * 1e3:.0f} ms, a measurement {share['without']:.2f} of it, with "
            f"the gradient {share['with']:.2f}: {share['with'] / EVERY:.2%} of the time, every {EVERY} steps",
            flush=True,
        )


if __name__ == "__main__":
    main()
