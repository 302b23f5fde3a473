import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import looptransfer as lt

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)


def test_import_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, looptransfer; sys.exit(bool({'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert run_python("-c", code).returncode == 0


@pytest.mark.parametrize("name", lt.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(lt, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lt.no_such_name  # noqa: B018


@pytest.mark.slow
def test_the_wheel_installs_and_runs_in_an_empty_environment(tmp_path: Path) -> None:
    built = run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stdout + built.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"looptransfer/py.typed", "looptransfer/report/verdict.html"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)
    # The empty environment borrows this one's dependencies: a path file instead of gigabytes.
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, capture_output=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")))
    shown = subprocess.run(
        [python, "-c", "import looptransfer as lt; print(lt.__file__); lt.LoopedDecoder(); lt.check; lt.write_html"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(site) in shown.stdout
