"""Small looped models of every build that is met in public code, each with the plan that the theory asks for.

The rows are written down by hand from the definition: N is how often a matrix acts in a chain of residual adds, L
counts the blocks. An entry with a `refusal` is a model that no faithful rewrite is known for.
"""

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import looptransfer as lt
from tests.models import WIDTH, Looped, Mixer, ResidualMLP, TheoryModel, inputs, mlp, tokens

Row = tuple[str, str, float]  # layer, branch, visits


@dataclass(frozen=True, eq=False)
class Entry:
    """A model, inputs for it, and what `parametrize` should answer."""

    name: str
    family: str
    make: Callable[[], nn.Module]
    rows: tuple[Row, ...] = ()
    layers: int = 1
    example: Callable[[], Any] = field(default=lambda: inputs(2, 4, WIDTH))
    warns: tuple[str, ...] = ()  # how the caveats begin
    refusal: str | None = None  # what the refusal says
    line: str = ""  # and what stands on the line that it names
    kwargs: dict[str, Any] = field(default_factory=dict)  # for parametrize
    training: bool = True
    gradients: bool = True  # else the model is rewritten and run under no_grad
    needs: tuple[str, ...] = ()  # packages that may be missing
    bugs: dict[str, str] = field(default_factory=dict)  # test (with " train", " eval") -> what looptransfer gets wrong

    def build(self) -> nn.Module:
        """The model as it is first met: in float64, the same weights at every call."""
        torch.manual_seed(0)
        return self.make().double().train(self.training)

    def multipliers(self) -> list[float]:
        """1/(N √L) of every row."""
        return [1 / (visits * self.layers**0.5) for _, _, visits in self.rows]

    def available(self) -> bool:
        """The packages that it needs are installed."""
        return all(importlib.util.find_spec(name) for name in self.needs)


def per_block(blocks: Sequence[str] | str, branches: Sequence[str], visits: float, count: int = 1) -> tuple[Row, ...]:
    """Rows of blocks that are built alike; a list is given by its name and length."""
    names = [f"{blocks}.{i}" for i in range(count)] if isinstance(blocks, str) else blocks
    return tuple(
        (name, f"{name}{branch if branch[0] == ':' else f'.{branch}'}", visits) for name in names for branch in branches
    )


ZOO: list[Entry] = []


def add(name: str, family: str, make: Callable[[], nn.Module], *rows: Row, **others: Any) -> None:
    """Put an entry into the zoo. L is the number of blocks in the rows where it is not given."""
    others.setdefault("layers", len({layer for layer, _, _ in rows}))
    ZOO.append(Entry(name, family, make, rows, **others))


UNRECOGNISED = r"at \S+ data meets what learned matrices made of it"
GATED = r"at \S+ the stream is multiplied by what learned matrices made"
SCALED = r"the stream is multiplied by a constant at \S+ between two residual adds"
KERNEL = r"the kernel called at \S+ adds a residual branch to its own input"
NO_MODULE = r"the residual branch added at \S+ is not the output of a module of its own"
REUSED = r"the residual branch added at \S+ also feeds something else"
TIME = r"the residual add at \S+ runs over time, not over depth"

# -- parts


def ffn(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class PreNormBlock(nn.Module):
    def __init__(self, attn: nn.Module | None = None, feed: nn.Module | None = None) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(WIDTH)
        self.attn = attn or Mixer()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = feed or ffn()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PostNormBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.attn, self.mlp = Mixer(), ffn()
        self.attn_norm, self.mlp_norm = norm(WIDTH), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn_norm(x + self.attn(x))
        normed: Tensor = self.mlp_norm(x + self.mlp(x))
        return normed


class SandwichBlock(nn.Module):
    """A norm before and one after each branch, inside the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Mixer(), ffn()
        self.before_attn, self.after_attn = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.before_mlp, self.after_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after_attn(self.attn(self.before_attn(x)))
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


class Branch(nn.Module):
    """x + f(x), the least that a block can be."""

    def __init__(self, f: nn.Module | None = None) -> None:
        super().__init__()
        self.f = f or mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Repeated(nn.Module):
    """One layer again and again; further arguments go to each of its calls."""

    def __init__(self, layer: nn.Module, loops: int = 3) -> None:
        super().__init__()
        self.layer, self.loops = layer, loops

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for _ in range(self.loops):
            x = self.layer(x, *others)
        return x


BOTH = ("attn", "mlp")

# -- the theory's models and plain residual blocks


class ConvBlock(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PostActivationBlock(ConvBlock):
    """The first ResNets: a ReLU over the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Spelled(nn.Module):
    """x + f(x) in another spelling."""

    def __init__(self, spelling: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.spelling, self.f = spelling, nn.Sequential(nn.Tanh(), *ffn())  # keeps no input that an add overwrites

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for _ in range(3):
            x = self.spelling(x, self.f)
        return x


def add_into_branch(x: Tensor, f: nn.Module) -> Tensor:
    y: Tensor = f(x)
    y += x
    return y


SPELLINGS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "torch.add": lambda x, f: torch.add(x, f(x)),
    "torch.add with keywords": lambda x, f: torch.add(input=x, other=f(x)),
    "add_": lambda x, f: x.add_(f(x)),
    "into the branch": add_into_branch,
    "sum of a list": lambda x, f: sum([x, f(x)]),  # type: ignore[return-value]
    "branch first": lambda x, f: f(x) + x,
    "reshaped": lambda x, f: x + f(x.flatten(0, 1)).view_as(x),
    "cast": lambda x, f: x + f(x).to(x.dtype),
    "transposed": lambda x, f: (x.transpose(0, 1) + f(x).transpose(0, 1)).transpose(0, 1),
    "in two halves": lambda x, f: torch.cat([half + f(half) for half in x.chunk(2, dim=1)], dim=1),
    "halves of the branch": lambda x, f: x + torch.cat([f(half) for half in x.chunk(2, dim=1)], dim=1),
    "unbound": lambda x, f: torch.stack([row + f(row) for row in x.unbind(0)]),
    "minus": lambda x, f: x - f(x),
}


def picture() -> Tensor:
    return inputs(2, 4, 5, 5)


add("one matrix", "theory", lambda: TheoryModel(1, 4), ("layers.0", "layers.0", 4))
for count in (2, 3):
    rows = tuple((f"layers.{i}", f"layers.{i}", 4) for i in range(count))
    add(f"{count} matrices", "theory", lambda count=count: TheoryModel(count, 4), *rows)
add("residual MLP", "plain", lambda: ResidualMLP(5), ("f", "f", 5))
add(
    "conv and batch norm",
    "plain",
    lambda: Looped([ConvBlock()]),
    *per_block("blocks", ["body"], 3),
    example=picture,
    warns=("norm on the branch",),
)
add(
    "two conv blocks",
    "plain",
    lambda: Looped([ConvBlock(), ConvBlock()]),
    *per_block("blocks", ["body"], 3, 2),
    example=picture,
    warns=("norm on the branch",),
)
add(
    "a ReLU over the sum",
    "plain",
    lambda: Looped([PostActivationBlock()]),
    *per_block("blocks", ["body"], 3),
    example=picture,
    warns=("norm on the branch",),
)
for name, spelling in SPELLINGS.items():
    add(f"spelled: {name}", "plain", lambda spelling=spelling: Spelled(spelling), ("f", "f", 3))
add(
    "spelled: torch.add with alpha",
    "plain",
    lambda: Spelled(lambda x, f: torch.add(x, f(x), alpha=0.5)),
    ("f", "f", 3),
    warns=("existing depth scaling",),
)

# -- torch's own layers

SIZES: dict[str, Any] = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 2 * WIDTH, "dropout": 0.1}


def encoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(**SIZES, batch_first=True, norm_first=norm_first)


def decoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerDecoderLayer(**SIZES, batch_first=True, norm_first=norm_first)


def encoder(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(norm_first), num_layers=2, enable_nested_tensor=False)


def with_memory() -> tuple[Tensor, Tensor]:
    return inputs(2, 4, WIDTH), inputs(2, 3, WIDTH, seed=1)


MODES = {"train": {}, "eval": {"training": False}, "no_grad": {"training": False, "gradients": False}}
for first in (True, False):
    for mode, how in MODES.items():
        which = f"{'pre' if first else 'post'}-norm, {mode}"
        common: dict[str, Any] = {"warns": () if first else ("post-norm",), **how}
        add(
            f"TransformerEncoderLayer, {which}",
            "torch layers",
            lambda first=first: Repeated(encoder_layer(first)),
            *per_block(["layer"], ["dropout1", "dropout2"], 3),
            **common,
        )
        add(
            f"TransformerEncoder, {which}",
            "torch layers",
            lambda first=first: Repeated(encoder(first)),
            *per_block("layer.layers", ["dropout1", "dropout2"], 3, 2),
            **common,
        )
        add(
            f"TransformerDecoderLayer, {which}",
            "torch layers",
            lambda first=first: Repeated(decoder_layer(first)),
            *per_block(["layer"], ["dropout1", "dropout2", "dropout3"], 3),
            example=with_memory,
            **common,
        )

