"""Whether one learning rate carries over N in the kinds of looped models that people train, and with Muon and SGD.

    python -m benchmarks.families [--minutes M] [--out reports/transfer/families]

One looped block of width 32 on the reference text, in five families: prelude, loop and coda with the input injected at
every visit and a random N (as Huginn and Parcae have it), a norm on the stream at the end of every visit, sandwich
norms (as Ouro), post-norm (as ALBERT), and gains and low-rank adapters of every visit's own (as relaxed recursive
Transformers). Beside them the pre-norm block of the paper, with AdamW, Muon and SGD. All models are our own writing.
Each is trained `factored`, ε = 1/N, and `unscaled`, as it was made.

The matrices of the loop start as large beside the embedding as at the paper's width, 0.02·√(768/width). A killed run
goes on from its ledgers, and `--minutes` begins no further sweep after that time.
"""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import looptransfer as lt
from benchmarks.cells import (
    CENTRE,
    MORE_SEEDS,
    Cell,
    draw_drifts,
    draw_losses,
    footer,
    gain_of_loops,
    options,
    publish,
    rows_of,
    run_cells,
)
from benchmarks.paper import enlarge_matrices, paper_gain
from benchmarks.verdict_simulations import table
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.reference.model import Attention, Block, SwiGLU, rotary_table

REPORT = Path(__file__).parent.parent / "reports" / "transfer" / "families"
WIDTH, HEADS, VOCAB, RANK = 32, 2, 256, 4
LOOPS = (1, 8)
SEEDS = 6
COLUMNS = 4  # of panels
OCTAVES = (-2.25, -1.5, -0.75, 0.0, 0.75, 1.5)
SIZE = ReferenceSize(layers=1, held_out=8_192)


class Looped(nn.Module):
    """Bytes (batch, time) to logits: embedding, one pre-norm block visited `loops` times, norm, head."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.loops = loops
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.loop = self.make_loop()
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        enlarge_matrices(self.loop, paper_gain(WIDTH))

    def make_loop(self) -> nn.Module:
        """What is visited."""
        return Block(WIDTH, HEADS)

    def visit(self, x: Tensor, rotary: Tensor, number: int) -> Tensor:
        """One visit of the stream."""
        visited: Tensor = self.loop(x, rotary)
        return visited

    def repeat(self, x: Tensor, rotary: Tensor) -> Tensor:
        """All visits."""
        for number in range(self.loops):
            x = self.visit(x, rotary, number)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.repeat(x, rotary_table(tokens.shape[-1], WIDTH // HEADS, like=x))
        logits: Tensor = self.head(self.norm(x))
        return logits


class Injected(Looped):
    """Prelude, loop, coda: every visit begins by mixing the prelude's output into the state, which starts at zero.

    In training N is drawn from 1 to 2N − 1, evenly.
    """

    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.prelude, self.coda = Block(WIDTH, HEADS), Block(WIDTH, HEADS)
        for block in (self.prelude, self.coda):
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    nn.init.trunc_normal_(parameter, std=0.02 * paper_gain(WIDTH))

    def make_loop(self) -> nn.Module:
        return nn.ModuleDict({"adapter": nn.Linear(2 * WIDTH, WIDTH, bias=False), "block": Block(WIDTH, HEADS)})

    def repeat(self, x: Tensor, rotary: Tensor) -> Tensor:
        injected = self.prelude(x, rotary)
        state = torch.zeros_like(injected)
        for _ in range(random.randint(1, 2 * self.loops - 1) if self.training else self.loops):
            state = self.loop["block"](self.loop["adapter"](torch.cat([state, injected], dim=-1)), rotary)
        ended: Tensor = self.coda(state, rotary)
        return ended


class StreamNorm(Looped):
    """A norm on the stream at the end of every visit."""

    def make_loop(self) -> nn.Module:
        return nn.ModuleDict({"block": Block(WIDTH, HEADS), "norm": nn.RMSNorm(WIDTH)})

    def visit(self, x: Tensor, rotary: Tensor, number: int) -> Tensor:
        visited: Tensor = self.loop["norm"](self.loop["block"](x, rotary))
        return visited


class SandwichBlock(Block):
    """A norm before and a norm after each branch."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS)
        self.attention_end, self.mlp_end = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention_end(self.attention(self.attention_norm(x), rotary))
        x = x + self.mlp_end(self.mlp(self.mlp_norm(x)))
        return x


