import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.text import (
    escaped,
    few,
    markdown_table,
    plain,
    plain_lines,
    printable,
    text_table,
    without_password,
    without_secrets,
)

texts = settings(derandomize=True, deadline=None, max_examples=200)
NASTY = st.text(st.characters(), max_size=30) | st.sampled_from(["::error::x", "##[error]x", "\x1b[31m", "\u202eabc"])


@texts
@given(NASTY)
def test_what_is_printable_is_one_line_without_signs_that_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()


@texts
@given(st.lists(NASTY, min_size=1, max_size=3).map("".join))
def test_a_plain_line_holds_no_command_of_a_ci_log(text: str) -> None:
    assert not re.search(r"::|##\[|##vso\[", plain(text))
    assert all(line.isprintable() for line in plain_lines(text).split("\n"))
    assert plain_lines(text).count("\n") == text.count("\n")


def test_ordinary_words_stay_as_they_are() -> None:
    text = "factored, ε = λ/(N√L): 3 % [−0.2, +0.2]"
    assert text == printable(text) == plain(text)


@texts
@given(NASTY)
def test_markdown_calls_nobody_and_holds_no_html(text: str) -> None:
    shown = escaped(text + "@team #12 http://a.example <b> www.a.example")
    assert "<" not in shown
    assert not re.search(r"@\w|(?<!&)#\d|://\w|www\.\w", shown)
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:secret@host:5432/db#study", "postgresql://user:***@host:5432/db#study"),
        ("mysql+pymysql://user:se/c?r#e@t@host/db", "mysql+pymysql://user:***@host/db"),
        ("postgresql://host/db?user=a&password=secret#study", "postgresql://host/db?***#study"),
        ("redis://:secret@host", "redis://:***@host"),
        ("--ledger=postgresql://user:secret@host/db", "--ledger=postgresql://user:***@host/db"),
        ("sqlite:///results.db#study", "sqlite:///results.db#study"),
        ("results@home:1.csv?", "results@home:1.csv?"),
    ],
)
def test_a_url_shows_neither_password_nor_query(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_what_a_driver_says_is_shown_without_what_the_url_hides() -> None:
    url = "postgresql://user:se%40cret@host/db?passfile=/home/hidden&sslmode=no"
    said = "no user with se@cret or se%40cret in /home/hidden on host"
    assert without_secrets(said, url) == "no user with *** or *** in *** on host"
    assert without_secrets("said", "sqlite:///results.db") == "said"


def test_of_many_names_the_first_few_are_shown_and_that_there_are_more() -> None:
    assert (few([]), few("abcd"), few(iter("abcde"))) == ("", "a, b, c, d", "a, b, c, d, …")


def test_tables_leave_out_what_is_empty_and_stand_for_nothing_without_rows() -> None:
    rows = [{"N": "1", "none": "", "a|b": "x|y"}, {"N": "16", "none": "", "a|b": ""}]
    assert text_table(rows) == ["N   a|b", "1   x|y", "16"]
    assert markdown_table(rows) == ["| N | a\\|b |", "|---|---|", "| 1 | x\\|y |", "| 16 |  |"]
    assert text_table([]) == markdown_table([]) == []
