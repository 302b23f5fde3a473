"""Hand-written models, and for most of them the same forward with ε written into it."""

import linecache
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looptransfer as lt
from looptransfer.rules import Rule

WIDTH = 8
Oracle = Callable[[nn.Module, Tensor, float], Tensor]


def noisy(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """`model` in float64 with every parameter far from its usual start, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=std)
    return model


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(batch: int = 2, time: int = 5, vocab: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def line_of(source: str) -> str:
    """The text of the line that a `file:line` names."""
    file, line = source.rsplit(":", 1)
    return linecache.getline(file, int(line)).strip()


# -- the reference decoder, a second time


def small_decoder(layers: int = 2, loops: int = 3, prelude: int = 0, coda: int = 0) -> lt.LoopedDecoder:
    torch.manual_seed(0)
    return lt.LoopedDecoder(vocab=11, width=8, heads=2, layers=layers, loops=loops, prelude=prelude, coda=coda)


def decoder_epsilon(rule: Rule, visits: int, layers: int, lam: float, base_layers: int) -> float:
    """The rules by hand; `layers` counts prelude and coda too."""
    depth = layers / base_layers
    return {
        "factored": lam / visits / depth**0.5,
        "completep": lam / visits / depth,
        "sqrt": lam * (visits * depth) ** -0.5,
        "unscaled": 1.0,
    }[rule]


def decoder_oracle(
    weights: dict[str, Tensor], tokens: Tensor, heads: int, loops: int, epsilon_once: float, epsilon_looped: float
) -> Tensor:
    """LoopedDecoder from its state_dict alone: attention and norms written out, ε on every branch."""
    width = weights["embedding.weight"].shape[1]
    head_dim, time = width // heads, tokens.shape[1]
    inverse = 10000.0 ** (torch.arange(0, head_dim, 2) / -head_dim)
    angle = torch.outer(torch.arange(time).float(), inverse)
    turn = torch.complex(angle.cos().double(), angle.sin().double())
    future = torch.ones(time, time, dtype=torch.bool).triu(1)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * gain

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def attention(x: Tensor, prefix: str) -> Tensor:
        q, k, v = (x @ weights[prefix + "qkv.weight"].T).split(width, -1)
        parts = []
        for head in range(heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            scores = rotated(q[..., columns]) @ rotated(k[..., columns]).transpose(-1, -2) / math.sqrt(head_dim)
            parts.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., columns])
        return torch.cat(parts, -1) @ weights[prefix + "out.weight"].T

    def mlp(x: Tensor, prefix: str) -> Tensor:
        gate, value = (x @ weights[prefix + "up.weight"].T).tensor_split(2, -1)
        return (gate * gate.sigmoid() * value) @ weights[prefix + "down.weight"].T

    def block(x: Tensor, prefix: str, epsilon: float) -> Tensor:
        x = x + epsilon * attention(norm(x, weights[prefix + "attention_norm.weight"]), prefix + "attention.")
        return x + epsilon * mlp(norm(x, weights[prefix + "mlp_norm.weight"]), prefix + "mlp.")

    def indices(stack: str) -> list[int]:
        return sorted({int(key.split(".")[1]) for key in weights if key.startswith(stack + ".")})

    x = weights["embedding.weight"][tokens]
    for i in indices("prelude"):
        x = block(x, f"prelude.{i}.", epsilon_once)
    for _ in range(loops):
        for i in indices("layers"):
            x = block(x, f"layers.{i}.", epsilon_looped)
    for i in indices("coda"):
        x = block(x, f"coda.{i}.", epsilon_once)
    return norm(x, weights["norm.weight"]) @ weights["head.weight"].T


# -- one branch per loop


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ResidualMLP(nn.Module):
    """h = h + f(h), one module."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.loops = loops
        self.f = mlp()

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = h + self.f(h)
        return h


class BareMLP(ResidualMLP):
    """A branch without norms or biases: the smallest one there is."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__(loops)
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())


class InPlaceMLP(ResidualMLP):
    def forward(self, h: Tensor) -> Tensor:
        h = h.clone()
        for _ in range(self.loops):
            h += self.f(h)
        return h


class TorchAddMLP(ResidualMLP):
    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = torch.add(h, self.f(h))
        return h


class BranchFirstMLP(ResidualMLP):
    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            h = self.f(h) + h
        return h


class InjectedMLP(ResidualMLP):
    """The input is added again in every loop, and that add is no branch."""

    def forward(self, e: Tensor) -> Tensor:
        h = torch.zeros_like(e) + e
        for _ in range(self.loops):
            h = h + self.f(h)
            h = h + e
        return h


def residual_oracle(model: nn.Module, h: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        h = h + epsilon * model.f(h)
    return h


def injected_oracle(model: nn.Module, e: Tensor, epsilon: float) -> Tensor:
    h = e
    for _ in range(model.loops):
        h = h + epsilon * model.f(h) + e
    return h


class TheoryBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h) @ self.weight.T


class TheoryModel(nn.Module):
    """The paper's h + W·relu(h): L layers, N loops."""

    def __init__(self, layers: int = 2, loops: int = 3) -> None:
        super().__init__()
        self.loops = loops
        self.layers = nn.ModuleList(TheoryBranch() for _ in range(layers))

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.loops):
            for layer in self.layers:
                h = h + layer(h)
        return h


