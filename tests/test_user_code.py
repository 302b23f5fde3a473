import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import looptransfer as lt
from looptransfer.errors import UserCodeError
from looptransfer.user_code import calls_back, described, place, user_code

HERE = rf"{Path(__file__).name}, line \d+"


class OwnError(BaseException):
    pass


class MuteError(Exception):
    def __str__(self) -> str:
        raise OwnError


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no data"), "ValueError: no data"),
        (SystemExit(0), "SystemExit: 0"),
        (StopIteration(), "StopIteration: "),
        (GeneratorExit(), "GeneratorExit: "),
        (OwnError("mine"), "OwnError: mine"),
        (MuteError(), r"MuteError: \(its message cannot be shown\)"),
        (lt.InputError("own words"), "InputError: own words"),
        (RuntimeError("one\n  two"), "RuntimeError: one two"),
    ],
)
def test_whatever_the_users_code_raises_becomes_one_line_with_their_line(error: BaseException, said: str) -> None:
    line = rf"\(.*{HERE}: raise error\)"
    with (
        pytest.raises(UserCodeError, match=rf"^it fails: {said} {line}; mend it$") as told,
        user_code("it fails", fix="; mend it"),
    ):
        fail(error)
    assert told.value.__cause__ is error
    with pytest.raises(UserCodeError, match=rf"^(it fails: {said}|own words) {line}$"), calls_back("it fails"):
        fail(error)


def test_an_interrupt_goes_through() -> None:
    for boundary in (user_code("x fails"), calls_back("x fails")):
        with pytest.raises(KeyboardInterrupt), boundary:
            raise KeyboardInterrupt


def ours(code: str, **names: object) -> None:
    """Run code as if it stood in the package."""
    exec(code, {"__name__": "looptransfer.somewhere", **names})


CALL = """
from looptransfer.user_code import user_code
with user_code("hook() fails", hook):
    hook()
"""


def test_where_no_line_of_theirs_raised_the_definition_is_named() -> None:
    with pytest.raises(UserCodeError, match=rf"missing 1 required positional argument: 'error' \(.*{HERE}\)$"):
        ours(CALL, hook=fail)
    with pytest.raises(UserCodeError, match=r"hook\(\) fails: TypeError: .*argument.*given\)$"):
        ours(CALL, hook=len)


def test_our_own_faults_are_not_theirs() -> None:
    def bug() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError), calls_back("the trace fails"):
        ours("raise KeyError('bug')")
    with pytest.raises(UserCodeError, match="the trace fails: KeyError: 'bug'"), calls_back("the trace fails"):
        bug()


def test_an_error_of_ours_that_a_line_of_theirs_brought_about_gets_that_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + no_such_name  # type: ignore[name-defined]  # noqa: F821

    said = rf"rejects the example inputs: NameError.*\(.*{HERE}: return x \+ no_such"
    with pytest.raises(UserCodeError, match=said), calls_back("the rewriting fails"):
        lt.parametrize(Broken(), torch.ones(2))


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (fail, True),
        (functools.partial(fail, ValueError()), True),
        (OwnError, True),
        (MuteError().__str__, True),
        (lambda: 0, True),
        (None, False),
        (5, False),
        (nn.Linear(1, 1), False),
        (lt.LoopedDecoder, False),
        (len, False),
    ],
)
def test_a_definition_is_named_where_it_is_the_users_own(hook: object, named: bool) -> None:
    assert (Path(__file__).name in place(hook)) == named


def test_long_messages_are_cut() -> None:
    assert len(described(ValueError("x" * 10_000))) < 600


SCRIPT = """\
import looptransfer as lt
from tests.experiments import tiny_experiment
print("imported")
{call}
"""
SWEEP = "print(len(lt.sweep(tiny_experiment({made}), [1], lrs=[0.01], seeds=2, ledger='l.db'{more})))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "standard_input", "said"),
    [
        (["script.py"], "", "InputError: the script starts trainings when it is imported"),
        (
            ["-c", "{text}"],
            "",
            "InputError: the experiment cannot be sent to worker processes: it is defined in a notebook",
        ),
        (["-"], "{text}", "InputError: the experiment cannot be sent to worker processes: it is defined in a notebook"),
    ],
)
def test_a_script_that_workers_cannot_import_is_told_in_one_line(
    tmp_path: Path, words: list[str], standard_input: str, said: str
) -> None:
    own = "from tests.experiments import squared_error\ndef loss(o, y): return squared_error(o, y)\n"
    text = SCRIPT.format(call=own + SWEEP.format(made="loss=loss, steps=3", more=", workers=2"))
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, *(word.format(text=text) for word in words)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    given = standard_input.format(text=text)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1  # the user's own


@pytest.mark.slow
def test_where_workers_cannot_import_it_the_default_is_to_train_in_this_process(tmp_path: Path) -> None:
    own = "from tests.experiments import squared_error\ndef loss(o, y): return squared_error(o, y)\n"
    text = SCRIPT.format(call=own + SWEEP.format(made="loss=loss, steps=3", more=""))
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["imported", "2"], done.stderr
    assert "looptransfer: training in this process alone: " in done.stderr