# -- Universal Transformers, and loops between a prelude and a coda


class Universal(nn.Module):
    """Position and step signals before every step; with `inject` the embedded input too."""

    def __init__(self, block: nn.Module, learned_steps: bool, inject: bool = False, loops: int = 4) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(11, WIDTH), block, nn.Linear(WIDTH, 11)
        self.loops, self.inject = loops, inject
        self.step = nn.Embedding(loops, WIDTH) if learned_steps else None
        self.register_buffer("signal", inputs(loops, 5, WIDTH, seed=3))

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embedding(ids)
        h = e
        for i in range(self.loops):
            h = h + self.signal[i]
            if self.step is not None:
                h = h + self.step(torch.tensor(i))
            if self.inject:
                h = h + e
            h = self.block(h)
        logits: Tensor = self.head(h)
        return logits


class LearnedPositions(nn.Module):
    """A position table of learned numbers that is added once, before the loop, where loop and table share a line."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.table = nn.Embedding(11, WIDTH), nn.Parameter(torch.randn(5, WIDTH))
        self.blocks, self.norm = nn.ModuleList([PreNormBlock(), PreNormBlock()]), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.table
        for _ in range(3):
            for block in self.blocks:
                h = block(h)
            h = self.norm(h)
        return h @ self.embedding.weight.T


class Recurrent(nn.Module):
    """Prelude, a loop that starts from noise and mixes the embedded input in at its entry, coda."""

    def __init__(self, block: type[nn.Module] = SandwichBlock, drawn: bool = False) -> None:
        super().__init__()
        self.embedding, self.adapter = nn.Embedding(11, WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.prelude = nn.ModuleList([block()])
        self.core = nn.ModuleList([block(), block()])
        self.coda = nn.ModuleList([block()])
        self.norm, self.head, self.drawn = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 11), drawn

    def forward(self, ids: Tensor, num_steps: int = 4) -> Tensor:
        e = self.embedding(ids)
        for block in self.prelude:
            e = block(e)
        state = 0.4 * torch.randn_like(e)
        for _ in range(random.randint(2, 6) if self.drawn else num_steps):
            state = self.adapter(torch.cat([state, e], dim=-1))
            for block in self.core:
                state = block(state)
        for block in self.coda:
            state = block(state)
        logits: Tensor = self.head(self.norm(state))
        return logits


class HuginnBlock(SandwichBlock):
    """The second norm is over the sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_attn(self.attn(self.before_attn(x)) + x)
        normed: Tensor = self.after_mlp(self.mlp(self.before_mlp(x)) + x)
        return normed


def stages(branches: Sequence[str], visits: float) -> tuple[Row, ...]:
    once = {stage: per_block(stage, branches, 1) for stage in ("prelude", "coda")}
    return (*once["prelude"], *per_block("core", branches, visits, 2), *once["coda"])


def steps() -> dict[str, Any]:
    return {"ids": tokens(), "num_steps": 5}


SANDWICHED = ("after_attn", "after_mlp")
for steps_learned in (False, True):
    add(
        f"Universal Transformer, {'learned' if steps_learned else 'fixed'} steps",
        "universal",
        lambda learned=steps_learned: Universal(PreNormBlock(), learned),
        *per_block(["block"], BOTH, 4),
        example=tokens,
    )
add(
    "Universal Transformer, post-norm",
    "universal",
    lambda: Universal(PostNormBlock(), learned_steps=False),
    *per_block(["block"], BOTH, 4),
    example=tokens,
    warns=("post-norm",),
)
add(
    "Universal Transformer, input added at each step",
    "universal",
    lambda: Universal(PreNormBlock(), learned_steps=False, inject=True),
    *per_block(["block"], BOTH, 4),
    example=tokens,
    warns=("streams left alone",),
)
add(
    "learned positions, tied head, norm at the end of each loop",
    "universal",
    LearnedPositions,
    *per_block("blocks", BOTH, 3, 2),
    example=tokens,
    warns=("norm in the loop",),
)
add(
    "prelude, loop, coda",
    "prelude-loop-coda",
    Recurrent,
    *stages(SANDWICHED, 5),
    example=steps,
    warns=("visits differ", "not scaled", "norm on the branch"),
)
add(
    "prelude, loop, coda, norms over the sums",
    "prelude-loop-coda",
    lambda: Recurrent(HuginnBlock),
    *stages(BOTH, 5),
    example=steps,
    warns=("post-norm", "visits differ", "not scaled"),
)
add(
    "prelude, loop of random length, coda",
    "prelude-loop-coda",
    lambda: Recurrent(PreNormBlock, drawn=True),
    *stages(BOTH, 4.5),
    example=tokens,
    kwargs={"loops": 4.5},
    warns=("visits differ", "not scaled"),
)

# -- tying


def in_order(order: str, loops: int = 1) -> Looped:
    """Blocks by letter; a letter that comes back is the same object."""
    blocks = {letter: PreNormBlock() for letter in sorted(set(order))}
    return Looped([blocks[letter] for letter in order], loops)


def tied(names: Sequence[str], count: int = 2) -> Looped:
    """Distinct blocks that share the parameters whose names begin so."""
    blocks = [PreNormBlock() for _ in range(count)]
    for name, parameter in list(blocks[0].named_parameters()):
        if name.startswith(tuple(names)):
            where, _, last = name.rpartition(".")
            for block in blocks[1:]:
                setattr(block.get_submodule(where), last, parameter)
    return Looped(list(blocks))


def one_object(attn: bool) -> Looped:
    """Blocks of their own around one attention, or one MLP."""
    shared = Mixer() if attn else ffn()
    blocks = [PreNormBlock(attn=shared) if attn else PreNormBlock(feed=shared) for _ in range(2)]
    return Looped(list(blocks))


def sequential() -> nn.Module:
    block = PreNormBlock()
    return nn.Sequential(nn.Embedding(11, WIDTH), *[block] * 4, nn.Linear(WIDTH, 11))


for order in ("ABCABC", "AABBCC"):
    first = [f"blocks.{order.index(letter)}" for letter in "ABC"]
    add(f"order {order}", "tying", lambda order=order: in_order(order), *per_block(first, BOTH, 2))
add(
    "order ABCBCD",
    "tying",
    lambda: in_order("ABCBCD"),
    *per_block(["blocks.0"], BOTH, 1),
    *per_block(["blocks.1", "blocks.2"], BOTH, 2),
    *per_block(["blocks.5"], BOTH, 1),
    warns=("visits differ",),
)
add("one object in a list", "tying", lambda: in_order("AAAA", 2), *per_block("blocks", BOTH, 8))
add("one object in a Sequential", "tying", sequential, *per_block(["1"], BOTH, 4), example=tokens)
add("all parameters tied", "tying", lambda: tied([""]), *per_block("blocks", BOTH, 6, 2), layers=1)
add(
    "all matrices tied, norms apart",
    "tying",
    lambda: tied(["attn.", "mlp."]),
    *per_block("blocks", BOTH, 6, 2),
    layers=1,
)
HALF_TIED = {
    "attention": tuple((f"blocks.{i}", f"blocks.{i}.{b}", n) for i in range(2) for b, n in (("attn", 6), ("mlp", 3))),
    "MLP": tuple((f"blocks.{i}", f"blocks.{i}.{b}", n) for i in range(2) for b, n in (("attn", 3), ("mlp", 6))),
}
for what, half in HALF_TIED.items():
    letter = ["attn."] if what == "attention" else ["mlp."]
    add(
        f"only the {what} tied, by parameters",
        "tying",
        lambda letter=letter: tied(letter),
        *half,
        warns=("visits differ",),
    )
    add(
        f"only the {what} tied, one object",
        "tying",
        lambda attn=what == "attention": one_object(attn),
        *(row for row in half if not (row[0] == "blocks.1" and row[2] == 6)),
        warns=("visits differ",),
    )

# -- branches without a module of their own


