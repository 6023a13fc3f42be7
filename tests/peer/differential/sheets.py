"""Make the tables of known disagreements in the sheets of docs/specs from the rules: one for each format.

python -m tests.peer.differential.sheets
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.conftest import REPOSITORY
from tests.peer.differential.rules import RULES
from tests.peer.differential.seeds import FORMATS

#: The sheet of each format, where it has not the format's name.
_SHEETS = {"qcow": "blktap-qcow"}
BEGIN, END = "<!-- known disagreements -->\n", "<!-- end of the disagreements -->\n"
_HEADING = "## Damaged images, read by tapfs and by QEMU\n"
_ABOUT = (
    "Found by tests/peer/differential with QEMU 7.2, 10 and 11.1 **[b]**; made of its rules by `python -m "
    "tests.peer.differential.sheets`.\n\n"
)


def table(name: str) -> str:
    """The table of a format in Markdown."""
    rows = ["| image | tapfs | QEMU | right |", "|---|---|---|---|"]
    rows += [
        f"| {rule.image} | {rule.tapfs} | {rule.qemu} | {rule.right}: {rule.why} |"
        for rule in RULES
        if name in rule.formats
    ]
    return "".join(f"{row}\n" for row in rows)


def sheets() -> Iterator[tuple[str, str, str]]:
    """Each sheet: its path from the root, its text, and what this is with the table made anew."""
    for name in FORMATS:
        path = f"docs/specs/{_SHEETS.get(name, name)}.md"
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        before, marked, rest = text.partition(BEGIN)
        if not marked:
            before = f"{text.rstrip()}\n\n{_HEADING}{_ABOUT}"
        _, _, after = rest.partition(END)
        yield path, text, f"{before}{BEGIN}{table(name)}{END}{after}"


def main() -> int:
    """Write the sheets."""
    for path, text, made in sheets():
        if text != made:
            (REPOSITORY / path).write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
