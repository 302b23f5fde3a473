"""Errors say which page explains them, and warnings stand at the line of the user who called."""

import ast
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import looptransfer as lt
from looptransfer.command.cli import main
from looptransfer.errors import explained_in
from tests.experiments import tiny_experiment

ROOT = Path(__file__).parent.parent


def pages() -> list[str]:
    """The pages that the package names."""
    called = [
        node
        for file in (ROOT / "looptransfer").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "explained_in"
    ]
    return sorted({ast.literal_eval(call.args[0]) for call in called})


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as Markdown makes them, and those it names itself."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    named = {match[1] for heading in headings if (match := re.search(r"\{ #(\S+) \}", heading))}
    return named | {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_the_page_that_explains_an_error_has_that_anchor(page: str) -> None:
    name, _, anchor = page.partition("#")
    assert (ROOT / "docs" / name).exists()
    assert not anchor or anchor in anchors(ROOT / "docs" / name)


def test_an_error_ends_with_the_page_of_the_innermost_function() -> None:
    @explained_in("outer.md")
    def outer() -> None:
        inner()

    @explained_in("inner.md")
    def inner() -> None:
        raise lt.InputError("no")

    with pytest.raises(lt.InputError) as raised:
        outer()
    assert str(raised.value) == "no (more: docs/inner.md)"
    assert str(pickle.loads(pickle.dumps(raised.value))) == "no (more: docs/inner.md)"
    assert str(lt.InputError("no")) == "no"


def test_a_command_prints_the_page_at_the_end_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "missing.csv"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("looptransfer: cannot read missing.csv")
    assert told[0].endswith("(more: docs/table.md#how-a-table-is-read)")


def test_warnings_stand_at_the_line_that_called(tmp_path: Path) -> None:
    class PostNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = self.norm(x + self.map(x))
            return x

    experiment = tiny_experiment()
    same_data = replace(experiment, batches=lambda seed: experiment.batches(0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lt.parametrize(PostNorm(), torch.randn(2, 8))
        lt.sweep(same_data, [1], lrs=[0.01, 0.02], seeds=2, ledger=tmp_path / "runs.db", workers=1)
    kinds = {warning.category for warning in told}
    assert {lt.ScalingWarning, lt.PairingWarning} <= kinds
    ours = [warning for warning in told if warning.category in (lt.ScalingWarning, lt.PairingWarning)]
    assert {warning.filename for warning in ours} == {__file__}