class InlineBlock(nn.Module):
    """Both branches are computed in the block's own forward."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)
        self.mix, self.marked = nn.Parameter(torch.randn(4, 4) / 2), marked

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.mix @ x)
        x = x + (lt.residual(mixed, "mix") if self.marked else mixed)
        fed = F.gelu(self.up(x)) @ self.down
        return x + (lt.residual(fed, "feed") if self.marked else fed)


class InlineModel(nn.Module):
    """L matrices in one module without parts."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 3 for _ in range(3))
        self.marked = marked

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(2):
            for i, weight in enumerate(self.weights):
                branch = F.relu(h) @ weight
                h = h + (lt.residual(branch, f"layer{i}") if self.marked else branch)
        return h


class FunctionalPart(nn.Module):
    """A branch of function calls only, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 3),
            nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.layer_norm(x, (WIDTH,)) @ self.up) @ self.down


class SharedDropout(nn.Module):
    """One dropout object for the embedding, inside the MLP and on both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.blocks = nn.ModuleList(PreNormBlock(feed=self.feed()) for _ in range(2))

    def feed(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), self.dropout, nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        for _ in range(3):
            for block in self.blocks:
                x = x + self.dropout(block.attn(block.attn_norm(x)))
                x = x + self.dropout(block.mlp(block.mlp_norm(x)))
        return x


add(
    "functional calls in a module",
    "functional",
    lambda: Looped([Branch(FunctionalPart())]),
    *per_block("blocks", ["f"], 3),
)
add("inline", "functional", lambda: Looped([InlineBlock(marked=False)]), refusal=NO_MODULE, line="mixed")
add(
    "inline and marked",
    "functional",
    lambda: Looped([InlineBlock(marked=True), InlineBlock(marked=True)]),
    *per_block("blocks", [":mix", ":feed"], 3, 2),
)
add(
    "inline in the model itself", "functional", lambda: InlineModel(marked=False), refusal=NO_MODULE, line="else branch"
)
add(
    "inline in the model itself and marked",
    "functional",
    lambda: InlineModel(marked=True),
    *((f":layer{i}", f":layer{i}", 2) for i in range(3)),
)
add("one dropout in many roles", "functional", SharedDropout, *per_block("blocks", BOTH, 3, 2))

# -- parallel branches, learned factors, attention of other kinds


class ParallelBlock(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp, self.join = nn.LayerNorm(WIDTH), Mixer(), ffn(), join

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.join(x, self.attn(normed), self.mlp(normed))


JOINS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one after the other": lambda x, a, b: x + a + b,
    "branches first": lambda x, a, b: a + b + x,
    "branches in brackets": lambda x, a, b: x + (a + b),
    "a sum": lambda x, a, b: sum([x, a, b]),  # type: ignore[return-value]
}


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ScaledBlock(PreNormBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn_scale, self.mlp_scale = LayerScale(), LayerScale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_scale(self.attn(self.attn_norm(x)))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class GammaBlock(PreNormBlock):
    """Learned factors without modules: a vector, or with `shape=()` ReZero's one number that starts at zero."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.attn_gamma, self.mlp_gamma = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_gamma * self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x)) * self.mlp_gamma


class GroupedAttention(nn.Module):
    """Four query heads on two heads of keys and values, causal."""

    def __init__(self, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, size = heads, groups, WIDTH // heads
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * groups * size, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.q(x).view(batch, time, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, time, 2 * self.groups, -1).transpose(1, 2).chunk(2, dim=1)
        k, v = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return projected


class ModulatedBlock(PreNormBlock):
    """As in diffusion transformers: shift, scale and gate of each branch are computed from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate * self.attn(self.attn_norm(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.mlp_norm(x) * (1 + scale2) + shift2)


class ModulatedModel(nn.Module):
    """One modulation for all blocks, as in PixArt."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.blocks = nn.Linear(WIDTH, 3 * WIDTH), nn.ModuleList(PreNormBlock() for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition)).unsqueeze(1).chunk(3, dim=-1)
        for _ in range(3):
            for block in self.blocks:
                x = x + gate * block.attn(block.attn_norm(x) * (1 + scale) + shift)
                x = x + gate * block.mlp(block.mlp_norm(x) * (1 + scale) + shift)
        return x


class BiasedAttention(nn.Module):
    """Attention by position only in part: a table of relative positions, handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed: Tensor = self.out((q @ k.transpose(1, 2) + bias).softmax(-1) @ v)
        return mixed


class SharedBias(nn.Module):
    """No loop at all, and one table of relative positions for the attention of both blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 1)
        self.blocks = nn.ModuleList(PreNormBlock(BiasedAttention()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        bias = self.table(place[:, None] - place + 3).squeeze(-1)
        for block in self.blocks:
            x = x + block.attn(block.attn_norm(x), bias)
            x = x + block.mlp(block.mlp_norm(x))
        return x


class DropPath(nn.Module):
    """Stochastic depth, drawn per example."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x.div(0.8) * torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.8)


class DropPathBlock(PreNormBlock):
    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.attn_norm(x)))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class MacaronBlock(PreNormBlock):
    """As in Conformer: half a feed-forward, attention, half a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attn(self.attn_norm(x))
        return x + 0.5 * self.mlp(self.mlp_norm(x))


class ContextBlock(PreNormBlock):
    """A third branch reads the mean over positions and is added to all of them."""

    def __init__(self, marked: bool = False) -> None:
        super().__init__()
        self.context, self.marked = mlp(), marked

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        context = self.context(x.mean(dim=1, keepdim=True))
        return x + (lt.residual(context) if self.marked else context)


def weight_normed() -> nn.Module:
    linear = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(nn.LayerNorm(WIDTH), linear, nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def conditioned() -> tuple[Tensor, Tensor]:
    return inputs(2, 4, WIDTH), inputs(2, WIDTH, seed=1)


for name, join in JOINS.items():
    add(
        f"parallel branches, {name}",
        "branches",
        lambda join=join: Looped([ParallelBlock(join), ParallelBlock(join)]),
        *per_block("blocks", BOTH, 3, 2),
    )
GATES: dict[str, Callable[[], nn.Module]] = {
    "a LayerScale by hand": lambda: GammaBlock((WIDTH,)),
    "ReZero": lambda: GammaBlock(()),
    "ReZero in a vector of one": lambda: GammaBlock((1,)),
}
add(
    "LayerScale modules",
    "branches",
    lambda: Looped([ScaledBlock()]),
    *per_block("blocks", ["attn_scale", "mlp_scale"], 3),
    warns=("existing depth scaling",),
)
for name, block in GATES.items():
    add(
        name,
        "branches",
        lambda block=block: Looped([block(), block()]),
        *per_block("blocks", BOTH, 3, 2),
        warns=("existing depth scaling",),
    )
add("grouped queries", "branches", lambda: Looped([PreNormBlock(GroupedAttention())]), *per_block("blocks", BOTH, 3))
add(
    "gates from a condition",
    "branches",
    lambda: Repeated(ModulatedBlock()),
    *per_block(["layer"], BOTH, 3),
    example=conditioned,
)
add(
    "stochastic depth", "branches", lambda: Looped([DropPathBlock(), DropPathBlock()]), *per_block("blocks", BOTH, 3, 2)
)
add(
    "half a branch",
    "branches",
    lambda: Looped([MacaronBlock()]),
    *per_block("blocks", ["first", *BOTH], 3),
    warns=("existing depth scaling",),
)
add(
    "a branch that is broadcast",
    "branches",
    lambda: Looped([ContextBlock()]),
    *per_block("blocks", [*BOTH, "context"], 3),
)
add(
    "a branch that is broadcast, marked",
    "branches",
    lambda: Looped([ContextBlock(marked=True)]),
    *per_block("blocks", [*BOTH, ":branch"], 3),
)
add(
    "gates from a condition, one map for all blocks",
    "branches",
    ModulatedModel,
    *per_block("blocks", BOTH, 3, 2),
    example=conditioned,
)
add("a table of positions for all attentions", "branches", SharedBias, *per_block("blocks", BOTH, 1, 2))
add("weight norm", "branches", lambda: Looped([Branch(weight_normed())]), *per_block("blocks", ["f"], 3))

# -- experts, scans and recurrent cells inside a branch


class Routed(nn.Module):
    """The two best of three experts for each token, their outputs gathered with index_add."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(ffn() for _ in range(3))
        self.shared = ffn() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, picks = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(picks == number)
            out.index_add_(0, rows, weights[rows, place, None] * expert(flat[rows]))
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)


