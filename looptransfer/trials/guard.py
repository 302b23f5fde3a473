"""Runs a command that ends when its starter does, however that comes about: `python guard.py WORD…`.

The starter holds the other end of standard input; where it closes, the command and all that it started are ended. This
is a process of its own that must be there at once, and imports nothing but the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 30.0  # seconds between asking a command to end and ending it


def main() -> int:
    """Run the command and return its exit status, 128 + the signal where one ended it."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_starter, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # what it left running
    return status if status >= 0 else 128 - status


def _end_with_starter(process: "subprocess.Popen[bytes]") -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _signal(process, signal.SIGTERM)  # torchrun ends its ranks, which are in sessions of their own
    time.sleep(GRACE)
    _signal(process, signal.SIGKILL)


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
