"""The command lines of the guides: those in fenced blocks of the language `console`, after `$ `.

A block, or a line of it, that a test cannot run has a comment before the block, which names the reason:

    <!-- not run: a Xen host -->
    <!-- not run "tapfs info https": the network -->

The second one is for the lines of the next block that begin with these words.
`python -m tests.unit.guides.guide_commands` lists all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPOSITORY

_FENCE = re.compile(r"^(?: {0,3})```(\w*)\s*$")
_NOT_RUN = re.compile(r'^<!-- not run(?: "([^"]+)")?: (.+) -->$')

#: Whatever keeps a command line from being run by a test. A new reason is to be one that nobody can help.
REASONS = {
    "a Xen host",
    "a kernel module",
    "a port of the host",
    "a virtual machine",
    "it changes the host",
    "it runs until Ctrl-C",
    "it runs what runs this test",
    "it takes minutes",
    "root and a loop device",
    "systemd 261 or newer",
    "the journal of systemd",
    "the network",
    "the probes of a kernel",
}

#: The first words of command lines; a block without a language that has one is to become `console`.
_PROGRAMS = re.compile(
    r"^(?:\$ |# )?"
    r"(?:tapfs|qemu-img|nbd\w+|xl|mount|umount|curl|ssh|make|python|pip|systemctl|modprobe|bpftrace|journalctl|sqlite3)"
    r"\s(?!create / )"
)


class Command(NamedTuple):
    """One command line of a guide, and where its block begins; `reason`: why it is not run, None if it is."""

    page: str
    block: int
    line: int
    text: str
    reason: str | None


def pages() -> list[Path]:
    """All guides: README.md, docs/*.md and the guide for drivers."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "formats/README.md"]


def commands(page: Path) -> Iterator[Command]:
    """The command lines of a guide in their order. A line that ends with a backslash goes on in the next one."""
    name = str(page.relative_to(REPOSITORY))
    language: str | None = None
    reasons: dict[str, str] = {}
    begun: tuple[int, str] | None = None
    block = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence is not None:
            if language is not None:
                language, reasons = None, {}
            else:
                language, block = fence[1], number
        elif language is None:
            excuse = _NOT_RUN.match(line)
            if excuse is not None:
                reasons[excuse[1] or ""] = excuse[2]
        elif language == "console" and (begun is not None or line.startswith("$ ")):
            start, text = (number, line.removeprefix("$ ")) if begun is None else (begun[0], begun[1] + line.strip())
            begun = (start, text.removesuffix("\\")) if text.endswith("\\") else None
            if begun is None:
                reason = next((why for words, why in reasons.items() if text.startswith(words)), None)
                yield Command(name, block, start, text, reason)


def unmarked_commands(page: Path) -> list[str]:
    """Lines of blocks without a language that look like command lines."""
    language: str | None = None
    found: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence is not None:
            language = None if language is not None else fence[1]
        elif language == "" and _PROGRAMS.match(line):
            found.append(f"{page.name}:{number}: {line}")
    return found


if __name__ == "__main__":
    for each in (command for page in pages() for command in commands(page) if command.reason is not None):
        print(f"{each.page}:{each.line}: {each.text}\n    not run: {each.reason}")  # noqa: T201
