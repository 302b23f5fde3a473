"""Cost of the rewrite: time of a training step and of a forward, rewritten over plain, and of making the plan.

    python benchmarks/rewrite_cost.py

The reference model at width 256, L = 2, N = 8, 4 × 128 tokens, in eager mode and compiled with inductor; the plain and
the rewritten models take turns, and the ratio is that of medians. Plain stands against a second plain model too: what
that ratio is off 1 is noise.
"""

import copy
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import looptransfer as lt

ROUNDS = 40


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = lt.LoopedDecoder(width=256, heads=4, layers=2, loops=8)
    again, rewritten = copy.deepcopy(plain), copy.deepcopy(plain)
    lt.parametrize(rewritten, tokens())
    return {"plain": plain, "plain again": again, "rewritten": rewritten}


def tokens() -> Tensor:
    return torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(0))


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def ratios(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each call over that of the first, the calls taking turns."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        order = list(calls.items())
        for name, call in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    first = statistics.median(next(iter(times.values())))
    return {name: statistics.median(taken) / first for name, taken in times.items()}


def measure(compiled: bool) -> None:
    batch, steps, forwards = tokens(), {}, {}
    for name, model in models().items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        run = torch.compile(model) if compiled else model

        def step(run: nn.Module = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
            training_step(run, optimizer, batch)

        def forward(run: nn.Module = run) -> None:
            with torch.no_grad():
                run(batch)

        steps[name], forwards[name] = step, forward
    for what, calls in (("training step", steps), ("forward", forwards)):
        shown = "  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios(calls).items())
        print(f"{'compiled' if compiled else 'eager':9} {what:14} {shown}", flush=True)


def measure_planning() -> None:
    start = time.process_time()
    with torch.device("meta"):
        large = lt.LoopedDecoder(vocab=50_000, width=768, heads=12, layers=48, loops=8)
        plan = lt.parametrize(large, torch.zeros(4, 128, dtype=torch.long))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.process_time() - start
    print(f"L = {plan.layers}, N = {plan.loops}, width 768, meta device: {seconds:.1f} s, {peak:.2f} GiB at peak")


class CountedDecoder(lt.LoopedDecoder):
    """Counts the forwards of all instances, copies included."""

    forwards = 0

    def forward(self, tokens: Tensor) -> Tensor:
        CountedDecoder.forwards += 1
        return super().forward(tokens)


def measure_rewriting() -> None:
    """Beside the number of forwards: core-seconds of the rewrite, of a forward, and of a forward and backward."""
    print("core-seconds:      rewrite  forward  with backward  forwards run")
    for name, sizes in {
        "width 512, N = 8": {"width": 512, "heads": 8, "layers": 2, "loops": 8},
        **{f"tiny, N = {n}": {"width": 16, "heads": 2, "layers": 1, "loops": n} for n in (4, 16, 64, 256)},
    }.items():
        model, batch = CountedDecoder(**sizes), tokens() if "512" in name else tokens()[:2, :16]
        forward = core_seconds(lambda model=model, batch=batch: model(batch))
        both = core_seconds(lambda model=model, batch=batch: model(batch).sum().backward())
        CountedDecoder.forwards = 0
        rewrite = core_seconds(lambda model=model, batch=batch: lt.parametrize(model, batch), repeats=1)
        print(f"{name:18} {rewrite:7.2f}  {forward:7.3f}  {both:13.3f}  {CountedDecoder.forwards:12}", flush=True)


def core_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The median of some calls; other processes do not count."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    started = time.monotonic()
    settings = f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS} turns"
    print(f"python benchmarks/rewrite_cost.py: {settings}")
    measure_planning()  # first: it reports the peak memory of the whole process
    measure_rewriting()
    measure(compiled=False)
    measure(compiled=True)
    print(f"took {time.monotonic() - started:.0f} s")