class Dense(nn.Module):
    """All experts at once: stacked matrices and a weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(3, WIDTH, 2 * WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(3, 2 * WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, self.up))
        each = torch.einsum("bteh,ehd->bted", hidden, self.down)
        return torch.einsum("bte,bted->btd", self.gate(x).softmax(-1), each)


class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(ffn() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (each * self.gate(x).softmax(-1).unsqueeze(-2)).sum(-1)


class ExpertSum(StackedExperts):
    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        return sum(share[..., i, None] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Scan(nn.Module):
    """A selective state space, step by step over time."""

    def __init__(self, state: int = 3) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.select = nn.Linear(WIDTH, WIDTH + 2 * state)
        self.decay = nn.Parameter(torch.rand(WIDTH, state))
        self.skip = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inner(x).chunk(2, dim=-1)
        size = self.decay.shape[1]
        delta, b, c = self.select(u).split([WIDTH, size, size], dim=-1)
        delta = F.softplus(delta)
        state = x.new_zeros(x.shape[0], WIDTH, size)
        read = []
        for t in range(x.shape[1]):
            keep = torch.exp(-delta[:, t, :, None] * self.decay.exp())
            state = keep * state + (delta[:, t] * u[:, t])[:, :, None] * b[:, t, None, :]
            read.append((state * c[:, t, None, :]).sum(-1))
        y = torch.stack(read, dim=1) + self.skip * u
        mixed: Tensor = self.out(y * F.silu(gate))
        return mixed


class LinearRecurrence(nn.Module):
    """s ← s + W s + u over time: residual adds of its own, but none on the stream of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cell, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        state, read = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            state = state + torch.tanh(self.cell(state + u[:, t]))
            read.append(state)
        mixed: Tensor = self.out(torch.stack(read, dim=1))
        return mixed


class CellOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, read = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            read.append(h)
        return torch.stack(read, dim=1)


class RNNBlock(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(WIDTH), kind(WIDTH, WIDTH, batch_first=True)
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.rnn(self.norm(x))[0]
        return x + self.mlp(x)


class DeepBranch(nn.Module):
    """A branch with residual layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), Branch(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        deep: Tensor = self.last(self.inner(self.first(x)))
        return deep


class BottleneckBlock(nn.Module):
    """Residual layers in a narrow space of their own, added in the block's own forward; as in MobileBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH)
        self.first, self.second = mlp(WIDTH // 2), mlp(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(x)
        y = y + self.first(y)
        y = y + self.second(y)
        return x + self.wide(y)


def inner_stream(block: str) -> tuple[Row, ...]:
    """The narrow stream begins anew at every visit of the block, and so do its counts."""
    return (block, f"{block}.first", 1), (block, f"{block}.second", 1), (block, f"{block}.wide", 3)


class MaskedBlock(Branch):
    """Masks are added too, and they are no numbers to be measured."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0) + (x < -1)
        return x + self.f(x) * mask


FEEDS: dict[str, Callable[[], nn.Module]] = {
    "routed experts": Routed,
    "routed experts and a shared one": lambda: Routed(shared=True),
    "experts in an einsum": Dense,
    "experts in a stack": StackedExperts,
    "experts in a sum": ExpertSum,
    "a state-space scan": Scan,
    "a linear recurrence": LinearRecurrence,
    "a GRU cell over time": CellOverTime,
    "residual layers inside": DeepBranch,
}
for name, part in FEEDS.items():
    add(
        name,
        "inside a branch",
        lambda part=part: Looped([PreNormBlock(feed=part()), PreNormBlock(feed=part())]),
        *per_block("blocks", BOTH, 3, 2),
    )
for name, kind in {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}.items():
    add(
        f"an {name}" if name != "GRU" else "a GRU",
        "inside a branch",
        lambda kind=kind: Looped([RNNBlock(kind)]),
        *per_block("blocks", ["rnn[0]", "mlp"], 3),
    )

add(
    "residual layers inside, in one forward",
    "inside a branch",
    lambda: Looped([BottleneckBlock(), BottleneckBlock()]),
    *(row for i in range(2) for row in inner_stream(f"blocks.{i}")),
    warns=("visits differ",),
)
add("masks that are added", "inside a branch", lambda: Looped([MaskedBlock()]), *per_block("blocks", ["f"], 3))

# -- streams beside each other, and what they share


class ReadAndWrite(nn.Module):
    """A small state reads from the large one, works, and writes back, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.work, self.write = mlp(), PreNormBlock(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean(-2, keepdim=True).expand_as(x).clone()
        for _ in range(3):
            z = z + self.read(z + x)
            z = self.work(z)
            x = x + self.write(x + z)
        return x


class Follower(nn.Module):
    """A second stream collects what a branch makes of the first, after every loop."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.collect = PreNormBlock(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(4):
            x = self.block(x)
            y = y + self.collect(x)
        return y


class OneProjectionForBoth(nn.Module):
    """Two branches of one layer share their first matrix: it acts once per visit, not twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 2 * WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            a, b = self.into(x).chunk(2, -1)
            x = x + self.first(a.tanh()) + self.second(b.tanh())
        return x


class NumberedParts(nn.Module):
    """Two attentions and an MLP in one block, told apart by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ff = Mixer(), Mixer(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(x)
        x = x + self.attn2(x)
        return x + self.ff(x)


class TableInAttention(nn.Module):
    """All blocks project one table of positions and score with it: the table is no layer that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, WIDTH))
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.values = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for key, value in zip(self.keys, self.values, strict=True):
                weights = (x @ key(self.table).T).softmax(-1)
                x = x + value(weights @ x)
        return x


class StackedAndCast(nn.Module):
    """All layers' weights in one tensor, cast before they are taken apart or after."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for layer in range(2):
                weight = (self.stack * 0.5)[layer].clone()
                x = x + lt.residual(x.tanh() @ weight)
        return x


class Latents(nn.Module):
    """Learned queries that mix among themselves before they see any data: the first visit has none."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, WIDTH))
        self.mix, self.look, self.norm = Mixer(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, data: Tensor) -> Tensor:
        x = self.queries.expand(data.shape[0], -1, -1)
        for _ in range(3):
            x = x + self.mix(self.norm(x))
            x = x + self.look((self.norm(x) @ data.transpose(-1, -2)).softmax(-1) @ data)
        return x


add("learned queries", "streams", Latents, refusal=NO_MODULE, line="x = x + self.mix(self.norm(x))")
add(
    "learned queries, declared",
    "streams",
    Latents,
    ("mix", "mix", 3),
    ("look", "look", 3),
    kwargs={"branches": ["mix", "look"]},
)
add(
    "reading and writing",
    "streams",
    ReadAndWrite,
    ("read", "read", 3),
    *per_block(["work"], BOTH, 3),
    ("write", "write", 3),
)
add("a second stream", "streams", Follower, *per_block(["block"], BOTH, 4), ("collect", "collect", 4))
add(
    "one projection for two branches",
    "streams",
    OneProjectionForBoth,
    ("first", "first", 3),
    ("first", "second", 3),  # in one sum with it
    layers=1,
)
add("numbered parts", "streams", lambda: Looped([NumberedParts(), NumberedParts()]),
    *per_block("blocks", ["attn1", "attn2", "ff"], 3, 2))  # fmt: skip
add("a table in attention", "streams", TableInAttention, *(("values." + i, "values." + i, 3) for i in "01"))
add("stacked weights, cast", "streams", StackedAndCast, (":branch", ":branch", 3), layers=2)

# -- branches without a learned matrix


class Pooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2) - x


class PoolFormerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool, self.mlp = nn.LayerNorm(WIDTH), Pooling(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pool(self.norm(x))
        return x + self.mlp(x)


class FourierBlock(nn.Module):
    """Post-norm, as FNet is."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.first, self.second = ffn(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + torch.fft.fft2(x).real)
        normed: Tensor = self.second(x + self.mlp(x))
        return normed


class Stages(nn.Module):
    """Lists of blocks of one branch each, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([Branch(), Branch()]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for _ in range(3):
                for block in stage:
                    x = block(x)
        return x


add(
    "stages of blocks with one branch",
    "drivers",
    Stages,
    *((f"stages.{i}.{j}", f"stages.{i}.{j}.f", 3) for i in (0, 1) for j in (0, 1)),
)

FIXED = "branches without a learned matrix"
for name, block, warns in (
    ("pooling", PoolFormerBlock, (FIXED,)),
    ("a Fourier transform", FourierBlock, (FIXED, "post-norm")),
):
    add(
        f"{name} beside an MLP",
        "fixed branches",
        lambda b=block: Looped([b()]),
        ("blocks.0", "blocks.0.mlp", 3),
        warns=warns,
    )
add(
    "pooling beside an MLP, declared",
    "fixed branches",
    lambda: Looped([PoolFormerBlock(), PoolFormerBlock()]),
    *per_block("blocks", ["pool"], 3, 2),
    *per_block("blocks", ["mlp"], 3, 2),
    kwargs={"branches": ["blocks.*.pool", "blocks.*.mlp"]},
)

# -- Hugging Face, x-transformers, PEFT


def albert(groups: int, inner: int, chunk: int) -> nn.Module:
    from transformers import AlbertConfig, AlbertModel  # noqa: PLC0415

    config = AlbertConfig(
        vocab_size=11,
        embedding_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        num_hidden_groups=groups,
        inner_group_num=inner,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=16,
        chunk_size_feed_forward=chunk,
        hidden_dropout_prob=0.1,
    )
    return AlbertModel(config)


def language_model(kind: str, order: str, **settings: Any) -> nn.Module:
    """A decoder of Hugging Face whose list of layers holds the same objects several times."""
    import transformers  # noqa: PLC0415

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=11,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=len(set(order)),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        use_cache=False,
        pad_token_id=0,
        **settings,
    )
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(config)
    layers = dict(zip(sorted(set(order)), model.model.layers, strict=True))
    model.model.layers = nn.ModuleList(layers[letter] for letter in order)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(order)
    return model


def gpt2(tie: bool = True) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=WIDTH, n_layer=3, n_head=2, use_cache=False)
    model = GPT2LMHeadModel(config)
    first, *others = model.transformer.h
    for block in others if tie else []:
        for name, module in first.named_modules():
            if type(module).__name__ == "Conv1D":
                block.get_submodule(name).weight = module.weight
    return model


