"""Multipliers survive whatever is done to a model afterwards, one test each."""

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import looptransfer as lt
from looptransfer.reference.model import Block
from tests import models
from tests.models import WIDTH, Looped, inputs, noisy, small_decoder, tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_decoder(**size: int) -> nn.Module:
    return noisy(small_decoder(**{"loops": 2, **size}), std=0.1)


def decoder(**size: int) -> nn.Module:
    model = plain_decoder(**size)
    lt.parametrize(model, tokens())
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


# -- copies and checkpoints


def test_state_dict_keys_are_a_plain_models() -> None:
    model, plain = decoder(prelude=1), plain_decoder(prelude=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    lt.fold(model)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_deepcopy_is_scaled_and_independent() -> None:
    model = decoder()
    twin = copy.deepcopy(model)
    before = model(tokens())
    assert torch.equal(twin(tokens()), before)
    twin.loops = 7
    lt.rescale(twin, tokens())
    twin.loops = model.loops
    assert torch.equal(model(tokens()), before)
    assert not torch.equal(twin(tokens()), before)
    lt.remove(twin)
    assert torch.equal(twin(tokens()), plain_decoder()(tokens()))
    assert torch.equal(model(tokens()), before)
    assert lt.verify(model, tokens()).loops == 2
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_a_pickled_model_is_scaled() -> None:
    model = decoder()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tokens()), model(tokens()))
    assert type(again.layers[0].mlp) is type(model.layers[0].mlp)
    assert lt.verify(again, tokens()) == lt.verify(model, tokens())
    again.load_state_dict(model.state_dict())


@pytest.mark.slow
def test_a_fresh_process_loads_a_pickled_model_scaled(tmp_path: Path) -> None:
    model = plain_decoder(prelude=1)
    plan = lt.parametrize(model, tokens())
    torch.save(model, tmp_path / "model.pt")
    torch.save(tokens(), tmp_path / "tokens.pt")
    script = """
import sys, torch
folder = sys.argv[1]
torch.set_num_threads(1)
model = torch.load(folder + "/model.pt", weights_only=False)
assert "looptransfer" in sys.modules
torch.save(model(torch.load(folder + "/tokens.pt")), folder + "/out.pt")
import looptransfer as lt
print(lt.verify(model, torch.load(folder + "/tokens.pt")).to_json())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(tokens()))
    assert lt.ScalingPlan.from_json(done.stdout) == plan


def test_a_checkpoint_loads_into_a_fresh_rewritten_model() -> None:
    model, fresh = decoder(), noisy(small_decoder(loops=2), seed=3)
    lt.parametrize(fresh, tokens())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not torch.equal(fresh(tokens()), model(tokens()))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(tokens()), model(tokens()))


def test_another_dtype_and_requires_grad_keep_the_multipliers() -> None:
    model = decoder()
    expected = model(tokens())
    model.requires_grad_(False).float()
    assert model(tokens()).dtype is torch.float32
    torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-4, atol=1e-4)
    lt.verify(model.to(torch.bfloat16), tokens())
    assert model(tokens()).dtype is torch.bfloat16


# -- torch.compile and torch.export


@pytest.mark.parametrize("first", ["plain", "rewritten"])
def test_twins_of_one_class_compile_without_a_graph_break_or_a_recompilation_in_both_orders(first: str) -> None:
    twins = {"plain": plain_decoder(), "rewritten": decoder()}
    expected = {name: twin(tokens()) for name, twin in twins.items()}
    assert (expected["plain"] - expected["rewritten"]).abs().max() > 1e-3
    order = sorted(twins, key=lambda name: name != first)
    compiled = {name: torch.compile(twins[name], backend="eager", fullgraph=True) for name in order}
    for name in order:
        torch.testing.assert_close(compiled[name](tokens()), expected[name], rtol=1e-12, atol=1e-12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in reversed(order):
            torch.testing.assert_close(compiled[name](tokens()), expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_block", [True, False])
def test_neither_visits_nor_layers_nor_steps_make_the_compiler_start_anew(per_block: bool) -> None:
    graphs = []
    for model in (plain_decoder(loops=3), decoder(loops=3)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for module in model.layers if per_block else [model]:
            module.compile(backend="eager", fullgraph=True)
        for seed in range(3):
            loss_of(model, tokens(seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]


@pytest.mark.slow
def test_inductor_gives_the_same_gradients() -> None:
    model = decoder()
    expected = gradients(model, loss_of(model, tokens()))
    compiled = torch.compile(model, fullgraph=True)
    assert_same(gradients(model, loss_of(compiled, tokens())), expected, 1e-9)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_scaled(strict: bool) -> None:
    model = decoder()
    exported = torch.export.export(model, (tokens(),), strict=strict).module()
    torch.testing.assert_close(exported(tokens(seed=1)), model(tokens(seed=1)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(exported(tokens(seed=1)), plain_decoder()(tokens(seed=1)))


class Pair(nn.Module):
    """Hands its branch over as the first of two."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x), x.mean()


class FirstOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pair = nn.LayerNorm(WIDTH), Pair()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.pair(self.norm(x))[0]
        return x


class Whole(FirstOfTwo):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Linear(WIDTH, WIDTH)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.pair(self.norm(x))
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("cls", [FirstOfTwo, Whole])
def test_torch_script_is_refused_until_epsilon_is_in_the_weights(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = noisy(cls(), std=0.1), inputs(2, 4, WIDTH)
    lt.parametrize(model, x)
    scaled = model(x)
    with pytest.raises(lt.InputError, match=r"leave the multiplier of a (Pair|Linear) out; call looptransfer\.fold"):
        torch.jit.script(model)
    lt.fold(model)
    torch.testing.assert_close(torch.jit.script(model)(x), scaled, rtol=1e-12, atol=1e-12)


def blocks_in_checkpoint_wrappers(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing  # noqa: PLC0415

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


def blocks_compiled_one_by_one(model: nn.Module) -> None:
    for index, layer in enumerate(model.layers):
        model.layers[index] = torch.compile(layer, backend="eager")


WRAPPERS = [blocks_in_checkpoint_wrappers, blocks_compiled_one_by_one]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_blocks_that_are_wrapped_later_stay_scaled_and_in_their_groups(wrap: Callable[[nn.Module], None]) -> None:
    model = decoder()
    expected = gradients(model, loss_of(model, tokens()))
    groups = lt.param_groups(model, torch.optim.AdamW, lr=0.1)
    wrap(model)
    assert_same(dict(zip(expected, gradients(model, loss_of(model, tokens())).values(), strict=True)), expected)
    for ours, theirs in zip(lt.param_groups(model, torch.optim.AdamW, lr=0.1), groups, strict=True):
        assert ours["name"] == theirs["name"]
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]


@pytest.mark.filterwarnings("ignore:Using .torch.compile")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_blocks_that_are_wrapped_later_can_be_verified_rescaled_and_folded(wrap: Callable[[nn.Module], None]) -> None:
    model = decoder()
    wrap(model)
    lt.verify(model, tokens())
    model.loops = 5
    lt.rescale(model, tokens())
    scaled = model(tokens())
    folded = copy.deepcopy(model)
    lt.fold(folded)
    torch.testing.assert_close(folded(tokens()), scaled, rtol=1e-12, atol=1e-12)
    lt.remove(model)
    model.loops = 2
    torch.testing.assert_close(model(tokens()), plain_decoder()(tokens()), rtol=1e-12, atol=1e-12)


# -- ways to train


def test_under_autocast_branches_keep_their_dtype_and_their_multiplier() -> None:
    model, plain = decoder().float(), plain_decoder().float()
    expected = model(tokens())
    dtypes: list[torch.dtype] = []
    for one in (model, plain):
        one.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, unscaled = model(tokens()), plain(tokens())
        lt.verify(model, tokens())
    assert set(dtypes) == {torch.bfloat16}
    assert out.dtype == unscaled.dtype
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.02 < (unscaled.float() - expected).norm() / expected.norm()
    out.float().pow(2).mean().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())


class Checkpointed(Looped):
    """`how`: None for plain, True and False for the reentrant and the other kind of checkpoint."""

    how: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return x


