import json
import os
import platform
from pathlib import Path

import pandas as pd
import pytest

import looptransfer as lt
from looptransfer.command import demo
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.transfer.results import COLUMNS

TINY = demo.DemoSize(
    ReferenceSize(width=16, layers=1, sequence=16, batch=4, steps=12, held_out=1024),
    loops=(1, 2),
    octaves=(-2, -1, 0, 1),
    seeds=3,
    controls=("sqrt", "unscaled"),
    control_octaves=(-1, 0),
    control_seeds=2,
)


@pytest.mark.slow
def test_demo_writes_its_files_and_ends_with_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    lines = demo.run_demo(tmp_path, quick=True)
    results = pd.read_csv(tmp_path / "results.csv")
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    starts = [
        "Tuned LR: ",
        "At N = 2 that LR: ",
        "Verdict over N: ",
        "Coordinate check: ",
        "Cost of tuning: ",
        "Report: ",
    ]
    assert all(any(line.startswith(start) for line in lines) for start in starts)
    assert "unscaled " in next(line for line in lines if line.startswith(starts[1]))
    assert any(line.startswith("Verdict: ") for line in lines[:5])
    assert "<svg" in (tmp_path / "coordinates.html").read_text()
    assert list(results) == COLUMNS
    assert len(results) == 2 * 4 * 3 + 2 * 2 * (4 + 2)
    assert verdict["experiment"]["corpus_sha256"]
    assert not any("seconds" in key for key in verdict)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert 'href="coordinates.html"' in page
    assert f"{platform.platform()}, {os.cpu_count()} cores" in page
    first = (tmp_path / "verdict.json").read_bytes()
    demo.run_demo(tmp_path, quick=True)
    assert (tmp_path / "verdict.json").read_bytes() == first


@pytest.mark.slow
def test_demo_refuses_the_ledger_of_another_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    demo.run_demo(tmp_path, quick=True)
    text = tmp_path / "mine.txt"
    text.write_text("other words " * 4000)
    with pytest.raises(lt.InputError, match="corpus_sha256"):
        demo.run_demo(tmp_path, quick=True, text=str(text))
