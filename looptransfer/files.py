"""Writing a file in one go, or not at all."""

import os
from pathlib import Path

from looptransfer.errors import InputError


def write_file(path: str | Path, content: str | bytes | None) -> None:
    """Write beside `path`, then rename: a reader never sees half a file. Without content only try to write.

    Raises:
        InputError: the place cannot be written.
    """
    place = Path(path).resolve()
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content or b"")
        if content is None:
            beside.unlink()
        else:
            os.replace(beside, place)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose a file in a folder that exists and that you may write to"
        ) from None


def check_new(path: Path) -> None:
    """Refuse to write over what is there."""
    if os.path.lexists(path):
        raise InputError(
            f"{path} exists already; choose another file, or remove it (a table grows with sweep --append)"
        )


def check_writable(path: Path, ledger: str) -> None:
    """Find out before the training whether there is a place for what comes of it."""
    if path.resolve() == Path(ledger).resolve():
        raise InputError(f"{path} is the ledger; choose another file")
    write_file(path, None)
