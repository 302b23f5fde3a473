import re

from looptransfer.report.panels import alone, mark
from looptransfer.report.svg import inline_svg


def picture(words: list[str], name: str = "a") -> str:
    return inline_svg(
        alone(lambda axis: mark(axis, range(len(words)), range(len(words)), words, marker="o")), name, "up"
    )


def test_a_mark_has_its_words_and_foreign_signs_stay_text() -> None:
    text = picture(["N = 1", "<b> & \u202e"])
    assert re.findall("<use [^>]*><title>([^<]*)</title></use>", text) == ["N = 1", "&lt;b&gt; &amp; \\u202e"]
    assert picture([]).count("<title>") == 0


def test_a_picture_says_its_result_loads_nothing_and_shares_no_id_with_another() -> None:
    first, second = picture(["x"], "first"), picture(["x"], "second")
    assert first.startswith('<svg role="img" aria-label="up" viewBox="0 0 ')
    assert "http" not in first
    ids = [set(re.findall(' id="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first == picture(["x"], "first")
