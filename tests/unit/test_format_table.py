"""The table of formats in README.md is what the drivers say of themselves.

`python -m tests.unit.test_format_table --write` brings README.md up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tapfs.disk.probe import format_named, own_format_names
from tapfs.driver import Ability, CreatableFormat, DescribedFormat

README = Path(__file__).parents[2] / "README.md"

#: The columns after the name, in this order; None: the driver does not say, but its class does.
COLUMNS: dict[str, Ability | None] = {
    "read": None,
    "write": Ability.WRITE,
    "create": None,
    "resize": Ability.RESIZE,
    "check": Ability.CHECK,
    "repair": Ability.REPAIR,
    "snapshots": Ability.SNAPSHOTS,
    "backing": Ability.BACKING,
    "encryption": Ability.ENCRYPT,
    "compression": Ability.COMPRESS,
}
_TABLE = re.compile(r"^\| format \|.*\n\|---.*\n(?:\| .*\n)*", re.MULTILINE)


def row(name: str) -> str:
    found = format_named(name)
    assert isinstance(found, DescribedFormat), f"{name} does not say what it can do"
    can = {
        column: ability in found.abilities
        if ability is not None
        else column == "read" or isinstance(found, CreatableFormat)
        for column, ability in COLUMNS.items()
    }
    return f"| {name} | " + " | ".join("✓" if each else "" for each in can.values()) + " |\n"


def table() -> str:
    head = f"| format | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n"
    return head + "".join(row(name) for name in own_format_names())


def test_the_table_in_the_readme_is_true() -> None:
    (written,) = _TABLE.findall(README.read_text(encoding="utf-8"))
    assert written == table(), "run python -m tests.unit.test_format_table --write"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    README.write_text(_TABLE.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")
