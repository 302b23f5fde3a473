import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import looptransfer as lt
from looptransfer.command.cli import main
from looptransfer.command.inspection import parse_inputs, rewritten
from tests import models

HERE = __name__


def with_inputs() -> tuple[nn.Module, torch.Tensor]:
    return models.ResidualMLP(loops=5), torch.ones(2, models.WIDTH)


def without_inputs() -> nn.Module:
    return models.ResidualMLP(loops=5)


def unwilling(width: int) -> nn.Module:
    return models.ResidualMLP(width)


def nothing() -> str:
    return "a model"


instance = models.ResidualMLP(loops=2)


def test_a_factory_may_bring_its_inputs_and_they_may_be_described() -> None:
    assert rewritten(f"{HERE}:with_inputs")[1].loops == 5
    assert rewritten(f"{HERE}:without_inputs", ["float:2x8"])[1].loops == 5
    assert rewritten(f"{HERE}:without_inputs", ["h=float:2x8"])[1].loops == 5


def test_a_model_is_inspected_as_it_stands_and_a_class_is_called() -> None:
    _, plan = rewritten(f"{HERE}:instance", ["float:2x8"], base_layers=4, branches=["f"], layers=2)
    assert (plan.loops, plan.layers, plan.base_layers, plan.declared) == (2, 2, 4, True)
    assert rewritten("looptransfer:LoopedDecoder", ["long:2x16"], rule="unscaled")[1].rule == "unscaled"


def test_inputs_are_tensors_of_the_given_kind_and_shape_and_numbers() -> None:
    long, flag, real, whole, decimal = parse_inputs(["long:2x3", "bool:4", "float:1x2x3", "-4", "0.5"])
    assert (long.dtype, long.shape, set(long.flatten().tolist()) <= {0, 1}) == (torch.long, (2, 3), True)
    assert (flag.dtype, flag.shape) == (torch.bool, (4,))
    assert (real.dtype, real.shape) == (torch.float32, (1, 2, 3))
    assert (whole, decimal) == (-4, 0.5)
    assert parse_inputs(["loops=4"]) == {"loops": 4}


@pytest.mark.parametrize("text", ["", "lng:2x3", "long:", "long:2,3", "x=", "float:2x", "a b"])
def test_inputs_that_are_not_understood_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(lt.InputError, match=r"--inputs .* is not understood; write float:2x16x32"):
        parse_inputs([text])


def test_either_all_inputs_have_names_or_none() -> None:
    with pytest.raises(lt.InputError, match="give either all of them a name"):
        parse_inputs(["long:2", "x=long:2"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (HERE, "names no factory; write PACKAGE.MODULE:FACTORY"),
        ("no_such_package:make", "cannot import no_such_package:make: ModuleNotFoundError"),
        (
            f"{HERE}:no_such",
            f"cannot import {HERE}:no_such: AttributeError",
        ),
        (
            f"{HERE}:unwilling",
            r"unwilling\(\) fails: TypeError.*a factory that takes no arguments",
        ),
        (f"{HERE}:nothing", r"returns a str; it must return a model, or \(model, inputs\)"),
        (f"{HERE}:without_inputs", "gives no example inputs; return"),
    ],
)
def test_a_target_that_makes_no_model_is_refused_with_what_to_do(target: str, message: str) -> None:
    with pytest.raises(lt.InputError, match=message):
        rewritten(target)


def test_lambda_and_a_mean_loop_count_are_those_of_parametrize(capsys: pytest.CaptureFixture[str]) -> None:
    target = ["inspect", f"{HERE}:with_inputs"]
    assert main([*target, "--lam", "2"]) == 0
    assert "λ = 2" in capsys.readouterr().out
    assert main([*target, "--loops", "4"]) == 2
    assert "loops is 4, and the branches were visited 5 times" in capsys.readouterr().err


def test_the_command_prints_the_plan_or_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    target = ["inspect", f"{HERE}:with_inputs"]
    assert main(target) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("rule factored: N = 5, L = 1")
    assert main([*target, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema_version"] == 2
    assert [branch["module"] for branch in data["branches"]] == ["f"]


def test_a_refusal_is_bad_input_for_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "torch.nn:Linear"]) == 2
    assert main(["inspect", f"{HERE}:with_inputs", "--rule", "best"]) == 2
    assert "rule is 'best'; choose one of" in capsys.readouterr().err


def test_modules_in_the_working_directory_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import looptransfer as lt\nmake = lambda: lt.LoopedDecoder(loops=3)\n")
    command = [sys.executable, "-m", "looptransfer", "inspect", "mine:make", "--inputs", "long:1x4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "N = 3" in done.stdout
