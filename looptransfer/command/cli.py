"""The command line: a command is run, in a process of its own where that runs the user's code, and answers once."""

import argparse
import contextlib
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from looptransfer.command.options import parser
from looptransfer.command.runs import RUNS, Answer
from looptransfer.errors import InputError
from looptransfer.text import plain_lines
from looptransfer.user_code import end_with_parent

USAGE, UNEXPECTED, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141
LEAVE = 5.0  # seconds in which a process has to end that has answered or was interrupted
OWN_CODE = {"demo", "check"}  # the commands that run none of the user's


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 and 3 only with an answer that was printed.

    While a command runs, standard output is standard error: what the user's code prints is not part of the answer.

    Args:
        argv: words of a command line, to be run in this process. Where left out, those of this process; a command that
            runs the user's code then does so in a process of its own, which may end as it likes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what its encoding lacks, as ε in a C locale, is no reason to fail
    arguments = parser().parse_args(argv)
    if sys.stdout is None:
        print("looptransfer: cannot print the answer: standard output is closed", file=sys.stderr)
        return USAGE
    apart = argv is None and arguments.command not in OWN_CODE
    return _print(*(_answer_apart() if apart else _answer(arguments)))


def _answer(arguments: argparse.Namespace) -> Answer:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return RUNS[arguments.command](arguments)
    except InputError as error:
        print(plain_lines(f"looptransfer: {error}"), file=sys.stderr)
        return "", USAGE
    except KeyboardInterrupt:
        print("looptransfer: interrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return "", INTERRUPTED
    except ModuleNotFoundError as error:
        needs = f"{arguments.command} needs {error.name}, which is not installed: pip install {error.name}"
        print(f"looptransfer: {needs}; to judge tables needs pandas and scipy alone", file=sys.stderr)
        return "", USAGE
    except BaseException:
        traceback.print_exc()
        print("looptransfer: this is unexpected; please report it with the lines above", file=sys.stderr)
        return "", UNEXPECTED


def _answer_apart() -> Answer:
    """The answer of a process that runs this process's command line, and bad input where it ends without one."""
    while (
        free := os.open(os.devnull, os.O_RDWR)
    ) < 3:  # no pipe may take the place of a standard stream that is closed
        os.set_inheritable(free, True)
    os.close(free)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_answer, args=(sender, sys.argv[1:]))
    process.start()
    sender.close()
    answer: Answer = "", INTERRUPTED
    try:
        while process.is_alive() and not receiver.poll(1.0):
            pass  # the pipe's end alone would tell nothing where a process that the user's code started keeps it open
        answer = receiver.recv() if receiver.poll() else _no_answer(process)
    except EOFError:
        answer = _no_answer(process)
    except KeyboardInterrupt:
        process.join(1.0)  # a terminal interrupts both, and it says so
        if process.is_alive():
            os.kill(int(str(process.pid)), signal.SIGINT)
    process.join(LEAVE)
    process.kill()  # a thread that was left running
    return answer


def _no_answer(process: BaseProcess) -> Answer:
    process.join()
    reason = f"your code, or a library that it uses, ended its process (exit status {process.exitcode}) or crashed"
    print(f"looptransfer: there is no answer: {reason}", file=sys.stderr)
    return "", USAGE


def _send_answer(sender: Connection, argv: Sequence[str]) -> None:
    end_with_parent()
    os.dup2(2, 1)
    sender.send(_answer(parser().parse_args(argv)))


def _print(text: str, status: int) -> int:
    """Print the answer and return its status; that of a failure where it cannot be printed."""
    try:
        if text:
            print(text, flush=True)
        return status
    except BrokenPipeError:  # `looptransfer check … | head` has read enough
        status = PIPE_CLOSED
    except (OSError, ValueError) as error:
        print(f"looptransfer: cannot print the answer: {error}", file=sys.stderr)
        status = USAGE
    with contextlib.suppress(AttributeError, OSError, ValueError):  # or the rest would be tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
