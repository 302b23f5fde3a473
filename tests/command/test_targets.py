import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import looptransfer as lt
from looptransfer.command.inspection import rewritten
from looptransfer.command.targets import load_experiment, load_target, load_trainable
from looptransfer.trials.command import Command
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.function import Function
from tests import experiments

HEAD = "from tests.experiments import tiny_experiment\n"


@pytest.fixture(autouse=True)
def _imports_end_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def written(folder: Path, text: str, name: str = "trained_here.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("experiment = tiny_experiment()", ""),
        ("mine = tiny_experiment()", ":mine"),
        ("def mine():\n    return tiny_experiment()", ":mine"),
        ("class Mine:\n    made = tiny_experiment()", ":Mine.made"),
    ],
)
def test_a_file_gives_an_experiment_or_a_function_that_makes_one(tmp_path: Path, text: str, name: str) -> None:
    assert load_experiment(written(tmp_path, HEAD + text) + name).name == "tiny"


def test_a_relative_file_and_a_module_of_the_working_directory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub", HEAD + "experiment = tiny_experiment()")
    monkeypatch.chdir(tmp_path)
    assert load_experiment("sub/trained_here.py").name == "tiny"
    written(tmp_path, HEAD + "experiment = other = tiny_experiment(name='second')", "second_one.py")
    assert load_experiment("second_one").name == "second"
    assert load_experiment("second_one:other").name == "second"


def test_a_file_may_import_its_neighbours_and_be_named_twice(tmp_path: Path) -> None:
    written(tmp_path, "STEPS = 7", "neighbour_of_it.py")
    target = written(tmp_path, HEAD + "import neighbour_of_it as n\nexperiment = tiny_experiment(steps=n.STEPS)")
    assert load_experiment(target).steps == 7
    assert load_experiment(target) is load_experiment(os.path.relpath(target))


def test_what_is_of_the_kind_is_not_called(tmp_path: Path) -> None:
    target = written(tmp_path, "from torch import nn\nlayer = nn.Linear(1, 1)")
    assert isinstance(load_target(f"{target}:layer", nn.Module, "factory"), nn.Linear)


def test_a_model_is_inspected_from_a_file_as_well(tmp_path: Path) -> None:
    target = written(tmp_path, "import looptransfer as lt\nmake = lambda: lt.LoopedDecoder(loops=3)")
    assert rewritten(f"{target}:make", ["long:1x4"])[1].loops == 3


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            "other = 1",
            "",
            r"cannot import .*trained_here.py: AttributeError: .*'experiment'; give a name that is in it",
        ),
        (
            "def train(lr): ...\ndef _helper(): ...\nclass Net: ...\nfrom math import sin",
            "",
            r"give a name that is in it: .*trained_here.py:train or Net$",
        ),
        ("experiment = 5", "", r"trained_here.py is of type int; name a factory"),
        ("experiment = lambda: 'a string'", "", "gives a str; it must be a looptransfer.Experiment"),
        ("experiment = lambda loops: None", "", r"\(\) fails: TypeError: .*'loops'.*takes no arguments"),
        ("experiment = 5", ":", "names no experiment; write PACKAGE.MODULE:EXPERIMENT"),
        ("1 +", "", r"cannot load .*: SyntaxError: invalid syntax \(trained_here.py, line 1\); correct the file"),
        ("import no_such_thing", "", r"ModuleNotFoundError: .*trained_here.py, line 1: import no_such_thing"),
        ("\n\nx = {}['key']", "", r"KeyError: 'key' \(.*trained_here.py, line 3: x = {}\['key'\]"),
        ("import sys\nsys.exit(0)", "", r"SystemExit: 0 \(.*trained_here.py, line 2"),
        ("def experiment():\n    raise OSError('no data')", "", r"fails: OSError: no data \(.*trained_here.py, line 2"),
        (HEAD + "experiment = tiny_experiment(steps=1)", "", r"InputError: steps is 1.*experiments.py, line \d+"),
        (
            "from torch import nn\nexperiment = nn.Linear('a', 1)",
            "",
            r"TypeError: .*trained_here.py, line 2: experiment",
        ),
    ],
)
def test_a_file_that_gives_no_experiment_is_refused_with_its_own_line(
    tmp_path: Path, text: str, name: str, message: str
) -> None:
    with pytest.raises(lt.InputError, match=message):
        load_experiment(written(tmp_path, text) + name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-file.py", "'my-file' is no Python name"),
        ("a.b.py", "'a.b' is no Python name"),
        ("json.py", "has the name of another module, json; rename the file"),
        ("time.py", "has the name of another module, time"),
        ("torch.py", "has the name of another module, torch"),
    ],
)
def test_a_file_whose_stem_cannot_be_imported_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(lt.InputError, match=message):
        load_experiment(written(tmp_path, "experiment = 1", name))