@pytest.mark.parametrize("rewritten_with", [None, True, False])
@pytest.mark.parametrize("how", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_changes_no_gradient(how: bool, rewritten_with: bool | None) -> None:
    torch.manual_seed(0)
    model = noisy(Checkpointed([models.DropoutBlock(), models.DropoutBlock()], loops=2), std=0.1)
    x = inputs(2, 4, WIDTH).requires_grad_()
    model.how = rewritten_with
    assert lt.parametrize(model, x).loops == 2
    found = []
    for kind in (None, how):
        model.how = kind
        torch.manual_seed(1)
        model.zero_grad()
        loss_of(model, x).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        lt.verify(model, x)
    assert_same(found[1], found[0])


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model, x = decoder(), tokens(batch=4)
    whole = gradients(model, loss_of(model, x))
    for part in x.split(1):
        (loss_of(model, part) / 4).backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, whole)


def test_clipping_by_the_global_norm_sees_the_scaled_gradients() -> None:
    model = decoder()
    loss_of(model, tokens()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    expected = sum(g.pow(2).sum() for g in gradients(model, loss_of(model, tokens())).values()) ** 0.5
    assert norm.item() == pytest.approx(expected.item(), rel=1e-12)


def test_functional_call_takes_other_weights_and_keeps_the_multipliers() -> None:
    model, other = decoder(), noisy(small_decoder(loops=2), seed=4, std=0.1)
    weights = {name: parameter.detach() for name, parameter in other.named_parameters()}
    lt.parametrize(other, tokens())
    assert torch.equal(torch.func.functional_call(model, weights, (tokens(),)), other(tokens()))
    ours = torch.func.grad(lambda given: torch.func.functional_call(model, given, (tokens(),)).pow(2).mean())(weights)
    assert_same(ours, gradients(other, loss_of(other, tokens())))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_stacked_models_scales_each() -> None:
    ensemble = [noisy(small_decoder(loops=2), seed=seed, std=0.1) for seed in range(3)]
    for model in ensemble:
        lt.parametrize(model, tokens())
    weights, buffers = torch.func.stack_module_state(ensemble)
    base, x = copy.deepcopy(ensemble[0]), tokens()

    def run(weights: Any, buffers: Any) -> Tensor:
        out: Tensor = torch.func.functional_call(base, (weights, buffers), (x,))
        return out

    out = torch.func.vmap(run)(weights, buffers)
    torch.testing.assert_close(out, torch.stack([model(x) for model in ensemble]), rtol=1e-12, atol=1e-12)
    found = torch.func.vmap(torch.func.grad(lambda w, b: run(w, b).pow(2).mean()))(weights, buffers)
    for index, model in enumerate(ensemble):
        expected = gradients(model, loss_of(model, x))
        assert_same({name: gradient[index] for name, gradient in found.items() if name in expected}, expected)


# -- two real processes


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def start(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of a DTensor


def assert_same_as_one_process(model: nn.Module, rank: int, steps: int = 2) -> None:
    """Train on half the batch, beside a model of its own that trains on the whole batch."""
    alone, batch = decoder(), tokens(batch=4)
    optimizers = [torch.optim.AdamW(lt.param_groups(one, torch.optim.AdamW, lr=0.01)) for one in (model, alone)]
    for _ in range(steps):
        expected = alone(batch)
        out = model(batch[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(out, expected[2 * rank : 2 * rank + 2], rtol=1e-9, atol=1e-9)
        out.pow(2).mean().backward()
        expected.pow(2).mean().backward()
        reference = dict(alone.named_parameters())
        for name, parameter in model.named_parameters():
            own = reference[name.removeprefix("module.")]
            torch.testing.assert_close(whole(parameter.grad), own.grad, rtol=1e-9, atol=1e-9, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train_with_ddp(rank: int, port: int) -> None:
    start(rank, port)
    model = decoder()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert_same_as_one_process(wrapped, rank)
    assert lt.verify(wrapped, tokens()).loops == 2
    model.loops = 5
    lt.rescale(wrapped, tokens())
    scaled = wrapped(tokens()).detach()
    hook = model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(lt.VerificationError, match=r"layers\.1\.mlp"):
        lt.verify(wrapped.eval(), tokens())
    hook.remove()
    lt.fold(wrapped)
    torch.testing.assert_close(wrapped(tokens()), scaled, rtol=1e-12, atol=1e-12)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_with_fsdp2(rank: int, port: int) -> None:
    start(rank, port)
    model = sharded(decoder())
    assert_same_as_one_process(model, rank)
    model.loops = 5
    lt.rescale(model, tokens())
    scaled = model(tokens()).detach()
    lt.fold(model)
    torch.testing.assert_close(model(tokens()), scaled, rtol=1e-12, atol=1e-12)


def verify_under_fsdp2(rank: int, port: int) -> None:
    start(rank, port)
    model = sharded(decoder())
    assert lt.verify(model, tokens()).loops == 2
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(lt.VerificationError, match=r"^[^\n]*\n- layers\.1\.mlp: [^\n]*$"):
        lt.verify(model, tokens())


def refuse_to_fold_a_branch_that_is_sharded_itself(rank: int, port: int) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    start(rank, port)
    model = decoder()
    fully_shard(model.layers[1].mlp)
    sharded(model)
    scaled = model(tokens()).detach()
    for change in (lt.fold, lt.remove):
        with pytest.raises(lt.InputError, match="before the model is wrapped"):
            change(model)
        torch.testing.assert_close(model(tokens()), scaled, rtol=1e-12, atol=1e-12)  # nothing was changed


def rewrite_what_is_sharded_already(rank: int, port: int) -> None:
    start(rank, port)
    model = sharded(plain_decoder())
    with pytest.raises(lt.InputError, match="FSDP"):
        lt.parametrize(model, tokens())
    torch.testing.assert_close(model(tokens()), plain_decoder()(tokens()), rtol=1e-12, atol=1e-12)


class SideInputs(nn.Module):
    """Layers whose context, condition and first input reach the branches from the side, by matrices they do not own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.condition, self.context, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for _ in range(3):
            for layer in self.layers:
                scale = torch.tanh(self.condition(first.mean(1, keepdim=True)))
                mixed = F.scaled_dot_product_attention(x, self.context(first), self.values(first))
                x = x + scale * layer(F.layer_norm(x + mixed * scale, (WIDTH,)))
        return torch.as_tensor(self.head(F.layer_norm(x, (WIDTH,))))


def rewritten_side_inputs() -> nn.Module:
    model = SideInputs().double()
    lt.parametrize(model, inputs(2, 5, WIDTH))
    return model


def group_by_parameter(model: nn.Module) -> dict[str, tuple[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = lt.param_groups(model, torch.optim.AdamW, lr=0.01)
    return {
        names[id(parameter)].removeprefix("module.").removeprefix("_orig_mod."): (group["name"], group["lr"])
        for group in groups
        for parameter in group["params"]
    }


def group_what_is_wrapped(rank: int, port: int) -> None:
    start(rank, port)
    model = rewritten_side_inputs()
    plain = group_by_parameter(model)
    assert group_by_parameter(nn.parallel.DistributedDataParallel(model)) == plain
    assert group_by_parameter(sharded(model)) == plain


def fsdp1(model: nn.Module, **settings: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)


def blocks_alone() -> Any:
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy  # noqa: PLC0415

    return ModuleWrapPolicy({Block})


def group_what_fsdp1_flattens(rank: int, port: int) -> None:
    """Under `use_orig_params` a rank's share of a parameter has its name and one dimension."""
    start(rank, port)
    for policy in (None, blocks_alone()):
        model, alone = decoder(), decoder()
        groups = [lt.param_groups(one, "adamw", lr=0.01, weight_decay=0.1) for one in (model, alone)]
        wrapped = fsdp1(model, use_orig_params=True, auto_wrap_policy=policy)
        with pytest.raises(
            lt.InputError, match=r"embedding\.weight is a matrix .* before FSDP\(model, use_orig_params"
        ):
            lt.param_groups(wrapped, "adamw", lr=0.01, weight_decay=0.1)
        undecayed = [group["lr"] for group in lt.param_groups(wrapped, "adamw", lr=0.01)]
        assert sorted(undecayed) == pytest.approx([0.01 / 2**0.5, 0.01])
        for call in (lt.verify, lt.rescale):
            with pytest.raises(lt.InputError, match=rf"lies flat here, .*call {call.__name__} before FSDP"):
                call(wrapped, tokens())
        optimizers = [torch.optim.AdamW(group) for group in groups]
        for _ in range(2):
            for one, optimizer in zip((wrapped, alone), optimizers, strict=True):
                loss_of(one, tokens()).backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(wrapped(tokens()), alone(tokens()), rtol=1e-9, atol=1e-9)


class BiasedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.mlp(self.norm(x)))


def verify_sharded_biases(rank: int, port: int) -> None:
    """FSDP2 gives the memory of a block's parameters back after its forward."""
    start(rank, port)
    torch.manual_seed(0)
    model = noisy(Looped([BiasedBlock(), BiasedBlock()]), std=0.1)
    model.layers = model.blocks
    x = inputs(2, 4, WIDTH)
    plan = lt.parametrize(model, x)
    sharded(model)
    assert lt.verify(model, x) == plan
    model.loops = 7
    assert lt.rescale(model, x).loops == 7
    lt.verify(model, x)
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(lt.VerificationError, match=r"^[^\n]*\n- blocks\.1\.mlp: [^\n]*$"):
        lt.verify(model, x)


def one_of_two(rank: int, work: Callable[[int, int], None], port: int) -> None:
    work(rank, port)
    torch.distributed.barrier()
    os._exit(0)  # all is asserted; the teardown of gloo's threads aborts in about one process of a hundred


def in_two_processes(work: Callable[[int, int], None]) -> None:
    torch.multiprocessing.spawn(one_of_two, (work, free_port()), nprocs=2)


@pytest.mark.slow
def test_ddp_trains_as_one_process_does() -> None:
    in_two_processes(train_with_ddp)


def test_what_reaches_branches_from_the_side_is_in_their_groups_compiled_or_not() -> None:
    model = rewritten_side_inputs()
    plain = group_by_parameter(model)
    assert {name for name, (group, _) in plain.items() if not group.startswith("branch")} == {
        "head.weight",
        "head.bias",
    }
    assert group_by_parameter(torch.compile(model, backend="eager")) == plain


@pytest.mark.slow
def test_groups_are_the_same_under_ddp_and_fsdp2() -> None:
    in_two_processes(group_what_is_wrapped)


@pytest.mark.slow
def test_what_fsdp1_flattens_is_told_and_groups_of_the_model_before_it_train_as_one_process_does() -> None:
    in_two_processes(group_what_fsdp1_flattens)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_one_flat_parameter_of_many_is_refused_by_name() -> None:
    wrapped = fsdp1(decoder())
    for call in (lambda: lt.param_groups(wrapped, "adamw", lr=0.01), lambda: lt.verify(wrapped, tokens())):
        with pytest.raises(lt.InputError, match=r"lies flat here, as FSDP1 .* FSDP\(model, use_orig_params=True\)"):
            call()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_blocks_that_fsdp1_wrapped_one_by_one_have_their_names() -> None:
    model = decoder()
    plain = group_by_parameter(model)
    wrapped = fsdp1(model, use_orig_params=True, auto_wrap_policy=blocks_alone())
    found = {name.replace("_fsdp_wrapped_module.", ""): group for name, group in group_by_parameter(wrapped).items()}
    assert found == plain


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("settings", [{}, {"use_orig_params": True}])
def test_a_model_inside_fsdp1_is_rewritten_before(settings: dict[str, Any]) -> None:
    with pytest.raises(lt.InputError, match=r"^the model is sharded already \(FSDP\); call parametrize first"):
        lt.parametrize(fsdp1(plain_decoder(), **settings), tokens())


@pytest.mark.slow
def test_layers_with_biases_are_verified_and_rescaled_under_fsdp2() -> None:
    in_two_processes(verify_sharded_biases)


@pytest.mark.slow
def test_fsdp2_trains_as_one_process_does() -> None:
    in_two_processes(train_with_fsdp2)


@pytest.mark.slow
def test_a_model_under_fsdp2_can_be_verified() -> None:
    in_two_processes(verify_under_fsdp2)


@pytest.mark.slow
def test_a_branch_that_fsdp2_wrapped_itself_keeps_its_multiplier_and_is_not_folded() -> None:
    in_two_processes(refuse_to_fold_a_branch_that_is_sharded_itself)


@pytest.mark.slow
def test_a_model_that_is_sharded_already_is_refused() -> None:
    in_two_processes(rewrite_what_is_sharded_already)


# -- the meta device


def test_a_model_without_memory_is_rewritten_and_proved_once_it_has_weights() -> None:
    with torch.device("meta"):
        model = small_decoder(prelude=1)
        example = torch.zeros(2, 5, dtype=torch.long)
    plan = lt.parametrize(model, example, lam=0.7)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not plan.proved
    assert "unproved" in str(plan)
    assert lt.verify(model, example) == plan  # still without weights

    model.to_empty(device="cpu")
    model.head.weight = model.embedding.weight  # to_empty unties
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    proved = lt.verify(model, tokens())
    assert proved.proved
    assert lt.verify(model, tokens()) == proved
    assert "unproved" not in str(proved)
    usual = small_decoder(prelude=1)
    assert lt.parametrize(usual, tokens(), lam=0.7) == proved
    usual.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()), usual(tokens()))


def test_a_meta_model_takes_example_inputs_with_numbers_too() -> None:
    with torch.device("meta"):
        model = small_decoder()
    assert not lt.parametrize(model, tokens()).proved


def test_a_meta_model_that_was_spoilt_before_it_had_weights_is_caught() -> None:
    with torch.device("meta"):
        model = small_decoder()
    lt.parametrize(model, tokens())
    model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(lt.VerificationError, match=r"layers\.0\.mlp"):
        lt.verify(model, tokens())


def test_weights_that_do_not_exist_yet_cannot_take_epsilon() -> None:
    """Whatever is put into the weights afterwards would be without it."""
    with torch.device("meta"):
        model = small_decoder()
    with pytest.raises(lt.InputError, match="meta"):
        lt.parametrize(model, tokens(), preserve=True)


# -- Hugging Face


def llama(loops: int = 3) -> Any:
    """Two layers whose weights all later layers share; each has its own place in the KV cache."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2 * loops,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    for index in range(2, 2 * loops):
        for first, later in zip(
            model.model.layers[index % 2].modules(), model.model.layers[index].modules(), strict=True
        ):
            for name, parameter in first.named_parameters(recurse=False):
                setattr(later, name, parameter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim >= 2 else 1)
    return model.double().eval()


def prompt() -> dict[str, Tensor]:
    ids = tokens(batch=2, time=6, vocab=31) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
def test_generation_with_a_cache_is_generation_without() -> None:
    model = llama()
    plain = copy.deepcopy(model)
    plan = lt.parametrize(model, prompt())
    assert (plan.loops, plan.layers, len(plan.branches)) == (3, 2, 12)
    assert lt.verify(model, prompt()) == plan
    assert (model(**prompt()).logits - plain(**prompt()).logits).abs().max() > 1e-2
    outputs = [
        model.generate(
            **prompt(),
            max_new_tokens=12,
            do_sample=False,
            use_cache=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for cache in (True, False)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].sequences.shape == (2, 18)
    for cached, uncached in zip(outputs[0].logits, outputs[1].logits, strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-9, atol=1e-9)


# -- PEFT


def with_lora(model: Any, **config: Any) -> Any:
    """LoRA with B away from zero, so that it matters."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "r": 2, "lora_alpha": 8, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False)).double()


class LoopedMLP(nn.Module):
    """What PEFT is put on: each branch is a module that holds the adapted matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PreNormMLP(), PreNormMLP()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for block in self.blocks:
                x = x + block(x)
        return x


class PreNormMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up_proj, self.down_proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(self.norm(x))))


def looped_mlp() -> nn.Module:
    torch.manual_seed(0)
    return noisy(LoopedMLP(), std=0.1)


def lora_oracle(plain: Any, x: Tensor, epsilon: float) -> Tensor:
    """A plain model with LoRA, ε on its branches by hand."""
    for _ in range(3):
        for block in plain.base_model.model.blocks:
            x = x + epsilon * block(x)
    return x


@pytest.mark.parametrize("order", ["LoRA last", "LoRA first"])
def test_lora_is_scaled_with_its_branch(order: str) -> None:
    x = inputs(2, 4, WIDTH)
    if order == "LoRA last":
        model = looped_mlp()
        lt.parametrize(model, x)
        adapted = with_lora(model)
    else:
        adapted = with_lora(looped_mlp())
        plan = lt.parametrize(adapted, x)
        assert (plan.loops, plan.layers) == (3, 2)
    expected = lora_oracle(with_lora(looped_mlp()), x, 1 / (3 * 2**0.5))
    torch.testing.assert_close(adapted(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ["LoRA last", "LoRA first"])
def test_a_model_with_lora_can_be_verified(order: str) -> None:
    x, model = inputs(2, 4, WIDTH), looped_mlp()
    if order == "LoRA last":
        lt.parametrize(model, x)
    adapted = with_lora(model)
    if order == "LoRA first":
        lt.parametrize(adapted, x)
    assert lt.verify(adapted, x).loops == 3
    inner = adapted.base_model.model.blocks[1]
    inner.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(lt.VerificationError, match=r"blocks\.1: "):
        lt.verify(adapted, x)


@pytest.mark.parametrize("order", ["LoRA last", "LoRA first"])
def test_lora_matrices_are_in_the_groups_of_their_branch_and_frozen_weights_in_none(order: str) -> None:
    x, model = inputs(2, 4, WIDTH), looped_mlp()
    if order == "LoRA last":
        lt.parametrize(model, x)
    adapted = with_lora(model)
    if order == "LoRA first":
        lt.parametrize(adapted, x)
    groups = lt.param_groups(adapted, torch.optim.AdamW, lr=0.1)
    trained = {id(parameter) for parameter in adapted.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in groups for parameter in group["params"]} == trained
    assert len(trained) == 8
    assert {group["name"] for group in groups} == {"branches"}
    assert all(group["lr"] == pytest.approx(0.1 / 2**0.5) for group in groups)


class OwnLora(nn.Linear):
    """A low-rank part beside a weight that keeps its name, as loralib has it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.a = nn.Parameter(torch.randn(2, layer.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(layer.out_features, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(super().forward(x) + x @ self.a.T @ self.b.T)


def test_new_parameters_in_a_module_of_one_branch_are_in_its_groups() -> None:
    x, model = inputs(2, 4, WIDTH), looped_mlp()
    lt.parametrize(model, x)
    block = model.blocks[0]
    block.up_proj = OwnLora(block.up_proj)
    block.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
    block.register_forward_hook(lambda module, args, output: output * module.gain)
    model.prompt = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
    model.register_forward_pre_hook(lambda module, args: (args[0] + module.prompt,))
    found = group_by_parameter(model)
    new = {name: found[name] for name in ("blocks.0.up_proj.a", "blocks.0.up_proj.b", "blocks.0.gain", "prompt")}
    assert [group for group, _ in new.values()] == ["branches"] * 2 + ["branches, no decay", "outside, no decay"]
    assert [lr for _, lr in new.values()] == pytest.approx([0.01 / 2**0.5] * 3 + [0.01])
    lt.verify(model, x, optimizer=torch.optim.AdamW(lt.param_groups(model, "adamw", lr=0.01)))
    lt.rescale(model, x)  # traces the new parameters
    assert group_by_parameter(model) == found


@pytest.mark.parametrize("order", ["LoRA last", "LoRA first"])
def test_fold_under_lora_keeps_the_function_or_is_refused(order: str) -> None:
    x, model = inputs(2, 4, WIDTH), looped_mlp()
    if order == "LoRA last":
        lt.parametrize(model, x)
    adapted = with_lora(model)
    if order == "LoRA first":
        lt.parametrize(adapted, x)
    scaled = adapted(x).detach()
    try:
        lt.fold(adapted)
    except lt.InputError as error:
        assert "blocks" in str(error)  # noqa: PT017
    torch.testing.assert_close(adapted(x), scaled, rtol=1e-10, atol=1e-10)


def test_lora_around_the_very_module_that_hands_over_a_branch_is_caught() -> None:
    """The multiplier stays on the frozen matrix inside, and what LoRA adds is not scaled."""
    x = inputs(2, 4, WIDTH)
    torch.manual_seed(0)
    model = noisy(Looped([models.BareBlock()]), std=0.1)
    plan = lt.parametrize(model, x)
    assert [branch.module for branch in plan.branches] == ["blocks.0.f"]
    with pytest.raises(lt.VerificationError, match=r"blocks\.0\.f"):
        lt.verify(with_lora(model, target_modules=["f"]), x)


@pytest.mark.slow
def test_a_looped_llama_takes_lora_before_and_after() -> None:
    adapted = with_lora(llama(loops=1))
    plan = lt.parametrize(adapted, prompt())
    assert len(plan.branches) == 4
    lt.verify(adapted, prompt())
    model = llama(loops=1)
    lt.parametrize(model, prompt())
    later = with_lora(model)
    torch.testing.assert_close(later(**prompt()).logits, adapted(**prompt()).logits, rtol=1e-9, atol=1e-9)
