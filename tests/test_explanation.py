import json

import pytest
import torch
from torch import nn

import looptransfer as lt
from looptransfer.command.cli import main
from tests.models import small_decoder, tokens
from tests.test_audit import Growing, X, muon_and_adamw


def test_a_row_tells_what_a_tensor_gets_and_why() -> None:
    model = small_decoder(layers=4, loops=2)
    lt.parametrize(model, tokens())
    rows = {row.parameter: row for row in lt.explain(model, muon_and_adamw(model, lr_ratio={"embedding": 2.0})).rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    matrix, gain, embedding = (
        rows[name] for name in ("layers.0.mlp.up.weight", "layers.0.mlp_norm.weight", "embedding.weight")
    )
    assert (matrix.family, matrix.role, matrix.layers, matrix.lr) == ("muon", "branch matrix", 0.5, 0.01)
    assert (gain.family, gain.role, gain.lr, gain.eps) == ("adamw", "branch vector", 0.0015, 0.5e-8)
    assert (embedding.ratio, embedding.lr, embedding.weight_decay) == (2.0, 0.006, 0.1)
    assert gain.source == "arXiv 2606.18524, Table 1"
    assert matrix.source == "our extension"


def test_the_frame_and_the_text_hold_the_same_rows() -> None:
    model = Growing(4)
    lt.parametrize(model, X)
    optimizer = torch.optim.SGD(lt.param_groups(model, "sgd", lr=0.1))
    explanation = lt.explain(nn.Sequential(model), optimizer)
    frame = explanation.frame.set_index("parameter")
    assert frame.loc["loop_norm.weight", ["role", "loops", "lr"]].tolist() == ["on stream", 0.25, 0.025]
    assert all(name in str(explanation) for name in frame.index)
    assert "LR / n: acts on the stream n times a forward" in str(explanation)


def test_other_groups_are_refused() -> None:
    model = Growing(2)
    lt.parametrize(model, X)
    with pytest.raises(lt.InputError, match="group 0 of the optimizer holds no lr_factor"):
        lt.explain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(lt.InputError, match="optimizer holds 'sgd'; give optimizers, or groups"):
        lt.explain(model, ["sgd"])  # type: ignore[list-item]


def test_the_command_prints_the_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "looptransfer:LoopedDecoder", "--inputs", "long:2x16", "--optimizer", "muon", "--lr", "0.02"]
    assert main([*words, "--adamw-lr", "0.001"]) == 0
    assert "layers.0.mlp.up.weight          branch matrix  muon       0.02" in capsys.readouterr().out
    assert main([*words, "--adamw-lr", "0.001", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["role"] == "embedding"
    assert main(words) == 2
    assert "give it with muon" in capsys.readouterr().err
