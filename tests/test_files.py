from pathlib import Path

import pytest

from looptransfer.errors import InputError
from looptransfer.files import write_file


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