class Sandwich(Looped):
    """Sandwich norms."""

    def make_loop(self) -> nn.Module:
        return SandwichBlock()


class PostNormBlock(nn.Module):
    """A norm on the stream after each branch is added."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(WIDTH, HEADS), nn.RMSNorm(WIDTH)
        self.mlp, self.mlp_norm = SwiGLU(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, rotary))
        x = self.mlp_norm(x + self.mlp(x))
        return x


class PostNorm(Looped):
    """Post-norm; the embedding has a norm of its own, as ALBERT's."""

    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.embedding_norm = nn.RMSNorm(WIDTH)

    def make_loop(self) -> nn.Module:
        return PostNormBlock()

    def repeat(self, x: Tensor, rotary: Tensor) -> Tensor:
        return super().repeat(self.embedding_norm(x), rotary)


class LowRank(nn.Module):
    """A low-rank map that starts at zero, as LoRA's."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.up(self.down(x))
        return mapped


class Visit(nn.Module):
    """What a visit has of its own: a gain and a low-rank map for each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.maps = nn.ModuleList(LowRank() for _ in range(2))


class VisitedBlock(Block):
    """A pre-norm block that is handed what the visit has of its own."""

    def forward(self, x: Tensor, rotary: Tensor, own: Visit) -> Tensor:  # type: ignore[override]
        seen = self.attention_norm(x)
        x = x + own.gains[0] * (self.attention(seen, rotary) + own.maps[0](seen))
        seen = self.mlp_norm(x)
        x = x + own.gains[1] * (self.mlp(seen) + own.maps[1](seen))
        return x


class PerVisit(Looped):
    """Gains and low-rank maps that belong to the visit, around matrices that all visits share."""

    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.visits = nn.ModuleList(Visit() for _ in range(loops))
        for visit in self.visits:
            for low_rank in visit.maps:
                nn.init.normal_(low_rank.down.weight, std=WIDTH**-0.5)
                nn.init.zeros_(low_rank.up.weight)

    def make_loop(self) -> nn.Module:
        return VisitedBlock(WIDTH, HEADS)

    def visit(self, x: Tensor, rotary: Tensor, number: int) -> Tensor:
        visited: Tensor = self.loop(x, rotary, self.visits[number])
        return visited


def muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the branches' matrices at the LR that is searched, AdamW at a fixed one for the rest."""
    groups = lt.param_groups(model, "muon", lr=lr, adamw_lr=CENTRE, weight_decay=0.1)
    return [
        torch.optim.Muon([group for group in groups if group["family"] == "muon"], weight_decay=0.1),
        torch.optim.AdamW([group for group in groups if group["family"] == "adamw"], betas=(0.9, 0.95)),
    ]


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(lt.param_groups(model, "sgd", lr=lr), momentum=0.9)


@dataclass(frozen=True)
class Family:
    """A model and its optimizer; `centre` of the LRs, absolute; more seeds where fewer had left it open."""

    title: str
    model: type[Looped] = Looped
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer | list[torch.optim.Optimizer]] | None = None
    centre: float = 2 * CENTRE
    seeds: int = SEEDS

    def experiment(self) -> lt.Experiment:
        """The reference experiment with this model and optimizer."""
        reference = lt.reference_experiment(SIZE)
        return replace(
            reference,
            name=self.title,
            make_model=self.model,
            optimizer=self.optimizer,
            loops=float if self.model is Injected else None,
        )


FAMILIES = {
    "pre-norm": Family("pre-norm (the paper)"),
    "injected": Family("prelude, loop, coda; input injected, random N", Injected, seeds=MORE_SEEDS),
    "stream-norm": Family("a norm on the stream", StreamNorm),
    "sandwich": Family("sandwich norms", Sandwich),
    "post-norm": Family("post-norm", PostNorm),
    "per-visit": Family("gains and low-rank maps per visit", PerVisit),
    "muon": Family("pre-norm, Muon", optimizer=muon, centre=0.02),
    "sgd": Family("pre-norm, SGD", optimizer=sgd, centre=0.5),
}
CELLS = [
    Cell(name, family.experiment, LOOPS, ("factored", "unscaled"), OCTAVES, family.centre, family.seeds)
    for name, family in FAMILIES.items()
]


