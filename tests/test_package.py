import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

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


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_pins_every_dependency_once_for_each_python(version: str) -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    pins = [pin for line in lines if (pin := Requirement(line)).marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version in SpecifierSet(project["requires-python"])
    for dependency in map(Requirement, project["dependencies"]):
        assert versions[canonicalize_name(dependency.name)] in dependency.specifier


def requirements(name: str, known: set[str]) -> set[str]:
    """The packages that an installed one needs, with those that are known."""
    for line in metadata.requires(name) or []:
        needed = Requirement(line)
        if not needed.marker or needed.marker.evaluate({"extra": ""}):
            key = canonicalize_name(needed.name)
            if key not in known:
                known |= requirements(needed.name, known | {key})
    return known


def test_nothing_that_is_needed_brings_a_torchvision_that_exchanges_the_torch_of_the_user() -> None:
    assert "torchvision" not in requirements("looptransfer", set())


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
