"""Text as bytes, split by file into train and held-out: the standard library's own sources, or the user's files."""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from looptransfer.errors import InputError

HELD_OUT = 10  # one file in ten is held out
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, with the SHA-256 of both in `digest`."""

    train: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    digest: str

    def windows(self, rng: np.random.Generator, batch: int, length: int) -> npt.NDArray[np.int64]:
        """A training batch of random windows, shape (batch, length + 1)."""
        starts = rng.integers(0, len(self.train) - length, size=batch)
        return self.train[starts[:, None] + np.arange(length + 1)].astype(np.int64)

    def held_out_windows(self, count: int, length: int) -> npt.NDArray[np.int64]:
        """The same `count` evenly spaced held-out windows at every call, shape (count, length + 1)."""
        starts = np.linspace(0, len(self.held_out) - length - 1, count).astype(np.int64)
        return self.held_out[starts[:, None] + np.arange(length + 1)].astype(np.int64)


@lru_cache(maxsize=2)
def load_corpus(text: str | None = None, shortest: int = 1024) -> Corpus:
    """Read a corpus.

    Args:
        text: a file or a folder of the user's; None reads the Python sources of the running interpreter.
        shortest: the fewest bytes that either split may hold.

    Raises:
        InputError: the path does not exist, cannot be read, or holds too little text.
    """
    root = Path(text) if text is not None else Path(sysconfig.get_path("stdlib"))
    try:
        if root.is_file():
            whole = root.read_bytes()
            cut = len(whole) - len(whole) // HELD_OUT
            train, held_out = whole[:cut], whole[cut:]
        else:
            train, held_out = _read_folder(root, "*.py" if text is None else "*")
    except OSError as error:
        raise InputError(f"cannot read the text at {root}: {error.strerror}; give a readable file or folder") from None
    if min(len(train), len(held_out)) < shortest:
        raise InputError(
            f"the text at {root} is too short: {len(train)} bytes to train on and {len(held_out)} held out, "
            f"at least {shortest} of each are needed; give a longer file, or a folder of ten files or more"
        )
    digest = hashlib.sha256(train + b"\0" + held_out).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), digest)


def _read_folder(root: Path, pattern: str) -> tuple[bytes, bytes]:
    root.stat()  # rglob is silent about a folder that is not there
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if path.is_file() and not SKIPPED.intersection(name.parts):
            # The name decides the split, so that adding a file moves no other.
            bucket = hashlib.sha256(name.as_posix().encode()).digest()[0] % HELD_OUT
            (train if bucket else held_out).append(path.read_bytes())
    return b"\n".join(train), b"\n".join(held_out)
