"""Text in roff for manual pages, by the macros of man(7)."""

from __future__ import annotations

import re
from collections.abc import Iterable


def escaped(text: str) -> str:
    """Text as roff shows it, whatever is in it: a line of it never is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("^", "\\(ha").replace("~", "\\(ti")
    text = "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in text)
    return re.sub(r"(?m)^\.", r"\\&.", text)


def bold(text: str) -> str:
    """Text to be typed as it stands."""
    return f"\\fB{escaped(text)}\\fR"


def italic(text: str) -> str:
    """Text that stands for another."""
    return f"\\fI{escaped(text)}\\fR"


def title(name: str, section: int, *, version: str, date: str) -> str:
    """The first lines of a page."""
    kind = {1: "User Commands", 5: "File Formats", 8: "System Administration"}[section]
    made = '.\\" Made by python -m tapfs.cli.manual from the parsers and the drivers.\n'
    return f'{made}.TH {name.upper()} {section} "{date}" "tapfs {version}" "{kind}"\n.nh\n.ad l\n'


def chapter(heading: str) -> str:
    """The head of a chapter."""
    return f".SH {escaped(heading.upper())}\n"


def tagged(tag: str, text: str) -> str:
    """A paragraph of `text` behind a tag; both are roff already."""
    return f".TP\n{tag}\n{text}\n" if text else f".TP\n{tag}\n\\&\n"


def prose(text: str) -> str:
    """Paragraphs between empty lines. Lines that begin with spaces are shown as they stand."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        made.append(".PP\n")
        made += _lines(paragraph.split("\n"))
    return "".join(made).removeprefix(".PP\n")


def _lines(lines: Iterable[str]) -> Iterable[str]:
    literal = False
    for line in lines:
        if line.startswith(" ") != literal:
            literal = not literal
            yield ".RS 4\n.nf\n" if literal else ".fi\n.RE\n"
        yield f"{escaped(line.strip() if literal else line)}\n"
    if literal:
        yield ".fi\n.RE\n"
