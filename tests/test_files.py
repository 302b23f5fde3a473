import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from looptransfer import files
from looptransfer.errors import InputError
from looptransfer.files import check_writable, locked, open_file, same_file, write_file

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.parametrize("content", ["λ/(N√L)\n", b"\x89PNG\r\n"])
def test_text_and_bytes_are_written_as_they_are_and_nothing_else_is_left(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "it"
    path.write_text("before")
    write_file(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_without_content_a_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text("before")
    write_file(path, None)
    write_file(tmp_path / "new", None)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("it", "before")]


@pytest.mark.parametrize("content", [None, "text", b"bytes"])
def test_a_place_that_cannot_be_written_is_named_with_the_fix(tmp_path: Path, content: str | bytes | None) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*; choose a file in a folder that exists"):
        write_file(tmp_path / "nowhere" / "it", content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path / name, "text")


def test_the_mode_of_a_file_stays_and_a_new_one_has_the_usual_mode(tmp_path: Path) -> None:
    path, usual = tmp_path / "it", tmp_path / "usual"
    path.touch()
    path.chmod(0o604)
    usual.touch()
    write_file(path, "text")
    write_file(tmp_path / "new", "text")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert (tmp_path / "new").stat().st_mode == usual.stat().st_mode


@pytest.mark.skipif(AS_ROOT, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text("before")
    path.chmod(0o444)
    with pytest.raises(InputError, match="Permission denied"):
        write_file(path, "text")
    assert path.read_text() == "before"


def test_a_link_is_followed_and_stays_and_a_ring_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link, ring = tmp_path / "folder" / "it", tmp_path / "link", tmp_path / "ring"
    link.symlink_to(target)
    ring.symlink_to(ring)
    for content in ("new", "newer"):
        write_file(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    with pytest.raises(InputError, match="cannot write"):
        write_file(ring, "text")
    assert ring.is_symlink()


@pytest.mark.skipif(not AS_ROOT, reason="only root makes devices")
def test_a_device_is_written_into_and_stays_one(tmp_path: Path) -> None:
    null = tmp_path / "null"
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    before = null.stat()
    write_file(null, "text")
    write_file(null, None)
    assert null.stat().st_mode == before.st_mode
    assert null.stat().st_rdev == before.st_rdev
    assert list(tmp_path.iterdir()) == [null]


def test_the_null_device_is_as_it_was() -> None:
    before = os.stat(os.devnull)
    write_file(os.devnull, "text")
    assert os.path.samestat(os.stat(os.devnull), before)
    assert os.stat(os.devnull).st_rdev == before.st_rdev


def test_a_pipe_is_written_into_and_one_that_nobody_reads_is_an_error_and_no_wait(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="No such device or address"):
        write_file(pipe, "text")
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    content = "x" * 500_000  # more than a pipe holds
    for _ in range(1000):
        try:
            write_file(pipe, content)
            break
        except InputError:  # the reader has not opened it yet
            time.sleep(0.01)
    reader.join(60)
    assert got == [content.encode()]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        write_file(tmp_path, "text")


def test_the_file_that_standard_output_goes_to_is_not_replaced_under_it(tmp_path: Path) -> None:
    code = "from looptransfer.files import write_file; print('verdict', flush=True); write_file('out', 'page')"
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, stdout=out, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert "Standard output goes there" in done.stderr
    assert (tmp_path / "out").read_text() == "verdict\n"


# -- what writers leave that are killed

WRITER = """
import sys
from looptransfer.files import write_file
content = sys.argv[2] * 200_000
print(flush=True)
while True:
    write_file(sys.argv[1], content)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file_and_the_next_one_sweeps_up(tmp_path: Path) -> None:
    path = tmp_path / "it"
    for number in range(12):
        letter = "ab"[number % 2]
        with subprocess.Popen([sys.executable, "-c", WRITER, path, letter], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.02 + 0.003 * number)
            writer.send_signal(signal.SIGKILL)
        if path.exists():
            content = path.read_text()
            assert content in ("a" * 200_000, "b" * 200_000)
    write_file(path, "text")
    assert [one.name for one in tmp_path.iterdir()] == ["it"]


def test_only_what_a_dead_process_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.socket, "gethostname", lambda: "this-machine")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        "dead": f".looptransfer-this-machine-{ended.pid}-x",
        "alive": f".looptransfer-this-machine-{os.getpid()}-x",
        "elsewhere": f".looptransfer-that-machine-{ended.pid}-x",
        "long ago": f".looptransfer-that-machine-{ended.pid}-y",
        "of others": ".looptransfer-notes",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "it").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / names["long ago"], (two_days_ago, two_days_ago))
    (tmp_path / f".looptransfer-this-machine-{ended.pid}-link").symlink_to(tmp_path / names["of others"])
    write_file(tmp_path / "it", "text")
    left = {name for name, folder in names.items() if (tmp_path / folder / "it").exists()}
    assert left == {"alive", "elsewhere", "of others"}


# -- two at once


def _count(path: Path, times: int) -> None:
    for _ in range(times):
        with locked(path):
            write_file(path, str(int(path.read_text()) + 1))


def test_processes_that_lock_a_file_lose_nothing_of_each_other_and_leave_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(path, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert path.read_text() == "200"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_that_is_not_let_go_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with locked(tmp_path / "it"), pytest.raises(InputError, match="locked by another process"), locked(tmp_path / "it"):
        pass
    with pytest.raises(InputError, match="cannot lock"), locked(tmp_path / "nowhere" / "it"):
        pass
    assert not list(tmp_path.iterdir())


# -- read


def test_a_device_is_not_opened(tmp_path: Path) -> None:
    for device in (os.devnull, "/dev/zero"):
        with pytest.raises(OSError, match="Is a device"):
            open_file(device)
    (tmp_path / "it").write_text("text")
    with open_file(tmp_path / "it") as stream:
        assert stream.read() == b"text"


def test_two_names_of_one_file_are_known_as_one(tmp_path: Path) -> None:
    (tmp_path / "it").touch()
    os.link(tmp_path / "it", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("it")
    assert same_file(tmp_path / "it", tmp_path / "hard")
    assert same_file(tmp_path / "it", tmp_path / "soft")
    assert same_file(tmp_path / "new", tmp_path / "." / "new")
    assert not same_file(tmp_path / "it", tmp_path / "new")
    with pytest.raises(InputError, match="is the ledger"):
        check_writable(tmp_path / "it", str(tmp_path / "hard"))
