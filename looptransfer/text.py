"""Text for people: aligned tables, Markdown, and foreign words that terminals, logs and pages show as what they are."""

import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote

SHOWN = 60  # characters of somebody else's value in a message
FEW = 4  # names in one


def printable(text: str) -> str:
    """Text on one line, in which control characters, line ends and marks that turn the direction are written out."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def short(value: object) -> str:
    """A value in quotes, for an error."""
    text = str(value)
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def few(names: Iterable[object]) -> str:
    """The first names of several, for a message; an ellipsis stands for the others."""
    listed = list(map(str, names))
    return ", ".join(listed[:FEW] + ["…"] * (len(listed) > FEW))


def plain(text: str) -> str:
    """A printable line that a CI log takes for no command, as GitHub's takes `::error::` and `##[error]`."""
    return re.sub(r":(?=:)|##(?=\[|vso)", r"\g<0> ", printable(text))


def plain_lines(text: str) -> str:
    """Text whose line ends are meant, each line plain."""
    return "\n".join(map(plain, text.split("\n")))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line, and that calls nobody and links nowhere."""
    marks = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain(" ".join(text.split())))
    marks = marks.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"@|#|://|www\.", r"\g<0>&#8203;", marks)  # a space of no width, which breaks mentions and links


def without_password(text: str) -> str:
    """Text in which a URL shows neither its password nor its query, which may hold one."""
    if "://" not in text:
        return text
    return re.sub(r"\?[^#]*", "?***", re.sub(r"(://[^:/@?]*):.*@", r"\1:***@", text, flags=re.DOTALL))


def without_secrets(text: str, url: str) -> str:
    """The words of a driver, without what `without_password` hides of the URL."""
    hidden = re.findall(r"://[^:/@?]*:(.*)@", url) + re.findall(r"[?&][^=&#]*=([^&#]*)", url)
    for secret in sorted({*hidden, *map(unquote, hidden)}, key=len, reverse=True):
        text = text.replace(secret, "***") if len(secret) > 2 else text
    return text


def text_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows as aligned lines under their header; columns that are empty throughout are left out."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows as a Markdown table, every cell escaped; columns that are empty throughout are left out."""
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in _cells(rows)]
    return [*lines[:1], "|" + "---|" * len(_cells(rows)[0]), *lines[1:]] if lines else []


def _cells(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    names = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return [names, *([row[name] for name in names] for row in rows)] if rows else []