def theory_oracle(model: nn.Module, h: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for layer in model.layers:
            h = h + epsilon * (h.clamp(min=0) @ layer.weight.T)
    return h


# -- blocks


class Mixer(nn.Module):
    """Attention over positions with one head and no learned pattern of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v))
        return mixed


class ParallelBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(WIDTH)
        self.attn = Mixer()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.n(x)) + self.mlp(self.n(x))


class Looped(nn.Module):
    """`loops` times through `blocks`."""

    def __init__(self, blocks: list[nn.Module], loops: int = 3) -> None:
        super().__init__()
        self.loops = loops
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return x


def parallel_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * block.attn(block.n(x)) + epsilon * block.mlp(block.n(x))
    return x


class DropoutBlock(nn.Module):
    """Two branches behind dropout; `shared` is one object for all branches of all blocks."""

    def __init__(self, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(WIDTH)
        self.attn = Mixer()
        self.mlp = mlp()
        self.attn_dropout = shared or nn.Dropout(0.25)
        self.mlp_dropout = shared or nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_dropout(self.attn(self.attn_norm(x)))
        x = x + self.mlp_dropout(self.mlp(x))
        return x


def dropout_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * block.attn_dropout(block.attn(block.attn_norm(x)))
            x = x + epsilon * block.mlp_dropout(block.mlp(x))
    return x


class MLPBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def mlp_block_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * block.mlp(x)
    return x


def tied_blocks() -> list[nn.Module]:
    """Two MLP blocks that are distinct modules and hold the same parameters."""
    first, second = MLPBlock(), MLPBlock()
    for a, b in zip(first.modules(), second.modules(), strict=True):
        for name, parameter in a.named_parameters(recurse=False):
            setattr(b, name, parameter)
    return [first, second]


class HalfTiedBlocks(nn.Module):
    """Only one matrix of each branch is shared: `second.weight = first.weight`."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.loops = loops
        self.blocks = nn.ModuleList([BareBlock(), BareBlock()])
        self.blocks[1].f.weight = self.blocks[0].f.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return x


class BareBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(torch.tanh(x))


class TupleMixer(Mixer):
    """Hands back (weights, mixed), like many attention modules."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        return weights, self.out(weights @ v)


class TupleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = TupleMixer()

    def forward(self, x: Tensor) -> Tensor:
        _, mixed = self.attn(self.norm(x))
        return x + mixed


def tuple_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * block.attn(block.norm(x))[1]
    return x


class DictMixer(Mixer):
    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:  # type: ignore[override]
        return OrderedDict(hidden=super().forward(x), norm=x.norm())


class DictBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = DictMixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))["hidden"]


def dict_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * block.attn(block.norm(x))["hidden"]
    return x


class WrittenOutGelu(nn.Module):
    """The tanh approximation with its own add: x + 0.044715·x³ is no residual add."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class GeluBlock(nn.Module):
    """An activation written out by hand, over a rotation written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), WrittenOutGelu(), nn.Linear(WIDTH, WIDTH))
        self.rope = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.rope(x))


class Rotary(nn.Module):
    """The `x·cos + rotate_half(x)·sin` spelling, which adds two shapes that agree."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angle", torch.arange(WIDTH, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.angle.cos() + torch.cat([-second, first], -1) * self.angle.sin()


def gelu_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = x + epsilon * block.f(block.rope(x))
    return x


class SelfAddingMixer(nn.Module):
    """ALBERT-like: projection, dropout, its own residual add and a post-norm, all inside the attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mixer()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x + self.mix(x))
        return normed


class AlbertBlock(nn.Module):
    """Feed-forward over a self-adding attention, post-norm after each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAddingMixer()
        self.ffn = nn.Linear(WIDTH, 2 * WIDTH)
        self.ffn_output = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        normed: Tensor = self.norm(self.ffn_output(F.gelu(self.ffn(x))) + x)
        return normed


def albert_oracle(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    for _ in range(model.loops):
        for block in model.blocks:
            x = block.attention.norm(x + epsilon * block.attention.mix(x))
            x = block.norm(epsilon * block.ffn_output(F.gelu(block.ffn(x))) + x)
    return x


class NormedMLP(nn.Module):
    """BatchNorm, dropout and an RNG draw of its own: everything a careless trace would disturb."""

    def __init__(self, loops: int = 2) -> None:
        super().__init__()
        self.loops = loops
        self.f = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * torch.rand_like(x)
        for _ in range(self.loops):
            x = x + self.f(x)
        return x


# -- models that cannot be rewritten


class FunctionalBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(2):
            h = h + F.relu(h) @ self.weight
        return h


class ReusedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        penalty = torch.zeros((), dtype=h.dtype)
        for _ in range(2):
            out = self.f(h)
            penalty = penalty + out.pow(2).mean()
            h = h + out
        return h * (1 + penalty)
