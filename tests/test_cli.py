import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from looptransfer.cli import main


def sweep_table(drift: float, seeds: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"loops": n, "lr": 2.0**x, "seed": s, "loss": 2 + 0.05 * (x + 6.5 - drift * np.log2(n)) ** 2 + shift}
        for s in range(seeds)
        for shift in [rng.normal(0, 0.01)]
        for n in (1, 2, 4, 8)
        for x in np.arange(-10, -2.5, 0.5)
    ]
    return pd.DataFrame(rows).assign(loss=lambda t: t["loss"] + rng.normal(0, 0.001, len(t)))


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    sweep_table(0.0).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(("drift", "seeds", "status"), [(0.0, 4, 0), (0.6, 4, 1), (0.0, 1, 3)])
def test_exit_status_says_flat_drifts_or_inconclusive(tmp_path: Path, drift: float, seeds: int, status: int) -> None:
    path = tmp_path / "results.csv"
    sweep_table(drift, seeds).to_csv(path, index=False)
    assert main(["check", str(path)]) == status


def test_check_prints_json_with_a_schema_version(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(csv), "--json"])
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["schema_version"] == 1
    assert np.log2(verdict["transferred_lr"]) == pytest.approx(-6.5, abs=0.05)


def test_check_writes_a_page_that_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    sweep_table(0.0).assign(rule="<script>alert(1)</script>").to_csv(path, index=False)
    main(["check", str(path), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_check_loads_no_torch(csv: Path) -> None:
    code = (
        f"import sys, looptransfer.cli as c; s = c.main(['check', {str(csv)!r}]); sys.exit(s or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.csv"], "cannot read no-such.csv"),
        (["{csv}", "--rule", "sqrt"], "rule 'sqrt' is not in the table"),
        (["{csv}", "--confidence", "1.5"], "confidence is 1.5"),
        (["{csv}", "--html", "{csv}"], "would overwrite the table"),
        (["{csv}", "--lr", "0"], "transferred_lr is 0.0"),
        (["{csv}", "--html", "/no/such/folder/page.html"], "cannot write /no/such/folder/page.html"),
    ],
)
def test_bad_input_to_check_ends_with_2_and_names_the_fault(
    csv: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["check", *(a.format(csv=csv) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "/proc/demo"], "cannot write into /proc/demo"),
        (["--seed", "-1"], "--seed is -1"),
        (["--text", "/no/such/text"], "cannot read the text at /no/such/text"),
    ],
)
def test_bad_input_to_demo_ends_with_2_and_names_the_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_usage_ends_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2


def test_anything_unexpected_ends_with_70(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    sweep_table(0.0).to_csv(path, index=False)
    monkeypatch.setattr("looptransfer.transfer.verdict.tidy", lambda table: table["no such column"])
    assert main(["check", str(path)]) == 70