def test_a_file_of_the_same_name_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    load_experiment(written(tmp_path, HEAD + "experiment = tiny_experiment()"))
    with pytest.raises(lt.InputError, match="has the name of another module, trained_here"):
        load_experiment(written(tmp_path / "sub", HEAD + "experiment = tiny_experiment()"))


def test_a_package_that_hides_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "trained_here").mkdir()
    (tmp_path / "trained_here" / "__init__.py").touch()
    with pytest.raises(lt.InputError, match=r"trained_here.py is hidden by .*__init__.py"):
        load_experiment(written(tmp_path, "experiment = 1"))


@pytest.mark.parametrize("target", ["no_such_file.py", "no_such_file.py:name", "/proc/no/such.py"])
def test_a_missing_file_is_named(target: str) -> None:
    with pytest.raises(lt.InputError, match=r"there is no file .*py; write path/to/file.py:NAME"):
        load_experiment(target)


@pytest.mark.parametrize("target", ["no_such_package", "no_such_package:x", "no/such/file", "..relative:x"])
def test_a_module_that_cannot_be_imported_is_named(target: str) -> None:
    with pytest.raises(lt.InputError, match=r"cannot import .*; run the command where `import"):
        load_experiment(target)


def test_loading_gives_the_very_class_that_trains() -> None:
    assert isinstance(load_experiment("tests.experiments:tiny_experiment"), Experiment)
    assert load_experiment("looptransfer:reference_experiment").name == "reference"


@pytest.mark.slow
def test_worker_processes_find_an_experiment_that_was_loaded_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    text = Path(experiments.__file__).read_text()
    written(tmp_path / "sub", text + "\nexperiment = tiny_experiment(steps=6)\n")
    command = [
        sys.executable,
        "-m",
        "looptransfer",
        "sweep",
        "sub/trained_here.py",
        "--loops",
        "1,2",
        "--lrs",
        "0.01,0.02",
    ]
    command += ["--seeds", "2", "--workers", "2", "-o", "results.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs written to results.csv: 8" in done.stdout


FUNCTIONS = """
import looptransfer as lt
from tests.experiments import tiny_experiment


def train(run):
    return run.lr


def experiment(steps=4):
    return tiny_experiment(steps=steps)


command = lt.Command("x {lr} {loops} {seed}", "{dir}/log.csv:loss")
made = lt.Function(train, "2")
number = 3
"""


@pytest.mark.parametrize(
    ("name", "kind"), [(":train", Function), ("", Experiment), (":command", Command), (":made", Function)]
)
def test_what_can_be_trained_is_told_from_what_makes_it(tmp_path: Path, name: str, kind: type) -> None:
    file = tmp_path / "functions_to_train.py"
    file.write_text(FUNCTIONS)
    made = load_trainable(f"{file}{name}")
    assert isinstance(made, kind)
    if isinstance(made, Function):
        assert made.identity()["name"] == "functions_to_train.train"


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "functions_to_refuse.py"
    file.write_text(FUNCTIONS)
    with pytest.raises(lt.InputError, match="is of type int; name a factory that takes no arguments"):
        load_trainable(f"{file}:number")
