"""Reading a file once; writing one in one go, or not at all, and without harm to what is no file of ours."""

import contextlib
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from looptransfer.errors import InputError

ELSEWHERE = "choose a file in a folder that exists and that you may write to"
BESIDE = ".looptransfer-"  # the folder in which a file is made before it is renamed: this, the machine, the process
MOST_BYTES = 2**28  # of a table: two million rows
OLD = 24 * 3600.0  # seconds after which such a folder of another machine is nobody's any more
PATIENCE = 60.0  # seconds that another process may take to write a table or a database


def open_file(path: str | Path) -> BinaryIO:
    """Open a file or a pipe to read.

    Raises:
        OSError: it cannot be read, or is a device, which might never end.
    """
    kind = os.stat(path).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        raise OSError(None, "Is a device")
    return open(path, "rb")


def write_file(path: str | Path, content: str | bytes | None) -> None:
    """Write beside `path`, then rename: a reader never sees half a file. Without content only try to write.

    A link is followed to its file; mode and owner stay. A device or a pipe is written into.

    Raises:
        InputError: the place cannot be written.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            _write_into(path, data)
        else:
            _replace(Path(path).resolve(), data)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in a path, a ring of links
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; {ELSEWHERE}") from None


def _write_into(path: str | Path, data: bytes | None) -> None:
    """Write into what is neither file nor folder, where that is possible at all: it is never replaced."""
    kind = os.stat(path).st_mode
    if not (stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
        raise OSError(None, "Is a directory" if stat.S_ISDIR(kind) else "Is no regular file")
    if data is not None:
        at_once = getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody reads is an error, and no wait
        target = os.open(path, os.O_WRONLY | at_once)
        if stat.S_ISFIFO(kind):
            os.set_blocking(target, True)
        with open(target, "wb") as stream:
            stream.write(data)


def _replace(place: Path, data: bytes | None) -> None:
    before = place.stat() if place.exists() else None
    if before is not None and not os.access(place, os.W_OK):
        raise PermissionError(None, "Permission denied")
    if before is not None and data is not None and _is_stdout(before):
        raise OSError(None, "Standard output goes there")
    _sweep(place.parent)
    machine = socket.gethostname()
    with tempfile.TemporaryDirectory(prefix=f"{BESIDE}{machine}-{os.getpid()}-", dir=place.parent) as folder:
        fresh = Path(folder, place.name)
        fresh.write_bytes(data or b"")
        if before is not None:
            with contextlib.suppress(OSError, AttributeError):  # not one's own to give; Windows has none
                os.chown(fresh, before.st_uid, before.st_gid)
            shutil.copymode(place, fresh)
        if data is not None:
            os.replace(fresh, place)


def _is_stdout(before: os.stat_result) -> bool:
    try:
        return os.path.samestat(before, os.fstat(1))
    except OSError:  # there is none
        return False


def _sweep(folder: Path) -> None:
    """Remove what writers left that were killed."""
    for left in folder.glob(f"{BESIDE}*-*-*"):
        machine, process, _ = left.name.removeprefix(BESIDE).rsplit("-", 2)
        with contextlib.suppress(OSError):
            if machine == socket.gethostname() and os.name == "posix":
                over = not _lives(process)
            else:
                over = time.time() - left.lstat().st_mtime > OLD
            if over and stat.S_ISDIR(left.lstat().st_mode):
                shutil.rmtree(left, ignore_errors=True)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes, on other machines too, from writing `path` by this function meanwhile.

    Raises:
        InputError: another process does not let it go, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415

    place = path.resolve()
    lock_file = place.with_name(f".{place.name}.lock")
    lock = FileLock(lock_file, timeout=PATIENCE)
    try:
        os.stat(place.parent)  # the lock would make the folder
        lock.acquire()
    except Timeout:
        raise InputError(f"{path} has been locked by another process for {PATIENCE:.0f} s; try again") from None
    except OSError as error:
        raise InputError(f"cannot lock {path}: {error.strerror}; {ELSEWHERE}") from None
    try:
        yield
    finally:  # unlinked while it is held: who waits for it sees that its file is gone, and makes a new one
        lock_file.unlink(missing_ok=True)
        lock.release()


def check_new(path: Path) -> None:
    """Refuse to write over what is there."""
    if os.path.lexists(path):
        raise InputError(
            f"{path} exists already; choose another file, or remove it (a table grows with sweep --append)"
        )


def check_writable(path: Path, ledger: str) -> None:
    """Find out before the training whether there is a place for what comes of it."""
    if same_file(path, ledger):
        raise InputError(f"{path} is the ledger; choose another file")
    write_file(path, None)


def same_file(path: str | Path, other: str | Path) -> bool:
    """Two paths lead to one file, by links of either kind too."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.samefile(path, other):
            return True
    return os.path.realpath(path) == os.path.realpath(other)