def hierarchical() -> nn.Module:
    from transformers import HrmTextConfig, HrmTextForCausalLM  # noqa: PLC0415

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "head_dim": 4}
    cycles = {"H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12, "num_layers_per_stack": 2}
    return HrmTextForCausalLM(
        HrmTextConfig(vocab_size=11, max_position_embeddings=16, use_cache=False, **sizes, **cycles)
    )


def perceiver() -> nn.Module:
    from transformers import PerceiverConfig, PerceiverModel  # noqa: PLC0415

    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    blocks = {"num_blocks": 3, "num_self_attends_per_block": 2}
    return PerceiverModel(PerceiverConfig(num_latents=3, d_latents=WIDTH, d_model=WIDTH, **heads, **blocks))


def reformer() -> nn.Module:
    from transformers import ReformerConfig, ReformerModel  # noqa: PLC0415

    config = ReformerConfig(
        vocab_size=11,
        hidden_size=WIDTH,
        feed_forward_size=2 * WIDTH,
        num_attention_heads=2,
        attention_head_size=4,
        attn_layers=["local", "local"],
        local_attn_chunk_length=3,
        axial_pos_embds=False,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    return ReformerModel(config)


def bert(chunk: int) -> nn.Module:
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = BertModel(BertConfig(vocab_size=11, max_position_embeddings=16, chunk_size_feed_forward=chunk, **sizes))
    model.encoder.layer = nn.ModuleList([*model.encoder.layer] * 3)
    return model


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: PLC0415

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=11, max_position_embeddings=16, use_cache=False, **sizes))
    model.gpt_neox.layers = nn.ModuleList([*model.gpt_neox.layers] * 3)
    return model


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel  # noqa: PLC0415

    config = T5Config(vocab_size=11, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2, use_cache=False)
    model = T5EncoderModel(config)
    first, second = model.encoder.block
    model.encoder.block = nn.ModuleList([first, second, second, second])
    return model


def xtransformer(**settings: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper  # noqa: PLC0415

    layers = Decoder(dim=WIDTH, heads=2, attn_dim_head=8, ff_mult=2, rotary_pos_emb=True, **settings)
    return TransformerWrapper(num_tokens=11, max_seq_len=8, attn_layers=layers)


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    return get_peft_model(language_model("Llama", "AAA"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))  # type: ignore[no-any-return]


def ids_and_mask() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 5, dtype=torch.long)}


def ids() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


