from pathlib import Path

import pytest

from tests.bad_tables import CLASSES, Bad, all_bad, fault

BAD = all_bad()
SLOWER = [
    pytest.param(bad, marks=pytest.mark.slow if number % 4 else (), id=str(bad)) for number, bad in enumerate(BAD)
]


@pytest.mark.parametrize("bad", SLOWER)
def test_a_bad_source_ends_as_its_row_says_and_never_in_a_verdict(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # given back at the end
    assert fault(bad, tmp_path) is None


def test_the_table_has_hundreds_of_sources_of_every_class() -> None:
    assert len(BAD) >= 600
    assert len({bad.kind for bad in BAD}) >= len(CLASSES)
    assert len({str(bad) for bad in BAD}) == len(BAD)