def draw_curves(verdicts: dict[str, lt.Verdict]) -> Figure:
    """Loss against LR, a panel per family: `factored`, and dashed as made."""
    height, columns = math.ceil(len(verdicts) / COLUMNS), min(COLUMNS, len(verdicts))
    figure = Figure(figsize=(2.7 * columns + 0.3, 2.7 * height + 0.5), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False)
    for panel, (title, verdict) in zip(panels.ravel(), verdicts.items(), strict=False):
        draw_losses(panel, verdict.rules["factored"])
        draw_losses(panel, verdict.rules["unscaled"], "--")
        panel.set_title(title, loc="left", fontsize="small")
    for panel in panels.ravel()[len(verdicts) :]:
        panel.remove()
    for panel in panels[:, 0]:
        panel.set_ylabel("held-out loss, nats")
    for panel in panels[-1]:
        panel.set_xlabel("base LR")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    told = [f"{label}, {'factored' if place < len(LOOPS) else 'as made'}" for place, label in enumerate(labels)]
    figure.legend(handles, told, loc="outside upper center", ncols=len(told), frameon=False, fontsize="small")
    return figure


def first_line(verdicts: dict[str, lt.Verdict]) -> str:
    """Where one LR does not carry, where that cannot be told, and where loops pay."""
    by_answer: dict[str, list[str]] = {"DRIFTS": [], "INCONCLUSIVE": [], "FLAT": []}
    for title, verdict in verdicts.items():
        cause = "" if verdict.answer == "FLAT" else f" ({verdict.judged.cause})"
        by_answer[verdict.answer].append(f"{title}{cause}")
    words = {
        "DRIFTS": "Under `factored` the best LR drifts with N in",
        "INCONCLUSIVE": "Not settled in",
        "FLAT": "FLAT in",
    }
    lines = [f"- {words[answer]}: {'; '.join(titles) or 'none'}." for answer, titles in by_answer.items()]
    for rule, made in (("factored", "`factored`"), ("unscaled", "as made")):
        gained = {title: gain_of_loops(verdict.rules[rule]) for title, verdict in verdicts.items()}
        pay = [title for title, gain in gained.items() if gain.low > 0]
        cost = [title for title, gain in gained.items() if gain.high < 0]
        lines.append(
            f"- Trained {made}, N = {LOOPS[-1]} ends lower than N = {LOOPS[0]} in {len(pay)} of {len(verdicts)}, "
            f"higher in: {'; '.join(cost) or 'none'}."
        )
    return "\n".join(lines)


def gains(verdict: lt.Verdict) -> pd.DataFrame:
    """What loops gain under each rule."""
    return pd.DataFrame([{"loops gain": gain_of_loops(judged).text(3)} for judged in verdict.rules.values()])


def report(out: Path, finished: list[Cell]) -> str:
    """The README of the families that are finished."""
    runs = {FAMILIES[cell.name].title: pd.read_csv(cell.table(out)) for cell in finished}
    verdicts = {title: lt.check(frame, "factored") for title, frame in runs.items()}
    draw_drifts(verdicts).savefig(out / "drifts.png", dpi=150)
    draw_curves({cell.name: verdicts[FAMILIES[cell.name].title] for cell in finished}).savefig(
        out / "curves.png", dpi=150
    )
    lines = [
        "# Whether one learning rate carries in the models that people train",
        "",
        first_line(verdicts),
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        f"N = {' and '.join(map(str, LOOPS))}, {SEEDS} paired seeds, or {MORE_SEEDS} where these left the drift open, "
        f"LRs 0.75 octave apart, the grid two or four LRs longer where the best was its last; {SIZE.steps} steps of "
        f"{SIZE.batch} × {SIZE.sequence} bytes. Drift in octaves of the best base LR per doubling of N, regret in nats "
        "at the largest N, 90 % intervals over seeds. "
        "“Loops gain” is the loss at the best LR of the smallest N less that at the best LR of the largest, by the "
        "grid, paired by seed: above 0, loops pay.",
        "",
        "![drifts](drifts.png)",
        "",
        "![loss over LR](curves.png)",
        "",
        "Shaded: the range of the seeds; starred: fitted optima; dashed: as made; ×: a seed diverges.",
    ]
    for title, verdict in verdicts.items():
        rows = pd.concat([rows_of(verdict), gains(verdict)], axis=1)
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", table(rows)]
    lines += ["", *footer(runs.values())]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = options(__doc__, REPORT).parse_args()
    finished = run_cells(CELLS, arguments.out, arguments.minutes, arguments.workers)
    publish(arguments.out, report(arguments.out, finished))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
