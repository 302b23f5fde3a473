import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

import looptransfer as lt
from looptransfer.reference.corpus import Corpus, load_corpus
from looptransfer.reference.experiment import ReferenceSize

FILES = 60


def folder_of(path: Path, files: int = FILES) -> Path:
    path.mkdir()
    for number in range(files):
        (path / f"file{number:02}.txt").write_bytes(f"<{number:02}>".encode() * 100)
    return path


def read(path: Path, shortest: int = 100) -> Corpus:
    load_corpus.cache_clear()  # a folder may have changed between two reads of one test
    return load_corpus(str(path), shortest)


def marks(split: np.ndarray) -> set[str]:
    """Which files of `folder_of` a split holds."""
    return set(split.tobytes().decode().replace("\n", "").replace("><", "> <").split())


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(np.arange(200, dtype=np.uint8), np.arange(100, 180, dtype=np.uint8), "")


def test_the_same_text_gives_the_same_digest_wherever_it_lies(tmp_path: Path) -> None:
    first, second = read(folder_of(tmp_path / "a")), read(folder_of(tmp_path / "b"))
    assert first.digest == second.digest
    assert first.digest == hashlib.sha256(first.train.tobytes() + b"\0" + first.held_out.tobytes()).hexdigest()


def test_a_changed_byte_changes_the_digest(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    before = read(folder).digest
    (folder / "file07.txt").write_bytes(b"<70>" * 100)
    assert read(folder).digest != before


def test_a_folder_is_split_by_file_and_nothing_is_lost(tmp_path: Path) -> None:
    corpus = read(folder_of(tmp_path / "a"))
    train, held_out = marks(corpus.train), marks(corpus.held_out)
    assert not train & held_out
    assert train | held_out == {f"<{number:02}>" for number in range(FILES)}
    assert len(held_out) < len(train)


def test_adding_a_file_moves_no_other_between_the_splits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    before = read(folder)
    (folder / "aaa.txt").write_bytes(b"<AA>" * 100)
    after = read(folder)
    assert marks(after.train) | marks(after.held_out) == marks(before.train) | marks(before.held_out) | {"<AA>"}
    assert marks(after.train) - {"<AA>"} == marks(before.train)
    assert marks(after.held_out) - {"<AA>"} == marks(before.held_out)


def test_subfolders_are_read_and_test_folders_are_not(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    for name, text in (("deeper", b"<in>"), ("tests", b"<no>"), ("site-packages", b"<no>")):
        (folder / name).mkdir()
        (folder / name / "x.txt").write_bytes(text * 100)
    corpus = read(folder)
    assert marks(corpus.train) | marks(corpus.held_out) == {f"<{n:02}>" for n in range(FILES)} | {"<in>"}


def test_a_single_file_keeps_its_last_tenth_held_out(tmp_path: Path) -> None:
    whole = bytes(range(250)) * 40
    path = tmp_path / "text"
    path.write_bytes(whole)
    corpus = read(path)
    assert corpus.train.tobytes() == whole[:9000]
    assert corpus.held_out.tobytes() == whole[9000:]


def test_the_default_text_is_the_standard_library() -> None:
    corpus = load_corpus()
    assert load_corpus().digest == corpus.digest
    assert len(corpus.train) > 5 * len(corpus.held_out) > 1_000_000
    assert b"def namedtuple(" in corpus.train.tobytes() + corpus.held_out.tobytes()


def test_windows_are_contiguous_runs_of_the_training_bytes(corpus: Corpus) -> None:
    windows = corpus.windows(np.random.default_rng(0), batch=7, length=12)
    assert windows.shape == (7, 13)
    assert windows.dtype == np.int64
    assert (np.diff(windows, axis=1) == 1).all()
    assert len(set(windows[:, 0])) > 1


def test_windows_follow_their_generator(corpus: Corpus) -> None:
    first, same, other = (corpus.windows(np.random.default_rng(seed), 7, 12) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_windows_reach_the_first_and_the_last_training_byte(corpus: Corpus) -> None:
    windows = corpus.windows(np.random.default_rng(0), batch=5000, length=190)
    assert windows.min() == 0
    assert windows.max() == 199


def test_held_out_windows_are_the_same_at_each_call_and_span_the_split(corpus: Corpus) -> None:
    windows = corpus.held_out_windows(count=5, length=9)
    np.testing.assert_array_equal(windows, corpus.held_out_windows(count=5, length=9))
    assert windows.shape == (5, 10)
    assert windows.dtype == np.int64
    assert (np.diff(windows, axis=1) == 1).all()
    assert windows[0, 0] == 100
    assert windows[-1, -1] == 179
    assert np.ptp(np.diff(windows[:, 0])) <= 1  # evenly spaced, up to rounding


def test_a_path_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(lt.InputError, match=r"cannot read the text at .*missing: No such file or directory"):
        read(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_unreadable_text_is_refused(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path / "a")
    target = folder if kind == "folder" else folder / "file00.txt"
    target.chmod(0)
    try:
        with pytest.raises(lt.InputError):
            read(folder)
    finally:
        target.chmod(0o755)


def test_an_empty_file_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(lt.InputError, match=r"empty is too short: 0 bytes to train on and 0 held out"):
        read(path)


def test_an_empty_folder_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(lt.InputError, match=r"too short: 0 bytes .*at least 1024 of each.*ten files or more"):
        read(tmp_path, 1024)


def test_a_folder_with_nothing_held_out_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(lt.InputError, match=r"too short: 402 bytes to train on and 0 held out"):
        read(_one_training_file(tmp_path / "a"))


def _one_training_file(path: Path) -> Path:
    path.mkdir()
    name = next(f"{n}.txt" for n in range(100) if hashlib.sha256(f"{n}.txt".encode()).digest()[0] % 10)
    (path / name).write_bytes(b"x" * 402)
    return path


def test_the_shortest_allowed_split_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 1000)
    assert len(read(path, 100).held_out) == 100
    with pytest.raises(lt.InputError, match="too short: 900 bytes to train on and 100 held out, at least 101"):
        read(path, 101)


def test_a_text_too_short_for_the_sequences_is_refused_before_any_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"a few words " * 2000)
    with pytest.raises(lt.InputError, match="too short"):
        lt.reference_experiment(ReferenceSize(sequence=4096), str(text))
