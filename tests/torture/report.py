"""Make the table of docs/reliability.md of what `make torture` counted.

    python -m tests.torture.report build/torture/numbers.json

The records of the files replace those of the same parts in tests/torture/numbers.json, which the repository keeps.
Without a file the table is made of what the repository has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.torture.numbers import Record, read, write
from tests.torture.parts import PARTS

KEPT = REPOSITORY / "tests/torture/numbers.json"
PAGE = REPOSITORY / "docs/reliability.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"


def table(records: Mapping[str, Record]) -> str:
    """The table in Markdown; parts that never ran are named as such."""
    rows = ["| part | what it does | done | failures | took | when and where |", "|---|---|---|---|---|---|"]
    for part in PARTS:
        record = records.get(part.name)
        if record is None:
            rows.append(f"| `{part.name}` | {part.about} | not run | | | |")
            continue
        done = ", ".join(f"{number:,} {what}" for what, number in sorted(record.counts.items()))
        where = f"{record.date}, {record.machine}, {record.processes} at once"
        rows.append(f"| `{part.name}` | {part.about} | {done} | {record.failures} | {record.seconds} s | {where} |")
    return "".join(f"{row}\n" for row in rows)


def with_table(page: str, records: Mapping[str, Record]) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(records)}{END}{after}"


def main(words: list[str]) -> int:
    """Take the records of the files, and write the page."""
    records = read(KEPT)
    for word in words:
        records |= read(Path(word))
    write(KEPT, records)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
