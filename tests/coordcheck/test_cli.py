import json
from pathlib import Path

import pandas as pd
import pytest

from looptransfer.command.cli import main

GOOD = "from tests.experiments import tiny_experiment as experiment"
LOST = """
import dataclasses
import torch
import looptransfer as lt
from tests.experiments import FEATURES, LoopedMLP, tiny_experiment

def make(loops):
    model = LoopedMLP(loops)
    lt.parametrize(model, torch.zeros(2, FEATURES))
    model.block.register_forward_hook(lambda module, args, out: out * loops)
    return model

def experiment():
    return dataclasses.replace(tiny_experiment(), make_model=make)
"""
QUICK = ["--loops", "1,2,4,8", "--steps", "1", "--seeds", "4"]


def run(folder: Path, source: str, *arguments: str) -> int:
    path = folder / f"{folder.name}.py"
    path.write_text(source)
    return main(["coordcheck", str(path), *QUICK, *arguments])


def test_a_good_model_ends_with_zero_and_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, GOOD) == 0
    out = capsys.readouterr().out
    assert "coordinate check, factored: PASSES" in out
    assert "multiplier that this model needs: ε ∝ N^−1" in out


def test_a_lost_multiplier_ends_with_one_in_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, LOST, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == "FAILS"
    assert told["reasons"][0].startswith("the multiplier of block is not applied")


def test_the_frame_and_a_page_are_written(tmp_path: Path) -> None:
    assert run(tmp_path, GOOD, "--html", str(tmp_path / "page.html"), "-o", str(tmp_path / "frame.csv")) == 0
    assert "<h1>" in (tmp_path / "page.html").read_text()
    assert set(pd.read_csv(tmp_path / "frame.csv")["loops"]) == {1, 2, 4, 8}


@pytest.mark.parametrize("arguments", [["--loops", "1,x"], ["--loops", "1"], ["--rules", "other"], ["--seeds", "1"]])
def test_bad_usage_ends_with_two(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, GOOD, *arguments) == 2
    assert "looptransfer: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "-o"])
def test_a_place_that_cannot_be_written_ends_with_two_before_anything_is_trained(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "raise AssertionError('too late')", option, str(tmp_path / "no" / "it")) == 2
    assert f"cannot write {tmp_path / 'no' / 'it'}" in capsys.readouterr().err
