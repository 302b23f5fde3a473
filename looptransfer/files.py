"""Writing a file in one go."""

import os
from pathlib import Path

from looptransfer.errors import InputError


def write_text(path: str | Path, text: str | None) -> None:
    """Write beside `path`, then rename: a reader never sees half a file. Without text only try to write.

    Raises:
        InputError: the place cannot be written.
    """
    place = Path(path).resolve()
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        beside.write_text(text or "", encoding="utf-8")
        if text is None:
            beside.unlink()
        else:
            os.replace(beside, place)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose a file in a folder that exists and that you may write to"
        ) from None