HF = ("transformers",)
ALBERT = ("attention.output_dropout", "ffn_output")
for groups, inner, chunk in ((1, 1, 0), (2, 1, 0), (1, 1, 2), (3, 2, 0)):
    names = [f"encoder.albert_layer_groups.{g}.albert_layers.{i}" for g in range(groups) for i in range(inner)]
    add(
        f"ALBERT, {groups} × {inner} layers{', chunked' * bool(chunk)}",
        "Hugging Face",
        lambda sizes=(groups, inner, chunk): albert(*sizes),
        *per_block(names, ALBERT, 6 // groups),
        example=(lambda: {"input_ids": tokens(time=6)}) if chunk else ids_and_mask,
        warns=("post-norm",),
        needs=HF,
    )
DECODER = ("self_attn[0]", "mlp")
add(
    "Llama, layers repeated",
    "Hugging Face",
    lambda: language_model("Llama", "ABABAB"),
    *per_block("model.layers", DECODER, 3, 2),
    example=ids,
    needs=HF,
)
add(
    "Llama, middle layers cycled",
    "Hugging Face",
    lambda: language_model("Llama", "ABCBCD"),
    *per_block(["model.layers.0"], DECODER, 1),
    *per_block(["model.layers.1", "model.layers.2"], DECODER, 2),
    *per_block(["model.layers.5"], DECODER, 1),
    example=ids,
    warns=("visits differ",),
    needs=HF,
)
add(
    "Gemma 2, layers repeated",
    "Hugging Face",
    lambda: language_model("Gemma2", "AAA"),
    *per_block("model.layers", ["post_attention_layernorm", "post_feedforward_layernorm"], 3),
    example=ids,
    warns=("norm on the branch",),
    needs=HF,
)
add(
    "Granite with a residual multiplier",
    "Hugging Face",
    lambda: language_model("Granite", "ABAB", residual_multiplier=0.22),
    *per_block("model.layers", DECODER, 2, 2),
    example=ids,
    warns=("existing depth scaling",),
    needs=HF,
)
add(
    "GPT-2, weights tied across blocks",
    "Hugging Face",
    gpt2,
    *per_block("transformer.h", ["attn[0]", "mlp"], 3, 3),
    layers=1,
    example=ids,
    needs=HF,
)
add(
    "T5 encoder, a layer repeated",
    "Hugging Face",
    t5,
    *per_block(["encoder.block.0"], ["layer.0.dropout", "layer.1.dropout"], 1),
    *per_block(["encoder.block.1"], ["layer.0.dropout", "layer.1.dropout"], 3),
    example=ids,
    warns=("visits differ",),
    needs=HF,
)
for chunk in (0, 2):
    add(
        f"BERT, layers repeated{', chunked' * bool(chunk)}",
        "Hugging Face",
        lambda chunk=chunk: bert(chunk),
        *per_block("encoder.layer", ["attention.output.dropout", "output.dropout"], 3, 2),
        example=lambda: {"input_ids": tokens(time=6)},
        warns=("post-norm",),
        needs=HF,
    )
add(
    "GPT-NeoX, parallel branches, layers repeated",
    "Hugging Face",
    neox,
    *per_block("gpt_neox.layers", ["post_mlp_dropout", "post_attention_dropout"], 3, 2),
    example=ids,
    needs=HF,
)
add(
    "Reformer, no loop",
    "Hugging Face",
    reformer,
    *per_block("encoder.layers", ["attention[0]", "feed_forward"], 1, 2),
    example=lambda: {"input_ids": tokens(time=6)},
    training=False,
    gradients=False,
    needs=HF,
)
add(
    "Perceiver",
    "Hugging Face",
    perceiver,
    *per_block(["encoder.cross_attention"], ["attention.output", "mlp"], 1),
    *per_block("encoder.self_attends", ["attention.output", "mlp"], 3, 2),
    example=lambda: {"inputs": inputs(2, 4, WIDTH)},
    warns=("visits differ",),
    needs=HF,
)
add(
    "HRM",
    "Hugging Face",
    hierarchical,
    *per_block("model.L_module.layers", DECODER, 4, 2),
    *per_block("model.H_module.layers", DECODER, 2, 2),
    example=ids,
    warns=("streams left alone", "norm in the loop", "loops cut", "visits differ"),
    needs=HF,
)
X = ("x_transformers",)
XBRANCHES = ("0.1[0]", "1.1", "2.1[0]", "3.1")  # each list of norm, branch and residual is a layer
XLAYERS = tuple((f"attn_layers.layers.{i}", f"attn_layers.layers.{branch}") for i, branch in enumerate(XBRANCHES))
add(
    "x-transformers, tied layers",
    "x-transformers",
    lambda: xtransformer(depth=3, weight_tie_layers=True),
    *((layer, branch, 3) for layer, branch in XLAYERS[:2]),
    example=tokens,
    needs=X,
)
add(
    "x-transformers, an order of layers",
    "x-transformers",
    lambda: xtransformer(depth=2, layers_execute_order=(0, 1, 2, 3, 2, 3)),
    *((layer, branch, 1 + i // 2) for i, (layer, branch) in enumerate(XLAYERS)),
    example=tokens,
    warns=("visits differ",),
    needs=X,
)
add(
    "Llama with LoRA",
    "Hugging Face",
    adapted,
    *per_block("base_model.model.model.layers", DECODER, 3),
    example=ids,
    needs=("transformers", "peft"),
)

# -- recursion with two states


class RootMeanSquareBlock(PostNormBlock):
    def __init__(self) -> None:
        super().__init__(nn.RMSNorm)


class Level(nn.Module):
    def __init__(self, count: int, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(count))

    def forward(self, state: Tensor, injection: Tensor) -> Tensor:
        state = state + injection
        for layer in self.layers:
            state = layer(state)
        return state


class Hierarchical(nn.Module):
    """A slow state over a fast one; gradients through the last outer cycle only."""

    def __init__(
        self, high: int = 2, low: int = 2, buffer: bool = True, block: Callable[[], nn.Module] = RootMeanSquareBlock
    ) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)
        self.high_level, self.low_level, self.high, self.low = Level(1, block), Level(2, block), high, low
        if buffer:
            self.register_buffer("high_start", inputs(WIDTH, seed=4))
            self.register_buffer("low_start", inputs(WIDTH, seed=5))
        else:
            self.high_start = self.low_start = torch.zeros(WIDTH, dtype=torch.float64)

    def cycle(self, high: Tensor, low: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.low):
            low = self.low_level(low, high + e)
        return self.high_level(high, low), low

    def forward(self, ids: Tensor) -> dict[str, Any]:
        e = self.embedding(ids)
        high, low = self.high_start.expand_as(e), self.low_start.expand_as(e)
        with torch.no_grad():
            for _ in range(self.high - 1):
                high, low = self.cycle(high, low, e)
        high, low = self.cycle(high, low, e)
        return {"logits": self.head(high), "state": (high.detach(), low.detach())}


class Tiny(Hierarchical):
    """One network for both states, cut by detach."""

    def __init__(self) -> None:
        super().__init__(high=3, low=2, buffer=False)
        self.high_level = self.low_level = Level(2, RootMeanSquareBlock)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        e = self.embedding(ids)
        high, low = torch.zeros_like(e), torch.zeros_like(e)
        for _ in range(self.high):
            high, low = self.cycle(high.detach(), low.detach(), e)
        return {"logits": self.head(high), "state": (high, low)}


CUT = ("streams left alone", "post-norm", "loops cut")
for buffer in (True, False):
    add(
        f"two levels from {'buffers' if buffer else 'zeros'}",
        "recursion",
        lambda buffer=buffer: Hierarchical(buffer=buffer),
        *per_block("low_level.layers", BOTH, 4, 2),
        *per_block("high_level.layers", BOTH, 2, 1),
        example=tokens,
        warns=(*CUT, "visits differ"),
    )
add(
    "two levels, pre-norm",
    "recursion",
    lambda: Hierarchical(block=PreNormBlock),
    *per_block("low_level.layers", BOTH, 4, 2),
    *per_block("high_level.layers", BOTH, 2, 1),
    example=tokens,
    warns=("streams left alone", "loops cut", "visits differ"),
)
add(
    "one network for two levels",
    "recursion",
    Tiny,
    *per_block("high_level.layers", BOTH, 9, 2),
    example=tokens,
    warns=CUT,
)

# -- visits that differ a little


class GatedVisits(nn.Module):
    """One block, a learned factor for every visit."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.block, self.gates = PreNormBlock(), nn.ParameterList(torch.ones(()) for _ in range(2 * loops))
        self.loops = loops

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.loops):
            x = x + self.gates[2 * i] * self.block.attn(self.block.attn_norm(x))
            x = x + self.gates[2 * i + 1] * self.block.mlp(self.block.mlp_norm(x))
        return x


class AdaptedLinear(nn.Module):
    """A shared matrix, and a low-rank one for every visit."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.down = nn.ParameterList(torch.randn(WIDTH, 2) / 3 for _ in range(loops))
        self.up = nn.ParameterList(torch.zeros(2, WIDTH) for _ in range(loops))

    def forward(self, x: Tensor, visit: int) -> Tensor:
        adapted: Tensor = self.shared(x) + x @ self.down[visit] @ self.up[visit]
        return adapted


class AdaptedBlock(nn.Module):
    def __init__(self, loops: int) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), AdaptedLinear(loops)

    def forward(self, x: Tensor, visit: int) -> Tensor:
        return x + self.f(torch.tanh(self.norm(x)), visit)


class AdaptedVisits(nn.Module):
    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.blocks, self.loops = nn.ModuleList(AdaptedBlock(loops) for _ in range(2)), loops

    def forward(self, x: Tensor) -> Tensor:
        for visit in range(self.loops):
            for block in self.blocks:
                x = block(x, visit)
        return x


class NormPerVisit(nn.Module):
    """Shared matrices under norms of their own."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.norms, self.f = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(loops)), ffn()

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + self.f(norm(x))
        return x


class BesideBlock(PreNormBlock):
    """Attention and a map that is handed to the block are added at once."""

    def forward(self, x: Tensor, own: nn.Module) -> Tensor:
        normed = self.attn_norm(x)
        x = x + (own(normed) + self.attn(normed))
        return x + self.mlp(self.mlp_norm(x))


class MapPerVisit(nn.Module):
    """Two blocks whose attention has, beside it, a map of every visit's own."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BesideBlock() for _ in range(2))
        self.maps = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(loops))

    def forward(self, x: Tensor) -> Tensor:
        for own in self.maps:
            for block, beside in zip(self.blocks, own, strict=True):
                x = block(x, beside)
        return x


add("a gate per visit", "visits", GatedVisits, *per_block(["block"], BOTH, 3), warns=("existing depth scaling",))
add("a low-rank matrix per visit", "visits", AdaptedVisits, *per_block("blocks", ["f"], 3, 2))
add("a norm per visit", "visits", NormPerVisit, ("f", "f", 3))
add(
    "a map per visit beside the shared attention",
    "visits",
    MapPerVisit,
    *(row for n in range(2) for row in ((f"blocks.{n}", f"maps.0.{n}", 3), *per_block([f"blocks.{n}"], BOTH, 3))),
    *((f"blocks.{n}", f"maps.{visit}.{n}", 3) for visit in (1, 2) for n in range(2)),
)

# -- drivers


class PairDriver(nn.Module):
    """Attention and MLP in pairs, added by the driver."""

    def __init__(self, count: int = 2, loops: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Mixer(), mlp()]) for _ in range(count))
        self.norm, self.loops = nn.LayerNorm(WIDTH), loops

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for attn, feed in self.layers:
                x = attn(x) + x
                x = feed(x) + x
        normed: Tensor = self.norm(x)
        return normed


class ListDriver(nn.Module):
    """Attention and MLP in lists of their own."""

    def __init__(self, count: int = 2, loops: int = 3) -> None:
        super().__init__()
        self.attns, self.mlps = nn.ModuleList(Mixer() for _ in range(count)), nn.ModuleList(mlp() for _ in range(count))
        self.loops = loops

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for attn, feed in zip(self.attns, self.mlps, strict=True):
                x = x + attn(x)
                x = x + feed(x)
        return x


class Wrapped(nn.Module):
    """Embedding and head around a driver."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.transformer, self.head = nn.Linear(WIDTH, WIDTH), transformer, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.transformer(self.embedding(x)).mean(dim=1))
        return logits


class PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(WIDTH), fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def wrappers(nested: bool, count: int = 2) -> nn.Module:
    pairs = [[Residual(PreNorm(Mixer())), Residual(PreNorm(ffn()))] for _ in range(count)]
    if nested:
        return Wrapped(Looped([nn.Sequential(*pair) for pair in pairs]))
    return Wrapped(Looped([part for pair in pairs for part in pair]))


class Chunked(Branch):
    """The stream in two parts along the features' neighbours, each with its own add."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([c + self.f(c) for c in x.chunk(2, dim=1)], dim=1)


class ReversibleBlock(nn.Module):
    """Two streams, each the other's branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = mlp(width), mlp(width)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        first = first + self.f(second)
        second = second + self.g(first)
        return first, second


class Reversible(nn.Module):
    """The streams start as the input twice, or as its halves."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.blocks, self.twice = (
            nn.ModuleList(ReversibleBlock(WIDTH if twice else WIDTH // 2) for _ in range(2)),
            twice,
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x, x) if self.twice else x.chunk(2, dim=-1)
        for _ in range(3):
            for block in self.blocks:
                first, second = block(first, second)
        return torch.cat([first, second], dim=-1)


class FromZero(nn.Module):
    """The state starts at zero and reads the input inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            z = z + self.f(z + x)
        return z


class FromZeroApart(FromZero):
    """The same on two lines."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            joined = z + x
            z = z + self.f(joined)
        return z


class Latents(nn.Module):
    """Learned latents read the input again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.norm, self.cross, self.block = nn.LayerNorm(WIDTH), Reading(), PreNormBlock()

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        for _ in range(3):
            z = z + self.cross(self.norm(z), x)
            z = self.block(z)
        return z


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(self.q(z), k, v))
        return mixed


class ReadingBlock(PreNormBlock):
    def __init__(self) -> None:
        super().__init__()
        self.cross_norm, self.cross = nn.LayerNorm(WIDTH), Reading()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        x = x + self.cross(self.cross_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))


class EncoderDecoder(nn.Module):
    """Two loops, the second reading what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = PreNormBlock(), ReadingBlock()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            x = self.encoder(x)
        for _ in range(2):
            y = self.decoder(y, x)
        return y


class LongSkip(nn.Module):
    """The state after the first half is added again after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PreNormBlock()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.block(x)
        early = x
        for _ in range(2):
            x = self.block(x)
        return x + early


class Attributes(nn.Module):
    """Blocks without lists: attributes with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.attn0, self.mlp0, self.attn1, self.mlp1 = Mixer(), mlp(), Mixer(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for i in range(2):
                x = x + getattr(self, f"attn{i}")(x)
                x = x + getattr(self, f"mlp{i}")(x)
        return x


class OneBlockModel(nn.Module):
    """The model is the block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Mixer(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.attn(x)
            x = x + self.mlp(x)
        return x


class Named(nn.Module):
    """Blocks in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: PreNormBlock() for name in ("low", "high")})

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for block in self.blocks.values():
                x = block(x)
        return x


class Checkpointed(Looped):
    """Each block recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__([PreNormBlock(), PreNormBlock()])
        self.entry, self.reentrant, self.checkpointing = nn.Linear(WIDTH, WIDTH), reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for _ in range(self.loops):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant) if self.checkpointing else block(x)
        return x


class Output(NamedTuple):
    logits: Tensor
    state: Tensor


@dataclass
class Result:
    logits: Tensor
    states: list[Tensor]


class Answering(nn.Module):
    """Hands its results back in a container."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.form = in_order("AB", 3), nn.Linear(WIDTH, 3), form

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return self.form(self.head(x), x)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda logits, state: {"logits": logits, "state": state},
    "tuple in a list": lambda logits, state: [(logits, state)],
    "named tuple": Output,
    "dataclass": lambda logits, state: Result(logits, [state]),
}


class DeepSupervision(nn.Module):
    """The head reads the stream after every loop."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm, self.head = PreNormBlock(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        read = []
        for _ in range(3):
            x = self.block(x)
            read.append(self.head(self.norm(x)))
        return read


class Halting(nn.Module):
    """The result is a mean over the loops' states, weighted by a halting probability."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.halt = PreNormBlock(), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, out = torch.ones_like(x[..., :1]), torch.zeros_like(x)
        for _ in range(3):
            x = self.block(x)
            p = torch.sigmoid(self.halt(x)) * left
            out, left = out + p * x, left - p
        return out + left * x


class TokenRecursion(nn.Module):
    """A router picks the tokens that go through the block once more; they are written back."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.block = nn.Linear(WIDTH, 1), PreNormBlock()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for keep in (3, 2):
            places = self.router(x).topk(keep, dim=1).indices.expand(-1, -1, WIDTH)
            x = x.scatter(1, places, self.block(x.gather(1, places)))
        return x


class Frozen(nn.Module):
    """Tokens that are done keep their state: the block's output is chosen by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PreNormBlock()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.where(x.mean(dim=-1, keepdim=True) > -1, self.block(x), x)
        return x


class Unrolled(nn.Module):
    """The first visit is written apart."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        for _ in range(3):
            x = x + self.f(x)
        return x


class MemoryBlock(nn.Module):
    """The first token goes through a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        head, rest = x[:, :1], x[:, 1:]
        return torch.cat([head + self.g(head), rest + self.f(rest)], dim=1)


class Memory(nn.Module):
    """A learned token rides along on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.body = nn.Parameter(torch.randn(1, 1, WIDTH)), Looped([MemoryBlock(), MemoryBlock()])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1))


PAIR = ("0", "1")
for count in (1, 2):
    add(
        f"pairs of attention and MLP in a driver, {count}",
        "drivers",
        lambda count=count: Wrapped(PairDriver(count)),
        *per_block("transformer.layers", PAIR, 3, count),
    )
    names = [f"transformer.{kind}.{i}" for i in range(count) for kind in ("attns", "mlps")]
    rows = tuple((name, name, 3) for name in names)  # no module holds a pair
    add(f"lists of attentions and of MLPs, {count}", "drivers", lambda count=count: Wrapped(ListDriver(count)), *rows)
    rows = tuple((f"transformer.blocks.{i}", f"transformer.blocks.{i}.{j}.fn", 3) for i in range(count) for j in (0, 1))
    add(f"residual and norm wrappers in pairs, {count}", "drivers", lambda count=count: wrappers(True, count), *rows)
    rows = tuple((f"transformer.blocks.{i}", f"transformer.blocks.{i}.fn", 3) for i in range(2 * count))
    add(f"residual and norm wrappers in a row, {count}", "drivers", lambda count=count: wrappers(False, count), *rows)
add("the stream in chunks", "drivers", lambda: Looped([Chunked(), Chunked()]), *per_block("blocks", ["f"], 3, 2))
for twice in (True, False):
    add(
        f"reversible, {'the input twice' if twice else 'the input in halves'}",
        "drivers",
        lambda twice=twice: Reversible(twice),
        *per_block("blocks", ["f", "g"], 3, 2),
    )
add("a state that starts at zero", "drivers", FromZero, ("f", "f", 4))
add("a state that starts at zero, on two lines", "drivers", FromZeroApart, ("f", "f", 4))
add("latents", "drivers", Latents, ("cross", "cross", 3), *per_block(["block"], BOTH, 3))
add(
    "encoder and decoder",
    "drivers",
    EncoderDecoder,
    *per_block(["encoder"], BOTH, 3),
    *per_block(["decoder"], ["attn", "cross", "mlp"], 2),
    example=with_memory,
    warns=("visits differ",),
)
add("a long skip", "drivers", LongSkip, *per_block(["block"], BOTH, 4), warns=("streams left alone",))
add("blocks in a ModuleDict", "drivers", Named, *per_block(["blocks.low", "blocks.high"], BOTH, 3))
add("numbered attributes", "drivers", Attributes, *((name, name, 3) for name in ("attn0", "mlp0", "attn1", "mlp1")))
add("the model is the block", "drivers", OneBlockModel, ("attn", "attn", 3), ("mlp", "mlp", 3))
for reentrant in (False, True):
    add(
        f"checkpointing, {'re-entrant' if reentrant else 'not re-entrant'}",
        "drivers",
        lambda reentrant=reentrant: Checkpointed(reentrant),
        *per_block("blocks", BOTH, 3, 2),
    )
add(
    "a batch of one",
    "drivers",
    lambda: in_order("AB", 3),
    *per_block("blocks", BOTH, 3, 2),
    example=lambda: inputs(1, 4, WIDTH),
)
add(
    "one token",
    "drivers",
    lambda: in_order("AB", 3),
    *per_block("blocks", BOTH, 3, 2),
    example=lambda: inputs(1, 1, WIDTH),
)
for name, form in FORMS.items():
    add(f"results in a {name}", "drivers", lambda form=form: Answering(form), *per_block("body.blocks", BOTH, 3, 2))
add("the head reads every loop", "drivers", DeepSupervision, *per_block(["block"], BOTH, 3))
add("halting", "drivers", Halting, *per_block(["block"], BOTH, 3))
add("some tokens go on", "drivers", TokenRecursion, *per_block(["block"], BOTH, 3))
add("some tokens are done", "drivers", Frozen, *per_block(["block"], BOTH, 3))
add("the first visit written apart", "drivers", Unrolled, ("f", "f", 4))
add("a token of its own", "drivers", Memory, *per_block("body.blocks", ["g", "f"], 3, 2))

# -- refusals, and the declarations that settle them


class Depth(nn.Module):
    """A step over depth, spelled so that no faithful rewrite is known."""

    def __init__(self, step: Callable[[Tensor, "Depth"], Tensor], parts: str = "f") -> None:
        super().__init__()
        self.step = step
        for name in parts.split():
            setattr(self, name, PARTS[name]())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x, self)
        return x


PARTS: dict[str, Callable[[], nn.Module | nn.Parameter]] = {
    "f": mlp,
    "gate": lambda: nn.Linear(WIDTH, WIDTH),
    "cell": lambda: nn.GRUCell(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "weight": lambda: nn.Parameter(torch.randn(WIDTH, WIDTH) / 3),
}


def highway(x: Tensor, m: Depth) -> Tensor:
    t = torch.sigmoid(m.gate(x))
    return t * m.f(x) + (1 - t) * x


def residual_in_kernel(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + F.relu(x @ up) @ down


residual_kernel = torch.library.custom_op("looptransfer_zoo::residual_mlp", mutates_args=())(residual_in_kernel)


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(WIDTH, 16) / 3), nn.Parameter(torch.randn(16, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = residual_kernel(x, self.up, self.down)
        return x


class OverTime(nn.Module):
    """h = h + f(h, x_t): the loop runs over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = h + self.f(torch.cat([h, x[:, t]], dim=-1))
        return h


class DropoutTwice(nn.Module):
    """As in XLNet: attention in one forward, whose scores go through the dropout that the branch goes through too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            scores = self.dropout((x @ x.transpose(1, 2)).softmax(-1))
            x = x + self.dropout(scores @ x @ self.weight)
        return x


class Segments(nn.Module):
    """One block for segment after segment, with what the one before left behind put in front."""

    def __init__(self, cut: Callable[[Tensor, int], Tensor], loops: int = 1) -> None:
        super().__init__()
        self.block, self.cut, self.loops = PreNormBlock(), cut, loops

    def forward(self, x: Tensor) -> Tensor:
        memory, out = torch.zeros_like(x[:, :1]), []
        for start in (0, 2):
            h = torch.cat([memory, self.cut(x, start)], dim=1)
            for _ in range(self.loops):
                h = self.block(h)
            memory = h[:, -1:]
            out.append(h[:, 1:])
        return torch.cat(out, dim=1)


class Cached(nn.Module):
    """Token after token, each reads what was made of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        made = [torch.zeros_like(x[:, 0])]
        for token in x.unbind(1):
            made.append(token + self.f(torch.cat([token, torch.stack(made).sum(0)], dim=-1)))
        return torch.stack(made[1:], dim=1)


class Penalised(nn.Module):
    """The branch is used for a penalty too."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.f, self.marked = mlp(), marked

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.f(x)
        return x + (lt.residual(out) if self.marked else out), out.pow(2).mean()


class PenalisedModel(nn.Module):
    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Penalised(marked) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        penalty = torch.zeros((), dtype=x.dtype)
        for _ in range(3):
            for block in self.blocks:
                x, more = block(x)
                penalty = penalty + more
        return x, penalty


class Midpoint(nn.Module):
    """A step of a solver of second order: the field is taken twice, and added once."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.f, self.marked = mlp(), marked

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            slope = self.f(x + 0.5 * self.f(x))
            x = x + (lt.residual(slope) if self.marked else slope)
        return x


def gru(x: Tensor, m: Depth) -> Tensor:
    return m.cell(m.f(x).flatten(0, 1), x.flatten(0, 1)).view_as(x)


def deepnorm(x: Tensor, m: Depth) -> Tensor:
    return m.norm(1.7 * x + m.f(x))


def fused_product(x: Tensor, m: Depth) -> Tensor:
    flat = x.flatten(0, 1)
    return torch.addmm(flat, flat.relu(), m.weight).view_as(x)


def expanded(m: Depth, x: Tensor) -> Tensor:
    return m.weight.expand(len(x), -1, -1)


class Step(NamedTuple):
    """A spelling, the parts that it uses, what is said of it and the text on its line."""

    spelling: Callable[[Tensor, Depth], Tensor]
    parts: str
    says: str
    line: str


STEPS: dict[str, Step] = {
    "a GRU over depth": Step(gru, "f cell", GATED, "gru_cell"),
    "a highway": Step(highway, "f gate", UNRECOGNISED, "(1 - t) * x"),
    "lerp": Step(lambda x, m: torch.lerp(x, m.f(x), torch.sigmoid(m.gate(x))), "f gate", UNRECOGNISED, "torch.lerp"),
    "lerp by a constant": Step(lambda x, m: torch.lerp(x, m.f(x), 0.3), "f", UNRECOGNISED, "torch.lerp"),
    "a damped skip": Step(lambda x, m: 0.9 * x + m.f(x), "f", UNRECOGNISED, "0.9 * x"),
    "a mean of both": Step(lambda x, m: (x + m.f(x)) / 2, "f", SCALED, "/ 2"),
    "a sum over the root of two": Step(lambda x, m: (x + m.f(x)) * 0.5**0.5, "f", SCALED, "0.5**0.5"),
    "DeepNorm": Step(deepnorm, "f norm", UNRECOGNISED, "1.7 * x"),
    "a stack that is summed": Step(lambda x, m: torch.stack([x, m.f(x)]).sum(0), "f", UNRECOGNISED, "torch.stack"),
    "addmm": Step(fused_product, "weight", UNRECOGNISED, "torch.addmm"),
    "baddbmm": Step(lambda x, m: torch.baddbmm(x, x.relu(), expanded(m, x)), "weight", UNRECOGNISED, "torch.baddbmm"),
    "index_add": Step(lambda x, m: x.index_add(1, torch.arange(2), m.f(x[:, :2])), "f", UNRECOGNISED, "x.index_add"),
    "addcmul": Step(
        lambda x, m: torch.addcmul(x, m.f(x), torch.sigmoid(m.gate(x))), "f gate", UNRECOGNISED, "torch.addcmul"
    ),
}
for name, step in STEPS.items():
    add(
        name,
        "refusals",
        lambda step=step: Depth(step.spelling, step.parts),
        refusal=step.says,
        line=step.line,
    )
add("a kernel with its own skip", "refusals", Kernel, refusal=KERNEL, line="residual_kernel(x")
add("a recurrence over time", "refusals", OverTime, refusal=TIME, line="h = h + self.f(")
add(
    "one dropout on scores and on the branch", "refusals", DropoutTwice, refusal=NO_MODULE, line="x = x + self.dropout("
)
for name, cut, loops in (
    ("slices", lambda x, start: x[:, start : start + 2], 1),
    ("copies", lambda x, start: x[:, start : start + 2].clone(), 1),
    ("slices, looped", lambda x, start: x[:, start : start + 2], 2),
):
    add(
        f"segments after one another, {name}",
        "refusals",
        lambda cut=cut, loops=loops: Segments(cut, loops),
        refusal=TIME,
        line="x = x + self.attn(",
    )
add("token after token with a cache", "refusals", Cached, refusal=TIME, line="made.append(token + self.f(")
add("a branch used elsewhere", "refusals", lambda: PenalisedModel(marked=False), refusal=REUSED, line="else out")
add("a midpoint step", "refusals", lambda: Midpoint(marked=False), refusal=NO_MODULE, line="else slope")
add(
    "a branch used elsewhere, marked",
    "settled",
    lambda: PenalisedModel(marked=True),
    *per_block("blocks", [":branch"], 3, 2),
)
add("a midpoint step, marked", "settled", lambda: Midpoint(marked=True), (":branch", ":branch", 3))
add("a recurrence over time, declared", "settled", OverTime, ("f", "f", 4), kwargs={"branches": ["f"]})
add(
    "segments after one another, declared with their loops",
    "settled",
    lambda: Segments(lambda x, start: x[:, start : start + 2], 2),
    *per_block(["block"], BOTH, 2),
    kwargs={"branches": ["block.attn", "block.mlp"], "loops": 2},
)
for name in ("a damped skip", "DeepNorm", "a stack that is summed", "index_add", "addcmul", "lerp by a constant"):
    add(
        f"{name}, declared",
        "settled",
        lambda step=STEPS[name]: Depth(step.spelling, step.parts),
        ("f", "f", 3),
        kwargs={"branches": ["f"]},
    )
add(
    "a damped skip, marked",
    "settled",
    lambda: Depth(lambda x, m: 0.9 * x + lt.residual(m.f(x))),
    (":branch", ":branch", 3),
)
add(
    "addmm, marked",
    "settled",
    lambda: Depth(lambda x, m: x + lt.residual(x.relu() @ m.weight), "weight"),
    (":branch", ":branch", 3),
)
